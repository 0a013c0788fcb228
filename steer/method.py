"""The base of all methods: the fields they share, their registry, and how they are saved."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any, ClassVar

import torch

from steer.select import Heads, parse_steps
from steer_kernels.order import TokenOrder
from steer_patches.family import Family
from steer_patches.site import KINDS, ROLES, Call, Next, Role, Scope, Site

if TYPE_CHECKING:
    from steer.plan import Plan, Search
    from steer_patches.generation import Text

STAGES = ("inputs", "scores", "output", "kernel")  # from the outermost wrapper to the innermost

_REGISTRY: dict[str, type[Method]] = {}


@dataclass(frozen=True)
class Span:
    """What a form offers for a number, `scale: Annotated[float, Span(0, 10)] = 3.0`; the method may take others too.

    Args:
        low, high: both included.
        step: between two offered values; None = 1 for integers, else a power of ten, a hundredth of the span or less.
    """

    low: float
    high: float
    step: float | None = None


@dataclass(kw_only=True)
class Method:
    """One training-free method: a dataclass of settings with one function to write, `attend`.

    Args:
        layers: glob or globs over site names or their dotted prefixes ("transformer_blocks.{8..14}", "mid_block");
            None = the preset of the model's family.
        heads: query heads to edit at every selected site, or a mapping from layer glob to heads; None = all. Guidance
            also takes a list of such mappings, one for each picture of the batch: every picture has its own heads.
        steps: ":" or None = all, "0.2:0.9" = fractions of the run, "3:10" or a range = step indices. In language models
            step 0 is the prompt and every further forward one step: "0:1" = the prompt only, "1:" = what is generated.
        rows: only the batch rows of this role ("cond", "uncond", ...); None = all.
        min_tokens: the method stays out of attention calls with fewer queries than this.
    """

    layers: str | Sequence[str] | None = None
    heads: Heads | None = None
    steps: str | range | None = None
    rows: Role | None = None
    min_tokens: Annotated[int, Span(0, 1024)] = 0

    kinds: ClassVar[tuple[str, ...]] = KINDS
    stage: ClassVar[str] = "output"
    every_port: ClassVar[bool] = False  # also the calls of image prompts and the like
    any_order: ClassVar[bool] = False  # does not look at where on the grid a token is
    needs_video: ClassVar[bool] = False  # makes no sense on single images
    needs_softmax: ClassVar[bool] = False  # reckons with a softmax of scaled products, which capped scores are not
    needs_causal: ClassVar[bool] = False  # tokens of the prompt must not see later ones
    needs_pictures: ClassVar[bool] = False  # works on what a vision-language model has of its pictures
    needs_blocks: ClassVar[bool] = False  # drives the model's layers, see `scope.blocks`
    needs_grid: ClassVar[bool] = False  # every site must have the same, known grid of tokens
    heads_by_row: ClassVar[bool] = False  # `heads` may differ from picture to picture of a batch

    def __init_subclass__(cls, register: bool = True, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if not register:
            return
        if cls.stage not in STAGES:
            raise TypeError(f"{cls.__name__}.stage is {cls.stage!r}; it must be one of {', '.join(STAGES)}")
        known = _REGISTRY.get(cls.__name__)
        if known is not None and known.__module__.startswith("steer.methods.") and known.__module__ != cls.__module__:
            raise TypeError(f"a method named {cls.__name__} exists already in {known.__module__}; choose another name")
        _REGISTRY[cls.__name__] = cls

    def __post_init__(self) -> None:
        parse_steps(self.steps)
        if self.rows is not None and self.rows not in ROLES:
            raise ValueError(f"rows={self.rows!r} is no row role; choose from {', '.join(ROLES)}")
        if self.min_tokens < 0:
            raise ValueError(f"min_tokens={self.min_tokens} must not be negative")

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        """Compute one attention call, (B, H, S, D); `next(call)` is the rest of the chain and the model's own."""
        raise NotImplementedError(f"{type(self).__name__} defines no attend(call, next)")

    def resolved(self, family: Family | None, has_clock: bool) -> Method:
        """The method as it runs on one model: a copy with what it takes from the family, and with its own state."""
        return self

    def layers_in(self, model: torch.nn.Module, sites: Sequence[Site]) -> str | Sequence[str] | None:
        """The layers to select on a model with these sites; None = the family's preset.

        For methods whose layers depend on the model's depth, or that also read layers which they do not edit.
        """
        return self.layers

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        """Called with the selected sites before anything changes: refuse what cannot work, keep what is needed.

        What is kept belongs to one model, so `resolved` must have returned a copy then.
        """

    def reads(self, model: torch.nn.Module, sites: Sequence[Site]) -> Sequence[Site]:
        """Sites among all of the model's at which the method looks, whatever `layers` and `heads` select for editing.

        They are bound with all their heads, beside the selected ones.
        """
        return ()

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        """Called before every pass in which the method is on, outside of compiled regions; `sites` with head masks."""

    def after_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]], output: Any) -> Any:
        """Called with the output of every forward of a language model in which the method is on; what the caller gets.

        In `before_forward`, `attend` and here `scope.again(at=..., **changes)` runs the model once more, unsteered.
        """
        return output

    def prepare_cache(self, cache: Any, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        """Called before every forward of a language model with its transformers `Cache`, before `before_forward`.

        A method may put cache layers of its own into `cache.layers` while the cache is empty.
        """

    def position_ids(self, text: Text) -> torch.Tensor | None:
        """Other position ids, (B or 1, new), for the tokens of a language model's forward; None = as they are."""
        return None

    def entry_order(self, scope: Scope) -> TokenOrder | None:
        """The order in which this method wants the visual tokens of the forward to pass through the blocks.

        None = raster. Where all methods that are on agree, tokens are permuted once a forward, not at every call.
        """
        return None

    @property
    def reorders(self) -> bool:
        """Whether `entry_order` may ever ask for another order than raster."""
        return type(self).entry_order is not Method.entry_order

    @property
    def prepares(self) -> bool:
        """Whether it makes something ready before a forward, or is on in some forwards only."""
        return type(self).before_forward is not Method.before_forward or self.steps not in (None, ":")

    def computed_density(self, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> float | None:
        """Share of the attention map that was computed in the last forward, for methods that leave out a part."""
        return None

    def search(self, *args: Any, **options: Any) -> Search:
        """What `steer.calibrate` runs to fit this method; `options` are its own. Only searched methods have one."""
        able = [name for name, cls in methods().items() if cls.search is not Method.search]
        raise TypeError(
            f"{type(self).__name__} has no search of its own; those that have are {', '.join(able)}. To search its "
            "settings give objective=, a callable (pictures, prompts) -> scores, e.g. steer.objectives.sharpness, or "
            "--objective sharpness to the command"
        )

    def is_neutral(self) -> bool:
        """True where these settings change nothing, so that the method is not even installed."""
        return False

    def settings(self) -> dict[str, Any]:
        """The fields that differ from their defaults."""
        changed = {}
        for field in dataclasses.fields(self):
            value = getattr(self, field.name)
            default = field.default
            if isinstance(value, torch.Tensor) or not (value is default or value == default):
                changed[field.name] = value
        return changed

    def describe(self) -> str:
        """Short form for summaries, e.g. `PAG(scale=3.0)`."""
        return f"{type(self).__name__}({', '.join(f'{k}={_short(v)}' for k, v in self.settings().items())})"

    @property
    def record(self) -> Plan | None:
        """What `steer.calibrate` tried and found: tables of scores, data, seeds, figures. None if it was not fitted.

        `dataclasses.replace` of a fitted or loaded method gives other settings, of which a record would not be true:
        they have none, and no model is refused for them.
        """
        return self.__dict__.get("_record", getattr(self, "plan", None))

    def save(self, directory: str) -> None:
        """Write `steer.json` and, for tensor fields, `steer.safetensors` into `directory`. See `steer.load`."""
        from steer.artifact import save

        save(self, directory)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool | None = None,
        token: str | bool | None = None,
        commit_message: str | None = None,
        revision: str | None = None,
        create_pr: bool = False,
    ) -> str:
        """Upload what `save` writes to the Hugging Face Hub, with a model card; `steer.load(repo_id)` reads it.

        Args:
            repo_id: "owner/name"; the repository is made if there is none. Its README.md is written anew each time.
            private: whether a new repository is; None = as the owner's repositories are.
            token: with write access; None = the one that is logged in.
            commit_message: None = "Upload PAG of steer", for example.
            revision: branch to commit to, made if there is none; None = "main".
            create_pr: open a pull request in place of a commit to the branch.

        Returns:
            The commit's URL, or the pull request's.

        Raises:
            TypeError: a field that cannot be saved; nothing was uploaded then.
            huggingface_hub.errors.HfHubHTTPError: the Hub refuses.
        """
        from steer.hub import upload

        return upload(
            self,
            repo_id,
            private=private,
            token=token,
            commit_message=commit_message,
            revision=revision,
            create_pr=create_pr,
        )


def _short(value: Any) -> str:
    if isinstance(value, torch.Tensor):
        return f"tensor{tuple(value.shape)}"
    return repr(value)


def methods() -> dict[str, type[Method]]:
    """All registered methods by name."""
    return dict(sorted(_REGISTRY.items()))
