"""What the judge says of the pictures of `steer eval heads`, with intervals, and of paired differences."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from steer.objectives import sharpness
from steer.statistics import mean_interval
from steer_demos.emoji import BACKGROUNDS, STYLES, concepts
from steer_demos.evaluate_pictures import Prompt
from steer_demos.intervals import frechet_distance
from steer_demos.judge import Judge
from steer_demos.objectives import log_probabilities, style_margins

STYLE = "twemoji"  # what is asked for where a prompt does not say, and what the search for a style looks for
MEASURES = ("right concept", "log-probability", "right style", "style margin", "sharpness")


@dataclass(frozen=True, eq=False)
class Measured:
    """What the judge says of the pictures of one condition.

    Args:
        values: of each measure (N,) float64, not a number where the prompt does not ask.
        frechet: distance between the features of the pictures and of all renders.
        resampled: the same of 100 resamples of the prompts, the same ones for every condition.
    """

    values: Mapping[str, Tensor]
    frechet: float
    resampled: np.ndarray


def measure(judge: Judge, pictures: Tensor, prompts: Sequence[Prompt]) -> Measured:
    """All measures of pictures (N, 3, 64, 64) in [-1, 1]."""
    verdict = judge.judge(pictures)
    names = [prompt.concept for prompt in prompts]
    styles = [prompt.style or STYLE for prompt in prompts]
    is_asked = torch.tensor([prompt.style is not None for prompt in prompts])
    right = verdict.concepts == torch.tensor([list(concepts()).index(name) for name in names])
    right_style = verdict.styles == torch.tensor([list(STYLES).index(style) for style in styles])
    values = {
        "right concept": right.double(),
        "log-probability": log_probabilities(judge, pictures, names).double(),
        "right style": right_style.double().masked_fill(~is_asked, torch.nan),
        "style margin": style_margins(judge, pictures, names, styles).double().masked_fill(~is_asked, torch.nan),
        "sharpness": sharpness((pictures + 1) / 2).double(),
    }
    features, reference = verdict.features.double().numpy(), judge.reference.double().numpy()
    rows = np.random.default_rng(0).integers(len(features), size=(100, len(features)))
    resampled = np.array([frechet_distance(features[row], reference) for row in rows])
    return Measured(values, frechet_distance(features, reference), resampled)


def mean_of(parts: Sequence[Measured]) -> Measured:
    """Several draws as one: every measure averaged prompt by prompt."""
    values = {name: torch.stack([part.values[name] for part in parts]).mean(0) for name in MEASURES}
    frechet, resampled = (np.mean([getattr(part, name) for part in parts], 0) for name in ("frechet", "resampled"))
    return Measured(values, float(frechet), np.asarray(resampled))


def figures(one: Measured, less: Measured | None = None) -> dict[str, dict[str, float]]:
    """Means with 95 % bootstrap intervals over prompts; with `less` of the paired differences."""
    row = {}
    for name in MEASURES:
        values = one.values[name] if less is None else one.values[name] - less.values[name]
        values = values[~values.isnan()]
        if len(values):
            mean, (low, high) = mean_interval(values)
            row[name] = {"mean": mean, "low": low, "high": high}
    # Resampling repeats prompts, which biases the distance upwards: only its spread is used, around the estimate.
    mean = one.frechet - (less.frechet if less else 0.0)
    spread = 1.96 * float(np.std(one.resampled - (less.resampled if less else 0.0)))
    return row | {"Frechet distance": {"mean": mean, "low": mean - spread, "high": mean + spread}}


def real(judge: Judge, prompts: Sequence[Prompt]) -> Tensor:
    """The drawings that were asked for, (N, 3, 64, 64) in [-1, 1]; what was left open is drawn at random."""
    chance = random.Random(0)
    colours, styles = list(BACKGROUNDS), list(STYLES)
    concept = torch.tensor([list(concepts()).index(prompt.concept) for prompt in prompts])
    style = torch.tensor([styles.index(prompt.style or chance.choice(styles)) for prompt in prompts])
    colour = torch.tensor([colours.index(prompt.background or chance.choice(colours)) for prompt in prompts])
    return judge.render(concept, style, judge.colours[colour])
