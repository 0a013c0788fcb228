"""The generic table of the sparse methods: what each must satisfy on every family that it works on."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from diffusers import FirstBlockCacheConfig
from probes import Scale, assert_untouched, inputs_of, relative_error, snapshot
from test_compile import Graphs
from tiny import FAMILIES, FRAMES, HEIGHT, WIDTH, moved, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer.method_table import works_on
from steer.plan import Plan
from steer.sparse import Sparse
from steer_patches.family import family_of

TOLERANCE = 1e-5
VISIBLE = 1e-4


@dataclass(frozen=True)
class Case:
    """Settings of a method for the tiny models.

    Args:
        edit: settings with an effect on a sequence of 72 tokens.
        full: settings under which every key is seen.
        forwards: of a bare model until the effect is there: a method with a memory is dense in the first.
        plan: from a model, the plan that the method needs besides.
        graphs: more than one where layers or steps compute different things.
    """

    edit: dict[str, Any]
    full: dict[str, Any]
    forwards: int = 1
    plan: Callable[[Any, dict[str, Any]], Plan] | None = None
    graphs: int = 1


def modes(model: Any, settings: dict[str, Any]) -> Plan:
    """The bands of Sparse-vDiT by turns, or every head full."""
    names, heads = layers_of(model)
    chosen = torch.arange(len(names) * heads).view(1, len(names), heads) % 3 + 2
    return Plan(names, heads, tensors={"mode": (chosen * (settings["density"] < 1)).to(torch.int8)})


def orders(model: Any, settings: dict[str, Any]) -> Plan:
    """PAROAttention's six orders by turns, with random blocks and those on the diagonal, or with all blocks."""
    names, heads = layers_of(model)
    grid = (FRAMES if family_of(model).video else 1, HEIGHT, WIDTH)
    block = settings.get("block_size", 8)
    n = -(-math.prod(grid) // block)
    chance = torch.rand(1, len(names), heads, n, n, generator=torch.Generator().manual_seed(0))
    tensors = {
        "permutation": (torch.arange(len(names) * heads).view(len(names), heads) % 6).to(torch.int8),
        "blocks": (chance < settings["density"]) | torch.eye(n, dtype=torch.bool),
    }
    return Plan(names, heads, grid, None, block, tensors=tensors, report={"density": settings["density"]})


def layers_of(model: Any) -> tuple[tuple[str, ...], int]:
    """Names of the self- and joint attention sites, and their heads."""
    found = [site for site in steer.sites(model) if site.kind in ("self", "joint")]
    return tuple(site.name for site in found), found[0].heads


CASES: dict[str, Case] = {
    "NeighborhoodAttention": Case({"block_size": 8, "window": 2}, {"block_size": 128, "window": 99}),
    "PAROAttention": Case({"density": 0.4}, {"density": 1.0}, plan=orders),
    "RadialAttention": Case({"block_size": 8, "decay": 0.1}, {"block_size": 128}),
    "ReTtention": Case(  # steps that refresh, and steps between
        {"block_size": 8, "keep": 0.2}, {"block_size": 8, "keep": 1.0, "ramp": 0.0}, forwards=3, graphs=2
    ),
    "SparseVDiT": Case(  # layers with heads that are permuted, and without
        {"block_size": 8, "density": 0.3}, {"block_size": 8, "density": 1.0}, plan=modes, graphs=2
    ),
    "VMoBA": Case(  # the three kinds of chunks are of one shape here; they have a graph each where they are not
        {"block_size": 8, "frames": 1, "window": (4, 2), "box": (3, 4, 2), "k": 2}, {"block_size": 8, "k": 99}
    ),
}
METHODS = {name: cls for name, cls in steer.methods().items() if issubclass(cls, Sparse)}
MODELS = [name for name in FAMILIES if name not in ("llama", "llava")]


def pairs() -> list[Any]:
    """(method, tiny model) for each pair that the registry says works."""
    return [
        pytest.param(method, name, id=f"{method}-{name}")
        for method, cls in METHODS.items()
        for name in MODELS
        if works_on(cls, family_of(FAMILIES[name].build()))
    ]


def make(method: str, model: Any, full: bool = False, **settings: Any) -> Sparse:
    """The method with an effect on tiny models, or seeing everything; no layer and no step is dense."""
    case = CASES[method]
    given = {"dense_layers": 0, "steps": None, **(case.full if full else case.edit), **settings}
    if case.plan is not None:
        given["plan"] = case.plan(model, given)
    return METHODS[method](**given)


def forward(model: Any, name: str, method: str) -> Tensor:
    """The output of the last of as many forwards as the method needs."""
    for _ in range(CASES[method].forwards):
        result = output(model, inputs_of(FAMILIES[name], model))
    return result


def run(model: Any, name: str, method: Sparse) -> Tensor:
    with steer.apply(model, method):
        return forward(model, name, type(method).__name__)


def test_every_method_has_a_case() -> None:
    assert set(CASES) == set(METHODS)


@pytest.mark.parametrize("method, name", pairs())
def test_edit_is_visible_and_removal_exact(method: str, name: str) -> None:
    model = FAMILIES[name].build()
    baseline = output(model, inputs_of(FAMILIES[name], model))
    before = snapshot(model)
    handle = steer.apply(model, make(method, model))
    steered = forward(model, name, method)
    density = handle.stats["methods"][0]["density"]
    handle.remove()
    assert 0 < density < 1
    assert relative_error(steered, baseline) > VISIBLE
    assert torch.equal(output(model, inputs_of(FAMILIES[name], model)), baseline)
    assert_untouched(before, model)
    assert torch.equal(run(model, name, make(method, model)), steered)


@pytest.mark.parametrize("method, name", pairs())
def test_at_full_density_it_is_dense_attention(method: str, name: str) -> None:
    model = FAMILIES[name].build()
    baseline = output(model, inputs_of(FAMILIES[name], model))
    assert relative_error(run(model, name, make(method, model, full=True)), baseline) <= TOLERANCE


@pytest.mark.parametrize("method, name", pairs())
def test_padded_text_stays_unseen(method: str, name: str) -> None:
    """What stands in the padding of a prompt has no effect on the prediction."""
    model = FAMILIES[name].build()
    kwargs = inputs_of(FAMILIES[name], model)
    mask = kwargs.get("encoder_attention_mask", kwargs.get("encoder_hidden_states_mask"))
    if mask is None or "encoder_hidden_states" not in kwargs or mask.all():
        pytest.skip("this family takes no text mask")
    text = kwargs["encoder_hidden_states"].clone()
    text[-1][~mask[-1].bool()] += 10.0
    results = []
    for changes in ({}, {"encoder_hidden_states": text}):
        with steer.apply(model, make(method, model)):
            for _ in range(CASES[method].forwards):
                result = output(model, inputs_of(FAMILIES[name], model) | changes)
        results.append(result)
    assert relative_error(results[1], results[0]) <= TOLERANCE


@pytest.mark.parametrize("method", METHODS)
def test_inactive_steps_are_bit_identical(method: str) -> None:
    tiny = PIPELINES["wan21"]
    pipe = tiny.build()
    baseline = generate(pipe, tiny.call_kwargs(pipe, steps=3))
    with steer.apply(pipe, make(method, pipe.transformer, steps="7:9")) as handle:
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, steps=3)), baseline)
        assert handle.stats["methods"][0]["active_forwards"] == 0


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name, forwards_a_step", [("wan21", 2), ("cogvideox", 1)])
def test_dense_first_steps_are_counted_once_a_step(method: str, name: str, forwards_a_step: int) -> None:
    """Two calls of classifier-free guidance, or one with both rows, are one step."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    kwargs = {"steps": 4, "guidance_scale": 4.0}
    baseline = generate(pipe, tiny.call_kwargs(pipe, **kwargs))
    with steer.apply(pipe, make(method, pipe.transformer, steps="0.5:")) as handle:
        steered = generate(pipe, tiny.call_kwargs(pipe, **kwargs))
        assert handle.stats["methods"][0]["active_forwards"] == 2 * forwards_a_step
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, **kwargs)), steered)
    assert relative_error(steered, baseline) > VISIBLE
    assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, **kwargs)), baseline)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["wan21", "cogvideox", "hunyuan_video", "ltx"])
@pytest.mark.parametrize("guidance_scale", [1.0, 4.0])
def test_rows_of_a_batch_are_independent(method: str, name: str, guidance_scale: float) -> None:
    """A batch of two prompts gives what each gives alone, with and without classifier-free guidance."""
    tiny = PIPELINES[name]
    pipe = tiny.build()
    both = tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale)
    one = {k: v[:1] if isinstance(v, Tensor) and v.shape[0] == 2 else v for k, v in both.items()}
    with steer.apply(pipe, make(method, pipe.transformer)):
        together = generate(pipe, tiny.call_kwargs(pipe, batch=2, guidance_scale=guidance_scale))
        alone = generate(pipe, one | {"generator": tiny.call_kwargs(pipe)["generator"]} if "generator" in one else one)
    assert relative_error(together[:1], alone) <= 1e-4


@pytest.mark.parametrize("method", METHODS)
def test_another_resolution_never_reuses_a_mask(method: str) -> None:
    family = FAMILIES["wan21"]
    model = family.build()
    small = inputs_of(family, model)
    wide = small | {"hidden_states": torch.cat([small["hidden_states"]] * 2, dim=-1)}
    long = small | {"hidden_states": torch.cat([small["hidden_states"]] * 2, dim=2)}
    if method == "PAROAttention":
        with steer.apply(model, make(method, model)):
            wanted = output(model, dict(small))
            for other in (wide, long):
                with pytest.raises(ValueError, match="this plan of PAROAttention is for 3x4x6 visual tokens"):
                    output(model, dict(other))
            assert torch.equal(output(model, dict(small)), wanted)
        return
    forwards = CASES[method].forwards

    def last(kwargs: dict[str, Any]) -> Tensor:
        return [output(model, dict(kwargs)) for _ in range(forwards)][-1]

    alone = []
    for kwargs in (small, wide, long):
        with steer.apply(model, make(method, model)):
            alone.append(last(kwargs))
    with steer.apply(model, make(method, model)):
        for _ in range(2):
            for kwargs, wanted in zip((small, wide, long), alone, strict=True):
                assert torch.equal(last(kwargs), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_heads_that_are_not_chosen_stay_dense(method: str) -> None:
    """All heads chosen one by one are the method; of one head the effect is smaller."""
    model = FAMILIES["wan21"].build()
    baseline = output(model, inputs_of(FAMILIES["wan21"], model))
    heads = steer.sites(model)[0].heads
    every = run(model, "wan21", make(method, model))
    assert relative_error(run(model, "wan21", make(method, model, heads=range(heads))), every) <= TOLERANCE
    first = run(model, "wan21", make(method, model, heads=[0]))
    last = run(model, "wan21", make(method, model, heads=[heads - 1]))
    assert relative_error(first, baseline) > VISIBLE < relative_error(last, baseline)
    assert relative_error(first, last) > VISIBLE < relative_error(first, every)


@pytest.mark.parametrize("method", METHODS)
def test_min_tokens_keeps_short_sequences_dense(method: str) -> None:
    model = FAMILIES["wan21"].build()
    baseline = output(model, inputs_of(FAMILIES["wan21"], model))
    assert torch.equal(run(model, "wan21", make(method, model, min_tokens=73)), baseline)
    assert relative_error(run(model, "wan21", make(method, model, min_tokens=72)), baseline) > VISIBLE


@pytest.mark.parametrize("method", METHODS)
def test_dense_layers_are_the_leading_ones(method: str) -> None:
    model = FAMILIES["hunyuan_video"].build()
    handle = steer.apply(model, make(method, model, dense_layers=2))
    names = [site.name for site in handle.sites]
    handle.remove()
    everything = [site.name for site in steer.sites(model) if site.kind == "joint"]
    assert names == everything[2:]
    with pytest.raises(steer.SelectorError, match="dense_layers=99"):
        steer.apply(model, make(method, model, dense_layers=99))


@pytest.mark.parametrize("method", METHODS)
def test_save_and_load_replay_exactly(method: str, tmp_path: Any) -> None:
    model = FAMILIES["wan21"].build()
    original = make(method, model)
    steered = run(model, "wan21", original)
    original.save(tmp_path)
    loaded = steer.load(tmp_path)
    assert type(loaded) is type(original)
    assert loaded.settings().keys() == original.settings().keys()
    assert torch.equal(run(model, "wan21", loaded), steered)


@pytest.mark.parametrize("method", METHODS)
def test_two_at_one_site_are_refused_and_other_stages_compose(method: str) -> None:
    model = FAMILIES["wan21"].build()
    baseline = output(model, inputs_of(FAMILIES["wan21"], model))
    before = snapshot(model)
    with steer.apply(model, make(method, model)):
        alone = forward(model, "wan21", method)
        for other in METHODS:
            with pytest.raises(steer.CompositionError):
                steer.apply(model, make(other, model))
        with steer.apply(model, Scale(layers="blocks.*.attn1", factor=0.7)):
            scaled = output(model, inputs_of(FAMILIES["wan21"], model))
        if CASES[method].forwards == 1:
            assert torch.equal(output(model, inputs_of(FAMILIES["wan21"], model)), alone)
    assert relative_error(scaled, alone) > VISIBLE
    assert torch.equal(output(model, inputs_of(FAMILIES["wan21"], model)), baseline)
    assert_untouched(before, model)


@pytest.mark.parametrize("method", METHODS)
def test_guidance_over_sparse_attention(method: str) -> None:
    """PAG's second pass is sparse as well: the same with and without the shared prefix."""
    tiny = PIPELINES["wan21"]
    pipe = tiny.build()
    results = []
    for share in (True, False):
        with steer.apply(pipe, make(method, pipe.transformer), steer.PAG(layers="blocks.1", share_prefix=share)):
            results.append(generate(pipe, tiny.call_kwargs(pipe, steps=3)))
    with steer.apply(pipe, make(method, pipe.transformer)):
        unguided = generate(pipe, tiny.call_kwargs(pipe, steps=3))
    assert relative_error(results[0], results[1]) <= 1e-4
    assert relative_error(results[0], unguided) > VISIBLE


