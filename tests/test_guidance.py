"""Guidance over real pipelines: what reaches the scheduler is the formula, whatever the CFG style and the schedule."""

from __future__ import annotations

import warnings
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from dense import dense_attention, identity_in, relative_norm, without_blocks
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    EulerAncestralDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    HeunDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionPAGImg2ImgPipeline,
    StableDiffusionPAGPipeline,
)
from probes import Scale, relative_error
from recorder import Step, record
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import PAG, SEG, SLG, GuidanceWarning
from steer_patches.site import Run

TOLERANCE = 1e-5
VISIBLE = 1e-3
CFG, SCALE = 4.0, 3.0

TEXT_FIRST = ("flux", "qwen_image", "cogvideox", "cogvideox_rotary")

SITES = {  # pipeline: the perturbed site
    "sd15": "mid_block.attentions.0.transformer_blocks.0.attn1",
    "sd15_text": "mid_block.attentions.0.transformer_blocks.0.attn1",
    "sdxl": "up_blocks.0.attentions.0.transformer_blocks.1.attn1",
    "sd3": "transformer_blocks.1.attn",
    "sd3_text": "transformer_blocks.1.attn",
    "sd35": "transformer_blocks.1.attn",
    "pixart": "transformer_blocks.1.attn1",
    "pixart_alpha": "transformer_blocks.1.attn1",
    "flux": "single_transformer_blocks.0.attn",
    "flux_true_cfg": "transformer_blocks.1.attn",
    "qwen_image": "transformer_blocks.1.attn",
    "wan21": "blocks.1.attn1",
    "wan22": "blocks.1.attn1",
    "wan22_5b": "blocks.1.attn1",
    "hunyuan_video": "transformer_blocks.1.attn",
    "hunyuan_video15": "transformer_blocks.1.attn",
    "cogvideox": "transformer_blocks.1.attn1",
    "cogvideox_rotary": "transformer_blocks.1.attn1",
    "ltx": "transformer_blocks.1.attn1",
    "mochi": "transformer_blocks.1.attn1",
    "cosmos": "transformer_blocks.1.attn1",
    "animatediff": "mid_block.attentions.0.transformer_blocks.0.attn1",
}
SEQUENTIAL = ("flux_true_cfg", "qwen_image", "wan21", "wan22", "wan22_5b", "hunyuan_video", "hunyuan_video15", "cosmos")
WARN = ("qwen_image",)


def plain_models(name: str) -> list[Any]:
    """The denoisers of an unsteered copy of a pipeline."""
    pipe = PIPELINES[name].build()
    return [m for m in (getattr(pipe, n, None) for n in ("unet", "transformer", "transformer_2")) if m is not None]


def dense(name: str, model: Any) -> Any:
    """A context in which the perturbed site of `SITES` follows PAG's rule through the full map."""
    family = FAMILIES[PIPELINES[name].family]

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        tokens, (t, h, w) = scores.shape[-1], family.grid
        if not SITES[name].endswith(".attn") and family.name not in ("cogvideox", "cogvideox_rotary", "mochi"):
            return torch.eye(tokens).expand_as(scores)
        return identity_in(slice(tokens - t * h * w, tokens) if family.name in TEXT_FIRST else slice(0, t * h * w))(
            scores, weights
        )

    return dense_attention(model, [SITES[name]], edit)


def branches(name: str, models: list[Any], step: Step, cfg: bool) -> tuple[Tensor | None, Tensor, Tensor]:
    """(uncond or None, cond, weak) of one step, from plain models on the inputs that the pipeline gave."""
    model = models[1] if len(models) == 2 and step.timestep < 800 else models[0]
    first = step.inputs[0]
    cond = output(model, dict(first))
    with dense(name, model):
        weak = output(model, dict(first))
    if not cfg:
        return None, cond, weak
    if name in SEQUENTIAL:
        return output(model, dict(step.inputs[2])), cond, weak
    return cond.chunk(2)[0], cond.chunk(2)[1], weak.chunk(2)[1]


