"""Sites, calls and layouts: the words in which a method sees a model."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, get_args

import torch
from torch.nn.attention.flex_attention import BlockMask, create_mask

from steer_kernels.order import TokenOrder

if TYPE_CHECKING:
    from steer_patches.blocks import Block
    from steer_patches.generation import Text

Role = Literal["uncond", "cond", "perturbed", "source", "target", "reference"]
ROLES: tuple[Role, ...] = get_args(Role)
KINDS = ("self", "cross", "joint", "temporal", "causal", "text")


@dataclass(frozen=True)
class Layout:
    """Where image (or video) and text tokens lie in the sequences of one forward.

    Args:
        image_tokens: number of visual tokens of one row, or None where it differs from site to site (UNets).
        grid: (frames, height, width) of the visual tokens in raster order; in a UNet, of the latents at its entry.
        text_first: True where joint sequences run [text, image], False for [image, text].
        text_tokens: text tokens of a joint sequence, or None where that differs from row to row.
        order: the order in which the visual tokens pass through the blocks; None = raster.
    """

    image_tokens: int | None = None
    grid: tuple[int, int, int] | None = None
    text_first: bool = False
    text_tokens: int | None = None
    order: TokenOrder | None = None

    def spans(self, tokens: int) -> tuple[slice, slice]:
        """(image, text) slices of a sequence of `tokens` tokens."""
        image = tokens if self.image_tokens is None else min(self.image_tokens, tokens)
        if self.text_first:
            return slice(tokens - image, tokens), slice(0, tokens - image)
        return slice(0, image), slice(image, tokens)

    def grid_of(self, image_tokens: int) -> tuple[int, int, int]:
        """The (frames, height, width) grid that has `image_tokens` tokens; halves a UNet's latents until it fits."""
        if self.grid is None:
            raise ValueError("this model's family states no token grid; give one in its layout file")
        frames, height, width = self.grid
        if self.image_tokens is None:
            frames = 1
            while height * width > image_tokens and max(height, width) > 1:
                height, width = (height + 1) // 2, (width + 1) // 2
        if frames * height * width != image_tokens:
            raise ValueError(f"{image_tokens} image tokens do not fill the grid {self.grid} of this model's input")
        return frames, height, width


@dataclass(eq=False)
class Run:
    """Position inside one pipeline call or one `generate`. Read it outside compiled regions only.

    Args:
        step: index of the current step, from 0; of a language model: forwards of this sequence before this one.
        num_steps: number of steps of the run, once known.
        branch: name of the CFG branch in flight, where the pipeline states it.
        calls: denoiser calls made in this step so far.
        batch: rows of the step's first denoiser call.
        phase: "denoise"; of a language model "prefill" where the cache is empty, else "decode".
        arguments: the pipeline's arguments of this run, defaults filled in.
        tokens: of a language model: tokens of the sequence before this forward.
        memory: of a language model: what methods keep for the sequence, as nested dicts, lists and tuples of plain
            values and of tensors whose first dimension is the batch. It follows the cache: beam search, repeats and
            selections of rows act on the tensors, a copied cache has a copy. Keys: (method, site name).
    """

    step: int = 0
    num_steps: int | None = None
    branch: str | None = None
    calls: int = 0
    batch: int | None = None
    phase: str = "denoise"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    tokens: int = 0
    memory: dict[Any, Any] = field(default_factory=dict)
    scheduler: Any = field(default=None, repr=False)

    @property
    def timestep(self) -> float | None:
        """The scheduler's current timestep (0 to 1000 for most schedulers)."""
        return self._scheduled("timesteps")

    @property
    def sigma(self) -> float | None:
        """The scheduler's current noise level, where it has one."""
        return self._scheduled("sigmas")

    def _scheduled(self, name: str) -> float | None:
        values = getattr(self.scheduler, name, None)
        if values is None or self.num_steps is None:
            return None
        skipped = len(self.scheduler.timesteps) - self.num_steps  # image-to-image starts late in the schedule
        return float(values[min(skipped + self.step, len(values) - 1)])


