"""Samples for the searches of language models, from a file of texts."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

KEYS = {"prompt": str, "messages": list, "choices": list, "label": int, "needle": str, "completion": str}


def read_samples(path: str | Path, tokenizer: Any) -> list[dict[str, Any]]:
    """The samples of a JSON Lines file, with texts as tokens; what `steer.calibrate` takes for a language model.

    Each line is an object with "prompt", a text, or "messages", a chat for the tokenizer's template; and, by method:
    "choices" (texts) with "label" (index of the right one) for `ACT`; "needle" (a part of the prompt) for
    `RetrievalHeads` and `DuoAttention`; "completion" (the right answer) for `MoA`.

    Args:
        path: the file.
        tokenizer: of the model; needs to be a fast one for "needle".

    Returns:
        Dicts with "input_ids" (1, S) and "choices" (lists of token ids), "label", "needle" (start, stop), or "labels"
        (1, S), which are -100 in the prompt.

    Raises:
        ValueError: a line that is none of this; the message has its number.
    """
    samples = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), start=1):
        if line.strip():
            try:
                samples.append(_sample(json.loads(line), tokenizer))
            except ValueError as error:  # JSON's own errors too
                raise ValueError(f"{path}, line {number}: {error}") from None
    if not samples:
        raise ValueError(f"{path} holds no samples; write a JSON object on each line, with {', '.join(KEYS)}")
    return samples


def _sample(record: Any, tokenizer: Any) -> dict[str, Any]:
    unknown = sorted(set(record) - set(KEYS)) if isinstance(record, Mapping) else []
    if not isinstance(record, Mapping) or unknown or ("prompt" in record) == ("messages" in record):
        what = f"it has {', '.join(unknown)}" if unknown else "it must have either prompt or messages"
        raise ValueError(f"a sample is an object with {', '.join(KEYS)}; {what}")
    wrong = [name for name, value in record.items() if type(value) is not KEYS[name]]
    if wrong:
        raise ValueError(f"{wrong[0]}={record[wrong[0]]!r} must be of type {KEYS[wrong[0]].__name__}")
    is_chat = "messages" in record
    prompt: str = record.get("prompt", "")
    if is_chat:  # the template writes the special tokens itself
        prompt = tokenizer.apply_chat_template(record["messages"], tokenize=False, add_generation_prompt=True)
    wants_place = "needle" in record
    encoded = tokenizer(prompt, add_special_tokens=not is_chat, return_offsets_mapping=wants_place)
    ids = list(encoded["input_ids"])
    sample: dict[str, Any] = {}
    if wants_place:
        sample["needle"] = _span(prompt, record["needle"], encoded["offset_mapping"])
    if "choices" in record:
        sample["choices"] = [_tokens(tokenizer, choice) for choice in record["choices"]]
        sample["label"] = record.get("label")
        if sample["label"] is None or not 0 <= sample["label"] < len(sample["choices"]):
            raise ValueError(f"label={sample['label']!r} must be the index of one of {len(sample['choices'])} choices")
    if "completion" in record:
        answer = _tokens(tokenizer, record["completion"])
        sample["labels"] = torch.tensor([[-100] * len(ids) + answer])
        ids = ids + answer
    return {"input_ids": torch.tensor([ids]), **sample}


def _tokens(tokenizer: Any, text: Any) -> list[int]:
    if not isinstance(text, str):
        raise ValueError(f"{text!r} is no text")
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    if not ids:
        raise ValueError(f"{text!r} has no tokens")
    return list(ids)


def _span(prompt: str, needle: str, places: Sequence[tuple[int, int]]) -> tuple[int, int]:
    """The tokens [start, stop) of the last occurrence of `needle` in the prompt, without a blank before it."""
    start = prompt.rfind(needle.strip())
    if start < 0 or not needle.strip():
        raise ValueError(f"the needle {needle!r} is no part of the prompt")
    stop = start + len(needle.strip())
    inside = [i for i, (first, last) in enumerate(places) if first < stop and last > start]
    return inside[0], inside[-1] + 1
