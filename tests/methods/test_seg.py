"""SEG: its blur against loops over pixels, its infinite limit, and the models it runs on."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from dense import dense_attention, doubled, relative_norm, softmax_map
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import SEG
from steer.methods.seg import blur
from steer_patches.site import Call, Layout, Scope, Site

VISIBLE = 1e-3


def reflected(index: int, length: int) -> int:
    """Position of a pixel outside the picture, mirrored at the border pixel (which is not repeated)."""
    if index < 0:
        index = -index
    return 2 * (length - 1) - index if index >= length else index


def gaussian(sigma: float, length: int) -> list[float]:
    """The card: ceil(6 sigma) taps, one more if even, capped to the length (one more if even), summing to one."""
    size = math.ceil(6 * sigma)
    size += size % 2 == 0
    size = min(size, length if length % 2 else length + 1)
    taps = [math.exp(-0.5 * ((i - (size - 1) / 2) / sigma) ** 2) for i in range(size)]
    return [tap / sum(taps) for tap in taps]


def blurred_by_loops(picture: np.ndarray, sigma: float) -> np.ndarray:
    """A picture (h, w) under the two-dimensional kernel, pixel by pixel, in fp64."""
    h, w = picture.shape
    high, wide = gaussian(sigma, h), gaussian(sigma, w)
    out = np.zeros((h, w))
    for y in range(h):
        for x in range(w):
            for i, a in enumerate(high):
                for j, b in enumerate(wide):
                    source = picture[reflected(y + i - len(high) // 2, h), reflected(x + j - len(wide) // 2, w)]
                    out[y, x] += a * b * source
    return out


def random_queries(grid: tuple[int, int, int], extra: int = 0) -> Tensor:
    tokens = math.prod(grid) + extra
    return torch.randn(2, 2, tokens, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)


GRIDS = [(1, 8, 8), (1, 7, 7), (1, 4, 6), (1, 5, 9), (1, 6, 2), (1, 2, 2), (1, 3, 1), (3, 4, 5)]


@pytest.mark.parametrize("sigma", [0.3, 1.0, 2.0, 50.0, 9999.0])
@pytest.mark.parametrize("grid", GRIDS, ids=str)
def test_blur_equals_loops_over_pixels(grid: tuple[int, int, int], sigma: float) -> None:
    queries = random_queries(grid)
    result = blur(queries, grid, sigma).reshape(2, 2, *grid, 3)
    given = queries.reshape(2, 2, *grid, 3).numpy()
    for b, head, frame, channel in np.ndindex(2, 2, grid[0], 3):
        wanted = blurred_by_loops(given[b, head, frame, :, :, channel], sigma)
        assert np.abs(result[b, head, frame, :, :, channel].numpy() - wanted).max() <= 1e-12


@pytest.mark.parametrize("sigma", [0.5, 3.0, 100.0])
def test_constant_queries_stay_constant(sigma: float) -> None:
    queries = torch.tensor([2.0, -1.0, 0.5], dtype=torch.float64).expand(1, 2, 24, 3)
    assert (blur(queries, (1, 4, 6), sigma) - queries).abs().max() <= 1e-14


def test_blur_keeps_frames_apart() -> None:
    queries = random_queries((3, 4, 5))
    changed = queries.clone()
    changed[:, :, 20:40] += 1.0
    same = [slice(0, 20), slice(40, 60)]
    a, b = blur(queries, (3, 4, 5), 2.0), blur(changed, (3, 4, 5), 2.0)
    assert all(torch.equal(a[:, :, frame], b[:, :, frame]) for frame in same)
    assert not torch.equal(a[:, :, 20:40], b[:, :, 20:40])


def call_of(grid: tuple[int, int, int], text: int = 0, text_first: bool = False, mask: Tensor | None = None) -> Call:
    generator = torch.Generator().manual_seed(1)
    tokens = math.prod(grid) + text
    scope = Scope()
    scope.layout = Layout(math.prod(grid), grid, text_first)
    site = Site("block.attn", 0, "joint" if text else "self", 2, 2, 3, "test", scope=scope)
    key, value = (torch.randn(2, 2, tokens, 3, generator=generator, dtype=torch.float64) for _ in range(2))
    return Call(random_queries(grid, text), key, value, mask, None, False, site, 0)


def attention(call: Call) -> Tensor:
    return softmax_map(call.query, call.key, call.mask, scale=call.scale)[1] @ call.value


@pytest.mark.parametrize("masked", [False, True])
def test_infinite_sigma_gives_every_row_the_attention_of_the_mean_query(masked: bool) -> None:
    mask = None
    if masked:
        mask = torch.ones(2, 1, 1, 24, dtype=torch.bool)
        mask[1, ..., -5:] = False
    call = call_of((1, 4, 6), mask=mask)
    sizes: list[int] = []

    def counted(c: Call) -> Tensor:
        sizes.append(c.query.shape[2])
        return attention(c)

    result = SEG(layers="*").attend(call, counted)
    wanted = attention(call.replace(query=call.query.mean(2, keepdim=True)))
    assert sizes == [1]  # one query a head is computed
    assert result.shape == call.query.shape
    assert relative_norm(result, wanted.expand_as(result)) <= 1e-12
    assert torch.equal(result, result[:, :, :1].expand_as(result))


def test_infinite_sigma_with_a_mask_that_differs_by_query() -> None:
    mask = torch.rand(2, 1, 24, 24, generator=torch.Generator().manual_seed(2)) > 0.3
    call = call_of((1, 4, 6), mask=mask)
    wanted = attention(call.replace(query=call.query.mean(2, keepdim=True).expand_as(call.query)))
    assert relative_norm(SEG(layers="*").attend(call, attention), wanted) <= 1e-12


def test_a_large_sigma_on_a_small_grid_tends_to_flat_taps() -> None:
    """The largest finite sigma is a box over the capped kernel, not yet the mean: the reference's threshold is 9999."""
    queries = random_queries((1, 5, 5))
    mean = queries.mean(2, keepdim=True).expand_as(queries)
    assert relative_norm(blur(queries, (1, 5, 5), 9999.0), mean) > VISIBLE
    call = call_of((1, 5, 5))
    infinite = SEG(layers="*", sigma=math.inf).attend(call, attention)
    assert torch.equal(SEG(layers="*", sigma=1e6).attend(call, attention), infinite)


