"""What searched heads do to an embedded picture model, on prompts that the search never saw: `steer eval heads`.

The protocol, fixed before any result was seen:

Two searches for heads, with SoftPAG as in the paper (mode="all", no classifier-free guidance, 20 steps, scale w = 3).
The strength is 0.5 in both, the upper end of what is recommended: the paper takes 0.25 for quality among 576 heads and
more for styles, and a head of emoji-mmdit is one of 36.

- quality: objective `Concept`, 20 prompts, one round, the best 3 heads. 24 of 576 heads, the paper's share, would be
  1.5 of 36; 3 are taken so that both searches choose as many, and that there is something to combine.
- style: objective `Style("twemoji")`, the last style of the three, 8 prompts, three rounds of one head each.

Search prompts are 20 concepts drawn at random, without style or background; the style search takes the first 8. The
controls that are chosen by layer are chosen on the same prompts and seeds by the same objective, out of all layers:
PAG itself, and SoftPAG with the mode, strength and scale of the heads. The worst heads are the 3 of the lowest gain in
the first round.

Held out are 100 prompts of `evaluation_prompts` whose concepts occur in no search, with seeds of their own; for style
they do not name one. All conditions draw the same prompts and seeds: differences are paired. They are judged by a
classifier of another seed than the one that the search asked, and listed whatever their sign. Scales w/2 and 2w are a
second table, not a choice.

Two studies were added once the first two had been seen, each with held-out seeds of its own and without a second table.
In the first, three heads that each gained alone lost together, and on held-out prompts more so. Hence

- stepwise: objective `Concept`, three rounds of one head each, so that each is tried beside those chosen before, on
  40 samples: the same 20 prompts from two seeds each. Nothing else differs.
- varied: as stepwise, but the prompts name styles and backgrounds as often as the held-out ones do.

Source of the search: Ahn et al., arXiv 2506.10978.
"""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import random
import textwrap
import time
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Table
from safetensors.torch import load_file, save_file
from torch import Tensor
from tqdm import tqdm

import steer
from steer.artifact import installed
from steer.bind import models_of
from steer.checkpoint import about, digest
from steer.method import Method
from steer.statistics import mean_interval
from steer.strategies import Head, HeadHunter, Sweep
from steer.trials import Objective
from steer_demos import models
from steer_demos.emoji import BACKGROUNDS, STYLES, caption, concepts
from steer_demos.evaluate_pictures import Prompt, evaluation_prompts, generate_pictures, prompt_options
from steer_demos.evaluate_vlm import as_text
from steer_demos.heads_measures import MEASURES, STYLE, Measured, figures, mean_of, measure, real
from steer_demos.objectives import Concept, Style, judge

PROMPTS = 100
HELD_OUT_SEED = 20_000  # of the first held-out picture; searches draw from seed 0
LATER_SEEDS = (30_000, 40_000)  # the same of the studies that were added
SEARCH_SEED, SECOND_JUDGE = 0, 1
STEPS, SCALE, STRENGTH = 20, 3.0, 0.5
CHOSEN = 3  # heads
DRAWS = 3  # random choices of as many heads
FACTORS = (0.5, 2.0)  # of the scale, in the second table
NONE, CFG, FOUND, WORST = "none", "CFG 3", "HeadHunter", "worst heads"
BY_LAYER, SOFT_BY_LAYER, RANDOM = "PAG by layer", "SoftPAG by layer", "random heads"
SHEET_ROWS = 8


@dataclass(frozen=True)
class Study:
    """One search and the prompts on which it is judged.

    Args:
        data: prompts of the search.
        rounds: of HeadHunter.
        top: heads that each round adds.
        prompts: the held-out prompts; `style` is what is judged, also where the text does not name it.
        first_seed: of the held-out pictures.
        factors: of the scale, in the second table.
    """

    name: str
    objective: Objective
    data: list[str]
    rounds: int
    top: int
    prompts: list[Prompt]
    first_seed: int = HELD_OUT_SEED
    factors: tuple[float, ...] = FACTORS


