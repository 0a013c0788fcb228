"""What runs for a visitor: progress, a way to stop it, and errors in words."""

from __future__ import annotations

import functools
import html
import re
import threading
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr
import torch
from gradio.context import LocalContext

# A list, not all exceptions: these are steer's own words. Others are faults, of which a visitor is told the name.
SPOKEN = (ValueError, TypeError, OSError, ImportError, NotImplementedError)
LONGEST = 1_000  # characters of an error that a visitor is shown
FOLDERS = re.compile(
    r"(?<![\w:/.~…])(?:/[^\s/'\"<>|]+)+/(?=[^\s/'\"<>|])"
)  # of an absolute path, without its last name


class Stopped(Exception):
    """The visitor stopped the job, or left."""


class Job:
    """One run for one visitor.

    Args:
        progress: Gradio's; None where nobody looks.
    """

    def __init__(self, progress: gr.Progress | None = None) -> None:
        self._progress, self._stopped = progress, threading.Event()
        self._event, self._page = LocalContext.event_id.get(None), LocalContext.blocks.get(None)

    def step(self, done: int, total: int, what: str) -> None:
        """Say how far it is. Between two steps is where a job can be stopped.

        Raises:
            Stopped: it was.
        """
        self.check()
        if self._progress is not None:
            self._progress((done, total), desc=what)

    def check(self) -> None:
        """Raise Stopped if it was, or if nobody waits for what it makes."""
        if self._stopped.is_set() or self._is_forgotten():
            raise Stopped

    def stop(self) -> None:
        self._stopped.set()

    def _is_forgotten(self) -> bool:
        """Whether Gradio's queue no longer knows of it: its visitor left, or cancelled it, which ends no thread."""
        if self._event is None or self._page is None:
            return False
        known = [event for events in self._page._queue.active_jobs for event in events or ()]
        return not any(event._id == self._event and event.alive for event in known)


class Jobs:
    """The running jobs of all visitors, by Gradio's session."""

    def __init__(self) -> None:
        self._running: dict[str | None, set[Job]] = {}
        self._lock = threading.Lock()

    @contextmanager
    def running(self, request: gr.Request | None, progress: gr.Progress | None = None) -> Iterator[Job]:
        """A job for as long as the block runs."""
        session, job = getattr(request, "session_hash", None), Job(progress)
        with self._lock:
            self._running.setdefault(session, set()).add(job)
        try:
            yield job
        finally:
            with self._lock:
                self._running[session].discard(job)
                if not self._running[session]:
                    del self._running[session]

    def stop(self, request: gr.Request) -> None:
        """Stop all that runs for this visitor: at its next step. Of others, nothing."""
        with self._lock:
            for job in self._running.get(request.session_hash, ()):
                job.stop()

    def stop_all(self) -> None:
        """Stop everything, when the app ends."""
        with self._lock:
            for jobs in self._running.values():
                for job in jobs:
                    job.stop()


def in_words(function: Callable[..., Any]) -> Callable[..., Any]:
    """`function`, whose errors a visitor can read; the faults among them are written to the terminal in full."""

    @functools.wraps(function)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        try:
            return function(*args, **kwargs)
        except gr.Error:
            raise
        except Exception as error:
            said = _error(error)
        # Not inside `except`: an error that leads to another one keeps its frames alive, and with them the model.
        raise said

    return wrapper


def _error(error: Exception) -> gr.Error:
    if isinstance(error, Stopped):
        return gr.Error("Stopped.", title="Stopped", duration=3, print_exception=False)
    said = words(error)
    if not said:
        traceback.print_exception(error)
        said = f"This went wrong inside ({type(error).__name__}); the terminal of the app says more."
    return gr.Error(said, duration=None, print_exception=False)


def words(error: Exception) -> str:
    """What a visitor is told of an error, as text of a page; empty for faults, whose words are not steer's.

    Folders of the host are left out: of /home/me/models/flux it shows …/flux.
    """
    if is_memory(error):
        return "There is not enough memory for this. Ask for less (a smaller picture or clip, a smaller model)."
    if not isinstance(error, SPOKEN):
        return ""
    said = FOLDERS.sub("…/", str(error))
    return html.escape(said if len(said) <= LONGEST else said[:LONGEST] + " …", quote=False)


def is_memory(error: BaseException) -> bool:
    """Whether the machine ran out of memory. On a CPU, torch says so in a plain RuntimeError."""
    said = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    return said or isinstance(error, (MemoryError, torch.OutOfMemoryError))
