"""`steer bench guidance`: the cost of a perturbed pass, with and without prefix sharing, beside diffusers' pipelines.

Random weights at a realistic shape: latency does not depend on the weights. Every ratio stands next to the relative
error of the output against diffusers' PAG pipeline in the same run.
"""

from __future__ import annotations

import inspect
import json
import platform
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import diffusers
import torch
from diffusers import (
    DDIMScheduler,
    DiffusionPipeline,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    UNet2DConditionModel,
)
from rich.console import Console
from rich.table import Table
from tqdm.auto import tqdm

from steer.apply import apply
from steer.method import methods

SCALE, CFG = 3.0, 5.0


def run(
    blocks: list[int], *, repeats: int, device: str | None, small: bool, output: str | None, console: Console
) -> dict[str, Any]:
    """Time the settings, print a table, and write JSON if `output` names a file."""
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    dtype, steps = (torch.bfloat16, 4) if device == "cuda" else (torch.float32, 1)
    rows = []
    with torch.no_grad():
        sd3, sd3_call = _sd3(device, dtype, small)
        depth = len(sd3.transformer.transformer_blocks)
        chosen = [depth // 2] if small else blocks
        missing = [block for block in chosen if not 0 <= block < depth]
        if missing:
            raise ValueError(f"--layers: blocks {missing} do not exist; this SD3 has blocks 0 to {depth - 1}")
        rows += _measure(
            "SD3",
            sd3,
            sd3_call,
            StableDiffusion3PAGPipeline,
            [f"transformer_blocks.{b}" for b in chosen],
            [rf"blocks\.{b}\." for b in chosen],
            steps,
            repeats,
        )
        del sd3
        unet, unet_call = _unet(device, dtype, small)
        rows += _measure("SD1.5", unet, unet_call, StableDiffusionPAGPipeline, ["mid_block"], ["mid"], steps, repeats)
    result = {
        "environment": _environment(device, dtype),
        "small": small,
        "steps": steps,
        "scale": SCALE,
        "guidance_scale": CFG,
        "repeats": repeats,
        "rows": rows,
    }
    _print(result, console)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}")
    return result


SD3_SHAPE = {"cuda": (24, 24, 64, 128, 333), "cpu": (24, 8, 64, 64, 154)}  # blocks, heads, head width, latents, text
SD3_SMALL = (4, 4, 16, 16, 20)


def _sd3(device: str, dtype: torch.dtype, small: bool) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """24 joint blocks: SD3-medium's width 1536 and 4096 image tokens on a GPU, width 512 and 1024 tokens on a CPU."""
    return random_sd3(SD3_SMALL if small else SD3_SHAPE[device], device, dtype)


