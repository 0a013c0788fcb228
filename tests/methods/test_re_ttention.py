"""Re-ttention against its rule in plain loops and its schedule on the full softmax map."""

from __future__ import annotations

import functools
import gc
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
import torch.nn.functional as F
from dense import relative_norm, softmax_map
from probes import inputs_of, relative_error
from test_compile import Graphs
from tiny import FAMILIES, FRAMES, HEIGHT, WIDTH, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

import steer
from steer import ReTtention
from steer.method import Method
from steer.methods.re_ttention import Kept, Memory
from steer.sparse import Tokens
from steer_kernels import patterns
from steer_patches.site import Call, Next

TOLERANCE = 1e-5
VIDEO, IMAGE = (FRAMES, HEIGHT, WIDTH), (1, HEIGHT, WIDTH)
THIN: dict[str, Any] = {"keep": 0.2, "block_size": 8}


@functools.cache
def published_mask(grid: tuple[int, int, int], keep: float, text: int = 0, text_first: bool = False) -> Tensor:
    """(S, S) bool, pair by pair: the band of an image, or the stripes of a video; text sees and is seen by all."""
    frames, per_frame = grid[0], grid[1] * grid[2]
    visual, first = frames * per_frame, text if text_first else 0
    mask = torch.ones(visual + text, visual + text, dtype=torch.bool)
    for q in range(visual):
        for k in range(visual):
            near = abs(q % per_frame - k % per_frame) <= int(per_frame * keep) // 2
            mask[first + q, first + k] = near
    return mask


def made(tokens: Tokens, **settings: Any) -> Any:
    method = ReTtention(**{"keep": 0.03125, "block_size": 128, **settings})
    return method.make(tokens, None)  # type: ignore[arg-type]  # the mask is the same at every site


def rows_of(tokens: Tokens, queries: Tensor, **settings: Any) -> Tensor:
    """(n, S) bool: the mask of some raster queries, over keys in raster order."""
    ready = made(tokens, **settings)
    if ready.order is None:
        return ready.mask.to_tokens(queries)[0, 0]
    return ready.order.undo(ready.mask.to_tokens(ready.order.to_raster[queries])[0, 0], 1)


@pytest.mark.parametrize("grid", [(1, 5, 7), (3, 4, 6), (4, 3, 5), (2, 7, 3)])
@pytest.mark.parametrize("text, text_first", [(0, False), (5, False), (9, True)])
@pytest.mark.parametrize("keep, block_size", [(0.03, 8), (0.2, 8), (0.5, 16)])
def test_mask_is_the_published_rule(
    grid: tuple[int, int, int], text: int, text_first: bool, keep: float, block_size: int
) -> None:
    tokens = Tokens(grid, text, text_first)
    rows = rows_of(tokens, torch.arange(tokens.length), keep=keep, block_size=block_size)
    assert torch.equal(rows, published_mask(grid, keep, text, text_first))


def test_density_of_a_pixart_mask() -> None:
    rows = rows_of(Tokens((1, 64, 64)), torch.arange(4096))
    assert rows.double().mean().item() == pytest.approx(0.031246, abs=5e-7)
    assert rows[2000].sum() == 129


def test_densities_of_a_cogvideox_mask() -> None:
    """A row depends on the position in the frame only, so one frame stands for all 13; text rows see everything."""
    tokens = Tokens((13, 30, 45), text=226, text_first=True)
    rows = rows_of(tokens, 226 + torch.arange(1350)).double()
    assert tokens.length == 17776
    assert rows[:, 226:].mean().item() == pytest.approx(0.031598, abs=5e-7)
    assert rows[700, 226:].sum() == 43 * 13
    assert (226 + 13 * rows.mean(1).sum().item()) / tokens.length == pytest.approx(0.056066, abs=5e-7)
    in_raster = patterns.multi_diagonal(tokens_per_frame=1350, frames=13, width=21, text_tokens=226, text_first=True)
    assert made(tokens).mask.density < 0.08 < 0.2 < in_raster.density  # in blocks of 128


@dataclass(eq=False)
class Remembered:
    """Of one attention module and one call of the step."""

    rho: Tensor
    rest: Tensor


