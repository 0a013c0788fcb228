"""StreamingLLM: the masked model with original positions, the published rotation with those of the cache."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from test_windowed import CHUNKS, EXACT, TOKENS, error, generate, held, latent, logits, make, oracle, padding, tokens
from tiny import VOCABULARY, build, llama_config
from torch import Tensor
from transformers import (
    DeepseekV3ForCausalLM,
    DynamicCache,
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    LlamaForCausalLM,
    Qwen2VLTextConfig,
    Qwen2VLTextModel,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)
from transformers.models.llama.modeling_llama import apply_rotary_pos_emb

import steer
from steer import StreamingLLM
from steer.state import CompositionError
from steer.windows import Windows
from steer_patches.rotary import rotary_of, turn
from steer_patches.sites import find_sites

SINKS, RECENT = 3, 8
SIZE = SINKS + RECENT
ROTATED = 1e-5  # the models compute their rotations in fp32
SMALL = {"vocab_size": VOCABULARY, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}


def streaming(**settings: Any) -> StreamingLLM:
    return StreamingLLM(**{"n_sink": SINKS, "n_recent": RECENT, **settings})


@pytest.mark.parametrize("side", [None, "left", "right"])
@pytest.mark.parametrize("evict", [True, False], ids=["evict", "mask"])
def test_original_positions_are_the_masked_model(evict: bool, side: str | None) -> None:
    """To 1e-5 in fp32, through all layers."""
    model, ids, valid = make().float(), tokens(), padding(side) if side else None
    wanted = oracle(model, ids, Windows(SINKS, (RECENT,) * 4), valid)
    with steer.apply(model, streaming(positions="original", evict=evict)):
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks, valid), wanted, valid) <= 1e-5


@pytest.mark.parametrize("n_sink", [0, 1, SINKS])
@pytest.mark.parametrize("positions", ["original", "cache"])
def test_evicted_and_masked_are_the_same_however_text_is_fed(positions: str, n_sink: int) -> None:
    model, ids = make(), tokens()
    for valid in None, padding("left"), padding("right"):
        with steer.apply(model, streaming(n_sink=n_sink, positions=positions, evict=False)):
            wanted = logits(model, ids, [TOKENS], valid)
            assert error(logits(model, ids, CHUNKS["prompt"], valid), wanted, valid) <= EXACT
        with steer.apply(model, streaming(n_sink=n_sink, positions=positions)):
            for chunks in CHUNKS.values():
                assert error(logits(model, ids, chunks, valid), wanted, valid) <= EXACT


def test_cache_positions_differ_once_tokens_were_evicted() -> None:
    model, ids = make(), tokens()
    with steer.apply(model, streaming(positions="original")):
        original = logits(model, ids, CHUNKS["prompt"])
    with steer.apply(model, streaming(positions="cache")):
        cached = logits(model, ids, CHUNKS["prompt"])
    assert error(cached[:, :SIZE], original[:, :SIZE]) <= EXACT
    assert (cached - original)[:, SIZE:].abs().amax((0, 2)).min() > 1e-3


@pytest.mark.parametrize("positions", ["original", "cache"])
@pytest.mark.parametrize("n_recent", [TOKENS - SINKS, TOKENS, 1000])
def test_up_to_the_size_of_the_cache_no_bit_changes(n_recent: int, positions: str) -> None:
    model, ids = make().float(), tokens()
    for chunks in CHUNKS.values():
        dense = logits(model, ids, chunks)
        with steer.apply(model, streaming(n_recent=n_recent, positions=positions)):
            assert torch.equal(logits(model, ids, chunks), dense)
    dense = generate(model, max_new_tokens=SIZE, min_new_tokens=SIZE)
    with steer.apply(model, streaming(n_recent=n_recent, positions=positions)):
        assert torch.equal(generate(model, max_new_tokens=SIZE, min_new_tokens=SIZE), dense)


class Layer:
    """One layer's attention, from what goes into its rotation to what comes out of the heads."""

    def __init__(self, model: Any) -> None:
        attention = model.model.layers[0].self_attn
        self.seen: dict[str, list[Tensor]] = {"q": [], "k": [], "v": [], "out": []}
        for name in "qkv":
            getattr(attention, f"{name}_proj").register_forward_hook(
                lambda module, args, out, name=name: self.seen[name].append(out)
            )
        attention.o_proj.register_forward_pre_hook(lambda module, args: self.seen["out"].append(args[0]))

    def heads(self, name: str) -> Tensor:
        """(B, H, S, 8)"""
        return torch.cat(self.seen[name], 1).unflatten(-1, (-1, 8)).transpose(1, 2)


