"""The pipelines' own features with steer applied: adapters, callbacks, batches, offloading, saving."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import dense_attention, doubled, identity_in, relative_norm
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.models.embeddings import ImageProjection
from peft import LoraConfig
from peft.utils import get_peft_model_state_dict
from probes import Count, assert_untouched, snapshot
from recorder import record
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate, pag_peer
from torch import Tensor

import steer
from steer import PAG, SLG
from steer_patches.attach import SiteLost
from steer_patches.processors import Ports, UnhookableProcessor

TOLERANCE = 1e-5
VISIBLE = 1e-3

LAYERS = {
    "sd15": "mid_block",
    "sd15_text": "mid_block",
    "sdxl": "mid_block",
    "sd3": "transformer_blocks.1",
    "sd3_text": "transformer_blocks.1",
    "flux": "single_transformer_blocks.0",
    "flux_true_cfg": "single_transformer_blocks.0",
    "wan21": "blocks.1",
    "pixart": "transformer_blocks.1",
    "animatediff": "mid_block",
    "cogvideox": "transformer_blocks.1",
}


def denoiser(pipe: Any) -> Any:
    return getattr(pipe, "unet", None) or pipe.transformer


def steered(pipe: Any, name: str, kwargs: dict[str, Any], **settings: Any) -> Tensor:
    with steer.apply(pipe, PAG(layers=LAYERS[name], **settings)):
        return generate(pipe, kwargs)


# LoRA


@pytest.fixture(scope="module")
def loras(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A random LoRA for each of some pipelines, in the file format of that pipeline."""
    folders = {}
    for name in ("sd15", "sd3", "flux", "wan21"):
        pipe = PIPELINES[name].build()
        torch.manual_seed(1)
        targets = ["to_q", "to_k", "to_v", "to_out.0"]
        denoiser(pipe).add_adapter(LoraConfig(r=4, lora_alpha=8, target_modules=targets, init_lora_weights=False))
        part = "unet" if hasattr(pipe, "unet") else "transformer"
        folders[name] = tmp_path_factory.mktemp(name)
        type(pipe).save_lora_weights(
            folders[name], **{f"{part}_lora_layers": get_peft_model_state_dict(denoiser(pipe))}
        )
    return folders


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21"])
def test_lora_loaded_before_and_after(name: str, loras: dict[str, Path]) -> None:
    tiny = PIPELINES[name]
    before, after = tiny.build(), tiny.build()
    bare = steered(before, name, tiny.call_kwargs(before))
    before.load_lora_weights(loras[name])
    loaded = generate(before, tiny.call_kwargs(before))
    wanted = steered(before, name, tiny.call_kwargs(before))
    handle = steer.apply(after, PAG(layers=LAYERS[name]))
    after.load_lora_weights(loras[name])
    assert torch.equal(generate(after, tiny.call_kwargs(after)), wanted)
    assert relative_norm(wanted, bare) > VISIBLE
    assert relative_norm(wanted, loaded) > VISIBLE
    handle.remove()
    assert torch.equal(generate(after, tiny.call_kwargs(after)), loaded)


