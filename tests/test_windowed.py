"""Windows per head: prompts, later tokens and caches equal the masked model; the cache holds no more than it must."""

from __future__ import annotations

import copy
import random
import weakref
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from tiny import VOCABULARY, build, llama_config
from torch import Tensor
from transformers import (
    CompileConfig,
    DeepseekV3Config,
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3nForCausalLM,
    Gemma3nTextConfig,
    Gemma3TextConfig,
    LlamaForCausalLM,
    QuantizedCache,
    StaticCache,
)

import steer
from steer.bind import CompositionError
from steer.select import SelectorError
from steer.windowed import Windowed
from steer.windows import Windows
from steer_patches.site import Site
from steer_patches.windowed_cache import Arriving, Store, WindowedLayer

TOKENS = 40
EXACT = 1e-12  # models in fp64; more than ten times what is seen


@dataclass(kw_only=True)
class PerHead(Windowed, register=False):
    """Four query heads over two KV heads: the first KV head serves two windows, the second sees everything."""

    sink: int | tuple[int, ...] = (2, 2, 0, 0)
    window: tuple[int | None, ...] = (3, 5, None, None)

    def windows(self, site: Site, tokens: int) -> Windows:
        return Windows(self.sink, self.window)


SETTINGS: dict[str, dict[str, Any]] = {
    "two in a group": {},
    "alike": {"sink": 1, "window": (4, 4, 4, 4)},
    "two groups": {"sink": (3, 3, 0, 0), "window": (2, 2, 9, 9)},
    "no sinks": {"sink": 0, "window": (1, 7, 2, 2)},
    "full beside": {"sink": 2, "window": (None, 3, 6, 6)},
}
every_setting = pytest.mark.parametrize("settings", SETTINGS.values(), ids=SETTINGS)
CHUNKS = {
    "one by one": [1] * TOKENS,
    "prompt": [15] + [1] * 25,
    "chunks": [12, 5, 3, 20],
    "long": [3, 37],
    "full": [5, 1, 1, 4, 29],
}


def make(attention: str = "sdpa") -> Any:
    model = build(lambda: LlamaForCausalLM(llama_config())).double()
    model.set_attn_implementation(attention)
    return model


def tokens(batch: int = 2) -> Tensor:
    return torch.randint(3, VOCABULARY, (batch, TOKENS), generator=torch.Generator().manual_seed(1))


def padding(side: str) -> Tensor:
    """The second row has seven tokens of padding."""
    valid = torch.ones(2, TOKENS, dtype=torch.long)
    valid[1, :7] = 0
    return valid if side == "left" else valid.flip(1)


def wanted_mask(windows: Windows, valid: Tensor) -> Tensor:
    """(B, H, S, S) bool, in loops over the rule; padding sees everything, so that it stays finite."""
    keep = torch.zeros(len(valid), len(windows.window), TOKENS, TOKENS, dtype=torch.bool)
    for row in range(len(valid)):
        real = valid[row].nonzero().flatten().tolist()
        keep[row, :, [t for t in range(TOKENS) if t not in real]] = True
        for head, (sink, window) in enumerate(windows.pairs):
            for i, query in enumerate(real):
                for j, key in enumerate(real[: i + 1]):
                    keep[row, head, query, key] = window is None or j < sink or i - j < window
    return keep


def logits(model: Any, ids: Tensor, chunks: Sequence[int], valid: Tensor | None = None, cache: Any = None) -> Tensor:
    """Of all tokens, fed in chunks through one cache."""
    cache = DynamicCache(config=model.config) if cache is None else cache
    positions = None if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
    out, at = [], 0
    for end in torch.tensor(chunks).cumsum(0).tolist():
        given: dict[str, Any] = {} if valid is None else {"attention_mask": valid[:, :end]}
        if positions is not None:
            given["position_ids"] = positions[:, at:end]
        with torch.no_grad():
            out.append(model(ids[:, at:end], past_key_values=cache, **given).logits)
        at = end
    return torch.cat(out, 1)


