"""Prompts for language models, drawn from word lists with a seed: keys in long text, pairs to recall, questions.

    sample = passkey(tokenizer, tokens=1024, depth=0.5, seed=3)
    model.generate(sample["input_ids"], max_new_tokens=6)

Every sample is a dict of a prompt's `input_ids` (1, S) and of what is known about it, as `steer.calibrate` takes them:

    needle: (start, stop) span of the prompt's tokens that hold what is asked for
    answer: ids of the right answer, which follow the prompt
    key: the answer as text
    choices: ids of each answer to choose from; characters: their lengths as text; label: the index of the right one
"""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from steer_demos.language_words import (
    BAD,
    BAD_ENDS,
    CITIES,
    GOOD,
    GOOD_ENDS,
    KINDS,
    NAMES,
    NOUNS,
    OBJECTS,
    PLACES,
    SECRETS,
    TIMES,
    TOPICS,
    VERBS,
    WORKS,
)

Sample = dict[str, Any]

PASSKEY_OPENING = "There is a pass key in this text."
PASSKEY_QUESTION = "What is the pass key in the text?"
PASSKEY_ANSWER = "The pass key is"


def sentence(draw: random.Random) -> str:
    """A sentence that says who did what, and when or where."""
    parts = [draw.choice(NAMES), draw.choice(VERBS), draw.choice(OBJECTS)]
    parts += [draw.choice(PLACES)] * draw.choice([0, 0, 1]) + [draw.choice(TIMES)]
    return " ".join(parts) + "."


def passkey(tokenizer: Any, tokens: int, depth: float, seed: int, digits: int = 5, chat: bool = True) -> Sample:
    """A number, stated twice in a paragraph of its own in a long text, and the beginning of the answer to its question.

    Small models need to be told what to look for: without the opening and the paragraphs SmolLM2-135M loses the number
    from 2k tokens on.

    Args:
        tokenizer: a fast tokenizer of transformers.
        tokens: length of the prompt.
        depth: share of the text before the number, 0 to 1.
        seed: of the text and the number.
        digits: of the number.
        chat: wrap the text in the tokenizer's chat template, where it has one.

    Returns:
        `input_ids` of exactly `tokens` tokens, `needle` (both statements), `answer`, `key`.

    Raises:
        ValueError: the text does not fit into `tokens`.
    """
    draw = random.Random(f"passkey {seed} {tokens} {depth}")
    key = str(draw.randrange(10 ** (digits - 1), 10**digits))
    needle = f"The pass key is {key}. Remember it. {key} is the pass key."

    def content(before: str, after: str) -> str:
        return "\n\n".join(part for part in (PASSKEY_OPENING, before, needle, after, PASSKEY_QUESTION) if part)

    return hidden(tokenizer, draw, tokens, depth, content, needle, PASSKEY_ANSWER, key, chat)


def word_needle(tokenizer: Any, tokens: int, depth: float, seed: int, chat: bool = True) -> Sample:
    """A sentence of unlikely words, stated once in a long text: a head that copies it token by token retrieves.

    Args, returns and raises: as `passkey`; `needle` is the span of what the answer repeats.
    """
    draw = random.Random(f"words {seed} {tokens} {depth}")
    city, words = draw.choice(CITIES), draw.sample(SECRETS, 4)
    key = "eat a {} {} sandwich and sit near the {} {}".format(*words)
    start = f"The best thing to do in {city} is to"
    question = f"What is the best thing to do in {city}?"

    def content(before: str, after: str) -> str:
        return " ".join(part for part in (before, f"{start} {key}.", after, question) if part)

    return hidden(tokenizer, draw, tokens, depth, content, key, start, key, chat)


