"""Token order at a model's entry: the blocks see another order, the output does not show it."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import pytest
import torch
from probes import assert_untouched, inputs_of, relative_error, snapshot
from tiny import FAMILIES, FRAMES, HEIGHT, WIDTH, Family, output
from torch import Tensor, nn

from steer_kernels import order as orders
from steer_kernels.order import TokenOrder
from steer_patches.blocks import Tape
from steer_patches.family import family_of
from steer_patches.reorder import Reordering

TOLERANCE = 1e-5
EXACT = 1e-12
VISIBLE = 1e-3

NOT_REORDERED = ("sd15", "sdxl", "animatediff", "llama", "llava")
UNTRACEABLE = ("hunyuan_video15",)  # the model itself, as in test_compile.py
REORDERED = [name for name in FAMILIES if name not in NOT_REORDERED]
every_family = pytest.mark.parametrize("name", REORDERED)
QUICK = ("wan22", "flux")  # to compile; the others are marked slow


def compiled_families(*without: str) -> pytest.MarkDecorator:
    marks = {name: () if name in QUICK else pytest.mark.slow for name in REORDERED if name not in without}
    return pytest.mark.parametrize("name", [pytest.param(name, marks=mark) for name, mark in marks.items()])


def attached(model: nn.Module) -> Reordering:
    reordering = Reordering(model, family_of(model))
    reordering.attach()
    return reordering


def shuffled(tokens: int) -> TokenOrder:
    """An order without any structure."""
    places = torch.randperm(tokens, generator=torch.Generator().manual_seed(1))
    return TokenOrder("shuffled", places, places.argsort())


def order_of(family: Family) -> TokenOrder:
    frames, height, width = family.grid or (1, 1, 1)
    return shuffled(frames * height * width)


def in_double(value: Any) -> Any:
    if isinstance(value, Tensor):
        return value.double() if value.dtype == torch.float32 else value
    return tuple(in_double(item) for item in value) if isinstance(value, tuple) else value


def double(name: str) -> tuple[nn.Module, dict[str, Any]]:
    """A tiny model and its inputs in fp64."""
    model = FAMILIES[name].build().double()
    if name == "cosmos":
        model.register_to_config(extra_pos_embed_type=None)  # it computes them in fp32 only
    return model, {key: in_double(value) for key, value in inputs_of(FAMILIES[name], model).items()}


class Entries:
    """Keeps the tokens that every block of a model really gets."""

    def __init__(self, reordering: Reordering) -> None:
        self.tokens: list[Tensor] = []
        for place in reordering.places:
            place.block.module.register_forward_pre_hook(self.keep, with_kwargs=True)

    def keep(self, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        self.tokens.append(kwargs.get("hidden_states", args[0] if args else None))


@every_family
def test_raster_and_identity_change_no_bit(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    before = snapshot(model)
    reordering = attached(model)
    assert reordering.refusal is None
    assert torch.equal(output(model, inputs_of(family, model)), plain)
    reordering.order = orders.axes(family.grid, "THW")
    assert torch.equal(output(model, inputs_of(family, model)), plain)
    reordering.remove()
    assert_untouched(before, model)
    assert torch.equal(output(model, inputs_of(family, model)), plain)


@every_family
def test_output_does_not_show_the_order(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    reordering = attached(model)
    for order in (orders.axes(family.grid, "WHT"), orders.tiles(family.grid, (1, 2, 4)), order_of(family)):
        reordering.order = order
        assert relative_error(output(model, inputs_of(family, model)), plain) <= TOLERANCE


@every_family
def test_blocks_get_the_order(name: str) -> None:
    """One permutation at the entry of the first block; all blocks see it, those of a second stage too."""
    family = FAMILIES[name]
    model = family.build()
    reordering = attached(model)
    entries = Entries(reordering)
    output(model, inputs_of(family, model))
    raster, entries.tokens = entries.tokens, []
    reordering.order = order_of(family)
    output(model, inputs_of(family, model))
    assert len(entries.tokens) == len(raster) == len(reordering.places) >= 3
    assert torch.equal(entries.tokens[0], raster[0][:, reordering.order.to_ordered])
    for seen, plain in zip(entries.tokens, raster, strict=True):
        assert relative_error(seen, reordering.order.apply(plain, 1)) <= TOLERANCE
        assert relative_error(seen, plain) > VISIBLE


@every_family
def test_double_precision_is_exact(name: str) -> None:
    model, kwargs = double(name)
    plain = output(model, dict(kwargs))
    reordering = attached(model)
    reordering.order = order_of(FAMILIES[name])
    assert relative_error(output(model, dict(kwargs)), plain) <= EXACT


def with_timesteps_per_token(kwargs: dict[str, Any]) -> dict[str, Any]:
    """LTX: the tokens of the first frame are clean."""
    kwargs["timestep"] = kwargs["timestep"][:, None].repeat(1, FRAMES * HEIGHT * WIDTH)
    kwargs["timestep"][:, : HEIGHT * WIDTH] = 0
    return kwargs


def with_timesteps_per_frame(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Cosmos: the first frame is clean."""
    kwargs["timestep"] = kwargs["timestep"][:, None, None, None, None].repeat(1, 1, FRAMES, 1, 1)
    kwargs["timestep"][:, :, 0] = 0
    return kwargs


