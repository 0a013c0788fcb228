"""Settings from links and JSON: restored exactly, or left out with words."""

from __future__ import annotations

import json
from typing import Any

import gradio as gr
import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as tried

from steer_demos.app import forms, sharing
from steer_demos.app.sharing import Shared

JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
    max_leaves=8,
)
NAMES = ("prompt", "seed", "steps", "kind", "layers", "flag", "method", "settings", "saved")


@pytest.fixture(scope="module")
def shared() -> Shared:
    """A tab with components of every kind."""
    inputs = {
        "prompt": gr.Textbox("", max_length=30),
        "seed": gr.Number(0, precision=0),
        "steps": gr.Slider(1, 50, 20, step=1),
        "kind": gr.Radio(["one", "other"], value="one"),
        "layers": gr.CheckboxGroup(["first", "last"]),
        "flag": gr.Checkbox(False),
        "method": gr.Dropdown(["PAG", "SEG"], value="PAG"),
        "settings": gr.JSON({}),
        "saved": gr.Textbox(""),
    }
    return Shared("image", inputs, gr.JSON(forms.start_of({})))


GIVEN: dict[str, Any] = {
    "prompt": 'a "red" <b>apple</b> & ä',
    "seed": 2**31,
    "steps": 2,
    "kind": "other",
    "layers": ["last"],
    "flag": True,
    "method": "SEG",
    "settings": {"sigma": 2.5, "heads": {"transformer_blocks.3": [0]}},
    "saved": "mine",
}


def test_what_is_restored_is_what_was_shared(shared: Shared) -> None:
    read = sharing.read(json.dumps({"tab": "image", **GIVEN}))
    *values, start = shared.restore(read)
    assert dict(zip(shared.inputs, values, strict=True)) == GIVEN
    assert start[1] == GIVEN["settings"]
    assert shared.restore(read)[-1] != start  # or a form that was changed in between would stay as it is


def test_what_is_not_given_stays_as_it_is_but_a_method_brings_its_own_settings(shared: Shared) -> None:
    *values, start = shared.restore({"seed": 3})
    assert [value for name, value in zip(NAMES, values, strict=True) if name != "seed"] == [gr.skip()] * 8
    assert start == gr.skip()
    found = dict(zip(NAMES, shared.restore({"method": "SEG"}), strict=False))
    assert (found["method"], found["settings"], found["saved"]) == ("SEG", {}, "")


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"tab": "video"}, "these are settings of the tab 'video'; this is 'image'"),
        ({"frames": 3}, "the image tab has no setting 'frames'; it has prompt, seed"),
        ({"prompt": 3}, "prompt is 3; it may be a text of at most 30 characters"),
        ({"prompt": "a" * 31}, "at most 30 characters"),
        ({"seed": "0"}, "seed is '0'; it may be a whole number"),
        ({"seed": 1.5}, "seed is 1.5; it may be a whole number"),
        ({"seed": True}, "seed is True"),
        ({"seed": 10**400}, "it may be a whole number"),
        ({"steps": 51}, "steps is 51; it may be a whole number from 1 to 50"),
        ({"steps": 1.5}, "steps is 1.5"),
        ({"steps": None}, "steps is None"),
        ({"kind": "third"}, "kind is 'third'; it may be one, other"),
        ({"layers": "last"}, "layers is 'last'; it may be a list of first, last"),
        ({"layers": ["last", "third"]}, "it may be a list of first, last"),
        ({"flag": 1}, "flag is 1; it may be true or false"),
        ({"settings": {"scale": 2}}, 'give "method" too'),
        ({"method": "Magic"}, "method is 'Magic'; it may be PAG, SEG"),
        ({"method": "PAG", "settings": [1]}, r"settings is \[1\]; it may be an object"),
        ({"method": "PAG", "settings": {"sigma": 1}}, "PAG has no field 'sigma' in a form"),
        ({"method": "PAG", "settings": {"scale": "<img src=x onerror=alert(1)>"}}, "scale is '<img"),
        ({"method": "PAG", "settings": {"strength": 5}}, r"strength=5 must lie in \[0, 1\]"),
    ],
)
def test_what_cannot_be_restored_is_said(shared: Shared, given: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        shared.restore(given)


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "the settings are not JSON"),
        ("{'seed': 1}", "the settings are not JSON"),
        ("[" * 19_000, "the settings are not JSON"),
        ("1" * 5_000, "the settings are not JSON"),
        (r'{"prompt": "\ud800"}', "the settings are not JSON"),
        ("[1]", "the settings are a list; write an object"),
        ('{"prompt": "' + "a" * 20_000 + '"}', "at most 20000 are read"),
    ],
)
def test_what_is_no_json_object_is_said(text: str, words: str) -> None:
    with pytest.raises(ValueError, match=words):
        sharing.read(text)


@tried(max_examples=150, derandomize=True, deadline=None)
@given(
    found=st.dictionaries(st.sampled_from(NAMES), JSON)
    | st.dictionaries(st.sampled_from(NAMES), JSON).map(GIVEN.__or__)
)
def test_any_json_is_restored_or_refused_in_words(shared: Shared, found: dict[str, Any]) -> None:
    try:
        values = shared.restore(sharing.read(json.dumps(found)))
    except ValueError as error:
        assert str(error)
        return
    restored = dict(zip(shared.inputs, values, strict=False))
    assert {name: restored[name] for name in found} == found


def test_a_link_opens_its_own_tab_alone(shared: Shared, monkeypatch: pytest.MonkeyPatch) -> None:
    other, said = Shared("kernels", {"seed": gr.Number(0)}), []
    monkeypatch.setattr(gr, "Warning", said.append)  # outside of an event it has no page to be shown on
    tab, *values = sharing.opened([other, shared], {"tab": "image", "settings": '{"seed": 7}'})
    assert tab.selected == "image"
    assert (values[0], values[1 + NAMES.index("seed")]) == (gr.skip(), 7)
    for query, words in (
        ({"tab": "<b>"}, "the link asks for a tab that does not exist; there are kernels, image"),
        ({"tab": "image", "settings": '{"prompt": "x", "kind": "<b>"}'}, "left out: kind is '&lt;b&gt;'"),
    ):
        _, *values = sharing.opened([other, shared], query)
        assert values == [gr.skip()] * 11
        assert words in said.pop()
    assert not said


def test_an_example_that_cannot_be_is_found_as_the_page_is_made(shared: Shared) -> None:
    wrong = Shared("image", shared.inputs, shared.start, {"Too many": {"steps": 51}})
    with gr.Blocks(), pytest.raises(ValueError, match="steps is 51"):
        sharing.draw_examples(wrong, gr.Row(), print, [])
