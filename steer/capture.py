"""Read attention without changing it: selected columns of the map as running means, never the whole map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch

from steer.apply import apply
from steer.method import Method
from steer_kernels.partial import reference
from steer_patches.site import Call, Next

COLUMNS = ("text", "image", "all")


@dataclass(kw_only=True)
class Capture(Method, register=False):
    """The method behind `steer.capture`; `maps` fills while the model runs.

    Args:
        columns: keys to read: "text", "image", "all", or key indices.
        keep_heads: True = (B, H, S, columns) maps, False = the mean over heads, (B, S, columns).
        detach: False keeps the graph, so that a loss on a map reaches queries and keys.
    """

    columns: str | Sequence[int] = "text"
    keep_heads: bool = False
    detach: bool = True
    maps: dict[str, torch.Tensor] = field(default_factory=dict)

    stage: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.columns, str) and self.columns not in COLUMNS:
            raise ValueError(f"columns={self.columns!r} must be one of {', '.join(COLUMNS)}, or a list of key indices")
        self._counts: dict[str, int] = {}

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("steer.capture reads maps in Python: run the model uncompiled while capturing")
        if call.head_range is not None:
            raise RuntimeError("steer.capture would read the heads of this rank alone: capture on a single device")
        self._add(call.site.name, self._read(call))
        return next(call)

    def _read(self, call: Call) -> torch.Tensor:
        """The chosen columns of the softmax map, (B, [H,] S, columns)."""
        query, (key, _) = call.query, call.expanded()
        mask = call.mask
        if call.is_causal:
            rows, columns = query.shape[2], key.shape[2]
            mask = torch.ones(rows, columns, dtype=torch.bool, device=query.device).tril()
        elif mask is not None and mask.ndim == 2:
            mask = mask[:, None, None, :]
        chosen = self._columns(call, key.shape[2])
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        pieces: list[torch.Tensor] = []
        for part in query.split(1024, dim=2):  # rows a piece at a time: S x columns is kept, S x S never
            start = sum(p.shape[-2] for p in pieces)
            cut = mask[..., start : start + part.shape[2], :] if mask is not None and mask.shape[-2] != 1 else mask
            _, lse = reference.partial(part, key, key[..., :1], mask=cut, scale=call.softmax_scale)
            scores = (part @ key[:, :, chosen].transpose(-1, -2)).to(dtype) * call.softmax_scale
            if cut is not None:
                cut = cut[..., chosen] if cut.shape[-1] != 1 else cut
                scores = scores.masked_fill(~cut, -torch.inf) if cut.dtype == torch.bool else scores + cut
            weights = torch.exp(scores - lse.nan_to_num(neginf=0.0)[..., None])
            pieces.append(weights if self.keep_heads else weights.mean(1))
        return torch.cat(pieces, dim=-2)

    def _columns(self, call: Call, keys: int) -> slice | list[int]:
        if not isinstance(self.columns, str):
            return list(self.columns)
        if self.columns == "all":
            return slice(0, keys)
        if call.site.kind == "cross":
            return slice(0, keys) if self.columns == "text" else slice(0, 0)
        image, text = call.spans()
        return text if self.columns == "text" else image

    def _add(self, name: str, new: torch.Tensor) -> None:
        new = new.detach() if self.detach else new
        seen = self._counts.get(name, 0)
        old = self.maps.get(name)
        if old is not None and old.shape != new.shape:
            raise ValueError(
                f"{name} was captured as {tuple(old.shape)} and now gives {tuple(new.shape)}; capture one run at a time"
            )
        self.maps[name] = new if old is None else old + (new - old) / (seen + 1)
        self._counts[name] = seen + 1


@contextmanager
def capture(
    target: Any,
    layers: str | Sequence[str] | None = None,
    *,
    columns: str | Sequence[int] = "text",
    keep_heads: bool = False,
    rows: str | None = None,
    steps: str | range | None = None,
    detach: bool = True,
) -> Iterator[Capture]:
    """Read attention maps while the target runs; its outputs do not change.

    Args:
        target: a pipeline or a model.
        layers: glob or globs over sites; None = all of them.
        columns: keys to read: "text", "image", "all", or key indices.
        keep_heads: keep a map for each head instead of their mean.
        rows, steps: as on every method.
        detach: False keeps the graph for a loss on the maps.

    Yields:
        An object whose `.maps` holds, for each site name, the mean over steps and calls: (B, [H,] S, columns).
    """
    method = Capture(
        layers=layers or "*", columns=columns, keep_heads=keep_heads, rows=rows, steps=steps, detach=detach
    )
    if layers is None and columns in ("text", "image"):
        method.kinds = ("cross", "joint") if columns == "text" else ("self", "joint")  # type: ignore[misc]
    with apply(target, method):
        yield method
