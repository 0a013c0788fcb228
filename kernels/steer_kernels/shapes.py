"""The checks that every operation makes of its tensors and block sizes."""

from __future__ import annotations

import torch


def check_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor | None = None) -> None:
    """(B, H, S, D) tensors that fit together, one dtype and one device. `value` may have a width of its own."""
    tensors = {"query": query, "key": key} | ({} if value is None else {"value": value})
    shapes = ", ".join(f"{name} {tuple(tensor.shape)}" for name, tensor in tensors.items())
    if any(tensor.ndim != 4 for tensor in tensors.values()):
        raise ValueError(f"query, key and value must be (B, H, S, D); got {shapes}")
    alike = value is None or key.shape[:3] == value.shape[:3]
    if not alike or query.shape[0] != key.shape[0] or query.shape[-1] != key.shape[-1]:
        raise ValueError(f"query, key and value do not fit together: {shapes}")
    if query.shape[1] % key.shape[1]:
        raise ValueError(f"query heads must be a multiple of key/value heads: {shapes}")
    kinds = {f"{tensor.dtype} on {tensor.device}" for tensor in tensors.values()}
    if len(kinds) > 1:
        raise ValueError(f"query, key and value must have one dtype and one device; got {', '.join(sorted(kinds))}")


def pair_of_blocks(block_size: int | tuple[int, int]) -> tuple[int, int]:
    """(query, key) tokens of a block from one number or two."""
    pair = (block_size, block_size) if isinstance(block_size, int) else tuple(block_size)
    if len(pair) != 2 or min(pair) < 1:
        raise ValueError(f"block_size={block_size} must be one number or (query, key), at least 1")
    return pair
