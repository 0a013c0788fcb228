"""VMoBA: its selections against loops and the card's densities, its output against the dense map under their mask."""

from __future__ import annotations

import dataclasses
import itertools
import math
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from dense import Edit, dense_attention, doubled, relative_norm
from probes import inputs_of, relative_error
from test_compile import Graphs
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import VMoBA
from steer.methods.vmoba import KINDS, PUBLISHED, Chunks, chunked, even, select_threshold, select_top_k
from steer.sparse import Tokens
from steer_patches.family import family_of

GRID = (3, 4, 6)
EXACT = 1e-12
VISIBLE = 1e-3
ODD = {"frames": 2, "window": (3, 4), "box": (2, 3, 4)}  # none divides the tiny grid
EVEN = {"frames": 1, "window": (2, 3), "box": (3, 2, 2)}


def competitors(scope: str, chunks: int, heads: int, queries: int) -> list[list[tuple[int, int, int]]]:
    """The (chunk, head, query) entries that compete with one another."""
    scopes: dict[Any, list[tuple[int, int, int]]] = {}
    for c, h, s in itertools.product(range(chunks), range(heads), range(queries)):
        key = {"query": (h, s), "head": h, "overall": 0, "block": c}[scope]
        scopes.setdefault(key, []).append((c, h, s))
    return list(scopes.values())


def by_loops(gate: Tensor, own: Tensor, scope: str, k: int | None = None, threshold: float | None = None) -> Tensor:
    """The card's selection on a gate (C, H, S), entry by entry."""
    values, mine = gate.tolist(), own.tolist()
    keep = own.clone()
    for entries in competitors(scope, *gate.shape):
        low = min(values[c][h][s] for c, h, s in entries)
        high = max(values[c][h][s] for c, h, s in entries)
        level = {(c, h, s): (values[c][h][s] - low) / (high - low) for c, h, s in entries}
        total = sum(level.values())
        own_entries = [e for e in entries if mine[e[0]][e[1]][e[2]]]
        others = sorted((e for e in entries if e not in own_entries), key=lambda e: -level[e])
        if k is not None:
            queries = len({(h, s) for _, h, s in entries})
            taken = others[: max(k * queries - len(own_entries), 0)]
        else:
            taken, held, wanted = [], 0.0, max((threshold or 0) - sum(level[e] / total for e in own_entries), 0)
            for entry in others:
                taken.append(entry)
                held += level[entry] / total
                if held >= wanted:
                    break
        for c, h, s in taken:
            keep[c, h, s] = True
    return keep


def card_gate() -> tuple[Tensor, Tensor]:
    """Six chunks, two heads, 24 queries in chunks of four, seed 0."""
    own = torch.arange(24) // 4 == torch.arange(6)[:, None, None]
    return torch.randn(6, 2, 24, generator=torch.Generator().manual_seed(0)), own.expand(6, 2, 24)


@pytest.mark.parametrize(
    "scope, densities",
    [
        ("query", [0.3333, 0.3333, 0.4167, 0.7431, 1.0]),
        ("head", [0.1736, 0.2118, 0.3924, 0.7917, 1.0]),
        ("overall", [0.1701, 0.2153, 0.3993, 0.8056, 1.0]),
    ],
)
def test_threshold_gives_the_published_densities(scope: str, densities: list[float]) -> None:
    """The published code has .5, .9931 and .9965 in the last column: it leaves out chunks at a threshold of 1."""
    gate, own = card_gate()
    for threshold, wanted in zip((0, 0.25, 0.5, 0.9, 1), densities, strict=True):
        chosen = select_threshold(gate, own, threshold, scope)
        assert round(chosen.double().mean().item(), 4) == wanted
        assert chosen[own].all()


@pytest.mark.parametrize("scope", ["query", "head", "overall", "block"])
@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 0.95])
def test_threshold_equals_loops(scope: str, threshold: float) -> None:
    gate, own = card_gate()
    gates = torch.stack([gate, gate.flip(0).exp()]).double()
    chosen = select_threshold(gates, own, threshold, scope)
    for row in range(2):
        assert torch.equal(chosen[row], by_loops(gates[row], own, scope, threshold=threshold))


