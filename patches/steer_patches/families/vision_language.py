"""Vision-language models: where the tokens of their pictures lie, and what each of them shows."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any

import torch
from transformers.models.llava_next.modeling_llava_next import get_anyres_image_grid_shape as tiles_of
from transformers.models.llava_next.modeling_llava_next import image_size_to_num_patches, unpad_image

from steer_patches.family import Family, PictureParts, Preset, Stage, register
from steer_patches.pictures import Part, cells

LANGUAGE = {"*language_model.layers.*.self_attn": "causal", "*text_model.layers.*.self_attn": "causal"}
LAYERS = tuple(
    Stage(f"{prefix}{name}.layers") for name in ("language_model", "text_model") for prefix in ("model.", "")
)


def _family(name: str, parts: PictureParts, *models: str, **stated: Any) -> Family:
    return register(Family(name, models, LANGUAGE, LAYERS, cfg="none", pictures=parts, **stated))


def _config(model: torch.nn.Module, arguments: Mapping[str, Any], name: str) -> Any:
    """A setting that a forward's argument of the same name replaces."""
    given = arguments.get(name)
    return getattr(model.config, name) if given is None else given


def _side(model: torch.nn.Module) -> int:
    """Patches along one side of what the vision tower sees."""
    vision: Any = model.config.vision_config  # type: ignore[union-attr]
    return vision.image_size // vision.patch_size


def _grid(rows: int, columns: int, view: int, lead: int = 0) -> Part:
    """A picture that is one input of the tower, cut into a grid, after `lead` tokens that show nothing."""
    box = torch.cat([torch.zeros(lead, 4), cells(rows, columns)])
    shows = torch.arange(lead + rows * columns) >= lead
    return Part(shows, box, torch.where(shows, view, -1), box)


def _whole(model: torch.nn.Module, arguments: Mapping[str, Any], ids: torch.Tensor) -> dict[int, list[Part]]:
    """LLaVA-1.5: one grid for each picture; with the "full" features of CLIP, its class token before that."""
    config: Any = model.config
    if config.vision_config.model_type == "pixtral":
        raise ValueError(
            "steer does not know the layout of Pixtral's pictures, whose tokens depend on their size: apply methods "
            "that do not look at pictures, or take a LLaVA whose tower has one size"
        )
    side = _side(model)
    lead = int("clip" in config.vision_config.model_type and _full(model, arguments))
    return {config.image_token_id: [_grid(side, side, i, lead) for i in range(len(arguments["pixel_values"]))]}


def _pali(model: torch.nn.Module, arguments: Mapping[str, Any], ids: torch.Tensor) -> dict[int, list[Part]]:
    config: Any = model.config
    side = _side(model)
    return {config.image_token_id: [_grid(side, side, i) for i in range(len(arguments["pixel_values"]))]}


def _joined(parts: list[Part]) -> Part:
    names = ("shows", "box", "view", "view_box")
    return Part(*(torch.cat([getattr(part, name) for part in parts]) for name in names))


LINE_END = Part(torch.tensor([False]), torch.zeros(1, 4), torch.tensor([-1]), torch.zeros(1, 4))


