"""ACT, attention calibration: damp the attention sinks inside a prompt and hand their mass to the other tokens."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch
import torch.nn.functional as F

from steer.method import Method, Span
from steer.plan import Plan
from steer_kernels import partial
from steer_kernels.estimate import column_mass
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

if TYPE_CHECKING:
    from steer.act_search import HeadSearch

ROWS = 256  # queries that are edited at a time: their outputs stay in the cache of a CPU core


@dataclass(kw_only=True)
class ACT(Method):
    """Calibrate the attention of language models: keep the first token, damp the other sinks of chosen heads.

    With P (S, S) the softmax map of a head and a_k the mean of column k over the queries that see k:

        Z  = {k : a_k > alpha / S}, without the first `keep_first` tokens            the sinks of the head
        P'[q, k] = beta * P[q, k]                                                    for k in Z
        P'[q, k] = P[q, k] * (1 + (1 - beta) * m_q / (1 - m_q))                      for the others

    where m_q is the mass of query q on Z, so that rows still sum to 1. No map is made: a_k comes from the log-sum-exp
    of an ordinary attention call and a second pass over the scores, and the output is O' = beta * O + (1 - beta) * O_N
    with O the plain attention and O_N that to the tokens which are no sinks. These are many and the sinks few, so
    O_N = (O - the part of O from Z) / (1 - m); where nearly all of the mass is on sinks, and the difference would lose
    digits, they are attended to instead. The heads that are not chosen stay exactly as they are.

    The first forward of a sequence says what the sinks are: the prompt, or its first piece (in assisted decoding with
    the first candidates). Later tokens, one or several at a time, attend with this Z, which is an extension of the
    paper. Without a cache (use_cache=False) every forward finds Z anew. A method that is applied in mid-sequence waits
    for the next one.

    Args:
        beta: share of their attention that sinks keep; 0.4 in the published scripts, 0.3 to 0.6 is advised; 1 = off.
        alpha: a sink gets more than alpha / S on average, S the number of real tokens of the prompt (at most the
            window, where the layer has one); 5 in the paper.
        threshold: a sink gets more than this, whatever the length; 0.1 and 0.15 in the published scripts. Replaces
            alpha. Heads that were searched with one rule are not valid for the other.
        keep_first: leading real tokens that are never damped: the first must stay a sink.
        dense_layers: first layers that stay as they are, unless `layers` or `heads` name layers: their maps are not
            shaped by sinks. The published range also leaves out the last layer.
        heads: the heads to calibrate, best those that `steer.calibrate(model, ACT(), data)` finds; None = all.
        plan: what the search found, for its report; `heads` says what is done.

    Raises:
        ValueError: attention that is no plain softmax (a softcap, a learned sink, dropout).

    Source: Yu et al., "Unveiling and Harnessing Hidden Attention Sinks", arXiv 2406.15765.
    """

    beta: Annotated[float, Span(0, 1)] = 0.4
    alpha: Annotated[float, Span(0.5, 20)] = 5.0
    threshold: Annotated[float, Span(0, 0.5)] | None = None
    keep_first: Annotated[int, Span(0, 8)] = 1
    dense_layers: Annotated[int, Span(0, 12)] = 2
    plan: Plan | None = None

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_softmax: ClassVar[bool] = True
    without_preset: ClassVar[str] = "`steer.calibrate`"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 0 <= self.beta <= 1:
            raise ValueError(f"beta={self.beta} must lie in [0, 1]: the share that sinks keep")
        if self.alpha <= 0:
            raise ValueError(f"alpha={self.alpha} must be above 0")
        if self.threshold is not None:
            if not 0 <= self.threshold < 1:
                raise ValueError(f"threshold={self.threshold} must lie in [0, 1): it is a mean probability")
            if self.alpha != type(self).alpha:
                raise ValueError(f"give alpha={self.alpha} or threshold={self.threshold}: either replaces the other")
        if self.keep_first < 0 or self.dense_layers < 0:
            raise ValueError(f"keep_first={self.keep_first} and dense_layers={self.dense_layers} must not be negative")

    def is_neutral(self) -> bool:
        return self.beta == 1

    def resolved(self, family: Family | None, has_clock: bool) -> ACT:
        named = self.layers is not None or isinstance(self.heads, Mapping)
        return replace(self, dense_layers=0) if named else self

    def search(self, **options: Any) -> HeadSearch:
        """Try every head alone on tasks with choices, and keep those that help; see `HeadSearch`.

        Options: objective ("accuracy" or "margin"), batch (trials in one forward).
        """
        from steer.act_search import HeadSearch

        return HeadSearch.of(self, **options)

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        for name, (site, heads) in sites.items():
            site.kernel = self._ready(scope, site, heads, scope.run.memory.get(("ACT", name)))

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready: Ready | None = call.site.kernel
        if ready is None:
            return next(call)
        if ready.sinks is None or call.query.shape[2] > 1:
            return self._many(call, next, ready)
        query, key, value, keep, _ = chosen(call, ready.heads)
        row = one_row(query, key, value, ready.sinks, keep, self.beta, call.softmax_scale)
        return row if ready.heads is None else next(call).index_copy(1, ready.heads, row)

    @torch.compiler.disable
    def _many(self, call: Call, next: Next, ready: Ready) -> torch.Tensor:
        """Several queries at once: of a prompt, whose sinks are found and kept, or of a piece after it."""
        plain = all_heads(call) if ready.heads is not None else None
        edited, sinks = self.edited(call, ready.heads, ready.real, ready.sinks, plain)
        if ready.sinks is None:
            call.run.memory[("ACT", call.site.name)] = {"sinks": sinks}
        if ready.heads is None:
            return edited
        return (next(call) if plain is None else plain[0]).index_copy(1, ready.heads, edited)

    def edited(
        self,
        call: Call,
        heads: torch.Tensor | None = None,
        real: torch.Tensor | None = None,
        sinks: torch.Tensor | None = None,
        plain: tuple[torch.Tensor, torch.Tensor] | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """The calibrated output of some heads.

        Args:
            call: the attention call.
            heads: (H',) int64, the query heads; None = all.
            real: (B, S) bool, the queries that are no padding; None = all.
            sinks: (B, H', S_kv) bool; None = find them, in a call whose keys begin with those of its queries.
            plain: output and log-sum-exp of all heads, where they are known.

        Returns:
            Output (B, H', S, D) and the sinks.
        """
        _check_softmax(call)
        query, key, value, keep, causal = chosen(call, heads)
        if sinks is None and key.shape[2] > query.shape[2]:  # a static cache has room for more
            tokens = query.shape[2]
            key, value, keep = key[:, :, :tokens], value[:, :, :tokens], None if keep is None else keep[..., :tokens]
        scale = call.softmax_scale
        if plain is None:
            out, lse = partial(query, key, value, mask=keep, is_causal=causal, scale=scale)
        else:
            out, lse = plain if heads is None else (t[:, heads] for t in plain)
        if sinks is None:
            sinks = self.find_sinks(query, key, lse, keep, causal, real, scale, call.site.window)
        return calibrated(query, key, value, out, lse, sinks, keep, causal, self.beta, scale), sinks

    def find_sinks(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        lse: torch.Tensor,
        keep: torch.Tensor | None,
        causal: bool,
        real: torch.Tensor | None = None,
        scale: float | None = None,
        window: int | None = None,
    ) -> torch.Tensor:
        """(B, H, S) bool: the tokens that get more attention than the threshold, but for the first ones.

        Args:
            query: (B, H, S, D). key: (B, H_kv, S, D).
            lse: (B, H, S) log-sum-exp of their attention.
            keep, causal: which keys a query may see, see `Call.visible`.
            real: (B, S) bool, False = padding; None = all are real.
            scale: factor on the products; None = 1 / sqrt(D).
            window: latest keys that a query sees at all.
        """
        tokens = query.shape[2]
        counted = torch.ones(1, tokens, dtype=torch.bool, device=query.device) if real is None else real
        lse = lse.masked_fill(~counted[:, None], -torch.inf)
        mass = column_mass(query, key, lse, scale=scale, is_causal=causal, keep=keep)
        mean = mass / _times_seen(counted, keep, causal).clamp(min=1)
        if self.threshold is not None:
            sinks = mean > self.threshold
        else:
            sinks = mean > self.alpha / counted.sum(-1).clamp(min=1, max=window)[:, None, None]
        rank = counted.cumsum(-1)[:, None]  # of the first real token: 1
        return sinks & (rank > self.keep_first)

    def _ready(
        self, scope: Scope, site: Site, heads: torch.Tensor | None, known: Mapping[str, torch.Tensor] | None
    ) -> Ready | None:
        text = scope.text
        if text is None:
            return None
        index = None if heads is None else heads.view(-1).nonzero().view(-1).to(scope.device)
        real = None if text.valid is None else text.valid[:, text.past :]
        if text.past == 0:
            return Ready(index, None, real)
        if known is None or text.cache is None:
            return None
        length, first = text.cache.get_mask_sizes(text.new, site.layer_idx)
        sinks = known["sinks"][..., first : text.past]  # where the cache was cropped, other tokens come after it
        return Ready(index, F.pad(sinks, (0, length - sinks.shape[-1])), real)


@dataclass(frozen=True, eq=False)
class Ready:
    """What the calls of one site need in the forward in flight.

    Args:
        heads: (H',) int64, the heads to calibrate; None = all.
        sinks: (B, H', S_kv) bool, those of the prompt among the keys of the forward; None = this is the prompt.
        real: (B, S) bool, the new tokens that are no padding; None = all.
    """

    heads: torch.Tensor | None
    sinks: torch.Tensor | None
    real: torch.Tensor | None


def chosen(
    call: Call, heads: torch.Tensor | None
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, bool]:
    """Query, key, value, mask and causal rule of some heads; with all of them keys stay grouped, else each its own."""
    keep, causal = call.visible()
    if heads is None:
        return call.query, call.key, call.value, keep, causal
    if keep is not None and keep.shape[1] > 1:
        keep = keep[:, heads]
    shared = heads // (call.query.shape[1] // call.key.shape[1])
    return call.query[:, heads], call.key[:, shared], call.value[:, shared], keep, causal


def all_heads(call: Call) -> tuple[torch.Tensor, torch.Tensor] | None:
    """Output and log-sum-exp of every head, where the model's own backend is the kernel that gives both; else None."""
    own = call.site.processor == "sdpa" and call.query.device.type == "cpu" and not torch.is_grad_enabled()
    if not own or call.query.shape[2] != call.key.shape[2]:
        return None
    keep, causal = call.visible()
    return partial(call.query, call.key, call.value, mask=keep, is_causal=causal, scale=call.softmax_scale)


def one_row(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    sinks: torch.Tensor,
    keep: torch.Tensor | None,
    beta: float,
    scale: float,
) -> torch.Tensor:
    """The calibrated output (B, H, 1, D) of a single query, through its row of the map.

    Args:
        query: (B, H, 1, D). key, value: (B, H_kv, S, D).
        sinks: (B, H, S) bool. keep: which keys it may see, (B or 1, H or 1, 1, S); None = all.
    """
    groups = key.shape[1]
    scores = (query.unflatten(1, (groups, -1)).squeeze(3) @ key.mT).flatten(1, 2).to(_accurate(query)) * scale
    if keep is not None:
        scores = scores.masked_fill(~keep[:, :, 0], -torch.inf)
    weights = torch.softmax(scores, -1)
    others = torch.where(sinks, 0.0, weights)
    rest = others.sum(-1, keepdim=True)
    weights = torch.where(rest > 0, beta * weights + (1 - beta) * others / rest, weights)
    return (weights.to(value.dtype).unflatten(1, (groups, -1)) @ value).flatten(1, 2)[:, :, None]


def calibrated(
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    lse: torch.Tensor,
    sinks: torch.Tensor,
    keep: torch.Tensor | None,
    causal: bool,
    beta: float,
    scale: float,
) -> torch.Tensor:
    """Attention output (B, H, S, D) after its sinks were damped, from the output before.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, S_kv, D).
        out: (B, H, S, D) and lse: (B, H, S) of the plain attention.
        sinks: (B, H, S_kv) bool.
        keep, causal: which keys a query may see, see `Call.visible`.
        beta: share of their attention that sinks keep.
        scale: factor on the products.
    """
    most = int(sinks.sum(-1).max())
    if most == 0:
        return out
    accurate = _accurate(query)
    (q_len, kv_len), device = (query.shape[2], key.shape[2]), query.device
    place = _places(sinks, most)
    key_z, value_z = (_picked(t, place.clamp(max=kv_len - 1)).to(accurate) for t in (key, value))
    normaliser = lse.masked_fill(lse == -torch.inf, torch.inf)[..., None].to(accurate)
    # a difference of rounded numbers is 1 / rest times as far off as they are, and sqrt(2) where the two products of
    # query and key were rounded differently, as other kernels do; where it would be more, the others are attended to
    least = 3 / 16 if query.dtype in (torch.float32, torch.float64) else 1 / 2

    parts, lost = [], []
    for start in range(0, q_len, ROWS):
        rows = slice(start, min(start + ROWS, q_len))
        plain = out[:, :, rows]
        columns = int((place < rows.stop + kv_len - q_len).sum(-1).max()) if causal else most
        last = torch.arange(rows.start, rows.stop, device=device)[:, None] + (kv_len - q_len) if causal else kv_len - 1
        seen = place[:, :, None, :columns] <= last
        if keep is not None:
            seen = seen & _columns(keep, rows, place.clamp(max=kv_len - 1))
        scores = (query[:, :, rows].to(accurate) * scale) @ key_z[:, :, :columns].mT
        weights = torch.where(seen, torch.exp(scores - normaliser[:, :, rows]), 0.0)
        rest = 1 - weights.sum(-1, keepdim=True)
        of_others = plain.to(accurate) - weights @ value_z[:, :, :columns]
        parts.append(torch.addcmul(beta * plain, (1 - beta) / rest.clamp(min=least), of_others).to(out.dtype))
        lost.append(rest[..., 0] < least)
    result, again = torch.cat(parts, 2), torch.cat(lost, 2)
    if again.any():
        _attend_again(result, again, query, key, value, out, sinks, keep, causal, beta, scale)
    return result


def _attend_again(
    result: torch.Tensor,
    again: torch.Tensor,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    out: torch.Tensor,
    sinks: torch.Tensor,
    keep: torch.Tensor | None,
    causal: bool,
    beta: float,
    scale: float,
) -> None:
    """Write the output of some queries, `again` (B, H, S) bool, into `result`: beta * O + (1 - beta) * O_N.

    O_N is the attention to what is no sink; a query that sees only sinks keeps its output.
    """
    (q_len, kv_len), group = (query.shape[2], key.shape[2]), query.shape[1] // key.shape[1]
    exact, position = _accurate(query), torch.arange(kv_len, device=query.device)
    shown = None if keep is None else keep.expand(*query.shape[:2], q_len, kv_len)
    for b, h in again.any(2).nonzero().tolist():
        for rows in again[b, h].nonzero().flatten().split(ROWS):
            end = int(rows[-1]) + kv_len - q_len + 1 if causal else kv_len
            unseen = sinks[b, h, :end]
            if causal:
                unseen = unseen | (position[:end] > rows[:, None] + (kv_len - q_len))
            if shown is not None:
                unseen = unseen | ~shown[b, h, rows, :end]
            keys, values = (t[b, h // group, :end].to(exact) for t in (key, value))
            scores = ((query[b, h, rows].to(exact) * scale) @ keys.mT).masked_fill(unseen, -torch.inf)
            any_other = scores.amax(-1, keepdim=True) > -torch.inf
            mean, plain = torch.softmax(scores, -1) @ values, out[b, h, rows]
            result[b, h, rows] = torch.where(any_other, beta * plain + (1 - beta) * mean, plain).to(out.dtype)


def _places(marked: torch.Tensor, most: int) -> torch.Tensor:
    """The marked tokens (..., S) of every row in ascending order, (..., most) int64; S where there are fewer."""
    tokens = marked.shape[-1]
    return torch.where(marked, torch.arange(tokens, device=marked.device), tokens).sort(-1).values[..., :most]


def _times_seen(counted: torch.Tensor, keep: torch.Tensor | None, causal: bool) -> torch.Tensor:
    """Queries that count, (B or 1, S), and see a key: (B or 1, H or 1, S_kv), of as many keys as queries."""
    if keep is not None:
        return (keep & counted[:, None, :, None]).sum(2)
    if causal:
        return counted.flip(-1).cumsum(-1).flip(-1)[:, None]
    return counted.sum(-1)[:, None, None]


def _picked(tensor: torch.Tensor, place: torch.Tensor) -> torch.Tensor:
    """(B, H, n, D): of a key or value tensor (B, H_kv, S, D) the tokens `place` (B, H, n) of every head."""
    (groups, width), (batch, heads, n) = (tensor.shape[1], tensor.shape[3]), place.shape
    index = place.reshape(batch, groups, -1, 1).expand(-1, -1, -1, width)
    return tensor.gather(2, index).view(batch, heads, n, width)


def _columns(keep: torch.Tensor, rows: slice, place: torch.Tensor) -> torch.Tensor:
    """(B, H, rows, n) bool: of the mask (B or 1, H or 1, S or 1, S_kv) the keys `place` (B, H, n)."""
    here = _rows_of(keep, rows).expand(*place.shape[:2], -1, -1)
    return here.gather(3, place[:, :, None].expand(-1, -1, here.shape[2], -1))


def _rows_of(keep: torch.Tensor, rows: slice) -> torch.Tensor:
    return keep if keep.shape[2] == 1 else keep[:, :, rows]


def _accurate(tensor: torch.Tensor) -> torch.dtype:
    return torch.float64 if tensor.dtype == torch.float64 else torch.float32


def _check_softmax(call: Call) -> None:
    """Raise where the call is more than a softmax of scaled products."""
    extra = {"softcap": call.extra.get("softcap"), "dropout": call.extra.get("dropout") or None}
    found = ", ".join(f"{name}={value}" for name, value in extra.items() if value is not None)
    if call.extra.get("s_aux") is not None:
        found = "a learned sink (s_aux)"
    if found:
        raise ValueError(
            f"ACT works on plain softmax attention; {call.site.name} also has {found}. Leave its layer out with "
            "layers=, or call model.eval() if it is dropout"
        )
