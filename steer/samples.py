"""Samples of pipelines: what one may hold, and the arguments that draw it several times in one batch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

COUNTS = ("num_images_per_prompt", "num_videos_per_prompt", "batch_size")  # how pipelines call it


def check_samples(target: Any, samples: Sequence[Mapping[str, Any]]) -> None:
    """Raise where a sample holds several prompts, or says how often it is drawn."""
    if not isinstance(target, DiffusionPipeline):
        return
    for sample in samples:
        if count := next((name for name in COUNTS if name in sample), None):
            raise TypeError(f"data must leave out {count}: calibrate decides how many are drawn at once")
        if isinstance(sample.get("prompt"), (list, tuple)):
            raise TypeError("a sample is one prompt; give a list of prompts as a list of samples")


def can_repeat(sample: Mapping[str, Any]) -> bool:
    """Whether a sample can be drawn several times in one batch: it holds one prompt, and no pictures."""
    plain_values = (str, int, float, bool, type(None), torch.Tensor)
    for value in sample.values():
        numbers = isinstance(value, (list, tuple)) and all(isinstance(each, (int, float)) for each in value)
        if not (isinstance(value, plain_values) or numbers or callable(value)):
            return False
        if isinstance(value, torch.Tensor) and not (value.ndim > 1 and value.shape[0] == 1):
            return False
    return isinstance(sample.get("prompt"), str) or isinstance(sample.get("prompt_embeds"), torch.Tensor)


def repeated(sample: Mapping[str, Any], count: int) -> dict[str, Any]:
    """The arguments of a batch that draws the sample so often.

    As lists of prompts, which every pipeline takes: some ignore num_videos_per_prompt, others do not repeat embeddings.
    """

    def repeat(name: str, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.repeat_interleave(count, 0)
        is_prompt = name.startswith(("prompt", "negative_prompt")) and isinstance(value, str)
        return [value] * count if is_prompt else value

    return {name: repeat(name, value) for name, value in sample.items()}
