"""Guidance by a perturbed pass, over any pipeline: the denoiser's prediction is shifted by scale * (cond - perturbed).

Every row of the prediction gets the same shift. Classifier-free guidance combines rows with weights that sum to one,
so the pipeline's own formula gives `uncond + w * (cond - uncond) + scale * (cond - perturbed)` without a change to it.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal

import torch

from steer.method import Method, Span
from steer.select import SelectorError, by_row
from steer_patches.attach import Attachment, batch_of, does_cfg
from steer_patches.blocks import map_tensors, take_rows
from steer_patches.family import Family
from steer_patches.site import Run

if TYPE_CHECKING:
    from steer.bind import Binding

ROW_ARGUMENTS = {  # forward arguments that may hold several entries a row (the frames of a video in a UNet)
    "sample",
    "encoder_hidden_states",
    "encoder_attention_mask",
    "added_cond_kwargs",
    "down_block_additional_residuals",
    "mid_block_additional_residual",
}


class GuidanceWarning(UserWarning):
    """The pipeline combines predictions in a way that does not keep an added term exactly."""


@dataclass(kw_only=True)
class Guidance(Method, register=False):
    """A method that steers away from a perturbed prediction of the conditional rows.

    The pipeline's run says which rows are conditional. Applied to a bare denoiser, every row counts as conditional.

    Args:
        scale: weight of (cond - perturbed); 0 = off.
        adaptive_scale: the weight falls by this much for every unit of the timestep (0 to 1000) below 1000.
        extra: "separate" = the perturbed rows run in their own pass; "batched" = in the same pass as the others.
        share_prefix: in a separate pass, reuse what the ordinary pass computed before the first perturbed layer. Exact.
        preset: name of one of the family's published settings, see `steer.presets`; it gives the fields that are at
            their defaults.
    """

    scale: Annotated[float, Span(0, 10)] = 3.0
    adaptive_scale: Annotated[float, Span(0, 0.05)] = 0.0
    extra: Literal["separate", "batched"] = "separate"
    share_prefix: bool = True
    preset: str | None = None

    heads_by_row: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.extra not in ("separate", "batched"):
            raise ValueError(f'extra={self.extra!r} must be "separate" or "batched"')
        if self.rows not in (None, "perturbed"):
            raise ValueError(f"rows={self.rows!r}: {type(self).__name__} edits the perturbed rows only; leave rows out")
        for name in ("scale", "adaptive_scale"):
            if not math.isfinite(getattr(self, name)):
                raise ValueError(f"{name}={getattr(self, name)} must be a finite number")
        if self.adaptive_scale < 0:
            raise ValueError(f"adaptive_scale={self.adaptive_scale} must not be negative")

    def is_neutral(self) -> bool:
        return self.scale == 0

    def resolved(self, family: Family | None, has_clock: bool) -> Method:
        """A copy with the settings of the preset that was asked for by name."""
        if self.preset is None:
            return self
        name = type(self).__name__
        preset = family.preset(name, self.preset) if family else None
        if preset is None:
            known = ", ".join(family.preset_names(name)) if family else ""
            raise SelectorError(
                f"preset={self.preset!r} of {name} does not exist for {family.name if family else 'this model'}; "
                f"it has {known or 'none'}"
            )
        given = self.settings()
        changes: dict[str, Any] = {key: value for key, value in preset.settings.items() if key not in given}
        return replace(self, **changes)

    def scale_at(self, run: Run) -> float:
        """The weight at the run's current timestep."""
        if self.adaptive_scale == 0:
            return self.scale
        if run.timestep is None:
            raise ValueError("adaptive_scale needs the timestep: apply the method to a pipeline, not to a bare model")
        return max(0.0, self.scale - self.adaptive_scale * (1000.0 - _noise_timestep(run, run.timestep)))


def _noise_timestep(run: Run, timestep: float) -> float:
    """The timestep on the scale of 1000 (noise) to 0 (clean), whichever way the scheduler counts."""
    first, last = float(run.scheduler.timesteps[0]), float(run.scheduler.timesteps[-1])
    if min(first, last) < 0 or not 1 < max(first, last) <= 1000:
        raise ValueError(
            f"adaptive_scale needs timesteps between 0 and 1000; those of {type(run.scheduler).__name__} "
            f"run from {first:.4g} to {last:.4g}"
        )
    return timestep if first >= last else 1000.0 - timestep


