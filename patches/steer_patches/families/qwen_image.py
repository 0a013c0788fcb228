"""Qwen-Image: joint attention over [text, image]; true CFG in two calls, renormalised by the pipeline."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import UNTUNED, Family, Grid, Preset, Stage, register


def grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """The first picture's grid; where reference images follow, all visual tokens as one row."""
    tokens = arguments["hidden_states"].shape[1]
    shapes = arguments.get("img_shapes")
    if not shapes:
        return 1, 1, tokens
    first = shapes[0]
    frames, height, width = first[0] if isinstance(first, list) else first
    return (frames, height, width) if frames * height * width == tokens else (1, 1, tokens)


QWEN_IMAGE = register(
    Family(
        name="Qwen-Image",
        models=("QwenImageTransformer2DModel",),
        kinds={"*.attn": "joint"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("encoder_hidden_states", "hidden_states"),
                tokens="hidden_states",
                tables={"image_rotary_emb.0": ("S D",), "modulate_index": ("B S",)},  # item 1 is the text's
                between=("controlnet_block_samples",),
            ),
        ),
        grid=grid,
        text_first=True,
        cfg="sequential",
        affine=False,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.30"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.30"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.30"}, UNTUNED),
        },
    )
)
