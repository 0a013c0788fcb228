"""What is applied to one target: its hooks, its methods, and the chains that follow from them."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from steer.bind import Binding, CompositionError, models_of
from steer.guidance import Guidance, Guide
from steer.method import STAGES, Method
from steer.select import by_row
from steer_kernels.order import TokenOrder
from steer_patches.attach import Attachment, denoisers
from steer_patches.clock import Clock
from steer_patches.family import family_of
from steer_patches.generation import Text
from steer_patches.parallel import refuse_ring
from steer_patches.site import Call, Next, Run, Scope, Site
from steer_patches.sites import plain
from steer_patches.swap import put


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
            heads = heads[..., call.head_range, :, :]
        if heads is not outer:
            call = call.replace(heads=heads)

        def inner(changed: Call) -> torch.Tensor:
            return next(changed if changed.heads is outer else changed.replace(heads=outer))

        if self.rows is None:  # asked first: a compiled graph would be made again for other rows
            return method.attend(_own_heads(call), inner)
        chosen = [_covers(self.rows, role) for role in call.rows]
        if all(chosen):
            return method.attend(_own_heads(call), inner)
        if not any(chosen):
            return inner(call)
        batch = call.query.shape[0]
        each = batch // len(chosen)
        parts = []
        for i, (mine, role) in enumerate(zip(chosen, call.rows, strict=True)):
            part = _rows_of(call, slice(i * each, (i + 1) * each), batch).replace(own_rows=(role,))
            parts.append(method.attend(_own_heads(part), inner) if mine else inner(part))
        return torch.cat(parts)


def _own_heads(call: Call) -> Call:
    """The call with a mask of heads for each of its rows, where every picture has its own: R pictures of n rows."""
    heads = call.heads
    if heads is None or heads.ndim == 3:
        return call
    return call.replace(heads=heads.repeat_interleave(call.query.shape[0] // heads.shape[0], 0))


def _covers(wanted: str, role: str) -> bool:
    """Perturbed rows are conditional ones too: a method for "cond" stays on in the perturbed pass."""
    return wanted == role or (wanted == "cond" and role == "perturbed")


def _rows_of(call: Call, rows: slice, batch: int) -> Call:
    mask = call.mask
    if mask is not None and mask.ndim in (2, 4) and mask.shape[0] == batch:
        mask = mask[rows]
    return call.replace(query=call.query[rows], key=call.key[rows], value=call.value[rows], mask=mask)


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
            own_heads = [b.method for b in new if b.model == key and by_row(b.method.heads)]
            if own_heads and family is not None and family.splits_rows:
                raise CompositionError(
                    f"{family.name} computes attention row by row, so {type(own_heads[0]).__name__} cannot take a "
                    "mapping of heads for each picture; give one mapping for all of them"
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
                attachment.after = functools.partial(self._after, key)
                attachment.before_pictures = functools.partial(self._set_chains, key, None)
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
            attachment.prepares = any(b.method.prepares for b in self.bindings if b.model == key)
            if wanted and attachment.reordering.refusal is None:
                attachment.reordering.attach()
            attachment.needs_pictures = any(b.method.needs_pictures for b in self.bindings if b.model == key)
            if guided or any(b.method.needs_blocks for b in self.bindings if b.model == key):
                attachment.tape.attach()
            if guided:
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
        wanted = (method.position_ids(text) for method in active)
        return next((positions for positions in wanted if positions is not None), None)

    def _after(self, key: str, output: Any) -> Any:
        """What the methods that are on make of the output of a language model's forward."""
        attachment = self.attachments[key]
        for binding in self.bindings:
            if binding.model == key and _runs_now(binding, attachment.clock.run):
                output = binding.method.after_forward(attachment.scope, binding.live, output)
        return output

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
