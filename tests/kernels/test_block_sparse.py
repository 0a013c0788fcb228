"""`block_sparse_attention`: every backend against fp64 attention under the same token mask."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from masked import draw, low_precision_error, masked_attention
from test_block_mask import random_rule
from torch.nn.attention import flex_attention as flex

from steer_kernels import BlockMask, block_sparse_attention, merge
from steer_kernels.block_sparse import backend_for, gather, refusal

TRITON = pytest.param("triton", marks=pytest.mark.interpreted)
EXACT = ["gather", "reference"]


@pytest.fixture(autouse=True)
def poisoned_memory() -> Iterator[None]:
    """Memory that nobody wrote is NaN."""
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert torch.zeros(2).new_empty(3).isnan().all() and torch.empty_like(torch.zeros(2)).isnan().all()
    yield
    torch.use_deterministic_algorithms(False)


def random_mask(
    seed: int,
    batch: int,
    heads: int,
    q_len: int,
    kv_len: int,
    blocks: tuple[int, int],
    density: float,
    rule: str | None,
) -> BlockMask:
    g = torch.Generator().manual_seed(seed)
    shape = (batch, heads, -(-q_len // blocks[0]), -(-kv_len // blocks[1]))
    return BlockMask.from_bool(
        torch.rand(shape, generator=g) < density,
        blocks,
        q_len=q_len,
        kv_len=kv_len,
        partial=torch.rand(shape, generator=g) < 0.5 if rule else None,
        rule=random_rule(q_len, kv_len, 1, rule, seed) if rule else None,
    )


calls = st.fixed_dictionaries(
    dict(
        seed=st.integers(0, 99),
        batch=st.integers(1, 2),
        heads=st.sampled_from([(1, 1), (2, 2), (4, 2), (3, 1)]),
        q_len=st.integers(1, 70),
        kv_len=st.integers(1, 70),
        width=st.sampled_from([8, 16, 24]),
        blocks=st.sampled_from([(16, 16), (32, 16), (16, 32)]),
        density=st.sampled_from([0.0, 0.2, 0.6, 1.0]),
        rule=st.sampled_from([None, "box", "disc"]),
        causal=st.booleans(),
        lists=st.sampled_from(["shared", "per kv head", "per head"]),
    )
)


def run(
    backend: str, dtype: torch.dtype, *, seed: int, batch: int, heads: tuple[int, int], q_len: int, kv_len: int,
    width: int, blocks: tuple[int, int], density: float, rule: str | None, causal: bool, lists: str,
) -> tuple[torch.Tensor, ...]:  # fmt: skip
    """The call's output and log-sum-exp, the true ones, and the error of plain attention in the same precision."""
    h, kv = heads
    q, k, v = draw(seed, batch, h, kv, q_len, kv_len, width, dtype)
    rows = {"shared": (1, 1), "per kv head": (batch, kv), "per head": (batch, h)}[lists]
    mask = random_mask(seed, *rows, q_len, kv_len, blocks, density, rule)
    out, lse = block_sparse_attention(q, k, v, mask, scale=0.3, is_causal=causal, return_lse=True, backend=backend)
    visible = (mask.with_causal() if causal else mask).to_tokens()
    visible = visible.repeat_interleave(h // visible.shape[1], 1) if visible.shape[1] > 1 else visible
    truth, true_lse = masked_attention(q, k, v, visible, 0.3)
    return out, lse, truth, true_lse, torch.tensor(low_precision_error(q, k, v, visible, 0.3, truth))


@pytest.mark.parametrize("backend", EXACT)
@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls)
def test_equals_masked_attention(backend: str, call: dict) -> None:
    out, lse, truth, true_lse, _ = run(backend, torch.float64, **call)
    assert torch.allclose(out, truth, atol=1e-12) and torch.allclose(lse, true_lse, atol=1e-12)
    assert (out[true_lse == -torch.inf] == 0).all()


