"""DuoAttention: which KV heads keep everything, and that the others see sinks and a window, in prompt and cache."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Edit, dense_attention
from probes import inputs_of
from test_retrieval_heads import LATER, NEEDLE, SCORES, found, later, planted, run
from tiny import FAMILIES, build, token_ids
from torch import Tensor
from transformers import DynamicCache, Gemma2Config, Gemma2ForCausalLM, MistralConfig, MistralForCausalLM

import steer
from steer import DuoAttention, Plan, RetrievalHeads
from steer.methods.duo_attention import read_gates
from steer_patches.windowed_cache import WindowedLayer

# of SCORES, two query heads a KV head: 0.9 and 0.2, 0.2 and 0.3, 0.8 and 0.5
FULL = {1 / 6: {(0, 0)}, 0.5: {(0, 0), (2, 0), (2, 1)}, 0.0: set()}
SINK, RECENT = 2, 4


def windowed(full: set[tuple[int, int]]) -> Edit:
    """Softmax over sinks and window in all KV heads but `full`, (layer, KV head) pairs; rows are padded on the left."""
    layers = iter(range(3))

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        layer, keep = next(layers), torch.ones_like(scores, dtype=torch.bool)
        for row in range(len(scores)):
            pad = int((scores[row, 0, -1] == -torch.inf).sum())
            at = torch.arange(scores.shape[-1]) - pad
            seen = (at[None] < SINK) | (at[:, None] - at[None] < RECENT)
            for head in range(4):
                if (layer, head // 2) not in full:
                    keep[row, head] = seen
        return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)

    return edit


@pytest.mark.parametrize("evict", [True, False])
@pytest.mark.parametrize("share", FULL)
def test_output_is_that_of_the_masked_maps(share: float, evict: bool) -> None:
    """In fp64, a prompt padded on the left and tokens after it, with and without an evicting cache."""
    model: Any = FAMILIES["llama"].build().double()
    inputs = inputs_of(FAMILIES["llama"], model)
    rows, tokens = inputs["input_ids"].shape
    dense = torch.cat(run(model, inputs), 1)
    with steer.apply(model, DuoAttention(plan=SCORES, share=share, sink=SINK, recent=RECENT, evict=evict)) as handle:
        out = torch.cat(run(model, inputs), 1)
        assert 0 < handle.stats["methods"][0]["density"] < 1
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], later(rows)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, LATER, dtype=torch.long)], 1),
    }
    with dense_attention(model, [site.name for site in steer.sites(model)], windowed(FULL[share])):
        wanted = model(**whole, use_cache=False).logits
    keep = whole["attention_mask"].bool()
    assert (out - wanted)[keep].abs().max() <= 1e-10
    assert (dense - wanted)[:, tokens:].abs().max() > 1e-2


@pytest.mark.parametrize("settings", [{"share": 1.0}, {"share": 0.0, "recent": 40}, {"share": 0.5, "recent": 40}])
@pytest.mark.parametrize("evict", [True, False])
def test_all_full_or_nothing_to_drop_is_dense(settings: dict[str, Any], evict: bool) -> None:
    """To the bit; an evicting cache orders the keys of padded rows anew, so that there the sums differ in rounding."""
    model = FAMILIES["llama"].build()
    inputs = inputs_of(FAMILIES["llama"], model)
    full = {"input_ids": inputs["input_ids"][:1], "attention_mask": inputs["attention_mask"][:1]}
    for given, exact in ((full, True), (inputs, not evict)):
        dense = run(model, given)
        with steer.apply(model, DuoAttention(plan=SCORES, **settings, evict=evict)):
            out = run(model, given)
        real = given["attention_mask"].bool()
        assert torch.allclose(out[0][real], dense[0][real], atol=1e-5)
        assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(out[1:], dense[1:], strict=True))
        assert not exact or all(torch.equal(a, b) for a, b in zip(out, dense, strict=True))


def test_memory_is_that_of_the_full_heads_and_the_windows() -> None:
    """4 of 16 KV heads keep 200 tokens and the others 12 + 4: 31 % of the bytes of all heads."""
    shape = {"vocab_size": 64, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 4, "head_dim": 8}
    config = MistralConfig(**shape, num_attention_heads=8, num_key_value_heads=4, sliding_window=None)
    model: Any = build(lambda: MistralForCausalLM(config))
    draw = torch.Generator().manual_seed(0)
    score = torch.rand(1, 4, 8, generator=draw)
    plan = Plan(sites=tuple(site.name for site in steer.sites(model)), heads=8, tensors={"score": score})
    dense = DynamicCache(config=config)
    prompt, more = token_ids(draw, 2, 200), token_ids(draw, 2, 50)
    model(prompt, past_key_values=dense)
    bytes_dense = sum(map(bytes_of, dense.layers))
    assert bytes_dense == 2 * 2 * 16 * 200 * 8 * 4
    with steer.apply(model, DuoAttention(plan=plan, share=0.25, sink=4, recent=12)):
        cache = DynamicCache(config=config)
        model(prompt, past_key_values=cache)
        held = [sum(map(bytes_of, cache.layers))]
        for token in more.split(1, 1):
            model(token, past_key_values=cache)
        held.append(sum(map(bytes_of, cache.layers)))
    per_token = 2 * 2 * 8 * 4
    assert held == [per_token * (4 * 200 + 12 * 16), per_token * (4 * 250 + 12 * 16)]
    assert held[0] / bytes_dense == pytest.approx(0.31)


def bytes_of(layer: Any) -> int:
    if isinstance(layer, WindowedLayer):
        return layer.nbytes
    return sum(x.numel() * x.element_size() for x in (layer.keys, layer.values))


def test_reach_counts_besides_the_score() -> None:
    """The second layer's first KV head, last by its score, becomes the second best; the best mean does not count."""
    model = FAMILIES["llama"].build()
    reach = torch.zeros(1, 3, 4)
    reach[0, 1, 0] = 0.65
    even = torch.zeros(1, 3, 4)
    even[0, 1, 2:] = torch.tensor([0.4, 0.7])  # (0.7, 0.7), the best mean
    plans = {
        name: Plan(sites=SCORES.sites, heads=4, tensors={**SCORES.tensors, "reach": more})
        for name, more in (("reach", reach), ("even", even))
    }
    windows = {}
    for name, given in {"score": SCORES, **plans}.items():
        with steer.apply(model, DuoAttention(plan=given, share=1 / 3)) as handle:
            method = handle.bindings[0].method
            windows[name] = [method.windows(site, 99).window for site in handle.sites]
    all_, none = (None, None), (256, 256)
    assert windows["score"] == windows["even"] == [all_ + none, none + none, all_ + none]
    assert windows["reach"] == [all_ + none, all_ + none, none + none]


