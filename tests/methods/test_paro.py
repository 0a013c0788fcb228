"""PAROAttention: orders and blocks against loops over the dense map, its search, and what it refuses."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext
from typing import Any

import pytest
import torch
from dense import dense_attention, relative_norm
from test_compile import Graphs
from tiny import FAMILIES, FRAMES, HEIGHT, TEXT_TOKENS, WIDTH, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import PAROAttention, Plan
from steer.methods import paro
from steer.sparse import Tokens

BLOCK = 4
MODELS = ["wan21", "hunyuan_video", "cogvideox", "cogvideox_rotary", "mochi", "flux", "sd35", "qwen_image"]
AXES = [(0, 1, 2), (0, 2, 1), (1, 2, 0), (1, 0, 2), (2, 1, 0), (2, 0, 1)]  # the card's FHW, FWH, HWF, HFW, WHF, WFH


def places(grid: tuple[int, int, int], number: int) -> list[int]:
    """The raster number of the token at every place of a permutation, in plain loops."""
    slow, middle, fast = AXES[number]
    found = []
    for a, b, c in itertools.product(range(grid[slow]), range(grid[middle]), range(grid[fast])):
        at = {slow: a, middle: b, fast: c}
        found.append((at[0] * grid[1] + at[1]) * grid[2] + at[2])
    return found


def plan_for(
    model: Any, blocks: str = "random", grid: tuple[int, int, int] | None = None, size: int = BLOCK, **changes: Any
) -> Plan:
    """Permutations that go round through the six, and all blocks or a random half with the diagonal."""
    sites = [site for site in steer.sites(model) if site.kind in PAROAttention.kinds]
    grid = grid or (FRAMES, HEIGHT, WIDTH)
    layers, heads, n = len(sites), sites[0].heads, -(-math.prod(grid) // size)
    starts = changes.get("starts", (0.0,))
    generator = torch.Generator().manual_seed(0)
    keep = torch.rand(len(starts), layers, heads, n, n, generator=generator) < (1.0 if blocks == "all" else 0.5)
    keep |= torch.eye(n, dtype=torch.bool)
    tensors = {
        "permutation": (torch.arange(layers * heads) % 6).to(torch.int8).view(layers, heads),
        "blocks": torch.ones_like(keep) if blocks == "all" else keep,
    }
    names = tuple(site.name for site in sites)
    return Plan(**{"sites": names, "heads": heads, "grid": grid, "block_size": size, "tensors": tensors, **changes})


def grid_of(name: str) -> tuple[int, int, int]:
    grid = FAMILIES[name].grid
    assert grid is not None
    return grid


def visible(plan: Plan, site: str, length: int, text_first: bool, group: int = 0) -> Tensor:
    """(H, S, S) bool, pair by pair: text sees and is seen by all; else the blocks of the two places decide."""
    assert plan.grid is not None and plan.block_size is not None
    layer, visual, size = plan.sites.index(site), math.prod(plan.grid), plan.block_size
    first = length - visual if text_first else 0
    pure = visual // size if length > visual else -(-visual // size)  # the last block may hold text as well
    mask = torch.ones(plan.heads, length, length, dtype=torch.bool)
    for head in range(plan.heads):
        order = places(plan.grid, int(plan.tensors["permutation"][layer, head]))
        kept = plan.tensors["blocks"][group, layer, head].tolist()
        for i, j in itertools.product(range(visual), repeat=2):
            row, column = i // size, j // size
            mixed = row >= pure or column >= pure
            mask[head, first + order[i], first + order[j]] = mixed or kept[row][column]
    return mask


@contextmanager
def masked_by_loops(model: Any, plan: Plan, text_first: bool) -> Iterator[None]:
    """The plain model with the plan's token masks on the dense maps of its sites."""

    def edit_of(site: str) -> Any:
        masks: dict[int, Tensor] = {}

        def edit(scores: Tensor, weights: Tensor) -> Tensor:
            length = scores.shape[-1]
            if length not in masks:
                masks[length] = visible(plan, site, length, text_first)
            return scores.masked_fill(~masks[length], -torch.inf).softmax(-1).nan_to_num(0.0)

        return edit

    with ExitStack() as stack:
        for site in plan.sites:
            stack.enter_context(dense_attention(model, [site], edit_of(site)))
        yield


def noise_of(model: Any, sites: tuple[str, ...], kwargs: Any, baseline: Tensor) -> float:
    """How far the dense map is from the model's own kernel: the rounding that a tolerance has to allow."""
    with dense_attention(model, sites):
        return relative_norm(output(model, kwargs), baseline)