def combined(name: str, uncond: Tensor | None, cond: Tensor, weak: Tensor) -> Tensor:
    """The card's formula, and what these pipelines do with a prediction afterwards."""
    shift = SCALE * (cond - weak)
    if name == "cosmos":  # preconditions both branches first; the scheduler gets them in one batch
        return cond + shift if uncond is None else torch.cat([uncond + shift, cond + shift])
    result = cond + shift if uncond is None else uncond + CFG * (cond - uncond) + shift
    if name == "qwen_image" and uncond is not None:
        result = result * (cond + shift).norm(dim=-1, keepdim=True) / result.norm(dim=-1, keepdim=True)
    return result.chunk(2, dim=1)[0] if name.startswith("pixart") else result


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", [name for name in SITES if name != "flux"] + ["flux"])
def test_prediction_is_the_formula(name: str, cfg: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, models = PIPELINES[name], plain_models(name)
    pipe = tiny.build()
    kwargs = tiny.call_kwargs(pipe, batch=2, guidance_scale=CFG if cfg else 1.0)
    with (
        steer.apply(pipe, PAG(scale=SCALE, layers=SITES[name])) as handle,
        warnings.catch_warnings(record=True) as seen,
    ):
        warnings.simplefilter("always")
        _, steps = record(pipe, kwargs, monkeypatch)
        assert sum(row["extra_passes"] for row in handle.stats["methods"]) == 3
    warned = any(issubclass(w.category, GuidanceWarning) for w in seen)
    assert warned == (cfg and name in WARN)
    if name == "cosmos":
        steps = steps[::2]
    assert len(steps) == 3
    cfg = cfg and name != "flux"  # distilled: one branch, the scale is an input
    for step in steps:
        assert len(step.inputs) == (3 if cfg and name in SEQUENTIAL else 2)
        uncond, cond, weak = branches(name, models, step, cfg)
        assert relative_norm(weak, cond) > VISIBLE
        assert relative_norm(step.prediction, combined(name, uncond, cond, weak)) <= TOLERANCE


@pytest.mark.parametrize("name", ["sd3", "wan21", "flux"])
def test_two_methods_add_both_terms(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny, models = PIPELINES[name], plain_models(name)
    pipe, path = tiny.build(), {"wan21": "blocks"}.get(name, "transformer_blocks")
    methods = PAG(scale=SCALE, layers=SITES[name]), SLG(scale=2.0, layers=f"{path}.0", steps=":")
    with steer.apply(pipe, *methods) as handle:
        _, steps = record(pipe, tiny.call_kwargs(pipe, batch=2), monkeypatch)
        assert [row["extra_passes"] for row in handle.stats["methods"]] == [3, 3]
    for step in steps:
        if name == "wan21":  # cond, its two extra passes, uncond
            step.inputs.pop(1)
        uncond, cond, weak = branches(name, models, step, name != "flux")
        with without_blocks(models[0].get_submodule(path), [0], "h" if name == "wan21" else "eh"):
            skip = output(models[0], dict(step.inputs[0]))
        skip = skip.chunk(2)[1] if name == "sd3" else skip
        wanted = combined(name, uncond, cond, weak) + 2.0 * (cond - skip)
        assert relative_norm(step.prediction, wanted) <= TOLERANCE


def test_methods_applied_one_after_the_other_equal_methods_applied_together() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    pag, seg = PAG(layers="transformer_blocks.1"), SEG(layers="transformer_blocks.1")
    with steer.apply(pipe, pag, seg):
        together = generate(pipe, tiny.call_kwargs(pipe))
    first, second = steer.apply(pipe, pag), steer.apply(pipe, seg)
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), together)
    first.remove()
    alone = generate(pipe, tiny.call_kwargs(pipe))
    second.remove()
    with steer.apply(pipe, seg):
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), alone)
    assert relative_norm(alone, together) > VISIBLE


