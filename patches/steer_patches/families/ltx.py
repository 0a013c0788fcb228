"""LTX-Video: self-attention over the packed video, text in cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import UNTUNED, Family, Grid, Preset, Stage, register


def grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """Frames, height and width of the latents, as the pipeline passes them; one row where it passes coordinates."""
    size = (arguments.get("num_frames"), arguments.get("height"), arguments.get("width"))
    tokens = arguments["hidden_states"].shape[1]
    if None in size or size[0] * size[1] * size[2] != tokens:
        return 1, 1, tokens
    return size


LTX = register(
    Family(
        name="LTX-Video",
        models=("LTXVideoTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(Stage("transformer_blocks", returns=("hidden_states",)),),
        grid=grid,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
        },
    )
)
