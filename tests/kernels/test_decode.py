"""`gathered_decode` against fp64 softmax over the listed tokens, and the scores that choose the pages."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st

import steer_kernels.decode.api as api
from steer_kernels.decode import PageSummary, gathered_decode, page_scores, page_summary, refusal, select_pages
from steer_kernels.partial import merge

pytest.importorskip("triton")
from steer_kernels.decode import triton as kernels

pytestmark = pytest.mark.interpreted

Call = tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]

shapes = st.fixed_dictionaries(
    {
        "batch": st.integers(1, 2),
        "heads": st.sampled_from([(1, 1), (2, 2), (4, 2), (4, 1), (8, 2)]),
        "queries": st.integers(1, 3),
        "tokens": st.integers(1, 83),
        "page_size": st.sampled_from([1, 3, 8, 16]),
        "lists": st.sampled_from(["all", "group", "head"]),
        "width": st.sampled_from([8, 16, 40]),
        "seed": st.integers(0, 99),
    }
)


@pytest.fixture
def poisoned(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """New memory holds NaN, so that what a kernel forgets to write shows."""
    for name in ("empty", "empty_like"):
        plain = getattr(torch, name)
        monkeypatch.setattr(torch, name, lambda *a, plain=plain, **kw: plain(*a, **kw).fill_(torch.nan))
    yield


def place(backend: str, *tensors: torch.Tensor | None) -> list[torch.Tensor | None]:
    """Triton's interpreter is only on where there is no CUDA device."""
    device = "cuda" if backend == "triton" and torch.cuda.is_available() else "cpu"
    return [None if t is None else t.to(device) for t in tensors]


def decode(
    *call: torch.Tensor, backend: str, lengths: torch.Tensor | None = None, page_size: int, scale: float | None = None
) -> tuple[torch.Tensor, torch.Tensor]:
    *call, lengths = place(backend, *call, lengths)
    found = gathered_decode(*call, page_size=page_size, lengths=lengths, scale=scale, return_lse=True, backend=backend)
    return found[0].cpu(), found[1].cpu()


