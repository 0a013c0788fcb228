"""What `steer.apply` returns."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from steer.bind import Binding
from steer.method import Method
from steer.select import listing
from steer.state import State
from steer_patches.site import Site


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
