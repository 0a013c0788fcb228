"""The tab of language models, in a real browser."""

from __future__ import annotations

import re
from io import BytesIO
from typing import Any

import numpy as np
import pytest
from gradio_client import Client
from PIL import Image

from steer_demos.app import language

pytestmark = pytest.mark.browser

SHORT = "The gulls know him and follow him. Tonight there is a light on the sea, and"


def opened(visit: Any, query: str = "?tab=language") -> Any:
    page = visit(query)
    page.get_by_label("Find a pass key").wait_for()  # the link's tab is shown a moment after the first one
    return page


def run(page: Any, button: str) -> None:
    page.get_by_role("button", name=button, exact=True).locator("visible=true").click()


def shown(page: Any, name: str) -> np.ndarray:
    """The pixels of a picture, as the page got them."""
    source = page.get_by_alt_text(re.compile(name)).get_attribute("src")
    with Image.open(BytesIO(page.request.get(source).body())) as picture:
        return np.asarray(picture.convert("RGB"))


def test_an_example_is_answered_without_and_with_a_method(visit: Any, screenshot: Any) -> None:
    page = opened(visit)
    run(page, "ACT on a question")
    figures = page.locator("#language-figures")
    figures.get_by_text("with ACT").wait_for()
    figures.get_by_text("a second").first.wait_for()
    page.get_by_text("Rayleigh scattering").first.wait_for()
    assert page.get_by_text("the first difference").count() == 2  # the legends
    screenshot(page, "language")


def test_a_link_opens_the_sinks_and_they_are_drawn(visit: Any) -> None:
    settings = (
        '{"part": "sinks", "prompt": "%s", "mode": "completion", "method": "StreamingLLM", "settings": {"n_recent": 6}}'
    )
    page = opened(visit, f"?tab=language&settings={settings % SHORT}")
    run(page, "Look")
    page.locator("#sinks-figures").get_by_text("with StreamingLLM").wait_for()
    halves = np.array_split(shown(page, "a map of all heads"), 2, axis=1)
    assert halves[0].std() > 10 and halves[1].std() > 10
    assert shown(page, "attention on each token").shape[1] > 800
    assert page.get_by_label("Tokens of the text").count() == 0  # belongs to another part


def test_a_pass_key_is_lost_and_the_settings_of_the_example_are_in_the_form(visit: Any) -> None:
    page = opened(visit)
    page.get_by_label("Find a pass key").check()
    run(page, "Lost: StreamingLLM")
    figures = page.locator("#passkey-figures")
    figures.get_by_text("found").wait_for()
    figures.get_by_text("lost").wait_for()
    assert shown(page, "which heads still see it").std() > 10
    assert page.get_by_label("number input for n_recent").input_value() == "256"
    assert page.get_by_label("number input for Tokens of the text").input_value() == "600"


def test_bad_input_is_answered_in_words_and_stop_ends_the_answer(visit: Any) -> None:
    page = opened(visit)
    page.get_by_role("textbox", name="Prompt").locator("visible=true").fill(" ")
    run(page, "Write")
    page.get_by_text("the prompt is empty: ask something, or begin a text").wait_for()
    page.get_by_role("textbox", name="Prompt").locator("visible=true").fill(SHORT)
    page.get_by_label("number input for New tokens").fill("200")
    run(page, "Write")
    page.get_by_text("without: ").first.wait_for()  # the progress: it writes
    run(page, "Stop")
    page.get_by_label("number input for New tokens").fill("2")
    run(page, "Write")
    page.locator("#language-figures").get_by_text("2 tokens, the first after").first.wait_for()


def test_the_parts_are_endpoints(served: Any) -> None:
    client = Client(served.url, verbose=False)
    method = ("StreamingLLM", {"n_recent": 6}, "")
    before, after, figures, summary, code = client.predict(
        language.MODELS[0], SHORT, "completion", 4, 0, 0, *method, api_name="/language"
    )
    assert "".join(part["token"] for part in before) != "".join(part["token"] for part in after)
    assert "with StreamingLLM" in figures and "30 sites" in summary and "steer.StreamingLLM(n_recent=6" in code
    text, heads, figures = client.predict(language.MODELS[0], SHORT, "completion", "first", *method, api_name="/sinks")
    assert "later sinks" in figures and text != heads
    figures, _, dense, steered, parts = client.predict(
        language.MODELS[0], 120, 0.1, 0, "StreamingLLM", {"n_recent": 60}, "", api_name="/passkey"
    )
    key = re.search(r"\d{5}", figures)
    assert key and key[0] in dense and key[0] not in steered
    assert key[0] in next(part["token"] for part in parts if part["class_or_confidence"] == "pass key")
