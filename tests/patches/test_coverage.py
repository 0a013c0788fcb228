"""The hook layer on every family: it sees every attention call, changes nothing by itself, and leaves no trace."""

from __future__ import annotations

import copy
import gc
import json
import pickle
import sys
import threading
import weakref
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers.models.attention_dispatch import _AttentionBackendRegistry
from probes import Count, Scale, Through, assert_untouched, inputs_of, relative_error, snapshot, steer_attributes
from tiny import FAMILIES, Family, count_attention_calls, output
from tiny_pipelines import PIPELINES, generate
from torch.overrides import TorchFunctionMode

import steer
from steer_patches.attach import Attachment
from steer_patches.clock import Clock

# Attention calls that pass through no port, and why.
UNSEEN = {
    "mochi": (
        1,
        "`time_embed.pooler` pools the text prompt into one vector; it is no attention module with a processor",
    ),
}

DIFFUSERS = [name for name in FAMILIES if name not in ("llama", "llava")]
every_family = pytest.mark.parametrize("family", FAMILIES.values(), ids=FAMILIES)


def pickled(target: Any) -> Any:
    return pickle.loads(pickle.dumps(target))


def run(model: torch.nn.Module, family: Family) -> torch.Tensor:
    return output(model, inputs_of(family, model))


@every_family
def test_every_attention_call_is_seen(family: Family) -> None:
    model, method = family.build(), Count()
    unsteered = count_attention_calls(lambda: run(model, family))
    with steer.apply(model, method):
        made = count_attention_calls(lambda: run(model, family))
    unseen, _ = UNSEEN.get(family.name, (0, ""))
    assert made == unsteered
    assert method.calls == made - unseen > 0
    assert {name for name, _ in method.seen} == {site.name for site in steer.sites(model)}


@every_family
def test_empty_chain_is_bit_identical(family: Family) -> None:
    model = family.build()
    plain = run(model, family)
    attachment = Attachment(model, Clock(None))
    assert not any(site.chain for site in attachment.sites)
    attached = run(model, family)
    attachment.remove()
    assert torch.equal(attached, plain)
    assert steer_attributes(model) == []


@every_family
def test_neutral_and_inactive_methods_are_bit_identical(family: Family) -> None:
    model = family.build()
    plain = run(model, family)
    before = snapshot(model)
    with steer.apply(model, Scale(heads=[])) as handle:
        assert_untouched(before, model)
        assert handle.sites == []
        assert torch.equal(run(model, family), plain)
    with steer.apply(model, Scale(min_tokens=10_000)):
        assert torch.equal(run(model, family), plain)
    if family.name == "mochi":  # computes attention row by row, so rows cannot be chosen
        return
    with steer.apply(model, Scale(rows="reference")):
        assert torch.equal(run(model, family), plain)


@every_family
def test_pass_through_and_removal_are_bit_identical(family: Family) -> None:
    model = family.build()
    plain = run(model, family)
    before = snapshot(model)
    handle = steer.apply(model, Through())
    assert torch.equal(run(model, family), plain)
    handle.remove()
    assert_untouched(before, model)
    assert torch.equal(run(model, family), plain)
    with steer.apply(model, Scale()):
        assert not torch.equal(run(model, family), plain)
    assert_untouched(before, model)
    assert torch.equal(run(model, family), plain)


@every_family
def test_batch_of_one(family: Family) -> None:
    model = family.build()
    kwargs = inputs_of(family, model, batch=1)
    plain = output(model, kwargs)
    with steer.apply(model, Through()):
        assert torch.equal(output(model, inputs_of(family, model, batch=1)), plain)


@every_family
def test_methods_come_off_in_any_order(family: Family) -> None:
    model = family.build()
    site = steer.sites(model)[0].name
    with steer.apply(model, Scale(layers=site)):
        edited = run(model, family)
    before = snapshot(model)
    first, second = steer.apply(model, Through()), steer.apply(model, Scale(layers=site))
    assert torch.equal(run(model, family), edited)
    first.remove()
    assert torch.equal(run(model, family), edited)
    second.remove()
    second.remove()
    assert_untouched(before, model)


