"""`steer simulate`: shapes of the published models, FLOPs, and the densities and bounds that the papers print."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer.cli import app
from steer.model_shapes import MODEL_SHAPES, ModelShape, model_shape
from steer.simulate import Simulation, amdahl, attention_flops, forward_flops, heaviest_row, mask_of, simulate
from steer.sparse import Prepared, Sparse, Tokens
from steer_kernels import BlockMask, patterns
from steer_patches.family import family_of
from steer_patches.site import Site
from steer_patches.sites import find_sites

EMOJI_WAN = Path(__file__).parents[1] / "demos/steer_demos/weights/emoji-wan"
HD: dict[str, Any] = {"height": 768, "width": 1280}


@dataclass(kw_only=True)
class Half(Sparse, register=False):
    """Queries of the first half of the blocks see everything, the others the first quarter."""

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        number = -(-tokens.length // 64)
        keep = torch.zeros(1, 1, number, number, dtype=torch.bool)
        keep[..., : number // 2, :] = True
        keep[..., : number // 4] = True
        return Prepared(tokens, BlockMask.from_bool(keep, 64, q_len=tokens.length, kv_len=tokens.length))


# --- shapes


@pytest.mark.parametrize(
    ("name", "size", "grid", "tokens"),
    [
        ("wan2.1-1.3b", {}, (21, 30, 52), 32_760),
        ("wan2.1-14b", {}, (21, 45, 80), 75_600),
        ("hunyuanvideo", {}, (33, 45, 80), 119_056),
        ("hunyuanvideo", {"frames": 117, **HD}, (30, 48, 80), 115_456),
        ("cogvideox-5b", {}, (13, 30, 45), 17_776),
        ("cogvideox1.5-5b", {}, (11, 48, 85), 45_106),
        ("cosmos-7b", {}, (16, 44, 80), 56_320),
        ("flux.1-dev", {}, (1, 64, 64), 4_608),
        ("flux.1-dev", {"height": 4096, "width": 4096}, (1, 256, 256), 66_048),
    ],
)
def test_published_grids_and_lengths(name: str, size: dict[str, Any], grid: tuple[int, ...], tokens: int) -> None:
    shape = MODEL_SHAPES[name]
    assert shape.grid(**size) == grid
    joint = any(site.kind == "joint" for site in find_sites(shape.build()))
    assert grid[0] * grid[1] * grid[2] + joint * shape.text_tokens == tokens


@pytest.mark.parametrize(
    ("name", "billions"),
    [
        ("wan2.1-1.3b", 1.42), ("wan2.1-14b", 14.29), ("hunyuanvideo", 12.82), ("cogvideox-2b", 1.69),
        ("cogvideox-5b", 5.57), ("cogvideox1.5-5b", 5.57), ("ltx-video", 1.92), ("mochi", 10.03), ("cosmos-7b", 7.24),
        ("flux.1-dev", 11.90), ("sd3.5-large", 8.06),
    ],
)  # fmt: skip
def test_number_of_weights(name: str, billions: float) -> None:
    model = MODEL_SHAPES[name].build()
    assert sum(weight.numel() for weight in model.parameters()) / 1e9 == pytest.approx(billions, abs=0.005)
    assert all(weight.is_meta for weight in model.parameters())


@pytest.mark.parametrize("name", MODEL_SHAPES)
def test_inputs_run_through_a_small_model(name: str) -> None:
    """The grid is that of the model's family, and the output has the shape of the latents."""
    shape = MODEL_SHAPES[name]
    changes: dict[str, Any] = {"num_layers": 1, "num_attention_heads": 2}
    if shape.model in ("FluxTransformer2DModel", "HunyuanVideoTransformer3DModel"):
        changes["num_single_layers"] = 1
    if shape.model == "LTXVideoTransformer3DModel":
        changes["cross_attention_dim"] = 128
    if shape.model == "SD3Transformer2DModel":
        changes["caption_projection_dim"] = 128
    patch, over = shape.patch, shape.compression
    size = {
        "height": 2 * over[1] * patch[1],
        "width": 3 * over[2] * patch[2],
        "frames": 1 if shape.still else 2 * over[0] + 1,
    }
    torch.manual_seed(0)
    model = shape.build("cpu", torch.float32, **changes)
    inputs = shape.inputs(
        **size, device="cpu", dtype=torch.float32, generator=torch.Generator().manual_seed(0), batch=2
    )
    family = family_of(model)
    assert family is not None and family.grid is not None
    assert family.grid(model, inputs) == shape.grid(**size)
    with torch.no_grad():
        output = model(**inputs)[0]
    assert output.shape[0] == 2 and output.isfinite().all()
    same = shape.inputs(**size, device="cpu", dtype=torch.float32, generator=torch.Generator().manual_seed(0), batch=2)
    assert torch.equal(inputs["hidden_states"], same["hidden_states"])


