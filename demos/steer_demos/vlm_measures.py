"""What a vision-language model is asked about drawn scenes, how it is asked, and the figures of POPE and CHAIR."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer_demos.intervals import BOOTSTRAP_SAMPLES
from steer_demos.models import emoji_vlm
from steer_demos.scenes import (
    EVALUATION_SEED,
    PRESENCE_SPLITS,
    Question,
    Scene,
    draw_scene,
    other_questions,
    presence_questions,
)

NEW_TOKENS = 48  # the longest caption of five things has fewer
SHORT_TOKENS = 6  # any other answer
SUREST = 100.0  # a larger difference of two logits says nothing more; guidance makes infinite ones
DEVELOPMENT_SEED = EVALUATION_SEED + 2**20  # scenes to choose constants on: neither trained on nor evaluated

Sums = np.ndarray  # (..., K) what was counted, see `by_scene`
Measure = Callable[[Sums], np.ndarray]  # (..., K) -> (...)
Figures = dict[str, dict[str, Any]]


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


def evaluation_scenes(count: int, first_seed: int = EVALUATION_SEED) -> list[Scene]:
    """Fixed scenes that training never draws."""
    return [draw_scene(first_seed + index) for index in range(count)]


def evaluation_questions(
    scene: Scene, index: int, splits: Sequence[str] = PRESENCE_SPLITS, first_seed: int = EVALUATION_SEED
) -> list[Question]:
    """The fixed questions about scene number `index`: presence, then one of each other kind."""
    chance = np.random.default_rng(first_seed + index)
    return [*presence_questions(scene, chance, splits), *other_questions(scene, chance)]


def with_noise(scenes: Sequence[Scene], noise: float, first_seed: int = EVALUATION_SEED) -> list[np.ndarray]:
    """The pictures (96, 96, 3) uint8 of scenes with normal noise on every value, clipped; one fixed draw a scene.

    Args:
        noise: standard deviation, of values from 0 to 255.
    """
    if noise == 0:
        return [scene.pixels for scene in scenes]
    pictures = []
    for index, scene in enumerate(scenes):
        chance = np.random.default_rng([first_seed + index, 1])
        noisy = scene.pixels + noise * chance.standard_normal(scene.pixels.shape, np.float32)
        pictures.append(noisy.round().clip(0, 255).astype(np.uint8))
    return pictures


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
            longest = NEW_TOKENS if any(question.kind == "caption" for _, question in part) else SHORT_TOKENS
            with torch.inference_mode():
                out = model.generate(
                    **inputs,
                    max_new_tokens=longest,
                    do_sample=False,
                    return_dict_in_generate=True,
                    output_logits=True,
                )
            first = out.logits[0].float()
            margins = (first[:, yes] - first[:, no]).nan_to_num(0.0).clamp(-SUREST, SUREST).tolist()
            new = out.sequences[:, inputs["input_ids"].shape[1] :]
            texts = processor.batch_decode(new, skip_special_tokens=True)
            answers += [
                Asked(scene, question, text, margin)
                for (scene, question), text, margin in zip(part, texts, margins, strict=True)
            ]
            bar.update(len(part))
    return answers


def by_scene(answers: Sequence[Asked], row: Callable[[Asked], Sequence[float]]) -> Sums:
    """(N, K): sums of what `row` counts in an answer, for each of the N scenes that these answers are about.

    Scenes are what intervals resample, as the questions about one scene are not independent.
    """
    places = {scene: place for place, scene in enumerate(sorted({answer.scene for answer in answers}))}
    sums = np.zeros((len(places), len(row(answers[0])) if answers else 1))
    for answer in answers:
        sums[places[answer.scene]] += row(answer)
    return sums


def figures(sums: Sums, measures: Mapping[str, Measure], baseline: Sums | None = None) -> Figures:
    """Measures, each with `mean`, the measure of all scenes, and `interval`, its 95 % bootstrap interval over scenes.

    Args:
        sums: (N, K) of N scenes.
        baseline: the same of another model: `difference` is then that to it, and `interval` is of the difference,
            paired by scene.
    """
    if len(sums) == 0:
        return {name: {"mean": float("nan"), "interval": [float("nan")] * 2} for name in measures}
    drawn = np.random.default_rng(0).integers(0, len(sums), (BOOTSTRAP_SAMPLES, len(sums)))
    found: Figures = {}
    for name, measure in measures.items():
        mean, samples = measure(sums.sum(0)), measure(sums[drawn].sum(1))
        found[name] = {"mean": float(mean)}
        if baseline is not None:
            found[name]["difference"] = float(mean - measure(baseline.sum(0)))
            samples = samples - measure(baseline[drawn].sum(1))
        found[name]["interval"] = np.nanpercentile(samples, [2.5, 97.5]).tolist()
    return found


def _share(part: np.ndarray, whole: np.ndarray) -> np.ndarray:
    return part / np.maximum(whole, 1)  # no precision without a yes, and the like: 0


def presence_row(answer: Asked) -> tuple[float, ...]:
    """What `PRESENCE` reckons with: yes to what is there, what is there, yes to what is not, what is not."""
    return _presence_row(answer.says_yes, answer)


def surer_row(answer: Asked) -> tuple[float, ...]:
    """The same by log-probability: yes where it is the more probable first word."""
    return _presence_row(answer.margin > 0, answer)


def _presence_row(yes: bool, answer: Asked) -> tuple[float, ...]:
    there = answer.question.answer == "Yes"
    return yes and there, there, yes and not there, not there


def ranking(answers: Sequence[Asked]) -> Sums:
    """(N, 2) of N scenes: pairs of something there and something not there where the former is surer, and all pairs.

    Unlike every other figure of presence it does not rise or fall with how readily a model says yes. Ties are halves;
    guidance that rules a word out makes many.
    """
    margins: dict[int, tuple[list[float], list[float]]] = {}
    for answer in of_split(answers, None):
        margins.setdefault(answer.scene, ([], []))[answer.question.answer == "Yes"].append(answer.margin)
    rows = []
    for _, (absent, present) in sorted(margins.items()):
        apart = np.subtract.outer(present, absent)
        rows.append(((apart > 0).sum() + (apart == 0).sum() / 2, apart.size))
    return np.array(rows, float)


# POPE's figures, positive is `Yes`; of sums of `presence_row`.
PRESENCE: dict[str, Measure] = {
    "accuracy": lambda n: _share(n[..., 0] + n[..., 3] - n[..., 2], n[..., 1] + n[..., 3]),
    "balanced_accuracy": lambda n: (_share(n[..., 0], n[..., 1]) + 1 - _share(n[..., 2], n[..., 3])) / 2,
    "precision": lambda n: _share(n[..., 0], n[..., 0] + n[..., 2]),
    "recall": lambda n: _share(n[..., 0], n[..., 1]),
    "f1": lambda n: _share(2 * n[..., 0], n[..., 0] + n[..., 2] + n[..., 1]),
    "yes_ratio": lambda n: _share(n[..., 0] + n[..., 2], n[..., 1] + n[..., 3]),
}

# Of sums of `right_row`, and of `ranking`.
RIGHT: dict[str, Measure] = {"accuracy": lambda n: _share(n[..., 0], n[..., 1])}


def right_row(answer: Asked) -> tuple[float, ...]:
    """What `RIGHT` reckons with: right, asked."""
    return answer.right, 1


def mentioned(text: str) -> list[str]:
    """The names in a caption: `A red circle and an octopus.` -> [`red circle`, `octopus`]."""
    phrases = re.split(r",| and ", text.strip().rstrip(".").lower())
    names = [re.sub(r"^\s*(an?|the)\s+", "", phrase).strip() for phrase in phrases]
    return [name for name in names if name]


def caption_row(answer: Asked, scene: Scene) -> tuple[float, ...]:
    """What `CAPTIONS` reckons with: made up, mentions, found, things, captions with made up ones, exact, captions.

    A mention beyond how often the name is in the scene, or of no known name, counts as made up.
    """
    names = mentioned(answer.said)
    found = sum(min(names.count(name), scene.count(name)) for name in set(names))
    return len(names) - found, len(names), found, len(scene.things), len(names) > found, answer.right, 1


# CHAIR (Rohrbach et al. 2018) with the exact names as objects; of sums of `caption_row`.
CAPTIONS: dict[str, Measure] = {
    "chair_i": lambda n: _share(n[..., 0], n[..., 1]),
    "chair_s": lambda n: _share(n[..., 4], n[..., 6]),
    "recall": lambda n: _share(n[..., 2], n[..., 3]),
    "exact": lambda n: _share(n[..., 5], n[..., 6]),
}


def flat(found: Figures) -> dict[str, object]:
    """`accuracy` and `accuracy_interval`, and the like."""
    row: dict[str, object] = {}
    for name, figure in found.items():
        row |= {name: figure["mean"], f"{name}_interval": tuple(figure["interval"])}
    return row


def of_split(answers: Sequence[Asked], split: str | None) -> list[Asked]:
    """The presence answers about what is there, and about what is not of one split; None = of every split."""
    asked = [answer for answer in answers if answer.question.kind == "presence"]
    return [answer for answer in asked if split is None or answer.question.split in (None, split)]


def of_kind(answers: Sequence[Asked], kind: str) -> list[Asked]:
    """The answers to one kind of question."""
    return [answer for answer in answers if answer.question.kind == kind]


def presence(answers: Sequence[Asked]) -> dict[str, object]:
    """POPE's figures for the present things and the absent ones of one split; shares, positive is `Yes`."""
    found = figures(by_scene(answers, presence_row), PRESENCE)
    surer = by_scene(answers, surer_row).sum(0)
    return {
        "questions": len(answers),
        "accuracy": found["accuracy"]["mean"],
        "accuracy_interval": tuple(found["accuracy"]["interval"]),
        **{name: figure["mean"] for name, figure in found.items() if name != "accuracy"},
        "accuracy_by_log_probability": float(PRESENCE["accuracy"](surer)),
    }


