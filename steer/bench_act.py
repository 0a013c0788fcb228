"""`steer bench act`: attention that is calibrated, beside plain attention and beside the map that the paper edits.

Queries, keys and values are those of a language model's layers on the documentation of Python, or drawn with planted
sinks. The variants of a case take turns, so that a noisy moment hits them all. Memory is what the process grows by at
most during one call, its scratch included; on a GPU, what torch holds there. Errors are the largest difference of any
output from the formula on the whole map in fp64.
"""

from __future__ import annotations

import ctypes
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import torch
import torch.nn.functional as F
from rich.console import Console
from rich.table import Table

import steer
from steer.bench_kernels import environment, take_turns
from steer.method import Method
from steer.methods.act import ACT, Ready
from steer_patches.site import Call, Next, Site

HEADS, KV_HEADS, WIDTH = 9, 3, 64  # of SmolLM2-135M
LENGTHS = (1024, 2048, 4096)
DEPTHS = (0.1, 0.4, 0.7, 0.9)  # of the layers that are looked at
SINKS = (0, 30, 200)


def run(
    *,
    model: Any = None,
    tokenizer: Any = None,
    repeats: int,
    small: bool,
    output: str | None,
    console: Console,
) -> dict[str, Any]:
    """Time all cases, print a table, and write JSON where a file is named.

    Args:
        model, tokenizer: a language model whose attention is looked at; None = drawn tensors of SmolLM2's shapes.
        repeats: timed calls of each variant; the median counts.
        small: one short length, which shows the mechanics and not the speed.
        output: file for the figures.
    """
    lengths = (256,) if small else LENGTHS
    with torch.no_grad():
        sources = drawn(max(lengths)) if model is None else recorded(model, tokenizer, max(lengths))
        rows = [
            row
            for tokens in lengths
            for name, (query, key, value, scale) in sources.items()
            for row in measure(name, query[:, :, :tokens], key[:, :, :tokens], value[:, :, :tokens], scale, repeats)
        ]
    first = next(iter(sources.values()))[0]
    result = {
        "environment": environment(first.device, first.dtype),
        "inputs": "drawn" if model is None else type(model).__name__,
        "repeats": repeats,
        "rows": rows,
    }
    _print(result, console)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}")
    return result


def measure(
    name: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, repeats: int
) -> list[dict[str, Any]]:
    """One row for each variant at one layer and length."""
    query, key, value = (t.contiguous() for t in (query, key, value))
    heads, tokens = query.shape[1], query.shape[2]
    some = torch.arange(0, heads, 3, device=query.device)
    method = ACT()
    site = Site(name, 0, "causal", heads, key.shape[1], query.shape[3], "sdpa")
    call = Call(query, key, value, None, scale, True, site, 0)

    def plain(call: Call) -> torch.Tensor:
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale, enable_gqa=True)

    def act(chosen: torch.Tensor | None) -> torch.Tensor:
        site.kernel = Ready(chosen, None, None)
        return method.attend(call, plain)

    variants: dict[str, tuple[int, Callable[[], torch.Tensor]]] = {
        "sdpa": (0, lambda: plain(call)),
        f"ACT, {len(some)} of {heads} heads": (len(some), lambda: act(some)),
        f"ACT, {heads} heads": (heads, lambda: act(None)),
        "the map, edited": (heads, lambda: by_map(query, key, value, scale, method.beta, method.alpha / tokens)),
    }
    times = take_turns([make for _, make in variants.values()], query.device, repeats, f"{name}, {tokens} tokens")
    truth = {head: _exact(query, key, value, scale, method, head) for head in range(heads)}
    rows = []
    for (variant, (edited, make)), spent in zip(variants.items(), times, strict=True):
        out = make()
        which = {0: [], len(some): some.tolist()}.get(edited, list(range(heads)))
        rows.append(
            {
                "input": name,
                "tokens": tokens,
                "variant": variant,
                "milliseconds": statistics.median(spent) * 1e3,
                "spread": (max(spent) - min(spent)) * 1e3,
                "over_sdpa": statistics.median(spent) / statistics.median(times[0]),
                "megabytes": _peak(make, query.device),
                "error": max((float((out[:, h].double() - truth[h]).abs().max()) for h in which), default=None),
            }
        )
    return rows


