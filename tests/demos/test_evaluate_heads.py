"""`steer eval heads`: its objectives against plain loops, what is held out, paired figures, resuming, the command."""

from __future__ import annotations

import itertools
import json
import math
import tomllib
from collections.abc import Iterator
from dataclasses import replace
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from PIL import Image
from torch import Tensor
from typer.testing import CliRunner

import steer
from steer.plan import Plan
from steer_demos import evaluate_heads, models
from steer_demos import judge as judging
from steer_demos.emoji import BACKGROUNDS, STYLES, caption, concepts
from steer_demos.evaluate import app
from steer_demos.evaluate_heads import (
    CHOSEN,
    DRAWS,
    FOUND,
    MEASURES,
    NONE,
    RANDOM,
    SCALE,
    SEARCH_SEED,
    STYLE,
    WORST,
    Condition,
    Measured,
    compare,
    conditions,
    contact_sheet,
    draw,
    figures,
    gain,
    mean_of,
    measure,
    real,
    studies,
    worst,
)
from steer_demos.judge import Judge
from steer_demos.objectives import Concept, Style, asked, judge

SITES = tuple(f"transformer_blocks.{layer}.attn" for layer in range(6))


@pytest.fixture(scope="module", autouse=True)
def coarse_emoji(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Emoji as random tiles of 16 pixels, and judges that were trained on them for two steps."""
    tiles = np.random.default_rng(0).integers(256, size=(len(concepts()), len(STYLES), 4, 4, 4), dtype=np.uint8)
    renders = tiles.repeat(16, axis=2).repeat(16, axis=3)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("STEER_CACHE", str(tmp_path_factory.mktemp("cache")))
        patch.setattr(judging, "render_all", lambda: renders)
        patch.setattr(judging, "STEPS", 2)
        judging._renders.cache_clear()
        judge.cache_clear()
        yield
    judging._renders.cache_clear()
    judge.cache_clear()


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    return models.load("emoji-mmdit", device="cpu")


def pictures(count: int = 5) -> Tensor:
    return torch.rand(count, 3, 64, 64, generator=torch.Generator().manual_seed(1))


def hunter() -> steer.PAG:
    """PAG with heads as a search leaves them: a table of gains whose lowest values tie."""
    gains = torch.arange(36, dtype=torch.float64).view(1, 6, 6)
    gains[0, 2, 1] = gains[0, 4, 5] = gains[0, 1, 3] = -1.0
    gains[0, 0, 0] = math.nan
    method = steer.PAG(scale=SCALE, mode="all", strength=0.5, heads={SITES[5]: [3, 4, 5]})
    method.__dict__["_record"] = Plan(sites=SITES, heads=6, tensors={"gain_1": gains})
    return method


def test_asked_is_the_inverse_of_caption() -> None:
    for concept in concepts():
        for style in (None, *STYLES):
            for background in (None, *BACKGROUNDS):
                for article in (False, True):
                    found = asked(caption(concept, style, background, article))
                    assert (found.concept, found.style, found.background) == (concept, style, background)


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("a fox in the snow", "names none of the 84 concepts"),
        (None, "names none of the 84 concepts"),
        ("a red apple, cubist style", "'cubist'; choose from noto, fluent, twemoji"),
        ("a red apple on a black background", "'black'; choose from white"),
    ],
)
def test_a_prompt_that_is_no_caption_is_refused(prompt: str | None, told: str) -> None:
    with pytest.raises(ValueError, match=told):
        asked(prompt)


def test_concept_is_the_log_probability_of_the_asked_concept_alone() -> None:
    shown, names = pictures(), ["red apple", "owl", "rocket", "red apple", "robot"]
    scores = Concept()(shown, [caption(name, "noto") for name in names])
    assert not scores.requires_grad
    for picture, name, score in zip(shown, names, scores, strict=True):
        logits = judge(0).classifier(picture[None] * 2 - 1)[0].double()
        plain = logits[list(concepts()).index(name)] - logits.exp().sum().log()
        assert score.item() == pytest.approx(plain.item(), abs=1e-5)


def test_style_is_the_margin_between_the_nearest_renders_of_that_concept() -> None:
    shown, names = pictures(4), ["red apple", "owl", "rocket", "robot"]
    for style in STYLES:
        scores = Style(style)(shown, names)
        for picture, name, score in zip(shown, names, scores, strict=True):
            features = judge(0).embed(picture[None] * 2 - 1)
            nearest = {}
            for index, other in enumerate(STYLES):
                index_of = torch.tensor([list(concepts()).index(name)])
                renders = [judge(0).render(index_of, torch.tensor([index]), colour) for colour in judge(0).colours]
                nearest[other] = min((judge(0).embed(render) - features).norm().item() for render in renders)
            own = nearest.pop(style)
            assert score.item() == pytest.approx(min(nearest.values()) - own, abs=1e-5)


def test_a_render_of_a_style_has_a_positive_margin_for_it_and_a_negative_one_for_the_others() -> None:
    prompts = [p for p in studies(20)[1].prompts if p.style == STYLE]
    shown = (real(judge(0), prompts) + 1) / 2
    texts = [prompt.text for prompt in prompts]
    for style in STYLES:
        scores = Style(style)(shown, texts)
        assert bool((scores > 0).all() if style == STYLE else (scores < 0).all())


def test_what_the_objectives_cannot_judge_is_refused() -> None:
    with pytest.raises(ValueError, match="no style 'cubist'; choose from noto, fluent, twemoji"):
        Style("cubist")
    with pytest.raises(ValueError, match=r"\(1, 3, 32, 32\).*judges \(N, 3, 64, 64\)"):
        Concept()(torch.rand(1, 3, 32, 32), ["owl"])


def test_the_objectives_are_registered_by_name() -> None:
    project = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"]
    made = {}
    for name, place in project["entry-points"]["steer.objectives"].items():
        module, attribute = place.split(":")
        made[name] = getattr(import_module(module), attribute)
    assert made["emoji-concept"]() == Concept() and made["emoji-style"]("noto") == Style("noto")


def test_the_seed_decides_the_judge_which_is_trained_once(monkeypatch: pytest.MonkeyPatch) -> None:
    def weights(of: Judge) -> Tensor:
        return torch.cat([parameter.detach().flatten() for parameter in of.classifier.parameters()])

    first, second = weights(judge(0)), weights(judge(1))
    assert not torch.equal(first, second)
    monkeypatch.delattr(judging, "train_classifier")
    assert torch.equal(weights(Judge.load()), first) and torch.equal(weights(Judge.load(1)), second)


def test_what_is_held_out_occurs_in_no_search() -> None:
    assert studies() == studies()
    quality, style, stepwise, varied = studies()
    assert len(quality.data) == 20 and style.data == quality.data[:8]
    assert len(quality.prompts) == len(style.prompts) == 100
    assert all(prompt.style is None and prompt.background is None for prompt in map(asked, quality.data))
    searched = {asked(text).concept for text in quality.data}
    assert not searched & {prompt.concept for prompt in quality.prompts + style.prompts}
    assert all(asked(prompt.text).style is None and prompt.style == STYLE for prompt in style.prompts)
    assert all(asked(prompt.text) == prompt for prompt in quality.prompts)
    assert stepwise.data == quality.data * 2 and stepwise.prompts == quality.prompts
    assert len(varied.data) == 40 and not {asked(text).concept for text in varied.data} - searched
    assert {asked(text).style for text in varied.data} == {None, *STYLES} and varied.prompts == quality.prompts
    for study in (quality, style, stepwise, varied):
        assert study.rounds * study.top == CHOSEN
    spans = [(SEARCH_SEED, len(stepwise.data)), *((s.first_seed, len(s.prompts)) for s in (quality, stepwise, varied))]
    assert all(first + size <= later for (first, size), (later, _) in itertools.pairwise(spans))


def test_every_choice_of_heads_is_of_one_size_and_no_condition_is_drawn_twice() -> None:
    found = {FOUND: hunter(), "PAG by layer": steer.PAG(scale=SCALE), "SoftPAG by layer": steer.PAG(scale=SCALE)}
    heads = [(site, head) for site in SITES for head in range(6)]
    ways = conditions(found, heads)
    assert ways == conditions(found, heads)
    assert len({way.name for way in ways}) == len(ways)
    for way in ways:
        scale = float(way.name.split("w = ")[1]) if "w = " in way.name else SCALE
        assert way.method is None or way.method.scale == scale  # type: ignore[attr-defined]
        if way.method is not None and way.method.heads is not None:
            assert sum(map(len, way.method.heads.values())) == CHOSEN  # type: ignore[union-attr,arg-type]
    draws = {json.dumps(way.method.heads) for way in ways if way.method and way.name.startswith(RANDOM)}
    assert len(draws) == DRAWS
    assert worst(hunter()) == [(SITES[1], 3), (SITES[2], 1), (SITES[4], 5)]
    assert next(way for way in ways if way.name == WORST).method.heads == {  # type: ignore[union-attr]
        SITES[1]: [3],
        SITES[2]: [1],
        SITES[4]: [5],
    }


def measured(seed: int, count: int = 12) -> Measured:
    chance = np.random.default_rng(seed)
    values = {name: torch.from_numpy(chance.normal(size=count)) for name in MEASURES}
    values["right style"][: count // 2] = math.nan
    return Measured(values, float(chance.random()), chance.normal(size=100))


def test_figures_are_means_over_the_prompts_that_ask_and_differences_are_paired() -> None:
    one, other = measured(0), measured(1)
    for less in (None, other):
        row = figures(one, less)
        for name in MEASURES:
            values = one.values[name] - (less.values[name] if less else 0)
            asks = values[6:] if name == "right style" else values
            assert row[name]["mean"] == pytest.approx(float(asks.mean()))
            assert row[name]["low"] < row[name]["mean"] < row[name]["high"]
    same = figures(one, one)
    assert all(figure == {"mean": 0.0, "low": 0.0, "high": 0.0} for figure in same.values())
    distance = figures(one, other)["Frechet distance"]
    assert distance["mean"] == pytest.approx(one.frechet - other.frechet)
    assert distance["high"] - distance["mean"] == pytest.approx(1.96 * np.std(one.resampled - other.resampled))


def test_several_draws_count_as_their_mean() -> None:
    parts = [measured(seed) for seed in range(3)]
    mean = mean_of(parts)
    for name in MEASURES:
        torch.testing.assert_close(mean.values[name], sum(p.values[name] for p in parts) / 3, equal_nan=True)
    assert mean.frechet == pytest.approx(sum(part.frechet for part in parts) / 3)
    np.testing.assert_allclose(mean.resampled, sum(part.resampled for part in parts) / 3)


def test_real_renders_are_right_and_their_style_is_told_where_it_is_asked() -> None:
    prompts = studies(30)[0].prompts
    shown = real(judge(0), prompts)
    one = measure(judge(0), shown, prompts)
    assert bool((one.values["right concept"] == 1).all())
    named = torch.tensor([prompt.style is not None for prompt in prompts])
    assert torch.equal(one.values["right style"].isnan(), ~named)
    assert torch.equal(one.values["style margin"].isnan(), ~named)
    assert bool((one.values["right style"][named] == 1).all()) and bool((one.values["style margin"][named] > 0).all())
    # the same pictures for the prompts of others are nearly all wrong
    other = measure(judge(0), shown.roll(1, dims=0), prompts)
    assert other.values["right concept"].mean() < 0.2


def test_a_stopped_evaluation_draws_only_what_is_missing(
    pipe: StableDiffusion3Pipeline, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways, prompts = [Condition(NONE), Condition("heads", hunter())], ["an owl", "a red apple"]
    first = draw(pipe, prompts, 5, ways[:1], 1, tmp_path)
    both = draw(pipe, prompts, 5, ways, 1, tmp_path)
    assert torch.equal(first[NONE][0], both[NONE][0]) and not torch.equal(both[NONE][0], both["heads"][0])
    with monkeypatch.context() as patch:
        patch.delattr(evaluate_heads, "generate_pictures")
        again = draw(pipe, prompts, 5, ways, 1, tmp_path)
        assert torch.equal(again["heads"][0], both["heads"][0]) and again["heads"][1] == both["heads"][1]
        for other in (
            Condition("heads", replace(hunter(), scale=1.0)),
            Condition("heads", replace(hunter(), heads={SITES[0]: [1]})),
            Condition("heads", hunter(), 3.0),
        ):
            with pytest.raises(NameError):
                draw(pipe, prompts, 5, [other], 1, tmp_path)
        for texts, seed, steps in ((["an owl", "a robot"], 5, 1), (prompts, 6, 1), (prompts, 5, 2)):
            with pytest.raises(NameError):
                draw(pipe, texts, seed, ways, steps, tmp_path)


def test_gain_is_the_difference_that_the_objective_sees() -> None:
    chance = torch.Generator().manual_seed(0)
    drawn = {name: (torch.rand(4, 3, 8, 8, generator=chance) * 2 - 1, 0.0) for name in (NONE, "heads")}
    found = gain(lambda shown, prompts: shown.mean((1, 2, 3)), drawn, "heads", ["owl"] * 4)
    assert found["mean"] == pytest.approx(float((drawn["heads"][0] - drawn[NONE][0]).mean()) / 2, abs=1e-6)
    assert found["low"] < found["mean"] < found["high"]


def test_the_contact_sheet_has_a_row_for_each_prompt() -> None:
    prompts = studies(4)[0].prompts
    sheet = contact_sheet({"none": -torch.ones(4, 3, 64, 64), "random heads 1": torch.ones(4, 3, 64, 64)}, prompts)
    assert sheet.mode == "P" and sheet.size == (2 * 76, 40 + 4 * 88)
    assert sheet.convert("L").getpixel((38, 40 + 88 + 40)) == 0


def test_compare_names_conditions_that_exist() -> None:
    found = {FOUND: hunter(), "PAG by layer": steer.PAG(scale=SCALE), "SoftPAG by layer": steer.PAG(scale=SCALE)}
    names = [way.name for way in conditions(found, [(SITES[0], head) for head in range(6)])]
    means = [f"{RANDOM}, mean", f"{RANDOM}, mean, w = 1.5", f"{RANDOM}, mean, w = 6"]
    compared = compare({name: measured(index) for index, name in enumerate(names + means)})
    assert {pair["less"] for pair in compared} >= set(means)


@pytest.mark.slow
def test_the_command_searches_judges_writes_and_resumes(tmp_path: Path) -> None:
    arguments = ["heads", "--quick", "--folder", str(tmp_path)]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0 and "HeadHunter" in ran.output
    report = json.loads((tmp_path / "heads.json").read_text())
    for name, study in report["studies"].items():
        scales = 3 if name in ("quality", "style") else 1
        assert study["held_out"] == 4 and len(study["conditions"]) == 3 + 8 * scales
        assert study["search"][FOUND]["pictures drawn"] >= 37 * 2 and study["search"][FOUND]["seconds"] > 0
        with Image.open(tmp_path / name / "contact-sheet.png") as sheet:
            assert sheet.mode == "P"
        fitted = steer.load(tmp_path / name / "headhunter")
        assert sum(map(len, fitted.heads.values())) == CHOSEN  # type: ignore[union-attr,arg-type]
    with pytest.MonkeyPatch.context() as patch:
        patch.delattr(evaluate_heads, "generate_pictures")
        CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert json.loads((tmp_path / "heads.json").read_text()) == report


def documented_row(name: str, row: dict[str, Any]) -> str:
    """One row of the tables of docs/benchmarks.md."""
    values, less = row["figures"], row.get("difference from none", {})

    def percent(measure: str) -> str:
        return f"{100 * values[measure]['mean']:.0f} %" if measure in values else "–"

    def number(measure: str) -> str:
        shown = f"{values[measure]['mean']:.2f}"
        if measure not in less:
            return shown
        gain = less[measure]
        return f"{shown} ({gain['mean']:+.2f} [{gain['low']:+.2f}, {gain['high']:+.2f}])"

    cells = [percent("right concept"), number("log-probability"), percent("right style"), number("style margin")]
    return f"| {name} | {' | '.join([*cells, number('Frechet distance')])} |"


@pytest.mark.parametrize("study", ["quality", "style", "stepwise", "varied"])
def test_documented_figures_are_those_of_the_run(study: str) -> None:
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "benchmarks/heads-emoji.json").read_text(encoding="utf-8"))["studies"][study]
    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    rows = [documented_row(name, row) for name, row in found["conditions"].items() if ", w = " not in name]
    assert len(rows) == 11 and not [row for row in rows if row not in page]


def test_documented_gains_are_those_of_the_run() -> None:
    root = Path(__file__).resolve().parents[2]
    found = json.loads((root / "benchmarks/heads-emoji.json").read_text(encoding="utf-8"))["studies"]
    page = (root / "docs/benchmarks.md").read_text(encoding="utf-8")
    for study, name in {"quality": "quality, three heads at once"}.items() | {(s, s) for s in found if s != "quality"}:
        gains = found[study]["conditions"][FOUND]["objective"].values()
        shown = " | ".join("{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**each) for each in gains)
        assert f"| {name} | {shown} |" in page
    for study in ("quality", "stepwise", "varied"):
        pairs = {(pair["of"], pair["less"]): pair["figures"] for pair in found[study]["comparisons"]}
        less = pairs[FOUND, f"{RANDOM}, mean"]["log-probability"]
        assert "{mean:+.2f} [{low:+.2f}, {high:+.2f}]".format(**less) in page
