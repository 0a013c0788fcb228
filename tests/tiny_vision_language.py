"""Tiny random vision-language models of the real classes, and prompts with pictures for them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from tiny import build
from tiny_language import NEW, SMALL
from torch import Tensor, nn
from transformers import (
    CLIPVisionConfig,
    GemmaConfig,
    Idefics3Config,
    Idefics3ForConditionalGeneration,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextConfig,
    LlavaNextForConditionalGeneration,
    LlavaOnevisionConfig,
    LlavaOnevisionForConditionalGeneration,
    PaliGemmaConfig,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2Config,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    SiglipVisionConfig,
    SmolVLMConfig,
    SmolVLMForConditionalGeneration,
)

IMAGE, VIDEO, FAKE, GLOBAL, START, END, LINE, MARKERS = 60, 59, 58, 57, 56, 55, 54, range(44, 54)
TEXT = {**SMALL, "num_hidden_layers": 4}
SIDE, PATCH = 16, 4  # pixels of a picture as the vision tower sees it, and of a patch
VISION = {
    "hidden_size": 16,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 2,
    "image_size": SIDE,
    "patch_size": PATCH,
}
SIGLIP = {**VISION, "vision_use_head": False}
SIZES = [[SIDE, 2 * SIDE], [2 * SIDE, SIDE], [2 * SIDE, 2 * SIDE], [SIDE, 3 * SIDE], [3 * SIDE, SIDE]]  # of anyres
SECTIONS = {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}
QWEN_IDS = {
    "image_token_id": IMAGE,
    "video_token_id": VIDEO,
    "vision_start_token_id": START,
    "vision_end_token_id": END,
}
QWEN_VISION = {"depth": 3, "num_heads": 2, "patch_size": PATCH, "spatial_merge_size": 2, "temporal_patch_size": 2}


def _llava() -> nn.Module:
    text, vision = LlamaConfig(**TEXT), CLIPVisionConfig(**VISION)
    return LlavaForConditionalGeneration(LlavaConfig(vision_config=vision, text_config=text, image_token_id=IMAGE))


def _llava_next() -> nn.Module:
    config = LlavaNextConfig(
        vision_config=CLIPVisionConfig(**VISION),
        text_config=LlamaConfig(**TEXT),
        image_token_index=IMAGE,
        image_grid_pinpoints=SIZES,
    )
    return LlavaNextForConditionalGeneration(config)


def _llava_onevision() -> nn.Module:
    config = LlavaOnevisionConfig(
        vision_config=SiglipVisionConfig(**SIGLIP),
        text_config=Qwen2Config(**TEXT),
        image_token_index=IMAGE,
        video_token_index=VIDEO,
        image_grid_pinpoints=SIZES,
        vision_aspect_ratio="anyres_max_9",
    )
    return LlavaOnevisionForConditionalGeneration(config)


def _qwen2_vl() -> nn.Module:
    text = {**TEXT, "rope_parameters": SECTIONS}
    vision = {**QWEN_VISION, "embed_dim": 16, "hidden_size": TEXT["hidden_size"]}
    return Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))


def _qwen2_5_vl() -> nn.Module:
    text = {**TEXT, "rope_parameters": SECTIONS}
    vision = {
        **QWEN_VISION,
        "hidden_size": 16,
        "intermediate_size": 32,
        "out_hidden_size": TEXT["hidden_size"],
        "window_size": 4 * PATCH,
        "fullatt_block_indexes": [2],
    }
    return Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=text, vision_config=vision, **QWEN_IDS))


def _idefics(config: type, model: type) -> nn.Module:
    text = {**TEXT, "model_type": "llama"}
    return model(config(text_config=text, vision_config=VISION, image_token_id=IMAGE, scale_factor=2))


def _paligemma() -> nn.Module:
    config = PaliGemmaConfig(
        vision_config=SiglipVisionConfig(**SIGLIP, projection_dim=TEXT["hidden_size"]),
        text_config=GemmaConfig(**TEXT),
        image_token_index=IMAGE,
        projection_dim=TEXT["hidden_size"],
        hidden_size=TEXT["hidden_size"],
        vocab_size=TEXT["vocab_size"],
    )
    return PaliGemmaForConditionalGeneration(config)


MODELS: dict[str, Callable[[], nn.Module]] = {
    "llava": _llava,
    "llava_next": _llava_next,
    "llava_onevision": _llava_onevision,
    "qwen2_vl": _qwen2_vl,
    "qwen2_5_vl": _qwen2_5_vl,
    "idefics3": lambda: _idefics(Idefics3Config, Idefics3ForConditionalGeneration),
    "smolvlm": lambda: _idefics(SmolVLMConfig, SmolVLMForConditionalGeneration),
    "paligemma": _paligemma,
}


@dataclass(frozen=True)
class Picture:
    """A picture of this many tiles, or of this size in pixels where a model takes any.

    Args:
        tiles: (rows, columns); (1, 1) = the picture as a whole and nothing else.
    """

    tiles: tuple[int, int] = (1, 1)

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) in pixels."""
        return self.tiles[0] * SIDE, self.tiles[1] * SIDE


