"""Token orders: exact inverses, places counted by hand, text that stays, and neighbours that stay close."""

from __future__ import annotations

import math
from itertools import permutations, product

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels import order

grids = st.lists(st.integers(1, 7), min_size=1, max_size=3).map(tuple)
texts = st.tuples(st.sampled_from([0, 1, 5]), st.booleans())


def points(grid: tuple[int, ...]) -> list[tuple[int, ...]]:
    return list(product(*map(range, grid)))


def with_text(visual: list[int], text: int, text_first: bool) -> list[int]:
    if text_first:
        return [*range(text), *(text + token for token in visual)]
    return [*visual, *range(len(visual), len(visual) + text)]


@settings(max_examples=40)
@given(grid=grids, text=texts, data=st.data())
def test_tiles_one_after_the_other(grid: tuple[int, ...], text: tuple[int, bool], data: st.DataObject) -> None:
    tile = tuple(data.draw(st.integers(1, size)) for size in grid)
    raster = points(grid)
    visual = [
        raster.index(point)
        for corner in product(*(range(0, size, t) for size, t in zip(grid, tile, strict=True)))
        for point in product(
            *(range(c, min(c + t, size)) for c, t, size in zip(corner, tile, grid, strict=True))
        )
    ]  # fmt: skip
    made = order.tiles(grid, tile, text_tokens=text[0], text_first=text[1])
    assert made.to_ordered.tolist() == with_text(visual, *text)
    assert made.name == "tiles " + "x".join(map(str, tile))


@pytest.mark.parametrize("letters", ["".join(p) for p in permutations("THW")])
def test_axes_walk_the_last_letter_fastest(letters: str) -> None:
    grid = {"T": 3, "H": 4, "W": 5}
    places = [dict(zip(letters, point, strict=True)) for point in product(*(range(grid[axis]) for axis in letters))]
    visual = [(place["T"] * 4 + place["H"]) * 5 + place["W"] for place in places]
    made = order.axes((3, 4, 5), letters, text_tokens=7)
    assert made.to_ordered.tolist() == with_text(visual, 7, False)


def test_axes_of_an_image() -> None:
    assert order.axes((2, 3), "WH").to_ordered.tolist() == [0, 3, 1, 4, 2, 5]
    assert order.axes((2, 3), "HW").to_ordered.tolist() == list(range(6))


@pytest.mark.parametrize("grid", [(2, 2), (8, 8), (32, 32), (4, 4, 4), (16, 16, 16)])
def test_hilbert_steps_to_direct_neighbours(grid: tuple[int, ...]) -> None:
    at = order.hilbert(grid).apply(order.coordinates(grid), 1)
    assert at.diff(dim=1).abs().sum(0).eq(1).all()


@pytest.mark.parametrize("grid", [(8, 8), (16, 16, 16)])
def test_hilbert_fills_every_aligned_cube(grid: tuple[int, ...]) -> None:
    at = order.hilbert(grid).apply(order.coordinates(grid), 1)
    for side in (2, 4, 8):
        cubes = (at // side).view(len(grid), -1, side ** len(grid))
        assert (cubes == cubes[..., :1]).all()


@pytest.mark.parametrize("grid", [(45, 80), (13, 30, 45), (21, 30, 52)])
def test_hilbert_blocks_are_compact_on_any_grid(grid: tuple[int, ...]) -> None:
    at = order.hilbert(grid).apply(order.coordinates(grid), 1)
    assert at.diff(dim=1).abs().sum(0).double().mean() < 1.05
    blocks = at[:, : at.shape[1] // 128 * 128].view(len(grid), -1, 128)
    volume = (blocks.amax(-1) - blocks.amin(-1) + 1).prod(0)
    assert volume.double().mean() < 1.5 * 128


@settings(max_examples=40)
@given(grid=grids, text=texts, data=st.data())
def test_undo_is_the_exact_inverse(grid: tuple[int, ...], text: tuple[int, bool], data: st.DataObject) -> None:
    shared = {"text_tokens": text[0], "text_first": text[1]}
    tile = tuple(data.draw(st.integers(1, size)) for size in grid)
    letters = "".join(data.draw(st.permutations("THW"[-len(grid) :])))
    length = math.prod(grid) + text[0]
    x = torch.randn(2, length, 3)
    span = slice(0, text[0]) if text[1] else slice(math.prod(grid), None)
    for made in (order.tiles(grid, tile, **shared), order.axes(grid, letters, **shared), order.hilbert(grid, **shared)):
        assert made.to_ordered.dtype == torch.int64
        assert sorted(made.to_ordered.tolist()) == list(range(length))
        assert torch.equal(made.undo(made.apply(x, 1), 1), x)
        assert torch.equal(made.apply(made.undo(x, 1), 1), x)
        assert torch.equal(made.apply(x, 1)[:, span], x[:, span])
        assert torch.equal(made.to("cpu").apply(x.transpose(0, 1), 0), x.transpose(0, 1)[made.to_ordered])


def test_attention_does_not_see_the_order() -> None:
    q, k, v = torch.randn(3, 1, 2, 60, 8, dtype=torch.float64)
    made = order.tiles((3, 4, 5), (2, 2, 2))
    moved = [made.apply(x, 2) for x in (q, k, v)]
    attend = torch.nn.functional.scaled_dot_product_attention
    assert torch.allclose(made.undo(attend(*moved), 2), attend(q, k, v), atol=1e-12)


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: order.tiles((4, 4), (2,)), r"tile=\(2,\) does not fit the grid \(4, 4\)"),
        (lambda: order.tiles((4, 4), (2, 5)), r"one number from 1 to the grid's size"),
        (lambda: order.axes((4, 4), "TH"), "must be a permutation of 'HW'"),
        (lambda: order.hilbert(()), r"must be \(T, H, W\)"),
        (lambda: order.hilbert((3, 0)), "each at least 1"),
        (lambda: order.axes((4, 4), "WH", text_tokens=-1), "text_tokens=-1 must be 0 or more"),
    ],
)
def test_refusals(make, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()
