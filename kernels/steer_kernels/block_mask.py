"""`BlockMask`: which (query block, key block) pairs are computed, and what is masked inside the partial ones."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch.nn.attention import flex_attention as flex

from steer_kernels.rule import EVERYTHING, ModRule, TokenRule
from steer_kernels.schedule import Schedule, schedule
from steer_kernels.shapes import pair_of_blocks

if TYPE_CHECKING:
    from PIL import Image


@dataclass(frozen=True, eq=False)
class BlockMask:
    """Block lists as FlexAttention and FlashAttention-4 use them: ascending key blocks of every query block, per head.

    In a full block every existing key is visible, in a partial one `rule` decides per token, and `causal` holds in
    both. Blocks in neither list are not computed. A query block with no key block gives output 0 and log-sum-exp -inf.

    Attributes:
        q_len, kv_len: tokens; the last block of either axis may be shorter.
        block_size: tokens in a (query, key) block.
        full_num, partial_num: (B or 1, H or 1, nQ) int32 counts. H may be the query heads or the key/value heads.
        full_idx, partial_idx: (B or 1, H or 1, nQ, nK) int32 key blocks, ascending; what lies past the count is 0.
        rule: token visibility inside partial blocks, or None.
        causal: key j is visible to query i only if j <= i + kv_len - q_len. No block above that diagonal is listed.
        order: name of the token order that the lists were built for.
    """

    q_len: int
    kv_len: int
    block_size: tuple[int, int]
    full_num: torch.Tensor
    full_idx: torch.Tensor
    partial_num: torch.Tensor
    partial_idx: torch.Tensor
    rule: TokenRule | ModRule | None = None
    causal: bool = False
    order: str = "raster"
    _made: dict[Any, Any] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    def from_bool(
        cls,
        keep: torch.Tensor,
        block_size: tuple[int, int] | int = 128,
        *,
        q_len: int | None = None,
        kv_len: int | None = None,
        partial: torch.Tensor | None = None,
        rule: TokenRule | ModRule | None = None,
        causal: bool = False,
        order: str = "raster",
    ) -> BlockMask:
        """Lists from a boolean grid, on its device and without a host synchronisation.

        Args:
            keep: (B or 1, H or 1, nQ, nK) bool, True = computed.
            block_size: tokens in a (query, key) block, or one number for both.
            q_len, kv_len: tokens; None = whole blocks.
            partial: bool, broadcastable to `keep`: the blocks in which `rule` is applied.
            rule, causal, order: see the class.

        Raises:
            ValueError: shapes or lengths that do not fit together.
        """
        bq, bk = pair_of_blocks(block_size)
        if keep.ndim != 4 or keep.dtype != torch.bool:
            raise ValueError(f"keep must be bool (B, H, nQ, nK); got {keep.dtype} {tuple(keep.shape)}")
        rows, columns = keep.shape[-2:]
        q_len, kv_len = q_len or rows * bq, kv_len or columns * bk
        if (-(-q_len // bq), -(-kv_len // bk)) != (rows, columns):
            raise ValueError(
                f"{q_len} x {kv_len} tokens in blocks of {bq} x {bk} make {-(-q_len // bq)} x {-(-kv_len // bk)} "
                f"blocks; keep has {rows} x {columns}"
            )
        if isinstance(rule, TokenRule) and (rule.q_len, rule.kv_len) != (q_len, kv_len):
            raise ValueError(f"the rule is for {rule.q_len} x {rule.kv_len} tokens, the mask for {q_len} x {kv_len}")
        if partial is None:
            partial = torch.zeros((), dtype=torch.bool, device=keep.device)
        if causal:
            keep = keep & _seen_below_diagonal(q_len, kv_len, (bq, bk), keep.device)[0]
        return cls(
            q_len,
            kv_len,
            (bq, bk),
            *_lists(keep & ~partial),
            *_lists(keep & partial),
            rule=rule,
            causal=causal,
            order=order,
        )

    @classmethod
    def dense(
        cls, q_len: int, kv_len: int, block_size: tuple[int, int] | int = 128, device: torch.device | str = "cpu"
    ) -> BlockMask:
        """Every block; `.with_causal()` makes it causal."""
        bq, bk = pair_of_blocks(block_size)
        keep = torch.ones(1, 1, -(-q_len // bq), -(-kv_len // bk), dtype=torch.bool, device=device)
        return cls.from_bool(keep, (bq, bk), q_len=q_len, kv_len=kv_len)

    @property
    def shape(self) -> tuple[int, int, int, int]:
        """(B or 1, H or 1, query blocks, key blocks)."""
        return (*self.full_idx.shape,)

    @property
    def device(self) -> torch.device:
        return self.full_num.device

    @property
    def density(self) -> float:
        """Computed blocks as a fraction of all blocks: what the kernel pays. Waits for the device."""
        return float((self.full_num + self.partial_num).sum(dtype=torch.float64)) / self.full_idx.numel()

    @property
    def row_order(self) -> torch.Tensor:
        """(B*H*nQ,) int64: the rows of the lists, heaviest first; equal ones stay neighbours (they share keys)."""
        return (self.full_num + self.partial_num).flatten().argsort(descending=True, stable=True)

    def to_bool(self) -> torch.Tensor:
        """(B or 1, H or 1, nQ, nK) bool: the computed blocks."""
        return _grid(self.full_num, self.full_idx) | self._ruled()

    def partial_bool(self) -> torch.Tensor:
        """(B or 1, H or 1, nQ, nK) bool: the computed blocks in which the rule or the causal diagonal hides tokens."""
        if not self.causal:
            return self._ruled()
        whole = _seen_below_diagonal(self.q_len, self.kv_len, self.block_size, self.device)[1]
        return self.to_bool() & (self._ruled() | ~whole)

    def _ruled(self) -> torch.Tensor:
        return _grid(self.partial_num, self.partial_idx)

    def to_tokens(self, queries: torch.Tensor | None = None) -> torch.Tensor:
        """(B or 1, H or 1, q_len, kv_len) bool: the token mask that this stands for. For tests and short sequences.

        `queries`: (n,) the numbers of the queries that are wanted; None = all.
        """
        q = torch.arange(self.q_len, device=self.device) if queries is None else queries
        k = torch.arange(self.kv_len, device=self.device)
        rows, columns = q // self.block_size[0], k // self.block_size[1]
        keep, ruled = (grid[:, :, rows][..., columns] for grid in (self.to_bool(), self._ruled()))
        if self.causal:
            keep = keep & (k <= q[:, None] + (self.kv_len - self.q_len))
        if self.rule is None:
            return keep
        batch, heads = (max(pair) for pair in zip(self.shape[:2], self.rule.batch_heads, strict=True))
        b, h = torch.arange(batch, device=self.device), torch.arange(heads, device=self.device)
        return keep & (~ruled | self.rule(b[:, None, None, None], h[:, None, None], q[:, None], k))

    def with_causal(self) -> BlockMask:
        """The same mask without the keys that come after their query; the last query sees the last key."""
        if self.causal:
            return self
        return self._once("causal", lambda: self._with_grid(self.to_bool(), self._ruled(), self.rule, True))

    def with_padding(self, valid: torch.Tensor) -> BlockMask:
        """The same mask without the keys that do not exist: blocks of padding alone are not computed.

        A full block that holds padding becomes a partial one, so the rule must hide nothing in full blocks: true of
        all masks in `patterns`, and of every mask without a rule.

        Args:
            valid: (B, kv_len) bool, False = padding of that batch row.

        Raises:
            ValueError: another shape, or a disc rule, whose tables have no place for hidden keys.
        """
        if valid.dtype != torch.bool or valid.ndim != 2 or valid.shape[1] != self.kv_len:
            raise ValueError(f"valid must be bool (B, {self.kv_len}); got {valid.dtype} {tuple(valid.shape)}")
        hidden = ~valid[:, None, None]
        if self.rule is None:
            key = torch.zeros_like(hidden, dtype=torch.int32)
            query = torch.tensor([0, EVERYTHING], dtype=torch.int32, device=valid.device).view(1, 1, 2, 1)
            query = query.expand(-1, -1, -1, self.q_len).contiguous()
        elif isinstance(self.rule, TokenRule) and self.rule.kind == "box":
            query, key = self.rule.query, self.rule.key
        else:
            kind = self.rule.kind if isinstance(self.rule, TokenRule) else "mask_mod"
            raise ValueError(f"a mask with a {kind} rule cannot hide padded keys: only a box rule, or none, can")
        # a coordinate that lies in no query's box, as the upper bounds are not in it
        rule = TokenRule("box", query, torch.where(hidden, EVERYTHING, key).contiguous())
        _, bk = self.block_size
        missing = self.shape[-1] * bk - self.kv_len
        blocks = torch.nn.functional.pad(valid, (0, missing)).unflatten(1, (-1, bk))
        padded = torch.nn.functional.pad(~valid, (0, missing)).unflatten(1, (-1, bk)).any(-1)[:, None, None]
        keep = self.to_bool() & blocks.any(-1)[:, None, None]
        return self._with_grid(keep, keep & (self._ruled() | padded), rule, self.causal)

    def in_heads(self, chosen: torch.Tensor) -> BlockMask:
        """The same mask in the `chosen` heads, (H,) bool; the other heads see everything."""
        keep, ruled, chosen = self.to_bool(), self._ruled(), chosen.to(self.device).view(1, -1, 1, 1)
        if self.shape[1] not in (1, chosen.shape[1]):
            raise ValueError(f"the mask has {self.shape[1]} heads, the choice {chosen.shape[1]}")
        return self._with_grid(keep | ~chosen, ruled & chosen, self.rule, self.causal)

    def of_heads(self, part: slice | torch.Tensor) -> BlockMask:
        """The lists of some heads, a slice or (n,) int64 numbers; a mask that all heads share is returned as it is."""
        rule = self.rule
        if isinstance(rule, TokenRule) and rule.batch_heads[1] > 1:
            query, key = (table if table.shape[1] == 1 else table[:, part] for table in (rule.query, rule.key))
            rule = TokenRule(rule.kind, query.contiguous(), key.contiguous(), rule.radius_squared)
        lists = self if self.shape[1] == 1 else self._with_lists(lambda table: table[:, part].contiguous())
        return lists if rule is self.rule else replace(lists, rule=rule)

    def __or__(self, other: BlockMask) -> BlockMask:
        """Union: what either mask lets a query see."""
        rule, causal = self._shared(other, "union")
        full = ~self._ruled() & self.to_bool() | ~other._ruled() & other.to_bool()
        return self._with_grid(self.to_bool() | other.to_bool(), ~full, rule, causal)

    def __and__(self, other: BlockMask) -> BlockMask:
        """Intersection: what both masks let a query see."""
        if self.causal != other.causal:
            return self.with_causal() & other.with_causal()
        rule, causal = self._shared(other, "intersection")
        return self._with_grid(self.to_bool() & other.to_bool(), self._ruled() | other._ruled(), rule, causal)

    def _shared(self, other: BlockMask, what: str) -> tuple[TokenRule | ModRule | None, bool]:
        """The one rule that both masks' partial blocks obey."""
        mine, theirs = ((mask.q_len, mask.kv_len, *mask.block_size, mask.order) for mask in (self, other))
        if mine != theirs:
            raise ValueError(
                f"{what} of masks that differ in (q_len, kv_len, block sizes, token order): {mine} and {theirs}"
            )
        rules = [m.rule for m in (self, other) if m.rule is not None]
        if len(rules) == 2 and rules[0] is not rules[1]:
            raise ValueError(f"{what} of masks with two different token rules: only one of them may have a rule")
        if self.causal != other.causal:
            raise ValueError(f"{what} of a causal and a non-causal mask: call with_causal() on both")
        return (rules[0] if rules else None), self.causal

    def _with_grid(
        self, keep: torch.Tensor, partial: torch.Tensor, rule: TokenRule | ModRule | None, causal: bool
    ) -> BlockMask:
        return self.from_bool(
            keep,
            self.block_size,
            q_len=self.q_len,
            kv_len=self.kv_len,
            partial=partial,
            rule=rule,
            causal=causal,
            order=self.order,
        )

    def to(self, device: torch.device | str) -> BlockMask:
        if torch.device(device) == self.device:
            return self
        return replace(self._with_lists(lambda lists: lists.to(device)), rule=self.rule and self.rule.to(device))

    @classmethod
    def from_flex(cls, mask: flex.BlockMask) -> BlockMask:
        """From a FlexAttention BlockMask; its `mask_mod` becomes the rule (not for the triton backend)."""
        q_len, kv_len = mask.seq_lengths
        full_num, full_idx = mask.full_kv_num_blocks, mask.full_kv_indices
        if full_num is None or full_idx is None:
            full_num, full_idx = torch.zeros_like(mask.kv_num_blocks), torch.zeros_like(mask.kv_indices)
        rule = None if mask.mask_mod is flex.noop_mask else ModRule(mask.mask_mod)
        bq, bk = mask.BLOCK_SIZE
        return cls(q_len, kv_len, (bq, bk), full_num, full_idx, mask.kv_num_blocks, mask.kv_indices, rule=rule)

    def _flex(self) -> flex.BlockMask:
        lists = (self.partial_num, self.partial_idx, self.full_num, self.full_idx)
        mask_mod: Any = flex.noop_mask if self.rule is None else self.rule
        if self.causal:  # FlexAttention asks in partial blocks only, so the diagonal has to be among them
            partial, ruled, shift = self.partial_bool(), self._ruled(), self.kv_len - self.q_len
            lists = (*_lists(partial), *_lists(self.to_bool() & ~partial))
            rule, (bq, bk) = self.rule, self.block_size
            one_batch, one_head = (n == 1 for n in ruled.shape[:2])

            def mask_mod(b: torch.Tensor, h: torch.Tensor, q: torch.Tensor, k: torch.Tensor) -> torch.Tensor:
                below = k <= q + shift
                if rule is None:
                    return below
                applies = ruled[b * 0 if one_batch else b, h * 0 if one_head else h, q // bq, k // bk]
                return below & (~applies | rule(b, h, q, k))

        return flex.BlockMask.from_kv_blocks(
            *lists, BLOCK_SIZE=self.block_size, mask_mod=mask_mod, seq_lengths=(self.q_len, self.kv_len)
        )

    def to_flex(self, heads: int | None = None) -> flex.BlockMask:
        """The same mask for `torch.nn.attention.flex_attention.flex_attention`; made once.

        `heads`: query heads, needed where the lists are per key/value head.
        """
        if heads in (None, self.shape[1]) or self.shape[1] == 1:
            return self._once("flex", self._flex)
        return self._with_lists(lambda lists: broadcast_heads(lists, heads or 1))._flex()

    def _with_lists(self, change: Callable[[torch.Tensor], torch.Tensor]) -> BlockMask:
        return replace(
            self,
            full_num=change(self.full_num),
            full_idx=change(self.full_idx),
            partial_num=change(self.partial_num),
            partial_idx=change(self.partial_idx),
        )

    def schedule(self, batch: int, heads: int, tiles_per_block: int, processors: int) -> Schedule:
        """The order of work of a persistent kernel, made on the device once for each such call."""

        def make() -> Schedule:
            count = broadcast_heads(self.full_num + self.partial_num, heads).expand(batch, -1, -1)
            return schedule(count, tiles_per_block, processors)

        return self._once((batch, heads, tiles_per_block, processors), make)

    def _once(self, what: Any, make: Callable[[], Any]) -> Any:
        """Made at the first call and kept; not while tracing, where it is part of the graph."""
        if what in self._made:
            return self._made[what]
        made = make()
        if not torch.compiler.is_compiling():
            self._made[what] = made
        return made

    @classmethod
    def from_bsr(
        cls,
        indptr: torch.Tensor,
        indices: torch.Tensor,
        block_size: tuple[int, int] | int,
        *,
        q_len: int,
        kv_len: int,
    ) -> BlockMask:
        """From FlashInfer's block-sparse rows: `indptr` (nQ + 1,), `indices` (blocks,), the same for every head."""
        bq, bk = pair_of_blocks(block_size)
        rows, columns = -(-q_len // bq), -(-kv_len // bk)
        if indptr.numel() != rows + 1:
            raise ValueError(f"{q_len} queries in blocks of {bq} need {rows + 1} entries of indptr, got {len(indptr)}")
        keep = torch.zeros(rows, columns, dtype=torch.bool, device=indices.device)
        row = torch.repeat_interleave(torch.arange(rows, device=indices.device), indptr.long().diff())
        keep[row, indices.long()] = True
        return cls.from_bool(keep[None, None], (bq, bk), q_len=q_len, kv_len=kv_len)

    def to_bsr(self, batch: int = 0, head: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor | None]:
        """FlashInfer's (indptr (nQ + 1,) int32, indices (blocks,) int32, mask) of one batch row and head.

        mask is (blocks, bq, bk) bool, or None where no block is partial. Synchronises with the host.
        """
        b, h = min(batch, self.shape[0] - 1), min(head, self.shape[1] - 1)
        keep = self.to_bool()[b, h]
        indptr = torch.nn.functional.pad(keep.sum(-1).cumsum(0), (1, 0)).int()
        rows, columns = keep.nonzero(as_tuple=True)
        if self.rule is None and not self.causal:
            return indptr, columns.int(), None
        bq, bk = self.block_size
        q = (rows[:, None] * bq + torch.arange(bq, device=self.device))[:, :, None]
        k = (columns[:, None] * bk + torch.arange(bk, device=self.device))[:, None, :]
        inside = (q < self.q_len) & (k < self.kv_len)
        visible = (k <= q + (self.kv_len - self.q_len)) if self.causal else torch.ones_like(q * k, dtype=torch.bool)
        if self.rule is not None:
            at = (torch.full_like(q, batch), torch.full_like(q, head))
            seen = self.rule(*at, q.clamp(max=self.q_len - 1), k.clamp(max=self.kv_len - 1))
            visible = visible & (seen | ~self._ruled()[b, h, rows, columns][:, None, None])
        return indptr, columns.int(), inside & visible

    def show(self, batch: int = 0, head: int = 0, *, text: bool = False) -> Image.Image | str:
        """A picture of one head: queries down, keys across; full blocks dark, partial ones lighter, the rest white.

        Returns a PIL image (at least 256 pixels wide; `.save("mask.png")` keeps it), or with `text=True` lines of
        characters, at most 64 wide: a full block is "#", a partial one "+", a cell with several blocks of both ":".
        """
        b, h = min(batch, self.shape[0] - 1), min(head, self.shape[1] - 1)
        level = (self.to_bool()[b, h].float() - 0.5 * self.partial_bool()[b, h].float()).cpu()
        if text:
            return _as_text(level)
        from PIL import Image

        pixels = (255 - level * 215).to(torch.uint8)
        zoom = max(1, 256 // max(level.shape))
        return Image.fromarray(pixels.repeat_interleave(zoom, 0).repeat_interleave(zoom, 1).numpy())

    def __repr__(self) -> str:
        b, h, rows, columns = self.shape
        return (
            f"BlockMask({self.q_len} x {self.kv_len} tokens, {rows} x {columns} blocks of "
            f"{self.block_size[0]} x {self.block_size[1]}, B {b}, H {h}, density {self.density:.3f}"
            + (", causal" if self.causal else "")
            + (f", {getattr(self.rule, 'kind', 'mask_mod')} rule" if self.rule else "")
            + ")"
        )


def _lists(keep: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Counts and ascending indices of the True entries of each row; the grid sizes depend on shapes alone."""
    columns = keep.shape[-1]
    number = torch.arange(columns, dtype=torch.int32, device=keep.device)
    place = keep.cumsum(-1, dtype=torch.int32) - 1
    # what is not kept goes to one column too many, which is cut off
    place = torch.where(keep, place, columns).long()
    index = torch.zeros(*keep.shape[:-1], columns + 1, dtype=torch.int32, device=keep.device)
    index.scatter_(-1, place, number.expand(keep.shape))
    return keep.sum(-1, dtype=torch.int32), index[..., :columns].contiguous()


def _grid(count: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """The boolean grid of such lists."""
    columns = index.shape[-1]
    listed = torch.arange(columns, device=index.device) < count[..., None]
    grid = torch.zeros(*index.shape[:-1], columns + 1, dtype=torch.bool, device=index.device)
    return grid.scatter_(-1, torch.where(listed, index, columns).long(), True)[..., :columns]


def _seen_below_diagonal(
    q_len: int, kv_len: int, block_size: tuple[int, int], device: torch.device
) -> tuple[torch.Tensor, torch.Tensor]:
    """(nQ, nK) bool: blocks of which the causal diagonal leaves any token pair, and those of which it leaves all."""
    bq, bk = block_size
    first_q = torch.arange(-(-q_len // bq), device=device)[:, None] * bq
    last_q = (first_q + bq).clamp(max=q_len) - 1
    first_k = torch.arange(-(-kv_len // bk), device=device) * bk
    last_k = (first_k + bk).clamp(max=kv_len) - 1
    shift = kv_len - q_len
    return first_k <= last_q + shift, last_k <= first_q + shift


def _as_text(level: torch.Tensor, width: int = 64) -> str:
    cell = -(-max(level.shape) // width)
    rows, columns = (-(-n // cell) * cell for n in level.shape)
    padded = torch.nn.functional.pad(level, (0, columns - level.shape[1], 0, rows - level.shape[0]))
    mean = torch.nn.functional.avg_pool2d(padded[None, None], cell)[0, 0]
    peak = torch.nn.functional.max_pool2d(padded[None, None], cell)[0, 0]

    def mark(average: float, most: float) -> str:
        if most == 0:
            return "."
        if average == most:
            return "#" if most == 1 else "+"
        return ":"

    return "\n".join(
        "".join(mark(a, m) for a, m in zip(means, peaks, strict=True))
        for means, peaks in zip(mean.tolist(), peak.tolist(), strict=True)
    )


def broadcast_heads(lists: torch.Tensor, heads: int) -> torch.Tensor:
    """Mask tensors (B, 1 | H_kv | H, ...) seen per query head: (B, H, ...)."""
    have = lists.shape[1]
    if have == 1:
        return lists.expand(-1, heads, *[-1] * (lists.ndim - 2))
    return lists if have == heads else lists.repeat_interleave(heads // have, 1)
