"""Where a language model looks, for its tab: the sinks of a prompt, and a pass key in a long text."""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, field
from io import BytesIO
from itertools import pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import ClassVar

import torch
from matplotlib.figure import Figure
from PIL import Image
from torch import Tensor

import steer
from steer.attention_plots import MEASURES, Received, draw_heads
from steer.capture import Capture
from steer.method import Method
from steer_demos.app.jobs import Job
from steer_demos.app.language_answers import MOST_TOKENS, Answer, Part, check_length, read, write
from steer_demos.app.stage import Loaded
from steer_demos.language_measures import steered
from steer_demos.language_probes import kept_keys
from steer_demos.language_tasks import passkey
from steer_demos.look import Look
from steer_demos.look_plots import draw_text
from steer_patches.site import Call, Next

MOST_MAPPED = 300  # tokens of which whole maps are measured: the work grows with their square
ALPHA = 5.0
LEAST_KEY = 100  # tokens of a text with a pass key
MORE = 4  # tokens that an answer may have beyond the key
BARS = 180
MOST = "the most attention of any head as the answer begins"
LABEL = 40  # pixels


@dataclass(frozen=True, eq=False)
class Sinks:
    """Where the attention of a prompt goes.

    Args:
        received: (layers, heads, S) mean weight on each token over the queries that see it.
        words: the tokens as text, S of them.
        next: the token that follows, as text.
    """

    received: Tensor
    words: list[str]
    next: str

    @property
    def shares(self) -> Tensor:
        """(S,) share of all attention that each token gets, over all queries, heads and layers; they sum to 1."""
        tokens = len(self.words)
        return (self.received.double() * torch.arange(tokens, 0, -1)).mean((0, 1)) / tokens

    def table(self, measure: str) -> Tensor:
        """(layers, heads): as `steer.attention_plots.sink_table`."""
        tokens = len(self.words)
        if measure == "first":  # without the first token itself, which has nothing else to look at
            return (self.received[..., 0] * tokens - 1) / (tokens - 1)
        return (self.received[..., 1:] > ALPHA / tokens).sum(-1)


def sinks(
    loaded: Loaded, method: Method, prompt: str, job: Job, *, chat: bool, measure: str
) -> tuple[Image.Image, Image.Image, dict[str, str]]:
    """Where a prompt's attention goes without and with a method: over its text, over the heads, and as figures.

    Args:
        chat: as `read`.
        measure: of the heads: "first" = attention on the first token, "sinks" = how many later sinks each has.

    Raises:
        ValueError: what cannot be read, in words.
    """
    if measure not in MEASURES:
        raise ValueError(f"measure={measure!r} does not exist; choose from {', '.join(MEASURES)}")
    ids = read(loaded, prompt, chat, most=MOST_MAPPED)
    if ids.shape[1] < 2:
        raise ValueError("the prompt is one token, which can only look at itself: write more")
    name = type(method).__name__
    steer.apply(loaded.model, method).remove()
    found = {}
    for done, (title, chosen) in enumerate({"without": None, f"with {name}": method}.items()):
        job.step(done, 2, title)
        found[title] = received(loaded, chosen, ids)
    looks = {f"{title}, next token": _as_look(each) for title, each in found.items()}
    what = "attention on the first token" if measure == "first" else "sinks after the first token"
    with TemporaryDirectory() as folder:
        file = Path(folder) / "heads.png"
        draw_heads({title: each.table(measure) for title, each in found.items()}, file, label=what)
        heads = Image.open(file).convert("RGB")
    figures = {"prompt": f"{ids.shape[1]} tokens"}
    for title, each in found.items():
        figures[title] = (
            f"{100 * each.shares[0]:.0f} % of the attention is on the first token; "
            f"{each.table('sinks').float().mean():.1f} later sinks a head"
        )
    return below_label(draw_text(looks)), below_label(heads, room=2 * LABEL), figures


def below_label(picture: Image.Image, room: int = LABEL) -> Image.Image:
    """The picture with room above it: Gradio writes the label there."""
    page = Image.new("RGB", (picture.width, picture.height + room), "white")
    page.paste(picture, (0, room))
    return page


def received(loaded: Loaded, method: Method | None, ids: Tensor) -> Sinks:
    reading = Received(layers="*")
    with torch.no_grad(), steered(loaded.model, method), steer.apply(loaded.model, reading):
        logits = loaded.model(ids, use_cache=False).logits
    words = [loaded.processor.decode([token]) for token in ids[0].tolist()]
    following = loaded.processor.decode([int(logits[0, -1].argmax())])
    return Sinks(torch.stack(list(reading.means.values())).float().cpu(), words, following)


def _as_look(found: Sinks) -> Look:
    """As `draw_text` takes it."""
    places = tuple(range(len(found.words)))
    return Look(found.next, [found.next], found.shares[None], found.words, places)


