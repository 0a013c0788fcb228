"""Calibration: the target stays as it is, and the same call gives the same plan, in one go or after a kill."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from probes import Tripped, assert_untouched, inputs_of, snapshot, steer_attributes
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from typer.testing import CliRunner

import steer
from steer import Plan, SparseVDiT, cli
from steer_demos.models import load
from steer_patches.site import Call, Next

STEPS = 2


def samples(pipe: Any, name: str = "wan21", count: int = 3) -> list[dict[str, Any]]:
    """Arguments of `count` calls, which differ in the embeddings of their prompts."""
    calls = (PIPELINES[name].call_kwargs(pipe, seed=seed, steps=STEPS) for seed in range(count))
    return [{key: value for key, value in call.items() if key != "generator"} for call in calls]


def same(first: Plan, second: Plan) -> bool:
    tensors = all(torch.equal(first.tensors[name], second.tensors[name]) for name in first.tensors)
    fields = ("sites", "heads", "grid", "starts", "report")
    return tensors and all(getattr(first, name) == getattr(second, name) for name in fields)


def fit(pipe: Any, data: Any = None, method: SparseVDiT | None = None, **options: Any) -> SparseVDiT:
    options = {"groups": 2, "epsilon": 0.2, "progress": False, **options}
    fitted = steer.calibrate(pipe, method or SparseVDiT(block_size=8), data or samples(pipe), **options)
    assert isinstance(fitted, SparseVDiT) and fitted.plan is not None
    return fitted


def trip_after(model: torch.nn.Module, forwards: int) -> Callable[[], None]:
    """The model raises at the forward after so many; returns the undo."""
    left = forwards

    def count(*_: Any) -> None:
        nonlocal left
        left -= 1
        if left < 0:
            raise Tripped

    return model.register_forward_pre_hook(count).remove


@pytest.mark.parametrize("name", ["wan21", "wan22", "cogvideox"])
def test_the_target_and_the_method_stay_as_they_are(name: str) -> None:
    pipe = PIPELINES[name].build()
    baseline = generate(pipe, PIPELINES[name].call_kwargs(pipe, steps=STEPS))
    before, method = snapshot(pipe.transformer), SparseVDiT(block_size=8)
    pipe.set_progress_bar_config(leave=False)
    classes, attributes, bars = type(pipe.scheduler), list(vars(pipe)), pipe._progress_bar_config
    data = samples(pipe, name, 1)
    fitted = fit(pipe, data, method)
    assert_untouched(before, pipe.transformer)
    assert type(pipe.scheduler) is classes and list(vars(pipe)) == attributes and pipe._progress_bar_config is bars
    assert steer_attributes(pipe) == []
    assert torch.equal(generate(pipe, PIPELINES[name].call_kwargs(pipe, steps=STEPS)), baseline)
    assert method.plan is None and fitted.block_size == 8
    assert list(data[0]) == list(samples(pipe, name, 1)[0])


def test_what_calibrate_returns_applies_saves_and_replays(tmp_path: Path) -> None:
    pipe = PIPELINES["wan21"].build()
    kwargs = PIPELINES["wan21"].call_kwargs
    fitted = fit(pipe)
    with steer.apply(pipe, fitted):
        steered = generate(pipe, kwargs(pipe, steps=STEPS))
    assert not torch.equal(steered, generate(pipe, kwargs(pipe, steps=STEPS)))
    fit(pipe).save(str(tmp_path))  # before it was ever applied
    with steer.apply(pipe, steer.load(tmp_path)):
        assert torch.equal(generate(pipe, kwargs(pipe, steps=STEPS)), steered)
    other = PIPELINES["hunyuan_video"].build()
    with pytest.raises(steer.FingerprintError, match="made for WanTransformer3DModel"):
        steer.apply(other, steer.load(tmp_path))


def test_every_sample_has_its_own_noise_and_the_seed_decides() -> None:
    pipe = PIPELINES["wan21"].build()
    alike = samples(pipe, count=1) * 2
    errors = [fit(pipe, data, seed=seed).plan.tensors["error"] for data, seed in  # type: ignore[union-attr]
              ((alike[:1], 0), (alike[:1], 0), (alike[:1], 1), (alike, 0))]  # fmt: skip
    assert torch.equal(errors[0], errors[1])
    assert not torch.equal(errors[0], errors[2])
    one, other, both = (errors[i][..., 1:] for i in (0, 2, 3))
    assert torch.allclose(both, (one + other) / 2, rtol=1e-5)


@pytest.mark.parametrize("forwards", [1, 4, 6, 11])
def test_kill_and_resume_give_the_plan_of_one_run(tmp_path: Path, forwards: int) -> None:
    """3 samples of 2 steps with two CFG calls are 12 forwards: killed in the first, before the second, in the last."""
    pipe = PIPELINES["wan21"].build()
    generate(pipe, PIPELINES["wan21"].call_kwargs(pipe, steps=1))  # fills the model's own caches
    undo = trip_after(pipe.transformer, forwards)
    before = snapshot(pipe.transformer)
    with pytest.raises(Tripped):
        fit(pipe, checkpoint=tmp_path)
    assert_untouched(before, pipe.transformer)
    undo()
    assert (tmp_path / "calibration.safetensors").exists() == (forwards >= 4)

    ran = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: ran.append(1))
    resumed = fit(pipe, checkpoint=tmp_path).plan
    hook.remove()
    assert len(ran) == 12 - forwards // 4 * 4
    whole = fit(pipe).plan
    assert resumed is not None and whole is not None and same(resumed, whole)


@dataclass(kw_only=True)
class Twice(steer.Search, register=False):
    """Counts the attention calls of two passes; its result holds what it counted as factor."""

    begun: list[int] = field(default_factory=list)
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(2))

    default_layers: ClassVar[str] = "blocks.0.attn1"

    @property
    def passes(self) -> int:
        return 2

    def start_pass(self, number: int) -> None:
        self.begun.append(number)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        self.counts[self.begun[-1]] += 1
        return next(call)

    def state(self) -> dict[str, Any]:
        return {"begun": self.begun, "counts": self.counts}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.begun, self.counts = list(state["begun"]), state["counts"]

    def figure(self) -> str:
        return f"pass {self.begun[-1]}"

    def finish(self) -> steer.Method:
        return Counted(begun=tuple(self.begun), counts=self.counts)


@dataclass(kw_only=True)
class Counted(steer.Method, register=False):
    begun: tuple[int, ...] = ()
    counts: torch.Tensor | None = None

    def search(self) -> Twice:
        return Twice()


@pytest.mark.parametrize("forwards", [None, 6, 10, 14])
def test_each_pass_begins_once_and_sees_all_the_data(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], forwards: int | None
) -> None:
    """2 passes over 2 samples of 4 forwards, killed in the second sample, in the second pass, and in its last."""
    pipe = PIPELINES["wan21"].build()
    data = samples(pipe, count=2)
    if forwards:
        undo = trip_after(pipe.transformer, forwards)
        with pytest.raises(Tripped):
            steer.calibrate(pipe, Counted(), data, checkpoint=tmp_path)
        undo()
    found: Any = steer.calibrate(pipe, Counted(), data, checkpoint=tmp_path)
    assert found.begun == (0, 1) and found.counts.tolist() == [8, 8]
    printed = capsys.readouterr().err
    assert "calibrate Counted: 100%" in printed and "4/4" in printed and "pass 1" in printed


def test_a_finished_checkpoint_runs_nothing(tmp_path: Path) -> None:
    pipe = PIPELINES["wan21"].build()
    first = fit(pipe, checkpoint=tmp_path).plan
    undo = trip_after(pipe.transformer, 0)
    again = fit(pipe, checkpoint=tmp_path).plan
    undo()
    assert first is not None and again is not None and same(first, again)


def test_a_checkpoint_of_another_search_is_refused_with_what_differs(tmp_path: Path) -> None:
    pipe = PIPELINES["wan21"].build()
    data = samples(pipe, count=2)
    fit(pipe, data, checkpoint=tmp_path)
    changed = [data[0], {**data[1], "prompt_embeds": data[1]["prompt_embeds"] * 2}]
    other = PIPELINES["wan21"].build()
    other.transformer.blocks[1].attn1.to_q.weight.mul_(2)
    cases: list[tuple[str, Callable[[], Any]]] = [
        (r"settings\.density \(None -> 0\.5\)", lambda: fit(pipe, data, SparseVDiT(density=0.5, block_size=8),
                                                          checkpoint=tmp_path)),
        (r"options\.epsilon \(0\.2 -> 0\.3\)", lambda: fit(pipe, data, epsilon=0.3, checkpoint=tmp_path)),
        (r"in seed \(0 -> 1\)", lambda: fit(pipe, data, seed=1, checkpoint=tmp_path)),
        (r"in data\.1 \(", lambda: fit(pipe, changed, checkpoint=tmp_path)),
        (r"data\.1 \(\w+ -> None\), samples \(2 -> 1\)", lambda: fit(pipe, data[:1], checkpoint=tmp_path)),
        (r"in model\.transformer\.weights \(", lambda: fit(other, data, checkpoint=tmp_path)),
    ]  # fmt: skip
    saved = (tmp_path / "calibration.safetensors").read_bytes()
    for message, call in cases:
        with pytest.raises(ValueError, match="is of another search, which differs.*" + message):
            call()
    assert (tmp_path / "calibration.safetensors").read_bytes() == saved


def test_bad_calls_say_what_to_do_and_change_nothing() -> None:
    pipe = PIPELINES["wan21"].build()
    before, data = snapshot(pipe), samples(pipe, count=1)  # nothing runs
    model = FAMILIES["wan21"].build()
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (TypeError, r"PAG has no search of its own; .*SparseVDiT.* give objective=",
         lambda: steer.calibrate(pipe, steer.PAG(), data)),
        (TypeError, "unexpected keyword argument 'epsilom'", lambda: fit(pipe, data, epsilom=1)),
        (TypeError, r"pass a list of samples", lambda: steer.calibrate(pipe, SparseVDiT(), "a fox")),
        (TypeError, "data holds a int; for a WanPipeline it must hold prompts, or dicts of pipeline arguments",
         lambda: fit(pipe, [3])),
        (TypeError, "for a WanTransformer3DModel it must hold dicts of the arguments of its forward",
         lambda: fit(model, ["a fox"])),
        (TypeError, "leave out generator", lambda: fit(pipe, [{**data[0], "generator": None}])),
        (ValueError, "data is empty", lambda: steer.calibrate(pipe, SparseVDiT(), [])),
        (ValueError, "edits nothing", lambda: fit(pipe, data, SparseVDiT(heads=[]))),
        (ValueError, "2 step groups, but the number of steps",
         lambda: fit(model, [inputs_of(FAMILIES["wan21"], model)])),
        (steer.CompositionError, "cannot run on FLUX",
         lambda: fit(FAMILIES["flux"].build(), [inputs_of(FAMILIES["flux"], FAMILIES["flux"].build())], groups=1)),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert_untouched(before, pipe)


def test_steered_and_compiled_targets_are_refused() -> None:
    pipe = PIPELINES["wan21"].build()
    with (
        steer.apply(pipe, steer.PAG(layers="blocks.1")),
        pytest.raises(ValueError, match=r"transformer is steered already; call steer\.remove"),
    ):
        fit(pipe)
    pipe.transformer.compile(backend="eager")
    with pytest.raises(ValueError, match="transformer is compiled; calibrate the uncompiled model"):
        fit(pipe)


def test_a_bare_model_takes_the_arguments_of_its_forward() -> None:
    family = FAMILIES["hunyuan_video"]
    model = family.build()
    fitted = fit(model, [inputs_of(family, model)], groups=1)
    with steer.apply(model, fitted):
        assert not torch.equal(output(model, inputs_of(family, model)), baseline_of(model))
    assert fitted.plan is not None and fitted.plan.report["samples"] == 1


def baseline_of(model: torch.nn.Module) -> torch.Tensor:
    return output(FAMILIES["hunyuan_video"].build(), inputs_of(FAMILIES["hunyuan_video"], model))


def test_report_has_a_table_and_a_picture(tmp_path: Path) -> None:
    pipe = PIPELINES["wan21"].build()
    fitted = fit(pipe, report=tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert fitted.plan is not None
    modes = fitted.plan.tensors["mode"]
    counts = torch.bincount(modes[1, 2].long(), minlength=5).tolist()
    assert "| 0.5 | blocks.2.attn1 | " + " | ".join(map(str, counts)) + " |" in text
    assert "| samples | 3 |" in text and "| epsilon | 0.2 |" in text and "![mode of every layer and head]" in text
    assert (tmp_path / "mode.png").read_bytes().startswith(b"\x89PNG")


def test_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cli, "open_model", load)  # the entry point of steer_demos, which need not be installed
    (tmp_path / "prompts.txt").write_text("a cat\n\na rocket\n")
    call = {"height": 32, "width": 32, "num_frames": 5, "num_inference_steps": 1, "max_sequence_length": 16}
    told = ["calibrate", "emoji-wan", "SparseVDiT", "--prompt", "a fox", "--prompts", str(tmp_path / "prompts.txt")]
    told += [part for key, value in call.items() for part in ("--call", f"{key}={value}")]
    told += ["--set", "block_size=8", "--set", "epsilon=0.2", "--set", "steps=:", "--output", str(tmp_path / "out")]
    result = CliRunner().invoke(cli.app, told)
    assert result.exit_code == 0, result.output
    document = json.loads((tmp_path / "out" / "steer.json").read_text())
    assert document["fields"]["block_size"] == 8
    assert document["fields"]["plan"]["plan"]["report"]["samples"] == 3
    assert document["fields"]["plan"]["plan"]["report"]["options"] == {"epsilon": 0.2}
    assert isinstance(steer.load(tmp_path / "out"), SparseVDiT)

    for wrong, message in (
        (["calibrate", "any", "Sparse", "--output", "x"], "there is no method Sparse; there are"),
        (["calibrate", "any", "SparseVDiT", "--output", "x"], "give what to calibrate on"),
        ([*told, "--set", "epsilon"], "--set 'epsilon' is not understood; write --set key=value"),
    ):
        failed = CliRunner().invoke(cli.app, wrong)
        assert failed.exit_code and message in str(failed.exception)
