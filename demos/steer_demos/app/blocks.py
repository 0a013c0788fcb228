"""What a sparse method computed in a run of a pipeline: its block mask at a layer, and what can be gained by it."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

import steer
from steer.bind import Binding, models_of
from steer.method import Method
from steer.methods.paro import PERMUTATIONS, HeadOrders
from steer.methods.sparse_vdit import MODES, SparseVDiT
from steer.methods.vmoba import KINDS, VMoBA
from steer.select import is_active
from steer.simulate import AttentionFlops, amdahl, attention_flops
from steer.sparse import Prepared, Sparse
from steer_demos.app import drawing
from steer_kernels import BlockMask
from steer_patches.site import Call, Next, Site
from steer_patches.sites import plain

CHUNKS_IN_WORDS = {"frames": "whole frames", "window": "windows through all frames", "box": "boxes"}
SIDE = 512  # pixels that a mask is drawn in, about; half of it where each head has its own
COLUMNS, MOST_HEADS = 3, 24  # of a picture with a mask for each head
RASTER = "frame by frame, row by row"
GAP, LABEL, TOP, SIDES = 12, 24, 48, 28  # pixels between the masks, and for words above and beside them


@dataclass
class Seen:
    """What was seen of a pipeline's denoisers while it ran.

    Args:
        inputs: of each model's first forward: what stands in `model(**inputs)`, by the model's key; tensors on meta.
        last: of each model's last forward the inputs as they are.
        bindings: the sparse methods in force in the last forward, on each model that they act in.
    """

    inputs: dict[str, dict[str, Any]] = field(default_factory=dict)
    last: dict[str, dict[str, Any]] = field(default_factory=dict)
    bindings: Sequence[Binding] = ()


@contextlib.contextmanager
def watching(pipe: Any) -> Iterator[Seen]:
    """Look on while a pipeline runs; changes nothing."""
    seen, hooks = Seen(), []

    def look(key: str, args: tuple[Any, ...], inputs: dict[str, Any]) -> None:
        if not args:
            seen.last[key] = dict(inputs)
        if not args and key not in seen.inputs:
            shapes = {name: x.to("meta") if isinstance(x, torch.Tensor) else x for name, x in inputs.items()}
            seen.inputs[key] = shapes
        if "_steer_state" in pipe.__dict__:
            seen.bindings = [b for b in pipe._steer_state.bindings if isinstance(b.method, Sparse)]

    try:
        for key, model in models_of(pipe).items():
            hook = model.register_forward_pre_hook(
                lambda _, args, inputs, key=key: look(key, args, inputs), with_kwargs=True
            )
            hooks.append(hook)
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@dataclass
class Blocks:
    """The blocks of a sparse method at one layer, as they were in the last step in which it was on.

    Args:
        site: name of the attention module.
        heads: what is drawn: label -> mask of one head (1, 1, rows, columns); one where all heads are alike. Empty
            where the method chooses its blocks in the call itself: see `chosen_again`.
        order: of the tokens along both sides, in words.
        density: share of the attention map that was computed in the layers of the method while it was on.
        again: whether they were read in one more forward.
    """

    site: str
    heads: Mapping[str, BlockMask]
    order: str
    density: float | None
    again: bool = False

    def picture(self) -> Image.Image | None:
        """The masks, queries down and keys across; those of several heads in rows of three."""
        if not self.heads:
            return None
        one = len(self.heads) == 1
        side = SIDE if one else SIDE // 2
        drawn = {name: _drawn(mask, side) for name, mask in list(self.heads.items())[:MOST_HEADS]}
        columns = min(len(drawn), COLUMNS)
        width, height = next(iter(drawn.values())).size
        label = 0 if one else LABEL
        cell, rows = (width + GAP, height + GAP + label), -(-len(drawn) // columns)
        sheet = Image.new("RGB", (SIDES + columns * cell[0], TOP + rows * cell[1]), "white")
        draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(18)
        draw.text((sheet.width / 2, TOP / 2), "keys", "black", font, anchor="mm")
        down = Image.new("RGB", (100, SIDES), "white")
        ImageDraw.Draw(down).text((50, SIDES / 2), "queries", "black", font, anchor="mm")
        sheet.paste(down.rotate(90, expand=True), (0, TOP + (height + label) // 2 - 50))
        for index, (name, mask) in enumerate(drawn.items()):
            left, top = SIDES + index % columns * cell[0], TOP + index // columns * cell[1]
            if not one:
                draw.text((left, top), name, "black", font)
            sheet.paste(mask, (left, top + label))
        return sheet

    def caption(self) -> str:
        """What the picture shows, in a sentence or two."""
        if not self.heads:
            return (
                f"At `{self.site}` the blocks are chosen in the call itself, from its queries and keys, anew in each "
                "step: there is no mask to draw, but what was computed is counted."
            )
        said = "In each step they are chosen anew from queries and keys: here in the last one. " if self.again else ""
        mask = next(iter(self.heads.values()))
        rows, columns = mask.shape[-2:]
        of = "all heads are alike" if len(self.heads) == 1 else f"{len(self.heads)} heads, each with a mask of its own"
        return (
            f"The mask at `{self.site}` ({of}): {rows} x {columns} blocks of {mask.block_size[0]} tokens, queries "
            f"down, keys across. {said}Black is computed, grey in part, white left out. Order of the tokens: "
            f"{self.order}."
        )


def _drawn(mask: BlockMask, side: int) -> Image.Image:
    picture = mask.show()
    assert isinstance(picture, Image.Image)
    if max(picture.size) > side:
        picture = picture.resize((side, side), Image.Resampling.BOX)
    return ImageOps.expand(drawing.enlarged(picture.convert("RGB"), side), 1, "gray")


def blocks(binding: Binding, layer: int) -> Blocks:
    """What a method computed at one of its layers.

    Args:
        binding: of a run that is over.
        layer: from 0, of those in which the method acts.
    """
    site = list(binding.live.values())[layer][0]
    ready, density = site.kernel, binding.method.computed_density(binding.live)
    if not isinstance(ready, Prepared):
        return Blocks(site.name, {}, RASTER, density)
    return Blocks(site.name, *_heads(binding.method, ready), density)


def chosen_again(pipe: Any, seen: Seen, binding: Binding, layer: int) -> Blocks | None:
    """The blocks of a method that chooses them in the call: of one more forward, with the inputs of the last one.

    Args:
        pipe: the pipeline, with no method on it.
        seen: of the run.
        binding, layer: see `blocks`.

    Returns:
        None where the method chooses nothing, or the model was called in a way that is not repeated.
    """
    method, inputs, site = binding.method, seen.last.get(binding.model), list(binding.live.values())[layer][0]
    if not isinstance(method, VMoBA) or inputs is None:
        return None
    look, density = _Look(method=method, layers=site.name), method.computed_density(binding.live)
    model = plain(models_of(pipe)[binding.model])
    with torch.no_grad(), steer.apply(model, replace(method, steps=None)), steer.apply(model, look):
        model(**inputs)
    if not look.found or (mask := look.found[-1]) is None:
        return None
    order = f"chunk after chunk, which are {CHUNKS_IN_WORDS[KINDS[site.layer % 3]]}"
    return Blocks(site.name, _each(mask), order, density, again=True)


@dataclass(kw_only=True)
class _Look(Method, register=False):
    """Reads which blocks a method chooses; changes nothing."""

    method: VMoBA
    found: list[BlockMask | None] = field(default_factory=list)

    stage: ClassVar[str] = "output"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        self.found.append(self.method.block_mask(call))
        return next(call)


def _heads(method: Sparse, ready: Prepared) -> tuple[dict[str, BlockMask], str]:
    """What is drawn of a site, label -> mask of one head, and the order of the tokens in words."""
    order = RASTER if ready.order is None else f"`{ready.order.name}`"
    if isinstance(method, SparseVDiT):  # one table of masks for all layers, and for each head its place there
        length, size = ready.tokens.length, method.block_size
        assert size is not None
        every = ready.mask or BlockMask.dense(length, length, size)
        heads = {f"head {i}: {MODES[mode]}": _head(every, mode) for i, mode in enumerate(ready.extra.tolist())}
        return heads, f"{RASTER}; of multi-diagonal heads {order}" if ready.permute else RASTER
    if ready.mask is None:
        return {}, order
    if isinstance(ready.extra, HeadOrders):
        names = [PERMUTATIONS[chosen] for chosen in ready.extra.chosen.tolist()]
        heads = {f"head {i}: {name}": _head(ready.mask, i) for i, name in enumerate(names)}
        return heads, "each head's own, the slowest axis first (T: frames, H: rows, W: columns)"
    return _each(ready.mask), order


def _each(mask: BlockMask) -> dict[str, BlockMask]:
    """Label -> mask of one head; of the first alone where all are alike."""
    return {f"head {i}": _head(mask, i) for i in range(1 if _are_alike(mask) else mask.shape[1])}


def _head(mask: BlockMask, head: int) -> BlockMask:
    return mask.of_heads(slice(head, head + 1))


def _are_alike(mask: BlockMask) -> bool:
    """Whether all heads of the first row have the same blocks, and the same of them in part."""
    computed, part = mask.to_bool()[0], mask.partial_bool()[0]
    return bool((computed == computed[:1]).all() and (part == part[:1]).all())


@dataclass
class Bound:
    """What a method can gain at most, by the multiplications that it leaves out.

    Args:
        share: of the multiplications of a dense forward, those of the attention that the method edits.
        speedup: Amdahl's bound on the denoiser in the whole run, its dense steps included.
    """

    share: float
    speedup: float


def bound(pipe: Any, seen: Seen, binding: Binding, density: float, steps: int) -> Bound | None:
    """Amdahl's bound at a density; None where the pipeline calls its denoiser in a way that cannot be counted.

    Args:
        seen: of the run.
        binding: of the method.
        density: of the method in its layers while it was on.
        steps: of the run.
    """
    inputs = seen.inputs.get(binding.model)
    sites: list[Site] = [site for site, _ in binding.live.values()]
    if inputs is None or not all(isinstance(site.kernel, Prepared) for site in sites):
        return None
    rows = inputs["hidden_states"].shape[0]
    edited = rows * sum(attention_flops(site, site.kernel.tokens.length) for site in sites)
    share = edited / forward_flops(plain(models_of(pipe)[binding.model]), inputs)
    on = sum(is_active(binding.method.steps, step, steps) for step in range(steps)) / steps
    step = amdahl(share, 1 / density) if density else 1 / (1 - share)
    return Bound(share, amdahl(on, step))


def forward_flops(model: Any, inputs: Mapping[str, Any]) -> float:
    """FLOPs of a dense forward with these inputs, counted on a copy without weights; no number is computed."""
    with FakeTensorMode(allow_non_fake_inputs=True), torch.no_grad():
        copy = type(model).from_config(model.config)  # in float32, and so the inputs: the count is the same
        empty = {name: _empty(value) if isinstance(value, torch.Tensor) else value for name, value in inputs.items()}
        with FlopCounterMode(display=False) as counter, AttentionFlops() as attention:
            copy(**empty)
    return counter.get_total_flops() + attention.flops


def _empty(tensor: torch.Tensor) -> torch.Tensor:
    return torch.empty(tensor.shape, dtype=torch.float32 if tensor.is_floating_point() else tensor.dtype)
