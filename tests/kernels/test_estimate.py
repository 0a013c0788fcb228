"""Block scores against the explicit softmax map in fp64, over odd shapes, grouped heads, causal masks and backends."""

from __future__ import annotations

import os
import subprocess
import sys
import textwrap
from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils._python_dispatch import TorchDispatchMode

from steer_kernels import partial
from steer_kernels.estimate import block_mass, chunked, column_mass, pooled_scores, qk_estimate, reference
from steer_kernels.estimate.api import _draw

pytestmark = pytest.mark.interpreted


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """torch fills uninitialised memory with NaN in this mode."""
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


@pytest.fixture
def small_tiles(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(chunked.TILE, "cpu", 512)


def draw(
    seed: int, b: int, h: int, kv: int, s: int, n: int, d: int, dtype: torch.dtype = torch.float64
) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, s, d, generator=g, dtype=torch.float64)
    k = torch.randn(b, kv, n, d, generator=g, dtype=torch.float64)
    return q.to(dtype), k.to(dtype)


def softmax_map(q: torch.Tensor, k: torch.Tensor, scale: float, causal: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """An independent formulation in fp64, one head at a time: the map (B, H, S_q, S_k), 0 where nothing is seen."""
    q, k = q.double(), k.double()
    (batch, heads, q_len, _), kv_len, group = q.shape, k.shape[2], q.shape[1] // k.shape[1]
    weights = torch.stack(
        [torch.stack([torch.exp(scale * q[b, h] @ k[b, h // group].T) for h in range(heads)]) for b in range(batch)]
    )
    if causal:
        weights = weights * torch.ones(q_len, kv_len, dtype=torch.float64).tril(kv_len - q_len)
    total = weights.sum(-1)
    return weights / total.clamp(min=1e-300)[..., None], total.log()


def by_blocks(weights: torch.Tensor, block_size: tuple[int, int]) -> torch.Tensor:
    """Mean over the queries of the sum over the keys of every block pair, one pair at a time."""
    bq, bk = block_size
    rows = [
        [weights[:, :, i : i + bq, j : j + bk].sum(-1).mean(-1) for j in range(0, weights.shape[3], bk)]
        for i in range(0, weights.shape[2], bq)
    ]
    return torch.stack([torch.stack(row, -1) for row in rows], -2)


calls = st.fixed_dictionaries(
    {
        "shape": st.tuples(
            st.integers(0, 99), st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
            st.integers(1, 45), st.integers(1, 45), st.sampled_from([1, 8, 24]),
        ),
        "block_size": st.tuples(st.integers(1, 20), st.integers(1, 20)),
        "causal": st.booleans(),
    }
)  # fmt: skip


def drawn(call: dict) -> tuple[torch.Tensor, torch.Tensor]:
    seed, b, (h, kv), s, n, d = call["shape"]
    return draw(seed, b, h, kv, s, n, d)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=40)
@given(call=calls)
def test_mass_equals_the_map(backend: str, call: dict) -> None:
    q, k = drawn(call)
    sizes, causal = call["block_size"], call["causal"]
    weights, lse = softmax_map(q, k, 0.3, causal)
    mass = block_mass(q, k, lse, block_size=sizes, scale=0.3, is_causal=causal, backend=backend)
    assert torch.allclose(mass, by_blocks(weights, sizes), atol=1e-12)
    if not causal or q.shape[2] <= k.shape[2]:
        assert torch.allclose(mass.sum(-1), torch.ones(()).double(), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads, q_len, kv_len, width, block_size",
    [
        ((2, 2), 64, 64, 32, (32, 16)),
        ((4, 2), 33, 50, 24, (16, 32)),  # short last blocks, a padded width, grouped heads
        ((2, 1), 40, 27, 16, (20, 24)),  # blocks that are no power of two, fewer keys than queries
        ((1, 1), 5, 300, 16, (4, 256)),  # a key block of two tiles
    ],
)
@pytest.mark.parametrize("causal", [False, True])
def test_triton_equals_the_map(
    causal: bool,
    heads: tuple[int, int],
    q_len: int,
    kv_len: int,
    width: int,
    block_size: tuple[int, int],
    dtype: torch.dtype,
) -> None:
    """Products of fp16 numbers are exact in fp32, so one tolerance serves both."""
    q, k = draw(1, 1, *heads, q_len, kv_len, width, dtype)
    weights, lse = softmax_map(q, k, width**-0.5, causal)
    mass = block_mass(q, k, lse.float(), block_size=block_size, is_causal=causal, backend="triton")
    assert mass.dtype == torch.float32
    assert torch.allclose(mass.double(), by_blocks(weights, block_size), atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_torch_in_low_precision(dtype: torch.dtype) -> None:
    q, k = draw(2, 2, 4, 2, 70, 90, 32, dtype)
    weights, lse = softmax_map(q, k, 0.2, True)
    mass = block_mass(q, k, lse.float(), block_size=(32, 16), scale=0.2, is_causal=True, backend="torch")
    assert mass.dtype == torch.float32
    assert torch.allclose(mass.double(), by_blocks(weights, (32, 16)), atol=2e-6)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_strided_heads(backend: str) -> None:
    """(B, S, H, D) seen as (B, H, S, D)."""
    q, k = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(3, 2, 2, 2, 20, 20, 16, torch.float32))
    lse = softmax_map(q, k, 0.25, False)[1].float()
    mass = block_mass(q, k, lse, block_size=16, backend=backend)
    assert torch.allclose(mass, block_mass(q.contiguous(), k.contiguous(), lse, block_size=16), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_queries_that_saw_nothing(backend: str) -> None:
    q, k = draw(4, 1, 2, 2, 32, 20, 16, torch.float32)
    lse = softmax_map(q, k, 0.25, False)[1].float()
    whole = block_mass(q, k, lse, block_size=16, backend=backend)
    lse[:, 0, :16] = -torch.inf
    lse[:, 1, 20] = -torch.inf
    mass = block_mass(q, k, lse, block_size=16, backend=backend)
    assert (mass[:, 0, 0] == 0).all()
    assert torch.allclose(mass[:, 1, 1].sum(-1), torch.tensor(15 / 16))
    assert torch.allclose(mass[:, 0, 1], whole[:, 0, 1]) and torch.allclose(mass[:, 1, 0], whole[:, 1, 0])


def test_lse_of_an_attention_call() -> None:
    q, k = draw(5, 2, 4, 2, 50, 70, 16, torch.float32)
    _, lse = partial(q, k, k)
    mass = block_mass(q, k, lse, block_size=(16, 32))
    assert torch.allclose(mass.sum(-1), torch.ones(()), atol=1e-5)
    # over some of the keys, their part of the mass
    assert torch.allclose(block_mass(q, k[:, :, :32], lse, block_size=(16, 32)), mass[..., :1], atol=1e-6)


def test_permuted_tokens_of_a_block_and_permuted_heads() -> None:
    q, k = draw(6, 1, 4, 4, 24, 24, 8)
    lse = softmax_map(q, k, 8**-0.5, False)[1]
    mass = block_mass(q, k, lse, block_size=8)
    inside = torch.arange(24).view(3, 8).flip(1).flatten()
    assert torch.allclose(block_mass(q[:, :, inside], k[:, :, inside], lse[..., inside], block_size=8), mass)
    heads = torch.tensor([2, 0, 3, 1])
    assert torch.equal(block_mass(q[:, heads], k[:, heads], lse[:, heads], block_size=8), mass[:, heads])


def test_no_map_is_made() -> None:
    """The largest tensor on the way, S 2048."""

    class Largest(TorchDispatchMode):
        numbers = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
            out = func(*args, **(kwargs or {}))
            for tensor in out if isinstance(out, tuple) else (out,):
                if isinstance(tensor, torch.Tensor):
                    self.numbers = max(self.numbers, tensor.numel())
            return out

    q, k = draw(7, 1, 2, 2, 2048, 2048, 8, torch.float32)
    with Largest() as seen:
        chunked.block_mass(q, k, torch.zeros(1, 2, 2048), (128, 128), 0.1, False)
        chunked.sampled_mass(
            q, k, torch.zeros(16, 64, dtype=torch.long), torch.ones(16, 64, dtype=torch.bool), 128, 1.0, False
        )
    assert seen.numbers <= chunked.TILE["cpu"] < q.shape[1] * 2048 * 2048


@settings(max_examples=30)
@given(call=calls, scale=st.sampled_from([0.3, -0.7]))
def test_pooled_scores(call: dict, scale: float) -> None:
    q, k = drawn(call)
    (bq, bk), group = call["block_size"], q.shape[1] // k.shape[1]
    products = scale * q @ k.repeat_interleave(group, 1).mT
    means, bounds, tops = (
        pooled_scores(q, k, block_size=(bq, bk), pool=pool, scale=scale) for pool in ("mean", "minmax", "max")
    )
    for i in range(means.shape[2]):
        for j in range(means.shape[3]):
            pairs = products[:, :, i * bq : (i + 1) * bq, j * bk : (j + 1) * bk]
            assert torch.allclose(means[:, :, i, j], pairs.mean((-1, -2)), atol=1e-12)
            assert (bounds[:, :, i, j] >= pairs.amax((-1, -2)) - 1e-12).all()
            q_top, k_top = q[:, :, i * bq : (i + 1) * bq].amax(2), k[:, :, j * bk : (j + 1) * bk].amax(2)
            expected = scale * (q_top * k_top.repeat_interleave(group, 1)).sum(-1)
            assert torch.allclose(tops[:, :, i, j], expected, atol=1e-12)


def test_minmax_of_single_queries_is_quest() -> None:
    q, k = draw(8, 1, 2, 2, 7, 30, 16)
    low, high = (torch.stack([getattr(part, a)(2) for part in k.split(10, 2)], 2) for a in ("amin", "amax"))
    quest = torch.maximum(q[:, :, :, None] * low[:, :, None], q[:, :, :, None] * high[:, :, None]).sum(-1)
    assert torch.allclose(pooled_scores(q, k, block_size=(1, 10), pool="minmax", scale=1.0), quest)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("pool", reference.POOLS)
def test_pooled_scores_are_float32(pool: str, dtype: torch.dtype) -> None:
    """The sums too: the mean of 1000 halves near 1 is not rounded to a half on the way."""
    q, k = draw(9, 1, 1, 1, 1000, 1000, 16, dtype)
    scores = pooled_scores(q + 1, k + 1, block_size=500, pool=pool)
    exact = pooled_scores((q + 1).double(), (k + 1).double(), block_size=500, pool=pool)
    assert scores.dtype == torch.float32
    assert torch.allclose(scores.double(), exact, rtol=1e-5)


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.parametrize("tile", [2**6, 2**12, 2**19])
@settings(max_examples=30)
@given(call=calls, masked=st.sampled_from([None, "rows", "heads", "keys"]))
def test_column_mass_equals_the_map(backend: str, tile: int, call: dict, masked: str | None) -> None:
    q, k = drawn(call)
    (batch, heads, q_len, _), kv_len = q.shape, k.shape[2]
    keep = None
    if masked is not None:
        shape = {"rows": (batch, 1, q_len), "heads": (1, heads, q_len), "keys": (batch, 1, 1)}[masked]
        keep = torch.rand(*shape, kv_len, generator=torch.Generator().manual_seed(3)) > 0.5
    seen = (
        torch.ones(batch, heads, q_len, kv_len, dtype=torch.bool) if keep is None else keep.expand(*q.shape[:3], kv_len)
    )
    seen = seen.tril(kv_len - q_len) if call["causal"] else seen
    scores = 0.3 * q @ k.repeat_interleave(heads // k.shape[1], 1).mT
    weights = torch.softmax(scores.masked_fill(~seen, -torch.inf), -1).nan_to_num(0.0)
    lse = scores.masked_fill(~seen, -torch.inf).logsumexp(-1)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(chunked.TILE, "cpu", tile)
        mass = column_mass(q, k, lse, scale=0.3, is_causal=call["causal"], keep=keep, backend=backend)
    assert torch.allclose(mass, weights.sum(2), atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "heads, q_len, kv_len, width", [((2, 2), 64, 64, 32), ((4, 2), 33, 150, 24), ((2, 1), 140, 27, 16)]
)
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("masked", [False, True])
def test_triton_column_mass_equals_the_map(
    masked: bool, causal: bool, heads: tuple[int, int], q_len: int, kv_len: int, width: int, dtype: torch.dtype
) -> None:
    q, k = draw(1, 2, *heads, q_len, kv_len, width, dtype)
    keep = torch.rand(2, 1, q_len, kv_len, generator=torch.Generator().manual_seed(4)) > 0.3 if masked else None
    weights, lse = softmax_map(q, k, width**-0.5, causal)
    expected = (weights if keep is None else weights * keep).sum(2)
    mass = column_mass(q, k, lse.float(), is_causal=causal, keep=keep, backend="triton")
    assert mass.dtype == torch.float32
    assert torch.allclose(mass.double(), expected, atol=2e-5)


@pytest.mark.parametrize("backend", ["torch", "reference", "triton"])
def test_column_mass_of_queries_that_do_not_count(backend: str) -> None:
    """A query at -inf gives nothing; the others as much as without it."""
    q, k = draw(16, 1, 2, 1, 40, 30, 16, torch.float32)
    weights, lse = softmax_map(q, k, 0.25, False)
    gone = lse.clone()
    gone[:, 1, 7:] = -torch.inf
    mass = column_mass(q, k, gone.float(), backend=backend)
    assert torch.allclose(mass[:, 0].double(), weights[:, 0].sum(1), atol=1e-5)
    assert torch.allclose(mass[:, 1].double(), weights[:, 1, :7].sum(1), atol=1e-5)


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0)])
def test_column_mass_of_nothing(queries: int, keys: int) -> None:
    query, key, lse = torch.ones(2, 4, queries, 8), torch.ones(2, 2, keys, 8), torch.ones(2, 4, queries)
    assert torch.equal(column_mass(query, key, lse), torch.zeros(2, 4, keys))


def test_column_mass_of_scores_far_apart() -> None:
    """Scores 300 below the log-sum-exp give exactly nothing worth counting, and no number that is not finite."""
    q, k = draw(17, 1, 1, 1, 64, 64, 16, torch.float32)
    k[:, :, 1:] -= 400 * q.mean((2,), keepdim=True) / q.mean((2,), keepdim=True).norm()
    lse = (q @ k.mT).logsumexp(-1)
    mass = column_mass(q, k, lse, scale=1.0)
    assert torch.isfinite(mass).all()
    assert torch.allclose(mass, torch.softmax(q @ k.mT, -1).sum(2), atol=1e-4)


@settings(max_examples=40)
@given(call=calls)
def test_visible_keys(call: dict) -> None:
    _, _, _, q_len, kv_len, _ = call["shape"]
    seen = torch.ones(1, 1, q_len, kv_len, dtype=torch.float64)
    if call["causal"]:
        seen = seen.tril(kv_len - q_len)
    found = reference.visible_keys(q_len, kv_len, call["block_size"], call["causal"], torch.device("cpu"))
    assert torch.allclose(found.double(), by_blocks(seen, call["block_size"])[0, 0])


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=40)
@given(call=calls, samples=st.integers(1, 25))
def test_estimates_are_distributions(call: dict, samples: int) -> None:
    """Rows sum to 1 where every query of the block sees a key; enough samples are exact; so is the log-sum-exp."""
    q, k = drawn(call)
    options = {"block_size": call["block_size"], "is_causal": call["causal"], "scale": 0.3}
    weights, lse = softmax_map(q, k, 0.3, call["causal"])
    exact = by_blocks(weights, call["block_size"])
    pooled, sampled = qk_estimate(q, k, **options), qk_estimate(q, k, samples=samples, **options)
    seeing = torch.isclose(exact.sum(-1), torch.ones(()).double())
    for found in (pooled, sampled):
        assert found.shape == exact.shape and (found >= 0).all()
        assert torch.allclose(found.sum(-1)[seeing], torch.ones(()).double())
        assert (found[(exact == 0)] == 0).all()
    assert torch.allclose(qk_estimate(q, k, samples=call["block_size"][0], **options), exact, atol=1e-12)
    assert torch.equal(qk_estimate(q, k, lse=lse, **options), block_mass(q, k, lse, **options))


@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=25)
@given(call=calls, n=st.integers(1, 6))
def test_sampled_mass_equals_the_rows_of_the_map(call: dict, n: int) -> None:
    q, k = drawn(call)
    g = torch.Generator().manual_seed(n)
    blocks = -(-q.shape[2] // call["block_size"][0])
    rows = torch.randint(q.shape[2], (blocks, n), generator=g)
    exists = torch.rand(blocks, n, generator=g) < 0.7
    exists[:, 0] = True
    weights, _ = softmax_map(q, k, 0.3, call["causal"])
    expected = torch.stack(
        [weights[:, :, r[e]].mean(2) for r, e in zip(rows, exists, strict=True)], 2
    )  # (B, H, nQ, S_k)
    expected = by_blocks(expected, (1, call["block_size"][1]))
    for found in (chunked.sampled_mass, reference.sampled_mass):
        mass = found(q, k, rows, exists, call["block_size"][1], 0.3, call["causal"])
        assert torch.allclose(mass, expected, atol=1e-12)


def test_samples_are_drawn_without_replacement_and_repeat_with_the_generator() -> None:
    q, k = draw(10, 1, 2, 1, 100, 60, 8)
    one, two, other = (qk_estimate(q, k, block_size=16, samples=4, generator=torch.Generator().manual_seed(s))
                       for s in (0, 0, 1))  # fmt: skip
    assert torch.equal(one, two) and not torch.equal(one, other)
    rows, exists = _draw(100, 16, 12, None, torch.device("cpu"))
    for block, (row, there) in enumerate(zip(rows, exists, strict=True)):
        drawn_rows = row[there].tolist()
        assert len(set(drawn_rows)) == len(drawn_rows) == min(12, 100 - 16 * block)
        assert all(16 * block <= r < min(16 * block + 16, 100) for r in drawn_rows)


def test_pooled_estimate_of_equal_scores_is_exact() -> None:
    """Queries of zeros see every key alike: the mass of a block is its share of the keys, short last block or not."""
    q, k = draw(11, 1, 2, 2, 40, 50, 8)
    mass = qk_estimate(0 * q, k, block_size=16)
    assert torch.allclose(mass, torch.tensor([16, 16, 16, 2]).double() / 50)


def test_traces() -> None:
    q, k = draw(12, 1, 2, 1, 20, 30, 8, torch.float32)
    lse = softmax_map(q, k, 8**-0.5, True)[1].float()
    calls = {
        "pooled": lambda q, k, lse: pooled_scores(q, k, block_size=(8, 16), pool="minmax"),
        "mass": lambda q, k, lse: block_mass(q, k, lse, block_size=(8, 16), is_causal=True),
        "columns": lambda q, k, lse: column_mass(q, k, lse, is_causal=True),
        "estimate": lambda q, k, lse: qk_estimate(q, k, block_size=(8, 16), is_causal=True),
        "samples": lambda q, k, lse: qk_estimate(q, k, block_size=(8, 16), samples=8, is_causal=True),
    }
    for name, call in calls.items():
        torch._dynamo.reset()
        compiled = torch.compile(call, fullgraph=True, backend="aot_eager")
        assert torch.allclose(compiled(q, k, lse), call(q, k, lse), atol=1e-6), name


def test_registered_operations() -> None:
    q, k = draw(13, 1, 2, 1, 20, 30, 8, torch.float32)
    lse = torch.zeros(1, 2, 20)
    rows, exists = torch.arange(20).view(2, 10), torch.ones(2, 10, dtype=torch.bool)
    checks = ("test_schema", "test_faketensor")
    for backend in (None, "torch", "reference"):
        torch.library.opcheck(
            torch.ops.steer_kernels.block_mass, (q, k, lse, 8, 16, 0.3, True, backend), test_utils=checks
        )
        keep = torch.ones(1, 1, 20, 30, dtype=torch.bool)
        for mask in (None, keep):
            torch.library.opcheck(
                torch.ops.steer_kernels.column_mass, (q, k, lse, mask, 0.3, True, backend), test_utils=checks
            )
    torch.library.opcheck(torch.ops.steer_kernels.sampled_mass, (q, k, rows, exists, 16, 0.3, True), test_utils=checks)


def test_no_gradient_through_the_mass() -> None:
    q, k = draw(14, 1, 1, 1, 8, 8, 8)
    q.requires_grad_()
    assert not block_mass(q, k, torch.zeros(1, 1, 8), block_size=4).requires_grad
    assert pooled_scores(q, k, block_size=4).requires_grad


def test_errors_name_the_shapes_and_the_choices(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k = draw(15, 1, 3, 2, 8, 8, 8, torch.float32)
    one, lse = k[:, :1], torch.zeros(1, 3, 8)
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        pooled_scores(q, k)
    with pytest.raises(ValueError, match=r"must be \(B, H, S, D\)"):
        pooled_scores(q[0], one)
    with pytest.raises(ValueError, match="do not fit together"):
        pooled_scores(q, one[..., :4])
    with pytest.raises(ValueError, match=r"one dtype and one device.*float16.*float32"):
        block_mass(q, one.half(), lse)
    with pytest.raises(ValueError, match="choose from mean, max, minmax"):
        pooled_scores(q, one, pool="median")
    with pytest.raises(ValueError, match="must be one number or"):
        pooled_scores(q, one, block_size=(0, 4))
    with pytest.raises(ValueError, match=r"lse must be \(1, 3, 8\)"):
        block_mass(q, one, lse[:, :2])
    with pytest.raises(ValueError, match="choose from triton, torch, reference"):
        block_mass(q, one, lse, backend="fast")
    with pytest.raises(ValueError, match=r"lse must be \(1, 3, 8\)"):
        column_mass(q, one, lse[:, :2])
    for keep in (torch.ones(3, 8, dtype=torch.bool), torch.ones(8, 8)):
        with pytest.raises(ValueError, match=r"bool and broadcastable to \(B, H, S_q, S_k\) = \(1, 3, 8, 8\)"):
            column_mass(q, one, lse, keep=keep)
    with pytest.raises(ValueError, match="choose from triton, torch, reference"):
        column_mass(q, one, lse, backend="fast")
    with pytest.raises(ValueError, match="either lse or samples"):
        qk_estimate(q, one, lse=lse, samples=3)
    with pytest.raises(ValueError, match="needs lse"):
        qk_estimate(q, one, backend="torch")
    with pytest.raises(ValueError, match="at least 1 query"):
        qk_estimate(q, one, samples=0)
    with pytest.raises(ValueError, match="cannot serve this call: it takes float16, bfloat16 and float32"):
        block_mass(q.double(), one.double(), lse, backend="triton")
    with pytest.raises(ValueError, match="at most 256 queries"):
        block_mass(q, one, lse, block_size=512, backend="triton")
    with pytest.raises(ValueError, match="at most 256 channels"):
        block_mass(q.repeat(1, 1, 1, 33), one.repeat(1, 1, 1, 33), lse, backend="triton")
    with pytest.raises(ValueError, match="do not fit into the shared memory"):
        block_mass(q.repeat(1, 1, 1, 32), one.repeat(1, 1, 1, 32), lse, block_size=256, backend="triton")
    with pytest.raises(ValueError, match="wrong in bfloat16"):
        block_mass(q.bfloat16(), one.bfloat16(), lse, backend="triton")
    monkeypatch.delenv("TRITON_INTERPRET")
    with pytest.raises(ValueError, match="needs a CUDA device, not cpu"):
        block_mass(q, one, lse, backend="triton")


COMPILE = """
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource

    from steer_kernels.estimate.triton import Tiling, block_mass_kernel as kernel

    CASES = [
        # capability, shared memory, type, bytes, width, block size, causal
        (80, 163, "fp16", 2, 128, (128, 128), False),
        (80, 163, "fp32", 4, 64, (128, 64), True),
        (90, 227, "bf16", 2, 128, (128, 64), True),
        (90, 227, "fp16", 2, 72, (128, 128), True),
        (90, 227, "fp16", 2, 128, (100, 200), False),
        (90, 227, "fp32", 4, 128, (128, 128), True),
    ]
    for capability, kilobytes, name, size, width, (bq, bk), causal in CASES:
        tiles = vars(Tiling.of((bq, bk), width, size, kilobytes * 1024)).copy()
        options = {option: tiles.pop(option) for option in ("num_warps", "num_stages")}
        constants = dict(tiles, BQ=bq, BK=bk, WIDTH=width, CAUSAL=causal)
        types = {argument: "i32" for argument in kernel.arg_names}
        types |= {"Q": "*" + name, "K": "*" + name, "LSE": "*fp32", "MASS": "*fp32", "factor": "fp32"}
        types |= {constant: "constexpr" for constant in constants}
        # what a launch with aligned tensors tells the compiler
        aligned = [a for a in types if types[a].startswith("*") or a.startswith("stride")]
        hints = {(kernel.arg_names.index(a),): [["tt.divisibility", 16]] for a in aligned}
        source = ASTSource(kernel, types, constants, hints)
        made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
        assert made.metadata.shared <= kilobytes * 1024, (capability, name, width, bq, bk, made.metadata.shared)
        assert "cp.async" in made.asm["ptx"], "keys are not loaded ahead"
        assert ("wgmma" if capability == 90 else "mma.sync") in made.asm["ptx"], "no tensor cores"
    print("compiled", len(CASES))
"""


def test_compiles_for_gpus_that_are_not_here() -> None:
    environment = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", textwrap.dedent(COMPILE)],
        capture_output=True,
        text=True,
        env=environment,
    )
    assert done.returncode == 0 and "compiled 6" in done.stdout, done.stderr
