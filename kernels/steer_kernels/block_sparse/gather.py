"""Block-sparse attention for a CPU: the kept key blocks of several query blocks are copied side by side into a small
buffer that stays in the cache, and torch's fused attention runs over them with the query blocks as its heads."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from steer_kernels.block_mask import BlockMask, broadcast_heads

BUFFER_BYTES = 2 << 20  # of gathered keys: keys and values together fill the second-level cache of a core
PADDING = 1 / 8  # rows of unequal length share a call while at most this part of it is padding


def forward(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask, scale: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Output (B, H, S_q, D) and natural log-sum-exp (B, H, S_q) in fp32 (fp64 for fp64)."""
    batch, heads, q_len, width = query.shape
    bq, bk = mask.block_size
    queries, keys, values = _blocks(query, bq), _blocks(key, bk), _blocks(value, bk)
    rows = _Rows(mask, batch, heads, key.shape[1])
    capacity = max(BUFFER_BYTES // (keys.shape[1] * keys.element_size()), rows.longest)
    key_buffer, value_buffer = keys.new_empty(capacity, keys.shape[1]), values.new_empty(capacity, values.shape[1])

    out = query.new_empty(len(queries), bq, value.shape[-1])
    lse = query.new_empty(len(queries), bq, dtype=torch.promote_types(query.dtype, torch.float32))
    out[rows.empty], lse[rows.empty] = 0, -torch.inf
    for chunk in rows.chunks(capacity):
        blocks, bias, seen = rows.gather(chunk)
        torch.index_select(keys, 0, blocks, out=key_buffer[: len(blocks)])
        torch.index_select(values, 0, blocks, out=value_buffer[: len(blocks)])
        part, part_lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            queries[chunk.rows].view(1, -1, bq, width),
            key_buffer[: len(blocks)].view(1, len(chunk.rows), -1, width),
            value_buffer[: len(blocks)].view(1, len(chunk.rows), -1, value.shape[-1]),
            attn_mask=None if bias is None else bias.to(query.dtype),  # another type is misread, without an error
            scale=scale,
        )
        out[chunk.rows] = part[0]
        lse[chunk.rows] = part_lse[0] if seen is None else part_lse[0].masked_fill(~seen, -torch.inf)
    return (
        out.view(batch, heads, -1, value.shape[-1])[:, :, :q_len],
        lse.view(batch, heads, -1)[:, :, :q_len],
    )


def _blocks(x: torch.Tensor, size: int) -> torch.Tensor:
    """(B, H, S, D) as one row per block, (B*H*blocks, size*D), the last block filled up with zeros."""
    missing = -x.shape[2] % size
    return (F.pad(x, (0, 0, 0, missing)) if missing else x).reshape(-1, size * x.shape[3])


@dataclass
class _Chunk:
    """Rows that share a call; each takes `masked` masked and `clear` unmasked blocks, the shorter ones with padding."""

    rows: torch.Tensor
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
        self.first_key = (self.batch * kv_heads + self.head // (heads // kv_heads)) * self.blocks_k

    def chunks(self, capacity: int) -> Iterator[_Chunk]:
        """Rows alike in their counts, few enough for the buffer."""
        order = ((self.masked > 0) * (2 * self.blocks_k) + self.count).argsort(descending=True, stable=True)
        order = order[: len(order) - int(self.empty.sum())]
        masked, clear = self.masked[order].tolist(), self.clear[order].tolist()
        start, work, most_masked, most_clear = 0, 0, 0, 0
        for i, (m, c) in enumerate(zip(masked, clear, strict=True)):
            size = (i - start + 1) * (max(most_masked, m) + max(most_clear, c))
            too_much = size > min(capacity, (1 + PADDING) * (work + m + c))
            if i > start and (too_much or bool(m) != bool(most_masked)):
                yield _Chunk(order[start:i], most_masked, most_clear, (i - start) * (most_masked + most_clear) > work)
                start, work, most_masked, most_clear = i, 0, 0, 0
            work, most_masked, most_clear = work + m + c, max(most_masked, m), max(most_clear, c)
        if work:
            size = (len(order) - start) * (most_masked + most_clear)
            yield _Chunk(order[start:], most_masked, most_clear, size > work)

    def gather(self, chunk: _Chunk) -> tuple[torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
        """Key blocks of these rows, one list after the other; additive mask (1, rows, bq or 1, tokens); and queries
        (rows, bq) that see any key. The mask is None where nothing has to be masked, the last where all see some."""
        rows, (bq, bk) = chunk.rows, self.mask.block_size
        full = self.full_idx[rows, : chunk.clear]
        if not chunk.masked and not chunk.padded:
            return (full + self.first_key[rows, None]).flatten(), None, None

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
        return blocks, _bias(visible, listed[1].expand(-1, bq, -1)), visible.any(-1) | (self.clear[rows, None] > 0)


def _bias(*visible: torch.Tensor) -> torch.Tensor:
    """(1, rows, bq or 1, tokens) additive mask from the boolean masks of neighbouring keys."""
    seen = torch.cat(visible, -1)
    return torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)[None]
