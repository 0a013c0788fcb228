"""Which token shows what, proven on the models and their processors: by what each token depends on.

The vision towers' attention is silenced, so that each of their tokens depends on its own patch alone.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, ClassVar

import numpy
import pytest
import torch
from PIL import Image
from tiny_vision_language import (
    BATCH,
    FAKE,
    GLOBAL,
    IMAGE,
    LINE,
    MARKERS,
    MODELS,
    ONE,
    PATCH,
    SIDE,
    SIZES,
    TWO_PICTURES,
    VIDEO,
    Picture,
    Row,
    Video,
    inputs,
    model_of,
)
from tokenizers import Regex as Pattern
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import (
    Idefics3Processor,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaNextProcessor,
    LlavaOnevisionProcessor,
    LlavaProcessor,
    PaliGemmaProcessor,
    PixtralVisionConfig,
    PreTrainedTokenizerFast,
    ProcessorMixin,
    Qwen2VLProcessor,
    SmolVLMProcessor,
)
from transformers.models.clip.image_processing_pil_clip import CLIPImageProcessorPil
from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil
from transformers.models.llava_next.image_processing_pil_llava_next import LlavaNextImageProcessorPil
from transformers.models.llava_onevision.image_processing_pil_llava_onevision import LlavaOnevisionImageProcessorPil
from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil
from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil
from transformers.models.smolvlm import processing_smolvlm
from transformers.models.smolvlm.image_processing_pil_smolvlm import SmolVLMImageProcessorPil
from transformers.vision_utils import get_vision_position_ids

import steer
from steer import Method
from steer_patches.pictures import Part, Pictures, _placed
from steer_patches.site import Call, Next

TOWERS = ("vision_tower", "visual", "vision_model")
DECODERS = ("language_model", "text_model")


@dataclass(kw_only=True)
class Look(Method, register=False):
    """Changes nothing; keeps what a method is told of the pictures."""

    layers: Any = "*layers.0.self_attn"
    seen: list[Pictures | None] = field(default_factory=list)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_pictures: ClassVar[bool] = True

    def attend(self, call: Call, next: Next) -> Tensor:
        assert call.text is not None
        self.seen.append(call.text.pictures)
        return next(call)


@dataclass
class Read:
    """One forward: what the towers got, what the decoder got, and what steer says of the pictures.

    Args:
        towers: the input of each call of the vision tower, which asks for gradients, and its other arguments.
        tokens: (B, S, C), what enters the decoder.
        pictures: what a method is told.
    """

    towers: list[tuple[Tensor, dict[str, Any]]]
    tokens: Tensor
    pictures: Pictures


def part_of(model: Any, names: Sequence[str]) -> nn.Module:
    return next(getattr(model.model, name) for name in names if hasattr(model.model, name))


@contextmanager
def silent_towers(model: Any) -> Iterator[None]:
    """The attention of the vision tower adds nothing to its tokens."""

    def nothing(module: nn.Module, args: Any, output: Any) -> Any:
        return (torch.zeros_like(output[0]), *output[1:]) if isinstance(output, tuple) else torch.zeros_like(output)

    names = [site.name for site in steer.sites(model) if site.kind == "self"]
    hooks = [model.get_submodule(name).register_forward_hook(nothing) for name in names]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def read(model: Any, given: dict[str, Any]) -> Read:
    """Run the model on a prompt, with silent towers."""
    towers: list[tuple[Tensor, dict[str, Any]]] = []
    tokens: list[Tensor] = []

    def at_tower(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        name = "pixel_values" if "pixel_values" in kwargs else None
        pixels = (kwargs[name] if name else args[0]).detach().requires_grad_()
        towers.append((pixels, kwargs))
        return ((pixels, *args[1:]), kwargs) if name is None else (args, {**kwargs, name: pixels})

    def at_decoder(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        tokens.append(kwargs["inputs_embeds"])

    look = Look()
    hooks = [
        part_of(model, TOWERS).register_forward_pre_hook(at_tower, with_kwargs=True),
        part_of(model, DECODERS).register_forward_pre_hook(at_decoder, with_kwargs=True),
    ]
    try:
        with silent_towers(model), steer.apply(model, look):
            model(**given)
    finally:
        for hook in hooks:
            hook.remove()
    (pictures,) = look.seen
    assert pictures is not None
    return Read(towers, tokens[0], pictures)


def patches_of(found: Read, model: Any, token: Tensor) -> tuple[dict[int, Tensor], int]:
    """By view: (rows, columns), how strongly a token depends on each patch of it; and the number of views."""
    gradients = torch.autograd.grad(token.sum(), [pixels for pixels, _ in found.towers], retain_graph=True, allow_unused=True)  # fmt: skip  # noqa: E501
    by_view: dict[int, Tensor] = {}
    view = 0
    for (pixels, others), gradient in zip(found.towers, gradients, strict=True):
        depends = torch.zeros_like(pixels) if gradient is None else gradient.abs()
        if pixels.ndim == 4:  # (views, 3, height, width)
            strength = depends.sum(1).unfold(1, PATCH, PATCH).unfold(2, PATCH, PATCH).sum((-1, -2))
            by_view |= {view + i: grid for i, grid in enumerate(strength)}
            view += len(strength)
            continue
        shapes = others["grid_thw"]  # (patches, channels) of Qwen, in an order of the model's own
        places = get_vision_position_ids(shapes, model.config.vision_config.spatial_merge_size)
        start = 0
        for times, height, width in shapes.tolist():
            for _ in range(times):
                at = places[start : start + height * width]
                grid = torch.zeros(height, width)
                grid[at[:, 0], at[:, 1]] = depends[start : start + height * width].sum(1)
                by_view[view] = grid
                view, start = view + 1, start + height * width
    return by_view, view


def inside(box: Tensor, rows: int, columns: int) -> Tensor:
    """(rows, columns) bool: the cells of a grid whose middle a box holds."""
    left, top, right, bottom = box.tolist()
    y, x = (torch.arange(rows) + 0.5) / rows, (torch.arange(columns) + 0.5) / columns
    return ((y > top) & (y < bottom))[:, None] & ((x > left) & (x < right))


MANY: list[Row] = [[2, Picture((2, 2)), 3, Picture(), 2], [5, Picture((1, 3)), 4, Picture((2, 1)), 1, Picture(), 3]]
TALL: list[Row] = [[3, Picture((3, 1)), 4], [2, Picture((1, 3)), 3], [4, Picture((2, 2)), 3]]
LAYOUTS = {
    "one": ONE,
    "two": TWO_PICTURES,
    "batch": BATCH,
    "many": MANY,
    "tall": TALL,
    "beside": [[3, Picture((1, 2)), Picture((2, 1)), Picture(), 4]],
    "without": [[7], [3, Picture(), 4]],
}
FILMS = {
    "video": [[3, Video(2), 4]],
    "videos": [[3, Video(4), 4], [3, Video(4), 2]],
    "mixed": [[3, Picture((1, 2)), 2, Video(4), 4, Picture(), 2]],
    "video first": [[3, Video(4), 4, Picture(), 2], [2, Picture((2, 2)), 3]],
}


def assert_views(name: str, given: dict[str, Any]) -> Pictures:
    """Every token that shows something depends on its `view_box` of its `view`, and on nothing else."""
    model = model_of(name)
    found = read(model, given)
    shown, ids = found.pictures, given["input_ids"]
    visual = (ids == IMAGE) | (ids == VIDEO)
    if name != "paligemma":  # whose text depends on pictures only later
        assert torch.equal(shown.number >= 0, visual)
    seen = 0
    for row, at in visual.nonzero().tolist():
        by_view, views = patches_of(found, model, found.tokens[row, at])
        depends = {view: grid > 0 for view, grid in by_view.items() if bool((grid > 0).any())}
        if not shown.shows[row, at]:
            assert not depends
            assert shown.view[row, at] == -1
            assert not shown.view_box[row, at].any()
            continue
        view = int(shown.view[row, at])
        assert list(depends) == [view] and view < views
        assert torch.equal(depends[view], inside(shown.view_box[row, at], *depends[view].shape))
        seen += 1
    assert seen == int(shown.shows.sum()) > 0
    assert not shown.shows[~visual].any()
    return shown


@pytest.mark.parametrize(("layout", "side"), [*((layout, "left") for layout in LAYOUTS), ("many", "right")])
@pytest.mark.parametrize("name", MODELS)
def test_tokens_depend_on_their_view_box_alone(name: str, layout: str, side: str) -> None:
    shown = assert_views(name, inputs(name, LAYOUTS[layout], side))
    for row, parts in enumerate(LAYOUTS[layout]):
        pictures = [part for part in parts if isinstance(part, Picture)]
        assert shown.number[row].unique().tolist() == [-1, *range(len(pictures))]


@pytest.mark.parametrize("layout", FILMS)
@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_frames(name: str, layout: str) -> None:
    shown = assert_views(name, inputs(name, FILMS[layout]))
    for row, parts in enumerate(FILMS[layout]):
        frames = [1 if isinstance(p, Picture) else p.frames // (1 if "onevision" in name else 2) for p in parts if not isinstance(p, int)]  # fmt: skip  # noqa: E501
        order = shown.number[row][shown.number[row] >= 0]
        assert order.unique_consecutive().tolist() == list(range(sum(frames)))


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("size", [(29, 32), (32, 25), (16, 31), (9, 48), (48, 7), (32, 32), (11, 13)])
def test_padding_that_the_model_cuts_away(name: str, size: tuple[int, int]) -> None:
    model, given = model_of(name), inputs(name, [[3, Picture((2, 2)), 4]])
    given["image_sizes"] = torch.tensor([size])
    given["pixel_values"] = torch.randn(1, 5, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given |= with_tokens(IMAGE, sum(map(len, model.get_image_features(**features(given)).pooler_output)))
    shown = assert_views(name, given)
    assert int((~shown.shows & (shown.number >= 0)).sum()) > 0
    tiles = shown.box[0, shown.shows[0]][16:]
    assert tiles[:, :2].min() == 0 and tiles[:, 2:].max() == 1


def features(given: dict[str, Any]) -> dict[str, Any]:
    return {name: given[name] for name in ("pixel_values", "image_sizes", "batch_num_images") if name in given}


def with_tokens(token: int, count: int) -> dict[str, Any]:
    """A prompt of one row with one picture of this many tokens."""
    ids = torch.tensor([[5, 6, 7, *[token] * count, 8, 9]])
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_a_grid_that_is_made_smaller() -> None:
    """OneVision has no more tokens than a number of tiles would; a token then shows a mix, the most of `view_box`."""
    name, model = "llava_onevision", model_of("llava_onevision")
    kept = model.config.vision_aspect_ratio
    model.config.vision_aspect_ratio = "anyres_max_1"
    try:
        for tiles in [(2, 2), (1, 3), (3, 1), (2, 1)]:
            given = inputs(name, [[3, Picture(tiles), 4]])
            found = read(model, given)
            shown = found.pictures
            for row, at in shown.shows.nonzero().tolist():
                by_view, _ = patches_of(found, model, found.tokens[row, at])
                view = int(shown.view[row, at])
                mine = inside(shown.view_box[row, at], 4, 4)
                assert by_view[view][mine].sum() > 0
                assert int(mine.sum()) == 1
            of_tiles = shown.shows[0].clone()
            of_tiles[: 3 + 16] = False
            middle = shown.box[0, of_tiles].view(-1, 2, 2).mean(1)
            down, across = tiles
            index = shown.view[0, of_tiles] - 1
            inner = shown.view_box[0, of_tiles].view(-1, 2, 2).mean(1)
            height = (down * SIDE - 3) / (down * SIDE)  # what unpadding leaves, at most half a patch off
            place = torch.stack([(index % across + inner[:, 0]) / across, (index // across + inner[:, 1]) / down], 1)
            assert (place[:, 0] - middle[:, 0]).abs().max() < 1 / (4 * across)
            assert (place[:, 1] - 0.5 - (middle[:, 1] - 0.5) * height).abs().max() < 1.5 / (4 * down)
    finally:
        model.config.vision_aspect_ratio = kept


def test_the_class_token_of_clip_shows_nothing() -> None:
    given = {**inputs("llava", ONE), **with_tokens(IMAGE, 17), "vision_feature_select_strategy": "full"}
    shown = assert_views("llava", given)
    assert not shown.shows[0, 3] and shown.number[0, 3] == 0 and int(shown.shows.sum()) == 16


@pytest.mark.parametrize("layers", [-1, [-2, -1]])
def test_the_class_token_in_generate(layers: Any) -> None:
    """`generate` hands the settings of features to the encoder, and not to the forward."""
    model, look = copy.deepcopy(model_of("llava")), Look()
    model.config.vision_feature_layer = layers
    model.model.multi_modal_projector = type(model.model.multi_modal_projector)(model.config)
    given = {**inputs("llava", ONE), **with_tokens(IMAGE, 17), "vision_feature_select_strategy": "full"}
    with steer.apply(model, look):
        model.generate(**given, max_new_tokens=1, do_sample=False)
    assert look.seen[0] is not None
    assert int(look.seen[0].shows.sum()) == 16 and int((look.seen[0].number == 0).sum()) == 17


def test_the_aspect_ratio_counts_where_the_model_reads_it() -> None:
    """OneVision's forward does not hand the argument on, so it changes no layout; its encoder takes it."""
    model, look = model_of("llava_onevision"), Look()
    given = inputs("llava_onevision", [[3, Picture((2, 2)), 4]])
    size = given["image_sizes"]
    with steer.apply(model, look):
        model(**given)
        model(**given, vision_aspect_ratio="anyres_max_1")
        small = model.get_image_features(given["pixel_values"], size, vision_aspect_ratio="anyres_max_1")
        rest = with_tokens(IMAGE, len(small.pooler_output[0]))
        model(**rest, mm_encoder_outputs={"image": small}, vision_aspect_ratio="anyres_max_1")
    plain, ignored, smaller = look.seen
    assert plain is not None and ignored is not None and smaller is not None
    assert torch.equal(plain.box, ignored.box)
    assert int(smaller.shows.sum()) < int(plain.shows.sum())


