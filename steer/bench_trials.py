"""`steer bench trials`: what trying heads costs, one at a time and in batches, with and without the shared prefix.

One round of HeadHunter runs through `steer.calibrate` in every way of `variants`; the ways take turns, so that a noisy
moment hits them all. A trial's time is all that `calibrate` does for it: hooks on and off, the pipeline's run, the
objective. Every speed stands beside the largest difference of any value of the pictures, and beside whether the
objective orders the heads alike, both against one trial at a time with the prefix shared.
"""

from __future__ import annotations

import json
import statistics
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import DiffusionPipeline
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

import steer
from steer.bench_guidance import SD3_SMALL, random_sd3
from steer.bench_kernels import environment
from steer.strategies import HeadHunter
from steer_patches.attach import denoisers
from steer_patches.blocks import find_blocks
from steer_patches.family import family_of

SCALE = 3.0  # of PAG
# Blocks, heads, channels of a head, rows of the latents, text tokens; then layers and heads of each that are tried.
# On a GPU SD3-medium at 1024 x 1024; on a CPU its depth and heads at a quarter of the width and 256 image tokens.
SHAPES = {"cuda": ((24, 24, 64, 128, 333), 3, 8), "cpu": ((24, 24, 16, 32, 77), 3, 4)}
RANDOM_STEPS = {"cuda": 2, "cpu": 1}  # time goes with the steps, so few are enough


