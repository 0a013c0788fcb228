"""Judges a vision-language model, and methods on it, on drawn scenes: `steer eval vlm emoji-vlm`."""

from __future__ import annotations

import importlib.util
import json
import platform
import re
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import steer
from steer.artifact import installed
from steer.opening import assignments
from steer_demos import models, vlm_methods, vlm_pointing
from steer_demos.evaluate_llm import to_text
from steer_demos.scenes import CANVAS, EVALUATION_SEED, Scene
from steer_demos.vlm_measures import (
    Asked,
    ask,
    assess,
    balanced_accuracy,
    blanked,
    control,
    evaluation_questions,
    evaluation_scenes,
    with_noise,
)
from steer_demos.vlm_methods import BASELINE, Configurations, Sitting

SCENES = 100
SHEET_SCENES = 20
SHEET_QUESTIONS = 8  # as many as `_for_sheet` chooses
SUITES = ("scenes", "methods", "pointing")

# The standard deviation of the pixel noise, of values from 0 to 255, that leaves room above and below: on clean scenes
# nearly every answer is right. On 48 scenes of DEVELOPMENT_SEED the balanced accuracy of the unsteered emoji-vlm is
# 91.8 % with 90, 87.6 % with 100, 84.9 % with 105 and 81.9 % with 110; 80 to 85 % were wanted, with the least noise.
NOISE = 105.0


def contact_sheet(
    scenes: Sequence[Scene], answers: Sequence[Asked], pictures: Sequence[np.ndarray] | None = None, columns: int = 3
) -> Image.Image:
    """Scenes with some of their questions and what was said; red where it was wrong, with the right answer.

    Args:
        pictures: (96, 96, 3) uint8, what the model was shown; None = the scenes' own.
    """
    picture, width, line = 2 * CANVAS, 640, 15
    height = max(picture, (SHEET_QUESTIONS + 4) * line) + 16
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, scene in enumerate(scenes):
        left, top = index % columns * width + 8, index // columns * height + 8
        shown = Image.fromarray(scene.pixels if pictures is None else pictures[index])
        sheet.paste(shown.resize((picture, picture), Image.Resampling.NEAREST), (left, top))
        left += picture + 8
        for answer in _for_sheet([answer for answer in answers if answer.scene == index]):
            colour = "black" if answer.right else "red"
            text = f"{answer.question.text} {answer.said.strip()}"
            if not answer.right:
                text += f" ({answer.question.answer})"
            for part in _wrapped(text, draw, font, width - picture - 24):
                draw.text((left, top), part, colour, font)
                top += line
    return sheet.quantize(128)


def _for_sheet(answers: Sequence[Asked]) -> list[Asked]:
    # Two present things, two absent ones that are hard, and one question of each other kind.
    present = [answer for answer in answers if answer.question.answer == "Yes"][:2]
    absent = [answer for answer in answers if answer.question.split == "adversarial"][:2]
    return [*present, *absent, *(answer for answer in answers if answer.question.kind != "presence")]


def _wrapped(
    text: str, draw: ImageDraw.ImageDraw, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, width: int
) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer, font) > width:
            lines.append(word)
        else:
            lines[-1] = longer
    return lines


def print_table(report: dict[str, dict[str, object]], checks: dict[str, dict[str, object]]) -> None:
    """Print shares in per cent with 95 % intervals."""
    table = Table("what was asked", "asked", "right", "precision", "recall", "F1", "yes", "by log-prob.")
    for column in table.columns[:3]:
        column.no_wrap = True

    def percent(row: dict[str, object], name: str) -> str:
        value = row.get(name)
        return f"{100 * value:.1f}" if isinstance(value, float) else "–"

    for name, row in {**report, **checks}.items():
        if name == "captions":
            continue
        low, high = np.array(row["accuracy_interval"]) * 100
        shares = [
            percent(row, key) for key in ("precision", "recall", "f1", "yes_ratio", "accuracy_by_log_probability")
        ]
        table.add_row(name, str(row["questions"]), f"{percent(row, 'accuracy')} [{low:.1f}, {high:.1f}]", *shares)
    console = Console()
    console.print(table)
    row = report["captions"]
    console.print(
        f"{row['captions']} captions: CHAIR_I {percent(row, 'chair_i')} %, CHAIR_S {percent(row, 'chair_s')} %, "
        f"recall {percent(row, 'recall')} %, exact {percent(row, 'exact')} %"
    )


