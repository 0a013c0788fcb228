"""A cache layer that keeps the first and the latest tokens, as many as each group of KV heads needs."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from transformers.cache_utils import CacheLayerMixin, DynamicLayer

from steer_patches.rotary import Rotary, turn

Kept = tuple[torch.Tensor, torch.Tensor, torch.Tensor]


@dataclass(eq=False)
class Store:
    """What one group of KV heads keeps of a sequence: its first `sink` tokens and its latest `window`.

    A token's place follows from its number among the real tokens of its row: number r lies at r while there is room,
    and later, as in a ring, at the one place from `sink` on that equals r modulo `window`. So rows of different
    lengths, whose padding is not kept, all have their sinks in front.

    Args:
        heads: KV heads of the group.
        sink, window: tokens; window None = every token is kept.
        keys, values: (B, heads, held, D), None before the first token.
        numbers: (B or 1, held) int64, which token of the row lies there; -1 = none.
    """

    heads: tuple[int, ...]
    sink: int
    window: int | None
    keys: torch.Tensor | None = None
    values: torch.Tensor | None = None
    numbers: torch.Tensor | None = None

    @property
    def capacity(self) -> int | None:
        """Most tokens that are kept; None = no limit."""
        return None if self.window is None else self.sink + self.window

    def add(self, keys: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor, longest: int, plain: bool) -> Kept:
        """Take in new tokens, and let go of what no later query may see.

        Args:
            keys, values: (B, heads, new, D).
            numbers: (B or 1, new) int64, -1 = padding.
            longest: real tokens of the longest row, the new ones included.
            plain: no row has padding, now or before.

        Returns:
            Keys, values and numbers for the queries of the new tokens: those held before, and the new.
        """
        if self.keys is None or self.values is None or self.numbers is None:
            full = (keys, values, numbers)
            if plain and longest <= (self.capacity or longest):
                self.keys, self.values, self.numbers = (x.clone() for x in full)  # which are written to later
                return full
        elif plain and longest - 1 >= (self.capacity or longest) and self._replace_one(keys, values, numbers, longest):
            return self.keys, self.values, self.numbers
        else:
            rows = max(len(self.numbers), len(numbers))
            both = self.numbers.expand(rows, -1), numbers.expand(rows, -1)
            full = (torch.cat([self.keys, keys], 2), torch.cat([self.values, values], 2), torch.cat(both, 1))
        if plain and (self.capacity is None or longest <= self.capacity):
            self.keys, self.values, self.numbers = full
        else:
            self.keys, self.values, self.numbers = self._placed(*full, longest)
        return full

    def _replace_one(self, keys: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor, longest: int) -> bool:
        """Write one token over the one that just left the window; False where memory must not be written to."""
        assert self.keys is not None and self.values is not None and self.numbers is not None
        frozen = self.keys.is_inference() and not torch.is_inference_mode_enabled()
        if keys.shape[2] != 1 or self.window is None or frozen or (torch.is_grad_enabled() and keys.requires_grad):
            return False
        place = self.sink + (longest - 1 - self.sink) % self.window
        self.keys[:, :, place], self.values[:, :, place] = keys[:, :, 0], values[:, :, 0]
        self.numbers[:, place] = longest - 1
        return True

    def _placed(self, keys: torch.Tensor, values: torch.Tensor, numbers: torch.Tensor, longest: int) -> Kept:
        """Those of these tokens that stay, each at its place."""
        held = longest if self.capacity is None else min(longest, self.capacity)
        place = torch.arange(held, device=numbers.device)
        last = numbers.amax(1, keepdim=True)
        wanted = place.expand(len(last), -1)
        if self.window is not None:
            wanted = torch.where(place < self.sink, place, last - (last - place) % self.window)
        wanted = torch.where(place <= last, wanted, -1)
        ordered, order = numbers.sort(1)
        at = torch.searchsorted(ordered, wanted.contiguous()).clamp(max=numbers.shape[1] - 1)
        wanted = torch.where(ordered.gather(1, at) == wanted, wanted, -1)
        at = order.gather(1, at)
        if len(at) == 1:
            return keys.index_select(2, at[0]), values.index_select(2, at[0]), wanted
        index = at[:, None, :, None]
        kept = [x.gather(2, index.expand(-1, x.shape[1], -1, x.shape[3])) for x in (keys, values)]
        return kept[0], kept[1], wanted

    def change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply `change` to all tensors."""
        if self.keys is not None and self.values is not None and self.numbers is not None:
            self.keys, self.values, self.numbers = change(self.keys), change(self.values), change(self.numbers)

    def change_rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        """Apply a change of the batch rows; numbers that all rows share stay."""
        if self.keys is not None and self.values is not None and self.numbers is not None:
            self.keys, self.values = change(self.keys), change(self.values)
            self.numbers = change(self.numbers) if len(self.numbers) > 1 else self.numbers

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(x.numel() * x.element_size() for x in (self.keys, self.values) if x is not None)


@dataclass
class Arriving:
    """The tokens of the forward in flight: numbers (B or 1, new), -1 = padding; see `Store.add` for the rest."""

    numbers: torch.Tensor
    longest: int
    plain: bool


