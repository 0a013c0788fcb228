"""Drawn scenes for the vision-language model: shapes and emoji with exact boxes, questions about them, and answers.

A scene follows from its seed alone. Training draws seeds below `EVALUATION_SEED`, evaluation starts there. The first of
those come with the package, so that they can be looked at without what draws them: the packages of
`steer-attention[train]`, and npm for the icons. `python -m steer_demos.scenes` draws these files anew.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from steer_demos.emoji import STYLES, concepts, render_all

CANVAS = 96
PATCH = 16  # pixels; the vision tower sees a grid of 6 x 6
EVALUATION_SEED = 2**40
READY = 40  # scenes that come with the package, from EVALUATION_SEED on
FOLDER = Path(__file__).parent / "weights" / "emoji-vlm" / "scenes"  # their pictures, one below the other, and things
SIZES = (20, 34)  # pixels, both included
GAP = 2  # pixels between any two boxes
UNDECIDED = 6  # pixels: nearer to a middle line than this, a thing is in no corner
POPULAR = 10  # how many of the most frequent names POPE's popular questions use

SHAPES = ("circle", "square", "triangle", "star")
COLOURS: dict[str, tuple[int, int, int]] = {
    "red": (220, 40, 40),
    "green": (45, 165, 60),
    "blue": (45, 90, 220),
    "yellow": (245, 210, 30),
    "purple": (140, 60, 180),
    "black": (35, 35, 35),
}
# Emoji by what they are taken for; a question about an absent one is hard when one of its kind is there.
KINDS: dict[str, tuple[str, ...]] = {
    "animal": ("cat face", "dog face", "panda", "frog", "penguin", "octopus"),
    "food": ("banana", "strawberry", "carrot", "pizza", "doughnut"),
    "object": ("car", "tree", "umbrella", "guitar", "robot"),
}
EMOJI = tuple(name for names in KINDS.values() for name in names)
PLURALS = {"octopus": "octopuses", "strawberry": "strawberries", "pizza": "pizzas"}
PRESENCE_SPLITS = ("random", "popular", "adversarial")


def _all_names() -> tuple[str, ...]:
    shapes = [f"{colour} {shape}" for shape in SHAPES for colour in COLOURS]
    # A fixed shuffle, so that neither colours, shapes nor emoji are the frequent ones.
    return tuple(np.random.default_rng(0).permutation([*shapes, *EMOJI]).tolist())


# Every name, the most frequent first: the first is drawn three times as often as the last.
NAMES = _all_names()
FREQUENCIES = np.linspace(3, 1, len(NAMES)) / np.linspace(3, 1, len(NAMES)).sum()


@dataclass(frozen=True)
class Thing:
    """One thing in a scene.

    Args:
        name: as in `NAMES`, e.g. `red circle` or `cat face`.
        box: left, top, right, bottom in pixels; right and bottom excluded.
    """

    name: str
    box: tuple[int, int, int, int]

    @property
    def shape(self) -> str | None:
        """The shape, or None for an emoji."""
        return None if self.name in EMOJI else self.name.split()[1]

    @property
    def colour(self) -> str | None:
        """The colour of a shape, or None for an emoji."""
        return None if self.name in EMOJI else self.name.split()[0]

    @property
    def centre(self) -> tuple[float, float]:
        """x and y in pixels."""
        left, top, right, bottom = self.box
        return (left + right) / 2, (top + bottom) / 2

    @property
    def patch(self) -> int:
        """The patch that holds the centre, numbered row by row."""
        x, y = (int(coordinate // PATCH) for coordinate in self.centre)
        return y * (CANVAS // PATCH) + x

    @property
    def corner(self) -> str | None:
        """`top left`, ..., or None where the centre is too near to a middle line."""
        x, y = (coordinate - CANVAS / 2 for coordinate in self.centre)
        if min(abs(x), abs(y)) < UNDECIDED:
            return None
        return f"{'top' if y < 0 else 'bottom'} {'left' if x < 0 else 'right'}"


@dataclass(frozen=True, eq=False)
class Scene:
    """Things in reading order of the patches that hold their centres, and the picture (96, 96, 3) uint8."""

    things: tuple[Thing, ...]
    pixels: np.ndarray

    def count(self, name: str) -> int:
        """How many things have this name."""
        return sum(thing.name == name for thing in self.things)

    def unique(self) -> list[Thing]:
        """The things whose name occurs once."""
        return [thing for thing in self.things if self.count(thing.name) == 1]


@dataclass(frozen=True)
class Question:
    """One question with its answer.

    Args:
        kind: `presence`, `colour`, `count`, `position` or `caption`.
        split: of an absent thing, how it was chosen (see `PRESENCE_SPLITS`); otherwise None.
    """

    kind: str
    text: str
    answer: str
    split: str | None = None


def draw_scene(seed: int) -> Scene:
    """The scene of `seed`: two to five things, some of them alike, that do not overlap."""
    number = seed - EVALUATION_SEED
    return ready_scenes()[number] if 0 <= number < READY else _draw_scene(seed)


@cache
def ready_scenes() -> tuple[Scene, ...]:
    """The scenes that come with the package."""
    with Image.open(FOLDER / "scenes.webp") as sheet:
        pictures = np.asarray(sheet.convert("RGB")).reshape(-1, CANVAS, CANVAS, 3)
    listed = json.loads((FOLDER / "scenes.json").read_text(encoding="utf-8"))
    return tuple(
        Scene(tuple(Thing(name, tuple(box)) for name, box in things), picture)
        for things, picture in zip(listed, pictures, strict=True)
    )


def _draw_scene(seed: int) -> Scene:
    chance = np.random.default_rng(seed)
    names = _draw_names(chance)
    boxes: list[tuple[int, int, int, int]] = []
    while len(boxes) < len(names):
        boxes = _draw_boxes(len(names), chance)
    pixels = _draw_background(chance)
    for name, box in zip(names, boxes, strict=True):
        _paste(pixels, name, box, chance)
    things = sorted(map(Thing, names, boxes), key=lambda thing: thing.patch)
    return Scene(tuple(things), pixels.round().clip(0, 255).astype(np.uint8))


def _draw_names(chance: np.random.Generator) -> list[str]:
    count = int(chance.integers(2, 6))
    names = chance.choice(len(NAMES), count, replace=False, p=FREQUENCIES)
    if chance.random() < 0.5:  # else counting would be answered "1" nearly always
        alike = int(chance.integers(2, min(count, 3) + 1))
        names[:alike] = names[0]
    if chance.random() < 0.3:
        names[-1] = _neighbour(int(names[0]), chance)
    return [NAMES[index] for index in names]


def _neighbour(index: int, chance: np.random.Generator) -> int:
    # Scenes with a red and a blue circle are what makes naming both parts of a shape necessary.
    alike = [NAMES.index(name) for name in similar_names(NAMES[index])]
    return int(chance.choice(alike))


def similar_names(name: str) -> list[str]:
    """The other names that share a colour or a shape with `name`, or the kind of an emoji."""
    if name in EMOJI:
        kind = next(names for names in KINDS.values() if name in names)
        return [other for other in kind if other != name]
    colour, shape = name.split()
    return [other for other in NAMES if other not in EMOJI and other != name and {colour, shape} & set(other.split())]


def _draw_boxes(count: int, chance: np.random.Generator) -> list[tuple[int, int, int, int]]:
    boxes: list[tuple[int, int, int, int]] = []
    for _ in range(20 * count):
        size = int(chance.integers(SIZES[0], SIZES[1] + 1))
        left, top = (int(edge) for edge in chance.integers(0, CANVAS - size + 1, 2))
        box = (left, top, left + size, top + size)
        if all(_apart(box, other) for other in boxes):
            boxes.append(box)
        if len(boxes) == count:
            break
    return boxes


def _apart(one: tuple[int, int, int, int], two: tuple[int, int, int, int]) -> bool:
    gaps = (two[0] - one[2], one[0] - two[2], two[1] - one[3], one[1] - two[3])
    return max(gaps) >= GAP


def _draw_background(chance: np.random.Generator) -> np.ndarray:
    pixels = np.empty((CANVAS, CANVAS, 3), np.float32)
    pixels[:] = chance.uniform(185, 250) + chance.uniform(-12, 12, 3)
    if chance.random() < 0.5:
        slope = chance.uniform(-12, 12, 2)
        ramp = np.linspace(-1, 1, CANVAS, dtype=np.float32)
        pixels += (slope[0] * ramp[:, None] + slope[1] * ramp)[..., None]
        pixels += chance.standard_normal((CANVAS, CANVAS, 1), np.float32) * chance.uniform(0, 6)
    return pixels


def _paste(pixels: np.ndarray, name: str, box: tuple[int, int, int, int], chance: np.random.Generator) -> None:
    left, top, right, bottom = box
    if name in EMOJI:
        sprite = _emoji_sprite(name, int(chance.integers(len(STYLES))), right - left)
        colour, alpha = sprite[..., :3], sprite[..., 3:]
    else:
        colour_name, shape = name.split()
        alpha = _shape_mask(shape, right - left)
        colour = COLOURS[colour_name] + chance.uniform(-15, 15, 3)
    area = pixels[top:bottom, left:right]
    area += alpha * (colour - area)


@cache
def _shape_mask(shape: str, size: int) -> np.ndarray:
    """Coverage (size, size, 1) float32 in [0, 1], drawn at four times the size."""
    large = 4 * size
    mask = Image.new("L", (large, large))
    draw = ImageDraw.Draw(mask)
    if shape == "circle":
        draw.ellipse((0, 0, large - 1, large - 1), fill=255)
    elif shape == "square":
        margin = large // 12
        draw.rectangle((margin, margin, large - 1 - margin, large - 1 - margin), fill=255)
    elif shape == "triangle":
        draw.polygon([(large / 2, 0), (large - 1, large - 1), (0, large - 1)], fill=255)
    else:
        angles = np.pi * (np.arange(10) / 5 - 0.5)
        radii = np.where(np.arange(10) % 2, 0.2, 0.5) * large
        points = zip(large / 2 + radii * np.cos(angles), large / 2 + radii * np.sin(angles), strict=True)
        draw.polygon([(float(x), float(y)) for x, y in points], fill=255)
    return np.asarray(mask.resize((size, size), Image.Resampling.BOX), np.float32)[..., None] / 255


@cache
def _emoji_sprite(name: str, style: int, size: int) -> np.ndarray:
    """(size, size, 4) float32: colours in [0, 255], coverage in [0, 1]."""
    render = render_all()[list(concepts()).index(name), style]
    margin = 4  # plain on every side of a render
    cut = Image.fromarray(render[margin:-margin, margin:-margin])
    sprite = np.asarray(cut.resize((size, size), Image.Resampling.LANCZOS), np.float32)
    return np.concatenate([sprite[..., :3], sprite[..., 3:] / 255], axis=-1)


def with_article(name: str) -> str:
    """`a cat face`, `an octopus`."""
    return ("an " if name[0] in "aeiou" else "a ") + name


def plural(name: str) -> str:
    """`red circles`, `octopuses`."""
    return PLURALS.get(name, name + "s")


def caption(names: Sequence[str]) -> str:
    """`A red circle, a cat face and a blue star.`"""
    phrases = [with_article(name) for name in names]
    text = " and ".join([*([", ".join(phrases[:-1])] if len(phrases) > 1 else []), phrases[-1]])
    return text[0].upper() + text[1:] + "."


def absent_names(scene: Scene, split: str, count: int, chance: np.random.Generator) -> list[str]:
    """Up to `count` names that are not in the scene, chosen as in POPE (Li et al. 2023, section 4).

    Args:
        split: `random` of all names, `popular` of the most frequent ones, `adversarial` of those that share a colour, a
            shape or a kind with something in the scene.
    """
    present = {thing.name for thing in scene.things}
    if split == "adversarial":
        pool = {name for thing in present for name in similar_names(thing)} - present
    elif split == "popular":
        pool = set(NAMES[:POPULAR]) - present
    elif split == "random":
        pool = set(NAMES) - present
    else:
        raise ValueError(f"no split {split!r} of absent things; there are {', '.join(PRESENCE_SPLITS)}")
    names = sorted(pool)
    return [names[index] for index in chance.permutation(len(names))[:count]]


def presence_question(name: str, answer: str, split: str | None = None) -> Question:
    """POPE's question about one name."""
    return Question("presence", f"Is there {with_article(name)} in the image?", answer, split)


