"""Judges a vision-language model on drawn scenes: `steer eval vlm emoji-vlm`."""

import json
import platform
import re
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_demos import models
from steer_demos.intervals import BOOTSTRAP_SAMPLES, Interval
from steer_demos.models import emoji_vlm
from steer_demos.scenes import (
    CANVAS,
    EVALUATION_SEED,
    PRESENCE_SPLITS,
    Question,
    Scene,
    draw_scene,
    other_questions,
    presence_questions,
)

SCENES = 100
SHEET_SCENES = 20
SHEET_QUESTIONS = 8  # as many as `_for_sheet` chooses
NEW_TOKENS = 48  # the longest caption of five things has fewer


@dataclass(frozen=True)
class Asked:
    """A question about one scene of a list, and what the model said.

    Args:
        scene: index in the list of scenes.
        said: the generated text, without special tokens.
        margin: log-probability of `Yes` minus that of `No` as the first token.
    """

    scene: int
    question: Question
    said: str
    margin: float

    @property
    def says_yes(self) -> bool:
        """The answer to a presence question, read as POPE does: no if the first sentence holds `no` or `not`."""
        return not {"no", "not"} & set(re.findall(r"[a-z]+", self.said.split(".")[0].lower()))

    @property
    def right(self) -> bool:
        """Whether a question that has one answer was answered."""
        if self.question.kind == "presence":
            return self.says_yes == (self.question.answer == "Yes")
        return self.said.strip().rstrip(".").lower() == self.question.answer.rstrip(".").lower()


def evaluation_scenes(count: int) -> list[Scene]:
    """Fixed scenes that training never draws."""
    return [draw_scene(EVALUATION_SEED + index) for index in range(count)]


def evaluation_questions(scene: Scene, index: int, splits: Sequence[str] = PRESENCE_SPLITS) -> list[Question]:
    """The fixed questions about scene number `index`: presence, then one of each other kind."""
    chance = np.random.default_rng(EVALUATION_SEED + index)
    return [*presence_questions(scene, chance, splits), *other_questions(scene, chance)]


def ask(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    pictures: Sequence[np.ndarray],
    asked: Sequence[tuple[int, Question]],
    batch_size: int = 48,
    label: str = "asking",
) -> list[Asked]:
    """Generate greedily, one conversation a question, in batches padded on the left.

    Args:
        pictures: (96, 96, 3) uint8 each.
        asked: pairs of an index in `pictures` and a question.
    """
    yes, no = (processor.tokenizer(word, add_special_tokens=False).input_ids[0] for word in ("Yes", "No"))
    answers: list[Asked] = []
    # Captions together, so that short answers do not wait for them.
    order = sorted(range(len(asked)), key=lambda index: asked[index][1].kind == "caption")
    with tqdm(total=len(asked), desc=label, unit="question") as bar:
        for start in range(0, len(order), batch_size):
            part = [asked[index] for index in order[start : start + batch_size]]
            inputs = processor(
                images=[Image.fromarray(pictures[scene]) for scene, _ in part],
                text=[emoji_vlm.prompt(processor, question.text) for _, question in part],
                padding=True,
                return_tensors="pt",
            ).to(model.device, model.dtype)
            longest = NEW_TOKENS if any(question.kind == "caption" for _, question in part) else 6
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    max_new_tokens=longest,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            margins = (out.logits[0][:, yes] - out.logits[0][:, no]).tolist()
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(new, skip_special_tokens=True)
            answers += [
                Asked(scene, question, text, margin)
                for (scene, question), text, margin in zip(part, texts, margins, strict=True)
            ]
            bar.update(len(part))
    return answers


def bootstrapped(answers: Sequence[Asked], measure: Callable[[Sequence[Asked]], float]) -> Interval:
    """95 % interval of `measure` over resampled scenes, as the questions about one scene are not independent."""
    by_scene: dict[int, list[Asked]] = {}
    for answer in answers:
        by_scene.setdefault(answer.scene, []).append(answer)
    groups = list(by_scene.values())
    chance = np.random.default_rng(0)
    values = [
        measure([answer for index in chance.integers(0, len(groups), len(groups)) for answer in groups[index]])
        for _ in range(BOOTSTRAP_SAMPLES)
    ]
    low, high = np.nanpercentile(values, [2.5, 97.5])
    return float(low), float(high)


def accuracy(answers: Sequence[Asked]) -> float:
    """Share of right answers."""
    return float(np.mean([answer.right for answer in answers])) if answers else float("nan")


def presence(answers: Sequence[Asked]) -> dict[str, object]:
    """POPE's figures for the present things and the absent ones of one split; shares, positive is `Yes`."""
    truth = np.array([answer.question.answer == "Yes" for answer in answers])
    said = np.array([answer.says_yes for answer in answers])
    surer = np.array([answer.margin > 0 for answer in answers])
    precision = float((said & truth).sum() / max(said.sum(), 1))
    recall = float(said[truth].mean())
    return {
        "questions": len(answers),
        "accuracy": accuracy(answers),
        "accuracy_interval": bootstrapped(answers, accuracy),
        "balanced_accuracy": float((said[truth].mean() + (~said[~truth]).mean()) / 2),
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "yes_ratio": float(said.mean()),
        "accuracy_by_log_probability": float((surer == truth).mean()),
    }


def balanced_accuracy(answers: Sequence[Asked]) -> float:
    """Mean of the shares of present things that are seen and of absent things, of all splits, that are not."""
    asked = [answer for answer in answers if answer.question.kind == "presence"]
    present = [answer for answer in asked if answer.question.split is None]
    absent = [answer for answer in asked if answer.question.split is not None]
    return (accuracy(present) + accuracy(absent)) / 2


