"""The generic table: what every guidance method of the registry must satisfy, on every family that it works on.

The sparse methods have a table of their own, tests/test_sparse.py.
"""

from __future__ import annotations

import dataclasses
from itertools import combinations
from typing import Any

import pytest
import torch
from probes import ALL, Scale, assert_untouched, inputs_of, snapshot
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate

import steer
from steer.method_table import works_on
from steer.sparse import Sparse
from steer_patches.blocks import find_blocks
from steer_patches.family import family_of as family_of_model

METHODS = {name: method for name, method in steer.methods().items() if issubclass(method, steer.Guidance)}
NEUTRAL = {"PAG": [{"scale": 0.0}, {"strength": 0.0}, {"heads": []}], "SEG": [{"scale": 0.0}, {"sigma": 0.0}],
           "SLG": [{"scale": 0.0}]}  # fmt: skip
MODELS = [name for name in FAMILIES if name not in ("llama", "llava")]


def family_of(name: str) -> Any:
    """The family data of a tiny model."""
    return family_of_model(FAMILIES[name].build())


def cases() -> list[Any]:
    """(method, tiny model) for each pair that the registry says works."""
    return [
        pytest.param(method, name, id=f"{method}-{name}")
        for method, cls in METHODS.items()
        for name in MODELS
        if works_on(cls, family_of(name))
    ]


