"""Where a prompt's question looks in its pictures: what GIFT reads, without a map."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass, field

import torch

from steer_patches.generation import Text
from steer_patches.site import Call, Next, Scope

ROWS = 128  # question tokens whose rows of the map are computed at a time


@dataclass(eq=False)
class Gaze:
    """Where a prompt's question looks, read layer by layer.

    Args:
        content: for each row the places of its content words' tokens, (n,) int64.
        shows: (B, S) bool, visual tokens. question: (B, S) bool.
        share: of the heads, that count.
        layers: how many are to be read.
        found: name of a layer -> S (B, S).
    """

    content: list[torch.Tensor]
    shows: torch.Tensor
    question: torch.Tensor
    share: float
    layers: int
    found: dict[str, torch.Tensor] = field(default_factory=dict)
    _plan: torch.Tensor | None = None

    @torch.no_grad()
    def read(self, call: Call) -> None:
        """Read one layer: the rows of the content words' tokens, and those before each."""
        keep, causal = call.visible()
        exact = torch.float64 if call.query.dtype == torch.float64 else torch.float32
        total = torch.zeros(self.shows.shape, dtype=exact, device=call.query.device)
        for row, places in enumerate(self.content):
            seen = self.shows[row].nonzero().flatten()
            if not len(places) or not len(seen):
                continue
            shift = torch.zeros(call.query.shape[1], len(seen), dtype=exact, device=total.device)
            for some in places.split(ROWS):
                weights = rows_of_map(call, row, torch.cat([some, some - 1]), keep, causal)[..., seen]
                here, before = weights.chunk(2, 1)
                shift += (here - before).clamp(min=0).sum(1)
            chosen = most(shift.sum(-1)[None], self.share)[0]
            total[row, seen] = shift[chosen].mean(0) / len(places)
        self.found[call.site.name] = total

    def plan(self, alpha: float, clamp: float) -> torch.Tensor:
        """(B, 3, S): log m; 1.0 on visual tokens; 1.0 on the question. Made once all layers are read."""
        if self._plan is None:
            assert len(self.found) == self.layers, "a saliency layer was not run"
            mean = torch.stack([one.to(self.shows.device) for one in self.found.values()]).mean(0)
            log_m = alpha * scaled(mean, self.shows, clamp)
            self._plan = torch.stack([log_m, self.shows.to(log_m.dtype), self.question.to(log_m.dtype)], 1)
        return self._plan


class _Enough(Exception):
    """All that is to be read has been."""


def read_before(scope: Scope, text: Text, gaze: Gaze, reading: Sequence[str]) -> None:
    """Run the prompt without methods up to the last saliency layer, and read the gaze there."""
    assert scope.again is not None

    @torch.compiler.disable
    def attend(call: Call, next: Next) -> torch.Tensor:
        gaze.read(call)
        if len(gaze.found) == len(reading):
            raise _Enough
        return next(call)

    valid = text.valid if text.valid is not None else torch.ones_like(gaze.shows)
    changes = {"attention_mask": valid.long(), "past_key_values": None, "use_cache": False}  # a cache has other masks
    with torch.no_grad(), suppress(_Enough):
        scope.again(at=dict.fromkeys(reading, attend), **changes)


def rows_of_map(call: Call, row: int, at: torch.Tensor, keep: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """(H, n, S_kv): the softmax map's rows of the queries `at` (n,) of one row of the batch, of a prompt.

    Args:
        keep, causal: which keys a query may see, see `Call.visible`.
    """
    query, key = call.query[row, :, at], call.key[row]
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.unflatten(0, (key.shape[0], -1)) @ key[:, None].mT).flatten(0, 1).to(exact) * call.softmax_scale
    softcap = None if call.site.processor == "sdpa" else call.extra.get("softcap")  # sdpa takes none
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if causal:
        later = torch.arange(call.key.shape[2], device=at.device) > at[:, None]  # a cache's free slots too
        scores = scores.masked_fill(later, -torch.inf)
    elif keep is not None:
        shown = keep[row if keep.shape[0] > 1 else 0]
        scores = scores.masked_fill(~(shown if shown.shape[1] == 1 else shown[:, at]), -torch.inf)
    return scores.softmax(-1)


def most(mass: torch.Tensor, share: float) -> torch.Tensor:
    """(B, H) bool: the share of the heads with the largest mass (B, H), at least one."""
    count = max(1, math.floor(mass.shape[1] * share + 1e-9))  # 0.29 * 100 is a little below 29
    return torch.zeros_like(mass, dtype=torch.bool).scatter(1, mass.topk(count, 1).indices, True)


def scaled(mean: torch.Tensor, shows: torch.Tensor, clamp: float) -> torch.Tensor:
    """S (B, S) over the visual tokens of each row, without its outliers, in [0, 1]; 0 where all are the same.

    Args:
        shows: (B, S) bool, visual tokens. clamp: what is an outlier, in standard deviations.
    """
    count = shows.sum(-1, keepdim=True)
    middle = torch.where(shows, mean, 0.0).sum(-1, keepdim=True) / count.clamp(min=1)
    spread = torch.where(shows, mean - middle, 0.0).square().sum(-1, keepdim=True) / (count - 1).clamp(min=1)
    reach = clamp * spread.sqrt()
    mean = mean.clamp(middle - reach, middle + reach)
    low = torch.where(shows, mean, torch.inf).amin(-1, keepdim=True)
    high = torch.where(shows, mean, -torch.inf).amax(-1, keepdim=True)
    differs = high - low > 8 * torch.finfo(mean.dtype).eps * high
    return torch.where(shows & differs, (mean - low) / (high - low), 0.0)
