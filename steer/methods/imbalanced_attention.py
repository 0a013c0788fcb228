"""Imbalanced attention: raise what the query that writes gives to the parts of a picture that stand out."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache, partial
from typing import Annotated, Any, ClassVar

import torch
import torch.nn.functional as F

from steer.method import Method, Span
from steer.patch_scores import attention_received, has_class_token, score_maps, token_scores, tower_ends
from steer.query_row import brought, row_output, row_scores, with_rows, writing
from steer.without_pictures import guided, logits_without, places_of_logits
from steer_patches.encoding import encoded
from steer_patches.family import Family
from steer_patches.generation import Text
from steer_patches.pictures import Pictures
from steer_patches.site import Call, Next, Scope, Site

KEY = "ImbalancedAttention"  # what it keeps in `run.memory` and reads of the vision tower
OUTLIERS = "outliers"


@dataclass(kw_only=True)
class ImbalancedAttention(Method):
    """Raise the attention of the query that writes to the salient parts of a picture, and write away from the text.

    Two layers of the vision tower say which tokens j of a picture are salient:

        L = the `local_ratio` of its tokens to which the first layer attends most
        M = the outliers of the attention of the layer that the features come from: above Q3 + 1.5 (Q3 - Q1)
        L := L without M

    With s_j the scaled products of a query, of every head in layers 2 and up,

        s'_j = s_j + alpha |s_j|  (j in L),     s_j + beta |s_j|  (j in M),     s_j  (else),     O = softmax(s') V

    for visible keys. The queries are those that write: the last of the prompt and all that follow it, however many come
    in one forward. The others of the prompt stay as they are; with `logits_to_keep=n` its last n after the pictures
    write, which are assisted decoding's first candidates. |s_j| makes positive products larger and draws negative ones
    to 0. With c the log-probabilities of the next token, and u those after the same text without its pictures, in an
    unedited model,

        out = gamma (c - u) + u,     less 1000 where c < log(cutoff) + max c

    takes the place of the logits. u costs a forward of one token at every step, with a cache of its own, which runs
    uncompiled; only the logits of queries that write change. Rows of a batch that have no picture stay bit-identical.
    A sequence whose first forward had no picture, or was not steered, is not guided. Gradients take u, L and M for
    constants.

    Published is -inf in place of 1000 less, before which the rules of generate() were applied: they come after it here,
    and may forbid all tokens that are left.

    Attention of the tower is that of CLIP's class token, summed over heads. Towers without one (SigLIP, Qwen's) are an
    extension: what a patch receives of all patches of its picture, or of its window. So are tokens that show several
    patches (their mean), and pictures in tiles or many in one row (L and M are chosen in each picture by itself). "The
    layer that the features come from" is the last but one also where the language model gets the last one's.

    Args:
        alpha: gain on L; 0.7, the published scripts also have 0.5 and 0.9.
        beta: gain on M; 0.3. 0 to 0.5 is advised.
        local_ratio: size of L before M is taken out, a share of the picture's tokens; 0.25, 0.1 to 0.5 is advised.
        summary: "outliers", or M is this share of the tokens instead (0.05 is published as an alternative).
        gamma: weight of the guidance away from text; 1 = off, with its cutoff. Needs a model that gives logits.
        cutoff: tokens less likely than this share of the most likely one are never written; 0 = all may be.
        dense_layers: first decoder layers that stay as they are, unless `layers` or `heads` name layers. `layers` and
            `heads` are about the decoder only: the tower's layers are read in any case.
        steps: must hold the prompt, step 0; without it nothing is known of the pictures and nothing changes.

    Raises:
        ValueError: settings out of range; guidance of a model without logits or of `return_dict=False`.

    Source: Arif et al., "Fixing Imbalanced Attention to Mitigate In-Context Hallucination of Large Vision-Language
    Model", arXiv 2501.12206, and its published code, which has alpha, beta and the layers as they are here and not the
    strength per head that the abstract announces. The guidance is that of Liu et al., "PAI", arXiv 2407.21771.
    """

    alpha: Annotated[float, Span(0, 2)] = 0.7
    beta: Annotated[float, Span(0, 1)] = 0.3
    local_ratio: Annotated[float, Span(0, 1)] = 0.25
    summary: str | float = OUTLIERS
    gamma: Annotated[float, Span(1, 2)] = 1.1
    cutoff: Annotated[float, Span(0, 1)] = 0.1
    dense_layers: Annotated[int, Span(0, 12)] = 2

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_pictures: ClassVar[bool] = True
    without_preset: ClassVar[str] = "yes"
    default_layers: ClassVar[str] = "*"

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("alpha", "beta", "gamma"):
            if getattr(self, name) < 0:
                raise ValueError(f"{name}={getattr(self, name)} must not be negative")
        for name in ("local_ratio", "cutoff"):
            if not 0 <= getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in [0, 1]")
        if self.summary != OUTLIERS and (isinstance(self.summary, str) or not 0 <= self.summary <= 1):
            raise ValueError(f'summary={self.summary!r} must be "{OUTLIERS}" or a share of the tokens in [0, 1]')
        if self.dense_layers < 0:
            raise ValueError(f"dense_layers={self.dense_layers} must not be negative")

    def is_neutral(self) -> bool:
        return not self.edits and self.gamma == 1

    @property
    def edits(self) -> bool:
        """Whether attention changes at all."""
        return self.alpha > 0 or self.beta > 0

    def resolved(self, family: Family | None, has_clock: bool) -> ImbalancedAttention:
        named = self.layers is not None or isinstance(self.heads, Mapping)
        return replace(self, dense_layers=0 if named else self.dense_layers)

    def reads(self, model: torch.nn.Module, sites: Sequence[Site]) -> Sequence[Site]:
        self._ends = [site.name for site in tower_ends(model.config, sites)]
        return [site for site in sites if site.name in self._ends] if self.edits else ()

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        if self.gamma != 1 and model.get_output_embeddings() is None:  # type: ignore[operator]
            raise ValueError(f"gamma={self.gamma} guides logits, which {type(model).__name__} has not: give gamma=1")
        self._config: Any = model.config

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        decoder = [site for site, _ in sites.values() if site.kind == "causal"]
        for site in decoder:
            site.kernel = None
        text = scope.text
        if text is None or text.pictures is None or not self.edits:
            return
        known: Any = _memory(scope).get("strength")
        new = brought(text)
        if known is None and not new:  # applied in mid-sequence
            return
        pick = cache(partial(self._strength, scope, text, text.pictures, known)) if new else None
        strength = cache(partial(_fitted, known, text.past))
        rows, at = None if new else _some(known.any(-1)), writing(scope, text)
        for site in decoder:
            length, first = (text.new, 0)
            if text.cache is not None:
                length, first = text.cache.get_mask_sizes(text.new, site.layer_idx)
            fitted = None if new else strength(length, first)
            site.kernel = Ready(fitted, rows, at, length, first, pick)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if call.site.kind == "self":
            return self._read(call, next)
        ready: Ready | None = call.site.kernel
        if ready is None:
            return next(call)
        if ready.strength is None or call.query.shape[2] > 1:
            return _many(call, next, ready)
        row = _row(call, ready.at[:, 0], ready.strength)
        which = _both(ready.rows, call.heads)
        return row if which is None else torch.where(which, row, next(call))

    def after_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]], output: Any) -> Any:
        text = scope.text
        if self.gamma == 1 or text is None or text.pictures is None:
            return output
        memory = _memory(scope)
        found = logits_without(scope, text, memory.setdefault("text", {}), self._config)
        if found is None:
            return output
        if isinstance(output, tuple):
            raise ValueError(f"gamma={self.gamma} needs outputs by name: leave return_dict=False out, or give gamma=1")
        unguided, has_text = found
        rows = (text.pictures.number >= 0).any(-1) & has_text
        kept = scope.arguments.get("logits_to_keep", 0)
        at = places_of_logits(writing(scope, text), text.new, kept).to(output.logits.device)
        index = at.clamp(min=0)[..., None].expand(-1, -1, output.logits.shape[-1])
        plain = output.logits.gather(1, index)
        chosen = ((at >= 0) & rows[:, None].to(at.device))[..., None]
        changed = torch.where(chosen, guided(plain, unguided, self.gamma, self.cutoff), plain)
        output.logits = output.logits.scatter(1, index, changed)
        return output

    def _strength(self, scope: Scope, text: Text, pictures: Pictures, known: torch.Tensor | None) -> torch.Tensor:
        """(B, past + new): alpha on the tokens of L, beta on those of M, 0 on the others; kept for the sequence."""
        arguments = {**scope.arguments, **encoded(scope.arguments)[0]}
        view, box = pictures.view[:, text.past :], pictures.view_box[:, text.past :]
        scores = []
        for name in self._ends:
            read = {modality: kept[KEY, name] for modality, kept in scope.read.items() if (KEY, name) in kept}
            if not read:
                raise RuntimeError(
                    "ImbalancedAttention did not see how these pictures were encoded: that was done in a compiled "
                    "graph, or while the method was off; compile the decoder only, and give steps that hold the prompt"
                )
            scores.append(token_scores(view, box, score_maps(self._config, read, arguments)))
        number, shows = pictures.number[:, text.past :], pictures.shows[:, text.past :]
        fresh = torch.zeros_like(scores[0])
        for row in range(len(number)):
            for picture in number[row][shows[row]].unique():
                at = ((number[row] == picture) & shows[row]).nonzero().flatten()
                local, summary = salient(scores[0][row, at], scores[1][row, at], self.local_ratio, self.summary)
                fresh[row, at] = self.alpha * local.to(fresh.dtype) + self.beta * summary.to(fresh.dtype)
        strength = fresh if known is None else torch.cat([_fitted(known, text.past, text.past, 0).to(fresh), fresh], 1)
        strength = F.pad(strength, (text.past + text.new - strength.shape[1], 0))
        _memory(scope)["strength"] = strength
        return strength

    @torch.compiler.disable
    def _read(self, call: Call, next: Next) -> torch.Tensor:
        """A layer of the vision tower, as it is; what its patches receive is kept for the language model."""
        reading = call.site.scope.reading
        if reading is not None:  # else the tower runs for someone else
            reading.setdefault((KEY, call.site.name), []).append(
                attention_received(call, has_class_token(self._config))
            )
        return next(call)


@dataclass(frozen=True, eq=False)
class Ready:
    """What the calls of one site need in the forward in flight.

    Args:
        strength: (B, T) the gain on each key of the call; None = the forward brings pictures, `pick` says it.
        rows: (B, 1, 1, 1) bool, which rows have any; None = all.
        at: (B, n) int64, the queries that write.
        length, first: how many keys the call will have, and which token of the sequence is the first.
        pick: the gains (B, past + new), once the vision tower has run.
    """

    strength: torch.Tensor | None
    rows: torch.Tensor | None
    at: torch.Tensor
    length: int
    first: int
    pick: Callable[[], torch.Tensor] | None


def salient(
    first: torch.Tensor, second: torch.Tensor, local_ratio: float, summary: str | float
) -> tuple[torch.Tensor, torch.Tensor]:
    """The local and the summary tokens of one picture, which have none in common.

    Args:
        first, second: (n,) scores of its tokens, from the first layer and from the layer of the features.
        local_ratio: share of the tokens that are local before the summary tokens are taken out.
        summary: "outliers", or a share of the tokens.

    Returns:
        Two of (n,) bool.
    """
    if isinstance(summary, str):
        low, high = torch.quantile(second, second.new_tensor([0.25, 0.75]))
        marked = second > high + 1.5 * (high - low)
    else:
        marked = _highest(second, summary)
    return _highest(first, local_ratio) & ~marked, marked


def _highest(scores: torch.Tensor, share: float) -> torch.Tensor:
    """(n,) bool: the share of the tokens with the highest scores."""
    marked = torch.zeros_like(scores, dtype=torch.bool)
    marked[scores.topk(round(share * len(scores))).indices] = True
    return marked


@torch.compiler.disable
def _many(call: Call, next: Next, ready: Ready) -> torch.Tensor:
    """A prompt, or several tokens after it: the rows of the queries that write are attended to again."""
    strength, rows = ready.strength, ready.rows
    if strength is None:
        picked = ready.pick()  # type: ignore[misc]
        strength, rows = _fitted(picked, picked.shape[1], ready.length, ready.first), _some(picked.any(-1))
    out = next(call)
    for at in ready.at.unbind(1):
        out = with_rows(out, at, _row(call, at, strength), _both(rows, call.heads))
    return out


def _row(call: Call, at: torch.Tensor, strength: torch.Tensor) -> torch.Tensor:
    """(B, H, 1, D): the output of the queries `at` (B,) with products raised by `strength` (B, T)."""
    scores = row_scores(call, at)
    size = scores.abs().masked_fill(scores == -torch.inf, 0.0)  # of what is hidden: it stays so
    return row_output((scores + strength[:, None] * size).softmax(-1), call.value)


def _fitted(strength: torch.Tensor, tokens: int, length: int, first: int = 0) -> torch.Tensor:
    """(B, length): of the first `tokens` of a sequence those from `first` on, 0 for what comes after them."""
    strength = strength[:, first:tokens]
    return F.pad(strength, (0, length - strength.shape[1]))


def _both(rows: torch.Tensor | None, heads: torch.Tensor | None) -> torch.Tensor | None:
    return heads if rows is None else rows if heads is None else rows & heads


def _some(rows: torch.Tensor) -> torch.Tensor | None:
    """(B, 1, 1, 1) from (B,) bool; None = all."""
    return None if bool(rows.all()) else rows[:, None, None, None]


def _memory(scope: Scope) -> dict[str, Any]:
    """What is kept for the sequence: "strength" (B, tokens), and "text", the branch without pictures."""
    return scope.run.memory.setdefault(KEY, {})
