"""transformers: one registered attention name per base implementation, its mask function with it.

Registering the attention alone would drop padding masks silently, so both are always registered together. The name is
set on the configurations of one model only and taken back from each of them on removal.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS, AttentionMaskInterface
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS, AttentionInterface, PreTrainedModel

from steer_patches.site import Call, run_chain

BASES = ("sdpa", "eager", "flash_attention_2", "flex_attention")
PREFIX = "steer_"


class SteeredName(str):
    """Name of a steered implementation; a copy or pickle of a configuration that holds it gets the plain name."""

    def __reduce__(self) -> tuple[Any, ...]:
        return (str, (self.removeprefix(PREFIX),))


def _base_function(base: str, module: torch.nn.Module) -> Callable[..., Any]:
    if base == "eager":  # every modeling file brings its own
        return sys.modules[type(module).__module__].eager_attention_forward
    return ALL_ATTENTION_FUNCTIONS[base]


def steered_name(base: str) -> str:
    """The attention implementation that passes through ports and ends in `base`; registers it on first use."""
    if base not in BASES:
        raise ValueError(f"attention implementation {base!r} cannot be hooked; use one of {', '.join(BASES)}")
    name = SteeredName(PREFIX + base)
    if name in AttentionInterface._global_mapping:
        return name

    def attention(
        module: torch.nn.Module,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attention_mask: torch.Tensor | None,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor | None]:
        inner = _base_function(base, module)
        site = module.__dict__.get("_steer_site")
        if site is None or not site.chain:
            return inner(module, query, key, value, attention_mask, **kwargs)
        if site.kind == "causal" and site.scope.in_forward is False and not _runs_later():
            raise RuntimeError(
                f"{site.name} is steered, but was not called through its model, so that it is not known which tokens "
                "these are: call model(...) or model.generate(...), not model.forward(...) or a part of the model, or "
                "apply the method to that part"
            )
        if not query.dtype == key.dtype == value.dtype:  # under autocast rotary embeddings come out in fp32
            query, key = query.to(value.dtype), key.to(value.dtype)
        scale = kwargs.pop("scaling", None)
        causal = kwargs.pop("is_causal", None)
        if causal is None:
            causal = bool(getattr(module, "is_causal", False))
        # an explicit mask already holds the causal rule, but for flash attention's, which tells padding; and a single
        # query sees every key
        holds_rule = attention_mask is not None and getattr(attention_mask, "ndim", 4) != 2
        call_is_causal = causal and not holds_rule and query.shape[2] > 1
        call = Call(query, key, value, attention_mask, scale, call_is_causal, site, 0, extra=kwargs)

        weights: list[torch.Tensor | None] = []

        def terminal(call: Call) -> torch.Tensor:
            rule = causal if call.is_causal == call_is_causal else call.is_causal
            out, probabilities = inner(
                module, call.query, call.key, call.value, call.mask, scaling=call.scale, is_causal=rule, **call.extra
            )
            weights.append(probabilities)
            return out.transpose(1, 2)

        out = run_chain(site.chain, 0, call, terminal).transpose(1, 2)
        return out, weights[0] if len(weights) == 1 else None  # the map of all rows, where one call computed it

    AttentionInterface.register(name, attention)
    AttentionMaskInterface.register(name, ALL_MASK_ATTENTION_FUNCTIONS[base])
    return name


def _runs_later() -> bool:
    """Whether a graph is made, or autograd runs: gradient checkpointing computes layers again after their forward."""
    return torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1


def set_steered(model: PreTrainedModel) -> Callable[[], None]:
    """Switch every configuration of `model` to its steered implementation; returns the function that restores each."""
    configs = {id(m.config): m.config for m in model.modules() if isinstance(m, PreTrainedModel)}.values()
    before = [(config, config._attn_implementation_internal) for config in configs]
    for config, base in before:
        if base in BASES:  # the sites of another one are refused when a method selects them
            config._attn_implementation_internal = steered_name(base)

    def undo() -> None:
        for config, name in before:
            config._attn_implementation_internal = name

    return undo


def attention_modules(model: PreTrainedModel) -> list[tuple[str, torch.nn.Module]]:
    """The (name, module) pairs that call the attention interface."""
    return [
        (name, module)
        for name, module in model.named_modules()
        if hasattr(module, "is_causal") and (hasattr(module, "scaling") or hasattr(module, "scale"))
    ]
