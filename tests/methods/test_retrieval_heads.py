"""Retrieval heads: what a head looks at when the model copies, against full maps, and what masking changes."""

from __future__ import annotations

import copy
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import Edit, dense_attention
from probes import assert_untouched, inputs_of, snapshot
from tiny import FAMILIES, build, pad_left, token_ids
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM

import steer
from steer import Plan, RetrievalHeads
from steer.methods.retrieval_heads import copied, random_heads, ranking, read_scores, top_heads, write_scores

HEADS = {"model.layers.0.self_attn": [1], "model.layers.2.self_attn": [0, 3]}
LATER = 4  # tokens after the prompt
ENTRIES = 16  # tokens that the planted model knows
FIRST = 16  # channel of a head from which on its rotary angles stay near zero


def planted() -> Any:
    """A model that writes token t + 1 after token t if the text has it: head 0 finds and copies it, head 1 sees all.

    One layer, no MLP, one channel for each token.
    """
    config = LlamaConfig(
        vocab_size=ENTRIES,
        hidden_size=ENTRIES,
        intermediate_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        head_dim=64,
        rope_parameters={"rope_type": "default", "rope_theta": 1e14},
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
        tie_word_embeddings=False,
    )
    model = LlamaForCausalLM(config).eval().requires_grad_(False)
    layer, own = model.model.layers[0], torch.eye(ENTRIES)
    model.model.embed_tokens.weight.copy_(own)
    model.lm_head.weight.copy_(own)
    attention = layer.self_attn
    for module in (attention.q_proj, attention.k_proj, attention.v_proj, attention.o_proj, layer.mlp.down_proj):
        module.weight.zero_()
    content = slice(FIRST, FIRST + ENTRIES)
    attention.q_proj.weight[content] = 10 * own.roll(1, 0)  # token t asks for t + 1
    attention.k_proj.weight[content] = own
    attention.v_proj.weight[content] = own
    attention.o_proj.weight[:, content] = own
    return model


def sample(*prompt: int, needle: tuple[int, int], **rest: Any) -> dict[str, Any]:
    return {"input_ids": torch.tensor([prompt]), "needle": needle, **rest}


NEEDLE = sample(0, 2, 10, 11, 12, 13, 14, 0, 2, 5, 9, needle=(2, 7), max_new_tokens=5)


def found(model: Any, data: Sequence[dict[str, Any]], method: Any = None, **options: Any) -> Any:
    return steer.calibrate(model, method or RetrievalHeads(), data, progress=False, **options)


def scored(*scores: Sequence[float], names: Sequence[str] | None = None) -> Plan:
    """A plan with these scores, a row for each layer."""
    table = torch.tensor([scores])
    sites = tuple(names or (f"model.layers.{i}.self_attn" for i in range(table.shape[1])))
    return Plan(sites=sites, heads=table.shape[2], tensors={"score": table}, report={"layers": list(range(len(sites)))})


SCORES = scored([0.1, 0.9, 0.0, 0.2], [0.2, 0.0, 0.3, 0.0], [0.8, 0.0, 0.1, 0.5])


def test_a_planted_head_scores_one_and_masking_it_ends_the_copying() -> None:
    model = planted()
    prompt = NEEDLE["input_ids"]

    def answer() -> list[int]:
        return model.generate(prompt, max_new_tokens=5, do_sample=False)[0, prompt.shape[1] :].tolist()

    assert answer() == [10, 11, 12, 13, 14]
    before = snapshot(model)
    method = found(model, [NEEDLE])
    assert_untouched(before, model)
    assert method.scores.tolist() == [[1.0, 0.0]]
    assert method.top(1) == [("model.layers.0.self_attn", 0, 1.0)]
    assert method.plan.report["answers"][0]["written"] == [10, 11, 12, 13, 14]
    for how in ("mean", "zero"):
        with steer.apply(model, RetrievalHeads(plan=method.plan, k=1, how=how)):
            assert answer()[0] != 10  # the prompt's last query is masked too
        with steer.apply(model, RetrievalHeads(plan=method.plan, k=1, how=how, steps="1:")):
            assert answer()[0] == 10 and answer()[1] != 11
        with steer.apply(model, RetrievalHeads(heads=random_heads(method.plan, 1, outside=1, seed=0), how=how)):
            assert answer() == [10, 11, 12, 13, 14]


