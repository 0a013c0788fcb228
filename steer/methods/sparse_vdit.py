"""Sparse-vDiT: every head of a video model in one of five fixed patterns, which a search has chosen offline."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Annotated, Any, ClassVar

import torch

from steer.method import Span
from steer.plan import Plan, Search, step_group
from steer.sparse import Prepared, Sparse, Tokens, fitted, ordered, restored, valid_keys
from steer_kernels import BlockMask, block_sparse_attention
from steer_kernels.order import axes
from steer_patches.family import Family
from steer_patches.site import Call, Next, Site

MODES = ("full", "skip", "diagonal", "multi-diagonal", "vertical")
FULL, SKIP, DIAGONAL, MULTI_DIAGONAL, VERTICAL = range(5)
EPSILON, WEIGHT = 0.08, 0.1  # see `SparseVDiT.search`


@dataclass(kw_only=True)
class SparseVDiT(Sparse):
    """Each head computes everything, nothing, a band of the tokens, the same places of other frames, or fixed columns.

    With V visual tokens and w = V * (1 - sqrt(1 - density)), query i sees key j where
    - full: always; skip: never, and the head's output is zero;
    - diagonal: |i - j| <= w in raster order, which is attention inside of a frame and to its neighbours;
    - multi-diagonal: |i - j| <= w in the order (height, width, frames), which is attention to the same place in all
      frames;
    - vertical: j is one of the first density * V tokens, which are the first frame and some after it.
    Blocks in which any token pair is visible are computed whole. Text sees everything and is seen by everything,
    except in skipped heads. Which head has which pattern is the `plan`; it holds no sizes, so that it serves any
    resolution. `steer.calibrate(pipe, SparseVDiT(), prompts)` finds one, see `search`.

    Args:
        plan: "mode", (groups, sites, heads) int8, an index into MODES.
        density: share of the token pairs in each of the last three patterns.

    Source: Chen et al., "Sparse-vDiT: Unleashing the Power of Sparse Attention to Accelerate Video Diffusion
    Transformers", arXiv 2506.03065. No code is published: all of this is reconstructed from the paper. It states
    neither widths nor columns; one density for the three patterns, and the first tokens as columns, are choices made
    here.
    """

    plan: Plan | None = None
    density: Annotated[float, Span(0.05, 1)] | None = None

    needs_video: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"steps": ":", "density": 0.25}
    without_preset: ClassVar[str] = "`steer.calibrate`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is a share of the token pairs, in (0, 1]")
        if self.plan is not None:
            _check_modes(self.plan)

    def search(self, *, epsilon: float = EPSILON, weight: float = WEIGHT, groups: int = 1) -> PatternSearch:
        """The search of `steer.calibrate`: for each head the pattern of least loss, layer after layer.

        With O_0 the head's full output and O_m that of pattern m, loss_m = error_m + weight * density_m, where
        error_m = ||O_m - O_0||^2 / mean over the layer's heads of ||O_0||^2, so that heads which contribute little may
        be skipped. A head stays full where no loss is below epsilon. The layer emits the chosen outputs, so that later
        layers see the errors made in earlier ones. Losses are averaged over samples, CFG branches and the steps of a
        group.

        The paper does not say in which units its epsilon = 1 and weight = 0.5 are. The defaults here leave about half
        of the blocks of `emoji-wan`; the paper's FLOPs for Wan2.1-14B amount to 0.44. On `emoji-wan` a weight of 0.5
        costs half a decibel to one at the same density, and 0 gains nothing that is clear.

        Args:
            epsilon: largest loss.
            weight: price of computing everything, in units of the error.
            groups: equal parts of the run that get choices of their own.
        """
        given = {each.name: getattr(self, each.name) for each in fields(self)}
        return PatternSearch(**given | {"plan": None}, epsilon=epsilon, weight=weight, groups=groups)

    def resolved(self, family: Family | None, has_clock: bool) -> Sparse:
        if self.plan is None:
            raise ValueError(
                "SparseVDiT has no plan: fit it with steer.calibrate(pipe, SparseVDiT(), prompts), or steer.load a "
                "fitted one"
            )
        settled = super().resolved(family, has_clock)
        by_layer = isinstance(self.heads, Mapping)
        return replace(settled, layers=self.plan.sites) if settled.layers is None and not by_layer else settled

    def prepared(self, tokens: Tokens, site: Site, heads: torch.Tensor | None, in_order: bool = False) -> Prepared:
        """The modes of the site's heads in the current step group, and the masks of all modes that they point into."""
        plan, run = self.plan, site.scope.run
        assert plan is not None
        if site.heads != plan.heads:
            raise ValueError(f"this plan is for sites of {plan.heads} heads; {site.name} has {site.heads}")
        group, layer = plan.group(run.step, run.num_steps), plan.layer(site.name)
        chosen = None if heads is None else heads.flatten()

        def build() -> Prepared:
            modes = plan.tensors["mode"][group, layer].long()
            modes = modes if chosen is None else torch.where(chosen.to(modes.device), modes, FULL)
            if bool((modes == FULL).all()):
                return Prepared(tokens, extra=modes)
            permute = bool((modes == MULTI_DIAGONAL).any())
            return replace(self.table(tokens), permute=permute, extra=modes.to(tokens.device))

        return self.once((site.name, group, None if chosen is None else tuple(chosen.tolist())), tokens, build)

    def table(self, tokens: Tokens) -> Prepared:
        """The masks of all modes as the heads of one mask, and the order of the multi-diagonal one."""
        assert self.density is not None and self.block_size is not None
        density, block = self.density, self.block_size

        def build() -> Prepared:
            keep = blocks_of_modes(tokens, density, block)[None]
            mask = BlockMask.from_bool(keep, block, q_len=tokens.length, kv_len=tokens.length)
            return Prepared(tokens, mask, axes(tokens.grid, "HWT", **tokens.of_text()))

        return self.once("modes", tokens, build)

    def expected_density(self, tokens: Tokens, site: Site) -> float:
        plan, mask = self.plan, self.table(tokens).mask
        assert plan is not None and mask is not None
        shares = densities(mask)[plan.tensors["mode"][:, plan.layer(site.name)].long()].mean(-1)
        lengths = torch.tensor([*plan.starts, 1.0], dtype=torch.float64).diff()
        return float((shares * lengths).sum())

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None or ready.mask is None:  # every head is full
            return next(call)
        device = call.query.device
        modes = ready.extra.to(device)
        modes = modes if call.head_range is None else modes[call.head_range]
        query, (key, value) = call.query, call.expanded()
        if ready.permute:
            assert ready.order is not None
            order = ready.order.to(device)
            raster = torch.arange(ready.tokens.length, device=device)
            moved = (modes == MULTI_DIAGONAL)[:, None]
            there, back = (torch.where(moved, table, raster) for table in (order.to_ordered, order.to_raster))
            query, key, value = (_in_own_order(x, there) for x in (query, key, value))
        # Hidden keys are text, which no order moves. The lists of all heads are copied out of the few there are:
        # kept for every layer they would take gigabytes.
        mask = fitted(ready.mask, call.replace(head_range=None), valid_keys(call, ready.tokens)).of_heads(modes)
        out = block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend)
        return _in_own_order(out, back) if ready.permute else out

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        kept = [site.kernel for site, _ in sites.values() if isinstance(site.kernel, Prepared)]
        shares = [1.0 if made.mask is None else float(densities(made.mask)[made.extra].mean()) for made in kept]
        return sum(shares) / len(shares) if shares else None


