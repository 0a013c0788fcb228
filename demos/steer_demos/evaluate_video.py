"""Measures a text-to-video model on fixed prompts and seeds: `steer eval video emoji-wan`."""

import json
import platform
import random
import time
from collections.abc import Sequence
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

from steer_demos import models
from steer_demos.clips import (
    ANIMATED_SHARE,
    ANIMATIONS,
    CONCEPTS,
    FRAMES,
    MOTIONS,
    Clips,
    clip_caption,
    make_clips,
)
from steer_demos.emoji import BACKGROUNDS, IMAGE_SIZE
from steer_demos.intervals import FIRST_SEED, Interval, frechet_interval, print_results, share
from steer_demos.motion import ClipJudge, ClipVerdict, Motion

PROMPTS = 200
SHARES = {
    "right motion": ("motion_accuracy", "motion_interval"),
    "right subject": ("accuracy", "accuracy_interval"),
    "right background": ("background_accuracy", "background_interval"),
}
SUBJECTS = (*CONCEPTS, *ANIMATIONS)
FRECHET_STRIDE = 4  # successive frames are too alike to count each
SHEET_CLIPS = 32
FRAME_MILLISECONDS = 120


@dataclass(frozen=True)
class ClipPrompt:
    """One caption and what it asks for; an animation has no motion, and a background may be left open."""

    text: str
    subject: str
    motion: str | None
    background: str | None


