"""Windows against loops over the published formulas, in real models, and the figures that the papers quote for them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from dense import Edit, dense_attention, doubled, relative_norm
from probes import inputs_of
from tiny import FAMILIES, FRAMES, HEIGHT, LATENT_CHANNELS, PATCH, TEXT_TOKENS, WIDTH, noise, output
from torch import Tensor, nn

import steer
from steer import NeighborhoodAttention
from steer.methods.neighborhood import best_tile
from steer.select import SelectorError, is_active
from steer.sparse import Prepared, Tokens
from steer_kernels import patterns
from steer_patches.families.cosmos import COSMOS
from steer_patches.families.flux import FLUX
from steer_patches.families.hunyuan_video import HUNYUAN_VIDEO
from steer_patches.families.wan import WAN
from steer_patches.family import Family

VIDEO = (FRAMES, HEIGHT, WIDTH)
IMAGE = (1, HEIGHT, WIDTH)
ODD_VIDEO, ODD_IMAGE = (3, 5, 7), (1, 7, 9)
EXACT = 1e-12  # relative, in float64
VISIBLE = 1e-2
TEXT_FIRST = (TEXT_TOKENS, True)


def keys_of(i: int, size: int, window: int, stride: int = 1, dilation: int = 1) -> set[int]:
    """Keys that query `i` sees on an axis: the formulas of Generalized Neighborhood Attention, number by number."""
    if window * dilation > size:
        return set(range(size))
    group, at = i % dilation, i // dilation
    length = sum(1 for x in range(size) if x % dilation == group)
    left = window // 2
    right = window // 2 + window % 2 - 1
    leader = min(at // stride * stride + stride // 2, length - 1)
    start = max(leader - left, 0)
    if leader + right >= length:
        start += length - right - leader - 1
    return {group + dilation * key for key in range(start, start + window)}


def tiles_of(i: int, size: int, window: int, tile: int) -> set[int]:
    """Keys that query `i` sees on an axis under Sliding Tile Attention."""
    tile = min(tile, size)
    count = math.ceil(size / tile)
    tiles = keys_of(i // tile, count, window // tile)
    return {x for x in range(size) if x // tile in tiles}


def inward_of(i: int, size: int, half: int) -> set[int]:
    """FreeSwim's bounds."""
    low = i - half - max(0, half + i - size + 1)
    high = i + half + max(0, half - i)
    return {x for x in range(low, high + 1) if 0 <= x < size}


def boxes(grid: Sequence[int], axis_keys: Callable[[int, int, int], set[int]]) -> Tensor:
    """(S, S) bool in raster order; `axis_keys(axis, i, size)` are the keys that coordinate `i` sees on an axis."""
    seen = [[axis_keys(axis, i, size) for i in range(size)] for axis, size in enumerate(grid)]
    points = list(product(*map(range, grid)))
    return torch.tensor([[all(k in seen[a][q[a]] for a, k in enumerate(key)) for key in points] for q in points])


def windows(
    grid: Sequence[int], window: Sequence[int], stride: Sequence[int] = (1, 1, 1), dilation: Sequence[int] = (1, 1, 1)
) -> Tensor:
    return boxes(grid, lambda axis, i, size: keys_of(i, size, window[axis], stride[axis], dilation[axis]))


def disc(grid: Sequence[int], radius: float) -> Tensor:
    points = list(product(*map(range, grid[1:])))
    return torch.tensor([[(y - v) ** 2 + (x - u) ** 2 < radius**2 for v, u in points] for y, x in points])


def only(visual: Tensor, text: int = 0, text_first: bool = False, scale: float = 1.0) -> Edit:
    """A softmax over the visible visual keys and all text; of text queries over everything."""
    start, tokens = (text if text_first else 0), len(visual)
    keep = torch.ones(tokens + text, tokens + text, dtype=torch.bool)
    keep[start : start + tokens, start : start + tokens] = visual

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        return (scores * scale).masked_fill(~keep, -torch.inf).softmax(-1)

    return edit


def exact_model(name: str, grid: tuple[int, int, int] | None = None) -> tuple[nn.Module, dict[str, Any], list[str]]:
    """A tiny model in float64, its inputs, of another grid where one is given, and its self- and joint attention."""
    family = FAMILIES[name]
    model = family.build().double()
    kwargs = inputs_of(family, model)
    generator = torch.Generator().manual_seed(1)
    if grid is not None and name == "flux":
        kwargs["hidden_states"] = noise(generator, 2, grid[1] * grid[2], PATCH**2 * LATENT_CHANNELS)
        kwargs["img_ids"] = torch.cartesian_prod(*(torch.arange(float(size)) for size in grid))
    elif grid is not None:
        kwargs["hidden_states"] = noise(generator, 2, LATENT_CHANNELS, grid[0], PATCH * grid[1], PATCH * grid[2])
    names = [site.name for site in steer.sites(model) if site.kind in ("self", "joint")]
    return model, doubled(kwargs), names


