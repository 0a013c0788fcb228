"""The models that ship inside the package, and one way to load those and any other pipeline."""

import json
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table

WEIGHTS = Path(__file__).parent / "weights"


@dataclass(frozen=True)
class EmbeddedModel:
    """One model whose weights lie in the package.

    Args:
        name: what `load` takes.
        pipeline: its diffusers class.
        parameters: number of weights of all its parts.
        licence: of the weights.
        task: what it does, in a few words.
    """

    name: str
    pipeline: str
    parameters: int
    licence: str
    task: str

    @property
    def folder(self) -> Path:
        """The pipeline folder, in the layout of `save_pretrained`."""
        return WEIGHTS / self.name

    @property
    def size(self) -> int:
        """Bytes of weights on disk."""
        return sum(path.stat().st_size for path in self.folder.rglob("*.safetensors"))

    @cached_property
    def evaluation(self) -> dict[str, Any]:
        """What `steer eval` measured on these weights; empty before it ran. Keys are explained there."""
        path = self.folder / "evaluation.json"
        return json.loads(path.read_text()) if path.exists() else {}


EMBEDDED: dict[str, EmbeddedModel] = {
    model.name: model
    for model in [
        EmbeddedModel(
            name="emoji-mmdit",
            pipeline="StableDiffusion3Pipeline",
            parameters=8_780_000,
            licence="Apache-2.0",
            task="text to 64 x 64 pictures of emoji",
        )
    ]
}


def list_models() -> list[EmbeddedModel]:
    """The embedded models."""
    return list(EMBEDDED.values())


def load(
    name: str | Path, device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> DiffusionPipeline:
    """Load a pipeline through its real diffusers class.

    Args:
        name: an embedded model (never touches the network), a folder written by `save_pretrained`, or a hub id.
        device: by default `cuda` where there is one, else `cpu`.
        dtype: by default bfloat16 on CUDA and float32 elsewhere.

    Raises:
        ValueError: `name` is none of these.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source: str | Path
    if str(name) in EMBEDDED:
        source, local = EMBEDDED[str(name)].folder, True
    elif Path(name).is_dir():
        source, local = Path(name), True
    elif str(name).count("/") == 1 and not str(name).startswith((".", "/")):
        source, local = str(name), False
    else:
        raise ValueError(
            f"no model {str(name)!r}. Embedded models: {', '.join(EMBEDDED)}. "
            "A folder must exist and hold model_index.json; a hub id looks like owner/name."
        )
    if local and not (Path(source) / "model_index.json").exists():
        raise ValueError(f"{source} holds no model_index.json: it is not a folder that a pipeline was saved to.")
    absent = _absent_components(Path(source)) if local else {}
    return DiffusionPipeline.from_pretrained(source, dtype=dtype, local_files_only=local, **absent).to(device)


def _absent_components(folder: Path) -> dict[str, None]:
    # diffusers refuses a folder saved without a required component, such as the T5 of an SD3 pipeline, unless told so.
    index = json.loads((folder / "model_index.json").read_text())
    return {name: None for name, value in index.items() if value == [None, None]}


def models() -> None:
    """List the embedded models."""
    table = Table("name", "class", "parameters", "weights", "licence", "what it does", "right concept")
    table.columns[0].no_wrap = True
    for model in list_models():
        accuracy = model.evaluation.get("accuracy")
        table.add_row(
            model.name,
            model.pipeline,
            f"{model.parameters / 1e6:.1f} M",
            f"{model.size / 1e6:.1f} MB",
            model.licence,
            model.task,
            "not measured" if accuracy is None else f"{100 * accuracy:.1f} % of {model.evaluation['prompts']} prompts",
        )
    Console().print(table)
