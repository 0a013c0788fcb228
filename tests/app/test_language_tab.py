"""What the tab of language models shows: answers, sinks and pass keys, without and with a method."""

from __future__ import annotations

import math
from typing import Any, ClassVar

import numpy as np
import pytest
import torch

import steer
from steer.attention_plots import sink_table
from steer_demos import models
from steer_demos.app import forms, language, language_answers, language_looks
from steer_demos.app.jobs import Job, Stopped
from steer_demos.app.sources import Sources
from steer_demos.app.stage import Loaded
from steer_demos.language_measures import cache_bytes

NAME = "smollm2-135m-instruct"
TEXT = "The keeper walks out with a lamp in one hand and a bag of bread in the other. The gulls know him, and"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded(NAME, "text", *models.load(NAME, device="cpu", dtype=torch.float32))


@pytest.fixture
def method() -> Any:
    return steer.StreamingLLM(n_recent=12)


@pytest.fixture(scope="module")
def found(loaded: Loaded) -> language_answers.Pair:
    return pair(loaded, steer.StreamingLLM(n_recent=12))


def pair(loaded: Loaded, method: Any, job: Job | None = None, **changes: Any) -> language_answers.Pair:
    options: dict[str, Any] = {"chat": False, "new_tokens": 8, "temperature": 0.0, "seed": 0, **changes}
    return language_answers.answer_pair(loaded, method, options.pop("prompt", TEXT), job or Job(), **options)


def test_the_answers_are_what_the_model_generates(loaded: Loaded, method: Any, found: language_answers.Pair) -> None:
    inputs = loaded.processor(TEXT, return_tensors="pt")
    call = {**inputs, "max_new_tokens": 8, "do_sample": False, "return_dict_in_generate": True}
    plain = loaded.model.generate(**call)
    with steer.apply(loaded.model, method):
        steered = loaded.model.generate(**call)
    size = found.prompt
    assert size == inputs["input_ids"].shape[1]
    assert found.before.tokens == plain.sequences[0, size:].tolist()
    assert found.after.tokens == steered.sequences[0, size:].tolist()
    assert found.before.tokens != found.after.tokens
    assert found.before.cache == cache_bytes(plain.past_key_values)
    assert found.after.cache == cache_bytes(steered.past_key_values) < found.before.cache
    assert 0 < found.kl < math.inf


