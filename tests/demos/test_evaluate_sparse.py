"""`steer eval sparse`: the two measures, the controls, and the settings at one density."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch
from probes import inputs_of, relative_error
from tiny import FAMILIES, output

import steer
from steer.sparse import Sparse
from steer_demos import evaluate_sparse, models
from steer_demos.evaluate_sparse import as_markdown, evaluate_command, measure, methods_at_40_percent, psnr, ssim
from steer_demos.evaluate_video import evaluation_prompts, generate_clips
from steer_demos.sparse_controls import BestBlocks, RandomBlocks


def clips(seed: int) -> torch.Tensor:
    return torch.rand(2, 3, 3, 16, 20, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def test_psnr_is_that_of_the_clip() -> None:
    a, b = clips(0), clips(1)
    error = ((a[1] - b[1]) / 2).pow(2).mean().item()
    assert psnr(a, b)[1].item() == pytest.approx(10 * math.log10(1 / error), abs=1e-4)
    assert psnr(a, a).tolist() == [100, 100]


def test_ssim_equals_its_definition_at_one_place() -> None:
    """Window by window in plain sums, on pictures of exactly one window."""
    a, b = clips(0)[:, :, :, :11, :11], clips(1)[:, :, :, :11, :11]
    weights = torch.tensor([[math.exp(-(i * i + j * j) / 4.5) for j in range(-5, 6)] for i in range(-5, 6)])
    weights /= weights.sum()
    total = 0.0
    for frame in range(3):
        for colour in range(3):
            x, y = (a[0, frame, colour] + 1) / 2, (b[0, frame, colour] + 1) / 2
            mx, my = (weights * x).sum(), (weights * y).sum()
            vx, vy = (weights * (x - mx) ** 2).sum(), (weights * (y - my) ** 2).sum()
            vxy = (weights * (x - mx) * (y - my)).sum()
            similar = (2 * mx * my + 1e-4) * (2 * vxy + 9e-4) / ((mx**2 + my**2 + 1e-4) * (vx + vy + 9e-4))
            total += similar.item() / 9
    assert ssim(a, b)[0].item() == pytest.approx(total, abs=1e-4)
    assert torch.allclose(ssim(a, a), torch.ones(2))


def test_the_best_blocks_are_better_than_random_ones() -> None:
    pipe, prompts = models.load_pipeline("emoji-wan", clips=True), evaluation_prompts(2)
    call = {"steps": 6, "max_sequence_length": 16}
    dense = generate_clips(pipe, [prompt.text for prompt in prompts], [0, 1], **call)
    found = {}
    for control in (RandomBlocks, BestBlocks):
        method = control(density=0.3, block_size=16, dense_layers=0)
        found[control], clips = measure(pipe, method, prompts, [0, 1], dense, **call)
        assert clips.shape == dense.shape
        assert found[control].density == pytest.approx(0.3, abs=0.02)
        assert found[control].run_density == pytest.approx(1 - 4 / 6 * 0.7, abs=0.02)  # the first 2 steps are dense
    assert found[BestBlocks].psnr > found[RandomBlocks].psnr
    assert found[BestBlocks].ssim > found[RandomBlocks].ssim


@pytest.mark.parametrize("control", [RandomBlocks, BestBlocks])
@pytest.mark.parametrize("name", ["hunyuan_video", "cogvideox"])
def test_controls_honour_padded_text(control: type[Sparse], name: str) -> None:
    model = FAMILIES[name].build()
    with steer.apply(model, control(density=0.4, block_size=8, dense_layers=0)) as handle:
        assert output(model, inputs_of(FAMILIES[name], model)).isfinite().all()
        assert 0.3 < handle.stats["methods"][0]["density"] < 0.75  # the random ones always see the text


@pytest.mark.parametrize("control", [RandomBlocks, BestBlocks])
def test_controls_are_dense_at_full_density(control: type[Sparse]) -> None:
    model = FAMILIES["wan21"].build()
    dense = output(model, inputs_of(FAMILIES["wan21"], model))
    with steer.apply(model, control(density=1.0, block_size=8, dense_layers=0)):
        assert relative_error(output(model, inputs_of(FAMILIES["wan21"], model)), dense) <= 1e-5


def test_all_sparse_methods_are_compared() -> None:
    sparse = {name for name, cls in steer.methods().items() if issubclass(cls, Sparse)}
    named = {name.split(",")[0] for name in methods_at_40_percent()}
    assert named == sparse | {"random blocks", "best blocks"}


@pytest.mark.parametrize("name", ["RadialAttention", "NeighborhoodAttention", "ReTtention", "VMoBA", "random blocks"])
def test_the_settings_have_about_the_same_density(name: str) -> None:
    pipe = models.load_pipeline("emoji-wan", clips=True)
    pipe.set_progress_bar_config(disable=True)
    with steer.apply(pipe, methods_at_40_percent()[name]) as handle:
        pipe(
            "a fox moving left",
            num_inference_steps=20 if name == "ReTtention" else 3,
            output_type="latent",
            **models.call_options("emoji-wan"),
        )
        density = handle.stats["methods"][0]["density"]
    assert density == pytest.approx(0.395, abs=0.02)


@pytest.mark.slow
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(evaluate_sparse, "SEARCHED", 1)
    evaluate_command(prompts=2, steps=2, only="paro", output=tmp_path / "s.json", clips=tmp_path / "s.gif")
    report = json.loads((tmp_path / "s.json").read_text())
    row = report["methods"]["PAROAttention"]
    assert row["density"] == pytest.approx(0.4, abs=0.02) and 10 < row["psnr"] < 100 and 0 < row["ssim"] <= 1
    assert (tmp_path / "s.gif").stat().st_size > 1000
    assert "PAROAttention" in capsys.readouterr().out
    evaluate_command(prompts=2, steps=2, only="radial", output=tmp_path / "s.json")
    both = json.loads((tmp_path / "s.json").read_text())["methods"]
    assert [name.split(",")[0] for name in both] == ["RadialAttention", *["PAROAttention"] * 3]
    assert both["PAROAttention"] == row
    evaluate_command(prompts=3, steps=2, only="radial", output=tmp_path / "s.json")  # other settings: no row stays
    assert list(json.loads((tmp_path / "s.json").read_text())["methods"]) == ["RadialAttention"]
    with pytest.raises(ValueError, match="matches none of RadialAttention"):
        evaluate_command(only="flash")


def test_the_documented_figures_are_the_measured_ones() -> None:
    root = Path(__file__).resolve().parents[2]
    report = json.loads((root / "benchmarks/sparse-emoji-wan.json").read_text())
    page = (root / "docs/methods/sparse.md").read_text()
    table = page.split("<!-- sparse-emoji-wan:begin -->")[1].split("<!-- sparse-emoji-wan:end -->")[0].strip()
    assert table == as_markdown(report)
    assert report["prompts"] == evaluate_sparse.PROMPTS
    assert set(report["methods"]) == set(methods_at_40_percent())
