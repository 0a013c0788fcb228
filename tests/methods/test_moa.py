"""MoA: its measure against finite differences and a plain softmax map, its rules, its search, and its windows."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from probes import assert_untouched, snapshot
from tiny import FAMILIES
from transformers.models.llama.modeling_llama import LlamaRMSNorm

import steer
from steer.sensitivity import Measure, effect_of_windows, hiding_effect, masking_effect, tiles
from steer_patches.site import Call, Next

TOKENS, ANSWER = 24, 5
SMALL: dict[str, Any] = {"n_sink": 3, "block_size": 4}
Maps = Callable[[Call, torch.Tensor], torch.Tensor]


@dataclass(kw_only=True)
class Plain(steer.Method, register=False):
    """Attention by its map, which `change(call, map)` may replace; keeps the maps and what else the tests look at."""

    change: Maps = lambda call, weights: weights
    seen: dict[int, tuple[Call, torch.Tensor, torch.Tensor]] = field(default_factory=dict)

    stage: ClassVar[str] = "kernel"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    default_layers: ClassVar[str] = "*"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        key, value = call.expanded()
        hidden = torch.ones(2 * (call.query.shape[2],), dtype=torch.bool).triu(1)
        weights = (call.query @ key.mT * call.softmax_scale).masked_fill(hidden, -torch.inf).softmax(-1)
        weights = self.change(call, weights)
        out = weights @ value
        self.seen[call.site.layer] = (call, weights, out)
        return out


def llama(dtype: torch.dtype = torch.float64) -> Any:
    return FAMILIES["llama"].build().to(dtype)


def exact_llama() -> Any:
    """With norms in float64, which transformers computes in float32: too coarse for finite differences."""
    model = llama()
    for name, module in list(model.named_modules()):
        if isinstance(module, LlamaRMSNorm):
            norm = torch.nn.RMSNorm(module.weight.shape, eps=module.variance_epsilon, dtype=torch.float64)
            norm.load_state_dict(module.state_dict())
            model.set_submodule(name, norm)
    return model.requires_grad_(True)


def sample(tokens: int = TOKENS, seed: int = 0) -> dict[str, torch.Tensor]:
    ids = torch.randint(3, 60, (1, tokens), generator=torch.Generator().manual_seed(seed))
    labels = ids.clone()
    labels[:, :-ANSWER] = -100
    return {"input_ids": ids, "labels": labels}


def loss_of(model: Any, given: dict[str, torch.Tensor]) -> torch.Tensor:
    """In the precision of the model, where transformers' own loss is fp32."""
    logits = model(input_ids=given["input_ids"], use_cache=False).logits[:, :-1]
    return torch.nn.functional.cross_entropy(logits.flatten(0, 1), given["labels"][:, 1:].flatten())


@contextmanager
def seen_by(model: Any, change: Maps | None = None) -> Iterator[Plain]:
    method = Plain(change=change) if change else Plain()
    with steer.apply(model, method):
        yield method


def blend(layer: int, head: int, query: int, keys: slice, amount: float) -> Maps:
    """Takes one row of a map by `amount` towards itself without some keys, renormalised."""

    def change(call: Call, weights: torch.Tensor) -> torch.Tensor:
        if call.site.layer != layer:
            return weights
        row = weights[0, head, query].clone()
        row[keys] = 0
        weights = weights.clone()
        weights[0, head, query] = torch.lerp(weights[0, head, query], row / row.sum(), amount)
        return weights

    return change


def test_effects_are_derivatives_of_the_loss() -> None:
    """The output goes in a straight line with the blend, so that its derivative is what hiding keys costs."""
    model, given = exact_llama(), sample()
    with seen_by(model) as plain:
        gradients = torch.autograd.grad(loss_of(model, given), [plain.seen[layer][2] for layer in range(3)])
        calls = [plain.seen[layer][0] for layer in range(3)]
    model.requires_grad_(False)

    def slope(layer: int, head: int, query: int, keys: slice) -> float:
        losses = []
        for amount in (1e-4, -1e-4):
            with seen_by(model, blend(layer, head, query, keys, amount)):
                losses.append(loss_of(model, given).item())
        return (losses[0] - losses[1]) / 2e-4

    for layer, head, query, key in [(0, 1, 22, 4), (0, 3, 9, 9), (1, 0, 21, 20), (2, 2, 19, 7), (2, 3, 22, 5)]:
        call = calls[layer]
        (_, *tile), *_ = tiles(call.query, call.key, call.value, gradients[layer], call.softmax_scale)
        single = masking_effect(*tile)[0, head, query, key].item()
        several = hiding_effect(*tile, 3)[0, head, query, key - 1].item()
        assert abs(single) > 1e-6
        assert single == pytest.approx(slope(layer, head, query, slice(key, key + 1)), rel=1e-5)  # eps is 1e-6
        assert several == pytest.approx(slope(layer, head, query, slice(3, key)), rel=1e-5)


