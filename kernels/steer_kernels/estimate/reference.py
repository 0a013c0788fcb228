"""Scores of (query block, key block) pairs: the definitions, in plain torch."""

from __future__ import annotations

from collections.abc import Callable

import torch

POOLS = ("mean", "max", "minmax")


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """Probability that falls in a key block, averaged over the queries of a query block; through the whole map.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products; a query at -inf saw nothing and has mass 0.
        block_size: tokens in a (query, key) block; the last of either axis may be shorter.

    Returns:
        (B, H, nQ, nK).
    """
    (bq, bk), (q_len, kv_len) = block_size, (query.shape[2], key.shape[2])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    exponent = scale * (query.to(accurate(query)) @ key.to(accurate(key)).mT) - seen_lse(lse)[..., None]
    if is_causal:
        q, k = (torch.arange(n, device=query.device) for n in (q_len, kv_len))
        exponent = exponent.masked_fill(k > q[:, None] + (kv_len - q_len), -torch.inf)
    by_block = block_sum(block_sum(exponent.exp(), bk).mT, bq).mT.contiguous()
    return by_block / tokens_in_blocks(q_len, bq, query.device)[:, None]


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """Probability that every key gets, summed over the queries; through the whole map.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products; a query at -inf saw nothing and gives nothing.
        keep: bool (B or 1, H or 1, S_q or 1, S_k), True = the query sees the key; None = all.

    Returns:
        (B, H, S_k).
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    exponent = scale * (query.to(accurate(query)) @ key.to(accurate(key)).mT) - seen_lse(lse)[..., None]
    if is_causal:
        q, k = (torch.arange(n, device=query.device) for n in exponent.shape[-2:])
        exponent = exponent.masked_fill(k > q[:, None] + (k.numel() - q.numel()), -torch.inf)
    if keep is not None:
        exponent = exponent.masked_fill(~keep, -torch.inf)
    return exponent.exp().sum(2)


def block_profile(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: tuple[int, int],
    threshold: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Mass, share of the entries below `threshold` and largest entry of every block; through the whole map.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products; the entries of a query at -inf are 0.
        block_size: tokens in a (query, key) block; the last of either axis may be shorter.

    Returns:
        Three of (B, H, nQ, nK). The mass is that of `block_mass`.
    """
    (bq, bk), (q_len, kv_len) = block_size, (query.shape[2], key.shape[2])
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    weights = (scale * (query.to(accurate(query)) @ key.to(accurate(key)).mT) - seen_lse(lse)[..., None]).exp()
    rows, columns = tokens_in_blocks(q_len, bq, query.device)[:, None], tokens_in_blocks(kv_len, bk, query.device)
    mass, below = (
        block_sum(block_sum(x, bk).mT, bq).mT.contiguous() for x in (weights, (weights < threshold).to(weights.dtype))
    )
    peak = block_max(block_max(weights, bk).mT, bq).mT.contiguous()
    return mass / rows, below / (rows * columns), peak


def sampled_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    exists: torch.Tensor,
    key_block: int,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """As `block_mass`, averaged over some queries of each query block, each normalised over all keys that it sees.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        rows: (nQ, n) int64, the queries. exists: (nQ, n) bool, those that count.
    """
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    position = rows + (key.shape[2] - query.shape[2])
    scores = scale * (query[:, :, rows].to(accurate(query)) @ key[:, :, None].to(accurate(key)).mT)
    if is_causal:
        scores = scores.masked_fill(torch.arange(key.shape[2], device=key.device) > position[..., None], -torch.inf)
    weights = torch.softmax(scores, -1)
    if is_causal:
        weights = weights.masked_fill(position[..., None] < 0, 0.0)
    counted = block_sum(weights, key_block).masked_fill(~exists[..., None], 0.0)
    return counted.sum(-2) / exists.sum(-1)[:, None]


