"""The tab of pictures with questions: the answer without and with a method, and where each of them looks."""

from __future__ import annotations

import struct
import time
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import gradio as gr
import numpy as np
from PIL import Image, ImageOps

import steer
from steer.method import Method
from steer.windowed import Windowed
from steer_demos.app import drawing, forms
from steer_demos.app.jobs import Job, Jobs, in_words
from steer_demos.app.sharing import Shared, connect
from steer_demos.app.stage import Loaded, Stage
from steer_demos.look import SCENE, Look, as_seen, look_at
from steer_demos.look_plots import draw_pictures
from steer_demos.scenes import EVALUATION_SEED, READY, Scene, draw_scene, training_questions

MODELS = ("emoji-vlm",)
FORMATS = {"PNG": [".png"], "JPEG": [".jpg", ".jpeg"], "WEBP": [".webp"]}
MOST_PIXELS = 4096 * 4096  # of an upload
LONGEST_SIDE = 1024  # pixels, of what the model is given of an upload: large pictures are many tokens
LONGEST_QUESTION = 2_000  # characters
MOST_TOKENS = 128
LABEL = 24  # pixels at the top of a picture, over which Gradio writes its label
HONEST = (
    "One answer proves little: over 600 questions VAR, VHR, GIFT and ImbalancedAttention made `emoji-vlm` no better."
)
# What Pillow raises for files that are no pictures, or broken ones.
BROKEN = (OSError, SyntaxError, ValueError, struct.error, Image.DecompressionBombError)


def _example(scene: int, question: str, method: str, tokens: bool = False, **settings: Any) -> dict[str, Any]:
    asked = {"scene": scene, "question": question, "layers": "", "relative": "", "tokens": tokens}
    return {"model": MODELS[0], **asked, "method": method, "settings": settings, "saved": ""}


EXAMPLES = {
    "GIFT": _example(20, "Where is the cat face?", "GIFT"),
    "VHR": _example(18, "Where is the octopus?", "VHR", alpha=1.25),
    "VHR, too loud": _example(15, "Where is the pizza?", "VHR", alpha=1.5),
    # This model has none of the paper's sinks; these settings take the largest hundredth of the picture's tokens.
    "VAR, made to edit": _example(4, "Where is the penguin?", "VAR", sink_dims="[507]", tau=14.0),
    "StreamingLLM": _example(15, "Where is the pizza?", "StreamingLLM", n_recent=16),
    "Each token": _example(13, "Describe the image.", "ImbalancedAttention", tokens=True),
}


def methods() -> list[str]:
    """Methods of language models, those made for pictures first."""
    able = {name: method for name, method in steer.methods().items() if method.kinds == ("causal",)}
    return sorted(able, key=lambda name: (not able[name].needs_pictures, name))


def open_upload(path: str) -> Image.Image:
    """A picture that a visitor uploaded, turned upright, at most LONGEST_SIDE on a side.

    What it is and how large is read from its first bytes: nothing is decoded before it is known to fit.

    Args:
        path: in the folder of uploads, which is all that Gradio hands over.

    Raises:
        ValueError: it is no PNG, JPEG or WebP file, is broken, or has too many pixels.
    """
    try:
        with Image.open(path, formats=tuple(FORMATS)) as picture:
            if picture.width * picture.height > MOST_PIXELS:
                raise Image.DecompressionBombError(f"it has {picture.width} x {picture.height} pixels")
            upright = ImageOps.exif_transpose(picture).convert("RGB")
    except Image.UnidentifiedImageError:
        raise ValueError(f"this file is no picture: upload a {', '.join(FORMATS)} file") from None
    except Image.DecompressionBombError as error:
        raise ValueError(
            f"this picture is too large: {error}; up to {MOST_PIXELS} are taken (4096 x 4096). Make it smaller first"
        ) from None
    except BROKEN as error:
        raise ValueError(f"this picture is broken ({type(error).__name__}): save it anew, as a PNG file") from None
    upright.thumbnail((LONGEST_SIDE, LONGEST_SIDE), Image.Resampling.LANCZOS)
    return upright


def scene_of(number: float) -> Scene:
    """The drawn scene of a number: one that the embedded model was never trained on.

    Raises:
        ValueError: it is no whole number, or too large.
    """
    return draw_scene(_seed(number))


def _seed(number: float) -> int:
    """What `steer look` calls the scene."""
    if not 0 <= number < READY or number != int(number):
        raise ValueError(f"scene {number} does not exist: give a whole number from 0 to {READY - 1}")
    return EVALUATION_SEED + int(number)


def picture_of(scene: float, upload: str | None) -> Image.Image:
    """What is asked about: the upload where there is one, else the scene."""
    return open_upload(upload) if upload else Image.fromarray(scene_of(scene).pixels)