def test_adaptive_scale_at_every_step(monkeypatch: pytest.MonkeyPatch) -> None:
    """s - a (1000 - t), never below zero; where it is zero no extra pass runs."""
    tiny, models = PIPELINES["sd15"], plain_models("sd15")
    pipe = tiny.build()
    with steer.apply(pipe, PAG(scale=3.0, adaptive_scale=0.005, layers="mid_block")) as handle:
        _, steps = record(pipe, tiny.call_kwargs(pipe, steps=5), monkeypatch)
        passes = handle.stats["methods"][0]["extra_passes"]
    scales = [max(0.0, 3.0 - 0.005 * (1000 - step.timestep)) for step in steps]
    assert passes == sum(scale > 0 for scale in scales) == 3
    for step, scale in zip(steps, scales, strict=True):
        uncond, cond, weak = branches("sd15", models, step, True)
        wanted = uncond + CFG * (cond - uncond) + scale * (cond - weak)
        assert relative_norm(step.prediction, wanted) <= TOLERANCE
        assert len(step.inputs) == (2 if scale else 1)


def test_adaptive_scale_on_a_model_is_refused() -> None:
    model = FAMILIES["sd3"].build()
    with steer.apply(model, PAG(adaptive_scale=0.1, layers="*")), pytest.raises(ValueError, match="needs the timestep"):
        output(model, FAMILIES["sd3"].inputs(model))


def test_adaptive_scale_follows_the_noise_where_timesteps_rise(monkeypatch: pytest.MonkeyPatch) -> None:
    """Mochi counts from 0 (noise) to 1000 (clean)."""
    tiny = PIPELINES["mochi"]
    pipe = tiny.build()
    with steer.apply(pipe, PAG(scale=3.0, adaptive_scale=0.006, layers="transformer_blocks.1")):
        _, steps = record(pipe, tiny.call_kwargs(pipe, steps=8), monkeypatch)
    guided = [len(step.inputs) == 2 for step in steps]
    assert guided == [1000 - step.timestep > 500 for step in steps]
    assert guided[0]
    assert not guided[-1]


def test_adaptive_scale_without_a_timestep_scale_is_refused() -> None:
    """Cosmos' scheduler counts in log noise levels."""
    tiny = PIPELINES["cosmos"]
    pipe = tiny.build()
    with (
        steer.apply(pipe, PAG(adaptive_scale=0.004, layers="transformer_blocks.1")),
        pytest.raises(ValueError, match=r"adaptive_scale.*EDMEulerScheduler"),
    ):
        generate(pipe, tiny.call_kwargs(pipe))


WINDOWS = [
    (":", range(10)),
    (None, range(10)),
    ("0.2:0.9", range(2, 9)),
    ("0.25:", range(3, 10)),
    ("3:5", range(3, 5)),
    ("8:", range(8, 10)),
    (range(2, 4), range(2, 4)),
    ("20:30", range(0)),
]


@pytest.mark.parametrize("steps,wanted", WINDOWS, ids=str)
@pytest.mark.parametrize("name", ["sd15", "wan21", "cosmos"])
def test_step_windows(name: str, steps: Any, wanted: range, monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    calls = 2 if name in SEQUENTIAL else 1
    with steer.apply(pipe, PAG(layers=SITES[name], steps=steps)) as handle:
        _, recorded = record(pipe, tiny.call_kwargs(pipe, steps=10), monkeypatch)
        assert handle.stats["methods"][0]["extra_passes"] == len(wanted)
        assert handle.stats["runs"] == 1
    recorded = recorded[::2] if name == "cosmos" else recorded
    assert [i for i, step in enumerate(recorded) if len(step.inputs) > calls] == list(wanted)


def test_outside_its_window_the_latents_are_bit_identical() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, PAG(layers="transformer_blocks.1", steps="5:")) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)
        assert handle.stats["methods"][0]["extra_passes"] == 0


