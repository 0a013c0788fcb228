"""One rule for each group, so that the total loss is least within budgets: an exact search with a proof."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

STEPS = 1000  # of the ascent of the prices; a poor price costs time, never correctness
SLACK = 1e-12  # relative: sums of losses in another order are the same loss


@dataclass(frozen=True)
class Allocation:
    """What `allocate` found.

    Args:
        choice: (groups,) int64, the rule of every group.
        loss: their total loss.
        bound: no choice within the budgets loses less than this; equal to `loss` where that is proved to be least.
    """

    choice: np.ndarray
    loss: float
    bound: float


def allocate(
    loss: np.ndarray, cost: np.ndarray, budget: Sequence[float] | np.ndarray, width: int = 4_000
) -> Allocation:
    """Choose one rule for each group: least total loss, while the total of every cost stays within its budget.

    A multiple-choice knapsack problem with several budgets. Prices on the costs (Lagrange multipliers) relax it to a
    choice in each group alone, which bounds the loss of all that is left to choose. Partial choices are then extended
    group after group; those that cannot beat the best known choice by that bound are dropped, and of those with equal
    costs the best is kept. What remains at the end is the optimum. Where more than `width` partial choices are left,
    only the most promising are kept, and the result comes with a bound below its loss.

    Args:
        loss: (groups, rules), finite.
        cost: (groups, rules, budgets), whole numbers from 0.
        budget: (budgets,), for the sums over all groups.
        width: partial choices that are kept; more take longer and prove more.

    Raises:
        ValueError: shapes that do not fit, or budgets that not even the cheapest rules keep.
    """
    loss, cost, limit = np.asarray(loss, np.float64), np.asarray(cost), np.floor(np.asarray(budget, np.float64) + 1e-9)
    if loss.ndim != 2 or cost.shape != (*loss.shape, *limit.shape) or limit.ndim != 1:
        raise ValueError(
            f"loss {loss.shape}, cost {cost.shape} and budget {limit.shape} must be (groups, rules), "
            "(groups, rules, budgets) and (budgets,)"
        )
    if not np.isfinite(loss).all() or (cost < 0).any() or (cost != np.floor(cost)).any():
        raise ValueError("losses must be finite, and costs whole numbers from 0")
    least = cost.min(1).sum(0)
    if (least > limit).any():
        raise ValueError(f"the cheapest rules cost {least.tolist()} in total, above the budgets {limit.tolist()}")
    cost = cost.astype(np.int64)
    prices, bound = _prices(loss, cost, limit)
    relaxed = _Relaxed(loss, cost, limit, prices)
    first, _ = _sweep(relaxed, np.inf, max(width // 100, 10))
    better, complete = _sweep(relaxed, first[1] if first else np.inf, width)
    found = better or first
    if found is None:
        raise ValueError(f"no choice of rules within the budgets {limit.tolist()} was found; give a larger width")
    choice, total = found
    return Allocation(choice, total, total if complete else min(bound, total))


@dataclass(frozen=True)
class _Relaxed:
    """The problem and its prices: what any completion of a partial choice loses and costs at the least."""

    loss: np.ndarray
    cost: np.ndarray
    limit: np.ndarray
    prices: np.ndarray

    def rest(self) -> tuple[np.ndarray, np.ndarray]:
        """(groups + 1,) loss plus priced cost, and (groups + 1, budgets) cost, of all groups from each one on."""
        priced = (self.loss + self.cost @ self.prices).min(1)
        cheapest = self.cost.min(1)
        return _from_each_on(priced), _from_each_on(cheapest)


def _from_each_on(values: np.ndarray) -> np.ndarray:
    return np.concatenate([values[::-1].cumsum(0)[::-1], np.zeros_like(values[:1])])


def _prices(loss: np.ndarray, cost: np.ndarray, limit: np.ndarray) -> tuple[np.ndarray, float]:
    """Prices of high bound, and the bound: of subgradient steps by Polyak's rule, the best."""
    unit = np.maximum(limit, 1)  # in shares of the budgets, their prices are of one size
    shares, whole = cost / unit, limit / unit
    above = loss.max(1).sum()
    prices = best = np.zeros(len(limit))
    bound, eager, since = -np.inf, 1.0, 0
    rows = np.arange(len(loss))
    for _ in range(STEPS):
        choice = (loss + shares @ prices).argmin(1)
        excess = shares[rows, choice].sum(0) - whole
        value = loss[rows, choice].sum() + prices @ excess
        if (excess <= 0).all():
            above = min(above, loss[rows, choice].sum())
        if value > bound:
            bound, best, since = value, prices, 0
        else:
            since += 1
            if since == 20:
                eager, since, prices = eager / 2, 0, best
                continue
        slope = np.where((prices <= 0) & (excess < 0), 0, excess)
        if not slope.any():
            break
        prices = np.maximum(prices + eager * max(above - value, 0) / (slope @ slope) * excess, 0)
    return best / unit, float(bound)


def _sweep(relaxed: _Relaxed, upper: float, width: int) -> tuple[tuple[np.ndarray, float] | None, bool]:
    """The best choice of loss below `upper`, if there is one, and whether none was passed over."""
    loss, cost, limit, prices = relaxed.loss, relaxed.cost, relaxed.limit, relaxed.prices
    priced_rest, cheapest_rest = relaxed.rest()
    groups, rules = loss.shape
    losses, costs = np.zeros(1), np.zeros((1, len(limit)), np.int64)
    parents: list[np.ndarray] = []
    picks: list[np.ndarray] = []
    complete = True
    cutoff = upper - SLACK * abs(upper) if np.isfinite(upper) else np.inf
    for group in range(groups):
        total = (losses[:, None] + loss[group]).ravel()
        spent = (costs[:, None] + cost[group]).reshape(-1, len(limit))
        reach = total + (spent - limit) @ prices + priced_rest[group + 1]
        kept = np.flatnonzero((spent + cheapest_rest[group + 1] <= limit).all(1) & (reach < cutoff))
        kept = kept[np.lexsort((total[kept], *spent[kept].T))]  # equal costs side by side, the least loss first
        new = np.ones(len(kept), bool)
        new[1:] = (spent[kept[1:]] != spent[kept[:-1]]).any(1)
        kept = kept[new]
        if len(kept) > width:
            kept, complete = kept[np.argpartition(reach[kept], width)[:width]], False
        if not len(kept):
            return None, complete
        losses, costs = total[kept], spent[kept]
        parents.append(kept // rules)
        picks.append(kept % rules)
    state = int(losses.argmin())
    choice = np.empty(groups, np.int64)
    final = float(losses[state])
    if final >= cutoff:
        return None, complete
    for group in reversed(range(groups)):
        choice[group] = picks[group][state]
        state = int(parents[group][state])
    return (choice, final), complete