def run(
    *,
    pipes: Mapping[str, tuple[DiffusionPipeline, Mapping[str, Any]]],
    layers: int | None,
    heads: int | None,
    batches: Sequence[int],
    repeats: int,
    device: str | None,
    small: bool,
    output: str | None,
    console: Console,
) -> dict[str, Any]:
    """Time all ways, print a table for each model, and write JSON where a file is named.

    Args:
        pipes: pipelines to measure besides the one of random weights, each with the arguments that draw a picture.
        layers, heads: layers of those pipelines, and heads of each layer, that are tried; None = all.
        batches: trials in a batch; empty = the heads tried of one layer, of two layers, and all of them.
        repeats: timed rounds of each way; the median counts.
        device: of the random weights; None = cuda if there is one.
        small: random weights of a tiny shape, which shows the mechanics and not the speed.
        output: file for the figures.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    cases = [partial(_opened, name, pipe, arguments, layers, heads) for name, (pipe, arguments) in pipes.items()]
    measured = [_measure(make(), batches, repeats) for make in [*cases, partial(_random, device, small)]]
    result = {
        "environment": measured[-1]["environment"] | {"diffusers": diffusers.__version__},
        "scale": SCALE,
        "repeats": repeats,
        "small": small,
        "cases": measured,
    }
    for case in measured:
        _print(case, result, console)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}")
    return result


@dataclass(frozen=True)
class Case:
    """A pipeline, the arguments that draw one picture with it, and the heads that are tried, layer after layer."""

    name: str
    pipe: DiffusionPipeline
    arguments: Mapping[str, Any]
    heads: Mapping[str, Sequence[int]]


def _opened(
    name: str, pipe: DiffusionPipeline, arguments: Mapping[str, Any], layers: int | None, heads: int | None
) -> Case:
    return Case(name, pipe, arguments, _tried(pipe, layers, heads))


def _random(device: str, small: bool) -> Case:
    shape, layers, heads = (SD3_SMALL, 2, 2) if small else SHAPES[device]
    with torch.no_grad():
        pipe, arguments = random_sd3(shape, device, torch.bfloat16 if device == "cuda" else torch.float32)
    pictures = {"num_inference_steps": 2 if small else RANDOM_STEPS[device], "output_type": "latent"}
    plain = {name: value for name, value in arguments.items() if not name.startswith("negative")}
    name = f"SD3, random weights, {shape[0]} x {shape[1]} heads of {shape[2]}, {shape[3] ** 2 // 4} image tokens"
    return Case(name, pipe, {**plain, "guidance_scale": 1.0, **pictures}, _tried(pipe, layers, heads))


def _tried(pipe: DiffusionPipeline, layers: int | None, heads: int | None) -> dict[str, list[int]]:
    """So many layers that PAG can act on, spread over the depth, and so many heads spread over each."""
    sites = [site for site in steer.sites(pipe) if site.kind in steer.PAG.kinds]
    return {site.name: _spread(range(site.heads), heads) for site in _spread(sites, layers)}


def _spread(items: Sequence[Any], number: int | None) -> list[Any]:
    """So many of the items, from the middle of equal parts; None = all."""
    number = min(number or len(items), len(items))
    return [items[int((i + 0.5) * len(items) / number)] for i in range(number)]


class Objective:
    """Scores pictures by how much neighbouring values differ; keeps them, and notes when each batch was there."""

    def __init__(self) -> None:
        self.pictures: list[torch.Tensor] = []
        self.moments: list[float] = []
        self.blocks = 0  # rows that a block computed, all blocks together
        self.before = 0  # of the picture without the method, which is drawn first

    def __call__(self, pictures: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
        scores = pictures.diff(dim=-1).abs().flatten(1).mean(1)
        self.pictures.append(pictures.cpu())
        if pictures.is_cuda:
            torch.cuda.synchronize()
        self.moments.append(time.perf_counter())
        if len(self.moments) == 1:
            self.before = self.blocks
        return scores


def _measure(case: Case, batches: Sequence[int], repeats: int) -> dict[str, Any]:
    """All ways for one case: a row each."""
    number = sum(map(len, case.heads.values()))
    ways = variants([len(heads) for heads in case.heads.values()], batches)
    seconds: list[list[float]] = [[] for _ in ways]
    counted: list[Objective] = []
    fitted: list[Any] = []
    with tqdm(total=len(ways) * (repeats + 1), desc=f"bench trials {case.name}") as bar:
        for repeat in range(repeats + 1):  # the first round warms up, and counts blocks
            for i, (share, batch) in enumerate(ways):
                objective = Objective()
                hooks = _count_blocks(case.pipe, objective) if repeat == 0 else []
                try:
                    result = _search(case, share, batch, objective)
                finally:
                    for hook in hooks:
                        hook.remove()
                if repeat == 0:
                    counted.append(objective)
                    fitted.append(result)
                else:
                    seconds[i].append((objective.moments[-1] - objective.moments[0]) / number)
                bar.update()
    rows = []
    for i, (share, batch) in enumerate(ways):
        rows.append(
            {
                "batch": batch,
                "share_prefix": share,
                "seconds": statistics.median(seconds[i]),
                "spread": max(seconds[i]) - min(seconds[i]),
                "faster_than_unshared": statistics.median(seconds[0]) / statistics.median(seconds[i]),
                "faster_than_single": statistics.median(seconds[1]) / statistics.median(seconds[i]),
                "blocks": (counted[i].blocks - counted[i].before) / (counted[0].blocks - counted[0].before),
                "error": float((_pictures(counted[i]) - _pictures(counted[1])).abs().max()),
                "same_order": _order(fitted[i]) == _order(fitted[1]),
            }
        )
    model = next(iter(denoisers(case.pipe).values()))
    return {
        "model": case.name,
        "environment": environment(model.device, model.dtype),  # type: ignore[arg-type]
        "steps": case.arguments["num_inference_steps"],
        "trials": number,
        "heads": {name: list(heads) for name, heads in case.heads.items()},
        "largest_value": float(_pictures(counted[1]).abs().max()),
        "effect": float((_pictures(counted[1]) - counted[1].pictures[0]).abs().amax((1, 2, 3)).min()),
        "rows": rows,
    }


def variants(by_layer: Sequence[int], batches: Sequence[int]) -> list[tuple[bool, int]]:
    """(prefix shared, trials in a batch): first one at a time with a pass of its own, then one thing is added.

    Args:
        by_layer: heads that are tried of each layer.
        batches: batch sizes; empty = the heads of one layer, of two, and all.
    """
    sizes = sorted(set(batches or (by_layer[0], sum(by_layer[:2]), sum(by_layer))))
    return [(False, 1), (True, 1), (False, sizes[0]), *((True, size) for size in sizes)]


def _search(case: Case, share: bool, batch: int, objective: Objective) -> Any:
    """One round in which every head is tried once. `top=1`: what is found is a trial, so nothing is drawn for it."""
    method = steer.PAG(scale=SCALE, heads=case.heads, share_prefix=share)
    strategy = HeadHunter(rounds=1, top=1)
    return steer.calibrate(
        case.pipe, method, [case.arguments], objective=objective, strategy=strategy, batch=batch, progress=False
    )


def _count_blocks(pipe: DiffusionPipeline, objective: Objective) -> list[Any]:
    """Hooks that count the rows which a block computes; of blocks whose outputs are replayed there are none."""

    def count(module: Any, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        objective.blocks += next(len(value) for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor))

    blocks = [block for model in denoisers(pipe).values() for block in find_blocks(model, family_of(model))]
    return [block.module.register_forward_hook(count, with_kwargs=True) for block in blocks]


def _pictures(objective: Objective) -> torch.Tensor:
    """Of all trials in their order, which is the same in every way; the first picture is that without the method."""
    return torch.cat(objective.pictures[1:])


def _order(fitted: Any) -> list[Any]:
    """The heads from the best to the worst."""
    return [trial["head"] for trial in fitted.record.report["trials"]]


def _print(case: Mapping[str, Any], result: Mapping[str, Any], console: Console) -> None:
    env = case["environment"].items()
    about = ", ".join(f"{value}" if key in ("device", "dtype") else f"{key} {value}" for key, value in env)
    note = ", tiny setting" if result["small"] and "random" in case["model"] else ""
    table = Table(
        *("batch", "prefix", "seconds", "spread", "x 1st", "x 2nd", "blocks", "pictures", "order"),
        title=f"{case['model']}: {case['trials']} heads in {len(case['heads'])} layers, {case['steps']} steps; "
        f"median of {result['repeats']}; {about}{note}",
        box=box.SIMPLE,
        pad_edge=False,
        collapse_padding=True,
    )
    for row in case["rows"]:
        table.add_row(
            str(row["batch"]),
            "shared" if row["share_prefix"] else "own",
            f"{row['seconds']:.3f}",
            f"{row['spread']:.3f}",
            f"{row['faster_than_unshared']:.2f}",
            f"{row['faster_than_single']:.2f}",
            f"{row['blocks']:.0%}",
            f"{row['error']:.0e}",
            "same" if row["same_order"] else "other",
        )
    console.print(table)
    console.print(
        "seconds: of a trial. x 1st, x 2nd: times faster than the first and second row. blocks: that were "
        "computed, of the first row's. pictures: largest difference from the second row's, where values reach "
        f"{case['largest_value']:.2g} and every head changes some by {case['effect']:.1g} or more. order: of the heads."
    )
