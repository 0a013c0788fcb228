"""`steer calibrate --objective`: settings are searched from the command line, and what was found is said and kept."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import steer
from steer import cli
from steer.search_options import split
from steer.strategies import HeadHunter, Optuna, Sweep
from steer_demos.models import call_options, load

CALL = ("--call", "guidance_scale=1", "--call", "num_inference_steps=1", "--prompt", "a cat", "--prompt", "a red apple")


@pytest.fixture(autouse=True)
def _embedded(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entry points of steer_demos, which need not be installed."""
    monkeypatch.setattr(cli, "open_model", load)
    monkeypatch.setattr(cli, "call_options", call_options)


def run(*told: Any) -> Any:
    return CliRunner().invoke(cli.app, ["calibrate", "emoji-mmdit", "PAG", *map(str, told)])


def test_heads_for_an_objective(tmp_path: Path) -> None:
    out, report, kept = tmp_path / "out", tmp_path / "report", tmp_path / "kept"
    told: list[Any] = ["--objective", "-brightness", "--set", "mode=all", "--set", "layers=transformer_blocks.{1,2}"]
    told += ["--set", "top=2", "--trials", 4, "--batch", 4, *CALL, "--output", out, "--checkpoint", kept]
    result = run(*told, "--report", report)
    assert result.exit_code == 0, result.output
    fitted = steer.load(out)
    record = fitted.record
    assert isinstance(fitted, steer.PAG) and fitted.mode == "all" and record is not None
    assert record.report["options"]["strategy"] == "HeadHunter(rounds=1, top=2)"
    assert record.report["samples"] == 2 and record.report["figures"]["trials"] == 4
    assert isinstance(fitted.heads, dict) and sum(map(len, fitted.heads.values())) == 2
    said = " ".join(result.output.split())
    without = record.report["figures"]["score without"]
    assert f"{without:.4g} without" in said and "95 % interval of 2 samples, 4 trials" in said
    assert "over after 4 of the 12 trials" in said and "flatter" in said
    assert f"{fitted.describe()} is in {out}" in said
    assert str(report / "report.md") in said and f'steer.apply(pipe, steer.load("{out}"))' in said
    assert (report / "gain_1.png").exists()

    again = run(*told)
    assert again.exit_code == 0 and f"{fitted.describe()} is in {out}" in " ".join(again.output.split())
    other = run(*told, "--seed", 1)
    assert other.exit_code and "is of another search" in str(other.exception)


def test_a_sweep_and_a_function_of_the_users_own(tmp_path: Path) -> None:
    (tmp_path / "own.py").write_text("def first(pictures, prompts):\n    return pictures[:, 0].mean((1, 2))\n")
    told = ["--objective", f"{tmp_path / 'own.py'}:first", "--strategy", "sweep", "--set", 'space={"scale": [1, 9]}']
    result = run(*told, *CALL, "--set", "layers=transformer_blocks.1", "--seconds", 600, "--output", tmp_path / "out")
    assert result.exit_code == 0, result.output
    fitted = steer.load(tmp_path / "out")
    assert isinstance(fitted, steer.PAG) and fitted.scale in (1, 9) and fitted.layers == "transformer_blocks.1"
    assert fitted.record is not None and fitted.record.report["options"]["objective"] == "first"


def test_values_go_to_the_method_and_to_the_strategy() -> None:
    fields, strategy = split(steer.PAG, "headhunter", {"scale": 2.0, "rounds": 2, "top": 3})
    assert fields == {"scale": 2.0} and strategy == HeadHunter(rounds=2, top=3)
    wide: dict[str, Any] = {"scale": {"low": 1.0, "high": 6.0}, "mode": ["all", "image"]}
    fields, strategy = split(steer.PAG, "optuna", {"space": wide, "number": 5})
    assert strategy == Optuna(space={"scale": (1.0, 6.0), "mode": ["all", "image"]}, number=5) and fields == {}
    assert split(steer.PAG, "sweep", {})[1] == Sweep()


def test_folders_that_are_files_are_refused_before_the_search(tmp_path: Path) -> None:
    taken = tmp_path / "taken"
    taken.write_text("mine")
    told = ["--objective", "sharpness", "--trials", 1, "--set", "layers=transformer_blocks.1", *CALL]
    for option in ("--output", "--report", "--checkpoint"):
        folders = [] if option == "--output" else ["--output", tmp_path / "out"]
        result = run(*told, *folders, option, taken)
        assert isinstance(result.exception, NotADirectoryError) and f"{option[2:]}={taken} is a file" in str(
            result.exception
        )
    assert [path.name for path in tmp_path.iterdir()] == ["taken"] and taken.read_text() == "mine"


@pytest.mark.parametrize(
    ("told", "message"),
    [
        (["--objective", "prettiness"], "there is no objective 'prettiness'; there are sharpness"),
        (["--objective", "sharpness", "--strategy", "grid"], "--strategy grid does not exist; choose from headhunter"),
        (["--strategy", "sweep"], "for searches with --objective"),
        (["--batch", "2"], "for searches with --objective"),
        (["--objective", "sharpness", "--set", "topp=3"], "--set topp: PAG has the fields .*options rounds, top"),
        (["--objective", "sharpness", "--set", "scale=x"], "PAG cannot take scale='x'"),
        (["--objective", "sharpness", "--strategy", "sweep", "--set", "space=3"], "write a JSON object of fields"),
        (
            ["--objective", "sharpness", "--strategy", "sweep", "--set", 'space={"scale": {"low": 1, "high": 2}}'],
            "scale is a range, which --strategy optuna takes",
        ),
        (
            ["--objective", "sharpness", "--strategy", "optuna", "--set", 'space={"scale": {"low": 1}}'],
            "must be a list of values or",
        ),
        (["--objective", "sharpness", "--set", "rounds=0"], "rounds=0 must be a whole number of at least 1"),
    ],
)
def test_bad_calls_say_what_to_do_before_a_model_is_opened(
    told: list[str], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    def opened(name: str) -> None:
        raise AssertionError(f"{name} was opened")

    monkeypatch.setattr(cli, "open_model", opened)
    result = run(*told, "--prompt", "a cat", "--output", tmp_path / "out")
    with pytest.raises((ValueError, TypeError), match=message):
        raise result.exception
    assert not (tmp_path / "out").exists()
