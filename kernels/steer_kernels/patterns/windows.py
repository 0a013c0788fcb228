"""Windows on a grid of tokens: neighborhoods, sliding tiles, discs, neighbouring frames and diagonals."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace

import torch

from steer_kernels.block_mask import BlockMask
from steer_kernels.order import check_grid, coordinates, tiles
from steer_kernels.patterns.boxes import Band, disc, separable
from steer_kernels.patterns.layout import Layout, at_least, per_axis


def neighborhood(
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    dilation: int | Sequence[int] = 1,
    causal: bool | Sequence[bool] = False,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Every query sees the `window` tokens around it on each axis, shifted inwards at the borders (GNA).

    With stride s the queries of a group of s share the window of the group's middle query; s = window is blocked
    (Swin) attention. With dilation d a token sees tokens that differ from it by multiples of d. On a causal axis the
    window ends with the query. An even window reaches one token further to the left. Text sees all and is seen by all.

    Args:
        grid: (T, H, W), (H, W) or (W,) in tokens.
        window, stride, dilation, causal: one value, or one per axis. window in tokens of the query's dilation group.
        block_size: tokens in a (query, key) block, or one number for both.
        text_tokens, text_first: tokens that are not on the grid, and whether they come first.
        tile: the visual tokens are in the order of `order.tiles(grid, tile)`; None = raster.
        device: of the mask.

    Raises:
        ValueError: window * dilation larger than the axis, stride larger than the window, or a tile that does not fit.

    Source: arXiv 2504.16922 (Generalized Neighborhood Attention), arXiv 2209.15001 (dilation). FreeSwim's inward window
    (arXiv 2511.14712) of half-widths d is window 2d + 1.
    """
    grid = check_grid(grid)
    parts = _window_parts(grid, window, stride, dilation, causal)
    layout = Layout.of(math.prod(grid), block_size, device, text_tokens, text_first)
    bands = [_window(*part, device) for part in parts]
    return _banded(layout, grid, bands, tile)