def oracle(model: Any, ids: Tensor, windows: Windows, valid: Tensor | None = None) -> Tensor:
    """The unsteered model under the mask."""
    real = torch.ones_like(ids) if valid is None else valid
    positions = (real.cumsum(1) - 1).clamp(min=0)
    with torch.no_grad():
        return model(ids, attention_mask=wanted_mask(windows, real), position_ids=positions).logits


def error(out: Tensor, wanted: Tensor, valid: Tensor | None = None) -> float:
    return float((out - wanted)[slice(None) if valid is None else valid.bool()].abs().max())


def held(cache: Any) -> int:
    """Bytes of keys and values in a cache."""
    layers = [x if isinstance(x, WindowedLayer) else None for x in cache.layers]
    plain = [x for x, layer in zip(cache.layers, layers, strict=True) if layer is None]
    return sum(layer.nbytes for layer in layers if layer) + sum(
        t.numel() * t.element_size() for x in plain for t in (x.keys, x.values)
    )


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
@pytest.mark.parametrize("evict", [True, False], ids=["evict", "mask"])
@every_setting
def test_logits_are_those_of_the_mask(
    settings: dict[str, Any], evict: bool, chunks: list[int], side: str | None
) -> None:
    """However the text is fed, and with padding on either side."""
    model, ids, method = make(), tokens(), PerHead(**settings, evict=evict)
    valid = padding(side) if side else None
    wanted = oracle(model, ids, Windows(method.sink, method.window), valid)
    assert error(logits(model, ids, chunks, valid), wanted, valid) > 0.1
    with steer.apply(model, method):
        assert error(logits(model, ids, chunks, valid), wanted, valid) <= EXACT


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("evict", [True, False], ids=["evict", "mask"])
@pytest.mark.parametrize("attention", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_other_implementations_give_the_same(attention: str, evict: bool, side: str | None) -> None:
    """Eager attention takes the softmax in fp32, and flex attention has no fp64 on a CPU."""
    ids, method, valid = tokens(), PerHead(evict=evict), padding(side) if side else None
    wanted = oracle(make(), ids, Windows(method.sink, method.window), valid)
    model = make(attention) if attention == "eager" else make(attention).float()
    with steer.apply(model, method):
        for chunks in CHUNKS["prompt"], CHUNKS["chunks"]:
            assert error(logits(model, ids, chunks, valid), wanted, valid) <= 2e-5


def test_a_batch_equals_single_runs() -> None:
    model, ids, valid = make(), tokens(), padding("left")
    with steer.apply(model, PerHead()):
        both = logits(model, ids, CHUNKS["prompt"], valid)
        assert error(logits(model, ids[:1], CHUNKS["prompt"]), both[:1]) <= EXACT
        assert error(logits(model, ids[1:, 7:], [8] + [1] * 25), both[1:, 7:]) <= EXACT


@pytest.mark.parametrize("evict", [True, False], ids=["evict", "mask"])
@pytest.mark.parametrize("window", [(TOKENS - 2,) * 4, (TOKENS, 50, None, 38), (None,) * 4])
def test_windows_that_cover_everything_change_no_bit(window: tuple[int | None, ...], evict: bool) -> None:
    model, ids = make().float(), tokens()
    for chunks in CHUNKS.values():
        dense = logits(model, ids, chunks)
        with steer.apply(model, PerHead(sink=2, window=window, evict=evict)) as handle:
            assert torch.equal(logits(model, ids, chunks), dense)
            assert handle.stats["methods"][0]["density"] == 1.0


def test_layers_in_which_every_head_sees_everything_keep_their_cache() -> None:
    model, valid = make().float(), padding("left")
    dense = logits(model, tokens(), CHUNKS["prompt"], valid)
    with steer.apply(model, PerHead(window=(None,) * 4)):
        cache = DynamicCache(config=model.config)
        assert torch.equal(logits(model, tokens(), CHUNKS["prompt"], valid, cache), dense)
        assert not any(isinstance(layer, WindowedLayer) for layer in cache.layers)


@every_setting
def test_memory_is_that_of_the_windows(settings: dict[str, Any]) -> None:
    """Each KV head holds its sinks and its longest window, from the moment that they are full."""
    model, method = make(), PerHead(**settings)
    bytes_of_a_token = 2 * 8 * 8 * 2  # keys and values, channels, bytes, rows
    wanted = 0
    for group in Windows(method.sink, method.window).groups(2):
        heads, sink, window = group.kept
        wanted += 3 * bytes_of_a_token * len(heads) * (TOKENS if window is None else sink + window)
    for chunks in CHUNKS.values():
        for valid in None, padding("left"):
            cache = DynamicCache(config=model.config)
            with steer.apply(model, method):
                logits(model, tokens(), chunks, valid, cache)
            full = TOKENS * bytes_of_a_token * 2 * 3
            assert held(cache) == wanted if wanted < full else held(cache) == full
            assert cache.get_seq_length() == TOKENS


def test_memory_stays_constant_while_text_is_written() -> None:
    model = make().float()
    with steer.apply(model, PerHead(sink=2, window=(6,) * 4)):
        sizes = []
        cache = DynamicCache(config=model.config)
        for start in range(0, 120, 20):
            ids = torch.cat([tokens()[:, :20]] * (start // 20 + 1), 1)
            model.generate(ids, attention_mask=torch.ones_like(ids), past_key_values=cache, max_new_tokens=1)
            sizes.append(held(cache))
    assert len(set(sizes)) == 1
    assert sizes[0] == 3 * 2 * 2 * 8 * 2 * 8 * 4


def generate(model: Any, valid: Tensor | None = None, **options: Any) -> Tensor:
    ids = tokens()[:, :20]
    mask = torch.ones_like(ids) if valid is None else valid[:, :20]
    given = {"max_new_tokens": 20, "min_new_tokens": 20, "do_sample": False, **options}
    return model.generate(ids * mask, attention_mask=mask, **given)


@pytest.mark.parametrize("options", [{}, {"num_beams": 3}, {"num_beams": 2, "num_return_sequences": 2}], ids=str)
def test_generate_with_eviction_writes_what_the_mask_writes(options: dict[str, Any]) -> None:
    model, valid = make(), padding("left")
    dense = generate(model, valid, **options)
    with steer.apply(model, PerHead(evict=True)):
        evicted = generate(model, valid, **options)
    with steer.apply(model, PerHead(evict=False)):
        assert torch.equal(generate(model, valid, **options), evicted)
    assert not torch.equal(dense, evicted)
    assert torch.equal(generate(model, valid, **options), dense)


def test_rows_of_the_cache_can_be_repeated_chosen_copied_and_emptied() -> None:
    model, ids = make(), tokens()
    with steer.apply(model, PerHead()):
        whole = logits(model, ids, CHUNKS["prompt"])

        def after(change: Callable[[Any], Any], rows: Tensor) -> float:
            cache = DynamicCache(config=model.config)
            logits(model, ids[:, :20], [20], cache=cache)
            cache = change(cache) or cache
            return error(logits(model, ids[rows, 20:], [1] * 20, cache=cache), whole[rows, 20:])

        assert after(lambda cache: cache.batch_repeat_interleave(2), torch.tensor([0, 0, 1, 1])) <= EXACT
        assert after(lambda cache: cache.batch_select_indices(torch.tensor([1])), torch.tensor([1])) <= EXACT
        assert after(lambda cache: cache.reorder_cache(torch.tensor([1, 0])), torch.tensor([1, 0])) <= EXACT
        assert after(copy.deepcopy, torch.tensor([0, 1])) <= EXACT
        cache = DynamicCache(config=model.config)
        logits(model, ids[:, :20], [20], cache=cache)
        cache.reset()
        assert cache.get_seq_length() == 0
        assert error(logits(model, ids, CHUNKS["prompt"], cache=cache), whole) <= EXACT


def test_rows_of_different_padding_change_places() -> None:
    model, ids, valid = make(), tokens(), padding("left")
    other = torch.tensor([1, 0, 1])
    positions = (valid.cumsum(1) - 1).clamp(min=0)[other]
    with steer.apply(model, PerHead()), torch.no_grad():
        whole, cache = logits(model, ids, CHUNKS["prompt"], valid), DynamicCache(config=model.config)
        logits(model, ids[:, :20], [20], valid[:, :20], cache)
        cache.batch_select_indices(other)
        for at in range(20, TOKENS):
            out = model(
                ids[other, at : at + 1],
                attention_mask=valid[other, : at + 1],
                position_ids=positions[:, at : at + 1],
                past_key_values=cache,
            ).logits
            assert error(out, whole[other, at : at + 1]) <= EXACT


def test_a_sequence_that_is_over_leaves_nothing() -> None:
    model = make()
    with steer.apply(model, PerHead()) as handle:
        cache = model(tokens()).past_key_values
        left = [weakref.ref(layer) for layer in cache.layers]
        del cache
        assert [layer() for layer in left] == [None] * len(left)
        assert handle.stats["density"] is not None


def test_a_copied_cache_goes_on_by_itself() -> None:
    """Tokens are written over others in place."""
    model, ids = make(), tokens()
    with steer.apply(model, PerHead()):
        whole, cache = logits(model, ids, CHUNKS["prompt"]), DynamicCache(config=model.config)
        logits(model, ids[:, :20], [20], cache=cache)
        other = copy.deepcopy(cache)
        logits(model, ids.flip(1)[:, :10], [1] * 10, cache=other)
        assert error(logits(model, ids[:, 20:], [1] * 20, cache=cache), whole[:, 20:]) <= EXACT


def test_offloaded_caches_work() -> None:
    model, ids = make(), tokens()
    with steer.apply(model, PerHead()):
        whole = logits(model, ids, CHUNKS["prompt"])
        cache = DynamicCache(config=model.config)
        for layer in range(3):
            cache.layers[layer].offload()
        logits(model, ids[:, :20], [20], cache=cache)
        for layer in cache.layers:
            layer.offload()
            layer.prefetch()
        assert error(logits(model, ids[:, 20:], [1] * 20, cache=cache), whole[:, 20:]) <= EXACT


def test_tokens_are_taken_back_only_while_none_was_evicted() -> None:
    model, ids = make(), tokens()
    with steer.apply(model, PerHead(sink=2, window=(20, 20, None, None))):
        whole, cache = logits(model, ids, CHUNKS["prompt"]), DynamicCache(config=model.config)
        logits(model, ids[:, :15], [15], cache=cache)
        cache.crop(-5)
        assert cache.get_seq_length() == 10
        assert error(logits(model, ids[:, 10:], [1] * 30, cache=cache), whole[:, 10:]) <= EXACT
        with pytest.raises(
            ValueError, match=r"cannot take 5 tokens back .* PerHead keeps short: tokens .* were evicted"
        ):
            cache.crop(-5)


@pytest.mark.parametrize("heads", [[0, 1], [1], {"model.layers.0": [2], "model.layers.2": [0, 3]}], ids=str)
def test_other_heads_and_layers_see_everything(heads: Any) -> None:
    """Heads one by one; in a mapping the layers that it does not name."""
    model, ids = make(), tokens()
    window: tuple[int | None, ...] = (3, 4, 5, 6)
    method = {"sink": 1, "window": window, "heads": heads}
    with steer.apply(model, PerHead(**method, evict=False)):
        wanted = logits(model, ids, [TOKENS])
    if isinstance(heads, list):
        chosen = tuple(w if h in heads else None for h, w in enumerate(window))
        assert error(wanted, oracle(model, ids, Windows(1, chosen))) <= EXACT
    with steer.apply(model, PerHead(**method)):
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks), wanted) <= EXACT


def test_a_prompt_may_be_read_in_full_and_evicted_after() -> None:
    model, ids = make(), tokens()
    dense = logits(model, ids, CHUNKS["prompt"])
    with steer.apply(model, PerHead(steps="1:")):
        cache = DynamicCache(config=model.config)
        evicted = logits(model, ids, CHUNKS["prompt"], cache=cache)
        assert cache.layers[0].stores[0].keys.shape[2] == 7
    assert torch.equal(evicted[:, :15], dense[:, :15])
    with steer.apply(model, PerHead(steps="1:", evict=False)):
        assert error(logits(model, ids, CHUNKS["prompt"]), evicted) <= EXACT
    assert error(evicted[:, 15:], dense[:, 15:]) > 0.1


@pytest.mark.parametrize("side", [None, "left"])
def test_compiled_decoding_with_a_static_cache_gives_the_same(side: str | None) -> None:
    """In one graph for all steps."""
    model, valid, counted = make().float(), padding("left") if side else None, torch._dynamo.utils.counters
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True
    with steer.apply(model, PerHead(evict=False)):
        wanted = generate(model, valid, max_new_tokens=6, min_new_tokens=6)
        torch._dynamo.reset()
        counted.clear()
        options = {"cache_implementation": "static", "compile_config": compiled}
        assert torch.equal(generate(model, valid, max_new_tokens=6, min_new_tokens=6, **options), wanted)
        assert counted["stats"]["unique_graphs"] == 1
    torch._dynamo.reset()


@pytest.mark.parametrize("valid", [None, "left"])
def test_without_a_cache_the_mask_is_the_same(valid: Any) -> None:
    model, ids, valid = make(), tokens(), padding(valid) if valid else None
    wanted = oracle(model, ids, Windows((2, 2, 0, 0), (3, 5, None, None)), valid)
    positions = None if valid is None else (valid.cumsum(1) - 1).clamp(min=0)
    with steer.apply(model, PerHead()), torch.no_grad():
        out = model(ids, attention_mask=valid, position_ids=positions, use_cache=False).logits
    assert error(out, wanted, valid) <= EXACT


@pytest.mark.parametrize("evict", [True, False], ids=["evict", "mask"])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_masks_that_say_more_are_refused(attention: str, evict: bool) -> None:
    """Two texts in one row, and a prefix whose tokens see one another."""
    model, ids, at = make(attention).float(), tokens(), torch.arange(TOKENS)
    causal, first = at <= at[:, None], at < 25
    for keep in causal & (first == first[:, None]), causal | (first & first[:, None]):
        mask = keep.expand(2, 1, -1, -1)
        given = mask if attention == "sdpa" else (~mask).float() * torch.finfo(torch.float32).min
        with steer.apply(model, PerHead(evict=evict)), pytest.raises(ValueError, match="as masks of packed texts do"):
            model(ids, attention_mask=given)


def test_gradients_pass() -> None:
    """A training loss, as search by gradients takes it: the sparse kernel has none, the mask form has."""
    model, ids = make(), tokens()
    embedded = model.get_input_embeddings()(ids).detach()
    grads = []
    for mask in None, wanted_mask(Windows((2, 2, 0, 0), (3, 5, None, None)), torch.ones_like(ids)):
        x = embedded.clone().requires_grad_()
        if mask is None:
            with steer.apply(model, PerHead()):
                model(inputs_embeds=x, labels=ids, use_cache=False).loss.backward()
        else:
            model(inputs_embeds=x, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
        grads.append(x.grad)
    assert error(grads[0], grads[1]) <= EXACT
    assert float(grads[1].abs().max()) > 1e-3


@pytest.mark.parametrize("window", [(4, 4, 4, 4), (2, 2, 9, 9), (3, 5, None, None)])
def test_a_prompt_read_in_inference_mode(window: tuple[int | None, ...]) -> None:
    """What it left may not be written to afterwards, so that the token that leaves the window is still there."""
    model, ids = make(), tokens()
    with steer.apply(model, PerHead(sink=1, window=window)):
        wanted = logits(model, ids, CHUNKS["prompt"])
        with torch.inference_mode():
            cache = model(ids[:, :15]).past_key_values
        assert error(logits(model, ids[:, 15:], [1] * 25, cache=cache), wanted[:, 15:]) <= EXACT


def test_an_emptied_cache_takes_other_windows() -> None:
    @dataclass(kw_only=True)
    class Half(PerHead, register=False):
        def windows(self, site: Site, tokens: int) -> Windows:
            return Windows(1, (tokens // 2,) * 4 if tokens < 30 else (None,) * 4)

    model, ids = make(), tokens()
    with steer.apply(model, Half()):
        for length in (20, 36):
            wanted = logits(model, ids, [length, 1, 1])
            for empty in (lambda cache: cache.reset(), lambda cache: cache.crop(-2)):
                cache = model(ids[:, :2]).past_key_values
                empty(cache)
                assert error(logits(model, ids, [length, 1, 1], cache=cache), wanted) == 0
                assert all(isinstance(layer, WindowedLayer) == (length < 30) for layer in cache.layers)


def test_autocast() -> None:
    """As plain attention does there, the cache keeps fp32 keys and values of less, and computes in the latter."""
    model, ids = make().float(), tokens()
    with steer.apply(model, PerHead()):
        wanted = logits(model, ids, CHUNKS["prompt"])
        with torch.autocast("cpu", torch.bfloat16):
            out = logits(model, ids, CHUNKS["prompt"])
    plain = logits(model, ids, [TOKENS])
    with torch.autocast("cpu", torch.bfloat16):
        rounding = error(logits(model, ids, [TOKENS]), plain)
    assert error(out, wanted) <= 2 * rounding


def latent() -> DeepseekV3Config:
    sizes = {"kv_lora_rank": 8, "q_lora_rank": 8, "qk_rope_head_dim": 4, "qk_nope_head_dim": 8, "v_head_dim": 8}
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    experts = {"first_k_dense_replace": 2, "num_key_value_heads": 4}
    return DeepseekV3Config(vocab_size=VOCABULARY, **shape, **sizes, **experts)


@pytest.mark.parametrize("window", [(3, 5, 4, None), (4, 4, 4, 4)])
def test_values_of_another_width_than_keys(window: tuple[int | None, ...]) -> None:
    """Multi-head latent attention, whose cache holds what keys and values are made of."""
    model, ids = build(lambda: DeepseekV3ForCausalLM(latent())).double(), tokens()
    expected = oracle(model, ids, Windows(2, window))
    with steer.apply(model, PerHead(sink=2, window=window, evict=False)):
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks), expected) <= EXACT
        wanted = logits(model, ids, [TOKENS])
        assert error(logits(model.float(), ids, [TOKENS]), wanted) <= 1e-4
    with pytest.raises(CompositionError, match=r"what all heads make their keys from\. Give evict=False"):
        steer.apply(model, PerHead())


def test_keys_that_layers_share() -> None:
    shape = {"hidden_size": 32, "hidden_size_per_layer_input": 8, "intermediate_size": 64, "num_hidden_layers": 4}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "laurel_rank": 4, "altup_num_inputs": 2}
    kinds = {"layer_types": ["sliding_attention", "full_attention"] * 2, "sliding_window": 5, "num_kv_shared_layers": 2}
    words = {"vocab_size": VOCABULARY, "vocab_size_per_layer_input": VOCABULARY, "pad_token_id": 0}
    config = Gemma3nTextConfig(**shape, **heads, **kinds, **words, activation_sparsity_pattern=[0.0] * 4)
    model, ids = build(lambda: Gemma3nForCausalLM(config)).double(), tokens()
    assert [site.layer_idx for site in steer.sites(model)] == [0, 1, 0, 1]
    with steer.apply(model, PerHead(evict=False)):
        wanted = logits(model, ids, [TOKENS])
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks), wanted) <= 1e-5  # parts of this model compute in fp32
    for layers in ("*", "*layers.1"):  # the second alone: another layer reads what it keeps
        with (
            steer.apply(model, PerHead(layers=layers)),
            pytest.raises(ValueError, match=r"layers of this model use those of others\. Give evict=False"),
        ):
            logits(model, ids, [TOKENS])


