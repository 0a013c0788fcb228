"""The embedded models, and one way to load those and any other model: `load("emoji-unet")`."""

import inspect
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from importlib import import_module
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from diffusers import DiffusionPipeline
from rich import box
from rich.console import Console
from rich.table import Table
from tqdm import tqdm

WEIGHTS = Path(__file__).parent.parent / "weights"
FITTED = Path(__file__).parent.parent / "fitted"


@dataclass(frozen=True)
class EmbeddedModel:
    """One pretrained model that comes with the package.

    Args:
        name: what `load` takes.
        class_name: its diffusers or transformers class.
        parameters: number of weights of all its parts.
        licence: of the weights.
        task: what it does, in a few words.
        figures: what `steer models` shows of `evaluation.json`: label -> key of a share from 0 to 1.
        guided_layers: what guidance perturbs here, where the model is too small for a method's own preset.
        call: arguments its pipeline needs, where the defaults are those of a large model.
        module: the module whose `load(device, dtype)` assembles it; None for a folder that `from_pretrained` reads.
    """

    name: str
    class_name: str
    parameters: int
    licence: str
    task: str
    figures: tuple[tuple[str, str], ...] = ()
    guided_layers: str | None = None
    call: Mapping[str, Any] = field(default_factory=dict)
    module: str | None = None

    @property
    def folder(self) -> Path:
        """Weights, model card and evaluation, in the layout of `save_pretrained`."""
        return WEIGHTS / self.name

    @property
    def size(self) -> int:
        """Bytes of weights in the package."""
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
            class_name="StableDiffusion3Pipeline",
            parameters=8_780_000,
            licence="Apache-2.0",
            task="text to 64 x 64 pictures of emoji",
            figures=(("right concept", "accuracy"),),
            guided_layers="transformer_blocks.3",
            call={"max_sequence_length": 0},  # the zero tokens in place of a T5 encoder: four times the work
        ),
        EmbeddedModel(
            name="emoji-unet",
            class_name="StableDiffusionPipeline",
            parameters=4_140_000,
            licence="Apache-2.0",
            task="the same, with a UNet",
            figures=(("right concept", "accuracy"),),
        ),
        EmbeddedModel(
            name="emoji-wan",
            class_name="WanPipeline",
            parameters=4_320_000,
            licence="Apache-2.0",
            task="text to clips of 17 frames of 64 x 64",
            figures=(("right motion", "motion_accuracy"), ("right subject", "accuracy")),
            guided_layers="blocks.3",
            call={"height": 64, "width": 64, "num_frames": 17, "max_sequence_length": 16},
        ),
        EmbeddedModel(
            name="emoji-vlm",
            class_name="LlavaForConditionalGeneration",
            parameters=136_310_000,
            licence="Apache-2.0",
            task="answers questions about drawn scenes",
            figures=(("presence", "presence_accuracy"),),
            module="steer_demos.models.emoji_vlm",
        ),
        EmbeddedModel(
            name="smollm2-135m-instruct",
            class_name="LlamaForCausalLM",
            parameters=134_515_008,
            licence="Apache-2.0",
            task="small language model, tuned for instructions",
            module="steer_demos.models.smollm2",
        ),
    ]
}


def list_models() -> list[EmbeddedModel]:
    """The embedded models."""
    return list(EMBEDDED.values())


def guided_layers(name: str) -> str | None:
    """The layers that guidance perturbs in an embedded model; None leaves the choice to the method's preset."""
    return EMBEDDED[name].guided_layers if name in EMBEDDED else None


def call_options(name: str) -> dict[str, Any]:
    """Arguments for the call of an embedded pipeline; empty for other models."""
    return dict(EMBEDDED[name].call) if name in EMBEDDED else {}


def fitted(model: str, method: str) -> Path | None:
    """The folder of a method that was fitted to an embedded model and comes with the package; None if there is none."""
    return FITTED / model / method if (model, method) in list_fitted() else None


def list_fitted() -> list[tuple[str, str]]:
    """The methods that come fitted to embedded models: (name of the model, class name of the method)."""
    return [(model, file.parent.name) for model in EMBEDDED for file in sorted((FITTED / model).glob("*/steer.json"))]


