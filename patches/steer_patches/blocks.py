"""Stages of a forward that can be recorded, replayed or skipped, for prefix sharing and skip-layer guidance."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch

from steer_patches.family import Family, Stage
from steer_patches.swap import mix, put

Action = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any]  # (module's call, args, kwargs) -> output


def map_tensors(tree: Any, change: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """`tree` with every tensor changed; dicts, lists and tuples are copied, other objects kept."""
    if isinstance(tree, torch.Tensor):
        return change(tree)
    if isinstance(tree, Mapping):
        return {key: map_tensors(value, change) for key, value in tree.items()}
    if isinstance(tree, tuple) and hasattr(tree, "_fields"):
        return type(tree)(*(map_tensors(value, change) for value in tree))
    if isinstance(tree, (list, tuple)):
        return type(tree)(map_tensors(value, change) for value in tree)
    return tree


def take_rows(tree: Any, rows: slice, batch: int) -> Any:
    """`tree` with the batch rows `rows` of every tensor whose first dimension is a multiple of `batch`.

    A tensor whose first dimension is m * batch holds m consecutive entries a row (frames of a video in a UNet).
    """
    start, stop, _ = rows.indices(batch)

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if tensor.ndim == 0 or tensor.shape[0] % batch or not tensor.shape[0]:
            return tensor
        each = tensor.shape[0] // batch
        return tensor[start * each : stop * each]

    return map_tensors(tree, change)


def cloned(tree: Any) -> Any:
    """`tree` with its tensors copied; a tensor that occurs twice is one copy that occurs twice."""
    copies: dict[int, torch.Tensor] = {}

    def change(tensor: torch.Tensor) -> torch.Tensor:
        if id(tensor) not in copies:
            copies[id(tensor)] = tensor.clone()
        return copies[id(tensor)]

    return map_tensors(tree, change)


class Block:
    """One stage module of a model, with what it is to do in the pass under way.

    Args:
        name: dotted path, e.g. `transformer_blocks.7`.
        index: its place in the order in which the forward runs the stages.
        stage: the family's statement about it.
    """

    def __init__(self, name: str, index: int, stage: Stage, module: torch.nn.Module) -> None:
        self.name, self.index, self.stage, self.module = name, index, stage, module
        self.action: Action | None = None
        self.recorded: Any = None

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def record(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Run the module and keep a copy of its output: FreeU and adapters change it in place."""
        output = call(*args, **kwargs)
        self.recorded = cloned(output)
        return output

    def skip(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Return the module's inputs in place of its outputs."""
        bound = inspect.signature(type(self.module).forward).bind(self.module, *args, **kwargs).arguments
        inputs = tuple(bound[name] for name in self.stage.returns)
        return inputs if len(inputs) > 1 else inputs[0]


class Tape:
    """The blocks of one model and the prefix that its passes share."""

    def __init__(self, model: torch.nn.Module, family: Family | None) -> None:
        self.blocks = find_blocks(model, family)
        self._undo: list[Callable[[], None]] = []

    def attach(self) -> None:
        """Let the blocks be driven; does nothing to what they compute."""
        for block in self.blocks:
            self._undo.append(put(block.module, "_steer_block", block))
            self._undo.append(mix(block.module, Driven, outside=False))

    def remove(self) -> None:
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()

    def stand_ins(self, prefix: int) -> dict[int, int]:
        """For each of the first `prefix` blocks, the index of the block whose recorded output it returns.

        In a chain of blocks only the last output matters, so one is kept for all of them.
        """
        last: dict[str, int] = {}
        for block in self.blocks[:prefix]:
            last[block.stage.path] = block.index
        return {b.index: last[b.stage.path] if b.stage.chained else b.index for b in self.blocks[:prefix]}

    def record(self, prefixes: Iterable[int]) -> None:
        """Keep, in the next pass, what replays of prefixes of these lengths need."""
        for index in {source for prefix in prefixes for source in self.stand_ins(prefix).values()}:
            self.blocks[index].action = self.blocks[index].record

    def replay(self, prefix: int, rows: slice, batch: int) -> None:
        """Give, in the next pass, the recorded outputs of rows `rows` of `batch` for the first `prefix` blocks."""
        sources = self.stand_ins(prefix)
        recorded = {source: cloned(self.blocks[source].recorded) for source in set(sources.values())}
        outputs = {source: take_rows(output, rows, batch) for source, output in recorded.items()}
        for index, source in sources.items():
            self.blocks[index].action = lambda call, args, kwargs, output=outputs[source]: output

    def skip(self, indices: Iterable[int]) -> None:
        """Skip these blocks in the next pass."""
        for index in indices:
            self.blocks[index].action = self.blocks[index].skip

    def idle(self, forget: bool = False) -> None:
        """Every block computes again; with `forget`, recordings are dropped."""
        for block in self.blocks:
            block.action = None
            if forget:
                block.recorded = None


class Driven:
    """Mixed into block classes."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        block: Block | None = self.__dict__.get("_steer_block")
        call = super().__call__  # type: ignore[misc]
        if block is None or block.action is None or torch.compiler.is_compiling():
            return call(*args, **kwargs)
        return block.action(call, args, kwargs)


def find_blocks(model: torch.nn.Module, family: Family | None) -> list[Block]:
    """The model's stage modules in the order its forward runs them; empty for unknown families."""
    blocks: list[Block] = []
    for stage in family.stages if family else ():
        try:
            module = model.get_submodule(stage.path)
        except AttributeError:
            continue
        items = [(stage.path, module)]
        if isinstance(module, torch.nn.ModuleList):
            items = [(f"{stage.path}.{i}", item) for i, item in enumerate(module)]
        for name, item in items:
            blocks.append(Block(name, len(blocks), stage, item))
    return blocks
