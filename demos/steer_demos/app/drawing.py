"""A prompt drawn without and with a method, for the tabs of pictures and of clips."""

from __future__ import annotations

import inspect
import math
import random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageChops

import steer
from steer.compare import Comparison
from steer.method import Method
from steer_demos import models
from steer_demos.app.jobs import Job
from steer_demos.app.stage import Loaded
from steer_demos.evaluate_pictures import prompt_options

LONGEST_PROMPT = 2_000  # characters
MOST_STEPS = 200
MOST_SCALE = 100
MOST_SEED = 2**31 - 1


def seed_of(seed: float) -> int:
    """The seed that was asked for; a new one for a negative number.

    Raises:
        ValueError: it is no whole number, or too large.
    """
    if not math.isfinite(seed) or seed != int(seed) or seed > MOST_SEED:
        raise ValueError(f"seed={seed:g} is no seed: give a whole number up to {MOST_SEED}, or -1 for a new one")
    return random.randrange(MOST_SEED) if seed < 0 else int(seed)


def draw_pair(
    loaded: Loaded,
    method: Method,
    prompt: str,
    job: Job,
    *,
    seed: int,
    steps: float,
    guidance_scale: float,
    call: Mapping[str, Any] | None = None,
) -> Comparison:
    """`steer.compare` of a pipeline, with progress; it can be stopped between two steps.

    Args:
        loaded: a pipeline.
        steps: of each of the two runs.
        call: more arguments of the pipeline.

    Raises:
        ValueError: the prompt is empty or too long, the steps are too many.
    """
    if not prompt.strip():
        raise ValueError("the prompt is empty: say what to draw")
    if len(prompt) > LONGEST_PROMPT:
        raise ValueError(f"the prompt has {len(prompt)} characters; at most {LONGEST_PROMPT} are taken")
    if not 1 <= steps <= MOST_STEPS or steps != int(steps):
        raise ValueError(f"steps={steps:g} must be a whole number from 1 to {MOST_STEPS}")
    if not 0 <= guidance_scale <= MOST_SCALE:
        raise ValueError(f"guidance_scale={guidance_scale:g} must be a number from 0 to {MOST_SCALE}")
    pipe, steps = loaded.model, int(steps)  # a whole number, which some pipelines want as such
    pipe.set_progress_bar_config(disable=True)
    options = models.call_options(loaded.name) | prompt_options(pipe) | dict(call or {})
    options |= {"prompt": prompt, "guidance_scale": guidance_scale, "output_type": "pil"}
    steer.apply(pipe, method).remove()  # what the model refuses, it refuses before the first step
    if not loaded.warm:
        job.step(0, 2 * steps, "first step of this model")
        with torch.no_grad():
            pipe(**options, num_inference_steps=1, generator=torch.Generator().manual_seed(seed))
        loaded.warm = True
    done = 0

    def stepped(pipe: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done
        done += 1
        job.step(done, 2 * steps, "without" if done <= steps else f"with {type(method).__name__}")
        return tensors

    if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
        options["callback_on_step_end"] = stepped
    return steer.compare(pipe, method, seed=seed, num_inference_steps=steps, **options)


def imports(method: str) -> str:
    """What code with this expression for a method needs from the standard library."""
    return "import dataclasses\n\n" if "dataclasses." in method else ""


def difference(one: Image.Image, other: Image.Image) -> Image.Image:
    """How far two pictures are apart at each pixel, made as bright as it can be; black where they are equal."""
    apart = ImageChops.difference(one.convert("RGB"), other.convert("RGB"))
    most = int(np.asarray(apart).max())
    return apart.point(lambda value: value * 255 // most) if most else apart


def enlarged(picture: Image.Image, to: int = 256) -> Image.Image:
    """A small picture with whole, larger pixels, so that a browser does not blur it; others as they are."""
    factor = to // max(picture.size)
    if factor < 2:
        return picture
    return picture.resize((picture.width * factor, picture.height * factor), Image.Resampling.NEAREST)


def table(rows: Mapping[str, str]) -> str:
    """Figures as a Markdown table whose header is the first of them."""
    first, *others = (f"| {name} | {value} |" for name, value in rows.items())
    return "\n".join([first, "|---|---|", *others])


def figures(found: Comparison, method: Method) -> dict[str, str]:
    """What a comparison measured, as rows of a table."""
    name, cost = type(method).__name__, found.steered_seconds / found.baseline_seconds
    rows = {
        "without": f"{found.baseline_seconds:.2f} s",
        f"with {name}": f"{found.steered_seconds:.2f} s, {cost:.2f} times as long",
        "difference": "none, to the bit" if found.psnr == float("inf") else f"PSNR {found.psnr:.1f} dB",
    }
    if found.density is not None:
        rows["density"] = f"{100 * found.density:.1f} % of the attention map was computed, over the whole run"
    return rows


def python(loaded: Loaded, method: str, prompt: str, seed: int, call: Mapping[str, Any]) -> str:
    """The steered run as code to copy.

    Args:
        method: as an expression of Python.
    """
    options = {**models.call_options(loaded.name), **call}
    arguments = "".join(f", {name}={value!r}" for name, value in options.items())
    return (
        f"{imports(method)}import steer\nimport torch\nfrom steer_demos import models\n\n"
        f"pipe = models.load({loaded.name!r})\n"
        f"with steer.apply(pipe, {method}):\n"
        f"    out = pipe({prompt!r}{arguments}, generator=torch.Generator().manual_seed({seed}))\n"
    )