def _any_resolution(model: torch.nn.Module, arguments: Mapping[str, Any], ids: torch.Tensor) -> dict[int, list[Part]]:
    """LLaVA-NeXT and OneVision: the whole picture, then its tiles as one grid with a newline after each row."""
    config: Any = model.config
    onevision = config.model_type == "llava_onevision"
    side, pixels = _side(model), config.vision_config.image_size
    lead = int("clip" in config.vision_config.model_type and _full(model, arguments))
    found: dict[int, list[Part]] = {config.image_token_id: []}
    view = 0
    sizes = arguments.get("image_sizes") if arguments.get("pixel_values") is not None else None
    counts = arguments.get("batch_num_images")
    alone = [n == 1 for n in counts.tolist() for _ in range(n)] if counts is not None and onevision else None
    for index, size in enumerate([] if sizes is None else sizes):
        whole = _grid(side, side, view, lead)
        inputs = image_size_to_num_patches(size, config.image_grid_pinpoints, pixels)
        if (alone is not None and not alone[index]) or inputs == 1:
            found[config.image_token_id].append(_joined([whole, LINE_END]))
            view += 1
            continue
        down, across = tiles_of(size, config.image_grid_pinpoints, pixels)
        at = torch.arange(down * side * across * side).view(1, down * side, across * side)  # number of a patch
        at = unpad_image(at, size)[0]
        rows, columns = at.shape
        ratio = 1.0
        if onevision:
            ratio = math.sqrt(rows * columns / (_most_tiles(model, arguments) * side**2))
        part = _tiled(at, side, across, view + 1, ratio if ratio > 1.1 else 1.0)
        found[config.image_token_id].append(_joined([whole, *part]))
        view += inputs
    if onevision and arguments.get("pixel_values_videos") is not None:
        half = math.ceil(side / 2)
        videos = []
        for _ in range(len(arguments["pixel_values_videos"])):
            frames = arguments["pixel_values_videos"].shape[1]
            grids = [_grid(half, half, view + frame) for frame in range(frames)]
            number = torch.arange(frames).repeat_interleave(half * half)
            joined = _joined([*grids, LINE_END])
            frame = torch.cat([number, number[-1:]])
            videos.append(Part(joined.shows, joined.box, joined.view, joined.view_box, frame))
            view += frames
        found[config.video_token_id] = videos
    return found


def _most_tiles(model: torch.nn.Module, arguments: Mapping[str, Any]) -> int:
    """OneVision: a larger grid of tiles is made smaller. Its forward does not hand the argument on; `generate` does."""
    ahead = bool(arguments.get("mm_encoder_outputs"))
    chosen = _config(model, arguments if ahead else {}, "vision_aspect_ratio")
    return int(str(chosen).removeprefix("anyres_max_"))


def _full(model: torch.nn.Module, arguments: Mapping[str, Any]) -> bool:
    return bool(_config(model, arguments, "vision_feature_select_strategy") == "full")


