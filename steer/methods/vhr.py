"""VHR, vision-aware head reinforcement: amplify the heads whose output changes most when the picture is taken away."""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Mapping, Sequence
from contextvars import Context
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, ClassVar, Literal, get_args

import torch

from steer.method import Method, Span
from steer.query_row import last_tokens, with_rows, writing
from steer_patches.blocks import Action, Block
from steer_patches.family import Family
from steer_patches.pictures import text_only
from steer_patches.site import Call, Next, Scope, Site

Outliers = Literal["absolute", "relative", "keep"]
OUTLIERS: tuple[Outliers, ...] = get_args(Outliers)
Measure = Literal["synchronised", "plain"]
MEASURES: tuple[Measure, ...] = get_args(Measure)

Heads = Callable[[torch.Tensor], torch.Tensor]  # output (B, H, D) of the text run -> (B, H) bool


@dataclass(kw_only=True)
class VHR(Method):
    """Amplify, in vision-language models, the heads that look at the picture: fewer things are named that it lacks.

    With a_h (D) the output of head h, before the output projection, at the last token of the prompt, and t_h the same
    for the prompt without its pictures (their tokens are left out, so that the text moves up):

        VHD_h = ||a_h - t_h||^2                                               the head's vision-aware divergence
        VHD_h = 0   where VHD_h > m(VHD) + s(VHD) and ||t_h||^2 > m(||t||^2) + s(||t||^2), if s(VHD) > min_std
        a_h   = alpha * a_h   for the heads above the median of their layer

    with m and s the mean and the unbiased deviation over the heads of a layer. The second line leaves out heads that
    speak loudly of the text alone. The third is done at the prompt's last token, which gives the first word, and at
    every token after it, with the heads that were found at the prompt; the rest of the prompt stays as it is. With
    `logits_to_keep=n` the last n tokens after the pictures are taken to write: assisted decoding's first candidates.

    The text run is made layer by layer beside the prompt's own forward, up to the last edited layer, and its heads are
    amplified too, so that each layer is measured with those before it amplified. It costs the layers' work on the
    prompt's text. Rows without pictures, or with nothing but pictures, stay exactly as they are. So does a sequence
    whose pictures come later than its first forward, or that has tokens when the method is applied: what a
    conversation would be without its pictures is known at its first prompt only, whose heads stay for all of it.
    With `use_cache=False` each forward is a prompt of its own. `steps` must have the prompt for anything to be done.

    Args:
        alpha: factor on the outputs of the selected heads; 2 in the paper, which tried 1.5 to 2; 4 breaks the text.
            1 = off.
        share: part of a layer's heads that is amplified at most: those above the same rank as the median is at 0.5.
            In (0, 1); of heads that diverge alike none is above the others.
        outliers: when the rule of the second line is asked: "absolute" = s(VHD) > min_std, the published one, which
            depends on the size of the model's numbers; "relative" = s(VHD) > min_std * m(VHD); "keep" = never.
        min_std: bound on s(VHD) in the rule of `outliers`.
        measure: "synchronised" = as above; "plain" = both runs without any method, before the forward: needs no layer
            run by itself, but one more prefill of the whole prompt; finds slightly other heads.
        layers: None = layer 1 and the last 14 of 32 (44 %), the layers published for LLaVA-1.5, by the model's depth;
            InstructBLIP has the last 18.
        heads: only these may be amplified; medians are over all heads.

    Source: He et al., "Cracking the Code of Hallucination in LVLMs with Vision-aware Head Divergence", arXiv
    2412.13949. Reconstructed from the paper: its code was not to be had. The squared norm and the outlier rule's
    constants are those of a re-implementation.
    """

    alpha: Annotated[float, Span(0, 4)] = 2.0
    share: Annotated[float, Span(0.05, 0.95)] = 0.5
    outliers: Outliers = "absolute"
    min_std: Annotated[float, Span(0, 3)] = 1.0
    measure: Measure = "synchronised"

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "output"
    needs_pictures: ClassVar[bool] = True
    needs_blocks: ClassVar[bool] = True
    without_preset: ClassVar[str] = "yes"

    def layers_in(self, model: torch.nn.Module, sites: Sequence[Site]) -> str | Sequence[str] | None:
        if self.layers is not None or isinstance(self.heads, Mapping):
            return self.layers
        names = [site.name for site in sites if site.kind == "causal"]
        first_of_last = len(names) - max(round(len(names) * 14 / 32), 1)
        return [name for i, name in enumerate(names) if i == 1 or i >= first_of_last]

    def __post_init__(self) -> None:
        super().__post_init__()
        if not (math.isfinite(self.alpha) and self.alpha >= 0):
            raise ValueError(f"alpha={self.alpha} must be 0 or more: the factor on the heads that see the picture")
        if not 0 < self.share < 1:
            raise ValueError(f"share={self.share} must lie in (0, 1): the part of a layer's heads to amplify")
        if self.outliers not in OUTLIERS:
            raise ValueError(f"outliers={self.outliers!r} does not exist; choose from {', '.join(OUTLIERS)}")
        if not self.min_std >= 0:
            raise ValueError(f"min_std={self.min_std} must not be negative")
        if self.measure not in MEASURES:
            raise ValueError(f"measure={self.measure!r} does not exist; choose from {', '.join(MEASURES)}")
        self._prompt: Prompt | None = None  # while the forward is one with pictures that begins a sequence
        self._heads: dict[str, torch.Tensor] = {}  # after it: by site, (B, H, 1, 1) bool

    def is_neutral(self) -> bool:
        return self.alpha == 1

    def resolved(self, family: Family | None, has_clock: bool) -> VHR:
        return replace(self)

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        self._prompt, self._heads = None, {}
        text = scope.text
        if text is None:
            return
        if text.past:
            known = {name: scope.run.memory.get(("VHR", name)) for name in sites}
            self._heads = {name: kept["heads"][:, :, None, None] for name, kept in known.items() if kept is not None}
        elif text.pictures is not None:
            # generate() may have made the mask already, for a cache of a fixed length
            mask = torch.ones_like(scope.arguments["input_ids"]) if text.valid is None else text.valid.long()
            plain: dict[str, Any] = {"attention_mask": mask, "past_key_values": None, "use_cache": False}
            if "logits_to_keep" in scope.arguments:
                plain["logits_to_keep"] = 1
            changes = {**plain, **text_only(scope.arguments, text)}
            shown = (text.pictures.number >= 0).any(-1)
            at = writing(scope, text)
            self._prompt = Prompt(shown & changes["attention_mask"].any(-1), at)
            with torch.no_grad():
                if self.measure == "synchronised":
                    self._prompt.text = TextRun(scope, changes, at.shape[1])
                else:
                    seen, alone = (last_outputs(scope, sites, given, at.shape[1]) for given in (plain, changes))
                    for name, (site, heads) in sites.items():
                        self._found(seen[name], alone[name], site, heads, self._prompt)

    def after_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]], output: Any) -> Any:
        if self._prompt is not None:
            self._prompt.text = None  # gradient checkpointing may yet compute the prompt's layers again
        return output

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if self._prompt is not None:
            return self._at_prompt(call, next, self._prompt)
        heads = self._heads.get(call.site.name)
        out = next(call)
        return out if heads is None else torch.where(heads, self.alpha * out, out)

    @torch.compiler.disable
    def _at_prompt(self, call: Call, next: Next, prompt: Prompt) -> torch.Tensor:
        """The prompt's output with its last token's edited, once the heads are found."""
        out, name = next(call), call.site.name
        if name not in prompt.heads and prompt.text is not None:
            last = row_of(out.detach(), prompt.at[:, 0])[:, :, 0]
            found = functools.partial(self._found, last, site=call.site, allowed=call.heads, prompt=prompt)
            prompt.text.run_layer(call.site, found, self.alpha)
        for at in prompt.at.unbind(1):
            out = with_rows(out, at, self.alpha * row_of(out, at), prompt.heads[name][:, :, None, None])
        return out

    def _found(
        self, rows: torch.Tensor, text: torch.Tensor, site: Site, allowed: torch.Tensor | None, prompt: Prompt
    ) -> torch.Tensor:
        """(B, H) bool: the heads to amplify, from the outputs (B, H, D) with and without pictures; they are kept."""
        heads = vision_heads(rows, text, self.share, self.outliers, self.min_std)
        heads = heads & prompt.asked[:, None].to(heads.device)
        heads = heads if allowed is None else heads & allowed.view(-1).to(heads.device)
        prompt.heads[site.name] = heads
        site.scope.run.memory[("VHR", site.name)] = {"heads": heads}
        return heads


