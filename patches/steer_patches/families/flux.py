"""FLUX.1: double blocks and single blocks, both over [text, image]; guidance-distilled, true CFG in two calls."""

from collections.abc import Mapping
from typing import Any

import torch

from steer_patches.family import UNTUNED, Family, Grid, Preset, Stage, register


def grid(model: torch.nn.Module, arguments: Mapping[str, Any]) -> Grid:
    """Rows and columns from the position ids; a sequence with reference images is given as one row."""
    tokens, ids = arguments["hidden_states"].shape[1], arguments.get("img_ids")
    if ids is None or torch.compiler.is_compiling():
        return 1, 1, tokens
    ids = ids[0] if ids.ndim == 3 else ids
    width = _width(ids)
    place = torch.arange(tokens, device=ids.device)
    raster = torch.stack([torch.zeros_like(place), place // width, place % width], 1).to(ids.dtype)
    one = tokens % width == 0 and torch.equal(ids, ids[0] + raster)  # references may well fill whole rows
    return (1, tokens // width, width) if one else (1, 1, tokens)


def _width(ids: torch.Tensor) -> int:
    """Tokens before the row number first changes."""
    changes = (ids[1:, 1] != ids[:-1, 1]).nonzero()
    return int(changes[0]) + 1 if len(changes) else len(ids)


DOUBLE_BLOCKS = 19  # of FLUX.1-dev; the paper counts the single blocks on from there
HEADS: dict[str, tuple[tuple[int, int], ...]] = {  # (layer, head)
    "flux-bokeh": ((35, 8), (34, 0)),
    "flux-glossy": ((43, 17),),
    "flux-golden-hour": ((35, 16), (36, 2), (38, 18)),
    "flux-vintage-film": ((51, 23),),
    "flux-warm": ((52, 22),),
    "flux-green": ((52, 12),),
    "flux-cool": ((52, 6),),
    "flux-rgb-split": ((51, 16),),
    "flux-autumn": ((54, 23),),
}


def _heads(name: str, heads: tuple[tuple[int, int], ...]) -> Preset:
    """SoftPAG on these (layer, head) of FLUX.1-dev, scale 8; all of them lie in single blocks."""
    layers = sorted({layer for layer, _ in heads})
    chosen = {
        f"single_transformer_blocks.{layer - DOUBLE_BLOCKS}.attn": [h for at, h in heads if at == layer]
        for layer in layers
    }
    source = (
        "arXiv 2506.10978, FLUX.1-dev at 512 x 512, 15 steps; read off a figure, what each head does is a description "
        "of its pictures; the strength is not stated"
    )
    return Preset({"heads": chosen, "mode": "all", "scale": 8.0}, source, name)


BLOCKS: Mapping[str, Any] = {
    "returns": ("encoder_hidden_states", "hidden_states"),
    "tokens": "hidden_states",
    "tables": {"image_rotary_emb": ("T+S D",), "joint_attention_kwargs.attention_mask": ()},
    "between": ("controlnet_block_samples", "controlnet_single_block_samples"),
}

FLUX = register(
    Family(
        name="FLUX",
        models=("FluxTransformer2DModel",),
        kinds={"*.attn": "joint"},
        stages=(Stage("transformer_blocks", **BLOCKS), Stage("single_transformer_blocks", **BLOCKS)),
        grid=grid,
        text_first=True,
        cfg="sequential",
        presets={
            "PAG": (
                Preset({"layers": "transformer_blocks.13"}, UNTUNED),
                *(_heads(name, heads) for name, heads in HEADS.items()),
            ),
            "SEG": Preset({"layers": "transformer_blocks.13"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.13"}, UNTUNED),
            "NeighborhoodAttention": Preset(
                {"window": (80, 80), "stride": (16, 16), "steps": "0.32:"},
                "arXiv 2504.16922, FLUX.1-dev with a 4K adapter at 256 x 256 tokens, 9 of 28 steps dense",
                "flux-4k",
            ),
        },
    )
)
