"""Change what an object does by giving it a subclass of its own class, and take it back.

The object, its attributes, weights and signature stay; only `type(obj)` differs. The subclass carries the same name
and module, so configs, `save_pretrained` and `isinstance` see no change. Copies and pickles of a steered object are
plain: they get the original class and none of steer's attributes.
"""

from __future__ import annotations

import copyreg
from collections.abc import Callable
from typing import Any

PREFIX = "_steer_"


class Steered:
    """Mixed into every swapped class; copies and pickles come out unsteered."""

    _steer_base: type
    _steer_mixins: tuple[type, ...]

    def __reduce_ex__(self, protocol: Any) -> Any:
        factory, args, state, *rest = (*super().__reduce_ex__(protocol), None, None)[:5]
        if factory is copyreg.__newobj__:  # type: ignore[attr-defined]  # pickle wants type(self) as its argument
            factory, args = copyreg._reconstructor, (self._steer_base, object, None)  # type: ignore[attr-defined]
        factory = self._steer_base if factory is type(self) else factory
        args = tuple(self._steer_base if a is type(self) else a for a in args)
        if isinstance(state, dict):
            state = {k: v for k, v in state.items() if not k.startswith(PREFIX)}
        return (factory, args, state, *rest)


_SUBCLASSES: dict[tuple[Any, ...], Any] = {}


def subclass(base: Any, *mixins: Any) -> Any:
    """The class `base` with `mixins` before it, under the name and module of `base`. One per combination."""
    if (base, *mixins) not in _SUBCLASSES:
        _SUBCLASSES[(base, *mixins)] = _new_subclass(base, *mixins)
    return _SUBCLASSES[(base, *mixins)]


def _new_subclass(base: Any, *mixins: Any) -> Any:
    inner = getattr(base, "_steer_mixins", ())
    body = {"__module__": base.__module__, "__qualname__": base.__qualname__, "__doc__": base.__doc__}
    body |= {"_steer_mixins": (*mixins, *inner)}
    again = issubclass(base, Steered)  # a second swap: Steered is among its bases already
    bases = (*mixins, base) if again else (*mixins, Steered, base)
    return type(base.__name__, bases, body | {"_steer_base": base._steer_base if again else base})


def swap(obj: Any, cls: type) -> Callable[[], None]:
    """Set the class of `obj` and return the function that sets it back."""
    before = type(obj)
    object.__setattr__(obj, "__class__", cls)

    def undo() -> None:
        if type(obj) is cls:
            object.__setattr__(obj, "__class__", before)

    return undo


def mix(obj: Any, mixin: type, outside: bool = True) -> Callable[[], None]:
    """Mix `mixin` into the class of `obj`, outside or inside of the mixins that it has.

    Returns the function that takes it out again; what others mixed in before or since stays.
    """
    plain, mixins = _unmixed(type(obj))
    object.__setattr__(obj, "__class__", subclass(plain, *((mixin, *mixins) if outside else (*mixins, mixin))))

    def undo() -> None:
        plain, mixins = _unmixed(type(obj))
        others = [other for other in mixins if other is not mixin]
        object.__setattr__(obj, "__class__", subclass(plain, *others) if others else plain)

    return undo


def _unmixed(cls: Any) -> tuple[type, tuple[type, ...]]:
    """What `subclass` made `cls` of; a class that it did not make is itself, without mixins."""
    return (cls._steer_base, cls._steer_mixins) if "_steer_mixins" in vars(cls) else (cls, ())


def put(obj: Any, name: str, value: Any) -> Callable[[], None]:
    """Store `value` in the instance dictionary of `obj`, past any `__setattr__`; returns the function that drops it."""
    obj.__dict__[name] = value

    def undo() -> None:
        obj.__dict__.pop(name, None)

    return undo