def studies(prompts: int = PROMPTS, quality: int = 20, style: int = 8) -> list[Study]:
    """The four studies, with so many held-out prompts, and so many prompts in the searches."""
    searched = random.Random(2026).sample(list(concepts()), quality)
    data = [caption(concept, article=True) for concept in searched]
    held_out = [p for p in evaluation_prompts(2 * prompts + len(concepts())) if p.concept not in searched][:prompts]
    unnamed = [
        Prompt(caption(p.concept, None, p.background, article=True), p.concept, STYLE, p.background) for p in held_out
    ]
    chance = random.Random(2027)
    varied = [
        caption(concept, chance.choice([None, *STYLES]), chance.choice([None, *BACKGROUNDS]), article=True)
        for concept in searched * 2
    ]
    return [
        Study("quality", Concept(), data, 1, CHOSEN, held_out),
        Study("style", Style(STYLE), data[:style], CHOSEN, 1, unnamed),
        Study("stepwise", Concept(), data * 2, CHOSEN, 1, held_out, LATER_SEEDS[0], ()),
        Study("varied", Concept(), varied, CHOSEN, 1, held_out, LATER_SEEDS[1], ()),
    ]


@dataclass(frozen=True)
class Condition:
    """One way to draw the held-out prompts; scale 1 means no classifier-free guidance."""

    name: str
    method: Method | None = None
    guidance_scale: float = 1.0


def search(pipe: DiffusionPipeline, study: Study, call: Mapping[str, Any], folder: Path) -> dict[str, Method]:
    """HeadHunter's heads, and the best layers for PAG and SoftPAG; each is saved in a folder of its name, and resumes.

    Args:
        call: arguments of the pipeline.
    """
    soft = steer.PAG(scale=SCALE, mode="all", strength=STRENGTH)
    searches = {
        FOUND: (soft, HeadHunter(rounds=study.rounds, top=study.top)),
        SOFT_BY_LAYER: (soft, Sweep()),
        BY_LAYER: (steer.PAG(scale=SCALE), Sweep()),
    }
    data = [{"prompt": text, **call} for text in study.data]
    found = {}
    for name, (method, strategy) in searches.items():
        place = _place(folder, study, name)
        checkpoint, clock = place / "search", place / "search" / "seconds.json"
        resumed, started = checkpoint.exists(), time.monotonic()
        found[name] = steer.calibrate(
            pipe,
            method,
            data,
            objective=study.objective,
            strategy=strategy,
            seed=SEARCH_SEED,
            checkpoint=checkpoint,
            report=place,
        )
        found[name].save(str(place))
        if not clock.exists():  # of a search that was stopped the time is not known
            clock.write_text(json.dumps(None if resumed else round(time.monotonic() - started, 1)))
    return found


def _place(folder: Path, study: Study, name: str) -> Path:
    return folder / study.name / name.lower().replace(" ", "-")


def conditions(
    found: Mapping[str, Method], heads: Sequence[Head], factors: Sequence[float] = FACTORS
) -> list[Condition]:
    """Everything that draws the held-out prompts: first at the scale of the search, then at the others."""
    hunter = found[FOUND]
    chance = random.Random(SEARCH_SEED)
    draws = [chance.sample(list(heads), CHOSEN) for _ in range(DRAWS)]
    guided = {
        BY_LAYER: found[BY_LAYER],
        SOFT_BY_LAYER: found[SOFT_BY_LAYER],
        **{f"{RANDOM} {i}": _with_heads(hunter, draw) for i, draw in enumerate(draws, 1)},
        FOUND: hunter,
        WORST: _with_heads(hunter, worst(hunter)),
    }
    return [
        Condition(NONE),
        Condition(CFG, guidance_scale=3.0),
        *(Condition(name, method) for name, method in guided.items()),
        Condition(f"{CFG} + {FOUND}", hunter, 3.0),
        *(
            Condition(_at(factor, name), _with_scale(method, factor * SCALE))
            for factor in factors
            for name, method in guided.items()
        ),
    ]


