"""The methods for vision-language models as references do them: the whole softmax map of a layer, edited in place.

What `steer bench vlm` compares with, in speed and in every output; for one row with one picture, without padding.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from transformers import DynamicCache

from steer.handle import Handle
from steer.method import Method
from steer.methods.gift import layers_of
from steer_patches.pictures import text_only
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.sites import find_sites


@dataclass(kw_only=True)
class Dense(Method, register=False):
    """Attention through its map. Subclasses edit it.

    Args:
        method: whose edit this is, as it runs on the model.
    """

    method: Any = None
    kept: dict[Any, Any] = field(default_factory=dict)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_pictures: ClassVar[bool] = True

    @classmethod
    def of(cls, model: torch.nn.Module, handle: Handle) -> Dense:
        """The edit of the one method that this handle has on a model."""
        return cls(method=handle.bindings[0].method, layers=[site.name for site in handle.sites])

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        return self.output(call, self.edit(call, softmax(self.scores(call))))

    def output(self, call: Call, weights: torch.Tensor) -> torch.Tensor:
        """(B, H, S, D) from the map (B, H, S, S_kv)."""
        return weights.to(call.value.dtype) @ call.expanded()[1]

    def scores(self, call: Call) -> torch.Tensor:
        """What the softmax is taken of, (B, H, S, S_kv)."""
        return scores(call)

    def edit(self, call: Call, weights: torch.Tensor) -> torch.Tensor:
        """The map after the edit."""
        return weights


def scores(call: Call) -> torch.Tensor:
    """(B, H, S, S_kv): the scaled products, -inf where a query may not attend."""
    products = call.query @ call.expanded()[0].mT * call.softmax_scale
    keep, causal = call.visible()
    if causal:
        keep = torch.ones(products.shape[-2:], dtype=torch.bool, device=products.device).tril()
    return products if keep is None else products.masked_fill(~keep, -torch.inf)


def softmax(scores: torch.Tensor) -> torch.Tensor:
    """In float32 as the models' eager attention does, in float64 where the scores are."""
    return scores.softmax(-1, dtype=None if scores.dtype == torch.float64 else torch.float32)


def visual(call: Call) -> torch.Tensor:
    """(S_kv,) bool: the keys that show a picture."""
    assert call.text is not None and call.text.pictures is not None
    return call.text.pictures.shows[0]


def prompting(scope: Scope) -> bool:
    """Whether this is the forward of a prompt with pictures."""
    return scope.text is not None and scope.text.pictures is not None and scope.text.past == 0


