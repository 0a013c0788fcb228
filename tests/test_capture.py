"""`steer.capture` reads softmax columns without changing the run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from probes import inputs_of
from tiny import FAMILIES, output
from torch.overrides import TorchFunctionMode

import steer


class DenseMaps(TorchFunctionMode):
    """The whole softmax map of every attention call, (B, H, S, S_kv), in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            scores = query.double() @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).double().mT * scale
            mask = kwargs.get("attn_mask")
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            if kwargs.get("is_causal"):
                scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
            self.maps.append(scores.softmax(-1).nan_to_num())  # padding may see nothing at all
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "flux", "wan21", "ltx", "llama"])
def test_columns_equal_the_dense_map(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    baseline = output(model, inputs_of(family, model))
    with steer.capture(model, columns="all", keep_heads=True) as captured, DenseMaps() as dense:
        assert torch.equal(output(model, inputs_of(family, model)), baseline)
    assert len(captured.maps) == len(dense.maps) == len(steer.sites(model))
    for (site, found), expected in zip(captured.maps.items(), dense.maps, strict=True):
        assert torch.allclose(found.double(), expected, atol=1e-5), site


def test_text_columns_of_joint_attention() -> None:
    for name, text in (("sd3", slice(-7, None)), ("flux", slice(0, 7))):
        model = FAMILIES[name].build()
        with steer.capture(model, columns="all") as everything:
            output(model, inputs_of(FAMILIES[name], model))
        with steer.capture(model, columns="text") as captured:
            output(model, inputs_of(FAMILIES[name], model))
        for site, found in captured.maps.items():
            assert torch.equal(found, everything.maps[site][..., text])


def test_running_mean_over_calls() -> None:
    model = FAMILIES["sd3"].build()
    first, second = inputs_of(FAMILIES["sd3"], model), inputs_of(FAMILIES["sd3"], model)
    second["hidden_states"] = second["hidden_states"] * 2
    maps = []
    for runs in ([first], [second], [first, second]):
        with steer.capture(model, "transformer_blocks.1", columns="all") as captured:
            for kwargs in runs:
                output(model, dict(kwargs))
        maps.append(captured.maps["transformer_blocks.1.attn"])
    assert torch.allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)


def test_differentiable() -> None:
    model = FAMILIES["sd3"].build()
    kwargs = inputs_of(FAMILIES["sd3"], model)
    kwargs["hidden_states"].requires_grad_()
    with steer.capture(model, "transformer_blocks.1", columns=[0, 3], detach=False) as captured:
        model(**kwargs)
    captured.maps["transformer_blocks.1.attn"].sum().backward()
    assert kwargs["hidden_states"].grad.abs().sum() > 0


def test_bad_columns() -> None:
    with pytest.raises(ValueError, match="text, image, all"), steer.capture(FAMILIES["sd3"].build(), columns="words"):
        pass
