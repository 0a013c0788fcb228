"""What the clip data set promises: captions, poses and pixels. None of it needs npm or a renderer."""

import pytest
import torch

from steer_demos import clips
from steer_demos.clips import ANIMATIONS, CONCEPTS, FRAMES, MOTIONS, clip_caption, draw_poses, render_clips
from steer_demos.emoji import concepts


def square() -> torch.Tensor:
    """A red square in the middle of a transparent drawing, (4, 64, 64) premultiplied; 28 of the icon's 56 pixels."""
    drawing = torch.zeros(4, 64, 64)
    drawing[0, 18:46, 18:46] = drawing[3, 18:46, 18:46] = 1
    return drawing


def render(poses: list[list[float]], colour: tuple[float, float, float] = (1, 1, 1)) -> torch.Tensor:
    drawings = square().expand(1, len(poses), -1, -1, -1)
    return render_clips(drawings, torch.tensor(poses)[None], torch.tensor([colour]))[0]


def test_captions_say_what_is_asked() -> None:
    assert clip_caption("red apple", "moving left", "blue") == "a red apple moving left on a blue background"
    assert clip_caption("umbrella", "growing") == "an umbrella growing"
    assert clip_caption("bee", None, "pink") == "an animated bee on a pink background"


def test_every_concept_is_one_of_the_emoji_and_no_animation_shares_its_name() -> None:
    assert set(CONCEPTS) <= set(concepts())
    assert not set(CONCEPTS) & set(ANIMATIONS)


def test_a_sprite_is_drawn_where_its_pose_says() -> None:
    first, moved, small = render([[0, 0, 56, 0], [10, -6, 56, 0], [0, 0, 28, 0]])
    covered = first[1] < 0  # red over white: the green channel is dark
    assert covered[18:46, 18:46].all() and covered.sum() == 28 * 28
    assert torch.equal(moved[1, 12:40, 28:56] < 0, covered[18:46, 18:46])
    assert (small[1] < 0).sum() == 14 * 14
    assert torch.equal(first[:, 0, 0], torch.ones(3))


def test_a_turn_is_clockwise() -> None:
    drawing = torch.zeros(4, 64, 64)
    drawing[:, 10:20, 28:36] = 1  # above the middle
    turned = render_clips(drawing[None, None], torch.tensor([[[0.0, 0.0, 56.0, 90.0]]]), torch.zeros(1, 3))[0, 0]
    rows, columns = (turned[0] > 0).nonzero().float().mean(dim=0).tolist()
    assert rows == pytest.approx(31.5, abs=0.6) and columns > 45


@pytest.mark.parametrize("motion", MOTIONS)
def test_poses_do_what_the_motion_says_and_stay_inside(motion: str) -> None:
    asked = torch.full((200,), MOTIONS.index(motion))
    poses = draw_poses(asked, torch.Generator().manual_seed(0))
    assert poses.shape == (200, FRAMES, 4)
    x, y, size, turn = (poses[:, -1] - poses[:, 0]).unbind(-1)
    expected = {
        "moving left": (x < -17, y.abs() < 1e-4),
        "moving right": (x > 17, y.abs() < 1e-4),
        "moving up": (y < -17, x.abs() < 1e-4),
        "moving down": (y > 17, x.abs() < 1e-4),
        "growing": (size > 15, x.abs() < 1e-4),
        "shrinking": (size < -15, x.abs() < 1e-4),
        "spinning": (turn >= 240, x.abs() < 1e-4),
        "standing still": (poses == poses[:, :1],),
    }[motion]
    assert all(condition.all() for condition in expected)
    assert (size.abs() < 1e-4).all() or motion in ("growing", "shrinking")
    assert poses[..., :2].abs().max() <= clips.REACH + 1e-4


def test_animations_stay_upright_in_their_place() -> None:
    poses = draw_poses(torch.full((4,), len(MOTIONS)), torch.Generator().manual_seed(0))
    assert torch.equal(poses, poses[:, :1].expand_as(poses))


def test_the_same_seed_draws_the_same_clips(monkeypatch) -> None:
    monkeypatch.setattr(clips, "sprites", lambda: square().expand(len(CONCEPTS), -1, -1, -1))
    monkeypatch.setattr(clips, "animations", lambda: square().expand(len(ANIMATIONS), FRAMES, -1, -1, -1))
    first, second = (clips.draw_clips(12, torch.Generator().manual_seed(3)) for _ in range(2))
    assert torch.equal(first.frames, second.frames)
    assert first.frames.shape == (12, FRAMES, 3, 64, 64)
    assert ((first.motions == len(MOTIONS)) == (first.subjects >= len(CONCEPTS))).all()
    assert first.frames.abs().max() <= 1 + 1e-5
