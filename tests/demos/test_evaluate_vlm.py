"""`steer eval vlm`: every figure against a plain computation of the same, the controls, resuming, and the command."""

from __future__ import annotations

import json
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from test_scenes import plain_emoji  # noqa: F401  (autouse: scenes without a renderer)
from tiny_emoji_vlm import shapes, tiny_model, tiny_processor
from transformers import LlavaForConditionalGeneration, LlavaProcessor

import steer
from steer_demos import vlm_methods
from steer_demos.evaluate_vlm import NOISE, as_text, evaluate_command
from steer_demos.models import emoji_vlm, smollm2
from steer_demos.scenes import PRESENCE_SPLITS, Question
from steer_demos.vlm_measures import (
    CAPTIONS,
    DEVELOPMENT_SEED,
    PRESENCE,
    Asked,
    ask,
    by_scene,
    caption_row,
    evaluation_questions,
    evaluation_scenes,
    figures,
    of_split,
    presence,
    presence_row,
    ranking,
    surer_row,
    with_noise,
)
from steer_demos.vlm_methods import BASELINE, STRENGTHS, RandomHeads, Sitting, changed, compare, configurations, named

Tiny = tuple[LlavaForConditionalGeneration, LlavaProcessor]


@pytest.fixture(scope="module")
def tiny() -> Tiny:
    return tiny_model(), tiny_processor()


def answers(seed: int = 0, scenes: int = 12) -> list[Asked]:
    """Answers to presence questions, text and margin by chance."""
    chance = random.Random(seed)
    kinds = [("Yes", None)] * 3 + [("No", split) for split in PRESENCE_SPLITS for _ in range(3)]
    return [
        Asked(
            scene,
            Question("presence", f"{scene} {number}?", answer, split),
            chance.choice(["Yes", "No", "There is not."]),
            chance.gauss(0, 1),
        )
        for scene in range(scenes)
        for number, (answer, split) in enumerate(kinds)
    ]


def counted(part: list[Asked]) -> dict[str, float]:
    """POPE's figures, answer by answer."""
    true = [a for a in part if a.question.answer == "Yes"]
    false = [a for a in part if a.question.answer == "No"]
    said = [a for a in part if a.says_yes]
    recall, precision = (
        sum(a.says_yes for a in true) / len(true),
        sum(a.question.answer == "Yes" for a in said) / len(said),
    )
    return {
        "accuracy": sum(a.says_yes == (a.question.answer == "Yes") for a in part) / len(part),
        "balanced_accuracy": (recall + sum(not a.says_yes for a in false) / len(false)) / 2,
        "precision": precision,
        "recall": recall,
        "f1": 2 * precision * recall / max(precision + recall, 1e-9),
        "yes_ratio": len(said) / len(part),
    }


@pytest.mark.parametrize("split", [None, *PRESENCE_SPLITS])
def test_figures_of_presence_are_those_counted_one_by_one(split) -> None:
    part = of_split(answers(), split)
    assert len(part) == 12 * (12 if split is None else 6)
    found = figures(by_scene(part, presence_row), PRESENCE)
    assert {name: figure["mean"] for name, figure in found.items()} == pytest.approx(counted(part))
    assert presence(part)["f1"] == pytest.approx(counted(part)["f1"])


def test_intervals_resample_scenes_and_differences_do_so_in_pairs() -> None:
    one, other = (answers(seed, scenes=5) for seed in (0, 1))
    drawn = np.random.default_rng(0).integers(0, 5, (1000, 5))

    def values(given: list[Asked]) -> np.ndarray:
        groups = [[answer for answer in given if answer.scene == scene] for scene in range(5)]
        return np.array([counted([a for i in rows for a in groups[i]])["f1"] for rows in drawn])

    found = figures(by_scene(one, presence_row), PRESENCE)["f1"]
    assert found["interval"] == pytest.approx(np.percentile(values(one), [2.5, 97.5]).tolist())
    against = figures(by_scene(one, presence_row), PRESENCE, by_scene(other, presence_row))["f1"]
    assert against["mean"] == pytest.approx(counted(one)["f1"])
    assert against["difference"] == pytest.approx(counted(one)["f1"] - counted(other)["f1"])
    assert against["interval"] == pytest.approx(np.percentile(values(one) - values(other), [2.5, 97.5]).tolist())
    same = figures(by_scene(one, presence_row), PRESENCE, by_scene(one, presence_row))
    assert all(figure == {"mean": figure["mean"], "difference": 0, "interval": [0, 0]} for figure in same.values())


