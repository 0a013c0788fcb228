"""`steer bench kernels`: sparse attention beside the best dense attention and compiled FlexAttention, in one run.

The shapes are those of published models on a GPU, and small enough for two cores on a CPU. Every speed stands beside
its density and its error: against fp64 attention under the same mask for sparse kernels, under none for dense ones,
on sampled queries. The variants of a case take turns, so that a noisy moment hits them all.
"""

from __future__ import annotations

import importlib.util
import json
import platform
import random
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm.auto import tqdm

from steer_kernels import (
    BlockMask,
    block_sparse_attention,
    gathered_decode,
    page_scores,
    page_summary,
    patterns,
    select_pages,
)
from steer_kernels.block_sparse import refusal

SAMPLED_QUERIES = 64
DENSE = {
    "sdpa flash": SDPBackend.FLASH_ATTENTION,
    "sdpa cudnn": SDPBackend.CUDNN_ATTENTION,
    "sdpa efficient": SDPBackend.EFFICIENT_ATTENTION,
    "sdpa math": SDPBackend.MATH,
}


@dataclass
class Case:
    """One shape with one mask. `causal` cases compare with causal dense attention."""

    name: str
    heads: int
    kv_heads: int
    tokens: int
    width: int
    mask: Callable[[torch.device], BlockMask]
    causal: bool = False


def random_mask(tokens: int, heads: int, density: float, block: int = 128) -> Callable[[torch.device], BlockMask]:
    """As many random key blocks in every row, other ones for every head: the worst case for any cache."""

    def make(device: torch.device) -> BlockMask:
        n = -(-tokens // block)
        scores = torch.rand(1, heads, n, n, generator=torch.Generator().manual_seed(0))
        best = scores.topk(max(1, round(density * n)), -1).indices
        keep = torch.zeros(scores.shape, dtype=torch.bool).scatter_(-1, best, True)
        return BlockMask.from_bool(keep, block, q_len=tokens, kv_len=tokens).to(device)

    return make


def video(frames: int, per_frame: int, decay: float, sink: bool, text: int = 0) -> Callable[[torch.device], BlockMask]:
    return lambda device: patterns.radial(
        tokens_per_frame=per_frame, frames=frames, decay=decay, key_frame_sink=sink, text_tokens=text, device=device
    )


def window(grid: tuple[int, ...], size: tuple[int, ...], tile: tuple[int, ...]) -> Callable[[torch.device], BlockMask]:
    return lambda device: patterns.sliding_tile(grid=grid, window=size, tile=tile, device=device)


def cases(device: torch.device, small: bool) -> list[Case]:
    if small:
        return [Case("random 0.25", 2, 2, 512, 32, random_mask(512, 2, 0.25))]
    if device.type == "cuda":
        llm = lambda d: patterns.sink_window(q_len=32768, sink=128, window=4096, device=d)  # noqa: E731
        return [
            *(
                Case(f"random {d:g}", 24, 24, 32768, 128, random_mask(32768, 24, d))
                for d in (0.05, 0.1, 0.15, 0.25, 0.5)
            ),
            Case("Wan 1.3B 480p, radial", 12, 12, 21 * 1560, 128, video(21, 1560, 0.2, True)),
            Case("Wan 14B 720p, radial", 40, 40, 21 * 3600, 128, video(21, 3600, 0.2, True)),
            Case("Hunyuan 117f, radial", 24, 24, 30 * 3840 + 256, 128, video(30, 3840, 0.95, False, 256)),
            Case("Hunyuan 117f, sliding tile", 24, 24, 115200, 128, window((30, 48, 80), (18, 24, 24), (6, 8, 8))),
            Case("CogVideoX-5B, radial", 48, 48, 13 * 1350 + 226, 64, video(13, 1350, 0.95, False, 226)),
            Case("FLUX 4K, sliding tile", 24, 24, 65536, 128, window((256, 256), (80, 80), (16, 16))),
            Case("LLM 32k, sinks and window", 32, 8, 32768, 128, llm, causal=True),
        ]
    llm = lambda d: patterns.sink_window(q_len=8192, sink=128, window=1024, device=d)  # noqa: E731
    return [
        *(Case(f"random {d:g}", 8, 8, 4096, 64, random_mask(4096, 8, d)) for d in (0.05, 0.1, 0.15, 0.25, 0.5)),
        Case("video 16 x 480, radial", 8, 8, 16 * 480, 64, video(16, 480, 0.2, True)),
        Case("video 12 x 32 x 32, sliding tile", 8, 8, 12288, 64, window((12, 32, 32), (12, 8, 16), (4, 8, 4))),
        Case("LLM 8k, sinks and window", 8, 2, 8192, 64, llm, causal=True),
    ]


def run(
    *,
    device: str | None,
    repeats: int,
    small: bool,
    only: str | None,
    output: str | None,
    plot: str | None,
    console: Console,
) -> dict[str, Any]:
    """Time all cases, print tables, and write JSON and a plot where a file is named."""
    if plot and importlib.util.find_spec("matplotlib") is None:
        raise ValueError("--plot needs matplotlib: pip install 'steer-attention[plot]'")
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    chosen = [case for case in cases(where, small) if only is None or only in case.name]
    if not chosen:
        names = ", ".join(case.name for case in cases(where, small))
        raise ValueError(f"--only {only!r} matches no case; there are: {names}")
    with torch.no_grad():
        rows = [row for case in chosen for row in measure(case, where, dtype, repeats)]
        decode = measure_decode(where, dtype, repeats, small) if only is None else []
        building = measure_building(where, repeats, small) if only is None else []
    result = {
        "environment": environment(where, dtype),
        "repeats": repeats,
        "rows": rows,
        "decode": decode,
        "building": building,
    }
    _print(result, console)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}")
    if plot:
        draw(result, plot)
        console.print(f"drawn in {plot}")
    return result