def test_only_right_answers_count() -> None:
    model = planted()
    wrong = sample(7, 3, 1, 9, needle=(0, 2), max_new_tokens=2)
    short = sample(0, 10, 11, 3, 9, needle=(1, 3), max_new_tokens=2)
    both = found(model, [NEEDLE, wrong, short])
    assert [answer["recall"] for answer in both.plan.report["answers"]] == [1.0, 0.0, 1.0]
    assert both.plan.report["figures"]["trials"] == 2 and both.scores.tolist() == [[1.0, 0.0]]
    half = short | {"max_new_tokens": 1}  # half of the needle is not more than half
    with pytest.raises(ValueError, match=r"answered none of 2 prompts with more than 50% .* best had 50%"):
        found(model, [wrong, half])
    assert found(model, [half], recall=0.4).scores.tolist() == [[0.5, 0.0]]
    assert found(model, [wrong | {"answer": tokens_of(model, wrong)}]).scores.tolist() == [[0.0, 0.0]]
    assert found(model, [NEEDLE | {"stop": [12]}]).scores[0, 0] == pytest.approx(0.6)


def tokens_of(model: Any, sample: dict[str, Any]) -> list[int]:
    prompt, new = sample["input_ids"], sample["max_new_tokens"]
    return model.generate(prompt, max_new_tokens=new, do_sample=False)[0, prompt.shape[1] :].tolist()


def test_copied_places_by_loops() -> None:
    draw = torch.Generator().manual_seed(0)
    looked = torch.randint(0, 9, (6, 2, 3), generator=draw)
    written, prompt = torch.randint(0, 3, (6,), generator=draw), torch.randint(0, 3, (8,), generator=draw)
    hits = copied(looked, written, prompt, (2, 6))
    assert hits.shape == (6, 2, 3, 4) and hits.any()
    for n in range(6):
        for layer in range(2):
            for head in range(3):
                at = int(looked[n, layer, head])
                hit = 2 <= at < 6 and int(prompt[at]) == int(written[n])
                assert hits[n, layer, head].tolist() == [hit and at == place for place in range(2, 6)]


@pytest.mark.parametrize("count", ["distinct", "every"])
@pytest.mark.parametrize("window", [None, 5])
def test_scores_are_those_of_the_full_maps(window: int | None, count: str) -> None:
    """Every head of a random model; the maps are those of one forward over prompt and answer, without a cache."""
    shape = {"vocab_size": 6, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "eos_token_id": None, "sliding_window": window}
    model: Any = build(lambda: MistralForCausalLM(MistralConfig(**shape, **heads)))
    data = []
    for seed in range(8):
        prompt = torch.randint(0, 5, (12,), generator=torch.Generator().manual_seed(seed)).tolist()
        data.append(sample(*prompt, needle=(1, 12), max_new_tokens=14))
        data[-1]["answer"] = tokens_of(model, data[-1])
    plan = found(model, data, count=count).plan
    trials, reach = plan.tensors["trials"], torch.zeros(2, 4)
    model.set_attn_implementation("eager")
    for scores, one in zip(trials, data, strict=True):
        prompt, answer = one["input_ids"], one["answer"]
        whole = torch.cat([prompt, torch.tensor([answer])], 1)
        for layer, weights in enumerate(model(whole, use_cache=False, output_attentions=True).attentions):
            for head in range(4):
                looks = weights[0, head, 11:-1].argmax(-1).tolist()
                hits = [at for at, token in zip(looks, answer, strict=True) if 1 <= at < 12 and prompt[0, at] == token]
                wanted = len(set(hits) if count == "distinct" else hits) / 11
                assert float(scores[layer, head]) == pytest.approx(wanted)
                reach[layer, head] += weights[0, head, 12:-1, 1:12].sum(-1).max() / len(data)
    assert trials.any() and trials.max() < 1
    assert torch.allclose(plan.tensors["reach"][0], reach, atol=1e-6)