MIXED = {
    **{"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8},
    **{"num_attention_heads": 4, "num_key_value_heads": 2, "query_pre_attn_scalar": 8, "sliding_window": 5},
    "layer_types": ["sliding_attention", "full_attention"],
}


def test_layers_with_a_window_of_their_own_stay_as_they_are() -> None:
    model, ids = build(lambda: Gemma3ForCausalLM(Gemma3TextConfig(**MIXED))).double(), tokens()
    with steer.apply(model, PerHead(evict=False)):
        wanted = logits(model, ids, [TOKENS])
    assert error(wanted, logits(model, ids, [TOKENS])) > 0.1
    with steer.apply(model, PerHead()):
        for chunks in CHUNKS.values():
            cache = DynamicCache(config=model.config)
            assert error(logits(model, ids, chunks, cache=cache), wanted) <= EXACT
            assert [isinstance(layer, WindowedLayer) for layer in cache.layers] == [False, True]
    with pytest.raises(SelectorError, match="matches only layers with a sliding window of their own"):
        steer.apply(model, PerHead(layers="model.layers.0"))


def test_logit_caps_are_kept() -> None:
    """Gemma 2, whose eager attention caps logits: no sparse kernel, but the same mask."""
    config = Gemma2Config(**MIXED, attn_logit_softcapping=2.0, attn_implementation="eager")
    model, ids = build(lambda: Gemma2ForCausalLM(config)), tokens()
    with steer.apply(model, PerHead(evict=False)):
        wanted = logits(model, ids, [TOKENS])
    model.config.attn_logit_softcapping = None
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = None
    with steer.apply(model, PerHead()):
        assert error(logits(model, ids, [TOKENS]), wanted) > 1e-2
    for layer in model.model.layers:
        layer.self_attn.attn_logit_softcapping = 2.0
    with steer.apply(model, PerHead()):
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks), wanted) <= 1e-4


