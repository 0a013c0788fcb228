"""Scores of (query block, key block) pairs, made without an S x S map."""

from steer_kernels.estimate.api import block_mass, pooled_scores, qk_estimate

__all__ = ["block_mass", "pooled_scores", "qk_estimate"]
