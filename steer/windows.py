"""What the heads of a language model see: the first tokens and a window of the latest, for each head its own."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass, field

import torch

EVERY = 2**62  # a window that no text fills
Pair = tuple[int, int | None]


@dataclass(frozen=True)
class Windows:
    """What the query heads of one layer see: query i sees key j if j <= i and (j < sink or i - j < window).

    Positions count the real tokens of a row, so padding shifts nothing; a window counts the query's own token.

    Args:
        sink: first tokens that every query sees; one number, or one per query head.
        window: latest tokens of each query head; None = every key.

    Attributes:
        pairs: (sink, window) of each query head; (0, None) where it sees everything.

    Raises:
        ValueError: a negative sink, a window below 1, or different numbers of heads.
    """

    sink: int | tuple[int, ...]
    window: tuple[int | None, ...]
    pairs: tuple[Pair, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        sinks = (self.sink,) * len(self.window) if isinstance(self.sink, int) else tuple(self.sink)
        if not self.window or len(sinks) != len(self.window):
            raise ValueError(f"{len(sinks)} sinks for {len(self.window)} windows: give one of each per query head")
        if min(sinks) < 0 or any(window is not None and window < 1 for window in self.window):
            raise ValueError(f"sink={self.sink}, window={self.window}: a sink is at least 0, a window at least 1")
        pairs = tuple(
            (0, None) if window is None else (sink, window) for sink, window in zip(sinks, self.window, strict=True)
        )
        object.__setattr__(self, "pairs", pairs)

    def covers(self, tokens: int) -> bool:
        """Whether every query of a sequence of `tokens` sees all keys before it."""
        return all(window is None or tokens <= sink + window for sink, window in self.pairs)

    def of(self, heads: Sequence[int]) -> Windows:
        """Those of some query heads."""
        pairs = [self.pairs[head] for head in heads]
        return Windows(tuple(sink for sink, _ in pairs), tuple(window for _, window in pairs))

    def within(self, heads: torch.Tensor | None) -> Windows:
        """With every key for the query heads that a (H, 1, 1) bool mask leaves out."""
        if heads is None:
            return self
        chosen = zip(self.pairs, heads.flatten().tolist(), strict=True)
        pairs = [pair if inside else (0, None) for pair, inside in chosen]
        return Windows(tuple(sink for sink, _ in pairs), tuple(window for _, window in pairs))

    def groups(self, kv_heads: int) -> tuple[Group, ...]:
        """KV heads whose query heads have the same windows, together."""
        return _groups(self, kv_heads)

    def seen(self, queries: torch.Tensor, keys: torch.Tensor) -> torch.Tensor:
        """Which keys each query sees, bool (B, H or 1, S, T), from their token numbers.

        Args:
            queries: (B or 1, S) int64, keys: (B or 1, T) int64; -1 = padding. What is computed for padding is never
                read, but must be finite: it sees every key.
        """
        near, far = self.parts(queries, keys)
        return near | far

    def parts(self, queries: torch.Tensor, keys: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        """`seen` in two: the keys that are no sinks, and the sinks."""
        pairs = self.pairs if len(set(self.pairs)) > 1 else self.pairs[:1]
        sinks = torch.tensor([sink for sink, _ in pairs], device=keys.device)[:, None, None]
        widths = [EVERY if window is None else window for _, window in pairs]
        query, key = queries[:, None, :, None], keys[:, None, None, :]
        near = query - key < torch.tensor(widths, device=keys.device)[:, None, None]
        exists, is_sink = (key >= 0) & (key <= query), key < sinks
        return exists & near & ~is_sink | (query < 0), exists & is_sink

    def share(self, first: int, last: int) -> float:
        """Pairs that the queries from `first` to before `last` see, as a fraction of those of causal attention."""
        tokens = torch.arange(first + 1, last + 1, dtype=torch.float64)
        visible = 0.0
        for sink, window in self.pairs:
            near = tokens if window is None else tokens.clamp(max=window)
            visible += float((near + (tokens - near).clamp(max=sink)).sum())
        return visible / float(tokens.sum()) / len(self.window)


@dataclass(frozen=True)
class Group:
    """KV heads whose query heads have the same windows: the KV heads, the query heads, and the windows of these."""

    kv_heads: tuple[int, ...]
    heads: tuple[int, ...]
    windows: Windows

    @property
    def alike(self) -> bool:
        """Whether all heads see the same."""
        return len(set(self.windows.pairs)) == 1

    @property
    def kept(self) -> tuple[tuple[int, ...], int, int | None]:
        """(KV heads, sink, window) that their cache must hold, for the query head that sees the most."""
        pairs = self.windows.pairs
        if any(window is None for _, window in pairs):
            return self.kv_heads, 0, None
        return self.kv_heads, max(sink for sink, _ in pairs), max(window or 0 for _, window in pairs)

    def sees_all(self, numbers: torch.Tensor) -> bool:
        """Whether the latest of these tokens, (B or 1, T), sees them all in every head; not if one has just left."""
        _, sink, window = self.kept
        return self.alike and (window is None or numbers.shape[1] <= sink + window)


@functools.lru_cache(maxsize=512)
def _groups(windows: Windows, kv_heads: int) -> tuple[Group, ...]:
    each = len(windows.window) // kv_heads
    alike: dict[tuple[Pair, ...], list[int]] = {}
    for kv in range(kv_heads):
        alike.setdefault(windows.pairs[kv * each : (kv + 1) * each], []).append(kv)
    made = []
    for members in alike.values():
        heads = tuple(head for kv in members for head in range(kv * each, (kv + 1) * each))
        made.append(Group(tuple(members), heads, windows.of(heads)))
    return tuple(made)