@pytest.mark.parametrize("kind", ["static", "quantized"])
def test_caches_that_cannot_evict_are_refused(kind: str) -> None:
    model = make().float()
    with steer.apply(model, PerHead()) as handle:
        cache = StaticCache(config=model.config, max_cache_len=50)
        if kind == "quantized":
            pytest.importorskip("optimum.quanto")
            cache = QuantizedCache("quanto", model.config)
        with pytest.raises(ValueError, match=r"PerHead\(evict=True\) needs a DynamicCache.*Give evict=False"):
            logits(model, tokens(), [TOKENS], cache=cache)
        handle.remove()
        assert logits(model, tokens(), [TOKENS], cache=cache).isfinite().all()


def test_decoding_that_takes_tokens_back_is_refused() -> None:
    model = make().float()
    with steer.apply(model, PerHead()), pytest.raises(ValueError):
        model.generate(tokens(1)[:, :20], prompt_lookup_num_tokens=3, max_new_tokens=10)
    with steer.apply(model, PerHead(evict=False)):
        quick = model.generate(tokens(1)[:, :20], prompt_lookup_num_tokens=3, max_new_tokens=20, min_new_tokens=20)
        plain = model.generate(tokens(1)[:, :20], max_new_tokens=20, min_new_tokens=20, do_sample=False)
    assert torch.equal(quick, plain)


