"""Forms for the settings of a method: what they ask for, what they are read as, and the method that they make."""

from __future__ import annotations

import dataclasses
import inspect
import itertools
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import gradio as gr
from gradio.context import get_blocks_context

import steer
from steer.findings import python_line
from steer.method import Method
from steer.opening import method_of
from steer_demos import models
from steer_demos.app.fields import Field, fields_of
from steer_demos.app.sources import FITTED, Sources, source_in_python

# In the browser: the settings with one field changed. An empty field is left to the method.
CHANGE = """(settings, value) => {{
  const changed = {{...(settings || {{}})}};
  if (value === null || value === undefined || value === "") delete changed[{name}];
  else changed[{name}] = value;
  return changed;
}}"""
# In the browser, at once: who draws before the new form is there must not send the fields of the old one.
EMPTY = "() => [{}, [Date.now(), {}]]"
_drawn = itertools.count()


def settings(method: type[Method], given: Mapping[str, Any] | None) -> dict[str, Any]:
    """The fields of a form as the method takes them: text of lists and mappings is read as JSON.

    Raises:
        ValueError: a field that the method does not have, or that cannot be what is given.
    """
    known = {field.name: field for field in fields_of(method)}
    found = {}
    for name, value in (given or {}).items():
        if name not in known:
            raise ValueError(f"{method.__name__} has no field {name!r} in a form; it has {', '.join(known)}")
        if value is not None and value != "":
            found[name] = known[name].read(value)
    return found


def check(method: str, given: Mapping[str, Any]) -> None:
    """Nothing, where there is such a method with such fields.

    Raises:
        ValueError: there is not; in words.
    """
    method_of(method, settings(_class(method), given))


def _class(method: str) -> type[Method]:
    known = steer.methods()
    if method not in known:
        raise ValueError(f"there is no method {method}; there are {', '.join(known)}")
    return known[method]


def steering(
    sources: Sources,
    model: str,
    method: str,
    given: Mapping[str, Any] | None,
    saved: str | None = "",
    processor: Any = None,
) -> Method:
    """The method that a form asks for, on a model.

    Where a saved method is named, `given` changes its fields. Without one, a method that has to be fitted first takes
    what was fitted to the embedded model, and guidance the layers that suit it.

    Args:
        sources: what may be opened.
        model: name of the model.
        method: class name.
        given: field -> value.
        saved: folder or hub id of a saved method; empty = none.
        processor: of a vision-language model, for methods that read its chat template.

    Raises:
        ValueError: what is asked for does not exist, or cannot be; in words.
    """
    cls = _class(method)
    changes = settings(cls, given)
    folder: str | Path | None = None
    if named := saved_name(model, cls, saved):
        folder = sources.open(named)
    if folder is not None:
        loaded = steer.load(str(folder))
        if type(loaded) is not cls:
            held = type(loaded).__name__
            raise ValueError(f"{named} holds {held}, and {method} is chosen: choose {held}")
        return dataclasses.replace(loaded, **changes) if changes else loaded
    if issubclass(cls, steer.Guidance) and "layers" not in changes and "preset" not in changes:
        layers = models.guided_layers(model)
        changes |= {"layers": layers} if layers else {}
    return method_of(method, changes, processor)


def saved_name(model: str, method: type[Method], saved: str | None) -> str:
    """What the method is loaded from: what the visitor named, else what was fitted to the model; empty = nothing."""
    if saved and saved.strip():
        return saved.strip()
    has_plan = any(field.name == "plan" for field in dataclasses.fields(method))
    return f"{FITTED}{model}/{method.__name__}" if has_plan and models.fitted(model, method.__name__) else ""


def in_python(model: str, method: Method, given: Mapping[str, Any] | None, saved: str | None = "") -> str:
    """The method that `steering` made, as an expression of Python to copy.

    It stands where `steer`, `steer_demos.models`, `dataclasses` and, of a vision-language model, `processor` are known.
    """
    cls = type(method)
    changes = "".join(f", {name}={value!r}" for name, value in settings(cls, given).items())
    named = saved_name(model, cls, saved)
    if not named and hasattr(cls, "for_processor"):
        return f"steer.{cls.__name__}.for_processor(processor{changes})"
    if line := python_line(method):
        return line
    loaded = f"steer.load({source_in_python(named)})"
    return f"dataclasses.replace({loaded}{changes})" if changes else loaded


