"""The fields of a method as a form shows them, from its dataclass: types, docstring, spans. No method is named here."""

from __future__ import annotations

import dataclasses
import inspect
import json
import math
import types
import typing
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import docstring_parser
import gradio as gr
import torch

import steer
from steer.method import Method, Span
from steer.plan import Plan

COMMON = tuple(field.name for field in dataclasses.fields(Method))
INFO = 200  # characters of help beside a field; all of it stands in the method's own text
WRITTEN = {  # what a text field is read as, and how that is said
    int: "a number",
    list: "a list, [1, 2]",
    dict: 'a mapping, {"transformer_blocks.3": [0, 1]}',
    str: "text",
}


@dataclass(frozen=True)
class Field:
    """One field of a method as a form shows it.

    Args:
        name: of the dataclass's field.
        help: what its docstring says of it.
        default: the method's.
        kind: "flag", "choice", "number" or "text".
        choices: of a choice.
        span: of a number.
        whole: whether a number is an integer.
        takes: what a text is read as, among the keys of WRITTEN.
        offered: texts to choose from, (label, text); others may be written too.
        optional: may be None: the method or its family chooses then.
        is_own: the method's own docstring tells of it, and it is none of the fields that all methods have.
    """

    name: str
    help: str
    default: Any
    kind: Literal["flag", "choice", "number", "text"]
    choices: tuple[Any, ...] = ()
    span: Span | None = None
    whole: bool = False
    takes: tuple[type, ...] = ()
    offered: tuple[tuple[str, str], ...] = ()
    optional: bool = False
    is_own: bool = True

    @property
    def short_help(self) -> str:
        """The first sentences, as many as fit beside a field."""
        if len(self.help) <= INFO:
            return self.help
        cut = max(self.help.rfind(end, 0, INFO) for end in (". ", "; ", ": "))
        return self.help[: cut + 1 if cut > 0 else INFO].rstrip(" ;:") + " …"

    @property
    def step(self) -> float | None:
        """Between two numbers that the form offers."""
        if self.span is None:
            return 1 if self.whole else None
        hundredth = 10.0 ** math.floor(math.log10(self.span.high - self.span.low) - 2)
        return self.span.step or (1 if self.whole else hundredth)

    def component(self, given: Any = None, **options: Any) -> Any:
        """A component with the given value, or the default. A number that a slider cannot show gets a box."""
        shown = {"label": self.name, "info": self.short_help, "interactive": True, **options}
        value = self.default if given is None else self.read(given) if self.kind == "number" else given
        unset = "default" if self.default is None else str(self.default)
        if self.kind == "flag" and not self.optional:
            return gr.Checkbox(bool(value), **shown)
        if self.kind in ("flag", "choice"):
            choices = [(str(choice), choice) for choice in self.choices] or [("yes", True), ("no", False)]
            empty = [("default", "")] if self.optional else []
            return gr.Dropdown([*empty, *choices], value="" if value is None else value, **shown)
        if self.kind == "number":
            if self.span is not None and not self.optional and self._slides(self.default) and self._slides(value):
                return gr.Slider(self.span.low, self.span.high, value, step=self.step, **shown)
            if self.span is not None:
                unset += f"; {self.span.low:g} to {self.span.high:g}"
            shown["placeholder"] = unset
            if value is None or not math.isfinite(value) or self.optional:
                # may be empty, which Gradio's number box shows as 0
                return gr.Textbox(f"{value:.12g}" if value is not None and math.isfinite(value) else "", **shown)
            return gr.Number(value, step=self.step or 1, precision=0 if self.whole else None, **shown)
        text = "" if value is None else value if isinstance(value, str) else json.dumps(value)
        if self.offered:
            return gr.Dropdown([("default", ""), *self.offered], value=text, allow_custom_value=True, **shown)
        return gr.Textbox(text, placeholder=f"{unset}; {self._written}", **shown)

    @property
    def _written(self) -> str:
        return " or ".join(WRITTEN[kind] for kind in self.takes)

    def _slides(self, value: Any) -> bool:
        """Whether a slider can stand at a value."""
        if self.span is None or self.step is None or value is None or not self.span.low <= value <= self.span.high:
            return False
        steps = (value - self.span.low) / self.step
        return math.isclose(steps, round(steps), abs_tol=1e-6)

    def read(self, value: Any) -> Any:
        """What a component holds, as the method takes it.

        Raises:
            ValueError: it is nothing that this field can be.
        """
        if self.kind == "number" and isinstance(value, str):
            value = _json(value)
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if self.kind == "flag":
            wanted = "yes or no, in JSON true or false"
            if isinstance(value, bool):
                return value
        elif self.kind == "choice":
            wanted = ", ".join(map(str, self.choices))
            if isinstance(value, str) and value in self.choices:
                return value
        elif self.kind == "number":
            wanted = "a whole number" if self.whole else "a number"
            if number and (not self.whole or value == int(value)):
                return int(value) if self.whole else value
        else:
            wanted = self._written
            written = _json(value) if isinstance(value, str) else value
            if isinstance(written, tuple(kind for kind in self.takes if kind in (list, dict))):
                return written
            if int in self.takes and isinstance(written, (int, float)) and not isinstance(written, bool):
                return written
            if isinstance(value, str) and str in self.takes:
                return value
        raise ValueError(f"{self.name} is {value!r}; it may be {wanted}")


