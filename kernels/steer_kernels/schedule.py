"""The order of work for a persistent grid: heaviest rows first, very long ones cut into pieces; made on the device."""

from __future__ import annotations

from typing import NamedTuple

import torch

SHORTEST_PIECE = 32  # blocks; below this a row is not worth a merge
WEIGHTS = 32  # rows are sorted into so many classes, so that neighbours, which share keys, stay together


class Schedule(NamedTuple):
    """What each program does, and the rows that are merged afterwards.

    Attributes:
        items: (capacity, 4) int32: row, first and last entry of its list (full blocks, then partial ones), slot of
            the scratch buffer or -1. Row = ((b * H) + h) * tiles + tile.
        splits: (slots, 3) int32: row, first slot, pieces.
        counts: (2,) int32: how many items and splits there are. They never leave the device.
    """

    items: torch.Tensor
    splits: torch.Tensor
    counts: torch.Tensor


def schedule(count: torch.Tensor, tiles_per_block: int, processors: int) -> Schedule:
    """The work on lists of `count` (B, H, nQ) blocks, in rows of query tiles.

    A row is cut where it alone is more than half of a processor's share of the whole: long text rows, or few queries
    over many keys. That bounds the pieces by 4 * processors, so that every shape here is known beforehand and nothing
    waits for the device.
    """
    count = count.repeat_interleave(tiles_per_block, -1).reshape(-1)
    slots = 4 * processors
    piece = (count.sum(dtype=torch.int64) // (2 * processors)).clamp(min=SHORTEST_PIECE)
    pieces = ((count + piece - 1) // piece).clamp(min=1)
    ends = pieces.cumsum(0)

    item = torch.arange(len(count) + slots, device=count.device)
    row = torch.searchsorted(ends, item, right=True).clamp(max=len(count) - 1)
    number = item - (ends - pieces)[row]
    first = number * piece
    last = torch.minimum(first + piece, count[row])
    split = pieces > 1
    first_slot = torch.where(split, pieces, 0).cumsum(0) - torch.where(split, pieces, 0)
    slot = torch.where(split[row], first_slot[row] + number, -1)
    exists = item < ends[-1]
    weight = torch.where(exists, (last - first) * WEIGHTS // (last - first).amax().clamp(min=1), -1)
    items = torch.stack([row, first, last, slot], 1)[weight.argsort(descending=True, stable=True)]

    cut = split.argsort(descending=True, stable=True)[:slots]
    splits = torch.stack([cut, first_slot[cut], pieces[cut]], 1)
    return Schedule(items.int(), splits.int(), torch.stack([ends[-1], split.sum()]).int())