def draw(shape: dict, dtype: torch.dtype = torch.float64) -> Call:
    """Query, key, value, pages and lengths. Lists hold unused slots, some are empty, and unused tokens are NaN."""
    g = torch.Generator().manual_seed(shape["seed"])
    batch, (heads, kv), tokens = shape["batch"], shape["heads"], shape["tokens"]
    query = torch.randn(batch, heads, shape["queries"], shape["width"], generator=g, dtype=torch.float64)
    key, value = (torch.randn(batch, kv, tokens, shape["width"], generator=g, dtype=torch.float64) for _ in range(2))
    lengths = torch.randint(0, tokens + 1, (batch,), generator=g)
    lengths[0] = tokens
    for b, length in enumerate(lengths.tolist()):
        key[b, :, length:] = value[b, :, length:] = torch.nan
    count = -(-tokens // shape["page_size"])
    lists = {"all": 1, "group": kv, "head": heads}[shape["lists"]]
    slots = int(torch.randint(1, count + 2, (), generator=g))
    order = torch.rand(batch, lists, max(count, slots), generator=g).argsort(-1)[..., :slots]
    keep = (torch.rand(order.shape, generator=g) < 0.8) & (order < count)
    return query.to(dtype), key.to(dtype), value.to(dtype), torch.where(keep, order, -1), lengths


def token_mask(call: Call, page_size: int) -> torch.Tensor:
    """Boolean (B, H, T), one token at a time."""
    query, key, _, pages, lengths = call
    mask = torch.zeros(*query.shape[:2], key.shape[2], dtype=torch.bool)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            listed = set(pages[b, h * pages.shape[1] // mask.shape[1]].tolist())
            for t in range(int(lengths[b])):
                mask[b, h, t] = t // page_size in listed
    return mask


def dense(call: Call, page_size: int, scale: float) -> tuple[torch.Tensor, torch.Tensor]:
    """An independent formulation in fp64, one head at a time."""
    query, key, value, *_ = (t.double() for t in call[:3])
    out, lse = torch.zeros_like(query), torch.full(query.shape[:3], -torch.inf, dtype=torch.float64)
    mask = token_mask(call, page_size)
    for b in range(mask.shape[0]):
        for h in range(mask.shape[1]):
            seen, kv = mask[b, h], h * key.shape[1] // mask.shape[1]
            if seen.any():
                exp = torch.exp(scale * query[b, h] @ key[b, kv, seen].T)
                out[b, h] = (exp / exp.sum(-1, keepdim=True)) @ value[b, kv, seen]
                lse[b, h] = exp.sum(-1).log()
    return out, lse


def eager(call: Call, page_size: int) -> torch.Tensor:
    """Plain torch attention in the precision of the inputs."""
    query, key, value = (t.nan_to_num() for t in call[:3])
    rows = query.unflatten(1, (key.shape[1], -1)).flatten(2, 3)
    mask = token_mask(call, page_size)[:, :, None].expand(-1, -1, query.shape[2], -1)
    scores = rows @ key.mT * query.shape[-1] ** -0.5
    weights = torch.softmax(scores.masked_fill(~mask.reshape(scores.shape), -torch.inf), -1)
    return (weights.nan_to_num() @ value).view(query.shape)


@pytest.mark.parametrize("backend", ["gather", "reference"])
@settings(max_examples=60)
@given(shape=shapes)
def test_equals_dense_softmax_over_the_listed_tokens(backend: str, shape: dict) -> None:
    *call, lengths = drawn = draw(shape)
    size = shape["page_size"]
    out, lse = decode(*call, page_size=size, lengths=lengths, scale=0.3, backend=backend)
    expected, expected_lse = dense(drawn, size, 0.3)
    assert out.dtype == lse.dtype == torch.float64
    assert torch.allclose(out, expected, atol=1e-12)
    assert torch.allclose(lse, expected_lse, atol=1e-12)


def errors(shape: dict, backend: str, dtype: torch.dtype) -> tuple[float, float, float]:
    """Of this backend and of plain torch attention in the same precision against fp64, and the norm of the latter."""
    *call, lengths = drawn = draw(shape, dtype)
    size = shape["page_size"]
    out, lse = decode(*call, page_size=size, lengths=lengths, backend=backend)
    truth, truth_lse = dense(drawn, size, shape["width"] ** -0.5)
    assert out.dtype == dtype and lse.dtype == torch.float32
    assert ((lse == -torch.inf) == (truth_lse == -torch.inf)).all()
    exact = backend != "reference" or dtype == torch.float32  # the reference rounds the products to `dtype`
    assert torch.allclose(lse.double(), truth_lse, atol=1e-5 if exact else 2e-2)
    found, plain = ((o.double() - truth).norm().item() for o in (out, eager(drawn, size)))
    return found, plain, truth.norm().item()


ON_CPU = [
    (backend, dtype)
    for backend in ("triton", "gather", "reference")
    for dtype in (torch.float32, torch.float16, torch.bfloat16)
    if (backend, dtype) != ("triton", torch.bfloat16)  # wrong in the interpreter; see test_decode_gpu.py
]


@pytest.mark.parametrize("backend, dtype", ON_CPU)
@settings(max_examples=12)
@given(shape=shapes)
def test_low_precision(backend: str, dtype: torch.dtype, shape: dict) -> None:
    """Over odd shapes; over a handful of tokens eager is nearly exact by chance, so one rounding is allowed for.

    In float32 that is one of the scores, on which everything rests: a score of 4, as they occur here, that is off by
    half a unit in the last place on both sides changes its weight by 4 eps. In 16 bits it is one of the output, as
    the kernels keep scores in float32.
    """
    found, plain, size = errors(shape, backend, dtype)
    assert found <= 1.5 * plain + (4 if dtype == torch.float32 else 0.5) * torch.finfo(dtype).eps * size


@pytest.mark.parametrize("backend, dtype", ON_CPU)
@pytest.mark.parametrize(
    "shape",
    [
        dict(batch=1, heads=(4, 1), queries=2, tokens=401, page_size=16, lists="group", width=64, seed=0),
        dict(batch=2, heads=(8, 2), queries=1, tokens=999, page_size=33, lists="head", width=128, seed=1),
    ],
    ids=["group", "head"],
)
def test_error_within_eager(backend: str, dtype: torch.dtype, shape: dict) -> None:
    """The tolerance is the error of plain torch attention in the same precision, both measured against fp64.

    In float32 there is no rounding but that of sums, whose order differs from one matrix shape to the next.
    """
    found, plain, _ = errors(shape, backend, dtype)
    assert found <= (1.5 if dtype == torch.float32 else 1.05) * plain


@pytest.mark.parametrize("backend", ["triton", "gather"])
@pytest.mark.parametrize("tokens", [45, 700])
def test_every_element_is_written(backend: str, tokens: int, poisoned: None) -> None:
    """Lists without a token give 0 and -inf, in one part and in several, into memory that held NaN."""
    g = torch.Generator().manual_seed(0)
    query, key = torch.randn(1, 2, 2, 40, generator=g), torch.randn(1, 2, tokens, 40, generator=g)
    pages = torch.stack([torch.full((tokens // 16,), -1), torch.arange(tokens // 16)])[None]
    out, lse = decode(query, key, key, pages, page_size=16, backend=backend)
    assert (out[:, 0] == 0).all() and (lse[:, 0] == -torch.inf).all()
    assert out[:, 1].isfinite().all() and lse[:, 1].isfinite().all()
    for empty, lengths in ((pages[..., :0], None), (pages, torch.zeros(1, dtype=torch.int32))):
        out, lse = decode(query, key, key, empty, page_size=16, lengths=lengths, backend=backend)
        assert (out == 0).all() and (lse == -torch.inf).all()


def test_triton_takes_several_parts() -> None:
    """The split is by shape alone, covers every tile, and leaves no part empty."""
    device = torch.device("cpu")  # counted as four processors
    for programs in (1, 3, 8, 40):
        for tiles in (0, 1, 5, 8, 64, 1000):
            parts, each = kernels.split(programs, tiles, device)
            assert parts * each >= tiles > (parts - 1) * each or (tiles == 0 and parts == 1)
            assert parts <= max(1, -(-8 // programs))
    assert kernels.split(1, 64, device) == (8, 8)


@pytest.mark.parametrize("backend", ["triton", "gather", "reference"])
def test_all_pages_is_dense_attention(backend: str) -> None:
    """And the order of the pages, their integer type and the layout of the cache do not matter."""
    g = torch.Generator().manual_seed(3)
    query, cache = torch.randn(2, 4, 2, 32, generator=g), torch.randn(2, 2, 93, 2, 32, generator=g)
    key, value = cache[0].transpose(1, 2), cache[1].transpose(1, 2)
    expected = F.scaled_dot_product_attention(query, key, value, enable_gqa=True)
    for order in (torch.arange(6), torch.randperm(6, generator=g), torch.randperm(6, generator=g).int()):
        out, _ = decode(query, key, value, order.expand(2, 1, 6), page_size=16, backend=backend)
        assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "gather", "reference"])
def test_merge_of_disjoint_lists_is_the_whole(backend: str) -> None:
    shape = dict(batch=2, heads=(4, 2), queries=2, tokens=77, page_size=8, lists="group", width=16, seed=5)
    query, key, value, _, lengths = draw(shape, torch.float32)
    pages = torch.rand(2, 2, 10, generator=torch.Generator().manual_seed(6)).argsort(-1)

    whole, first, second = (
        decode(query, key, value, some, page_size=8, lengths=lengths, backend=backend)
        for some in (pages, pages[..., :3], pages[..., 3:])
    )
    for found, expected in zip(merge([first, second]), whole, strict=True):
        assert torch.allclose(found, expected, atol=1e-5)


def test_pages_that_are_not_listed_may_hold_anything() -> None:
    g = torch.Generator().manual_seed(7)
    query, key = torch.randn(1, 2, 1, 16, generator=g), torch.randn(1, 1, 64, 16, generator=g)
    pages = torch.tensor([[[3, -1, 0]]])
    expected = gathered_decode(query, key, key, pages, page_size=16, backend="reference")
    key[:, :, 16:48] = torch.nan
    for backend in ("triton", "gather", "reference"):
        out, _ = decode(query, key, key, pages, page_size=16, backend=backend)
        assert torch.allclose(out, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "gather", "reference"])
def test_traces(backend: str) -> None:
    """From the summary to the output in one graph, and one op for the attention."""
    g = torch.Generator().manual_seed(8)
    query, key = torch.randn(2, 4, 1, 16, generator=g), torch.randn(2, 2, 75, 16, generator=g)
    inputs = place(backend, query, key, torch.tensor([75, 30]))

    def step(query: torch.Tensor, key: torch.Tensor, lengths: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        summary = page_summary(key, 8, lengths=lengths, kind="minmax").append(key, 1, lengths=lengths)
        pages = select_pages(page_scores(query, summary), 4, page_size=8, lengths=lengths)
        return gathered_decode(query, key, key, pages, page_size=8, lengths=lengths, return_lse=True, backend=backend)

    torch._dynamo.reset()
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")
    for found, expected in zip(compiled(*inputs), step(*inputs), strict=True):
        assert torch.allclose(found, expected, atol=1e-6)


@pytest.mark.parametrize("backend", ["triton", "gather"])
def test_op_is_registered_correctly(backend: str) -> None:
    shape = dict(batch=2, heads=(4, 2), queries=2, tokens=30, page_size=8, lists="group", width=16, seed=9)
    query, key, value, pages, lengths = place(backend, *draw(shape, torch.float32))
    args = (query, key.nan_to_num(), value.nan_to_num(), pages, 8, lengths, 0.25, backend)
    tests = ("test_schema", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(torch.ops.steer_kernels.gathered_decode.default, args, test_utils=tests)


def test_backend_choice_and_refusals(monkeypatch: pytest.MonkeyPatch) -> None:
    """An explicit backend never falls back; the reason names what is wrong."""
    monkeypatch.setattr(api, "_INTERPRET", True)
    query, key, pages = torch.randn(1, 4, 1, 16), torch.randn(1, 2, 40, 16), torch.zeros(1, 2, 1, dtype=torch.int64)

    def reason(backend: str, query: torch.Tensor = query, key: torch.Tensor = key) -> str:
        with pytest.raises(ValueError, match=f'backend="{backend}" cannot serve this call') as raised:
            gathered_decode(query, key, key, pages, page_size=8, backend=backend)
        assert refusal(backend, query, key, key, pages) in str(raised.value)
        return str(raised.value)

    assert "no kernel for torch.float64" in reason("triton", query.double(), key.double())
    assert "interpreter multiplies bfloat16" in reason("triton", query.bfloat16(), key.bfloat16())
    assert "head dimension 512 is over 256" in reason("triton", torch.randn(1, 4, 1, 512), torch.randn(1, 2, 40, 512))
    assert "contiguous last dimension" in reason("triton", query, torch.randn(1, 2, 16, 40).mT)
    assert "200 query rows" in reason("triton", torch.randn(1, 4, 100, 16))
    for backend in ("triton", "gather"):
        assert "no gradient" in reason(backend, query.clone().requires_grad_())
    monkeypatch.setattr(api, "_INTERPRET", False)
    assert "needs a CUDA device, not cpu" in reason("triton")
    monkeypatch.setattr(api, "_HAS_TRITON", False)
    assert "pip install" in reason("triton")
    with pytest.raises(ValueError, match="choose from triton, gather, reference"):
        gathered_decode(query, key, key, pages, page_size=8, backend="fast")

    learned = query.clone().requires_grad_()
    out = gathered_decode(learned, key, key, pages, page_size=8)
    assert torch.autograd.grad(out.sum(), learned)[0].isfinite().all()


def test_errors_name_the_shapes() -> None:
    query, key, pages = torch.randn(2, 6, 1, 8), torch.randn(2, 3, 40, 8), torch.zeros(2, 3, 1, dtype=torch.int64)

    def fails(match: str, *call: torch.Tensor, page_size: int = 8, lengths: torch.Tensor | None = None) -> None:
        with pytest.raises(ValueError, match=match):
            gathered_decode(*call, page_size=page_size, lengths=lengths)

    fails(r"must be \(B, H, S, D\)", query[0], key, key, pages)
    fails("do not fit together", query, key, key[:, :, 1:], pages)
    fails("multiple of key/value heads", query[:, :4], key, key, pages)
    fails("one dtype and one device", query.half(), key, key, pages)
    fails(r"Hp one of \(1, 3, 6\); got \(2, 2, 1\)", query, key, key, pages[:, :2])
    fails("pages must be int32 or int64", query, key, key, pages.float())
    fails(r"lengths must be \(B,\) = \(2,\)", query, key, key, pages, lengths=torch.ones(3, dtype=torch.int64))
    fails("lengths must be int32 or int64", query, key, key, pages, lengths=torch.ones(2))
    fails("page_size must be at least 1", query, key, key, pages, page_size=0)
    with pytest.raises(ValueError, match="choose from mean, minmax"):
        page_summary(key, 8, kind="max")
    with pytest.raises(ValueError, match=r"key must be \(B, H_kv, T, D\)"):
        page_summary(key[0], 8)
    with pytest.raises(ValueError, match="page_size must be at least 1"):
        page_summary(key, 0)
    with pytest.raises(ValueError, match="lengths must be"):
        page_summary(key, 8, lengths=torch.ones(1, dtype=torch.int64))
    with pytest.raises(ValueError, match="choose from group, head"):
        page_scores(query, page_summary(key, 8), scope="all")
    with pytest.raises(ValueError, match="a multiple of 3"):
        page_scores(query[:, :4], page_summary(key, 8))
    with pytest.raises(ValueError, match="does not follow on"):
        page_summary(key, 8).append(key[:, :, :8], 1)
    with pytest.raises(ValueError, match="count=2 cannot hold sink=2 and recent=1"):
        select_pages(torch.zeros(1, 1, 9), 2, page_size=8, sink=2)
    with pytest.raises(ValueError, match=r"scores must be \(B, Hs, n_pages\)"):
        select_pages(torch.zeros(1, 9), 2, page_size=8)
    with pytest.raises(ValueError, match="lengths must be"):
        select_pages(torch.zeros(1, 1, 9), 2, page_size=8, lengths=torch.ones(2))


def integers(shape: dict) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Query, key and lengths with small whole numbers, whose products float32 holds exactly; unused keys are NaN."""
    query, key, _, _, lengths = draw(shape)
    return (query * 3).round().float(), (key * 3).round().float(), lengths


@settings(max_examples=40)
@given(shape=shapes)
def test_minmax_score_is_never_below_a_product(shape: dict) -> None:
    """Quest's bound, exactly; a page of one token attains it, and a group has the largest of its heads."""
    query, key, lengths = integers(shape)
    size, groups = shape["page_size"], query.shape[1] // key.shape[1]
    scores = page_scores(query, page_summary(key, size, lengths=lengths, kind="minmax"), scope="head")
    products = (query @ key.repeat_interleave(groups, 1).mT).amax(2)
    for page in range(scores.shape[-1]):
        largest = products[..., page * size : (page + 1) * size].nan_to_num(nan=-torch.inf).amax(-1)
        assert (scores[..., page] >= largest).all()
        assert ((scores[..., page] == -torch.inf) == (largest == -torch.inf)).all()
        if size == 1:
            assert (scores[..., page] == largest).all()
    grouped = page_scores(query, page_summary(key, size, lengths=lengths, kind="minmax"), scope="group")
    assert (grouped == scores.unflatten(1, (-1, groups)).amax(2)).all()


@settings(max_examples=40)
@given(shape=shapes)
def test_mean_score_is_the_mean_of_the_products(shape: dict) -> None:
    """Over the tokens of the page that exist, and for a group over its heads."""
    query, key, lengths = integers(shape | {"queries": 1})
    size, groups = shape["page_size"], query.shape[1] // key.shape[1]
    summary = page_summary(key, size, lengths=lengths)
    head, group = (page_scores(query, summary, scope=scope) for scope in ("head", "group"))
    products = (query @ key.repeat_interleave(groups, 1).mT)[:, :, 0]
    for page in range(head.shape[-1]):
        mean = products[..., page * size : (page + 1) * size].nanmean(-1).nan_to_num(nan=-torch.inf)
        assert torch.allclose(head[..., page], mean, atol=1e-4)
        assert torch.allclose(group[..., page], mean.unflatten(1, (-1, groups)).mean(2), atol=1e-4)
    assert head.dtype == group.dtype == torch.float32


def test_several_queries_score_as_the_largest() -> None:
    query, key = torch.randn(1, 4, 3, 16), torch.randn(1, 2, 60, 16)
    for kind in ("mean", "minmax"):
        for scope in ("group", "head"):
            summary = page_summary(key, 16, kind=kind)
            each = [page_scores(query[:, :, i : i + 1], summary, scope=scope) for i in range(3)]
            together = page_scores(query, summary, scope=scope)
            assert torch.allclose(together, torch.stack(each).amax(0), atol=1e-5)


def assert_same(found: PageSummary, expected: PageSummary) -> None:
    assert (found.exists == expected.exists).all()
    for a, b in zip(found.tensors, expected.tensors, strict=True):
        assert torch.allclose(a, b, atol=1e-12), (a - b).abs().max()


@settings(max_examples=40)
@given(shape=shapes, kind=st.sampled_from(["mean", "minmax"]), steps=st.lists(st.integers(1, 20), max_size=4))
def test_appending_to_a_growing_cache_equals_a_fresh_summary(shape: dict, kind: str, steps: list[int]) -> None:
    start, size = shape["tokens"], shape["page_size"]
    key = torch.randn(2, 2, start + sum(steps), 8, dtype=torch.float64)
    summary = page_summary(key[:, :, :start], size, kind=kind)
    for step in steps:
        start += step
        summary = summary.append(key[:, :, :start], step)
        assert_same(summary, page_summary(key[:, :, :start], size, kind=kind))


@pytest.mark.parametrize("kind", ["mean", "minmax"])
def test_appending_to_a_static_cache_is_in_place(kind: str) -> None:
    """Rows of different length; what is after them is NaN until it is written."""
    tokens, lengths = torch.randn(2, 2, 50, 8, dtype=torch.float64), torch.tensor([9, 31])
    key = torch.full_like(tokens, torch.nan)

    def write(end: torch.Tensor) -> None:
        for b, length in enumerate(end.tolist()):
            key[b, :, :length] = tokens[b, :, :length]

    write(lengths)
    summary = page_summary(key, 8, lengths=lengths, kind=kind)
    addresses = [t.data_ptr() for t in summary.tensors]
    for step in (1, 1, 5, 12):
        lengths = lengths + step
        write(lengths)
        summary = summary.append(key, step, lengths=lengths)
        assert_same(summary, page_summary(key, 8, lengths=lengths, kind=kind))
    assert [t.data_ptr() for t in summary.tensors] == addresses


@settings(max_examples=60)
@given(
    lengths=st.lists(st.integers(0, 90), min_size=1, max_size=3), count=st.integers(3, 14), sink=st.integers(0, 2),
    recent=st.integers(0, 1), seed=st.integers(0, 99),
)  # fmt: skip
def test_selection(lengths: list[int], count: int, sink: int, recent: int, seed: int) -> None:
    """The forced pages and the best others, against sorting in Python."""
    scores = torch.randn(len(lengths), 2, 12, generator=torch.Generator().manual_seed(seed))
    pages = select_pages(scores, count, page_size=8, lengths=torch.tensor(lengths), sink=sink, recent=recent)
    assert pages.shape == (len(lengths), 2, min(count, 12)) and pages.dtype == torch.int32
    for b, length in enumerate(lengths):
        existing = min(12, -(-length // 8))
        forced = {*range(min(sink, existing)), *range(max(0, existing - recent), existing)}
        for h in range(2):
            rest = sorted(set(range(existing)) - forced, key=lambda p, b=b, h=h: -scores[b, h, p])
            expected = forced | set(rest[: count - len(forced)])
            found = pages[b, h].tolist()
            assert sorted(p for p in found if p != -1) == sorted(expected)


def test_selection_finds_the_lengths_in_the_scores() -> None:
    query, key, lengths = torch.randn(2, 2, 1, 8), torch.randn(2, 1, 64, 8), torch.tensor([64, 21])
    scores = page_scores(query, page_summary(key, 8, lengths=lengths))
    given = select_pages(scores, 4, page_size=8, lengths=lengths)
    assert (select_pages(scores, 4, page_size=8) == given).all()
    assert sorted(given[1, 0].tolist()) == [-1, 0, 1, 2]


def test_three_pages_by_hand() -> None:
    """One needle in the second page: the bound finds it, the mean of the page hides it."""
    key = torch.zeros(1, 1, 12, 2)
    key[0, 0, 4] = torch.tensor([4.0, 0.0])
    key[0, 0, 5:8] = torch.tensor([-2.0, 0.0])
    query = torch.tensor([1.0, 0.0]).view(1, 1, 1, 2)
    mean, minmax = (page_scores(query, page_summary(key, 4, kind=kind)) for kind in ("mean", "minmax"))
    assert mean.tolist() == [[[0.0, -0.5, 0.0]]]
    assert minmax.tolist() == [[[0.0, 4.0, 0.0]]]
    assert select_pages(minmax, 1, page_size=4, sink=0, recent=0).tolist() == [[[1]]]


def test_budget_of_all_pages_is_dense_attention() -> None:
    query, key = torch.randn(2, 4, 1, 16), torch.randn(2, 2, 70, 16)
    scores = page_scores(query, page_summary(key, 16))
    for count in (5, 100):
        pages = select_pages(scores, count, page_size=16)
        out = gathered_decode(query, key, key, pages, page_size=16)
        expected = F.scaled_dot_product_attention(query, key, key, enable_gqa=True)
        assert pages.shape == (2, 2, 5)
        assert torch.allclose(out, expected, atol=1e-6)


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steer_kernels.decode import triton as kernels

def build(kernel, types, constants, capability, options):
    names = kernel.arg_names
    signature = {name: "constexpr" if name in constants else types.get(name, "i32") for name in names}
    aligned = [name for name in names if "*" in signature[name] or name.startswith(("key_", "value_"))]
    attributes = {(names.index(name),): [["tt.divisibility", 16]] for name in aligned}
    source = ASTSource(kernel, signature, constants, attributes)
    built = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    print(capability, built.metadata.shared, built.asm["ttgir"].count("async_copy_global_to_local"))

for capability, dtype, rows, width in ((80, "bf16", 4, 128), (90, "fp16", 128, 256), (90, "fp32", 4, 100)):
    sizes = kernels.block_sizes(rows, width, 4 if dtype == "fp32" else 2)
    types = dict.fromkeys(("query", "key", "value"), "*" + dtype)
    types |= dict(pages="*i64", lengths="*i32", out="*fp32", lse="*fp32", scale_log2="fp32")
    constants = dict(LISTS=8, LISTS_PER_HEAD=1, ROWS=rows, WIDTH=width, PAGE=16, HAS_LENGTHS=True, **sizes)
    if rows == 128:
        constants |= dict(HAS_LENGTHS=False, lengths=None)
    build(kernels.attend_part, types, constants, capability, kernels.launch_options(rows))
types = dict(part_out="*fp32", part_lse="*fp32", out="*bf16", lse="*fp32")
build(kernels.merge_parts, types, dict(WIDTH=100, ALL_PARTS=64, BLOCK_PARTS=16, BLOCK_WIDTH=128), 90, {})
"""


def test_kernels_compile_without_a_device(tmp_path: Path) -> None:
    """For Ampere and Hopper: within their shared memory, and with the loads through the page list pipelined."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"PYTHONPATH": os.pathsep.join(filter(None, sys.path)), "TRITON_CACHE_DIR": str(tmp_path)}
    done = subprocess.run([sys.executable, "-c", COMPILE], env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    *attend, _merge = [[int(word) for word in line.split()] for line in done.stdout.splitlines()]
    assert len(attend) == 3
    for capability, shared, copies in attend:
        assert shared <= {80: 163, 90: 227}[capability] * 1024
        assert copies > 0
