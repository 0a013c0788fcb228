"""Launch settings of the Triton kernels: tables shipped as data, one per GPU model, and a rule for all others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from functools import lru_cache
from importlib.resources import files
from typing import Any

import torch


@dataclass(frozen=True)
class Config:
    """How a kernel is launched.

    Attributes:
        tile_q, tile_k: query and key tokens of one matrix product.
        warps, stages: warps of a program, and depth of its software pipeline.
        tma: load keys and values through tensor-map descriptors (compute capability 9.0 and later).
        programs: size of the persistent grid.
    """

    tile_q: int
    tile_k: int
    warps: int
    stages: int
    tma: bool
    programs: int


@lru_cache
def table(name: str) -> dict[str, Any] | None:
    """The shipped table whose "match" is part of this device name, e.g. "NVIDIA H200"; None if there is none."""
    for entry in files("steer_kernels").joinpath("tables").iterdir():
        if entry.name.endswith(".json"):
            found = json.loads(entry.read_text())
            if found["match"] in name:
                return found
    return None


_known: dict[tuple[torch.device, torch.dtype, int, tuple[int, int]], Config] = {}  # torch.compile reads a dictionary


def config(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]) -> Config:
    """Settings for block-sparse attention on this device, from its table or from the size of its shared memory."""
    call = (device, dtype, max(16, 1 << (head_dim - 1).bit_length()), block_size)
    if call not in _known:
        _known[call] = _config(*call)
    return _known[call]


def _config(device: torch.device, dtype: torch.dtype, head_dim: int, block_size: tuple[int, int]) -> Config:
    if device.type != "cuda":  # the interpreter
        return Config(min(128, block_size[0]), min(128, block_size[1]), 4, 1, False, 2)
    found = torch.cuda.get_device_properties(device)
    processors = found.multi_processor_count
    for row in (table(found.name) or {"block_sparse": []})["block_sparse"]:
        if (row["bytes"], row["head_dim"], tuple(row["block"])) == (dtype.itemsize, head_dim, block_size):
            return Config(
                row["tile_q"], row["tile_k"], row["warps"], row["stages"], row["tma"], row["per_sm"] * processors
            )
    shared_memory = getattr(found, "shared_memory_per_block_optin", 99 * 1024)
    return by_shared_memory(shared_memory, processors, dtype.itemsize, head_dim, block_size)


def by_shared_memory(limit: int, processors: int, size: int, head_dim: int, block_size: tuple[int, int]) -> Config:
    """The largest tiles, and the deepest pipeline, whose keys, values and queries fit into `limit` bytes."""
    tile_q = min(128 if head_dim * size <= 256 else 64, block_size[0])
    for tile_k in (128, 64, 32, 16):
        # above this the scores and the output of a tile do not fit into the registers together
        if tile_k > block_size[1] or tile_k * head_dim > 128 * 64:
            continue
        for stages in (3, 2, 1):
            if (2 * stages * tile_k + tile_q) * head_dim * size <= limit:
                return Config(tile_q, tile_k, 4 if tile_q * head_dim <= 64 * 64 else 8, stages, False, processors)
    return Config(min(16, block_size[0]), min(16, block_size[1]), 4, 1, False, processors)
