"""The tab of pictures with questions, in a real browser and through `gradio_client`."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import httpx
import pytest
from gradio_client import Client, handle_file
from PIL import Image

from steer_demos.scenes import EVALUATION_SEED, draw_scene

pytestmark = pytest.mark.browser

ASKED = {
    "model": "emoji-vlm",
    "scene": 20,
    "question": "Where is the cat face?",
    "max_new_tokens": 16,
    "layers": "",
    "relative": "",
    "tokens": False,
    "method": "GIFT",
    "settings": {},
    "saved": "",
    "upload": None,
}


@pytest.fixture(scope="module")
def client(served: Any) -> Client:
    return Client(served.url, verbose=False)


@pytest.fixture
def own(tmp_path: Path) -> Path:
    """A scene as a visitor's own picture."""
    path = tmp_path / "mine.png"
    Image.fromarray(draw_scene(EVALUATION_SEED + 20).pixels).save(path)
    return path


def question(page: Any) -> Any:
    return page.get_by_label("Question", exact=True).filter(visible=True)


def press(page: Any, name: str) -> None:
    page.get_by_role("button", name=name, exact=True).filter(visible=True).click()


def give(page: Any, file: Path) -> None:
    page.get_by_role("button", name="Your own picture").filter(visible=True).click()
    page.locator("#vision-upload input[type=file]").set_input_files(file)


def test_a_scene_is_asked_about_without_and_with_gift(visit: Any, screenshot: Any) -> None:
    from playwright.sync_api import expect

    page = visit("?tab=vision")
    expect(page.locator("#vision-things")).to_have_text("In it: penguin (top left), cat face (bottom right).")
    question(page).press("Enter")
    page.locator("#vision-figures").get_by_text("The answers differ.").wait_for()
    expect(page.get_by_label("Answer without").filter(visible=True)).to_have_value("Bottom left")
    expect(page.get_by_label("Answer with the method").filter(visible=True)).to_have_value("Bottom right")
    expect(page.locator("#vision-heat img")).to_be_visible()
    assert re.search(r"without\s+\d\.\d %", page.locator("#vision-figures").inner_text())
    screenshot(page, "vision")


def test_an_example_fills_the_tab_in_and_takes_an_upload_away(visit: Any, own: Path) -> None:
    from playwright.sync_api import expect

    page = visit("?tab=vision")
    give(page, own)
    expect(page.locator("#vision-things")).to_contain_text("Your picture, 96 x 96.")
    press(page, "StreamingLLM")
    page.locator("#vision-figures").get_by_text("with StreamingLLM").wait_for()
    expect(page.locator("#vision-things")).to_contain_text("In it: pizza (top left)")
    expect(question(page)).to_have_value("Where is the pizza?")
    page.get_by_label("number input for n_recent").filter(visible=True).wait_for()
    expect(page.get_by_label("number input for n_recent").filter(visible=True)).to_have_value("16")


def test_buttons_draw_another_scene_and_ask_another_question(visit: Any) -> None:
    from playwright.sync_api import expect

    page = visit("?tab=vision")
    things = page.locator("#vision-things")
    before = things.inner_text()
    press(page, "Another scene")  # of forty
    expect(things).not_to_have_text(before)
    question(page).fill("")
    press(page, "Another question")
    expect(question(page)).to_have_value(re.compile("image|What|Where|How"))


def test_bad_input_is_refused_in_words(visit: Any, tmp_path: Path) -> None:
    page = visit("?tab=vision")
    wrong = tmp_path / "words.png"
    wrong.write_text("no picture at all")
    give(page, wrong)
    page.get_by_text("this file is no picture").wait_for()
    press(page, "Ask")
    page.get_by_text("this file is no picture").nth(1).wait_for()
    press(page, "Another scene")  # takes it away
    question(page).fill("")
    press(page, "Ask")
    page.get_by_text("the question is empty").wait_for()


def test_an_upload_is_answered_like_the_scene_it_shows(client: Client, own: Path) -> None:
    scene = client.predict(**ASKED, api_name="/vision")
    upload = client.predict(**{**ASKED, "scene": 3, "upload": handle_file(str(own))}, api_name="/vision")
    assert upload[:2] == scene[:2] == ("Bottom left", "Bottom right")
    with Image.open(scene[2]) as one, Image.open(upload[2]) as other:
        assert one.tobytes() == other.tobytes()
    assert f"scene:{EVALUATION_SEED + 20}" in scene[5]
    assert "my-picture.png" in upload[5]


@pytest.mark.parametrize("meta", [{"meta": {"_type": "gradio.FileData"}}, {}])
def test_no_file_is_opened_but_what_was_uploaded(served: Any, own: Path, meta: Any) -> None:
    linked = own.with_name("linked.png")
    linked.symlink_to(own)
    here = "/gradio_api/file=" + str(own)
    paths = [
        own,
        linked,
        Path("/etc/passwd"),
        f"/tmp/gradio/../{own}",
        "docs/images/first-light.png",
        served.url + here,
    ]
    for given in [*({"path": str(path)} for path in paths), {"path": str(own), "url": here}]:
        kind, said = asked_for(served, {**given, **meta})
        assert kind == "error", given
        assert "this " not in said, said  # the words of the app for a file that it opened
    assert asked_for(served, None)[0] == "complete"


def asked_for(served: Any, upload: Any) -> tuple[str, str]:
    """Whether the server answers, and with what, a request that no client has looked at."""
    call = f"{served.url}/gradio_api/call/vision"
    event = httpx.post(call, json={"data": list({**ASKED, "upload": upload}.values())}).json()["event_id"]
    with httpx.stream("GET", f"{call}/{event}", timeout=60) as lines:
        said = [line for line in lines.iter_lines() if line.startswith(("event: complete", "event: error", "data: "))]
    kind = next(line for line in said if line.startswith("event: ")).removeprefix("event: ")
    return kind, said[-1]


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"scene": 40}, "whole number from 0 to 39"),
        ({"layers": "99"}, "layers 0 to 29"),
        ({"model": "emoji-unet"}, "draws pictures"),
        ({"method": "PAG"}, "PAG"),
        ({"method": "DuoAttention"}, "DuoAttention has no plan"),
    ],
)
def test_what_cannot_be_is_said_in_words(client: Client, changed: dict[str, Any], words: str) -> None:
    with pytest.raises(Exception, match=words):
        client.predict(**{**ASKED, **changed}, api_name="/vision")
