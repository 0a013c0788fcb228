"""DuoAttention: all keys for the heads that retrieve, the first and the latest for all others."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch

from steer.method import Span
from steer.methods.retrieval_heads import RetrievalSearch, check_scores, plan_of, planned
from steer.plan import Plan
from steer.windowed import Windowed
from steer.windows import Windows
from steer_patches.family import Family
from steer_patches.site import Site
from steer_patches.sites import find_sites, plain


@dataclass(kw_only=True)
class DuoAttention(Windowed):
    """Retrieval heads keep all keys and values; the others see the first tokens and a window of the latest.

    A KV head counts as much as the best of its query heads, by score + reach. Of all KV heads in the selected layers
    the best `share` keep everything; the query heads of the others see key j from query i where
    j < sink or i - j < recent, in the prompt and after it. The cache holds no more than that. A sequence that is never
    longer than sink + recent gives the same bits as without. With `steps="1:"` the prompt is read in full, and dropped
    afterwards: fewer heads then keep what later tokens need.

    `steer.calibrate(model, DuoAttention(), samples)` finds the scores as for `RetrievalHeads`, whose plans fit here,
    and `read_gates` reads published ones. The retrieval score alone says who copies; the reach adds the heads with
    which the question finds what is to be copied.

    Args:
        plan: "score" and, if there is one, "reach", (1, sites, heads), see `RetrievalHeads`.
        share: of the KV heads that keep everything. 0.5 for models with grouped queries and 0.25 without, as published.
        sink: first tokens that every head sees.
        recent: latest tokens of the other heads, the query's own among them.

    Source: Xiao et al., "DuoAttention: Efficient Long-Context LLM Inference with Retrieval and Streaming Heads", arXiv
    2410.10819. There a gate for each KV head is trained, with the model frozen; the forward-only score of 2404.15574
    takes its place here. `sink` and `recent` are those of its published patterns.
    """

    plan: Plan | None = None
    share: Annotated[float, Span(0, 1)] = 0.5
    sink: Annotated[int, Span(0, 256)] = 64
    recent: Annotated[int, Span(1, 1024)] = 256

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share={self.share} is a share of the KV heads, in [0, 1]")
        if self.sink < 0 or self.recent < 1:
            raise ValueError(f"sink={self.sink} must be 0 or more tokens, recent={self.recent} at least 1")
        if self.plan is not None:
            check_scores(self.plan)
        self._full: frozenset[tuple[str, int]] = frozenset()  # the (site, KV head) pairs that keep everything

    def search(self, **options: Any) -> RetrievalSearch:
        """The search of `steer.calibrate`, with the samples and options of `RetrievalHeads.search`."""
        return RetrievalSearch(layers=self.layers, fitted=self, **options)

    def is_neutral(self) -> bool:
        return self.share == 1

    def resolved(self, family: Family | None, has_clock: bool) -> DuoAttention:
        given = self.layers is not None or isinstance(self.heads, Mapping)
        return replace(self, layers=self.layers if given else planned(self).sites)

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        super().prepare_model(model, sites)
        scores = {
            (site.name, kv): score
            for site in sites
            if site.window is None
            for kv, score in enumerate(kv_scores(planned(self), site))
        }
        best = sorted(scores, key=lambda head: -scores[head])
        self._full = frozenset(best[: round(self.share * len(best))])

    def windows(self, site: Site, tokens: int) -> Windows:
        each = site.heads // site.kv_heads
        full = [(site.name, kv) in self._full for kv in range(site.kv_heads)]
        return Windows(self.sink, tuple(None if full[head // each] else self.recent for head in range(site.heads)))


def kv_scores(plan: Plan, site: Site) -> list[float]:
    """What each KV head of a site counts: the highest score + reach of its query heads.

    Raises:
        ValueError: the plan has nothing for that site, or another number of heads.
    """
    if site.heads != plan.heads:
        raise ValueError(f"this plan is for sites of {plan.heads} heads; {site.name} has {site.heads}")
    counts = sum(plan.tensors[name][0, plan.layer(site.name)] for name in ("score", "reach") if name in plan.tensors)
    return torch.as_tensor(counts).unflatten(0, (site.kv_heads, -1)).amax(-1).tolist()


def read_gates(file: str | Path, model: Any) -> Plan:
    """A plan from a file of the paper's code: the trained gates, a line for each layer, tabs between the KV heads.

    Args:
        file: e.g. `full_attention_heads.tsv`.
        model: the model that the gates are of.

    Raises:
        ValueError: other layers or KV heads than the model's.
    """
    gates = [[float(gate) for gate in line.split()] for line in Path(file).read_text().splitlines() if line.strip()]
    found = [site for site in find_sites(plain(model)) if site.kind == "causal"]
    here, there = [site.kv_heads for site in found], [len(line) for line in gates]
    if here != there:
        raise ValueError(
            f"{file} has {len(there)} layers of {sorted(set(there))} KV heads; this {type(model).__name__} has "
            f"{len(here)} of {sorted(set(here))}"
        )
    rows = [
        [gate for gate in line for _ in range(site.heads // site.kv_heads)]
        for site, line in zip(found, gates, strict=True)
    ]
    return plan_of({site.name: site.layer for site in found}, torch.tensor([rows]), {})
