"""The base of the sparse methods: where a call's tokens are, and the block masks that are made for them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch

from steer.method import Method, Span
from steer.select import SelectorError, parse_steps
from steer_kernels import BlockMask, block_sparse_attention
from steer_kernels.block_sparse.api import BACKENDS, Backend
from steer_kernels.order import TokenOrder
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

KEPT = 8  # layouts whose masks are kept: a pipeline alternates between few, and a mask takes megabytes


@dataclass(frozen=True)
class Tokens:
    """The sequence of an attention call: visual tokens on a grid, with text before or after them.

    Args:
        grid: (frames, height, width) of the visual tokens in raster order.
        text: text tokens in the same sequence.
        text_first: whether they come first.
        device: of the masks.
    """

    grid: tuple[int, int, int]
    text: int = 0
    text_first: bool = False
    device: torch.device | str = "cpu"

    @property
    def visual(self) -> int:
        return math.prod(self.grid)

    @property
    def length(self) -> int:
        return self.visual + self.text

    @property
    def per_frame(self) -> int:
        return self.grid[1] * self.grid[2]

    @property
    def first(self) -> int:
        """Place of the first visual token."""
        return self.text if self.text_first else 0

    @property
    def text_span(self) -> tuple[int, int] | None:
        """Places [start, stop) of the text, None without any."""
        if not self.text:
            return None
        return (0, self.text) if self.text_first else (self.visual, self.length)

    def of_text(self) -> dict[str, Any]:
        """The arguments by which `steer_kernels.patterns` and `order` are told of the text and the device."""
        return {"text_tokens": self.text, "text_first": self.text_first, "device": self.device}


@dataclass(eq=False)
class Prepared:
    """What a method has made ready for a site before the forward, outside of compiled regions: `site.kernel`.

    Args:
        tokens: what it was made for.
        mask: the blocks to compute; for methods that find them in the call itself, None.
        order: the token order of the mask, over all tokens; None = raster.
        permute: whether the call has to be put into that order; False where the model's blocks run in it already.
        extra: what else the method keeps for the site.
    """

    tokens: Tokens
    mask: BlockMask | None = None
    order: TokenOrder | None = None
    permute: bool = True
    extra: Any = None


@dataclass(kw_only=True)
class Sparse(Method, register=False):
    """Attention over a part of the key blocks, in the self- and joint attention over image or video tokens.

    A field that is None takes the preset of the model's family, and where there is none the default of the method.
    Of the steps, the first stay dense (`steps`, from the preset); on a bare model, which has no clock, none do.

    Args:
        preset: name of one of the family's settings for this method; None = its first.
        dense_layers: leading layers that stay dense.
        block_size: tokens in a block of the mask.
        backend: of `steer_kernels.block_sparse_attention`; None = the fastest that runs here.
    """

    preset: str | None = None
    dense_layers: Annotated[int, Span(0, 12)] | None = None
    block_size: Annotated[int, Span(16, 128)] | None = None
    backend: Backend | None = None

    stage: ClassVar[str] = "kernel"
    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    default_layers: ClassVar[str] = "*"
    defaults: ClassVar[Mapping[str, Any]] = {}
    needs_video: ClassVar[bool] = False
    needs_grid: ClassVar[bool] = True
    without_preset: ClassVar[str] = "yes"  # what the table of methods says of a family without settings of its own

    def __post_init__(self) -> None:
        super().__post_init__()
        self._made: dict[Any, Prepared] = {}
        for name in ("dense_layers", "block_size"):
            value = getattr(self, name)
            least = int(name == "block_size")
            if value is not None and (not isinstance(value, int) or value < least):
                raise ValueError(f"{name}={value!r} must be a whole number, at least {least}")
        if self.backend not in (None, *BACKENDS):
            raise ValueError(f"backend={self.backend!r} does not exist; choose from {', '.join(BACKENDS)}")

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        """The mask of a site. The one function to write where the mask depends on shapes alone.

        Methods whose masks are the same at every site return the same object for the same tokens: use `self.once`.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no make(tokens, site)")

    def visual_order(self, grid: tuple[int, int, int], device: torch.device) -> TokenOrder | None:
        """The order of the visual tokens in which all sites compute; None = raster, or more than one."""
        return None

    @property
    def reorders(self) -> bool:
        return type(self).visual_order is not Sparse.visual_order

    def entry_order(self, scope: Scope) -> TokenOrder | None:
        layout = scope.layout
        if layout is None or layout.grid is None or math.prod(layout.grid) < self.min_tokens:
            return None  # where the method stays out, tokens in another order would still round differently
        return self.visual_order(layout.grid, scope.device)

    def once(self, key: Any, tokens: Tokens, build: Any) -> Prepared:
        """`build()`, made once for these settings and `tokens`, and kept for the last few layouts."""
        full = (key, tokens)
        if full not in self._made:
            layouts = list(dict.fromkeys(made[1] for made in self._made))
            if tokens not in layouts and len(layouts) >= KEPT:
                self._made = {made: kept for made, kept in self._made.items() if made[1] != layouts[0]}
            with torch.inference_mode(False):  # or forwards outside inference mode could neither save nor write it
                self._made[full] = build()
        return self._made[full]

    def resolved(self, family: Family | None, has_clock: bool) -> Sparse:
        """A copy whose unset fields are those of the family's preset, or of the method."""
        name = type(self).__name__
        preset = family.preset(name, self.preset) if family else None
        if self.preset is not None and preset is None:
            known = family.preset_names(name) if family else []
            raise SelectorError(
                f"preset={self.preset!r} of {name} does not exist for {family.name if family else 'this model'}; "
                f"it has {', '.join(known) or 'none'}"
            )
        settings = {"steps": "0.25:", "dense_layers": 0, "block_size": 128, **self.defaults}
        settings |= preset.settings if preset else {}
        if not has_clock:
            settings["steps"] = ":"
        return replace(self, **{key: value for key, value in settings.items() if getattr(self, key) is None})

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        """Make the masks ready for the forward that begins. Outside of compiled regions, before every pass.

        Args:
            scope: the layout, rows and run of the forward.
            sites: of this method: the site and its head mask.
        """
        layout = scope.layout
        if layout is not None and layout.grid is not None and math.prod(layout.grid) >= self.min_tokens:
            _check_grid(self, layout.grid)
        for site, heads in sites.values():
            text = (layout.text_tokens if layout else None) if site.kind == "joint" else 0
            if layout is None or layout.grid is None or text is None:
                site.kernel = None  # made from the call itself, where the text of each row has its own length
                continue
            tokens = Tokens(layout.grid, text, layout.text_first, scope.device)
            if tokens.length < self.min_tokens:
                site.kernel = None
                continue
            site.kernel = self.prepared(tokens, site, heads, in_order=layout.order is not None)

    def prepared(self, tokens: Tokens, site: Site, heads: torch.Tensor | None, in_order: bool = False) -> Prepared:
        """`make`, with the heads that the method leaves out dense."""
        made = self.make(tokens, site)
        if heads is not None and made.mask is not None:
            chosen = tuple(heads.flatten().nonzero().flatten().tolist())
            mask, full = made.mask, replace(made)
            made = self.once((id(made), chosen), tokens, lambda: replace(full, mask=mask.in_heads(heads.flatten())))
        if in_order and made.order is not None:
            raster = made
            made = self.once((id(made), "in order"), tokens, lambda: replace(raster, permute=False))
        return made

    def expected_density(self, tokens: Tokens, site: Site) -> float | None:
        """Attention work at a site as a fraction of dense, the mean over the steps in which the method is on.

        Of all heads; what `steer simulate` reckons with. None where only the data decide.
        """
        mask = None if type(self).make is Sparse.make else self.make(tokens, site).mask
        return None if mask is None else mask.density

    def ready(self, call: Call) -> Prepared | None:
        """What was made ready for this call; None where it is no attention over the model's own tokens."""
        length = call.query.shape[2]
        if call.key.shape[2] != length or call.is_causal:
            return None
        ready: Prepared | None = call.site.kernel
        if ready is not None and ready.tokens.length == length:
            return ready
        if torch.compiler.is_compiling():
            raise RuntimeError(
                f"{type(self).__name__} has no mask ready at {call.site.name} inside a compiled graph: compile in "
                "place with model.compile() or model.compile_repeated_blocks(), or call torch.compile first, then "
                "steer.apply. Where each row has a text length of its own (Mochi), run the model uncompiled"
            )
        call.site.kernel = self._from_call(call)
        return call.site.kernel

    def _from_call(self, call: Call) -> Prepared:
        layout, length = call.layout, call.query.shape[2]
        if layout is None or layout.grid is None or layout.image_tokens is None:
            raise ValueError(
                f"{type(self).__name__} needs to know the token grid at {call.site.name}; its family is not covered"
            )
        if call.head_range is not None:
            raise ValueError(
                f"{type(self).__name__} cannot tell the text at {call.site.name} from the other tokens while the heads "
                "are split between devices: run this model on one device, or remove the method"
            )
        text = length - layout.image_tokens
        if text < 0 or (text and call.site.kind != "joint"):
            raise ValueError(
                f"{call.site.name} has {length} tokens, but the grid {layout.grid} has {layout.image_tokens}; is the "
                "sequence split between devices?"
            )
        tokens = Tokens(layout.grid, text, layout.text_first, call.query.device)
        return self.prepared(tokens, call.site, call.heads, in_order=layout.order is not None)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        query, key, value, valid = ordered(call, ready)
        assert ready.mask is not None
        mask = fitted(ready.mask, call, valid)
        out = block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend)
        return restored(out, ready)

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        """Computed blocks as a fraction of all, the mean over the sites of the last forward; waits for the device."""
        masks = [site.kernel.mask for site, _ in sites.values() if isinstance(site.kernel, Prepared)]
        kept = {id(mask): mask.density for mask in masks if mask is not None}
        return sum(kept[id(mask)] for mask in masks) / len(masks) if kept else None