def blocks_of_modes(tokens: Tokens, density: float, block_size: int) -> torch.Tensor:
    """(modes, n, n) bool: the blocks of every mode, the multi-diagonal one in its own order. See `SparseVDiT`."""
    visual, device = tokens.visual, tokens.device
    width = math.floor(visual * (1 - math.sqrt(1 - density)) + 1e-9)
    columns = math.ceil(visual * density - 1e-9)
    start = torch.arange(0, tokens.length, block_size, device=device)
    stop = (start + block_size).clamp(max=tokens.length)
    first, last = (start - tokens.first).clamp(min=0), (stop - 1 - tokens.first).clamp(max=visual - 1)
    begin, end = tokens.text_span or (0, 0)
    of_text = (start < end) & (stop > begin)
    text = of_text[:, None] | of_text
    band = torch.maximum(first[:, None] - last, first - last[:, None]) <= width
    vertical = (first < columns).expand_as(band)
    full = torch.ones_like(band)
    return torch.stack([full, ~full, band | text, band | text, vertical | text])


def densities(mask: BlockMask) -> torch.Tensor:
    """(H,) float64: the share of the blocks that each head of a mask without rule computes."""
    return mask.full_num[0].sum(-1, dtype=torch.float64) / mask.full_idx[0, 0].numel()