@pytest.mark.parametrize("method", METHODS)
def test_documented(method: str) -> None:
    doc = METHODS[method].__doc__ or ""
    assert "Source:" in doc and "Args:" in doc and "arXiv" in doc


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "name, whole",
    [
        ("wan21", True),
        ("wan21", False),
        pytest.param("hunyuan_video", False, marks=pytest.mark.slow),
        ("cogvideox", True),
        *[
            pytest.param(name, True, marks=pytest.mark.slow)
            for name in ("ltx", "cosmos", "flux", "qwen_image", "sd3", "pixart")
        ],
        pytest.param(
            "mochi",
            True,
            marks=pytest.mark.xfail(
                strict=True, reason="each row has a text length of its own, known in the call only"
            ),
        ),
    ],
)
@pytest.mark.usefixtures("fresh_dynamo")
def test_traces_in_as_many_full_graphs_as_unsteered(method: str, name: str, whole: bool) -> None:
    if not works_on(METHODS[method], family_of(FAMILIES[name].build())):
        pytest.skip("the registry says that this method does not work here")

    def compiled(model: Any) -> Graphs:
        graphs = Graphs()
        (model.compile if whole else model.compile_repeated_blocks)(fullgraph=True, backend=graphs)
        return graphs

    model = FAMILIES[name].build()
    wanted = run(model, name, make(method, model))
    graphs = compiled(model)
    output(model, inputs_of(FAMILIES[name], model))
    unsteered = graphs.count

    torch._dynamo.reset()
    model = FAMILIES[name].build()
    graphs = compiled(model)
    for _ in range(2):
        assert relative_error(run(model, name, make(method, model)), wanted) <= TOLERANCE
        assert graphs.count <= CASES[method].graphs * unsteered


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.usefixtures("fresh_dynamo")
def test_a_wrapper_compiled_afterwards_is_refused_in_words(method: str) -> None:
    model = FAMILIES["wan21"].build()
    with steer.apply(model, make(method, model)):
        fast = torch.compile(model, fullgraph=True, backend="eager")
        with pytest.raises(Exception, match=r"call torch\.compile first"):
            output(fast, inputs_of(FAMILIES["wan21"], model))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("block_level", [True, False])