@dataclass(eq=False)
class Plain(TorchFunctionMode):
    """The schedule on the full softmax map, in place of the attention of the modules `names`.

    Args:
        grid, text_first: of the tokens; what is not on the grid is text.
        start: the first step that is not dense.
        calls: attention calls of a module in a step.
        rows, heads: that are edited.
    """

    names: list[str]
    grid: tuple[int, int, int]
    text_first: bool
    start: int
    calls: int = 1
    period: int = 5
    ramp: float = 0.04
    clamp: bool = False
    rows: slice = field(default_factory=lambda: slice(None))
    heads: list[int] | None = None
    inside: str | None = None
    counts: dict[str, int] = field(default_factory=dict)
    memory: dict[tuple[str, int], Remembered] = field(default_factory=dict)

    def __post_init__(self) -> None:
        super().__init__()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.inside:
            return self.attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def attend(self, query: Tensor, key: Tensor, value: Tensor, attn_mask: Any = None, **options: Any) -> Tensor:
        name = self.inside or ""
        count = self.counts.get(name, 0)
        self.counts[name] = count + 1
        step, call = divmod(count, self.calls)
        scores, weights = softmax_map(query, key, attn_mask, scale=options.get("scale"))
        full = weights @ value
        if step < self.start:
            return full
        mask = published_mask(self.grid, 0.2, query.shape[2] - math.prod(self.grid), self.text_first)
        narrow = scores.masked_fill(~mask, -torch.inf).softmax(-1) @ value
        if (step - self.start) % self.period == 0:
            rho = (weights * mask).sum(-1, keepdim=True)
            self.memory[name, call] = Remembered(rho, full - rho * narrow)
            return full
        known = self.memory[name, call]
        edited = known.rho * narrow + known.rest
        known.rho = known.rho + self.ramp
        if self.clamp:
            known.rho = known.rho.clamp(max=1)
        out = full.clone()
        for head in range(query.shape[1]) if self.heads is None else self.heads:
            out[self.rows, head] = edited[self.rows, head]
        return out

    @contextmanager
    def replacing(self, model: nn.Module) -> Iterator[None]:
        def enter(name: str) -> Any:
            def hook(*_: Any) -> None:
                self.inside = name

            return hook

        def leave(*_: Any) -> None:
            self.inside = None

        hooks: list[Any] = []
        for name in self.names:
            module = model.get_submodule(name)
            hooks += [module.register_forward_pre_hook(enter(name)), module.register_forward_hook(leave)]
        try:
            with self:
                yield
            assert self.memory
        finally:
            for hook in hooks:
                hook.remove()


def names_of(model: nn.Module) -> list[str]:
    return [site.name for site in steer.sites(model) if site.kind in ReTtention.kinds]


PLAIN_CASES: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "two-calls": ("wan21", {}, {}),
    "one-call": ("cogvideox", {}, {}),
    "image": ("pixart", {}, {}),
    "row-by-row": ("mochi", {}, {}),
    "clamped": ("wan21", {"clamp": True, "ramp": 0.3}, {"clamp": True, "ramp": 0.3}),
    "short-period": ("cogvideox", {"period": 3}, {"period": 3}),
    "one-head": ("cogvideox", {"heads": [1]}, {"heads": [1]}),
    "rows": ("cogvideox", {"rows": "cond"}, {"rows": slice(1, 2)}),
}


@pytest.mark.parametrize("case", PLAIN_CASES)
def test_runs_equal_the_schedule_on_the_full_map(case: str) -> None:
    name, settings, plain_settings = PLAIN_CASES[case]
    tiny = PIPELINES[name]
    pipe, steps, start = tiny.build(), 9, 2
    calls, grid = 2 if name in ("wan21", "mochi") else 1, IMAGE if name == "pixart" else VIDEO
    plain = Plain(names_of(pipe.transformer), grid, name == "cogvideox", start, calls, **plain_settings)
    with plain.replacing(pipe.transformer):
        wanted = generate(pipe, tiny.call_kwargs(pipe, steps=steps))
    assert set(plain.counts.values()) == {steps * calls}
    baseline = generate(pipe, tiny.call_kwargs(pipe, steps=steps))
    with steer.apply(pipe, ReTtention(steps=f"{start}:", **THIN, **settings)):
        steered = generate(pipe, tiny.call_kwargs(pipe, steps=steps))
    assert relative_error(steered, wanted) <= TOLERANCE
    assert relative_error(baseline, wanted) > 100 * TOLERANCE


