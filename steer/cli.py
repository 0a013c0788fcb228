"""The `steer` command. Packages add commands through the entry-point group `steer.commands`."""

from __future__ import annotations

import dataclasses
import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import entry_points
from pathlib import Path
from typing import Annotated, Any

import diffusers
import transformers
import typer
from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

import steer
from steer import method_table
from steer.bench_commands import bench_app
from steer.opening import assignments, call_options, method_of, open_language, open_model
from steer.plot_commands import plot_app
from steer_patches.family import FAMILIES

app = typer.Typer(no_args_is_help=True, add_completion=False, help="Training-free attention methods for HF models.")
app.add_typer(bench_app, name="bench")
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
        print(method_table.markdown())
        return
    table = Table("method", "what it does", "families")
    for name, method in steer.methods().items():
        families = [family.name for family in FAMILIES if method_table.works_on(method, family)]
        table.add_row(name, (method.__doc__ or "").strip().splitlines()[0], ", ".join(families))
    console.print(table)


@app.command()
def presets(
    method: Annotated[str | None, typer.Argument(help="A method, e.g. PAG; default: all.")] = None,
    source: Annotated[bool, typer.Option("--source", help="Also where each comes from and how sure it is.")] = False,
) -> None:
    """List published settings that a method takes by name: `steer.PAG(preset="sd3-sunlight")`."""
    known = steer.presets(method)
    if not known:
        able = ", ".join(dict.fromkeys(each.method for each in steer.presets()))
        raise ValueError(f"there are no named settings of {method}; there are some of {able}")
    table = Table("preset", "for", "source" if source else "settings", box=box.SIMPLE, show_lines=True)
    for each in known:
        settings = "\n".join(_setting(key, value) for key, value in each.settings.items())
        table.add_row(each.name, f"{each.method}\n{each.family}", each.source if source else settings)
    console.print(table, highlight=False, markup=False)


def _setting(name: str, value: Any) -> str:
    """One field in few characters; of heads, each layer with its heads."""
    if name == "heads" and isinstance(value, Mapping):
        heads = [f"{layer.removesuffix('.attn')}: {', '.join(map(str, some))}" for layer, some in value.items()]
        return "heads " + "; ".join(heads)
    return f"{name}={value!r}"


@app.command()
def sites(
    model: Annotated[str, typer.Argument(help="Embedded model name, local folder, hub id, or diffusers class name.")],
    every: Annotated[bool, typer.Option("--all", help="A row for every site, not for each group.")] = False,
) -> None:
    """Print a model's attention sites as a table."""
    found = steer.sites(open_model(model))
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


