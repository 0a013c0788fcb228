"""MoA: every head of a language model sees the first tokens and a window of its own, which grows with the prompt."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from transformers import Cache, PreTrainedModel

from steer.allocation import allocate
from steer.method import Method, Span
from steer.plan import Plan, Search
from steer.sensitivity import Measure, effect_of_windows
from steer.windowed import Windowed
from steer.windows import Windows
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.sites import find_sites, plain

BETAS = tuple(i / 8 for i in range(9))  # the published grid


@dataclass(kw_only=True)
class MoA(Windowed):
    """Each head sees W = alpha + beta * N keys: the first `n_sink` tokens and the latest W - n_sink ones.

    N is the length of the prompt (of a batch, of its longest row; of a prompt in pieces, as `prefill_chunk_size` feeds
    it, of the first), and stays while tokens are generated. W is rounded up to whole blocks and is two blocks at least.
    Heads with beta = 1 and alpha >= 0 keep everything. The numbers alpha and beta of every head are the `plan`:
    `steer.calibrate(model, MoA(), samples, density=0.5)` finds one, see `search`; `MoA.published` reads one in the
    format of the authors; `MoA.uniform` gives all heads the same.

    Args:
        plan: "alpha" in tokens and "beta" in shares of N, both (1, sites, heads).
        n_sink: leading tokens that every query sees, a part of W; 64 in the paper.
        block_size: granularity of W in tokens; 64 in the paper, less for prompts below a thousand tokens.

    Source: Fu et al., "MoA: Mixture of Sparse Attention for Automatic Large Language Model Compression",
    arXiv 2406.14909, sections 3 and 4. There N counts the tokens that will be generated too, which nobody knows here.
    """

    plan: Plan | None = None
    n_sink: Annotated[int, Span(0, 128)] = 64
    block_size: Annotated[int, Span(1, 128)] = 64

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.block_size < 1:
            raise ValueError(f"block_size={self.block_size} must be at least 1")
        if not 0 <= self.n_sink < 2 * self.block_size:
            raise ValueError(
                f"n_sink={self.n_sink} must be from 0 to below two blocks of {self.block_size} tokens, the least "
                "that a head sees"
            )
        if self.plan is not None:
            _check_rules(self.plan)

    def search(
        self,
        *,
        density: float = 0.5,
        lengths: Sequence[int] | None = None,
        alphas: Sequence[float] | None = None,
        betas: Sequence[float] = BETAS,
        per: Literal["kv_head", "query_head"] = "kv_head",
        measure: Measure = "rows",
    ) -> WindowSearch:
        """The search of `steer.calibrate`: the windows within the density that cut off least of what the loss feels.

        Samples are {"input_ids": (1, S), "labels": (1, S)}: long prompts with the answer that the dense model gives,
        where labels are -100 outside of the answer. One forward and one backward each; no attention map is kept, and
        no gradient of a weight is computed. See `steer.sensitivity.effect_of_windows` for what is measured. A table of
        sites x heads x tokens is kept for each length, so samples are best cut to few lengths.

        A rule's loss is the measure of what it hides, as a share of what the least windows hide in all heads; the mean
        over the samples, whatever their lengths. Its cost is W / N at each of `lengths`, and the mean over the heads
        may not exceed `density` at any of them. Differences to the paper: the measure, see below; effects are summed
        token by token, not block by block; one plan comes out where the paper picks from several by trying them on
        longer prompts; `steer.allocation.allocate` takes the place of its commercial solver.

        Args:
            density: largest mean of W / N.
            lengths: prompt lengths at which it holds; None = the shortest and the longest sample, and twice that.
            alphas: candidates in tokens; None = from minus the shortest to the longest sample, in steps of half the
                shortest, which is the published grid for 2k to 8k tokens.
            betas: candidates in shares of N.
            per: "kv_head": heads that share keys and values have one window, as the cache can only drop what all of
                them drop, chosen for the most sensitive of them; "query_head": each its own.
            measure: "keys": the published one, which adds up the effects of single keys without their signs; "rows":
                the squared effect of all that a window hides from a query. Fitted to passkeys on SmolLM2-135M at a
                density of 0.25, "rows" loses less than half of the answer's log-probability that "keys" loses.

        Raises:
            ValueError: `heads` is set: the search is for whole layers.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        options = {
            "density": density,
            "lengths": lengths,
            "alphas": alphas,
            "betas": betas,
            "per": per,
            "measure": measure,
        }
        return WindowSearch(**given | {"plan": None} | options)

    @classmethod
    def uniform(cls, model: PreTrainedModel, beta: float, alpha: float = 0.0, **settings: Any) -> MoA:
        """All heads with one rule: the baseline, StreamingLLM's window as a share of the prompt.

        Args:
            model: the language model that it is for.
            beta, alpha: the rule.
            settings: fields of MoA.
        """
        shapes = [(site.name, site.heads) for site in _windowed_sites(model)]
        return cls(plan=_plan([(name, [alpha] * heads, [beta] * heads) for name, heads in shapes]), **settings)

    @classmethod
    def published(
        cls, model: PreTrainedModel, config: str | Path | Mapping[str, Sequence[Sequence[float]]], **settings: Any
    ) -> MoA:
        """The rules in the format of the authors: {"alphas": [[one for each head] for each layer], "betas": ...}.

        Args:
            model: the language model that they are for.
            config: the mapping, or the path of a JSON file that holds it.
            settings: fields of MoA.

        Raises:
            ValueError: tables that do not fit the model's layers and heads.
        """
        held = config if isinstance(config, Mapping) else json.loads(Path(config).read_text())
        shapes = [(site.name, site.heads) for site in _windowed_sites(model)]
        wanted = [heads for _, heads in shapes]
        for name in ("alphas", "betas"):
            found = [len(row) for row in held.get(name, [])]
            if found != wanted:
                raise ValueError(
                    f'"{name}" must have a row for each of the {len(wanted)} attention layers of this model, with a '
                    f"number for each of its {wanted[0]} heads; it has {len(found)} rows with "
                    f"{', '.join(map(str, sorted(set(found)))) or 'no'} numbers"
                )
        rows = zip(shapes, held["alphas"], held["betas"], strict=True)
        return cls(plan=_plan([(name, alphas, betas) for (name, _), alphas, betas in rows]), **settings)

    def config(self) -> dict[str, list[list[float]]]:
        """The plan in the format of the authors, see `published`."""
        plan = self._settled()
        return {"alphas": plan.tensors["alpha"][0].tolist(), "betas": plan.tensors["beta"][0].tolist()}

    def kept_share(self, tokens: int) -> float:
        """The mean of W / N over the heads for a prompt of `tokens` tokens: what is left of the cache."""
        rules = zip(*(self._settled().tensors[name].flatten().tolist() for name in ("alpha", "beta")), strict=True)
        kept = [window_of(alpha, beta, tokens, self.block_size) for alpha, beta in rules]
        return sum(tokens if window is None else min(window, tokens) for window in kept) / (len(kept) * tokens)

    def resolved(self, family: Family | None, has_clock: bool) -> Method:
        plan = self._settled()
        settled = super().resolved(family, has_clock)
        by_layer = isinstance(self.heads, Mapping)
        return replace(settled, layers=plan.sites) if settled.layers is None and not by_layer else settled

    def windows(self, site: Site, tokens: int) -> Windows:
        plan = self._settled()
        if site.heads != plan.heads:
            raise ValueError(f"this plan is for sites of {plan.heads} heads; {site.name} has {site.heads}")
        layer = plan.layer(site.name)
        rules = zip(*(plan.tensors[name][0, layer].tolist() for name in ("alpha", "beta")), strict=True)
        kept = [window_of(alpha, beta, tokens, self.block_size) for alpha, beta in rules]
        return Windows(self.n_sink, tuple(None if window is None else window - self.n_sink for window in kept))

    def _settled(self) -> Plan:
        if self.plan is None:
            raise ValueError(
                "MoA has no plan: fit it with steer.calibrate(model, MoA(), samples), take MoA.published or "
                "MoA.uniform, or steer.load a fitted one"
            )
        return self.plan