class Scope:
    """What all sites of one model share: the rows and layout of the forward in flight, and the run."""

    def __init__(self) -> None:
        self.rows: tuple[str, ...] = ("cond",)
        self.layout: Layout | None = None
        self.text: Text | None = None
        self.in_forward: bool | None = None  # of a language model: whether one that is steered is under way
        self.device = torch.device("cpu")  # of the forward's inputs
        self.run = Run()
        self.blocks: list[Block] = []  # the model's layers, driven where a method `needs_blocks`
        self.arguments: Mapping[str, Any] = {}  # of the forward of a language model that is under way
        self.again: Callable[..., Any] | None = None  # runs the model under way with other arguments
        self.unsteered: Callable[..., Any] | None = None  # context in which single layers of it run without methods
        self.reading: dict[Any, Any] | None = None  # while pictures are encoded: what methods keep of it, by any key
        self.read: dict[str, dict[Any, Any]] = {}  # "image", "video" -> what they kept of the forward's pictures


@dataclass(eq=False)
class Site:
    """One attention module of a model.

    Args:
        name: dotted path of the module, e.g. `transformer_blocks.13.attn`.
        index: number of the site in the order of `named_modules`.
        kind: "self", "cross", "joint" (image and text in one sequence), "temporal", "causal" or "text" (refiner).
        heads, kv_heads, head_dim: query heads, key/value heads, channels of a head.
        processor: class name of the attention processor or implementation.
        ports: attention calls in that processor's source; 0 where it cannot be hooked.
        main_port: the ordinary one among them (others attend to image prompts and the like).
        refusal: why it cannot be hooked, else None.
        layer: number of the site among those of its kind.
        layer_idx: of a language model, the layer of the cache in which the site keeps its keys and values.
        window: of a language model, latest keys that a query sees at all; None = every key before it.
        chain: what runs here.
        kernel: what the one method of the stage "kernel" here has made ready for the forward in flight.
    """

    name: str
    index: int
    kind: str
    heads: int
    kv_heads: int
    head_dim: int
    processor: str
    ports: int = 1
    main_port: int = 0
    refusal: str | None = None
    layer: int = 0
    layer_idx: int | None = None
    window: int | None = None
    chain: tuple[Any, ...] = ()
    kernel: Any = field(default=None, repr=False)
    scope: Scope = field(default_factory=Scope, repr=False)

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())  # a copied or pickled module comes out unsteered