def test_a_removed_method_is_let_go_though_another_stays() -> None:
    """Were it kept, the next method could be taken for it: plans are found by the address of what they hold."""
    family = FAMILIES["sd3"]
    model = family.build()
    staying = steer.apply(model, Through())
    method = Count()
    removed = weakref.ref(method)
    with steer.apply(model, method):
        run(model, family)
    del method
    gc.collect()
    assert removed() is None
    assert staying.is_active


@pytest.mark.parametrize("family", [FAMILIES["flux"], FAMILIES["llama"]], ids=["flux", "llama"])
def test_nothing_holds_the_model_after_removal(family: Family) -> None:
    model = family.build()
    steer.apply(model, Scale()).remove()
    released = weakref.ref(model)
    del model
    gc.collect()
    assert released() is None


@pytest.fixture
def short_switch_interval() -> Iterator[None]:
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    yield
    sys.setswitchinterval(interval)


@every_family
@pytest.mark.usefixtures("short_switch_interval")
def test_two_threads_with_two_models(family: Family) -> None:
    models = {factor: family.build() for factor in (0.5, 0.75)}
    for factor, model in models.items():
        steer.apply(model, Scale(factor=factor))
    wanted = {factor: run(model, family) for factor, model in models.items()}
    assert not torch.equal(wanted[0.5], wanted[0.75])
    wrong = dict.fromkeys(models, 0)
    finished = []

    def work(factor: float) -> None:
        for _ in range(20):
            wrong[factor] += not torch.equal(run(models[factor], family), wanted[factor])
        finished.append(factor)

    threads = [threading.Thread(target=work, args=(factor,)) for factor in models]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(finished) == [0.5, 0.75]
    assert wrong == {0.5: 0, 0.75: 0}


@every_family
@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
def test_copies_are_plain_and_can_be_steered(family: Family, copied: Any) -> None:
    model, reference = family.build(), family.build()
    plain = run(reference, family)
    with steer.apply(reference, Scale()):
        edited = run(reference, family)
    with steer.apply(model, Scale()):
        twin = copied(model)  # before the first run, which makes LLaVA install hooks that cannot be pickled
        assert torch.equal(run(model, family), edited)
    assert type(twin) is type(model)
    assert steer_attributes(twin) == []
    assert torch.equal(run(twin, family), plain)
    before = snapshot(twin)
    with steer.apply(twin, Scale()):
        assert torch.equal(run(twin, family), edited)
    assert_untouched(before, twin)


@every_family
def test_save_pretrained_writes_the_plain_model(family: Family, tmp_path: Path) -> None:
    model = family.build()
    plain = run(model, family)
    model.save_pretrained(tmp_path / "plain")
    with steer.apply(model, Scale()):
        model.save_pretrained(tmp_path / "steered")
    configs = [json.loads((tmp_path / name / "config.json").read_text()) for name in ("plain", "steered")]
    assert configs[0] == configs[1]
    again = type(model).from_pretrained(tmp_path / "steered").eval()
    assert type(again) is type(model)
    weights = model.state_dict()
    assert all(torch.equal(value, weights[name]) for name, value in again.state_dict().items())
    assert relative_error(run(again, family), plain) <= 1e-5  # loaded weights lie elsewhere in memory: other kernels


