"""Prefix sharing and the batched extra pass: the same numbers as a full pass of its own, with less work."""

from __future__ import annotations

from collections import Counter
from typing import Any

import pytest
import torch
from dense import doubled, relative_norm
from diffusers import (
    ControlNetModel,
    SD3ControlNetModel,
    StableDiffusion3ControlNetPipeline,
    StableDiffusionAdapterPipeline,
    StableDiffusionControlNetPAGPipeline,
    StableDiffusionControlNetPipeline,
    T2IAdapter,
)
from probes import Trip, Tripped
from tiny import FAMILIES, build, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor, nn

import steer
from steer import PAG, SEG, SLG

TOLERANCE = 1e-5
EXACT = 1e-10
VISIBLE = 1e-3

SHARED = {  # family, layers, leading blocks that the extra pass takes over, all blocks
    "sd3": ("sd3", "transformer_blocks.1", 1, 3),
    "sd3-last": ("sd3", "transformer_blocks.2", 2, 3),
    "sd3-several": ("sd3", "transformer_blocks.{1,2}", 1, 3),
    "sd35-dual": ("sd35", "transformer_blocks.1.attn2", 1, 3),
    "sd35": ("sd35", "transformer_blocks.2", 2, 3),
    "flux-double": ("flux", "transformer_blocks.1", 1, 4),
    "flux-first-single": ("flux", "single_transformer_blocks.0", 2, 4),
    "flux-single": ("flux", "single_transformer_blocks.1", 3, 4),
    "sd15-down": ("sd15", "down_blocks.1", 1, 7),
    "sd15-mid": ("sd15", "mid_block", 3, 7),
    "sd15-up": ("sd15", "up_blocks.2", 6, 7),
    "sdxl-mid": ("sdxl", "mid_block", 3, 7),
    "sdxl-up": ("sdxl", "up_blocks.1", 5, 7),
    "pixart": ("pixart", "transformer_blocks.2", 2, 3),
    "pixart_alpha": ("pixart_alpha", "transformer_blocks.1", 1, 3),
    "wan21": ("wan21", "blocks.2", 2, 3),
    "wan22": ("wan22", "blocks.1", 1, 3),
    "animatediff-mid": ("animatediff", "mid_block", 2, 5),
    "animatediff-up": ("animatediff", "up_blocks.1", 4, 5),
    "cogvideox": ("cogvideox", "transformer_blocks.2", 2, 3),
    "cogvideox_rotary": ("cogvideox_rotary", "transformer_blocks.1", 1, 3),
    "hunyuan_video": ("hunyuan_video", "transformer_blocks.1", 2, 5),
    "hunyuan_video-single": ("hunyuan_video", "single_transformer_blocks.1", 4, 5),
    "hunyuan_video15": ("hunyuan_video15", "transformer_blocks.2", 3, 4),
    "qwen_image": ("qwen_image", "transformer_blocks.2", 2, 3),
    "ltx": ("ltx", "transformer_blocks.1", 1, 3),
    "mochi": ("mochi", "transformer_blocks.2", 2, 3),
    "cosmos": ("cosmos", "transformer_blocks.2", 2, 3),
}


def stages(model: nn.Module) -> dict[str, nn.Module]:
    """The modules between which prefixes are cut, by name, in no particular order."""
    found: dict[str, nn.Module] = {}
    for path in ("down_blocks", "up_blocks", "transformer_blocks", "single_transformer_blocks", "blocks"):
        for i, module in enumerate(getattr(model, path, ())):
            found[f"{path}.{i}"] = module
    for path in ("mid_block", "context_embedder"):
        module = getattr(model, path, None)
        if module is not None and not isinstance(module, nn.Linear):  # SD3's and FLUX's context_embedder is a layer
            found[path] = module
    return found