@app.command()
def calibrate(
    model: Annotated[
        str, typer.Argument(help="Embedded model name, local folder or hub id of a pipeline or language model.")
    ],
    method: Annotated[
        str, typer.Argument(help="A method with a search, e.g. SparseVDiT; with --objective any method, e.g. PAG.")
    ],
    output: Annotated[Path, typer.Option(help="Folder for the fitted method; steer.load reads it.")],
    prompt: Annotated[list[str] | None, typer.Option(help="A prompt of the data; may be repeated.")] = None,
    prompts: Annotated[Path | None, typer.Option(help="A text file with a prompt on each line.")] = None,
    data: Annotated[
        Path | None, typer.Option(help="For a language model: JSON Lines of samples, see steer.text_samples.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            help="key=value, values in JSON: a field of the method, or an option of its search or of --strategy, e.g. "
            'rounds=2, top=3, space={"scale": [1, 2, 3]}; a range for optuna is {"scale": {"low": 1.0, "high": 6.0}}, '
            "of whole numbers if both are whole.",
        ),
    ] = None,
    call: Annotated[list[str] | None, typer.Option(help="key=value: an argument of the pipeline.")] = None,
    seed: Annotated[int, typer.Option(help="Of the first sample; the others count up.")] = 0,
    checkpoint: Annotated[Path | None, typer.Option(help="Folder to save the search in, and to resume from.")] = None,
    report: Annotated[Path | None, typer.Option(help="Folder for a table and a picture of layers and heads.")] = None,
    objective: Annotated[
        str | None,
        typer.Option(
            help="What to look for, higher is better: sharpness, -brightness, clip:FOLDER, MODULE:FUNCTION, "
            "FILE.py:FUNCTION, ...; any other word lists them."
        ),
    ] = None,
    strategy: Annotated[
        str | None, typer.Option(help="What is tried: headhunter (default), sweep, random or optuna.")
    ] = None,
    trials: Annotated[int | None, typer.Option(help="Settings to try at most.", min=1)] = None,
    seconds: Annotated[float | None, typer.Option(help="The search ends with what it found by then.")] = None,
    batch: Annotated[
        int | None, typer.Option(help="Trials of heads drawn at once; default: the heads of a layer.", min=1)
    ] = None,
) -> None:
    """Fit a method to a pipeline and prompts, or to a language model: by a search of its own, or for an objective."""
    from steer import objectives, search_options
    from steer.calibrate import check_folder

    known = steer.methods()
    if method not in known:
        raise ValueError(f"there is no method {method}; there are {', '.join(known)}")
    check_folder("output", output)
    lines = prompts.read_text().splitlines() if prompts else []
    texts = [*(prompt or []), *(line.strip() for line in lines if line.strip())]
    if bool(texts) == (data is not None):
        raise ValueError(
            "give what to calibrate on: --prompt TEXT, or --prompts FILE with one on each line, for a pipeline; --data "
            "FILE with a JSON object on each line for a language model"
        )
    given = assignments("--set", settings or [])
    options: dict[str, Any]
    if objective is not None:
        fields, tried = search_options.split(known[method], strategy or "headhunter", given)
        options = {"objective": objectives.objective(objective), "strategy": tried, "batch": batch}
    elif strategy is not None or batch is not None:
        raise ValueError("--strategy and --batch are for searches with --objective; say what to look for")
    else:
        names = {field.name for field in dataclasses.fields(known[method])}
        fields = {key: value for key, value in given.items() if key in names}
        options = {key: value for key, value in given.items() if key not in names}
    chosen = method_of(method, fields)
    arguments = {**call_options(model), **assignments("--call", call or [])}
    target: Any
    samples: list[dict[str, Any]]
    if data is not None:
        from steer.text_samples import read_samples

        target, tokenizer = open_language(model)
        samples = [{**arguments, **sample} for sample in read_samples(data, tokenizer)]
    else:
        target = open_model(model)
        samples = [{**arguments, "prompt": text} for text in texts]
    fitted = steer.calibrate(
        target,
        chosen,
        samples,
        trials=trials,
        seconds=seconds,
        seed=seed,
        checkpoint=checkpoint,
        report=report,
        **options,
    )
    fitted.save(str(output))
    for line in search_options.summary(fitted, output, report):
        console.print(line, highlight=False, markup=False, soft_wrap=True)


@app.command()
def show(
    source: Annotated[str, typer.Argument(help="Folder of a saved method, or owner/name on the Hugging Face Hub.")],
    revision: Annotated[str | None, typer.Option(help="Branch, tag or commit of the Hub's repository.")] = None,
    trials: Annotated[int, typer.Option(help="Trials to list, the best first.", min=0)] = 10,
    as_json: Annotated[bool, typer.Option("--json", help="Print the contents of its steer.json.")] = False,
) -> None:
    """Say what a saved method is: its settings, what it was made for, how it was found, its figures."""
    from steer.artifact import folder_of, read
    from steer.provenance import best_trials, notes, sections

    folder = folder_of(source, revision=revision)
    if as_json:
        print(json.dumps(read(folder), indent=2, sort_keys=True))
        return
    method = steer.load(folder)
    console.print(_plain(f"{type(method).__name__}, from {source}"), style="bold")
    for title, rows in sections(method).items():
        table = Table(box=box.SIMPLE, title=title, title_justify="left", show_header=False)
        table.add_column(no_wrap=False, max_width=24)
        table.add_column(overflow="fold")
        for row in rows:
            table.add_row(*map(_plain, row))
        console.print(table)
    if listed := best_trials(method, trials):
        table = Table("settings", "score", "gain [95 %]", box=box.SIMPLE, title="Best trials", title_justify="left")
        for column in table.columns:
            column.overflow = "fold"
        for trial in listed:
            table.add_row(*map(_plain, trial))
        console.print(table)
    for note in notes(method):
        console.print(_plain(note))


def _plain(text: str) -> Text:
    """Text of a file that anyone may have written: no markup, and nothing that a terminal would act on."""
    return Text("".join(character if character.isprintable() or character == "\n" else "?" for character in text))


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
        method_of(method, assignments("--set", settings or [])),
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