@pytest.mark.parametrize("name", ["llava_next", "llava_onevision"])
@pytest.mark.parametrize("flat", [False, True])
def test_a_picture_of_one_tile(name: str, flat: bool) -> None:
    """The whole of it, then the same again as a grid of one tile; pixels in one row of tiles, or flat."""
    model, look = copy.deepcopy(model_of(name)), Look()
    model.config.image_grid_pinpoints = [[SIDE, SIDE]]
    pixels = torch.randn(1, 2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0))
    given = {**with_tokens(IMAGE, 16 + 4 * 5), "image_sizes": torch.tensor([[SIDE, SIDE]])}
    with steer.apply(model, look):
        model(**given, pixel_values=pixels[0] if flat else pixels)
    shown = look.seen[0]
    assert shown is not None
    whole, tile = shown.box[shown.view == 0], shown.box[shown.view == 1]
    assert torch.equal(whole, tile) and len(whole) == 16


def test_pictures_of_pixtral_are_refused_in_words() -> None:
    torch.manual_seed(0)
    vision = PixtralVisionConfig(
        hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2, image_size=SIDE, patch_size=4
    )
    config = LlavaConfig(
        vision_config=vision,
        text_config=model_of("llava").config.text_config,
        image_token_index=IMAGE,
        vision_feature_layer=-1,
        vision_feature_select_strategy="full",
    )
    model, size = LlavaForConditionalGeneration(config).eval(), torch.tensor([[8, 12]])
    given = {**with_tokens(IMAGE, 6), "pixel_values": torch.randn(1, 3, 8, 12), "image_sizes": size}
    model(**given)
    with steer.apply(model, Look()):
        model(**with_tokens(7, 6))
        with pytest.raises(ValueError, match="Pixtral"):
            model(**given)