def maps_of(model: Any, sites: tuple[str, ...], inputs: dict[str, Any]) -> list[Tensor]:
    """The dense softmax map (B, H, S, S) of every site, in one forward."""
    found: dict[str, Tensor] = {}

    def keep(site: str) -> Any:
        def edit(scores: Tensor, weights: Tensor) -> Tensor:
            found[site] = weights
            return weights

        return edit

    with ExitStack() as stack:
        for site in sites:
            stack.enter_context(dense_attention(model, [site], keep(site)))
        output(model, inputs)
    return [found[site] for site in sites]


def block_sums(weights: Tensor, order: list[int], size: int) -> Tensor:
    """(n, n) sums over the blocks of one map (S, S) with its tokens in an order."""
    ordered = weights[order][:, order]
    starts = range(0, len(order), size)
    return torch.stack([torch.stack([ordered[i : i + size, j : j + size].sum() for j in starts]) for i in starts])


def planted() -> tuple[Any, dict[str, Any]]:
    """A CogVideoX in whose layers tokens of the same column attend to one another, and its inputs.

    The latents depend on the column alone but for a little noise, keys are made like queries, and the normalised
    queries are scaled up.
    """
    model = FAMILIES["cogvideox_rotary"].build()
    inputs = FAMILIES["cogvideox_rotary"].inputs(model)
    inputs["image_rotary_emb"] = tuple(
        torch.full_like(table, fill) for table, fill in zip(inputs["image_rotary_emb"], (1.0, 0.0), strict=True)
    )
    generator = torch.Generator().manual_seed(1)
    latents = inputs["hidden_states"]
    column = torch.randn(*latents.shape[:1], 1, latents.shape[2], 1, latents.shape[-1], generator=generator)
    inputs["hidden_states"] = 3 * column.expand_as(latents) + 0.3 * latents
    for block in model.transformer_blocks:
        block.attn1.to_k.load_state_dict(block.attn1.to_q.state_dict())
        block.attn1.norm_q.weight.mul_(3.0)
        block.attn1.norm_k.load_state_dict(
            {k: v / 3 if k == "weight" else v for k, v in block.attn1.norm_q.state_dict().items()}
        )
    return model, inputs


# Orders


@pytest.mark.parametrize("grid", [(3, 4, 6), (2, 5, 3), (1, 4, 6), (3, 1, 1)], ids=str)
@pytest.mark.parametrize("text, text_first", [(0, False), (7, False), (7, True)])
def test_orders_are_those_of_the_card(grid: tuple[int, int, int], text: int, text_first: bool) -> None:
    tokens = Tokens(grid, text, text_first)
    there, back = paro.order_tables(tokens)
    for number in range(6):
        visual = [tokens.first + token for token in places(grid, number)]
        written = [place for place in range(tokens.length) if place not in visual]
        assert there[number].tolist() == visual + written
        assert there[number][back[number]].tolist() == list(range(tokens.length))


def test_permuting_and_back_is_bit_identical() -> None:
    there, back = paro.order_tables(Tokens((3, 4, 5), 7, True))
    chosen = torch.tensor([3, 0, 5, 1, 2, 4])
    x = torch.randn(2, 6, 67, 8, generator=torch.Generator().manual_seed(0)).transpose(0, 1).transpose(0, 1)
    mixed = paro.permuted(x, there[chosen])
    assert not torch.equal(mixed, x)
    assert torch.equal(paro.permuted(mixed, back[chosen]), x)
    assert torch.equal(mixed[:, 2], x[:, 2, there[5]])


# Attention


@pytest.mark.parametrize("name", MODELS)
def test_six_orders_with_all_blocks_are_dense(name: str) -> None:
    model = FAMILIES[name].build()
    plan = plan_for(model, "all", grid_of(name))
    baseline = output(model, FAMILIES[name].inputs(model))
    with steer.apply(model, PAROAttention(plan=plan)) as handle:
        steered = output(model, FAMILIES[name].inputs(model))
        assert handle.stats["methods"][0]["density"] == 1.0
    noise = noise_of(model, plan.sites, FAMILIES[name].inputs(model), baseline)
    assert relative_norm(steered, baseline) <= 4 * noise
    assert torch.equal(output(model, FAMILIES[name].inputs(model)), baseline)


