"""The rewrite of attention processor classes: which ones can be opened, and that nothing but the calls changes."""

from __future__ import annotations

import importlib
import inspect
import linecache
import pkgutil
import traceback
from types import CodeType
from typing import Any

import diffusers.models
import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_processor import (
    AttnProcessor,
    AttnProcessor2_0,
    IPAdapterAttnProcessor2_0,
    SlicedAttnProcessor,
)
from diffusers.models.embeddings import ImageProjection
from probes import Count, Scale, Through, assert_untouched, inputs_of, snapshot
from tiny import FAMILIES, output

import steer
from steer_patches.processors import REPLACEMENTS, Ports, UnhookableProcessor, steered_class

UNHOOKABLE_WITHOUT_REPLACEMENT = {
    "LTX2VideoVaeNeighborhoodNattenProcessor",
    "PAGCFGSanaLinearAttnProcessor2_0",
    "PAGIdentitySanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor2_0",
    "SanaLinearAttnProcessor3_0",
    "SanaMultiscaleAttnProcessor2_0",
}


def processor_classes() -> dict[str, type]:
    """Every processor class of the installed diffusers that has a `__call__` of its own or an inherited one."""
    found = {}
    for info in pkgutil.walk_packages(diffusers.models.__path__, "diffusers.models."):
        module = importlib.import_module(info.name)
        for name, cls in vars(module).items():
            is_processor = inspect.isclass(cls) and "Processor" in name and cls.__module__ == module.__name__
            if is_processor and inspect.isfunction(inspect.unwrap(cls.__call__)):
                found[f"{module.__name__.removeprefix('diffusers.models.')}.{name}"] = cls
    return found


PROCESSORS = processor_classes()
UNHOOKABLE = {*REPLACEMENTS, *UNHOOKABLE_WITHOUT_REPLACEMENT}
HOOKABLE = {name: cls for name, cls in PROCESSORS.items() if cls.__name__ not in UNHOOKABLE}
every_hookable = pytest.mark.parametrize("cls", HOOKABLE.values(), ids=HOOKABLE)


def lines_of(code: CodeType) -> set[int]:
    """The source lines of a function's body and of the functions in it."""
    lines = {line for _, _, line in code.co_lines() if line is not None} - {code.co_firstlineno}
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            lines |= lines_of(constant)
    return lines


def test_how_many_can_be_opened() -> None:
    assert len(PROCESSORS) >= 128
    assert len(HOOKABLE) >= 111


@every_hookable
def test_rewrite_keeps_all_but_the_calls(cls: type) -> None:
    steered = steered_class(cls)
    original, rewritten = inspect.unwrap(cls.__call__), steered.__call__
    assert issubclass(steered, cls) and issubclass(steered, Ports)
    assert steered is steered_class(cls) is steered_class(steered)
    assert (steered.__name__, steered.__qualname__, steered.__module__) == (
        cls.__name__,
        cls.__qualname__,
        cls.__module__,
    )
    assert inspect.signature(steered.__call__) == inspect.signature(cls.__call__)
    assert rewritten.__globals__ is original.__globals__
    assert rewritten.__code__.co_filename == original.__code__.co_filename
    assert lines_of(rewritten.__code__) <= lines_of(original.__code__) | {original.__code__.co_firstlineno}
    source = inspect.getsource(original)
    calls = source.count("scaled_dot_product_attention(") + source.count("dispatch_attention_fn(")
    assert steered._steer_ports == calls >= 1
    assert "_steer" not in " ".join(vars(cls))


@pytest.mark.parametrize("name", [name for name in PROCESSORS if name not in HOOKABLE])
def test_refusal_names_the_class_to_switch_to(name: str) -> None:
    cls = PROCESSORS[name]
    with pytest.raises(UnhookableProcessor, match=cls.__name__) as refusal:
        steered_class(cls)
    assert REPLACEMENTS.get(cls.__name__, "no drop-in replacement is known") in str(refusal.value)


def test_replacements_exist_and_can_be_opened() -> None:
    classes = {cls.__name__: cls for cls in PROCESSORS.values()}
    for name, better in REPLACEMENTS.items():
        assert name in classes
        assert steered_class(classes[better.split()[0]])._steer_ports >= 1


@pytest.mark.parametrize("processor", [AttnProcessor(), SlicedAttnProcessor(1)], ids=["eager", "sliced"])
def test_model_with_an_unhookable_processor_is_refused(processor: Any) -> None:
    family = FAMILIES["sd15"]
    model = family.build()
    model.set_attn_processor(processor)
    plain, before = output(model, inputs_of(family, model)), snapshot(model)
    site = steer.sites(model)[0]
    assert site.ports == 0
    assert "AttnProcessor2_0" in site.refusal
    with pytest.raises(UnhookableProcessor, match=f"{site.name}.*switch to AttnProcessor2_0"):
        steer.apply(model, Through())
    assert_untouched(before, model)
    assert torch.equal(output(model, inputs_of(family, model)), plain)
    model.set_attn_processor(AttnProcessor2_0())
    with steer.apply(model, Scale()):
        assert not torch.equal(output(model, inputs_of(family, model)), plain)


