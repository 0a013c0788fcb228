"""`steer bench`: what methods and kernels cost."""

from __future__ import annotations

from typing import Annotated

import typer
from rich.console import Console

from steer.opening import assignments, open_language, open_model

bench_app = typer.Typer(no_args_is_help=True, help="Measure; every ratio comes with its error.")
console = Console()


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

    opened, tokenizer = (None, None) if model is None else open_language(model)
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

    models = {} if model is None else {model: open_model(model)}
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
    pipes = {} if model is None else {model: (open_model(model), arguments)}
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