@pytest.mark.parametrize("size", [4, 7])
@pytest.mark.parametrize("name", MODELS)
def test_blocks_are_those_of_the_plan(name: str, size: int) -> None:
    """Text first and last, padded text, rows one by one, images; with 7, a last block that is shorter or holds text."""
    model = FAMILIES[name].build()
    plan = plan_for(model, grid=grid_of(name), size=size)
    text_first = name in ("cogvideox", "cogvideox_rotary", "flux", "qwen_image")
    baseline = output(model, FAMILIES[name].inputs(model))
    with masked_by_loops(model, plan, text_first):
        wanted = output(model, FAMILIES[name].inputs(model))
    with steer.apply(model, PAROAttention(plan=plan)):
        steered = output(model, FAMILIES[name].inputs(model))
    noise = noise_of(model, plan.sites, FAMILIES[name].inputs(model), baseline)
    assert relative_norm(steered, wanted) <= 4 * noise
    assert relative_norm(wanted, baseline) > 1e-3


def test_text_of_any_length() -> None:
    model = FAMILIES["hunyuan_video"].build()
    plan = plan_for(model)
    inputs = FAMILIES["hunyuan_video"].inputs(model)
    for tokens in (TEXT_TOKENS, 3):
        inputs |= {key: inputs[key][:, :tokens] for key in ("encoder_hidden_states", "encoder_attention_mask")}
        with masked_by_loops(model, plan, text_first=False):
            wanted = output(model, inputs)
        with steer.apply(model, PAROAttention(plan=plan)):
            assert relative_norm(output(model, inputs), wanted) < 1e-5


def test_heads_that_are_not_chosen_stay_dense() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_for(model)
    kept = plan.tensors["blocks"].clone()
    kept[:, :, 1] = True
    dense_in_one = plan_for(model, tensors={**plan.tensors, "blocks": kept})
    with steer.apply(model, PAROAttention(plan=plan, heads=[0])):
        some = output(model, FAMILIES["wan21"].inputs(model))
    with steer.apply(model, PAROAttention(plan=dense_in_one)):
        assert torch.equal(output(model, FAMILIES["wan21"].inputs(model)), some)


def test_groups_of_steps_have_masks_of_their_own() -> None:
    """All blocks in the first half of four steps, a random half after it."""
    pipe = PIPELINES["wan21"].build()
    plan = plan_for(pipe.transformer, starts=(0.0, 0.5))
    kept = plan.tensors["blocks"].clone()
    kept[0] = True
    plan = plan_for(pipe.transformer, starts=(0.0, 0.5), tensors={**plan.tensors, "blocks": kept})
    densities = []
    with steer.apply(pipe, PAROAttention(plan=plan)) as handle:

        def record(*args: Any) -> dict[str, Any]:
            densities.append(handle.stats["methods"][0]["density"])
            return {}

        generate(pipe, {**PIPELINES["wan21"].call_kwargs(pipe, steps=4), "callback_on_step_end": record})
        held = {id(site.kernel.mask) for site in handle.sites}
        known = {id(made.mask) for made in handle.bindings[0].method._made.values() if made.mask is not None}
    half = kept[1].double().mean().item()
    assert densities == pytest.approx([1.0, 1.0, half, half])
    assert known == held  # the lists of the group before are let go


@pytest.mark.parametrize("name", ["wan21", "flux"])
def test_layers_with_masks_of_their_own_share_one_graph(name: str) -> None:
    """No more graphs than the unsteered model, whose layers are compiled apart already where their strides differ."""
    model = FAMILIES[name].build()
    method = PAROAttention(plan=plan_for(model, grid=grid_of(name)))
    with steer.apply(model, method):
        wanted = output(model, FAMILIES[name].inputs(model))
    counts = []
    for steered in (False, True):
        torch._dynamo.reset()
        model, graphs = FAMILIES[name].build(), Graphs()
        model.compile_repeated_blocks(fullgraph=True, backend=graphs)
        with steer.apply(model, method) if steered else nullcontext():
            found = output(model, FAMILIES[name].inputs(model))
        counts.append(graphs.count)
    torch._dynamo.reset()
    assert counts[0] == counts[1]
    assert relative_norm(found, wanted) < 1e-6


# The choice of blocks


