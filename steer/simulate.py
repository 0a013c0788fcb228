"""What a sparse method can gain on a model at a size: densities, FLOPs and bounds; without weights or a GPU."""

from __future__ import annotations

import dataclasses
import math
import warnings
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from steer.bind import CompositionError, bind, unfit
from steer.method import methods
from steer.model_shapes import ModelShape, Size, model_shape
from steer.select import is_active, listing
from steer.sparse import Sparse, Tokens
from steer_kernels import BlockMask
from steer_patches.family import FAMILIES, Family, family_of
from steer_patches.site import Site
from steer_patches.sites import find_sites


@dataclass(frozen=True)
class Simulation:
    """What `simulate` found. FLOPs count a multiplication and an addition as two.

    Args:
        model, method: names, the method with its settings as they are on this model.
        height, width, frames: in pixels.
        grid: (frames, height, width) of the visual tokens.
        tokens: of a sequence, with its text.
        sites, sparse_sites: self- and joint attention sites over the visual tokens; those at which the method is on.
        steps, sparse_steps: of a run; those in which the method is on.
        passes: forwards a step.
        density: attention work of the method as a fraction of dense, the mean over its sites.
        worst_row: speed-up of attention if every block of queries took as long as the heaviest one: key blocks / most
            key blocks of a row. None where no mask is known.
        attention_flops, other_flops: of one dense forward at batch 1: attention at `sites`, and all else.
        edited_flops: of the dense attention, what is at the method's sites.
        attention_share: of a dense step that is attention at `sites`; of its FLOPs unless another was given.
        efficiency: FLOPs a second of the sparse kernel on the blocks that it computes, over those of the dense one.
    """

    model: str
    method: str
    height: int
    width: int
    frames: int
    grid: Size
    tokens: int
    sites: int
    sparse_sites: int
    steps: int
    sparse_steps: int
    passes: int
    density: float
    worst_row: float | None
    attention_flops: float
    other_flops: float
    edited_flops: float
    attention_share: float
    efficiency: float

    @property
    def dense_run_flops(self) -> float:
        """FLOPs of a run without the method."""
        return self.steps * self.passes * (self.attention_flops + self.other_flops)

    @property
    def run_flops(self) -> float:
        """FLOPs of a run with the method's dense steps and layers."""
        return self.dense_run_flops - self.sparse_steps * self.passes * self.edited_flops * (1 - self.density)

    @property
    def attention_speedup(self) -> float:
        """Bound on the speed-up of attention at the method's sites: efficiency / density."""
        return self.efficiency / self.density if self.density else math.inf

    @property
    def step_speedup(self) -> float:
        """Amdahl's bound on a step in which the method is on; layers that stay dense count as dense."""
        edited = self.attention_share * self.edited_flops / self.attention_flops
        return amdahl(edited, self.attention_speedup)

    @property
    def run_speedup(self) -> float:
        """Amdahl's bound on a run, with its dense steps."""
        return amdahl(self.sparse_steps / self.steps, self.step_speedup)

    def to_dict(self) -> dict[str, Any]:
        """The fields and what follows from them, as JSON takes it: None for an infinite speed-up."""
        derived = ("dense_run_flops", "run_flops", "attention_speedup", "step_speedup", "run_speedup")
        figures = {**dataclasses.asdict(self), **{name: getattr(self, name) for name in derived}}
        return {name: None if value == math.inf else value for name, value in figures.items()}

    def __str__(self) -> str:
        t, h, w = self.grid
        worst = "not known" if self.worst_row is None else f"{self.worst_row:.2f}x"
        total = self.attention_flops + self.other_flops
        rows = [
            (
                "size",
                f"{self.frames} x {self.height} x {self.width} pixels, {t} x {h} x {w} = {t * h * w:,} visual tokens",
            ),
            ("sequence", f"{self.tokens:,} tokens at {self.sites} sites, sparse at {self.sparse_sites}"),
            ("schedule", f"{self.steps} steps, sparse in {self.sparse_steps}; {self.passes} forwards a step"),
            ("density", f"{self.density:.4f}"),
            (
                "dense forward",
                f"{total / 1e12:.1f} TFLOP: attention {self.attention_flops / 1e12:.1f} "
                f"({self.attention_flops / total:.1%}), the rest {self.other_flops / 1e12:.1f}",
            ),
            (
                "run",
                f"{self.dense_run_flops / 1e15:.2f} -> {self.run_flops / 1e15:.2f} PFLOP "
                f"({self.run_flops / self.dense_run_flops:.3f})",
            ),
            ("bound on attention", f"{self.attention_speedup:.2f}x; by its heaviest row {worst}"),
            (
                "bound on a sparse step",
                f"{self.step_speedup:.2f}x, attention being {self.attention_share:.1%} of a step",
            ),
            ("bound on the run", f"{self.run_speedup:.2f}x"),
        ]
        lines = [f"{self.model}, {self.method}"]
        return "\n".join(lines + [f"  {name:<23}{text}" for name, text in rows])


