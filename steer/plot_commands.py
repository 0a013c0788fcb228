"""`steer plot`: masks, sinks, heads and maps as PNG."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console

import steer
from steer.opening import assignments, method_of, open_language, steering

plot_app = typer.Typer(no_args_is_help=True, help="Draw as PNG.")
console = Console()


@plot_app.command("mask")
def plot_mask(
    model: Annotated[str, typer.Argument(help="Name of a published model, e.g. hunyuanvideo.")],
    method: Annotated[str, typer.Argument(help="A sparse method, e.g. RadialAttention.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    layer: Annotated[str | None, typer.Option(help="Attention site; default: the method's first.")] = None,
    head: Annotated[int, typer.Option(help="Query head.", min=0)] = 0,
) -> None:
    """Draw the block mask of a sparse method: queries down, keys across, full blocks dark, partial ones lighter."""
    from steer.simulate import mask_of

    chosen = method_of(method, assignments("--set", settings or []))
    mask = mask_of(model, chosen, height=height, width=width, frames=frames, layer=layer)
    picture = mask.show(head=head)
    assert not isinstance(picture, str)
    picture.save(output)
    console.print(f"{mask!r} is in {output}", highlight=False, markup=False)


@plot_app.command("sinks")
def plot_sinks(
    model: Annotated[str, typer.Argument(help="A language model: embedded name, folder or hub id.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    measure: Annotated[
        str, typer.Option(help="first = mean attention on the first token; sinks = later ones.")
    ] = "first",
    alpha: Annotated[float, typer.Option(help="A sink receives more than alpha / tokens.")] = 5.0,
    text: Annotated[str | None, typer.Option(help="Default: a paragraph that comes with steer.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file in its place.")] = None,
    tokens: Annotated[int, typer.Option(help="Of the text, at most.", min=2)] = 256,
    method: Annotated[str | None, typer.Option(help="Draw the model with this method beside it.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="Or with the method in this folder.")] = None,
) -> None:
    """Draw the attention sinks of a language model: layers down, heads across."""
    from steer.attention_plots import draw_heads, sink_table

    steered = steering(method, settings, artifact)
    target, ids, _ = _read_text(model, text, file, tokens)
    tables = {"unsteered": sink_table(target, ids, measure, alpha)}
    if steered is not None:
        with steer.apply(target, steered):
            tables[type(steered).__name__] = sink_table(target, ids, measure, alpha)
    what = "attention on the first token" if measure == "first" else f"sinks after the first token, alpha {alpha:g}"
    draw_heads(tables, output, title=f"{model}, {ids.shape[1]} tokens", label=what)
    means = ", ".join(f"{name} {table.float().mean():.3g}" for name, table in tables.items())
    console.print(f"{what}, mean over heads: {means}; in {output}", highlight=False, markup=False)


@plot_app.command("heads")
def plot_heads(
    artifact: Annotated[Path, typer.Argument(help="Folder of a saved method.")],
    output: Annotated[Path, typer.Option(help="PNG file to write; of several tables, with the table's name added.")],
    table: Annotated[str | None, typer.Option(help="One of its tables; default: all.")] = None,
    log: Annotated[bool, typer.Option(help="Colours on a logarithmic scale.")] = False,
) -> None:
    """Draw what a saved method has for every layer and head: scores, gains of a search, chosen heads, windows."""
    from steer.attention_plots import draw_heads, head_tables
    from steer.calibration_plots import draw_round
    from steer.findings import findings_of

    method = steer.load(str(artifact))
    tables, found = head_tables(method), findings_of(method)
    if table is not None and table not in tables:
        raise ValueError(f"{artifact} has no table {table!r}; it has {', '.join(tables)}")
    chosen = tables if table is None else {table: tables[table]}
    for name, values in chosen.items():
        path = output if len(chosen) == 1 else output.with_stem(f"{output.stem}-{name}")
        if found is not None and name in found.gains:
            draw_round(found, found.gains[name], path)
        else:
            draw_heads({name: values}, path, title=type(method).__name__, log=log)
        console.print(f"{name}, {values.shape[0]} layers x {values.shape[1]} heads, is in {path}", highlight=False)


@plot_app.command("attention")
def plot_attention(
    model: Annotated[str, typer.Argument(help="A language model: embedded name, folder or hub id.")],
    output: Annotated[Path, typer.Option(help="PNG file to write.")],
    layer: Annotated[int, typer.Option(help="Number of the layer; negative ones count from the last.")] = 0,
    head: Annotated[int | None, typer.Option(help="Query head; default: the mean over all.")] = None,
    log: Annotated[bool, typer.Option(help="Colours on a logarithmic scale.")] = False,
    text: Annotated[str | None, typer.Option(help="Default: a paragraph that comes with steer.")] = None,
    file: Annotated[Path | None, typer.Option(help="A text file in its place.")] = None,
    tokens: Annotated[int, typer.Option(help="Of the text, at most.", min=2)] = 256,
    method: Annotated[str | None, typer.Option(help="Draw the model with this method.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="Or with the method in this folder.")] = None,
) -> None:
    """Draw an attention map of a language model: queries down, keys across; a short text is written beside it."""
    from steer.attention_plots import attention_map, draw_map

    steered = steering(method, settings, artifact)
    target, ids, names = _read_text(model, text, file, tokens)
    with steer.apply(target, steered) if steered is not None else contextlib.nullcontext():
        weights = attention_map(target, ids, layer, head)
    which = "mean over heads" if head is None else f"head {head}"
    draw_map(weights, output, names, title=f"{model}, layer {layer}, {which}", log=log)
    console.print(f"{ids.shape[1]} tokens, {which} of layer {layer}, in {output}", highlight=False, markup=False)


def _read_text(name: str, text: str | None, file: Path | None, tokens: int) -> tuple[Any, torch.Tensor, list[str]]:
    """A language model, the first tokens of a text (1, S), and each of them as text."""
    from steer.attention_plots import TEXT

    if text is not None and file is not None:
        raise ValueError("give --text or --file, not both")
    text = text if text is not None else file.read_text() if file is not None else TEXT
    model, tokenizer = open_language(name)
    ids = tokenizer(text).input_ids[:tokens]
    return model, torch.tensor([ids], device=model.device), [tokenizer.decode([token]) for token in ids]
