"""Objectives: every statistic against a second formulation and by what it must do; combinations; names."""

from __future__ import annotations

import colorsys
import dataclasses
import math
import sys
from collections.abc import Sequence
from importlib.metadata import EntryPoint
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageStat

from steer import objectives
from steer.checkpoint import about
from steer.methods.pag import PAG
from steer.objectives import (
    STATISTICS,
    Aesthetic,
    CLIPScore,
    Gated,
    HarmonicMean,
    Negated,
    Objective,
    PickScore,
    Sum,
    brightness,
    colourfulness,
    contrast,
    names,
    objective,
    saturation,
    sharpness,
    warmth,
)

PROMPTS = ["a red fox", "two blue birds", "snow"]


def drawn(seed: int = 0, height: int = 10, width: int = 14) -> torch.Tensor:
    """Three pictures of 8-bit values, so that Pillow sees the same ones."""
    values = torch.randint(0, 256, (3, 3, height, width), generator=torch.Generator().manual_seed(seed))
    return values.float() / 255


def as_images(pictures: torch.Tensor) -> list[Image.Image]:
    return [Image.fromarray(p.mul(255).round().byte().permute(1, 2, 0).numpy()) for p in pictures]


def one_colour(*rgb: float) -> torch.Tensor:
    return torch.tensor(rgb).view(1, 3, 1, 1).expand(1, 3, 8, 8)


def laplacian_variance(picture: np.ndarray) -> float:
    """Pixel by pixel, in float64."""
    luma = 255 * (0.299 * picture[0] + 0.587 * picture[1] + 0.114 * picture[2])
    values = []
    for y in range(1, luma.shape[0] - 1):
        for x in range(1, luma.shape[1] - 1):
            around = luma[y - 1, x] + luma[y + 1, x] + luma[y, x - 1] + luma[y, x + 1]
            values.append(around - 4 * luma[y, x])
    return float(np.var(values))


def hasler_suesstrunk(picture: np.ndarray) -> float:
    red, green, blue = (255 * channel.ravel() for channel in picture)
    first, second = red - green, 0.5 * (red + green) - blue
    spread = math.sqrt(np.std(first) ** 2 + np.std(second) ** 2)
    return spread + 0.3 * math.sqrt(np.mean(first) ** 2 + np.mean(second) ** 2)


def hsv_saturation(picture: np.ndarray) -> float:
    pixels = picture.reshape(3, -1).T
    return float(np.mean([colorsys.rgb_to_hsv(*pixel)[1] for pixel in pixels]))


@pytest.mark.parametrize(
    "statistic, second",
    [(sharpness, laplacian_variance), (colourfulness, hasler_suesstrunk), (saturation, hsv_saturation)],
    ids=lambda each: each.__name__,
)
def test_a_statistic_is_its_formula_in_numpy(statistic: Objective, second: Any) -> None:
    pictures = drawn()
    pictures[0, :, :4] = 0.0  # black has no saturation to divide by
    wanted = torch.tensor([second(picture.double().numpy()) for picture in pictures])
    scores = statistic(pictures, PROMPTS)
    assert scores.shape == (3,) and scores.dtype == torch.float32
    assert torch.allclose(scores, wanted, rtol=1e-5)  # float32 against float64


def test_brightness_contrast_and_warmth_are_what_pillow_finds() -> None:
    """Pillow rounds luma to whole numbers, so it is off by half of 1/255 at most."""
    pictures = drawn()
    grey = [ImageStat.Stat(image.convert("L")) for image in as_images(pictures)]
    colour = [ImageStat.Stat(image).mean for image in as_images(pictures)]
    assert torch.allclose(brightness(pictures), torch.tensor([s.mean[0] for s in grey]) / 255, atol=0.5 / 255)
    assert torch.allclose(contrast(pictures), torch.tensor([s.stddev[0] for s in grey]) / 255, atol=0.5 / 255)
    assert torch.allclose(warmth(pictures), torch.tensor([(m[0] - m[2]) / 255 for m in colour]), atol=1e-6)


def test_blurring_lowers_sharpness_and_fading_lowers_contrast() -> None:
    pictures = drawn()
    blurred = F.avg_pool2d(pictures, 3, stride=1, padding=1)
    assert (sharpness(blurred) < sharpness(pictures)).all()
    faded = 0.5 + 0.5 * (pictures - 0.5)
    assert (contrast(faded) < contrast(pictures)).all() and (sharpness(faded) < sharpness(pictures)).all()
    checks = (torch.arange(8)[:, None] + torch.arange(8)) % 2
    assert torch.allclose(contrast(checks.float().expand(1, 3, 8, 8)), torch.tensor([0.5]))