def simulate(
    model: str | ModelShape,
    method: Sparse,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    steps: int | None = None,
    density: float | None = None,
    attention_share: float | None = None,
    efficiency: float = 1.0,
) -> Simulation:
    """What `method` can gain on `model` at a size; takes seconds and little memory, as no weights are made.

    Args:
        model: a name in `steer.model_shapes.MODEL_SHAPES`, or a shape.
        method: a sparse method; fields that are None take the preset of the model's family.
        height, width, frames: in pixels; None = the model's default.
        steps: of a run; None = the model's default.
        density: attention work as a fraction of dense, in place of what the method's masks give; for methods whose
            masks depend on the data. A searched method without a plan takes its own `density`.
        attention_share: of the time of a dense step that is attention; None = its share of the FLOPs.
        efficiency: FLOPs a second of the sparse kernel on the blocks that it computes, over those of the dense one.

    Raises:
        TypeError: a method that is not sparse.
        ValueError: an unknown model, a size that does not fit it, a share outside [0, 1], or no density known.
        CompositionError, SelectorError: the method cannot run on the model.
    """
    shape = model_shape(model) if isinstance(model, str) else model
    for name, share in (("attention_share", attention_share), ("density", density)):
        if share is not None and not 0 <= share <= 1:
            raise ValueError(f"{name}={share} must be a fraction from 0 to 1")
    if efficiency <= 0 or (steps is not None and steps < 1):
        raise ValueError(f"efficiency={efficiency} must be above 0, and steps={steps} at least 1")
    steps = steps or shape.steps
    size = shape.pixels(height, width, frames)
    grid = shape.grid(*size)
    bound, heads, sites = _on_model(shape, method, density)
    roles = ("uncond", "cond")[-shape.passes :]
    rows = 1.0 if bound.rows is None else roles.count(bound.rows) / shape.passes
    dense, edited, computed, sparse_sites = 0.0, 0.0, 0.0, 0
    longest, worst = 0, math.inf
    for site in sites:
        tokens = _tokens(shape, grid, site)
        flops = attention_flops(site, tokens.length)
        dense, longest = dense + flops, max(longest, tokens.length)
        if site.name not in heads or tokens.length < bound.min_tokens:
            continue
        work = bound.expected_density(tokens, site)
        if work is None:
            raise ValueError(f"the density of {type(method).__name__} depends on the data: give density=, e.g. 0.3")
        chosen = heads[site.name]
        share = rows * (1.0 if chosen is None else float(chosen.float().mean()))
        edited, computed, sparse_sites = edited + flops, computed + flops * (1 - share * (1 - work)), sparse_sites + 1
        worst = min(worst, heaviest_row(bound, tokens, site))
    if not sparse_sites:
        raise ValueError(f"min_tokens={bound.min_tokens} is more than any sequence of {shape.name} at this size has")
    total = forward_flops(shape, size)
    return Simulation(
        model=shape.name,
        method=(method if isinstance(bound, AtDensity) else bound).describe(),
        height=size[0],
        width=size[1],
        frames=size[2],
        grid=grid,
        tokens=longest,
        sites=len(sites),
        sparse_sites=sparse_sites,
        steps=steps,
        sparse_steps=sum(is_active(bound.steps, step, steps) for step in range(steps)),
        passes=shape.passes,
        density=computed / edited,
        worst_row=None if worst == math.inf else worst,
        attention_flops=dense,
        other_flops=total - dense,
        edited_flops=edited,
        attention_share=dense / total if attention_share is None else attention_share,
        efficiency=efficiency,
    )


def mask_of(
    model: str | ModelShape,
    method: Sparse,
    *,
    height: int | None = None,
    width: int | None = None,
    frames: int | None = None,
    layer: str | None = None,
) -> BlockMask:
    """The block mask of `method` on `model` at a size.

    Args:
        model, method, height, width, frames: see `simulate`.
        layer: name of the attention site; None = the first at which the method is on.

    Raises:
        ValueError: see `simulate`; or a layer at which the method is not on, or no mask without data.
    """
    shape = model_shape(model) if isinstance(model, str) else model
    grid = shape.grid(height, width, frames)
    bound, heads, sites = _on_model(shape, method, None)
    able = {site.name: site for site in sites if site.name in heads}
    name = next(iter(able)) if layer is None else layer
    if name not in able:
        raise ValueError(f"{method.describe()} is not on at {name!r}; it is on at:\n{listing(list(able))}")
    mask = _mask(bound, _tokens(shape, grid, able[name]), able[name])
    if mask is None:
        raise ValueError(f"the mask of {type(method).__name__} is not known without data or a plan")
    return mask


