"""The generic table of the methods for language models: each one through every way in which text is generated."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from probes import assert_untouched, snapshot
from tiny import build
from tiny_language import MODELS, PADDING, greedy, inputs
from transformers import CompileConfig

import steer
from steer import Method, Plan

PROMPT = 24  # longer than every window below
SITES = tuple(f"model.layers.{i}.self_attn" for i in range(2))
SCORES = torch.tensor([[[0.9, 0.0, 0.0, 0.1], [0.2, 0.0, 0.0, 0.0]]])


def scores() -> Plan:
    return Plan(sites=SITES, heads=4, tensors={"score": SCORES, "trials": SCORES.clone()})


# every method with settings that change a tiny model, and with settings that change nothing
CASES: dict[str, tuple[Callable[[Any], Method], Callable[[Any], Method]]] = {
    "ACT": (lambda model: steer.ACT(alpha=1.0, beta=0.2, layers="*"), lambda model: steer.ACT(beta=1.0, layers="*")),
    "StreamingLLM": (
        lambda model: steer.StreamingLLM(n_sink=2, n_recent=5),
        lambda model: steer.StreamingLLM(n_sink=2, n_recent=1000),
    ),
    "RetrievalHeads": (
        lambda model: steer.RetrievalHeads(plan=scores(), k=2),
        lambda model: steer.RetrievalHeads(plan=scores(), k=0),
    ),
    "DuoAttention": (
        lambda model: steer.DuoAttention(plan=scores(), share=0.5, sink=2, recent=5),
        lambda model: steer.DuoAttention(plan=scores(), share=1.0),
    ),
    "MoA": (
        lambda model: steer.MoA.uniform(model, 0.25, n_sink=1, block_size=4),
        lambda model: steer.MoA.uniform(model, 1.0, n_sink=1, block_size=4),
    ),
}
# all but those with a window of their own in every layer, and with scores that no sparse kernel can cap
ABLE = ["llama", "mistral", "qwen2", "qwen3", "gemma3", "smollm3"]
every_method = pytest.mark.parametrize("case", CASES)
every_model = pytest.mark.parametrize("name", ABLE)


def prompt(side: str = "left") -> dict[str, Any]:
    return inputs(side, tokens=PROMPT)


def model_of(name: str) -> Any:
    return build(MODELS[name])


def test_every_method_is_here() -> None:
    known = {n for n, cls in steer.methods().items() if cls.kinds == ("causal",) and not cls.needs_pictures}
    assert known == set(CASES)


@every_method
@every_model
def test_the_edit_is_visible_and_comes_off(case: str, name: str) -> None:
    model = model_of(name)
    real = prompt()["attention_mask"].bool()
    plain, tokens = model(**prompt()).logits, greedy(model, **prompt())
    before = snapshot(model)
    handle = steer.apply(model, CASES[case][0](model))
    edited = model(**prompt()).logits
    assert not torch.allclose(edited[real], plain[real], atol=1e-4)
    assert torch.isfinite(edited[real]).all()
    greedy(model, **prompt())
    assert handle.summary()
    handle.remove()
    assert_untouched(before, model)
    assert torch.equal(model(**prompt()).logits, plain)
    assert torch.equal(greedy(model, **prompt()), tokens)


@every_method
@every_model
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}, {"cache_implementation": "static"}])
def test_neutral_or_inactive_is_identical(case: str, name: str, options: dict[str, Any]) -> None:
    model = model_of(name)
    plain, tokens = model(**prompt()).logits, greedy(model, **prompt(), **options)
    edits, neutral = (make(model) for make in CASES[case])
    methods = [replace(edits, steps="1000:")]
    if "cache_implementation" not in options or neutral.is_neutral():  # static caches need evict=False, see below
        methods.append(neutral)
    for method in methods:
        with steer.apply(model, method):
            assert torch.equal(model(**prompt()).logits, plain)
            assert torch.equal(greedy(model, **prompt(), **options), tokens)


@every_method
@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(case: str, name: str, side: str) -> None:
    model, given = model_of(name).double(), prompt(side)
    ids = given["input_ids"][1:]
    alone = ids[:, PADDING:] if side == "left" else ids[:, :-PADDING]
    with steer.apply(model, CASES[case][0](model)):
        both = model(**given).logits[1]
        one = model(alone).logits[0]
    real = both[PADDING:] if side == "left" else both[:-PADDING]
    torch.testing.assert_close(real, one, rtol=0, atol=1e-5)


@every_method
@every_model
def test_a_batch_generates_as_single_rows(case: str, name: str) -> None:
    model, given = model_of(name), prompt()
    with steer.apply(model, CASES[case][0](model)):
        both = greedy(model, **given)[:, PROMPT:]
        first = greedy(model, input_ids=given["input_ids"][:1], attention_mask=None)[:, PROMPT:]
        alone = given["input_ids"][1:, PADDING:]
        second = greedy(model, input_ids=alone, attention_mask=None)[:, PROMPT - PADDING :]
    if case == "MoA":  # its windows go by the longest row of a batch
        second = both[1:]
    assert torch.equal(both, torch.cat([first, second]))


@every_method
@pytest.mark.parametrize("beams", [1, 3])
def test_caches_of_fixed_size_give_the_same(case: str, beams: int) -> None:
    model = model_of("llama")
    method = CASES[case][0](model)
    with steer.apply(model, method):
        wanted = greedy(model, **prompt(), num_beams=beams)
    static = {"num_beams": beams, "cache_implementation": "static"}
    if hasattr(method, "evict"):
        with steer.apply(model, method), pytest.raises(ValueError, match="evict=False"):
            greedy(model, **prompt(), **static)
        method = replace(method, evict=False)
    with steer.apply(model, method):
        assert torch.equal(greedy(model, **prompt(), **static), wanted)


@pytest.mark.parametrize("beams", [1, 3])
def test_padding_is_known_where_every_layer_of_a_fixed_cache_slides(beams: int) -> None:
    """Its masks have the slots of the window for columns, and the prompt's last query does not see the padding."""
    model, method = model_of("mistral_window"), steer.ACT(alpha=1.0, beta=0.2, layers="*")
    plain = greedy(model, **prompt(), num_beams=beams)
    with steer.apply(model, method):
        wanted = greedy(model, **prompt(), num_beams=beams)
        fixed = greedy(model, **prompt(), num_beams=beams, cache_implementation="static")
    assert torch.equal(fixed, wanted)
    assert not torch.equal(wanted, plain)


