"""What a calibration found, for people: `report.md` and a picture of layers and heads for each table of the plan."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from steer.method import Method
from steer.plan import Plan


def write(fitted: Method, folder: Path) -> None:
    """Write `report.md` and the pictures into `folder`.

    Args:
        fitted: what `steer.calibrate` made. The tables of its plan are those of shape (G, L, H); where they hold
            choices, `plan.report["names"]` has the name of every choice: {"mode": ["full", "skip"]}.
        folder: made if it does not exist.
    """
    plan = fitted.record
    if plan is None:
        raise TypeError(f"{type(fitted).__name__} was not fitted, so there is nothing to report on")
    folder.mkdir(parents=True, exist_ok=True)
    shape = (len(plan.starts), len(plan.sites), plan.heads)
    tables = {name: tensor.cpu() for name, tensor in plan.tensors.items() if tuple(tensor.shape) == shape}
    parts = [f"# {fitted.describe()}", _facts(plan)]
    for name, table in tables.items():
        names = plan.report.get("names", {}).get(name)
        _draw(plan, name, table, names, folder / f"{name}.png")
        parts += [f"## {name}", f"![{name} of every layer and head]({name}.png)"]
        parts += [_counts(plan, table, names)] if names else []
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def _facts(plan: Plan) -> str:
    """Everything in the report that is one value, and the models."""
    report = plan.report
    rows = {
        "models": ", ".join(f"{key}: {model['class']}" for key, model in report.get("model", {}).items()),
        "samples": report.get("samples"),
        "seed": report.get("seed"),
        **report.get("options", {}),
        **report.get("figures", {}),
    }
    return _markdown(["", ""], [[name, _short(value)] for name, value in rows.items()])


def _counts(plan: Plan, table: torch.Tensor, names: list[str]) -> str:
    """How many heads of each layer have which choice, in every step group."""
    rows = []
    for start, layers in zip(plan.starts, table, strict=True):
        for site, heads in zip(plan.sites, layers, strict=True):
            counts = torch.bincount(heads.long(), minlength=len(names)).tolist()
            rows.append([f"{start:g}", site, *map(str, counts)])
    return _markdown(["from", "site", *names], rows)


def _markdown(header: list[str], rows: list[list[str]]) -> str:
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *rows])


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _draw(plan: Plan, name: str, table: torch.Tensor, names: list[str] | None, file: Path) -> None:
    """Layers down, heads across, one panel for each step group."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

    groups, layers, heads = table.shape
    size = (1.5 + groups * min(8, max(2.5, heads / 4)), min(10, max(2.5, layers / 4)))
    figure, panels = pyplot.subplots(1, groups, figsize=size, layout="constrained", squeeze=False)
    colours = matplotlib.colormaps["tab10" if names and len(names) <= 10 else "viridis"]
    top = (10 if len(names) <= 10 else len(names)) - 1 if names else None
    for panel, start, values in zip(panels[0], plan.starts, table, strict=True):
        image = panel.imshow(values.float(), aspect="auto", interpolation="nearest", cmap=colours, vmax=top)
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
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
