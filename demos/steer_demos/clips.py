"""The clip data set: emoji that move, turn, grow or stand still over a plain background, and real animated emoji.

The eight motions are procedural, so their ground truth is exact; the animations are drawings by Microsoft.
"""

import io
import tarfile
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from steer_demos.emoji import (
    BACKGROUNDS,
    ICON_SIZE,
    IMAGE_SIZE,
    IconPackage,
    concepts,
    fetch_package,
    render_icons,
)

FRAMES = 17
STYLE = "noto"

CONCEPTS = (
    "red apple",
    "banana",
    "eggplant",
    "mushroom",
    "hamburger",
    "fox",
    "penguin",
    "cactus",
    "car",
    "rocket",
    "house",
    "robot",
)

MOTIONS = (
    "moving left",
    "moving right",
    "moving up",
    "moving down",
    "growing",
    "shrinking",
    "spinning",
    "standing still",
)

ANIMATIONS_PACKAGE = IconPackage(
    "@lobehub/fluent-emoji-anim-1",
    "1.0.0",
    "sha512-/4m31vAuZEQ4aUJ5pxcOU5PVkuJya55GRxUZL7+zgLlxZXpzzE8jPqpDyhZICE3n47nS/Y9M5/vLdizi8201QA==",
    "MIT",
)
ANIMATIONS: dict[str, str] = {  # name in captions -> file in the package
    "waving hand": "1f44b",
    "eyes": "1f440",
    "rainbow": "1f308",
    "cyclone": "1f300",
    "bee": "1f41d",
    "fish": "1f41f",
}
ANIMATED_SHARE = 0.2

# In pixels of a 64 x 64 frame. The longest way with the largest sprite still stays inside the frame.
SIZE = (30.0, 38.0)
SMALL_SIZE, LARGE_SIZE = (16.0, 22.0), (38.0, 46.0)
TRAVEL = (18.0, 26.0)
REACH = 14.0  # how far from the middle a centre may get
TURN = (240.0, 360.0)  # degrees, clockwise


def clip_caption(name: str, motion: str | None, background: str | None = None) -> str:
    """The caption of one clip, e.g. `a fox moving left on a blue background`; no motion means a real animation."""
    subject = f"{name} {motion}" if motion else f"animated {name}"
    article = "an" if subject[0] in "aeiou" else "a"
    return f"{article} {subject}" + (f" on a {background} background" if background else "")


@cache
def sprites() -> Tensor:
    """The still drawings, in the order of `CONCEPTS`: (12, 4, 64, 64) premultiplied RGBA in [0, 1]."""
    order = [list(concepts()).index(name) for name in CONCEPTS]
    return _premultiplied(render_icons(STYLE)[order])