def test_group_offloading(method: str, block_level: bool) -> None:
    tiny = PIPELINES["wan21"]
    pipe, cpu = tiny.build(), torch.device("cpu")
    with steer.apply(pipe, make(method, pipe.transformer)):
        wanted = generate(pipe, tiny.call_kwargs(pipe, steps=3))
        pipe.transformer.enable_group_offload(
            onload_device=cpu,
            offload_device=cpu,
            offload_type="block_level" if block_level else "leaf_level",
            **({"num_blocks_per_group": 1} if block_level else {}),
        )
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, steps=3)), wanted)


@pytest.mark.parametrize("method", METHODS)
def test_fused_lora_and_both_experts_of_wan22(method: str) -> None:
    """Weights that change under a steered pipeline are used; each of two transformers has the method of its own."""
    tiny = PIPELINES["wan22"]
    pipe = tiny.build()
    from peft import LoraConfig

    with steer.apply(pipe, make(method, pipe.transformer)) as handle:
        assert {row["model"] for row in handle.stats["methods"]} == {"transformer", "transformer_2"}
        bare = generate(pipe, tiny.call_kwargs(pipe, steps=3))
        torch.manual_seed(1)
        pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
        loaded = generate(pipe, tiny.call_kwargs(pipe, steps=3))
        pipe.transformer.fuse_lora()
        fused = generate(pipe, tiny.call_kwargs(pipe, steps=3))
    assert relative_error(loaded, bare) > VISIBLE
    assert relative_error(fused, loaded) <= 1e-4


