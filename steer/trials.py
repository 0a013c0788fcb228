"""Trials: a method with other settings, drawn on all samples and scored by an objective; many heads in one batch."""

from __future__ import annotations

import copy
import dataclasses
import inspect
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from diffusers import DiffusionPipeline

from steer.apply import apply
from steer.bind import bind
from steer.method import Method
from steer.plan import Plan
from steer.statistics import mean_interval
from steer.strategies import Settings, Space, Strategy, Trial, head_table
from steer_patches.blocks import find_blocks
from steer_patches.family import family_of
from steer_patches.sites import find_sites, plain

Objective = Callable[[Any, Sequence[Any]], Any]
COUNTS = ("num_images_per_prompt", "num_videos_per_prompt")  # how pipelines call it
WITHOUT = "without"  # the key of the target as it is


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
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        self.target, self.models, self.method, self.samples = target, models, method, samples
        self.objective, self.strategy, self.seed, self.budget = objective, strategy, seed, trials
        self.sites, self.space = _space(target, models, method, seed, trials)
        self.count_argument = _count_argument(target, samples)
        self.batch = batch if batch is not None else max((site.heads for site in self.sites), default=1)
        self.scores: dict[str, torch.Tensor] = {}  # settings -> (M,) float64, not a number where not drawn yet
        self.asked: list[list[Trial]] = []
        self.found: Settings | None = None

    @property
    def total(self) -> int | None:
        """Pictures that will be drawn, as far as is known: samples times trials, and one round without the method."""
        count = self.strategy.count(self.space)
        if count is None:
            return None
        return (min(count, self.budget or count) + 1) * len(self.samples)

    @property
    def done(self) -> int:
        """Pictures drawn so far."""
        return sum(int((~row.isnan()).sum()) for row in self.scores.values())

    def run(self, is_over: Callable[[], bool]) -> Iterator[None]:
        """Do all the work; comes back after every batch of pictures. What is missing once `is_over` stays undrawn."""
        yield from self._draw([Trial({})], is_over, plain=True)
        asking = self.strategy.search(self.space)
        scores: list[float] | None = None
        while True:
            try:
                trials = next(asking) if scores is None else asking.send(scores)
            except StopIteration as stop:
                self.found = stop.value
                return
            allowed = self._allowed(trials)
            self.asked.append(trials)
            yield from self._draw(allowed, is_over)
            scores = [self._mean(trial) for trial in trials]

    def _allowed(self, trials: Sequence[Trial]) -> list[Trial]:
        """Those that the budget has room for; what was tried before costs nothing."""
        if self.budget is None:
            return list(trials)
        keys = dict.fromkeys(_key(trial.settings) for asked in [*self.asked, trials] for trial in asked)
        within = set(list(keys)[: self.budget])
        return [trial for trial in trials if _key(trial.settings) in within]

    def _draw(self, trials: Sequence[Trial], is_over: Callable[[], bool], plain: bool = False) -> Iterator[None]:
        """Draw and score what is missing of these trials, chunk after chunk, so that whole trials come first."""
        for chunk in self._chunks(trials):
            keys = [WITHOUT if plain else _key(trial.settings) for trial in chunk]
            rows = [self.scores.setdefault(key, torch.full((len(self.samples),), math.nan).double()) for key in keys]
            for index in range(len(self.samples)):
                missing = [i for i, row in enumerate(rows) if bool(row[index].isnan())]
                if not missing:
                    continue
                if is_over():
                    return
                methods = None if plain else [self._with(chunk[i].settings) for i in missing]
                scores = self._score(methods, index, len(missing))
                for i, score in zip(missing, scores, strict=True):
                    if not math.isfinite(score):
                        raise ValueError(f"the objective gave {score} for sample {index} with {keys[i]}")
                    rows[i][index] = score
                yield

    def _chunks(self, trials: Sequence[Trial]) -> Iterator[list[Trial]]:
        """Runs of different trials that may share a batch: they differ in their heads alone."""
        chunk: list[Trial] = []
        for trial in {_key(trial.settings): trial for trial in trials}.values():
            if chunk and not (len(chunk) < self._room() and _but_heads(chunk[0]) == _but_heads(trial)):
                yield chunk
                chunk = []
            chunk.append(trial)
        if chunk:
            yield chunk

    def _room(self) -> int:
        return self.batch if self.count_argument and self.method.heads_by_row else 1

    def _with(self, settings: Settings) -> Method:
        return dataclasses.replace(self.method, **settings)

    def _score(self, methods: Sequence[Method] | None, index: int, count: int) -> list[float]:
        """Draw one sample with each of the methods, in one batch; scores of the pictures."""
        sample = self.samples[index]
        if methods is None:
            steered: Any = nullcontext()
        elif count == 1:
            steered = apply(self.target, methods[0])
        else:
            heads: Any = [method.heads for method in methods]
            steered = apply(self.target, dataclasses.replace(methods[0], heads=heads))
        with steered:
            pictures, prompts = self._run(sample, self.seed + index, count)
        scores = self.objective(pictures, prompts)
        found = torch.as_tensor(scores).detach().double().flatten().tolist()
        if len(found) != count:
            raise ValueError(f"the objective gave {len(found)} scores for {count} pictures; it must give one for each")
        return found

    def _run(self, sample: Mapping[str, Any], seed: int, count: int) -> tuple[Any, list[Any]]:
        """What the objective sees of a sample that is drawn `count` times."""
        if not isinstance(self.target, DiffusionPipeline):
            with torch.no_grad():
                return [self.target(**copy.deepcopy(dict(sample)))], [sample]
        generators = [torch.Generator().manual_seed(seed) for _ in range(count)]
        arguments = {"output_type": "pt", "generator": generators[0], **sample}
        if count > 1 and self.count_argument:
            arguments |= {"generator": generators, self.count_argument: count}
        pictures = self.target(**arguments)[0]
        if isinstance(pictures, torch.Tensor):
            pictures = pictures.detach().float()
        return pictures, [sample.get("prompt")] * count

    def _mean(self, trial: Trial) -> float:
        row = self.scores.get(_key(trial.settings))
        return math.nan if row is None or bool(row.isnan().any()) else float(row.mean())

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
        if self.found is None or not any(not math.isnan(self._mean(t)) for asked in self.asked for t in asked):
            raise ValueError(
                "the budget was over before one trial had drawn every sample: give more seconds, or fewer samples"
            )
        fitted = self._with(self.found)
        fitted.__dict__["_record"] = self._record()
        return fitted

    def _record(self) -> Plan:
        """All scores, a table of layers and heads for each round of single heads, and the figures."""
        sites = tuple(site.name for site in self.sites)
        width = max((site.heads for site in self.sites), default=0)
        plain, found = self.scores[WITHOUT], self.found or {}
        tables: dict[str, torch.Tensor] = {}
        for trials in self.asked:
            single = {t.head: self._mean(t) - float(plain.mean()) for t in trials if t.head is not None}
            if single:
                tables[f"gain_{len(tables) + 1}"] = head_table(single, sites, width)
        if isinstance(found.get("heads"), Mapping) and sites:
            chosen = {(site, head): 1.0 for site, heads in found["heads"].items() for head in heads}
            tables["chosen"] = head_table(chosen, sites, width).nan_to_num(0.0).to(torch.int8)
        tables["scores"] = torch.stack(list(self.scores.values()))
        trials = [trial for asked in self.asked for trial in asked]
        whole = {_key(t.settings): t for t in trials if not math.isnan(self._mean(t))}
        rows = [self._row(key, t, number) for number, (key, t) in enumerate(whole.items())]
        return Plan(
            sites=sites,
            heads=width,
            tensors=tables,
            report={
                "names": {"chosen": ["left alone", "chosen"]},
                "keys": list(self.scores),
                "trials": sorted(rows, key=lambda row: -row["score"]),
                "figures": {
                    "score without": float(plain.mean()),
                    "trials": len(whole),
                    "trials asked for": len({_key(trial.settings) for trial in trials}),
                    "pictures drawn": self.done,
                },
            },
        )

    def _row(self, key: str, trial: Trial, number: int) -> dict[str, Any]:
        """One trial for the report: its score, and its gain over the target as it is, sample by sample."""
        scores = self.scores[key]
        gain, (low, high) = mean_interval(scores - self.scores[WITHOUT])
        head = None if trial.head is None else list(trial.head)
        return {"number": number, "settings": key, "head": head, "score": float(scores.mean())} | {
            "gain": gain,
            "low": low,
            "high": high,
        }


