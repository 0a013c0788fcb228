"""Block-sparse attention: the definition, in plain torch, on the token mask. Quadratic memory."""

from __future__ import annotations

import torch

from steer_kernels.block_mask import BlockMask, broadcast_heads
from steer_kernels.partial import reference


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax over the visible keys: output (B, H, S_q, D) and natural log-sum-exp (B, H, S_q)."""
    return reference.partial(query, key, value, mask=broadcast_heads(mask.to_tokens(), query.shape[1]), scale=scale)