def window_of(alpha: float, beta: float, tokens: int, block_size: int) -> int | None:
    """W of a rule for a prompt of `tokens` tokens, in tokens, sinks among them; None = every key. See `MoA`."""
    if beta == 1 and alpha >= 0:
        return None
    blocks = math.ceil((alpha + beta * tokens) / block_size - 1e-9)
    return max(blocks, 2) * block_size


def _windowed_sites(model: PreTrainedModel) -> list[Site]:
    """The sites that MoA can narrow: causal ones, but those that have a window from their model."""
    found = [site for site in find_sites(plain(model)) if site.kind == "causal" and site.window is None]
    if not found:
        raise ValueError(f"{type(plain(model)).__name__} has no causal attention without a window of its own")
    return found


def _plan(rows: Sequence[tuple[str, Sequence[float], Sequence[float]]]) -> Plan:
    """The plan of (site, alphas, betas) rows."""
    tables = {
        "alpha": torch.tensor([[alphas for _, alphas, _ in rows]], dtype=torch.float64),
        "beta": torch.tensor([[betas for *_, betas in rows]], dtype=torch.float64),
    }
    return Plan(sites=tuple(name for name, *_ in rows), heads=len(rows[0][1]), tensors=tables)


def _check_rules(plan: Plan) -> None:
    shape = (1, len(plan.sites), plan.heads)
    for name in ("alpha", "beta"):
        table = plan.tensors.get(name)
        if table is None or tuple(table.shape) != shape or not bool(table.isfinite().all()):
            held = ", ".join(f"{key} {tuple(tensor.shape)}" for key, tensor in plan.tensors.items()) or "nothing"
            raise ValueError(f"a plan of MoA holds alpha and beta, finite, {shape} each; this one holds {held}")
    beta = plan.tensors["beta"]
    if not bool(((beta >= 0) & (beta <= 1)).all()):
        low, high = float(beta.min()), float(beta.max())
        raise ValueError(f"beta is a share of the prompt, from 0 to 1; this plan has {low} to {high}")


