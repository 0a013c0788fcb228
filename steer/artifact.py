"""Save a method's settings and replay them exactly: `steer.json` and `steer.safetensors`, from a folder or the Hub."""

from __future__ import annotations

import dataclasses
import hashlib
import inspect
import json
import math
import re
import types
import typing
from collections.abc import Mapping, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch

from steer import hub
from steer.fingerprint import made_for
from steer.method import Method, methods
from steer.plan import Plan

FORMAT = 1
JSON, TENSORS = "steer.json", "steer.safetensors"
RECORD = "record"  # where the document keeps what a search tried, for methods without a plan
CONTENTS: Mapping[str, Any] = {"method": str, "fields": dict, "tensors": list, "fingerprint": dict | None}
OF_A_MODEL: Mapping[str, Any] = {"class": str, "config": dict, "sites": list[str]}
NAME = re.compile(r"\w[\w.-]*")  # of a tensor; reports make names of files from it


def load(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Method:
    """Read a method that `Method.save` or `Method.push_to_hub` wrote.

    Applying it checks that the model is the one that it was made for. Nothing in an artifact is code.

    Args:
        source: a folder, or "owner/name" of a repository of the Hugging Face Hub; a folder of that name goes first.
        revision: branch, tag or commit of the repository; a commit never changes.
        token: for private repositories; None = the one that is logged in.
        cache_dir: where downloads are kept; None = the Hub's own cache.

    Raises:
        FileNotFoundError: no such folder or repository, no `steer.json` in it, or a part that is missing.
        ValueError: a newer format, a method or field that this version does not know, or damaged contents.
    """
    folder = folder_of(source, revision=revision, token=token, cache_dir=cache_dir)
    document = read(folder)
    file, name = folder / JSON, document["method"]
    known = methods()
    if name not in known:
        raise ValueError(f"{file} holds a {name}; this version knows {', '.join(known)}; {_versions(document)}")
    cls = known[name]
    unknown = sorted({*document["fields"], *document["tensors"]} - {field.name for field in dataclasses.fields(cls)})
    if unknown:
        raise ValueError(f"{file} has fields that {name} does not: {', '.join(unknown)}; {_versions(document)}")
    tensors = _tensors(folder, document)
    fields: dict[str, Any] = {key: _field(file, key, value, tensors) for key, value in document["fields"].items()}
    _check_types(file, cls, fields)
    fields |= {key: tensors[key] for key in document["tensors"]}
    try:
        method = cls(**fields)
    except (KeyError, TypeError) as error:
        raise ValueError(f"{file} holds settings that no {name} has ({error}); {DAMAGED}") from error
    method.__dict__["_loaded_fingerprint"] = document.get("fingerprint")
    if RECORD in document:
        method.__dict__["_record"] = _field(file, RECORD, document[RECORD], tensors)
    return method


DAMAGED = "it was cut off or changed: save it or download it again"


def folder_of(
    source: str | Path,
    *,
    revision: str | None = None,
    token: str | bool | None = None,
    cache_dir: str | Path | None = None,
) -> Path:
    """The folder of an artifact, downloaded if need be; arguments as in `load`.

    Raises:
        FileNotFoundError: there is none.
    """
    folder = Path(source)
    if folder.is_dir():
        if revision is not None:
            raise ValueError(f"revision={revision!r} is for the Hub, but {source} is a folder here; leave it out")
        if not (folder / JSON).is_file():
            raise FileNotFoundError(f"{folder} holds no {JSON}; it is written by method.save({str(source)!r})")
        return folder
    if not hub.is_id(source):
        raise FileNotFoundError(
            f"{source} is neither a folder nor a repository id of the Hub: give the folder that method.save(folder) "
            'wrote, or "owner/name"'
        )
    folder = hub.download(str(source), (JSON, TENSORS), revision=revision, token=token, cache_dir=cache_dir)
    if not (folder / JSON).is_file():
        raise FileNotFoundError(
            f"the repository {source} holds no {JSON}, so it is no method of steer; one is written by "
            f"method.push_to_hub({str(source)!r})"
        )
    return folder


def read(folder: Path) -> dict[str, Any]:
    """The contents of `steer.json`, of this format and with all that belongs there.

    Raises:
        ValueError: another format, or damaged contents.
    """
    file = folder / JSON
    try:
        document = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # no JSON, or no text
        raise ValueError(f"{file} cannot be read ({error}); {DAMAGED}") from error
    if not isinstance(document, dict):
        raise ValueError(f"{file} holds a {type(document).__name__}, not a JSON object; {DAMAGED}")
    if document.get("format") != FORMAT:
        raise ValueError(
            f"{file} has format {document.get('format')}; this version of steer reads {FORMAT}; {_versions(document)}"
        )
    wrong = [key for key, hint in CONTENTS.items() if not _fits(document.get(key), hint)]
    for key, model in (document.get("fingerprint") or {}).items() if not wrong else ():
        if not isinstance(model, dict) or not all(_fits(model.get(name), hint) for name, hint in OF_A_MODEL.items()):
            wrong.append(f"fingerprint of {key or 'the model'}")
    if wrong:
        raise ValueError(f"{file} is without a proper {', '.join(wrong)}; {DAMAGED}")
    return document


def _versions(document: Mapping[str, Any]) -> str:
    versions = document.get("versions")
    then = versions.get("steer-attention") if isinstance(versions, dict) else None
    return (
        f"steer {then or 'of an unknown version'} wrote it, and {_version('steer-attention') or 'a checkout'} reads it"
    )


def save(method: Method, directory: str | Path) -> None:
    """Write a method's fields into `directory`; see `Method.save`."""
    folder = Path(directory)
    fields = {field.name: getattr(method, field.name) for field in dataclasses.fields(method)}
    tensors = {name: value for name, value in fields.items() if isinstance(value, torch.Tensor)}
    document = {
        "format": FORMAT,
        "method": type(method).__name__,
        "fields": {name: to_json(name, value) for name, value in fields.items() if name not in tensors},
        "tensors": sorted(tensors),
        "versions": installed(),
        "fingerprint": made_for(method),
    }
    if (record := method.__dict__.get("_record")) is not None:
        document[RECORD] = to_json(RECORD, record)
        fields[RECORD] = record
    tensors = {
        name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in tensors.items()
    }
    for name, value in fields.items():
        if isinstance(value, Plan):
            tensors |= {f"{name}.{key}": _packed(tensor) for key, tensor in value.tensors.items()}
    contents = safetensors.torch.save(tensors) if tensors else None
    if contents is not None:
        document["sha256"] = hashlib.sha256(contents).hexdigest()
    text = json.dumps(document, indent=2, sort_keys=True)
    folder.mkdir(parents=True, exist_ok=True)
    if contents is None:
        (folder / TENSORS).unlink(missing_ok=True)
    else:
        (folder / TENSORS).write_bytes(contents)
    (folder / JSON).write_text(text + "\n", encoding="utf-8")


def to_json(name: str, value: Any) -> Any:
    """A field's value as JSON holds it; the tensors of a plan are left to the caller.

    Raises:
        TypeError: a value that cannot be saved.
    """
    if isinstance(value, Plan):
        wrong = [key for key in value.tensors if not NAME.fullmatch(key)]
        if wrong:
            raise TypeError(f"field {name} has tensors named {wrong}; write letters, digits, '_', '-' and '.' only")
        rest = {field.name: getattr(value, field.name) for field in dataclasses.fields(value)}
        shapes = {key: list(tensor.shape) for key, tensor in value.tensors.items() if tensor.dtype == torch.bool}
        return {"plan": {**rest, "tensors": sorted(value.tensors), "packed": shapes}}
    if isinstance(value, range):
        return {"range": [value.start, value.stop, value.step]}
    if isinstance(value, float) and not math.isfinite(value):
        return {"float": str(float(value))}
    if isinstance(value, Mapping) and all(isinstance(key, str) for key in value):
        return {"mapping": {key: to_json(name, each) for key, each in value.items()}}
    if isinstance(value, tuple):
        return {"tuple": [to_json(name, each) for each in value]}
    if isinstance(value, list):
        return [to_json(name, each) for each in value]
    if value is None or isinstance(value, (str, int, float, bool)):
        return value
    raise TypeError(f"field {name}={value!r} of type {type(value).__name__} cannot be saved")


def _field(file: Path, name: str, value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    try:
        return _from_json(name, value, tensors)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{file} has a {name} that cannot be read ({error}); {DAMAGED}") from error


def _from_json(name: str, value: Any, tensors: Mapping[str, torch.Tensor]) -> Any:
    if isinstance(value, list):
        return [_from_json(name, each, tensors) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "range":
        return range(*content)
    if kind == "plan":
        return _plan(name, content, tensors)
    if kind == "float":
        return float(content)
    if kind == "tuple":
        return tuple(_from_json(name, each, tensors) for each in content)
    if kind == "mapping":
        return {key: _from_json(name, each, tensors) for key, each in content.items()}
    raise ValueError(f"{kind!r} is no kind of value")


def _plan(name: str, content: dict[str, Any], tensors: Mapping[str, torch.Tensor]) -> Plan:
    rest = dict(content)
    packed, names = rest.pop("packed"), rest.pop("tensors")
    wrong = [key for key in names if not NAME.fullmatch(key)]
    if wrong:
        raise ValueError(f"its tensors may not be named {wrong}")
    missing = [key for key in names if f"{name}.{key}" not in tensors]
    if missing:
        raise ValueError(f"{TENSORS} lacks its {', '.join(missing)}")
    loaded = {key: tensors[f"{name}.{key}"] for key in names}
    loaded |= {key: _unpacked(key, loaded[key], shape) for key, shape in packed.items()}
    rest = {key: tuple(value) if isinstance(value, list) else value for key, value in rest.items()}
    wrong = [key for key, hint in typing.get_type_hints(Plan).items() if key in rest and not _fits(rest[key], hint)]
    if wrong:
        raise ValueError(f"its {', '.join(wrong)} are of the wrong type")
    return Plan(tensors=loaded, **rest)


def _packed(tensor: torch.Tensor) -> torch.Tensor:
    """As it is saved: booleans, which may be block masks of a whole model, as bits."""
    tensor = tensor.detach().cpu()
    if tensor.dtype == torch.bool:
        return torch.from_numpy(np.packbits(tensor.numpy().reshape(-1)))
    return tensor.clone(memory_format=torch.contiguous_format)


def _unpacked(name: str, bits: torch.Tensor, shape: list[int]) -> torch.Tensor:
    count = math.prod(shape)
    if bits.dtype != torch.uint8 or bits.numel() != -(-count // 8) or min(shape, default=0) < 0:
        raise ValueError(f"its {name} is of {bits.numel()} bytes, which do not make the shape {shape}")
    return torch.from_numpy(np.unpackbits(bits.numpy(), count=count).astype(bool)).view(shape)


def _tensors(folder: Path, document: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    """All tensors of an artifact, by the names under which they were saved."""
    file = folder / TENSORS
    if not file.is_file():
        if "sha256" in document or document["tensors"]:
            raise FileNotFoundError(f"{file} is missing, and {JSON} speaks of its tensors: copy both files")
        return {}
    contents = file.read_bytes()
    if document.get("sha256") not in (None, hashlib.sha256(contents).hexdigest()):
        raise ValueError(f"{file} is not the one that was saved with its {JSON}; {DAMAGED}")
    try:
        tensors = safetensors.torch.load(contents)
    except safetensors.SafetensorError as error:
        raise ValueError(f"{file} cannot be read ({error}); {DAMAGED}") from error
    missing = [name for name in document["tensors"] if name not in tensors]
    if missing:
        raise ValueError(f"{file} lacks {', '.join(missing)}; {DAMAGED}")
    return tensors


def _check_types(file: Path, cls: type[Method], fields: Mapping[str, Any]) -> None:
    hints = typing.get_type_hints(cls)
    for name, value in fields.items():
        if not _fits(value, hints[name]):
            wanted = inspect.formatannotation(hints[name])  # as written, without the span of its form
            raise ValueError(f"{file} has {name}={value!r}, but {name} of {cls.__name__} is {wanted}; {DAMAGED}")


def _fits(value: Any, hint: Any) -> bool:
    """Whether a value is of a field's type; whole numbers count as floats, and text is no sequence."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    if kind in (typing.Union, types.UnionType):
        return any(_fits(value, each) for each in inside)
    if kind in (int, float):
        return isinstance(value, (int, kind)) and not isinstance(value, bool)
    if kind is Any or not isinstance(kind, type):  # not a type: Literal and the like
        return True
    if not isinstance(value, kind) or (isinstance(value, str) and kind is not str):
        return False
    if isinstance(value, Mapping) and inside:
        return all(_fits(key, inside[0]) and _fits(each, inside[1]) for key, each in value.items())
    if isinstance(value, Sequence) and inside:
        return all(_fits(each, inside[0]) for each in value)
    return True


def installed() -> dict[str, str | None]:
    """Versions of steer and of the libraries that its results depend on."""
    return {name: _version(name) for name in ("steer-attention", "torch", "diffusers", "transformers")}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None
