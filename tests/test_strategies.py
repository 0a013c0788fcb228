"""Strategies on made-up scores: what they find, how many trials they ask for, and that they do the same again."""

from __future__ import annotations

import itertools
import math
import random
from collections.abc import Callable, Mapping
from typing import Any

import optuna
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from steer.strategies import HeadHunter, Optuna, RandomHeads, Settings, Space, Strategy, Sweep, Trial, best, strategy_of

LAYERS, HEADS = 4, 3
Score = Callable[[Settings], float]
whole = st.integers(-5, 5).map(float)  # small whole numbers: sums are exact and equal scores are common


def space_of(layers: int = LAYERS, heads: int = HEADS, **options: Any) -> Space:
    names = tuple(f"blocks.{layer}.attn" for layer in range(layers))
    return Space(names, tuple(itertools.product(names, range(heads))), **options)


def heads_in(found: Settings) -> set[tuple[str, int]]:
    return {(layer, head) for layer, numbers in found["heads"].items() for head in numbers}


def run(strategy: Strategy, space: Space, score: Score, budget: float = math.inf) -> tuple[Settings, list[list[Trial]]]:
    """What the strategy finds where `score` is known, and all it asked for; after `budget` trials nothing is scored."""
    asking, asked, told = strategy.search(space), list[list[Trial]](), 0
    trials = next(asking)
    while True:
        asked.append(trials)
        scores = []
        for trial in trials:
            told += 1
            scores.append(score(trial.settings) if told <= budget else math.nan)
        try:
            trials = asking.send(scores)
        except StopIteration as stop:
            return stop.value, asked


values = st.lists(whole, min_size=LAYERS * HEADS, max_size=LAYERS * HEADS)


def additive(numbers: list[float], space: Space) -> Score:
    """Every head adds its own value to the score."""
    table = dict(zip(space.heads, numbers, strict=True))
    return lambda tried: sum(table[head] for head in heads_in(tried))


@given(numbers=values, rounds=st.integers(1, 3), top=st.integers(1, 5))
def test_headhunter_finds_the_best_heads_of_an_additive_score(numbers: list[float], rounds: int, top: int) -> None:
    space = space_of()
    found, asked = run(HeadHunter(rounds=rounds, top=top), space, additive(numbers, space))
    order = sorted(range(len(numbers)), key=lambda i: (-numbers[i], i))  # of equals the first in the model
    assert heads_in(found) == {space.heads[i] for i in order[: rounds * top]}
    assert list(found["heads"]) == [layer for layer in space.layers if layer in found["heads"]]
    assert all(list(numbers) == sorted(numbers) for numbers in found["heads"].values())
    assert sum(map(len, asked)) == HeadHunter(rounds=rounds, top=top).count(space)
    for trials in asked:
        assert all(trial.head in heads_in(trial.settings) for trial in trials)


@given(numbers=values, budget=st.integers(1, 30), rounds=st.integers(1, 3), top=st.integers(1, 5))
def test_what_was_not_tried_is_never_chosen(numbers: list[float], budget: int, rounds: int, top: int) -> None:
    space = space_of()
    found, asked = run(HeadHunter(rounds=rounds, top=top), space, additive(numbers, space), budget)
    tried = {trial.head for trial in list(itertools.chain(*asked))[:budget]}
    assert heads_in(found) <= tried and found["heads"]


def test_headhunter_takes_one_in_24_by_default_and_ends_with_the_heads() -> None:
    for layers, heads, expected in ((24, 24, 24), (57, 24, 57), (6, 6, 2), (2, 2, 1)):
        space = space_of(layers, heads)
        assert len(heads_in(run(HeadHunter(), space, lambda tried: 0.0)[0])) == expected
    space = space_of(1, 3)
    found, asked = run(HeadHunter(rounds=9, top=2), space, lambda tried: 0.0)
    assert len(heads_in(found)) == 3 and list(map(len, asked)) == [3, 1]
    assert HeadHunter(rounds=9, top=2).count(space) == 4


def test_headhunter_looks_at_what_is_chosen_already() -> None:
    """A pair that is worth more together than its parts, and more than what is best beside another head."""
    space = space_of()
    first, second, other = space.heads[7], space.heads[2], space.heads[0]
    worth = {frozenset({first}): 3.0, frozenset({other}): 2.0, frozenset({first, second}): 9.0}
    found, _ = run(HeadHunter(rounds=2, top=1), space, lambda tried: worth.get(frozenset(heads_in(tried)), 0.0))
    assert heads_in(found) == {first, second}


fields = st.dictionaries(
    st.sampled_from(["scale", "strength", "sigma"]),
    st.lists(st.tuples(st.integers(0, 9), whole), min_size=1, max_size=4, unique_by=lambda pair: pair[0]),
    min_size=1,
)