def evaluation_prompts(count: int = PROMPTS) -> list[ClipPrompt]:
    """The fixed prompts: one in five asks for an animation, the others for every motion equally often."""
    chance = random.Random(2025)
    every = round(1 / ANIMATED_SHARE)

    def deck(items: Sequence[str]) -> list[str]:
        return [item for _ in range(count // len(items) + 1) for item in chance.sample(list(items), len(items))]

    concepts, motions, animated = deck(CONCEPTS), deck(MOTIONS), deck(list(ANIMATIONS))
    prompts = []
    for index in range(count):
        is_animated = index % every == every - 1
        subject, motion = (animated.pop(0), None) if is_animated else (concepts.pop(0), motions.pop(0))
        background = chance.choice([None, *BACKGROUNDS])
        prompts.append(ClipPrompt(clip_caption(subject, motion, background), subject, motion, background))
    return prompts


@dataclass(frozen=True)
class VideoEvaluation:
    """Shares are of the prompts that ask for the thing; every interval is a 95 % bootstrap interval over prompts.

    Args:
        prompts: how many clips were judged.
        accuracy: share of frames in which the right subject is seen.
        motion_accuracy: share of clips with the right one of eight motions, of the prompts that name one.
        motions: the same for each motion.
        background_accuracy: share of clips with the right colour of the rim, of the prompts that name one.
        frechet: Frechet distance between the features of these frames and of real frames for the same prompts.
        seconds: wall time of generating them; 0 for controls.
    """

    prompts: int
    accuracy: float
    accuracy_interval: Interval
    motion_accuracy: float
    motion_interval: Interval
    motions: dict[str, float]
    background_accuracy: float
    background_interval: Interval
    frechet: float
    frechet_interval: Interval
    seconds: float


def assess(
    verdict: ClipVerdict, prompts: Sequence[ClipPrompt], reference: Tensor, seconds: float = 0.0
) -> VideoEvaluation:
    """Turn the verdicts on clips of `prompts` into shares with intervals; `reference`: real features (M, T, 48)."""
    asked = torch.tensor([SUBJECTS.index(prompt.subject) for prompt in prompts])
    subject_right = (verdict.subjects == asked[:, None]).float().mean(dim=1).numpy()
    motion_right = {
        index: MOTIONS[int(verdict.motion.verdict[index])] == prompt.motion
        for index, prompt in enumerate(prompts)
        if prompt.motion
    }
    colours = list(BACKGROUNDS)
    background_right = [
        colours[int(found)] == prompt.background
        for found, prompt in zip(verdict.backgrounds, prompts, strict=True)
        if prompt.background
    ]
    by_motion = {}
    for name in MOTIONS:
        right = [right for index, right in motion_right.items() if prompts[index].motion == name]
        by_motion[name] = sum(right) / max(len(right), 1)
    accuracy, accuracy_interval = share(subject_right)
    motion, motion_interval = share(np.array(list(motion_right.values()), dtype=float))
    background, background_interval = share(np.array(background_right, dtype=float))

    features = verdict.features[:, ::FRECHET_STRIDE].double().numpy()
    real = reference[:, ::FRECHET_STRIDE].flatten(0, 1).double().numpy()
    frechet, interval = frechet_interval(features, real)
    return VideoEvaluation(
        prompts=len(prompts),
        accuracy=accuracy,
        accuracy_interval=accuracy_interval,
        motion_accuracy=motion,
        motion_interval=motion_interval,
        motions=by_motion,
        background_accuracy=background,
        background_interval=background_interval,
        frechet=frechet,
        frechet_interval=interval,
        seconds=seconds,
    )


def real_clips(prompts: Sequence[ClipPrompt], seed: int) -> Clips:
    """Clips of the data set for the prompts; poses, and backgrounds left open, are drawn at random."""
    generator = torch.Generator().manual_seed(seed)
    colours = torch.randint(len(BACKGROUNDS), (len(prompts),), generator=generator)
    for index, prompt in enumerate(prompts):
        if prompt.background:
            colours[index] = list(BACKGROUNDS).index(prompt.background)
    subjects = torch.tensor([SUBJECTS.index(prompt.subject) for prompt in prompts])
    motions = torch.tensor([MOTIONS.index(prompt.motion) if prompt.motion else len(MOTIONS) for prompt in prompts])
    return make_clips(subjects, motions, colours, generator)


def generate_clips(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    seeds: Sequence[int],
    *,
    steps: int = 20,
    guidance_scale: float = 3.0,
    batch_size: int = 8,
    label: str = "generating",
    **call: Any,
) -> Tensor:
    """Clips (N, 17, 3, 64, 64) in [-1, 1], clip i drawn from `seeds[i]` alone.

    Args:
        call: passed on to the pipeline. `max_sequence_length=16` is enough for every caption of emoji-wan, and quick.
    """
    clips: list[Tensor] = []
    pipe.set_progress_bar_config(disable=True)
    with tqdm(total=len(prompts), desc=label, unit="clip") as bar:
        for start in range(0, len(prompts), batch_size):
            part = slice(start, start + batch_size)
            drawn = pipe(
                prompt=list(prompts[part]),
                height=IMAGE_SIZE,
                width=IMAGE_SIZE,
                num_frames=FRAMES,
                generator=[torch.Generator().manual_seed(seed) for seed in seeds[part]],
                num_inference_steps=steps,
                guidance_scale=guidance_scale,
                output_type="pt",
                **call,
            ).frames
            clips.append(drawn.float().cpu() * 2 - 1)
            bar.update(len(drawn))
    pipe.set_progress_bar_config(disable=False)
    return torch.cat(clips)


def evaluate(
    pipe: DiffusionPipeline,
    prompts: Sequence[ClipPrompt],
    seeds: Sequence[int],
    judge: ClipJudge,
    reference: Tensor,
    **call: Any,
) -> tuple[VideoEvaluation, Tensor]:
    """Generate with `pipe`, steered or not, and judge; `reference` as in `assess`, `call` as in `generate_clips`.

    Returns:
        The evaluation and the clips (N, 17, 3, 64, 64) in [-1, 1].
    """
    started = time.monotonic()
    clips = generate_clips(pipe, [prompt.text for prompt in prompts], seeds, **call)
    seconds = time.monotonic() - started
    return assess(judge.judge(clips), prompts, reference, seconds), clips


def controls(judge: ClipJudge, prompts: Sequence[ClipPrompt], reference: Tensor) -> dict[str, VideoEvaluation]:
    """What the judge says of real clips: of the same prompts (upper bound), and with the prompts shuffled (chance)."""
    verdict = judge.judge(real_clips(prompts, seed=7).frames)
    order = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(7))
    motion = verdict.motion
    shuffled = ClipVerdict(
        verdict.subjects[order],
        verdict.backgrounds[order],
        Motion(motion.travel[order], motion.growth[order], motion.turn[order], motion.verdict[order]),
        verdict.features[order],
    )
    return {
        "real clips": assess(verdict, prompts, reference),
        "real clips, shuffled": assess(shuffled, prompts, reference),
    }


def contact_sheet(clips: Tensor, prompts: Sequence[ClipPrompt], verdict: ClipVerdict, path: Path) -> None:
    """Write clips (N, T, 3, 64, 64) as one GIF; a red frame marks what is not as asked and names what was seen."""
    columns, cell, text = 8, 84, 34
    rows = -(-len(prompts) // columns)
    font = ImageFont.load_default(9)
    blank = Image.new("RGB", (columns * cell, rows * (cell + text)), "white")
    draw = ImageDraw.Draw(blank)
    places = []
    for index, prompt in enumerate(prompts):
        left, top = index % columns * cell, index // columns * (cell + text)
        places.append((left + 10, top + 10))
        subject = SUBJECTS[int(verdict.subjects[index].mode().values)]
        motion = MOTIONS[int(verdict.motion.verdict[index])]
        wrong = [subject] if subject != prompt.subject else []
        wrong += [motion] if prompt.motion and motion != prompt.motion else []
        if wrong:
            draw.rectangle([left + 6, top + 6, left + 77, top + 77], fill="red")
            draw.text((left + 6, top + 102), f"seen: {wrong[0]}", "red", font)
        draw.text((left + 6, top + 79), prompt.subject, "black", font)
        draw.text((left + 6, top + 90), prompt.motion or "animated", "black", font)
    frames = []
    for time_index in range(clips.shape[1]):
        sheet = blank.copy()
        for clip, place in zip(clips[:, time_index], places, strict=True):
            pixels = ((clip.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
            sheet.paste(Image.fromarray(pixels), place)
        frames.append(sheet)
    save_animation(frames, path)


def save_animation(frames: Sequence[Image.Image], path: Path) -> None:
    """Write frames as a GIF that repeats.

    One palette for all frames, undithered: otherwise plain backgrounds flicker, and the file doubles. The octree keeps
    the colours of small things, which the median cut would give to the white of the sheet.
    """
    palette = frames[len(frames) // 2].quantize(256, Image.Quantize.FASTOCTREE)
    indexed = [frame.quantize(palette=palette, dither=Image.Dither.NONE) for frame in frames]
    path.parent.mkdir(parents=True, exist_ok=True)
    indexed[0].save(path, save_all=True, append_images=indexed[1:], duration=FRAME_MILLISECONDS, loop=0, optimize=True)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded model or pipeline folder.")] = "emoji-wan",
    prompts: Annotated[int, typer.Option(help="How many of the fixed prompts.", min=2)] = PROMPTS,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 3.0,
    max_sequence_length: Annotated[int, typer.Option(help="Tokens that the text is padded to.")] = 16,
    first_seed: Annotated[
        int, typer.Option(help="Seed of the first clip; choose settings on other seeds.")
    ] = FIRST_SEED,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("evaluation.json"),
    sheet: Annotated[Path | None, typer.Option(help="GIF of the first clips to write.")] = None,
) -> None:
    """Judge a text-to-video model on fixed prompts: right motion, subject and background, and Frechet distance."""
    chosen = evaluation_prompts(prompts)
    seeds = [first_seed + index for index in range(prompts)]
    pipe, judge = models.load_pipeline(model, clips=True), ClipJudge.load()
    reference = judge.judge(real_clips(chosen, seed=8).frames).features
    checks = controls(judge, chosen, reference)
    call = {"steps": steps, "guidance_scale": guidance_scale, "max_sequence_length": max_sequence_length}
    result, clips = evaluate(pipe, chosen, seeds, judge, reference, **call)
    print_results({"generated": result, **checks}, SHARES, prompts)
    report = {
        "model": Path(model).name,
        **asdict(result),
        "settings": {**call, "first_seed": first_seed},
        "measured_on": f"{pipe.device.type}, {platform.machine()}, torch {torch.__version__}",
        "controls": {name: asdict(check) for name, check in checks.items()},
    }
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}")
    if sheet is not None:
        shown = slice(SHEET_CLIPS)
        contact_sheet(clips[shown], chosen[shown], judge.judge(clips[shown]), sheet)
        print(f"wrote {sheet}")


if __name__ == "__main__":
    typer.run(evaluate_command)
