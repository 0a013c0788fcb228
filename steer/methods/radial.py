"""Radial attention: in video, a band that narrows as frames get further apart."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from steer.method import Span
from steer.sparse import Prepared, Sparse, Tokens
from steer_kernels import patterns
from steer_patches.site import Site


@dataclass(kw_only=True)
class RadialAttention(Sparse):
    """Whole attention between neighbouring frames; further apart, bands that halve at every doubling of the distance.

    With n tokens per frame, P = 2^bitlen(n) and g = bitlen(d), frames at distance d >= 2 see the tokens
    |column - row| <= max(P / 2^g * decay, block) of each other; where P / 2^g < 128, only every (128 * 2^g / P)-th
    distance is kept. Text sees everything and is seen by everything. The mask depends on shapes alone; its density
    falls as O(log n / n). See `steer_kernels.patterns.radial` for the rule of the blocks.

    Args:
        decay: factor on the width of the bands; 0.2 for Wan2.1-14B, 0.8 for Wan2.2-A14B, 0.95 for HunyuanVideo.
        key_frame_sink: every query sees all of the first frame (Wan).
        key_block: tokens in a block of keys, where it is not `block_size`. Smaller ones lose less at the edges of the
            bands; on a CPU 64 queries by 32 keys are fastest, on a GPU 128 by 128 or 64.

    Source: Li et al., "Radial Attention: O(n log n) Sparse Attention with Energy Decay for Long Video Generation",
    arXiv 2506.19852. The rule is that of the published code, checked block by block; sizes that are not multiples of
    the block lose no tokens here, and the mask is made anew for every size.
    """

    decay: Annotated[float, Span(0, 2)] | None = None
    key_frame_sink: bool | None = None
    key_block: Annotated[int, Span(16, 128)] | None = None

    needs_video: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"steps": "0.24:", "decay": 0.95, "key_frame_sink": False}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.decay is not None and self.decay < 0:
            raise ValueError(f"decay={self.decay} must be 0 or more")
        if self.key_block is not None and self.key_block < 1:
            raise ValueError(f"key_block={self.key_block} must be at least 1")

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        assert self.decay is not None and self.key_frame_sink is not None and self.block_size is not None
        decay, sink, blocks = self.decay, self.key_frame_sink, (self.block_size, self.key_block or self.block_size)

        def build() -> Prepared:
            mask = patterns.radial(
                tokens_per_frame=tokens.per_frame,
                frames=tokens.grid[0],
                decay=decay,
                key_frame_sink=sink,
                block_size=blocks,
                **tokens.of_text(),
            )
            return Prepared(tokens, mask)

        return self.once("mask", tokens, build)
