"""Sparse-vDiT against its patterns in plain loops, and its search against the losses computed once more."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import torch
from dense import dense_attention
from probes import inputs_of, relative_error
from test_compile import Graphs
from tiny import FAMILIES, FRAMES, HEIGHT, TEXT_TOKENS, WIDTH, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor, nn

import steer
from steer import Plan, SparseVDiT
from steer.methods.sparse_vdit import DIAGONAL, FULL, MODES, MULTI_DIAGONAL, SKIP, VERTICAL, blocks_of_modes
from steer.sparse import Tokens
from steer_kernels import BlockMask
from steer_kernels.order import axes
from steer_patches.family import family_of
from steer_patches.site import Call, Next

TOLERANCE = 1e-5
VIDEO = (FRAMES, HEIGHT, WIDTH)


def token_mask(mode: int, tokens: Tokens, density: float, block: int) -> Tensor:
    """(S, S) bool over raster tokens, pair by pair: a block counts if any of its pairs does."""
    (frames, height, width), visual, text = tokens.grid, tokens.visual, tokens.text_span or (0, 0)
    reach = visual * (1 - math.sqrt(1 - density))

    def place(token: int) -> int:
        """Where a visual token is in the order of the mode."""
        if mode != MULTI_DIAGONAL:
            return token
        frame, row, column = token // (height * width), token // width % height, token % width
        return (row * width + column) * frames + frame

    def sees(query: int, key: int) -> bool:
        """Of two places in the sequence of the mode's order."""
        if mode == FULL:
            return True
        if any(text[0] <= token < text[1] for token in (query, key)):
            return True
        query, key = query - tokens.first, key - tokens.first
        return key < visual * density if mode == VERTICAL else abs(query - key) <= reach

    length = tokens.length
    mask = torch.zeros(length, length, dtype=torch.bool)
    if mode == SKIP:
        return mask
    at = [
        token if text[0] <= token < text[1] else place(token - tokens.first) + tokens.first for token in range(length)
    ]
    n = -(-length // block)
    spans = [range(i * block, min((i + 1) * block, length)) for i in range(n)]
    kept = [[any(sees(q, k) for q in rows for k in columns) for columns in spans] for rows in spans]
    for query in range(length):
        for key in range(length):
            mask[query, key] = kept[at[query] // block][at[key] // block]
    return mask


def plan_of(model: nn.Module, modes: Any, starts: tuple[float, ...] = (0.0,)) -> Plan:
    """A plan for all self- and joint attention sites: a mode, or (L, H) or (G, L, H) modes."""
    sites = [site for site in steer.sites(model) if site.kind in SparseVDiT.kinds]
    shape = (len(starts), len(sites), sites[0].heads)
    table = torch.as_tensor(modes, dtype=torch.int8).expand(shape).contiguous()
    return Plan(tuple(site.name for site in sites), sites[0].heads, starts=starts, tensors={"mode": table})


def tokens_of(name: str) -> Tokens:
    """As the family data says it: text is in the sequence where sites are joint."""
    model = FAMILIES[name].build()
    joint = any(site.kind == "joint" for site in steer.sites(model))
    family = family_of(model)
    assert family is not None
    return Tokens(VIDEO, TEXT_TOKENS if joint else 0, family.text_first)


def run(model: nn.Module, name: str, *methods: steer.Method) -> Tensor:
    if not methods:
        return output(model, inputs_of(FAMILIES[name], model))
    with steer.apply(model, *methods):
        return output(model, inputs_of(FAMILIES[name], model))


def dense_with(model: nn.Module, name: str, site: str, masks: list[Tensor]) -> Tensor:
    """The model with a token mask for each head of one site, through the full softmax map."""
    visible = torch.stack(masks)
    with dense_attention(model, [site], lambda s, _: s.masked_fill(~visible, -torch.inf).softmax(-1).nan_to_num(0.0)):
        return output(model, inputs_of(FAMILIES[name], model))


@pytest.mark.parametrize("grid", [(3, 4, 6), (5, 3, 7), (1, 4, 5)])
@pytest.mark.parametrize("text, text_first", [(0, False), (7, False), (5, True)])
@pytest.mark.parametrize("density, block", [(0.25, 1), (0.25, 8), (0.6, 16), (1.0, 8)])
def test_blocks_are_those_with_a_visible_pair(
    grid: tuple[int, int, int], text: int, text_first: bool, density: float, block: int
) -> None:
    tokens = Tokens(grid, text, text_first)
    keep = blocks_of_modes(tokens, density, block)
    for mode in range(len(MODES)):
        mask = BlockMask.from_bool(keep[None, mode : mode + 1], block, q_len=tokens.length, kv_len=tokens.length)
        seen = mask.to_tokens()[0, 0]
        if mode == MULTI_DIAGONAL:
            order = axes(grid, "HWT", text_tokens=text, text_first=text_first)
            seen = order.undo(order.undo(seen, 0), 1)
        assert torch.equal(seen, token_mask(mode, tokens, density, block)), MODES[mode]


def test_band_columns_and_stripes_have_the_density_that_is_asked_for() -> None:
    """Per token, on a grid with many: what the widths are made for."""
    for density in (0.2, 0.25, 0.5):
        keep = blocks_of_modes(Tokens((10, 8, 12)), density, 1).double().mean((1, 2)).tolist()
        assert keep[:2] == [1, 0]
        assert keep[2:] == pytest.approx([density] * 3, abs=2e-3)


def test_multi_diagonal_is_the_strided_mask_at_4_6_8() -> None:
    """A band in (height, width, frames) order is stripes at the multiples of the tokens of a frame in raster order."""
    grid, per_frame = (4, 6, 8), 48
    tokens = Tokens(grid)
    reach = math.floor(tokens.visual * (1 - math.sqrt(1 - 0.05)))
    band = token_mask(MULTI_DIAGONAL, tokens, 0.05, 1)
    for query in range(tokens.visual):
        for key in range(tokens.visual):
            apart = query % per_frame - key % per_frame
            whole = apart * grid[0] + query // per_frame - key // per_frame
            assert band[query, key] == (abs(whole) <= reach)
    g = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, 1, tokens.visual, 16, generator=g, dtype=torch.float64) for _ in range(3))
    order = axes(grid, "HWT")
    in_order = torch.arange(tokens.visual)
    near = (in_order[:, None] - in_order).abs() <= reach
    q2, k2, v2 = (order.apply(x, 2) for x in (q, k, v))
    banded = order.undo(torch.nn.functional.scaled_dot_product_attention(q2, k2, v2, attn_mask=near), 2)
    strided = torch.nn.functional.scaled_dot_product_attention(q, k, v, attn_mask=band)
    assert torch.allclose(banded, strided, rtol=0, atol=1e-12)


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox", "cogvideox_rotary", "ltx", "cosmos"])
@pytest.mark.parametrize("pair", [(DIAGONAL, MULTI_DIAGONAL), (VERTICAL, SKIP), (MULTI_DIAGONAL, FULL), (SKIP, SKIP)])
@pytest.mark.parametrize("block", [1, 8])
def test_each_head_has_its_mode(name: str, pair: tuple[int, int], block: int) -> None:
    model = FAMILIES[name].build()
    plan = plan_of(model, FULL)
    modes = torch.zeros(len(plan.sites), plan.heads, dtype=torch.int8)
    modes[1] = torch.tensor(pair)
    steered = run(model, name, SparseVDiT(plan=plan_of(model, modes), density=0.3, block_size=block))
    masks = [token_mask(mode, tokens_of(name), 0.3, block) for mode in pair]
    wanted = dense_with(model, name, plan.sites[1], masks)
    assert relative_error(steered, wanted) <= TOLERANCE
    assert relative_error(steered, run(model, name)) > 1e-3


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox", "mochi"])
def test_all_full_is_bit_identical(name: str) -> None:
    model = FAMILIES[name].build()
    assert torch.equal(run(model, name, SparseVDiT(plan=plan_of(model, FULL), block_size=8)), run(model, name))