def presence_questions(scene: Scene, chance: np.random.Generator, splits: Sequence[str]) -> list[Question]:
    """Up to three present names, and for every one of them an absent name of each of `splits`."""
    present = sorted({thing.name for thing in scene.things})
    present = [present[index] for index in chance.permutation(len(present))[:3]]
    questions = [presence_question(name, "Yes") for name in present]
    for split in splits:
        absent = absent_names(scene, split, len(present), chance)
        questions += [presence_question(name, "No", split) for name in absent]
    return questions


def _one(things: Sequence[Thing], chance: np.random.Generator) -> Thing:
    return things[int(chance.integers(len(things)))]


def other_questions(scene: Scene, chance: np.random.Generator) -> list[Question]:
    """One question each of colour, count and position where the scene allows it, and the caption."""
    shapes = [thing.shape for thing in scene.things]
    coloured = [thing for thing in scene.things if thing.shape and shapes.count(thing.shape) == 1]
    placed = [thing for thing in scene.unique() if thing.corner]
    questions = []
    if coloured:
        thing = _one(coloured, chance)
        questions.append(Question("colour", f"What colour is the {thing.shape}?", str(thing.colour).capitalize()))
    if chance.random() < 0.25:
        questions.append(Question("count", "How many things are in the image?", str(len(scene.things))))
    else:
        names = sorted({thing.name for thing in scene.things})
        counts = [scene.count(name) for name in names]
        # Half of the time about what there is most of, so that 1 is not the answer to nearly all.
        index = int(np.argmax(counts)) if chance.random() < 0.5 else int(chance.integers(len(names)))
        text = f"How many {plural(names[index])} are in the image?"
        questions.append(Question("count", text, str(counts[index])))
    if placed:
        thing = _one(placed, chance)
        questions.append(Question("position", f"Where is the {thing.name}?", str(thing.corner).capitalize()))
    questions.append(Question("caption", "Describe the image.", caption([thing.name for thing in scene.things])))
    return questions


