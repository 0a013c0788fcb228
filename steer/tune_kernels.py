"""`steer bench kernels --tune`: launch settings of the Triton kernels, measured on the GPU at hand."""

from __future__ import annotations

import json
import statistics
from collections.abc import Iterator
from contextlib import suppress
from functools import partial
from pathlib import Path

import torch
from rich.console import Console

from steer.bench_kernels import Case, environment, inputs, random_mask, take_turns
from steer_kernels import BlockMask
from steer_kernels.config import Config


def candidates(head_dim: int, block: tuple[int, int], processors: int) -> Iterator[Config]:
    """Launch settings worth a try."""
    tile_q = min(block[0], 128 if head_dim <= 128 else 64)
    warps = 8 if tile_q * head_dim > 64 * 64 else 4
    for tile_k, stages in ((128, 2), (64, 3), (64, 2), (32, 3)):
        if tile_k <= block[1] and tile_k * head_dim <= 128 * 128:
            for tma in (False, True):
                yield Config(tile_q, tile_k, warps, stages, tma, processors)


def tune(file: str, repeats: int, console: Console) -> None:
    """Try the candidates of every head dim and block size on this GPU; write the fastest as a table, or into a folder
    under the device's name."""
    if not torch.cuda.is_available():
        raise ValueError("--tune measures on a CUDA device, and there is none")
    device = torch.device("cuda")
    name, rows = torch.cuda.get_device_name(device).removeprefix("NVIDIA ").split()[0], []
    for block in ((128, 128), (128, 64), (64, 64)):
        for head_dim in (64, 128, 256):
            timed = list(_timed(head_dim, block, device, repeats))
            if timed:
                seconds, best = min(timed, key=lambda pair: pair[0])
                settings = {"tile_q": best.tile_q, "tile_k": best.tile_k, "stages": best.stages, "warps": best.warps}
                rows.append(
                    {"bytes": 2, "head_dim": head_dim, "block": list(block), **settings, "tma": best.tma, "per_sm": 1}
                )
                console.print(f"{block} head_dim {head_dim}: {seconds * 1e3:.2f} ms with {best}")
    table = {
        "match": name,
        "measured": environment(device, torch.bfloat16),
        "note": "The fastest of a few settings at 16,384 tokens and a density of 0.25.",
        "block_sparse": rows,
    }
    path = Path(file) / f"{name.lower()}.json" if Path(file).is_dir() else Path(file)
    path.write_text(json.dumps(table, indent=2) + "\n")
    console.print(f"written to {path}; in kernels/steer_kernels/tables/ it becomes the default for this device")


def _timed(head_dim: int, block: tuple[int, int], device: torch.device, repeats: int) -> Iterator[tuple[float, Config]]:
    """Seconds of every setting that the device accepts."""
    from steer_kernels.block_sparse import triton

    keep = random_mask(16384, 16, 0.25, block[0])(device).to_bool()
    mask = BlockMask.from_bool(keep.repeat_interleave(block[0] // block[1], -1), block)
    q, k, v = inputs(Case("tune", 16, 16, 16384, head_dim, lambda device: mask), device, torch.bfloat16)
    processors = torch.cuda.get_device_properties(device).multi_processor_count
    for settings in candidates(head_dim, block, processors):
        work = mask.schedule(1, 16, block[0] // settings.tile_q, settings.programs)
        call = partial(triton.forward, q, k, v, mask, head_dim**-0.5, settings, work)
        with suppress(Exception):  # a setting that does not fit the device
            yield statistics.median(take_turns([call], device, repeats, f"{block} {head_dim}")[0]), settings
