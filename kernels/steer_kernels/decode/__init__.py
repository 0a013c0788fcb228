"""Attention of a few query tokens over chosen pages of a key/value cache, and the scores that choose them."""

from steer_kernels.decode.api import gathered_decode, refusal
from steer_kernels.decode.pages import PageSummary, page_scores, page_summary, select_pages

__all__ = ["PageSummary", "gathered_decode", "page_scores", "page_summary", "refusal", "select_pages"]
