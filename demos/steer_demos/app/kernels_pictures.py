"""Pictures of a block mask: the mask itself, and what one query sees on the grid of its frames."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageDraw, ImageFont, ImageOps

from steer_demos.app import kernels_form as form
from steer_demos.app.kernels_form import Grid
from steer_kernels import BlockMask, order

LEFT_OUT, HIDDEN, SEEN = 0, 1, 2
COLOURS = {LEFT_OUT: "#e5e7eb", HIDDEN: "#a5b4fc", SEEN: "#1d4ed8"}
QUERY, PAPER, INK = "#ea580c", "#ffffff", "#374151"
MOST_TOKENS, MOST_BLOCKS = 131_072, 2_048  # of a sequence; on a side of the mask
BY_TOKEN = 640  # sequences up to this length are drawn token by token
SIDE = 640  # pixels that a picture of a mask is enlarged to
MARGIN = 12  # beside a mask, for the mark at the query
WIDE, HIGH, LARGEST = 900, 820, 24  # pixels of the picture of frames, and of a token in it
GAP, HEADER = 10, 15  # between frames, and above each for its number
TOP, LEAST = 36, 430  # pixels above the frames, for the legend, and its width
LEGEND = {SEEN: "seen", HIDDEN: "computed, but hidden", LEFT_OUT: "left out"}


@dataclass(frozen=True, eq=False)
class Explored:
    """A mask and where its tokens are.

    Args:
        pattern: its name.
        arguments: with which it was called.
        grid: (frames, height, width) in tokens.
        text: text tokens in the sequence.
        mask: the block mask, for tokens in `order`.
        order: of all tokens; None = raster.
    """

    pattern: str
    arguments: Mapping[str, Any]
    grid: Grid
    text: int
    mask: BlockMask
    order: order.TokenOrder | None

    @property
    def first(self) -> int:
        """Place of the first visual token."""
        return self.text if self.arguments.get("text_first") else 0

    def place(self, query: Grid) -> int:
        """Place in the sequence of the token at (frame, row, column).

        Raises:
            ValueError: there is no such token.
        """
        for name, at, size in zip(("frame", "row", "column"), query, self.grid, strict=True):
            if not 0 <= at < size:
                raise ValueError(f"the query's {name} is {at}; the grid has {name}s 0 to {size - 1}")
        raster = self.first + int(np.ravel_multi_index(query, self.grid))
        return raster if self.order is None else int(self.order.to_raster[raster])

    def levels(self, query: Grid) -> tuple[np.ndarray, np.ndarray]:
        """What a query sees: of each visual token (frames, height, width), and of each text token (text,), uint8.

        LEFT_OUT: its block is not computed; HIDDEN: computed and hidden by the rule; SEEN.
        """
        at = torch.tensor([self.place(query)])
        found = _levels(self.mask, at)[0]
        if self.order is not None:
            found = self.order.undo(found, 0)
        visual = found.narrow(0, self.first, math.prod(self.grid)).view(self.grid)
        text = found.narrow(0, 0 if self.first else math.prod(self.grid), self.text)
        return visual.numpy(), text.numpy()


def explore(pattern: str, given: Mapping[str, Any] | None, grid: Grid, text_tokens: int, block_size: int) -> Explored:
    """The mask of a pattern for a form; see `kernels_form.call`.

    Raises:
        ValueError: what cannot be drawn, or is too large.
    """
    for name, number in zip(("frames", "height", "width", "text tokens"), (*grid, text_tokens), strict=True):
        least = 0 if name == "text tokens" else 1
        if number < least:
            raise ValueError(f"{number} {name} cannot be: give {least} or more")
    if block_size < 8:
        raise ValueError(f"block_size={block_size} must be 8 or more")
    arguments = form.call(pattern, given, grid, text_tokens, block_size)
    text = text_tokens if "text_tokens" in arguments else 0
    length = math.prod(grid) + text
    if length > MOST_TOKENS or -(-length // block_size) > MOST_BLOCKS:
        raise ValueError(
            f"{length:,} tokens in blocks of {block_size} are too many to draw here: at most {MOST_TOKENS:,} tokens "
            f"and {MOST_BLOCKS:,} blocks on a side. Make the grid smaller, or the blocks larger"
        )
    mask = form.function(pattern)(**arguments)
    tokens = None
    if mask.order != "raster":
        first = bool(arguments.get("text_first"))
        tokens = order.tiles(arguments["grid"], arguments["tile"], text_tokens=text, text_first=first)
    return Explored(pattern, arguments, grid, text, mask, tokens)


def _levels(mask: BlockMask, queries: torch.Tensor) -> torch.Tensor:
    """(n, kv_len) uint8 of some queries: LEFT_OUT, HIDDEN or SEEN."""
    columns = torch.arange(mask.kv_len) // mask.block_size[1]
    computed = mask.to_bool()[0, 0, queries // mask.block_size[0]][:, columns]
    return computed.to(torch.uint8) + mask.to_tokens(queries)[0, 0].to(torch.uint8)


def of_mask(explored: Explored, query: Grid) -> Image.Image:
    """The mask, queries down and keys across, with a mark beside the query's row; by token where it is small."""
    mask = explored.mask
    if mask.q_len <= BY_TOKEN:
        levels, at = _levels(mask, torch.arange(mask.q_len)).numpy(), explored.place(query)
        palette = np.array([ImageColor.getrgb(colour) for colour in COLOURS.values()], np.uint8)
        drawn, rows = Image.fromarray(palette[levels]), mask.q_len
    else:
        shown = mask.show()
        assert isinstance(shown, Image.Image)
        rows, at = mask.shape[-2], explored.place(query) // mask.block_size[0]
        shades = {"blackpoint": 40, "midpoint": 148, "whitepoint": 255}  # those of `show`
        drawn = ImageOps.colorize(shown, COLOURS[SEEN], COLOURS[LEFT_OUT], COLOURS[HIDDEN], **shades)
    zoom = max(1, SIDE // max(drawn.size))
    drawn = drawn.resize((drawn.width * zoom, drawn.height * zoom), Image.Resampling.NEAREST)
    above = drawn.width // 11  # for the buttons that the page lays over it
    picture = Image.new("RGB", (drawn.width + MARGIN, drawn.height + above), PAPER)
    picture.paste(drawn, (MARGIN, above))
    each = drawn.height / rows
    middle, half = above + (at + 0.5) * each, max(each / 2, 3)
    ImageDraw.Draw(picture).rectangle((0, middle - half, MARGIN - 3, middle + half), fill=QUERY)
    return picture


@dataclass(frozen=True)
class Sheet:
    """The frames of a grid side by side, one square for each token.

    Args:
        grid: (frames, height, width) in tokens.
        columns: frames in a row.
        cell: pixels of a token.
    """

    grid: Grid
    columns: int
    cell: int

    @classmethod
    def of(cls, grid: Grid) -> Sheet:
        """The sheet with the largest tokens, and with the most frames in a row among those."""
        frames, height, width = grid

        def cell(columns: int) -> int:
            rows = -(-frames // columns)
            return min((WIDE // columns - GAP) // width, (HIGH // rows - GAP - HEADER) // height, LARGEST)

        columns = max(range(1, frames + 1), key=lambda columns: (cell(columns), columns))
        return cls(grid, columns, max(1, cell(columns)))

    def corner(self, frame: int) -> tuple[int, int]:
        """(x, y) of the first pixel of a frame's tokens."""
        row, column = divmod(frame, self.columns)
        return column * (self.grid[2] * self.cell + GAP), row * (self.grid[1] * self.cell + GAP + HEADER) + HEADER + TOP

    def token(self, x: float, y: float) -> Grid | None:
        """(frame, row, column) of the token at a pixel; None between the frames."""
        for frame in range(self.grid[0]):
            left, top = self.corner(frame)
            row, column = int((y - top) // self.cell), int((x - left) // self.cell)
            if 0 <= row < self.grid[1] and 0 <= column < self.grid[2]:
                return frame, row, column
        return None

    def draw(self, visual: np.ndarray, text: np.ndarray, query: Grid) -> Image.Image:
        """The picture of `Explored.levels`; the query is marked."""
        frames, height, width = self.grid
        palette = np.array([ImageColor.getrgb(colour) for colour in COLOURS.values()], np.uint8)
        right, bottom = self.corner(self.columns - 1)[0] + width * self.cell, self.corner(frames - 1)[1]
        bottom += height * self.cell
        right, strip = max(right, LEAST), min(max(self.cell, 4), 10)
        across = right // strip
        text_rows = -(-len(text) // across)
        below = GAP + HEADER + text_rows * strip if text_rows else 0
        picture = Image.new("RGB", (right, bottom + below), PAPER)
        pen, font = ImageDraw.Draw(picture), ImageFont.load_default(11)
        _legend(pen)
        for frame in range(frames):
            x, y = self.corner(frame)
            picture.paste(_cells(palette[visual[frame]], self.cell), (x, y))
            pen.text((x, y - HEADER), f"frame {frame}" if width * self.cell > 50 else str(frame), INK, font)
        if text_rows:
            pen.text((0, bottom + GAP), f"{len(text)} text tokens", INK, font)
            for row in range(text_rows):
                part = text[row * across : (row + 1) * across]
                picture.paste(_cells(palette[part][None], strip), (0, bottom + GAP + HEADER + row * strip))
        x, y = self.corner(query[0])
        x, y = x + query[2] * self.cell, y + query[1] * self.cell
        around = max(0, 2 - self.cell // 2)  # a small token is marked larger than it is
        pen.rectangle((x - around, y - around, x + self.cell - 1 + around, y + self.cell - 1 + around), fill=QUERY)
        return picture


def _legend(pen: ImageDraw.ImageDraw) -> None:
    font, x = ImageFont.load_default(14), 0
    for colour, meaning in ((QUERY, "the query"), *((COLOURS[level], words) for level, words in LEGEND.items())):
        pen.rectangle((x, 6, x + 12, 18), fill=colour)
        pen.text((x + 18, 3), meaning, INK, font)
        x += 34 + int(font.getlength(meaning))


def _cells(colours: np.ndarray, cell: int) -> Image.Image:
    """One square for each colour (rows, columns, 3), with a thin line between large ones."""
    pixels = colours.repeat(cell, 0).repeat(cell, 1)
    if cell >= 6:
        pixels[cell - 1 :: cell], pixels[:, cell - 1 :: cell] = 255, 255
    return Image.fromarray(pixels)
