"""What only a GPU can show of block-sparse attention: the kernel on CUDA, its streams, graphs and compilation."""

from __future__ import annotations

import pytest
import torch
from masked import draw, low_precision_error, masked_attention
from test_block_sparse import random_mask

from steer_kernels import BlockMask, block_sparse_attention, grouped_attention, patterns
from steer_kernels.block_sparse import backend_for

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]
SHAPES = [  # batch, heads, key/value heads, queries, keys
    (1, 4, 4, 1024, 1024),
    (2, 4, 2, 777, 1333),
    (1, 8, 1, 130, 5000),
    (1, 2, 2, 1, 3000),
]
RULES = [(None, False), (None, True), ("box", False), ("box", True), ("disc", False)]
BLOCKS = [(128, 128), (128, 64), (64, 64)]
# every rule and block size in the main setting, and every width and dtype with the rules that differ most: each of
# them compiles the kernel anew
SETTINGS = [
    *((torch.bfloat16, 128, *rule, blocks) for rule in RULES for blocks in BLOCKS),
    *((torch.bfloat16, width, "box", True, blocks) for width in (64, 96, 256) for blocks in BLOCKS[::2]),
    *(
        (dtype, width, *RULES[n], BLOCKS[0])
        for dtype in (torch.float16, torch.float32)
        for width in (64, 128)
        for n in (0, 3)
    ),
]


@pytest.mark.parametrize("dtype, width, rule, causal, blocks", SETTINGS)
def test_equals_masked_attention(
    dtype: torch.dtype, width: int, rule: str | None, causal: bool, blocks: tuple[int, int]
) -> None:
    for batch, heads, kv, q_len, kv_len in SHAPES:
        q, k, v = draw(0, batch, heads, kv, q_len, kv_len, width, dtype)
        mask = random_mask(0, 1, heads, q_len, kv_len, blocks, 0.5, rule)
        visible = (mask.with_causal() if causal else mask).to_tokens()
        truth, true_lse = masked_attention(q, k, v, visible, width**-0.5)
        out, lse = block_sparse_attention(
            q.cuda(), k.cuda(), v.cuda(), mask.to("cuda"), is_causal=causal, return_lse=True, backend="triton"
        )
        out, lse = out.cpu().double(), lse.cpu().double()
        yardstick = low_precision_error(q, k, v, visible, width**-0.5, truth)
        assert (out - truth).norm() <= 1.5 * yardstick + 1e-6 * truth.norm()
        seen = true_lse > -torch.inf
        assert torch.equal(lse > -torch.inf, seen) and (out[~seen] == 0).all()
        assert torch.allclose(lse[seen], true_lse[seen], atol=1e-4 if dtype == torch.float32 else 2e-2)


@pytest.mark.parametrize("tma", [False, True])
@pytest.mark.parametrize("tile_k, stages", [(128, 2), (64, 3), (64, 2), (32, 3)])
@pytest.mark.parametrize("width", [64, 128])
def test_launch_settings_change_the_speed_alone(width: int, tile_k: int, stages: int, tma: bool) -> None:
    from steer_kernels.block_sparse import triton
    from steer_kernels.config import Config

    if tma and torch.cuda.get_device_capability() < (9, 0):
        pytest.skip("tensor-map descriptors need compute capability 9.0")
    q, k, v = (t.cuda() for t in draw(1, 1, 4, 2, 1000, 1500, width, torch.bfloat16))
    mask = random_mask(1, 1, 4, 1000, 1500, (128, 128), 0.5, "box").to("cuda")
    expected = block_sparse_attention(q, k, v, mask, backend="triton")
    settings = Config(128, tile_k, 8, stages, tma, 132)
    out, _ = triton.forward(q, k, v, mask, width**-0.5, settings, mask.schedule(1, 4, 1, 132))
    assert torch.allclose(out, expected, atol=2e-2)


def test_the_gpu_takes_triton_and_flex_agrees() -> None:
    q, k, v = (t.cuda() for t in draw(2, 1, 4, 4, 1024, 1024, 64, torch.bfloat16))
    mask = random_mask(2, 1, 4, 1024, 1024, (128, 128), 0.5, None).to("cuda")
    assert backend_for(q, k, v, mask) == "triton"
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True)
    theirs, their_lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="flex")
    assert torch.allclose(out, theirs, atol=2e-2) and torch.allclose(lse, their_lse, atol=1e-2)


def test_a_side_stream_and_a_graph() -> None:
    q, k, v = (t.cuda() for t in draw(3, 1, 4, 4, 1024, 1024, 64, torch.bfloat16))
    mask = random_mask(3, 1, 4, 1024, 1024, (128, 128), 0.5, None).to("cuda")
    expected = block_sparse_attention(q, k, v, mask)
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        beside = block_sparse_attention(q, k, v, mask)
    torch.cuda.current_stream().wait_stream(stream)
    assert torch.equal(beside, expected)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = block_sparse_attention(q, k, v, mask)
    q.copy_(torch.randn_like(q))
    graph.replay()
    assert torch.equal(captured, block_sparse_attention(q, k, v, mask))


def test_compiled() -> None:
    q, k, v = (t.cuda() for t in draw(4, 1, 4, 4, 1024, 1024, 64, torch.bfloat16))
    mask = random_mask(4, 1, 4, 1024, 1024, (128, 128), 0.5, "box").to("cuda")
    compiled = torch.compile(lambda q, k, v: block_sparse_attention(q, k, v, mask) * 2, fullgraph=True)
    assert torch.allclose(compiled(q, k, v), block_sparse_attention(q, k, v, mask) * 2, atol=2e-2)


def test_nothing_waits_for_the_device() -> None:
    q, k, v = (t.cuda() for t in draw(5, 1, 4, 4, 2048, 2048, 64, torch.bfloat16))
    keep = torch.rand(1, 4, 16, 16, device="cuda") < 0.5
    block_sparse_attention(q, k, v, BlockMask.from_bool(keep, 128), is_causal=True)  # compiles the kernel
    torch.cuda.set_sync_debug_mode("error")
    try:
        block_sparse_attention(q, k, v, BlockMask.from_bool(keep, 128), is_causal=True)
    finally:
        torch.cuda.set_sync_debug_mode("default")


def test_grouped_attention_and_patterns_on_the_device() -> None:
    q, k, v = (t.cuda() for t in draw(6, 1, 4, 4, 2000, 2000, 64, torch.float16))
    groups = (torch.arange(2000, device="cuda") % 97 == 0).long()
    factor = torch.tensor([1.0, 0.4], device="cuda")
    fast, slow = (
        grouped_attention(q, k, v, groups, lambda m: m * factor, count=2, is_causal=True, backend=backend)
        for backend in ("triton", "reference")
    )
    assert torch.allclose(fast, slow, atol=1e-2)
    for device in ("cpu", "cuda"):
        made = patterns.neighborhood(grid=(4, 20, 25), window=(3, 9, 9), tile=(2, 5, 5), device=device)
        assert made.device.type == device
    assert torch.equal(
        made.to_tokens().cpu(),
        patterns.neighborhood(grid=(4, 20, 25), window=(3, 9, 9), tile=(2, 5, 5)).to_tokens(),
    )
