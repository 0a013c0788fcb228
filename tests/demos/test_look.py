"""`steer look`: what is read is the model's own attention, and it is painted where the tokens look."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import pytest
import tiny_vision_language as vision_language
import torch
import typer
from PIL import Image, ImageOps
from tiny_emoji_vlm import picture, tiny_model, tiny_processor
from tiny_text import language_model
from tiny_text import tokenizer as make_tokenizer
from transformers import CLIPImageProcessorPil, SmolVLMImageProcessorPil
from typer.testing import CliRunner

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.look import Look, as_seen, look, look_at, open_picture
from steer_demos.look_plots import draw_pictures, draw_text
from steer_demos.models import smollm2
from steer_demos.models.emoji_vlm import prompt
from steer_demos.scenes import EVALUATION_SEED, draw_scene
from steer_demos.vlm_pointing import play, trials
from steer_patches.site import Call, Next

app = typer.Typer()
app.command()(look)
QUESTION = "Where is it?"


@pytest.fixture(scope="module")
def answering() -> tuple[Any, Any]:
    return tiny_model(), tiny_processor()


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory, answering: tuple[Any, Any]) -> dict[str, str]:
    """A vision-language and a language model as a user has them, and two pictures."""
    root = tmp_path_factory.mktemp("look")
    for name, loaded in {"sees": answering, "reads": (language_model(), make_tokenizer())}.items():
        for part in loaded:
            part.save_pretrained(root / name)
    Image.fromarray(picture(0)).save(root / "one.png")
    Image.fromarray(picture(1)).resize((60, 120)).save(root / "two.png")
    (root / "words.txt").write_text("no picture")
    (root / "half.png").write_bytes((root / "one.png").read_bytes()[:2000])
    return {path.stem: str(path) for path in root.iterdir()}


def own_maps(model: Any, inputs: dict[str, Any]) -> torch.Tensor:
    """(layers, heads, S, S), as the eager model itself returns them."""
    model.set_attn_implementation("eager")
    with torch.no_grad():
        maps = torch.stack(model(**inputs, output_attentions=True, use_cache=False).attentions)[:, 0]
    model.set_attn_implementation("sdpa")
    return maps.double()


def test_it_reads_the_rows_that_make_the_answer(answering: tuple[Any, Any]) -> None:
    model, processor = answering
    image = Image.fromarray(picture())
    found = look_at(model, processor, QUESTION, [image], max_new_tokens=4)
    inputs = processor(images=image, text=prompt(processor, QUESTION), return_tensors="pt")
    tokens = inputs["input_ids"].shape[1]
    sequence = model.generate(**inputs, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    words = [processor.tokenizer.decode([token]) for token in sequence[0, tokens:].tolist()]
    assert found.words == words[: len(found.words)] and found.words
    inputs["input_ids"], inputs["attention_mask"] = sequence, torch.ones_like(sequence)
    maps = own_maps(model, inputs)
    rows, seen = slice(tokens - 1, tokens - 1 + len(found.words)), sequence[0] == processor.image_token_id
    assert found.columns == tuple(seen.nonzero().flatten().tolist())
    assert torch.allclose(found.weights, maps[:, :, rows][..., seen].mean((0, 1)), atol=1e-6)
    for layers in ("1", "-1", "1:", "model.language_model.layers.1"):
        some = look_at(model, processor, QUESTION, [image], layers=layers, head=2, max_new_tokens=4)
        assert torch.allclose(some.weights, maps[1, 2, rows][:, seen], atol=1e-6)
    assert "_steer_state" not in model.__dict__


def test_a_language_model_looks_at_all_it_has_read() -> None:
    model, tokenizer = language_model(), make_tokenizer()
    found = look_at(model, tokenizer, "Where is it?", max_new_tokens=3, raw=True)
    assert "".join(found.read).startswith("Where is it?") and found.pictures is None
    assert len(found.read) == len(tokenizer("Where is it?").input_ids) + len(found.words) - 1
    assert torch.allclose(found.weights.sum(-1), torch.ones(len(found.words), dtype=torch.float64), atol=1e-6)
    asked = look_at(model, tokenizer, "Where is it?", max_new_tokens=3)
    assert "".join(asked.read).startswith("<user>\nWhere is it?<end>\n<assistant>\n")


def test_the_end_is_no_part_of_the_answer() -> None:
    model, tokenizer = language_model(), make_tokenizer()
    given = tokenizer("Where is it?", return_tensors="pt")
    tokens = model.generate(**given, max_new_tokens=6, do_sample=False)[0, given["input_ids"].shape[1] :].tolist()
    until = next(place for place, token in enumerate(tokens) if place and token not in tokens[:place])
    model.generation_config.eos_token_id = [tokens[until]]
    found = look_at(model, tokenizer, "Where is it?", max_new_tokens=6, raw=True)
    assert len(found.words) == len(found.weights) == until
    assert found.columns == tuple(range(given["input_ids"].shape[1] + until - 1))


@dataclass(kw_only=True)
class Halfway(Method, register=False):
    """Half of the attention, half of the values: A' = (A + I) / 2."""

    stage: ClassVar[str] = "kernel"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        own = call.expanded()[1]
        return (next(call) + own[:, :, -call.query.shape[2] :]) / 2


