"""Bad input gets an error that says what was asked and what exists, and leaves the model exactly as it was."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers.models.attention_processor import AttnProcessor
from probes import Count, Scale, Through, Trip, Tripped, assert_untouched, inputs_of, parts, snapshot, steer_attributes
from tiny import FAMILIES, build, make_sd3, output
from tiny_pipelines import PIPELINES, generate

import steer
from steer_patches.attach import SiteLost
from steer_patches.processors import Ports, UnhookableProcessor

REPLACED_BY_FUSING = ["sd15", "sd3", "pixart", "cogvideox"]
KEPT_WHEN_FUSING = ["flux", "wan21"]


def run(model: torch.nn.Module, name: str) -> torch.Tensor:
    return output(model, inputs_of(FAMILIES[name], model))


@pytest.fixture
def sd3() -> torch.nn.Module:
    return FAMILIES["sd3"].build()


@pytest.fixture
def untouched() -> Iterator[Callable[[torch.nn.Module, str], None]]:
    """Call it with a model and its family; at the end of the test the model must be as it was then."""
    watched = []

    def watch(model: torch.nn.Module, name: str) -> None:
        plain = run(model, name)
        watched.append((model, name, plain, snapshot(model)))

    yield watch
    assert watched
    for model, name, plain, before in watched:
        assert_untouched(before, model)
        assert steer_attributes(model) == []
        assert torch.equal(run(model, name), plain)


EXISTING = r"transformer_blocks\.\{0\.\.2\}\.attn"


@pytest.mark.parametrize(
    ("method", "message"),
    [
        (Scale(layers="blocks"), f"layers='blocks' matches none of this model's attention sites.*{EXISTING}"),
        (Scale(layers="transformer_blocks.3"), rf"transformer_blocks\.3' matches none.*{EXISTING}"),
        (Scale(layers="transformer_blocks.{1..4}"), rf"transformer_blocks\.3' matches none.*{EXISTING}"),
        (Scale(layers=["transformer_blocks.0", "nowhere"]), f"layers='nowhere' matches none.*{EXISTING}"),
        (Scale(layers=[]), "layers is empty"),
        (Scale(layers="transformer_blocks.{2..0}"), "write the smaller number first"),
        (steer.PAG(layers="transformer_blocks.24"), rf"transformer_blocks\.24' matches none.*{EXISTING}"),
        (steer.SLG(layers="transformer_blocks.{1..3}", steps=":"), r"matches none of this model's blocks.*\{0\.\.2\}"),
        (Scale(heads=[2]), r"heads \[2\] do not exist at transformer_blocks\.0\.attn: it has heads 0 to 1"),
        (Scale(heads=[-1]), r"heads \[-1\] do not exist"),
        (steer.PAG(layers="transformer_blocks.1", heads=[0, 7, 5]), r"heads \[5, 7\] do not exist"),
        (Scale(layers=None, heads={"transformer_blocks.1": [4]}), r"heads \[4\] do not exist at transformer_blocks\.1"),
        (Scale(layers=None, heads={"blocks.1": [0]}), r"layers='blocks\.1' matches none"),
        (Scale(heads={"blocks.1": [0]}), r"blocks\.1.*matches none"),
        (
            Scale(layers="transformer_blocks.0", heads={"transformer_blocks.0": [0], "transformer_blocks.1": [1]}),
            r"transformer_blocks\.1.*matches none",
        ),
    ],
    ids=lambda value: value.describe() if isinstance(value, steer.Method) else "",
)
def test_selectors(sd3: torch.nn.Module, untouched: Any, method: steer.Method, message: str) -> None:
    untouched(sd3, "sd3")
    with pytest.raises(steer.SelectorError, match=f"(?s){message}"):
        steer.apply(sd3, method)


def test_selected_sites_of_the_wrong_kind(untouched: Any) -> None:
    model = FAMILIES["sd15"].build()
    untouched(model, "sd15")
    with pytest.raises(
        steer.SelectorError, match=r"(?s)matches only cross attention, but PAG works on self, joint.*attn1"
    ):
        steer.apply(model, steer.PAG(layers="*.attn2"))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: steer.PAG(mode="text"), 'mode=\'text\' must be "image" or "all"'),
        (lambda: steer.PAG(strength=1.5), r"strength=1.5 must lie in \[0, 1\]"),
        (lambda: steer.PAG(extra="parallel"), 'extra=\'parallel\' must be "separate" or "batched"'),
        (lambda: steer.PAG(adaptive_scale=-1.0), "adaptive_scale=-1.0 must not be negative"),
        (lambda: steer.PAG(rows="uncond"), "PAG edits the perturbed rows only"),
        (lambda: steer.PAG(rows="positive"), "rows='positive' is no row role; choose from uncond, cond"),
        (lambda: steer.PAG(steps="early"), "steps='early' is not understood"),
        (lambda: steer.PAG(steps="0.9:0.2"), "fractions must satisfy"),
        (lambda: steer.PAG(steps="9:2"), "start must not exceed stop"),
        (lambda: steer.PAG(steps="0.5:7"), "fractions must satisfy"),
        (lambda: steer.PAG(steps=range(0, 9, 2)), "must have a stride of 1"),
        (lambda: steer.PAG(min_tokens=-1), "min_tokens=-1 must not be negative"),
        (lambda: steer.SEG(sigma=-0.5), "sigma=-0.5 must not be negative"),
        (lambda: steer.SLG(heads=[0]), "it takes no heads"),
        (lambda: steer.SLG(extra="batched"), 'needs extra="separate"'),
    ],
)
def test_values_of_arguments(make: Callable[[], steer.Method], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()


@pytest.mark.parametrize("name", ["PAG", "SEG", "SLG"])
@pytest.mark.parametrize("field", ["scale", "adaptive_scale"])
def test_a_scale_that_is_not_a_number(name: str, field: str) -> None:
    with pytest.raises(ValueError, match=f"{field}=nan"):
        steer.methods()[name](**{field: math.nan})


def test_unknown_names_are_answered_with_the_known_ones() -> None:
    with pytest.raises(TypeError, match="unexpected keyword argument 'weight'"):
        steer.PAG(weight=1.0)
    with pytest.raises(AttributeError, match=r"steer has no 'PGA'; its methods are .*PAG"):
        _ = steer.PGA


def test_targets_and_methods_of_the_wrong_type(sd3: torch.nn.Module, untouched: Any) -> None:
    untouched(sd3, "sd3")
    for target in (torch.nn.Linear(2, 2), "stable-diffusion", None, {"unet": sd3}):
        with pytest.raises(TypeError, match=f"cannot steer a {type(target).__name__}: pass a diffusers pipeline"):
            steer.apply(target, Scale())
        with pytest.raises(TypeError, match=f"cannot steer a {type(target).__name__}"):
            steer.sites(target)
        with pytest.raises(TypeError, match=f"cannot steer a {type(target).__name__}"):
            steer.remove(target)
    with pytest.raises(TypeError, match="at least one method"):
        steer.apply(sd3)
    with pytest.raises(TypeError, match=r"PAG\(\) is not a method instance"):
        steer.apply(sd3, steer.PAG)
    with pytest.raises(TypeError, match="'PAG' is not a method instance"):
        steer.apply(sd3, Scale(), "PAG")


def test_methods_that_a_bare_model_cannot_run(sd3: torch.nn.Module, untouched: Any) -> None:
    untouched(sd3, "sd3")
    with pytest.raises(steer.CompositionError, match="needs a pipeline's scheduler to count steps"):
        steer.apply(sd3, Scale(steps="0.2:0.5"))
    llama = FAMILIES["llama"].build()
    untouched(llama, "llama")
    with pytest.raises(steer.CompositionError, match="LlamaForCausalLM is a language model"):
        steer.apply(llama, steer.PAG(layers="*"))


def test_the_same_method_twice(sd3: torch.nn.Module, untouched: Any) -> None:
    untouched(sd3, "sd3")
    method = Scale(layers="transformer_blocks.0")
    with pytest.raises(steer.CompositionError, match=r"is already applied at transformer_blocks\.0\.attn"):
        steer.apply(sd3, method, method)
    with pytest.raises(steer.CompositionError, match="is already applied"):
        steer.apply(sd3, Scale(), Scale(factor=0.1))
    with pytest.raises(steer.CompositionError, match="is already applied at the same blocks"):
        steer.apply(sd3, *(steer.SLG(layers="transformer_blocks.1", scale=scale, steps=":") for scale in (1.0, 2.0)))
    handle = steer.apply(sd3, method)
    edited = run(sd3, "sd3")
    attached = snapshot(sd3)
    for again in (method, Scale(factor=0.1)):
        with pytest.raises(steer.CompositionError, match=r"is already applied.*remove its handle before"):
            steer.apply(sd3, again)
        assert_untouched(attached, sd3)
        assert torch.equal(run(sd3, "sd3"), edited)
    steer.apply(sd3, Scale(layers="transformer_blocks.1")).remove()  # elsewhere it may join
    assert torch.equal(run(sd3, "sd3"), edited)
    handle.remove()


def test_nothing_is_half_applied(sd3: torch.nn.Module, untouched: Any) -> None:
    untouched(sd3, "sd3")
    with pytest.raises(steer.SelectorError, match="nowhere"):
        steer.apply(sd3, Scale(), Through(layers="nowhere"))


def test_nothing_is_half_applied_to_a_pipeline_of_two_models() -> None:
    tiny = PIPELINES["wan22"]
    pipe = tiny.build()
    plain, before = generate(pipe, tiny.call_kwargs(pipe)), snapshot(pipe)
    pipe.transformer_2.blocks[1].attn1.processor = Unhookable()
    with pytest.raises(UnhookableProcessor, match=r"blocks\.1\.attn1: Unhookable makes no attention call"):
        steer.apply(pipe, Scale())
    del pipe.transformer_2.blocks[1].attn1.processor
    pipe.transformer_2.blocks[1].attn1.processor = type(pipe.transformer.blocks[1].attn1.processor)()
    assert steer_attributes(pipe) == []
    assert [cls for _, cls, _ in snapshot(pipe)] == [cls for _, cls, _ in before]
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)


class Unhookable:
    def __call__(self, attn: Any, hidden_states: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return hidden_states


@pytest.mark.parametrize("name", REPLACED_BY_FUSING)
def test_processors_replaced_after_apply(name: str) -> None:
    model, reference = FAMILIES[name].build(), FAMILIES[name].build()
    plain = run(model, name)
    reference.fuse_qkv_projections()
    fused = run(reference, name)
    first = next(site.name for site in steer.sites(model))
    handle = steer.apply(model, Scale())
    model.fuse_qkv_projections()
    for _ in range(2):
        with pytest.raises(SiteLost, match=rf"(?s){first} was replaced after steer\.apply.*handle\.remove\(\)"):
            run(model, name)
    handle.remove()
    assert steer_attributes(model) == []
    assert torch.equal(run(model, name), fused)
    with steer.apply(model, Scale()):
        assert not torch.equal(run(model, name), fused)
    model.unfuse_qkv_projections()
    assert torch.equal(run(model, name), plain)
    assert not any(isinstance(part, Ports) for part in parts(model))


@pytest.mark.parametrize("name", KEPT_WHEN_FUSING)
def test_fusing_that_keeps_the_processors_keeps_the_method(name: str) -> None:
    model, reference = FAMILIES[name].build(), FAMILIES[name].build()
    reference.fuse_qkv_projections()
    fused = run(reference, name)
    with steer.apply(reference, Scale()):
        edited = run(reference, name)
    with steer.apply(model, Scale()):
        model.fuse_qkv_projections()
        assert torch.equal(run(model, name), edited)
    assert torch.equal(run(model, name), fused)


def test_processors_replaced_in_a_pipeline() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    before = snapshot(pipe)
    handle = steer.apply(pipe, steer.PAG(layers="transformer_blocks.1"))
    pipe.transformer.fuse_qkv_projections()
    with pytest.raises(SiteLost, match=r"transformer_blocks\.0\.attn was replaced"):
        generate(pipe, tiny.call_kwargs(pipe))
    handle.remove()
    assert steer_attributes(pipe) == []
    assert type(pipe) is before[0][1]
    assert type(pipe.scheduler) is before[1][1]
    generate(pipe, tiny.call_kwargs(pipe))


def test_processors_replaced_by_unhookable_ones() -> None:
    model = FAMILIES["sd15"].build()
    handle = steer.apply(model, Through(layers="mid_block"))
    model.set_attn_processor(AttnProcessor())
    with pytest.raises(SiteLost, match=r"AttnProcessor2_0 -> AttnProcessor\)"):
        run(model, "sd15")
    handle.remove()
    run(model, "sd15")


def test_model_of_a_pipeline_replaced_after_apply() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    handle = steer.apply(pipe, Scale())
    first, pipe.transformer = pipe.transformer, FAMILIES["sd3"].build()
    with pytest.raises(steer.CompositionError, match=r"pipe\.transformer was replaced after steer\.apply"):
        generate(pipe, tiny.call_kwargs(pipe))
    handle.remove()
    assert steer_attributes(first) == steer_attributes(pipe) == []


def saved(method: steer.Method, model: torch.nn.Module, directory: Path) -> steer.Method:
    """`method` as it is loaded after it was used on `model`."""
    with steer.apply(model, method):
        method.save(directory)
    return steer.load(directory)


@pytest.mark.parametrize(
    ("make", "name", "difference"),
    [
        (FAMILIES["flux"].build, "flux", "it was made for SD3Transformer2DModel, this is FluxTransformer2DModel"),
        (FAMILIES["llama"].build, "llama", "it was made for SD3Transformer2DModel, this is LlamaForCausalLM"),
        (lambda: build(lambda: make_sd3(dual_attention_layers=(0,))), "sd3", r"transformer_blocks\.0\.attn2"),
        (lambda: build(lambda: make_sd3(qk_norm="rms_norm")), "sd3", r"qk_norm \(None -> rms_norm\)"),
    ],
    ids=["class", "library", "sites", "config"],
)
def test_artifact_of_another_model(
    make: Any, name: str, difference: str, untouched: Any, tmp_path: Path, sd3: Any
) -> None:
    loaded = saved(steer.PAG(layers="*.attn"), sd3, tmp_path)
    model = make()
    untouched(model, name)
    untouched(sd3, "sd3")
    with pytest.raises(steer.FingerprintError, match=f"this saved PAG does not fit the model.*{difference}"):
        steer.apply(model, loaded)
    steer.apply(sd3, loaded).remove()


def test_artifact_of_a_model_with_as_many_other_sites(tmp_path: Path, untouched: Any) -> None:
    """What differs is named, not counted."""
    first, second = (build(lambda i=i: make_sd3(dual_attention_layers=(i,))) for i in (0, 1))
    loaded = saved(steer.PAG(layers="transformer_blocks.1.attn"), first, tmp_path)
    untouched(second, "sd3")
    with pytest.raises(steer.FingerprintError, match=r"transformer_blocks\.0\.attn2.*transformer_blocks\.1\.attn2"):
        steer.apply(second, loaded)


def test_artifacts_that_cannot_be_read(tmp_path: Path, sd3: torch.nn.Module) -> None:
    with pytest.raises(FileNotFoundError, match=r"holds no steer\.json"):
        steer.load(tmp_path)
    loaded = saved(steer.PAG(layers="transformer_blocks.1"), sd3, tmp_path)
    text = (tmp_path / "steer.json").read_text()
    for old, new, message in (
        ('"format": 1', '"format": 2', "has format 2; this version of steer reads 1"),
        ('"method": "PAG"', '"method": "PAX"', "holds a PAX; this version knows .*PAG"),
        ('"strength"', '"intensity"', "has fields that PAG does not: intensity"),
        ('"mode": "image"', '"mode": "text"', "mode='text' must be"),
    ):
        assert old in text
        (tmp_path / "steer.json").write_text(text.replace(old, new))
        with pytest.raises(ValueError, match=message):
            steer.load(tmp_path)
    (tmp_path / "steer.json").write_text(text)
    assert steer.load(tmp_path).settings() == loaded.settings()


@pytest.mark.parametrize("name", ["sd15", "flux", "wan21", "mochi", "llama", "llava"])
def test_method_that_raises_inside_a_forward(name: str) -> None:
    model = FAMILIES[name].build()
    plain = run(model, name)
    with steer.apply(model, Scale()):
        edited = run(model, name)
    before = snapshot(model)
    handle = steer.apply(model, Scale(), Trip(at=2))
    with pytest.raises(Tripped):
        run(model, name)
    assert torch.equal(run(model, name), edited)
    handle.remove()
    assert_untouched(before, model)
    assert torch.equal(run(model, name), plain)


@pytest.mark.parametrize("at", range(1, 6))
def test_method_that_raises_inside_a_guided_forward(at: int, untouched: Any) -> None:
    """The second pass of FLUX's four blocks shares the first two."""
    model = FAMILIES["flux"].build()
    untouched(model, "flux")
    method = steer.PAG(layers="single_transformer_blocks.0")
    with steer.apply(model, method):
        edited = run(model, "flux")
    with steer.apply(model, method, Trip(at=at)) as handle:
        with pytest.raises(Tripped):
            run(model, "flux")
        tape = handle.state.attachments[""].tape
        assert [(block.action, block.recorded) for block in tape.blocks] == [(None, None)] * 4
        assert torch.equal(run(model, "flux"), edited)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21", "cogvideox", "llama"])
