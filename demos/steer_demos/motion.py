"""The judges of clips: motion is measured, what is seen is told by a small classifier of single frames.

Neither shares anything with the generator.
"""

import hashlib
import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from steer_demos.cache import cache_dir
from steer_demos.clips import ANIMATIONS, CONCEPTS, FRAMES, MOTIONS, animations, draw_poses, render_clips, sprites
from steer_demos.emoji import BACKGROUNDS
from steer_demos.judge import FEATURES, Classifier, train_classifier

RIM = 3
FAINT, CLEAR = 0.15, 0.4  # distance of a colour from the background's, where foreground begins and where it is certain
LEAST_TRAVEL = 9.0  # pixels over the whole clip; the slowest clips of the data go 18
LEAST_GROWTH = 0.3  # logarithm of the size's ratio over the whole clip; the slightest of the data is 0.55
LEAST_TURN = 110.0  # degrees over the whole clip; the slowest of the data turn 240
ANGLES = 72
RADII = 14
LARGEST_STEP = 60.0  # degrees between the frames that are compared

STEPS = 1500
RECIPE = 1  # part of the cache file's name: raise it when anything here changes the classifier


@dataclass(frozen=True)
class Motion:
    """What moves in clips, from the first frame to the last.

    Args:
        travel: (N, 2) pixels to the right and down.
        growth: (N,) logarithm of the ratio of sizes.
        turn: (N,) degrees clockwise.
        verdict: (N,) indices into `MOTIONS`.
    """

    travel: Tensor
    growth: Tensor
    turn: Tensor
    verdict: Tensor


def background_colours(frames: Tensor) -> Tensor:
    """The median colour of the rim: (N, T, 3, H, W) -> (N, 3)."""
    rim = torch.ones(frames.shape[-2:], dtype=torch.bool, device=frames.device)
    rim[RIM:-RIM, RIM:-RIM] = False
    return frames[..., rim].movedim(2, 1).flatten(2).median(dim=-1).values


def measure_motion(frames: Tensor) -> Motion:
    """Measure and name the motion in clips (N, T, 3, 64, 64) in [-1, 1].

    Travel and growth are slopes, over time, of the centroid and the area of whatever differs from the background. Turn
    goes by the rotations, about the centroids, that best register each frame with the one after the next.
    """
    height, width = frames.shape[-2:]
    foreground = frames - background_colours(frames)[:, None, :, None, None]
    smooth = F.avg_pool2d(foreground.flatten(0, 1), 3, 1, padding=1).unflatten(0, frames.shape[:2])  # less noise
    weights = ((smooth.norm(dim=2) - FAINT) / (CLEAR - FAINT)).clamp(0, 1)
    area = weights.sum(dim=(-1, -2)).clamp(min=1)
    x = torch.arange(width, device=frames.device) + 0.5
    y = torch.arange(height, device=frames.device) + 0.5
    centroids = torch.stack([(weights.sum(-2) * x).sum(-1) / area, (weights.sum(-1) * y).sum(-1) / area], dim=-1)
    travel = _change(centroids)
    growth = _change(area.log()[..., None])[:, 0] / 2
    turn = _turn(foreground * weights[:, :, None], centroids)

    strengths = torch.stack(
        [travel.abs().amax(-1) / LEAST_TRAVEL, growth.abs() / LEAST_GROWTH, turn.abs() / LEAST_TURN], dim=-1
    )
    strongest = strengths.argmax(dim=-1)
    across = travel[:, 0].abs() >= travel[:, 1].abs()
    sideways = torch.where(travel[:, 0] < 0, MOTIONS.index("moving left"), MOTIONS.index("moving right"))
    upright = torch.where(travel[:, 1] < 0, MOTIONS.index("moving up"), MOTIONS.index("moving down"))
    resized = torch.where(growth > 0, MOTIONS.index("growing"), MOTIONS.index("shrinking"))
    spinning = torch.full_like(strongest, MOTIONS.index("spinning"))
    named = torch.stack([torch.where(across, sideways, upright), resized, spinning], dim=-1)
    verdict = named.gather(-1, strongest[:, None])[:, 0]
    verdict = verdict.masked_fill(strengths.amax(-1) < 1, MOTIONS.index("standing still"))
    return Motion(travel, growth, turn, verdict)


def _change(values: Tensor) -> Tensor:
    """(N, T, C) -> (N, C): the change over the whole clip along the line of least squares."""
    time = torch.linspace(-0.5, 0.5, values.shape[1], device=values.device)
    return torch.einsum("ntc,t->nc", values, time / time.square().sum())


