"""Perturbed-attention guidance (PAG) and its soft, per-head form (SoftPAG)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, ClassVar, Literal

import torch

from steer.guidance import Guidance
from steer.method import Span
from steer_kernels import partial
from steer_patches.site import Call, Next


@dataclass(kw_only=True)
class PAG(Guidance):
    """Steer away from a prediction in which chosen self-attention maps are the identity.

    For the selected heads of the perturbed rows, with attention output O (B, H, S, D) and values V:

        mode="image"  image token i sees itself and the text only. Without text in the sequence this is O' = V. In
                      joint attention g_i = sigmoid(scale * q_i.k_i - lse_text,i) and
                      O'_i = g_i * v_i + (1 - g_i) * O_text,i; text rows stay as they are.
        mode="all"    every token, text included, sees itself only: O' = V.

    and the result is (1 - strength) * O + strength * O'.

    Args:
        scale: guidance weight. 3.0 in diffusers' PAG pipelines; 5.0 is advised without classifier-free guidance.
        mode: "image" (the rule of diffusers' joint PAG) or "all" (the rule of SoftPAG).
        strength: 1 = PAG; 0.25 to 0.5 = SoftPAG (with mode="all" and `heads`).

    Source: Ahn et al., "Self-Rectifying Diffusion Sampling with Perturbed-Attention Guidance", arXiv 2403.17377, and
    "Fine-Grained Perturbation Guidance via Attention Head Selection", arXiv 2506.10978. Checked against diffusers'
    PAG pipelines; the joint rule on models other than SD3 is an extension of it.
    """

    mode: Literal["image", "all"] = "image"
    strength: Annotated[float, Span(0, 1)] = 1.0

    kinds: ClassVar[tuple[str, ...]] = ("self", "joint")
    any_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.mode not in ("image", "all"):
            raise ValueError(f'mode={self.mode!r} must be "image" or "all"')
        if not 0 <= self.strength <= 1:
            raise ValueError(f"strength={self.strength} must lie in [0, 1]")

    def is_neutral(self) -> bool:
        return super().is_neutral() or self.strength == 0

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        image, text = call.spans()
        if self.mode == "all" or text.start == text.stop:
            perturbed = call.expanded()[1]
        else:
            perturbed = _image_block_identity(call, next, image, text)
        if self.strength == 1 and call.heads is None:
            return perturbed
        out = next(call)
        if self.strength != 1:
            perturbed = torch.lerp(out, perturbed, self.strength)
        return perturbed if call.heads is None else torch.where(call.heads, perturbed, out)


def _image_block_identity(call: Call, next: Next, image: slice, text: slice) -> torch.Tensor:
    """Joint attention whose image-to-image block is diagonal, from one pass over the text keys; (B, H, S, D)."""
    key, value = call.expanded()
    over_text = call.part(image, text)
    text_out, text_lse = partial(
        over_text.query, over_text.key, over_text.value, mask=over_text.mask, scale=call.softmax_scale
    )
    own = (call.query[:, :, image] * key[:, :, image]).to(text_lse.dtype).sum(-1) * call.softmax_scale
    own_mask = call.part(image, image).mask
    if own_mask is not None:
        own_mask = own_mask[..., 0, :] if own_mask.shape[-2] == 1 else own_mask.diagonal(dim1=-2, dim2=-1)
        own = own.masked_fill(~own_mask, -torch.inf) if own_mask.dtype == torch.bool else own + own_mask
    # a query that sees neither itself nor any text has the output 0, as in `partial`
    gate = torch.sigmoid(own - text_lse).nan_to_num(0.0)[..., None].to(value.dtype)
    image_out = torch.lerp(text_out, value[:, :, image], gate)
    text_rows = next(call.part(text, slice(0, key.shape[2])))
    parts = [text_rows, image_out] if text.start < image.start else [image_out, text_rows]
    return torch.cat(parts, dim=2)
