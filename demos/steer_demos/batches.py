"""Training batches of emoji pictures: latents and captions with parts left out, shared by the text-to-image models."""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import CLIPTokenizer

from steer_demos.emoji import BACKGROUNDS, STYLES, caption, compose, concepts, render_all

DROP_CAPTION = 0.1  # the unconditional share of classifier-free guidance
DROP_STYLE = 0.3
DROP_BACKGROUND = 0.3


def all_pictures() -> Tensor:
    """Every (concept, style, background): (C, S, B, 3, 64, 64) float32 in [-1, 1]."""
    renders = render_all()
    pictures = np.stack([compose(renders, colour) for colour in BACKGROUNDS.values()], axis=2)
    return torch.from_numpy(pictures).movedim(-1, 3).contiguous()


class EmojiBatches:
    """Draws batches of (latents, token ids) from tensors that hold the whole data set.

    Args:
        pictures: `all_pictures()`.
        encode: pictures (N, 3, 64, 64) in [-1, 1] -> latents (N, 16, 16, 16).
        tokenizer: its `model_max_length` is the length of all token ids.
        device: where the tensors are kept and drawn.
    """

    def __init__(
        self,
        pictures: Tensor,
        encode: Callable[[Tensor], Tensor],
        tokenizer: CLIPTokenizer,
        device: torch.device,
    ) -> None:
        grid = pictures.shape[:3]
        self.latents = encode(pictures.flatten(0, 2)).unflatten(0, grid).to(device)
        styles, backgrounds = [*STYLES, None], [*BACKGROUNDS, None]  # the last row of each leaves it out
        captions = [
            caption(concept, style, background, article)
            for concept in concepts()
            for style in styles
            for background in backgrounds
            for article in (False, True)
        ]
        ids = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.empty_ids = ids[0].to(device)
        self.ids = ids[1:].unflatten(0, (len(concepts()), len(styles), len(backgrounds), 2)).to(device)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (size, 16, 16, 16) and token ids (size, 16), parts of the captions left out at random."""
        device = self.latents.device

        def pick(count: int) -> Tensor:
            return torch.randint(count, (size,), generator=generator, device=device)

        def chance(share: float) -> Tensor:
            return torch.rand(size, generator=generator, device=device) < share

        concept, style, background = (pick(count) for count in self.latents.shape[:3])
        told_style = style.masked_fill(chance(DROP_STYLE), len(STYLES))
        told_background = background.masked_fill(chance(DROP_BACKGROUND), len(BACKGROUNDS))
        ids = self.ids[concept, told_style, told_background, pick(2)]
        ids = torch.where(chance(DROP_CAPTION)[:, None], self.empty_ids, ids)
        return self.latents[concept, style, background], ids
