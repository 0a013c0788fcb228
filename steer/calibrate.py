"""Fit a method to a model: run data through it, while a search looks, scores and decides."""

from __future__ import annotations

import importlib.util
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, Protocol

import torch
from diffusers import DiffusionPipeline
from tqdm import tqdm

from steer.apply import apply
from steer.artifact import installed
from steer.bind import models_of
from steer.checkpoint import Checkpoint, about
from steer.fingerprint import fingerprint
from steer.method import Method
from steer.plan import Plan, Search
from steer.strategies import Strategy, strategy_of
from steer.trials import Objective, Trials
from steer_patches.sites import plain


def calibrate(
    target: Any,
    method: Method,
    data: Iterable[str | Mapping[str, Any]],
    *,
    objective: Objective | str | None = None,
    strategy: str | Strategy | None = None,
    trials: int | None = None,
    seconds: float | None = None,
    batch: int | None = None,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Method:
    """A copy of `method` that is fitted to `target` on `data`; no weights change, and no gradients are needed.

    With an objective, settings of the method are tried: `strategy` says which, every trial draws all samples from the
    same seeds, and higher mean scores win. Of the strategies here all return the best trial but HeadHunter, which
    returns the heads that it chose together. Without an objective the method has a search of its own that looks at the
    model while the data runs (`SparseVDiT`, `ACT`, `MoA`, ...).

    Args:
        target: a pipeline or a model, which stays as it is.
        method: what is fitted; stays as it is. Its `layers` and `heads`, where given, bound the search.
        data: for a pipeline prompts, or dicts of its arguments; for a bare model dicts of its forward's arguments.
        objective: a callable (pictures, prompts) -> a score for each picture, higher is better, see
            `steer.objectives`. Pictures are a tensor (N, 3, H, W) in [0, 1], clips (N, T, 3, H, W). For a bare model
            it is called with ([output], [sample]). Text is an option of the method's own search.
        strategy: what is tried with an objective: "headhunter" (rounds=, top=), which None stands for, "sweep"
            (space=, cycles=), "random" (number=, draws=), "optuna" (space=, number=, sampler=), or a
            `steer.strategies.Strategy`.
        trials: budget: settings that are tried at most. A method's own search gets as many samples as make so many
            runs in all of its passes.
        seconds: budget of this call; the search ends with what it found by then. With `checkpoint` the same call with
            more seconds goes on.
        batch: trials of heads that are drawn in one batch, each row with heads of its own; None = the heads of a
            layer, 1 = one at a time. Only guidance methods on pipelines share batches, and not samples with pictures.
        seed: sample i is drawn with a generator of its own, seeded with seed + i, in every trial and every pass.
        checkpoint: folder in which the search is saved after every batch or sample; the same call resumes from there.
        report: folder for `report.md` and pictures of layers and heads; needs matplotlib.
        progress: show a progress bar.
        options: of the strategy, or of the method's own search, see its `search`.

    Returns:
        The fitted method: `steer.apply` it, keep it with `save(dir)`, share it with `push_to_hub`. `record` holds what
        was tried.

    Raises:
        TypeError: no method, one with nothing to calibrate, data of the wrong kind, or an option that does not exist.
        NotADirectoryError: `checkpoint` or `report` is a file.
        ValueError: no data, a target that is steered or compiled, a budget too small for one trial, an objective that
            gives no finite score, or a checkpoint of another search.
    """
    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("report= draws with matplotlib: pip install 'steer-attention[plot]'")
    if not isinstance(method, Method):
        raise TypeError(f"{method!r} is no method; pass one, e.g. steer.PAG()")
    if seconds is not None and not seconds > 0:
        raise ValueError(f"seconds={seconds} must be above 0")
    for name, folder in (("checkpoint", checkpoint), ("report", report)):
        check_folder(name, folder)
    models = models_of(target)
    _check_plain(models)
    samples = _samples(target, data)
    work: Work
    if callable(objective):
        strategy = strategy_of(strategy or "headhunter", options)
        work = Trials(target, models, method, samples, objective, strategy, seed=seed, trials=trials, batch=batch)
        options = {"objective": objective, "strategy": strategy}
    else:
        if strategy is not None or batch is not None:
            raise TypeError("strategy= and batch= are for searches with an objective: give objective=, a callable")
        options |= {} if objective is None else {"objective": objective}
        work = Passes(target, method.search(**options), method, samples, seed, trials)
    facts = about(method, models, samples, seed, options)
    saved = Checkpoint(Path(checkpoint), facts) if checkpoint is not None else None
    if saved:
        saved.resume(work)

    deadline = None if seconds is None else time.monotonic() + seconds
    bar = tqdm(total=work.total, initial=work.done, desc=f"calibrate {type(method).__name__}", disable=not progress)
    with _silent(target), bar:
        for _ in work.run(lambda: deadline is not None and time.monotonic() > deadline):
            if saved:
                saved.save(work)
            bar.set_postfix_str(work.figure(), refresh=False)
            bar.total = work.total
            bar.update(work.done - bar.n)

    fitted = _with_provenance(work.finish(), facts)
    fitted.__dict__["_fingerprint"] = fingerprint(models)
    if report is not None:
        from steer.calibration_report import write

        write(fitted, Path(report))
    return fitted


def check_folder(name: str, folder: str | Path | None) -> None:
    """Raise where a folder to write is a file, before a long search rather than after it.

    Raises:
        NotADirectoryError: it is.
    """
    if folder is not None and Path(folder).exists() and not Path(folder).is_dir():
        raise NotADirectoryError(f"{name}={folder} is a file; name a folder, which is made if need be")


class Work(Protocol):
    """What `calibrate` drives: searches over settings, and methods' own searches."""

    @property
    def total(self) -> int | None: ...
    @property
    def done(self) -> int: ...
    def run(self, is_over: Callable[[], bool]) -> Iterator[None]: ...
    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...
    def figure(self) -> str: ...
    def finish(self) -> Method: ...


class Passes:
    """A method's own search: all samples run through the target, as often as the search wants.

    Args:
        target: the pipeline or model.
        search: what looks at them, applied to the target meanwhile.
        method: whose search it is.
        samples: what runs.
        seed: of the first sample.
        trials: runs in all passes together, at most; samples beyond are left out.
    """

    def __init__(
        self,
        target: Any,
        search: Search,
        method: Method,
        samples: Sequence[Mapping[str, Any]],
        seed: int,
        trials: int | None,
    ) -> None:
        if trials is not None and trials < search.passes:
            raise ValueError(f"trials={trials}: this search passes {search.passes} times over the data, so give more")
        self.target, self.search, self.method, self.samples, self.seed = target, search, method, samples, seed
        self.used = len(samples) if trials is None else min(len(samples), trials // search.passes)
        self.done = 0

    @property
    def total(self) -> int:
        return self.search.passes * self.used

    def run(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Comes back after every sample. Once `is_over`, samples that the first pass did not reach are left out."""
        with apply(self.target, self.search) as handle:
            if not handle.bindings:
                raise ValueError(
                    f"{self.method.describe()} edits nothing, so there is nothing to calibrate; give it heads"
                )
            while self.done < self.total:
                which, index = divmod(self.done, self.used)
                if which == 0 and index and is_over():
                    self.used = index
                    continue
                if index == 0:
                    self.search.start_pass(which)
                self.search.run(self.target, self.samples[index], self.seed + index)
                self.done += 1
                yield

    def state(self) -> dict[str, Any]:
        return {**self.search.state(), "_done": self.done, "_used": self.used}

    def load_state(self, state: Mapping[str, Any]) -> None:
        own = dict(state)
        self.done, used = own.pop("_done"), own.pop("_used")
        if self.done > used:  # the second pass has begun: it has to see what the first one saw
            self.used = used
        else:  # also with a smaller budget, what the first pass saw was seen
            self.used = max(self.used, self.done)
        self.search.load_state(own)

    def figure(self) -> str:
        return self.search.figure()

    def finish(self) -> Method:
        return self.search.finish()


def _check_plain(models: Mapping[str, torch.nn.Module]) -> None:
    """Searches measure in Python, and must see the model as it is."""
    for key, model in models.items():
        where = key or type(plain(model)).__name__
        if model.__dict__.get("_steer_state") is not None:
            raise ValueError(f"{where} is steered already; call steer.remove on it, then calibrate")
        modules = list(model.modules())
        if plain(model) is not model or any(m._compiled_call_impl is not None for m in modules):
            raise ValueError(f"{where} is compiled; calibrate the uncompiled model, and compile it afterwards")


def _samples(target: Any, data: Iterable[str | Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    if isinstance(data, (str, Mapping)):
        raise TypeError("data is one sample; pass a list of samples, e.g. [prompt]")
    samples: list[Mapping[str, Any]] = []
    for sample in data:
        if isinstance(sample, str) and isinstance(target, DiffusionPipeline):
            sample = {"prompt": sample}
        if not isinstance(sample, Mapping):
            wanted = "prompts, or dicts of pipeline arguments" if isinstance(target, DiffusionPipeline) else "dicts"
            raise TypeError(
                f"data holds a {type(sample).__name__}; for a {type(target).__name__} it must hold {wanted}"
                + ("" if isinstance(target, DiffusionPipeline) else " of the arguments of its forward")
            )
        if "generator" in sample:
            raise TypeError("data must leave out generator: calibrate draws each sample with one of its own, see seed")
        samples.append(sample)
    if not samples:
        raise ValueError("data is empty; give at least one sample")
    return samples


@contextmanager
def _silent(target: Any) -> Iterator[None]:
    """Without the pipeline's own progress bars, one a sample."""
    if not isinstance(target, DiffusionPipeline):
        yield
        return
    before = target.__dict__.get("_progress_bar_config")
    target.set_progress_bar_config(**{**(before or {}), "disable": True})
    try:
        yield
    finally:
        if before is None:
            del target._progress_bar_config
        else:
            target._progress_bar_config = before


def _with_provenance(fitted: Method, facts: Mapping[str, Any]) -> Method:
    """The method, whose plan or record says what it was made from."""
    facts = {**facts, "versions": installed()}
    if (record := fitted.__dict__.get("_record")) is not None:
        fitted.__dict__["_record"] = replace(record, report={**facts, **record.report})
    elif isinstance(plan := getattr(fitted, "plan", None), Plan):
        changes: dict[str, Any] = {"plan": replace(plan, report={**facts, **plan.report})}
        return replace(fitted, **changes)
    return fitted
