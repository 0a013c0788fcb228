"""`grouped_attention`: attention whose groups of keys are given new masses, exactly and without the attention map."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, overload

import torch

from steer_kernels.block_mask import BlockMask, broadcast_heads
from steer_kernels.block_sparse import block_sparse_attention
from steer_kernels.grouped import reference
from steer_kernels.rule import TokenRule


@overload
def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: torch.Tensor,
    reweight: Callable[[torch.Tensor], torch.Tensor],
    *,
    count: int | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    block_mask: BlockMask | None = ...,
    return_mass: Literal[False] = ...,
    backend: str | None = ...,
) -> torch.Tensor: ...
@overload
def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: torch.Tensor,
    reweight: Callable[[torch.Tensor], torch.Tensor],
    *,
    count: int | None = ...,
    scale: float | None = ...,
    is_causal: bool = ...,
    block_mask: BlockMask | None = ...,
    return_mass: Literal[True],
    backend: str | None = ...,
) -> tuple[torch.Tensor, torch.Tensor]: ...
def grouped_attention(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    groups: torch.Tensor,
    reweight: Callable[[torch.Tensor], torch.Tensor],
    *,
    count: int | None = None,
    scale: float | None = None,
    is_causal: bool = False,
    block_mask: BlockMask | None = None,
    return_mass: bool = False,
    backend: str | None = None,
) -> torch.Tensor | tuple[torch.Tensor, torch.Tensor]:
    """Softmax attention in which each group of keys is scaled to a new mass, per batch row, head and query.

    With m_g the softmax mass of group g and O_g the attention over its keys alone, the output is sum_g m'_g O_g for
    the new masses m' = reweight(m). That is the attention map with every entry of group g multiplied by m'_g / m_g.
    Damping sinks by beta and giving the rest what they lose: `lambda m: cat([beta * m[..., :1],
    1 - beta * m[..., :1]], -1)`; factors f with renormalisation: `lambda m: m * f / (m * f).sum(-1, keepdim=True)`.

    Every group costs a block-sparse call over the key blocks in which it has members, so that groups of neighbouring
    keys cost no more than one dense call together.

    Args:
        query: (B, H, S_q, D). key, value: (B, H_kv, S_k, D), H a multiple of H_kv.
        groups: (S_k,), (B, S_k) or (B or 1, H or 1, S_k) integer group of each key, 0 to G - 1; a key of any
            other group is never attended, and takes no part in the softmax.
        reweight: from the masses (B, H, S_q, G), which sum to one (to zero for a query that sees no key), to the new
            ones; fp32, fp64 for fp64 input. A group whose mass is 0 contributes nothing.
        count: G; None = the largest group + 1, which waits for the device.
        scale: factor on the products; None = 1 / sqrt(D).
        is_causal: hide key j from query i unless j <= i + S_k - S_q.
        block_mask: the keys that are visible at all, for sparse attention; it may not have a token rule of its own.
        return_mass: return the new masses as well.
        backend: of `block_sparse_attention`; "reference" builds the map.

    Returns:
        Output (B, H, S_q, D), and with `return_mass` the new masses (B, H, S_q, G).

    Raises:
        ValueError: groups that do not fit the keys, a `reweight` that changes the shape of the masses, a block mask
            with a rule, and what `block_sparse_attention` raises.

    Source: exact by the partition of the softmax sum; the reference edits the explicit map.
    """
    groups = _per_head(groups, query, key)
    count = int(groups.max()) + 1 if count is None else count
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    base = block_mask or BlockMask.dense(query.shape[2], key.shape[2], device=query.device)
    if base.rule is not None:
        raise ValueError("block_mask has a token rule; groups need that place themselves")
    base = base.with_causal() if is_causal else base
    if backend == "reference":
        everything = broadcast_heads(base.to_tokens(), query.shape[1])
        out, mass = reference.forward(query, key, value, groups, count, reweight, everything, scale)
        return (out, mass) if return_mass else out

    parts, lses = [], []
    for mask in _group_masks(base, groups, count):
        out, lse = block_sparse_attention(query, key, value, mask, scale=scale, return_lse=True, backend=backend)
        parts.append(out)
        lses.append(lse)
    mass = torch.softmax(torch.stack(lses, -1), -1).nan_to_num(0.0)  # NaN: the query sees no key in any group
    new = reweight(mass)
    if new.shape != mass.shape:
        raise ValueError(f"reweight must keep the shape of the masses {tuple(mass.shape)}; got {tuple(new.shape)}")
    total = sum(new[..., g, None] * part for g, part in enumerate(parts))
    assert isinstance(total, torch.Tensor)
    out = total.to(query.dtype)
    return (out, new) if return_mass else out


def _per_head(groups: torch.Tensor, query: torch.Tensor, key: torch.Tensor) -> torch.Tensor:
    """(B or 1, H or 1, S_k)."""
    shape = tuple(groups.shape)
    if groups.ndim == 1:
        groups = groups[None, None]
    elif groups.ndim == 2:
        groups = groups[:, None]
    fits = groups.ndim == 3 and groups.shape[0] in (1, query.shape[0]) and groups.shape[1] in (1, query.shape[1])
    if not fits or groups.shape[-1] != key.shape[2] or groups.is_floating_point():
        raise ValueError(
            f"groups must be integers ({key.shape[2]},), (B, {key.shape[2]}) or (B, H, {key.shape[2]}) with B = "
            f"{query.shape[0]}, H = {query.shape[1]}; got {groups.dtype} {shape}"
        )
    return groups


def _group_masks(base: BlockMask, groups: torch.Tensor, count: int) -> list[BlockMask]:
    """For each group the blocks of `base` that hold members of it; where others are among them, a rule on the group."""
    (_, bk), columns = base.block_size, base.shape[-1]
    missing = columns * bk - base.kv_len
    keep, partial = base.to_bool(), base.partial_bool()
    if base.shape[1] > 1 and groups.shape[1] > base.shape[1]:
        keep, partial = (broadcast_heads(grid, groups.shape[1]) for grid in (keep, partial))
    at = torch.where(groups < 0, count, groups).int()[:, :, None]  # below zero would mean visible to all
    masks = []
    for group in range(count):
        member = torch.nn.functional.pad(groups == group, (0, missing)).unflatten(-1, (columns, bk))
        exists = torch.nn.functional.pad(torch.ones_like(groups, dtype=torch.bool), (0, missing))
        others = (~member & exists.unflatten(-1, (columns, bk))).any(-1)[:, :, None]
        low = torch.full((1, 1, 1, base.q_len), group, device=groups.device)
        masks.append(
            BlockMask.from_bool(
                keep & member.any(-1)[:, :, None],
                base.block_size,
                q_len=base.q_len,
                kv_len=base.kv_len,
                partial=(partial | others),
                rule=TokenRule.box(low, low + 1, at),
                causal=base.causal,
                order=base.order,
            )
        )
    return masks
