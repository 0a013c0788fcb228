"""Attention over chosen pages as a Triton kernel: each program takes a part of one page list, a second kernel merges.

Memory bound: a token of the list is read once for all query rows that share the list. The parts exist because a batch
of one with eight key heads would leave most of the processors without a list.
"""

# mypy: disable-error-code="no-untyped-def"
# (the parameters of a kernel have no Python types)

from __future__ import annotations

from contextlib import nullcontext

import torch
import triton
import triton.language as tl

TILE_BYTES = 16384  # of keys, and as much of values; two programs with three stages each fit a processor


@triton.jit(do_not_specialize=["capacity", "slots", "part_tokens"])  # they change from token to token
def attend_part(
    query,
    key,
    value,
    pages,
    lengths,
    out,
    lse,
    key_batch,
    key_head,
    key_token,
    value_batch,
    value_head,
    value_token,
    pages_batch,
    pages_list,
    capacity,
    slots,
    part_tokens,
    scale_log2,
    LISTS: tl.constexpr,
    LISTS_PER_HEAD: tl.constexpr,
    ROWS: tl.constexpr,
    WIDTH: tl.constexpr,
    PAGE: tl.constexpr,
    HAS_LENGTHS: tl.constexpr,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_TOKENS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    program = tl.program_id(0).to(tl.int64)  # a cache may hold more than 2**31 elements
    part, parts = tl.program_id(1), tl.num_programs(1)
    batch, index = program // LISTS, program % LISTS
    head = index // LISTS_PER_HEAD
    key += batch * key_batch + head * key_head
    value += batch * value_batch + head * value_head
    pages += batch * pages_batch + index * pages_list
    end = capacity
    if HAS_LENGTHS:
        end = tl.minimum(tl.load(lengths + batch).to(tl.int32), capacity)

    row, column = tl.arange(0, BLOCK_ROWS), tl.arange(0, BLOCK_WIDTH)
    row_offset = program * ROWS + row
    row_mask = (row < ROWS)[:, None] & (column < WIDTH)[None, :]
    q = tl.load(query + row_offset[:, None] * WIDTH + column[None, :], mask=row_mask, other=0.0)

    top = tl.full([BLOCK_ROWS], -float("inf"), tl.float32)
    total = tl.zeros([BLOCK_ROWS], tl.float32)
    acc = tl.zeros([BLOCK_ROWS, BLOCK_WIDTH], tl.float32)
    start = part * part_tokens
    stop = tl.minimum(start + part_tokens, slots * PAGE)
    for first in range(start, stop, BLOCK_TOKENS):
        slot_token = first + tl.arange(0, BLOCK_TOKENS)
        page = tl.load(pages + slot_token // PAGE, mask=slot_token < stop, other=-1).to(tl.int64)
        token = page * PAGE + slot_token % PAGE
        seen = (page >= 0) & (token < end)
        # Loads are masked by what is seen: unused slots of a cache may hold NaN, and 0 * NaN is NaN.
        tile_mask = seen[:, None] & (column < WIDTH)[None, :]
        k = tl.load(key + token[:, None] * key_token + column[None, :], mask=tile_mask, other=0.0)
        v = tl.load(value + token[:, None] * value_token + column[None, :], mask=tile_mask, other=0.0)
        scores = tl.dot(q, tl.trans(k), input_precision="ieee") * scale_log2
        scores = tl.where(seen[None, :], scores, -float("inf"))
        new_top = tl.maximum(top, tl.max(scores, 1))
        base = tl.where(new_top == -float("inf"), 0.0, new_top)  # -inf - -inf is NaN
        weights = tl.exp2(scores - base[:, None])
        decay = tl.exp2(top - base)
        total = total * decay + tl.sum(weights, 1)
        acc = tl.dot(weights.to(v.dtype), v, acc * decay[:, None], input_precision="ieee")
        top = new_top

    divisor = tl.where(total == 0.0, 1.0, total)
    target = row_offset * parts + part
    tl.store(
        out + target[:, None] * WIDTH + column[None, :],
        (acc / divisor[:, None]).to(out.dtype.element_ty),
        mask=row_mask,
    )
    tl.store(lse + target, (top + tl.log2(divisor)) * 0.6931471805599453, mask=row < ROWS)


@triton.jit(do_not_specialize=["parts"])
def merge_parts(
    part_out,
    part_lse,
    out,
    lse,
    parts,
    WIDTH: tl.constexpr,
    ALL_PARTS: tl.constexpr,
    BLOCK_PARTS: tl.constexpr,
    BLOCK_WIDTH: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    every, column = tl.arange(0, ALL_PARTS), tl.arange(0, BLOCK_WIDTH)
    part_lse += row * parts
    part_out += row * parts * WIDTH
    top = tl.max(tl.load(part_lse + every, mask=every < parts, other=-float("inf")), 0)
    base = tl.where(top == -float("inf"), 0.0, top)
    total = 0.0
    acc = tl.zeros([BLOCK_WIDTH], tl.float32)
    for first in range(0, parts, BLOCK_PARTS):
        part = first + tl.arange(0, BLOCK_PARTS)
        weight = tl.exp(tl.load(part_lse + part, mask=part < parts, other=-float("inf")) - base)
        mask = (part < parts)[:, None] & (column < WIDTH)[None, :]
        tile = tl.load(part_out + part[:, None] * WIDTH + column[None, :], mask=mask, other=0.0)
        acc += tl.sum(tile * weight[:, None], 0)
        total += tl.sum(weight, 0)
    divisor = tl.where(total == 0.0, 1.0, total)
    tl.store(out + row * WIDTH + column, (acc / divisor).to(out.dtype.element_ty), mask=column < WIDTH)
    tl.store(lse + row, top + tl.log(divisor))


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
    batches, lists, count, width = rows.shape
    slots = pages.shape[-1]
    pages = pages if pages.stride(-1) == 1 else pages.contiguous()
    sizes = block_sizes(count, width, rows.element_size())
    tile = sizes["BLOCK_TOKENS"]
    parts, part_tokens = split(batches * lists, -(-slots * page_size // tile), rows.device)

    out, lse = torch.empty_like(rows), torch.empty(rows.shape[:3], dtype=torch.float32, device=rows.device)
    part_out, part_lse = out, lse
    if parts > 1:
        part_out = torch.empty(*rows.shape[:3], parts, width, dtype=torch.float32, device=rows.device)
        part_lse = torch.empty(*rows.shape[:3], parts, dtype=torch.float32, device=rows.device)
    with torch.cuda.device(rows.device) if rows.is_cuda else nullcontext():
        attend_part[(batches * lists, parts)](
            rows, key, value, pages, lengths, part_out, part_lse,
            *key.stride()[:3], *value.stride()[:3], *pages.stride()[:2],
            key.shape[2], slots, part_tokens * tile, scale * 1.4426950408889634,
            LISTS=lists, LISTS_PER_HEAD=lists // key.shape[1], ROWS=count, WIDTH=width, PAGE=page_size,
            HAS_LENGTHS=lengths is not None, **sizes,
            **launch_options(count),
        )  # fmt: skip
        if parts > 1:
            merge_parts[(batches * lists * count,)](
                part_out, part_lse, out, lse, parts,
                WIDTH=width, ALL_PARTS=triton.next_power_of_2(parts), BLOCK_PARTS=16, BLOCK_WIDTH=sizes["BLOCK_WIDTH"],
            )  # fmt: skip
    return out, lse


def block_sizes(rows: int, width: int, element_size: int) -> dict[str, int]:
    """Tile sizes for so many query rows per list, head dimension and bytes per element."""
    block_width = max(16, triton.next_power_of_2(width))
    return {
        "BLOCK_ROWS": max(16, triton.next_power_of_2(rows)),
        "BLOCK_TOKENS": min(128, max(16, TILE_BYTES // (block_width * element_size))),
        "BLOCK_WIDTH": block_width,
    }


def launch_options(rows: int) -> dict[str, int]:
    """Warps and pipeline stages for so many query rows per list; up to 64 rows fit the 99 KB of a consumer card."""
    return {"num_warps": 4, "num_stages": 3} if rows <= 32 else {"num_warps": 8, "num_stages": 2}


def split(programs: int, tiles: int, device: torch.device) -> tuple[int, int]:
    """Into how many parts each list is cut, and the tiles of a part; from shapes alone, as a CUDA graph needs it."""
    processors = torch.cuda.get_device_properties(device).multi_processor_count if device.type == "cuda" else 4
    wanted = -(-2 * processors // programs)
    part_tiles = max(1, -(-tiles // wanted))
    return max(1, -(-tiles // part_tiles)), part_tiles
