"""A mapping of heads for every picture of a batch: each picture is drawn as if it were alone with its mapping."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from dense import doubled
from probes import Scale, assert_untouched, inputs_of, snapshot
from test_guidance import SITES
from tiny import FAMILIES, output
from tiny_pipelines import PIPELINES, generate
from torch import Tensor

import steer
from steer import PAG, SEG
from steer.bind import models_of
from steer.select import by_row

TOLERANCE = 1e-10
VISIBLE = 1e-4
ROWS = 3
FIRST, LAST = "transformer_blocks.0.attn", "transformer_blocks.1.attn"


def exact(name: str) -> Any:
    return PIPELINES[name].build().to(torch.float64)


def call(name: str, pipe: Any, rows: list[int], cfg: bool) -> dict[str, Any]:
    """A call that draws these rows of a batch of three, each from a seed of its own."""
    kwargs = doubled(PIPELINES[name].call_kwargs(pipe, batch=ROWS, guidance_scale=4.0 if cfg else 1.0, steps=2))
    generators = [torch.Generator().manual_seed(row) for row in rows]

    def cut(value: Any) -> Any:
        if isinstance(value, Tensor) and value.ndim > 1:
            return value[rows]
        return [value[row] for row in rows] if isinstance(value, list) else value

    return {key: cut(value) for key, value in kwargs.items()} | {"generator": generators}


def mappings(name: str, pipe: Any) -> list[dict[str, list[int]]]:
    """Heads of one layer, of two layers, and none."""
    early = next(site.name for site in steer.sites(pipe) if site.kind in PAG.kinds)
    return [{SITES[name]: [1]}, {early: [0], SITES[name]: [0]}, {}]


def draw(name: str, pipe: Any, method: steer.Method, rows: list[int], cfg: bool = True) -> Tensor:
    with steer.apply(pipe, method):
        return generate(pipe, call(name, pipe, rows, cfg))


@pytest.mark.parametrize("cfg", [True, False], ids=["cfg", "no_cfg"])
@pytest.mark.parametrize("name", [name for name in SITES if name not in ("mochi", "cosmos")])  # cosmos: no float64
def test_a_batch_equals_its_pictures_alone(name: str, cfg: bool) -> None:
    pipe = exact(name)
    heads = mappings(name, pipe)
    alone = torch.cat([draw(name, pipe, PAG(heads=mine), [row], cfg) for row, mine in enumerate(heads)])
    plain = generate(pipe, call(name, pipe, list(range(ROWS)), cfg))
    changed = [float((one - other).abs().max()) for one, other in zip(alone, plain, strict=True)]
    assert changed[0] > VISIBLE and changed[1] > VISIBLE and changed[2] <= TOLERANCE
    for options in ({}, {"share_prefix": False}, {"extra": "batched"}):
        batch = draw(name, pipe, PAG(heads=heads, **options), list(range(ROWS)), cfg)  # type: ignore[arg-type]
        assert (batch - alone).abs().max() <= TOLERANCE, options


@pytest.mark.parametrize(
    "make",
    [lambda heads: PAG(heads=heads, mode="all", strength=0.5), lambda heads: SEG(heads=heads),
     lambda heads: SEG(heads=heads, sigma=1.0)],
    ids=["SoftPAG", "SEG", "SEG sigma 1"],
)  # fmt: skip
@pytest.mark.parametrize("name", ["sd3", "sd15", "animatediff", "wan21"])
def test_every_perturbation(name: str, make: Any) -> None:
    pipe = exact(name)
    heads = mappings(name, pipe)
    alone = torch.cat([draw(name, pipe, make(mine), [row]) for row, mine in enumerate(heads)])
    assert (draw(name, pipe, make(heads), list(range(ROWS))) - alone).abs().max() <= TOLERANCE


def test_beside_an_ordinary_method_and_a_second_guidance() -> None:
    pipe = exact("sd3")
    heads = mappings("sd3", pipe)
    others = [Scale(layers=FIRST), SEG(layers=LAST, heads=[0])]

    def drawn(mine: Any, rows: list[int]) -> Tensor:
        with steer.apply(pipe, *others, PAG(heads=mine, layers=[FIRST])):
            return generate(pipe, call("sd3", pipe, rows, True))

    first_layer = [{FIRST: [1]}, {FIRST: [0, 1]}, {FIRST: []}]
    alone = torch.cat([drawn(mine, [row]) for row, mine in enumerate(first_layer)])
    assert (drawn(first_layer, list(range(ROWS))) - alone).abs().max() <= TOLERANCE
    assert by_row(heads) and not by_row({FIRST: [1]}) and not by_row([0, 1]) and not by_row(None) and not by_row([])


def test_a_bare_denoiser() -> None:
    family = FAMILIES["sd3"]
    model = family.build().double()
    inputs = doubled(inputs_of(family, model, batch=2))
    heads = [{LAST: [1]}, {FIRST: [0]}]
    alone = []
    for row, mine in enumerate(heads):
        with steer.apply(model, PAG(heads=mine)):
            alone.append(output(model, dict(inputs))[row])
    with steer.apply(model, PAG(heads=heads)):
        together = output(model, dict(inputs))
    assert (together - torch.stack(alone)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("name", ["sd3", "animatediff"])
def test_another_number_of_pictures_is_refused_in_words(name: str, count: int) -> None:
    pipe = exact(name)
    kwargs = call(name, pipe, list(range(ROWS)), True)
    plain = generate(pipe, dict(kwargs) | call(name, pipe, list(range(ROWS)), True))
    model = next(iter(models_of(pipe).values()))
    before = snapshot(model)
    heads = [{SITES[name]: [0]}] * count
    message = rf"PAG has a mapping for each of {count} pictures.* batch has 3; give one"
    with steer.apply(pipe, PAG(heads=heads)), pytest.raises(ValueError, match=message):
        generate(pipe, kwargs)
    assert_untouched(before, model)
    assert torch.equal(generate(pipe, call(name, pipe, list(range(ROWS)), True)), plain)


def test_what_cannot_be_is_refused_before_anything_changes() -> None:
    pipe = PIPELINES["sd3"].build()
    before = snapshot(pipe)
    cases: list[tuple[type[Exception], str, steer.Method]] = [
        (steer.CompositionError, "Scale takes one choice of heads for the whole batch.* guidance methods",
         Scale(heads=[{LAST: [0]}, {FIRST: [0]}])),
        (ValueError, "mixes mappings and numbers: give a mapping for every picture, or numbers",
         PAG(heads=[{LAST: [0]}, 1])),
        (ValueError, "mixes mappings and numbers", PAG(heads=[1, {LAST: [0]}])),
        (ValueError, r"heads \[2\] do not exist at transformer_blocks\.1\.attn: it has heads 0 to 1",
         PAG(heads=[{LAST: [0]}, {LAST: [2]}])),
        (ValueError, "heads='blocks.7' matches none of this model's", PAG(heads=[{LAST: [0]}, {"blocks.7": [0]}],
                                                                          layers="*")),
    ]  # fmt: skip
    for kind, message, method in cases:
        with pytest.raises(kind, match=message):
            steer.apply(pipe, method)
    assert_untouched(before, pipe)
    mochi = PIPELINES["mochi"].build()
    before = snapshot(mochi)
    with pytest.raises(steer.CompositionError, match="row by row, so PAG cannot take a mapping of heads for each"):
        steer.apply(mochi, PAG(heads=[{SITES["mochi"]: [0]}] * 2))
    assert_untouched(before, mochi)


def test_off_is_bit_identical() -> None:
    pipe = PIPELINES["sd3"].build()
    kwargs = PIPELINES["sd3"].call_kwargs
    plain, before = generate(pipe, kwargs(pipe, batch=2)), snapshot(pipe.transformer)
    for method in (PAG(heads=[{LAST: [0]}, {FIRST: [0]}], scale=0.0), PAG(heads=[{}, {}], layers="*")):
        with steer.apply(pipe, method):
            assert torch.equal(generate(pipe, kwargs(pipe, batch=2)), plain)
    with steer.apply(pipe, PAG(heads=[{LAST: [0]}, {FIRST: [0]}])):
        assert not torch.equal(generate(pipe, kwargs(pipe, batch=2)), plain)
    assert torch.equal(generate(pipe, kwargs(pipe, batch=2)), plain)
    assert_untouched(before, pipe.transformer)


def test_save_and_load_keep_the_mappings(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3"].build()
    method = PAG(heads=[{LAST: [0]}, {FIRST: [0, 1]}, {}])
    with steer.apply(pipe, method):
        drawn = generate(pipe, PIPELINES["sd3"].call_kwargs(pipe, batch=3))
    method.save(str(tmp_path))
    loaded = steer.load(tmp_path)
    assert loaded.heads == method.heads
    with steer.apply(pipe, loaded):
        assert torch.equal(generate(pipe, PIPELINES["sd3"].call_kwargs(pipe, batch=3)), drawn)


@pytest.mark.parametrize("name", ["flux", "wan21"])
def test_compiled_blocks_draw_the_same(name: str) -> None:
    pipe = PIPELINES[name].build()
    heads = mappings(name, pipe)[:2]
    kwargs = PIPELINES[name].call_kwargs
    with steer.apply(pipe, PAG(heads=heads)):
        eager = generate(pipe, kwargs(pipe, batch=2))
    model = next(iter(models_of(pipe).values()))
    model.compile_repeated_blocks(backend="eager", fullgraph=True)  # type: ignore[operator]
    with steer.apply(pipe, PAG(heads=heads)):
        assert torch.equal(generate(pipe, kwargs(pipe, batch=2)), eager)
