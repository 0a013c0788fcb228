"""What the tab of kernels shows: the mask that the pattern builds, what a token sees in it, and its figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageColor

import steer
from steer_demos.app import kernels, kernels_form, kernels_measure, kernels_pictures
from steer_demos.app.jobs import Job, Stopped
from steer_demos.app.kernels_pictures import COLOURS, HIDDEN, LEFT_OUT, QUERY, SEEN, Explored, Sheet
from steer_kernels import BlockMask, order, patterns

GRID = (3, 6, 8)
SMALL: dict[str, dict[str, Any]] = {  # settings that say something on such a grid, with text
    "neighborhood": {"window": [1, 3, 5], "tile": [2, 3, 4]},
    "sliding_tile": {"tile": [1, 3, 4], "window": [1, 3, 4], "text_first": True},
    "radial": {"decay": 0.3, "key_frame_sink": True},
    "frames": {"reach": 0},
    "diagonal": {"width": 9},
    "multi_diagonal": {"width": 3},
    "sink_window": {"sink": 4, "window": 20},
    "a_shape": {"sink": 8, "window": 30},
    "vertical_stripes": {"columns": "0, 17, 90", "width": 4},
    "power_of_two": {"window_blocks": 1},
    "circular": {"radius": 2.5},
}


def small(pattern: str) -> Explored:
    grid = (1, *GRID[1:]) if kernels_form.of_pictures(pattern) else GRID
    return kernels_pictures.explore(pattern, SMALL[pattern], grid, 10, 16)


def seen_directly(explored: Explored, query: tuple[int, int, int]) -> set[int]:
    """The tokens, in their original order, that `to_tokens` of the whole mask shows to a query."""
    raster = explored.first + (query[0] * explored.grid[1] + query[1]) * explored.grid[2] + query[2]
    mask = explored.mask.to_tokens()[0, 0]
    if explored.order is not None:
        mask = explored.order.undo(explored.order.undo(mask, 0), 1)
    return set(mask[raster].nonzero().flatten().tolist())


def test_every_pattern_has_a_form_and_small_settings_here() -> None:
    assert set(kernels_form.names()) == set(SMALL)
    assert "speedup_bound" not in kernels_form.names()
    with pytest.raises(ValueError, match=r"no pattern 'speedup_bound'; there are .*radial"):
        kernels_form.arguments("speedup_bound")


def test_a_new_pattern_gets_a_form_from_its_signature(monkeypatch: pytest.MonkeyPatch) -> None:
    def checkered(
        *, q_len: int, every: int, fine: float = 0.5, odd: bool = False, block_size: int = 128, device: str = "cpu"
    ) -> BlockMask:
        """Every so many blocks.

        Args:
            q_len: tokens.
            every: distance in blocks.
            fine, odd: see `radial`.
        """
        blocks = torch.arange(-(-q_len // block_size))
        keep = (blocks[:, None] - blocks) % every == odd
        return BlockMask.from_bool(keep[None, None], block_size, q_len=q_len, kv_len=q_len)

    monkeypatch.setattr(patterns, "checkered", checkered, raising=False)
    monkeypatch.setattr(patterns, "__all__", [*patterns.__all__, "checkered"])
    kernels_form.names.cache_clear()
    try:
        asked = {argument.name: argument for argument in kernels_form.arguments("checkered")}
        assert list(asked) == ["every", "fine", "odd"]
        assert asked["every"].help == "distance in blocks." and asked["every"].required and asked["every"].whole
        assert (asked["fine"].kind, asked["fine"].whole, asked["odd"].kind) == ("number", False, "flag")
        found = kernels_pictures.explore("checkered", {"every": 3}, (1, 8, 16), 0, 16)
        assert found.mask.density == pytest.approx(22 / 64)
    finally:
        kernels_form.names.cache_clear()


@pytest.mark.parametrize("pattern", SMALL)
def test_what_a_query_sees_is_what_the_mask_of_tokens_says(pattern: str) -> None:
    explored = small(pattern)
    for query in [(0, 0, 0), (explored.grid[0] - 1, 3, 5)]:
        visual, text = explored.levels(query)
        raster = np.concatenate([text, visual.ravel()] if explored.first else [visual.ravel(), text])
        assert set(np.flatnonzero(raster == SEEN).tolist()) == seen_directly(explored, query)
        computed = explored.mask.to_bool()[0, 0, explored.place(query) // 16].repeat_interleave(16)
        assert int((raster != LEFT_OUT).sum()) == int(computed[: explored.mask.kv_len].sum())


@pytest.mark.parametrize("pattern", ["neighborhood", "sliding_tile", "circular"])
def test_the_picture_of_a_query_shows_each_token_at_its_place(pattern: str) -> None:
    explored = small(pattern)
    query, sheet = (explored.grid[0] - 1, 3, 5), Sheet.of(explored.grid)
    visual, text = explored.levels(query)
    picture = sheet.draw(visual, text, query)
    for token in np.ndindex(*explored.grid):
        x, y = sheet.corner(token[0])
        x, y = x + token[2] * sheet.cell + sheet.cell // 2, y + token[1] * sheet.cell + sheet.cell // 2
        wanted = QUERY if token == query else COLOURS[int(visual[token])]
        assert picture.getpixel((x, y)) == ImageColor.getrgb(wanted)
        assert sheet.token(x, y) == token
    assert sheet.token(0, 0) is None


def test_sheets_fit_the_page() -> None:
    for grid in [(1, 64, 64), (8, 16, 24), (33, 45, 80), (64, 45, 45), (1, 1, 1)]:
        sheet = Sheet.of(grid)
        picture = sheet.draw(np.zeros(grid, np.uint8), np.zeros(256, np.uint8), (0, 0, 0))
        assert sheet.cell >= 1 and picture.width <= 1100 and picture.height <= 1100


def test_the_picture_of_a_small_mask_shows_its_tokens_and_of_a_large_one_its_blocks() -> None:
    explored = small("radial")
    shown = np.asarray(kernels_pictures.of_mask(explored, (0, 0, 0)))
    zoom, above = 640 // 154, shown.shape[0] - 154 * (640 // 154)
    cells = shown[above + zoom // 2 :: zoom, 12 + zoom // 2 :: zoom]
    seen = (cells == ImageColor.getrgb(COLOURS[SEEN])).all(-1)
    assert np.array_equal(seen, explored.mask.to_tokens()[0, 0].numpy())
    large = kernels_pictures.explore("neighborhood", {"window": [1, 5, 5]}, (4, 16, 16), 0, 64)
    shown = np.asarray(kernels_pictures.of_mask(large, (0, 0, 0)))
    side = 640 // 256 * 256
    cells = shown[shown.shape[0] - side + 16 * side // 256 // 2 :: side // 16, 12 + side // 32 :: side // 16][:16, :16]
    for level, wanted in (
        (SEEN, large.mask.to_bool() & ~large.mask.partial_bool()),
        (HIDDEN, large.mask.partial_bool()),
    ):
        drawn = (np.abs(cells.astype(int) - ImageColor.getrgb(COLOURS[level])) <= 2).all(-1)
        assert np.array_equal(drawn, wanted[0, 0].numpy())


@pytest.mark.parametrize("pattern", SMALL)
def test_the_figures_are_those_of_the_mask_built_directly(pattern: str) -> None:
    explored = small(pattern)
    names: dict[str, Any] = {}
    exec(kernels.python(explored), names)
    mask: BlockMask = names["mask"]
    figures = kernels_measure.figures(explored, (0, 2, 3), 0.5)
    computed = int((mask.full_num + mask.partial_num).sum())
    assert figures["density"] == f"**{mask.density:.2%}** of the blocks are computed"
    assert figures["blocks"].startswith(f"{computed:,} of {mask.shape[-2]} × {mask.shape[-1]}; in ")
    assert figures["pairs of tokens seen"] == f"{float(mask.to_tokens().float().mean()):.2%}"
    assert figures["attention, at best"].startswith(f"**{1 / mask.density:.2f} times**")
    step = 1 / (0.5 + 0.5 * mask.density)
    assert figures["a whole step, at best"].startswith(f"{step:.2f} times")
    sees = len(seen_directly(explored, (0, 2, 3)))
    assert figures["frame 0, row 2, column 3"].startswith(f"sees {sees:,} of {mask.kv_len} tokens")


def test_the_code_places_the_tokens_of_a_tiled_mask() -> None:
    explored, names = small("sliding_tile"), {}
    exec(kernels.python(explored), names)
    assert torch.equal(names["placed"].to_ordered, explored.order.to_ordered)
    assert torch.equal(
        explored.order.to_ordered, order.tiles(GRID, (1, 3, 4), text_tokens=10, text_first=True).to_ordered
    )


def test_the_share_of_pairs_of_a_long_sequence_is_close() -> None:
    explored = kernels_pictures.explore("frames", {"reach": 1}, (16, 16, 16), 0, 64)
    share, exact = kernels_measure.seen_share(explored)
    assert not exact
    assert share == pytest.approx((16 * 3 - 2) / 16**2, rel=0.02)


def test_hunyuanvideo_is_drawn_and_more_is_refused() -> None:
    grid, text, text_first = kernels_measure.published("hunyuanvideo")
    assert (grid, text, text_first) == ((33, 45, 80), 256, False)
    explored = kernels_pictures.explore("radial", {"decay": 0.95, "key_frame_sink": False}, grid, text, 128)
    wanted = patterns.radial(tokens_per_frame=3600, frames=33, decay=0.95, key_frame_sink=False, text_tokens=256)
    assert torch.equal(explored.mask.to_bool(), wanted.to_bool())
    with pytest.raises(ValueError, match=r"204,800 tokens in blocks of 128 are too many to draw here: at most 131,072"):
        kernels_pictures.explore("radial", {}, (50, 64, 64), 0, 128)
    with pytest.raises(ValueError, match=r"blocks of 16 are too many"):
        kernels_pictures.explore("radial", {}, grid, text, 16)


def test_published_grids() -> None:
    assert kernels_measure.published("wan2.1-14b") == ((21, 45, 80), 0, False)  # its text is in cross-attention
    assert kernels_measure.published("cogvideox-2b") == ((13, 30, 45), 226, True)


def test_attention_share_is_that_of_the_simulation() -> None:
    found = steer.simulate("emoji-wan", steer.RadialAttention())
    assert kernels_measure.attention_share("emoji-wan") == pytest.approx(found.attention_share)


@pytest.mark.parametrize(
    ("pattern", "settings", "words"),
    [
        (
            "radial",
            {"window": 3},
            "radial has no argument 'window' in its form; it has decay, key_frame_sink, text_first",
        ),
        ("radial", {"decay": 99}, "decay=99 must be a number from 0 to 2"),
        ("radial", {"decay": True}, "decay=True must be a number"),
        ("radial", {"key_frame_sink": 1}, "key_frame_sink=1 must be true or false"),
        ("frames", {"reach": 1.5}, "reach=1.5 must be a whole number"),
        ("vertical_stripes", {"columns": "1, x"}, "columns must be whole numbers with commas"),
        ("vertical_stripes", {"columns": [1, True]}, "columns must be whole numbers"),
        ("neighborhood", {"window": [9, 3, 3]}, "window=9 with dilation=1 on an axis of 3"),
        ("sliding_tile", {"window": [1, 5, 4], "tile": [1, 3, 4]}, "must be a multiple of tile"),
        ("circular", {}, r"circular needs grid=\(H, W\)"),
    ],
)
def test_what_cannot_be_is_said(pattern: str, settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernels_pictures.explore(pattern, settings, GRID, 0, 16)


@pytest.mark.parametrize(
    ("grid", "text", "words"),
    [((0, 1, 1), 0, "0 frames cannot be"), ((1, 1, 1), -1, "-1 text tokens cannot be")],
)
def test_grids_that_cannot_be(grid: tuple[int, int, int], text: int, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        kernels_pictures.explore("frames", {}, grid, text, 16)


def test_a_window_that_is_left_out_is_a_multiple_of_the_tile_that_is_given() -> None:
    explored = kernels_pictures.explore("sliding_tile", {"tile": [1, 1, 5]}, (6, 12, 20), 0, 16)
    assert explored.arguments["window"] == (3, 5, 5)
    with pytest.raises(ValueError, match="must be at least 1"):
        kernels_pictures.explore("sliding_tile", {"tile": [0, 1, 5]}, (6, 12, 20), 0, 16)
    with pytest.raises(ValueError, match="tile='5' must be a number"):
        kernels_pictures.explore("sliding_tile", {"tile": "5"}, (6, 12, 20), 0, 16)


def test_a_picture_takes_the_last_two_of_three_axes() -> None:
    settings = {"window": [1, 3, 5], "causal": [True, False, False]}
    explored = kernels_pictures.explore("neighborhood", settings, (1, 6, 8), 0, 16)
    wanted = patterns.neighborhood(grid=(6, 8), window=(3, 5), block_size=16)
    assert torch.equal(explored.mask.to_tokens(), wanted.to_tokens())


def test_an_empty_field_is_said() -> None:
    for wrong in (None, 2.5, float("nan")):
        with pytest.raises(ValueError, match=f"Height is {wrong}: give a whole number"):
            kernels.explored_of("frames", 2, wrong, 2, 0, "64", {})
    with pytest.raises(ValueError, match="block_size=63 is none of 16, 32"):
        kernels.explored_of("frames", 2, 2, 2, 0, "63", {})


def test_a_query_outside_of_the_grid_and_a_share_that_is_none() -> None:
    explored = small("radial")
    with pytest.raises(ValueError, match="the query's row is 6; the grid has rows 0 to 5"):
        explored.levels((0, 6, 0))
    with pytest.raises(ValueError, match=r"attention_share=1\.5 must be a fraction"):
        kernels_measure.figures(explored, (0, 0, 0), 1.5)


def test_settings_are_moved_into_a_smaller_grid_and_to_another_pattern() -> None:
    given = {"window": [7, 9, 9], "stride": [1, 2, 2], "tile": [0, 0, 0], "text_first": True, "nothing": 1}
    assert kernels_form.fit("neighborhood", given, (4, 6, 20)) == {
        **{"window": [4, 6, 9], "stride": [1, 2, 2], "tile": [0, 0, 0], "text_first": True}
    }
    assert kernels_form.fit("sliding_tile", given | {"tile": [2, 4, 4]}, (8, 16, 16)) == {
        **{"window": [6, 8, 8], "tile": [2, 4, 4], "text_first": True}
    }
    assert kernels_form.fit("sink_window", given, (4, 6, 20)) == {}
    assert kernels_form.fit("neighborhood", {"window": [5, 7]}, (1, 16, 16))["window"][-2:] == [5, 7]


@pytest.mark.parametrize("pattern", SMALL)
@pytest.mark.parametrize("grid", [(8, 16, 24), (1, 1, 1), (1, 64, 128), (33, 45, 80), (5, 7, 3)])
def test_the_form_starts_with_what_can_be_drawn(pattern: str, grid: tuple[int, int, int]) -> None:
    grid = (1, *grid[1:]) if kernels_form.of_pictures(pattern) else grid
    kernels_pictures.explore(pattern, {}, grid, 0, 128)


@pytest.mark.parametrize("label", kernels.EXAMPLES)
def test_examples_can_be_drawn(label: str) -> None:
    given = kernels.EXAMPLES[label]
    names = ("pattern", "frames", "height", "width", "text_tokens", "block_size", "settings")
    explored = kernels.explored_of(*(given[name] for name in names))
    query = (given["frame"], given["row"], given["column"])
    assert 0 < explored.mask.density < 0.6
    assert isinstance(kernels_pictures.of_mask(explored, query), Image.Image)


@pytest.mark.parametrize("pattern", ["sliding_tile", "sink_window", "circular"])
def test_measuring_compares_with_dense_attention_under_the_same_mask(pattern: str) -> None:
    found = kernels_measure.measure(small(pattern), Job())
    assert float(found["largest error"].split()[0]) < 1e-5
    assert found["density"] == f"{small(pattern).mask.density:.2%}"
    assert ("dense attention, causal" in found) == (pattern == "sink_window")
    assert "block_sparse_attention (gather)" in found or torch.cuda.is_available()


def test_measuring_can_be_stopped_and_long_sequences_are_refused() -> None:
    class Second(Job):
        def step(self, done: int, total: int, what: str) -> None:
            if done == 1:
                self.stop()
            super().step(done, total, what)

    with pytest.raises(Stopped):
        kernels_measure.measure(small("radial"), Second())
    with pytest.raises(ValueError, match="8,208 tokens take too long to measure here: at most 8,192"):
        kernels_measure.measure(kernels_pictures.explore("frames", {}, (9, 24, 38), 0, 64), Job())
