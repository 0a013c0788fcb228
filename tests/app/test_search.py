"""What the tab of searches shows of saved methods, and what it refuses to open. Anyone may have written an upload."""

from __future__ import annotations

import html
import json
import re
import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, urlsplit

import gradio as gr
import numpy as np
import pytest
import torch

import steer
from steer.plan import Plan
from steer_demos import models
from steer_demos.app import findings, search
from steer_demos.app.jobs import Job, Jobs, Stopped
from steer_demos.app.page import TABS
from steer_demos.app.sharing import Shared
from steer_demos.app.sources import Sources
from steer_demos.app.stage import Stage

PAG = "fitted:emoji-mmdit/PAG"


@cache
def show(name: str) -> search.Seen:
    method, card = search.opened(Sources(), name)
    return search.seen(method, name, card, Job())


def copied(folder: Path, model: str = "emoji-mmdit", method: str = "PAG") -> list[str]:
    """A saved method of the package in another folder: its files, as an upload gives them."""
    shutil.copytree(models.FITTED / model / method, folder, dirs_exist_ok=True)
    return [str(file) for file in sorted(folder.iterdir())]


def edited(folder: Path, edit: Callable[[dict[str, Any]], Any]) -> list[str]:
    """The same with another steer.json."""
    files = copied(folder)
    document = json.loads((folder / "steer.json").read_text())
    edit(document)
    (folder / "steer.json").write_text(json.dumps(document))
    return files


@pytest.mark.parametrize(("model", "method"), models.list_fitted())
def test_all_that_comes_with_the_package_is_shown(model: str, method: str) -> None:
    summary, pictures, ranking, provenance, _, code = show(f"fitted:{model}/{method}")
    assert f"<h3>{method}</h3>" in summary
    assert pictures and all(picture.width > 200 and caption for picture, caption in pictures)
    assert ("Best trials" in ranking) == (method == "PAG")
    assert "versions" in provenance
    compile(code, "shown", "exec")


def test_a_search_with_trials_has_a_map_of_each_round_and_says_how_sure_it_is() -> None:
    summary, pictures, trials, _, _, _ = show(PAG)
    assert [caption.split(":")[0] for _, caption in pictures[:3]] == ["Round 1", "Round 2", "Round 3"]
    assert "they flatter it" in summary
    method: Any = steer.load(models.FITTED / "emoji-mmdit" / "PAG")
    for site, heads in method.heads.items():
        for head in heads:
            assert re.search(rf"<td>{re.escape(site)}</td><td>{head}</td>", summary)
    assert len(re.findall("<tr>", trials)) == 11


def test_the_code_that_is_shown_applies_the_method() -> None:
    *_, code = show(PAG)
    names: dict[str, Any] = {}
    exec(code.replace('out = pipe("a red apple"', 'out = pipe("a red apple", num_inference_steps=2'), names)
    assert names["out"].images[0].size == (64, 64)
    assert type(names["method"]) is steer.PAG


@pytest.fixture(scope="module")
def tabs() -> dict[str, Shared]:
    with gr.Blocks():
        return {name.lower(): draw(Stage(Sources()), Jobs()) for name, draw in TABS.items()}


@pytest.mark.parametrize(("model", "method"), models.list_fitted())
def test_the_link_is_understood_by_the_tab_that_shows_it_at_work(
    tabs: dict[str, Shared], model: str, method: str
) -> None:
    address = re.search(r'href="([^"]+)"', show(f"fitted:{model}/{method}")[0])
    assert address
    query = parse_qs(urlsplit(html.unescape(address[1])).query)
    settings = json.loads(query["settings"][0])
    asked = tabs[query["tab"][0]]
    shown = dict(zip(asked.inputs, asked.restore(settings), strict=False))
    assert (shown["model"], shown["method"]) == (model, method)
    assert type(steer.load(Sources().open(shown["saved"]))).__name__ == method


def test_others_have_no_link() -> None:
    assert "Try it" not in findings.summary(steer.PAG(), "owner/name")


@pytest.mark.parametrize("name", ["fitted:emoji-mmdit/../../weights", "fitted:emoji-mmdit/NoSuch", "fitted:x/PAG"])
def test_only_what_comes_with_the_package_is_named_so(name: str) -> None:
    with pytest.raises(ValueError, match="cannot be opened here"):
        Sources().open(name)


def test_files_are_looked_at_wherever_they_came_from(tmp_path: Path) -> None:
    files = copied(tmp_path)
    method = search.uploaded([file for file in files if "steer." in file])
    assert method.settings() == steer.load(models.FITTED / "emoji-mmdit" / "PAG").settings()
    summary, pictures, *_, code = search.seen(method, "", "", Job())
    assert len(pictures) > 3
    assert "Try it" not in summary
    assert "steer.load('FOLDER')" in code


