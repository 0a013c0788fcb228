"""The scenes that come with the package are those that their seeds draw, and need nothing that draws."""

from __future__ import annotations

import sys

import numpy as np
import pytest

from steer_demos import emoji, scenes
from steer_demos.scenes import EVALUATION_SEED


def test_they_are_what_their_seeds_draw() -> None:
    pytest.importorskip("resvg_py")
    assert len(scenes.ready_scenes()) == scenes.READY
    for number in (0, 13, 39):
        ready, drawn = scenes.draw_scene(EVALUATION_SEED + number), scenes._draw_scene(EVALUATION_SEED + number)
        assert ready.things == drawn.things
        assert np.array_equal(ready.pixels, drawn.pixels)


def test_they_need_nothing_that_draws(monkeypatch: pytest.MonkeyPatch) -> None:
    scenes.ready_scenes.cache_clear()
    emoji.render_all.cache_clear()
    monkeypatch.setitem(sys.modules, "resvg_py", None)
    assert [thing.name for thing in scenes.draw_scene(EVALUATION_SEED + 20).things] == ["penguin", "cat face"]
    with pytest.raises(ImportError):
        scenes.draw_scene(EVALUATION_SEED + scenes.READY)
