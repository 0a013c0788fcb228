"""A served app, in a process of its own, and a browser that looks at it."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch

CHROMIUM = os.environ.get("CHROMIUM") or shutil.which("chromium") or shutil.which("chromium-browser")
# As root, and without the calls home that a closed network refuses.
FLAGS = [
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
]
START, WAIT = 180, 120  # seconds: until the app answers; for anything in the page, the first load of a model included
# Gradio closes the stream of events as a page is left, and where a run is still on its way, says so as an error.
LEFT = "window.addEventListener('beforeunload', () => { console.error = () => {} })"
# Tests that run in the background of a shell ignore ctrl-c, and so would what they start.
CTRL_C = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
COMMAND = f"{CTRL_C}; import typer; from steer_demos.app import app; typer.run(app)"


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--screenshots", help="folder into which the browser tests write the pictures of the docs")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.get_closest_marker("browser") and CHROMIUM is None:
            item.add_marker(pytest.mark.skip(reason="no Chromium: install Debian's chromium, or set CHROMIUM"))


@dataclass
class Served:
    """The app in a process of its own: its address, and what it wrote to the terminal."""

    url: str
    log: Path
    process: subprocess.Popen[bytes]


@pytest.fixture(scope="session")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """`steer app` on a free port."""
    with start(tmp_path_factory.mktemp("app") / "log") as app:
        yield app


@pytest.fixture
def serving() -> Any:
    """`with serving(log, "--no-hub") as app`: another one, with options."""
    return start


@contextmanager
def start(log: Path, *options: str) -> Iterator[Served]:
    """`steer app` with options, in a process of its own."""
    # as many threads as the tests compute with: sums in another order round differently, and pictures are compared
    same = {"OMP_NUM_THREADS": str(torch.get_num_threads()), "PYTHONPATH": os.pathsep.join(sys.path)}
    environment = {"HF_HUB_OFFLINE": "1", **os.environ, **same}
    with log.open("wb") as written:
        process = subprocess.Popen(
            [sys.executable, "-u", "-c", COMMAND, *options], env=environment, stdout=written, stderr=subprocess.STDOUT
        )
    try:
        until = time.monotonic() + START
        while time.monotonic() < until and process.poll() is None:
            if found := re.search(r"http://127\.0\.0\.1:\d+", log.read_text()):
                yield Served(found[0], log, process)
                return
            time.sleep(0.2)
        raise RuntimeError(f"the app did not start: {log.read_text()}")
    finally:
        process.terminate()
        process.wait(30)


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield browser
        browser.close()


@dataclass
class Visit:
    """A visitor's page, and what went wrong in it."""

    page: Any
    errors: list[str] = field(default_factory=list)
    elsewhere: list[str] = field(default_factory=list)


@pytest.fixture
def visit(chromium: Any, served: Served) -> Iterator[Any]:
    """Opens the page for a visitor with a session of their own: `visit("?tab=video")`.

    After the test no page may have written an error to its console before it was left, or asked another host for
    anything.
    """
    visits: list[Visit] = []

    def opened(query: str = "", width: int = 1280, height: int = 1000, url: str = served.url) -> Any:
        page = chromium.new_context(viewport={"width": width, "height": height}).new_page()
        page.set_default_timeout(WAIT * 1000)
        page.add_init_script(LEFT)
        this = Visit(page)
        page.on("console", lambda said: this.errors.append(said.text) if said.type == "error" else None)
        page.on("pageerror", lambda error: this.errors.append(str(error)))
        page.on("request", lambda asked: this.elsewhere.append(asked.url) if _is_elsewhere(asked.url) else None)
        visits.append(this)
        page.goto(url + "/" + query)
        page.get_by_role("heading", name="steer", exact=True).wait_for()
        return page

    yield opened
    for this in visits:
        this.page.context.close()
    assert [this.errors for this in visits] == [[]] * len(visits)
    assert [this.elsewhere for this in visits] == [[]] * len(visits)


def _is_elsewhere(url: str) -> bool:
    return not re.match(r"(http://127\.0\.0\.1[:/]|data:|blob:|about:)", url)


@pytest.fixture
def settled(visit: Any) -> Any:
    """Opens a tab and waits until it is drawn, nothing moves or fades from then on: `settled("Video", 375, 800)`."""
    from playwright.sync_api import expect

    def opened(tab: str, *size: int) -> Any:
        page = visit(f"?tab={tab.lower()}", *size)
        expect(page.locator(f"[data-tab-id={tab.lower()}]")).to_have_attribute("aria-selected", "true")
        expect(page.locator("[role=tabpanel]:visible").get_by_role("button").first).to_be_visible()
        expect(page.locator(".meta-text, .meta-text-center, .progress-text")).to_have_count(0)
        page.add_style_tag(content="* { transition: none !important; animation: none !important }")
        return page

    return opened


@pytest.fixture
def screenshot(request: pytest.FixtureRequest, tmp_path: Path) -> Any:
    """Writes a picture of a page with a palette; into the folder of --screenshots where one is given."""
    from PIL import Image

    folder = Path(request.config.getoption("--screenshots") or tmp_path)

    def take(page: Any, name: str, **options: Any) -> Path:
        file = folder / f"app-{name}.png"
        page.mouse.move(0, 0)
        page.screenshot(path=file, **options)
        with Image.open(file) as picture:
            picture.convert("RGB").quantize(256, dither=Image.Dither.NONE).save(file, optimize=True)
        return file

    return take
