"""`emoji-unet`: a Stable Diffusion pipeline, small enough to be trained on a CPU.

It takes its autoencoder, its tokenizer and the first weights of its text encoder from `emoji-mmdit`.
"""

from pathlib import Path

import torch
from diffusers import AutoencoderTiny, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from torch import Tensor, nn
from transformers import CLIPTextModel, CLIPTokenizer

from steer_demos.batches import EmojiBatches, all_pictures
from steer_demos.models import EMBEDDED
from steer_demos.models.emoji_mmdit import TEXT_WIDTH
from steer_demos.training import Budget, best_device, fit, load_checkpoint, save_pipeline

MINUTES = 42.0
BATCH_SIZE = 48


def build_unet() -> UNet2DConditionModel:
    """Three levels (16 x 16, 8 x 8, 4 x 4), each with one residual block and one attention block on the way down."""
    return UNet2DConditionModel(
        sample_size=16,
        in_channels=16,
        out_channels=16,
        block_out_channels=(48, 80, 96),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * 3,
        mid_block_type="UNetMidBlock2DCrossAttn",
        up_block_types=("CrossAttnUpBlock2D",) * 3,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(3, 5, 6),  # the number of heads, whatever its name: 16 channels each
        norm_num_groups=16,
    )


def build_scheduler() -> DDIMScheduler:
    """Velocity prediction down to no signal at all, so that the first step can choose the background's colour."""
    return DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        steps_offset=1,  # what StableDiffusionPipeline asks of every scheduler; trailing spacing ignores it
    )


def text_parts() -> tuple[CLIPTokenizer, CLIPTextModel, AutoencoderTiny]:
    """Tokenizer, text encoder of three layers (float32) and autoencoder of the shipped `emoji-mmdit`."""
    folder = EMBEDDED["emoji-mmdit"].folder
    return (
        CLIPTokenizer.from_pretrained(folder / "tokenizer_2"),
        CLIPTextModel.from_pretrained(folder / "text_encoder_2", dtype=torch.float32),
        AutoencoderTiny.from_pretrained(folder / "vae", dtype=torch.float32),
    )


class TextToImage(nn.Module):
    """The trained parts, and their velocity loss."""

    signal: Tensor

    def __init__(self, text_encoder: CLIPTextModel) -> None:
        super().__init__()
        self.text_encoder = text_encoder
        self.unet = build_unet()
        self.register_buffer("signal", build_scheduler().alphas_cumprod.sqrt(), persistent=False)

    def loss(self, latents: Tensor, ids: Tensor, noise: Tensor, timesteps: Tensor) -> Tensor:
        """Mean square error of the velocity at integer `timesteps` (B,); latents and noise (B, 16, 16, 16)."""
        signal = self.signal[timesteps][:, None, None, None]
        sigma = (1 - signal.square()).sqrt()
        tokens = self.text_encoder(ids).last_hidden_state
        mixed = (signal * latents + sigma * noise).contiguous(memory_format=torch.channels_last)
        velocity = self.unet(mixed, timesteps, tokens, return_dict=False)[0]
        return (velocity.float() - (signal * noise - sigma * latents)).square().mean()


def train(folder: Path, budget: Budget, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train the UNet and the text encoder; continues from `folder/checkpoint.pt` where there is one."""
    device = best_device()
    torch.manual_seed(seed)
    tokenizer, text_encoder, autoencoder = text_parts()

    @torch.no_grad()
    def encode(pictures: Tensor) -> Tensor:
        parts = [autoencoder.encode(part).latents for part in pictures.split(64)]
        return torch.cat(parts) * autoencoder.config.scaling_factor

    batches = EmojiBatches(all_pictures(), encode, tokenizer, device)
    model = TextToImage(text_encoder).to(device)
    model.unet.to(memory_format=torch.channels_last)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        latents, ids = batches.draw(size, generator)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        return latents, ids, noise, torch.randint(1000, (size,), generator=generator, device=device)

    # Convolutions gain nothing from torch.compile on a CPU.
    compile_model = device.type == "cuda"
    fit(model, draw, model.loss, folder, budget, batch_size=batch_size, seed=seed, compile_model=compile_model)


def save(folder: Path, output: Path) -> None:
    """Write the averaged weights of `folder/checkpoint.pt` as a bfloat16 pipeline folder."""
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder}: train first, `steer train emoji-unet`")
    tokenizer, text_encoder, autoencoder = text_parts()
    model = TextToImage(text_encoder)
    model.load_state_dict(state["average"], strict=False)
    pipe = StableDiffusionPipeline(
        unet=model.unet,
        scheduler=build_scheduler(),
        vae=autoencoder,
        text_encoder=model.text_encoder,
        tokenizer=tokenizer,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    save_pipeline(pipe, output)
