"""The hidden states that enter a layer of a language model, for methods that look at them before its attention."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from steer_patches.blocks import Block
from steer_patches.generation import Text
from steer_patches.site import Scope, Site


def look_at_input(scope: Scope, site: Site, look: Callable[[torch.Tensor], None]) -> None:
    """Call `look` once with the states (B, S, C) that enter this site's layer, in the forward that begins.

    For methods that `needs_blocks`, in `before_forward`; a compiled forward does not show its states.
    """
    block = next(block for block in scope.blocks if f"{site.name}.".startswith(f"{block.name}."))
    block.action = Look(block, block.action, scope, scope.text, look)


@dataclass(frozen=True, eq=False)
class Look:
    """What a layer does in place of running: it shows its input, then does what it did before."""

    block: Block
    before: Callable[[Callable[..., Any], tuple[Any, ...], dict[str, Any]], Any] | None
    scope: Scope
    text: Text | None
    look: Callable[[torch.Tensor], None]

    def __call__(self, call: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        self.block.action = self.before
        if self.scope.text is self.text:  # else it is left over from a forward that failed
            self.look(args[0] if args else kwargs["hidden_states"])
        return call(*args, **kwargs) if self.before is None else self.before(call, args, kwargs)
