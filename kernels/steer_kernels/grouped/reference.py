"""Re-weighted groups of keys: the definition, on the explicit attention map. Quadratic memory."""

from __future__ import annotations

from collections.abc import Callable

import torch


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: torch.Tensor,
    count: int,
    reweight: Callable[[torch.Tensor], torch.Tensor],
    visible: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Scale every group of the softmax map to its new mass: output (B, H, S_q, D) and new masses (B, H, S_q, G).

    Args:
        groups: (B, H, S_k) group of each key; one below 0 or from `count` on is never attended.
        visible: bool, broadcastable to (B, H, S_q, S_k), or None.
    """
    repeat = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(repeat, 1), value.repeat_interleave(repeat, 1)
    hidden = ((groups < 0) | (groups >= count))[:, :, None, :]
    if visible is not None:
        hidden = hidden | ~visible
    scores = (query @ key.mT).to(torch.promote_types(query.dtype, torch.float32)) * scale
    probabilities = torch.softmax(scores.masked_fill(hidden, -torch.inf), -1).nan_to_num(0.0)
    member = torch.stack([groups == g for g in range(count)], -1).to(probabilities.dtype)  # (B, H, S_k, G)
    mass = probabilities @ member
    new = reweight(mass)
    factor = torch.where(mass > 0, new / mass.where(mass > 0, 1), 0)
    return ((probabilities * (factor @ member.mT)).to(value.dtype)) @ value, new
