"""What only a GPU can show of `gathered_decode`: the compiled kernels, bfloat16, CUDA graphs, caches over 2**31."""

from __future__ import annotations

import pytest
import torch

from steer_kernels.decode import gathered_decode, page_scores, page_summary, refusal, select_pages

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("width, page_size", [(64, 16), (128, 16), (128, 128), (80, 32), (256, 64)])
@pytest.mark.parametrize("heads, queries", [((32, 8), 1), ((8, 8), 2), ((32, 2), 4), ((16, 1), 8)])
def test_error_within_eager(
    dtype: torch.dtype, width: int, page_size: int, heads: tuple[int, int], queries: int
) -> None:
    """Of the reference in the same precision, both against the reference in fp64."""
    g = torch.Generator("cuda").manual_seed(0)
    query = torch.randn(2, heads[0], queries, width, generator=g, device="cuda", dtype=dtype)
    key, value = (torch.randn(2, heads[1], 8191, width, generator=g, device="cuda", dtype=dtype) for _ in range(2))
    lengths = torch.tensor([8191, 5000], device="cuda")
    key[1, :, 5000:] = value[1, :, 5000:] = torch.nan
    for lists in sorted({1, *heads}):
        order = torch.rand(2, lists, -(-8191 // page_size), generator=g, device="cuda").argsort(-1)
        pages = order[..., : 2048 // page_size].masked_fill(order[..., : 2048 // page_size] % 7 == 0, -1)
        call = {"page_size": page_size, "lengths": lengths, "return_lse": True}
        wide = (t.double() for t in (query, key, value))
        truth, truth_lse = gathered_decode(*wide, pages, **call, backend="reference")
        plain, _ = gathered_decode(query, key, value, pages, **call, backend="reference")
        out, lse = gathered_decode(query, key, value, pages, **call)
        assert refusal("triton", query, key, value, pages) is None
        found, allowed = ((o.double() - truth).norm() for o in (out, plain))
        if (
            dtype == torch.float32
        ):  # no rounding but that of sums, whose order differs from one matrix shape to the next
            allowed = 8 * torch.finfo(dtype).eps * truth.norm()
        assert found <= 1.05 * allowed
        assert torch.allclose(lse.double(), truth_lse, atol=1e-4)


def test_a_step_needs_no_host_and_replays_in_a_cuda_graph() -> None:
    """Append, score, select and attend over a static cache, whose contents and length change between replays."""
    key, value = (torch.randn(2, 4, 4096, 64, device="cuda", dtype=torch.float16) for _ in range(2))
    query, lengths = torch.randn(2, 16, 1, 64, device="cuda", dtype=torch.float16), torch.tensor([900, 70]).cuda()
    summary = page_summary(key, 16, lengths=lengths, kind="minmax")

    def step() -> torch.Tensor:
        pages = select_pages(
            page_scores(query, summary.append(key, 1, lengths=lengths)), 32, page_size=16, lengths=lengths
        )
        return gathered_decode(query, key, value, pages, page_size=16, lengths=lengths, backend="triton")

    step()  # compiles the kernels
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    for _ in range(20):
        lengths += 1
        query.normal_()
        graph.replay()
        fresh = page_summary(key, 16, lengths=lengths, kind="minmax")
        pages = select_pages(page_scores(query, fresh), 32, page_size=16, lengths=lengths)
        wide = (t.double() for t in (query, key, value))
        expected = gathered_decode(*wide, pages, page_size=16, lengths=lengths, backend="reference")
        assert torch.allclose(captured.double(), expected, atol=5e-3)


def test_cache_over_two_to_the_31_elements() -> None:
    if torch.cuda.mem_get_info()[0] < 12 * 2**30:
        pytest.skip("needs 12 GB")
    key = torch.zeros(1, 9, 2**21, 128, device="cuda", dtype=torch.float16)
    key[:, :, -64:].normal_()
    query = torch.randn(1, 9, 1, 128, device="cuda", dtype=torch.float16)
    pages = torch.arange(2**17 - 4, 2**17, device="cuda").expand(1, 1, 4)
    out = gathered_decode(query, key, key, pages, page_size=16, backend="triton")
    tail = key[:, :, -64:]
    expected = gathered_decode(query, tail, tail, torch.arange(4, device="cuda").expand(1, 1, 4), page_size=16)
    assert torch.equal(out, expected)


def test_compiles_with_inductor() -> None:
    query, key = (torch.randn(1, 8, n, 64, device="cuda", dtype=torch.bfloat16) for n in (1, 1000))
    pages = torch.arange(0, 60, 3, device="cuda").expand(1, 1, 20)

    def attend(query: torch.Tensor) -> torch.Tensor:
        return gathered_decode(query * 2, key, key, pages, page_size=16) + 1

    torch._dynamo.reset()
    assert torch.allclose(torch.compile(attend, fullgraph=True)(query), attend(query), atol=2e-2)
