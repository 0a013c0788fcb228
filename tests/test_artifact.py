"""Saved methods: equal settings after a round trip, the same bits in another process, and refusals that say why."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import artifact_replay
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from probes import assert_untouched, snapshot
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, build
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

import steer
from steer import Plan, artifact, cli
from steer.fingerprint import fingerprint

METHODS = list(steer.methods())
SITES = ("transformer_blocks.1.attn", "transformer_blocks.2.attn")


# ------------------------------------------------------------------ round trips

PLAN = Plan(
    sites=SITES,
    heads=2,
    grid=(1, 4, 6),
    starts=(0.0, 0.5),
    tensors={
        "score": torch.tensor([[[0.5, float("nan")], [-1.0, 2.0]]]),
        "keep": torch.ones(2, 2, 5, dtype=torch.bool),
    },
    report={"seed": 3, "figures": {"gain": 0.25}, "text": "größer"},
)
COMMON: dict[str, st.SearchStrategy[Any]] = {
    "layers": st.sampled_from([None, "blocks.{1..3}", ["blocks.1", "blocks.2"], ("blocks.1", "mid_block")]),
    "heads": st.sampled_from(
        [None, [0, 3], (1,), [], {"blocks.1": [0, 2], "blocks.2": (1,)}, {}, [{"blocks.1": [1]}, {"blocks.2": [0, 2]}]]
    ),
    "steps": st.sampled_from([None, ":", "0.2:0.9", "3:10", range(3, 10), range(0)]),
    "rows": st.sampled_from([None, "cond", "uncond"]),
    "min_tokens": st.integers(0, 4096),
}


def values_of(hint: Any) -> st.SearchStrategy[Any]:
    """Values of a field's type, the odd ones among them."""
    kind, inside = typing.get_origin(hint) or hint, typing.get_args(hint)
    known: dict[Any, st.SearchStrategy[Any]] = {
        bool: st.booleans(),
        int: st.integers(0, 64),
        float: st.floats(0, 1) | st.sampled_from([1, 2.5, 20.0, float("inf"), -float("inf")]),
        str: st.sampled_from(["spherical", "output", "largest", "mean", "all", "image", "batched", "outliers", "ä"]),
        type(None): st.none(),
        Plan: st.just(PLAN),
        torch.Tensor: st.sampled_from([torch.arange(4), torch.tensor([[True, False]]), torch.rand(3, 2).bfloat16().T]),
    }
    if kind in known:
        return known[kind]
    if kind is typing.Literal:
        return st.sampled_from(inside)
    if isinstance(kind, type) and issubclass(kind, Sequence):
        items = st.lists(values_of(inside[0]), min_size=1, max_size=4)
        return items | items.map(tuple)
    return st.one_of([values_of(each) for each in inside])


