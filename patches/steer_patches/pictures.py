"""Vision-language models: which tokens of a sequence show which part of which picture."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F

from steer_patches.encoding import encoded
from steer_patches.site import Run

if TYPE_CHECKING:
    from steer_patches.family import Family
    from steer_patches.generation import Text

MEMORY = "pictures"  # where a sequence keeps its own in `run.memory`
PIXELS = ("pixel_values", "pixel_values_videos")
ABOUT_PIXELS = (
    *PIXELS,
    "mm_encoder_outputs",
    "pixel_attention_mask",
    "image_sizes",
    "image_sizes_videos",
    "image_grid_thw",
    "video_grid_thw",
    "second_per_grid_ts",
    "batch_num_images",
)


@dataclass(frozen=True, eq=False)
class Part:
    """The tokens of one picture, or of one video, in the order in which they stand in the sequence.

    Args:
        shows: (n,) bool, False = a row's end and the like, which is of the picture and shows nothing.
        box: (n, 4) left, top, right, bottom of what a token shows, as fractions of the picture; 0 where nothing.
        view: (n,) int64, the input of the vision tower that a token comes from, see `Pictures`; -1 where from none.
        view_box: (n, 4) the part of that input.
        frame: (n,) int64, which picture of a video; None = there is one.
    """

    shows: torch.Tensor
    box: torch.Tensor
    view: torch.Tensor
    view_box: torch.Tensor
    frame: torch.Tensor | None = None


@dataclass(frozen=True, eq=False)
class Pictures:
    """The pictures in the sequences of one forward, S = all tokens up to its last.

    Args:
        number: (B, S) int64, the picture of its row that a token belongs to, from 0; -1 = text.
        shows: (B, S) bool, tokens that show a part of a picture; the ends of rows and the like do not.
        box: (B, S, 4) float32, left, top, right, bottom of that part as fractions of the picture the model was given.
        view: (B, S) int64, the input of the vision tower that a token comes from; -1 = none. They are counted from 0 in
            each forward that brings pictures, over its batch, in the order in which the tower gets them: first every
            picture (with its tiles, without padding), then every video (its frames; of Qwen models each two frames).
            With beams and copies the rows of one prompt share theirs.
        view_box: (B, S, 4) float32, the part of that input.
    """

    number: torch.Tensor
    shows: torch.Tensor
    box: torch.Tensor
    view: torch.Tensor
    view_box: torch.Tensor

    @cached_property
    def after(self) -> torch.Tensor:
        """(B, S) bool: what comes after the first picture of its row and belongs to none; padding and marks too."""
        return ((self.number >= 0).cumsum(-1) > 0) & (self.number < 0)

    @property
    def last(self) -> torch.Tensor:
        """(B,) int64: place of the last token of a picture; -1 in a row without."""
        at = torch.arange(self.number.shape[1], device=self.number.device)
        return torch.where(self.number >= 0, at, -1).amax(-1)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The fields by name."""
        return {name: getattr(self, name) for name in EMPTY}


EMPTY: Mapping[str, Any] = {"number": -1, "shows": False, "box": 0.0, "view": -1, "view_box": 0.0}  # of text


def pictures_of(
    model: torch.nn.Module, family: Family | None, arguments: Mapping[str, Any], run: Run, past: int, new: int
) -> tuple[Pictures | None, dict[str, dict[Any, Any]]]:
    """The pictures of the sequences that a forward continues; None where they have none, or their family is unknown.

    Args:
        past: tokens before this forward. new: tokens of this forward.

    Returns:
        The pictures, and what methods read while those of this forward were encoded ahead of it.

    Raises:
        ValueError: pictures without `input_ids`, or other numbers of tokens than the pictures have.
    """
    if family is None or family.pictures is None:
        return None, {}
    if not past:
        run.memory.pop(MEMORY, None)  # of a prompt that failed
    known: dict[str, torch.Tensor] | None = run.memory.get(MEMORY)
    if known is not None:  # assisted decoding takes tokens back
        known = {name: tensor[:, :past] for name, tensor in known.items()}
    about, read = encoded(arguments)
    about = {name: value for name, value in {**arguments, **about}.items() if value is not None}
    brought = any(about.get(name) is not None for name in PIXELS)
    if not brought and arguments.get("mm_encoder_outputs"):
        raise ValueError(
            "steer does not know these encoded pictures: leave prefill_chunk_size out, or let the model, once methods "
            "are applied, encode pixel_values itself"
        )
    if known is None and not brought:
        return None, read
    if brought:
        ids = arguments.get("input_ids")
        if ids is None:
            raise ValueError(
                "steer finds pictures by their tokens: give input_ids with pixel_values, not inputs_embeds"
            )
        fresh = _placed(ids, family.pictures(model, about, ids), known)
    else:
        assert known is not None
        fresh = _text(known["number"].shape[0], new, known["number"].device)
    before = _text(fresh["number"].shape[0], past, fresh["number"].device) if known is None else known
    joined = {}
    for name, empty in EMPTY.items():
        kept = before[name]
        short = past - kept.shape[1]  # forwards that were not steered add text
        if short:
            kept = F.pad(kept, (0, 0, 0, short) if kept.ndim == 3 else (0, short), value=empty)
        joined[name] = torch.cat([kept, fresh[name].to(kept.device)], dim=1)
    run.memory[MEMORY] = joined
    return Pictures(**joined), read


