"""What the tab of pictures shows: the pictures, their difference, the figures, and code that draws the same."""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

import steer
from steer_demos import models
from steer_demos.app import drawing, forms, image
from steer_demos.app.jobs import Job, Stopped
from steer_demos.app.stage import Loaded

CALL = {"num_inference_steps": 4, "guidance_scale": 3.0}
PROMPT = "a red apple on a blue background"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded("emoji-mmdit", "pictures", models.load("emoji-mmdit", device="cpu", dtype=torch.float32))


@pytest.fixture
def method() -> Any:
    return steer.PAG(scale=2.0, layers="transformer_blocks.3")


def pair(loaded: Loaded, method: Any, job: Job | None = None, **changes: Any) -> Any:
    options = {"seed": 3, "steps": 4, "guidance_scale": 3.0, **changes}
    return drawing.draw_pair(loaded, method, options.pop("prompt", PROMPT), job or Job(), **options)


def test_the_pair_is_what_the_pipeline_draws(loaded: Loaded, method: Any) -> None:
    found = pair(loaded, method)
    options = {**models.call_options("emoji-mmdit"), **CALL, "prompt": PROMPT}
    plain = loaded.model(**options, generator=torch.Generator().manual_seed(3)).images[0]
    with steer.apply(loaded.model, method):
        steered = loaded.model(**options, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(found.baseline.images[0], plain)
    assert np.array_equal(found.steered.images[0], steered)
    assert not np.array_equal(plain, steered)


def test_the_code_that_is_shown_draws_the_steered_picture(loaded: Loaded, method: Any) -> None:
    found = pair(loaded, method)
    names: dict[str, Any] = {}
    exec(drawing.python(loaded, forms.in_python("emoji-mmdit", method, {}), PROMPT, 3, CALL), names)
    assert np.array_equal(names["out"].images[0], found.steered.images[0])


def test_every_step_is_reported_and_may_be_the_last(loaded: Loaded, method: Any) -> None:
    said: list[tuple[int, int, str]] = []

    class Reported(Job):
        def step(self, done: int, total: int, what: str) -> None:
            said.append((done, total, what))
            if done == 6:
                self.stop()
            super().step(done, total, what)

    loaded.warm = True
    with pytest.raises(Stopped):
        pair(loaded, method, Reported())
    assert said == [(done, 8, "without" if done <= 4 else "with PAG") for done in range(1, 7)]
    options = {**models.call_options("emoji-mmdit"), **CALL, "prompt": PROMPT}
    after = loaded.model(**options, generator=torch.Generator().manual_seed(3)).images[0]
    assert np.array_equal(after, pair(loaded, method).baseline.images[0])


def test_a_method_that_is_off_is_said_to_change_nothing(loaded: Loaded) -> None:
    off = steer.PAG(scale=0.0, layers="transformer_blocks.3")
    found = pair(loaded, off)
    assert found.psnr == math.inf
    assert drawing.figures(found, off)["difference"] == "none, to the bit"
    assert np.asarray(drawing.difference(found.baseline.images[0], found.steered.images[0])).max() == 0


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"prompt": " "}, "the prompt is empty"),
        ({"prompt": "a" * 2001}, "2001 characters; at most 2000"),
        ({"steps": 0}, "steps=0 must be a whole number from 1 to 200"),
        ({"steps": 201}, "steps=201 must be"),
        ({"steps": 2.5}, "steps=2.5 must be"),
        ({"guidance_scale": math.nan}, "guidance_scale=nan must be a number from 0 to 100"),
    ],
)
def test_what_cannot_be_drawn_is_said(loaded: Loaded, method: Any, changes: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        pair(loaded, method, **changes)


def test_seeds() -> None:
    assert drawing.seed_of(7.0) == 7
    assert 0 <= drawing.seed_of(-1) <= drawing.MOST_SEED
    for wrong in (1.5, 2**40, math.nan, math.inf):
        with pytest.raises(ValueError, match="is no seed"):
            drawing.seed_of(wrong)


def test_the_difference_is_as_bright_as_it_can_be() -> None:
    one, other = Image.new("RGB", (2, 1), (10, 20, 30)), Image.new("RGB", (2, 1), (10, 20, 30))
    other.putpixel((0, 0), (10, 25, 20))
    found = np.asarray(drawing.difference(one, other))
    assert found.tolist() == [[[0, 127, 255], [0, 0, 0]]]


def test_small_pictures_get_whole_larger_pixels() -> None:
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 256, (3, 4, 3), dtype=np.uint8))
    larger = drawing.enlarged(noise, to=64)
    assert larger.size == (64, 48)
    assert np.array_equal(np.asarray(larger)[8::16, 8::16], np.asarray(noise))
    assert drawing.enlarged(larger, to=64) is larger


def test_methods_of_the_tab() -> None:
    assert {"PAG", "SEG", "SLG", "NeighborhoodAttention"} <= set(image.methods())
    assert not {"RadialAttention", "StreamingLLM", "VAR"} & set(image.methods())