@contextmanager
def halved(model: Any, names: list[str], rows: slice) -> Any:
    """Attention outputs of some modules and rows times 0.5, seen from the projection that follows."""

    def halve(_: Any, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        scaled = args[0].clone()
        scaled[rows] *= 0.5
        return (scaled, *args[1:])

    hooks = [model.get_submodule(name).to_out[0].register_forward_pre_hook(halve) for name in names]
    yield
    for hook in hooks:
        hook.remove()


@pytest.mark.parametrize("extra", ["separate", "batched"])
@pytest.mark.parametrize("rows", [None, "cond"])
def test_beside_an_ordinary_method(rows: str | None, extra: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A method for conditional rows also acts in the perturbed pass, whose rows are conditional."""
    tiny, (model,) = PIPELINES["sd15"], plain_models("sd15")
    pipe = tiny.build()
    names = [site.name for site in steer.sites(pipe) if site.kind == "cross"]
    methods = PAG(scale=SCALE, layers="mid_block", extra=extra), Scale(layers=names, rows=rows)
    with steer.apply(pipe, *methods):
        _, steps = record(pipe, tiny.call_kwargs(pipe, batch=2), monkeypatch)
    for step in steps:
        inputs = step.inputs[0]
        if extra == "batched":  # uncond, cond, perturbed
            inputs = {k: v[:4] if isinstance(v, Tensor) and v.ndim else v for k, v in inputs.items()}
        with halved(model, names, slice(None) if rows is None else slice(2, 4)):
            uncond, cond, weak = branches("sd15", [model], Step(step.prediction, step.timestep, [inputs]), True)
        assert relative_norm(step.prediction, combined("sd15", uncond, cond, weak)) <= TOLERANCE


def test_row_roles_are_refused_where_attention_runs_row_by_row() -> None:
    pipe = PIPELINES["mochi"].build()
    with pytest.raises(steer.CompositionError, match=r"row by row.*rows='cond'"):
        steer.apply(pipe, Scale(layers="transformer_blocks.1", rows="cond"))


def guidance_warnings(pipe: Any, runs: list[dict[str, Any]]) -> list[str]:
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        for kwargs in runs:
            generate(pipe, kwargs)
    return [str(w.message) for w in seen if issubclass(w.category, GuidanceWarning)]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "ltx"])
def test_guidance_rescale_warns_once(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    layers = SITES[name]
    with steer.apply(pipe, PAG(layers=layers)):
        messages = guidance_warnings(pipe, [tiny.call_kwargs(pipe) | {"guidance_rescale": 0.7} for _ in range(2)])
    assert len(messages) == 1
    assert "guidance_rescale=0.7" in messages[0]
    with steer.apply(pipe, PAG(layers=layers)):
        assert guidance_warnings(pipe, [tiny.call_kwargs(pipe)]) == []
        unguided = tiny.call_kwargs(pipe, guidance_scale=1.0) | {"guidance_rescale": 0.7}
        assert guidance_warnings(pipe, [unguided]) == []  # without CFG nothing is rescaled


def peer_with(scheduler: Any, **config: Any) -> tuple[Any, Any]:
    """The SD pipeline and diffusers' PAG pipeline of it, each with a scheduler of its own."""
    pair = (
        PIPELINES["sd15"].build(),
        StableDiffusionPAGPipeline.from_pipe(PIPELINES["sd15"].build(), pag_applied_layers=["mid"]),
    )
    for pipe in pair:
        pipe.scheduler = scheduler.from_config(pipe.scheduler.config, **config)
        pipe.set_progress_bar_config(disable=True)
    return pair


SCHEDULERS = {
    "Heun": (HeunDiscreteScheduler, 7),
    "DPM++ 2M": (DPMSolverMultistepScheduler, 4),
    "Euler a": (EulerAncestralDiscreteScheduler, 4),
    "PNDM": (PNDMScheduler, 5),
}


@pytest.mark.parametrize("scheduler,calls", SCHEDULERS.values(), ids=SCHEDULERS)
def test_schedulers_of_other_orders(scheduler: Any, calls: int) -> None:
    """Heun calls the model twice in all steps but the last, PNDM twice in one; each call is guided."""
    tiny = PIPELINES["sd15"]
    pipe, peer = peer_with(scheduler, **({"skip_prk_steps": True} if scheduler is PNDMScheduler else {}))
    wanted = generate(peer, tiny.call_kwargs(peer, steps=4) | {"pag_scale": 3.0})
    with steer.apply(pipe, PAG(layers="mid_block")) as handle:
        guided = generate(pipe, tiny.call_kwargs(pipe, steps=4))
        assert handle.stats["methods"][0]["extra_passes"] == calls
    assert relative_norm(guided, wanted) <= TOLERANCE


def test_heun_counts_fractions_over_its_model_calls(monkeypatch: pytest.MonkeyPatch) -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    pipe.scheduler = FlowMatchHeunDiscreteScheduler(shift=3.0)
    with steer.apply(pipe, PAG(layers="transformer_blocks.1", steps="0.5:")):
        _, steps = record(pipe, tiny.call_kwargs(pipe, steps=4), monkeypatch)
    assert [len(step.inputs) for step in steps] == [1, 1, 1, 1, 2, 2, 2]  # 7 calls, from call 3.5 on


def test_scheduler_replaced_between_runs() -> None:
    tiny = PIPELINES["sd15"]
    pipe, peer = tiny.build(), peer_with(EulerAncestralDiscreteScheduler)[1]
    first = pipe.scheduler
    wanted = generate(peer, tiny.call_kwargs(peer, steps=4) | {"pag_scale": 3.0})
    with steer.apply(pipe, PAG(layers="mid_block", steps="0.0:0.5")) as windowed:
        generate(pipe, tiny.call_kwargs(pipe, steps=4))
        assert windowed.stats["methods"][0]["extra_passes"] == 2
        pipe.scheduler = EulerAncestralDiscreteScheduler.from_config(pipe.scheduler.config)
        generate(pipe, tiny.call_kwargs(pipe, steps=6))
        assert windowed.stats["methods"][0]["extra_passes"] == 2 + 3
        assert type(first) is DDIMScheduler
        assert not [name for name in vars(first) if name.startswith("_steer")]
    assert not [name for name in vars(pipe.scheduler) if name.startswith("_steer")]
    with steer.apply(pipe, PAG(layers="mid_block")):
        assert relative_norm(generate(pipe, tiny.call_kwargs(pipe, steps=4)), wanted) <= TOLERANCE


@pytest.mark.parametrize("strength,run", [(1.0, 10), (0.5, 5), (0.3, 3)])
def test_image_to_image_counts_the_steps_that_run(strength: float, run: int) -> None:
    tiny = PIPELINES["sd15"]
    image = torch.rand(1, 3, 16, 24, generator=torch.Generator().manual_seed(0))
    pair = [
        StableDiffusionImg2ImgPipeline.from_pipe(tiny.build()),
        StableDiffusionPAGImg2ImgPipeline.from_pipe(tiny.build(), pag_applied_layers=["mid"]),
    ]
    for pipe in pair:
        pipe.set_progress_bar_config(disable=True)
    pipe, peer = pair

    def kwargs() -> dict[str, Any]:
        given = tiny.call_kwargs(pipe, steps=10) | {"image": image, "strength": strength}
        return {key: value for key, value in given.items() if key not in ("height", "width")}

    wanted = generate(peer, kwargs() | {"pag_scale": 3.0, "pag_adaptive_scale": 0.002})
    with steer.apply(pipe, PAG(layers="mid_block", adaptive_scale=0.002)):
        assert relative_norm(generate(pipe, kwargs()), wanted) <= TOLERANCE
    with steer.apply(pipe, PAG(layers="mid_block", steps="0.4:1.0")) as handle:
        generate(pipe, kwargs())
        assert handle.stats["methods"][0]["extra_passes"] == sum(i >= 0.4 * run - 1e-9 for i in range(run))


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux_true_cfg", "wan22", "cogvideox"])
def test_runs_do_not_depend_on_earlier_runs(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    with steer.apply(pipe, PAG(layers=SITES[name])) as handle:
        first = generate(pipe, tiny.call_kwargs(pipe))
        other = generate(pipe, tiny.call_kwargs(pipe, seed=1, batch=2, steps=2))
        again = generate(pipe, tiny.call_kwargs(pipe))
        assert handle.stats["runs"] == 3
    assert torch.equal(first, again)
    assert other.shape != first.shape


class Stop(RuntimeError):
    pass


@pytest.mark.parametrize("name", ["sd15", "sd3", "wan21", "flux_true_cfg"])
def test_an_error_in_the_middle_of_a_run_leaves_no_trace(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))

    def stop(pipe: Any, i: int, t: Any, kwargs: dict[str, Any]) -> dict[str, Any]:
        raise Stop

    with steer.apply(pipe, PAG(layers=SITES[name], steps="0.3:")) as handle:
        wanted = generate(pipe, tiny.call_kwargs(pipe))
        with pytest.raises(Stop):
            generate(pipe, tiny.call_kwargs(pipe) | {"callback_on_step_end": stop})
        run: Run = next(iter(handle.state.attachments.values())).scope.run
        assert (run.step, run.calls, run.num_steps, run.branch) == (0, 0, None, None)
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), wanted)
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)


