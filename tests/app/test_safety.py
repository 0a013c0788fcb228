"""The app as it is run is for its own machine and its own page, shows no file of the host, and asks nobody else."""

from __future__ import annotations

import asyncio
import re
import signal
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest
from gradio_client import Client, handle_file
from gradio_client.exceptions import AppError

from steer_demos.app import page
from steer_demos.app.page import OwnPageOnly
from steer_demos.app.sources import Sources

IMAGE = {"model": "emoji-mmdit", "prompt": "a red apple", "seed": 0, "steps": 50, "guidance_scale": 3.0}
IMAGE |= {"method": "PAG", "settings": {"scale": 2.0}, "saved": "", "api_name": "/image"}


def status(host: str, headers: dict[str, str]) -> int:
    """What an app that listens at `host` answers to a request with these headers; 200 = it is let in."""
    sent: list[Any] = []

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await send({"type": "http.response.start", "status": 200, "headers": []})

    async def send(message: Any) -> None:
        sent.append(message)

    scope = {"type": "http", "headers": [(name.encode(), value.encode()) for name, value in headers.items()]}
    asyncio.run(OwnPageOnly(app, host)(scope, None, send))  # type: ignore[arg-type]
    return sent[0]["status"]


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "::1"])
def test_an_app_for_this_machine_goes_by_its_own_names(host: str) -> None:
    for name in ("127.0.0.1:7860", "localhost:7860", "localhost", "[::1]:7860"):
        assert status(host, {"host": name}) == 200
    for name in ("example.com", "example.com:7860", "127.0.0.1.example.com", "192.168.1.2:7860", "", "127.0.0.1@a.com"):
        assert status(host, {"host": name}) == 403


@pytest.mark.parametrize("host", ["0.0.0.0", "192.168.1.2"])
def test_an_app_for_other_machines_goes_by_any_name(host: str) -> None:
    for name in ("127.0.0.1:7860", "192.168.1.2:7860", "me.hf.space"):
        assert status(host, {"host": name}) == 200


@pytest.mark.parametrize("host", ["127.0.0.1", "0.0.0.0"])
def test_only_the_apps_own_page_runs_things(host: str) -> None:
    name = {"host": "127.0.0.1:7860"}
    assert status(host, {**name, "origin": "http://127.0.0.1:7860"}) == 200
    for other in (
        "http://example.com",
        "null",
        "http://127.0.0.1:8000",
        "https://127.0.0.1.example.com:7860",
        "file://",
    ):
        assert status(host, {**name, "origin": other}) == 403


def test_a_port_that_is_taken_is_said() -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(OSError, match=f"port {port} is taken"):
            page.serve(Sources(), host="127.0.0.1", port=port, open_browser=False)


def test_how_the_page_is_launched() -> None:
    options = page.launch_options()
    assert options["share"] is False and options["max_file_size"] == "8mb"
    built = page.build()
    assert built.delete_cache == (page.KEPT, page.KEPT) and not built.analytics_enabled and not built.api_open
    public = [function.api_name for function in built.fns.values() if function.api_visibility == "public"]
    assert {"stop", *(name.lower() for name in page.TABS)} <= set(public) and len(public) == len(set(public))
    assert not [name for name in public if re.search(r"_\d+$", str(name))]  # no name was taken by something else


class Proxy:
    """A proxy that lets nothing through, and remembers who asked."""

    def __init__(self) -> None:
        self.asked: list[bytes] = []
        self.socket = socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self.socket.getsockname()[1]}"
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        while True:
            try:
                connection, _ = self.socket.accept()
            except OSError:
                return
            with connection:
                self.asked.append(connection.recv(200))


@pytest.fixture
def proxy(monkeypatch: pytest.MonkeyPatch) -> Iterator[Proxy]:
    made = Proxy()
    for name in ("HTTP_PROXY", "HTTPS_PROXY", "ALL_PROXY"):
        monkeypatch.setenv(name, made.url)
        monkeypatch.setenv(name.lower(), made.url)
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    monkeypatch.setenv("no_proxy", "127.0.0.1,localhost")
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")
    monkeypatch.setenv("GRADIO_ANALYTICS_ENABLED", "True")  # what a visitor's shell may say
    yield made
    made.socket.close()


