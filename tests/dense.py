"""Attention through the full softmax map, in place of the kernel: slow, obvious, and no part of steer.

with dense_attention(model, ["transformer_blocks.1.attn"], identity_in(image)):
    weak = model(**inputs).sample
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

# (scores, weights) -> weights, all (B, H, S, S_kv)
Edit = Callable[[Tensor, Tensor], Tensor]


def relative_norm(result: Tensor, wanted: Tensor) -> float:
    """||result - wanted|| / ||wanted||."""
    return ((result - wanted).norm() / wanted.norm()).item()


def softmax_map(
    query: Tensor, key: Tensor, attn_mask: Tensor | None = None, is_causal: bool = False, scale: float | None = None
) -> tuple[Tensor, Tensor]:
    """Scaled and masked scores, (B, H, S, S_kv), and their softmax."""
    key = key.repeat_interleave(query.shape[1] // key.shape[1], 1)
    scores = query @ key.transpose(-1, -2) * (scale if scale is not None else query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()[None, None]
    if attn_mask is not None:
        if attn_mask.ndim == 2:  # key padding
            attn_mask = attn_mask[:, None, None, :]
        scores = scores.masked_fill(~attn_mask, -torch.inf) if attn_mask.dtype == torch.bool else scores + attn_mask
    return scores, scores.softmax(-1).nan_to_num(0.0)


def identity_in(image: slice) -> Edit:
    """PAG's joint rule: in the image-to-image block only the diagonal stays, the softmax is taken over what is left."""

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        keep = torch.ones(scores.shape[-2:], dtype=torch.bool)
        size = keep[image, image].shape[0]
        keep[image, image] = torch.eye(size, dtype=torch.bool)
        return scores.masked_fill(~keep, -torch.inf).softmax(-1).nan_to_num(0.0)

    return edit


def towards_identity(strength: float, heads: Iterable[int] | None = None) -> Edit:
    """SoftPAG: A -> (1 - u) A + u I for the chosen heads, over all tokens."""

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        changed = (1 - strength) * weights + strength * torch.eye(weights.shape[-1], dtype=weights.dtype)
        if heads is None:
            return changed
        edited = weights.clone()
        for head in heads:
            edited[:, head] = changed[:, head]
        return edited

    return edit


class _Dense(TorchFunctionMode):
    def __init__(self, edit: Edit | None, change_query: Callable[[Tensor], Tensor] | None) -> None:
        super().__init__()
        self.edit, self.change_query, self.inside, self.calls = edit, change_query, 0, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.scaled_dot_product_attention and self.inside:
            self.calls += 1
            return self._attend(*args, **(kwargs or {}))
        return func(*args, **(kwargs or {}))

    def _attend(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> Tensor:
        query = self.change_query(query) if self.change_query else query
        scores, weights = softmax_map(query, key, attn_mask, is_causal, scale)
        weights = self.edit(scores, weights) if self.edit else weights
        return weights @ value.repeat_interleave(query.shape[1] // value.shape[1], 1)


@contextmanager
def dense_attention(
    model: nn.Module,
    names: Iterable[str],
    edit: Edit | None = None,
    change_query: Callable[[Tensor], Tensor] | None = None,
) -> Iterator[None]:
    """The attention modules `names` of a plain model compute with changed queries, or an edited map, or both."""
    mode, hooks = _Dense(edit, change_query), []

    def enter(*_: Any) -> None:
        mode.inside += 1

    def leave(*_: Any) -> None:
        mode.inside -= 1

    for name in names:
        module = model.get_submodule(name)
        hooks += [module.register_forward_pre_hook(enter), module.register_forward_hook(leave)]
    try:
        with mode:
            yield
        assert mode.calls, "no attention call passed through the dense map"
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def without_blocks(blocks: nn.ModuleList, indices: Iterable[int], returns: str) -> Iterator[None]:
    """Some blocks are replaced by modules that return their inputs: "h", "he" or "eh" (hidden states, text)."""
    kept = {index: blocks[index] for index in indices}
    for index, block in kept.items():
        blocks[index] = _Identity(block, returns)
    try:
        yield
    finally:
        for index, block in kept.items():
            blocks[index] = block


class _Identity(nn.Module):
    def __init__(self, block: nn.Module, returns: str) -> None:
        super().__init__()
        self.returns = returns
        self.context_pre_only = getattr(block, "context_pre_only", False)  # read by the forward of SD3

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        hidden_states = kwargs["hidden_states"] if "hidden_states" in kwargs else args[0]
        if self.returns == "h":
            return hidden_states
        text = kwargs["encoder_hidden_states"] if "encoder_hidden_states" in kwargs else args[1]
        return (hidden_states, text) if self.returns == "he" else (text, hidden_states)


def doubled(tree: Any) -> Any:
    """The same tree with its floating-point tensors in fp64."""
    if isinstance(tree, dict):
        return {key: doubled(value) for key, value in tree.items()}
    if isinstance(tree, (list, tuple)):
        return type(tree)(doubled(value) for value in tree)
    return tree.double() if isinstance(tree, Tensor) and tree.is_floating_point() else tree
