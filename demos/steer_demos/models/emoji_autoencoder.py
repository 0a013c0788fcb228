"""The `AutoencoderTiny` of the emoji pictures.

Its encoder learns the linear latents of `PatchCodec`, its decoder learns to draw pictures from them, so a diffusion
model can be trained on the latents before there is an autoencoder.
"""

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor

from steer_demos.codec import PatchCodec
from steer_demos.emoji import BACKGROUNDS, render_all
from steer_demos.training import Budget, best_device, fit, load_checkpoint

BATCH_SIZE = 16
LATENT_SCALING = 2.0  # AutoencoderTiny squashes its latents at +-3, ours reach +-8
LATENT_NOISE = 0.15  # sampled latents are never exact
HELD_OUT_SHARE = 0.05


def build_autoencoder() -> AutoencoderTiny:
    """A convolutional autoencoder for 64 x 64 pictures and 16 x 16 latents of 16 channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 0, 1),
        num_decoder_blocks=(3, 1, 0),
        latent_channels=16,
        scaling_factor=LATENT_SCALING,
        shift_factor=0.0,
    )


def psnr(pictures: Tensor, targets: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(pictures.clamp(-1, 1), targets)))


@torch.no_grad()
def held_out_psnr(model: AutoencoderTiny, codec: PatchCodec, pictures: Tensor) -> dict[str, float]:
    """PSNR of pictures (N, 3, 64, 64) decoded from linear latents, from noised ones, and from the model's encoder."""
    latents = codec.encode(pictures) / LATENT_SCALING
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)).to(latents) * 0.1 / LATENT_SCALING
    return {
        "linear codec": psnr(codec.decode(latents * LATENT_SCALING), pictures),
        "decoder": psnr(model.decode(latents).sample, pictures),
        "decoder, noised latents": psnr(model.decode(latents + noise).sample, pictures),
        "encoder and decoder": psnr(model.decode(model.encode(pictures).latents).sample, pictures),
    }


class Compositions:
    """Renders over plain colours: the named backgrounds half of the time, otherwise any colour."""

    def __init__(self, seed: int, device: torch.device) -> None:
        renders = torch.from_numpy(render_all()).flatten(0, 1).movedim(-1, 1).float().to(device) / 255
        self.colours, self.alphas = renders[:, :3], renders[:, 3:]
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values()), device=device) / 255
        pairs = np.random.default_rng(seed).permutation(len(renders) * len(BACKGROUNDS))
        held_out = int(HELD_OUT_SHARE * len(pairs))
        self.test_pairs, self.train_pairs = (torch.from_numpy(part).to(device) for part in np.split(pairs, [held_out]))

    def compose(self, render: Tensor, background: Tensor) -> Tensor:
        """Render indices (B,) and background colours (B, 3) in [0, 1] -> pictures (B, 3, 64, 64) in [-1, 1]."""
        alphas = self.alphas[render]
        return (self.colours[render] * alphas + background[:, :, None, None] * (1 - alphas)) * 2 - 1

    def test(self) -> Tensor:
        """The held-out (render, named background) pairs."""
        return self.compose(self.test_pairs // len(BACKGROUNDS), self.backgrounds[self.test_pairs % len(BACKGROUNDS)])

    def draw(self, size: int, generator: torch.Generator) -> Tensor:
        """A training batch (size, 3, 64, 64)."""
        device = generator.device
        pairs = self.train_pairs[torch.randint(len(self.train_pairs), (size,), generator=generator, device=device)]
        named = self.backgrounds[pairs % len(BACKGROUNDS)]
        any_colour = torch.rand(size, 3, generator=generator, device=device)
        is_named = torch.rand(size, 1, generator=generator, device=device) < 0.5
        background = torch.where(is_named, named, any_colour)
        return self.compose(pairs // len(BACKGROUNDS), background)


def train(folder: Path, budget: Budget, codec: PatchCodec, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train to encode to, and decode from, the latents of `codec`; continues from the checkpoint in `folder`."""
    device = best_device()
    torch.manual_seed(seed)
    codec = codec.to(device)
    data = Compositions(seed, device)
    model = build_autoencoder().to(device, memory_format=torch.channels_last)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        pictures = data.draw(size, generator)
        latents = codec.encode(pictures)
        spread = LATENT_NOISE * torch.rand(size, 1, 1, 1, generator=generator, device=device)
        noise = spread * torch.randn(latents.shape, generator=generator, device=device)
        return pictures, latents, noise

    def loss(pictures: Tensor, latents: Tensor, noise: Tensor) -> Tensor:
        noised = ((latents + noise) / LATENT_SCALING).contiguous(memory_format=torch.channels_last)
        decoded = model.decode(noised).sample
        encoded = model.encode(pictures.contiguous(memory_format=torch.channels_last)).latents
        drawing = F.mse_loss(decoded, pictures) + 0.1 * F.l1_loss(decoded, pictures)
        return drawing + F.mse_loss(encoded * LATENT_SCALING, latents)

    fit(
        model,
        draw,
        loss,
        folder,
        budget,
        batch_size=batch_size,
        seed=seed,
        learning_rate=2e-3,
        compile_model=device.type == "cuda",
        label="autoencoder",
    )
    print(
        {
            name: f"{value:.1f} dB"
            for name, value in held_out_psnr(trained(folder).to(device), codec, data.test()).items()
        }
    )


def trained(folder: Path) -> AutoencoderTiny:
    """The averaged weights of the checkpoint in `folder`, float32 on the CPU."""
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder}: the autoencoder has not been trained")
    model = build_autoencoder()
    model.load_state_dict(state["average"], strict=False)
    return model