@dataclass
class Found:
    """What a search has collected so far.

    Args:
        sums: of each site and each sample length S: (heads, S + 1) float64, see `steer.sensitivity.effect_of_windows`.
        samples: how many samples of each length there were.
        group: query heads that share a key/value head.
    """

    sums: dict[str, dict[int, torch.Tensor]] = field(default_factory=dict)
    samples: dict[int, int] = field(default_factory=dict)
    group: int = 1


@dataclass(kw_only=True)
class WindowSearch(Search, MoA, register=False):
    """The search of `MoA`, see there."""

    density: float = 0.5
    lengths: Sequence[int] | None = None
    alphas: Sequence[float] | None = None
    betas: Sequence[float] = BETAS
    per: Literal["kv_head", "query_head"] = "kv_head"
    measure: Measure = "rows"
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.heads is not None:
            raise ValueError("MoA is fitted to whole layers: leave heads out here, and give it to the fitted method")
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is a share of the keys, in (0, 1]")
        if self.lengths is not None and (not self.lengths or min(self.lengths) < 1):
            raise ValueError(f"lengths={self.lengths} must be prompt lengths in tokens, at least one")
        if self.per not in ("kv_head", "query_head"):
            raise ValueError(f"per={self.per!r} does not exist; choose kv_head or query_head")
        if self.measure not in ("rows", "keys"):
            raise ValueError(f"measure={self.measure!r} does not exist; choose rows or keys")
        if any(not 0 <= beta <= 1 for beta in self.betas):
            raise ValueError(f"betas={self.betas} are shares of the prompt, from 0 to 1")
        self._root: torch.Tensor | None = None

    def resolved(self, family: Family | None, has_clock: bool) -> Method:
        return self

    def prepare_cache(self, cache: Cache, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        """The model runs dense."""

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        """Nothing to make ready."""

    def run(self, target: Any, sample: Mapping[str, Any], seed: int) -> None:
        """One forward, and a backward to the first of the layers; weights get no gradient."""
        _check_sample(sample)
        self._root = None
        with torch.inference_mode(False), torch.enable_grad():
            loss = getattr(target(**{**sample, "use_cache": False}), "loss", None)
            if self._root is None or loss is None:
                raise ValueError(
                    f"{type(target).__name__} gave {'no loss' if loss is None else 'no attention call to look at'}; "
                    "MoA needs a model for causal language modelling, with full causal attention"
                )
            torch.autograd.grad(loss, self._root)
        self._root = None
        length = sample["input_ids"].shape[1]
        self.found.samples[length] = self.found.samples.get(length, 0) + 1

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        out = next(call)
        if not torch.is_grad_enabled() or call.site.window is not None:
            return out
        if call.extra.get("s_aux") is not None:
            raise ValueError(f"{call.site.name} has learned sinks in its softmax, which MoA does not know how to weigh")
        if self._root is None:  # what lies before needs no gradient
            out = self._root = out.detach().requires_grad_()
        query, key, value = call.query.detach(), call.key.detach(), call.value.detach()
        known = self.found.sums.setdefault(call.site.name, {})  # here, as backward meets the last layer first

        def note(gradient: torch.Tensor) -> None:
            sums = effect_of_windows(
                query,
                key,
                value,
                gradient,
                call.softmax_scale,
                n_sink=self.n_sink,
                measure=self.measure,
                softcap=call.extra.get("softcap"),
            ).cpu()
            length = sums.shape[-1] - 1
            known[length] = known[length] + sums if length in known else sums
            self.found.group = call.site.heads // call.site.kv_heads

        out.register_hook(note)
        return out

    def state(self) -> dict[str, Any]:
        found = self.found
        tensors = {f"{length}.{site}": sums for site, held in found.sums.items() for length, sums in held.items()}
        samples = [[length, count] for length, count in found.samples.items()]
        return {**tensors, "sites": list(found.sums), "samples": samples, "group": found.group}

    def load_state(self, state: Mapping[str, Any]) -> None:
        found = self.found
        found.samples, found.group = {length: count for length, count in state["samples"]}, state["group"]
        found.sums = {site: {length: state[f"{length}.{site}"] for length in found.samples} for site in state["sites"]}

    def finish(self) -> MoA:
        sites, samples = list(self.found.sums), self.found.samples
        shortest, longest = min(samples), max(samples)
        lengths = sorted(set(self.lengths or (shortest, longest, 2 * longest)))
        rules = _rules(self.alphas, self.betas, shortest, longest, lengths)
        of_samples = [count * self._hidden(rules, sites, length) for length, count in samples.items()]
        effect = torch.stack(of_samples).sum(0) / sum(samples.values())  # (L, H, R)
        layers, heads, _ = effect.shape
        group = self.found.group if self.per == "kv_head" else 1
        loss = effect.unflatten(1, (-1, group)).amax(2).flatten(0, 1)
        kept = [[self._kept(rule, length) for length in lengths] for rule in rules]
        cost = torch.tensor(kept).expand(len(loss), -1, -1)
        budget = [self.density * len(loss) * length for length in lengths]
        found = allocate(loss.numpy(), cost.numpy(), budget)
        chosen = torch.from_numpy(found.choice).view(layers, -1).repeat_interleave(group, 1)  # (L, H)
        tables = torch.tensor(rules, dtype=torch.float64)[chosen]
        hidden = effect.gather(2, chosen[..., None]).squeeze(2)
        density = torch.tensor(kept)[chosen].double().mean((0, 1)) / torch.tensor(lengths)
        plan = Plan(
            sites=tuple(sites),
            heads=heads,
            tensors={"alpha": tables[None, ..., 0], "beta": tables[None, ..., 1], "hidden": hidden[None]},
            report={
                "rules": [list(rule) for rule in rules],
                "figures": {
                    **{f"density at {n}": float(share) for n, share in zip(lengths, density, strict=True)},
                    "effect hidden": float(hidden.sum()),
                    "lower bound of the loss / loss": found.bound / found.loss if found.loss else 1.0,
                },
            },
        )
        given = {each.name: getattr(self, each.name) for each in fields(MoA)}
        return MoA(**given | {"plan": plan})

    def _hidden(self, rules: Sequence[tuple[float, float]], sites: Sequence[str], length: int) -> torch.Tensor:
        """(L, H, R) float64: what each rule hides at a sample length, as a share of what the least windows hide."""
        of_windows = torch.stack([self.found.sums[site][length] for site in sites])
        kept = [self._kept(rule, length) for rule in rules]
        windows = [length if tokens == length else tokens - self.n_sink for tokens in kept]
        least = min(2 * self.block_size - self.n_sink, length)
        return of_windows[..., windows] / of_windows[..., least].sum().clamp(min=torch.finfo(torch.float64).tiny)

    def _kept(self, rule: tuple[float, float], tokens: int) -> int:
        """W of a rule in tokens, at most all of them."""
        window = window_of(*rule, tokens, self.block_size)
        return tokens if window is None else min(window, tokens)


def _rules(
    alphas: Sequence[float] | None, betas: Sequence[float], shortest: int, longest: int, lengths: Sequence[int]
) -> list[tuple[float, float]]:
    """The candidates (alpha, beta) that ask for some keys at the shortest length and no more than all at the longest.

    Raises:
        ValueError: none is left.
    """
    if alphas is None:
        step = shortest / 2
        alphas = [step * i for i in range(-2, math.floor(longest / step + 1e-9) + 1)]
    least, most = min(shortest, *lengths), max(longest, *lengths)
    rules = [(a, b) for a, b in product(alphas, betas) if a + b * least > 0 and a + b * most <= most]
    if not rules:
        raise ValueError(
            f"none of alphas={list(alphas)} with betas={list(betas)} fits prompts of {least} to {most} tokens"
        )
    return rules


def _check_sample(sample: Mapping[str, Any]) -> None:
    ids, labels, mask = sample.get("input_ids"), sample.get("labels"), sample.get("attention_mask")
    if ids is None or labels is None or ids.shape[0] != 1 or labels.shape != ids.shape:
        raise ValueError(
            "a sample for MoA is {'input_ids': (1, S), 'labels': (1, S)}, one row at a time; got "
            + ", ".join(f"{name} {tuple(value.shape)}" for name, value in sample.items() if hasattr(value, "shape"))
        )
    if mask is not None and not bool(mask.all()):
        raise ValueError("a sample for MoA has no padding: give each at its own length")
    if bool((labels[:, 1:] == -100).all()):
        raise ValueError("labels are -100 everywhere, so there is no loss: leave the tokens of the answer in")
