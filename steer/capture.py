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
from steer.query_row import last_tokens
from steer_patches.family import family_of
from steer_patches.generation import generates
from steer_patches.pictures import Pictures
from steer_patches.site import Call, Next, Role, Run
from steer_patches.sites import plain

COLUMNS = ("text", "image", "all")
QUERIES = ("all", "last")


@dataclass(kw_only=True)
class Capture(Method, register=False):
    """The method behind `steer.capture`; `maps` fills while the model runs.

    Args:
        columns: keys to read: "text", "image", "all", or key indices.
        queries: "all", or "last" = of each forward the last token of every row alone.
        keep_heads: True = (B, H, S, columns) maps, False = the mean over heads, (B, S, columns).
        detach: False keeps the graph, so that a loss on a map reaches queries and keys.
        effective: read what the methods that compute the attention make of it.
    """

    columns: str | Sequence[int] = "text"
    queries: str = "all"
    keep_heads: bool = False
    detach: bool = True
    effective: bool = False

    stage: ClassVar[str] = "output"

    def __post_init__(self) -> None:
        super().__post_init__()
        if isinstance(self.columns, str) and self.columns not in COLUMNS:
            raise ValueError(f"columns={self.columns!r} must be one of {', '.join(COLUMNS)}, or a list of key indices")
        if self.queries not in QUERIES:
            raise ValueError(f"queries={self.queries!r} must be one of {', '.join(QUERIES)}")
        self._pictures: Pictures | None = None
        self._tokens: tuple[int, ...] = ()
        self._means: dict[str, tuple[torch.Tensor, int]] = {}  # of the calls and sequences that are over, and how many
        self._sequences: dict[str, Run] = {}  # in flight: their rows are in `run.memory`, where beam search moves them

    @property
    def maps(self) -> dict[str, torch.Tensor]:
        """For each site the map, (B, [H,] S, columns)."""
        found = {name: mean for name, (mean, _) in self._means.items()}
        for name, run in self._sequences.items():
            if self._key(name) in run.memory:  # else its first forward failed
                found[name] = self._mean_with(name, run.memory[self._key(name)]["rows"])[0]
        return found

    @property
    def pictures(self) -> Pictures | None:
        """With columns="image" or "text" in a vision-language model: what each token of the latest sequence shows.

        None where it has no picture.
        """
        return self._pictures

    @property
    def tokens(self) -> tuple[int, ...]:
        """In a language model: the tokens of the latest sequence whose columns the maps have, in this order."""
        return self._tokens

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if torch.compiler.is_compiling():
            raise RuntimeError("steer.capture reads maps in Python: run the model uncompiled while capturing")
        if call.head_range is not None:
            raise RuntimeError("steer.capture would read the heads of this rank alone: capture on a single device")
        name, read = call.site.name, self._probe if self.effective else self._read
        if call.site.kind == "causal" and call.text is not None:
            tokens = self._wanted(call)
            slots, exist = self._slots(call, tokens)
            self._append(call, tokens, read(call, slots, next).masked_fill(~exist, 0.0))
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
            weights = next(call.replace(value=marked))[..., : len(keys)]
            if self.queries == "last":
                weights = _rows_at(weights, last_tokens(call))
            pieces.append(self._kept(weights))
        return torch.cat(pieces, dim=-1)

    def _read(self, call: Call, chosen: slice | list[int] | torch.Tensor, next: Next) -> torch.Tensor:
        """The chosen columns of the softmax map, (B, [H,] S, columns)."""
        query, (key, _) = call.query, call.expanded()
        mask = _mask(call)
        if self.queries == "last":
            at = last_tokens(call)
            query, mask = _rows_at(query, at), None if mask is None else _rows_at(mask, at)
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

    def _wanted(self, call: Call) -> tuple[int, ...]:
        """The tokens of a sequence whose columns are read, in this order."""
        text = call.text
        assert text is not None
        tokens = text.past + text.new
        if not isinstance(self.columns, str):
            return tuple(index + tokens if index < 0 else index for index in self.columns)
        if self.columns == "all":
            return tuple(range(tokens))
        self._pictures = text.pictures
        known = self._known(call)
        start = text.past if known["ends"] else 0  # columns stay what they were for the rows before
        fresh = self._of_kind(call)[:, start:].any(0).nonzero().flatten() + start
        return (*(token for token in known["tokens"] if token < text.past), *fresh.tolist())

    def _of_kind(self, call: Call) -> torch.Tensor:
        """(B or 1, tokens) bool: those that show a part of a picture, or the others."""
        text = call.text
        assert text is not None
        if text.pictures is None:
            shows = torch.zeros(1, text.past + text.new, dtype=torch.bool, device=call.query.device)
        else:
            shows = text.pictures.shows.to(call.query.device)
        return shows if self.columns == "image" else ~shows

    def _slots(self, call: Call, wanted: Sequence[int]) -> tuple[torch.Tensor, torch.Tensor]:
        """Where tokens are among the call's keys, (columns,), and which are there and of the kind that is read.

        The latter is broadcastable to (B, [H,] S, columns).
        """
        assert call.text is not None
        tokens, keys = call.text.past + call.text.new, call.key.shape[2]
        gone = max(tokens - keys, 0)  # a sliding layer keeps the latest
        if gone and call.site.window is None:
            raise RuntimeError(
                f"{call.site.name}: this call has {keys} of the {tokens} keys of the sequence; a method keeps the rest "
                'in a cache of its own. Give that method evict=False, or capture the prompt alone: steps="0:1"'
            )
        places = torch.tensor(wanted, dtype=torch.int64, device=call.query.device)
        slots = places - gone
        there = (slots >= 0) & (slots < min(keys, tokens - gone))
        if self.columns in ("text", "image"):  # rows of a batch differ
            there = (there & self._of_kind(call)[:, places])[:, None]
            there = there[:, None] if self.keep_heads else there
        return slots.clamp(0, keys - 1), there

    def _known(self, call: Call) -> dict[str, Any]:
        """What is kept of a sequence at a site: its rows, the token each of them is of, plus 1, and their columns."""
        empty: dict[str, Any] = {"rows": None, "ends": (), "tokens": ()}
        return call.run.memory.get(self._key(call.site.name), empty)

    def _append(self, call: Call, tokens: tuple[int, ...], new: torch.Tensor) -> None:
        """Put the rows of this forward below those that the sequence has already."""
        text, run, name = call.text, call.run, call.site.name
        assert text is not None
        if text.past == 0 and name in self._sequences:  # another sequence begins: the one before is complete
            previous = self._sequences.pop(name).memory.get(self._key(name))
            if previous is not None:
                self._means[name] = self._mean_with(name, previous["rows"])
        known = self._known(call)
        every = range(text.past + 1, text.past + text.new + 1)
        ends = tuple(end for end in known["ends"] if end <= text.past)  # assisted decoding takes tokens back
        old = new[..., :0, :] if known["rows"] is None else known["rows"][..., : len(ends), :]
        if isinstance(self.columns, str):  # earlier queries did not see the tokens that came since
            width = max(old.shape[-1], new.shape[-1])
            old, new = (F.pad(part, (0, width - part.shape[-1])) for part in (old, new))
        ends += tuple(every)[-new.shape[-2] :]
        run.memory[self._key(name)] = {"rows": torch.cat([old, new], dim=-2), "ends": ends, "tokens": tokens}
        self._sequences[name], self._tokens = run, tokens

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
        return torch.ones(rows, keys, dtype=torch.bool, device=call.query.device).tril(keys - rows)[None, None]
    return keep


