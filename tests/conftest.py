"""Puts this folder on the path of every test: `tiny`, `tiny_pipelines` and `probes` are imported by name."""

import os

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
    """Tests marked `gpu` run where there is a CUDA device."""
    if not torch.cuda.is_available():
        for item in items:
            if item.get_closest_marker("gpu"):
                item.add_marker(pytest.mark.skip(reason="no CUDA device"))
