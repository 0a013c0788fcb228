"""Save a method's settings and replay them exactly: `steer.json` and `steer.safetensors`."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from steer.method import Method, methods
from steer.plan import Plan
from steer_patches.sites import find_sites, plain

FORMAT = 1
JSON, TENSORS = "steer.json", "steer.safetensors"
RECORD = "record"  # where the document keeps what a search tried, for methods without a plan


class FingerprintError(ValueError):
    """A saved method meets a model it was not made for."""


def fingerprint(models: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """Class, configuration and attention sites of each model, by component name."""
    return {key: _fingerprint_of(plain(model)) for key, model in models.items()}


def _fingerprint_of(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    config = config.to_dict() if hasattr(config, "to_dict") else dict(config)
    known = {k: v for k, v in config.items() if not k.startswith("_") and k not in VOLATILE}
    text = json.dumps(known, sort_keys=True, default=str)
    names = [site.name for site in find_sites(model)]
    return {
        "class": type(model).__name__,
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "config": json.loads(text),
        "sites": names,
    }


VOLATILE = ("torch_dtype", "dtype", "transformers_version", "name_or_path")


def check_fingerprint(method: Method, models: Mapping[str, torch.nn.Module]) -> None:
    """Raise `FingerprintError`, saying what differs, where a loaded method was made for another model."""
    wanted = method.__dict__.get("_loaded_fingerprint")
    if not wanted:
        return
    here = fingerprint(models)
    for key, then in wanted.items():
        now = here.get(key) or next(iter(here.values()))
        if then["class"] != now["class"]:
            differs = f"it was made for {then['class']}, this is {now['class']}"
        elif then["sites"] != now["sites"]:
            missing = [name for name in then["sites"] if name not in now["sites"]]
            added = [name for name in now["sites"] if name not in then["sites"]]
            differs = "; ".join(
                f"its attention sites {names} {verb}"
                for names, verb in ((_few(missing), "are missing here"), (_few(added), "are new here"))
                if names
            )
        elif then["config_hash"] != now["config_hash"]:
            keys = sorted(set(then["config"]) | set(now["config"]))
            changed = [k for k in keys if then["config"].get(k) != now["config"].get(k)]
            differs = "the configurations differ in " + ", ".join(
                f"{k} ({then['config'].get(k)} -> {now['config'].get(k)})" for k in changed
            )
        else:
            continue
        raise FingerprintError(f"this saved {type(method).__name__} does not fit the model: {differs}")


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def save(method: Method, directory: str | Path) -> None:
    """Write a method's fields into `directory`; see `Method.save`."""
    folder = Path(directory)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    tensors = {name: value.detach().contiguous() for name, value in fields.items() if isinstance(value, torch.Tensor)}
    document = {
        "format": FORMAT,
        "method": type(method).__name__,
        "fields": {name: to_json(name, value) for name, value in fields.items() if name not in tensors},
        "tensors": sorted(tensors),
        "versions": installed(),
        "fingerprint": method.__dict__.get("_fingerprint") or method.__dict__.get("_loaded_fingerprint"),
    }
    if (record := method.__dict__.get("_record")) is not None:
        document[RECORD] = to_json(RECORD, record)
        fields[RECORD] = record
    for name, value in fields.items():
        if isinstance(value, Plan):
            tensors |= {f"{name}.{key}": _packed(tensor) for key, tensor in value.tensors.items()}
    text = json.dumps(document, indent=2, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / JSON).write_text(text + "\n")
    if tensors:
        save_file(tensors, folder / TENSORS)
    else:
        (folder / TENSORS).unlink(missing_ok=True)


def load(directory: str | Path) -> Method:
    """Read a method that `Method.save` wrote; applying it checks that the model is the one it was made for.

    Raises:
        FileNotFoundError: no `steer.json` there.
        ValueError: a newer format, or a method or field that this version does not know.
    """
    folder = Path(directory)
    if not (folder / JSON).is_file():
        raise FileNotFoundError(f"{folder} holds no {JSON}; it is written by method.save({str(directory)!r})")
    document = json.loads((folder / JSON).read_text())
    if document.get("format") != FORMAT:
        raise ValueError(f"{folder / JSON} has format {document.get('format')}; this version of steer reads {FORMAT}")
    known = methods()
    cls = known.get(document["method"])
    if cls is None:
        raise ValueError(f"{folder / JSON} holds a {document['method']}; this version knows {', '.join(known)}")
    has_plan = RECORD in document or any(isinstance(v, dict) and "plan" in v for v in document["fields"].values())
    tensors = load_file(folder / TENSORS) if document["tensors"] or has_plan else {}
    fields = {name: _from_json(name, value, tensors) for name, value in document["fields"].items()}
    fields |= {name: tensors[name] for name in document["tensors"]}
    names = {field.name for field in dataclasses.fields(cls)}
    unknown = sorted(set(fields) - names)
    if unknown:
        raise ValueError(f"{folder / JSON} has fields that {cls.__name__} does not: {', '.join(unknown)}")
    method = cls(**fields)
    method.__dict__["_loaded_fingerprint"] = document.get("fingerprint")
    if RECORD in document:
        method.__dict__["_record"] = _from_json(RECORD, document[RECORD], tensors)
    return method


def to_json(name: str, value: Any) -> Any:
    """A field's value as JSON holds it; the tensors of a plan are left to the caller.

    Raises:
        TypeError: a value that cannot be saved.
    """
    if isinstance(value, Plan):
        rest = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        shapes = {key: list(tensor.shape) for key, tensor in value.tensors.items() if tensor.dtype == torch.bool}
        return {"plan": {**rest, "tensors": sorted(value.tensors), "packed": shapes}}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, float) and value == float("inf"):
        return {"float": "inf"}
    if isinstance(value, Mapping):
        return {"mapping": {k: list(v) for k, v in value.items()}}
    if isinstance(value, (list, tuple)):
        return list(value)
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"field {name}={value!r} of type {type(value).__name__} cannot be saved")


def _from_json(name: str, value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if not isinstance(value, dict):
        return value
    kind, content = next(iter(value.items()))
    if kind == "range":
        return range(*content)
    if kind == "plan":
        return _plan(name, content, tensors)
    return float(content) if kind == "float" else dict(content)


def _plan(name: str, content: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Plan:
    packed = content.pop("packed")
    loaded = {key: tensors[f"{name}.{key}"] for key in content.pop("tensors")}
    loaded |= {key: _unpacked(loaded[key], shape) for key, shape in packed.items()}
    content = {key: tuple(value) if isinstance(value, list) else value for key, value in content.items()}
    return Plan(tensors=loaded, **content)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """As it is saved: booleans, which may be block masks of a whole model, as bits."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bool:
        return torch.from_numpy(np.packbits(tensor.numpy().reshape(-1)))
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpacked(bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=math.prod(shape)).astype(bool)).view(shape)


def installed() -> dict[str, str | None]:
    """Versions of steer and of the libraries that its results depend on."""
    return {name: _version(name) for name in ("steer-attention", "torch", "diffusers", "transformers")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
