"""What a method for language models is measured against: random keys, the best keys there are, and random heads."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import torch

from steer.method import Method
from steer_patches.site import Call, Next, Site

Heads = dict[str, list[int]]


@dataclass(frozen=True)
class Chosen:
    """What was chosen in the last call at a site, bool (B, H, S, T), and how many pairs there are to choose from."""

    keep: torch.Tensor
    seen: int


@dataclass(kw_only=True)
class ChosenKeys(Method, register=False):
    """Every query attends to a share of the keys that it may see, its own and the first ones always among them.

    Args:
        density: kept keys of each query, as a fraction of those visible to it.
        n_first: leading keys that are always kept: without the first token, where attention gathers, no choice works.
    """

    density: float = 0.5
    n_first: int = 1

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} must be above 0 and at most 1")

    def scores(self, call: Call) -> torch.Tensor:
        """(B or 1, H, S, T): what is larger is kept first."""
        raise NotImplementedError(f"{type(self).__name__} defines no scores(call)")

    def keep(self, call: Call) -> torch.Tensor:
        """The kept keys, bool (B, H, S, T)."""
        seen = visible(call)
        scores = self.scores(call).expand(seen.shape).masked_fill(~seen, -torch.inf)
        queries, keys = seen.shape[-2:]
        own = torch.arange(keys - queries, keys, device=seen.device)[:, None]
        scores = scores.scatter(-1, own.expand(*seen.shape[:-1], 1), torch.inf)
        leading = seen & (seen.any(-2, keepdim=True).cumsum(-1) <= self.n_first)
        scores = scores.masked_fill(leading, torch.inf)
        wanted = (seen.sum(-1, keepdim=True) * self.density).ceil().long().clamp(min=1)
        least = scores.sort(-1, descending=True).values.gather(-1, wanted - 1)
        return (scores >= least) & seen

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        seen, keep = visible(call), self.keep(call)
        if call.heads is not None:
            keep = torch.where(call.heads, keep, seen)
        call.site.kernel = Chosen(keep, int(seen.sum()))
        return next(call.replace(mask=keep, is_causal=False))

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        found = [site.kernel for site, _ in sites.values() if isinstance(site.kernel, Chosen)]
        return float(sum(each.keep.sum() for each in found)) / sum(each.seen for each in found) if found else None


@dataclass(kw_only=True)
class RandomKeys(ChosenKeys, register=False):
    """Every query of every head attends to its own token and to random ones before it.

    Args:
        density, n_first: see `ChosenKeys`.
        seed: of the choice.
    """

    seed: int = 0

    def scores(self, call: Call) -> torch.Tensor:
        shape = 1, call.query.shape[1], call.query.shape[2], call.key.shape[2]
        chance = torch.Generator().manual_seed(hash((self.seed, call.site.layer, *shape)) % 2**63)
        return torch.rand(shape, generator=chance).to(call.query.device)


@dataclass(kw_only=True)
class BestKeys(ChosenKeys, register=False):
    """Every query of every head attends to the keys of the largest weights, found by computing all of them.

    Slower than dense attention: it shows what attention of this density can reach, not how.
    """

    def scores(self, call: Call) -> torch.Tensor:
        return call.query @ call.expanded()[0].transpose(-1, -2)


def visible(call: Call) -> torch.Tensor:
    """The keys that each query may see in the unsteered model, bool (B, H, S, T)."""
    (rows, heads, queries, _), keys = call.query.shape, call.key.shape[2]
    keep, causal = call.visible()
    if keep is None:
        keep = torch.ones(queries, keys, dtype=torch.bool, device=call.query.device)
        keep = keep.tril(keys - queries) if causal else keep
    return keep.expand(rows, heads, queries, keys)


def as_many_random_heads(heads: Mapping[str, Sequence[int]], among: Sequence[Site], seed: int) -> Heads:
    """As many heads as were chosen, drawn from those that were not.

    Args:
        heads: the chosen heads by site name.
        among: the sites to draw from.
        seed: of the choice.

    Raises:
        ValueError: too few are left.
    """
    count = sum(len(set(chosen)) for chosen in heads.values())
    rest = [(site.name, head) for site in among for head in range(site.heads) if head not in heads.get(site.name, ())]
    if count > len(rest):
        raise ValueError(f"{count} heads were chosen, and only {len(rest)} others are left to draw from")
    order = torch.randperm(len(rest), generator=torch.Generator().manual_seed(seed))[:count].tolist()
    drawn: Heads = {}
    for name, head in sorted(rest[i] for i in order):
        drawn.setdefault(name, []).append(head)
    return drawn
