"""Where the question stands in a chat prompt, and which of its tokens are content words, from token ids alone."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from PIL import Image

from steer_patches.generation import Text

PROBES = ("Where is the blue boat?", "Can you count all 7 horses")  # nothing in common at either end
BEGINS, SEPARATES, FUNCTION = range(3)  # rows of `QuestionTemplate.words`
FUNCTION_WORDS = """\
a an the this that these those some any each every no all both either neither such another other
i you he she it we they me him her us them my your his its our their mine yours hers ours theirs
myself yourself himself herself itself ourselves yourselves themselves one ones there here
who whom whose which what where when why how
is am are was were be been being do does did done have has had having can could will would shall should may might
must not n't
of in on at by for to from with without into onto over under about above below between among through during
before after against along around behind beside besides beyond near off out up down upon within than as like
and or but nor so if because while although though unless until whether since
please\
"""


@dataclass(frozen=True, eq=False)
class QuestionTemplate:
    """What a chat template puts around a question, and which token ids are words.

    Args:
        before: tokens between the last token of the picture before the question and the question's first.
        after: tokens of the prompt after the question's last.
        words: (3, vocabulary) bool: whether a token begins a word; whether it separates words (punctuation, white
            space, marks of the template); whether it is, by itself, a function word.
    """

    before: int
    after: int
    words: torch.Tensor


def question_template(processor: Any) -> QuestionTemplate:
    """Measure a chat template: the prompts of two questions are made, and what they have in common is the template.

    Args:
        processor: a transformers processor with a chat template, which is given a picture before the question; or a
            tokenizer, with which the question is taken to follow the picture at once (before = 0).

    Raises:
        ValueError: no chat template; or no question, or no picture, in the prompts that it makes.
    """
    tokenizer = getattr(processor, "tokenizer", processor)
    if getattr(processor, "chat_template", None) is None:
        raise ValueError(
            f"{type(processor).__name__} has no chat template, so it is not known where a question stands: set "
            "processor.chat_template, or count the tokens of your own prompts and give before= and after="
        )
    picture = processor is not tokenizer
    first, second = (_prompt(processor, probe, picture) for probe in PROBES)
    start, end = _shared(first, second), _shared(first[::-1], second[::-1])
    if start + end >= min(len(first), len(second)):
        raise ValueError(f"the chat template of {type(processor).__name__} leaves the user's question out")
    before = 0
    if picture:
        marks = [place for place, token in enumerate(first[:start]) if token == processor.image_token_id]
        if not marks:
            raise ValueError(
                f"the chat template of {type(processor).__name__} puts no picture before the question: give before= "
                "and after= yourself"
            )
        before = start - marks[-1] - 1
    return QuestionTemplate(before, end, words_of(tokenizer))


def _prompt(processor: Any, question: str, picture: bool) -> list[int]:
    """The token ids of a chat in which `question` is asked, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}] if picture else question
    chat = [{"role": "user", "content": content}]
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    if not picture:
        return list(processor(text, add_special_tokens=False)["input_ids"])
    ids = processor(text=[text], images=[Image.new("RGB", (64, 64))])["input_ids"]
    return [int(token) for token in ids[0]]


def _shared(first: list[int], second: list[int]) -> int:
    """How many tokens two prompts begin with in common."""
    pairs = zip(first, second, strict=False)
    return next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(first), len(second)))


def words_of(tokenizer: Any) -> torch.Tensor:
    """(3, vocabulary) bool, see `QuestionTemplate.words`."""
    size = len(tokenizer)
    pieces, special = tokenizer.convert_ids_to_tokens(range(size)), set(tokenizer.all_special_ids)
    special |= {token for token, added in tokenizer.added_tokens_decoder.items() if added.special}
    function = set(FUNCTION_WORDS.split())
    words = torch.zeros(3, size, dtype=torch.bool)
    for token, text in enumerate(tokenizer.batch_decode([[token] for token in range(size)])):
        piece, letters = pieces[token] or "", text.strip().lower()
        partial = "\ufffd" in letters  # some bytes of a character
        words[BEGINS, token] = piece.startswith(("\u0120", "\u2581", " "))  # as byte-level BPE, SentencePiece write it
        words[SEPARATES, token] = token in special or not (partial or any(map(str.isalnum, letters)))
        words[FUNCTION, token] = letters in function
    return words


def question_of(text: Text, before: int, after: int, end: torch.Tensor | None = None) -> torch.Tensor:
    """(B, S) bool: the prompt's real tokens after the last picture of their row, without those around the question.

    Args:
        before, after: as in `QuestionTemplate`.
        end: (B,) int64, the last token of the prompt, which candidates may follow; None = all are of it.
    """
    assert text.pictures is not None
    last = text.pictures.last[:, None]
    at = torch.arange(text.new, device=last.device)
    follows = (at > last) & (last >= 0)
    if end is not None:
        follows = follows & (at <= end[:, None].to(at.device))
    if text.valid is not None:
        follows = follows & text.valid.to(last.device)
    rank = follows.cumsum(-1)  # of the first: 1
    return follows & (rank > before) & (rank <= rank[:, -1:] - after)


def content_tokens(ids: torch.Tensor, question: torch.Tensor, words: torch.Tensor) -> torch.Tensor:
    """(B, S) bool: the question's tokens that belong to content words.

    A word begins with a token that says so, at the question's start and after what separates words; it goes on to the
    next one. It is a content word, with all of its tokens, unless it is a single token and a function word.

    Args:
        ids: (B, S) int64. question: (B, S) bool. words: see `QuestionTemplate.words`; ids beyond it separate.
    """
    known = ids < words.shape[1]
    begins, separates, function = words.to(ids.device)[:, ids.clamp(max=words.shape[1] - 1)]
    separates = separates | ~known | ~question
    after = torch.nn.functional.pad(separates, (1, 0), value=True)[:, :-1]
    begins = begins | separates | after
    alone = begins & torch.nn.functional.pad(begins, (0, 1), value=True)[:, 1:]
    return question & ~separates & ~(function & alone)