def test_colours_of_one_kind_have_the_scores_they_must_have() -> None:
    red, grey, blue, white = (one_colour(*rgb) for rgb in ((1.0, 0, 0), (0.4, 0.4, 0.4), (0, 0, 1.0), (1.0, 1, 1)))
    assert warmth(red).item() == 1 and warmth(blue).item() == -1 and abs(warmth(grey).item()) < 1e-6
    assert saturation(red).item() == 1 and saturation(grey).item() == 0
    assert brightness(white).item() == pytest.approx(1) and brightness(blue).item() == pytest.approx(0.114)
    assert colourfulness(grey).item() == pytest.approx(0, abs=1e-4)
    assert colourfulness(red).item() == pytest.approx(0.3 * math.hypot(255, 127.5))
    assert sharpness(red).item() == pytest.approx(0, abs=1e-6) and contrast(red).item() == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("statistic", STATISTICS.values(), ids=STATISTICS)
def test_a_clip_has_the_mean_of_its_frames(statistic: Objective) -> None:
    clips = torch.stack([drawn(seed) for seed in range(4)], dim=1)  # (3, 4, 3, H, W)
    wanted = torch.stack([statistic(clips[:, t], PROMPTS) for t in range(4)]).mean(0)
    assert torch.allclose(statistic(clips, PROMPTS), wanted, rtol=1e-6, atol=1e-7)  # warmth is a small difference
    assert torch.equal(statistic(drawn().half(), PROMPTS), statistic(drawn().half().float(), PROMPTS))


def test_what_is_no_picture_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got \(2, 1, 8, 8\)"):
        brightness(torch.rand(2, 1, 8, 8))
    with pytest.raises(ValueError, match=r"got list.*function of your own"):
        warmth([torch.rand(3, 8, 8)])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="3 x 3 pixels at least"):
        sharpness(torch.rand(1, 3, 2, 8))


def listed(pictures: Any, prompts: Sequence[Any]) -> list[float]:
    """A user's objective: a list, from the prompts alone."""
    return [float(len(prompt)) - 6 for prompt in prompts]  # 3, 8, -2


def given(pictures: Any, prompts: Sequence[Any]) -> list[int]:
    return [6, 8, 4]


def test_combinations_compute_what_they_say() -> None:
    pictures = drawn()
    light = brightness(pictures)
    assert torch.equal(Negated(brightness)(pictures, PROMPTS), -light)
    summed = Sum(Sum(brightness, listed, weight=0.5), Negated(listed), weight=2.0)(pictures, PROMPTS)
    assert torch.equal(summed, light + 0.5 * torch.tensor([3.0, 8.0, -2.0]) + 2.0 * -torch.tensor([3.0, 8.0, -2.0]))
    for mean in (HarmonicMean(listed, given), HarmonicMean(given, listed)):
        assert torch.equal(mean(pictures, PROMPTS), torch.tensor([4.0, 8.0, 0.0]))
    gated = Gated(Gated(brightness, listed, at_least=-2.0), listed, at_least=8.0)(pictures, PROMPTS)
    assert torch.equal(gated, torch.stack([torch.tensor(0.0), light[1], torch.tensor(0.0)]))


@pytest.mark.parametrize("wrong", [[1.0, math.nan, 2.0], [1.0, 2.0]])
def test_a_combination_does_not_hide_scores_that_are_none(wrong: list[float]) -> None:
    for combined in (Gated(brightness, lambda _, __: wrong, 5.0), HarmonicMean(lambda _, __: wrong, brightness)):
        with pytest.raises(ValueError, match="a finite score for each of 3"):
            combined(drawn(), PROMPTS)


def test_a_combination_reads_the_same_in_every_process_and_a_checkpoint_tells_them_apart() -> None:
    gated = Gated(Gated(CLIPScore(), PickScore(), at_least=20.0), Negated(sharpness), at_least=-3.0)
    assert "0x" not in repr(gated) and "gate=Negated(objective=sharpness), at_least=-3.0)" in repr(gated)
    assert gated == dataclasses.replace(gated) and hash(gated) == hash(dataclasses.replace(gated))
    other = dataclasses.replace(gated, at_least=-4.0)
    shown = [about(PAG(), {}, [], 0, {"objective": each})["options"]["objective"] for each in (gated, other)]
    assert shown[0] != shown[1] and "0x" not in shown[0]
    assert "PickScore_v1" in shown[0] and "sharpness" in shown[0]


