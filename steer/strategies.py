"""Which settings to try next: HeadHunter, a sweep over fields, random heads, and optuna's samplers."""

from __future__ import annotations

import math
import random
from collections.abc import Generator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any, ClassVar

Head = tuple[str, int]  # name of a site, number of a query head
Settings = dict[str, Any]  # fields of the method that differ from those of the one that is fitted


@dataclass(frozen=True)
class Trial:
    """Settings to try, and the head that they are tried for, where it is one: the picture shows its score."""

    settings: Settings
    head: Head | None = None


Asking = Generator[list[Trial], list[float], Settings]


@dataclass(frozen=True)
class Space:
    """What a strategy chooses from: the layers and heads on which the method can act.

    Args:
        layers: names of the attention sites, or of the blocks that a method skips, in the order of the model.
        heads: every (site, head), layer after layer; empty for methods that skip blocks.
        seed: of anything random.
        trials: the budget, None = as many as the strategy asks for.
    """

    layers: tuple[str, ...]
    heads: tuple[Head, ...]
    seed: int = 0
    trials: int | None = None


@dataclass(kw_only=True)
class Strategy:
    """A search over settings. To write one, derive from this class and define `search`.

    `search` is a generator: it yields lists of trials, gets the mean score of each (higher is better; not a number
    where the budget was over before it was tried), and returns the best settings. It must depend on the scores and on
    `space` alone: after a kill it runs once more over the scores that were saved.
    """

    name: ClassVar[str] = ""

    def search(self, space: Space) -> Asking:
        raise NotImplementedError(f"{type(self).__name__} defines no search(space)")

    def count(self, space: Space) -> int | None:
        """How many trials `search` will ask for, for the progress bar; None = not known."""
        return None


@dataclass(kw_only=True)
class HeadHunter(Strategy):
    """Iterative greedy choice of heads: each round tries every head beside those chosen, and adds the best.

    A round tries {chosen} + {head} for every head that is not chosen, N trials, and adds the `top` best. Equal scores
    go to the head that comes first in the model. A round that the budget cuts short chooses among the heads it tried.

    Args:
        rounds: rounds, R in the paper: 1 for general quality, 5 for a style.
        top: heads added in a round, k in the paper: 24 for quality, 3 for a style, of the 576 of Stable Diffusion 3.
            None = one in 24, at least one.

    Source: Ahn et al., arXiv 2506.10978, section on HeadHunter; the budget and the order of ties are ours.
    """

    rounds: int = 1
    top: int | None = None

    name: ClassVar[str] = "headhunter"

    def __post_init__(self) -> None:
        _check_counts(rounds=self.rounds, top=self.top)

    def search(self, space: Space) -> Asking:
        _need_heads(space, self)
        chosen: list[Head] = []
        for _ in range(self.rounds):
            tried = [head for head in space.heads if head not in chosen]
            if not tried:
                break
            scores = yield [Trial(_settings([*chosen, head], space), head) for head in tried]
            chosen += [tried[i] for i in best(scores)[: self._top(space)]]
        return _settings(chosen, space)

    def count(self, space: Space) -> int:
        left, total = len(space.heads), 0
        for _ in range(self.rounds):
            total, left = total + left, max(0, left - self._top(space))
        return total

    def _top(self, space: Space) -> int:
        return self.top if self.top is not None else max(1, round(len(space.heads) / 24))


@dataclass(kw_only=True)
class Sweep(Strategy):
    """One field after another: every value is tried with the best of the others so far, and the best is kept.

    A field whose values are all worse than what was found before stays as it is.

    Args:
        space: field of the method -> its values, in the order in which the fields are swept. None = every layer alone.
        cycles: how often to go through the fields.
    """

    space: Mapping[str, Sequence[Any]] | None = None
    cycles: int = 1

    name: ClassVar[str] = "sweep"

    def __post_init__(self) -> None:
        _check_counts(cycles=self.cycles)
        if self.space is not None:
            _check_space(self, self.space)
        for name, values in (self.space or {}).items():
            if not isinstance(values, Sequence) or isinstance(values, str) or not values:
                raise ValueError(f"space[{name!r}]={values!r} must list the values to try")

    def search(self, space: Space) -> Asking:
        swept = self._values(space)
        found, top = Settings(), -math.inf
        for name in [*swept] * self.cycles:
            scores = yield [Trial({**found, name: value}) for value in swept[name]]
            if (order := best(scores)) and scores[order[0]] >= top:
                found, top = {**found, name: swept[name][order[0]]}, scores[order[0]]
        return found

    def count(self, space: Space) -> int:
        return self.cycles * sum(map(len, self._values(space).values()))

    def _values(self, space: Space) -> Mapping[str, Sequence[Any]]:
        return self.space if self.space is not None else {"layers": space.layers}


@dataclass(kw_only=True)
class RandomHeads(Strategy):
    """Heads drawn at random: the control of every search of heads.

    Args:
        number: heads in a draw; None = one in 24, at least one.
        draws: how many draws are tried; the best is kept. With 1 the scores choose nothing.
    """

    number: int | None = None
    draws: int = 1

    name: ClassVar[str] = "random"

    def __post_init__(self) -> None:
        _check_counts(number=self.number, draws=self.draws)

    def search(self, space: Space) -> Asking:
        _need_heads(space, self)
        number = self.number if self.number is not None else max(1, round(len(space.heads) / 24))
        if number > len(space.heads):
            raise ValueError(f"number={number}: there are {len(space.heads)} heads to draw from")
        if self.draws > math.comb(len(space.heads), number):
            raise ValueError(f"draws={self.draws}: there are {math.comb(len(space.heads), number)} choices of {number}")
        chance, drawn = random.Random(space.seed), dict[frozenset[Head], Settings]()
        while len(drawn) < self.draws:
            heads = chance.sample(space.heads, number)
            drawn.setdefault(frozenset(heads), _settings(heads, space))
        draws = list(drawn.values())
        scores = yield [Trial(settings) for settings in draws]
        return draws[next(iter(best(scores)), 0)]

    def count(self, space: Space) -> int:
        return self.draws


