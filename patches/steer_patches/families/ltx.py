"""LTX-Video: self-attention over the packed video, text in cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import UNTUNED, Family, Grid, Preset, Stage, register


def grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """Frames, height and width of the latents, as the pipeline passes them; one row where it passes coordinates."""
    frames, height, width = (arguments.get(name) or 0 for name in ("num_frames", "height", "width"))
    tokens = arguments["hidden_states"].shape[1]
    return (frames, height, width) if frames * height * width == tokens else (1, 1, tokens)


LTX = register(
    Family(
        name="LTX-Video",
        models=("LTXVideoTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("hidden_states",),
                tokens="hidden_states",
                tables={"image_rotary_emb": ("B S C",), "temb": ("B 1 C", "B S C")},
            ),
        ),
        grid=grid,
        video=True,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
        },
    )
)