def _turn(foreground: Tensor, centroids: Tensor) -> Tensor:
    """Frames (N, T, 3, H, W) about centroids (N, T, 2) -> clockwise degrees (N,)."""
    batch, count, _, height, width = foreground.shape
    angles = torch.arange(ANGLES, device=foreground.device) * (2 * math.pi / ANGLES)
    radii = torch.linspace(3, 20, RADII, device=foreground.device)
    ring = radii[:, None, None] * torch.stack([angles.cos(), angles.sin()], dim=-1)  # (R, A, 2); y down: clockwise
    extent = torch.tensor([width, height], device=foreground.device)
    grid = (ring + centroids.flatten(0, 1)[:, None, None]) * 2 / extent - 1
    polar = F.grid_sample(foreground.flatten(0, 1), grid, align_corners=False)
    # Only what varies along a ring tells an angle; outer rings are longer.
    polar = (polar - polar.mean(-1, keepdim=True)) * radii[:, None].sqrt()
    spectrum = torch.fft.rfft(polar).unflatten(0, (batch, count))
    correlation = torch.fft.irfft((spectrum[:, 2:] * spectrum[:, :-2].conj()).sum(dim=(2, 3)), n=ANGLES)
    degrees = torch.arange(ANGLES, device=foreground.device) * (360 / ANGLES)
    degrees = torch.where(degrees > 180, degrees - 360, degrees)
    correlation = correlation.masked_fill(degrees.abs() > LARGEST_STEP, -torch.inf)
    steps = degrees[correlation.argmax(dim=-1)]
    # The median: a single bad registration must not make a turn.
    return steps.median(dim=1).values * (count - 1) / 2


class FrameClassifier(Classifier):
    """The classifier of emoji pictures, for the subjects of clips: concepts, then animations."""

    def __init__(self) -> None:
        super().__init__()
        self.head = nn.Linear(FEATURES, len(CONCEPTS) + len(ANIMATIONS))


def augmented_frames(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Single frames (size, 3, 64, 64) in [-1, 1] over any colour, blurred or noised, and their subjects (size,)."""

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    subjects = torch.randint(len(CONCEPTS) + len(ANIMATIONS), (size,), generator=generator)
    motions = torch.randint(len(MOTIONS), (size,), generator=generator)
    times = torch.randint(FRAMES, (size,), generator=generator)
    motions = motions.masked_fill(subjects >= len(CONCEPTS), len(MOTIONS))
    stills = sprites()[subjects.clamp(max=len(CONCEPTS) - 1)]
    moving = animations()[(subjects - len(CONCEPTS)).clamp(min=0), times]
    drawings = torch.where((subjects < len(CONCEPTS))[:, None, None, None], stills, moving)
    poses = draw_poses(motions, generator)[torch.arange(size), times]
    pictures = render_clips(drawings[:, None], poses[:, None], uniform(0, 1, 3))[:, 0]
    blurred = F.avg_pool2d(pictures, 3, 1, padding=1, count_include_pad=False)
    pictures = pictures.lerp(blurred, uniform(0, 1, 1, 1, 1))
    return pictures + uniform(0, 0.16, 1, 1, 1) * torch.randn(pictures.shape, generator=generator), subjects


@dataclass(frozen=True)
class ClipVerdict:
    """What is seen in clips.

    Args:
        subjects: (N, T) indices of concepts, then animations, one a frame.
        backgrounds: (N,) indices into `BACKGROUNDS`.
        motion: see `Motion`.
        features: (N, T, 48).
    """

    subjects: Tensor
    backgrounds: Tensor
    motion: Motion
    features: Tensor


class ClipJudge:
    """Judges clips by the trained classifier and by measurement."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1

    @classmethod
    def load(cls) -> "ClipJudge":
        """The cached classifier, trained first if there is none."""
        data = hashlib.sha256(sprites().numpy().tobytes() + animations().numpy().tobytes()).hexdigest()[:12]
        path = cache_dir() / f"clip-classifier-{RECIPE}-{data}.pt"
        if path.exists():
            classifier: Classifier = FrameClassifier().eval()
            classifier.load_state_dict(torch.load(path, weights_only=True))
        else:
            label = "training the classifier of frames"
            classifier = train_classifier(FrameClassifier, augmented_frames, STEPS, label)
            torch.save(classifier.state_dict(), path)
        return cls(classifier)

    @torch.no_grad()
    def judge(self, frames: Tensor) -> ClipVerdict:
        """Judge clips (N, T, 3, 64, 64) in [-1, 1]."""
        features = torch.cat([self.classifier.embed(part) for part in frames.flatten(0, 1).split(256)])
        subjects = self.classifier.head(features).argmax(dim=-1)
        background = torch.cdist(background_colours(frames), self.colours).argmin(dim=1)
        shape = frames.shape[:2]
        return ClipVerdict(
            subjects.unflatten(0, shape), background, measure_motion(frames), features.unflatten(0, shape)
        )