@given(worth=fields, cycles=st.integers(1, 3))
def test_sweep_finds_the_best_of_every_field_that_adds_its_own(
    worth: Mapping[str, list[tuple[int, float]]], cycles: int
) -> None:
    strategy = Sweep(space={name: [value for value, _ in pairs] for name, pairs in worth.items()}, cycles=cycles)
    tables = {name: dict(pairs) for name, pairs in worth.items()}
    found, asked = run(strategy, space_of(), lambda s: sum(tables[name][value] for name, value in s.items()))
    first = next(iter(worth))
    best_of = {name: max(pairs, key=lambda pair: pair[1]) for name, pairs in worth.items()}  # first of equals
    assert found == {name: value for name, (value, gain) in best_of.items() if gain >= 0 or name == first}
    scores = [score for trials in asked for score in (sum(tables[n][v] for n, v in t.settings.items()) for t in trials)]
    assert sum(tables[name][value] for name, value in found.items()) == max(scores)
    assert sum(map(len, asked)) == strategy.count(space_of()) and len(asked) == cycles * len(worth)


def test_sweep_tries_every_layer_alone_unless_told() -> None:
    found, asked = run(Sweep(), space_of(), lambda s: float(s["layers"] == "blocks.2.attn"))
    assert found == {"layers": "blocks.2.attn"}
    assert [trial.settings["layers"] for trial in asked[0]] == list(space_of().layers)


def test_sweep_keeps_what_it_has_where_the_budget_ends() -> None:
    sweep = Sweep(space={"scale": [1.0, 2.0, 3.0], "strength": [0.5, 1.0]})
    assert run(sweep, space_of(), lambda s: s["scale"], budget=2)[0] == {"scale": 2.0}
    assert run(sweep, space_of(), lambda s: s["scale"] + s.get("strength", 0), budget=4)[0] == {
        "scale": 3.0, "strength": 0.5
    }  # fmt: skip
    assert run(sweep, space_of(), lambda s: s["scale"] - s.get("strength", 0))[0] == {"scale": 3.0}  # none is better


@given(seed=st.integers(0, 50), number=st.integers(1, 5), draws=st.integers(1, 8))
def test_random_heads_differ_and_the_seed_decides(seed: int, number: int, draws: int) -> None:
    space, strategy = space_of(seed=seed), RandomHeads(number=number, draws=draws)
    found, asked = run(strategy, space, lambda s: 0.0)
    assert (found, asked) == run(strategy, space, lambda s: 0.0)
    sets = [frozenset(heads_in(trial.settings)) for trial in asked[0]]
    assert len(set(sets)) == len(sets) == draws == strategy.count(space) and all(len(each) == number for each in sets)
    assert found == asked[0][0].settings


def test_random_heads_keeps_the_best_draw_and_can_draw_all() -> None:
    space = space_of(2, 2)
    found, asked = run(RandomHeads(number=2, draws=6), space, lambda s: float(heads_in(s) == set(space.heads[:2])))
    assert heads_in(found) == set(space.heads[:2]) and len(asked[0]) == 6
    one = [run(RandomHeads(number=3), space_of(seed=seed), lambda s: 0.0)[0] for seed in range(5)]
    assert len({str(each) for each in one}) > 1
    assert len(heads_in(run(RandomHeads(), space_of(24, 24), lambda s: 0.0)[0])) == 24
    assert run(RandomHeads(number=1, draws=4), space, lambda s: 1.0, budget=0)[0]["heads"]


SEARCHED = {"scale": (0.0, 6.0), "sigma": (1, 9), "layers": ["blocks.0.attn", ["blocks.1.attn", "blocks.2.attn"]]}


def bowl(tried: Settings) -> float:
    """Best at scale 4, sigma 3 and the second choice of layers."""
    return -((tried["scale"] - 4) ** 2) - (tried["sigma"] - 3) ** 2 - 5.0 * (tried["layers"] == "blocks.0.attn")


@settings(max_examples=5)
@given(seed=st.integers(0, 1000))
def test_optuna_does_the_same_again_and_gets_better(seed: int) -> None:
    strategy, space = Optuna(space=SEARCHED, number=25), space_of(seed=seed)
    found, asked = run(strategy, space, bowl)
    assert (found, asked) == run(strategy, space, bowl)
    scores = [bowl(trials[0].settings) for trials in asked]
    assert bowl(found) == max(scores) and found == asked[scores.index(max(scores))][0].settings
    assert len(asked) == 25 and max(scores) > scores[0]
    for trials in asked:
        tried = trials[0].settings
        assert 0 <= tried["scale"] <= 6 and isinstance(tried["sigma"], int) and 1 <= tried["sigma"] <= 9
        assert tried["layers"] in SEARCHED["layers"]
    assert run(strategy, space_of(seed=seed + 1), bowl)[1] != asked


