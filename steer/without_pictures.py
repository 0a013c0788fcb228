"""What a vision-language model would write without its pictures: a branch of text alone, and guidance away from it."""

from __future__ import annotations

import math
from typing import Any

import torch
from transformers import DynamicCache

from steer.query_row import brought, writing
from steer_patches.generation import Text
from steer_patches.pictures import text_only
from steer_patches.site import Scope

CUT = 1000.0  # no probability is left; yet the order is, as generate() may forbid all others (min_new_tokens, n-grams)


def logits_without(
    scope: Scope, text: Text, memory: dict[str, Any], config: Any
) -> tuple[torch.Tensor, torch.Tensor] | None:
    """The logits after the same text without its pictures, in the unedited model. Called after the main forward.

    The branch has a cache of its own, which grows by the same text; it runs uncompiled and without gradients.

    Args:
        memory: what the branch keeps for the sequence, filled here.
        config: of the model.

    Returns:
        Logits (B, n, V) of the tokens that write, see `writing`, and (B,) bool, which rows have any text; None in a
        sequence whose first forward had no pictures or was not followed.
    """
    assert text.pictures is not None
    number = text.pictures.number
    if text.past == 0:
        kept = DynamicCache(config=config) if text.cache is not None else None
        mask = number.new_zeros(len(number), 0)
    elif not memory or not memory["prompt"] <= text.past <= memory["tokens"]:
        return None
    else:
        kept, mask = memory["cache"], memory["mask"]
        back = memory["tokens"] - text.past  # what assisted decoding took back
        if back:
            kept.crop(-back)
            mask = mask[:, :-back]
    changes = text_only(scope.arguments, text)
    mask = torch.cat([mask, changes["attention_mask"].to(mask.dtype)], 1)
    new, count = changes["input_ids"].shape[1], writing(scope, text).shape[1]
    changes |= {
        "attention_mask": mask,
        "position_ids": (mask.cumsum(-1) - 1).clamp(min=0)[:, -new:],
        "past_key_values": kept,
        "use_cache": kept is not None,
        "logits_to_keep": count,
        "return_dict": True,
    }
    with torch.no_grad():  # gradient checkpointing would run these layers again as if they were the steered forward's
        output = scope.again(**changes)  # type: ignore[misc]
    if text.past == 0 or brought(text):
        memory["prompt"] = text.past + text.new - (count - 1)
    memory |= {"cache": kept, "mask": mask, "tokens": text.past + text.new}
    return output.logits, mask.any(-1)


def guided(c: torch.Tensor, u: torch.Tensor, gamma: float, cutoff: float) -> torch.Tensor:
    """gamma (c - u) + u of the log-probabilities, less `CUT` where c < log(cutoff) + max c.

    Args:
        c: (..., V) logits. u: (..., V) the logits to guide away from.
        gamma: weight. cutoff: share of the highest probability, 0 = none is cut.
    """
    exact = torch.float64 if c.dtype == torch.float64 else torch.float32
    log_c, log_u = (torch.log_softmax(logits.to(exact), -1) for logits in (c, u.to(c.device)))
    result = gamma * (log_c - log_u) + log_u
    if cutoff:
        cut = log_c < math.log(cutoff) + log_c.amax(-1, keepdim=True)
        result = torch.where(cut, result - CUT, result)
    return result.to(c.dtype)


def places_of_logits(at: torch.Tensor, tokens: int, kept: int | torch.Tensor) -> torch.Tensor:
    """Where the logits of the tokens `at` (B, n) are among those that a model gives of its `tokens`; -1 = nowhere.

    Args:
        kept: the forward's `logits_to_keep`: the last ones, 0 = all, or which.
    """
    given = torch.arange(tokens, device=at.device)
    given = given[-kept:] if isinstance(kept, int) else given[kept]
    same = at[..., None] == given
    return torch.where(same.any(-1), same.to(torch.uint8).argmax(-1), -1)
