"""Objectives for `steer.calibrate`: callables (pictures, prompts) -> one score for each picture, higher is better.

Pictures are float tensors (N, 3, H, W) in [0, 1], clips (N, T, 3, H, W); prompts are N texts. Any function like that is
an objective. Here are statistics of pictures, models that know what people like, and ways to combine them; `objective`
finds all of these by their names.
"""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from typing import Any

import torch

from steer.preference import HPS, Aesthetic, CLIPScore, PickScore, as_clips

__all__ = [
    "HPS",
    "Aesthetic",
    "CLIPScore",
    "Gated",
    "HarmonicMean",
    "Negated",
    "PickScore",
    "Sum",
    "brightness",
    "colourfulness",
    "contrast",
    "names",
    "objective",
    "saturation",
    "sharpness",
    "warmth",
]

Objective = Callable[[Any, Sequence[Any]], Any]
LUMA = (0.299, 0.587, 0.114)  # of red, green and blue, ITU-R BT.601, as in JPEG and in Pillow's "L"
ENTRY_POINTS = "steer.objectives"


def objective(text: str) -> Objective:
    """The objective of that name, as the command line gives it.

    Args:
        text: a name of `names`, e.g. "sharpness", "clip" or "clip:FOLDER-OR-HUB-ID"; or a function of your own, as
            "package.module:function" or "path/to/file.py:function", whose code is then run. A leading minus negates:
            "-brightness" looks for dark pictures.

    Raises:
        ValueError: there is no such name, file or function, or the name takes no text, or needs one.
        TypeError: what a module or file has there does not take (pictures, prompts).
    """
    if text.startswith("-"):
        return Negated(objective(text[1:]))
    name, colon, given = text.partition(":")
    if name in STATISTICS and not colon:
        return STATISTICS[name]
    if name in MODELS:
        return MODELS[name].of(given) if given else MODELS[name]()
    if name in (installed := _installed()):
        factory = installed[name].load()
        arguments = [given] if given else []
        try:
            inspect.signature(factory).bind(*arguments)
        except TypeError:
            raise ValueError(f"objective {text!r} is written as {_usage(name, factory)}") from None
        return factory(*arguments)
    if colon and name not in STATISTICS:
        return _own(text)
    raise ValueError(f"there is no objective {text!r}; there are {_listed()}")


def names() -> dict[str, str]:
    """How the objectives that have names are written, and a line on each."""
    made: dict[str, Any] = {**STATISTICS}
    made |= {f"{name}[:{'HEAD' if scorer is Aesthetic else 'MODEL'}]": scorer for name, scorer in MODELS.items()}
    for name, entry in _installed().items():
        factory = entry.load()
        made[_usage(name, factory)] = factory
    return {usage: (inspect.getdoc(each) or "").partition("\n")[0] for usage, each in made.items()}


