"""Block masks of published patterns in closed form: a few tensor operations on the grid of blocks, exact per token."""

from steer_kernels.patterns.lines import a_shape, power_of_two, sink_window, vertical_stripes
from steer_kernels.patterns.radial import radial
from steer_kernels.patterns.windows import (
    circular,
    diagonal,
    frames,
    multi_diagonal,
    neighborhood,
    sliding_tile,
    speedup_bound,
)

__all__ = [
    "a_shape",
    "circular",
    "diagonal",
    "frames",
    "multi_diagonal",
    "neighborhood",
    "power_of_two",
    "radial",
    "sink_window",
    "sliding_tile",
    "speedup_bound",
    "vertical_stripes",
]
