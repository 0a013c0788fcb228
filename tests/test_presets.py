"""Published settings by name, on models of the depth and the number of heads that they were found on."""

from __future__ import annotations

from functools import cache

import pytest
import torch
from diffusers import FluxTransformer2DModel, SD3Transformer2DModel
from torch import nn
from typer.testing import CliRunner

import steer
from steer import cli
from steer.presets import PublishedSetting

# What the paper names, as (layer, head); FLUX counts its 38 single blocks on from the 19 double ones.
SD3 = {
    "sd3-sunlight": {(18, 11), (0, 17), (2, 3)},
    "sd3-spring-bloom": {(0, 2), (13, 19), (5, 12)},
    "sd3-dark": {(1, 2), (1, 10)},
    "sd3-white": {(0, 15), (1, 19)},
    "sd3-banding": {(15, 3), (15, 20), (15, 23), (16, 3)},
    "sd3-canvas": {(14, 1)},
    "sd3-shearing": {(11, 15)},
}
FLUX = {
    "flux-bokeh": {(35, 8), (34, 0)},
    "flux-golden-hour": {(35, 16), (36, 2), (38, 18)},
    "flux-autumn": {(54, 23)},
}


@cache
def model_of(family: str) -> nn.Module:
    """The real classes with the published numbers of layers and heads, and four channels a head."""
    if family == "FLUX":
        return FluxTransformer2DModel(
            in_channels=4,
            num_layers=19,
            num_single_layers=38,
            num_attention_heads=24,
            attention_head_dim=4,
            axes_dims_rope=(0, 2, 2),
            joint_attention_dim=8,
            pooled_projection_dim=8,
        )
    return SD3Transformer2DModel(
        sample_size=8,
        in_channels=4,
        num_layers=24,
        num_attention_heads=24,
        attention_head_dim=4,
        caption_projection_dim=96,
        joint_attention_dim=8,
        pooled_projection_dim=8,
        pos_embed_max_size=4,
    )


def heads_of(model: nn.Module, preset: str) -> set[tuple[int, int]]:
    """(layer, head) on which the method acts, counted over all blocks in the order in which they run."""
    layers = [name for name in dict(model.named_modules()) if name.endswith(".attn")]
    with steer.apply(model, steer.PAG(preset=preset)) as handle:
        masks = handle.bindings[0].sites
        assert handle.bindings[0].method.mode == "all"
    found = set()
    for name, mask in masks.items():
        assert isinstance(mask, torch.Tensor)
        found |= {(layers.index(name), head) for head in mask.flatten().nonzero().flatten().tolist()}
    return found


@pytest.mark.parametrize("name", SD3)
def test_heads_of_sd3(name: str) -> None:
    assert heads_of(model_of("SD3"), name) == SD3[name]


@pytest.mark.parametrize("name", FLUX)
def test_heads_of_flux(name: str) -> None:
    assert heads_of(model_of("FLUX"), name) == FLUX[name]


@pytest.mark.parametrize("setting", [s for s in steer.presets() if s.method == "PAG"], ids=lambda s: s.name)
def test_every_list_of_heads_fits_its_model_and_says_how_sure_it_is(setting: PublishedSetting) -> None:
    named = {(layer, head) for layer, heads in setting.settings["heads"].items() for head in heads}
    assert len(heads_of(model_of(setting.family), setting.name)) == len(named)
    assert "arXiv 2506.10978" in setting.source and "strength is not stated" in setting.source
    assert "figure" in setting.source or "listed as a set" in setting.source


def test_given_fields_win_over_the_preset() -> None:
    model = model_of("FLUX")
    with steer.apply(model, steer.PAG(preset="flux-bokeh")) as handle:
        assert handle.bindings[0].method.scale == 8.0
    with steer.apply(model, steer.PAG(preset="flux-bokeh", scale=4.0, strength=0.5)) as handle:
        method = handle.bindings[0].method
        assert (method.scale, method.strength, method.mode) == (4.0, 0.5, "all")


def test_names_that_do_not_exist_are_refused_with_those_that_do() -> None:
    with pytest.raises(steer.SelectorError, match=r"preset='sd3-sun' of PAG does not exist for SD3.*sd3-sunlight"):
        steer.apply(model_of("SD3"), steer.PAG(preset="sd3-sun"))
    with pytest.raises(steer.SelectorError, match=r"preset='sd3-dark' of SEG does not exist for SD3.*it has none"):
        steer.apply(model_of("SD3"), steer.SEG(preset="sd3-dark"))


def test_heads_of_another_depth_are_refused() -> None:
    shallow = SD3Transformer2DModel(
        sample_size=8, in_channels=4, num_layers=2, num_attention_heads=24, attention_head_dim=4,
        caption_projection_dim=96, joint_attention_dim=8, pooled_projection_dim=8, pos_embed_max_size=4,
    )  # fmt: skip
    with pytest.raises(steer.SelectorError, match=r"transformer_blocks\.2\.attn.*matches none"):
        steer.apply(shallow, steer.PAG(preset="sd3-sunlight"))


def test_the_command() -> None:
    result = CliRunner().invoke(cli.app, ["presets", "PAG"])
    assert result.exit_code == 0 and "sd3-sunlight" in result.output and "flux-bokeh" in result.output
    sources = CliRunner().invoke(cli.app, ["presets", "PAG", "--source"])
    assert "uncertain" in sources.output
    failed = CliRunner().invoke(cli.app, ["presets", "SLG"])
    assert failed.exit_code and "no named settings of SLG" in str(failed.exception)
