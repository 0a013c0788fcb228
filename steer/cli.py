"""The `steer` command. Packages add commands through the entry-point group `steer.commands`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Sequence
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import diffusers
import torch
import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table

import steer
from steer.bind import unfit
from steer.method import Method
from steer.sparse import Sparse
from steer_patches.family import FAMILIES, Family

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Training-free attention methods for HF models.")
bench_app = typer.Typer(no_args_is_help=True, help="Measure; every ratio comes with its error.")
app.add_typer(bench_app, name="bench")
plot_app = typer.Typer(no_args_is_help=True, help="Draw as PNG.")
app.add_typer(plot_app, name="plot")
console = Console()


@app.command()
def doctor() -> None:
    """Say what runs on this machine, and why the rest does not."""
    report = steer.doctor()
    for check in report.checks:
        mark = "[green]ok[/]" if check.ok else "[yellow]no[/]"
        console.print(f"{mark}  {check.name}: {check.detail}", highlight=False)
    raise typer.Exit(0 if report.ok else 1)


@app.command()
def methods(markdown: Annotated[bool, typer.Option(help="Print the README's table.")] = False) -> None:
    """List the methods, and the model families that each works on."""
    if markdown:
        print(methods_table_markdown())
        return
    table = Table("method", "what it does", "families")
    for name, method in steer.methods().items():
        families = [family.name for family in FAMILIES if _works_on(method, family)]
        table.add_row(name, (method.__doc__ or "").strip().splitlines()[0], ", ".join(families))
    console.print(table)


def methods_table_markdown() -> str:
    """Methods x model families, from the registry: a table each of guidance, sparse attention and language models."""
    groups: dict[str, list[type[Method]]] = {"guidance": [], "sparse": [], "language": []}
    for method in steer.methods().values():
        kind = "language" if method.kinds == ("causal",) else "sparse" if issubclass(method, Sparse) else "guidance"
        groups[kind].append(method)
    return "\n\n".join(_table(group) for group in groups.values() if group)


def _table(methods: list[type[Method]]) -> str:
    rows = ["| family | " + " | ".join(m.__name__ for m in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for family in sorted(FAMILIES, key=lambda f: f.name.lower()):
        if any(_works_on(method, family) for method in methods):
            rows.append(f"| {family.name} | " + " | ".join(_cell(method, family) for method in methods) + " |")
    return "\n".join(rows)


def _works_on(method: type[Method], family: Family) -> bool:
    if getattr(method, "skips_blocks", False):
        return any(stage.returns for stage in family.stages)
    return unfit(method, family) is None and any(kind in method.kinds for kind in family.kinds.values())


def _cell(method: type[Method], family: Family) -> str:
    if not _works_on(method, family):
        return "–"
    preset = family.preset(method.__name__)
    if preset is not None:
        return f"`{preset.settings['layers']}`" if "layers" in preset.settings else "published"
    return getattr(method, "without_preset", "give `layers=`")


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="Embedded model name, local folder, hub id, or diffusers class name.")],
    every: Annotated[bool, typer.Option("--all", help="A row for every site, not for each group.")] = False,
) -> None:
    """Print a model's attention sites as a table."""
    found = steer.sites(_open(model))
    groups: dict[tuple[str, ...], list[str]] = {}
    for site in found:
        heads = str(site.heads) if site.kv_heads == site.heads else f"{site.heads}/{site.kv_heads}"
        ports = f" ({site.ports} ports)" if site.ports > 1 else ""
        note = f" [yellow]cannot be hooked: {site.refusal}[/]" if site.refusal else ports
        shape = site.name if every else re.sub(r"\.\d+(?=\.|$)", ".*", site.name)
        key = (shape, site.kind, f"{heads} x {site.head_dim}", site.processor + note)
        groups.setdefault(key, []).append(site.name)
    table = Table("n", "kind", "heads", "processor", "sites", box=box.SIMPLE, title=f"{model}: {len(found)} sites")
    for column in table.columns:
        column.overflow = "fold"
    for (shape, kind, heads, processor), names in groups.items():
        table.add_row(str(len(names)), kind, heads, processor, names[0] if len(names) == 1 else shape)
    console.print(table)