def seen(scene: float, upload: str | None) -> tuple[Image.Image, str]:
    """The picture to look at, and what is in it as far as that is known."""
    picture = picture_of(scene, upload)
    if upload:
        return picture, f"Your picture, {picture.width} x {picture.height}. Take it away to ask about scenes."
    things = [thing.name + (f" ({thing.corner})" if thing.corner else "") for thing in scene_of(scene).things]
    return drawing.enlarged(picture, 288), f"In it: {', '.join(things)}."


def question_about(scene: float) -> str:
    """One of the questions that can be asked about a scene."""
    asked = training_questions(scene_of(scene), np.random.default_rng())
    return asked[0].text


@dataclass(frozen=True, eq=False)
class Pair:
    """A question answered without and with a method.

    Args:
        looks: "without" and "with NAME", in this order.
        drawn: the same, relative to another question where one is given.
        seconds: of each, with reading where it looks.
        summary: where the method acts.
    """

    looks: dict[str, Look]
    drawn: dict[str, Look]
    seconds: dict[str, float]
    summary: str


def ask_pair(
    loaded: Loaded,
    method: Method,
    picture: Image.Image,
    question: str,
    job: Job,
    *,
    max_new_tokens: float = 16,
    layers: str = "",
    relative: str = "",
) -> Pair:
    """Let a vision-language model answer without and with a method; it can be stopped between two tokens.

    Args:
        loaded: a vision-language model.
        max_new_tokens: of each answer.
        layers: whose attention is read, as `look_at` takes them; empty = all.
        relative: another question, where it looks for which is divided by; empty = none.

    Raises:
        ValueError: a question is empty or too long, the tokens are too many, the layers do not exist.
    """
    questions = [question, *([relative] if relative.strip() else [])]
    for text in questions:
        if len(text) > LONGEST_QUESTION:
            raise ValueError(f"the question has {len(text)} characters; at most {LONGEST_QUESTION} are taken")
    if not 1 <= max_new_tokens <= MOST_TOKENS or max_new_tokens != int(max_new_tokens):
        raise ValueError(f"max_new_tokens={max_new_tokens:g} must be a whole number from 1 to {MOST_TOKENS}")
    tokens, total = int(max_new_tokens), 2 * len(questions) * int(max_new_tokens)
    method = _readable(method)
    with steer.apply(loaded.model, method) as handle:  # what the model refuses, it refuses before it answers
        summary = handle.summary()
    read = partial(look_at, loaded.model, loaded.processor, pictures=[picture], layers=layers.strip() or None)
    if not loaded.warm:
        job.step(0, total, "first token of this model")
        read(question, max_new_tokens=1)
        loaded.warm = True
    found, before = Pair({}, {}, {}, summary), 0
    for title, chosen in {"without": None, f"with {type(method).__name__}": method}.items():
        looks = []
        for text in questions:
            told = partial(_tell, job, title, before, total)
            told(0)
            started = time.perf_counter()
            looks.append(read(text, method=chosen, max_new_tokens=tokens, on_token=told))
            found.seconds.setdefault(title, time.perf_counter() - started)
            before += tokens
        found.looks[title] = looks[0]
        found.drawn[title] = looks[0].relative_to(looks[1]) if len(looks) > 1 else looks[0]
    return found


def _tell(job: Job, title: str, before: int, total: int, done: int) -> None:
    job.step(before + done, total, title)


def _readable(method: Method) -> Method:
    """Evicted tokens cannot be read, so they are masked instead, which computes the same."""
    return replace(method, evict=False) if isinstance(method, Windowed) and method.evict else method


def figures(found: Pair, method: Method) -> str:
    """What was measured, as a table in Markdown, and what it says."""
    lines = ["| | attention on the picture | tokens | time |", "|---|---|---|---|"]
    for title, look in found.looks.items():
        share, seconds = 100 * look.on(0), found.seconds[title]
        lines.append(f"| {title} | {share:.1f} % | {len(look.words)} | {seconds:.2f} s |")
    without, steered = (look.answer for look in found.looks.values())
    if method.is_neutral():
        said = f"{type(method).__name__} changes nothing with these settings."
    else:
        said = "The answers are the same." if without == steered else "The answers differ."
    return "\n".join([*lines, "", f"{said} Times are with reading where it looks."])


