"""The page of the app: its tabs, its queue, and what keeps it safe."""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable
from typing import Any
from urllib.parse import urlsplit

import diffusers
import gradio as gr
import transformers
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.responses import PlainTextResponse
from starlette.types import ASGIApp, Receive, Scope, Send

from steer_demos.app import image, kernels, language, search, video, vision
from steer_demos.app.jobs import Jobs
from steer_demos.app.sharing import Shared, opened
from steer_demos.app.sources import Sources
from steer_demos.app.stage import Stage

TABS: dict[str, Callable[[Stage, Jobs], Shared]] = {
    "Image": image.tab,
    "Video": video.tab,
    "Language": language.tab,
    "Vision": vision.tab,
    "Kernels": kernels.tab,
    "Search": search.tab,
}
WAITING = 200  # requests that may wait, of which a page that opens makes about ten; the next is told that it is full
UPLOAD = "8mb"
KEPT = 3600  # seconds that pictures and clips are kept on disk
LOCAL = ("127.0.0.1", "localhost", "::1")  # names of this machine

# Fonts of the visitor's machine: the page asks no other host for anything.
THEME = gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]).set(
    # Gradio's own help text, buttons and placeholders are too faint to read for many: below a contrast of 4.5.
    body_text_color_subdued="*neutral_600",
    input_placeholder_color="*neutral_500",
    input_placeholder_color_dark="*neutral_400",
    color_accent="*primary_600",
    button_primary_background_fill="*primary_700",
    button_primary_background_fill_dark="*primary_700",
    button_primary_background_fill_hover="*primary_800",
    button_primary_background_fill_hover_dark="*primary_800",
    button_primary_border_color="*primary_700",
    button_primary_border_color_dark="*primary_700",
)
CSS = """
:focus-visible { outline: 2px solid var(--color-accent) !important; outline-offset: 1px; }
[role=tab][aria-selected=true] { color: var(--body-text-color) !important; font-weight: 600; }
.label-wrap { text-align: left; min-height: 24px; }
.icon-button-wrapper button { min-width: 24px; min-height: 24px; }
.cm-line span { filter: brightness(0.55); }
.dark .cm-line span { filter: brightness(1.3); }
.examples > button { flex: 0 1 auto; }
@media (max-width: 640px) {
  .tab-container button { padding: 0 6px; font-size: 14px; }
  .prose td, .prose th { padding: 6px 8px; white-space: normal !important; overflow-wrap: normal; word-break: normal; }
}
.docstring code { white-space: pre-wrap; }
.prose td:first-child { white-space: nowrap; }
.examples { align-items: center; }
.marked .textfield { display: block; word-break: normal; overflow-wrap: anywhere; }
.examples > .block { flex: 0 0 auto; width: auto; }
"""
# The arrow keys go from tab to tab, as elsewhere; Gradio's tabs know Tab and Enter.
ARROWS = """() => document.addEventListener("keydown", event => {
  const step = {ArrowLeft: -1, ArrowRight: 1}[event.key], list = event.target.closest("[role=tablist]");
  if (!step || !list) return;
  const tabs = [...list.querySelectorAll("[role=tab]")], next = tabs[tabs.indexOf(event.target) + step];
  if (next) { next.focus(); next.click(); }
})"""
TITLE = """# steer
Training-free attention methods, with and without, from the same seed. All of it runs on the machine of this page."""


def build(sources: Sources | None = None, jobs: Jobs | None = None) -> gr.Blocks:
    """The page, not yet served. `gradio_client` finds its functions under the names of the tabs, and /stop."""
    stage, jobs = Stage(sources or Sources()), jobs or Jobs()
    with gr.Blocks(title="steer", analytics_enabled=False, delete_cache=(KEPT, KEPT)) as page:
        gr.Markdown(TITLE)

        def stop(request: gr.Request) -> None:
            """Stop all that runs for this session."""
            jobs.stop(request)

        gr.api(stop, api_name="stop", queue=False)  # before the tabs, whose buttons would take the name
        page.unload(stop)
        with gr.Tabs() as tabs:
            shared = []
            for name, draw in TABS.items():
                with gr.Tab(name, id=name.lower()):
                    shared.append(draw(stage, jobs))
        everything: list[Any] = [tabs, *(output for each in shared for output in each.outputs)]

        def restore(request: gr.Request) -> list[Any]:
            return opened(shared, dict(request.query_params))

        # Through the queue, here and in `sharing`: without it, Gradio shows no warning, and an error as a fault.
        page.load(restore, None, everything, api_visibility="private", concurrency_limit=None)
    page.queue(max_size=WAITING, default_concurrency_limit=2, api_open=False)
    return page


def serve(sources: Sources, *, host: str, port: int | None, open_browser: bool) -> None:
    """Serve the page until Ctrl-C. What visitors upload is limited, and no file of the host is shown to them.

    Raises:
        OSError: the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    for library in (diffusers, transformers):
        library.utils.logging.disable_progress_bar()
    jobs = Jobs()
    page = build(sources, jobs)
    guard = {"middleware": [Middleware(OwnPageOnly, host=host)]}
    options = {"prevent_thread_lock": True, "quiet": True, "app_kwargs": guard, **launch_options()}
    try:
        page.launch(server_name=host, server_port=port, inbrowser=open_browser, **options)
    except OSError as error:
        at = f"port {port}" if port else "every port from 7860 to 7959"
        raise OSError(f"cannot listen at {host}: {at} is taken, or {host} is no address of this machine") from error
    print(f"The app is at {page.local_url} until Ctrl-C.")
    try:
        threading.Event().wait()
    except KeyboardInterrupt:
        print("Ctrl-C: the app ends.")
    finally:
        jobs.stop_all()
        logging.getLogger("uvicorn.error").setLevel(logging.CRITICAL)  # which open pages it cuts off is no error
        page.server.config.timeout_graceful_shutdown = 1  # second
        page.close(verbose=False)


def launch_options() -> dict[str, Any]:
    """How the page is launched, wherever it is."""
    return {
        "max_file_size": UPLOAD,
        "theme": THEME,
        "css": CSS,
        "js": ARROWS,
        "footer_links": ["api"],
        "share": False,
        "ssr_mode": False,
        "enable_monitoring": False,
        "run_history": False,  # what a visitor makes is not kept for the next one at that browser
    }


class OwnPageOnly:
    """Refuses what the pages of other sites send from a visitor's browser.

    Gradio keeps them from reading the answers; here nothing is run for them. An app for this machine alone is asked for
    by one of this machine's names: any other is one that a site made up to reach it (DNS rebinding).

    Args:
        app: what is guarded.
        host: address that the app listens at.
    """

    def __init__(self, app: ASGIApp, host: str) -> None:
        self._app, self._is_local = app, host in LOCAL

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refused = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else ""
        await (PlainTextResponse(refused, 403) if refused else self._app)(scope, receive, send)

    def _refusal(self, headers: Headers) -> str:
        host, origin = headers.get("host", ""), headers.get("origin")
        if self._is_local and urlsplit(f"//{host}").hostname not in LOCAL:
            return "This app is for its own machine: open it as http://127.0.0.1 with its port, or start it with --host"
        if origin is not None and urlsplit(origin).netloc != host:
            return "This request comes from the page of another site. A proxy has to pass on the Host that it was given"
        return ""
