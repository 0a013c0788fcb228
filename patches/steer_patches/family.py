"""What a model family states about itself: data, read by the hook layer and the methods."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from fnmatch import fnmatchcase
from typing import Any

import torch

from steer_patches.pictures import Part

Grid = tuple[int, int, int]
PictureParts = Callable[[torch.nn.Module, Mapping[str, Any], torch.Tensor], Mapping[int, Sequence[Part]]]


@dataclass(frozen=True)
class Stage:
    """Modules that a forward runs one after the other.

    Args:
        path: name of a `ModuleList` (its items are the stages) or of a single module.
        returns: the names of the forward's arguments that a module returns, in the order it returns them; a block
            that is skipped returns these arguments. Empty where a module cannot be skipped.
        chained: True where a module's output depends on earlier ones only through its predecessor's output, so that
            replaying the last one is enough (transformer blocks); False where all outputs are read later (UNets).
        tokens: the argument (B, S, C) that holds the visual tokens, one of `returns`; empty where the modules
            cannot work on tokens in another order than raster.
        tables: what holds something for each visual token, argument -> the shapes that it may have, of which the first
            that fits says where the tokens are: "S" is the axis of the visual tokens, "T+S" that of the text's
            (`encoder_hidden_states`) and the visual ones, a number is that size, any other word any size. A shape
            without tokens is one value for all of them; no shapes: the argument must not be given. "name.0" is an item
            of a tuple, "name.key" of a dict. What is not named here does not depend on the order of the visual tokens.
        between: arguments of the model's forward that change the tokens between two modules, or leave modules out.
        raster: arguments by which a module addresses tokens by their place in raster order.
    """

    path: str
    returns: tuple[str, ...] = ()
    chained: bool = True
    tokens: str = ""
    tables: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    between: tuple[str, ...] = ()
    raster: tuple[str, ...] = ()


@dataclass(frozen=True)
class Preset:
    """A known-good setting of a method for a family, where it comes from, and the model that it is for."""

    settings: Mapping[str, Any]
    source: str
    name: str = ""


def text_length(model: torch.nn.Module, arguments: Mapping[str, Any]) -> int | None:
    """Text tokens of a joint sequence: those of `encoder_hidden_states`."""
    text = arguments.get("encoder_hidden_states")
    return text.shape[1] if isinstance(text, torch.Tensor) and text.ndim == 3 else None


@dataclass(frozen=True)
class Family:
    """One model family.

    Args:
        name: as the documentation prints it.
        models: class names of its denoisers or language models.
        kinds: first matching glob over site names gives the kind; the fallback is "cross" or "self".
        stages: the forward's modules in the order they run; what prefix sharing and skipping work on.
        grid: (model, forward arguments) -> (frames, height, width) of the visual tokens; UNets: of the latents.
        tokens_from_grid: False for UNets, where the number of tokens differs from site to site.
        text_first: order of joint sequences, [text, image] or [image, text].
        cfg: "batched" ([uncond, cond] rows in one call), "sequential" (a call for each), "none" (no CFG rows ever).
        affine: False where the pipeline's guidance rescales its result, so that an added term is not kept exactly.
        splits_rows: True where the processor computes attention row by row.
        main_port: port of the ordinary attention call, where a processor has others before it.
        video: True where the grid may have several frames.
        caps_scores: True where attention scores are capped before the softmax.
        open_prompt: True where all tokens of the prompt see each other, so that only what is generated is causal.
        text_tokens: (model, forward arguments) -> text tokens of a joint sequence, None where each row has its own.
        pictures: of a vision-language model: (model, forward arguments, ids (B, S)) of a forward that brings pictures
            -> for each token id that stands for pictures their parts, in the order of their tokens.
        presets: method name -> known-good settings, or several of them, the default first.
    """

    name: str
    models: tuple[str, ...]
    kinds: Mapping[str, str] = field(default_factory=dict)
    stages: tuple[Stage, ...] = ()
    grid: Callable[[torch.nn.Module, Mapping[str, Any]], Grid | None] | None = None
    tokens_from_grid: bool = True
    text_first: bool = False
    cfg: str = "batched"
    affine: bool = True
    splits_rows: bool = False
    main_port: int = 0
    video: bool = False
    caps_scores: bool = False
    open_prompt: bool = False
    text_tokens: Callable[[torch.nn.Module, Mapping[str, Any]], int | None] = text_length
    pictures: PictureParts | None = None
    presets: Mapping[str, Preset | tuple[Preset, ...]] = field(default_factory=dict)

    def preset(self, method: str, name: str | None = None) -> Preset | None:
        """The settings of a method for this family: the first ones, or those of that name."""
        known = self.presets.get(method, ())
        known = known if isinstance(known, tuple) else (known,)
        return next((preset for preset in known if name in (None, preset.name)), None)

    def preset_names(self, method: str) -> list[str]:
        """Names of the family's presets for a method."""
        known = self.presets.get(method, ())
        return [preset.name for preset in (known if isinstance(known, tuple) else (known,)) if preset.name]

    def kind_of(self, site_name: str) -> str | None:
        """Kind of the site by its name, or None where no pattern says."""
        return next((kind for pattern, kind in self.kinds.items() if fnmatchcase(site_name, pattern)), None)


FAMILIES: list[Family] = []


def register(family: Family) -> Family:
    """Add a family; called once by each file in `steer_patches/families/`."""
    FAMILIES.append(family)
    return family


def family_of(model: torch.nn.Module) -> Family | None:
    """The family of `model` by its class name, or None."""
    names = [cls.__name__ for cls in type(model).__mro__]
    return next((family for family in FAMILIES if any(name in family.models for name in names)), None)


UNTUNED = "a middle block; no published setting, not tuned"


def patched(name: str = "hidden_states", frames: int = 2) -> Callable[..., Grid]:
    """Grid of a model that cuts its latents (B, C, H, W) or (B, C, T, H, W) into patches of its config's patch size.

    Args:
        name: the forward argument that holds the latents.
        frames: the dimension of the frames in 5-D latents.
    """

    def grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
        config: Any = model.config
        size = config.patch_size
        over_time = getattr(config, "patch_size_t", None) or 1
        t, h, w = (over_time, size, size) if isinstance(size, int) else tuple(size)
        shape = arguments[name].shape
        length = shape[frames] if len(shape) == 5 else 1
        return -(-length // t), shape[-2] // h, shape[-1] // w

    return grid