def recall(tokenizer: Any, pairs: int, seed: int, chat: bool = True) -> Sample:
    """Names with a secret word each, in sentences; the word of one of them is asked for.

    Returns:
        `input_ids`, `needle` (the sentence asked for), `answer`, `key`, and `choices` (all the words listed),
        `characters`, `label`.
    """
    draw = random.Random(f"recall {seed} {pairs}")
    names, words = draw.sample(NAMES, pairs), draw.sample(SECRETS, pairs)
    lines = [f"The secret word of {name} is {word}." for name, word in zip(names, words, strict=True)]
    label = draw.randrange(pairs)
    question = f"What is the secret word of {names[label]}?"
    prompt = asked(tokenizer, " ".join(lines) + " " + question, f"The secret word of {names[label]} is", chat)
    return question_of(tokenizer, prompt, words, label, chat) | {
        "needle": span_of(tokenizer, prompt, lines[label], chat),
        "key": words[label],
    }


Question = tuple[str, list[str], int]


def sentiment(draw: random.Random) -> Question:
    """A review of two clauses that disagree, with negations; the second one decides."""
    label = draw.randrange(2)
    right, wrong = (GOOD, BAD) if label == 0 else (BAD, GOOD)
    if draw.random() < 0.5:
        review = f"I expected a {draw.choice(wrong)} {draw.choice(WORKS)}, but it was {draw.choice(right)}."
    else:
        negated = draw.random() < 0.5
        opinion = "not " + draw.choice(right) if negated else draw.choice(wrong)
        end = draw.choice(GOOD_ENDS if label == 0 else BAD_ENDS)
        review = f"The {draw.choice(NOUNS)} was {opinion}, but {end}."
    return f"Review: {review}\nThis review is", ["positive", "negative"], label


def topic(draw: random.Random) -> Question:
    """What somebody talked about, of four topics that the prompt does not name."""
    topics = draw.sample(sorted(TOPICS), 4)
    label = draw.randrange(4)
    word = draw.choice(TOPICS[topics[label]])
    prompt = f"Sentence: {draw.choice(NAMES)} talked about the {word} {draw.choice(TIMES)}.\nTopic:"
    return prompt, topics, label


def kind(draw: random.Random) -> Question:
    """What kind of thing a word names, of four kinds that the prompt lists."""
    kinds = draw.sample(sorted(KINDS), 4)
    label = draw.randrange(4)
    word = draw.choice(KINDS[kinds[label]])
    listed = f"{kinds[0]}, {kinds[1]}, {kinds[2]} or {kinds[3]}"
    return f"Is {word} a {listed}? {word.capitalize()} is a kind of", kinds, label


QUESTIONS: dict[str, Callable[[random.Random], Question]] = {"sentiment": sentiment, "topic": topic, "kind": kind}


def draw_questions(task: str, count: int, seed: int) -> list[Question]:
    """Distinct questions of a task as text: (prompt, answers, index of the right answer).

    Raises:
        ValueError: no such task, or fewer different questions than asked for.
    """
    if task not in QUESTIONS:
        raise ValueError(f"task={task!r} does not exist; choose from {', '.join(QUESTIONS)}")
    draw = random.Random(f"{task} {seed}")
    found: dict[str, Question] = {}
    for _ in range(100 * count):
        question = QUESTIONS[task](draw)
        found.setdefault(question[0], question)
        if len(found) == count:
            return list(found.values())
    raise ValueError(f"count={count} is more than the {len(found)} different questions of {task}")


def questions(tokenizer: Any, task: str, count: int, seed: int) -> list[Sample]:
    """Samples of `draw_questions`: `input_ids`, `choices`, `characters`, `label`, `answer`; at most 30 tokens or so."""
    return [question_of(tokenizer, *question) for question in draw_questions(task, count, seed)]


