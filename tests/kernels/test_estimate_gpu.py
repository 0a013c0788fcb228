"""What only a GPU can show of the block scores: bfloat16, full tiles, and mask building inside a CUDA graph."""

from __future__ import annotations

import pytest
import torch

from steer_kernels.build import forced, top_k, top_mass
from steer_kernels.estimate import block_mass, column_mass, qk_estimate, reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


def draw(h: int, kv: int, s: int, n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor]:
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, h, s, d, generator=g, device="cuda", dtype=dtype)
    return q, torch.randn(2, kv, n, d, generator=g, device="cuda", dtype=dtype)


def lse_of(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    scores = q.double() @ k.repeat_interleave(q.shape[1] // k.shape[1], 1).double().mT * q.shape[-1] ** -0.5
    if causal:
        later = torch.ones(scores.shape[-2:], dtype=torch.bool, device="cuda").triu(k.shape[2] - q.shape[2] + 1)
        scores = scores.masked_fill(later, -torch.inf)
    return scores.logsumexp(-1)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize(
    "heads, q_len, kv_len, width, block_size",
    [
        ((8, 8), 1024, 1024, 64, (128, 128)),
        ((8, 2), 1000, 1333, 128, (128, 64)),
        ((4, 1), 700, 500, 96, (64, 64)),
        ((2, 2), 333, 777, 72, (100, 200)),
        ((2, 2), 520, 520, 64, (256, 128)),
        ((2, 2), 130, 300, 40, (16, 16)),
    ],
)
def test_mass(
    heads: tuple[int, int],
    q_len: int,
    kv_len: int,
    width: int,
    block_size: tuple[int, int],
    causal: bool,
    dtype: torch.dtype,
) -> None:
    """Products of two halves are exact in fp32, and fp32 ones are kept to three tf32 parts: one tolerance."""
    q, k = draw(*heads, q_len, kv_len, width, dtype)
    lse, scale = lse_of(q, k, causal), width**-0.5
    expected = reference.block_mass(q.double(), k.double(), lse, block_size, scale, causal)
    for backend in ("triton", "torch", None):
        mass = block_mass(q, k, lse.float(), block_size=block_size, is_causal=causal, backend=backend)
        assert torch.allclose(mass.double(), expected, atol=1e-5), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("q_len, kv_len, width", [(1024, 1024, 64), (333, 777, 128), (700, 500, 72)])
def test_column_mass(q_len: int, kv_len: int, width: int, causal: bool, dtype: torch.dtype) -> None:
    q, k = draw(8, 2, q_len, kv_len, width, dtype)
    lse, scale = lse_of(q, k, causal), width**-0.5
    keep = torch.rand(2, 1, q_len, kv_len, generator=torch.Generator("cuda").manual_seed(1), device="cuda") > 0.3
    for mask in (None, keep):
        expected = reference.column_mass(q.double(), k.double(), lse, mask, scale, causal)
        for backend in ("triton", "torch", None):
            mass = column_mass(q, k, lse.float(), is_causal=causal, keep=mask, backend=backend)
            assert torch.allclose(mass.double(), expected, atol=1e-3, rtol=1e-4), backend


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_strided_heads(dtype: torch.dtype) -> None:
    """(B, S, H, D) seen as (B, H, S, D), and a width whose rows are not 16-byte aligned."""
    for width in (64, 36):
        q, k = draw(4, 4, 300, 300, width, dtype)
        lse = lse_of(q, k, False).float()
        strided = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in (q, k))
        found, expected = block_mass(*strided, lse, backend="triton"), block_mass(q, k, lse, backend="triton")
        assert torch.allclose(found, expected, atol=1e-6)


def test_samples_that_are_all_queries() -> None:
    q, k = draw(4, 2, 500, 700, 64, torch.bfloat16)
    lse = lse_of(q, k, True).float()
    exact = block_mass(q, k, lse, is_causal=True)
    assert torch.allclose(qk_estimate(q, k, samples=128, is_causal=True), exact, atol=1e-4)


def test_masks_are_built_inside_a_cuda_graph() -> None:
    """Capturing fails on any synchronisation; replays see new scores."""
    scores, force = torch.rand(1, 4, 20, 20, device="cuda"), forced(20, 20, sink_blocks=1, device="cuda")

    def build() -> tuple[torch.Tensor, ...]:
        masks = (
            top_k(scores, 5, force=force),
            top_k(scores, density=0.3, causal=True, q_len=2500, kv_len=2500),
            top_mass(scores, 0.5, force=force, causal=True),
        )
        return tuple(t for m in masks for t in (m.full_num, m.full_idx, m.partial_num, m.partial_idx))

    build()
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = build()
    scores.copy_(torch.rand_like(scores))
    graph.replay()
    assert all(torch.equal(a, b) for a, b in zip(captured, build(), strict=True))
    torch.cuda.set_sync_debug_mode("error")
    try:
        build()
    finally:
        torch.cuda.set_sync_debug_mode("default")
