"""`BlockMask`: lists, converters, algebra, pictures and the schedule, against boolean grids and token masks."""

from __future__ import annotations

from itertools import pairwise

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image
from torch.nn.attention import flex_attention as flex

from steer_kernels import BlockMask, TokenRule, patterns

grids = st.tuples(
    st.integers(1, 2), st.integers(1, 3), st.integers(1, 70), st.integers(1, 70), st.sampled_from([4, 8, 16]),
    st.sampled_from([4, 8, 16]), st.floats(0, 1), st.integers(0, 99),
)  # fmt: skip


def grid_of(shape: tuple) -> tuple[torch.Tensor, dict]:
    b, h, q_len, kv_len, bq, bk, density, seed = shape
    g = torch.Generator().manual_seed(seed)
    keep = torch.rand(b, h, -(-q_len // bq), -(-kv_len // bk), generator=g) < density
    return keep, dict(block_size=(bq, bk), q_len=q_len, kv_len=kv_len)


def expand(keep: torch.Tensor, mask: BlockMask) -> torch.Tensor:
    """Token mask of a block grid."""
    (bq, bk) = mask.block_size
    return keep.repeat_interleave(bq, -2).repeat_interleave(bk, -1)[..., : mask.q_len, : mask.kv_len]


def random_rule(q_len: int, kv_len: int, heads: int = 1, kind: str = "box", seed: int = 0) -> TokenRule:
    g = torch.Generator().manual_seed(seed)
    if kind == "disc":
        points = (torch.randint(-1, 8, (1, 1, 2, n), generator=g) for n in (q_len, kv_len))
        return TokenRule.disc(*points, radius_squared=9)
    low = torch.randint(-3, 5, (1, heads, 2, q_len), generator=g)
    high = low + torch.randint(0, 7, (1, heads, 2, q_len), generator=g)
    return TokenRule.box(low, high, torch.randint(-1, 9, (1, heads, 2, kv_len), generator=g))


def rule_by_hand(rule: TokenRule, h: int, i: int, j: int) -> bool:
    """The sentence in `TokenRule`'s docstring, for one pair."""
    query = rule.query[0, min(h, rule.query.shape[1] - 1), :, i].tolist()
    key = rule.key[0, min(h, rule.key.shape[1] - 1), :, j].tolist()
    if key[0] < 0 or (rule.kind == "disc" and query[0] < 0):
        return True
    if rule.kind == "disc":
        return sum((a - b) ** 2 for a, b in zip(query, key, strict=True)) < rule.radius_squared
    axes = len(key)
    return all(query[a] <= key[a] < query[axes + a] for a in range(axes))


@given(shape=grids)
def test_lists_hold_the_grid(shape: tuple) -> None:
    keep, sizes = grid_of(shape)
    mask = BlockMask.from_bool(keep, **sizes)
    assert torch.equal(mask.to_bool(), keep)
    assert mask.density == pytest.approx(keep.double().mean().item())
    for b, h, row in torch.cartesian_prod(*(torch.arange(n) for n in keep.shape[:3])).reshape(-1, 3).tolist():
        count = int(mask.full_num[b, h, row])
        assert mask.full_idx[b, h, row, :count].tolist() == keep[b, h, row].nonzero().flatten().tolist()
    counts = keep.sum(-1).flatten()
    assert counts[mask.row_order].tolist() == sorted(counts.tolist(), reverse=True)
    assert torch.equal(mask.to_tokens(), expand(keep, mask))


@given(shape=grids, kind=st.sampled_from(["box", "disc"]), causal=st.booleans())
def test_tokens_of_partial_blocks(shape: tuple, kind: str, causal: bool) -> None:
    keep, sizes = grid_of(shape)
    partial = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    rule = random_rule(sizes["q_len"], sizes["kv_len"], keep.shape[1], kind)
    mask = BlockMask.from_bool(keep, **sizes, partial=partial, rule=rule)
    mask = mask.with_causal() if causal else mask
    tokens = mask.to_tokens()
    shift = mask.kv_len - mask.q_len
    bq, bk = mask.block_size
    g = torch.Generator().manual_seed(2)
    for _ in range(40):
        b, h, i, j = (int(torch.randint(n, (), generator=g)) for n in (*keep.shape[:2], mask.q_len, mask.kv_len))
        expected = bool(keep[b, h, i // bq, j // bk])
        if partial[b, h, i // bq, j // bk]:
            expected = expected and rule_by_hand(rule, h, i, j)
        if causal:
            expected = expected and j <= i + shift
        assert bool(tokens[min(b, len(tokens) - 1), h, i, j]) == expected


@given(q_len=st.integers(1, 60), kv_len=st.integers(1, 60), block=st.sampled_from([(4, 4), (8, 16), (16, 8)]))
def test_causal_is_exact_and_not_inflated(q_len: int, kv_len: int, block: tuple[int, int]) -> None:
    mask = BlockMask.dense(q_len, kv_len, block).with_causal()
    tokens = torch.ones(q_len, kv_len).tril(kv_len - q_len).bool()
    assert torch.equal(mask.to_tokens()[0, 0], tokens)
    rows, columns = mask.shape[-2:]
    for r in range(rows):
        for c in range(columns):
            part = tokens[r * block[0] : (r + 1) * block[0], c * block[1] : (c + 1) * block[1]]
            assert bool(mask.to_bool()[0, 0, r, c]) == bool(part.any())
            assert bool(mask.partial_bool()[0, 0, r, c]) == bool(part.any() and not part.all())
    assert mask.with_causal() is mask


@given(shape=grids, other=st.integers(100, 199), rule=st.booleans(), causal=st.booleans())
def test_union_and_intersection(shape: tuple, other: int, rule: bool, causal: bool) -> None:
    keep, sizes = grid_of(shape)
    second, _ = grid_of((*shape[:-1], other))
    partial = torch.rand(keep.shape, generator=torch.Generator().manual_seed(1)) < 0.5
    a = BlockMask.from_bool(
        keep,
        **sizes,
        partial=partial if rule else None,
        rule=random_rule(sizes["q_len"], sizes["kv_len"]) if rule else None,
    )
    b = BlockMask.from_bool(second, **sizes)
    if causal:
        a, b = a.with_causal(), b.with_causal()
    assert torch.equal((a | b).to_tokens(), a.to_tokens() | b.to_tokens())
    assert torch.equal((b | a).to_tokens(), a.to_tokens() | b.to_tokens())
    assert torch.equal((a & b).to_tokens(), a.to_tokens() & b.to_tokens())
    assert torch.equal((a & b.with_causal()).to_tokens(), a.to_tokens() & b.with_causal().to_tokens())


@given(shape=grids, causal=st.booleans(), rule=st.booleans())
def test_flex_and_back(shape: tuple, causal: bool, rule: bool) -> None:
    keep, sizes = grid_of(shape)
    table = random_rule(sizes["q_len"], sizes["kv_len"], keep.shape[1]) if rule else None
    mask = BlockMask.from_bool(keep, **sizes, rule=table, partial=torch.tensor(rule))
    mask = mask.with_causal() if causal else mask
    back = BlockMask.from_flex(mask.to_flex())
    assert torch.equal(back.to_tokens(), mask.to_tokens())
    assert mask.to_flex() is mask.to_flex()


def test_from_a_mask_mod() -> None:
    theirs = flex.create_block_mask(lambda b, h, q, k: (q >= k) & (q - k < 50), None, None, 300, 300, "cpu", 64)
    ours = BlockMask.from_flex(theirs)
    i, j = torch.arange(300)[:, None], torch.arange(300)
    assert torch.equal(ours.to_tokens()[0, 0], (i >= j) & (i - j < 50))
    assert ours.density < 0.4


def test_flex_lists_per_key_value_head() -> None:
    keep = torch.rand(1, 2, 3, 3, generator=torch.Generator().manual_seed(0)) < 0.5
    mask = BlockMask.from_bool(keep, 16).to_flex(4)
    assert mask.shape[1] == 4
    assert torch.equal(mask.to_dense().bool()[0, :, :3, :3], keep[0].repeat_interleave(2, 0))


@given(shape=grids, rule=st.booleans())
def test_bsr_and_back(shape: tuple, rule: bool) -> None:
    keep, sizes = grid_of(shape)
    table = random_rule(sizes["q_len"], sizes["kv_len"], keep.shape[1]) if rule else None
    mask = BlockMask.from_bool(keep, **sizes, rule=table, partial=torch.tensor(rule))
    b, h = keep.shape[0] - 1, keep.shape[1] - 1
    indptr, indices, inside = mask.to_bsr(b, h)
    back = BlockMask.from_bsr(indptr, indices, **sizes)
    assert torch.equal(back.to_bool()[0, 0], keep[b, h])
    if inside is not None:
        tokens = torch.zeros(keep.shape[2] * mask.block_size[0], keep.shape[3] * mask.block_size[1], dtype=torch.bool)
        for r in range(keep.shape[2]):
            for n in range(int(indptr[r]), int(indptr[r + 1])):
                (bq, bk), c = mask.block_size, int(indices[n])
                tokens[r * bq : (r + 1) * bq, c * bk : (c + 1) * bk] = inside[n]
        expected = mask.to_tokens()
        assert torch.equal(tokens[: mask.q_len, : mask.kv_len], expected[min(b, len(expected) - 1), h])


@given(shape=grids, tiles=st.sampled_from([1, 2]), processors=st.integers(1, 6))
def test_schedule_covers_every_entry_once(shape: tuple, tiles: int, processors: int) -> None:
    keep, sizes = grid_of(shape)
    mask = BlockMask.from_bool(keep.repeat(1, 1, 1, 40), sizes["block_size"])  # long rows, so that some are cut
    work = mask.schedule(*keep.shape[:2], tiles, processors)
    counts = mask.full_num.repeat_interleave(tiles, -1).flatten().tolist()
    items = work.items[: int(work.counts[0])].tolist()
    seen: dict[int, list[int]] = {row: [] for row in range(len(counts))}
    slots: dict[int, list[int]] = {}
    for row, first, last, slot in items:
        seen[row] += range(first, last)
        if slot >= 0:
            slots.setdefault(row, []).append(slot)
    assert all(sorted(entries) == list(range(counts[row])) for row, entries in seen.items())
    splits = {row: list(range(first, first + n)) for row, first, n in work.splits[: int(work.counts[1])].tolist()}
    assert {row: sorted(places) for row, places in slots.items()} == splits
    assert max((slot for places in splits.values() for slot in places), default=0) < 4 * processors
    weights = [last - first for _, first, last, _ in items]
    heaviest = max(weights, default=0)
    assert all(a >= b - heaviest / 32 - 1 for a, b in pairwise(weights))


def test_pictures() -> None:
    mask = BlockMask.dense(64, 64, 16).with_causal()
    assert mask.show(text=True) == "+...\n#+..\n##+.\n###+"
    picture = mask.show()
    assert isinstance(picture, Image.Image) and picture.size == (256, 256)
    assert picture.getpixel((255, 0)) == 255 and picture.getpixel((0, 255)) < picture.getpixel((0, 0)) < 255
    big = BlockMask.dense(128 * 200, 128 * 200).with_causal().show(text=True)
    assert isinstance(big, str) and max(map(len, big.splitlines())) <= 64
    assert "density 0.625" in repr(mask) and "causal" in repr(mask)


def test_building_needs_no_host_synchronisation() -> None:
    """On fake tensors any look at a value fails."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        keep = torch.empty(2, 3, 20, 30, dtype=torch.bool)
        mask = BlockMask.from_bool(keep, 16, partial=keep, q_len=315, kv_len=470).with_causal()
        mask = mask & mask
        work = mask.schedule(2, 6, 2, 132)
        assert work.items.shape == (2 * 6 * 20 * 2 + 4 * 132, 4)


def test_errors() -> None:
    keep = torch.ones(1, 1, 2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"keep must be bool \(B, H, nQ, nK\); got torch.float32 \(2, 3\)"):
        BlockMask.from_bool(torch.ones(2, 3))
    with pytest.raises(ValueError, match="100 x 48 tokens in blocks of 16 x 16 make 7 x 3 blocks; keep has 2 x 3"):
        BlockMask.from_bool(keep, 16, q_len=100)
    with pytest.raises(ValueError, match="the rule is for 5 x 48 tokens, the mask for 32 x 48"):
        BlockMask.from_bool(keep, 16, rule=random_rule(5, 48))
    mask = BlockMask.from_bool(keep, 16)
    with pytest.raises(ValueError, match="union of masks that differ"):
        mask | BlockMask.from_bool(keep, 8)
    ruled = [BlockMask.from_bool(keep, 16, rule=random_rule(32, 48), partial=keep) for _ in range(2)]
    with pytest.raises(ValueError, match="two different token rules"):
        ruled[0] & ruled[1]
    with pytest.raises(ValueError, match=r"call with_causal\(\) on both"):
        mask | mask.with_causal()
    with pytest.raises(ValueError, match="33 queries in blocks of 16 need 4 entries of indptr, got 3"):
        BlockMask.from_bsr(torch.tensor([0, 1, 2]), torch.tensor([0, 1]), 16, q_len=33, kv_len=32)


@given(shape=grids, causal=st.booleans())
def test_padding_hides_keys_of_its_row(shape: tuple, causal: bool) -> None:
    keep, sizes = grid_of(shape)
    mask = BlockMask.from_bool(keep, **sizes, causal=causal)
    valid = torch.rand(2, mask.kv_len, generator=torch.Generator().manual_seed(shape[-1])) < 0.5
    valid[1, mask.kv_len // 2 :] = False
    rows = valid if keep.shape[0] == 2 else valid[:1]
    padded = mask.with_padding(rows)
    assert torch.equal(padded.to_tokens(), mask.to_tokens() & rows[:, None, None])
    # a block of padding alone is in no list
    blocks = torch.nn.functional.pad(rows, (0, -mask.kv_len % mask.block_size[1])).unflatten(
        1, (-1, mask.block_size[1])
    )
    assert not (padded.to_bool() & ~blocks.any(-1)[:, None, None]).any()


def test_padding_under_a_rule_and_for_several_rows() -> None:
    mask = patterns.neighborhood(grid=(2, 5, 7), window=(1, 3, 3), block_size=16, text_tokens=9)
    valid = torch.ones(3, 79, dtype=torch.bool)
    valid[0, 75:], valid[1, 71:] = False, False
    padded = mask.with_padding(valid)
    assert padded.shape[0] == 3
    assert torch.equal(padded.to_tokens(), mask.to_tokens() & valid[:, None, None])
    with pytest.raises(ValueError, match="disc rule cannot hide padded keys"):
        patterns.circular(grid=(5, 7), radius=2, block_size=16).with_padding(valid[:, :35])
    with pytest.raises(ValueError, match=r"valid must be bool \(B, 79\)"):
        mask.with_padding(valid[:, :3])


def test_other_heads_see_everything() -> None:
    mask = patterns.neighborhood(grid=(2, 5, 7), window=(1, 3, 3), block_size=16)
    chosen = torch.tensor([True, False, True])
    some = mask.in_heads(chosen).to_tokens()
    assert torch.equal(some[:, ~chosen], torch.ones_like(some[:, ~chosen]))
    assert torch.equal(some[:, chosen], mask.to_tokens().expand_as(some[:, chosen]))
    with pytest.raises(ValueError, match="the mask has 3 heads, the choice 2"):
        mask.in_heads(chosen).in_heads(chosen[:2])


def test_the_lists_of_some_heads() -> None:
    keep, sizes = grid_of((1, 4, 40, 40, 8, 8, 0.4, 0))
    rule = random_rule(40, 40, heads=4)
    mask = BlockMask.from_bool(keep, **sizes, partial=keep, rule=rule)
    assert torch.equal(mask.of_heads(slice(1, 3)).to_tokens(), mask.to_tokens()[:, 1:3])
    shared = BlockMask.from_bool(keep[:, :1], **sizes)
    assert shared.of_heads(slice(1, 3)) is shared
