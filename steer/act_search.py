"""The search of ACT: every head is tried alone on tasks with choices, many trials in one forward."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields
from typing import Any

import torch

from steer.method import Method
from steer.methods.act import ACT
from steer.plan import Plan, Search
from steer_patches.family import Family
from steer_patches.site import Call, Next, Scope, Site

OBJECTIVES = ("accuracy", "margin")
KEPT = ("left alone", "calibrated")

Heads = tuple[str, tuple[int, ...]]  # a site and heads of it


@dataclass
class Found:
    """What was found so far, summed over samples: of every head tried alone (L, H), and of the model as it is.

    Args:
        sites: names of the L sites.
        tried: (L, H) bool, the heads that are tried.
        right: (L, H) int64, samples whose right choice was the likeliest.
        margin: (L, H) float64, log-probability of the right choice less that of the best other one.
        plain_right, plain_margin: the same without any edit.
    """

    sites: list[str] = field(default_factory=list)
    tried: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.bool))
    right: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.int64))
    margin: torch.Tensor = field(default_factory=lambda: torch.zeros(0, 0, dtype=torch.float64))
    plain_right: int = 0
    plain_margin: float = 0.0
    samples: int = 0


@dataclass(kw_only=True)
class HeadSearch(Search, ACT, register=False):
    """Keep the heads whose calibration alone helps: made by `ACT.search`, run by `steer.calibrate`.

    A sample is {"input_ids": (1, S) the prompt, "choices": lists of token ids, "label": index of the right one}. A
    choice scores the sum of the log-probabilities of its tokens after the prompt, and the answer is the best of them.
    A head is kept where the objective over all samples is higher with its calibration than without; ties are dropped.

    All trials go through the model together: the unedited prompt runs as row 0 of a batch, and at every layer one new
    row for each head of the layer joins, whose output of that head is the calibrated one. So the layers before a head
    are never run again for its trial. Prompts are calibrated as without a cache: the tokens of a choice belong to
    the text whose sinks are found.

    Args:
        objective: "accuracy", as in the paper, or "margin" = mean log-probability of the right choice less that of the
            best other one, which tells heads apart on few samples.
        batch: most trials in one forward; fewer take less memory.
    """

    objective: str = "accuracy"
    batch: int = 256
    found: Found = field(default_factory=Found)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.objective not in OBJECTIVES:
            raise ValueError(f"objective={self.objective!r} does not exist; choose from {', '.join(OBJECTIVES)}")
        if self.batch < 1:
            raise ValueError(f"batch={self.batch} must be at least 1 trial")
        self._site_heads: list[Heads] = []
        self._trials: dict[str, torch.Tensor] = {}  # of the forward in flight: site -> heads of the rows that join

    @classmethod
    def of(cls, method: ACT, **options: Any) -> HeadSearch:
        """The search of a method with its settings."""
        method = method.resolved(None, False)
        return cls(**{f.name: getattr(method, f.name) for f in fields(ACT)}, **options)

    def resolved(self, family: Family | None, has_clock: bool) -> ACT:
        return self

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        self._site_heads = [
            (name, tuple(range(site.heads) if heads is None else heads.view(-1).nonzero().view(-1).tolist()))
            for name, (site, heads) in sites.items()
        ]

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        out, heads = next(call), self._trials.get(call.site.name)
        if heads is None:
            return out
        heads = heads.to(out.device)
        edited, _ = self.edited(_first_row(call), heads)
        rows = torch.arange(out.shape[0] - len(heads), out.shape[0], device=out.device)
        return out.index_put((rows, heads), edited[0].to(out.dtype))

    def run(self, target: Any, sample: Mapping[str, Any], seed: int) -> None:
        """Score the choices without an edit and with every head's, and add up who was right."""
        prompt, choices, label = _checked(sample)
        scores: dict[int, torch.Tensor] = {}  # choice -> (1 + trials,)
        for start, members in _by_start(choices).items():
            tokens = torch.tensor([start], dtype=prompt.dtype, device=prompt.device)
            logits = self._logits(target, torch.cat([prompt, tokens], 1), len(start) + 1)
            logs = torch.log_softmax(logits.float(), -1)
            for index in members:
                wanted = torch.tensor(choices[index], device=logs.device)
                scores[index] = (
                    logs.gather(2, wanted[None, :, None].expand(len(logs), -1, 1)).sum((1, 2)).double().cpu()
                )
        others = torch.stack([score for index, score in scores.items() if index != label]).amax(0)
        self._note(scores[label] > others, scores[label] - others)

    def _logits(self, target: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
        """(1 + trials, last, vocabulary): the last positions without an edit, then of every trial, site after site."""
        self._trials = {}
        plain = _forward(target, tokens, last)
        logits = [plain]
        for group in _groups(self._site_heads, self.batch):
            self._trials = {name: torch.tensor(heads) for name, heads in group}
            hooks = [
                _layer_of(target, name).register_forward_pre_hook(_joining(len(heads)), with_kwargs=True)
                for name, heads in group
            ]
            try:
                logits.append(_forward(target, tokens, last)[1:])
            finally:
                self._trials = {}
                for hook in hooks:
                    hook.remove()
        return torch.cat(logits)

    def _note(self, right: torch.Tensor, margin: torch.Tensor) -> None:
        """Of the unedited model and then of every trial."""
        found = self.found
        if not found.sites:
            heads = max(head for _, heads in self._site_heads for head in heads) + 1
            found.sites = [name for name, _ in self._site_heads]
            found.tried = torch.zeros(len(found.sites), heads, dtype=torch.bool)
            for tried, (_, these) in zip(found.tried, self._site_heads, strict=True):
                tried[list(these)] = True
            found.right = torch.zeros(found.tried.shape, dtype=torch.int64)
            found.margin = torch.zeros(found.tried.shape, dtype=torch.float64)
        found.right[found.tried] += right[1:].long()
        found.margin[found.tried] += margin[1:]
        found.plain_right += int(right[0])
        found.plain_margin += float(margin[0])
        found.samples += 1

    def state(self) -> dict[str, Any]:
        return dict(vars(self.found))

    def load_state(self, state: Mapping[str, Any]) -> None:
        for name, value in state.items():
            setattr(self.found, name, value)

    def figure(self) -> str:
        found = self.found
        return f"accuracy {found.plain_right / found.samples:.3f} without" if found.samples else ""

    def finish(self) -> Method:
        found = self.found
        plain = found.plain_right if self.objective == "accuracy" else found.plain_margin
        kept = ((found.right if self.objective == "accuracy" else found.margin) > plain) & found.tried
        gains = {
            "accuracy_gain": (found.right - found.plain_right) / found.samples,
            "margin_gain": (found.margin - found.plain_margin) / found.samples,
        }
        plan = Plan(
            sites=tuple(found.sites),
            heads=kept.shape[1],
            tensors={
                "kept": kept[None].to(torch.int8),
                **{name: torch.where(found.tried, gain, 0.0)[None].float() for name, gain in gains.items()},
            },
            report={
                "names": {"kept": list(KEPT)},
                "figures": {
                    "accuracy without": found.plain_right / found.samples,
                    "best accuracy with one head": float(found.right[found.tried].max()) / found.samples,
                    "heads tried": int(found.tried.sum()),
                    "heads kept": int(kept.sum()),
                },
            },
        )
        heads = {name: row.nonzero().view(-1).tolist() for name, row in zip(found.sites, kept, strict=True)}
        settings = {f.name: getattr(self, f.name) for f in fields(ACT)}
        settings |= {"heads": {name: these for name, these in heads.items() if these}, "plan": plan}
        return ACT(**settings)


def _checked(sample: Mapping[str, Any]) -> tuple[torch.Tensor, list[list[int]], int]:
    """Prompt, choices and label of a sample."""
    missing = [name for name in ("input_ids", "choices", "label") if name not in sample]
    if missing:
        raise ValueError(
            f"a sample of ACT's search has no {', '.join(missing)}; it is a dict of input_ids (1, S), choices (lists "
            "of token ids) and label (the index of the right choice)"
        )
    prompt, choices, label = sample["input_ids"], [list(choice) for choice in sample["choices"]], int(sample["label"])
    if prompt.ndim != 2 or prompt.shape[0] != 1:
        raise ValueError(f"input_ids must be one prompt (1, S), not {tuple(prompt.shape)}")
    if len(choices) < 2 or not all(choices) or not 0 <= label < len(choices):
        raise ValueError(
            f"{len(choices)} choices with label {label}: give at least two, each of some tokens, and one's index"
        )
    return prompt, choices, label


def _by_start(choices: Sequence[Sequence[int]]) -> dict[tuple[int, ...], list[int]]:
    """The choices by all of their tokens but the last, which one forward after the prompt serves."""
    starts: dict[tuple[int, ...], list[int]] = {}
    for index, choice in enumerate(choices):
        starts.setdefault(tuple(choice[:-1]), []).append(index)
    return starts


def _groups(site_heads: Sequence[Heads], batch: int) -> list[list[Heads]]:
    """Sites and heads in their order, cut so that at most `batch` heads are in a group."""
    groups: list[list[Heads]] = [[]]
    room = batch
    for name, heads in site_heads:
        while heads:
            if room == 0:
                groups.append([])
                room = batch
            groups[-1].append((name, heads[:room]))
            heads, room = heads[room:], room - len(heads[:room])
    return groups


def _forward(target: Any, tokens: torch.Tensor, last: int) -> torch.Tensor:
    with torch.no_grad():
        return target(input_ids=tokens, use_cache=False, logits_to_keep=last).logits


def _layer_of(target: torch.nn.Module, site: str) -> torch.nn.Module:
    """The decoder layer that an attention module belongs to."""
    return target.get_submodule(site.rpartition(".")[0])


def _joining(rows: int) -> Any:
    """A hook before a decoder layer: as many copies of the first row of its hidden states join."""

    def join(layer: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        hidden = torch.cat([hidden, hidden[:1].expand(rows, *hidden.shape[1:])])
        return ((hidden, *args[1:]), kwargs) if args else (args, {**kwargs, "hidden_states": hidden})

    return join


def _first_row(call: Call) -> Call:
    mask = call.mask
    if isinstance(mask, torch.Tensor) and mask.shape[0] > 1:
        mask = mask[:1]
    return call.replace(query=call.query[:1], key=call.key[:1], value=call.value[:1], mask=mask)