def test_a_short_cache_cannot_be_used_by_the_plain_model_nor_by_other_windows() -> None:
    model, ids = make(), tokens()
    with steer.apply(model, PerHead()) as handle:
        whole, cache = logits(model, ids, CHUNKS["prompt"]), DynamicCache(config=model.config)
        logits(model, ids[:, :20], [20], cache=cache)
        handle.remove()
        with pytest.raises(RuntimeError, match="keeps only what PerHead needs, and PerHead is not active"):
            logits(model, ids[:, 20:], [20], cache=cache)
    with (
        steer.apply(model, PerHead(sink=9)),
        pytest.raises(ValueError, match=r"which is not what PerHead.* needs: start a new sequence"),
    ):
        logits(model, ids[:, 20:], [20], cache=cache)
    with steer.apply(model, PerHead()):
        assert error(logits(model, ids[:, 20:], [1] * 20, cache=cache), whole[:, 20:]) <= EXACT


@pytest.mark.parametrize("settings", list(SETTINGS.values()), ids=list(SETTINGS))
def test_density_counts_visible_pairs(settings: dict[str, Any]) -> None:
    method = PerHead(**settings)
    keep = wanted_mask(Windows(method.sink, method.window), torch.ones(1, TOKENS))
    model, causal = make(), torch.ones(TOKENS, TOKENS).tril()
    with steer.apply(model, method) as handle:
        cache = DynamicCache(config=model.config)
        logits(model, tokens(), [25], cache=cache)
        density = handle.stats["methods"][0]["density"]
        assert density == pytest.approx(float(keep[..., :25, :].sum() / 4 / causal[:25].sum()))
        logits(model, tokens()[:, 25:], [15], cache=cache)
        density = handle.stats["methods"][0]["density"]
        assert density == pytest.approx(float(keep[..., 25:, :].sum() / 4 / causal[25:].sum()))


