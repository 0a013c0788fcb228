"""A calibration's state in a file, and what that state depends on."""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import inspect
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any, Protocol

import numpy as np
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from steer.artifact import to_json
from steer.fingerprint import fingerprint
from steer.method import Method
from steer.plan import Plan
from steer_patches.sites import plain

CHECKPOINT = "calibration.safetensors"
SHOWN = 12  # characters of a digest


class Resumable(Protocol):
    """What a checkpoint saves: all that was collected so far, as tensors and as values that JSON holds."""

    def state(self) -> dict[str, Any]: ...
    def load_state(self, state: Mapping[str, Any]) -> None: ...


class Checkpoint:
    """A search's state in one file, replaced as a whole: a kill leaves the old one or the new one.

    Args:
        folder: where the file is.
        about: what the search depends on: method, settings, options, seed, data, model.
    """

    def __init__(self, folder: Path, about: Mapping[str, Any]) -> None:
        self.file, self.about = folder / CHECKPOINT, json.loads(json.dumps(about))

    def save(self, search: Resumable) -> None:
        """Write the present state."""
        state = search.state()
        tensors = {name: value.detach().cpu().clone() for name, value in state.items() if _is_tensor(value)}
        rest = {name: value for name, value in state.items() if name not in tensors}
        text = json.dumps({"about": self.about, "state": rest})
        self.file.parent.mkdir(parents=True, exist_ok=True)
        new = self.file.with_suffix(".new")
        save_file(tensors, new, metadata={"steer": text})
        os.replace(new, self.file)

    def resume(self, search: Resumable) -> None:
        """Give the search its saved state back, where there is one.

        Raises:
            ValueError: the file is of another search; the message names what differs.
        """
        if not self.file.is_file():
            return
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


def _flat(tree: Any, name: str = "") -> dict[str, Any]:
    if not isinstance(tree, dict):
        return {name: tree}
    return {key: leaf for k, v in tree.items() for key, leaf in _flat(v, f"{name}.{k}" if name else k).items()}


def about(
    method: Method,
    models: Mapping[str, torch.nn.Module],
    samples: list[Mapping[str, Any]],
    seed: int,
    options: Mapping[str, Any],
) -> dict[str, Any]:
    """All that the result of a calibration depends on, as JSON."""
    here = fingerprint(models)
    return {
        "method": type(method).__name__,
        "settings": {field.name: _shown(getattr(method, field.name)) for field in dataclasses.fields(method)},
        "options": {name: _shown(value) for name, value in options.items()},
        "code": digest([_code_of(each) for value in options.values() for each in _functions_in(value)]),
        "seed": seed,
        "samples": len(samples),
        "data": {str(i): digest(sample) for i, sample in enumerate(samples)},
        "model": {
            key or "model": {
                "class": here[key]["class"],
                "config": here[key]["config_hash"][:SHOWN],
                "sites": digest(here[key]["sites"]),
                "dtype": str(plain(model).dtype),
                "weights": digest_of_weights(plain(model)),
            }
            for key, model in models.items()
        },
    }


def _shown(value: Any) -> Any:
    if _is_tensor(value) or isinstance(value, Plan):
        return digest(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        parts = (f"{field.name}={_written(getattr(value, field.name))}" for field in dataclasses.fields(value))
        return f"{type(value).__name__}({', '.join(parts)})"
    if isinstance(value, functools.partial):
        given = [*map(repr, value.args), *(f"{name}={each!r}" for name, each in value.keywords.items())]
        return f"{_shown(value.func)}({', '.join(given)})"
    if callable(value):
        return getattr(value, "__qualname__", None) or type(value).__qualname__
    if isinstance(value, (str, Path)) and Path(value).is_absolute():
        return Path(value).name  # folders of this machine are nobody's business
    try:
        return to_json("option", value)
    except TypeError:
        return digest(value)


def _written(value: Any) -> str:
    """A field as Python writes it, rather than as the file keeps it: (1.0, 6.0), not {"tuple": [1.0, 6.0]}."""
    try:
        to_json("field", value)
    except TypeError:
        return repr(_shown(value))
    return repr(value) if isinstance(value, (Mapping, list, tuple, range)) else repr(_shown(value))


def _functions_in(value: Any) -> Iterator[FunctionType]:
    """Functions that an option is or holds; of one that `functools.wraps` dresses, what is inside."""
    if isinstance(value, FunctionType):
        yield inspect.unwrap(value)
    elif isinstance(value, functools.partial):
        yield from _functions_in(value.func)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        for field in dataclasses.fields(value):
            yield from _functions_in(getattr(value, field.name))


def _code_of(function: FunctionType | CodeType) -> list[Any]:
    """What a function does, so that another one of the same name is another search; of a closure, not its values."""
    code = function.__code__ if isinstance(function, FunctionType) else function
    return [code.co_code.hex(), list(code.co_names), [_constant(each) for each in code.co_consts]]


def _constant(value: Any) -> Any:
    if isinstance(value, CodeType):
        return _code_of(value)
    return sorted(map(repr, value)) if isinstance(value, frozenset) else repr(value)  # sets of text have no order


def digest_of_weights(model: torch.nn.Module, values: int = 16) -> str:
    """Of the names, shapes and first values of all parameters: enough to tell one training from another."""
    return digest(
        {
            name: (str(p.dtype), tuple(p.shape), None if p.is_meta else p.detach().reshape(-1)[:values])
            for name, p in model.named_parameters()
        }
    )


def _is_tensor(value: Any) -> bool:
    return isinstance(value, torch.Tensor)


def digest(value: Any) -> str:
    """A short hash of nested values: tensors, arrays and pictures by their contents, functions by their names."""
    seen = hashlib.sha256()
    _feed(seen, value)
    return seen.hexdigest()[:SHOWN]


def _feed(seen: Any, value: Any) -> None:
    seen.update(type(value).__name__.encode())
    if isinstance(value, Plan):
        value = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
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
