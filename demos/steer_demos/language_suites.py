"""The suites of `steer eval llm`: named steps, each of which gives rows of figures.

measures     a method beside the dense model and the controls, in all measures
facts        what holds for the dense model, for windows, and for masked retrieval heads
calibration  heads that ACT's search finds on some questions, on others
streaming    loss and cache against length
moa          windows of each head's own against one window for all, at equal density
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from transformers import PreTrainedModel

import steer
from steer.method import Method
from steer.methods.retrieval_heads import random_heads, top_heads
from steer.plan import Plan
from steer_demos import language_measures as measures
from steer_demos.language_controls import BestKeys, RandomKeys, as_many_random_heads
from steer_demos.language_measures import Figures, compared, figure
from steer_demos.language_tasks import Sample, passkey, questions, text, word_needle
from steer_patches.site import Site

Rows = dict[str, Figures]

SEARCH_SEED, FIRST_SEED = 50_000, 10_000  # searches look at other texts and questions than evaluations


@dataclass
class Bench:
    """What the steps of a suite share.

    Args:
        model, tokenizer: of the evaluation.
        methods: what is compared by name; None = the dense model.
        settings: fields of the suite's own method, or options of its search.
        small: a few short samples, to see that it runs.
        found: what one step leaves for the next.
    """

    model: PreTrainedModel
    tokenizer: Any
    methods: Mapping[str, Method | None] = field(default_factory=dict)
    settings: Mapping[str, Any] = field(default_factory=dict)
    small: bool = False
    found: dict[str, Any] = field(default_factory=dict)

    @property
    def longest(self) -> int:
        """Tokens that the model was trained for."""
        return self.model.config.get_text_config(decoder=True).max_position_embeddings

    def sites(self) -> list[Site]:
        """The attention sites of the model."""
        return [site for site in steer.sites(self.model) if site.kind == "causal"]

    def each(self, measure: Callable[..., Figures], **settings: Any) -> Rows:
        """A measure of every method, with the difference from the dense model."""
        rows = {name: measure(self.model, self.tokenizer, method, **settings) for name, method in self.methods.items()}
        return with_differences(rows)

    def pass_keys(
        self, methods: Mapping[str, Method | None], tokens: int, depths: Sequence[float], trials: int
    ) -> Rows:
        """Pass keys at some depths of prompts of one length."""
        size: dict[str, Any] = {"lengths": (tokens,), "depths": depths, "trials": trials, "seed": FIRST_SEED}
        return {
            name: measures.passkey_grid(self.model, self.tokenizer, method, **size) for name, method in methods.items()
        }


Step = Callable[[Bench], Rows]


def with_differences(rows: Rows, against: str = "dense") -> Rows:
    """Rows with what each has more than the dense one, as figures of paired differences."""
    for name, row in rows.items():
        if name != against and against in rows:
            row["against_dense"] = compared(rows, name, against)
    return rows


def suite(name: str) -> dict[str, Step]:
    """The steps of a suite by name.

    Raises:
        ValueError: there is no such suite.
    """
    if name not in SUITES:
        raise ValueError(f"there is no suite {name}; there are {', '.join(SUITES)}")
    return SUITES[name]


def passkeys(bench: Bench) -> Rows:
    if bench.small:
        return bench.each(measures.passkey_grid, lengths=(192, 256), depths=(0.1, 0.5, 0.9))
    return bench.each(measures.passkey_grid, lengths=(512, 1024, 2048))


def recalls(bench: Bench) -> Rows:
    return bench.each(measures.multi_key_recall, count=2 if bench.small else 34)


def choices(bench: Bench) -> Rows:
    rows: Rows = {}
    for task in ("sentiment",) if bench.small else ("sentiment", "topic", "kind"):
        samples = questions(bench.tokenizer, task, 8 if bench.small else 200, FIRST_SEED)
        of_task = {name: measures.score_choices(bench.model, samples, method) for name, method in bench.methods.items()}
        rows |= {f"{name}, {task}": row for name, row in with_differences(of_task).items()}
    return rows


def agreements(bench: Bench) -> Rows:
    """Each method against the dense model, beside random and best keys at the method's density."""
    tokens, count = (192, 1) if bench.small else (512, 6)
    samples = [passkey(bench.tokenizer, tokens, (index + 0.5) / count, FIRST_SEED + index) for index in range(count)]
    dense = [measures.answer_logits(bench.model, sample) for sample in samples]
    rows = {}
    for name, method in bench.methods.items():
        if method is None:
            continue
        rows[name] = measures.dense_agreement(bench.model, samples, method, dense)
        density = rows[name]["density"]
        if density is not None and density < 1:
            for label, control in (("random keys", RandomKeys), ("best keys", BestKeys)):
                row = measures.dense_agreement(bench.model, samples, control(density=density), dense)
                rows[f"{label} at the density of {name}"] = row
    return rows


