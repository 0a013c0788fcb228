"""Stable Diffusion 1.5, 2.x and SDXL: convolutional UNets; text only in cross-attention."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import Family, Grid, Preset, Stage, register


def latents(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """Height and width of the latents; each level of the UNet halves them, rounding up."""
    return (1, *arguments["sample"].shape[-2:])


STAGES = (
    Stage("down_blocks", chained=False),  # every output is a skip connection that the up path reads
    Stage("mid_block"),
    Stage("up_blocks"),
)

UNET = register(
    Family(
        name="SD 1.5 / SDXL",
        models=("UNet2DConditionModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=STAGES,
        grid=latents,
        tokens_from_grid=False,
        presets={
            "PAG": Preset({"layers": "mid_block"}, "PAG paper (arXiv 2403.17377) and diffusers' SD and SDXL pipelines"),
            "SEG": Preset({"layers": "mid_block"}, "SEG paper (arXiv 2408.00760), SDXL"),
        },
    )
)