def test_weights_of_a_build_are_of_the_type_asked_for() -> None:
    model = MODEL_SHAPES["emoji-wan"].build("cpu", torch.float16)
    assert model.blocks[0].attn1.to_q.weight.dtype == torch.float16
    assert model.scale_shift_table.dtype == torch.float32  # diffusers keeps it so


def test_emoji_wan_is_as_it_is_embedded() -> None:
    shape = MODEL_SHAPES["emoji-wan"]
    config = json.loads((EMOJI_WAN / "transformer/config.json").read_text())
    built = shape.build().config
    assert {key: built[key] for key in shape.config} == {key: config[key] for key in shape.config}
    codec = json.loads((EMOJI_WAN / "vae/config.json").read_text())
    assert shape.compression == (codec["scale_factor_temporal"], *[codec["scale_factor_spatial"]] * 2)
    assert shape.latent_channels == codec["z_dim"]


# --- FLOPs


@pytest.mark.parametrize(
    ("name", "size", "teraflops", "within"),
    [
        ("cogvideox1.5-5b", {}, 147.87e3 / 100, 0.001),  # Sparse-vDiT's table: PFLOP of 50 steps with guidance
        ("hunyuanvideo", {}, 612.37e3 / 50, 0.015),
        ("wan2.1-14b", {}, 660.49e3 / 100, 0.013),
        ("wan2.1-14b", {"frames": 69, **HD}, 560e3 / 100, 0.001),  # Radial attention
        ("wan2.1-1.3b", {}, 282.6, 0.002),  # VMoBA
        ("wan2.1-1.3b", {"height": 720, "width": 1280}, 1246.8, 0.003),
    ],
)
@pytest.mark.slow
def test_published_dense_flops(name: str, size: dict[str, Any], teraflops: float, within: float) -> None:
    shape = MODEL_SHAPES[name]
    full = (size.get("height", shape.height), size.get("width", shape.width), size.get("frames", shape.frames))
    assert forward_flops(shape, full) / 1e12 == pytest.approx(teraflops, rel=within)


@pytest.mark.parametrize(("name", "published"), [("wan2.1-14b", 117), ("cogvideox-5b", 3.9), ("cogvideox1.5-5b", 25)])
def test_published_flops_of_an_attention_call(name: str, published: float) -> None:
    shape = MODEL_SHAPES[name]
    site = next(site for site in find_sites(shape.build()) if site.kind in Sparse.kinds)
    t, h, w = shape.grid()
    tokens = t * h * w + (shape.text_tokens if site.kind == "joint" else 0)
    assert attention_flops(site, tokens) / 1e12 == pytest.approx(published, rel=0.02)


def test_flops_counted_by_hand() -> None:
    """Every product of emoji-wan, from its config."""
    tokens, text, width, hidden, layers, freq = 9 * 8 * 8, 512, 192, 576, 6, 128
    attention = layers * 4 * tokens**2 * width
    mixing = layers * (4 * 2 * tokens * width**2 + 2 * 2 * tokens * width * hidden)
    cross = layers * (2 * 2 * tokens * width**2 + 2 * 2 * text * width**2 + 4 * tokens * text * width)
    patches = 2 * tokens * (16 * 4) * width * 2  # in and out
    prompt = 2 * text * (96 * width + width * width)
    time = 2 * (freq * width + width * width + width * 6 * width)
    assert (
        forward_flops(MODEL_SHAPES["emoji-wan"], (64, 64, 17)) == attention + mixing + cross + patches + prompt + time
    )


