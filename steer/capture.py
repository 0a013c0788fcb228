"""Read attention without changing it: selected columns of the map as running means, never the whole map."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
import torch.nn.functional as F

from steer.apply import apply
from steer.method import Method
from steer_patches.attach import plain
from steer_patches.generation import generates
from steer_patches.site import Call, Next, Run

COLUMNS = ("text", "image", "all")


@dataclass(kw_only=True)
class Capture(Method, register=False):
    """The method behind `steer.capture`; `maps` fills while the model runs.

    Args:
        columns: keys to read: "text", "image", "all", or key indices.
        keep_heads: True = (B, H, S, columns) maps, False = the mean over heads, (B, S, columns).
        detach: False keeps the graph, so that a loss on a map reaches queries and keys.
        effective: read what the methods that compute the attention make of it.
    """

    columns: str | Sequence[int] = "text"
    keep_heads: bool = False
    detach: bool = True
    effective: bool = False

    stage: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.columns, str) and self.columns not in COLUMNS:
            raise ValueError(f"columns={self.columns!r} must be one of {', '.join(COLUMNS)}, or a list of key indices")
        self._means: dict[str, tuple[torch.Tensor, int]] = {}  # of the calls and sequences that are over, and how many
        self._sequences: dict[str, Run] = {}  # in flight: their rows are in `run.memory`, where beam search moves them

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        """For each site the map, (B, [H,] S, columns)."""
        found = {name: mean for name, (mean, _) in self._means.items()}
        for name, run in self._sequences.items():
            found[name] = self._mean_with(name, run.memory[self._key(name)]["rows"])[0]
        return found

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("steer.capture reads maps in Python: run the model uncompiled while capturing")
        if call.head_range is not None:
            raise RuntimeError("steer.capture would read the heads of this rank alone: capture on a single device")
        name, read = call.site.name, self._probe if self.effective else self._read
        if call.site.kind == "causal" and call.text is not None:
            slots, exist = self._slots(call)
            self._append(call, read(call, slots, next).masked_fill(~exist, 0.0))
        else:
            self._means[name] = self._mean_with(name, read(call, self._columns(call), next))
        return next(call)

    def _probe(self, call: Call, chosen: slice | list[int] | torch.Tensor, next: Next) -> torch.Tensor:
        """The same columns, measured: values that are 1 at one key and 0 at all others give its weights."""
        value = torch.zeros_like(call.value)
        pieces: list[torch.Tensor] = []
        for keys in torch.arange(value.shape[2], device=value.device)[chosen].split(value.shape[3]):  # one a channel
            marked = value.clone()
            marked[:, :, keys, torch.arange(len(keys), device=value.device)] = 1
            pieces.append(self._kept(next(call.replace(value=marked))[..., : len(keys)]))
        return torch.cat(pieces, dim=-1)

    def _read(self, call: Call, chosen: slice | list[int] | torch.Tensor, next: Next) -> torch.Tensor:
        """The chosen columns of the softmax map, (B, [H,] S, columns)."""
        query, (key, _) = call.query, call.expanded()
        mask = _mask(call)
        own_sdpa = call.site.processor == "sdpa"  # it takes neither of these two
        softcap, sinks = (None if own_sdpa else call.extra.get(name) for name in ("softcap", "s_aux"))
        dtype = torch.float64 if query.dtype == torch.float64 else torch.float32
        pieces: list[torch.Tensor] = []
        for start in range(0, query.shape[2], 1024):  # rows a piece at a time: S x columns is kept, S x S never
            rows = slice(start, start + 1024)
            scores = (query[:, :, rows] @ key.mT).to(dtype) * call.softmax_scale
            if softcap is not None:
                scores = softcap * torch.tanh(scores / softcap)
            if mask is not None:
                cut = mask[..., rows, :] if mask.shape[-2] != 1 else mask
                scores = scores.masked_fill(~cut, -torch.inf) if cut.dtype == torch.bool else scores + cut
            lse = torch.logsumexp(scores, -1, keepdim=True)
            if sinks is not None:  # a learned logit in every row
                lse = torch.logaddexp(lse, sinks.to(dtype)[:, None, None])
            weights = torch.exp(scores[..., chosen] - lse.nan_to_num(neginf=0.0))
            pieces.append(self._kept(weights))
        return torch.cat(pieces, dim=-2)

    def _kept(self, weights: torch.Tensor) -> torch.Tensor:
        weights = weights if self.keep_heads else weights.mean(1)
        return weights.detach() if self.detach else weights

    def _columns(self, call: Call) -> slice | list[int]:
        if not isinstance(self.columns, str):
            return list(self.columns)
        keys = call.key.shape[2]
        if self.columns == "all":
            return slice(0, keys)
        if call.site.kind == "cross":
            return slice(0, keys) if self.columns == "text" else slice(0, 0)
        image, text = call.spans()
        return text if self.columns == "text" else image

    def _slots(self, call: Call) -> tuple[torch.Tensor, torch.Tensor]:
        """Where the wanted tokens of a sequence are among the call's keys, (columns,), and which of them are there."""
        assert call.text is not None
        tokens, keys = call.text.past + call.text.new, call.key.shape[2]
        gone = max(tokens - keys, 0)  # a sliding layer keeps the latest
        if gone and call.site.window is None:
            raise RuntimeError(
                f"{call.site.name}: this call has {keys} of the {tokens} keys of the sequence; a method keeps the rest "
                'in a cache of its own. Give that method evict=False, or capture the prompt alone: steps="0:1"'
            )
        wanted = torch.arange(tokens) if isinstance(self.columns, str) else torch.tensor(self.columns)
        wanted = torch.where(wanted < 0, wanted + tokens, wanted)
        slots = wanted.to(call.query.device) - gone
        there = (slots >= 0) & (slots < min(keys, tokens - gone))
        return slots.clamp(0, keys - 1), there

    def _append(self, call: Call, new: torch.Tensor) -> None:
        """Put the rows of this forward below those that the sequence has already."""
        text, run, name = call.text, call.run, call.site.name
        assert text is not None
        if text.past == 0 and name in self._sequences:  # another sequence begins: the one before is complete
            previous = self._sequences.pop(name)
            self._means[name] = self._mean_with(name, previous.memory[self._key(name)]["rows"])
        known = run.memory.get(self._key(name), {"start": text.past, "rows": new[..., :0, :]})
        old = known["rows"][..., : text.past - known["start"], :]  # assisted decoding takes tokens back
        if isinstance(self.columns, str):  # earlier queries did not see the tokens that came since
            width = max(old.shape[-1], new.shape[-1])
            old, new = (F.pad(part, (0, width - part.shape[-1])) for part in (old, new))
        run.memory[self._key(name)] = {**known, "rows": torch.cat([old, new], dim=-2)}
        self._sequences[name] = run

    def _key(self, name: str) -> tuple[str, int, str]:
        return (type(self).__name__, id(self), name)

    def _mean_with(self, name: str, new: torch.Tensor) -> tuple[torch.Tensor, int]:
        """The mean of what was captured at a site and one more map; the number of maps in it."""
        if name not in self._means:
            return new, 1
        old, seen = self._means[name]
        if old.shape != new.shape:
            raise ValueError(
                f"{name} was captured as {tuple(old.shape)} and now gives {tuple(new.shape)}; capture one run at a time"
            )
        return old + (new - old) / (seen + 1), seen + 1


