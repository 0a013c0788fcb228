"""What it costs a model not to see keys: the first-order change of the loss, with no attention map kept."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Literal

import torch
import torch.nn.functional as F

Measure = Literal["rows", "keys"]
EPSILON = 1e-6  # of the published formula; keeps rows finite from which everything is hidden


def masking_effect(weights: torch.Tensor, gradient: torch.Tensor) -> torch.Tensor:
    """What the loss gains, to first order, if query i does not see key j and the rest of its row is renormalised.

    Without key j the output o of a row becomes (o - A_ij v_j) / (1 - A_ij). With G the gradient of the loss with
    respect to o, and g_ij = G v_j, which is the gradient with respect to A_ij, the loss changes by

        E_ij = -A_ij (g_ij - sum_n A_in g_in) / (1 - A_ij + eps).

    A query that sees one key only has nothing to renormalise: E_ij = g_ij A_ij, the published convention.

    Args:
        weights: A, (..., rows, keys), the probabilities of each row; 0 where a key is hidden.
        gradient: g, of the same shape.

    Returns:
        (..., rows, keys).

    Source: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    arXiv 2406.14909, section 4.1.
    """
    mean = (weights * gradient).sum(-1, keepdim=True)
    effect = -weights * (gradient - mean) / (1 - weights + EPSILON)
    alone = (weights > 0).sum(-1, keepdim=True) == 1
    return torch.where(alone, weights * gradient, effect)


def hiding_effect(weights: torch.Tensor, gradient: torch.Tensor, n_sink: int) -> torch.Tensor:
    """What the loss gains, to first order, if query i sees none of the keys n_sink to j: `masking_effect` of them all.

    Args and returns: as `masking_effect`; 0 for the keys before `n_sink`.
    """
    mean = (weights * gradient).sum(-1, keepdim=True)
    past_sinks = torch.arange(weights.shape[-1], device=weights.device) >= n_sink
    hidden = (weights * past_sinks).cumsum(-1)
    return -(weights * (gradient - mean) * past_sinks).cumsum(-1) / (1 - hidden + EPSILON)


def effect_of_windows(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    scale: float,
    *,
    n_sink: int,
    measure: Measure = "rows",
    softcap: float | None = None,
    rows: int = 128,
) -> torch.Tensor:
    """What each window would cost each head of causal self-attention.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, S, D).
        gradient: (B, H, S, D) of the loss with respect to the attention output.
        scale: factor on query-key products.
        n_sink: leading keys that every query goes on seeing.
        measure: "keys": the sum of |`masking_effect`| over all hidden keys, as published; "rows": the sum over the
            queries of the square of `hiding_effect`, in which keys of a row may cancel.
        softcap: logits s become softcap * tanh(s / softcap).
        rows: queries at a time; memory is O(B * H * rows * S).

    Returns:
        (H, S + 1) float64: entry w is the measure where each query sees the sinks and the latest w keys, summed over
        the batch. The last is 0.
    """
    heads, length = query.shape[1:3]
    sums = torch.zeros(heads, length + 1, dtype=torch.float64, device=query.device)
    for _start, weights, slope in tiles(query, key, value, gradient, scale, softcap=softcap, rows=rows):
        if measure == "rows":
            effect = hiding_effect(weights, slope, n_sink).square()
        else:
            effect = masking_effect(weights, slope).abs()
        effect[..., :n_sink] = 0
        sums[:, : effect.shape[-1]] += _diagonals(effect.sum(0))
    return sums if measure == "rows" else sums.flip(-1).cumsum(-1).flip(-1)


def tiles(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    gradient: torch.Tensor,
    scale: float,
    *,
    softcap: float | None = None,
    rows: int = 128,
) -> Iterator[tuple[int, torch.Tensor, torch.Tensor]]:
    """A few queries at a time: (the first one, probabilities, gradients), both (B, H, rows, keys up to the last one).

    Args: as `effect_of_windows`.
    """
    groups, length = query.shape[1] // key.shape[1], query.shape[2]
    query, key, value, gradient = (x if x.dtype == torch.float64 else x.float() for x in (query, key, value, gradient))
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        scores = query[:, :, start:stop] @ key[:, :, :stop].mT * scale
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        places = torch.arange(stop, device=query.device)
        scores = scores.masked_fill(places > places[start:, None], -torch.inf)
        yield start, scores.softmax(-1), gradient[:, :, start:stop] @ value[:, :, :stop].mT


def _diagonals(tile: torch.Tensor) -> torch.Tensor:
    """(H, T) float64: sums of a tile (H, R, T) over equal distances from 0, where row r is query T - R + r."""
    rows, keys = tile.shape[-2:]
    # Rows from the last to the first, each shifted one place further: equal distances come to lie in one column.
    shifted = F.pad(tile.flip(-2), (0, rows)).flatten(-2)[..., : rows * (keys + rows - 1)]
    columns = shifted.unflatten(-1, (rows, keys + rows - 1)).sum(-2, dtype=torch.float64)
    return columns[..., :keys].flip(-1)
