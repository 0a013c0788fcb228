"""What a command's words stand for: a model by its name, a method by its name and fields."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Mapping, Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

import diffusers
import torch
import transformers

import steer
from steer.method import Method


def open_model(name: str) -> Any:
    """A pipeline or model by embedded name, folder or hub id; a class name gives its default shape without weights."""
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
        with torch.device("meta"):
            return cls()
    for entry in entry_points(group="steer.loaders"):
        loaded = entry.load()(name)
        return loaded[0] if isinstance(loaded, tuple) else loaded
    return diffusers.DiffusionPipeline.from_pretrained(name)


def call_options(name: str) -> dict[str, Any]:
    """Arguments that the pipeline of an embedded model needs; empty for other models."""
    return {key: value for entry in entry_points(group="steer.calls") for key, value in entry.load()(name).items()}


def open_language(name: str) -> tuple[Any, Any]:
    """A language model and its tokenizer."""
    for entry in entry_points(group="steer.loaders"):
        loaded = entry.load()(name)
        if not (isinstance(loaded, tuple) and isinstance(loaded[1], transformers.PreTrainedTokenizerBase)):
            cls = type(loaded[0] if isinstance(loaded, tuple) else loaded).__name__
            raise ValueError(f"{name} is a {cls}, and a language model is wanted here")
        return loaded
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(name)


def steering(
    method: str | None, settings: Sequence[str] | None, artifact: Path | None, processor: Any = None
) -> Method | None:
    """The method that the options of a command name; None if they name none.

    Args:
        processor: of a vision-language model, for methods that read its chat template.
    """
    if method is not None and artifact is not None:
        raise ValueError("give --method or --artifact, not both")
    if settings and method is None:
        raise ValueError("--set sets fields of a method: give --method too")
    if artifact is not None:
        return steer.load(str(artifact))
    return None if method is None else method_of(method, assignments("--set", settings or []), processor)


def method_of(name: str, given: Mapping[str, Any], processor: Any = None) -> Any:
    """A method by name, with values of its fields; `processor` as in `steering`.

    Raises:
        ValueError: no such method, field, or value of it.
    """
    known = steer.methods()
    if name not in known:
        raise ValueError(f"there is no method {name}; there are {', '.join(known)}")
    names = [field.name for field in dataclasses.fields(known[name])]
    for key in given:
        if key not in names:
            raise ValueError(f"{name} has no field {key!r}; it has {', '.join(names)}")
    for_processor: Any = None if processor is None else getattr(known[name], "for_processor", None)
    try:
        return known[name](**given) if for_processor is None else for_processor(processor, **given)
    except TypeError as error:
        values = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{name} cannot take {values}: {error}") from None


def assignments(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; values are JSON, or text where they are none."""
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text!r} is not understood; write {option} key=value")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs
