"""The base of methods in which each head of a language model sees the first tokens and its own window of the latest."""

from __future__ import annotations

import functools
import math
import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, ClassVar

import torch
import torch.nn.functional as F
from transformers.cache_utils import Cache, CacheLayerMixin, DynamicLayer, StaticLayer

from steer.bind import CompositionError
from steer.method import Method
from steer.select import SelectorError, parse_steps
from steer.windows import Group, Pair, Windows
from steer_kernels import BlockMask, block_sparse_attention, patterns
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.windowed_cache import Arriving, Kept, WindowedLayer

if TYPE_CHECKING:
    from steer_patches.generation import Text

BLOCK = 128  # tokens in a block of the prompt's masks
Sites = Mapping[str, tuple[Site, torch.Tensor | None]]


@dataclass(eq=False)
class Ready:
    """What one forward needs at a site, made outside of compiled graphs: `site.kernel`.

    Args:
        windows: of the site.
        past, longest: real tokens of the longest row before this forward, and with it.
        queries, keys: token numbers, (B or 1, new) and (B or 1, keys) int64, -1 = padding or not yet there.
        prefill: these are the first tokens of the sequence.
        plain: no row has padding.
        rows: real tokens of each row of a padded prompt.
        layer: the cache layer, where it evicts; weak, or the tokens of a sequence that is over would stay.
        extra: what a method adds.
    """

    windows: Windows
    past: int
    longest: int
    queries: torch.Tensor
    keys: torch.Tensor
    prefill: bool
    plain: bool
    rows: list[torch.Tensor] | None = None
    layer: weakref.ref[WindowedLayer] | None = None
    extra: Any = None

    def __post_init__(self) -> None:
        self.covers = self.windows.covers(self.longest)  # here: a compiled graph would be made again for each length

    @property
    def is_single(self) -> bool:
        """Whether each row has one new token and none has padding."""
        return self.plain and self.queries.shape[1] == 1


