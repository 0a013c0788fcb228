"""HunyuanVideo and HunyuanVideo 1.5: joint attention over [video, text]; the text refiner is a stage of its own."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register


def text_of_three(model: torch.nn.Module, arguments: Mapping[str, Any]) -> int:
    """Tokens of the two text encoders and of the image, which HunyuanVideo 1.5 puts one after the other."""
    names = ("encoder_hidden_states", "encoder_hidden_states_2", "image_embeds")
    return sum(arguments[name].shape[1] for name in names)


RADIAL = Preset(
    {"decay": 0.95, "key_frame_sink": False, "steps": "0.24:", "dense_layers": 0},
    "published scripts for HunyuanVideo, 117 frames of 768x1280, 12 of 50 steps dense",
    "hunyuanvideo",
)
NEIGHBORHOOD = (
    Preset(
        {"window": (18, 24, 24), "stride": (16, 8, 8), "steps": "0.3:"},
        "arXiv 2504.16922, HunyuanVideo at 30 x 48 x 80 tokens, 15 of 50 steps dense",
        "hunyuanvideo-18x24x24",
    ),
    Preset(
        {"window": (30, 40, 40), "stride": (1, 32, 8), "steps": "0.3:"},
        "arXiv 2504.16922, the denser of its two settings for HunyuanVideo, 15 of 50 steps dense",
        "hunyuanvideo-30x40x40",
    ),
)
BLOCKS: Mapping[str, Any] = {
    "returns": ("hidden_states", "encoder_hidden_states"),
    "tokens": "hidden_states",
    "raster": ("num_tokens",),  # image to video by token replacement treats the first frame apart
}
DOUBLE = Stage("transformer_blocks", tables={"freqs_cis": ("S D",)}, **BLOCKS)
SINGLE = Stage("single_transformer_blocks", tables={"image_rotary_emb": ("S D",)}, **BLOCKS)
PRESETS = {
    "PAG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
    "SEG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
    "SLG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
}

HUNYUAN_VIDEO = register(
    Family(
        name="HunyuanVideo",
        models=("HunyuanVideoTransformer3DModel",),
        kinds={"context_embedder.*": "text", "*.attn": "joint"},
        stages=(Stage("context_embedder"), DOUBLE, SINGLE),
        grid=patched(),
        video=True,
        cfg="sequential",
        presets=PRESETS | {"RadialAttention": RADIAL, "NeighborhoodAttention": NEIGHBORHOOD},
    )
)

HUNYUAN_VIDEO_15 = register(
    Family(
        name="HunyuanVideo 1.5",
        models=("HunyuanVideo15Transformer3DModel",),
        text_tokens=text_of_three,
        kinds={"context_embedder.*": "text", "*.attn": "joint"},
        stages=(Stage("context_embedder"), DOUBLE),
        grid=patched(),
        video=True,
        cfg="sequential",
        presets=PRESETS,
    )
)