def _key(settings: Settings) -> str:
    """The settings as text, which tells trials apart."""
    return ", ".join(f"{name}={value!r}" for name, value in settings.items())


def _but_heads(trial: Trial) -> Any:
    """What must be the same for trials to share a batch; of trials without a mapping of heads, nothing is the same."""
    settings = trial.settings
    if not isinstance(settings.get("heads"), Mapping) or not settings["heads"]:
        return object()
    return {name: value for name, value in settings.items() if name != "heads"}


def _space(
    target: Any, models: Mapping[str, torch.nn.Module], method: Method, seed: int, trials: int | None
) -> tuple[list[Any], Space]:
    """The sites that the method can act on, and what a strategy chooses from."""
    has_clock = isinstance(target, DiffusionPipeline)
    model = plain(next(iter(models.values())))
    if getattr(method, "skips_blocks", False):
        blocks = [block.name for block in find_blocks(model, family_of(model)) if block.stage.returns]
        return [], Space(tuple(blocks), (), seed, trials)
    able = [site for site in find_sites(model) if site.kind in method.kinds and site.ports]
    widest = method
    if method.layers is None and method.heads is None:
        widest = dataclasses.replace(method, layers=[site.name for site in able])
    bindings = bind(widest, dict(models), has_clock)
    if not bindings or method.is_neutral():
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


def _count_argument(target: Any, samples: Sequence[Mapping[str, Any]]) -> str | None:
    """The pipeline's argument that draws a prompt several times; None where it has none.

    Raises:
        TypeError: a sample that holds several prompts, or sets that argument.
    """
    if not isinstance(target, DiffusionPipeline):
        return None
    known = inspect.signature(type(target).__call__).parameters
    argument = next((name for name in COUNTS if name in known), None)
    for sample in samples:
        if argument in sample:
            raise TypeError(f"data must leave out {argument}: calibrate sets it")
        if isinstance(sample.get("prompt"), (list, tuple)):
            raise TypeError("a sample is one prompt; give a list of prompts as a list of samples")
    return argument