@pytest.mark.parametrize("name,layers,prefix,total", SHARED.values(), ids=SHARED)
def test_shared_and_batched_passes_equal_a_pass_of_its_own(name: str, layers: str, prefix: int, total: int) -> None:
    family, exact = FAMILIES[name], name != "cosmos"  # its embeddings refuse fp64
    model = family.build().double() if exact else family.build()
    inputs = doubled(family.inputs(model)) if exact else family.inputs(model)
    calls: Counter[str] = Counter()
    for stage, module in stages(model).items():
        module.register_forward_hook(lambda *_, stage=stage: calls.update([stage]))

    plain = output(model, dict(inputs))
    ways = {"unshared": {"share_prefix": False}, "shared": {}, "batched": {"extra": "batched"}}
    if name == "mochi":
        with pytest.raises(steer.CompositionError, match="row by row"):
            steer.apply(model, PAG(layers=layers, extra="batched"))
        del ways["batched"]
    results, made = {}, {}
    for way, settings in ways.items():
        calls.clear()
        with steer.apply(model, PAG(layers=layers, **settings)) as handle:
            results[way] = output(model, dict(inputs))
            (row,) = handle.stats["methods"]
        made[way] = calls.copy()
        assert (row["extra_passes"], row["shared_blocks"]) == (1, prefix if way == "shared" else 0)
        assert row["blocks"] == total

    assert set(made["unshared"].values()) == {2}
    assert sorted(made["shared"].values()) == [1] * prefix + [2] * (total - prefix)
    assert set(made.get("batched", {"": 1}).values()) == {1}
    assert relative_norm(results["unshared"], plain) > VISIBLE
    for way in results:
        assert relative_norm(results[way], results["unshared"]) <= (EXACT if exact else TOLERANCE), way


BATCHED_CFG = {  # pipelines whose forwards hold [uncond, cond]: the extra pass gets some of the recorded rows
    "sd15-mid": ("sd15", "mid_block"),
    "sd15-up": ("sd15", "up_blocks.1"),
    "sdxl-up": ("sdxl", "up_blocks.1"),
    "sd3": ("sd3", "transformer_blocks.2"),
    "sd35": ("sd35", "transformer_blocks.1"),
    "pixart": ("pixart", "transformer_blocks.1"),
    "animatediff": ("animatediff", "mid_block"),
    "animatediff-up": ("animatediff", "up_blocks.1"),
}


@pytest.mark.parametrize("method", [PAG, SEG], ids=["PAG", "SEG"])
@pytest.mark.parametrize("name,layers", BATCHED_CFG.values(), ids=BATCHED_CFG)
def test_rows_of_a_batched_cfg_pipeline(name: str, layers: str, method: Any) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    model = getattr(pipe, "unet", None) or pipe.transformer
    model.double()

    def sample() -> Tensor:
        return generate(pipe, doubled(tiny.call_kwargs(pipe, batch=2)))

    plain, results = sample(), []
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(pipe, method(layers=layers, **settings)):
            results.append(sample())
    unshared, shared, batched = results
    assert unshared.dtype == torch.float64
    assert relative_norm(unshared, plain) > VISIBLE
    assert relative_norm(shared, unshared) <= EXACT
    assert relative_norm(batched, unshared) <= EXACT


FP32 = {
    "cogvideox": "transformer_blocks.1",
    "cogvideox_rotary": "transformer_blocks.2",
    "ltx": "transformer_blocks.1",
    "mochi": "transformer_blocks.1",
    "flux_true_cfg": "single_transformer_blocks.0",
    "wan22": "blocks.1",
    "wan22_5b": "blocks.2",
    "hunyuan_video": "single_transformer_blocks.0",
    "cosmos": "transformer_blocks.1",
}


@pytest.mark.parametrize("name", FP32)
def test_rows_of_other_pipelines(name: str) -> None:
    """These keep their latents in fp32, or call the model once for each branch."""
    tiny, layers = PIPELINES[name], FP32[name]
    pipe = tiny.build()

    def sample() -> Tensor:
        return generate(pipe, tiny.call_kwargs(pipe, batch=2))

    ways = [{"share_prefix": False}, {}, *([] if name == "mochi" else [{"extra": "batched"}])]
    plain, results = sample(), []
    for settings in ways:
        with steer.apply(pipe, PAG(layers=layers, **settings)):
            results.append(sample())
    assert relative_norm(results[0], plain) > VISIBLE
    for result in results[1:]:
        assert relative_norm(result, results[0]) <= TOLERANCE


def test_two_methods_share_prefixes_of_their_own() -> None:
    model = FAMILIES["sd3"].build().double()
    inputs = doubled(FAMILIES["sd3"].inputs(model))
    results = []
    for share in (False, True):
        methods = (
            PAG(layers="transformer_blocks.1", share_prefix=share),
            SEG(layers="transformer_blocks.2", share_prefix=share),
            SLG(layers="transformer_blocks.0", steps=":", share_prefix=share),
        )
        with steer.apply(model, *methods) as handle:
            results.append(output(model, dict(inputs)))
            shared = [row["shared_blocks"] for row in handle.stats["methods"]]
        assert shared == ([1, 2, 0] if share else [0, 0, 0])
    assert relative_norm(*results) <= EXACT


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(5), dtype=torch.float64)


