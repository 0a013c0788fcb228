"""What is applied to one target: its hooks, its methods, and the chains that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from diffusers import DiffusionPipeline, ModelMixin
from transformers import PreTrainedModel

from steer.guidance import Guidance, Guide
from steer.method import STAGES, Method
from steer.select import SelectorError, expand_braces, head_mask, is_active, listing, matches, parse_steps, select
from steer_kernels.order import TokenOrder
from steer_patches.attach import Attachment, denoisers, find_sites, plain
from steer_patches.blocks import find_blocks
from steer_patches.clock import Clock
from steer_patches.family import FAMILIES, Family, family_of
from steer_patches.generation import Text, generates
from steer_patches.parallel import refuse_ring
from steer_patches.processors import UnhookableProcessor
from steer_patches.site import Call, Next, Run, Scope, Site
from steer_patches.swap import put


class CompositionError(ValueError):
    """Two methods, or a method and a target, cannot be used together."""


class Link:
    """One method at one site: keeps it to its rows, heads and lengths. What `site.chain` is made of."""

    def __init__(self, method: Method, heads: torch.Tensor | None, rows: str | None) -> None:
        self.method, self.heads, self.rows = method, heads, rows

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        method = self.method
        if call.port != call.site.main_port and not method.every_port:
            return next(call)
        if call.query.shape[2] < method.min_tokens:
            return next(call)
        outer = call.heads
        heads = self.heads if self.heads is None else self.heads.to(call.query.device)
        if heads is not None and call.head_range is not None:
            heads = heads[call.head_range]
        call = call.replace(heads=heads)

        def inner(changed: Call) -> torch.Tensor:
            return next(changed.replace(heads=outer))

        if self.rows is None:  # asked first: a compiled graph would be made again for other rows
            return method.attend(call, inner)
        chosen = [_covers(self.rows, role) for role in call.rows]
        if all(chosen):
            return method.attend(call, inner)
        if not any(chosen):
            return inner(call)
        batch = call.query.shape[0]
        each = batch // len(chosen)
        parts = []
        for i, (mine, role) in enumerate(zip(chosen, call.rows, strict=True)):
            part = _rows_of(call, slice(i * each, (i + 1) * each), batch).replace(own_rows=(role,))
            parts.append(method.attend(part, inner) if mine else inner(part))
        return torch.cat(parts)


def _covers(wanted: str, role: str) -> bool:
    """Perturbed rows are conditional ones too: a method for "cond" stays on in the perturbed pass."""
    return wanted == role or (wanted == "cond" and role == "perturbed")


def _rows_of(call: Call, rows: slice, batch: int) -> Call:
    mask = call.mask
    if mask is not None and mask.ndim in (2, 4) and mask.shape[0] == batch:
        mask = mask[rows]
    return call.replace(query=call.query[rows], key=call.key[rows], value=call.value[rows], mask=mask)


@dataclass(eq=False)
class Binding:
    """One method on one model: the sites and blocks that its selectors gave.

    Args:
        method: the method as it runs on this model, see `Method.resolved`.
        given: the method as the user made it.
        model: key of the model within the target.
        sites: site name -> head mask (None = all heads).
        blocks: indices of the blocks that the perturbed pass skips.
        prefix: number of leading blocks that the method leaves unedited.
        live: the same sites as they are hooked, with their head masks; set when installed.
        able: sites of the model that are of the method's kinds; set when installed.
        passes, shared_blocks, active: counted while running; `active` are the forwards in which the method was on.
    """

    method: Any
    given: Method
    model: str
    sites: dict[str, torch.Tensor | None]
    blocks: tuple[int, ...] = ()
    prefix: int = 0
    live: dict[str, tuple[Site, torch.Tensor | None]] = field(default_factory=dict)
    able: int = 0
    passes: int = 0
    shared_blocks: int = 0
    active: int = 0

    def is_active(self, run: Run) -> bool:
        """Whether the run's step lies in the method's steps."""
        return is_active(self.method.steps, run.step, run.num_steps)


def models_of(target: Any) -> dict[str, torch.nn.Module]:
    """The models of a target that methods attach to, by component name ("" for a bare model)."""
    if isinstance(target, DiffusionPipeline):
        found = denoisers(target)
        if not found:
            raise TypeError(f"{type(target).__name__} has no transformer or unet that steer can attach to")
        return found
    if isinstance(plain(target), (ModelMixin, PreTrainedModel)) if isinstance(target, torch.nn.Module) else False:
        return {"": target}
    raise TypeError(
        f"cannot steer a {type(target).__name__}: pass a diffusers pipeline, a diffusers model or a transformers model"
    )


def bind(method: Method, models: dict[str, torch.nn.Module], has_clock: bool) -> list[Binding]:
    """Resolve a method's selectors on a target's models. Changes nothing.

    Raises:
        SelectorError: a selector that matches nothing; the message lists what exists.
        CompositionError: the method cannot run on this target.
    """
    counts = all(generates(plain(model)) for model in models.values())
    if counts and parse_steps(method.steps)[0] == "fraction":
        raise CompositionError(
            f"steps={method.steps!r}: how many tokens a language model will write is not known beforehand; give "
            'indices, "0:1" = the prompt, "1:" = what is generated'
        )
    if method.steps not in (None, ":") and not has_clock and not counts:
        raise CompositionError(
            f"steps={method.steps!r} needs a pipeline's scheduler to count steps; this target is a bare model. "
            'Apply the method to the pipeline, or give steps=":" (all steps).'
        )
    if method.heads is not None and len(method.heads) == 0:
        return []
    bindings = [_bind_one(method, key, plain(model), has_clock) for key, model in models.items()]
    return [binding for binding in bindings if binding is not None]


def _bind_one(given: Method, key: str, model: torch.nn.Module, has_clock: bool) -> Binding | None:
    family = family_of(model)
    method = given.resolved(family, has_clock)
    _check_family(method, family, model)
    sites, blocks = find_sites(model), find_blocks(model, family)
    if isinstance(method, Guidance) and isinstance(model, PreTrainedModel):
        raise CompositionError(
            f"{type(method).__name__} guides denoisers by a second pass; {type(model).__name__} is a language model"
        )
    layers = method.layers
    if layers is None and isinstance(method.heads, Mapping):
        layers = list(method.heads)
    if layers is None:
        layers = _preset_layers(method, family, model)
    if getattr(method, "skips_blocks", False):
        skippable = [block for block in blocks if block.stage.returns]
        if not skippable:
            raise CompositionError(f"{type(model).__name__} has no blocks that are known to be skippable")
        wanted = set(select(layers, [block.name for block in skippable], "blocks"))
        chosen = tuple(block.index for block in skippable if block.name in wanted)
        return Binding(method, given, key, {}, chosen, prefix=chosen[0])
    names = set(select(layers, [site.name for site in sites]))
    chosen_sites = [site for site in sites if site.name in names and site.kind in method.kinds]
    if not chosen_sites:
        kinds = ", ".join(sorted({site.kind for site in sites if site.name in names}))
        able = [site.name for site in sites if site.kind in method.kinds]
        raise SelectorError(
            f"layers={layers!r} matches only {kinds} attention, but {type(method).__name__} works on "
            f"{', '.join(method.kinds)}. This model has:\n{listing(able)}"
        )
    refused = next((site for site in chosen_sites if not site.ports), None)
    if refused is not None:
        raise UnhookableProcessor(f"{refused.name}: {refused.refusal}")
    if isinstance(method.heads, Mapping):
        select(list(method.heads), [site.name for site in chosen_sites], "selected attention sites", field="heads")
    dense = [site.name for site in sites if site.kind in method.kinds][: getattr(method, "dense_layers", None) or 0]
    chosen_sites = [site for site in chosen_sites if site.name not in dense]
    if not chosen_sites:
        raise SelectorError(
            f"dense_layers={method.dense_layers} leaves {type(method).__name__} no layer of layers={layers!r}"  # type: ignore[attr-defined]
        )
    method.prepare_model(model, chosen_sites)
    masks = {site.name: head_mask(method.heads, site) for site in chosen_sites}
    masks = {name: mask for name, mask in masks.items() if mask is None or bool(mask.any())}
    prefix = min((_block_index(name, blocks) for name in masks), default=0)
    return Binding(method, given, key, masks, prefix=prefix) if masks else None


def _check_family(method: Method, family: Family | None, model: torch.nn.Module) -> None:
    """Raise `CompositionError` where a method needs a grid of tokens, or a video, that the model does not have."""
    reason = unfit(type(method), family)
    if reason:
        able = [f.name for f in FAMILIES if unfit(type(method), f) is None]
        what = family.name if family else type(model).__name__
        raise CompositionError(f"{type(method).__name__} cannot run on {what}: {reason}. It works on {', '.join(able)}")


def unfit(method: type[Method], family: Family | None) -> str | None:
    """Why a method that needs a token grid or a video cannot work on models of a family; None if it can."""
    if not (method.needs_grid or method.needs_video):
        return None
    if family is None or family.grid is None:
        return "steer does not know the token grid of this model"
    if not family.tokens_from_grid:
        return "its layers have different numbers of tokens"
    return "it draws single images" if method.needs_video and not family.video else None


def _block_index(site: str, blocks: Sequence[Any]) -> int:
    return next((block.index for block in blocks if f"{site}.".startswith(f"{block.name}.")), 0)


def _preset_layers(method: Method, family: Family | None, model: torch.nn.Module) -> str | Sequence[str]:
    """The layers that the model's family names for this method; an error where there are none on this model."""
    preset = family.preset(type(method).__name__, getattr(method, "preset", None)) if family else None
    default = preset.settings.get("layers") if preset else None
    default = default or getattr(method, "default_layers", None)
    names = [site.name for site in find_sites(model) if site.kind in method.kinds]
    what = "has no preset"
    if default is not None:
        missing = [p for p in expand_braces(default) if not any(matches(p, name) for name in names)]
        if not missing:
            return default
        what = f"has the preset {default!r}, which does not exist on this model,"
    raise SelectorError(
        f"{type(method).__name__} {what} for {type(model).__name__}: give layers=. It has:\n{listing(names)}"
    )


