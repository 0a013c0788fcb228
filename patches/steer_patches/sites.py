"""The attention sites of a model: which modules they are, and what is known of each."""

from __future__ import annotations

from collections import Counter
from typing import Any

import torch
from transformers import PreTrainedModel

import steer_patches.families  # noqa: F401  (registers the family data)
from steer_patches import interface
from steer_patches.family import family_of
from steer_patches.processors import UnhookableProcessor, steered_class
from steer_patches.site import Scope, Site


def plain(model: torch.nn.Module) -> torch.nn.Module:
    """The model inside `torch.compile`'s wrapper."""
    return getattr(model, "_orig_mod", model)


def find_sites(model: torch.nn.Module, scope: Scope | None = None) -> list[Site]:
    """Every attention site of a diffusers or transformers model, in the order of `named_modules`."""
    model, scope = plain(model), scope or Scope()
    family = family_of(model)
    if isinstance(model, PreTrainedModel):
        found = [_transformers_site(name, module) for name, module in interface.attention_modules(model)]
    else:
        found = [
            _diffusers_site(name, module)
            for name, module in model.named_modules()
            if callable(getattr(module, "processor", None))
        ]
    for index, site in enumerate(found):
        site.index, site.scope = index, scope
        if family is not None:
            site.kind = family.kind_of(site.name) or site.kind
            site.main_port = family.main_port if site.ports > family.main_port else 0
    layers: Counter[str] = Counter()
    for site in found:
        site.layer = layers[site.kind]
        layers[site.kind] += 1
    return found


def _diffusers_site(name: str, module: Any) -> Site:
    heads = module.heads
    width = module.to_q.out_features if hasattr(module, "to_q") else module.inner_dim
    head_dim = width // heads
    kv_width = module.to_k.out_features if getattr(module, "to_k", None) is not None else width
    kind = "cross" if getattr(module, "is_cross_attention", False) else "self"
    site = Site(name, 0, kind, heads, max(kv_width // head_dim, 1), head_dim, type(module.processor).__name__)
    try:
        site.ports = steered_class(type(module.processor))._steer_ports
    except UnhookableProcessor as error:
        site.ports, site.refusal = 0, str(error)
    return site


def _transformers_site(name: str, module: Any) -> Site:
    config = module.config
    heads = getattr(module, "num_heads", None) or config.num_attention_heads
    kv_heads = heads // getattr(module, "num_key_value_groups", 1)
    head_dim = getattr(module, "head_dim", None) or config.hidden_size // heads
    implementation = config._attn_implementation.removeprefix("steer_")
    site = Site(name, 0, "causal" if module.is_causal else "self", heads, kv_heads, head_dim, implementation)
    site.layer_idx, site.window = _cache_layer_of(module), _window_of(module)
    if implementation not in interface.BASES:
        site.ports = 0
        site.refusal = (
            f"attention implementation {implementation!r} cannot be hooked; use one of {', '.join(interface.BASES)}"
        )
    return site


def _cache_layer_of(module: Any) -> int | None:
    """The layer of the cache that has this attention module's keys: its own, or one of the same type that it shares."""
    modes = getattr(module.config, "kv_sharing_modes", None)
    if not modes or not getattr(module, "is_kv_shared_layer", False):
        return getattr(module, "layer_idx", None)
    kinds = module.config.layer_types
    return next(i for i, mode in enumerate(modes) if mode == "store" and kinds[i] == kinds[module.layer_idx])


def _window_of(module: Any) -> int | None:
    """Latest keys that a query of this attention module sees at all; None = every key before it."""
    if hasattr(module, "sliding_window"):
        return module.sliding_window
    config = module.config
    if getattr(config, "layer_types", None) is not None:
        kind = config.layer_types[module.layer_idx]
        if kind == "chunked_attention":  # a query sees its own chunk, up to itself
            return config.attention_chunk_size
        return config.sliding_window if kind == "sliding_attention" else None
    return getattr(config, "sliding_window", None)
