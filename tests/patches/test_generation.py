"""Language models: every way to generate passes through the ports unchanged, and methods know where they are."""

from __future__ import annotations

import copy
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from probes import Count, Scale, Through, Trip, Tripped, assert_untouched, snapshot
from tiny import build
from tiny_language import MODELS, NEW, PADDING, greedy, inputs
from transformers import CompileConfig, DynamicCache

import steer
from steer import Method
from steer.bind import CompositionError
from steer_patches.generation import Text
from steer_patches.site import Call, Next, Site

WINDOWS = {"mistral_window": [5, 5], "qwen2": [5, None], "gemma2": [5, None], "gemma3": [5, None]}
every_model = pytest.mark.parametrize("name", MODELS)


@dataclass(kw_only=True)
class Watch(Method, register=False):
    """Changes nothing; keeps what a method is told at each attention call of the first layer."""

    layers: Any = "*layers.0.self_attn"
    texts: list[Text] = field(default_factory=list)
    at: list[tuple[str, int]] = field(default_factory=list)
    keys: list[int] = field(default_factory=list)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        assert call.text is not None
        self.texts.append(call.text)
        self.at.append((call.run.phase, call.run.step))
        self.keys.append(call.key.shape[2])
        return next(call)


@dataclass(kw_only=True)
class Remember(Method, register=False):
    """Keeps the first key of every row at the prompt, and looks at each later forward whether it is still the row's."""

    layers: Any = "*layers.0.self_attn"
    seen: int = 0

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        memory, name = call.run.memory, ("Remember", call.site.name)
        if call.run.phase == "prefill":
            memory[name] = {"key": call.key[:, :, 4].clone(), "length": call.key.shape[2]}
        else:
            assert torch.equal(memory[name]["key"], call.key[:, :, 4])
            self.seen += 1
        return next(call)


@every_model
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"cache_implementation": "static"}, {"use_cache": False}])
def test_generate_is_identical(name: str, base: str, options: dict[str, Any]) -> None:
    model = build(MODELS[name])
    if base == "sdpa" and not model._supports_sdpa:
        pytest.skip("this model soft-caps its scores, which torch's fused attention cannot")
    model.set_attn_implementation(base)
    plain = greedy(model, **options)
    before = snapshot(model)
    method = Count()
    with steer.apply(model, method):
        assert torch.equal(greedy(model, **options), plain)
    assert method.calls == 2 * NEW
    if "cache_implementation" not in options:  # a static cache is kept on the model
        assert_untouched(before, model)
    with steer.apply(model, Scale(factor=-1.0)):  # Gemma normalises the output, so that its size would not matter
        assert not torch.equal(greedy(model, **options), plain)
    assert torch.equal(greedy(model, **options), plain)


@pytest.mark.parametrize("name", ["llama", "qwen3", "smollm3"])
def test_flex_attention(name: str) -> None:
    model = build(MODELS[name])
    wanted = model(**inputs()).logits
    model.set_attn_implementation("flex_attention")
    plain = model(**inputs()).logits
    keep: list[torch.Tensor | None] = []

    @dataclass(kw_only=True)
    class Look(Method, register=False):
        layers: Any = "*"

        def attend(self, call: Call, next: Next) -> torch.Tensor:
            keep.append(call.visible()[0])
            return next(call)

    with steer.apply(model, Look()):
        steered = model(**inputs()).logits
    assert torch.equal(steered, plain)
    real = inputs()["attention_mask"].bool()
    torch.testing.assert_close(steered[real], wanted[real], rtol=0, atol=1e-5)
    expected = torch.ones(11, 11, dtype=torch.bool).tril() & real[:, None]
    assert keep[0] is not None
    assert torch.equal(keep[0][:, 0][real], expected[real])


@every_model
def test_assisted_decoding_is_identical(name: str) -> None:
    model, assistant = build(MODELS[name]), build(MODELS[name])
    if not model._supports_sdpa:
        model.set_attn_implementation("eager")
        assistant.set_attn_implementation("eager")
    one = {"input_ids": inputs()["input_ids"][:1], "attention_mask": None}
    for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 2}):
        plain = greedy(model, **one, **options)
        with steer.apply(model, Count()), steer.apply(assistant, Count()):
            assert torch.equal(greedy(model, **one, **options), plain)
            watch = Watch()
            with steer.apply(model, watch):
                greedy(model, **one, **options)
    assert any(text.new > 1 and text.past for text in watch.texts)  # candidates
    for before, text in zip(watch.texts, watch.texts[1:], strict=False):
        assert before.past < text.past <= before.past + before.new  # those that were refused left the cache


