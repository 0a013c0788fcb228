"""The tab of kernels, in a real browser."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest

from steer_kernels import patterns

pytestmark = pytest.mark.browser


def shows(page: Any, mask: Any) -> None:
    """Wait until the figures are those of this mask."""
    page.locator("#kernels-figures").get_by_text(f"{mask.density:.2%} of the blocks").wait_for()


def test_the_mask_follows_the_form(visit: Any) -> None:
    page = visit("?tab=kernels")
    grid = {"grid": (8, 16, 24), "block_size": 64}
    shows(page, patterns.neighborhood(**grid, window=(3, 5, 9)))
    page.get_by_label("number input for window: rows").fill("9")
    page.get_by_label("number input for window: rows").press("Tab")
    shows(page, patterns.neighborhood(**grid, window=(3, 9, 9)))
    page.get_by_label("number input for window: frames").focus()
    page.get_by_label("range slider for window: frames").press("ArrowLeft")
    shows(page, patterns.neighborhood(**grid, window=(2, 9, 9)))
    page.get_by_label("number input for Height").fill("6")  # the window moves into the smaller grid
    page.get_by_label("number input for Height").press("Tab")
    shows(page, patterns.neighborhood(grid=(8, 6, 24), window=(2, 6, 9), block_size=64))
    assert page.get_by_label("number input for window: rows").input_value() == "6"
    page.get_by_label("Pattern").click()
    page.get_by_role("option", name="circular").click()
    shows(page, patterns.circular(grid=(6, 24), radius=8, block_size=64))
    assert page.get_by_label("number input for Frames").input_value() == "1"


def test_hunyuanvideo_a_click_and_what_cannot_be_drawn(visit: Any, screenshot: Any) -> None:
    page = visit("?tab=kernels")
    page.get_by_role("button", name="Radial, HunyuanVideo", exact=True).click()
    mask = patterns.radial(tokens_per_frame=3600, frames=33, decay=0.95, key_frame_sink=False, text_tokens=256)
    shows(page, mask)
    page.locator("#kernels-query img").click(position={"x": 20, "y": 60})
    figures = page.locator("#kernels-figures")
    figures.get_by_text(re.compile(r"^frame 0, row")).wait_for()
    assert page.get_by_label("Query: frame").input_value() == "0"
    page.get_by_label("Block size").click()
    page.get_by_role("option", name="16", exact=True).click()
    figures.get_by_text("This cannot be drawn: 119,056 tokens in blocks of 16 are too many").wait_for()
    page.get_by_role("button", name="Sliding tiles", exact=True).click()
    shows(page, patterns.sliding_tile(grid=(12, 16, 24), tile=(4, 4, 4), window=(4, 12, 12), block_size=64))
    page.get_by_role("button", name="Measure here").click()
    page.locator("#kernels-measured").get_by_text("against dense attention with this mask").wait_for()
    screenshot(page, "kernels", full_page=True)


def test_a_published_model_fills_the_grid_in(visit: Any) -> None:
    page = visit("?tab=kernels&settings=" + json.dumps({"pattern": "frames", "settings": {"reach": 2}}))
    shows(page, patterns.frames(tokens_per_frame=384, frames=8, reach=2, block_size=64))
    page.get_by_label("Take the grid of a published model").click()
    page.get_by_role("option", name="cogvideox-2b").click()
    text = {"text_tokens": 226, "text_first": True}
    shows(page, patterns.frames(tokens_per_frame=1350, frames=13, reach=2, block_size=64, **text))


def test_from_python(served: Any) -> None:
    gradio_client = pytest.importorskip("gradio_client")
    client = gradio_client.Client(served.url, verbose=False)
    given = ["radial", 6, 8, 16, 0, "64", {"decay": 0.3, "key_frame_sink": True}, 2, 3, 4, 0.5]
    sheet, picture, figures, code = client.predict(*given, api_name="/kernels")
    mask = patterns.radial(tokens_per_frame=128, frames=6, decay=0.3, key_frame_sink=True, block_size=64)
    assert f"**{mask.density:.2%}** of the blocks" in figures
    assert "patterns.radial(" in code and sheet and picture
    with pytest.raises(gradio_client.exceptions.AppError, match="decay=99 must be a number from 0 to 2"):
        client.predict("radial", 6, 8, 16, 0, "64", {"decay": 99}, 2, 3, 4, 0.5, api_name="/kernels")
    timed = client.predict(*given[:7], api_name="/measure")
    assert "medians of 3 runs" in timed
