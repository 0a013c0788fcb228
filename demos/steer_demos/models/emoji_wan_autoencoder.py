"""The `AutoencoderKLWan` of the emoji clips.

Its encoder learns the linear latents of `ClipCodec`, its decoder learns to draw frames from them, so a diffusion model
can be trained on the latents before there is an autoencoder.
"""

from dataclasses import dataclass
from pathlib import Path
from types import MethodType

import torch
import torch.nn.functional as F
from diffusers import AutoencoderKLWan
from diffusers.models.autoencoders.autoencoder_kl_wan import WanCausalConv3d
from torch import Tensor
from tqdm import tqdm

from steer_demos.clips import draw_clips
from steer_demos.codec import LATENT_CHANNELS, PATCH, principal_components
from steer_demos.models.emoji_autoencoder import psnr
from steer_demos.training import Budget, best_device, fit, load_checkpoint

TEMPORAL_FACTOR = 2
BATCH_SIZE = 4
CLIP_FRAMES = 5  # the shortest clip that the encoder's chunks of four make two kinds of latent frames of
POOL = 1200  # clips whose pixels are kept in memory
LATENT_NOISE = 0.15  # sampled latents are never exact
LOG_VARIANCE = -12.0  # of the encoder's distribution: it is as good as exact


@dataclass(frozen=True)
class ClipCodec:
    """Principal components of patches of 4 x 4 pixels and two frames: a video codec that needs no training.

    The first frame is paired with itself, as in causal video autoencoders: 2 n + 1 frames become n + 1 latent frames.

    Args:
        mean: (96,) mean patch.
        components: (16, 96) orthonormal principal components.
        scale: (16,) what each coefficient is divided by; latents have unit mean square.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, frames: Tensor) -> "ClipCodec":
        """Fit to clips (N, F, 3, H, W); strong components keep a larger share of the latent than weak ones."""
        return cls(*principal_components(_patches(frames).flatten(0, -2)))

    def to(self, device: torch.device) -> "ClipCodec":
        """The same codec on `device`."""
        return ClipCodec(self.mean.to(device), self.components.to(device), self.scale.to(device))

    def encode(self, frames: Tensor) -> Tensor:
        """Clips (B, 2 n + 1, 3, H, W) in [-1, 1] -> latents (B, 16, n + 1, H / 4, W / 4)."""
        return ((_patches(frames) - self.mean) @ self.components.T / self.scale).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, n + 1, h, w) -> clips (B, 2 n + 1, 3, 4 h, 4 w), not clamped."""
        patches = (latents.movedim(1, -1) * self.scale) @ self.components + self.mean
        pairs = F.pixel_shuffle(patches.movedim(-1, 2).flatten(0, 1), PATCH).unflatten(0, patches.shape[:2])
        return pairs.unflatten(2, (TEMPORAL_FACTOR, 3)).flatten(1, 2)[:, TEMPORAL_FACTOR - 1 :]


def _patches(frames: Tensor) -> Tensor:
    """Clips (B, 2 n + 1, 3, H, W) -> patches (B, n + 1, H / 4, W / 4, 96)."""
    paired = torch.cat([frames[:, :1], frames], dim=1).unflatten(1, (-1, TEMPORAL_FACTOR)).flatten(2, 3)
    patches = F.pixel_unshuffle(paired.flatten(0, 1), PATCH).unflatten(0, paired.shape[:2])
    return patches.movedim(2, -1)


def build_autoencoder() -> AutoencoderKLWan:
    """An autoencoder of width 32: pixels in patches of 2 x 2, then one level that halves space and time.

    Latents have zero mean and unit mean square already, so the pipeline's normalisation is the identity. Convolutions
    over time see the current frame alone when training starts, and stay so with `train_framewise`.
    """
    model = AutoencoderKLWan(
        base_dim=32,
        z_dim=LATENT_CHANNELS,
        dim_mult=[1, 1],
        num_res_blocks=1,
        temperal_downsample=[True],
        latents_mean=[0.0] * LATENT_CHANNELS,
        latents_std=[1.0] * LATENT_CHANNELS,
        in_channels=12,
        out_channels=12,
        patch_size=2,
        scale_factor_temporal=TEMPORAL_FACTOR,
        scale_factor_spatial=PATCH,
    )
    with torch.no_grad():
        for module in framewise_convolutions(model):
            # Kaiming's bound counts the whole kernel, but only one of its time slices is used.
            module.weight.mul_(module.kernel_size[0] ** 0.5)
            module.weight[:, :, :-1] = 0
        model.quant_conv.weight[LATENT_CHANNELS:] = 0
        model.quant_conv.bias[LATENT_CHANNELS:] = LOG_VARIANCE
    return model


