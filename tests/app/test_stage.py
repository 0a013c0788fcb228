"""One model in memory, one job at a time, and nothing of a model's own that runs."""

from __future__ import annotations

import gc
import json
import pickle
import shutil
import threading
import weakref
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

import steer
from steer_demos import models
from steer_demos.app import drawing
from steer_demos.app.jobs import Job, Stopped, in_words
from steer_demos.app.sources import Sources
from steer_demos.app.stage import Stage

NAME, PROMPT = "emoji-unet", "a red apple on a blue background"


@pytest.fixture(scope="module")
def stage() -> Stage:
    return Stage(Sources())


def draw(stage: Stage, job: Job | None = None, method: Any = None) -> np.ndarray:
    """The picture without a method."""
    job = job or Job()
    with stage.holding(NAME, "pictures", job) as loaded:
        found = drawing.draw_pair(
            loaded, method or steer.PAG(scale=1.0), PROMPT, job, seed=0, steps=2, guidance_scale=3.0
        )
    return np.asarray(found.baseline.images[0])


class EndsAt(Job):
    """Ends with an error when it has done so many steps."""

    def __init__(self, done: int, error: Exception) -> None:
        super().__init__()
        self.done, self.error = done, error

    def step(self, done: int, total: int, what: str) -> None:
        if done == self.done and total == 4:
            raise self.error


def test_a_model_stays_until_another_is_needed(stage: Stage) -> None:
    with stage.holding(NAME, "pictures", Job()) as loaded:
        first = weakref.ref(loaded.model)
    with stage.holding(NAME, "pictures", Job()) as loaded:
        assert loaded.model is first()
    del loaded
    with stage.holding("emoji-mmdit", "pictures", Job()):
        assert first() is None


def test_a_model_for_something_else_is_refused(stage: Stage) -> None:
    with (
        pytest.raises(ValueError, match=f"{NAME} draws pictures; this tab is for a model that makes clips"),
        stage.holding(NAME, "clips", Job()),
    ):
        pass
    draw(stage)  # the stage is free


@pytest.mark.parametrize("error", [ValueError("refused"), KeyError("fault"), Stopped(), MemoryError()])
def test_after_an_error_in_the_middle_the_model_is_as_before(stage: Stage, error: Exception) -> None:
    expected = draw(stage)
    with stage.holding(NAME, "pictures", Job()) as loaded:
        model = weakref.ref(loaded.model)
    del loaded
    with pytest.raises(gr.Error) as raised:
        in_words(draw)(stage, EndsAt(3, error))
    error.__traceback__ = error.__context__ = None  # held by this test; what the visitor is told does not lead to it
    gc.collect()
    assert raised.value.message
    assert (model() is None) == isinstance(error, MemoryError)
    assert np.array_equal(draw(stage), expected)


def test_two_jobs_meet_at_the_stage_and_the_first_one_fails(stage: Stage) -> None:
    expected, entered, go = draw(stage), threading.Event(), threading.Event()
    failed: list[BaseException] = []

    class Waits(EndsAt):
        def step(self, done: int, total: int, what: str) -> None:
            if done == 3:
                entered.set()
                go.wait(60)
            super().step(done, total, what)

    def first() -> None:
        try:
            draw(stage, Waits(3, ValueError("in the middle of the steered run")))
        except ValueError as error:
            failed.append(error)

    one = threading.Thread(target=first)
    one.start()
    assert entered.wait(60)
    stopped = Job()
    stopped.stop()
    with pytest.raises(Stopped):  # who waits can be stopped
        draw(stage, stopped)
    found: list[np.ndarray] = []
    two = threading.Thread(target=lambda: found.append(draw(stage)))
    two.start()
    go.set()
    one.join(60)
    two.join(60)
    assert len(failed) == 1 and np.array_equal(found[0], expected)


def test_who_stops_while_a_model_is_loaded_is_stopped_when_it_is(stage: Stage) -> None:
    class StopsWhileLoading(Job):
        def step(self, done: int, total: int, what: str) -> None:
            super().step(done, total, what)
            assert what.startswith("loading")
            self.stop()

    with stage.holding("emoji-mmdit", "pictures", Job()):
        pass
    with pytest.raises(Stopped), stage.holding(NAME, "pictures", StopsWhileLoading()):
        pytest.fail("it ran")
    draw(stage)


