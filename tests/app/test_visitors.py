"""Many visitors at once, by gradio_client: each gets what was asked for, and one model is in memory."""

from __future__ import annotations

import gc
import re
import time
from collections.abc import Iterator
from concurrent.futures import CancelledError
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np
import psutil
import pytest
import torch
from diffusers import DiffusionPipeline
from gradio_client import Client
from gradio_client.exceptions import AppError
from gradio_client.utils import QueueError
from PIL import Image

import steer
from steer_demos import models
from steer_demos.app import drawing, page
from steer_demos.app.jobs import Job, Jobs, Stopped
from steer_demos.app.stage import Loaded

PROMPTS = ("a red apple on a blue background", "a green car on a yellow background")
WAIT = 30  # seconds


@pytest.fixture(scope="module")
def jobs() -> Jobs:
    return Jobs()


@pytest.fixture(scope="module")
def drawn() -> Any:
    """Draws the two pictures of a request here. Its models are loaded before the app's: from_pretrained is not made
    for two threads."""
    names = ("emoji-mmdit", "emoji-unet")
    loaded = {name: Loaded(name, "pictures", models.load(name, "cpu", torch.float32), warm=True) for name in names}

    def draw(request: dict[str, Any]) -> list[np.ndarray]:
        name = request["model"]
        method = steer.PAG(**request["settings"], layers=models.guided_layers(name))
        chosen = {name: request[name] for name in ("seed", "steps", "guidance_scale")}
        found = drawing.draw_pair(loaded[name], method, request["prompt"], Job(), **chosen)
        return [np.asarray(drawing.enlarged(run.images[0])) for run in (found.baseline, found.steered)]

    return draw


@contextmanager
def launched(jobs: Jobs) -> Iterator[gr.Blocks]:
    """The app, served by threads of this process."""
    app = page.build(jobs=jobs)
    app.launch(prevent_thread_lock=True, quiet=True, **page.launch_options())
    yield app
    jobs.stop_all()
    app.close(verbose=False)


@pytest.fixture(scope="module")
def app(jobs: Jobs, drawn: Any) -> Iterator[gr.Blocks]:
    with launched(jobs) as served:
        yield served


@pytest.fixture
def visitor(app: gr.Blocks) -> Iterator[Any]:
    """Makes clients, each with a session of its own."""
    clients: list[Client] = []

    def arrive(at: gr.Blocks = app) -> Client:
        clients.append(Client(at.local_url, verbose=False))
        return clients[-1]

    yield arrive
    for client in clients:
        client.close()


def asked(seed: int = 0, model: str = "emoji-mmdit", prompt: str = PROMPTS[0], **changes: Any) -> dict[str, Any]:
    """A request for a picture, without and with PAG."""
    request = {"model": model, "prompt": prompt, "seed": seed, "steps": 1, "guidance_scale": 3.0, "method": "PAG"}
    return {**request, "settings": {"scale": 2.0}, "saved": "", "api_name": "/image", **changes}


def read(answer: Any) -> list[np.ndarray]:
    """The two pictures of an answer."""
    return [np.asarray(Image.open(picture).convert("RGB")) for picture in answer[:2]]


def same(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def until(true: Any) -> None:
    end = time.monotonic() + WAIT
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def pipelines() -> int:
    gc.collect()
    return sum(issubclass(type(each), DiffusionPipeline) for each in gc.get_objects())


def running(jobs: Jobs) -> int:
    return sum(map(len, jobs._running.values()))


def is_stopped(job: Job) -> bool:
    try:
        job.check()
    except Stopped:
        return True
    return False


def test_fifty_requests_get_fifty_pictures(visitor: Any, drawn: Any) -> None:
    clients = [visitor(), visitor()]
    read(clients[0].predict(**asked()))
    memory = psutil.Process().memory_info().rss
    requests = [asked(seed) for seed in range(50)]
    waiting = [clients[seed % 2].submit(**request) for seed, request in enumerate(requests)]
    answers = [read(job.result(WAIT)) for job in waiting]
    assert len({before.tobytes() for before, _ in answers}) == 50
    for seed in (0, 23, 49):
        assert same(answers[seed], drawn(requests[seed]))
    assert psutil.Process().memory_info().rss - memory < 200e6


def test_models_take_turns_and_leave_nothing_behind(visitor: Any, drawn: Any) -> None:
    one, other = visitor(), visitor()
    requests = [asked(seed, ("emoji-mmdit", "emoji-unet")[seed % 2], PROMPTS[seed % 2]) for seed in range(4)]
    jobs = [(one, other)[seed % 2].submit(**request) for seed, request in enumerate(requests)]
    for job, request in zip(jobs, requests, strict=True):
        assert same(read(job.result(WAIT)), drawn(request))
    with pytest.raises(AppError, match="PAG has no field"):
        one.predict(**asked(settings={"nothing": 1}))
    with pytest.raises(AppError, match="nowhere"):
        one.predict(**asked(model="emoji-unet", settings={"layers": "nowhere"}))
    assert pipelines() == 2 + 1  # those of `drawn`, and the app's


def test_who_comes_when_the_queue_is_full_is_told(monkeypatch: pytest.MonkeyPatch, visitor: Any, drawn: Any) -> None:
    monkeypatch.setattr(page, "WAITING", 3)
    jobs = Jobs()
    with launched(jobs) as app:
        one, late = visitor(app), visitor(app)
        sent = [one.submit(**asked(steps=50))]
        until(lambda: running(jobs) == 1)
        sent += [one.submit(**asked(steps=50)) for _ in range(3)]
        until(lambda: len(app._queue) == 3)
        with pytest.raises(QueueError, match="Queue is full"):
            late.predict(**asked())
        for job in sent:
            job.cancel()
        until(lambda: len(app._queue) == 0 and running(jobs) == 0)
        assert same(read(late.predict(**asked(7))), drawn(asked(7)))


@pytest.mark.parametrize("way", ["the endpoint", "cancel", "leaving"])
def test_who_stops_stops_nobody_else(way: str, visitor: Any, jobs: Jobs, drawn: Any) -> None:
    one, other = visitor(), visitor()
    long = one.submit(**asked(steps=50))
    until(lambda: running(jobs) == 1)
    [[job]] = jobs._running.values()
    waiting = other.submit(**asked(5))
    if way == "the endpoint":
        one.predict(api_name="/stop")
        with pytest.raises(AppError, match="Stopped"):
            long.result(WAIT)
    elif way == "cancel":
        long.cancel()
        with pytest.raises((CancelledError, KeyError)):
            long.result(WAIT)
    else:
        one.close()
    until(lambda: is_stopped(job))
    assert same(read(waiting.result(WAIT)), drawn(asked(5)))
    until(lambda: running(jobs) == 0)
    assert same(read(other.predict(**asked(6))), drawn(asked(6)))


def test_the_code_of_the_docs_runs(app: gr.Blocks) -> None:
    page = (Path(__file__).resolve().parents[2] / "docs/app.md").read_text(encoding="utf-8")
    code = re.search(r"```python\n(.*?)```", page, re.S)
    assert code is not None and "http://127.0.0.1:7860" in code[1]
    names: dict[str, Any] = {}
    exec(code[1].replace("http://127.0.0.1:7860", app.local_url), names)
    assert Image.open(names["steered"]).size == (256, 256)
    assert "with PAG" in names["figures"] and "transformer_blocks.3" in names["where"]
    names["client"].close()
