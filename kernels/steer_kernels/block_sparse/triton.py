"""Block-sparse attention in Triton: one program walks over query tiles, and over the listed key blocks of each."""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel have no Python types)

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

from steer_kernels.block_mask import BlockMask
from steer_kernels.config import Config
from steer_kernels.rule import ModRule
from steer_kernels.schedule import Schedule

try:
    from triton.tools.tensor_descriptor import TensorDescriptor
except ImportError:  # Triton before 3.4: keys and values are loaded through pointers
    TensorDescriptor = None

LOG2_E = 1.4426950408889634
RULES = {"": 0, "box": 1, "disc": 2}
FULL, EDGE, PARTIAL = tl.constexpr(0), tl.constexpr(1), tl.constexpr(2)


def forward(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scale: float,
    config: Config,
    work: Schedule,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, S_q, D), laid out as `query` is, and natural log-sum-exp (B, H, S_q) in fp32."""
    batch, heads, q_len, width = query.shape
    (bq, bk), rule = mask.block_size, mask.rule
    assert not isinstance(rule, ModRule)
    tile, tile_k, padded = min(config.tile_q, bq), min(config.tile_k, bk), max(16, triton.next_power_of_2(width))
    rows = -(-q_len // bq) * (bq // tile)
    slots = len(work.items) - batch * heads * rows
    out = torch.empty_like(query)
    lse = query.new_empty(batch, heads, q_len, dtype=torch.float32)
    scratch = query.new_empty(slots, tile, padded, dtype=torch.float32)
    scratch_lse = query.new_empty(slots, tile, dtype=torch.float32)

    keys, values = key, value
    ragged, descriptors = mask.kv_len % bk != 0, config.tma and padded == width and TensorDescriptor is not None
    if descriptors:
        keys, values = (TensorDescriptor(t, [*t.shape], [*t.stride()], [1, 1, tile_k, padded]) for t in (key, value))
    # a mask without a rule passes two tables that nobody reads
    table_q, table_k = (rule.query, rule.key) if rule else (mask.full_num[None], mask.full_num[None])
    edges = triton.next_power_of_2(bq // bk + 2) if mask.causal else int(ragged)
    with torch.cuda.device(query.device) if query.is_cuda else nullcontext():
        _attend[(min(len(work.items), config.programs),)](
            query, *query.stride()[:3], keys, *key.stride()[:3], values, *value.stride()[:3],
            out, *out.stride()[:3], lse, scratch, scratch_lse,
            work.items, work.counts,
            mask.full_num, mask.full_idx, mask.partial_num, mask.partial_idx,
            table_q, *_strides(table_q), table_k, *_strides(table_k),
            heads, heads // key.shape[1], q_len, mask.kv_len, rows, *mask.shape,
            scale * LOG2_E, rule.radius_squared if rule else 0,
            D=width, PADDED_D=padded, BQ=bq, BK=bk, TILE_Q=tile, TILE_K=tile_k,
            RULE=RULES[rule.kind if rule else ""], AXES=rule.axes if rule else 0,
            CAUSAL=mask.causal, RAGGED=ragged, EDGES=edges, TMA=descriptors,
            PRECISION="ieee" if query.dtype == torch.float32 else "tf32",
            num_warps=config.warps, num_stages=config.stages,
        )  # fmt: skip
        _merge[(len(work.splits),)](
            out, *out.stride()[:3], lse, scratch, scratch_lse, work.splits, work.counts, heads, q_len, rows,
            D=width, PADDED_D=padded, TILE_Q=tile, num_warps=4,
        )  # fmt: skip
    return out, lse


def _strides(table: torch.Tensor) -> tuple[int, int]:
    """Batch and head strides of a rule's table; 0 where one serves all."""
    return (table.stride(0) if table.shape[0] > 1 else 0, table.stride(1) if table.shape[1] > 1 else 0)