class Leaves:
    """Writes a mark when it is unpickled."""

    def __init__(self, mark: Path) -> None:
        self.mark = mark

    def __reduce__(self) -> Any:
        return Path.touch, (self.mark,)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A folder for models, in which visitors may open everything; beside it a mark that says that code ran."""
    made = tmp_path / "models"
    made.mkdir()
    return made


def refused(folder: Path, kind: str, words: str) -> None:
    with (
        pytest.raises((ValueError, OSError, ImportError), match=words),
        Stage(Sources(folders=(folder,))).holding("model", kind, Job()),
    ):
        pytest.fail("it was opened")
    assert not (folder.parent / "mark").exists()


def code(folder: Path, name: str, bases: str) -> str:
    """A module whose import writes the mark."""
    mark = folder.parent / "mark"
    return f"import pathlib\n\npathlib.Path({str(mark)!r}).touch()\n{bases}\n\n\nclass {name}(Base):\n    pass\n"


def copied(folder: Path) -> Path:
    return Path(shutil.copytree(models.EMBEDDED[NAME].folder, folder / "model"))


@pytest.mark.parametrize("file", ["pytorch_model.bin", "model.ckpt", "pytorch_model.bin.index.json"])
def test_no_pickle_of_a_language_model_is_read(folder: Path, file: str) -> None:
    LlamaConfig(vocab_size=8, hidden_size=8, num_hidden_layers=1, num_attention_heads=1).save_pretrained(
        folder / "model"
    )
    poison = pickle.dumps(Leaves(folder.parent / "mark"))
    (folder / "model" / file).write_bytes(poison)
    if file.endswith(".json"):
        (folder / "model" / file).write_text(json.dumps({"metadata": {}, "weight_map": {"a": "part.bin"}}))
        (folder / "model" / "part.bin").write_bytes(poison)
    refused(folder, "text", "safetensors")
    pickle.loads(poison)
    assert (folder.parent / "mark").exists()  # reading it would have been seen


def test_no_pickle_of_a_pipeline_is_read(folder: Path) -> None:
    unet = copied(folder) / "unet"
    for weights in unet.glob("*.safetensors"):
        weights.unlink()
    (unet / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps(Leaves(folder.parent / "mark")))
    refused(folder, "pictures", "safetensors|diffusion_pytorch_model")


def test_no_code_beside_a_language_model_runs(folder: Path) -> None:
    config = LlamaConfig(vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1)
    with torch.device("cpu"):
        LlamaForCausalLM(config).save_pretrained(folder / "model")
    written = json.loads((folder / "model" / "config.json").read_text())
    names = {"AutoConfig": "own.Own", "AutoModelForCausalLM": "own.Own", "AutoTokenizer": ["own.Own", None]}
    (folder / "model" / "own.py").write_text(code(folder, "Own", "Base = object"))
    for model_type in ("llama", "unheard-of"):
        (folder / "model" / "config.json").write_text(
            json.dumps({**written, "model_type": model_type, "auto_map": names})
        )
        (folder / "model" / "tokenizer_config.json").write_text(json.dumps({"auto_map": names}))
        refused(folder, "text", "")


@pytest.mark.parametrize("part", ["pipeline", "component"])
def test_no_code_beside_a_pipeline_runs(folder: Path, part: str) -> None:
    model = copied(folder)
    index = json.loads((model / "model_index.json").read_text())
    if part == "pipeline":
        index["_class_name"] = ["own", "Own"]
        (model / "own.py").write_text(code(folder, "Own", "from diffusers import DiffusionPipeline as Base"))
    else:
        index["unet"] = ["own", "Own"]
        (model / "unet" / "own.py").write_text(
            code(folder, "Own", "from diffusers import UNet2DConditionModel as Base")
        )
    (model / "model_index.json").write_text(json.dumps(index))
    refused(folder, "pictures", "trust_remote_code|custom")


def test_a_folder_of_the_host_is_named_as_the_visitor_named_it(tmp_path: Path) -> None:
    language, tokenizer = models.load("emoji-vlm")
    for part in (language, tokenizer):
        part.save_pretrained(tmp_path / "mine")
    stage = Stage(Sources(folders=(tmp_path,)))
    with stage.holding("mine", "vision", Job()) as loaded:
        assert loaded.name == "mine"
    with stage.holding(str(tmp_path / "mine"), "vision", Job()) as again:
        assert again is loaded
