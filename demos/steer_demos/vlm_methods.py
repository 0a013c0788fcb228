"""Methods for vision-language models side by side on drawn scenes: what `steer eval vlm --suite methods` runs."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Column, Table
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import steer
from steer.method import Method
from steer.methods.var import VAR
from steer.methods.vhr import VHR, row_of
from steer.opening import method_of
from steer.query_row import last_tokens, with_rows
from steer_demos.models import emoji_vlm
from steer_demos.scenes import PRESENCE_SPLITS, Question, Scene
from steer_demos.vlm_measures import (
    CAPTIONS,
    DEVELOPMENT_SEED,
    PRESENCE,
    RIGHT,
    SUREST,
    Asked,
    Measure,
    Sums,
    ask,
    blanked,
    by_scene,
    caption_row,
    evaluation_questions,
    evaluation_scenes,
    figures,
    of_kind,
    of_split,
    presence_row,
    ranking,
    surer_row,
    with_noise,
)
from steer_patches.site import Call, Next

Configurations = dict[str, Method | None]
Said = list[tuple[str, float]]  # text and margin of every question, in the questions' order

BASELINE = "baseline"
BLANKED = "blanked picture"
SCENES = 60

# Half of the published strength, the published one, and half more: the same rule for every method, fixed before any of
# them had run on this model. Strength is what is added to leaving everything as it is: VHR's alpha - 1, say.
STRENGTHS = (0.5, 1.0, 1.5)

SEARCHED = 8  # development scenes of VAR's search

# Where the search finds no sink dimensions, as with emoji-vlm, VAR edits nothing. What it would do is shown with the
# one dimension that is massive at the first token: phi is 24 there, the most there can be. Tokens of pictures have 12
# in the median, and 14 is about their 99th percentile in middle layers, on development scenes; the published tau is 20.
NEAREST_TO_SINKS: Mapping[str, Any] = {"sink_dims": (507,), "tau": 14.0}


def configurations(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> Configurations:
    """The methods at their three strengths, and what they are to be told from, at the published strength.

    Controls: as many heads as VHR amplifies, by chance; in ImbalancedAttention all tokens of the picture alike, and its
    guidance away from text alone.
    """
    chosen: Configurations = {BASELINE: None}
    sinks = sink_search(model, processor)
    title = "VAR"
    if not sinks.sink_dims:
        chosen["VAR, as its search says"] = sinks
        sinks, title = dataclasses.replace(sinks, **NEAREST_TO_SINKS), "VAR, made to edit"
    for part in STRENGTHS:
        chosen[f"{title}, {part:g} x"] = dataclasses.replace(sinks, p=round(1 - 0.4 * part, 2))
    for part in STRENGTHS:
        chosen[f"VHR, {part:g} x"] = steer.VHR(alpha=1 + part)
    for seed in (0, 1):
        chosen[f"control: random heads {seed + 1}"] = RandomHeads(alpha=2.0, seed=seed)
    for part in STRENGTHS:
        chosen[f"GIFT, {part:g} x"] = steer.GIFT.for_processor(processor, alpha=5 * part)
    for part in STRENGTHS:
        gains = {"alpha": round(0.7 * part, 3), "beta": round(0.3 * part, 3), "gamma": round(1 + 0.1 * part, 3)}
        chosen[f"ImbalancedAttention, {part:g} x"] = steer.ImbalancedAttention(**gains)
    every = steer.ImbalancedAttention(alpha=0.7, beta=0.0, gamma=1.1, local_ratio=1.0)
    chosen["control: whole picture"] = every
    chosen["control: guidance alone"] = steer.ImbalancedAttention(alpha=0.0, beta=0.0, gamma=1.1)
    return chosen


def sink_search(model: LlavaForConditionalGeneration, processor: LlavaProcessor) -> VAR:
    """VAR with the sink dimensions that its search finds on development scenes: () = this model has none."""
    prompts = []
    for index, scene in enumerate(evaluation_scenes(SEARCHED, DEVELOPMENT_SEED)):
        question = evaluation_questions(scene, index, first_seed=DEVELOPMENT_SEED)[0]
        text = emoji_vlm.prompt(processor, question.text)
        inputs = processor(images=Image.fromarray(scene.pixels), text=text, return_tensors="pt")
        prompts.append(dict(inputs.to(model.device, model.dtype)))
    found: Any = steer.calibrate(model, VAR(), prompts, progress=False)
    return dataclasses.replace(found, plan=None)


@dataclass(kw_only=True)
class RandomHeads(Method, register=False):
    """VHR's edit with heads drawn by chance: what is gained by louder heads, whichever they are.

    Args:
        alpha: factor on the output of the chosen heads.
        share: of the heads of each layer that are chosen, rounded down.
        seed: of the choice.
    """

    alpha: float = 2.0
    share: float = 0.5
    seed: int = 0

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_pictures: ClassVar[bool] = True
    layers_in = VHR.layers_in

    def is_neutral(self) -> bool:
        return self.alpha == 1

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        out = next(call)
        if call.text is None or call.text.pictures is None:
            return out
        heads = call.site.heads
        chance = torch.Generator().manual_seed(1000 * self.seed + call.site.layer)
        chosen = torch.zeros(heads, 1, 1, dtype=torch.bool)
        chosen[torch.randperm(heads, generator=chance)[: int(self.share * heads)]] = True
        which = chosen.to(out.device) & (call.text.pictures.number >= 0).any(-1).view(-1, 1, 1, 1)
        if call.heads is not None:
            which = which & call.heads
        at = last_tokens(call)
        return with_rows(out, at, self.alpha * row_of(out, at), which)


def named(names: Sequence[str], given: Mapping[str, Any], processor: LlavaProcessor) -> Configurations:
    """The model as it is, and methods by name with those of the settings that they have.

    Raises:
        ValueError: no such method, a setting that none of them has, or a value that it cannot have.
    """
    known = steer.methods()
    chosen: Configurations = {BASELINE: None}
    used: set[str] = set()
    for name in names:
        fields = {field.name for field in dataclasses.fields(known[name])} if name in known else set()
        own = {key: value for key, value in given.items() if key in fields}
        used |= set(own)
        chosen[name] = method_of(name, own, processor)
    if set(given) - used:
        raise ValueError(f"{', '.join(names) or 'no method'} has no field {', '.join(sorted(set(given) - used))}")
    return chosen


@dataclass(frozen=True)
class Sitting:
    """Scenes, how they are shown, and the questions about them.

    Args:
        pictures: (96, 96, 3) uint8 each, by the name of the condition.
    """

    scenes: Sequence[Scene]
    questions: Sequence[tuple[int, Question]]
    pictures: Mapping[str, Sequence[np.ndarray]]

    @classmethod
    def of(cls, count: int, noises: Sequence[float], blank: bool = False) -> Sitting:
        """The fixed scenes with noise of every given size; presence questions and captions."""
        scenes = evaluation_scenes(count)
        questions = [
            (index, question)
            for index, scene in enumerate(scenes)
            for question in evaluation_questions(scene, index)
            if question.kind in ("presence", "caption")
        ]
        shown = {f"noise {noise:g}" if noise else "clean": with_noise(scenes, noise) for noise in noises}
        return cls(scenes, questions, shown | ({BLANKED: blanked(scenes)} if blank else {}))

    def asked(self, said: Said) -> list[Asked]:
        """The answers to all questions."""
        return [Asked(i, question, *one) for (i, question), one in zip(self.questions, said, strict=True)]


def compare(
    model: LlavaForConditionalGeneration,
    processor: LlavaProcessor,
    methods: Configurations,
    sitting: Sitting,
    checkpoint: Path,
    about: Mapping[str, Any],
) -> dict[str, dict[str, dict[str, Any]]]:
    """Ask everything of every configuration; the blanked picture, which is what language alone knows, of the baseline.

    Args:
        checkpoint: file that is written after every configuration, and read where it is of the same evaluation.
        about: what says so.

    Returns:
        For each condition and configuration `said` and `seconds`; configurations that change nothing are left out.
    """
    about = json.loads(json.dumps(about))
    kept: dict[str, Any] = {"about": about, "conditions": {name: {} for name in sitting.pictures}}
    if checkpoint.is_file():
        before = json.loads(checkpoint.read_text())
        if before["about"] == about:
            kept = before
            print(f"continuing from {checkpoint}: {sum(map(len, kept['conditions'].values()))} parts are done")
    titles = [title for title, method in methods.items() if method is None or not method.is_neutral()]
    todo = [(name, title) for name in sitting.pictures for title in titles if name != BLANKED or title == BASELINE]
    for number, (condition, title) in enumerate(todo, 1):
        if title in kept["conditions"][condition]:
            continue
        method, started = methods[title], time.monotonic()
        with contextlib.nullcontext() if method is None else steer.apply(model, method):
            label = f"{number}/{len(todo)} {condition}, {title}"
            answers = ask(model, processor, sitting.pictures[condition], sitting.questions, label=label)
        kept["conditions"][condition][title] = {
            "said": _in_order(answers, sitting.questions),
            "seconds": round(time.monotonic() - started, 1),
        }
        checkpoint.parent.mkdir(parents=True, exist_ok=True)
        written = checkpoint.with_name(checkpoint.name + ".new")
        written.write_text(json.dumps(kept))
        written.replace(checkpoint)  # a kill while writing leaves the one before
    return kept["conditions"]


def _in_order(answers: Sequence[Asked], questions: Sequence[tuple[int, Question]]) -> Said:
    found = {(answer.scene, answer.question): (answer.said, answer.margin) for answer in answers}
    return [found[question] for question in questions]


def judged(answers: Sequence[Asked], baseline: Sequence[Asked] | None, scenes: Sequence[Scene]) -> dict[str, Any]:
    """Presence by split, by text and by log-probability, ranking, captions; with a baseline the differences to it too.

    Args:
        baseline: its answers to the same questions, in the same order.
    """
    row: dict[str, Any] = {}

    def add(name: str, measures: Mapping[str, Measure], count: Callable[[Sequence[Asked]], Sums]) -> None:
        row[name] = figures(count(answers), measures, None if baseline is None else count(baseline))

    def of(split: str | None, count: Callable[[Asked], Sequence[float]]) -> Callable[[Sequence[Asked]], Sums]:
        return lambda given: by_scene(of_split(given, split), count)

    surer = {name: PRESENCE[name] for name in ("accuracy", "balanced_accuracy")}
    for split in (None, *PRESENCE_SPLITS):
        add(f"presence, {split or 'all'}", PRESENCE, of(split, presence_row))
        add(f"presence, {split or 'all'}, log-probability", surer, of(split, surer_row))
    add("ranking", RIGHT, ranking)
    add(
        "captions",
        CAPTIONS,
        lambda given: by_scene(of_kind(given, "caption"), lambda answer: caption_row(answer, scenes[answer.scene])),
    )
    if baseline is not None:
        row["changed"] = changed(answers, baseline)
    return row


def changed(answers: Sequence[Asked], baseline: Sequence[Asked]) -> dict[str, Any]:
    """How much a method does at all: answers that are others, and how far the log-probabilities moved."""
    pairs = list(zip(answers, baseline, strict=True))
    asked = [(one, other) for one, other in pairs if one.question.kind == "presence"]
    told = [(one, other) for one, other in pairs if one.question.kind == "caption"]
    apart = [one.margin - other.margin for one, other in asked if max(abs(one.margin), abs(other.margin)) < SUREST]
    return {
        "presence": sum(one.says_yes != other.says_yes for one, other in asked),
        "presence_asked": len(asked),
        "captions": sum(one.said != other.said for one, other in told),
        "captions_asked": len(told),
        "margins_compared": len(apart),
        "margin_towards_yes": float(np.mean(apart)) if apart else 0.0,
        "margin_moved": float(np.mean(np.abs(apart))) if apart else 0.0,
    }


def report_of(found: Mapping[str, Mapping[str, Any]], sitting: Sitting) -> dict[str, Any]:
    """Every figure of what `compare` returned, by condition and configuration."""
    report: dict[str, Any] = {}
    for condition, parts in found.items():
        asked = {title: sitting.asked(part["said"]) for title, part in parts.items()}
        report[condition] = {}
        for title, answers in asked.items():
            baseline = None if title == BASELINE else asked[BASELINE]
            row = judged(answers, baseline, sitting.scenes)
            report[condition][title] = row | {"seconds": parts[title]["seconds"]}
    return report


def show(report: Mapping[str, Any]) -> None:
    """Print for each condition what changes, in per cent and points, with 95 % intervals."""
    shown = {
        "balanced\naccuracy": ("presence, all", "balanced_accuracy"),
        "\nyes": ("presence, all", "yes_ratio"),
        "\nCHAIR_I": ("captions", "chair_i"),
    }
    console = Console()
    for condition, rows in report.items():
        table = Table(Column(condition), *(Column(name, no_wrap=True) for name in (*shown, "answers\nchanged")))
        for title, row in rows.items():
            moved = row.get("changed")
            count = "" if moved is None else f"{moved['presence']}/{moved['presence_asked']}"
            table.add_row(title, *(_cell(row[part][name]) for part, name in shown.values()), count)
        console.print(table)
    console.print("per cent; below it the difference to the baseline with its 95 % bootstrap interval over scenes")


def _cell(figure: Mapping[str, Any]) -> str:
    text = f"{100 * figure['mean']:.1f}"
    if "difference" not in figure:
        return text
    low, high = (100 * edge for edge in figure["interval"])
    return f"{text}\n{100 * figure['difference']:+.1f}\n[{low:.1f}, {high:.1f}]"
