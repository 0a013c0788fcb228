"""What `steer eval llm` measures on a language model, steered or not.

Every measure takes (model, tokenizer, method or None, settings) and returns a dict that JSON can hold: figures are
{"mean", "interval", "samples"} with a 95 % bootstrap interval, and `values` are the same for each sample, so that two
methods can be compared on the same samples (`difference`).
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm import tqdm
from transformers import Cache, DynamicCache, PreTrainedModel

import steer
from steer.method import Method
from steer_demos.intervals import share
from steer_demos.language_probes import Sinks, Watch
from steer_demos.language_tasks import Sample, asked, encode, passkey, questions, recall, text
from steer_demos.language_words import OBJECTS, PLACES

Figures = dict[str, Any]

TOKENS_AT_ONCE = 2048  # of the prompts in one batch
DEPTHS = (0.1, 0.3, 0.5, 0.7, 0.9)


@contextmanager
def steered(model: PreTrainedModel, *methods: Method | None) -> Iterator[steer.Handle | None]:
    """The model with these methods, those that are None left out."""
    chosen = [method for method in methods if method is not None]
    if not chosen:
        yield None
        return
    with steer.apply(model, *chosen) as handle:
        yield handle


def figure(values: Sequence[float] | np.ndarray) -> Figures:
    """The mean of some values with its 95 % bootstrap interval."""
    mean, interval = share(np.asarray(values, dtype=float))
    return {"mean": mean, "interval": list(interval), "samples": len(values)}


def difference(values: Sequence[float], others: Sequence[float]) -> Figures:
    """The mean of the paired differences values - others, on the same samples, with its interval."""
    return figure(np.asarray(values, dtype=float) - np.asarray(others, dtype=float))


def compared(rows: Mapping[str, Figures], name: str, against: str) -> Figures:
    """What the row `name` has more than the row `against`, in all that both measured on the same samples."""
    values, others = rows[name]["values"], rows[against]["values"]
    return {measure: difference(values[measure], others[measure]) for measure in values}


def passkey_grid(
    model: PreTrainedModel,
    tokenizer: Any,
    method: Method | None = None,
    *,
    lengths: Sequence[int] = (512, 1024, 2048, 4096),
    depths: Sequence[float] = DEPTHS,
    trials: int = 1,
    seed: int = 0,
) -> Figures:
    """Whether the model repeats a number from a long text, and the log-probability of the number.

    Args:
        lengths: of the prompts, in tokens.
        depths: shares of the text before the number.
        trials: numbers and texts of each length and depth.
        seed: of the first trial; the others count up.

    Returns:
        `found` and `log_prob` (of the whole number, natural logarithm) as figures, and `cells` by length and depth.
    """
    cells = []
    for tokens in tqdm(lengths, desc="pass keys", leave=False):
        samples = [passkey(tokenizer, tokens, depth, seed + trial) for depth in depths for trial in range(trials)]
        scored = answers(model, tokenizer, samples, method)
        cells += [
            {"tokens": tokens, "depth": depth, **result}
            for depth, result in zip(np.repeat(depths, trials).tolist(), scored, strict=True)
        ]
    return {
        "found": figure([cell["found"] for cell in cells]),
        "log_prob": figure([cell["log_prob"] for cell in cells]),
        "values": {name: [cell[name] for cell in cells] for name in ("found", "log_prob")},
        "cells": cells,
    }


def answers(
    model: PreTrainedModel, tokenizer: Any, samples: Sequence[Sample], method: Method | None = None
) -> list[dict[str, Any]]:
    """For each prompt whether the greedy answer holds the key, and the log-probability of the right answer.

    The right answer is fed token by token, with the cache, as it would be generated. Only where the model would have
    written something else, it generates, for an answer that gets to the key later.
    """
    results: dict[int, dict[str, Any]] = {}
    with steered(model, method), torch.no_grad():
        for places, batch in by_size(samples, lambda sample: (sample["input_ids"].shape[1], len(sample["answer"]))):
            prompts = torch.cat([sample["input_ids"] for sample in batch]).to(model.device)
            answer = torch.tensor([sample["answer"] for sample in batch], device=model.device)
            cache = new_cache(model)
            output = model(prompts, past_key_values=cache, use_cache=True, logits_to_keep=1)
            right, total = torch.ones(len(batch), dtype=torch.bool), torch.zeros(len(batch))
            for step in range(answer.shape[1]):
                logits = output.logits[:, -1].float()
                total += logits.log_softmax(-1).gather(1, answer[:, step, None])[:, 0].cpu()
                right &= (logits.argmax(-1) == answer[:, step]).cpu()
                if step + 1 < answer.shape[1]:
                    output = model(answer[:, step, None], past_key_values=cache, use_cache=True)
            del cache, output
            for place, sample, ok, log_prob in zip(places, batch, right.tolist(), total.tolist(), strict=True):
                found = ok or sample["key"] in generated(model, tokenizer, sample)
                results[place] = {"found": float(found), "log_prob": log_prob}
    return [results[place] for place in range(len(samples))]


def generated(model: PreTrainedModel, tokenizer: Any, sample: Sample) -> str:
    """The greedy answer to a prompt, a few tokens longer than the right one."""
    prompt = sample["input_ids"].to(model.device)
    ids = model.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        max_new_tokens=len(sample["answer"]) + 4,
        do_sample=False,
        pad_token_id=0,
    )
    return tokenizer.decode(ids[0, prompt.shape[1] :])


def multi_key_recall(
    model: PreTrainedModel,
    tokenizer: Any,
    method: Method | None = None,
    *,
    pairs: Sequence[int] = (4, 8, 16),
    count: int = 34,
    seed: int = 0,
) -> Figures:
    """Which of the listed words the model takes for the one that is asked for.

    Args:
        pairs: names and words in a prompt.
        count: prompts of each number of pairs.
        seed: of the first prompt.

    Returns:
        `accuracy` (choice over the listed words), `log_prob` of the right word, and `accuracy_at` each number of pairs.
    """
    values: dict[str, list[float]] = {"accuracy": [], "log_prob": []}
    at = {}
    for number in tqdm(pairs, desc="recall", leave=False):
        samples = [recall(tokenizer, number, seed + index) for index in range(count)]
        scored = choice_log_probs(model, samples, method)
        right = [float(np.argmax(scores) == sample["label"]) for scores, sample in zip(scored, samples, strict=True)]
        values["accuracy"] += right
        values["log_prob"] += [scores[sample["label"]] for scores, sample in zip(scored, samples, strict=True)]
        at[str(number)] = figure(right)
    return {name: figure(found) for name, found in values.items()} | {"accuracy_at": at, "values": values}


def choice_accuracy(
    model: PreTrainedModel,
    tokenizer: Any,
    method: Method | None = None,
    *,
    tasks: Sequence[str] = ("sentiment", "topic", "kind"),
    count: int = 100,
    seed: int = 0,
) -> Figures:
    """Accuracy of the answer with the highest log-probability, for each task; see `score_choices`."""
    drawn = {task: questions(tokenizer, task, count, seed) for task in tasks}
    return {task: score_choices(model, samples, method) for task, samples in drawn.items()}


def score_choices(model: PreTrainedModel, samples: Sequence[Sample], method: Method | None = None) -> Figures:
    """Accuracy by the sum of the log-probabilities of an answer's tokens, as lm-eval counts it.

    Returns:
        `accuracy`; `accuracy_by_length`, of the sum over the answer's length in characters; `margin`, the right
        answer's sum less the best other one; and `values` of each.
    """
    values: dict[str, list[float]] = {"accuracy": [], "accuracy_by_length": [], "margin": []}
    for scores, sample in zip(choice_log_probs(model, samples, method), samples, strict=True):
        label, sums = sample["label"], np.array(scores)
        values["accuracy"].append(float(sums.argmax() == label))
        values["accuracy_by_length"].append(float((sums / np.array(sample["characters"])).argmax() == label))
        values["margin"].append(float(sums[label] - np.delete(sums, label).max()))
    return {name: figure(found) for name, found in values.items()} | {"values": values}


def choice_log_probs(
    model: PreTrainedModel, samples: Sequence[Sample], method: Method | None = None
) -> list[list[float]]:
    """The log-probability of each choice of each sample after its prompt.

    Prompts and answers are read in one forward, without padding; where all answers are one token, the prompt alone is.
    """
    rows: list[tuple[list[int], list[int]]] = []
    for sample in samples:
        prompt = sample["input_ids"][0].tolist()
        rows += [(prompt, [])] if single(sample) else [(prompt, choice) for choice in sample["choices"]]
    scored: dict[int, Tensor] = {}  # by row: the sum over an answer, or of all single tokens
    with steered(model, method), torch.no_grad():
        for places, batch in by_size(rows, lambda row: (len(row[0]) + len(row[1]), len(row[1]))):
            ids = torch.tensor([prompt + choice for prompt, choice in batch], device=model.device)
            logits = model(ids, use_cache=False, logits_to_keep=len(batch[0][1]) + 1).logits.float().cpu()
            for place, (_, choice), row in zip(places, batch, logits.log_softmax(-1), strict=True):
                scored[place] = row[:-1].gather(1, torch.tensor(choice)[:, None]).sum() if choice else row[0]
    ordered = iter([scored[place] for place in range(len(rows))])
    found = []
    for sample in samples:
        choices = sample["choices"]
        if single(sample):
            log_probs = next(ordered)
            found.append([float(log_probs[choice[0]]) for choice in choices])
        else:
            found.append([float(next(ordered)) for _ in choices])
    return found


def single(sample: Sample) -> bool:
    """Whether every answer to choose from is one token."""
    return all(len(choice) == 1 for choice in sample["choices"])


def dense_agreement(
    model: PreTrainedModel,
    samples: Sequence[Sample],
    method: Method | None,
    dense: Sequence[Tensor] | None = None,
) -> Figures:
    """How close the steered model stays to the dense one where it answers.

    Args:
        samples: prompts with `answer`.
        dense: `answer_logits` of the samples, where they are known.

    Returns:
        `kl` (KL(dense || steered) in nats, mean over an answer's tokens), `top1` (share of the tokens at which both
        have the same first choice), `log_prob` and `right` of the answer; `error`: for each layer the relative error
        of the attention output against dense attention over the same queries, keys and values; `mass`: the dense
        attention that falls on the kept keys, where the method says which it keeps; `density`.
    """
    watch = Watch()
    values: dict[str, list[float]] = {"kl": [], "top1": [], "log_prob": [], "right": []}
    density = []
    wanted = [answer_logits(model, sample) for sample in samples] if dense is None else dense
    for sample, expected in tqdm(zip(samples, wanted, strict=True), "agreement", len(samples), leave=False):
        with steered(model, watch, method) as handle:
            other = answer_logits(model, sample)
            density.append(density_of(handle))
        answer = torch.tensor(sample["answer"])
        values["kl"].append(float(F.kl_div(other, expected, log_target=True, reduction="none").sum(-1).mean()))
        values["top1"].append(float((expected.argmax(-1) == other.argmax(-1)).float().mean()))
        values["log_prob"].append(float(other.gather(1, answer[:, None]).sum()))
        values["right"].append(float((other.argmax(-1) == answer).all()))
    measured = [value for value in density if value is not None]
    return {name: figure(found) for name, found in values.items()} | {
        "error": {name: float(np.mean(found)) for name, found in watch.errors.items()},
        "mass": {name: float(np.mean(found)) for name, found in watch.masses.items()},
        "density": float(np.mean(measured)) if measured else None,
        "values": values,
    }


def answer_logits(model: PreTrainedModel, sample: Sample) -> Tensor:
    """(A, V) log-probabilities at the A tokens of the answer, all read in one forward."""
    ids = torch.cat([sample["input_ids"], torch.tensor([sample["answer"][:-1]], dtype=torch.long)], 1)
    with torch.no_grad():
        output = model(ids.to(model.device), logits_to_keep=len(sample["answer"]), use_cache=True)
    return output.logits[0].float().log_softmax(-1).cpu()


def density_of(handle: steer.Handle | None) -> float | None:
    """The share of the map that the steered model computed last, where a method says so."""
    found = [] if handle is None else [entry.get("density") for entry in handle.stats["methods"]]
    return next((value for value in found if value is not None), None)


def loss_by_length(
    model: PreTrainedModel,
    ids: Tensor,
    method: Method | None = None,
    *,
    chunk: int = 256,
    bucket: int = 1024,
    start: int = 0,
    name: str = "loss",
) -> Figures:
    """The loss of each part of a long text, fed piece by piece with the cache, and the bytes that the cache holds.

    Args:
        ids: (1, N) tokens.
        chunk: tokens of a forward; 1 = as in generation.
        bucket: tokens of a part.
        start: tokens that are read, but not counted.
        name: for the progress bar.

    Returns:
        `loss`, over all of it; `parts`: a list of {"tokens" read so far, "loss", "cache_bytes"}; `values`: means over
        32 tokens each, which are resampled for the intervals because neighbouring tokens depend on one another.
    """
    losses: list[Tensor] = []
    bytes_at: dict[int, int] = {}
    cache, tokens = new_cache(model), ids.shape[1]
    ids = ids.to(model.device)
    with steered(model, method), torch.no_grad():
        for at in tqdm(range(0, tokens, chunk), desc=name, leave=False):
            part = ids[:, at : at + chunk]
            logits = model(part, past_key_values=cache, use_cache=True).logits[0].float()
            targets = ids[0, at + 1 : at + 1 + part.shape[1]]
            losses.append(F.cross_entropy(logits[: len(targets)], targets, reduction="none").cpu())
            bytes_at[at + part.shape[1]] = cache_bytes(cache)
    loss = torch.cat(losses)
    parts = []
    for at in range(start, tokens - 1, bucket):
        stop = min(at + bucket, tokens)
        held = bytes_at[min(end for end in bytes_at if end >= stop)]
        parts.append({"tokens": stop, "loss": figure(in_blocks(loss[at:stop])), "cache_bytes": held})
    blocks = in_blocks(loss[start:])
    return {"loss": figure(blocks), "parts": parts, "values": {"loss": blocks}}


def in_blocks(loss: Tensor, size: int = 32) -> list[float]:
    """Means of `size` neighbouring values each; of all of them where they are fewer."""
    whole = len(loss) // size * size
    return loss[:whole].reshape(-1, size).mean(1).tolist() if whole else [float(loss.mean())]


def new_cache(model: PreTrainedModel) -> Cache:
    """An empty cache of the kind that the model itself makes."""
    return DynamicCache(config=model.config)


def cache_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds."""
    held = 0
    for layer in cache.layers:
        own = getattr(layer, "nbytes", None)
        tensors = [getattr(layer, name, None) for name in ("keys", "values")]
        held += own if own is not None else sum(x.numel() * x.element_size() for x in tensors if x is not None)
    return held


