"""Token order: a model's blocks get its visual tokens in another order, and its output stays in the order it had.

Attention without a mask does not depend on the order of its tokens, and everything else in a transformer block is done
token by token. So the tokens are permuted once, where they enter the first block, and put back behind the last one,
in place of a permutation of q, k, v and the output at every attention call. What the blocks look up for each token
(rotary embeddings, modulation of single tokens) is permuted alike.
"""

from __future__ import annotations

import functools
import inspect
import weakref
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

from steer_kernels.order import TokenOrder
from steer_patches.blocks import Block, find_blocks, map_tensors
from steer_patches.family import Family
from steer_patches.swap import mix, put


class Reordering:
    """Runs a model's blocks with the visual tokens in another order.

    Attributes:
        refusal: why this model cannot do that, else None.
        order: the order of the visual tokens, without the text, on the model's device; None = the blocks get exactly
            what the model passes. Set it before a forward and outside compiled regions; orders of the same length
            share their compiled graphs.

    Args:
        model: a model, not the wrapper of `torch.compile`.
        family: what is stated about it, or None.
    """

    def __init__(self, model: torch.nn.Module, family: Family | None) -> None:
        self.order: TokenOrder | None = None
        blocks = [block for block in find_blocks(model, family) if block.stage.tokens]
        self.refusal = _refusal(model, family, blocks)
        self.between = {name for block in blocks for name in block.stage.between}
        self.places = [] if self.refusal else [Place(self, block) for block in blocks]
        self._permuted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}
        self._left: Callable[[], torch.Tensor | None] = lambda: None
        self._undo: list[Callable[[], None]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def attach(self) -> None:
        """Let the tokens be reordered; changes nothing while `order` is None.

        Raises:
            ValueError: the model cannot do that; the message is `refusal`.
        """
        if self.refusal is not None:
            raise ValueError(self.refusal)
        for place in self.places:
            self._undo.append(put(place.block.module, "_steer_place", place))
            self._undo.append(mix(place.block.module, Reordered))  # outside of what skips or replays the block

    def remove(self) -> None:
        """Take the blocks back, whatever else was attached to them since."""
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self._permuted.clear()

    def refuses(self, arguments: Mapping[str, Any]) -> str | None:
        """Why a forward with these arguments needs its tokens in raster order, else None."""
        given = sorted(name for name in self.between if arguments.get(name) is not None)
        return f"{', '.join(given)} changes the tokens between the blocks, in raster order" if given else None

    def enter(self, place: Place, tokens: torch.Tensor, order: TokenOrder) -> torch.Tensor:
        """The tokens as the block at `place` gets them."""
        if place is self.places[0]:
            self._permuted.clear()
            if tokens.shape[1] != order.to_ordered.numel():
                raise ValueError(
                    f"the order {order.name!r} is one of {order.to_ordered.numel()} tokens, but {place.block.name} "
                    f"gets {tokens.shape[1]} visual tokens: make the order for the grid of this forward"
                )
            return _permuted(tokens, order.to_ordered, 1)
        if not torch.compiler.is_compiling() and self._left() is not tokens:
            raise RuntimeError(
                f"{place.block.name} got other tokens than the block before it gave, while they are in the order "
                f"{order.name!r}: the model skips blocks or adds something between them (ControlNet residuals), which "
                "it does in raster order. Leave that out, or run this forward in raster order."
            )
        return tokens

    def leave(self, place: Place, tokens: torch.Tensor, order: TokenOrder) -> torch.Tensor:
        """The tokens as the model gets them back from the block at `place`."""
        if place is self.places[-1]:
            self._permuted.clear()
            return _permuted(tokens, order.to_raster, 1)
        if not torch.compiler.is_compiling():
            self._left = weakref.ref(tokens)
        return tokens

    def table(self, tensor: torch.Tensor, change: Callable[[torch.Tensor], torch.Tensor]) -> torch.Tensor:
        """`change(tensor)`, once a forward: the blocks share their tables. In a graph the compiler sees to that."""
        if torch.compiler.is_compiling():
            return change(tensor)
        if id(tensor) not in self._permuted:
            self._permuted[id(tensor)] = (tensor, change(tensor))  # kept with it, so that no other gets its id
        return self._permuted[id(tensor)][1]


class Place:
    """One block among those that are reordered."""

    def __init__(self, reordering: Reordering, block: Block) -> None:
        self.reordering, self.block = reordering, block
        self.names = _parameters(block.module)
        self.tables = [Table(path, shapes) for path, shapes in block.stage.tables.items()]

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def run(self, order: TokenOrder, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Call the block with its tokens and tables in `order`."""
        stage, given = self.block.stage, dict(zip(self.names, args, strict=False)) | kwargs
        changed = {stage.tokens: self.reordering.enter(self, given[stage.tokens], order)}
        visual, text = given[stage.tokens].shape[1], given.get("encoder_hidden_states")
        sizes = {"S": visual, "T+S": visual + (text.shape[1] if isinstance(text, torch.Tensor) else 0)}
        for table in self.tables:
            if given.get(table.name) is not None:
                change = functools.partial(self._reorder_table, table, order, sizes)
                changed[table.name] = _item_changed(given[table.name], table.item, change)
        inputs = [changed.get(name, value) for name, value in zip(self.names, args, strict=False)]
        rest = args[len(self.names) :]
        output = call(*inputs, *rest, **{name: changed.get(name, value) for name, value in kwargs.items()})
        if not isinstance(output, tuple):
            return self.reordering.leave(self, output, order)
        return tuple(
            self.reordering.leave(self, value, order) if name == stage.tokens else value
            for name, value in zip(stage.returns, output, strict=True)
        )

    def _reorder_table(
        self, table: Table, order: TokenOrder, sizes: Mapping[str, int], tensor: torch.Tensor
    ) -> torch.Tensor:
        shape = table.shape_of(tensor, sizes)
        if shape is None:
            known = " or ".join(f"({', '.join(shape)})" for shape in table.shapes) or "no such argument"
            raise ValueError(
                f"{self.block.name} got {table.path} of shape {tuple(tensor.shape)}, which cannot be put into another "
                f"token order with S={sizes['S']}, T+S={sizes['T+S']}: steer knows {known}. Run this forward in raster "
                "order."
            )
        axis = next((axis for axis, word in enumerate(shape) if word in sizes), None)
        if axis is None:
            return tensor
        text_tokens = tensor.shape[axis] - sizes["S"]
        return self.reordering.table(tensor, lambda t: _permuted(t, order.to_ordered, axis, text_tokens))


class Table:
    """An argument of a block that holds something for each visual token, see `Stage.tables`."""

    def __init__(self, path: str, shapes: Sequence[str]) -> None:
        self.path, self.shapes = path, [tuple(shape.split()) for shape in shapes]
        self.name, _, self.item = path.partition(".")

    def shape_of(self, tensor: torch.Tensor, sizes: Mapping[str, int]) -> tuple[str, ...] | None:
        """The first shape that `tensor` has, `sizes` being those of the words for tokens; None where it has none."""
        for shape in self.shapes:
            wanted = [int(word) if word.isdigit() else sizes.get(word) for word in shape]
            pairs = zip(wanted, tensor.shape, strict=False)
            if len(shape) == tensor.ndim and all(size is None or size == own for size, own in pairs):
                return shape
        return None


class Reordered:
    """Mixed into block classes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        place: Place | None = self.__dict__.get("_steer_place")
        call = super().__call__  # type: ignore[misc]
        order = None if place is None else place.reordering.order
        if place is None or order is None:
            return call(*args, **kwargs)
        return place.run(order, call, args, kwargs)


def _refusal(model: torch.nn.Module, family: Family | None, blocks: Sequence[Block]) -> str | None:
    name = type(model).__name__
    if family is None:
        return f"{name} is of no family that steer knows, so its tokens stay in raster order"
    if not blocks:
        return f"{family.name}: no blocks are known that work on the visual tokens in any order, so they stay in raster"
    for block in blocks:
        by_place = [name for name in block.stage.raster if name in _parameters(block.module)]
        if by_place:
            return f"{block.name} of {name} finds tokens by their place in raster order ({', '.join(by_place)})"
    return None


def _parameters(module: torch.nn.Module) -> list[str]:
    """Names of the forward's arguments that can be given by position, in order."""
    parameters = list(inspect.signature(type(module).forward).parameters.values())[1:]
    return [p.name for p in parameters if p.kind is p.POSITIONAL_OR_KEYWORD]


def _permuted(tensor: torch.Tensor, index: torch.Tensor, axis: int, text_tokens: int = 0) -> torch.Tensor:
    """`tensor` with its tokens along `axis` taken by `index`, except the first `text_tokens`, which stay.

    `TokenOrder.apply` would do, but a model on several devices needs the index on each, and `TokenOrder.to` reads the
    order's name, for which torch.compile would make a graph of its own.
    """
    index = index.to(tensor.device)
    if not text_tokens:
        return tensor.index_select(axis, index)
    text, visual = tensor.split([text_tokens, tensor.shape[axis] - text_tokens], axis)
    return torch.cat([text, visual.index_select(axis, index)], axis)


def _item_changed(tree: Any, item: str, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`tree` with all its tensors changed, or those in one item of it."""
    if not item:
        return map_tensors(tree, change)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) if key == item else value for key, value in tree.items()}
    return tuple(map_tensors(value, change) if i == int(item) else value for i, value in enumerate(tree))