@pytest.mark.parametrize("sigma", [math.inf, 1.5])
@pytest.mark.parametrize("text_first", [False, True])
def test_text_queries_of_joint_attention_stay(text_first: bool, sigma: float) -> None:
    call = call_of((1, 4, 6), text=7, text_first=text_first)
    image, text = (slice(7, 31), slice(0, 7)) if text_first else (slice(0, 24), slice(24, 31))
    seen: list[Call] = []

    def spy(c: Call) -> Tensor:
        seen.append(c)
        return attention(c)

    result = SEG(layers="*", sigma=sigma).attend(call, spy)
    (passed,) = seen
    assert torch.equal(passed.query[:, :, text], call.query[:, :, text])
    assert passed.key is call.key
    assert passed.value is call.value
    assert torch.equal(result[:, :, text], attention(call)[:, :, text])
    queries = call.query[:, :, image]
    wanted = queries.mean(2, keepdim=True).expand_as(queries) if sigma == math.inf else blur(queries, (1, 4, 6), sigma)
    assert torch.equal(passed.query[:, :, image], wanted)


@pytest.mark.parametrize("sigma", [math.inf, 1.5])
def test_other_heads_stay_bit_identical(sigma: float) -> None:
    call = call_of((1, 4, 6)).replace(heads=torch.tensor([True, False])[:, None, None])
    result, plain = SEG(layers="*", sigma=sigma).attend(call, attention), attention(call)
    assert torch.equal(result[:, 1], plain[:, 1])
    assert not torch.equal(result[:, 0], plain[:, 0])


@pytest.mark.parametrize("settings", [{"scale": 0.0}, {"sigma": 0.0}, {"sigma": 0.1}, {"heads": []}], ids=str)
def test_neutral_settings_are_bit_identical(settings: dict[str, Any]) -> None:
    pipe, tiny = PIPELINES["sd15"].build(), PIPELINES["sd15"]
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, SEG(layers="mid_block", **settings)) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)
        assert handle.stats["methods"] == []


def test_sigma_towards_zero_is_the_identity() -> None:
    queries = random_queries((1, 4, 6))
    assert torch.equal(blur(queries, (1, 4, 6), 0.0), queries)
    assert relative_norm(blur(queries, (1, 4, 6), 0.17), queries) <= 1e-6  # three taps, the outer ones all but zero


