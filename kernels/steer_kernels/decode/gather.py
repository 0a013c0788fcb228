"""Attention over chosen pages, one list at a time: its tokens are copied next to each other and attended densely.

One list fits the processor's cache, so this beats gathering all of them first and one batched call.
"""

from __future__ import annotations

import torch


def attend(
    rows: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
    lengths: torch.Tensor | None,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, N, M, D) and log-sum-exp (B, N, M) of query rows (B, N, M, D) that share the page lists (B, N, P)."""
    batches, lists = rows.shape[:2]
    accurate = torch.float64 if rows.dtype == torch.float64 else torch.float32
    out, lse = torch.empty_like(rows), torch.empty(rows.shape[:3], dtype=accurate, device=rows.device)
    ends = [key.shape[2]] * batches if lengths is None else lengths.clamp(max=key.shape[2]).tolist()
    offsets = torch.arange(page_size, device=pages.device)
    for batch, end in enumerate(ends):
        for index in range(lists):
            tokens = (pages[batch, index, :, None] * page_size + offsets).flatten()
            tokens = tokens[(tokens >= 0) & (tokens < end)]
            head = index * key.shape[1] // lists
            kept_key = key[batch, head].index_select(0, tokens).to(accurate)
            scores = rows[batch, index].to(accurate) * scale @ kept_key.T
            lse[batch, index] = torch.logsumexp(scores, -1)
            out[batch, index] = torch.softmax(scores, -1) @ value[batch, head].index_select(0, tokens).to(accurate)
    return out, lse
