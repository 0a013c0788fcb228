"""Block-sparse attention for a CPU: the kept key blocks of several query blocks are copied side by side into a small
buffer that stays in the cache, and torch's fused attention runs over them with the query blocks as its heads."""

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
    batch, heads, q_len, width = query.shape
    (bq, bk), kv_heads, value_width = mask.block_size, key.shape[1], value.shape[-1]
    # Query heads that share keys and lists become one taller block: fewer copies, larger matrix products.
    alike = mask.shape[1] in (1, kv_heads) and (mask.rule is None or mask.rule.batch_heads[1] == 1)
    fold = heads // kv_heads if alike else 1
    queries, keys, values = _blocks(query, bq, fold), _blocks(key, bk), _blocks(value, bk)
    rows = _Rows(mask, batch, heads // fold, kv_heads)
    capacity = max(BUFFER_BYTES // (bk * max(width, fold * bq) * keys.element_size()), rows.longest)
    key_buffer = _buffers.of("keys", keys, capacity * bk * width).view(capacity, -1)
    value_buffer = _buffers.of("values", values, capacity * bk * value_width).view(capacity, -1)

    out = query.new_empty(len(queries), fold * bq, value_width)
    lse = query.new_empty(len(queries), fold * bq, dtype=torch.promote_types(query.dtype, torch.float32))
    for chunk in rows.chunks(capacity):
        blocks, bias, seen = rows.gather(chunk)
        some_keys, some_values = key_buffer[: len(blocks)], value_buffer[: len(blocks)]
        torch.index_select(keys, 0, blocks, out=some_keys)
        torch.index_select(values, 0, blocks, out=some_values)
        if bias is not None:  # a mask of another type would be misread, without an error
            bias = (
                bias.to(query.dtype)[:, None].expand(-1, fold if bias.shape[1] > 1 else 1, -1, -1).flatten(1, 2)[None]
            )
        count = len(chunk.rows)
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[chunk.place].view(1, count, fold * bq, width),
            some_keys.view(1, count, -1, width),
            some_values.view(1, count, -1, value_width),
            attn_mask=bias,
            scale=scale,
        )
        out[chunk.place] = part[0]
        lse[chunk.place] = part_lse[0] if seen is None else part_lse[0].masked_fill(~seen.repeat(1, fold), -torch.inf)
    if rows.some_empty:
        out[rows.empty], lse[rows.empty] = 0, -torch.inf
    return _whole(out, batch, heads, bq, fold)[:, :, :q_len], _whole(lse, batch, heads, bq, fold)[:, :, :q_len]


class _Buffers(threading.local):
    """Scratch memory of each thread, kept from call to call: fresh pages would cost as much as a tenth of the work."""

    def __init__(self) -> None:
        self.kept: dict[tuple[str, torch.dtype], torch.Tensor] = {}

    def of(self, what: str, like: torch.Tensor, size: int) -> torch.Tensor:
        """(size,) uninitialised, of the type of `like`."""
        if (what, like.dtype) not in self.kept or len(self.kept[what, like.dtype]) < size:
            self.kept[what, like.dtype] = like.new_empty(size)
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
    """Rows that share a call; each takes `masked` masked and `clear` unmasked blocks, the shorter ones with padding."""

    rows: torch.Tensor
    place: torch.Tensor | slice
    masked: int
    clear: int
    padded: bool


class _Rows:
    """The lists of every (batch row, head, query block), in order; the masked blocks of a row come first."""

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
        self.batch, self.head, self.block = (
            row // (heads * self.blocks_q),
            row // self.blocks_q % heads,
            row % self.blocks_q,
        )
        # Full blocks on the causal diagonal, and a last one that is shorter than the others, are masked as well.
        clear = torch.full_like(row, self.blocks_k - (mask.kv_len % mask.block_size[1] > 0))
        if mask.causal:
            first_query = self.block * mask.block_size[0] + mask.kv_len - mask.q_len
            clear = torch.minimum(clear, (first_query + 1).clamp(min=0) // mask.block_size[1])
        listed = torch.arange(self.blocks_k) < full_num[:, None]
        self.clear = (listed & (self.full_idx < clear[:, None])).sum(1, dtype=torch.int32)
        self.masked = self.partial_num + full_num - self.clear
        self.count = self.clear + self.masked
        self.longest, self.empty = max(int(self.count.max()), 1), self.count == 0
        self.some_empty = bool(self.empty.any())
        self.first_key = (self.batch * kv_heads + self.head // (heads // kv_heads)) * self.blocks_k
        self.full_at = self.full_idx + self.first_key[:, None]

    def chunks(self, capacity: int) -> Iterator[_Chunk]:
        """Rows alike in their counts, few enough for the buffer."""
        order = ((self.masked > 0) * (2 * self.blocks_k) + self.count).argsort(descending=True, stable=True)
        order = order[: len(order) - int(self.empty.sum())]
        kinds, lengths = torch.stack([self.masked[order], self.clear[order]], 1).unique_consecutive(
            dim=0, return_counts=True
        )
        at, start, work, most_masked, most_clear = 0, 0, 0, 0, 0
        for (masked, clear), length in zip(kinds.tolist(), lengths.tolist(), strict=True):
            end = at + length
            while at < end:
                wide = max(most_masked, masked) + max(most_clear, clear)
                more = self._more(at - start, work, wide, masked + clear, capacity)
                if at > start and (more < 1 or bool(masked) != bool(most_masked)):
                    yield self._chunk(order[start:at], most_masked, most_clear, work)
                    start, work, most_masked, most_clear = at, 0, 0, 0
                    continue
                taken = min(end - at, max(more, 1))
                at, work = at + taken, work + taken * (masked + clear)
                most_masked, most_clear = max(most_masked, masked), max(most_clear, clear)
        if start < at:
            yield self._chunk(order[start:at], most_masked, most_clear, work)

    @staticmethod
    def _more(rows: int, work: int, wide: int, count: int, capacity: int) -> int:
        """How many rows of `count` blocks may join `rows` of `work` blocks in a call that is `wide` blocks wide."""
        waste = wide - (1 + PADDING) * count
        allowed = ((1 + PADDING) * work - rows * wide) / waste if waste > 0 else capacity
        return int(min(allowed, capacity // wide - rows))

    @staticmethod
    def _chunk(rows: torch.Tensor, masked: int, clear: int, work: int) -> _Chunk:
        first, last, alike = int(rows[0]), int(rows[-1]), len(rows) * (masked + clear) == work
        neighbours = alike and last - first == len(rows) - 1  # rows of one kind are in ascending order
        return _Chunk(rows, slice(first, last + 1) if neighbours else rows, masked, clear, not alike)

    def gather(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Key blocks of these rows, one list after the other; additive mask (rows, bq or 1, tokens); and queries
        (rows, bq) that see any key. The mask is None where nothing has to be masked, the last where all see some."""
        if not chunk.masked and not chunk.padded:
            return self.full_at[chunk.place, : chunk.clear].flatten(), None, None
        rows, (bq, bk) = chunk.rows, self.mask.block_size
        full = self.full_idx[rows, : chunk.clear]
        # the partial blocks, then the full ones that are masked all the same
        place, partial = torch.arange(chunk.masked), self.partial_num[rows, None]
        at_edge = place >= partial
        edge = (self.clear[rows, None] + place - partial).clamp(0, self.blocks_k - 1).long()
        masked = torch.where(at_edge, self.full_idx[rows].gather(1, edge), self.partial_idx[rows, : chunk.masked])
        blocks = (torch.cat([masked, full], 1) + self.first_key[rows, None]).flatten()
        listed = (
            (place < self.masked[rows, None]).repeat_interleave(bk, 1)[:, None],
            (torch.arange(chunk.clear) < self.clear[rows, None]).repeat_interleave(bk, 1)[:, None],
        )
        k = (masked[:, :, None] * bk + torch.arange(bk)).flatten(1)[:, None]
        visible = listed[0] & (k < self.mask.kv_len)
        if self.mask.rule is None and not self.mask.causal:
            return blocks, _bias(visible, listed[1]), None
        q = self.block[rows, None, None] * bq + torch.arange(bq)[:, None]
        if self.mask.causal:
            visible = visible & (k <= q + (self.mask.kv_len - self.mask.q_len))
        if self.mask.rule is not None:
            at = (self.batch[rows, None, None], self.head[rows, None, None])
            seen = self.mask.rule(*at, q.clamp(max=self.mask.q_len - 1), k.clamp(max=self.mask.kv_len - 1))
            visible = visible & (seen | at_edge.repeat_interleave(bk, 1)[:, None])
        seen = visible.any(-1) | (self.clear[rows, None] > 0)
        if bool(seen.all()):
            return blocks, _bias(visible, listed[1].expand(-1, bq, -1)), None
        return blocks, _bias(visible, listed[1].expand(-1, bq, -1)), seen


def _bias(*visible: torch.Tensor) -> torch.Tensor:
    """(rows, bq or 1, tokens) additive mask from the boolean masks of neighbouring keys."""
    seen = torch.cat(visible, -1)
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