def _open(name: str) -> Any:
    """A pipeline or model by embedded name, folder or hub id; a class name gives its default shape without weights."""
    cls = getattr(diffusers, name, None)
    if isinstance(cls, type) and issubclass(cls, diffusers.ModelMixin):
        with torch.device("meta"):
            return cls()
    for entry in entry_points(group="steer.loaders"):
        loaded = entry.load()(name)
        return loaded[0] if isinstance(loaded, tuple) else loaded
    return diffusers.DiffusionPipeline.from_pretrained(name)


@app.command()
def calibrate(
    model: Annotated[str, typer.Argument(help="Embedded model name, local folder or hub id of a pipeline.")],
    method: Annotated[str, typer.Argument(help="A method with a search, e.g. SparseVDiT.")],
    output: Annotated[Path, typer.Option(help="Folder for the fitted method; steer.load reads it.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of the data; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", help="key=value: a field of the method, or an option of its search.")
    ] = None,
    call: Annotated[list[str] | None, typer.Option(help="key=value: an argument of the pipeline.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample; the others count up.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to save the search in, and to resume from.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a table and a picture of layers and heads.")] = None,
) -> None:
    """Fit a searched method to a pipeline and some prompts."""
    known = steer.methods()
    if method not in known:
        raise ValueError(f"there is no method {method}; there are {', '.join(known)}")
    lines = prompts.read_text().splitlines() if prompts else []
    texts = [*(prompt or []), *(line.strip() for line in lines if line.strip())]
    if not texts:
        raise ValueError("give prompts to calibrate on: --prompt TEXT, or --prompts FILE with one on each line")
    given = _assignments("--set", settings or [])
    names = {field.name for field in dataclasses.fields(known[method])}
    chosen = known[method](**{key: value for key, value in given.items() if key in names})
    options = {key: value for key, value in given.items() if key not in names}
    arguments = _assignments("--call", call or [])
    pipe = _open(model)
    fitted = steer.calibrate(
        pipe,
        chosen,
        [{**arguments, "prompt": text} for text in texts],
        seed=seed,
        checkpoint=checkpoint,
        report=report,
        **options,
    )
    fitted.save(str(output))
    console.print(f"{fitted.describe()} is in {output}", highlight=False, markup=False)


def _assignments(option: str, given: Sequence[str]) -> dict[str, Any]:
    """`key=value` pairs; values are JSON, or text where they are none."""
    pairs = {}
    for text in given:
        key, equals, value = text.partition("=")
        if not equals or not key:
            raise ValueError(f"{option} {text!r} is not understood; write {option} key=value")
        try:
            pairs[key] = json.loads(value)
        except json.JSONDecodeError:
            pairs[key] = value
    return pairs


