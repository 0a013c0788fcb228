"""Methods on the Hub: through its real client, to a server on this machine, and from its cache without a connection."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest.mock import patch

import pytest
import torch
from hub_server import LocalHub, serve
from huggingface_hub import ModelCard, constants
from tiny import FAMILIES
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

import steer
from steer import cli, hub
from steer.model_card import card


@pytest.fixture
def local() -> Iterator[LocalHub]:
    with serve() as server:
        yield server


def fitted() -> steer.Method:
    """PAG after a small search on tiny SD3."""
    pipe = PIPELINES["sd3"].build()
    call = PIPELINES["sd3"].call_kwargs(pipe, guidance_scale=1.0, steps=1)
    sample = {key: value for key, value in call.items() if key != "generator"}
    method = steer.PAG(scale=2.0, layers="transformer_blocks.{1..2}")

    def brightness(pictures: torch.Tensor, prompts: Any) -> torch.Tensor:
        return pictures.mean((1, 2, 3))

    return steer.calibrate(pipe, method, [sample, dict(sample)], objective=brightness, top=1, progress=False)


def test_what_is_pushed_is_loaded(local: LocalHub, tmp_path: Path) -> None:
    method = fitted()
    url = method.push_to_hub("me/heads")
    assert url == f"{local.url}/me/heads/commit/{local.repos['me/heads']['main'][0]}"
    loaded = steer.load("me/heads", cache_dir=tmp_path)
    assert loaded.settings() == method.settings() and loaded.heads
    assert loaded.record is not None and method.record is not None and loaded.record.report == method.record.report
    for name, tensor in method.record.tensors.items():
        assert torch.equal(loaded.record.tensors[name].nan_to_num(9.0), tensor.nan_to_num(9.0))
    with pytest.raises(steer.FingerprintError, match="made for SD3Transformer2DModel, this is Flux"):
        steer.apply(FAMILIES["flux"].build(), loaded)


def test_only_the_two_files_are_downloaded(local: LocalHub, tmp_path: Path) -> None:
    fitted().push_to_hub("me/heads")
    names = {".gitattributes", "README.md", "steer.json", "steer.safetensors", "report.md", "gain_1.png"}
    assert set(local.files("me/heads")) == names
    local.commit("me/heads", "main", {"evil.py": b"raise", "sub/steer.json": b"{}"})
    steer.load("me/heads", cache_dir=tmp_path)
    assert {file.name for file in tmp_path.rglob("snapshots/*/*")} == {"steer.json", "steer.safetensors"}


def test_revisions_are_pinned(local: LocalHub, tmp_path: Path) -> None:
    steer.PAG(scale=1.0).push_to_hub("me/heads")
    first = local.repos["me/heads"]["main"][0]
    steer.PAG(scale=2.0).push_to_hub("me/heads")
    steer.PAG(scale=3.5).push_to_hub("me/heads", revision="wild", commit_message="Try more")
    assert local.messages == ["Upload PAG of steer", "Upload PAG of steer", "Try more"]
    scales = {at: steer.load("me/heads", revision=at, cache_dir=tmp_path).scale for at in (None, first, "wild")}  # type: ignore[attr-defined]
    assert scales == {None: 2.0, first: 1.0, "wild": 3.5}
    with pytest.raises(FileNotFoundError, match="the repository me/heads has no revision tame: give a branch"):
        steer.load("me/heads", revision="tame", cache_dir=tmp_path)


def test_private_repositories_and_pull_requests(local: LocalHub) -> None:
    steer.PAG().push_to_hub("team/heads", private=True)
    assert (local.created["team/heads"]["visibility"], local.created["team/heads"]["organization"]) == (
        "private",
        "team",
    )
    url = steer.PAG(scale=9.0).push_to_hub("team/heads", create_pr=True)
    assert url == f"{local.url}/team/heads/discussions/1"
    scale = {
        at: json.loads(local.files("team/heads", at)["steer.json"])["fields"]["scale"] for at in ("main", "refs/pr/1")
    }
    assert scale == {"main": 3.0, "refs/pr/1": 9.0}


def test_what_cannot_be_saved_makes_no_repository(local: LocalHub) -> None:
    with pytest.raises(TypeError, match=r"field heads=.* cannot be saved"):
        steer.PAG(heads={3: [1]}).push_to_hub("me/heads")
    assert local.repos == {}


def test_repositories_that_are_none_of_ours(local: LocalHub, tmp_path: Path) -> None:
    with pytest.raises(
        FileNotFoundError, match="no folder me/nothing here, and the Hub has no repository of that name"
    ):
        steer.load("me/nothing", cache_dir=tmp_path)
    local.repos["me/weights"] = {}
    local.commit("me/weights", "main", {"model.safetensors": b""})
    with pytest.raises(FileNotFoundError, match=r"the repository me/weights holds no steer\.json"):
        steer.load("me/weights", cache_dir=tmp_path)


def test_the_cache_serves_without_a_connection(local: LocalHub, tmp_path: Path) -> None:
    steer.PAG(scale=1.5).push_to_hub("me/heads")
    steer.load("me/heads", cache_dir=tmp_path)
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        assert steer.load("me/heads", cache_dir=tmp_path).settings() == {"scale": 1.5}
        with pytest.raises(FileNotFoundError, match=r"HF_HUB_OFFLINE is set, and me/other is not .* in the cache"):
            steer.load("me/other", cache_dir=tmp_path)
        with pytest.raises(FileNotFoundError, match="me/heads at v2 is not"):
            steer.load("me/heads", revision="v2", cache_dir=tmp_path)


def test_a_cache_that_was_copied_here(tmp_path: Path) -> None:
    """The layout that the Hub's client documents, made by hand: no server was ever asked."""
    commit, repo = "1" * 40, tmp_path / "models--me--heads"
    steer.PAG(scale=1.5).save(str(repo / "snapshots" / commit))
    (repo / "refs").mkdir()
    (repo / "refs" / "main").write_text(commit)
    with patch.object(constants, "HF_HUB_OFFLINE", True):
        for revision in (None, commit):
            assert steer.load("me/heads", revision=revision, cache_dir=tmp_path).settings() == {"scale": 1.5}