@every_model
def test_what_a_method_is_told(name: str) -> None:
    model = build(MODELS[name])
    if not model._supports_sdpa:
        model.set_attn_implementation("eager")
    watch = Watch()
    with steer.apply(model, watch) as handle:
        greedy(model)
        assert handle.stats["runs"] == 1
        assert handle.stats["forwards"] == NEW
    assert watch.at == [("prefill", 0), *(("decode", step) for step in range(1, NEW))]
    assert [(text.past, text.new) for text in watch.texts] == [(0, 11), *((11 + i, 1) for i in range(NEW - 1))]
    for text in watch.texts:
        assert text.valid is not None
        assert text.valid.shape == (2, text.past + text.new)
        assert text.valid.logical_not().sum() == PADDING
        assert not text.valid[1, :PADDING].any()
    assert watch.texts[0].positions[1].tolist() == [0] * PADDING + list(range(8))
    assert watch.texts[1].positions.tolist() == [[11], [8]]


def test_without_padding_or_cache() -> None:
    model, watch = build(MODELS["llama"]), Watch()
    ids = inputs()["input_ids"]
    with steer.apply(model, watch), torch.no_grad():
        model(ids, use_cache=False)
        cache = model(ids).past_key_values
        model(ids[:, :2], past_key_values=cache)
        copied = copy.deepcopy(cache)
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=copied)
        cache.reset()
        model(ids, past_key_values=cache)
    assert [text.valid for text in watch.texts] == [None] * 6
    assert [text.cache is None for text in watch.texts] == [True, False, False, False, False, False]
    assert [(text.past, text.new) for text in watch.texts] == [(0, 11), (0, 11), (11, 2), (13, 1), (13, 1), (0, 11)]
    assert [step for _, step in watch.at] == [0, 0, 1, 2, 2, 0]
    assert [text.positions.tolist() for text in watch.texts[2:4]] == [[[11, 12]], [[13]]]


@pytest.mark.parametrize("cache", [None, "static"])
def test_memory_follows_the_beams(cache: str | None) -> None:
    model = build(MODELS["llama"])
    method = Remember()
    with steer.apply(model, method):
        greedy(model, num_beams=3, num_return_sequences=2, cache_implementation=cache)
    assert method.seen == NEW - 1


def test_memory_follows_repeats_selections_and_copies() -> None:
    model, method = build(MODELS["llama"]), Remember()
    ids = inputs()["input_ids"]
    with steer.apply(model, method), torch.no_grad():
        cache = DynamicCache(config=model.config)
        model(ids, past_key_values=cache)
        other = copy.deepcopy(cache)
        cache.batch_repeat_interleave(2)
        model(ids[[0, 0, 1, 1], :1], past_key_values=cache)
        cache.batch_select_indices(torch.tensor([3, 0]))
        model(ids[[1, 0], :1], past_key_values=cache)
        cache.reorder_cache(torch.tensor([1, 0]))
        model(ids[:, :1], past_key_values=cache)
        model(ids[:, :1], past_key_values=other)
    assert method.seen == 4


def test_conversations_do_not_mix() -> None:
    model, method = build(MODELS["llama"]), Remember()
    first, second = inputs()["input_ids"], inputs()["input_ids"].flip(1)
    with steer.apply(model, method), torch.no_grad():
        caches = [model(ids).past_key_values for ids in (first, second)]
        for _ in range(2):
            for cache in caches:
                model(first[:, :1], past_key_values=cache)
    assert method.seen == 4


def test_steps_count_forwards() -> None:
    model = build(MODELS["llama"])
    for steps, at in (("0:1", [0]), ("1:", [1, 2, 3, 4, 5]), (range(2, 4), [2, 3]), (":", [0, 1, 2, 3, 4, 5])):
        watch = Watch(steps=steps)
        with steer.apply(model, watch):
            greedy(model)
        assert [step for _, step in watch.at] == at
    with pytest.raises(CompositionError, match='give indices, "0:1" = the prompt'):
        steer.apply(model, Watch(steps="0.2:"))


def test_positions_of_a_method_are_used() -> None:
    model = build(MODELS["llama"])
    ids = inputs()["input_ids"]

    @dataclass(kw_only=True)
    class Shifted(Method, register=False):
        layers: Any = "*"

        def attend(self, call: Call, next: Next) -> torch.Tensor:
            return next(call)

        def position_ids(self, text: Text) -> torch.Tensor:
            return text.positions * 3

    plain = model(ids, position_ids=torch.arange(11)[None] * 3).logits
    with steer.apply(model, Shifted()):
        assert torch.equal(model(ids).logits, plain)


