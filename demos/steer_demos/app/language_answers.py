"""A prompt answered without and with a method, for the tab of language models: what is written, and how fast."""

from __future__ import annotations

import re
import time
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel, StoppingCriteria, StoppingCriteriaList

import steer
from steer.method import Method
from steer_demos.app import drawing
from steer_demos.app.jobs import Job
from steer_demos.app.stage import Loaded
from steer_demos.language_measures import cache_bytes

LONGEST_PROMPT = 10_000  # characters
MOST_TOKENS = 2_000  # of a prompt
MOST_NEW = 200  # tokens of an answer
MOST_TEMPERATURE = 2.0
DIFFERS = "the first difference"
SHOWN = 60  # characters of the answer that are shown while it is written

Part = tuple[str, str | None]  # text and its mark, as gr.HighlightedText takes them


@dataclass(frozen=True, eq=False)
class Answer:
    """What a model wrote.

    Args:
        tokens: ids, the one that ends the answer included.
        text: the same, without the tokens that a reader does not see.
        first: seconds until the first token, in which the prompt is read.
        per_second: tokens a second after it; None for one token.
        cache: bytes of the keys and values at the end.
        logits: of each token, (V,).
    """

    tokens: list[int]
    text: str
    first: float
    per_second: float | None
    cache: int
    logits: tuple[Tensor, ...]

    def __str__(self) -> str:
        speed = "" if self.per_second is None else f", then {self.per_second:.1f} a second"
        count = "1 token" if len(self.tokens) == 1 else f"{len(self.tokens)} tokens"
        return f"{count}, the first after {self.first:.2f} s{speed}; {self.cache / 1e6:.2f} MB in the cache"


@dataclass(frozen=True, eq=False)
class Pair:
    """Two answers to one prompt.

    Args:
        before, after: without and with the method.
        prompt: tokens of it.
        summary: where the method acted.
    """

    before: Answer
    after: Answer
    prompt: int
    summary: str

    @property
    def same(self) -> int:
        """Tokens that both have before the first different one."""
        pairs = list(zip(self.before.tokens, self.after.tokens, strict=False))
        return next((place for place, (one, other) in enumerate(pairs) if one != other), len(pairs))

    @property
    def are_equal(self) -> bool:
        return self.before.tokens == self.after.tokens

    @property
    def kl(self) -> float:
        """KL divergence of the next token, without || with, in nats: mean over the places that read the same text."""
        found = [
            float((one.log_softmax(-1).exp() * (one.log_softmax(-1) - other.log_softmax(-1))).sum())
            for one, other in list(zip(self.before.logits, self.after.logits, strict=False))[: self.same + 1]
        ]
        return sum(found) / len(found)

    def marked(self, tokenizer: Any) -> tuple[list[Part], list[Part]]:
        """Both texts, with the word marked in which the first different token is."""
        common = tokenizer.decode(self.before.tokens[: self.same], skip_special_tokens=True).rstrip("\ufffd")
        return _marked(self.before.text, common), _marked(self.after.text, common)

    def figures(self, method: Method) -> dict[str, str]:
        """What was measured, as rows of a table."""
        apart = f"KL divergence {self.kl:.2g} nats a token, over what reads the same text"
        if self.are_equal:
            apart = f"none in what they write; {apart}"
        else:
            apart = f"from token {self.same + 1} on; {apart}"
        return {
            "prompt": f"{self.prompt} tokens",
            "without": str(self.before),
            f"with {type(method).__name__}": str(self.after),
            "difference": apart,
        }


def _marked(text: str, common: str) -> list[Part]:
    kept = common if text.startswith(common) else ""
    word = re.match(r"\s*\S*", text[len(kept) :])
    stop = len(kept) + (word.end() if word else 0)
    return [part for part in ((kept, None), (text[len(kept) : stop], DIFFERS), (text[stop:], None)) if part[0]]


def answer_pair(
    loaded: Loaded,
    method: Method,
    prompt: str,
    job: Job,
    *,
    chat: bool,
    new_tokens: float,
    temperature: float,
    seed: int,
) -> Pair:
    """Let a model answer without and with a method, from the same seed; it can be stopped between two tokens.

    Args:
        loaded: a language model.
        chat: put the prompt into the tokenizer's chat template; else it is continued.
        new_tokens: of each answer, at most.
        temperature: 0 = always the likeliest token.

    Raises:
        ValueError: what cannot be read or written, in words.
    """
    if not 1 <= new_tokens <= MOST_NEW or new_tokens != int(new_tokens):
        raise ValueError(f"new_tokens={new_tokens:g} must be a whole number from 1 to {MOST_NEW}")
    if not 0 <= temperature <= MOST_TEMPERATURE:
        raise ValueError(f"temperature={temperature:g} must be a number from 0 to {MOST_TEMPERATURE:g}")
    new_tokens = int(new_tokens)
    ids = read(loaded, prompt, chat, room=new_tokens)
    steer.apply(loaded.model, method).remove()  # what the model refuses, it refuses before the first token
    warm_up(loaded, ids, job)
    writing: dict[str, Any] = {"new_tokens": new_tokens, "temperature": temperature, "seed": seed}
    before = write(loaded, ids, job, what="without", **writing)
    with steer.apply(loaded.model, method) as handle:
        after = write(loaded, ids, job, what=f"with {type(method).__name__}", is_second=True, **writing)
        summary = handle.summary()
    return Pair(before, after, ids.shape[1], summary)