def _json(text: str) -> Any:
    """JSON as what it says, other text as it is."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def fields_of(method: type[Method]) -> tuple[Field, ...]:
    """The fields of a method, those first that its own docstring names.

    Without what a form cannot fill: plans that only a search finds, and the choice of a preset where there are none.
    """
    hints = typing.get_type_hints(method, include_extras=True)
    described, own = _described(method), list(_documented(method))
    found = []
    for field in dataclasses.fields(method):
        default = field.default if field.default is not dataclasses.MISSING else None
        made = _field(field.name, hints[field.name], default, described.get(field.name, ""))
        if made is not None and field.name == "preset":
            known = steer.presets(method.__name__)
            offered = tuple((f"{preset.name} ({preset.family})", preset.name) for preset in known)
            made = dataclasses.replace(made, offered=offered) if offered else None
        if made is not None:
            found.append(dataclasses.replace(made, is_own=field.name in own and field.name not in COMMON))
    order = sorted(found, key=lambda f: (not f.is_own, f.name in COMMON, own.index(f.name) if f.is_own else 0))
    return tuple(order)


def _described(method: type[Method]) -> dict[str, str]:
    """What the docstrings of a method and its bases say of each field."""
    found: dict[str, str] = {}
    for cls in reversed(method.__mro__):
        found |= _documented(cls)
    return found


def _documented(cls: type) -> dict[str, str]:
    """What the docstring of one class says of its arguments, in its order."""
    parsed = docstring_parser.parse(inspect.cleandoc(cls.__dict__.get("__doc__") or ""))
    return {
        name: " ".join((said.description or "").split()) for said in parsed.params for name in said.arg_name.split(", ")
    }


def _field(name: str, hint: Any, default: Any, help: str) -> Field | None:
    """A field of that type; None for one that a form cannot fill."""
    parts = list(_union(hint))
    marked = [extra for part in parts if typing.get_origin(part) is typing.Annotated for extra in part.__metadata__]
    span = next((extra for extra in marked if isinstance(extra, Span)), None)
    bare = [typing.get_args(part)[0] if typing.get_origin(part) is typing.Annotated else part for part in parts]
    plain = {part for part in bare if part is not type(None)}
    if plain & {Plan, torch.Tensor}:
        return None
    optional = type(None) in bare
    choices = tuple(value for part in plain if typing.get_origin(part) is Literal for value in typing.get_args(part))
    if choices:
        return Field(name, help, default, "choice", choices=choices, optional=optional)
    if plain == {bool}:
        return Field(name, help, default, "flag", optional=optional)
    if plain in ({int}, {float}, {int, float}):
        return Field(name, help, default, "number", span=span, whole=plain == {int}, optional=optional)
    takes = tuple(kind for kind in WRITTEN if any(_is_written(part, kind) for part in plain))
    return Field(name, help, default, "text", takes=takes, optional=optional) if takes else None


def _is_written(part: Any, kind: type) -> bool:
    """Whether what is written as that kind may be a value of a type."""
    part = typing.get_origin(part) or part
    if kind is str or part is str:
        return kind is part
    if kind is int:
        return part in (int, float)
    return isinstance(part, type) and part is not range and issubclass(kind, part)  # ranges are written as text, "3:10"


def _union(hint: Any) -> Sequence[Any]:
    """The members of a union, those of annotated ones among them."""
    if typing.get_origin(hint) is typing.Annotated and _is_union(typing.get_args(hint)[0]):
        inner, *extra = typing.get_args(hint)
        return [typing.Annotated[(part, *extra)] for part in typing.get_args(inner)]
    return typing.get_args(hint) if _is_union(hint) else [hint]


def _is_union(hint: Any) -> bool:
    return typing.get_origin(hint) in (typing.Union, types.UnionType)