def load_llava(name: str) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """As `models.load`; a ValueError where that is another kind of model."""
    found = models.load(name)
    if not (isinstance(found, tuple) and isinstance(found[0], LlavaForConditionalGeneration)):
        kind = type(found[0] if isinstance(found, tuple) else found).__name__
        raise ValueError(f"{name} is a {kind}, but questions about scenes need a LlavaForConditionalGeneration.")
    return found


def evaluate_command(
    model: Annotated[str, typer.Argument(help="emoji-vlm, or a folder that its training wrote.")] = "emoji-vlm",
    method: Annotated[
        list[str] | None, typer.Option(help="A method to compare with the model as it is; may be repeated.")
    ] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    artifact: Annotated[list[Path] | None, typer.Option(help="Folder of a saved method; may be repeated.")] = None,
    suite: Annotated[
        str,
        typer.Option(
            help="scenes: every kind of question. methods: the published ones at three strengths each. pointing: "
            "whether the model looks at what it is asked for."
        ),
    ] = "scenes",
    noise: Annotated[
        list[float] | None,
        typer.Option(help=f"Pixel noise, of 255; may be repeated. Default: 0, and {NOISE:g} as well with methods."),
    ] = None,
    scenes: Annotated[
        int | None,
        typer.Option(
            help=f"How many of the fixed scenes; {SCENES}, {vlm_methods.SCENES} with methods and pointing.", min=2
        ),
    ] = None,
    layers: Annotated[
        str | None,
        typer.Option(help=f"Of the suite pointing, layers of the decoder besides all; {vlm_pointing.LAYERS}."),
    ] = None,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("evaluation.json"),
    sheet: Annotated[Path | None, typer.Option(help="PNG contact sheet to write.")] = None,
    plot: Annotated[Path | None, typer.Option(help="PNG of the methods' differences to write.")] = None,
) -> None:
    """Presence as in POPE, colour, count, position and captions, with a blanked and a shuffled picture as controls.

    With methods: presence and captions of each on the same scenes, clean and noisy, and its differences to the model as
    it is. A run that was stopped continues where it was.
    """
    compares = suite == "methods" or bool(method or artifact)
    if suite not in SUITES:
        raise ValueError(f"there is no suite {suite!r}; there are {', '.join(SUITES)}")
    if output.is_dir():
        raise ValueError(f"--output {output} is a folder: give the name of a JSON file")
    if noise and min(noise) < 0:
        raise ValueError(f"--noise {min(noise):g} is a standard deviation: it cannot be negative")
    if plot is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("--plot draws with matplotlib: pip install 'steer-attention[plot]'")
    given = assignments("--set", settings or [])
    if suite == "pointing":
        if method or artifact or given or noise or sheet or plot:
            raise ValueError("--suite pointing is of one model and clean scenes: it takes --scenes and --layers only")
        evaluate_pointing(model, scenes or vlm_pointing.SCENES, layers or vlm_pointing.LAYERS, output)
        return
    if layers is not None:
        raise ValueError("--layers needs --suite pointing")
    loaded, processor = load_llava(model)
    if compares:
        if sheet is not None:
            raise ValueError("--sheet shows the answers of one model: leave the methods out, or take --plot")
        chosen = methods_of(suite, method or [], given, artifact or [], loaded, processor)
        noises = [0.0, NOISE] if noise is None else noise
        evaluate_methods(model, loaded, processor, chosen, noises, scenes or vlm_methods.SCENES, output, plot)
        return
    if given or plot is not None or len(noise or []) > 1:
        raise ValueError("--set, --plot and several --noise need --method, --artifact or --suite methods")
    evaluate_scenes(model, loaded, processor, (noise or [0.0])[0], scenes or SCENES, output, sheet)


def evaluate_pointing(name: str, scenes: int, layers: str, output: Path) -> None:
    """Play the pointing game, print the shares of hits and write them."""
    loaded, processor = load_llava(name)
    report = vlm_pointing.report_of(Path(name).name, loaded, processor, scenes, layers)
    vlm_pointing.show(report)
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_text(report))
    print(f"wrote {output}")


