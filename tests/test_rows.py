"""Methods that are kept to some rows of the batch, over every pipeline's way of classifier-free guidance."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from probes import Scale
from tiny_pipelines import PIPELINES, TinyPipeline, generate

import steer
from steer_patches.attach import denoisers

SPLITS_ROWS = ("mochi",)  # its processor computes attention row by row
UNGUIDED = ("flux",)  # distilled guidance: there are conditional rows only
BATCHED = ("sd15", "sdxl", "sd3", "sd35", "pixart", "cogvideox", "ltx", "animatediff")  # [uncond, cond] in one call

pipelines = pytest.mark.parametrize(
    "tiny", [pytest.param(tiny, id=name) for name, tiny in PIPELINES.items() if name not in SPLITS_ROWS]
)


class OtherScale(Scale, register=False):
    """A second method of the same kind."""


@pipelines
def test_an_edit_of_the_parts_is_the_edit_of_the_whole(tiny: TinyPipeline) -> None:
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, Scale()):
        whole = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, Scale(rows="cond"), OtherScale(rows="uncond")):
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe)), whole)
    with steer.apply(pipe, Scale(rows="cond")):
        part = generate(pipe, tiny.call_kwargs(pipe))
    assert not torch.equal(part, plain)
    assert torch.equal(part, whole) == (tiny.name in UNGUIDED)


def predictions(pipe: Any, tiny: TinyPipeline) -> dict[str, torch.Tensor]:
    """What the denoiser predicts in a run of one step, by role; separate calls are cond first."""
    outputs = []
    hooks = [
        model.register_forward_hook(lambda *args: outputs.append(args[-1][0])) for model in denoisers(pipe).values()
    ]
    generate(pipe, tiny.call_kwargs(pipe, steps=1))
    for hook in hooks:
        hook.remove()
    uncond, cond = outputs[0].chunk(2) if tiny.name in BATCHED else (outputs[1], outputs[0])
    return {"uncond": uncond, "cond": cond}


@pytest.mark.parametrize("name", [*BATCHED, "flux_true_cfg", "qwen_image", "wan21", "hunyuan_video", "hunyuan_video15"])
@pytest.mark.parametrize("role", ["cond", "uncond"])
def test_the_other_rows_stay_bit_identical(name: str, role: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    plain = predictions(pipe, tiny)
    with steer.apply(pipe, Scale(rows=role)):
        edited = predictions(pipe, tiny)
    other = "uncond" if role == "cond" else "cond"
    assert torch.equal(edited[other], plain[other])
    assert not torch.equal(edited[role], plain[role])


@pytest.mark.parametrize("name", ["sd3", "wan21", "pixart"])
def test_without_guidance_all_rows_are_conditional(name: str) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe, guidance_scale=1.0, batch=2))
    with steer.apply(pipe, Scale()):
        whole = generate(pipe, tiny.call_kwargs(pipe, guidance_scale=1.0, batch=2))
    with steer.apply(pipe, Scale(rows="cond")):
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, guidance_scale=1.0, batch=2)), whole)
    with steer.apply(pipe, Scale(rows="uncond")):
        assert torch.equal(generate(pipe, tiny.call_kwargs(pipe, guidance_scale=1.0, batch=2)), plain)
