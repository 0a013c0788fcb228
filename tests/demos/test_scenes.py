"""Scenes are what they say they are: boxes, names, questions and answers, without npm or a renderer."""

from collections import Counter
from collections.abc import Iterator

import numpy as np
import pytest

from steer_demos import scenes
from steer_demos.emoji import STYLES, concepts
from steer_demos.scenes import (
    CANVAS,
    COLOURS,
    EMOJI,
    FREQUENCIES,
    GAP,
    NAMES,
    PLURALS,
    POPULAR,
    PRESENCE_SPLITS,
    Scene,
    Thing,
    absent_names,
    caption,
    draw_scene,
    other_questions,
    plural,
    presence_questions,
    similar_names,
    training_questions,
)


@pytest.fixture(autouse=True)
def plain_emoji(monkeypatch) -> Iterator[None]:
    """Emoji as gray tiles."""
    renders = np.full((len(concepts()), len(STYLES), 64, 64, 4), 128, np.uint8)
    renders[..., 3] = 255
    monkeypatch.setattr(scenes, "render_all", lambda: renders)
    scenes._emoji_sprite.cache_clear()
    yield
    scenes._emoji_sprite.cache_clear()


def made(*things: tuple[str, int, int]) -> Scene:
    """A scene of things of 20 x 20 at left, top; no picture."""
    placed = (Thing(name, (left, top, left + 20, top + 20)) for name, left, top in things)
    return Scene(tuple(placed), np.zeros((CANVAS, CANVAS, 3), np.uint8))


def test_a_seed_fixes_the_scene() -> None:
    first, again, other = draw_scene(5), draw_scene(5), draw_scene(6)
    np.testing.assert_array_equal(first.pixels, again.pixels)
    assert first.things == again.things != other.things


def test_things_lie_on_the_canvas_apart_and_in_reading_order() -> None:
    for seed in range(200):
        things = draw_scene(seed).things
        assert 2 <= len(things) <= 5
        patches = [thing.patch for thing in things]
        assert patches == sorted(set(patches))  # no two centres in one patch: they can be counted there
        for index, thing in enumerate(things):
            left, top, right, bottom = thing.box
            assert 0 <= left < right <= CANVAS and 0 <= top < bottom <= CANVAS
            for other in things[:index]:
                apart_across = max(left - other.box[2], other.box[0] - right)
                assert max(apart_across, top - other.box[3], other.box[1] - bottom) >= GAP


def test_a_shape_has_its_colour_at_its_centre() -> None:
    seen = Counter()
    for seed in range(200):
        scene = draw_scene(seed)
        for thing in scene.things:
            if thing.colour:
                x, y = (int(coordinate) for coordinate in thing.centre)
                difference = scene.pixels[y, x].astype(float) - COLOURS[thing.colour]
                assert np.abs(difference).max() <= 16
                seen[thing.name] += 1
    assert set(seen) == set(NAMES) - set(EMOJI)


def test_every_emoji_is_a_concept_and_names_are_unambiguous() -> None:
    assert set(EMOJI) <= set(concepts())
    assert len(set(NAMES)) == len(NAMES) == len(FREQUENCIES)
    assert sum(FREQUENCIES) == pytest.approx(1)
    assert set(PLURALS) <= set(EMOJI)


def test_corners_are_named_only_where_they_are_clear() -> None:
    assert made(("red circle", 0, 0)).things[0].corner == "top left"
    assert made(("red circle", 70, 5)).things[0].corner == "top right"
    assert made(("red circle", 5, 70)).things[0].corner == "bottom left"
    assert made(("red circle", 38, 70)).things[0].corner is None


def test_captions_are_sentences() -> None:
    assert caption(["red circle"]) == "A red circle."
    assert caption(["octopus", "cat face"]) == "An octopus and a cat face."
    assert caption(["red circle", "cat face", "blue star"]) == "A red circle, a cat face and a blue star."
    assert plural("strawberry") == "strawberries" and plural("red circle") == "red circles"


def test_absent_names_are_absent_and_of_their_split() -> None:
    scene = made(("red circle", 0, 0), ("cat face", 40, 0))
    chance = np.random.default_rng(0)
    for split in PRESENCE_SPLITS:
        names = absent_names(scene, split, 3, chance)
        assert len(set(names)) == 3 and not {"red circle", "cat face"} & set(names)
    assert set(absent_names(scene, "popular", 99, chance)) <= set(NAMES[:POPULAR])
    hard = absent_names(scene, "adversarial", 99, chance)
    assert {"red square", "blue circle", "dog face"} <= set(hard)
    assert not {"blue square", "banana"} & set(hard)
    with pytest.raises(ValueError, match="adversarial"):
        absent_names(scene, "hard", 3, chance)


def test_similar_is_symmetric() -> None:
    assert all(name in similar_names(other) for name in NAMES for other in similar_names(name))


def test_presence_answers_agree_with_the_scene_and_are_balanced() -> None:
    answers = Counter()
    for seed in range(200):
        scene = draw_scene(seed)
        names = {thing.name for thing in scene.things}
        for question in training_questions(scene, np.random.default_rng(seed)):
            if question.kind == "presence":
                asked = next(name for name in NAMES if f" {name} in" in question.text)
                assert (asked in names) == (question.answer == "Yes") == (question.split is None)
                answers[question.answer] += 1
    assert answers["Yes"] == answers["No"] > 400


def test_each_split_has_as_many_absent_as_present_things() -> None:
    scene = made(("red circle", 0, 0), ("cat face", 40, 0), ("cat face", 70, 0))
    splits = Counter(
        question.split for question in presence_questions(scene, np.random.default_rng(0), PRESENCE_SPLITS)
    )
    assert splits == {None: 2, "random": 2, "popular": 2, "adversarial": 2}


def test_other_questions_are_asked_only_where_they_have_one_answer() -> None:
    scene = made(("red circle", 0, 0), ("blue circle", 70, 0), ("cat face", 0, 70), ("cat face", 70, 70))
    for seed in range(20):
        questions = {question.kind: question for question in other_questions(scene, np.random.default_rng(seed))}
        assert "colour" not in questions  # there are two circles
        assert questions["position"].text in ("Where is the red circle?", "Where is the blue circle?")
        if "things" in questions["count"].text:
            assert questions["count"].answer == "4"
        else:
            assert questions["count"].answer == ("2" if "cat faces" in questions["count"].text else "1")
    clear = made(("red circle", 0, 0), ("cat face", 70, 70))
    colour = next(q for q in other_questions(clear, np.random.default_rng(0)) if q.kind == "colour")
    assert (colour.text, colour.answer) == ("What colour is the circle?", "Red")


def test_every_answer_of_a_kind_occurs() -> None:
    answers = {
        (question.kind, question.answer)
        for seed in range(300)
        for question in other_questions(draw_scene(seed), np.random.default_rng(seed))
    }
    assert {answer for kind, answer in answers if kind == "count"} == {"1", "2", "3", "4", "5"}
    assert len({answer for kind, answer in answers if kind == "position"}) == 4
    assert len({answer for kind, answer in answers if kind == "colour"}) == len(COLOURS)
