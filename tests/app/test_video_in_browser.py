"""The tab of clips, in a real browser and through `gradio_client`."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from urllib.parse import urlencode

import imageio.v3 as imageio
import pytest
from gradio_client import Client

pytestmark = pytest.mark.browser

PLAYER = """() => {
  const clip = document.querySelector("#video-clip video");
  return clip && clip.readyState >= 3 ? [clip.duration, clip.videoWidth, clip.videoHeight, clip.loop] : null;
}"""


def link(**settings: Any) -> str:
    return "?" + urlencode({"tab": "video", "settings": json.dumps(settings)})


def draw(page: Any) -> Any:
    return page.get_by_role("button", name="Draw the clip", exact=True)


def test_two_clips_play_beside_each_other_above_the_mask(visit: Any, screenshot: Any) -> None:
    page = visit("?tab=video")
    page.get_by_role("button", name="Radial", exact=True).locator("visible=true").click()
    duration, width, height, loops = page.wait_for_function(PLAYER).json_value()
    # three clips of 64 x 64, each pixel as four by four, and 17 frames at 8 a second
    assert (width, height, loops) == (3 * 256 + 2 * 8, 256 + 30, True) and abs(duration - 17 / 8) < 0.05
    page.wait_for_function("""() => document.querySelector("#video-clip video").currentTime > 0.5""")  # by itself
    figures = page.locator("#video-figures")
    for row in ("speed-up", "PSNR", "39.5 % of the attention map while it was on", "at best"):
        figures.get_by_text(row).first.wait_for()
    page.locator("#video-mask-caption").get_by_text("36 x 36 blocks of 16 tokens").wait_for()
    picture = page.locator("#video-mask img")
    assert picture.evaluate("picture => [picture.naturalWidth, picture.complete]") == [28 + 12 + 36 * 14 + 2, True]
    page.evaluate(
        """() => { const at = document.querySelector("#video-clip video"); at.pause(); at.currentTime = 1.5 }"""
    )
    page.wait_for_function("""() => !document.querySelector("#video-clip video").seeking""")
    screenshot(page, "video")


def test_stop_ends_it_and_the_next_run_is_whole(visit: Any) -> None:
    page = visit(link(prompt="a car", steps=50, method="RadialAttention", settings={}))
    draw(page).click()
    page.get_by_text("without -").first.wait_for()
    page.get_by_role("button", name="Stop", exact=True).locator("visible=true").click()
    page.get_by_text("without -").first.wait_for(state="hidden")
    assert page.evaluate(PLAYER) is None
    page.goto(page.url.split("?")[0] + link(prompt="a car", steps=1, method="PAG", settings={"scale": 2}))
    page.locator("#video-mask").wait_for(state="hidden")  # guidance has no blocks
    draw(page).click()
    page.wait_for_function(PLAYER)
    page.locator("#video-figures").get_by_text("speed-up").wait_for()


def test_a_clip_that_is_too_large_is_refused_in_words(visit: Any) -> None:
    page = visit(link(height=4096, width=4096))
    draw(page).click()
    page.get_by_text("is too large here: at most 557,056").wait_for()


def test_a_client_gets_the_clip_as_a_file(served: Any) -> None:
    asked = {"model": "emoji-wan", "prompt": "a car", "seed": 1, "steps": 2, "guidance_scale": 1, "frames": 9}
    method = {"method": "NeighborhoodAttention", "settings": {"window": [3, 5, 5]}, "saved": "", "mask_layer": 2}
    client = Client(served.url, verbose=False)
    found = client.predict(**asked, height=0, width=32, **method, api_name="/video")
    clip, figures, mask, caption, summary, code = found
    film = imageio.imread(clip["video"] if isinstance(clip, dict) else clip, plugin="FFMPEG")
    assert film.shape == (9, 256 + 30, 3 * 128 + 2 * 8, 3)
    assert "speed-up" in figures and "`blocks.2.attn1`" in caption and Path(mask).suffix == ".png"
    assert "window=(3, 5, 5)" in summary and "num_frames=9, max_sequence_length=16" in code
