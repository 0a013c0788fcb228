"""Turn methods on and off."""

from __future__ import annotations

from typing import Any

from diffusers import DiffusionPipeline

from steer.bind import CompositionError, bind, models_of
from steer.fingerprint import check_fingerprint, fingerprint
from steer.handle import Handle
from steer.method import Method
from steer.state import State
from steer_patches.site import Site
from steer_patches.sites import find_sites, plain


def apply(target: Any, *methods: Method) -> Handle:
    """Turn methods on for a pipeline or a model; its own calls then run with them.

    Args:
        target: a `DiffusionPipeline`, a diffusers `ModelMixin` or a transformers `PreTrainedModel`.
        methods: one or more methods; several compose where their stages allow it.

    Returns:
        A handle: `handle.remove()`, or use it as a context manager.

    Raises:
        SelectorError: a selector matches nothing (the message lists what exists).
        CompositionError: the methods cannot be used together or on this target.
        UnhookableProcessor: a selected site has an attention processor that cannot be hooked.
        FingerprintError: a loaded method was made for another model.

    Whatever is raised, the target stays as it was.
    """
    if not methods:
        raise TypeError("steer.apply needs at least one method, e.g. steer.apply(pipe, steer.PAG())")
    for method in methods:
        if not isinstance(method, Method):
            hint = f"{method.__name__}()" if isinstance(method, type) else repr(method)
            raise TypeError(f"{hint} is not a method instance; steer.methods() lists the methods")
    models = models_of(target)
    for method in methods:
        check_fingerprint(method, models)
    state = _state_of(target) or State(target)
    bindings = []
    for method in methods:
        bound = bind(method, models, has_clock=isinstance(target, DiffusionPipeline))
        if bound and not method.is_neutral():
            bindings += bound
    if state.target is not target:  # the model of a pipeline that is steered already
        keys = {id(plain(model)): key for key, model in state.models.items()}
        for binding in bindings:
            binding.model = keys[id(plain(models[binding.model]))]
    state.check(bindings)
    handle = Handle(state, methods, bindings)
    made_for = fingerprint(models)
    if bindings:
        state.add(bindings)
    for method in methods:
        method.__dict__["_fingerprint"] = made_for
    return handle


def _state_of(target: Any) -> State | None:
    state = target.__dict__.get("_steer_state")
    if state is not None:
        return state
    if not isinstance(target, DiffusionPipeline):
        taken = [name for name, module in plain(target).named_modules() if "_steer_site" in module.__dict__]
        if taken:
            raise CompositionError(
                f"{taken[0]} is steered already, through a model that this {type(plain(target)).__name__} is a part "
                "of, or that is a part of it; remove that handle first"
            )
        return None
    for key, model in models_of(target).items():
        if model.__dict__.get("_steer_state") is not None:
            raise CompositionError(
                f"pipe.{key} is steered already, on its own or through another pipeline; "
                f"call steer.remove(pipe.{key}) first"
            )
    return None


def remove(target: Any) -> None:
    """Take off everything that steer applied to `target`; it is then exactly what it was."""
    states = [owner.__dict__.get("_steer_state") for owner in (target, *models_of(target).values())]
    for state in states:
        if state is not None:
            state.detach()


def sites(target: Any) -> list[Site]:
    """Every attention site of a pipeline's denoisers or of a model. Changes nothing."""
    found = []
    for model in models_of(target).values():
        found += find_sites(plain(model))
    return found