@pytest.mark.parametrize("measure", ["rows", "keys"])
def test_the_search_sums_what_gradients_of_the_maps_give(measure: Measure) -> None:
    model, given = llama(), sample()
    search = steer.MoA(**SMALL).search(measure=measure)
    with steer.apply(model, search):
        search.run(model, given, 0)
    model.requires_grad_(True)
    with seen_by(model) as plain:
        loss = model(**given).loss
        maps = [plain.seen[layer][1] for layer in range(3)]
        gradients = torch.autograd.grad(loss, maps)
    for weights, gradient, found in zip(maps, gradients, search.found.sums.values(), strict=True):
        weights, gradient = weights.detach()[0], gradient[0]
        product = weights * (gradient - (weights * gradient).sum(-1, keepdim=True))
        for window in (1, 7, TOKENS - 5):
            wanted = torch.zeros(4, dtype=torch.float64)
            for query in range(TOKENS):
                hidden = slice(3, max(query - window + 1, 3))
                if measure == "rows":
                    left = 1 - weights[:, query, hidden].sum(-1) + 1e-6
                    wanted += (product[:, query, hidden].sum(-1) / left).square()
                else:
                    wanted += (product / (1 - weights + 1e-6))[:, query, hidden].abs().sum(-1)
            assert torch.allclose(found[TOKENS][:, window], wanted, rtol=1e-9, atol=0)
        assert not found[TOKENS][:, TOKENS - 3 :].any()


def test_a_query_with_one_key_counts_what_the_key_gives() -> None:
    weights = torch.tensor([[1.0, 0.0], [0.25, 0.75]])
    gradient = torch.tensor([[3.0, 5.0], [1.0, 2.0]])
    effect = masking_effect(weights, gradient)
    assert effect[0].tolist() == [3.0, 0.0]
    assert effect[1].tolist() == pytest.approx([0.25, -0.75], rel=1e-5)


@pytest.mark.parametrize("measure", ["rows", "keys"])
def test_tiles_do_not_change_the_sums(measure: Measure) -> None:
    g = torch.Generator().manual_seed(0)
    query, gradient = (torch.randn(2, 4, 19, 8, generator=g, dtype=torch.float64) for _ in range(2))
    key, value = (torch.randn(2, 2, 19, 8, generator=g, dtype=torch.float64) for _ in range(2))
    whole, tiled = (
        effect_of_windows(query, key, value, gradient, 0.5, n_sink=2, measure=measure, rows=rows) for rows in (19, 5)
    )
    assert torch.allclose(whole[:, 1:], tiled[:, 1:], rtol=1e-12, atol=1e-12)


def test_capped_logits_give_the_probabilities_of_capped_logits() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value, gradient = (torch.randn(1, 2, 9, 8, generator=g, dtype=torch.float64) for _ in range(4))
    ((_, weights, slope),) = tiles(query, key, value, gradient, 0.5, softcap=2.0)
    scores = 2 * torch.tanh(0.5 * query @ key.mT / 2)
    assert torch.allclose(weights, scores.masked_fill(torch.ones(9, 9).triu(1).bool(), -torch.inf).softmax(-1))
    assert torch.allclose(slope, gradient @ value.mT)


def test_windows_follow_the_rule() -> None:
    model = llama()
    rules = {"alphas": [[0, -8, 0, 4]] * 3, "betas": [[0.5, 1, 1, 0]] * 3}
    moa = steer.MoA.published(model, rules, **SMALL)
    site = next(site for site in steer.sites(model) if site.kind == "causal")
    # 0.5 * 30 = 15 -> 16; 30 - 8 = 22 -> 24; everything; 4 -> two blocks, 8; the three sinks are among them
    assert moa.windows(site, 30).pairs == ((3, 13), (3, 21), (0, None), (3, 5))
    assert moa.kept_share(30) == pytest.approx((16 + 24 + 30 + 8) / 4 / 30)


