"""Shape checks, backend choice and registration of the block scores."""

from __future__ import annotations

import os
from importlib.util import find_spec
from typing import NamedTuple

import torch

from steer_kernels.estimate import chunked, reference
from steer_kernels.shapes import check_attention, pair_of_blocks

BACKENDS = ("triton", "torch", "reference")
COLUMN_TILE = (64, 64)  # queries and keys that a Triton program of the column mass holds
HAS_TRITON = find_spec("triton") is not None


def pooled_scores(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    block_size: int | tuple[int, int] = 128,
    pool: str = "mean",
    scale: float | None = None,
) -> torch.Tensor:
    """One score for every (query block, key block) pair from one vector per block.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        block_size: tokens in a (query, key) block, or one number for both. The last block of either axis may be
            shorter; it is pooled over the tokens that exist.
        pool: "mean" = product of the block means, the mean score of the pair; "max" = product of the channel-wise
            maxima; "minmax" = an upper bound of every score of the pair: per channel the two blocks lie in
            middle ± radius, and a product of two such numbers is at most
            mq mk + rq |mk| + |mq| rk + rq rk. With one query per block this is Quest's bound.
        scale: factor on the products; None = 1 / sqrt(D).

    Returns:
        (B, H, nQ, nK) float32 (float64 for float64 tensors), on the scale of the attention scores.

    Raises:
        ValueError: shapes that do not fit, or a pool that does not exist.

    Source: Tang et al., "Quest", arXiv 2406.10774 (minmax); Jiang et al., "MInference 1.0", arXiv 2407.02490 (mean).
    """
    sizes = _check(query, key, block_size)
    if pool not in reference.POOLS:
        raise ValueError(f"pool={pool!r} does not exist; choose from {', '.join(reference.POOLS)}")
    return reference.pooled_scores(query, key, sizes, pool, _scale(query, scale))


def block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_size: int | tuple[int, int] = 128,
    scale: float | None = None,
    is_causal: bool = False,
    backend: str | None = None,
) -> torch.Tensor:
    """Probability mass of every key block, averaged over the queries of a query block: exact, without the map.

    P = exp(scale * query . key - lse), summed over the keys of the block. Costs the score half of dense attention;
    memory for the result and a tile. No gradient flows through it.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products, from an attention call. A query at -inf saw nothing: its
            mass is 0.
        block_size: tokens in a (query, key) block, or one number for both; the last of either axis may be shorter.
        scale: factor on the products; None = 1 / sqrt(D).
        is_causal: key j is visible to query i only if j <= i + S_k - S_q.
        backend: "triton", "torch" = a tile at a time, "reference" = through the map, None = the fastest that can.

    Returns:
        (B, H, nQ, nK) float32 (float64 for float64 tensors). Rows sum to 1 where `lse` is over all visible keys and
        every query of the block sees one.

    Raises:
        ValueError: shapes that do not fit, or an explicit backend that cannot serve this call.
    """
    sizes = _check(query, key, block_size)
    _check_lse(query, lse)
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    query, key, lse = query.detach(), key.detach(), lse.detach()
    return _block_mass(query, key, lse, *sizes, _scale(query, scale), is_causal, backend)


