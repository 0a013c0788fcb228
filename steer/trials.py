"""Trials: a method with other settings, drawn on all samples and scored by an objective; many heads in one batch."""

from __future__ import annotations

import copy
import dataclasses
import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack
from typing import Any

import torch
from diffusers import DiffusionPipeline

from steer.apply import apply
from steer.bind import bind
from steer.method import Method
from steer.samples import can_repeat, check_samples, repeated
from steer.select import by_row, select
from steer.strategies import Settings, Space, Strategy, Trial
from steer.trial_record import WITHOUT, key_of, mean_of, record_of
from steer_patches.blocks import find_blocks
from steer_patches.family import family_of
from steer_patches.sites import find_sites, plain

Objective = Callable[[Any, Sequence[Any]], Any]


class Trials:
    """One search over settings: asks the strategy, draws, scores and remembers. Made by `steer.calibrate`.

    Args:
        target: the pipeline or model.
        models: its models, see `steer.bind.models_of`.
        method: the one whose settings are searched.
        samples: arguments of the pipeline, or of the model's forward; sample i is drawn with seed + i in every trial.
        objective: (pictures, prompts) -> a score for each, higher is better. Pictures are a tensor (N, 3, H, W) in
            [0, 1], clips (N, T, 3, H, W); prompts the samples' "prompt". Of a bare model: ([output], [sample]).
        strategy: what is tried.
        seed: of the first sample, and of a strategy that draws.
        trials: budget, None = none.
        batch: heads tried in one batch, where method and pipeline can; None = as many as a layer has.
    """

    def __init__(
        self,
        target: Any,
        models: Mapping[str, torch.nn.Module],
        method: Method,
        samples: Sequence[Mapping[str, Any]],
        objective: Objective,
        strategy: Strategy,
        *,
        seed: int = 0,
        trials: int | None = None,
        batch: int | None = None,
    ) -> None:
        for name, value in (("trials", trials), ("batch", batch)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name}={value!r} must be a whole number of at least 1")
        self.target, self.models, self.method, self.samples = target, models, method, samples
        self.objective, self.strategy, self.seed, self.budget = objective, strategy, seed, trials
        self.sites, self.space = _space(target, models, method, seed, trials)
        check_samples(target, samples)
        if batch is not None and batch > 1 and not self._can_batch():
            raise ValueError(
                f"batch={batch}: {type(method).__name__} on a {type(target).__name__} is tried one at a time; leave "
                "batch out. Guidance methods share batches, on pipelines whose model computes their rows together"
            )
        _check_fields(method, strategy)
        self.batch = batch if batch is not None else max((site.heads for site in self.sites), default=1)
        self.scores: dict[str, torch.Tensor] = {}  # settings -> (M,) float64, not a number where not drawn yet
        self.asked: list[list[Trial]] = []
        self.found: Settings | None = None

    @property
    def total(self) -> int | None:
        """Pictures that will be drawn, as far as is known: samples times trials, and one round without the method.

        What was found is drawn at the end, outside of the budget, where it was not a trial itself.
        """
        count = self.strategy.count(self.space)
        if count is None:
            return None
        return max((min(count, self.budget or count) + 1) * len(self.samples), self.done)

    @property
    def done(self) -> int:
        """Pictures drawn so far."""
        return sum(int((~row.isnan()).sum()) for row in self.scores.values())

    def run(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Do all the work; comes back after every batch of pictures. What is missing once `is_over` stays undrawn."""
        asking = self.strategy.search(self.space)
        trials = next(asking, [])  # before anything is drawn: what cannot be searched says so at once
        if not trials:
            raise ValueError(f"{type(self.strategy).__name__} asks for no trial, so there is nothing to search")
        self._check(trials)
        if self.method.is_neutral() and all(self._with(trial.settings).is_neutral() for trial in trials):
            raise ValueError(f"{self.method.describe()} edits nothing, so there is nothing to calibrate")
        yield from self._draw([Trial({})], is_over, plain=True)
        while True:
            allowed = self._allowed(trials)
            self.asked.append(trials)
            yield from self._draw(allowed, is_over)
            try:
                trials = asking.send([mean_of(self.scores, trial) for trial in trials])
            except StopIteration as stop:
                self.found = stop.value
                yield from self._draw([Trial(self.found)], is_over)  # heads chosen together may not have been a trial
                return
            self._check(trials)

    def _check(self, trials: Sequence[Trial]) -> None:
        """Raise where settings are not the method's, or fit no layer of the model."""
        for trial in trials:
            method = self._with(trial.settings)
            if trial.head is None:  # heads come from the model's own table
                bind(method, dict(self.models), isinstance(self.target, DiffusionPipeline))

    def _allowed(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that the budget has room for; what was tried before costs nothing."""
        if self.budget is None:
            return list(trials)
        keys = dict.fromkeys(key_of(trial.settings) for asked in [*self.asked, trials] for trial in asked)
        within = set(list(keys)[: self.budget])
        return [trial for trial in trials if key_of(trial.settings) in within]

    def _draw(self, trials: Sequence[Trial], is_over: Callable[[], bool], plain: bool = False) -> Iterator[None]:
        """Draw and score what is missing of these trials, chunk after chunk, so that whole trials come first."""
        for chunk in self._chunks(trials):
            wanted = {WITHOUT: None} if plain else {key_of(t.settings): self._with(t.settings) for t in chunk}
            for index, sample in enumerate(self.samples):
                missing = [key for key in wanted if not self._has(key, index)]
                size = max(1, len(missing)) if can_repeat(sample) else 1
                for keys in (missing[start : start + size] for start in range(0, len(missing), size)):
                    if is_over():
                        return
                    scores = self._score([wanted[key] for key in keys], index)
                    self._keep(keys, index, scores)
                    yield

    def _has(self, key: str, index: int) -> bool:
        return key in self.scores and not bool(self.scores[key][index].isnan())

    def _keep(self, keys: Sequence[str], index: int, scores: Sequence[float]) -> None:
        for key, score in zip(keys, scores, strict=True):
            if not math.isfinite(score):
                settings = "no method" if key == WITHOUT else key
                raise ValueError(
                    f"the objective gave {score} for sample {index} with {settings}; a score must be finite"
                )
        for key, score in zip(keys, scores, strict=True):
            row = self.scores.setdefault(key, torch.full((len(self.samples),), math.nan).double())
            row[index] = score

    def _chunks(self, trials: Sequence[Trial]) -> Iterator[list[Trial]]:
        """Runs of different trials that may share a batch: they differ in their heads alone."""
        chunk: list[Trial] = []
        room = self.batch if self._can_batch() else 1
        for trial in {key_of(trial.settings): trial for trial in trials}.values():
            if chunk and not (len(chunk) < room and _but_heads(chunk[0]) == _but_heads(trial)):
                yield chunk
                chunk = []
            chunk.append(trial)
        if chunk:
            yield chunk

    def _can_batch(self) -> bool:
        """Whether the pictures of a batch may have heads of their own."""
        families = [family_of(plain(model)) for model in self.models.values()]
        splits = any(family is not None and family.splits_rows for family in families)
        return isinstance(self.target, DiffusionPipeline) and self.method.heads_by_row and not splits

    def _with(self, settings: Settings) -> Method:
        try:
            return dataclasses.replace(self.method, **settings)
        except TypeError as error:  # a value that cannot even be compared
            raise TypeError(f"{type(self.method).__name__} cannot take {key_of(settings)}: {error}") from error

    def _score(self, methods: Sequence[Method | None], index: int) -> list[float]:
        """Draw one sample with each of the methods, in one batch; scores of the pictures."""
        first, count = methods[0], len(methods)
        with ExitStack() as steered:
            if first is not None:
                heads: Any = [method.heads for method in methods if method is not None]
                steered.enter_context(
                    apply(self.target, first if count == 1 else dataclasses.replace(first, heads=heads))
                )
            pictures, prompts = self._run(self.samples[index], self.seed + index, count)
        return _scores(self.objective(pictures, prompts), count)

    def _run(self, sample: Mapping[str, Any], seed: int, count: int) -> tuple[Any, list[Any]]:
        """What the objective sees of a sample that is drawn `count` times."""
        if not isinstance(self.target, DiffusionPipeline):
            with torch.no_grad():
                return [self.target(**copy.deepcopy(dict(sample)))], [sample]
        generators = [torch.Generator().manual_seed(seed) for _ in range(count)]
        if count == 1:
            pictures = self.target(**{"output_type": "pt", "generator": generators[0], **sample})[0]
        else:
            pictures = self.target(**{"output_type": "pt", "generator": generators, **repeated(sample, count)})[0]
        if len(pictures) != count:
            raise ValueError(
                f"the pipeline drew {len(pictures)} pictures where {count} were due; a sample is one picture"
            )
        if isinstance(pictures, torch.Tensor):
            pictures = pictures.detach().to(torch.promote_types(pictures.dtype, torch.float32))
        return pictures, [sample.get("prompt")] * count

    def state(self) -> dict[str, Any]:
        return {"keys": list(self.scores), "scores": torch.stack(list(self.scores.values()))}

    def load_state(self, state: Mapping[str, Any]) -> None:
        self.scores = dict(zip(state["keys"], state["scores"].clone(), strict=True))

    def figure(self) -> str:
        """The best trial so far against the target as it is."""
        plain = self.scores.get(WITHOUT)
        means = [float(row.mean()) for key, row in self.scores.items() if key != WITHOUT and not row.isnan().any()]
        if plain is None or not means:
            return ""
        return f"best {max(means):.4g}, without {float(plain.mean()):.4g}"

    def finish(self) -> Method:
        """The method with the best settings, and a record of all trials.

        Raises:
            ValueError: the budget was over before any trial was whole.
        """
        whole = [t for asked in self.asked for t in asked if not math.isnan(mean_of(self.scores, t))]
        if self.found is None or not whole:
            raise ValueError(
                "the budget was over before one trial had drawn every sample: give more seconds, or fewer samples"
            )
        if all(torch.equal(self.scores[key_of(trial.settings)], self.scores[WITHOUT]) for trial in whole):
            warnings.warn(
                f"no trial changed any score, so these settings of {type(self.method).__name__} are as good as any: is "
                "it on in such short runs (see steps), does it reach that many tokens, can the objective tell?",
                stacklevel=3,
            )
        fitted = self._with(self.found)
        fitted.__dict__["_record"] = record_of(self.sites, self.asked, self.scores, self.found)
        return fitted


def _but_heads(trial: Trial) -> Any:
    """What must be the same for trials to share a batch; of trials without a mapping of heads, nothing is the same."""
    settings = trial.settings
    if not isinstance(settings.get("heads"), Mapping) or not settings["heads"]:
        return object()
    return {name: value for name, value in settings.items() if name != "heads"}


def _scores(given: Any, count: int) -> list[float]:
    """What an objective returned, as numbers."""
    try:
        found = torch.as_tensor(given).detach().double().flatten().tolist()
    except (TypeError, ValueError, RuntimeError) as error:
        raise TypeError(
            f"the objective returned a {type(given).__name__}; it must return one score for each picture"
        ) from error
    if len(found) != count:
        raise ValueError(f"the objective gave {len(found)} scores for {count} pictures; it must give one for each")
    return found


def _check_fields(method: Method, strategy: Strategy) -> None:
    """Raise where a strategy's `space` names a field that the method does not have."""
    known = [field.name for field in dataclasses.fields(method) if field.init]
    wrong = [name for name in getattr(strategy, "space", None) or () if name not in known]
    if wrong:
        raise TypeError(f"space={wrong}: {type(method).__name__} has no such field; it has {', '.join(known)}")


def _space(
    target: Any, models: Mapping[str, torch.nn.Module], method: Method, seed: int, trials: int | None
) -> tuple[list[Any], Space]:
    """The sites that the method can act on, and what a strategy chooses from."""
    has_clock = isinstance(target, DiffusionPipeline)
    model = plain(next(iter(models.values())))
    if getattr(method, "skips_blocks", False):
        blocks = [block.name for block in find_blocks(model, family_of(model)) if block.stage.returns]
        names = blocks if method.layers is None else select(method.layers, blocks, "blocks")
        return [], Space(tuple(names), (), seed, trials)
    if by_row(method.heads):
        raise ValueError("heads has a mapping for each picture; a search starts from one choice of heads, or None")
    able = [site for site in find_sites(model) if site.kind in method.kinds and site.ports]
    widest = method
    if method.layers is None and method.heads is None:
        widest = dataclasses.replace(method, layers=[site.name for site in able])
    bindings = bind(widest, dict(models), has_clock)
    if not bindings:
        raise ValueError(f"{method.describe()} edits nothing, so there is nothing to calibrate")
    masks = bindings[0].sites
    sites = [site for site in able if site.name in masks]
    heads = [
        (site.name, head)
        for site in sites
        for head in range(site.heads)
        if masks[site.name] is None or bool(masks[site.name][head])  # type: ignore[index]
    ]
    return sites, Space(tuple(site.name for site in sites), tuple(heads), seed, trials)
