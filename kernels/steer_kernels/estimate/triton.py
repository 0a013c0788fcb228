"""Block mass and column mass in Triton.

Block mass: one program per query block and head walks over the key blocks. Column mass: one per key block and head
walks over the queries that see it.
"""
# mypy: allow-untyped-defs

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

LOG2_E = tl.constexpr(1.4426950408889634)


@dataclass(frozen=True)
class Tiling:
    """How a program is cut: tile sizes, warps and pipeline stages."""

    BLOCK_M: int
    BLOCK_N: int
    BLOCK_D: int
    num_warps: int
    num_stages: int

    @classmethod
    def of(cls, block_size: tuple[int, int], width: int, element_size: int, shared_memory: int) -> Tiling | None:
        """The largest key tile with the most stages that fit into so many bytes; None where not even one key tile does.

        A query tile is a query block. A float32 product keeps a high and a low half of both tiles, and its key tiles
        are smaller: more of them would not fit into the registers.
        """
        rows, keys, channels = (max(16, triton.next_power_of_2(n)) for n in (*block_size, width))
        split = element_size == 4
        if split:
            keys = min(keys, 32 if channels > 64 else 64)
        else:
            keys = min(keys, 64 if channels > 128 or rows > 128 else 128)
        while keys >= 16:
            warps = 8 if rows * keys >= 128 * 128 or (split and rows >= 128) else 4
            for stages in (2, 1) if split else (3, 2, 1):
                if _needed(rows, keys, channels, triton.cdiv(block_size[1], keys), stages, split) <= shared_memory:
                    return cls(rows, keys, channels, warps, stages)
            keys //= 2
        return None


def _needed(rows: int, keys: int, channels: int, tiles: int, stages: int, split: bool) -> int:
    """Bytes of shared memory: the query tile, and of every key tile of a block as many copies as are in flight."""
    bookkeeping = 2048
    if split:
        return 4 * channels * (2 * rows + 2 * keys + (stages - 1) * tiles * keys) + bookkeeping
    return 2 * channels * (rows + (stages * tiles if stages > 1 else 1) * keys) + bookkeeping


def tiling(query: torch.Tensor, block_size: tuple[int, int]) -> Tiling | None:
    """Of a call on the query's device; None where no tiling fits."""
    shared_memory = 232448  # of an H100, for the interpreter
    if query.is_cuda:
        properties = triton.runtime.driver.active.utils.get_device_properties(query.device.index)
        shared_memory = int(properties["max_shared_mem"])
    return Tiling.of(block_size, query.shape[-1], query.element_size(), shared_memory)


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """See `reference.block_mass`; for a call that `tiling` has one for."""
    (batch, heads, q_len, width), (kv_heads, kv_len), (bq, bk) = query.shape, key.shape[1:3], block_size
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    lse = lse.float().contiguous()
    rows, columns = -(-q_len // bq), -(-kv_len // bk)
    # blocks that come after every query of their row are not visited
    mass = torch.zeros(batch, heads, rows, columns, dtype=torch.float32, device=query.device)
    tiles: dict[str, Any] = vars(tiling(query, block_size))
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        block_mass_kernel[(rows * batch * heads,)](
            query,
            key,
            lse,
            mass,
            *query.stride()[:3],
            *key.stride()[:3],
            heads,
            heads // kv_heads,
            q_len,
            kv_len,
            scale * LOG2_E.value,
            BQ=bq,
            BK=bk,
            WIDTH=width,
            CAUSAL=is_causal,
            **tiles,
        )
    return mass


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor | None,
    tile: tuple[int, int],
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """See `reference.column_mass`; for a call that `tiling` has one for."""
    (batch, heads, q_len, width), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    query, key = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key))
    lse = lse.float().contiguous()
    mass = torch.empty(batch, heads, kv_len, dtype=torch.float32, device=query.device)
    seen = lse if keep is None else keep.expand(batch, heads, q_len, kv_len)  # without a mask nothing is read there
    strides = (0, 0, 0, 0) if keep is None else seen.stride()
    tiles: dict[str, Any] = vars(tiling(query, tile))
    columns = triton.cdiv(kv_len, tiles["BLOCK_N"])
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        column_mass_kernel[(columns * batch * heads,)](
            query,
            key,
            lse,
            seen,
            mass,
            *query.stride()[:3],
            *key.stride()[:3],
            *strides,
            heads,
            heads // kv_heads,
            q_len,
            kv_len,
            scale * LOG2_E.value,
            WIDTH=width,
            CAUSAL=is_causal,
            KEEP=keep is not None,
            **tiles,
        )
    return mass