class State:
    """All that is applied to one target."""

    def __init__(self, target: Any) -> None:
        self.target = target
        self.models = models_of(target)
        self.pipeline = target if isinstance(target, DiffusionPipeline) else None
        self.groups: list[list[Binding]] = []  # one list a handle
        self.attachments: dict[str, Attachment] = {}
        self.clock: Clock | None = None
        self.runs = 0
        self.forwards = 0
        self._shifts: dict[str, Any] = {}
        self._chains: dict[Any, dict[str, tuple[Link, ...]]] = {}
        self._links: dict[Any, Link] = {}
        self._undo: list[Callable[[], None]] = []

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    @property
    def bindings(self) -> list[Binding]:
        """Every installed binding, in the order applied."""
        return [binding for group in self.groups for binding in group]

    def check(self, new: list[Binding]) -> None:
        """Raise `CompositionError` where the new bindings cannot join those installed."""
        installed = self.bindings
        for i, binding in enumerate(new):
            for other in [*installed, *new[:i]]:
                if other.model == binding.model:
                    _check_pair(other, binding)
        if self.pipeline is not None and any(isinstance(b.method, Guidance) for b in new):
            name = type(self.pipeline).__name__
            if "PAG" in name or "InstructPix2Pix" in name:
                raise CompositionError(
                    f"{name} batches guidance branches of its own; use the plain pipeline of the same model "
                    "(Pipeline.from_pipe(pipe) keeps the weights)"
                )
        for key, model in self.models.items():
            family = family_of(plain(model))
            batched = [b.method for b in new if b.model == key and getattr(b.method, "extra", "") == "batched"]
            if batched and family is not None and family.splits_rows:
                raise CompositionError(
                    f'{family.name} computes attention row by row; use extra="separate" instead of "batched"'
                )
            by_role = [b.method for b in new if b.model == key and b.method.rows not in (None, "perturbed")]
            if by_role and family is not None and family.splits_rows:
                raise CompositionError(
                    f"{family.name} computes attention row by row, so {by_role[0].describe()} cannot tell which row it "
                    "sees; leave rows out"
                )

    def add(self, group: list[Binding]) -> None:
        """Install bindings; attaches to the models first if nothing was installed."""
        if not self.attachments:
            self._attach()
        for binding in group:
            sites = self.attachments[binding.model].sites
            binding.live = {s.name: (s, binding.sites[s.name]) for s in sites if s.name in binding.sites}
            binding.able = sum(site.kind in binding.method.kinds for site in sites)
        self.groups.append(group)
        self._rebuild()

    def drop(self, group: list[Binding]) -> None:
        """Take bindings out; detaches from the models if they were the last."""
        self.groups = [other for other in self.groups if other is not group]
        gone = {id(binding) for binding in group}  # another binding may get the same id
        self._links = {key: link for key, link in self._links.items() if key[0] not in gone}
        if self.groups:
            self._rebuild()
        else:
            self.detach()

    def _attach(self) -> None:
        try:
            self.clock = Clock(self.pipeline)
            self._undo.append(self.clock.remove)
            for key, model in self.models.items():
                attachment = Attachment(model, self.clock)
                self._undo.append(attachment.remove)
                self.attachments[key] = attachment
                self._undo.append(put(model, "_steer_state", self))
                attachment.before.append(functools.partial(self._before, key))
                attachment.positions = functools.partial(self._positions, key)
            if self.pipeline is not None:
                self._undo.append(put(self.pipeline, "_steer_state", self))
                self.clock.on_run.append(self._on_run)
        except BaseException:
            self.detach()
            raise

    def detach(self) -> None:
        """Everything off; the target is exactly what it was."""
        if self.clock is not None:
            self.clock.start({})  # what methods keep for a run goes with the run
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        self.attachments.clear()
        self.groups.clear()

    def _on_run(self) -> None:
        self.runs += 1
        for key, model in denoisers(self.pipeline).items():
            if key in self.models and model is not self.models[key]:
                raise CompositionError(
                    f"pipe.{key} was replaced after steer.apply, so its methods would be skipped. Remove the handle "
                    "first and apply again after (compile in place with model.compile() to keep the object)."
                )

    def _rebuild(self) -> None:
        self._chains.clear()
        for key, attachment in self.attachments.items():
            guided = [b for b in self.bindings if b.model == key and isinstance(b.method, Guidance)]
            attachment.tape.remove()
            attachment.reordering.remove()
            attachment.around = None
            wanted = any(b.method.reorders for b in self.bindings if b.model == key)
            if wanted and attachment.reordering.refusal is None:
                attachment.reordering.attach()
            if guided:
                attachment.tape.attach()
                attachment.around = Guide(attachment, guided, functools.partial(self._change_pass, key), self._shifts)
            self._set_chains(key, None)

    def _before(self, key: str) -> None:
        attachment = self.attachments[key]
        self.forwards += 1
        self.runs += attachment.scope.text is not None and attachment.clock.run.step == 0
        if attachment.parallel is not None:
            for binding in (b for b in self.bindings if b.model == key and b.sites):
                refuse_ring(next(iter(binding.sites)), attachment.parallel)
        if self._shifts.get("run") is not attachment.clock.run:
            self._shifts.clear()
        now = [b.method for b in self.bindings if b.model == key and _runs_now(b, attachment.clock.run)]
        attachment.set_order(_shared_order(now, attachment.scope))
        for binding in self._begin_pass(key, None):
            binding.active += 1

    def _positions(self, key: str, text: Text) -> torch.Tensor | None:
        """The position ids that a method which is on wants for this forward of a language model."""
        run = self.attachments[key].clock.run
        active = (b.method for b in self.bindings if b.model == key and _runs_now(b, run))
        wanted = (method.positions(text) for method in active)
        return next((positions for positions in wanted if positions is not None), None)

    def _change_pass(self, key: str, branch: Binding | None) -> None:
        """A guidance method's perturbed pass begins, or (None) all passes of the forward are over."""
        if branch is None:
            self._set_chains(key, None)
        else:
            self._begin_pass(key, branch)

    def _begin_pass(self, key: str, branch: Binding | None) -> tuple[Binding, ...]:
        """The ordinary pass, or one guidance method's perturbed pass, begins: what its methods need is made ready."""
        active, scope = self._set_chains(key, branch), self.attachments[key].scope
        cache = scope.text.cache if scope.text is not None else None
        for binding in active:
            if cache is not None:
                binding.method.prepare_cache(cache, binding.live)
            binding.method.before_forward(scope, binding.live)
        return active

    def _set_chains(self, key: str, branch: Binding | None) -> tuple[Binding, ...]:
        """Install the chains of the ordinary pass, or of one guidance method's perturbed pass; what is on in it."""
        attachment = self.attachments[key]
        run = attachment.clock.run
        active = tuple(
            b
            for b in self.bindings
            if b.model == key and (b is branch or not isinstance(b.method, Guidance)) and _runs_now(b, run)
        )
        plan = (key, *(id(b) for b in active))
        if plan not in self._chains:
            self._chains[plan] = {s.name: self._chain(s, active) for s in attachment.sites}
        chains = self._chains[plan]
        for site in attachment.sites:
            site.chain = chains[site.name]
        return active

    def _chain(self, site: Site, bindings: Sequence[Binding]) -> tuple[Link, ...]:
        here = [b for b in bindings if site.name in b.sites]
        here.sort(key=lambda b: STAGES.index(b.method.stage))
        return tuple(self._link(b, b.sites[site.name]) for b in here)

    def _link(self, binding: Binding, heads: torch.Tensor | None) -> Link:
        rows = "perturbed" if isinstance(binding.method, Guidance) else binding.method.rows
        key = (id(binding), id(heads))
        if key not in self._links:  # sites with the same settings share a link: one compiled graph for all of them
            self._links[key] = Link(binding.method, heads, rows)
        return self._links[key]