@pytest.mark.parametrize(
    "name,argument",
    [("sd15_text", "cross_attention_kwargs"), ("sd3", "joint_attention_kwargs"), ("flux", "joint_attention_kwargs")],
)
def test_lora_scale_holds_in_the_extra_pass(name: str, argument: str, loras: dict[str, Path]) -> None:
    """The scale is an argument of the forward, so the extra pass has to get it too."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    pipe.load_lora_weights(loras[name.removesuffix("_text")])

    def kwargs(scale: float) -> dict[str, Any]:
        return tiny.call_kwargs(pipe) | {argument: {"scale": scale}}

    full = steered(pipe, name, kwargs(1.0))
    shared, unshared = (steered(pipe, name, kwargs(0.3), share_prefix=share) for share in (True, False))
    batched = steered(pipe, name, kwargs(0.3), extra="batched")
    assert relative_norm(unshared, full) > VISIBLE
    assert relative_norm(shared, unshared) <= TOLERANCE
    assert relative_norm(batched, unshared) <= TOLERANCE
    denoiser(pipe).set_adapters(pipe.get_active_adapters(), 0.3)  # the same scale, set on the layers
    assert relative_norm(steered(pipe, name, tiny.call_kwargs(pipe)), unshared) <= TOLERANCE


def test_lora_unloaded_fused_and_disabled_while_steered(loras: dict[str, Path]) -> None:
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    with steer.apply(pipe, PAG(layers="mid_block")):
        bare = generate(pipe, tiny.call_kwargs(pipe))
        pipe.load_lora_weights(loras["sd15"])
        loaded = generate(pipe, tiny.call_kwargs(pipe))
        pipe.unet.disable_lora()
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), bare)
        pipe.unet.enable_lora()
        pipe.fuse_lora()
        assert relative_norm(generate(pipe, tiny.call_kwargs(pipe)), loaded) <= TOLERANCE
        pipe.unfuse_lora()
        pipe.unload_lora_weights()
        assert relative_norm(generate(pipe, tiny.call_kwargs(pipe)), bare) <= TOLERANCE


# IP-Adapter


def ip_adapter_state(model: Any, width: int) -> dict[str, dict[str, Tensor]]:
    """Random weights in the layout of an IP-Adapter file, for a UNet or for FLUX."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(2)
        projection = ImageProjection(cross_attention_dim=width, image_embed_dim=width, num_image_text_embeds=4)
        image = {k.replace("image_embeds", "proj"): v for k, v in projection.state_dict().items()}
        adapter: dict[str, Tensor] = {}
        if hasattr(model, "single_transformer_blocks"):
            for i in range(len(model.transformer_blocks)):
                for part in ("k", "v"):
                    adapter[f"{i}.to_{part}_ip.weight"] = torch.randn(model.inner_dim, width) / width**0.5
                    adapter[f"{i}.to_{part}_ip.bias"] = torch.zeros(model.inner_dim)
        else:
            names = [name for name in model.attn_processors if name.endswith("attn2.processor")]
            for i, name in enumerate(names):
                size = model.get_submodule(name.removesuffix(".processor")).to_k.out_features
                for part in ("k", "v"):  # the file's keys are odd numbers
                    adapter[f"{2 * i + 1}.to_{part}_ip.weight"] = torch.randn(size, width) / width**0.5
    return {"image_proj": image, "ip_adapter": adapter}


def image_prompt(cfg: bool, seed: int = 0) -> list[Tensor]:
    return [torch.randn(2 if cfg else 1, 1, 32, generator=torch.Generator().manual_seed(seed))]


@pytest.mark.parametrize("layers,regex", [("mid_block", "mid"), ("up_blocks.1", "up_blocks.1")])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["cfg", "no_cfg"])
def test_ip_adapter_equals_diffusers_pag_pipeline(guidance_scale: float, layers: str, regex: str) -> None:
    tiny = PIPELINES["sd15"]
    pipe, peer = tiny.build(), pag_peer("sd15", [regex])
    for each in (pipe, peer):
        each.unet._load_ip_adapter_weights([ip_adapter_state(each.unet, 32)], low_cpu_mem_usage=False)

    def kwargs(seed: int = 0) -> dict[str, Any]:
        given = tiny.call_kwargs(pipe, guidance_scale=guidance_scale)
        return given | {"ip_adapter_image_embeds": image_prompt(guidance_scale > 1, seed)}

    plain = generate(pipe, kwargs())
    wanted = generate(peer, kwargs() | {"pag_scale": 3.0})
    with steer.apply(pipe, PAG(layers=layers)):
        guided = generate(pipe, kwargs())
        other = generate(pipe, kwargs(seed=1))
    assert relative_norm(guided, plain) > VISIBLE
    assert relative_norm(other, guided) > VISIBLE
    assert relative_norm(guided, wanted) <= TOLERANCE
    assert torch.equal(generate(pipe, kwargs()), plain)


def test_flux_ip_adapter_port_is_untouched(monkeypatch: pytest.MonkeyPatch) -> None:
    """The image prompt has an attention call of its own in the double blocks; PAG edits the other one."""
    tiny = PIPELINES["flux_true_cfg"]

    def build() -> Any:
        pipe = tiny.build()
        state = [ip_adapter_state(pipe.transformer, 32)]
        pipe.transformer._load_ip_adapter_weights(state, low_cpu_mem_usage=False)
        return pipe

    pipe, name = build(), "transformer_blocks.1.attn"
    model = build().transformer
    kwargs = tiny.call_kwargs(pipe) | {
        "ip_adapter_image_embeds": image_prompt(False),
        "negative_ip_adapter_image_embeds": image_prompt(False, seed=1),
    }
    count = Count()
    with steer.apply(pipe, PAG(layers=name), count):
        _, steps = record(pipe, kwargs, monkeypatch)
    assert {port for site, port in count.seen if site == name} == {0, 1}
    joint = identity_in(slice(7, 31))

    def main_call_only(scores: Tensor, weights: Tensor) -> Tensor:
        return joint(scores, weights) if scores.shape[-1] == 31 else weights

    for step in steps:
        cond, _, uncond = (dict(inputs) for inputs in step.inputs)
        with dense_attention(model, [name], main_call_only):
            weak = output(model, image_kept(cond, 0))
        cond, uncond = output(model, image_kept(cond, 0)), output(model, image_kept(uncond, 1))
        wanted = uncond + 4.0 * (cond - uncond) + 3.0 * (cond - weak)
        assert relative_norm(weak, cond) > VISIBLE
        assert relative_norm(step.prediction, wanted) <= TOLERANCE


