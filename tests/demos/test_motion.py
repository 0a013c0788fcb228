"""The judge of motion, on shapes whose motion is known; it needs neither npm nor a renderer."""

import random

import pytest
import torch
from PIL import Image

from steer_demos.clips import ANIMATIONS, CONCEPTS, MOTIONS, draw_poses, render_clips
from steer_demos.evaluate_video import (
    SUBJECTS,
    ClipPrompt,
    assess,
    contact_sheet,
    evaluation_prompts,
    real_clips,
)
from steer_demos.motion import ClipVerdict, Motion, background_colours, measure_motion


def letter() -> torch.Tensor:
    """A two-coloured L, which looks different from every side: (4, 64, 64) premultiplied RGBA."""
    drawing = torch.zeros(4, 64, 64)
    drawing[0, 8:56, 14:28] = drawing[3, 8:56, 14:28] = 1
    drawing[2, 42:56, 28:50] = drawing[3, 42:56, 28:50] = 1
    return drawing


def clips_of(motion: str, count: int = 12) -> torch.Tensor:
    generator = torch.Generator().manual_seed(1)
    poses = draw_poses(torch.full((count,), MOTIONS.index(motion)), generator)
    drawings = letter().expand(*poses.shape[:2], -1, -1, -1)
    return render_clips(drawings, poses, torch.rand(count, 3, generator=generator) * 0.3 + 0.7)


@pytest.mark.parametrize("noise", [0.0, 0.08])
@pytest.mark.parametrize("motion", MOTIONS)
def test_every_motion_is_recognised(motion: str, noise: float) -> None:
    clips = clips_of(motion)
    clips = clips + noise * torch.randn(clips.shape, generator=torch.Generator().manual_seed(2))
    assert (measure_motion(clips).verdict == MOTIONS.index(motion)).float().mean() > 0.95


def test_a_clip_played_backwards_moves_the_other_way() -> None:
    there, back = measure_motion(clips_of("moving up")), measure_motion(clips_of("moving up").flip(1))
    torch.testing.assert_close(there.travel, -back.travel, atol=1e-3, rtol=1e-3)
    assert {MOTIONS[index] for index in back.verdict} == {"moving down"}
    assert {MOTIONS[index] for index in measure_motion(clips_of("growing").flip(1)).verdict} == {"shrinking"}


def test_travel_growth_and_turn_are_in_their_units() -> None:
    poses = draw_poses(
        torch.tensor([MOTIONS.index(name) for name in ("moving right", "growing", "spinning")]), torch.Generator()
    )
    frames = render_clips(letter().expand(*poses.shape[:2], -1, -1, -1), poses, torch.ones(3, 3))
    motion, change = measure_motion(frames), poses[:, -1] - poses[:, 0]
    assert motion.travel[0, 0] == pytest.approx(change[0, 0].item(), rel=0.1)
    assert motion.growth[1] == pytest.approx(
        (poses[1, -1, 2] / poses[1, 0, 2]).log().item(), rel=0.25
    )  # a slope, not a quotient
    assert motion.turn[2] == pytest.approx(change[2, 3].item(), abs=45)


def test_the_background_is_the_colour_of_the_rim() -> None:
    frames = render_clips(
        letter().expand(1, 17, -1, -1, -1),
        draw_poses(torch.tensor([7]), torch.Generator()),
        torch.tensor([[0.2, 0.6, 1.0]]),
    )
    torch.testing.assert_close(background_colours(frames), torch.tensor([[-0.6, 0.2, 1.0]]))


def test_evaluation_prompts_are_fixed_and_even() -> None:
    state = random.getstate()
    prompts = evaluation_prompts()
    assert random.getstate() == state
    assert prompts == evaluation_prompts() and len(prompts) == 200
    assert {prompt.subject for prompt in prompts} == set(SUBJECTS)
    counts = {motion: sum(prompt.motion == motion for prompt in prompts) for motion in MOTIONS}
    assert set(counts.values()) == {20}
    assert all((prompt.motion is None) == (prompt.subject in ANIMATIONS) for prompt in prompts)


def verdict_on(prompts: list[ClipPrompt], motions: list[str]) -> ClipVerdict:
    """A verdict that sees the asked subjects and backgrounds, and the given motions."""
    count = len(prompts)
    motion = Motion(torch.zeros(count, 2), torch.zeros(count), torch.zeros(count), torch.zeros(count, dtype=torch.long))
    motion.verdict[:] = torch.tensor([MOTIONS.index(name) for name in motions])
    subjects = torch.tensor([SUBJECTS.index(prompt.subject) for prompt in prompts])[:, None].expand(-1, 17)
    features = torch.randn(count, 17, 48, generator=torch.Generator().manual_seed(0))
    return ClipVerdict(subjects, torch.zeros(count, dtype=torch.long), motion, features)


def test_shares_count_what_was_asked() -> None:
    prompts = [ClipPrompt("", CONCEPTS[0], MOTIONS[index % 2], "white") for index in range(8)]
    prompts += [ClipPrompt("", next(iter(ANIMATIONS)), None, None) for _ in range(2)]
    verdict = verdict_on(prompts, [MOTIONS[0]] * 10)
    result = assess(verdict, prompts, verdict.features)
    assert (result.accuracy, result.motion_accuracy, result.background_accuracy) == (1.0, 0.5, 1.0)
    assert result.motions[MOTIONS[0]] == 1 and result.motions[MOTIONS[1]] == 0
    assert result.motion_interval[0] < 0.5 < result.motion_interval[1]
    assert result.frechet == pytest.approx(0, abs=1e-6)


def test_the_sheet_is_an_animation_that_marks_failures(tmp_path) -> None:
    prompts = [ClipPrompt("", CONCEPTS[0], "growing", None), ClipPrompt("", CONCEPTS[1], "growing", None)]
    contact_sheet(
        torch.zeros(2, 17, 3, 64, 64), prompts, verdict_on(prompts, ["growing", "spinning"]), tmp_path / "a.gif"
    )
    with Image.open(tmp_path / "a.gif") as sheet:
        assert sheet.format == "GIF"
        pixels = sheet.convert("RGB")
    assert min(pixels.getpixel((8, 8))) > 240
    red, green, _ = pixels.getpixel((84 + 8, 8))
    assert red > 200 and green < 60


@pytest.mark.slow
def test_real_clips_are_judged_right() -> None:
    pytest.importorskip("resvg_py")
    prompts = [prompt for prompt in evaluation_prompts() if prompt.motion][:80]
    found = measure_motion(real_clips(prompts, seed=3).frames).verdict
    assert sum(MOTIONS[index] == prompt.motion for index, prompt in zip(found, prompts, strict=True)) >= 0.95 * 80