def losses(bench: Bench) -> Rows:
    tokens = 256 if bench.small else 4096
    ids = text(bench.tokenizer, tokens, FIRST_SEED)
    rows = {
        name: measures.loss_by_length(bench.model, ids, method, bucket=tokens // 4, name=name)
        for name, method in bench.methods.items()
    }
    return with_differences(rows)


def sinks(bench: Bench) -> Rows:
    return bench.each(measures.sink_statistics, tokens=64 if bench.small else 256, texts=2 if bench.small else 4)


def greedy(bench: Bench) -> Rows:
    size = {"count": 1, "new_tokens": 8} if bench.small else {}
    return {
        name: measures.greedy_agreement(bench.model, bench.tokenizer, method, **size)
        for name, method in bench.methods.items()
        if method is not None
    }


def dense_passkeys(bench: Bench) -> Rows:
    lengths = (192,) if bench.small else (512, 1024, 2048, 4096)
    return {"dense": measures.passkey_grid(bench.model, bench.tokenizer, lengths=lengths)}


def window_passkeys(bench: Bench) -> Rows:
    """Keys in the last 256 tokens of 900, and before these."""
    tokens, window, trials = (256, 96, 1) if bench.small else (900, 256, 2)
    method = steer.StreamingLLM(n_sink=4, n_recent=window, positions="original")
    rows: Rows = {}
    for place, depths in {"outside": (0.1, 0.3, 0.5, 0.65), "inside": (0.9, 0.95)}.items():
        methods = {"dense": None, f"sinks 4, window {window}": method}
        named = {f"{name}, key {place} the window": chosen for name, chosen in methods.items()}
        rows |= bench.pass_keys(named, tokens, depths, trials)
    return rows


def window_losses(bench: Bench) -> Rows:
    """Loss of template text at positions 300 to 900, with and without sinks."""
    tokens, start, texts = (128, 32, 1) if bench.small else (900, 300, 3)
    windows: dict[str, tuple[int, int] | None] = {"dense": None}
    for sink, recent in ((4, 256), (1, 256), (0, 256), (4, 64), (0, 64)):
        windows[f"sinks {sink}, window {recent}"] = (sink, recent // 8 if bench.small else recent)
    rows: Rows = {}
    for name, window in windows.items():
        method = window and steer.StreamingLLM(n_sink=window[0], n_recent=window[1], positions="original")
        blocks: list[float] = []
        for index in range(texts):
            ids = text(bench.tokenizer, tokens, FIRST_SEED + index)
            row = measures.loss_by_length(bench.model, ids, method, start=start, bucket=tokens, name=name)
            blocks += row["values"]["loss"]
        rows[name] = {"loss": figure(blocks), "values": {"loss": blocks}}
    return with_differences(rows)


def heads(bench: Bench) -> Rows:
    """Retrieval heads found on two sets of texts, and what is left of a pass key without the best of them."""
    lengths = (160,) if bench.small else (256, 400, 512)
    found: list[Any] = [
        steer.calibrate(bench.model, steer.RetrievalHeads(), needles(bench, lengths, seed))
        for seed in (SEARCH_SEED, SEARCH_SEED + 1000)
    ]
    plan = found[0].plan
    bench.found["heads"] = found[0]
    scores = [method.scores for method in found]
    k, outside = (2, 4) if bench.small else (5, 60)
    masks: dict[str, Method | None] = {"dense": None, f"top {k} masked": steer.RetrievalHeads(heads=top_heads(plan, k))}
    for seed in range(2):
        drawn = random_heads(plan, k, outside, seed)
        masks[f"{k} random masked, seed {seed}"] = steer.RetrievalHeads(heads=drawn)
    tokens, trials = (192, 1) if bench.small else (400, 2)
    rows = bench.pass_keys(masks, tokens, (0.2, 0.4, 0.6, 0.8), trials)
    rows["dense"] |= {
        "scores": scores[0].tolist(),
        "heads_above_0.1": int((scores[0] >= 0.1).sum()),
        "heads_above_0.5": int((scores[0] >= 0.5).sum()),
        "top": [[site, head, score] for site, head, score in found[0].top(10)],
        "rank_correlation": spearman(scores[0], scores[1]),
    }
    return rows


def needles(bench: Bench, lengths: tuple[int, ...], seed: int) -> list[Sample]:
    """Sentences to copy, two of each length."""
    depths = (0.25, 0.75)
    return [
        word_needle(bench.tokenizer, tokens, depth, seed + index)
        for index, (tokens, depth) in enumerate((tokens, depth) for tokens in lengths for depth in depths)
    ]


def spared_heads(bench: Bench) -> Rows:
    """Pass keys where half of the KV heads keep everything: those that retrieve, and those that do so least."""
    plan: Plan = (bench.found.get("heads") or retrieval(bench)).plan
    turned = {name: -plan.tensors[name] for name in ("score", "reach")}
    opposite = replace(plan, tensors={**plan.tensors, **turned})
    tokens, window, trials = (256, 96, 1) if bench.small else (900, 256, 1)
    shared: dict[str, Any] = {"share": 0.5, "sink": 4, "recent": window}
    methods: dict[str, Method | None] = {
        "dense": None,
        "best half kept": steer.DuoAttention(plan=plan, **shared),
        "last half kept": steer.DuoAttention(plan=opposite, **shared),
    }
    rows = bench.pass_keys(methods, tokens, (0.1, 0.25, 0.4, 0.55), trials)
    ids = text(bench.tokenizer, tokens, FIRST_SEED)
    for name, method in methods.items():
        parts = measures.loss_by_length(bench.model, ids, method, bucket=tokens)["parts"]
        rows[name]["cache_bytes"] = parts[-1]["cache_bytes"]
    return rows


def retrieval(bench: Bench) -> Any:
    """The scores of all heads."""
    samples = needles(bench, (160,) if bench.small else (256, 400, 512), SEARCH_SEED)
    return steer.calibrate(bench.model, steer.RetrievalHeads(), samples)


def calibrated_heads(bench: Bench, task: str) -> Rows:
    """ACT with the heads that its search finds, with all and with random ones, on questions the search did not see."""
    searched, judged = (4, 8) if bench.small else (64, 250)
    data = questions(bench.tokenizer, task, searched, SEARCH_SEED)
    seen = {tuple(sample["input_ids"][0].tolist()) for sample in data}
    pool = questions(bench.tokenizer, task, judged + searched, FIRST_SEED)
    samples = [sample for sample in pool if tuple(sample["input_ids"][0].tolist()) not in seen][:judged]
    names = {each.name for each in fields(steer.ACT)}
    method = steer.ACT(**{key: value for key, value in bench.settings.items() if key in names})
    options = {key: value for key, value in bench.settings.items() if key not in names}
    fitted: Any = steer.calibrate(bench.model, method, data, **options)
    chosen = {name: tuple(found) for name, found in (fitted.heads or {}).items()}
    among = [site for site in bench.sites() if site.layer >= method.dense_layers]
    configs: dict[str, Method | None] = {"dense": None, "ACT, heads found": fitted, "ACT, all heads": method}
    for seed in range(2):
        drawn = as_many_random_heads(chosen, among, seed)
        if drawn:
            configs[f"ACT, random heads, seed {seed}"] = replace(fitted, heads=drawn, plan=None)
    rows = {name: measures.score_choices(bench.model, samples, config) for name, config in configs.items()}
    rows["ACT, heads found"] |= {
        "heads": {name: list(found) for name, found in chosen.items()},
        "number_of_heads": sum(map(len, chosen.values())),
        "on_the_searched": measures.score_choices(bench.model, data, fitted)["accuracy"],
        "dense_on_the_searched": measures.score_choices(bench.model, data)["accuracy"],
    }
    for name in rows:
        if "random" in name:
            rows["ACT, heads found"].setdefault("against_random_heads", compared(rows, "ACT, heads found", name))
    return with_differences(rows)


def streams(bench: Bench, own: bool) -> Rows:
    """Loss and cache of ever longer text: template sentences, or stories that the model tells."""
    total = 256 if bench.small else 16384
    window = 32 if bench.small else 1024
    dense = min(total // 2, bench.longest)
    methods: dict[str, tuple[Method | None, int]] = {
        "dense": (None, dense),
        f"sinks 4, window {window - 4}": (steer.StreamingLLM(n_sink=4, n_recent=window - 4), total),
        f"sinks 0, window {window}": (steer.StreamingLLM(n_sink=0, n_recent=window), total),
    }
    if not own:
        method = steer.StreamingLLM(n_sink=4, n_recent=window - 4, positions="original")
        methods[f"sinks 4, window {window - 4}, original positions"] = (method, total)
    if own:
        ids = measures.generated_text(bench.model, bench.tokenizer, total, FIRST_SEED, rows=4 if bench.small else 64)
    else:
        ids = text(bench.tokenizer, total, FIRST_SEED)
    chunk = 16 if bench.small else 256
    return {
        name: measures.loss_by_length(
            bench.model, ids[:, :tokens], method, chunk=chunk, bucket=max(window, total // 16), name=name
        )
        for name, (method, tokens) in methods.items()
    }


def windows_of_heads(bench: Bench) -> Rows:
    """MoA's windows and one window for all, on texts that the search did not see.

    "same cache": both keep the same share of the keys after the prompt; "same map": both compute the same share of the
    prompt's attention map, which is less for windows that differ.
    """
    lengths = (160, 192) if bench.small else (512, 1024)
    names = {each.name for each in fields(steer.MoA)}
    settings = {"n_sink": 16, "block_size": 16} | dict(bench.settings)
    shared = {key: value for key, value in settings.items() if key in names}
    options = {key: value for key, value in settings.items() if key not in names}
    count = 1 if bench.small else 3
    data = [
        with_labels(make(bench.tokenizer, tokens, (index + 0.5) / count, SEARCH_SEED + index))
        for tokens in lengths
        for make in (passkey, word_needle)
        for index in range(count)
    ]
    trials = 1 if bench.small else 5
    samples = [
        make(bench.tokenizer, lengths[-1], (index + 0.5) / trials, FIRST_SEED + index)
        for make in (passkey, word_needle)
        for index in range(trials)
    ]
    dense = [measures.answer_logits(bench.model, sample) for sample in samples]
    rows: Rows = {}
    for density in (0.5,) if bench.small else (0.5, 0.25):
        fitted: Any = steer.calibrate(bench.model, steer.MoA(**shared), data, **{"density": density} | options)
        kept, moa = fitted.kept_share(lengths[-1]), f"MoA, {density:g}"
        rows[moa] = measures.dense_agreement(bench.model, samples, fitted, dense)
        rows[moa] |= {"kept_share": kept, "config": fitted.config()}
        # a window of the share w leaves out (1 - w)^2 of a causal map
        shares = {"same_cache": kept, "same_map": 1 - (1 - rows[moa]["density"]) ** 0.5}
        for same, window in shares.items():
            uniform = steer.MoA.uniform(bench.model, window, **shared)
            one = f"one window, {same.replace('_', ' ')}, {density:g}"
            rows[one] = measures.dense_agreement(bench.model, samples, uniform, dense)
            rows[one] |= {"kept_share": uniform.kept_share(lengths[-1])}
            rows[moa][f"against_one_window_of_{same}"] = compared(rows, moa, one)
        if not bench.small:
            few, known = samples[trials // 2 :: trials], dense[trials // 2 :: trials]
            for label, control in (("random keys", RandomKeys), ("best keys", BestKeys)):
                chosen = control(density=rows[moa]["density"])
                rows[f"{label}, {density:g}"] = measures.dense_agreement(bench.model, few, chosen, known)
    return rows


def with_labels(sample: Sample) -> Sample:
    """The prompt with its answer, and labels of the answer alone."""
    prompt, answer = sample["input_ids"], torch.tensor([sample["answer"]])
    labels = torch.cat([torch.full_like(prompt, -100), answer], 1)
    return {"input_ids": torch.cat([prompt, answer], 1), "labels": labels}


def spearman(one: torch.Tensor, other: torch.Tensor) -> float:
    """Rank correlation; equal values share the mean of their ranks."""

    def ranks(values: torch.Tensor) -> np.ndarray:
        flat = values.flatten().double().numpy()
        _, inverse, counts = np.unique(flat, return_inverse=True, return_counts=True)
        return (np.cumsum(counts) - (counts - 1) / 2)[inverse]

    return float(np.corrcoef(ranks(one), ranks(other))[0, 1])


SUITES: dict[str, dict[str, Step]] = {
    "measures": {
        "passkey": passkeys,
        "recall": recalls,
        "agreement": agreements,
        "loss": losses,
        "sinks": sinks,
        "greedy": greedy,
        "choice": choices,
    },
    "facts": {
        "passkey": dense_passkeys,
        "window passkey": window_passkeys,
        "window loss": window_losses,
        "heads": heads,
        "spared heads": spared_heads,
        "recall": recalls,
        "choice": choices,
        "sinks": sinks,
    },
    "calibration": {task: partial(calibrated_heads, task=task) for task in ("sentiment", "topic")},
    "streaming": {"template text": partial(streams, own=False), "own text": partial(streams, own=True)},
    "moa": {"windows": windows_of_heads},
}
