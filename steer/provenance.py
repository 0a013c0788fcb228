"""What a method is, was made for and came from, as rows of text: for `steer show` and the card on the Hub."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch

from steer.artifact import installed
from steer.findings import findings_of
from steer.fingerprint import made_for
from steer.method import Method

Rows = list[tuple[str, str]]

OPTIMISM = (
    "Gains are on the samples that the search itself was given, whose best trial was picked: they flatter it. Compare "
    "with and without on prompts and seeds of your own."
)


def sections(method: Method) -> dict[str, Rows]:
    """Title -> rows of (name, value): settings, what it was made for, the search, its figures; empty ones left out."""
    found = {
        "Settings": _settings(method),
        "Made for": _models(method),
        "Search": _search(method),
        "Figures": _figures(method),
    }
    return {title: rows for title, rows in found.items() if rows}


def notes(method: Method) -> list[str]:
    """Sentences that belong beside the figures of a search with an objective; none without one."""
    if (found := findings_of(method)) is None:
        return []
    said, figures = [], found.report["figures"]
    if found.is_cut:
        said += [
            f"The budget was over after {figures['trials']} of the {figures['trials asked for']} trials that the "
            "strategy asked for; what was found is the best of those."
        ]
    if found.trials[0]["gain"] <= 0:
        said += ["No trial scored higher than no method at all."]
    if (trial := found.better) is not None:
        said += [
            f"A trial scored higher than what was chosen together: {found.label(trial)}, gain {trial['gain']:+.4g}. "
            "Heads that are good one by one need not be so together."
        ]
    return [*said, OPTIMISM]


def best_trials(method: Method, count: int = 10) -> list[tuple[str, str, str]]:
    """Settings, score and gain with its 95 % interval of the best trials, best first; empty without such a search."""
    findings = findings_of(method)
    if findings is None:
        return []
    return [
        (findings.label(row), _short(row["score"]), gain_of(row["gain"], row["low"], row["high"], findings.samples))
        for row in findings.trials[:count]
    ]


def gain_of(gain: float, low: float, high: float, samples: int) -> str:
    """A mean gain with its interval, which one sample does not have."""
    return f"{gain:+.4g} [{low:+.4g}, {high:+.4g}]" if samples > 1 else f"{gain:+.4g}"


def _settings(method: Method) -> Rows:
    changed = method.settings()
    return [(name, _setting(value)) for name, value in changed.items()] or [("", "all as by default")]


def _setting(value: Any) -> str:
    """Readable: of heads a line for each layer."""
    if isinstance(value, Mapping):
        return "\n".join(f"{key}: {', '.join(map(str, each)) or 'none'}" for key, each in value.items())
    if isinstance(value, (list, tuple)) and value and isinstance(value[0], Mapping):
        return "\n".join(f"picture {i}: {_setting(each)}" for i, each in enumerate(value, 1))
    return f"tensor of shape {tuple(value.shape)}" if isinstance(value, torch.Tensor) else str(value)


def _models(method: Method) -> Rows:
    searched = method.record.report.get("model", {}) if method.record is not None else {}
    rows = []
    for key, model in (made_for(method) or {}).items():
        heads = sorted(set(model.get("heads", ())))
        parts = [model["class"], f"{len(model['sites'])} attention sites"]
        parts += [f"{' or '.join(map(str, heads))} heads each"] if heads else []
        parts += [str(model["id"])] if model.get("id") else []
        weights = searched.get(key or "model", {}).get("weights")
        parts += [f"weights {weights}"] if weights else []
        rows.append((key or "model", ", ".join(parts)))
    return rows


def _search(method: Method) -> Rows:
    if method.record is None:
        return []
    report = method.record.report
    rows = [(name, str(value)) for name, value in report.get("options", {}).items()]
    rows += [("samples", str(report["samples"]))] if "samples" in report else []
    digests = list(report.get("data", {}).values())
    more = f" and {len(digests) - 6} more" if len(digests) > 6 else ""
    rows += [("digests of the samples", ", ".join(digests[:6]) + more)] if digests else []
    rows += [("seed", f"{report['seed']}; sample i is drawn with seed + i")] if "seed" in report else []
    versions = report.get("versions") or installed()
    rows += [("versions", ", ".join(f"{name} {version}" for name, version in versions.items() if version))]
    shapes = (f"{name} {tuple(tensor.shape)}" for name, tensor in method.record.tensors.items())
    return [*rows, ("tables", ", ".join(shapes))]


def _figures(method: Method) -> Rows:
    if method.record is None:
        return []
    figures = dict(method.record.report.get("figures", {}))
    rows = []
    if (findings := findings_of(method)) is not None:
        rows += [("score without", _short(figures.pop("score without")))]
        if (found := findings.found) is not None:
            gain = gain_of(found.gain, found.low, found.high, findings.samples)
            rows += [("score with", _short(found.score)), ("gain [95 %]", gain)]
        if (checked := findings.cross_checked) is not None:
            rows += [("gain on each sample of the trial that is best on the others", f"{checked:+.4g}")]
    return rows + [(name, _short(value)) for name, value in figures.items()]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)