def prepared(method: NeighborhoodAttention, grid: tuple[int, int, int], family: Family | None = None) -> Prepared:
    """What the method makes for a grid without text."""
    site = steer.sites(FAMILIES["wan21"].build())[0]
    return method.resolved(family, has_clock=True).make(Tokens(grid), site)


def visible(method: NeighborhoodAttention, grid: tuple[int, int, int]) -> Tensor:
    """(S, S) bool in raster order: what the method's mask lets a query see."""
    ready = prepared(method, grid)
    assert ready.mask is not None
    tokens = ready.mask.to_tokens()[0, 0]
    return tokens if ready.order is None else ready.order.undo(ready.order.undo(tokens, 0), 1)


@pytest.mark.parametrize(
    ("name", "grid", "method", "edit"),
    [
        (
            "wan21", ODD_VIDEO, {"window": (2, 3, 4), "stride": (2, 1, 3)},
            lambda: only(windows(ODD_VIDEO, (2, 3, 4), (2, 1, 3))),
        ),
        (
            "wan21", ODD_VIDEO, {"window": (3, 2, 3), "dilation": (1, 2, 2)},
            lambda: only(windows(ODD_VIDEO, (3, 2, 3), dilation=(1, 2, 2))),
        ),
        (
            "hunyuan_video", ODD_VIDEO, {"window": (2, 3, 5), "stride": (1, 2, 2)},
            lambda: only(windows(ODD_VIDEO, (2, 3, 5), (1, 2, 2)), TEXT_TOKENS),
        ),
        ("cogvideox", None, {"window": 3}, lambda: only(windows(VIDEO, (3, 3, 3)), *TEXT_FIRST)),
        ("flux", ODD_IMAGE, {"window": (3, 4)}, lambda: only(windows(ODD_IMAGE, (1, 3, 4)), *TEXT_FIRST)),
        ("flux", ODD_IMAGE, {"window": 2.5, "shape": "disc"}, lambda: only(disc(ODD_IMAGE, 2.5), *TEXT_FIRST)),
        (
            "wan21", ODD_VIDEO, {"window": (2, 4, 3), "tile": (1, 2, 3), "shape": "tiles"},
            lambda: only(boxes(ODD_VIDEO, lambda a, i, size: tiles_of(i, size, (2, 4, 3)[a], (1, 2, 3)[a]))),
        ),
        (
            "hunyuan_video", ODD_VIDEO, {"window": (2, 2, 6), "tile": (2, 2, 2), "shape": "tiles"},
            lambda: only(boxes(ODD_VIDEO, lambda a, i, size: tiles_of(i, size, (2, 2, 6)[a], 2)), TEXT_TOKENS),
        ),
        ("wan21", None, {"window": 2, "scale_factor": 1.3}, lambda: only(windows(VIDEO, (2, 2, 2)), scale=1.3)),
    ],
)  # fmt: skip
@pytest.mark.parametrize("tile", ["chosen", "raster"])
def test_models_see_the_published_windows(
    name: str, grid: tuple[int, int, int] | None, method: dict[str, Any], edit: Callable[[], Edit], tile: str
) -> None:
    """Text is padded on HunyuanVideo, first on CogVideoX and FLUX."""
    if tile == "raster" and "tile" not in method:
        method = method | {"tile": 1}
    model, kwargs, names = exact_model(name, grid)
    with dense_attention(model, names, edit()):
        wanted = output(model, kwargs)
    dense = output(model, kwargs)
    with steer.apply(model, NeighborhoodAttention(**method, block_size=8)):
        found = output(model, kwargs)
    assert relative_norm(found, wanted) < EXACT
    assert relative_norm(dense, wanted) > VISIBLE
    assert torch.equal(output(model, kwargs), dense)


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox", "flux"])
def test_the_whole_grid_is_dense(name: str) -> None:
    model, kwargs, _ = exact_model(name)
    dense = output(model, kwargs)
    settings: list[dict[str, Any]] = [{"window": FAMILIES[name].grid}, {"window": 99, "stride": 7, "dilation": 2}]
    settings += [{"window": (90, 90, 90), "tile": (3, 2, 5), "shape": "tiles"}]
    settings += [{"window": 50.0, "shape": "disc"}] if name == "flux" else []
    for setting in settings:
        with steer.apply(model, NeighborhoodAttention(**setting, block_size=8)) as handle:
            assert relative_norm(output(model, kwargs), dense) < EXACT
            assert handle.stats["methods"][0]["density"] == 1


