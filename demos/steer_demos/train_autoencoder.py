"""Trains the `AutoencoderTiny` of `emoji-mmdit`: `python -m steer_demos.train emoji-autoencoder --minutes 20`.

Its encoder learns the linear latents of `PatchCodec`, its decoder learns to draw pictures from them, so it can be
trained beside the diffusion model, which never sees it.
"""

import time
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from torch import Tensor
from tqdm import tqdm

from steer_demos.codec import PatchCodec
from steer_demos.emoji import BACKGROUNDS, render_all
from steer_demos.emoji_mmdit import LATENT_SCALING, build_autoencoder

if TYPE_CHECKING:
    from steer_demos.train import Budget

LEARNING_RATE = 2e-3
LATENT_NOISE = 0.15  # sampled latents are never exact
HELD_OUT_SHARE = 0.05
BATCH_SIZE = 16


def psnr(pictures: Tensor, targets: Tensor) -> float:
    """Peak signal-to-noise ratio in dB of pictures in [-1, 1]."""
    return float(10 * torch.log10(4 / F.mse_loss(pictures.clamp(-1, 1), targets)))


def held_out_psnr(model: AutoencoderTiny, codec: PatchCodec, pictures: Tensor) -> dict[str, float]:
    """PSNR of pictures (N, 3, 64, 64) decoded from linear latents, from noised ones, and from the model's encoder."""
    latents = codec.encode(pictures) / LATENT_SCALING
    noise = torch.randn(latents.shape, generator=torch.Generator().manual_seed(0)) * 0.1 / LATENT_SCALING
    with torch.no_grad():
        return {
            "linear codec": psnr(codec.decode(latents * LATENT_SCALING), pictures),
            "decoder": psnr(model.decode(latents).sample, pictures),
            "decoder, noised latents": psnr(model.decode(latents + noise).sample, pictures),
            "encoder and decoder": psnr(model.decode(model.encode(pictures).latents).sample, pictures),
        }


class Compositions:
    """Renders over plain colours: the named backgrounds half of the time, otherwise any colour."""

    def __init__(self, seed: int) -> None:
        renders = torch.from_numpy(render_all()).flatten(0, 1).movedim(-1, 1).float() / 255
        self.colours, self.alphas = renders[:, :3], renders[:, 3:]
        self.backgrounds = torch.tensor(list(BACKGROUNDS.values())) / 255
        pairs = np.random.default_rng(seed).permutation(len(renders) * len(BACKGROUNDS))
        held_out = int(HELD_OUT_SHARE * len(pairs))
        self.test_pairs, self.train_pairs = (torch.from_numpy(part) for part in np.split(pairs, [held_out]))

    def compose(self, render: Tensor, background: Tensor) -> Tensor:
        """Render indices (B,) and background colours (B, 3) in [0, 1] -> pictures (B, 3, 64, 64) in [-1, 1]."""
        alphas = self.alphas[render]
        return (self.colours[render] * alphas + background[:, :, None, None] * (1 - alphas)) * 2 - 1

    def test(self) -> Tensor:
        """The held-out (render, named background) pairs."""
        return self.compose(self.test_pairs // len(BACKGROUNDS), self.backgrounds[self.test_pairs % len(BACKGROUNDS)])

    def draw(self, size: int) -> Tensor:
        """A training batch (size, 3, 64, 64)."""
        pairs = self.train_pairs[torch.randint(len(self.train_pairs), (size,))]
        named = self.backgrounds[pairs % len(BACKGROUNDS)]
        background = torch.where(torch.rand(size, 1) < 0.5, named, torch.rand(size, 3))
        return self.compose(pairs // len(BACKGROUNDS), background)


def train_emoji_autoencoder(output: Path, budget: "Budget", codec: PatchCodec, seed: int) -> None:
    """Train on the CPU in channels-last layout and save the model to `output/vae`."""
    torch.manual_seed(seed)
    data = Compositions(seed)
    model = build_autoencoder().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)
    step, started = 0, time.monotonic()
    bar = tqdm(total=100, desc="autoencoder", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while (progress := budget.progress(time.monotonic() - started, step * BATCH_SIZE)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = LEARNING_RATE * min((step + 1) / 100, 1.0) * (0.5 + 0.5 * np.cos(np.pi * progress))
        pictures = data.draw(BATCH_SIZE)
        latents = codec.encode(pictures)
        noised = latents + LATENT_NOISE * torch.rand(BATCH_SIZE, 1, 1, 1) * torch.randn_like(latents)
        decoded = model.decode(noised.div(LATENT_SCALING).contiguous(memory_format=torch.channels_last)).sample
        encoded = model.encode(pictures.contiguous(memory_format=torch.channels_last)).latents
        draw_loss = F.mse_loss(decoded, pictures) + 0.1 * F.l1_loss(decoded, pictures)
        loss = draw_loss + F.mse_loss(encoded * LATENT_SCALING, latents)
        loss.backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        bar.n = round(100 * progress, 1)
        bar.set_postfix(step=step, psnr=f"{psnr(decoded.detach(), pictures):.1f} dB", refresh=False)
        bar.update(0)
        if step % 500 == 0:
            tqdm.write(f"{step} {held_out_psnr(model, codec, data.test())}")
            model.save_pretrained(output / "vae")
    bar.close()
    print(held_out_psnr(model, codec, data.test()))
    model.save_pretrained(output / "vae")
