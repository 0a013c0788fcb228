"""Forms for the patterns of `steer_kernels`, from their signatures and docstrings. A new pattern needs nothing here."""

from __future__ import annotations

import collections.abc
import inspect
import json
import math
import types
import typing
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import docstring_parser
import torch

from steer_kernels import BlockMask, patterns

Grid = tuple[int, int, int]
AXES = ("frames", "rows", "columns")
# What the tab itself asks for, and what follows from it. The rest of a signature is the pattern's form.
PLACES = ("grid", "tokens_per_frame", "frames", "q_len", "kv_len", "text_tokens", "block_size", "device")
# What has to be a multiple of what.
MULTIPLES = {("sliding_tile", "window"): "tile"}
STRIPES = 8  # columns that a form starts with
LONGEST_TEXT = 5_000  # characters of a list of numbers


@dataclass(frozen=True)
class Range:
    """The numbers that a form offers for an argument along the sequence.

    Args:
        low, high: the ends.
        start: where the signature has no default.
        step: of a slider.
    """

    low: float
    high: float
    start: float
    step: float = 1


RANGES = {
    "radius": Range(0.5, 128, 8, 0.5),
    "decay": Range(0, 2, 0.5, 0.05),
    "reach": Range(0, 64, 1),
    "sink_frames": Range(0, 64, 0),
    "width": Range(0, 4096, 128),
    "sink": Range(0, 8192, 128),
    "window": Range(1, 32768, 1024),
    "window_blocks": Range(1, 256, 5),
    "sink_blocks": Range(0, 64, 1),
}
ANY = Range(0, 4096, 1)  # of a number that the table does not know


@dataclass(frozen=True)
class Argument:
    """One argument of a pattern as the form shows it.

    Args:
        name, help: of the signature and the docstring.
        default: the signature's; `inspect.Parameter.empty` without one.
        kind: "flag", "number" or "numbers", a list of any length.
        whole: whether a number is an integer.
        optional: may be None.
        per_axis: has a value for each axis of the grid.
    """

    name: str
    help: str
    default: Any
    kind: Literal["flag", "number", "numbers"]
    whole: bool
    optional: bool
    per_axis: bool

    @property
    def required(self) -> bool:
        return self.default is inspect.Parameter.empty

    @property
    def range(self) -> Range:
        return RANGES.get(self.name, ANY)


@cache
def names() -> tuple[str, ...]:
    """The patterns: functions of `steer_kernels.patterns` that return a block mask."""
    made = {name: typing.get_type_hints(getattr(patterns, name)).get("return") for name in patterns.__all__}
    return tuple(name for name, given in made.items() if given is BlockMask)


def function(pattern: str) -> Callable[..., BlockMask]:
    """The pattern of that name.

    Raises:
        ValueError: there is none.
    """
    if pattern not in names():
        raise ValueError(f"there is no pattern {pattern!r}; there are {', '.join(names())}")
    return getattr(patterns, pattern)


@cache
def arguments(pattern: str) -> tuple[Argument, ...]:
    """What the pattern's form asks for, in the order of the signature."""
    made, hints, says = function(pattern), typing.get_type_hints(function(pattern)), _documented(pattern)
    parameters = inspect.signature(made).parameters
    found = []
    for name, parameter in parameters.items():
        if name in PLACES:
            continue
        hint = hints[name]
        parts = set(typing.get_args(hint)) if typing.get_origin(hint) in (typing.Union, types.UnionType) else {hint}
        lists = [part for part in parts if typing.get_origin(part) is collections.abc.Sequence]
        plain = parts - {type(None), torch.Tensor} | {typing.get_args(part)[0] for part in lists}
        many: bool = torch.Tensor in parts
        found.append(
            Argument(
                name,
                says.get(name, ""),
                parameter.default,
                "numbers" if many else "flag" if bool in plain else "number",
                whole=float not in plain,
                optional=type(None) in parts,
                per_axis=bool(lists) and not many and "grid" in parameters,
            )
        )
    return tuple(found)


def _documented(pattern: str) -> dict[str, str]:
    """What the docstring says of each argument; "see `other`" is followed."""
    parsed = docstring_parser.parse(inspect.getdoc(function(pattern)) or "")
    found = {}
    for said in parsed.params:
        text = " ".join((said.description or "").split())
        other = text.removeprefix("see `").removesuffix("`.")
        for name in said.arg_name.split(", "):
            found[name] = _documented(other).get(name, "") if other in names() else text
    return found


def takes(pattern: str, place: str) -> bool:
    """Whether the pattern has such an argument."""
    return place in inspect.signature(function(pattern)).parameters


def of_pictures(pattern: str) -> bool:
    """Whether the pattern is for one picture, (H, W), and for no video."""
    return takes(pattern, "grid") and "(T, H, W)" not in _documented(pattern)["grid"]


def axes(pattern: str, grid: Grid) -> tuple[int, ...]:
    """The grid as the pattern is called with it: one frame is a picture."""
    return grid[1:] if grid[0] == 1 and takes(pattern, "grid") else grid


def sizes(pattern: str, grid: Grid) -> tuple[int, ...]:
    """The axes of the grid that the form has components for, whether or not the pattern is called with all of them."""
    return grid[1:] if of_pictures(pattern) else grid


