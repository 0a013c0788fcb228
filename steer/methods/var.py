"""VAR, visual attention redistribution: heads that look at pictures move attention from sinks to what pictures show."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F

from steer.bind import CompositionError
from steer.layer_inputs import look_at_input
from steer.method import Method, Span
from steer.methods.act import chosen
from steer.plan import Plan
from steer.query_row import brought, last_tokens, row_output, row_scores, with_rows, writing
from steer.sink_dimensions import KNOWN, SinkSearch, known_dims, massiveness, text_config
from steer.windowed import is_softmax
from steer_kernels import partial
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

ROWS = 512  # queries that are edited at a time: what they see is one byte for each key

Sites = Mapping[str, tuple[Site, torch.Tensor | None]]


@dataclass(kw_only=True)
class VAR(Method):
    """Redistribute visual attention: in heads that look at a picture, sinks give a share to the other visual tokens.

    Sinks are known by a few dimensions of the language model in which their states are massive. With x the states
    that enter a layer, before its norm:

        phi(x) = max over d in sink_dims of |x_d| / sqrt(mean(x^2) + 1e-6)           a sink has phi > tau

    found for each layer once, when a prompt or a picture arrives; later tokens are no sinks. With P a row of the
    softmax map, V the visual tokens, Z all sinks (those of the text too) and N = V without Z:

        v = sum P[V],  z = sum P[V and Z]
        the row is edited if  v >= v_min,  (v - z) / v >= rho  and it sees a visual sink
        P'[Z] = p * P[Z]
        P'[j] = P[j] * (1 + (1 - p) * sum P[Z] / sum P[N])                            for j in N

    and all other tokens keep theirs, so that rows still sum to 1. No map is made of a prompt: with A_Z, O_Z, O_N the
    mass of the sinks and the attention to the sinks alone and to N alone, O' = O + (1 - p) * A_Z * (O_N - O_Z), where O
    is the model's own output, which rows and heads that are not edited keep exactly. Rows of the map are those of text
    after the first picture, and of every later token. Texts of a batch without a picture stay as they are.

    Args:
        p: share of their attention that sinks keep, as in the published code; in the paper p is the share that is
            moved. 1 = off.
        rho: least share of a head's visual attention that is on no sink; about 0.5 is advised against hallucination,
            0.8 for general questions, 0.9 for questions about details.
        v_min: least attention to visual tokens.
        tau: how massive a sink is; at most sqrt(hidden size), so 20 means little in small models.
        sink_dims: the dimensions; None = those published for the model (LLaVA-1.5 7B and 13B, Qwen2-VL-7B), an error
            for others: `steer.calibrate(model, VAR(), prompts)` looks for them. () = none, nothing is edited.
        dense_layers: first layers that stay as they are, unless `layers` or `heads` name layers. The paper leaves out
            the last layer too; the published code, whose figures are reported, does not, nor does this.
        steps: without the prompt (step 0) no sinks are found, and nothing is edited.
        plan: what the search saw, for its report.

    Raises:
        CompositionError: a model whose sink dimensions are not known, or that has fewer dimensions.
        ValueError: attention that is no plain softmax (a softcap, a learned sink, dropout).

    The code adds 1e-6 to each weight below the fraction in its rule for heads; here it is the fraction itself. Several
    pictures, for which nothing is published, count as one: V is all their tokens that the row sees.

    Source: Kang et al., "See What You Are Told: Visual Attention Sink in Large Multimodal Models", arXiv 2503.03321,
    and its code, seilk/VisAttnSink.
    """

    p: Annotated[float, Span(0, 1)] = 0.6
    rho: Annotated[float, Span(0, 1)] = 0.8
    v_min: Annotated[float, Span(0, 1)] = 0.2
    tau: Annotated[float, Span(1, 60)] = 20.0
    sink_dims: Sequence[int] | None = None
    dense_layers: Annotated[int, Span(0, 12)] = 2
    plan: Plan | None = None

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_softmax: ClassVar[bool] = True
    needs_pictures: ClassVar[bool] = True
    needs_blocks: ClassVar[bool] = True
    without_preset: ClassVar[str] = "`steer.calibrate`"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("p", "rho", "v_min"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]: it is a share of attention")
        if self.tau <= 0:
            raise ValueError(f"tau={self.tau} must be above 0")
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")
        if self.sink_dims is not None:
            self.sink_dims = tuple(int(d) for d in self.sink_dims)
            if any(d < 0 for d in self.sink_dims):
                raise ValueError(f"sink_dims={self.sink_dims} are indices of the hidden states, from 0")

    def is_neutral(self) -> bool:
        return self.p == 1 or self.sink_dims == ()

    def resolved(self, family: Family | None, has_clock: bool) -> VAR:
        named = self.layers is not None or isinstance(self.heads, Mapping)
        return replace(self, dense_layers=0 if named else self.dense_layers)

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        if self.is_neutral():
            return
        text = text_config(model)
        if self.sink_dims is None:
            self.sink_dims = known_dims(model)
        if self.sink_dims is None:
            models = ", ".join(f"{name} over {kind} ({size} x {layers})" for name, kind, size, layers, _ in KNOWN)
            raise CompositionError(
                f"the sink dimensions of {type(model).__name__} over {text.model_type} ({text.hidden_size} x "
                f"{text.num_hidden_layers}) are not known, only those of {models}. Look for them with "
                "steer.calibrate(model, VAR(), prompts with pictures), or give sink_dims="
            )
        if max(self.sink_dims) >= text.hidden_size:
            raise CompositionError(f"sink_dims={self.sink_dims}, but the states have {text.hidden_size} dimensions")

    def search(self, **options: Any) -> SinkSearch:
        """Look for dimensions that are massive at the first token and at few others; see `SinkSearch`.

        Options: ratio (how many times more massive than elsewhere).
        """
        return SinkSearch.of(self, **options)

    def before_forward(self, scope: Scope, sites: Sites) -> None:
        text = scope.text
        finds = text is not None and (text.past == 0 or (text.new > 1 and brought(text)))
        visual: dict[tuple[int, int], torch.Tensor] = {}
        for name, (site, heads) in sites.items():
            known = scope.run.memory.get(("VAR", name))
            site.kernel = None
            if text is None:
                continue
            if finds:
                site.kernel = None if text.pictures is None else UNREAD
                look_at_input(scope, site, self._finder(scope, site, heads, known))
            elif known is not None and known["any"]:
                site.kernel = _ready(scope, site, heads, known["sinks"][:, : text.past], visual)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready: Ready | None = call.site.kernel
        if ready is None:
            return next(call)
        if ready is UNREAD:
            raise RuntimeError(
                f"VAR finds sinks in the states that enter the layer of {call.site.name}, which a compiled prompt does "
                "not show: compile decoding alone, as generate() does"
            )
        if not is_softmax(call):
            raise ValueError(
                f"VAR works on plain softmax attention; {call.site.name} has a softcap, a learned sink or dropout. "
                "Leave its layer out with layers=, or call model.eval() if it is dropout"
            )
        out = next(call)
        if call.query.shape[2] > 1:
            return self._many(call, out, ready)
        at = last_tokens(call)
        assert ready.groups is not None
        weights = torch.softmax(row_scores(call, at), -1)
        weights, selected = redistributed(weights, ready.groups, self.p, self.rho, self.v_min)
        which = (selected & ready.queries)[..., None, None]
        which = which if call.heads is None else which & call.heads
        return with_rows(out, at, row_output(weights, call.value), which)

    @torch.compiler.disable
    def _many(self, call: Call, out: torch.Tensor, ready: Ready) -> torch.Tensor:
        """Several queries at once: of a prompt, or of a piece after it."""
        query, key, value, keep, causal = chosen(call, ready.heads)
        plain = out if ready.heads is None else out[:, ready.heads]
        sinks, others = (_gathered(key, value, marked) for marked in (ready.sinks, ready.visual & ~ready.sinks))
        of_pictures = ready.visual.gather(1, sinks.place) & sinks.real
        place, real = _places(ready.queries)
        earlier = key.shape[2] - query.shape[2] if call.text is not None and call.text.past else 0  # else free slots
        edited = plain.transpose(1, 2).clone()
        for start in range(0, place.shape[1], ROWS):
            at, there = place[:, start : start + ROWS], real[:, start : start + ROWS]
            rows, seen = _rows(query, at), _seen(at, keep, causal, earlier, key.shape[2])
            before = _rows(plain, at)
            after = self._edited(rows, seen, key, value, sinks, others, of_pictures, before, call.softmax_scale)
            row, column = there.nonzero(as_tuple=True)
            edited[row, at[row, column]] = after.transpose(1, 2)[row, column]
        edited = edited.transpose(1, 2)
        return edited if ready.heads is None else out.index_copy(1, ready.heads, edited)

    def _edited(
        self,
        query: torch.Tensor,
        seen: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        sinks: Group,
        others: Group,
        of_pictures: torch.Tensor,
        plain: torch.Tensor,
        scale: float,
    ) -> torch.Tensor:
        """The output (B, H, R, D) of these queries, from their plain output.

        Args:
            seen: (B, H or 1, R, S_kv) bool, the keys that each query may see.
            sinks, others: the keys of Z and of N.
            of_pictures: (B, n) bool, which of the sinks are visual.
        """
        accurate = torch.float64 if query.dtype == torch.float64 else torch.float32
        _, lse = partial(query, key, value, mask=seen, scale=scale)
        seen_z, seen_n = sinks.columns(seen), others.columns(seen)
        any_n = seen_n.any(-1)
        # the sinks are few, so their weights are made; a query that sees no other visual token attends to any, unused
        scores = (query.to(accurate) * scale) @ _shared(sinks.key, query).to(accurate).mT
        weights = torch.where(seen_z, torch.exp(scores - lse[..., None]), 0.0)
        out_n, lse_n = partial(query, others.key, others.value, mask=seen_n | ~any_n[..., None], scale=scale)
        of_n = torch.where(any_n, torch.exp(lse_n - lse), 0.0)
        of_visual = of_n + torch.where(of_pictures[:, None, None], weights, 0.0).sum(-1)
        selected = any_n & (of_visual >= self.v_min) & (of_n / of_visual >= self.rho)
        selected = selected & (seen_z & of_pictures[:, None, None]).any(-1)
        moved = weights.sum(-1, keepdim=True) * out_n - weights @ _shared(sinks.value, query).to(accurate)
        return torch.where(selected[..., None], (plain + (1 - self.p) * moved).to(plain.dtype), plain)

    def _finder(
        self, scope: Scope, site: Site, heads: torch.Tensor | None, known: Mapping[str, Any] | None
    ) -> Callable[[torch.Tensor], None]:
        def find(states: torch.Tensor) -> None:
            text = scope.text
            assert text is not None and self.sink_dims is not None
            sinks = massiveness(states, self.sink_dims) > self.tau
            last = writing(scope, text)[:, :1].to(sinks.device)  # candidates that come with a prompt are later tokens
            sinks = sinks & (torch.arange(text.new, device=sinks.device) <= last)
            if text.valid is not None:
                sinks = sinks & text.valid[:, text.past :].to(sinks.device)
            before = sinks[:, :0] if known is None else known["sinks"][:, : text.past]
            sinks = torch.cat([F.pad(before, (0, text.past - before.shape[1])), sinks], 1)
            shown = text.pictures is not None and bool((sinks & text.pictures.shows.to(sinks.device)).any())
            scope.run.memory[("VAR", site.name)] = {"sinks": sinks, "any": shown}
            site.kernel = _ready(scope, site, heads, sinks, {}) if shown else None

        return find


def redistributed(
    weights: torch.Tensor, groups: torch.Tensor, p: float, rho: float, v_min: float
) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of the map after their sinks gave a share to the other visual tokens, see `VAR`.

    Args:
        weights: (..., R, S_kv) softmax, 0 where a query may not see.
        groups: (..., S_kv, 3), see `grouped`.

    Returns:
        Weights (..., R, S_kv), and which rows are edited, (..., R) bool.
    """
    groups = groups.to(weights.dtype)
    of_given, of_taken, of_sinks = (weights @ groups).unbind(-1)
    of_visual = of_given + of_taken
    selected = (of_visual >= v_min) & (of_given >= rho * of_visual) & (torch.minimum(of_given, of_taken) > 0)
    moved = selected.to(weights.dtype) * (1 - p)
    given = moved * of_sinks / of_given.clamp(min=torch.finfo(weights.dtype).tiny)
    changes = torch.stack([given, -moved], -1) @ groups[..., ::2].mT  # of given tokens and of sinks; 0 of others
    return torch.addcmul(weights, weights, changes), selected


