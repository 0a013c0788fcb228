"""What a saved method holds, as pictures, tables and code. Anyone may have written it, so nothing in it is trusted."""

from __future__ import annotations

import html
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from urllib.parse import urlencode

import numpy as np
import torch
from matplotlib.figure import Figure
from PIL import Image

from steer.attention_plots import draw_heads, head_tables
from steer.calibration_plots import draw_best, draw_progress, draw_round, draw_sweeps, draw_table
from steer.findings import findings_of, python_line
from steer.fingerprint import made_for
from steer.method import Method
from steer.plan import Plan
from steer.provenance import best_trials, notes, sections
from steer_demos import models
from steer_demos.app.jobs import Job
from steer_demos.app.sources import FITTED, source_in_python

Captioned = tuple[Image.Image, str]

TRIED_IN = {
    "emoji-mmdit": "image",
    "emoji-unet": "image",
    "emoji-wan": "video",
    "emoji-vlm": "vision",
    "smollm2-135m-instruct": "language",
}  # embedded model -> the tab that shows what a method does to it
MOST_NUMBERS = 2_000_000  # in one table
MOST_PICTURES = 12
MOST_GROUPS = 8  # of steps
ALL_HEADS = "heads"  # what `head_tables` calls the heads of the settings, which are no figures
HIGHEST = 5  # heads that are named of each table
MOST_ROWS, MOST_TEXT = 60, 600  # of a table, and characters of a cell
OWN_SEARCH = (
    "Found by the method's own search, which looks inside the model while the data runs: there is no objective, and no "
    "trials are scored."
)
NEUTRAL = "With these settings it changes nothing."
NOT_SEARCHED = "Not found by a search: these are settings that somebody chose."


def check_size(method: Method) -> None:
    """Refuse what would take long or much memory to draw.

    Raises:
        ValueError: it is too large.
    """
    plan = method.record
    if plan is None:
        return
    for name, tensor in plan.tensors.items():
        if tensor.numel() > MOST_NUMBERS:
            raise ValueError(f"the table {name} has {tensor.numel()} numbers; at most {MOST_NUMBERS} are drawn here")
    if len(plan.starts) > MOST_GROUPS:
        raise ValueError(f"this plan has {len(plan.starts)} groups of steps; at most {MOST_GROUPS} are drawn here")


def pictures(method: Method, job: Job) -> list[Captioned]:
    """Every table of layers and heads that a method holds, and the trials of a search, with what each shows."""
    found: list[Captioned] = []
    with TemporaryDirectory() as made:
        for caption, file in _drawn(method, Path(made)):
            job.step(len(found), MOST_PICTURES, "drawing")
            with Image.open(file) as picture:
                found.append((picture.convert("RGB"), caption))
            if len(found) == MOST_PICTURES:
                break
    return found


def _drawn(method: Method, folder: Path) -> Iterator[tuple[str, Path]]:
    file = folder / "picture.png"
    found = findings_of(method)
    if found is None:
        yield from _tables(method, file)
        return
    for number, table in found.rounds.items():
        if not bool(table.isnan().all()):
            draw_round(found, number, file)
            yield f"Round {number}: gain of every head over no method", file
    if found.strategy == "Sweep" and found.sweeps():
        draw_sweeps(found, file)
        yield "Gain of every value of each field", file
    draw_best(found, file)
    yield "Gain of the best trials, with 95 % intervals", file
    draw_progress(found, file)
    yield "Score of every trial, in the order of the search", file


def _tables(method: Method, file: Path) -> Iterator[tuple[str, Path]]:
    """What a method's own search found: choices with their names, figures of heads, and tables of other shapes."""
    plan = method.record
    names = plan.report.get("names", {}) if plan is not None else {}
    if plan is not None:
        for name in names:
            draw_table(plan, plan.tensors[name], names[name], file)
            yield f"{name}: what each head was given", file
    for name, table in _of_heads(method).items():
        is_shown = name.partition(",")[0] in names or (name == ALL_HEADS and names)
        if not is_shown:
            draw_heads({name: table}, file, title=type(method).__name__)
            yield f"{name} of every layer and head", file
    if plan is not None:
        yield from _others(plan, file)


