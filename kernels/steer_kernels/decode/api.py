"""Shape checks and backend choice for `gathered_decode`."""

from __future__ import annotations

import importlib
import importlib.util
import os
from typing import Literal, overload

import torch

from steer_kernels.decode import reference
from steer_kernels.shapes import check_attention

BACKENDS = ("triton", "gather", "reference")
MAX_ROWS = 128  # query rows that one Triton program can hold in registers

_HAS_TRITON = importlib.util.find_spec("triton") is not None
_INTERPRET = os.environ.get("TRITON_INTERPRET") == "1"  # triton reads it once, too


@overload
def gathered_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
    lengths: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def gathered_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
    lengths: torch.Tensor | None = ...,
    scale: float | None = ...,
    return_lse: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def gathered_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    *,
    page_size: int,
    lengths: torch.Tensor | None = None,
    scale: float | None = None,
    return_lse: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention of a few query tokens over the listed pages of a key/value cache.

    All S query tokens see all listed tokens, as in decoding one token or a few speculative ones. Page p holds the
    tokens p * page_size to (p + 1) * page_size - 1 of the T axis. Memory is read for listed pages only.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, T, D), H a multiple of H_kv, any strides.
        pages: (B, Hp, P) int32 or int64 page numbers in any order, each at most once in a list; -1 = unused slot.
            Hp = H (a list per query head), H_kv (per group) or 1 (for all).
        page_size: tokens per page.
        lengths: (B,) int32 or int64, tokens that exist (a static cache holds unused ones after them, which are never
            used, whatever they hold); None = T.
        scale: factor on the products; None = 1 / sqrt(D).
        return_lse: also return the log-sum-exp, for `steer_kernels.merge`.
        backend: "triton" (CUDA, or any device under TRITON_INTERPRET=1), "gather" (plain torch, made for the CPU; on
            another device it waits for the device), "reference" (the definition), None = the fastest that can.

    Returns:
        Output (B, H, S, D), and with `return_lse` the natural log-sum-exp (B, H, S) of the scaled products in float32
        (float64 for float64 input). A list without a token gives output 0 and log-sum-exp -inf.

    Raises:
        ValueError: shapes that do not fit, or an explicit backend that cannot serve this call.
    """
    _check(query, key, value, pages, page_size, lengths)
    if backend is None:
        fast = BACKENDS if query.is_cuda else BACKENDS[1:]  # the interpreter is for tests
        backend = next(name for name in fast if refusal(name, query, key, value, pages) is None)
    if reason := refusal(backend, query, key, value, pages):
        raise ValueError(f'backend="{backend}" cannot serve this call: {reason}')
    if backend == "reference":
        out, lse = reference.gathered_decode(
            query, key, value, pages, page_size=page_size, lengths=lengths, scale=scale
        )
    else:
        scale = query.shape[-1] ** -0.5 if scale is None else scale
        out, lse = torch.ops.steer_kernels.gathered_decode(query, key, value, pages, page_size, lengths, scale, backend)
    return (out, lse) if return_lse else out


def refusal(
    backend: str, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor
) -> str | None:
    """Why `gathered_decode` cannot serve a call with this backend, or None if it can.

    Args:
        backend: "triton", "gather" or "reference".
        query, key, value, pages: the arguments of `gathered_decode`.

    Raises:
        ValueError: a backend that does not exist.
    """
    if backend not in BACKENDS:
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    if backend == "reference":
        return None
    if torch.is_grad_enabled() and any(t.requires_grad for t in (query, key, value)):
        return "it gives no gradient; the reference does"
    return _refusal_by_triton(query, key, value, pages) if backend == "triton" else None


def _refusal_by_triton(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, pages: torch.Tensor) -> str | None:
    if not _HAS_TRITON:
        return "triton is not installed; pip install 'steer-attention[triton]'"
    if not query.is_cuda and not _INTERPRET:
        return f"it needs a CUDA device, not {query.device.type} (or TRITON_INTERPRET=1, for tests)"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"no kernel for {query.dtype}, only float16, bfloat16 and float32"
    if query.dtype == torch.bfloat16 and _INTERPRET:
        return "triton's interpreter multiplies bfloat16 matrices wrongly"
    if query.shape[-1] > 256:
        return f"head dimension {query.shape[-1]} is over 256"
    if key.stride(-1) != 1 or value.stride(-1) != 1:
        return f"key and value need a contiguous last dimension; strides are {key.stride()}, {value.stride()}"
    rows = query.shape[1] * query.shape[2] // _lists(query, key, pages)
    if rows > MAX_ROWS:
        return f"{rows} query rows (heads of a group x query tokens) share a list; at most {MAX_ROWS}"
    return None


def _check(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
    lengths: torch.Tensor | None,
) -> None:
    check_attention(query, key, value)
    shapes = f"query {tuple(query.shape)}, key {tuple(key.shape)}, value {tuple(value.shape)}"
    if key.shape != value.shape:
        raise ValueError(f"keys and values of a cache have one shape: {shapes}")
    heads = (1, key.shape[1], query.shape[1])
    if pages.ndim != 3 or pages.shape[0] != query.shape[0] or pages.shape[1] not in heads:
        raise ValueError(f"pages must be (B, Hp, P) with Hp one of {heads}; got {tuple(pages.shape)} for {shapes}")
    if lengths is not None and lengths.shape != query.shape[:1]:
        raise ValueError(f"lengths must be (B,) = ({query.shape[0]},); got {tuple(lengths.shape)}")
    for name, numbers in (("pages", pages), ("lengths", lengths)):
        if numbers is not None and numbers.dtype not in (torch.int32, torch.int64):
            raise ValueError(f"{name} must be int32 or int64; got {numbers.dtype}")
    if page_size < 1:
        raise ValueError(f"page_size must be at least 1; got {page_size}")


def _lists(query: torch.Tensor, key: torch.Tensor, pages: torch.Tensor) -> int:
    """Page lists that are walked per batch entry: one per key head, or per query head if each has its own."""
    return query.shape[1] if pages.shape[1] == query.shape[1] else key.shape[1]


def _gathered_decode(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
    lengths: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    implementation = importlib.import_module(f"steer_kernels.decode.{backend}")
    batch, heads, tokens, width = query.shape
    lists = _lists(query, key, pages)
    rows = query.reshape(batch, lists, heads // lists * tokens, width).contiguous()
    out, lse = implementation.attend(rows, key, value, pages.expand(-1, lists, -1), page_size, lengths, scale)
    return out.view(query.shape), lse.view(query.shape[:3])


def _fake(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    pages: torch.Tensor,
    page_size: int,
    lengths: torch.Tensor | None,
    scale: float,
    backend: str,
) -> tuple[torch.Tensor, torch.Tensor]:
    accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
    return query.new_empty(query.shape), query.new_empty(query.shape[:3], dtype=accurate)


# An op, so that torch.compile sees one node. Defined by hand: torch.library.custom_op costs 11 us a call, this 2.
torch.library.define(
    "steer_kernels::gathered_decode",
    "(Tensor query, Tensor key, Tensor value, Tensor pages, int page_size, Tensor? lengths, float scale, str backend)"
    " -> (Tensor, Tensor)",
)
torch.library.impl("steer_kernels::gathered_decode", "CompositeExplicitAutograd")(_gathered_decode)
torch.library.register_fake("steer_kernels::gathered_decode")(_fake)
