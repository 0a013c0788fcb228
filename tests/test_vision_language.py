"""The generic table of the methods for vision-language models: each one through every model and way to generate."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from probes import assert_untouched, snapshot
from tiny import build
from tiny_language import MODELS as LANGUAGE_MODELS
from tiny_vision_language import (
    BATCH,
    IMAGE,
    MODELS,
    ONE,
    TWO_PICTURES,
    WITHOUT,
    Picture,
    Row,
    greedy,
    inputs,
    model_of,
)
from torch import Tensor
from transformers import CompileConfig, StaticCache

import steer
from steer import Method, Plan
from steer.methods.gift import GIFT
from steer.methods.imbalanced_attention import ImbalancedAttention
from steer.methods.var import VAR
from steer.methods.vhr import VHR

# every method with settings that change a tiny model, and with settings that change nothing
CASES: dict[str, tuple[Callable[[Any], Method], Callable[[Any], Method]]] = {
    "VAR": (
        lambda model: VAR(p=0.0, rho=0.1, v_min=0.0, tau=1.5, sink_dims=[2, 9, 17], dense_layers=0),
        lambda model: VAR(p=1.0, sink_dims=[2, 9, 17]),
    ),
    "VHR": (lambda model: VHR(alpha=3.0, outliers="keep", layers="*"), lambda model: VHR(alpha=1.0)),
    "GIFT": (
        lambda model: GIFT(alpha=5.0, saliency=[1], layers="*.layers.{2,3}.self_attn"),
        lambda model: GIFT(alpha=0.0),
    ),
    "ImbalancedAttention": (
        lambda model: ImbalancedAttention(alpha=2.0, beta=1.0, gamma=1.5, cutoff=0.0, dense_layers=0),
        lambda model: ImbalancedAttention(alpha=0.0, beta=0.0, gamma=1.0),
    ),
}
MIXED: list[Row] = [*BATCH, [17]]  # a row of two tiles, one of a whole picture later in the text, one of text alone
SHAPES: dict[str, list[Row]] = {"one": ONE, "two pictures": TWO_PICTURES, "mixed": MIXED}
every_method = pytest.mark.parametrize("case", CASES)
every_model = pytest.mark.parametrize("name", MODELS)
some_models = pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "paligemma"])
two_models = pytest.mark.parametrize("name", ["llava", "qwen2_vl"])


def real(given: dict[str, Any]) -> Tensor:
    return given["attention_mask"].bool()


def written(model: Any, given: dict[str, Any], **options: Any) -> Tensor:
    """The generated tokens, none of which looks like a picture."""
    return greedy(model, given, suppress_tokens=[*range(44, 64)], **options)


def assert_same(before: Any, model: Any) -> None:
    """Untouched, but for what Qwen models themselves keep of their last positions."""
    kept = [(part, cls, {k: v for k, v in held.items() if k != "rope_deltas"}) for part, cls, held in before]
    deltas = [(m, m.__dict__.pop("rope_deltas")) for m in model.modules() if "rope_deltas" in vars(m)]
    try:
        assert_untouched(kept, model)
    finally:
        for module, delta in deltas:
            module.rope_deltas = delta


def rows_alone(name: str, rows: list[Row], given: dict[str, Any]) -> list[dict[str, Any]]:
    """The prompt of each row by itself, without padding, with its own pictures."""
    counts = [sum(isinstance(part, Picture) for part in row) for row in rows]
    found = []
    for row, count in enumerate(counts):
        keep, first = real(given)[row], sum(counts[:row])
        mine = slice(first, first + count)
        alone = {k: v[row : row + 1, keep] for k, v in given.items() if k.endswith("_ids") or k == "attention_mask"}
        if count and name in ("idefics3", "smolvlm"):
            views = slice(0, int((given["pixel_values"][row] != 0).flatten(1).any(-1).sum()))
            alone |= {k: given[k][row : row + 1, views] for k in ("pixel_values", "pixel_attention_mask")}
        elif count and name.startswith("qwen"):
            sizes = given["image_grid_thw"].prod(-1)
            alone["pixel_values"] = given["pixel_values"].split(sizes.tolist())[mine.start]
            assert count == 1
            alone["image_grid_thw"] = given["image_grid_thw"][mine]
        elif count:
            alone |= {k: given[k][mine] for k in ("pixel_values", "image_sizes") if k in given}
            if "batch_num_images" in given:
                alone["batch_num_images"] = given["batch_num_images"][row : row + 1]
        found.append(alone)
    return found


def test_every_method_is_here() -> None:
    assert {name for name, cls in steer.methods().items() if cls.needs_pictures} == set(CASES)


@every_method
@every_model
@pytest.mark.parametrize("shape", SHAPES)
def test_the_edit_is_visible_and_comes_off(case: str, name: str, shape: str) -> None:
    model, given = model_of(name), inputs(name, SHAPES[shape])
    plain, tokens = model(**given).logits, written(model, given)
    before = snapshot(model)
    handle = steer.apply(model, CASES[case][0](model))
    edited = model(**given).logits
    pictured = (given["input_ids"] == IMAGE).any(-1)
    for row in range(len(plain)):
        if pictured[row]:
            assert not torch.allclose(edited[row][real(given)[row]], plain[row][real(given)[row]], atol=1e-6)
        else:
            assert torch.equal(edited[row], plain[row])
    assert torch.isfinite(edited[real(given)]).all()
    text = written(model, given)[~pictured]
    assert torch.equal(text, tokens[~pictured])
    assert handle.summary()
    handle.remove()
    assert_same(before, model)
    assert torch.equal(model(**given).logits, plain)
    assert torch.equal(written(model, given), tokens)


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "beams": {"num_beams": 2},
    "static": {"cache_implementation": "static"},
}


@every_method
@every_model
@pytest.mark.parametrize("options", OPTIONS)
def test_neutral_or_inactive_is_identical(case: str, name: str, options: str) -> None:
    model, given = model_of(name), inputs(name, MIXED)
    plain, tokens = model(**given).logits, written(model, given, **OPTIONS[options])
    edits, neutral = (make(model) for make in CASES[case])
    for method in (replace(edits, steps="1000:"), neutral):
        with steer.apply(model, method):
            assert torch.equal(model(**given).logits, plain)
            assert torch.equal(written(model, given, **OPTIONS[options]), tokens)


@every_method
@every_model
def test_text_alone_is_identical(case: str, name: str) -> None:
    model, given = model_of(name), inputs(name, [*WITHOUT, [7]])
    plain, tokens = model(**given).logits, written(model, given)
    beams = written(model, given, num_beams=2)
    with steer.apply(model, CASES[case][0](model)):
        assert torch.equal(model(**given).logits, plain)
        assert torch.equal(written(model, given), tokens)
        assert torch.equal(written(model, given, num_beams=2), beams)


@every_method
@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(case: str, name: str, side: str) -> None:
    model, given = copy.deepcopy(model_of(name)).double(), inputs(name, MIXED, side)
    with steer.apply(model, CASES[case][0](model)):
        both = model(**given).logits
        for row, alone in enumerate(rows_alone(name, MIXED, given)):
            one = model(**alone).logits[0]
            torch.testing.assert_close(both[row][real(given)[row]], one, rtol=0, atol=1e-5)


@every_method
@every_model
def test_a_batch_generates_as_single_rows(case: str, name: str) -> None:
    model, given = copy.deepcopy(model_of(name)).double(), inputs(name, MIXED)
    with steer.apply(model, CASES[case][0](model)):
        both = written(model, given)
        single = [written(model, alone) for alone in rows_alone(name, MIXED, given)]
    assert torch.equal(both, torch.cat(single))


@every_method
@some_models
@pytest.mark.parametrize("beams", [1, 3])
def test_caches_of_fixed_size_give_the_same(case: str, name: str, beams: int) -> None:
    model, given = model_of(name), inputs(name, MIXED)
    with steer.apply(model, CASES[case][0](model)):
        wanted = written(model, given, num_beams=beams)
        assert torch.equal(written(model, given, num_beams=beams, cache_implementation="static"), wanted)


@every_method
@two_models
@torch.no_grad()
def test_a_forward_with_free_slots_in_its_cache(case: str, name: str) -> None:
    """Without a mask: what is behind the prompt is hidden all the same."""
    model, given = model_of(name), inputs(name, ONE)
    del given["attention_mask"]
    room = StaticCache(config=model.config, max_cache_len=given["input_ids"].shape[1] + 7)
    with steer.apply(model, CASES[case][0](model)):
        wanted = model(**given).logits
        assert (model(**given, past_key_values=room, use_cache=True).logits - wanted).abs().max() <= 1e-5


@every_method
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_assisted_decoding_writes_the_same(case: str, name: str) -> None:
    """The first candidates come with the prompt, others after it, and some are taken back."""
    model, given = copy.deepcopy(model_of(name)).double(), inputs(name, ONE)
    given = {key: value.double() if value.is_floating_point() else value for key, value in given.items()}
    given["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])  # what a look-up finds
    lookup = {"prompt_lookup_num_tokens": 3, "max_matching_ngram_size": 1}
    options = {"max_new_tokens": 16, "min_new_tokens": 16}
    with steer.apply(model, CASES[case][0](model)) as handle:
        wanted = greedy(model, given, **options)
        before = handle.stats["forwards"]
        assert torch.equal(greedy(model, given, **options, **lookup), wanted)
        assert handle.stats["forwards"] - before <= 16
        parts = model.generate(**given, **options, do_sample=False, output_logits=True, return_dict_in_generate=True)
        ahead = model.generate(
            **given, **options, **lookup, do_sample=False, output_logits=True, return_dict_in_generate=True
        )
    assert max((a - b).abs().max() for a, b in zip(parts.logits, ahead.logits, strict=True)) <= 1e-5


@every_method
@some_models
def test_copies_of_rows_are_edited_as_the_row(case: str, name: str) -> None:
    """Copies as beams have them: sampling the likeliest token in each copy is greedy."""
    model, given = model_of(name), inputs(name, MIXED)
    with steer.apply(model, CASES[case][0](model)):
        wanted = written(model, given)
        copies = written(model, given, do_sample=True, top_k=1, num_return_sequences=2)
    assert torch.equal(copies, wanted.repeat_interleave(2, 0))


@every_method
@two_models
def test_beams_without_a_cache(case: str, name: str) -> None:
    """Every forward has all pictures once, and beams that differ after them."""
    model, given = model_of(name), inputs(name, BATCH)
    with steer.apply(model, CASES[case][0](model)):
        found = written(model, given, num_beams=2, use_cache=False)
        alone = [written(model, one, num_beams=2, use_cache=False) for one in rows_alone(name, BATCH, given)]
    assert torch.equal(found, torch.cat(alone))


@every_method
@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_decoding_that_generate_compiles(case: str, name: str) -> None:
    torch._dynamo.reset()
    model, given = model_of(name), inputs(name, MIXED)
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise transformers compiles on GPUs alone
    graphs = []

    def keep(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph

    with steer.apply(model, CASES[case][0](model)):
        wanted = written(model, given, cache_implementation="static")
        config.backend = keep
        compiled = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
        assert torch.equal(written(model, given, **compiled), wanted)
        first = len(graphs)
        assert torch.equal(written(model, given, **compiled), wanted)
    assert first == len(graphs) == 1


@every_method
@two_models
def test_saved_and_loaded_is_the_same(case: str, name: str, tmp_path: Any) -> None:
    model, given = model_of(name), inputs(name)
    method = CASES[case][0](model)
    with steer.apply(model, method):
        wanted, tokens = model(**given).logits, written(model, given)
    method.save(str(tmp_path))
    with steer.apply(model, steer.load(str(tmp_path))):
        assert torch.equal(model(**given).logits, wanted)
        assert torch.equal(written(model, given), tokens)


@pytest.mark.parametrize("first", CASES)
@pytest.mark.parametrize("second", [*CASES, "ACT", "StreamingLLM"])
def test_two_methods_share_a_site_or_are_refused(first: str, second: str) -> None:
    model, given = model_of("llava"), inputs("llava")
    plain = model(**given).logits
    a, b = CASES[first][0](model), {**CASES, **LANGUAGE}[second][0](model)
    with steer.apply(model, a):
        alone = model(**given).logits
        if a.stage == b.stage == "kernel" or first == second:
            with pytest.raises(steer.CompositionError, match=type(b).__name__):
                steer.apply(model, b)
        else:
            with steer.apply(model, b):
                assert not torch.equal(model(**given).logits, alone)
                written(model, given)
        assert torch.equal(model(**given).logits, alone)
    assert torch.equal(model(**given).logits, plain)


@every_method
@pytest.mark.parametrize(
    ("name", "base"),
    [
        *((name, "eager") for name in ("llava", "llava_next", "qwen2_5_vl", "idefics3", "paligemma")),
        *((name, "flex_attention") for name in ("llava", "idefics3", "paligemma")),  # Qwen's cannot
    ],
)
def test_other_backends(case: str, name: str, base: str) -> None:
    model, given = copy.deepcopy(model_of(name)), inputs(name, MIXED)
    with steer.apply(model, CASES[case][0](model)):
        wanted = model(**given).logits
    model.set_attn_implementation({"text_config": base})
    with steer.apply(model, CASES[case][0](model)):
        got = model(**given).logits
    torch.testing.assert_close(got[real(given)], wanted[real(given)], rtol=0, atol=1e-5)


@every_method
@two_models
def test_gradients(case: str, name: str) -> None:
    """They reach the pictures through the edit, and are others than without."""
    model, given = model_of(name), inputs(name, ONE)

    def gradient() -> Tensor:
        pixels = given["pixel_values"].clone().requires_grad_()
        model(**{**given, "pixel_values": pixels}, use_cache=False).logits[0, -1, 5].backward()
        assert pixels.grad is not None
        return pixels.grad

    plain = gradient()
    with steer.apply(model, CASES[case][0](model)):
        edited = gradient()
    assert torch.isfinite(edited).all()
    assert edited.any()
    assert not torch.allclose(edited, plain, rtol=1e-4, atol=0)


@every_method
@pytest.mark.parametrize("name", ["llava", "llava_next"])
def test_gradients_through_checkpointed_layers(case: str, name: str) -> None:
    """Layers that are computed again are edited at the same tokens, in prompts that end with padding too."""
    model, given = copy.deepcopy(model_of(name)).train(), inputs(name, MIXED, "right")
    found = []
    with steer.apply(model, CASES[case][0](model)):
        for checkpointing in (False, True):
            if checkpointing:
                model.activation_checkpointing_enable({"use_reentrant": False})
            pixels = given["pixel_values"].clone().requires_grad_()
            logits = model(**{**given, "pixel_values": pixels}, use_cache=False).logits
            logits[real(given)].square().sum().backward()
            found.append(pixels.grad)
    assert found[0].any()
    assert torch.allclose(found[0], found[1], rtol=1e-4, atol=1e-6 * float(found[0].abs().max()))


@every_method
def test_models_without_pictures_are_refused(case: str) -> None:
    model = build(LANGUAGE_MODELS["llama"])
    before = snapshot(model)
    with pytest.raises(steer.CompositionError, match=f"{case} cannot run on .*: it takes no pictures"):
        steer.apply(model, CASES[case][0](model))
    assert_untouched(before, model)


def scores(model: Any) -> Plan:
    names = tuple(site.name for site in steer.sites(model) if site.kind == "causal")
    score = torch.rand(1, len(names), 4, generator=torch.Generator().manual_seed(0))
    return Plan(sites=names, heads=4, tensors={"score": score, "trials": score.clone()})


LANGUAGE: dict[str, tuple[Callable[[Any], Method], None]] = {
    "ACT": (lambda model: steer.ACT(alpha=1.0, beta=0.2, layers="*"), None),
    "StreamingLLM": (lambda model: steer.StreamingLLM(n_sink=2, n_recent=5), None),
    "RetrievalHeads": (lambda model: steer.RetrievalHeads(plan=scores(model), k=6), None),
    "DuoAttention": (lambda model: steer.DuoAttention(plan=scores(model), share=0.5, sink=2, recent=5), None),
    "MoA": (lambda model: steer.MoA.uniform(model, 0.25, n_sink=1, block_size=4), None),
}


@pytest.mark.parametrize("case", LANGUAGE)
@every_model
def test_methods_for_language_models(case: str, name: str) -> None:
    model, given = model_of(name), inputs(name)
    plain, tokens = model(**given).logits, written(model, given)
    before = snapshot(model)
    if name == "paligemma" and case in ("StreamingLLM", "DuoAttention", "MoA"):  # windows look back alone
        with pytest.raises(steer.CompositionError, match="all tokens of its prompt see each other"):
            steer.apply(model, LANGUAGE[case][0](model))
        assert_same(before, model)
        return
    with steer.apply(model, LANGUAGE[case][0](model)):
        edited = model(**given).logits[real(given)]
        assert torch.isfinite(edited).all()
        assert not torch.allclose(edited, plain[real(given)], atol=1e-4)
        written(model, given)
    assert_same(before, model)
    assert torch.equal(model(**given).logits, plain)
    assert torch.equal(written(model, given), tokens)
