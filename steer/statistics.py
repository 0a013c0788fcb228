"""Intervals around means."""

from __future__ import annotations

import numpy as np
import torch

RESAMPLES = 1000


def mean_interval(values: torch.Tensor) -> tuple[float, tuple[float, float]]:
    """The mean of (N,) values and its 95 % bootstrap interval over them, from a fixed seed."""
    array = values.double().numpy()
    means = np.random.default_rng(0).choice(array, (RESAMPLES, len(array))).mean(axis=1)
    low, high = np.percentile(means, [2.5, 97.5])
    return float(array.mean()), (float(low), float(high))
