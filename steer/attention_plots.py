"""Pictures of a language model's attention: sinks and other figures of every layer and head, and maps. PNG."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from steer.apply import apply, sites
from steer.capture import Capture, capture
from steer.figures import subplots
from steer.method import Method
from steer.select import expand_braces, matches
from steer_patches.generation import generates
from steer_patches.site import Call, Next, Site
from steer_patches.sites import plain

MEASURES = ("first", "sinks")

TEXT = (
    "The lighthouse stands at the end of a long stone pier. Every evening, a little before sunset, the keeper walks "
    "out with a lamp in one hand and a bag of bread in the other. The gulls know him and follow him all the way. He "
    "climbs ninety-two steps, cleans the glass, and looks for the ferry that comes from the islands twice a week. In "
    "winter the pier is often covered with ice, and he has to hold on to a rope. His daughter once asked him why he "
    "did not live in the town like everybody else. He said that in the town nobody needs a light, because everybody "
    "has one, and that the sea is never twice the same. Later she became a pilot, and whenever she flies home at "
    "night she looks for the small white flash at the end of the pier before she looks for the runway."
)

LABELLED = 60  # most tokens whose text is written beside a map

HeadTable = torch.Tensor  # (layers, heads)


def sink_table(model: torch.nn.Module, ids: torch.Tensor, measure: str = "first", alpha: float = 5.0) -> HeadTable:
    """How much of a sink every head has, over one text.

    Args:
        model: a language model of transformers; what is applied to it counts, also where it computes the attention.
        ids: (1, S) tokens, S at least 2.
        measure: "first" = attention on the first token, mean over all queries after it, 0 to 1. "sinks" = number of
            later tokens k that receive a_k > alpha / S, a_k the mean over the queries that see k.
        alpha: of "sinks".

    Returns:
        (layers, heads), layers in the order of `steer.sites(model)`.

    Raises:
        ValueError: no language model, no text, or an unknown measure.

    Source: a_k and alpha = 5 are those of ACT, arXiv 2406.15765, which always spares the first token.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} does not exist; choose from {', '.join(MEASURES)}")
    _check(model, ids)
    if measure == "first":
        with torch.no_grad(), capture(model, columns=[0], keep_heads=True, effective=True) as captured:
            model(ids, use_cache=False)
        return torch.stack([found[0, :, 1:, 0].mean(-1) for found in captured.maps.values()])
    received = Received(layers="*")
    with torch.no_grad(), apply(model, received):
        model(ids, use_cache=False)
    table = torch.stack(list(received.means.values()))
    return (table[..., 1:] > alpha / ids.shape[1]).sum(-1)


def attention_map(model: torch.nn.Module, ids: torch.Tensor, layer: int, head: int | None = None) -> torch.Tensor:
    """The weights with which one head combines the values, (S, S), queries down; `head` None = mean over the heads.

    Args:
        model, ids: as `sink_table`.
        layer: number of the attention site; negative ones count from the last.
        head: query head.

    Raises:
        ValueError: no language model, no text, or a layer or head that it does not have.
    """
    _check(model, ids)
    found = causal_sites(model)
    if not -len(found) <= layer < len(found):
        raise ValueError(f"layer={layer} does not exist; the model has layers 0 to {len(found) - 1}")
    site = found[layer]
    if head is not None and not 0 <= head < site.heads:
        raise ValueError(f"head={head} does not exist; {site.name} has heads 0 to {site.heads - 1}")
    keep = head is not None
    with torch.no_grad(), capture(model, site.name, columns="all", keep_heads=keep, effective=True) as captured:
        model(ids, use_cache=False)
    weights = captured.maps[site.name][0]
    return weights if head is None else weights[head]


def head_tables(method: Method) -> dict[str, HeadTable]:
    """What a method has for every layer and head: the tables of its plan, and the heads that it is on at.

    Args:
        method: as `steer.load` gives it, or a fitted one; the record of a search counts as its plan.

    Returns:
        Title -> (layers, heads). A table of a plan may have a leading axis of step groups, which become one table each.

    Raises:
        ValueError: it has nothing of the kind.
    """
    tables: dict[str, HeadTable] = {}
    plan = method.record
    if plan is not None:
        shape = (len(plan.sites), plan.heads)
        for name, tensor in plan.tensors.items():
            if tuple(tensor.shape) == shape:
                tables[name] = tensor
            elif tuple(tensor.shape) == (len(plan.starts), *shape):
                groups = [f", from {start:.0%} of the run" if len(plan.starts) > 1 else "" for start in plan.starts]
                tables |= {name + group: table for group, table in zip(groups, tensor, strict=True)}
    names, heads = _layers_of(method)
    if isinstance(method.heads, Mapping) and names and "chosen" not in tables:
        chosen = torch.zeros(len(names), max(heads, *(max(given, default=0) + 1 for given in method.heads.values())))
        for pattern, given in method.heads.items():
            for layer, name in enumerate(names):
                if any(matches(part, name) for part in expand_braces(pattern)):
                    chosen[layer, list(given)] = 1
        tables["heads"] = chosen
    if not tables:
        raise ValueError(
            f"{method.describe()} has nothing for every layer and head: no plan with tables, and no heads for layers"
        )
    return tables