def test_a_server_that_is_away(local: LocalHub, tmp_path: Path) -> None:
    with (
        patch.object(constants, "ENDPOINT", "http://127.0.0.1:9"),
        pytest.raises(FileNotFoundError, match="the Hub cannot be reached"),
    ):
        steer.load("me/heads", cache_dir=tmp_path)


def test_a_folder_of_the_same_name_goes_first(tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.chdir(tmp_path)
    steer.PAG(scale=1.5).save("me/heads")
    assert steer.load("me/heads").settings() == {"scale": 1.5}
    with pytest.raises(ValueError, match="revision='main' is for the Hub, but me/heads is a folder here"):
        steer.load("me/heads", revision="main")


@pytest.mark.parametrize("source", ["heads", "/no/such/folder", "a/b/c", "../heads", "me/", "me/a b", Path("me/heads")])
def test_what_is_neither_a_folder_nor_an_id(source: Any) -> None:
    assert not hub.is_id(source)
    with pytest.raises(FileNotFoundError, match="neither a folder nor a repository id of the Hub: give"):
        steer.load(source)


def test_the_card_says_what_it_is_and_how_it_was_found(local: LocalHub) -> None:
    fitted().push_to_hub("me/heads")
    shown = ModelCard(local.files("me/heads")["README.md"].decode())
    assert shown.data.to_dict() == {"library_name": "steer", "tags": ["steer", "training-free", "PAG"]}
    texts = (
        *(
            "# PAG for SD3Transformer2DModel",
            'steer.load("me/heads")',
            "| scale | 2.0 |",
            "brightness",
            "| samples | 2 |",
        ),
        *("HeadHunter(rounds=1, top=1)", "| seed | 0;", "diffusers 0.", "3 attention sites, 2 heads each"),
        *("| settings | score | gain [95 %] |", "they flatter it", "![gain_1](gain_1.png)", "report.md"),
    )
    for text in texts:
        assert text in shown.text, text
    code = shown.text.split("```python\n")[1].split("```")[0]
    compile(code, "card", "exec")


def test_the_card_of_a_method_that_was_not_searched() -> None:
    text = card(steer.PAG(scale=2.0), "me/heads")
    assert (
        "chosen by hand" in text
        and "## Search" not in text
        and "## Best trials" not in text
        and "base_model" not in text
    )


def test_the_card_names_the_model_it_was_made_for(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3"].build()
    for name, wanted in (
        ("me/tiny-sd3", "me/tiny-sd3"),
        ("/home/me/.cache/hub/models--me--tiny-sd3/snapshots/1a2b/transformer", "me/tiny-sd3"),
        (str(tmp_path), None),
    ):
        pipe.transformer.register_to_config(_name_or_path=name)
        method = steer.PAG(layers="transformer_blocks.1")
        with steer.apply(pipe, method):
            text = card(method, "me/heads")
        assert ModelCard(text).data.base_model == wanted
        assert "/home/me" not in text and str(tmp_path) not in text


def test_show_reads_a_repository(local: LocalHub, tmp_path: Path, monkeypatch: Any) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    steer.PAG(scale=1.25).push_to_hub("me/heads")
    shown = CliRunner().invoke(cli.app, ["show", "me/heads", "--revision", "main"])
    assert shown.exit_code == 0 and "PAG, from me/heads" in shown.output and "1.25" in shown.output