def test_bad_settings_change_nothing() -> None:
    model = FAMILIES["flux"].build()
    before = snapshot(model)
    with pytest.raises(steer.CompositionError, match="it draws single images"):
        steer.apply(model, steer.RadialAttention())
    assert_untouched(before, model)
    wan = FAMILIES["wan21"].build()
    before = snapshot(wan)
    with pytest.raises(steer.SelectorError, match=r"it has wan2\.1-14b, wan2\.2-a14b"):
        steer.apply(wan, steer.RadialAttention(preset="wan3"))
    assert_untouched(before, wan)
    for settings in ({"decay": -1}, {"block_size": 0}, {"dense_layers": -1}):
        with pytest.raises(ValueError, match="must be"):
            steer.RadialAttention(**settings)
    with pytest.raises(ValueError, match="choose from triton, gather, flex, reference"):
        steer.RadialAttention(backend="cuda")


def test_presets_fill_what_is_not_given() -> None:
    pipe = PIPELINES["wan21"].build()
    for name, decay, steps in ((None, 0.2, "0.24:"), ("wan2.2-a14b", 0.8, "0.275:")):
        with steer.apply(pipe, steer.RadialAttention(preset=name, dense_layers=0)) as handle:
            method = handle.bindings[0].method
            assert (method.decay, method.steps, method.dense_layers) == (decay, steps, 0)
            assert f"decay={decay}" in handle.summary()
    assert dataclasses.asdict(steer.RadialAttention())["decay"] is None