def test_text_between_the_models_own_attention_counts_as_the_rest() -> None:
    """A model whose text is refined by attention of its own: only the joint sites are attention."""
    shape = MODEL_SHAPES["hunyuanvideo"]
    joint = [site for site in find_sites(shape.build()) if site.kind == "joint"]
    assert len(joint) == 60 and len(find_sites(shape.build())) == 62


# --- densities and bounds


RADIAL = [
    ("wan2.1-14b", {"frames": 69, **HD}, {}, 0.287),
    ("wan2.1-14b", {"frames": 69, **HD}, {"decay": 1.0}, 0.431),
    ("hunyuanvideo", {"frames": 117, **HD}, {}, 0.278),
    ("wan2.2-a14b", {"frames": 77, **HD}, {"preset": "wan2.2-a14b", "block_size": 128}, 0.353),
    ("wan2.2-a14b", {"frames": 77, **HD}, {"preset": "wan2.2-a14b"}, 0.349),
    pytest.param("hunyuanvideo", {"frames": 509}, {"decay": 1.0}, 0.110, marks=pytest.mark.slow),
    ("wan2.1-14b", {}, {}, 0.265),
    ("wan2.1-1.3b", {}, {}, 0.344),
]


@pytest.mark.parametrize(("name", "size", "settings", "density"), RADIAL)
def test_published_radial_densities(name: str, size: dict[str, Any], settings: dict[str, Any], density: float) -> None:
    """The mask alone, at the method's presets."""
    shape = MODEL_SHAPES[name]
    mask = mask_of(name, steer.RadialAttention(**settings), **size)
    t, h, w = shape.grid(**size)
    assert mask.kv_len - t * h * w == (256 if name == "hunyuanvideo" else 0)
    assert mask.density == pytest.approx(density, abs=1e-3)


@pytest.mark.slow
def test_radial_attention_on_its_papers_videos() -> None:
    """Where the paper's figures are met, and where they are not.

    HunyuanVideo, 117 frames: it prints 612 -> 339 PFLOP. The 612 is the figure of 129 frames at 720p (612.37 in the
    table of Sparse-vDiT); at 117 frames the model has 570. What is saved is the same: 270 here, 273 there. Wan, 69
    frames: 560 -> 323; the dense figure is met, the sparse one is 353 here. To get 323 in 38 of 50 steps, attention
    would have to have a density of 0.18; the published rule and code give 0.287 in blocks and 0.269 in tokens.
    """
    hunyuan = simulate("hunyuanvideo", steer.RadialAttention(), frames=117, **HD)
    assert (hunyuan.steps, hunyuan.sparse_steps, hunyuan.sites, hunyuan.sparse_sites) == (50, 38, 60, 60)
    assert hunyuan.dense_run_flops - hunyuan.run_flops == pytest.approx(612e15 - 339e15, rel=0.015)
    assert hunyuan.worst_row == pytest.approx(902 / 283)
    assert hunyuan.run_flops / hunyuan.dense_run_flops == pytest.approx(0.527, abs=1e-3)
    wan = simulate("wan2.1-14b", steer.RadialAttention(), frames=69, **HD)
    assert (wan.sparse_steps, wan.sites, wan.sparse_sites, wan.passes) == (38, 40, 39, 2)
    assert wan.dense_run_flops == pytest.approx(560e15, rel=1e-3)
    assert wan.run_flops == pytest.approx(353e15, rel=1e-3)


GNA_HUNYUAN = {"grid": (30, 48, 80), "window": (18, 24, 24), "q_tile": (4, 8, 8), "kv_tile": (2, 8, 8)}
GNA_FLUX = {"grid": (256, 256), "window": (80, 80), "q_tile": (16, 16), "kv_tile": (16, 8)}