def python(loaded: Loaded, method: str, scene: str, question: str) -> str:
    """The steered answer as code to copy.

    Args:
        method: as an expression of Python.
    """
    return (
        f"{drawing.imports(method)}import steer\nfrom steer_demos import models\n"
        "from steer_demos.look import look_at, open_picture\n\n"
        f"model, processor = models.load({loaded.name!r})\n"
        f"picture = open_picture({scene!r})\n"
        f"look = look_at(model, processor, {question!r}, [picture], method={method})\n"
        "print(look.answer, look.on(0))\n"
    )


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    @in_words
    def vision(
        model: str,
        scene: float,
        question: str,
        max_new_tokens: float,
        layers: str,
        relative: str,
        tokens: bool,
        method: str,
        settings: dict[str, Any],
        saved: str,
        upload: str | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> tuple[str, str, Image.Image, str, str, str]:
        """Ask a question about a picture, the upload or else the drawn scene, without and with a method.

        Returns: the two answers, where each looks, figures, where the method acts, and the code.
        """
        picture = picture_of(scene, upload)
        with jobs.running(request, progress) as job, stage.holding(model, "vision", job) as loaded:
            chosen = forms.steering(stage.sources, model, method, settings, saved, loaded.processor)
            found = ask_pair(
                loaded,
                chosen,
                picture,
                question,
                job,
                max_new_tokens=max_new_tokens,
                layers=layers,
                relative=relative,
            )
            seen_as = as_seen(loaded.processor, picture)
        drawn = draw_pictures(found.drawn, [seen_as], question, relative.strip() or None, tokens)
        drawn = ImageOps.expand(drawn, (0, LABEL, 0, 0), "white")
        answers = [look.answer for look in found.looks.values()]
        name = "my-picture.png" if upload else f"{SCENE}{_seed(scene)}"
        code = python(loaded, forms.in_python(model, chosen, settings, saved), name, question)
        return *answers, drawn, figures(found, chosen), found.summary, code  # type: ignore[return-value]

    start = EXAMPLES["GIFT"]
    examples = gr.Row(elem_classes="examples")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = forms.model_box(MODELS, stage.sources)
            shown, known = seen(start["scene"], None)
            picture = gr.Image(
                shown,
                label="Picture",
                alt_text="the picture that is asked about",
                format="png",
                interactive=False,
                height=320,
                buttons=["fullscreen"],
            )
            things = gr.Markdown(known, label="In the picture", elem_id="vision-things")
            with gr.Row():
                scene = gr.Number(
                    start["scene"],
                    label="Scene",
                    info=f"0 to {READY - 1}; none was trained on.",
                    precision=0,
                    min_width=110,
                )
                question = gr.Textbox(
                    start["question"],
                    label="Question",
                    placeholder="About the picture; Enter asks it.",
                    max_length=LONGEST_QUESTION,
                    scale=2,
                    min_width=180,
                )
            with gr.Row():
                other = gr.Button("Another scene", size="sm", min_width=120)
                ask = gr.Button("Another question", size="sm", min_width=120)
            with gr.Accordion("Your own picture", open=False):
                allowed = [ending for endings in FORMATS.values() for ending in endings]
                upload = gr.File(
                    label="PNG, JPEG or WebP, up to 8 MB", file_types=allowed, height=120, elem_id="vision-upload"
                )
            with gr.Accordion("What is drawn", open=False):
                tokens = gr.Checkbox(False, label="Each token", info="Also where the first 8 tokens look.")
                relative = gr.Textbox(
                    "",
                    label="Relative to",
                    placeholder="nothing",
                    info='Divide by where it looks when asked this, e.g. "Describe the image."',
                    max_length=LONGEST_QUESTION,
                )
                layers = gr.Textbox("", label="Layers", placeholder="all", info="Of the decoder: 21, 21:24, or a glob.")
                length = gr.Slider(1, MOST_TOKENS, 16, step=1, label="max_new_tokens", info="At most, of an answer.")
            chosen = forms.chooser(methods(), start["method"])
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                run = gr.Button("Ask", variant="primary", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            with gr.Row():
                before = gr.Textbox(label="Answer without", lines=2, interactive=False, min_width=140)
                after = gr.Textbox(label="Answer with the method", lines=2, interactive=False, min_width=140)
            heat = gr.Image(
                label="Where it looks",
                alt_text="where the model looks while it answers, without and with the method",
                elem_id="vision-heat",
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            table = gr.Markdown(label="Figures", elem_id="vision-figures")
            gr.Markdown(HONEST)
            with gr.Accordion("Where it acts, and the same in Python", open=False):
                summary = gr.Textbox(label="Where it acts", lines=3, max_lines=12, interactive=False)
                code = gr.Code(label="The same in Python", language="python", interactive=False)
            inputs = [model, scene, question, length, layers, relative, tokens, *chosen.inputs]
            names = ("model", "scene", "question", "max_new_tokens", "layers", "relative", "tokens", *chosen.names)
            shared = Shared("vision", dict(zip(names, inputs, strict=True)), chosen.start, EXAMPLES, [upload])
            outputs = [before, after, heat, table, summary, code]
            connect(shared, vision, outputs, jobs, run=run, stop=stop, submit=[question, relative], examples=examples)
    # In the queue, which is what shows errors in words.
    light = {"api_visibility": "private", "concurrency_id": "vision-light", "concurrency_limit": 4}
    for part in (scene, upload):
        part.change(in_words(seen), [scene, upload], [picture, things], show_progress="hidden", **light)
    ask.click(in_words(question_about), scene, question, show_progress="hidden", **light)
    another = f"scene => [(scene + 1 + Math.floor({READY - 1} * Math.random())) % {READY}, null]"
    other.click(None, scene, [scene, upload], js=another, api_visibility="private", queue=False)
    return shared
