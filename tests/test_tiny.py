"""The tiny models are what the other tests take them for: real, deterministic, and sensitive to rows and text."""

from __future__ import annotations

import pytest
import torch
from tiny import FAMILIES, Family, count_attention_calls, output
from tiny_pipelines import PAG_PEERS, PIPELINES, TinyPipeline, generate, pag_peer
from torch import Tensor

each_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)
each_pipeline = pytest.mark.parametrize("tiny", PIPELINES.values(), ids=PIPELINES)


def relative_change(value: Tensor, reference: Tensor) -> float:
    return float((value - reference).norm() / reference.norm())


@each_family
def test_output_is_finite_and_the_same_in_each_build(family: Family) -> None:
    predictions = [output(model, family.inputs(model)) for model in (family.build(), family.build())]
    assert predictions[0].isfinite().all()
    assert torch.equal(*predictions)


@each_family
def test_build_leaves_the_global_generator_alone(family: Family) -> None:
    state = torch.get_rng_state()
    model = family.build()
    family.inputs(model)
    assert torch.equal(torch.get_rng_state(), state)


@each_family
def test_model_is_frozen_and_has_no_zero_parameter(family: Family) -> None:
    model = family.build()
    assert not model.training
    for name, parameter in model.named_parameters():
        assert not parameter.requires_grad, name
        assert parameter.any(), name


@each_family
def test_rows_and_text_change_the_output(family: Family) -> None:
    model = family.build()
    kwargs = family.inputs(model)
    prediction = output(model, kwargs)
    other_text = output(model, kwargs | {family.text: kwargs[family.text].flip(0)})
    assert relative_change(prediction[0], prediction[1]) > 0.1
    assert relative_change(other_text, prediction) > 0.01


@each_family
def test_rows_do_not_depend_on_each_other(family: Family) -> None:
    model = family.build()
    kwargs = family.inputs(model)
    latents = next(iter(kwargs))
    changed = kwargs[latents].clone()
    changed[1] = changed[0]
    before, after = output(model, kwargs), output(model, kwargs | {latents: changed})
    torch.testing.assert_close(after[0], before[0])
    assert relative_change(after[1], before[1]) > 0.1


@each_family
@pytest.mark.parametrize("batch", [1, 3])
def test_batch_sizes(family: Family, batch: int) -> None:
    model = family.build()
    assert output(model, family.inputs(model, batch=batch)).shape[0] == batch


@each_family
def test_attention_calls(family: Family) -> None:
    model = family.build()
    kwargs = family.inputs(model, batch=2)
    assert count_attention_calls(lambda: output(model, kwargs)) == family.attention_calls


def test_count_sees_a_function_bound_before() -> None:
    from torch.nn.functional import scaled_dot_product_attention as attention

    query = torch.ones(1, 1, 2, 4)
    assert count_attention_calls(lambda: (attention(query, query, query), query + query)) == 1


@each_pipeline
def test_pipeline_repeats_and_depends_on_seed_and_guidance(tiny: TinyPipeline) -> None:
    pipe = tiny.build()

    def run(**options: float) -> Tensor:
        return generate(pipe, tiny.call_kwargs(pipe, **options))

    latents = run(batch=2)
    assert latents.shape[0] == 2
    assert latents.isfinite().all()
    assert torch.equal(run(batch=2), latents)
    assert relative_change(run(batch=2, seed=1), latents) > 0.1
    assert relative_change(run(batch=2, guidance_scale=1.0), latents) > 0.01
    assert run(steps=2).shape[0] == 1


@pytest.mark.parametrize(
    "name", [name for name in PIPELINES if name.split("_")[0] in ("sd15", "sdxl", "sd3", "pixart")]
)
def test_pipeline_decodes(name: str) -> None:
    pipe = PIPELINES[name].build()
    images = generate(pipe, PIPELINES[name].call_kwargs(pipe) | {"output_type": "pt"})
    assert images.shape == (1, 3, 16, 24)
    assert images.isfinite().all()


@pytest.mark.parametrize("name", ["sd15_text", "sd3_text"])
def test_prompts_are_read(name: str) -> None:
    pipe = PIPELINES[name].build()
    kwargs = PIPELINES[name].call_kwargs(pipe)
    latents = generate(pipe, kwargs)
    for changed in ({"prompt": ["a green fox"]}, {"negative_prompt": ["dull"]}):
        assert relative_change(generate(pipe, PIPELINES[name].call_kwargs(pipe) | changed), latents) > 0.01


def test_wan22_runs_both_experts() -> None:
    pipe = PIPELINES["wan22"].build()
    called = set()
    for expert in ("transformer", "transformer_2"):
        getattr(pipe, expert).register_forward_pre_hook(lambda *_, expert=expert: called.add(expert))
    generate(pipe, PIPELINES["wan22"].call_kwargs(pipe))
    assert called == {"transformer", "transformer_2"}


@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
@pytest.mark.parametrize("name", PAG_PEERS)
def test_pag_peer_has_the_same_weights_and_perturbs(name: str, guidance_scale: float) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    peer = pag_peer(name, ["mid"] if hasattr(pipe, "unet") else ["blocks.1"])
    latents = generate(pipe, tiny.call_kwargs(pipe, guidance_scale=guidance_scale))

    def guided(pag_scale: float) -> Tensor:
        return generate(peer, tiny.call_kwargs(peer, guidance_scale=guidance_scale) | {"pag_scale": pag_scale})

    assert torch.equal(guided(0.0), latents)
    assert relative_change(guided(3.0), latents) > 0.01
