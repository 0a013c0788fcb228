"""`steer.compare`, `steer.doctor` and the command line."""

from __future__ import annotations

import math

import pytest
import torch
from probes import Scale
from tiny import FAMILIES
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

import steer
from steer.cli import app
from steer_patches.family import FAMILIES as STEER_FAMILIES


def test_compare_pipeline() -> None:
    pipe = PIPELINES["sd3"].build()
    kwargs = PIPELINES["sd3"].call_kwargs(pipe)
    result = steer.compare(pipe, steer.PAG(layers="transformer_blocks.1"), **kwargs)
    assert 0 < result.psnr < 100 and result.baseline_seconds > 0 and result.steered_seconds > 0
    assert "PAG" in str(result) and "PSNR" in str(result)
    assert not hasattr(pipe, "_steer_state")
    neutral = steer.compare(pipe, steer.PAG(layers="transformer_blocks.1", scale=0.0), **kwargs)
    assert neutral.psnr == math.inf


def test_compare_language_model() -> None:
    model = FAMILIES["llama"].build()
    result = steer.compare(model, Scale(factor=0.5), **FAMILIES["llama"].inputs(model))
    assert result.kl is not None and result.kl > 0 and result.psnr is None


def test_doctor_says_what_runs() -> None:
    report = steer.doctor()
    names = [check.name for check in report.checks]
    assert report.ok and "device" in names and "hooks on diffusers' processors" in names
    assert torch.__version__ in str(report)


def test_cli_lists_methods_and_sites() -> None:
    runner = CliRunner()
    listed = runner.invoke(app, ["methods", "--markdown"])
    assert listed.exit_code == 0
    for family in STEER_FAMILIES:
        assert f"| {family.name} |" in listed.stdout
    for method in steer.methods():
        assert method in listed.stdout
    table = runner.invoke(app, ["sites", "FluxTransformer2DModel"])
    assert table.exit_code == 0 and "57 sites" in table.stdout and "single_transformer_blocks.*.attn" in table.stdout
    assert runner.invoke(app, ["doctor"]).exit_code == 0


@pytest.mark.slow
def test_bench_guidance_small(tmp_path) -> None:  # type: ignore[no-untyped-def]
    """The whole benchmark at its tiny setting: every ratio has its error, and the errors are rounding."""
    import json

    path = tmp_path / "bench.json"
    result = CliRunner().invoke(app, ["bench", "guidance", "--small", "--repeats", "1", "--output", str(path)])
    assert result.exit_code == 0
    rows = json.loads(path.read_text())["rows"]
    assert all(row["error"] < 1e-4 for row in rows if row["variant"].startswith("steer"))
    assert {row["variant"] for row in rows} >= {"CFG only", "diffusers PAG", "steer unshared", "steer shared"}
