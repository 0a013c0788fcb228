"""Block-sparse attention through torch's FlexAttention, compiled: any device that Inductor can compile for."""

from __future__ import annotations

from functools import lru_cache
from typing import Any

import torch
from torch.nn.attention import flex_attention as flex

from steer_kernels.block_mask import BlockMask


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float, return_lse: bool
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Output (B, H, S_q, D) and natural log-sum-exp (B, H, S_q), or None where it was not asked for."""
    attend: Any = flex.flex_attention if torch.compiler.is_compiling() else _compiled
    options = dict(block_mask=mask.to_flex(query.shape[1]), scale=scale, enable_gqa=query.shape[1] != key.shape[1])
    if not return_lse:
        return attend(query, key, value, **options), None
    if not hasattr(flex, "AuxRequest"):  # torch before 2.9
        return attend(query, key, value, **options, return_lse=True)
    out, more = attend(query, key, value, **options, return_aux=flex.AuxRequest(lse=True))
    return out, more.lse


def _compiled(*args: Any, **kwargs: Any) -> Any:
    # Every new shape and every new rule is compiled; at dynamo's limit of eight it would fall back to a slow path.
    with torch._dynamo.config.patch(recompile_limit=256):
        return _compile()(*args, **kwargs)


@lru_cache
def _compile() -> Any:
    return torch.compile(flex.flex_attention, dynamic=False)