def image_kept(inputs: dict[str, Any], seed: int) -> dict[str, Any]:
    """The recorded inputs with the image prompt back in: the forward takes it out of the dictionary it is given."""
    return inputs | {"joint_attention_kwargs": {"ip_adapter_image_embeds": image_prompt(False, seed)}}


def test_ip_adapter_loaded_after_apply_is_refused_at_the_next_run() -> None:
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    handle = steer.apply(pipe, PAG(layers="mid_block"))
    pipe.unet._load_ip_adapter_weights([ip_adapter_state(pipe.unet, 32)], low_cpu_mem_usage=False)
    kwargs = tiny.call_kwargs(pipe) | {"ip_adapter_image_embeds": image_prompt(True)}
    with pytest.raises(SiteLost, match=r"down_blocks\.0\.attentions\.0\.transformer_blocks\.0\.attn2 was replaced"):
        generate(pipe, kwargs)
    handle.remove()
    assert not any(isinstance(processor, Ports) for processor in pipe.unet.attn_processors.values())
    plain = generate(pipe, tiny.call_kwargs(pipe) | {"ip_adapter_image_embeds": image_prompt(True)})
    again = tiny.call_kwargs(pipe) | {"ip_adapter_image_embeds": image_prompt(True)}
    assert relative_norm(steered(pipe, "sd15", again), plain) > VISIBLE


