"""The attention of one query for each row of the batch, through its row of the map: cheap, and free to edit."""

from __future__ import annotations

import torch

from steer_patches.generation import Text
from steer_patches.site import Call, Scope


def last_tokens(call: Call) -> torch.Tensor:
    """(B,) int64: for each row the place of its last real token among the queries of the call."""
    batch, queries = call.query.shape[0], call.query.shape[2]
    text = call.text
    if queries == 1 or text is None or text.valid is None:
        return torch.full((batch,), queries - 1, device=call.query.device)
    at = torch.arange(queries, device=call.query.device)
    return torch.where(text.valid[:, text.past :].to(at.device), at, 0).amax(-1).expand(batch)


def writing(scope: Scope, text: Text) -> torch.Tensor:
    """(B, n) int64: the tokens of a vision-language model's forward after which one is written, in their order.

    All of those that follow a prompt. Of one (with pictures, or the first) the last real token; where the caller asks
    for the logits of the last n, these, as far as they come after the pictures: assisted decoding's first candidates
    come with the prompt, which ends where the first of these is.
    """
    rows = 1 if text.pictures is None else len(text.pictures.number)
    at = torch.arange(text.new, device=scope.device).expand(rows, -1)
    if text.past and not brought(text):
        return at
    real = torch.ones_like(at, dtype=torch.bool) if text.valid is None else text.valid[:, text.past :].to(at.device)
    last = torch.where(real, at, 0).amax(-1, keepdim=True)
    kept = scope.arguments.get("logits_to_keep", 0)
    count = kept if isinstance(kept, int) else 1
    if count > 1:
        behind = -1 if text.pictures is None else (text.pictures.last[:, None] - text.past).to(at.device)
        count = min(count, int((real & (at > behind)).sum(-1).min()))
    return (last + torch.arange(1 - max(count, 1), 1, device=at.device)).clamp(min=0)


def brought(text: Text) -> bool:
    """Whether pictures are among the tokens of this forward."""
    return text.pictures is not None and bool((text.pictures.number[:, text.past :] >= 0).any())


def row_scores(call: Call, at: torch.Tensor) -> torch.Tensor:
    """(B, H, S_kv) float32, or float64: the scaled products of one query a row, -inf where it may not attend.

    Args:
        at: (B,) int64, which query of each row.
    """
    batch, heads, queries, width = call.query.shape
    groups, keys = call.key.shape[1], call.key.shape[2]
    query = call.query if queries == 1 else call.query.gather(2, at.view(-1, 1, 1, 1).expand(-1, heads, 1, width))
    exact = torch.float64 if query.dtype == torch.float64 else torch.float32
    scores = (query.reshape(batch, groups, -1, width) @ call.key.mT).view(batch, heads, keys).to(exact)
    scores = scores * call.softmax_scale
    softcap = None if call.site.processor == "sdpa" else call.extra.get("softcap")  # sdpa takes none
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    keep, causal = call.visible()
    if causal and queries > 1:
        prompt = call.text is not None and call.text.past == 0  # more keys than queries are then a cache's free slots
        last = at[:, None] + (0 if prompt else keys - queries)
        keep = (torch.arange(keys, device=at.device) <= last)[:, None, None]
    elif keep is not None and keep.shape[2] > 1:
        index = at.view(-1, 1, 1, 1).expand(-1, keep.shape[1], 1, keep.shape[3])
        keep = keep.expand(batch, -1, -1, -1).gather(2, index)
    return scores if keep is None else scores.masked_fill(~keep[:, :, 0], -torch.inf)


def row_output(weights: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    """(B, H, 1, D): weights (B, H, S_kv) of one query a row over the values (B, H_kv, S_kv, D)."""
    groups = value.shape[1]
    return (weights.to(value.dtype).unflatten(1, (groups, -1)) @ value).flatten(1, 2)[:, :, None]


def with_rows(out: torch.Tensor, at: torch.Tensor, rows: torch.Tensor, which: torch.Tensor | None) -> torch.Tensor:
    """`out` (B, H, S, D) with the outputs `rows` (B, H, 1, D) of the queries `at` (B,), in heads and rows `which`.

    Args:
        which: boolean, broadcastable to (B, H, 1, 1); None = all.
    """
    index = at.view(-1, 1, 1, 1).expand(-1, out.shape[1], 1, out.shape[3])
    rows = rows.to(out.dtype)
    if which is not None:
        rows = torch.where(which, rows, out if out.shape[2] == 1 else out.gather(2, index))
    return rows if out.shape[2] == 1 else out.scatter(2, index, rows)
