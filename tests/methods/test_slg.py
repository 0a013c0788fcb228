"""SLG against diffusers' skip-layer guidance and against models whose skipped blocks are replaced by the identity."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from dense import dense_attention, doubled, identity_in, relative_norm, without_blocks
from recorder import record
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import PAG, SLG

TOLERANCE = 1e-5
VISIBLE = 1e-3


@pytest.mark.parametrize("name", ["sd3", "sd35"])
@pytest.mark.parametrize("skipped", [[1], [0, 1], [2], [0, 2]], ids=str)
def test_same_latents_as_skip_guidance_layers(name: str, skipped: list[int]) -> None:
    """Six steps: diffusers guides those with 0.06 < i < 3, `steps` those with 0.06 <= i < 3."""
    tiny = PIPELINES[name]
    pipe = tiny.build()

    def kwargs() -> dict[str, Any]:
        return tiny.call_kwargs(pipe, batch=2, steps=6)

    plain = generate(pipe, kwargs())
    peer = {"skip_guidance_layers": skipped, "skip_layer_guidance_stop": 0.5, "skip_layer_guidance_scale": 2.8}
    wanted = generate(pipe, kwargs() | peer)
    with steer.apply(pipe, SLG(layers=[f"transformer_blocks.{i}" for i in skipped], steps="0.01:0.5")) as handle:
        guided = generate(pipe, kwargs())
        (row,) = handle.stats["methods"]
    assert row["extra_passes"] == 2
    assert row["shared_blocks"] == skipped[0]
    assert relative_norm(guided, plain) > VISIBLE
    assert relative_norm(guided, wanted) <= TOLERANCE


def test_default_window_is_the_recipes(monkeypatch: pytest.MonkeyPatch) -> None:
    """0.01 to 0.2 of 20 steps is 1, 2, 3 in diffusers' strict window and in steer's half-open one."""
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    _, unsteered = record(pipe, tiny.call_kwargs(pipe, steps=20) | {"skip_guidance_layers": [1]}, monkeypatch)
    with steer.apply(pipe, SLG(layers="transformer_blocks.1")):
        _, steered = record(pipe, tiny.call_kwargs(pipe, steps=20), monkeypatch)
    wanted = [i for i, step in enumerate(unsteered) if len(step.inputs) == 2]
    assert wanted == [1, 2, 3]
    assert [i for i, step in enumerate(steered) if len(step.inputs) == 2] == wanted


BLOCKS = {  # family: list of blocks, skipped ones, what a block returns
    "sd3": ("transformer_blocks", [0, 2], "eh"),
    "sd35": ("transformer_blocks", [1], "eh"),
    "pixart": ("transformer_blocks", [1], "h"),
    "flux": ("transformer_blocks", [1], "eh"),
    "flux-single": ("single_transformer_blocks", [0, 1], "eh"),
    "qwen_image": ("transformer_blocks", [1], "eh"),
    "wan21": ("blocks", [0, 1], "h"),
    "wan22": ("blocks", [2], "h"),
    "hunyuan_video": ("transformer_blocks", [1], "he"),
    "hunyuan_video-single": ("single_transformer_blocks", [0], "he"),
    "hunyuan_video15": ("transformer_blocks", [1], "he"),
    "cogvideox": ("transformer_blocks", [1], "he"),
    "ltx": ("transformer_blocks", [1], "h"),
    "mochi": ("transformer_blocks", [1], "he"),
    "cosmos": ("transformer_blocks", [1], "h"),
}


@pytest.mark.parametrize("share", [True, False], ids=["shared", "unshared"])
@pytest.mark.parametrize("name", BLOCKS)
def test_equals_a_model_without_the_blocks(name: str, share: bool) -> None:
    path, skipped, returns = BLOCKS[name]
    family = FAMILIES[name.split("-")[0]]
    exact = family.name != "cosmos"  # its embeddings refuse fp64
    model = family.build().double() if exact else family.build()
    inputs = doubled(family.inputs(model)) if exact else family.inputs(model)
    cond = output(model, dict(inputs))
    with without_blocks(model.get_submodule(path), skipped, returns):
        weak = output(model, dict(inputs))
    layers = [f"{path}.{i}" for i in skipped]
    with steer.apply(model, SLG(scale=2.0, layers=layers, steps=":", share_prefix=share)):
        guided = output(model, dict(inputs))
    assert relative_norm(weak, cond) > VISIBLE
    assert relative_norm(guided, cond + 2.0 * (cond - weak)) <= (1e-10 if exact else TOLERANCE)
    assert torch.equal(output(model, dict(inputs)), cond)


@pytest.mark.parametrize(
    "steps,wanted",
    [
        ("0.01:0.2", [1]),
        ("0.5:", [5, 6, 7, 8, 9]),
        ("2:4", [2, 3]),
        (range(7, 20), [7, 8, 9]),
        ("0.0:0.1", [0]),
        ("3:3", []),
    ],
    ids=str,
)
@pytest.mark.parametrize("name,layers", [("sd3", "transformer_blocks.1"), ("wan21", "blocks.1")])
def test_steps_window(name: str, layers: str, steps: Any, wanted: list[int], monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    _, unsteered = record(pipe, tiny.call_kwargs(pipe, steps=10), monkeypatch)
    with steer.apply(pipe, SLG(layers=layers, steps=steps)) as handle:
        _, steered = record(pipe, tiny.call_kwargs(pipe, steps=10), monkeypatch)
        assert handle.stats["methods"][0]["extra_passes"] == len(wanted)
    pairs = zip(steered, unsteered, strict=True)
    assert [i for i, (a, b) in enumerate(pairs) if len(a.inputs) > len(b.inputs)] == wanted


def test_pag_beside_the_pipelines_own_skip_guidance(monkeypatch: pytest.MonkeyPatch) -> None:
    """SD3 makes a third call, with conditional rows only: the shift cancels in (cond - skip)."""
    tiny = PIPELINES["sd3"]
    pipe, model = tiny.build(), FAMILIES["sd3"].build()
    own = {"skip_guidance_layers": [0], "skip_layer_guidance_start": 0.2, "skip_layer_guidance_stop": 0.9}
    with steer.apply(pipe, PAG(scale=3.0, layers="transformer_blocks.1")) as handle:
        _, steps = record(pipe, tiny.call_kwargs(pipe, batch=2) | own, monkeypatch)
        assert handle.stats["methods"][0]["extra_passes"] == len(steps) == 3
    assert [len(step.inputs) for step in steps] == [2, 3, 3]
    for step in steps:
        first = step.inputs[0]
        uncond, cond = output(model, first).chunk(2)
        rows = {k: v[2:] if isinstance(v, Tensor) else v for k, v in first.items()}
        with dense_attention(model, ["transformer_blocks.1.attn"], identity_in(slice(0, 24))):
            weak = output(model, rows)
        wanted = uncond + 4.0 * (cond - uncond) + 3.0 * (cond - weak)
        if len(step.inputs) == 3:
            wanted = wanted + 2.8 * (cond - output(model, rows | {"skip_layers": [0]}))
        assert relative_norm(step.prediction, wanted) <= TOLERANCE


def test_scale_zero_is_bit_identical() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, SLG(scale=0.0, layers="transformer_blocks.1", steps=":")) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)
        assert handle.stats["methods"] == []


def test_heads_are_refused() -> None:
    with pytest.raises(ValueError, match="takes no heads"):
        SLG(heads=[0])


def test_unets_have_no_blocks_to_skip() -> None:
    with pytest.raises(steer.CompositionError, match="no blocks"):
        steer.apply(PIPELINES["sd15"].build(), SLG(layers="mid_block"))


def test_a_bare_model_cannot_count_steps_and_the_error_says_what_to_write() -> None:
    with pytest.raises(steer.CompositionError, match='steps=":"'):
        steer.apply(FAMILIES["sd3"].build(), SLG(layers="transformer_blocks.1"))