def draw_heads(
    tables: Mapping[str, HeadTable], file: str | Path, title: str = "", label: str = "", log: bool = False
) -> None:
    """Heat maps side by side, layers down and heads across, as PNG.

    Args:
        tables: title of each panel -> (layers, heads).
        file: to write.
        title, label: of the whole picture, and of the colour bar.
        log: colours on a logarithmic scale; what is not above 0 stays white.
    """
    from matplotlib.ticker import MaxNLocator

    layers, heads = next(iter(tables.values())).shape
    size = (1.5 + len(tables) * min(8.0, max(2.5, heads / 4)), min(10.0, max(2.5, layers / 4)))
    figure, panels = subplots(1, len(tables), figsize=size, squeeze=False)
    for panel, (name, table) in zip(panels[0], tables.items(), strict=True):
        image = panel.imshow(
            table.float().cpu().numpy(), aspect="auto", interpolation="nearest", norm=_norm(tables.values(), log)
        )
        panel.set(title=name, xlabel="head", ylabel="layer")
        for axis in (panel.xaxis, panel.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True))
    figure.colorbar(image, ax=list(panels[0]), label=label)
    figure.suptitle(title)
    figure.savefig(file, dpi=130)


def draw_map(
    weights: torch.Tensor, file: str | Path, tokens: Sequence[str] | None = None, title: str = "", log: bool = False
) -> None:
    """One attention map, queries down and keys across, as PNG.

    Args:
        weights: (S, S).
        file: to write.
        tokens: text of each token, written on both axes where they are `LABELLED` or fewer.
        title: of the picture.
        log: colours on a logarithmic scale, from 1e-5.
    """
    count = weights.shape[-1]
    labelled = tokens is not None and count <= LABELLED
    side = max(4.0, 0.22 * count) if labelled else 7.0
    figure, panel = subplots(figsize=(side + 1.5, side))
    image = panel.imshow(weights.float().cpu().numpy(), interpolation="nearest", norm=_norm([weights], log))
    panel.set(title=title, xlabel="key", ylabel="query")
    if labelled:
        names = [token.replace("$", r"\$").replace("\n", "⏎") for token in tokens]  # type: ignore[union-attr]
        panel.set_xticks(range(count), names, rotation=90, fontsize=7)
        panel.set_yticks(range(count), names, fontsize=7)
    figure.colorbar(image, ax=panel, label="attention")
    figure.savefig(file, dpi=130)


def _layers_of(method: Method) -> tuple[list[str], int]:
    """Names of the attention sites of the model that a method was made for, and its number of heads."""
    if (plan := method.record) is not None:
        return list(plan.sites), plan.heads
    made_for = method.__dict__.get("_fingerprint") or method.__dict__.get("_loaded_fingerprint") or {}
    for model in made_for.values():
        return model["sites"], model["config"].get("num_attention_heads") or 1
    return [], 1


def causal_sites(model: torch.nn.Module) -> list[Site]:
    """The attention sites of a language model's decoder."""
    return [site for site in sites(model) if site.kind == "causal"]


def _check(model: torch.nn.Module, ids: torch.Tensor) -> None:
    if not (isinstance(model, torch.nn.Module) and generates(plain(model))):
        raise ValueError(f"{type(model).__name__} is no language model; these pictures are of language models")
    if ids.ndim != 2 or ids.shape[0] != 1 or ids.shape[1] < 2:
        raise ValueError(f"ids have the shape {tuple(ids.shape)}; give one text of two tokens or more: (1, S)")


@dataclass(kw_only=True)
class Received(Capture, register=False):
    """Mean attention that every key receives from the queries that see it; the map of one layer at a time."""

    columns: str | Sequence[int] = "all"
    keep_heads: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.means: dict[str, torch.Tensor] = {}  # (H, S) of each site

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        if call.site.kind == "causal":
            tokens = call.key.shape[2]
            queries = torch.arange(tokens, 0, -1, device=call.key.device).clamp(max=call.site.window or tokens)
            self.means[call.site.name] = self._probe(call, slice(0, tokens), next)[0].sum(-2) / queries
        return next(call)


def _norm(tables: Iterable[torch.Tensor], log: bool) -> Any:
    """Colours of all tables on one scale."""
    from matplotlib.colors import LogNorm, Normalize

    values = torch.cat([table.float().flatten() for table in tables])
    values = values[~values.isnan()]
    top = max(values.tolist(), default=0.0)
    if not log:
        return Normalize(min([0.0, *values.tolist()]), top or 1.0)
    positive = values[values > 0]
    if not len(positive):
        raise ValueError("a logarithmic scale shows values above 0, and there are none")
    return LogNorm(max(float(positive.min()), 1e-5 * top), top, clip=False)
