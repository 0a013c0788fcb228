"""Radial attention: bands inside frame pairs that narrow as the frames get further apart."""

from __future__ import annotations

import torch

from steer_kernels.block_mask import BlockMask
from steer_kernels.patterns.layout import Layout, at_least

SPLIT = 128  # the published rule thins out the frame pairs with bands narrower than this, whatever the block


def radial(
    *,
    tokens_per_frame: int,
    frames: int,
    decay: float,
    key_frame_sink: bool,
    block_size: int | tuple[int, int] = 128,
    text_tokens: int = 0,
    text_first: bool = False,
    device: torch.device | str = "cpu",
) -> BlockMask:
    """Whole frame pairs up to distance 1; beyond, bands that halve at every doubling of the distance, in whole blocks.

    With n tokens per frame, P = 2^bitlen(n) and g = bitlen(d), a pair of frames at distance d >= 2 keeps the tokens
    |column - row| <= max(P / 2^g * decay, block); where P / 2^g < 128 only every (128 * 2^g / P)-th distance is kept.
    Of such a frame pair a block is kept if more than 0.6 of its key columns with any visible row have more than a
    third of the block's rows. All blocks with text are kept, and all of a last block that is not whole. There is no
    token rule: a kept block is computed whole.

    Where n is not a multiple of the block, the published code cuts off the end of frames that start inside a block.
    Here they are kept, and so are all blocks on the diagonal, of which the rule drops some where a frame is smaller
    than a block: every query sees its own block.

    Args:
        tokens_per_frame, frames: of the video, in raster order.
        decay: factor on the width of the bands.
        key_frame_sink: every query sees all of the first frame.
        block_size: tokens in a (query, key) block; with two numbers the larger is the narrowest band.
        text_tokens, text_first: tokens that are not video, and whether they come first.
        device: of the mask.

    Raises:
        ValueError: no frame, no token, or a negative number.

    Source: arXiv 2506.19852. The published settings are decay 0.2 with the sink for Wan2.1-14B, 0.8 with it for
    Wan2.2-A14B, and 0.95 without it for HunyuanVideo.
    """
    at_least(1, tokens_per_frame=tokens_per_frame, frames=frames)
    at_least(0, decay=decay)
    layout = Layout.of(tokens_per_frame * frames, block_size, device, text_tokens, text_first)
    widths = [_width(distance, tokens_per_frame, decay, max(layout.block_size)) for distance in range(frames)]
    pieces = [_pieces(layout, side, tokens_per_frame) for side in (0, 1)]
    (frame, first, stop, _), (key_frame, left, right, _) = pieces
    number = torch.arange(frames)
    of_pairs = torch.tensor(widths, dtype=torch.int32)[(number[:, None] - number).abs()]
    if key_frame_sink:
        of_pairs[:, 0] = tokens_per_frame
    width = layout.on_device(of_pairs).index_select(0, frame).index_select(1, key_frame)
    third = layout.block_size[0] // 3  # more than a third of the rows are more than this many
    some = _columns(width, first[:, None], stop[:, None], left, right, 0)
    many = _columns(width, first[:, None], stop[:, None], left, right, third)
    keep = 5 * many > 3 * some
    for side in (0, 1):
        keep = _join(keep, pieces[side][3], side)
    (q_start, q_stop), (k_start, k_stop) = (
        (start, start + size)
        for start, size in ((layout.on_device(layout.blocks(side)), layout.block_size[side]) for side in (0, 1))
    )
    keep |= (q_stop > layout.length)[:, None] | (k_stop > layout.length)
    keep |= (q_start[:, None] < k_stop) & (k_start < q_stop[:, None])
    return layout.mask(keep, torch.zeros_like(keep), None)


def _width(distance: int, tokens: int, decay: float, block: int) -> int:
    """Half-width of the band of frames at this distance, in tokens; -1 = the pair is left out."""
    if distance <= 1:
        return tokens
    width = 2.0 ** (tokens.bit_length() - distance.bit_length())
    if width < SPLIT and distance % int(SPLIT / width):
        return -1
    return int(max(width * decay, block))


def _pieces(layout: Layout, side: int, tokens: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """The blocks cut at the frames.

    Returns:
        frame, first and stop position in the frame (N,) int32 of every piece; and the pieces (n, P) int64 of every
        block, N where it has fewer. The cuts depend on shapes alone and are made on the CPU.
    """
    start, stop = layout.spans(side)
    edges = torch.arange(0, layout.visual + 1, tokens)
    edges = torch.unique(torch.cat([edges, start, stop]))
    cuts, ends = edges[:-1], edges[1:]
    frame = cuts // tokens
    first = torch.searchsorted(cuts, start)
    count = torch.searchsorted(cuts, stop) - first
    which = torch.arange(max(1, int(count.max())))
    pieces = torch.where(which < count[:, None], first[:, None] + which, len(cuts))
    numbers = (frame, cuts - frame * tokens, ends - frame * tokens)
    frame_of, first_in, stop_in = (layout.on_device(number.int()) for number in numbers)
    return frame_of, first_in, stop_in, layout.on_device(pieces)


def _columns(
    width: torch.Tensor, first: torch.Tensor, stop: torch.Tensor, left: torch.Tensor, right: torch.Tensor, rows: int
) -> torch.Tensor:
    """(N, M) number of key columns in [left, right) that more than `rows` of the rows [first, stop) see.

    Column c is seen by the rows from max(first, c - width) to min(stop - 1, c + width): their number exceeds `rows`
    for one interval of columns, if the rows and the band are high enough at all.
    """
    low = torch.maximum(first + (rows - width), left)
    high = torch.minimum(stop + (width - rows), right)
    enough = (stop - first > rows) & (2 * width + 1 > rows)
    return (high - low).clamp_(min=0) * enough


def _join(keep: torch.Tensor, pieces: torch.Tensor, side: int) -> torch.Tensor:
    """The pieces of each block, on one side, put together."""
    keep = torch.cat([keep, torch.zeros_like(keep.narrow(side, 0, 1))], side)
    joined = keep.index_select(side, pieces[:, 0])
    for further in range(1, pieces.shape[1]):
        joined |= keep.index_select(side, pieces[:, further])
    return joined