def sliding_tile(
    *,
    grid: Sequence[int],
    window: Sequence[int],
    tile: Sequence[int],
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The tokens of a tile see whole tiles: `neighborhood` on the grid of tiles, for tokens in tile order (STA).

    Where the grid is no multiple of the tile, the tiles at its far edges are smaller, and count as one all the same.
    Where it is, and the volume of a tile and the text that comes first are multiples of the block, no block is partial
    and the mask needs no token rule.

    Args:
        grid: (T, H, W) or (H, W) in tokens.
        window: tokens per axis, a multiple of the tile.
        tile: tokens per axis; the order is `order.tiles(grid, tile)`.
        block_size, text_tokens, text_first, device: see `neighborhood`.

    Raises:
        ValueError: a window that is not a multiple of the tile or has more tiles than the grid, or a tile that does
            not fit.

    Source: arXiv 2502.04507 (Sliding Tile Attention). It is for grids that are multiples of the tile; the tiles at the
    edges of others are a choice made here.
    """
    grid = check_grid(grid)
    window, tile = per_axis("window", tuple(window), grid), per_axis("tile", tuple(tile), grid)
    at_least(1, tile=min(tile))
    if any(size % t for size, t in zip(window, tile, strict=True)):
        raise ValueError(f"window={window} must be a multiple of tile={tile} on every axis; see neighborhood(tile=)")
    counts = tuple(-(-x // t) for x, t in zip(grid, tile, strict=True))
    if any(w > t * count for w, t, count in zip(window, tile, counts, strict=True)):
        raise ValueError(f"window={window} has more tiles of {tile} than the grid {grid}, which has {counts}")
    parts = _window_parts(counts, tuple(w // t for w, t in zip(window, tile, strict=True)), 1, 1, False)
    bands: list[Band | None] = []
    for part, t, size in zip(parts, tile, grid, strict=True):
        of_tiles = _window(*part, device)
        bands.append(of_tiles and of_tiles.scaled(t, size))
    layout = Layout.of(math.prod(grid), block_size, device, text_tokens, text_first)
    mask = _banded(layout, grid, bands, tile)
    even = not any(x % t for x, t in zip(grid, tile, strict=True))
    whole = even and all(math.prod(tile) % block == 0 and layout.first % block == 0 for block in layout.block_size)
    return replace(mask, rule=None) if whole else mask


def circular(
    *,
    grid: Sequence[int],
    radius: float,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    tile: Sequence[int] | None = None,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Every image token sees those closer than `radius`; at the borders there are fewer. Text sees and is seen by all.

    Args:
        grid: (H, W) in tokens.
        radius: in tokens; a token at exactly this distance is not seen.
        block_size, text_tokens, text_first, tile, device: see `neighborhood`.

    Raises:
        ValueError: a grid that is not (H, W) or a diagonal of 23170 tokens, or a radius of 0 or less.

    Source: arXiv 2412.16112 (CLEAR), with radius 8, 16 or 32.
    """
    grid = check_grid(grid)
    if len(grid) != 2 or not radius > 0:
        raise ValueError(f"circular needs grid=(H, W) and radius > 0; got grid={grid}, radius={radius}")
    diagonal_squared = grid[0] ** 2 + grid[1] ** 2
    if diagonal_squared >= 1 << 29:
        raise ValueError(f"grid={grid}: its diagonal must be shorter than 23170 tokens, as squares are 32-bit numbers")
    radius_squared = math.ceil(min(radius * radius, diagonal_squared))
    layout = Layout.of(math.prod(grid), block_size, device, text_tokens, text_first)
    at, order = _placed(grid, tile, device)
    visible, hidden = disc(layout, grid, radius_squared, tuple(tile) if tile else None)
    return layout.mask(visible, hidden, layout.disc_rule(at, radius_squared), order)


def frames(
    *,
    tokens_per_frame: int,
    frames: int,
    reach: int,
    sink_frames: int = 0,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Every query sees its own frame and `reach` frames on either side (fewer at the ends), and the first frames.

    Args:
        tokens_per_frame, frames: of the video, in raster order.
        reach: frames on either side.
        sink_frames: leading frames that every query sees.
        block_size, text_tokens, text_first, device: see `neighborhood`.

    Raises:
        ValueError: a negative number, or more sink frames than frames.

    Source: the spatial heads of arXiv 2502.01776 (Sparse-VideoGen), diagonal mode of arXiv 2506.03065 (Sparse-vDiT).
    """
    at_least(1, tokens_per_frame=tokens_per_frame, frames=frames)
    at_least(0, reach=reach, sink_frames=sink_frames)
    if sink_frames > frames:
        raise ValueError(f"sink_frames={sink_frames} must be at most frames={frames}")
    visual, sinks = tokens_per_frame * frames, sink_frames * tokens_per_frame
    layout = Layout.of(visual, block_size, device, text_tokens, text_first, sinks)
    return _banded(layout, (frames, tokens_per_frame), [_around(frames, reach, device), None])


def diagonal(
    *,
    q_len: int,
    width: int,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Query i sees the keys |i - j| <= width in raster order, fewer at the ends.

    Args:
        q_len: tokens, without the text.
        width: tokens on either side.
        block_size, text_tokens, text_first, device: see `neighborhood`.

    Raises:
        ValueError: a negative number.

    Source: the one-dimensional mask of arXiv 2505.22918 (Re-ttention).
    """
    at_least(0, width=width)
    layout = Layout.of(q_len, block_size, device, text_tokens, text_first)
    return _banded(layout, (q_len,), [_around(q_len, width, device)])


def multi_diagonal(
    *,
    tokens_per_frame: int,
    frames: int,
    width: int,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """In every frame, a query sees the positions |p - p'| <= width around its own position p in its frame.

    In raster order the stripes are thin and nearly every block that they touch is partial. For tokens in the order
    `order.axes((frames, H, W), "HWT")` the same pairs are one band: `frames` with frames as tokens and width as reach.

    Args:
        tokens_per_frame, frames: of the video, in raster order.
        width: positions on either side, in raster order inside the frame.
        block_size, text_tokens, text_first, device: see `neighborhood`.

    Raises:
        ValueError: a negative number.

    Source: arXiv 2505.22918 (Re-ttention), the temporal heads of arXiv 2502.01776 (Sparse-VideoGen).
    """
    at_least(1, tokens_per_frame=tokens_per_frame, frames=frames)
    at_least(0, width=width)
    layout = Layout.of(tokens_per_frame * frames, block_size, device, text_tokens, text_first)
    return _banded(layout, (frames, tokens_per_frame), [None, _around(tokens_per_frame, width, device)])


def speedup_bound(
    *,
    grid: Sequence[int],
    window: int | Sequence[int],
    stride: int | Sequence[int] = 1,
    q_tile: Sequence[int],
    kv_tile: Sequence[int],
) -> float:
    """The most that `neighborhood` can gain when queries and keys are in tiles: all key tiles / those of the worst row.

    Args:
        grid, window, stride: see `neighborhood`.
        q_tile, kv_tile: tokens per axis of a tile of queries and of keys.

    Source: arXiv 2504.16922, the simulator of section 3.
    """
    grid = check_grid(grid)
    bound = 1.0
    for part, q, k in zip(
        _window_parts(grid, window, stride, 1, False),
        per_axis("q_tile", tuple(q_tile), grid),
        per_axis("kv_tile", tuple(kv_tile), grid),
        strict=True,
    ):
        band, size = _window(*part, "cpu"), part[0]
        if band is not None:
            low, high = band.low[::q], band.high[[min(last, size) - 1 for last in range(q, size + q, q)]]
            bound *= -(-size // k) / int((-(-high // k) - low // k).max())
    return bound


def _window_parts(
    grid: tuple[int, ...],
    window: int | Sequence[int],
    stride: int | Sequence[int],
    dilation: int | Sequence[int],
    causal: bool | Sequence[bool],
) -> list[tuple[int, int, int, int, bool]]:
    """(size, window, stride, dilation, causal) of every axis, checked."""
    parts = []
    for size, w, s, d, c in zip(
        grid,
        per_axis("window", window, grid),
        per_axis("stride", stride, grid),
        per_axis("dilation", dilation, grid),
        per_axis("causal", causal, grid),
        strict=True,
    ):
        if w < 1 or d < 1 or w * d > size:
            raise ValueError(
                f"window={w} with dilation={d} on an axis of {size}: need 1 <= window * dilation <= {size}"
            )
        if not 1 <= s <= w:
            raise ValueError(f"stride={s} with window={w}: need 1 <= stride <= window")
        parts.append((size, w, s, d, bool(c)))
    return parts


def _window(
    size: int, window: int, stride: int, dilation: int, causal: bool, device: torch.device | str
) -> Band | None:
    """One axis of neighborhood attention; None where every key is visible."""
    if window == size and not causal:
        return None
    raw = torch.arange(size, device=device)
    residue, at = raw % dilation, raw // dilation
    length = (size - residue + dilation - 1) // dilation  # of the residue class
    group = at // stride * stride
    if causal:
        leader = torch.minimum(group + stride, length) - 1
        start, end = (leader - window + 1).clamp(min=0), at + 1
    else:
        leader = torch.minimum(group + stride // 2, length - 1)
        start = torch.minimum((leader - window // 2).clamp(min=0), length - window)
        end = start + window
    return Band(residue + start * dilation, residue + (end - 1) * dilation + 1, dilation)


def _around(size: int, reach: int, device: torch.device | str) -> Band | None:
    """`reach` coordinates on either side, clipped; None where that is everything."""
    at = torch.arange(size, device=device)
    return None if reach >= size - 1 else Band((at - reach).clamp(min=0), (at + reach + 1).clamp(max=size))


def _banded(
    layout: Layout, grid: tuple[int, ...], bands: Sequence[Band | None], tile: Sequence[int] | None = None
) -> BlockMask:
    """The block mask of a conjunction of bands."""
    at, order = _placed(grid, tile, layout.device)
    visible, hidden = separable(layout, grid, bands, tuple(tile) if tile else None)
    tables = [band.tables().index_select(1, at[axis]) for axis, band in enumerate(bands) if band is not None]
    rule = layout.box_rule(*torch.stack(tables, 1)) if tables else None
    return layout.mask(visible, hidden, rule, order)


def _placed(grid: tuple[int, ...], tile: Sequence[int] | None, device: torch.device | str) -> tuple[torch.Tensor, str]:
    """(A, S) coordinates of the visual tokens in their order, and the name of the order."""
    at = coordinates(grid, device)
    if tile is None:
        return at, "raster"
    order = tiles(grid, tile, device=device)
    return order.apply(at, 1), order.name
