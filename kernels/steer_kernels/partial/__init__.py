"""Attention over a group of keys with its log-sum-exp, and the merge of such parts."""

from steer_kernels.partial.api import merge, partial

__all__ = ["merge", "partial"]
