"""Attention over listed blocks of keys."""

from steer_kernels.block_sparse.api import backend_for, block_sparse_attention, refusal

__all__ = ["backend_for", "block_sparse_attention", "refusal"]
