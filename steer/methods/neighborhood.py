"""Neighborhood attention: every token sees a window of the grid around it; also sliding tiles and discs."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import product
from typing import Annotated, Any, ClassVar, Literal, Self, get_args

import torch

from steer.method import Span
from steer.select import SelectorError
from steer.sparse import Prepared, Sparse, Tokens, valid_keys
from steer_kernels import BlockMask, order, patterns
from steer_kernels.order import TokenOrder
from steer_patches.family import Family
from steer_patches.site import Call, Next, Site

Shape = Literal["box", "tiles", "disc"]
SHAPES: tuple[Shape, ...] = get_args(Shape)
WHOLE = 1 << 20  # a window longer than any axis
Axes = tuple[int, ...]  # one number for frames, height and width each


@dataclass(kw_only=True)
class NeighborhoodAttention(Sparse):
    """Every image or video token sees the `window` tokens around it on each axis; text sees all and is seen by all.

    On an axis of X tokens, with window w and stride s, query i sees the keys [start, start + w) with

        leader = min(floor(i / s) * s + floor(s / 2), X - 1)
        start  = min(max(leader - floor(w / 2), 0), X - w)

    so the queries of a group of s share a window, and at the borders windows are shifted inwards, never cut: every
    query has w keys. With s = w it is blocked (Swin) attention. With dilation d the same holds inside each class of
    tokens with equal i mod d. `shape` names two published variants: "tiles" is the rule on the grid of tiles, of which
    all tokens of a tile share the window; "disc" is squared distance < window^2, cut at the borders.

    One setting serves all sizes: an axis with fewer than window * dilation tokens is seen whole. Where all axes are (an
    image that is smaller than a window for large ones), attention is dense.

    Numbers per axis are (frames, height, width), one number for all three, or (height, width): then each query sees
    all frames, and tiles are one frame deep.

    Args:
        window: tokens per axis; of a disc, the radius. None = the family's preset; without one it has to be given.
        stride, dilation: per axis. None = 1, or what belongs to the preset's window.
        tile: tokens per axis of the tiles in whose order attention is computed; 1 = raster order. With shape "tiles" it
            is part of the rule, else it changes the speed alone. None = of all tiles of block_size tokens, the one that
            leaves the fewest blocks to compute; it is searched once a size, in a second or two for a long video.
        shape: "box", "tiles" (needs `tile`; the window is a multiple of it) or "disc" (images, without padded text).
        scale_factor: on the attention scale 1 / sqrt(D). FreeSwim: see `inward`. CLEAR was trained with
            sqrt(ln S / ln 4608), S the keys that a query sees.

    Source: Hassani et al., "Generalized Neighborhood Attention: Multi-dimensional Sparse Attention at the Speed of
    Light", arXiv 2504.16922, whose formulas are checked pair by pair; dilation: arXiv 2209.15001; tiles: Sliding Tile
    Attention, arXiv 2502.04507, where grids that are no multiple of the tile are a choice made here; disc: CLEAR, arXiv
    2412.16112, whose published quality needs its trained weights; inward windows: FreeSwim, arXiv 2511.14712.
    """

    window: float | Sequence[int] | None = None
    stride: int | Sequence[int] | None = None
    dilation: int | Sequence[int] | None = None
    tile: int | Sequence[int] | None = None
    shape: Shape = "box"
    scale_factor: Annotated[float, Span(0.5, 2)] = 1.0

    defaults: ClassVar[Mapping[str, Any]] = {"steps": "0.3:", "stride": 1, "dilation": 1}
    without_preset: ClassVar[str] = "give `window=`"

    @classmethod
    def sliding_tile(cls, window: int | Sequence[int], tile: int | Sequence[int], **options: Any) -> Self:
        """Sliding Tile Attention (arXiv 2502.04507): the tokens of a tile see the tiles around it.

        Where the volume of a tile is a multiple of block_size and the tile divides the grid, no block is partial.

        Args:
            window: in tokens per axis, a multiple of the tile; published: (18, 24, 24) for HunyuanVideo's 30 x 48 x 80.
            tile: tokens per axis; published: (6, 8, 8).
            options: other fields.
        """
        return cls(window=window, tile=tile, shape="tiles", **options)

    @classmethod
    def circular(cls, radius: float, **options: Any) -> Self:
        """CLEAR's mask for images (arXiv 2412.16112), in all steps unless `steps` says otherwise.

        Args:
            radius: a query sees the tokens that are closer; published 8, 16 and 32.
            options: other fields.
        """
        return cls(window=radius, shape="disc", **{"steps": ":", **options})

    @classmethod
    def inward(
        cls, half: int | tuple[int, int], *, trained_tokens: int | None = None, times: float = 2.0, **options: Any
    ) -> Self:
        """FreeSwim's windows for videos larger than those of the training (arXiv 2511.14712).

        All frames and 2 * half + 1 rows and columns, in all steps unless `steps` says otherwise.

        Args:
            half: rows and columns on either side; published: half the training size, (15, 26) for Wan at 480 x 832.
            trained_tokens: tokens of a frame at the training size, N. If given, the attention scale is multiplied by
                sqrt(ln(times * N) / ln N); published for Wan: N = 30 * 52, a factor of sqrt(1.094).
            times: tokens of a frame now, as a multiple of N; published: 2, whatever the size.
            options: other fields.
        """
        rows, columns = (half, half) if isinstance(half, int) else half
        if trained_tokens is not None:
            options["scale_factor"] = math.sqrt(math.log(times * trained_tokens) / math.log(trained_tokens))
        return cls(window=(2 * rows + 1, 2 * columns + 1), **{"steps": ":", **options})

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.shape not in SHAPES:
            raise ValueError(f"shape={self.shape!r} does not exist; choose from {', '.join(SHAPES)}")
        if not self.scale_factor > 0:
            raise ValueError(f"scale_factor={self.scale_factor} must be above 0")
        for name in ("window", "stride", "dilation", "tile"):
            value = getattr(self, name)
            setattr(self, name, tuple(value) if isinstance(value, list) else value)  # as loaded from JSON
        self._check_shape()

    def _check_shape(self) -> None:
        """Raise `ValueError` for numbers that are none, or do not fit together."""
        strides, dilations = _per_axis("stride", self.stride), _per_axis("dilation", self.dilation)
        tile, even = _per_axis("tile", self.tile), {*strides, *dilations} == {1}
        if self.shape != "box" and not even:
            raise ValueError(f'shape="{self.shape}" has neither stride nor dilation; leave them out')
        if self.shape == "disc":
            if isinstance(self.window, Sequence) or self.window is None or not self.window > 0:
                raise ValueError(f'window={self.window!r} must be the radius of shape="disc": one number above 0')
            return
        window = _per_axis("window", self.window)
        if self.window is not None and any(s > w for s, w in zip(strides, window, strict=True)):
            raise ValueError(f"stride={self.stride} with window={self.window}: need stride <= window on every axis")
        if self.shape == "tiles" and (self.window is None or self.tile is None):
            raise ValueError('shape="tiles" needs window= and tile=')
        if self.shape == "tiles" and any(w % t for w, t in zip(window, tile, strict=True) if w < WHOLE):
            raise ValueError(f'window={self.window} of shape="tiles" must be a multiple of tile={self.tile}')

    def resolved(self, family: Family | None, has_clock: bool) -> Sparse:
        """A copy with the preset's window, or with a stride and a dilation of 1 beside a window of the user's own."""
        mine = self if self.window is None else replace(self, stride=self.stride or 1, dilation=self.dilation or 1)
        found = super(NeighborhoodAttention, mine).resolved(family, has_clock)
        assert isinstance(found, NeighborhoodAttention)
        name, video = family.name if family else "this model", family is not None and family.video
        if found.window is None:
            example = "window=(9, 24, 24) for frames, height and width" if video else "window=(32, 32)"
            raise SelectorError(
                f"NeighborhoodAttention has no preset for {name}: give a window, in tokens of the grid that its blocks "
                f"work on, such as {example}"
            )
        if found.shape == "disc" and video:
            raise SelectorError(
                f'{name} makes videos, and shape="disc" (circular) is for images; give a box, such as window=(31, 53) '
                "for height and width, over all frames"
            )
        return found

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        def build() -> Prepared:
            windows, tile = self.windows_on(tokens.grid)
            permuted = None if tile is None else order.tiles(tokens.grid, tile, **tokens.of_text())
            return Prepared(tokens, windows.mask(tile, **tokens.of_text()), permuted)

        return self.once("mask", tokens, build)

    def visual_order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        _, tile = self.windows_on(grid)
        return None if tile is None else _tile_order(grid, tile, device)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        if self.shape == "disc" and valid_keys(call, ready.tokens) is not None:
            raise ValueError(
                f"{call.site.name} hides padded text by a mask, which the discs of NeighborhoodAttention.circular "
                "cannot do; give prompts without padding, or a box: window=(height, width)"
            )
        return super().attend(_rescaled(call, self.scale_factor), next)

    def windows_on(self, grid: Axes) -> tuple[Windows, Axes | None]:
        """The windows on one grid, and the tile of the token order; None = raster."""
        assert self.window is not None and self.block_size is not None
        tile = None if self.tile is None else _at_most(_per_axis("tile", self.tile), grid)
        if self.shape == "disc":
            windows = Windows(grid, self.block_size, radius=float(self.window))  # type: ignore[arg-type]
        elif self.shape == "tiles":
            assert tile is not None
            edges = tuple(-(-x // t) * t for x, t in zip(grid, tile, strict=True))
            windows = Windows(grid, self.block_size, _at_most(_per_axis("window", self.window), edges), of_tiles=tile)
        else:
            parts = (_per_axis(name, getattr(self, name)) for name in ("window", "stride", "dilation"))
            fitted = [(w, s, d) if w * d <= x else (x, 1, 1) for x, w, s, d in zip(grid, *parts, strict=True)]
            window, stride, dilation = zip(*fitted, strict=True)
            windows = Windows(grid, self.block_size, window, stride, dilation)
        tile = best_tile(windows) if tile is None else tile
        return windows, None if tile == (1, 1, 1) else tile


@dataclass(frozen=True)
class Windows:
    """The windows on one grid: boxes, of tiles where `of_tiles` is given, or discs where `radius` is."""

    grid: Axes
    block_size: int
    window: Axes = (1, 1, 1)
    stride: Axes = (1, 1, 1)
    dilation: Axes = (1, 1, 1)
    of_tiles: Axes | None = None
    radius: float | None = None

    def mask(self, tile: Axes | None, **text: Any) -> BlockMask:
        """For tokens in the order of `tile`; None = raster."""
        grid, text = self.grid, {"block_size": self.block_size, **text}
        if self.radius is not None:
            return patterns.circular(grid=grid[1:], radius=self.radius, tile=tile and tile[1:], **text)
        if self.of_tiles is not None:
            return patterns.sliding_tile(grid=grid, window=self.window, tile=self.of_tiles, **text)
        window, stride, dilation = self.window, self.stride, self.dilation
        return patterns.neighborhood(grid=grid, window=window, stride=stride, dilation=dilation, tile=tile, **text)


@lru_cache(maxsize=64)
def best_tile(windows: Windows) -> Axes | None:
    """The tile of block_size tokens in whose order the fewest blocks are computed; None where raster order is as good.

    Every factorisation is tried: masks are cheap next to attention, and an estimate would have to know how blocks and
    tiles drift apart where the grid is no multiple of the tile.
    """

    def cost(tile: Axes | None) -> tuple[float, float]:
        mask = windows.mask(tile)
        return mask.density, float(mask.partial_num.sum())

    size = windows.block_size
    sides = [[side for side in range(1, min(x, size) + 1) if size % side == 0] for x in windows.grid]
    return min([None, *(tile for tile in product(*sides) if math.prod(tile) == size)], key=cost)


@lru_cache(maxsize=16)
def _tile_order(grid: Axes, tile: Axes, device: torch.device) -> TokenOrder:
    return order.tiles(grid, tile, device=device)


def _per_axis(name: str, value: float | Sequence[int] | None) -> Axes:
    """One whole number for each of (frames, height, width)."""
    over_frames = WHOLE if name == "window" else 1
    if value is None:
        return over_frames, over_frames, over_frames
    numbers = tuple(value) if isinstance(value, Sequence) else (value, value, value)
    if len(numbers) == 2:
        numbers = (over_frames, *numbers)
    if len(numbers) != 3 or any(not isinstance(number, int) or number < 1 for number in numbers):
        raise ValueError(
            f"{name}={value!r} must be whole numbers from 1 on: one for all axes, (height, width), or (frames, height, "
            "width)"
        )
    return tuple(int(number) for number in numbers)


def _at_most(values: Axes, limits: Axes) -> Axes:
    return tuple(min(value, limit) for value, limit in zip(values, limits, strict=True))


def _rescaled(call: Call, factor: float) -> Call:
    """The call with its attention scale multiplied, in the heads that the method may edit."""
    if factor == 1:
        return call
    if call.heads is None:
        return call.replace(scale=call.softmax_scale * factor)
    return call.replace(query=torch.where(call.heads, call.query * factor, call.query))