@dataclass(frozen=True, eq=False)
class Trial:
    """A pass key in a text, asked for without and with a method.

    Args:
        key: the number.
        parts: the text, the sentences with the number marked.
        needle: (start, stop) of the tokens of these.
        before, after: the answers.
        looks: (S,) where the query looks that makes the first digit, without the method: the most of any head.
        looks_after: the same with the method; None where it computes the attention itself.
        kept: (S,) share of the heads that still see each token with the method; None where it does not say.
    """

    key: str
    parts: list[Part]
    needle: tuple[int, int]
    before: Answer
    after: Answer
    looks: Tensor
    looks_after: Tensor | None
    kept: Tensor | None

    def is_found(self, answer: Answer) -> bool:
        return self.key in answer.text

    def figures(self, method: Method) -> dict[str, str]:
        """What was asked and answered, as rows of a table."""
        rows = {"pass key": f"**{self.key}**, at token {self.needle[0]} of {len(self.looks)}"}
        for title, answer in {"without": self.before, f"with {type(method).__name__}": self.after}.items():
            word = "✓ found" if self.is_found(answer) else "✗ lost"
            rows[title] = f"**{word}**; read in {answer.first:.1f} s, {answer.cache / 1e6:.1f} MB in the cache"
        return rows

    def draw(self, method: Method) -> Image.Image:
        """The text from left to right: where the answer looks, and what the method keeps."""
        name, size = type(method).__name__, len(self.looks)
        rows = {f"without: {MOST}": self.looks}
        if self.looks_after is not None:
            rows[f"with {name}: {MOST}"] = self.looks_after
        if self.kept is not None:
            rows[f"with {name}: share of the heads that still see a token"] = self.kept
        figure = Figure(figsize=(9, 0.6 + 1.5 * len(rows)), layout="constrained")
        panels = figure.subplots(len(rows), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
        edges = torch.linspace(0, size, min(BARS, size) + 1).round().int().tolist()
        for panel, (title, values) in zip(panels, rows.items(), strict=True):
            bars = [float(values[start:stop].max()) for start, stop in pairwise(edges)]
            panel.stairs(bars, edges, fill=True, color="tab:blue")
            panel.axvspan(*self.needle, color="tab:orange", alpha=0.45)
            panel.set_title(title, fontsize=10, loc="left")
            panel.set(xlim=(0, size), ylim=(0, 1.05))
            panel.yaxis.set_major_formatter(lambda value, _: f"{100 * value:.0f} %")
        is_late = self.needle[1] > 0.8 * size
        at, side = (self.needle[0], "right") if is_late else (self.needle[1], "left")
        panels[0].text(at, 0.85, " the pass key ", ha=side)
        panels[-1].set_xlabel("token of the text")
        with BytesIO() as file:
            figure.savefig(file, format="png", dpi=110)
            return below_label(Image.open(file).convert("RGB"))


def trial(loaded: Loaded, method: Method, job: Job, *, tokens: float, depth: float, seed: int) -> Trial:
    """Hide a number in a text, and ask a model for it without and with a method.

    Args:
        tokens: length of the text with its question.
        depth: share of the text before the number, 0 to 1.
        seed: of the text and the number.

    Raises:
        ValueError: the text would be too short or too long, in words.
    """
    if not LEAST_KEY <= tokens <= MOST_TOKENS or tokens != int(tokens):
        raise ValueError(f"tokens={tokens:g} must be a whole number from {LEAST_KEY} to {MOST_TOKENS}")
    if not 0 <= depth <= 1:
        raise ValueError(f"depth={depth:g} must be a number from 0, the beginning, to 1, the end")
    sample = passkey(loaded.processor, int(tokens), depth, seed)
    ids, new = sample["input_ids"].to(loaded.model.device), len(sample["answer"]) + MORE
    check_length(loaded.model, ids.shape[1], room=new)
    steer.apply(loaded.model, method).remove()
    with _looking(loaded) as looking:
        before = write(loaded, ids, job, new_tokens=new, what="without")
    kept, computes = Kept(), type(method).stage == "kernel"
    with (
        steer.apply(loaded.model, kept, method),
        nullcontext() if computes else _looking(loaded) as looking_after,
    ):
        after = write(loaded, ids, job, new_tokens=new, what=f"with {type(method).__name__}", is_second=True)
    start, stop = sample["needle"]
    decode, list_of = loaded.processor.decode, ids[0].tolist()
    parts: list[Part] = [
        (decode(list_of[:start]), None),
        (decode(list_of[start:stop]), "pass key"),
        (decode(list_of[stop:]), None),
    ]
    looks_after = None if looking_after is None else _most(looking_after, ids.shape[1])
    looks = _most(looking, ids.shape[1])
    return Trial(sample["key"], parts, (start, stop), before, after, looks, looks_after, kept.share)


def _looking(loaded: Loaded) -> AbstractContextManager[Capture]:
    return steer.capture(loaded.model, columns="all", queries="last", keep_heads=True)


def _most(captured: Capture, tokens: int) -> Tensor:
    """(tokens,) the most weight that any head gives each token for the first token of the answer, but the first token.

    That one is a sink, which would hide all others.
    """
    rows = [found[0, :, 0, :tokens] for found in captured.maps.values() if found.shape[-1] >= tokens]
    return torch.cat(rows).float().amax(0).cpu().index_fill(0, torch.tensor([0]), 0.0)


@dataclass(kw_only=True)
class Kept(Method, register=False):
    """Reads at the end of a prompt which tokens each head may still see; it changes nothing."""

    seen: dict[str, Tensor | None] = field(default_factory=dict)  # (S,) by site; None where all are

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "inputs"  # around all others
    default_layers: ClassVar[str] = "*"

    @property
    def share(self) -> Tensor | None:
        """(S,) mean over layers and heads; None where no layer says what it keeps."""
        known = [share for share in self.seen.values() if share is not None]
        if not known:
            return None
        every = torch.ones_like(known[0])
        return torch.stack([every if share is None else share for share in self.seen.values()]).mean(0)

    def attend(self, call: Call, next: Next) -> Tensor:
        if call.site.name not in self.seen:
            keep = kept_keys(call)
            self.seen[call.site.name] = None if keep is None else keep[0, :, -1].float().mean(0).cpu()
        return next(call)