def test_log_probabilities_give_the_answer_where_their_sign_is() -> None:
    part = of_split(answers(), "popular")
    right = sum((a.margin > 0) == (a.question.answer == "Yes") for a in part) / len(part)
    assert PRESENCE["accuracy"](by_scene(part, surer_row).sum(0)) == pytest.approx(right)


def test_ranking_compares_within_scenes_and_ignores_how_readily_yes_is_said() -> None:
    part = answers()
    wins, pairs = 0.0, 0
    for one in part:
        for other in part:
            if one.scene == other.scene and (one.question.answer, other.question.answer) == ("Yes", "No"):
                wins, pairs = wins + (one.margin > other.margin), pairs + 1
    assert ranking(part).sum(0).tolist() == [wins, pairs]
    readier = [Asked(a.scene, a.question, "Yes", a.margin + 5) for a in part]
    assert np.array_equal(ranking(readier), ranking(part))
    ties = [Asked(a.scene, a.question, "Yes", 0.0) for a in part]
    assert ranking(ties).sum(0).tolist() == [pairs / 2, pairs]


def test_chair_counts_mentions_and_captions() -> None:
    scenes = [shapes("red circle", "blue star"), shapes("green square")]
    said = ["A red circle, a red circle and a purple banana.", "A green square."]
    told = [Asked(i, Question("caption", "Describe the image.", text), text, 0.0) for i, text in enumerate(said)]
    sums = by_scene(told, lambda answer: caption_row(answer, scenes[answer.scene]))
    means = {name: figure["mean"] for name, figure in figures(sums, CAPTIONS).items()}
    assert means == pytest.approx({"chair_i": 2 / 4, "chair_s": 1 / 2, "recall": 2 / 3, "exact": 1})


def test_noise_is_fixed_for_a_scene_and_as_strong_as_asked() -> None:
    scenes = [shapes("red circle"), shapes("blue star")]
    for scene in scenes:
        scene.pixels[:] = 128
    assert all(shown is scene.pixels for shown, scene in zip(with_noise(scenes, 0), scenes, strict=True))
    once, again = with_noise(scenes, 20), with_noise(scenes, 20)
    assert all(np.array_equal(one, other) for one, other in zip(once, again, strict=True))
    assert not np.array_equal(*once)
    assert once[0].dtype == np.uint8 and once[0].std() == pytest.approx(20, rel=0.02)


def test_the_noise_was_chosen_on_other_scenes() -> None:
    assert [scene.things for scene in evaluation_scenes(6)] != [
        scene.things for scene in evaluation_scenes(6, DEVELOPMENT_SEED)
    ]
    scene = evaluation_scenes(1)[0]
    assert evaluation_questions(scene, 3) == evaluation_questions(scene, 3) != evaluation_questions(scene, 4)


def inputs(processor: LlavaProcessor, texts: list[str], side: str = "left"):
    pictures = [Image.fromarray(with_noise([shapes("red circle")], 30, seed)[0]) for seed in range(len(texts))]
    processor.tokenizer.padding_side = side
    made = processor(
        images=pictures, text=[emoji_vlm.prompt(processor, t) for t in texts], padding=True, return_tensors="pt"
    )
    processor.tokenizer.padding_side = "left"
    return made


