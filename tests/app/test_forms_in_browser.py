"""The form of a method and its sharing, in a real browser."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlencode

import pytest

pytestmark = pytest.mark.browser
WAIT = 60_000  # milliseconds


class Form:
    """The form of the Image tab of one visitor."""

    def __init__(self, page: Any, method: str = "PAG") -> None:
        self.page = page
        self.warnings: list[str] = []
        page.on("console", lambda said: self.warnings.append(said.text) if "cannot be parsed" in said.text else None)
        self.drawn(method)

    def drawn(self, method: str) -> None:
        """Wait until this form is there, and the last one gone."""
        from playwright.sync_api import expect

        expect(self.page.get_by_role("button", name="About ")).to_have_text([f"About {method} ▼"], timeout=WAIT)

    def choose(self, method: str) -> None:
        self.page.get_by_label("Method", exact=True).click()
        self.page.get_by_role("option", name=method, exact=True).click()
        self.drawn(method)

    def more(self) -> None:
        self.page.get_by_role("button", name="More: where and when it acts").click()

    def slider(self, name: str) -> Any:
        return self.page.get_by_label(f"number input for {name}", exact=True)

    def box(self, name: str) -> Any:
        return self.page.locator("label.container", has=self.page.get_by_text(name, exact=True)).locator(
            "input, textarea"
        )

    def share(self) -> tuple[str, dict[str, Any]]:
        """The link, and the JSON."""
        made = self.page.get_by_role("button", name="Make link and JSON")
        if not made.is_visible():
            self.page.get_by_role("button", name="Share these settings").click()
        text = self.page.locator("#image-json textarea")
        text.fill("")
        made.click()
        self.page.wait_for_function("() => document.querySelector('#image-json textarea').value.startsWith('{')")
        return self.page.locator("#image-link textarea").input_value(), json.loads(text.input_value())

    def settings(self) -> dict[str, Any]:
        found: dict[str, Any] = self.share()[1]["settings"]
        return found

    def use(self, text: str) -> None:
        """Paste JSON."""
        self.share()
        self.page.locator("#image-json textarea").fill(text)
        self.page.get_by_role("button", name="Use this JSON").click()


@pytest.fixture
def form(visit: Any) -> Iterator[Form]:
    found = Form(visit())
    yield found
    assert found.warnings == []  # of the browser, when a component gets the value of another kind


def test_the_settings_are_what_the_visitor_changed(form: Form) -> None:
    assert form.settings() == {}
    form.slider("scale").fill("2.5")
    form.more()
    form.page.get_by_label("share_prefix").uncheck()
    form.box("heads").fill('{"transformer_blocks.3": [0]}')
    form.page.get_by_label("extra").click()
    form.page.get_by_role("option", name="batched", exact=True).click()
    changed = {"scale": 2.5, "share_prefix": False, "heads": '{"transformer_blocks.3": [0]}', "extra": "batched"}
    assert form.settings() == changed
    form.box("heads").fill("")
    assert form.settings() == {"scale": 2.5, "share_prefix": False, "extra": "batched"}
    form.choose("NeighborhoodAttention")
    assert form.settings() == {}
    form.box("window").fill("[3, 3]")
    assert form.settings() == {"window": "[3, 3]"}
    form.choose("SLG")
    assert form.settings() == {}
    form.slider("scale").fill("9")
    reset = form.page.locator(".block", has=form.slider("scale")).get_by_label("Reset to default value")
    reset.last.click()
    assert form.slider("scale").input_value() == "2.8"  # and not the default of a slider that stood there before
    form.choose("SEG")
    form.box("sigma").fill("2")
    assert form.settings() == {"sigma": "2"}  # text, which the method reads as a number
    form.box("sigma").fill("")
    assert form.settings() == {}


def test_a_link_and_json_open_the_same_settings(form: Form, visit: Any) -> None:
    form.choose("SEG")
    form.page.get_by_label("Prompt", exact=True).fill('a "red" <b>apple</b> & ä')
    form.page.get_by_label("Seed").fill("7")
    form.slider("scale").fill("2.345")
    form.box("sigma").fill("1.5")
    form.more()
    form.box("layers").fill('["transformer_blocks.3"]')
    form.page.get_by_label("rows").click()
    form.page.get_by_role("option", name="perturbed", exact=True).click()
    link, shared = form.share()
    assert shared["settings"] == {
        "scale": 2.345,
        "sigma": "1.5",
        "layers": '["transformer_blocks.3"]',
        "rows": "perturbed",
    }
    assert (shared["tab"], shared["seed"], shared["prompt"]) == ("image", 7, 'a "red" <b>apple</b> & ä')
    assert len(link) < 600

    def shown(other: Form) -> None:
        assert other.box("scale").input_value() == "2.345"  # no slider: it could not stand there
        assert other.box("sigma").input_value() == "1.5"
        assert other.box("layers").input_value() == '["transformer_blocks.3"]'
        assert other.page.get_by_label("rows").input_value() == "perturbed"
        assert other.share() == (link, shared)

    again = Form(visit(link[link.index("?") :]), "SEG")
    shown(again)
    # The same settings once more, after a change: the form must not keep the change.
    again.box("sigma").fill("4")
    again.use(json.dumps(shared))
    again.page.wait_for_function(
        "() => [...document.querySelectorAll('input[aria-label=sigma]')].map((box) => box.value).join() === '1.5'"
    )
    shown(again)


def test_what_is_typed_last_is_what_is_drawn_with(form: Form) -> None:
    """No pause between the key and the click; the method's error tells the value."""
    form.choose("NeighborhoodAttention")
    form.box("window").press_sequentially("[0, 0]")
    form.page.get_by_role("button", name="Draw", exact=True).click()
    form.page.get_by_text("window=(0, 0)").wait_for()


def test_wrong_links_and_json_are_said_and_change_nothing(form: Form, visit: Any) -> None:
    before = form.share()[1]
    form.use('{"method": "PAG", "settings": {"scale": "<img src=x onerror=alert(1)>"}}')
    form.page.get_by_text("scale is '<img src=x onerror=alert(1)>'; it may be a number").wait_for()
    form.use('{"tab": "video", "seed": 3}')
    form.page.get_by_text("these are settings of the tab 'video'; this is 'image'").wait_for()
    assert form.share()[1] == before
    for query, words in (
        ({"tab": "nowhere"}, "the link asks for a tab that does not exist"),
        ({"tab": "image", "settings": '{"method": "Magic"}'}, "method is 'Magic'; it may be"),
    ):
        page = visit("?" + urlencode(query))
        page.get_by_text(words).wait_for()
        assert Form(page).share()[1] == before
