"""Plans: step groups, layers, and what of them is on disk."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

import steer
from steer import Plan
from steer.method import _REGISTRY

SITES = ("blocks.0.attn1", "blocks.1.attn1")


def plan(**changes: Any) -> Plan:
    tensors = {
        "mode": torch.arange(12, dtype=torch.int8).view(3, 2, 2),
        "blocks": torch.rand(3, 2, 2, 5, 7, generator=torch.Generator().manual_seed(0)) < 0.3,
        "weight": torch.randn(3, 4, generator=torch.Generator().manual_seed(1), dtype=torch.float64)[:, ::2],
    }
    report = {"seed": 3, "options": {"epsilon": 0.1}, "names": {"mode": ["full", "skip"]}, "grid": [3, 4, 6]}
    return Plan(
        **{"sites": SITES, "heads": 2, "starts": (0.0, 0.3, 0.5), "tensors": tensors, "report": report, **changes}
    )


@pytest.fixture
def planned() -> Any:
    """A method of this test that carries a plan and knows a default for another field."""

    @dataclass(kw_only=True)
    class Planned(steer.Method):
        plan: Plan | None = None
        other: Plan | None = None
        factor: torch.Tensor | None = None

    yield Planned
    del _REGISTRY["Planned"]


@pytest.mark.parametrize("steps", [1, 4, 7, 10, 50])
def test_a_step_is_in_the_last_group_that_has_begun(steps: int) -> None:
    starts = (0.0, 0.3, 0.5)
    for step in range(steps):
        begun = [g for g, start in enumerate(starts) if round(start * steps, 9) <= step]
        assert plan().group(step, steps) == begun[-1]


def test_one_group_needs_no_number_of_steps_and_several_do() -> None:
    assert plan(starts=(0.0,)).group(7, None) == 0
    with pytest.raises(ValueError, match="3 step groups, but the number of steps of this run is unknown"):
        plan().group(0, None)


def test_layer_is_the_place_of_the_site() -> None:
    assert [plan().layer(site) for site in SITES] == [0, 1]
    with pytest.raises(
        ValueError, match=r"nothing for blocks\.2\.attn1; it was made for:\n  blocks\.\{0\.\.1\}\.attn1"
    ):
        plan().layer("blocks.2.attn1")


@pytest.mark.parametrize("starts", [(), (0.1,), (0.0, 0.5, 0.5), (0.0, 0.6, 0.3), (0.0, 1.0)])
def test_starts_that_are_no_step_groups(starts: tuple[float, ...]) -> None:
    with pytest.raises(ValueError, match="begin at 0, ascend"):
        plan(starts=starts)


def test_a_site_that_is_named_twice() -> None:
    with pytest.raises(ValueError, match="names a site twice"):
        plan(sites=("a", "a"))


@pytest.mark.parametrize("changes", [{}, {"grid": (3, 4, 6), "text_tokens": 7, "block_size": 8}, {"tensors": {}}])
def test_save_and_load_give_the_same_plan(planned: Any, tmp_path: Path, changes: dict[str, Any]) -> None:
    given = planned(plan=plan(**changes), other=plan(heads=3), factor=torch.tensor([0.1, 0.2]), layers="blocks.0")
    given.save(str(tmp_path))
    loaded = steer.load(tmp_path)
    assert torch.equal(loaded.factor, given.factor) and loaded.layers == "blocks.0"
    for name in ("plan", "other"):
        now, then = getattr(loaded, name), getattr(given, name)
        assert list(now.tensors) == sorted(then.tensors)
        for key, tensor in then.tensors.items():
            assert now.tensors[key].dtype == tensor.dtype and torch.equal(now.tensors[key], tensor)
        fields = ("sites", "heads", "grid", "text_tokens", "block_size", "starts", "report")
        assert [getattr(now, field) for field in fields] == [getattr(then, field) for field in fields]


def test_booleans_are_bits_on_disk(planned: Any, tmp_path: Path) -> None:
    planned(plan=plan()).save(str(tmp_path))
    bits = load_file(tmp_path / "steer.safetensors")["plan.blocks"]
    assert bits.dtype == torch.uint8 and bits.numel() == -(-3 * 2 * 2 * 5 * 7 // 8)


def test_a_newer_format_is_refused(planned: Any, tmp_path: Path) -> None:
    planned(plan=plan()).save(str(tmp_path))
    document = json.loads((tmp_path / "steer.json").read_text())
    (tmp_path / "steer.json").write_text(json.dumps({**document, "format": document["format"] + 1}))
    with pytest.raises(ValueError, match="has format 2; this version of steer reads 1"):
        steer.load(tmp_path)


def test_a_plan_whose_tensors_are_gone(planned: Any, tmp_path: Path) -> None:
    planned(plan=plan()).save(str(tmp_path))
    (tmp_path / "steer.safetensors").unlink()
    with pytest.raises(FileNotFoundError, match=r"steer\.safetensors"):
        steer.load(tmp_path)


def test_a_method_prints_its_plan_shortly(planned: Any) -> None:
    text = planned(plan=plan(grid=(3, 4, 6))).describe()
    assert text == "Planned(plan=Plan(3 step groups, 2 sites x 2 heads, 3x4x6, blocks, mode, weight))"