@dataclass(kw_only=True)
class Windowed(Method, register=False):
    """Causal attention of every head over the first tokens and the latest, with a cache that holds no more than that.

    The prompt runs through the block-sparse kernel, each row cut to its real tokens. What follows reads the kept keys,
    one call for each group of KV heads with equal windows. Layers of the model with a sliding window of their own stay
    as they are.

    Args:
        evict: keep only visible keys and values, in a `DynamicCache`. False computes the same on any cache by a mask
            and saves no memory; it takes what evicted tokens forbid: StaticCache and compiled decoding, assisted
            decoding, prompts that are cut back.
    """

    evict: bool = True

    stage: ClassVar[str] = "kernel"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_causal: ClassVar[bool] = True
    default_layers: ClassVar[str] = "*"
    without_preset: ClassVar[str] = "`steer.calibrate`"  # what the table of methods says, see `steer.sparse.Sparse`

    def __post_init__(self) -> None:
        super().__post_init__()
        unit, _, stop = parse_steps(self.steps)
        if self.evict and unit == "index" and stop != math.inf:
            raise ValueError(f"steps={self.steps!r} ends, but evicted tokens stay away: use evict=False")
        if self.evict and self.min_tokens > 1:
            raise ValueError(f"min_tokens={self.min_tokens} would leave generated tokens out: use evict=False")

    def windows(self, site: Site, tokens: int) -> Windows:
        """What the heads of a layer see. The one function to write.

        Args:
            site: the layer: `site.heads` query heads over `site.kv_heads` KV heads.
            tokens: real tokens of the prompt, of its longest row; the same for all that follows it.
        """
        raise NotImplementedError(f"{type(self).__name__} defines no windows(site, tokens)")

    def resolved(self, family: Family | None, has_clock: bool) -> Method:
        return replace(self)

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        """Refuse layers that all have a sliding window of their own, or whose cache holds no keys."""
        if all(site.window is not None for site in sites):
            raise SelectorError(
                f"layers={self.layers!r} matches only layers with a sliding window of their own, which "
                f"{type(self).__name__} leaves as they are"
            )
        latent = [site.name for site in sites if hasattr(model.get_submodule(site.name), "kv_lora_rank")]
        if self.evict and latent:
            raise CompositionError(
                f"{type(self).__name__}(evict=True) cannot drop keys of {latent[0]}, which caches what all heads make "
                "their keys from. Give evict=False: it computes the same on any cache, and saves no memory"
            )

    def prepare_cache(self, cache: Cache, sites: Sites) -> None:
        """Put layers that evict into the cache, where some head does not see everything."""
        if not self.evict:
            return
        placed = {}
        for site, heads in sites.values():
            if site.window is None:
                placed[site.layer_idx] = self._layer(cache, site, heads)
        for index, layer in placed.items():
            cache.layers[index] = layer

    def before_forward(self, scope: Scope, sites: Sites) -> None:
        text = scope.text
        if text is None:
            raise ValueError(f"{type(self).__name__} needs a forward that is given input_ids or inputs_embeds")
        numbers = _numbers(text)
        before, longest = (_longest(numbers[:, :end]) for end in (text.past, None))
        queries = numbers[:, text.past :].clone(memory_format=torch.contiguous_format)  # or graphs see its strides grow
        arriving = Arriving(queries, longest, text.valid is None)
        rows = None
        if text.past == 0 and text.valid is not None:
            rows = [(row >= 0).nonzero().flatten() for row in numbers]
        padded: dict[int, torch.Tensor] = {}  # for each length of the caches
        for site, heads in sites.values():
            site.kernel = None
            if site.window is not None:
                continue
            layer = _layer_of(text.cache, site) if text.cache is not None else None
            room = layer.get_max_length() if isinstance(layer, StaticLayer) else text.past + text.new
            if room not in padded:
                padded[room] = F.pad(numbers, (0, room - numbers.shape[1]), value=-1)
            windows = self._windows(site, heads)
            site.kernel = Ready(
                windows, before, longest, arriving.numbers, padded[room], text.past == 0, arriving.plain, rows
            )
            if isinstance(layer, WindowedLayer):
                layer.expect(arriving)
                site.kernel.layer = weakref.ref(layer)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready: Ready | None = call.site.kernel
        if ready is None:
            return next(call)
        layer = ready.layer() if ready.layer is not None else None
        kept = layer.take() if layer is not None else None
        if kept is not None and not ready.prefill:
            return self.over_kept(call, next, ready, kept)
        if ready.covers:
            return next(call)
        if ready.prefill and not torch.compiler.is_compiling():
            if not _is_causal(call, ready):
                raise ValueError(
                    f"the attention mask at {call.site.name} does more than hide later tokens and padding, as masks of "
                    f"packed texts do: {type(self).__name__} cannot tell what is first and what is latest"
                )
            same_width = call.query.shape[3] == call.value.shape[3]  # else no kernel skips blocks
            if is_softmax(call) and same_width and not _has_gradient(call):
                return self.over_prompt(call, ready)
        return self.over_all(call, next, ready)

    def over_prompt(self, call: Call, ready: Ready) -> torch.Tensor:
        """Attention of a prompt, (B, H, S, D), each row over its own tokens; padding gets zeros."""
        new = call.query.shape[2]
        query, key, value = call.query, call.key[:, :, :new], call.value[:, :, :new]  # static caches hold more
        if ready.rows is None:
            return self.over_row(call, ready, query, key, value)
        out = query.new_zeros(*query.shape[:3], value.shape[3])
        for row, real in enumerate(ready.rows):
            if len(real):
                cut = [x[row : row + 1].index_select(2, real) for x in (query, key, value)]
                out[row, :, real] = self.over_row(call, ready, *cut)[0]
        return out

    def over_row(
        self, call: Call, ready: Ready, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor
    ) -> torch.Tensor:
        """Attention of real tokens from the first on, (B, H, n, D), over keys and values (B, H_kv, n, D)."""
        groups, parts = ready.windows.groups(key.shape[1]), []
        for group in groups:
            part = call.replace(
                query=heads_of(query, group.heads),
                key=heads_of(key, group.kv_heads),
                value=heads_of(value, group.kv_heads),
                mask=None,
                is_causal=True,
            )
            covered = group.windows.covers(query.shape[2])
            parts.append(_causal(part) if covered else self.prompt_part(part, ready, group))
        return joined(parts, groups)

    def prompt_part(self, part: Call, ready: Ready, group: Group) -> torch.Tensor:
        """Attention of a prompt in a group of heads whose windows do not cover it, (B, H, n, D)."""
        mask = sink_window(part.query.shape[2], group.windows.pairs, part.query.device)
        return block_sparse_attention(part.query, part.key, part.value, mask, scale=part.scale)

    def over_kept(self, call: Call, next: Next, ready: Ready, kept: Sequence[Kept]) -> torch.Tensor:
        """Attention of later tokens, (B, H, S, D), over what the cache layer keeps for each group of heads."""
        groups, parts = ready.windows.groups(call.site.kv_heads), []
        for group, (key, value, numbers) in zip(groups, kept, strict=True):
            key = key.to(call.query.dtype)  # under autocast the cache holds fp32
            part = call.replace(query=heads_of(call.query, group.heads), key=key, value=value)
            if ready.plain and ready.covers:  # nothing was evicted: the model's own mask fits
                parts.append(next(part))
            else:
                parts.append(self.kept_part(part, next, ready, group, numbers))
        return joined(parts, groups)

    def kept_part(self, part: Call, next: Next, ready: Ready, group: Group, numbers: torch.Tensor) -> torch.Tensor:
        """Attention of later tokens in a group of heads, (B, H, S, D), over its keys with these token numbers."""
        if ready.is_single and group.sees_all(numbers):
            return masked(part, next, None)
        return masked(part, next, group.windows.seen(ready.queries, numbers))

    def over_all(self, call: Call, next: Next, ready: Ready) -> torch.Tensor:
        """Attention by a mask over all keys, (B, H, S, D)."""
        keep = ready.windows.seen(ready.queries, ready.keys)
        if call.mask is not None:
            visible, _ = call.visible()
            if visible is not None:
                keep = keep & visible | (ready.queries < 0)[:, None, :, None]
        return masked(call, next, keep)

    def computed_density(self, sites: Sites) -> float | None:
        """Visible pairs of queries and keys as a fraction of all causal ones, the mean over the sites."""
        ready = [site.kernel for site, _ in sites.values() if isinstance(site.kernel, Ready)]
        return sum(r.windows.share(r.past, r.longest) for r in ready) / len(ready) if ready else None

    def _windows(self, site: Site, heads: torch.Tensor | None) -> Windows:
        """The windows of a site for the sequence in flight; of its prompt's length, however long it grows."""
        memory, name = site.scope.run.memory, type(self).__name__
        if (name, "tokens") not in memory:
            assert site.scope.text is not None
            memory[name, "tokens"] = _longest(_numbers(site.scope.text))
        windows = self.windows(site, memory[name, "tokens"])
        if len(windows.window) != site.heads:
            raise ValueError(f"{len(windows.window)} windows for the {site.heads} query heads of {site.name}")
        return windows.within(heads)

    def _layer(self, cache: Cache, site: Site, heads: torch.Tensor | None) -> CacheLayerMixin:
        """The cache layer for a site: one that evicts where some head does not see all, else the one that is there."""
        name, layer, text = type(self).__name__, _layer_of(cache, site), site.scope.text
        groups = tuple(group.kept for group in self._windows(site, heads).groups(site.kv_heads))
        if isinstance(layer, WindowedLayer):
            if layer.groups == groups:
                return layer
            if layer.tokens:
                raise ValueError(
                    f"this cache keeps what {layer.owner} needs at {site.name}, which is not what {self.describe()} "
                    "needs: start a new sequence"
                )
            layer = DynamicLayer()  # it was emptied
        if all(window is None for _, _, window in groups):
            return layer
        if any(cache.is_dummy):
            raise ValueError(
                f"{name}(evict=True) cannot drop keys of {site.name}: layers of this model use those of others. Give "
                "evict=False: it computes the same on any cache, and saves no memory"
            )
        if type(layer) is not DynamicLayer:
            raise ValueError(
                f"{name}(evict=True) needs a DynamicCache; at {site.name} there is a {type(layer).__name__} in a "
                f"{type(cache).__name__}. Give evict=False: it computes the same on any cache, and saves no memory"
            )
        made = WindowedLayer(groups, name)
        if layer.get_seq_length():
            assert text is not None
            numbers = _numbers(text)[:, : text.past]
            made.adopt(layer, Arriving(numbers, _longest(numbers), text.valid is None))
        return made


