"""What visitors may open: what the host offers, what lies below its folders, ids on the Hub, and nothing else."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from steer_demos.app.sources import Sources


@pytest.fixture
def home(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A host: the folder "shown" with a model and links, and beside it one that is nobody's business."""
    for name in ("shown/model", "hidden/model", "owner/name"):
        (tmp_path / name).mkdir(parents=True)
    (tmp_path / "shown" / "file").write_text("no folder")
    (tmp_path / "shown" / "inside").symlink_to(tmp_path / "shown" / "model")
    (tmp_path / "shown" / "outside").symlink_to(tmp_path / "hidden")
    (tmp_path / "shown" / "circle").symlink_to(tmp_path / "shown" / "circle")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path))
    return tmp_path


def refused(sources: Sources, name: str) -> str:
    with pytest.raises(ValueError, match="cannot be opened here") as error:
        sources.open(name)
    return str(error.value).removeprefix(name.strip())


def test_what_is_offered_is_opened(home: Path) -> None:
    sources = Sources(models=("hidden/model", "other/hub-id"), folders=(home / "shown",))
    model = (home / "shown" / "model").resolve()
    assert sources.open("emoji-unet") == "emoji-unet"
    assert sources.open(" model ") == sources.open(str(model)) == sources.open("inside") == model
    assert sources.open("hidden/model") == (home / "hidden" / "model").resolve()
    assert sources.open("other/hub-id") == "other/hub-id"
    assert sources.open("some-one/a.model_v1") == "some-one/a.model_v1"


@pytest.mark.parametrize("hub", [True, False])
@pytest.mark.parametrize(
    "name",
    [
        *("../hidden/model", "model/../../hidden/model", "outside", "outside/model/.", "./../hidden", "hidden", "file"),
        *("~", "~/hidden/model", "~root", "/", "/etc", "/etc/passwd", "//etc", "file:///etc", "circle"),
        *("..%2fhidden%2fmodel", "%2e%2e/hidden", "..\\hidden\\model", "C:\\Windows", "\\\\host\\share"),
        *("model\0", "\0", "../hidden\0/model", "a" * 5000, "a/" * 2000, "owner/../..", "../owner", "a/b/c"),
        *("owner/name\n../x", "https://example.com/a", "owner/na me", "owner/", "/name", "owner//name", "$HOME/x"),
    ],
)
def test_nothing_else_is_opened(home: Path, name: str, hub: bool) -> None:
    offered = Sources(folders=(home / "shown",), hub=hub)
    assert refused(offered, name) == refused(offered, "../nothing/of/this/name")
    assert refused(Sources(hub=hub), name) == refused(Sources(hub=hub), "../nothing/of/this/name")


def test_a_folder_of_the_host_is_not_taken_for_a_hub_id(home: Path) -> None:
    assert refused(Sources(), "owner/name") == refused(Sources(), "/nothing")
    assert Sources().open("owner/other") == "owner/other"


def test_without_the_hub_no_id_is_opened(home: Path) -> None:
    words = refused(Sources(hub=False), "owner/other")
    assert "Hub" not in words and "emoji-mmdit" in words


def test_an_empty_name_and_a_folder_that_is_none_are_said(home: Path) -> None:
    with pytest.raises(ValueError, match="no model is given"):
        Sources().open("  ")
    with pytest.raises(ValueError, match=re.escape("--folder nowhere is not a folder")):
        Sources(folders=(Path("nowhere"),))