@triton.jit
def block_mass_kernel(
    Q,
    K,
    LSE,
    MASS,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    heads,
    group,
    q_len,
    kv_len,
    factor,  # scale * log2(e): everything is in powers of two
    BQ: tl.constexpr,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    rows, columns = tl.cdiv(q_len, BQ), tl.cdiv(kv_len, BK)
    # neighbouring programs read the same keys
    row, batch_head = tl.program_id(0) % rows, tl.program_id(0) // rows
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)
    first, last = row * BQ, tl.minimum(row * BQ + BQ, q_len)

    q_tokens, channels = first + tl.arange(0, BLOCK_M), tl.arange(0, BLOCK_D)
    exists = q_tokens < last
    query = tl.load(
        Q + batch * stride_qb + head * stride_qh + q_tokens[:, None] * stride_qs + channels[None, :],
        mask=exists[:, None] & (channels[None, :] < WIDTH),
        other=0.0,
    )
    lse = tl.load(LSE + batch_head.to(tl.int64) * q_len + q_tokens, mask=exists, other=float("-inf"))
    # what saw nothing, and what does not exist, is at +inf: its probabilities are 0
    lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)

    position = q_tokens + (kv_len - q_len)
    whole, visible = kv_len // BK, columns
    if CAUSAL:
        whole = tl.minimum(whole, tl.maximum(first + (kv_len - q_len) + 1, 0) // BK)
        visible = tl.minimum(visible, tl.cdiv(tl.maximum(last + (kv_len - q_len), 0), BK))
    if BK % BLOCK_N != 0:
        whole = 0

    keys = K + batch * stride_kb + (head // group) * stride_kh
    out = MASS + (batch_head.to(tl.int64) * rows + row) * columns
    share = 1.0 / (last - first).to(tl.float32)
    # mask arithmetic only where a block is short or on the diagonal
    for column in range(0, whole):
        mass = _column_mass(
            query, lse, keys, stride_ks, column, kv_len, position, factor,
            BK, WIDTH, BLOCK_N, BLOCK_D, False, False,
        )  # fmt: skip
        tl.store(out + column, mass * share)
    for column in range(whole, visible):
        mass = _column_mass(
            query, lse, keys, stride_ks, column, kv_len, position, factor,
            BK, WIDTH, BLOCK_N, BLOCK_D, True, CAUSAL,
        )  # fmt: skip
        tl.store(out + column, mass * share)


@triton.jit
def _column_mass(
    query,
    lse,
    keys,
    stride_ks,
    column,
    kv_len,
    position,
    factor,
    BK: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
    MASKED: tl.constexpr,
    CAUSAL: tl.constexpr,
):
    """Probabilities of all queries of the tile, summed over one key block."""
    channels = tl.arange(0, BLOCK_D)
    stop = tl.minimum(column * BK + BK, kv_len)
    mass = 0.0
    for part in tl.static_range(0, BK, BLOCK_N):
        tokens = column * BK + part + tl.arange(0, BLOCK_N)
        where = keys + tokens[None, :] * stride_ks + channels[:, None]
        if MASKED:
            key = tl.load(where, mask=(tokens[None, :] < stop) & (channels[:, None] < WIDTH), other=0.0)
        elif WIDTH != BLOCK_D:
            key = tl.load(where, mask=channels[:, None] < WIDTH, other=0.0)
        else:
            key = tl.load(where)
        # for float32, three products on the tensor cores instead of one that keeps 10 bits
        weights = tl.exp2(tl.dot(query, key, input_precision="tf32x3") * factor - lse[:, None])
        if MASKED:
            seen = tokens[None, :] < stop
            if CAUSAL:
                seen = seen & (tokens[None, :] <= position[:, None])
            weights = tl.where(seen, weights, 0.0)
        mass += tl.sum(tl.sum(weights, 1), 0)
    return mass


@triton.jit
def column_mass_kernel(
    Q,
    K,
    LSE,
    SEEN,
    MASS,
    stride_qb,
    stride_qh,
    stride_qs,
    stride_kb,
    stride_kh,
    stride_ks,
    stride_mb,
    stride_mh,
    stride_mq,
    stride_mk,
    heads,
    group,
    q_len,
    kv_len,
    factor,  # scale * log2(e): everything is in powers of two
    WIDTH: tl.constexpr,
    CAUSAL: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    columns = tl.cdiv(kv_len, BLOCK_N)
    # under the causal rule the first keys have most queries: they begin first
    batch_heads = tl.num_programs(0) // columns
    column, batch_head = tl.program_id(0) // batch_heads, tl.program_id(0) % batch_heads
    batch, head = (batch_head // heads).to(tl.int64), (batch_head % heads).to(tl.int64)

    tokens, channels = column * BLOCK_N + tl.arange(0, BLOCK_N), tl.arange(0, BLOCK_D)
    key = tl.load(
        K + batch * stride_kb + (head // group) * stride_kh + tokens[None, :] * stride_ks + channels[:, None],
        mask=(tokens[None, :] < kv_len) & (channels[:, None] < WIDTH),
        other=0.0,
    )
    queries = Q + batch * stride_qb + head * stride_qh
    seen_here = SEEN + batch * stride_mb + head * stride_mh

    mass = tl.zeros((BLOCK_N,), dtype=tl.float32)
    first = 0
    if CAUSAL:
        first = tl.maximum(column * BLOCK_N - (kv_len - q_len), 0) // BLOCK_M * BLOCK_M
    for start in range(first, q_len, BLOCK_M):
        rows = start + tl.arange(0, BLOCK_M)
        query = tl.load(
            queries + rows[:, None] * stride_qs + channels[None, :],
            mask=(rows[:, None] < q_len) & (channels[None, :] < WIDTH),
            other=0.0,
        )
        lse = tl.load(LSE + batch_head.to(tl.int64) * q_len + rows, mask=rows < q_len, other=float("-inf"))
        # what saw nothing, and what does not exist, is at +inf: its probabilities are 0
        lse = tl.where(lse == float("-inf"), float("inf"), lse * LOG2_E)
        weights = tl.exp2(tl.dot(query, key, input_precision="tf32x3") * factor - lse[:, None])
        if CAUSAL:
            weights = tl.where(tokens[None, :] <= rows[:, None] + (kv_len - q_len), weights, 0.0)
        if KEEP:
            inside = (rows[:, None] < q_len) & (tokens[None, :] < kv_len)
            where = rows[:, None].to(tl.int64) * stride_mq + tokens[None, :] * stride_mk
            weights = tl.where(tl.load(seen_here + where, mask=inside, other=0) != 0, weights, 0.0)
        mass += tl.sum(weights, 0)
    tl.store(MASS + batch_head.to(tl.int64) * kv_len + tokens, mass, mask=tokens < kv_len)
