"""ACT against the card's formula on the whole map, entry by entry; at prompts, at decode, and its search of heads."""

from __future__ import annotations

import json
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import pytest
import torch
from dense import dense_attention
from tiny import VOCABULARY, build
from tiny_language import MODELS, NEW, SMALL, greedy, inputs
from torch import Tensor
from transformers import CompileConfig, DynamicCache, StaticCache, VaultGemmaConfig, VaultGemmaForCausalLM
from typer.testing import CliRunner

import steer
from steer import ACT
from steer.act_search import HeadSearch
from steer.cli import app
from steer.methods.act import calibrated
from steer_kernels import partial
from steer_patches.site import Call, Site

EXACT = 1e-10
VISIBLE = 1e-3
PLAIN = [name for name in MODELS if name != "gemma2"]  # that one soft-caps its scores
SITES = ["model.layers.0.self_attn", "model.layers.1.self_attn"]


def by_entries(weights: Tensor, beta: float, threshold: float, keep_first: int) -> tuple[Tensor, list[int]]:
    """The card's edit of one causal map (S, S), entry by entry, and the sinks."""
    rows, tokens = weights.tolist(), len(weights)
    means = [sum(rows[q][k] for q in range(k, tokens)) / (tokens - k) for k in range(tokens)]
    sinks = [k for k in range(keep_first, tokens) if means[k] > threshold]
    edited = weights.clone()
    for q in range(tokens):
        on_sinks = sum(rows[q][k] for k in sinks)
        rest = sum(rows[q][k] for k in range(tokens) if k not in sinks)
        for k in range(tokens):
            if rest > 0:
                edited[q, k] = beta * rows[q][k] if k in sinks else rows[q][k] * (1 + (1 - beta) * on_sinks / rest)
    return edited, sinks


def planted(
    tokens: int, at: list[int], strength: float, dtype: torch.dtype = torch.float64, heads: int = 4, kv_heads: int = 2
) -> Call:
    """A causal call whose keys `at` get more of every query's attention the stronger they are."""
    g = torch.Generator().manual_seed(tokens)
    draw = lambda h: torch.randn(2, h, tokens, 16, generator=g, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(heads), draw(kv_heads), draw(kv_heads)
    query[..., 0] = 4 * query[..., 0].abs() + 1
    key[:, :, at, 0] += strength
    site = Site("layer", 0, "causal", heads, kv_heads, 16, "sdpa")
    return Call(query.to(dtype), key.to(dtype), value.to(dtype), None, 0.5, True, site, 0)


def softmax_of(call: Call, dtype: torch.dtype = torch.float64) -> Tensor:
    """The whole causal map, (B, H, S, S)."""
    key, _ = call.expanded()
    scores = call.softmax_scale * call.query.to(dtype) @ key.to(dtype).mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1)
    return scores.masked_fill(later, -torch.inf).softmax(-1)