def pooled_scores(
    query: torch.Tensor, key: torch.Tensor, block_size: tuple[int, int], pool: str, scale: float
) -> torch.Tensor:
    """Scaled product of what `pool` keeps of a query block and of a key block: (B, H, nQ, nK)."""
    (bq, bk), kv_heads = block_size, key.shape[1]
    if pool == "minmax":
        q_middle, q_radius = _box(query, bq)
        k_middle, k_radius = _box(key, bk)
        q_middle, q_radius = scale * q_middle, abs(scale) * q_radius
        # |q k - mq mk| <= rq |mk| + |mq| rk + rq rk in every channel: one product of three times the width
        q_pooled = torch.cat([q_middle, q_radius, q_middle.abs()], -1)
        k_pooled = torch.cat([k_middle, k_middle.abs() + k_radius, k_radius], -1)
    elif pool == "max":
        q_pooled, k_pooled = scale * _highest(query, bq), _highest(key, bk)
    else:
        q_pooled, k_pooled = scale * _mean(query, bq), _mean(key, bk)
    # the query heads of one key/value head side by side, so that keys are not repeated
    grouped = q_pooled.unflatten(1, (kv_heads, -1)).flatten(2, 3)
    return (grouped @ k_pooled.mT).unflatten(2, (-1, q_pooled.shape[2])).flatten(1, 2)


def visible_keys(
    q_len: int, kv_len: int, block_size: tuple[int, int], is_causal: bool, device: torch.device
) -> torch.Tensor:
    """(nQ, nK) float32: keys of the key block that a query of the query block sees on average."""
    bq, bk = block_size
    rows, keys = tokens_in_blocks(q_len, bq, device)[:, None], tokens_in_blocks(kv_len, bk, device)
    if not is_causal:
        return keys.float().expand(rows.shape[0], -1)

    def seen_up_to(place: torch.Tensor) -> torch.Tensor:
        """Sum of min(t, keys) over 0 < t <= place: what queries at the places 1, 2, ... of the key block see."""
        inside = torch.minimum(place, keys).clamp(min=0)
        return inside * (inside + 1) // 2 + (place - keys).clamp(min=0) * keys

    first_q = torch.arange(rows.shape[0], device=device)[:, None] * bq + (kv_len - q_len)
    first = first_q - torch.arange(keys.shape[0], device=device) * bk + 1
    return (seen_up_to(first + rows - 1) - seen_up_to(first - 1)) / rows


def accurate(tensor: torch.Tensor) -> torch.dtype:
    """What sums are kept in: float64 for float64 tensors, else float32."""
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def seen_lse(lse: torch.Tensor) -> torch.Tensor:
    """+inf where the log-sum-exp is -inf: every probability of a query that saw nothing is then 0, not NaN."""
    lse = lse.to(accurate(lse))
    return lse.masked_fill(lse == -torch.inf, torch.inf)


def tokens_in_blocks(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """(blocks,) int64: tokens that exist in every block."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block)


def block_sum(weights: torch.Tensor, block: int) -> torch.Tensor:
    """(..., tokens) to (..., blocks)."""
    tail = -weights.shape[-1] % block
    if tail:
        weights = torch.nn.functional.pad(weights, (0, tail))
    return weights.unflatten(-1, (-1, block)).sum(-1)


def block_max(weights: torch.Tensor, block: int) -> torch.Tensor:
    """(..., tokens) to (..., blocks), of what is nowhere negative."""
    tail = -weights.shape[-1] % block
    if tail:
        weights = torch.nn.functional.pad(weights, (0, tail))
    return weights.unflatten(-1, (-1, block)).amax(-1)


def _mean(tokens: torch.Tensor, block: int) -> torch.Tensor:
    return _pooled(tokens, block, lambda blocks: blocks.mean(3, dtype=accurate(tokens)))


def _highest(tokens: torch.Tensor, block: int) -> torch.Tensor:
    return _pooled(tokens, block, lambda blocks: blocks.amax(3).to(accurate(tokens)))


def _box(tokens: torch.Tensor, block: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Middle and half width of the smallest box around the vectors of each block."""
    low = _pooled(tokens, block, lambda blocks: blocks.amin(3).to(accurate(tokens)))
    high = _highest(tokens, block)
    return (low + high) / 2, (high - low) / 2


def _pooled(tokens: torch.Tensor, block: int, pool: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
    """(B, H, S, D) to (B, H, blocks, D); a short last block is pooled over the tokens that exist."""
    blocks = tokens.shape[2] // block
    whole = tokens[:, :, : blocks * block].unflatten(2, (blocks, block))
    if tokens.shape[2] == blocks * block:
        return pool(whole)
    tail = pool(tokens[:, :, None, blocks * block :])
    return torch.cat([pool(whole), tail], 2) if blocks else tail
