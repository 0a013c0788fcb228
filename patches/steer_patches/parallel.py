"""Context parallelism: the chain sees the whole sequence of a share of the heads, as Ulysses computes attention.

Under `model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=n))` a processor holds one rank's share of
the sequence with all heads, and diffusers exchanges the two inside the attention backend. A method needs whole rows of
the attention map, so where a site has a chain the exchange is made here, around the chain, instead.
"""

from __future__ import annotations

from typing import Any

import torch
from diffusers.models.attention_dispatch import (
    SeqAllToAllDim,
    all_to_all_single_any_o_async,
    all_to_all_single_any_qkv_async,
)

from steer_patches.site import Call, Next, Site, run_chain


class ParallelismError(RuntimeError):
    """A call is split between devices in a way in which no method can compute it."""


def run_chain_whole(call: Call, config: Any, split_keys: bool, terminal: Next) -> torch.Tensor:
    """Run the chain of the call's site on the whole sequence and this rank's heads; collective.

    Args:
        call: query (B, H, S / n, D) with all H heads, key and value (B, H_kv, S_kv / n, D).
        config: diffusers' `ContextParallelConfig` of n ranks, set up.
        split_keys: False where every rank holds all keys and values, (B, H_kv, S_kv, D).
        terminal: computes a call that is whole.

    Returns:
        (B, H, S / n, D): this rank's share of the sequence, with all heads.

    Raises:
        ParallelismError: ring attention, heads that cannot be shared out, a mask or text that is split otherwise.
    """
    site, local = call.site, call.query.shape
    refuse_ring(site.name, config)
    heads, kv_heads = _own_heads(site.name, local[1], call.key.shape[1], config)
    query = _gather(call.query, config)
    key, value = (_gather(x, config) if split_keys else x[:, kv_heads] for x in (call.key, call.value))
    pieces = _pieces(site, query.shape[2], local[2], config)
    key_pieces = pieces if split_keys and key.shape[2] == query.shape[2] else []
    whole = call.replace(
        query=_in_order(query, pieces, 2),
        key=_in_order(key, key_pieces, 2),
        value=_in_order(value, key_pieces, 2),
        mask=_whole_mask(call, config, heads, (query.shape[2], key.shape[2]), key_pieces if split_keys else None),
        head_range=heads,
        extra=call.extra | {"parallel_config": None},
    )
    out = run_chain(site.chain, 0, whole, terminal)
    return _scatter(_as_gathered(out, pieces, 2), local, config)


def refuse_ring(site: str, config: Any) -> None:
    """Raise `ParallelismError` where the keys of a query are never in one place."""
    if config.ring_degree > 1:
        raise ParallelismError(
            f"{site} runs ring attention (ring_degree={config.ring_degree}), in which no rank ever holds a whole row "
            "of the attention map, and a method needs whole rows. Use Ulysses alone, "
            "ContextParallelConfig(ulysses_degree=...), which shares out the heads; or remove the method"
        )