def _in_own_order(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """`x` (B, H, S, D) with the tokens of each head in its own order, (H, S) int64."""
    return x.gather(2, order[None, :, :, None].expand_as(x))


def _energy(x: torch.Tensor) -> torch.Tensor:
    """(H,) float64: the sum of the squares of `x` (B, H, S, D) in each head."""
    return x.float().square().sum((0, 2, 3), dtype=torch.float64)


def _check_modes(plan: Plan) -> None:
    shape = (len(plan.starts), len(plan.sites), plan.heads)
    modes = plan.tensors.get("mode")
    if modes is None or tuple(modes.shape) != shape or not bool(((modes >= 0) & (modes < len(MODES))).all()):
        held = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in plan.tensors.items()) or "nothing"
        raise ValueError(
            f"a plan of SparseVDiT holds mode {shape}, numbers below {len(MODES)} for {', '.join(MODES)}; "
            f"this one holds {held}"
        )


@dataclass
class Found:
    """What a search has collected so far; shared by its copies on the models of a pipeline.

    Args:
        sums: of each site, (groups, heads, 4, 2) float64: loss and error of the modes after "full", summed.
        calls: of each site, (groups,) int64: how many were summed.
        shares: (5,) float64: the densities of the modes on the latest grid.
        grids: frames x height x width that were seen.
    """

    sums: dict[str, torch.Tensor] = field(default_factory=dict)
    calls: dict[str, torch.Tensor] = field(default_factory=dict)
    shares: torch.Tensor = field(default_factory=lambda: torch.ones(len(MODES), dtype=torch.float64))
    grids: list[str] = field(default_factory=list)