@pytest.mark.parametrize("side", ["left", "right"])
def test_random_heads_amplify_these_heads_at_the_last_token_alone(tiny, side) -> None:
    model, processor = tiny
    given = inputs(processor, ["Hi?", "What is there in the image?"], side)
    mask = given["attention_mask"]
    last = (torch.arange(mask.shape[1]) * mask).argmax(-1)
    method = RandomHeads(alpha=3.0, layers="model.language_model.layers.1.*")
    assert 1 <= int(method.share * 4) < 4
    seen = []

    def watch(_module, args) -> None:
        seen.append(args[0].unflatten(-1, (4, -1)))

    hook = model.model.language_model.layers[1].self_attn.o_proj.register_forward_pre_hook(watch)
    with torch.no_grad():
        plain = model(**given).logits
        with steer.apply(model, method):
            model(**given)
        assert torch.equal(model(**given).logits, plain)
    hook.remove()
    before, after, _ = seen
    for row, at in enumerate(last.tolist()):
        factor = (after[row, at] / before[row, at]).mean(-1)
        assert sorted(factor.round(decimals=4).tolist()) == [1, 1, 3, 3]
        others = torch.arange(mask.shape[1]) != at
        assert torch.equal(after[row, others], before[row, others])
    assert torch.equal(after[0, last[0]] == before[0, last[0]], after[1, last[1]] == before[1, last[1]])


def test_random_heads_leave_prompts_without_pictures_and_follow_their_seed(tiny) -> None:
    model, processor = tiny
    text = processor.tokenizer("<|im_start|>user\nHi", return_tensors="pt")
    given = inputs(processor, ["Hi?"])
    with torch.no_grad():
        plain, seen = model(**text).logits, model(**given).logits
        found = []
        for seed in (0, 0, 1):
            with steer.apply(model, RandomHeads(alpha=3.0, seed=seed)):
                assert torch.equal(model(**text).logits, plain)
                found.append(model(**given).logits)
        with steer.apply(model, RandomHeads(alpha=1.0)):
            assert torch.equal(model(**given).logits, seen)
    assert torch.equal(found[0], found[1]) and not torch.equal(found[0], found[2])
    assert not torch.equal(found[0], seen)


def test_random_heads_leave_a_row_without_a_picture(tiny) -> None:
    model, processor = tiny
    texts = [emoji_vlm.prompt(processor, "Hi?"), "<|im_start|>user\nHi?<|im_end|>\n<|im_start|>assistant\n"]
    given = processor(
        images=[Image.fromarray(shapes("red circle").pixels)], text=texts, padding=True, return_tensors="pt"
    )
    with torch.no_grad():
        plain = model(**given).logits
        with steer.apply(model, RandomHeads(alpha=3.0)):
            found = model(**given).logits
    assert torch.equal(found[1], plain[1]) and not torch.equal(found[0], plain[0])


def sitting() -> Sitting:
    whole = Sitting.of(2, [0.0, 40.0], blank=True)
    few = [pair for pair in whole.questions if pair[1].kind == "caption" or pair[1].split in (None, "random")]
    return Sitting(whole.scenes, few, whole.pictures)


def test_every_part_is_asked_of_the_steered_model_and_reported_against_the_baseline(tiny, tmp_path) -> None:
    model, processor = tiny
    here = sitting()
    methods = {BASELINE: None, "louder": RandomHeads(alpha=4.0), "neutral": RandomHeads(alpha=1.0)}
    found = compare(model, processor, methods, here, tmp_path / "x.part", {})
    assert {name: list(parts) for name, parts in found.items()} == {
        "clean": [BASELINE, "louder"],
        "noise 40": [BASELINE, "louder"],
        "blanked picture": [BASELINE],
    }
    plain = ask(model, processor, here.pictures["noise 40"], here.questions)
    again = {(a.scene, a.question): (a.said, a.margin) for a in here.asked(found["noise 40"][BASELINE]["said"])}
    assert again == {(a.scene, a.question): (a.said, a.margin) for a in plain}
    report = vlm_methods.report_of(found, here)
    row = report["noise 40"]["louder"]
    assert row["changed"]["margin_moved"] > 0 and row["changed"]["captions_asked"] == 2
    assert row["captions"].keys() == CAPTIONS.keys() and "difference" in row["captions"]["chair_i"]
    assert "changed" not in report["clean"][BASELINE]
    vlm_methods.show(report)


def test_a_run_that_was_killed_goes_on_where_it_was(tiny, tmp_path) -> None:
    model, processor = tiny
    here, part = sitting(), tmp_path / "x.part"
    compare(model, processor, {BASELINE: None}, here, part, {"settings": 1})
    kept = json.loads(part.read_text())
    kept["conditions"]["clean"][BASELINE]["said"][0] = ["as it was", 0.5]
    part.write_text(json.dumps(kept))
    methods = {BASELINE: None, "louder": RandomHeads(alpha=4.0)}
    found = compare(model, processor, methods, here, part, {"settings": 1})
    assert found["clean"][BASELINE]["said"][0] == ["as it was", 0.5] and "louder" in found["clean"]
    found = compare(model, processor, {BASELINE: None}, here, part, {"settings": 2})
    assert found["clean"][BASELINE]["said"][0] != ["as it was", 0.5]


