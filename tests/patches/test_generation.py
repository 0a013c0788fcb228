"""Language models: every way to generate passes through the ports unchanged, and methods know where they are."""

from __future__ import annotations

import copy
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from probes import Count, Scale, Through, Trip, Tripped, assert_untouched, snapshot
from tiny import build
from tiny_language import MODELS, NEW, PADDING, SMALL, greedy, inputs
from transformers import (
    BartConfig,
    BartForCausalLM,
    BertConfig,
    BertLMHeadModel,
    CompileConfig,
    DecisionTransformerConfig,
    DecisionTransformerModel,
    DynamicCache,
    Llama4ForCausalLM,
    Llama4TextConfig,
    LlamaConfig,
    LlamaForSequenceClassification,
    LlamaModel,
)

import steer
from steer import Method
from steer.bind import CompositionError
from steer_patches.generation import Text
from steer_patches.site import Call, Next, Scope, Site

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


def test_forwards_that_are_not_steered_count() -> None:
    """A cache that was filled before `apply`, and one that goes on while nothing is applied."""
    model, watch, ids = build(MODELS["llama"]), Watch(), inputs()["input_ids"]
    cache, other = (DynamicCache(config=model.config) for _ in range(2))
    with steer.apply(model, watch):
        model(ids[:, :4], past_key_values=cache)
    model(ids[:, 4:9], past_key_values=cache)
    model(ids[:, :6], past_key_values=other)
    with steer.apply(model, watch):
        model(ids[:, 9:10], past_key_values=cache)
        model(ids[:, 6:7], past_key_values=other)
    assert [text.past for text in watch.texts] == [0, 9, 6]
    assert [text.positions.tolist() for text in watch.texts[1:]] == [[[9]], [[6]]]
    assert watch.at == [("prefill", 0), ("decode", 1), ("decode", 1)]  # step 0 is the prompt, whoever read it


def test_a_cache_that_was_cropped_to_nothing_begins_again() -> None:
    model, watch, ids = build(MODELS["llama"]), Watch(), inputs()["input_ids"]
    with steer.apply(model, watch):
        cache = model(ids).past_key_values
        memory = cache.steer_run.memory
        cache.crop(-11)
        model(ids[:, :5], past_key_values=cache)
    assert watch.at == [("prefill", 0)] * 2
    assert cache.steer_run.memory is not memory


def test_arguments_given_by_their_place() -> None:
    model, watch, ids = build(MODELS["llama"]), Watch(), inputs()["input_ids"]
    plain = model(ids, None, None, None)
    with steer.apply(model, watch):
        out = model(ids, None, None, None)
        again = model(ids[:, :1], None, None, out.past_key_values)
    assert torch.equal(out.logits, plain.logits)
    assert torch.equal(again.logits, model(ids[:, :1], past_key_values=plain.past_key_values).logits)
    assert [text.past for text in watch.texts] == [0, 11]


@dataclass(kw_only=True)
class Length(Method, register=False):
    """Scales the output by what it was told of the forward."""

    layers: Any = "*"

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        assert scope.text is not None
        for site, _ in sites.values():
            site.kernel = scope.text.past + scope.text.new

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        return next(call) * (1 + call.site.kernel / 8)


def test_threads_take_turns() -> None:
    model, ids = build(MODELS["llama"]), inputs()["input_ids"]

    def written(tokens: int) -> torch.Tensor:
        return model.generate(ids[:1, :tokens], max_new_tokens=20, min_new_tokens=20, do_sample=False)

    with steer.apply(model, Length()):
        alone = [written(tokens) for tokens in range(3, 11)]
        with ThreadPoolExecutor(4) as pool:
            together = list(pool.map(written, range(3, 11)))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))


def test_calls_past_the_model_are_refused() -> None:
    """What the last forward through the model left at the sites belongs to other tokens."""
    model, ids = build(MODELS["llama"]), inputs()["input_ids"]
    plain = model(ids).logits
    with steer.apply(model, Length()):
        wanted = model(ids).logits
        for call in (model.forward, model.model):
            with pytest.raises(RuntimeError, match="was not called through its model"):
                call(ids)
        fast = torch.compile(model, backend="eager", fullgraph=True)
        with pytest.raises(Exception, match=r"[Ee]xception"):  # Dynamo's own, without our text
            fast(ids)
        torch._dynamo.reset()
        assert torch.equal(torch.compile(model, backend="eager")(ids).logits, wanted)  # the graph is broken before
    torch._dynamo.reset()
    assert torch.equal(model.forward(ids).logits, plain)