@contextmanager
def attention_outputs(model: nn.Module, sites: tuple[str, ...]) -> Iterator[list[Tensor]]:
    """What the modules of some sites return, for a site whose output projection is the identity without bias."""
    seen: list[Tensor] = []

    def keep(module: nn.Module, args: Any, result: Any) -> None:
        seen.extend(result if isinstance(result, tuple) else (result,))

    hooks = [model.get_submodule(name).register_forward_hook(keep) for name in sites]
    try:
        yield seen
    finally:
        for hook in hooks:
            hook.remove()


@pytest.mark.parametrize("name, joint", [("wan21", False), ("cogvideox", True)])
def test_skipped_heads_are_exactly_zero_for_text_too(name: str, joint: bool) -> None:
    model = FAMILIES[name].build()
    plan = plan_of(model, SKIP)
    for site in plan.sites:
        project = model.get_submodule(site).to_out[0]
        project.bias.zero_()
    with attention_outputs(model, plan.sites) as outputs:
        run(model, name, SparseVDiT(plan=plan, block_size=8))
    assert len(outputs) == len(plan.sites) * (2 if joint else 1)
    assert all(not out.any() for out in outputs)


def test_step_groups_take_turns() -> None:
    pipe = PIPELINES["wan21"].build()
    kwargs = PIPELINES["wan21"].call_kwargs

    def made(modes: Any, starts: tuple[float, ...] = (0.0,), **settings: Any) -> Tensor:
        plan = plan_of(pipe.transformer, modes, starts)
        with steer.apply(pipe, SparseVDiT(plan=plan, block_size=8, **settings)):
            return generate(pipe, kwargs(pipe, steps=4))

    both = torch.stack([torch.full((3, 2), DIAGONAL), torch.full((3, 2), VERTICAL)])
    half = torch.stack([torch.full((3, 2), DIAGONAL), torch.full((3, 2), FULL)])
    assert torch.equal(made(half, (0.0, 0.5)), made(DIAGONAL, steps=":0.5"))
    assert not torch.equal(made(both, (0.0, 0.5)), made(half, (0.0, 0.5)))
    assert not torch.equal(made(both, (0.0, 0.5)), made(VERTICAL))


