"""Which methods work on which model families, as the README's tables."""

from __future__ import annotations

import json

import steer
from steer.bind import unfit
from steer.method import Method
from steer.sparse import Sparse
from steer_patches.family import FAMILIES, Family


def markdown() -> str:
    """Methods x model families, from the registry: a table each of guidance, sparse, language and vision-language."""
    groups: dict[str, list[type[Method]]] = {"guidance": [], "sparse": [], "language": [], "vision": []}
    for method in steer.methods().values():
        groups[_group(method)].append(method)
    return "\n\n".join(_table(group) for group in groups.values() if group)


def _group(method: type[Method]) -> str:
    if method.needs_pictures:
        return "vision"
    if method.kinds == ("causal",):
        return "language"
    return "sparse" if issubclass(method, Sparse) else "guidance"


def _table(methods: list[type[Method]]) -> str:
    rows = ["| family | " + " | ".join(m.__name__ for m in methods) + " |", "|---" * (len(methods) + 1) + "|"]
    for family in sorted(FAMILIES, key=lambda f: f.name.lower()):
        if any(works_on(method, family) for method in methods):
            rows.append(f"| {family.name} | " + " | ".join(_cell(method, family) for method in methods) + " |")
    return "\n".join(rows)


def works_on(method: type[Method], family: Family) -> bool:
    if getattr(method, "skips_blocks", False):
        return any(stage.returns for stage in family.stages)
    return unfit(method, family) is None and any(kind in method.kinds for kind in family.kinds.values())


def _cell(method: type[Method], family: Family) -> str:
    if not works_on(method, family):
        return "–"
    preset = family.preset(method.__name__)
    if preset is not None:
        settings = preset.settings
        if issubclass(method, Sparse):
            return "published"
        if "layers" in settings:
            return f"`{settings['layers']}`"
        return f"`{', '.join(f'{key}={json.dumps(value)}' for key, value in settings.items())}`"
    return getattr(method, "without_preset", "give `layers=`")