def vision_heads(
    rows: torch.Tensor, text: torch.Tensor, share: float = 0.5, outliers: str = "absolute", min_std: float = 1.0
) -> torch.Tensor:
    """(B, H) bool: the heads of a layer whose output changes most when the pictures are taken away.

    Args:
        rows: (B, H, D) outputs of the last token. text: (B, H, D) the same without pictures.
        share, outliers, min_std: as in `VHR`.
    """
    heads = rows.shape[1]
    count = math.floor(heads * share + 1e-9)  # 0.29 * 100 is a little below 29
    if count == 0:
        return torch.zeros(rows.shape[:2], dtype=torch.bool, device=rows.device)
    exact = torch.float64 if rows.dtype == torch.float64 else torch.float32
    text = text.detach().to(exact)
    divergence = (rows.detach().to(exact) - text).square().sum(-1)
    if outliers != "keep":
        loudness = text.square().sum(-1)
        std, mean = torch.std_mean(divergence, -1, keepdim=True)
        spread = std > min_std * (mean if outliers == "relative" else 1)
        dropped = spread & (divergence > mean + std) & (loudness > sum(torch.std_mean(loudness, -1, keepdim=True)))
        divergence = divergence.masked_fill(dropped, 0)
    rank = divergence.sort(-1, descending=True).values[:, count, None]  # at 0.5, as many are above it as the median
    return divergence > rank


