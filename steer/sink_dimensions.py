"""The dimensions in which the states of attention sinks are massive: how massive, which are known, and their search."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

import torch

from steer.layer_inputs import look_at_input
from steer.method import Method
from steer.plan import Plan, Search
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

if TYPE_CHECKING:
    from steer.methods.var import VAR

# class of the model without its ending, kind of its language model, hidden size, layers, thousands of words
KNOWN: Mapping[tuple[str, str, int, int, int], tuple[int, ...]] = {
    ("Llava", "llama", 4096, 32, 32): (1415, 2533),  # LLaVA-1.5-7B
    ("Llava", "llama", 5120, 40, 32): (2100, 4743),  # LLaVA-1.5-13B
    ("Qwen2VL", "qwen2_vl_text", 3584, 28, 152): (458, 2570),  # Qwen2-VL-7B
}
TEXT, VISUAL = 0, 1


def massiveness(states: torch.Tensor, dims: Sequence[int]) -> torch.Tensor:
    """(B, S): phi of hidden states (B, S, C), the largest of these dimensions relative to the mean square of all."""
    return normalised(states)[..., list(dims)].amax(-1)


def normalised(states: torch.Tensor) -> torch.Tensor:
    """|x| / sqrt(mean(x^2) + 1e-6) of hidden states (..., C), in float32 or float64: a norm without its weight."""
    states = states.detach()
    states = states if states.dtype == torch.float64 else states.float()
    return states.abs() * torch.rsqrt(states.square().mean(-1, keepdim=True) + 1e-6)


def known_dims(model: torch.nn.Module) -> tuple[int, ...] | None:
    """The published sink dimensions of a model, see `KNOWN`; None where there are none."""
    text, name = text_config(model), type(model).__name__
    name = name.removesuffix("ForConditionalGeneration").removesuffix("Model")
    words = round(text.vocab_size / 1000)
    return KNOWN.get((name, text.model_type, text.hidden_size, text.num_hidden_layers, words))


def text_config(model: torch.nn.Module) -> Any:
    """The configuration of a model's language part."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


@dataclass
class Seen:
    """What was collected so far, of L sites and C dimensions.

    Args:
        sites: names of the sites.
        apart: (C,) float64, the least ratio of any prompt, see `SinkSearch`.
        massive: (C,) float64, the same against the median of all dimensions alone.
        first: (L,) float64, phi of the first token, the least of any prompt.
        counts: (L, 2, bins) int64, the other tokens of text and of pictures by floor(phi).
        prompts: rows seen in the first pass.
        passes: that are complete.
    """

    sites: list[str] = field(default_factory=list)
    apart: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    massive: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    first: torch.Tensor = field(default_factory=lambda: torch.zeros(0))
    counts: torch.Tensor = field(default_factory=lambda: torch.zeros(0, dtype=torch.int64))
    prompts: int = 0
    passes: int = 0