@dataclass(eq=False)
class Call:
    """One attention call in flight.

    Args:
        query: (B, H, S, D). key, value: (B, H_kv, S_kv, D).
        mask: boolean (True = attend) or additive mask, broadcastable to (B, H, S, S_kv), or None.
        scale: factor on query-key products; None = 1 / sqrt(D).
        is_causal: the backend applies a causal mask.
        site, port: where the call is made.
        heads: boolean (H, 1, 1) mask of the heads that the current method may edit; None = all.
        extra: what the model's own backend needs besides.
        own_rows: roles of this call's rows where it holds a part of the batch only; None = those of the forward.
        head_range: the site's heads that this call holds, where they are split between devices; None = all.
    """

    query: torch.Tensor
    key: torch.Tensor
    value: torch.Tensor
    mask: torch.Tensor | None
    scale: float | None
    is_causal: bool
    site: Site
    port: int
    heads: torch.Tensor | None = None
    extra: dict[str, Any] = field(default_factory=dict)
    own_rows: tuple[str, ...] | None = None
    head_range: slice | None = None

    def replace(self, **changes: Any) -> Call:
        """A copy with some fields changed."""
        return replace(self, **changes)

    @property
    def layout(self) -> Layout | None:
        """Layout of the forward in flight; None where the model's family is unknown."""
        return self.site.scope.layout

    @property
    def text(self) -> Text | None:
        """The tokens of the forward in flight; None where the model is no language model."""
        return self.site.scope.text

    @property
    def rows(self) -> tuple[str, ...]:
        """Role of each equal share of the batch, in order, e.g. ("uncond", "cond")."""
        return self.site.scope.rows if self.own_rows is None else self.own_rows

    @property
    def run(self) -> Run:
        """Position in the run; outside compiled regions only."""
        return self.site.scope.run

    @property
    def softmax_scale(self) -> float:
        """The scale that the backend will use."""
        return self.scale if self.scale is not None else self.query.shape[-1] ** -0.5

    def spans(self) -> tuple[slice, slice]:
        """(image, text) slices of this call's query sequence. Sites that are not joint hold image tokens only."""
        tokens = self.query.shape[2]
        if self.site.kind != "joint":
            return slice(0, tokens), slice(tokens, tokens)
        if self.layout is None:
            raise ValueError(
                f"no layout is known for the joint attention at {self.site.name}: its family is not covered"
            )
        return self.layout.spans(tokens)

    def expanded(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Key and value with one head per query head (grouped-query attention unrolled)."""
        groups = self.query.shape[1] // self.key.shape[1]
        if groups == 1:
            return self.key, self.value
        return self.key.repeat_interleave(groups, 1), self.value.repeat_interleave(groups, 1)

    def visible(self) -> tuple[torch.Tensor | None, bool]:
        """Which keys a query may see, from the mask in whatever form the model's backend takes it.

        Returns:
            (keep, causal): bool (B or 1, H or 1, S or 1, S_kv) or None = all; `causal` (then keep is None): key j is
            visible to query i if j <= i, in a call with as many queries as keys.

        Raises:
            ValueError: an additive mask that does more than hide keys.
        """
        mask, (queries, keys) = self.mask, (self.query.shape[2], self.key.shape[2])
        if isinstance(mask, BlockMask):
            rows, heads, *_ = mask.shape
            return create_mask(mask.mask_mod, rows, heads, queries, keys, device=self.query.device), False
        if mask is None or mask.ndim == 2:  # (B, S_kv), which tokens are real: flash attention applies the rules itself
            window = self.site.window if self.site.window is not None and self.site.window < keys else None
            if mask is None and window is None:
                return None, self.is_causal
            at = torch.arange(keys, device=self.query.device)
            now = at[keys - queries :, None]
            keep = (
                torch.ones(1, 1, 1, 1, dtype=torch.bool, device=at.device)
                if mask is None
                else mask[:, None, None, :keys]
            )
            keep = keep.bool() & (at <= now) if self.is_causal else keep.bool()
            return (keep if window is None else keep & (at > now - window)), False
        mask = mask[..., :keys]
        if mask.dtype == torch.bool:
            return mask, False
        keep = mask == 0
        if not torch.compiler.is_compiling() and bool((mask[~keep] > torch.finfo(mask.dtype).min / 2).any()):
            raise ValueError(f"{self.site.name} has a mask of biases, not only of hidden keys")
        return keep, False

    def part(self, queries: slice, keys: slice) -> Call:
        """The same call with some of its queries over some of its keys; the mask is cut to match."""
        mask = self.mask
        if mask is not None:
            if mask.ndim == 2:  # (B, S_kv) key padding, as diffusers' native backend accepts it
                mask = mask[:, None, None, :]
            if mask.shape[-2] != 1:
                mask = mask[..., queries, :]
            if mask.shape[-1] != 1:
                mask = mask[..., keys]
        return self.replace(
            query=self.query[:, :, queries], key=self.key[:, :, keys], value=self.value[:, :, keys], mask=mask
        )


Next = Callable[[Call], torch.Tensor]


def run_chain(chain: tuple[Any, ...], index: int, call: Call, terminal: Next) -> torch.Tensor:
    """Pass `call` through `chain[index:]` and then the model's own backend; (B, H, S, D)."""
    if index == len(chain):
        return terminal(call)
    return chain[index].attend(call, lambda changed: run_chain(chain, index + 1, changed, terminal))
