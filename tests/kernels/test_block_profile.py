"""Block profiles against loops over the blocks of the explicit softmax map in fp64."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels import block_mass, block_profile
from steer_kernels.estimate import chunked


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


def softmax_map(q: torch.Tensor, k: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An independent formulation in fp64, one head at a time: the map (B, H, S_q, S_k) and its log-sum-exp."""
    q, k, group = q.double(), k.double(), q.shape[1] // k.shape[1]
    scores = torch.stack(
        [torch.stack([scale * q[b, h] @ k[b, h // group].T for h in range(q.shape[1])]) for b in range(q.shape[0])]
    )
    return scores.softmax(-1), scores.logsumexp(-1)


def by_loops(weights: torch.Tensor, bq: int, bk: int, threshold: float) -> tuple[torch.Tensor, ...]:
    """Mass, share below and peak, one block after the other."""
    rows, columns = range(0, weights.shape[2], bq), range(0, weights.shape[3], bk)
    blocks = [[weights[:, :, i : i + bq, j : j + bk] for j in columns] for i in rows]
    figures = (
        lambda block: block.sum(-1).mean(-1),
        lambda block: (block < threshold).double().mean((-1, -2)),
        lambda block: block.amax((-1, -2)),
    )
    return tuple(torch.stack([torch.stack([f(x) for x in row], -1) for row in blocks], -2) for f in figures)


calls = st.tuples(
    st.integers(0, 99), st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]),
    st.integers(1, 45), st.integers(1, 45), st.sampled_from([1, 8, 24]), st.integers(1, 20), st.integers(1, 20),
    st.sampled_from([0.0, 1e-3, 0.05, 2.0]),
)  # fmt: skip


@pytest.mark.parametrize("backend", ["torch", "reference"])
@pytest.mark.usefixtures("small_tiles")
@settings(max_examples=40)
@given(call=calls)
def test_profile_equals_loops_over_the_map(backend: str, call: tuple) -> None:
    seed, b, (h, kv), s, n, d, bq, bk, threshold = call
    q, k = draw(seed, b, h, kv, s, n, d)
    weights, lse = softmax_map(q, k, 0.3)
    found = block_profile(q, k, lse, block_size=(bq, bk), threshold=threshold, scale=0.3, backend=backend)
    for mine, wanted in zip(found, by_loops(weights, bq, bk, threshold), strict=True):
        assert mine.shape == wanted.shape and torch.allclose(mine, wanted, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_low_precision_is_summed_in_float32(dtype: torch.dtype) -> None:
    q, k = draw(1, 2, 4, 2, 70, 90, 32, dtype)
    weights, lse = softmax_map(q, k, 0.2)
    found = block_profile(q, k, lse.float(), block_size=(32, 16), threshold=0.01, scale=0.2)
    mass, share, peak = by_loops(weights, 32, 16, 0.01)
    assert found.mass.dtype == torch.float32
    assert torch.allclose(found.mass.double(), mass, atol=2e-6)
    assert torch.allclose(found.peak.double(), peak, atol=2e-6)
    assert (found.share_below.double() - share).abs().max() <= 1 / (
        26 * 10
    )  # an entry at the threshold may change side


def test_mass_is_that_of_block_mass() -> None:
    q, k = draw(2, 1, 2, 1, 37, 53, 16, torch.float32)
    lse = softmax_map(q, k, 0.25)[1].float()
    profile = block_profile(q, k, lse, block_size=16)
    assert torch.allclose(profile.mass, block_mass(q, k, lse, block_size=16), atol=1e-6)


@pytest.mark.parametrize("backend", ["torch", "reference"])
def test_queries_that_saw_nothing(backend: str) -> None:
    q, k = draw(3, 1, 2, 2, 32, 20, 16)
    lse = softmax_map(q, k, 0.25)[1]
    lse[:, 0, :16] = -torch.inf
    mass, share, peak = block_profile(q, k, lse, block_size=16, backend=backend)
    assert not mass[:, 0, 0].any() and not peak[:, 0, 0].any() and (share[:, 0, 0] == 1).all()
    assert mass[:, 1].min() > 0


def test_bad_calls_are_refused() -> None:
    q, k = draw(4, 1, 2, 2, 8, 8, 4)
    with pytest.raises(ValueError, match=r"lse must be \(1, 2, 8\)"):
        block_profile(q, k, torch.zeros(1, 2, 7))
    with pytest.raises(ValueError, match="backend='triton' does not exist for block_profile"):
        block_profile(q, k, torch.zeros(1, 2, 8), backend="triton")