@pytest.mark.parametrize("change", ["missing", "unknown", "shape"])
def test_wrong_inputs_raise_what_they_raise_unsteered(name: str, change: str, untouched: Any) -> None:
    model = FAMILIES[name].build()
    untouched(model, name)
    kwargs = inputs_of(FAMILIES[name], model)
    first = next(iter(kwargs))
    if change == "missing":
        del kwargs[first]
    elif change == "unknown":
        kwargs["guidance_sclae"] = 3.0
    else:
        kwargs[FAMILIES[name].text] = torch.ones(2, 3, 5, 7)

    def failure() -> tuple[type[BaseException], str] | None:
        try:
            model(**kwargs)
        except Exception as error:
            return type(error), str(error)
        return None

    plain = failure()
    edited = None
    with steer.apply(model, Scale()):
        assert failure() == plain
        edited = run(model, name)
    with steer.apply(model, Scale()):
        assert torch.equal(run(model, name), edited)


@pytest.mark.parametrize("name", ["sd3", "wan21"])
def test_exception_in_the_middle_of_a_run(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    sites = len(steer.sites(pipe))
    method = steer.PAG(layers="*blocks.1*")
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, method):
        edited = generate(pipe, tiny.call_kwargs(pipe))
    assert not torch.equal(edited, plain)
    before = [(type(part), list(vars(part))) for part, _, _ in snapshot(pipe)]
    handle = steer.apply(pipe, method, Trip(at=2 * sites))
    with pytest.raises(Tripped):
        generate(pipe, tiny.call_kwargs(pipe))
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), edited)
    handle.remove()
    assert [(type(part), list(vars(part))) for part, _, _ in snapshot(pipe)] == before
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), plain)


def test_applied_to_the_model_and_then_to_its_pipeline() -> None:
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    before = snapshot(pipe)
    handle = steer.apply(pipe.transformer, Scale())
    with pytest.raises(steer.CompositionError, match=r"pipe\.transformer is steered already"):
        steer.apply(pipe, Through())
    handle.remove()
    assert_untouched(before, pipe)
    steer.apply(pipe, Scale())
    method = Count()
    steer.apply(pipe.transformer, method)
    generate(pipe, tiny.call_kwargs(pipe, steps=2))
    assert method.calls == 2 * len(steer.sites(pipe))
    steer.remove(pipe)
    assert steer_attributes(pipe) == []
