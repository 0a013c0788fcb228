"""Attention over chosen pages of the keys: the definition, in plain torch."""

from __future__ import annotations

import torch

from steer_kernels.partial import reference as dense


def gathered_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Dense softmax attention under the boolean token mask that the pages describe.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, T, D), H a multiple of H_kv.
        pages: (B, 1, H_kv or H; P) page numbers; what is no page of the T tokens is an unused slot.
        page_size: tokens per page.
        lengths: (B,) tokens that exist; None = T.
        scale: factor on the products; None = 1 / sqrt(D).

    Returns:
        Output (B, H, S, D) and log-sum-exp (B, H, S). A query that sees no token has output 0 and log-sum-exp -inf.
    """
    heads, groups = query.shape[1], query.shape[1] // key.shape[1]
    seen = token_mask(pages, key.shape[2], page_size=page_size, lengths=lengths)
    seen = seen.repeat_interleave(heads // seen.shape[1], 1)
    # What is not seen may hold anything, NaN too, and 0 * NaN is NaN.
    key, value = (t.repeat_interleave(groups, 1).masked_fill(~seen[..., None], 0.0) for t in (key, value))
    return dense.partial(query, key, value, mask=seen[:, :, None], scale=scale)


def token_mask(
    pages: torch.Tensor, tokens: int, *, page_size: int, lengths: torch.Tensor | None = None
) -> torch.Tensor:
    """Which of `tokens` tokens each page list (B, Hp, P) holds: boolean (B, Hp, tokens)."""
    count = -(-tokens // page_size)
    slots = torch.where((pages >= 0) & (pages < count), pages, count).long()  # unused slots mark one page too many
    chosen = torch.zeros(*pages.shape[:2], count + 1, dtype=torch.bool, device=pages.device).scatter(-1, slots, True)
    seen = chosen[..., :count].repeat_interleave(page_size, -1)[..., :tokens]
    if lengths is None:
        return seen
    return seen & (torch.arange(tokens, device=pages.device) < lengths[:, None, None])