def renamed(file: str, name: str) -> str:
    return str(Path(file).rename(Path(file).with_name(name)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda files: [renamed(files[0], "method.pkl")], "method.pkl is not opened"),
        (lambda files: [renamed(files[0], "steer")], "steer is not opened"),
        (lambda files: files[1:], "there is no steer.json among the files"),
        (lambda files: files[:1], "steer.safetensors is missing"),
        (lambda files: [*files, *files], "there are two .json files"),
    ],
)
def test_other_files_are_refused_in_words(tmp_path: Path, change: Any, words: str) -> None:
    with pytest.raises(ValueError, match=re.escape(words)) as error:
        search.uploaded(change(copied(tmp_path)))
    assert "/" not in str(error.value)


def test_damaged_and_large_files_are_refused_in_words(tmp_path: Path) -> None:
    files = copied(tmp_path / "cut")
    Path(files[1]).write_bytes(Path(files[1]).read_bytes()[:-1])
    with pytest.raises(ValueError, match="is not the one that was saved with its"):
        search.uploaded(files)
    files = copied(tmp_path / "deep")
    Path(files[0]).write_text("[" * 200_000)
    with pytest.raises(ValueError, match="nested too deeply"):
        search.uploaded(files)
    Path(files[0]).write_text(" " * 2_000_001)
    with pytest.raises(ValueError, match="larger than 2 MB"):
        search.uploaded(files)


@pytest.mark.parametrize(
    "edit",
    [
        lambda document: document["record"]["plan"]["report"].pop("figures"),
        lambda document: document["record"]["plan"]["report"].update(trials=[]),
        lambda document: document["record"]["plan"]["report"].update(trials=[{"number": "one"}]),
        lambda document: document["record"]["plan"]["report"].update(keys=["a"]),
    ],
)
def test_a_record_that_was_changed_is_refused_in_words(tmp_path: Path, edit: Any) -> None:
    with pytest.raises(ValueError):
        search.seen(search.uploaded(edited(tmp_path, edit)), "", "", Job())


def test_what_a_stranger_wrote_is_no_markup(tmp_path: Path) -> None:
    attack = '<img src="http://example.org/x" onerror="alert(1)">'

    def edit(document: dict[str, Any]) -> None:
        document["record"]["plan"]["report"]["options"]["objective"] = attack
        document["record"]["plan"]["report"]["figures"][attack] = attack
        document["fingerprint"]["transformer"]["class"] = attack

    method = search.uploaded(edited(tmp_path, edit))
    summary, _, trials, provenance, _, code = search.seen(method, "", "", Job())
    assert "<img" not in summary + trials + provenance
    assert "&lt;img" in summary and "&lt;img" in provenance
    compile(code, "shown", "exec")


def test_what_would_take_long_to_draw_is_refused() -> None:
    groups = tuple(i / 100 for i in range(100))
    plan = Plan(("a", "b"), 2, starts=groups, tensors={"mode": torch.zeros(100, 2, 2, dtype=torch.int8)})
    with pytest.raises(ValueError, match="100 groups of steps; at most 8"):
        search.seen(steer.SparseVDiT(plan=plan), "", "", Job())
    plan = Plan(("a", "b"), 2, tensors={"mode": torch.zeros(1, 2, 2), "large": torch.zeros(2_000_001)})
    with pytest.raises(ValueError, match="large has 2000001 numbers"):
        search.seen(steer.SparseVDiT(plan=plan), "", "", Job())


def test_settings_alone_are_said_to_be_no_search(tmp_path: Path) -> None:
    steer.PAG(scale=2.0).save(tmp_path)
    summary, pictures, trials, provenance, _, code = search.seen(
        search.uploaded([str(tmp_path / "steer.json")]), "", "", Job()
    )
    assert "Not found by a search" in summary
    assert not pictures and not trials
    assert "scale" in provenance
    assert "steer.PAG(scale=2.0)" in code


def test_what_changes_nothing_says_so() -> None:
    assert "changes nothing" in show("fitted:emoji-vlm/VAR")[0]
    assert "changes nothing" not in show(PAG)[0]


def test_it_may_be_stopped_between_two_pictures() -> None:
    job = Job()
    job.stop()
    with pytest.raises(Stopped):
        search.seen(search.opened(Sources(), PAG)[0], PAG, "", job)


def test_blocks_that_a_head_keeps_are_black(tmp_path: Path) -> None:
    from PIL import Image

    blocks = torch.zeros(1, 2, 2, 2, dtype=torch.bool)
    blocks[0, 1, 0, 1] = True
    findings.draw_blocks(blocks, tmp_path / "blocks.png", size=8)
    drawn = np.asarray(Image.open(tmp_path / "blocks.png"))
    assert drawn.shape == (20, 34)
    assert (drawn[6:14, 6:14] == 255).all()
    assert (drawn[6:10, 24:28] == 0).all() and (drawn[10:14, 20:28] == 255).all()