def mentioned(text: str) -> list[str]:
    """The names in a caption: `A red circle and an octopus.` -> [`red circle`, `octopus`]."""
    phrases = re.split(r",| and ", text.strip().rstrip(".").lower())
    names = [re.sub(r"^\s*(an?|the)\s+", "", phrase).strip() for phrase in phrases]
    return [name for name in names if name]


def captions(answers: Sequence[Asked], scenes: Sequence[Scene]) -> dict[str, object]:
    """CHAIR (Rohrbach et al. 2018) with the exact names as objects.

    A mention beyond how often the name is in the scene, or of no known name, counts as made up.
    """

    def counts(part: Sequence[Asked]) -> np.ndarray:
        rows = []
        for answer in part:
            names, scene = mentioned(answer.said), scenes[answer.scene]
            found = sum(min(names.count(name), scene.count(name)) for name in set(names))
            rows.append((len(names) - found, len(names), found, len(scene.things), len(names) > found))
        return np.array(rows, float).sum(0)

    def chair_instance(part: Sequence[Asked]) -> float:
        made_up, mentions, *_ = counts(part)
        return float(made_up / max(mentions, 1))

    def chair_sentence(part: Sequence[Asked]) -> float:
        return float(counts(part)[4] / len(part))

    def recall(part: Sequence[Asked]) -> float:
        _, _, found, things, _ = counts(part)
        return float(found / things)

    measures = {"chair_i": chair_instance, "chair_s": chair_sentence, "recall": recall, "exact": accuracy}
    report: dict[str, object] = {"captions": len(answers)}
    for name, measure in measures.items():
        report[name] = measure(answers)
        report[f"{name}_interval"] = bootstrapped(answers, measure)
    return report


def assess(answers: Sequence[Asked], scenes: Sequence[Scene]) -> dict[str, dict[str, object]]:
    """Every figure: presence by split of the absent things, colour, count, position, captions."""
    report: dict[str, dict[str, object]] = {}
    asked_presence = [answer for answer in answers if answer.question.kind == "presence"]
    for split in PRESENCE_SPLITS:
        part = [answer for answer in asked_presence if answer.question.split in (None, split)]
        report[f"presence, {split}"] = presence(part)
    for kind in ("colour", "count", "position"):
        part = [answer for answer in answers if answer.question.kind == kind]
        report[kind] = {
            "questions": len(part),
            "accuracy": accuracy(part),
            "accuracy_interval": bootstrapped(part, accuracy),
        }
    report["captions"] = captions([answer for answer in answers if answer.question.kind == "caption"], scenes)
    return report


def control(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    scenes: Sequence[Scene],
    pictures: Sequence[np.ndarray],
    label: str,
) -> dict[str, object]:
    """Presence, random split, asked about other pictures than the scenes': what language alone knows."""
    asked = [
        (index, question)
        for index, scene in enumerate(scenes)
        for question in evaluation_questions(scene, index, ["random"])
        if question.kind == "presence"
    ]
    return presence(ask(model, processor, pictures, asked, label=label))


def contact_sheet(scenes: Sequence[Scene], answers: Sequence[Asked], columns: int = 3) -> Image.Image:
    """Scenes with some of their questions and what was said; red where it was wrong, with the right answer."""
    picture, width, line = 2 * CANVAS, 640, 15
    height = max(picture, (SHEET_QUESTIONS + 4) * line) + 16
    rows = -(-len(scenes) // columns)
    sheet = Image.new("RGB", (columns * width, rows * height), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(12)
    for index, scene in enumerate(scenes):
        left, top = index % columns * width + 8, index // columns * height + 8
        sheet.paste(Image.fromarray(scene.pixels).resize((picture, picture), Image.Resampling.NEAREST), (left, top))
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
    scenes: Annotated[int, typer.Option(help="How many of the fixed scenes.", min=2)] = SCENES,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("evaluation.json"),
    sheet: Annotated[Path | None, typer.Option(help="PNG contact sheet to write.")] = None,
) -> None:
    """Presence as in POPE, colour, count, position and captions, with a blanked and a shuffled picture as controls."""
    started = time.monotonic()
    loaded, processor = load_llava(model)
    drawn = evaluation_scenes(scenes)
    pictures = [scene.pixels for scene in drawn]
    asked = [(index, question) for index, scene in enumerate(drawn) for question in evaluation_questions(scene, index)]
    answers = ask(loaded, processor, pictures, asked)
    report = assess(answers, drawn)
    blank = [np.full_like(picture, 217) for picture in pictures]  # the mean background
    checks = {
        "presence, blanked picture": control(loaded, processor, drawn, blank, "blanked"),
        "presence, another picture": control(loaded, processor, drawn, [*pictures[1:], pictures[0]], "shuffled"),
    }
    print_table(report, checks)
    written = {
        "model": model,
        "scenes": scenes,
        "first_seed": EVALUATION_SEED,
        "presence_accuracy": balanced_accuracy(answers),
        **report,
        "controls": checks,
        "seconds": round(time.monotonic() - started),
        "measured_on": f"{loaded.device.type}, {platform.machine()}, torch {torch.__version__}",
        "answers": [asdict(answer) for answer in answers if answer.scene < SHEET_SCENES],
    }
    output.write_text(json.dumps(written, indent=1) + "\n")
    print(f"wrote {output}")
    if sheet is not None:
        sheet.parent.mkdir(parents=True, exist_ok=True)
        contact_sheet(drawn[:SHEET_SCENES], answers).save(sheet, optimize=True)
        print(f"wrote {sheet}")


if __name__ == "__main__":
    typer.run(evaluate_command)
