"""Fit a method to a model: run data through it, while the method's search looks and decides."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from tqdm import tqdm

from steer.apply import apply
from steer.artifact import fingerprint, installed, to_json
from steer.bind import models_of
from steer.method import Method
from steer.plan import Plan, Search
from steer_patches.sites import plain

CHECKPOINT = "calibration.safetensors"
SHOWN = 12  # characters of a digest


def calibrate(
    target: Any,
    method: Method,
    data: Iterable[str | Mapping[str, Any]],
    *,
    seed: int = 0,
    checkpoint: str | Path | None = None,
    report: str | Path | None = None,
    progress: bool = True,
    **options: Any,
) -> Method:
    """A copy of `method` that is fitted to `target`: a search over `data`, forward passes only.

    Args:
        target: a pipeline or a model, which stays as it is.
        method: one with a search, e.g. `SparseVDiT()`; stays as it is.
        data: for a pipeline prompts, or dicts of its arguments; for a bare model dicts of its forward's arguments.
        seed: sample i is drawn with a generator of its own, seeded with seed + i, in every pass over the data.
        checkpoint: folder in which the search is saved after every sample; the same call resumes from there.
        report: folder for `report.md` and a picture of layers and heads; needs matplotlib.
        progress: show a progress bar, samples times passes.
        options: of the method's search, see its `search`.

    Returns:
        The fitted method: `steer.apply` it, or keep it with `save(dir)`.

    Raises:
        TypeError: a method with nothing to calibrate, data of the wrong kind, or an option the search does not have.
        ValueError: no data, a target that is steered or compiled, or a checkpoint of another search.
    """
    if report is not None and importlib.util.find_spec("matplotlib") is None:
        raise ImportError("report= draws with matplotlib: pip install 'steer-attention[plot]'")
    models = models_of(target)
    _check_plain(models)
    samples = _samples(target, data)
    search = method.search(**options)
    about = _about(method, models, samples, seed, options)
    saved = Checkpoint(Path(checkpoint), about) if checkpoint is not None else None
    done = saved.resume(search) if saved else 0

    total = search.passes * len(samples)
    with (
        apply(target, search) as handle,
        _silent(target),
        tqdm(total=total, initial=done, desc=f"calibrate {type(method).__name__}", disable=not progress) as bar,
    ):
        if not handle.bindings:
            raise ValueError(f"{method.describe()} edits nothing, so there is nothing to calibrate; give it heads")
        for number in range(done, total):
            which, index = divmod(number, len(samples))
            if index == 0:
                search.start_pass(which)
            search.run(target, samples[index], seed + index)
            if saved:
                saved.save(search, number + 1)
            bar.set_postfix_str(search.figure(), refresh=False)
            bar.update()

    fitted = _with_provenance(search.finish(), about)
    fitted.__dict__["_fingerprint"] = fingerprint(models)
    if report is not None:
        from steer.calibration_report import write

        write(fitted, Path(report))
    return fitted


class Checkpoint:
    """A search's state in one file, replaced as a whole: a kill leaves the old one or the new one.

    Args:
        folder: where the file is.
        about: what the search depends on: method, settings, options, seed, data, model.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.file, self.about = folder / CHECKPOINT, json.loads(json.dumps(about))

    def save(self, search: Search, done: int) -> None:
        """Write the state after `done` samples."""
        state = search.state()
        tensors = {name: value.detach().cpu().clone() for name, value in state.items() if _is_tensor(value)}
        rest = {name: value for name, value in state.items() if name not in tensors}
        text = json.dumps({"about": self.about, "done": done, "state": rest})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        save_file(tensors, new, metadata={"steer": text})
        os.replace(new, self.file)

    def resume(self, search: Search) -> int:
        """Give the search its saved state back; how many samples that was after, 0 without a file.

        Raises:
            ValueError: the file is of another search; the message names what differs.
        """
        if not self.file.is_file():
            return 0
        with safe_open(self.file, "pt") as opened:
            metadata = opened.metadata() or {}
        if "steer" not in metadata:
            raise ValueError(f"{self.file} was not written by steer.calibrate; choose another checkpoint= folder")
        document = json.loads(metadata["steer"])
        then, now = _flat(document["about"]), _flat(self.about)
        changed = [name for name in sorted({**then, **now}) if then.get(name) != now.get(name)]
        if changed:
            listed = ", ".join(f"{name} ({then.get(name)} -> {now.get(name)})" for name in changed[:5])
            raise ValueError(
                f"{self.file} is of another search, which differs in {listed}; delete it or choose another checkpoint="
            )
        search.load_state({**document["state"], **load_file(self.file)})
        return document["done"]


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {key: leaf for k, v in tree.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}


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


def _about(
    method: Method,
    models: Mapping[str, torch.nn.Module],
    samples: list[Mapping[str, Any]],
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the result depends on, as JSON."""
    here = fingerprint(models)
    return {
        "method": type(method).__name__,
        "settings": {field.name: _shown(field.name, getattr(method, field.name)) for field in fields(method)},
        "options": {name: _shown(name, value) for name, value in options.items()},
        "seed": seed,
        "samples": len(samples),
        "data": {str(i): digest(sample) for i, sample in enumerate(samples)},
        "model": {
            key or "model": {
                "class": here[key]["class"],
                "config": here[key]["config_hash"][:SHOWN],
                "sites": digest(here[key]["sites"]),
                "weights": _digest_of_weights(plain(model)),
            }
            for key, model in models.items()
        },
    }


def _shown(name: str, value: Any) -> Any:
    if _is_tensor(value) or isinstance(value, Plan):
        return digest(value)
    try:
        return to_json(name, value)
    except TypeError:
        return digest(value)


def digest(value: Any) -> str:
    """A short hash of nested values: tensors, arrays and pictures by their contents, functions by their names."""
    seen = hashlib.sha256()
    _feed(seen, value)
    return seen.hexdigest()[:SHOWN]


def _feed(seen: Any, value: Any) -> None:
    seen.update(type(value).__name__.encode())
    if isinstance(value, Plan):
        value = {field.name: getattr(value, field.name) for field in fields(value)}
    if isinstance(value, Mapping):
        for key in sorted(value, key=str):
            _feed(seen, str(key))
            _feed(seen, value[key])
    elif isinstance(value, (list, tuple)):
        for item in value:
            _feed(seen, item)
    elif isinstance(value, torch.Tensor):
        seen.update(f"{value.dtype}{tuple(value.shape)}".encode())
        seen.update(value.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy().tobytes())
    elif isinstance(value, np.ndarray) or hasattr(value, "tobytes"):
        seen.update(f"{getattr(value, 'shape', None) or value.size}".encode())
        seen.update(value.tobytes())
    else:
        seen.update((getattr(value, "__qualname__", None) or repr(value)).encode())


def _digest_of_weights(model: torch.nn.Module, values: int = 16) -> str:
    """Of the names, shapes and first values of all parameters: enough to tell one training from another."""
    return digest(
        {
            name: (str(p.dtype), tuple(p.shape), None if p.is_meta else p.detach().reshape(-1)[:values])
            for name, p in model.named_parameters()
        }
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def _with_provenance(fitted: Method, about: Mapping[str, Any]) -> Method:
    """The plan's report with what it was made from."""
    plan = getattr(fitted, "plan", None)
    if not isinstance(plan, Plan):
        return fitted
    changes: dict[str, Any] = {"plan": replace(plan, report={**about, "versions": installed(), **plan.report})}
    return replace(fitted, **changes)