# Through the processors: a cell of a picture is painted over, and the tokens that change are those whose box holds it.

RESIZED = {"size": {"longest_edge": 2 * SIDE}, "max_image_size": {"longest_edge": SIDE}}
SQUARE = {"height": SIDE, "width": SIDE}
TILED = {"size": SQUARE, "image_grid_pinpoints": SIZES}
WORDS = {"<unk>": 0, "<bos>": 1, "<eos>": 2, "look": 5, "here": 6, "\n": LINE, "\n\n": 43}
WORDS |= {"<|vision_start|>": 56, "<|vision_end|>": 55, "<|image_pad|>": IMAGE, "<|video_pad|>": VIDEO}
OWN = {"<fake_token_around_image>": FAKE, "<global-img>": GLOBAL, "<image>": IMAGE, "<video>": VIDEO}
NAMED = {f"<row_{r + 1}_col_{c + 1}>": MARKERS[3 * r + c] for r in range(3) for c in range(3)}
LETTERS = {letter: 20 + i for i, letter in enumerate("<row_123cl>")}


def tokenizer(name: str, spelt: bool = False) -> PreTrainedTokenizerFast:
    """Of a few words. spelt: the names of tiles are no tokens, so that each has several."""
    qwen = name.startswith("qwen")
    special = ["<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>"] if qwen else list(OWN)
    special += [] if spelt else list(NAMED)
    words = WORDS if qwen else {**{k: v for k, v in WORDS.items() if "|" not in k}, **OWN}
    made = Tokenizer(models.WordLevel({**words, **(LETTERS if spelt else NAMED)}, unk_token="<unk>"))
    made.pre_tokenizer = pre_tokenizers.Split(Pattern("look|here|\n\n|."), "isolated")
    made.add_special_tokens(special)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, bos_token="<bos>", eos_token="<eos>", pad_token="<unk>", unk_token="<unk>"
    )