@pytest.mark.parametrize("scope", ["query", "head", "overall"])
@pytest.mark.parametrize("k", [1, 2, 4, 6, 9])
def test_top_k_equals_loops(scope: str, k: int) -> None:
    gate, own = card_gate()
    gates = torch.stack([gate, gate.flip(0).exp()])
    chosen = select_top_k(gates, own, k, scope)
    for row in range(2):
        assert torch.equal(chosen[row], by_loops(gates[row], own, scope, k=k))
    assert chosen.sum() == 2 * 2 * 24 * min(k, 6)


def test_equal_gates_reach_no_threshold_so_everything_is_taken() -> None:
    gate, own = card_gate()
    assert select_threshold(torch.ones_like(gate), own, 0.5, "query").all()


def chunk_of(place: tuple[int, ...], tile: tuple[int, ...], grid: tuple[int, ...]) -> int:
    """The number of the tile that a token of the grid is in, tiles in raster order."""
    number = 0
    for at, step, size in zip(place, tile, grid, strict=True):
        number = number * math.ceil(size / step) + at // step
    return number


def tile_of(sizes: dict[str, Any], kind: str) -> tuple[int, int, int]:
    h, w = sizes["window"]
    return {"frames": (sizes["frames"], *GRID[1:]), "window": (GRID[0], h, w), "box": sizes["box"]}[kind]


@pytest.mark.parametrize("text, text_first", [(0, False), (5, False), (5, True)])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("sizes", [ODD, EVEN], ids=["odd", "even"])
def test_chunks_hold_their_tokens_and_give_them_back(
    sizes: dict[str, Any], kind: str, text: int, text_first: bool
) -> None:
    tokens, tile, block = Tokens(GRID, text, text_first), tile_of(sizes, kind), 8
    chunks: Chunks = chunked(tokens, tile, kind, block)
    numbers = torch.arange(tokens.length)
    x = numbers.double().view(1, 1, -1, 1) + 1
    padded = chunks.pad(x)
    assert torch.equal(padded.index_select(2, chunks.back), x)
    slots = padded.flatten().long().view(-1, block)
    coordinates = list(itertools.product(*map(range, GRID)))
    assert chunks.chunk_of_token.tolist() == [chunk_of(at, tile, GRID) for at in coordinates]
    seen = []
    for row, members in enumerate(slots.tolist()):
        held = [member - 1 for member in members if member]
        assert bool(chunks.partial[row]) == (len(held) < block)
        seen += held
        if row < len(chunks.chunk_of_block):
            assert chunks.tokens_in_block[row] == len(held)
            own = {chunk_of(coordinates[token - tokens.first], tile, GRID) for token in held}
            assert own == {int(chunks.chunk_of_block[row])}
        else:
            assert all(not tokens.first <= token < tokens.first + tokens.visual for token in held)
    assert sorted(seen) == numbers.tolist()


def test_chunks_follow_a_call_to_its_device() -> None:
    chunks = chunked(Tokens(GRID), (2, 3, 4), "box", 8)
    assert chunks.to(torch.device("cpu")) is chunks
    moved = chunks.to(torch.device("meta"))
    tables = [*vars(moved).values(), moved.rule.query, moved.rule.key]
    assert all(table.device.type == "meta" for table in tables if isinstance(table, torch.Tensor))


@pytest.mark.parametrize("dtype, bound", [(torch.float64, 1e-14), (torch.bfloat16, 1e-6)])
def test_mean_keys_are_those_of_the_chunks(dtype: torch.dtype, bound: float) -> None:
    """In fp32 where the keys are in bf16."""
    tokens = Tokens(GRID)
    chunks = chunked(tokens, (2, 3, 4), "box", 8)
    key = torch.randn(2, 3, tokens.length, 5, generator=torch.Generator().manual_seed(0)).to(dtype)
    means = chunks.mean_keys(chunks.pad(key))
    for c in range(len(chunks.blocks_of_chunk)):
        wanted = key[:, :, chunks.chunk_of_token == c].double().mean(2)
        assert (means[:, :, c].double() - wanted).abs().max() <= bound


Choice = Callable[[Tensor, Tensor], Tensor]