def _mask(call: Call) -> torch.Tensor | None:
    """The mask of a call, boolean or additive, broadcastable to (B, H, S, S_kv); None = every key is visible."""
    rows, keys = call.query.shape[2], call.key.shape[2]
    if isinstance(call.mask, torch.Tensor) and call.mask.ndim == 4:  # an additive one may hold biases
        return call.mask[..., :keys]
    keep, causal = call.visible()
    if causal:  # the last query is the last key's
        return torch.ones(rows, keys, dtype=torch.bool, device=call.query.device).tril(keys - rows)
    return keep


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
    effective: bool = False,
) -> Iterator[Capture]:
    """Read attention maps while the target runs; its outputs do not change.

    Args:
        target: a pipeline or a model.
        layers: glob or globs over sites; None = all of them.
        columns: keys to read: "text", "image", "all", or key indices. In a language model "all" or indices of tokens
            (negative ones count from the last token of each forward).
        keep_heads: keep a map for each head instead of their mean.
        rows, steps: as on every method.
        detach: False keeps the graph for a loss on the maps.
        effective: False = the softmax of queries and keys as methods of the stages "inputs" and "scores" leave them.
            True = the weights with which methods of the stage "kernel" (ACT, sparse ones) really combine the values, if
            their output is linear in these. Costs one more attention for every head_dim columns.

    Yields:
        An object whose `.maps` holds, for each site name, the mean over steps and calls: (B, [H,] S, columns).

        In a language model the rows of every forward are put below those of its sequence before, so that `generate`
        gives what one forward over all its tokens would: columns=[0] reads (B, [H,] tokens, 1) at next to no cost,
        columns="all" the whole square map. Two sequences of the same length are averaged.

    Raises:
        ValueError: an unknown name in `columns`, or one that the target does not have. While running or on reading
            `.maps`: runs of different sizes.
        RuntimeError: while running: compiled, or after the prompt under a method with a cache of its own.
    """
    if columns in ("text", "image") and isinstance(target, torch.nn.Module) and generates(plain(target)):
        raise ValueError(
            f'columns={columns!r}: steer tells no text from images in a language model; give columns="all" or a list '
            "of token indices, e.g. columns=[0]"
        )
    method = Capture(
        layers=layers or "*",
        columns=columns,
        keep_heads=keep_heads,
        rows=rows,
        steps=steps,
        detach=detach,
        effective=effective,
    )
    if layers is None and columns in ("text", "image"):
        method.kinds = ("cross", "joint") if columns == "text" else ("self", "joint")  # type: ignore[misc]
    with apply(target, method):
        yield method