@pytest.mark.parametrize("name", DIFFUSERS)
def test_attention_backend_set_while_steered(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    # diffusers makes it the backend of every model that has none of its own
    monkeypatch.setattr(_AttentionBackendRegistry, "_active_backend", _AttentionBackendRegistry._active_backend)
    family = FAMILIES[name]
    reference, model, method = family.build(), family.build(), Count()
    reference.set_attention_backend("_native_math")
    with steer.apply(model, method):
        model.set_attention_backend("_native_math")
        assert torch.equal(run(model, family), run(reference, family))
    assert method.calls > 0
    assert torch.equal(run(model, family), run(reference, family))


@pytest.mark.parametrize("name", ["sd15", "sd35", "flux", "mochi"])
def test_layerwise_casting_set_while_steered(name: str) -> None:
    family = FAMILIES[name]
    reference, model = family.build(), family.build()
    types = {"storage_dtype": torch.bfloat16, "compute_dtype": torch.float32}
    reference.enable_layerwise_casting(**types)
    handle = steer.apply(model, Through())
    model.enable_layerwise_casting(**types)
    assert torch.equal(run(model, family), run(reference, family))
    handle.remove()
    assert torch.equal(run(model, family), run(reference, family))


class ScaledAttention(TorchFunctionMode):
    """Multiplies what `scaled_dot_product_attention` returns, from the `skip`-th call on: an edit without steer."""

    def __init__(self, factor: torch.Tensor, skip: int) -> None:
        super().__init__()
        self.factor, self.skip = factor, skip

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is not F.scaled_dot_product_attention:
            return out
        self.skip -= 1
        return out if self.skip >= 0 else out * self.factor


@every_family
def test_an_edit_and_its_gradient_are_those_of_edited_attention(family: Family) -> None:
    model = family.build()
    factor = torch.tensor(0.8, requires_grad=True)

    def edited() -> tuple[torch.Tensor, torch.Tensor]:
        result = model(**inputs_of(family, model))
        prediction = result.logits if hasattr(result, "logits") else result.sample
        (slope,) = torch.autograd.grad(prediction.square().mean(), factor)
        return prediction.detach(), slope

    unseen, _ = UNSEEN.get(family.name, (0, ""))
    with ScaledAttention(factor, skip=unseen):  # Mochi pools its text before the first block
        wanted, slope = edited()
    with steer.apply(model, Scale(factor=factor)):
        result, steered_slope = edited()
    assert torch.equal(result, wanted)
    assert slope != 0
    assert relative_error(steered_slope, slope) <= 1e-5


@pytest.mark.parametrize("name", [name for name in FAMILIES if name != "llama"])  # token ids have no gradient
def test_gradients_of_the_inputs_are_the_unsteered_ones(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()

    def gradient() -> torch.Tensor:
        kwargs = inputs_of(family, model)
        name = next(name for name, value in kwargs.items() if value.is_floating_point())
        leaf = kwargs[name] = kwargs[name].requires_grad_()
        result = model(**kwargs)
        (result.logits if hasattr(result, "logits") else result.sample).square().mean().backward()
        return leaf.grad

    plain = gradient()
    assert plain.any()
    with steer.apply(model, Through()):
        assert torch.equal(gradient(), plain)


@pytest.mark.parametrize("name", ["sd15", "sd3", "flux", "wan21", "llama"])
def test_gradient_checkpointing_recomputes_the_edit(name: str) -> None:
    family = FAMILIES[name]
    slopes = []
    for checkpointing in (False, True):
        model = family.build().train()
        if checkpointing:
            model.enable_gradient_checkpointing() if name in DIFFUSERS else model.gradient_checkpointing_enable()
        model.requires_grad_()
        factor = torch.tensor(0.8, requires_grad=True)
        with steer.apply(model, Scale(factor=factor)):
            result = model(**inputs_of(family, model))
            (result.logits if name == "llama" else result.sample).square().mean().backward()
        slopes.append(factor.grad)
    assert slopes[0] != 0
    assert torch.equal(*slopes)


@pytest.mark.parametrize("copied", [copy.deepcopy, pickled], ids=["deepcopy", "pickle"])
@pytest.mark.parametrize("name", ["sd3", "wan22"])
def test_copies_of_a_pipeline_are_plain(name: str, copied: Any) -> None:
    tiny = PIPELINES[name]
    pipe = tiny.build()
    plain = generate(pipe, tiny.call_kwargs(pipe))
    with steer.apply(pipe, Scale()):
        twin = copied(pipe)
    assert type(twin) is type(pipe)
    assert type(twin.scheduler) is type(pipe.scheduler)
    assert steer_attributes(twin) == []
    assert torch.equal(generate(twin, tiny.call_kwargs(twin)), plain)


def test_a_copy_of_a_part_is_plain() -> None:
    model = FAMILIES["flux"].build()
    block = model.transformer_blocks[0]
    with steer.apply(model, steer.PAG(layers="transformer_blocks.1")):
        twin = copy.deepcopy(block)
    assert steer_attributes(twin) == []
    assert [type(part) for part in twin.modules()] == [type(part) for part in block.modules()]
    assert type(twin.attn.processor) is type(block.attn.processor)