def test_a_steered_look_is_at_what_the_method_makes(answering: tuple[Any, Any]) -> None:
    """At the last layer, which nothing comes after: the answer's queries keep half of what they gave to pictures."""
    model, processor = answering
    image, last = Image.fromarray(picture()), "model.language_model.layers.1"
    plain = look_at(model, processor, QUESTION, [image], layers=last, max_new_tokens=1)
    steered = look_at(model, processor, QUESTION, [image], layers=last, method=Halfway(layers=last), max_new_tokens=1)
    assert torch.allclose(steered.weights, plain.weights / 2, atol=1e-6)


def test_two_pictures(answering: tuple[Any, Any]) -> None:
    model, processor = answering
    images = [Image.fromarray(picture(seed)) for seed in (0, 1)]
    found = look_at(model, processor, QUESTION, images, max_new_tokens=2)
    assert [len(found.boxes(number)[0]) for number in (0, 1)] == [36, 36]
    assert found.on(0) + found.on(1) == pytest.approx(float(found.weights.mean(0).sum()))
    assert found.on(0) != pytest.approx(found.on(1), rel=1e-3)


def look_of(name: str) -> Look:
    """Where the last token of a prompt with two pictures looks."""
    given = vision_language.inputs(name, vision_language.TWO_PICTURES)
    model = vision_language.model_of(name)
    with torch.no_grad(), steer.capture(model, columns="image", queries="last") as captured:
        model(**given)
    weights = torch.stack(list(captured.maps.values())).double().mean(0)[0]
    return Look("", ["x"], weights, [], captured.tokens, captured.pictures)


@pytest.mark.parametrize("name", vision_language.MODELS)
def test_heat_is_where_the_tokens_show_something(name: str) -> None:
    """Its mean is the attention on the picture, also where tiles lie over the whole of it, and its peak a token's."""
    found = look_of(name)
    for number in (0, 1):
        columns, boxes = found.boxes(number)
        heat = found.heat(number, (96, 192))
        assert float(heat.mean()) == pytest.approx(found.on(number), rel=0.02) and heat.min() > 0
        one = Look("", ["x"], torch.zeros_like(found.weights), [], found.columns, found.pictures)
        one.weights[0, columns[-1]] = 1.0
        left, top, right, bottom = boxes[-1].tolist()
        y, x = (one.heat(number, (96, 192)) > 0).nonzero().T
        assert x.min() / 192 == pytest.approx(left, abs=0.01) and (x.max() + 1) / 192 == pytest.approx(right, abs=0.01)
        assert y.min() / 96 == pytest.approx(top, abs=0.01) and (y.max() + 1) / 96 == pytest.approx(bottom, abs=0.01)
        level = found.relative_to(found).heat(number, (96, 192), relative=True)
        assert torch.allclose(level, torch.ones_like(level))


