"""Every pattern against a token mask written pair by pair from the published rule, on odd grids and blocks."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels import BlockMask, order, patterns

BLOCKS = st.sampled_from([4, 8, 16, (8, 4), (5, 16)])
TEXTS = st.sampled_from([(0, False), (1, True), (6, False), (11, True), (16, False)])


def points(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, grid)))


def pairs(tokens: int, sees: Callable[[int, int], bool]) -> torch.Tensor:
    return torch.tensor([[sees(i, j) for j in range(tokens)] for i in range(tokens)])


def with_text(visual: torch.Tensor, text: int, text_first: bool) -> torch.Tensor:
    start = text if text_first else 0
    mask = torch.ones(len(visual) + text, len(visual) + text, dtype=torch.bool)
    mask[start : start + len(visual), start : start + len(visual)] = visual
    return mask


def assert_is(mask: BlockMask, tokens: torch.Tensor) -> None:
    """`mask` stands for `tokens` ([H,] S_q, S_k), computes no block without a visible pair, and masks no full one."""
    tokens = tokens.expand(1, -1, -1, -1) if tokens.ndim == 3 else tokens[None, None]
    assert torch.equal(mask.to_tokens().expand_as(tokens), tokens)
    keep, partial = mask.to_bool(), mask.partial_bool()
    (bq, bk), (rows, columns) = mask.block_size, keep.shape[-2:]
    for row, column in product(range(rows), range(columns)):
        block = tokens[..., row * bq : (row + 1) * bq, column * bk : (column + 1) * bk].flatten(2)
        assert torch.equal(keep[..., row, column].expand_as(block[..., 0]), block.any(-1))
        assert torch.equal((keep & ~partial)[..., row, column].expand_as(block[..., 0]), block.all(-1))


def window_of(i: int, size: int, window: int, stride: int, dilation: int, causal: bool) -> set[int]:
    """The published rule of one axis, for one query."""
    residue, at = i % dilation, i // dilation
    length = len(range(residue, size, dilation))
    left, right = window // 2, window // 2 + window % 2 - 1
    if causal:
        leader = min(at // stride * stride + stride - 1, length - 1)
        start, end = max(leader - left - right, 0), at + 1
    else:
        leader = min(at // stride * stride + stride // 2, length - 1)
        start = max(leader - left, 0) + (length - right - leader - 1 if leader + right >= length else 0)
        end = start + window
    return {residue + dilation * key for key in range(start, end)}


def neighborhood_tokens(grid: tuple[int, ...], window: Any, stride: Any, dilation: Any, causal: Any) -> torch.Tensor:
    seen = [
        [window_of(i, size, *part) for i in range(size)]
        for size, *part in zip(grid, window, stride, dilation, causal, strict=True)
    ]
    at = points(grid)
    return pairs(len(at), lambda i, j: all(at[j][a] in seen[a][at[i][a]] for a in range(len(grid))))


@st.composite
def neighborhoods(draw: st.DrawFn) -> dict[str, Any]:
    grid = draw(st.sampled_from([(3, 5, 7), (2, 9, 4), (6, 3, 5), (7, 11), (12, 5), (4, 16), (37,), (64,)]))
    found: dict[str, Any] = {"grid": grid, "window": (), "stride": (), "dilation": (), "causal": ()}
    for size in grid:
        dilation = draw(st.integers(1, min(3, size)))
        window = draw(st.integers(1, size // dilation))
        found["window"] += (window,)
        found["dilation"] += (dilation,)
        found["stride"] += (draw(st.integers(1, window)),)
        found["causal"] += (draw(st.booleans()),)
    return found


@settings(max_examples=120)
@given(parts=neighborhoods(), block=BLOCKS, text=TEXTS, tiled=st.booleans(), data=st.data())
def test_neighborhood(
    parts: dict[str, Any], block: Any, text: tuple[int, bool], tiled: bool, data: st.DataObject
) -> None:
    tokens = neighborhood_tokens(**parts)
    tile = tuple(data.draw(st.integers(1, size)) for size in parts["grid"]) if tiled else None
    if tile:
        place = order.tiles(parts["grid"], tile).to_ordered
        tokens = tokens[place][:, place]
    mask = patterns.neighborhood(**parts, tile=tile, block_size=block, text_tokens=text[0], text_first=text[1])
    assert_is(mask, with_text(tokens, *text))
    assert mask.order == ("raster" if tile is None else order.tiles(parts["grid"], tile).name)


@pytest.mark.parametrize("dilation", [1, 2])
@pytest.mark.parametrize("stride", [1, 2, 3])
def test_neighborhood_always_has_the_whole_window(stride: int, dilation: int) -> None:
    mask = patterns.neighborhood(
        grid=(6, 9, 7), window=(3, 4, 3), stride=stride, dilation=dilation, block_size=16, text_tokens=5
    )
    counts = mask.to_tokens()[0, 0].sum(-1)
    assert (counts[:-5] == 3 * 4 * 3 + 5).all()
    assert (counts[-5:] == 6 * 9 * 7 + 5).all()


def test_neighborhood_limits() -> None:
    full = patterns.neighborhood(grid=(3, 5, 7), window=(3, 5, 7), block_size=8, text_tokens=3)
    assert full.density == 1 and not full.partial_num.any() and full.rule is None
    swin = patterns.neighborhood(grid=(12,), window=4, stride=4, block_size=4)
    assert torch.equal(swin.to_bool()[0, 0], torch.eye(3, dtype=torch.bool)) and not swin.partial_num.any()


def test_perfectly_block_sparse_tiles() -> None:
    """Where the tile divides the window and the stride, no block is partial."""
    mask = patterns.neighborhood(grid=(4, 8, 8), window=(2, 4, 4), stride=(2, 4, 4), tile=(2, 4, 4), block_size=32)
    assert not mask.partial_num.any()
    assert mask.density == 1 / 8


@pytest.mark.parametrize("position", range(11))
def test_freeswim_inward_window(position: int) -> None:
    """Its published bounds are those of a neighborhood of 2 d + 1."""
    rows, d = 11, 3
    low = position - d - max(0, d + position - rows + 1)
    high = position + d + max(0, d - position)
    expected = {row for row in range(low, high + 1) if 0 <= row < rows}
    tokens = patterns.neighborhood(grid=(2, rows, 4), window=(2, 2 * d + 1, 4), block_size=8).to_tokens()[0, 0]
    keys = tokens.view(2, rows, 4, 2, rows, 4)
    assert {row for row in range(rows) if keys[0, position, 0, 0, row, 0]} == expected


@settings(max_examples=80)
@given(data=st.data(), block=BLOCKS, text=TEXTS)
def test_sliding_tile(data: st.DataObject, block: Any, text: tuple[int, bool]) -> None:
    """On grids whose last tiles are whole or smaller."""
    tile = data.draw(st.sampled_from([(1, 2, 3), (2, 1, 2), (2, 4), (3,)]))
    counts = tuple(data.draw(st.integers(1, 4)) for _ in tile)
    window = tuple(data.draw(st.integers(1, count)) for count in counts)
    last = tuple(data.draw(st.integers(1, t)) if count > 1 else t for t, count in zip(tile, counts, strict=True))
    size = tuple(w * t for w, t in zip(window, tile, strict=True))
    grid = tuple((count - 1) * t + rest for count, t, rest in zip(counts, tile, last, strict=True))
    ones, no = (1,) * len(tile), (False,) * len(tile)
    tile_of = [points(counts).index(tuple(x // t for x, t in zip(at, tile, strict=True))) for at in points(grid)]
    of_tiles = neighborhood_tokens(counts, window, ones, ones, no)
    tokens = of_tiles[tile_of][:, tile_of]
    place = order.tiles(grid, tile).to_ordered
    mask = patterns.sliding_tile(
        grid=grid, window=size, tile=tile, block_size=block, text_tokens=text[0], text_first=text[1]
    )
    assert_is(mask, with_text(tokens[place][:, place], *text))
    assert mask.order == "tiles " + "x".join(map(str, tile))


def test_sliding_tile_is_block_sparse() -> None:
    mask = patterns.sliding_tile(grid=(4, 8, 8), window=(2, 8, 4), tile=(2, 2, 4), block_size=8, text_tokens=9)
    assert not mask.partial_num.any() and mask.rule is None


@settings(max_examples=60)
@given(
    grid=st.sampled_from([(7, 11), (5, 16), (1, 30), (12, 3), (9, 9)]), block=BLOCKS, text=TEXTS, data=st.data(),
    radius=st.sampled_from([0.5, 1, 1.5, 2, 3, 5, 6.2, 40, 1e9]), tiled=st.booleans(),
)  # fmt: skip
def test_circular(
    grid: tuple[int, int], radius: float, block: Any, text: tuple[int, bool], tiled: bool, data: st.DataObject
) -> None:
    at = points(grid)
    tile = tuple(data.draw(st.integers(1, size)) for size in grid) if tiled else None
    if tile:
        at = [at[token] for token in order.tiles(grid, tile).to_ordered]
    tokens = pairs(len(at), lambda i, j: (at[i][0] - at[j][0]) ** 2 + (at[i][1] - at[j][1]) ** 2 < radius**2)
    mask = patterns.circular(
        grid=grid, radius=radius, tile=tile, block_size=block, text_tokens=text[0], text_first=text[1]
    )
    assert_is(mask, with_text(tokens, *text))


def test_circular_interior_counts() -> None:
    for radius, keys in ((8, 193), (16, 793)):
        side = 2 * radius + 1
        mask = patterns.circular(grid=(side, side), radius=radius)
        assert int(mask.to_tokens()[0, 0, radius * side + radius].sum()) == keys


def test_circular_with_a_large_radius() -> None:
    """Squares beyond the small packed numbers."""
    grid, radius = (3, 260), 150
    at = order.coordinates(grid)
    squared = (at[:, :, None] - at[:, None]).square().sum(0)
    assert_is(patterns.circular(grid=grid, radius=radius, block_size=64), squared < radius**2)


@settings(max_examples=60)
@given(
    tokens=st.integers(1, 13), count=st.integers(1, 9), reach=st.integers(0, 9), sinks=st.integers(0, 3),
    block=BLOCKS, text=TEXTS,
)  # fmt: skip
def test_frames(tokens: int, count: int, reach: int, sinks: int, block: Any, text: tuple[int, bool]) -> None:
    sinks = min(sinks, count)
    mask = patterns.frames(
        tokens_per_frame=tokens, frames=count, reach=reach, sink_frames=sinks, block_size=block,
        text_tokens=text[0], text_first=text[1],
    )  # fmt: skip
    expected = pairs(tokens * count, lambda i, j: abs(i // tokens - j // tokens) <= reach or j // tokens < sinks)
    assert_is(mask, with_text(expected, *text))


@settings(max_examples=40)
@given(length=st.integers(1, 70), width=st.integers(0, 80), block=BLOCKS, text=TEXTS)
def test_diagonal(length: int, width: int, block: Any, text: tuple[int, bool]) -> None:
    mask = patterns.diagonal(q_len=length, width=width, block_size=block, text_tokens=text[0], text_first=text[1])
    assert_is(mask, with_text(pairs(length, lambda i, j: abs(i - j) <= width), *text))


@settings(max_examples=40)
@given(tokens=st.integers(1, 23), count=st.integers(1, 5), width=st.integers(0, 24), block=BLOCKS, text=TEXTS)
def test_multi_diagonal(tokens: int, count: int, width: int, block: Any, text: tuple[int, bool]) -> None:
    mask = patterns.multi_diagonal(
        tokens_per_frame=tokens, frames=count, width=width, block_size=block, text_tokens=text[0], text_first=text[1]
    )
    assert_is(mask, with_text(pairs(tokens * count, lambda i, j: abs(i % tokens - j % tokens) <= width), *text))


def test_multi_diagonal_is_one_band_in_another_order() -> None:
    stripes = patterns.multi_diagonal(tokens_per_frame=4 * 5, frames=3, width=4, block_size=8, text_tokens=6)
    band = patterns.frames(tokens_per_frame=3, frames=4 * 5, reach=4, block_size=8, text_tokens=6)
    place = order.axes((3, 4, 5), "HWT", text_tokens=6).to_ordered
    assert torch.equal(band.to_tokens(), stripes.to_tokens()[:, :, place][..., place])


COGVIDEOX = {"tokens_per_frame": 1350, "frames": 13, "width": 21}


def token_density(make: Callable[[], BlockMask]) -> float:
    """Of a mask too long for `to_tokens`: one row of blocks after the other."""
    mask = make()
    zero, key, seen = torch.zeros(1, 1, dtype=torch.int64), torch.arange(mask.kv_len), 0
    keep, partial = (
        grid[0, 0].repeat_interleave(mask.block_size[1], 1) for grid in (mask.to_bool(), mask.partial_bool())
    )
    for row, start in enumerate(range(0, mask.q_len, mask.block_size[0])):
        query = torch.arange(start, min(start + mask.block_size[0], mask.q_len))[:, None]
        visible = mask.rule(zero, zero, query, key) | ~partial[row, : mask.kv_len]
        seen += int((visible & keep[row, : mask.kv_len]).sum())
    return seen / mask.q_len / mask.kv_len


@pytest.mark.parametrize(
    ("make", "density"),
    [
        (lambda: patterns.diagonal(q_len=4096, width=64), 0.031246),
        (lambda: patterns.multi_diagonal(**COGVIDEOX), 0.031598),
        (lambda: patterns.multi_diagonal(**COGVIDEOX, text_tokens=226, text_first=True), 0.056066),
        (lambda: patterns.circular(grid=(64, 64), radius=8), 0.042),
        (lambda: patterns.circular(grid=(64, 64), radius=16), 0.155),
        (lambda: patterns.circular(grid=(64, 64), radius=32), 0.482),
    ],
)  # fmt: skip
def test_published_token_densities(make: Callable[[], BlockMask], density: float) -> None:
    digits = len(f"{density:g}".split(".")[1])
    assert token_density(make) == pytest.approx(density, abs=0.51 * 10**-digits)


@pytest.mark.parametrize(
    ("grid", "window", "density"),
    [
        ((30, 48, 80), (18, 24, 24), 0.09),
        ((30, 48, 80), (30, 40, 40), 0.417),
        ((256, 256), (80, 80), 0.098),
        ((16, 44, 80), (16, 32, 48), 0.436),
    ],
)
def test_published_neighborhood_densities(grid: tuple[int, ...], window: tuple[int, ...], density: float) -> None:
    """Counted in the rule, which leaves out the axes that are seen whole."""
    rule = patterns.neighborhood(grid=grid, window=window).rule
    low, high = rule.query[0, 0].chunk(2)
    seen = (high - low).prod(0).double()
    whole = math.prod(size for size, w in zip(grid, window, strict=True) if size == w)
    assert (seen == seen[0]).all()
    assert float(seen[0]) * whole / math.prod(grid) == pytest.approx(density, abs=6e-4)


HUNYUAN = {"grid": (30, 48, 80), "window": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
FLUX = {"grid": (256, 256), "window": (80, 80), "q_tile": (16, 16), "kv_tile": (16, 8)}


@pytest.mark.parametrize(
    ("model", "stride", "bound"),
    [
        (HUNYUAN, (1, 1, 1), 3.27), (HUNYUAN, (2, 1, 1), 3.60), (HUNYUAN, (1, 1, 8), 5.45), (HUNYUAN, (2, 1, 8), 6.0),
        (HUNYUAN, (1, 8, 8), 9.09), (HUNYUAN, (2, 8, 8), 10.0), (HUNYUAN, (16, 8, 8), 11.11),
        (FLUX, (1, 1), 6.10), (FLUX, (16, 1), 8.53), (FLUX, (16, 16), 10.24),
    ],
)  # fmt: skip
def test_published_speedup_bounds(model: dict[str, Any], stride: tuple[int, ...], bound: float) -> None:
    assert patterns.speedup_bound(**model, stride=stride) == pytest.approx(bound, abs=0.006)


@pytest.mark.parametrize("stride", [(1, 1, 1), (2, 1, 8), (1, 8, 8), (2, 8, 8)])
def test_heaviest_row_meets_the_bound(stride: tuple[int, ...]) -> None:
    shape = {"grid": (30, 48, 80), "window": (18, 24, 24), "stride": stride}
    tile = (2, 8, 8)
    mask = patterns.neighborhood(**shape, tile=tile, block_size=math.prod(tile))
    heaviest = int((mask.full_num + mask.partial_num).max())
    assert mask.shape[-1] / heaviest == pytest.approx(patterns.speedup_bound(**shape, q_tile=tile, kv_tile=tile))


def test_bound_of_a_full_axis_and_of_tiles_that_do_not_divide() -> None:
    assert patterns.speedup_bound(grid=(8, 8), window=8, q_tile=(4, 4), kv_tile=(4, 4)) == 1
    # windows of 3 around 0..2, 3..5 and 6 reach the tiles of 0..3, 2..6 and 4..6
    assert patterns.speedup_bound(grid=(7,), window=3, q_tile=(3,), kv_tile=(2,)) == 4 / 3


@settings(max_examples=60)
@given(
    q_len=st.integers(1, 60), extra=st.integers(-20, 20), causal=st.booleans(), block=BLOCKS,
    heads=st.lists(st.tuples(st.integers(0, 30), st.integers(1, 70)), min_size=1, max_size=3),
)  # fmt: skip
def test_sink_window(q_len: int, extra: int, causal: bool, heads: list[tuple[int, int]], block: Any) -> None:
    kv_len = max(1, q_len + extra)

    def sees(i: int, j: int, sink: int, window: int) -> bool:
        at = i + kv_len - q_len
        return (j <= at or not causal) and (j < sink or abs(at - j) < window)

    expected = torch.tensor([[[sees(i, j, *head) for j in range(kv_len)] for i in range(q_len)] for head in heads])
    sinks, windows = zip(*heads, strict=True)
    mask = patterns.sink_window(q_len=q_len, kv_len=kv_len, sink=sinks, window=windows, causal=causal, block_size=block)
    assert_is(mask, expected)


def test_sink_window_shares_one_number() -> None:
    mask = patterns.sink_window(q_len=20, sink=2, window=[3, 20], block_size=4)
    alone = patterns.sink_window(q_len=20, sink=2, window=3, block_size=4)
    assert torch.equal(mask.to_tokens()[:, :1], alone.to_tokens())
    assert torch.equal(mask.to_tokens()[0, 1], torch.ones(20, 20).tril().bool())


def test_a_shape_is_a_sink_and_a_window() -> None:
    mask = patterns.a_shape(q_len=9000)
    same = patterns.sink_window(q_len=9000, sink=1024, window=4096)
    assert torch.equal(mask.to_bool(), same.to_bool()) and torch.equal(mask.partial_bool(), same.partial_bool())


@settings(max_examples=60)
@given(
    length=st.integers(1, 70), width=st.none() | st.integers(0, 30), block=BLOCKS, tensor=st.booleans(), data=st.data()
)
def test_vertical_stripes(length: int, width: int | None, block: Any, tensor: bool, data: st.DataObject) -> None:
    columns = data.draw(st.lists(st.integers(0, length - 1), max_size=length))
    mask = patterns.vertical_stripes(
        q_len=length, columns=torch.tensor(columns) if tensor and columns else columns, width=width, block_size=block
    )
    near = -1 if width is None else width
    assert_is(mask, pairs(length, lambda i, j: j in columns or abs(i - j) <= near))


@settings(max_examples=40)
@given(length=st.integers(1, 90), window=st.integers(1, 5), sinks=st.integers(0, 2), block=st.sampled_from([3, 4, 8]))
def test_power_of_two(length: int, window: int, sinks: int, block: int) -> None:
    def sees(i: int, j: int) -> bool:
        distance = i // block - j // block
        return j <= i and (distance < window or j // block < sinks or distance in (1, 2, 4, 8, 16, 32))

    mask = patterns.power_of_two(q_len=length, window_blocks=window, sink_blocks=sinks, block_size=block)
    assert_is(mask, pairs(length, sees))


def test_power_of_two_reaches_in_as_many_layers_as_binary_ones() -> None:
    blocks = 64
    mask = patterns.power_of_two(q_len=blocks * 4, window_blocks=1, sink_blocks=0, block_size=4)
    hop = mask.to_bool()[0, 0].double()
    reached = torch.eye(blocks, dtype=torch.float64)
    for layer in range(1, 7):
        reached = (reached @ hop > 0).double()
        for query, key in product(range(blocks), range(blocks)):
            assert bool(reached[query, key]) == (key <= query and (query - key).bit_count() <= layer)


def test_power_of_two_row_counts() -> None:
    mask = patterns.power_of_two(q_len=128 * 256, window_blocks=5)
    counts = (mask.full_num + mask.partial_num)[0, 0]
    for block, count in enumerate(counts.tolist()):
        assert count <= 5 + 1 + max(0, block.bit_length())
    assert mask.causal and torch.equal(mask.partial_bool()[0, 0], torch.eye(256, dtype=torch.bool))


def radial_blocks(
    tokens: int,
    frames: int,
    decay: float,
    sink: bool,
    block: tuple[int, int],
    text: int,
    text_first: bool = False,
    *,
    cut: bool = False,
    diagonal: bool = True,
) -> torch.Tensor:
    """The published rule pair of frames by pair of frames; `cut` leaves out what the published code does."""
    length, shift = tokens * frames + text, text if text_first else 0
    keep = torch.zeros(*(-(-length // size) + 2 for size in block), dtype=torch.bool)
    for blocks, size in zip((keep, keep.T), block, strict=True):
        if not text_first and (text or length % size):
            blocks[tokens * frames // size :] = True
        if text_first:
            blocks[: -(-text // size)] = True
            blocks[length // size :] = True
    power, position = 2 ** tokens.bit_length(), torch.arange(tokens)
    apart = (position[:, None] - position).abs()
    for i, j in product(range(frames), range(frames)):
        distance = abs(i - j)
        narrowed = power / 2 ** distance.bit_length()
        if (sink and j == 0) or distance <= 1:
            near = torch.ones(tokens, tokens)
        elif narrowed < 128 and distance % int(128 / narrowed):
            continue
        else:
            near = (apart <= max(narrowed * decay, *block)).float()
        (top, row), (left, column) = (divmod(shift + at * tokens, size) for at, size in zip((i, j), block, strict=True))
        rows, columns = (
            -(-(tokens + (0 if cut else offset)) // size) for offset, size in zip((row, column), block, strict=True)
        )
        padded = torch.zeros(max(rows * block[0], row + tokens), max(columns * block[1], column + tokens))
        padded[row : row + tokens, column : column + tokens] = near
        whole = padded[: rows * block[0], : columns * block[1]]
        density = whole.view(rows, block[0], columns, block[1]).sum(1) / block[0]
        keep[top : top + rows, left : left + columns] |= (density > 1 / 3).sum(-1) / (density > 0).sum(-1) > 0.6
    for token in range(length if diagonal else 0):
        keep[token // block[0], token // block[1]] = True
    return keep[:-2, :-2]


@settings(max_examples=100)
@given(
    tokens=st.integers(1, 90), count=st.integers(1, 9), decay=st.sampled_from([0.0, 0.2, 0.7, 0.95, 1.0, 3.0]),
    sink=st.booleans(), block=st.sampled_from([(4, 4), (7, 7), (16, 16), (33, 33), (16, 8), (8, 24)]),
    text=st.sampled_from([(0, False), (1, False), (5, True), (16, True), (40, False), (40, True)]),
)  # fmt: skip
def test_radial(
    tokens: int, count: int, decay: float, sink: bool, block: tuple[int, int], text: tuple[int, bool]
) -> None:
    mask = patterns.radial(
        tokens_per_frame=tokens, frames=count, decay=decay, key_frame_sink=sink, block_size=block,
        text_tokens=text[0], text_first=text[1],
    )  # fmt: skip
    assert torch.equal(mask.to_bool()[0, 0], radial_blocks(tokens, count, decay, sink, block, *text))
    assert not mask.partial_num.any() and mask.rule is None
    assert (mask.full_num > 0).all()


@settings(max_examples=40)
@given(tokens=st.integers(16, 90), count=st.integers(1, 6), block=st.sampled_from([(16, 16), (16, 8), (8, 16)]))
def test_radial_has_the_diagonal_by_the_published_rule(tokens: int, count: int, block: tuple[int, int]) -> None:
    """Where a frame is at least a block, so that forcing the diagonal changes nothing."""
    shape = (tokens, count, 0.2, False, block, 0)
    assert torch.equal(radial_blocks(*shape), radial_blocks(*shape, diagonal=False))


def test_radial_is_dense_with_wide_bands() -> None:
    """As long as no distance is left out."""
    assert patterns.radial(tokens_per_frame=512, frames=4, decay=2.0, key_frame_sink=False).density == 1
    assert patterns.radial(tokens_per_frame=512, frames=5, decay=2.0, key_frame_sink=False).density < 1


@pytest.mark.parametrize(
    ("tokens", "count", "decay", "sink", "block", "text", "density"),
    [
        (512, 6, 0.2, True, 128, 0, 0.8333),
        (512, 12, 0.95, False, 128, 256, 0.7648),
        (390, 20, 1.0, False, 128, 256, 0.5525),
        (256, 40, 1.0, True, 128, 0, 0.4081),
        (3840, 18, 0.2, True, 128, 0, 0.2871),
        (3840, 18, 1.0, True, 128, 0, 0.4309),
        (3840, 30, 0.95, False, 128, 256, 0.2778),
        (3840, 20, 0.8, True, 128, 0, 0.3525),
        (3840, 20, 0.8, True, 64, 0, 0.3491),
    ],
)
def test_radial_densities(
    tokens: int, count: int, decay: float, sink: bool, block: int, text: int, density: float
) -> None:
    mask = patterns.radial(
        tokens_per_frame=tokens, frames=count, decay=decay, key_frame_sink=sink, block_size=block, text_tokens=text
    )
    assert mask.density == pytest.approx(density, abs=6e-5)


@pytest.mark.parametrize(
    ("decay", "block", "published", "ours"), [(0.2, 128, 0.7195, 0.7493), (0.8, 64, 0.7372, 0.7426)]
)
def test_radial_keeps_the_end_of_every_frame(decay: float, block: int, published: float, ours: float) -> None:
    """At 600 tokens per frame the published code drops tokens; the rest of the rule is the same."""
    with_cut = radial_blocks(600, 8, decay, True, (block, block), 0, cut=True, diagonal=False)
    assert float(with_cut.float().mean()) == pytest.approx(published, abs=6e-5)
    mask = patterns.radial(tokens_per_frame=600, frames=8, decay=decay, key_frame_sink=True, block_size=block)
    assert mask.density == pytest.approx(ours, abs=6e-5)
    assert (mask.to_bool()[0, 0] | ~with_cut).all()


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: patterns.neighborhood(grid=(4, 4), window=5), r"need 1 <= window \* dilation <= 4"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=2, dilation=3), r"window=2 with dilation=3"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=2, stride=3), "need 1 <= stride <= window"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=(2, 2, 2)), "3 numbers for the 2 axes"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=2, tile=(2,)), "does not fit the grid"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=2, block_size=(1, 2, 3)), "block_size"),
        (lambda: patterns.neighborhood(grid=(1, 4, 4, 4), window=1), r"must be \(T, H, W\)"),
        (lambda: patterns.neighborhood(grid=(4, 4), window=2, text_tokens=-1), "text_tokens=-1 must be at least 0"),
        (lambda: patterns.sliding_tile(grid=(4, 5), window=(2, 8), tile=(2, 2)), "has more tiles .* than the grid"),
        (lambda: patterns.sliding_tile(grid=(1, 5), window=(2, 2), tile=(2, 2)), "does not fit the grid"),
        (lambda: patterns.sliding_tile(grid=(4, 4), window=(2, 3), tile=(2, 2)), "window=.* must be a multiple"),
        (lambda: patterns.circular(grid=(4,), radius=2), r"needs grid=\(H, W\)"),
        (lambda: patterns.circular(grid=(4, 4), radius=0), "radius > 0"),
        (lambda: patterns.circular(grid=(1, 30000), radius=2), "its diagonal must be shorter"),
        (lambda: patterns.frames(tokens_per_frame=4, frames=2, reach=-1), "reach=-1 must be at least 0"),
        (lambda: patterns.frames(tokens_per_frame=4, frames=2, reach=1, sink_frames=3), "at most frames=2"),
        (lambda: patterns.diagonal(q_len=0, width=1), "must be at least 1"),
        (lambda: patterns.multi_diagonal(tokens_per_frame=0, frames=2, width=1), "tokens_per_frame=0"),
        (lambda: patterns.vertical_stripes(q_len=9, columns=[9]), "must be from 0 to 8"),
        (lambda: patterns.vertical_stripes(q_len=9, columns=[1], width=-1), "width=-1"),
        (lambda: patterns.vertical_stripes(q_len=9, columns=torch.zeros(2, 2)), "must be 1-D"),
        (lambda: patterns.sink_window(q_len=9, sink=-1, window=2), "sink=-1 must be at least 0"),
        (lambda: patterns.sink_window(q_len=9, sink=1, window=[2, 0]), "must be at least 1, one number or one"),
        (lambda: patterns.sink_window(q_len=9, sink=[1, 2, 3], window=[2, 2]), "different numbers of heads"),
        (lambda: patterns.power_of_two(q_len=9, window_blocks=0), "window_blocks=0 must be at least 1"),
        (lambda: patterns.power_of_two(q_len=9, window_blocks=1, block_size=(2, 4)), "must be one number"),
        (lambda: patterns.radial(tokens_per_frame=4, frames=0, decay=1, key_frame_sink=True), "frames=0"),
    ],
)  # fmt: skip
def test_refusals(make: Callable[[], BlockMask], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
