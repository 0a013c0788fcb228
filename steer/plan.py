"""What a search finds for a model, the plan, and what a method's search has to say for `steer.calibrate`."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from steer.method import Method
from steer.select import listing


@dataclass(frozen=True, eq=False, repr=False)
class Plan:
    """What a search found for a model: tensors with an axis of layers, and what they are valid for.

    A method carries it in a field `plan: Plan | None = None`; `method.save(dir)` and `steer.load(dir)` keep it exactly.

    Args:
        sites: names of the layers' attention sites, in the order of the layer axis of every tensor.
        heads: query heads of each of these sites.
        grid: (frames, height, width) of the visual tokens that it was made for; None = any, its sizes are relative.
        text_tokens: text tokens in the same sequence that it was made for; None = any.
        block_size: tokens in a block of its masks; None = it has none, or they are made anew for every size.
        starts: fractions of the run at which the step groups begin; group g is the steps in [starts[g], starts[g + 1]).
        tensors: what was found, e.g. "mode": (G, L, H) int8 for G groups, L sites, H heads; the method says which.
        report: how it was found: data, seed, options, figures and versions, as JSON holds them.

    Raises:
        ValueError: step groups that do not begin at 0 and ascend, or sites that occur twice.
    """

    sites: tuple[str, ...]
    heads: int
    grid: tuple[int, int, int] | None = None
    text_tokens: int | None = None
    block_size: int | None = None
    starts: tuple[float, ...] = (0.0,)
    tensors: Mapping[str, torch.Tensor] = field(default_factory=dict)
    report: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        starts = self.starts
        if not starts or starts[0] != 0 or list(starts) != sorted(set(starts)) or starts[-1] >= 1:
            raise ValueError(f"starts={starts} must be fractions of the run that begin at 0, ascend and stay below 1")
        if len(set(self.sites)) != len(self.sites):
            raise ValueError(f"sites={self.sites} names a site twice")

    def group(self, step: int, num_steps: int | None) -> int:
        """The step group of a step, counted from 0; `num_steps` None: the length of the run is not known.

        Raises:
            ValueError: several groups, but no number of steps.
        """
        return step_group(self.starts, step, num_steps)

    def layer(self, site: str) -> int:
        """The place of a site on the layer axis.

        Raises:
            ValueError: the plan has nothing for that site.
        """
        if site not in self.sites:
            raise ValueError(f"this plan has nothing for {site}; it was made for:\n{listing(self.sites)}")
        return self.sites.index(site)

    def __repr__(self) -> str:
        grid = "any grid" if self.grid is None else "x".join(map(str, self.grid))
        groups = "" if len(self.starts) == 1 else f"{len(self.starts)} step groups, "
        return f"Plan({groups}{len(self.sites)} sites x {self.heads} heads, {grid}, {', '.join(sorted(self.tensors))})"


def step_group(starts: Sequence[float], step: int, num_steps: int | None) -> int:
    """See `Plan.group`."""
    if len(starts) == 1:
        return 0
    if not num_steps:
        raise ValueError(
            f"there are {len(starts)} step groups, but the number of steps of this run is unknown: use the pipeline, "
            "or a plan with one group"
        )
    slack = 1e-9 * num_steps
    return sum(step >= start * num_steps - slack for start in starts) - 1


@dataclass(kw_only=True)
class Search(Method, register=False):
    """What `steer.calibrate` applies in place of a method while the data runs: it looks, measures, and decides.

    A method can be calibrated if it defines `search(**options) -> Search`. Searches run uncompiled, so `attend` may
    read `call.site` and `call.run` in Python. Between samples and between processes, all that a search knows goes
    through `state` and `load_state`; a pipeline with two models applies one search to both (see `Method.resolved`: a
    copy has to share what it collects).
    """

    @property
    def passes(self) -> int:
        """How often the data has to run."""
        return 1

    def run(self, target: Any, sample: Mapping[str, Any], seed: int) -> None:
        """Run one sample through the target, to which this search is applied: a pipeline call, or one forward.

        Searches that need more of a model (tokens generated, a loss and its gradient, a batch of trials) override it.

        Args:
            target: the pipeline or model.
            sample: arguments of the pipeline, or of the model's forward.
            seed: of the pipeline's generator.
        """
        if isinstance(target, torch.nn.Module):
            with torch.no_grad():
                target(**copy.deepcopy(dict(sample)))  # some forwards change what they are given
            return
        arguments = {"generator": torch.Generator().manual_seed(seed), **sample}
        if "output_type" in inspect.signature(type(target).__call__).parameters:
            arguments = {"output_type": "latent", **arguments}  # nobody looks at the pictures
        target(**arguments)

    def start_pass(self, number: int) -> None:
        """The pass `number`, counted from 0, begins; not called again where a checkpoint resumes inside of it."""

    def state(self) -> dict[str, Any]:
        """All that was collected so far: tensors, and values as JSON holds them."""
        raise NotImplementedError(f"{type(self).__name__} defines no state()")

    def load_state(self, state: Mapping[str, Any]) -> None:
        """Continue from what `state` returned; its tensors are on the CPU."""
        raise NotImplementedError(f"{type(self).__name__} defines no load_state(state)")

    def figure(self) -> str:
        """The result so far in a few words, for the progress bar."""
        return ""

    def finish(self) -> Method:
        """The method with what was found; the data has run `passes` times."""
        raise NotImplementedError(f"{type(self).__name__} defines no finish()")
