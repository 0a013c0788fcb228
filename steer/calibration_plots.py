"""Pictures of what `steer.calibrate` tried: layers and heads, values of a field, trials in their order. PNG.

Blue is a gain and red a loss, grey what was not tried: told apart without red and green.
"""

from __future__ import annotations

import ast
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from steer.figures import subplots
from steer.findings import Findings, short_names
from steer.plan import Plan

BLUE, RED, GREY, ORANGE = "#2166ac", "#b2182b", "#bbbbbb", "#e69f00"
NAMED = 32  # most layers whose names are written
SHOWN = 20  # trials in a picture of the best
DPI = 130


def draw_round(found: Findings, number: int, file: Path) -> None:
    """Gain of every head in a round, layers down and heads across, and the heads chosen so far in their order.

    Args:
        found: of a search that tries single heads.
        number: of the round, one of `found.rounds`.
        file: PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import MaxNLocator

    table = found.rounds[number]
    layers, heads = table.shape
    reach = max(table[~table.isnan()].abs().tolist(), default=0.0) or 1.0
    size = (min(14.0, max(6.0, 2.5 + heads * 0.36)), min(20.0, max(3.6, 1.6 + layers * 0.3)))
    figure, axes = subplots(figsize=size)
    colours = colormaps["RdBu"].with_extremes(bad=GREY)
    image = axes.imshow(table.numpy(), aspect="auto", interpolation="nearest", cmap=colours, vmin=-reach, vmax=reach)
    for place, ((site, head), chosen_in) in enumerate(found.chosen, 1):
        if chosen_in is not None and chosen_in <= number:
            layer, now = found.record.layer(site), chosen_in == number
            corner, width = (head - 0.46, layer - 0.46), 3.0 if now else 1.5
            axes.add_patch(Rectangle(corner, 0.92, 0.92, fill=False, edgecolor=ORANGE, linewidth=width))
            dark = float(table[layer, head].nan_to_num(0.0).abs()) > 0.6 * reach
            axes.text(head, layer, str(place), ha="center", va="center", color="white" if dark else "black", fontsize=9)
    if layers <= NAMED:
        axes.set_yticks(range(layers), short_names(found.record.sites))
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="head", ylabel="layer")
    beside = "every head alone" if number == 1 else "every other head beside those chosen"
    _title(figure, found, f"round {number} of {max(found.rounds)}: {beside}")
    figure.colorbar(image, ax=axes, label="gain over no method")
    figure.supxlabel("outlined: chosen, numbered in order; grey: chosen before, or not tried", fontsize=8)
    _write(figure, file)


def draw_sweeps(found: Findings, file: Path) -> None:
    """Gain of every value of each field that was swept, with 95 % intervals; a panel for each field.

    Args:
        found: of a search in which some field has several values beside the same others.
        file: PNG to write.
    """
    sweeps = found.sweeps()
    counts = [len(rows) for _, _, rows in sweeps]
    figure, panels = subplots(
        len(sweeps), 1, figsize=(7, 1.4 + 0.28 * sum(counts) + 0.5 * len(counts)), height_ratios=counts,
        squeeze=False, sharex=True,
    )  # fmt: skip
    for axes, (field, others, rows) in zip(panels[:, 0], sweeps, strict=True):
        values = sorted(rows, key=_number) if all(_number(text) is not None for text in rows) else list(rows)
        names = short_names([text.strip("'") for text in values]) if field == "layers" else values
        _dots(axes, names, [rows[value] for value in values])
        axes.set_ylabel(field)
        if others:
            axes.set_title(f"beside {others}", fontsize=8, loc="left")
    panels[-1, 0].set_xlabel("gain over no method; lines: 95 % intervals")
    _title(figure, found, "one field after another")
    _write(figure, file)


def draw_best(found: Findings, file: Path) -> None:
    """Gain of the best trials with 95 % intervals, the best on top."""
    rows = found.trials[:SHOWN]
    figure, axes = subplots(figsize=(7, 1.6 + 0.28 * len(rows)))
    labels = [found.label(row) for row in rows]
    _dots(axes, [label if len(label) <= 48 else label[:47] + "…" for label in labels], rows)
    axes.set_xlabel("gain over no method; lines: 95 % intervals")
    _title(figure, found, f"the best {len(rows)} of {len(found.trials)} trials")
    _write(figure, file)


def draw_progress(found: Findings, file: Path) -> None:
    """Score of every trial in the order of the search, the best so far, and the score of no method."""
    from matplotlib.ticker import MaxNLocator

    rows = sorted(found.trials, key=lambda row: row["number"])
    scores = torch.tensor([row["score"] for row in rows])
    numbers = range(1, len(rows) + 1)
    figure, axes = subplots(figsize=(7, 4))
    axes.plot(numbers, scores.numpy(), "o", color=GREY, markeredgecolor="#777777", label="trial")
    axes.step(numbers, scores.cummax(0).values.numpy(), where="post", color=BLUE, linewidth=2, label="best so far")
    axes.axhline(found.report["figures"]["score without"], color="black", linestyle="--", lw=1, label="no method")
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    axes.set(xlabel="trial", ylabel=f"mean {found.objective}")
    axes.legend(fontsize=8, loc="best")
    _title(figure, found, "trials in their order")
    _write(figure, file)


def draw_table(plan: Plan, table: torch.Tensor, names: Sequence[str] | None, file: Path) -> None:
    """A table of a plan, layers down and heads across, one panel for each step group.

    Args:
        plan: whose table it is.
        table: (G, L, H), figures, or numbers of choices.
        names: of the choices; None = it holds figures.
        file: PNG to write.
    """
    from matplotlib import colormaps
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    groups, layers, heads = table.shape
    size = (1.5 + groups * min(8, max(2.5, heads / 4)), min(10, max(2.5, layers / 4)))
    figure, panels = subplots(1, groups, figsize=size, squeeze=False)
    colours = colormaps["tab10" if names and len(names) <= 10 else "viridis"]
    top = (10 if len(names) <= 10 else len(names)) - 1 if names else None
    for panel, start, values in zip(panels[0], plan.starts, table, strict=True):
        image = panel.imshow(values.float().numpy(), aspect="auto", interpolation="nearest", cmap=colours, vmax=top)
        if names:
            image.set_clim(0, top)
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
        panel.set(title=f"from {start:.0%} of the run", xlabel="head", ylabel="layer")
    if names:
        present = sorted(set(table.flatten().tolist()))
        patches = [Patch(color=colours(int(i) / (top or 1)), label=names[int(i)]) for i in present]
        figure.legend(handles=patches, loc="outside right upper")
    else:
        figure.colorbar(image, ax=list(panels[0]))
    _write(figure, file)


def _dots(axes: Any, labels: Sequence[str], rows: Sequence[Any]) -> None:
    """A dot with its interval for each trial, downwards; the best one filled, no method at 0."""
    axes.axvline(0, color="black", linestyle="--", linewidth=1)
    top = max(row["score"] for row in rows)
    for y, row in enumerate(rows):
        colour = RED if row["gain"] < 0 else BLUE
        axes.plot([row["low"], row["high"]], [y, y], color=colour, linewidth=1.5)
        fill = colour if row["score"] == top else "white"
        axes.plot(row["gain"], y, "o", color=colour, markerfacecolor=fill, markersize=7)
    axes.set_yticks(range(len(rows)), [label.replace("$", r"\$") for label in labels], fontsize=8)
    axes.set_ylim(len(rows) - 0.4, -0.6)
    axes.grid(axis="x", alpha=0.3)


def _title(figure: Any, found: Findings, what: str) -> None:
    samples = f"{found.samples} sample{'s' if found.samples != 1 else ''}"
    figure.suptitle(f"{type(found.method).__name__} for {found.objective}, {samples}\n{what}", fontsize=10)


def _number(text: str) -> Any:
    """The value of a text that is a number in Python, else None."""
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        return None
    return value if isinstance(value, (int, float)) and not isinstance(value, bool) else None


def _write(figure: Any, file: Path) -> None:
    figure.savefig(file, dpi=DPI)