@dataclass(kw_only=True)
class Optuna(Strategy):
    """Any fields at once, through a sampler of optuna (`pip install 'steer-attention[search]'`).

    Args:
        space: field of the method -> its range as a tuple (low, high) of floats or of ints, or a list of choices.
        number: trials, where `trials` of `steer.calibrate` does not say.
        sampler: name of a class in `optuna.samplers` that takes a seed, e.g. "TPESampler", "RandomSampler".
    """

    space: Mapping[str, Sequence[Any]] = field(default_factory=dict)
    number: int = 50
    sampler: str = "TPESampler"

    name: ClassVar[str] = "optuna"

    def __post_init__(self) -> None:
        _check_counts(number=self.number)
        _check_space(self, self.space)
        for name, values in self.space.items():
            if not (_is_range(values) if isinstance(values, tuple) else isinstance(values, list) and values):
                raise ValueError(
                    f"space[{name!r}]={values!r} must be a tuple of numbers (low, high) or a list of choices"
                )

    def search(self, space: Space) -> Asking:
        try:
            import optuna
        except ImportError:
            raise ImportError("strategy=\"optuna\" needs optuna: pip install 'steer-attention[search]'") from None
        sampler = getattr(optuna.samplers, self.sampler, None)
        if sampler is None:
            raise ValueError(f"optuna.samplers has no {self.sampler!r}; it has {', '.join(optuna.samplers.__all__)}")
        told = optuna.logging.get_verbosity()
        optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every study
        study = optuna.create_study(direction="maximize", sampler=sampler(seed=space.seed))
        optuna.logging.set_verbosity(told)
        found, top = Settings(), -math.inf
        for _ in range(self.count(space)):
            trial = study.ask()
            settings = {name: self._suggest(trial, name, values) for name, values in self.space.items()}
            score = (yield [Trial(settings)])[0]
            if math.isnan(score):
                break
            study.tell(trial, score)
            if score > top:
                found, top = settings, score
        return found

    def count(self, space: Space) -> int:
        return self.number if space.trials is None else space.trials

    @staticmethod
    def _suggest(trial: Any, name: str, values: Sequence[Any]) -> Any:
        if isinstance(values, list):  # by number: optuna's choices are plain values, ours may be lists and mappings
            return values[trial.suggest_categorical(name, range(len(values)))]
        low, high = values
        whole = isinstance(low, int) and isinstance(high, int)
        return trial.suggest_int(name, low, high) if whole else trial.suggest_float(name, low, high)


STRATEGIES: dict[str, type[Strategy]] = {cls.name: cls for cls in (HeadHunter, Sweep, RandomHeads, Optuna)}


def strategy_of(given: str | Strategy, options: Mapping[str, Any]) -> Strategy:
    """The strategy of that name with its options.

    Raises:
        ValueError: no such name.
        TypeError: options that it does not have, or options beside a strategy that is made already.
    """
    if isinstance(given, Strategy):
        if options:
            raise TypeError(f"{', '.join(options)}: give the options to the strategy, {type(given).__name__}(...)")
        return given
    if given not in STRATEGIES:
        raise ValueError(f"strategy={given!r} does not exist; choose from {', '.join(STRATEGIES)}, or pass a Strategy")
    names = [each.name for each in fields(STRATEGIES[given])]
    if unknown := [name for name in options if name not in names]:
        raise TypeError(f'{", ".join(unknown)}: strategy="{given}" has no such option; it has {", ".join(names)}')
    return STRATEGIES[given](**options)


def best(scores: Sequence[float]) -> list[int]:
    """Numbers of the trials from the highest score down; equal scores in their order, those not tried left out."""
    return sorted((i for i, score in enumerate(scores) if not math.isnan(score)), key=lambda i: -scores[i])


def _settings(heads: Sequence[Head], space: Space) -> Settings:
    """Of a choice of heads, in the order of the model."""
    chosen = {layer: sorted(head for name, head in heads if name == layer) for layer in space.layers}
    return {"layers": None, "heads": {layer: numbers for layer, numbers in chosen.items() if numbers}}


def _check_counts(**counts: int | None) -> None:
    for name, value in counts.items():
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ValueError(f"{name}={value!r} must be a whole number of at least 1")


def _check_space(strategy: Strategy, space: Any) -> None:
    if not isinstance(space, Mapping) or not space:
        raise ValueError(
            f'space={space!r}: strategy="{strategy.name}" needs fields of the method and what to try for each, '
            'e.g. {"scale": [1.0, 3.0], "layers": ["blocks.1", "blocks.2"]}'
        )


def _is_range(values: tuple[Any, ...]) -> bool:
    return len(values) == 2 and all(isinstance(value, (int, float)) for value in values) and values[0] <= values[1]


def _need_heads(space: Space, strategy: Strategy) -> None:
    if not space.heads:
        raise ValueError(f'strategy="{strategy.name}" chooses heads, which this method does not take; use "sweep"')
