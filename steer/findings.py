"""What the record of a search with an objective says: the scores without and with, the order of heads, the values."""

from __future__ import annotations

import ast
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from steer.method import Method
from steer.plan import Plan
from steer.statistics import mean_interval
from steer.strategies import Head
from steer.trials import WITHOUT

THIRDS = ("first", "middle", "last")


@dataclass(frozen=True)
class Scored:
    """Mean scores over the samples: of the target as it is, with a method, and the mean gain with its 95 % interval."""

    without: float
    score: float
    gain: float
    low: float
    high: float


class Findings:
    """Reads the record that `steer.calibrate` leaves with a method whose settings were searched.

    Args:
        method: what `steer.calibrate` made with an objective, or `steer.load` of it.

    Raises:
        TypeError: the method has no such record.
    """

    def __init__(self, method: Method) -> None:
        record = method.record
        if record is None or not has_trials(record):
            raise TypeError(f"{method.describe()} has no record of a search with an objective")
        self.method, self.record, self.report = method, record, record.report
        self.trials: Sequence[Mapping[str, Any]] = record.report["trials"]  # the best first
        self._scores = dict(zip(record.report["keys"], record.tensors["scores"], strict=True))
        self._without = self._scores[WITHOUT]

    @property
    def objective(self) -> str:
        """The objective's name, short enough for a picture."""
        name = str(self.report.get("options", {}).get("objective", "score"))
        inner = name.partition("(")
        return inner[0].rpartition(".")[2] + "".join(inner[1:]) if len(name) <= 40 else inner[0].rpartition(".")[2]

    @property
    def strategy(self) -> str:
        """Name of the strategy's class."""
        return str(self.report.get("options", {}).get("strategy", "")).partition("(")[0]

    @property
    def samples(self) -> int:
        """Samples that were drawn in every trial."""
        return len(self._without)

    @property
    def found(self) -> Scored | None:
        """Scores of the settings that were found; None where the budget was over before they were drawn together."""
        scores = self._scores.get(self.report.get("found", ""))
        if scores is None or bool(scores.isnan().any()):
            return None
        gain, (low, high) = mean_interval(scores - self._without)
        return Scored(float(self._without.mean()), float(scores.mean()), gain, low, high)

    @property
    def better(self) -> Mapping[str, Any] | None:
        """The best trial where it scored higher than what was found; heads chosen together need not be a trial."""
        found = self.found
        return self.trials[0] if found is not None and self.trials[0]["score"] > found.score else None

    @property
    def cross_checked(self) -> float | None:
        """Mean gain, on each sample, of the trial that is best on all the others; None for one sample.

        The sample that scores a trial has no part in its choice, so this is the gain without the luck of the draw, as
        far as the trials themselves did not depend on it: later rounds and optuna's trials did.
        """
        whole = [self._scores[row["settings"]] for row in sorted(self.trials, key=lambda row: row["number"])]
        gains = torch.stack(whole) - self._without  # (K, M)
        if self.samples < 2:
            return None
        others = gains.sum(1, keepdim=True) - gains
        return float(gains.gather(0, others.argmax(0, keepdim=True)).mean())

    @property
    def is_cut(self) -> bool:
        """Whether the budget was over before all trials that the strategy asked for were drawn."""
        figures = self.report["figures"]
        return bool(figures["trials"] < figures["trials asked for"])

    @property
    def gains(self) -> dict[str, int]:
        """Names of the record's tables of gains, each with the number of its round."""
        count = sum(name.startswith("gain_") for name in self.record.tensors)
        return {f"gain_{number}": number for number in range(1, count + 1)}

    @property
    def rounds(self) -> dict[int, torch.Tensor]:
        """Number of each round of single heads -> gain (L, H) over no method, not a number where not tried."""
        return {number: self.record.tensors[name][0] for name, number in self.gains.items()}

    @property
    def chosen(self) -> list[tuple[Head, int | None]]:
        """The chosen heads in the order in which they were chosen, each with its round; None = not from a round.

        A head is tried until it is chosen, so its last round is the one that chose it; within a round the higher gain
        comes first, equal gains in the order of the model.
        """
        table = self.record.tensors.get("chosen")
        if table is None:
            return []
        placed: list[tuple[float, float, Head, int | None]] = []
        for layer, head in table[0].nonzero().tolist():
            tried = {number: float(t[layer, head]) for number, t in self.rounds.items() if not t[layer, head].isnan()}
            last = max(tried, default=None)
            gain = tried[last] if last is not None else 0.0
            placed.append((math.inf if last is None else last, -gain, (self.record.sites[layer], head), last))
        return [(head, last) for _, _, head, last in sorted(placed, key=lambda each: each[:2])]

    def by_depth(self) -> list[tuple[str, int, int]]:
        """For each third of the searched layers: its name, its layers, and how many of the chosen heads it holds."""
        layers = len(self.record.sites)
        third = [layer * 3 // layers for layer in range(layers)]
        held = [third[self.record.layer(site)] for (site, _), _ in self.chosen]
        return [(name, third.count(i), held.count(i)) for i, name in enumerate(THIRDS)]

    def sweeps(self) -> list[tuple[str, str, dict[str, Mapping[str, Any]]]]:
        """Fields of which several values were tried beside the same others: (field, the others, value -> its trial)."""
        groups: dict[tuple[str, str], dict[str, Mapping[str, Any]]] = {}
        for row in sorted(self.trials, key=lambda row: row["number"]):
            settings = settings_of(row["settings"])
            for field, value in settings.items():
                others = ", ".join(f"{name}={text}" for name, text in settings.items() if name != field)
                groups.setdefault((field, others), {})[value] = row
        return [(field, others, rows) for (field, others), rows in groups.items() if len(rows) > 1]

    def label(self, trial: Mapping[str, Any]) -> str:
        """What a trial tried, short: "layer 3, head 4, beside 2", "scale=2", "heads 3: 4; 5: 0, 1"."""
        short = dict(zip(self.record.sites, short_names(self.record.sites), strict=True))
        if trial["head"] is not None:
            site, head = trial["head"]
            heads = ast.literal_eval(settings_of(trial["settings"]).get("heads", "{}"))
            beside = max(0, sum(map(len, heads.values())) - 1)
            return f"layer {short.get(site, site)}, head {head}" + (f", beside {beside}" if beside else "")
        parts = []
        for name, text in settings_of(trial["settings"]).items():
            try:
                value = ast.literal_eval(text)
            except ValueError:
                value = text
            if name == "heads" and isinstance(value, dict):
                listed = (f"{short.get(site, site)}: {', '.join(map(str, heads))}" for site, heads in value.items())
                parts.append(f"heads {'; '.join(listed)}")
            elif isinstance(value, float):
                parts.append(f"{name}={value:.4g}")
            elif value is not None:
                parts.append(f"{name}={short.get(value, value) if isinstance(value, str) else value}")
        return ", ".join(parts) or trial["settings"] or "as given"


def findings_of(method: Method) -> Findings | None:
    """The findings of a method, None where no search with an objective made it."""
    return Findings(method) if method.record is not None and has_trials(method.record) else None


def has_trials(record: Plan) -> bool:
    """Whether a record is one of a search with an objective, rather than what a method's own search found."""
    return "scores" in record.tensors and "keys" in record.report


def settings_of(key: str) -> dict[str, str]:
    """The settings that a key of the record names: field -> its value as it is written in Python; {} if it is not."""
    try:
        call = ast.parse(f"settings({key})", mode="eval").body
    except SyntaxError:  # a strategy of the user's own tried objects
        return {}
    assert isinstance(call, ast.Call)
    return {str(each.arg): ast.unparse(each.value) for each in call.keywords}


def python_line(method: Method) -> str | None:
    """The method as a line of Python to copy; None where its settings are too large for one."""
    import steer

    settings = method.settings()
    if any(isinstance(value, (torch.Tensor, Plan)) for value in settings.values()):
        return None
    known = getattr(steer, type(method).__name__, None) is type(method)
    return ("steer." if known else "") + method.describe()


def short_names(names: Sequence[str]) -> list[str]:
    """Names of sites without the leading and trailing parts that all of them share: "3" of "blocks.3.attn"."""
    parts = [name.split(".") for name in names]
    if len(set(names)) < 2:
        return list(names)
    shortest = min(map(len, parts))
    start = next(i for i in range(shortest + 1) if i == shortest or len({tuple(p[: i + 1]) for p in parts}) > 1)
    end = next(i for i in range(shortest + 1) if i == shortest or len({tuple(p[-i - 1 :]) for p in parts}) > 1)
    short = [".".join(p[start : len(p) - end]) for p in parts]
    return short if all(short) else list(names)