def heads_of(x: torch.Tensor, heads: Sequence[int]) -> torch.Tensor:
    """Some heads of (B, H, S, D); a view where they are all or neighbours."""
    first, last = heads[0], heads[-1]
    return x[:, first : last + 1] if last - first + 1 == len(heads) else x[:, list(heads)]


def joined(parts: Sequence[torch.Tensor], groups: Sequence[Group]) -> torch.Tensor:
    """The outputs of all groups, (B, H, S, D), in the order of the heads."""
    if len(parts) == 1:
        return parts[0]
    order = [head for group in groups for head in group.heads]
    at = sorted(range(len(order)), key=order.__getitem__)
    return torch.cat(list(parts), 1)[:, at]


def _causal(call: Call) -> torch.Tensor:
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, is_causal=True, scale=call.scale, enable_gqa=True
    )


def masked(call: Call, next: Next, keep: torch.Tensor | None) -> torch.Tensor:
    """The call over the keys that `keep`, (B, H or 1, S, T) bool, shows; None = all. By the model's own backend, where
    that can.

    Raises:
        ValueError: it cannot, and the model's attention is more than a softmax.
    """
    backend = call.site.processor
    if keep is not None and backend == "eager":
        hidden = call.query.new_full((), torch.finfo(call.query.dtype).min)
        keep = torch.where(keep, torch.zeros_like(hidden), hidden)
    if backend in ("eager", "sdpa") or (keep is None and backend != "flex_attention"):
        return next(call.replace(mask=keep, is_causal=False))
    if not is_softmax(call):
        raise ValueError(
            f"{call.site.name} has logit caps or learned sinks, which steer cannot apply over chosen keys with "
            f'{backend}: load the model with attn_implementation="eager"'
        )
    return F.scaled_dot_product_attention(
        call.query, call.key, call.value, attn_mask=keep, scale=call.scale, enable_gqa=True
    )