@triton.jit
def _attend(
    q_ptr, q_stride_b, q_stride_h, q_stride_s,
    k_ptr, k_stride_b, k_stride_h, k_stride_s,
    v_ptr, v_stride_b, v_stride_h, v_stride_s,
    out_ptr, out_stride_b, out_stride_h, out_stride_s, lse_ptr, scratch_ptr, scratch_lse_ptr,
    items_ptr, counts_ptr,
    full_num_ptr, full_idx_ptr, partial_num_ptr, partial_idx_ptr,
    rule_q_ptr, rule_q_stride_b, rule_q_stride_h, rule_k_ptr, rule_k_stride_b, rule_k_stride_h,
    heads, group, q_len, kv_len, rows, mask_batch, mask_heads, mask_rows, mask_columns,
    scale_log2, radius_squared,
    D: tl.constexpr, PADDED_D: tl.constexpr, BQ: tl.constexpr, BK: tl.constexpr,
    TILE_Q: tl.constexpr, TILE_K: tl.constexpr, RULE: tl.constexpr, AXES: tl.constexpr,
    CAUSAL: tl.constexpr, RAGGED: tl.constexpr, EDGES: tl.constexpr, TMA: tl.constexpr, PRECISION: tl.constexpr,
):  # fmt: skip
    """Programs take items heaviest first, one in every `num_programs`: no two differ by more than one item's work."""
    width = tl.arange(0, PADDED_D)
    for item in tl.range(tl.program_id(0), tl.load(counts_ptr), tl.num_programs(0)):
        row = tl.load(items_ptr + 4 * item)
        first = tl.load(items_ptr + 4 * item + 1)
        last = tl.load(items_ptr + 4 * item + 2)
        slot = tl.load(items_ptr + 4 * item + 3)
        b = (row // (heads * rows)).to(tl.int64)
        h = (row // rows % heads).to(tl.int64)
        kv_head = h // group
        tile = row % rows
        tokens = tile * TILE_Q + tl.arange(0, TILE_Q)
        inside = (tokens < q_len)[:, None] & (width < D)[None, :]
        q = tl.load(
            q_ptr + b * q_stride_b + h * q_stride_h + tokens.to(tl.int64)[:, None] * q_stride_s + width[None, :],
            mask=inside, other=0.0,
        )  # fmt: skip

        mask_row = ((b % mask_batch) * mask_heads + h * mask_heads // heads) * mask_rows + tile * TILE_Q // BQ
        full = tl.load(full_num_ptr + mask_row)
        partial = tl.load(partial_num_ptr + mask_row)
        full_list = full_idx_ptr + mask_row * mask_columns
        partial_list = partial_idx_ptr + mask_row * mask_columns
        clear = full  # Full blocks on the causal diagonal, and a last one shorter than the others, need a mask as well;
        if EDGES > 0:  # they stand at the end of the list.
            whole = mask_columns
            if RAGGED:
                whole -= 1
            if CAUSAL:
                whole = tl.minimum(whole, tl.maximum(tile * TILE_Q + kv_len - q_len + 1, 0) // BK)
            place = full - 1 - tl.arange(0, EDGES)
            listed = tl.load(full_list + place, mask=place >= 0, other=-1)
            clear = full - tl.sum((listed >= whole).to(tl.int32), 0)

        if TMA:
            k_base, v_base = k_ptr, v_ptr
        else:
            k_base = k_ptr + b * k_stride_b + kv_head * k_stride_h
            v_base = v_ptr + b * v_stride_b + kv_head * v_stride_h
        rule_q = rule_q_ptr + b * rule_q_stride_b + h * rule_q_stride_h
        rule_k = rule_k_ptr + b * rule_k_stride_b + h * rule_k_stride_h
        acc = tl.zeros([TILE_Q, PADDED_D], tl.float32)
        total = tl.zeros([TILE_Q], tl.float32)
        peak = tl.full([TILE_Q], float("-inf"), tl.float32)
        acc, total, peak = _blocks(
            acc, total, peak, q, tokens, full_list, tl.minimum(first, clear), tl.minimum(last, clear),
            k_base, k_stride_s, v_base, v_stride_s, rule_q, rule_k, b, kv_head, q_len, kv_len, scale_log2,
            radius_squared, FULL, D, PADDED_D, BK, TILE_Q, TILE_K, RULE, AXES, CAUSAL, TMA, PRECISION,
        )  # fmt: skip
        if EDGES > 0:
            acc, total, peak = _blocks(
                acc, total, peak, q, tokens, full_list, tl.maximum(first, clear), tl.minimum(last, full),
                k_base, k_stride_s, v_base, v_stride_s, rule_q, rule_k, b, kv_head, q_len, kv_len, scale_log2,
                radius_squared, EDGE, D, PADDED_D, BK, TILE_Q, TILE_K, RULE, AXES, CAUSAL, TMA, PRECISION,
            )  # fmt: skip
        acc, total, peak = _blocks(
            acc, total, peak, q, tokens, partial_list,
            tl.maximum(first - full, 0), tl.minimum(tl.maximum(last - full, 0), partial),
            k_base, k_stride_s, v_base, v_stride_s, rule_q, rule_k, b, kv_head, q_len, kv_len, scale_log2,
            radius_squared, PARTIAL, D, PADDED_D, BK, TILE_Q, TILE_K, RULE, AXES, CAUSAL, TMA, PRECISION,
        )  # fmt: skip

        seen = total > 0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        lse2 = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        if slot < 0:
            _store(acc, lse2, b, h, heads, tokens, width, inside, q_len,
                   out_ptr, out_stride_b, out_stride_h, out_stride_s, lse_ptr)  # fmt: skip
        else:
            part = slot.to(tl.int64) * TILE_Q + tl.arange(0, TILE_Q)
            tl.store(scratch_ptr + part[:, None] * PADDED_D + width[None, :], acc)
            tl.store(scratch_lse_ptr + part, lse2)


@triton.jit
def _blocks(
    acc, total, peak, q, tokens, list_ptr, first, last,
    k_base, k_stride_s, v_base, v_stride_s, rule_q, rule_k, b, kv_head, q_len, kv_len, scale_log2, radius_squared,
    KIND: tl.constexpr, D: tl.constexpr, PADDED_D: tl.constexpr, BK: tl.constexpr, TILE_Q: tl.constexpr,
    TILE_K: tl.constexpr, RULE: tl.constexpr, AXES: tl.constexpr, CAUSAL: tl.constexpr, TMA: tl.constexpr,
    PRECISION: tl.constexpr,
):  # fmt: skip
    """Online softmax, in powers of two, over the entries [first, last) of a list."""
    width = tl.arange(0, PADDED_D)
    parts: tl.constexpr = BK // TILE_K
    block = tl.load(list_ptr + first, mask=first < last, other=0)
    for step in tl.range(first * parts, last * parts):
        start = block * BK + step % parts * TILE_K
        # the next entry is read early, so that its address is ready when the copy is issued
        block = tl.load(list_ptr + (step + 1) // parts, mask=step + 1 < last * parts, other=0)
        keys = start + tl.arange(0, TILE_K)
        exists = keys < kv_len
        if TMA:
            k = k_base.load([b.to(tl.int32), kv_head.to(tl.int32), start, 0]).reshape(TILE_K, PADDED_D)
            v = v_base.load([b.to(tl.int32), kv_head.to(tl.int32), start, 0]).reshape(TILE_K, PADDED_D)
        else:
            at = keys.to(tl.int64)[:, None]
            k_at, v_at = k_base + at * k_stride_s + width[None, :], v_base + at * v_stride_s + width[None, :]
            if KIND == FULL and PADDED_D == D:
                k, v = tl.load(k_at), tl.load(v_at)
            else:
                there = exists[:, None] & (width < D)[None, :]
                k, v = tl.load(k_at, mask=there, other=0.0), tl.load(v_at, mask=there, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision=PRECISION)
        if KIND == FULL:
            highest = tl.maximum(peak, tl.max(scores, 1) * scale_log2)
            weights = tl.exp2(scores * scale_log2 - highest[:, None])
            decay = tl.exp2(peak - highest)
        else:
            visible = (tokens < q_len)[:, None] & exists[None, :]
            if CAUSAL:
                visible = visible & (keys[None, :] <= tokens[:, None] + (kv_len - q_len))
            if KIND == PARTIAL:
                visible = _ruled(
                    visible, tokens, keys, exists, rule_q, rule_k, q_len, kv_len, radius_squared, RULE, AXES
                )
            scores = tl.where(visible, scores * scale_log2, float("-inf"))
            highest = tl.maximum(peak, tl.max(scores, 1))
            safe = tl.where(highest == float("-inf"), 0.0, highest)  # queries that have seen nothing so far
            weights = tl.exp2(scores - safe[:, None])
            decay = tl.exp2(peak - safe)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision=PRECISION)
        peak = highest
    return acc, total, peak


@triton.jit
def _ruled(
    visible, tokens, keys, exists, rule_q, rule_k, q_len, kv_len, radius_squared,
    RULE: tl.constexpr, AXES: tl.constexpr,
):  # fmt: skip
    """What the table rule of `TokenRule` leaves of `visible` (TILE_Q, TILE_K)."""
    queries = tokens < q_len
    if RULE == 1:
        at = tl.load(rule_k + keys, mask=exists, other=0)
        always = at < 0
        within = visible
        for axis in tl.static_range(AXES):
            at = tl.load(rule_k + axis * kv_len + keys, mask=exists, other=0)
            low = tl.load(rule_q + axis * q_len + tokens, mask=queries, other=0)
            high = tl.load(rule_q + (AXES + axis) * q_len + tokens, mask=queries, other=0)
            within = within & (at[None, :] >= low[:, None]) & (at[None, :] < high[:, None])
        visible = within | (visible & always[None, :])
    if RULE == 2:
        at = tl.load(rule_k + keys, mask=exists, other=0)
        of = tl.load(rule_q + tokens, mask=queries, other=0)
        always = (at < 0)[None, :] | (of < 0)[:, None]
        squared = (of[:, None] - at[None, :]) * (of[:, None] - at[None, :])
        for axis in tl.static_range(1, AXES):
            at = tl.load(rule_k + axis * kv_len + keys, mask=exists, other=0)
            of = tl.load(rule_q + axis * q_len + tokens, mask=queries, other=0)
            squared += (of[:, None] - at[None, :]) * (of[:, None] - at[None, :])
        visible = visible & ((squared < radius_squared) | always)
    return visible


@triton.jit
def _store(
    acc, lse2, b, h, heads, tokens, width, inside, q_len, out_ptr, out_stride_b, out_stride_h, out_stride_s, lse_ptr
):
    at = out_ptr + b * out_stride_b + h * out_stride_h + tokens.to(tl.int64)[:, None] * out_stride_s + width[None, :]
    tl.store(at, acc.to(out_ptr.dtype.element_ty), mask=inside)
    tl.store(lse_ptr + (b * heads + h) * q_len + tokens, lse2 * 0.6931471805599453, mask=tokens < q_len)


@triton.jit
def _merge(
    out_ptr, out_stride_b, out_stride_h, out_stride_s, lse_ptr, scratch_ptr, scratch_lse_ptr, splits_ptr, counts_ptr,
    heads, q_len, rows, D: tl.constexpr, PADDED_D: tl.constexpr, TILE_Q: tl.constexpr,
):  # fmt: skip
    """One program a row that was cut: its pieces, weighted by their share of the softmax denominator."""
    split = tl.program_id(0)
    if split < tl.load(counts_ptr + 1):
        row = tl.load(splits_ptr + 3 * split)
        first = tl.load(splits_ptr + 3 * split + 1)
        pieces = tl.load(splits_ptr + 3 * split + 2)
        b = (row // (heads * rows)).to(tl.int64)
        h = (row // rows % heads).to(tl.int64)
        place, width = tl.arange(0, TILE_Q), tl.arange(0, PADDED_D)
        tokens = row % rows * TILE_Q + place
        acc = tl.zeros([TILE_Q, PADDED_D], tl.float32)
        total = tl.zeros([TILE_Q], tl.float32)
        peak = tl.full([TILE_Q], float("-inf"), tl.float32)
        for number in tl.range(0, pieces):
            at = (first + number).to(tl.int64) * TILE_Q + place
            lse2 = tl.load(scratch_lse_ptr + at)
            highest = tl.maximum(peak, lse2)
            safe = tl.where(highest == float("-inf"), 0.0, highest)
            decay, weight = tl.exp2(peak - safe), tl.exp2(lse2 - safe)
            acc = acc * decay[:, None] + weight[:, None] * tl.load(
                scratch_ptr + at[:, None] * PADDED_D + width[None, :]
            )
            total, peak = total * decay + weight, highest
        seen = total > 0
        acc = acc / tl.where(seen, total, 1.0)[:, None]
        lse2 = tl.where(seen, peak + tl.log2(tl.where(seen, total, 1.0)), float("-inf"))
        inside = (tokens < q_len)[:, None] & (width < D)[None, :]
        _store(acc, lse2, b, h, heads, tokens, width, inside, q_len,
               out_ptr, out_stride_b, out_stride_h, out_stride_s, lse_ptr)  # fmt: skip
