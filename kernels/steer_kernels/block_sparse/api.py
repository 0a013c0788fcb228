"""`block_sparse_attention`: checks, choice of backend, and the operators that torch.compile sees."""

from __future__ import annotations

import importlib.util
import os
from typing import Literal, get_args, overload

import torch

from steer_kernels.block_mask import BlockMask
from steer_kernels.block_sparse import gather, reference
from steer_kernels.config import config
from steer_kernels.rule import ModRule, TokenRule
from steer_kernels.shapes import check_attention

Backend = Literal["triton", "gather", "flex", "reference"]
BACKENDS: tuple[Backend, ...] = get_args(Backend)  # in the order of preference


@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = ...,
    is_causal: bool = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def block_sparse_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Exact softmax attention over the keys that `block_mask` lets each query see; the other blocks cost nothing.

    Args:
        query: (B, H, S_q, D). key, value: (B, H_kv, S_k, D), H a multiple of H_kv. Any lengths.
        block_mask: for S_q x S_k tokens, on the same device; see `BlockMask`.
        scale: factor on the products; None = 1 / sqrt(D).
        is_causal: also hide key j from query i unless j <= i + S_k - S_q, so that the last query sees the last key.
        return_lse: return the natural log-sum-exp of the scaled products as well.
        backend: "triton" (CUDA), "gather" (CPU), "flex" (torch's compiled flex_attention), "reference" (the
            definition, quadratic memory), None = the first of these that can serve the call; see `backend_for`.

    Returns:
        Output (B, H, S_q, D), and with `return_lse` the log-sum-exp (B, H, S_q) in fp32 (fp64 for fp64 input). A
        query that sees no key has output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes that do not fit, a mask for other lengths, heads or another device, or an explicit backend
            that does not exist or cannot serve the call, with the reason.
    """
    mask = block_mask.with_causal() if is_causal else block_mask
    _check(query, key, value, mask)
    if backend is None:
        backend = backend_for(query, key, value, mask, return_lse=return_lse)
    elif backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    elif reason := refusal(backend, query, key, value, mask, return_lse=return_lse):
        raise ValueError(f'backend="{backend}" cannot serve this call: {reason}')
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    out, lse = _run(backend, query, key, value, mask, scale, return_lse)
    if not return_lse:
        return out
    assert lse is not None
    return out, lse


def backend_for(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, block_mask: BlockMask, *, return_lse: bool = False
) -> str:
    """The backend that `block_sparse_attention` takes for such a call when none is asked for."""
    for backend in BACKENDS if query.device.type == "cuda" else BACKENDS[1:]:  # interpreting is for tests
        if refusal(backend, query, key, value, block_mask, return_lse=return_lse) is None:
            return backend
    raise AssertionError("the reference serves every call")


def refusal(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    block_mask: BlockMask,
    *,
    return_lse: bool = False,
) -> str | None:
    """Why `backend` cannot serve such a call, in words; None if it can."""
    gradient = torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value))
    device, dtype, width = query.device.type, query.dtype, query.shape[-1]
    if backend == "reference":
        return None
    if gradient and not (backend == "flex" and device == "cuda"):
        return "it gives no gradient; call it under torch.no_grad(), or use the reference"
    if backend == "gather":
        if device != "cpu":
            return f"it runs on a CPU, and the tensors are on {device}"
        if width != value.shape[-1]:
            return f"keys of head_dim {width} with values of head_dim {value.shape[-1]}"
        return None if dtype in _FLOATS else f"no kernel for {dtype}"
    if backend == "flex":
        return _flex_refusal(device, dtype, width, query.shape[2], block_mask, return_lse)
    return _triton_refusal(device, dtype, width, value.shape[-1], block_mask)


_FLOATS = (torch.float64, torch.float32, torch.float16, torch.bfloat16)


def _flex_refusal(
    device: str, dtype: torch.dtype, width: int, q_len: int, mask: BlockMask, return_lse: bool
) -> str | None:
    if device == "cpu" and return_lse:
        return "torch's flex_attention returns no log-sum-exp on a CPU"
    if device == "cuda" and width < 16:
        return f"it needs a head_dim of at least 16, got {width}"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}"
    return None


def _triton_refusal(device: str, dtype: torch.dtype, width: int, value_width: int, mask: BlockMask) -> str | None:
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install triton"
    if device != "cuda" and os.environ.get("TRITON_INTERPRET") != "1":
        return f"it runs on a CUDA device, and the tensors are on {device} (TRITON_INTERPRET=1 interprets it)"
    if device != "cuda" and dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bfloat16 wrongly"
    if dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"no kernel for {dtype}; it has float16, bfloat16 and float32"
    if width > 256:
        return f"head_dim {width} is above 256"
    if width != value_width:
        return f"keys of head_dim {width} with values of head_dim {value_width}"
    if isinstance(mask.rule, ModRule):
        return "the mask's rule is a Python function (a FlexAttention mask_mod)"
    if any(size < 16 or size & (size - 1) for size in mask.block_size):
        return f"blocks of {mask.block_size[0]} x {mask.block_size[1]} tokens; it needs powers of two from 16 on"
    return None


def _run(
    backend: str,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    mask: BlockMask,
    scale: float,
    return_lse: bool,
) -> tuple[torch.Tensor, torch.Tensor | None]:
    if backend == "flex":
        from steer_kernels.block_sparse import flex

        return flex.forward(query, key, value, mask, scale, return_lse)
    if backend == "reference" or isinstance(mask.rule, ModRule):
        return (reference if backend == "reference" else gather).forward(query, key, value, mask, scale)
    rule = mask.rule
    lists = [mask.full_num, mask.full_idx, mask.partial_num, mask.partial_idx]
    work: list[torch.Tensor] = []
    if backend == "triton":
        if scale < 0:
            query, scale = -query, -scale
        query, key, value = (t if t.stride(-1) == 1 else t.contiguous() for t in (query, key, value))
        settings = config(query.device, query.dtype, query.shape[-1], mask.block_size)
        tiles = mask.block_size[0] // min(settings.tile_q, mask.block_size[0])
        work = list(mask.schedule(query.shape[0], query.shape[1], tiles, settings.programs))
    return _attend(
        query, key, value, lists, work, rule.query if rule else None, rule.key if rule else None,
        rule.kind if rule else "", rule.radius_squared if rule else 0, mask.causal, list(mask.block_size), scale,
        backend,
    )  # fmt: skip


@torch.library.custom_op("steer_kernels::block_sparse_attention", mutates_args=())
def _attend(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor],
    work: list[torch.Tensor],
    rule_query: torch.Tensor | None,
    rule_key: torch.Tensor | None,
    rule_kind: str,
    radius_squared: int,
    causal: bool,
    block_size: list[int],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    rule = None
    if rule_query is not None and rule_key is not None:
        rule = TokenRule(rule_kind, rule_query, rule_key, radius_squared)
    full_num, full_idx, partial_num, partial_idx = lists
    mask = BlockMask(
        query.shape[2],
        key.shape[2],
        (block_size[0], block_size[1]),
        full_num,
        full_idx,
        partial_num,
        partial_idx,
        rule=rule,
        causal=causal,
    )
    if backend == "gather":
        return gather.forward(query, key, value, mask, scale)
    from steer_kernels.block_sparse import triton
    from steer_kernels.schedule import Schedule

    settings = config(query.device, query.dtype, query.shape[-1], mask.block_size)
    return triton.forward(query, key, value, mask, scale, settings, Schedule(*work))


@_attend.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    lists: list[torch.Tensor],
    work: list[torch.Tensor],
    rule_query: torch.Tensor | None,
    rule_key: torch.Tensor | None,
    rule_kind: str,
    radius_squared: int,
    causal: bool,
    block_size: list[int],
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    (batch, heads, q_len, _), exact = query.shape, torch.promote_types(query.dtype, torch.float32)
    if backend == "triton":
        return torch.empty_like(query), query.new_empty(batch, heads, q_len, dtype=exact)
    whole = -(-q_len // block_size[0]) * block_size[0]
    out, lse = (query.new_empty(batch, heads, whole, *last, dtype=exact) for last in ([value.shape[-1]], []))
    return out[:, :, :q_len].to(query.dtype), lse[:, :, :q_len]


def _check(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: BlockMask) -> None:
    check_attention(query, key, value)
    heads, kv_heads = query.shape[1], key.shape[1]
    if (mask.q_len, mask.kv_len) != (query.shape[2], key.shape[2]):
        raise ValueError(
            f"the mask is for {mask.q_len} queries and {mask.kv_len} keys; got {query.shape[2]} and {key.shape[2]}"
        )
    rule_batch, rule_heads = mask.rule.batch_heads if mask.rule else (1, 1)
    for batch in (mask.shape[0], rule_batch):
        if batch not in (1, query.shape[0]):
            raise ValueError(f"the mask has {batch} batch rows; it needs 1 or {query.shape[0]}")
    if mask.shape[1] not in (1, kv_heads, heads) or rule_heads not in (1, heads):
        raise ValueError(
            f"the mask has {mask.shape[1]} heads and its rule {rule_heads}; it needs 1, {kv_heads} or {heads}, the "
            f"rule 1 or {heads}"
        )
    if mask.device != query.device:
        raise ValueError(f"the mask is on {mask.device}, the query on {query.device}: call mask.to({query.device})")