# Models: the perturbed pass is repeated by hand, with the queries replaced at the module's own SDPA call.


def weak_by_hand(model: Any, name: str, inputs: dict[str, Any], grid: tuple[int, int, int], sigma: float) -> Tensor:
    def change(query: Tensor) -> Tensor:
        if sigma == math.inf:
            return query.mean(2, keepdim=True).expand_as(query)
        t, h, w = grid
        maps = query.unflatten(2, grid).permute(0, 1, 2, 5, 3, 4).reshape(-1, h, w)
        done = torch.tensor(np.stack([blurred_by_loops(m, sigma) for m in maps.numpy()]))
        return done.reshape(*query.shape[:2], t, -1, h, w).permute(0, 1, 2, 4, 5, 3).reshape(query.shape)

    with dense_attention(model, [name], change_query=change):
        return output(model, dict(inputs))


@pytest.mark.parametrize("sigma", [math.inf, 1.0])
@pytest.mark.parametrize(
    "site,grid",
    [
        ("down_blocks.0.attentions.0.transformer_blocks.0.attn1", (1, 9, 13)),
        ("mid_block.attentions.0.transformer_blocks.0.attn1", (1, 3, 4)),
        ("up_blocks.1.attentions.0.transformer_blocks.0.attn1", (1, 5, 7)),
        ("up_blocks.2.attentions.1.transformer_blocks.0.attn1", (1, 9, 13)),
    ],
)
def test_unet_levels_with_odd_latents(site: str, grid: tuple[int, int, int], sigma: float) -> None:
    """9 x 13 latents are 5 x 7 and 3 x 4 one and two levels down."""
    model = FAMILIES["sd15"].build().double()
    generator = torch.Generator().manual_seed(0)
    inputs = {
        "sample": torch.randn(2, 4, 9, 13, generator=generator, dtype=torch.float64),
        "timestep": 500,
        "encoder_hidden_states": torch.randn(2, 7, 32, generator=generator, dtype=torch.float64),
    }
    cond = output(model, dict(inputs))
    weak = weak_by_hand(model, site, inputs, grid, sigma)
    with steer.apply(model, SEG(scale=2.0, sigma=sigma, layers=site)):
        guided = output(model, dict(inputs))
    assert relative_norm(weak, cond) > VISIBLE
    assert relative_norm(guided, cond + 2.0 * (cond - weak)) <= 1e-10


@pytest.mark.parametrize("sigma", [math.inf, 1.0])
@pytest.mark.parametrize(
    "name,site",
    [
        ("wan21", "blocks.1.attn1"),
        ("ltx", "transformer_blocks.1.attn1"),
        ("animatediff", "mid_block.attentions.0.transformer_blocks.0.attn1"),
    ],
)
def test_video_models(name: str, site: str, sigma: float) -> None:
    """A finite blur runs over each frame on its own; the infinite one over all tokens of the sequence."""
    family = FAMILIES[name]
    model = family.build().double()
    inputs = doubled(family.inputs(model))
    grid = (1, 2, 3) if name == "animatediff" else family.grid
    cond = output(model, dict(inputs))
    weak = weak_by_hand(model, site, inputs, grid, sigma)
    with steer.apply(model, SEG(scale=2.0, sigma=sigma, layers=site)):
        guided = output(model, dict(inputs))
    assert relative_norm(weak, cond) > VISIBLE
    assert relative_norm(guided, cond + 2.0 * (cond - weak)) <= 1e-10


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name,layers", [("sd15", "mid_block"), ("sd3", "transformer_blocks.1"), ("wan21", "blocks.1")])
def test_pipelines_run_and_differ(name: str, layers: str, guidance_scale: float) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()

    def sample() -> Tensor:
        return generate(pipe, tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale))

    plain, results = sample(), []
    for sigma in (math.inf, 1.0):
        with steer.apply(pipe, SEG(sigma=sigma, layers=layers)):
            results.append(sample())
    assert all(relative_norm(result, plain) > VISIBLE for result in results)
    assert relative_norm(*results) > VISIBLE
    assert torch.equal(sample(), plain)


def test_negative_sigma_is_refused() -> None:
    with pytest.raises(ValueError, match="sigma=-1"):
        SEG(sigma=-1.0)