def framewise_convolutions(model: AutoencoderKLWan) -> list[WanCausalConv3d]:
    """The convolutions over time, all but the one that joins pairs of frames in the encoder."""
    convolutions = [module for module in model.modules() if isinstance(module, WanCausalConv3d)]
    return [module for module in convolutions if module.kernel_size[0] > 1 and module.stride[0] == 1]


def _framewise(convolution: WanCausalConv3d, frames: Tensor, cache_x: Tensor | None = None) -> Tensor:
    """What the convolution gives (B, C, T, H, W) when all but the last slice of its kernel are zero."""
    kernel = convolution.weight[:, :, -1]
    flat = frames.movedim(2, 1).flatten(0, 1).contiguous(memory_format=torch.channels_last)
    kernel = kernel.contiguous(memory_format=torch.channels_last)
    drawn = F.conv2d(flat, kernel, convolution.bias, padding=kernel.shape[-1] // 2)
    return drawn.unflatten(0, (len(frames), -1)).movedim(1, 2)


def train_framewise(model: AutoencoderKLWan) -> None:
    """Compute the convolutions over time as two-dimensional ones: the same function at a third of the cost.

    Only while the slices of their kernels that see the past are zero; they get no gradient, so they stay zero.
    """
    for module in framewise_convolutions(model):
        module.forward = MethodType(_framewise, module)


class ClipPixels:
    """Pieces of five successive frames from a pool of clips that is made once.

    Args:
        size: clips in the pool.
        seed: of the pool.
        device: where batches are wanted; the pool stays on the CPU.
    """

    def __init__(self, size: int, seed: int, device: torch.device) -> None:
        generator = torch.Generator().manual_seed(seed)
        parts = []
        for _ in tqdm(range(0, size, 40), desc="drawing clips for the autoencoder"):
            frames = draw_clips(40, generator).frames
            parts.append(((frames + 1) * 127.5).round().byte())
        self.frames = torch.cat(parts)
        self.device = device

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """Frames (size, 5, 3, 64, 64) in [-1, 1]."""

        def pick(count: int) -> Tensor:
            return torch.randint(count, (size,), generator=generator, device=generator.device).cpu()

        start = pick(self.frames.shape[1] - CLIP_FRAMES + 1)
        frames = self.frames[pick(len(self.frames))[:, None], start[:, None] + torch.arange(CLIP_FRAMES)]
        return frames.to(self.device).float() / 127.5 - 1


@torch.no_grad()
def held_out_psnr(model: AutoencoderKLWan, codec: ClipCodec, frames: Tensor) -> dict[str, float]:
    """PSNR of clips (N, 17, 3, 64, 64) decoded from linear latents, from noised ones, and from the model's encoder."""
    latents = codec.encode(frames)
    noise = 0.1 * torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents)

    def decode(latents: Tensor) -> Tensor:
        return model.decode(latents).sample.movedim(2, 1)

    return {
        "linear codec": psnr(codec.decode(latents), frames),
        "decoder": psnr(decode(latents), frames),
        "decoder, noised latents": psnr(decode(latents + noise), frames),
        "encoder and decoder": psnr(decode(model.encode(frames.movedim(2, 1)).latent_dist.mode()), frames),
    }


def train(folder: Path, budget: Budget, codec: ClipCodec, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train to encode to, and decode from, the latents of `codec`; continues from the checkpoint in `folder`."""
    device = best_device()
    torch.manual_seed(seed)
    codec = codec.to(device)
    pixels = ClipPixels(POOL, seed, device)
    model = build_autoencoder().to(device)
    train_framewise(model)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        frames = pixels.draw(size, generator)
        latents = codec.encode(frames)
        spread = LATENT_NOISE * torch.rand(size, 1, 1, 1, 1, generator=generator, device=device)
        return frames, latents, spread * torch.randn(latents.shape, generator=generator, device=device)

    def loss(frames: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        decoded = model.decode(latents + noise).sample.movedim(2, 1)
        encoded = model.encode(frames.movedim(2, 1)).latent_dist.mean
        drawing = F.mse_loss(decoded, frames) + 0.1 * F.l1_loss(decoded, frames)
        return drawing + 0.3 * F.mse_loss(encoded, latents)

    fit(
        model,
        draw,
        loss,
        folder,
        budget,
        batch_size=batch_size,
        seed=seed,
        learning_rate=2e-3,
        compile_model=False,
        label="autoencoder",
    )
    held_out = draw_clips(20, torch.Generator().manual_seed(seed + 1)).frames.to(device)
    quality = held_out_psnr(trained(folder).to(device), codec, held_out)
    print({name: f"{value:.1f} dB" for name, value in quality.items()})


def trained(folder: Path) -> AutoencoderKLWan:
    """The averaged weights of the checkpoint in `folder`, float32 on the CPU."""
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder}: the autoencoder has not been trained")
    model = build_autoencoder()
    model.load_state_dict(state["average"], strict=False)
    return model
