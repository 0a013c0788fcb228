"""Draws each prompt without steering, with PAG and with SoftPAG, side by side: `steer generate "a red apple"`."""

import time
from contextlib import nullcontext
from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.evaluate import prompt_options

DEFAULT_PROMPTS = [
    "a red apple on a blue background",
    "a cat face on a white background, noto style",
    "a tree on a yellow background",
    "a car on a pink background, twemoji style",
    "a rocket on a gray background, fluent style",
    "a robot on a green background",
]
CELL, GAP, TITLE, LABEL = 192, 8, 28, 18


def draw_column(
    pipe: DiffusionPipeline, method: Method | None, prompts: list[str], steps: int, guidance_scale: float, seed: int
) -> list[Image.Image]:
    """One picture per prompt, prompt i from `seed + i`, with `method` applied for the time of the call."""
    generators = [torch.Generator().manual_seed(seed + index) for index in range(len(prompts))]
    with steer.apply(pipe, method) if method else nullcontext():
        return pipe(
            prompt=prompts,
            num_inference_steps=steps,
            guidance_scale=guidance_scale,
            generator=generators,
            **prompt_options(pipe),
        ).images


def labelled_grid(columns: dict[str, list[Image.Image]], prompts: list[str]) -> Image.Image:
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


def generate(
    prompts: Annotated[list[str] | None, typer.Argument(help="What to draw; default: six examples.")] = None,
    model: Annotated[str, typer.Option(help="Embedded model, pipeline folder or hub id.")] = "emoji-mmdit",
    scale: Annotated[float, typer.Option(help="Scale of PAG and SoftPAG.")] = 2.0,
    strength: Annotated[float, typer.Option(help="Strength of SoftPAG, 0 to 1.")] = 0.5,
    layers: Annotated[str | None, typer.Option(help="Layers to perturb; default: the model's or the method's.")] = None,
    baseline_only: Annotated[bool, typer.Option("--baseline-only", help="Draw without steering only.")] = False,
    steps: Annotated[int, typer.Option(help="Sampling steps.")] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 3.0,
    seed: Annotated[int, typer.Option(help="Seed of the first picture; the next prompt takes the next seed.")] = 0,
    output: Annotated[Path, typer.Option(help="PNG to write.")] = Path("steer-generate.png"),
) -> None:
    """Draw prompts without steering, with PAG and with SoftPAG, as one picture."""
    prompts = prompts or DEFAULT_PROMPTS
    pipe = models.load(model)
    layers = layers or models.guided_layers(model)
    methods: dict[str, Method | None] = {"baseline": None}
    if not baseline_only:
        methods[f"PAG {scale:g}"] = steer.PAG(scale=scale, layers=layers)
        methods[f"SoftPAG {scale:g}"] = steer.PAG(scale=scale, layers=layers, mode="all", strength=strength)
    for method in methods.values():
        if method is not None:
            steer.apply(pipe, method).remove()  # a wrong layer is told now, not after the first column
    columns = {}
    pipe.set_progress_bar_config(desc="warm-up")
    draw_column(pipe, None, prompts, 1, guidance_scale, seed)  # so that the first column is not charged with it
    for title, method in methods.items():
        started = time.monotonic()
        pipe.set_progress_bar_config(desc=title)
        columns[title] = draw_column(pipe, method, prompts, steps, guidance_scale, seed)
        print(f"{title}: {time.monotonic() - started:.1f} s for {len(prompts)} pictures on {pipe.device.type}")
    output.parent.mkdir(parents=True, exist_ok=True)
    labelled_grid(columns, prompts).save(output)
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(generate)