def test_what_changed_is_counted() -> None:
    one = answers()
    assert changed(one, one) | {"presence_asked": 0} == {
        "presence": 0,
        "presence_asked": 0,
        "captions": 0,
        "captions_asked": 0,
        "margins_compared": len(one),
        "margin_towards_yes": 0,
        "margin_moved": 0,
    }
    other = [Asked(a.scene, a.question, "Yes", a.margin - 2) for a in one]
    found = changed(other, one)
    assert found["presence"] == sum(not a.says_yes for a in one)
    assert (found["margin_towards_yes"], found["margin_moved"]) == pytest.approx((-2, 2))
    endless = [Asked(a.scene, a.question, "Yes", 100.0) for a in one]
    assert changed(endless, one)["margins_compared"] == 0


def saved(tiny: Tiny, folder: Path) -> str:
    model, processor = tiny
    model.save_pretrained(folder)
    processor.save_pretrained(folder)
    return str(folder)


def test_the_command_compares_methods_and_draws_them(tiny, tmp_path, capsys) -> None:
    written, plot = tmp_path / "out.json", tmp_path / "out.png"
    evaluate_command(
        model=saved(tiny, tmp_path / "model"),
        method=["VHR"],
        settings=["alpha=3"],
        noise=[NOISE],
        scenes=2,
        output=written,
        plot=plot,
    )
    report = json.loads(written.read_text())
    assert report["methods"] == {BASELINE: BASELINE, "VHR": "VHR(alpha=3)"}
    assert list(report["conditions"]) == [f"noise {NOISE:g}", "blanked picture"]
    row = report["conditions"][f"noise {NOISE:g}"]["VHR"]["presence, all"]["accuracy"]
    assert list(row) == ["mean", "difference", "interval"]
    assert not list(tmp_path.glob("*.part*"))
    with Image.open(plot) as drawn:
        assert drawn.width > 500
    assert plot.stat().st_size < 60_000
    assert "wrote" in capsys.readouterr().out


def test_the_command_without_methods_asks_everything(tiny, tmp_path) -> None:
    written, sheet = tmp_path / "out.json", tmp_path / "sheet.png"
    evaluate_command(model=saved(tiny, tmp_path / "model"), scenes=2, noise=[10.0], output=written, sheet=sheet)
    report = json.loads(written.read_text())
    assert {"presence, random", "colour", "count", "position", "captions", "controls"} <= set(report)
    assert report["noise"] == 10 and sheet.is_file()


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"suite": "all"}, "scenes, methods, pointing"),
        ({"suite": "pointing", "method": ["VHR"]}, "--scenes and --layers only"),
        ({"suite": "pointing", "layers": "7:9"}, "layers 0 to 1"),
        ({"layers": "1"}, "--suite pointing"),
        ({"settings": ["alpha=2"]}, "need --method"),
        ({"noise": [0.0, 10.0]}, "need --method"),
        ({"method": ["VHR"], "sheet": Path("x.png")}, "--sheet"),
        ({"method": ["Blur"]}, "no method Blur"),
        ({"method": ["VHR"], "settings": ["alpha=x"]}, "VHR cannot take alpha='x'"),
        ({"method": ["DuoAttention"]}, "has no plan"),
        ({"noise": [-1.0]}, "--noise -1"),
        ({"method": ["VHR"], "settings": ["sigma=2"]}, "VHR has no field sigma"),
    ],
)
def test_what_makes_no_sense_is_refused(tiny, tmp_path, wrong, message) -> None:
    with pytest.raises(ValueError, match=message):
        evaluate_command(model=saved(tiny, tmp_path), output=tmp_path / "out.json", **wrong)
    assert not list(tmp_path.glob("out.json*"))