def _shared_order(methods: Sequence[Method], scope: Scope) -> TokenOrder | None:
    """The token order that all methods which care for it want for this forward; None = raster."""
    wanted = [method.entry_order(scope) for method in methods if not method.any_order]
    if not wanted or any(order is None or order.name != wanted[0].name for order in wanted if wanted[0] is not None):
        return None
    return wanted[0]


def _runs_now(binding: Binding, run: Run) -> bool:
    """Whether the binding is on at the run's position; between runs, only where it is on at every step."""
    if run.num_steps is None and run.phase == "denoise":
        return binding.method.steps in (None, ":")
    return binding.is_active(run)


def _check_pair(first: Binding, second: Binding) -> None:
    a, b = first.method, second.method
    shared = set(first.sites) & set(second.sites)
    same = type(a) is type(b) and (a is b or shared or set(first.blocks) & set(second.blocks))
    if same:
        where = next(iter(shared), "the same blocks")
        raise CompositionError(
            f"{a.describe()} is already applied at {where}; remove its handle before applying {b.describe()}"
        )
    if isinstance(a, Guidance) and isinstance(b, Guidance):
        if "batched" in (a.extra, b.extra):
            raise CompositionError(
                f'{a.describe()} and {b.describe()} together need extra="separate": one pass holds one perturbation'
            )
        return
    if shared and a.stage == b.stage == "kernel":
        raise CompositionError(
            f"{a.describe()} and {b.describe()} both replace the attention kernel at {sorted(shared)[0]}; "
            "a site has room for one"
        )