@dataclass(kw_only=True)
class SinkSearch(Search, register=False):
    """Look for the sink dimensions of a model: made by `VAR.search`, run by `steer.calibrate`.

    The first token of a text is a sink in nearly all models, so a sink dimension is massive there, and at few other
    tokens. With n = |x| / sqrt(mean(x^2) + 1e-6) at the input of a layer, the ratio of dimension d in a prompt is

        n_d of the first token / max(median of n over tokens and dimensions, median of n_d over the other tokens)

    taken as the median of the middle half of the layers. Dimensions whose ratio is at least `ratio` in every prompt
    are sink dimensions. A second pass over the data counts which tokens have which phi in them, so that the plan of the
    result shows whether tau tells sinks from other tokens; a method with `sink_dims` keeps these, and has them counted.

    The plan has "first" (L,), phi of the first token, and "text" and "visual" (L, bins), how many other tokens have a
    phi in [b, b + 1).

    Args:
        given: the method to fit.
        ratio: how many times more massive than elsewhere. With orders of magnitude between massive activations and
            others (Sun et al., arXiv 2402.17762) and at most five or so in random states, 20 is far from both.
    """

    given: VAR
    ratio: float = 20.0
    seen: Seen = field(default_factory=Seen)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_pictures: ClassVar[bool] = True
    needs_blocks: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.ratio <= 1:
            raise ValueError(f"ratio={self.ratio} must be above 1: how many times more massive than elsewhere")
        self._apart: list[torch.Tensor] = []  # of the forward in flight: a layer's (B, C)
        self._massive: list[torch.Tensor] = []

    @classmethod
    def of(cls, method: VAR, **options: Any) -> SinkSearch:
        """The search of a method; it looks at all layers, whichever the method edits."""
        return cls(given=method, layers="*", **options)

    @property
    def passes(self) -> int:
        return 2

    def resolved(self, family: Family | None, has_clock: bool) -> SinkSearch:
        return self

    def start_pass(self, number: int) -> None:
        self.seen.passes = number

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        text, seen = scope.text, self.seen
        if text is None or text.past or text.pictures is None:
            raise ValueError(
                "a sample of VAR's search is a prompt with a picture: a dict of the arguments that the model's "
                "processor makes (input_ids, pixel_values, ...), without a cache"
            )
        seen.sites = list(sites)
        shows = text.pictures.shows
        real = torch.ones_like(shows) if text.valid is None else text.valid
        if int(real.sum(-1).min()) < 2:
            raise ValueError("a prompt of one token has nothing to compare its first token with")
        quarter = len(sites) // 4
        self._apart, self._massive = [], []
        for number, (site, _) in enumerate(sites.values()):
            middle = quarter <= number < len(sites) - quarter
            if seen.passes == 1:
                look_at_input(scope, site, partial(self._count, number, real, shows))
            elif middle:
                look_at_input(scope, site, partial(self._compare, real))

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        return next(call)

    def run(self, target: Any, sample: Mapping[str, Any], seed: int) -> None:
        super().run(target, sample, seed)
        if self.seen.passes == 0:
            self._note()

    def _compare(self, real: torch.Tensor, states: torch.Tensor) -> None:
        """The first token of each row with its others."""
        apart, massive = [], []
        for row, there in zip(normalised(states), real.to(states.device), strict=True):
            row = row[there].double()
            usual = row.median()
            massive.append(row[0] / usual)
            apart.append(row[0] / torch.maximum(usual, row[1:].median(0).values))
        self._apart.append(torch.stack(apart).cpu())
        self._massive.append(torch.stack(massive).cpu())

    def _note(self) -> None:
        for name, layers in (("apart", self._apart), ("massive", self._massive)):
            least = torch.stack(layers).median(0).values.amin(0)
            before = getattr(self.seen, name)
            setattr(self.seen, name, torch.minimum(before, least) if self.seen.prompts else least)
        self.seen.prompts += len(self._apart[0])

    def _count(self, layer: int, real: torch.Tensor, shows: torch.Tensor, states: torch.Tensor) -> None:
        seen, bins = self.seen, math.ceil(math.sqrt(states.shape[-1])) + 1
        if not len(seen.first):
            seen.first = torch.full((len(seen.sites),), torch.inf, dtype=torch.float64)
            seen.counts = torch.zeros(len(seen.sites), 2, bins, dtype=torch.int64)
        phi, real, shows = massiveness(states, self.counted()).double().cpu(), real.cpu(), shows.cpu()
        first = real & (real.cumsum(-1) == 1)
        seen.first[layer] = torch.minimum(seen.first[layer], phi[first].amin())
        for which, marked in ((TEXT, real & ~first & ~shows), (VISUAL, real & shows)):
            seen.counts[layer, which] += torch.bincount(phi[marked].long(), minlength=bins)

    def found(self) -> tuple[int, ...]:
        """The dimensions that are apart from all others, the most massive first."""
        order = self.seen.massive.argsort(descending=True).tolist()
        return tuple(d for d in order if self.seen.apart[d] >= self.ratio)

    def counted(self) -> tuple[int, ...]:
        """The dimensions whose phi is counted: those given, or found, or else the most massive one."""
        return tuple(self.given.sink_dims or self.found()) or (int(self.seen.massive.argmax()),)

    def state(self) -> dict[str, Any]:
        return dict(vars(self.seen))

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.seen, name, value)

    def figure(self) -> str:
        if not self.seen.prompts:
            return ""
        best = int(self.seen.apart.argmax())
        return f"dimension {best} {self.seen.apart[best]:.1f} times others"

    def finish(self) -> Method:
        seen, dims, counted = self.seen, self.given.sink_dims or self.found(), self.counted()
        text, visual = seen.counts[:, TEXT], seen.counts[:, VISUAL]
        figures = {
            "sink dimensions": ", ".join(map(str, dims)) or "none found",
            "ratio wanted": self.ratio,
            **{f"ratio of dimension {d}": round(float(seen.apart[d]), 2) for d in counted},
            **{f"dimension {d} of the first token to the median": round(float(seen.massive[d]), 1) for d in counted},
            "phi counted in dimensions": ", ".join(map(str, counted)),
            "prompts": seen.prompts,
            "phi of the first token, least of any layer": round(float(seen.first.min()), 2),
            "phi of the first token, largest of any layer": round(float(seen.first.max()), 2),
            **_spread("other text tokens", text, self.given.tau),
            **_spread("visual tokens", visual, self.given.tau),
        }
        plan = Plan(
            sites=tuple(seen.sites),
            heads=1,
            tensors={"first": seen.first.float(), "text": text, "visual": visual},
            report={"figures": figures},
        )
        if not dims:
            best = int(seen.massive.argmax())
            warnings.warn(
                f"none found: no dimension is {self.ratio:g} times more massive at the first token than elsewhere. "
                f"Dimension {best} is the most massive there, {seen.massive[best]:.0f} times the median, and "
                f"{seen.apart[best]:.1f} times what it or the median is at other tokens. VAR edits nothing; "
                "plan.report of the result says which phi was seen",
                stacklevel=3,
            )
        return replace(self.given, sink_dims=tuple(dims), plan=plan)


def _spread(name: str, counts: torch.Tensor, tau: float) -> dict[str, Any]:
    """What a table (L, bins) of counts says about tau, in a few figures."""
    total, bins = counts.sum(0), torch.arange(counts.shape[-1])
    largest = int(bins[total > 0].max()) + 1 if bool(total.any()) else 0
    above = counts[:, bins >= math.ceil(tau)].sum() / max(int(total.sum()), 1)
    middle = int((total.cumsum(0) * 2 >= total.sum()).int().argmax())
    return {
        f"phi of {name}, largest below": largest,
        f"phi of {name}, median in": f"[{middle}, {middle + 1})",
        f"share of {name} above tau = {tau:g}, rounded up": round(float(above), 4),
    }
