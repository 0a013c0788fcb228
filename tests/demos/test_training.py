"""The training loop: it learns, an interrupted run continues exactly, another model's checkpoint is refused."""

import pytest
import torch
from torch import Tensor, nn

from steer_demos import training
from steer_demos.training import Budget, fit, load_checkpoint, rate_factor

SAMPLES = 1200
STEPS = 300


class Line(nn.Module):
    """Learns y = 3 x - 1."""

    def __init__(self, width: int = 1) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.linear = nn.Linear(width, 1)
        self.drawn = 0

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        self.drawn += 1
        points = torch.randn(size, 1, generator=generator)
        return points, 3 * points - 1

    def loss(self, points: Tensor, targets: Tensor) -> Tensor:
        return (self.linear(points) - targets).square().mean()


def run(model: Line, folder, draw=None) -> None:
    fit(
        model,
        draw or model.draw,
        model.loss,
        folder,
        Budget(samples=SAMPLES),
        batch_size=4,
        seed=1,
        learning_rate=0.1,
        compile_model=False,
        constants={"three": torch.tensor(3.0)},
    )


def test_it_learns_and_records_what_it_did(tmp_path) -> None:
    model = Line()
    run(model, tmp_path)
    assert model.linear.weight.item() == pytest.approx(3, abs=0.1)
    state = load_checkpoint(tmp_path)
    assert state["step"] == STEPS == model.drawn
    assert state["constants"] == {"three": torch.tensor(3.0)}
    assert state["average"]["linear.weight"].item() == pytest.approx(3, abs=0.5)
    header, *_, row = (tmp_path / "loss.csv").read_text().splitlines()
    assert header == "samples,seconds,loss" and row.startswith("1200,")


def test_an_interrupted_run_continues_exactly(tmp_path, monkeypatch) -> None:
    whole = Line()
    run(whole, tmp_path / "whole")

    monkeypatch.setattr(training, "SECONDS_PER_CHECKPOINT", 0)
    stopped = Line()

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        if stopped.drawn == 37:
            raise KeyboardInterrupt
        return stopped.draw(size, generator)

    with pytest.raises(KeyboardInterrupt):
        run(stopped, tmp_path / "stopped", draw)
    continued = Line()
    run(continued, tmp_path / "stopped")
    assert continued.drawn == STEPS - 37
    assert torch.equal(continued.linear.weight, whole.linear.weight)
    first, second = load_checkpoint(tmp_path / "whole"), load_checkpoint(tmp_path / "stopped")
    assert torch.equal(first["average"]["linear.bias"], second["average"]["linear.bias"])


def test_a_finished_run_is_left_as_it_is(tmp_path) -> None:
    run(Line(), tmp_path)
    again = Line()
    run(again, tmp_path)
    assert again.drawn == 0
    assert torch.equal(again.linear.weight, load_checkpoint(tmp_path)["model"]["linear.weight"])


def test_parameters_that_need_no_gradient_are_neither_trained_nor_saved(tmp_path) -> None:
    model = Line()
    model.linear.bias.requires_grad_(False)
    before = model.linear.bias.clone()
    run(model, tmp_path)
    assert torch.equal(model.linear.bias, before)
    assert set(load_checkpoint(tmp_path)["model"]) == {"linear.weight"}


def test_a_checkpoint_of_another_model_is_refused(tmp_path) -> None:
    class Other(Line):
        def __init__(self) -> None:
            super().__init__()
            self.more = nn.Linear(1, 1)

    run(Line(), tmp_path)
    with pytest.raises(ValueError, match="another model"):
        run(Other(), tmp_path)


def test_the_learning_rate_warms_up_and_ends_at_zero() -> None:
    budget = Budget(minutes=10)
    assert rate_factor(0, 0.0) < rate_factor(1000, 0.0) == rate_factor(1000, 0.5) == 1
    assert rate_factor(5000, budget.progress(600, 0)) == 0
    assert Budget(samples=100).progress(1e9, 50) == 0.5
    assert Budget(10, 100).part(0.25) == Budget(2.5, 25)
