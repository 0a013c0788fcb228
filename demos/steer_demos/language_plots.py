"""Pictures of what `steer eval llm` measured: one file for each step that has something to draw."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

Rows = Mapping[str, Mapping[str, Any]]


def draw(report: Mapping[str, Any], folder: Path) -> list[Path]:
    """Write PNG files for the steps of a report.

    Args:
        report: what the command wrote as JSON.
        folder: for the files.

    Returns:
        Their paths.
    """
    folder.mkdir(parents=True, exist_ok=True)
    written = []
    for step, rows in report["steps"].items():
        for name, picture in pictures(rows).items():
            path = folder / f"{report['suite']} {step} {name}.png".replace(" ", "-")
            picture.suptitle(f"{report['model']}: {step}", fontsize=10)
            picture.savefig(path, dpi=130)
            written.append(path)
    return written


def pictures(rows: Rows) -> dict[str, Figure]:
    """The figures that the rows of one step have the data for, by name."""
    drawn: dict[str, Figure] = {}
    for name, (wanted, plot) in PLOTS.items():
        having = {title: row for title, row in rows.items() if row.get(wanted)}
        if having:
            drawn[name] = plot(having)
    return drawn


def grid(rows: Rows) -> Figure:
    """Found pass keys by length and depth, a panel for each row."""
    picture = Figure(figsize=(3.2 * len(rows), 3), layout="constrained")
    panels = picture.subplots(1, len(rows), squeeze=False)
    for panel, (title, row) in zip(panels[0], rows.items(), strict=True):
        lengths = sorted({cell["tokens"] for cell in row["cells"]})
        depths = sorted({cell["depth"] for cell in row["cells"]})
        found = np.full((len(depths), len(lengths)), np.nan)
        for y, depth in enumerate(depths):
            for x, tokens in enumerate(lengths):
                of_cell = [c["found"] for c in row["cells"] if (c["tokens"], c["depth"]) == (tokens, depth)]
                found[y, x] = np.mean(of_cell) if of_cell else np.nan
        image = panel.imshow(found, vmin=0, vmax=1, cmap="RdYlGn", aspect="auto")
        panel.set_xticks(range(len(lengths)), lengths)
        panel.set_yticks(range(len(depths)), depths)
        panel.set_xlabel("tokens")
        panel.set_title(title, fontsize=8)
    panels[0, 0].set_ylabel("depth")
    picture.colorbar(image, ax=panels[0].tolist(), label="found")
    return picture


def curves(rows: Rows) -> Figure:
    """Loss and bytes of the cache against the tokens read."""
    picture = Figure(figsize=(10, 3.6), layout="constrained")
    (loss, held) = picture.subplots(1, 2)
    for title, row in rows.items():
        tokens = [part["tokens"] for part in row["parts"]]
        means = [part["loss"]["mean"] for part in row["parts"]]
        low, high = np.array([part["loss"]["interval"] for part in row["parts"]]).T
        line = loss.plot(tokens, means, label=title)[0]
        loss.fill_between(tokens, low, high, color=line.get_color(), alpha=0.2)
        held.plot(tokens, [part["cache_bytes"] / 2**20 for part in row["parts"]], label=title)
    loss.set(xlabel="tokens read", ylabel="loss of the last part, nats")
    held.set(xlabel="tokens read", ylabel="keys and values held, MiB", ylim=(0, None))
    loss.legend(fontsize=7)
    return picture


def head_map(rows: Rows, key: str, label: str) -> Figure:
    """One number for each head, a panel of layers and heads for each row."""
    picture = Figure(figsize=(1 + 2.4 * len(rows), 5), layout="constrained")
    panels = picture.subplots(1, len(rows), squeeze=False)
    highest = max(float(np.max(row[key])) for row in rows.values())
    for panel, (title, row) in zip(panels[0], rows.items(), strict=True):
        image = panel.imshow(np.array(row[key]), vmin=0, vmax=highest or 1, cmap="viridis", aspect="auto")
        panel.set_xlabel("head")
        panel.xaxis.set_major_locator(MaxNLocator(integer=True))
        panel.set_title(title, fontsize=8)
    panels[0, 0].set_ylabel("layer")
    picture.colorbar(image, ax=panels[0].tolist(), label=label)
    return picture


def by_layer(rows: Rows) -> Figure:
    """The relative error of the attention output by layer."""
    picture = Figure(figsize=(6, 3.4), layout="constrained")
    panel = picture.subplots()
    for title, row in rows.items():
        panel.plot(list(row["error"].values()), label=title)
    panel.set(xlabel="layer", ylabel="relative error of the attention output", ylim=(0, None))
    panel.legend(fontsize=7)
    return picture


def bars(rows: Rows) -> Figure:
    """The share of right answers with its interval."""
    picture = Figure(figsize=(6, 0.6 + 0.4 * len(rows)), layout="constrained")
    panel = picture.subplots()
    for place, row in enumerate(rows.values()):
        mean, (low, high) = row["accuracy"]["mean"], row["accuracy"]["interval"]
        panel.barh(place, mean, xerr=[[max(0, mean - low)], [max(0, high - mean)]], color="tab:blue", alpha=0.6)
    panel.set_yticks(range(len(rows)), list(rows))
    panel.invert_yaxis()
    panel.set(xlabel="right answers", xlim=(0, 1))
    return picture


PLOTS: dict[str, tuple[str, Callable[[Rows], Figure]]] = {
    "grid": ("cells", grid),
    "curves": ("parts", curves),
    "first token": ("first", lambda rows: head_map(rows, "first", "mean weight on the first token")),
    "sinks": ("sinks", lambda rows: head_map(rows, "sinks", "other sinks")),
    "scores": ("scores", lambda rows: head_map(rows, "scores", "retrieval score")),
    "error": ("error", by_layer),
    "accuracy": ("accuracy", bars),
}