def test_a_plan_serves_another_resolution() -> None:
    """Found at one size, run at another in the same process, and back: as if each were the first."""
    pipe = PIPELINES["wan21"].build()
    data = PIPELINES["wan21"].call_kwargs(pipe, steps=2)
    del data["generator"]
    fitted = steer.calibrate(pipe, SparseVDiT(block_size=8), [data], epsilon=0.2, progress=False)

    def made(**size: int) -> Tensor:
        return generate(pipe, {**PIPELINES["wan21"].call_kwargs(pipe, steps=2), **size})

    def alone(**size: int) -> Tensor:
        with steer.apply(pipe, fitted):
            return made(**size)

    large = {"height": data["height"] * 2, "num_frames": data["num_frames"] + 8}
    with steer.apply(pipe, fitted):
        together = [made(), made(**large), made()]
    assert torch.equal(together[0], alone()) and torch.equal(together[2], together[0])
    assert torch.equal(together[1], alone(**large))
    assert not torch.equal(together[1], made(**large))


def test_heads_that_are_not_chosen_are_full() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_of(model, DIAGONAL)
    only = SparseVDiT(plan=plan, block_size=8, heads=[1])
    wanted = SparseVDiT(plan=plan_of(model, torch.tensor([FULL, DIAGONAL])), block_size=8)
    assert torch.equal(run(model, "wan21", only), run(model, "wan21", wanted))
    with steer.apply(model, only) as handle:
        output(model, inputs_of(FAMILIES["wan21"], model))
        density = handle.stats["methods"][0]["density"]
    diagonal = blocks_of_modes(Tokens(VIDEO), 0.25, 8)[DIAGONAL].double().mean().item()
    assert density == pytest.approx((1 + diagonal) / 2)


