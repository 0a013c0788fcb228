"""Retrieval heads: the few heads that copy from far back in the text. Find them, and mask them to see what they do."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch

from steer.method import Method, Span
from steer.plan import Plan, Search
from steer.select import select
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.sites import find_sites, plain

How = Literal["mean", "zero"]
HOW: tuple[How, ...] = get_args(How)
COUNTS = ("distinct", "every")
RETRIEVAL, STRONG = 0.1, 0.5  # scores from which the paper calls a head a retrieval head, and a strong one
MAX_NEW_TOKENS = 50
QUESTION = 64  # last tokens of a prompt, with which the model looks for the answer

Heads = dict[str, list[int]]


@dataclass(kw_only=True)
class RetrievalHeads(Method):
    """Take heads out of the queries that choose a token: each looks at all keys alike, or gives nothing.

        how="mean"   the query is 0, so that all logits are equal: O = mean of v_j over the visible keys j
        how="zero"   O = 0

    This is done for the last query of the prompt, which gives the first token, and for all queries after it; the rest
    of the prompt is read with every head. Without a cache each forward is a prompt of its own, and of a prompt in
    pieces (`prefill_chunk_size`) only the first is one. `steps="1:"` leaves out the prompt's last query too. In models
    with attention sinks of their own (gpt-oss) "mean" is the mean times 1 minus the sink's share.

    `steer.calibrate(model, RetrievalHeads(), samples)` finds the heads, see `search`. The same plan serves
    `DuoAttention`, which keeps these heads' keys and drops those of others.

    Args:
        plan: "score", (1, sites, heads), each head's share of the needle that it copied, mean over the trials;
            "trials", (trials, sites, heads), the same of each; and "reach", (1, sites, heads), see `search`.
        k: heads to mask, those of the highest scores in `layers`; 0 = none. Not with `heads`.
        heads: masks these heads in place of the top `k`, see `top_heads` and `random_heads`; needs no plan.
        how: "mean" or "zero".

    Source: Wu et al., "Retrieval Head Mechanistically Explains Long-Context Factuality", arXiv 2404.15574, which masks
    by "mean"; its code feeds the prompt's last token by itself, masked like those after it.
    """

    plan: Plan | None = None
    k: Annotated[int, Span(0, 50)] = 10
    how: How = "mean"

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "inputs"
    without_preset: ClassVar[str] = "`steer.calibrate`"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.k < 0:
            raise ValueError(f"k={self.k} must be 0 or more heads")
        if self.how not in HOW:
            raise ValueError(f"how={self.how!r} does not exist; choose from {', '.join(HOW)}")
        if self.plan is not None:
            check_scores(self.plan)
        self._answers: torch.Tensor | None = None  # (B or 1, 1, S, 1) bool: the masked queries; None = all

    def search(
        self, *, count: str = "distinct", recall: float = 0.5, max_new_tokens: int = MAX_NEW_TOKENS
    ) -> RetrievalSearch:
        """The search of `steer.calibrate`: which heads look at what the model copies.

        Each sample is a prompt with a needle in it: {"input_ids": (1, S), "needle": (start, stop)}, the span of its
        tokens in the prompt, and if need be "answer": token ids of the right answer where that is not the needle,
        "max_new_tokens", and "stop": token ids that end the answer besides the model's own. Other entries are ignored.
        The model answers greedily. Where the answer is right, a head's hits are the tokens that it copied:
        its largest attention weight was on a needle token, and that token was what the model wrote. The first token
        comes from the prompt's last query. The score is the number of hits per needle token, averaged over the
        answers that are right.

        Besides the heads that copy there are those with which the question finds the needle. "reach" is the largest
        share of its attention that any of the last 64 prompt queries, or of the answer's, puts on the needle; of this
        too the mean is taken. `DuoAttention` uses it, masking does not.

        Use needles of words that the model gets right. Digits are tokens of their own that occur everywhere.

        Args:
            count: "distinct" = each place of the needle once, as in the paper; "every" = all hits, as in its code.
            recall: an answer is right if it has more than this share of the needle's (or answer's) tokens.
            max_new_tokens: length of an answer, at most.
        """
        return RetrievalSearch(
            layers=self.layers, fitted=self, count=count, recall=recall, max_new_tokens=max_new_tokens
        )

    @property
    def scores(self) -> torch.Tensor:
        """(layers, heads) mean score of every head of the plan."""
        return planned(self).tensors["score"][0]

    def top(self, count: int) -> list[tuple[str, int, float]]:
        """(site, head, score) of the heads with the highest scores, best first."""
        return [(site, head, float(score)) for site, head, score in ranking(planned(self))[:count]]

    def is_neutral(self) -> bool:
        return self.k == 0 and self.heads is None

    def resolved(self, family: Family | None, has_clock: bool) -> RetrievalHeads:
        """The heads of the plan, as a selection."""
        if self.heads is not None:
            return replace(self)
        plan = planned(self)
        layers = plan.sites if self.layers is None else select(self.layers, plan.sites, "layers in the plan")
        chosen = [(site, head) for site, head, _ in ranking(plan) if site in layers][: self.k]
        return replace(self, layers=layers, heads=grouped(chosen) or [])

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        for site in sites:
            if self.plan is not None and site.heads != self.plan.heads:
                raise ValueError(f"this plan is for sites of {self.plan.heads} heads; {site.name} has {site.heads}")

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        text = scope.text
        if text is None:
            raise ValueError("RetrievalHeads needs a forward that is given input_ids or inputs_embeds")
        self._answers = None
        if text.past or text.new == 1:
            return
        at = torch.arange(text.new, device=scope.device)
        valid = torch.ones(1, text.new, dtype=torch.bool) if text.valid is None else text.valid
        last = (valid.to(at.device) * at).amax(1, keepdim=True)
        self._answers = (at == last)[:, None, :, None]

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        masked = call.query.new_ones(1, 1, 1, dtype=torch.bool) if call.heads is None else call.heads
        if call.query.shape[2] > 1 and self._answers is not None:
            masked = masked & self._answers.to(call.query.device)
        if self.how == "mean":
            return next(call.replace(query=call.query.masked_fill(masked, 0)))
        return next(call).masked_fill(masked, 0)


def top_heads(plan: Plan, count: int) -> Heads:
    """The heads with the highest scores of a plan, as `RetrievalHeads(heads=...)` takes them."""
    return grouped([(site, head) for site, head, _ in ranking(plan)[:count]])


def random_heads(plan: Plan, count: int, outside: int, seed: int) -> Heads:
    """Random heads that are not among the `outside` highest scores of a plan: the control of a masking experiment.

    Raises:
        ValueError: the plan has not so many heads.
    """
    rest = [(site, head) for site, head, _ in ranking(plan)[outside:]]
    if count > len(rest):
        raise ValueError(f"count={count} heads outside of the top {outside}: this plan has {len(rest)} such heads")
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))
    return grouped([rest[i] for i in order[:count].tolist()])


def ranking(plan: Plan) -> list[tuple[str, int, float]]:
    """(site, head, score) of all heads of a plan, the highest score first; equal scores in the model's order."""
    order = plan.tensors["score"].flatten().argsort(descending=True, stable=True).tolist()
    scores = plan.tensors["score"].flatten().tolist()
    return [(plan.sites[i // plan.heads], i % plan.heads, scores[i]) for i in order]


def grouped(heads: Sequence[tuple[str, int]]) -> Heads:
    """(site, head) pairs as a selection of heads by site."""
    return {site: sorted(head for at, head in heads if at == site) for site in dict.fromkeys(site for site, _ in heads)}


def write_scores(plan: Plan, file: str | Path) -> None:
    """Write the scores of all trials as the paper's code does: {"layer-head": [score of each trial]}."""
    layers, trials = plan.report["layers"], plan.tensors["trials"]
    table = {
        f"{layer}-{head}": trials[:, i, head].tolist() for i, layer in enumerate(layers) for head in range(plan.heads)
    }
    Path(file).write_text(json.dumps(table))


def read_scores(file: str | Path, model: Any) -> Plan:
    """A plan from a file of the paper's code, {"layer-head": [score of each trial]}.

    Args:
        file: e.g. `head_score/llama-2-7b-80k.json` of the code that came with the paper.
        model: the model that the scores are of.

    Raises:
        ValueError: other layers or heads than the model's, or heads with different numbers of trials.
    """
    table = json.loads(Path(file).read_text())
    found = [site for site in find_sites(plain(model)) if site.kind == "causal"]
    wanted = {f"{site.layer}-{head}" for site in found for head in range(site.heads)}
    if set(table) != wanted:
        raise ValueError(
            f"{file} has scores of {len(table)} heads, the last one {max(table, key=_as_numbers)}; "
            f"this {type(model).__name__} has {len(wanted)}, the last one {max(wanted, key=_as_numbers)}"
        )
    if len(set(map(len, table.values()))) != 1:
        raise ValueError(f"{file} has heads with different numbers of trials")
    rows = [[table[f"{site.layer}-{head}"] for head in range(site.heads)] for site in found]
    return plan_of({site.name: site.layer for site in found}, torch.tensor(rows).permute(2, 0, 1), {})


def _as_numbers(name: str) -> list[int]:
    return [int(number) for number in name.split("-")]


def plan_of(layers: Mapping[str, int], trials: torch.Tensor, report: Mapping[str, Any]) -> Plan:
    """A plan of `trials` (trials, sites, heads); `layers`: the number of each site's layer."""
    score = trials.double().mean(0, keepdim=True).float()
    figures = {
        "trials": len(trials),
        f"heads above {RETRIEVAL}": int((score > RETRIEVAL).sum()),
        f"heads of {STRONG} or more": int((score >= STRONG).sum()),
    }
    return Plan(
        sites=tuple(layers),
        heads=trials.shape[-1],
        tensors={"score": score, "trials": trials.float().contiguous()},
        report={"layers": list(layers.values()), "figures": figures, **report},
    )


def planned(method: Any) -> Plan:
    """The plan of a method that cannot run without."""
    if method.plan is None:
        name = type(method).__name__
        raise ValueError(
            f"{name} has no plan: fit it with steer.calibrate(model, {name}(), samples), or load a fitted one"
        )
    return method.plan


def check_scores(plan: Plan) -> None:
    """Raise `ValueError` where a plan holds no scores of heads."""
    score, shape = plan.tensors.get("score"), (1, len(plan.sites), plan.heads)
    if score is None or tuple(score.shape) != shape or not bool(score.isfinite().all()):
        held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in plan.tensors.items()) or "nothing"
        raise ValueError(f"a plan of retrieval heads holds score {shape}, finite; this one holds {held}")


@dataclass
class Trials:
    """What a search has collected so far.

    Args:
        layers: of each site, the number of its layer.
        scores, reaches: of each right answer, (sites, heads).
        answers: of every sample, what the report says about it.
    """

    layers: dict[str, int] = field(default_factory=dict)
    scores: list[torch.Tensor] = field(default_factory=list)
    reaches: list[torch.Tensor] = field(default_factory=list)
    answers: list[dict[str, Any]] = field(default_factory=list)


@dataclass(kw_only=True)
class RetrievalSearch(Search, register=False):
    """The search of `RetrievalHeads` and `DuoAttention`, see `RetrievalHeads.search`.

    Args:
        fitted: the method that gets the plan.
        needle: of the sample in flight.
        looked, reached: of the sample in flight, at each site and forward: (H,) place in the sequence of the last
            query's largest weight; (H,) largest weight that a query after the needle puts on it.
    """

    fitted: Method
    count: str = "distinct"
    recall: float = 0.5
    max_new_tokens: int = MAX_NEW_TOKENS
    found: Trials = field(default_factory=Trials)
    looked: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    reached: dict[str, list[torch.Tensor]] = field(default_factory=dict)
    needle: tuple[int, int] = (0, 0)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "inputs"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.count not in COUNTS:
            raise ValueError(f"count={self.count!r} does not exist; choose from {', '.join(COUNTS)}")
        if not 0 <= self.recall < 1:
            raise ValueError(f"recall={self.recall} is a share of the tokens of the right answer, in [0, 1)")
        if self.max_new_tokens < 1:
            raise ValueError(f"max_new_tokens={self.max_new_tokens} must be at least 1")

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        if len({site.heads for site in sites}) > 1:
            raise ValueError(f"{type(model).__name__} has layers of different numbers of heads: choose some by layers=")
        self.found.layers = {site.name: site.layer for site in sites}

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        """Notes where the last query of each head looks, and what the last ones see of the needle; changes nothing."""
        text = call.text
        assert text is not None
        total, weights = text.past + text.new, attention_of_last(call, QUESTION)
        first = total - weights.shape[2]  # a sliding window has dropped what was before
        self.looked.setdefault(call.site.name, []).append((weights[:, -1].argmax(-1) + first).cpu())
        key = torch.arange(first, total, device=weights.device)
        query = torch.arange(total - weights.shape[1], total, device=weights.device)
        start, stop = self.needle
        seen = (weights * ((key >= start) & (key < stop))).sum(-1) * (query >= stop)
        self.reached.setdefault(call.site.name, []).append(seen.amax(-1).cpu())
        return next(call)

    def run(self, target: Any, sample: Mapping[str, Any], seed: int) -> None:
        prompt, (start, stop) = _checked(sample)
        self.needle = start, stop
        self.looked.clear()
        self.reached.clear()
        written = self._answer(target, prompt, sample)
        right = [int(token) for token in sample.get("answer", prompt[0, start:stop].tolist())]
        shared = sum((Counter(written.tolist()) & Counter(right)).values()) / len(right)
        counts = shared > self.recall
        self.found.answers.append(
            {"tokens": prompt.shape[1], "needle": [start, stop], "written": written.tolist(), "recall": shared}
        )
        if counts:
            looked, reached = (
                torch.stack([torch.stack(noted[site]) for site in self.found.layers], 1)
                for noted in (self.looked, self.reached)
            )
            hits = copied(looked, written, prompt[0].cpu(), (start, stop))
            times = hits.any(0) if self.count == "distinct" else hits.sum(0)
            self.found.scores.append(times.sum(-1) / (stop - start))
            self.found.reaches.append(reached.amax(0))

    def _answer(self, target: Any, prompt: torch.Tensor, sample: Mapping[str, Any]) -> torch.Tensor:
        """(N,) greedy tokens; each comes from a forward of its own."""
        own = target.generation_config.eos_token_id
        stops = [*(own if isinstance(own, list) else [own] if own is not None else []), *sample.get("stop", ())]
        prompt = prompt.to(target.device)
        out = target.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=sample.get("max_new_tokens", self.max_new_tokens),
            eos_token_id=stops or None,
            pad_token_id=stops[0] if stops else None,
            do_sample=False,
            num_beams=1,
            repetition_penalty=1.0,
            temperature=None,
            top_k=None,
            top_p=None,
            use_cache=True,
        )
        return out[0, prompt.shape[1] :].cpu()

    def state(self) -> dict[str, Any]:
        found = self.found
        tensors = {f"scores.{i}": score for i, score in enumerate(found.scores)}
        tensors |= {f"reaches.{i}": reach for i, reach in enumerate(found.reaches)}
        return {**tensors, "counted": len(found.scores), "answers": found.answers}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.found.scores = [state[f"scores.{i}"] for i in range(state["counted"])]
        self.found.reaches = [state[f"reaches.{i}"] for i in range(state["counted"])]
        self.found.answers = list(state["answers"])

    def figure(self) -> str:
        return f"{len(self.found.scores)} of {len(self.found.answers)} answers right"

    def finish(self) -> Method:
        found = self.found
        if not found.scores:
            best = max(answer["recall"] for answer in found.answers)
            raise ValueError(
                f"the model answered none of {len(found.answers)} prompts with more than {self.recall:.0%} of the "
                f"needle's tokens (the best had {best:.0%}), so no head can be scored: take prompts that it gets right"
            )
        plan = plan_of(found.layers, torch.stack(found.scores), {"answers": found.answers})
        reach = torch.stack(found.reaches).mean(0, keepdim=True)
        changes: dict[str, Any] = {"plan": replace(plan, tensors={**plan.tensors, "reach": reach})}
        return replace(self.fitted, **changes)


def attention_of_last(call: Call, queries: int) -> torch.Tensor:
    """(H, queries, S_kv) attention weights of the last queries of a call's first row, fewer where it has fewer."""
    query = call.query[0, :, -queries:].float().unflatten(0, (call.key.shape[1], -1))
    scores = (query @ call.key[0, :, None].float().mT).flatten(0, 1) * call.softmax_scale
    if (cap := call.extra.get("softcap")) is not None:
        scores = cap * torch.tanh(scores / cap)
    keep, causal = call.visible()
    if causal:
        at = torch.arange(scores.shape[2], device=scores.device)
        keep = (at <= at[-scores.shape[1] :, None])[None, None]
    if keep is not None:
        scores = scores.masked_fill(~keep[0, :, -scores.shape[1] :], -torch.inf)
    return scores.softmax(-1)


def copied(looked: torch.Tensor, written: torch.Tensor, prompt: torch.Tensor, needle: tuple[int, int]) -> torch.Tensor:
    """Which needle tokens each head copied at each step, (N, L, H, needle tokens) bool.

    Args:
        looked: (N, L, H) place in the sequence of the largest attention weight, when token n was written.
        written: (N,) tokens that the model wrote.
        prompt: (S,) tokens.
        needle: (start, stop) of the needle in the prompt.
    """
    places = torch.arange(*needle)
    return (looked[..., None] == places) & (written[:, None, None, None] == prompt[places])


def _checked(sample: Mapping[str, Any]) -> tuple[torch.Tensor, tuple[int, int]]:
    """A sample's prompt, (1, S), and the span of its needle."""
    missing = [name for name in ("input_ids", "needle") if name not in sample]
    if missing:
        raise ValueError(
            f"a sample has no {' and no '.join(missing)}; to find retrieval heads it must be "
            '{"input_ids": (1, S) tokens, "needle": (start, stop)}'
        )
    prompt, (start, stop) = sample["input_ids"], sample["needle"]
    if prompt.ndim != 2 or len(prompt) != 1:
        raise ValueError(f"input_ids has the shape {tuple(prompt.shape)}; give one prompt a sample, (1, S)")
    if not 0 <= start < stop <= prompt.shape[1]:
        raise ValueError(f"needle=({start}, {stop}) is no span of a prompt of {prompt.shape[1]} tokens")
    return prompt, (start, stop)
