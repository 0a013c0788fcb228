"""A process of its own that replays saved methods: python artifact_replay.py OUTPUT MODEL FOLDER [MODEL FOLDER ...]

Writes what each model draws with the method of the folder to OUTPUT, a safetensors file, under the model's name.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

import torch
from safetensors.torch import save_file
from tiny_pipelines import PIPELINES

import steer
from steer_demos import models

PROMPT = "a red apple on a blue background, noto style"
SEED = 7


def open_tiny() -> tuple[Any, dict[str, Any]]:
    """Tiny SD3 and the arguments of a call."""
    pipe = PIPELINES["sd3"].build()
    call = PIPELINES["sd3"].call_kwargs(pipe, seed=SEED)
    del call["generator"]
    return pipe, call


def open_emoji() -> tuple[Any, dict[str, Any]]:
    """The embedded pipeline and the arguments of a call."""
    pipe = models.load("emoji-mmdit", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe, {"prompt": PROMPT, "num_inference_steps": 3, "max_sequence_length": 0, "output_type": "pt"}


OPEN: dict[str, Callable[[], tuple[Any, dict[str, Any]]]] = {"sd3": open_tiny, "emoji-mmdit": open_emoji}


def draw(pipe: Any, call: dict[str, Any]) -> torch.Tensor:
    """One picture, (1, C, H, W), from the seed."""
    return pipe(**call, generator=torch.Generator().manual_seed(SEED), return_dict=False)[0].contiguous()


def main(output: str, *pairs: str) -> None:
    torch.set_num_threads(1)
    drawn = {}
    for name, folder in zip(pairs[::2], pairs[1::2], strict=True):
        pipe, call = OPEN[name]()
        with steer.apply(pipe, steer.load(folder)):
            drawn[name] = draw(pipe, call)
    save_file(drawn, output)


if __name__ == "__main__":
    main(*sys.argv[1:])
