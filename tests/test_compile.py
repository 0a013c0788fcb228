"""How well `torch.compile` is supported. What does not trace is a strict xfail with its reason."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from probes import Scale, Through, assert_untouched, inputs_of, relative_error, snapshot
from tiny import FAMILIES, Family, build, flux_inputs, output
from tiny_pipelines import PIPELINES, generate
from torch import nn
from torch._dynamo.exc import Unsupported

import steer

UNTRACEABLE = {  # the models themselves, not steer
    "hunyuan_video15": "the model itself does not trace: its forward branches on torch.all(image_embeds == 0)",
}
VARIANTS = ("pixart_alpha", "wan22", "cogvideox_rotary")  # of families that are here already
TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs the traced graph as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[torch.Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


def run(model: nn.Module, family: Family) -> torch.Tensor:
    return output(model, inputs_of(family, model))


def steered(model: nn.Module, family: Family, *methods: steer.Method) -> torch.Tensor:
    with steer.apply(model, *methods):
        return run(model, family)


def families() -> list[Any]:
    names = [name for name in FAMILIES if name not in VARIANTS]
    marks = {
        name: [pytest.mark.xfail(raises=Unsupported, strict=True, reason=why)] for name, why in UNTRACEABLE.items()
    }
    return [pytest.param(FAMILIES[name], id=name, marks=marks.get(name, [])) for name in names]


@pytest.mark.parametrize("family", families())
def test_fullgraph_gives_the_edited_result(family: Family) -> None:
    model = family.build()
    plain, wanted = run(model, family), steered(model, family, Scale())
    graphs = Graphs()
    model.compile(fullgraph=True, backend=graphs)
    result = steered(model, family, Scale())
    assert graphs.count == 1
    assert relative_error(result, wanted) <= TOLERANCE
    assert relative_error(plain, wanted) > 100 * TOLERANCE


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_untraceable_models_do_not_trace_unsteered_either(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    model.compile(fullgraph=True, backend="eager")
    with pytest.raises(Unsupported):
        run(model, family)


@pytest.mark.parametrize("name", UNTRACEABLE)
def test_blocks_of_untraceable_models_trace(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    wanted = steered(model, family, Scale())
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    assert relative_error(steered(model, family, Scale()), wanted) <= TOLERANCE


def compiled_in_place(model: nn.Module, backend: Any) -> nn.Module:
    model.compile(fullgraph=True, backend=backend)
    return model


def compiled_wrapper(model: nn.Module, backend: Any) -> nn.Module:
    return torch.compile(model, fullgraph=True, backend=backend)


both_ways = pytest.mark.parametrize("compiled", [compiled_in_place, compiled_wrapper])


@pytest.mark.parametrize(
    ("name", "compiled"), [("sd3", compiled_in_place), ("llama", compiled_in_place), ("flux", compiled_wrapper)]
)
def test_attach_and_remove_after_the_first_compiled_call(name: str, compiled: Any) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain, wanted = run(model, family), steered(model, family, Scale())
    graphs = Graphs()
    fast = compiled(model, graphs)
    assert relative_error(run(fast, family), plain) <= TOLERANCE
    before, before_wrapper = snapshot(model), dict(vars(fast))
    handle = steer.apply(fast, Scale())
    assert relative_error(run(fast, family), wanted) <= TOLERANCE
    handle.remove()
    assert_untouched(before, model)
    assert list(vars(fast)) == list(before_wrapper)
    assert relative_error(run(fast, family), plain) <= TOLERANCE
    made = graphs.count
    for _ in range(10):  # more often than Dynamo's limit of recompilations
        assert relative_error(steered(fast, family, Scale()), wanted) <= TOLERANCE
        assert relative_error(run(fast, family), plain) <= TOLERANCE
    assert graphs.count == made <= 3


@pytest.mark.parametrize("name", ["sd3", "llama"])
def test_compile_after_apply(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain, wanted = run(model, family), steered(model, family, Scale())
    handle = steer.apply(model, Scale())
    fast = compiled_wrapper(model, "eager")
    assert relative_error(run(fast, family), wanted) <= TOLERANCE
    handle.remove()
    assert relative_error(run(fast, family), plain) <= TOLERANCE


def make_deep_flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=16,
        num_layers=12,
        num_single_layers=12,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=32,
        pooled_projection_dim=32,
        guidance_embeds=True,
    )


@pytest.fixture
def deep_flux() -> Family:
    """FLUX with 24 blocks."""
    return Family("deep_flux", lambda: build(make_deep_flux), flux_inputs, attention_calls=24)


def regional(model: nn.Module) -> Graphs:
    graphs = Graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    return graphs


def test_regional_graphs_are_as_many_as_unsteered(deep_flux: Family) -> None:
    model = deep_flux.build()
    plain, wanted = run(model, deep_flux), steered(model, deep_flux, Scale())
    graphs = regional(model)
    assert relative_error(run(model, deep_flux), plain) <= TOLERANCE
    unsteered = graphs.count
    assert unsteered < 24

    torch._dynamo.reset()
    model = deep_flux.build()
    graphs = regional(model)
    handle = steer.apply(model, Scale())
    assert len(handle.sites) == 24
    assert relative_error(run(model, deep_flux), wanted) <= TOLERANCE
    assert graphs.count == unsteered
    run(model, deep_flux)
    assert graphs.count == unsteered
    handle.remove()
    assert relative_error(run(model, deep_flux), plain) <= TOLERANCE
    for _ in range(10):
        steered(model, deep_flux, Scale())
        run(model, deep_flux)
    assert graphs.count <= 2 * unsteered


@pytest.mark.parametrize(
    "method",
    [
        steer.PAG(layers="transformer_blocks.1"),
        steer.PAG(layers="single_transformer_blocks.0", extra="batched"),
        steer.PAG(layers="transformer_blocks", mode="all", strength=0.4, heads=[1], share_prefix=False),
        steer.SEG(layers="single_transformer_blocks.0"),
    ],
    ids=["PAG", "batched", "SoftPAG", "SEG"],
)
def test_guidance_over_regionally_compiled_blocks(method: steer.Method) -> None:
    family = FAMILIES["flux"]
    model = family.build()
    plain, wanted = run(model, family), steered(model, family, method)
    graphs = regional(model)
    handle = steer.apply(model, method)
    assert relative_error(run(model, family), wanted) <= TOLERANCE
    made = graphs.count
    assert relative_error(run(model, family), wanted) <= TOLERANCE
    assert graphs.count == made
    assert handle.stats["methods"][0]["extra_passes"] == 2
    handle.remove()
    assert relative_error(run(model, family), plain) <= TOLERANCE
    assert relative_error(plain, wanted) > 100 * TOLERANCE


def test_perturbed_pass_adds_one_graph(deep_flux: Family) -> None:
    """Three graphs unsteered (the first block, other double blocks, single blocks), and the perturbed block's."""
    model, method = deep_flux.build(), steer.PAG(layers="transformer_blocks.5")
    wanted = steered(model, deep_flux, method)
    graphs = regional(model)
    assert relative_error(steered(model, deep_flux, method), wanted) <= TOLERANCE
    assert graphs.count == 4