RESIDUALS = {  # arguments through which a ControlNet or a T2I adapter speaks, besides the family's own
    "sd15 ControlNet": (
        "sd15",
        lambda: {
            "down_block_additional_residuals": (
                random(2, 16, 8, 12),
                random(2, 16, 8, 12),
                random(2, 16, 4, 6),
                random(2, 32, 4, 6),
                random(2, 32, 2, 3),
                random(2, 32, 2, 3),
            ),
            "mid_block_additional_residual": random(2, 32, 2, 3),
        },
        ["down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2"],
    ),
    "sd15 T2I adapter": (
        "sd15",
        lambda: {
            "down_intrablock_additional_residuals": [random(2, 16, 8, 12), random(2, 32, 4, 6), random(2, 32, 2, 3)]
        },
        ["down_blocks.1", "mid_block", "up_blocks.1", "up_blocks.2"],
    ),
    "sd3 ControlNet": (
        "sd3",
        lambda: {"block_controlnet_hidden_states": [random(2, 24, 16) for _ in range(2)]},
        ["transformer_blocks.1", "transformer_blocks.2"],
    ),
    "flux ControlNet": (
        "flux",
        lambda: {
            "controlnet_block_samples": [random(2, 24, 32)],
            "controlnet_single_block_samples": [random(2, 24, 32)],
        },
        ["transformer_blocks.1", "single_transformer_blocks.0", "single_transformer_blocks.1"],
    ),
    "qwen ControlNet": (
        "qwen_image",
        lambda: {"controlnet_block_samples": [random(2, 24, 32)]},
        ["transformer_blocks.1", "transformer_blocks.2"],
    ),
}


@pytest.mark.parametrize(
    "name,residuals,layers",
    [(name, residuals, layer) for name, residuals, layers in RESIDUALS.values() for layer in layers],
    ids=[f"{what}-{layer}" for what, (_, _, layers) in RESIDUALS.items() for layer in layers],
)
def test_residuals_of_other_networks(name: str, residuals: Any, layers: str) -> None:
    model = FAMILIES[name].build().double()
    inputs = doubled(FAMILIES[name].inputs(model))
    plain = output(model, inputs | residuals())
    assert relative_norm(plain, output(model, dict(inputs))) > VISIBLE
    results = []
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(model, PAG(layers=layers, **settings)) as handle:
            results.append(output(model, inputs | residuals()))
            if not settings:
                assert handle.stats["methods"][0]["shared_blocks"] > 0
    assert relative_norm(results[0], plain) > VISIBLE
    assert relative_norm(results[1], results[0]) <= EXACT
    assert relative_norm(results[2], results[0]) <= EXACT
    assert torch.equal(output(model, inputs | residuals()), plain)


def test_stable_diffusion_controlnet_pipeline_equals_diffusers_pag_pipeline() -> None:
    tiny = PIPELINES["sd15"]

    def pipeline(cls: Any, **options: Any) -> Any:
        pipe = tiny.build()
        controlnet = build(lambda: ControlNetModel.from_unet(pipe.unet, conditioning_embedding_out_channels=(8, 8)))
        made = cls(**pipe.components, controlnet=controlnet, requires_safety_checker=False, **options)
        made.set_progress_bar_config(disable=True)
        return made

    pipe = pipeline(StableDiffusionControlNetPipeline)
    peer = pipeline(StableDiffusionControlNetPAGPipeline, pag_applied_layers=["mid"])

    def kwargs() -> dict[str, Any]:
        return tiny.call_kwargs(pipe, batch=2) | {"image": random(2, 3, 16, 24).float()}

    pipe.vae_scale_factor = peer.vae_scale_factor
    plain, wanted = generate(pipe, kwargs()), generate(peer, kwargs() | {"pag_scale": 3.0})
    results = []
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(pipe, PAG(scale=3.0, layers="mid_block", **settings)):
            results.append(generate(pipe, kwargs()))
    assert relative_norm(wanted, plain) > VISIBLE
    for result in results:
        assert relative_norm(result, wanted) <= TOLERANCE