def start(pattern: str, argument: Argument, grid: Grid, given: Mapping[str, Any] | None = None) -> Any:
    """What the form starts with: the signature's default, or a value that shows something; a list for the axes.

    `given`: other settings, which it has to go with.
    """
    if argument.kind == "numbers":
        length = math.prod(grid)
        return [length * stripe // STRIPES for stripe in range(STRIPES)]
    if argument.per_axis:
        along = sizes(pattern, grid)
        if not argument.required:
            return [0 if argument.default is None else argument.default] * len(along)
        each = [max(1, size // 4) if argument.name == "tile" else size // 3 | 1 for size in along]
        return _multiple(each, steps(pattern, argument, given or {}, grid))
    if not argument.required:
        return argument.default
    if argument.kind == "flag":
        return True
    return int(argument.range.start) if argument.whole else argument.range.start


def steps(pattern: str, argument: Argument, given: Mapping[str, Any], grid: Grid) -> list[int]:
    """On each axis, what the values of an argument are multiples of."""
    unit = MULTIPLES.get((pattern, argument.name))
    if unit is None:
        return [1] * len(sizes(pattern, grid))
    of = next(each for each in arguments(pattern) if each.name == unit)
    units = given.get(unit)
    if isinstance(units, (list, tuple)) and len(units) == len(sizes(pattern, grid)):
        return [unit if isinstance(unit, int) else 1 for unit in units]
    return start(pattern, of, grid)


def _multiple(values: list[Any], units: list[int]) -> list[Any]:
    return [max(value // unit, 1) * unit if unit > 1 else value for value, unit in zip(values, units, strict=True)]


def fit(pattern: str, given: Mapping[str, Any] | None, grid: Grid) -> dict[str, Any]:
    """Those of the settings that the pattern has too, moved into the grid: for the form of another pattern or grid."""
    found: dict[str, Any] = {}
    for argument in arguments(pattern):
        value = (given or {}).get(argument.name)
        if argument.per_axis and isinstance(value, list):
            along, least = sizes(pattern, grid), 0 if argument.optional else 1
            value = (start(pattern, argument, grid)[: -len(value)] + value)[-len(along) :]
            if len(value) != len(along) or any(isinstance(n, bool) != (argument.kind == "flag") for n in value):
                continue
            if argument.kind == "number":
                value = [min(max(number, least), size) for number, size in zip(value, along, strict=True)]
            found[argument.name] = value
        elif value is not None and not argument.per_axis and not (argument.kind == "number" and _is_list(value)):
            found[argument.name] = value
    for argument in arguments(pattern):
        if argument.name in found and (pattern, argument.name) in MULTIPLES:
            found[argument.name] = _multiple(found[argument.name], steps(pattern, argument, found, grid))
    return found


def _is_list(value: Any) -> bool:
    return isinstance(value, (list, tuple))


def call(
    pattern: str, given: Mapping[str, Any] | None, grid: Grid, text_tokens: int, block_size: int
) -> dict[str, Any]:
    """The arguments with which the pattern is called for a form; what the form leaves out is as it starts.

    Args:
        pattern: its name.
        given: argument -> value; a list for the axes, of which a picture takes the last two, or one value for all.
        grid: (frames, height, width) in tokens.
        text_tokens: left out where the pattern has no place for them.
        block_size: tokens.

    Raises:
        ValueError: an argument that the pattern does not have, or a value that it cannot take.
    """
    asked = {argument.name: argument for argument in arguments(pattern)}
    for name in given or {}:
        if name not in asked:
            raise ValueError(f"{pattern} has no argument {name!r} in its form; it has {', '.join(asked) or 'none'}")
    frames, height, width = grid
    places = {
        "grid": axes(pattern, grid),
        "tokens_per_frame": height * width,
        "frames": frames,
        "q_len": frames * height * width,
        "text_tokens": text_tokens,
        "block_size": block_size,
    }
    found = {name: value for name, value in places.items() if takes(pattern, name)}
    for name, argument in asked.items():
        value = (given or {}).get(name)
        if value is None or value == "":
            value = start(pattern, argument, grid, given)
        found[name] = None if value is None else _value(argument, value, len(axes(pattern, grid)))
    return found


def _value(argument: Argument, value: Any, count: int) -> Any:
    """The value as the pattern takes it; of a list for more axes than `count`, the last ones."""
    if argument.kind == "numbers":
        return numbers(argument.name, value)
    if not argument.per_axis:
        return _one(argument, value, argument.range)
    values = list(value)[-count:] if _is_list(value) else [value]
    each = [_one(argument, one, Range(0, 2**31, 0)) for one in values]
    if argument.optional:  # 0 on an axis: not along this one; on all of them: not at all
        each = [max(one, 1) for one in each] if any(each) else []
    if not each:
        return None
    return tuple(each) if len(each) > 1 else each[0]


def _one(argument: Argument, value: Any, limits: Range) -> Any:
    if argument.kind == "flag":
        if not isinstance(value, bool):
            raise ValueError(f"{argument.name}={value!r} must be true or false")
        return value
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not limits.low <= value <= limits.high:
        raise ValueError(f"{argument.name}={value!r} must be a number from {limits.low:g} to {limits.high:g}")
    if argument.whole and value != int(value):
        raise ValueError(f"{argument.name}={value!r} must be a whole number")
    return int(value) if argument.whole else float(value)


def numbers(name: str, value: Any) -> list[int]:
    """Whole numbers, from a list or from text such as "0, 480, 960".

    Raises:
        ValueError: it is something else.
    """
    if isinstance(value, str) and len(value) <= LONGEST_TEXT:
        try:
            value = json.loads(f"[{value.strip().strip('[]')}]")
        except json.JSONDecodeError:
            value = None
    whole = isinstance(value, Sequence) and all(isinstance(n, int) and not isinstance(n, bool) for n in value)
    if not whole or len(value) > LONGEST_TEXT or any(abs(n) > 2**31 for n in value):
        raise ValueError(f"{name} must be whole numbers with commas between them, such as 0, 480, 960")
    return list(value)