@pytest.mark.parametrize("seed", range(20))
def test_a_store_holds_the_first_and_the_latest_tokens_of_each_row(seed: int) -> None:
    """Random chunks of random rows, against lists: what queries get, and what stays."""
    draw = random.Random(seed)
    sink, window = draw.choice([(0, 1), (2, 3), (3, 8), (1, 5), (4, None)])
    rows = draw.choice([1, 3])
    store = Store((0,), sink, window)
    seen: list[list[int]] = [[] for _ in range(rows)]
    kept: list[list[int]] = [[] for _ in range(rows)]
    padded = rows > 1 and draw.random() < 0.7
    for _ in range(12):
        new = draw.choice([1, 1, 2, 7])
        numbers = torch.full((rows, new), -1)
        for row, at in ((row, at) for at in range(new) for row in range(rows)):
            if not padded or draw.random() < 0.7:
                numbers[row, at] = len(seen[row])
                seen[row].append(len(seen[row]))
        longest, shared = max(map(len, seen)), numbers[:1] if not padded else numbers
        keys = numbers[:, None, :, None].double()
        got, values, labels = store.add(keys, -keys, shared, longest, not padded)
        for row in range(rows):
            label = labels[row if len(labels) > 1 else 0]
            there = label >= 0
            assert torch.equal(got[row, 0, there, 0], label[there].double())
            assert torch.equal(values[row, 0, there, 0], -label[there].double())
            first = len(seen[row]) - int((numbers[row] >= 0).sum())  # of the new tokens
            needed = {r for r in seen[row] if r < sink or window is None or r > first - window}
            assert needed <= set(label.tolist())
            kept[row] = [r for r in seen[row] if r < sink or window is None or r >= len(seen[row]) - window]
            assert store.numbers is not None and store.keys is not None
            stays = store.numbers[row if len(store.numbers) > 1 else 0]
            assert sorted(r for r in stays.tolist() if r >= 0) == kept[row]
            assert torch.equal(store.keys[row, 0, stays >= 0, 0], stays[stays >= 0].double())
        assert store.keys is not None
        assert store.keys.shape[2] == min(longest, longest if window is None else sink + window)


