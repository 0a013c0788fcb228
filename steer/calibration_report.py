"""What a calibration found, for people: `report.md` and pictures of layers, heads, values and trials."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from steer.artifact import to_json
from steer.calibration_plots import draw_best, draw_progress, draw_round, draw_sweeps, draw_table
from steer.findings import Findings, findings_of, python_line
from steer.method import Method
from steer.plan import Plan
from steer.provenance import best_trials, gain_of, notes, sections

SHOWN = 20  # trials in the table


def write(fitted: Method, folder: Path) -> None:
    """Write `report.md` and the pictures into `folder`.

    Args:
        fitted: what `steer.calibrate` made. Of a search with an objective the report says what was asked, what was
            found and what was tried. Of a method's own search it shows the tables of the plan that are of shape
            (G, L, H); where they hold choices, `plan.report["names"]` has the name of every choice:
            {"mode": ["full", "skip"]}.
        folder: made if it does not exist.

    Raises:
        TypeError: a method that was not fitted.
    """
    plan = fitted.record
    if plan is None:
        raise TypeError(f"{type(fitted).__name__} was not fitted, so there is nothing to report on")
    folder.mkdir(parents=True, exist_ok=True)
    found = findings_of(fitted)
    parts = _of_plan(fitted, plan, folder) if found is None else _of_trials(found, folder)
    (folder / "report.md").write_text("\n\n".join(parts) + "\n")


def _of_trials(found: Findings, folder: Path) -> list[str]:
    line = python_line(found.method) or "Its settings are too large for a line: keep it with `save`, see `steer.load`."
    parts = [f"# {type(found.method).__name__} fitted to {found.objective}", "## Found", f"```python\n{line}\n```"]
    parts += [_markdown(["", ""], _score_rows(found)), *notes(found.method)]
    if found.chosen:
        parts += [_chosen(found)]
    parts += ["## Asked", _markdown(["", ""], _asked_rows(found)), "## Tried", *_pictures(found, folder)]
    return [*parts, _best_trials(found)]


def _score_rows(found: Findings) -> list[list[str]]:
    """Scores without and with what was found, and how sure they are."""
    rows = [[f"mean {found.objective} without", _short(found.report["figures"]["score without"])]]
    scored = found.found
    if scored is None:
        rows += [["with", "not drawn: the budget was over"]]
    else:
        gain = gain_of(scored.gain, scored.low, scored.high, found.samples)
        paired = f"95 % interval of {found.samples} differences" if found.samples > 1 else "no interval of one sample"
        rows += [["with", _short(scored.score)], ["gain", f"{gain}, {paired}"]]
    if (checked := found.cross_checked) is not None:
        rows += [["cross-checked gain", f"{checked:+.4g}: of the trial that is best on the other samples, on each"]]
    return rows


def _chosen(found: Findings) -> str:
    """The chosen heads in their order, and how they spread over the depth."""
    heads = found.chosen
    rows = [
        [str(place), site, str(head), "" if number is None else str(number)]
        for place, ((site, head), number) in enumerate(heads, 1)
    ]
    text = _markdown(["", "site", "head", "round"], rows)
    if len(found.record.sites) >= 3:
        thirds = [[name, str(n), f"{held} ({held / len(heads):.0%})"] for name, n, held in found.by_depth()]
        text += "\n\n" + _markdown(["third of the depth", "layers", "chosen heads"], thirds)
        text += "\n\nIn arXiv 2506.10978 heads for quality sit early and in the middle, heads for styles later."
    return text


def _asked_rows(found: Findings) -> list[list[str]]:
    rows, figures = sections(found.method), found.report["figures"]
    given = _changed(type(found.method), found.report.get("settings", {}))
    method = f"{type(found.method).__name__}({', '.join(f'{name}={value}' for name, value in given.items())})"
    drawn = f"{figures['trials']} of {figures['trials asked for']} asked for, {figures['pictures drawn']} pictures"
    asked = [*rows.get("Made for", []), ("method", method), ("trials drawn", drawn), *rows.get("Search", [])]
    return [[name, value.replace("\n", ", ")] for name, value in asked]


def _changed(cls: type[Method], settings: Mapping[str, Any]) -> dict[str, str]:
    """Settings that are not the method's defaults, written as in Python."""
    defaults = {name: getattr(cls, name, None) for name in settings}
    return {
        name: repr(value.get("mapping", value) if isinstance(value, dict) else value)
        for name, value in settings.items()
        if value is not None and value != defaults[name] and value != _json(defaults[name])
    }


def _json(value: Any) -> Any:
    try:
        return to_json("default", value)
    except TypeError:
        return value


def _pictures(found: Findings, folder: Path) -> list[str]:
    """The pictures that this search has, written into the folder, as Markdown."""
    if found.rounds:
        tried = [number for number, table in found.rounds.items() if not bool(table.isnan().all())]
        for number in tried:
            draw_round(found, number, folder / f"gain_{number}.png")
        return [f"![gain of every layer and head in round {number}](gain_{number}.png)" for number in tried]
    if found.strategy == "Sweep" and found.sweeps():
        draw_sweeps(found, folder / "sweep.png")
        return ["![gain of every value](sweep.png)"]
    if found.strategy in ("Sweep", "RandomHeads"):
        draw_best(found, folder / "best.png")
        return ["![gain of the best trials](best.png)"]
    draw_progress(found, folder / "progress.png")
    return ["![score of every trial, and the best so far](progress.png)"]


def _best_trials(found: Findings) -> str:
    rows = [[text.replace("|", r"\|") for text in row] for row in best_trials(found.method, SHOWN)]
    table = _markdown(["settings", found.objective, "gain [95 %]"], rows)
    return f"The best {len(rows)} of {len(found.trials)} trials:\n\n{table}"


def _of_plan(fitted: Method, plan: Plan, folder: Path) -> list[str]:
    shape = (len(plan.starts), len(plan.sites), plan.heads)
    tables = {name: tensor.cpu() for name, tensor in plan.tensors.items() if tuple(tensor.shape) == shape}
    parts = [f"# {fitted.describe()}", _facts(plan)]
    for name, table in tables.items():
        names = plan.report.get("names", {}).get(name)
        draw_table(plan, table, names, folder / f"{name}.png")
        parts += [f"## {name}", f"![{name} of every layer and head]({name}.png)"]
        parts += [_counts(plan, table, names)] if names else []
    return parts


def _facts(plan: Plan) -> str:
    """Everything in the report that is one value, and the models."""
    report = plan.report
    rows = {
        "models": _models(report),
        "samples": report.get("samples"),
        "seed": report.get("seed"),
        **report.get("options", {}),
        **report.get("figures", {}),
    }
    return _markdown(["", ""], [[name, _short(value)] for name, value in rows.items()])


def _models(report: Mapping[str, Any]) -> str:
    return ", ".join(f"{key}: {model['class']}" for key, model in report.get("model", {}).items())


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