@pytest.mark.parametrize("method", METHODS)
def test_tokens_that_are_no_single_video_are_refused(method: str) -> None:
    """LTX with conditioning frames: the model gets coordinates, and steer knows the tokens as one row."""
    model = FAMILIES["ltx"].build()
    kwargs = inputs_of(FAMILIES["ltx"], model)
    for name in ("num_frames", "height", "width"):
        kwargs.pop(name)
    more = torch.cat([kwargs["hidden_states"]] * 2, 1)
    coordinates = torch.rand(2, 3, more.shape[1])
    with steer.apply(model, make(method, model)), pytest.raises(ValueError, match="known as one row"):
        output(model, kwargs | {"hidden_states": more, "video_coords": coordinates})


@pytest.mark.parametrize("method", ["NeighborhoodAttention", "ReTtention"])
@pytest.mark.parametrize("reference", [(3, 4), (HEIGHT, WIDTH)])
def test_reference_images_are_no_rows_of_the_picture(method: str, reference: tuple[int, int]) -> None:
    """FLUX Kontext puts the tokens of a reference image behind the others; they may well fill whole rows."""
    model = FAMILIES["flux"].build()
    kwargs = inputs_of(FAMILIES["flux"], model)
    rows, columns = torch.meshgrid(*(torch.arange(size) for size in reference), indexing="ij")
    ids = torch.stack([torch.ones_like(rows), rows, columns], -1).view(-1, 3).to(kwargs["img_ids"].dtype)
    kwargs["hidden_states"] = torch.cat([kwargs["hidden_states"], kwargs["hidden_states"][:, : len(ids)]], 1)
    kwargs["img_ids"] = torch.cat([kwargs["img_ids"], ids])
    with steer.apply(model, make(method, model)), pytest.raises(ValueError, match="known as one row"):
        output(model, kwargs)