@dataclass(kw_only=True)
class InHalves(steer.Method, register=False):
    """Computes the two heads one after the other, as devices that share them do."""

    layers: Any = "*"
    kinds: ClassVar[tuple[str, ...]] = SparseVDiT.kinds

    def attend(self, call: Call, next: Next) -> Tensor:
        parts = []
        for part in (slice(0, 1), slice(1, 2)):
            query, key, value = (x[:, part] for x in (call.query, call.key, call.value))
            parts.append(next(call.replace(query=query, key=key, value=value, head_range=part)))
        return torch.cat(parts, 1)


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video"])
def test_split_heads_keep_their_modes(name: str) -> None:
    model = FAMILIES[name].build()
    method = SparseVDiT(plan=plan_of(model, torch.tensor([DIAGONAL, MULTI_DIAGONAL])), block_size=8)
    whole = run(model, name, method)
    assert relative_error(run(model, name, method, InHalves()), whole) <= TOLERANCE


def test_one_graph_for_all_layers_of_a_kind() -> None:
    model = FAMILIES["wan21"].build()
    modes = torch.tensor([[DIAGONAL, MULTI_DIAGONAL], [MULTI_DIAGONAL, SKIP], [MULTI_DIAGONAL, VERTICAL]])
    method = SparseVDiT(plan=plan_of(model, modes), block_size=8)
    eager = run(model, "wan21", method)
    graphs = Graphs()
    model.compile_repeated_blocks(backend=graphs, fullgraph=True)
    try:
        compiled = run(model, "wan21", method)
    finally:
        torch._dynamo.reset()
    assert torch.allclose(compiled, eager, rtol=0, atol=1e-6 * float(eager.abs().max()))
    assert graphs.count == 1


# --- the search


def search_on(name: str, **options: Any) -> tuple[nn.Module, SparseVDiT]:
    model = FAMILIES[name].build()
    data = [inputs_of(FAMILIES[name], model)]
    fitted = steer.calibrate(model, SparseVDiT(density=0.3, block_size=8), data, progress=False, **options)
    assert isinstance(fitted, SparseVDiT) and fitted.plan is not None
    return model, fitted


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
def test_epsilon_0_keeps_every_head(name: str) -> None:
    model, fitted = search_on(name, epsilon=0.0)
    assert fitted.plan is not None and not fitted.plan.tensors["mode"].any()
    assert torch.equal(run(model, name, fitted), run(model, name))


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
def test_a_large_weight_skips_every_head(name: str) -> None:
    _, fitted = search_on(name, epsilon=math.inf, weight=1e6)
    assert fitted.plan is not None and bool((fitted.plan.tensors["mode"] == SKIP).all())


@pytest.mark.parametrize("name, epsilon", [("wan21", 0.12), ("cogvideox", 0.14), ("hunyuan_video", 0.15)])
def test_search_is_sequential_and_greedy(name: str, epsilon: float) -> None:
    """Each layer's losses, from its own queries, keys and values under the choices made before it, through the map."""
    weight = 0.1
    model, fitted = search_on(name, epsilon=epsilon, weight=weight)
    plan, tokens = fitted.plan, tokens_of(name)
    assert plan is not None
    masks = torch.stack([token_mask(mode, tokens, 0.3, 8) for mode in range(len(MODES))])
    shares = blocks_of_modes(tokens, 0.3, 8).double().mean((1, 2))
    modes = torch.zeros(len(plan.sites), plan.heads, dtype=torch.int64)
    for layer, site in enumerate(plan.sites):
        losses: list[Tensor] = []

        def look(scores: Tensor, weights: Tensor, losses: list[Tensor] = losses) -> Tensor:
            losses.append(scores)
            return weights

        before = SparseVDiT(plan=plan_of(model, modes), density=0.3, block_size=8)
        with dense_attention(model, [site], look), values_of(model, site) as seen:
            run(model, name, before)
        (scores,), (value,) = losses, seen
        full = scores.softmax(-1).nan_to_num(0.0) @ value
        energy = full.square().sum((0, 2, 3)).mean()
        loss = torch.stack(
            [
                ((scores.masked_fill(~masks[m], -torch.inf).softmax(-1).nan_to_num(0.0) @ value) - full)
                .square()
                .sum((0, 2, 3))
                / energy
                + weight * shares[m]
                for m in range(1, len(MODES))
            ]
        )
        least, best = loss.min(0)
        modes[layer] = torch.where(least < epsilon, best + 1, FULL)
        assert torch.allclose(
            plan.tensors["error"][0, layer, :, 1:].double(),
            (loss - weight * shares[1:, None]).T.double(),
            rtol=1e-3,
            atol=1e-5,
        )
    assert torch.equal(plan.tensors["mode"][0].long(), modes)
    assert 0 < int((modes == FULL).sum()) < modes.numel()