MODELS = ["wan21", "hunyuan_video", "hunyuan_video15", "cogvideox", "ltx", "mochi", "flux", "sd3", "pixart"]


@pytest.mark.parametrize("name", MODELS)
def test_unchanged_inputs_give_the_full_output_again(name: str) -> None:
    """A refresh is the model's own attention; without a ramp the sparse forwards after it repeat its output."""
    family = FAMILIES[name]
    model = family.build()
    baseline = output(model, inputs_of(family, model))
    with steer.apply(model, ReTtention(ramp=0.0, period=3, **THIN)) as handle:
        results, densities = [], []
        for _ in range(4):
            results.append(output(model, inputs_of(family, model)))
            densities.append(handle.stats["methods"][0]["density"])
    assert torch.equal(results[0], baseline) and torch.equal(results[3], baseline)
    assert relative_error(results[1], baseline) <= TOLERANCE >= relative_error(results[2], baseline)
    assert not torch.equal(results[1], baseline)
    band = 2 * densities[1] - 1  # the mean over the forwards so far, of which the first and the fourth are full
    assert densities[0] == 1 and 0 < band < 1
    assert densities[2:] == [pytest.approx((1 + 2 * band) / 3), pytest.approx((2 + 2 * band) / 4)]


@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "pixart"])
def test_the_ramp_has_an_effect(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    baseline = output(model, inputs_of(family, model))
    with steer.apply(model, ReTtention(**THIN)):
        errors = [relative_error(output(model, inputs_of(family, model)), baseline) for _ in range(4)]
    assert errors[0] == 0 and errors[1] <= TOLERANCE < errors[2] < errors[3]


@dataclass(kw_only=True)
class Record(Method, register=False):
    """Keeps the calls that it sees, by site."""

    stage: ClassVar[str] = "inputs"
    layers: Any = "*"
    calls: dict[str, Call] = field(default_factory=dict)

    def attend(self, call: Call, next: Next) -> Tensor:
        self.calls[call.site.name] = call
        return next(call)


@pytest.mark.parametrize("backend", [None, "gather", "reference"])
@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox"])
def test_rho_is_the_ratio_of_the_denominators(name: str, backend: str | None) -> None:
    family = FAMILIES[name]
    model, record = family.build(), Record()
    with steer.apply(model, record, ReTtention(backend=backend, **THIN)) as handle:
        output(model, inputs_of(family, model))
        ready = {site.name: site.kernel for site in handle.sites if site.kernel is not None}
        memories = {site: list(prepared.extra[1].now) for site, prepared in ready.items()}  # freed on removal
    assert ready
    for site, prepared in ready.items():
        call = record.calls[site]
        text_first = name == "cogvideox"
        mask = published_mask(VIDEO, 0.2, prepared.tokens.text, text_first)
        exact = (x.double() for x in (call.query, call.key))
        _, weights = softmax_map(*exact, call.mask, scale=call.scale)
        wanted = (weights * mask).sum(-1)
        assert 0 < wanted.min() < 0.2
        (kept,) = memories[site]
        assert kept.rho.dtype == torch.float32
        assert (prepared.order.undo(kept.rho, 2) - wanted).abs().max() <= 1e-6


def test_period_of_one_is_not_installed() -> None:
    pipe = PIPELINES["wan21"].build()
    with steer.apply(pipe, ReTtention(period=1, **THIN)) as handle:
        assert handle.sites == []


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "pixart"])
@pytest.mark.parametrize("steps", ["4:", "3:4", "0:1"])
def test_dense_steps_and_a_refresh_alone_are_the_baseline(name: str, steps: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    baseline = generate(pipe, tiny.call_kwargs(pipe, steps=4))
    with steer.apply(pipe, ReTtention(steps=steps, **THIN)) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, steps=4)), baseline)
        assert (handle.stats["methods"][0]["active_forwards"] > 0) == (steps != "4:")


