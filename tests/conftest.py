"""Puts this folder on the path of every test: `tiny`, `tiny_pipelines` and `probes` are imported by name."""

import os
from importlib.util import find_spec

import pytest
import torch
from hypothesis import settings

if not torch.cuda.is_available():
    os.environ.setdefault(
        "TRITON_INTERPRET", "1"
    )  # read when triton is first imported; its kernels then run on the CPU

torch.set_num_threads(1)  # the models are tiny

settings.register_profile("steer", deadline=None)  # time is measured in benchmarks, never asserted in a test
settings.load_profile("steer")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Tests marked `gpu` run where there is a CUDA device, and those marked `interpreted` where there is none."""
    missing = {
        "gpu": None if torch.cuda.is_available() else "no CUDA device",
        "interpreted": "there is a CUDA device" if torch.cuda.is_available() else None,
    }
    if find_spec("triton") is None:
        missing["interpreted"] = "triton is not installed"
    for item in items:
        for mark, reason in missing.items():
            if reason and item.get_closest_marker(mark):
                item.add_marker(pytest.mark.skip(reason=reason))
