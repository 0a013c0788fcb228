"""The engine of the grid patterns: blocks cut into boxes, and what separable rules say of a pair of boxes.

A block of consecutive tokens is a union of a few axis-parallel boxes. For a rule that is a conjunction over the axes,
"some pair is visible" and "all pairs are visible" of two boxes are the conjunction of the same statements about their
ranges on each axis, and there are few different ranges. So the work per pair of blocks is a table look-up per axis and
query box, for all key boxes at once: two bits each, packed into one word.

The cutting depends on shapes alone: it is done on the CPU, for the blocks (not their pairs), and copied to the device.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch

from steer_kernels.patterns.layout import Layout

ANY, ALL = 1, 2
WORDS = {4: torch.uint8, 7: torch.int16, 15: torch.int32, 31: torch.int64}  # pairs of bits: type that holds them


@dataclass(frozen=True, eq=False)
class Band:
    """One axis: query x sees the keys in [low[x], high[x]) that differ from x by a multiple of `dilation`.

    Among the x of a residue class neither bound falls, and the windows of neighbours touch: the keys that some query of
    a range sees are then one range, and so are those that all of them see.

    Attributes:
        low, high: (X,) int64, 0 <= low < high <= X, the bounds of x's own residue class: low and high - 1 belong to it.
    """

    low: torch.Tensor
    high: torch.Tensor
    dilation: int = 1

    def sees(self, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
        """(Q, K) uint8 for ranges (Q, 2) and (K, 2): bit ANY if some pair is visible, ALL if no pair is hidden."""
        size, (start, stop), (first, end) = self.low.numel(), query.unbind(-1), key.unbind(-1)
        some = torch.zeros(len(query), len(key), dtype=torch.bool, device=self.low.device)
        for residue in range(self.dilation):
            q, last_q = start + (residue - start) % self.dilation, stop - 1 - (stop - 1 - residue) % self.dilation
            k, last_k = first + (residue - first) % self.dilation, end - 1 - (end - 1 - residue) % self.dilation
            # an empty range lies beyond every window
            low = torch.where(q < stop, self.low[q.clamp(max=size - 1)], size)
            high = torch.where(q < stop, self.high[last_q.clamp(min=0)], 0)
            last_k, k = torch.where(k < end, last_k, -1), torch.where(k < end, k, size)
            some |= (low[:, None] <= last_k) & (k < high[:, None])
        if self.dilation == 1:
            none_hidden = (self.low[stop.clamp(min=1) - 1][:, None] <= first) & (end <= self.high[start][:, None])
        else:  # two neighbours are of different classes, and no key is seen by both
            none_hidden = some & (stop - start == 1)[:, None] & (end - first == 1)
        none_hidden |= (start >= stop)[:, None] | (first >= end)
        return some.to(torch.uint8) * ANY | none_hidden.to(torch.uint8) * ALL

    def scaled(self, times: int, size: int) -> Band:
        """The same for `size` tokens, `times` of them in place of each one (the last: what is left); for dilation 1."""
        low, high = (bound.repeat_interleave(times)[:size] * times for bound in (self.low, self.high))
        return Band(low, high.clamp(max=size))

    def tables(self) -> torch.Tensor:
        """(3, X) int32: low, high and key of a box rule for every coordinate; residue classes have their own ranges."""
        whole, rest = divmod(self.low.numel(), self.dilation)
        at = torch.arange(self.low.numel(), device=self.low.device)
        residue = at % self.dilation
        base = residue * whole + residue.clamp(max=rest)
        inside = torch.stack([self.low // self.dilation, (self.high - 1) // self.dilation + 1, at // self.dilation])
        return (base + inside).int()


def separable(
    layout: Layout, grid: tuple[int, ...], bands: Sequence[Band | None], tile: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nQ, nK) bool: has the pair of blocks a visible pair of visual tokens, and has it a hidden one?

    Args:
        layout: the sequence and its blocks.
        grid: of the visual tokens.
        bands: rule of each axis; None = everything is visible.
        tile: of the token order; None = raster.
    """
    query, key = (boxes(*layout.spans(side), grid, tile) for side in (0, 1))
    word, both = _word(key.shape[1])
    tables = []
    for axis, band in enumerate(bands):
        if band is not None:
            (q, which_q), (k, which_k) = distinct(query[:, :, axis]), distinct(key[:, :, axis])
            sees = band.sees(layout.on_device(q), layout.on_device(k))
            tables.append((_pack(sees, layout.on_device(which_k), word), layout.on_device(which_q)))
    if not tables:
        has_query, has_key = (layout.on_device(cut[:, 0, 0, 1] > 0) for cut in (query, key))
        visible = has_query[:, None] & has_key
        return visible, torch.zeros_like(visible)
    found = torch.zeros(query.shape[0], key.shape[0], dtype=word, device=layout.device)
    for box in range(query.shape[1]):
        seen = torch.full_like(found, both * (ANY | ALL))
        for table, which in tables:
            seen &= table.index_select(0, which[:, box])
        found |= seen ^ (both * ALL)  # from "none hidden" to "some hidden", so that boxes add up by OR
    return (found & (both * ANY)) != 0, (found & (both * ALL)) != 0