def random_sd3(
    shape: tuple[int, int, int, int, int], device: str, dtype: torch.dtype
) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """An SD3 pipeline of random weights, and arguments that draw a picture with it.

    Args:
        shape: blocks, heads, channels of a head, rows of the square latents, text tokens.
        device, dtype: of the weights.
    """
    torch.manual_seed(0)
    layers, heads, width, size, text = shape
    model = SD3Transformer2DModel(
        sample_size=size,
        num_layers=layers,
        num_attention_heads=heads,
        attention_head_dim=width,
        caption_projection_dim=heads * width,
        joint_attention_dim=512,
        pooled_projection_dim=256,
        pos_embed_max_size=96,
    )
    pipe = StableDiffusion3Pipeline(
        transformer=_ready(model, device, dtype),
        scheduler=FlowMatchEulerDiscreteScheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    embeds, pooled = (
        torch.randn(2, text, 512, device=device, dtype=dtype),
        torch.randn(2, 256, device=device, dtype=dtype),
    )
    return pipe, dict(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        pooled_prompt_embeds=pooled[:1],
        negative_pooled_prompt_embeds=pooled[1:],
        height=size * 8,
        width=size * 8,
    )


def _unet(device: str, dtype: torch.dtype, small: bool) -> tuple[DiffusionPipeline, dict[str, Any]]:
    """The SD1.5 UNet's own configuration, at 64 x 64 latents on a GPU and 32 x 32 on a CPU."""
    torch.manual_seed(0)
    widths, size = ((32, 64, 64, 64), 16) if small else ((320, 640, 1280, 1280), 64 if device == "cuda" else 32)
    model = UNet2DConditionModel(
        sample_size=size,
        block_out_channels=widths,
        cross_attention_dim=768,
        attention_head_dim=8,
    )
    pipe = StableDiffusionPipeline(
        unet=_ready(model, device, dtype),
        scheduler=DDIMScheduler(steps_offset=1, clip_sample=False),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    embeds = torch.randn(2, 77, 768, device=device, dtype=dtype)
    return pipe, dict(
        prompt_embeds=embeds[:1],
        negative_prompt_embeds=embeds[1:],
        height=size * 8,
        width=size * 8,
    )


def _ready(model: torch.nn.Module, device: str, dtype: torch.dtype) -> torch.nn.Module:
    """On the device, with every zero-initialised parameter drawn, so that all blocks matter to the output."""
    for parameter in model.parameters():
        if not parameter.any():
            torch.nn.init.normal_(parameter, std=0.02)
    model = model.eval().requires_grad_(False).to(device, dtype)
    return model.to(memory_format=torch.channels_last) if isinstance(model, UNet2DConditionModel) else model


def _measure(
    family: str,
    pipe: DiffusionPipeline,
    call: dict[str, Any],
    peer_class: Any,
    layers: list[str],
    peer_layers: list[str],
    steps: int,
    repeats: int,
) -> list[dict[str, Any]]:
    pipe.set_progress_bar_config(disable=True)
    pag: Any = methods()["PAG"]
    guided = dict(call, guidance_scale=CFG, num_inference_steps=steps, output_type="latent")

    def sample(p: DiffusionPipeline, **more: Any) -> Callable[[], torch.Tensor]:
        return lambda: p(**guided, **more, generator=torch.Generator().manual_seed(0))[0]

    variants: list[tuple[str, str, Callable[[], torch.Tensor]]] = [("CFG only", "", sample(pipe))]
    for layer, peer_layer in zip(layers, peer_layers, strict=True):
        peer = _peer(pipe, peer_class, peer_layer)
        variants.append(("diffusers PAG", layer, sample(peer, pag_scale=SCALE)))
        for name, settings in (
            ("steer batched", {"extra": "batched"}),
            ("steer unshared", {"share_prefix": False}),
            ("steer shared", {}),
        ):
            variants.append((name, layer, _steered(pipe, pag(scale=SCALE, layers=layer, **settings), sample(pipe))))
    seconds: dict[int, list[float]] = {i: [] for i in range(len(variants))}
    outputs = {}
    with tqdm(total=len(variants) * (repeats + 1), desc=f"bench guidance {family}") as bar:
        for repeat in range(
            repeats + 1
        ):  # the variants take turns, so that a noisy moment hits them all; first = warm-up
            for i, (_, _, draw) in enumerate(variants):
                began = time.perf_counter()
                outputs[i] = draw()
                if outputs[i].is_cuda:
                    torch.cuda.synchronize()
                if repeat:
                    seconds[i].append(time.perf_counter() - began)
                bar.update()
    rows: list[dict[str, Any]] = []
    for i, (name, layer, _) in enumerate(variants):
        peer_index = next((j for j, v in enumerate(variants) if v[:2] == ("diffusers PAG", layer)), None)
        row: dict[str, Any] = {
            "family": family,
            "variant": name,
            "layer": layer,
            "seconds": statistics.median(seconds[i]),
            "spread": max(seconds[i]) - min(seconds[i]),
        }
        row["over_cfg"] = row["seconds"] / statistics.median(seconds[0])
        if peer_index is not None:
            row["over_diffusers"] = row["seconds"] / statistics.median(seconds[peer_index])
            row["error"] = float((outputs[i] - outputs[peer_index]).norm() / outputs[peer_index].norm())
        rows.append(row)
    return rows


def _peer(pipe: DiffusionPipeline, peer_class: Any, layer: str) -> DiffusionPipeline:
    """diffusers' PAG pipeline around the same components; it installs and removes its processors on every call."""
    taken = inspect.signature(peer_class.__init__).parameters
    components = {name: part for name, part in pipe.components.items() if name in taken}
    extra = {"requires_safety_checker": False} if "requires_safety_checker" in taken else {}
    peer = peer_class(**components, **extra, pag_applied_layers=[layer])
    peer.set_progress_bar_config(disable=True)
    return peer


def _steered(pipe: DiffusionPipeline, method: Any, draw: Callable[[], torch.Tensor]) -> Callable[[], torch.Tensor]:
    def steered() -> torch.Tensor:
        with apply(pipe, method):
            return draw()

    return steered


def _environment(device: str, dtype: torch.dtype) -> dict[str, Any]:
    name = (
        torch.cuda.get_device_name()
        if device == "cuda"
        else f"{platform.machine()} CPU, {torch.get_num_threads()} threads"
    )
    return {"device": name, "dtype": str(dtype), "torch": torch.__version__, "diffusers": diffusers.__version__}


def _print(result: dict[str, Any], console: Console) -> None:
    env = result["environment"]
    table = Table(
        "model",
        "layer",
        "what",
        "seconds (spread)",
        "x CFG only",
        "x diffusers PAG",
        "relative error",
        title=f"{result['steps']} steps, median of {result['repeats']}; {env['device']}, {env['dtype']}, "
        f"torch {env['torch']}, diffusers {env['diffusers']}" + (", tiny setting" if result["small"] else ""),
    )
    for row in result["rows"]:
        table.add_row(
            row["family"],
            row["layer"],
            row["variant"],
            f"{row['seconds']:.2f} ({row['spread']:.2f})",
            f"{row['over_cfg']:.2f}",
            f"{row['over_diffusers']:.2f}" if "over_diffusers" in row else "",
            f"{row['error']:.1e}" if "error" in row else "",
        )
    console.print(table)
