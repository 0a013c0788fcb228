"""The tab of searches, in a real browser: what comes with the package, files of one's own, and where to try it."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from steer_demos import models

pytestmark = pytest.mark.browser

PAG = models.FITTED / "emoji-mmdit" / "PAG"


def test_a_search_is_shown_and_can_be_tried(visit: Any, screenshot: Any) -> None:
    page = visit("?tab=search")
    page.get_by_role("button", name="Heads for colourful pictures").click()
    summary = page.locator("#search-summary")
    summary.get_by_role("heading", name="PAG").wait_for()
    summary.get_by_text("they flatter it").wait_for()
    assert page.locator("#search-ranking tbody tr").count() == 10
    page.get_by_role("caption").filter(has_text="Round 1: gain of every head over no method").wait_for()
    assert page.locator(".thumbnails button").count() == 5
    page.wait_for_function("[...document.images].every(picture => picture.complete)")
    screenshot(page, "search")
    summary.get_by_role("link", name="Try it in the Image tab").click()
    page.get_by_role("button", name="A saved method").click()
    saved = page.get_by_label("Saved method").first
    page.wait_for_function("box => box.value === 'fitted:emoji-mmdit/PAG'", arg=saved.element_handle())


def test_files_of_ones_own_are_shown_and_others_are_refused(visit: Any, tmp_path: Path) -> None:
    page = visit("?tab=search")
    upload = page.locator("input[type=file]:visible, [role=tabpanel]:visible input[type=file]").first
    upload.set_input_files([PAG / "steer.json", PAG / "steer.safetensors"])
    page.locator("tr.file").nth(1).wait_for()  # both have arrived
    page.get_by_role("button", name="Show", exact=True).click()
    page.locator("#search-summary").get_by_role("heading", name="PAG").wait_for()
    assert page.locator("#search-summary").get_by_role("link").count() == 0

    damaged = tmp_path / "steer.safetensors"
    damaged.write_bytes((PAG / "steer.safetensors").read_bytes()[:-1])
    other = visit("?tab=search")
    other.locator("[role=tabpanel]:visible input[type=file]").first.set_input_files([PAG / "steer.json", damaged])
    other.locator("tr.file").nth(1).wait_for()
    other.get_by_role("button", name="Show", exact=True).click()
    other.get_by_text(re.compile("is not the one that was saved with its steer.json")).wait_for()


def test_a_pickle_is_not_opened(served: Any, tmp_path: Path) -> None:
    from gradio_client import Client, handle_file
    from gradio_client.exceptions import AppError

    client = Client(served.url, verbose=False)
    pickle = Path(shutil.copy(PAG / "steer.safetensors", tmp_path / "method.pkl"))
    with pytest.raises(AppError, match=r"Invalid file type|is not opened"):
        client.predict(source="", files=[handle_file(pickle)], api_name="/search")
    found = client.predict(source="fitted:emoji-wan/SparseVDiT", files=None, api_name="/search")
    assert "<h3>SparseVDiT</h3>" in found[0]
    assert "models.fitted('emoji-wan', 'SparseVDiT')" in found[-1]
    with pytest.raises(AppError, match="cannot be opened here"):
        client.predict(source="../../weights", files=None, api_name="/search")
