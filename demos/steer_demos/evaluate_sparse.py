"""Measures how much of a clip sparse attention keeps, at one density for all methods: `steer eval sparse emoji-wan`."""

from __future__ import annotations

import json
import platform
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

import torch
import torch.nn.functional as F
import typer
from diffusers import DiffusionPipeline
from PIL import Image, ImageDraw, ImageFont
from rich.console import Console
from rich.table import Column, Table
from torch import Tensor

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.clips import FRAMES
from steer_demos.emoji import IMAGE_SIZE
from steer_demos.evaluate_video import ClipPrompt, evaluation_prompts, generate_clips, save_animation
from steer_demos.intervals import FIRST_SEED, Interval, share
from steer_demos.sparse_controls import BestBlocks, RandomBlocks

PROMPTS, SHOWN = 48, 6
SEARCHED, SEARCH_SEED = 6, 50_000  # prompts and first seed of the two searches


def methods_at_40_percent() -> dict[str, Method]:
    """The six methods and controls with about 40 % of the blocks of emoji-wan (9 x 8 x 8 tokens, blocks of 16).

    That is the mean over the steps in which they are on, so the band of ReTtention, which refreshes, has 23 %. 40 % is
    what radial attention keeps at this size. The settings were found by counting blocks, not by looking at clips. No
    layer is dense, and all methods are dense in the first quarter of the steps.
    """
    shared: dict[str, Any] = {"steps": "0.25:", "dense_layers": 0, "block_size": 16}
    return {
        "RadialAttention": steer.RadialAttention(decay=0.2, key_frame_sink=True, **shared),
        "NeighborhoodAttention": steer.NeighborhoodAttention(window=(5, 5, 6), **shared),
        "SparseVDiT": steer.SparseVDiT(density=0.25, **shared),
        "ReTtention": steer.ReTtention(keep=0.2, **shared),
        "PAROAttention": steer.PAROAttention(density=0.4, **shared),
        "PAROAttention, published criterion": steer.PAROAttention(density=0.4, **shared),
        "PAROAttention, no reordering": steer.PAROAttention(density=0.4, **shared),
        "VMoBA": steer.VMoBA(k=(4, 3, 4), frames=1, window=(2, 4), box=(3, 4, 4), **shared),
        "random blocks": RandomBlocks(density=0.4, **shared),
        "best blocks": BestBlocks(density=0.4, **shared),
    }


SEARCHES: dict[str, dict[str, Any]] = {
    "SparseVDiT": {"epsilon": 0.11},
    "PAROAttention": {},
    "PAROAttention, published criterion": {"criterion": "paper"},
    "PAROAttention, no reordering": {"criterion": "raster"},
}


def planned(pipe: DiffusionPipeline, name: str, method: Method, **call: Any) -> Method:
    """The method, where it needs a plan with one found on prompts and seeds that are not evaluated."""
    if name not in SEARCHES:
        return method
    arguments = {"height": IMAGE_SIZE, "width": IMAGE_SIZE, "num_frames": FRAMES, "output_type": "latent"}
    arguments |= {"num_inference_steps": call["steps"], "guidance_scale": call["guidance_scale"]}
    arguments["max_sequence_length"] = call["max_sequence_length"]
    prompts = evaluation_prompts(PROMPTS + SEARCHED)[PROMPTS:]
    data = [{"prompt": prompt.text, **arguments} for prompt in prompts]
    return steer.calibrate(pipe, method, data, seed=SEARCH_SEED, **SEARCHES[name])


@dataclass(frozen=True)
class Fidelity:
    """How close steered clips are to the dense ones of the same prompts and seeds; 95 % bootstrap intervals.

    Args:
        density: blocks computed in the steps in which the method is on, as a fraction of all; the mean over these.
        run_density: share of the attention map computed in the whole run, dense steps included.
        psnr, psnr_interval: mean over the clips of each clip's PSNR in dB, peak 1.
        ssim, ssim_interval: mean structural similarity.
    """

    density: float
    run_density: float
    psnr: float
    psnr_interval: Interval
    ssim: float
    ssim_interval: Interval