def _of_heads(method: Method) -> dict[str, torch.Tensor]:
    """The tables (L, H) of a method; none where it has none."""
    try:
        return head_tables(method)
    except ValueError:
        return {}


def _others(plan: Plan, file: Path) -> Iterator[tuple[str, Path]]:
    """Tables of layers and something else than heads, and the blocks that each head keeps."""
    for name, tensor in plan.tensors.items():
        if tensor.ndim == 2 and len(tensor) == len(plan.sites) and tensor.shape[1] != plan.heads:
            draw_rows(name, tensor, file)
            yield f"{name}: layers down, columns of the table across", file
        if _is_blocks(plan, tensor):
            for start, group in zip(plan.starts, tensor, strict=True):
                draw_blocks(group, file)
                yield f"{name}: what each head keeps (black), from {start:.0%} of the run", file


def _is_blocks(plan: Plan, tensor: torch.Tensor) -> bool:
    square = tensor.ndim == 5 and tensor.shape[-1] == tensor.shape[-2]
    return square and tensor.dtype == torch.bool and tensor.shape[:3] == (len(plan.starts), len(plan.sites), plan.heads)


def draw_rows(name: str, table: torch.Tensor, file: Path) -> None:
    """A table (L, n) of figures that are not of heads, such as a histogram for each layer."""
    figure = Figure(figsize=(6.0, 4.5), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(table.float().numpy(), aspect="auto", interpolation="nearest")
    axes.set(title=name, xlabel="column", ylabel="layer")
    figure.colorbar(image, ax=axes)
    figure.savefig(file, dpi=130)


def draw_blocks(blocks: torch.Tensor, file: Path, size: int = 72) -> None:
    """Block masks (L, H, n, n) as squares of about `size` pixels, layers down and heads across; kept ones are black."""
    layers, heads, n, _ = blocks.shape
    cell = max(1, size // n) * n
    picture = Image.new("L", (heads * (cell + 6) + 6, layers * (cell + 6) + 6), 200)
    for layer in range(layers):
        for head in range(heads):
            mask = Image.fromarray(np.where(blocks[layer, head].numpy(), 0, 255).astype(np.uint8))
            at = (6 + head * (cell + 6), 6 + layer * (cell + 6))
            picture.paste(mask.resize((cell, cell), Image.Resampling.NEAREST), at)
    picture.save(file)


def summary(method: Method, name: str) -> str:
    """What it is and how sure its figures are, as HTML."""
    parts = [f"<h3>{_text(type(method).__name__)}</h3>"]
    parts += [f"<p>{_text((type(method).__doc__ or '').strip().splitlines()[0])}</p>"]
    parts += [f"<p>Made for {_text(_classes(method))}.</p>"] if made_for(method) else []
    said = notes(method) or [OWN_SEARCH if method.record is not None else NOT_SEARCHED]
    said += [NEUTRAL] if method.is_neutral() else []
    parts += [f"<p>{_text(note)}</p>" for note in said]
    chosen, figures = _chosen(method), _figures(method)
    header = ("site", "head", "round") if chosen and len(chosen[0]) == 3 else ("site", "heads")
    parts += [table("Chosen heads", header, chosen)] if chosen else []
    parts += [table("Figures", ("", ""), figures)] if figures else []
    return "\n".join(parts) + try_it(name, method)


def _chosen(method: Method) -> list[tuple[str, ...]]:
    """The heads that a search chose, in its order, each with its round; without rounds, those of each site."""
    found = findings_of(method)
    if found is not None and found.chosen:
        return [(site, str(head), str(number or "")) for (site, head), number in found.chosen]
    given = method.heads if isinstance(method.heads, Mapping) else {}
    return [(site, ", ".join(map(str, heads))) for site, heads in given.items()]


def _figures(method: Method) -> list[tuple[str, str]]:
    """The figures of `steer show`, those with parts in a row for each, and without those of the best trial."""
    rows: list[tuple[str, str]] = []
    given = method.record.report.get("figures", {}) if method.record is not None else {}
    for name, text in sections(method).get("Figures", []):
        if isinstance(given.get(name), Mapping):
            rows += [(f"{name}, {part}", f"{value:.4g}") for part, value in given[name].items()]
        elif not name.startswith("best gain"):
            rows.append((name, text))
    return rows


def ranking(method: Method) -> str:
    """The best trials of a search, or the heads with the highest figures of a method's own search, as HTML."""
    if rows := best_trials(method):
        return table("Best trials", ("settings", "score", "gain [95 %]"), rows)
    plan = method.record
    parts = []
    for name, values in _of_heads(method).items():
        if plan is not None and name != ALL_HEADS and values.is_floating_point():
            top = values.flatten().nan_to_num(-math.inf).topk(min(HIGHEST, values.numel()))
            places = [divmod(place, plan.heads) for place in top.indices.tolist()]
            highest = [
                (plan.sites[layer], str(head), f"{value:.3g}")
                for (layer, head), value in zip(places, top.values.tolist(), strict=True)
            ]
            parts.append(table(f"Highest {name}", ("site", "head", name), highest))
    return "\n".join(parts)


def provenance(method: Method) -> str:
    """Settings, model, search: all that `steer show` prints, as HTML."""
    return "\n".join(table(title, ("", ""), rows) for title, rows in sections(method).items())


def table(title: str, header: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """A table of text, none of which is markup."""
    head = "".join(f'<th scope="col">{_text(name)}</th>' for name in header)
    lines = ["<tr>" + "".join(f"<td>{_text(cell)}</td>" for cell in row) + "</tr>" for row in rows[:MOST_ROWS]]
    more = f"<p>and {len(rows) - MOST_ROWS} more</p>" if len(rows) > MOST_ROWS else ""
    top = f"<thead><tr>{head}</tr></thead>" if any(header) else ""
    body = "".join(lines)
    return f'<div class="wide"><table><caption>{_text(title)}</caption>{top}<tbody>{body}</tbody></table></div>{more}'


def _text(value: str) -> str:
    short = value if len(value) <= MOST_TEXT else value[:MOST_TEXT] + " …"
    return html.escape(short).replace("\n", "<br>")


def _classes(method: Method) -> str:
    """The classes of the models that it was made for."""
    return ", ".join(model["class"] for model in (made_for(method) or {}).values())


def try_it(name: str, method: Method) -> str:
    """A link to the tab in which a method that comes with the package is seen at work; empty for others."""
    model = embedded(name)
    if not model:
        return ""
    tab = TRIED_IN[model]
    settings = {"model": model, "method": type(method).__name__, "settings": {}, "saved": name}
    query = urlencode({"tab": tab, "settings": json.dumps(settings)})
    return f'<p><a href="?{html.escape(query)}">Try it in the {tab.capitalize()} tab</a></p>'


def embedded(name: str) -> str:
    """The embedded model that "fitted:MODEL/METHOD" names; empty for other names."""
    model = name.removeprefix(FITTED).partition("/")[0] if name.startswith(FITTED) else ""
    return model if model in TRIED_IN else ""


def python(method: Method, name: str) -> str:
    """Code that uses it.

    Args:
        name: what the visitor gave; empty for files that were uploaded.
    """
    model = embedded(name)
    source = source_in_python(name or "FOLDER")
    lines = ["import steer"]
    lines += ["from steer_demos import models"] if model else []
    lines += ["", f"method = steer.load({source})" + ("" if name else "  # the folder of the two files")]
    if (line := python_line(method)) is not None:
        lines += [f"# the same settings: {line}"]
    if not model:
        lines += [f"with steer.apply(model, method):  # {_classes(method) or 'a model that it suits'}", "    ..."]
    elif TRIED_IN[model] in ("image", "video"):
        options = "".join(f", {key}={value!r}" for key, value in models.call_options(model).items())
        lines += [f"pipe = models.load({model!r})", "with steer.apply(pipe, method):"]
        lines += [f'    out = pipe("a red apple"{options})']
    else:
        lines += [f"model, processor = models.load({model!r})", "with steer.apply(model, method):"]
        lines += ["    output = model.generate(**inputs, max_new_tokens=40)  # what the processor made of a prompt"]
    return "\n".join(lines) + "\n"
