"""Settings of a tab as JSON and as a link: what a visitor sees can be sent, kept and opened again."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import gradio as gr

from steer_demos.app import forms
from steer_demos.app.jobs import Jobs, in_words, words

# In the browser, so that the link has the address that the visitor sees. An empty field is no setting.
LINK = """(...values) => {{
  const named = {names}.map((name, i) => [name, values[i]]);
  const given = named.filter(([, value]) => value !== null && value !== undefined);
  const settings = Object.fromEntries(given);
  const query = new URLSearchParams({{tab: {tab}, settings: JSON.stringify(settings)}});
  const text = JSON.stringify({{tab: {tab}, ...settings}}, null, 1);
  return [location.origin + location.pathname + "?" + query, text];
}}"""
LONGEST = 20_000  # characters of settings that are read
LARGEST = 2**53  # a browser has no larger whole numbers; of infinities a link knows nothing


@dataclass(eq=False)
class Shared:
    """A tab's inputs that make up its settings.

    Args:
        tab: id of the tab.
        inputs: name -> component; the names are those of the tab's function.
        start: what the method's form is drawn from, where the tab has one; it follows "settings".
        examples: label -> settings, drawn as buttons.
        uploads: components of files, which no link holds; the tab's function gets them after the inputs. Settings that
            are restored take them away.
    """

    tab: str
    inputs: dict[str, Any]
    start: Any = None
    examples: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    uploads: Sequence[Any] = ()

    @property
    def inputs_list(self) -> list[Any]:
        return list(self.inputs.values())

    @property
    def arguments(self) -> list[Any]:
        """The components whose values the tab's function gets."""
        return [*self.inputs_list, *self.uploads]

    @property
    def outputs(self) -> list[Any]:
        """The components that `restore` sets."""
        return [*self.inputs_list, *([self.start] if self.start is not None else []), *self.uploads]

    def restore(self, settings: Mapping[str, Any]) -> list[Any]:
        """Values for `outputs`; what the settings leave out stays as it is.

        Raises:
            ValueError: a name that the tab does not have, or a value that its component cannot show.
        """
        given = dict(settings)
        tab = given.pop("tab", self.tab)
        if tab != self.tab:
            raise ValueError(f"these are settings of the tab {tab!r}; this is {self.tab!r}")
        for name in given:
            if name not in self.inputs:
                raise ValueError(f"the {self.tab} tab has no setting {name!r}; it has {', '.join(self.inputs)}")
        if "method" in given:  # what is not said of it is not that of the last method
            given = {name: empty for name, empty in (("settings", {}), ("saved", "")) if name in self.inputs} | given
        elif "method" in self.inputs and given.get("settings"):
            raise ValueError('"settings" are those of a method: give "method" too')
        values = [_fit(name, each, given[name]) if name in given else gr.skip() for name, each in self.inputs.items()]
        if "method" in given:
            forms.check(given["method"], given["settings"])
        if self.start is not None:
            values.append(forms.start_of(given["settings"]) if "settings" in given else gr.skip())
        return [*values, *[None] * len(self.uploads)]


def _fit(name: str, component: Any, value: Any) -> Any:
    """The value, if the component can show it."""
    if isinstance(component, gr.Checkbox):
        fits, wanted = isinstance(value, bool), "true or false"
    elif isinstance(component, gr.JSON):
        fits, wanted = isinstance(value, dict), "an object, {...}"
    elif isinstance(component, (gr.Number, gr.Slider)):
        fits, wanted = _fits_number(component, value)
    elif isinstance(component, (gr.Dropdown, gr.Radio, gr.CheckboxGroup)):
        fits, wanted = _fits_choice(component, value)
    else:
        longest = getattr(component, "max_length", None) or LONGEST
        fits, wanted = isinstance(value, str) and len(value) <= longest, f"a text of at most {longest} characters"
    if not fits:
        raise ValueError(f"{name} is {value!r}; it may be {wanted}")
    return value


def _fits_number(component: gr.Number | gr.Slider, value: Any) -> tuple[bool, str]:
    low = -LARGEST if component.minimum is None else component.minimum
    high = LARGEST if component.maximum is None else component.maximum
    whole = component.step == 1 if isinstance(component, gr.Slider) else component.precision == 0
    wanted = ("a whole number" if whole else "a number") + f" from {low:g} to {high:g}"
    number = isinstance(value, (int, float)) and not isinstance(value, bool)
    return number and low <= value <= high and (not whole or value == int(value)), wanted


def _fits_choice(component: gr.Dropdown | gr.Radio | gr.CheckboxGroup, value: Any) -> tuple[bool, str]:
    several = isinstance(component, gr.CheckboxGroup) or bool(getattr(component, "multiselect", False))
    custom = getattr(component, "allow_custom_value", False)
    known = [choice for _, choice in component.choices]
    wanted = ("a list of " if several else "") + ", ".join(map(str, known)) + (", or a text" if custom else "")
    given = value if isinstance(value, list) else [value]
    fits = isinstance(value, list) == several
    return fits and all(one in known or (custom and isinstance(one, str)) for one in given), wanted


