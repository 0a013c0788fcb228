"""Attention whose groups of keys are given new masses."""

from steer_kernels.grouped.api import grouped_attention

__all__ = ["grouped_attention"]
