"""The prompts of `steer eval llm`: seeded, of the length asked for, with the needle where they say it is."""

from __future__ import annotations

import random

import pytest
import torch
from tiny_text import tokenizer as make_tokenizer

from steer_demos import language_tasks
from steer_demos.language_tasks import QUESTIONS, draw_questions, passkey, questions, recall, text, word_needle
from steer_demos.language_words import NAMES, SECRETS


@pytest.fixture(scope="module")
def tokenizer():
    return make_tokenizer()


@pytest.mark.parametrize("make", [passkey, word_needle])
@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_the_sample_says(tokenizer, make, depth: float) -> None:
    sample = make(tokenizer, 900, depth, seed=3)
    assert sample["input_ids"].shape == (1, 900)
    start, stop = sample["needle"]
    held = tokenizer.decode(sample["input_ids"][0, start:stop])
    assert held.count(sample["key"]) == (2 if make is passkey else 1)
    assert held.strip()[0] == ("T" if make is passkey else sample["key"][0])
    assert held.strip()[-1] == ("." if make is passkey else sample["key"][-1])
    assert tokenizer.decode(sample["answer"]) == " " + sample["key"]
    assert (start < 200, stop > 700) == (depth < 0.5, depth > 0.5)


def test_prompts_of_one_length_differ_only_by_their_seed(tokenizer) -> None:
    one, same, other = (passkey(tokenizer, 500, 0.3, seed) for seed in (1, 1, 2))
    assert torch.equal(one["input_ids"], same["input_ids"]) and one["key"] == same["key"]
    assert one["input_ids"].shape == other["input_ids"].shape and one["key"] != other["key"]


def test_the_chat_template_and_the_forced_answer_are_there(tokenizer) -> None:
    ids = passkey(tokenizer, 400, 0.5, 0)["input_ids"][0]
    assert tokenizer.decode(ids).endswith("?<end>\n<assistant>\nThe pass key is")
    plain = tokenizer.decode(passkey(tokenizer, 400, 0.5, 0, chat=False)["input_ids"][0])
    assert "<assistant>" not in plain and plain.endswith("What is the pass key in the text? The pass key is")


def test_too_few_tokens_are_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match=r"tokens=40 are too few: the question and the needle alone take \d+"):
        passkey(tokenizer, 40, 0.5, 0)


def test_recall_asks_for_one_of_the_pairs(tokenizer) -> None:
    sample = recall(tokenizer, 8, seed=5)
    words = [tokenizer.decode(choice) for choice in sample["choices"]]
    assert len(set(words)) == 8 and {word.strip() for word in words} <= set(SECRETS)
    assert words[sample["label"]] == " " + sample["key"]
    line = tokenizer.decode(sample["input_ids"][0, slice(*sample["needle"])]).strip()
    name = line.split(" of ")[1].split(" is ")[0]
    assert line == f"The secret word of {name} is {sample['key']}." and name in NAMES
    assert tokenizer.decode(sample["input_ids"][0]).endswith(f"The secret word of {name} is")
    assert sample["characters"] == [len(word) - 1 for word in words]


@pytest.mark.parametrize("task", QUESTIONS)
def test_questions_are_distinct_and_hold_no_bias_to_a_place(task: str) -> None:
    drawn = draw_questions(task, 300, seed=1)
    assert len({prompt for prompt, _, _ in drawn}) == 300
    assert drawn == draw_questions(task, 300, seed=1) != draw_questions(task, 300, seed=2)
    answers = len(drawn[0][1])
    for place in range(answers):
        share = sum(label == place for _, _, label in drawn) / 300
        assert abs(share - 1 / answers) < 4 * (1 / answers * (1 - 1 / answers) / 300) ** 0.5  # 4 sigma


def test_a_review_says_what_its_label_says() -> None:
    for prompt, answers, label in draw_questions("sentiment", 200, seed=0):
        end = prompt.split(", but ")[1].split(".")[0]
        good = end in language_tasks.GOOD_ENDS or end.removeprefix("it was ") in language_tasks.GOOD
        assert answers[label] == ("positive" if good else "negative")


def test_question_samples_hold_the_answers_as_tokens(tokenizer) -> None:
    for (prompt, answers, label), sample in zip(
        draw_questions("topic", 5, 0), questions(tokenizer, "topic", 5, 0), strict=True
    ):
        assert tokenizer.decode(sample["input_ids"][0]) == prompt
        assert [tokenizer.decode(choice) for choice in sample["choices"]] == [" " + answer for answer in answers]
        assert sample["answer"] == sample["choices"][label] and sample["label"] == label


def test_unknown_or_too_many_questions_are_refused(monkeypatch) -> None:
    with pytest.raises(ValueError, match="choose from sentiment, topic, kind"):
        draw_questions("riddle", 1, 0)
    monkeypatch.setitem(QUESTIONS, "three", lambda draw: (str(draw.randrange(3)), ["yes", "no"], 0))
    assert len(draw_questions("three", 3, 0)) == 3
    with pytest.raises(ValueError, match="count=4 is more than the 3 different questions of three"):
        draw_questions("three", 4, 0)


def test_an_answer_that_joins_the_last_token_is_refused(tokenizer) -> None:
    with pytest.raises(ValueError, match="end the prompt in a word"):
        language_tasks.continuation(Joining(), "ab", "c", chat=False)


class Joining:
    """A tokenizer for which three letters are one token."""

    chat_template = None

    def __call__(self, prompt: str, **_: object):
        return type("Encoding", (), {"input_ids": [len(prompt)] if len(prompt) == 3 else list(range(len(prompt)))})


def test_text_has_the_length_asked_for(tokenizer) -> None:
    ids = text(tokenizer, 3000, seed=0)
    assert ids.shape == (1, 3000)
    assert torch.equal(ids[:, :500], text(tokenizer, 500, seed=0)) and not torch.equal(ids, text(tokenizer, 3000, 1))
    assert language_tasks.sentence(random.Random(0)).endswith(".")
