"""GIFT: read from the question where a model's gaze shifts to in the picture, and look there while answering."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, NamedTuple

import torch
import torch.nn.functional as F

from steer.gaze import Gaze, most, read_before
from steer.method import Method, Span
from steer.query_row import last_tokens, row_output, row_scores, with_rows, writing
from steer.questions import content_tokens, question_of, question_template
from steer.select import SelectorError, select
from steer_patches.family import Family
from steer_patches.generation import Text
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.sites import find_sites

Sites = Mapping[str, tuple[Site, torch.Tensor | None]]


class Layers(NamedTuple):
    """Numbers of decoder layers: where the gaze is read, and where it is acted on."""

    saliency: tuple[int, ...]
    fusion: tuple[int, ...]


# By model type, decoder layers and hidden size. Published with alpha = 5 for LLaVA and 4 for Qwen2-VL.
PUBLISHED: Mapping[tuple[str, int, int], Layers] = {
    ("llava", 32, 4096): Layers((11,), tuple(range(12, 23))),  # LLaVA-1.5-7B
    ("llava", 40, 5120): Layers((10,), tuple(range(14, 21))),  # LLaVA-1.5-13B
    ("qwen2_vl", 28, 3584): Layers((14,), tuple(range(5, 19))),  # Qwen2-VL-7B
}


@dataclass(kw_only=True)
class GIFT(Method):
    """Weigh up what a vision-language model's gaze shifts to while it reads the question, then the question as much.

    With P the softmax map of a head, Vis the tokens that show a part of a picture, Q those of the question and C the
    content words among them, the saliency layers say once, at the prompt, how much each visual token matters:

        G_h[j] = sum over i in C of max(P_h[i, j] - P_h[i - 1, j], 0)        what i looks at more than the token before
        S[j]   = mean of G_h[j] / |C| over the `share` of heads with the largest sum of G_h, and over the layers
        m[j]   = exp(alpha * S^[j]), S^ = S clamped to mean +- clamp * std and then scaled to [0, 1] over Vis

    In each fusion layer the row of the last token of the prompt, and of each token after it, is edited:

        P_h[Vis] := m * P_h[Vis]          in the `share` of heads with the largest sum of P_h[Vis]
        r         = the mass that those heads now have on Vis, over what they had
        P_h[Q]   := r * beta * P_h[Q]     in the `question_share` of heads with the largest sum of P_h[Q] (as it was)

    and each edited row is divided by its sum, O = P V. A head may be in both sets, r is one number for a layer and a
    token. No map is made: the rows of the question in one layer, and one row of each fusion layer, are all that is
    computed. All other heads and tokens, and rows of the batch without a picture, stay exactly as they are.

    Where no saliency layer comes after the first fusion layer, the prompt's own pass tells the gaze, with what other
    methods do in it; else, as with Qwen2-VL's published layers, the model runs before, without methods, up to the last
    of them. The gaze stays as it is for as long as the sequence: pictures and questions of later turns do not change
    it, and a method that is applied in mid-sequence, or whose `steps` leave the prompt out, has none and changes
    nothing. After the prompt every token is taken for a generated one, also where several come at once; of a prompt
    with `logits_to_keep=n` the last n after the pictures are (assisted decoding's first candidates). Without a cache
    (use_cache=False) every forward is a prompt. Gradients take m for a constant.

    Differs from the published code: there a tagger finds the content words (nouns, verbs, adjectives, adverbs and
    numbers), here every word counts that is not in a list of function words; there the question lies between fixed
    offsets, here where the chat template puts it. Reconstructed: `share` is also that of the saliency layers; where a
    map is constant or a question has no content words, m is 1.

    Args:
        alpha: strength on the picture; 5 for LLaVA, 4 for Qwen2-VL; 2 to 6 is advised; 0 = off.
        beta: strength on the question, relative to that on the picture; 0.5 to 1.5 is advised.
        share: share of the heads that are read, and of those that look at the picture; at least one.
        question_share: share of the heads that look at the question.
        clamp: outliers of S, in standard deviations.
        saliency: numbers of the decoder layers to read, from 0; None = published, or one at 0.34 of the depth.
        layers: the fusion layers; None = published, or those from 0.36 to 0.7 of the depth, as in LLaVA-1.5-7B.
        heads: the heads that may be edited, of those chosen.
        before: tokens between the last picture and the question; 0 = the question is all text after the picture.
        after: tokens of the prompt after the question.
        words: (3, vocabulary) bool, which token ids are words, see `steer.questions`; None = all tokens count.

    `GIFT.for_processor(processor)` finds `before`, `after` and `words`.

    Source: "Capturing Gaze Shifts for Guidance: Cross-Modal Fusion Enhancement for VLM Hallucination Mitigation",
    arXiv 2510.22067.
    """

    alpha: Annotated[float, Span(0, 10)] = 5.0
    beta: Annotated[float, Span(0.1, 2)] = 1.0
    share: Annotated[float, Span(0.05, 1)] = 0.5
    question_share: Annotated[float, Span(0.05, 1)] = 0.5
    clamp: Annotated[float, Span(0.5, 10)] = 3.0
    saliency: Sequence[int] | None = None
    before: Annotated[int, Span(0, 64)] = 0
    after: Annotated[int, Span(0, 64)] = 0
    words: torch.Tensor | None = field(default=None, repr=False)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_pictures: ClassVar[bool] = True
    without_preset: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.alpha < 0 or self.beta <= 0:
            raise ValueError(f"alpha={self.alpha} must not be negative, and beta={self.beta} must be above 0")
        for name in ("share", "question_share"):
            if not 0 < getattr(self, name) <= 1:
                raise ValueError(f"{name}={getattr(self, name)} must lie in (0, 1]: a share of the heads")
        if self.clamp <= 0:
            raise ValueError(f"clamp={self.clamp} must be above 0: it is in standard deviations")
        if self.before < 0 or self.after < 0:
            raise ValueError(f"before={self.before} and after={self.after} must not be negative: they count tokens")
        if self.saliency is not None and not self.saliency:
            raise ValueError("saliency is empty; leave it None for the middle of the model, or name a layer, e.g. [11]")
        if self.words is not None and (self.words.ndim != 2 or self.words.shape[0] != 3):
            raise ValueError(
                f"words has shape {tuple(self.words.shape)}; steer.questions.words_of makes (3, vocabulary)"
            )

    @classmethod
    def for_processor(cls, processor: Any, **settings: Any) -> GIFT:
        """A GIFT that knows where this processor's chat template puts the question, and which tokens are words.

        Args:
            processor: see `steer.questions.question_template`. settings: the other fields.
        """
        found = question_template(processor)
        return cls(**{"before": found.before, "after": found.after, "words": found.words, **settings})

    def is_neutral(self) -> bool:
        return self.alpha == 0 and self.beta == 1

    def resolved(self, family: Family | None, has_clock: bool) -> GIFT:
        return replace(self)

    def layers_in(self, model: torch.nn.Module, sites: Sequence[Site]) -> Sequence[str]:
        return self._layers_of(model, sites)[1]

    def reads(self, model: torch.nn.Module, sites: Sequence[Site]) -> Sequence[Site]:
        reading = self._layers_of(model, sites)[0]
        return [site for site in sites if site.name in reading]

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        self.__dict__["_here"] = self._layers_of(model, find_sites(model))

    def _layers_of(self, model: torch.nn.Module, sites: Sequence[Site]) -> tuple[list[str], list[str]]:
        """Names of the saliency and of the fusion layers, each in the order of the model."""
        names = [site.name for site in sites if site.kind == "causal"]
        known = layers_of(model, len(names))
        saliency = known.saliency if self.saliency is None else self.saliency
        if not all(0 <= layer < len(names) for layer in saliency):
            raise SelectorError(
                f"saliency={list(saliency)} names layers that do not exist: the decoder has 0 to {len(names) - 1}"
            )
        layers = list(self.heads) if self.layers is None and isinstance(self.heads, Mapping) else self.layers
        fusion = [names[i] for i in known.fusion] if layers is None else select(layers, names, "decoder layers")
        return [names[i] for i in sorted(set(saliency))], fusion

    def before_forward(self, scope: Scope, sites: Sites) -> None:
        for site, _ in sites.values():
            site.kernel = None
        text = scope.text
        if text is None or text.pictures is None:
            return
        reading, fusion = self.__dict__["_here"]
        live = {name: sites[name][0] for name in (*reading, *fusion) if name in sites}
        key = ("GIFT", fusion[0])
        if text.past == 0:
            self._begin(scope, text, live, key)
            return
        known = scope.run.memory.get(key)
        if known is None or text.cache is None:
            return
        placed: dict[tuple[int, int], Marks] = {}
        for site in (live[name] for name in fusion if name in live):
            length, first = text.cache.get_mask_sizes(text.new, site.layer_idx)
            if (length, first) not in placed:
                kept = known["plan"][:, :, first : text.past]  # where the cache was cropped, other tokens come after it
                placed[length, first] = self.marks(F.pad(kept, (0, length - kept.shape[-1])))
            site.kernel = Ready(marks=placed[length, first])

    def _begin(self, scope: Scope, text: Text, live: Mapping[str, Site], key: tuple[str, str]) -> None:
        """A prompt: its gaze is read while it passes, or in a pass before if an earlier layer needs it."""
        reading, fusion = self.__dict__["_here"]
        at = writing(scope, text)
        gaze = self.gaze(text, scope.arguments.get("input_ids"), len(reading), at[:, 0])
        first = min(live[name].layer for name in fusion if name in live)
        in_time = all(live[name].layer <= first for name in reading)
        if not in_time:
            read_before(scope, text, gaze, reading)
        for name, site in live.items():
            site.kernel = Ready(gaze=gaze, at=at, reads=in_time and name in reading, edits=name in fusion, key=key)

    def gaze(self, text: Text, ids: torch.Tensor | None, layers: int, last: torch.Tensor | None = None) -> Gaze:
        """What is to be read of a prompt, nothing of it read yet.

        Args:
            text: its tokens. ids: (B, S) their ids. layers: how many layers will be read.
            last: (B,) the last token of the prompt, see `question_of`.
        """
        assert text.pictures is not None
        question = question_of(text, self.before, self.after, last)
        content = question
        if self.words is not None and ids is not None:
            content = content_tokens(ids, question, self.words)
        places = [row.nonzero().flatten() for row in content]
        return Gaze(places, text.pictures.shows, question, self.share, layers)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        ready: Ready | None = call.site.kernel
        if ready is None:
            return next(call)
        if ready.marks is None:
            return self._prompt(call, next, ready)
        if call.query.shape[2] == 1:
            return self._edited(call, next(call), ready.marks, last_tokens(call))
        places = torch.arange(call.query.shape[2], device=call.query.device)
        return self._several(call, next, ready.marks, places.expand(call.query.shape[0], -1))

    @torch.compiler.disable
    def _prompt(self, call: Call, next: Next, ready: Ready) -> torch.Tensor:
        """The gaze is read here, or the rows of a prompt that write are edited, or both."""
        assert ready.gaze is not None and ready.at is not None
        if ready.reads:
            ready.gaze.read(call)
        if not ready.edits:
            return next(call)
        plan = ready.gaze.plan(self.alpha, self.clamp)
        call.run.memory[ready.key] = {"plan": plan}
        plan = F.pad(plan, (0, call.key.shape[2] - plan.shape[-1]))  # a static cache has room for more
        return self._several(call, next, self.marks(plan), ready.at)

    @torch.compiler.disable
    def _several(self, call: Call, next: Next, marks: Marks, places: torch.Tensor) -> torch.Tensor:
        """The queries `places` (B, n) are edited, each as if it came alone."""
        out = next(call)
        for at in places.unbind(1):
            out = self._edited(call, out, marks, at)
        return out

    def _edited(self, call: Call, out: torch.Tensor, marks: Marks, at: torch.Tensor) -> torch.Tensor:
        """`out` (B, H, S, D) with the rows of the queries `at` (B,) edited."""
        weights = torch.softmax(row_scores(call, at), -1)
        heads = None if call.heads is None else call.heads.view(-1)
        weights, which = self.edited(weights, marks, heads)
        return with_rows(out, at, row_output(weights, call.value), which[:, :, None, None])

    def marks(self, plan: torch.Tensor) -> Marks:
        """What the rows of all heads and layers need of a plan (B, 3, S): log m; 1.0 if visual; 1.0 if question."""
        log_m, shows, question = plan.unbind(1)
        m = log_m.exp()
        acts = (log_m != 0).any(-1) if self.beta == 1 else (shows > 0).any(-1)
        return Marks(m[:, None], question[:, None] > 0, torch.stack([shows, question, shows * m], -1), acts[:, None])

    def edited(
        self, weights: torch.Tensor, marks: Marks, heads: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """One row of the softmax map of every head, edited.

        Args:
            weights: (B, H, S). marks: what is to be strengthened.
            heads: (H,) bool, those that may be edited; None = all.

        Returns:
            The edited rows (B, H, S), and which heads (B, H) bool are edited; the others' rows are not to be used.
        """
        on_picture, on_question, enhanced = (weights @ marks.groups.to(weights.dtype)).unbind(-1)
        visual, asking = most(on_picture, self.share), most(on_question, self.question_share)
        if heads is not None:
            visual, asking = visual & heads, asking & heads
        was, now = (torch.where(visual, mass, 0.0).sum(-1) for mass in (on_picture, enhanced))
        ratio = torch.where(was > 0, now / was.clamp(min=torch.finfo(was.dtype).tiny), 1.0)[:, None, None]
        rows = torch.where(visual[..., None], weights * marks.m.to(weights.dtype), weights)
        rows = torch.where(asking[..., None] & marks.question, rows * ratio * self.beta, rows)
        return rows / rows.sum(-1, keepdim=True), (visual | asking) & marks.acts


@dataclass(frozen=True, eq=False)
class Marks:
    """What is to be strengthened in the rows of the map.

    Args:
        m: (B, 1, S) factors of the visual tokens, 1 on others. question: (B, 1, S) bool.
        groups: (B, S, 3), whose product with a row is its mass on the picture, on the question, and on the picture
            with the factors.
        acts: (B, 1) bool, rows of the batch in which this changes anything.
    """

    m: torch.Tensor
    question: torch.Tensor
    groups: torch.Tensor
    acts: torch.Tensor


@dataclass(frozen=True, eq=False)
class Ready:
    """What the calls of one site need in the forward in flight.

    Args:
        marks: after the prompt, on the keys of the call. None = this is the prompt.
        gaze: of the prompt. at: (B, n) int64, its queries that write, see `writing`.
        reads: whether the site is to be read now. edits: whether it is a fusion layer.
        key: where the sequence keeps its plan.
    """

    marks: Marks | None = None
    gaze: Gaze | None = None
    at: torch.Tensor | None = None
    reads: bool = False
    edits: bool = False
    key: tuple[str, str] = ("GIFT", "")


def layers_of(model: torch.nn.Module, depth: int) -> Layers:
    """The published layers of a model, or the middle ones of its `depth` decoder layers."""
    config: Any = model.config
    known = PUBLISHED.get((config.model_type, depth, config.get_text_config().hidden_size))
    if known is not None:
        return known
    first = min(math.ceil(0.36 * depth), depth - 1)
    last = max(first, math.floor(0.7 * depth))
    return Layers((min(round(0.34 * depth), depth - 1),), tuple(range(first, last + 1)))