def run(model: Any, inputs: dict[str, Tensor]) -> list[Tensor]:
    """Logits of a prompt, and of LATER tokens after it one by one."""
    cache, mask = DynamicCache(config=model.config), inputs["attention_mask"]
    rows = len(mask)
    out = [model(**inputs, past_key_values=cache).logits]
    for token in later(rows).split(1, 1):
        mask = torch.cat([mask, mask.new_ones(rows, 1)], 1)
        out.append(model(token, attention_mask=mask, past_key_values=cache).logits)
    return out


def later(rows: int) -> Tensor:
    return token_ids(torch.Generator().manual_seed(5), rows, LATER)


def ablated(how: str, first: list[int], prompt: int) -> Edit:
    """Uniform or empty rows in the maps of HEADS by layers: query `first` of each row, and all after the prompt."""
    chosen = iter(HEADS.values())

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        seen = (scores > -torch.inf).to(scores.dtype)
        uniform = seen / seen.sum(-1, keepdim=True).clamp(min=1)
        edited = weights.clone()
        for head in next(chosen):
            for row, at in enumerate(first):
                queries = [at, *range(prompt, weights.shape[2])]
                edited[row, head, queries] = uniform[row, head, queries] if how == "mean" else 0.0
        return edited

    return edit


@pytest.mark.parametrize("how", ["mean", "zero"])
@pytest.mark.parametrize("side", ["left", "right"])
def test_masked_heads_give_the_mean_of_the_values_or_nothing(how: str, side: str) -> None:
    """In fp64, against full maps of prompt and later tokens in one: the query of 0 is the mean of V, to 1e-12."""
    model: Any = FAMILIES["llama"].build().double()
    inputs = inputs_of(FAMILIES["llama"], model)
    if side == "right":
        inputs = {name: x.flip(1) for name, x in inputs.items()}
    real = inputs["attention_mask"].bool()
    rows, tokens = real.shape
    last = [int(row.nonzero().max()) for row in real]
    dense = run(model, inputs)
    with steer.apply(model, RetrievalHeads(heads=HEADS, how=how)):
        masked = run(model, inputs)
    whole = {
        "input_ids": torch.cat([inputs["input_ids"], later(rows)], 1),
        "attention_mask": torch.cat([inputs["attention_mask"], torch.ones(rows, LATER, dtype=torch.long)], 1),
    }
    with dense_attention(model, list(HEADS), ablated(how, last, tokens)):
        wanted = model(**whole, use_cache=False).logits
    keep = whole["attention_mask"].bool()
    assert (torch.cat(masked, 1) - wanted)[keep].abs().max() <= 1e-12
    assert all((a - b)[:, -1].abs().max() > 1e-3 for a, b in zip(masked[1:], dense[1:], strict=True))
    read = real.clone()
    read[torch.arange(rows), torch.tensor(last)] = False
    assert torch.equal(masked[0][read], dense[0][read])  # the prompt is read with every head


def test_no_heads_change_nothing() -> None:
    model = FAMILIES["llama"].build()
    inputs = inputs_of(FAMILIES["llama"], model)
    dense = run(model, inputs)
    for method in (
        RetrievalHeads(plan=SCORES, k=0),
        RetrievalHeads(heads={}),
        RetrievalHeads(plan=SCORES, k=2, steps="0:0"),
    ):
        with steer.apply(model, method):
            assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), dense, strict=True))


