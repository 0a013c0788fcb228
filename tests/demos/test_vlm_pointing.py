"""The pointing game: trials, where a map points, and the command."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import plain_emoji  # noqa: F401  (autouse: scenes without a renderer)
from tiny_emoji_vlm import tiny_model, tiny_processor

import steer
from steer_demos.evaluate_vlm import evaluate_command
from steer_demos.look import Look
from steer_demos.models.emoji_vlm import prompt
from steer_demos.scenes import EVALUATION_SEED, Thing, draw_scene
from steer_demos.vlm_pointing import CONTROL, FIRST, SCENES, chance_of, points_at, trials
from steer_patches.pictures import Pictures, cells


def map_of(weights: list[float]) -> Look:
    """A look at one picture of 6 x 6 tokens, that stand after one of text."""
    number, view = torch.zeros(1, 37, dtype=torch.int64), torch.zeros(1, 37, dtype=torch.int64)
    number[0, 0] = -1
    box = torch.cat([torch.zeros(1, 4), cells(6, 6)])[None]
    pictures = Pictures(number, number >= 0, box, view, box)
    return Look("", ["a"], torch.tensor([weights]), ["x"] * 36, tuple(range(1, 37)), pictures)


def test_trials_ask_for_what_is_there_once_on_scenes_that_no_layer_was_chosen_on() -> None:
    played = trials(SCENES)
    assert len(played) > SCENES / 2
    chosen_on = [draw_scene(EVALUATION_SEED + i).pixels for i in range(3)]
    for trial in played:
        assert trial.scene.count(trial.thing.name) == 1
        assert trial.thing in trial.scene.things
        assert trial.thing.corner
        assert trial.thing.name in trial.question
        assert not any(np.array_equal(trial.scene.pixels, pixels) for pixels in chosen_on)
    assert FIRST >= SCENES
    assert [t.question for t in trials(4)] == [t.question for t in played[: len(trials(4))]]


def test_a_map_points_at_the_middle_of_its_hottest_token() -> None:
    weights = torch.rand(36, generator=torch.Generator().manual_seed(0)).tolist()
    weights[8] = 2.0  # row 1, column 2: pixels 32 to 48 across and 16 to 32 down
    look = map_of(weights)
    assert points_at(look, Thing("red star", (40, 24, 60, 60)))
    assert not points_at(look, Thing("red star", (41, 24, 60, 60)))
    assert not points_at(look, Thing("red star", (24, 10, 40, 60)))  # right is excluded
    assert chance_of(look, Thing("red star", (30, 16, 64, 48))) == 4 / 36


def test_the_command_counts_hits_of_the_models_own_maps(tmp_path: Path) -> None:
    model, processor = tiny_model(), tiny_processor()
    for part in (model, processor):
        part.save_pretrained(tmp_path / "tiny")
    written = tmp_path / "new" / "out.json"
    evaluate_command(model=str(tmp_path / "tiny"), suite="pointing", scenes=8, layers="1:", output=written)
    report = json.loads(written.read_text())
    assert report["model"] == "tiny" and report["first_seed"] == EVALUATION_SEED + FIRST
    played = trials(8)
    assert report["trials"] == len(played)
    hits = []
    for trial in played:  # the control has one row: that of the prompt's last token
        text = prompt(processor, CONTROL)
        inputs = processor(images=Image.fromarray(trial.scene.pixels), text=text, return_tensors="pt")
        with torch.no_grad(), steer.capture(model, layers="*layers.1.self_attn", columns="image") as found:
            model(**inputs)
        hottest = int(next(iter(found.maps.values()))[0, -1].argmax())
        x, y = hottest % 6 * 16 + 8, hottest // 6 * 16 + 8
        left, top, right, bottom = trial.thing.box
        hits.append(left <= x < right and top <= y < bottom)
    row = report["layers 1:"]
    assert row["control"]["mean"] == pytest.approx(np.mean(hits), abs=1e-4)
    assert row["over_control"]["difference"] == pytest.approx(row["hit"]["mean"] - row["control"]["mean"], abs=2e-4)
    assert report["all layers"].keys() == {"hit", "control", "over_control"}


def test_documented_hits() -> None:
    root = Path(__file__).resolve().parents[2]
    page = " ".join((root / "docs/methods/vision.md").read_text(encoding="utf-8").split())
    found = json.loads((root / "benchmarks/vlm-pointing.json").read_text(encoding="utf-8"))
    for layers in ("all layers", "layers 21:24"):
        hit = found[layers]["hit"]
        low, high = (f"{100 * end:.1f}" for end in hit["interval"])
        assert f"{100 * hit['mean']:.1f} % [{low}, {high}]" in page
        assert f"{100 * found[layers]['control']['mean']:.1f} %" in page
    assert f"{100 * found['chance']['mean']:.1f} %; asked" in page
    assert f"{100 * found['right']['mean']:.1f} % were right" in page
    assert f'"Where is the X?" about {found["trials"]} things' in page