@pytest.mark.parametrize("name", ["wan21", "flux_true_cfg"])
def test_an_error_between_the_branches_leaves_no_shift(name: str) -> None:
    """The model fails in the unconditional call, after the shift of the conditional one was kept."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    calls: list[int] = []

    def fail(*_: Any) -> None:
        calls.append(1)
        if len(calls) == 3:  # cond, extra pass, uncond
            raise Stop

    with steer.apply(pipe, PAG(layers=SITES[name])):
        wanted = generate(pipe, tiny.call_kwargs(pipe))
        hook = pipe.transformer.register_forward_pre_hook(fail)
        with pytest.raises(Stop):
            generate(pipe, tiny.call_kwargs(pipe))
        hook.remove()
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), wanted)


def test_custom_timesteps_and_sigmas() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    kwargs = tiny.call_kwargs(pipe) | {"num_inference_steps": 4, "sigmas": [1.0, 0.7, 0.4, 0.2]}
    with steer.apply(pipe, PAG(layers="transformer_blocks.1", steps="0.5:")) as handle:
        generate(pipe, kwargs)
        assert handle.stats["methods"][0]["extra_passes"] == 2


def test_half_precision_pipeline_stays_close() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    with steer.apply(pipe, PAG(layers="transformer_blocks.1")):
        exact = generate(pipe, tiny.call_kwargs(pipe))
        pipe.transformer.to(torch.bfloat16)
        kwargs = {
            k: v.bfloat16() if isinstance(v, Tensor) and v.is_floating_point() else v
            for k, v in tiny.call_kwargs(pipe).items()
        }
        low = generate(pipe, kwargs)
    assert low.dtype == torch.bfloat16
    assert relative_error(low.float(), exact) < 0.1


def test_gradient_checkpointing_is_refused() -> None:
    model = FAMILIES["sd3"].build()
    model.requires_grad_(True).enable_gradient_checkpointing()
    kwargs = FAMILIES["sd3"].inputs(model)
    with steer.apply(model, steer.PAG(layers="transformer_blocks.1")):
        with pytest.raises(RuntimeError, match="gradient checkpointing"):
            model(**kwargs)
        with torch.no_grad():
            model(**kwargs)