def with_residuals(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Cosmos: its ControlNet's residuals are arguments of the blocks."""
    generator = torch.Generator().manual_seed(2)
    kwargs["block_controlnet_hidden_states"] = [torch.randn(2, FRAMES * HEIGHT * WIDTH, 32, generator=generator)] * 3
    return kwargs


def with_reference(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Qwen-Image: the lower rows are a second picture, whose tokens are clean."""
    kwargs["img_shapes"] = [[(1, HEIGHT - 1, WIDTH), (1, 1, WIDTH)]] * 2
    return kwargs


def with_mask(kwargs: dict[str, Any]) -> dict[str, Any]:
    """PixArt: some tokens of the image are padding."""
    kwargs["attention_mask"] = torch.ones(2, HEIGHT * WIDTH)
    kwargs["attention_mask"][:, -WIDTH:] = 0
    return kwargs


def unchanged(kwargs: dict[str, Any]) -> dict[str, Any]:
    return kwargs


def with_clean_reference(model: nn.Module) -> None:
    model.zero_cond_t = True
    for block in model.transformer_blocks:
        block.zero_cond_t = True


def with_controlnet(model: nn.Module) -> None:
    model.register_to_config(controlnet_block_every_n=1)


def as_it_is(model: nn.Module) -> None:
    pass


TABLES: dict[str, tuple[str, str, Callable[..., Any], Callable[..., Any]]] = {
    "wan rotary": ("wan21", "rotary_emb", unchanged, as_it_is),
    "wan modulation": ("wan22", "temb", unchanged, as_it_is),
    "ltx rotary": ("ltx", "image_rotary_emb", unchanged, as_it_is),
    "ltx modulation": ("ltx", "temb", with_timesteps_per_token, as_it_is),
    "hunyuan rotary": ("hunyuan_video", "freqs_cis", unchanged, as_it_is),
    "hunyuan rotary, single blocks": ("hunyuan_video", "image_rotary_emb", unchanged, as_it_is),
    "hunyuan 1.5 rotary": ("hunyuan_video15", "freqs_cis", unchanged, as_it_is),
    "cogvideox rotary": ("cogvideox_rotary", "image_rotary_emb", unchanged, as_it_is),
    "mochi rotary": ("mochi", "image_rotary_emb", unchanged, as_it_is),
    "cosmos rotary": ("cosmos", "image_rotary_emb", unchanged, as_it_is),
    "cosmos positions": ("cosmos", "extra_pos_emb", unchanged, as_it_is),
    "cosmos modulation": ("cosmos", "temb", with_timesteps_per_frame, as_it_is),
    "cosmos timesteps": ("cosmos", "embedded_timestep", with_timesteps_per_frame, as_it_is),
    "cosmos ControlNet": ("cosmos", "controlnet_residual", with_residuals, with_controlnet),
    "flux rotary": ("flux", "image_rotary_emb", unchanged, as_it_is),
    "qwen rotary": ("qwen_image", "image_rotary_emb", unchanged, as_it_is),
    "qwen modulation": ("qwen_image", "modulate_index", with_reference, with_clean_reference),
    "pixart mask": ("pixart", "attention_mask", with_mask, as_it_is),
}


@pytest.mark.parametrize(("name", "table", "changed", "prepare"), TABLES.values(), ids=TABLES.keys())
def test_every_table_is_permuted_and_has_to_be(name: str, table: str, changed: Any, prepare: Any) -> None:
    family = FAMILIES[name]
    model = family.build()
    prepare(model)
    plain = output(model, changed(inputs_of(family, model)))
    reordering = attached(model)
    reordering.order = order_of(family)
    assert relative_error(output(model, changed(inputs_of(family, model))), plain) <= TOLERANCE
    stated = sum(len(place.tables) for place in reordering.places)
    for place in reordering.places:
        place.tables = [other for other in place.tables if other.name != table]
    assert sum(len(place.tables) for place in reordering.places) < stated
    assert relative_error(output(model, changed(inputs_of(family, model))), plain) > VISIBLE


def test_every_stated_table_is_tested() -> None:
    stated = {
        (type(model), table.name)
        for model in (FAMILIES[name].build() for name in REORDERED)
        for place in Reordering(model, family_of(model)).places
        for table in place.tables
        if table.shapes
    }
    assert stated == {(type(FAMILIES[name].build()), table) for name, table, _, _ in TABLES.values()}


def test_text_table_as_long_as_the_image_is_left_alone() -> None:
    """Qwen-Image keeps one table for the image and one for the text, which may have as many tokens."""
    family = FAMILIES["qwen_image"]
    model = family.build()
    kwargs = inputs_of(family, model)
    text = kwargs["encoder_hidden_states"]
    kwargs["encoder_hidden_states"] = text.repeat(1, 4, 1)[:, : HEIGHT * WIDTH]
    kwargs["encoder_hidden_states_mask"] = None
    plain = output(model, dict(kwargs))
    reordering = attached(model)
    reordering.order = order_of(family)
    assert relative_error(output(model, dict(kwargs)), plain) <= TOLERANCE


def test_tables_are_permuted_once_a_forward() -> None:
    family = FAMILIES["wan22"]
    model = family.build()
    reordering = attached(model)
    reordering.order = order_of(family)
    seen: list[tuple[Any, ...]] = []
    for place in reordering.places:
        place.block.module.register_forward_pre_hook(lambda _module, args: seen.append(args))
    output(model, inputs_of(family, model))
    (_, _, temb, rotary), *others = seen
    for _, _, other_temb, other_rotary in others:
        assert other_temb is temb
        assert all(a is b for a, b in zip(other_rotary, rotary, strict=True))
    assert not reordering._permuted  # nothing outlives the forward


def test_order_after_a_forward_that_failed() -> None:
    """CogVideoX gets its tables from outside, the same in every forward; another order must not find the old copies."""
    model, kwargs = double("cogvideox_rotary")
    plain = output(model, dict(kwargs))
    reordering = attached(model)
    last = reordering.places[-1].block.module.norm1
    failing = last.register_forward_pre_hook(lambda *_: pytest.fail("stopped here"))
    reordering.order = order_of(FAMILIES["cogvideox_rotary"])
    with pytest.raises(pytest.fail.Exception, match="stopped here"):
        output(model, dict(kwargs))
    failing.remove()
    reordering.order = orders.axes((FRAMES, HEIGHT, WIDTH), "HWT")
    assert relative_error(output(model, dict(kwargs)), plain) <= EXACT


# with what records, replays and skips blocks


def two_passes(model: nn.Module, kwargs: dict[str, Any], tape: Tape, prefix: int) -> tuple[Tensor, Tensor, Tensor]:
    """A pass that records, the same pass with the first `prefix` blocks replayed, and one that skips two blocks."""
    batch = slice(0, 2)
    tape.record([prefix])
    first = output(model, dict(kwargs))
    tape.idle()
    tape.replay(prefix, batch, 2)
    second = output(model, dict(kwargs))
    tape.idle(forget=True)
    visual = [block.index for block in tape.blocks if block.stage.tokens]
    tape.skip([visual[0], visual[-1]])
    third = output(model, dict(kwargs))
    tape.idle()
    return first, second, third


@pytest.mark.parametrize("tape_first", [True, False])
@pytest.mark.parametrize("same_way_back", [True, False])
@pytest.mark.parametrize("name", ["flux", "wan22", "hunyuan_video", "cogvideox_rotary"])
def test_prefix_sharing_and_skipping(name: str, tape_first: bool, same_way_back: bool) -> None:
    model, kwargs = double(name)
    plain = output(model, dict(kwargs))
    before = snapshot(model)
    tape, reordering = Tape(model, family_of(model)), Reordering(model, family_of(model))
    parts = [tape, reordering] if tape_first else [reordering, tape]
    tape.attach()
    wanted = [two_passes(model, kwargs, tape, prefix) for prefix in (1, len(tape.blocks) - 1, len(tape.blocks))]
    tape.remove()
    for part in parts:
        part.attach()
    reordering.order = order_of(FAMILIES[name])
    for prefix, reference in zip((1, len(tape.blocks) - 1, len(tape.blocks)), wanted, strict=True):
        for result, raster in zip(two_passes(model, kwargs, tape, prefix), reference, strict=True):
            assert relative_error(result, raster) <= EXACT
        assert relative_error(reference[0], plain) == relative_error(reference[1], plain) == 0.0
        assert relative_error(reference[2], plain) > VISIBLE
    first, second = reversed(parts) if same_way_back else parts
    first.remove()
    assert relative_error(output(model, dict(kwargs)), plain) <= EXACT
    second.remove()
    assert_untouched(before, model)


def test_copies_are_plain() -> None:
    family = FAMILIES["wan21"]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    attached(model).order = order_of(family)
    twin = copy.deepcopy(model)
    assert type(twin.blocks[0]) is type(family.build().blocks[0])
    assert torch.equal(output(twin, inputs_of(family, twin)), plain)


# compiled


@pytest.fixture
def fresh_dynamo() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


class Graphs:
    """A backend that runs the traced graph as it is, and counts."""

    def __init__(self) -> None:
        self.count = 0

    def __call__(self, graph: torch.fx.GraphModule, example_inputs: list[Tensor]) -> Callable[..., Any]:
        self.count += 1
        return graph.forward


@pytest.mark.usefixtures("fresh_dynamo")
@compiled_families()
def test_blocks_compiled_in_place(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    graphs = Graphs()
    reordering = attached(model)
    for place in reordering.places:  # what compile_repeated_blocks does, on models that state no such blocks too
        place.block.module.compile(fullgraph=True, backend=graphs)
    output(model, inputs_of(family, model))
    unordered = graphs.count
    torch._dynamo.reset()
    graphs.count = 0
    for order in (order_of(family), orders.axes(family.grid, "WHT"), orders.axes(family.grid, "THW")):
        reordering.order = order
        assert relative_error(output(model, inputs_of(family, model)), plain) <= TOLERANCE
        assert 0 < graphs.count <= unordered


@pytest.mark.usefixtures("fresh_dynamo")
@compiled_families(*UNTRACEABLE)
def test_model_compiled_in_place(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    plain = output(model, inputs_of(family, model))
    graphs = Graphs()
    reordering = attached(model)
    model.compile(fullgraph=True, backend=graphs)
    for order in (order_of(family), orders.axes(family.grid, "WHT"), orders.axes(family.grid, "THW")):
        reordering.order = order
        assert relative_error(output(model, inputs_of(family, model)), plain) <= TOLERANCE
        assert graphs.count == 1
    for order in (None, order_of(family), None):
        reordering.order = order
        assert relative_error(output(model, inputs_of(family, model)), plain) <= TOLERANCE
        assert graphs.count == 2


# what cannot be reordered


@pytest.mark.parametrize("name", NOT_REORDERED)
def test_models_that_need_raster_order_say_so(name: str) -> None:
    model = FAMILIES[name].build()
    before = snapshot(model)
    reordering = Reordering(model, family_of(model))
    assert "raster" in (reordering.refusal or "")
    with pytest.raises(ValueError, match="raster"):
        reordering.attach()
    assert_untouched(before, model)


def test_blocks_that_count_tokens_are_refused() -> None:
    """HunyuanVideo, image to video by token replacement: the first tokens are taken for the first frame."""
    usual = FAMILIES["hunyuan_video"].build()
    config = {name: value for name, value in usual.config.items() if not name.startswith("_")}
    model = type(usual)(**config | {"image_condition_type": "token_replace"})
    reordering = Reordering(model, family_of(model))
    assert "num_tokens" in (reordering.refusal or "")


def test_order_of_another_grid_is_refused() -> None:
    family = FAMILIES["wan21"]
    model = family.build()
    reordering = attached(model)
    reordering.order = shuffled(10)
    with pytest.raises(ValueError, match=r"10 tokens.*72 visual tokens"):
        output(model, inputs_of(family, model))


def test_unknown_table_is_refused() -> None:
    """As under context parallelism, where the rotary tables are those of a part of the tokens."""
    family = FAMILIES["wan21"]
    model = family.build()
    reordering = attached(model)
    reordering.order = order_of(family)
    half = slice(0, FRAMES * HEIGHT * WIDTH // 2)
    model.rope.register_forward_hook(lambda _module, _args, tables: tuple(table[:, half] for table in tables))
    with pytest.raises(ValueError, match=r"rotary_emb of shape \(1, 36, 1, 16\).*S=72.*1, S, 1, D"):
        output(model, inputs_of(family, model))


def test_mask_over_tokens_is_refused() -> None:
    """As regional prompting gives it."""
    family = FAMILIES["flux"]
    model = family.build()
    reordering = attached(model)
    mask = torch.ones(7 + HEIGHT * WIDTH, 7 + HEIGHT * WIDTH, dtype=torch.bool)
    kwargs = inputs_of(family, model) | {"joint_attention_kwargs": {"attention_mask": mask}}
    output(model, dict(kwargs))
    reordering.order = order_of(family)
    with pytest.raises(ValueError, match=r"joint_attention_kwargs\.attention_mask of shape"):
        output(model, dict(kwargs))


BETWEEN = {
    "flux": {"controlnet_block_samples": [torch.ones(2, HEIGHT * WIDTH, 32)]},
    "sd3": {"skip_layers": [0]},
    "qwen_image": {"controlnet_block_samples": [torch.ones(2, HEIGHT * WIDTH, 32)]},
}


@pytest.mark.parametrize("name", BETWEEN)
def test_edits_between_blocks_are_refused(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    reordering = attached(model)
    kwargs = inputs_of(family, model)
    assert reordering.refuses(kwargs) is None
    kwargs |= BETWEEN[name]
    assert next(iter(BETWEEN[name])) in (reordering.refuses(kwargs) or "")
    output(model, dict(kwargs))
    reordering.order = order_of(family)
    with pytest.raises(RuntimeError, match="raster order"):
        output(model, dict(kwargs))