@contextmanager
def values_of(model: nn.Module, site: str) -> Iterator[list[Tensor]]:
    """The values (B, H, S, D) of one site's attention call."""
    seen: list[Tensor] = []

    class Look(torch.overrides.TorchFunctionMode):
        inside = False

        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            if func is torch.nn.functional.scaled_dot_product_attention and self.inside:
                seen.append(args[2] if len(args) > 2 else kwargs["value"])
            return func(*args, **(kwargs or {}))

    mode, module = Look(), model.get_submodule(site)
    hooks = [
        module.register_forward_pre_hook(lambda *_: setattr(mode, "inside", True)),
        module.register_forward_hook(lambda *_: setattr(mode, "inside", False)),
    ]
    try:
        with mode:
            yield seen
    finally:
        for hook in hooks:
            hook.remove()


def test_heads_that_are_not_chosen_stay_full_in_the_search() -> None:
    model = FAMILIES["wan21"].build()
    data = [inputs_of(FAMILIES["wan21"], model)]
    method = SparseVDiT(block_size=8, heads={"blocks.1": [1], "blocks.2": [0, 1]})
    fitted = steer.calibrate(model, method, data, epsilon=math.inf, progress=False)
    assert fitted.plan.sites == ("blocks.1.attn1", "blocks.2.attn1")
    assert (fitted.plan.tensors["mode"][0] == FULL).tolist() == [[True, False], [False, False]]
    assert relative_error(run(model, "wan21", fitted), run(model, "wan21")) > 1e-3


def test_more_epsilon_is_less_density_and_more_error() -> None:
    figures = [search_on("wan21", epsilon=epsilon)[1].plan.report["figures"]  # type: ignore[union-attr]
               for epsilon in (0.0, 0.1, 0.2, 1.0)]  # fmt: skip
    densities, errors = ([each[name] for each in figures] for name in ("density", "relative squared error"))
    assert densities == sorted(densities, reverse=True) and densities[0] == 1 > densities[-1]
    assert errors == sorted(errors) and errors[0] == 0 < errors[-1]


def test_losses_are_means_over_calls_and_steps() -> None:
    """Two groups of one step each have the errors of the two steps, one group their mean: where nothing is chosen."""
    pipe = PIPELINES["wan21"].build()
    data = PIPELINES["wan21"].call_kwargs(pipe, steps=2)
    del data["generator"]
    plans = [steer.calibrate(pipe, SparseVDiT(block_size=8), [data], epsilon=0.0, groups=groups, progress=False).plan
             for groups in (1, 2)]  # fmt: skip
    one, two = (plan.tensors["error"] for plan in plans)
    assert tuple(two.shape) == (2, 3, 2, 5)
    assert torch.allclose(one[0], two.mean(0), rtol=1e-5)
    assert not torch.allclose(two[0], two[1], rtol=1e-2)