def _tiled(at: torch.Tensor, side: int, across: int, view: int, ratio: float) -> list[Part]:
    """The rows of the grid of all tiles, each with its newline.

    Args:
        at: (rows, columns) numbers of the patches, row by row over all tiles, that padding leaves.
        side: patches along a tile. across: tiles in a row. view: the first tile's.
        ratio: by how much the grid is made smaller.
    """
    rows, columns = at.shape
    if ratio != 1:  # each cell takes the patch at its middle
        kept = int(rows // ratio), int(columns // ratio)
        middle = [((torch.arange(n) + 0.5) * size / n).long() for n, size in zip(kept, (rows, columns), strict=True)]
        at = at[middle[0]][:, middle[1]]
        rows, columns = kept
    down, right = at // (across * side), at % (across * side)
    tile = view + (down // side) * across + right // side
    inside = cells(side, side)[(down % side) * side + right % side]
    box = cells(rows, columns).view(rows, columns, 4)
    lines = []
    for row in range(rows):
        shows = torch.ones(columns, dtype=torch.bool)
        lines += [Part(shows, box[row], tile[row], inside[row]), LINE_END]
    return lines


def _merged(model: torch.nn.Module, arguments: Mapping[str, Any], ids: torch.Tensor) -> dict[int, list[Part]]:
    """Qwen2-VL and 2.5-VL: a grid of merged patches for each picture, for each two frames of a video."""
    config: Any = model.config
    merge, view = config.vision_config.spatial_merge_size, 0
    found: dict[int, list[Part]] = {}
    kinds = {config.image_token_id: ("pixel_values", "image_grid_thw"), config.video_token_id: ("pixel_values_videos", "video_grid_thw")}  # fmt: skip  # noqa: E501
    for token, (pixels, grids) in kinds.items():
        if arguments.get(pixels) is None:
            continue
        parts = []
        for times, height, width in arguments[grids].tolist():
            rows, columns = height // merge, width // merge
            joined = _joined([_grid(rows, columns, view + time) for time in range(times)])
            frame = torch.arange(times).repeat_interleave(rows * columns)
            parts.append(Part(joined.shows, joined.box, joined.view, joined.view_box, frame))
            view += times
        found[token] = parts
    return found


def _tiles(model: torch.nn.Module, arguments: Mapping[str, Any], ids: torch.Tensor) -> dict[int, list[Part]]:
    """Idefics3 and SmolVLM: the tiles row by row, then the whole picture, with marks between them.

    How many tiles a picture has stands in its marks alone: a picture begins and ends with the same token; between
    tiles of one row there are that token and the tile's name, between rows a line end before them.
    """
    config: Any = model.config
    side = _side(model) // config.scale_factor
    each, view = side * side, 0
    inputs = int((arguments["pixel_values"].flatten(2) != 0).any(-1).sum())  # what is all 0 is padding
    marks = int((ids == config.image_token_id).sum())
    if not marks or not inputs or marks % (inputs * each):
        raise ValueError(
            f"the prompt has {marks} tokens of pictures, but the pictures given are {inputs} tiles of {each} tokens: "
            "make input_ids and pixel_values with the model's processor in one call"
        )
    found: list[Part] = []
    for line in ids[:: marks // (inputs * each)].tolist():  # beams: so many of every row
        starts = [i for i, token in enumerate(line) if token == config.image_token_id]
        starts = starts[::each]
        if not starts:
            continue
        border = line[starts[-1] + each] if starts[-1] + each < len(line) else None
        rows: list[list[int]] = [[]]  # tiles of the picture at hand, row by row
        for start, following in zip(starts, [*starts[1:], None], strict=True):
            rows[-1].append(view)
            view += 1
            between = [] if following is None else line[start + each : following]
            if following is None or between.count(border) > 1:  # the picture is complete
                found.append(_tiled_picture(rows, side))
                rows = [[]]
            elif between[:1] != [border]:
                rows.append([])
    return {config.image_token_id: found}


def _tiled_picture(rows: list[list[int]], side: int) -> Part:
    parts = []
    *tiles, last = rows
    if len(last) != 1 or len({len(row) for row in tiles}) > 1:
        raise ValueError(
            f"the tokens of a picture are laid out in rows of {[len(row) for row in rows]} tiles; steer knows rows of "
            "equal length and then the whole picture alone, as the model's processor makes them"
        )
    [whole] = last
    inside = cells(side, side)
    here = torch.ones(side * side, dtype=torch.bool)
    for r, row in enumerate(tiles):
        for c, view in enumerate(row):
            region = (c / len(row), r / len(tiles), (c + 1) / len(row), (r + 1) / len(tiles))
            parts.append(Part(here, cells(side, side, region), torch.full((side * side,), view), inside))
    return _joined([*parts, _grid(side, side, whole)])


LLAVA = _family("LLaVA-1.5", _whole, "LlavaForConditionalGeneration", "LlavaModel")
LLAVA_NEXT = _family(
    "LLaVA-NeXT, OneVision",
    _any_resolution,
    "LlavaNextForConditionalGeneration",
    "LlavaNextModel",
    "LlavaOnevisionForConditionalGeneration",
    "LlavaOnevisionModel",
)
QWEN_VL = _family(
    "Qwen2-VL, Qwen2.5-VL",
    _merged,
    "Qwen2VLForConditionalGeneration",
    "Qwen2VLModel",
    "Qwen2_5_VLForConditionalGeneration",
    "Qwen2_5_VLModel",
    presets={"StreamingLLM": Preset({"positions": "original"}, "a picture's tokens have no one position")},
)
IDEFICS = _family(
    "Idefics3, SmolVLM",
    _tiles,
    "Idefics3ForConditionalGeneration",
    "Idefics3Model",
    "SmolVLMForConditionalGeneration",
    "SmolVLMModel",
)
PALIGEMMA = _family("PaliGemma", _pali, "PaliGemmaForConditionalGeneration", "PaliGemmaModel", open_prompt=True)