@dataclass
class Chooser:
    """The components that choose a method: its name, its settings, and a saved one.

    Args:
        method: dropdown of names.
        settings: hidden, field -> value of the fields that differ from the default: what the form writes.
        start: hidden, what the form is drawn from, see `start_of`; setting it draws the form anew. No gr.State: a
            browser is not told of its changes by events that do not queue.
        saved: folder or hub id of a saved method.
    """

    method: gr.Dropdown
    settings: gr.JSON
    start: gr.JSON
    saved: gr.Textbox

    names: ClassVar[tuple[str, ...]] = ("method", "settings", "saved")

    @property
    def inputs(self) -> list[Any]:
        """What `steering` is to be given after the model's name, as `names` says."""
        return [self.method, self.settings, self.saved]


def chooser(names: Sequence[str], default: str) -> Chooser:
    """Draw the choice of a method and the form of its fields."""
    method = gr.Dropdown(list(names), value=default, label="Method", interactive=True)
    chosen = Chooser(
        method,
        gr.JSON({}, visible="hidden", label="settings"),
        gr.JSON(start_of({}), visible="hidden", label="start"),
        gr.Textbox(
            "",
            label="Saved method",
            placeholder="none",
            info="Folder or hub id of what steer.calibrate found; the fields below change its settings.",
            render=False,
        ),
    )

    turns = gr.State({})
    for place in (0, 1):
        _draw_form(place, turns, chosen)
    with gr.Accordion("A saved method", open=False):
        chosen.saved.render()
    method.input(None, None, [chosen.settings, chosen.start], js=EMPTY, api_visibility="private", queue=False)
    return chosen


def model_box(names: Sequence[str], sources: Sources) -> gr.Dropdown:
    """The choice of a model: embedded ones, those that the host offers, or what a visitor types."""
    return gr.Dropdown(
        [*names, *sources.models],
        value=names[0],
        label="Model",
        info="Or type a hub id, or a folder that this app may open.",
        allow_custom_value=True,
    )


def start_of(settings: Mapping[str, Any]) -> list[Any]:
    """A value of `Chooser.start`: a form is drawn from these settings, even if they are those of the last time."""
    return [next(_drawn), dict(settings)]


def _draw_form(place: int, turns: gr.State, chosen: Chooser) -> None:
    """One of two places, of which each form of a visitor takes the one where the last was not.

    A browser gives the components of a form that is drawn anew to those of the last one, by their order: sliders keep
    the other's default, and fields say that they were changed.
    """

    # Not when the method changes: whatever sets it sets `start` too, and a form drawn twice forgets what was typed.
    triggers = [get_blocks_context().root_block.load, chosen.start.change]

    @gr.render(inputs=[chosen.method, chosen.start, turns], triggers=triggers)
    def form(name: str, start: tuple[int, dict[str, Any]], turns: dict[int, int]) -> None:
        number, given = start
        cls = steer.methods().get(name)
        if cls is None or turns.setdefault(number, len(turns) % 2) != place:
            return
        shown, about = fields_of(cls), inspect.getdoc(cls) or ""
        first, more = [field for field in shown if field.is_own], [field for field in shown if not field.is_own]
        gr.Markdown(about.partition("\n")[0])
        _draw(first, given, chosen.settings)
        with gr.Accordion("More: where and when it acts", open=any(field.name in given for field in more)):
            _draw(more, given, chosen.settings)
        with gr.Accordion(f"About {name}", open=False):
            gr.Markdown(f"```text\n{about}\n```", elem_classes="docstring")


def _draw(shown: Sequence[Field], given: Mapping[str, Any], settings: gr.JSON) -> None:
    """The components of some fields, each of which writes its value into `settings`."""
    for field in shown:
        component = field.component(given.get(field.name))
        component.change(
            None,
            [settings, component],
            settings,
            js=CHANGE.format(name=json.dumps(field.name)),
            api_visibility="private",
            queue=False,
        )