@cache
def animations() -> Tensor:
    """The animations, in the order of `ANIMATIONS`, at 17 even times: (6, 17, 4, 64, 64) premultiplied RGBA."""
    clips = np.zeros((len(ANIMATIONS), FRAMES, IMAGE_SIZE, IMAGE_SIZE, 4), np.uint8)
    rim = (IMAGE_SIZE - ICON_SIZE) // 2
    files = {f"package/assets/{file}.webp": index for index, file in enumerate(ANIMATIONS.values())}
    # One pass over the archive: it is compressed as a whole, and members cannot be sought.
    with tarfile.open(fetch_package(ANIMATIONS_PACKAGE), "r|gz") as archive:
        for member in archive:
            if member.name not in files:
                continue
            content = archive.extractfile(member)
            assert content is not None
            animation = Image.open(io.BytesIO(content.read()))
            count = animation.n_frames  # type: ignore[attr-defined]  # only animated formats have it
            for time in range(FRAMES):
                animation.seek(time * count // FRAMES)
                picture = animation.convert("RGBA").resize((ICON_SIZE, ICON_SIZE), Image.Resampling.LANCZOS)
                clips[files[member.name], time, rim:-rim, rim:-rim] = np.asarray(picture)
    return _premultiplied(clips)


def _premultiplied(pixels: np.ndarray) -> Tensor:
    straight = torch.from_numpy(pixels).movedim(-1, -3).float() / 255
    alpha = straight[..., 3:, :, :]
    return torch.cat([straight[..., :3, :, :] * alpha, alpha], dim=-3)


def draw_poses(motion: Tensor, generator: torch.Generator) -> Tensor:
    """Where the sprite is in each frame of each clip.

    Args:
        motion: (B,) indices into `MOTIONS`; `len(MOTIONS)` for an animation, which stays in its place.

    Returns:
        (B, 17, 4): centre (x to the right, y down) in pixels from the middle, size in pixels, degrees clockwise.
    """
    size = len(motion)

    def uniform(low: float, high: float) -> Tensor:
        return low + (high - low) * torch.rand(size, generator=generator)

    def asked(name: str) -> Tensor:
        return (motion == MOTIONS.index(name)).float()

    time = torch.linspace(0, 1, FRAMES)
    travel = uniform(*TRAVEL)
    x_way = travel * (asked("moving right") - asked("moving left"))
    y_way = travel * (asked("moving down") - asked("moving up"))
    # Whatever is left of the reach is where the middle of the way may lie.
    x = (REACH - x_way.abs() / 2) * uniform(-1, 1)
    y = (REACH - y_way.abs() / 2) * uniform(-1, 1)
    grows, shrinks = asked("growing"), asked("shrinking")
    changes = grows + shrinks
    x, y = x * (1 - 0.6 * changes), y * (1 - 0.6 * changes)  # a large sprite has less room
    small, large, constant = uniform(*SMALL_SIZE), uniform(*LARGE_SIZE), uniform(*SIZE)
    first = constant * (1 - changes) + small * grows + large * shrinks
    last = constant * (1 - changes) + large * grows + small * shrinks
    turn = uniform(*TURN) * asked("spinning")
    return torch.stack(
        [
            x[:, None] + x_way[:, None] * (time - 0.5),
            y[:, None] + y_way[:, None] * (time - 0.5),
            torch.lerp(first[:, None], last[:, None], time),
            turn[:, None] * time,
        ],
        dim=-1,
    )


def render_clips(drawings: Tensor, poses: Tensor, colours: Tensor) -> Tensor:
    """Draw sprites at poses over plain colours.

    Args:
        drawings: (B, T, 4, 64, 64) premultiplied RGBA in [0, 1], whose icon fills `ICON_SIZE` pixels.
        poses: (B, T, 4), see `draw_poses`.
        colours: (B, 3) in [0, 1].

    Returns:
        (B, T, 3, 64, 64) in [-1, 1].
    """
    batch, frames = poses.shape[:2]
    x, y, size, turn = poses.flatten(0, 1).unbind(-1)
    zoom = ICON_SIZE / size
    cos, sin = zoom * turn.deg2rad().cos(), zoom * turn.deg2rad().sin()
    half = IMAGE_SIZE / 2
    rows = [cos, sin, -(cos * x + sin * y) / half, -sin, cos, (sin * x - cos * y) / half]
    # Twice the resolution, then averaged: shrunk sprites would alias otherwise.
    fine = [batch * frames, 4, 2 * IMAGE_SIZE, 2 * IMAGE_SIZE]
    grid = F.affine_grid(torch.stack(rows, dim=-1).unflatten(-1, (2, 3)), fine, align_corners=False)
    drawn = F.avg_pool2d(F.grid_sample(drawings.flatten(0, 1), grid, align_corners=False), 2)
    drawn = drawn.unflatten(0, (batch, frames))
    return (drawn[:, :, :3] + (1 - drawn[:, :, 3:]) * colours[:, None, :, None, None]) * 2 - 1


@dataclass(frozen=True)
class Clips:
    """Clips and what they show.

    Args:
        frames: (N, 17, 3, 64, 64) in [-1, 1].
        subjects: (N,) indices into `CONCEPTS`, and from `len(CONCEPTS)` on into `ANIMATIONS`.
        motions: (N,) indices into `MOTIONS`; `len(MOTIONS)` for an animation.
        backgrounds: (N,) indices into `BACKGROUNDS`.
    """

    frames: Tensor
    subjects: Tensor
    motions: Tensor
    backgrounds: Tensor


def make_clips(subjects: Tensor, motions: Tensor, backgrounds: Tensor, generator: torch.Generator) -> Clips:
    """Clips of given subjects, motions and backgrounds (N,), indices as in `Clips`; poses are drawn at random."""
    stills = sprites()[:, None].expand(-1, FRAMES, -1, -1, -1)
    animated = subjects >= len(CONCEPTS)
    drawings = stills[subjects.clamp(max=len(CONCEPTS) - 1)].clone()
    if animated.any():
        drawings[animated] = animations()[subjects[animated] - len(CONCEPTS)]
    colours = torch.tensor(list(BACKGROUNDS.values()))[backgrounds] / 255
    frames = render_clips(drawings, draw_poses(motions, generator), colours)
    return Clips(frames, subjects, motions, backgrounds)


def draw_clips(size: int, generator: torch.Generator) -> Clips:
    """Random clips: every concept, motion and background alike, `ANIMATED_SHARE` of them animations."""

    def pick(count: int) -> Tensor:
        return torch.randint(count, (size,), generator=generator)

    animated = torch.rand(size, generator=generator) < ANIMATED_SHARE
    subjects = torch.where(animated, len(CONCEPTS) + pick(len(ANIMATIONS)), pick(len(CONCEPTS)))
    motions = pick(len(MOTIONS)).masked_fill(animated, len(MOTIONS))
    return make_clips(subjects, motions, pick(len(BACKGROUNDS)), generator)
