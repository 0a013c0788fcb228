"""The forms of methods: fields, help and ranges from the dataclass alone, and what is read from them."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Annotated, Any, Literal

import gradio as gr
import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis import settings as tried

import steer
from steer.method import _REGISTRY, Method, Span
from steer_demos import models
from steer_demos.app import forms
from steer_demos.app.fields import Field, fields_of
from steer_demos.app.sources import Sources

METHODS = list(steer.methods())
WORDS = ["", "0.2:0.9", "transformer_blocks.3", "3", "-1", "1e999", "NaN", "null", "true", '"text"', "[", "ä"]
WORDS += ["[1, 2]", "[0]", "[]", "[1, 2, 3]", '["a", "b"]', '{"a": [0]}', "{}", "[[1]]", "[null]", '[{"a": [1]}]']


def field(method: str, name: str) -> Field:
    return next(each for each in fields_of(steer.methods()[method]) if each.name == name)


def component(method: str, name: str, given: Any = None) -> Any:
    return field(method, name).component(given)


@pytest.fixture
def registry() -> Iterator[None]:
    """Methods that a test defines are forgotten after it."""
    before = dict(_REGISTRY)
    yield
    _REGISTRY.clear()
    _REGISTRY.update(before)


@pytest.mark.parametrize("method", METHODS)
def test_every_field_has_help_and_every_number_a_span_with_its_default(method: str) -> None:
    for each in fields_of(steer.methods()[method]):
        assert each.help and not each.help.startswith("see "), each.name
        assert len(each.short_help) <= len(each.help) + 2
        if each.kind == "number":
            assert each.span is not None, each.name
            default = each.default
            assert default is None or not math.isfinite(default) or isinstance(each.component(), gr.Slider), each.name
        if each.kind == "choice":
            assert each.default in each.choices or (each.optional and each.default is None)


def test_a_method_of_one_file_has_a_form_without_a_change_to_the_app(registry: None) -> None:
    @dataclass(kw_only=True)
    class Temperature(Method):
        """Divide the logits by a temperature.

        Args:
            temperature: below 1 sharpens. Above 1 softens.
            plain: a number without a span.
            how: in which way.
            window: tokens on each axis.
            share, rest: of the heads.
            gentle: or not.
        """

        temperature: Annotated[float, Span(0.1, 5)] = 1.0
        plain: float = 2.0
        how: Literal["one", "other"] = "one"
        window: int | Sequence[int] | None = None
        share: Annotated[int | None, Span(1, 4)] = None
        rest: Annotated[int, Span(0, 100, 10)] = 20
        gentle: bool | None = None

    shown = fields_of(steer.methods()["Temperature"])
    own = {each.name: each for each in shown if each.is_own}
    assert list(own) == ["temperature", "plain", "how", "window", "share", "rest", "gentle"]
    assert own["temperature"].help == "below 1 sharpens. Above 1 softens."
    assert own["rest"].help == own["share"].help == "of the heads."
    assert [each.name for each in shown if not each.is_own] == ["layers", "heads", "steps", "rows", "min_tokens"]
    made = {name: each.component() for name, each in own.items()}
    slider = made["temperature"]
    assert (slider.minimum, slider.maximum, slider.value, slider.step) == (0.1, 5, 1.0, 0.01)
    assert isinstance(made["plain"], gr.Number) and made["plain"].value == 2.0
    assert [value for _, value in made["how"].choices] == ["one", "other"]
    assert made["window"].placeholder == "default; a number or a list, [1, 2]"
    assert (made["share"].placeholder, made["share"].value) == ("default; 1 to 4", "")
    assert (made["rest"].step, made["rest"].value) == (10, 20)
    assert [value for _, value in made["gentle"].choices] == ["", True, False]
    filled = {"temperature": 0.5, "window": "[3, 3]", "share": "2", "gentle": False, "how": "other", "plain": ""}
    found = forms.steering(Sources(), "emoji-mmdit", "Temperature", filled)
    assert found.settings() == {"temperature": 0.5, "window": [3, 3], "share": 2, "gentle": False, "how": "other"}
    assert type(found.settings()["share"]) is int


def test_a_number_stands_where_its_component_can_show_it() -> None:
    assert isinstance(component("PAG", "scale"), gr.Slider)
    assert component("PAG", "scale", 2.5).value == 2.5
    outside, between = component("PAG", "scale", 12), component("PAG", "scale", 2.345)
    assert [type(each) for each in (outside, between)] == [gr.Number, gr.Number]
    assert (outside.value, between.value, outside.placeholder) == (12, 2.345, "3.0; 0 to 10")
    sigma = component("SEG", "sigma")
    assert (type(sigma), sigma.value, sigma.placeholder) == (gr.Textbox, "", "inf; 0 to 10")
    assert component("SEG", "sigma", 2.0).value == 2.0
    assert component("SEG", "sigma", "2.5").value == 2.5  # as a box of text wrote it
    assert component("RadialAttention", "decay", "0.25").value == "0.25"
    assert isinstance(component("RadialAttention", "decay"), gr.Textbox)


def test_presets_are_offered_by_name_where_there_are_some() -> None:
    offered = component("PAG", "preset", "my-own")
    assert offered.allow_custom_value and offered.value == "my-own"
    assert ("flux-warm (FLUX)", "flux-warm") in offered.choices
    assert "preset" not in [each.name for each in fields_of(steer.methods()["SEG"])]
    assert forms.settings(steer.PAG, {"preset": "flux-warm"}) == {"preset": "flux-warm"}


def test_text_is_read_as_what_the_field_takes() -> None:
    def read(method: str, **given: Any) -> dict[str, Any]:
        return forms.settings(steer.methods()[method], given)

    heads = {"transformer_blocks.3": [0, 1]}
    assert read("PAG", heads=json.dumps(heads)) == read("PAG", heads=heads) == {"heads": heads}
    assert read("PAG", layers="mid_block") == {"layers": "mid_block"}
    assert read("PAG", layers='["a", "b"]') == {"layers": ["a", "b"]}
    assert read("PAG", steps="3") == {"steps": "3"}  # no number, since a field of steps takes none
    assert read("NeighborhoodAttention", window="5") == {"window": 5}
    assert read("VAR", sink_dims="[507]") == {"sink_dims": [507]}
    assert read("ImbalancedAttention", summary="0.05") == {"summary": 0.05}
    assert read("RadialAttention", key_frame_sink=False, decay=None, block_size="") == {"key_frame_sink": False}
    assert read("StreamingLLM", n_sink=3.0) == {"n_sink": 3}


@pytest.mark.parametrize(
    ("method", "wrong", "words"),
    [
        ("PAG", {"scales": 1}, "PAG has no field 'scales' in a form; it has scale, mode, strength"),
        ("PAG", {"scale": "<b>2</b>"}, "scale is '<b>2</b>'; it may be a number"),
        ("PAG", {"scale": math.inf}, "scale is inf; it may be a number"),
        ("PAG", {"scale": True}, "scale is True"),
        ("PAG", {"mode": "none"}, "mode is 'none'; it may be image, all"),
        ("PAG", {"mode": ["image"]}, r"mode is \['image'\]"),
        ("PAG", {"share_prefix": "yes"}, "share_prefix is 'yes'; it may be yes or no, in JSON true or false"),
        ("StreamingLLM", {"n_sink": 1.5}, "n_sink is 1.5; it may be a whole number"),
        ("NeighborhoodAttention", {"window": "wide"}, r"window is 'wide'; it may be a number or a list, \[1, 2\]"),
        ("PAG", {"steps": [1]}, r"steps is \[1\]; it may be text"),
        ("RetrievalHeads", {"plan": {}}, "no field 'plan' in a form"),
    ],
)
def test_what_a_field_cannot_be_is_said(method: str, wrong: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        forms.settings(steer.methods()[method], wrong)
    with pytest.raises(ValueError, match=words):
        forms.check(method, wrong)


def test_a_check_asks_the_method_too() -> None:
    forms.check("PAG", {"strength": 0.5})
    with pytest.raises(ValueError, match=r"strength=5 must lie in \[0, 1\]"):
        forms.check("PAG", {"strength": 5})
    with pytest.raises(ValueError, match="there is no method Magic; there are ACT"):
        forms.check("Magic", {})


def produced(each: Field) -> st.SearchStrategy[Any]:
    """What the component of a field may hold, and what a link may say that it holds."""
    kinds: Mapping[str, st.SearchStrategy[Any]] = {
        "flag": st.booleans(),
        "choice": st.sampled_from([*each.choices, "none of them"]),
        "number": st.floats() | st.integers() | st.integers(-1, 3) | st.floats(0, 2),
        "text": st.sampled_from([*WORDS, *(text for _, text in each.offered)]) | st.text(max_size=5),
    }
    return st.one_of(kinds[each.kind], st.sampled_from(["", None]))


@pytest.mark.parametrize("method", METHODS)
@tried(max_examples=25, derandomize=True, deadline=None)
@given(data=st.data())
def test_whatever_a_form_holds_makes_the_method_or_an_error_in_words(method: str, data: st.DataObject) -> None:
    shown = {each.name: produced(each) for each in fields_of(steer.methods()[method])}
    filled = data.draw(st.fixed_dictionaries({}, optional=shown))
    try:
        found = forms.settings(steer.methods()[method], filled)
        made = steer.methods()[method](**found)
    except (ValueError, TypeError) as error:
        assert str(error)
        return
    assert set(found) == {name for name, value in filled.items() if value not in ("", None)}
    assert made.describe()


def test_guidance_gets_the_layers_that_suit_the_embedded_model() -> None:
    assert forms.steering(Sources(), "emoji-mmdit", "PAG", {}).layers is not None
    assert forms.steering(Sources(), "emoji-mmdit", "PAG", {"preset": "sd3-dark"}).layers is None
    assert forms.steering(Sources(), "emoji-mmdit", "PAG", {"layers": "*.0"}).layers == "*.0"


def test_a_saved_method_is_changed_by_the_form(tmp_path: Any) -> None:
    steer.PAG(scale=4.0, strength=0.5).save(str(tmp_path / "mine"))
    sources = Sources(folders=(tmp_path,))
    found = forms.steering(sources, "emoji-mmdit", "PAG", {"strength": 0.25}, "mine")
    assert found.settings() == {"scale": 4.0, "strength": 0.25}
    with pytest.raises(ValueError, match="mine holds PAG, and SEG is chosen: choose PAG"):
        forms.steering(sources, "emoji-mmdit", "SEG", {}, "mine")


@pytest.mark.parametrize(
    ("model", "method", "given", "saved"),
    [
        *((model, method, {}, "") for model, method in models.list_fitted() if method != "PAG"),
        ("emoji-mmdit", "PAG", {}, "fitted:emoji-mmdit/PAG"),
        ("emoji-mmdit", "PAG", {"strength": 0.5}, "fitted:emoji-mmdit/PAG"),
        ("emoji-vlm", "VAR", {"sink_dims": "[507]", "p": 0.5}, ""),
        ("smollm2-135m-instruct", "MoA", {}, "mine"),
        ("smollm2-135m-instruct", "MoA", {"evict": False, "min_tokens": 40}, "mine"),
        ("emoji-mmdit", "PAG", {"scale": 1.5}, ""),
    ],
)
def test_the_method_in_python_is_the_method_of_the_form(
    model: str, method: str, given: dict[str, Any], saved: str, tmp_path: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    if saved == "mine":
        monkeypatch.chdir(tmp_path)
        steer.load(models.fitted("smollm2-135m-instruct", "MoA")).save("mine")
    made = forms.steering(Sources(folders=(tmp_path,)), model, method, given, saved)
    line = forms.in_python(model, made, given, saved)
    again = eval(line, {"steer": steer, "models": models, "dataclasses": dataclasses})
    assert type(again) is type(made)
    for each, folder in ((made, "form"), (again, "line")):
        each.save(str(tmp_path / folder))
    fields = (json.loads((tmp_path / folder / "steer.json").read_text())["fields"] for folder in ("form", "line"))
    assert next(fields) == next(fields)
    for file in (tmp_path / "form").iterdir() if "steer.load" in line else ():
        assert file.read_bytes() == (tmp_path / "line" / file.name).read_bytes(), file.name
    assert str(tmp_path) not in line