@pytest.mark.parametrize(
    ("windows", "stride", "share", "attention", "whole"),
    [
        (GNA_HUNYUAN, (1, 1, 1), 0.607, 3.27, 1.73),
        (GNA_HUNYUAN, (2, 8, 8), 0.607, 10.0, 2.20),
        (GNA_HUNYUAN, (16, 8, 8), 0.607, 11.11, 2.23),  # measured: 2.23
        (GNA_FLUX, (1, 1), 0.518, 6.10, 1.76),
        (GNA_FLUX, (16, 1), 0.518, 8.53, 1.84),
        (GNA_FLUX, (16, 16), 0.518, 10.24, 1.88),  # measured: 1.82
        (
            {"grid": (16, 44, 80), "window": (16, 32, 48), "q_tile": (4, 4, 16), "kv_tile": (4, 4, 8)},
            (1, 8, 16), 0.587, 2.29, 1.49,
        ),  # measured: 1.46
    ],
)  # fmt: skip
def test_bounds_of_neighborhood_attention(
    windows: dict[str, Any], stride: tuple[int, ...], share: float, attention: float, whole: float
) -> None:
    """End to end by the share of time that the paper measured."""
    bound = patterns.speedup_bound(**windows, stride=stride)
    assert bound == pytest.approx(attention, abs=0.006)
    assert amdahl(share, bound) == pytest.approx(whole, abs=0.006)


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "size", "settings", "share", "steps", "step", "run"),
    [
        (
            "hunyuanvideo", {"frames": 117, **HD}, {"window": (18, 24, 24), "stride": (16, 8, 8)},
            0.607, "0.3:", 2.23, 1.63,
        ),
        ("flux.1-dev", {"height": 4096, "width": 4096}, {"window": (80, 80), "stride": 16}, 0.518, "0.32:", 1.82, 1.45),
        ("cosmos-7b", {}, {"window": (16, 32, 48), "stride": (1, 8, 16)}, 0.587, "0.34:", 1.46, 1.26),
    ],
)  # fmt: skip
def test_measured_speedups_of_neighborhood_attention_lie_at_its_bound(
    name: str, size: dict[str, Any], settings: dict[str, Any], share: float, steps: str, step: float, run: float
) -> None:
    """Published seconds, without dense steps and with them; text is part of our sequences and not of the paper's."""
    method = steer.NeighborhoodAttention(**settings, steps=steps)
    found = simulate(name, method, **size, attention_share=share)
    assert found.step_speedup == pytest.approx(step, rel=0.03)
    assert found.run_speedup == pytest.approx(run, rel=0.03)


@pytest.mark.slow
def test_vmoba_at_its_published_density() -> None:
    """1246.8 -> 519.8 TFLOP a forward, 2.40x, at a density of 0.31 in a step after the dense ones."""
    found = simulate("wan2.1-1.3b", steer.VMoBA(), height=720, width=1280, density=0.31)
    dense = found.attention_flops + found.other_flops
    sparse = dense - found.edited_flops * (1 - found.density)
    assert sparse / 1e12 == pytest.approx(519.8, rel=0.01)
    assert dense / sparse == pytest.approx(2.40, abs=0.02)
    assert found.step_speedup == pytest.approx(dense / sparse)
    assert found.sparse_steps == 37 and found.worst_row is None


# --- the arithmetic, on the smallest model


def tiny(method: Sparse, **options: Any) -> Simulation:
    return simulate("emoji-wan", method, **options)


def test_density_worst_row_and_schedule() -> None:
    """Nine blocks: four rows of nine, five of two."""
    found = tiny(Half(steps="0.5:", dense_layers=2), steps=10)
    assert found.density == pytest.approx((4 * 9 + 5 * 2) / 81)
    assert found.worst_row == 1
    assert (found.steps, found.sparse_steps, found.sites, found.sparse_sites, found.passes) == (10, 5, 6, 4, 2)
    assert (found.tokens, found.grid) == (576, (9, 8, 8))
    assert found.attention_flops == 6 * 4 * 576**2 * 192
    assert found.edited_flops == found.attention_flops * 4 / 6
    saved = found.edited_flops * (1 - found.density)
    assert found.run_flops == pytest.approx(20 * (found.attention_flops + found.other_flops) - 10 * saved)


