"""Measures a text-to-image model on fixed prompts and seeds: `steer eval pictures emoji-unet`."""

import json
import platform
import random
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor
from tqdm import tqdm

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.emoji import BACKGROUNDS, STYLES, caption, concepts
from steer_demos.intervals import FIRST_SEED, frechet_interval, print_results, share
from steer_demos.judge import Judge, Verdict

PROMPTS = 200
SHARES = {
    "right concept": ("accuracy", "accuracy_interval"),
    "right style": ("style_accuracy", "style_interval"),
    "right background": ("background_accuracy", "background_interval"),
}


@dataclass(frozen=True)
class Prompt:
    """One caption and what it asks for; None where it does not say."""

    text: str
    concept: str
    style: str | None
    background: str | None


def evaluation_prompts(count: int = PROMPTS) -> list[Prompt]:
    """The fixed prompts: every concept before any comes again; style and background are named or left open."""
    chance = random.Random(2024)
    prompts: list[Prompt] = []
    while len(prompts) < count:
        for concept in chance.sample(list(concepts()), len(concepts())):
            style, background = chance.choice([None, *STYLES]), chance.choice([None, *BACKGROUNDS])
            prompts.append(Prompt(caption(concept, style, background, article=True), concept, style, background))
    return prompts[:count]


@dataclass(frozen=True)
class Evaluation:
    """Shares are of all prompts that ask for the thing; every interval is a 95 % bootstrap interval over prompts.

    Args:
        prompts: how many pictures were judged.
        accuracy: share whose nearest render is of the right concept.
        style_accuracy: the same for the style, of the prompts that name one.
        background_accuracy: the same for the colour of the rim, of the prompts that name one.
        frechet: Frechet distance between the features of these pictures and of all renders.
        seconds: wall time of generating them; 0 for controls.
    """

    prompts: int
    accuracy: float
    accuracy_interval: tuple[float, float]
    style_accuracy: float
    style_interval: tuple[float, float]
    background_accuracy: float
    background_interval: tuple[float, float]
    frechet: float
    frechet_interval: tuple[float, float]
    seconds: float


def assess(judge: Judge, verdict: Verdict, prompts: Sequence[Prompt], seconds: float = 0.0) -> Evaluation:
    """Turn the verdicts on pictures of `prompts` into shares with intervals."""

    def right(found: Tensor, names: Sequence[str], asked: Sequence[str | None]) -> np.ndarray:
        pairs = zip(found.tolist(), asked, strict=True)
        return np.array([names[index] == name for index, name in pairs if name is not None], dtype=float)

    accuracy, accuracy_interval = share(right(verdict.concepts, list(concepts()), [p.concept for p in prompts]))
    style, style_interval = share(right(verdict.styles, list(STYLES), [p.style for p in prompts]))
    background, background_interval = share(
        right(verdict.backgrounds, list(BACKGROUNDS), [p.background for p in prompts])
    )
    features, reference = verdict.features.double().numpy(), judge.reference.double().numpy()
    frechet, interval = frechet_interval(features[:, None], reference)
    return Evaluation(
        prompts=len(prompts),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        style_accuracy=style,
        style_interval=style_interval,
        background_accuracy=background,
        background_interval=background_interval,
        frechet=frechet,
        frechet_interval=interval,
        seconds=seconds,
    )


def prompt_options(pipe: DiffusionPipeline) -> dict[str, Any]:
    """What the call needs so that an SD3 pipeline without a T5 encoder does not append 256 zero tokens.

    They take four times the work, and emoji-mmdit is trained for both.
    """
    return {"max_sequence_length": 0} if getattr(pipe, "text_encoder_3", True) is None else {}


def generate_pictures(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 40,
    label: str = "generating",
    **call: Any,
) -> Tensor:
    """Pictures (N, 3, 64, 64) in [-1, 1], picture i drawn from `seeds[i]` alone; `call` goes to the pipeline."""
    call = prompt_options(pipe) | call
    pictures: list[Tensor] = []
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts), desc=label, unit="picture") as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            generators = [torch.Generator().manual_seed(seed) for seed in seeds[part]]
            drawn = pipe(
                prompt=list(prompts[part]),
                generator=generators,
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="pt",
                **call,
            ).images
            pictures.append(drawn.float().cpu() * 2 - 1)
            bar.update(len(drawn))
    pipe.set_progress_bar_config(disable=False)
    return torch.cat(pictures)


def evaluate(
    pipe: DiffusionPipeline, prompts: Sequence[Prompt], seeds: Sequence[int], judge: Judge, **call: Any
) -> tuple[Evaluation, Tensor]:
    """Generate with `pipe`, steered or not, and judge; `call` as in `generate_pictures`.

    Returns:
        The evaluation and the pictures (N, 3, 64, 64) in [-1, 1].
    """
    started = time.monotonic()
    pictures = generate_pictures(pipe, [prompt.text for prompt in prompts], seeds, **call)
    seconds = time.monotonic() - started
    return assess(judge, judge.judge(pictures), prompts, seconds), pictures


