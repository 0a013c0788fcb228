"""Rotary position embeddings: turn queries and keys that a model has rotated already by more tokens, or by fewer."""

from __future__ import annotations

import inspect
import sys
from dataclasses import dataclass
from typing import Any

import torch

from steer_patches.site import Site

FIXED = ("default", "linear", "llama3", "yarn", "proportional")  # their frequencies do not depend on the length


@dataclass(frozen=True, eq=False)
class Rotary:
    """The rotation of one attention layer: channels i and i + n turn by `frequencies[i]` radians a token.

    Args:
        frequencies: (n,) fp32; channels from 2 n on are not rotated.
    """

    frequencies: torch.Tensor

    def angles(self, tokens: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """(cos, sin) of a rotation by `tokens` (B or 1, S), each (B or 1, 1, S, n) fp32."""
        angle = tokens[:, None, :, None].double() * self.frequencies.to(tokens.device).double()
        return angle.cos().float(), angle.sin().float()


def turn(x: torch.Tensor, angles: tuple[torch.Tensor, torch.Tensor]) -> torch.Tensor:
    """Queries or keys (B, H, S, D), turned by angles of `Rotary.angles`; computed in fp32 or better."""
    exact = torch.promote_types(x.dtype, torch.float32)
    (cos, sin), n = (angle.to(exact) for angle in angles), angles[0].shape[-1]
    a, b = x[..., :n].to(exact), x[..., n : 2 * n].to(exact)
    turned = torch.cat([a * cos - b * sin, b * cos + a * sin], -1).to(x.dtype)
    return torch.cat([turned, x[..., 2 * n :]], -1) if 2 * n < x.shape[-1] else turned


def rotary_of(model: torch.nn.Module, site: Site) -> Rotary | None:
    """How the queries and keys of an attention layer are rotated; None where this layer of the model does not.

    Raises:
        ValueError: the model rotates in a way that cannot be continued, or not at all; says which.
    """
    module = model.get_submodule(site.name)
    if not getattr(module, "use_rope", True):
        return None
    found = [
        (name, inner)
        for name, inner in model.named_modules()
        if name.split(".")[-1] == "rotary_emb" and f"{site.name}.".startswith(name.removesuffix("rotary_emb"))
    ]
    if not found:
        raise ValueError(f"{type(model).__name__} has no rotary position embedding that steer finds at {site.name}")
    name, rotary = max(found, key=lambda pair: len(pair[0]))
    kind, rope_type, frequencies = _kind(module), getattr(rotary, "rope_type", None), getattr(rotary, "inv_freq", None)
    if isinstance(rope_type, dict):
        rope_type, frequencies = rope_type.get(kind), getattr(rotary, f"{kind}_inv_freq", None)
    if rope_type not in FIXED or frequencies is None:
        raise ValueError(
            f"{name} is of type {rope_type!r}, whose frequencies may change with the length; types that can be turned "
            f"further are {', '.join(FIXED)}"
        )
    if hasattr(module, "qk_rope_head_dim"):  # multi-head latent attention
        raise ValueError(f"{site.name} rotates the last channels of queries and keys, not the first")
    if getattr(rotary, "mrope_section", None) is not None:
        raise ValueError(f"{name} rotates by time, height and width, and an image has no one position")
    made = Rotary(frequencies.detach().float())
    if not _turns_like(module, rotary, kind, made):
        raise ValueError(f"{name} does not rotate channel i with channel i + n, as {type(made).__name__} would")
    return made


def _kind(module: Any) -> str | None:
    """The layer's type, where a model has rotations for each."""
    kinds = getattr(module.config, "layer_types", None)
    return kinds[module.layer_idx] if kinds and getattr(module, "layer_idx", None) is not None else None


def _turns_like(module: torch.nn.Module, rotary: Any, kind: str | None, ours: Rotary) -> bool:
    """Whether the model's own rotation to token 9 is its rotation to token 5, turned by 4 more."""
    apply = getattr(sys.modules[type(module).__module__], "apply_rotary_pos_emb", None)
    if apply is None:
        return False
    takes = list(inspect.signature(apply).parameters)
    if takes[:4] != ["q", "k", "cos", "sin"] and takes[:3] != ["x", "cos", "sin"]:
        return False
    frequencies = ours.frequencies
    x = torch.linspace(-1, 1, 2 * len(frequencies), device=frequencies.device)[None, None, None]

    def at(token: int) -> torch.Tensor:
        given = {"layer_type": kind} if "layer_type" in inspect.signature(rotary.forward).parameters else {}
        cos, sin = rotary(x, torch.tensor([[token]], device=x.device), **given)
        return apply(x, cos, sin) if takes[0] == "x" else apply(x, x, cos, sin)[0]

    more = ours.angles(torch.tensor([[4]], device=x.device))
    return bool(torch.allclose(turn(at(5), more), at(9), atol=1e-4))