def measure(case: Case, device: torch.device, dtype: torch.dtype, repeats: int) -> list[dict[str, Any]]:
    """One row for every kernel that can serve the case, and one with the reason for every one that cannot."""
    mask = case.mask(device)
    q, k, v = inputs(case, device, dtype)
    sampled = torch.linspace(0, case.tokens - 1, SAMPLED_QUERIES, device=device).long().unique()
    exact = {True: _exact(q, k, v, mask, sampled), False: _exact(q, k, v, _dense_mask(case, device), sampled)}
    variants: list[tuple[str, str, Callable[[], Any]]] = []
    rows: list[dict[str, Any]] = []

    def add(kind: str, name: str, call: Callable[[], Any]) -> None:
        try:
            call()
        except Exception as error:  # whatever a backend throws is the finding
            lines = str(error).strip().splitlines()
            rows.append({"case": case.name, "kernel": name, "refused": lines[0] if lines else type(error).__name__})
        else:
            variants.append((kind, name, call))

    for name, sdpa in DENSE.items():
        if name == "sdpa math" and case.tokens > 4096:
            continue  # it makes a map of all heads
        add("dense", name, partial(_sdpa, q, k, v, sdpa, case.causal))
    for backend in ("triton", "gather", "flex"):
        name = "flex" if backend == "flex" else f"steer {backend}"
        reason = refusal(backend, q, k, v, mask)
        if backend == "triton" and device.type != "cuda":
            reason = "it runs on a CUDA device"  # interpreted kernels are for tests
        if reason:
            rows.append({"case": case.name, "kernel": name, "refused": reason})
        else:
            add("sparse", name, partial(block_sparse_attention, q, k, v, mask, backend=backend))
    if importlib.util.find_spec("flashinfer") is not None and device.type == "cuda":
        add("sparse", "flashinfer", flashinfer(q, k, v, mask))
    times = take_turns([call for _, _, call in variants], device, repeats, case.name)
    best = min((statistics.median(t) for (kind, _, _), t in zip(variants, times, strict=True) if kind == "dense"))
    flex = next((statistics.median(t) for (_, n, _), t in zip(variants, times, strict=True) if n == "flex"), None)
    for (kind, name, call), spent in zip(variants, times, strict=True):
        density = mask.density if kind == "sparse" else (0.5 if case.causal else 1.0)
        seconds = statistics.median(spent)
        truth = exact[kind == "sparse"]
        found = call()[:, :, sampled].double()
        rows.append(
            {
                "case": case.name,
                "kernel": name,
                "tokens": case.tokens,
                "heads": [case.heads, case.kv_heads],
                "head_dim": case.width,
                "density": density,
                "milliseconds": seconds * 1e3,
                "spread": (max(spent) - min(spent)) * 1e3,
                "tflops": 4 * case.heads * case.width * case.tokens**2 * density / seconds / 1e12,
                "over_dense": best / seconds,
                "over_flex": flex / seconds if flex else None,
                "error": float((found - truth).norm() / truth.norm()),
            }
        )
    return rows