@pytest.mark.parametrize("name", ["wan21", "cogvideox", "hunyuan_video"])
def test_every_key_and_no_ramp_is_dense_attention(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    baseline = generate(pipe, tiny.call_kwargs(pipe, steps=4))
    with steer.apply(pipe, ReTtention(keep=1.0, ramp=0.0, steps="1:", block_size=8)):
        # not exactly: what R was at the refresh is the error of one kernel against the other
        assert relative_error(generate(pipe, tiny.call_kwargs(pipe, steps=4)), baseline) <= TOLERANCE


@pytest.mark.parametrize(
    "name, steps, refreshed", [("pixart", 20, [5, 10, 15]), ("cogvideox", 50, [15, 20, 25, 30, 35, 40, 45])]
)
def test_presets_refresh_at_the_published_steps(name: str, steps: int, refreshed: list[int]) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    seen: dict[int, float] = {}
    with steer.apply(pipe, ReTtention(block_size=8)) as handle:
        method = handle.bindings[0].method
        assert (method.keep, method.ramp, method.period) == (0.03125, 0.04, 5)

        def note(*_: Any) -> None:
            row = handle.stats["methods"][0]
            if row["active_forwards"]:
                seen[refreshed[0] + row["active_forwards"] - 1] = row["density"]

        hook = pipe.transformer.register_forward_hook(note)
        generate(pipe, tiny.call_kwargs(pipe, steps=steps))
        hook.remove()
    assert list(seen) == list(range(refreshed[0], steps))
    total = {step: density * (step - refreshed[0] + 1) for step, density in seen.items()}
    added = {step: total[step] - total.get(step - 1, 0.0) for step in seen}
    assert [step for step, density in added.items() if density > 0.99] == refreshed


@pytest.mark.parametrize("name", ["wan21", "cogvideox"])
def test_nothing_leaks_into_the_next_run_and_all_is_freed(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    runs = [{"steps": 9}, {"steps": 6, "seed": 1}]  # refreshed at 5 and at 3
    alone = []
    for options in runs:
        with steer.apply(pipe, ReTtention(steps="0.5:", **THIN)):
            alone.append(generate(pipe, tiny.call_kwargs(pipe, **options)))
    with steer.apply(pipe, ReTtention(steps="0.5:", **THIN)) as handle:
        for options, wanted in zip(runs * 2, alone * 2, strict=True):
            assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, **options)), wanted)
        gc.collect()
        kept = [site.kernel.extra[1] for site in handle.sites]
        assert kept and not any(memory.last or memory.now for memory in kept)


def test_another_batch_or_grid_begins_anew() -> None:
    """On a bare model, where no clock says that a run begins."""
    family = FAMILIES["wan21"]
    model = family.build()
    inputs = inputs_of(family, model)
    single = {key: value[:1] for key, value in inputs.items()}
    turned = inputs | {"hidden_states": inputs["hidden_states"].transpose(-1, -2).contiguous()}
    baselines = [output(model, dict(kwargs)) for kwargs in (inputs, single, turned)]
    with steer.apply(model, ReTtention(**THIN)):
        for _ in range(2):
            output(model, dict(inputs))
        assert relative_error(output(model, dict(single)), baselines[1]) <= TOLERANCE
        assert torch.equal(output(model, dict(turned)), baselines[2])
        assert torch.equal(output(model, dict(inputs)), baselines[0])


def test_every_perturbed_pass_has_a_memory_of_its_own() -> None:
    """A second guidance method of no weight changes nothing for the first."""
    tiny = PIPELINES["cogvideox"]
    pipe = tiny.build()
    results = []
    for others in ([], [steer.SEG(layers="transformer_blocks.1", scale=1e-12)]):
        with steer.apply(
            pipe, ReTtention(steps="0:", **THIN), steer.PAG(layers="transformer_blocks.0", share_prefix=False), *others
        ):
            results.append(generate(pipe, tiny.call_kwargs(pipe, steps=4)))
    assert relative_error(results[1], results[0]) <= TOLERANCE


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.usefixtures("fresh_dynamo")
@pytest.mark.parametrize(
    "name, whole, scale, residual",
    [("wan21", False, 1.0, "int8"), ("wan21", False, 4.0, "device"), ("cogvideox", True, 4.0, "device")],
)
def test_compiled_runs_equal_eager_ones(name: str, whole: bool, scale: float, residual: str) -> None:
    """In two graphs, a refresh and a sparse step, and as many for another kind of rows; none of them for a layer."""
    tiny, settings = PIPELINES[name], {"steps": "0:", "residual": residual, **THIN}
    pipe, kinds_of_rows = tiny.build(), 2 if name == "wan21" and scale > 1 else 1

    def run() -> Tensor:
        return generate(pipe, tiny.call_kwargs(pipe, steps=7, guidance_scale=scale))

    with steer.apply(pipe, ReTtention(**settings)):
        wanted = run()
    graphs, model = Graphs(), pipe.transformer
    (model.compile if whole else model.compile_repeated_blocks)(fullgraph=True, backend=graphs)
    with steer.apply(pipe, ReTtention(**settings)):
        for _ in range(2):
            assert relative_error(run(), wanted) <= TOLERANCE
    assert 2 <= graphs.count <= 2 * kinds_of_rows


