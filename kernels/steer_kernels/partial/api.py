"""Shape checks and backend choice for `partial` and `merge`."""

from __future__ import annotations

from collections.abc import Sequence

import torch

from steer_kernels.partial import reference
from steer_kernels.shapes import check_attention

BACKENDS = ("flash", "reference")


def partial(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    *,
    mask: torch.Tensor | None = None,
    scale: float | None = None,
    backend: str | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of `query` over these keys alone, with its log-sum-exp.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, G, D), H a multiple of H_kv.
        mask: boolean (True = attend) or additive, broadcastable to (B, H, S, G).
        scale: factor on the products; None = 1 / sqrt(D).
        backend: "flash" = torch's own fused kernel, "reference" = plain torch, None = the fastest that can.

    Returns:
        Output (B, H, S, D) and log-sum-exp (B, H, S).

    Raises:
        ValueError: shapes that do not fit, or an explicit backend that cannot serve this call.
    """
    check_attention(query, key, value)
    reason = _refusal(query, mask)
    if backend is None:
        backend = "reference" if reason else "flash"
    if backend == "reference":
        return reference.partial(query, key, value, mask=mask, scale=scale)
    if backend != "flash":
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    if reason:
        raise ValueError(f'backend="flash" cannot serve this call: {reason}')
    groups = query.shape[1] // key.shape[1]
    if groups > 1:
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
    if query.device.type == "cpu":
        return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, scale=scale)
    out, lse, *_ = torch.ops.aten._scaled_dot_product_flash_attention(query, key, value, scale=scale)
    return out, lse


def merge(parts: Sequence[tuple[torch.Tensor, torch.Tensor]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention over the union of disjoint key groups from (output, log-sum-exp) of each; see `partial`."""
    if not parts:
        raise ValueError("merge needs at least one part")
    return reference.merge(list(parts))


def _refusal(query: torch.Tensor, mask: torch.Tensor | None) -> str | None:
    """Why the fused kernel cannot serve the call, or None."""
    if mask is not None:
        return "it takes no mask"
    if torch.is_grad_enabled() and query.requires_grad:
        return "it gives no gradient through the log-sum-exp"
    if query.device.type == "cpu":
        return None
    if query.device.type == "cuda" and query.dtype in (torch.float16, torch.bfloat16) and query.shape[-1] <= 256:
        return None
    return f"no fused kernel for {query.dtype} on {query.device.type}"