def grouped(sinks: torch.Tensor, visual: torch.Tensor) -> torch.Tensor:
    """(..., S_kv, 3) float32, 1 or 0: visual tokens that are no sinks, visual sinks, sinks; of (..., S_kv) bool."""
    return torch.stack([visual & ~sinks, visual & sinks, sinks], -1).float()


@dataclass(frozen=True, eq=False)
class Ready:
    """What the calls of one site need in the forward in flight.

    Args:
        heads: (H',) int64, the heads to edit; None = all.
        sinks, visual: (B, S_kv) bool, which keys are sinks, and which are visual tokens.
        queries: (B, S) bool, which new tokens may be edited.
        groups: (B, S_kv, 3), see `grouped`, for single queries; None = there are several.
    """

    heads: torch.Tensor | None
    sinks: torch.Tensor
    visual: torch.Tensor
    queries: torch.Tensor
    groups: torch.Tensor | None = None


UNREAD = Ready(None, *(torch.zeros(0, 0, dtype=torch.bool) for _ in range(3)))  # until the layer's input is seen


def _ready(
    scope: Scope,
    site: Site,
    heads: torch.Tensor | None,
    sinks: torch.Tensor,
    visual: dict[tuple[int, int], torch.Tensor],
) -> Ready | None:
    """What the calls of a layer need; `visual` keeps what is the same for layers whose caches hold the same tokens."""
    text = scope.text
    if text is None or text.pictures is None:
        return None
    tokens = text.past + text.new
    length, first = tokens, 0
    if text.cache is not None:
        length, first = text.cache.get_mask_sizes(text.new, site.layer_idx)
    if text.past == 0:  # the keys of a prompt are its own, whatever stays in the cache
        length, first = max(length, tokens), 0
    queries = text.pictures.after[:, text.past :].to(sinks.device)
    if text.valid is not None:
        queries = queries & text.valid[:, text.past :].to(queries.device)
    index = None if heads is None else heads.view(-1).nonzero().view(-1).to(scope.device)
    if (length, first) not in visual:
        visual[length, first] = _in_slots(text.pictures.shows.to(sinks.device), length, first)
    placed, shows = _in_slots(sinks, length, first), visual[length, first]
    return Ready(index, placed, shows, queries.contiguous(), grouped(placed, shows) if text.new == 1 else None)