def test_layers_with_a_window_of_their_own_have_no_share() -> None:
    """Of Gemma's alternating layers only the second counts, with two KV heads."""
    small = {"vocab_size": 64, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "head_dim": 8}
    config = Gemma2Config(**small, num_attention_heads=4, num_key_value_heads=2, sliding_window=5)
    model = build(lambda: Gemma2ForCausalLM(config))
    sites = steer.sites(model)
    assert [site.window for site in sites] == [5, None]
    score = torch.tensor([[[0.9, 0.9, 0.9, 0.9], [0.1, 0.0, 0.2, 0.0]]])
    plan = Plan(sites=tuple(site.name for site in sites), heads=4, tensors={"score": score})
    with steer.apply(model, DuoAttention(plan=plan, share=0.5, recent=3)) as handle:
        assert handle.bindings[0].method.windows(sites[1], 99).window == (3, 3, None, None)


def test_calibrate_gives_the_plan_of_the_retrieval_heads(tmp_path: Path) -> None:
    model = planted()
    duo: Any = found(model, [NEEDLE], DuoAttention(share=0.5))
    heads = found(model, [NEEDLE], RetrievalHeads())
    assert duo.share == 0.5
    assert all(torch.equal(duo.plan.tensors[name], heads.plan.tensors[name]) for name in ("score", "reach", "trials"))
    duo.save(str(tmp_path))
    loaded: Any = steer.load(tmp_path)
    assert isinstance(loaded, DuoAttention) and torch.equal(loaded.plan.tensors["reach"], duo.plan.tensors["reach"])
    prompt = NEEDLE["input_ids"]
    with steer.apply(model, duo):
        wanted = model.generate(prompt, max_new_tokens=5, do_sample=False)
    with steer.apply(model, loaded):
        assert torch.equal(model.generate(prompt, max_new_tokens=5, do_sample=False), wanted)


def test_the_planted_head_has_to_keep_everything() -> None:
    """One KV head: with it the needle is copied from far back, without it is out of the window."""
    model = planted()
    prompt = NEEDLE["input_ids"]
    plan = found(model, [NEEDLE]).plan
    written = {}
    for share in (1.0, 0.0):
        with steer.apply(model, DuoAttention(plan=plan, share=share, sink=1, recent=3)):
            written[share] = model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :].tolist()
    assert written[1.0] == [10, 11, 12, 13, 14] and 10 not in written[0.0]


def test_published_gates(tmp_path: Path) -> None:
    model, file = FAMILIES["llama"].build(), tmp_path / "full_attention_heads.tsv"
    file.write_text("0.1\t0.9\n0.0\t0.5\n1.0\t0.2\n")
    plan = read_gates(file, model)
    assert torch.equal(plan.tensors["score"][0], torch.tensor([[0.1, 0.9], [0, 0.5], [1, 0.2]]).repeat_interleave(2, 1))
    with steer.apply(model, DuoAttention(plan=plan, share=1 / 3)) as handle:
        windows = [handle.bindings[0].method.windows(site, 99).window for site in handle.sites]
    assert windows == [(256, 256, None, None), (256,) * 4, (None, None, 256, 256)]
    file.write_text("0.1\t0.9\t0.3\n")
    with pytest.raises(ValueError, match=r"has 1 layers of \[3\] KV heads; this LlamaForCausalLM has 3 of \[2\]"):
        read_gates(file, model)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"share": 1.5}, r"in \[0, 1\]"),
        ({"sink": -1}, "0 or more tokens"),
        ({"recent": 0}, "at least 1"),
        ({"plan": Plan(sites=("a",), heads=2)}, "this one holds nothing"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        DuoAttention(**settings)


def test_plans_that_do_not_fit_are_refused() -> None:
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match="DuoAttention has no plan"):
        steer.apply(model, DuoAttention())
    plan = Plan(sites=SCORES.sites, heads=8, tensors={"score": torch.zeros(1, 3, 8)})
    with pytest.raises(ValueError, match="this plan is for sites of 8 heads"):
        steer.apply(model, DuoAttention(plan=plan))
