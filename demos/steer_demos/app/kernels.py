"""The tab of kernels: which blocks a pattern computes, what one token sees, and what that can save."""

from __future__ import annotations

import html
import inspect
import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import gradio as gr
from gradio.context import get_blocks_context
from PIL import Image

from steer.model_shapes import MODEL_SHAPES
from steer_demos.app import drawing, kernels_form, kernels_measure, kernels_pictures
from steer_demos.app.forms import start_of
from steer_demos.app.jobs import SPOKEN, Jobs, in_words
from steer_demos.app.kernels_form import Argument, Grid, Range
from steer_demos.app.kernels_pictures import Explored, Sheet
from steer_demos.app.sharing import Shared, connect
from steer_demos.app.stage import Stage

PATTERN = "neighborhood"
GRID: Grid = (8, 16, 24)
BLOCK_SIZES = ("16", "32", "64", "128", "256")
MOST = {"Frames": 64, "Height": 128, "Width": 128}
EXAMPLES: dict[str, dict[str, Any]] = {
    "Radial, HunyuanVideo": {
        **{"pattern": "radial", "frames": 33, "height": 45, "width": 80, "text_tokens": 256, "block_size": "128"},
        **{"settings": {"decay": 0.95, "key_frame_sink": False}, "frame": 16, "row": 22, "column": 40},
    },
    "Sliding tiles": {
        **{"pattern": "sliding_tile", "frames": 12, "height": 16, "width": 24, "text_tokens": 0, "block_size": "64"},
        **{"settings": {"tile": [4, 4, 4], "window": [4, 12, 12]}, "frame": 5, "row": 9, "column": 13},
    },
    "Dilated neighborhood": {
        **{"pattern": "neighborhood", "frames": 1, "height": 32, "width": 48, "text_tokens": 64, "block_size": "32"},
        **{"settings": {"window": [7, 7], "dilation": [3, 3]}, "frame": 0, "row": 15, "column": 22},
    },
    "Sinks and window": {
        **{"pattern": "sink_window", "frames": 1, "height": 48, "width": 96, "text_tokens": 0, "block_size": "64"},
        **{"settings": {"sink": 64, "window": 768}, "frame": 0, "row": 40, "column": 30},
    },
    "A-shape, long prompt": {
        **{"pattern": "a_shape", "frames": 2, "height": 128, "width": 128, "text_tokens": 0, "block_size": "128"},
        **{"settings": {}, "frame": 1, "row": 64, "column": 64},
    },
    "Vertical stripes": {
        **{"pattern": "vertical_stripes", "frames": 8, "height": 16, "width": 24, "text_tokens": 0},
        **{"block_size": "32", "settings": {"width": 200}, "frame": 4, "row": 7, "column": 12},
    },
    "Powers of two": {
        **{"pattern": "power_of_two", "frames": 1, "height": 64, "width": 128, "text_tokens": 0},
        **{"block_size": "64", "settings": {"window_blocks": 5}, "frame": 0, "row": 60, "column": 100},
    },
}
# In the browser: the settings with one argument changed, whose values on the axes are several components.
CHANGE = "(settings, ...values) => ({{...(settings || {{}}), {name}: values.length > 1 ? values : values[0]}})"
INFO = 200  # characters of help beside a component


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    def drawn(
        pattern: str,
        frames: float,
        height: float,
        width: float,
        text_tokens: float,
        block_size: str,
        settings: dict[str, Any],
        frame: float,
        row: float,
        column: float,
        attention_share: float,
    ) -> tuple[Image.Image, Image.Image, str, str]:
        """Draw the block mask of a pattern.

        Returns: what the query at (frame, row, column) sees, the mask, figures, and the code.
        """
        explored = explored_of(pattern, frames, height, width, text_tokens, block_size, settings)
        query = (whole("frame", frame), whole("row", row), whole("column", column))
        sheet = Sheet.of(explored.grid).draw(*explored.levels(query), query)
        figures = kernels_measure.figures(explored, query, attention_share)
        note = "" if explored.text == text_tokens else f"\n\n{pattern} has no place for text tokens: they are left out."
        return sheet, kernels_pictures.of_mask(explored, query), drawing.table(figures) + note, python(explored)

    def at_once(*values: Any) -> list[Any]:
        """The same while somebody moves a slider: what cannot be is said in place of the figures."""
        try:
            return list(drawn(*values))
        except SPOKEN as error:
            return [
                gr.skip(),
                gr.skip(),
                f"**This cannot be drawn:** {html.escape(str(error), quote=False)}",
                gr.skip(),
            ]

    @in_words
    def measured(
        pattern: str,
        frames: float,
        height: float,
        width: float,
        text_tokens: float,
        block_size: str,
        settings: dict[str, Any],
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> str:
        """Time dense attention and the sparse kernel with this mask, on the machine of this page."""
        with jobs.running(request, progress) as job:
            explored = explored_of(pattern, frames, height, width, text_tokens, block_size, settings)
            return drawing.table(kernels_measure.measure(explored, job))

    examples = gr.Row(elem_classes="examples")
    with gr.Row():
        with gr.Column(scale=5, min_width=300):
            pattern = gr.Dropdown(kernels_form.names(), value=PATTERN, label="Pattern", info=_first_line(PATTERN))
            model = gr.Dropdown(
                list(MODEL_SHAPES),
                value=None,
                label="Take the grid of a published model",
                info="At its own resolution.",
            )
            with gr.Row():
                grid = [
                    gr.Slider(1, most, value, step=1, label=label, min_width=120)
                    for (label, most), value in zip(MOST.items(), GRID, strict=True)
                ]
            with gr.Row():
                text = gr.Slider(0, 1024, 0, step=1, label="Text tokens", min_width=120)
                block = gr.Dropdown(list(BLOCK_SIZES), value="64", label="Block size", min_width=120)
            settings = gr.JSON({}, visible="hidden", label="settings")
            # Written whenever settings come from elsewhere. No State: changes of one go unseen where nothing is queued.
            start = gr.Textbox("", visible="hidden", label="start")
            forms = draw_forms(settings)
        with gr.Column(scale=6, min_width=300):
            gr.Markdown("### What one token sees\nClick at another one, or give its place below.")
            # The labels would cover the pictures.
            shown = {"format": "png", "interactive": False, "show_label": False, "buttons": ["download", "fullscreen"]}
            seen = "the tokens that one query sees, frame by frame"
            sheet = gr.Image(label="What the query sees", alt_text=seen, elem_id="kernels-query", **shown)
            with gr.Row():
                query = [
                    gr.Number(size // 2, precision=0, minimum=0, label=f"Query: {name}", min_width=90)
                    for name, size in zip(("frame", "row", "column"), GRID, strict=True)
                ]
    with gr.Row():
        with gr.Column(scale=4, min_width=300):
            gr.Markdown("### Block mask\nQueries down, keys across; the mark at its left is the query.")
            mask = gr.Image(label="Block mask", alt_text="which blocks of keys each block of queries sees", **shown)
        with gr.Column(scale=5, min_width=300):
            figures = gr.Markdown(label="Figures", elem_id="kernels-figures")
            share = gr.Slider(0, 1, 0.7, step=0.01, label="Attention's share of a step")
            with gr.Row():
                measure = gr.Button("Measure here", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            timing = gr.Markdown(label="Measured", elem_id="kernels-measured")
    code = gr.Code(label="The same in Python", language="python", interactive=False)
    inputs = [pattern, *grid, text, block, settings, *query, share]
    names = list(inspect.signature(drawn).parameters)
    shared = Shared("kernels", dict(zip(names, inputs, strict=True)), start, EXAMPLES)
    outputs = [sheet, mask, figures, code]
    # The tab draws at once: this button is there for gradio_client, which is told of errors.
    run = gr.Button("Draw", visible=False)
    connect(shared, in_words(drawn), outputs, jobs, run=run, stop=stop, examples=examples, concurrency="kernels")
    light = {"api_visibility": "private", "show_progress": "hidden", "trigger_mode": "always_last"}
    drawing_again = {**light, "concurrency_id": "kernels", "concurrency_limit": 1}

    def fitted(
        pattern: str, frames: float, height: float, width: float, settings: dict[str, Any], model: str, *query: float
    ) -> list[Any]:
        """For a new pattern or grid: the settings that it can have and their form, and a query inside."""
        frames = 1 if kernels_form.of_pictures(pattern) else frames
        grid = (int(frames or 1), int(height or 1), int(width or 1))
        kept = kernels_form.fit(pattern, settings, grid)
        inside = [min(int(at or 0), size - 1) for at, size in zip(query, grid, strict=True)]
        of_model = model if model in MODEL_SHAPES and MODEL_SHAPES[model].grid() == grid else None
        return [
            kept,
            gr.Dropdown(info=_first_line(pattern)),
            *grid,
            of_model,
            *inside,
            *forms.updates(pattern, kept, grid),
        ]

    gr.on(
        [pattern.change, start.change, *(size.change for size in grid), *forms.releases],
        fitted,
        [pattern, *grid, settings, model, *query],
        [settings, pattern, *grid, model, *query, *forms.outputs],
        queue=False,
        **light,
    ).then(at_once, inputs, outputs, **drawing_again)
    changes = [each.change for each in (text, block, settings, *query, share)]
    gr.on([*changes, get_blocks_context().root_block.load], at_once, inputs, outputs, **drawing_again)
    sheet.select(clicked, grid, query, queue=False, **light)
    model.input(sized, [model, settings, pattern], [*grid, text, settings, start], queue=False, **light).then(
        lambda name: round(kernels_measure.attention_share(name), 2), model, share, **light
    )
    timed = measure.click(measured, inputs[:7], timing, api_name="measure", concurrency_id="model", concurrency_limit=1)
    stop.click(None, None, None, cancels=[timed], api_visibility="private", queue=False)
    return shared


def explored_of(
    pattern: str,
    frames: float,
    height: float,
    width: float,
    text_tokens: float,
    block_size: str,
    settings: Mapping[str, Any] | None,
) -> Explored:
    """The mask that the tab's inputs ask for.

    Raises:
        ValueError: what cannot be.
    """
    if str(block_size) not in BLOCK_SIZES:
        raise ValueError(f"block_size={block_size} is none of {', '.join(BLOCK_SIZES)}")
    grid = (whole("Frames", frames), whole("Height", height), whole("Width", width))
    return kernels_pictures.explore(pattern, settings, grid, whole("Text tokens", text_tokens), int(block_size))


def whole(name: str, number: float | None) -> int:
    """The number.

    Raises:
        ValueError: a field is empty, or holds something else.
    """
    if number is None or not math.isfinite(number) or number != int(number):
        raise ValueError(f"{name} is {number}: give a whole number")
    return int(number)


@dataclass
class Forms:
    """The form of every pattern, of which one is visible. Its components write into the settings.

    Args:
        columns: pattern -> what holds its form.
        fields: (pattern, argument, axis) -> component; the axis is None where there is one component for all.
        releases: events after which other components have other steps.
    """

    columns: dict[str, gr.Column] = field(default_factory=dict)
    fields: dict[tuple[str, Argument, int | None], Any] = field(default_factory=dict)
    releases: list[Any] = field(default_factory=list)

    @property
    def outputs(self) -> list[Any]:
        return [*self.columns.values(), *self.fields.values()]

    def updates(self, pattern: str, settings: Mapping[str, Any], grid: Grid) -> list[Any]:
        """Values for `outputs`: the form of this pattern, for settings that fit it."""
        updates = [gr.Column(visible=name == pattern) for name in self.columns]
        for name, argument, axis in self.fields:
            mine = name == pattern
            updates.append(component(name, argument, axis, settings, grid) if mine else gr.skip())
        return updates


def draw_forms(settings: gr.JSON) -> Forms:
    """Draw the forms; the one of PATTERN is visible."""
    forms = Forms()
    for pattern in kernels_form.names():
        first = [argument for argument in kernels_form.arguments(pattern) if argument.required]
        more = [argument for argument in kernels_form.arguments(pattern) if not argument.required]
        with gr.Column(visible=pattern == PATTERN) as forms.columns[pattern]:
            for argument in first:
                draw_argument(forms, pattern, argument, settings)
            if more:
                with gr.Accordion("More arguments" if first else "Arguments", open=not first):
                    for argument in more:
                        draw_argument(forms, pattern, argument, settings)
            with gr.Accordion(f"About {pattern}", open=False):
                gr.Markdown(f"```text\n{inspect.getdoc(kernels_form.function(pattern))}\n```", elem_classes="docstring")
    return forms


def draw_argument(forms: Forms, pattern: str, argument: Argument, settings: gr.JSON) -> None:
    """The components of one argument, which write its value into `settings`."""
    change = {"api_visibility": "private", "queue": False}
    if not argument.per_axis:
        made = component(pattern, argument, None, {}, GRID)
        forms.fields[pattern, argument, None] = made
        made.change(None, [settings, made], settings, js=CHANGE.format(name=json.dumps(argument.name)), **change)
        return
    gr.Markdown(f"**{argument.name}**: {argument.help[:INFO]}")
    with gr.Row():
        several = [
            component(pattern, argument, axis, {}, GRID) for axis in range(len(kernels_form.sizes(pattern, GRID)))
        ]
    for axis, made in enumerate(several):
        forms.fields[pattern, argument, axis] = made
        js = CHANGE.format(name=json.dumps(argument.name))
        made.change(None, [settings, *several], settings, js=js, **change)
        if argument.name in kernels_form.MULTIPLES.values() and argument.kind == "number":
            forms.releases.append(made.release)


def component(pattern: str, argument: Argument, axis: int | None, given: Mapping[str, Any], grid: Grid) -> Any:
    """The component of an argument, on one axis where it has several, for settings that fit the grid."""
    value = given.get(argument.name, kernels_form.start(pattern, argument, grid, given))
    shown: dict[str, Any] = {"label": argument.name, "info": argument.help[:INFO] or None, "interactive": True}
    limits = argument.range
    if axis is not None:
        size, step = (
            each[axis]
            for each in (kernels_form.sizes(pattern, grid), kernels_form.steps(pattern, argument, given, grid))
        )
        names = kernels_form.AXES[-len(kernels_form.sizes(pattern, grid)) :]
        least = 0 if argument.optional else step
        value, limits = value[axis], Range(least, max(-(-size // step) * step, least + 1), 0, step)
        shown = {"label": f"{argument.name}: {names[axis]}", "interactive": size > 1, "min_width": 120}
    if argument.kind == "flag":
        return gr.Checkbox(bool(value), **shown)
    if argument.kind == "numbers":
        return gr.Textbox(value if isinstance(value, str) else ", ".join(map(str, value)), **shown)
    if argument.optional and axis is None:
        return gr.Number(value, precision=0 if argument.whole else None, placeholder="None", **shown)
    return gr.Slider(limits.low, limits.high, value, step=limits.step, **shown)


def sized(model: str, settings: dict[str, Any] | None, pattern: str) -> list[Any]:
    """The grid and the text of a published model."""
    grid, text, text_first = kernels_measure.published(model)
    changed = dict(settings or {})
    if kernels_form.takes(pattern, "text_first"):
        changed["text_first"] = text_first
    return [*grid, text, changed, str(start_of(changed))]


def clicked(frames: float, height: float, width: float, at: gr.SelectData) -> list[Any]:
    """The token that was clicked at becomes the query."""
    token = Sheet.of((int(frames), int(height), int(width))).token(*at.index)
    return list(token) if token is not None else [gr.skip()] * 3


def python(explored: Explored) -> str:
    """Code that builds the same mask."""
    parameters = inspect.signature(kernels_form.function(explored.pattern)).parameters
    given = [
        f"    {name}={value!r},\n"
        for name, value in explored.arguments.items()
        if parameters[name].default
        not in (value, value[0] if isinstance(value, tuple) and len({*value}) == 1 else value)
    ]
    lines = f"mask = patterns.{explored.pattern}(\n{''.join(given)})\nprint(mask)\n"
    if explored.order is None:
        return f"from steer_kernels import patterns\n\n{lines}"
    grid, tile, text = explored.arguments["grid"], explored.arguments["tile"], explored.text
    place = f", text_tokens={text}, text_first={explored.first > 0}" if text else ""
    return (
        f"from steer_kernels import order, patterns\n\n{lines}"
        f"# queries, keys and values have to be in this order: placed.apply(query, 2)\n"
        f"placed = order.tiles({grid}, {tile}{place})\n"
    )


def _first_line(pattern: str) -> str:
    return (inspect.getdoc(kernels_form.function(pattern)) or "").splitlines()[0]
