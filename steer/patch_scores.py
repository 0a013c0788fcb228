"""What the attention of a vision tower says of the parts of a picture, brought to the tokens of the language model."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from transformers.vision_utils import get_vision_window_index

from steer.query_row import row_scores
from steer_kernels import partial
from steer_kernels.estimate import column_mass
from steer_patches.site import Call, Site


def tower_ends(config: Any, sites: Sequence[Site]) -> tuple[Site, Site]:
    """The attention of the vision tower's first layer, and of the one that its features come from.

    That is the last layer whose output the language model gets: with LLaVA's feature layer -2 the last but one. Where
    the last layer's output is used (or no layer is named), it is the last but one too.
    """
    tower = [site for site in sites if site.kind == "self"]
    named = getattr(config, "vision_feature_layer", None)
    named = [-1] if named is None else [named] if isinstance(named, int) else named
    fed = max(layer - 1 if layer >= 0 else len(tower) + layer for layer in named)  # hidden states begin before layer 0
    return tower[0], tower[max(min(fed, len(tower) - 2), 0)]


def has_class_token(config: Any) -> bool:
    """Whether the vision tower of a model with this configuration puts a class token before the patches."""
    return "clip" in config.vision_config.model_type


def attention_received(call: Call, class_token: bool) -> torch.Tensor:
    """How much each patch is attended to, over all heads, from one attention call of a vision tower.

    With a class token: by that. Without: by all patches together, so that a patch gets 1 of every head on average,
    whatever the size of its input, or of the window that it is in.

    Returns:
        (inputs, patches) float32, float64 for float64 tensors, in the order of the call; without gradient.
    """
    with torch.no_grad():
        if class_token:
            first = torch.zeros(call.query.shape[0], dtype=torch.int64, device=call.query.device)
            return row_scores(call, first).softmax(-1).sum(1)[:, 1:]
        bounds = call.extra.get("cu_seq_lens_q")  # flash attention takes all inputs as one sequence
        if bounds is not None:
            spans = [slice(start, end) for start, end in zip(bounds[:-1].tolist(), bounds[1:].tolist(), strict=True)]
            return torch.cat([attention_received(call.part(s, s).replace(extra={}), False) for s in spans], 1)
        keep, _ = call.visible()
        query, key, scale = call.query, call.key, call.softmax_scale
        lse = partial(query, key, call.value, mask=keep, scale=scale)[1]
        if keep is not None:
            lse = lse.masked_fill(~keep.any(2), -torch.inf)  # what no query sees is padding, and does not count as one
        return column_mass(query, key, lse, scale=scale, keep=keep).sum(1)


def score_maps(
    config: Any, read: Mapping[str, Sequence[torch.Tensor]], arguments: Mapping[str, Any]
) -> list[torch.Tensor]:
    """What `attention_received` gave for the inputs of the tower, as one map (rows, columns) of patches for each.

    Args:
        config: of the vision-language model.
        read: "image", "video" -> the results of all calls of one layer, in their order.
        arguments: with which the pictures were encoded; those of `image_grid_thw` and `video_grid_thw` are needed
            where the tower takes pictures of any size.

    Returns:
        The maps in the order of `Pictures.view`.
    """
    maps: list[torch.Tensor] = []
    for modality in ("image", "video"):
        scores, grids = read.get(modality), arguments.get(f"{modality}_grid_thw")
        if scores and grids is not None:
            maps += _merged_maps(config.vision_config, torch.cat([s.flatten() for s in scores]), grids)
        elif scores:
            side = math.isqrt(scores[0].shape[1])
            maps += [one.view(side, side) for call in scores for one in call]
    return maps


def _merged_maps(vision: Any, scores: torch.Tensor, grids: torch.Tensor) -> list[torch.Tensor]:
    """Qwen's towers hold the patches of one merged cell together, 2.5 the cells of one window too."""
    merge = vision.spatial_merge_size
    cells = scores.view(-1, merge * merge)
    if hasattr(vision, "window_size"):
        order, _ = get_vision_window_index(grids, merge, vision.window_size, vision.patch_size)
        cells = cells[order.argsort().to(cells.device)]
    maps: list[torch.Tensor] = []
    shapes = grids.tolist()
    for part, (times, height, width) in zip(cells.split([t * h * w // merge**2 for t, h, w in shapes]), shapes, strict=True):  # fmt: skip  # noqa: E501
        blocks = part.view(times, height // merge, width // merge, merge, merge)
        maps += blocks.transpose(2, 3).reshape(times, height, width).unbind()
    return maps


def token_scores(view: torch.Tensor, box: torch.Tensor, maps: Sequence[torch.Tensor]) -> torch.Tensor:
    """The mean over the patches whose centres lie in the part that a token shows; of the one at its middle if none.

    Args:
        view: (B, S) int64, box: (B, S, 4): `view` and `view_box` of `Pictures`.
        maps: (rows, columns) of each input of the tower.

    Returns:
        (B, S) in the type of the maps, 0 where a token comes from no input.
    """
    found = torch.zeros(view.shape, dtype=maps[0].dtype, device=view.device)
    for number in view[view >= 0].unique().tolist():
        here, scores = view == number, maps[number].to(view.device)
        left, top, right, bottom = box[here].unbind(-1)
        down, across = _covered(top, bottom, scores.shape[0]), _covered(left, right, scores.shape[1])
        down, across = down.to(scores.dtype), across.to(scores.dtype)
        found[here] = ((down @ scores) * across).sum(-1) / (down.sum(-1) * across.sum(-1))
    return found


def _covered(start: torch.Tensor, end: torch.Tensor, patches: int) -> torch.Tensor:
    """(n, patches) bool: those along one axis whose centres lie between `start` and `end` (n,), fractions of it."""
    centre = (torch.arange(patches, device=start.device) + 0.5) / patches
    inside = (centre >= start[:, None]) & (centre < end[:, None])
    middle = ((start + end) / 2 * patches).long().clamp(max=patches - 1)
    return torch.where(inside.any(-1, keepdim=True), inside, F.one_hot(middle, patches).bool())