def row_of(out: torch.Tensor, at: torch.Tensor) -> torch.Tensor:
    """(B, H, 1, D): of an output (B, H, S, D) the tokens `at` (B,)."""
    return out.gather(2, at.view(-1, 1, 1, 1).expand(-1, out.shape[1], 1, out.shape[3]))


def last_outputs(
    scope: Scope, sites: Mapping[str, Any], changes: Mapping[str, Any], back: int
) -> dict[str, torch.Tensor]:
    """(B, H, D) of every site: the `back`-th last token's output in a run of the model without methods."""
    found: dict[str, torch.Tensor] = {}

    def keep(call: Call, next: Next) -> torch.Tensor:
        out = next(call)
        found[call.site.name] = row_of(out, last_tokens(call) + 1 - back)[:, :, 0]
        return out

    assert scope.again is not None
    scope.again(at=dict.fromkeys(sites, keep), **changes)
    return found


@dataclass(eq=False)
class Prompt:
    """The forward of a prompt with pictures.

    Args:
        asked: (B,) bool, rows with pictures and with text.
        at: (B, n) int64, the tokens that write: the prompt's last and, in assisted decoding, candidates after it.
        text: the run without pictures, if it goes beside the forward.
        heads: by site, (B, H) bool, once they are found.
    """

    asked: torch.Tensor
    at: torch.Tensor
    text: TextRun | None = None
    heads: dict[str, torch.Tensor] = field(default_factory=dict)


class TextRun:
    """The same prompt without its pictures, whose layers run when they are asked for, in order.

    Args:
        scope: of the forward under way.
        changes: what makes its arguments those of the prompt's text, padded on the left.
        back: which token from the last is the prompt's.

    Raises:
        RuntimeError: the model's layers are inside of a compiled graph.
    """

    def __init__(self, scope: Scope, changes: Mapping[str, Any], back: int) -> None:
        self._scope, self._back = scope, back
        self._waiting: list[tuple[Block, tuple[Any, ...], dict[str, Any]]] = []
        self._hidden: torch.Tensor | None = None
        assert scope.again is not None
        scope.again(actions={block.name: self._waits(block) for block in scope.blocks}, **changes)
        if not self._waiting:
            raise RuntimeError(
                "VHR runs the layers of a prompt one by one, which it cannot where the prompt's forward is compiled: "
                'leave prompts uncompiled, as generate() does, or give measure="plain"'
            )

    def _waits(self, block: Block) -> Action:
        """Not to run a layer, but to remember what it was called with."""

        def wait(call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            self._waiting.append((block, args, kwargs))
            return args[0] if args else kwargs["hidden_states"]

        return wait

    @torch.no_grad()
    def run_layer(self, site: Site, find: Heads, alpha: float) -> None:
        """Run the layers up to that of a site, where the heads that `find` names are amplified at the prompt's last."""
        asked = False

        def amplify(call: Call, next: Next) -> torch.Tensor:
            nonlocal asked
            out, asked = next(call), True
            at = torch.full((len(out),), out.shape[2] - self._back, device=out.device)
            row = row_of(out, at)
            return with_rows(out, at, alpha * row, find(row[:, :, 0])[:, :, None, None])

        assert self._scope.unsteered is not None
        with self._scope.unsteered(at={site.name: amplify}):
            while not asked:
                block, args, kwargs = self._waiting.pop(0)
                if self._hidden is not None and args:
                    args = (self._hidden, *args[1:])
                elif self._hidden is not None:
                    kwargs = {**kwargs, "hidden_states": self._hidden}
                # an empty context: what the model collects of its layers (output_hidden_states) is not of this run
                self._hidden = Context().run(block.module, *args, **kwargs)