def worst(hunter: Method) -> list[Head]:
    """The heads of the lowest gain in the first round; of equal ones the first in the model."""
    assert hunter.record is not None
    gains = hunter.record.tensors["gain_1"][0]
    order = gains.flatten().nan_to_num(torch.inf).argsort(stable=True)[:CHOSEN].tolist()
    return [(hunter.record.sites[index // gains.shape[1]], index % gains.shape[1]) for index in order]


def _with_heads(hunter: Method, heads: Sequence[Head]) -> Method:
    chosen: dict[str, list[int]] = {}
    for layer, head in sorted(heads):
        chosen.setdefault(layer, []).append(head)
    return dataclasses.replace(hunter, heads=chosen)


def _with_scale(method: Method, scale: float) -> Method:
    changes: dict[str, Any] = {"scale": scale}
    return dataclasses.replace(method, **changes)


def _at(factor: float, name: str) -> str:
    """The name of a condition whose scale is so many times that of the search."""
    return name if factor == 1 else f"{name}, w = {factor * SCALE:g}"


def draw(
    pipe: DiffusionPipeline,
    prompts: Sequence[str],
    first_seed: int,
    ways: Sequence[Condition],
    steps: int,
    folder: Path,
) -> dict[str, tuple[Tensor, float]]:
    """Pictures (N, 3, 64, 64) in [-1, 1] of every condition, rounded to 8 bits, and the seconds that they took.

    Each condition is kept in a file as soon as it is drawn, under a name that says all that it depends on.
    """
    samples: list[Mapping[str, Any]] = [{"prompt": prompt, "steps": steps} for prompt in prompts]
    seeds = [first_seed + index for index in range(len(samples))]
    facts = about(steer.PAG(), models_of(pipe), samples, first_seed, {})
    drawn: dict[str, tuple[Tensor, float]] = {}
    folder.mkdir(parents=True, exist_ok=True)
    for way in tqdm(ways, desc="conditions"):
        settings = way.method.describe() if way.method else NONE
        file = folder / f"{digest([facts, settings, way.guidance_scale])}.safetensors"
        if not file.is_file():
            started = time.monotonic()
            with steer.apply(pipe, way.method) if way.method else nullcontext():
                pictures = generate_pictures(
                    pipe,
                    prompts,
                    seeds,
                    steps=steps,
                    guidance_scale=way.guidance_scale,
                    label=way.name,
                )
            pixels = ((pictures.clamp(-1, 1) + 1) * 127.5).round().byte()
            new = file.with_suffix(".new")
            save_file({"pixels": pixels, "seconds": torch.tensor(time.monotonic() - started)}, new)
            os.replace(new, file)  # a kill while writing leaves no half file
        kept = load_file(file)
        drawn[way.name] = (kept["pixels"].float() / 127.5 - 1, float(kept["seconds"]))
    return drawn


def compare(measured: Mapping[str, Measured], factors: Sequence[float] = FACTORS) -> list[dict[str, Any]]:
    """The heads that were found against everything else at the same scale, and beside classifier-free guidance."""
    pairs = [(f"{CFG} + {FOUND}", CFG), (FOUND, CFG)]
    for factor in (1.0, *factors):
        others = (f"{RANDOM}, mean", BY_LAYER, SOFT_BY_LAYER, WORST)
        pairs += [(_at(factor, FOUND), _at(factor, other)) for other in others]
    return [{"of": one, "less": less, "figures": figures(measured[one], measured[less])} for one, less in pairs]


def report_of(
    study: Study,
    found: Mapping[str, Method],
    ways: Sequence[Condition],
    drawn: Mapping[str, tuple[Tensor, float]],
    searched_on: Mapping[str, tuple[Tensor, float]],
    folder: Path,
) -> dict[str, Any]:
    """Every figure of one study, as JSON holds it.

    Args:
        drawn: pictures of the held-out prompts.
        searched_on: pictures of the prompts of the search, of the conditions at its scale.
    """
    second = judge(SECOND_JUDGE)
    measured = {name: measure(second, pictures, study.prompts) for name, (pictures, _) in drawn.items()}
    for factor in (1.0, *study.factors):
        draws = [measured[_at(factor, f"{RANDOM} {number}")] for number in range(1, DRAWS + 1)]
        measured[_at(factor, f"{RANDOM}, mean")] = mean_of(draws)
    described = {way.name: way for way in ways}
    rows = {}
    for name, one in measured.items():
        way = described.get(name)
        row: dict[str, Any] = {}
        if way is not None:
            row["method"] = way.method.describe() if way.method else NONE
            row |= {"guidance_scale": way.guidance_scale, "seconds": round(drawn[name][1], 1)}
        row["figures"] = figures(one)
        rows[name] = row if name == NONE else row | {"difference from none": figures(one, measured[NONE])}
    held_out = [prompt.text for prompt in study.prompts]
    for name in searched_on:
        rows[name]["objective"] = {
            "on the prompts of the search": gain(study.objective, searched_on, name, study.data),
            "on held-out prompts": gain(study.objective, drawn, name, held_out),
        }
    return {
        "search": {name: searched(method, _place(folder, study, name)) for name, method in found.items()},
        "held_out": len(study.prompts),
        "conditions": rows,
        "comparisons": compare(measured, study.factors),
        "real renders": figures(measure(second, real(second, study.prompts), study.prompts)),
    }


def gain(
    objective: Objective, drawn: Mapping[str, tuple[Tensor, float]], name: str, prompts: Sequence[str]
) -> dict[str, float]:
    """What a condition adds to the search's own objective, with a 95 % bootstrap interval over prompts."""
    one, none = (objective((drawn[which][0] + 1) / 2, prompts).double() for which in (name, NONE))
    mean, (low, high) = mean_interval(one - none)
    return {"mean": mean, "low": low, "high": high}


def searched(method: Method, place: Path) -> dict[str, Any]:
    """What a search chose, its best and worst trials, and what it cost."""
    record = method.record
    assert record is not None
    trials = record.report["trials"]
    return {
        "method": method.describe(),
        "prompts": record.report["samples"],
        **record.report["figures"],
        "seconds": json.loads((place / "search" / "seconds.json").read_text()),
        "best": trials[: 2 * CHOSEN],
        "worst": trials[-CHOSEN:],
        "gain_by_layer": {
            site: float(gains[~gains.isnan()].mean())
            for site, gains in zip(record.sites, record.tensors.get("gain_1", torch.empty(1, 0, 0))[0], strict=False)
        },
    }


def contact_sheet(columns: Mapping[str, Tensor], prompts: Sequence[Prompt]) -> Image.Image:
    """One row for each prompt, one column for each condition: pictures (N, 3, 64, 64) in [-1, 1], few colours."""
    cell, title, label = 76, 40, 12
    sheet = Image.new("RGB", (len(columns) * cell, title + len(prompts) * (cell + label)), "white")
    draw, font = ImageDraw.Draw(sheet), ImageFont.load_default(10)
    for row, prompt in enumerate(prompts):
        draw.text((6, title + row * (cell + label)), prompt.text, "black", font)
    for column, (name, pictures) in enumerate(columns.items()):
        draw.text((column * cell + 6, 2), textwrap.fill(name, 11), "black", font)
        for row, picture in enumerate(pictures[: len(prompts)]):
            pixels = ((picture + 1) * 127.5).round().byte().movedim(0, -1).numpy()
            sheet.paste(Image.fromarray(pixels), (column * cell + 6, title + row * (cell + label) + label + 4))
    return sheet.quantize(64)


def show(report: Mapping[str, Any]) -> None:
    """Print for each study what every condition does at the scale of the search, below it the difference from none."""
    console = Console()
    for name, study in report["studies"].items():
        table = Table(name, *MEASURES, "Frechet distance")
        for condition, row in study["conditions"].items():
            if ", w = " in condition:  # the second table is in the file
                continue
            cells = []
            for column in (*MEASURES, "Frechet distance"):
                cell = _cell(row["figures"].get(column))
                if "difference from none" in row:
                    cell += "\n" + _cell(row["difference from none"].get(column), "+")
                cells.append(cell)
            table.add_row(condition, *cells)
        console.print(table)
        compared = Table(f"{name}: differences", *MEASURES, "Frechet distance")
        for pair in study["comparisons"]:
            cells = [_cell(pair["figures"].get(measure), "+") for measure in (*MEASURES, "Frechet distance")]
            compared.add_row(f"{pair['of']} – {pair['less']}", *cells)
        console.print(compared)
        gains = Table(f"{name}: gain in the search's own objective", "on its prompts", "on held-out prompts")
        for condition, row in study["conditions"].items():
            if "objective" in row and condition != NONE:
                gains.add_row(condition, *(_cell(figure, "+") for figure in row["objective"].values()))
        console.print(gains)
    console.print("below each figure its paired difference from none; 95 % bootstrap intervals over prompts")


def _cell(figure: Mapping[str, float] | None, sign: str = "") -> str:
    if figure is None:
        return "–"
    return f"{figure['mean']:{sign}.3f} [{figure['low']:{sign}.3f}, {figure['high']:{sign}.3f}]"


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded picture model or pipeline folder.")] = "emoji-mmdit",
    prompts: Annotated[int, typer.Option(help="Held-out prompts.", min=2)] = PROMPTS,
    folder: Annotated[Path, typer.Option(help="Where everything is written; a stopped run goes on there.")] = Path(
        "heads-emoji"
    ),
    quick: Annotated[bool, typer.Option("--quick", help="Two steps and few prompts: to see that it runs.")] = False,
) -> None:
    """Search heads for quality and for a style, and judge them on held-out prompts against layers and random heads.

    Writes heads.json, and for each study the fitted methods with their reports, a contact sheet, and what was drawn.
    """
    chosen = studies(4, quality=2, style=2) if quick else studies(prompts)
    steps = 2 if quick else STEPS
    pipe = models.load_pipeline(model, clips=False)
    call = {"num_inference_steps": steps, "guidance_scale": 1.0, **prompt_options(pipe)}
    written: dict[str, Any] = {}
    for study in chosen:
        found = search(pipe, study, call, folder)
        record = found[FOUND].record
        assert record is not None
        ways = conditions(found, [(site, head) for site in record.sites for head in range(record.heads)], study.factors)
        main, place = [way for way in ways if ", w = " not in way.name], folder / study.name / "drawn"
        drawn = draw(pipe, [prompt.text for prompt in study.prompts], study.first_seed, ways, steps, place)
        searched_on = draw(pipe, study.data, SEARCH_SEED, main, steps, place)
        written[study.name] = report_of(study, found, ways, drawn, searched_on, folder)
        columns = {way.name: drawn[way.name][0] for way in main}
        sheet = folder / study.name / "contact-sheet.png"
        contact_sheet(columns, study.prompts[:SHEET_ROWS]).save(sheet, optimize=True)
    report = {
        "model": Path(model).name,
        "settings": {**call, "scale": SCALE, "search_seed": SEARCH_SEED}
        | {"first_seed": {study.name: study.first_seed for study in chosen}},
        "versions": installed(),
        "measured_on": f"{pipe.device.type}, {platform.machine()}, {torch.get_num_threads()} threads, "
        f"torch {torch.__version__}",
        "studies": written,
    }
    (folder / "heads.json").write_text(as_text(report))
    show(report)
    print(f"wrote {folder}")


if __name__ == "__main__":
    typer.run(evaluate_command)