def _text(rows: int, tokens: int, device: torch.device) -> dict[str, torch.Tensor]:
    return {
        "number": torch.full((rows, tokens), -1, device=device),
        "shows": torch.zeros(rows, tokens, dtype=torch.bool, device=device),
        "box": torch.zeros(rows, tokens, 4, device=device),
        "view": torch.full((rows, tokens), -1, device=device),
        "view_box": torch.zeros(rows, tokens, 4, device=device),
    }


def _placed(
    ids: torch.Tensor, parts: Mapping[int, Sequence[Part]], known: Mapping[str, torch.Tensor] | None
) -> dict[str, torch.Tensor]:
    """The parts, of each token id in the order of its tokens, at their places in `ids` (B, new)."""
    wanted = sum(len(part.shows) for items in parts.values() for part in items)
    marks = sum(int((ids == token).sum()) for token in parts)
    copies = marks // wanted if wanted and marks % wanted == 0 else 1
    marked = ids.where(torch.isin(ids, torch.tensor(list(parts), device=ids.device)), -1)
    if copies > 1 and torch.equal(marked[::copies].repeat_interleave(copies, 0), marked):  # beams: so many of every row
        found = _placed(ids[::copies], parts, None if known is None else {k: v[::copies] for k, v in known.items()})
        return {name: tensor.repeat_interleave(copies, 0) for name, tensor in found.items()}
    found = _text(ids.shape[0], ids.shape[1], torch.device("cpu"))
    supply = {token: list(items) for token, items in parts.items()}
    for row, line in enumerate(ids.tolist()):
        count = 0 if known is None else int(known["number"][row].max()) + 1
        places = {token: [at for at, other in enumerate(line) if other == token] for token in parts}
        while any(places.values()):
            token = min((token for token in places if places[token]), key=lambda token: places[token][0])
            if not supply[token] or len(supply[token][0].shows) > len(places[token]):
                raise ValueError(_mismatch(ids, parts))
            part = supply[token].pop(0)
            size = len(part.shows)
            at = torch.tensor(places[token][:size])
            places[token] = places[token][size:]
            frame = torch.zeros(size, dtype=torch.int64) if part.frame is None else part.frame
            found["number"][row, at] = count + frame
            for name in ("shows", "box", "view", "view_box"):
                found[name][row, at] = getattr(part, name).to(found[name].dtype)
            count += int(frame.max()) + 1
    if any(supply.values()):
        raise ValueError(_mismatch(ids, parts))
    return {name: tensor.to(ids.device) for name, tensor in found.items()}


def _mismatch(ids: torch.Tensor, parts: Mapping[int, Sequence[Part]]) -> str:
    found = {token: int((ids == token).sum()) for token in parts}
    wanted = {token: sum(len(part.shows) for part in items) for token, items in parts.items()}
    return (
        f"the prompt has {found} tokens of pictures (by token id), but the pictures given need {wanted}, each in one "
        "row: make input_ids and pixel_values with the model's processor in one call"
    )


def cells(rows: int, columns: int, region: Sequence[float] = (0.0, 0.0, 1.0, 1.0)) -> torch.Tensor:
    """(rows * columns, 4): left, top, right, bottom of the cells of a grid that fills a region, row by row."""
    left, top, right, bottom = region
    down, across = torch.meshgrid(torch.arange(rows), torch.arange(columns), indexing="ij")
    corners = torch.stack([across / columns, down / rows, (across + 1) / columns, (down + 1) / rows], -1).view(-1, 4)
    size = torch.tensor([right - left, bottom - top] * 2)
    return corners * size + torch.tensor([left, top] * 2)


def text_only(arguments: Mapping[str, Any], text: Text) -> dict[str, Any]:
    """What to change in a forward so that it has the same text and no picture; rows are padded on the left.

    What stands between the tokens of one picture (marks of its tiles) goes with it.

    Args:
        arguments: of the forward. text: its tokens, with pictures; which of them are padding is read here, as the mask
            among the arguments may have any form.

    Returns:
        Arguments with `input_ids` and `attention_mask` (B, S') and `position_ids`, the pictures' own None, no cache.
    """
    assert text.pictures is not None
    ids = arguments["input_ids"]
    batch, tokens = ids.shape
    number = text.pictures.number[:, text.past :]
    real = torch.ones_like(ids, dtype=torch.bool)
    if text.valid is not None:
        real = text.valid[:, text.past :].to(ids.device).expand(batch, -1)
    rows = []
    for row in range(batch):
        keep = real[row].clone()
        for picture in number[row][number[row] >= 0].unique():
            at = (number[row] == picture).nonzero()
            keep[int(at.min()) : int(at.max()) + 1] = False
        rows.append(keep.nonzero().flatten())
    longest = max(max((len(row) for row in rows), default=1), 1)
    changes: dict[str, Any] = {name: None for name in ABOUT_PIXELS if name in arguments}
    per_token = {name: arguments[name] for name in ("input_ids", "token_type_ids", "mm_token_type_ids")
                 if isinstance(arguments.get(name), torch.Tensor)}  # fmt: skip
    for name, tensor in per_token.items():
        tensor = F.pad(tensor, (0, tokens - tensor.shape[1]))  # assisted decoding's candidates may have none
        padded = tensor.new_zeros(batch, longest)
        for row, kept in enumerate(rows):
            padded[row, longest - len(kept) :] = tensor[row, kept]
        changes[name] = padded
    there = torch.zeros_like(changes["input_ids"])
    for row, kept in enumerate(rows):
        there[row, longest - len(kept) :] = 1
    positions = (there.cumsum(-1) - 1).clamp(min=0)
    return {
        **changes,
        "attention_mask": there,
        "position_ids": positions,
        "past_key_values": None,
        "inputs_embeds": None,
        "labels": None,
    }