@pytest.mark.parametrize("chunks", CHUNKS.values(), ids=CHUNKS)
def test_in_one_layer_keys_stand_at_their_place_in_the_cache(chunks: list[int]) -> None:
    """As published: all kept keys are rotated anew at every step, to 0 ... C - 1, and the query to C - 1."""
    config = llama_config()
    config.num_hidden_layers = 1
    model = build(lambda: LlamaForCausalLM(config)).double()
    layer = Layer(model)
    with steer.apply(model, streaming()):
        logits(model, tokens(), chunks)
    query, key, value, out = (layer.heads(name) for name in ("q", "k", "v", "out"))
    for i in range(TOKENS):
        kept = [j for j in range(i + 1) if j < SINKS or i - j < RECENT]
        cos, sin = model.model.rotary_emb(value, torch.arange(len(kept))[None])
        rotated = apply_rotary_pos_emb(key[:, :, kept], key[:, :, kept], cos, sin)[0].repeat_interleave(2, 1)
        q = apply_rotary_pos_emb(query[:, :, i : i + 1], query[:, :, i : i + 1], cos[:, -1:], sin[:, -1:])[0]
        weights = (q @ rotated.mT / math.sqrt(8)).softmax(-1)
        wanted = weights @ value[:, :, kept].repeat_interleave(2, 1)
        assert (out[:, :, i] - wanted[:, :, 0]).abs().max() <= ROTATED


def neox() -> Any:
    return GPTNeoXForCausalLM(GPTNeoXConfig(**SMALL, num_attention_heads=4, rotary_pct=0.5))


MODELS: dict[str, Callable[[], Any]] = {
    "llama": lambda: LlamaForCausalLM(llama_config()),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL, **HEADS)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, **HEADS, layer_types=["full_attention"] * 2)),
    "smollm3, a layer without": lambda: SmolLM3ForCausalLM(
        SmolLM3Config(**SMALL, **HEADS, pad_token_id=0, no_rope_layers=[1, 0])
    ),
    "neox, half of the channels": neox,
    "yarn": lambda: LlamaForCausalLM(scaled("yarn", factor=4.0)),
    "llama3": lambda: LlamaForCausalLM(
        scaled("llama3", factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=64)
    ),
}


def scaled(rope_type: str, **parameters: float) -> Any:
    config = llama_config()
    config.rope_parameters = {"rope_type": rope_type, "rope_theta": 10000.0, **parameters}
    return config


@pytest.mark.parametrize("name", MODELS)
def test_a_turned_key_is_one_that_the_model_rotated_further(name: str) -> None:
    """The model's first keys, at position ids 5, turned by 4, against its keys at 9."""
    model = build(MODELS[name]).double()
    site = find_sites(model)[0]
    rotary, keys = rotary_of(model, site), []
    assert rotary is not None
    for start in 5, 9:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(tokens()[:, :6], position_ids=torch.arange(start, start + 6)[None], past_key_values=cache)
        keys.append(cache.layers[0].keys)
    turned = turn(keys[0], rotary.angles(torch.full((1, 1), 4)))
    assert error(turned, keys[1]) <= ROTATED
    assert error(keys[0], keys[1]) > 0.1


@pytest.mark.parametrize("name", MODELS)
def test_models_with_other_rotations_stream(name: str) -> None:
    model, ids = build(MODELS[name]).double(), tokens()
    with steer.apply(model, streaming(evict=False)):
        wanted = logits(model, ids, [TOKENS])
    with steer.apply(model, streaming()):
        for chunks in CHUNKS.values():
            assert error(logits(model, ids, chunks), wanted) <= ROTATED


def shrunk(trained: int) -> Any:
    model = make()
    model.config.max_position_embeddings = trained
    return model


@pytest.mark.parametrize("side", [None, "left"])
@pytest.mark.parametrize("chunks", [[1] * TOKENS, [4] * 10, [15] + [1] * 25], ids=["one by one", "chunks", "prompt"])
def test_positions_start_again_before_the_trained_length(chunks: list[int], side: str | None) -> None:
    """At 16 position ids, several times in 40 tokens; the model reads the same, and sees no position id beyond."""
    ids, valid = tokens(), padding(side) if side else None
    model = make()
    with steer.apply(model, streaming()):
        wanted = logits(model, ids, chunks, valid)
    model, given, cache = shrunk(16), [], DynamicCache(config=model.config)
    model.model.rotary_emb.register_forward_pre_hook(
        lambda module, args, kwargs: given.append((*args, *kwargs.values())[1]), with_kwargs=True
    )
    with steer.apply(model, streaming()):
        assert error(logits(model, ids, chunks, valid, cache), wanted, valid) <= ROTATED
    assert max(int(ids.max()) for ids in given) < 16
    assert cache.layers[0].base >= 2 * (16 - SIZE)
    with steer.apply(shrunk(16), streaming(layers="model.layers.{0,1}")) as handle:  # one layer sees all distances
        model = handle.state.target
        cache = DynamicCache(config=model.config)
        logits(model, ids, chunks, valid, cache)
        assert cache.layers[0].base == 0


def test_a_sequence_that_started_again_can_be_generated_from() -> None:
    model = shrunk(16)
    with steer.apply(model, streaming()):
        written = generate(model, padding("left"))
        beams = generate(model, padding("left"), num_beams=3)
    with steer.apply(make(), streaming()) as handle:
        assert torch.equal(generate(handle.state.target, padding("left")), written)
        assert torch.equal(generate(handle.state.target, padding("left"), num_beams=3), beams)


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_beam_search_writes_what_the_mask_writes(positions: str) -> None:
    model, valid = make(), padding("left")
    with steer.apply(model, streaming(positions=positions)):
        evicted = generate(model, valid, num_beams=3)
    with steer.apply(model, streaming(positions=positions, evict=False)):
        assert torch.equal(generate(model, valid, num_beams=3), evicted)
    assert not torch.equal(generate(model, valid, num_beams=3), evicted)