@functools.lru_cache(maxsize=512)
def sink_window(tokens: int, pairs: tuple[Pair, ...], device: torch.device) -> BlockMask:
    """The block mask of a prompt for some heads."""
    if len(set(pairs)) == 1:
        pairs = pairs[:1]
    sinks = [min(sink, tokens) for sink, _ in pairs]
    windows = [tokens if window is None else min(window, tokens) for _, window in pairs]
    with torch.inference_mode(False):  # or forwards outside inference mode could not use it
        return patterns.sink_window(q_len=tokens, sink=sinks, window=windows, block_size=BLOCK, device=device)


def _is_causal(call: Call, ready: Ready) -> bool:
    """Whether the mask of a prompt hides later tokens and padding and nothing else."""
    keep, _ = call.visible()
    if keep is None:
        return True
    query, key = ready.queries[:, None, :, None], ready.keys[:, None, None, :]
    keep = keep.expand(*keep.shape[:2], query.shape[2], key.shape[3])
    is_padding = ~(keep & (key < 0)).any(-1, keepdim=True) | keep.all(-1, keepdim=True)  # else it is another text
    return bool(torch.where(query < 0, is_padding, keep == ((key >= 0) & (key <= query))).all())


def _has_gradient(call: Call) -> bool:
    return torch.is_grad_enabled() and any(x.requires_grad for x in (call.query, call.key, call.value))


def is_softmax(call: Call) -> bool:
    """Whether the model's attention is a plain softmax: no logit caps, no learned sinks, no dropout."""
    return call.extra.get("softcap") is None and call.extra.get("s_aux") is None and not call.extra.get("dropout")


def _layer_of(cache: Cache, site: Site) -> CacheLayerMixin:
    if site.layer_idx is None:
        raise ValueError(f"{site.name} does not say which layer of the cache is its own")
    while len(cache.layers) <= site.layer_idx and cache.layer_class_to_replicate is not None:
        cache.layers.append(cache.layer_class_to_replicate())
    return cache.layers[site.layer_idx]


def _numbers(text: Text) -> torch.Tensor:
    """(B or 1, past + new) int64: which real token of its row each token is; -1 = padding."""
    if text.valid is None:
        return torch.arange(text.past + text.new, device=text.positions.device)[None]
    return torch.where(text.valid, text.valid.cumsum(1) - 1, -1)


def _longest(numbers: torch.Tensor) -> int:
    return int(numbers.max()) + 1 if numbers.shape[1] else 0