def routed(sizes: dict[str, Any], block: int, choice: Choice, router: str, text_first: bool, heads: list[int]) -> Edit:
    """The rule on the dense map, layer after layer: a gate is the mean score of a chunk's keys."""
    layers = itertools.count()
    visual = math.prod(GRID)

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        tile = tile_of(sizes, KINDS[next(layers) % 3])
        first = scores.shape[-1] - visual if text_first else 0
        chunk = torch.tensor([chunk_of(at, tile, GRID) for at in itertools.product(*map(range, GRID))])
        number = int(chunk.max()) + 1
        keep = torch.ones_like(scores, dtype=torch.bool)
        for row in range(len(scores)):
            inner = scores[row, :, first : first + visual, first : first + visual]
            gate = torch.stack([inner[:, :, chunk == c].mean(-1) for c in range(number)])
            own = (chunk == torch.arange(number)[:, None])[:, None].expand(gate.shape)
            # within a chunk tokens are in raster order, and blocks do not reach beyond it
            blocks = [part for c in range(number) for part in (chunk == c).nonzero().flatten().split(block)]
            if router == "pooled":
                pooled = torch.stack([gate[:, :, b].mean(-1) for b in blocks], -1)
                picked = choice(pooled, own[:, :, [int(b[0]) for b in blocks]])
            else:
                each = choice(gate, own)
                picked = torch.stack([each[:, :, b].any(-1) for b in blocks], -1)
            for h in heads:
                for i, queries in enumerate(blocks):
                    for c in range(number):
                        if not picked[c, h, i]:
                            hidden = (chunk == c).nonzero().flatten() + first
                            keep[row, h, (queries + first)[:, None], hidden] = False
        return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)

    return edit


CASES: list[tuple[dict[str, Any], Choice]] = [
    ({"k": 2}, lambda gate, own: by_loops(gate, own, "query", k=2)),
    ({"k": 3, "scope": "head"}, lambda gate, own: by_loops(gate, own, "head", k=3)),
    ({"k": 2, "scope": "overall"}, lambda gate, own: by_loops(gate, own, "overall", k=2)),
    ({"threshold": 0.4}, lambda gate, own: by_loops(gate, own, "query", threshold=0.4)),
    ({"threshold": 0.25, "scope": "head"}, lambda gate, own: by_loops(gate, own, "head", threshold=0.25)),
    ({"threshold": 0.6, "scope": "block"}, lambda gate, own: by_loops(gate, own, "block", threshold=0.6)),
]


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox"])
@pytest.mark.parametrize("router", ["pooled", "union"])
@pytest.mark.parametrize("case", range(len(CASES)), ids=lambda i: "-".join(f"{v}" for v in CASES[i][0].values()))
def test_output_is_attention_over_the_chunks_that_were_picked(name: str, router: str, case: int) -> None:
    """Every batch row, head and layer; the text of the second row of HunyuanVideo is padded."""
    settings, choice = CASES[case]
    family = FAMILIES[name]
    model = family.build().double()
    inputs = doubled(inputs_of(family, model))
    sizes, heads = (ODD, [0, 1]) if case % 2 == 0 else (EVEN, [1])
    method = VMoBA(**sizes, **settings, router=router, block_size=4, heads=heads)
    dense = output(model, inputs)
    with steer.apply(model, method) as handle:
        names = [site.name for site in handle.sites]
        result = output(model, doubled(inputs_of(family, model)))
    text_first = family_of(model).text_first  # type: ignore[union-attr]
    with dense_attention(model, names, routed(sizes, 4, choice, router, text_first, heads)):
        wanted = output(model, doubled(inputs_of(family, model)))
    assert relative_norm(result, wanted) <= EXACT
    assert relative_norm(dense, wanted) > VISIBLE


@pytest.mark.parametrize("settings", [{"k": 99}, {"threshold": 1.0}, {"frames": 9, "window": (9, 9), "box": (9, 9, 9)}])
@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox"])
def test_everything_chosen_or_one_chunk_is_dense(name: str, settings: dict[str, Any]) -> None:
    model = FAMILIES[name].build()
    dense = output(model, inputs_of(FAMILIES[name], model))
    with steer.apply(model, VMoBA(**{**ODD, **settings}, block_size=8)) as handle:
        assert relative_error(output(model, inputs_of(FAMILIES[name], model)), dense) <= 1e-5
        assert handle.stats["methods"][0]["density"] == 1.0