def _rows_at(tensor: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(B, H, 1, ...): of (B or 1, H, S or 1, ...) the query `at` (B,) of each row."""
    if tensor.shape[2] == 1:
        return tensor
    tensor = tensor.expand(len(at), -1, -1, -1)
    return tensor.gather(2, at.view(-1, 1, 1, 1).expand(-1, tensor.shape[1], 1, tensor.shape[3]))


@contextmanager
def capture(
    target: Any,
    layers: str | Sequence[str] | None = None,
    *,
    columns: str | Sequence[int] = "text",
    queries: str = "all",
    keep_heads: bool = False,
    rows: Role | None = None,
    steps: str | range | None = None,
    detach: bool = True,
    effective: bool = False,
) -> Iterator[Capture]:
    """Read attention maps while the target runs; its outputs do not change.

    Args:
        target: a pipeline or a model.
        layers: glob or globs over sites; None = all of them.
        columns: keys to read: "text", "image", "all", or key indices. In a language model indices are those of tokens
            (negative ones count from the last token of each forward). In a vision-language model "image" reads what the
            decoder's layers give to the tokens that show a part of a picture, "text" what they give to all others.
        queries: "all", or "last" = of each forward the last token of every row alone, which makes the next token: of
            `generate` a row for each token of the answer, at next to no cost.
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

        `.tokens` says which token each column is. With "image" and "text" these are the tokens that are of this kind
        in any row of the batch, and what is none in its own row has 0 there; `.pictures` says what each token shows.

    Raises:
        ValueError: an unknown name in `columns` or `queries`, or one that the target does not have. While running or
            on reading `.maps`: runs of different sizes.
        RuntimeError: while running: compiled, or after the prompt under a method with a cache of its own.
    """
    decodes = isinstance(target, torch.nn.Module) and generates(plain(target))
    family = family_of(plain(target)) if decodes else None
    by_kind = columns in ("text", "image")
    if decodes and by_kind and (family is None or family.pictures is None):
        raise ValueError(
            f"columns={columns!r}: {type(plain(target)).__name__} takes no pictures, or steer does not know which of "
            'its tokens show them; give columns="all" or a list of token indices, e.g. columns=[0]'
        )
    if queries == "last" and not decodes:
        raise ValueError(f'queries="last" reads the token that makes the next one; {type(target).__name__} makes none')
    method = Capture(
        layers=layers or "*",
        columns=columns,
        queries=queries,
        keep_heads=keep_heads,
        rows=rows,
        steps=steps,
        detach=detach,
        effective=effective,
    )
    if decodes and by_kind:
        method.needs_pictures, method.kinds = True, ("causal",)  # type: ignore[misc]
    elif layers is None and by_kind:
        method.kinds = ("cross", "joint") if columns == "text" else ("self", "joint")  # type: ignore[misc]
    with apply(target, method):
        yield method
