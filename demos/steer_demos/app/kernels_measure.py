"""What a block mask saves: by its figures, by the clock of this machine, and on the published models."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from functools import cache

import torch
import torch.nn.functional as F

from steer.model_shapes import model_shape
from steer.simulate import amdahl, attention_flops, forward_flops
from steer.sparse import Sparse
from steer_demos.app.jobs import Job
from steer_demos.app.kernels_form import Grid
from steer_demos.app.kernels_pictures import SEEN, Explored
from steer_kernels import block_sparse_attention
from steer_kernels.block_sparse import backend_for
from steer_patches.family import FAMILIES
from steer_patches.sites import find_sites

MOST_MEASURED = 8_192  # tokens: a dense call of one head takes about a second on one core
HEADS, HEAD_DIM, RUNS = 2, 64, 3
SAMPLE = 2**21  # pairs of tokens that are looked at to find the share that is seen


def figures(explored: Explored, query: Grid, attention_share: float) -> dict[str, str]:
    """What a mask saves, as rows of a table.

    Args:
        query: (frame, row, column).
        attention_share: of a dense step's time.

    Raises:
        ValueError: a share that is no fraction, or no such query.
    """
    if not 0 <= attention_share <= 1:
        raise ValueError(f"attention_share={attention_share} must be a fraction from 0 to 1")
    mask = explored.mask
    computed, partial = int(mask.to_bool().sum()), int(mask.partial_bool().sum())
    rows, columns = mask.shape[-2:]
    visual, text = explored.levels(query)
    sees = int((visual == SEEN).sum() + (text == SEEN).sum())
    share, exact = seen_share(explored)
    step = amdahl(attention_share, 1 / mask.density) if mask.density else float("inf")
    frame, row, column = query
    seen = f"{sees:,} of {mask.kv_len:,} tokens ({sees / mask.kv_len:.2%})"
    return {
        "density": f"**{mask.density:.2%}** of the blocks are computed",
        "blocks": f"{computed:,} of {rows:,} × {columns:,}; in {partial:,} some tokens are hidden",
        "pairs of tokens seen": f"{'' if exact else 'about '}{share:.2%}",
        f"frame {frame}, row {row}, column {column}": f"sees {seen}",
        "attention, at best": f"**{1 / mask.density:.2f} times** as fast (1 / density)"
        if computed
        else "nothing is left",
        "a whole step, at best": f"{step:.2f} times as fast, where attention is {attention_share:.0%} of it",
    }


def seen_share(explored: Explored) -> tuple[float, bool]:
    """The fraction of all pairs (query, key) that are visible, and whether all queries were looked at."""
    mask = explored.mask
    count = min(mask.q_len, max(16, SAMPLE // mask.kv_len))
    queries = (torch.arange(count) * mask.q_len + mask.q_len // 2) // count
    return float(mask.to_tokens(queries).float().mean()), count == mask.q_len


def measure(explored: Explored, job: Job) -> dict[str, str]:
    """Dense attention against the sparse kernel on this machine, as rows of a table; it can be stopped between calls.

    Both are called on random float32 tensors (1, HEADS, tokens, HEAD_DIM), once to warm up and RUNS times by the clock.
    The error is the largest difference from torch's dense attention with the mask of tokens.

    Raises:
        ValueError: the sequence is too long.
    """
    mask = explored.mask
    if mask.q_len > MOST_MEASURED:
        raise ValueError(
            f"{mask.q_len:,} tokens take too long to measure here: at most {MOST_MEASURED:,}. Make the grid smaller"
        )
    device = "cuda" if torch.cuda.is_available() else "cpu"
    mask, seed = mask.to(device), torch.Generator().manual_seed(0)
    shape = (1, HEADS, mask.q_len, HEAD_DIM)
    query, key, value = (torch.randn(shape, generator=seed).to(device) for _ in range(3))
    calls: dict[str, Callable[[], torch.Tensor]] = {
        "dense": lambda: F.scaled_dot_product_attention(query, key, value, is_causal=mask.causal),
        "sparse": lambda: block_sparse_attention(query, key, value, mask),
    }
    seconds: dict[str, list[float]] = {name: [] for name in calls}
    done, total = 0, len(calls) * (RUNS + 1) + 1
    with torch.no_grad():
        for run in range(RUNS + 1):
            for name, attend in calls.items():
                job.step(done, total, f"{name} attention, run {run} of {RUNS}" if run else f"{name}, to warm up")
                took = _seconds(attend, device)
                if run:
                    seconds[name].append(took)
                done += 1
        job.step(done, total, "the error")
        wanted = F.scaled_dot_product_attention(query, key, value, attn_mask=mask.to_tokens())
        error = float((calls["sparse"]() - wanted).nan_to_num().abs().max())
    dense, sparse = (statistics.median(seconds[name]) for name in calls)
    backend = backend_for(query, key, value, mask)
    return {
        f"{mask.q_len:,} tokens, {HEADS} heads of {HEAD_DIM}": f"on {device}, medians of {RUNS} runs",
        "dense attention" + (", causal" if mask.causal else ""): f"{1000 * dense:.1f} ms",
        f"block_sparse_attention ({backend})": f"{1000 * sparse:.1f} ms",
        "speed-up": f"**{dense / sparse:.2f} times** as fast; the bound is {1 / mask.density:.2f}",
        "density": f"{mask.density:.2%}",
        "largest error": f"{error:.1e} against dense attention with this mask",
    }


def _seconds(attend: Callable[[], torch.Tensor], device: str) -> float:
    start = time.perf_counter()
    attend()
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter() - start


def published(name: str) -> tuple[Grid, int, bool]:
    """The grid of a published model at its own size, the text tokens in its sequences, and whether they come first."""
    shape = model_shape(name)
    joint = any(site.kind == "joint" for site in find_sites(shape.build()))
    text_first = next(family.text_first for family in FAMILIES if shape.model in family.models)
    return shape.grid(), shape.text_tokens if joint else 0, joint and text_first


@cache
def attention_share(name: str) -> float:
    """What part of the FLOPs of a published model's forward, at its own size, is attention among its tokens."""
    shape = model_shape(name)
    grid, text, _ = published(name)
    sites = [site for site in find_sites(shape.build()) if site.kind in Sparse.kinds]
    tokens = grid[0] * grid[1] * grid[2] + text
    return sum(attention_flops(site, tokens) for site in sites) / forward_flops(shape, shape.pixels(None, None, None))
