"""Language models: the tokens of the forward in flight, and what methods keep for a sequence while its cache lives."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask
from transformers import Cache, DynamicCache, EncoderDecoderCache, GenerationMixin, PreTrainedModel

from steer_patches.blocks import map_tensors
from steer_patches.family import family_of
from steer_patches.pictures import Pictures
from steer_patches.site import Run
from steer_patches.swap import mix

VALID = "valid"  # in `run.memory`: which tokens are real, where only 4-D masks say so
RUN = "steer_run"  # without the prefix that copies lose: a copied cache continues the same sequence


@dataclass(frozen=True, eq=False)
class Text:
    """The tokens of one forward of a language model.

    Args:
        past: tokens of the sequence before this forward, those that a method evicted from the cache included.
        new: tokens of this forward.
        positions: (B or 1, new) position ids that the model will use.
        valid: (B, past + new) bool, False = padding; None = all are real.
        cache: where keys and values are kept; None where the model runs without.
        pictures: those of the sequence up to its last token; None = there are none, or steer does not know the family.
    """

    past: int
    new: int
    positions: torch.Tensor
    valid: torch.Tensor | None = None
    cache: Cache | None = field(default=None, repr=False)
    pictures: Pictures | None = None


def generates(model: torch.nn.Module) -> bool:
    """Whether `model` is a transformers decoder, whose sequences steer can follow from forward to forward."""
    if not isinstance(model, PreTrainedModel) or getattr(model.config, "is_encoder_decoder", False):
        return False
    family = family_of(model)
    if family is not None and "causal" in family.kinds.values():  # PaliGemma's modules say that they are not
        return True
    return any(getattr(module, "is_causal", False) is True for module in model.modules())


def makes_cache(model: PreTrainedModel) -> bool:
    """Whether a forward of `model` may make a `DynamicCache` where it is given none."""
    rule: Any = GenerationMixin._supports_default_dynamic_cache  # by the class alone, base models included
    return "past_key_values" in inspect.signature(type(model).forward).parameters and rule.__func__(type(model))


def with_cache(model: PreTrainedModel, arguments: Mapping[str, Any]) -> Cache | None:
    """The cache of a forward with these arguments; where the model would make a `DynamicCache` itself, one made here.

    Models that attend to an encoder too make a cache of another kind, which is theirs to make.
    """
    cache = arguments.get("past_key_values")
    if cache is not None or model.training or arguments.get("encoder_hidden_states") is not None:
        return cache
    wanted = arguments.get("use_cache")
    wanted = getattr(model.config.get_text_config(decoder=True), "use_cache", False) if wanted is None else wanted
    return DynamicCache(config=model.config) if wanted and makes_cache(model) else None


def text_of(arguments: Mapping[str, Any], cache: Cache | None) -> tuple[Text | None, Run]:
    """The tokens of a forward, None where the arguments hold none, and the position in its sequence."""
    tokens = arguments.get("input_ids")
    tokens = arguments.get("inputs_embeds") if tokens is None else tokens
    run = _run_of(cache)
    past = run.tokens
    run.phase = "decode" if past else "prefill"
    if tokens is None:
        return None, run
    new = tokens.shape[1]
    positions = arguments.get("position_ids")
    if positions is None:
        positions = torch.arange(past, past + new, device=tokens.device)[None]
    elif positions.ndim == 3:  # one row each for time, height and width, or text before those
        positions = positions[0]
    valid = _valid(arguments.get("attention_mask"), run, tokens.shape[0], new)
    kept = cache.self_attention_cache if isinstance(cache, EncoderDecoderCache) else cache
    return Text(past, new, positions, valid, kept), run


def _run_of(cache: Cache | None) -> Run:
    """The run of the sequence in this cache; a new one where it is empty, or where there is no cache."""
    if cache is None:
        return Run()
    run: Run | None = cache.__dict__.get(RUN)
    tokens = int(cache.get_seq_length())  # forwards that are not steered add to it too
    if run is None or (run.step and not tokens):  # emptied by hand
        run = cache.__dict__[RUN] = Run(step=min(tokens, 1))  # what has tokens has had its prompt
    run.tokens = tokens
    if not isinstance(cache, Followed):
        mix(cache, Followed)
    return run


def _valid(mask: Any, run: Run, batch: int, new: int) -> torch.Tensor | None:
    """(B, tokens so far) bool of the real tokens, from the mask in any of transformers' forms; None = all are real."""
    tokens = run.tokens + new
    if isinstance(mask, Mapping):  # one mask for each kind of layer
        mask = mask.get("full_attention", next(iter(mask.values()), None))
    if isinstance(mask, BlockMask):
        rows, _, queries, keys = mask.shape
        mask = create_mask(mask.mask_mod, rows, 1, queries, keys, device=mask.kv_indices.device)
    if mask is None:
        return None
    valid = mask[:, :tokens].bool() if mask.ndim == 2 else _seen_by_any(mask, run, batch, tokens)
    return None if bool(valid.all()) else valid


def _seen_by_any(mask: torch.Tensor, run: Run, batch: int, tokens: int) -> torch.Tensor:
    """(B, tokens) bool: the tokens that a 4-D mask shows to any query; a real token sees itself.

    With sliding windows later masks have no columns for the tokens of the prompt, so what its mask says is kept.
    """
    seen = (mask if mask.dtype == torch.bool else mask == 0)[:, 0].any(1).expand(batch, -1)
    known: torch.Tensor | None = run.memory.get(VALID) if run.tokens else None
    if seen.shape[1] < tokens:  # the columns are the slots of a window
        seen = seen.new_ones(batch, tokens)
    if known is not None:
        known = known[:, : run.tokens].to(seen.device)
        seen = torch.cat([known, seen[:, known.shape[1] :]], 1)
    run.memory[VALID] = seen[:, :tokens]
    return run.memory[VALID]


def _caches(tree: Any) -> list[Cache]:
    """The caches that methods keep beside the sequence's own: of dynamic layers, which are only tensors."""
    if isinstance(tree, Cache):
        return [tree]
    items = tree.values() if isinstance(tree, Mapping) else tree if isinstance(tree, (list, tuple)) else ()
    return [cache for item in items for cache in _caches(item)]


class Followed:
    """Mixed into a cache: what methods keep for its sequences is reordered, repeated and dropped with it."""

    def _change(self, change: Callable[[torch.Tensor], torch.Tensor]) -> None:
        run: Run | None = self.__dict__.get(RUN)  # None: nothing was steered since the cache was emptied
        if run is not None:
            run.memory = map_tensors(run.memory, change)
            for cache in _caches(run.memory):
                for layer in cache.layers:
                    if layer.is_initialized:
                        layer.keys, layer.values = change(layer.keys), change(layer.values)

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        super().reorder_cache(beam_idx)  # type: ignore[misc]
        self._change(lambda tensor: tensor.index_select(0, beam_idx.to(tensor.device)))

    def batch_repeat_interleave(self, repeats: int) -> None:
        super().batch_repeat_interleave(repeats)  # type: ignore[misc]
        self._change(lambda tensor: tensor.repeat_interleave(repeats, dim=0))

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        super().batch_select_indices(indices)  # type: ignore[misc]
        self._change(lambda tensor: tensor[indices.to(tensor.device)])

    def reset(self) -> None:
        super().reset()  # type: ignore[misc]
        self.__dict__.pop(RUN, None)