@pytest.mark.browser
@pytest.mark.slow
def test_nobody_else_is_asked_and_ctrl_c_ends_a_run(tmp_path: Path, proxy: Proxy, serving: Any) -> None:
    with pytest.raises(httpx.HTTPError):
        httpx.get("http://example.com/")
    assert len(proxy.asked) == 1  # who asked would have been seen
    with serving(tmp_path / "log", "--no-hub") as app:
        client = Client(app.url, verbose=False)
        client.predict(**{**IMAGE, "steps": 1})
        with pytest.raises(AppError, match="owner/name cannot be opened here"):
            client.predict(**{**IMAGE, "model": "owner/name"})
        running = client.submit(**IMAGE)
        while not running.status().progress_data:
            time.sleep(0.05)
        app.process.send_signal(signal.SIGINT)
        assert app.process.wait(30) == 0
        assert "Traceback" not in app.log.read_text()
    assert len(proxy.asked) == 1


@pytest.mark.browser
def test_it_listens_on_this_machine_alone(served: Any) -> None:
    listening = [each for each in psutil.Process(served.process.pid).net_connections() if each.status == "LISTEN"]
    assert {each.laddr.ip for each in listening} == {"127.0.0.1"}
    assert "gradio.live" not in served.log.read_text()


@pytest.mark.browser
def test_a_request_of_another_site_runs_nothing(served: Any) -> None:
    body = {"data": [], "fn_index": 0, "session_hash": "x"}
    for headers in ({"origin": "http://example.com"}, {"origin": "null"}, {"host": "example.com"}):
        for path in ("queue/join", "run/stop", "call/image"):
            assert httpx.post(f"{served.url}/gradio_api/{path}", json=body, headers=headers).status_code == 403
        sent = httpx.post(f"{served.url}/gradio_api/upload", files={"files": b"x"}, headers=headers)
        assert sent.status_code == 403
    direct = httpx.post(f"{served.url}/gradio_api/run/image", json={"data": []})
    assert direct.status_code == 404 and "join the queue" in direct.text


@pytest.mark.browser
@pytest.mark.parametrize(
    "path",
    [
        *("/etc/passwd", "//etc/passwd", "/proc/self/environ", "pyproject.toml", "./pyproject.toml", "%2fetc%2fpasswd"),
        *("../../../../etc/passwd", "/tmp/gradio/../../etc/passwd", page.__file__, str(Path.home() / ".bashrc")),
        *("http://example.com/", "file:///etc/passwd"),
    ],
)
def test_no_file_of_the_host_is_shown(served: Any, path: str) -> None:
    answer = httpx.get(f"{served.url}/gradio_api/file={path}")
    assert answer.status_code in (403, 404)
    assert "root:" not in answer.text and "[project]" not in answer.text


@pytest.mark.browser
def test_uploads_are_limited_in_size_and_kind(served: Any, tmp_path: Path) -> None:
    large, text = tmp_path / "large.png", tmp_path / "text.png"
    large.write_bytes(bytes(8 * 2**20 + 1))
    text.write_text("no picture")
    with large.open("rb") as file:
        assert httpx.post(f"{served.url}/gradio_api/upload", files={"files": file}).status_code == 413
    client = Client(served.url, verbose=False)
    scene = {"scene": 0, "question": "Is there a red ball?", "max_new_tokens": 1, "api_name": "/vision"}
    for upload, words in (
        (handle_file(text), "picture"),
        ({"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}, "."),
    ):
        with pytest.raises(AppError, match=words) as error:
            client.predict(**scene, upload=upload)
        assert "root:" not in str(error.value) and "Traceback" not in str(error.value)
    client.close()


@pytest.mark.browser
@pytest.mark.parametrize("field", ["model", "saved"])
def test_paths_in_a_field_are_refused_in_the_same_words(served: Any, field: str) -> None:
    client, said = Client(served.url, verbose=False), set()
    for name in ("/etc", "/no/such/folder", "../..", "~", "%2e%2e%2f", "a\0b", "C:\\Windows"):
        with pytest.raises(AppError, match="cannot be opened here") as error:
            client.predict(**{**IMAGE, "steps": 1, field: name})
        said.add(str(error.value).partition("cannot be opened here")[2])
    client.close()
    assert len(said) == 1