@pytest.mark.parametrize("density", [0.02, 0.2, 0.5, 0.93, 1.0])
@pytest.mark.parametrize("n", [1, 5, 9])
def test_density_is_met_and_every_row_keeps_its_best(n: int, density: float) -> None:
    mass = torch.rand(3, n, n, generator=torch.Generator().manual_seed(n)).pow(4)
    mass[0, 0] *= 1e-6  # a row that no largest block lies in
    keep = paro.keep_largest(mass, density)
    assert (keep.sum((-1, -2)) == max(n, round(density * n * n))).all()
    assert keep.gather(-1, mass.argmax(-1, keepdim=True)).all()
    others = keep.scatter(-1, mass.argmax(-1, keepdim=True), False)
    for head in range(3):
        left_out = mass[head][~keep[head]]
        if others[head].any() and len(left_out):
            assert mass[head][others[head]].min() >= left_out.max()


# The search


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "hunyuan_video", "sd3"])
def test_blocks_are_the_largest_of_the_mean_dense_maps(name: str) -> None:
    """Two samples of two rows each; the map of every site by the dense softmax, its blocks summed in loops."""
    family = FAMILIES[name]
    model = family.build()
    data = [family.inputs(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    baseline = output(model, family.inputs(model))
    method = steer.calibrate(model, PAROAttention(block_size=5, density=0.4), data, progress=False)
    assert torch.equal(output(model, family.inputs(model)), baseline)
    plan = method.plan
    assert plan is not None and plan.grid == grid_of(name) and plan.block_size == 5
    first = TEXT_TOKENS if name == "cogvideox" else 0
    maps = [maps_of(model, plan.sites, inputs) for inputs in data]
    for layer, head in itertools.product(range(len(plan.sites)), range(plan.heads)):
        order = [first + token for token in places(plan.grid, int(plan.tensors["permutation"][layer, head]))]
        sums = sum(block_sums(rows[head], order, 5) for sample in maps for rows in sample[layer])
        kept = plan.tensors["blocks"][0, layer, head]
        assert int(kept.sum()) == round(0.4 * kept.numel())
        best = torch.zeros_like(kept).scatter(-1, sums.argmax(-1, keepdim=True), True)
        assert kept[best].all()
        assert sums[kept & ~best].min() >= (1 - 1e-5) * sums[~kept].max()


@pytest.mark.parametrize("name", MODELS)
def test_orders_with_all_blocks_have_no_error(name: str) -> None:
    model = FAMILIES[name].build()
    data = [FAMILIES[name].inputs(model)]
    method = steer.calibrate(model, PAROAttention(block_size=7, density=1.0), data, progress=False)
    assert method.plan is not None
    assert method.plan.report["figures"]["error"]["raster"] < 1e-12


@pytest.mark.parametrize("criterion", ["error", "paper"])
def test_attention_within_columns_is_put_together(criterion: str) -> None:
    """Multi-diagonal in the model's order; whole blocks with the column as the slowest axis."""
    model, inputs = planted()
    baseline = output(model, inputs)
    empty = PAROAttention(block_size=6, density=0.2)
    method = steer.calibrate(model, empty, [inputs], progress=False, criterion=criterion, threshold=0.01)
    assert method.plan is not None
    chosen = method.plan.tensors["permutation"]
    assert {paro.PERMUTATIONS[number] for number in chosen.flatten()} <= {"WHT", "WTH"}

    raster = without_reordering(model, inputs, empty)
    with steer.apply(model, method) as handle:
        reordered, density = output(model, inputs), handle.stats["methods"][0]["density"]
    with steer.apply(model, raster) as handle:
        in_order = output(model, inputs)
        assert handle.stats["methods"][0]["density"] == density
    assert (reordered - baseline).square().mean() < 0.25 * (in_order - baseline).square().mean()

    for weights in maps_of(model, method.plan.sites, inputs):  # fewer blocks hold the same mass
        visual = [TEXT_TOKENS + token for token in range(FRAMES * HEIGHT * WIDTH)]
        by_column = [TEXT_TOKENS + token for token in places((FRAMES, HEIGHT, WIDTH), 5)]
        counts = [blocks_of_mass(block_sums(weights[0, 0], order, 6), 0.8) for order in (visual, by_column)]
        assert counts[1] < 0.6 * counts[0]


def without_reordering(model: Any, inputs: dict[str, Any], method: PAROAttention) -> PAROAttention:
    """The same search with every head left in the model's order."""
    search = method.search()
    search._best = lambda: torch.zeros(search._figures.shape[:2], dtype=torch.long)  # type: ignore[method-assign]
    with steer.apply(model, search):
        for number in range(search.passes):
            search.start_pass(number)
            output(model, inputs)
    return search.finish()


def blocks_of_mass(sums: Tensor, part: float) -> int:
    """The fewest blocks that together hold this part of the mass."""
    running = sums.flatten().sort(descending=True).values.cumsum(0)
    return int((running < part * running[-1]).sum()) + 1


def test_sign_of_the_paper_is_turned() -> None:
    """By the text's formula, to be minimised, the order with the fewest sparse blocks would win."""
    search = PAROAttention().search(criterion="paper")
    sparse = torch.tensor([0.1, 0.2, 0.1, 0.3, 0.8, 0.4])
    incoherence = torch.tensor([9.0, 8.0, 7.0, 6.0, 5.0, 4.0])
    search._figures = torch.stack([sparse, incoherence], -1).double()[None, None]
    assert search._best().item() == 4
    search.alpha = 0.0
    assert search._best().item() == 5


def test_only_conditional_rows_are_looked_at() -> None:
    """Batched guidance, one step: another negative prompt changes nothing, another prompt does."""
    pipe = PIPELINES["cogvideox"].build()
    kwargs = PIPELINES["cogvideox"].call_kwargs(pipe, steps=1)
    kwargs.pop("generator")
    found = []
    for change in ({}, {"negative_prompt_embeds": 1.0}, {"prompt_embeds": 1.0}):
        sample = {key: value + change[key] if key in change else value for key, value in kwargs.items()}
        method = steer.calibrate(pipe, PAROAttention(block_size=4), [sample], progress=False)
        assert method.plan is not None
        found.append(method.plan.report["figures"]["error"]["chosen"])
    assert found[0] == found[1] != found[2]


def test_search_save_load_replay(tmp_path: Any) -> None:
    pipe = PIPELINES["wan21"].build()
    kwargs = PIPELINES["wan21"].call_kwargs(pipe, steps=4)
    kwargs.pop("generator")
    given = PAROAttention(block_size=4, density=0.3)
    method = steer.calibrate(pipe, given, [kwargs, kwargs], progress=False)
    assert given.plan is None
    assert method.plan is not None and method.plan.starts == paro.STARTS
    blocks = method.plan.tensors["blocks"]
    assert torch.equal(blocks[1], blocks[0])  # no step of four lies in [0.125, 0.25)
    assert not torch.equal(blocks[4], blocks[0])
    with steer.apply(pipe, method) as handle:
        wanted = generate(pipe, PIPELINES["wan21"].call_kwargs(pipe, steps=4))
        assert handle.stats["methods"][0]["density"] == pytest.approx(0.3, abs=1 / 18)
    method.save(str(tmp_path))
    loaded = steer.load(str(tmp_path))
    with steer.apply(pipe, loaded):
        assert torch.equal(generate(pipe, PIPELINES["wan21"].call_kwargs(pipe, steps=4)), wanted)


@pytest.mark.parametrize("done", [1, 2, 3])
def test_interrupted_search_finds_the_same(done: int, tmp_path: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    model = FAMILIES["wan21"].build()
    data = [FAMILIES["wan21"].inputs(model, torch.Generator().manual_seed(seed)) for seed in (0, 1)]
    method = PAROAttention(block_size=4)
    wanted = steer.calibrate(model, method, data, progress=False)
    forwards = itertools.count()
    look = paro.PAROSearch.before_forward

    def stop(self: Any, *args: Any) -> None:
        if next(forwards) == done:
            raise KeyboardInterrupt
        look(self, *args)

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(paro.PAROSearch, "before_forward", stop)
        steer.calibrate(model, method, data, progress=False, checkpoint=tmp_path)
    resumed = steer.calibrate(model, method, data, progress=False, checkpoint=tmp_path)
    assert wanted.plan is not None and resumed.plan is not None
    for name, tensor in wanted.plan.tensors.items():
        assert torch.equal(resumed.plan.tensors[name], tensor)
    assert resumed.plan.report["figures"] == wanted.plan.report["figures"]


def test_every_other_step() -> None:
    pipe = PIPELINES["wan21"].build()
    kwargs = PIPELINES["wan21"].call_kwargs(pipe, steps=4)
    kwargs.pop("generator")
    search = PAROAttention(block_size=4).search(every=2)
    with steer.apply(pipe, search):
        for number in range(2):
            search.start_pass(number)
            generate(pipe, {**kwargs, "generator": torch.Generator().manual_seed(0)})
    assert search._seen[:, 0].tolist() == [1, 0, 0, 0, 1]  # steps 0 and 2 of four


# What is refused


def test_no_plan() -> None:
    with pytest.raises(ValueError, match=r"needs a plan .* steer\.calibrate"):
        steer.apply(FAMILIES["wan21"].build(), PAROAttention())


def test_other_sizes_are_refused_before_the_forward() -> None:
    model = FAMILIES["wan21"].build()
    baseline = output(model, FAMILIES["wan21"].inputs(model))
    larger = FAMILIES["wan21"].inputs(model)
    larger["hidden_states"] = larger["hidden_states"].repeat(1, 1, 2, 1, 1)
    with steer.apply(model, PAROAttention(plan=plan_for(model))):
        with pytest.raises(ValueError, match=r"is for 3x4x6 visual tokens .* has 6x4x6: calibrate at this size"):
            output(model, larger)
        output(model, FAMILIES["wan21"].inputs(model))
    assert torch.equal(output(model, FAMILIES["wan21"].inputs(model)), baseline)
    with pytest.raises(ValueError, match="the data began with 3x4x6 visual tokens, this forward has 6x4x6"):
        steer.calibrate(model, PAROAttention(block_size=4), [FAMILIES["wan21"].inputs(model), larger], progress=False)
    assert torch.equal(output(model, FAMILIES["wan21"].inputs(model)), baseline)


def test_other_layers_are_refused() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_for(FAMILIES["cogvideox"].build())
    with (
        steer.apply(model, PAROAttention(plan=plan)),
        pytest.raises(ValueError, match=r"this plan has nothing for blocks\.0\.attn1"),
    ):
        output(model, FAMILIES["wan21"].inputs(model))


def test_other_settings_than_the_plans_are_refused() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_for(model, report={"density": 0.5})
    with pytest.raises(ValueError, match="block_size=64, but the plan was made for block_size=4"):
        steer.apply(model, PAROAttention(plan=plan, block_size=64))
    with pytest.raises(ValueError, match=r"density=0\.2, but the plan was made for density=0.5"):
        steer.apply(model, PAROAttention(plan=plan, density=0.2))


def test_plans_that_do_not_fit_themselves_are_refused() -> None:
    model = FAMILIES["wan21"].build()
    plan = plan_for(model)
    with pytest.raises(ValueError, match="one grid and one block size"):
        PAROAttention(plan=plan_for(model, block_size=None))
    with pytest.raises(ValueError, match=r"'blocks' must be torch.bool \(1, 3, 2, 9, 9\); it is .*18, 18"):
        PAROAttention(plan=plan_for(model, block_size=8))
    wrong = {**plan.tensors, "permutation": plan.tensors["permutation"] + 1}
    with pytest.raises(ValueError, match="numbers from 0 to 5"):
        PAROAttention(plan=plan_for(model, tensors=wrong))


def test_statistics_that_are_too_large_are_refused() -> None:
    model = FAMILIES["wan21"].build()
    with pytest.raises(ValueError, match=r"block sums of 1 step groups x 3 layers x 2 heads x 72 x 72 blocks take 0.0"):
        steer.calibrate(
            model, PAROAttention(block_size=1), [FAMILIES["wan21"].inputs(model)], progress=False, memory=1e-5
        )


@pytest.mark.parametrize(
    "options, message",
    [
        ({"criterion": "mass"}, "criterion='mass' does not exist; choose from error, paper"),
        ({"alpha": 1.5}, "alpha=1.5 must lie between 0 and 1"),
        ({"sparse_share": -0.1}, "sparse_share=-0.1"),
        ({"every": 0}, "every=0 must be at least 1"),
        ({"starts": (0.5,)}, "must be fractions of the run"),
    ],
)
def test_bad_options(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        PAROAttention().search(**options)


def test_bad_density() -> None:
    with pytest.raises(ValueError, match=r"density=1\.5"):
        PAROAttention(density=1.5)


def test_the_raster_criterion_keeps_the_order_of_the_model() -> None:
    """The control of the reordering: the same search for blocks, in THW alone."""
    model = FAMILIES["wan21"].build()
    kwargs = FAMILIES["wan21"].inputs(model)
    plain, chosen = (
        steer.calibrate(
            model, steer.PAROAttention(density=0.4, block_size=8), [kwargs], progress=False, criterion=criterion
        ).plan
        for criterion in ("raster", "error")
    )
    assert not plain.tensors["permutation"].any() and chosen.tensors["permutation"].any()
    raster, best = (plan.report["figures"]["error"] for plan in (plain, chosen))
    assert raster["raster"] == raster["chosen"] == pytest.approx(best["raster"], rel=1e-6)
    assert best["chosen"] < best["raster"]
