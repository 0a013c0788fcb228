"""Block-sparse attention for a CPU: the kept key blocks of several query blocks are copied side by side into a small
buffer that stays in the cache, and torch's fused attention runs over them with the query blocks as its heads.

Blocks in which tokens are hidden go through the same in a second pass, with a mask, and are merged by log-sum-exp.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steer_kernels.block_mask import BlockMask, broadcast_heads

BUFFER_BYTES = 4 << 20  # of gathered keys, or of scores if those are more
PADDING = 1 / 16  # rows of unequal length share a call while at most this part of it is padding


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, S_q, D) and natural log-sum-exp (B, H, S_q) in fp32 (fp64 for fp64)."""
    (batch, heads, q_len, width), dtype = query.shape, query.dtype
    (bq, bk), kv_heads, value_width = mask.block_size, key.shape[1], value.shape[-1]
    # Query heads that share keys and lists become one taller block: fewer copies, larger matrix products.
    alike = mask.shape[1] in (1, kv_heads) and (mask.rule is None or mask.rule.batch_heads[1] == 1)
    fold = heads // kv_heads if alike else 1
    exact = torch.promote_types(query.dtype, torch.float32)  # 16-bit parts would be rounded once before they are merged
    query, key, value = query.to(exact), key.to(exact), value.to(exact)
    queries, keys, values = _blocks(query, bq, fold), _blocks(key, bk), _blocks(value, bk)
    rows = _Rows(mask, batch, heads // fold, kv_heads)
    capacity = max(BUFFER_BYTES // (bk * max(width, fold * bq) * keys.element_size()), rows.longest)
    key_buffer = _buffers.of("keys", keys, capacity * bk * width).view(capacity, -1)
    value_buffer = _buffers.of("values", values, capacity * bk * value_width).view(capacity, -1)

    out = query.new_empty(len(queries), fold * bq, value_width)
    lse = query.new_empty(len(queries), fold * bq)
    if rows.some_not_clear:
        out[rows.clear == 0], lse[rows.clear == 0] = 0, -torch.inf
    for masked in (False, True):
        for chunk in rows.chunks(rows.masked if masked else rows.clear, capacity):
            blocks, visible = rows.gather_masked(chunk) if masked else rows.gather(chunk)
            some_keys, some_values = key_buffer[: len(blocks)], value_buffer[: len(blocks)]
            torch.index_select(keys, 0, blocks, out=some_keys)
            torch.index_select(values, 0, blocks, out=some_values)
            count = len(chunk.rows)
            # with a mask the folded heads stay heads, which share it; without, they are rows of a larger product
            beside = 1 if visible is None else fold
            part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
                queries[chunk.place].view(count, beside, -1, width),
                some_keys.view(count, 1, -1, width).expand(-1, beside, -1, -1),
                some_values.view(count, 1, -1, value_width).expand(-1, beside, -1, -1),
                attn_mask=None if visible is None else _bias(visible, query.dtype).expand(-1, beside, -1, -1),
                scale=scale,
            )
            part, part_lse = part.reshape(count, fold * bq, -1), part_lse.reshape(count, -1)
            if masked:
                unseen = ~visible.any(-1).expand(-1, bq).repeat(1, fold) if visible is not None else None
                part_lse = part_lse if unseen is None else part_lse.masked_fill(unseen, -torch.inf)
                part, part_lse = _merged(out[chunk.place], lse[chunk.place], part, part_lse)
            out[chunk.place], lse[chunk.place] = part, part_lse
    out, lse = (_whole(x, batch, heads, bq, fold)[:, :, :q_len] for x in (out, lse))
    return out.to(dtype), lse


def _merged(
    out: torch.Tensor, lse: torch.Tensor, part: torch.Tensor, part_lse: torch.Tensor
) -> tuple[torch.Tensor, torch.Tensor]:
    whole = torch.logaddexp(lse, part_lse)
    base = whole.nan_to_num(neginf=0.0)
    return torch.exp(lse - base)[..., None] * out + torch.exp(part_lse - base)[..., None] * part, whole


class _Buffers(threading.local):
    """Scratch memory of each thread, kept from call to call: fresh pages would cost as much as a tenth of the work."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def of(self, what: str, like: torch.Tensor, size: int) -> torch.Tensor:
        """(size,) uninitialised, of the type of `like`."""
        if (what, like.dtype) not in self.kept or len(self.kept[what, like.dtype]) < size:
            with torch.inference_mode(False):  # or it could not be written to outside inference mode
                self.kept[what, like.dtype] = torch.empty(size, dtype=like.dtype)
        return self.kept[what, like.dtype][:size]


_buffers = _Buffers()


def _blocks(x: torch.Tensor, size: int, fold: int = 1) -> torch.Tensor:
    """(B, H, S, D) as one row per block, (B * H/fold * blocks, fold * size * D); zeros fill up the last block."""
    missing = -x.shape[2] % size
    x = F.pad(x, (0, 0, 0, missing)) if missing else x
    if fold > 1:
        x = x.unflatten(2, (-1, size)).unflatten(1, (-1, fold)).transpose(2, 3)
    return x.reshape(-1, fold * size * x.shape[-1])


def _whole(blocks: torch.Tensor, batch: int, heads: int, size: int, fold: int) -> torch.Tensor:
    """The inverse of `_blocks`, for (rows, fold * size) or (rows, fold * size, D): (B, H, S, ...)."""
    x = blocks.unflatten(1, (fold, size)).unflatten(0, (batch, heads // fold, -1))
    return x.transpose(2, 3).flatten(3, 4).flatten(1, 2) if fold > 1 else x.flatten(2, 4)


@dataclass
class _Chunk:
    """Rows that share a call of `count` blocks each; the shorter ones are padded."""

    rows: torch.Tensor
    place: torch.Tensor | slice
    count: int
    padded: bool


class _Rows:
    """The lists of every (batch row, head, query block), in order."""

    def __init__(self, mask: BlockMask, batch: int, heads: int, kv_heads: int) -> None:
        self.mask, (self.blocks_q, self.blocks_k) = mask, mask.shape[-2:]

        def each(lists: torch.Tensor) -> torch.Tensor:
            expanded = broadcast_heads(lists, heads).expand(batch, *[-1] * (lists.ndim - 1))
            return expanded.reshape(-1, *lists.shape[3:])

        self.full_idx, self.partial_idx, self.partial_num = (
            each(lists) for lists in (mask.full_idx, mask.partial_idx, mask.partial_num)
        )
        full_num = each(mask.full_num)
        row = torch.arange(len(full_num))
        self.batch, self.head = row // (heads * self.blocks_q), row // self.blocks_q % heads
        self.block = row % self.blocks_q
        # Full blocks on the causal diagonal, and a last one that is shorter than the others, are masked as well.
        clear = torch.full_like(row, self.blocks_k - (mask.kv_len % mask.block_size[1] > 0))
        if mask.causal:
            first_query = self.block * mask.block_size[0] + mask.kv_len - mask.q_len
            clear = torch.minimum(clear, (first_query + 1).clamp(min=0) // mask.block_size[1])
        listed = torch.arange(self.blocks_k) < full_num[:, None]
        self.clear = (listed & (self.full_idx < clear[:, None])).sum(1)
        self.masked = self.partial_num + full_num - self.clear
        self.some_not_clear = bool((self.clear == 0).any())
        self.longest = max(int(self.clear.max()), int(self.masked.max()), 1)
        self.first_key = (self.batch * kv_heads + self.head // (heads // kv_heads)) * self.blocks_k
        self.full_at = self.full_idx + self.first_key[:, None]

    def chunks(self, counts: torch.Tensor, capacity: int) -> Iterator[_Chunk]:
        """Rows of similar `counts`, few enough for the buffer, the longest first; rows of no block are left out."""
        order = counts.argsort(descending=True, stable=True)[: int((counts > 0).sum())]
        kinds, lengths = counts[order].unique_consecutive(return_counts=True)
        at, start, work, widest = 0, 0, 0, 0
        for count, length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            end = at + length
            while at < end:
                widest = max(widest, count)
                waste = widest - (1 + PADDING) * count
                allowed = ((1 + PADDING) * work - (at - start) * widest) / waste if waste > 0 else capacity
                more = min(end - at, int(allowed), capacity // widest - (at - start))
                if at > start and more < 1:
                    yield _chunk(order[start:at], widest, work)
                    start, work, widest = at, 0, 0
                else:
                    at, work = at + max(more, 1), work + max(more, 1) * count
        if start < at:
            yield _chunk(order[start:at], widest, work)

    def gather(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor | None]:
        """Blocks of the rows that need no mask, one list after the other, and (rows, 1, tokens) what is no padding."""
        blocks = self.full_at[chunk.place, : chunk.count].flatten()
        if not chunk.padded:
            return blocks, None
        listed = torch.arange(chunk.count) < self.clear[chunk.place, None]
        return blocks, listed.repeat_interleave(self.mask.block_size[1], 1)[:, None]

    def gather_masked(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor]:
        """Blocks of the rows in which tokens are hidden, and the visible ones, (rows, bq or 1, tokens) bool."""
        rows, (bq, bk), kv_len = chunk.rows, self.mask.block_size, self.mask.kv_len
        # the partial blocks, then the full ones that are masked all the same
        place, partial = torch.arange(chunk.count), self.partial_num[rows, None]
        at_edge = place >= partial
        edge = (self.clear[rows, None] + place - partial).clamp(0, self.blocks_k - 1)
        blocks = torch.where(at_edge, self.full_idx[rows].gather(1, edge), self.partial_idx[rows, : chunk.count])
        k = (blocks[:, :, None] * bk + torch.arange(bk, dtype=torch.int32)).flatten(1)[:, None]
        visible = (k < kv_len) & (place < self.masked[rows, None]).repeat_interleave(bk, 1)[:, None]
        q = (self.block[rows, None, None] * bq + torch.arange(bq)[:, None]).int()
        if self.mask.causal:
            visible = visible & (k <= q + (kv_len - self.mask.q_len))
        if self.mask.rule is not None:
            at = (self.batch[rows, None, None], self.head[rows, None, None])
            seen = self.mask.rule(*at, q.clamp(max=self.mask.q_len - 1), k.clamp(max=kv_len - 1))
            visible = visible & (seen | at_edge.repeat_interleave(bk, 1)[:, None])
        return (blocks + self.first_key[rows, None]).flatten(), visible


def _chunk(rows: torch.Tensor, count: int, work: int) -> _Chunk:
    first, last, alike = int(rows[0]), int(rows[-1]), len(rows) * count == work
    neighbours = alike and last - first == len(rows) - 1  # rows of one count are in ascending order
    return _Chunk(rows, slice(first, last + 1) if neighbours else rows, count, not alike)


def _bias(visible: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """(rows, 1, bq or 1, tokens) additive mask. Of another type than the queries it would be misread, silently."""
    return torch.where(visible, 0.0, -torch.inf).to(dtype)[:, None]