def test_scale_factor_changes_the_chosen_heads_only() -> None:
    model, kwargs, names = exact_model("wan21")
    hot = only(windows(VIDEO, (2, 3, 3)), scale=1.5)

    def in_one_head(scores: Tensor, weights: Tensor) -> Tensor:
        changed = hot(scores, weights)
        return torch.stack([weights[:, 0], changed[:, 1]], 1)

    with dense_attention(model, names, in_one_head):
        wanted = output(model, kwargs)
    with steer.apply(model, NeighborhoodAttention(window=(2, 3, 3), scale_factor=1.5, heads=[1], block_size=8)):
        assert relative_norm(output(model, kwargs), wanted) < EXACT


@pytest.mark.parametrize("stride", [1, 2, 3])
@pytest.mark.parametrize("grid", [(4, 5, 6), (3, 4, 11)])
def test_every_query_sees_the_whole_window(grid: tuple[int, int, int], stride: int) -> None:
    counts = visible(NeighborhoodAttention(window=3, stride=stride, block_size=16), grid).sum(-1)
    assert (counts == 3**3).all()


def test_stride_of_the_window_is_blocked_attention() -> None:
    grid, size = (4, 6, 4), (2, 3, 2)
    seen = visible(NeighborhoodAttention(window=size, stride=size, block_size=12), grid)
    block_of = [tuple(x // w for x, w in zip(at, size, strict=True)) for at in product(*map(range, grid))]
    assert torch.equal(seen, torch.tensor([[a == b for b in block_of] for a in block_of]))
    ready = prepared(NeighborhoodAttention(window=size, stride=size, tile=size, block_size=12), grid)
    assert ready.mask is not None
    assert torch.equal(ready.mask.to_bool()[0, 0], torch.eye(8, dtype=torch.bool)) and not ready.mask.partial_num.any()


@pytest.mark.parametrize("grid", [(2, 9, 10), (1, 7, 5), (2, 4, 12)])
def test_inward_windows_of_freeswim(grid: tuple[int, int, int]) -> None:
    halves = (0, 2, 3)
    wanted = boxes(grid, lambda axis, i, size: inward_of(i, size, halves[axis]) if axis else set(range(size)))
    method = NeighborhoodAttention.inward(halves[1:], trained_tokens=30 * 52)
    assert torch.equal(visible(method, grid), wanted)
    assert method.scale_factor**2 == pytest.approx(1.094, abs=5e-4)
    assert method.steps == ":" and NeighborhoodAttention.inward(3, steps="0.5:").scale_factor == 1


def test_inward_windows_of_the_training_size_are_nearly_whole() -> None:
    ready = prepared(NeighborhoodAttention.inward((15, 26)), (2, 30, 52))
    assert ready.mask is not None and ready.mask.density == 1 and not ready.mask.partial_num.any()


def test_one_setting_for_all_sizes() -> None:
    """Axes that are shorter than the window are whole; a mask is never that of another size."""
    method = NeighborhoodAttention(window=(2, 4, 4), dilation=(1, 1, 2), block_size=8)
    for grid in [(3, 5, 9), (1, 3, 9), (5, 4, 6), (3, 5, 9)]:
        model, kwargs, names = exact_model("wan21", grid)
        with dense_attention(model, names, only(windows(grid, (2, 4, 4), dilation=(1, 1, 2)))):
            wanted = output(model, kwargs)
        with steer.apply(model, method):
            assert relative_norm(output(model, kwargs), wanted) < EXACT
    model, small, names = exact_model("wan21", (2, 5, 5))
    large = exact_model("wan21", (4, 5, 9))[1]
    with steer.apply(model, method):
        first, other, again = (output(model, kwargs) for kwargs in (small, large, small))
    assert torch.equal(first, again)
    with dense_attention(model, names, only(windows((4, 5, 9), (2, 4, 4), dilation=(1, 1, 2)))):
        assert relative_norm(other, output(model, large)) < EXACT


PUBLISHED = [
    # family, preset, grid, fraction of pairs, dense steps of all
    (HUNYUAN_VIDEO, "hunyuanvideo-18x24x24", (30, 48, 80), 18 * 24 * 24 / (30 * 48 * 80), (15, 50)),
    (HUNYUAN_VIDEO, "hunyuanvideo-30x40x40", (30, 48, 80), 40 * 40 / (48 * 80), (15, 50)),
    (FLUX, "flux-4k", (1, 256, 256), 80 * 80 / 256**2, (9, 28)),
    (COSMOS, "cosmos-7b", (16, 44, 80), 32 * 48 / (44 * 80), (12, 35)),
]


@pytest.mark.parametrize(("family", "preset", "grid", "pairs", "dense"), PUBLISHED)
def test_presets_are_perfectly_block_sparse(
    family: Family, preset: str, grid: tuple[int, int, int], pairs: float, dense: tuple[int, int]
) -> None:
    """In the tile that is chosen no block is partial, so the kernel pays for the visible pairs and for no others."""
    method = NeighborhoodAttention(preset=preset).resolved(family, has_clock=True)
    ready = prepared(NeighborhoodAttention(preset=preset), grid, family)
    assert ready.mask is not None and ready.order is not None
    assert ready.mask.density == pytest.approx(pairs) and not ready.mask.partial_num.any()
    raster = prepared(NeighborhoodAttention(preset=preset, tile=1), grid, family)
    assert raster.order is None and raster.mask is not None and raster.mask.density > 1.7 * pairs
    off, steps = dense
    assert [is_active(method.steps, step, steps) for step in range(steps)] == [step >= off for step in range(steps)]


def test_the_first_preset_is_the_default() -> None:
    method = NeighborhoodAttention().resolved(HUNYUAN_VIDEO, has_clock=True)
    assert isinstance(method, NeighborhoodAttention)
    assert (method.window, method.stride, method.dilation, method.steps) == ((18, 24, 24), (16, 8, 8), 1, "0.3:")
    mine = NeighborhoodAttention(window=9).resolved(HUNYUAN_VIDEO, has_clock=True)
    assert isinstance(mine, NeighborhoodAttention) and (mine.window, mine.stride, mine.dilation) == (9, 1, 1)


HUNYUAN_BOUND = {"grid": (30, 48, 80), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
FLUX_BOUND = {"grid": (256, 256), "q_tile": (16, 16), "kv_tile": (16, 8)}
COSMOS_BOUND = {"grid": (16, 44, 80), "q_tile": (4, 4, 16), "kv_tile": (2, 4, 16)}


@pytest.mark.parametrize(
    ("shape", "window", "stride", "share", "dense", "published"),
    [
        (HUNYUAN_BOUND, (18, 24, 24), (16, 8, 8), 0.607, 0, 2.23),
        (HUNYUAN_BOUND, (18, 24, 24), (16, 8, 8), 0.607, 15 / 50, 1.63),
        (HUNYUAN_BOUND, (30, 40, 40), (1, 32, 8), 0.607, 0, 1.53),
        (HUNYUAN_BOUND, (30, 40, 40), (1, 32, 8), 0.607, 15 / 50, 1.30),
        (FLUX_BOUND, (80, 80), (16, 16), 0.518, 0, 1.82),
        (FLUX_BOUND, (80, 80), (16, 16), 0.518, 9 / 28, 1.45),
        (COSMOS_BOUND, (16, 32, 48), (1, 8, 16), 0.587, 0, 1.46),
        (COSMOS_BOUND, (16, 32, 48), (1, 8, 16), 0.587, 12 / 35, 1.26),
    ],
)
def test_published_times_stay_just_below_the_bound(
    shape: dict[str, Any], window: Sequence[int], stride: Sequence[int], share: float, dense: float, published: float
) -> None:
    """End to end, with attention's share of the run and the steps that stay dense: at most 4 % are lost."""
    bound = patterns.speedup_bound(**shape, window=window, stride=stride)
    end_to_end = 1 / (dense + (1 - dense) * (1 - share + share / bound))
    assert 0.96 * end_to_end < published < end_to_end + 0.005


@pytest.mark.parametrize(
    ("shape", "window", "share", "published"),
    [(HUNYUAN_BOUND, (18, 24, 24), 0.607, 1.73), (FLUX_BOUND, (80, 80), 0.518, 1.76)],
)
def test_published_bounds_end_to_end(shape: dict[str, Any], window: Any, share: float, published: float) -> None:
    bound = patterns.speedup_bound(**shape, window=window)
    assert 1 / (1 - share + share / bound) == pytest.approx(published, abs=0.006)


def test_tiles_are_chosen_by_the_blocks_they_leave() -> None:
    method = NeighborhoodAttention(window=(5, 7, 9), block_size=16).resolved(None, has_clock=True)
    assert isinstance(method, NeighborhoodAttention)
    windows_there, tile = method.windows_on((9, 13, 20))
    densities = {
        sides: windows_there.mask(sides).density
        for sides in product((1, 2, 4, 8), (1, 2, 4, 8), (1, 2, 4, 8, 16))
        if math.prod(sides) == 16
    }
    assert tile is not None and densities[tile] == min(densities.values()) < windows_there.mask(None).density
    whole, _ = NeighborhoodAttention(window=99, stride=1, dilation=1, block_size=16).windows_on((9, 13, 20))
    assert best_tile(whole) is None, "raster order is as good, and needs no permutation"


def test_saved_settings_are_replayed(tmp_path: Any) -> None:
    for method in (
        NeighborhoodAttention(window=[3, 4, 5], stride=(1, 2, 2)),
        NeighborhoodAttention.sliding_tile((2, 4, 4), (1, 2, 2)),
        NeighborhoodAttention.circular(16, scale_factor=1.1),
        NeighborhoodAttention.inward((3, 4)),
    ):
        method.save(str(tmp_path))
        assert steer.load(str(tmp_path)) == method


@pytest.mark.parametrize(
    ("make", "says"),
    [
        (lambda: NeighborhoodAttention(window=(3, 4, 5, 6)), r"window=\(3, 4, 5, 6\) must be whole numbers"),
        (lambda: NeighborhoodAttention(window=0), "window=0 must be whole numbers from 1"),
        (lambda: NeighborhoodAttention(window=2.5), "window=2.5 must be whole numbers"),
        (lambda: NeighborhoodAttention(window=4, dilation=(1, 0, 1)), r"dilation=\(1, 0, 1\) must be"),
        (lambda: NeighborhoodAttention(window=(9, 2, 4), stride=(1, 2, 8)), "need stride <= window"),
        (lambda: NeighborhoodAttention(window=4, shape="ball"), "choose from box, tiles, disc"),
        (lambda: NeighborhoodAttention(window=4, scale_factor=0), "scale_factor=0 must be above 0"),
        (lambda: NeighborhoodAttention(window=4, shape="tiles"), "needs window= and tile="),
        (lambda: NeighborhoodAttention.sliding_tile((4, 4, 6), (2, 2, 4)), "must be a multiple of tile"),
        (lambda: NeighborhoodAttention.sliding_tile((4, 4, 4), 2, stride=2), "neither stride nor dilation"),
        (lambda: NeighborhoodAttention.circular(0), "must be the radius"),
        (lambda: NeighborhoodAttention.circular((3, 4)), "must be the radius"),
    ],
)  # fmt: skip
def test_refused_settings(make: Callable[[], NeighborhoodAttention], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        make()


def test_refused_models() -> None:
    with pytest.raises(
        SelectorError, match=r"no preset for Wan 2.1 / 2.2: give a window.* such as window=\(9, 24, 24\)"
    ):
        steer.apply(FAMILIES["wan21"].build(), NeighborhoodAttention())
    with pytest.raises(SelectorError, match=r"HunyuanVideo 1.5"):
        steer.apply(FAMILIES["hunyuan_video15"].build(), NeighborhoodAttention())
    with pytest.raises(SelectorError, match=r"no preset for SD3.* such as window=\(32, 32\)"):
        steer.apply(FAMILIES["sd3"].build(), NeighborhoodAttention())
    with pytest.raises(SelectorError, match='makes videos, and shape="disc"'):
        NeighborhoodAttention.circular(3).resolved(WAN, has_clock=True)


def test_discs_cannot_hide_padded_text() -> None:
    model = FAMILIES["qwen_image"].build()
    says = r"transformer_blocks\.0\.attn hides padded text by a mask, which the discs"
    with steer.apply(model, NeighborhoodAttention.circular(3)), pytest.raises(ValueError, match=says):
        output(model, inputs_of(FAMILIES["qwen_image"], model))


def test_an_image_of_one_row_is_refused() -> None:
    """What FLUX says of a sequence whose reference images are of another width."""
    model, kwargs, _ = exact_model("flux", (1, 1, 24))
    says = "24 visual tokens are known as one row"
    with steer.apply(model, NeighborhoodAttention(window=(3, 3))), pytest.raises(ValueError, match=says):
        output(model, kwargs)