def test_optuna_keeps_to_its_budget_and_continues_as_it_began() -> None:
    strategy = Optuna(space=SEARCHED, number=20)
    long = run(strategy, space_of(), bowl)[1]
    short = run(strategy, space_of(trials=8), bowl)[1]
    assert short == long[:8] and strategy.count(space_of(trials=8)) == 8
    cut, asked = run(strategy, space_of(), bowl, budget=5)
    assert asked == long[:6] and cut == max((t[0].settings for t in long[:5]), key=bowl)
    assert run(strategy, space_of(), bowl, budget=0)[0] == {}


def test_optuna_leaves_its_logging_and_the_random_state_alone() -> None:
    told, state = optuna.logging.get_verbosity(), random.getstate()
    run(Optuna(space=SEARCHED, number=3), space_of(), bowl)
    assert optuna.logging.get_verbosity() == told and random.getstate() == state
    random_only = Optuna(space=SEARCHED, number=3, sampler="RandomSampler")
    assert run(random_only, space_of(), bowl)[1] == run(random_only, space_of(), bowl)[1]


@given(scores=st.lists(st.one_of(whole, st.just(math.nan))))
def test_best_orders_what_was_tried(scores: list[float]) -> None:
    order = best(scores)
    assert sorted(order) == [i for i, score in enumerate(scores) if not math.isnan(score)]
    assert all((-scores[a], a) < (-scores[b], b) for a, b in itertools.pairwise(order))


def test_wrong_settings_are_said() -> None:
    cases: list[tuple[type[Exception], str, Callable[[], Any]]] = [
        (ValueError, "rounds=0 must be a whole number of at least 1", lambda: HeadHunter(rounds=0)),
        (ValueError, "rounds=2.5 must be a whole number", lambda: HeadHunter(rounds=2.5)),  # type: ignore[arg-type]
        (ValueError, "top=0 must be a whole number of at least 1", lambda: HeadHunter(top=0)),
        (ValueError, "top='abc' must be a whole number", lambda: HeadHunter(top="abc")),  # type: ignore[arg-type]
        (ValueError, "cycles=0 must be a whole number of at least 1", lambda: Sweep(cycles=0)),
        (ValueError, 'space={}: strategy="sweep" needs fields of the method', lambda: Sweep(space={})),
        (ValueError, 'space=\'scale\': strategy="sweep" needs', lambda: Sweep(space="scale")),  # type: ignore[arg-type]
        (ValueError, r"space\['scale'\]=3.0 must list the values to try", lambda: Sweep(space={"scale": 3.0})),  # type: ignore[dict-item]
        (ValueError, r"space\['layers'\]='a' must list the values", lambda: Sweep(space={"layers": "a"})),
        (ValueError, "draws=0 must be a whole number of at least 1", lambda: RandomHeads(draws=0)),
        (ValueError, "number=13: there are 12 heads", lambda: run(RandomHeads(number=13), space_of(), bowl)),
        (ValueError, "draws=13: there are 12 choices of 1",
         lambda: run(RandomHeads(number=1, draws=13), space_of(), bowl)),
        (ValueError, 'space={}: strategy="optuna" needs fields of the method', lambda: Optuna()),
        (ValueError, "number=0 must be a whole number of at least 1", lambda: Optuna(space=SEARCHED, number=0)),
        *((ValueError, r"space\['scale'\]=.* must be a tuple of numbers \(low, high\) or a list", make) for make in (
            lambda: Optuna(space={"scale": (1, 2, 3)}), lambda: Optuna(space={"scale": (2.0, 1.0)}),
            lambda: Optuna(space={"scale": ("a", "b")}), lambda: Optuna(space={"scale": []}),
        )),
        (ValueError, "optuna.samplers has no 'Best'; it has .*TPESampler",
         lambda: run(Optuna(space=SEARCHED, sampler="Best"), space_of(), bowl)),
        (ValueError, 'strategy="headhunter" chooses heads, which this method does not take; use "sweep"',
         lambda: run(HeadHunter(), Space(("blocks.0",), ()), bowl)),
        (ValueError, 'strategy="random" chooses heads', lambda: run(RandomHeads(), Space(("blocks.0",), ()), bowl)),
        (ValueError, "strategy='hunter' does not exist; choose from headhunter, sweep, random, optuna, or pass a",
         lambda: strategy_of("hunter", {})),
        (TypeError, 'tops: strategy="headhunter" has no such option; it has rounds, top',
         lambda: strategy_of("headhunter", {"tops": 3})),
        (TypeError, r"top: give the options to the strategy, Sweep\(", lambda: strategy_of(Sweep(), {"top": 3})),
        (NotImplementedError, r"Strategy defines no search\(space\)", lambda: Strategy().search(space_of())),
    ]  # fmt: skip
    for kind, message, call in cases:
        with pytest.raises(kind, match=message):
            call()
    assert strategy_of("random", {"number": 3}) == RandomHeads(number=3) and Strategy().count(space_of()) is None
