"""The figures that every evaluation reports: shares with bootstrap intervals, and the Frechet distance."""

import numpy as np

FIRST_SEED = 10_000  # of the pictures and clips that are judged; nothing was chosen on these seeds
BOOTSTRAP_SAMPLES = 1000

Interval = tuple[float, float]


def share(right: np.ndarray) -> tuple[float, Interval]:
    """The mean of (N,) values from 0 to 1, and its 95 % bootstrap interval."""
    samples = np.random.default_rng(0).choice(right, (BOOTSTRAP_SAMPLES, len(right))).mean(axis=1)
    low, high = np.percentile(samples, [2.5, 97.5])
    return float(right.mean()), (float(low), float(high))


def frechet_distance(first: np.ndarray, second: np.ndarray) -> float:
    """Frechet distance between Gaussians fitted to features (N, D) and (M, D)."""
    mean = first.mean(0) - second.mean(0)
    one, two = np.cov(first, rowvar=False), np.cov(second, rowvar=False)
    eigenvalues = np.linalg.eigvals(one @ two)
    return float(mean @ mean + np.trace(one) + np.trace(two) - 2 * np.sqrt(np.maximum(eigenvalues.real, 0)).sum())