def test_guidance_over_compiled_blocks_at_two_resolutions() -> None:
    family = FAMILIES["wan21"]
    model, method = family.build(), steer.PAG(layers="blocks.1")
    small = inputs_of(family, model)
    large = small | {"hidden_states": torch.cat([small["hidden_states"]] * 2, dim=-1)}
    with steer.apply(model, method):
        wanted = [output(model, kwargs) for kwargs in (small, large)]
    model.compile_repeated_blocks(fullgraph=True, backend="eager")
    with steer.apply(model, method):
        for _ in range(2):
            for kwargs, reference in zip((small, large), wanted, strict=True):
                assert relative_error(output(model, kwargs), reference) <= TOLERANCE


@both_ways
def test_guidance_over_a_wholly_compiled_model(compiled: Any) -> None:
    family = FAMILIES["sd3"]
    model, method = family.build(), steer.PAG(layers="transformer_blocks.1")
    wanted = steered(model, family, method)
    fast = compiled(model, "eager")
    assert relative_error(steered(fast, family, method), wanted) <= TOLERANCE


def test_guidance_that_would_be_traced_away_is_refused() -> None:
    family = FAMILIES["sd3"]
    model = family.build()
    with steer.apply(model, steer.PAG(layers="transformer_blocks.1")):
        fast = compiled_wrapper(model, "eager")
        with pytest.raises(Exception, match=r"call torch\.compile before steer\.apply"):
            run(fast, family)


def test_step_window_over_a_compiled_pipeline_model() -> None:
    """The chain is swapped outside the graph: one graph with the method, one without, however often it changes."""
    tiny = PIPELINES["sd3"]
    method = Scale(steps="0.4:0.8", layers="transformer_blocks")

    def latents(pipe: Any) -> torch.Tensor:
        return generate(pipe, tiny.call_kwargs(pipe, guidance_scale=4.0) | {"num_inference_steps": 5})

    pipe = tiny.build()
    plain = latents(pipe)
    with steer.apply(pipe, method):
        wanted = latents(pipe)
    graphs = Graphs()
    pipe.transformer.compile(fullgraph=True, backend=graphs)
    with steer.apply(pipe, method):
        assert relative_error(latents(pipe), wanted) <= TOLERANCE
        assert graphs.count == 2
        assert relative_error(latents(pipe), wanted) <= TOLERANCE
        assert graphs.count == 2
    assert relative_error(latents(pipe), plain) <= TOLERANCE
    assert relative_error(plain, wanted) > 100 * TOLERANCE


@pytest.mark.slow
def test_inductor() -> None:
    family = FAMILIES["flux"]
    model = family.build()
    plain, wanted = run(model, family), steered(model, family, Scale())
    model.compile(fullgraph=True)
    assert relative_error(steered(model, family, Scale()), wanted) <= TOLERANCE
    assert relative_error(run(model, family), plain) <= TOLERANCE


@pytest.mark.slow
def test_pass_through_under_inductor_changes_nothing() -> None:
    family = FAMILIES["sd3"]
    model = family.build()
    model.compile(fullgraph=True)
    plain = run(model, family)
    assert relative_error(steered(model, family, Through()), plain) <= TOLERANCE
