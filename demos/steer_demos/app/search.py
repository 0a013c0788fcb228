"""The tab of searches: what `steer.calibrate` found for a model, to look at. No model is loaded."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import gradio as gr

import steer
from steer.artifact import JSON, TENSORS, folder_of
from steer.method import Method
from steer_demos import models
from steer_demos.app import findings
from steer_demos.app.jobs import Job, Jobs, in_words
from steer_demos.app.sharing import Shared, connect
from steer_demos.app.sources import FITTED, Sources
from steer_demos.app.stage import Stage

UPLOADS = {".json": (JSON, 2_000_000), ".safetensors": (TENSORS, 8_000_000)}  # name, and bytes at most
CARD, LONGEST_CARD = "README.md", 20_000  # characters
EXAMPLES = {
    "Heads for colourful pictures": {"source": "fitted:emoji-mmdit/PAG"},
    "Patterns of a video model": {"source": "fitted:emoji-wan/SparseVDiT"},
    "Heads that copy text": {"source": "fitted:smollm2-135m-instruct/RetrievalHeads"},
}
STYLE = """
.wide { overflow-x: auto; }
table { width: auto; margin: 0.5em 0; font-size: 0.9em; }
caption { text-align: left; font-weight: 600; }
th, td { padding: 0.2em 0.6em; vertical-align: top; white-space: normal; overflow-wrap: break-word; }
"""
CHANGED = "what it says of its search cannot be read: it was changed, or written by another version"

Seen = tuple[str, list[findings.Captioned], str, str, str, str]


def choices() -> list[tuple[str, str]]:
    """What comes with the package: (what a visitor reads, name)."""
    return [(f"{method} for {model}", f"{FITTED}{model}/{method}") for model, method in models.list_fitted()]


def opened(sources: Sources, source: str) -> tuple[Method, str]:
    """A saved method by the name that a visitor gave, and the text of its card.

    Raises:
        OSError, ValueError: it cannot be opened, holds no method, or is damaged.
    """
    folder = folder_of(sources.open(source))
    card = folder / CARD
    text = card.read_text(encoding="utf-8", errors="replace")[:LONGEST_CARD] if card.is_file() else ""
    return steer.load(folder), text


def uploaded(files: Sequence[str]) -> Method:
    """A method from files that a visitor uploaded: copies of them, under the names that they have to have.

    Raises:
        ValueError: other files, too large ones, or damaged ones.
    """
    with TemporaryDirectory() as made:
        for file in map(Path, files):
            if file.suffix.lower() not in UPLOADS:
                raise ValueError(
                    f"{file.name} is not opened: a saved method is {JSON} and, with most, {TENSORS}. Pickles and "
                    "checkpoints may hold code; nothing of the kind is read here"
                )
            name, most = UPLOADS[file.suffix.lower()]
            copy = Path(made) / name
            if copy.exists():
                raise ValueError(f"there are two {file.suffix} files: give one {JSON} and one {TENSORS}")
            if file.stat().st_size > most:
                raise ValueError(f"{file.name} is larger than {most / 1e6:g} MB")
            shutil.copyfile(file, copy)
        if not (Path(made) / JSON).exists():
            raise ValueError(f"there is no {JSON} among the files: give it together with {TENSORS}")
        try:
            return steer.load(made)
        except (FileNotFoundError, ValueError) as error:
            raise ValueError(str(error).replace(f"{made}/", "")) from None
        except RecursionError:
            raise ValueError(f"{JSON} is nested too deeply to be read") from None


def seen(method: Method, name: str, card: str, job: Job) -> Seen:
    """Everything that the tab shows of a method.

    Args:
        name: what the visitor gave; empty for files that were uploaded.

    Raises:
        ValueError: what it holds cannot be drawn.
    """
    try:
        findings.check_size(method)
        pictures = findings.pictures(method, job)
        told = (findings.summary(method, name), pictures, findings.ranking(method), findings.provenance(method))
        return *told, card or "There is none.", findings.python(method, name)
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError) as error:
        raise ValueError(CHANGED) from error  # steer.load checks settings and tensors, not what a report says


def tab(stage: Stage, jobs: Jobs) -> Shared:
    """Draw the tab; its inputs, to be shared."""

    @in_words
    def search(
        source: str,
        files: list[str] | None,
        request: gr.Request,
        progress: gr.Progress = gr.Progress(),  # noqa: B008 (Gradio looks for it there)
    ) -> Seen:
        """Look at a saved method: one by its name, or the files of one, which go first.

        Returns: what it is, pictures, the best trials or heads, where it comes from, its card, and the code.
        """
        with jobs.running(request, progress) as job:
            job.step(0, findings.MOST_PICTURES, "reading")
            if files:
                return seen(uploaded(files), "", "", job)
            method, card = opened(stage.sources, source)
            return seen(method, source.strip(), card, job)

    examples = gr.Row(elem_classes="examples")
    with gr.Row():
        with gr.Column(scale=2, min_width=300):
            source = gr.Dropdown(
                choices(),
                value=choices()[0][1] if choices() else "",
                label="Saved method",
                info="Or type a hub id, or a folder that this app may open.",
                allow_custom_value=True,
            )
            files = gr.File(
                label="Or the files of one (steer.*)",
                file_count="multiple",
                file_types=list(UPLOADS),
                height=140,
            )
            with gr.Row():
                run = gr.Button("Show", variant="primary", scale=3)
                stop = gr.Button("Stop", scale=1, min_width=80)
            summary = gr.HTML(label="What it is", elem_id="search-summary", css_template=STYLE)
        with gr.Column(scale=3, min_width=300):
            pictures = gr.Gallery(
                label="What was found",
                preview=True,
                selected_index=0,
                object_fit="contain",
                height=560,
                format="png",
                interactive=False,
                buttons=["download", "fullscreen"],
            )
            ranking = gr.HTML(label="Best trials, or heads", elem_id="search-ranking", css_template=STYLE)
            with gr.Accordion("Where it comes from, its card, and how to use it in Python", open=False):
                provenance = gr.HTML(label="Where it comes from", css_template=STYLE)
                card = gr.Textbox(label="Its card", lines=1, max_lines=16, interactive=False)
                code = gr.Code(label="In Python", language="python", interactive=False)
            shared = Shared("search", {"source": source}, examples=EXAMPLES, uploads=[files])
            outputs = [summary, pictures, ranking, provenance, card, code]
            connect(shared, search, outputs, jobs, run=run, stop=stop, examples=examples, concurrency="search")
    return shared
