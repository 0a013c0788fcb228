"""Open a model: find its attention sites, put ports at them, and take everything back."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from threading import RLock
from typing import Any

import torch
from diffusers.hooks._helpers import TransformerBlockRegistry
from transformers import PreTrainedModel

from steer_kernels.order import TokenOrder
from steer_patches import interface
from steer_patches.blocks import Action, Tape
from steer_patches.clock import Clock
from steer_patches.encoding import follow_encoders
from steer_patches.family import Family, family_of
from steer_patches.generation import Text, generates, text_of, with_cache
from steer_patches.pictures import pictures_of
from steer_patches.processors import Ports, steered_class
from steer_patches.reorder import Reordering
from steer_patches.site import Call, Layout, Next, Run, Scope, Site
from steer_patches.sites import find_sites, plain
from steer_patches.swap import mix, put, subclass, swap


class SiteLost(RuntimeError):
    """Something replaced an attention processor (or implementation) after steer was applied."""


Around = Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any], dict[str, Any]], Any]


class Attachment:
    """steer's hooks on one model.

    Args:
        model: a diffusers or transformers model, possibly wrapped by `torch.compile`.
        clock: follows the pipeline that owns the model.

    Attributes:
        sites: all attention sites; `site.chain` holds what runs at each.
        tape: the stage blocks.
        around: if set, called as `around(forward, args, kwargs, arguments)` in place of the model's forward.
        before: called before every forward, once the clock is set.
        prepares: whether what `before` does differs from forward to forward.
        positions: of a language model: called last before its forward; other position ids for its tokens, or None.
        needs_pictures: whether a method wants to know which tokens show pictures.
        before_pictures: called before pictures are encoded ahead of their forward.
        after: of a language model: called with the forward's output; returns what the caller gets.
    """

    def __init__(self, model: torch.nn.Module, clock: Clock) -> None:
        self.model, self.inner, self.clock = model, plain(model), clock
        self.family: Family | None = family_of(self.inner)
        self.scope = Scope()
        self.sites = find_sites(self.inner, self.scope)
        self.tape = Tape(self.inner, self.family)
        self.scope.blocks = self.tape.blocks
        self.reordering = Reordering(self.inner, self.family)
        self.around: Around | None = None
        self.before: list[Callable[[], None]] = []
        self.prepares = False
        self.positions: Callable[[Text], torch.Tensor | None] | None = None
        self.needs_pictures = False
        self.before_pictures: Callable[[], Any] | None = None
        self.after: Callable[[Any], Any] | None = None
        self._generates = generates(self.inner)
        self._may_reorder = False
        self._in_turn = RLock()  # sites know one forward at a time; reentrant for torch.compile's wrapper
        self.scope.in_forward = False if self._generates else None
        self._signature = inspect.signature(type(self.inner).forward)
        self._undo: list[Callable[[], None]] = []
        self._modules: list[tuple[Site, Any]] = []
        try:
            self._attach()
        except BaseException:
            self.remove()
            raise

    def __reduce__(self) -> tuple[Any, ...]:
        return (type(None), ())

    def _attach(self) -> None:
        modules = dict(self.inner.named_modules())
        self._modules = [(site, modules[site.name]) for site in self.sites if site.ports]
        if isinstance(self.inner, PreTrainedModel):
            self._undo.append(interface.set_steered(self.inner))
        for site, module in self._modules:
            self._undo.append(put(module, "_steer_site", site))
            self._undo.append(swap(module, subclass(type(module))))  # so that a copy of it has no site
            processor = getattr(module, "processor", None)
            if processor is not None and not isinstance(processor, Ports):
                self._undo.append(swap(processor, steered_class(type(processor))))
        if hasattr(self.inner, "cache_context"):
            self._undo.append(put(self.inner, "_steer_clock", self.clock))
            self._undo.append(swap(self.inner, subclass(type(self.inner), Announcing)))
        self._undo.append(put(self.model, "_steer_gate", self.gate))
        self._undo.append(swap(self.model, subclass(type(self.model), Gated)))
        if self._generates:
            self._undo.append(put(self.inner, "_steer_gate", self.gate))
            self._undo.append(mix(self.inner, Generating))
            if self.family is not None and self.family.pictures is not None:
                self._undo += follow_encoders(self.inner, self.scope, self._begin_encoding, self._in_turn)
        self.clock.scopes.append(self.scope)
        self.scope.run = self.clock.run
        self.clock.on_run.append(self.verify)
        self._undo.append(lambda: self.clock.scopes.remove(self.scope))
        self._undo.append(lambda: self.clock.on_run.remove(self.verify))

    def remove(self) -> None:
        """Take everything back; the model is exactly what it was."""
        self.tape.remove()
        self.reordering.remove()
        for undo in reversed(self._undo):
            undo()
        self._undo.clear()
        for _, module in self._modules:  # load_ip_adapter() makes new processors of the class it finds
            processor = getattr(module, "processor", None)
            if isinstance(processor, Ports):
                swap(processor, type(processor)._steer_base)  # type: ignore[attr-defined]

    def verify(self) -> None:
        """Raise `SiteLost` if a site no longer passes through its port."""
        for site, module in self._modules:
            processor = getattr(module, "processor", None)
            if processor is not None:
                kept = isinstance(processor, Ports)
                now = type(processor).__name__
            else:
                now = getattr(getattr(module, "config", None), "_attn_implementation", "")
                kept = now.startswith("steer_")
            if not kept:
                raise SiteLost(
                    f"the attention processor of {site.name} was replaced after steer.apply "
                    f"({site.processor} -> {now}), so the method would be skipped there. Call handle.remove() before "
                    "fuse_qkv_projections(), load_ip_adapter(), set_attn_processor() or the like; apply again after."
                )

    def arguments(self, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> dict[str, Any]:
        """The forward's arguments by name."""
        bound = self._signature.bind(self.inner, *args, **kwargs).arguments
        bound.pop(next(iter(self._signature.parameters)), None)
        extra = bound.pop("kwargs", {})
        return {**bound, **extra}

    def gate(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Every forward of the model enters here, outside compiled regions."""
        if torch.compiler.is_compiling():
            if self.around is not None:
                raise RuntimeError(
                    "guidance needs a second pass outside the compiled graph: compile in place with "
                    "model.compile() or model.compile_repeated_blocks(), or call torch.compile before steer.apply"
                )
            if self.prepares and self.scope.in_forward is False:  # without fullgraph it enters again, uncompiled
                raise RuntimeError(
                    "the methods applied here look at each forward's tokens outside of the compiled graph: compile in "
                    "place with model.compile(), or call torch.compile before steer.apply"
                )
            return forward(*args, **kwargs)
        with self._in_turn:
            return self._enter(forward, args, kwargs)

    def _enter(self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        if self.clock.pipeline is None:
            self.verify()
        self.clock.denoiser_called()
        try:
            arguments = self.arguments(args, kwargs)
        except TypeError:  # wrong arguments: the model's own error is the clearest
            forward(*args, **kwargs)
            raise
        self.scope.layout = self._layout(arguments)
        self.scope.rows = self._rows(arguments)
        self.scope.device = _device_of(arguments)
        self._may_reorder = self._can_reorder(arguments)
        if self._generates:
            if self.scope.in_forward:  # torch.compile's wrapper calls the model, which is gated too
                return forward(*args, **kwargs)
            self.scope.in_forward = True
            try:
                return self._next_tokens(forward, args, kwargs, arguments)
            finally:
                self.scope.in_forward, self.scope.text = False, None
                self.scope.arguments, self.scope.again, self.scope.read = {}, None, {}
                self.scope.unsteered = None
        for hook in self.before:
            hook()
        if self.around is None:
            return forward(*args, **kwargs)
        return self.around(forward, args, kwargs, arguments)

    def _next_tokens(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
    ) -> Any:
        """A forward of a language model: the next tokens of the sequence that is in its cache."""
        cache = with_cache(self.inner, arguments)
        if cache is not arguments.get("past_key_values"):
            args, kwargs = self._with(args, kwargs, "past_key_values", cache)
        text, run = text_of(arguments, cache)
        memory = dict(run.memory)
        try:
            self.scope.text = text
            if text is not None and self.needs_pictures:
                found, self.scope.read = pictures_of(self.inner, self.family, arguments, run, text.past, text.new)
                self.scope.text = replace(text, pictures=found)
            self.scope.arguments, self.scope.again = arguments, partial(self._again, arguments)
            self.scope.unsteered = self._unsteered
            self.clock.follow(run)
            for hook in self.before:
                hook()
            text = self.scope.text
            moved = self.positions(text) if text is not None and self.positions is not None else None
            if text is not None and moved is not None:
                self.scope.text = replace(text, positions=moved)
                args, kwargs = self._with(args, kwargs, "position_ids", moved)
            output = forward(*args, **kwargs)
            if self.after is not None:
                output = self.after(output)
        except BaseException:
            run.memory = memory  # else the sequence would go on from tokens that are not in it
            raise
        run.step += 1
        return output

    def _begin_encoding(self) -> None:
        """Pictures are encoded, and no forward is under way: it is that of a prompt which comes next."""
        self.clock.follow(Run(phase="prefill"))
        if self.before_pictures is not None:
            self.before_pictures()

    def _again(
        self,
        arguments: Mapping[str, Any],
        at: Mapping[str, Callable[[Call, Next], torch.Tensor]] | None = None,
        actions: Mapping[str, Action] | None = None,
        **changes: Any,
    ) -> Any:
        """Run the model inside a forward, unsteered, with some arguments of that forward changed.

        Args:
            at: attention calls to make in another way, site name -> attend(call, next).
            actions: layers to run in another way, block name -> action; where a method `needs_blocks`.
            changes: arguments by name; one that is None is given as None.
        """
        given = {**arguments, **changes}
        with self._unsteered(at, actions, text_of(given, given.get("past_key_values"))[0]):
            return self.inner.forward(**given)  # never the compiled one

    @contextmanager
    def _unsteered(
        self,
        at: Mapping[str, Callable[[Call, Next], torch.Tensor]] | None = None,
        actions: Mapping[str, Action] | None = None,
        text: Text | None = None,
    ) -> Iterator[None]:
        """Inside a forward: what runs in here runs without methods; `at` and `actions` as in `_again`.

        Args:
            text: the tokens of what runs.
        """
        scope = self.scope
        before = [(site, site.chain) for site in self.sites]
        driven = [(block, block.action) for block in self.tape.blocks]
        deltas = [(m, m.rope_deltas) for m in self.inner.modules() if "rope_deltas" in vars(m)]  # of Qwen's positions
        outer, read = scope.text, scope.read
        try:
            for site in self.sites:
                site.chain = (Instead(at[site.name]),) if at and site.name in at else ()
            for block in self.tape.blocks:
                block.action = actions.get(block.name) if actions else None
            scope.text, scope.read = text, {}
            yield
        finally:
            scope.text, scope.read = outer, read
            for site, chain in before:
                site.chain = chain
            for block, action in driven:
                block.action = action
            for module, delta in deltas:
                module.rope_deltas = delta

    def _with(
        self, args: tuple[Any, ...], kwargs: dict[str, Any], name: str, value: Any
    ) -> tuple[tuple[Any, ...], dict[str, Any]]:
        """The forward's arguments with one of them changed, which may have been given by its place."""
        names = list(self._signature.parameters)[1 : 1 + len(args)]  # the first is `self`
        if name not in names:
            return args, {**kwargs, name: value}
        place = names.index(name)
        return (*args[:place], value, *args[place + 1 :]), kwargs

    def _layout(self, arguments: Mapping[str, Any]) -> Layout | None:
        if self.family is None or self.family.grid is None:
            return None
        grid = self.family.grid(self.inner, arguments)
        tokens = grid[0] * grid[1] * grid[2] if grid is not None and self.family.tokens_from_grid else None
        return Layout(tokens, grid, self.family.text_first, self.family.text_tokens(self.inner, arguments))

    def _can_reorder(self, arguments: Mapping[str, Any]) -> bool:
        """Not where the sequence is split between devices, where a cache keeps tokens, or blocks run a second time."""
        inner: Any = self.inner
        if self.reordering.refusal or self.reordering.refuses(arguments):
            return False
        cached = getattr(inner, "is_cache_enabled", False)
        again = torch.is_grad_enabled() and getattr(inner, "is_gradient_checkpointing", False)
        return not (self.parallel is not None or cached or again)

    @property
    def parallel(self) -> Any:
        """diffusers' `ContextParallelConfig` of this model, or None."""
        return getattr(getattr(self.inner, "_parallel_config", None), "context_parallel_config", None)

    def set_order(self, order: TokenOrder | None) -> None:
        """The forward that begins runs its blocks in this order of the visual tokens, where the model can do that."""
        layout = self.scope.layout
        self.reordering.order = order if layout is not None and self._may_reorder else None
        if layout is not None and self.reordering.order is not layout.order:
            self.scope.layout = replace(layout, order=self.reordering.order)

    def _rows(self, arguments: Mapping[str, Any]) -> tuple[str, ...]:
        pipeline, run = self.clock.pipeline, self.clock.run
        if pipeline is None or self.family is None or self.family.cfg == "none":
            return ("cond",)
        if self.family.cfg == "sequential":
            uncond = "uncond" in run.branch if run.branch else run.calls > 1
            return ("uncond",) if uncond else ("cond",)
        batch = batch_of(arguments)
        if run.calls == 1:
            run.batch = batch
        if not does_cfg(pipeline, run.arguments) or (run.batch and batch * 2 == run.batch):
            return ("cond",)
        return ("uncond", "cond")


def batch_of(arguments: Mapping[str, Any]) -> int:
    """Number of rows of a forward: the first dimension of its first tensor argument."""
    return next(value.shape[0] for value in arguments.values() if isinstance(value, torch.Tensor) and value.ndim > 1)


def _device_of(arguments: Mapping[str, Any]) -> torch.device:
    """Device of a forward's first tensor argument."""
    tensors = (value for value in arguments.values() if isinstance(value, torch.Tensor))
    return next((tensor.device for tensor in tensors), torch.device("cpu"))


def does_cfg(pipeline: Any, arguments: Mapping[str, Any]) -> bool:
    """Whether the pipeline's current run puts unconditional rows into its batches."""
    stated = getattr(pipeline, "do_classifier_free_guidance", None)
    if stated is not None:
        return bool(stated)
    return float(arguments.get("guidance_scale") or 0.0) > 1.0


class Instead:
    """What a site's chain holds in a pass that a method runs for itself."""

    def __init__(self, attend: Callable[[Call, Next], torch.Tensor]) -> None:
        self.attend = attend


class Gated:
    """Mixed into a model: its calls enter through the attachment's gate."""

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not isinstance(self, Gated):  # removed, but torch.compile kept the bound method from before
            return self(*args, **kwargs)
        gate = self.__dict__.get("_steer_gate")
        forward = super().__call__  # type: ignore[misc]
        return forward(*args, **kwargs) if gate is None else gate(forward, args, kwargs)


class Generating(Gated):
    """Mixed into a language model inside of any wrapper of `torch.compile`: `generate` is the model's own.

    The forwards that `generate` compiles enter through the gate from outside of their graphs.
    """

    def get_compiled_call(self, compile_config: Any) -> Callable[..., Any]:
        compiled = super().get_compiled_call(compile_config)  # type: ignore[misc]
        gate = self.__dict__.get("_steer_gate")
        return compiled if gate is None else lambda *args, **kwargs: gate(compiled, args, kwargs)


class Announcing:
    """Mixed into a model whose pipelines announce the CFG branch: tells the clock. Such models have block caches."""

    def enable_cache(self, config: Any) -> None:
        """diffusers' caches look blocks up by their very class, so they are told of those that steer made of them."""
        for cls in {type(module) for module in self.modules()}:  # type: ignore[attr-defined]
            if "_steer_base" in vars(cls):
                with suppress(ValueError):  # what is no block, or one that caches do not know
                    TransformerBlockRegistry.register(cls, replace(TransformerBlockRegistry.get(cls._steer_base)))
        super().enable_cache(config)  # type: ignore[misc]

    @contextmanager
    def cache_context(self, name: str, **kwargs: Any) -> Any:
        clock: Clock | None = self.__dict__.get("_steer_clock")
        with super().cache_context(name, **kwargs):  # type: ignore[misc]
            if clock is None:
                yield
                return
            run, outer = clock.run, clock.run.branch
            run.branch = name
            try:
                yield
            finally:
                run.branch = outer


def denoisers(pipeline: Any) -> dict[str, torch.nn.Module]:
    """The pipeline's models that methods attach to: transformers and UNets, not text encoders or autoencoders."""
    names = ("transformer", "transformer_2", "unet")
    found = {name: getattr(pipeline, name, None) for name in names}
    return {name: model for name, model in found.items() if isinstance(model, torch.nn.Module)}