@dataclass(kw_only=True)
class PatternSearch(Search, SparseVDiT, register=False):
    """The search of `SparseVDiT`, see there."""

    epsilon: float = EPSILON
    weight: float = WEIGHT
    groups: int = 1
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.epsilon < 0 or self.weight < 0:
            raise ValueError(f"epsilon={self.epsilon} and weight={self.weight} must be 0 or more")
        if self.groups < 1:
            raise ValueError(f"groups={self.groups} must be at least 1")

    @property
    def starts(self) -> tuple[float, ...]:
        return tuple(group / self.groups for group in range(self.groups))

    def resolved(self, family: Family | None, has_clock: bool) -> Sparse:
        return Sparse.resolved(self, family, has_clock)

    def prepared(self, tokens: Tokens, site: Site, heads: torch.Tensor | None, in_order: bool = False) -> Prepared:
        return self.table(tokens)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        """The chosen output of every head, the losses noted; O(5) attention calls and two outputs in memory."""
        ready, full = self.ready(call), next(call)
        if ready is None:
            return full
        assert ready.mask is not None
        shares = densities(ready.mask)
        size = _energy(full).mean().clamp(min=torch.finfo(torch.float64).tiny)
        out, least = full, torch.full((full.shape[1],), self.epsilon, dtype=torch.float64, device=full.device)
        noted = []
        for mode in range(SKIP, len(MODES)):
            candidate = self._output(call, ready, mode)
            error = _energy(candidate.float() - full.float()) / size
            loss = error + self.weight * shares[mode].to(error.device)
            loss = loss if call.heads is None else torch.where(call.heads.flatten(), loss, torch.inf)
            better = loss < least
            out, least = torch.where(better[:, None, None], candidate, out), torch.where(better, loss, least)
            noted.append(torch.stack([loss, error], -1))
        self._note(call, ready, torch.stack(noted, 1).cpu(), shares.cpu())
        return out

    def _output(self, call: Call, ready: Prepared, mode: int) -> torch.Tensor:
        """(B, H, S, D) of one mode in all heads."""
        if mode == SKIP:
            return torch.zeros_like(call.query)
        assert ready.mask is not None
        ready = replace(ready, mask=ready.mask.of_heads(slice(mode, mode + 1)), permute=mode == MULTI_DIAGONAL)
        query, key, value, valid = ordered(call, ready)
        assert ready.mask is not None
        mask = fitted(ready.mask, call, valid)
        return restored(block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend), ready)

    def _note(self, call: Call, ready: Prepared, noted: torch.Tensor, shares: torch.Tensor) -> None:
        found, site, groups = self.found, call.site.name, len(self.starts)
        group = step_group(self.starts, call.run.step, call.run.num_steps)
        if site not in found.sums:
            found.sums[site] = torch.zeros(groups, *noted.shape, dtype=torch.float64)
            found.calls[site] = torch.zeros(groups, dtype=torch.int64)
        found.sums[site][group] += noted
        found.calls[site][group] += 1
        found.shares = shares
        grid = "x".join(map(str, ready.tokens.grid))
        if grid not in found.grids:
            found.grids.append(grid)

    def state(self) -> dict[str, Any]:
        found = self.found
        tensors = {f"sums.{site}": sums for site, sums in found.sums.items()}
        tensors |= {f"calls.{site}": calls for site, calls in found.calls.items()}
        return {**tensors, "shares": found.shares, "sites": list(found.sums), "grids": found.grids}

    def load_state(self, state: Mapping[str, Any]) -> None:
        sites, found = state["sites"], self.found
        found.sums = {site: state[f"sums.{site}"] for site in sites}
        found.calls = {site: state[f"calls.{site}"] for site in sites}
        found.shares, found.grids = state["shares"], list(state["grids"])

    def figure(self) -> str:
        return f"density {float(self.found.shares[self._choices()[0]].mean()):.3f}" if self.found.sums else ""

    def _choices(self) -> tuple[torch.Tensor, torch.Tensor]:
        """(groups, sites, heads) int64 modes, and the errors that go with all modes, (groups, sites, heads, 5)."""
        sums, calls = (torch.stack([*table.values()], 1) for table in (self.found.sums, self.found.calls))
        mean = sums / calls[:, :, None, None, None]  # NaN in groups that no step fell into, which stay full
        loss, error = mean.unbind(-1)
        least, mode = loss.min(-1)
        modes = torch.where(least < self.epsilon, mode + SKIP, FULL)
        return modes, torch.nn.functional.pad(error, (1, 0))

    def finish(self) -> SparseVDiT:
        if not self.found.sums:
            raise ValueError("the data made no attention call at the sites and steps of this SparseVDiT")
        modes, error = self._choices()
        of_chosen = error.gather(-1, modes[..., None]).squeeze(-1)
        plan = Plan(
            sites=tuple(self.found.sums),
            heads=modes.shape[-1],
            starts=self.starts,
            tensors={"mode": modes.to(torch.int8), "error": error.float()},
            report={
                "names": {"mode": list(MODES)},
                "grids": self.found.grids,
                "figures": {
                    "density": float(self.found.shares[modes].mean()),
                    "relative squared error": float(of_chosen.mean()),
                    **{f"share of {name} heads": float((modes == i).double().mean()) for i, name in enumerate(MODES)},
                },
            },
        )
        given = {each.name: getattr(self, each.name) for each in fields(SparseVDiT)}
        return SparseVDiT(**given | {"plan": plan, "density": self.density or self.defaults["density"]})
