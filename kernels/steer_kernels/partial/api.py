"""Shape checks and backend choice for `partial` and `merge`."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from steer_kernels.partial import reference
from steer_kernels.shapes import check_attention

BACKENDS = ("flash", "reference")


def partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    is_causal: bool = False,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of `query` over these keys alone, with its log-sum-exp.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, G, D), H a multiple of H_kv.
        mask: boolean (True = attend) or additive, broadcastable to (B, H, S, G).
        is_causal: key j is visible to query i only if j <= i + G - S. Not together with a mask.
        scale: factor on the products; None = 1 / sqrt(D).
        backend: "flash" = torch's own fused kernels, "reference" = plain torch, None = the fastest that can.

    Returns:
        Output (B, H, S, D) and log-sum-exp (B, H, S). A query that sees no key has output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes that do not fit, or an explicit backend that cannot serve this call.
    """
    check_attention(query, key, value)
    if mask is not None:
        _check_mask(query, key, mask, is_causal)
    reason = _refusal(query, key, value)
    if backend is None:
        backend = "reference" if reason else "flash"
    if backend == "reference":
        return reference.partial(query, key, value, mask=mask, is_causal=is_causal, scale=scale)
    if backend != "flash":
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    if reason:
        raise ValueError(f'backend="flash" cannot serve this call: {reason}')
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if is_causal:
        return _causal(query, key, value, scale)
    return _fused(query, key, value, mask, False, scale)


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key groups from (output, log-sum-exp) of each; see `partial`."""
    if not parts:
        raise ValueError("merge needs at least one part")
    return reference.merge(list(parts))


def _causal(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """Causal attention for any two lengths from kernels whose causal rule is that of equal lengths."""
    earlier = key.shape[2] - query.shape[2]
    if earlier < 0:  # the first queries see nothing
        out, lse = _fused(query[:, :, -earlier:], key, value, None, True, scale)
        return F.pad(out, (0, 0, -earlier, 0)), F.pad(lse, (-earlier, 0), value=-torch.inf)
    if earlier == 0:
        return _fused(query, key, value, None, True, scale)
    if query.shape[2] == 1:
        return _fused(query, key, value, None, False, scale)
    return reference.merge(
        [
            _fused(query, key[:, :, :earlier], value[:, :, :earlier], None, False, scale),
            _fused(query, key[:, :, earlier:], value[:, :, earlier:], None, True, scale),
        ]
    )


def _fused(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: torch.Tensor | None,
    is_causal: bool,
    scale: float | None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """One call of torch's kernel; as many key as query heads, and for `is_causal` as many queries as keys."""
    # the kernels read the channels of a token as neighbours, whatever the strides say
    query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
    bias = None if mask is None else _bias(query, key, mask)
    if query.device.type == "cpu":
        out, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
            query, key, value, 0.0, is_causal, attn_mask=bias, scale=scale
        )
    elif bias is None and query.dtype != torch.float32:
        out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(
            query, key, value, 0.0, is_causal, scale=scale
        )
    else:
        if bias is not None:  # this kernel reads rows that begin at whole multiples of 16 numbers
            tokens = bias.shape[-1]
            bias = F.pad(bias, (0, -tokens % 16))[..., :tokens].expand(*query.shape[:3], tokens)
        out, lse, *_ = torch.ops.aten._scaled_dot_product_efficient_attention(
            query, key, value, bias, True, 0.0, is_causal, scale=scale
        )
        lse = lse[..., : query.shape[2]]  # it comes padded
    if bias is not None:  # the kernels state some number for queries that see nothing
        lse = lse.masked_fill((bias == -torch.inf).all(-1), -torch.inf)
    return out, lse


def _bias(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """The mask as the kernels take it: four dimensions, a number to add for every key, the query's dtype."""
    mask = mask[(None,) * (4 - mask.ndim)]
    mask = mask.expand(*mask.shape[:3], key.shape[2])
    if mask.dtype != torch.bool:
        return mask.to(query.dtype)
    return torch.zeros(mask.shape, dtype=query.dtype, device=query.device).masked_fill(~mask, -torch.inf)


def _check_mask(query: torch.Tensor, key: torch.Tensor, mask: torch.Tensor, is_causal: bool) -> None:
    if is_causal:
        raise ValueError("pass either a mask or is_causal=True; a mask can hold the causal rule too")
    wanted = (*query.shape[:3], key.shape[2])
    shape = (1,) * (4 - mask.ndim) + tuple(mask.shape)
    if len(shape) != 4 or any(have not in (1, want) for have, want in zip(shape, wanted, strict=True)):
        raise ValueError(f"mask must be broadcastable to (B, H, S, G) = {wanted}; got {tuple(mask.shape)}")


def _refusal(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> str | None:
    """Why the fused kernels cannot serve the call, or None."""
    if query.numel() == 0 or key.numel() == 0:
        return "it takes no empty tensors"  # some of them end the process
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "it gives no gradient through the log-sum-exp"
    width = query.shape[-1]
    if value.shape[-1] != width:
        return f"it takes values as wide as the keys, not {value.shape[-1]} channels beside {width}"
    if query.device.type == "cpu":
        return None
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16, torch.float32):
        return None if width <= 256 and width % 8 == 0 else f"it takes up to 256 channels in steps of 8, not {width}"
    return f"no fused kernel for {query.dtype} on {query.device.type}"