@pytest.mark.parametrize("method", METHODS)
def test_below_min_tokens_the_model_is_untouched(method: str) -> None:
    """Also at a size that a plan does not have; and no density is claimed."""
    model = FAMILIES["wan21"].build()
    sparse = make(method, model, min_tokens=1000)
    for frames in (FRAMES, FRAMES - 1):
        kwargs = inputs_of(FAMILIES["wan21"], model)
        kwargs["hidden_states"] = kwargs["hidden_states"][:, :, :frames]
        baseline = output(model, kwargs)
        with steer.apply(model, sparse) as handle:
            for _ in range(CASES[method].forwards):
                assert torch.equal(output(model, kwargs), baseline)
            assert handle.stats["density"] is None


@pytest.mark.parametrize("method", METHODS)
def test_what_has_run_can_be_asked_after_removal(method: str) -> None:
    pipe = PIPELINES["wan21"].build()
    with steer.apply(pipe, make(method, pipe.transformer, steps="1:")) as handle:
        generate(pipe, PIPELINES["wan21"].call_kwargs(pipe, steps=3))
        density = handle.stats["density"]
    assert 0 < density < 1
    assert handle.stats["density"] == density


@pytest.mark.parametrize("method", [name for name in METHODS if name != "ReTtention"])
def test_gradients_after_inference_mode(method: str) -> None:
    """What inference mode made ready serves forwards with gradients as well."""
    model = FAMILIES["wan21"].build()
    kwargs = inputs_of(FAMILIES["wan21"], model)
    gradients = []
    for before in (False, True):
        with steer.apply(model, make(method, model)):
            if before:
                with torch.inference_mode():
                    model(**kwargs)
            latents = kwargs["hidden_states"].clone().requires_grad_()
            model(**kwargs | {"hidden_states": latents}).sample.square().sum().backward()
            gradients.append(latents.grad)
    assert torch.equal(*gradients)


