"""Block mass in plain torch, a tile at a time: no S x S map, and fast where there is no Triton."""

from __future__ import annotations

import math

import torch

from steer_kernels.estimate.reference import accurate, block_max, block_sum, seen_lse, tokens_in_blocks

# numbers in a tile: what stays in the cache of a CPU core, or what fills a GPU
TILE = {"cpu": 2**19}
TILE_ELSEWHERE = 2**26


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: tuple[int, int],
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """See `reference.block_mass`."""
    (batch, heads, q_len, _), kv_len, (bq, bk) = query.shape, key.shape[2], block_size
    offset, dtype = kv_len - q_len, accurate(query)
    lse = seen_lse(lse).to(dtype)[..., None]
    keys = _stacked(key)
    step = _step(query, bq, bk)
    tile = torch.empty(batch * heads * bq * step, dtype=dtype, device=query.device)
    mass = torch.zeros(batch, heads, -(-q_len // bq), -(-kv_len // bk), dtype=dtype, device=query.device)
    for row, first in enumerate(range(0, q_len, bq)):
        last = min(first + bq, q_len)
        queries = _grouped(query[:, :, first:last], keys, scale)
        for start in range(0, min(kv_len, last + offset) if is_causal else kv_len, step):
            stop = min(start + step, kv_len)
            weights = tile[: batch * heads * (last - first) * (stop - start)]
            torch.bmm(queries, keys[:, start:stop].mT, out=weights.view(*queries.shape[:2], stop - start))
            weights = weights.view(batch, heads, last - first, stop - start)
            weights.sub_(lse[:, :, first:last]).exp_()
            if is_causal and stop - 1 > first + offset:
                later = _later(torch.arange(first, last, device=query.device) + offset, start, stop)
                weights.masked_fill_(later, 0.0)
            mass[:, :, row, start // bk : -(-stop // bk)] = block_sum(weights.sum(2), bk)
    return mass / tokens_in_blocks(q_len, bq, query.device)[:, None]


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    """See `reference.column_mass`. Nearly all of the time is spent in `exp`."""
    (batch, heads, q_len, _), (kv_heads, kv_len) = query.shape, key.shape[1:3]
    group, offset, dtype = heads // kv_heads, kv_len - q_len, accurate(query)
    if q_len == 0 or kv_len == 0:
        return torch.zeros(batch, heads, kv_len, dtype=dtype, device=query.device)
    numbers = TILE.get(query.device.type, TILE_ELSEWHERE) // 2
    rows = min(q_len, 256)  # small tiles compute less above the diagonal
    columns = min(kv_len, 256, max(64, 2 ** int(math.log2(max(numbers // (rows * group), 1)))))
    together = max(1, numbers // (rows * group * columns))  # key heads in a tile
    tile = torch.empty(together * group * rows * columns, dtype=dtype, device=query.device)
    mass = torch.zeros(batch * kv_heads, group, kv_len, dtype=dtype, device=query.device)
    keys = key.reshape(batch * kv_heads, kv_len, -1)
    queries = query.reshape(batch * kv_heads, group, q_len, -1)
    lse = seen_lse(lse).reshape(batch * kv_heads, group, q_len, 1)
    if keep is not None:
        keep = keep.expand(batch, heads, q_len, kv_len)
    for head in range(0, batch * kv_heads, together):
        these = slice(head, min(head + together, batch * kv_heads))
        keys_here = keys[these].to(dtype).mT
        for first in range(0, q_len, rows):
            last = min(first + rows, q_len)
            scaled = (queries[these, :, first:last].to(dtype) * scale).flatten(1, 2)
            for start in range(0, min(kv_len, last + offset) if is_causal else kv_len, columns):
                stop = min(start + columns, kv_len)
                seen = None if keep is None else _of_heads(keep[..., first:last, start:stop], these, kv_heads)
                if seen is not None and seen.device.type == "cpu" and not seen.any():
                    continue
                weights = tile[: scaled.shape[0] * scaled.shape[1] * (stop - start)]
                torch.bmm(scaled, keys_here[..., start:stop], out=weights.view(*scaled.shape[:2], stop - start))
                weights = weights.view(-1, group, last - first, stop - start)
                # less than e^-80 does not count, and subnormal results would take 100 times as long
                weights.sub_(lse[these, :, first:last]).clamp_(min=-80.0).exp_()
                if is_causal and stop - 1 > first + offset:
                    weights.tril_(first + offset - start)  # on a CPU many times as fast as a mask
                if seen is not None:
                    weights.masked_fill_(~seen, 0.0)
                mass[these, :, start:stop] += weights.sum(2)
    return mass.view(batch, heads, kv_len)


def block_profile(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    block_size: tuple[int, int],
    threshold: float,
    scale: float,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """See `reference.block_profile`."""
    (batch, heads, q_len, _), kv_len, (bq, bk) = query.shape, key.shape[2], block_size
    dtype, device = accurate(query), query.device
    lse = seen_lse(lse).to(dtype)[..., None]
    keys = _stacked(key)
    step = _step(query, bq, bk)
    shape = batch, heads, -(-q_len // bq), -(-kv_len // bk)
    mass, below, peak = (torch.empty(shape, dtype=dtype, device=device) for _ in range(3))
    for row, first in enumerate(range(0, q_len, bq)):
        last = min(first + bq, q_len)
        queries = _grouped(query[:, :, first:last], keys, scale)
        for start in range(0, kv_len, step):
            stop = min(start + step, kv_len)
            weights = torch.bmm(queries, keys[:, start:stop].mT).view(batch, heads, last - first, stop - start)
            weights.sub_(lse[:, :, first:last]).exp_()
            here = slice(start // bk, -(-stop // bk))
            mass[:, :, row, here] = block_sum(weights.sum(2), bk)
            below[:, :, row, here] = block_sum((weights < threshold).sum(2), bk).to(dtype)
            peak[:, :, row, here] = block_max(weights.amax(2), bk)
    rows, columns = tokens_in_blocks(q_len, bq, device)[:, None], tokens_in_blocks(kv_len, bk, device)
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
    """See `reference.sampled_mass`. A row's mass is the softmax over blocks of their log-sum-exps."""
    (batch, heads, q_len, _), kv_len, n = query.shape, key.shape[2], rows.shape[1]
    dtype, columns = accurate(query), -(-kv_len // key_block)
    position = rows + (kv_len - q_len)
    keys = _stacked(key)
    step = _step(query, n, key_block)
    mass = torch.empty(batch, heads, rows.shape[0], columns, dtype=dtype, device=query.device)
    for row in range(rows.shape[0]):
        queries = _grouped(query.index_select(2, rows[row]), keys, scale)
        parts = []
        for start in range(0, kv_len, step):
            stop = min(start + step, kv_len)
            scores = torch.bmm(queries, keys[:, start:stop].mT).view(batch, heads, n, stop - start)
            if is_causal:
                scores.masked_fill_(_later(position[row], start, stop), -torch.inf)
            # finite also where the row sees none of these keys
            peak = scores.amax(-1, keepdim=True).clamp(min=torch.finfo(dtype).min)
            parts.append(block_sum(scores.sub_(peak).exp_(), key_block).log() + peak)
        counted = exists[row] & (position[row] >= 0) if is_causal else exists[row]
        weights = torch.softmax(torch.cat(parts, -1), -1).masked_fill(~counted[:, None], 0.0)
        mass[:, :, row] = weights.sum(2)
    return mass / exists.sum(-1)[:, None]


def _step(query: torch.Tensor, rows: int, key_block: int) -> int:
    """Keys in a tile: whole blocks, as many as the tile holds for that many rows of all heads."""
    numbers = TILE.get(query.device.type, TILE_ELSEWHERE)
    return max(1, numbers // (query.shape[0] * query.shape[1] * rows * key_block)) * key_block


def _stacked(key: torch.Tensor) -> torch.Tensor:
    """(B * H_kv, S, D). Converted once: every query block reads all of it."""
    return key.to(accurate(key)).flatten(0, 1)


def _grouped(query: torch.Tensor, keys: torch.Tensor, scale: float) -> torch.Tensor:
    """(B, H, rows, D) to (B * H_kv, H / H_kv * rows, D), scaled: the queries that share keys in one product."""
    return (query.to(keys.dtype) * scale).reshape(keys.shape[0], -1, keys.shape[2])


def _later(position: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """(rows, stop - start) bool: keys start, ..., stop - 1 that come after the row's position among the keys."""
    return torch.arange(start, stop, device=position.device) > position[:, None]


def _of_heads(keep: torch.Tensor, these: slice, kv_heads: int) -> torch.Tensor:
    """Rows `these` of (B * H_kv, H / H_kv, ...) from the same mask as (B, H, ...); it may be an expanded one."""
    batch, head = divmod(these.start, kv_heads)
    if these.stop == these.start + 1:
        group = keep.shape[1] // kv_heads
        return keep[batch : batch + 1, head * group : (head + 1) * group]
    return keep.unflatten(1, (kv_heads, -1)).flatten(0, 1)[these]
