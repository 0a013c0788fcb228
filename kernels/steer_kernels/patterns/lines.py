"""Patterns along one axis: sinks with a window, vertical stripes, power-of-two distances."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.nn.functional import pad

from steer_kernels.block_mask import BlockMask
from steer_kernels.patterns.layout import at_least
from steer_kernels.rule import ALWAYS_VISIBLE, EVERYTHING, TokenRule
from steer_kernels.shapes import pair_of_blocks


def sink_window(
    *,
    q_len: int,
    kv_len: int | None = None,
    sink: int | Sequence[int],
    window: int | Sequence[int],
    causal: bool = True,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """The first `sink` keys and the `window` latest ones, the query's own included (StreamingLLM).

    Queries are aligned to the end: query i stands at i + kv_len - q_len. Key j is visible to a query at p if j <= p and
    (j < sink or p - j < window). Without `causal`, if j < sink or |p - j| < window.

    Args:
        q_len, kv_len: tokens; kv_len None = q_len.
        sink, window: tokens; one number, or one per head. A head with window = kv_len sees everything.
        causal: see above.
        block_size: tokens in a (query, key) block, or one number for both.
        device: of the mask.

    Raises:
        ValueError: no token, a negative sink, a window below 1, or different numbers of heads.

    Source: arXiv 2309.17453 (StreamingLLM); per head arXiv 2406.14909 (MoA; its window counts the sinks too) and
    arXiv 2410.10819 (DuoAttention).
    """
    kv_len, (bq, bk) = q_len if kv_len is None else kv_len, pair_of_blocks(block_size)
    at_least(1, q_len=q_len, kv_len=kv_len)
    sinks, windows = _per_head(sink, window, device)
    first, last = _rows(q_len, bq, kv_len - q_len, device)
    left, right = _columns(kv_len, bk, device)
    after_sinks = torch.maximum(left, sinks)  # first key of the block that is not a sink
    visible = (left < sinks) | (right > first - windows)
    full = (right < sinks) | (last - after_sinks < windows)
    if not causal:
        visible = visible & ((left < sinks) | (left < last + windows))
        full = full & ((right < sinks) | (right < first + windows))
    place = torch.arange(kv_len - q_len, kv_len, device=device)
    key = torch.arange(kv_len, device=device)
    high = torch.full_like(place + windows, EVERYTHING) if causal else place + windows
    rule = TokenRule.box(place - windows + 1, high, torch.where(key < sinks, ALWAYS_VISIBLE, key))
    return BlockMask.from_bool(visible, (bq, bk), q_len=q_len, kv_len=kv_len, partial=~full, rule=rule, causal=causal)


def a_shape(
    *,
    q_len: int,
    kv_len: int | None = None,
    sink: int = 1024,
    window: int = 4096,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """`sink_window` under the name and with the sizes of MInference: causal, 1024 first and 4096 latest keys.

    Source: arXiv 2407.02490 (MInference).
    """
    return sink_window(q_len=q_len, kv_len=kv_len, sink=sink, window=window, block_size=block_size, device=device)


def vertical_stripes(
    *,
    q_len: int,
    columns: Sequence[int] | torch.Tensor,
    width: int | None = None,
    block_size: int | tuple[int, int] = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Some key columns that every query sees, and optionally the band |i - j| <= width.

    Args:
        q_len: tokens.
        columns: token numbers, a sequence or a 1-D integer tensor; a tensor on another device is not checked, as that
            would wait for it.
        width: of the band; None = no band.
        block_size: tokens in a (query, key) block, or one number for both.
        device: of the mask.

    Raises:
        ValueError: a column that does not exist, or a negative width.

    Source: arXiv 2506.03065 (Sparse-vDiT), arXiv 2407.02490 (MInference).
    """
    bq, bk = pair_of_blocks(block_size)
    at_least(1, q_len=q_len)
    at_least(0, width=0 if width is None else width)
    columns = torch.as_tensor(columns, dtype=torch.int64)
    if columns.ndim != 1:
        raise ValueError(f"columns must be 1-D, got shape {tuple(columns.shape)}")
    if columns.device.type == "cpu" and columns.numel() and not 0 <= int(columns.min()) <= int(columns.max()) < q_len:
        raise ValueError(f"columns from {int(columns.min())} to {int(columns.max())}: must be from 0 to {q_len - 1}")
    striped = torch.zeros(q_len, dtype=torch.bool, device=device).index_fill_(
        0, columns.to(device, non_blocking=True), True
    )
    first, last = _rows(q_len, bq, 0, device)
    left, right = _columns(q_len, bk, device)
    key = torch.arange(q_len, device=device)
    visible = _in_blocks(striped, bk, False).any(-1).expand(len(first), -1)
    # a block is full if the band reaches from its first to its last key that is no stripe; one that is all stripes is
    left_open = _in_blocks(torch.where(striped, EVERYTHING, key), bk, EVERYTHING).amin(-1)
    right_open = _in_blocks(torch.where(striped, -1, key), bk, -1).amax(-1)
    full = (right_open < 0).expand_as(visible)
    low = high = torch.zeros_like(key)
    if width is not None:
        visible = visible | (left <= last + width) & (right >= first - width)
        full = full | (last - left_open <= width) & (right_open - first <= width)
        low, high = key - width, key + width + 1
    at = torch.where(striped, ALWAYS_VISIBLE, key)
    rule = TokenRule.box(*(table[None, None, None] for table in (low, high, at)))
    return BlockMask.from_bool(
        visible[None, None], (bq, bk), q_len=q_len, kv_len=q_len, partial=~full[None, None], rule=rule
    )