def balanced_accuracy(answers: Sequence[Asked]) -> float:
    """Mean of the shares of present things that are seen and of absent things, of all splits, that are not."""
    sums = by_scene(of_split(answers, None), presence_row)
    return float(PRESENCE["balanced_accuracy"](sums.sum(0)))


def captions(answers: Sequence[Asked], scenes: Sequence[Scene]) -> dict[str, object]:
    """CHAIR_I, CHAIR_S, recall and the share of exact captions, with their intervals."""
    sums = by_scene(answers, lambda answer: caption_row(answer, scenes[answer.scene]))
    return {"captions": len(answers), **flat(figures(sums, CAPTIONS))}


def assess(answers: Sequence[Asked], scenes: Sequence[Scene]) -> dict[str, dict[str, object]]:
    """Every figure: presence by split of the absent things, colour, count, position, captions."""
    report = {f"presence, {split}": presence(of_split(answers, split)) for split in PRESENCE_SPLITS}
    for kind in ("colour", "count", "position"):
        part = of_kind(answers, kind)
        report[kind] = {"questions": len(part), **flat(figures(by_scene(part, right_row), RIGHT))}
    report["captions"] = captions(of_kind(answers, "caption"), scenes)
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


def blanked(scenes: Sequence[Scene]) -> list[np.ndarray]:
    """As many pictures that show nothing: the mean background."""
    return [np.full_like(scene.pixels, 217) for scene in scenes]
