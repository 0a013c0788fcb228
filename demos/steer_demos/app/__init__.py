"""`steer app`: a page on which every method can be seen at work."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def app(
    model: Annotated[
        list[str] | None, typer.Option(help="A folder or hub id to offer beside the embedded models; may be repeated.")
    ] = None,
    folder: Annotated[
        list[Path] | None,
        typer.Option(help="Visitors may open the models and saved methods below this folder; may be repeated."),
    ] = None,
    hub: Annotated[
        bool, typer.Option(help="Visitors may name models and saved methods on the Hugging Face Hub.")
    ] = True,
    host: Annotated[str, typer.Option(help="Address to listen at; 0.0.0.0 lets other machines in.")] = "127.0.0.1",
    port: Annotated[int | None, typer.Option(help="Default: the first free one from 7860.")] = None,
    open_browser: Annotated[bool, typer.Option("--open/--no-open", help="Open the page in a browser.")] = False,
) -> None:
    """Open a page that draws, answers and explains, with and without each method. Ends with Ctrl-C."""
    try:
        from steer_demos.app.page import serve
    except ImportError as error:  # gradio and what it needs are not installed with steer itself
        raise ImportError(f"{error}. The app needs more packages: pip install 'steer-attention[app]'") from None
    from steer_demos.app.sources import Sources

    sources = Sources(models=tuple(model or ()), folders=tuple(folder or ()), hub=hub)
    serve(sources, host=host, port=port, open_browser=open_browser)