class Guide:
    """Runs the perturbed passes of all guidance methods on one model; set as the attachment's `around`.

    Args:
        attachment: the model's hooks.
        bindings: the guidance methods' bindings on this model.
        set_chains: installs the chains of the ordinary pass (None) or of one binding's perturbed pass, for given rows.
        shifts: shared between the models of a pipeline: the shift of the step under way.
    """

    def __init__(
        self,
        attachment: Attachment,
        bindings: list[Binding],
        set_chains: Callable[[Binding | None], object],
        shifts: dict[str, Any],
    ) -> None:
        self.attachment, self.bindings, self.set_chains, self.shifts = attachment, bindings, set_chains, shifts
        self._warned = False

    def __call__(
        self, forward: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any], arguments: dict[str, Any]
    ) -> Any:
        scope, clock, run = self.attachment.scope, self.attachment.clock, self.attachment.clock.run
        if clock.pipeline is not None and not clock.running:
            name = type(clock.pipeline).__name__
            raise RuntimeError(
                f"{self.bindings[0].method.describe()} was applied to a {name}, but its denoiser is called outside "
                f"that {name}'s runs, where steer cannot tell conditional rows from others. Apply it to the pipeline "
                "that runs, or remove the handle first."
            )
        if run.calls > 1 and self.shifts.get("position") == (id(run), run.step):
            return _shifted(forward(*args, **kwargs), self.shifts["shift"])
        scales = {id(b): b.method.scale_at(run) for b in self.bindings if b.is_active(run)}
        active = [b for b in self.bindings if scales.get(id(b))]
        if not active:
            return forward(*args, **kwargs)
        if "cond" not in scope.rows:
            raise RuntimeError(
                f"{active[0].method.describe()} cannot run: this pipeline computes its unconditional prediction first, "
                "and the shift of the conditional one is not known yet"
            )
        _check_rows(active, scope.rows, batch_of(arguments))
        inner: Any = self.attachment.inner
        if torch.is_grad_enabled() and getattr(inner, "is_gradient_checkpointing", False):
            raise RuntimeError(
                "guidance cannot run under gradient checkpointing, which computes blocks again outside the pass that "
                "they belong to: call disable_gradient_checkpointing() on the model, or use torch.no_grad()"
            )
        self._warn_once(run)
        batched = [b for b in active if b.method.extra == "batched"]
        if batched:
            prediction, shift = self._batched(forward, arguments, batched[0], scales)
        else:
            prediction, shift = self._separate(forward, args, kwargs, arguments, active, scales)
        self.shifts.update(position=(id(run), run.step), shift=shift, run=run)
        return _shifted(prediction, shift)

    def _separate(
        self,
        forward: Callable[..., Any],
        args: tuple[Any, ...],
        kwargs: dict[str, Any],
        arguments: dict[str, Any],
        active: list[Binding],
        scales: Mapping[int, float],
    ) -> tuple[Any, torch.Tensor]:
        scope, tape, batch = self.attachment.scope, self.attachment.tape, batch_of(arguments)
        rows, roles = _cond_rows(scope.rows, batch), scope.rows
        inputs = _input_rows(arguments, rows, batch)  # copied first: some forwards change their dictionaries
        share = self._may_share(arguments)
        skipping = next((b.method for b in active if b.blocks), None)
        if skipping is not None and self._is_one_graph():
            raise RuntimeError(
                f"{skipping.describe()} skips blocks, which a model compiled as one graph does not allow: use "
                "model.compile_repeated_blocks() instead of model.compile() or torch.compile(model)"
            )
        prefixes = {id(b): b.prefix if share and b.method.share_prefix else 0 for b in active}
        try:
            tape.record(prefixes.values())
            prediction = forward(*args, **kwargs)
            tape.idle()
            cond = _sample(prediction)[rows]
            shift = torch.zeros_like(cond)
            for binding in active:
                tape.replay(prefixes[id(binding)], rows, batch)
                tape.skip(binding.blocks)
                scope.rows = ("perturbed",)
                self.set_chains(binding)
                with self._own_cache(binding):
                    perturbed = _sample(forward(**_copied(inputs)))
                tape.idle()
                shift = shift + scales[id(binding)] * (cond - perturbed)
                binding.passes += 1
                binding.shared_blocks = prefixes[id(binding)]
        finally:
            tape.idle(forget=True)
            scope.rows = roles
            self.set_chains(None)
        return prediction, shift

    def _batched(
        self, forward: Callable[..., Any], arguments: dict[str, Any], binding: Binding, scales: Mapping[int, float]
    ) -> tuple[Any, torch.Tensor]:
        scope, batch = self.attachment.scope, batch_of(arguments)
        rows, roles = _cond_rows(scope.rows, batch), scope.rows
        inputs = _with_extra_rows(arguments, rows, batch)
        try:
            scope.rows = (*roles, "perturbed")
            self.set_chains(binding)
            prediction = forward(**inputs)
        finally:
            scope.rows = roles
            self.set_chains(None)
        sample = _sample(prediction)
        shift = scales[id(binding)] * (sample[rows] - sample[batch:])
        binding.passes += 1
        return _with_sample(prediction, sample[:batch]), shift

    def _may_share(self, arguments: Mapping[str, Any]) -> bool:
        """Not inside one compiled graph, under a block cache, or where the forward itself leaves out blocks."""
        cached = getattr(self.attachment.inner, "is_cache_enabled", False)
        return not (self._is_one_graph() or cached or arguments.get("skip_layers"))

    def _is_one_graph(self) -> bool:
        inner: Any = self.attachment.inner
        return inner is not self.attachment.model or inner._compiled_call_impl is not None

    @contextmanager
    def _own_cache(self, binding: Binding) -> Iterator[None]:
        """A cache (`enable_cache`) keeps its states by context: the perturbed pass gets its own."""
        inner: Any = self.attachment.inner
        if getattr(inner, "is_cache_enabled", False):
            with inner.cache_context(f"perturbed_{type(binding.method).__name__}"):
                yield
        else:
            yield

    def _warn_once(self, run: Run) -> None:
        if self._warned:
            return
        pipeline = self.attachment.clock.pipeline
        rescale = does_cfg(pipeline, run.arguments) and run.arguments.get("guidance_rescale")
        family = self.attachment.family
        reason = None
        if rescale:
            reason = f"guidance_rescale={rescale} rescales the combined prediction"
        elif (guider := getattr(pipeline, "guider", None)) is not None and not _is_plain_cfg(guider):
            reason = f"the pipeline combines predictions with {type(guider).__name__}"
        elif family is not None and not family.affine and float(run.arguments.get("true_cfg_scale") or 0) > 1:
            reason = f"the {family.name} pipeline renormalises its guided prediction"
        if reason:
            self._warned = True
            warnings.warn(f"{reason}; the guidance term is scaled along with it", GuidanceWarning, stacklevel=2)


