"""What a visitor can read of an error, and who is stopped."""

from __future__ import annotations

import types
from collections.abc import Callable
from typing import Any

import gradio as gr
import pytest
import torch

from steer_demos.app.jobs import LONGEST, Job, Jobs, Stopped, in_words, words


def said(error: BaseException) -> str:
    """What a visitor is told when a function raises `error`."""

    @in_words
    def function() -> None:
        raise error

    with pytest.raises(gr.Error) as raised:
        function()
    return str(raised.value.message)


def test_errors_in_words_are_told_as_they_are() -> None:
    assert said(ValueError("steps=0 must be 1 to 200")) == "steps=0 must be 1 to 200"
    assert said(Stopped()) == "Stopped."
    assert said(gr.Error("as it is")) == "as it is"


def test_of_a_fault_the_visitor_is_told_the_name_and_the_terminal_all(capsys: pytest.CaptureFixture[str]) -> None:
    assert said(KeyError("secret")) == "This went wrong inside (KeyError); the terminal of the app says more."
    assert "KeyError: 'secret'" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("no model.safetensors in /home/me/models/flux.", "no model.safetensors in …/flux."),
        ("[Errno 2] No such file: '/srv/cache/x/y.json'", "[Errno 2] No such file: '…/y.json'"),
        ("(/usr/lib/a.py), /etc/passwd", "(…/a.py), …/passwd"),
        ("owner/name of https://huggingface.co/owner/name/x", "owner/name of https://huggingface.co/owner/name/x"),
        ("layers='a/b', 1/2 of ../x/y and ~/x/y", "layers='a/b', 1/2 of ../x/y and ~/x/y"),
    ],
)
def test_folders_of_the_host_are_left_out(text: str, shown: str) -> None:
    assert said(OSError(text)) == shown


def test_html_is_text_and_long_words_end() -> None:
    assert said(ValueError("<img src=x onerror=alert(1)> & more")) == "&lt;img src=x onerror=alert(1)&gt; &amp; more"
    assert said(ValueError("<" * 5000)) == "&lt;" * LONGEST + " …"


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB"),
        RuntimeError("[enforce fail] DefaultCPUAllocator: can't allocate memory: you tried to allocate 1 bytes."),
    ],
)
def test_too_little_memory_is_said(error: Exception) -> None:
    assert "not enough memory" in said(error)
    assert not words(RuntimeError("something else"))


def test_what_is_raised_keeps_nothing_of_what_led_to_it() -> None:
    @in_words
    def function() -> None:
        raise ValueError("a reason")

    with pytest.raises(gr.Error) as raised:
        function()
    assert raised.value.__cause__ is None and raised.value.__context__ is None


def request(session: str | None) -> Any:
    return types.SimpleNamespace(session_hash=session)


def test_a_visitor_stops_all_of_their_own_jobs_and_no_other() -> None:
    jobs = Jobs()
    with jobs.running(request("a")) as one, jobs.running(request("a")) as two, jobs.running(request("b")) as other:
        jobs.stop(request("a"))
        for job in (one, two):
            with pytest.raises(Stopped):
                job.step(1, 2, "")
        other.step(1, 2, "")
        jobs.stop_all()
        with pytest.raises(Stopped):
            other.check()
    with jobs.running(request("a")) as next_one:
        next_one.check()
    assert not jobs._running


def test_progress_is_passed_on() -> None:
    told: list[Any] = []
    progress: Callable[..., Any] = lambda done, desc: told.append((done, desc))  # noqa: E731
    Job(progress).step(3, 8, "drawing")
    assert told == [((3, 8), "drawing")]