def read(text: str) -> dict[str, Any]:
    """Settings from JSON.

    Raises:
        ValueError: it is too long, or no JSON object.
    """
    if len(text) > LONGEST:
        raise ValueError(f"these settings have {len(text)} characters; at most {LONGEST} are read")
    try:
        found = json.loads(text)
        json.dumps(found, ensure_ascii=False).encode()  # half a character, "\\ud800", cannot be sent to the browser
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the settings are not JSON: {error}") from None
    if not isinstance(found, dict):
        raise ValueError(f'the settings are a {type(found).__name__}; write an object: {{"seed": 1}}')
    return found


def connect(
    shared: Shared,
    function: Any,
    outputs: Sequence[Any],
    jobs: Jobs,
    *,
    run: gr.Button,
    stop: gr.Button,
    submit: Sequence[gr.Textbox] = (),
    examples: Any = None,
    concurrency: str = "model",
    share: bool = True,
) -> None:
    """Let a tab's buttons do what they say, and draw the sharing of its settings here.

    Args:
        shared: the tab's inputs; `gradio_client` finds the function under the name of the tab.
        function: gets the inputs, the request and the progress.
        run, stop: buttons. Stopping ends what runs at its next step, and takes what waits out of the queue.
        submit: text fields in which Enter runs it too.
        examples: a row for the buttons of the examples; None = the tab has none.
        concurrency: jobs of one name run one at a time; "model" is for all that use the model.
        share: draw the sharing; False for a part of a tab, whose settings are shared with the tab's.
    """
    event = {"concurrency_id": concurrency, "concurrency_limit": 1}
    events = [run.click(function, shared.arguments, list(outputs), api_name=shared.tab, **event)]
    for box in submit:
        events.append(box.submit(function, shared.arguments, list(outputs), api_visibility="private", **event))
    if examples is not None:
        events += draw_examples(shared, examples, function, outputs, **event)
    stop.click(jobs.stop, None, None, cancels=events, api_visibility="private", queue=False)
    if share:
        draw_sharing(shared)


def draw_examples(shared: Shared, place: Any, run: Any, outputs: Sequence[Any], **event: Any) -> list[Any]:
    """In `place` a button for each example, which fills the tab in and runs it; the events, which can be stopped."""
    events = []
    with place:
        gr.Markdown("Examples")
        for label, settings in shared.examples.items():
            button = gr.Button(label, size="sm", min_width=120)
            restore = partial(shared.restore, settings)
            restore()  # an example that cannot be is found as the page is made
            filled = button.click(restore, None, shared.outputs, api_visibility="private", queue=False)
            events.append(filled.then(run, shared.arguments, list(outputs), api_visibility="private", **event))
    return events


def draw_sharing(shared: Shared) -> None:
    """Where settings are turned into a link and JSON, and read from JSON."""
    with gr.Accordion("Share these settings", open=False):
        make = gr.Button("Make link and JSON", size="sm")
        link = gr.Textbox(label="Link", buttons=["copy"], interactive=False, elem_id=f"{shared.tab}-link")
        text = gr.Textbox(label="Settings as JSON", lines=3, max_lines=12, elem_id=f"{shared.tab}-json")
        use = gr.Button("Use this JSON", size="sm")
    js = LINK.format(tab=json.dumps(shared.tab), names=json.dumps(list(shared.inputs)))
    make.click(None, shared.inputs_list, [link, text], js=js, api_visibility="private", queue=False)

    @in_words
    def restore(text: str) -> list[Any]:
        return shared.restore(read(text))

    use.click(restore, text, shared.outputs, api_visibility="private", concurrency_limit=None)


def opened(tabs: Sequence[Shared], query: Mapping[str, str]) -> list[Any]:
    """For the page as it opens: the chosen tab, and values for the outputs of all tabs. A bad link gives a warning."""
    values: dict[str, list[Any]] = {shared.tab: [gr.skip()] * len(shared.outputs) for shared in tabs}
    chosen = query.get("tab", "")
    asked = next((shared for shared in tabs if shared.tab == chosen), None)
    if chosen and asked is None:
        gr.Warning(f"the link asks for a tab that does not exist; there are {', '.join(values)}")
    elif asked is not None and "settings" in query:
        try:
            values[asked.tab] = asked.restore(read(query["settings"]))
        except ValueError as error:
            gr.Warning(f"the settings of the link are left out: {words(error)}")
    tab = gr.Tabs(selected=asked.tab) if asked is not None else gr.skip()
    return [tab, *(value for each in values.values() for value in each)]