@dataclass(eq=False)
class Handle:
    """What `steer.apply` returns: switches its methods off again, and tells what they did. A context manager."""

    state: State = field(repr=False)
    methods: tuple[Method, ...]
    bindings: list[Binding] = field(repr=False)

    def __enter__(self) -> Handle:
        return self

    def __exit__(self, *_: object) -> None:
        self.remove()

    @property
    def is_active(self) -> bool:
        """Whether the methods are still applied."""
        return any(group is self.bindings for group in self.state.groups)

    def remove(self) -> None:
        """Take these methods off; when no others are left the target is exactly what it was. Idempotent."""
        if self.is_active:
            self.state.drop(self.bindings)

    @property
    def sites(self) -> list[Site]:
        """The attention sites that these methods edit (for skipped blocks: the sites inside them)."""
        found = []
        for key, attachment in self.state.attachments.items():
            mine = [b for b in self.bindings if b.model == key]
            edited = {name for b in mine for name in b.sites}
            skipped = [attachment.tape.blocks[i].name for b in mine for i in b.blocks]
            found += [
                s for s in attachment.sites if s.name in edited or any(s.name.startswith(f"{n}.") for n in skipped)
            ]
        return found

    @property
    def stats(self) -> dict[str, Any]:
        """What has run since `apply`: runs, denoiser forwards, and for each method its passes and shared blocks.

        `density` is the share of the attention map that was computed: of a method, in its layers in the last forward
        in which it was on; of all, over all forwards, with the dense steps and layers.
        """
        rows = []
        for binding in self.bindings:
            attachment = self.state.attachments.get(binding.model)
            total = len(attachment.tape.blocks) if attachment else 0
            rows.append(
                {
                    "method": type(binding.method).__name__,
                    "model": binding.model,
                    "sites": len(binding.sites),
                    "skipped_blocks": len(binding.blocks),
                    "extra_passes": binding.passes,
                    "shared_blocks": binding.shared_blocks,
                    "blocks": total,
                    "active_forwards": binding.active,
                    "density": binding.method.computed_density(binding.live),
                }
            )
        return {
            "runs": self.state.runs,
            "forwards": self.state.forwards,
            "density": self._density([row["density"] for row in rows]),
            "methods": rows,
        }

    def _density(self, densities: Sequence[float | None]) -> float | None:
        """Share of the query-key pairs computed in all forwards so far, in the layers that could be sparse.

        `densities`: of each binding, None where it computes everything.
        """
        sparse = [(b, d) for b, d in zip(self.bindings, densities, strict=True) if d is not None]
        if not sparse or not self.state.forwards:
            return None
        return 1 - sum(b.active / self.state.forwards * len(b.live) / b.able * (1 - d) for b, d in sparse)

    def summary(self) -> str:
        """What is active where, in a few lines of text."""
        lines = []
        for method in self.methods:
            mine = [b for b in self.bindings if b.given is method]
            if not mine:
                lines.append(f"{method.describe()}: neutral, not installed")
            for binding in mine:
                attachment = self.state.attachments.get(binding.model)
                blocks = attachment.tape.blocks if attachment else []
                names = list(binding.sites) or [blocks[i].name for i in binding.blocks if i < len(blocks)]
                where = f" in {binding.model}" if binding.model else ""
                lines.append(
                    f"{binding.method.describe()}{where}, {len(names)} {'sites' if binding.sites else 'blocks'}:"
                )
                lines.append(listing(names))
                if binding.passes:
                    lines.append(
                        f"  {binding.passes} extra passes; {binding.shared_blocks} of {len(blocks)} blocks shared"
                    )
        if not self.is_active:
            lines.insert(0, "removed; was:")
        return "\n".join(lines)