@pytest.mark.parametrize("name", METHODS)
@settings(max_examples=40, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_every_setting_of_every_method_comes_back(name: str, data: st.DataObject, tmp_path: Path) -> None:
    """Fields with drawn values; a value that the method itself refuses is left at its default."""
    cls = steer.methods()[name]
    method = cls()
    for field, hint in typing.get_type_hints(cls).items():
        if field in {each.name for each in dataclasses.fields(cls)}:
            value = data.draw(COMMON[field] if field in COMMON else values_of(hint), label=field)
            try:
                method = dataclasses.replace(method, **{field: value})
            except (ValueError, TypeError):
                continue
    method.__dict__["_record"] = data.draw(st.sampled_from([None, PLAN]))
    method.save(str(tmp_path))
    loaded = steer.load(tmp_path)
    assert type(loaded) is cls
    for field in dataclasses.fields(cls):
        assert same(getattr(loaded, field.name), getattr(method, field.name)), field.name
    assert same(loaded.__dict__.get("_record"), method.__dict__["_record"])


def same(now: Any, then: Any) -> bool:
    """Of one type and equal, tensors to the bit."""
    if isinstance(then, Plan):
        return all(same(getattr(now, each.name), getattr(then, each.name)) for each in dataclasses.fields(Plan))
    if isinstance(then, Mapping):
        return set(now) == set(then) and all(same(now[key], value) for key, value in then.items())
    if isinstance(then, torch.Tensor):
        equal = torch.equal(now.nan_to_num(), then.nan_to_num()) and torch.equal(now.isnan(), then.isnan())
        return now.dtype == then.dtype and equal
    return type(now) is type(then) and now == then


def test_saving_again_gives_the_same_bytes(tmp_path: Path) -> None:
    for folder in ("a", "b"):
        steer.ACT(plan=PLAN).save(str(tmp_path / folder))  # type: ignore[attr-defined]
    steer.load(tmp_path / "a").save(str(tmp_path / "c"))
    for file in ("steer.json", "steer.safetensors"):
        assert len({(tmp_path / folder / file).read_bytes() for folder in "abc"}) == 1
    assert sorted(path.name for path in (tmp_path / "a").iterdir()) == ["steer.json", "steer.safetensors"]


def test_what_cannot_be_saved_leaves_the_old_files(tmp_path: Path) -> None:
    steer.PAG(scale=2.0).save(str(tmp_path))
    before = (tmp_path / "steer.json").read_bytes()
    with pytest.raises(TypeError, match=r"field heads=.* cannot be saved"):
        steer.PAG(heads={1: [2]}).save(str(tmp_path))
    for name in ("../escaped", "a/b", ".hidden", ""):
        plan = dataclasses.replace(PLAN, tensors={name: torch.zeros(1)})
        with pytest.raises(TypeError, match="has tensors named"):
            steer.ACT(plan=plan).save(str(tmp_path))  # type: ignore[attr-defined]
    assert (tmp_path / "steer.json").read_bytes() == before


# ------------------------------------------------------------------ another process


def brightness(pictures: torch.Tensor, prompts: Any) -> torch.Tensor:
    return pictures.mean((1, 2, 3))


def searched(name: str, layers: str, **options: Any) -> tuple[Any, dict[str, Any], steer.Method]:
    """A pipeline of the replay, the arguments of its call, and PAG after a search on it."""
    pipe, call = artifact_replay.OPEN[name]()
    sample = {**call, "guidance_scale": 1.0, "num_inference_steps": 2}
    method = steer.calibrate(
        pipe, steer.PAG(scale=2.0, layers=layers), [sample], objective=brightness, progress=False, **options
    )
    return pipe, call, method


def test_another_process_draws_the_same_bits(tmp_path: Path) -> None:
    pairs: list[str] = []
    drawn = {}
    for name, layers in (("sd3", "transformer_blocks.{1..2}"), ("emoji-mmdit", "transformer_blocks.2")):
        pipe, call, method = searched(name, layers, top=2)
        assert method.heads and method.record is not None
        method.save(str(tmp_path / name))
        plain = artifact_replay.draw(pipe, call)
        with steer.apply(pipe, method):
            drawn[name] = artifact_replay.draw(pipe, call)
        assert not torch.equal(drawn[name], plain)
        pairs += [name, str(tmp_path / name)]
    result = tmp_path / "drawn.safetensors"
    subprocess.run(
        [sys.executable, artifact_replay.__file__, str(result), *pairs],
        check=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
    )
    replayed = load_file(result)
    for name, picture in drawn.items():
        assert torch.equal(replayed[name], picture), name


# ------------------------------------------------------------------ another model


def pipe_with(**config: Any) -> Any:
    """Tiny SD3 with another transformer."""
    pipe = PIPELINES["sd3"].build()
    shape = {key: value for key, value in pipe.transformer.config.items() if not key.startswith("_")}
    pipe.transformer = build(lambda: type(pipe.transformer)(**{**shape, **config}))
    return pipe


@pytest.mark.parametrize(
    ("make", "differs"),
    [
        (PIPELINES["flux"].build, "made for SD3Transformer2DModel, this is FluxTransformer2DModel"),
        (
            PIPELINES["sd15"].build,
            r"made for a pipeline with transformer \(SD3T.*\), this is a pipeline with unet \(UNet2D",
        ),
        (lambda: pipe_with(num_layers=2), r"its attention sites transformer_blocks\.2\.attn are missing here"),
        (lambda: pipe_with(num_layers=5), r"transformer_blocks\.3\.attn, transformer_blocks\.4\.attn are new here"),
        (
            lambda: pipe_with(num_attention_heads=4, attention_head_dim=4),
            r"the query heads differ at transformer_blocks\.0\.attn \(2 -> 4\).* num_attention_heads \(2 -> 4\)",
        ),
        (lambda: pipe_with(qk_norm="rms_norm"), r"the configurations differ in qk_norm \(None -> rms_norm\)"),
    ],
    ids=["class", "component", "shallower", "deeper", "heads", "config"],
)
def test_another_model_is_refused_with_what_differs(make: Callable[[], Any], differs: str, tmp_path: Path) -> None:
    searched("sd3", "transformer_blocks.1", top=1)[2].save(str(tmp_path))
    pipe, loaded = make(), steer.load(tmp_path)
    model = getattr(pipe, "transformer", None) or pipe.unet
    before, attributes = snapshot(model), dict(vars(pipe))
    with pytest.raises(steer.FingerprintError, match=f"this saved PAG does not fit the model: .*{differs}"):
        steer.apply(pipe, loaded)
    assert_untouched(before, model)
    assert vars(pipe) == attributes


def test_a_pipeline_of_two_models_is_not_one_of_one(tmp_path: Path) -> None:
    one, two = PIPELINES["wan21"].build(), PIPELINES["wan22"].build()
    with steer.apply(two, method := steer.PAG(layers="blocks.1.attn1")):
        method.save(str(tmp_path))
    with pytest.raises(
        steer.FingerprintError, match=r"with transformer \(Wan.* and transformer_2 \(Wan.*, this is a pipe"
    ):
        steer.apply(one, steer.load(tmp_path))
    for target in (two, two.transformer, two.transformer_2):
        steer.apply(target, steer.load(tmp_path)).remove()


def test_a_model_alone_is_the_model_of_its_pipeline(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3"].build()
    for fitted_to, used_on in ((pipe, pipe.transformer), (pipe.transformer, pipe)):
        with steer.apply(fitted_to, method := steer.PAG(layers="transformer_blocks.1")):
            method.save(str(tmp_path))
        steer.apply(used_on, steer.load(tmp_path)).remove()


def test_a_fine_tune_is_welcome_with_a_word_of_warning(tmp_path: Path) -> None:
    pipe, _, method = searched("sd3", "transformer_blocks.1", top=1)
    method.save(str(tmp_path))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer.apply(pipe, steer.load(tmp_path)).remove()
        pipe.transformer.bfloat16()  # rounded, which says nothing of the training
        steer.apply(pipe, steer.load(tmp_path)).remove()
    tuned = pipe_with()
    with torch.no_grad():
        tuned.transformer.transformer_blocks[0].attn.to_q.weight.mul_(1.01)
    loaded = steer.load(tmp_path)
    with pytest.warns(steer.ArtifactWarning, match="searched on a SD3Transformer2DModel with other weights.*fine-tune"):
        steer.apply(tuned, loaded).remove()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        steer.apply(tuned, loaded).remove()  # said once


def test_token_ids_and_newer_libraries_make_no_other_model(tmp_path: Path) -> None:
    """What fine-tunes of language models change in their configurations, and keys that only one side has."""
    model = FAMILIES["llama"].build()
    with steer.apply(model, method := steer.methods()["StreamingLLM"]()):
        method.save(str(tmp_path))
    edit(tmp_path, lambda document: document["fingerprint"][""]["config"].pop("hidden_act"))
    model.config.pad_token_id, model.config.use_cache, model.config.brand_new = 5, False, "x"
    steer.apply(model, steer.load(tmp_path)).remove()
    model.config.rms_norm_eps = 1e-3
    with pytest.raises(steer.FingerprintError, match="differ in rms_norm_eps"):
        steer.apply(model, steer.load(tmp_path))


@pytest.mark.parametrize("relative", [False, True])
def test_the_fingerprint_never_holds_a_path(relative: bool, tmp_path: Path, monkeypatch: Any) -> None:
    """Not even one that reads like a repository of the Hub."""
    monkeypatch.chdir(tmp_path)
    folder = "runs/model" if relative else str(tmp_path / "runs" / "model")
    model = FAMILIES["sd3"].build()
    model.save_pretrained(folder)
    loaded = type(model).from_pretrained(folder)
    assert loaded.config["_name_or_path"] == folder
    assert "runs" not in json.dumps(fingerprint({"": loaded}))


# ------------------------------------------------------------------ damaged files


def edit(folder: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    file = folder / "steer.json"
    document = json.loads(file.read_text())
    change(document)
    file.write_text(json.dumps(document))


def put(*path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    """An edit that puts a value at a path of keys."""

    def change(document: dict[str, Any]) -> None:
        for key in path[:-1]:
            document = document[key]
        document[path[-1]] = value

    return change


DAMAGES: dict[str, tuple[Callable[[dict[str, Any]], Any], str]] = {
    "no method": (lambda d: d.pop("method"), "without a proper method"),
    "fields": (put("fields", value=[1]), "without a proper fields"),
    "tensors": (put("tensors", value=None), "without a proper tensors"),
    "fingerprint": (put("fingerprint", value="SD3"), "without a proper fingerprint"),
    "part of it": (put("fingerprint", value={"": {"class": "SD3", "config": {}}}), "proper fingerprint of the model"),
    "unknown method": (
        put("method", value="PAX"),
        r"holds a PAX; this version knows ACT, .*; steer 9\.8 wrote it, and ",
    ),
    "unknown field": (put("fields", "spin", value=1), r"fields that ACT does not: spin; steer 9\.8 wrote it, and "),
    "text for a number": (put("fields", "beta", value="0.4"), "beta='0.4', but beta of ACT is float"),
    "list for a number": (put("fields", "keep_first", value=[1]), r"keep_first=\[1\], but keep_first of ACT is int"),
    "truth for a number": (put("fields", "keep_first", value=True), "keep_first=True, but keep_first of ACT is int"),
    "number for heads": (put("fields", "heads", value=3), "heads=3, but heads of ACT is"),
    "text for heads": (put("fields", "heads", value="01"), "heads='01', but heads of ACT is"),
    "text in heads": (put("fields", "heads", value={"mapping": {"a": ["x"]}}), "heads=.*'x'.*, but heads of ACT is"),
    "odd kind": (put("fields", "steps", value={"code": "1"}), "has a steps that cannot be read .*no kind of value"),
    "no kind": (put("fields", "steps", value={}), "has a steps that cannot be read"),
    "short range": (put("fields", "steps", value={"range": []}), "has a steps that cannot be read"),
    "no number": (put("fields", "beta", value={"float": "fast"}), "has a beta that cannot be read"),
    "null plan": (put("fields", "plan", value={"plan": None}), "has a plan that cannot be read"),
    "heads of a plan": (put("fields", "plan", "plan", "heads", value="two"), "its heads are of the wrong type"),
    "sites of a plan": (put("fields", "plan", "plan", "sites", value=[1]), "its sites are of the wrong type"),
    "twice a site": (put("fields", "plan", "plan", "sites", value=["a", "a"]), "names a site twice"),
    "new part": (put("fields", "plan", "plan", "colour", value=1), "has a plan that cannot be read.*colour"),
    "more tensors": (put("fields", "plan", "plan", "tensors", value=["keep", "lost"]), "safetensors lacks its lost"),
    "no tensor": (put("fields", "plan", "plan", "packed", value={"lost": [2]}), "has a plan that cannot be read.*lost"),
    "other shape": (
        put("fields", "plan", "plan", "packed", "keep", value=[5, 9]),
        r"3 bytes, which do not make .*5, 9",
    ),
    "negative shape": (put("fields", "plan", "plan", "packed", "keep", value=[-4, -5]), "do not make the shape"),
    "a way out": (put("fields", "plan", "plan", "tensors", value=["../keep"]), r"may not be named \['\.\./keep'\]"),
    "a lost field": (put("tensors", value=["words"]), "fields that ACT does not: words"),
    "a lost tensor": (put("tensors", value=["alpha"]), "lacks alpha"),
    "other tensors": (put("sha256", value="0" * 64), r"steer\.safetensors is not the one that was saved with its"),
    "newer": (put("format", value=2), r"format 2; this version of steer reads 1; steer 9\.8 wrote it, and "),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_damaged_documents_say_what_is_wrong(damage: str, tmp_path: Path) -> None:
    change, message = DAMAGES[damage]
    steer.methods()["ACT"](plan=PLAN).save(str(tmp_path))  # type: ignore[call-arg]
    edit(tmp_path, put("versions", value={"steer-attention": "9.8"}))
    steer.load(tmp_path)
    edit(tmp_path, change)
    with pytest.raises(ValueError, match=message):
        steer.load(tmp_path)


@pytest.mark.parametrize("text", ["", "{", "[]", "7", '{"format": 1', "\0", '"steer"'])
def test_files_that_are_no_document(text: str, tmp_path: Path) -> None:
    (tmp_path / "steer.json").write_text(text)
    with pytest.raises(
        ValueError, match=r"steer\.json (cannot be read|holds a .*, not a JSON object).*download it again"
    ):
        steer.load(tmp_path)


def test_files_that_are_no_text(tmp_path: Path) -> None:
    (tmp_path / "steer.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ValueError, match=r"steer\.json cannot be read"):
        steer.load(tmp_path)


@settings(max_examples=60, derandomize=True, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(cut=st.floats(0, 1), flip=st.integers(0, 255))
def test_cut_off_and_flipped_bytes(cut: float, flip: int, tmp_path: Path) -> None:
    """Whatever is left of a file, it loads or raises what `load` documents."""
    steer.methods()["ACT"](plan=PLAN).save(str(tmp_path))  # type: ignore[call-arg]
    for name in ("steer.json", "steer.safetensors"):
        whole = (tmp_path / name).read_bytes()
        at = int(cut * (len(whole) - 1))
        for damaged in (whole[:at], whole[:at] + bytes([flip]) + whole[at + 1 :]):
            (tmp_path / name).write_bytes(damaged)
            if damaged != whole and name == "steer.safetensors":
                with pytest.raises(ValueError, match="is not the one that was saved"):
                    steer.load(tmp_path)
                continue
            with contextlib.suppress(ValueError, FileNotFoundError):
                steer.load(tmp_path)
        (tmp_path / name).write_bytes(whole)


def test_artifacts_without_a_digest_are_read(tmp_path: Path) -> None:
    """As they were written before there was one; a broken file of tensors still is an error of its own."""
    steer.methods()["ACT"](plan=PLAN).save(str(tmp_path))  # type: ignore[call-arg]
    edit(tmp_path, lambda document: document.pop("sha256"))
    assert same(steer.load(tmp_path).record, PLAN)
    save_file({"other": torch.zeros(1)}, tmp_path / "steer.safetensors")
    with pytest.raises(ValueError, match=r"steer\.safetensors lacks its keep, score"):
        steer.load(tmp_path)
    (tmp_path / "steer.safetensors").write_bytes(b"nothing")
    with pytest.raises(ValueError, match=r"steer\.safetensors cannot be read"):
        steer.load(tmp_path)
    (tmp_path / "steer.safetensors").unlink()
    with pytest.raises(ValueError, match=r"steer\.safetensors lacks its keep, score"):
        steer.load(tmp_path)


# ------------------------------------------------------------------ steer show


def show(*arguments: str) -> Any:
    return CliRunner().invoke(cli.app, ["show", *arguments], env={"COLUMNS": "80"})


def test_show_says_what_was_found(tmp_path: Path) -> None:
    searched("sd3", "transformer_blocks.{1..2}", top=2)[2].save(str(tmp_path))
    found = show(str(tmp_path))
    assert found.exit_code == 0, found.output
    for text in ("Settings", "scale", "2.0", "Made for", "SD3Transformer2DModel", "brightness", "HeadHunter", "seed",
                 "score without", "Best trials", "gain [95 %]", "they flatter it"):  # fmt: skip
        assert text in found.output, text
    assert max(map(len, found.output.splitlines()[1:])) <= 80


def test_show_of_a_method_that_was_not_searched(tmp_path: Path) -> None:
    steer.PAG().save(str(tmp_path))
    found = show(str(tmp_path))
    assert found.exit_code == 0 and "all as by default" in found.output and "Best trials" not in found.output


def test_show_as_json_is_the_document(tmp_path: Path) -> None:
    steer.methods()["ACT"](plan=PLAN).save(str(tmp_path))  # type: ignore[call-arg]
    assert json.loads(show(str(tmp_path), "--json").output) == json.loads((tmp_path / "steer.json").read_text())


def test_show_lets_nothing_act_on_the_terminal(tmp_path: Path) -> None:
    plan = dataclasses.replace(PLAN, report={"options": {"objective": "\x1b[2J[red]mean[/red]\r\x07"}})
    steer.methods()["ACT"](plan=plan).save(str(tmp_path))  # type: ignore[call-arg]
    shown = show(str(tmp_path)).output
    assert "?[2J[red]mean[/red]??" in shown and "\x1b" not in shown


def test_show_says_where_there_is_nothing(tmp_path: Path) -> None:
    assert isinstance(show(str(tmp_path)).exception, FileNotFoundError)
    assert artifact.JSON in str(show(str(tmp_path)).exception)
