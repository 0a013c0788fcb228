"""EleutherAI's lm-evaluation-harness over a steered model: `language_model(model, tokenizer, method)`.

Importing this makes the harness know the model "steer". On the command line, `steer eval harness` does that.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from tqdm import tqdm
from transformers import PreTrainedModel, PreTrainedTokenizerBase

import steer
from steer_demos import models

try:
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
except ImportError as error:
    raise ImportError(f"the harness is not installed ({error}): pip install 'steer-attention[eval]'") from None

Request = tuple[Any, list[int], list[int]]  # what it is known by, context, continuation


def language_model(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, *methods: steer.Method, **options: Any
) -> SteeredLM:
    """A model as the harness takes it: `lm_eval.simple_evaluate(model=language_model(...), tasks=[...])`.

    Args:
        model: a language model of transformers, steered already or not.
        tokenizer: of it.
        methods: applied to it; `.handle.remove()` takes them off again.
        options: `batch_size` (1), `max_length` (the model's own) and others of the harness's `HFLM`.
    """
    handle = steer.apply(model, *methods) if methods else None
    try:
        steered = SteeredLM(model, tokenizer=tokenizer, **options)
    except BaseException:
        if handle is not None:
            handle.remove()
        raise
    steered.handle = handle
    return steered


@register_model("steer")
class SteeredLM(HFLM):
    """The harness's own model class for transformers, for models whose attention looks at all of a text.

    The harness pads texts on the right and tells the model of no padding, which a causal model does not see; but a
    method that looks at a text as a whole (ACT: which tokens draw attention) does. So a batch has texts of one length.

    Args:
        pretrained: what `steer_demos.models.load` takes, or a model.
        tokenizer: of a model that is given as such.
        artifact: folder of a method that `Method.save` wrote.
        method: or the name of a method, and its fields as further arguments.
        batch_size: texts of equal length that run together.
        max_length: tokens of a text; longer ones are cut from the left. None = what the model was trained for.
        device: by default `cuda` where there is one.

    Raises:
        ValueError: what is no model, method, field or batch size.
    """

    def __init__(
        self,
        pretrained: str | PreTrainedModel,
        tokenizer: PreTrainedTokenizerBase | None = None,
        artifact: str | None = None,
        method: str | None = None,
        batch_size: int | str = 1,
        max_length: int | None = None,
        device: str | None = None,
        **fields: Any,
    ) -> None:
        if str(batch_size).startswith("auto"):
            raise ValueError(f"batch_size={batch_size!r}: texts are batched by length here; give a number")
        chosen = _method(artifact, method, fields)
        if isinstance(pretrained, str):
            pretrained, tokenizer = _load(pretrained, device)
        self.handle = steer.apply(pretrained, chosen) if chosen is not None else None
        try:
            super().__init__(
                pretrained, backend="causal", tokenizer=tokenizer, batch_size=int(batch_size), max_length=max_length
            )
        except BaseException:
            if self.handle is not None:
                self.handle.remove()
            raise

    def _loglikelihood_tokens(
        self, requests: list[Request], disable_tqdm: bool = False, override_bs: int | None = None
    ) -> list[tuple[float, bool]]:
        lengths: dict[int, list[int]] = {}
        for index, (_, context, continuation) in enumerate(requests):
            lengths.setdefault(min(len(context) + len(continuation) - 1, self.max_length), []).append(index)
        answers: dict[int, tuple[float, bool]] = {}
        with tqdm(total=len(requests), desc="loglikelihood", disable=disable_tqdm) as bar:
            for indices in lengths.values():
                group = [requests[index] for index in indices]
                found = super()._loglikelihood_tokens(group, disable_tqdm=True, override_bs=override_bs)
                answers |= dict(zip(indices, found, strict=True))
                bar.update(len(indices))
        return [answers[index] for index in range(len(requests))]


def _load(name: str, device: str | None) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    if device is not None and device.startswith("cuda") and not torch.cuda.is_available():
        device = None  # the harness's command line asks for cuda:0 wherever nobody asks for another
    loaded = models.load(name, device)
    if not (isinstance(loaded, tuple) and isinstance(loaded[1], PreTrainedTokenizerBase)):
        raise ValueError(f"{name} is no language model; `steer models` lists what is")
    return loaded


def _method(artifact: str | None, name: str | None, fields: dict[str, Any]) -> steer.Method | None:
    """The method that the model arguments name; None = the model as it is."""
    if artifact is not None and name is not None:
        raise ValueError("give artifact= or method=, not both")
    if fields and name is None:
        raise ValueError(f"{', '.join(fields)}: no option of the model steer; fields of a method need method=NAME")
    if artifact is not None:
        return steer.load(artifact)
    if name is None:
        return None
    known = steer.methods()
    if name not in known:
        raise ValueError(f"there is no method {name}; there are {', '.join(known)}")
    names = [field.name for field in dataclasses.fields(known[name])]
    unknown = sorted(set(fields) - set(names))
    if unknown:
        raise ValueError(f"{name} has no field {', '.join(unknown)}; it has {', '.join(names)}")
    return known[name](**fields)
