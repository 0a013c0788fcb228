"""Smoothed-energy guidance (SEG): steer away from a prediction whose attention queries are blurred."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Annotated, ClassVar

import torch
import torch.nn.functional as F

from steer.guidance import Guidance
from steer.method import Span
from steer_patches.site import Call, Next

INFINITE = 9999.0  # the reference takes every larger sigma as infinite


@dataclass(kw_only=True)
class SEG(Guidance):
    """Steer away from a prediction in which the image queries of chosen self-attention layers are blurred.

    The queries (B, H, S, D), as the attention kernel sees them, are blurred over the token grid with a Gaussian of
    standard deviation `sigma` (in tokens); keys and values stay. With an infinite sigma every query is the mean query,
    so one attention row a head is computed and broadcast. Text queries of joint attention stay; video is blurred frame
    by frame for a finite sigma and averaged over all frames for an infinite one.

    Args:
        scale: guidance weight; 3.0 in the reference, 2 to 5 advised.
        sigma: blur in tokens; infinite by default, 1 to 10 for a milder effect, 0 = no blur.

    Source: Hong, "Smoothed Energy Guidance", arXiv 2408.00760. Blur checked against an explicit reflect-padded
    convolution; on non-square grids the kernel is cut to each axis (the reference takes square grids only).
    """

    sigma: Annotated[float, Span(0, 10)] = math.inf

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    stage: ClassVar[str] = "inputs"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.sigma < 0:
            raise ValueError(f"sigma={self.sigma} must not be negative")

    def is_neutral(self) -> bool:
        return super().is_neutral() or _kernel_size(self.sigma, 1 << 30) == 1

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        image, text = call.spans()
        queries = call.query[:, :, image]
        if self.sigma > INFINITE and call.heads is None and text.start == text.stop and _same_for_all(call):
            mean = queries.mean(2, keepdim=True)
            mask = None if call.mask is None else call.mask
            return next(call.replace(query=mean, mask=mask)).expand_as(queries)
        if self.sigma > INFINITE:
            blurred = queries.mean(2, keepdim=True).expand_as(queries)
        else:
            if call.layout is None:
                raise ValueError(f"no token grid is known at {call.site.name}: use the infinite sigma")
            blurred = blur(queries, call.layout.grid_of(queries.shape[2]), self.sigma)
        if call.heads is not None:
            blurred = torch.where(call.heads, blurred, queries)
        parts = [call.query[:, :, text], blurred]
        if text.start >= image.stop:
            parts.reverse()
        return next(call.replace(query=torch.cat(parts, dim=2)))


def _same_for_all(call: Call) -> bool:
    """Whether every query sees the same keys, so that one attention row serves all of them."""
    return not call.is_causal and (call.mask is None or call.mask.ndim == 2 or call.mask.shape[-2] == 1)


def _kernel_size(sigma: float, length: int) -> int:
    """ceil(6 sigma), made odd, at most the axis length (made odd)."""
    size = math.ceil(6 * sigma) if sigma < INFINITE else length
    longest = length + 1 if length % 2 == 0 else length
    return max(1, min(size + 1 if size % 2 == 0 else size, longest))


def _taps(sigma: float, size: int, like: torch.Tensor) -> torch.Tensor:
    """`size` samples of a Gaussian, normalised to sum 1."""
    x = torch.arange(size, device=like.device, dtype=torch.float64) - (size - 1) / 2
    taps = torch.exp(-0.5 * (x / max(sigma, 1e-12)) ** 2)
    return (taps / taps.sum()).to(like.dtype)


def blur(queries: torch.Tensor, grid: tuple[int, int, int], sigma: float) -> torch.Tensor:
    """Gaussian blur of queries (B, H, T * h * w, D) over the height and width of their grid, with reflected borders."""
    b, heads, tokens, d = queries.shape
    t, h, w = grid
    maps = queries.reshape(b * heads, t, h, w, d).permute(0, 1, 4, 2, 3).reshape(-1, 1, h, w)
    high, wide = _kernel_size(sigma, h), _kernel_size(sigma, w)
    padded = F.pad(maps, (wide // 2, wide // 2, high // 2, high // 2), mode="reflect")
    blurred = F.conv2d(padded, _taps(sigma, high, queries).view(1, 1, high, 1))
    blurred = F.conv2d(blurred, _taps(sigma, wide, queries).view(1, 1, 1, wide))
    return blurred.reshape(b * heads, t, d, h, w).permute(0, 1, 3, 4, 2).reshape(b, heads, tokens, d)
