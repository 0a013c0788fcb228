"""Selectors: globs with braces, heads, steps."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from steer.select import SelectorError, expand_braces, head_mask, is_active, listing, parse_steps, select
from steer_patches.site import Site

NAMES = [f"transformer_blocks.{i}.attn" for i in range(12)] + ["mid_block.attentions.0.attn1"]


@pytest.mark.parametrize(
    "layers, numbers",
    [
        ("transformer_blocks.1", [1]),  # not 10 and 11, which a regular expression would find too
        ("transformer_blocks.{8..10}", [8, 9, 10]),
        ("transformer_blocks.{1,11}.attn", [1, 11]),
        (["transformer_blocks.3", "mid_block"], [3, 12]),
        ("mid_block", [12]),
        ("*.attn1", [12]),
        ("*", list(range(13))),
        ("transformer_blocks.1?", [10, 11]),
    ],
)
def test_select(layers: str | list[str], numbers: list[int]) -> None:
    assert select(layers, NAMES) == [NAMES[i] for i in numbers]


@pytest.mark.parametrize("layers", ["blocks.1", "transformer_blocks.12", "transformer_blocks.{10..12}", "", []])
def test_what_matches_nothing_raises_and_lists(layers: str | list[str]) -> None:
    with pytest.raises(SelectorError) as error:
        select(layers, NAMES)
    assert not layers or "transformer_blocks.{0..11}.attn" in str(error.value)


def test_braces() -> None:
    assert expand_braces("a.{1..2}.{x,y}") == ["a.1.x", "a.1.y", "a.2.x", "a.2.y"]
    with pytest.raises(SelectorError, match="smaller number first"):
        expand_braces("a.{5..2}")


def test_listing_folds_numbers() -> None:
    assert listing(NAMES).splitlines() == ["  transformer_blocks.{0..11}.attn", "  mid_block.attentions.0.attn1"]


def test_head_mask() -> None:
    site = Site("blocks.3.attn", 0, "self", 4, 4, 8, "P")
    assert head_mask(None, site) is None
    assert head_mask([0, 3], site).flatten().tolist() == [True, False, False, True]  # type: ignore[union-attr]
    by_layer = head_mask({"blocks.{3..4}": [1], "blocks.5": [2]}, site)
    assert torch.equal(by_layer, torch.tensor([0, 1, 0, 0]).bool().view(4, 1, 1))  # type: ignore[arg-type]
    with pytest.raises(SelectorError, match=r"heads \[4\] do not exist at blocks.3.attn: it has heads 0 to 3"):
        head_mask([4], site)


@pytest.mark.parametrize(
    "steps, num_steps, active",
    [
        (None, 4, [0, 1, 2, 3]),
        (":", 4, [0, 1, 2, 3]),
        ("1:3", 4, [1, 2]),
        (range(2, 9), 4, [2, 3]),
        ("2:", 4, [2, 3]),
        ("0.2:", 4, [1, 2, 3]),  # a dense start of at least a fifth
        ("0.2:", 10, [2, 3, 4, 5, 6, 7, 8, 9]),
        ("0.01:0.2", 28, [1, 2, 3, 4, 5]),  # skip-layer guidance of SD3.5 in diffusers
        (":0.2", 4, [0]),
        ("0.0:1.0", 3, [0, 1, 2]),
        ("0.3:0.6", 10, [3, 4, 5]),
    ],
)
def test_steps(steps: str | range | None, num_steps: int, active: list[int]) -> None:
    assert [i for i in range(num_steps) if is_active(steps, i, num_steps)] == active


@given(st.floats(0, 1), st.floats(0, 1), st.integers(1, 200))
def test_fractions_partition_the_run(a: float, b: float, n: int) -> None:
    """Windows that meet cover every step once."""
    low, high = sorted((round(a, 3), round(b, 3)))
    windows = [f"0.0:{low:.3f}", f"{low:.3f}:{high:.3f}", f"{high:.3f}:1.0"]
    assert all(sum(is_active(w, i, n) for w in windows) == 1 for i in range(n))


@pytest.mark.parametrize("steps", ["abc", "0.5", "0.9:0.2", "5:2", "0.2:1.5", range(0, 9, 2), "1:2:3"])
def test_bad_steps(steps: str | range) -> None:
    with pytest.raises(ValueError, match="steps="):
        parse_steps(steps)
