"""Vision-language models: the encoding of pictures, which `generate` does before the forward that reads them."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, contextmanager
from functools import cache, wraps
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.utils import ModelOutput

from steer_patches.site import Scope
from steer_patches.swap import mix, put

MODALITIES = ("image", "video")
ARGUMENTS, READ = "steer_arguments", "steer_read"  # what an encoder's output keeps for the forward that gets it


def follow_encoders(
    model: PreTrainedModel, scope: Scope, begin: Callable[[], None], in_turn: AbstractContextManager[Any]
) -> list[Callable[[], None]]:
    """Note with what arguments pictures are encoded, and what methods read meanwhile; returns what takes this back.

    Args:
        begin: called before pictures are encoded outside of a forward.
        in_turn: what forwards hold, so that no other thread's runs meanwhile.
    """
    base: Any = model.base_model
    undo: list[Callable[[], None]] = []
    for modality in MODALITIES:
        name = f"get_{modality}_features"
        if hasattr(type(base), name):
            if not undo:
                undo.append(put(base, "_steer_encoding", (scope, begin, in_turn)))
            undo.append(mix(base, _following(getattr(type(base), name), name, modality)))
    return undo


@cache
def _following(function: Callable[..., Any], name: str, modality: str) -> type:
    """A mixin in which this encoder is followed; with its signature, which `generate` reads."""

    @wraps(function)
    def encode(self: Any, *args: Any, **kwargs: Any) -> Any:
        following = self.__dict__.get("_steer_encoding")
        if following is None or torch.compiler.is_compiling():
            return function(self, *args, **kwargs)
        scope, begin, in_turn = following
        with in_turn:
            if not scope.in_forward:
                begin()
            with _reading(scope, modality) as read:
                output = function(self, *args, **kwargs)
        if isinstance(output, ModelOutput):
            bound = inspect.signature(function).bind(self, *args, **kwargs).arguments
            output.__dict__[ARGUMENTS] = {k: v for k, v in bound.items() if k not in ("self", "kwargs")}
            output.__dict__[READ] = read
        return output

    return type("Encoding", (), {name: encode})


@contextmanager
def _reading(scope: Scope, modality: str) -> Any:
    """While pictures of this modality are encoded, `scope.reading` is what methods may fill."""
    read: dict[Any, Any] = {}
    scope.read[modality], scope.reading = read, read
    try:
        yield read
    finally:
        scope.reading = None


def encoded(arguments: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, dict[Any, Any]]]:
    """The arguments with which the pictures of a forward were encoded before it, and what was read meanwhile."""
    outputs = arguments.get("mm_encoder_outputs") or {}
    found: dict[str, Any] = {}
    read: dict[str, dict[Any, Any]] = {}
    for modality in MODALITIES:
        output = outputs.get(modality) if isinstance(outputs, Mapping) else None
        if output is not None and ARGUMENTS in vars(output):
            found |= vars(output)[ARGUMENTS]
            read[modality] = vars(output)[READ]
    return found, read
