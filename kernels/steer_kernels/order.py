"""Token orders: permutations that put tokens which attend to one another into the same blocks, and their inverses."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch


@dataclass(frozen=True, eq=False)
class TokenOrder:
    """A permutation of a sequence. Rotary tables have to be permuted like the tokens they belong to.

    Attributes:
        name: what `BlockMask.order` says of lists that were built for this order.
        to_ordered: (S,) int64; place i of the order holds token `to_ordered[i]` of the original sequence.
        to_raster: (S,) int64, the inverse; token j of the original sequence is at place `to_raster[j]`.
    """

    name: str
    to_ordered: torch.Tensor
    to_raster: torch.Tensor

    def apply(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """`x` with its tokens, along `dim`, put into this order."""
        return x.index_select(dim, self.to_ordered)

    def undo(self, x: torch.Tensor, dim: int) -> torch.Tensor:
        """The inverse of `apply`, bit for bit."""
        return x.index_select(dim, self.to_raster)

    def to(self, device: torch.device | str) -> TokenOrder:
        return TokenOrder(self.name, self.to_ordered.to(device), self.to_raster.to(device))


def tiles(
    grid: Sequence[int],
    tile: Sequence[int],
    *,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> TokenOrder:
    """Tile after tile in raster order, and raster order inside a tile; tiles at the far edges may be smaller.

    Args:
        grid: tokens on each axis, e.g. (T, H, W).
        tile: tokens of a tile on each axis.
        text_tokens: tokens that are not on the grid; they keep their places.
        text_first: whether they come before the grid or after it.
        device: of the tables.

    Raises:
        ValueError: no grid, or a tile that does not fit it.

    Source: sliding tiles, arXiv 2502.04507; token permutation of Generalized Neighborhood Attention, arXiv 2504.16922.
    """
    grid, tile = check_grid(grid), tuple(tile)
    if len(tile) != len(grid) or any(not 1 <= t <= x for t, x in zip(tile, grid, strict=True)):
        raise ValueError(f"tile={tile} does not fit the grid {grid}: one number from 1 to the grid's size per axis")
    before: torch.Tensor | int = 0
    inside: torch.Tensor | int = 0
    volume: torch.Tensor | int = 1
    for axis, at in enumerate(_along_axes(grid, device)):
        origin = at // tile[axis] * tile[axis]
        size = (grid[axis] - origin).clamp(max=tile[axis])
        before = before + origin * volume * math.prod(grid[axis + 1 :])
        inside = inside * size + (at - origin)
        volume = volume * size
    places = torch.as_tensor(before + inside).reshape(-1)
    to_ordered = torch.empty_like(places).scatter_(0, places, torch.arange(len(places), device=device))
    return _with_text("tiles " + "x".join(map(str, tile)), to_ordered, text_tokens, text_first)


def axes(
    grid: Sequence[int],
    order: str,
    *,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> TokenOrder:
    """The raster of permuted axes: "HWT" walks through time fastest, "THW" is the original order.

    With the frame axis written T, PAROAttention's six permutations are THW, TWH, HWT, HTW, WHT and WTH, and
    Sparse-vDiT's multi-diagonal order is HWT.

    Args:
        grid: (T, H, W), or (H, W) for an image.
        order: the letters of the grid's axes, the slowest first.
        text_tokens, text_first, device: see `tiles`.

    Raises:
        ValueError: no grid, or letters that are not its axes.

    Source: arXiv 2506.16054 (PAROAttention), arXiv 2506.03065 (Sparse-vDiT).
    """
    grid = check_grid(grid)
    letters = "THW"[-len(grid) :]
    if sorted(order) != sorted(letters):
        raise ValueError(f"order={order!r} must be a permutation of {letters!r} for the grid {grid}")
    raster = torch.arange(math.prod(grid), device=device)
    to_ordered = raster.view(grid).permute([letters.index(letter) for letter in order]).reshape(-1)
    return _with_text(f"axes {order}", to_ordered, text_tokens, text_first)


def hilbert(
    grid: Sequence[int],
    *,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> TokenOrder:
    """Along a Hilbert curve: a run of consecutive tokens is a compact region of the grid.

    The curve is that of the next power-of-two cube, restricted to the grid. Inside such a cube consecutive tokens are
    direct neighbours; elsewhere a few steps (0.3 % of them at 32 x 45 x 80) are longer, where the curve leaves the grid
    and comes back.

    Args:
        grid: (T, H, W) or (H, W); (W,) stays as it is.
        text_tokens, text_first, device: see `tiles`.

    Raises:
        ValueError: no grid.

    Source: J. Skilling, "Programming the Hilbert curve", AIP Conference Proceedings 707 (2004).
    """
    grid = check_grid(grid)
    distance = _along_the_curve(coordinates(grid, device), (max(grid) - 1).bit_length())
    return _with_text("hilbert", distance.argsort(), text_tokens, text_first)


def _along_the_curve(cells: torch.Tensor, bits: int) -> torch.Tensor:
    """Distance of `cells` (A, S) from the start of the Hilbert curve through a cube of 2^bits cells per axis."""
    at = list(cells)
    # from the largest cells to the smallest: undo the reflection or the exchange of axes that each cell's curve has
    for bit in reversed(range(1, bits)):
        below = (1 << bit) - 1
        for axis in range(len(at)):
            reflected = (at[axis] >> bit & 1).bool()
            exchange = torch.where(reflected, 0, (at[0] ^ at[axis]) & below)
            at[0] = torch.where(reflected, at[0] ^ below, at[0] ^ exchange)
            if axis:
                at[axis] = at[axis] ^ exchange
    # what remains counts in Gray code, one bit of every axis after the other
    for axis in range(1, len(at)):
        at[axis] = at[axis] ^ at[axis - 1]
    flips = torch.zeros_like(at[0])
    for bit in range(1, bits):
        flips = flips ^ (at[-1] >> bit & 1) * ((1 << bit) - 1)
    distance = torch.zeros_like(at[0])
    for bit in reversed(range(bits)):
        for axis in at:
            distance = distance << 1 | ((axis ^ flips) >> bit & 1)
    return distance


def coordinates(grid: Sequence[int], device: torch.device | str = "cpu") -> torch.Tensor:
    """(A, S) int64: the coordinates of every token of a grid in raster order."""
    return torch.stack([at.expand(*grid) for at in _along_axes(grid, device)]).flatten(1)


def _along_axes(grid: Sequence[int], device: torch.device | str) -> list[torch.Tensor]:
    """The coordinates on every axis, so shaped that they broadcast over the grid."""
    shapes = [[-1 if other == axis else 1 for other in range(len(grid))] for axis in range(len(grid))]
    return [torch.arange(size, device=device).view(shape) for size, shape in zip(grid, shapes, strict=True)]


def check_grid(grid: Sequence[int]) -> tuple[int, ...]:
    if not 1 <= len(grid) <= 3 or any(size < 1 for size in grid):
        raise ValueError(f"grid={tuple(grid)} must be (T, H, W), (H, W) or (W,), each at least 1")
    return tuple(grid)


def _with_text(name: str, to_ordered: torch.Tensor, text_tokens: int, text_first: bool) -> TokenOrder:
    if text_tokens < 0:
        raise ValueError(f"text_tokens={text_tokens} must be 0 or more")
    visual, device = to_ordered.numel(), to_ordered.device
    text = torch.arange(text_tokens, device=device)
    to_ordered = torch.cat([text, to_ordered + text_tokens] if text_first else [to_ordered, text + visual])
    to_raster = torch.empty_like(to_ordered)
    to_raster.scatter_(0, to_ordered, torch.arange(visual + text_tokens, device=device))
    return TokenOrder(name, to_ordered, to_raster)