@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
def test_compiled_decoding_enters_from_outside(name: str) -> None:
    """What `generate` compiles with a static cache: methods that differ from step to step stay right."""
    torch._dynamo.reset()
    model = build(MODELS[name])
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    options = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
    plain = greedy(model, **options)
    with steer.apply(model, Through()) as handle:
        assert torch.equal(greedy(model, **options), plain)
        assert handle.stats["forwards"] == NEW
    torch._dynamo.reset()  # a sliding window has two graphs for each chain, and torch gives up after eight
    with steer.apply(model, Scale(factor=-1.0, steps="3:")):
        compiled = greedy(model, **options)
        eager = greedy(model, cache_implementation="static")
    assert torch.equal(compiled, eager)
    assert torch.equal(compiled[:, :14], plain[:, :14])
    assert not torch.equal(compiled, plain)
    torch._dynamo.reset()
    assert torch.equal(greedy(model, **options), plain)
    beams = greedy(model, num_beams=2, cache_implementation="static")  # the cache that the model keeps was steered
    assert torch.equal(beams, greedy(build(MODELS[name]), num_beams=2, cache_implementation="static"))


def test_compiled_before_apply() -> None:
    model = build(MODELS["llama"])
    plain, tokens = model(**inputs()).logits, greedy(model)
    compiled = torch.compile(model, backend="eager")
    watch = Watch()
    with steer.apply(compiled, watch):
        assert torch.equal(compiled(**inputs()).logits, plain)
        assert torch.equal(greedy(compiled), tokens)
    assert [text.past for text in watch.texts[-NEW:]] == [0, 11, 12, 13, 14, 15]


@every_model
def test_windows_of_layers_are_known(name: str) -> None:
    sites: list[Site] = steer.sites(build(MODELS[name]))
    assert [site.window for site in sites] == WINDOWS.get(name, [None, None])
    assert [site.layer_idx for site in sites] == [0, 1]
    assert {site.kind for site in sites} == {"causal"}


def test_an_error_ends_the_forward() -> None:
    model = build(MODELS["llama"])
    plain = greedy(model)
    with steer.apply(model, Trip(at=4)) as handle:
        with pytest.raises(Tripped):
            greedy(model)
        watch = Watch()
        with steer.apply(model, watch):
            assert torch.equal(greedy(model), plain)
        assert handle.stats["runs"] == 2
    assert watch.at[0] == ("prefill", 0)


@pytest.mark.parametrize("dtype", [torch.int64, torch.bool])
def test_what_is_visible_by_padding(dtype: torch.dtype) -> None:
    """Flash attention is told (B, S_kv) which tokens are real, and applies the causal rule itself."""
    site = Site("s", 0, "causal", 2, 1, 4, "flash_attention_2")
    query, key = torch.zeros(2, 2, 3, 4), torch.zeros(2, 1, 5, 4)
    padding = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]]).to(dtype)
    call = Call(query, key, key, padding, None, True, site, 0)
    keep, causal = call.visible()
    assert keep is not None
    assert not causal
    expected = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 0], [1, 1, 1, 1, 1]]).bool()
    assert torch.equal(keep[0, 0], expected)
    assert torch.equal(keep[1, 0], expected & padding[1].bool())
    site.window = 2
    near = torch.tensor([[0, 1, 1, 0, 0], [0, 0, 1, 1, 0], [0, 0, 0, 1, 1]]).bool()
    for mask in (padding, None):
        seen, _ = call.replace(mask=mask).visible()
        assert seen is not None
        assert torch.equal(seen[0, 0], near)
    site.window = 5
    assert call.replace(mask=None).visible() == (None, True)


def test_additive_masks() -> None:
    site = Site("s", 0, "causal", 2, 1, 4, "eager")
    query = torch.zeros(1, 2, 3, 4)
    hidden = torch.full((3, 3), torch.finfo(torch.float32).min).triu(1)[None, None]
    call = Call(query, query, query, hidden, None, False, site, 0)
    keep, causal = call.visible()
    assert keep is not None
    assert not causal
    assert torch.equal(keep[0, 0], torch.ones(3, 3, dtype=torch.bool).tril())
    with pytest.raises(ValueError, match="a mask of biases"):
        call.replace(mask=hidden - 0.5).visible()