def test_bounds_follow_amdahl() -> None:
    found = tiny(Half(steps=":"), attention_share=0.6, efficiency=0.8)
    density = 46 / 81
    assert found.attention_speedup == pytest.approx(0.8 / density)
    assert found.step_speedup == pytest.approx(1 / (0.4 + 0.6 * density / 0.8))
    assert found.run_speedup == pytest.approx(found.step_speedup)
    half = tiny(Half(steps="10:"), attention_share=0.6)  # of 20
    assert half.run_speedup == pytest.approx(2 / (1 + 0.4 + 0.6 * density))
    assert amdahl(1.0, float("inf")) == float("inf") and amdahl(0.0, 5.0) == 1


def test_share_of_flops_gives_the_ratio_of_flops() -> None:
    found = tiny(Half(steps="0.25:"))
    assert found.run_speedup == pytest.approx(found.dense_run_flops / found.run_flops)


@pytest.mark.parametrize(("options", "part"), [({"heads": [0, 3]}, 2 / 6), ({"rows": "cond"}, 1 / 2)])
def test_heads_and_rows_that_stay_dense(options: dict[str, Any], part: float) -> None:
    assert tiny(Half(**options)).density == pytest.approx(1 - part * (1 - 46 / 81))


def test_full_density_gains_nothing() -> None:
    found = tiny(Half(), density=1.0)
    assert found.run_flops == found.dense_run_flops
    assert found.attention_speedup == found.step_speedup == found.run_speedup == 1


@pytest.mark.parametrize("text_first", [False, True])
@pytest.mark.parametrize(("text", "dense"), [(64, 1), (65, 2), (50, 1)])
def test_rows_of_text_are_not_the_heaviest(text: int, dense: int, text_first: bool) -> None:
    """Text sees everything, and so do visual queries in a block with text: they would make every bound 1."""
    method = steer.RadialAttention(decay=0.1, block_size=64, key_frame_sink=False)
    tokens, site = Tokens((9, 8, 8), text, text_first), find_sites(MODEL_SHAPES["emoji-wan"].build())[0]
    mask = method.make(tokens, site).mask
    assert mask is not None
    rows = (mask.full_num + mask.partial_num).flatten().tolist()
    number = len(rows)
    assert rows.count(number) >= dense
    assert heaviest_row(method, tokens, site) == number / max(row for row in rows if row < number)


def test_methods_without_masks_need_a_density() -> None:
    class Unknown(Half, register=False):
        def expected_density(self, tokens: Tokens, site: Site) -> float | None:
            return None

    with pytest.raises(ValueError, match=r"depends on the data: give density="):
        tiny(Unknown())
    assert tiny(Unknown(), density=0.25).density == 0.25


@pytest.mark.parametrize("name", ["SparseVDiT", "PAROAttention"])
def test_searched_methods_without_a_plan_take_their_density(name: str) -> None:
    method: Any = steer.methods()[name]
    found = tiny(method(density=0.4))
    assert found.density == pytest.approx(0.4) and found.worst_row is None
    with pytest.raises(ValueError, match="not known without data or a plan"):
        mask_of("emoji-wan", method())


