"""What `steer calibrate` makes of its options where settings are searched, and what it says at the end."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from steer.findings import findings_of
from steer.method import Method
from steer.provenance import gain_of, notes
from steer.strategies import STRATEGIES, Strategy, strategy_of

RANGE = {"low", "high"}


def split(method: type[Method], strategy: str, given: Mapping[str, Any]) -> tuple[dict[str, Any], Strategy]:
    """The fields of the method, and the strategy, that `--set` names.

    Args:
        method: whose settings are searched.
        strategy: a name in `steer.strategies.STRATEGIES`.
        given: what `--set` says, as JSON has it. In `space` a range is {"low": 1.0, "high": 6.0}.

    Raises:
        ValueError: no such strategy or name, or a value that is not understood.
    """
    if strategy not in STRATEGIES:
        raise ValueError(f"--strategy {strategy} does not exist; choose from {', '.join(STRATEGIES)}")
    names = [field.name for field in dataclasses.fields(method) if field.init]
    options = [field.name for field in dataclasses.fields(STRATEGIES[strategy])]
    for name in given:
        if name not in names and name not in options:
            raise ValueError(
                f"--set {name}: {method.__name__} has the fields {', '.join(names)}, and the strategy {strategy} the "
                f"options {', '.join(options)}"
            )
    chosen = {name: value for name, value in given.items() if name in options and name not in names}
    if "space" in chosen:
        chosen["space"] = _space(chosen["space"], strategy)
    return {name: value for name, value in given.items() if name in names}, strategy_of(strategy, chosen)


def _space(given: Any, strategy: str) -> dict[str, Any]:
    """Values and ranges of fields; JSON has no tuples, which is what a range is to a strategy."""
    if not isinstance(given, Mapping):
        raise ValueError(
            f"--set space={given}: write a JSON object of fields, each with a list of values or a range, e.g. "
            '\'space={"strength": [0.5, 1.0], "scale": {"low": 1.0, "high": 6.0}}\''
        )
    space: dict[str, Any] = {}
    for name, values in given.items():
        if isinstance(values, list):
            space[name] = values
        elif not (isinstance(values, Mapping) and set(values) == RANGE and all(map(_is_number, values.values()))):
            raise ValueError(f'space: {name}={values!r} must be a list of values or {{"low": NUMBER, "high": NUMBER}}')
        elif strategy != "optuna":
            raise ValueError(f"space: {name} is a range, which --strategy optuna takes; {strategy} takes a list")
        else:
            space[name] = (values["low"], values["high"])
    return space


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def summary(fitted: Method, output: Path, report: Path | None) -> list[str]:
    """Lines that say what was found, how sure it is, where it is, and how to go on."""
    lines = []
    if (found := findings_of(fitted)) is not None:
        scored, figures = found.found, found.report["figures"]
        if scored is None:
            without = f"{found.objective}: {figures['score without']:.4g} without"
            lines += [f"{without}; what was found was not drawn together, as the budget was over"]
        else:
            gain = gain_of(scored.gain, scored.low, scored.high, found.samples)
            of = f"mean and 95 % interval of {found.samples} samples" if found.samples > 1 else "of 1 sample"
            lines += [
                f"{found.objective}: {scored.without:.4g} without, {scored.score:.4g} with, gain {gain}; {of}, "
                f"{figures['trials']} trials"
            ]
        lines += notes(fitted)
    lines += [f"{fitted.describe()} is in {output}"]
    lines += [f"report and pictures: {report / 'report.md'}"] if report is not None else []
    return [*lines, f'use it: with steer.apply(pipe, steer.load("{output}")): ...']
