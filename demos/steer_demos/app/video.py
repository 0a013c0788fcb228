"""The tab of clips: a prompt drawn as a clip without and with a method, played side by side, and what was left out."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import gradio as gr
import imageio.v3 as imageio
import numpy as np
from gradio.processing_utils import save_bytes_to_cache
from PIL import Image, ImageDraw, ImageFont

import steer
from steer.compare import Comparison
from steer.guidance import Guidance
from steer.method import Method
from steer.sparse import Sparse
from steer_demos import models
from steer_demos.app import blocks, drawing, forms
from steer_demos.app.jobs import Jobs, in_words
from steer_demos.app.sharing import Shared, connect
from steer_demos.app.stage import Loaded, Stage

MODELS = ("emoji-wan",)
STEPS = 12
# Its clips have 576 tokens, which are five blocks of the size that large models take: nothing could be left out.
BLOCK_SIZES = {"emoji-wan": 16}
LARGEST = 129 * 768 * 1280  # pixels of a clip
TIMES_LARGER = 8  # clips of an embedded model than those that it was made for
LONG, SLOW, FAST = 32, 8, 16  # clips from so many frames on are shown at 16 frames a second, shorter ones at 8
FOOT, GAP = 30, 8  # pixels below the clips, for their names, and between them

PROMPTS = (  # what the embedded model draws well in a dozen steps
    "a red apple growing on a white background",
    "a car moving left on a pink background",
    "a penguin moving right on a yellow background",
    "a fox moving left on a blue background",
)
QUICK = {"model": MODELS[0], "seed": 0, "steps": STEPS, "frames": 0, "height": 0, "width": 0}
EXAMPLES: dict[str, dict[str, Any]] = {
    label: QUICK | {"prompt": prompt, "method": method, "settings": settings, "mask_layer": layer}
    for label, prompt, method, settings, layer in (
        ("Radial", PROMPTS[0], "RadialAttention", {"decay": 0.2}, 0),
        ("Neighborhood", PROMPTS[1], "NeighborhoodAttention", {"window": [5, 5, 6]}, 0),
        ("Sparse-vDiT", PROMPTS[3], "SparseVDiT", {}, 3),
        ("PARO", PROMPTS[0], "PAROAttention", {}, 3),
        ("Re-ttention", PROMPTS[2], "ReTtention", {"keep": 0.2}, 0),
        ("PAG", PROMPTS[3], "PAG", {"scale": 2.0}, 0),
    )
}


def methods() -> list[str]:
    """Methods that change how clips are drawn: sparse attention first, then guidance."""
    known = steer.methods().items()
    return [name for base in (Sparse, Guidance) for name, method in known if issubclass(method, base)]


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    @in_words
    def video(
        model: str,
        prompt: str,
        seed: float,
        steps: float,
        guidance_scale: float,
        frames: float,
        height: float,
        width: float,
        method: str,
        settings: dict[str, Any],
        saved: str,
        mask_layer: float,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> tuple[str, str, Image.Image | None, str, str, str]:
        """Draw a prompt as a clip without and with a method.

        Returns: both clips and their difference as one, figures, the block mask of a sparse method and what it shows,
        where the method acted, and the code.
        """
        with jobs.running(request, progress) as job, stage.holding(model, "clips", job) as loaded:
            settings = for_small(model, method, settings, saved)
            chosen = forms.steering(stage.sources, model, method, settings, saved)
            number, size = drawing.seed_of(seed), size_of(loaded, frames, height, width)
            layer = layer_of(loaded, chosen, mask_layer)
            with blocks.watching(loaded.model) as seen:
                found = drawing.draw_pair(
                    loaded, chosen, prompt, job, seed=number, steps=steps, guidance_scale=guidance_scale, call=size
                )
            job.step(1, 1, "writing the clip")
            rows, picture, caption = measured(loaded, chosen, found, seen, layer, int(steps))
        name = type(chosen).__name__
        film = beside({"without": found.baseline.frames[0], name: found.steered.frames[0]})
        file = save_bytes_to_cache(as_mp4(film), f"without-and-with-{name}.mp4", clip.GRADIO_CACHE)
        call = {"num_inference_steps": int(steps), "guidance_scale": guidance_scale, **size}
        code = drawing.python(loaded, forms.in_python(model, chosen, settings, saved), prompt, number, call)
        figures = drawing.table({"seed": str(number), **rows})
        return file, figures, picture, caption, found.summary, code

    examples = gr.Row(elem_classes="examples")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            model = forms.model_box(MODELS, stage.sources)
            prompt = gr.Textbox(PROMPTS[0], label="Prompt", lines=2, max_length=drawing.LONGEST_PROMPT)
            with gr.Row():
                seed = gr.Number(0, label="Seed", precision=0, info="-1: a new one", min_width=90)
                steps = gr.Slider(1, 50, STEPS, step=1, label="Steps", min_width=140)
            scale = gr.Slider(1, 15, 3, step=0.5, label="guidance_scale", info="Classifier-free guidance; 1 is off.")
            with gr.Accordion("Size", open=False), gr.Row():
                frames = gr.Number(0, label="Frames", precision=0, info="0: the model's", min_width=90)
                height = gr.Number(0, label="Height", precision=0, info="in pixels", min_width=90)
                width = gr.Number(0, label="Width", precision=0, info="in pixels", min_width=90)
            chosen = forms.chooser(methods(), "RadialAttention")
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                run = gr.Button("Draw the clip", variant="primary", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            clip = gr.Video(
                label="Clips",
                format="mp4",
                autoplay=True,
                loop=True,
                interactive=False,
                buttons=["download"],
                elem_id="video-clip",
            )
            with gr.Row():
                with gr.Column(min_width=300):
                    figures = gr.Markdown(label="Figures", elem_id="video-figures")
                with gr.Column(min_width=300) as of_blocks:
                    mask = gr.Image(
                        label="Block mask",
                        alt_text="which blocks of keys each block of queries saw",
                        format="png",
                        interactive=False,
                        buttons=["download", "fullscreen"],
                        height=360,  # known beforehand: the page does not jump
                        elem_id="video-mask",
                    )
                    caption = gr.Markdown(label="What the mask shows", elem_id="video-mask-caption")
                    layer = gr.Number(
                        0,
                        label="Layer of the mask",
                        precision=0,
                        info="For the next run: counts from 0 through the layers in which the method acts.",
                    )
            with gr.Accordion("Where it acted, and the same in Python", open=False):
                summary = gr.Textbox(label="Where it acted", lines=3, max_lines=12, interactive=False)
                code = gr.Code(label="The same in Python", language="python", interactive=False)
            inputs = [model, prompt, seed, steps, scale, frames, height, width, *chosen.inputs, layer]
            size = ("frames", "height", "width")
            names = ("model", "prompt", "seed", "steps", "guidance_scale", *size, *chosen.names, "mask_layer")
            shared = Shared("video", dict(zip(names, inputs, strict=True)), chosen.start, EXAMPLES)
            outputs = [clip, figures, mask, caption, summary, code]
            connect(shared, video, outputs, jobs, run=run, stop=stop, submit=[prompt], examples=examples)
    chosen.method.change(
        lambda name: gr.Column(visible=is_sparse(name)), chosen.method, of_blocks, api_visibility="private", queue=False
    )
    return shared


def is_sparse(method: str) -> bool:
    """Whether a method of that name has blocks."""
    return issubclass(steer.methods().get(method, Method), Sparse)


def for_small(model: str, method: str, settings: Mapping[str, Any] | None, saved: str | None) -> dict[str, Any]:
    """The settings, with the blocks of an embedded model for methods that would otherwise take those of large ones."""
    given = dict(settings or {})
    found = steer.methods().get(method, Method)
    fits = issubclass(found, Sparse) and not any(field.name == "plan" for field in dataclasses.fields(found))
    if fits and model in BLOCK_SIZES and not (saved or "").strip() and given.get("block_size") in (None, ""):
        given["block_size"] = BLOCK_SIZES[model]
    return given


def size_of(loaded: Loaded, frames: float, height: float, width: float) -> dict[str, int]:
    """The arguments of the pipeline that say the size of a clip: those that are not 0.

    Raises:
        ValueError: a number that is no size, or a clip with more pixels than are drawn here.
    """
    asked = {"num_frames": frames, "height": height, "width": width}
    for name, number in asked.items():
        if not math.isfinite(number or 0) or (number or 0) < 0 or (number or 0) != int(number or 0):
            raise ValueError(f"{name}={number:g} must be a whole number; 0 = the model's own")
    size = {name: int(number) for name, number in asked.items() if number}
    own = models.call_options(loaded.name)
    most = TIMES_LARGER * math.prod(own[name] for name in asked) if own else LARGEST
    pixels = math.prod({"num_frames": 1, "height": 1, "width": 1, **own, **size}[name] for name in asked)
    if pixels > most:
        raise ValueError(f"a clip of {pixels:,} pixels, all frames counted, is too large here: at most {most:,}")
    return size


def layer_of(loaded: Loaded, method: Method, layer: float) -> int:
    """The number of a layer, if the method acts in so many.

    Raises:
        ValueError: it does not.
    """
    if not isinstance(method, Sparse):
        return 0
    with steer.apply(loaded.model, method) as handle:
        sites = len(handle.sites)
    number = layer or 0
    if sites and (number != int(number) or not 0 <= number < sites):
        raise ValueError(
            f"mask_layer={number:g} does not exist: {type(method).__name__} acts in {sites} layers here, give 0 to "
            f"{sites - 1}"
        )
    return int(number)


def measured(
    loaded: Loaded, method: Method, found: Comparison, seen: blocks.Seen, layer: int, steps: int
) -> tuple[dict[str, str], Image.Image | None, str]:
    """Figures as rows of a table; the picture of the mask at a layer, None where there is none; and what it shows."""
    name, speedup = type(method).__name__, found.baseline_seconds / found.steered_seconds
    made = drawing.figures(found, method)
    rows = {
        "without": made["without"],
        "with it": f"{found.steered_seconds:.2f} s: speed-up {speedup:.2f}",
        "difference": made["difference"],
    }
    binding = next((each for each in seen.bindings if each.active), None)
    if not isinstance(method, Sparse) or binding is None:
        why = "was on in none of these steps" if isinstance(method, Sparse) else "computes all of the attention"
        return rows, None, f"{name} {why}, so there is no block mask."
    there = blocks.blocks(binding, layer)
    if there.density is not None and found.density is not None:
        rows["density"] = (
            f"{100 * there.density:.1f} % of the attention map while it was on, {100 * found.density:.1f} % of it in "
            "the whole run"
        )
        most = blocks.bound(loaded.model, seen, binding, there.density, steps)
        if most is not None:
            rows["at best"] = (
                f"speed-up {most.speedup:.2f}, as this attention is {100 * most.share:.0f} % of the multiplications of "
                "a dense step"
            )
    if not there.heads:
        there = blocks.chosen_again(loaded.model, seen, binding, layer) or there
    return rows, there.picture(), there.caption()


def beside(clips: Mapping[str, Sequence[Image.Image]]) -> list[Image.Image]:
    """Two clips and how far they are apart, side by side, each above its name.

    The difference is made as bright as it can be, with one factor for all frames; black is where they are equal.
    """
    (one, first), (other, second) = clips.items()
    apart = [np.abs(np.asarray(a, np.int16) - np.asarray(b, np.int16)) for a, b in zip(first, second, strict=True)]
    most = max(1, *(int(frame.max()) for frame in apart))
    third = [Image.fromarray((frame * 255.0 / most).astype(np.uint8)) for frame in apart]
    columns = {one: first, f"with {other}": second, "difference": third}
    width, height = drawing.enlarged(first[0]).size
    # an even number of pixels either way: what the colours of the codec need
    blank = Image.new("RGB", ((3 * width + 2 * GAP + 1) // 2 * 2, (height + FOOT + 1) // 2 * 2), "white")
    draw = ImageDraw.Draw(blank)
    for column, name in enumerate(columns):
        font = ImageFont.load_default(20)
        if draw.textlength(name, font) > width:
            font = ImageFont.load_default(20 * width / draw.textlength(name, font))
        draw.text((column * (width + GAP) + width / 2, height + FOOT / 2), name, "black", font, anchor="mm")
    film = []
    for frames in zip(*columns.values(), strict=True):
        sheet = blank.copy()
        for column, frame in enumerate(frames):
            sheet.paste(drawing.enlarged(frame.convert("RGB")), (column * (width + GAP), 0))
        film.append(sheet)
    return film


def as_mp4(film: Sequence[Image.Image]) -> bytes:
    """Frames as a clip that browsers play."""
    rate = FAST if len(film) >= LONG else SLOW
    frames = np.stack([np.asarray(frame) for frame in film])
    return imageio.imwrite(
        "<bytes>", frames, extension=".mp4", plugin="FFMPEG", fps=rate, codec="libx264", quality=8, macro_block_size=2
    )
