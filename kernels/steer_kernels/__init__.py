"""Attention operations for steer: torch and triton only, no knowledge of models."""

from steer_kernels.partial import merge, partial

__all__ = ["merge", "partial"]