def psnr(clips: Tensor, wanted: Tensor) -> Tensor:
    """(N,) dB of clips (N, T, 3, H, W) in [-1, 1] against others, over all their frames; at most 100."""
    error = ((clips - wanted) / 2).square().flatten(1).mean(1)
    return -10 * torch.log10(error.clamp(min=1e-10))


def ssim(clips: Tensor, wanted: Tensor, window: int = 11, sigma: float = 1.5) -> Tensor:
    """(N,) mean structural similarity of clips (N, T, 3, H, W) in [-1, 1], frame by frame and colour by colour.

    Source: Wang et al., "Image quality assessment: from error visibility to structural similarity", 2004, with its
    Gaussian window of 11 pixels and constants 0.01 and 0.03.
    """
    at = torch.arange(window, dtype=torch.float32) - window // 2
    line = torch.exp(-(at**2) / (2 * sigma**2))
    kernel = torch.outer(line, line)[None, None] / line.sum() ** 2

    def mean(pictures: Tensor) -> Tensor:
        return F.conv2d(pictures.flatten(0, 2)[:, None], kernel)

    x, y = (clips + 1) / 2, (wanted + 1) / 2
    mx, my = mean(x), mean(y)
    vx, vy, vxy = mean(x * x) - mx * mx, mean(y * y) - my * my, mean(x * y) - mx * my
    a, b = 0.01**2, 0.03**2
    similar = (2 * mx * my + a) * (2 * vxy + b) / ((mx * mx + my * my + a) * (vx + vy + b))
    return similar.view(len(clips), -1).mean(1)


def measure(
    pipe: DiffusionPipeline,
    method: Method,
    prompts: Sequence[ClipPrompt],
    seeds: Sequence[int],
    dense: Tensor,
    **call: Any,
) -> tuple[Fidelity, Tensor]:
    """Draw the prompts with the method and compare with the `dense` clips; the clips (N, T, 3, H, W) as well."""
    with steer.apply(pipe, method) as handle:
        clips = generate_clips(pipe, [p.text for p in prompts], seeds, label=type(method).__name__, **call)
        stats = handle.stats
    decibel, decibel_interval = share(psnr(clips, dense).numpy())
    similar, similar_interval = share(ssim(clips, dense).numpy())
    found = Fidelity(
        density=stats["methods"][0]["density"],
        run_density=stats["density"],
        psnr=decibel,
        psnr_interval=decibel_interval,
        ssim=similar,
        ssim_interval=similar_interval,
    )
    return found, clips


