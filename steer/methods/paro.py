"""PAROAttention: per head, the order of the axes that makes its attention blocky, and a static mask in that order."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar

import torch

from steer.method import Span
from steer.plan import Plan, Search
from steer.sparse import Prepared, Sparse, Tokens, fitted, valid_keys
from steer_kernels import BlockMask, block_mass, block_profile, block_sparse_attention
from steer_kernels.order import axes
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

PERMUTATIONS = ("THW", "TWH", "HWT", "HTW", "WHT", "WTH")  # the slowest axis first; THW is the model's own order
STARTS = (0.0, 0.125, 0.25, 0.375, 0.5)  # step groups of a search: four in the first half of the run, one for the rest
# what a search may go by, and the figures that it takes
CRITERIA = {"error": ("error",), "paper": ("sparse blocks", "incoherence"), "raster": ("error",)}


@dataclass(kw_only=True)
class PAROAttention(Sparse):
    """Every head sees the visual tokens in the best of six axis orders, and there only the blocks that hold its mass.

    O_h = inverse of pi_h (softmax over the kept blocks of (pi_h q)(pi_h k)^T) pi_h v. The order pi_h and the blocks are
    fixed, and found offline for one model and size by `steer.calibrate`; blocks differ between groups of steps. The
    order is applied after the rotary embedding, so with all blocks the attention is the dense one. Text is never
    permuted and always dense: all rows and columns of a block that holds text, so that a plan fits any text length.

    Args:
        plan: orders and blocks of a grid and block size, from `steer.calibrate`: "permutation" (L, H) int8, numbers
            in `PERMUTATIONS`, and "blocks" (G, L, H, n, n) bool over the n visual blocks. One group's block lists
            are held ready, 8 bytes for each of its blocks.
        density: share of the visual blocks that a search keeps, in every head; 0.5 where None. The paper's are 0.5,
            0.3 and 0.2.
        block_size: tokens in a block; 64 where None, as in the paper.

    Raises:
        ValueError: at apply, no plan, or one of another density or block size than asked for; before a forward,
            another grid, or a layer that the plan does not have.

    Source: Zhao et al., "PAROAttention: Pattern-Aware ReOrdering for Efficient Sparse and Quantized Attention in Visual
    Generation Models", arXiv 2506.16054. The six orders and the shapes of a plan are those of the authors' processors,
    the rest is reconstructed from the paper. Not built: attention in INT8 or INT4, which saves
    nothing on a CPU, and heads that are left empty, whose criterion is not published.
    """

    plan: Plan | None = None
    density: Annotated[float, Span(0.1, 1)] | None = None

    defaults: ClassVar[Mapping[str, Any]] = {"steps": ":", "block_size": 64, "density": 0.5}
    without_preset: ClassVar[str] = "`steer.calibrate`"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.density is not None and not 0 < self.density <= 1:
            raise ValueError(f"density={self.density} is a share of the blocks in (0, 1]")
        self._group = 0
        if self.plan is not None:
            _check_plan(self.plan)

    def search(self, **options: Any) -> PAROSearch:
        """The search of `steer.calibrate`; its options are the fields of `PAROSearch`."""
        return PAROSearch(method=self, **options)

    def resolved(self, family: Family | None, has_clock: bool) -> Sparse:
        plan = self.plan
        if plan is None:
            raise ValueError(
                "PAROAttention needs a plan for this model and size: "
                "method = steer.calibrate(pipe, steer.PAROAttention(), [prompts]), then method.save(folder)"
            )
        made: dict[str, Any] = {"block_size": plan.block_size, "density": plan.report.get("density")}
        for name, value in made.items():
            asked = getattr(self, name)
            if None not in (asked, value) and asked != value:
                raise ValueError(
                    f"{name}={asked}, but the plan was made for {name}={value}: calibrate anew, or leave it"
                )
        fields = {name: value for name, value in made.items() if value is not None}
        return replace(super().resolved(family, has_clock), **fields)

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        assert self.plan is not None
        for site, _ in sites.values():
            self.plan.layer(site.name)
            if site.heads != self.plan.heads:
                raise ValueError(f"the plan has {self.plan.heads} heads a layer, {site.name} has {site.heads}")
        group = self.plan.group(scope.run.step, scope.run.num_steps)
        if group != self._group:
            self._made.clear()  # one group's lists are held at a time: they are large
            self._group = group
        super().before_forward(scope, sites)

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        plan = self.plan
        assert plan is not None
        if tokens.grid != plan.grid:
            raise ValueError(
                f"this plan of PAROAttention is for {_size(plan.grid)} visual tokens (frames x height x width), "
                f"this forward has {_size(tokens.grid)}: calibrate at this size"
            )
        layer = plan.layer(site.name)

        def build() -> Prepared:
            keep = with_text(plan.tensors["blocks"][self._group, layer].to(tokens.device), tokens, plan.block_size or 0)
            mask = BlockMask.from_bool(keep[None], plan.block_size or 0, q_len=tokens.length, kv_len=tokens.length)
            chosen = plan.tensors["permutation"][layer].to(tokens.device, torch.long)
            return Prepared(tokens, mask, extra=HeadOrders(self._tables(tokens), chosen))

        return self.once((site.name, self._group), tokens, build)

    def _tables(self, tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
        return self.once("orders", tokens, lambda: Prepared(tokens, extra=order_tables(tokens))).extra

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        assert ready.mask is not None
        there, back = ready.extra.of_heads(call.head_range)
        valid = valid_keys(call, ready.tokens)
        if valid is not None:
            valid = valid[:, there[0]]  # only text is ever padded, and it is in the same places in every head
        key, value = call.expanded()
        query, key, value = (permuted(x, there) for x in (call.query, key, value))
        mask = fitted(ready.mask, call, valid)
        out = block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend)
        return permuted(out, back)


@dataclass(frozen=True, eq=False)
class HeadOrders:
    """A token order for every head.

    Args:
        tables: two of (6, S) int64: for each permutation, the token at each place, and the place of each token.
        chosen: (H,) int64, the permutation of each head.
    """

    tables: tuple[torch.Tensor, torch.Tensor]
    chosen: torch.Tensor

    def of_heads(self, part: slice | None) -> tuple[torch.Tensor, torch.Tensor]:
        """Two of (H, S): into the orders of these heads, and back."""
        chosen = self.chosen if part is None else self.chosen[part]
        return self.tables[0][chosen], self.tables[1][chosen]


def permuted(x: torch.Tensor, order: torch.Tensor) -> torch.Tensor:
    """(B, H, S, ...) with the tokens of head h in the order `order[h]`, (H, S)."""
    return x[:, torch.arange(x.shape[1], device=x.device)[:, None], order]


def order_tables(tokens: Tokens) -> tuple[torch.Tensor, torch.Tensor]:
    """For each of the six permutations, the token at every place, and its inverse: two of (6, S) int64.

    Visual tokens come first and text last, wherever the model has it: blocks of visual tokens do not depend on it then.
    """
    text = torch.arange(tokens.text, device=tokens.device) + (0 if tokens.text_first else tokens.visual)
    visual = [axes(tokens.grid, order, device=tokens.device).to_ordered + tokens.first for order in PERMUTATIONS]
    there = torch.stack([torch.cat([order, text]) for order in visual])
    return there, there.argsort(-1)


def with_text(blocks: torch.Tensor, tokens: Tokens, size: int) -> torch.Tensor:
    """(H, n, n) bool of the visual blocks to (H, nQ, nK) of the sequence with its text at the end, which is dense."""
    if not tokens.text:
        return blocks
    pure, whole = tokens.visual // size, -(-tokens.length // size)
    keep = blocks.new_ones(blocks.shape[0], whole, whole)
    keep[:, :pure, :pure] = blocks[:, :pure, :pure]
    return keep


def keep_largest(mass: torch.Tensor, density: float) -> torch.Tensor:
    """The blocks of the largest mass in every head, (..., n, n) bool; each row keeps its best whatever the density."""
    rows, columns = mass.shape[-2:]
    best = mass.argmax(-1, keepdim=True)
    ranked = mass.scatter(-1, best, torch.inf).flatten(-2)
    wanted = max(rows, round(density * rows * columns))
    kept = ranked.argsort(dim=-1, descending=True, stable=True)[..., :wanted]
    return torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, kept, True).unflatten(-1, (rows, columns))


@dataclass(kw_only=True)
class PAROSearch(Search, register=False):
    """Two passes over the data: the first chooses the permutation of every head, the second its blocks.

    The model runs dense, and each attention call is looked at: the exact softmax map P over the visual tokens, summed
    over blocks, of the conditional rows (of all rows where a model computes them one by one). A head keeps the blocks
    of the largest sums, averaged over the samples and the steps of a group. Its permutation, averaged over all samples
    and steps, is by `criterion`

    "error": that of the smallest error: |sparse output - output|^2 with the best blocks of the call, at the density.
    "paper": that of the largest alpha * M_sparse - (1 - alpha) * M_quant, each divided by its sum over the
        permutations. M_sparse is the share of the blocks with at least `sparse_share` of their entries below
        `threshold`, M_quant the mean over the blocks of max / mean of their entries. (The paper's text adds the two
        and minimises; but more sparse blocks are better.)

    "raster": always the model's own order; what the others are compared with.

    "error" costs six sparse attentions more, and is the default because it is better: on `emoji-wan` the published
    criterion does worse than no reordering (`steer eval sparse`, docs/methods/sparse.md).

    Args:
        method: the method to fit.
        criterion: "error", "paper" or "raster".
        starts: fractions of the run at which groups of steps with masks of their own begin; None = `STARTS`, and one
            group on a bare model. A group that no step of the data falls into gets the masks of the one before.
        every: look at every so-manieth step only, from the first on.
        alpha, threshold, sparse_share: see "paper". 1 leaves M_quant out, which matters for quantised attention only.
        memory: GiB that the block sums and the plan may take.

    Raises:
        ValueError: options out of range; data of more than one grid; sums that take more memory.
    """

    method: PAROAttention = field(default_factory=PAROAttention)
    criterion: str = "error"
    starts: Sequence[float] | None = None
    every: int = 1
    alpha: float = 1.0
    threshold: float = 1e-3
    sparse_share: float = 0.9
    memory: float = 8.0

    kinds: ClassVar[tuple[str, ...]] = Sparse.kinds
    default_layers: ClassVar[str] = "*"
    needs_grid: ClassVar[bool] = True

    def __post_init__(self) -> None:
        method = self.method
        self.layers, self.heads, self.min_tokens = method.layers, method.heads, method.min_tokens
        super().__post_init__()
        if self.criterion not in CRITERIA:
            raise ValueError(f"criterion={self.criterion!r} does not exist; choose from {', '.join(CRITERIA)}")
        for name in ("alpha", "sparse_share"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie between 0 and 1")
        if self.starts is not None:
            Plan((), 0, starts=tuple(self.starts))  # refuses what is not a list of step groups
        if self.every < 1:
            raise ValueError(f"every={self.every} must be at least 1")
        self.dense_layers = method.dense_layers or 0
        self.density = method.density or PAROAttention.defaults["density"]
        self.block_size = method.block_size or PAROAttention.defaults["block_size"]
        self._pass = 0
        self._sites: tuple[str, ...] = ()
        self._count = 0
        self._grid: tuple[int, int, int] | None = None
        self._figures = torch.empty(0)  # (L, H, 6, 1 or 2): sums of the error, or of M_sparse and M_quant
        self._calls = torch.empty(0)  # (L,): rows of the batch in these sums
        self._permutation = torch.empty(0)  # (L, H)
        self._sums = torch.empty(0)  # (G, L, H, n, n): sums of P over blocks
        self._seen = torch.empty(0)  # (G, L): rows of the batch in these sums

    @property
    def passes(self) -> int:
        return 2

    def resolved(self, family: Family | None, has_clock: bool) -> PAROSearch:
        if self.starts is None:
            self.starts = STARTS if has_clock else (0.0,)
        return self

    def start_pass(self, number: int) -> None:
        self._pass = number
        if number == 1:
            self._permutation = self._best()
            self._sums = torch.zeros(self._shape())
            self._seen = torch.zeros(self._shape()[:2])

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        grid = scope.layout.grid if scope.layout else None
        if grid is None:
            raise ValueError("PAROAttention needs to know the grid of the tokens; this forward does not tell it")
        if self._grid is None:
            self._begin(grid, [site for site, _ in sites.values()])
        if grid != self._grid:
            raise ValueError(
                f"a plan of PAROAttention is for one size: the data began with {_size(self._grid)} visual tokens, "
                f"this forward has {_size(grid)}"
            )

    def _begin(self, grid: tuple[int, int, int], sites: Sequence[Site]) -> None:
        if len({site.heads for site in sites}) > 1:
            raise ValueError("PAROAttention plans layers of the same number of heads: choose some with layers=")
        self._grid, self._sites, self._count = grid, tuple(site.name for site in sites), sites[0].heads
        needed = math.prod(self._shape()) * (torch.float32.itemsize + torch.bool.itemsize) / 2**30
        if needed > self.memory:
            groups, layers, heads, n, _ = self._shape()
            self._grid = None
            raise ValueError(
                f"the block sums of {groups} step groups x {layers} layers x {heads} heads x {n} x {n} blocks take "
                f"{needed:.1f} GiB, more than memory={self.memory}: use larger blocks (block_size=128), fewer groups "
                "(starts=), fewer layers (layers=), or allow more"
            )
        self._figures = torch.zeros(
            len(self._sites), self._count, len(PERMUTATIONS), len(CRITERIA[self.criterion]), dtype=torch.float64
        )
        self._calls = torch.zeros(len(self._sites))

    def _shape(self) -> tuple[int, ...]:
        """Of the block statistics: (G, L, H, n, n)."""
        assert self._grid is not None and self.starts is not None
        n = -(-math.prod(self._grid) // self.block_size)
        return len(self.starts), len(self._sites), self._count, n, n

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if call.key.shape[2] == call.query.shape[2] and not call.is_causal and call.run.step % self.every == 0:
            conditional = _conditional(call)
            if conditional is not None:
                with torch.no_grad():
                    self._look(Look.at(conditional, self._grid))
        return next(call)

    def _look(self, look: Look) -> None:
        """Add the statistics of one attention call."""
        call, layer = look.call, self._sites.index(look.call.site.name)
        if self._pass == 0:
            self._figures[layer] += self._compare(look).sum(0).cpu()
            self._calls[layer] += look.call.query.shape[0]
            return
        sums = look.sums(look.there[self._permutation[layer].to(look.there.device)], self.block_size)
        group = self._empty_plan().group(call.run.step, call.run.num_steps)
        self._sums[group, layer] += sums.sum(0).float().cpu()
        self._seen[group, layer] += call.query.shape[0]

    def _compare(self, look: Look) -> torch.Tensor:
        """(B, H, 6, figures): what each permutation would do to the heads of a call."""
        found: list[torch.Tensor] = []
        for number, order in enumerate(look.there):
            same = next((i for i in range(number) if torch.equal(look.there[i], order)), None)
            if same is not None:  # on images most are alike
                found.append(found[same])
            elif self.criterion != "paper":
                found.append(self._error(look, number)[..., None])
            else:
                found.append(self._sparse_and_incoherent(look, order))
        return torch.stack(found, 2).double()

    def _error(self, look: Look, number: int) -> torch.Tensor:
        """(B, H) squared error of a permutation with its best blocks, in units of the heads' mean square."""
        order = look.there[number].expand(look.call.query.shape[1], -1)
        sums = look.sums(order, self.block_size).mean(0)
        error = look.sparse(keep_largest(sums, self.density), order, self.block_size) - look.out
        return error.square().sum((-1, -2)) / look.out.square().sum((-1, -2)).mean(1, keepdim=True)

    def _sparse_and_incoherent(self, look: Look, order: torch.Tensor) -> torch.Tensor:
        """(B, H, 2): M_sparse and M_quant of the paper."""
        query, key, lse = look.visual(order.expand(look.call.query.shape[1], -1))
        mass, below, peak = block_profile(
            query, key, lse, block_size=self.block_size, threshold=self.threshold, scale=look.call.scale
        )
        incoherence = peak * _tokens_in_blocks(query.shape[2], self.block_size, query.device) / mass
        sparse = (below >= self.sparse_share).to(mass.dtype)
        return torch.stack([sparse.mean((-1, -2)), incoherence.nan_to_num(1.0).mean((-1, -2))], -1)

    def _best(self) -> torch.Tensor:
        """(L, H) the permutation of the best score; the first among equals."""
        if self.criterion == "raster":
            return torch.zeros(self._figures.shape[:2], dtype=torch.int64)
        if self.criterion == "error":
            return self._figures[..., 0].argmin(-1)
        sparse, incoherence = (x / x.sum(-1, keepdim=True).clamp(min=1e-300) for x in self._figures.unbind(-1))
        return (self.alpha * sparse - (1 - self.alpha) * incoherence).argmax(-1)

    def _empty_plan(self) -> Plan:
        assert self.starts is not None
        return Plan(self._sites, self._count, self._grid, None, self.block_size, tuple(self.starts))

    def state(self) -> dict[str, Any]:
        return {
            "pass": self._pass,
            "starts": list(self.starts or ()),
            "sites": list(self._sites),
            "heads": self._count,
            "grid": list(self._grid) if self._grid else None,
            "figures": self._figures,
            "calls": self._calls,
            "permutation": self._permutation,
            "sums": self._sums,
            "seen": self._seen,
        }

    def load_state(self, state: Mapping[str, Any]) -> None:
        grid = state["grid"]
        self._grid = (grid[0], grid[1], grid[2]) if grid else None
        self.starts = tuple(state["starts"])
        self._pass, self._sites, self._count = state["pass"], tuple(state["sites"]), state["heads"]
        self._figures, self._calls, self._permutation = state["figures"], state["calls"], state["permutation"]
        self._sums, self._seen = state["sums"], state["seen"]

    def figure(self) -> str:
        if self._pass == 0:
            return ""
        return f"{(self._permutation > 0).double().mean():.0%} of heads reordered"

    def finish(self) -> PAROAttention:
        groups, layers, *_ = self._shape()
        blocks = torch.zeros(self._shape(), dtype=torch.bool)
        for group in range(groups):
            source = _nearest(group, self._seen)
            for layer in range(layers):
                blocks[group, layer] = keep_largest(self._sums[source, layer], self.density)
        tensors = {"permutation": self._permutation.to(torch.int8), "blocks": blocks}
        plan = replace(self._empty_plan(), tensors=tensors, report=self._report())
        return replace(self.method, plan=plan, density=self.density, block_size=self.block_size)

    def _report(self) -> dict[str, Any]:
        means = self._figures / self._calls[:, None, None, None]
        chosen = means.gather(2, self._permutation[..., None, None].expand(-1, -1, -1, means.shape[-1]))
        figures = {
            name: {"raster": float(means[:, :, 0, i].mean()), "chosen": float(chosen[..., i].mean())}
            for i, name in enumerate(CRITERIA[self.criterion])
        }
        heads = {name: int((self._permutation == i).sum()) for i, name in enumerate(PERMUTATIONS)}
        return {"density": self.density, "criterion": self.criterion, "figures": figures, "heads": heads}


