"""Measures a language model and methods on it, without any data files: `steer eval llm smollm2-135m-instruct`."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import platform
import re
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from rich.table import Column, Table
from transformers import PreTrainedModel

import steer
from steer.artifact import installed
from steer.method import Method
from steer.opening import assignments
from steer_demos import models
from steer_demos.language_suites import FIRST_SEED, SEARCH_SEED, SUITES, Bench, Rows, suite

WIDEST = 3  # figures beside each other in a table
COUNTED = ("cache_bytes", "number_of_heads", "density", "kept_share", "rank_correlation", "padding_error")


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded language model, folder or hub id.")] = "smollm2-135m-instruct",
    method: Annotated[list[str] | None, typer.Option(help="A method to measure; may be repeated.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a field of the method, or an option of its search.")
    ] = None,
    artifact: Annotated[list[Path] | None, typer.Option(help="Folder of a saved method; may be repeated.")] = None,
    suite_name: Annotated[str, typer.Option("--suite", help=", ".join(SUITES))] = "measures",
    only: Annotated[
        str | None, typer.Option(help="Only these steps, comma separated; those of the file that it has not stay.")
    ] = None,
    smoke: Annotated[bool, typer.Option("--smoke", help="Few and short samples: shows that it runs.")] = False,
    output: Annotated[Path, typer.Option(help="JSON file to write, after every step.")] = Path("llm.json"),
    plots: Annotated[Path | None, typer.Option(help="Folder for pictures.")] = None,
) -> None:
    """Pass keys, recall, agreement with the dense model, loss, sinks, choices: with intervals and controls."""
    if plots is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plots draws with matplotlib: pip install 'steer-attention[plot]'")
    steps = chosen_steps(suite_name, only)
    given = assignments("--set", settings or [])
    loaded = models.load(model)
    if not isinstance(loaded, tuple) or not isinstance(loaded[0], PreTrainedModel):
        raise ValueError(f"{model} is no language model. `steer models` lists what is.")
    language_model, tokenizer = loaded
    bench = Bench(language_model, tokenizer, methods_of(method or [], given, artifact or []), given, small=smoke)
    report: dict[str, Any] = {
        "model": Path(model).name,
        "suite": suite_name,
        "smoke": smoke,
        "settings": given,
        "seeds": {"evaluation": FIRST_SEED, "search": SEARCH_SEED},
        "measured_on": f"{language_model.device.type}, {platform.machine()}, {torch.get_num_threads()} threads",
        "versions": installed(),
        "methods": {name: chosen.describe() if chosen else "dense" for name, chosen in bench.methods.items()},
        "steps": {},
        "seconds": {},
    }
    if only is not None and output.is_file():
        keep_steps(report, json.loads(output.read_text()))
    for name, step in steps.items():
        started = time.monotonic()
        rows = step(bench)
        report["steps"] |= {name: rows}
        report["seconds"] |= {name: round(time.monotonic() - started, 1)}
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_text(to_text(report))
        show(name, rows, report["seconds"][name])
    print(f"wrote {output}")
    if plots is not None:
        from steer_demos.language_plots import draw

        for path in draw(report, plots):
            print(f"wrote {path}")


def chosen_steps(suite_name: str, only: str | None) -> dict[str, Any]:
    """The steps of a suite, or those of them that are named."""
    steps = suite(suite_name)
    if only is None:
        return steps
    names = [name.strip() for name in only.split(",")]
    for name in names:
        if name not in steps:
            raise ValueError(f"the suite {suite_name} has no step {name!r}; it has {', '.join(steps)}")
    return {name: steps[name] for name in names}


def methods_of(names: list[str], given: Mapping[str, Any], artifacts: list[Path]) -> dict[str, Method | None]:
    """The dense model, methods by name with the settings that they have, and saved methods.

    Raises:
        ValueError: no such method, or a setting that none of them has.
    """
    known = steer.methods()
    chosen: dict[str, Method | None] = {"dense": None}
    used: set[str] = set()
    for name in names:
        if name not in known:
            raise ValueError(f"there is no method {name}; there are {', '.join(known)}")
        own = {key: value for key, value in given.items() if key in {f.name for f in dataclasses.fields(known[name])}}
        used |= set(own)
        chosen[name] = known[name](**own)
    if names and set(given) - used:
        raise ValueError(f"{', '.join(names)} has no field {', '.join(sorted(set(given) - used))}")
    return chosen | {folder.name: steer.load(str(folder)) for folder in artifacts}


def to_text(report: Mapping[str, Any]) -> str:
    """JSON with every list of plain values on one line."""
    text = json.dumps(report, indent=1)
    return re.sub(r"\[[^\[\]{}]*\]", lambda found: " ".join(found[0].split()), text) + "\n"


def keep_steps(report: dict[str, Any], before: Mapping[str, Any]) -> None:
    """Take over the steps of an evaluation of the same model and methods."""
    same = [key for key in report if key not in ("steps", "seconds", "measured_on")]
    if all(before.get(key) == json.loads(json.dumps(report[key])) for key in same):
        report["steps"], report["seconds"] = dict(before["steps"]), dict(before["seconds"])


def show(step: str, rows: Rows, seconds: float) -> None:
    """Print the rows of a step: its figures with their intervals, and numbers without one."""
    names: list[str] = []
    for row in rows.values():
        names += [name for name in row if name not in names and (is_figure(row[name]) or name in COUNTED)]
    table = Table(Column(step, no_wrap=True), *(names if len(names) <= WIDEST else ("", "")))
    for title, row in rows.items():
        add_row(table, title, row, names)
        for against in row:
            if against.startswith("against_"):
                add_row(table, f"  {against.replace('_', ' ')}", row[against], names, "+")
    console = Console()
    console.print(table)
    console.print(f"{seconds:.0f} s; in brackets 95 % bootstrap intervals; torch {torch.__version__}")


def add_row(table: Table, title: str, row: Mapping[str, Any], names: list[str], sign: str = "") -> None:
    """The figures of one row side by side, or below one another where they are too many for a terminal."""
    if len(names) <= WIDEST:
        table.add_row(title, *(cell(row.get(name), sign) for name in names))
        return
    for name in names:
        if row.get(name) is not None:
            table.add_row(title, name, cell(row[name], sign))
            title = ""


def is_figure(value: Any) -> bool:
    """Whether this is a mean with its interval."""
    return isinstance(value, Mapping) and "interval" in value


def cell(value: Any, sign: str = "") -> str:
    """A figure as text, or a number."""
    if is_figure(value):
        low, high = value["interval"]
        return f"{value['mean']:{sign}.3f} [{low:.3f}, {high:.3f}]"
    if value is None:
        return ""
    return f"{value:,}" if isinstance(value, int) else f"{value:.3g}"


if __name__ == "__main__":
    typer.run(evaluate_command)