def test_names_find_the_objectives() -> None:
    assert objective("sharpness") is sharpness
    assert objective("-brightness") == Negated(brightness)
    assert objective("--brightness") == Negated(Negated(brightness))
    assert objective("clip") == CLIPScore()
    assert objective("clip:some/where") == CLIPScore(model="some/where")
    assert objective("-pickscore:folder") == Negated(PickScore(model="folder", processor=None))
    assert objective("aesthetic:head.pth") == Aesthetic(head="head.pth")
    listed_names = names()
    assert list(listed_names)[:2] == ["sharpness", "contrast"]
    assert {"clip[:MODEL]", "pickscore[:MODEL]", "hps[:MODEL]", "aesthetic[:HEAD]"} <= set(listed_names)
    assert all(line.endswith(".") or line for line in listed_names.values())


@pytest.mark.parametrize("text", ["sharpnes", "", "-", "nowhere", "sharpness:3"])
def test_an_unknown_name_lists_what_exists(text: str) -> None:
    with pytest.raises(ValueError, match=r"there is no objective.*there are sharpness, .*clip\[:MODEL\].*FILE.py"):
        objective(text)


OWN = '''
from __future__ import annotations
from dataclasses import dataclass

def redness(pictures, prompts):
    """Red."""
    return pictures[:, 0].mean((1, 2))

@dataclass
class Power:
    power: int = 2
    def __call__(self, pictures, prompts):
        return redness(pictures, prompts) ** self.power

squared = Power()
one_argument = lambda pictures: 0
'''


def test_a_function_of_the_users_is_found_in_a_file_and_in_a_module(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "my_taste.py"
    file.write_text(OWN)
    pictures = drawn()
    assert torch.equal(objective(f"{file}:redness")(pictures, PROMPTS), pictures[:, 0].mean((1, 2)))
    assert torch.equal(objective(f"-{file}:squared")(pictures, PROMPTS), -(pictures[:, 0].mean((1, 2)) ** 2))
    monkeypatch.syspath_prepend(tmp_path)
    assert objective("my_taste:redness").__module__ == "my_taste"
    for text, error, message in (
        (f"{file}:blueness", ValueError, "no function 'blueness'; it has redness"),
        (f"{file}:one_argument", TypeError, r"must take \(pictures, prompts\)"),
        (f"{tmp_path / 'other.py'}:redness", ValueError, "there is no file"),
        ("my_tase:redness", ValueError, "No module named 'my_tase'.*there are sharpness"),
        (":redness", ValueError, "there is no objective"),
    ):
        with pytest.raises(error, match=message):
            objective(text)
    monkeypatch.delitem(sys.modules, "my_taste")
    monkeypatch.delitem(sys.modules, "steer_objective_my_taste")


def test_a_file_that_fails_leaves_no_module(tmp_path: Path) -> None:
    file = tmp_path / "broken.py"
    file.write_text("1 / 0")
    with pytest.raises(ZeroDivisionError):
        objective(f"{file}:anything")
    assert "steer_objective_broken" not in sys.modules


def plain_factory(*, seed: int = 0) -> Objective:
    """Brightness, under a name of a package."""
    return brightness


@dataclasses.dataclass
class Named:
    """Scores a word."""

    word: str = "snow"
    seed: int = dataclasses.field(default=0, kw_only=True)

    def __call__(self, pictures: Any, prompts: Sequence[Any]) -> list[float]:
        return [float(self.word in prompt) for prompt in prompts]


def needs(word: str, *, seed: int = 0) -> Named:
    """Scores a word."""
    return Named(word, seed=seed)


def test_packages_bring_objectives_through_entry_points(monkeypatch: pytest.MonkeyPatch) -> None:
    installed = [
        EntryPoint("taste-plain", f"{__name__}:plain_factory", "steer.objectives"),
        EntryPoint("taste-of", f"{__name__}:Named", "steer.objectives"),
        EntryPoint("taste-needs", f"{__name__}:needs", "steer.objectives"),
    ]
    monkeypatch.setattr(objectives, "entry_points", lambda group: [e for e in installed if e.group == group])
    assert objective("taste-plain") is brightness
    assert objective("-taste-of:red fox")(drawn(), PROMPTS).tolist() == [-1, 0, 0]
    assert names()["taste-plain"] == "Brightness, under a name of a package."
    assert names()["taste-needs:WORD"] == names()["taste-of[:WORD]"] == "Scores a word."
    assert objective("taste-of") == Named("snow")
    with pytest.raises(ValueError, match="'taste-needs' is written as taste-needs:WORD"):
        objective("taste-needs")
    with pytest.raises(ValueError, match="'taste-plain:x' is written as taste-plain"):
        objective("taste-plain:x")