@app.command()
def simulate(
    model: Annotated[str, typer.Argument(help="Name of a published model, e.g. hunyuanvideo.")],
    method: Annotated[str, typer.Argument(help="A sparse method, e.g. RadialAttention.")],
    height: Annotated[int | None, typer.Option(help="Pixels; default: the model's.")] = None,
    width: Annotated[int | None, typer.Option(help="Pixels.")] = None,
    frames: Annotated[int | None, typer.Option(help="Frames of the video.")] = None,
    steps: Annotated[int | None, typer.Option(help="Of a run.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    density: Annotated[float | None, typer.Option(help="Instead of what the method's masks give.")] = None,
    attention_share: Annotated[
        float | None, typer.Option(help="Of the time of a dense step; default: of its FLOPs.")
    ] = None,
    efficiency: Annotated[float, typer.Option(help="FLOPs a second of the sparse kernel over the dense one's.")] = 1.0,
    output: Annotated[Path | None, typer.Option("--json", help="Also write the figures to this file.")] = None,
) -> None:
    """Say what a sparse method can gain on a model: density, FLOPs and bounds. Needs no weights."""
    from steer.simulate import simulate

    found = simulate(
        model,
        _sparse(method, settings),
        height=height,
        width=width,
        frames=frames,
        steps=steps,
        density=density,
        attention_share=attention_share,
        efficiency=efficiency,
    )
    console.print(str(found), highlight=False, markup=False, soft_wrap=True)
    if output is not None:
        output.write_text(json.dumps(found.to_dict(), indent=2) + "\n")


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

    mask = mask_of(model, _sparse(method, settings), height=height, width=width, frames=frames, layer=layer)
    picture = mask.show(head=head)
    assert not isinstance(picture, str)
    picture.save(output)
    console.print(f"{mask!r} is in {output}", highlight=False, markup=False)


def _sparse(name: str, settings: Sequence[str] | None) -> Any:
    """A method by name with the fields of `--set`."""
    known = steer.methods()
    if name not in known:
        raise ValueError(f"there is no method {name}; there are {', '.join(known)}")
    given, names = _assignments("--set", settings or []), [field.name for field in dataclasses.fields(known[name])]
    for key in given:
        if key not in names:
            raise ValueError(f"{name} has no field {key!r}; it has {', '.join(names)}")
    try:
        return known[name](**given)
    except TypeError as error:
        values = ", ".join(f"{key}={value!r}" for key, value in given.items())
        raise ValueError(f"{name} cannot take {values}: {error}") from None


@bench_app.command("guidance")
def bench_guidance(
    layers: Annotated[str, typer.Option(help="Perturbed blocks of the 24-block SD3, comma separated.")] = "7,13,18",
    repeats: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    small: Annotated[bool, typer.Option(help="A tiny setting that shows the mechanics, not the speed.")] = False,
    output: Annotated[str | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Seconds of guidance with and without prefix sharing, beside diffusers' PAG pipelines."""
    from steer.bench_guidance import run

    run(
        [int(n) for n in layers.split(",")], repeats=repeats, device=device, small=small, output=output, console=console
    )


@bench_app.command("kernels")
def bench_kernels(
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    repeats: Annotated[int, typer.Option(help="Timed runs of each; the median counts.", min=1)] = 7,
    only: Annotated[str | None, typer.Option(help="Only the cases whose name contains this.")] = None,
    small: Annotated[bool, typer.Option(help="A tiny setting that shows the mechanics, not the speed.")] = False,
    output: Annotated[str | None, typer.Option(help="Also write the figures as JSON.")] = None,
    plot: Annotated[str | None, typer.Option(help="Also draw speed against density, as PNG.")] = None,
    tune: Annotated[
        str | None,
        typer.Option(help="Instead: try launch settings on this GPU, write the table to this file or folder."),
    ] = None,
) -> None:
    """Sparse attention beside the best dense attention and compiled FlexAttention, at the shapes of known models."""
    from steer import bench_kernels, tune_kernels

    if tune:
        tune_kernels.tune(tune, repeats, console)
        return
    bench_kernels.run(device=device, repeats=repeats, small=small, only=only, output=output, plot=plot, console=console)


def main() -> None:
    """Entry point of the `steer` script."""
    for library in (diffusers, transformers):
        library.utils.logging.set_verbosity_error()
    for entry in sorted(entry_points(group="steer.commands"), key=lambda e: e.name):
        try:
            command = entry.load()
        except ImportError as error:  # a demo's optional dependency is missing: the other commands still work
            print(f"steer {entry.name} is not available: {error}", file=sys.stderr)
            continue
        if isinstance(command, typer.Typer):
            app.add_typer(command, name=entry.name)
        else:
            app.command(entry.name)(command)
    try:
        app()
    except (ValueError, TypeError, OSError, ImportError) as error:
        console.print(f"[red]error:[/] {error}", highlight=False)
        raise SystemExit(2) from None


if __name__ == "__main__":
    main()