class WindowedLayer(CacheLayerMixin):
    """A cache layer in which each group of KV heads keeps its first `sink` and its latest `window` tokens.

    To the model it looks as if nothing was evicted: lengths and mask sizes are those of the whole sequence. But only
    the method that put it there can compute with it: `update` returns the new keys and values alone, and `take` what
    the queries of the forward in flight may see. What was evicted is gone, so the layer cannot be cropped once
    anything was, and decoding that takes tokens back (assisted decoding) refuses it.

    Args:
        groups: (KV heads, sink, window) of each group; window None = every token is kept.
        owner: name of the method, for messages.
    """

    is_compileable = False
    is_croppable = False
    is_sliding = False

    def __init__(self, groups: Sequence[tuple[tuple[int, ...], int, int | None]], owner: str = "a method") -> None:
        super().__init__()
        self.groups, self.owner = tuple(groups), owner
        self.stores = [Store(*group) for group in groups]
        self.tokens = 0  # of the sequence, padding included
        self.longest = 0  # real tokens of the longest row
        self.base = 0  # what was taken off the position ids of the tokens after the sinks
        self.arriving: Arriving | None = None
        self.current: list[Kept] = []

    def adopt(self, layer: DynamicLayer, tokens: Arriving) -> None:
        """Take over from a layer that has kept every token until now."""
        self.expect(tokens)
        self.update(layer.keys, layer.values)
        self.take()

    def expect(self, arriving: Arriving) -> None:
        """Say which tokens the next `update` brings."""
        self.arriving = arriving

    def update(
        self, key_states: torch.Tensor, value_states: torch.Tensor, *args: Any, **kwargs: Any
    ) -> tuple[torch.Tensor, torch.Tensor]:
        arriving, self.arriving = self.arriving, None
        if arriving is None:
            raise RuntimeError(
                f"this cache keeps only what {self.owner} needs, and {self.owner} is not active in this forward: apply "
                "it again to go on with this sequence, or start a new one"
            )
        if not self.is_initialized:
            self.lazy_initialization(key_states, value_states)
        self.tokens += key_states.shape[2]
        self.longest = arriving.longest
        every = key_states.shape[1]
        self.current = []
        for store in self.stores:
            new = [x if len(store.heads) == every else x[:, list(store.heads)] for x in (key_states, value_states)]
            self.current.append(store.add(new[0], new[1], arriving.numbers, arriving.longest, arriving.plain))
        return key_states, value_states

    def take(self) -> list[Kept]:
        """Of each group the keys, values (B, heads, T, D) and token numbers (B or 1, T) for the forward in flight."""
        current, self.current = self.current, []
        return current

    @property
    def nbytes(self) -> int:
        """Bytes of the keys and values held."""
        return sum(store.nbytes for store in self.stores)

    @property
    def evicted(self) -> bool:
        """Whether any group has let go of a token."""
        return any(store.capacity is not None and self.longest > store.capacity for store in self.stores)

    def start_again(self, base: int, rotary: Rotary | None) -> None:
        """Take `base` off the position ids of all tokens but the sinks, and turn their keys to match."""
        for store in self.stores:
            first = store.sink
            if store.keys is not None and rotary is not None:
                by = torch.full((1, 1), self.base - base, device=store.keys.device)
                turned = turn(store.keys[:, :, first:], rotary.angles(by))
                store.keys = torch.cat([store.keys[:, :, :first], turned], 2)
        self.base = base

    def lazy_initialization(self, key_states: torch.Tensor, value_states: torch.Tensor) -> None:
        self.dtype, self.device, self.is_initialized = key_states.dtype, key_states.device, True

    def get_seq_length(self) -> int:
        return self.tokens

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.tokens + query_length, 0

    def get_max_length(self) -> int:
        return -1

    def offload(self) -> None:
        self._change(lambda tensor: tensor.to("cpu", non_blocking=True))

    def prefetch(self) -> None:
        self._change(lambda tensor: tensor.to(self.device, non_blocking=True))

    def reset(self) -> None:
        self.__init__(self.groups, self.owner)  # type: ignore[misc]

    def crop(self, tokens_to_remove: int) -> None:
        """Take the latest tokens back: `tokens_to_remove` is minus their number.

        Raises:
            ValueError: tokens were evicted, or rows have padding, so that the sequence before them is not known.
        """
        removed = abs(tokens_to_remove)
        if removed == 0 or not self.is_initialized:
            return
        if tokens_to_remove > 0:
            raise ValueError(f"crop({tokens_to_remove}): give minus the number of tokens to take back")
        if self.evicted or self.longest != self.tokens:
            why = "tokens before those were evicted" if self.evicted else "rows have padding"
            raise ValueError(
                f"cannot take {removed} tokens back from a cache that {self.owner} keeps short: {why}. Use "
                "evict=False for decoding that takes tokens back"
            )
        self.tokens = self.longest = max(self.tokens - removed, 0)
        for store in self.stores:
            assert store.keys is not None and store.values is not None and store.numbers is not None
            store.keys, store.values = store.keys[:, :, : self.tokens], store.values[:, :, : self.tokens]
            store.numbers = store.numbers[:, : self.tokens]

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        self._rows(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        self._rows(lambda tensor: tensor.repeat_interleave(repeats, 0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        self._rows(lambda tensor: tensor[indices.to(tensor.device)])

    def _rows(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for store in self.stores:
            store.change_rows(change)

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        for store in self.stores:
            store.change(change)
