"""`partial` and `merge` against fp64 softmax, over odd shapes, grouped heads, masks and every backend."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

from steer_kernels import merge, partial
from steer_kernels.partial import reference


def draw(seed: int, b: int, h: int, kv: int, s: int, n: int, d: int, dtype: torch.dtype) -> tuple[torch.Tensor, ...]:
    g = torch.Generator().manual_seed(seed)
    q = torch.randn(b, h, s, d, generator=g, dtype=torch.float64)
    k, v = (torch.randn(b, kv, n, d, generator=g, dtype=torch.float64) for _ in range(2))
    return q.to(dtype), k.to(dtype), v.to(dtype)


def dense(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An independent formulation in fp64, one head at a time."""
    q, k, v = q.double(), k.double(), v.double()
    groups = q.shape[1] // k.shape[1]
    out, lse = (
        torch.empty(*q.shape[:3], v.shape[-1], dtype=torch.float64),
        torch.empty(q.shape[:3], dtype=torch.float64),
    )
    for b in range(q.shape[0]):
        for h in range(q.shape[1]):
            exp = torch.exp(scale * q[b, h] @ k[b, h // groups].T)
            out[b, h] = (exp / exp.sum(-1, keepdim=True)) @ v[b, h // groups]
            lse[b, h] = exp.sum(-1).log()
    return out, lse


shapes = st.tuples(
    st.integers(1, 2), st.sampled_from([(1, 1), (2, 2), (4, 2), (6, 1)]), st.integers(1, 37), st.integers(1, 41),
    st.sampled_from([8, 16, 40]), st.integers(0, 99),
)  # fmt: skip


@pytest.mark.parametrize("backend", ["flash", "reference"])
@settings(max_examples=25, deadline=None)
@given(shape=shapes)
def test_equals_dense_softmax(backend: str, shape: tuple) -> None:
    b, (h, kv), s, n, d, seed = shape
    q, k, v = draw(seed, b, h, kv, s, n, d, torch.float64)
    out, lse = partial(q, k, v, scale=0.3, backend=backend)
    expected_out, expected_lse = dense(q, k, v, 0.3)
    assert torch.allclose(out, expected_out, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("backend", ["flash", "reference"])
def test_error_within_low_precision_eager(backend: str, dtype: torch.dtype) -> None:
    """The tolerance is the error of plain torch attention in the same precision, both measured against fp64."""
    q, k, v = draw(0, 2, 4, 4, 65, 77, 64, dtype)
    truth, _ = dense(q, k, v, 64**-0.5)
    eager = torch.softmax((q @ k.transpose(-1, -2)) * 64**-0.5, -1) @ v
    out, _ = partial(q, k, v, backend=backend)
    assert (out.double() - truth).norm() <= 1.05 * (eager.double() - truth).norm()


@settings(max_examples=25, deadline=None)
@given(shape=shapes, cut=st.floats(0.1, 0.9))
def test_merge_of_disjoint_parts_is_the_whole(shape: tuple, cut: float) -> None:
    b, (h, kv), s, n, d, seed = shape
    q, k, v = draw(seed, b, h, kv, s, n + 2, d, torch.float64)
    middle = 1 + int(cut * n)
    whole, whole_lse = partial(q, k, v)
    parts = [partial(q, k[:, :, part], v[:, :, part]) for part in (slice(0, middle), slice(middle, None))]
    out, lse = merge(parts)
    assert torch.allclose(out, whole, atol=1e-12)
    assert torch.allclose(lse, whole_lse, atol=1e-12)


def test_permuted_keys_give_the_same() -> None:
    q, k, v = draw(1, 1, 2, 2, 9, 23, 16, torch.float64)
    order = torch.randperm(23, generator=torch.Generator().manual_seed(2))
    out, lse = partial(q, k, v)
    permuted, permuted_lse = partial(q, k[:, :, order], v[:, :, order])
    assert torch.allclose(out, permuted, atol=1e-12) and torch.allclose(lse, permuted_lse, atol=1e-12)


def test_masks() -> None:
    """Boolean and additive masks agree with torch's own attention; a query that sees nothing gives 0 and -inf."""
    q, k, v = draw(3, 2, 2, 2, 7, 11, 16, torch.float64)
    keep = torch.rand(2, 1, 7, 11, generator=torch.Generator().manual_seed(4)) > 0.4
    keep[0, :, 3] = False
    out, lse = partial(q, k, v, mask=keep)
    assert (out[0, :, 3] == 0).all() and (lse[0, :, 3] == -torch.inf).all()
    seen = keep.any(-1).expand(2, 2, 7)
    assert torch.allclose(out[seen], F.scaled_dot_product_attention(q, k, v, attn_mask=keep)[seen], atol=1e-12)
    additive = torch.zeros(keep.shape, dtype=torch.float64).masked_fill(~keep, -torch.inf)
    assert torch.allclose(partial(q, k, v, mask=additive)[0], out, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_fused_masks_equal_the_reference(dtype: torch.dtype) -> None:
    """Every shape and dtype of a mask; torch's own kernel takes those of the query's dtype only."""
    q, k, v = draw(9, 2, 4, 2, 70, 600, 16, dtype)
    keep = torch.rand(2, 4, 70, 600, generator=torch.Generator().manual_seed(1)) > 0.5
    keep[:, :, 3] = False
    keep[:, :, 4, :550] = False  # nothing in the first tiles of the kernel
    for mask in (keep, keep[:, :1], keep[:1, :1, 5:6], keep[0, 0], keep[0, 0, 5], keep[..., 7:8]):
        for form in (mask, torch.zeros(mask.shape).masked_fill(~mask, -torch.inf)):
            out, lse = partial(q, k, v, mask=form, scale=0.3, backend="flash")
            exact, exact_lse = reference.partial(q.double(), k.double(), v.double(), mask=form, scale=0.3)
            eager, eager_lse = reference.partial(q, k, v, mask=form, scale=0.3)
            seen = exact_lse > -torch.inf
            assert torch.equal(lse == -torch.inf, ~seen) and (out[~seen] == 0).all()
            assert (out - exact).norm() <= 1.1 * (eager - exact).norm() + 1e-12
            error = (lse - exact_lse)[seen].norm()
            assert error <= 1.1 * (eager_lse - exact_lse)[seen].norm() + 1e-5


@pytest.mark.parametrize("backend", ["flash", "reference"])
@settings(max_examples=40, deadline=None)
@given(shape=shapes)
def test_causal_is_aligned_to_the_last_key(backend: str, shape: tuple) -> None:
    """More keys than queries (a cache), as many, or fewer: the last query sees all, the first may see none."""
    b, (h, kv), s, n, d, seed = shape
    q, k, v = draw(seed, b, h, kv, s, n, d, torch.float64)
    keep = torch.ones(s, n, dtype=torch.bool).tril(n - s)
    out, lse = partial(q, k, v, is_causal=True, backend=backend)
    expected, expected_lse = reference.partial(q, k, v, mask=keep)
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)


def test_values_of_another_width_take_the_reference() -> None:
    q, k, v = draw(10, 1, 2, 2, 5, 6, 16, torch.float32)
    out, _ = partial(q, k, v[..., :8])
    assert torch.allclose(out, partial(q, k, v)[0][..., :8], atol=1e-6)
    with pytest.raises(ValueError, match="values as wide as the keys"):
        partial(q, k, v[..., :8], backend="flash")


def test_merge_with_an_empty_part() -> None:
    q, k, v = draw(5, 1, 2, 2, 5, 8, 16, torch.float64)
    nothing = torch.zeros(1, 1, 5, 8, dtype=torch.bool)
    whole, empty = partial(q, k, v), reference.partial(q, k, v, mask=nothing)
    out, lse = merge([whole, empty])
    assert torch.allclose(out, whole[0], atol=1e-12) and torch.allclose(lse, whole[1], atol=1e-12)
    out, lse = merge([empty, empty])
    assert (out == 0).all() and (lse == -torch.inf).all()


def test_traces() -> None:
    q, k, v = draw(6, 1, 2, 2, 9, 13, 16, torch.float32)
    mask = torch.ones(9, 13, dtype=torch.bool).tril()
    for options in ({}, {"is_causal": True}, {"mask": mask}):
        torch._dynamo.reset()
        compiled = torch.compile(partial, fullgraph=True, backend="aot_eager")
        for a, b in zip(compiled(q, k, v, **options), partial(q, k, v, **options), strict=True):
            assert torch.allclose(a, b, atol=1e-6)


def test_gradient_of_output_and_lse() -> None:
    q, k, v = (t.requires_grad_() for t in draw(7, 1, 1, 1, 3, 4, 8, torch.float64))
    assert torch.autograd.gradcheck(lambda q, k, v: partial(q, k, v), (q, k, v))


@pytest.mark.parametrize("trained", range(3))
def test_gradient_of_one_input_alone(trained: int) -> None:
    """As where only some projections are trained."""
    inputs = list(draw(6, 1, 4, 2, 5, 7, 8, torch.float64))
    inputs[trained].requires_grad_()
    gradients = []
    for backend in (None, "reference"):
        out, lse = partial(*inputs, backend=backend)
        gradients += torch.autograd.grad(out.sum() + lse.square().sum(), inputs[trained])
    assert torch.equal(*gradients)


@pytest.mark.parametrize("causal", [False, True])
def test_channels_that_are_not_neighbours(causal: bool) -> None:
    wanted = reference.partial(*draw(7, 2, 4, 2, 9, 12, 8, torch.float64), is_causal=causal)
    for which in range(3):
        inputs = list(draw(7, 2, 4, 2, 9, 12, 8, torch.float64))
        inputs[which] = inputs[which].mT.contiguous().mT
        for part, want in zip(partial(*inputs, is_causal=causal), wanted, strict=True):
            assert torch.allclose(part, want, atol=1e-12)


@pytest.mark.parametrize("queries, keys", [(0, 5), (5, 0), (0, 0)])
@pytest.mark.parametrize("causal", [False, True])
def test_nothing_to_attend(queries: int, keys: int, causal: bool) -> None:
    """Some empty tensors end the process in torch's kernels."""
    query, key = torch.ones(2, 4, queries, 8), torch.ones(2, 2, keys, 8)
    out, lse = partial(query, key, key, is_causal=causal)
    assert torch.equal(out, torch.zeros(2, 4, queries, 8))
    assert torch.equal(lse, torch.full((2, 4, queries), -torch.inf))
    with pytest.raises(ValueError, match="it takes no empty tensors"):
        partial(query, key, key, backend="flash")


def test_errors_name_the_shapes_and_the_choices() -> None:
    q, k, v = draw(8, 1, 3, 2, 4, 5, 8, torch.float32)
    with pytest.raises(ValueError, match="multiple of key/value heads"):
        partial(q, k, v)
    with pytest.raises(ValueError, match=r"must be \(B, H, S, D\)"):
        partial(q[0], k, v)
    with pytest.raises(ValueError, match="choose from flash, reference"):
        partial(k, k, v, backend="fast")
    with pytest.raises(ValueError, match=r"broadcastable to \(B, H, S, G\) = \(1, 2, 5, 5\); got \(4, 5\)"):
        partial(k, k, v, mask=torch.ones(4, 5, dtype=torch.bool))
    with pytest.raises(ValueError, match="either a mask or is_causal"):
        partial(k, k, v, mask=torch.ones(5, 5, dtype=torch.bool), is_causal=True)
    with pytest.raises(ValueError, match="gives no gradient"):
        partial(k.requires_grad_(), k, v, backend="flash")
    with pytest.raises(ValueError, match="at least one part"):
        merge([])


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("lengths", [(130, 130), (65, 200), (200, 65)])
def test_cuda_kernels_equal_the_reference(lengths: tuple[int, int], dtype: torch.dtype) -> None:
    q, k, v = (t.cuda() for t in draw(11, 2, 4, 2, *lengths, 64, dtype))
    keep = torch.rand(2, 1, *lengths, generator=torch.Generator().manual_seed(2)).cuda() > 0.3
    keep[:, :, 3] = False
    for options in ({}, {"is_causal": True}, {"mask": keep}):
        out, lse = partial(q, k, v, backend="flash", **options)
        exact, exact_lse = reference.partial(q.double(), k.double(), v.double(), **options)
        eager, _ = reference.partial(q, k, v, **options)
        seen = exact_lse > -torch.inf
        assert (out[seen] - exact[seen]).norm() <= 1.5 * (eager[seen] - exact[seen]).norm()
        assert torch.equal(lse == -torch.inf, ~seen)
        assert torch.allclose(lse[seen].double(), exact_lse[seen], atol=1e-4)
