"""The tab of pictures with questions, without a browser: what may be uploaded, and what is asked of the model."""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_emoji_vlm import picture, tiny_model, tiny_processor

import steer
from steer_demos.app import forms, vision
from steer_demos.app.jobs import Job, Stopped
from steer_demos.app.stage import Loaded
from steer_demos.look import _inputs, look_at, open_picture

QUESTION = "Where is it?"
TURNED = 6  # the Exif orientation of a camera that was held upright


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded("tiny", "vision", tiny_model(), tiny_processor())


@pytest.fixture
def seen() -> Image.Image:
    return Image.fromarray(picture(0))


def png_header(width: int, height: int) -> bytes:
    """A PNG file that claims a size and holds no pixels."""

    def chunk(kind: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


def encoded(picture: Image.Image, format: str, **options: Any) -> bytes:
    file = io.BytesIO()
    picture.save(file, format, **options)
    return file.getvalue()


def upload(folder: Path, data: bytes) -> str:
    path = folder / "upload.png"
    path.write_bytes(data)
    return str(path)


@pytest.mark.parametrize("format", ["PNG", "JPEG", "WEBP"])
def test_an_upload_is_turned_upright(tmp_path: Path, format: str) -> None:
    pixels = np.zeros((40, 20, 3), np.uint8)
    pixels[:20] = 255  # white on top
    exif = Image.Exif()
    exif[0x0112] = TURNED
    lying = Image.fromarray(pixels).rotate(90, expand=True)  # as the camera stores it
    found = np.asarray(vision.open_upload(upload(tmp_path, encoded(lying, format, exif=exif))))
    assert found.shape == (40, 20, 3)
    assert found[:15].min() > 200
    assert found[25:].max() < 50


def test_a_large_picture_is_made_smaller_and_a_transparent_one_opened(tmp_path: Path) -> None:
    large = Image.new("RGBA", (3000, 1500), (255, 0, 0, 128))
    found = vision.open_upload(upload(tmp_path, encoded(large, "PNG")))
    assert (found.size, found.mode) == ((1024, 512), "RGB")


@pytest.mark.filterwarnings("ignore::PIL.Image.DecompressionBombWarning")
@pytest.mark.parametrize(("width", "height"), [(4097, 4096), (12_000, 12_000), (60_000, 60_000)])
def test_a_size_that_is_too_large_is_refused_before_anything_is_decoded(
    tmp_path: Path, width: int, height: int
) -> None:
    with pytest.raises(ValueError, match="too large"):  # decoding would find it broken
        vision.open_upload(upload(tmp_path, png_header(width, height)))
    with pytest.raises(ValueError, match="broken"):
        vision.open_upload(upload(tmp_path, png_header(4096, 4096)))


def broken() -> Iterator[tuple[str, bytes]]:
    good = Image.fromarray(picture(0))
    yield "words", b"no picture at all"
    yield "nothing", b""
    yield "page", b"<svg xmlns='http://www.w3.org/2000/svg'><script>alert(1)</script></svg>"
    yield "print", b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 10 10\n"
    yield "gif", encoded(good, "GIF")
    yield "bmp", encoded(good, "BMP")
    yield "half a PNG", encoded(good, "PNG")[:1500]
    yield "half a JPEG", encoded(good, "JPEG")[:700]
    yield "half a WebP", encoded(good, "WEBP")[:300]


@pytest.mark.parametrize(("name", "data"), list(broken()))
def test_what_is_no_picture_is_refused_in_words_that_name_no_path(tmp_path: Path, name: str, data: bytes) -> None:
    with pytest.raises(ValueError, match=r"this (file is no picture|picture is broken)") as said:
        vision.open_upload(upload(tmp_path, data))
    assert str(tmp_path) not in str(said.value)


@pytest.mark.parametrize("number", [-1, 0.5, 40, float("nan"), float("inf")])
def test_a_scene_that_does_not_exist_is_refused(number: float) -> None:
    with pytest.raises(ValueError, match="whole number from 0 to 39"):
        vision.seen(number, None)


def test_the_scene_is_the_one_that_steer_look_draws_and_an_upload_goes_before_it(tmp_path: Path) -> None:
    drawn = vision.picture_of(7, None)
    assert drawn.tobytes() == open_picture(f"scene:{2**40 + 7}").tobytes()
    own = Image.new("RGB", (30, 20), "blue")
    path = upload(tmp_path, encoded(own, "PNG"))
    assert vision.picture_of(7, path).tobytes() == own.tobytes()
    assert "30 x 20" in vision.seen(7, path)[1]
    assert vision.seen(20, None)[1] == "In it: penguin (top left), cat face (bottom right)."


def test_both_answers_are_what_look_at_finds(loaded: Loaded, seen: Image.Image) -> None:
    method = steer.ImbalancedAttention(alpha=3.0, dense_layers=0)
    found = vision.ask_pair(
        loaded, method, seen, QUESTION, Job(), max_new_tokens=5, layers="1", relative="Describe it."
    )
    assert list(found.looks) == ["without", "with ImbalancedAttention"]
    for look, chosen in zip(found.looks.values(), (None, method), strict=True):
        read = {"layers": "1", "method": chosen, "max_new_tokens": 5}
        expected = look_at(loaded.model, loaded.processor, QUESTION, [seen], **read)
        assert look.answer == expected.answer
        assert torch.equal(look.weights, expected.weights)
        other = look_at(loaded.model, loaded.processor, "Describe it.", [seen], **read)
        drawn = list(found.drawn.values())[chosen is not None]
        assert torch.equal(drawn.weights, expected.relative_to(other).weights)
    without, steered = found.looks.values()
    assert not torch.equal(without.weights, steered.weights)


@pytest.mark.parametrize(
    ("changed", "words"),
    [
        ({"question": " "}, "the question is empty"),
        ({"question": "x" * 2001}, "2001 characters"),
        ({"relative": "x" * 2001}, "2001 characters"),
        ({"max_new_tokens": 0}, "from 1 to 128"),
        ({"max_new_tokens": 2.5}, "from 1 to 128"),
        ({"max_new_tokens": float("nan")}, "from 1 to 128"),
        ({"layers": "7"}, "layers 0 to 1"),
        ({"layers": "nothing.*"}, "nothing"),
    ],
)
def test_bad_input_is_refused_in_words(loaded: Loaded, seen: Image.Image, changed: Any, words: str) -> None:
    question = changed.pop("question", QUESTION)
    with pytest.raises(ValueError, match=words):
        vision.ask_pair(loaded, steer.VHR(), seen, question, Job(), **changed)


@pytest.mark.parametrize("stopped_at", [1, 4, 6, 9])
def test_it_stops_at_a_token_and_leaves_the_model_unsteered(loaded: Loaded, seen: Image.Image, stopped_at: int) -> None:
    class Watched(Job):
        steps = 0

        def step(self, done: int, total: int, what: str) -> None:
            self.steps += 1
            if self.steps == stopped_at:
                self.stop()
            super().step(done, total, what)

    before = look_at(loaded.model, loaded.processor, QUESTION, [seen])
    job = Watched()
    with pytest.raises(Stopped):
        vision.ask_pair(loaded, steer.ImbalancedAttention(dense_layers=0), seen, QUESTION, job, max_new_tokens=6)
    assert job.steps == stopped_at
    after = look_at(loaded.model, loaded.processor, QUESTION, [seen])
    assert (before.answer, torch.equal(before.weights, after.weights)) == (after.answer, True)


def test_progress_tells_of_each_token_and_never_goes_back(loaded: Loaded, seen: Image.Image) -> None:
    told: list[tuple[int, int, str]] = []

    class Told(Job):
        def step(self, done: int, total: int, what: str) -> None:
            told.append((done, total, what))

    loaded.warm = False
    vision.ask_pair(loaded, steer.VHR(alpha=1.5), seen, QUESTION, Told(), max_new_tokens=3)
    assert loaded.warm
    assert told[0] == (0, 6, "first token of this model")
    assert [what for _, _, what in told[1:]] == ["without"] * 4 + ["with VHR"] * 4
    assert [done for done, _, _ in told[1:]] == [0, 1, 2, 3, 3, 4, 5, 6]


def test_a_method_that_evicts_is_read_through_a_mask_and_answers_the_same(loaded: Loaded, seen: Image.Image) -> None:
    method = steer.StreamingLLM(n_sink=1, n_recent=6)
    found = vision.ask_pair(loaded, method, seen, QUESTION, Job(), max_new_tokens=8)
    inputs = _inputs(loaded.processor, QUESTION, [seen], raw=False)
    with steer.apply(loaded.model, method):
        output = loaded.model.generate(**inputs, max_new_tokens=8, do_sample=False)
    new = output[0, inputs["input_ids"].shape[1] :]
    expected = loaded.processor.tokenizer.decode(new, skip_special_tokens=True).strip()
    assert found.looks["with StreamingLLM"].answer == expected
    assert found.looks["without"].answer != expected


def test_what_changes_nothing_is_said_to(loaded: Loaded, seen: Image.Image) -> None:
    method = steer.VAR(sink_dims=(), dense_layers=0)
    found = vision.ask_pair(loaded, method, seen, QUESTION, Job(), max_new_tokens=2)
    assert "VAR changes nothing with these settings." in vision.figures(found, method)
    method = steer.VHR(alpha=1.5)
    found = vision.ask_pair(loaded, method, seen, QUESTION, Job(), max_new_tokens=2)
    assert "The answers " in vision.figures(found, method)


def test_the_code_runs_and_gives_the_same_answer(
    loaded: Loaded, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for part in (loaded.model, loaded.processor):
        part.save_pretrained(tmp_path)
    here = Loaded(str(tmp_path), "vision", loaded.model, loaded.processor)
    method = steer.GIFT.for_processor(loaded.processor, alpha=4.0)
    found = vision.ask_pair(here, method, vision.picture_of(3, None), QUESTION, Job())
    made = forms.in_python(here.name, method, {"alpha": 4.0})
    code = vision.python(here, made, f"scene:{2**40 + 3}", QUESTION)
    exec(compile(code, "code", "exec"), {})
    answer, share = capsys.readouterr().out.rsplit(maxsplit=1)
    look = found.looks["with GIFT"]
    assert (answer, float(share)) == (look.answer, pytest.approx(look.on(0)))


def test_methods_for_pictures_come_first_and_guidance_does_not(loaded: Loaded) -> None:
    names = vision.methods()
    assert names[:4] == ["GIFT", "ImbalancedAttention", "VAR", "VHR"]
    assert {"ACT", "StreamingLLM"} <= set(names)
    assert not {"PAG", "SEG", "SLG", "STA"} & set(names)


def test_questions_are_about_the_scene() -> None:
    asked = {vision.question_about(20) for _ in range(20)}
    assert len(asked) > 3