def _in_slots(marked: torch.Tensor, length: int, first: int) -> torch.Tensor:
    """(B, length) bool: marked tokens (B, S) where the cache, whose first slot has token `first`, holds them."""
    kept = marked[:, first:]
    return F.pad(kept, (0, length - kept.shape[1]))


@dataclass(frozen=True, eq=False)
class Group:
    """Some keys of each row: key, value (B, H_kv, n, D); place (B, n) among all, and which of these are real."""

    key: torch.Tensor
    value: torch.Tensor
    place: torch.Tensor
    real: torch.Tensor

    def columns(self, seen: torch.Tensor) -> torch.Tensor:
        """(B, H or 1, R, n) bool: of what queries see (B, H or 1, R, S_kv) these keys."""
        index = self.place[:, None, None].expand(*seen.shape[:3], -1)
        return seen.gather(3, index) & self.real[:, None, None]


def _gathered(key: torch.Tensor, value: torch.Tensor, marked: torch.Tensor) -> Group:
    place, real = _places(marked)
    return Group(_rows(key, place), _rows(value, place), place, real)


def _places(marked: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The marked tokens of each row (B, S) in ascending order, (B, n) int64 with n at least 1, and which are real."""
    counts = marked.sum(-1)
    most = max(int(counts.max()), 1)
    place = marked.to(torch.uint8).argsort(stable=True, dim=-1, descending=True)[:, :most]
    return place, torch.arange(most, device=marked.device) < counts[:, None]


def _rows(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(B, H, n, D): the tokens `place` (B, n) of (B, H, S, D)."""
    return tensor.gather(2, place[:, None, :, None].expand(-1, tensor.shape[1], -1, tensor.shape[3]))


def _seen(place: torch.Tensor, keep: torch.Tensor | None, causal: bool, earlier: int, keys: int) -> torch.Tensor:
    """(B, H or 1, R, S_kv) bool: the keys that the queries `place` (B, R) see; all of them where a query sees none."""
    if keep is not None:
        keep = keep.expand(place.shape[0], -1, -1, keys)
        rows = place if keep.shape[2] > 1 else torch.zeros_like(place)
        seen = keep.gather(2, rows[:, None, :, None].expand(-1, keep.shape[1], -1, keys))
    elif causal:
        seen = (torch.arange(keys, device=place.device) <= place[..., None] + earlier)[:, None]
    else:
        seen = torch.ones(*place.shape, keys, dtype=torch.bool, device=place.device)[:, None]
    return seen | ~seen.any(-1, keepdim=True)


def _shared(tensor: torch.Tensor, query: torch.Tensor) -> torch.Tensor:
    """A key or value tensor (B, H_kv, n, D) with as many heads as the query."""
    return tensor.repeat_interleave(query.shape[1] // tensor.shape[1], 1)