@every_method
@pytest.mark.parametrize("name", ["llama", pytest.param("gemma3", marks=pytest.mark.slow)])
def test_decoding_that_generate_compiles(case: str, name: str) -> None:
    torch._dynamo.reset()
    model = model_of(name)
    method = CASES[case][0](model)
    method = replace(method, evict=False) if hasattr(method, "evict") else method
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise transformers compiles on GPUs alone
    graphs = []

    def keep(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph

    with steer.apply(model, method):
        wanted = greedy(model, **prompt(), cache_implementation="static")
        config.backend = keep
        compiled = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
        assert torch.equal(greedy(model, **prompt(), **compiled), wanted)
        first = len(graphs)
        assert torch.equal(greedy(model, **prompt(), **compiled), wanted)
    assert first == len(graphs) <= 2  # a sliding window has one before it is full, and one after


@every_method
def test_assisted_decoding_or_a_reason(case: str) -> None:
    model = model_of("llama")
    ids = prompt()["input_ids"][:1]
    method = CASES[case][0](model)
    if not hasattr(method, "evict"):
        if case == "ACT":  # what candidates are sinks would decide otherwise
            return
        with steer.apply(model, method):
            plain = greedy(model, input_ids=ids, attention_mask=None)
            assert torch.equal(greedy(model, input_ids=ids, attention_mask=None, prompt_lookup_num_tokens=2), plain)
        return
    with steer.apply(model, method), pytest.raises(ValueError, match="evict=False"):
        greedy(model, input_ids=ids, attention_mask=None, assistant_model=model_of("llama"))


@every_method
def test_saved_and_loaded_is_the_same(case: str, tmp_path: Any) -> None:
    model = model_of("llama")
    method = CASES[case][0](model)
    with steer.apply(model, method):
        wanted, tokens = model(**prompt()).logits, greedy(model, **prompt())
    method.save(str(tmp_path))
    with steer.apply(model, steer.load(str(tmp_path))):
        assert torch.equal(model(**prompt()).logits, wanted)
        assert torch.equal(greedy(model, **prompt()), tokens)


@pytest.mark.parametrize("first", CASES)
@pytest.mark.parametrize("second", CASES)
def test_two_methods_share_a_site_or_are_refused(first: str, second: str) -> None:
    model = model_of("llama")
    plain = model(**prompt()).logits
    a, b = CASES[first][0](model), CASES[second][0](model)
    both_kernels = a.stage == b.stage == "kernel"
    with steer.apply(model, a):
        alone = model(**prompt()).logits
        if both_kernels or first == second:
            with pytest.raises(steer.CompositionError, match=type(b).__name__):
                steer.apply(model, b)
        else:
            with steer.apply(model, b):
                assert not torch.equal(model(**prompt()).logits, alone)
        assert torch.equal(model(**prompt()).logits, alone)
    assert torch.equal(model(**prompt()).logits, plain)


@every_method
@pytest.mark.parametrize("base", ["eager", "flex_attention"])
def test_other_backends(case: str, base: str) -> None:
    model = model_of("llama")
    with steer.apply(model, CASES[case][0](model)):
        wanted = model(**prompt()).logits
    model.set_attn_implementation(base)
    real = prompt()["attention_mask"].bool()
    with steer.apply(model, CASES[case][0](model)):
        got = model(**prompt()).logits
    torch.testing.assert_close(got[real], wanted[real], rtol=0, atol=1e-5)


@every_method
def test_gradients(case: str) -> None:
    """Gradients reach the embeddings; by differences, which transformers' norms, in single precision, make coarse."""
    model = model_of("llama").double()
    ids, at, size = prompt()["input_ids"][:1], PROMPT - 3, 1e-4
    embedded = model.get_input_embeddings()(ids).detach().requires_grad_()
    with steer.apply(model, CASES[case][0](model)):
        loss = model(inputs_embeds=embedded, use_cache=False).logits[0, -1, 5]
        loss.backward()
        assert embedded.grad is not None
        step = torch.zeros_like(embedded)
        step[0, at] = size
        with torch.no_grad():
            ends = [model(inputs_embeds=embedded + sign * step, use_cache=False).logits[0, -1, 5] for sign in (1, -1)]
    slope, gradient = float(ends[0] - ends[1]) / 2 / size, float(embedded.grad[0, at].sum())
    assert gradient
    assert abs(slope - gradient) < 0.01 * abs(gradient) + 1e-3


def test_capped_scores() -> None:
    """Gemma 2: what reckons with a plain softmax is refused when it is applied; the others work on the eager base."""
    model = model_of("gemma2")
    model.set_attn_implementation("eager")
    before, plain = snapshot(model), model(**prompt()).logits
    with pytest.raises(steer.CompositionError, match="ACT cannot run on Gemma 2: it caps"):
        steer.apply(model, steer.ACT(layers="*"))
    assert_untouched(before, model)
    real = prompt()["attention_mask"].bool()
    for case in set(CASES) - {"ACT"}:
        with steer.apply(model, CASES[case][0](model)):
            edited = model(**prompt()).logits
            assert not torch.allclose(edited[real], plain[real], atol=1e-4)
            greedy(model, **prompt())
    with steer.apply(model, steer.StreamingLLM()) as handle:
        assert "positions='original'" in handle.summary()