def inputs(case: Case, device: torch.device, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator(device).manual_seed(0)
    return tuple(
        torch.randn(1, heads, case.tokens, case.width, generator=g, device=device, dtype=dtype)
        for heads in (case.heads, case.kv_heads, case.kv_heads)
    )


def _dense_mask(case: Case, device: torch.device) -> BlockMask:
    mask = BlockMask.dense(case.tokens, case.tokens, device=device)
    return mask.with_causal() if case.causal else mask


def _exact(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask, sampled: torch.Tensor) -> torch.Tensor:
    """(1, H, n, D) fp64 attention of the sampled queries, a head at a time."""
    visible, group = mask.to_tokens(sampled), q.shape[1] // k.shape[1]
    heads = []
    for h in range(q.shape[1]):
        scores = q[:, h, sampled].double() @ k[:, h // group].double().mT * q.shape[-1] ** -0.5
        scores = scores.masked_fill(~visible[:, min(h, visible.shape[1] - 1)], -torch.inf)
        heads.append(torch.softmax(scores, -1).nan_to_num(0.0) @ v[:, h // group].double())
    return torch.stack(heads, 1)


def _sdpa(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, backend: SDPBackend, causal: bool) -> torch.Tensor:
    with sdpa_kernel(backend):
        return F.scaled_dot_product_attention(q, k, v, is_causal=causal, enable_gqa=q.shape[1] != k.shape[1])


def flashinfer(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, mask: BlockMask) -> Callable[[], torch.Tensor]:
    """FlashInfer's block-sparse kernel, planned beforehand; one mask for all heads. Written from its documentation."""
    if mask.shape[1] > 1 or mask.rule is not None or mask.causal:
        return _raise("steer passes it one list for all heads, and no token rule")
    import flashinfer  # type: ignore[import-not-found]

    indptr, indices, _ = mask.to_bsr()
    work = torch.empty(128 << 20, dtype=torch.uint8, device=q.device)
    wrapper = flashinfer.BlockSparseAttentionWrapper(work)
    wrapper.plan(
        indptr, indices, mask.q_len, mask.kv_len, *mask.block_size, q.shape[1], k.shape[1], q.shape[-1],
        q_data_type=q.dtype,
    )  # fmt: skip
    queries, keys, values = (t[0].transpose(0, 1).contiguous() for t in (q, k, v))
    return lambda: wrapper.run(queries, keys, values).transpose(0, 1)[None]


def _raise(reason: str) -> Callable[[], torch.Tensor]:
    def call() -> torch.Tensor:
        raise ValueError(reason)

    return call


def take_turns(calls: list[Callable[[], Any]], device: torch.device, repeats: int, what: str) -> list[list[float]]:
    """Seconds of each call, `repeats` times after one warm-up; on a GPU with a flushed cache, by its own clock."""
    spent: list[list[float]] = [[] for _ in calls]
    cache = torch.empty(64 << 20, device=device) if device.type == "cuda" else None
    with tqdm(total=len(calls) * (repeats + 1), desc=what, leave=False) as bar:
        for repeat in range(repeats + 1):
            # in another order every time: one leaves the caches to the next
            for i in random.Random(repeat).sample(range(len(calls)), len(calls)):
                seconds = _seconds(calls[i], cache)
                if repeat:
                    spent[i].append(seconds)
                bar.update()
    return spent


def _seconds(call: Callable[[], Any], cache: torch.Tensor | None) -> float:
    if cache is None:
        began = time.perf_counter()
        call()
        return time.perf_counter() - began
    cache.zero_()
    began_at, ended_at = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
    began_at.record()
    call()
    ended_at.record()
    torch.cuda.synchronize()
    return began_at.elapsed_time(ended_at) / 1e3


def measure_decode(device: torch.device, dtype: torch.dtype, repeats: int, small: bool) -> list[dict[str, Any]]:
    """One new token over a long cache: dense, and the pages that the scores choose; scoring is timed apart."""
    heads, kv_heads, width, page = 32, 8, 128, 16
    length, kept = (1024, [256]) if small else (131072, [4096, 32768]) if device.type == "cuda" else (32768, [2048])
    g = torch.Generator(device).manual_seed(0)
    q = torch.randn(1, heads, 1, width, generator=g, device=device, dtype=dtype)
    k, v = (torch.randn(1, kv_heads, length, width, generator=g, device=device, dtype=dtype) for _ in range(2))
    folded = q.view(1, kv_heads, -1, width)  # the heads of a group as queries of one key/value head: the fastest dense
    summary = page_summary(k, page)

    def choose(pages: int) -> torch.Tensor:
        return select_pages(page_scores(q, summary), pages, page_size=page)

    def error(found: torch.Tensor, seen: torch.Tensor) -> float:
        scores = folded.double() @ k.double().mT * width**-0.5
        truth = torch.softmax(scores.masked_fill(~seen[:, :, None], -torch.inf), -1) @ v.double()
        return float((found.double().view_as(truth) - truth).norm() / truth.norm())

    rows: list[dict[str, Any]] = []
    everything = torch.ones(1, kv_heads, length, dtype=torch.bool, device=device)
    calls: list[Callable[[], Any]] = [partial(F.scaled_dot_product_attention, folded, k, v)]
    errors: list[float | None]
    names, errors = [("dense sdpa", length)], [error(calls[0](), everything)]
    for budget in kept:
        pages = choose(budget // page)
        names.append(("steer, listed pages", budget))
        calls.append(partial(gathered_decode, q, k, v, pages, page_size=page))
        listed = torch.zeros(1, kv_heads, length // page, dtype=torch.bool, device=device)
        listed.scatter_(-1, pages.clamp(min=0).long(), True)  # the first page, which an unused slot names, is listed
        errors.append(error(calls[-1](), listed.repeat_interleave(page, -1)))
        names.append(("steer, scores and choice", budget))
        calls.append(partial(choose, budget // page))
        errors.append(None)
    times = take_turns(calls, device, max(repeats, 20), "decode")
    best = statistics.median(times[0])
    for (name, tokens), wrong, spent in zip(names, errors, times, strict=True):
        seconds = statistics.median(spent)
        moved = 2 * kv_heads * tokens * width * dtype.itemsize
        if "scores" in name:
            moved = summary_bytes(summary)
        rows.append(
            {
                "kernel": name,
                "cache": length,
                "kept": tokens,
                "milliseconds": seconds * 1e3,
                "spread": (max(spent) - min(spent)) * 1e3,
                "gigabytes_per_second": moved / seconds / 1e9,
                "over_dense": best / seconds,
                "error": wrong,
            }
        )
    return rows


def summary_bytes(summary: Any) -> int:
    return sum(t.numel() * t.element_size() for t in summary.tensors)


def measure_building(device: torch.device, repeats: int, small: bool) -> list[dict[str, Any]]:
    """Building the masks of 115,200 tokens."""
    t, h, w = (4, 8, 16) if small else (30, 48, 80)
    tokens = t * h * w
    radius = min(h, w) // 2
    made: dict[str, Callable[[], BlockMask]] = {
        "radial": lambda: video(t, h * w, 0.95, False, 256)(device),
        "neighborhood, raster": lambda: patterns.neighborhood(
            grid=(t, h, w), window=(t // 2 + 1, h // 2, w // 2), device=device
        ),
        "neighborhood, tiles": lambda: patterns.neighborhood(
            grid=(t, h, w), window=(t // 2 + 1, h // 2, w // 2), tile=(2, 8, 8), device=device
        ),
        "sliding tile": lambda: patterns.sliding_tile(
            grid=(t, h, w), window=(t, h // 2, w // 2), tile=(t // 2, 4, 4), device=device
        ),
        "circular": lambda: patterns.circular(grid=(t * h // 4, w * 4), radius=radius, device=device),
        "frames": lambda: patterns.frames(tokens_per_frame=h * w, frames=t, reach=2, device=device),
        "multi-diagonal": lambda: patterns.multi_diagonal(tokens_per_frame=h * w, frames=t, width=w, device=device),
        "sinks and window": lambda: patterns.sink_window(q_len=tokens, sink=128, window=tokens // 8, device=device),
        "power of two": lambda: patterns.power_of_two(q_len=tokens, window_blocks=5, device=device),
    }
    rows = []
    for name, make in made.items():
        spent = take_turns([make], device, max(repeats, 5), name)[0]
        rows.append(
            {
                "pattern": name,
                "tokens": tokens,
                "density": make().density,
                "milliseconds": statistics.median(spent) * 1e3,
                "spread": (max(spent) - min(spent)) * 1e3,
            }
        )
    return rows


def environment(device: torch.device, dtype: torch.dtype) -> dict[str, Any]:
    name = torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu()
    versions: dict[str, Any] = {"torch": torch.__version__}
    for module in ("triton", "flashinfer"):
        if importlib.util.find_spec(module) is not None:
            versions[module] = importlib.import_module(module).__version__
    return {"device": name, "dtype": str(dtype).removeprefix("torch."), **versions}


def _cpu() -> str:
    return f"{platform.machine()} CPU, {torch.get_num_threads()} threads"


def _print(result: dict[str, Any], console: Console) -> None:
    env = result["environment"]
    about = ", ".join(f"{value}" if key in ("device", "dtype") else f"{key} {value}" for key, value in env.items())
    title = f"median of {result['repeats']}; {about}"
    columns = ("case", "kernel", "density", "ms (spread)", "TFLOP/s", "x best dense", "x flex", "error to fp64")
    table = Table(*columns, title=title)
    refused: dict[tuple[str, str], list[str]] = {}
    for row in sorted(result["rows"], key=lambda row: "refused" in row):
        if "refused" in row:
            refused.setdefault((row["kernel"], row["refused"]), []).append(row["case"])
            continue
        table.add_row(
            row["case"],
            row["kernel"],
            f"{row['density']:.3f}",
            f"{row['milliseconds']:.2f} ({row['spread']:.2f})",
            f"{row['tflops']:.3g}",
            f"{row['over_dense']:.2f}",
            f"{row['over_flex']:.2f}" if row["over_flex"] else "",
            f"{row['error']:.1e}",
        )
    console.print(table)
    cases = len({row["case"] for row in result["rows"]})
    for (kernel, reason), names in refused.items():
        where = "all cases" if len(names) == cases else ", ".join(names)
        console.print(f"not measured: {kernel} ({where}): {reason}", style="dim", highlight=False)
    if result["decode"]:
        table = Table(
            "decode", "cache", "tokens read", "ms (spread)", "GB/s", "x dense", "error to fp64", title="one new token"
        )
        for row in result["decode"]:
            table.add_row(
                row["kernel"],
                str(row["cache"]),
                str(row["kept"]),
                f"{row['milliseconds']:.3f} ({row['spread']:.3f})",
                f"{row['gigabytes_per_second']:.0f}",
                f"{row['over_dense']:.2f}",
                "" if row["error"] is None else f"{row['error']:.1e}",
            )
        console.print(table)
    if result["building"]:
        table = Table("pattern", "tokens", "density", "ms (spread)", title="building a mask")
        for row in result["building"]:
            table.add_row(
                row["pattern"],
                str(row["tokens"]),
                f"{row['density']:.3f}",
                f"{row['milliseconds']:.1f} ({row['spread']:.1f})",
            )
        console.print(table)


def draw(result: dict[str, Any], file: str) -> None:
    """Speed over the best dense attention against density, with the line 1 / density that no kernel can pass."""
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
    rows = [row for row in result["rows"] if "density" in row and not row["kernel"].startswith("sdpa")]
    for kernel in sorted({row["kernel"] for row in rows}):
        points = sorted((row["density"], row["over_dense"], row["case"]) for row in rows if row["kernel"] == kernel)
        line = [(d, x) for d, x, case in points if case.startswith("random")]
        (drawn,) = axes.plot(*zip(*line, strict=True), marker="o", label=kernel)
        others = [(d, x) for d, x, case in points if not case.startswith("random")]
        if others:
            axes.scatter(*zip(*others, strict=True), marker="s", color=drawn.get_color(), alpha=0.6)
    ideal = torch.logspace(-1.5, 0, 50).tolist()
    axes.plot(ideal, [1 / d for d in ideal], color="grey", linestyle=":", label="1 / density")
    axes.plot(ideal, [0.7 / d for d in ideal], color="lightgrey", linestyle=":", label="0.7 / density")
    axes.set(xscale="log", yscale="log", xlabel="density (computed blocks / all blocks)", ylabel="times the best dense")
    axes.set_title(
        f"{result['environment']['device']}, {result['environment']['dtype']}\nsquares: published patterns", fontsize=10
    )
    axes.legend()
    figure.savefig(file, dpi=130)
    pyplot.close(figure)
