"""The page as visitors see it: two at once, errors in words, nothing of theirs that runs in another's browser."""

from __future__ import annotations

import io
import json
from typing import Any
from urllib.parse import urlencode

import numpy as np
import pytest
import torch
from PIL import Image
from playwright.sync_api import expect

import steer
from steer_demos import models
from steer_demos.app import drawing
from steer_demos.app.jobs import Job
from steer_demos.app.stage import Loaded

pytestmark = pytest.mark.browser

ALT = ("drawn without a method", "drawn with the method")
ATTACK = "<img src=x onerror=\"document.title='taken over'\"><script>document.title='taken over'</script>"

WAIT = 120_000  # milliseconds


def link(**settings: Any) -> str:
    return "?" + urlencode({"tab": "image", "settings": json.dumps(settings)})


def filled(visit: Any, prompt: str = "a green pear", **settings: Any) -> Any:
    """A page opened by a link with these settings, once it shows them."""
    page = visit(link(prompt=prompt, **settings))
    expect(page.get_by_label("Prompt").locator("visible=true")).to_have_value(prompt, timeout=WAIT)
    return page


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).locator("visible=true").click()


def toast(page: Any) -> Any:
    return page.get_by_test_id("toast-body")


def shown(page: Any) -> list[np.ndarray]:
    """The picture without and the one with the method."""
    page.locator("#image-figures").get_by_text("times as long").wait_for()
    sources = [page.get_by_alt_text(text).get_attribute("src") for text in ALT]
    return [np.asarray(Image.open(io.BytesIO(page.request.get(src).body())).convert("RGB")) for src in sources]


def direct(model: str, prompt: str, seed: int, scale: float) -> list[np.ndarray]:
    loaded = Loaded(model, "pictures", models.load(model, "cpu", torch.float32), warm=True)
    method = steer.PAG(scale=scale, layers=models.guided_layers(model))
    found = drawing.draw_pair(loaded, method, prompt, Job(), seed=seed, steps=2, guidance_scale=3.0)
    return [np.asarray(drawing.enlarged(run.images[0])) for run in (found.baseline, found.steered)]


def test_two_visitors_at_once_get_their_own(visit: Any) -> None:
    first: dict[str, Any] = {
        "model": "emoji-mmdit",
        "prompt": "a yellow star on a white background",
        "seed": 5,
        "steps": 2,
    }
    second: dict[str, Any] = {
        "model": "emoji-unet",
        "prompt": "a green car on a yellow background",
        "seed": 6,
        "steps": 2,
    }
    pages = [
        filled(visit, **asked, method="PAG", settings={"scale": scale})
        for asked, scale in ((first, 1.5), (second, 2.5))
    ]
    for page in pages:
        press(page, "Draw")
    found = [shown(page) for page in pages]
    for pictures, asked, scale in ((found[0], first, 1.5), (found[1], second, 2.5)):
        expected = direct(asked["model"], asked["prompt"], asked["seed"], scale)
        assert all(np.array_equal(*pair) for pair in zip(pictures, expected, strict=True))


def test_who_stops_stops_nobody_else(visit: Any) -> None:
    one, other = filled(visit, steps=50), filled(visit, seed=9, steps=2)
    press(one, "Draw")
    one.get_by_text("without").locator("visible=true").first.wait_for()
    press(other, "Draw")
    press(one, "Stop")
    pictures = shown(other)
    assert not one.locator("#image-figures").get_by_text("times as long").count()
    assert np.array_equal(pictures[0], direct("emoji-mmdit", "a green pear", 9, 2.0)[0])


def test_a_page_opened_anew_while_it_draws_draws_again(visit: Any) -> None:
    page = filled(visit, steps=50)
    press(page, "Draw")
    page.get_by_text("without").locator("visible=true").first.wait_for()
    page.goto(page.url.split("?")[0] + link(prompt="a red car", steps=1))
    expect(page.get_by_label("Prompt").locator("visible=true")).to_have_value("a red car", timeout=WAIT)
    press(page, "Draw")
    shown(page)


def test_who_leaves_lets_the_next_one_in(visit: Any) -> None:
    one = filled(visit, steps=50)
    press(one, "Draw")
    one.get_by_text("without").locator("visible=true").first.wait_for()
    one.close()
    other = filled(visit, steps=1)
    press(other, "Draw")
    shown(other)


@pytest.mark.parametrize("field", ["model", "saved"])
def test_what_a_visitor_writes_is_shown_as_text(visit: Any, field: str) -> None:
    page = filled(visit, ATTACK, steps=1, **{field: ATTACK})
    press(page, "Draw")
    toast(page).get_by_text("<img src=x onerror=").first.wait_for()
    assert page.locator("img[src='x']").count() == 0
    assert page.title() == "steer"


@pytest.mark.parametrize("settings", [{ATTACK: 1}, {"method": "PAG", "settings": {ATTACK: 1}}, {"method": ATTACK}])
def test_a_link_cannot_write_into_the_page(visit: Any, settings: dict[str, Any]) -> None:
    page = visit(link(**settings))
    toast(page).get_by_text("<img src=x onerror=").first.wait_for()
    assert page.locator("img[src='x']").count() == 0
    assert page.title() == "steer"


def test_a_long_error_can_be_read(visit: Any) -> None:
    page = filled(visit, model="word " * 1000, steps=1)
    press(page, "Draw")
    toast(page).get_by_text("word word").wait_for()
    box = toast(page).bounding_box()
    assert box["y"] >= 0 and box["y"] + box["height"] <= page.viewport_size["height"]
    toast(page).get_by_label("Close").click()
    toast(page).wait_for(state="detached")