def test_the_code_that_is_shown_writes_the_steered_answer(
    loaded: Loaded, method: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    answers = pair(loaded, method, prompt="Why is the sky blue?", chat=True, new_tokens=5)
    made = forms.in_python(NAME, method, {})
    exec(language_answers.python(loaded, made, "Why is the sky blue?", True, 5, 0.0), {})
    assert capsys.readouterr().out.strip() == answers.after.text.strip() != answers.before.text.strip()


def test_answers_are_marked_from_the_first_different_token_on(
    loaded: Loaded, method: Any, found: language_answers.Pair
) -> None:
    before, after = found.marked(loaded.processor)
    same = loaded.processor.decode(found.before.tokens[: found.same])
    for parts, answer in ((before, found.before), (after, found.after)):
        assert "".join(text for text, _ in parts) == answer.text
        assert parts[0] == (same, None)
        word, mark = parts[1]
        assert mark == language_answers.DIFFERS and len(word.split()) == 1
    assert f"from token {found.same + 1} on" in found.figures(method)["difference"]


def test_a_method_that_is_off_writes_the_same(loaded: Loaded) -> None:
    off = steer.ACT(beta=1.0)
    found = pair(loaded, off, temperature=1.0, seed=5)
    assert found.are_equal and found.same == 8 and found.kl == 0
    assert [mark for _, mark in found.marked(loaded.processor)[1]] == [None]
    assert found.figures(off)["difference"].startswith("none in what they write")


def test_a_seed_is_a_draw(loaded: Loaded) -> None:
    off = steer.ACT(beta=1.0)
    one, other = (pair(loaded, off, temperature=1.5, seed=seed, new_tokens=4) for seed in (1, 2))
    assert one.before.tokens == one.after.tokens != other.before.tokens


def test_every_token_is_reported_and_may_be_the_last(loaded: Loaded, method: Any, found: language_answers.Pair) -> None:
    class Reported(Job):
        said: ClassVar[list[tuple[int, int, str]]] = []

        def step(self, done: int, total: int, what: str) -> None:
            self.said.append((done, total, what))
            if done == 11:
                self.stop()
            super().step(done, total, what)

    loaded.warm = True
    job = Reported()
    with pytest.raises(Stopped):
        pair(loaded, method, job)
    assert [done for done, _, _ in job.said] == [*range(9), *range(8, 12)]
    assert {total for _, total, _ in job.said} == {16}
    assert [what.partition(":")[0] for _, _, what in job.said] == ["without"] * 9 + ["with StreamingLLM"] * 4
    assert not [site for site in steer.sites(loaded.model) if "Steered" in type(site).__name__]
    assert pair(loaded, steer.ACT(beta=1.0)).after.tokens == found.before.tokens


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 10_001}, "10001 characters; at most 10000"),
        ({"prompt": "1 " * 1_500}, "tokens; at most 2000 are taken here"),
        ({"new_tokens": 0}, "new_tokens=0 must be a whole number from 1 to 200"),
        ({"new_tokens": math.nan}, "new_tokens=nan must be"),
        ({"temperature": 3}, "temperature=3 must be a number from 0 to 2"),
        ({"temperature": math.nan}, "temperature=nan must be"),
    ],
)
def test_what_cannot_be_written_is_said(loaded: Loaded, method: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair(loaded, method, **changes)


def test_a_model_without_a_template_cannot_chat(loaded: Loaded, method: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.processor, "chat_template", None)
    with pytest.raises(ValueError, match="has no chat template: choose to continue"):
        pair(loaded, method, chat=True)


def test_a_prompt_must_leave_room_in_the_model(loaded: Loaded, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(loaded.model.config, "max_position_embeddings", 30)
    language_answers.check_length(loaded.model, 22, room=8)
    with pytest.raises(ValueError, match="23 tokens and the answer up to 8; the model reads 30 in all"):
        language_answers.check_length(loaded.model, 23, room=8)


@pytest.mark.parametrize("measure", ["first", "sinks"])
def test_sinks_are_those_of_steer_plot(loaded: Loaded, measure: str) -> None:
    method = steer.ACT()
    ids = language_answers.read(loaded, TEXT, chat=False)
    plain = language_looks.received(loaded, None, ids)
    calibrated = language_looks.received(loaded, method, ids)
    assert torch.allclose(plain.table(measure).float(), sink_table(loaded.model, ids, measure).float(), atol=1e-5)
    with steer.apply(loaded.model, method):
        wanted = sink_table(loaded.model, ids, measure).float()
    assert torch.allclose(calibrated.table(measure).float(), wanted, atol=1e-5)
    assert not torch.equal(plain.table(measure), calibrated.table(measure))
    for each in (plain, calibrated):
        assert float(each.shares.sum()) == pytest.approx(1, abs=1e-5)


def test_sinks_are_drawn_with_their_figures(loaded: Loaded) -> None:
    text, heads, figures = language_looks.sinks(
        loaded, steer.StreamingLLM(n_recent=8), TEXT, Job(), chat=True, measure="first"
    )
    assert text.width > 500 and heads.width > 500
    assert list(figures) == ["prompt", "without", "with StreamingLLM"]
    assert "of the attention is on the first token" in figures["without"] != figures["with StreamingLLM"]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"measure": "last"}, "measure='last' does not exist; choose from first, sinks"),
        ({"prompt": "1 " * 400}, "tokens; at most 300 are taken here"),
        ({"prompt": "a"}, "the prompt is one token"),
    ],
)
def test_sinks_that_cannot_be_drawn_are_said(loaded: Loaded, method: Any, changes: dict[str, Any], words: str) -> None:
    options = {"prompt": TEXT, "measure": "first", **changes}
    with pytest.raises(ValueError, match=words):
        language_looks.sinks(loaded, method, options.pop("prompt"), Job(), chat=False, **options)


