"""Re-ttention: a thin static band of keys, corrected by what full attention last said about all the others."""

from __future__ import annotations

import math
import weakref
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, NamedTuple, get_args

import torch

from steer.method import Span
from steer.sparse import Prepared, Sparse, Tokens, fitted, ordered, restored
from steer_kernels import BlockMask, block_sparse_attention, partial, patterns
from steer_kernels.order import TokenOrder, axes
from steer_patches.site import Call, Next, Run, Scope, Site

Residual = Literal["device", "cpu", "int8"]
RESIDUALS: tuple[Residual, ...] = get_args(Residual)


class Kept(NamedTuple):
    """What an attention call keeps for its next sparse step; tokens are in the order of the mask.

    Args:
        rho: (B, H, S) share of the whole softmax denominator that the kept keys have.
        residual: (B, H, S, D) what the other keys added to the output.
        scale: (B, H, S, 1) of an int8 residual, else None.
    """

    rho: torch.Tensor
    residual: torch.Tensor
    scale: torch.Tensor | None


@dataclass(eq=False)
class Memory:
    """What the calls of one site kept in the last pass of a kind, and in this one; in the order of the calls.

    There is one call a pass, or several where a model or `rows` computes attention row by row.
    """

    last: list[Kept] = field(default_factory=list)
    now: list[Kept] = field(default_factory=list)