def test_the_picture_that_is_drawn_is_the_one_that_was_given(answering: tuple[Any, Any]) -> None:
    """CLIP's processor cuts out the middle; SigLIP's takes all of it, as do those that make tiles."""
    wide = np.zeros((48, 144, 3), np.uint8)
    wide[:, 48:96] = 200
    wide[:24, :, 0] = 255
    image = Image.fromarray(wide)
    _, processor = answering
    assert as_seen(processor, image) is image

    class Cutting:
        image_processor = CLIPImageProcessorPil(size={"shortest_edge": 96}, crop_size={"height": 96, "width": 96})

    seen = np.asarray(as_seen(Cutting, image))
    assert seen.shape == (96, 96, 3) and (seen[60:, 4:-4] == 200).all() and (seen[:36, :, 0] > 250).all()

    class Tiling:
        image_processor = SmolVLMImageProcessorPil(size={"longest_edge": 96}, max_image_size={"longest_edge": 48})

    assert as_seen(Tiling, image) is image


def test_drawn_heat_covers_the_picture_where_it_is_hot(answering: tuple[Any, Any]) -> None:
    model, processor = answering
    image = Image.new("RGB", (96, 96), (90, 90, 90))
    found = look_at(model, processor, QUESTION, [image], max_new_tokens=2)
    found.weights[:] = 0
    found.weights[:, 35] = 0.5  # the lower right corner
    drawn = np.asarray(draw_pictures({"unsteered": found}, [image], QUESTION), int)
    left, top = 12 + 240 + 12, 12 + 20 + 20
    panel = drawn[top : top + 240, left : left + 240]
    red = panel[..., 0] - panel[..., 2]
    assert (red[200:, 200:] > 100).all() and not red[:200].any() and not red[:, :200].any()
    more = draw_pictures({"unsteered": found, "steered": found}, [image], QUESTION, tokens=len(found.words) > 1)
    assert more.height > drawn.shape[0] + 240


def test_drawn_text_is_hot_where_it_is_read() -> None:
    found = look_at(language_model(), make_tokenizer(), "Where is it?", max_new_tokens=1, raw=True)
    colours = []
    for hot in (1, len(found.read) - 1):
        found.weights[:] = 0
        found.weights[:, [0, hot]] = 0.5
        drawn = np.asarray(draw_text({"unsteered": found}), int)
        colours.append(np.where((drawn[..., 0] - drawn[..., 2] > 100)[32:52])[1])
    assert colours[0].mean() < colours[1].mean()


@pytest.mark.parametrize(
    "arguments",
    [
        ("sees", "one", QUESTION),
        ("sees", "one", "two", QUESTION, "--tokens", "--layers", "0", "--head", "1"),
        ("sees", "one", QUESTION, "--relative", "Describe the image."),
        ("sees", "one", QUESTION, "--method", "StreamingLLM", "--set", "n_recent=8", "--set", "evict=false"),
        ("reads", QUESTION, "--tokens"),
        ("reads", "--text", QUESTION),
    ],
)
def test_the_command(arguments: tuple[str, ...], folders: dict[str, str], tmp_path: Path) -> None:
    output = tmp_path / "new" / "look.png"
    given = [folders.get(argument, argument) for argument in arguments]
    result = CliRunner().invoke(app, [*given, "--max-new-tokens", "3", "--output", str(output)])
    assert result.exception is None, result.output
    with Image.open(output) as drawn:
        assert "unsteered: " in result.output and drawn.width >= 640
    assert ("StreamingLLM: " in result.output) == ("StreamingLLM" in arguments)


def fails(*arguments: str) -> Callable[[dict[str, str]], str]:
    return lambda folders: str(CliRunner().invoke(app, [folders.get(a, a) for a in arguments]).exception)