@pytest.mark.interpreted
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@settings(max_examples=15, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(call=calls)
def test_triton_kernel_interpreted(dtype: torch.dtype, call: dict) -> None:
    out, lse, truth, true_lse, yardstick = run("triton", dtype, **call)
    # in fp32 both errors are single roundings: of 1e-6 of the output neither is the better one
    assert (out.double() - truth).norm() <= 1.5 * yardstick + 1e-6 * truth.norm()
    seen = true_lse > -torch.inf
    assert torch.equal(lse > -torch.inf, seen) and (out[~seen] == 0).all()
    assert (
        (lse[seen].double() - true_lse[seen]).abs().max().item() < (1e-5 if dtype == torch.float32 else 5e-3)
        if seen.any()
        else True
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("backend", EXACT)
def test_error_within_low_precision_attention(backend: str, width: int, dtype: torch.dtype) -> None:
    mask = random_mask(0, 1, 4, 300, 333, (128, 64), 0.5, "box")
    q, k, v = draw(0, 1, 4, 2, 300, 333, width, dtype)
    visible = mask.to_tokens()
    truth, _ = masked_attention(q, k, v, visible, width**-0.5)
    out = block_sparse_attention(q, k, v, mask, backend=backend)
    # 16-bit kernels have to be as good as plain attention; in fp32 both errors are a few roundings of the last bit,
    # and the order of the sums decides between them
    slack = 1.5 if dtype == torch.float32 else 1.05
    assert (out.double() - truth).norm() <= slack * low_precision_error(q, k, v, visible, width**-0.5, truth)


@pytest.mark.interpreted
@pytest.mark.parametrize("width", [64, 96, 128, 256])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_triton_head_dims(width: int, dtype: torch.dtype) -> None:
    mask = random_mask(1, 1, 2, 70, 90, (32, 32), 0.7, None)
    q, k, v = draw(1, 1, 2, 1, 70, 90, width, dtype)
    truth, _ = masked_attention(q, k, v, mask.to_tokens(), width**-0.5)
    out = block_sparse_attention(q, k, v, mask, backend="triton")
    yardstick = low_precision_error(q, k, v, mask.to_tokens(), width**-0.5, truth)
    assert (out.double() - truth).norm() <= 1.5 * yardstick + 1e-6 * truth.norm()


@pytest.mark.parametrize("backend", [*EXACT, TRITON])
def test_all_blocks_is_dense(backend: str) -> None:
    q, k, v = draw(2, 1, 2, 2, 40, 50, 16, torch.float32)
    for causal in (False, True):
        out = block_sparse_attention(q, k, v, BlockMask.dense(40, 50, 16), is_causal=causal, backend=backend)
        visible = torch.ones(40, 50, dtype=torch.bool).tril(10 if causal else 50)
        dense = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=visible)
        assert torch.allclose(out, dense, atol=1e-6)


@pytest.mark.parametrize("backend", [*EXACT, TRITON])
def test_merge_of_disjoint_masks_is_the_whole(backend: str) -> None:
    q, k, v = draw(3, 1, 2, 2, 60, 75, 16, torch.float32)
    keep = random_mask(3, 1, 2, 60, 75, (16, 16), 0.7, None).to_bool()
    half = torch.rand(keep.shape, generator=torch.Generator().manual_seed(4)) < 0.5
    sizes = dict(block_size=16, q_len=60, kv_len=75)

    def attend(grid: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(q, k, v, BlockMask.from_bool(grid, **sizes), return_lse=True, backend=backend)

    whole, whole_lse = attend(keep)
    out, lse = merge([attend(keep & half), attend(keep & ~half)])
    assert torch.allclose(out, whole, atol=1e-6) and torch.allclose(lse, whole_lse, atol=1e-5)


@pytest.mark.parametrize("backend", [*EXACT, TRITON])
def test_permuted_key_blocks_give_the_same(backend: str) -> None:
    q, k, v = draw(5, 1, 2, 2, 48, 64, 16, torch.float32)
    keep = random_mask(5, 1, 2, 48, 64, (16, 16), 0.6, None).to_bool()
    order = torch.randperm(4, generator=torch.Generator().manual_seed(6))
    out = block_sparse_attention(q, k, v, BlockMask.from_bool(keep, 16), backend=backend)
    shuffled = [t.unflatten(2, (4, 16))[:, :, order].flatten(2, 3) for t in (k, v)]
    again = block_sparse_attention(q, *shuffled, BlockMask.from_bool(keep[..., order], 16), backend=backend)
    assert torch.allclose(out, again, atol=1e-6)


@pytest.mark.parametrize("backend", [*EXACT, TRITON])
def test_strided_inputs(backend: str) -> None:
    """(B, S, H, D) memory seen as (B, H, S, D), as diffusers hands it over."""
    q, k, v = (t.transpose(1, 2).contiguous().transpose(1, 2) for t in draw(7, 2, 4, 2, 33, 49, 16, torch.float32))
    mask = random_mask(7, 1, 4, 33, 49, (16, 16), 0.6, None)
    out = block_sparse_attention(q, k, v, mask, backend=backend)
    assert torch.allclose(out, masked_attention(q, k, v, mask.to_tokens(), 0.25)[0].float(), atol=1e-5)
    wide = torch.stack([q, q], -1)[..., 0]
    assert wide.stride(-1) == 2
    assert torch.equal(block_sparse_attention(wide, k, v, mask, backend=backend), out)


@pytest.mark.interpreted
def test_very_long_rows_are_cut_and_merged() -> None:
    """One heavy row of 140 blocks beside light ones: the schedule cuts it, and the pieces make the whole."""
    keep = torch.zeros(1, 2, 3, 140, dtype=torch.bool)
    keep[0, 0, 1] = True
    keep[0, 1, 2, ::50] = True
    mask = BlockMask.from_bool(keep, 16, kv_len=140 * 16 - 5)
    assert int(mask.schedule(1, 2, 1, 2).counts[1]) == 1
    q, k, v = draw(8, 1, 2, 2, 48, 140 * 16 - 5, 16, torch.float32)
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="triton")
    truth, true_lse = masked_attention(q, k, v, mask.to_tokens(), 0.25)
    assert torch.allclose(out.double(), truth, atol=1e-6) and torch.allclose(lse.double(), true_lse, atol=1e-5)


@pytest.mark.interpreted
def test_triton_tiles_smaller_than_blocks_and_descriptors(monkeypatch: pytest.MonkeyPatch) -> None:
    """Launch settings change the speed alone: tiles, and keys loaded through tensor-map descriptors."""
    from steer_kernels.block_sparse import api
    from steer_kernels.config import Config

    q, k, v = draw(9, 2, 4, 2, 75, 100, 16, torch.float16)
    mask = random_mask(9, 1, 4, 75, 100, (32, 32), 0.6, "box")
    expected = block_sparse_attention(q, k, v, mask, is_causal=True, backend="triton")
    for tile_q, tile_k, tma in ((16, 32, False), (32, 16, False), (16, 16, True), (32, 32, True)):
        settings_ = Config(tile_q, tile_k, 4, 1, tma, 3)
        monkeypatch.setattr(api, "config", lambda *_, made=settings_: made)
        out = block_sparse_attention(q, k, v, mask, is_causal=True, backend="triton")
        assert torch.allclose(out, expected, atol=2e-3)


@pytest.mark.slow
@pytest.mark.parametrize("causal", [False, True])
@pytest.mark.parametrize("rule", [None, "box", "disc"])
def test_compiled_flex(rule: str | None, causal: bool) -> None:
    q, k, v = draw(10, 1, 4, 2, 300, 333, 64, torch.float32)
    mask = random_mask(10, 1, 4, 300, 333, (64, 64), 0.6, rule)
    out = block_sparse_attention(q, k, v, mask, is_causal=causal, backend="flex")
    visible = (mask.with_causal() if causal else mask).to_tokens()
    assert torch.allclose(out.double(), masked_attention(q, k, v, visible, 64**-0.5)[0], atol=1e-5)


@pytest.mark.filterwarnings("ignore:flex_attention called without torch.compile")
@pytest.mark.parametrize("rule", [None, "box"])
@pytest.mark.parametrize("causal", [False, True])
def test_uncompiled_flex_is_an_oracle_with_lse(rule: str | None, causal: bool) -> None:
    """FlexAttention's own eager path, which obeys the mask_mod alone, with the token mask as its mask_mod."""
    q, k, v = draw(11, 1, 2, 2, 60, 75, 16, torch.float32)
    mask = random_mask(11, 1, 2, 60, 75, (16, 16), 0.6, rule)
    mask = mask.with_causal() if causal else mask
    tokens = mask.to_tokens()
    theirs_mask = flex.create_block_mask(lambda b, h, q, k: tokens[b, h, q, k], 1, 2, 60, 75, "cpu")
    theirs, more = flex.flex_attention(q, k, v, block_mask=theirs_mask, return_aux=flex.AuxRequest(lse=True))
    out, lse = block_sparse_attention(q, k, v, mask, return_lse=True, backend="gather")
    seen = lse > -torch.inf
    assert torch.allclose(out[seen], theirs[seen], atol=1e-5) and torch.allclose(lse[seen], more.lse[seen], atol=1e-5)


def test_python_rules_work_where_python_runs() -> None:
    mask = BlockMask.from_flex(
        flex.create_block_mask(lambda b, h, q, k: (q - k).abs() < 20, None, None, 90, 90, "cpu", 16)
    )
    q, k, v = draw(12, 1, 2, 2, 90, 90, 16, torch.float64)
    truth, _ = masked_attention(q, k, v, mask.to_tokens(), 0.25)
    for backend in EXACT:
        assert torch.allclose(block_sparse_attention(q, k, v, mask, backend=backend), truth, atol=1e-12)
    assert "a Python function" in (refusal("triton", q.float(), k.float(), v.float(), mask) or "")


@pytest.mark.parametrize("backend", [None, "gather", TRITON])
def test_traces(backend: str | None) -> None:
    q, k, v = draw(13, 1, 2, 2, 40, 40, 16, torch.float32)
    mask = random_mask(13, 1, 2, 40, 40, (16, 16), 0.6, "box")

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        return block_sparse_attention(q, k, v, mask, is_causal=True, return_lse=True, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    for a, b in zip(compiled, attend(q, k, v), strict=True):
        assert torch.equal(a, b)


def test_operator_passes_torchs_own_check() -> None:
    from steer_kernels.block_sparse import api

    q, k, v = draw(14, 1, 2, 2, 40, 40, 16, torch.float32)
    mask = random_mask(14, 1, 2, 40, 40, (16, 16), 0.6, "box")
    lists = [mask.full_num, mask.full_idx, mask.partial_num, mask.partial_idx]
    rule = mask.rule
    torch.library.opcheck(
        api._attend, (q, k, v, lists, [], rule.query, rule.key, "box", 0, False, [16, 16], 0.25, "gather")
    )


def test_inside_and_outside_of_inference_mode() -> None:
    """Scratch memory that is first made in inference mode serves later calls as well."""
    q, k, v = draw(19, 1, 2, 2, 40, 500, 16, torch.float32)
    mask = random_mask(19, 1, 2, 40, 500, (16, 16), 0.6, "box")
    gather._buffers.kept.clear()
    with torch.inference_mode():
        inside = block_sparse_attention(q, k, v, mask, is_causal=True, backend="gather")
    assert torch.equal(block_sparse_attention(q, k, v, mask, is_causal=True, backend="gather"), inside)


def test_choice_of_backend() -> None:
    q, k, v = draw(15, 1, 2, 2, 40, 40, 16, torch.float32)
    mask = BlockMask.dense(40, 40, 16)
    double = (q.double(), k.double(), v.double())
    assert backend_for(*double, mask) == "gather"
    assert backend_for(q.requires_grad_(), k, v, mask) == "reference"
    with torch.no_grad():
        assert backend_for(q, k, v, mask) != "reference"
    out = block_sparse_attention(q, k, v, mask)
    assert torch.autograd.grad(out.sum(), q)[0].isfinite().all()


@pytest.mark.interpreted
def test_refusals_say_why() -> None:
    q, k, v = draw(16, 1, 4, 2, 40, 50, 16, torch.float32)
    mask = BlockMask.dense(40, 50, 16)

    def refused(
        match: str,
        q: torch.Tensor = q,
        k: torch.Tensor = k,
        v: torch.Tensor = v,
        mask: BlockMask = mask,
        **options: object,
    ) -> None:
        with pytest.raises(ValueError, match=match):
            block_sparse_attention(q, k, v, mask, **options)  # type: ignore[arg-type]

    refused("backend='fast' does not exist; choose from triton, gather, flex, reference", backend="fast")
    refused("head_dim 257 is above 256", *draw(0, 1, 1, 1, 40, 50, 257, torch.float32), backend="triton")
    refused("no kernel for torch.float64", q.double(), k.double(), v.double(), backend="triton")
    refused("interpreter multiplies bfloat16 wrongly", q.bfloat16(), k.bfloat16(), v.bfloat16(), backend="triton")
    refused("powers of two from 16 on", mask=BlockMask.dense(40, 50, 24), backend="triton")
    refused("no log-sum-exp on a CPU", backend="flex", return_lse=True)
    refused("gives no gradient", q.clone().requires_grad_(), backend="gather")
    refused("keys of head_dim 16 with values of head_dim 8", v=v[..., :8], backend="gather")
    refused("for 40 queries and 48 keys; got 40 and 50", mask=BlockMask.dense(40, 48, 16))
    refused(
        "mask has 3 heads and its rule 1; it needs 1, 2 or 4", mask=random_mask(0, 1, 3, 40, 50, (16, 16), 1.0, None)
    )
    refused("mask has 2 batch rows; it needs 1", mask=random_mask(0, 2, 1, 40, 50, (16, 16), 1.0, None))
    refused("mask is on meta, the query on cpu", mask=mask.to("meta"))
    refused("one dtype and one device", q.half())
    refused(r"must be \(B, H, S, D\)", q[0])
    refused("multiple of key/value heads", q[:, :3])
    refused("do not fit together", v=v[:, :, :3])


@pytest.mark.interpreted
def test_triton_missing_or_without_a_device(monkeypatch: pytest.MonkeyPatch) -> None:
    q, k, v = draw(17, 1, 1, 1, 16, 16, 16, torch.float32)
    mask = BlockMask.dense(16, 16, 16)
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "runs on a CUDA device, and the tensors are on cpu" in (refusal("triton", q, k, v, mask) or "")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert refusal("triton", q, k, v, mask) == "triton is not installed: pip install triton"
    assert backend_for(q, k, v, mask) == "gather"


@pytest.mark.parametrize("backend", ["gather"])
def test_two_threads(backend: str) -> None:
    from concurrent.futures import ThreadPoolExecutor

    q, k, v = draw(18, 1, 2, 2, 200, 200, 16, torch.float32)
    masks = [random_mask(seed, 1, 2, 200, 200, (16, 16), 0.4, "box") for seed in range(8)]
    alone = [block_sparse_attention(q, k, v, mask, backend=backend) for mask in masks]
    with ThreadPoolExecutor(2) as pool:
        together = list(pool.map(lambda mask: block_sparse_attention(q, k, v, mask, backend=backend), masks))
    assert all(torch.equal(a, b) for a, b in zip(alone, together, strict=True))
