"""The solver of the searches for windows: against all choices, on problems small enough to try them."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest

from steer.allocation import allocate


def least(loss: np.ndarray, cost: np.ndarray, budget: np.ndarray) -> float | None:
    """The least loss of all choices within the budgets."""
    groups = range(len(loss))
    choices = product(range(loss.shape[1]), repeat=len(loss))
    totals = [
        sum(float(loss[g, choice[g]]) for g in groups)
        for choice in choices
        if all(sum(cost[g, choice[g]] for g in groups) <= budget)
    ]
    return min(totals, default=None)


@pytest.mark.parametrize("budgets", [1, 2, 3])
def test_the_result_is_the_best_of_all_choices(budgets: int) -> None:
    rng = np.random.default_rng(budgets)
    for _ in range(30):
        groups, rules = rng.integers(1, 6), rng.integers(1, 6)
        loss, cost = rng.random((groups, rules)), rng.integers(0, 9, (groups, rules, budgets))
        budget = cost.min(1).sum(0) + rng.integers(0, 12, budgets)
        best = least(loss, cost, budget)
        if best is None:
            with pytest.raises(ValueError, match="budgets"):
                allocate(loss, cost, budget)
            continue
        found = allocate(loss, cost, budget)
        chosen = np.arange(groups), found.choice
        assert found.loss == pytest.approx(best, rel=1e-12)
        assert found.loss == pytest.approx(loss[chosen].sum(), rel=1e-12)
        assert found.bound == found.loss
        assert (cost[chosen].sum(0) <= budget).all()


def test_a_narrow_search_keeps_within_the_budget_and_states_how_far_off_it_may_be() -> None:
    rng = np.random.default_rng(0)
    loss = np.sort(rng.random((40, 20)), 1)[:, ::-1]
    cost = np.stack([np.arange(20), rng.permutation(20)], -1)[None].repeat(40, 0)
    narrow, wide = (allocate(loss, cost, [300, 400], width=width) for width in (20, 5000))
    assert narrow.bound <= wide.bound <= wide.loss <= narrow.loss
    assert narrow.bound < narrow.loss < 1.1 * narrow.bound
    assert (cost[np.arange(40), narrow.choice].sum(0) <= [300, 400]).all()


def test_problems_without_an_answer_are_refused() -> None:
    loss, cost = np.ones((2, 2)), np.full((2, 2, 1), 3)
    with pytest.raises(ValueError, match="above the budgets"):
        allocate(loss, cost, [5])
    with pytest.raises(ValueError, match="must be \\(groups, rules\\)"):
        allocate(loss, cost[:, :1], [5])
    with pytest.raises(ValueError, match="finite"):
        allocate(loss * np.nan, cost, [9])
