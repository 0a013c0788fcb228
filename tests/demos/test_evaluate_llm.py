"""`steer eval llm`: every measure against a plain computation of the same, the controls, and the command."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from probes import relative_error
from tiny_text import language_model
from tiny_text import tokenizer as make_tokenizer

import steer
from steer_demos import evaluate_llm, language_measures, models
from steer_demos.evaluate_llm import evaluate_command
from steer_demos.language_controls import BestKeys, RandomKeys, as_many_random_heads
from steer_demos.language_measures import (
    answers,
    choice_log_probs,
    common_start,
    dense_agreement,
    generated_text,
    greedy_agreement,
    loss_by_length,
    score_choices,
    sink_statistics,
)
from steer_demos.language_suites import SUITES, spearman
from steer_demos.language_tasks import passkey, questions, recall, text


@pytest.fixture(scope="module")
def model():
    return language_model()


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


def log_prob_of(model, prompt: torch.Tensor, answer: list[int]) -> float:
    """The sum over an answer, one token at a time and without a cache."""
    total, ids = 0.0, prompt
    for token in answer:
        with torch.no_grad():
            total += float(model(ids, use_cache=False).logits[0, -1].log_softmax(-1)[token])
        ids = torch.cat([ids, torch.tensor([[token]])], 1)
    return total


def test_choices_score_the_sum_over_their_tokens(model, tokenizer) -> None:
    samples = [*questions(tokenizer, "topic", 5, 0), recall(tokenizer, 3, 0), *questions(tokenizer, "kind", 2, 0)]
    samples.append({**samples[0], "choices": [choice[:1] for choice in samples[0]["choices"]]})
    assert {len(choice) for sample in samples for choice in sample["choices"]} > {1, 3}
    for scores, sample in zip(choice_log_probs(model, samples), samples, strict=True):
        expected = [log_prob_of(model, sample["input_ids"], choice) for choice in sample["choices"]]
        assert scores == pytest.approx(expected, abs=1e-4)


def test_accuracy_by_length_divides_by_characters(model, tokenizer, monkeypatch) -> None:
    sample = {"label": 1, "characters": [2, 8]}
    monkeypatch.setattr(language_measures, "choice_log_probs", lambda *_: [[-3.0, -4.0]])
    found = score_choices(model, [sample])
    assert (found["accuracy"]["mean"], found["accuracy_by_length"]["mean"], found["margin"]["mean"]) == (0, 1, -1)


def test_answers_are_scored_as_they_would_be_generated(model, tokenizer) -> None:
    samples = [passkey(tokenizer, tokens, 0.5, seed) for tokens, seed in ((180, 0), (150, 1), (180, 2))]
    with torch.no_grad():
        own = model.generate(samples[1]["input_ids"], max_new_tokens=4, do_sample=False)[0, 150:].tolist()
    samples[1] |= {"answer": own, "key": "what the model says"}
    found = answers(model, tokenizer, samples)
    assert [result["found"] for result in found] == [0, 1, 0]
    for result, sample in zip(found, samples, strict=True):
        expected = log_prob_of(model, sample["input_ids"], sample["answer"])
        assert result["log_prob"] == pytest.approx(expected, abs=1e-3)


def test_an_answer_may_come_to_the_key_later(model, tokenizer) -> None:
    sample = passkey(tokenizer, 150, 0.5, 0)
    with torch.no_grad():
        own = model.generate(sample["input_ids"], max_new_tokens=8, do_sample=False)[0, 150:]
    sample["key"] = tokenizer.decode(own[3:5])
    assert answers(model, tokenizer, [sample])[0]["found"] == 1


def test_agreement_is_the_distance_of_two_distributions(model, tokenizer) -> None:
    samples = [passkey(tokenizer, 150, 0.3, 0), passkey(tokenizer, 170, 0.6, 1)]
    method = BestKeys(density=0.2)
    found = dense_agreement(model, samples, method)
    for kl, sample in zip(found["values"]["kl"], samples, strict=True):
        ids = torch.cat([sample["input_ids"], torch.tensor([sample["answer"]])], 1)
        with torch.no_grad():
            p = model(ids).logits[0, -len(sample["answer"]) - 1 : -1].softmax(-1)
            with steer.apply(model, method):
                q = model(ids).logits[0, -len(sample["answer"]) - 1 : -1].softmax(-1)
        assert kl == pytest.approx(float((p * (p / q).log()).sum(-1).mean()), rel=1e-3)
    assert found["density"] == pytest.approx(0.2, abs=0.01)
    assert list(found["error"]) == list(found["mass"]) == [site.name for site in steer.sites(model)]


def test_best_keys_hold_more_mass_and_err_less_than_random_ones(model, tokenizer) -> None:
    samples = [passkey(tokenizer, 200, 0.5, 0)]
    best, rand = (dense_agreement(model, samples, control(density=0.3)) for control in (BestKeys, RandomKeys))
    assert best["density"] == pytest.approx(rand["density"], abs=1e-3)
    for name in best["mass"]:
        assert 1 > best["mass"][name] > rand["mass"][name] > 0.2
        assert best["error"][name] < rand["error"][name]
    everything = dense_agreement(model, samples, BestKeys(density=1.0))
    assert max(everything["error"].values()) < 1e-5 and everything["mass"].popitem()[1] == pytest.approx(1, abs=1e-5)


def test_agreement_knows_what_a_window_keeps(model, tokenizer) -> None:
    samples = [passkey(tokenizer, 200, 0.5, 0)]
    found = dense_agreement(model, samples, steer.StreamingLLM(n_sink=4, n_recent=300))
    assert found["kl"]["mean"] == 0 and set(found["mass"].values()) == {1.0}
    cut = dense_agreement(model, samples, steer.StreamingLLM(n_sink=4, n_recent=32, positions="original"))
    assert 0.1 < max(cut["mass"].values()) < 0.9 and cut["kl"]["mean"] > 0 and cut["density"] < 0.5


@pytest.mark.parametrize("control", [RandomKeys, BestKeys])
def test_controls_keep_to_their_heads_and_to_real_tokens(model, tokenizer, control) -> None:
    ids = text(tokenizer, 40, 0)
    padded = torch.cat([torch.zeros(1, 8, dtype=torch.long), ids], 1)
    mask = (torch.arange(48)[None] >= 8).long()
    with torch.no_grad(), steer.apply(model, control(density=1.0)):
        everything = model(padded, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, 8:]
    with torch.no_grad():
        dense = model(ids).logits
        with steer.apply(model, control(density=0.2, layers="*0*", heads=[])):
            assert torch.equal(model(ids).logits, dense)
    assert relative_error(everything, dense) < 1e-5


@pytest.mark.parametrize("control", [RandomKeys, BestKeys])
def test_controls_keep_their_share_with_the_own_and_the_first_token(model, tokenizer, control) -> None:
    with torch.no_grad(), steer.apply(model, control(density=0.25, n_first=2)) as handle:
        model(text(tokenizer, 40, 0))
        kept = torch.cat([site.kernel.keep for site in handle.sites])
    assert kept.diagonal(dim1=-2, dim2=-1).all() and kept[..., 1:, :2].all() and not kept.triu(1).any()
    wanted = [max(math.ceil(0.25 * (i + 1)), min(3, i + 1)) for i in range(40)]
    assert (kept.sum(-1) == torch.tensor(wanted)).all()
    assert len({tuple(head.flatten().tolist()) for layer in kept for head in layer}) == kept.shape[0] * kept.shape[1]


@pytest.mark.parametrize("density", [0.0, 1.5])
def test_a_density_outside_of_its_range_is_refused(density: float) -> None:
    with pytest.raises(ValueError, match=f"density={density} must be above 0 and at most 1"):
        RandomKeys(density=density)


def test_loss_in_pieces_is_the_loss_of_the_whole(model, tokenizer) -> None:
    ids = text(tokenizer, 256, 0)
    found = loss_by_length(model, ids, chunk=48, bucket=64)
    with torch.no_grad():
        whole = F.cross_entropy(model(ids).logits[0, :-1], ids[0, 1:], reduction="none")
    assert found["values"]["loss"] == pytest.approx(whole[:224].reshape(7, 32).mean(1).tolist(), abs=1e-4)
    assert [part["tokens"] for part in found["parts"]] == [64, 128, 192, 256]
    each = 3 * 2 * 2 * 8 * 4  # layers, keys and values, heads, channels, bytes
    assert [part["cache_bytes"] for part in found["parts"]] == [96 * each, 144 * each, 192 * each, 256 * each]
    late = loss_by_length(model, ids, chunk=48, start=128)
    assert late["loss"]["mean"] == pytest.approx(whole[128 : 128 + 96].mean().item(), abs=1e-4)


def test_a_window_holds_the_same_bytes_at_every_length(model, tokenizer) -> None:
    found = loss_by_length(
        model, text(tokenizer, 256, 0), steer.StreamingLLM(n_sink=4, n_recent=28), chunk=32, bucket=64
    )
    assert {part["cache_bytes"] for part in found["parts"]} == {32 * 3 * 2 * 2 * 8 * 4}


def test_sinks_are_those_of_the_whole_map(model, tokenizer) -> None:
    found = sink_statistics(model, tokenizer, tokens=64, texts=1, alpha=2.0)
    eager = language_model()
    eager.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.cat(eager(text(tokenizer, 64, 0), output_attentions=True).attentions)
    mean = maps.sum(-2) / torch.arange(64, 0, -1)
    assert torch.allclose(torch.tensor(found["first"]), mean[..., 0], atol=1e-5)
    assert found["sinks"] == (mean[..., 1:] > 2 / 64).sum(-1).tolist()
    assert found["heads_on_first"]["mean"] == (mean[..., 0] > 0.3).sum()
    assert found["heads_with_sinks"]["mean"] == (mean[..., 1:] > 2 / 64).any(-1).sum()
    assert found["pairs_above_0.1"]["mean"] == (mean[..., 1:] > 0.1).sum() > 0
    assert found["with_bos"]["first"] != found["first"]


def test_own_text_is_sampled_with_its_seed(model, tokenizer) -> None:
    state = torch.random.get_rng_state()
    one, same, other = (generated_text(model, tokenizer, 90, seed, rows=4) for seed in (0, 0, 1))
    assert one.shape == (1, 90) and torch.equal(one, same) and not torch.equal(one, other)
    assert torch.equal(state, torch.random.get_rng_state())


def test_greedy_agreement_counts_until_the_first_difference(model, tokenizer) -> None:
    assert common_start(torch.tensor([4, 5, 6, 7]), torch.tensor([4, 5, 0, 7])) == 2
    size = {"count": 2, "new_tokens": 12, "tokens": 40}
    same = greedy_agreement(model, tokenizer, BestKeys(density=1.0), **size)
    assert same["values"]["same"] == [12, 12] and same["padding_error"] < 1e-5
    other = greedy_agreement(model, tokenizer, RandomKeys(density=0.1), **size)
    assert other["same"]["mean"] < 12 and other["padding_error"] > 1e-3  # random keys are others where rows are longer


def test_random_heads_are_as_many_and_others(model) -> None:
    sites = steer.sites(model)
    chosen = {sites[0].name: [0, 1], sites[2].name: [3]}
    drawn = as_many_random_heads(chosen, sites, seed=0)
    assert sum(map(len, drawn.values())) == 3 and drawn == as_many_random_heads(chosen, sites, seed=0)
    assert not {(name, head) for name, heads in drawn.items() for head in heads} & {
        (name, head) for name, heads in chosen.items() for head in heads
    }
    with pytest.raises(ValueError, match="3 heads were chosen, and only 2 others"):
        as_many_random_heads(chosen, sites[:1], seed=0)


def test_rank_correlation_shares_ranks() -> None:
    a, b = torch.tensor([[0.0, 0.0], [1.0, 5.0]]), torch.tensor([[1.0, 2.0], [3.0, 3.0]])
    ranks_a, ranks_b = [1.5, 1.5, 3, 4], [1, 2, 3.5, 3.5]
    covariance = sum((x - 2.5) * (y - 2.5) for x, y in zip(ranks_a, ranks_b, strict=True))
    norms = math.sqrt(sum((x - 2.5) ** 2 for x in ranks_a) * sum((y - 2.5) ** 2 for y in ranks_b))
    assert spearman(a, b) == pytest.approx(covariance / norms)


@pytest.fixture
def loads_tiny(model, tokenizer, monkeypatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: (model, tokenizer))


@pytest.mark.usefixtures("loads_tiny")
@pytest.mark.parametrize("suite", ["facts", "calibration", "streaming", "moa"])
def test_suites_run(suite: str, tmp_path: Path, monkeypatch) -> None:
    if suite == "facts":
        monkeypatch.setitem(SUITES, "facts", {k: v for k, v in SUITES["facts"].items() if "heads" not in k})
    evaluate_command("tiny", suite_name=suite, smoke=True, output=tmp_path / "r.json", plots=tmp_path / "plots")
    report = json.loads((tmp_path / "r.json").read_text())
    assert list(report["steps"]) == list(SUITES[suite]) == list(report["seconds"])
    assert all(rows for rows in report["steps"].values())
    assert all(path.stat().st_size > 5000 for path in (tmp_path / "plots").iterdir())


@pytest.mark.usefixtures("loads_tiny")
def test_command(tmp_path: Path, capsys) -> None:
    output = tmp_path / "llm.json"
    call = {"method": ["StreamingLLM"], "settings": ["n_recent=60", "n_sink=4"], "smoke": True, "output": output}
    evaluate_command("tiny", **call, only="passkey,agreement,loss", plots=tmp_path / "plots")
    report = json.loads(output.read_text())
    assert list(report["steps"]) == ["passkey", "agreement", "loss"] and report["versions"]["torch"]
    assert report["methods"] == {"dense": "dense", "StreamingLLM": "StreamingLLM(n_recent=60)"}
    row = report["steps"]["passkey"]["StreamingLLM"]
    low, high = row["log_prob"]["interval"]
    assert low <= row["log_prob"]["mean"] <= high and row["log_prob"]["samples"] == 6 and "against_dense" in row
    names = [name.split(" at ")[0] for name in report["steps"]["agreement"]]
    assert names == ["StreamingLLM", "random keys", "best keys"]
    printed = capsys.readouterr().out
    assert "against dense" in printed and "best keys" in printed
    assert {path.name for path in (tmp_path / "plots").iterdir()} == {
        f"measures-{name}.png" for name in ("passkey-grid", "agreement-error", "loss-curves")
    }
    evaluate_command("tiny", **call, only="greedy")
    after = json.loads(output.read_text())["steps"]
    assert list(after) == ["passkey", "agreement", "loss", "greedy"] and after["loss"] == report["steps"]["loss"]


@pytest.mark.usefixtures("loads_tiny")
def test_a_saved_method_is_measured(tmp_path: Path, model) -> None:
    steer.StreamingLLM(n_recent=50).save(str(tmp_path / "window"))
    evaluate_command(
        "tiny", artifact=[tmp_path / "window"], only="greedy", smoke=True, output=tmp_path / "deep" / "r.json"
    )
    report = json.loads((tmp_path / "deep" / "r.json").read_text())
    assert report["methods"]["window"] == "StreamingLLM(n_recent=50)" and "window" in report["steps"]["greedy"]


@pytest.mark.usefixtures("loads_tiny")
@pytest.mark.parametrize(
    ("asked", "message"),
    [
        ({"suite_name": "all"}, "no suite all; there are measures, facts"),
        ({"only": "passkey,speed"}, "no step 'speed'; it has passkey, recall"),
        ({"method": ["Magic"]}, "no method Magic; there are ACT"),
        ({"method": ["StreamingLLM"], "settings": ["beta=1"]}, "StreamingLLM has no field beta"),
    ],
)
def test_what_does_not_exist_is_refused(asked: dict, message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_command("tiny", **asked, output=tmp_path / "r.json")
    assert not (tmp_path / "r.json").exists()


def test_a_model_that_writes_nothing_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(evaluate_llm.models, "load", lambda name: object())
    with pytest.raises(ValueError, match="emoji-wan is no language model"):
        evaluate_command("emoji-wan")


def documented(suite: str) -> tuple[dict, str]:
    """The steps of a suite as they were measured, and the page that quotes them, without line breaks."""
    root = Path(__file__).resolve().parents[2]
    steps = json.loads((root / f"benchmarks/llm-{suite}.json").read_text(encoding="utf-8"))["steps"]
    return steps, " ".join((root / "docs/methods/language.md").read_text(encoding="utf-8").split())


def per_cent(figure: dict) -> str:
    return f"{100 * figure['mean']:.1f}"


@pytest.mark.parametrize("task", ["sentiment", "topic"])
def test_documented_gain_of_a_search(task: str) -> None:
    steps, page = documented("calibration")
    dense, found, every, *random = (row["accuracy"] for row in steps[task].values())
    gain = steps[task]["ACT, heads found"]["against_dense"]["accuracy"]
    low, high = (f"{100 * end:.1f}" for end in gain["interval"])
    row = [f"| {task}, {steps[task]['ACT, heads found']['number_of_heads']} heads found", per_cent(dense)]
    row += [per_cent(found), f"+{per_cent(gain)} [{low}, {high}]", per_cent(every), ", ".join(map(per_cent, random))]
    assert " | ".join(row) in page
    assert {figure["samples"] for figure in (dense, found, every, *random)} == {250}


def test_documented_losses() -> None:
    steps, page = documented("streaming")
    names = {
        "loss: dense": "dense",
        "loss: 4 sinks": "sinks 4, window 1020",
        'loss: 4 sinks, `positions="original"`': "sinks 4, window 1020, original positions",
        "loss: no sinks": "sinks 0, window 1024",
    }
    for title, name in names.items():
        parts = {part["tokens"]: part for part in steps["template text"][name]["parts"]}
        losses = [f"{parts[tokens]['loss']['mean']:.2f}" for tokens in (1024, 4096, 8192, 16384) if tokens in parts]
        assert f"| {title} | {' | '.join(losses)} |" in page
        held = {part["cache_bytes"] for part in parts.values()}
        assert name == "dense" or held == {47_185_920}


def test_documented_facts() -> None:
    steps, page = documented("facts")
    cells = steps["passkey"]["dense"]["cells"]
    assert {cell["tokens"] for cell in cells} == {512, 1024, 2048, 4096}
    assert steps["passkey"]["dense"]["found"]["mean"] == 1
    windows = {name: row["found"]["mean"] for name, row in steps["window passkey"].items()}
    assert windows == {name: float("sinks" not in name or "inside" in name) for name in windows}
    heads = steps["heads"]
    assert [heads[name]["found"]["mean"] for name in heads] == [1, 0, 1, 1]
    scores = heads["dense"]
    assert f"{scores['heads_above_0.1']} score at least 0.1 and {scores['heads_above_0.5']} at least 0.5" in page
    assert f"rank correlation of {scores['rank_correlation']:.2f}" in page
    assert all(f"({score:.2f})" in page for _, _, score in scores["top"][:5])
    losses = [f"{row['loss']['mean']:.2f}" for row in steps["window loss"].values()]
    assert f"dense {losses[0]}; 4 sinks {losses[1]}, one {losses[2]}, none {losses[3]}" in page
    spared = steps["spared heads"]
    assert [row["found"]["mean"] for row in spared.values()] == [1, 1, 0]
    dense, kept, _ = (row["cache_bytes"] / 1e6 for row in spared.values())
    assert f"holds {kept:.1f} MB, dense {dense:.1f} MB" in page


def test_documented_windows_of_heads() -> None:
    steps, page = documented("moa")
    published, _ = documented("moa-published")
    rows = steps["windows"] | {f"published, {b}": published["windows"][f"MoA, {b}"] for b in ("0.5", "0.25")}
    for budget in ("0.5", "0.25"):
        titles = {f"{budget} | MoA": "MoA, ", " | MoA, published measure": "published, "}
        for title, name in {**titles, " | one window for all": "one window, same cache, "}.items():
            row = rows[name + budget]
            digits = 3 if row["kl"]["mean"] < 0.1 else 2 if row["kl"]["mean"] < 1 else 1
            low, high = row["kl"]["interval"]
            kl = f"{row['kl']['mean']:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"
            right = f"{10 * row['right']['mean']:.0f} of 10"
            assert f"{title} | {row['kept_share']:.2f} | {row['density']:.2f} | {kl} | {right} |" in page