def test_sd3_controlnet_pipeline() -> None:
    tiny = PIPELINES["sd3"]
    base = tiny.build()
    controlnet = build(
        lambda: SD3ControlNetModel.from_transformer(
            base.transformer, num_layers=2, num_extra_conditioning_channels=0, load_weights_from_transformer=False
        )
    )
    pipe = StableDiffusion3ControlNetPipeline(**base.components, controlnet=controlnet)
    pipe.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        torch.manual_seed(0)  # the latents of the control image are drawn
        return generate(pipe, tiny.call_kwargs(pipe, batch=2) | {"control_image": random(2, 3, 16, 24).float()})

    plain, results = sample(), []
    assert relative_norm(plain, generate(base, tiny.call_kwargs(base, batch=2))) > VISIBLE
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(pipe, PAG(layers="transformer_blocks.2", **settings)):
            results.append(sample())
    assert relative_norm(results[0], plain) > VISIBLE
    assert relative_norm(results[1], results[0]) <= TOLERANCE
    assert relative_norm(results[2], results[0]) <= TOLERANCE


@pytest.mark.parametrize("layers", ["mid_block", "up_blocks.2"])
def test_t2i_adapter_pipeline(layers: str) -> None:
    tiny = PIPELINES["sd15"]
    base = tiny.build()
    adapter = build(
        lambda: T2IAdapter(
            in_channels=3, channels=[16, 32, 32], num_res_blocks=1, downscale_factor=2, adapter_type="full_adapter"
        )
    )
    parts = {name: part for name, part in base.components.items() if name != "image_encoder"}
    pipe = StableDiffusionAdapterPipeline(**parts, adapter=adapter, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)

    def sample() -> Tensor:
        return generate(pipe, tiny.call_kwargs(pipe) | {"image": random(1, 3, 16, 24).float()})

    plain, results = sample(), []
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(pipe, PAG(layers=layers, **settings)):
            results.append(sample())
    assert relative_norm(results[0], plain) > VISIBLE
    assert relative_norm(results[1], results[0]) <= TOLERANCE
    assert relative_norm(results[2], results[0]) <= TOLERANCE


@pytest.mark.parametrize("layers", ["mid_block", "up_blocks.1", "up_blocks.2"])
def test_freeu_changes_its_input_in_place(layers: str) -> None:
    model = FAMILIES["sd15"].build().double()
    inputs = doubled(FAMILIES["sd15"].inputs(model))
    model.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain, results = output(model, dict(inputs)), []
    for settings in ({"share_prefix": False}, {}, {"extra": "batched"}):
        with steer.apply(model, PAG(layers=layers, **settings)):
            results.append(output(model, dict(inputs)))
    assert relative_norm(results[0], plain) > VISIBLE
    assert relative_norm(results[1], results[0]) <= EXACT
    assert relative_norm(results[2], results[0]) <= EXACT


def test_a_forward_that_skips_blocks_itself() -> None:
    """`skip_layers` of SD3's forward: a block of the prefix is never called, so nothing of it can be recorded."""
    model = FAMILIES["sd3"].build().double()
    results = []
    for settings in ({"share_prefix": False}, {}):
        inputs = doubled(FAMILIES["sd3"].inputs(model)) | {"skip_layers": [1]}
        with steer.apply(model, PAG(layers="transformer_blocks.2", **settings)):
            results.append(output(model, inputs))
    assert relative_norm(results[1], results[0]) <= EXACT


def recordings(handle: steer.Handle) -> list[Any]:
    blocks = [block for attachment in handle.state.attachments.values() for block in attachment.tape.blocks]
    return [block for block in blocks if block.recorded is not None or block.action is not None]


@pytest.mark.parametrize("name,layers", [("sd15", "mid_block"), ("sd3", "transformer_blocks.2"), ("wan21", "blocks.1")])
def test_nothing_is_kept_between_calls(name: str, layers: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    kept: list[Any] = []
    with steer.apply(pipe, PAG(layers=layers)) as handle:

        def after_step(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
            kept.extend(recordings(handle))
            return {}

        generate(pipe, tiny.call_kwargs(pipe) | {"callback_on_step_end": after_step})
    assert kept == []


def test_nothing_is_kept_after_an_error() -> None:
    model = FAMILIES["sd3"].build()
    plain = output(model, FAMILIES["sd3"].inputs(model))
    for at in (2, 4):  # in the ordinary pass, and in the extra one
        with steer.apply(model, PAG(layers="transformer_blocks.1"), Trip(at=at)) as handle:
            with pytest.raises(Tripped):
                output(model, FAMILIES["sd3"].inputs(model))
            assert recordings(handle) == []
            assert handle.state.attachments[""].scope.rows == ("cond",)
        assert torch.equal(output(model, FAMILIES["sd3"].inputs(model)), plain)
