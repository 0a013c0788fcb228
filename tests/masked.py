"""Attention under a token mask in fp64, one head at a time with plain sums: what every sparse kernel must equal."""

from __future__ import annotations

import torch


def masked_attention(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, visible: torch.Tensor, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output and log-sum-exp in fp64; `visible` bool (B or 1, H or 1, S_q, S_k). Seeing nothing gives 0 and -inf."""
    query, key, value = query.double(), key.double(), value.double()
    batch, heads, length, _ = query.shape
    group = heads // key.shape[1]
    out = torch.zeros(batch, heads, length, value.shape[-1], dtype=torch.float64)
    lse = torch.full((batch, heads, length), -torch.inf, dtype=torch.float64)
    for b in range(batch):
        for h in range(heads):
            seen = visible[min(b, visible.shape[0] - 1), min(h, visible.shape[1] - 1)]
            exp = torch.exp(scale * query[b, h] @ key[b, h // group].T) * seen
            total = exp.sum(-1)
            some = total > 0
            out[b, h, some] = (exp[some] / total[some, None]) @ value[b, h // group]
            lse[b, h, some] = total[some].log()
    return out, lse


def draw(
    seed: int, batch: int, heads: int, kv_heads: int, q_len: int, kv_len: int, width: int, dtype: torch.dtype
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random query (B, H, S_q, D), key and value (B, H_kv, S_k, D), the same numbers for every dtype."""
    g = torch.Generator().manual_seed(seed)
    shapes = ((batch, heads, q_len, width), (batch, kv_heads, kv_len, width), (batch, kv_heads, kv_len, width))
    q, k, v = (torch.randn(shape, generator=g, dtype=torch.float64).to(dtype) for shape in shapes)
    return q, k, v


def low_precision_error(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    visible: torch.Tensor,
    scale: float,
    truth: torch.Tensor,
) -> float:
    """Error against fp64 of plain torch attention in the precision of the tensors: the yardstick for a kernel's own."""
    group = query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(group, 1), value.repeat_interleave(group, 1)
    scores = ((query @ key.mT) * scale).masked_fill(~visible, -torch.inf)
    out = torch.softmax(scores, -1).nan_to_num(0.0) @ value
    return float((out.double() - truth).norm())