def processor(name: str, spelt: bool = False) -> Any:
    """The real one, without its part for videos, which needs torchvision."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(ProcessorMixin, "check_argument_for_proper_class", lambda self, name, given: None)
        patch.setattr(processing_smolvlm, "num2words", str)
        return _processor(name, tokenizer(name, spelt))


def _processor(name: str, words: PreTrainedTokenizerFast) -> Any:
    if name == "llava":
        size = {"size": {"shortest_edge": SIDE}, "crop_size": SQUARE}
        return LlavaProcessor(CLIPImageProcessorPil(**size), words, PATCH, "default", num_additional_image_tokens=1)
    if name == "paligemma":
        words.image_token, words.image_token_id = "<image>", IMAGE
        images = SiglipImageProcessorPil(size=SQUARE)
        images.image_seq_length = 16
        return PaliGemmaProcessor(images, words)
    if name == "llava_next":
        images = LlavaNextImageProcessorPil(**{**TILED, "size": {"shortest_edge": SIDE}, "crop_size": SQUARE})
        return LlavaNextProcessor(images, words, PATCH, "default", num_additional_image_tokens=1)
    if name == "llava_onevision":
        images = LlavaOnevisionImageProcessorPil(**TILED)
        return LlavaOnevisionProcessor(images, words, num_image_tokens=16, vision_feature_select_strategy="full")
    if name.startswith("qwen"):
        pixels = {"shortest_edge": 64, "longest_edge": 4096}
        return Qwen2VLProcessor(Qwen2VLImageProcessorPil(patch_size=PATCH, merge_size=2, size=pixels), words)
    if name == "idefics3":
        return Idefics3Processor(Idefics3ImageProcessorPil(**RESIZED), words, image_seq_len=4)
    return SmolVLMProcessor(SmolVLMImageProcessorPil(**RESIZED), words, None, image_seq_len=4)


def prompted(name: str, images: list[list[Image.Image]], spelt: bool = False, between: str = "here") -> dict[str, Any]:
    """What the processor makes of rows of pictures with words around them."""
    mark = "<|vision_start|><|image_pad|><|vision_end|>" if name.startswith("qwen") else "<image>"
    texts = ["look" + between.join(mark for _ in row) + "herehere" for row in images]
    flat = [picture for row in images for picture in row]
    nested: Any = images if name in ("idefics3", "smolvlm", "paligemma") else flat
    return dict(processor(name, spelt)(images=nested, text=texts, return_tensors="pt", padding=True))


SHAPES = [(32, 32), (16, 32), (32, 16), (48, 16), (20, 30), (24, 24)]  # height, width; tiles 2x2, 1x2, 2x1, ...
COUNT = 4  # cells along a side that are painted


def painted(shape: tuple[int, int], seed: int, cell: tuple[int, int] | None = None) -> Image.Image:
    """A noisy picture, large, so that a cell is many pixels; of one cell (row, column) another colour."""
    height, width = shape[0] * 6, shape[1] * 6
    pixels = numpy.random.default_rng(seed).integers(60, 200, (height, width, 3), dtype=numpy.uint8)
    if cell is not None:
        rows = slice(cell[0] * height // COUNT, (cell[0] + 1) * height // COUNT)
        columns = slice(cell[1] * width // COUNT, (cell[1] + 1) * width // COUNT)
        pixels[rows, columns] = [255, 0, 20]
    return Image.fromarray(pixels)


def assert_boxes(name: str, shapes: list[list[tuple[int, int]]], **options: Any) -> Pictures:
    """Paint cells of pictures over: the tokens whose box holds a cell's middle change, those that are far do not."""
    model = model_of(name)
    plain = [[painted(shape, seed) for seed, shape in enumerate(row)] for row in shapes]
    before = read(model, prompted(name, plain, **options))
    shown = before.pictures
    for row, pictures in enumerate(shapes):
        for number, shape in enumerate(pictures):
            for cell in [(0, 0), (1, 2), (3, 1), (3, 3)]:
                other = [list(line) for line in plain]
                other[row][number] = painted(shape, number, cell)
                after = read(model, prompted(name, other, **options))
                changed = (after.tokens != before.tokens).any(-1)
                middle = torch.tensor([(cell[1] + 0.5) / COUNT, (cell[0] + 0.5) / COUNT])
                mine = shown.shows & (shown.number == number)
                mine[:row], mine[row + 1 :] = False, False
                low, high = shown.box[..., :2], shown.box[..., 2:]
                holds = mine & ((low <= middle) & (middle < high)).all(-1)
                margin = 0.5 / COUNT + (high - low)  # half a cell, and a token, which resizing may smear
                near = mine & ((low - margin < middle) & (middle < high + margin)).all(-1)
                assert holds.any()
                assert changed[holds].all(), f"{shape} {cell}: unchanged where it is shown"
                assert not changed[~near].any(), f"{shape} {cell}: changed where it is not shown"
    return shown


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("name", MODELS)
def test_boxes_through_the_processor(name: str, shape: tuple[int, int]) -> None:
    if name == "llava" and shape[0] != shape[1]:
        shape = (24, 24)  # its processor crops a square, of which boxes are parts
    assert_boxes(name, [[shape]])


