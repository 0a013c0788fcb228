"""Attention over a group of keys, with its log-sum-exp: the definition, in plain torch."""

from __future__ import annotations

import torch


def partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of `query` over these keys alone.

    Args:
        query: (B, H, S, D). key, value: (B, H or H_kv, G, D), H a multiple of H_kv.
        mask: boolean (True = attend) or additive, broadcastable to (B, H, S, G).
        is_causal: key j is visible to query i only if j <= i + G - S.
        scale: factor on the products; None = 1 / sqrt(D).

    Returns:
        Output (B, H, S, D) and log-sum-exp (B, H, S) of the scaled, masked products. A query that sees no key has
        output 0 and log-sum-exp -inf.
    """
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query @ key.transpose(-1, -2)).to(accurate) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if mask is not None:
        scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
    if is_causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device)
        scores = scores.masked_fill(later.triu(1 + scores.shape[-1] - scores.shape[-2]), -torch.inf)
    lse = torch.logsumexp(scores, -1)
    weights = torch.softmax(scores, -1).masked_fill((lse == -torch.inf)[..., None], 0.0)
    return weights.to(value.dtype) @ value, lse


def merge(parts: list[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key groups from the attention over each.

    Args:
        parts: (output (B, H, S, D), log-sum-exp (B, H, S)) of each group.

    Returns:
        Output and log-sum-exp over all keys of all groups.
    """
    lse = torch.logsumexp(torch.stack([part_lse for _, part_lse in parts]), 0)
    base = lse.nan_to_num(neginf=0.0)
    out = sum(torch.exp(part_lse - base)[..., None].to(part.dtype) * part for part, part_lse in parts)
    return out, lse  # type: ignore[return-value]
