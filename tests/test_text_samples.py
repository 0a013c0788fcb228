"""Samples for language models from a file of texts, and `steer calibrate` with them."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from transformers import AutoTokenizer

from steer.text_samples import read_samples
from steer_demos.models import smollm2


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(smollm2.folder(), local_files_only=True)


def written(folder: Path, *records: Any) -> Path:
    path = folder / "samples.jsonl"
    path.write_text("\n\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def test_choices(tokenizer: Any, tmp_path: Path) -> None:
    record = {"prompt": "The film was", "choices": [" good", " bad", " very long"], "label": 1}
    (sample,) = read_samples(written(tmp_path, record), tokenizer)
    assert tokenizer.decode(sample["input_ids"][0]) == "The film was"
    assert [tokenizer.decode(choice) for choice in sample["choices"]] == record["choices"]
    assert sample["label"] == 1


def test_the_place_of_a_needle(tokenizer: Any, tmp_path: Path) -> None:
    text = "A secret word. The secret word is walnut grove. What is it?"
    records = [{"prompt": text, "needle": "walnut grove"}, {"prompt": text, "needle": "secret word"}]
    samples = read_samples(written(tmp_path, *records), tokenizer)
    found = [tokenizer.decode(sample["input_ids"][0, slice(*sample["needle"])]) for sample in samples]
    assert found == [" walnut grove", " secret word"]
    assert samples[1]["needle"][0] > 4  # the last one


def test_labels_cover_the_completion_of_a_chat(tokenizer: Any, tmp_path: Path) -> None:
    record = {"messages": [{"role": "user", "content": "Say five."}], "completion": "Five."}
    (sample,) = read_samples(written(tmp_path, record), tokenizer)
    labels, ids = sample["labels"], sample["input_ids"]
    assert labels.shape == ids.shape
    assert tokenizer.decode(labels[labels != -100]) == "Five."
    assert (ids[labels != -100] == labels[labels != -100]).all()
    assert tokenizer.decode(ids[0]).endswith("<|im_start|>assistant\nFive.")


@pytest.mark.parametrize(
    ("record", "message"),
    [
        ({"choices": ["a"], "label": 0}, "line 3: .*either prompt or messages"),
        ({"prompt": "a", "messages": []}, "either prompt or messages"),
        ({"prompt": "a", "answer": "b"}, "it has answer"),
        ({"prompt": "a", "choices": ["b", "c"], "label": 2}, "label=2 must be the index of one of 2 choices"),
        ({"prompt": "a", "choices": ["b", ""], "label": 0}, "'' has no tokens"),
        ({"prompt": "a", "needle": "b"}, "the needle 'b' is no part of the prompt"),
        ([1], "a sample is an object with prompt, messages, choices"),
        ({"prompt": "a", "needle": " "}, "the needle ' ' is no part of the prompt"),
        ({"prompt": 3}, "prompt=3 must be of type str"),
        ({"prompt": "a", "choices": "bc", "label": 0}, "choices='bc' must be of type list"),
        ({"prompt": "a", "choices": ["b", 3], "label": 0}, "3 is no text"),
    ],
)
def test_bad_lines(tokenizer: Any, tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_samples(written(tmp_path, {"prompt": "fine"}, record), tokenizer)


def test_files_without_samples_or_json(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "empty.jsonl"
    path.write_text("\n")
    with pytest.raises(ValueError, match="holds no samples"):
        read_samples(path, tokenizer)
    path.write_text("{'prompt': 1}\n")
    with pytest.raises(ValueError, match="line 1: Expecting property name"):
        read_samples(path, tokenizer)