def test_folders_are_not_taken_for_files_nor_for_one_another(tiny, tmp_path) -> None:
    model = saved(tiny, tmp_path / "model")
    with pytest.raises(ValueError, match="is a folder"):
        evaluate_command(model=model, output=tmp_path)
    folders = [tmp_path / "a" / "fitted", tmp_path / "b" / "fitted"]
    for folder, alpha in zip(folders, (2, 3), strict=True):
        steer.VHR(alpha=alpha).save(str(folder))
    with pytest.raises(ValueError, match="two methods named fitted"):
        evaluate_command(model=model, artifact=folders, output=tmp_path / "out.json")


def test_a_method_that_needs_the_processor_gets_it(tiny) -> None:
    chosen = named(["GIFT"], {"alpha": 2.0}, tiny[1])["GIFT"]
    assert chosen.alpha == 2.0 and chosen.after > 0


def test_a_figure_and_its_interval_are_on_one_line() -> None:
    text = as_text({"a": {"b": {"mean": 1 / 3, "interval": (0.25, 0.5)}, "c": [1, 2.123456]}})
    assert '"b": { "mean": 0.3333, "interval": [ 0.25, 0.5 ] }' in text and "2.1235" in text
    assert json.loads(text)["a"]["b"]["interval"] == [0.25, 0.5]


@pytest.mark.slow  # VAR's search on the shipped model
def test_the_suite_has_three_strengths_of_each_method_and_its_controls() -> None:
    try:
        smollm2.folder()
    except ImportError as error:
        pytest.skip(str(error))
    model, processor = emoji_vlm.load(device="cpu")
    with pytest.warns(UserWarning, match="none found"):
        chosen = configurations(model, processor)
    for name in ("VAR", "VHR", "GIFT", "ImbalancedAttention"):
        mine = [title for title, m in chosen.items() if type(m).__name__ == name and title.endswith(" x")]
        assert len(mine) == len(STRENGTHS), name
    assert chosen["VAR, as its search says"].is_neutral()
    assert sum("control" in title for title in chosen) == 4


def documented(page: str, name: str) -> tuple[str, dict]:
    """A page, without line breaks, and the figures that it quotes."""
    root = Path(__file__).resolve().parents[2]
    figures = json.loads((root / f"benchmarks/{name}.json").read_text(encoding="utf-8"))
    return " ".join((root / page).read_text(encoding="utf-8").split()), figures


def test_documented_comparison() -> None:
    page, found = documented("docs/methods/vision.md", "vlm-emoji")
    for title in found["conditions"]["clean"]:
        cells = [title]
        for condition in ("clean", "noise 105"):
            row = found["conditions"][condition][title]
            for part, name in (("presence, all", "balanced_accuracy"), ("captions", "chair_i")):
                figure = row[part][name]
                low, high = (f"{100 * end:.1f}" for end in figure["interval"])
                baseline = f"{100 * figure['mean']:.1f}"
                middle = f"{100 * figure['difference']:+.1f}" if "difference" in figure else baseline
                cells.append(f"{middle} [{low}, {high}]")
            cells.append(str(row["changed"]["presence"]) if "changed" in row else "")
        assert " ".join(f"| {' | '.join(cells)} |".split()) in page
    blank = found["conditions"]["blanked picture"]["baseline"]["presence, all"]["yes_ratio"]["mean"]
    assert f"says yes to {100 * blank:.1f} % of the questions" in page


def test_documented_cost() -> None:
    page, found = documented("docs/benchmarks.md", "vlm-cpu")
    for row in found["rows"]:
        what = ", ".join(filter(None, (row["method"], row["form"])))
        spread = f"{row['token_milliseconds']:.1f} (± {row['token_half_spread']:.1f})"
        over_map = f"{row['token_over_eager']:.2f} " if "token_over_eager" in row else ""
        assert f"| {what} | {spread} | {row['token_over_sdpa']:.2f} | {over_map}|" in page
    costs = [row["token_over_sdpa"] for row in found["rows"] if row["method"] and row["form"].startswith("steer")]
    assert f"{min(costs):.2f}" == "1.04"
    readme, _ = documented("README.md", "vlm-cpu")
    assert "A token costs 1.04 to 1.33 times" in readme
    assert sorted(f"{cost:.2f}" for cost in costs)[-3] == "1.33"  # without the two of guidance