def by_map(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, beta: float, threshold: float
) -> torch.Tensor:
    """ACT as it is published: the softmax map of every head, the means of its columns, and an edit in place."""
    tokens, groups = query.shape[2], query.shape[1] // key.shape[1]
    key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    later = torch.ones(tokens, tokens, dtype=torch.bool, device=query.device).triu(1)
    weights = (query @ key.mT).mul_(scale).masked_fill_(later, -torch.inf).softmax(-1)
    mean = weights.sum(2) / torch.arange(tokens, 0, -1, device=query.device)
    sinks = (mean > threshold)[:, :, None]
    sinks[..., 0] = False
    on_sinks = (weights * sinks).sum(-1, keepdim=True)
    more = 1 + (1 - beta) * on_sinks / (1 - on_sinks).clamp(min=torch.finfo(weights.dtype).eps)
    return weights.mul_(torch.where(sinks, beta, more)) @ value


def _exact(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float, method: ACT, head: int
) -> torch.Tensor:
    """One head of the formula in fp64."""
    group = head * key.shape[1] // query.shape[1]
    q, k, v = (t[:, h : h + 1].double() for t, h in ((query, head), (key, group), (value, group)))
    return by_map(q, k, v, scale, method.beta, method.alpha / query.shape[2])[:, 0]


@dataclass(kw_only=True)
class Record(Method, register=False):
    """Changes nothing; keeps what goes into attention."""

    found: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        scale = torch.tensor(call.softmax_scale)
        self.found[f"layer {call.site.layer}"] = (call.query.clone(), call.key.clone(), call.value.clone(), scale)
        return next(call)


def recorded(
    model: Any, tokenizer: Any, tokens: int
) -> Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Query, key, value and scale of some layers of a language model, on the documentation of Python."""
    ids = tokenizer("\n\n".join(topics[name] for name in sorted(topics))).input_ids[:tokens]
    names = [site.name for site in steer.sites(model) if site.kind == "causal"]
    chosen: Sequence[str] = [names[int(depth * len(names))] for depth in DEPTHS]
    record = Record(layers=chosen)
    with steer.apply(model, record):
        model(torch.tensor([ids], device=model.device), use_cache=False, logits_to_keep=1)
    return {name: (query, key, value, float(scale)) for name, (query, key, value, scale) in record.found.items()}


def drawn(tokens: int) -> Mapping[str, tuple[torch.Tensor, torch.Tensor, torch.Tensor, float]]:
    """Random queries, keys and values in which the first token and some others draw attention."""
    g = torch.Generator().manual_seed(0)
    query = torch.randn(1, HEADS, tokens, WIDTH, generator=g)
    key, value = (torch.randn(1, KV_HEADS, tokens, WIDTH, generator=g) for _ in range(2))
    query[..., 0] = query[..., 0].abs() * 4
    for sink in SINKS:
        key[:, :, sink, 0] += 12.0
    return {"drawn": (query, key, value, WIDTH**-0.5)}


def _peak(call: Callable[[], Any], device: torch.device) -> float | None:
    """MiB that the process, or what torch holds on a GPU, grows by at most in one call; None where nobody tells."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        held = torch.cuda.memory_allocated(device)
        call()
        return (torch.cuda.max_memory_allocated(device) - held) / 2**20
    try:
        ctypes.CDLL(None).malloc_trim(0)  # what earlier calls freed would hide what this one takes
        Path("/proc/self/clear_refs").write_text("5")
    except (AttributeError, OSError):
        return None
    before = _status("VmRSS")
    call()
    return (_status("VmHWM") - before) / 1024


def _status(entry: str) -> int:
    """KiB, from what Linux tells about this process."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(entry)).split()[1])


def _print(result: Mapping[str, Any], console: Console) -> None:
    about = ", ".join(str(value) for value in result["environment"].values())
    table = Table(
        *("input", "tokens", "variant", "ms (spread)", "x sdpa", "peak MiB", "error to fp64"),
        title=f"median of {result['repeats']}; {about}",
    )
    for row in result["rows"]:
        table.add_row(
            row["input"],
            str(row["tokens"]),
            row["variant"],
            f"{row['milliseconds']:.1f} ({row['spread']:.1f})",
            f"{row['over_sdpa']:.2f}",
            "" if row["megabytes"] is None else f"{row['megabytes']:.0f}",
            "" if row["error"] is None else f"{row['error']:.1e}",
        )
    console.print(table)
