"""`steer bench vlm`: the whole benchmark at its tiny setting, and the copies of the model in which it runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_vision_language import ONE, inputs, model_of
from typer.testing import CliRunner

import steer
from steer import bench_vlm
from steer.cli import app


def test_small_run_writes_figures_of_methods_that_edit(tmp_path: Path) -> None:
    figures = tmp_path / "vlm.json"
    options = ["--small", "--repeats", "2", "--device", "cpu", "--output", str(figures)]
    run = CliRunner().invoke(app, ["bench", "vlm", *options])
    assert run.exit_code == 0, run.output
    result = json.loads(figures.read_text())
    rows = result["rows"]
    assert [row["form"] for row in rows[:3]] == ["sdpa", "eager map", "sdpa, through steer"]
    assert rows[0]["token_over_sdpa"] == 1 and result["environment"]["torch"] == torch.__version__
    for name in ("VAR", "VHR", "GIFT", "ImbalancedAttention, gamma 1", "ImbalancedAttention, gamma 1.1"):
        forms = {row["form"]: row for row in rows if row["method"] == name}
        assert {"steer", "eager map"} <= set(forms), name
        compared = [row for row in forms.values() if "error" in row]
        assert compared, name
        for row in compared:
            assert row["error"] < 1e-5, name  # of outputs about 1, in float32
            assert row["edited"] > 0.1, name
            assert row["token_over_eager"] > 0 and row["prompt_over_sdpa"] > 0


def test_a_twin_shares_weights_and_leaves_the_model_alone() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    with torch.no_grad():
        before = model(**given).logits
        other = bench_vlm.twin(model, "eager")
        assert all(a is b for a, b in zip(model.parameters(), other.parameters(), strict=True))
        steer.apply(other, bench_vlm.Pass())
        torch.testing.assert_close(other(**given).logits, before)
        assert torch.equal(model(**given).logits, before)
    assert model.config._attn_implementation == "sdpa" and not hasattr(model, "_steer_state")


def test_planted_sinks_are_in_every_layer() -> None:
    _, model = bench_vlm.random_llava(torch.device("cpu"), torch.float32, small=True)
    given = bench_vlm.prompt(model)
    with torch.no_grad():
        (dim,), tau = bench_vlm.planted(model, given)
        states = model(**given, output_hidden_states=True).hidden_states[:-1]  # what enters each layer
    size = torch.stack([s[0].abs() / s[0].square().mean(-1, keepdim=True).sqrt() for s in states])
    sinks = size[..., dim] > tau
    assert float(sinks.float().mean()) == pytest.approx(bench_vlm.SHARE_OF_SINKS, abs=0.01)
    assert (sinks & (given["input_ids"][0] == model.config.image_token_id)).any(1).all()


def test_refuses_other_architectures() -> None:
    options = {"repeats": 1, "device": "cpu", "small": True, "output": None, "console": None}
    with pytest.raises(ValueError, match="qwen is a Qwen2VLForConditionalGeneration; steer bench vlm makes prompts"):
        bench_vlm.run(models={"qwen": model_of("qwen2_vl")}, **options)
