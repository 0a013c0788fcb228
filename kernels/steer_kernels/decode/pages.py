"""Which pages of a key/value cache to attend: a summary of each page, its score against the query, and the best ones.

Mean scores and group scope: Kinetics (arXiv 2506.05333). Minimum/maximum scores: Quest (arXiv 2406.10774).
Everything is plain torch, and no shape depends on values, so that a CUDA graph can hold it.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import torch
import torch.nn.functional as F

KINDS = ("mean", "minmax")
SCOPES = ("group", "head")


@dataclass(frozen=True)
class PageSummary:
    """What is kept of every page of keys; made by `page_summary`.

    Attributes:
        kind: "mean" or "minmax".
        page_size: tokens per page.
        tensors: (mean,) or (minimum, maximum) over the tokens of the page, each (B, H_kv, n_pages, D); 0 for a page
            without a token.
        exists: (B, n_pages) boolean, whether the page holds a token.
    """

    kind: Literal["mean", "minmax"]
    page_size: int
    tensors: tuple[torch.Tensor, ...]
    exists: torch.Tensor

    def append(self, key: torch.Tensor, count: int, *, lengths: torch.Tensor | None = None) -> PageSummary:
        """The summary after `count` tokens were appended to every batch entry; reads the pages that they fell into.

        Tensors with room for them, as those of a static cache have, are updated in place, so that a step costs a few
        pages and not a copy of them all. Others are copied, which a growing cache pays once per page.

        Args:
            key: (B, H_kv, T, D) all keys, the appended ones included.
            count: tokens appended.
            lengths: (B,) tokens that exist now; None = T.

        Raises:
            ValueError: `count` below 1, or keys that are not those of this summary with something appended.
        """
        batch, heads, capacity, width = key.shape
        old_shape, total = self.tensors[0].shape, -(-capacity // self.page_size)
        if count < 1 or (batch, heads, width) != (*old_shape[:2], old_shape[3]) or total < old_shape[2]:
            raise ValueError(f"key {tuple(key.shape)} with count={count} does not follow on pages {tuple(old_shape)}")
        end = _ends(key, lengths)
        touched = (count + self.page_size - 2) // self.page_size + 1
        first = (end - count).clamp(min=0) // self.page_size
        # Where fewer pages are touched, the last is computed more than once, to the same values.
        index = (first[:, None] + torch.arange(touched, device=key.device)).clamp(max=total - 1)
        tokens = index[..., None] * self.page_size + torch.arange(self.page_size, device=key.device)
        entry = torch.arange(batch, device=key.device)[:, None]
        paged = key[entry, :, tokens.flatten(1).clamp(max=capacity - 1)].transpose(1, 2)
        fresh = _summarise(paged.unflatten(2, (touched, self.page_size)), self.kind, tokens < end[:, None, None])
        grown = total - old_shape[2]
        tensors = tuple(F.pad(old, (0, 0, 0, grown)) if grown else old for old in self.tensors)
        for old, new in zip(tensors, fresh, strict=True):
            old[entry, :, index] = new.transpose(1, 2)
        return replace(self, tensors=tensors, exists=_exists(total, self.page_size, end))


def page_summary(
    key: torch.Tensor, page_size: int, *, lengths: torch.Tensor | None = None, kind: Literal["mean", "minmax"] = "mean"
) -> PageSummary:
    """Mean, or minimum and maximum, of the keys of every page.

    Args:
        key: (B, H_kv, T, D), as the attention sees them (after the rotary embedding).
        page_size: tokens per page; the last page may be partly filled.
        lengths: (B,) tokens that exist; None = T.
        kind: "mean" (Kinetics) or "minmax" (Quest; twice the memory, and a needle in a page is not averaged away).

    Raises:
        ValueError: an unknown kind, or shapes that do not fit.
    """
    if kind not in KINDS:
        raise ValueError(f"kind={kind!r} does not exist; choose from {', '.join(KINDS)}")
    if key.ndim != 4:
        raise ValueError(f"key must be (B, H_kv, T, D); got {tuple(key.shape)}")
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")
    if lengths is not None and lengths.shape != key.shape[:1]:
        raise ValueError(f"lengths must be (B,) = ({key.shape[0]},); got {tuple(lengths.shape)}")
    capacity = key.shape[2]
    total = -(-capacity // page_size)
    end = _ends(key, lengths)
    if lengths is None:  # nothing to hide: no masked copy of the keys
        whole = capacity - capacity % page_size
        parts = [_summarise(key[:, :, :whole].unflatten(2, (whole // page_size, page_size)), kind)]
        if whole < capacity:
            parts.append(_summarise(key[:, :, None, whole:], kind))
        tensors = tuple(torch.cat(part, 2) for part in zip(*parts, strict=True))
    else:
        paged = F.pad(key, (0, 0, 0, total * page_size - capacity)).unflatten(2, (total, page_size))
        tokens = torch.arange(total * page_size, device=key.device).view(1, total, page_size)
        tensors = _summarise(paged, kind, tokens < end[:, None, None])
    return PageSummary(kind, page_size, tensors, _exists(total, page_size, end))


def page_scores(
    query: torch.Tensor, summary: PageSummary, *, scope: Literal["group", "head"] = "group"
) -> torch.Tensor:
    """How much a query is expected to attend to every page; for ranking, not scaled.

    "mean" summaries: the product with the mean key (for a group: of the mean query, as in Kinetics). "minmax"
    summaries: sum over d of max(q_d min_d, q_d max_d), which no key of the page exceeds (for a group: the largest of
    its heads). Several query tokens: the largest of them.

    Args:
        query: (B, H, S, D), H a multiple of the summary's H_kv.
        summary: from `page_summary`.
        scope: "group" = one score per key/value head, "head" = one per query head.

    Returns:
        (B, H_kv or H, n_pages) float32; -inf for a page without a token.

    Raises:
        ValueError: an unknown scope, or shapes that do not fit.
    """
    if scope not in SCOPES:
        raise ValueError(f"scope={scope!r} does not exist; choose from {', '.join(SCOPES)}")
    batch, kv_heads, _, width = summary.tensors[0].shape
    if query.ndim != 4 or query.shape[0] != batch or query.shape[-1] != width or query.shape[1] % kv_heads:
        raise ValueError(
            f"query must be ({batch}, a multiple of {kv_heads}, S, {width}) for this summary; got {tuple(query.shape)}"
        )
    grouped = query.float().unflatten(1, (kv_heads, -1))  # (B, H_kv, group, S, D)
    if scope == "group" and summary.kind == "mean":
        grouped = grouped.mean(2, keepdim=True)
    rows = grouped.flatten(2, 3)
    if summary.kind == "mean":
        scores = rows @ summary.tensors[0].float().mT
    else:
        low, high = (bound.float().mT for bound in summary.tensors)
        scores = rows.clamp(min=0) @ high + rows.clamp(max=0) @ low
    scores = scores.unflatten(2, grouped.shape[2:4]).amax(3)  # (B, H_kv, group, n_pages)
    scores = scores.amax(2) if scope == "group" else scores.flatten(1, 2)
    return scores.masked_fill(~summary.exists[:, None], -torch.inf)


def select_pages(
    scores: torch.Tensor,
    count: int,
    *,
    page_size: int,
    lengths: torch.Tensor | None = None,
    sink: int = 1,
    recent: int = 1,
) -> torch.Tensor:
    """The first `sink` and last `recent` pages, and the best others, up to `count` in all.

    Args:
        scores: (B, Hs, n_pages) from `page_scores`.
        count: pages to keep per list.
        page_size: tokens per page.
        lengths: (B,) tokens that exist; None = up to the last page whose score is not -inf.
        sink: leading pages that are always kept (one holds the attention sink).
        recent: trailing pages that are always kept.

    Returns:
        (B, Hs, min(count, n_pages)) int32 page numbers in no particular order, -1 where there are fewer pages.

    Raises:
        ValueError: `count` below `sink + recent`, or shapes that do not fit.
    """
    if scores.ndim != 3:
        raise ValueError(f"scores must be (B, Hs, n_pages); got {tuple(scores.shape)}")
    if min(sink, recent) < 0 or count < max(1, sink + recent):
        raise ValueError(f"count={count} cannot hold sink={sink} and recent={recent} pages")
    page = torch.arange(scores.shape[-1], device=scores.device)
    if lengths is None:
        existing = torch.where(scores > -torch.inf, page + 1, 0).amax(-1, keepdim=True)
    else:
        if lengths.shape != scores.shape[:1]:
            raise ValueError(f"lengths must be (B,) = ({scores.shape[0]},); got {tuple(lengths.shape)}")
        existing = ((lengths + page_size - 1) // page_size).clamp(max=scores.shape[-1])[:, None, None]
    forced = (page < sink) | (page >= existing - recent)
    ranked = scores.masked_fill(forced, torch.inf).masked_fill(page >= existing, -torch.inf)
    best = ranked.topk(min(count, scores.shape[-1]), -1, sorted=False)
    return torch.where(best.values > -torch.inf, best.indices, -1).int()


def _summarise(paged: torch.Tensor, kind: str, seen: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
    """Statistics over the tokens of pages (B, H_kv, n, page, D); of seen (B, n, page) ones if others may be NaN."""
    if kind == "mean":
        total = _fill(paged, seen, 0.0).sum(-2, dtype=torch.promote_types(paged.dtype, torch.float32))
        count = paged.shape[-2] if seen is None else seen.sum(-1).clamp(min=1)[:, None, :, None]
        return ((total / count).to(paged.dtype),)
    low, high = _fill(paged, seen, torch.inf).amin(-2), _fill(paged, seen, -torch.inf).amax(-2)
    if seen is None:
        return low, high
    empty = ~seen.any(-1)[:, None, :, None]
    return low.masked_fill(empty, 0.0), high.masked_fill(empty, 0.0)


def _fill(paged: torch.Tensor, seen: torch.Tensor | None, value: float) -> torch.Tensor:
    return paged if seen is None else paged.masked_fill(~seen[:, None, :, :, None], value)


def _ends(key: torch.Tensor, lengths: torch.Tensor | None) -> torch.Tensor:
    if lengths is None:
        return torch.full(key.shape[:1], key.shape[2], device=key.device)
    return lengths.clamp(max=key.shape[2]).long()


def _exists(total: int, page_size: int, end: torch.Tensor) -> torch.Tensor:
    return torch.arange(total, device=end.device) * page_size < end[:, None]
