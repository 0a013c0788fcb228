"""Published settings of methods for model families, by name."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from steer_patches.family import FAMILIES


@dataclass(frozen=True)
class PublishedSetting:
    """One published setting: `steer.PAG(preset=name)` takes it.

    Args:
        name: as `preset=` takes it.
        method: class name of the method.
        family: of the models that it is for.
        settings: field -> value.
        source: where it comes from, the model that it was found on, and how sure it is.
    """

    name: str
    method: str
    family: str
    settings: dict[str, Any]
    source: str


def presets(method: str | None = None) -> list[PublishedSetting]:
    """All settings that have a name, or those of one method, in the order of families and names.

    Settings without a name are what a method takes where nothing is given; the README's tables show them.
    """
    found = []
    for family in FAMILIES:
        for name, known in family.presets.items():
            if method in (None, name):
                several = known if isinstance(known, tuple) else (known,)
                found += [
                    PublishedSetting(preset.name, name, family.name, dict(preset.settings), preset.source)
                    for preset in several
                    if preset.name
                ]
    return found
