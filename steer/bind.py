"""Where a method acts on a target: its selectors resolved, and what cannot be is refused. Changes nothing."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from steer.guidance import Guidance
from steer.method import Method
from steer.select import (
    SelectorError,
    by_row,
    expand_braces,
    head_mask,
    is_active,
    layers_of,
    listing,
    matches,
    parse_steps,
    select,
)
from steer_patches.attach import denoisers
from steer_patches.blocks import find_blocks
from steer_patches.family import FAMILIES, Family, family_of
from steer_patches.generation import generates
from steer_patches.processors import UnhookableProcessor
from steer_patches.site import Run, Site
from steer_patches.sites import find_sites, plain


class CompositionError(ValueError):
    """Two methods, or a method and a target, cannot be used together."""


@dataclass(eq=False)
class Binding:
    """One method on one model: the sites and blocks that its selectors gave.

    Args:
        method: the method as it runs on this model, see `Method.resolved`.
        given: the method as the user made it.
        model: key of the model within the target.
        sites: site name -> head mask (None = all heads).
        blocks: indices of the blocks that the perturbed pass skips.
        prefix: number of leading blocks that the method leaves unedited.
        live: the same sites as they are hooked, with their head masks; set when installed.
        able: sites of the model that are of the method's kinds; set when installed.
        passes, shared_blocks, active: counted while running; `active` are the forwards in which the method was on.
    """

    method: Any
    given: Method
    model: str
    sites: dict[str, torch.Tensor | None]
    blocks: tuple[int, ...] = ()
    prefix: int = 0
    live: dict[str, tuple[Site, torch.Tensor | None]] = field(default_factory=dict)
    able: int = 0
    passes: int = 0
    shared_blocks: int = 0
    active: int = 0

    def is_active(self, run: Run) -> bool:
        """Whether the run's step lies in the method's steps."""
        return is_active(self.method.steps, run.step, run.num_steps)


def models_of(target: Any) -> dict[str, torch.nn.Module]:
    """The models of a target that methods attach to, by component name ("" for a bare model)."""
    if isinstance(target, DiffusionPipeline):
        found = denoisers(target)
        if not found:
            raise TypeError(f"{type(target).__name__} has no transformer or unet that steer can attach to")
        return found
    if isinstance(plain(target), (ModelMixin, PreTrainedModel)) if isinstance(target, torch.nn.Module) else False:
        return {"": target}
    hint = "; its get_base_model() is one" if hasattr(target, "get_base_model") else ""
    raise TypeError(
        f"cannot steer a {type(target).__name__}: pass a diffusers pipeline, a diffusers model or a transformers model"
        f"{hint}"
    )


def bind(method: Method, models: dict[str, torch.nn.Module], has_clock: bool) -> list[Binding]:
    """Resolve a method's selectors on a target's models. Changes nothing.

    Raises:
        SelectorError: a selector that matches nothing; the message lists what exists.
        CompositionError: the method cannot run on this target.
    """
    counts = all(generates(plain(model)) for model in models.values())
    if counts and parse_steps(method.steps)[0] == "fraction":
        raise CompositionError(
            f"steps={method.steps!r}: how many tokens a language model will write is not known beforehand; give "
            'indices, "0:1" = the prompt, "1:" = what is generated'
        )
    if method.steps not in (None, ":") and not has_clock and not counts:
        raise CompositionError(
            f"steps={method.steps!r} needs a pipeline's scheduler to count steps; this target is a bare model. "
            'Apply the method to the pipeline, or give steps=":" (all steps).'
        )
    if method.heads is not None and len(method.heads) == 0:
        return []
    if by_row(method.heads) and not method.heads_by_row:
        raise CompositionError(
            f"{type(method).__name__} takes one choice of heads for the whole batch; a mapping for each picture is for "
            "guidance methods"
        )
    bindings = [_bind_one(method, key, plain(model), has_clock) for key, model in models.items()]
    return [binding for binding in bindings if binding is not None]


def _bind_one(given: Method, key: str, model: torch.nn.Module, has_clock: bool) -> Binding | None:
    family = family_of(model)
    method = given.resolved(family, has_clock)
    _check_family(method, family, model)
    sites, blocks = find_sites(model), find_blocks(model, family)
    if isinstance(method, Guidance) and isinstance(model, PreTrainedModel):
        raise CompositionError(
            f"{type(method).__name__} guides denoisers by a second pass; {type(model).__name__} is a language model"
        )
    layers = method.layers_in(model, sites)
    if layers is None:
        layers = layers_of(method.heads) or None
    if layers is None:
        layers = _preset_layers(method, family, model)
    if getattr(method, "skips_blocks", False):
        skippable = [block for block in blocks if block.stage.returns]
        if not skippable:
            raise CompositionError(f"{type(model).__name__} has no blocks that are known to be skippable")
        wanted = set(select(layers, [block.name for block in skippable], "blocks"))
        chosen = tuple(block.index for block in skippable if block.name in wanted)
        return Binding(method, given, key, {}, chosen, prefix=chosen[0])
    names = set(select(layers, [site.name for site in sites]))
    chosen_sites = [site for site in sites if site.name in names and site.kind in method.kinds]
    if not chosen_sites:
        kinds = ", ".join(sorted({site.kind for site in sites if site.name in names}))
        able = [site.name for site in sites if site.kind in method.kinds]
        raise SelectorError(
            f"layers={layers!r} matches only {kinds} attention, but {type(method).__name__} works on "
            f"{', '.join(method.kinds)}. This model has:\n{listing(able)}"
        )
    read = method.reads(model, sites)
    refused = next((site for site in [*chosen_sites, *read] if not site.ports), None)
    if refused is not None:
        raise UnhookableProcessor(f"{refused.name}: {refused.refusal}")
    if named := layers_of(method.heads):
        select(named, [site.name for site in chosen_sites], "selected attention sites", field="heads")
    dense = [site.name for site in sites if site.kind in method.kinds][: getattr(method, "dense_layers", None) or 0]
    chosen_sites = [site for site in chosen_sites if site.name not in dense]
    if not chosen_sites:
        raise SelectorError(
            f"dense_layers={method.dense_layers} leaves {type(method).__name__} no layer of layers={layers!r}"  # type: ignore[attr-defined]
        )
    method.prepare_model(model, chosen_sites)
    masks = {site.name: head_mask(method.heads, site) for site in chosen_sites}
    masks = {name: mask for name, mask in masks.items() if mask is None or bool(mask.any())}
    prefix = min((_block_index(name, blocks) for name in masks), default=0)
    if not masks:
        return None
    return Binding(method, given, key, {**{site.name: None for site in read}, **masks}, prefix=prefix)


def _check_family(method: Method, family: Family | None, model: torch.nn.Module) -> None:
    """Raise `CompositionError` where a method needs what the model does not have: a grid of tokens, a plain softmax."""
    reason = unfit(type(method), family)
    if reason:
        kinds = set(method.kinds)
        able = [f.name for f in FAMILIES if unfit(type(method), f) is None and kinds & set(f.kinds.values())]
        what = family.name if family else type(model).__name__
        raise CompositionError(f"{type(method).__name__} cannot run on {what}: {reason}. It works on {', '.join(able)}")


def unfit(method: type[Method], family: Family | None) -> str | None:
    """Why a method cannot work on models of a family, by what it needs of them; None if it can."""
    if method.needs_softmax and family is not None and family.caps_scores:
        return "it caps its attention scores"
    if method.needs_causal and family is not None and family.open_prompt:
        return "all tokens of its prompt see each other"
    if method.needs_pictures and (family is None or family.pictures is None):
        return "it takes no pictures, or steer does not know which of its tokens show them"
    if not (method.needs_grid or method.needs_video):
        return None
    if family is None or family.grid is None:
        return "steer does not know the token grid of this model"
    if not family.tokens_from_grid:
        return "its layers have different numbers of tokens"
    return "it draws single images" if method.needs_video and not family.video else None


def _block_index(site: str, blocks: Sequence[Any]) -> int:
    return next((block.index for block in blocks if f"{site}.".startswith(f"{block.name}.")), 0)


def _preset_layers(method: Method, family: Family | None, model: torch.nn.Module) -> str | Sequence[str]:
    """The layers that the model's family names for this method; an error where there are none on this model."""
    preset = family.preset(type(method).__name__, getattr(method, "preset", None)) if family else None
    default = preset.settings.get("layers") if preset else None
    default = default or getattr(method, "default_layers", None)
    names = [site.name for site in find_sites(model) if site.kind in method.kinds]
    what = "has no preset"
    if default is not None:
        missing = [p for p in expand_braces(default) if not any(matches(p, name) for name in names)]
        if not missing:
            return default
        what = f"has the preset {default!r}, which does not exist on this model,"
    raise SelectorError(
        f"{type(method).__name__} {what} for {type(model).__name__}: give layers=. It has:\n{listing(names)}"
    )
