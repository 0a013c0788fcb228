"""`steer bench kernels`: the whole benchmark at its tiny setting, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from PIL import Image
from typer.testing import CliRunner

from steer import bench_kernels
from steer.cli import app


@pytest.mark.slow
def test_small_run_writes_figures_and_a_picture(tmp_path: Path) -> None:
    figures, picture = tmp_path / "kernels.json", tmp_path / "kernels.png"
    options = ["--small", "--repeats", "2", "--device", "cpu", "--output", str(figures), "--plot", str(picture)]
    run = CliRunner().invoke(app, ["bench", "kernels", *options])
    assert run.exit_code == 0, run.output
    result = json.loads(figures.read_text())
    measured = {row["kernel"]: row for row in result["rows"] if "error" in row}
    assert {"sdpa flash", "sdpa math", "steer gather", "flex"} <= set(measured)
    assert all(row["error"] < 1e-5 for row in measured.values())
    assert measured["sdpa flash"]["density"] == 1 and measured["flex"]["density"] == 0.25
    refused = {row["kernel"]: row["refused"] for row in result["rows"] if "refused" in row}
    assert refused["steer triton"] == "it runs on a CUDA device"
    decode = {row["kernel"]: row for row in result["decode"]}
    assert decode["dense sdpa"]["error"] < 1e-5 and decode["steer, listed pages"]["error"] < 1e-5
    assert all(row["milliseconds"] > 0 for row in result["building"])
    assert result["environment"]["torch"] == torch.__version__
    with Image.open(picture) as drawn:
        assert drawn.size[0] > 500


def test_every_case_of_the_cpu_is_consistent() -> None:
    device = torch.device("cpu")
    for case in bench_kernels.cases(device, small=False):
        mask = case.mask(device)
        assert (mask.q_len, mask.kv_len) == (case.tokens, case.tokens), case.name
        assert mask.shape[1] in (1, case.kv_heads, case.heads) and 0.01 < mask.density < 0.6, case.name


def test_cases_of_a_gpu_have_masks_of_their_length() -> None:
    """Built here on the CPU; the random ones, whose lists of 24 heads are large, are left out."""
    for case in bench_kernels.cases(torch.device("cuda"), small=False):
        if not case.name.startswith("random"):
            mask = case.mask(torch.device("cpu"))
            assert (mask.q_len, mask.kv_len) == (case.tokens, case.tokens), case.name


def test_refusals() -> None:
    run = CliRunner().invoke(app, ["bench", "kernels", "--only", "nothing"])
    assert isinstance(run.exception, ValueError) and "matches no case; there are: random" in str(run.exception)
    if not torch.cuda.is_available():
        run = CliRunner().invoke(app, ["bench", "kernels", "--tune", "table.json"])
        assert isinstance(run.exception, ValueError) and "there is none" in str(run.exception)
