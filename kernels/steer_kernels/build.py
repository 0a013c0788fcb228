"""From block scores to a `BlockMask`, on the device of the scores and without a host synchronisation.

Every shape follows from shapes, so all of this works inside a CUDA graph and under torch.compile(fullgraph=True).
"""

from __future__ import annotations

import torch

from steer_kernels.block_mask import BlockMask
from steer_kernels.shapes import pair_of_blocks


def top_k(
    scores: torch.Tensor,
    k: int | None = None,
    *,
    density: float | None = None,
    block_size: int | tuple[int, int] = 128,
    q_len: int | None = None,
    kv_len: int | None = None,
    force: torch.Tensor | None = None,
    causal: bool = False,
) -> BlockMask:
    """The best key blocks of every query block.

    Args:
        scores: (B or 1, H or 1, nQ, nK); blocks at -inf or NaN are never kept. Equal scores: the first block wins.
        k: key blocks in every row; fewer where there are fewer.
        density: instead of `k`, the fraction of the row's key blocks (with `causal`: of those that are not all in its
            future), to the nearest number of blocks, at least one.
        block_size: tokens in a (query, key) block, or one number for both.
        q_len, kv_len: tokens; None = whole blocks.
        force: bool, broadcastable to `scores`: blocks kept whatever their score. They come first and count towards
            `k`, but all are kept where there are more than `k`.
        causal: only blocks at or before the diagonal, and those on it masked per token.

    Raises:
        ValueError: arguments that do not fit, or not exactly one of `k` and `density`.
    """
    if (k is None) == (density is None):
        raise ValueError(f"give either k or density; got k={k} and density={density}")
    if k is not None and k < 1:
        raise ValueError(f"k must be at least 1 key block; got {k}")
    if density is not None and not 0 < density <= 1:
        raise ValueError(f"density is a fraction of the key blocks in (0, 1]; got {density}")
    sizes, q_len, kv_len = _lengths(scores, block_size, q_len, kv_len)
    allowed = _allowed(scores, sizes, q_len, kv_len, causal)
    force = _check_force(force, scores, allowed)
    ranked = torch.where(allowed & ~scores.isnan(), scores, -torch.inf)
    if force is not None:
        ranked = ranked.masked_fill(force, torch.inf)

    columns = scores.shape[-1]
    if k is not None:
        most = min(k, columns)
        wanted = torch.full((), most, device=scores.device)
    else:
        assert density is not None
        most = max(1, round(columns * density))
        # in float64, as Python rounds: no row may want more than `most`
        wanted = (allowed.sum(-1, keepdim=True).double() * density).round().long().clamp(min=1)
    keep = _best(ranked, wanted, most) & (ranked > -torch.inf)
    return _mask(keep if force is None else keep | force, sizes, q_len, kv_len, causal)


def top_mass(
    scores: torch.Tensor,
    mass: float,
    *,
    min_blocks: int = 1,
    block_size: int | tuple[int, int] = 128,
    q_len: int | None = None,
    kv_len: int | None = None,
    force: torch.Tensor | None = None,
    causal: bool = False,
) -> BlockMask:
    """The fewest key blocks of every query block that together reach a part of the row's mass.

    Args:
        scores: (B or 1, H or 1, nQ, nK) finite masses, normalised here over the row; what is not positive counts as
            none. A row of nothing stays empty. Equal scores: the first block wins.
        mass: part of the row's mass in (0, 1]; the block that crosses it is kept.
        min_blocks: key blocks in every row at least, where so many have a mass.
        block_size: tokens in a (query, key) block, or one number for both.
        q_len, kv_len: tokens; None = whole blocks.
        force: bool, broadcastable to `scores`: blocks kept whatever their mass, which counts towards `mass`.
        causal: only blocks at or before the diagonal, and those on it masked per token.

    Raises:
        ValueError: arguments that do not fit.
    """
    if not 0 < mass <= 1:
        raise ValueError(f"mass is a part of the row's mass in (0, 1]; got {mass}")
    if min_blocks < 0:
        raise ValueError(f"min_blocks is a number of key blocks; got {min_blocks}")
    sizes, q_len, kv_len = _lengths(scores, block_size, q_len, kv_len)
    allowed = _allowed(scores, sizes, q_len, kv_len, causal)
    force = _check_force(force, scores, allowed)
    weights = torch.where(allowed & (scores > 0), scores, 0.0)
    ranked = weights if force is None else weights.masked_fill(force, torch.inf)

    order = ranked.sort(dim=-1, descending=True, stable=True).indices
    reached = weights.gather(-1, order).cumsum(-1)
    # the sum itself, not reached minus the weight: rounding must not let a block in
    before = torch.nn.functional.pad(reached[..., :-1], (1, 0))
    chosen = before < mass * reached[..., -1:]
    chosen = chosen | (torch.arange(scores.shape[-1], device=scores.device) < min_blocks)
    keep = torch.zeros_like(chosen).scatter(-1, order, chosen) & (weights > 0)
    return _mask(keep if force is None else keep | force, sizes, q_len, kv_len, causal)


