"""`steer reproduce`: the published settings, the check of the kernel, and one measurement of each method, tiny."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from typer.testing import CliRunner

import steer
from steer.cli import app
from steer.sparse import Sparse
from steer_demos import reproduce as module
from steer_demos.claims import CLAIMS, PAPERS, SMALL_HUNYUAN, Claim, Setting, fixed, small_hunyuan
from steer_demos.reproduce import SparseCall, as_markdown, print_table, reproduce, reproduce_command

TOKENS = {  # of the published settings, with their text
    "radial": [115_200 + 256, 18 * 48 * 80],
    "gna": [30 * 48 * 80 + 256, 256 * 256 + 512],
    "sparse-vdit": [11 * 48 * 85 + 226],
    "re-ttention": [13 * 30 * 45 + 226],
    "paro": [13 * 30 * 45 + 226] * 2,
    "vmoba": [21 * 45 * 80],
}
FIRST = [next(claim for claim in CLAIMS if claim.paper == paper) for paper in PAPERS]


def test_every_sparse_method_has_a_claim() -> None:
    named = {type(method_of(claim.cpu)).__name__ for claim in CLAIMS}
    assert named == {name for name, cls in steer.methods().items() if issubclass(cls, Sparse)}


def method_of(setting: Setting) -> Sparse:
    return setting.build("meta", torch.bfloat16)[1]


@pytest.mark.parametrize("paper", PAPERS)
def test_the_published_settings_have_the_published_tokens(paper: str) -> None:
    claims = [claim for claim in CLAIMS if claim.paper == paper]
    for claim, tokens in zip(claims, TOKENS[paper], strict=True):
        shape = claim.full.shape
        grid = shape.grid()
        text = 0 if "wan" in shape.name else shape.text_tokens
        assert grid[0] * grid[1] * grid[2] + text == tokens


@pytest.mark.parametrize("claim", CLAIMS, ids=lambda claim: claim.title)
def test_the_published_settings_apply_to_the_published_models(claim: Claim) -> None:
    model, method = claim.full.build("meta", torch.bfloat16)
    with steer.apply(model, dataclasses.replace(method, steps=":")) as handle:
        assert len(handle.sites) == len(handle.bindings[0].sites) > 10


def test_the_random_modes_of_sparse_vdit_have_the_published_flops() -> None:
    (claim,) = [claim for claim in CLAIMS if claim.paper == "sparse-vdit"]
    found = steer.simulate(claim.full.shape, method_of(claim.full))
    assert found.run_flops / found.dense_run_flops == pytest.approx(70.69 / 147.87, abs=0.01)


def tiny(claim: Claim) -> Setting:
    """The small setting of a claim, still smaller: a step takes a fraction of a second."""
    shape = claim.cpu.shape
    size = {"height": 64, "width": 96, **({} if shape.still else {"frames": 17 if "cog" in shape.name else 9})}
    if shape.still:
        size = {"height": 256, "width": 256}
    method = claim.cpu.method
    if claim.paper == "gna":
        method = fixed(steer.NeighborhoodAttention(window=(1, 8, 8) if shape.still else (3, 2, 4), dense_layers=0))
    if claim.paper == "radial":
        method = fixed(steer.RadialAttention(block_size=8, dense_layers=0))
    return dataclasses.replace(claim.cpu, shape=dataclasses.replace(shape, **size), method=method, run_steps=3)


@pytest.mark.parametrize("claim", FIRST, ids=PAPERS)
def test_a_tiny_measurement(claim: Claim) -> None:
    result = reproduce(tiny(claim), claim, "cpu", torch.device("cpu"))
    assert result.error <= 4 * result.plain_error
    assert 0 < result.density <= 1
    assert result.steps == 3 and 1 <= result.sparse_steps <= 3
    assert result.run_was_made and result.run_speedup > 0
    assert 0 < result.attention_share <= 1 <= result.bound
    assert "of 1/density" in result.reason()


def test_a_wrong_kernel_is_found() -> None:
    """The check compares with plain attention under the mask that the kernel was given."""
    claim = FIRST[0]
    setting = tiny(claim)
    model, method = setting.build("cpu", torch.float32)
    inputs = setting.shape.inputs(device="cpu", dtype=torch.float32)
    with torch.no_grad(), steer.apply(model, method), SparseCall() as call:
        model(**inputs)
    error, plain = call.errors()
    assert error <= 4 * plain
    assert call.out is not None
    call.out = call.out.roll(1, dims=2)
    assert call.errors()[0] > 1e-2


def test_steps_are_composed_into_the_published_run() -> None:
    """Where no whole run is made, its time follows from its dense and its sparse steps."""
    claim = FIRST[0]
    setting = dataclasses.replace(tiny(claim), run_steps=None)
    result = reproduce(setting, claim, "cpu", torch.device("cpu"), steps=2)
    assert not result.run_was_made
    assert (result.steps, result.sparse_steps) == (50, 38)
    assert result.dense_run == pytest.approx(50 * result.dense_step)
    assert result.sparse_run == pytest.approx(12 * result.dense_step + 38 * result.sparse_step)


def test_json_and_table(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    claim = dataclasses.replace(FIRST[0], cpu=tiny(FIRST[0]))
    monkeypatch.setattr(module, "CLAIMS", (claim,))
    reproduce_command("radial", scale="cpu", device="cpu", output=tmp_path / "r.json")
    report = json.loads((tmp_path / "r.json").read_text())
    assert report["versions"]["torch"] == torch.__version__
    (row,) = report["results"]
    assert {"density", "error", "run_speedup", "published", "bound", "reason"} <= set(row)
    printed = capsys.readouterr().out
    assert "1.88x" in printed and f"{row['run_speedup']:.2f}x" in printed and f"{row['density']:.3f}" in printed


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"paper": "radail"}, "there are radial, gna"),
        ({"scale": "huge"}, "choose full or cpu"),
        ({"scale": "full", "device": "cpu"}, "use --scale cpu"),
    ],
)
def test_bad_requests_say_what_exists(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        reproduce_command(**arguments)


def test_small_hunyuan_has_the_thirty_latent_frames() -> None:
    assert small_hunyuan().grid() == (30, 16, 24)
    assert Setting(small_hunyuan(), fixed(steer.RadialAttention()), SMALL_HUNYUAN).build("meta", torch.float32)


def test_the_command_is_there() -> None:
    from steer_demos.evaluate import app as evaluate_app

    assert "sparse" in CliRunner().invoke(evaluate_app, ["--help"]).output
    assert app is not None and print_table is not None


def test_the_documented_figures_are_the_measured_ones() -> None:
    root = Path(__file__).resolve().parents[2]
    report = json.loads((root / "benchmarks/reproduce-cpu.json").read_text())
    page = (root / "docs/benchmarks.md").read_text()
    assert as_markdown(report) in page
    assert [row["paper"] for row in report["results"]] == list(PAPERS)
    radial = report["results"][0]
    assert radial["run_was_made"] and radial["run_speedup"] > 1.5
    assert all(row["error"] <= 4 * row["plain_error"] for row in report["results"])
    readme = (root / "README.md").read_text()
    figures = (
        f"{radial['run_speedup']:.2f}x faster (density {radial['density']:.3f}, relative error {radial['error']:.0e})"
    )
    assert figures in " ".join(readme.split())