def _on_model(
    shape: ModelShape, method: Sparse, density: float | None
) -> tuple[Sparse, dict[str, torch.Tensor | None], list[Site]]:
    """The method as it is on a model, its sites with their heads, and all sites of self- and joint attention."""
    if not isinstance(method, Sparse):
        able = [name for name, cls in methods().items() if issubclass(cls, Sparse)]
        raise TypeError(f"{type(method).__name__} leaves out no attention; simulate takes {', '.join(able)}")
    module = shape.build()
    family = family_of(module)
    assert family is not None  # of all shapes
    reason = unfit(type(method), family)
    if reason:
        raise CompositionError(f"{type(method).__name__} cannot run on {family.name}: {reason}")
    unfitted = getattr(method, "plan", method) is None
    given = method if density is None and not unfitted else AtDensity.of(method, density, family)
    bindings = bind(given, {"": module}, has_clock=True)
    if not bindings or method.is_neutral():
        raise ValueError(f"{method.describe()} changes nothing, so there is nothing to simulate")
    sites = [site for site in find_sites(module) if site.kind in Sparse.kinds]
    return bindings[0].method, bindings[0].sites, sites


def _tokens(shape: ModelShape, grid: Size, site: Site) -> Tokens:
    """The sequence at a site, on the CPU."""
    text_first = next(family.text_first for family in FAMILIES if shape.model in family.models)
    return Tokens(grid, shape.text_tokens if site.kind == "joint" else 0, text_first)


def _mask(method: Sparse, tokens: Tokens, site: Site) -> BlockMask | None:
    """The mask where it depends on shapes alone, or on a plan."""
    return None if type(method).make is Sparse.make else method.make(tokens, site).mask


def amdahl(share: float, speedup: float) -> float:
    """Speed-up of the whole when `share` of its time becomes `speedup` times as fast: 1 / (1 - share + share / x)."""
    left = 1 - share + share / speedup
    return 1 / left if left else math.inf


def attention_flops(site: Site, tokens: int) -> float:
    """FLOPs of one dense call of self-attention at batch 1: the products of queries and keys, and with the values."""
    return 4.0 * site.heads * tokens**2 * site.head_dim


def heaviest_row(method: Sparse, tokens: Tokens, site: Site) -> float:
    """Key blocks of a row / most that a row of visual queries computes; infinite where no mask is known."""
    mask = _mask(method, tokens, site)
    if mask is None:
        return math.inf
    rows, columns = mask.shape[-2:]
    block, (start, stop) = mask.block_size[0], tokens.text_span or (0, 0)
    # text sees everything, and so does an incomplete last block in some patterns, wherever the order puts them
    dense = -(-stop // block) - start // block + bool(tokens.length % block)
    heaviest = (mask.full_num + mask.partial_num).sort(-1, descending=True).values[..., min(dense, rows - 1)]
    return columns / max(int(heaviest.max()), 1)


@lru_cache(maxsize=64)
def forward_flops(shape: ModelShape, size: Size) -> float:
    """FLOPs of one dense forward at batch 1 for (height, width, frames) in pixels: matrix products and convolutions."""
    # Mochi asks for autocast, which the meta device does not have; fake tensors do, but take twice as long
    fake = shape.model == "MochiTransformer3DModel"
    with FakeTensorMode() if fake else nullcontext(), torch.no_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of autocast to float32
        device = "cpu" if fake else "meta"
        model = shape.build(device, torch.float32)
        inputs = shape.inputs(*size, device=device, dtype=torch.float32)
        with FlopCounterMode(display=False) as counter, AttentionFlops() as attention:
            model(**inputs)
    return counter.get_total_flops() + attention.flops


class AttentionFlops(TorchFunctionMode):
    """Counts attention calls and leaves them out, so that no map is made; inputs hold no padding.

    Attributes:
        flops: of all calls.
    """

    def __init__(self) -> None:
        super().__init__()
        self.flops = 0.0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query, key, value = (*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :]))[:3]
            batch, heads, queries, width = query.shape
            self.flops += 2.0 * batch * heads * queries * key.shape[2] * (width + value.shape[3])
            return query.new_empty(*query.shape[:3], value.shape[3])
        if func is torch.nonzero:  # Mochi looks for the text that is no padding: without values, all of it
            number, axes = args[0].numel(), args[0].ndim
            return torch.zeros(number, axes, dtype=torch.long, device=args[0].device)
        return func(*args, **kwargs)


@dataclass(kw_only=True)
class AtDensity(Sparse, register=False):
    """Stands for a sparse method whose masks are not known, where and when that is on.

    Args:
        share: attention work as a fraction of dense.
    """

    share: float = 1.0

    @classmethod
    def of(cls, method: Sparse, share: float | None, family: Family) -> AtDensity:
        """`method` as it is on a family, at `share` or, where that is None, at the method's own `density`."""
        # what a search has not fitted yet refuses to be resolved by its own class
        found = Sparse.resolved(method, family, has_clock=True)
        fields = {field.name: getattr(found, field.name) for field in dataclasses.fields(Sparse)}
        preset = family.preset(type(method).__name__, method.preset)
        if fields["layers"] is None:
            fields["layers"] = (preset.settings.get("layers") if preset else None) or method.default_layers
        share = getattr(found, "density", None) if share is None else share
        return cls(**{**fields, "preset": None, "share": 1.0 if share is None else share})

    def expected_density(self, tokens: Tokens, site: Site) -> float:
        return self.share
