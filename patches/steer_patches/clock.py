"""The clock: where a run stands, read from the pipeline and its scheduler, never asked of the user.

`set_timesteps` starts a run, the first denoiser call after a `step` is the next step (some pipelines call `step` more
than once for one). All of it happens outside compiled regions.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

from steer_patches.site import Run, Scope
from steer_patches.swap import put, subclass, swap


class Clock:
    """Follows one pipeline (or none) and writes the position into the `Run` of a scope."""

    def __init__(self, pipeline: Any | None) -> None:
        self.pipeline = pipeline
        self.run = Run()
        self.running = False
        self.on_run: list[Callable[[], None]] = []
        self.scopes: list[Scope] = []
        self._stepped = False
        self._started = False
        self._scheduler: Any = None
        self._undo: list[Callable[[], None]] = []
        if pipeline is not None:
            self._undo_pipeline = [
                put(pipeline, "_steer_clock", self),
                swap(pipeline, subclass(type(pipeline), _Pipeline)),
            ]
            self._follow(pipeline.scheduler)

    def _follow(self, scheduler: Any) -> None:
        for undo in reversed(self._undo):
            undo()
        self._scheduler = scheduler
        self._undo = [put(scheduler, "_steer_clock", self), swap(scheduler, _steered_scheduler(type(scheduler)))]

    def start(self, arguments: dict[str, Any] | None = None) -> None:
        """A new run begins."""
        self.follow(Run(arguments=arguments if arguments is not None else self.run.arguments))
        self._stepped = self._started = False

    def follow(self, run: Run) -> None:
        """The forward that begins belongs to this run: language models have one for each sequence."""
        self.run = run
        for scope in self.scopes:
            scope.run = run

    def stepped(self) -> None:
        """The scheduler took a step."""
        self._stepped = True

    def denoiser_called(self) -> None:
        """Call this before every denoiser call of the model's own pipeline."""
        if self.pipeline is None:
            return
        if self.pipeline.scheduler is not self._scheduler and not self._started:
            self._follow(self.pipeline.scheduler)
        run = self.run
        run.calls += 1
        if self._stepped:
            self._stepped = False
            run.step += 1
            run.calls = 1
        self._started = True
        self._read_schedule(run)

    def _read_schedule(self, run: Run) -> None:
        run.scheduler = self._scheduler
        timesteps = getattr(self._scheduler, "timesteps", None)
        if timesteps is not None:
            declared = getattr(self.pipeline, "_num_timesteps", None)
            known = isinstance(declared, int) and 0 < declared <= len(timesteps)
            run.num_steps = declared if known else len(timesteps)

    def remove(self) -> None:
        """Give the pipeline and the scheduler their own classes back."""
        for undo in reversed(self._undo + (self._undo_pipeline if self.pipeline is not None else [])):
            undo()
        self._undo = []


class _Pipeline:
    """Mixed into a pipeline: reports each call and its arguments to the clock."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        clock: Clock | None = self.__dict__.get("_steer_clock")
        if clock is None:
            return super().__call__(*args, **kwargs)  # type: ignore[misc]
        call = super().__call__  # type: ignore[misc]
        try:
            bound = inspect.signature(call).bind(*args, **kwargs)
        except TypeError:  # wrong arguments: the pipeline's own error is the clearest
            return call(*args, **kwargs)
        bound.apply_defaults()
        for check in clock.on_run:
            check()
        clock.start(dict(bound.arguments))
        clock.running = True
        try:
            return call(*args, **kwargs)
        finally:
            clock.running = False
            clock.start({})


_SCHEDULERS: dict[Any, Any] = {}


def _steered_scheduler(cls: Any) -> Any:
    """Subclass of scheduler class `cls` that reports to the clock; signatures stay, pipelines inspect them."""
    if cls in _SCHEDULERS:
        return _SCHEDULERS[cls]

    class Reporting:
        @functools.wraps(cls.set_timesteps)
        def set_timesteps(self, *args: Any, **kwargs: Any) -> Any:
            clock: Clock | None = self.__dict__.get("_steer_clock")
            if clock is not None:
                clock.start()
            return cls.set_timesteps(self, *args, **kwargs)

        @functools.wraps(cls.step)
        def step(self, *args: Any, **kwargs: Any) -> Any:
            clock: Clock | None = self.__dict__.get("_steer_clock")
            if clock is not None:
                clock.stepped()
            return cls.step(self, *args, **kwargs)

    _SCHEDULERS[cls] = subclass(cls, Reporting)
    return _SCHEDULERS[cls]