def power_of_two(
    *,
    q_len: int,
    window_blocks: int,
    sink_blocks: int = 1,
    block_size: int = 128,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Causal: a window of blocks, the first blocks, and the blocks at distances 1, 2, 4, 8, ... (PowerAttention).

    What a token knows reaches one at a distance of d blocks in as many layers as d has binary ones, or fewer. Published
    for models trained with it; without training it is a baseline.

    Args:
        q_len: tokens.
        window_blocks: blocks of the local window, the query's own included.
        sink_blocks: first blocks.
        block_size: tokens in a block.
        device: of the mask.

    Raises:
        ValueError: no token, no window block, a negative number, or two block sizes.

    Source: arXiv 2503.03588 (PowerAttention), with blocks of 256 and about 5 window blocks at 32768 tokens.
    """
    if not isinstance(block_size, int):
        raise ValueError(f"block_size={block_size}: distances are in blocks, so that it must be one number")
    at_least(1, q_len=q_len, window_blocks=window_blocks, block_size=block_size)
    at_least(0, sink_blocks=sink_blocks)
    block = torch.arange(-(-q_len // block_size), device=device, dtype=torch.int32)
    distance = block[:, None] - block
    near = (distance < window_blocks) | (block < sink_blocks) | (distance & (distance - 1) == 0)
    return BlockMask.from_bool(near[None, None], block_size, q_len=q_len, kv_len=q_len, causal=True)


def _per_head(
    sink: int | Sequence[int], window: int | Sequence[int], device: torch.device | str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both numbers as (1, H or 1, 1, 1) tensors."""
    numbers = {"sink": (sink, 0), "window": (window, 1)}
    found = {name: [given] if isinstance(given, int) else list(given) for name, (given, _) in numbers.items()}
    for name, (given, least) in numbers.items():
        if not found[name] or min(found[name]) < least:
            raise ValueError(f"{name}={given} must be at least {least}, one number or one per head")
    if len({len(values) for values in found.values()} - {1}) > 1:
        raise ValueError(f"sink={sink} and window={window} have different numbers of heads")
    sinks, windows = (
        torch.tensor(values).to(device, non_blocking=True)[None, :, None, None] for values in found.values()
    )
    return sinks, windows


def _rows(q_len: int, block: int, shift: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """(nQ, 1) places of the first and the last query of every block."""
    first = torch.arange(0, q_len, block, device=device)[:, None]
    return first + shift, (first + block).clamp(max=q_len) - 1 + shift


def _columns(kv_len: int, block: int, device: torch.device | str) -> tuple[torch.Tensor, torch.Tensor]:
    """(nK,) first and last key of every block."""
    first = torch.arange(0, kv_len, block, device=device)
    return first, (first + block).clamp(max=kv_len) - 1


def _in_blocks(per_key: torch.Tensor, block: int, value: float) -> torch.Tensor:
    """(nK, block): the keys of every block, with `value` in place of those that do not exist."""
    return pad(per_key, (0, -per_key.numel() % block), value=value).view(-1, block)