def test_the_top_heads_of_the_plan_are_masked() -> None:
    """The best three are those of HEADS; `layers` picks among some layers only."""
    model = FAMILIES["llama"].build()
    inputs = inputs_of(FAMILIES["llama"], model)
    assert top_heads(SCORES, 3) == HEADS
    with steer.apply(model, RetrievalHeads(heads=HEADS)):
        wanted = run(model, inputs)
    with steer.apply(model, RetrievalHeads(plan=SCORES, k=3)) as handle:
        assert all(torch.equal(a, b) for a, b in zip(run(model, inputs), wanted, strict=True))
        assert [site.name for site in handle.sites] == list(HEADS)
    with steer.apply(model, RetrievalHeads(plan=SCORES, k=2, layers="model.layers.{0,1}")) as handle:
        masks = {
            name: heads.flatten().nonzero().flatten().tolist() for name, (_, heads) in handle.bindings[0].live.items()
        }
        assert masks == {"model.layers.0.self_attn": [1], "model.layers.1.self_attn": [2]}


def test_a_padded_batch_writes_what_its_rows_write_alone() -> None:
    model: Any = FAMILIES["llama"].build()
    inputs = pad_left(token_ids(torch.Generator().manual_seed(3), 3, 15))
    options = {"max_new_tokens": 8, "min_new_tokens": 8, "do_sample": False}
    plain = model.generate(**inputs, **options)
    with steer.apply(model, RetrievalHeads(plan=SCORES, k=4)):
        together = model.generate(**inputs, **options)
        for row in range(3):
            real = inputs["attention_mask"][row].bool()
            alone = model.generate(inputs["input_ids"][row : row + 1, real], **options)
            assert torch.equal(alone[0, -8:], together[row, -8:])
        beams = model.generate(**inputs, **options, num_beams=3)
    assert not torch.equal(together, plain) and beams.shape == together.shape


def test_compiled_decoding_with_a_static_cache() -> None:
    torch._dynamo.reset()
    model: Any = FAMILIES["llama"].build()
    inputs = inputs_of(FAMILIES["llama"], model)
    config = CompileConfig(backend="eager", fullgraph=True)
    config._compile_all_devices = True
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False, "cache_implementation": "static"}
    plain = model.generate(**inputs, **options, disable_compile=True)
    for how in ("mean", "zero"):
        with steer.apply(model, RetrievalHeads(plan=SCORES, k=5, how=how)):
            wanted = model.generate(**inputs, **options, disable_compile=True)
            compiled = model.generate(**inputs, **options, disable_compile=False, compile_config=config)
        assert torch.equal(compiled, wanted) and not torch.equal(wanted, plain)
    torch._dynamo.reset()


def test_a_fitted_method_is_saved_and_resumes(tmp_path: Path) -> None:
    model = planted()
    data = [NEEDLE, sample(0, 3, 10, 11, 0, 9, needle=(2, 4), max_new_tokens=2)]
    fitted = found(model, data, RetrievalHeads(k=1), checkpoint=tmp_path / "kept")
    resumed = found(model, data, RetrievalHeads(k=1), checkpoint=tmp_path / "kept")
    assert torch.equal(resumed.plan.tensors["trials"], fitted.plan.tensors["trials"])
    assert resumed.plan.report == fitted.plan.report and resumed.plan.sites == fitted.plan.sites
    fitted.save(str(tmp_path / "saved"))
    loaded: Any = steer.load(tmp_path / "saved")
    assert loaded.plan.tensors["trials"].shape == (2, 1, 2)
    with steer.apply(model, fitted):
        wanted = tokens_of(model, NEEDLE)
    with steer.apply(model, loaded):
        assert tokens_of(model, NEEDLE) == wanted
    with pytest.raises(steer.FingerprintError):
        steer.apply(FAMILIES["llama"].build(), loaded)


