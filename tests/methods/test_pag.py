"""PAG and SoftPAG against diffusers' PAG pipelines, explicit denoising loops, and the dense softmax map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from dense import dense_attention, doubled, identity_in, relative_norm, softmax_map, towards_identity
from diffusers.pipelines.flux.pipeline_flux import calculate_shift
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate, pag_peer
from torch import Tensor

import steer
from steer import PAG
from steer_patches.processors import Ports
from steer_patches.site import Call, Layout, Scope, Site

TOLERANCE = 1e-5
VISIBLE = 1e-3

PEERS = {  # pipeline: layers for steer, the same ones in the regexes of diffusers
    "sd15-mid": ("sd15", "mid_block", ["mid"]),
    "sd15-several": (
        "sd15",
        ["down_blocks.1", "mid_block", "up_blocks.2.attentions.1"],
        ["down_blocks.1", "mid", "up_blocks.2.attentions.1"],
    ),
    "sdxl-mid": ("sdxl", "mid_block", ["mid"]),
    "sdxl-several": ("sdxl", ["mid_block", "up_blocks.{0,1}"], ["mid", r"up_blocks\.(0|1)\."]),
    "sd3-one": ("sd3", "transformer_blocks.1", [r"blocks\.1\."]),
    "sd3-several": ("sd3", "transformer_blocks.{0,2}", [r"blocks\.0\.", r"blocks\.2\."]),
    "pixart-one": ("pixart", "transformer_blocks.1", [r"blocks\.1\."]),
    "pixart-several": ("pixart", ["transformer_blocks.0", "transformer_blocks.2"], [r"blocks\.(0|2)\."]),
}


# Not PixArt's adaptive scale: that peer compares a tensor of timesteps with 0, which fails with more than one row.
ADAPTIVE = [(case, adaptive) for case in PEERS for adaptive in (0.0, 0.004) if not (adaptive and "pixart" in case)]


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("case,adaptive", ADAPTIVE, ids=[f"{c}-{'adaptive' if a else 'constant'}" for c, a in ADAPTIVE])
def test_same_latents_as_diffusers_pag_pipeline(case: str, guidance_scale: float, adaptive: float) -> None:
    name, layers, regexes = PEERS[case]
    tiny = PIPELINES[name]
    pipe, peer = tiny.build(), pag_peer(name, regexes)

    def kwargs() -> dict[str, Any]:
        return tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale, steps=4)

    plain = generate(pipe, kwargs())
    wanted = generate(peer, kwargs() | {"pag_scale": 3.0, "pag_adaptive_scale": adaptive})
    with steer.apply(pipe, PAG(scale=3.0, adaptive_scale=adaptive, layers=layers)):
        guided = generate(pipe, kwargs())
    assert relative_norm(guided, plain) > VISIBLE
    assert relative_norm(guided, wanted) <= TOLERANCE


def test_adaptive_scale_changes_the_result() -> None:
    """Without this the parametrised test above could compare two constant scales."""
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    results = []
    for adaptive in (0.0, 0.004):
        with steer.apply(pipe, PAG(layers="transformer_blocks.1", adaptive_scale=adaptive)):
            results.append(generate(pipe, tiny.call_kwargs(pipe)))
    assert relative_norm(*results) > VISIBLE


# Explicit loops: three calls of the plain model a step, the perturbed one through the dense map.

Predict = Callable[..., Tensor]


def flux_loop(pipe: Any, kwargs: dict[str, Any], predict: Predict, perturb: Predict, scale: float) -> Tensor:
    latents, ids = kwargs["latents"], pipe._prepare_latent_image_ids(1, 4, 6, "cpu", torch.float32)
    steps, g = kwargs["num_inference_steps"], kwargs.get("true_cfg_scale", 1.0)
    pipe.scheduler.set_timesteps(
        sigmas=np.linspace(1.0, 1 / steps, steps), mu=calculate_shift(latents.shape[1], 16, 256, 0.5, 1.15)
    )
    for t in pipe.scheduler.timesteps:

        def inputs(prefix: str = "", t: Tensor = t, latents: Tensor = latents) -> dict[str, Any]:
            return {
                "hidden_states": latents,
                "timestep": t.expand(len(latents)) / 1000,
                "guidance": torch.full((len(latents),), kwargs["guidance_scale"]),
                "encoder_hidden_states": kwargs[f"{prefix}prompt_embeds"],
                "pooled_projections": kwargs[f"{prefix}pooled_prompt_embeds"],
                "txt_ids": torch.zeros(kwargs["prompt_embeds"].shape[1], 3),
                "img_ids": ids,
            }

        cond, weak = predict(inputs()), perturb(inputs())
        noise = cond + scale * (cond - weak)
        if g > 1:
            uncond = predict(inputs("negative_"))
            noise = uncond + g * (cond - uncond) + scale * (cond - weak)
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


def loop(pipe: Any, kwargs: dict[str, Any], predict: Predict, perturb: Predict, scale: float) -> Tensor:
    """Wan and SD3.5: latents, a timestep a row, the text, and pooled text where there is any."""
    latents, g = kwargs["latents"], kwargs["guidance_scale"]
    pipe.scheduler.set_timesteps(kwargs["num_inference_steps"])
    for t in pipe.scheduler.timesteps:

        def inputs(prefix: str = "", t: Tensor = t, latents: Tensor = latents) -> dict[str, Any]:
            text = {"encoder_hidden_states": kwargs[f"{prefix}prompt_embeds"]}
            if "pooled_prompt_embeds" in kwargs:
                text["pooled_projections"] = kwargs[f"{prefix}pooled_prompt_embeds"]
            return {"hidden_states": latents, "timestep": t.expand(len(latents)), **text}

        cond, weak = predict(inputs()), perturb(inputs())
        noise = cond + scale * (cond - weak)
        if g > 1:
            uncond = predict(inputs("negative_"))
            noise = uncond + g * (cond - uncond) + scale * (cond - weak)
        latents = pipe.scheduler.step(noise, t, latents).prev_sample
    return latents


IMAGE_LAST, IMAGE_FIRST = slice(7, 31), slice(0, 24)  # 4 x 6 image tokens, 7 text tokens

LOOPS = {
    "flux-double": ("flux", flux_loop, "transformer_blocks.1", ["transformer_blocks.1.attn"], IMAGE_LAST),
    "flux-single": ("flux", flux_loop, "single_transformer_blocks.0", ["single_transformer_blocks.0.attn"], IMAGE_LAST),
    "flux_true_cfg": (
        "flux_true_cfg",
        flux_loop,
        ["transformer_blocks.0", "single_transformer_blocks.1"],
        ["transformer_blocks.0.attn", "single_transformer_blocks.1.attn"],
        IMAGE_LAST,
    ),
    "wan21": ("wan21", loop, "blocks.{1,2}", ["blocks.1.attn1", "blocks.2.attn1"], slice(0, 72)),
    "sd35-dual": (
        "sd35",
        loop,
        "transformer_blocks.1",
        ["transformer_blocks.1.attn", "transformer_blocks.1.attn2"],
        IMAGE_FIRST,
    ),
    "sd35-joint": (
        "sd35",
        loop,
        "transformer_blocks.{1,2}.attn",
        ["transformer_blocks.1.attn", "transformer_blocks.2.attn"],
        IMAGE_FIRST,
    ),
}


@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("mode", ["image", "all"])
@pytest.mark.parametrize("name,denoise,layers,names,image", LOOPS.values(), ids=LOOPS)
def test_same_latents_as_an_explicit_loop(
    name: str, denoise: Any, layers: Any, names: list[str], image: slice, mode: str, guidance_scale: float
) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    kwargs = tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale)
    shape = {"sd35": (2, 4, 8, 12), "wan21": (2, 4, 3, 8, 12)}.get(name, (2, 24, 16))
    kwargs["latents"] = torch.randn(shape, generator=torch.Generator().manual_seed(3))
    model = tiny.build().transformer
    edit = identity_in(image) if mode == "image" else towards_identity(1.0)

    def predict(inputs: dict[str, Any]) -> Tensor:
        return output(model, inputs)

    def perturb(inputs: dict[str, Any]) -> Tensor:
        with dense_attention(model, names, edit):
            return output(model, inputs)

    wanted = denoise(tiny.build(), kwargs, predict, perturb, 3.0)
    plain = generate(pipe, kwargs)
    with steer.apply(pipe, PAG(scale=3.0, layers=layers, mode=mode)) as handle:
        assert sorted(site.name for site in handle.sites) == sorted(names)
        guided = generate(pipe, kwargs)
    assert relative_norm(guided, plain) > VISIBLE
    assert relative_norm(guided, wanted) <= TOLERANCE


# One forward of every family, in fp64 (Cosmos in fp32: its embeddings refuse fp64).

TEXT_FIRST = ("flux", "qwen_image", "cogvideox", "cogvideox_rotary")
DENOISERS = [name for name in FAMILIES if name not in ("llama", "llava")]


@pytest.mark.parametrize("mode", ["image", "all"])
@pytest.mark.parametrize("name", DENOISERS)
def test_every_family_equals_the_dense_map(name: str, mode: str) -> None:
    family, exact = FAMILIES[name], name != "cosmos"
    model = family.build().double() if exact else family.build()
    inputs = doubled(family.inputs(model)) if exact else family.inputs(model)
    editable = [site for site in steer.sites(model) if site.kind in PAG.kinds]
    site = editable[-2 if name.startswith("hunyuan") else len(editable) // 2]

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        tokens = scores.shape[-1]
        if mode == "all" or site.kind == "self":
            return torch.eye(tokens, dtype=scores.dtype).expand_as(scores)
        t, h, w = family.grid
        image = slice(tokens - t * h * w, tokens) if name in TEXT_FIRST else slice(0, t * h * w)
        return identity_in(image)(scores, weights)

    cond = output(model, dict(inputs))
    with dense_attention(model, [site.name], edit):
        weak = output(model, dict(inputs))
    with steer.apply(model, PAG(scale=2.0, layers=site.name, mode=mode)):
        guided = output(model, dict(inputs))
    assert relative_norm(weak, cond) > VISIBLE
    assert relative_norm(guided, cond + 2.0 * (cond - weak)) <= (1e-10 if exact else TOLERANCE)
    assert torch.equal(output(model, dict(inputs)), cond)


# The closed form and SoftPAG on random tensors.


def call_of(
    heads: int = 4,
    kv_heads: int = 4,
    image: int = 15,
    text: int = 6,
    text_first: bool = False,
    mask: Tensor | None = None,
    scale: float | None = None,
    kind: str = "joint",
) -> Call:
    generator = torch.Generator().manual_seed(0)
    tokens = image + text

    def random(h: int) -> Tensor:
        return torch.randn(2, h, tokens, 8, generator=generator, dtype=torch.float64)

    scope = Scope()
    scope.layout = Layout(image, (1, 3, image // 3), text_first)
    site = Site("block.attn", 0, kind, heads, kv_heads, 8, "test", scope=scope)
    return Call(2 * random(heads), random(kv_heads), random(kv_heads), mask, scale, False, site, 0)


def plain_attention(call: Call) -> Tensor:
    _, weights = softmax_map(call.query, call.key, call.mask, scale=call.scale)
    return weights @ call.value.repeat_interleave(call.query.shape[1] // call.value.shape[1], 1)


def masks(image: int, text: int, text_first: bool) -> dict[str, Tensor | None]:
    tokens = image + text
    keep = torch.ones(2, tokens, dtype=torch.bool)
    padded = slice(text - 3, text) if text_first else slice(tokens - 3, tokens)
    keep[1, padded] = False
    no_text = keep.clone()
    no_text[1, :text] = not text_first
    if not text_first:
        no_text[1, image:] = False
    else:
        no_text[1, text:] = True
    no_keys = keep[:, None, None, :].repeat(1, 1, tokens, 1)
    no_keys[0, :, 8:10] = False
    bias = torch.randn(2, 1, 1, tokens, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    return {
        "none": None,
        "key padding (B, S)": keep,
        "key padding (B, 1, 1, S)": keep[:, None, None, :],
        "a row without text": no_text[:, None, None, :],
        "two-sided": keep[:, None, None, :] & keep[:, None, :, None],
        "queries without keys": no_keys,
        "additive (B, 1, 1, S)": bias,
        "additive (B, 1, S, S)": bias + bias.transpose(-1, -2),
    }


@pytest.mark.parametrize("which", masks(15, 6, False))
@pytest.mark.parametrize("kv_heads", [4, 2, 1], ids=["mha", "gqa", "mqa"])
@pytest.mark.parametrize("text_first", [False, True], ids=["image_first", "text_first"])
def test_closed_form_equals_the_masked_softmax(text_first: bool, kv_heads: int, which: str) -> None:
    mask = masks(15, 6, text_first)[which]
    call = call_of(kv_heads=kv_heads, text_first=text_first, mask=mask, scale=0.7)
    image = slice(6, 21) if text_first else slice(0, 15)
    scores, weights = softmax_map(call.query, call.key, mask, scale=0.7)
    wanted = identity_in(image)(scores, weights) @ call.value.repeat_interleave(4 // kv_heads, 1)
    got = PAG(layers="*").attend(call, plain_attention)
    assert relative_norm(got, wanted) <= 1e-12
    assert relative_norm(got, plain_attention(call)) > VISIBLE


@pytest.mark.parametrize("strength", [0.25, 0.5, 1.0])
@pytest.mark.parametrize("heads", [None, [1, 3]], ids=["all_heads", "two_heads"])
@pytest.mark.parametrize("kv_heads", [4, 2], ids=["mha", "gqa"])
def test_softpag_is_the_map_moved_towards_the_identity(strength: float, heads: list[int] | None, kv_heads: int) -> None:
    call = call_of(kv_heads=kv_heads)
    if heads is not None:
        chosen = torch.zeros(4, 1, 1, dtype=torch.bool)
        chosen[heads] = True
        call = call.replace(heads=chosen)
    scores, weights = softmax_map(call.query, call.key)
    wanted = towards_identity(strength, heads)(scores, weights) @ call.value.repeat_interleave(4 // kv_heads, 1)
    plain = plain_attention(call)
    got = PAG(layers="*", mode="all", strength=strength).attend(call, lambda c: plain)
    assert relative_norm(got, wanted) <= 1e-12
    for head in set(range(4)) - set(heads or range(4)):
        assert torch.equal(got[:, head], plain[:, head])


def test_soft_image_mode_moves_towards_the_image_block_rule() -> None:
    call = call_of()
    full = PAG(layers="*").attend(call, plain_attention)
    half = PAG(layers="*", strength=0.5).attend(call, plain_attention)
    assert relative_norm(half, (full + plain_attention(call)) / 2) <= 1e-12


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_softpag_in_a_model_equals_the_dense_map(name: str) -> None:
    family = FAMILIES[name]
    model = family.build().double()
    inputs = doubled(family.inputs(model))
    site = next(s for s in reversed(steer.sites(model)) if s.kind in PAG.kinds)
    with dense_attention(model, [site.name], towards_identity(0.3, [1])):
        weak = output(model, dict(inputs))
    cond = output(model, dict(inputs))
    with steer.apply(model, PAG(scale=2.0, heads={site.name: [1]}, mode="all", strength=0.3)):
        guided = output(model, dict(inputs))
    assert relative_norm(weak, cond) > VISIBLE
    assert relative_norm(guided, cond + 2.0 * (cond - weak)) <= 1e-10


def test_all_heads_at_full_strength_is_the_plain_identity() -> None:
    pipe = PIPELINES["sd3"].build()
    results = []
    for settings in ({}, {"heads": [0, 1]}, {"heads": {"transformer_blocks.1": [0, 1]}, "strength": 1.0}):
        with steer.apply(pipe, PAG(layers="transformer_blocks.1", mode="all", **settings)):
            results.append(generate(pipe, PIPELINES["sd3"].call_kwargs(pipe)))
    assert torch.equal(results[0], results[1])
    assert torch.equal(results[0], results[2])


NEUTRAL = {
    "scale": {"scale": 0.0},
    "strength": {"mode": "all", "strength": 0.0},
    "heads": {"heads": []},
    "empty mapping": {"heads": {}},
    "mapping without heads": {"heads": {"*.attn*": []}},
}


@pytest.mark.parametrize("settings", NEUTRAL.values(), ids=NEUTRAL)
@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_neutral_settings_are_bit_identical_and_run_no_extra_pass(name: str, settings: dict[str, Any]) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    layers = [site.name for site in steer.sites(pipe) if site.kind in PAG.kinds]
    plain = generate(pipe, tiny.call_kwargs(pipe))
    forwards = []
    model = getattr(pipe, "unet", None) or pipe.transformer
    hook = model.register_forward_hook(lambda *_: forwards.append(1))
    with steer.apply(pipe, PAG(layers=layers, **settings)) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)
        assert all(row["extra_passes"] == 0 for row in handle.stats["methods"])
    hook.remove()
    assert len(forwards) == (6 if name == "wan21" else 3)


def test_unselected_heads_of_a_model_stay_bit_identical() -> None:
    """Seen where the heads leave the port, before the output projection mixes them."""
    family = FAMILIES["sd3"]
    model = family.build()
    inputs, name = family.inputs(model), "transformer_blocks.1.attn"
    seen: list[Tensor] = []
    projection = model.get_submodule(name).to_out[0]
    hook = projection.register_forward_pre_hook(lambda _, args: seen.append(args[0]))
    with steer.apply(model, PAG(layers=name, heads=[1], strength=0.5, mode="all")):
        assert isinstance(model.get_submodule(name).processor, Ports)
        output(model, inputs)
    hook.remove()
    cond, weak = (value.unflatten(-1, (2, 8)) for value in seen)
    assert torch.equal(cond[:, :, 0], weak[:, :, 0])
    assert not torch.equal(cond[:, :, 1], weak[:, :, 1])


@pytest.mark.parametrize("mode", ["image", "all"])
def test_half_precision_stays_finite_and_close(mode: str) -> None:
    """The gate of the closed form is computed in fp32: bf16 must not be worse than bf16 itself."""
    call = call_of()
    wanted = PAG(layers="*", mode=mode).attend(call, plain_attention)
    low = call.replace(query=call.query.bfloat16(), key=call.key.bfloat16(), value=call.value.bfloat16())

    def sdpa(c: Call) -> Tensor:
        return torch.nn.functional.scaled_dot_product_attention(c.query, c.key, c.value, attn_mask=c.mask)

    got = PAG(layers="*", mode=mode).attend(low, sdpa)
    assert got.dtype == torch.bfloat16
    exact = call.replace(query=low.query.double(), key=low.key.double(), value=low.value.double())
    eager = relative_norm(sdpa(low).double(), plain_attention(exact))
    assert relative_norm(got.double(), PAG(layers="*", mode=mode).attend(exact, plain_attention)) <= 2 * eager
    assert relative_norm(got.double(), wanted) < 0.1