def test_where_the_residual_stays() -> None:
    tiny, runs, kept = PIPELINES["wan21"], {}, {}
    pipe = tiny.build()
    for residual in ("device", "cpu", "int8"):
        with steer.apply(pipe, ReTtention(steps="0:", residual=residual, **THIN)):
            runs[residual] = generate(pipe, tiny.call_kwargs(pipe, steps=4))
    assert torch.equal(runs["cpu"], runs["device"])
    assert TOLERANCE < relative_norm(runs["int8"], runs["device"]) < 0.01
    for residual in ("device", "int8"):
        model = FAMILIES["wan21"].build()
        with steer.apply(model, ReTtention(residual=residual, **THIN)) as handle:
            output(model, inputs_of(FAMILIES["wan21"], model))
            kept[residual] = memory_of(handle.sites[0]).now[0]
    exact, rounded = kept["device"].residual, kept["int8"]
    assert rounded.residual.dtype == torch.int8 and rounded.scale is not None
    step = exact.abs().amax(-1, keepdim=True) / 127
    assert ((rounded.residual * rounded.scale - exact).abs() <= 0.5001 * step).all()


def memory_of(site: Any) -> Memory:
    memory = site.kernel.extra[1]
    assert isinstance(memory, Memory) and all(isinstance(kept, Kept) for kept in memory.now)
    return memory


def test_bad_settings_are_refused() -> None:
    for settings in (
        {"keep": 0.0},
        {"keep": 1.5},
        {"ramp": -0.1},
        {"ramp": float("nan")},
        {"period": 0},
        {"residual": "disk"},
    ):
        with pytest.raises(ValueError, match=f"{next(iter(settings))}="):
            ReTtention(**settings)


def test_the_expected_density_counts_the_refresh_steps() -> None:
    """One step in five computes the whole map twice, besides the band."""
    found = steer.simulate("cogvideox-2b", steer.ReTtention())
    band = 0.078  # at 128-token blocks, text included
    assert found.density == pytest.approx(band + 2 / 5, abs=2e-3)
    assert found.sparse_steps == 35


def test_bare_models_keep_cfg_branches_apart() -> None:
    """The pipeline announces its branches to the model itself; so far as it does, a clock is not needed."""
    pipe = PIPELINES["wan21"].build()
    settings = {"steps": ":", "dense_layers": 0, "block_size": 8, "keep": 0.2, "period": 3}
    results = []
    for target in (pipe, pipe.transformer):
        with steer.apply(target, ReTtention(**settings)):
            results.append(generate(pipe, PIPELINES["wan21"].call_kwargs(pipe, steps=4)))
    assert torch.equal(*results)


def test_training_steps_do_not_reach_back() -> None:
    """What earlier forwards kept is a constant."""
    model = FAMILIES["wan21"].build().requires_grad_()
    with steer.apply(model, ReTtention(block_size=8, keep=0.2, period=3)) as handle:
        for _ in range(4):
            model(**inputs_of(FAMILIES["wan21"], model)).sample.square().mean().backward()
        memories = handle.bindings[0].method._memories.values()
        assert not any(kept.residual.requires_grad for memory in memories for kept in memory.now)


def test_removal_frees_what_a_bare_model_keeps() -> None:
    model = FAMILIES["wan21"].build()
    with steer.apply(model, ReTtention(block_size=8, keep=0.2)) as handle:
        output(model, inputs_of(FAMILIES["wan21"], model))
        assert handle.bindings[0].method._memories
    assert not handle.bindings[0].method._memories
