"""What a search leaves for people: the order of the heads, fair figures, pictures that show them, a line to copy."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_pipelines import PIPELINES
from typer.testing import CliRunner

import steer
from steer import cli
from steer.calibration_plots import GREY, ORANGE, draw_round
from steer.calibration_report import write
from steer.findings import Findings, findings_of, python_line, settings_of, short_names
from steer.provenance import notes
from steer.strategies import Asking, HeadHunter, Optuna, RandomHeads, Space, Strategy, Sweep

LAYERS = "transformer_blocks.*"


def whiteness(pictures: torch.Tensor, prompts: Sequence[Any]) -> list[float]:
    return [float(picture.mean()) * 100 for picture in pictures]


def fitted_with(strategy: Strategy, method: steer.Method | None = None, count: int = 3, **options: Any) -> steer.Method:
    """From a real search on a tiny SD3 of 3 layers of 2 heads."""
    tiny = PIPELINES["sd3"]
    pipe = tiny.build()
    calls = (tiny.call_kwargs(pipe, seed=seed, guidance_scale=1.0, steps=2) for seed in range(count))
    data = [{key: value for key, value in call.items() if key not in ("generator", "output_type")} for call in calls]
    method = method or steer.PAG(scale=4.0, layers=LAYERS)
    return steer.calibrate(pipe, method, data, strategy=strategy, progress=False, **{"objective": whiteness, **options})


def colours(file: Path) -> dict[tuple[int, ...], int]:
    """Colour -> number of pixels."""
    with Image.open(file) as picture:
        found: Any = picture.convert("RGB").getcolors(1 << 24)
    return {colour: count for count, colour in found}


def rgb(text: str) -> tuple[int, ...]:
    return tuple(bytes.fromhex(text[1:]))


class Told(HeadHunter):
    """HeadHunter that also writes down what it chooses, from the scores alone."""

    def search(self, space: Space) -> Asking:
        self.order: list[tuple[str, int]] = []
        asking = super().search(space)
        trials = next(asking)
        while True:
            scores = yield trials
            ranked = sorted(range(len(trials)), key=lambda i: (-scores[i], i))
            self.order += [head for i in ranked[: self.top] if (head := trials[i].head)]
            try:
                trials = asking.send(scores)
            except StopIteration as stop:
                return stop.value


def test_heads_are_listed_in_the_order_in_which_they_were_chosen() -> None:
    strategy = Told(rounds=3, top=2)
    found = Findings(fitted_with(strategy))
    assert [head for head, _ in found.chosen] == strategy.order
    assert [number for _, number in found.chosen] == [1, 1, 2, 2, 3, 3]
    thirds = [sum(f"blocks.{layer}." in site for site, _ in strategy.order) for layer in range(3)]
    assert found.by_depth() == [("first", 1, thirds[0]), ("middle", 1, thirds[1]), ("last", 1, thirds[2])]


def test_figures_are_those_of_the_scores(tmp_path: Path) -> None:
    """The gain of all chosen heads together, though no trial was; the cross-check by plain loops; after loading too."""
    fitted = fitted_with(HeadHunter(rounds=1, top=2))
    fitted.save(str(tmp_path))
    for method in (fitted, steer.load(tmp_path)):
        found = findings_of(method)
        assert found is not None and found.found is not None and found.record is method.record
        table = dict(zip(found.report["keys"], found.record.tensors["scores"].tolist(), strict=True))
        assert found.report["found"] not in {row["settings"] for row in found.trials}
        without, together = table.pop("without"), table.pop(found.report["found"])
        assert found.found.gain == pytest.approx(sum(b - a for a, b in zip(without, together, strict=True)) / 3)
        assert found.found.low <= found.found.gain <= found.found.high
        left_out = 0.0
        for i in range(3):
            best = max(table.values(), key=lambda row: sum(row) - row[i])
            left_out += (best[i] - without[i]) / 3
        assert found.cross_checked == pytest.approx(left_out)
    assert findings_of(steer.PAG()) is None
    with pytest.raises(TypeError, match="no record of a search with an objective"):
        Findings(steer.PAG())


def test_a_trial_that_is_better_than_the_heads_chosen_together_is_told(tmp_path: Path) -> None:
    fitted = fitted_with(HeadHunter(rounds=1, top=2))
    found = Findings(fitted)
    assert fitted.record is not None and found.found is not None
    scores = fitted.record.tensors["scores"]
    best = max(row["score"] for row in found.trials)
    together = found.report["keys"].index(found.report["found"])
    for shift in (1.0, -1.0):  # what was found scores higher, then lower than every trial
        scores[together] = best + shift
        told = [note for note in notes(fitted) if note.startswith("A trial scored higher")]
        assert len(told) == (shift < 0) and (found.better is None) == (shift > 0)
        write(fitted, tmp_path)
        assert ("A trial scored higher" in (tmp_path / "report.md").read_text()) == (shift < 0)
    assert told[0].startswith(f"A trial scored higher than what was chosen together: {found.label(found.trials[0])}")
    assert found.better == found.trials[0] and notes(steer.PAG()) == []


@pytest.mark.parametrize(("worth", "lost"), [(1.0, False), (-1.0, True)])
def test_a_search_that_finds_nothing_better_than_no_method_says_so(worth: float, lost: bool) -> None:
    """An objective that knows the picture without the method, and likes it least, or best of all."""
    seen: list[torch.Tensor] = []

    def away(pictures: torch.Tensor, prompts: Any) -> list[float]:
        seen.append(pictures[0].clone())
        return [worth * float((picture - seen[0]).norm()) for picture in pictures]

    fitted = fitted_with(HeadHunter(), count=1, objective=away)
    assert ("No trial scored higher than no method at all." in notes(fitted)) == lost


def test_report_of_heads(tmp_path: Path) -> None:
    fitted = fitted_with(HeadHunter(rounds=2, top=1), report=tmp_path)
    text = (tmp_path / "report.md").read_text()
    line = text.partition("```python\n")[2].partition("\n```")[0]
    assert eval(line, {"steer": steer}).settings() == fitted.settings() != {}
    assert "| strategy | HeadHunter(rounds=2, top=1) |" in text and "| objective | whiteness |" in text
    assert f"| method | PAG(layers='{LAYERS}', scale=4.0) |" in text and "prompts and seeds" in text
    assert "The best 11 of 11 trials:" in text and "budget was over" not in text
    for number in (1, 2):
        assert f"(gain_{number}.png)" in text
        seen = colours(tmp_path / f"gain_{number}.png")
        assert seen[rgb(ORANGE)] > 200
        assert (seen.get(rgb(GREY), 0) > 1000) == (number == 2)  # the cell of the head that was chosen before
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", "gain_1.png", "gain_2.png"}


def test_gains_are_blue_and_losses_red(tmp_path: Path) -> None:
    """Of a round whose first head gains as much as the second loses; the others, not tried, are grey."""
    fitted = fitted_with(HeadHunter())
    assert fitted.record is not None
    table = fitted.record.tensors["gain_1"]
    table.fill_(torch.nan)
    fitted.record.tensors["chosen"].zero_()
    table[0, 0, 0], table[0, 0, 1] = 2.0, -2.0
    file = tmp_path / "round.png"
    draw_round(Findings(fitted), 1, file)
    cells = sorted(((count, colour) for colour, count in colours(file).items()), reverse=True)
    white, grey, *ends = (colour for _, colour in cells[:4])
    assert white == (255, 255, 255) and grey == rgb(GREY)
    with Image.open(file) as picture:
        pixels = torch.from_numpy(np.array(picture.convert("RGB")))
    blue, red = sorted(ends, key=lambda colour: colour[0])
    where = [(pixels == torch.tensor(colour)).all(-1).nonzero()[:, 1].median() for colour in (blue, red)]
    assert blue[2] > 2 * blue[0] and red[0] > 2 * red[2] and where[0] < where[1]
    table.fill_(torch.nan)
    draw_round(Findings(fitted), 1, file)
    assert colours(file)[rgb(GREY)] > 10_000


def test_a_search_cut_short_says_so(tmp_path: Path) -> None:
    fitted = fitted_with(HeadHunter(rounds=2, top=1), trials=5, report=tmp_path)
    text = (tmp_path / "report.md").read_text()
    assert Findings(fitted).is_cut and "over after 5 of the 11 trials" in text
    assert (tmp_path / "gain_1.png").exists() and not (tmp_path / "gain_2.png").exists()


def test_a_sweep_has_a_panel_for_each_field_and_the_others_beside_it(tmp_path: Path) -> None:
    space = {"scale": [8.0, 2.0], "strength": [0.25, 0.5, 1.0]}
    fitted = fitted_with(Sweep(space=space), steer.PAG(layers=LAYERS), count=1, report=tmp_path)
    found = Findings(fitted)
    kept = f"scale={fitted.settings()['scale']}"
    panels = [(field, others, list(rows)) for field, others, rows in found.sweeps()]
    assert panels == [("scale", "", ["8.0", "2.0"]), ("strength", kept, ["0.25", "0.5", "1.0"])]
    text = (tmp_path / "report.md").read_text()
    assert "(sweep.png)" in text and (tmp_path / "sweep.png").read_bytes().startswith(b"\x89PNG")
    assert ", no interval of one sample |" in text and f"space={space}" in text and found.cross_checked is None


@pytest.mark.parametrize(
    ("strategy", "picture"),
    [
        (Sweep(), "sweep.png"),
        (Sweep(space={"scale": [2.0]}), "best.png"),
        (RandomHeads(number=2, draws=3), "best.png"),
        (Optuna(space={"scale": (1.0, 4.0)}, number=3), "progress.png"),
    ],
)
def test_every_strategy_has_a_picture(strategy: Strategy, picture: str, tmp_path: Path) -> None:
    if isinstance(strategy, Optuna):
        pytest.importorskip("optuna")
    fitted_with(strategy, count=1, report=tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.md", picture}
    assert f"]({picture})" in (tmp_path / "report.md").read_text()
    assert (tmp_path / picture).read_bytes().startswith(b"\x89PNG")


def test_the_plot_command_draws_a_saved_search(tmp_path: Path) -> None:
    fitted_with(HeadHunter(rounds=2, top=1), count=1).save(str(tmp_path))
    result = CliRunner().invoke(cli.app, ["plot", "heads", str(tmp_path), "--output", str(tmp_path / "heads.png")])
    assert result.exit_code == 0, result.output
    names = {path.name for path in tmp_path.glob("*.png")}
    assert names == {"heads-gain_1.png", "heads-gain_2.png", "heads-chosen.png"}
    assert colours(tmp_path / "heads-gain_2.png")[rgb(GREY)] > 1000


def test_names_and_lines() -> None:
    assert short_names(["blocks.0.attn", "blocks.12.attn"]) == ["0", "12"]
    assert short_names(["a.blocks.0.attn", "a.blocks.1.attn", "a.one.0.attn"]) == ["blocks.0", "blocks.1", "one.0"]
    assert short_names(["a.0.attn", "a.0.attn2"]) == ["attn", "attn2"]
    assert short_names(["blocks.0.attn"]) == ["blocks.0.attn"] and short_names([]) == []
    assert short_names(["a.a", "a.a.a"]) == ["a.a", "a.a.a"]
    assert settings_of("layers=None, heads={'a.b': [1, 2]}") == {"layers": "None", "heads": "{'a.b': [1, 2]}"}
    assert settings_of("hook=<object at 0x1>") == {}
    assert python_line(steer.PAG(scale=2.5, steps=range(3))) == "steer.PAG(steps=range(0, 3), scale=2.5)"
    with pytest.raises(TypeError, match="was not fitted"):
        write(steer.PAG(), Path("nowhere"))
    assert not Path("nowhere").exists()