def _own_heads(site: str, heads: int, kv_heads: int, config: Any) -> tuple[slice, slice]:
    """The query and key heads that this rank computes; with `ulysses_anything` the last rank may have fewer."""
    ranks, rank = config.ulysses_degree, config._ulysses_local_rank
    each, kv_each = -(-heads // ranks), -(-kv_heads // ranks)
    even = heads % ranks == 0 and kv_heads % ranks == 0
    if not even and not (config.ulysses_anything and heads == kv_heads):
        uneven = (
            f", or ContextParallelConfig(ulysses_degree={ranks}, ulysses_anything=True)" if heads == kv_heads else ""
        )
        raise ParallelismError(
            f"{site} has {heads} query heads and {kv_heads} key heads, which {ranks} ranks cannot share equally: "
            f"choose a ulysses_degree that divides them{uneven}"
        )
    return (
        slice(rank * each, min((rank + 1) * each, heads)),
        slice(rank * kv_each, min((rank + 1) * kv_each, kv_heads)),
    )


def _gather(x: torch.Tensor, config: Any) -> torch.Tensor:
    """(B, H, S / n, D) with all heads -> (B, H / n, S, D): the ranks' shares of the sequence one after the other."""
    group, x = config._ulysses_mesh.get_group(), x.transpose(1, 2)
    if config.ulysses_anything:
        return all_to_all_single_any_qkv_async(x, group)().transpose(1, 2)
    return SeqAllToAllDim.apply(group, x, 2, 1).transpose(1, 2)


def _scatter(x: torch.Tensor, local: torch.Size, config: Any) -> torch.Tensor:
    """The way back of `_gather`, to the shape `local`."""
    group, x = config._ulysses_mesh.get_group(), x.transpose(1, 2)
    if config.ulysses_anything:
        back = all_to_all_single_any_o_async(x, group, NUM_QO_HEAD=local[1], Q_S_LOCAL=local[2])
        return back().transpose(1, 2)
    return SeqAllToAllDim.apply(group, x, 1, 2).transpose(1, 2)


def _pieces(site: Site, tokens: int, local: int, config: Any) -> list[int]:
    """Lengths of the pieces of a joint sequence as gathered: text and image of rank 0, of rank 1, and so on.

    diffusers splits text and image apart, so the gathered order is not the model's. Empty where it is.
    """
    if site.kind != "joint":
        return []
    layout = site.scope.layout
    if layout is None or layout.image_tokens is None:
        raise ParallelismError(
            f"{site.name} is split between {config.ulysses_degree} ranks, and how its text and image tokens were split "
            "is not known: its family is not covered"
        )
    image = _shares(layout.image_tokens, config.ulysses_degree)
    text = _shares(tokens - layout.image_tokens, config.ulysses_degree)
    rank = config._ulysses_local_rank
    if text[rank] + image[rank] != local:
        raise ParallelismError(
            f"{site.name}: rank {rank} holds {local} tokens, where equal shares of {sum(image)} image tokens and "
            f"{sum(text)} text tokens make {text[rank] + image[rank]}; split both along their tokens (cp_plan)"
        )
    pairs = zip(text, image, strict=True) if layout.text_first else zip(image, text, strict=True)
    return [length for pair in pairs for length in pair]


def _shares(tokens: int, ranks: int) -> list[int]:
    """Lengths into which `torch.tensor_split` cuts, the longer ones first."""
    return [tokens // ranks + (rank < tokens % ranks) for rank in range(ranks)]


def _in_order(x: torch.Tensor, pieces: list[int], dim: int) -> torch.Tensor:
    """From [text 0, image 0, text 1, image 1, ...] to [text, image], or the same of [image, text]."""
    if not pieces:
        return x
    parts = x.split(pieces, dim)
    return torch.cat(parts[0::2] + parts[1::2], dim)


def _as_gathered(x: torch.Tensor, pieces: list[int], dim: int) -> torch.Tensor:
    """The way back of `_in_order`."""
    if not pieces:
        return x
    parts, ranks = x.split(pieces[0::2] + pieces[1::2], dim), len(pieces) // 2
    return torch.cat([part for rank in range(ranks) for part in (parts[rank], parts[ranks + rank])], dim)


def _whole_mask(
    call: Call, config: Any, heads: slice, lengths: tuple[int, int], key_pieces: list[int] | None
) -> torch.Tensor | None:
    """The mask over all keys, for `heads`. As in diffusers, a mask as long as a rank's keys is that rank's share."""
    mask = call.mask
    if mask is None:
        return None
    shape = tuple(mask.shape)
    if key_pieces is not None and mask.shape[-1] == call.key.shape[2]:
        copies = mask.reshape(-1, 1, mask.shape[-1], 1).expand(-1, config.ulysses_degree, -1, -1)  # one for each rank
        mask = _gather(copies, config).reshape(*mask.shape[:-1], lengths[1])
        mask = _in_order(mask, key_pieces, -1)
    rows = mask.shape[-2] if mask.ndim > 2 else 1
    if rows not in (1, lengths[0]) or mask.shape[-1] not in (1, lengths[1]):
        raise ParallelismError(
            f"{call.site.name} has an attention mask of shape {shape}, of which a rank holds a part only; "
            f"{lengths[0]} queries and {lengths[1]} keys need one row for all queries, or a mask that is whole"
        )
    if mask.ndim > 2 and mask.shape[-3] == call.query.shape[1]:
        mask = mask[..., heads, :, :]
    return mask
