"""Scores of (query block, key block) pairs, and the mass of single keys, made without an S x S map."""

from steer_kernels.estimate.api import BlockProfile, block_mass, block_profile, column_mass, pooled_scores, qk_estimate

__all__ = ["BlockProfile", "block_mass", "block_profile", "column_mass", "pooled_scores", "qk_estimate"]