def test_a_pass_key_is_lost_outside_of_the_window_and_kept_inside(loaded: Loaded) -> None:
    method = steer.StreamingLLM(n_recent=64)
    lost = language_looks.trial(loaded, method, Job(), tokens=160, depth=0.0, seed=3)
    assert lost.is_found(lost.before) and not lost.is_found(lost.after)
    assert "✓ found" in lost.figures(method)["without"] and "✗ lost" in lost.figures(method)["with StreamingLLM"]
    assert lost.kept is not None and lost.looks_after is None
    assert lost.kept.tolist() == [1.0] * 4 + [0.0] * (160 - 64 - 4) + [1.0] * 64
    start, stop = lost.needle
    assert lost.key in lost.parts[1][0] and lost.parts[1][1] == "pass key"
    assert start < int(lost.looks[:96].argmax()) < stop  # of what the window does not hold
    kept = language_looks.trial(loaded, steer.StreamingLLM(n_recent=120), Job(), tokens=160, depth=0.6, seed=3)
    assert kept.is_found(kept.before) and kept.is_found(kept.after)
    assert not np.array_equal(np.asarray(kept.draw(method)), np.asarray(lost.draw(method)))


def test_retrieval_heads_that_come_with_the_model_are_what_finds_a_pass_key(loaded: Loaded) -> None:
    method = forms.steering(Sources(), NAME, "RetrievalHeads", {"k": 5})
    found = language_looks.trial(loaded, method, Job(), tokens=200, depth=0.5, seed=0)
    assert found.is_found(found.before) and not found.is_found(found.after)
    start, stop = found.needle
    assert found.kept is None and found.looks_after is not None
    assert float(found.looks_after[start:stop].sum()) < float(found.looks[start:stop].sum())


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"tokens": 99}, "tokens=99 must be a whole number from 100 to 2000"),
        ({"tokens": 100.5}, "tokens=100.5 must be"),
        ({"tokens": math.inf}, "tokens=inf must be"),
        ({"depth": 1.1}, "depth=1.1 must be a number from 0"),
        ({"depth": math.nan}, "depth=nan must be"),
    ],
)
def test_texts_that_cannot_be_made_are_said(loaded: Loaded, method: Any, changes: dict[str, Any], words: str) -> None:
    options = {"tokens": 100, "depth": 0.5, **changes}
    with pytest.raises(ValueError, match=words):
        language_looks.trial(loaded, method, Job(), seed=0, **options)


def test_what_the_model_refuses_is_said_before_it_writes(loaded: Loaded) -> None:
    class Silent(Job):
        def step(self, done: int, total: int, what: str) -> None:
            raise AssertionError("it began")

    with pytest.raises(ValueError, match="matches none of this model's attention sites"):
        pair(loaded, steer.ACT(layers="blocks.7"), Silent())


def test_methods_and_modes_of_the_tab() -> None:
    assert {"ACT", "StreamingLLM", "RetrievalHeads", "DuoAttention", "MoA"} <= set(language.methods())
    assert not {"PAG", "SLG", "VAR", "RadialAttention"} & set(language.methods())
    assert [language.is_chat(mode) for mode in language.MODES] == [True, False]
    with pytest.raises(ValueError, match="mode='talk' does not exist; choose from chat, completion"):
        language.is_chat("talk")


@pytest.mark.parametrize("part", language.EXAMPLES)
def test_examples_are_settings_that_a_method_takes(part: str) -> None:
    for example in language.EXAMPLES[part].values():
        assert example["method"] in language.methods()
        forms.steering(Sources(), NAME, example["method"], example["settings"])