def test_a_layer_without_its_method_says_so() -> None:
    layer = WindowedLayer([((0,), 1, 2)], "Some")
    layer.expect(Arriving(torch.arange(3)[None], 3, True))
    layer.update(torch.zeros(1, 1, 3, 4), torch.zeros(1, 1, 3, 4))
    with pytest.raises(RuntimeError, match="keeps only what Some needs"):
        layer.update(torch.zeros(1, 1, 1, 4), torch.zeros(1, 1, 1, 4))


@pytest.mark.parametrize(
    "make_it, words",
    [
        (lambda: Windows(1, ()), "1 sinks for 0 windows|0 sinks for 0 windows"),
        (lambda: Windows((1, 2), (3,)), "2 sinks for 1 windows: give one of each per query head"),
        (lambda: Windows(-1, (3,)), "a sink is at least 0, a window at least 1"),
        (lambda: Windows(1, (0,)), "a sink is at least 0, a window at least 1"),
        (lambda: PerHead(steps="0:1"), "evicted tokens stay away: use evict=False"),
        (lambda: PerHead(min_tokens=4), "leave generated tokens out: use evict=False"),
    ],
)
def test_bad_settings_are_refused(make_it: Callable[[], Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        make_it()


def test_windows_for_other_heads_are_refused() -> None:
    model = make()
    with (
        steer.apply(model, PerHead(sink=1, window=(3, 3))),
        pytest.raises(ValueError, match="2 windows for the 4 query"),
    ):
        logits(model, tokens(), [TOKENS])
