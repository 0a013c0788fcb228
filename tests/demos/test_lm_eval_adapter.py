"""The lm-evaluation-harness scores a steered model as we do; needs the package lm_eval."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from tiny_text import language_model as tiny_llama
from tiny_text import tokenizer as byte_tokenizer
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import steer
from steer.method import Method
from steer_demos.evaluate import app
from steer_demos.language_tasks import QUESTIONS, questions
from steer_patches.site import Call, Next

pytest.importorskip("lm_eval")

import lm_eval
from lm_eval.api.instance import Instance
from lm_eval.models.huggingface import HFLM
from lm_eval.tasks import TaskManager

from steer_demos.lm_eval_adapter import SteeredLM, language_model


@dataclass(kw_only=True)
class WholeText(Method, register=False):
    """Adds the mean over all real tokens, also later ones: padding that the model does not know of shows."""

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    default_layers: ClassVar[str] = "*"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        out = next(call)
        assert call.text is not None
        if call.text.past:
            return out
        real = torch.ones(1, out.shape[2]) if call.text.valid is None else call.text.valid.float()
        mean = (out * real[:, None, :, None]).sum(2, keepdim=True) / real.sum(1)[:, None, None, None]
        return out + mean


def asked(kind: str, *arguments: tuple[Any, ...]) -> list[Instance]:
    return [Instance(kind, {}, given, number) for number, given in enumerate(arguments)]


TEXTS = (
    ("a b", " c"),
    ("a longer text, to pad the others for", " six"),
    ("q", " r"),
    ("a b", " d"),
    ("text", " x y z"),
)


def own_score(model: LlamaForCausalLM, prompt: list[int], choice: list[int]) -> float:
    """Sum of the log-probabilities of the tokens of an answer, alone in its batch; its last token is not read."""
    ids = torch.tensor([[*prompt, *choice[:-1]]])
    with torch.no_grad():
        scores = model(ids).logits[0, len(prompt) - 1 :].double().log_softmax(-1)
    return float(scores.gather(1, torch.tensor(choice)[:, None]).sum())


@pytest.mark.parametrize("methods", [(), (WholeText(),)])
def test_batches_of_different_lengths(methods: tuple[Method, ...]) -> None:
    """In one batch as alone, in the order asked for; the harness's own class shows a method its padding."""
    model, words = tiny_llama(), byte_tokenizer()
    harness = language_model(model, words, *methods, batch_size=8)
    found = [score for score, _ in harness.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)]
    expected = [own_score(model, words.encode(prompt), words.encode(answer)) for prompt, answer in TEXTS]
    assert found == pytest.approx(expected, abs=1e-4)
    plain = HFLM(model, backend="causal", tokenizer=words, batch_size=8)
    padded = [score for score, _ in plain.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)]
    assert (padded == pytest.approx(expected, abs=1e-4)) == (not methods)


def test_generated_text_does_not_depend_on_the_batch() -> None:
    model, words = tiny_llama(), byte_tokenizer()
    options = {"until": ["</s>"], "max_gen_toks": 6}
    requests = [(prompt, options) for prompt, _ in TEXTS[:3]]
    together = language_model(model, words, WholeText(), batch_size=3)
    found = together.generate_until(asked("generate_until", *requests), disable_tqdm=True)
    for text, request in zip(found, requests, strict=True):
        assert together.generate_until(asked("generate_until", request), disable_tqdm=True) == [text]
    assert together.handle is not None
    together.handle.remove()
    dense = language_model(model, words, batch_size=3)
    assert dense.generate_until(asked("generate_until", *requests), disable_tqdm=True) != found


def test_task_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Written by the command, read by the harness, and scored as the questions themselves."""
    monkeypatch.setattr("datasets.config.HF_DATASETS_CACHE", tmp_path / "cache")
    assert CliRunner().invoke(app, ["tasks", str(tmp_path / "tasks"), "--count", "6", "--seed", "3"]).exit_code == 0
    model, words = tiny_llama(), byte_tokenizer()
    result = lm_eval.simple_evaluate(
        model=language_model(model, words, batch_size=4),
        tasks=[f"steer_{name}" for name in QUESTIONS],
        task_manager=TaskManager(include_path=str(tmp_path / "tasks"), include_defaults=False),
        bootstrap_iters=0,
    )
    for name in QUESTIONS:
        right = right_by_character = 0
        for sample in questions(words, name, 6, seed=3):
            prompt, characters = sample["input_ids"][0].tolist(), torch.tensor(sample["characters"])
            scores = torch.tensor([own_score(model, prompt, choice) for choice in sample["choices"]])
            right += int(scores.argmax()) == sample["label"]
            right_by_character += int((scores / characters).argmax()) == sample["label"]
        found = result["results"][f"steer_{name}"]
        assert found["acc,none"] == pytest.approx(right / 6)
        assert found["acc_norm,none"] == pytest.approx(right_by_character / 6)


def test_model_arguments(tmp_path: Path) -> None:
    """What the command line gives: a folder, and a saved method or the name of one with its fields."""
    model, words = tiny_llama(), byte_tokenizer()
    model.save_pretrained(tmp_path / "model")
    words.save_pretrained(tmp_path / "model")
    method = steer.ACT(beta=0.1, layers="*", keep_first=0)
    with steer.apply(model, method):
        method.save(str(tmp_path / "act"))
        expected = language_model(model, words).loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)
    dense = language_model(model, words).loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True)
    common = {"pretrained": str(tmp_path / "model"), "device": "cuda:0"}
    loaded = SteeredLM.create_from_arg_obj({**common, "artifact": str(tmp_path / "act")})
    named = SteeredLM.create_from_arg_obj({**common, "method": "ACT", "beta": 0.1, "layers": "*", "keep_first": 0})
    for harness in (loaded, named):
        assert harness.loglikelihood(asked("loglikelihood", *TEXTS), disable_tqdm=True) == expected != dense


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"method": "ATC"}, "no method ATC"),
        ({"method": "ACT", "gamma": 1}, "no field gamma"),
        ({"gamma": 1}, "need method=NAME"),
        ({"method": "ACT", "artifact": "x"}, "not both"),
        ({"batch_size": "auto"}, "give a number"),
    ],
)
def test_bad_arguments(given: dict[str, Any], message: str) -> None:
    model = tiny_llama()
    with pytest.raises(ValueError, match=message):
        SteeredLM(model, tokenizer=byte_tokenizer(), **given)
    assert "_steer_state" not in model.__dict__


def test_a_failure_leaves_the_model_as_it_was() -> None:
    model = tiny_llama()
    with pytest.raises(TypeError):
        language_model(model, byte_tokenizer(), WholeText(), pretrained="again")
    assert "_steer_state" not in model.__dict__
    assert json.dumps(model.config.to_dict()) == json.dumps(tiny_llama().config.to_dict())