# Callbacks and guidance_scale


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd3", "flux_true_cfg", "wan21", "cogvideox", "animatediff"])
def test_callbacks_fire_and_may_change_the_latents(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    seen: list[int] = []

    def shrink(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        seen.append(i)
        return {"latents": kwargs["latents"] * 0.9}

    untouched = steered(pipe, name, tiny.call_kwargs(pipe))
    changed = steered(pipe, name, tiny.call_kwargs(pipe) | {"callback_on_step_end": shrink})
    assert seen == [0, 1, 2]
    assert relative_norm(changed, untouched) > VISIBLE


def test_guidance_scale_changed_between_runs() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    results = {}
    with steer.apply(pipe, PAG(layers="transformer_blocks.1")):
        for scale in (4.0, 1.0, 7.0, 4.0, 1.0):
            result = generate(pipe, tiny.call_kwargs(pipe, guidance_scale=scale))
            assert torch.equal(results.setdefault(scale, result), result)
    for scale, result in results.items():
        fresh = tiny.build()
        assert torch.equal(steered(fresh, "sd3", tiny.call_kwargs(fresh, guidance_scale=scale)), result)


@pytest.mark.parametrize("extra", ["separate", "batched"])
@pytest.mark.parametrize("name", ["sd15", "sd3"])
def test_cfg_switched_off_during_a_run(name: str, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """As diffusers' documentation does it: the callback keeps the conditional half of the embeddings."""
    tiny = PIPELINES[name]
    pipe, model = tiny.build(), denoiser(tiny.build())
    embeds = ["prompt_embeds", "pooled_prompt_embeds"] if name == "sd3" else ["prompt_embeds"]

    def without_cfg(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        if i != 1:
            return {}
        pipe._guidance_scale = 0.0
        return {key: kwargs[key].chunk(2)[-1] for key in embeds}

    kwargs = tiny.call_kwargs(pipe, steps=4) | {
        "callback_on_step_end": without_cfg,
        "callback_on_step_end_tensor_inputs": ["latents", *embeds],
    }
    with steer.apply(pipe, PAG(layers=LAYERS[name], extra=extra)):
        _, steps = record(pipe, kwargs, monkeypatch)
    site = "transformer_blocks.1.attn" if name == "sd3" else "mid_block.attentions.0.transformer_blocks.0.attn1"

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        tokens = scores.shape[-1]
        return identity_in(slice(0, 24 if name == "sd3" else tokens))(scores, weights)

    for i, step in enumerate(steps):
        rows = 2 if i < 2 else 1
        inputs = {k: v[:rows] if isinstance(v, Tensor) and v.ndim else v for k, v in step.inputs[0].items()}
        pred = output(model, dict(inputs))
        with dense_attention(model, [site], edit):
            weak = output(model, dict(inputs))[-1:]
        wanted = pred[-1:] + 3.0 * (pred[-1:] - weak)
        if i < 2:
            wanted = pred[:1] + 4.0 * (pred[1:] - pred[:1]) + 3.0 * (pred[1:] - weak)
        assert relative_norm(step.prediction, wanted) <= TOLERANCE


def test_interrupted_run() -> None:
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()

    def interrupt(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        pipe._interrupt = i == 1
        return {}

    with steer.apply(pipe, PAG(layers="mid_block")) as handle:
        generate(pipe, tiny.call_kwargs(pipe, steps=5) | {"callback_on_step_end": interrupt})
        assert handle.stats["methods"][0]["extra_passes"] == 2
        wanted = generate(pipe, tiny.call_kwargs(pipe))
    assert torch.equal(steered(pipe, "sd15", tiny.call_kwargs(pipe)), wanted)


# Prompts and batches


@pytest.mark.parametrize("extra", ["separate", "batched"])
@pytest.mark.parametrize("guidance_scale", [4.0, 1.0], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "flux_true_cfg", "wan21", "animatediff"])
def test_rows_of_a_batch_are_what_they_are_alone(name: str, guidance_scale: float, extra: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()

    def kwargs() -> dict[str, Any]:
        given = tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale)
        return given | {"generator": [torch.Generator().manual_seed(seed) for seed in (7, 8)]}

    together = steered(pipe, name, kwargs(), extra=extra)
    for row in range(2):
        alone = {k: v[row : row + 1] if isinstance(v, Tensor) else v for k, v in kwargs().items()}
        alone["generator"] = alone["generator"][row]
        assert relative_norm(steered(pipe, name, alone, extra=extra), together[row : row + 1]) <= TOLERANCE


@pytest.mark.parametrize("name", ["sd15_text", "sd3_text"])
def test_prompts_negative_prompts_and_images_per_prompt(name: str) -> None:
    tiny = PIPELINES[name]
    regex = "mid" if name == "sd15_text" else r"blocks\.1\."
    pipe, peer = tiny.build(), pag_peer(name, [regex])
    calls = {
        "prompts": {},
        "two images of each": {"num_images_per_prompt": 2},
        "another negative prompt": {"negative_prompt": ["green", "red"]},
        "no negative prompt": {"negative_prompt": None},
    }
    results = {}
    for what, change in calls.items():
        given = tiny.call_kwargs(pipe, batch=2) | change
        wanted = generate(peer, tiny.call_kwargs(peer, batch=2) | change | {"pag_scale": 3.0})
        results[what] = steered(pipe, name, given)
        assert relative_norm(results[what], wanted) <= TOLERANCE, what
    assert len(results["two images of each"]) == 4
    assert relative_norm(results["another negative prompt"], results["prompts"]) > VISIBLE


def test_pictures_come_out() -> None:
    tiny = PIPELINES["sd15_text"]
    pipe = tiny.build()
    with steer.apply(pipe, PAG(layers="mid_block")):
        (picture,) = pipe(**tiny.call_kwargs(pipe) | {"output_type": "pil"}).images
    assert picture.size == (24, 16)


# Offloading, slicing, casting, FreeU


def test_model_cpu_offload_without_an_accelerator_is_refused_as_before() -> None:
    if torch.accelerator.is_available():
        pytest.skip("this machine has an accelerator")
    pipe = PIPELINES["sd15"].build()
    with pytest.raises(RuntimeError) as unsteered:
        pipe.enable_model_cpu_offload()
    with steer.apply(pipe, PAG(layers="mid_block")), pytest.raises(RuntimeError) as now:
        pipe.enable_model_cpu_offload()
    assert str(now.value) == str(unsteered.value)


OFFLOADS = {
    "model": lambda pipe: pipe.enable_model_cpu_offload(device="cpu"),
    "group": lambda pipe: denoiser(pipe).enable_group_offload(
        onload_device=torch.device("cpu"), offload_device=torch.device("cpu"), offload_type="leaf_level"
    ),
    "group of blocks": lambda pipe: denoiser(pipe).enable_group_offload(
        onload_device=torch.device("cpu"),
        offload_device=torch.device("cpu"),
        offload_type="block_level",
        num_blocks_per_group=1,
    ),
}


@pytest.mark.parametrize("offload", OFFLOADS.values(), ids=OFFLOADS)
@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_offloading_hooks_before_and_after(name: str, offload: Any) -> None:
    """With the CPU for both ends: the hooks of accelerate and diffusers are the real ones, nothing moves."""
    tiny = PIPELINES[name]
    plain = tiny.build()
    wanted = steered(plain, name, tiny.call_kwargs(plain))
    before, after = tiny.build(), tiny.build()
    offload(before)
    assert torch.equal(steered(before, name, tiny.call_kwargs(before)), wanted)
    handle = steer.apply(after, PAG(layers=LAYERS[name]))
    offload(after)
    assert torch.equal(generate(after, tiny.call_kwargs(after)), wanted)
    handle.remove()
    assert torch.equal(generate(after, tiny.call_kwargs(after)), generate(plain, tiny.call_kwargs(plain)))


@pytest.mark.gpu
@pytest.mark.parametrize("way", ["model", "sequential"])
@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_cpu_offload_on_a_gpu(name: str, way: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    wanted = steered(pipe, name, tiny.call_kwargs(pipe))
    getattr(pipe, f"enable_{way}_cpu_offload")()
    assert relative_norm(steered(pipe, name, tiny.call_kwargs(pipe)).cpu(), wanted) <= 1e-2  # tf32


def test_attention_slicing_is_refused_with_the_way_out() -> None:
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    generate(pipe, tiny.call_kwargs(pipe))
    pipe.enable_attention_slicing()
    before = snapshot(pipe)
    with pytest.raises(UnhookableProcessor, match=r"mid_block\..*SlicedAttnProcessor.*disable_attention_slicing"):
        steer.apply(pipe, PAG(layers="mid_block"))
    assert_untouched(before, pipe)
    pipe.disable_attention_slicing()
    handle = steer.apply(pipe, PAG(layers="mid_block"))
    pipe.enable_attention_slicing()
    with pytest.raises(SiteLost, match="SlicedAttnProcessor"):
        generate(pipe, tiny.call_kwargs(pipe))
    handle.remove()


@pytest.mark.parametrize(
    "layers,regex", [("mid_block", "mid"), ("up_blocks.1", "up_blocks.1"), ("up_blocks.2", "up_blocks.2")]
)
def test_freeu_equals_diffusers_pag_pipeline(layers: str, regex: str) -> None:
    tiny = PIPELINES["sd15"]
    pipe, peer = tiny.build(), pag_peer("sd15", [regex])
    bare = generate(pipe, tiny.call_kwargs(pipe))
    for each in (pipe, peer):
        each.enable_freeu(s1=0.9, s2=0.2, b1=1.5, b2=1.6)
    plain = generate(pipe, tiny.call_kwargs(pipe))
    wanted = generate(peer, tiny.call_kwargs(peer) | {"pag_scale": 3.0})
    with steer.apply(pipe, PAG(layers=layers)):
        assert relative_norm(generate(pipe, tiny.call_kwargs(pipe)), wanted) <= TOLERANCE
    assert relative_norm(plain, bare) > VISIBLE


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21", "flux"])
def test_dtype_changed_after_apply(name: str) -> None:
    tiny = PIPELINES[name]
    early, late = tiny.build(), tiny.build()
    denoiser(early).double()
    kwargs = doubled(tiny.call_kwargs(early))
    wanted = steered(early, name, kwargs, heads=[1], strength=0.5)
    with steer.apply(late, PAG(layers=LAYERS[name], heads=[1], strength=0.5)):
        generate(late, tiny.call_kwargs(late))
        late.to(torch.float64)
        assert torch.equal(generate(late, doubled(tiny.call_kwargs(late))), wanted)


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21"])
def test_layerwise_casting_before_and_after(name: str) -> None:
    tiny = PIPELINES[name]
    early, late = tiny.build(), tiny.build()
    exact = steered(early, name, tiny.call_kwargs(early))

    def cast(pipe: Any) -> None:
        denoiser(pipe).enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)

    cast(early)
    wanted = steered(early, name, tiny.call_kwargs(early))
    with steer.apply(late, PAG(layers=LAYERS[name])):
        cast(late)
        assert torch.equal(generate(late, tiny.call_kwargs(late)), wanted)
    assert relative_norm(wanted, exact) > VISIBLE


# Saving, and other pipelines round the same models


@pytest.mark.parametrize("name", ["sd15_text", "sd3_text"])
def test_a_steered_pipeline_is_saved_as_an_unsteered_one(name: str, tmp_path: Path) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    pipe.save_pretrained(tmp_path / "plain")
    with steer.apply(pipe, PAG(layers=LAYERS[name])):
        guided = generate(pipe, tiny.call_kwargs(pipe))
        pipe.save_pretrained(tmp_path / "steered")
    for file in sorted(path for path in (tmp_path / "plain").rglob("*") if path.is_file()):
        other = tmp_path / "steered" / file.relative_to(tmp_path / "plain")
        assert other.read_bytes() == file.read_bytes(), file.name
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "sd3_text" else {}
    loaded = DiffusionPipeline.from_pretrained(tmp_path / "steered", **absent)
    loaded.set_progress_bar_config(disable=True)
    assert type(loaded) is type(pipe)
    for part in loaded.components.values():  # at an address in the file, on which it depends how a product is rounded
        for weight in part.parameters() if isinstance(part, torch.nn.Module) else ():
            weight.data = weight.data.clone()
    assert torch.equal(generate(loaded, tiny.call_kwargs(loaded)), plain)
    assert torch.equal(steered(loaded, name, tiny.call_kwargs(loaded)), guided)


@pytest.mark.parametrize("name", ["sd15", "wan21"])
def test_a_denoiser_called_by_hand_is_refused(name: str) -> None:
    """A loop of the user's own: whether a row is conditional is known to that loop alone."""
    pipe = PIPELINES[name].build()
    model = denoiser(pipe)
    inputs = FAMILIES[PIPELINES[name].family].inputs(model)
    plain = output(model, inputs)
    with steer.apply(pipe, PAG(layers=LAYERS[name])), pytest.raises(RuntimeError, match="outside"):
        output(model, inputs)
    with steer.apply(model, PAG(layers=LAYERS[name])):
        assert relative_norm(output(model, inputs), plain) > VISIBLE
    assert torch.equal(output(model, inputs), plain)


def test_diffusers_pag_pipeline_is_refused_with_the_way_out() -> None:
    peer = pag_peer("sd15", ["mid"])
    with pytest.raises(steer.CompositionError, match="from_pipe"):
        steer.apply(peer, PAG(layers="mid_block"))
    plain = StableDiffusionPipeline.from_pipe(peer)
    plain.set_progress_bar_config(disable=True)
    tiny = PIPELINES["sd15"]
    wanted = generate(peer, tiny.call_kwargs(peer) | {"pag_scale": 3.0})
    assert relative_norm(steered(plain, "sd15", tiny.call_kwargs(plain)), wanted) <= TOLERANCE


def test_a_second_pipeline_round_steered_models_is_refused() -> None:
    """Its runs are not followed by the clock of the first, so rows and steps would be guessed."""
    tiny = PIPELINES["sd15"]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    second = StableDiffusionPipeline.from_pipe(pipe)
    second.set_progress_bar_config(disable=True)
    with steer.apply(pipe, PAG(layers="mid_block")):
        guided = generate(pipe, tiny.call_kwargs(pipe))
        with pytest.raises(steer.CompositionError, match="another pipeline"):
            steer.apply(second, PAG(layers="mid_block"))
        with pytest.raises(RuntimeError, match="outside"):
            generate(second, tiny.call_kwargs(second))
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), guided)
    assert torch.equal(generate(second, tiny.call_kwargs(second)), plain)


def test_slg_and_lora_together(loras: dict[str, Path]) -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    pipe.load_lora_weights(loras["sd3"])
    kwargs = {"steps": 6}
    own = {"skip_guidance_layers": [1], "skip_layer_guidance_stop": 0.5, "joint_attention_kwargs": {"scale": 0.5}}
    wanted = generate(pipe, tiny.call_kwargs(pipe, **kwargs) | own)
    with steer.apply(pipe, SLG(layers="transformer_blocks.1", steps="0.01:0.5")):
        guided = generate(pipe, tiny.call_kwargs(pipe, **kwargs) | {"joint_attention_kwargs": {"scale": 0.5}})
    assert relative_norm(guided, wanted) <= TOLERANCE