def sharpness(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Variance of the Laplacian of luma.

    Luma runs from 0 to 255 here, as is usual for this measure; the Laplacian is the sum of the four neighbours less
    four times the pixel, where all four exist. Noise counts as sharp. Source: Pech-Pacheco et al. 2000.
    """
    luma = 255 * _luma(pictures)
    if min(luma.shape[-2:]) < 3:
        raise ValueError(f"sharpness needs pictures of 3 x 3 pixels at least, and got {tuple(luma.shape[-2:])}")
    middle = luma[..., 1:-1, 1:-1]
    neighbours = luma[..., :-2, 1:-1] + luma[..., 2:, 1:-1] + luma[..., 1:-1, :-2] + luma[..., 1:-1, 2:]
    return (neighbours - 4 * middle).var(dim=(-2, -1), correction=0).mean(1)


def contrast(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Standard deviation of luma, 0 to 0.5 (RMS contrast)."""
    return _luma(pictures).std(dim=(-2, -1), correction=0).mean(1)


def brightness(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Mean luma, 0 to 1."""
    return _luma(pictures).mean(dim=(1, 2, 3))


def saturation(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Mean saturation of HSV, 0 to 1.

    Of a pixel, (max - min) / max of red, green and blue; of black, 0.
    """
    clips = as_clips(pictures)
    highest, lowest = clips.amax(2), clips.amin(2)
    return ((highest - lowest) / highest.where(highest > 0, 1.0)).mean(dim=(1, 2, 3))


def colourfulness(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Hasler and Suesstrunk's colourfulness, 0 for grey, about 110 for the most colourful photographs.

    sqrt(std(a)^2 + std(b)^2) + 0.3 sqrt(mean(a)^2 + mean(b)^2) over the pixels, with a = R - G, b = (R + G) / 2 - B and
    red, green, blue from 0 to 255. Source: "Measuring colourfulness in natural images", SPIE 5007, 2003, measure M^(3).
    """
    red, green, blue = (255 * as_clips(pictures)).unbind(2)
    opponents = torch.stack([red - green, (red + green) / 2 - blue])
    spread, mean = opponents.std(dim=(-2, -1), correction=0), opponents.mean(dim=(-2, -1))
    return (spread.norm(dim=0) + 0.3 * mean.norm(dim=0)).mean(1)


def warmth(pictures: torch.Tensor, prompts: Sequence[Any] = ()) -> torch.Tensor:
    """Mean red less mean blue, -1 to 1."""
    means = as_clips(pictures).mean(dim=(1, 3, 4))
    return means[:, 0] - means[:, 2]


@dataclass(frozen=True, repr=False)
class Combination:
    """An objective made of others, each on its own scale. Two are combined at a time, and combinations nest."""

    def __repr__(self) -> str:
        """As it is written, without the addresses that Python shows for functions."""
        shown = ((field.name, getattr(self, field.name)) for field in fields(self))
        parts = (f"{name}={getattr(value, '__qualname__', None) or repr(value)}" for name, value in shown)
        return f"{type(self).__name__}({', '.join(parts)})"


@dataclass(frozen=True, repr=False)
class Negated(Combination):
    """Minus the score: looks for little of it."""

    objective: Objective

    def __call__(self, pictures: Any, prompts: Sequence[Any]) -> torch.Tensor:
        return -_scores(self.objective, pictures, prompts)


@dataclass(frozen=True, repr=False)
class Sum(Combination):
    """`first` plus `weight` times `second`: Sum(Sum(a, b, weight=0.5), c, weight=2.0)."""

    first: Objective
    second: Objective
    weight: float = 1.0

    def __call__(self, pictures: Any, prompts: Sequence[Any]) -> torch.Tensor:
        second = _scores(self.second, pictures, prompts)
        return _scores(self.first, pictures, prompts) + self.weight * second


@dataclass(frozen=True, repr=False)
class HarmonicMean(Combination):
    """2 a b / (a + b), which is high only if both are; 0 where one of them is not above 0."""

    first: Objective
    second: Objective

    def __call__(self, pictures: Any, prompts: Sequence[Any]) -> torch.Tensor:
        first, second = _scores(self.first, pictures, prompts), _scores(self.second, pictures, prompts)
        mean = 2 * first * second / (first + second)
        return mean.where((first > 0) & (second > 0), 0.0)


@dataclass(frozen=True, repr=False)
class Gated(Combination):
    """`score` where `gate` reaches `at_least`, else 0.

    HeadHunter's search for styles counts CLIP only for good pictures (arXiv 2506.10978):
    Gated(Gated(CLIPScore(), PickScore(), at_least=20.0), Aesthetic(), at_least=6.0).
    """

    score: Objective
    gate: Objective
    at_least: float

    def __call__(self, pictures: Any, prompts: Sequence[Any]) -> torch.Tensor:
        passed = _scores(self.gate, pictures, prompts) >= self.at_least
        return _scores(self.score, pictures, prompts).where(passed, 0.0)


STATISTICS: dict[str, Objective] = {
    function.__name__: function for function in (sharpness, contrast, brightness, saturation, colourfulness, warmth)
}
MODELS = {"clip": CLIPScore, "pickscore": PickScore, "hps": HPS, "aesthetic": Aesthetic}


def _luma(pictures: torch.Tensor) -> torch.Tensor:
    """Pictures or clips -> (N, T, H, W) from 0 to 1."""
    clips = as_clips(pictures)
    return torch.einsum("c,ntchw->nthw", clips.new_tensor(LUMA), clips)


def _scores(objective: Objective, pictures: Any, prompts: Sequence[Any]) -> torch.Tensor:
    """Scores as a flat tensor on the CPU: models may run elsewhere than the pictures are, and functions return lists.

    Raises:
        ValueError: scores that are not numbers, which a gate or a mean would hide, or not one for each picture.
    """
    scores = torch.as_tensor(objective(pictures, prompts)).detach().float().cpu().flatten()
    if len(scores) != len(pictures) or not bool(scores.isfinite().all()):
        raise ValueError(f"{objective!r} must give a finite score for each of {len(pictures)}, and gave {scores}")
    return scores


def _installed() -> dict[str, EntryPoint]:
    """Objectives that packages bring: factories, with no argument or with the text after the colon."""
    return {entry.name: entry for entry in sorted(entry_points(group=ENTRY_POINTS), key=lambda entry: entry.name)}


def _usage(name: str, factory: Callable[..., Any]) -> str:
    """NAME, NAME:TEXT or NAME[:TEXT], with the name of the factory's argument."""
    for parameter in inspect.signature(factory).parameters.values():
        if parameter.kind is not parameter.KEYWORD_ONLY:
            shown = parameter.name.upper()
            return f"{name}:{shown}" if parameter.default is parameter.empty else f"{name}[:{shown}]"
    return name


def _listed() -> str:
    return f"{', '.join(names())}, and functions of your own as MODULE:FUNCTION or FILE.py:FUNCTION"


def _own(text: str) -> Objective:
    """What a module or a file of the user's has under that name; runs its code."""
    where, _, name = text.rpartition(":")
    if where.endswith(".py"):
        module = _module_of_file(Path(where), text)
    else:
        try:
            module = importlib.import_module(where)
        except (ModuleNotFoundError, ValueError, TypeError) as error:
            raise ValueError(
                f"there is no objective {text!r} ({error}); there are {_listed()}. A module must be on Python's path"
            ) from error
    found = getattr(module, name, None)
    if not callable(found):
        own = [value for value in vars(module).values() if getattr(value, "__module__", None) == module.__name__]
        functions = [value.__name__ for value in own if inspect.isfunction(value)]
        raise ValueError(f"{where} has no function {name!r}; it has {', '.join(functions) or 'none'}")
    try:
        inspect.signature(found).bind(None, None)
    except TypeError as error:
        raise TypeError(f"{text} must take (pictures, prompts): {error}") from None
    return found


def _module_of_file(path: Path, text: str) -> Any:
    if not path.is_file():
        raise ValueError(f"there is no file {path}, which objective {text!r} names")
    name = f"steer_objective_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses in the file look for themselves there
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module