@pytest.mark.parametrize("name", MODELS)
def test_boxes_of_several_pictures(name: str) -> None:
    square = (32, 32)
    shown = assert_boxes(name, [[square, square], [square]])
    assert shown.number.amax(1).tolist() == [1, 0]


@pytest.mark.parametrize("spelt", [False, True])
@pytest.mark.parametrize("name", ["idefics3", "smolvlm"])
def test_tiles_side_by_side_whatever_their_names_are_made_of(name: str, spelt: bool) -> None:
    shapes = [[(32, 32), (16, 32), (32, 32)], [(32, 16)]]
    shown = assert_boxes(name, shapes, spelt=spelt, between="")
    tiles = [int((shown.number[row] == i).sum()) // 4 for row, line in enumerate(shapes) for i in range(len(line))]
    assert tiles == [5, 3, 5, 3]


def test_wrong_numbers_of_tokens() -> None:
    """Each says what there is and what is needed; copies of rows, which beams make, are no excuse."""

    def part(tokens: int) -> Part:
        box = torch.zeros(tokens, 4)
        return Part(torch.ones(tokens, dtype=torch.bool), box, torch.zeros(tokens, dtype=torch.int64), box)

    row = [5, IMAGE, IMAGE, 6]
    for ids, parts in [
        ([[*row, IMAGE]], [part(2)]),
        ([[*row, *row]], [part(2)]),  # twice the tokens, but in one row
        ([row, [5, 6, IMAGE, IMAGE]], [part(2)]),  # in two rows that are no copies
        ([[5, IMAGE, 6, 7], [5, IMAGE, 6, 7]], [part(2)]),  # across rows
        ([row], [part(2), part(2)]),
        ([[5, 6]], [part(1)]),
    ]:
        with pytest.raises(ValueError, match=r"the prompt has .* tokens of pictures"):
            _placed(torch.tensor(ids), {IMAGE: parts}, None)
    found = _placed(torch.tensor([row, row]), {IMAGE: [part(2)]}, None)
    assert found["number"].tolist() == [[-1, 0, 0, -1]] * 2
