"""The figures that every evaluation reports: shares with bootstrap intervals, and the Frechet distance."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

FIRST_SEED = 10_000  # of the pictures and clips that are judged; nothing was chosen on these seeds
BOOTSTRAP_SAMPLES = 1000

Interval = tuple[float, float]


def share(right: np.ndarray) -> tuple[float, Interval]:
    """The mean of (N,) values from 0 to 1, and its 95 % bootstrap interval; not a number where there are none."""
    if not len(right):
        return float("nan"), (float("nan"), float("nan"))
    samples = np.random.default_rng(0).choice(right, (BOOTSTRAP_SAMPLES, len(right))).mean(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(right.mean()), (float(low), float(high))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features (N, D) and (M, D)."""
    mean = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    eigenvalues = np.linalg.eigvals(one @ two)
    return float(mean @ mean + np.trace(one) + np.trace(two) - 2 * np.sqrt(np.maximum(eigenvalues.real, 0)).sum())


def frechet_interval(features: np.ndarray, reference: np.ndarray) -> tuple[float, Interval]:
    """Frechet distance of features (N, T, D), T frames of N prompts, to a reference (M, D), and its 95 % interval."""

    def distance(part: np.ndarray) -> float:
        return frechet_distance(part.reshape(-1, part.shape[-1]), reference)

    rows = np.random.default_rng(0).integers(len(features), size=(100, len(features)))
    # Resampling repeats prompts, which biases the distance upwards: only its spread is used, around the estimate.
    estimate = distance(features)
    spread = 1.96 * float(np.std([distance(features[row]) for row in rows]))
    return estimate, (estimate - spread, estimate + spread)


def print_results(results: Mapping[str, Any], shares: Mapping[str, tuple[str, str]], prompts: int) -> None:
    """Print one row a result, shares in per cent with their intervals.

    Args:
        results: name -> evaluation with `frechet`, `frechet_interval` and `seconds`.
        shares: title -> the evaluation's attributes that hold the share and its interval.
        prompts: how many there were.
    """
    table = Table("", *shares, "Frechet distance", "seconds")
    for name, result in results.items():
        row = [name]
        for attribute, interval in shares.values():
            low, high = getattr(result, interval)
            row.append(f"{100 * getattr(result, attribute):.1f} % [{100 * low:.1f}, {100 * high:.1f}]")
        low, high = result.frechet_interval
        row += [f"{result.frechet:.2f} [{low:.2f}, {high:.2f}]", f"{result.seconds:.0f}" if result.seconds else "–"]
        table.add_row(*row)
    console = Console()
    console.print(table)
    console.print(f"{prompts} prompts and seeds, 95 % bootstrap intervals over prompts; torch {torch.__version__}")
