"""The methods that come fitted to the embedded models: each is there, belongs to its model, and does something."""

from __future__ import annotations

import warnings
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

import steer
from steer_demos import models
from steer_demos.fitted.__main__ import FITS, fit, main
from steer_demos.language_tasks import questions, text
from steer_demos.models import emoji_vlm

NEUTRAL = {("emoji-vlm", "VAR")}  # its search finds no sink dimensions in that model


@cache
def loaded(model: str) -> Any:
    return models.load(model, device="cpu", dtype=torch.float32)


def output(model: str, method: str) -> torch.Tensor:
    """What the model makes of a short task, as numbers."""
    if model in ("emoji-mmdit", "emoji-wan"):
        options = {
            "output_type": "latent",
            "num_inference_steps": 4,
            "guidance_scale": 1.0,
            **models.call_options(model),
        }
        prompt = "a red apple" if model == "emoji-mmdit" else "a red apple moving left"
        return loaded(model)(prompt, generator=torch.Generator().manual_seed(0), **options)[0]
    language, processor = loaded(model)
    if model == "emoji-vlm":
        inputs = processor(
            images=Image.new("RGB", (96, 96), "red"),
            text=emoji_vlm.prompt(processor, "Is there a cat?"),
            return_tensors="pt",
        )
    else:
        long = method != "ACT"  # windows hide something in long texts alone
        inputs = {
            "input_ids": text(processor, 300, 1) if long else questions(processor, "sentiment", 1, 7)[0]["input_ids"]
        }
    with torch.no_grad():
        return language(**inputs).logits


@pytest.mark.parametrize(("model", "method"), list(FITS))
def test_it_fits_its_model_and_changes_what_that_makes(model: str, method: str) -> None:
    folder = models.fitted(model, method)
    assert folder is not None
    fitted = steer.load(folder)
    assert type(fitted).__name__ == method
    assert fitted.record is not None
    target = loaded(model)[0] if isinstance(loaded(model), tuple) else loaded(model)
    plain = output(model, method)
    with warnings.catch_warnings():
        warnings.simplefilter("error", steer.ArtifactWarning)
        with steer.apply(target, fitted):
            steered = output(model, method)
    assert torch.isfinite(steered).all()
    assert torch.equal(plain, steered) == ((model, method) in NEUTRAL)
    assert torch.equal(output(model, method), plain)


def test_all_are_listed_and_small() -> None:
    assert set(models.list_fitted()) == set(FITS)
    assert sum(file.stat().st_size for file in models.FITTED.rglob("steer.*")) < 500_000


def test_others_are_not_there() -> None:
    assert models.fitted("emoji-mmdit", "ACT") is None
    assert models.fitted("emoji-mmdit", "../emoji-wan/SparseVDiT") is None
    assert models.fitted("../weights", "emoji-mmdit") is None


def test_the_commands_are_those_of_the_readme(capsys: pytest.CaptureFixture[str]) -> None:
    written = (models.FITTED / "README.md").read_text()
    for model, method in FITS:
        assert f"python -m steer_demos.fitted {model}/{method}" in written
    with pytest.raises(SystemExit):
        main(["emoji-mmdit/NoSuch"])
    assert "there is no emoji-mmdit/NoSuch; there are smollm2-135m-instruct/RetrievalHeads" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.parametrize(("model", "method"), [("emoji-vlm", "VAR"), ("emoji-mmdit", "PAROAttention")])
def test_fitting_again_finds_the_same(model: str, method: str, tmp_path: Path) -> None:
    again, kept = fit(model, method, tmp_path), steer.load(models.fitted(model, method) or "")
    assert again.record is not None and kept.record is not None
    assert {name: str(value) for name, value in again.settings().items()} == {
        name: str(value) for name, value in kept.settings().items()
    }
    for name, tensor in kept.record.tensors.items():
        torch.testing.assert_close(again.record.tensors[name], tensor, rtol=1e-3, atol=1e-4)
