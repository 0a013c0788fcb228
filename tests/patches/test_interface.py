"""transformers: the registered attention names, their masks, and the configurations that carry them."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from probes import Count, Scale, Through, assert_untouched, inputs_of, snapshot
from tiny import FAMILIES, PADDED_TOKENS, build, output
from tiny_language import SMALL
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

import steer
from steer_patches.attach import SiteLost
from steer_patches.interface import BASES, steered_name
from steer_patches.processors import UnhookableProcessor
from steer_patches.site import Call, Next

LANGUAGE_MODELS = ["llama", "llava"]
every_language_model = pytest.mark.parametrize("name", LANGUAGE_MODELS)
every_base = pytest.mark.parametrize("base", ["sdpa", "eager"])


def language_model(name: str, base: str) -> tuple[torch.nn.Module, dict[str, Any]]:
    model = FAMILIES[name].build()
    model.set_attn_implementation(base)
    return model, inputs_of(FAMILIES[name], model)


@pytest.mark.parametrize("base", BASES)
def test_attention_and_mask_are_registered_together(base: str) -> None:
    name = steered_name(base)
    assert name in ALL_ATTENTION_FUNCTIONS
    assert name in ALL_MASK_ATTENTION_FUNCTIONS
    assert ALL_MASK_ATTENTION_FUNCTIONS[name] is ALL_MASK_ATTENTION_FUNCTIONS[base]


def test_unknown_base_is_refused() -> None:
    with pytest.raises(ValueError, match="'flash_attention_3' cannot be hooked; use one of sdpa, eager"):
        steered_name("flash_attention_3")


@every_language_model
@every_base
def test_left_padded_batch_is_identical(name: str, base: str) -> None:
    model, kwargs = language_model(name, base)
    assert not kwargs["attention_mask"][-1, :PADDED_TOKENS].any()
    plain = output(model, kwargs)
    unpadded = output(model, {**kwargs, "attention_mask": torch.ones_like(kwargs["attention_mask"])})
    assert not torch.allclose(plain[-1], unpadded[-1], atol=1e-3)  # the mask matters here
    method = Count()
    with steer.apply(model, method):
        assert torch.equal(output(model, kwargs), plain)
    assert method.calls == len(steer.sites(model))


@every_language_model
@every_base
@pytest.mark.parametrize("cache", [None, "static"])
def test_greedy_generate_is_identical(name: str, base: str, cache: str | None) -> None:
    model, kwargs = language_model(name, base)
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": cache}
    plain = model.generate(**kwargs, **options)
    before = snapshot(model)
    method = Count(layers="model.layers" if name == "llama" else "model.language_model")
    with steer.apply(model, method):
        assert torch.equal(model.generate(**kwargs, **options), plain)
    assert method.calls == 3 * 6
    with steer.apply(model, Scale(factor=0.1)):
        assert not torch.equal(model.generate(**kwargs, **options), plain)
    if cache is None:  # a static cache is kept on the model from one `generate` to the next
        assert_untouched(before, model)
    assert torch.equal(model.generate(**kwargs, **options), plain)


@every_language_model
def test_attention_maps_and_hidden_states_stay_available(name: str) -> None:
    model, kwargs = language_model(name, "eager")
    wanted = {"output_attentions": True, "output_hidden_states": True}
    plain = model(**kwargs, **wanted)
    with steer.apply(model, Through()):
        steered = model(**kwargs, **wanted)
    for ours, theirs in zip(steered.attentions, plain.attentions, strict=True):
        assert torch.equal(ours, theirs)
    for ours, theirs in zip(steered.hidden_states, plain.hidden_states, strict=True):
        assert torch.equal(ours, theirs)


def test_sub_configurations_are_steered_and_restored_one_by_one() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    model.set_attn_implementation({"vision_config": "eager", "text_config": "sdpa"})
    configs = [model.config, model.config.vision_config, model.config.text_config]
    before = [config._attn_implementation for config in configs]
    plain = output(model, inputs_of(family, model))
    untouched = snapshot(model)
    handle = steer.apply(model, Through())
    assert [config._attn_implementation for config in configs[1:]] == ["steer_eager", "steer_sdpa"]
    assert torch.equal(output(model, inputs_of(family, model)), plain)
    handle.remove()
    assert [config._attn_implementation for config in configs] == before
    assert_untouched(untouched, model)


def test_one_part_of_a_model_may_be_unhookable() -> None:
    model = FAMILIES["llava"].build()
    model.config.vision_config._attn_implementation = "flash_attention_3"
    before = snapshot(model)
    with pytest.raises(UnhookableProcessor, match=r"vision_tower.*'flash_attention_3' cannot be hooked"):
        steer.apply(model, Through())
    assert_untouched(before, model)
    with steer.apply(model, Through(layers="model.language_model")):
        assert model.config.vision_config._attn_implementation == "flash_attention_3"
        assert model.config.text_config._attn_implementation == "steer_sdpa"
    assert_untouched(before, model)


def test_llava_names_both_towers() -> None:
    sites = steer.sites(FAMILIES["llava"].build())
    assert [(site.name, site.kind) for site in sites] == [
        *((f"model.vision_tower.encoder.layers.{i}.self_attn", "self") for i in range(3)),
        *((f"model.language_model.layers.{i}.self_attn", "causal") for i in range(3)),
    ]


def test_edits_stay_in_the_tower_that_is_named() -> None:
    family = FAMILIES["llava"]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    for layers in ("model.vision_tower", "model.language_model"):
        method = Count(layers=layers)
        with steer.apply(model, method, Scale(layers=layers)):
            assert not torch.equal(output(model, inputs_of(family, model)), plain)
        assert {name.startswith(layers) for name, _ in method.seen} == {True}
        assert len(method.seen) == 3


def test_grouped_query_heads() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    shapes = []

    class Shapes(Through, register=False):
        def attend(self, call: Call, next: Next) -> torch.Tensor:
            out = next(call)
            key, value = call.expanded()
            shapes.append([tuple(t.shape) for t in (call.query, call.key, call.value, key, value, out)])
            return out

    site = steer.sites(model)[0]
    assert (site.heads, site.kv_heads, site.head_dim, site.processor) == (4, 2, 8, "sdpa")
    with steer.apply(model, Shapes(layers=site.name)):
        output(model, inputs_of(family, model))
    wide, narrow = (2, 4, 17, 8), (2, 2, 17, 8)
    assert shapes == [[wide, narrow, narrow, wide, wide, wide]]


def test_other_models_of_the_process_are_left_alone() -> None:
    family = FAMILIES["llama"]
    model, other = family.build(), family.build()
    plain, before = output(other, inputs_of(family, other)), snapshot(other)
    with steer.apply(model, Scale()):
        assert_untouched(before, other)
        assert torch.equal(output(other, inputs_of(family, other)), plain)


def test_models_that_share_a_configuration() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    other = type(model)(model.config).eval()
    other.load_state_dict(model.state_dict())
    plain = output(model, inputs_of(family, model))
    before, before_other = snapshot(model), snapshot(other)
    with steer.apply(model, Scale()):
        assert torch.equal(output(other, inputs_of(family, other)), plain)
        with steer.apply(other, Scale()):
            edited = output(model, inputs_of(family, model))
            assert torch.equal(output(other, inputs_of(family, other)), edited)
        assert torch.equal(output(model, inputs_of(family, model)), edited)
    assert_untouched(before, model)
    assert_untouched(before_other, other)


def test_replaced_implementation_is_noticed() -> None:
    family = FAMILIES["llama"]
    model = family.build()
    handle = steer.apply(model, Through())
    model.set_attn_implementation("eager")
    with pytest.raises(SiteLost, match=r"model\.layers\.0\.self_attn"):
        output(model, inputs_of(family, model))
    handle.remove()
    output(model, inputs_of(family, model))


def test_copies_of_a_configuration_are_plain() -> None:
    model = FAMILIES["llama"].build()
    with steer.apply(model, Through()):
        assert model.config._attn_implementation == "steer_sdpa"
        twin = copy.deepcopy(model.config)
    assert type(twin._attn_implementation) is str
    assert twin._attn_implementation == "sdpa"


WINDOWED = {
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(
        Qwen2Config(**SMALL, use_sliding_window=True, sliding_window=5, max_window_layers=1)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, sliding_window=5)),
}


@pytest.mark.parametrize(
    ("name", "base"),
    [("mistral", "sdpa"), ("mistral", "eager"), ("qwen2", "sdpa"), ("qwen2", "eager"), ("gemma2", "eager")],
)
def test_sliding_windows_and_soft_caps_stay(name: str, base: str) -> None:
    model = build(WINDOWED[name])
    model.set_attn_implementation(base)
    kwargs = inputs_of(FAMILIES["llama"], model)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    plain, tokens = output(model, kwargs), model.generate(**kwargs, **options)
    method = Count()
    with steer.apply(model, method):
        assert torch.equal(output(model, kwargs), plain)
        assert method.calls == 2
        assert torch.equal(model.generate(**kwargs, **options), tokens)
