"""The `steer` command. Packages add commands through the entry-point group `steer.commands`."""

from __future__ import annotations

import contextlib
import dataclasses
import json
import re
import sys
from collections.abc import Mapping, Sequence
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
from rich.text import Text

import steer
from steer import method_table
from steer.method import Method
from steer_patches.family import FAMILIES

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


def _call_options(name: str) -> dict[str, Any]:
    """Arguments that the pipeline of an embedded model needs; empty for other models."""
    return {key: value for entry in entry_points(group="steer.calls") for key, value in entry.load()(name).items()}


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
    arguments = {**_call_options(model), **assignments("--call", call or [])}
    target: Any
    samples: list[dict[str, Any]]
    if data is not None:
        from steer.text_samples import read_samples

        target, tokenizer = _open_language(model)
        samples = [{**arguments, **sample} for sample in read_samples(data, tokenizer)]
    else:
        target = _open(model)
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


def assignments(option: str, given: Sequence[str]) -> dict[str, Any]:
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
    model, tokenizer = _open_language(name)
    ids = tokenizer(text).input_ids[:tokens]
    return model, torch.tensor([ids], device=model.device), [tokenizer.decode([token]) for token in ids]


def _open_language(name: str) -> tuple[Any, Any]:
    """A language model and its tokenizer."""
    for entry in entry_points(group="steer.loaders"):
        loaded = entry.load()(name)
        if not (isinstance(loaded, tuple) and isinstance(loaded[1], transformers.PreTrainedTokenizerBase)):
            cls = type(loaded[0] if isinstance(loaded, tuple) else loaded).__name__
            raise ValueError(f"{name} is a {cls}, and a language model is wanted here")
        return loaded
    model = transformers.AutoModelForCausalLM.from_pretrained(name)
    return model.eval(), transformers.AutoTokenizer.from_pretrained(name)


def steering(
    method: str | None, settings: Sequence[str] | None, artifact: Path | None, processor: Any = None
) -> Method | None:
    """The method that the options of a command name; None if they name none.

    Args:
        processor: of a vision-language model, for methods that read its chat template.
    """
    if method is not None and artifact is not None:
        raise ValueError("give --method or --artifact, not both")
    if settings and method is None:
        raise ValueError("--set sets fields of a method: give --method too")
    if artifact is not None:
        return steer.load(str(artifact))
    return None if method is None else method_of(method, assignments("--set", settings or []), processor)


def method_of(name: str, given: Mapping[str, Any], processor: Any = None) -> Any:
    """A method by name, with values of its fields; `processor` as in `steering`.

    Raises:
        ValueError: no such method, field, or value of it.
    """
    known = steer.methods()
    if name not in known:
        raise ValueError(f"there is no method {name}; there are {', '.join(known)}")
    names = [field.name for field in dataclasses.fields(known[name])]
    for key in given:
        if key not in names:
            raise ValueError(f"{name} has no field {key!r}; it has {', '.join(names)}")
    for_processor: Any = None if processor is None else getattr(known[name], "for_processor", None)
    try:
        return known[name](**given) if for_processor is None else for_processor(processor, **given)
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


@bench_app.command("act")
def bench_act(
    model: Annotated[
        str | None,
        typer.Option(help="A language model to take the tensors from; default: drawn ones of SmolLM2's shapes."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed calls of each variant; the median counts.", min=1)] = 7,
    small: Annotated[bool, typer.Option(help="A tiny setting that shows the mechanics, not the speed.")] = False,
    output: Annotated[str | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Calibrated attention (ACT) beside plain attention and beside the published edit of the whole map."""
    from steer import bench_act

    opened, tokenizer = (None, None) if model is None else _open_language(model)
    bench_act.run(model=opened, tokenizer=tokenizer, repeats=repeats, small=small, output=output, console=console)


@bench_app.command("vlm")
def bench_vlm(
    model: Annotated[
        str | None,
        typer.Option(help="A LLaVA-1.5, e.g. emoji-vlm, to measure besides the one of random weights."),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed tokens of each, and a fifth as many prompts.", min=2)] = 30,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    small: Annotated[bool, typer.Option(help="A tiny setting that shows the mechanics, not the speed.")] = False,
    output: Annotated[str | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """A token and a prompt with methods for vision-language models, beside plain attention and edited maps."""
    from steer import bench_vlm

    models = {} if model is None else {model: _open(model)}
    bench_vlm.run(models=models, repeats=repeats, device=device, small=small, output=output, console=console)


@bench_app.command("trials")
def bench_trials(
    model: Annotated[
        str | None,
        typer.Option(help="A pipeline, e.g. emoji-mmdit, to measure besides the SD3 of random weights."),
    ] = None,
    prompt: Annotated[str, typer.Option(help="What that pipeline draws.")] = "a red apple, noto style",
    call: Annotated[
        list[str] | None, typer.Option(help="key=value: an argument of that pipeline; may be repeated.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Steps of that pipeline.", min=1)] = 10,
    layers: Annotated[
        int | None, typer.Option(help="Its layers to try, spread over the depth; default: all.", min=1)
    ] = None,
    heads: Annotated[int | None, typer.Option(help="Heads to try of each of them; default: all.", min=1)] = None,
    batch: Annotated[
        list[int] | None,
        typer.Option(help="Trials in a batch; may be repeated. Default: the heads of a layer, of two, and all.", min=1),
    ] = None,
    repeats: Annotated[int, typer.Option(help="Timed rounds of each way; the median counts.", min=1)] = 3,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    small: Annotated[bool, typer.Option(help="A tiny setting that shows the mechanics, not the speed.")] = False,
    output: Annotated[str | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Seconds of a search's trials of heads: one at a time and in batches, with and without the shared prefix."""
    from steer.bench_trials import run

    arguments = {"prompt": prompt, "num_inference_steps": steps, "guidance_scale": 1.0}
    arguments |= assignments("--call", call or [])
    pipes = {} if model is None else {model: (_open(model), arguments)}
    run(
        pipes=pipes,
        layers=layers,
        heads=heads,
        batches=batch or [],
        repeats=repeats,
        device=device,
        small=small,
        output=output,
        console=console,
    )


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
