"""The published models by name, as data: what builds each transformer without its weights, and inputs of any size."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import diffusers
import torch
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor

Size = tuple[int, int, int]


@dataclass(frozen=True, eq=False)
class ModelShape:
    """The shape of one published model, without weights.

    Args:
        name: as `steer simulate` takes it.
        model: diffusers class of the transformer.
        arguments: (shape, inputs in the making) -> the forward's arguments besides text and timestep.
        source: where the figures are from.
        config: config arguments that differ from the class's defaults.
        patch: latents in a token, (frames, height, width).
        compression: pixels in a latent of the autoencoder, (frames, height, width).
        latent_channels: of the autoencoder.
        text_tokens, text_width: of the prompt, as the pipeline pads it.
        pooled_width: of the pooled prompt, where the model takes one.
        height, width, frames: the default size in pixels.
        steps: the default number.
        passes: forwards a step at batch 1; 2 with classifier-free guidance, 1 where guidance is distilled.
    """

    name: str
    model: str
    arguments: Callable[[ModelShape, Inputs], dict[str, Any]]
    source: str
    config: Mapping[str, Any] = field(default_factory=dict)
    patch: Size = (1, 2, 2)
    compression: Size = (4, 8, 8)
    latent_channels: int = 16
    text_tokens: int = 512
    text_width: int = 4096
    pooled_width: int = 0
    height: int = 720
    width: int = 1280
    frames: int = 81
    steps: int = 50
    passes: int = 2

    def build(
        self, device: torch.device | str = "meta", dtype: torch.dtype = torch.bfloat16, **changes: Any
    ) -> diffusers.ModelMixin:
        """The transformer in eval mode, without gradients; on the meta device it takes no memory, else it is random.

        Args:
            device, dtype: of the weights, which are made in float32; modules that diffusers keeps in it stay so.
            changes: config arguments to set otherwise, e.g. `num_layers=2`.
        """
        with torch.device(device):
            model = getattr(diffusers, self.model)(**{**self.config, **changes})
        exact = set(model._keep_in_fp32_modules or ())  # as `from_pretrained` leaves them
        for name, parameter in model.named_parameters():
            if parameter.dtype != dtype and not exact.intersection(name.split(".")):
                parameter.data = parameter.data.to(dtype)
        return model.eval().requires_grad_(False)

    def latents(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Size:
        """(frames, height, width) of the latents for a size in pixels; None = the model's default.

        Raises:
            ValueError: a size that does not fill whole tokens.
        """
        height, width, frames = self.pixels(height, width, frames)
        over_time, *over_space = self.compression
        for axis, length, each, patch in zip(
            ("height", "width"), (height, width), over_space, self.patch[1:], strict=True
        ):
            if length < 1 or length % (each * patch):
                raise ValueError(f"{axis}={length} of {self.name} must be a multiple of {each * patch} pixels")
        if frames < 1 or (frames - 1) % over_time:
            near = [(frames - 1) // over_time * over_time + 1, max(-(-(frames - 1) // over_time), 0) * over_time + 1]
            allowed = " or ".join(str(n) for n in near if n > 0) if over_time > 1 else "1 or more"
            raise ValueError(f"frames={frames} of {self.name} must be a multiple of {over_time} plus 1, e.g. {allowed}")
        if self.still and frames > 1:
            raise ValueError(f"{self.name} draws single images: leave out frames={frames}")
        length = (frames - 1) // over_time + 1
        return -(-length // self.patch[0]) * self.patch[0], height // over_space[0], width // over_space[1]

    def pixels(self, height: int | None, width: int | None, frames: int | None) -> Size:
        """A size in pixels, (height, width, frames), with the model's own where it is None."""
        own = (self.height, self.width, self.frames)
        height, width, frames = (y if x is None else x for x, y in zip((height, width, frames), own, strict=True))
        return height, width, frames

    @property
    def still(self) -> bool:
        """Whether it draws single images."""
        return self.compression[0] == 1

    def grid(self, height: int | None = None, width: int | None = None, frames: int | None = None) -> Size:
        """(frames, height, width) of the visual tokens for a size in pixels."""
        latents = self.latents(height, width, frames)
        return (latents[0] // self.patch[0], latents[1] // self.patch[1], latents[2] // self.patch[2])

    def inputs(
        self,
        height: int | None = None,
        width: int | None = None,
        frames: int | None = None,
        batch: int = 1,
        device: torch.device | str = "meta",
        dtype: torch.dtype = torch.bfloat16,
        generator: torch.Generator | None = None,
    ) -> dict[str, Any]:
        """Keyword arguments of the forward: random latents and text, of which nothing is padding.

        Args:
            height, width, frames: in pixels; None = the model's default.
            batch: rows.
            device, dtype: of the tensors.
            generator: of the random numbers, on `device`.
        """
        make = Inputs(self.latents(height, width, frames), batch, torch.device(device), dtype, generator)
        return {
            "encoder_hidden_states": make.noise(batch, self.text_tokens, self.text_width),
            "timestep": make.full(500.0, batch),
            **self.arguments(self, make),
        }


@dataclass(frozen=True)
class Inputs:
    """Makes the tensors of one forward.

    Args:
        latents: (frames, height, width).
        batch, device, dtype, generator: see `ModelShape.inputs`.
    """

    latents: Size
    batch: int
    device: torch.device
    dtype: torch.dtype
    generator: torch.Generator | None

    def noise(self, *shape: int) -> Tensor:
        return torch.randn(*shape, generator=self.generator, device=self.device, dtype=self.dtype)

    def full(self, value: float, *shape: int) -> Tensor:
        return torch.full(shape, value, device=self.device)

    def every(self, *shape: int) -> Tensor:
        """A text mask (bool) that hides nothing."""
        return torch.ones(*shape, dtype=torch.bool, device=self.device)

    def video(self, channels: int) -> Tensor:
        return self.noise(self.batch, channels, *self.latents)


def _wan(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    return {"hidden_states": make.video(shape.latent_channels)}


def _hunyuan_video(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": make.video(shape.latent_channels),
        "encoder_attention_mask": make.every(make.batch, shape.text_tokens),
        "pooled_projections": make.noise(make.batch, shape.pooled_width),
        "guidance": make.full(6000.0, make.batch),
    }


def _cogvideox(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    frames, height, width = make.latents
    arguments: dict[str, Any] = {"hidden_states": make.noise(make.batch, frames, shape.latent_channels, height, width)}
    if shape.config.get("use_rotary_positional_embeddings"):
        frames, height, width = (n // p for n, p in zip(make.latents, shape.patch, strict=True))
        arguments["image_rotary_emb"] = get_3d_rotary_pos_embed(
            embed_dim=64,  # the heads of all sizes
            crops_coords=((0, 0), (height, width)),
            grid_size=(height, width),
            temporal_size=frames,
            grid_type="linspace" if shape.patch[0] == 1 else "slice",
            max_size=(max(height, 150), max(width, 150)),
            device=make.device,
        )
    return arguments


def _ltx(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    frames, height, width = make.latents
    return {
        "hidden_states": make.noise(make.batch, frames * height * width, shape.latent_channels),
        "encoder_attention_mask": make.every(make.batch, shape.text_tokens).to(make.dtype),
        "num_frames": frames,
        "height": height,
        "width": width,
        "rope_interpolation_scale": (8 / 25, 32, 32),  # seconds and pixels of a latent
    }


def _mochi(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": make.video(shape.latent_channels),
        "encoder_attention_mask": make.every(make.batch, shape.text_tokens),
    }


def _cosmos(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    return {"hidden_states": make.video(shape.latent_channels + 1), "fps": 30}


def _flux(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    height, width = make.latents[1] // 2, make.latents[2] // 2
    axes = (torch.arange(float(n), device=make.device) for n in (1, height, width))
    return {
        "hidden_states": make.noise(make.batch, height * width, 4 * shape.latent_channels),
        "pooled_projections": make.noise(make.batch, shape.pooled_width),
        "timestep": make.full(0.5, make.batch),
        "img_ids": torch.cartesian_prod(*axes),
        "txt_ids": torch.zeros(shape.text_tokens, 3, device=make.device),
        "guidance": make.full(3.5, make.batch),
    }


def _sd3(shape: ModelShape, make: Inputs) -> dict[str, Any]:
    return {
        "hidden_states": make.noise(make.batch, shape.latent_channels, *make.latents[1:]),
        "pooled_projections": make.noise(make.batch, shape.pooled_width),
    }


COGVIDEOX_5B: Mapping[str, Any] = {
    "num_attention_heads": 48,
    "num_layers": 42,
    "use_rotary_positional_embeddings": True,
}
PIPELINE = "size, steps and text length: the defaults of diffusers' pipeline"

MODEL_SHAPES: dict[str, ModelShape] = {
    shape.name: shape
    for shape in (
        ModelShape(
            "wan2.1-1.3b",
            "WanTransformer3DModel",
            _wan,
            f"Wan-AI/Wan2.1-T2V-1.3B-Diffusers, transformer/config.json; {PIPELINE}",
            {"num_attention_heads": 12, "num_layers": 30, "ffn_dim": 8960},
            height=480,
            width=832,
        ),
        ModelShape(
            "wan2.1-14b",
            "WanTransformer3DModel",
            _wan,
            f"Wan-AI/Wan2.1-T2V-14B-Diffusers, transformer/config.json: the class's defaults; {PIPELINE}, at 720p",
        ),
        ModelShape(
            "wan2.2-a14b",
            "WanTransformer3DModel",
            _wan,
            "Wan-AI/Wan2.2-T2V-A14B-Diffusers, transformer/config.json: the class's defaults, as transformer_2; one of "
            "the two runs at a step. Size and steps: its model card",
            steps=40,
        ),
        ModelShape(
            "hunyuanvideo",
            "HunyuanVideoTransformer3DModel",
            _hunyuan_video,
            f"hunyuanvideo-community/HunyuanVideo, transformer/config.json: the class's defaults; {PIPELINE}",
            text_tokens=256,
            pooled_width=768,
            frames=129,
            passes=1,
        ),
        ModelShape(
            "cogvideox-2b",
            "CogVideoXTransformer3DModel",
            _cogvideox,
            f"THUDM/CogVideoX-2b, transformer/config.json: the class's defaults; {PIPELINE}",
            height=480,
            width=720,
            frames=49,
            text_tokens=226,
        ),
        ModelShape(
            "cogvideox-5b",
            "CogVideoXTransformer3DModel",
            _cogvideox,
            f"THUDM/CogVideoX-5b, transformer/config.json; {PIPELINE}",
            COGVIDEOX_5B,
            height=480,
            width=720,
            frames=49,
            text_tokens=226,
        ),
        ModelShape(
            "cogvideox1.5-5b",
            "CogVideoXTransformer3DModel",
            _cogvideox,
            f"THUDM/CogVideoX1.5-5B, transformer/config.json; {PIPELINE}; latent frames are filled up to pairs",
            {
                **COGVIDEOX_5B,
                "patch_size_t": 2,
                "patch_bias": False,
                "sample_height": 300,
                "sample_width": 300,
                "sample_frames": 81,
            },
            patch=(2, 2, 2),
            height=768,
            width=1360,
            text_tokens=226,
        ),
        ModelShape(
            "ltx-video",
            "LTXVideoTransformer3DModel",
            _ltx,
            f"Lightricks/LTX-Video, transformer/config.json: the class's defaults; {PIPELINE}",
            patch=(1, 1, 1),
            compression=(8, 32, 32),
            latent_channels=128,
            text_tokens=128,
            height=512,
            width=704,
            frames=161,
        ),
        ModelShape(
            "mochi",
            "MochiTransformer3DModel",
            _mochi,
            f"genmo/mochi-1-preview, transformer/config.json: the class's defaults; {PIPELINE}, at 163 frames",
            compression=(6, 8, 8),
            latent_channels=12,
            text_tokens=256,
            height=480,
            width=848,
            frames=163,
            steps=64,
        ),
        ModelShape(
            "cosmos-7b",
            "CosmosTransformer3DModel",
            _cosmos,
            "nvidia/Cosmos-1.0-Diffusion-7B-Text2World, transformer/config.json: the class's defaults, but for the "
            f"padding mask, which is one channel of the input here: joining it needs torchvision; {PIPELINE}",
            {"in_channels": 17, "concat_padding_mask": False},
            compression=(8, 8, 8),
            text_width=1024,
            height=704,
            frames=121,
            steps=36,
        ),
        ModelShape(
            "flux.1-dev",
            "FluxTransformer2DModel",
            _flux,
            f"black-forest-labs/FLUX.1-dev, transformer/config.json; {PIPELINE}",
            {"guidance_embeds": True},
            compression=(1, 8, 8),
            pooled_width=768,
            height=1024,
            width=1024,
            frames=1,
            steps=28,
            passes=1,
        ),
        ModelShape(
            "sd3.5-large",
            "SD3Transformer2DModel",
            _sd3,
            f"stabilityai/stable-diffusion-3.5-large, transformer/config.json; {PIPELINE}: 77 + 256 tokens",
            {
                "num_attention_heads": 38,
                "num_layers": 38,
                "caption_projection_dim": 2432,
                "pos_embed_max_size": 192,
                "qk_norm": "rms_norm",
            },
            compression=(1, 8, 8),
            text_tokens=333,
            pooled_width=2048,
            height=1024,
            width=1024,
            frames=1,
            steps=28,
        ),
        ModelShape(
            "emoji-wan",
            "WanTransformer3DModel",
            _wan,
            "the embedded model's own config.json; size, frames and steps as it is evaluated",
            {
                "num_attention_heads": 6,
                "attention_head_dim": 32,
                "num_layers": 6,
                "ffn_dim": 576,
                "freq_dim": 128,
                "text_dim": 96,
                "rope_max_seq_len": 64,
            },
            compression=(2, 4, 4),
            text_width=96,
            height=64,
            width=64,
            frames=17,
            steps=20,
        ),
    )
}


def model_shape(name: str) -> ModelShape:
    """The shape of a model by name.

    Raises:
        ValueError: no such model; the message lists them.
    """
    shape = MODEL_SHAPES.get(name.lower())
    if shape is None:
        raise ValueError(f"no model shape is named {name!r}; steer knows {', '.join(MODEL_SHAPES)}")
    return shape