def test_unhookable_processors_elsewhere_do_not_matter() -> None:
    family = FAMILIES["sd15"]
    model = family.build()
    model.mid_block.attentions[0].transformer_blocks[0].attn1.set_processor(AttnProcessor())
    plain = output(model, inputs_of(family, model))
    with pytest.raises(UnhookableProcessor, match="mid_block"):
        steer.apply(model, Through(layers=["down_blocks", "mid_block"]))
    with steer.apply(model, Through(layers="down_blocks")):
        assert torch.equal(output(model, inputs_of(family, model)), plain)
    with steer.apply(model, Scale(layers="down_blocks")):
        assert not torch.equal(output(model, inputs_of(family, model)), plain)


def test_processors_made_without_source_or_with_a_closure_are_refused() -> None:
    namespace: dict[str, Any] = {"F": F}
    exec(
        "class Made:\n    def __call__(self, attn, x):\n        return F.scaled_dot_product_attention(x, x, x)",
        namespace,
    )
    with pytest.raises(UnhookableProcessor, match="Made has no readable source"):
        steered_class(namespace["Made"])

    factor = torch.tensor(2.0)

    class Closed:
        def __call__(self, attn: Any, x: torch.Tensor) -> torch.Tensor:
            return F.scaled_dot_product_attention(x, x, x) * factor

    with pytest.raises(UnhookableProcessor, match="Closed has a __call__ with a closure"):
        steered_class(Closed)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21", "mochi"])
def test_tracebacks_show_the_original_lines(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    module = next(module for module in model.modules() if callable(getattr(module, "processor", None)))
    inside = type(module.processor).__call__.__code__.co_filename

    def failing_lines() -> list[tuple[str, int | None]]:
        fitting, module.to_q = module.to_q, torch.nn.Linear(1, 1)
        try:
            model(**inputs_of(family, model))
        except RuntimeError as error:
            frames = traceback.extract_tb(error.__traceback__)
            return [(frame.filename, frame.lineno) for frame in frames if frame.filename == inside]
        finally:
            module.to_q = fitting
        raise AssertionError("a wrong query projection passed unnoticed")

    plain = failing_lines()
    with steer.apply(model, Through()):
        steered = failing_lines()
    assert steered == plain
    assert any("to_q" in linecache.getline(file, line) for file, line in steered)


def with_ip_adapter(model: torch.nn.Module, image_tokens: int = 4, width: int = 32) -> torch.nn.Module:
    """Load an image-prompt adapter with random weights, as `pipe.load_ip_adapter` does."""
    projection = ImageProjection(width, width, image_tokens).state_dict()
    adapter, number = {}, 1
    for name, module in model.named_modules():
        if name.endswith("attn2"):
            weights = IPAdapterAttnProcessor2_0(module.inner_dim, width, num_tokens=(image_tokens,)).state_dict()
            adapter |= {f"{number}.to_k_ip.weight": weights["to_k_ip.0.weight"]}
            adapter |= {f"{number}.to_v_ip.weight": weights["to_v_ip.0.weight"]}
            number += 2
    renamed = {
        "proj.weight": "image_embeds.weight",
        "proj.bias": "image_embeds.bias",
        "norm.weight": "norm.weight",
        "norm.bias": "norm.bias",
    }
    model._load_ip_adapter_weights(
        [{"image_proj": {k: projection[v] for k, v in renamed.items()}, "ip_adapter": adapter}]
    )
    return model.eval().requires_grad_(False)


def test_image_prompt_calls_have_ports_of_their_own() -> None:
    family = FAMILIES["sd15"]
    model = with_ip_adapter(family.build())
    kwargs = inputs_of(family, model) | {"added_cond_kwargs": {"image_embeds": [torch.ones(2, 1, 32)]}}
    plain, before = output(model, kwargs), snapshot(model)
    names = list(model.state_dict())
    method = Count()
    handle = steer.apply(model, method)
    assert torch.equal(output(model, kwargs), plain)
    assert list(model.state_dict()) == names
    cross = [site for site in steer.sites(model) if site.kind == "cross"]
    assert {site.ports for site in cross} == {3}
    assert {port for name, port in method.seen if name == cross[0].name} == {0, 2}
    handle.remove()
    assert_untouched(before, model)

    class MainPort(Count, register=False):
        every_port = False

    method = MainPort()
    with steer.apply(model, method):
        output(model, kwargs)
    assert {port for _, port in method.seen} == {0}