def side_by_side(columns: Mapping[str, Tensor], prompts: Sequence[ClipPrompt], path: Path, cell: int = 68) -> None:
    """Write clips as one GIF: a row for each method with its name, a column for each prompt."""
    label, head = 130, 30
    font, small = ImageFont.load_default(11), ImageFont.load_default(9)
    blank = Image.new("RGB", (label + len(prompts) * cell, head + len(columns) * cell), "white")
    draw = ImageDraw.Draw(blank)
    for column, prompt in enumerate(prompts):
        left = label + column * cell
        draw.text((left + 2, 4), prompt.subject, "black", small)
        draw.text((left + 2, 16), prompt.motion or "animated", "black", small)
    for row, name in enumerate(columns):
        draw.text((4, head + row * cell + cell // 2 - 6), name, "black", font)
    frames = []
    for at in range(next(iter(columns.values())).shape[1]):
        sheet = blank.copy()
        for row, clips in enumerate(columns.values()):
            for column, frame in enumerate(clips[: len(prompts), at]):
                pixels = ((frame.clamp(-1, 1) + 1) * 127.5).round().byte().movedim(0, -1).numpy()
                picture = Image.fromarray(pixels).resize((cell - 4, cell - 4), Image.Resampling.LANCZOS)
                sheet.paste(picture, (label + column * cell, head + row * cell))
        frames.append(sheet)
    save_animation(frames, path)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The written figures as the table of docs/methods/sparse.md."""
    lines = ["| | blocks while on | of the whole run | PSNR, dB | SSIM |", "|---|---|---|---|---|"]
    for name, r in report["methods"].items():
        (low, high), (least, most) = r["psnr_interval"], r["ssim_interval"]
        lines.append(
            f"| {name} | {r['density']:.3f} | {r['run_density']:.3f} | {r['psnr']:.2f} [{low:.2f}, {high:.2f}] "
            f"| {r['ssim']:.3f} [{least:.3f}, {most:.3f}] |"
        )
    return "\n".join(lines)


def evaluate_command(
    model: Annotated[str, typer.Argument(help="Embedded video model.")] = "emoji-wan",
    prompts: Annotated[int, typer.Option(help="How many of the fixed prompts.", min=2)] = PROMPTS,
    steps: Annotated[int, typer.Option(help="Sampling steps.", min=1)] = 20,
    guidance_scale: Annotated[float, typer.Option(help="Classifier-free guidance scale.")] = 3.0,
    only: Annotated[
        str | None, typer.Option(help="Only the methods whose name contains this; their rows of the file are replaced.")
    ] = None,
    first_seed: Annotated[int, typer.Option(help="Seed of the first clip.")] = FIRST_SEED,
    output: Annotated[Path, typer.Option(help="JSON file to write.")] = Path("sparse.json"),
    clips: Annotated[Path | None, typer.Option(help="GIF of the first clips to write.")] = None,
) -> None:
    """PSNR and SSIM of sparse clips against dense ones: six methods, random blocks and the best blocks there are."""
    chosen = {name: m for name, m in methods_at_40_percent().items() if only is None or only.lower() in name.lower()}
    if not chosen:
        raise ValueError(f"--only {only} matches none of {', '.join(methods_at_40_percent())}")
    asked = evaluation_prompts(prompts)
    seeds = [first_seed + index for index in range(prompts)]
    pipe = models.load_pipeline(model, clips=True)
    call: dict[str, Any] = {"steps": steps, "guidance_scale": guidance_scale, "max_sequence_length": 16}
    dense = generate_clips(pipe, [p.text for p in asked], seeds, label="dense", **call)
    results, used, drawn = {}, {}, {"dense": dense}
    for name, method in chosen.items():
        used[name] = planned(pipe, name, method, **call)
        results[name], drawn[name] = measure(pipe, used[name], asked, seeds, dense, **call)
    table = Table(Column("", no_wrap=True), "density", "of the run", "PSNR, dB", "SSIM")
    for name, r in results.items():
        table.add_row(
            name,
            f"{r.density:.3f}",
            f"{r.run_density:.3f}",
            f"{r.psnr:.2f} [{r.psnr_interval[0]:.2f}, {r.psnr_interval[1]:.2f}]",
            f"{r.ssim:.3f} [{r.ssim_interval[0]:.3f}, {r.ssim_interval[1]:.3f}]",
        )
    console = Console()
    console.print(table)
    console.print(f"{prompts} prompts and seeds, against dense clips of the same; 95 % bootstrap intervals")
    report = {
        "model": Path(model).name,
        "prompts": prompts,
        "settings": {**call, "first_seed": first_seed},
        "measured_on": f"{pipe.device.type}, {platform.machine()}, torch {torch.__version__}",
        "methods": {name: {**asdict(r), "method": used[name].describe()} for name, r in results.items()},
    }
    if only is not None and output.is_file():  # the other rows of an evaluation with the same settings stay
        before = json.loads(output.read_text())
        if all(before[key] == report[key] for key in report if key != "methods"):
            rows = before["methods"] | report["methods"]
            report["methods"] = {name: rows[name] for name in methods_at_40_percent() if name in rows}
    output.write_text(json.dumps(report, indent=1) + "\n")
    print(f"wrote {output}")
    if clips is not None:
        shown = {name: frames[:SHOWN] for name, frames in drawn.items() if "," not in name}
        side_by_side(shown, asked[:SHOWN], clips)
        print(f"wrote {clips}")


if __name__ == "__main__":
    typer.run(evaluate_command)