def generated_text(model: PreTrainedModel, tokenizer: Any, tokens: int, seed: int, rows: int = 64) -> Tensor:
    """(1, tokens) ids of stories that the model itself tells, one after another, sampled with a fixed seed."""
    each = -(-tokens // rows)
    draw = random.Random(f"stories {seed}")
    requests = [f"Tell me a long story about {draw.choice(OBJECTS)} {draw.choice(PLACES)}." for _ in range(rows)]
    prompts = [encode(tokenizer, asked(tokenizer, request, "", True), True) for request in requests]
    width = max(map(len, prompts))
    ids = torch.tensor([[0] * (width - len(prompt)) + prompt for prompt in prompts], device=model.device)
    mask = torch.tensor([[0] * (width - len(prompt)) + [1] * len(prompt) for prompt in prompts], device=model.device)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        stories = model.generate(
            ids, attention_mask=mask, do_sample=True, max_new_tokens=each, min_new_tokens=each, pad_token_id=0
        )
    return stories[:, width:].reshape(1, -1)[:, :tokens].cpu()


def sink_statistics(
    model: PreTrainedModel,
    tokenizer: Any,
    method: Method | None = None,
    *,
    tokens: int = 256,
    texts: int = 4,
    alpha: float = 5.0,
    seed: int = 0,
) -> Figures:
    """Where attention gathers: on the first token, and on others that every query looks at.

    What is read are the softmax maps of each layer's queries and keys, as they come in: a method's own change of these
    maps is not in them, that of the layers before is.

    Args:
        tokens: of each text.
        texts: that the means are taken over.
        alpha: another token is a sink of a head if it gets more than alpha / tokens on average.

    Returns:
        `first`: (layers, heads) mean weight on the first token; `sinks`: (layers, heads) number of others above the
        threshold; as figures over the texts how many heads give the first token more than 0.3 (`heads_on_first`), how
        many have another sink (`heads_with_sinks`), and how many pairs of a head and another token lie above 0.1
        (`pairs_above_0.1`); and the same after the tokenizer's beginning-of-text token, as `with_bos`.
    """

    def read(bos: bool) -> Figures:
        first, sinks = [], []
        counts: dict[str, list[float]] = {"heads_on_first": [], "heads_with_sinks": [], "pairs_above_0.1": []}
        for index in tqdm(range(texts), desc="sinks", leave=False):
            ids = text(tokenizer, tokens, seed + index)
            if bos:
                ids = torch.cat([torch.tensor([[tokenizer.bos_token_id]]), ids[:, :-1]], 1)
            watch = Sinks()
            with steered(model, watch, method), torch.no_grad():
                model(ids.to(model.device), use_cache=False, logits_to_keep=1)
            columns = torch.stack(list(watch.columns.values()))
            first.append(columns[..., 0])
            sinks.append((columns[..., 1:] > alpha / tokens).sum(-1))
            counts["heads_on_first"].append(float((first[-1] > 0.3).sum()))
            counts["heads_with_sinks"].append(float((sinks[-1] > 0).sum()))
            counts["pairs_above_0.1"].append(float((columns[..., 1:] > 0.1).sum()))
        return {
            "first": torch.stack(first).mean(0).tolist(),
            "sinks": torch.stack(sinks).float().mean(0).tolist(),
            "values": counts,
        } | {name: figure(found) for name, found in counts.items()}

    starts_itself = encode(tokenizer, "a", chat=False)[0] == tokenizer.bos_token_id
    found = read(bos=False)
    if tokenizer.bos_token_id is not None and not starts_itself:
        found["with_bos"] = read(bos=True)
    return found


def greedy_agreement(
    model: PreTrainedModel,
    tokenizer: Any,
    method: Method | None,
    *,
    count: int = 4,
    new_tokens: int = 128,
    tokens: int = 200,
    seed: int = 0,
) -> Figures:
    """How many tokens the steered model writes like the dense one, and whether padding changes what it computes.

    Args:
        count: texts to continue.
        new_tokens: to generate.
        tokens: of each text.

    Returns:
        `same`: tokens until the first difference, a figure; `padding_error`: largest difference of the last logits
        between a batch of two lengths, padded on the left, and the same two alone, relative to the largest logit.
    """
    same = []
    for index in tqdm(range(count), desc="greedy", leave=False):
        ids = text(tokenizer, tokens, seed + index).to(model.device)
        call = {"max_new_tokens": new_tokens, "do_sample": False, "pad_token_id": 0, "eos_token_id": None}
        dense = model.generate(ids, attention_mask=torch.ones_like(ids), **call)
        with steered(model, method):
            other = model.generate(ids, attention_mask=torch.ones_like(ids), **call)
        same.append(float(common_start(dense[0, tokens:], other[0, tokens:])))
    return {"same": figure(same), "padding_error": padding_error(model, tokenizer, method), "values": {"same": same}}


def common_start(one: Tensor, other: Tensor) -> int:
    """How many tokens two equally long answers have in common before the first difference."""
    return int((one == other).long().cumprod(0).sum())


def padding_error(model: PreTrainedModel, tokenizer: Any, method: Method | None, tokens: int = 96) -> float:
    """See `greedy_agreement`."""
    long, short = text(tokenizer, tokens, 0)[0].tolist(), text(tokenizer, tokens * 2 // 3, 1)[0].tolist()
    gap = len(long) - len(short)
    both = torch.tensor([long, [0] * gap + short], device=model.device)
    mask = torch.tensor([[1] * len(long), [0] * gap + [1] * len(short)], device=model.device)
    with steered(model, method), torch.no_grad():
        batch = model(both, attention_mask=mask, position_ids=(mask.cumsum(1) - 1).clamp(min=0)).logits[:, -1]
        alone = [model(torch.tensor([ids], device=model.device)).logits[0, -1] for ids in (long, short)]
    return float((batch - torch.stack(alone)).abs().max() / batch.abs().max())


def by_size(rows: Sequence[Any], size_of: Callable[[Any], tuple[int, ...]]) -> Iterator[tuple[list[int], list[Any]]]:
    """Rows of equal size with their places, at most TOKENS_AT_ONCE tokens at a time; `size_of(row)[0]` counts them."""
    alike: dict[tuple[int, ...], list[int]] = {}
    for place, row in enumerate(rows):
        alike.setdefault(size_of(row), []).append(place)
    for size, places in alike.items():
        count = max(1, TOKENS_AT_ONCE // size[0])
        for start in range(0, len(places), count):
            part = places[start : start + count]
            yield part, [rows[place] for place in part]
