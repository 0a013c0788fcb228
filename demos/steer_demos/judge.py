"""A small classifier of emoji pictures: the features in which generated pictures are compared with renders."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from steer_demos.cache import cache_dir
from steer_demos.emoji import BACKGROUNDS, STYLES, concepts, render_all

FEATURES = 48
STEPS = 1000
BATCH_SIZE = 48
RECIPE = 1  # part of the cache file's name: raise it when anything here changes the classifier


class Classifier(nn.Module):
    """Four strided convolutions and two linear layers; it shares nothing with the generator."""

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Sequential:
            convolution = nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False)
            return nn.Sequential(convolution, nn.BatchNorm2d(outputs), nn.ReLU())

        self.trunk = nn.Sequential(block(3, 24, 2), block(24, 48, 2), block(48, 96, 2), block(96, 96, 1))
        self.features = nn.Sequential(nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Linear(4 * 96, FEATURES), nn.Tanh())
        self.head = nn.Linear(FEATURES, len(concepts()))

    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] -> features (B, 48)."""
        return self.features(self.trunk(pictures))

    def forward(self, pictures: Tensor) -> Tensor:
        """Pictures (B, 3, 64, 64) in [-1, 1] -> concept logits (B, concepts)."""
        return self.head(self.embed(pictures))


def augmented(renders: Tensor, generator: torch.Generator) -> Tensor:
    """RGBA renders (B, 4, 64, 64) in [0, 1], moved, scaled, over any colour, blurred or noised -> (B, 3, 64, 64)."""
    size = len(renders)

    def uniform(low: float, high: float, *shape: int) -> Tensor:
        return low + (high - low) * torch.rand(size, *shape, generator=generator)

    alpha = renders[:, 3:]
    premultiplied = torch.cat([renders[:, :3] * alpha, alpha], dim=1)
    transform = torch.zeros(size, 2, 3)
    transform[:, 0, 0] = transform[:, 1, 1] = uniform(0.9, 1.2)
    transform[:, :, 2] = uniform(-0.12, 0.12, 2)
    grid = F.affine_grid(transform, list(renders.shape), align_corners=False)
    moved = F.grid_sample(premultiplied, grid, align_corners=False)
    pictures = moved[:, :3] + (1 - moved[:, 3:]) * uniform(0, 1, 3, 1, 1)
    blurred = F.avg_pool2d(pictures, 3, 1, padding=1, count_include_pad=False)
    pictures = pictures.lerp(blurred, uniform(0, 1, 1, 1, 1))
    pictures = pictures + uniform(0, 0.08, 1, 1, 1) * torch.randn(pictures.shape, generator=generator)
    return pictures * 2 - 1


def train_classifier(
    make: Callable[[], Classifier],
    draw: Callable[[int, torch.Generator], tuple[Tensor, Tensor]],
    steps: int,
    label: str,
    seed: int = 0,
) -> Classifier:
    """Train what `make` makes on batches of (pictures, classes) from `draw(size, generator)`; minutes on a CPU."""
    generator = torch.Generator().manual_seed(seed)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = make()
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3, weight_decay=0.01)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 3e-3, total_steps=steps)
    for _ in tqdm(range(steps), desc=label):
        pictures, classes = draw(BATCH_SIZE, generator)
        F.cross_entropy(model(pictures), classes, label_smoothing=0.05).backward()
        optimizer.step()
        schedule.step()
        optimizer.zero_grad(set_to_none=True)
    return model.eval()


def augmented_renders(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """Augmented renders (size, 3, 64, 64) in [-1, 1] and their concepts (size,)."""
    renders = _renders()
    concept = torch.randint(len(renders), (size,), generator=generator)
    style = torch.randint(len(STYLES), (size,), generator=generator)
    return augmented(renders[concept, style], generator), concept


@cache
def _renders() -> Tensor:
    return torch.from_numpy(render_all()).movedim(-1, 2).float() / 255


@dataclass(frozen=True)
class Verdict:
    """What the nearest render says about each picture: indices (B,) of concept, style and background."""

    concepts: Tensor
    styles: Tensor
    backgrounds: Tensor
    features: Tensor


class Judge:
    """The classifier and the features of every render on every named background, (C x S x B, 48)."""

    def __init__(self, classifier: Classifier) -> None:
        self.classifier = classifier
        self.renders = _renders()
        self.colours = torch.tensor(list(BACKGROUNDS.values())) / 127.5 - 1
        self.reference = torch.cat([self.embed(self.render(slice(None), slice(None), c)) for c in self.colours], dim=0)
        self.styles = self.renders.shape[1]

    @classmethod
    def load(cls, seed: int = 0) -> "Judge":
        """The cached classifier, trained first if there is none; another seed is another judge of the same pictures."""
        data = hashlib.sha256(render_all().tobytes()).hexdigest()[:12]
        path = cache_dir() / f"emoji-classifier-{RECIPE}-{data}{f'-seed{seed}' if seed else ''}.pt"
        if path.exists():
            classifier = Classifier().eval()
            classifier.load_state_dict(torch.load(path, weights_only=True))
        else:
            classifier = train_classifier(Classifier, augmented_renders, STEPS, "training the classifier", seed)
            torch.save(classifier.state_dict(), path)
        return cls(classifier)

    def render(self, concept: Tensor | slice, style: Tensor | slice, colour: Tensor) -> Tensor:
        """Real pictures (N, 3, 64, 64) in [-1, 1] of concept and style indices on colours (3,) or (N, 3) in [-1, 1]."""
        renders = self.renders[concept, style].reshape(-1, *self.renders.shape[2:])
        return (renders[:, :3] * 2 - 1) * renders[:, 3:] + colour.reshape(-1, 3, 1, 1) * (1 - renders[:, 3:])

    @torch.no_grad()
    def embed(self, pictures: Tensor) -> Tensor:
        """Pictures (N, 3, 64, 64) in [-1, 1] -> features (N, 48)."""
        return torch.cat([self.classifier.embed(part) for part in pictures.split(256)])

    def judge(self, pictures: Tensor) -> Verdict:
        """Nearest render (Euclidean, in feature space) for concept and style; mean colour of the rim for background."""
        features = self.embed(pictures)
        nearest = torch.cdist(features, self.reference).argmin(dim=1) % (len(self.renders) * self.styles)
        rim = torch.ones(pictures.shape[-2:], dtype=torch.bool)
        rim[3:-3, 3:-3] = False
        colour = pictures[:, :, rim].median(dim=-1).values
        background = torch.cdist(colour, self.colours).argmin(dim=1)
        return Verdict(nearest // self.styles, nearest % self.styles, background, features)