def disc(
    layout: Layout, grid: tuple[int, ...], radius_squared: int, tile: tuple[int, ...] | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Like `separable`, for the rule "squared distance < radius_squared": squared distances add up over the axes."""
    query, key = (boxes(*layout.spans(side), grid, tile) for side in (0, 1))
    # both distances share a word: with this bias, the top bit of a half says that a sum has reached the squared radius
    half, word = (15, torch.int32) if radius_squared < 1 << 13 else (31, torch.int64)
    bias, top = (1 << half - 1) - radius_squared, 1 << half - 1
    tables = []
    for axis in (0, 1):
        (q, which_q), (k, which_k) = distinct(query[:, :, axis]), distinct(key[:, :, axis])
        near, far = _squared_distances(layout.on_device(q), layout.on_device(k), radius_squared)
        distances = near.to(word).add_(far.to(word), alpha=1 << half)
        tables.append((distances, layout.on_device(which_q), layout.on_device(which_k)))
    tables[1][0].add_(bias | bias << half)
    outside = torch.full((query.shape[0], key.shape[0]), top, dtype=word, device=layout.device)
    hidden = torch.zeros_like(outside)
    for key_box in range(key.shape[1]):
        columns = [(distances.index_select(1, which_k[:, key_box]), which_q) for distances, which_q, which_k in tables]
        for query_box in range(query.shape[1]):
            first, second = (distances.index_select(0, which[:, query_box]) for distances, which in columns)
            outside &= first.add_(second)
            hidden |= first
    return outside == 0, (hidden & (top << half)) != 0


def boxes(
    start: torch.Tensor, stop: torch.Tensor, grid: tuple[int, ...], tile: tuple[int, ...] | None = None
) -> torch.Tensor:
    """(n, P, A, 2) int64: the places [start, stop) of each block as boxes, (first, end) on each axis.

    P is the largest number of boxes that a block needs. A block that needs fewer has boxes of zeros after its own.
    """
    found = _runs(start, stop, grid) if tile is None else _tiled(start, stop, grid, tile)
    cut = torch.stack(found, 1)
    empty = (cut[..., 0] >= cut[..., 1]).any(-1)
    cut = cut.masked_fill(empty[..., None, None], 0)
    most = max(1, int((~empty).sum(1).max()))
    first = empty.to(torch.uint8).argsort(dim=1, stable=True)[:, :most]
    return cut.gather(1, first[..., None, None].expand(-1, -1, *cut.shape[2:]))


def distinct(ranges: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The different ranges (R, 2) among (..., 2), and which of them each is."""
    base = int(ranges.max()) + 1
    codes, which = torch.unique(ranges[..., 0] * base + ranges[..., 1], return_inverse=True)
    return torch.stack([codes // base, codes % base], -1), which


def _runs(start: torch.Tensor, stop: torch.Tensor, shape: Sequence[int | torch.Tensor]) -> list[torch.Tensor]:
    """Places [start, stop) of a raster as boxes (n, A, 2): a first part of a slice, whole slices, a last part."""
    if len(shape) == 1:
        return [torch.stack([start, stop], -1)[:, None]]
    slice_size = math.prod(shape[1:])
    head, whole, end = start // slice_size, -(-start // slice_size), stop // slice_size
    head_stop = torch.minimum(stop, whole * slice_size)
    tail_stop = torch.where(whole > end, 0, stop - end * slice_size)  # there is only a head inside one slice
    everything = [torch.stack([whole, end], -1)]
    everything += [torch.stack([torch.zeros_like(start), torch.zeros_like(start) + size], -1) for size in shape[1:]]
    return [
        *_in_slice(head, _runs(start - head * slice_size, head_stop - head * slice_size, shape[1:])),
        torch.stack(everything, 1),
        *_in_slice(end, _runs(torch.zeros_like(start), tail_stop, shape[1:])),
    ]


def _in_slice(at: torch.Tensor, found: list[torch.Tensor]) -> list[torch.Tensor]:
    here = torch.stack([at, at + 1], -1)[:, None]
    return [torch.cat([here, box], 1) for box in found]


def _tiled(start: torch.Tensor, stop: torch.Tensor, grid: tuple[int, ...], tile: tuple[int, ...]) -> list[torch.Tensor]:
    """The same in tile order: a part of a first tile, whole tiles, a part of a last tile."""
    counts = tuple(-(-x // t) for x, t in zip(grid, tile, strict=True))
    volume = torch.ones(1, dtype=torch.int64)
    for x, t, count in zip(grid, tile, counts, strict=True):
        sizes = (x - torch.arange(count) * t).clamp(max=t)
        volume = (volume[:, None] * sizes).flatten()
    begins = torch.cat([torch.zeros(1, dtype=torch.int64), volume.cumsum(0)])
    head = (torch.searchsorted(begins, start, right=True) - 1).clamp(max=len(volume) - 1)
    whole, end = torch.searchsorted(begins, start), torch.searchsorted(begins, stop, right=True) - 1
    head_stop = torch.minimum(stop, begins[whole])
    tail_stop = torch.where(whole > end, 0, stop - begins[end])
    tail = end.clamp(max=len(volume) - 1)

    def inside(which: torch.Tensor, first: torch.Tensor, last: torch.Tensor) -> list[torch.Tensor]:
        index, places = which, []
        for count in reversed(counts):
            places.append(index % count)
            index = index // count
        origin = [place * t for place, t in zip(reversed(places), tile, strict=True)]
        shape = [(x - o).clamp(max=t) for x, o, t in zip(grid, origin, tile, strict=True)]
        return [box + torch.stack(origin, -1)[..., None] for box in _runs(first, last, shape)]

    scale, limit = torch.tensor(tile)[:, None], torch.tensor(grid)[:, None]
    return [
        *inside(head, start - begins[head], head_stop - begins[head]),
        *(torch.minimum(box * scale, limit) for box in _runs(whole, end, counts)),
        *inside(tail, torch.zeros_like(start), tail_stop),
    ]


def _word(pairs: int) -> tuple[torch.dtype, int]:
    """A type for that many pairs of bits, and the number with the lower bit of every pair set."""
    for most, word in WORDS.items():
        if pairs <= most:
            return word, sum(1 << 2 * pair for pair in range(pairs))
    raise ValueError(f"a block is cut into {pairs} boxes; at most {max(WORDS)} are supported: use a smaller block")


def _pack(sees: torch.Tensor, which: torch.Tensor, word: torch.dtype) -> torch.Tensor:
    """(Q, nK) words: of a table (Q, K), the two bits of each block's key ranges `which` (nK, P)."""
    packed = torch.zeros(len(sees), len(which), dtype=word, device=sees.device)
    for box in range(which.shape[1]):
        packed |= sees.index_select(1, which[:, box]).to(word) << (2 * box)
    return packed


def _squared_distances(
    query: torch.Tensor, key: torch.Tensor, radius_squared: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """(Q, K) int32: smallest and largest squared distance of two ranges, cut off where the radius is reached.

    An empty range is too far to be visible, and hides nothing.
    """
    far_away = 1 << 20
    (start, stop), (first, end) = (
        (torch.where(low < high, low, far_away).int(), torch.where(low < high, high, -far_away).int())
        for low, high in (query.T, key.T)
    )
    reached = math.isqrt(radius_squared) + 1
    near = torch.maximum((first + 1) - stop[:, None], (start + 1)[:, None] - end).clamp_(0, reached)
    far = torch.maximum((end - 1) - start[:, None], (stop - 1)[:, None] - first).clamp_(0, reached)
    return near.mul_(near), far.mul_(far)