def column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    scale: float | None = None,
    is_causal: bool = False,
    keep: torch.Tensor | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Probability that every key gets, summed over the queries: the column sums of the map, without the map.

    P = exp(scale * query . key - lse). Costs the score half of attention; memory for the result and a tile. No gradient
    flows through it.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products over the keys that the query sees, from an attention call.
            A query at -inf gives nothing.
        scale: factor on the products; None = 1 / sqrt(D).
        is_causal: key j is visible to query i only if j <= i + S_k - S_q.
        keep: bool, broadcastable to (B, H, S_q, S_k), True = the query sees the key; None = all. Together with
            `is_causal` both hold.
        backend: "triton", "torch" = a tile at a time, "reference" = through the map, None = the fastest that can.

    Returns:
        (B, H, S_k) float32 (float64 for float64 tensors). They sum to the number of queries that see a key.

    Raises:
        ValueError: shapes that do not fit, or an explicit backend that cannot serve this call.
    """
    check_attention(query, key)
    _check_lse(query, lse)
    if keep is not None:
        wanted = (*query.shape[:3], key.shape[2])
        keep = keep[(None,) * (4 - keep.ndim)]
        alike = keep.ndim == 4 and all(n in (1, want) for n, want in zip(keep.shape, wanted, strict=True))
        if not alike or keep.dtype != torch.bool:
            raise ValueError(
                f"keep must be bool and broadcastable to (B, H, S_q, S_k) = {wanted}; got {keep.dtype} "
                f"{tuple(keep.shape)}"
            )
    if backend not in (None, *BACKENDS):
        raise ValueError(f"backend={backend!r} does not exist; choose from {', '.join(BACKENDS)}")
    query, key, lse = query.detach(), key.detach(), lse.detach()
    return _column_mass(query, key, lse, keep, _scale(query, scale), is_causal, backend)


class BlockProfile(NamedTuple):
    """What each (query block, key block) pair of a softmax map holds; three of (B, H, nQ, nK).

    Attributes:
        mass: probability that falls in the key block, averaged over the queries of the query block.
        share_below: share of the pair's entries that are below the threshold.
        peak: its largest entry.
    """

    mass: torch.Tensor
    share_below: torch.Tensor
    peak: torch.Tensor


def block_profile(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    *,
    block_size: int | tuple[int, int] = 128,
    threshold: float = 1e-3,
    scale: float | None = None,
    backend: str | None = None,
) -> BlockProfile:
    """How mass is spread inside the blocks of P = exp(scale * query . key - lse): exact, without the map.

    The mean entry of a pair is its mass divided by the keys of the block; peak / mean is the incoherence of
    arXiv 2506.16054. For offline searches: it costs about twice `block_mass`, and no gradient flows through it.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        lse: (B, H, S_q) log-sum-exp of the scaled products, from an attention call. A query at -inf saw nothing: its
            entries are 0.
        block_size: tokens in a (query, key) block, or one number for both; the last of either axis may be shorter.
        threshold: entries below it are counted by `share_below`.
        scale: factor on the products; None = 1 / sqrt(D).
        backend: "torch" = a tile at a time, "reference" = through the map, None = "torch".

    Raises:
        ValueError: shapes that do not fit, or a backend that does not exist.
    """
    sizes = _check(query, key, block_size)
    _check_lse(query, lse)
    if backend not in (None, "torch", "reference"):
        raise ValueError(f"backend={backend!r} does not exist for block_profile; choose from torch, reference")
    implementation = reference.block_profile if backend == "reference" else chunked.block_profile
    query, key, lse = query.detach(), key.detach(), lse.detach()
    return BlockProfile(*implementation(query, key, lse, sizes, threshold, _scale(query, scale)))


def qk_estimate(
    query: torch.Tensor,
    key: torch.Tensor,
    *,
    block_size: int | tuple[int, int] = 128,
    lse: torch.Tensor | None = None,
    samples: int | None = None,
    pool: str = "mean",
    scale: float | None = None,
    is_causal: bool = False,
    generator: torch.Generator | None = None,
    backend: str | None = None,
) -> torch.Tensor:
    """Probability mass of every key block for every query block, as exact as what is given allows.

    With `lse`: exact, see `block_mass`. With `samples`: the mean over that many queries of each block, drawn without
    replacement and alike for all heads, each normalised over all keys that it sees (samples / block of the cost of
    `block_mass`). With neither: softmax over key blocks of the pooled score plus the log of the keys in the block.

    Args:
        query: (B, H, S_q, D). key: (B, H_kv, S_k, D), H a multiple of H_kv.
        block_size: tokens in a (query, key) block, or one number for both; the last of either axis may be shorter.
        lse: (B, H, S_q) log-sum-exp of the scaled products.
        samples: queries per block; a block with fewer uses all of its own.
        pool: see `pooled_scores`.
        scale: factor on the products; None = 1 / sqrt(D).
        is_causal: key j is visible to query i only if j <= i + S_k - S_q.
        generator: of the samples, on the query's device.
        backend: of `block_mass`, see there; only with `lse`.

    Returns:
        (B, H, nQ, nK) float32 (float64 for float64 tensors); rows sum to 1.

    Raises:
        ValueError: shapes that do not fit, options that exclude each other, or a backend that cannot serve this call.

    Source: Xi et al., "Sparse VideoGen", arXiv 2502.01776; Jiang et al., "MInference 1.0", arXiv 2407.02490 (samples).
    """
    sizes = _check(query, key, block_size)
    if lse is not None:
        if samples is not None:
            raise ValueError("lse gives the exact mass: pass either lse or samples")
        return block_mass(query, key, lse, block_size=sizes, scale=scale, is_causal=is_causal, backend=backend)
    if backend is not None:
        raise ValueError(f"backend={backend!r} is a choice for the exact mass, which needs lse")
    if samples is not None:
        if samples < 1:
            raise ValueError(f"samples must be at least 1 query per block; got {samples}")
        rows, exists = _draw(query.shape[2], sizes[0], samples, generator, query.device)
        query, key = query.detach(), key.detach()
        return _sampled_mass(query, key, rows, exists, sizes[1], _scale(query, scale), is_causal)
    scores = pooled_scores(query, key, block_size=sizes, pool=pool, scale=scale)
    keys = reference.visible_keys(query.shape[2], key.shape[2], sizes, is_causal, query.device)
    mass = torch.softmax(scores + keys.log(), -1)
    return mass.masked_fill((keys == 0).all(-1, keepdim=True), 0.0) if is_causal else mass


@torch.library.custom_op(
    "steer_kernels::block_mass",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor lse, int bq, int bk, float scale, bool is_causal, str? backend)"
    " -> Tensor",
)
def _block_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    bq: int,
    bk: int,
    scale: float,
    is_causal: bool,
    backend: str | None,
) -> torch.Tensor:
    # chosen here and not by the caller, so that no trace sees the question what the device can do
    if _choose(query, (bq, bk), backend) == "triton":
        from steer_kernels.estimate import triton

        return triton.block_mass(query, key, lse, (bq, bk), scale, is_causal)
    implementation = reference.block_mass if backend == "reference" else chunked.block_mass
    return implementation(query, key, lse, (bq, bk), scale, is_causal)


@_block_mass.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    bq: int,
    bk: int,
    scale: float,
    is_causal: bool,
    backend: str | None,
) -> torch.Tensor:
    shape = *query.shape[:2], -(-query.shape[2] // bq), -(-key.shape[2] // bk)
    return query.new_empty(shape, dtype=reference.accurate(query))


@torch.library.custom_op(
    "steer_kernels::column_mass",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor lse, Tensor? keep, float scale, bool is_causal, str? backend) -> Tensor",
)
def _column_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    backend: str | None,
) -> torch.Tensor:
    if _choose(query, COLUMN_TILE, backend) == "triton":
        from steer_kernels.estimate import triton

        return triton.column_mass(query, key, lse, keep, COLUMN_TILE, scale, is_causal)
    implementation = reference.column_mass if backend == "reference" else chunked.column_mass
    return implementation(query, key, lse, keep, scale, is_causal)


@_column_mass.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    lse: torch.Tensor,
    keep: torch.Tensor | None,
    scale: float,
    is_causal: bool,
    backend: str | None,
) -> torch.Tensor:
    return query.new_empty((*query.shape[:2], key.shape[2]), dtype=reference.accurate(query))


@torch.library.custom_op(
    "steer_kernels::sampled_mass",
    mutates_args=(),
    schema="(Tensor query, Tensor key, Tensor rows, Tensor exists, int bk, float scale, bool is_causal) -> Tensor",
)
def _sampled_mass(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    exists: torch.Tensor,
    bk: int,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    return chunked.sampled_mass(query, key, rows, exists, bk, scale, is_causal)


@_sampled_mass.register_fake
def _(
    query: torch.Tensor,
    key: torch.Tensor,
    rows: torch.Tensor,
    exists: torch.Tensor,
    bk: int,
    scale: float,
    is_causal: bool,
) -> torch.Tensor:
    shape = *query.shape[:2], rows.shape[0], -(-key.shape[2] // bk)
    return query.new_empty(shape, dtype=reference.accurate(query))


def _draw(
    q_len: int, bq: int, samples: int, generator: torch.Generator | None, device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nQ, samples) queries of each block without replacement, and which of them exist."""
    blocks, n = -(-q_len // bq), min(samples, bq)
    lottery = torch.rand(blocks, bq, generator=generator, device=device)
    token = torch.arange(blocks * bq, device=device).view(blocks, bq)
    # what lies past the last query is drawn last
    rows = token.gather(1, lottery.masked_fill(token >= q_len, 2.0).topk(n, largest=False).indices)
    return rows.clamp(max=q_len - 1), rows < q_len


def _check(query: torch.Tensor, key: torch.Tensor, block_size: int | tuple[int, int]) -> tuple[int, int]:
    check_attention(query, key)
    return pair_of_blocks(block_size)


def _check_lse(query: torch.Tensor, lse: torch.Tensor) -> None:
    if lse.shape != query.shape[:3]:
        raise ValueError(f"lse must be {tuple(query.shape[:3])} like the query (B, H, S); got {tuple(lse.shape)}")


def _scale(query: torch.Tensor, scale: float | None) -> float:
    return query.shape[-1] ** -0.5 if scale is None else float(scale)


def _choose(query: torch.Tensor, block_size: tuple[int, int], backend: str | None) -> str:
    if backend is None:
        return "triton" if query.is_cuda and not _refusal(query, block_size) else "torch"
    reason = _refusal(query, block_size) if backend == "triton" else None
    if reason:
        raise ValueError(f'backend="triton" cannot serve this call: {reason}')
    return backend


def _refusal(query: torch.Tensor, block_size: tuple[int, int]) -> str | None:
    """Why the Triton kernel cannot serve the call, or None."""
    if not HAS_TRITON:
        return "triton is not installed"
    if query.dtype not in (torch.float16, torch.bfloat16, torch.float32):
        return f"it takes float16, bfloat16 and float32, not {query.dtype}"
    if query.shape[-1] > 256:
        return f"it takes heads of at most 256 channels, not {query.shape[-1]}"
    if block_size[0] > 256 or block_size[1] > 1024:
        return f"it takes blocks of at most 256 queries and 1024 keys, not {block_size}"
    interpreted = query.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") == "1"
    if not query.is_cuda and not interpreted:
        return f"it needs a CUDA device, not {query.device.type} (or TRITON_INTERPRET=1 to be interpreted on a CPU)"
    if interpreted and query.dtype == torch.bfloat16:
        return "the interpreter's product is wrong in bfloat16"
    from steer_kernels.estimate import triton

    if triton.tiling(query, block_size) is None:
        tile = f"{block_size[0]} queries of {query.shape[-1]} channels in {query.dtype}"
        return f"{tile} do not fit into the shared memory of the device"
    return None
