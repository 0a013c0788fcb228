"""Baseline beside steered, from the same seed: outputs, how far apart they are, and what each cost."""

from __future__ import annotations

import math
import time
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from diffusers import DiffusionPipeline

from steer.apply import apply
from steer.method import Method


@dataclass
class Comparison:
    """What `steer.compare` found.

    Args:
        baseline, steered: the outputs of the two runs, as the pipeline or model returns them.
        psnr: peak signal-to-noise ratio between the two in dB (pipelines; infinite where they are equal).
        kl: mean KL divergence from baseline to steered next-token distributions in nats (language models).
        baseline_seconds, steered_seconds: wall time of each run.
        density: share of query-key pairs computed; None where no method is sparse.
        summary: `Handle.summary()` of the steered run.
    """

    baseline: Any
    steered: Any
    psnr: float | None
    kl: float | None
    baseline_seconds: float
    steered_seconds: float
    density: float | None
    summary: str

    def __str__(self) -> str:
        distance = f"PSNR {self.psnr:.2f} dB" if self.psnr is not None else f"KL {self.kl:.4g} nats"
        cost = self.steered_seconds / self.baseline_seconds
        lines = [
            f"baseline {self.baseline_seconds:.2f} s, steered {self.steered_seconds:.2f} s ({cost:.2f}x), {distance}"
        ]
        if self.density is not None:
            lines.append(f"density {self.density:.3f}")
        return "\n".join([*lines, self.summary])


def compare(target: Any, *methods: Method, seed: int = 0, **pipeline_kwargs: Any) -> Comparison:
    """Run a pipeline or model without and with methods on the same input.

    Args:
        target: a pipeline (called with `pipeline_kwargs`) or a model (forward with them).
        methods: what to apply in the second run.
        seed: seeds both runs; where `pipeline_kwargs` has a generator, its present state starts both.
    """
    generator = pipeline_kwargs.pop("generator", None)
    generators = generator if isinstance(generator, list) else [generator] if generator is not None else []
    states = [g.get_state() for g in generators]

    def run() -> tuple[Any, float]:
        torch.manual_seed(seed)
        arguments = dict(pipeline_kwargs)
        for g, state in zip(generators, states, strict=True):
            g.set_state(state)
        if isinstance(target, DiffusionPipeline):
            arguments["generator"] = generator if generator is not None else torch.Generator().manual_seed(seed)
        began = time.perf_counter()
        with torch.no_grad():
            out = target(**arguments)
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        return out, time.perf_counter() - began

    baseline, baseline_seconds = run()
    with apply(target, *methods) as handle:
        steered, steered_seconds = run()
        summary, density = handle.summary(), handle.stats.get("density")
    psnr = kl = None
    if hasattr(baseline, "logits"):
        kl = _kl(baseline.logits, steered.logits)
    else:
        psnr = _psnr(_pixels(baseline), _pixels(steered))
    return Comparison(baseline, steered, psnr, kl, baseline_seconds, steered_seconds, density, summary)


def _pixels(output: Any) -> np.ndarray:
    """The first field of an output as floats; PIL images scaled to 0..1."""
    value = output[0]
    if isinstance(value, torch.Tensor):
        return value.detach().float().cpu().numpy()
    flat = value[0] if isinstance(value[0], list) else value
    if isinstance(flat, np.ndarray):
        return flat.astype(np.float64)
    return np.stack([np.asarray(image, dtype=np.float64) / 255 for image in flat])


def _psnr(a: np.ndarray, b: np.ndarray) -> float:
    """dB, relative to a peak of 1 for pictures and of the baseline's range for latents."""
    error = float(np.mean((a - b) ** 2))
    peak = 1.0 if a.min() >= 0 and a.max() <= 1 else float(a.max() - a.min())
    return math.inf if error == 0 else 10 * math.log10(peak**2 / error)


def _kl(a: torch.Tensor, b: torch.Tensor) -> float:
    p, q = a.float().log_softmax(-1), b.float().log_softmax(-1)
    return float((p.exp() * (p - q)).sum(-1).mean())
