"""The pointing game on drawn scenes: does the model look hardest inside the thing that it is asked about?"""

from __future__ import annotations

import platform
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image
from rich.console import Console
from rich.table import Table
from tqdm import tqdm
from transformers import LlavaForConditionalGeneration, LlavaProcessor

from steer.artifact import installed
from steer_demos.look import Look, look_at
from steer_demos.scenes import CANVAS, EVALUATION_SEED, Scene, Thing, draw_scene
from steer_demos.vlm_measures import RIGHT, Measure, figures

SCENES = 60
CONTROL = "Describe the image."

# The layers whose maps point best were found on the scenes EVALUATION_SEED to EVALUATION_SEED + 59, so that others are
# judged on: from this many later on.
LAYERS = "21:24"
FIRST = 1000

SHARE: dict[str, Measure] = {"share": RIGHT["accuracy"]}


@dataclass(frozen=True)
class Trial:
    """A scene, and one of its things to ask for: its name occurs once, and it lies in a corner."""

    scene: Scene
    thing: Thing

    @property
    def question(self) -> str:
        return f"Where is the {self.thing.name}?"


def trials(scenes: int) -> list[Trial]:
    """One for each of the fixed scenes that has such a thing; which of several follows from the scene's number."""
    found = []
    for number in range(FIRST, FIRST + scenes):
        scene = draw_scene(EVALUATION_SEED + number)
        things = [thing for thing in scene.unique() if thing.corner is not None]
        if things:
            found.append(Trial(scene, things[number % len(things)]))
    return found


def points_at(look: Look, thing: Thing) -> bool:
    """Whether the centre of the area of the picture that the answer looks at hardest is inside a thing's box."""
    heat = look.heat(0, (CANVAS, CANVAS))
    y, x = ((heat == heat.max()).nonzero().double().mean(0) + 0.5).tolist()
    return _inside(x, y, thing)


def chance_of(look: Look, thing: Thing) -> float:
    """The same of a token drawn by chance: the share of those that have their centre inside."""
    _, boxes = look.boxes(0)
    centres = ((boxes[:, :2] + boxes[:, 2:]) / 2 * CANVAS).tolist()
    return sum(_inside(x, y, thing) for x, y in centres) / len(centres)


def _inside(x: float, y: float, thing: Thing) -> bool:
    left, top, right, bottom = thing.box
    return left <= x < right and top <= y < bottom


def play(
    model: LlavaForConditionalGeneration, processor: LlavaProcessor, played: Sequence[Trial], layers: str = LAYERS
) -> dict[str, Any]:
    """Shares of trials that hit, with 95 % bootstrap intervals over trials, for the mean over all layers and over some.

    Args:
        layers: the latter, as in `look_at`.

    Returns:
        `chance`; `right`, of answers; for each choice of layers `hit`, `control` (the same map when the model is asked
        to describe the picture) and `over_control`, their difference with its interval, paired by trial.

    Raises:
        ValueError: no trials, or layers that do not exist.
    """
    if not played:
        raise ValueError("none of these scenes has a thing to point at: take more scenes")
    chosen = {"all layers": None, f"layers {layers}": layers}
    hits: dict[tuple[str, str], list[bool]] = {(name, kind): [] for name in chosen for kind in ("hit", "control")}
    chance, right = [], []
    for trial in tqdm(played, desc="pointing", unit="trial"):
        picture = [Image.fromarray(trial.scene.pixels)]
        for name, part in chosen.items():
            asked = look_at(model, processor, trial.question, picture, layers=part)
            control = look_at(model, processor, CONTROL, picture, layers=part, max_new_tokens=1)
            hits[name, "hit"].append(points_at(asked, trial.thing))
            hits[name, "control"].append(points_at(control, trial.thing))
        chance.append(chance_of(asked, trial.thing))
        right.append(asked.answer.strip().rstrip(".").lower() == trial.thing.corner)
    report: dict[str, Any] = {"trials": len(played), "chance": _share(chance), "right": _share(right)}
    for name in chosen:
        asked_hits, control_hits = hits[name, "hit"], hits[name, "control"]
        report[name] = {"hit": _share(asked_hits), "control": _share(control_hits)}
        report[name]["over_control"] = figures(_counted(asked_hits), SHARE, _counted(control_hits))["share"]
    return report


def _counted(values: Sequence[float]) -> np.ndarray:
    return np.stack([np.array(values, float), np.ones(len(values))], 1)


def _share(values: Sequence[float]) -> dict[str, Any]:
    return figures(_counted(values), SHARE)["share"]


def report_of(
    name: str, model: LlavaForConditionalGeneration, processor: LlavaProcessor, scenes: int, layers: str
) -> dict[str, Any]:
    """What `steer eval vlm --suite pointing` writes."""
    found = play(model, processor, trials(scenes), layers)
    return {
        "model": name,
        "scenes": scenes,
        "first_seed": EVALUATION_SEED + FIRST,
        "control": CONTROL,
        "versions": installed(),
        "measured_on": f"{model.device.type}, {platform.machine()}, torch {torch.__version__}",
        **found,
    }


def show(report: dict[str, Any]) -> None:
    """Print the shares, in per cent with 95 % intervals."""
    table = Table("hottest inside the thing", "asked where", "asked to describe", "difference")
    for name, row in report.items():
        if isinstance(row, dict) and "hit" in row:
            over = row["over_control"]
            moved = {"mean": over["difference"], "interval": over["interval"]}
            table.add_row(name, _cell(row["hit"]), _cell(row["control"]), _cell(moved))
    console = Console()
    console.print(table)
    console.print(
        f"{report['trials']} trials, 95 % bootstrap intervals; by chance {_cell(report['chance'])}; right answers "
        f"{_cell(report['right'])}; in per cent",
        highlight=False,
    )


def _cell(figure: dict[str, Any]) -> str:
    low, high = (100 * edge for edge in figure["interval"])
    return f"{100 * figure['mean']:.1f} [{low:.1f}, {high:.1f}]"