def layers_for(method: str, model: Any) -> str:
    """A layer in the first half of the model: a block for methods that skip blocks, else a site."""
    if getattr(METHODS[method], "skips_blocks", False):
        return [block.name for block in find_blocks(model, family_of_model(model)) if block.stage.returns][1]
    kinds = METHODS[method].kinds
    names = [site.name for site in steer.sites(model) if site.kind in kinds]
    return names[len(names) // 2]


def make(method: str, model: Any, **settings: Any) -> steer.Method:
    """The method with an early layer; steps off, since a bare model has no clock."""
    return METHODS[method](**{"layers": layers_for(method, model), "steps": None, **settings})


def test_every_method_has_neutral_settings_to_test() -> None:
    assert set(NEUTRAL) == set(METHODS)


def test_every_method_is_in_one_of_the_tables() -> None:
    """This one, that of sparse attention, and that of language models (tests/test_language.py)."""
    for method in steer.methods().values():
        assert issubclass(method, (steer.Guidance, Sparse)) or "causal" in method.kinds


@pytest.mark.parametrize("method, name", cases())
def test_edit_is_visible_and_removal_exact(method: str, name: str) -> None:
    model = FAMILIES[name].build()
    kwargs = inputs_of(FAMILIES[name], model)
    baseline = output(model, kwargs)
    before = snapshot(model)
    handle = steer.apply(model, make(method, model))
    steered = output(model, inputs_of(FAMILIES[name], model))
    again = output(model, inputs_of(FAMILIES[name], model))
    handle.remove()
    assert (steered - baseline).norm() / baseline.norm() > 1e-4
    assert torch.equal(steered, again)
    assert torch.equal(output(model, inputs_of(FAMILIES[name], model)), baseline)
    assert_untouched(before, model)


@pytest.mark.parametrize("method, settings", [(m, s) for m, many in NEUTRAL.items() for s in many])
def test_neutral_settings_are_bit_identical(method: str, settings: dict[str, Any]) -> None:
    model = FAMILIES["sd3"].build()
    baseline = output(model, inputs_of(FAMILIES["sd3"], model))
    before = snapshot(model)
    with steer.apply(model, make(method, model, **settings)):
        assert torch.equal(output(model, inputs_of(FAMILIES["sd3"], model)), baseline)
    assert_untouched(before, model)


@pytest.mark.parametrize("method", METHODS)
def test_inactive_steps_are_bit_identical(method: str) -> None:
    pipe = PIPELINES["sd3"].build()
    kwargs = PIPELINES["sd3"].call_kwargs(pipe, steps=3)
    baseline = generate(pipe, kwargs)
    with steer.apply(pipe, make(method, pipe.transformer, steps="7:9")) as handle:
        steered = generate(pipe, PIPELINES["sd3"].call_kwargs(pipe, steps=3))
        assert torch.equal(steered, baseline)
        assert handle.stats["methods"][0]["extra_passes"] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_rows_of_a_batch_are_independent(method: str, name: str, guidance_scale: float) -> None:
    """A batch of two prompts gives what each gives alone, with and without classifier-free guidance."""
    if not works_on(METHODS[method], family_of(name)):
        pytest.skip("the registry says that this method does not work here")
    pipe = PIPELINES[name].build()
    denoiser = getattr(pipe, "transformer", None) or pipe.unet
    with steer.apply(pipe, make(method, denoiser)):
        both = generate(pipe, PIPELINES[name].call_kwargs(pipe, batch=2, guidance_scale=guidance_scale))
        one = generate(pipe, first_row(PIPELINES[name].call_kwargs(pipe, batch=2, guidance_scale=guidance_scale)))
    assert torch.allclose(both[:1], one, rtol=0, atol=1e-4 * both.abs().max())


def first_row(kwargs: dict[str, Any]) -> dict[str, Any]:
    """The same call for the first prompt only; noise is drawn row after row, so its latents are the same."""
    return {k: v[:1] if isinstance(v, torch.Tensor) and v.shape[0] == 2 else v for k, v in kwargs.items()}


@pytest.mark.parametrize("first, second", list(combinations(METHODS, 2)))
def test_pairs_compose(first: str, second: str) -> None:
    """Two guidance methods add their terms."""
    model = FAMILIES["sd3"].build()
    kwargs = FAMILIES["sd3"].inputs
    baseline = output(model, kwargs(model))
    with steer.apply(model, make(first, model)):
        a = output(model, kwargs(model))
    with steer.apply(model, make(second, model)):
        b = output(model, kwargs(model))
    with steer.apply(model, make(first, model), make(second, model)):
        both = output(model, kwargs(model))
    assert torch.allclose(both - baseline, (a - baseline) + (b - baseline), atol=1e-5 * both.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_composes_with_an_ordinary_method(method: str) -> None:
    """The ordinary method acts in both passes: guidance over the edited model."""
    model = FAMILIES["sd3"].build()
    kwargs = FAMILIES["sd3"].inputs
    with steer.apply(model, Scale(layers=ALL, factor=0.7)):
        edited = output(model, kwargs(model))
        with steer.apply(model, make(method, model)):
            both = output(model, kwargs(model))
        assert torch.equal(output(model, kwargs(model)), edited)
    assert not torch.equal(both, edited)
    with steer.apply(model, Scale(layers=ALL, factor=0.7), make(method, model)):
        assert torch.allclose(output(model, kwargs(model)), both, atol=1e-6 * both.abs().max())


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_replay_exactly(method: str, tmp_path: Any) -> None:
    model = FAMILIES["sd3"].build()
    original = make(method, model, scale=1.7)
    with steer.apply(model, original):
        steered = output(model, inputs_of(FAMILIES["sd3"], model))
    original.save(tmp_path)
    loaded = steer.load(tmp_path)
    assert type(loaded) is type(original)
    assert dataclasses.asdict(loaded) == dataclasses.asdict(original)
    with steer.apply(model, loaded):
        assert torch.equal(output(model, inputs_of(FAMILIES["sd3"], model)), steered)


@pytest.mark.parametrize("method", METHODS)
def test_documented(method: str) -> None:
    """Every method says what it does, its source, and is described in the documentation."""
    doc = METHODS[method].__doc__ or ""
    assert "Source:" in doc and "Args:" in doc


@pytest.mark.parametrize("method", [name for name, cls in METHODS.items() if not getattr(cls, "skips_blocks", False)])
@pytest.mark.parametrize("extra", ["separate", "batched"])
def test_traces_in_one_graph_when_compiled_in_place(method: str, extra: str) -> None:
    """The denoiser is one full graph in each pass; steer's second pass runs outside it."""
    torch._dynamo.reset()
    model = FAMILIES["sd3"].build()
    with steer.apply(model, make(method, model, extra=extra)):
        eager = output(model, inputs_of(FAMILIES["sd3"], model))
    model.compile(fullgraph=True, backend="eager")
    with steer.apply(model, make(method, model, extra=extra)):
        compiled = output(model, inputs_of(FAMILIES["sd3"], model))
    assert torch.allclose(compiled, eager, atol=1e-5 * eager.abs().max())


def test_skipping_blocks_is_refused_inside_one_graph() -> None:
    """A whole-model graph would run the blocks; the error names what works."""
    model = FAMILIES["sd3"].build()
    model.compile(fullgraph=True, backend="eager")
    with (
        steer.apply(model, make("SLG", model)),
        pytest.raises(RuntimeError, match="compile_repeated_blocks"),
    ):
        output(model, inputs_of(FAMILIES["sd3"], model))
