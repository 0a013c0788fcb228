"""`grouped_attention` against explicitly edited attention maps: sink damping, three-group redistribution, regions."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from masked import draw
from test_block_mask import random_rule
from torch.utils._python_dispatch import TorchDispatchMode

from steer_kernels import BlockMask, grouped_attention
from steer_kernels.block_sparse import gather
from steer_kernels.grouped.api import _group_masks

BACKENDS = ["gather", "reference"]


def softmax_map(q: torch.Tensor, k: torch.Tensor, causal: bool) -> torch.Tensor:
    """The attention map (B, H, S_q, S_k) in fp64, at scale 0.5."""
    k = k.repeat_interleave(q.shape[1] // k.shape[1], 1)
    scores = 0.5 * q @ k.mT
    if causal:
        hidden = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + k.shape[2] - q.shape[2])
        scores = scores.masked_fill(hidden, -torch.inf)
    return torch.softmax(scores, -1)


def damped(mass: torch.Tensor, beta: float = 0.4) -> torch.Tensor:
    sinks = beta * mass[..., :1]
    return torch.cat([sinks, torch.where(mass[..., 1:] > 0, 1 - sinks, 0)], -1)


@pytest.mark.parametrize("backend", BACKENDS)
@settings(max_examples=20)
@given(seed=st.integers(0, 99), heads=st.sampled_from([(2, 2), (4, 2)]), length=st.integers(2, 300))
def test_sink_damping_per_head(backend: str, seed: int, heads: tuple[int, int], length: int) -> None:
    """ACT: sinks keep beta of their mass, P' = P (1 + (1 - beta) m / r) elsewhere; every head has its own sinks."""
    q, k, v = draw(seed, 2, *heads, length, length, 8, torch.float64)
    g = torch.Generator().manual_seed(seed)
    sink = torch.rand(2, heads[0], length, generator=g) < 0.05
    sink[..., 0] = False
    p = softmax_map(q, k, causal=True)
    m = (p * sink[:, :, None]).sum(-1, keepdim=True)
    r = (p * ~sink[:, :, None]).sum(-1, keepdim=True)
    edited = torch.where(sink[:, :, None], 0.4 * p, p * (1 + 0.6 * m / r))
    assert torch.allclose(edited.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-12)
    expected = edited @ v.repeat_interleave(heads[0] // heads[1], 1)
    groups = torch.where(sink, 0, 1)
    out = grouped_attention(q, k, v, groups, damped, count=2, scale=0.5, is_causal=True, backend=backend)
    assert torch.allclose(out, expected, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("queries", [1, 40])
def test_visual_redistribution_in_selected_heads(backend: str, queries: int) -> None:
    """VAR: the budget of the sinks goes to the other image tokens, in (head, query) pairs that look at the image."""
    q, k, v = draw(1, 2, 4, 2, queries, 210, 16, torch.float64)
    image = torch.zeros(2, 210, dtype=torch.bool)
    image[0, 20:170], image[1, 5:101] = True, True
    sink = torch.zeros(2, 210, dtype=torch.bool)
    sink[:, [0, 33, 90]] = True
    groups = torch.where(sink, 0, torch.where(image, 1, 2))
    keep, least, share = 0.6, 0.3, 0.5

    def redistribute(mass: torch.Tensor) -> torch.Tensor:
        sinks, seen, rest = mass.unbind(-1)
        moved = torch.stack([keep * sinks, seen + (1 - keep) * sinks, rest], -1)
        return torch.where(looks(seen, mass)[..., None], moved, mass)

    def looks(seen: torch.Tensor, mass: torch.Tensor) -> torch.Tensor:
        return (seen >= least) & (seen / (seen + mass[..., 0]) >= share)

    p = softmax_map(q, k, causal=True)
    z, n = (groups == 0)[:, None, None], (groups == 1)[:, None, None]
    budget = (1 - keep) * (p * z).sum(-1, keepdim=True)
    seen = (p * n).sum(-1, keepdim=True)
    moved = torch.where(z, keep * p, torch.where(n, p * (1 + budget / seen), p))
    selected = looks(seen[..., 0], torch.stack([(p * z).sum(-1)], -1))
    assert 0 < selected.double().mean() < 1
    edited = torch.where(selected[..., None], moved, p)
    out, mass = grouped_attention(
        q, k, v, groups, redistribute, scale=0.5, is_causal=True, return_mass=True, backend=backend
    )
    assert torch.allclose(out, edited @ v.repeat_interleave(2, 1), atol=1e-12)
    assert torch.allclose(mass.sum(-1), torch.ones((), dtype=torch.float64), atol=1e-12)


@pytest.mark.parametrize("renormalise", [False, True])
@pytest.mark.parametrize("backend", BACKENDS)
def test_masked_region_factors(backend: str, renormalise: bool) -> None:
    """Factors f[region of the query, region of the key] on the map, and with renormalised rows."""
    q, k, v = draw(2, 1, 2, 2, 150, 150, 16, torch.float64)
    region = torch.randint(0, 3, (150,), generator=torch.Generator().manual_seed(0))
    factor = torch.tensor([[1.0, 0.0, 2.0], [0.5, 1.0, 1.0], [3.0, 1.0, 0.2]], dtype=torch.float64)

    def reweight(mass: torch.Tensor) -> torch.Tensor:
        new = mass * factor[region]
        return new / new.sum(-1, keepdim=True) if renormalise else new

    edited = softmax_map(q, k, causal=False) * factor[region][:, region]
    edited = edited / edited.sum(-1, keepdim=True) if renormalise else edited
    out = grouped_attention(q, k, v, region, reweight, scale=0.5, backend=backend)
    assert torch.allclose(out, edited @ v, atol=1e-12)


@pytest.mark.parametrize("backend", BACKENDS)
def test_dropped_keys_and_a_sparse_base(backend: str) -> None:
    q, k, v = draw(3, 1, 2, 2, 64, 80, 16, torch.float64)
    groups = torch.randint(-1, 3, (80,), generator=torch.Generator().manual_seed(1))  # of two groups: -1 and 2 are none
    base = BlockMask.from_bool(torch.rand(1, 2, 4, 5, generator=torch.Generator().manual_seed(2)) < 0.6, 16)
    scores = (0.5 * q @ k.mT).masked_fill(~base.to_tokens() | (groups < 0) | (groups > 1), -torch.inf)
    p = torch.softmax(scores, -1).nan_to_num(0.0)
    expected = (p * torch.where(groups == 0, 0.5, 1.0)) @ v
    weights = torch.tensor([0.5, 1.0], dtype=torch.float64)
    out = grouped_attention(
        q, k, v, groups, lambda m: m * weights, count=2, scale=0.5, block_mask=base, backend=backend
    )
    assert torch.allclose(out, expected, atol=1e-12)


def test_identity_is_plain_attention() -> None:
    q, k, v = draw(4, 1, 2, 1, 100, 140, 16, torch.float32)
    groups = (torch.arange(140) % 7 == 0).long()
    plain = torch.nn.functional.scaled_dot_product_attention(q, k, v, scale=0.5, enable_gqa=True)
    assert torch.allclose(grouped_attention(q, k, v, groups, lambda m: m, scale=0.5), plain, atol=1e-6)


def test_traces() -> None:
    q, k, v = draw(7, 1, 2, 2, 40, 40, 16, torch.float32)
    groups = (torch.arange(40) % 5 > 0).long()

    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        return grouped_attention(q, k, v, groups, damped, count=2, is_causal=True)

    torch._dynamo.reset()
    compiled = torch.compile(attend, fullgraph=True, backend="aot_eager")(q, k, v)
    assert torch.allclose(compiled, attend(q, k, v), atol=1e-6)


@pytest.mark.interpreted
def test_triton_agrees() -> None:
    q, k, v = draw(4, 1, 2, 1, 100, 140, 16, torch.float32)
    groups = (torch.arange(140) % 7 == 0).long()
    fast, slow = (grouped_attention(q, k, v, groups, damped, scale=0.5, backend=b) for b in ("triton", "reference"))
    assert torch.allclose(fast, slow, atol=1e-5)


class LargestTensor(TorchDispatchMode):
    """Remembers the bytes of the largest tensor that any operation returned."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, (tuple, list)) else [out]:
            if isinstance(t, torch.Tensor):
                self.bytes = max(self.bytes, t.untyped_storage().nbytes())
        return out


def test_no_map_is_made() -> None:
    """At 8,192 tokens nothing as large as a tenth of one head's map is allocated."""
    q, k, v = draw(5, 1, 1, 1, 8192, 8192, 16, torch.float32)
    groups = torch.ones(1, 1, 8192, dtype=torch.long)
    groups[..., [5, 900, 4000]] = 0
    with LargestTensor() as largest:
        for mask in _group_masks(BlockMask.dense(8192, 8192).with_causal(), groups, 2):
            gather.forward(q, k, v, mask, 0.25)
    assert 2**20 < largest.bytes < 8192 * 8192 * 4 / 10


def test_errors() -> None:
    q, k, v = draw(6, 1, 2, 2, 20, 30, 8, torch.float32)
    with pytest.raises(ValueError, match=r"groups must be integers \(30,\), \(B, 30\) or \(B, H, 30\)"):
        grouped_attention(q, k, v, torch.zeros(29, dtype=torch.long), lambda m: m)
    with pytest.raises(ValueError, match=r"got torch\.float32"):
        grouped_attention(q, k, v, torch.zeros(30), lambda m: m)
    with pytest.raises(ValueError, match="reweight must keep the shape"):
        grouped_attention(q, k, v, torch.arange(30) % 2, lambda m: m[..., :1])
    ruled = BlockMask.from_bool(
        torch.ones(1, 1, 1, 1, dtype=torch.bool),
        32,
        q_len=20,
        kv_len=30,
        rule=random_rule(20, 30),
        partial=torch.tensor(True),
    )
    with pytest.raises(ValueError, match="block_mask has a token rule"):
        grouped_attention(q, k, v, torch.zeros(30, dtype=torch.long), lambda m: m, block_mask=ruled)