def test_layers_that_are_computed_again_in_backward() -> None:
    ids, gradients = inputs()["input_ids"], []
    for again in (False, True):
        model = build(MODELS["llama"]).train().requires_grad_(True)
        if again:
            model.gradient_checkpointing_enable()
        with steer.apply(model, Length()):
            model(ids, labels=ids).loss.backward()
        gradients.append(model.model.layers[0].self_attn.q_proj.weight.grad)
    assert torch.equal(*gradients)


BERT = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
BART = {"vocab_size": 64, "d_model": 32, "decoder_layers": 2, "decoder_attention_heads": 4, "decoder_ffn_dim": 64}
OTHERS: dict[str, Any] = {
    "base model": lambda: LlamaModel(LlamaConfig(**SMALL)),
    "classifier": lambda: LlamaForSequenceClassification(LlamaConfig(**SMALL)),
    "bert": lambda: BertLMHeadModel(BertConfig(**BERT, is_decoder=True, add_cross_attention=True)),
    "bart": lambda: BartForCausalLM(BartConfig(**BART, is_decoder=True, is_encoder_decoder=False)),
}


@pytest.mark.parametrize("name", OTHERS)
def test_models_that_make_caches_of_their_own(name: str) -> None:
    """Base models, heads, and decoders that attend to an encoder: as plain models, and followed through their cache."""
    model, watch, ids = build(OTHERS[name]), Watch(layers="*"), inputs()["input_ids"]
    seen = {"encoder_hidden_states": torch.randn(2, 5, 32, generator=torch.Generator().manual_seed(3))}
    given = seen if name in ("bert", "bart") else {}
    plain = model(ids, **given)
    later = model(ids[:, :1], past_key_values=plain.past_key_values, **given)
    with steer.apply(model, watch):
        out = model(ids, **given)
        assert type(out.past_key_values).__name__ == type(plain.past_key_values).__name__
        assert torch.equal(out[0], plain[0])
        assert torch.equal(model(ids[:, :1], past_key_values=out.past_key_values, **given)[0], later[0])
    assert sorted({text.past for text in watch.texts}) == [0, 11]


def test_a_decoder_without_tokens() -> None:
    config = DecisionTransformerConfig(state_dim=3, act_dim=2, hidden_size=32, n_layer=2, n_head=4, max_ep_len=16)
    model, g = build(lambda: DecisionTransformerModel(config)), torch.Generator().manual_seed(0)
    sizes = {"states": 3, "actions": 2, "rewards": 1, "returns_to_go": 1}
    given = {name: torch.randn(2, 4, size, generator=g) for name, size in sizes.items()}
    given["timesteps"] = torch.arange(4).expand(2, -1)
    plain = model(**given).action_preds
    with steer.apply(model, Scale(layers="*", factor=1.0)):
        assert torch.equal(model(**given).action_preds, plain)
    with steer.apply(model, Scale(layers="*", factor=2.0)):
        assert not torch.equal(model(**given).action_preds, plain)


@pytest.mark.parametrize("base", ["sdpa", "eager"])
def test_autocast_is_identical(base: str) -> None:
    """There queries and keys come out of their rotation in fp32, and values do not where no cache is."""

    @dataclass(kw_only=True)
    class Alike(Method, register=False):
        layers: Any = "*"

        def attend(self, call: Call, next: Next) -> torch.Tensor:
            assert call.query.dtype == call.key.dtype == call.value.dtype
            return next(call)

    model = build(MODELS["llama"])
    model.set_attn_implementation(base)
    with torch.autocast("cpu", torch.bfloat16):
        plain, tokens = model(**inputs(), use_cache=False).logits, greedy(model)
        with steer.apply(model, Alike()):
            assert torch.equal(model(**inputs(), use_cache=False).logits, plain)
            assert torch.equal(greedy(model), tokens)


def test_a_part_of_a_steered_model_is_not_steered_again() -> None:
    model, ids = build(MODELS["llama"]), inputs()["input_ids"]
    for first, second in ((model, model.model), (model.model, model)):
        with steer.apply(first, Scale(layers="*")):
            wanted, before = model(ids).logits, snapshot(model)
            with pytest.raises(CompositionError, match="self_attn is steered already, through a model that"):
                steer.apply(second, Scale(layers="*"))
            assert_untouched(before, model)
            assert torch.equal(model(ids).logits, wanted)


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


def test_the_window_of_chunks_is_known() -> None:
    experts = {"num_local_experts": 2, "interleave_moe_layer_step": 2, "intermediate_size_mlp": 64}
    config = Llama4TextConfig(**SMALL, **experts, attention_chunk_size=6, no_rope_layers=[1, 0])
    assert [site.window for site in steer.sites(build(lambda: Llama4ForCausalLM(config)))] == [6, None]


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
