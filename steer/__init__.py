"""Training-free attention methods for pretrained diffusers and transformers models.

handle = steer.apply(pipe, steer.PAG(scale=3.0))
image = pipe("a fox in the snow").images[0]
handle.remove()
"""

from __future__ import annotations

from typing import Any

import steer.methods  # noqa: F401  (its files register themselves; the name then goes to the function below)
from steer import objectives, strategies
from steer.apply import apply, remove, sites
from steer.artifact import load
from steer.bind import CompositionError
from steer.calibrate import calibrate
from steer.capture import capture
from steer.compare import Comparison, compare
from steer.doctor import doctor
from steer.fingerprint import ArtifactWarning, FingerprintError
from steer.guidance import Guidance, GuidanceWarning
from steer.handle import Handle
from steer.method import Method, methods
from steer.plan import Plan, Search
from steer.presets import presets
from steer.select import SelectorError
from steer.simulate import Simulation, simulate

__version__ = "0.1.0"


def __getattr__(name: str) -> Any:
    """Every registered method is an attribute: `steer.PAG`."""
    known = methods()
    if name in known:
        return known[name]
    raise AttributeError(f"steer has no {name!r}; its methods are {', '.join(known)}")


def __dir__() -> list[str]:
    return sorted([*__all__, *methods()])


__all__ = [
    "ArtifactWarning",
    "Comparison",
    "CompositionError",
    "FingerprintError",
    "Guidance",
    "GuidanceWarning",
    "Handle",
    "Method",
    "Plan",
    "Search",
    "SelectorError",
    "Simulation",
    "apply",
    "calibrate",
    "capture",
    "compare",
    "doctor",
    "load",
    "methods",
    "objectives",
    "presets",
    "remove",
    "simulate",
    "sites",
    "strategies",
]