def text(tokenizer: Any, tokens: int, seed: int) -> Tensor:
    """(1, tokens) ids of plain sentences, one after another."""
    draw = random.Random(f"text {seed}")
    sentences: list[str] = []
    while True:
        sentences += [sentence(draw) for _ in range(tokens // 8 + 8)]
        ids = encode(tokenizer, " ".join(sentences), chat=False)
        if len(ids) >= tokens:
            return torch.tensor([ids[:tokens]])


def hidden(
    tokenizer: Any,
    draw: random.Random,
    tokens: int,
    depth: float,
    content: Callable[[str, str], str],
    marked: str,
    answer_start: str,
    key: str,
    chat: bool,
) -> Sample:
    """`content` with sentences before and after its needle, `tokens` long; `needle` is the span of `marked`."""

    def prompt_with(sentences: Sequence[str]) -> str:
        at = round(depth * len(sentences))
        return asked(tokenizer, content(" ".join(sentences[:at]), " ".join(sentences[at:])), answer_start, chat)

    sentences = fill(tokenizer, draw, prompt_with, tokens, chat)
    prompt = prompt_with(sentences)
    ids = encode(tokenizer, prompt, chat)
    return {
        "input_ids": torch.tensor([ids]),
        "needle": span_of(tokenizer, prompt, marked, chat),
        "answer": continuation(tokenizer, prompt, " " + key, chat),
        "key": key,
    }


def fill(
    tokenizer: Any, draw: random.Random, prompt_with: Callable[[Sequence[str]], str], tokens: int, chat: bool
) -> list[str]:
    """Sentences with which the prompt has exactly `tokens` tokens."""

    def length(sentences: Sequence[str]) -> int:
        return len(encode(tokenizer, prompt_with(sentences), chat))

    bare = length([])
    if bare > tokens:
        raise ValueError(f"tokens={tokens} are too few: the question and the needle alone take {bare}")
    sizes = [len(encode(tokenizer, " " + sentence(random.Random(seed)), chat=True)) for seed in range(64)]
    sentences: list[str] = []
    total = bare
    while total < tokens - 3 * max(sizes):  # the sizes of sentences add up but for a token here and there
        sentences += [sentence(draw) for _ in range(max(1, (tokens - total) // max(sizes) - 3))]
        total = length(sentences)
    for _ in range(2000):  # the last ones are drawn until they fit
        last = [
            sentence(draw) for _ in range(round((tokens - total) / (sum(sizes) / len(sizes))) + draw.randint(-1, 1))
        ]
        if length([*sentences, *last]) == tokens:
            return [*sentences, *last]
    raise ValueError(f"no sentences fill a prompt up to exactly tokens={tokens}; take some tokens more")


def asked(tokenizer: Any, content: str, answer_start: str, chat: bool) -> str:
    """The text of a prompt: what the user writes, and the words with which the answer begins."""
    if not chat or tokenizer.chat_template is None:
        return f"{content} {answer_start}"
    messages = [{"role": "user", "content": content}]
    return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True) + answer_start


def encode(tokenizer: Any, prompt: str, chat: bool) -> list[int]:
    """Token ids; a chat template writes the special tokens itself."""
    return tokenizer(prompt, add_special_tokens=not (chat and tokenizer.chat_template is not None)).input_ids


def span_of(tokenizer: Any, prompt: str, part: str, chat: bool) -> tuple[int, int]:
    """(start, stop) of the tokens of the prompt that hold any character of `part`, which occurs in it."""
    special = not (chat and tokenizer.chat_template is not None)
    offsets = tokenizer(prompt, add_special_tokens=special, return_offsets_mapping=True).offset_mapping
    first = prompt.index(part)
    last = first + len(part)
    inside = [i for i, (start, stop) in enumerate(offsets) if start < last and stop > first]
    return inside[0], inside[-1] + 1


def continuation(tokenizer: Any, prompt: str, answer: str, chat: bool) -> list[int]:
    """Ids of an answer after a prompt, in the tokens that both have together.

    Raises:
        ValueError: the answer changes the tokens of the prompt, so that it cannot be scored after it.
    """
    ids, both = encode(tokenizer, prompt, chat), encode(tokenizer, prompt + answer, chat)
    if both[: len(ids)] != ids:
        raise ValueError(f"the tokens of {prompt[-20:]!r} change with {answer!r} after them; end the prompt in a word")
    return both[len(ids) :]


def question_of(tokenizer: Any, prompt: str, answers: Sequence[str], label: int, chat: bool = False) -> Sample:
    """A prompt with answers to choose from."""
    choices = [continuation(tokenizer, prompt, " " + answer, chat) for answer in answers]
    return {
        "input_ids": torch.tensor([encode(tokenizer, prompt, chat)]),
        "choices": choices,
        "characters": [len(answer) for answer in answers],
        "label": label,
        "answer": choices[label],
    }
