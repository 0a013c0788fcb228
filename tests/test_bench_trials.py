"""`steer bench trials`: the whole benchmark at its tiny setting, and what it refuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

from steer import bench_trials
from steer.cli import app


def test_small_run_writes_figures_whose_pictures_and_orders_agree(tmp_path: Path) -> None:
    figures = tmp_path / "trials.json"
    options = ["--small", "--repeats", "1", "--device", "cpu", "--output", str(figures)]
    ran = CliRunner().invoke(app, ["bench", "trials", *options])
    assert ran.exit_code == 0, ran.output
    result = json.loads(figures.read_text())
    assert result["environment"]["torch"] == torch.__version__
    (case,) = result["cases"]
    assert case["heads"] == {"transformer_blocks.1.attn": [1, 3], "transformer_blocks.3.attn": [1, 3]}
    rows = case["rows"]
    assert [(row["share_prefix"], row["batch"]) for row in rows] == [
        (False, 1), (True, 1), (False, 2), (True, 2), (True, 4)
    ]  # fmt: skip
    # Of 4 blocks in the ordinary pass and 4 in the perturbed one, a pass from block 1 or 3 leaves out 1 or 3; a batch
    # of all heads starts at block 1.
    assert [row["blocks"] for row in rows] == [1, (7 + 5) / 16, 1, (7 + 5) / 16, (7 + 7) / 16]
    assert rows[0]["error"] == rows[1]["error"] == 0  # a prefix that is shared is the same one
    assert case["effect"] > 1e-2 and max(row["error"] for row in rows) < 1e-3 * case["effect"]
    assert all(row["same_order"] and row["seconds"] > 0 for row in rows)
    assert rows[0]["faster_than_unshared"] == rows[1]["faster_than_single"] == 1


def test_a_pipeline_with_prompts_is_measured_besides() -> None:
    pipe = PIPELINES["sd3_text"].build()
    pipe.set_progress_bar_config(disable=True)
    made = PIPELINES["sd3_text"].call_kwargs(pipe, steps=1)
    arguments = {name: made[name] for name in ("height", "width", "max_sequence_length")}
    case = bench_trials._opened("tiny", pipe, {**arguments, "prompt": "a red fox", "num_inference_steps": 1}, 1, None)
    heads = next(iter(case.heads.values()))
    measured = bench_trials._measure(case, [len(heads)], 1)
    assert measured["trials"] == len(heads) > 1
    assert [row["batch"] for row in measured["rows"]] == [1, 1, len(heads), len(heads)]
    assert measured["rows"][1]["blocks"] == measured["rows"][3]["blocks"] < measured["rows"][2]["blocks"]


@pytest.mark.parametrize(
    ("by_layer", "batches", "sizes"),
    [([6] * 6, [], [6, 12, 36]), ([4], [], [4]), ([6, 6], [3, 2, 3], [2, 3])],
)
def test_batch_sizes(by_layer: list[int], batches: list[int], sizes: list[int]) -> None:
    ways = bench_trials.variants(by_layer, batches)
    assert ways[:3] == [(False, 1), (True, 1), (False, sizes[0])]
    assert ways[3:] == [(True, size) for size in sizes]


def test_layers_and_heads_are_spread_over_the_model() -> None:
    pipe = PIPELINES["sd3"].build()
    every = bench_trials._tried(pipe, None, None)
    some = bench_trials._tried(pipe, 1, 1)
    (site, heads), layers = next(iter(some.items())), list(every)
    assert len(some) == len(heads) == 1
    assert site == layers[len(layers) // 2] and heads[0] == every[site][len(every[site]) // 2]
    assert bench_trials._tried(pipe, 99, 99) == every


def test_documented_figures_are_those_of_the_run() -> None:
    root = Path(__file__).resolve().parent.parent
    found = json.loads((root / "benchmarks/trials-cpu.json").read_text(encoding="utf-8"))["cases"]
    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    for model, case in zip(("emoji-mmdit", "SD3, random"), found, strict=True):
        for row in case["rows"]:
            prefix, half = "shared" if row["share_prefix"] else "own", row["spread"] / 2
            ratios = f"{row['faster_than_unshared']:.2f} | {row['faster_than_single']:.2f}"
            shown = f"| {model} | {row['batch']} | {prefix} | {row['seconds']:.3f} (± {half:.3f}) | {ratios} |"
            assert f"{shown} {100 * row['blocks']:.0f} % | {row['error']:.0e} |" in page
    default = [case["rows"][3]["faster_than_unshared"] for case in found]  # the heads of one layer, shared
    assert f"1/{default[0]:.2f} and 1/{default[1]:.2f} of the time" in page