@dataclass(kw_only=True)
class ReTtention(Sparse):
    """Sparse attention with the denominator and the lost output of the last full step: O = rho O_M + R.

    M keeps the keys in a band: in an image of S tokens |q - k| <= int(S keep) // 2, in a video of n tokens a frame the
    positions |p - p'| <= int(n keep) // 2 of every frame. Text sees everything and is seen by everything. With the
    denominators D_M and D over the kept and over all keys:

        refresh step (the first active one of a run, then every `period`-th):
            output O in full;  rho = D_M / D = exp(LSE_M - LSE);  R = O - rho O_M
        other steps:
            output rho O_M + R;  then rho += ramp

    A refresh step gives the model's own output, bit for bit, and costs the model's attention once and its log-sum-exp,
    a second pass, besides the sparse one. R is kept before the output projection, which is linear, so that it makes no
    difference. Every site keeps rho and R for each kind of pass (rows in one call or in calls of their own, perturbed
    passes of guidance), until the run ends or the grid changes. A bare model has no runs: every forward counts as the
    next step of one.

    Memory: as much as one attention output per site. CogVideoX-2b 4.1 GB and Wan2.1-14B at 75,600 tokens 62 GB, both
    in 16 bit and with two rows of guidance; int8 takes half of that plus 4 bytes per token and head.

    Args:
        keep: width of the band as a fraction of the image or frame; 1 = all keys.
        ramp: lambda, what rho gains at every sparse step. Published: 0.04, also where rho is 1 already (text).
        period: steps from one refresh to the next; 1 changes nothing.
        clamp: keep rho at 1 or less. Not in the published code.
        residual: where R stays: "device", "cpu" (host memory, copied at every step) or "int8" (on the device, rounded
            to 1/127 of the largest entry of each token and head).

    Source: Chen et al., "Re-ttention: Ultra Sparse Visual Generation via Attention Statistical Reshape", arXiv
    2505.22918. Masks, ratio, residual, ramp and the schedules of PixArt (5 of 20 steps dense) and CogVideoX (15 of 50)
    are those of the published code; the log-sum-exps, which need no map of the attention, are not in it.
    """

    keep: Annotated[float, Span(0.05, 1)] | None = None
    ramp: Annotated[float, Span(0, 0.2)] | None = None
    period: Annotated[int, Span(1, 10)] | None = None
    clamp: bool = False
    residual: Residual = "device"

    defaults: ClassVar[Mapping[str, Any]] = {"steps": "0.3:", "keep": 0.03125, "ramp": 0.04, "period": 5}

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.keep is not None and not 0 < self.keep <= 1:
            raise ValueError(f"keep={self.keep} must be above 0 and at most 1 (all keys)")
        if self.ramp is not None and not (math.isfinite(self.ramp) and self.ramp >= 0):
            raise ValueError(f"ramp={self.ramp} must be a finite number, 0 or more")
        if self.period is not None and self.period < 1:
            raise ValueError(f"period={self.period} must be at least 1 step")
        if self.residual not in RESIDUALS:
            raise ValueError(f"residual={self.residual!r} does not exist; choose from {', '.join(RESIDUALS)}")
        self._memories: dict[Any, Memory] = {}
        self._run: weakref.ref[Run] | None = None
        self._grid: tuple[int, int, int] | None = None
        self._first = 0  # step of the run's first refresh
        self._forwards: Counter[str | None] = Counter()  # of the run, by CFG branch, to count steps without a clock
        self._counted = (0, 0)  # refreshes and all forwards of the latest run in which the method was on
        self._refresh = False
        self._layout: Any = None  # of the forward under way: every forward makes a new one
        self._passes: Counter[tuple[str, ...]] = Counter()  # of that forward, by the rows that they compute
        self._kind: Any = None  # of the pass under way

    def is_neutral(self) -> bool:
        return self.period == 1

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        assert self.keep is not None and self.block_size is not None
        keep, block = self.keep, self.block_size

        def reach(size: int) -> int:
            return size if keep == 1 else int(size * keep) // 2

        def build() -> Prepared:
            if tokens.grid[0] == 1:
                width, order = reach(tokens.visual), None
                mask = patterns.diagonal(q_len=tokens.visual, width=width, block_size=block, **tokens.of_text())
            else:
                # with time fastest, the stripes of all frames are one band: positions take the part of frames
                order = axes(tokens.grid, "HWT", **tokens.of_text())
                stripes = patterns.frames(
                    tokens_per_frame=tokens.grid[0],
                    frames=tokens.per_frame,
                    reach=reach(tokens.per_frame),
                    block_size=block,
                    **tokens.of_text(),
                )
                mask = replace(stripes, order=order.name)
            every = BlockMask.dense(tokens.length, tokens.length, block, tokens.device)
            return Prepared(tokens, mask, order, extra=every)

        return self.once("mask", tokens, build)

    def visual_order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        return axes(grid, "HWT", device=device) if grid[0] > 1 else None

    def entry_order(self, scope: Scope) -> TokenOrder | None:
        """Raster at refresh steps: sums over reordered keys are rounded differently."""
        return None if self._is_due(scope) else super().entry_order(scope)

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        self._enter(scope)
        for name in sites:
            before = self._memories.get((name, self._kind))
            self._memories[name, self._kind] = Memory([] if before is None or self._refresh else before.now)
        super().before_forward(scope, sites)

    def prepared(self, tokens: Tokens, site: Site, heads: torch.Tensor | None, in_order: bool = False) -> Prepared:
        made = super().prepared(tokens, site, heads, in_order)
        return replace(made, extra=(made.extra, self._memories[site.name, self._kind]))

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        assert ready.mask is not None
        every, memory = ready.extra
        query, key, value, valid = ordered(call, ready)
        mask = fitted(ready.mask, call, valid)
        kept = memory.last.pop(0) if memory.last else None
        if kept is None or kept.rho.shape != query.shape[:3]:
            full = next(call)
            settings: dict[str, Any] = {"scale": call.scale, "backend": self.backend, "return_lse": True}
            part, part_lse = block_sparse_attention(query, key, value, mask, **settings)
            if valid is None and query.device.type == "cpu" and self.backend is None:
                _, lse = partial(query, key, value, scale=call.scale)  # half the time: it copies no keys
            else:
                _, lse = block_sparse_attention(query, key, value, fitted(every, call, valid), **settings)
            rho = torch.exp(part_lse - lse).detach()  # constants for the steps that follow, also in training
            rest = _in_order(full, ready).detach() - rho[..., None] * part.detach()
            memory.now.append(self._put_away(rho, rest.to(full.dtype)))
            return full
        part = block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend)
        out = (kept.rho[..., None] * part + _fetched(kept, part.device)).to(part.dtype)
        if call.heads is not None:
            out = torch.where(call.heads, out, part)  # the other heads are dense already
        rho = kept.rho + self.ramp
        memory.now.append(Kept(rho.clamp(max=1) if self.clamp else rho, kept.residual, kept.scale))
        return restored(out, ready)

    def expected_density(self, tokens: Tokens, site: Site) -> float | None:
        """That of the band, and every `period` steps the whole map twice: for the output, and for its log-sum-exp."""
        assert self.period is not None
        band = super().expected_density(tokens, site)
        return None if band is None else band + 2 / self.period

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        """The mean over the forwards of the latest run: a refresh counts as the whole map (it is computed twice)."""
        band, (full, number) = super().computed_density(sites), self._counted
        return None if band is None or not number else (full + (number - full) * band) / number

    def _put_away(self, rho: torch.Tensor, residual: torch.Tensor) -> Kept:
        if self.residual == "int8":
            scale = (residual.abs().amax(-1, keepdim=True).float() / 127).clamp(min=torch.finfo(torch.float32).tiny)
            return Kept(rho, (residual / scale).round().to(torch.int8), scale)
        # not waited for: what reads it is queued behind it on the same device
        return Kept(rho, residual.to("cpu", non_blocking=True) if self.residual == "cpu" else residual, None)

    def _enter(self, scope: Scope) -> None:
        """A pass begins: which step it belongs to, and what kind of pass it is."""
        run = scope.run
        if scope.layout is not self._layout:
            self._refresh = self._is_due(scope)
            if self._is_new(scope):
                self._forget()
                self._run, self._grid = weakref.ref(run, self._forget), scope.layout.grid if scope.layout else None
                self._first = run.step
                self._forwards.clear()
                self._counted = (0, 0)
            self._layout = scope.layout
            self._passes.clear()
            self._forwards[run.branch] += 1
            self._counted = (self._counted[0] + self._refresh, self._counted[1] + 1)
        self._kind = (scope.rows, run.branch, run.calls, self._passes[scope.rows])
        self._passes[scope.rows] += 1

    def _is_due(self, scope: Scope) -> bool:
        """Whether the forward that begins refreshes; the same for all calls of a step."""
        assert self.period is not None
        step = self._forwards[scope.run.branch] if scope.run.num_steps is None else scope.run.step
        return self._is_new(scope) or (step - self._first) % self.period == 0

    def _is_new(self, scope: Scope) -> bool:
        known = self._run is not None and self._run() is scope.run
        return not known or scope.layout is None or scope.layout.grid != self._grid

    def _forget(self, _: Any = None) -> None:
        """Free what all sites keep; called when the run is gone."""
        for memory in self._memories.values():
            memory.last.clear()
            memory.now.clear()
        self._memories.clear()


def _in_order(out: torch.Tensor, ready: Prepared) -> torch.Tensor:
    """(B, H, S, D) as the model has it, in the order of the mask."""
    return out if ready.order is None or not ready.permute else ready.order.apply(out, 2)


def _fetched(kept: Kept, device: torch.device) -> torch.Tensor:
    residual = kept.residual.to(device, non_blocking=True)
    return residual if kept.scale is None else residual * kept.scale