def load(
    name: str | Path,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    use_safetensors: bool | None = None,
) -> Any:
    """Load a model through its real class.

    Args:
        name: an embedded model (never touches the network), a folder written by `save_pretrained`, or a hub id.
        device: by default `cuda` where there is one, else `cpu`.
        dtype: by default bfloat16 on CUDA and float32 elsewhere.
        use_safetensors: True = nothing else is read, so that no file can run code (a pickle can); None = safetensors
            where there are some.

    Returns:
        A diffusers pipeline; for a transformers model the pair (model, processor) in evaluation mode, where the
        processor of a language model is its tokenizer.

    Raises:
        ValueError: `name` is none of these.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    embedded = EMBEDDED.get(str(name))
    if embedded is not None and embedded.module is not None:
        return import_module(embedded.module).load(device, dtype)
    if embedded is not None:
        return _load_pipeline(embedded.folder, device, dtype, use_safetensors)
    if Path(name).is_dir():
        folder = Path(name)
        if (folder / "model_index.json").exists():
            return _load_pipeline(folder, device, dtype, use_safetensors)
        if (folder / "config.json").exists():
            return _load_transformer(folder, device, dtype, use_safetensors)
        if (folder / "adapter.safetensors").exists():  # what `steer train emoji-vlm` writes: all but the language model
            return import_module("steer_demos.models.emoji_vlm").load(device, dtype, weights=folder)
        raise ValueError(
            f"{folder} holds neither model_index.json (a diffusers pipeline) nor config.json (a transformers model): "
            "it is not a folder that save_pretrained wrote."
        )
    if str(name).count("/") == 1 and not str(name).startswith((".", "/", "~")):
        if _is_pipeline(str(name)):
            return DiffusionPipeline.from_pretrained(str(name), dtype=dtype, use_safetensors=use_safetensors).to(device)
        return _load_transformer(str(name), device, dtype, use_safetensors)
    raise ValueError(
        f"no model {str(name)!r}. Embedded models: {', '.join(EMBEDDED)}. "
        "A folder must exist and hold model_index.json or config.json; a hub id looks like owner/name."
    )


def draws_clips(pipe: DiffusionPipeline) -> bool:
    """Whether `pipe`, unsteered, makes clips rather than pictures."""
    return "num_frames" in inspect.signature(pipe.__call__).parameters


def load_pipeline(name: str | Path, clips: bool | None = None) -> DiffusionPipeline:
    """As `load`, for what needs a pipeline: one that makes clips, one that makes pictures, or (None) either.

    Raises:
        ValueError: `name` is another kind of model.
    """
    pipe = load(name)
    if not isinstance(pipe, DiffusionPipeline):
        raise ValueError(f"{name} draws nothing: it is a {type(pipe[0]).__name__}. `steer models` lists what does.")
    if clips is not None and draws_clips(pipe) != clips:
        made, wanted = ("clips", "pictures") if not clips else ("pictures", "clips")
        raise ValueError(f"{name} makes {made}, but {wanted} are wanted here. `steer models` lists what makes them.")
    return pipe


def _load_pipeline(
    folder: Path, device: torch.device, dtype: torch.dtype, use_safetensors: bool | None
) -> DiffusionPipeline:
    # diffusers refuses a folder saved without a required component, such as the T5 of an SD3 pipeline, unless told so.
    index = json.loads((folder / "model_index.json").read_text())
    absent = {name: None for name, value in index.items() if value == [None, None]}
    pipe = DiffusionPipeline.from_pretrained(
        folder, dtype=dtype, local_files_only=True, use_safetensors=use_safetensors, **absent
    )
    return pipe.to(device)


def _load_transformer(
    source: str | Path, device: torch.device, dtype: torch.dtype, use_safetensors: bool | None
) -> tuple[Any, Any]:
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForImageTextToText, AutoProcessor, AutoTokenizer

    local = isinstance(source, Path)
    config = AutoConfig.from_pretrained(source, local_files_only=local)
    sees = type(config) in AutoModelForImageTextToText._model_mapping
    model_class, processor_class = (
        (AutoModelForImageTextToText, AutoProcessor) if sees else (AutoModelForCausalLM, AutoTokenizer)
    )
    model = model_class.from_pretrained(source, dtype=dtype, local_files_only=local, use_safetensors=use_safetensors)
    return model.to(device).eval(), processor_class.from_pretrained(source, local_files_only=local)


def _is_pipeline(hub_id: str) -> bool:
    from huggingface_hub import file_exists, try_to_load_from_cache
    from huggingface_hub.constants import HF_HUB_OFFLINE

    if isinstance(try_to_load_from_cache(hub_id, "model_index.json"), str):
        return True
    return not HF_HUB_OFFLINE and file_exists(hub_id, "model_index.json")


_MEASURE = """
import json, sys, time
import diffusers, psutil, torch, transformers
from steer_demos import models
process = psutil.Process()
before, started = process.memory_info().rss, time.perf_counter()
loaded = models.load(sys.argv[1], device="cpu")
seconds = time.perf_counter() - started
parts = loaded.components.values() if hasattr(loaded, "components") else loaded
for part in parts:
    for weight in part.parameters() if isinstance(part, torch.nn.Module) else []:
        weight.sum()  # a mapped file takes memory only once it is read
print(json.dumps([seconds, process.memory_info().rss - before]))
"""


def measure_loading(name: str) -> tuple[float, int]:
    """Seconds that `load(name)` takes, and bytes of memory once every weight was read: float32, no network."""
    environment = os.environ | {"HF_HUB_OFFLINE": "1"}
    command = [sys.executable, "-c", _MEASURE, name]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(f"loading {name} failed: {done.stderr.strip().splitlines()[-1]}")
    seconds, memory = json.loads(done.stdout.splitlines()[-1])
    return seconds, memory


def models(
    measure: Annotated[bool, typer.Option("--measure", help="Also load each in a new process: time, memory.")] = False,
) -> None:
    """List the embedded models."""
    columns = ("name", "class", "parameters", "weights", "licence", "what it does", "evaluation")
    table = Table(*columns, box=box.SIMPLE)
    table.columns[0].no_wrap = True
    if measure:
        table.add_column("loads in", justify="right")
        table.add_column("memory", justify="right")
    for model in tqdm(list_models(), desc="loading", disable=not measure, leave=False):
        shares = [f"{label} {100 * model.evaluation[key]:.1f} %" for label, key in model.figures if model.evaluation]
        row = [
            model.name,
            model.class_name,
            f"{model.parameters / 1e6:.1f} M",
            f"{model.size / 1e6:.1f} MB" if model.size else "in a wheel",
            model.licence,
            model.task,
            ", ".join(shares) or "–",
        ]
        if measure:
            try:
                seconds, memory = measure_loading(model.name)
                row += [f"{seconds:.1f} s", f"{memory / 1e6:.0f} MB"]
            except RuntimeError as error:  # one model that is not installed must not hide the others
                tqdm.write(str(error))
        table.add_row(*row)
    Console().print(table)