@dataclass(frozen=True)
class Video:
    """A video of frames of the size that the tower takes; only OneVision and the Qwen models have them."""

    frames: int = 2


Row = Sequence[int | Picture | Video]  # numbers of text tokens, pictures and videos
ONE: list[Row] = [[3, Picture(), 6]]
TWO_PICTURES: list[Row] = [[2, Picture(), 3, Picture((1, 2)), 6]]
BATCH: list[Row] = [[3, Picture((2, 1)), 9], [6, Picture(), 4]]
WITHOUT: list[Row] = [[12]]


@functools.cache
def model_of(name: str) -> Any:
    """The model, the same object each time: tests must leave it as it was."""
    return build(MODELS[name])


def inputs(name: str, rows: Sequence[Row] = BATCH, side: str = "left", seed: int = 0) -> dict[str, Any]:
    """What the processor of such a model would make of these rows, padded to the same length."""
    model, generator = model_of(name), torch.Generator().manual_seed(seed)
    pictures = [part for row in rows for part in row if isinstance(part, Picture)]
    if name in ("llava", "paligemma"):
        given, tokens = _whole(pictures, generator)
    elif name in ("llava_next", "llava_onevision"):
        given, tokens = _any_resolution(model, rows, generator)
    elif name in ("qwen2_vl", "qwen2_5_vl"):
        given, tokens = _merged(pictures, generator)
    else:
        given, tokens = _tiled(rows, generator)
    filmed, of_videos = _filmed(name, [part for row in rows for part in row if isinstance(part, Video)], generator)
    given |= filmed
    supply, supply_of_videos = iter(tokens), iter(of_videos)
    ids = []
    for row in rows:
        line: list[int] = []
        for part in row:
            if isinstance(part, int):
                line += torch.randint(3, 40, (part,), generator=generator).tolist()
            else:
                line += next(supply if isinstance(part, Picture) else supply_of_videos)
        ids.append(line)
    longest = max(map(len, ids))
    padding = [[0] * (longest - len(line)) for line in ids]
    before = side == "left"
    joined = [pad + line if before else line + pad for line, pad in zip(ids, padding, strict=True)]
    real = [[0] * len(pad) + [1] * len(line) if before else [1] * len(line) + [0] * len(pad)
            for line, pad in zip(ids, padding, strict=True)]  # fmt: skip
    result = {"input_ids": torch.tensor(joined), "attention_mask": torch.tensor(real), **given}
    if name.startswith("qwen"):
        result["mm_token_type_ids"] = (result["input_ids"] == IMAGE).int() + 2 * (result["input_ids"] == VIDEO).int()
    if name == "paligemma":
        result["token_type_ids"] = torch.zeros_like(result["input_ids"])
    return result


def _noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(shape, generator=generator)


