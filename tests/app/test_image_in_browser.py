"""The tab of pictures, in a real browser."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from PIL import Image

pytestmark = pytest.mark.browser


def figures(page: Any) -> Any:
    return page.locator("#image-figures")


WITHOUT, STEERED, APART = "drawn without a method", "drawn with the method", "how far the two are apart"


def shown(page: Any, name: str) -> np.ndarray:
    """The pixels of a picture, as the page got them."""
    source = page.get_by_alt_text(name, exact=True).get_attribute("src")
    with Image.open(BytesIO(page.request.get(source).body())) as picture:
        return np.asarray(picture.convert("RGB"))


def draw(page: Any) -> None:
    page.get_by_role("button", name="Draw", exact=True).click()


def test_a_prompt_is_drawn_without_and_with_a_method(visit: Any, screenshot: Any) -> None:
    page = visit()
    page.get_by_role("textbox", name="Prompt").fill("a cat face on a white background, noto style")
    page.get_by_label("number input for scale").fill("2")
    draw(page)
    figures(page).get_by_text("times as long").wait_for()
    figures(page).get_by_text("PSNR").wait_for()
    without, steered, apart = (shown(page, label) for label in (WITHOUT, STEERED, APART))
    assert without.shape == steered.shape == apart.shape == (256, 256, 3)
    moved = np.abs(without.astype(int) - steered.astype(int)).max(2) > 0
    assert moved.any()
    assert np.array_equal(apart.max(2) > 0, moved)
    page.get_by_role("button", name="Where it acted").click()
    page.get_by_text("transformer_blocks.3").first.wait_for()
    code = page.locator("#image-code").inner_text()
    assert "with steer.apply(pipe, steer.PAG(" in code and "scale=2" in code
    page.get_by_role("button", name="Where it acted").click()
    screenshot(page, "image")


def test_an_example_fills_the_tab_in_and_runs(visit: Any) -> None:
    page = visit()
    page.get_by_role("button", name="SLG", exact=True).click()
    figures(page).get_by_text("with SLG").wait_for()
    assert page.get_by_role("textbox", name="Prompt").input_value() == "a rocket on a gray background, fluent style"
    assert page.get_by_label("number input for scale").input_value() == "2"
    assert np.abs(shown(page, WITHOUT).astype(int) - shown(page, STEERED)).max() > 0


def test_bad_input_is_answered_in_words(visit: Any) -> None:
    page = visit()
    page.get_by_role("textbox", name="Prompt").fill(" ")
    draw(page)
    page.get_by_text("the prompt is empty: say what to draw").wait_for()
    page.get_by_role("textbox", name="Prompt").fill("a tree")
    page.get_by_role("button", name="More", exact=False).first.click()
    page.get_by_role("textbox", name=re.compile("^layers")).fill("blocks.99")
    draw(page)
    page.get_by_text("layers='blocks.99' matches none of this model's").wait_for()
    page.get_by_role("textbox", name=re.compile("^layers")).fill("")
    draw(page)
    figures(page).get_by_text("times as long").wait_for()


def test_stop_ends_the_run_and_the_next_one_draws(visit: Any) -> None:
    page = visit()
    page.get_by_label("number input for Steps").fill("50")
    draw(page)
    page.get_by_text("without").first.wait_for()  # the progress: it runs
    page.get_by_role("button", name="Stop", exact=True).click()
    page.get_by_label("number input for Steps").fill("2")
    draw(page)
    figures(page).get_by_text("times as long").wait_for()