def test_each_head_sees_its_window_only() -> None:
    model, given = exact_llama().requires_grad_(False), sample(40)
    alphas = [[0, 0, 8, 4], [0, 12, 0, 0], [16, 16, 8, 8]]
    betas = [[0.5, 1, 0.25, 0], [0.25, 0.5, 1, 0.75], [0, 0.25, 0.5, 0.125]]
    with steer.apply(model, steer.MoA.published(model, {"alphas": alphas, "betas": betas}, **SMALL)), torch.no_grad():
        found = model(given["input_ids"]).logits

    def banded(call: Call, weights: torch.Tensor) -> torch.Tensor:
        places = torch.arange(40)
        keep = torch.zeros(4, 40, 40, dtype=torch.bool)
        for head in range(4):
            kept = alphas[call.site.layer][head] + betas[call.site.layer][head] * 40
            kept = max(8, -(-kept // 4) * 4)
            keep[head] = (places < 3) | (places[:, None] - places < kept - 3)
        weights = weights * keep
        return weights / weights.sum(-1, keepdim=True)

    with seen_by(model, banded), torch.no_grad():
        wanted = model(given["input_ids"]).logits
        dense = exact_llama()(given["input_ids"]).logits
    assert torch.allclose(found, wanted, rtol=0, atol=1e-12)
    assert not torch.allclose(found, dense, rtol=0, atol=1e-3)


def test_everything_kept_is_bit_identical() -> None:
    model, given = llama(torch.float32), sample()
    dense = model(given["input_ids"]).logits
    with steer.apply(model, steer.MoA.uniform(model, 1.0, **SMALL)):
        assert torch.equal(model(given["input_ids"]).logits, dense)


def test_generated_text_is_that_of_the_mask() -> None:
    model, given = llama(), sample(40)
    moa = steer.MoA.uniform(model, 0.25, **SMALL)
    masked = steer.MoA.uniform(model, 0.25, evict=False, **SMALL)
    texts = []
    for method in (moa, masked):
        with steer.apply(model, method):
            texts.append(model.generate(given["input_ids"], max_new_tokens=12, do_sample=False, eos_token_id=None))
    assert torch.equal(*texts)


def test_published_tables_come_back(tmp_path: Path) -> None:
    model = llama()
    rules = {"alphas": [[0.0, -1024.0, 0.0, 0.0]] * 3, "betas": [[0.5, 0.875, 0.125, 0.3]] * 3}
    (tmp_path / "rules.json").write_text(json.dumps(rules))
    moa = steer.MoA.published(model, tmp_path / "rules.json")
    assert moa.config() == rules
    moa.save(str(tmp_path))
    loaded = steer.load(str(tmp_path))
    assert isinstance(loaded, steer.MoA)
    assert loaded.config() == rules


@pytest.mark.parametrize("rules", [{"alphas": [[0.0] * 4] * 3}, {"alphas": [[0.0] * 4] * 2, "betas": [[0.5] * 4] * 2}])
def test_tables_of_another_model_are_refused(rules: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="a row for each of the 3 attention layers"):
        steer.MoA.published(llama(), rules)


def calibrated(model: Any, samples: list[Any], **options: Any) -> steer.MoA:
    checkpoint = options.pop("checkpoint", None)
    return steer.calibrate(model, steer.MoA(**SMALL), samples, progress=False, checkpoint=checkpoint, **options)


def test_calibration_fills_the_budget_and_leaves_the_model_alone() -> None:
    model, samples = llama(torch.float32), [sample(40, seed) for seed in range(2)] + [sample(64, 7)]
    before = snapshot(model)
    found = calibrated(model, samples, density=0.5)
    assert_untouched(before, model)
    assert all(parameter.grad is None for parameter in model.parameters())
    figures = found.plan.report["figures"]
    for tokens in (40, 64, 128):
        assert figures[f"density at {tokens}"] == pytest.approx(found.kept_share(tokens))
        assert found.kept_share(tokens) <= 0.5
    assert found.kept_share(64) > 0.4
    for table in ("alpha", "beta"):
        assert torch.equal(found.plan.tensors[table][..., 0::2], found.plan.tensors[table][..., 1::2])


def test_windows_beat_the_uniform_one_by_their_own_measure() -> None:
    model, samples = llama(), [sample(40, seed) for seed in range(2)]

    def hidden(**options: Any) -> float:
        found = calibrated(model, samples, density=0.5, lengths=[40], **options)
        return found.plan.report["figures"]["effect hidden"]

    uniform = hidden(alphas=[0], betas=[0.5])
    assert 0 < hidden(per="query_head") < hidden() < uniform


def test_the_plan_states_what_it_hides() -> None:
    """As a share of what all heads hide with windows of two blocks, 8 tokens of which 3 are sinks."""
    model = llama()
    search = steer.MoA(**SMALL).search(density=0.4)
    with steer.apply(model, search):
        search.run(model, sample(40), 0)
    found = search.finish()
    sums = torch.stack([of_site[40] for of_site in search.found.sums.values()])
    for layer, site in enumerate(site for site in steer.sites(model) if site.kind == "causal"):
        for head, (_, window) in enumerate(found.windows(site, 40).pairs):
            wanted = sums[layer, head, 40 if window is None or window >= 37 else window] / sums[..., 5].sum()
            assert found.plan is not None
            assert float(found.plan.tensors["hidden"][0, layer, head]) == pytest.approx(float(wanted), rel=1e-12)


def test_heads_that_share_keys_get_the_window_that_the_most_sensitive_needs() -> None:
    """Head 1 looks far back, its neighbour nowhere; the other two a little."""
    search = steer.MoA(**SMALL).search(density=0.6, lengths=[40], alphas=[0], betas=[0.2, 1])
    sums = torch.zeros(4, 41, dtype=torch.float64)
    sums[1, :40], sums[2:, :40] = 5.0, 1.0
    search.found.sums, search.found.samples, search.found.group = {"layer": {40: sums}}, {40: 1}, 2
    assert search.finish().config()["betas"] == [[1, 1, 0.2, 0.2]]


def test_an_interrupted_calibration_goes_on(tmp_path: Path) -> None:
    model, samples = llama(torch.float32), [sample(40), sample(48, 1), sample(40, 2)]
    whole = calibrated(model, samples)
    search = steer.MoA(**SMALL).search()
    with steer.apply(model, search):
        search.run(model, samples[0], 0)
        search.run(model, samples[1], 1)
    again = steer.MoA(**SMALL).search()
    again.load_state(json.loads(json.dumps({k: v for k, v in search.state().items() if not torch.is_tensor(v)}))
                     | {k: v for k, v in search.state().items() if torch.is_tensor(v)})  # fmt: skip
    with steer.apply(model, again):
        again.run(model, samples[2], 2)
    assert torch.equal(again.finish().plan.tensors["alpha"], whole.plan.tensors["alpha"])
    assert torch.equal(again.finish().plan.tensors["hidden"], whole.plan.tensors["hidden"])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"labels": None}, "one row at a time"),
        ({"labels": torch.full((1, TOKENS), -100)}, "no loss"),
        ({"input_ids": torch.ones(2, TOKENS, dtype=torch.long)}, "one row at a time"),
        ({"attention_mask": torch.zeros(1, TOKENS, dtype=torch.long)}, "no padding"),
    ],
)
def test_samples_that_say_nothing_are_refused(change: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        calibrated(llama(), [sample() | change])


def test_a_model_without_a_loss_is_refused() -> None:
    with pytest.raises(ValueError, match="LlamaModel gave no loss; MoA needs a model for causal language modelling"):
        calibrated(llama().model, [sample()])


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"n_sink": 8, "block_size": 4}, "two blocks"),
        ({"block_size": 0}, "block_size=0"),
        ({"n_sink": -1}, "n_sink=-1"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steer.MoA(**settings)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"density": 0}, "density=0"),
        ({"lengths": []}, "lengths="),
        ({"betas": [1.5]}, "betas="),
        ({"per": "layer"}, "kv_head or query_head"),
        ({"measure": "cells"}, "rows or keys"),
    ],
)
def test_options_that_make_no_sense_are_refused(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        steer.MoA(**SMALL).search(**options)
    with pytest.raises(ValueError, match="whole layers"):
        steer.MoA(heads=[0], **SMALL).search()


def test_without_a_plan_it_says_where_to_get_one() -> None:
    with pytest.raises(ValueError, match="fit it with"):
        steer.apply(llama(), steer.MoA())


def test_a_density_that_two_blocks_exceed_is_refused() -> None:
    with pytest.raises(ValueError, match="above the budgets"):
        calibrated(llama(), [sample()], density=0.2)