def sweep(
    pipe: DiffusionPipeline,
    configurations: Mapping[str, Sequence[Method]],
    prompts: Sequence[Prompt],
    seeds: Sequence[int],
    judge: Judge,
    **call: Any,
) -> dict[str, tuple[Evaluation, Tensor]]:
    """Evaluate named lists of steer methods over the same prompts and seeds; an empty list is the bare pipeline."""
    results = {}
    for name, methods in configurations.items():
        with steer.apply(pipe, *methods) if methods else nullcontext():
            results[name] = evaluate(pipe, prompts, seeds, judge, label=name, **call)
    return results


def pag_configurations(layers: str | None) -> dict[str, list[Method]]:
    """The bare pipeline, PAG at three scales and SoftPAG at three scales."""
    configurations: dict[str, list[Method]] = {"baseline": []}
    for scale in (1.0, 2.0, 4.0):
        configurations[f"PAG scale {scale:g}"] = [steer.PAG(scale=scale, layers=layers)]
    for scale in (1.0, 2.0, 4.0):
        soft = steer.PAG(scale=scale, layers=layers, mode="all", strength=0.5)
        configurations[f"SoftPAG 0.5 scale {scale:g}"] = [soft]
    return configurations


def controls(judge: Judge, prompts: Sequence[Prompt]) -> dict[str, Evaluation]:
    """What the judge says of real pictures: the asked ones on other colours (upper bound), and shuffled (chance)."""
    generator = torch.Generator().manual_seed(7)
    concept = torch.tensor([list(concepts()).index(prompt.concept) for prompt in prompts])
    style = torch.tensor(
        [
            list(STYLES).index(prompt.style) if prompt.style else int(torch.randint(3, (), generator=generator))
            for prompt in prompts
        ]
    )
    real = judge.render(concept, style, torch.rand(len(prompts), 3, generator=generator) * 2 - 1)
    verdict = judge.judge(real)
    order = torch.randperm(len(prompts), generator=generator)
    shuffled = Verdict(verdict.concepts[order], verdict.styles[order], verdict.backgrounds[order], verdict.features)
    return {
        "real renders, other colours": assess(judge, verdict, prompts),
        "real renders, shuffled": assess(judge, shuffled, prompts),
    }


def contact_sheet(pictures: Tensor, prompts: Sequence[Prompt], verdict: Verdict, columns: int = 20) -> Image.Image:
    """All pictures (N, 3, 64, 64) with their prompts; a red frame marks a wrong concept and names what was seen."""
    cell, text = 80, 24
    rows = -(-len(prompts) // columns)
    sheet = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(9)
    names = list(concepts())
    for index, (picture, prompt) in enumerate(zip(pictures, prompts, strict=True)):
        left, top = index % columns * cell, index // columns * (cell + text)
        pixels = ((picture.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
        seen = names[int(verdict.concepts[index])]
        if seen != prompt.concept:
            draw.rectangle([left + 4, top + 4, left + 75, top + 75], fill="red")
            draw.text((left + 6, top + 88), f"seen: {seen}", "red", font)
        sheet.paste(Image.fromarray(pixels), (left + 8, top + 8))
        draw.text((left + 6, top + 77), prompt.concept, "black", font)
    return sheet


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded model or pipeline folder.")] = "emoji-mmdit",
    prompts: Annotated[int, typer.Option(help="How many of the fixed prompts.", min=2)] = PROMPTS,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 3.0,
    compare: Annotated[bool, typer.Option(help="Compare the bare model with PAG and SoftPAG.")] = False,
    layers: Annotated[str | None, typer.Option(help="Layers for --compare; default: the method's own.")] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("evaluation.json"),
    sheet: Annotated[Path | None, typer.Option(help="PNG contact sheet of the bare model to write.")] = None,
) -> None:
    """Judge a model on fixed prompts: right concept, style and background, and Frechet distance."""
    chosen = evaluation_prompts(prompts)
    seeds = [FIRST_SEED + index for index in range(prompts)]
    pipe, judge = models.load_pipeline(model, clips=False), Judge.load()
    configurations = pag_configurations(layers or models.guided_layers(model)) if compare else {"baseline": []}
    call = {"steps": steps, "guidance_scale": guidance_scale}
    outcome = sweep(pipe, configurations, chosen, seeds, judge, **call)
    results = {name: evaluation for name, (evaluation, _) in outcome.items()}
    checks = controls(judge, chosen)
    print_results(results | checks, SHARES, prompts)
    report = {
        "model": model,
        **asdict(results["baseline"]),
        "settings": {**call, **prompt_options(pipe), "first_seed": FIRST_SEED},
        "measured_on": f"{pipe.device.type}, {platform.machine()}, torch {torch.__version__}",
        "configurations": {name: asdict(result) for name, result in results.items()},
        "controls": {name: asdict(result) for name, result in checks.items()},
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}")
    if sheet is not None:
        pictures = outcome["baseline"][1]
        sheet.parent.mkdir(parents=True, exist_ok=True)
        drawn = contact_sheet(pictures, chosen, judge.judge(pictures))
        drawn.quantize(256, dither=Image.Dither.NONE).save(sheet, optimize=True)  # a third of the size, and looks alike
        print(f"wrote {sheet}")


if __name__ == "__main__":
    typer.run(evaluate_command)