def test_a_batch_equals_single_runs() -> None:
    model, ids, valid = make(), tokens(), padding("left")
    with steer.apply(model, streaming()):
        both = logits(model, ids, CHUNKS["prompt"], valid)
        assert error(logits(model, ids[:1], CHUNKS["prompt"]), both[:1]) <= EXACT
        assert error(logits(model, ids[1:, 7:], [8] + [1] * 25), both[1:, 7:]) <= EXACT


def test_memory_is_constant() -> None:
    model, sizes = make().float(), []
    with steer.apply(model, streaming()):
        cache = DynamicCache(config=model.config)
        for _ in range(5):
            logits(model, tokens()[:, :20], [15, 1, 4], cache=cache)
            sizes.append(held(cache))
    assert set(sizes) == {3 * 2 * 2 * 2 * SIZE * 8 * 4}  # layers, keys and values, KV heads, rows, channels, bytes
    assert cache.get_seq_length() == 100


@pytest.mark.parametrize("positions", ["original", "cache"])
def test_a_prompt_may_be_read_in_full(positions: str) -> None:
    """What follows sees the sinks and recent tokens as the full model left them."""
    model, ids = make(), tokens()
    dense = logits(model, ids, [20, *[1] * 20])
    outs = []
    for evict in True, False:
        with steer.apply(model, streaming(steps="1:", positions=positions, evict=evict)):
            outs.append(logits(model, ids, [20, *[1] * 20]))
    assert torch.equal(outs[0][:, :20], dense[:, :20])
    assert error(outs[0], outs[1]) <= EXACT
    assert error(outs[0][:, 20:], dense[:, 20:]) > 0.1


def test_compiled_decoding_with_a_static_cache() -> None:
    from transformers import CompileConfig

    model, valid = make().float(), padding("left")
    compiled = CompileConfig(backend="eager", fullgraph=True)
    compiled._compile_all_devices = True
    torch._dynamo.reset()
    with steer.apply(model, streaming(evict=False)):
        wanted = generate(model, valid, max_new_tokens=6, min_new_tokens=6)
        options: dict[str, Any] = {"cache_implementation": "static", "compile_config": compiled}
        assert torch.equal(generate(model, valid, max_new_tokens=6, min_new_tokens=6, **options), wanted)
    torch._dynamo.reset()


def refused(make_model: Callable[[], Any], words: str) -> None:
    model = build(make_model)
    with pytest.raises(CompositionError, match=words):
        steer.apply(model, streaming())
    with steer.apply(model, streaming(positions="original")):
        assert logits(model, tokens(), [TOKENS]).isfinite().all()


def test_rotations_that_cannot_be_continued_are_refused() -> None:
    gpt2 = GPT2Config(vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4)
    refused(lambda: GPT2LMHeadModel(gpt2), 'no rotary position embedding .* Give positions="original"')
    refused(lambda: LlamaForCausalLM(scaled("dynamic", factor=2.0)), "of type 'dynamic', whose frequencies may change")
    sections = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
    text = Qwen2VLTextConfig(**SMALL, num_attention_heads=4, num_key_value_heads=2, rope_parameters=sections)
    with pytest.raises(CompositionError, match="rotates by time, height and width"):
        steer.apply(build(lambda: Qwen2VLTextModel(text)), streaming())
    with pytest.raises(CompositionError, match="rotates the last channels of queries and keys, not the first"):
        steer.apply(build(lambda: DeepseekV3ForCausalLM(latent())), streaming(evict=False))


def test_logit_caps_are_refused_with_cache_positions() -> None:
    config = Gemma2Config(**SMALL, **HEADS, layer_types=["full_attention"] * 2, attn_implementation="eager")
    model = build(lambda: Gemma2ForCausalLM(config))
    with (
        steer.apply(model, streaming(positions="cache")),
        pytest.raises(ValueError, match='parts of such attention cannot be merged: give positions="original"'),
    ):
        logits(model, tokens(), [TOKENS])
    with steer.apply(model, streaming()):  # the family's preset: original positions
        preset = logits(model, tokens(), CHUNKS["prompt"])
    with steer.apply(model, streaming(positions="original")):
        assert torch.equal(logits(model, tokens(), CHUNKS["prompt"]), preset)
    assert preset.isfinite().all()


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"n_sink": -1}, "n_sink=-1"),
        ({"n_recent": 0}, "at least one recent token is kept"),
        ({"positions": "logical"}, "choose from original, cache"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        StreamingLLM(**settings)


def test_settings_are_saved(tmp_path: Any) -> None:
    streaming(positions="original", evict=False).save(str(tmp_path))
    assert steer.load(str(tmp_path)) == streaming(positions="original", evict=False)