@pytest.mark.parametrize(
    ("model", "method", "options", "error", "message"),
    [
        ("wan3", Half(), {}, ValueError, "no model shape is named 'wan3'; steer knows wan2.1-1.3b, "),
        ("emoji-wan", steer.PAG(), {}, TypeError, "PAG leaves out no attention; simulate takes .*RadialAttention"),
        ("emoji-wan", Half(), {"frames": 16}, ValueError, "frames=16 .* must be a multiple of 2 plus 1, e.g. 15 or 17"),
        ("emoji-wan", Half(), {"height": 65}, ValueError, "height=65 .* must be a multiple of 8 pixels"),
        ("emoji-wan", Half(), {"height": 0}, ValueError, "height=0 .* must be a multiple of 8 pixels"),
        ("emoji-wan", Half(), {"frames": 0}, ValueError, "frames=0 .* must be a multiple of 2 plus 1, e.g. 1"),
        ("emoji-wan", Half(), {"frames": -5}, ValueError, "frames=-5 .* must be a multiple of 2 plus 1, e.g. 1"),
        ("flux.1-dev", Half(), {"frames": 5}, ValueError, "flux.1-dev draws single images"),
        ("flux.1-dev", steer.RadialAttention(), {}, ValueError, "cannot run on FLUX: it draws single images"),
        ("flux.1-dev", steer.VMoBA(), {"density": 0.3}, ValueError, "VMoBA cannot run on FLUX: it draws single images"),
        ("emoji-wan", Half(), {"attention_share": 1.2}, ValueError, "attention_share=1.2 must be a fraction"),
        ("emoji-wan", Half(), {"density": -1}, ValueError, "density=-1 must be a fraction"),
        ("emoji-wan", Half(), {"efficiency": 0}, ValueError, "efficiency=0 must be above 0"),
        ("emoji-wan", Half(), {"steps": 0}, ValueError, "steps=0"),
        ("emoji-wan", Half(min_tokens=1000), {}, ValueError, "min_tokens=1000 is more than any sequence of emoji-wan"),
        ("emoji-wan", Half(layers="blocks.9"), {}, ValueError, "matches none of this model's attention sites"),
        ("emoji-wan", Half(heads=[]), {}, ValueError, "changes nothing"),
    ],
)  # fmt: skip
def test_errors(model: str, method: Any, options: dict[str, Any], error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=message):
        simulate(model, method, **options)


def test_a_shape_of_ones_own() -> None:
    shape = ModelShape(
        "mine", "WanTransformer3DModel", MODEL_SHAPES["emoji-wan"].arguments, "mine",
        {**MODEL_SHAPES["emoji-wan"].config, "num_layers": 2}, text_width=96, height=32, width=32, frames=5,
    )  # fmt: skip
    assert simulate(shape, Half()).sites == 2
    assert model_shape("HunyuanVideo") is MODEL_SHAPES["hunyuanvideo"]


def test_table_and_figures() -> None:
    found = tiny(Half(steps="0.5:"))
    text = str(found)
    assert text.startswith("emoji-wan, Half(") and "9 x 8 x 8 = 576 visual tokens" in text and "0.5679" in text
    figures = json.loads(json.dumps(found.to_dict()))
    assert tiny(Half(), density=0.0).to_dict()["attention_speedup"] is None
    assert figures["density"] == found.density and figures["run_speedup"] == found.run_speedup


# --- command line


def test_command(tmp_path: Path) -> None:
    file = tmp_path / "figures.json"
    arguments = ["simulate", "emoji-wan", "RadialAttention", "--set", "decay=0.1", "--set", "block_size=64"]
    result = CliRunner().invoke(app, [*arguments, "--frames", "33", "--json", str(file)])
    assert result.exit_code == 0 and "17 x 8 x 8 = 1,088 visual tokens" in result.output
    figures = json.loads(file.read_text())
    expected = tiny(steer.RadialAttention(decay=0.1, block_size=64), frames=33)
    assert figures == json.loads(json.dumps(expected.to_dict()))


def test_command_draws_a_mask(tmp_path: Path) -> None:
    from PIL import Image

    file = tmp_path / "mask.png"
    result = CliRunner().invoke(
        app, ["plot", "mask", "emoji-wan", "RadialAttention", "--set", "block_size=64", "--output", str(file)]
    )
    assert result.exit_code == 0
    expected = mask_of("emoji-wan", steer.RadialAttention(block_size=64)).show()
    assert not isinstance(expected, str)
    assert Image.open(file).tobytes() == expected.tobytes()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["simulate", "emoji-wan", "Nothing"], "there is no method Nothing; there are"),
        (["simulate", "emoji-wan", "RadialAttention", "--set", "width=1"], "has no field 'width'; it has layers, "),
        (["plot", "mask", "emoji-wan", "RadialAttention", "--output", "x", "--layer", "y"], "is not on at 'y'"),
    ],
)
def test_errors_of_the_commands(arguments: list[str], message: str) -> None:
    with pytest.raises((ValueError, TypeError), match=message):
        CliRunner().invoke(app, arguments, catch_exceptions=False)
