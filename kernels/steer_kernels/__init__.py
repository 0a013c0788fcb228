"""Attention operations for steer: torch and triton only, no knowledge of models."""

from steer_kernels import build, order, patterns
from steer_kernels.block_mask import BlockMask
from steer_kernels.block_sparse import block_sparse_attention
from steer_kernels.decode import gathered_decode, page_scores, page_summary, select_pages
from steer_kernels.estimate import block_mass, block_profile, pooled_scores, qk_estimate
from steer_kernels.grouped import grouped_attention
from steer_kernels.partial import merge, partial
from steer_kernels.rule import TokenRule

__all__ = [
    "BlockMask",
    "TokenRule",
    "block_mass",
    "block_profile",
    "block_sparse_attention",
    "build",
    "gathered_decode",
    "grouped_attention",
    "merge",
    "order",
    "page_scores",
    "page_summary",
    "partial",
    "patterns",
    "pooled_scores",
    "qk_estimate",
    "select_pages",
]