@pytest.fixture(params=[3, 256], ids=["short pieces", "one piece"])
def pieces(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(calibrated.__globals__, "ROWS", request.param)


@pytest.mark.usefixtures("pieces")
@pytest.mark.parametrize("strength", [0.0, 1.0, 4.0, 40.0])
@pytest.mark.parametrize("settings", [{}, {"threshold": 0.1}, {"beta": 0.0}, {"keep_first": 0}, {"alpha": 2.0}])
def test_equals_the_formula_by_entries(settings: dict[str, Any], strength: float) -> None:
    """Also where, at strength 40, all of the mass that numbers can hold is on the sinks."""
    call, method = planted(23, [0, 5, 6, 19], strength), ACT(**settings)
    out, sinks = method.edited(call)
    weights, (_, value) = softmax_of(call), call.expanded()
    threshold = method.alpha / 23 if method.threshold is None else method.threshold
    damped = 0
    for b in range(2):
        for h in range(4):
            edited, expected = by_entries(weights[b, h], method.beta, threshold, method.keep_first)
            assert sinks[b, h].nonzero().flatten().tolist() == expected
            assert (out[b, h] - edited @ value[b, h]).abs().max() <= EXACT
            damped += len(expected)
    assert damped


@pytest.mark.parametrize("strength", [2.0, 4.0, 8.0, 16.0])
def test_float32_is_as_exact_as_the_map(strength: float) -> None:
    """Rows with from half to all but e-30 of their mass on sinks; the map in float32 is the measure."""
    call = planted(600, [0, 7, 300, 550], strength, torch.float32)
    out, sinks = ACT(threshold=0.05).edited(call)
    _, value = call.expanded()

    def edited(weights: Tensor) -> Tensor:
        others = weights.masked_fill(sinks[:, :, None], 0.0)
        rest = others.sum(-1, keepdim=True)
        return torch.where(rest > 0, 0.4 * weights + 0.6 * others / rest, weights) @ value.to(weights.dtype)

    truth = edited(softmax_of(call))
    eager = (edited(softmax_of(call, torch.float32)) - truth).norm()
    assert sinks.sum() >= 16
    assert (out - truth).norm() <= 8 * eager  # subtracting costs up to three of 24 bits, and saves a pass


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_the_map(dtype: torch.dtype) -> None:
    call = planted(300, [0, 7, 150], 2.0, dtype)
    out, sinks = ACT(threshold=0.05).edited(call)
    exact = call.replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
    truth, _ = ACT(threshold=0.05).edited(exact, sinks=sinks)
    key, value = call.expanded()
    later = torch.ones(300, 300, dtype=torch.bool).triu(1)
    weights = (call.query @ key.mT * 0.5).masked_fill(later, -torch.inf).softmax(-1, dtype=torch.float32).to(dtype)
    others = weights.masked_fill(sinks[:, :, None], 0.0)
    rest = others.sum(-1, keepdim=True)
    eager = torch.where(rest > 0, 0.4 * weights + 0.6 * others / rest, weights) @ value
    assert out.dtype == dtype
    assert (out - truth).norm() <= 1.5 * (eager - truth).norm()


def test_mass_of_sinks_is_scaled_and_rows_sum_to_one() -> None:
    """With values that say "sink" and "one"."""
    call = planted(60, [0, 9, 30], 3.0)
    _, sinks = ACT().edited(call, torch.arange(4))
    value = torch.zeros(2, 4, 60, 16, dtype=torch.float64)
    value[..., 0] = sinks.double()
    value[..., 1] = 1.0
    key, _ = call.expanded()
    call = call.replace(key=key, value=value)
    out, again = ACT().edited(call)
    before, _ = partial(call.query, key, value, is_causal=True, scale=0.5)
    assert torch.equal(again, sinks)
    assert torch.allclose(out[..., 1], torch.ones(()).double(), atol=1e-12)
    some = before[..., 0] < 1 - 1e-12
    assert torch.allclose(out[..., 0][some], 0.4 * before[..., 0][some], atol=1e-12)


@pytest.mark.parametrize("name", ["llama", "qwen2"])
@pytest.mark.parametrize("base", ["sdpa", "eager"])
@pytest.mark.parametrize("padded", [False, True])
@torch.no_grad()
def test_heads_that_are_not_chosen_stay_bit_identical(name: str, base: str, padded: bool) -> None:
    call = planted(40, [0, 9], 3.0, torch.float32)
    heads = torch.tensor([False, True, False, True])[:, None, None]
    method = ACT(threshold=0.05)
    whole, sinks = method.edited(call)
    some, of_some = method.edited(call, heads.flatten().nonzero().flatten())
    assert torch.allclose(some, whole[:, 1::2], atol=1e-6) and torch.equal(of_some, sinks[:, 1::2])
    model = build(MODELS[name])
    model.set_attn_implementation(base)
    kwargs = inputs() if padded else {"input_ids": inputs()["input_ids"]}
    outputs: dict[bool, list[Tensor]] = {False: [], True: []}
    for steered in (False, True):
        module = model.get_submodule(SITES[0] + ".o_proj")
        hook = module.register_forward_pre_hook(lambda _, args, to=outputs[steered]: to.append(args[0]))
        if steered:
            with steer.apply(model, ACT(heads={SITES[0]: [1, 3]}, threshold=0.01)):
                model(**kwargs)
        else:
            model(**kwargs)
        hook.remove()
    before, after = (outputs[steered][0].unflatten(-1, (4, 8)) for steered in (False, True))
    assert torch.equal(before[:, :, 0::2], after[:, :, 0::2])
    assert (before - after)[:, 1:, 1::2].abs().max() > VISIBLE


def edit_of(
    method: ACT, valid: Tensor | None = None, prompt: int | None = None, window: int | None = None
) -> Callable[[Tensor, Tensor], Tensor]:
    """The card's edit for whole batches of maps: sinks of the first `prompt` tokens, or of all; `valid` are real."""

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        first = weights.shape[-1] if prompt is None else prompt
        real = torch.ones(weights.shape[0], first, dtype=torch.bool) if valid is None else valid[:, :first]
        part = weights[:, :, :first, :first] * real[:, None, :, None]
        seen = ((scores[:, :, :first, :first] > -torch.inf) & real[:, None, :, None]).sum(2)
        mean = part.sum(2) / seen.clamp(min=1)
        tokens = real.sum(-1)[:, None, None]
        tokens = tokens if window is None else tokens.clamp(max=window)
        sinks = mean > (method.alpha / tokens if method.threshold is None else method.threshold)
        start = real.int().argmax(-1)
        for row, begin in enumerate(start.tolist()):
            sinks[row, :, begin : begin + method.keep_first] = False
        sinks = torch.nn.functional.pad(sinks, (0, weights.shape[-1] - first))[:, :, None]
        on_sinks = (weights * sinks).sum(-1, keepdim=True)
        rest = (weights * ~sinks).sum(-1, keepdim=True)
        more = 1 + (1 - method.beta) * on_sinks / rest.clamp(min=1e-300)
        return torch.where(rest > 0, weights * torch.where(sinks, method.beta, more), weights)

    return edit


def windows_of(model: Any) -> dict[str, int | None]:
    return {site.name: site.window for site in steer.sites(model)}


def dense_logits(model: Any, method: ACT, kwargs: dict[str, Any], prompt: int | None = None) -> Tensor:
    """The model through edited maps; layers with a window one after another, with the threshold of theirs."""
    mask = kwargs.get("attention_mask")
    valid = None if mask is None else mask.bool()
    with ExitStack() as stack:
        for name, window in windows_of(model).items():
            stack.enter_context(dense_attention(model, [name], edit_of(method, valid, prompt, window)))
        return model(**kwargs, use_cache=False).logits


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("side", ["left", "right", None])
@pytest.mark.parametrize("settings", [{"alpha": 1.2}, {"threshold": 0.12, "keep_first": 2}])
def test_model_equals_the_map(name: str, side: str | None, settings: dict[str, Any]) -> None:
    model = build(MODELS[name]).double()
    kwargs = inputs(side or "left")
    if side is None:
        del kwargs["attention_mask"]
    method = ACT(dense_layers=0, **settings)
    real = kwargs.get("attention_mask", torch.ones(2, 11)).bool()
    expected = dense_logits(model, method, kwargs)
    plain = model(**kwargs).logits
    with steer.apply(model, method):
        for cached in (True, False):
            found = model(**kwargs, use_cache=cached).logits
            assert (found - expected)[real].abs().max() <= EXACT
    assert torch.equal(model(**kwargs).logits, plain)
    assert (plain - expected)[real].abs().max() > VISIBLE


@pytest.mark.parametrize("base", ["eager", "flex_attention"])
def test_other_implementations(base: str) -> None:
    model = build(MODELS["qwen3"])
    method, kwargs = ACT(dense_layers=0, threshold=0.12), inputs()
    with steer.apply(model, method):
        expected = model(**kwargs).logits
    model.set_attn_implementation(base)
    with steer.apply(model, method):
        found = model(**kwargs).logits
    real = kwargs["attention_mask"].bool()
    assert torch.allclose(found[real], expected[real], atol=1e-5)


@pytest.mark.parametrize("name", PLAIN)
@pytest.mark.parametrize("padded", [False, True])
@pytest.mark.parametrize("heads", [None, [0, 3]])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
def test_decode_attends_with_the_sinks_of_the_prompt(
    name: str, padded: bool, heads: list[int] | None, cache: str
) -> None:
    """Token by token and several at a time, past the window too, against one map of the whole text."""
    model = build(MODELS[name]).double()
    mask = inputs()["attention_mask"] if padded else torch.ones(2, 11, dtype=torch.int64)
    ids = torch.cat([inputs()["input_ids"], torch.randint(3, VOCABULARY, (2, 6))], 1)
    mask = torch.cat([mask, torch.ones(2, 6, dtype=torch.int64)], 1)
    method = ACT(dense_layers=0, threshold=0.12, heads=heads)
    whole = edit_of(method, mask.bool(), 11)

    def only_chosen(scores: Tensor, weights: Tensor) -> Tensor:
        edited = whole(scores, weights)
        if heads is None:
            return edited
        return torch.where(torch.isin(torch.arange(4), torch.tensor(heads))[:, None, None], edited, weights)

    with dense_attention(model, SITES, only_chosen):
        expected = model(ids, attention_mask=mask, use_cache=False).logits
    known = DynamicCache(config=model.config) if cache == "dynamic" else StaticCache(model.config, max_cache_len=20)
    if cache == "static" and name in ("mistral_window", "qwen2", "gemma3"):
        pieces = [(0, 11), (11, 12), (12, 13), (13, 14)]  # its windows take one token at a time
    else:
        pieces = [(0, 11), (11, 12), (12, 15), (15, 16), (16, 17)]
    with steer.apply(model, method):
        for start, stop in pieces:
            found = model(ids[:, start:stop], attention_mask=mask[:, :stop], past_key_values=known).logits
            real = mask[:, start:stop].bool()
            assert (found - expected[:, start:stop])[real].abs().max() <= EXACT, (start, stop)


def test_padded_batch_equals_single_runs() -> None:
    model = build(MODELS["llama"]).double()
    with steer.apply(model, ACT(dense_layers=0, alpha=1.2)):
        together = greedy(model)
        for row, mask in enumerate(inputs()["attention_mask"].bool()):
            alone = greedy(model, input_ids=inputs()["input_ids"][row : row + 1, mask], attention_mask=None)
            assert torch.equal(together[row, -NEW:], alone[0, -NEW:])


@pytest.mark.parametrize("name", ["llama", "qwen2"])
def test_assisted_decoding_and_beams(name: str) -> None:
    """Candidates that are refused leave the cache, and beams change places in it; the first candidates are prompt."""
    model, assistant = build(MODELS[name]).double(), build(MODELS[name]).double()
    one = {"input_ids": inputs()["input_ids"][:1], "attention_mask": None}
    with steer.apply(model, ACT(dense_layers=0, threshold=0.12)):
        assisted = greedy(model, **one, assistant_model=assistant)
        beams = greedy(model, num_beams=3)
        ids = torch.cat([inputs()["input_ids"][:1]] * 2)
        both = greedy(model, input_ids=ids, attention_mask=None, num_beams=3)
        assert torch.equal(both[0], both[1])
    assert beams.shape == (2, 11 + NEW)
    assert assisted.shape == (1, 11 + NEW)


def test_cropped_prompts_keep_the_sinks_that_are_left() -> None:
    model = build(MODELS["llama"]).double()
    ids, cache = inputs()["input_ids"][:1], DynamicCache()
    with steer.apply(model, ACT(dense_layers=0, threshold=0.05)):
        model(ids, past_key_values=cache)
        cache.crop(4 - cache.get_seq_length())
        again = model(ids[:, 4:], past_key_values=cache)
    assert torch.isfinite(again.logits).all()
    assert cache.get_seq_length() == 11


def test_applied_in_mid_sequence_waits() -> None:
    model = build(MODELS["llama"])
    ids = inputs()["input_ids"][:1]
    for steered in (False, True):
        cache = DynamicCache()
        model(ids[:, :8], past_key_values=cache)
        if not steered:
            plain = model(ids[:, 8:], past_key_values=cache).logits
            continue
        with steer.apply(model, ACT(dense_layers=0, threshold=0.05)):
            assert torch.equal(model(ids[:, 8:], past_key_values=cache).logits, plain)


@pytest.mark.parametrize("heads", [None, [0, 3]])
def test_compiled_decode(heads: list[int] | None) -> None:
    model = build(MODELS["llama"])
    with steer.apply(model, ACT(dense_layers=0, threshold=0.12, heads=heads)):
        plain = greedy(model, cache_implementation="static", disable_compile=True)
        torch._dynamo.reset()
        options = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
        options._compile_all_devices = True
        compiled = greedy(model, cache_implementation="static", compile_config=options)
    assert torch.equal(compiled, plain)


def test_neutral_settings_and_default_layers() -> None:
    model = build(MODELS["llama"])
    before = model(**inputs()).logits
    for method in (ACT(beta=1.0, dense_layers=0), ACT(heads=[]), ACT(heads={})):
        with steer.apply(model, method) as handle:
            assert not handle.bindings
            assert torch.equal(model(**inputs()).logits, before)
    with pytest.raises(ValueError, match="leaves ACT no layer"):  # the two layers of this model are the first two
        steer.apply(model, ACT())
    for method in (ACT(layers="model.layers.1"), ACT(heads={SITES[1]: [0]}), ACT(dense_layers=1)):
        with steer.apply(model, method) as handle:
            assert [site.name for site in handle.sites] == SITES[1:]


def test_refuses_what_is_no_plain_softmax() -> None:
    with pytest.raises(steer.CompositionError, match="Gemma 2: it caps its attention scores"):
        steer.apply(build(MODELS["gemma2"]), ACT(dense_layers=0))
    capped = VaultGemmaConfig(**SMALL, query_pre_attn_scalar=8, attn_implementation="eager")  # a family without a file
    model = build(lambda: VaultGemmaForCausalLM(capped))
    with (
        steer.apply(model, ACT(dense_layers=0)),
        pytest.raises(ValueError, match=r"layers\.0\.self_attn also has softcap"),
    ):
        model(**inputs())
    model = build(MODELS["llama"])
    model.config.attention_dropout = 0.5
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    with steer.apply(model, ACT(dense_layers=0)), pytest.raises(ValueError, match=r"dropout=0\.5.*model\.eval"):
        model(**inputs())


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"beta": 1.5}, "share that sinks keep"),
        ({"alpha": 0.0}, "above 0"),
        ({"threshold": 1.0}, "mean probability"),
        ({"threshold": 0.1, "alpha": 4.0}, "either replaces the other"),
        ({"keep_first": -1}, "must not be negative"),
    ],
)
def test_bad_settings(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        ACT(**settings)


def task(count: int, seed: int = 0, long: bool = False) -> list[dict[str, Any]]:
    """Random prompts with random choices: of one token, or of up to three."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda n: torch.randint(3, VOCABULARY, (n,), generator=g)  # noqa: E731
    return [
        {
            "input_ids": draw(8 + i % 3)[None],
            "choices": [draw(1 + (c % 3 if long else 0)).tolist() for c in range(3)],
            "label": i % 3,
        }
        for i in range(count)
    ]


def scored(model: Any, sample: dict[str, Any]) -> Tensor:
    """Log-probability of each choice, one at a time."""
    scores = []
    for choice in sample["choices"]:
        tokens = torch.cat([sample["input_ids"], torch.tensor([choice])], 1)
        logs = model(tokens[:, :-1], use_cache=False).logits.log_softmax(-1)[0, -len(choice) :]
        scores.append(logs[torch.arange(len(choice)), choice].sum())
    return torch.stack(scores)


@pytest.mark.parametrize("long", [False, True], ids=["one token", "several tokens"])
@pytest.mark.parametrize("name", ["llama", "qwen2", "gemma3"])
@pytest.mark.parametrize("batch", [3, 256])
def test_batched_trials_equal_single_ones(name: str, long: bool, batch: int) -> None:
    model, samples = build(MODELS[name]).double(), task(4, long=long)
    method = ACT(dense_layers=0, threshold=0.1)
    search = method.search(batch=batch, objective="margin")
    with steer.apply(model, search):
        for sample in samples:
            search.run(model, sample, 0)
    right, margin = torch.zeros(2, 4, dtype=torch.int64), torch.zeros(2, 4, dtype=torch.float64)
    for sample in samples:
        for layer, site in enumerate(SITES):
            for head in range(4):
                with steer.apply(model, ACT(threshold=0.1, heads={site: [head]})):
                    scores = scored(model, sample)
                others = torch.cat([scores[: sample["label"]], scores[sample["label"] + 1 :]])
                right[layer, head] += int(scores.argmax() == sample["label"])
                margin[layer, head] += scores[sample["label"]] - others.max()
    plain = [scored(model, sample) for sample in samples]
    assert search.found.sites == SITES
    assert torch.equal(search.found.right, right)
    assert torch.allclose(search.found.margin, margin, atol=1e-9)
    assert len(margin.unique()) == 8
    assert search.found.plain_right == sum(int(s.argmax() == x["label"]) for s, x in zip(plain, samples, strict=True))


@pytest.mark.parametrize("objective", ["accuracy", "margin"])
def test_search_keeps_the_heads_that_help(objective: str, tmp_path: Any) -> None:
    model, samples = build(MODELS["llama"]), task(12)
    method = ACT(dense_layers=0, threshold=0.1, beta=0.0)
    before = model(**inputs()).logits
    fitted = steer.calibrate(model, method, samples, objective=objective, progress=False)
    assert isinstance(fitted, ACT) and fitted.plan is not None
    gain = fitted.plan.tensors[f"{objective}_gain"][0]
    kept = {site: row.nonzero().flatten().tolist() for site, row in zip(SITES, gain > 0, strict=True)}
    assert fitted.heads == {site: heads for site, heads in kept.items() if heads} != {}
    assert (fitted.beta, fitted.threshold) == (0.0, 0.1)
    assert torch.equal(fitted.plan.tensors["kept"][0].bool(), gain > 0)
    assert torch.equal(model(**inputs()).logits, before)
    fitted.save(str(tmp_path))
    loaded = steer.load(str(tmp_path))
    assert loaded.heads == fitted.heads
    with steer.apply(model, fitted):
        expected = model(**inputs()).logits
    with steer.apply(model, loaded):
        assert torch.equal(model(**inputs()).logits, expected)


def test_search_resumes_and_repeats(tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model, samples, method = build(MODELS["llama"]), task(6), ACT(dense_layers=0, threshold=0.1)
    whole = steer.calibrate(model, method, samples, objective="margin", progress=False)
    run, done = HeadSearch.run, []

    def stops(self: HeadSearch, target: Any, sample: Any, seed: int) -> None:
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append(seed)
        run(self, target, sample, seed)

    monkeypatch.setattr(HeadSearch, "run", stops)
    with pytest.raises(KeyboardInterrupt):
        steer.calibrate(model, method, samples, objective="margin", progress=False, checkpoint=tmp_path)
    monkeypatch.setattr(HeadSearch, "run", run)
    resumed = steer.calibrate(model, method, samples, objective="margin", progress=False, checkpoint=tmp_path)
    for name, tensor in whole.plan.tensors.items():  # type: ignore[union-attr]
        assert torch.equal(resumed.plan.tensors[name], tensor)  # type: ignore[union-attr]
    assert resumed.heads == whole.heads


def test_search_of_some_heads_only(tmp_path: Any) -> None:
    pytest.importorskip("matplotlib")
    model = build(MODELS["llama"])
    method = ACT(threshold=0.1, heads={SITES[1]: [0, 2]})
    fitted = steer.calibrate(model, method, task(5), objective="margin", progress=False, report=tmp_path)
    assert fitted.plan is not None and fitted.plan.sites == (SITES[1],)
    assert set(fitted.heads or {}) <= {SITES[1]}
    assert (fitted.plan.tensors["margin_gain"][0, 0, [1]] == 0).all()
    assert "kept" in (tmp_path / "report.md").read_text()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"choices": None}, "has no choices"),
        ({"input_ids": torch.ones(2, 4, dtype=torch.int64)}, r"one prompt \(1, S\)"),
        ({"choices": [[3]]}, "at least two"),
        ({"choices": [[3], []]}, "at least two"),
        ({"label": 3}, "with label 3"),
    ],
)
def test_bad_samples(change: dict[str, Any], message: str) -> None:
    sample = {name: value for name, value in {**task(1)[0], **change}.items() if value is not None}
    with pytest.raises(ValueError, match=message):
        steer.calibrate(build(MODELS["llama"]), ACT(dense_layers=0), [sample], progress=False)


def test_bad_options() -> None:
    with pytest.raises(ValueError, match="choose from accuracy, margin"):
        ACT().search(objective="loss")
    with pytest.raises(ValueError, match="at least 1 trial"):
        ACT().search(batch=0)


def test_bench_writes_every_variant(tmp_path: Any) -> None:
    file = tmp_path / "act.json"
    run = CliRunner().invoke(app, ["bench", "act", "--small", "--repeats", "1", "--output", str(file)])
    assert run.exit_code == 0, run.output
    rows = json.loads(file.read_text())["rows"]
    assert [row["variant"] for row in rows] == ["sdpa", "ACT, 3 of 9 heads", "ACT, 9 heads", "the map, edited"]
    assert all(row["error"] < 1e-4 for row in rows[1:])


@pytest.mark.slow
@torch.no_grad()
def test_pretrained_model_equals_the_map() -> None:
    """All layers of SmolLM2 but the first two, in fp32; nothing about it is tiny but the bound."""
    from steer_demos import models

    try:
        model, tokenizer = models.load("smollm2-135m-instruct")
    except ImportError as error:
        pytest.skip(str(error))
    ids = torch.tensor([tokenizer(topics["if"] + topics["for"]).input_ids[:500]])
    names = [site.name for site in steer.sites(model)][2:]
    plain = model(ids).logits
    for method in (ACT(), ACT(threshold=0.1)):
        with steer.apply(model, method):
            found = model(ids).logits
        with dense_attention(model, names, edit_of(method)):
            expected = model(ids, use_cache=False).logits
        assert (found - expected).abs().max() <= 1e-4
        assert (found - plain).abs().max() > 1


def test_documented_costs() -> None:
    root = Path(__file__).resolve().parents[2]
    rows = json.loads((root / "benchmarks/act-cpu.json").read_text(encoding="utf-8"))["rows"]
    page = (root / "docs/methods/language.md").read_text(encoding="utf-8")
    for tokens in (1024, 2048, 4096):
        cells = []
        for variant in ("ACT, 3 of 9 heads", "ACT, 9 heads", "the map, edited"):
            ratios = [row["over_sdpa"] for row in rows if (row["tokens"], row["variant"]) == (tokens, variant)]
            assert len(ratios) == 4
            cells.append(f"{min(ratios):.2f} to {max(ratios):.2f}")
        assert f"| {tokens} | {' | '.join(cells)} |" in page