def forced(
    nq: int,
    nk: int,
    *,
    diagonal: int | None = 0,
    sink_blocks: int = 0,
    last_blocks: int = 0,
    text: tuple[int, int] | None = None,
    block_size: int | tuple[int, int] = 128,
    q_len: int | None = None,
    kv_len: int | None = None,
    device: torch.device | str = "cpu",
) -> torch.Tensor:
    """Blocks to keep whatever their score: the union of what is asked for.

    Args:
        nq, nk: query and key blocks.
        diagonal: the blocks of a query block's own tokens (the last query is at the last key), and so many key blocks
            on either side; None = not.
        sink_blocks, last_blocks: key blocks at the start and at the end, for every query.
        text: tokens [start, stop) whose blocks every query sees and, where queries and keys are the same tokens
            (q_len = kv_len), whose query blocks see everything.
        block_size: tokens in a (query, key) block, or one number for both.
        q_len, kv_len: tokens; None = whole blocks.
        device: of the result.

    Returns:
        (1, 1, nQ, nK) bool.

    Raises:
        ValueError: lengths or a text range that do not fit.
    """
    (bq, bk), q_len, kv_len = _sizes(nq, nk, block_size, q_len, kv_len)
    rows, columns = torch.arange(nq, device=device)[:, None], torch.arange(nk, device=device)
    keep = (columns < sink_blocks) | (columns >= nk - last_blocks)
    if diagonal is not None:
        first = rows * bq + (kv_len - q_len)
        last = (first + bq).clamp(max=kv_len) - 1
        low, high = first.div(bk, rounding_mode="floor"), last.div(bk, rounding_mode="floor")
        keep = keep | (columns >= low - diagonal) & (columns <= high + diagonal)
    if text is not None:
        start, stop = text
        if not 0 <= start < stop <= kv_len:
            raise ValueError(f"text [{start}, {stop}) does not lie in the {kv_len} keys")
        keep = keep | (columns >= start // bk) & (columns < -(-stop // bk))
        if q_len == kv_len:
            keep = keep | (rows >= start // bq) & (rows < -(-stop // bq))
    return keep.expand(nq, nk)[None, None]


def share(blocks: torch.Tensor, kv_heads: int) -> torch.Tensor:
    """One grid per key/value head: the union of the masks, or the mean of the scores, of its query heads.

    Args:
        blocks: (B, H, nQ, nK), bool or floating point; the query heads of a key/value head are neighbours.
        kv_heads: key/value heads, a divisor of H.
    """
    if blocks.ndim != 4 or kv_heads < 1 or blocks.shape[1] % kv_heads:
        raise ValueError(f"blocks must be (B, H, nQ, nK) with H a multiple of {kv_heads}; got {tuple(blocks.shape)}")
    grouped = blocks.unflatten(1, (kv_heads, -1))
    return grouped.any(2) if blocks.dtype == torch.bool else grouped.mean(2)


def _best(ranked: torch.Tensor, wanted: torch.Tensor, most: int) -> torch.Tensor:
    """Bool: the `wanted` (broadcastable to the rows, at most `most`) highest of each row, the first among equals."""
    values = ranked.topk(most, -1).values
    last = values.gather(-1, (wanted - 1).expand(*ranked.shape[:-1], 1))
    above, equal = ranked > last, ranked == last
    room = wanted - above.sum(-1, keepdim=True)
    return above | equal & (equal.cumsum(-1, dtype=torch.int32) <= room)


def _allowed(scores: torch.Tensor, block_size: tuple[int, int], q_len: int, kv_len: int, causal: bool) -> torch.Tensor:
    """(nQ, nK) bool: with `causal`, the blocks in which the last query of the row sees at least one key."""
    (bq, bk), (rows, columns) = block_size, scores.shape[-2:]
    if not causal:
        return torch.ones(rows, columns, dtype=torch.bool, device=scores.device)
    last_q = (torch.arange(1, rows + 1, device=scores.device) * bq).clamp(max=q_len) - 1 + (kv_len - q_len)
    return torch.arange(columns, device=scores.device) * bk <= last_q[:, None]


def _mask(keep: torch.Tensor, block_size: tuple[int, int], q_len: int, kv_len: int, causal: bool) -> BlockMask:
    mask = BlockMask.from_bool(keep, block_size, q_len=q_len, kv_len=kv_len)
    return mask.with_causal() if causal else mask


def _check_force(force: torch.Tensor | None, scores: torch.Tensor, allowed: torch.Tensor) -> torch.Tensor | None:
    if force is None:
        return None
    fits = force.ndim <= 4 and all(
        mine in (1, theirs) for mine, theirs in zip(reversed(force.shape), reversed(scores.shape), strict=False)
    )
    if force.dtype != torch.bool or not fits:
        raise ValueError(
            f"force must be bool and broadcastable to {tuple(scores.shape)}; got {force.dtype} {tuple(force.shape)}"
        )
    return force & allowed


def _lengths(
    scores: torch.Tensor, block_size: int | tuple[int, int], q_len: int | None, kv_len: int | None
) -> tuple[tuple[int, int], int, int]:
    if scores.ndim != 4 or not scores.is_floating_point():
        raise ValueError(f"scores must be floating point (B, H, nQ, nK); got {scores.dtype} {tuple(scores.shape)}")
    return _sizes(scores.shape[2], scores.shape[3], block_size, q_len, kv_len)


def _sizes(
    rows: int, columns: int, block_size: int | tuple[int, int], q_len: int | None, kv_len: int | None
) -> tuple[tuple[int, int], int, int]:
    bq, bk = pair_of_blocks(block_size)
    q_len, kv_len = q_len or rows * bq, kv_len or columns * bk
    made = -(-q_len // bq), -(-kv_len // bk)
    if made != (rows, columns):
        raise ValueError(
            f"{q_len} x {kv_len} tokens in blocks of {bq} x {bk} make {made[0]} x {made[1]} blocks; "
            f"there are {rows} x {columns}"
        )
    return (bq, bk), q_len, kv_len
