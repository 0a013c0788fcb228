"""Methods that show what the hook layer does, and a snapshot that shows what it leaves behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn

from steer import Method
from steer_patches.site import Call, Next

ALL = "*"


@dataclass(kw_only=True)
class Count(Method, register=False):
    """Changes nothing and counts the attention calls that it sees, by (site, port)."""

    every_port: ClassVar[bool] = True
    layers: Any = ALL
    seen: dict[tuple[str, int], int] = field(default_factory=dict)

    def attend(self, call: Call, next: Next) -> Tensor:
        key = (call.site.name, call.port)
        self.seen[key] = self.seen.get(key, 0) + 1
        return next(call)

    @property
    def calls(self) -> int:
        return sum(self.seen.values())


@dataclass(kw_only=True)
class Through(Method, register=False):
    """Changes nothing; sees every port."""

    every_port: ClassVar[bool] = True
    layers: Any = ALL

    def attend(self, call: Call, next: Next) -> Tensor:
        return next(call)


@dataclass(kw_only=True)
class Scale(Method, register=False):
    """Multiplies the output of attention by `factor`."""

    every_port: ClassVar[bool] = True
    layers: Any = ALL
    factor: float | Tensor = 0.5

    def attend(self, call: Call, next: Next) -> Tensor:
        return next(call) * self.factor


class Tripped(RuntimeError):
    """What `Trip` raises."""


@dataclass(kw_only=True)
class Trip(Method, register=False):
    """Raises at its `at`-th attention call, counted from 1."""

    layers: Any = ALL
    at: int = 2
    calls: int = 0

    def attend(self, call: Call, next: Next) -> Tensor:
        self.calls += 1
        if self.calls == self.at:
            raise Tripped(call.site.name)
        return next(call)


Snapshot = list[tuple[Any, type, dict[str, Any]]]


def parts(target: Any) -> Iterator[Any]:
    """Every object that steer may touch: modules, attention processors, configurations, pipeline and scheduler."""
    if isinstance(target, DiffusionPipeline):
        yield target
        yield target.scheduler
        models = [component for component in target.components.values() if isinstance(component, nn.Module)]
    else:
        models = [target]
    known: set[int] = set()
    for model in models:
        for module in model.modules():
            for part in (module, getattr(module, "processor", None), getattr(module, "config", None)):
                if hasattr(part, "__dict__") and id(part) not in known:
                    known.add(id(part))
                    yield part


def snapshot(target: Any) -> Snapshot:
    """The class and the contents of every part; take it after a first run, which may fill the model's own caches."""
    return [(part, type(part), dict(vars(part))) for part in parts(target)]


def assert_untouched(before: Snapshot, target: Any) -> None:
    """Every part is the same object of the same class, with the same attributes in the same order."""
    now = snapshot(target)
    assert [id(part) for part, _, _ in now] == [id(part) for part, _, _ in before]
    for (part, cls, attributes), (_, cls_now, attributes_now) in zip(before, now, strict=True):
        assert cls_now is cls, f"{cls} became {cls_now}"
        assert list(attributes_now) == list(attributes), f"attributes of {cls.__name__} changed"
        for name, value in attributes.items():
            same = attributes_now[name] is value or _equal_plain(attributes_now[name], value)
            assert same, f"{type(part).__name__}.{name}: {value!r} became {attributes_now[name]!r}"


def _equal_plain(a: Any, b: Any) -> bool:
    return type(a) is type(b) and isinstance(a, (str, int, float, bool, type(None))) and a == b


def steer_attributes(model: nn.Module) -> list[str]:
    """Names of attributes that steer put somewhere in the model."""
    return [f"{type(p).__name__}.{name}" for p in parts(model) for name in vars(p) if name.startswith("_steer")]


def relative_error(result: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest wanted value."""
    return ((result - wanted).abs().max() / wanted.abs().max()).item()


def inputs_of(family: Any, model: nn.Module, batch: int = 2) -> dict[str, Any]:
    """Fresh inputs, always the same: some forwards change the dictionaries that they are given."""
    return family.inputs(model, torch.Generator().manual_seed(0), batch=batch)