def test_the_table_is_shared_by_the_two_experts_of_wan22() -> None:
    pipe = PIPELINES["wan22"].build()
    data = PIPELINES["wan22"].call_kwargs(pipe, steps=4)
    del data["generator"]
    fitted = steer.calibrate(pipe, SparseVDiT(block_size=8), [data], groups=4, epsilon=1.0, progress=False)
    assert tuple(fitted.plan.tensors["mode"].shape) == (4, 3, 2)
    assert fitted.plan.tensors["error"].isfinite().all()  # the steps of both experts were seen
    baseline = generate(pipe, PIPELINES["wan22"].call_kwargs(pipe, steps=4))
    with steer.apply(pipe, fitted) as handle:
        assert not torch.equal(generate(pipe, PIPELINES["wan22"].call_kwargs(pipe, steps=4)), baseline)
        assert len(handle.stats["methods"]) == 2


def test_expected_density_is_that_of_the_run() -> None:
    pipe = PIPELINES["wan21"].build()
    halves = torch.stack([torch.full((3, 2), DIAGONAL), torch.full((3, 2), SKIP)])
    method = SparseVDiT(plan=plan_of(pipe.transformer, halves, (0.0, 0.25)), block_size=8)
    with steer.apply(pipe, method) as handle:
        site = handle.bindings[0].live["blocks.1.attn1"][0]
        expected = handle.bindings[0].method.expected_density(Tokens(VIDEO), site)
    diagonal = blocks_of_modes(Tokens(VIDEO), 0.25, 8)[DIAGONAL].double().mean().item()
    assert expected == pytest.approx(0.25 * diagonal)


@pytest.mark.parametrize(
    "frames, per_frame, text, total",
    [(11, (68, 60), 226, 45_106), (33, (60, 60), 256, 119_056), (21, (60, 60), 0, 75_600)],
)
def test_token_counts_of_the_paper(frames: int, per_frame: tuple[int, int], text: int, total: int) -> None:
    assert Tokens((frames, *per_frame), text).length == total


def test_bad_settings_are_named() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_of(model, DIAGONAL)
    baseline = run(model, "wan21")
    cases: list[tuple[type[Exception], str, Any]] = [
        (ValueError, r"has no plan: fit it with steer\.calibrate", lambda: run(model, "wan21", SparseVDiT())),
        (ValueError, r"density=0 is a share", lambda: SparseVDiT(density=0)),
        (ValueError, r"density=1\.5 is a share", lambda: SparseVDiT(density=1.5)),
        (ValueError, r"holds mode \(1, 3, 2\), numbers below 5.*this one holds mode \(1, 2, 2\)",
         lambda: SparseVDiT(plan=Plan(plan.sites, 2, tensors={"mode": plan.tensors["mode"][:, :2]}))),
        (ValueError, r"holds mode \(1, 3, 2\)", lambda: SparseVDiT(plan=plan_of(model, 7))),
        (ValueError, r"holds mode .* this one holds nothing", lambda: SparseVDiT(plan=Plan(plan.sites, 2))),
        (ValueError, r"epsilon=-1 and weight=0\.1 must be 0", lambda: SparseVDiT().search(epsilon=-1, weight=0.1)),
        (ValueError, r"groups=0 must be at least 1", lambda: SparseVDiT().search(groups=0)),
        (steer.SelectorError, r"matches none of this model's attention sites",
         lambda: run(model, "wan21", SparseVDiT(plan=Plan(
             ("blocks.9.attn1",), 2, tensors={"mode": torch.zeros(1, 1, 2)})))),
        (ValueError, r"this plan has nothing for blocks\.0\.attn1; it was made for:\n  blocks\.2\.attn1",
         lambda: run(model, "wan21", SparseVDiT(layers="*", plan=Plan(
             ("blocks.2.attn1",), 2, tensors={"mode": torch.zeros(1, 1, 2)})))),
        (ValueError, r"for sites of 3 heads; blocks\.0\.attn1 has 2",
         lambda: run(model, "wan21", SparseVDiT(plan=Plan(plan.sites, 3, tensors={"mode": torch.zeros(1, 3, 3)})))),
        (steer.CompositionError, "cannot run on FLUX",
         lambda: steer.apply(FAMILIES["flux"].build(), SparseVDiT(plan=plan))),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert torch.equal(run(model, "wan21"), baseline)
