"""The card of a method on the Hub: what it is, the lines that apply it, what it was made from."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from pathlib import Path

from huggingface_hub import ModelCardData

from steer.findings import python_line
from steer.fingerprint import made_for
from steer.method import Method
from steer.provenance import best_trials, notes, sections


def write(method: Method, repo_id: str, folder: Path) -> None:
    """Write `README.md` into the folder, and for a fitted method its report with pictures if matplotlib is there.

    Args:
        method: what the repository holds.
        repo_id: "owner/name" of the repository.
        folder: of what is uploaded.
    """
    if method.record is not None and importlib.util.find_spec("matplotlib") is not None:
        from steer.calibration_report import write as write_report

        write_report(method, folder)
    pictures = [file.name for file in sorted(folder.glob("*.png"))]
    text = card(method, repo_id, pictures, has_report=(folder / "report.md").is_file())
    (folder / "README.md").write_text(text, encoding="utf-8")


def card(method: Method, repo_id: str, pictures: Sequence[str] = (), has_report: bool = False) -> str:
    """The text of `README.md`, with its metadata.

    Args:
        method, repo_id: as in `write`.
        pictures: names of the files beside it to show.
        has_report: whether there is a `report.md` beside it.
    """
    name = type(method).__name__
    models = list((made_for(method) or {}).values())
    known = sorted({model["id"] for model in models if model.get("id")})
    data = ModelCardData(
        library_name="steer",
        tags=["steer", "training-free", name],
        base_model=known[0] if len(known) == 1 else known or None,
    )
    target = "model" if "" in (made_for(method) or {}) else "pipe"
    classes = " and ".join(sorted({model["class"] for model in models}))
    what = (type(method).__doc__ or name).strip().splitlines()[0]
    made = "found by a search" if method.record is not None else "chosen by hand"
    parts = [
        f"---\n{data.to_yaml()}\n---",
        f"# {name}" + (f" for {classes}" if classes else ""),
        f"Settings of {name}, a training-free attention method of steer, {made}: no weights, and no code. {what}",
        _python(
            "import steer",
            f'method = steer.load("{repo_id}")  # revision="..." pins a commit',
            f"handle = steer.apply({target}, method)  # handle.remove() gives the model back as it was",
        ),
    ]
    if (line := python_line(method)) is not None:
        parts += ["The same settings, without a download:", _python(f"method = {line}")]
    for title, rows in sections(method).items():
        parts += [f"## {title}", _table(("", ""), rows)]
    if trials := best_trials(method):
        parts += ["## Best trials", _table(("settings", "score", "gain [95 %]"), trials), *notes(method)]
    parts += [f"![{picture.removesuffix('.png')}]({picture})" for picture in pictures]
    parts += ["More of the search: [report.md](report.md)."] if has_report else []
    return "\n\n".join(parts) + "\n"


def _python(*lines: str) -> str:
    return "\n".join(["```python", *lines, "```"])


def _table(header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    cells = [[cell.replace("|", r"\|").replace("\n", "<br>") for cell in row] for row in rows]
    return "\n".join("| " + " | ".join(row) + " |" for row in [header, ["---"] * len(header), *cells])