def test_layers_take_turns_by_their_number_in_the_model() -> None:
    """Alone, the second layer still has windows: 4 chunks of which 2 are kept, and the third has 6 boxes."""
    model = FAMILIES["wan21"].build()
    densities = []
    for layer in range(3):
        with steer.apply(model, VMoBA(**EVEN, k=2, block_size=4, layers=f"blocks.{layer}")) as handle:
            output(model, inputs_of(FAMILIES["wan21"], model))
            densities.append(handle.stats["methods"][0]["density"])
    assert densities == pytest.approx([2 / 3, 2 / 4, 2 / 6])


def test_union_computes_more_than_pooled() -> None:
    model = FAMILIES["wan21"].build()
    densities = {}
    for router in ("pooled", "union"):
        with steer.apply(model, VMoBA(**EVEN, k=2, block_size=8, router=router)) as handle:
            output(model, inputs_of(FAMILIES["wan21"], model))
            densities[router] = handle.stats["methods"][0]["density"]
    assert densities["pooled"] == pytest.approx((2 / 3 + 2 / 4 + 2 / 6) / 3)
    assert densities["union"] > densities["pooled"]


@pytest.mark.parametrize(
    "grid, chunks, k",
    [
        ((21, 30, 52), (7, 24, 72), (2, 6, 18)),
        ((21, 45, 80), (7, 40, 36), (2, 10, 9)),
        ((24, 36, 64), (8, 48, 72), (2, 12, 18)),
        ((36, 30, 52), (12, 24, 36), (3, 6, 9)),
    ],
)
def test_published_sizes_and_the_default_k(grid: Any, chunks: tuple[int, ...], k: tuple[int, ...]) -> None:
    assert grid in PUBLISHED
    method = VMoBA()
    for kind, number, wanted in zip(KINDS, chunks, k, strict=True):
        made = chunked(Tokens(grid), method.tile(grid, kind), kind, 128)
        assert len(made.blocks_of_chunk) == number
        own = torch.arange(number) == torch.arange(number)[:, None, None]
        gate = torch.randn(number, 1, number, generator=torch.Generator().manual_seed(0))
        assert (method.chosen(gate, own, kind).sum(0) == wanted).all()
        # what fills up the blocks: 12.5 % in the boxes of 480p, at most 7 % elsewhere
        waste = len(made.at) / math.prod(grid) - 1
        assert waste <= (0.126 if (grid[0], kind) == (21, "box") and grid[1] == 30 else 0.07)


@pytest.mark.parametrize("grid", [(13, 30, 52), (33, 45, 80), (1, 7, 11), (16, 17, 30), (3, 4, 6)])
def test_other_grids_get_about_as_many_chunks(grid: tuple[int, int, int]) -> None:
    targets = {"frames": (7, 1, 1), "window": (1, 6, 6), "box": (3, 4, 4)}
    for kind, wanted in targets.items():
        tile = VMoBA().tile(grid, kind)
        for size, step, target in zip(grid, tile, wanted, strict=True):
            assert 1 <= step <= size
            assert math.ceil(size / step) <= 1.5 * target
            assert math.ceil(size / step) >= min(size, target) / 2
    assert (even(52, 6), even(30, 6), even(45, 6)) == (13, 5, 9)
    assert even(17, 6) == 3  # a prime number of tokens: ragged


def test_published_flops() -> None:
    """Wan2.1-1.3B at 720p, a dense step and one of density .31: 1246.8 and 519.8 TFLOP, 2.40 times fewer.

    So the published ratio is that of a sparse step; with 12.5 of 50 steps dense it is 1.78. The published k of 2, 10
    and 9 by themselves have a density of .262.
    """
    tokens, width, layers, text = 21 * 45 * 80, 1536, 30, 512
    attention = layers * 4 * tokens**2 * width
    rest = layers * tokens * width * (8 * width + 4 * width + 4 * text + 4 * 8960)
    assert (attention + rest) / 1e12 == pytest.approx(1246.8, rel=0.005)
    sparse = 0.31 * attention + rest
    assert sparse / 1e12 == pytest.approx(519.8, rel=0.01)
    assert (attention + rest) / sparse == pytest.approx(2.40, abs=0.01)
    assert (attention + rest) / (0.25 * (attention + rest) + 0.75 * sparse) == pytest.approx(1.78, abs=0.01)