def test_random_heads_are_not_among_the_best() -> None:
    best = {(site, head) for site, head, _ in ranking(SCORES)[:5]}
    drawn = [random_heads(SCORES, 4, outside=5, seed=seed) for seed in (0, 0, 1)]
    assert drawn[0] == drawn[1] != drawn[2]
    for heads in drawn:
        pairs = [(site, head) for site, some in heads.items() for head in some]
        assert len(pairs) == 4 and not best & set(pairs)
    assert ranking(SCORES)[2][:2] == ("model.layers.2.self_attn", 3)
    assert [pair[1] for pair in ranking(SCORES)[4:8]] == [3, 0, 0, 2]  # equal scores in the model's order
    with pytest.raises(ValueError, match="count=8 heads outside of the top 5: this plan has 7"):
        random_heads(SCORES, 8, outside=5, seed=0)


def test_the_published_format(tmp_path: Path) -> None:
    """Two trials of 3 layers of 4 heads."""
    model, file = FAMILIES["llama"].build(), tmp_path / "scores.json"
    table = {f"{layer}-{head}": [0.1 * layer, 0.2 * head] for layer in range(3) for head in range(4)}
    file.write_text(json.dumps(table))
    plan = read_scores(file, model)
    assert RetrievalHeads(plan=plan).scores[2, 3] == pytest.approx(0.4)
    write_scores(plan, tmp_path / "again.json")
    again = json.loads((tmp_path / "again.json").read_text())
    assert list(again) == list(table) and again["2-3"] == pytest.approx(table["2-3"])
    with steer.apply(model, RetrievalHeads(plan=plan, k=1)) as handle:
        assert [site.name for site in handle.sites] == ["model.layers.2.self_attn"]
    file.write_text(json.dumps(table | {"3-0": [0, 0]}))
    with pytest.raises(ValueError, match="13 heads, the last one 3-0; this LlamaForCausalLM has 12, the last one 2-3"):
        read_scores(file, model)
    file.write_text(json.dumps(table | {"2-3": [0]}))
    with pytest.raises(ValueError, match="different numbers of trials"):
        read_scores(file, model)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"k": -1}, "k=-1 must be 0 or more"),
        ({"how": "max"}, "choose from mean, zero"),
        ({"plan": Plan(sites=("a",), heads=2, tensors={"mode": torch.ones(1, 1, 2)})}, r"holds score \(1, 1, 2\)"),
        ({"plan": Plan(sites=("a",), heads=1, tensors={"score": torch.full((1, 1, 1), torch.nan)})}, "finite"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        RetrievalHeads(**settings)


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"needle": (4, 4)}, r"needle=\(4, 4\) is no span of a prompt of 11 tokens"),
        ({"needle": (4, 12)}, "is no span"),
        ({"input_ids": torch.ones(2, 5, dtype=torch.long)}, "give one prompt a sample"),
        ({"needle": None}, "a sample has no needle"),
    ],
)
def test_bad_samples_are_refused(changes: dict[str, Any], words: str) -> None:
    model, data = planted(), {name: x for name, x in {**copy.deepcopy(NEEDLE), **changes}.items() if x is not None}
    before = snapshot(model)
    with pytest.raises(ValueError, match=words):
        found(model, [data])
    assert_untouched(before, model)


def test_what_a_search_and_a_mask_refuse() -> None:
    for options, words in (({"count": "once"}, "choose from distinct, every"), ({"recall": 1.0}, r"in \[0, 1\)")):
        with pytest.raises(ValueError, match=words):
            RetrievalHeads().search(**options)
    model = FAMILIES["llama"].build()
    with pytest.raises(ValueError, match=r"RetrievalHeads has no plan: fit it with steer\.calibrate"):
        steer.apply(model, RetrievalHeads())
    with pytest.raises(ValueError, match="has no plan"):
        RetrievalHeads().top(3)
    with pytest.raises(steer.SelectorError, match="layers in the plan"):
        steer.apply(model, RetrievalHeads(plan=SCORES, layers="model.layers.7"))
    fewer = Plan(sites=SCORES.sites, heads=1, tensors={"score": torch.ones(1, len(SCORES.sites), 1)})
    with pytest.raises(ValueError, match="this plan is for sites of 1 heads"):
        steer.apply(model, RetrievalHeads(plan=fewer))
