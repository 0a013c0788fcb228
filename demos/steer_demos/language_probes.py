"""Methods that change nothing and look: at the error of another method, and at where attention gathers."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from steer.method import Method
from steer.windowed import Ready
from steer_demos.language_controls import Chosen, visible
from steer_kernels import partial
from steer_kernels.estimate import column_mass
from steer_patches.site import Call, Next


@dataclass(kw_only=True)
class Watch(Method, register=False):
    """Compares the attention that a method computes in a prompt with dense attention over the same tensors.

    Args:
        errors: relative error of the output, by site.
        masses: dense weight on the keys that are kept, by site, where the method says which they are.
    """

    errors: dict[str, list[float]] = field(default_factory=dict)
    masses: dict[str, list[float]] = field(default_factory=dict)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "inputs"  # around all others
    default_layers: ClassVar[str] = "*"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        output = next(call)
        if call.query.shape[2] == call.key.shape[2]:
            keep, causal = call.visible()
            dense, lse = partial(call.query, call.key, call.value, mask=keep, is_causal=causal, scale=call.scale)
            error = float((output - dense).norm() / dense.norm())
            self.errors.setdefault(call.site.name, []).append(error)
            chosen = kept_keys(call)
            if chosen is not None:
                _, part = partial(call.query, call.key, call.value, mask=chosen, scale=call.scale)
                self.masses.setdefault(call.site.name, []).append(float((part - lse).exp().mean()))
        return output


def kept_keys(call: Call) -> Tensor | None:
    """The keys that the method of the stage "kernel" keeps, bool (B, H, S, S); None where it does not say."""
    kernel = call.site.kernel
    if isinstance(kernel, Chosen):
        return kernel.keep
    if isinstance(kernel, Ready):
        return kernel.windows.seen(kernel.queries, kernel.keys) & visible(call)
    return None


@dataclass(kw_only=True)
class Sinks(Method, register=False):
    """Reads the mean weight on every token of every head, over the queries that see it: `columns`, (H, S) by site."""

    columns: dict[str, Tensor] = field(default_factory=dict)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "inputs"
    default_layers: ClassVar[str] = "*"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        keep, causal = call.visible()
        _, lse = partial(call.query, call.key, call.value, mask=keep, is_causal=causal, scale=call.scale)
        mass = column_mass(call.query, call.key, lse, scale=call.softmax_scale, is_causal=causal, keep=keep)[0]
        self.columns[call.site.name] = (mass / torch.arange(mass.shape[-1], 0, -1, device=mass.device)).cpu()
        return next(call)
