"""Which token pairs of a partial block attend: a rule over per-token tables, the same on every backend."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch

EVERYTHING = 2**31 - 1
ALWAYS_VISIBLE = -1


@dataclass(frozen=True, eq=False)
class TokenRule:
    """Visibility of key j for query i by table lookup, so that any order of the tokens and any grid is one rule.

    box:  low[a, i] <= at[a, j] < high[a, i] on every axis a (windows, bands, groups, staircases);
    disc: sum over the axes of (query[a, i] - key[a, j])^2 < radius_squared, in 32-bit numbers: no two points may be
          further apart than 46,340.

    A key at -1 (text, sinks) is visible to every query. A query that sees everything has the box [0, 2^31 - 1), or
    the disc coordinate -1.

    Attributes:
        kind: "box" or "disc".
        query: (B or 1, H or 1, 2A, S_q) int32, the lows before the highs; disc: (B or 1, H or 1, A, S_q) coordinates.
        key: (B or 1, H or 1, A, S_k) int32 coordinates.
        radius_squared: of the disc, in squared tokens.
    """

    kind: str
    query: torch.Tensor
    key: torch.Tensor
    radius_squared: int = 0

    @classmethod
    def box(cls, low: torch.Tensor, high: torch.Tensor, at: torch.Tensor) -> TokenRule:
        """`low`, `high`: (B or 1, H or 1, A, S_q); `at`: (B or 1, H or 1, A, S_k)."""
        return cls("box", torch.cat([low, high], 2).int().contiguous(), at.int().contiguous())

    @classmethod
    def disc(cls, query: torch.Tensor, key: torch.Tensor, radius_squared: int) -> TokenRule:
        """`query`: (B or 1, H or 1, A, S_q); `key`: (B or 1, H or 1, A, S_k)."""
        return cls("disc", query.int().contiguous(), key.int().contiguous(), radius_squared)

    @property
    def axes(self) -> int:
        return self.key.shape[2]

    @property
    def q_len(self) -> int:
        return self.query.shape[-1]

    @property
    def kv_len(self) -> int:
        return self.key.shape[-1]

    @property
    def batch_heads(self) -> tuple[int, int]:
        return max(self.query.shape[0], self.key.shape[0]), max(self.query.shape[1], self.key.shape[1])

    def __call__(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        """Boolean visibility of key `k` for query `q` in batch row `b` and head `h`: index tensors that broadcast."""
        query = [_lookup(self.query, b, h, row, q) for row in range(self.query.shape[2])]
        key = [_lookup(self.key, b, h, axis, k) for axis in range(self.axes)]
        if self.kind == "box":
            visible = (query[0] <= key[0]) & (key[0] < query[self.axes])
            for axis in range(1, self.axes):
                visible = visible & (query[axis] <= key[axis]) & (key[axis] < query[self.axes + axis])
            return visible | (key[0] < 0)
        squared = (query[0] - key[0]) ** 2
        for axis in range(1, self.axes):
            squared = squared + (query[axis] - key[axis]) ** 2
        return (squared < self.radius_squared) | (key[0] < 0) | (query[0] < 0)

    def to(self, device: torch.device | str) -> TokenRule:
        return replace(self, query=self.query.to(device), key=self.key.to(device))


def _lookup(table: torch.Tensor, b: torch.Tensor, h: torch.Tensor, row: int, token: torch.Tensor) -> torch.Tensor:
    batch = b if table.shape[0] > 1 else torch.zeros_like(b)
    head = h if table.shape[1] > 1 else torch.zeros_like(h)
    return table[:, :, row][batch, head, token]


@dataclass(frozen=True, eq=False)
class ModRule:
    """A FlexAttention `mask_mod(b, h, q, k) -> bool`; backends without Python at run time refuse it."""

    mask_mod: Callable[..., torch.Tensor]

    batch_heads = (1, 1)

    def __call__(self, b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
        return self.mask_mod(b, h, q, k)

    def to(self, device: torch.device | str) -> ModRule:
        return self