def _check_grid(method: Sparse, grid: tuple[int, int, int]) -> None:
    """Raise `ValueError` where a family knows the visual tokens as one row, because they are no single picture."""
    if grid[:2] == (1, 1) and grid[2] > 1:
        raise ValueError(
            f"{type(method).__name__} needs rows and columns, but the {grid[2]} visual tokens are known as one row: "
            "reference images or conditioning frames are in the same sequence, or position ids are missing. Remove the "
            "method for such runs"
        )


def ordered(call: Call, ready: Prepared) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None]:
    """Query, key and value (B, H, S, D) in the order of the mask, and which keys exist, (B, S) bool or None."""
    query, key, value, valid = call.query, call.key, call.value, valid_keys(call, ready.tokens)
    if ready.order is None or not ready.permute:
        return query, key, value, valid
    query, key, value = (ready.order.apply(x, 2) for x in (query, key, value))
    return query, key, value, valid if valid is None else ready.order.apply(valid, 1)


def restored(out: torch.Tensor, ready: Prepared) -> torch.Tensor:
    """(B, H, S, D) in the model's order again."""
    return out if ready.order is None or not ready.permute else ready.order.undo(out, 2)


def fitted(mask: BlockMask, call: Call, valid: torch.Tensor | None) -> BlockMask:
    """The mask for this call: on its device, of the heads that it holds, without the keys that do not exist."""
    mask = mask.to(call.query.device)
    if call.head_range is not None:
        mask = mask.of_heads(call.head_range)
    return mask if valid is None else mask.with_padding(valid)


def valid_keys(call: Call, tokens: Tokens) -> torch.Tensor | None:
    """(B or 1, S) bool of the keys that a visual query may see at all, None = all: models hide padded text by masks.

    Raises:
        ValueError: an additive mask, which a block-sparse kernel cannot apply.
    """
    mask = call.mask
    if mask is None:
        return None
    if mask.dtype != torch.bool:
        raise ValueError(
            f"{call.site.name} has an additive attention mask; block-sparse kernels take boolean ones only"
        )
    if mask.ndim == 2:
        return mask
    row = tokens.first if mask.shape[-2] > 1 else 0
    return mask[:, 0, row]


def starts_at(steps: str | range | None, num_steps: int) -> int:
    """The first step at which `steps` is on, of `num_steps`."""
    unit, start, _ = parse_steps(steps)
    return 0 if unit == "all" else math.ceil(start * num_steps - 1e-9 * num_steps) if unit == "fraction" else int(start)
