"""The one model in memory, and the visitors who take turns on it."""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import DiffusionPipeline
from transformers import PreTrainedTokenizerBase

from steer_demos import models
from steer_demos.app.jobs import Job, is_memory
from steer_demos.app.sources import Sources

KINDS = {
    "pictures": "draws pictures",
    "clips": "makes clips",
    "text": "reads and writes text",
    "vision": "answers questions about pictures",
}
WAIT = 0.1  # seconds between two looks at whether a waiting job was stopped


@dataclass
class Loaded:
    """A model on the stage.

    Args:
        name: as the visitor gave it.
        kind: one of KINDS.
        model: a pipeline, or a transformers model.
        processor: of a transformers model; the tokenizer where it only reads text.
        warm: whether it has run once, so that what happens once is not timed.
    """

    name: str
    kind: str
    model: Any
    processor: Any = None
    warm: bool = False


class Stage:
    """Holds one model at a time; whoever needs another waits until this one is free, and it is let go."""

    def __init__(self, sources: Sources) -> None:
        self.sources = sources
        self._lock = threading.Lock()
        self._loaded: Loaded | None = None
        self._source = ""  # what it was loaded from: a path of the host, which no visitor is shown

    @contextmanager
    def holding(self, name: str, kind: str, job: Job) -> Iterator[Loaded]:
        """The model of that name, for one job alone.

        Args:
            kind: what the model has to do, one of KINDS.

        Raises:
            ValueError: it may not be opened, cannot be, or does something else.
            Stopped: the job was, while it waited or while the model was loaded.
        """
        while not self._lock.acquire(timeout=WAIT):
            job.check()
        try:
            loaded = self._open(name, job)
            if loaded.kind != kind:
                raise ValueError(f"{name} {KINDS[loaded.kind]}; this tab is for a model that {KINDS[kind]}")
            yield loaded
        except Exception as error:
            if is_memory(error):
                self._loaded = None
            raise
        finally:
            self._lock.release()

    def _open(self, name: str, job: Job) -> Loaded:
        source = self.sources.open(name)
        if self._loaded is not None and self._source == str(source):
            return self._loaded
        job.step(0, 1, f"loading {name}")
        self._loaded = None  # first let go, then load: two models may not fit
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        found = models.load(source, use_safetensors=True)
        self._loaded, self._source = _loaded(name.strip(), found), str(source)
        job.check()
        return self._loaded


def _loaded(name: str, found: Any) -> Loaded:
    if isinstance(found, DiffusionPipeline):
        return Loaded(name, "clips" if models.draws_clips(found) else "pictures", found)
    model, processor = found
    return Loaded(name, "text" if isinstance(processor, PreTrainedTokenizerBase) else "vision", model, processor)
