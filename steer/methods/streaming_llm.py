"""StreamingLLM: keep the first few tokens and a rolling window, so that a model reads and writes without end."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, get_args

import torch

from steer.bind import CompositionError
from steer.method import Span
from steer.windowed import Ready, Sites, Windowed, is_softmax, sink_window
from steer.windows import Group, Windows
from steer_kernels import block_sparse_attention, merge, partial
from steer_patches.family import Family
from steer_patches.rotary import Rotary, rotary_of, turn
from steer_patches.site import Call, Next, Scope, Site
from steer_patches.windowed_cache import WindowedLayer

if TYPE_CHECKING:
    from steer_patches.generation import Text

Positions = Literal["original", "cache"]
POSITIONS: tuple[Positions, ...] = get_args(Positions)
Angles = tuple[torch.Tensor, torch.Tensor]


@dataclass(kw_only=True)
class StreamingLLM(Windowed):
    """Attention to the first tokens (the sinks) and the latest ones; the cache holds no others.

    Query i sees key j if j <= i and (j < n_sink or i - j < n_recent), positions counted over the real tokens of a row.
    What was evicted is forgotten: this keeps the text that follows fluent at constant memory, and adds no recall.

    With `positions="cache"` a token's position is its place in the cache, so that the model never sees a distance of
    n_sink + n_recent or more, and a text may grow far beyond the length that the model was trained for. Rotations are
    relative, so only distances to sinks differ from the original: the query at i meets them turned back to
    min(i, n_sink + n_recent - 1), and the parts over sinks and over recent tokens are merged by their log-sum-exp. Keys
    stay as the model rotated them. Before position ids pass the trained length they start again behind the sinks, and
    the recent keys are turned once to match; that needs every head of the model to evict.

    `steps="1:"` reads the prompt with full attention and evicts after it.

    Args:
        n_sink: first tokens that are kept. 4 is enough for any model; 1 where texts begin with a token of their own.
        n_recent: latest tokens that are kept, the query's own included.
        positions: "cache", as published, or "original": distances are those in the text. Both are the same up to
            n_sink + n_recent tokens. "original" is exactly the masked model, right up to the trained length. None =
            "cache", but "original" for families whose preset says so.

    Source: Xiao et al., "Efficient Streaming Language Models with Attention Sinks", arXiv 2309.17453, section 3.2. The
    defaults are 4 sinks, as there, and 1024 tokens in all.
    """

    n_sink: Annotated[int, Span(0, 16)] = 4
    n_recent: Annotated[int, Span(1, 2048)] = 1020
    positions: Positions | None = None

    without_preset: ClassVar[str] = "yes"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.n_sink < 0 or self.n_recent < 1:
            raise ValueError(
                f"n_sink={self.n_sink}, n_recent={self.n_recent}: sinks may be 0, and at least one recent token is kept"
            )
        if self.positions not in (None, *POSITIONS):
            raise ValueError(f"positions={self.positions!r} does not exist; choose from {', '.join(POSITIONS)}")

    def resolved(self, family: Family | None, has_clock: bool) -> StreamingLLM:
        preset = family.preset("StreamingLLM") if family else None
        settings = preset.settings if preset else {}
        return replace(self, positions=self.positions or settings.get("positions", "cache"))

    def windows(self, site: Site, tokens: int) -> Windows:
        return Windows(self.n_sink, (self.n_recent,) * site.heads)

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        """Find how the layers rotate queries and keys; refuse a rotation that cannot be continued."""
        super().prepare_model(model, sites)
        if self.positions == "original":
            return
        try:
            found = {site.name: rotary_of(model, site) for site in sites if site.window is None}
        except ValueError as error:
            raise CompositionError(f'{error}. Give positions="original"') from None
        alike: list[Rotary] = []  # one object for all layers, so that angles are computed once
        for name, rotary in found.items():
            if rotary is not None:
                same = [known for known in alike if torch.equal(known.frequencies, rotary.frequencies)]
                alike += [] if same else [rotary]
                found[name] = (same or [rotary])[0]
        self._rotary = found
        config: Any = model.config
        self._trained: int = config.get_text_config(decoder=True).max_position_embeddings

    def before_forward(self, scope: Scope, sites: Sites) -> None:
        super().before_forward(scope, sites)
        if self.positions == "original":
            return
        ready: dict[str, Ready] = {name: site.kernel for name, (site, _) in sites.items() if site.kernel is not None}
        base = self._start_again(scope.text, ready)
        made: dict[Rotary, Angles] = {}
        for name, one in ready.items():
            rotary = self._rotary[name]
            if rotary is not None:
                if rotary not in made:
                    made[rotary] = rotary.angles(one.queries.clamp(max=self.size - 1) - one.queries + base)
                one.extra = made[rotary]

    def position_ids(self, text: Text) -> torch.Tensor | None:
        base = _base(text)
        return text.positions - base if base else None

    def prompt_part(self, part: Call, ready: Ready, group: Group) -> torch.Tensor:
        if not self._turns(part, ready):
            return super().prompt_part(part, ready, group)
        tokens, first = part.query.shape[2], self.n_recent  # queries before see all sinks within their window
        windows = tuple((0, window) for _, window in group.windows.pairs)
        mask = sink_window(tokens, windows, part.query.device)
        near = block_sparse_attention(part.query, part.key, part.value, mask, scale=part.scale, return_lse=True)
        numbers = torch.arange(tokens, device=part.query.device)[None]
        late, sinks = numbers[:, first:], slice(0, self.n_sink)
        rotary = self._rotary[part.site.name]
        assert rotary is not None
        query = turn(part.query[:, :, first:], rotary.angles(late.clamp(max=self.size - 1) - late))
        outside = late[:, None, :, None] - numbers[:, sinks] >= self.n_recent
        seen = group.windows.parts(late, numbers[:, sinks])[1] & outside
        far = partial(query, part.key[:, :, sinks], part.value[:, :, sinks], mask=seen, scale=part.scale)
        out, _ = merge([(near[0][:, :, first:], near[1][:, :, first:]), far])
        return torch.cat([near[0][:, :, :first], out], 2)

    def kept_part(self, part: Call, next: Next, ready: Ready, group: Group, numbers: torch.Tensor) -> torch.Tensor:
        if not self._turns(part, ready):
            return super().kept_part(part, next, ready, group, numbers)
        query = turn(part.query, ready.extra)
        sinks, others = slice(0, self.n_sink), slice(self.n_sink, None)
        if ready.is_single and group.sees_all(numbers) and group.kept[2] is not None:
            near = _single(part.query, part.key[:, :, others], part.value[:, :, others], part.scale)
            far = _single(query, part.key[:, :, sinks], part.value[:, :, sinks], part.scale)
            return merge([near, far])[0]
        return _two(part, query, *group.windows.parts(ready.queries, numbers))

    def over_all(self, call: Call, next: Next, ready: Ready) -> torch.Tensor:
        if not self._turns(call, ready):
            return super().over_all(call, next, ready)
        near, far = ready.windows.parts(ready.queries, ready.keys)
        visible, _ = call.visible()
        if visible is not None:
            near, far = near & (visible | (ready.queries < 0)[:, None, :, None]), far & visible
        return _two(call, turn(call.query, ready.extra), near, far)

    @property
    def size(self) -> int:
        """Most tokens that the cache holds."""
        return self.n_sink + self.n_recent

    def _turns(self, call: Call, ready: Ready) -> bool:
        """Whether queries are turned for the sinks: not for original positions, nor where a layer has no rotation.

        Raises:
            ValueError: the model's attention is more than a softmax, so that its parts cannot be merged.
        """
        if self.n_sink == 0 or ready.extra is None:
            return False
        if not is_softmax(call):
            raise ValueError(
                f"{call.site.name} has logit caps, learned sinks or dropout, and parts of such attention cannot be "
                'merged: give positions="original"'
            )
        return True

    def _start_again(self, text: Text | None, ready: Mapping[str, Ready]) -> int:
        """What is taken off the position ids of this forward; more than before where they would pass the trained ones.

        Possible where every head of the model evicts: position ids are those of all heads.
        """
        found = {name: one.layer() for name, one in ready.items() if one.layer is not None}
        layers = {name: layer for name, layer in found.items() if layer is not None}
        if text is None or text.cache is None or len(layers) < len(text.cache.layers):
            return 0
        if any(store.window is None for layer in layers.values() for store in layer.stores):
            return 0
        base, one = _base(text), next(iter(ready.values()))
        behind = one.past - self.size
        if one.longest - base <= self._trained or behind <= base:
            return base
        for name, layer in layers.items():
            layer.start_again(behind, self._rotary[name])
        return behind


def _base(text: Text) -> int:
    """What is taken off the position ids that the model was given."""
    layers = text.cache.layers if text.cache is not None else []
    return next((layer.base for layer in layers if isinstance(layer, WindowedLayer)), 0)


def _single(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, scale: float | None
) -> tuple[torch.Tensor, torch.Tensor]:
    """`partial` for one token: the query heads (B, H, 1, D) of a KV head go as its queries, so no key is repeated."""
    folded = query.reshape(query.shape[0], key.shape[1], -1, query.shape[-1])
    out, lse = partial(folded, key, value, scale=scale)
    return out.reshape(*query.shape[:3], -1), lse.reshape(query.shape[:3])


def _two(call: Call, turned: torch.Tensor, near: torch.Tensor, far: torch.Tensor) -> torch.Tensor:
    """Attention to the `near` keys by the call's query and to the `far` ones by the turned one, (B, H, S, D)."""
    parts = [(call.query, near), (turned, far)]
    return merge([partial(q, call.key, call.value, mask=seen, scale=call.scale) for q, seen in parts])[0]
