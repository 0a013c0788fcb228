"""What a saved method was made for, and whether a model is that: class, configuration, attention sites, heads."""

from __future__ import annotations

import hashlib
import json
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.utils import HFValidationError, validate_repo_id

from steer.method import Method
from steer_patches.sites import find_sites, plain

# Keys of a configuration that differ between trainings of one architecture, or between runs, and change no attention.
VOLATILE = (
    *("torch_dtype", "dtype", "transformers_version", "name_or_path", "architectures", "quantization_config"),
    *("use_cache", "bos_token_id", "eos_token_id", "pad_token_id", "tokenizer_class"),
)


class FingerprintError(ValueError):
    """A saved method meets a model it was not made for."""


class ArtifactWarning(UserWarning):
    """A saved method fits this model, but was searched on other weights."""


def fingerprint(models: Mapping[str, torch.nn.Module]) -> dict[str, Any]:
    """Class, configuration, attention sites, query heads and hub id (None if unknown) of each model, by component."""
    return {key: _fingerprint_of(plain(model)) for key, model in models.items()}


def made_for(method: Method) -> dict[str, Any] | None:
    """The fingerprint of what a method was fitted, applied or saved for last; None if it never met a model."""
    return method.__dict__.get("_fingerprint") or method.__dict__.get("_loaded_fingerprint")


def check_fingerprint(method: Method, models: Mapping[str, torch.nn.Module]) -> None:
    """Refuse a loaded method on another model; warn where the model has other weights than the search had.

    Raises:
        FingerprintError: saying what differs.
    """
    wanted = method.__dict__.get("_loaded_fingerprint")
    if not wanted:
        return
    if differs := _difference(wanted, fingerprint(models)):
        raise FingerprintError(f"this saved {type(method).__name__} does not fit the model: {differs}")
    _warn_of_weights(method, models)


def _fingerprint_of(model: torch.nn.Module) -> dict[str, Any]:
    config: Any = model.config
    name = getattr(config, "_name_or_path", None) or getattr(config, "name_or_path", None)
    known = _lasting(config.to_dict() if hasattr(config, "to_dict") else dict(config))
    text = json.dumps(known, sort_keys=True, default=str)
    sites = find_sites(model)
    return {
        "class": type(model).__name__,
        "config_hash": hashlib.sha256(text.encode()).hexdigest(),
        "config": json.loads(text),
        "sites": [site.name for site in sites],
        "heads": [site.heads for site in sites],
        "id": _hub_id(name),
    }


def _lasting(config: Any) -> Any:
    if isinstance(config, Mapping):
        return {k: _lasting(v) for k, v in config.items() if not str(k).startswith("_") and k not in VOLATILE}
    return config


def _hub_id(name: Any) -> str | None:
    """Of the name or path that a model was loaded from: itself, or that of the cache's folder; never a local path."""
    if not isinstance(name, str):
        return None
    cached = next((part for part in name.replace("\\", "/").split("/") if part.startswith("models--")), "")
    name = cached.removeprefix("models--").replace("--", "/", 1) or name
    try:
        validate_repo_id(name)
    except HFValidationError:
        return None
    return name if name.count("/") == 1 and not Path(name).exists() else None


def _difference(wanted: Mapping[str, Any], here: Mapping[str, Any]) -> str:
    """What tells the models apart; empty if nothing does. A model of a pipeline and the model alone are the same."""
    if "" in wanted or "" in here:
        found = [_difference_of(then, now) for then in wanted.values() for now in here.values()]
        return "" if "" in found else found[0]
    for key in (key for key in wanted if key in here):
        if differs := _difference_of(wanted[key], here[key]):
            return differs
    if set(wanted) != set(here):
        return f"it was made for {_components(wanted)}, this is {_components(here)}"
    return ""


def _components(models: Mapping[str, Any]) -> str:
    return "a pipeline with " + " and ".join(f"{key} ({model['class']})" for key, model in models.items())


def _difference_of(then: Mapping[str, Any], now: Mapping[str, Any]) -> str:
    if then["class"] != now["class"]:
        return f"it was made for {then['class']}, this is {now['class']}"
    if then["sites"] != now["sites"]:
        missing = [name for name in then["sites"] if name not in now["sites"]]
        added = [name for name in now["sites"] if name not in then["sites"]]
        found = ((_few(missing), "are missing here"), (_few(added), "are new here"))
        listed = "; ".join(f"its attention sites {names} {verb}" for names, verb in found if names)
        return listed or "its attention sites come in another order here"
    differs = []
    heads = zip(then["sites"], then.get("heads", now["heads"]), now["heads"], strict=True)
    other = [f"{site} ({before} -> {after})" for site, before, after in heads if before != after]
    if other:
        differs.append(f"the query heads differ at {_few(other)}")
    # a key that only one side has comes from another version of the library
    before, after = _lasting(then["config"]), _lasting(now["config"])
    changed = [key for key in sorted(before) if key in after and before[key] != after[key]]
    if changed:
        listed = ", ".join(f"{key} ({before[key]} -> {after[key]})" for key in changed)
        differs.append(f"the configurations differ in {listed}")
    return "; ".join(differs)


def _few(names: list[str]) -> str:
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _warn_of_weights(method: Method, models: Mapping[str, torch.nn.Module]) -> None:
    """Once a method: fine-tunes are welcome, but their best heads may be others."""
    from steer.checkpoint import digest_of_weights

    if method.record is None or method.__dict__.get("_told_of_weights"):
        return
    searched = method.record.report.get("model", {})
    for key, model in models.items():
        alone = next(iter(searched.values())) if len(searched) == len(models) == 1 else {}
        then = searched.get(key or "model", alone)
        inner: Any = plain(model)
        if then.get("dtype") != str(inner.dtype) or any(p.is_meta for p in inner.parameters()):
            continue  # rounded, quantised or offloaded weights cannot be compared
        if then["weights"] != (now := digest_of_weights(inner)):
            method.__dict__["_told_of_weights"] = True
            warnings.warn(
                f"this saved {type(method).__name__} was searched on a {then['class']} with other weights (digest "
                f"{then['weights']}, here {now}), as a fine-tune has; it applies, but its figures are not of this "
                "model: calibrate again to be sure",
                ArtifactWarning,
                stacklevel=4,
            )
            return
