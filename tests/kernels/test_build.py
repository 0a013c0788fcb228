"""Mask builders against Python sorting, one row at a time, and that they never ask the device for a value."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode

from steer_kernels import BlockMask
from steer_kernels.build import forced, share, top_k, top_mass

grids = st.fixed_dictionaries(
    {
        "seed": st.integers(0, 99),
        "heads": st.sampled_from([(1, 1), (2, 3)]),
        "q_len": st.integers(1, 60),
        "kv_len": st.integers(1, 60),
        "block_size": st.tuples(st.integers(1, 12), st.integers(1, 12)),
        "causal": st.booleans(),
        "forcing": st.booleans(),
    }
)


def drawn(grid: dict, levels: int) -> tuple[torch.Tensor, torch.Tensor | None, dict]:
    """Scores of few different values (many ties), blocks to force, and the other arguments of a builder."""
    g = torch.Generator().manual_seed(grid["seed"])
    (bq, bk), q_len, kv_len = grid["block_size"], grid["q_len"], grid["kv_len"]
    shape = *grid["heads"], -(-q_len // bq), -(-kv_len // bk)
    scores = torch.randint(levels, shape, generator=g).double()
    force = torch.rand(1, shape[1], *shape[2:], generator=g) < 0.2 if grid["forcing"] else None
    options = {"block_size": (bq, bk), "q_len": q_len, "kv_len": kv_len, "causal": grid["causal"], "force": force}
    return scores, force, options


def reachable(grid: dict, row: int) -> int:
    """Key blocks of the row that are not all in the future of its last query."""
    (bq, bk), q_len, kv_len = grid["block_size"], grid["q_len"], grid["kv_len"]
    if not grid["causal"]:
        return -(-kv_len // bk)
    last = min((row + 1) * bq, q_len) - 1 + kv_len - q_len
    return sum(j * bk <= last for j in range(-(-kv_len // bk)))


def equals(mask: BlockMask, keep: torch.Tensor, options: dict) -> bool:
    """The same tokens as a mask of these blocks."""
    lengths = {"q_len": options["q_len"], "kv_len": options["kv_len"]}
    expected = BlockMask.from_bool(keep, options["block_size"], **lengths)
    expected = expected.with_causal() if options["causal"] else expected
    return torch.equal(mask.to_tokens(), expected.to_tokens()) and mask.causal == options["causal"]


def rows_of(scores: torch.Tensor, force: torch.Tensor | None) -> list[tuple[tuple[int, int, int], list, list]]:
    """(batch row, head, query block), its scores, and which of its blocks are forced."""
    force = torch.zeros_like(scores, dtype=torch.bool) if force is None else force.expand(scores.shape)
    batch, heads, rows, _ = scores.shape
    return [
        ((b, h, i), scores[b, h, i].tolist(), force[b, h, i].tolist())
        for b in range(batch) for h in range(heads) for i in range(rows)
    ]  # fmt: skip


@settings(max_examples=80)
@given(grid=grids, k=st.integers(1, 12), density=st.none() | st.floats(0.01, 1))
def test_top_k_is_a_sort(grid: dict, k: int, density: float | None) -> None:
    scores, force, options = drawn(grid, 4)
    scores = scores.masked_fill(scores == 0, -torch.inf)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for place, row, forced_row in rows_of(scores, force):
        columns = range(reachable(grid, place[2]))
        wanted = k if density is None else max(1, round(len(columns) * density))
        best = sorted(columns, key=lambda j: (not forced_row[j], -row[j], j))[:wanted]
        for j in [*(j for j in best if row[j] > -math.inf), *(j for j in columns if forced_row[j])]:
            keep[place][j] = True
    mask = top_k(scores, None if density else k, density=density, **options)
    assert equals(mask, keep, options)


@settings(max_examples=80)
@given(grid=grids, eighths=st.integers(1, 8), min_blocks=st.integers(0, 3))
def test_top_mass_is_the_fewest_blocks(grid: dict, eighths: int, min_blocks: int) -> None:
    """Whole numbers as scores and eighths as parts: every sum is exact."""
    scores, force, options = drawn(grid, 5)
    mask = top_mass(scores, eighths / 8, min_blocks=min_blocks, **options)
    keep = torch.zeros(scores.shape, dtype=torch.bool)
    for place, row, forced_row in rows_of(scores, force):
        columns = range(reachable(grid, place[2]))
        needed, found = eighths / 8 * sum(row[j] for j in columns), 0.0
        for count, j in enumerate(sorted(columns, key=lambda j: (not forced_row[j], -row[j], j))):
            if forced_row[j] or (row[j] > 0 and (found < needed or count < min_blocks)):
                keep[place][j] = True
            found += row[j]
    assert equals(mask, keep, options)


@settings(max_examples=30)
@given(seed=st.integers(0, 99), mass=st.floats(0.01, 1))
def test_top_mass_is_minimal_in_float32(seed: int, mass: float) -> None:
    """What is kept reaches the mass; without its smallest block it does not."""
    scores = torch.softmax(3 * torch.randn(2, 2, 5, 40, generator=torch.Generator().manual_seed(seed)), -1)
    keep = top_mass(scores, mass).to_bool()
    kept = torch.where(keep, scores, 0.0).double().sum(-1)
    least = torch.where(keep, scores, torch.inf).amin(-1).double()
    total = scores.double().sum(-1)
    assert (kept >= mass * total - 1e-5).all()
    assert (kept - least < mass * total + 1e-5).all()


def test_rows_without_a_score_stay_empty() -> None:
    scores = torch.rand(1, 2, 3, 4)
    scores[:, :, 1] = -torch.inf
    force = forced(3, 4, diagonal=None, sink_blocks=1)
    for mask in (top_k(scores, 2), top_mass(scores, 0.9), top_mass(scores.clamp(min=0.0), 0.9)):
        assert mask.to_bool()[:, :, 1].sum() == 0 and mask.to_bool()[:, :, 0].any(-1).all()
    for mask in (top_k(scores, 2, force=force), top_mass(scores, 0.9, force=force)):
        assert mask.to_bool()[0, 0, 1].tolist() == [True, False, False, False]


def test_nan_is_never_kept() -> None:
    scores = torch.tensor([[[[0.1, torch.nan, 0.3, torch.nan, 0.2]]]])
    assert top_k(scores, 2).to_bool().flatten().tolist() == [False, False, True, False, True]
    assert top_k(scores, 9).to_bool().flatten().tolist() == [True, False, True, False, True]
    assert top_mass(scores, 1.0).to_bool().flatten().tolist() == [True, False, True, False, True]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
def test_equal_scores_keep_the_first_blocks(dtype: torch.dtype) -> None:
    scores = torch.ones(1, 1, 2, 300, dtype=dtype)
    for mask in (top_k(scores, 7), top_mass(scores.float(), 7 / 300 - 1e-4)):
        assert mask.full_num.flatten().tolist() == [7, 7]
        assert mask.full_idx[0, 0, 0, :7].tolist() == list(range(7))


@pytest.mark.parametrize("build", [lambda s: top_k(s, 3), lambda s: top_mass(s, 0.5), lambda s: top_k(s, density=0.4)])
def test_permuted_heads(build: Callable[[torch.Tensor], BlockMask]) -> None:
    scores = torch.rand(2, 4, 6, 9, generator=torch.Generator().manual_seed(0))
    heads = torch.tensor([2, 0, 3, 1])
    assert torch.equal(build(scores[:, heads]).to_bool(), build(scores).to_bool()[:, heads])


@settings(max_examples=60)
@given(
    lengths=st.tuples(st.integers(1, 60), st.integers(1, 60)),
    block_size=st.tuples(st.integers(1, 12), st.integers(1, 12)),
    diagonal=st.none() | st.integers(0, 2),
    ends=st.tuples(st.integers(0, 2), st.integers(0, 2)),
    text=st.none() | st.tuples(st.integers(0, 59), st.integers(1, 20)),
)
def test_forced_blocks(
    lengths: tuple[int, int],
    block_size: tuple[int, int],
    diagonal: int | None,
    ends: tuple[int, int],
    text: tuple[int, int] | None,
) -> None:
    """Block by block, from the tokens that are in it."""
    (q_len, kv_len), (bq, bk), (sinks, lasts) = lengths, block_size, ends
    if text is not None:
        start = min(text[0], kv_len - 1)
        text = start, min(start + text[1], kv_len)
    nq, nk = -(-q_len // bq), -(-kv_len // bk)
    words = set(range(*text)) if text else set()
    expected = torch.zeros(1, 1, nq, nk, dtype=torch.bool)
    for i in range(nq):
        queries = set(range(i * bq, min(i * bq + bq, q_len)))
        own = {(q + kv_len - q_len) // bk for q in queries}
        for j in range(nk):
            keys = set(range(j * bk, min(j * bk + bk, kv_len)))
            near = diagonal is not None and any(abs(j - block) <= diagonal for block in own)
            read = bool(keys & words) or (q_len == kv_len and bool(queries & words))
            expected[0, 0, i, j] = near or read or j < sinks or j >= nk - lasts
    found = forced(
        nq, nk, diagonal=diagonal, sink_blocks=sinks, last_blocks=lasts, text=text, block_size=block_size,
        q_len=q_len, kv_len=kv_len,
    )  # fmt: skip
    assert torch.equal(found, expected)


def test_share_of_grouped_heads() -> None:
    scores = torch.rand(2, 6, 3, 4)
    keep = scores > 0.6
    assert torch.equal(share(keep, 2), torch.stack([keep[:, :3].any(1), keep[:, 3:].any(1)], 1))
    assert torch.allclose(share(scores, 3), torch.stack([scores[:, i : i + 2].mean(1) for i in (0, 2, 4)], 1))
    with pytest.raises(ValueError, match="H a multiple of 4"):
        share(scores, 4)


BUILDS: dict[str, Callable[[torch.Tensor, torch.Tensor], BlockMask]] = {
    "top_k": lambda scores, force: top_k(scores, 3, force=force),
    "density": lambda scores, force: top_k(scores, density=0.3, q_len=770, kv_len=1000, causal=True),
    "top_mass": lambda scores, force: top_mass(scores, 0.8, force=force, causal=True),
    "forced": lambda scores, force: top_k(scores, 2, force=forced(7, 8, sink_blocks=1, text=(0, 100))),
    "shared": lambda scores, force: top_k(share(scores, 2), 2, force=force),
}


def lists(mask: BlockMask) -> tuple[torch.Tensor, ...]:
    return mask.full_num, mask.full_idx, mask.partial_num, mask.partial_idx


@pytest.mark.parametrize("name", BUILDS)
def test_traces(name: str) -> None:
    scores = torch.rand(1, 4, 7, 8, generator=torch.Generator().manual_seed(0))
    force = forced(7, 8, sink_blocks=1)
    torch._dynamo.reset()
    compiled = torch.compile(BUILDS[name], fullgraph=True, backend="aot_eager")
    for a, b in zip(lists(compiled(scores, force)), lists(BUILDS[name](scores, force)), strict=True):
        assert torch.equal(a, b)


@pytest.mark.parametrize("name", BUILDS)
def test_no_value_is_asked_for(name: str) -> None:
    """Tensors without values: reading one, or a shape that depends on one, raises."""
    with FakeTensorMode():
        scores, force = torch.empty(1, 4, 7, 8), forced(7, 8, sink_blocks=1)
        mask = BUILDS[name](scores, force)
        assert mask.shape[-2:] == (7, 8)
        with pytest.raises(DataDependentOutputException):
            float(mask.full_num.sum())


def test_errors_say_what_does_not_fit() -> None:
    scores = torch.rand(1, 2, 3, 4)
    with pytest.raises(ValueError, match="either k or density; got k=None"):
        top_k(scores)
    with pytest.raises(ValueError, match="either k or density; got k=2"):
        top_k(scores, 2, density=0.5)
    with pytest.raises(ValueError, match="at least 1 key block; got 0"):
        top_k(scores, 0)
    for density in (0.0, 1.5, -0.1):
        with pytest.raises(ValueError, match=r"in \(0, 1\]; got"):
            top_k(scores, density=density)
        with pytest.raises(ValueError, match=r"in \(0, 1\]; got"):
            top_mass(scores, density)
    with pytest.raises(ValueError, match="min_blocks"):
        top_mass(scores, 0.5, min_blocks=-1)
    for build in (lambda s, **kw: top_k(s, 2, **kw), lambda s, **kw: top_mass(s, 0.5, **kw)):
        with pytest.raises(ValueError, match=r"floating point \(B, H, nQ, nK\); got torch.float32 \(2, 3, 4\)"):
            build(scores[0])
        with pytest.raises(ValueError, match=r"got torch\.int64"):
            build(scores.long())
        with pytest.raises(ValueError, match="make 3 x 5 blocks; there are 3 x 4"):
            build(scores, q_len=300, kv_len=513)
        with pytest.raises(ValueError, match=r"broadcastable to \(1, 2, 3, 4\); got torch.bool \(3, 3\)"):
            build(scores, force=torch.ones(3, 3, dtype=torch.bool))
        with pytest.raises(ValueError, match="force must be bool"):
            build(scores, force=torch.ones(3, 4))
    with pytest.raises(ValueError, match=r"text \[100, 600\) does not lie in the 512 keys"):
        forced(3, 4, text=(100, 600))
    with pytest.raises(ValueError, match="make 4 x 4 blocks; there are 3 x 4"):
        forced(3, 4, q_len=400)
