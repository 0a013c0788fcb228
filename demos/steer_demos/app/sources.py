"""What visitors of the app may open: embedded models, what the host offers, and ids on the Hub. Nothing else."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from steer_demos.models import EMBEDDED, fitted

FITTED = "fitted:"  # before the name of a model and a method: what was fitted to it and comes with the package
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


@dataclass(frozen=True)
class Sources:
    """Decides which names are opened, and as what.

    Args:
        models: folders and hub ids that the host offers by name.
        folders: visitors may open everything below these.
        hub: whether visitors may give ids on the Hugging Face Hub.

    Raises:
        ValueError: a folder that does not exist.
    """

    models: tuple[str, ...] = ()
    folders: tuple[Path, ...] = ()
    hub: bool = True

    def __post_init__(self) -> None:
        for folder in self.folders:
            if not folder.expanduser().is_dir():
                raise ValueError(f"--folder {folder} is not a folder")

    def open(self, name: str) -> str | Path:
        """What `steer_demos.models.load` or `steer.load` is given for a name that a visitor typed.

        Args:
            name: of an embedded model, of a method fitted to one ("fitted:emoji-mmdit/PAG"), one that the host
                offers, a path below one of the folders (absolute, or relative to it), or a hub id.

        Raises:
            ValueError: everything else, with the same words whether there is such a file or not.
        """
        name = name.strip()
        if not name:
            raise ValueError("no model is given: choose one from the list")
        if name in EMBEDDED:
            return name
        if name.startswith(FITTED):
            model, _, method = name.removeprefix(FITTED).partition("/")
            if (folder := fitted(model, method)) is not None:
                return folder
        if name in self.models:
            path = Path(name).expanduser()
            return path.resolve() if path.is_dir() else name
        for folder in self.folders:
            if (found := _below(folder.expanduser().resolve(), name)) is not None:
                return found
        if self.hub and HUB_ID.fullmatch(name) and ".." not in name and not Path(name).exists():
            return name
        raise ValueError(
            f"{name} cannot be opened here. There are {', '.join([*EMBEDDED, *self.models])}"
            + ("; an id on the Hugging Face Hub looks like owner/name" if self.hub else "")
            + ". Folders are opened below those that the app was started with: steer app --folder DIR"
        )


def source_in_python(name: str) -> str:
    """What `steer.load` is given for a name that a visitor typed, as an expression of Python to copy."""
    if not name.startswith(FITTED):
        return repr(name)
    model, _, method = name.removeprefix(FITTED).partition("/")
    return f"models.fitted({model!r}, {method!r})"


def _below(root: Path, name: str) -> Path | None:
    """The folder of that name, if it is one below `root`: symbolic links are followed before they are compared."""
    try:
        path = (root / name).resolve()
        return path if path.is_relative_to(root) and path.is_dir() else None
    except (OSError, ValueError, RuntimeError):  # too long, a null byte, links in a circle
        return None
