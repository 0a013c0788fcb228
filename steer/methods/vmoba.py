"""VMoBA: every query picks chunks of the video by their mean key; chunks of frames, windows and boxes take turns."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch
import torch.nn.functional as F

from steer.method import Span
from steer.sparse import Prepared, Sparse, Tokens, valid_keys
from steer_kernels import BlockMask, block_sparse_attention
from steer_kernels.order import tiles
from steer_kernels.rule import EVERYTHING, TokenRule
from steer_patches.family import Family
from steer_patches.site import Call, Next, Site

Tile = tuple[int, int, int]

# chunk sizes by token grid
PUBLISHED: dict[Tile, dict[str, Any]] = {
    (21, 30, 52): {"frames": 3, "window": (5, 13), "box": (7, 5, 13)},
    (21, 45, 80): {"frames": 3, "window": (9, 10), "box": (7, 15, 20)},
    (24, 36, 64): {"frames": 3, "window": (6, 8), "box": (8, 12, 8)},
    (36, 30, 52): {"frames": 3, "window": (5, 13), "box": (12, 10, 13)},
}
# chunks on each axis (T, H, W) that the default sizes aim at, for frames, windows and boxes: 7, 36 and 48 in all
CHUNKS = {"frames": (7, 1, 1), "window": (1, 6, 6), "box": (3, 4, 4)}
KINDS = tuple(CHUNKS)  # of layer l, the one at l mod 3
PickScope = Literal["query", "head", "overall", "block"]
SCOPES: tuple[PickScope, ...] = get_args(PickScope)
Router = Literal["pooled", "union"]
ROUTERS: tuple[Router, ...] = get_args(Router)


@dataclass(kw_only=True)
class VMoBA(Sparse):
    """Attention to whole chunks of the video that each query picks in the call itself.

    Layer l, counted over the model's layers of self-attention, cuts the T x H x W grid into chunks of whole frames
    (l mod 3 = 0), of windows through all frames (1) or of boxes (2). With the gate

        g[c, h, s] = q[s, h] . mean of k[., h] over chunk c        in fp32, unscaled

    a query attends to its own chunk and to the best others: softmax over the union of their tokens. Text, where it is
    in the sequence, sees everything and is seen by everything, and has no part in the gate.

    The kernel skips whole blocks, so tokens are put chunk after chunk, each chunk filled up to whole blocks with keys
    that nobody sees (at most 7 % more tokens at the published sizes, 12.5 % in 480p's boxes), and the queries of a
    block go the same way. `router` says which: "pooled" picks for the mean query of a block, so that the density is
    that of the choice. "union" picks for each query, as published, and computes what any query of the block picked: a
    superset of the published choice, whose density grows with the block and is close to 1 unless neighbours agree.

    Args:
        k: chunks of a query, its own among them; one number, or one for each of frames, windows and boxes. None = a
            quarter of the chunks, at least 2, which is 2, 6, 18 at 480p and 2, 10, 9 at 720p, as published.
        threshold: pick by shares in place of `k`: gates are mapped to [0, 1] over the scope and divided by their sum,
            and the best other chunks are taken until they and the own ones hold this share. At least one other is; 1
            takes all.
        scope: what is picked from. "query": for each head and query; "head": for each head the best k * S of all its
            (chunk, query) pairs, or their share; "overall": of the pairs of all heads; "block" (with `threshold`): of
            each chunk the (head, query) pairs. Heads that another device computes are not in a scope.
        router: "pooled" or "union".
        frames: frames of a chunk. None, here and below = the published size for this grid, otherwise the size that
            divides the grid into about 7 chunks, or with none near, that leaves a smaller last chunk.
        window: (height, width) of a chunk through all frames, in tokens; about 6 x 6 chunks.
        box: (frames, height, width) of a chunk, in tokens; about 3 x 4 x 4 chunks. Sizes above the grid's are cut.

    Source: Wu et al., "VMoBA: Mixture-of-Block Attention for Video Diffusion Models", arXiv 2506.23858; the
    training-free setting of its appendix. The selections are reconstructed from a description of the published code
    and agree with its densities, except at a threshold of 1: there it takes two other chunks ("query", "block") or
    all that have a share, and this takes all. Grids that the chunks do not divide are refused there and work here.
    """

    k: int | Sequence[int] | None = None
    threshold: Annotated[float, Span(0, 1)] | None = None
    scope: PickScope = "query"
    router: Router = "pooled"
    frames: Annotated[int, Span(1, 16)] | None = None
    window: Sequence[int] | None = None
    box: Sequence[int] | None = None

    needs_video: ClassVar[bool] = True
    defaults: ClassVar[Mapping[str, Any]] = {"steps": "0.25:"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name, length in (("window", 2), ("box", 3), ("k", 3)):
            sizes = getattr(self, name)
            if isinstance(sizes, Sequence):
                if len(sizes) != length or min(sizes) < 1:
                    raise ValueError(f"{name}={tuple(sizes)} must be {length} numbers, each at least 1")
                setattr(self, name, tuple(sizes))  # a list when read from a file
        for name in ("k", "frames"):
            number = getattr(self, name)
            if isinstance(number, int) and number < 1:
                raise ValueError(f"{name}={number} must be at least 1")
        if self.threshold is not None and self.threshold < 0:
            raise ValueError(f"threshold={self.threshold} must be 0 or more: a share of the gates, 1 = all chunks")
        if self.k is not None and self.threshold is not None:
            raise ValueError(f"give either k or threshold; got k={self.k} and threshold={self.threshold}")
        if self.scope not in SCOPES:
            raise ValueError(f"scope={self.scope!r} does not exist; choose from {', '.join(SCOPES)}")
        if self.router not in ROUTERS:
            raise ValueError(f"router={self.router!r} does not exist; choose from {', '.join(ROUTERS)}")

    def resolved(self, family: Family | None, has_clock: bool) -> VMoBA:
        method = super().resolved(family, has_clock)
        assert isinstance(method, VMoBA)
        if method.scope == "block" and method.threshold is None:
            raise ValueError('scope="block" needs a threshold; the best k chunks have query, head or overall')
        return method

    def tile(self, grid: Tile, kind: str) -> Tile:
        """(frames, height, width) of the chunks of a layer of one of the KINDS."""
        given = getattr(self, kind) or PUBLISHED.get(grid, {}).get(kind)
        if given is None:
            sizes = [even(size, chunks) for size, chunks in zip(grid, CHUNKS[kind], strict=True)]
        elif kind == "frames":
            sizes = [given, *grid[1:]]
        else:
            sizes = [*grid[: 3 - len(given)], *given]  # a window goes through all frames
        t, h, w = map(min, grid, sizes)
        return t, h, w

    def chosen(self, gate: torch.Tensor, own: torch.Tensor, kind: str) -> torch.Tensor:
        """Which chunks are attended to, bool (..., C, H, S) like the gate; `own` as well."""
        if self.threshold is not None:
            return select_threshold(gate, own, self.threshold, self.scope)
        return select_top_k(gate, own, self._number(gate.shape[-3], kind), self.scope)

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        assert self.block_size is not None
        kind, block = KINDS[site.layer % 3], self.block_size
        tile = self.tile(tokens.grid, kind)
        shared = self.once(kind, tokens, lambda: Prepared(tokens, extra=chunked(tokens, tile, kind, block)))

        def of_site() -> Prepared:
            chunks = replace(shared.extra, kept=torch.zeros((), device=tokens.device))
            for table in (*vars(chunks).values(), chunks.rule.query, chunks.rule.key):
                if isinstance(table, torch.Tensor):
                    torch._dynamo.mark_static(table)  # a graph for each kind, in place of one with unknown shapes
            return replace(shared, extra=chunks)

        return self.once((kind, site.name), tokens, of_site)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready = self.ready(call)
        if ready is None:
            return next(call)
        chunks: Chunks = ready.extra.to(call.query.device)
        query, key, value = (chunks.pad(x) for x in (call.query, call.key, call.value))
        keep = self._keep(call, query, key, ready.tokens, chunks)
        ready.extra.kept.copy_(keep.sum() / keep.numel())
        mask = chunks.mask(keep)
        valid = valid_keys(call, ready.tokens)
        if valid is not None:
            mask = mask.with_padding(valid.index_select(1, chunks.at))
        out = block_sparse_attention(query, key, value, mask, scale=call.scale, backend=self.backend)
        return out.index_select(2, chunks.back)

    def block_mask(self, call: Call) -> BlockMask | None:
        """The blocks that a call computes, its tokens chunk after chunk and then the text; None where it is dense."""
        ready = self.ready(call)
        if ready is None:
            return None
        chunks: Chunks = ready.extra.to(call.query.device)
        return chunks.mask(self._keep(call, chunks.pad(call.query), chunks.pad(call.key), ready.tokens, chunks))

    def _keep(self, call: Call, query: torch.Tensor, key: torch.Tensor, tokens: Tokens, chunks: Chunks) -> torch.Tensor:
        """(B, H, n, n) bool: the key blocks of every query block; all of them in heads that are left out."""
        keep = chunks.of_blocks(self._picked(call, query, key, tokens, chunks))
        return keep if call.heads is None else keep | ~call.heads

    def _picked(
        self, call: Call, query: torch.Tensor, key: torch.Tensor, tokens: Tokens, chunks: Chunks
    ) -> torch.Tensor:
        """(B, C, H, nQ) bool: the chunks of every block of visual queries."""
        means = chunks.mean_keys(key).repeat_interleave(query.shape[1] // key.shape[1], 1)
        if self.router == "pooled":
            gate = torch.einsum("bhcd,bhsd->bchs", means, chunks.mean_queries(query))
            return self.chosen(gate, chunks.own(chunks.chunk_of_block), chunks.kind)
        each = call.query[:, :, tokens.first : tokens.first + tokens.visual].to(means.dtype)
        gate = torch.einsum("bhcd,bhsd->bchs", means, each)
        picked = self.chosen(gate, chunks.own(chunks.chunk_of_token), chunks.kind)
        # what fills up a block is its last token once more, and adds nothing to the union
        slots = chunks.at[: len(chunks.chunk_of_block) * chunks.block] - tokens.first
        return picked.index_select(-1, slots).unflatten(-1, (-1, chunks.block)).any(-1)

    def expected_density(self, tokens: Tokens, site: Site) -> float | None:
        """k of C chunks, with what fills up the blocks; None with a threshold or the union, where the data decide."""
        if self.threshold is not None or self.router == "union":
            return None
        chunks: Chunks = self.make(tokens, site).extra
        number, kind = len(chunks.blocks_of_chunk), KINDS[site.layer % 3]
        return min(1.0, self._number(number, kind) / number) * (len(chunks.at) / tokens.length) ** 2

    def _number(self, chunks: int, kind: str) -> int:
        """k of a kind of layer, of `chunks` chunks."""
        k = self.k[KINDS.index(kind)] if isinstance(self.k, Sequence) else self.k
        return k or max(2, chunks // 4)

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        ready = [site.kernel for site, _ in sites.values() if isinstance(site.kernel, Prepared)]
        kept = [float(made.extra.kept) for made in ready if isinstance(made.extra, Chunks)]
        return sum(kept) / len(kept) if kept else None


@dataclass(frozen=True, eq=False)
class Chunks:
    """Tokens chunk after chunk, each chunk and the text behind them filled up to whole blocks: P slots for S tokens.

    Attributes:
        kind: one of KINDS.
        block: tokens in a block.
        at: (P,) int64, the token in each slot; in those that fill up, the last token of the chunk once more.
        back: (S,) int64, the slot of each token.
        fills: (P, 1) bool, the slots that fill up.
        chunk_of_block: (nV,) int64, of the blocks of visual tokens; the text's come after them.
        chunk_of_token: (visual tokens,) int64, in raster order.
        tokens_in_block: (nV,) int64, without what fills up.
        blocks_of_chunk: (C, nV) bool.
        partial: (n,) bool, the blocks that are filled up.
        rule: hides what fills up.
        kept: () float32, the share of the blocks that the last call of a site computed.
    """

    kind: str
    block: int
    at: torch.Tensor
    back: torch.Tensor
    fills: torch.Tensor
    chunk_of_block: torch.Tensor
    chunk_of_token: torch.Tensor
    tokens_in_block: torch.Tensor
    blocks_of_chunk: torch.Tensor
    partial: torch.Tensor
    rule: TokenRule
    kept: torch.Tensor

    def to(self, device: torch.device) -> Chunks:
        if self.at.device == device:
            return self
        moved: dict[str, Any] = {
            name: table.to(device) for name, table in vars(self).items() if isinstance(table, torch.Tensor)
        }
        return replace(self, **moved, rule=self.rule.to(device))

    def pad(self, x: torch.Tensor) -> torch.Tensor:
        """(B, H, S, D) -> (B, H, P, D), zero where no token is."""
        return x.index_select(2, self.at).masked_fill(self.fills, 0)

    def mean_keys(self, key: torch.Tensor) -> torch.Tensor:
        """(B, H, P, D) -> (B, H, C, D), in fp32 or better: the mean over the tokens of each chunk."""
        sums = self._block_sums(key)
        member = self.blocks_of_chunk.to(sums.dtype)
        return member @ sums / (member @ self.tokens_in_block.to(sums.dtype))[:, None]

    def mean_queries(self, query: torch.Tensor) -> torch.Tensor:
        """(B, H, P, D) -> (B, H, nV, D), in fp32 or better: the mean over the tokens of each visual block."""
        return self._block_sums(query) / self.tokens_in_block[:, None]

    def _block_sums(self, x: torch.Tensor) -> torch.Tensor:
        visual = x[:, :, : len(self.chunk_of_block) * self.block]
        return visual.unflatten(2, (-1, self.block)).sum(3, dtype=torch.promote_types(x.dtype, torch.float32))

    def own(self, chunk: torch.Tensor) -> torch.Tensor:
        """(C, 1, S) bool: whether a query in `chunk` (S,) is in chunk c itself."""
        return torch.arange(len(self.blocks_of_chunk), device=chunk.device)[:, None, None] == chunk

    def of_blocks(self, picked: torch.Tensor) -> torch.Tensor:
        """From chunks (B, C, H, nV) to key blocks (B, H, n, n); text is computed in either direction."""
        keep = picked.permute(0, 2, 3, 1).index_select(-1, self.chunk_of_block)
        text = len(self.partial) - len(self.chunk_of_block)
        return F.pad(keep, (0, text, 0, text), value=True) if text else keep

    def mask(self, keep: torch.Tensor) -> BlockMask:
        return BlockMask.from_bool(keep, self.block, partial=self.partial, rule=self.rule)


def chunked(tokens: Tokens, tile: Tile, kind: str, block: int) -> Chunks:
    """The chunks of a grid, tile after tile, and behind them the text."""
    device = tokens.device
    sides = zip(tokens.grid, tile, strict=True)
    edges = [[min(step, size - start) for start in range(0, size, step)] for size, step in sides]
    lengths = [math.prod(edge) for edge in itertools.product(*edges)]
    number = len(lengths)
    visual = tiles(tokens.grid, tile, device=device).to_ordered
    span = tokens.text_span
    if span is not None:
        lengths.append(tokens.text)
        ordered = torch.cat([visual + tokens.first, torch.arange(*span, device=device)])
    else:
        ordered = visual

    length = torch.tensor(lengths, device=device)
    blocks = -(-length // block)
    chunk = torch.arange(len(lengths), device=device).repeat_interleave(blocks * block)
    place = torch.arange(len(chunk), device=device) - ((blocks.cumsum(0) - blocks) * block)[chunk]
    exists = place < length[chunk]
    at = ordered[(length.cumsum(0) - length)[chunk] + torch.minimum(place, length[chunk] - 1)]
    back = torch.empty_like(ordered).scatter_(0, at[exists], exists.nonzero().flatten())

    chunk_of_block = chunk[::block][: int(blocks[:number].sum())]
    tokens_in_block = exists.unflatten(0, (-1, block)).sum(-1)
    query = torch.tensor([0, EVERYTHING], dtype=torch.int32, device=device).view(1, 1, 2, 1).expand(-1, -1, -1, len(at))
    key = torch.where(exists, 0, EVERYTHING).int().view(1, 1, 1, -1)  # the upper bounds of the boxes are not in them
    return Chunks(
        kind=kind,
        block=block,
        at=at,
        back=back,
        fills=~exists[:, None],
        chunk_of_block=chunk_of_block,
        chunk_of_token=chunk[back[tokens.first : tokens.first + tokens.visual]],
        tokens_in_block=tokens_in_block[: len(chunk_of_block)],
        blocks_of_chunk=chunk_of_block == torch.arange(number, device=device)[:, None],
        partial=tokens_in_block < block,
        rule=TokenRule("box", query.contiguous(), key),
        kept=torch.zeros((), device=device),
    )


def even(size: int, chunks: int) -> int:
    """Length of a chunk of about `chunks` of them: a divisor if their number is at most 1.5 times off, else a share."""
    divisors = [length for length in range(1, size + 1) if size % length == 0]
    best = min(divisors, key=lambda length: abs(math.log(size / length / chunks)))
    fewer, more = sorted((size // best, chunks))
    return best if 2 * more <= 3 * fewer else -(-size // chunks)


def select_top_k(gate: torch.Tensor, own: torch.Tensor, k: int, scope: str) -> torch.Tensor:
    """The k chunks of each query with the highest gate, or as many as that in each scope; the own ones come first.

    Args:
        gate: (..., C, H, S) of chunks, heads and queries.
        own: bool, broadcastable to `gate`: the chunk that a query is in.
        k: chunks of a query, with its own.
        scope: "query", "head" or "overall".

    Returns:
        bool (..., C, H, S), True in `own` as well.
    """
    ranked = _competing(gate.masked_fill(own, torch.inf), scope)
    queries = {"query": 1, "head": gate.shape[-1], "overall": gate.shape[-1] * gate.shape[-2]}[scope]
    best = ranked.topk(min(k * queries, ranked.shape[-1]), -1).indices
    chosen = torch.zeros_like(ranked, dtype=torch.bool).scatter(-1, best, True)
    return _as_gate(chosen, scope, gate) | own


def select_threshold(gate: torch.Tensor, own: torch.Tensor, threshold: float, scope: str) -> torch.Tensor:
    """The best other chunks until they and the own ones hold a share of the gates; the one that crosses it is taken.

    Args:
        gate: (..., C, H, S) of chunks, heads and queries.
        own: bool, broadcastable to `gate`: the chunk that a query is in; always taken, and one other in each scope.
        threshold: share of the gates of the scope, after they are mapped to [0, 1]; from 1 on everything is taken.
        scope: "query", "head", "overall" or "block": over what gates are mapped and sorted.

    Returns:
        bool (..., C, H, S), True in `own` as well.
    """
    if threshold >= 1:  # not by summing: rounding decides whether the sum of all shares is 1
        return torch.ones_like(gate, dtype=torch.bool)
    plane, mine = _competing(gate, scope), _competing(own.expand(gate.shape), scope)
    low, high = plane.aminmax(dim=-1, keepdim=True)
    tiny = torch.finfo(gate.dtype).tiny
    level = (plane - low) / (high - low).clamp(min=tiny)
    share = level / level.sum(-1, keepdim=True).clamp(min=tiny)
    missing = threshold - torch.where(mine, share, 0).sum(-1, keepdim=True)
    others, order = share.masked_fill(mine, -1).sort(dim=-1, descending=True, stable=True)
    before = F.pad(others.clamp(min=0).cumsum(-1)[..., :-1], (1, 0))
    first = torch.arange(plane.shape[-1], device=gate.device) == 0
    chosen = torch.zeros_like(mine).scatter(-1, order, (before < missing) | first)
    return _as_gate(chosen, scope, gate) | own


def _competing(x: torch.Tensor, scope: str) -> torch.Tensor:
    """(..., C, H, S) with the entries of a scope side by side in the last dimension."""
    if scope == "query":
        return x.movedim(-3, -1)
    if scope == "head":
        return x.transpose(-3, -2).flatten(-2)
    return x.flatten(-3) if scope == "overall" else x.flatten(-2)


def _as_gate(x: torch.Tensor, scope: str, gate: torch.Tensor) -> torch.Tensor:
    """The way back of `_competing`, to the shape of `gate`."""
    if scope == "query":
        return x.movedim(-1, -3)
    if scope == "head":
        return x.unflatten(-1, (gate.shape[-3], gate.shape[-1])).transpose(-3, -2)
    return x.reshape(gate.shape)
