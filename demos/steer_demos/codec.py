"""A linear picture codec that needs no training: principal components of 4 x 4 pixel patches.

The diffusion model trains on these latents; the shipped `AutoencoderTiny` is trained to reproduce and to decode them.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

PATCH = 4
LATENT_CHANNELS = 16


def principal_components(patches: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Mean (D,), components (16, D) and scale (16,) of patches (N, D); scaled coefficients have unit mean square.

    Scaling by the root of the standard deviation leaves strong components a larger share of the latent than weak ones.
    """
    patches = patches.double()
    mean = patches.mean(0)
    covariance = (patches - mean).T @ (patches - mean) / len(patches)
    variance, vectors = torch.linalg.eigh(covariance)
    std = variance.flip(0)[:LATENT_CHANNELS].sqrt()
    components = vectors.flip(1)[:, :LATENT_CHANNELS].T
    scale = std.sqrt()
    scale = scale * (std / scale).square().mean().sqrt()
    return mean.float(), components.float().contiguous(), scale.float()


@dataclass(frozen=True)
class PatchCodec:
    """Linear map between pictures (B, 3, H, W) in [-1, 1] and latents (B, 16, H / 4, W / 4) of unit mean square.

    Args:
        mean: (48,) mean patch.
        components: (16, 48) orthonormal principal components.
        scale: (16,) what each coefficient is divided by.
    """

    mean: Tensor
    components: Tensor
    scale: Tensor

    @classmethod
    def fit(cls, pictures: Tensor) -> "PatchCodec":
        """Fit to pictures (N, 3, H, W); strong components keep a larger share of the latent than weak ones."""
        return cls(*principal_components(F.pixel_unshuffle(pictures, PATCH).movedim(1, -1).flatten(0, -2)))

    def to(self, device: torch.device) -> "PatchCodec":
        """The same codec on `device`."""
        return PatchCodec(self.mean.to(device), self.components.to(device), self.scale.to(device))

    def encode(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, H, W) in [-1, 1] -> latents (B, 16, H / 4, W / 4)."""
        patches = F.pixel_unshuffle(pictures, PATCH).movedim(1, -1) - self.mean
        return ((patches @ self.components.T) / self.scale).movedim(-1, 1).contiguous()

    def decode(self, latents: Tensor) -> Tensor:
        """Latents (B, 16, h, w) -> pictures (B, 3, 4 h, 4 w), not clamped."""
        patches = (latents.movedim(1, -1) * self.scale) @ self.components + self.mean
        return F.pixel_shuffle(patches.movedim(-1, 1), PATCH)
