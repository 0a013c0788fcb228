"""The picture of what `steer eval vlm --suite methods` measured."""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure
from PIL import Image

SHOWN = {
    "balanced accuracy": ("presence, all", "balanced_accuracy"),
    "ranking": ("ranking", "accuracy"),
    "share of yes": ("presence, all", "yes_ratio"),
    "CHAIR_I, made up things": ("captions", "chair_i"),
}
COLOURS = ("tab:blue", "tab:red", "tab:green")


def draw(report: Mapping[str, Any], path: Path) -> None:
    """Write a PNG: the differences to the baseline in points, a panel for each figure, a line for each configuration.

    Args:
        report: what the command wrote as JSON.
    """
    conditions = {name: rows for name, rows in report["conditions"].items() if len(rows) > 1}
    titles = [title for title in next(iter(conditions.values())) if title != "baseline"]
    picture = Figure(figsize=(10.5, 1.4 + 0.24 * len(titles)), layout="constrained")
    panels = picture.subplots(1, len(SHOWN), sharey=True)
    for panel, (label, (part, name)) in zip(panels, SHOWN.items(), strict=True):
        panel.axvline(0, color="black", linewidth=0.8)
        for number, (condition, rows) in enumerate(conditions.items()):
            found = [rows[title][part][name] for title in titles]
            means = [100 * figure["difference"] for figure in found]
            low, high = ([100 * figure["interval"][edge] for figure in found] for edge in (0, 1))
            at = [place + 0.3 * (number - (len(conditions) - 1) / 2) for place in range(len(titles))]
            colour = COLOURS[number % len(COLOURS)]
            panel.hlines(at, low, high, color=colour, linewidth=1)
            panel.plot(means, at, "o", color=colour, markersize=3, label=condition)
        starts = [
            f"{condition} {100 * rows['baseline'][part][name]['mean']:.1f} %" for condition, rows in conditions.items()
        ]
        panel.set_title(f"{label}\n{', '.join(starts)}", fontsize=8)
        panel.grid(axis="x", alpha=0.3)
        panel.tick_params(labelsize=7)
    panels[0].set_yticks(range(len(titles)), titles)
    panels[0].invert_yaxis()
    panels[0].tick_params(axis="y", labelsize=8)
    picture.legend(*panels[0].get_legend_handles_labels(), loc="outside lower left", ncols=len(conditions), fontsize=8)
    what = f"{report['model']}, {report['scenes']} scenes: points above or below the baseline, 95 % intervals"
    picture.supxlabel(what, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    drawn = io.BytesIO()
    picture.savefig(drawn, dpi=100)
    with Image.open(drawn) as image:
        image.convert("RGB").quantize(32).save(path, format="PNG", optimize=True)