@dataclass(kw_only=True)
class DenseVAR(Dense, register=False):
    """VAR: the sinks are found in what enters each layer; the budget moves within every selected row of the map."""

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        for site in sites:
            layer = model.get_submodule(site.name.rpartition(".")[0])
            layer.register_forward_pre_hook(self._finder(site.name), with_kwargs=True)

    def _finder(self, name: str) -> Callable[..., None]:
        def find(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            states = (args[0] if args else kwargs["hidden_states"])[0].float()
            if states.shape[0] > 1:
                unit = states * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt()
                self.kept[name] = unit[:, list(self.method.sink_dims)].abs().amax(-1) > self.method.tau

        return find

    def edit(self, call: Call, weights: torch.Tensor) -> torch.Tensor:
        assert call.text is not None and call.text.pictures is not None
        method, shows, found = self.method, visual(call), self.kept[call.site.name]
        sinks = F.pad(found, (0, len(shows) - len(found)))
        of = torch.stack([shows, shows & sinks, sinks], -1).to(weights)
        on_picture, on_its_sinks, on_sinks = (weights @ of).split(1, -1)
        rest = on_picture - on_its_sinks
        reads = call.text.pictures.after[0, call.text.past :, None] & (shows & sinks).any()
        chosen = reads & (on_picture >= method.v_min) & (rest >= method.rho * on_picture)
        more = 1 + (1 - method.p) * on_sinks / rest
        edited = weights * torch.where(sinks, method.p, torch.where(shows, more, 1.0))
        return torch.where(chosen, edited, weights)


@dataclass(kw_only=True)
class DenseVHR(Dense, register=False):
    """VHR: the text alone goes through the model before the prompt does.

    The prompt's outputs are those of the pass that is edited; with measure="plain" those of one more before it.
    """

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        if not prompting(scope):
            return
        assert scope.again is not None and scope.text is not None and scope.text.pictures is not None
        changes = {"past_key_values": None, "use_cache": False, "logits_to_keep": 1}
        if self.method.measure == "plain":
            scope.again(at=dict.fromkeys(sites, partial(self._keep, "prompt")), **changes)
        changes = {**changes, **text_only(scope.arguments, scope.text)}
        scope.again(at=dict.fromkeys(sites, partial(self._keep, "text")), **changes)

    def _keep(self, what: str, call: Call, next: Next) -> torch.Tensor:
        out = super().attend(call, next)
        self.kept[what, call.site.name] = out[:, :, -1].float()
        return out

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        out, name = super().attend(call, next), call.site.name
        if call.query.shape[2] > 1:
            found = self.kept.get(("prompt", name), out[:, :, -1].float())
            self.kept["heads", name] = self._heads(found, self.kept["text", name])
        gain = torch.where(self.kept["heads", name], self.method.alpha, 1.0)[..., None]
        return torch.cat([out[:, :, :-1], (out[:, :, -1] * gain).to(out.dtype)[:, :, None]], 2)

    def _heads(self, found: torch.Tensor, text: torch.Tensor) -> torch.Tensor:
        """(B, H) bool: the heads whose outputs (B, H, D) are furthest from those of the text alone."""
        change, loud = (found - text).square().sum(-1), text.square().sum(-1)
        if change.std() > 1:
            outlier = (change > change.mean() + change.std()) & (loud > loud.mean() + loud.std())
            change = change.masked_fill(outlier, 0)
        return change > change.quantile(1 - self.method.share, -1, keepdim=True)


@dataclass(kw_only=True)
class DenseGIFT(Dense, register=False):
    """GIFT: one whole pass for the map of a saliency layer, then the last row of the fusion layers' maps."""

    @classmethod
    def of(cls, model: torch.nn.Module, handle: Handle) -> DenseGIFT:
        names = [site.name for site in find_sites(model) if site.kind == "causal"]
        saliency, fusion = layers_of(model, len(names))
        edit = cls(method=handle.bindings[0].method, layers=[names[layer] for layer in fusion])
        edit.kept["saliency"] = [names[layer] for layer in saliency]
        return edit

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        if not prompting(scope):
            return
        maps: list[torch.Tensor] = []

        def keep(call: Call, next: Next) -> torch.Tensor:
            maps.append(softmax(scores(call)))
            return self.output(call, maps[-1])

        assert scope.again is not None and scope.text is not None and scope.text.pictures is not None
        scope.again(at=dict.fromkeys(self.kept["saliency"], keep), past_key_values=None, use_cache=False)
        pictures = scope.text.pictures
        shows, asks = pictures.shows[0], pictures.after[0].nonzero()[:, 0]
        shifts = [(m[0][:, asks][..., shows] - m[0][:, asks - 1][..., shows]).clamp(min=0) for m in maps]
        strong = [shift[shift.sum((1, 2)).topk(shift.shape[0] // 2).indices] for shift in shifts]
        salient = torch.stack([shift.mean((0, 1)) for shift in strong]).mean(0)
        reach = self.method.clamp * salient.std()
        salient = salient.clamp(salient.mean() - reach, salient.mean() + reach)
        spread = (salient - salient.min()) / (salient.max() - salient.min())
        self.kept["gain"] = torch.ones_like(shows, dtype=spread.dtype)
        self.kept["gain"][shows] = torch.exp(self.method.alpha * spread)
        self.kept["question"] = pictures.after[0]

    def edit(self, call: Call, weights: torch.Tensor) -> torch.Tensor:
        question = F.pad(self.kept["question"], (0, weights.shape[-1] - len(self.kept["question"])))
        shows, method, heads = visual(call), self.method, weights.shape[1]
        row = weights[0, :, -1]  # (H, S_kv)
        on = row @ torch.stack([shows, question], -1).to(row)
        looks, reads = (torch.zeros(2, heads, 1, dtype=torch.bool, device=row.device)).unbind()
        looks[on[:, 0].topk(int(method.share * heads)).indices] = True
        reads[on[:, 1].topk(int(method.question_share * heads)).indices] = True
        gain = F.pad(self.kept["gain"], (0, len(shows) - len(self.kept["gain"])), value=1.0).to(row)
        new = torch.where(looks, row * gain, row)
        ratio = (new * looks * shows).sum() / (on[:, :1] * looks).sum()
        new = torch.where(reads & question, new * ratio * method.beta, new)
        edited = weights.clone()
        edited[0, :, -1] = torch.where(looks | reads, new / new.sum(-1, keepdim=True), row)
        return edited


@dataclass(kw_only=True)
class DenseImbalanced(Dense, register=False):
    """ImbalancedAttention: the vision tower's maps choose tokens, whose scores rise in the last row."""

    kinds: ClassVar[tuple[str, ...]] = ("self", "causal")

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        if not prompting(scope):
            return
        assert scope.text is not None and scope.text.pictures is not None
        first, second = (scope.read["image"]["dense", name] for name, (site, _) in sites.items() if site.kind == "self")
        method, patches = self.method, len(first)
        local = torch.zeros(patches, dtype=torch.bool, device=first.device)
        local[first.topk(round(method.local_ratio * patches)).indices] = True
        low, high = second.quantile(0.25), second.quantile(0.75)
        summary = second > high + 1.5 * (high - low)
        strength = torch.where(summary, method.beta, torch.where(local, method.alpha, 0.0))
        self.kept["strength"] = torch.zeros(scope.text.new, device=first.device)
        self.kept["strength"][scope.text.pictures.shows[0]] = strength

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if call.site.kind == "causal":
            return super().attend(call, next)
        weights = softmax(scores(call))
        _, _, queries, _ = weights.shape
        total = weights[0].sum(0)
        of_class = queries % 2 and round((queries - 1) ** 0.5) ** 2 == queries - 1  # its token comes before the grid
        if call.site.scope.reading is not None:
            read = total[0, 1:] if of_class else total.mean(0)
            call.site.scope.reading["dense", call.site.name] = read.float()
        return self.output(call, weights)

    def scores(self, call: Call) -> torch.Tensor:
        plain = scores(call)
        strength = F.pad(self.kept["strength"], (0, plain.shape[-1] - len(self.kept["strength"]))).to(plain)
        row = plain[:, :, -1]
        raised = torch.where(row == -torch.inf, row, row + strength * row.abs())
        return torch.cat([plain[:, :, :-1], raised[:, :, None]], 2)

    def after_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]], output: Any) -> Any:
        method = self.method
        if method.gamma == 1 or scope.text is None or scope.text.pictures is None:
            return output
        assert scope.again is not None
        if scope.text.past == 0:
            self.kept["text"] = DynamicCache()
            changes = text_only(scope.arguments, scope.text)
        else:
            changes = {"attention_mask": None, "position_ids": None, "cache_position": None}
        plain = scope.again(**{**changes, "past_key_values": self.kept["text"], "use_cache": True})
        with_picture, without = (o.logits[:, -1].float().log_softmax(-1) for o in (output, plain))
        least = with_picture.amax(-1, keepdim=True) + torch.tensor(method.cutoff).log().item()
        guided = method.gamma * (with_picture - without) + without
        output.logits[:, -1] = guided.masked_fill(with_picture < least, -torch.inf)
        return output
