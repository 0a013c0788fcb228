"""Selectors are data: layers as globs over names, heads as lists, steps as fractions or indices."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from fnmatch import fnmatchcase
from typing import Any

import torch

from steer_patches.site import Site


class SelectorError(ValueError):
    """A selector names something that the model does not have."""


def expand_braces(pattern: str) -> list[str]:
    """`blocks.{8..10}` -> blocks.8, blocks.9, blocks.10; `{a,b}` -> a, b."""
    match = re.search(r"\{([^{}]*)\}", pattern)
    if match is None:
        return [pattern]
    span = re.fullmatch(r"(\d+)\.\.(\d+)", match[1])
    if span:
        first, last = int(span[1]), int(span[2])
        if first > last:
            raise SelectorError(f"the range {{{match[1]}}} in {pattern!r} is empty: write the smaller number first")
        options: Iterable[str] = (str(i) for i in range(first, last + 1))
    else:
        options = match[1].split(",")
    return [rest for o in options for rest in expand_braces(pattern[: match.start()] + o + pattern[match.end() :])]


def matches(pattern: str, name: str) -> bool:
    """Whether a brace-free glob matches a dotted name or one of its dotted prefixes."""
    parts = name.split(".")
    return any(fnmatchcase(".".join(parts[:n]), pattern) for n in range(1, len(parts) + 1))


def select(
    layers: str | Sequence[str], names: Sequence[str], what: str = "attention sites", field: str = "layers"
) -> list[str]:
    """The `names` that `layers` selects, in their order. Every pattern must match something.

    Raises:
        SelectorError: naming the pattern and what exists.
    """
    patterns = [p for entry in ([layers] if isinstance(layers, str) else layers) for p in expand_braces(entry)]
    if not patterns:
        raise SelectorError("layers is empty; leave it None for the family's preset, or name at least one layer")
    chosen: set[str] = set()
    for pattern in patterns:
        found = [name for name in names if matches(pattern, name)]
        if not found:
            raise SelectorError(f"{field}={pattern!r} matches none of this model's {what}. It has:\n{listing(names)}")
        chosen.update(found)
    return [name for name in names if name in chosen]


def listing(names: Sequence[str]) -> str:
    """Names a line each, runs of numbers folded: `blocks.{0..23}.attn`."""
    folded: dict[str, list[int]] = {}
    for name in names:
        number = re.search(r"(?<=\.)\d+(?=\.|$)", name)
        key = name[: number.start()] + "\0" + name[number.end() :] if number else name
        folded.setdefault(key, []).append(int(number[0]) if number else 0)
    lines = []
    for key, numbers in folded.items():
        span = f"{numbers[0]}" if len(numbers) == 1 else f"{{{numbers[0]}..{numbers[-1]}}}"
        if len(numbers) > 1 and numbers != list(range(numbers[0], numbers[-1] + 1)):
            span = "{" + ",".join(map(str, numbers)) + "}"
        lines.append("  " + key.replace("\0", span))
    return "\n".join(lines) or "  (nothing)"


ByLayer = Mapping[str, Sequence[int]]
Heads = ByLayer | Sequence[int] | Sequence[ByLayer]


def by_row(heads: Heads | None) -> bool:
    """Whether `heads` has a mapping for every picture of the batch."""
    if heads is None or isinstance(heads, Mapping):
        return False
    mappings = [isinstance(row, Mapping) for row in heads]
    if any(mappings) and not all(mappings):
        raise SelectorError(f"heads={heads!r} mixes mappings and numbers: give a mapping for every picture, or numbers")
    return any(mappings)


def layers_of(heads: Heads | None) -> list[str]:
    """The layer globs that `heads` names itself, none where it holds numbers only."""
    mappings: Any = [heads] if isinstance(heads, Mapping) else heads if by_row(heads) else []
    return list(dict.fromkeys(pattern for mapping in mappings for pattern in mapping))


def head_mask(heads: Heads | None, site: Site) -> torch.Tensor | None:
    """Boolean mask of the heads chosen at `site`: (H, 1, 1), or (R, H, 1, 1) by row, or None for all of them."""
    if heads is None:
        return None
    if by_row(heads):
        rows: Any = [head_mask(row, site) for row in heads]  # type: ignore[arg-type]
        return torch.stack(rows)
    if isinstance(heads, Mapping):
        numbers = {
            h for pattern, hs in heads.items() if any(matches(p, site.name) for p in expand_braces(pattern)) for h in hs
        }
    else:
        numbers = set(heads)  # type: ignore[arg-type]
    wrong = sorted(h for h in numbers if not 0 <= h < site.heads)
    if wrong:
        raise SelectorError(f"heads {wrong} do not exist at {site.name}: it has heads 0 to {site.heads - 1}")
    mask = torch.zeros(site.heads, 1, 1, dtype=torch.bool)
    mask[sorted(numbers)] = True
    return mask


def parse_steps(steps: str | range | None) -> tuple[str, float, float]:
    """("all", 0, 0), ("fraction", start, stop) or ("index", start, stop)."""
    if steps is None or steps == ":":
        return "all", 0, 0
    if isinstance(steps, range):
        if steps.step != 1:
            raise ValueError(f"steps={steps} must have a stride of 1")
        return "index", steps.start, steps.stop
    match = re.fullmatch(r"\s*([\d.]*)\s*:\s*([\d.]*)\s*", steps) if isinstance(steps, str) else None
    if match is None:
        raise ValueError(f'steps={steps!r} is not understood; write ":", "0.2:0.9" (fractions) or "3:10" (indices)')
    try:
        if "." in steps:
            start, stop = float(match[1] or 0.0), float(match[2] or 1.0)
            if not (0 <= start <= stop <= 1):
                raise ValueError(f"steps={steps!r}: fractions must satisfy 0 <= start <= stop <= 1")
            return "fraction", start, stop
        start, stop = int(match[1] or 0), int(match[2]) if match[2] else math.inf
    except ValueError as error:
        raise ValueError(f"steps={steps!r} is not understood: {error}") from None
    if start > stop:
        raise ValueError(f"steps={steps!r}: start must not exceed stop")
    return "index", start, stop


def is_active(steps: str | range | None, step: int, num_steps: int | None) -> bool:
    """Whether `step` lies in `steps`: start <= step < stop for indices, the same of step / num_steps for fractions."""
    unit, start, stop = parse_steps(steps)
    if unit == "all":
        return True
    if unit == "fraction":
        if not num_steps:
            raise ValueError(f"steps={steps!r} is in fractions, but the number of steps of this run is unknown")
        slack = 1e-9 * num_steps
        return start * num_steps - slack <= step < stop * num_steps - slack
    return start <= step < stop