def _whole(pictures: Sequence[Picture], generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
    if not pictures:
        return {}, []
    tokens = (SIDE // PATCH) ** 2
    return {"pixel_values": _noise(generator, len(pictures), 3, SIDE, SIDE)}, [[IMAGE] * tokens for _ in pictures]


def _any_resolution(
    model: Any, rows: Sequence[Row], generator: torch.Generator
) -> tuple[dict[str, Any], list[list[int]]]:
    pictures = [part for row in rows for part in row if isinstance(part, Picture)]
    if not pictures:
        return {}, []
    counts = [sum(isinstance(part, Picture) for part in row) for row in rows]
    tiles = [max(picture.tiles[0] * picture.tiles[1], 2) + 1 for picture in pictures]  # at least two, and the whole
    sizes = [(picture.size[0] - 3, picture.size[1]) for picture in pictures]  # what is padded above and below is cut
    given = {
        "pixel_values": _noise(generator, len(pictures), max(tiles), 3, SIDE, SIDE),
        "image_sizes": torch.tensor(sizes),
    }
    if "Onevision" in type(model).__name__:
        given["batch_num_images"] = torch.tensor(counts)
    with torch.no_grad():
        features = model.get_image_features(**given).pooler_output
    return given, [[IMAGE] * len(feature) for feature in features]


def _merged(pictures: Sequence[Picture], generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
    if not pictures:
        return {}, []
    grids = [(1, picture.size[0] // PATCH, picture.size[1] // PATCH) for picture in pictures]
    patches = sum(t * h * w for t, h, w in grids)
    given = {"pixel_values": _noise(generator, patches, 3 * 2 * PATCH * PATCH), "image_grid_thw": torch.tensor(grids)}
    return given, [[START] + [IMAGE] * (h * w // 4) + [END] for _, h, w in grids]


def _filmed(name: str, videos: Sequence[Video], generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
    if not videos:
        return {}, []
    side = SIDE // PATCH
    if name == "llava_onevision":
        pixels = _noise(generator, len(videos), videos[0].frames, 3, SIDE, SIDE)
        return {"pixel_values_videos": pixels}, [[VIDEO] * (v.frames * (side // 2) ** 2 + 1) for v in videos]
    grids = [(video.frames // 2, side, side) for video in videos]  # two frames make one
    pixels = _noise(generator, sum(t * h * w for t, h, w in grids), 3 * 2 * PATCH * PATCH)
    given = {"pixel_values_videos": pixels, "video_grid_thw": torch.tensor(grids)}
    return given, [[START] + [VIDEO] * (t * h * w // 4) + [END] for t, h, w in grids]


def _tiled(rows: Sequence[Row], generator: torch.Generator) -> tuple[dict[str, Any], list[list[int]]]:
    tokens: list[list[int]] = []
    tiles = []
    each = [IMAGE] * ((SIDE // PATCH) ** 2 // 4)
    for row in rows:
        tiles.append(0)
        for picture in (part for part in row if isinstance(part, Picture)):
            down, across = picture.tiles
            line: list[int] = []
            if down * across > 1:
                for r in range(down):
                    for c in range(across):
                        line += [FAKE, MARKERS[across * r + c], *each]
                    line.append(LINE)
                line.append(LINE)
                tiles[-1] += down * across
            tokens.append([*line, FAKE, GLOBAL, *each, FAKE])
            tiles[-1] += 1
    if not tokens:
        return {}, []
    pixels = torch.zeros(len(rows), max(tiles), 3, SIDE, SIDE)  # what is all 0 is padding
    for i, count in enumerate(tiles):
        pixels[i, :count] = _noise(generator, count, 3, SIDE, SIDE)
    return {"pixel_values": pixels, "pixel_attention_mask": (pixels != 0).all(2).long()}, tokens


def greedy(model: Any, given: dict[str, Any], **options: Any) -> Tensor:
    """The generated tokens."""
    chosen = {"max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1, **options}
    return model.generate(**given, **chosen)[:, given["input_ids"].shape[1] :]