def training_questions(scene: Scene, chance: np.random.Generator) -> list[Question]:
    """Balanced presence questions, each absent name of a random split, and the others twice, in random order."""
    asked = presence_questions(scene, chance, PRESENCE_SPLITS)
    present = [question for question in asked if question.split is None]
    absent = [question for question in asked if question.split is not None]
    absent = _different([absent[index] for index in chance.permutation(len(absent))])[: len(present)]
    others = _different([*other_questions(scene, chance), *other_questions(scene, chance)])
    questions = [*present, *absent, *others]
    return [questions[index] for index in chance.permutation(len(questions))]


def _different(questions: Sequence[Question]) -> list[Question]:
    # Two splits may choose the same name, and two draws the same question.
    return list({question.text: question for question in questions}.values())


def _write_ready() -> None:
    scenes = [_draw_scene(EVALUATION_SEED + number) for number in range(READY)]
    FOLDER.mkdir(parents=True, exist_ok=True)
    things = [[[thing.name, thing.box] for thing in scene.things] for scene in scenes]
    (FOLDER / "scenes.json").write_text(json.dumps(things, indent=None) + "\n", encoding="utf-8")
    sheet = Image.fromarray(np.concatenate([scene.pixels for scene in scenes]))
    sheet.save(FOLDER / "scenes.webp", lossless=True, quality=100, method=6)


if __name__ == "__main__":
    _write_ready()