def read(loaded: Loaded, prompt: str, chat: bool, *, room: int = 0, most: int = MOST_TOKENS) -> Tensor:
    """(1, S) tokens of a prompt, on the model's device.

    Args:
        chat: in the tokenizer's chat template, up to where the answer begins.
        room: tokens that must fit after it.
        most: tokens that it may have.

    Raises:
        ValueError: it is empty or too long, or there is no template.
    """
    tokenizer, model = loaded.processor, loaded.model
    if not prompt.strip():
        raise ValueError("the prompt is empty: ask something, or begin a text")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt)} characters; at most {LONGEST_PROMPT} are taken")
    if chat and not tokenizer.chat_template:
        raise ValueError(f"{loaded.name} has no chat template: choose to continue the text")
    if chat:
        message = [{"role": "user", "content": prompt}]
        prompt = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    ids = tokenizer(prompt, add_special_tokens=not chat, return_tensors="pt").input_ids
    check_length(model, ids.shape[1], room=room, most=most)
    return ids.to(model.device)


def check_length(model: PreTrainedModel, tokens: int, *, room: int, most: int = MOST_TOKENS) -> None:
    """Refuse a prompt that is longer than the app takes, or than the model was made for."""
    if tokens > most:
        raise ValueError(f"the prompt has {tokens} tokens; at most {most} are taken here")
    trained = getattr(model.config, "max_position_embeddings", None)
    if trained is not None and tokens + room > trained:
        raise ValueError(
            f"the prompt has {tokens} tokens and the answer up to {room}; the model reads {trained} in all"
        )


def warm_up(loaded: Loaded, ids: Tensor, job: Job) -> None:
    """Let the model write one token, so that what happens once is not timed."""
    if not loaded.warm:
        job.step(0, 1, "first token of this model")
        write(loaded, ids[:, :32], Job(), new_tokens=1)
        loaded.warm = True


def write(
    loaded: Loaded,
    ids: Tensor,
    job: Job,
    *,
    new_tokens: int,
    temperature: float = 0.0,
    seed: int = 0,
    what: str = "",
    is_second: bool = False,
) -> Answer:
    """What the model writes after a prompt, as it is steered now.

    Args:
        ids: (1, S).
        new_tokens: at most.
        temperature: 0 = always the likeliest token.
        what: said with the progress.
        is_second: of two answers, which the progress counts together.

    Raises:
        Stopped: between two tokens.
    """
    model, tokenizer = loaded.model, loaded.processor
    watch = Watch(job, tokenizer, ids.shape[1], new_tokens, what, is_second)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    torch.manual_seed(seed)
    began = time.perf_counter()
    with torch.no_grad():
        output = model.generate(
            ids,
            attention_mask=torch.ones_like(ids),
            max_new_tokens=new_tokens,
            num_beams=1,
            pad_token_id=tokenizer.pad_token_id or 0,
            stopping_criteria=StoppingCriteriaList([watch]),
            return_dict_in_generate=True,
            output_logits=True,
            **options,
        )
    tokens = output.sequences[0, ids.shape[1] :].tolist()
    first, last = watch.times[0], watch.times[-1]
    return Answer(
        tokens,
        tokenizer.decode(tokens, skip_special_tokens=True),
        first - began,
        (len(tokens) - 1) / (last - first) if len(tokens) > 1 else None,
        cache_bytes(output.past_key_values),
        tuple(logits[0].float().cpu() for logits in output.logits),
    )


class Watch(StoppingCriteria):
    """Reports every token as it is written, and when. It never ends an answer, but the visitor may."""

    def __init__(self, job: Job, tokenizer: Any, prompt: int, new_tokens: int, what: str, is_second: bool) -> None:
        self.times: list[float] = []
        self._job, self._tokenizer, self._prompt, self._what = job, tokenizer, prompt, what
        self._start, self._total = new_tokens if is_second else 0, 2 * new_tokens
        job.step(self._start, self._total, f"{what}: reads {prompt} tokens")

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Any:
        self.times.append(time.perf_counter())
        text = self._tokenizer.decode(input_ids[0, self._prompt :], skip_special_tokens=True)
        end = text if len(text) <= SHOWN else "… " + text[-SHOWN:]
        self._job.step(self._start + len(self.times), self._total, f"{self._what}: {' '.join(end.split())}")
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def python(loaded: Loaded, method: str, prompt: str, chat: bool, new_tokens: int, temperature: float) -> str:
    """The steered answer as code to copy.

    Args:
        method: as an expression of Python.
    """
    inputs = f"tokenizer({prompt!r}, return_tensors='pt')"
    if chat:
        message = [{"role": "user", "content": prompt}]
        inputs = (
            f"tokenizer.apply_chat_template(\n    {message!r},\n"
            "    add_generation_prompt=True, return_dict=True, return_tensors='pt',\n)"
        )
    sampling = f"do_sample=True, temperature={temperature:g}" if temperature > 0 else "do_sample=False"
    return (
        f"{drawing.imports(method)}import steer\nfrom steer_demos import models\n\n"
        f"model, tokenizer = models.load({loaded.name!r})\n"
        f"inputs = {inputs}\n"
        f"with steer.apply(model, {method}):\n"
        f"    out = model.generate(**inputs, max_new_tokens={new_tokens}, {sampling})\n"
        "print(tokenizer.decode(out[0, inputs['input_ids'].shape[1]:], skip_special_tokens=True))\n"
    )