def methods_of(
    suite: str,
    names: Sequence[str],
    given: Mapping[str, Any],
    artifacts: Sequence[Path],
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
) -> Configurations:
    """The configurations of the suite, those that are named, and saved methods.

    Raises:
        ValueError: two of one name, or what `steer.apply` raises, before anything is measured.
    """
    chosen = vlm_methods.named(names, given, processor)
    for folder in artifacts:
        if folder.name in chosen:
            raise ValueError(f"there are two methods named {folder.name}: give one of the folders another name")
        chosen[folder.name] = steer.load(str(folder))
    for method in chosen.values():
        if method is not None:
            steer.apply(model, method).remove()
    return chosen | vlm_methods.configurations(model, processor) if suite == "methods" else chosen


def evaluate_methods(
    name: str,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    methods: Configurations,
    noises: Sequence[float],
    scenes: int,
    output: Path,
    plot: Path | None,
) -> None:
    """Compare methods with the model as it is, print the differences and write them."""
    sitting = Sitting.of(scenes, noises, blank=True)
    about = {
        "model": Path(name).name,
        "scenes": scenes,
        "first_seed": EVALUATION_SEED,
        "noise": list(noises),
        "versions": installed(),
        "methods": {title: method.describe() if method else BASELINE for title, method in methods.items()},
    }
    checkpoint = output.with_name(output.name + ".part")
    found = vlm_methods.compare(model, processor, methods, sitting, checkpoint, about)
    measured = (
        f"{model.device.type}, {platform.machine()}, {torch.get_num_threads()} threads, torch {torch.__version__}"
    )
    conditions = vlm_methods.report_of(found, sitting)
    report = {**about, "measured_on": measured, "conditions": conditions}
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(as_text(report))
    checkpoint.unlink()
    vlm_methods.show(conditions)
    for title, method in methods.items():
        if method is not None and method.is_neutral():
            print(f"{title}: {method.describe()} changes nothing")
    print(f"wrote {output}")
    if plot is not None:
        from steer_demos.vlm_plots import draw

        draw(report, plot)
        print(f"wrote {plot}")


def as_text(report: Mapping[str, Any]) -> str:
    """JSON with four digits, a figure and its interval on one line."""

    def rounded(value: Any) -> Any:
        if isinstance(value, float):
            return round(value, 4)
        if isinstance(value, Mapping):
            return {key: rounded(item) for key, item in value.items()}
        return [rounded(item) for item in value] if isinstance(value, (list, tuple)) else value

    return re.sub(r'\{\s*"mean"[^{}]*\}', lambda found: " ".join(found[0].split()), to_text(rounded(report)))


def evaluate_scenes(
    name: str,
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    noise: float,
    scenes: int,
    output: Path,
    sheet: Path | None,
) -> None:
    """Ask every kind of question, print the figures and write them with the first answers."""
    started = time.monotonic()
    drawn = evaluation_scenes(scenes)
    pictures = with_noise(drawn, noise)
    asked = [(index, question) for index, scene in enumerate(drawn) for question in evaluation_questions(scene, index)]
    answers = ask(model, processor, pictures, asked)
    report = assess(answers, drawn)
    checks = {
        "presence, blanked picture": control(model, processor, drawn, blanked(drawn), "blanked"),
        "presence, another picture": control(model, processor, drawn, [*pictures[1:], pictures[0]], "shuffled"),
    }
    print_table(report, checks)
    written = {
        "model": name,
        "scenes": scenes,
        "first_seed": EVALUATION_SEED,
        **({"noise": noise} if noise else {}),
        "presence_accuracy": balanced_accuracy(answers),
        **report,
        "controls": checks,
        "seconds": round(time.monotonic() - started),
        "measured_on": f"{model.device.type}, {platform.machine()}, torch {torch.__version__}",
        "answers": [asdict(answer) for answer in answers if answer.scene < SHEET_SCENES],
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"wrote {output}")
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(drawn[:SHEET_SCENES], answers, pictures).save(sheet, optimize=True)
        print(f"wrote {sheet}")


if __name__ == "__main__":
    typer.run(evaluate_command)