@pytest.mark.parametrize("method", ["NeighborhoodAttention", "RadialAttention"])
def test_a_block_cache_may_be_enabled_before_or_after(method: str) -> None:
    """diffusers' caches look blocks up by their class, and token order needs classes of its own."""
    tiny, results = PIPELINES["wan21"], []
    for first in (True, False):
        pipe = tiny.build()
        cache = FirstBlockCacheConfig(threshold=0.2)
        if first:
            pipe.transformer.enable_cache(cache)
        with steer.apply(pipe, make(method, pipe.transformer, steps=":")):
            if not first:
                pipe.transformer.enable_cache(cache)
            results.append(generate(pipe, tiny.call_kwargs(pipe, steps=4)))
            pipe.transformer.disable_cache()
    assert torch.equal(*results)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "settings", [{"block_size": 0}, {"block_size": 2.5}, {"block_size": "64"}, {"dense_layers": -1}]
)
def test_counts_are_whole_numbers(method: str, settings: dict[str, Any]) -> None:
    """A block size that is none would make masks of a size of its own, and fill the memory."""
    with pytest.raises(ValueError, match=r"must be a whole number, at least [01]"):
        METHODS[method](**settings)


on_a_gpu = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")]


@pytest.mark.parametrize("method", [pytest.param(name, marks=on_a_gpu) for name in METHODS])
@pytest.mark.parametrize("name", ["wan21", "hunyuan_video", "cogvideox", "ltx", "mochi"])
def test_on_cuda_it_equals_the_cpu(method: str, name: str) -> None:
    """float32 on both; the Triton kernel takes blocks of 16 or more."""
    model = FAMILIES[name].build()
    wanted = run(model, name, make(method, model, block_size=16))
    model.cuda()
    with steer.apply(model, make(method, model, block_size=16)):
        for _ in range(CASES[method].forwards):
            result = output(model, moved(inputs_of(FAMILIES[name], model), torch.device("cuda")))
    assert relative_error(result.cpu(), wanted) <= 1e-3


@pytest.mark.parametrize("method", [pytest.param(name, marks=on_a_gpu) for name in METHODS])
@pytest.mark.parametrize("compiled", [False, True])
@pytest.mark.usefixtures("fresh_dynamo")
def test_bf16_on_cuda(method: str, compiled: bool) -> None:
    """As far from float32 as dense attention in bf16 is, twice over; also compiled by inductor."""
    model = FAMILIES["wan21"].build().cuda()

    def last() -> Tensor:
        for _ in range(CASES[method].forwards):
            kwargs = moved(inputs_of(FAMILIES["wan21"], model), torch.device("cuda"))
            result = output(model, {k: v.to(model.dtype) if v.is_floating_point() else v for k, v in kwargs.items()})
        return result.float()

    dense = last()
    with steer.apply(model, make(method, model, block_size=16)):
        exact = last()
    model.to(torch.bfloat16)
    rounded = last()
    if compiled:
        model.compile_repeated_blocks(fullgraph=True)
    with steer.apply(model, make(method, model, block_size=16)):
        found = last()
    assert (found - exact).norm() <= 2 * (rounded - dense).norm()


def test_density_of_a_run_counts_each_method_by_its_own_layers() -> None:
    """Two sparse methods at different layers, and one that is not sparse, beside each other."""
    model = FAMILIES["wan21"].build()
    with steer.apply(model, make("RadialAttention", model, layers="blocks.0")) as handle:
        output(model, inputs_of(FAMILIES["wan21"], model))
        (radial,) = [row["density"] for row in handle.stats["methods"]]
        assert handle.stats["density"] == pytest.approx((radial + 2) / 3)
    methods = (
        make("RadialAttention", model, layers="blocks.0"),
        make("NeighborhoodAttention", model, layers="blocks.1"),
        Scale(layers="blocks.*.attn1"),
    )
    with steer.apply(model, *methods) as handle:
        output(model, inputs_of(FAMILIES["wan21"], model))
        one, two, none = [row["density"] for row in handle.stats["methods"]]
        assert none is None and one == radial != two
        assert handle.stats["density"] == pytest.approx((one + two + 1) / 3)
