"""Where the tokens of a joint text-video sequence are, and the blocks that they fall into."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch.nn.functional import pad

from steer_kernels.block_mask import BlockMask
from steer_kernels.rule import ALWAYS_VISIBLE, EVERYTHING, TokenRule
from steer_kernels.shapes import pair_of_blocks


@dataclass(frozen=True)
class Layout:
    """`visual` tokens with `text` before or after them, cut into blocks.

    A text token sees everything and is seen by everything, and so is the key of a sink: what is left to a pattern are
    the pairs of visual tokens.

    Attributes:
        visual, text: tokens.
        text_first: whether the text comes first.
        block_size: tokens in a (query, key) block.
        device: of the mask.
        sinks: leading visual tokens whose keys every query sees.
    """

    visual: int
    text: int
    text_first: bool
    block_size: tuple[int, int]
    device: torch.device | str
    sinks: int = 0

    @classmethod
    def of(
        cls,
        visual: int,
        block_size: int | tuple[int, int],
        device: torch.device | str,
        text_tokens: int = 0,
        text_first: bool = False,
        sinks: int = 0,
    ) -> Layout:
        at_least(1, tokens=visual)
        at_least(0, text_tokens=text_tokens)
        return cls(visual, text_tokens, text_first, pair_of_blocks(block_size), device, sinks)

    @property
    def length(self) -> int:
        return self.visual + self.text

    @property
    def first(self) -> int:
        """Place of the first visual token."""
        return self.text if self.text_first else 0

    def blocks(self, side: int) -> torch.Tensor:
        """(n,) int64 on the CPU: first tokens of the query (side 0) or key (side 1) blocks."""
        return torch.arange(0, self.length, self.block_size[side])

    def spans(self, side: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(n,) int64 on the CPU: the visual tokens [start, stop) of every block, without the keys of the sinks."""
        start = self.blocks(side) - self.first
        stop = (start + self.block_size[side]).clamp(max=self.visual)
        start = start.clamp(min=self.sinks if side else 0, max=self.visual)
        return start, torch.maximum(start, stop)

    def always(self, side: int) -> torch.Tensor:
        """(n,) bool: the blocks with tokens that see everything (side 0) or are seen by everything (side 1)."""
        start = self.blocks(side)
        stop = (start + self.block_size[side]).clamp(max=self.length)
        text = 0 if self.text_first else self.visual
        found = (start < text + self.text) & (stop > text)
        if side:
            found |= (start < self.first + self.sinks) & (stop > self.first)
        return self.on_device(found)

    def on_device(self, table: torch.Tensor) -> torch.Tensor:
        """A small table made on the CPU from shapes, copied without waiting for the device."""
        return table.to(self.device, non_blocking=True)

    def mask(
        self, visible: torch.Tensor, hidden: torch.Tensor, rule: TokenRule | None, order: str = "raster"
    ) -> BlockMask:
        """The block mask of (nQ, nK) bool grids: blocks with a `visible` visual pair, blocks with a `hidden` one."""
        keep = visible | self.always(0)[:, None] | self.always(1)
        return BlockMask.from_bool(
            keep[None, None],
            self.block_size,
            q_len=self.length,
            kv_len=self.length,
            partial=hidden[None, None],
            rule=rule,
            order=order,
        )

    def box_rule(self, low: torch.Tensor, high: torch.Tensor, at: torch.Tensor) -> TokenRule:
        """The box rule of (A, visual) tables, with the text and the sinks added."""
        key = self._with_text(at, ALWAYS_VISIBLE)
        key[..., self.first : self.first + self.sinks] = ALWAYS_VISIBLE
        return TokenRule.box(self._with_text(low, 0), self._with_text(high, EVERYTHING), key)

    def disc_rule(self, at: torch.Tensor, radius_squared: int) -> TokenRule:
        """The disc rule of (A, visual) coordinates, with the text added."""
        at = self._with_text(at, ALWAYS_VISIBLE)
        return TokenRule.disc(at, at, radius_squared)

    def _with_text(self, table: torch.Tensor, value: int) -> torch.Tensor:
        return pad(table.int(), (self.text, 0) if self.text_first else (0, self.text), value=value)[None, None]


def at_least(least: int, **numbers: float) -> None:
    for name, number in numbers.items():
        if number < least:
            raise ValueError(f"{name}={number} must be at least {least}")


def per_axis(name: str, value: int | Sequence[int], grid: tuple[int, ...]) -> tuple[int, ...]:
    """One number per axis of `grid`; a single one stands for all."""
    values = (value,) * len(grid) if isinstance(value, int) else tuple(value)
    if len(values) != len(grid):
        raise ValueError(f"{name}={value} has {len(values)} numbers for the {len(grid)} axes of the grid {grid}")
    return values