@pytest.mark.parametrize(
    ("run", "message"),
    [
        (fails("sees", "nowhere.png", QUESTION), "there is no picture nowhere.png"),
        (fails("sees", "words", QUESTION), "is no picture that can be opened"),
        (fails("sees", "half", QUESTION), "half.png is no picture that can be opened (image file is truncated"),
        (fails("sees", "scene:x", QUESTION), "scene:7"),
        (fails("sees", "one"), "give the question at last"),
        (fails("sees", "one", " "), "the question is empty"),
        (fails("sees", QUESTION), "sees pictures: give one"),
        (fails("reads", "one", QUESTION), "LlamaForCausalLM reads text and takes no pictures"),
        (fails("reads", QUESTION, "--relative", "Hi"), "two looks at the same pictures"),
        (fails("sees", "one", QUESTION, "--relative", " "), "--relative is empty"),
        (fails("sees", "one", QUESTION, "--output", "look.txt"), "ends in .png"),
        (fails("reads", QUESTION, "--method", "VHR"), "VHR"),
        (fails("sees", "one", QUESTION, "--layers", "7"), "has layers 0 to 1"),
        (fails("sees", "one", QUESTION, "--layers", "nothing"), "matches no"),
        (fails("sees", "one", QUESTION, "--head", "4"), "heads 0 to 3"),
        (fails("sees", "one", QUESTION, "--method", "Nothing"), "there is no method Nothing"),
        (fails("emoji-mmdit", QUESTION), "answers nothing"),
    ],
)
def test_errors_in_words(run: Callable[[dict[str, str]], str], message: str, folders: dict[str, str]) -> None:
    assert message in run(folders)


def test_a_refused_method_is_refused_before_anything_is_answered(folders: dict[str, str]) -> None:
    result = CliRunner().invoke(app, [folders["sees"], folders["one"], QUESTION, "--method", "PAG"])
    assert "PAG guides denoisers" in str(result.exception)
    assert "unsteered" not in result.output


def test_a_method_gets_the_processor_where_there_is_a_chat_template(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    applied: list[Any] = []
    monkeypatch.setattr(
        steer, "apply", lambda model, method, apply=steer.apply: applied.append(method) or apply(model, method)
    )
    asked = ["--method", "GIFT", "--set", "alpha=2", "--max-new-tokens", "1", "--output", str(tmp_path / "look.png")]
    assert CliRunner().invoke(app, [folders["sees"], folders["one"], QUESTION, *asked]).exception is None
    assert {(method.alpha, method.after > 0) for method in applied} == {(2, True)}
    applied.clear()
    raw = ["--text", "<image>" + QUESTION]
    assert CliRunner().invoke(app, [folders["sees"], folders["one"], *raw, *asked]).exception is None
    assert {method.after for method in applied} == {0}


def test_a_photograph_stands_upright(tmp_path: Path) -> None:
    """Cameras write how they were held; the processor must not turn what is drawn unturned."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (40, 20)).save(tmp_path / "photo.jpg", exif=exif)
    opened = open_picture(str(tmp_path / "photo.jpg"))
    assert opened.size == ImageOps.exif_transpose(opened).size == (20, 40)


def test_scenes_need_no_file() -> None:
    pytest.importorskip("resvg_py")
    assert np.array_equal(np.asarray(open_picture(f"scene:{EVALUATION_SEED}")), draw_scene(EVALUATION_SEED).pixels)


@pytest.mark.slow
def test_emoji_vlm_looks_at_what_it_is_asked_about() -> None:
    pytest.importorskip("resvg_py")
    try:
        smollm2.folder()
    except ImportError as error:
        pytest.skip(str(error))
    report = play(*models.load("emoji-vlm"), trials(16))
    assert report["trials"] > 10
    assert report["all layers"]["hit"]["mean"] > 0.3 > 2 * report["chance"]["mean"]
