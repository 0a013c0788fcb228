"""What a search over settings leaves behind: all scores, a table of heads for each round, and the figures."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from steer.plan import Plan
from steer.select import by_row, head_mask
from steer.statistics import mean_interval
from steer.strategies import Head, Settings, Trial
from steer_patches.site import Site

WITHOUT = "without"  # the key of the target as it is


def record_of(
    sites: Sequence[Site], asked: Sequence[Sequence[Trial]], scores: Mapping[str, torch.Tensor], found: Settings
) -> Plan:
    """The record of a search.

    Args:
        sites: where the method could act: the layers of the tables.
        asked: the trials of every round.
        scores: settings as text -> (M,) scores of the samples, not a number where not drawn.
        found: the best settings.
    """
    plain, trials = scores[WITHOUT], [trial for each in asked for trial in each]
    keys = dict.fromkeys(key_of(trial.settings) for trial in trials)
    drawn = [WITHOUT, *(key for key in {**keys, key_of(found): None} if key in scores)]
    raw = torch.stack([scores[key] for key in drawn])
    whole = {key_of(trial.settings): trial for trial in trials if not math.isnan(mean_of(scores, trial))}
    rows = [_row(number, key, trial, scores[key], plain) for number, (key, trial) in enumerate(whole.items())]
    rows.sort(key=lambda row: -row["score"])
    return Plan(
        sites=tuple(site.name for site in sites),
        heads=max((site.heads for site in sites), default=0),
        tensors={**_tables(sites, asked, scores, found), "scores": raw},
        report={
            "names": {"chosen": ["left alone", "chosen"]},
            "keys": drawn,
            "found": key_of(found),
            "trials": rows,
            "figures": {
                "score without": float(plain.mean()),
                "best gain": rows[0]["gain"],
                "best gain, low": rows[0]["low"],
                "best gain, high": rows[0]["high"],
                "trials": len(whole),
                "trials asked for": len(keys),
                "pictures drawn": int((~raw.isnan()).sum()),
            },
        },
    )


def _tables(
    sites: Sequence[Site], asked: Sequence[Sequence[Trial]], scores: Mapping[str, torch.Tensor], found: Settings
) -> dict[str, torch.Tensor]:
    """(1, L, H): the gain of every head in each round of single heads, and which heads were chosen."""
    names, width = [site.name for site in sites], max((site.heads for site in sites), default=0)
    plain, tables = float(scores[WITHOUT].mean()), dict[str, torch.Tensor]()
    for trials in asked:
        single = {trial.head: mean_of(scores, trial) - plain for trial in trials if trial.head is not None}
        if single:
            tables[f"gain_{len(tables) + 1}"] = _head_table(single, names, width)
    if sites and "heads" in found and not by_row(found["heads"]):
        tables["chosen"] = torch.zeros(1, len(sites), width, dtype=torch.int8)
        for layer, site in enumerate(sites):
            mask = head_mask(found["heads"], site)
            tables["chosen"][0, layer, : site.heads] = 1 if mask is None else mask.flatten()
    return tables


def _head_table(values: Mapping[Head, float], sites: Sequence[str], heads: int) -> torch.Tensor:
    """(1, L, H) float64 of a value for each head; not a number where there is none."""
    table = torch.full((1, len(sites), heads), math.nan, dtype=torch.float64)
    for (site, head), value in values.items():
        table[0, sites.index(site), head] = value
    return table


def _row(number: int, key: str, trial: Trial, scores: torch.Tensor, plain: torch.Tensor) -> dict[str, Any]:
    """One trial for the report: its score, and its gain over the target as it is, sample by sample."""
    gain, (low, high) = mean_interval(scores - plain)
    head = None if trial.head is None else list(trial.head)
    score = float(scores.mean())
    return {"number": number, "settings": key, "head": head, "score": score, "gain": gain, "low": low, "high": high}


def key_of(settings: Settings) -> str:
    """The settings as text, which tells trials apart."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def mean_of(scores: Mapping[str, torch.Tensor], trial: Trial) -> float:
    """The mean score of a trial; not a number where a sample is missing."""
    row = scores.get(key_of(trial.settings))
    return math.nan if row is None or bool(row.isnan().any()) else float(row.mean())