def test_presets_of_wan() -> None:
    model, tiny = FAMILIES["wan21"].build(), PIPELINES["wan21"]
    family = family_of(model)
    ours = VMoBA().resolved(family, True)
    assert (ours.steps, ours.k, ours.threshold, ours.frames) == ("0.25:", None, None, None)
    port = VMoBA(preset="fastvideo").resolved(family, True)
    assert (port.frames, port.window, port.box, port.threshold) == (2, (3, 4), (4, 6, 4), 0.25)
    grid = (20, 30, 52)
    chunks = [[math.ceil(a / b) for a, b in zip(grid, port.tile(grid, kind), strict=True)] for kind in KINDS]
    assert [math.prod(number) for number in chunks] == [10, 130, 325]
    pipe = tiny.build()
    with steer.apply(pipe, VMoBA(**EVEN, block_size=8)) as handle:
        generate(pipe, tiny.call_kwargs(pipe, steps=4))
        assert handle.stats["methods"][0]["active_forwards"] == 2 * 3  # the first of four steps is dense


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize("router", ["pooled", "union"])
def test_compiled_blocks_have_one_graph_for_each_kind_of_chunks(router: str) -> None:
    model = FAMILIES["wan21"].build()
    method = VMoBA(**ODD, k=2, router=router, block_size=8)
    with steer.apply(model, method):
        wanted = output(model, inputs_of(FAMILIES["wan21"], model))
    graphs = Graphs()
    model.compile_repeated_blocks(fullgraph=True, backend=graphs)
    with steer.apply(model, method):
        for _ in range(2):
            assert relative_error(output(model, inputs_of(FAMILIES["wan21"], model)), wanted) <= 1e-6
            assert graphs.count == 3


def test_a_forward_in_inference_mode_leaves_nothing_unusable() -> None:
    model = FAMILIES["wan21"].build()
    with steer.apply(model, VMoBA(**ODD, block_size=8)):
        with torch.inference_mode():
            first = output(model, inputs_of(FAMILIES["wan21"], model)).clone()
        assert torch.equal(output(model, inputs_of(FAMILIES["wan21"], model)), first)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"k": 0}, "k=0 must be at least 1"),
        ({"k": (2, 3)}, "must be 3 numbers"),
        ({"window": (2, 0)}, "must be 2 numbers, each at least 1"),
        ({"box": (2, 2)}, "must be 3 numbers"),
        ({"frames": 0}, "frames=0 must be at least 1"),
        ({"threshold": -0.1}, "must be 0 or more"),
        ({"k": 2, "threshold": 0.5}, "give either k or threshold"),
        ({"scope": "row"}, "choose from query, head, overall, block"),
        ({"router": "mean"}, "choose from pooled, union"),
    ],
)
def test_bad_settings_are_refused(settings: dict[str, Any], words: str) -> None:
    with pytest.raises(ValueError, match=words):
        VMoBA(**settings)


def test_scope_block_needs_a_threshold_and_images_are_refused() -> None:
    model = FAMILIES["wan21"].build()
    with pytest.raises(ValueError, match="needs a threshold"):
        steer.apply(model, VMoBA(scope="block"))
    with pytest.raises(steer.CompositionError, match="it draws single images"):
        steer.apply(FAMILIES["flux"].build(), VMoBA())


def test_the_expected_density_is_that_of_the_blocks() -> None:
    """What `steer simulate` reckons with, against the blocks that a forward computed."""
    model = FAMILIES["wan21"].build()
    method = steer.VMoBA(k=2, frames=1, window=(2, 3), box=(3, 2, 2), block_size=4, dense_layers=0)
    with steer.apply(model, method) as handle:
        output(model, inputs_of(FAMILIES["wan21"], model))
        bound = handle.bindings[0]
        for site, _ in bound.live.values():
            slots = len(site.kernel.extra.at) / site.kernel.tokens.length
            computed = float(site.kernel.extra.kept) * slots**2
            assert bound.method.expected_density(site.kernel.tokens, site) == pytest.approx(computed, rel=1e-5)
        threshold = dataclasses.replace(bound.method, k=None, threshold=0.5)
        assert threshold.expected_density(site.kernel.tokens, site) is None
