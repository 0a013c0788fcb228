"""Draws each prompt without steering, with PAG and with SoftPAG, side by side: `steer generate "a red apple"`."""

import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.evaluate_pictures import prompt_options

PICTURE_PROMPTS = [
    "a red apple on a blue background",
    "a cat face on a white background, noto style",
    "a tree on a yellow background",
    "a car on a pink background, twemoji style",
    "a rocket on a gray background, fluent style",
    "a robot on a green background",
]
CLIP_PROMPTS = [
    "a fox moving left on a blue background",
    "a rocket moving up on a gray background",
    "a red apple growing on a white background",
    "a robot spinning on a green background",
]
CELL, GAP, TITLE, LABEL = 192, 8, 28, 18
MILLISECONDS = 90  # a frame


def draw_column(
    pipe: DiffusionPipeline,
    method: Method | None,
    prompts: Sequence[str],
    steps: int,
    guidance_scale: float,
    seed: int,
    options: Mapping[str, Any] | None = None,
) -> list[list[Image.Image]]:
    """The frames of one picture (a single one) or clip per prompt, with `method` applied for the time of the call.

    Prompt i is drawn from `seed + i`; `options` go to the pipeline.
    """
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    with steer.apply(pipe, method) if method else nullcontext():
        drawn = pipe(
            prompt=list(prompts),
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            output_type="pil",
            **prompt_options(pipe) | dict(options or {}),
        )
    return drawn.frames if "frames" in drawn else [[picture] for picture in drawn.images]


def labelled_grid(columns: Mapping[str, Sequence[Image.Image]], prompts: Sequence[str]) -> Image.Image:
    """Titled columns of pictures, one row per prompt with the prompt above it."""
    width, height = GAP + len(columns) * (CELL + GAP), TITLE + len(prompts) * (CELL + LABEL + GAP)
    grid = Image.new("RGB", (width, height), "white")
    draw, large, small = ImageDraw.Draw(grid), ImageFont.load_default(15), ImageFont.load_default(12)
    for row, prompt in enumerate(prompts):
        draw.text((GAP, TITLE + row * (CELL + LABEL + GAP)), prompt, "black", small)
    for column, (title, pictures) in enumerate(columns.items()):
        left = GAP + column * (CELL + GAP)
        draw.text((left, 6), title, "black", large)
        for row, picture in enumerate(pictures):
            top = TITLE + row * (CELL + LABEL + GAP) + LABEL
            grid.paste(picture.convert("RGB").resize((CELL, CELL), Image.Resampling.LANCZOS), (left, top))
    return grid


def save_grids(grids: Sequence[Image.Image], output: Path) -> None:
    """Write one picture, or the frames of an animation that repeats."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if len(grids) == 1:
        grids[0].save(output)
    else:
        grids[0].save(output, save_all=True, append_images=grids[1:], duration=MILLISECONDS, loop=0)


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; default: some examples.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model, pipeline folder or hub id.")] = "emoji-mmdit",
    scale: Annotated[float, typer.Option(help="Scale of PAG and SoftPAG.")] = 2.0,
    strength: Annotated[float, typer.Option(help="Strength of SoftPAG, 0 to 1.")] = 0.5,
    layers: Annotated[str | None, typer.Option(help="Layers to perturb; default: the model's or the method's.")] = None,
    artifact: Annotated[
        list[str] | None, typer.Option(help="Instead with a saved method: its folder or hub id; may be repeated.")
    ] = None,
    baseline_only: Annotated[bool, typer.Option("--baseline-only", help="Draw without steering only.")] = False,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next prompt takes the next seed.")] = 0,
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of a clip; default: the model's.")] = None,
    output: Annotated[Path | None, typer.Option(help="Default: steer-generate.png, .gif for clips.")] = None,
) -> None:
    """Draw prompts without steering beside PAG and SoftPAG, or beside saved methods, as one picture or animation."""
    pipe = models.load_pipeline(model)
    clips = models.draws_clips(pipe)
    prompts = prompts or (CLIP_PROMPTS if clips else PICTURE_PROMPTS)
    output = output or Path("steer-generate").with_suffix(".gif" if clips else ".png")
    if clips and output.suffix.lower() not in (".gif", ".webp"):
        raise ValueError(f"{model} makes clips, which {output.name} cannot hold: give --output a .gif or .webp")
    if frames is not None and not clips:
        raise ValueError(f"{model} makes pictures, not clips: leave out --frames")
    given = {"height": height, "width": width, "num_frames": frames}
    options = models.call_options(model) | {name: value for name, value in given.items() if value is not None}
    layers = layers or models.guided_layers(model)
    methods: dict[str, Method | None] = {"baseline": None}
    if artifact:
        methods |= {source.rstrip("/").rpartition("/")[2]: steer.load(source) for source in artifact}
    elif not baseline_only:
        methods[f"PAG {scale:g}"] = steer.PAG(scale=scale, layers=layers)
        methods[f"SoftPAG {scale:g}"] = steer.PAG(scale=scale, layers=layers, mode="all", strength=strength)
    for method in methods.values():
        if method is not None:
            steer.apply(pipe, method).remove()  # a wrong layer is told now, not after the first column
    columns = {}
    pipe.set_progress_bar_config(desc="warm-up")
    draw_column(pipe, None, prompts, 1, guidance_scale, seed, options)  # the first column is not charged with it
    for title, method in methods.items():
        started = time.monotonic()
        pipe.set_progress_bar_config(desc=title)
        columns[title] = draw_column(pipe, method, prompts, steps, guidance_scale, seed, options)
        kind = "clips" if clips else "pictures"
        print(f"{title}: {time.monotonic() - started:.1f} s for {len(prompts)} {kind} on {pipe.device.type}")
    grids = [
        labelled_grid({title: [drawn[frame] for drawn in column] for title, column in columns.items()}, prompts)
        for frame in range(len(columns["baseline"][0]))
    ]
    save_grids(grids, output)
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(generate)