@dataclass(frozen=True, eq=False)
class Look:
    """One dense attention call, for a search.

    Args:
        call: the rows that are looked at, with a key and value head for every query head.
        tokens: where its text is.
        there: (6, S) the six orders, see `order_tables`.
        valid: (B, S) bool or None, see `valid_keys`.
        out, lse: (B, H, S, D) and (B, H, S) of the dense attention.
    """

    call: Call
    tokens: Tokens
    there: torch.Tensor
    valid: torch.Tensor | None
    out: torch.Tensor
    lse: torch.Tensor

    @classmethod
    def at(cls, call: Call, grid: tuple[int, int, int] | None) -> Look:
        assert grid is not None
        length, device = call.query.shape[2], call.query.device
        text_first = call.layout is not None and call.layout.text_first
        tokens = Tokens(grid, length - math.prod(grid), text_first, device)
        key, value = call.expanded()
        call = call.replace(key=key, value=value)
        valid = valid_keys(call, tokens)
        mask = fitted(BlockMask.dense(length, length, device=device), call, valid)
        out, lse = block_sparse_attention(call.query, key, value, mask, scale=call.scale, return_lse=True)
        return cls(call, tokens, order_tables(tokens)[0], valid, out, lse)

    def visual(self, order: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Query, key and log-sum-exp of the visual tokens, in an order (H, S) for every head."""
        order = order[:, : self.tokens.visual]
        return permuted(self.call.query, order), permuted(self.call.key, order), permuted(self.lse, order)

    def sums(self, order: torch.Tensor, block_size: int) -> torch.Tensor:
        """(B, H, n, n): P summed over the visual blocks in that order."""
        mass = block_mass(*self.visual(order), block_size=block_size, scale=self.call.scale)
        return mass * _tokens_in_blocks(self.tokens.visual, block_size, mass.device)[:, None]

    def sparse(self, keep: torch.Tensor, order: torch.Tensor, block_size: int) -> torch.Tensor:
        """(B, H, S, D): attention over the kept visual blocks (H, n, n) in that order, and all of the text."""
        call, length = self.call, self.tokens.length
        mask = BlockMask.from_bool(
            with_text(keep, self.tokens, block_size)[None], block_size, q_len=length, kv_len=length
        )
        mask = fitted(mask, call, None if self.valid is None else self.valid[:, order[0]])
        query, key, value = (permuted(x, order) for x in (call.query, call.key, call.value))
        return permuted(block_sparse_attention(query, key, value, mask, scale=call.scale), order.argsort(-1))


def _conditional(call: Call) -> Call | None:
    """The conditional rows of a call, None without any; the call itself where it holds a part of the batch."""
    batch, roles = call.query.shape[0], call.rows
    wanted = [i for i, role in enumerate(roles) if role == "cond"]
    if batch % len(roles) or len(wanted) == len(roles):
        return call
    if not wanted:
        return None
    each = batch // len(roles)
    rows = torch.cat([torch.arange(i * each, (i + 1) * each) for i in wanted]).to(call.query.device)
    mask = call.mask
    if mask is not None and mask.ndim in (2, 4) and mask.shape[0] == batch:
        mask = mask[rows]
    return call.replace(query=call.query[rows], key=call.key[rows], value=call.value[rows], mask=mask)


def _tokens_in_blocks(tokens: int, block: int, device: torch.device) -> torch.Tensor:
    """(blocks,) tokens that exist in every block."""
    return (tokens - torch.arange(0, tokens, block, device=device)).clamp(max=block)


def _nearest(group: int, seen: torch.Tensor) -> int:
    """The group itself, or where no step of the data fell into it, the last before it that has some, or the first."""
    known = [g for g in range(len(seen)) if bool(seen[g].all())]
    if not known:
        raise ValueError("no attention call was seen in the second pass: is there data?")
    return max((g for g in known if g <= group), default=known[0])


def _check_plan(plan: Plan) -> None:
    """Raise `ValueError` where the tensors of a plan do not fit its sizes."""
    if plan.grid is None or plan.block_size is None:
        raise ValueError("a plan of PAROAttention is for one grid and one block size")
    n = -(-math.prod(plan.grid) // plan.block_size)
    layers = len(plan.sites), plan.heads
    wanted = {"permutation": (torch.int8, layers), "blocks": (torch.bool, (len(plan.starts), *layers, n, n))}
    for name, kind in wanted.items():
        tensor = plan.tensors.get(name)
        found = None if tensor is None else (tensor.dtype, tuple(tensor.shape))
        if found != kind:
            raise ValueError(f"the plan's {name!r} must be {kind[0]} {kind[1]}; it is {found}")
    if not 0 <= int(plan.tensors["permutation"].min()) <= int(plan.tensors["permutation"].max()) < len(PERMUTATIONS):
        raise ValueError(f"the plan's permutations must be numbers from 0 to {len(PERMUTATIONS) - 1}")


def _size(grid: tuple[int, int, int] | None) -> str:
    return "x".join(map(str, grid)) if grid else "an unknown number of"
