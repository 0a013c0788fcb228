"""Pictures of where a model looks: heat over the pictures that it was given, or over the tokens that it read."""

from __future__ import annotations

import textwrap
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image, ImageDraw, ImageFont

if TYPE_CHECKING:
    from steer_demos.look import Look

SIDE = 240  # pixels, the longer one of a picture
GAP, LINE = 12, 20
TOKENS = 8  # panels of the answer's tokens
ACROSS = 5  # panels side by side
NARROW = 640  # pixels, for the scale and its label
PAGE = 900  # pixels, the width of a text
COLD, HOT = np.array([255.0, 214.0, 60.0]), np.array([205.0, 10.0, 30.0])
COVER = 0.8  # of the picture, at the highest heat


def draw_pictures(
    looks: Mapping[str, Look],
    pictures: Sequence[Image.Image],
    question: str,
    relative: str | None = None,
    tokens: bool = False,
) -> Image.Image:
    """For each look and picture a row: the picture, the heat of the whole answer over it, and of its tokens.

    Args:
        looks: title -> look; all at these pictures.
        pictures: as the model was given them.
        question: written below, with the answers.
        relative: the question of what `looks` are relative to.
        tokens: a panel for each of the answer's first tokens too.
    """
    scaled = [_scaled(picture) for picture in pictures]
    heats: dict[tuple[str, int], list[tuple[str, np.ndarray]]] = {}
    for title, look in looks.items():
        chosen = [("the whole answer", None), *((repr(look.words[word]), word) for word in _words(look) if tokens)]
        for number, picture in enumerate(scaled):
            found = [(name, look.heat(number, picture.size[::-1], word, relative is not None)) for name, word in chosen]
            heats[title, number] = [(name, heat.numpy()) for name, heat in found]
    highest = max(float(heat.max()) for panels in heats.values() for _, heat in panels)  # one scale for all
    lowest = 1.0 if relative is not None and highest > 1 else 0.0  # less than without the question is no heat
    strips = []
    for (title, number), panels in heats.items():
        which = f"picture {number + 1}" if len(scaled) > 1 else "the picture"
        share = f": {100 * looks[title].on(number):.1f} % of the attention is on {which}" if relative is None else ""
        shown = [(name, _heated(scaled[number], (heat - lowest) / (highest - lowest or 1))) for name, heat in panels]
        strips.append(_strip(title + share, [("", scaled[number]), *shown]))
    width = max(NARROW, *(strip.width for strip in strips))
    texts = [f"Q: {question}", *(f"{title}: {look.answer}" for title, look in looks.items())]
    lines = [line for text in texts for line in textwrap.wrap(text, width // 9) or [""]]
    page = Image.new("RGB", (width, sum(strip.height for strip in strips) + LINE * (len(lines) + 2) + GAP), "white")
    draw, top = ImageDraw.Draw(page), 0
    for strip in strips:
        page.paste(strip, (0, top))
        top += strip.height
    for line in lines:
        draw.text((GAP, top), line, "black", _font(15))
        top += LINE
    label = "attention on an area; 1 = all of it, spread evenly over the picture"
    _scale(page, top + 6, lowest, highest, label if relative is None else f"times that for: {relative}")
    return page


def _strip(title: str, panels: Sequence[tuple[str, Image.Image]]) -> Image.Image:
    """Named panels of one size side by side, and below one another where they are many."""
    across, (width, height) = min(len(panels), ACROSS), panels[0][1].size
    down = -(-len(panels) // across)
    strip = Image.new("RGB", (GAP + across * (width + GAP), GAP + LINE + down * (LINE + height + GAP)), "white")
    draw = ImageDraw.Draw(strip)
    draw.text((GAP, GAP), title, "black", _font(15))
    for place, (name, panel) in enumerate(panels):
        left, top = GAP + place % across * (width + GAP), GAP + LINE + place // across * (LINE + height + GAP)
        draw.text((left, top), name, "dimgray", _font(13))
        strip.paste(panel, (left, top + LINE))
    return strip


def draw_text(looks: Mapping[str, Look], tokens: bool = False) -> Image.Image:
    """For each look the tokens that the model read, as text on the heat of the whole answer, and of its tokens.

    The first token is a sink that would leave no colour to the others: its share is written, and the scale is theirs.

    Args:
        looks, tokens: as `draw_pictures`.
    """
    small, large = _font(13), _font(15)
    parts: list[tuple[str, list[str], np.ndarray]] = []
    for title, look in looks.items():
        rows = [(f"{title}: {look.answer!r}", look.weights.mean(0).numpy())]
        for word in _words(look) if tokens else []:
            rows.append((f"{title}, {look.words[word]!r}", look.weights[word].numpy()))
        for name, weights in rows:
            sink = f"{100 * weights[0]:.0f} % of the attention is on the first token"
            parts.append((f"{name} ({sink})", look.read, weights))
    highest = max(float(weights[1:].max(initial=0.0)) for _, _, weights in parts) or 1.0
    placed = [_flow(read, small) for _, read, _ in parts]
    heights = [max(y for _, y, _, _ in words) + LINE for words in placed]
    page = Image.new("RGB", (PAGE, GAP + sum(LINE + h + GAP for h in heights) + 2 * LINE + GAP), "white")
    draw, top = ImageDraw.Draw(page), GAP
    for (name, _, weights), words, height in zip(parts, placed, heights, strict=True):
        draw.text((GAP, top), textwrap.shorten(name, 120), "black", large)
        top += LINE
        for (x, y, width, shown), weight in zip(words, weights, strict=True):
            colour = _colour(np.array(min(weight / highest, 1.0)))
            draw.rectangle((x, top + y, x + width, top + y + LINE - 3), fill=tuple(colour.round().astype(int).tolist()))
            draw.text((x, top + y), shown, "black", small)
        top += height + GAP
    _scale(page, top, 0.0, highest, "attention on a token")
    return page


def _words(look: Look) -> list[int]:
    """The tokens of an answer that are drawn; none where there is one, which is the whole answer."""
    return list(range(min(len(look.words), TOKENS))) if len(look.words) > 1 else []


def _flow(read: Sequence[str], font: ImageFont.FreeTypeFont) -> list[tuple[int, int, int, str]]:
    """(x, y, width, text) of tokens one after the other, in lines."""
    placed, x, y = [], GAP, 0
    for token in read:
        shown = token.replace("\n", "\\n")
        width = max(int(font.getlength(shown)), 4)
        if x + width > PAGE - GAP and x > GAP:
            x, y = GAP, y + LINE
        placed.append((x, y, width, shown))
        x += width + 1
        if token.endswith("\n"):
            x, y = GAP, y + LINE
    return placed


def _scaled(picture: Image.Image) -> Image.Image:
    factor = SIDE / max(picture.size)
    size = (max(round(picture.width * factor), 1), max(round(picture.height * factor), 1))
    return picture.convert("RGB").resize(size, Image.Resampling.LANCZOS)


def _heated(picture: Image.Image, heat: np.ndarray) -> Image.Image:
    """The picture in grey, covered by heat (height, width) from 0 to 1."""
    grey = np.asarray(picture.convert("L"), np.float32)[..., None].repeat(3, -1)
    return Image.fromarray(_over(0.6 * grey + 0.4 * 255, heat).round().astype(np.uint8))


def _over(below: np.ndarray, heat: np.ndarray) -> np.ndarray:
    """Colours (..., 3) under heat (...) from 0 to 1."""
    heat = heat.clip(0, 1)[..., None]
    cover = COVER * heat**0.7  # so that little is seen too
    return (1 - cover) * below + cover * (COLD + (HOT - COLD) * heat)


def _colour(heat: np.ndarray) -> np.ndarray:
    return _over(np.full((*heat.shape, 3), 255.0), heat)


def _scale(page: Image.Image, top: int, lowest: float, highest: float, label: str) -> None:
    """The colours with the numbers that they stand for."""
    draw, font = ImageDraw.Draw(page), _font(13)
    low, high = f"{lowest:.3g}", f"{highest:.3g}"
    left = GAP + int(font.getlength(low)) + 6
    bar = _colour(np.linspace(0, 1, 160)[None].repeat(12, 0)).round().astype(np.uint8)
    draw.text((GAP, top), low, "black", font)
    page.paste(Image.fromarray(bar), (left, top + 2))
    draw.text((left + 166, top), f"{high}   {label}", "black", font)


def _font(size: int) -> ImageFont.FreeTypeFont:
    font = ImageFont.load_default(size)
    assert isinstance(font, ImageFont.FreeTypeFont)
    return font