def _check_rows(active: list[Binding], roles: tuple[str, ...], batch: int) -> None:
    """Raise where a method has heads for another number of pictures than are drawn."""
    rows = _cond_rows(roles, batch)
    for binding in active:
        heads = binding.method.heads
        if by_row(heads) and len(heads) != rows.stop - rows.start:
            raise ValueError(
                f"heads of {type(binding.method).__name__} has a mapping for each of {len(heads)} pictures, but this "
                f"batch has {rows.stop - rows.start}; give one for each, or one mapping for all of them"
            )


def _is_plain_cfg(guider: Any) -> bool:
    """Whether a pipeline's guider is classifier-free guidance whose weights sum to one."""
    return type(guider).__name__ == "ClassifierFreeGuidance" and not guider.guidance_rescale


def _cond_rows(roles: tuple[str, ...], batch: int) -> slice:
    each = batch // len(roles)
    start = roles.index("cond") * each
    return slice(start, start + each)


def _is_position(name: str) -> bool:
    return "rotary" in name or name in ("txt_ids", "img_ids")


def _input_rows(arguments: Mapping[str, Any], rows: slice, batch: int) -> dict[str, Any]:
    """The forward's arguments for `rows` only, in fresh containers."""

    def cut(name: str, value: Any) -> Any:
        if _is_position(name) or rows == slice(0, batch):
            return _copied(value)
        if name in ROW_ARGUMENTS:
            return take_rows(value, rows, batch)
        return map_tensors(value, lambda t: t[rows] if t.ndim and t.shape[0] == batch else t)

    return {name: cut(name, value) for name, value in arguments.items()}


def _with_extra_rows(arguments: Mapping[str, Any], rows: slice, batch: int) -> dict[str, Any]:
    """The forward's arguments with `rows` appended to the batch."""

    def grow(name: str, value: Any) -> Any:
        if _is_position(name):
            return _copied(value)

        def change(t: torch.Tensor) -> torch.Tensor:
            if not t.ndim or not t.shape[0]:
                return t
            if t.shape[0] == batch or (name in ROW_ARGUMENTS and t.shape[0] % batch == 0):
                return torch.cat([t, take_rows(t, rows, batch)])
            return t

        grown = map_tensors(value, change)
        if isinstance(value, list) and len(value) == batch and not any(isinstance(v, torch.Tensor) for v in value):
            grown = value + value[rows]  # per-row Python values (image shapes, text lengths)
        return grown

    return {name: grow(name, value) for name, value in arguments.items()}


def _copied(tree: Any) -> Any:
    return map_tensors(tree, lambda tensor: tensor)


def _sample(prediction: Any) -> torch.Tensor:
    return prediction[0] if not isinstance(prediction, torch.Tensor) else prediction


def _with_sample(prediction: Any, sample: torch.Tensor) -> Any:
    if isinstance(prediction, torch.Tensor):
        return sample
    if isinstance(prediction, tuple):
        return (sample, *prediction[1:])
    setattr(prediction, next(iter(prediction)), sample)
    return prediction


def _shifted(prediction: Any, shift: torch.Tensor) -> Any:
    sample = _sample(prediction)
    groups = sample.shape[0] // shift.shape[0]
    return _with_sample(prediction, sample + shift.repeat(groups, *[1] * (shift.ndim - 1)))
