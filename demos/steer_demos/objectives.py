"""Objectives for `steer.calibrate` on the embedded picture models: what the embedded classifier says of a picture."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cache

import torch
from torch import Tensor

from steer_demos.emoji import BACKGROUNDS, IMAGE_SIZE, STYLES, caption, concepts
from steer_demos.evaluate_pictures import Prompt
from steer_demos.judge import Judge

CAPTION = re.compile(r"(?:an? )?(?P<concept>.+?)(?: on a (?P<background>\w+) background)?(?:, (?P<style>\w+) style)?")


@dataclass(frozen=True)
class Concept:
    """Log-probability of the concept that the prompt asks for.

    Args:
        seed: of the judge, see `Judge.load`.
    """

    seed: int = field(default=0, kw_only=True)

    def __call__(self, pictures: Tensor, prompts: Sequence[str | None]) -> Tensor:
        """Scores (N,) of pictures (N, 3, 64, 64) in [0, 1] for their prompts; at most 0."""
        return log_probabilities(judge(self.seed), _checked(pictures), [asked(prompt).concept for prompt in prompts])


@dataclass(frozen=True)
class Style:
    """How much nearer a picture is to its concept drawn in one style than to the same concept in any other.

    Args:
        style: one of the three styles, whatever the prompt says.
        seed: of the judge, see `Judge.load`.
    """

    style: str
    seed: int = field(default=0, kw_only=True)

    def __post_init__(self) -> None:
        if self.style not in STYLES:
            raise ValueError(f"there is no style {self.style!r}; choose from {', '.join(STYLES)}")

    def __call__(self, pictures: Tensor, prompts: Sequence[str | None]) -> Tensor:
        """Scores (N,) of pictures (N, 3, 64, 64) in [0, 1] for their prompts; above 0 where that style is nearest."""
        names = [asked(prompt).concept for prompt in prompts]
        return style_margins(judge(self.seed), _checked(pictures), names, [self.style] * len(names))


def asked(prompt: str | None) -> Prompt:
    """What a caption asks for: the inverse of `steer_demos.emoji.caption`.

    Raises:
        ValueError: it is no caption of the data set.
    """
    match = CAPTION.fullmatch(prompt or "")
    if match is None or match["concept"] not in concepts():
        example = caption("red apple", "noto", "blue", article=True)
        raise ValueError(f"{prompt!r} names none of the {len(concepts())} concepts; prompts are like {example!r}")
    for name, known in ((match["style"], STYLES), (match["background"], BACKGROUNDS)):
        if name is not None and name not in known:
            raise ValueError(f"{prompt!r} names {name!r}; choose from {', '.join(known)}")
    return Prompt(prompt or "", match["concept"], match["style"], match["background"])


@torch.no_grad()
def log_probabilities(judge: Judge, pictures: Tensor, names: Sequence[str]) -> Tensor:
    """Of the named concepts in pictures (N, 3, 64, 64) in [-1, 1], natural logarithm: (N,)."""
    scores = torch.cat([judge.classifier(part) for part in pictures.split(256)]).log_softmax(dim=1)
    return scores[torch.arange(len(names)), _indices(names)]


@torch.no_grad()
def style_margins(judge: Judge, pictures: Tensor, names: Sequence[str], styles: Sequence[str]) -> Tensor:
    """Distance to the named concept in the nearest other style less that in the named style: (N,), in feature space.

    Each distance is Euclidean, to the nearest of the renders on all backgrounds; pictures (N, 3, 64, 64) in [-1, 1].
    """
    renders = judge.reference.unflatten(0, (len(judge.colours), -1, judge.styles))[:, _indices(names)]
    distances = (judge.embed(pictures)[None, :, None] - renders).norm(dim=-1).amin(dim=0)  # (N, styles)
    chosen = torch.nn.functional.one_hot(torch.tensor([list(STYLES).index(style) for style in styles]), len(STYLES))
    others = distances.masked_fill(chosen.bool(), torch.inf)
    return others.amin(dim=1) - (distances * chosen).sum(dim=1)


@cache
def judge(seed: int) -> Judge:
    """`Judge.load(seed)`, kept: a search asks it thousands of times."""
    return Judge.load(seed)


def _indices(names: Sequence[str]) -> Tensor:
    known = {name: index for index, name in enumerate(concepts())}
    return torch.tensor([known[name] for name in names])


def _checked(pictures: Tensor) -> Tensor:
    """From [0, 1] to the judge's [-1, 1]."""
    if tuple(pictures.shape[1:]) != (3, IMAGE_SIZE, IMAGE_SIZE):
        raise ValueError(
            f"pictures of shape {tuple(pictures.shape)}: the emoji classifier judges (N, 3, {IMAGE_SIZE}, {IMAGE_SIZE})"
        )
    return pictures.float().cpu() * 2 - 1
