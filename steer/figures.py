"""Matplotlib figures that belong to no window: several threads may draw at once, as visitors of the app do."""

from __future__ import annotations

from typing import Any


def subplots(rows: int = 1, columns: int = 1, *, figsize: tuple[float, float], **options: Any) -> tuple[Any, Any]:
    """A figure and its axes, as those of `pyplot`, which numbers its figures and gives two threads the same one.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError("pictures need matplotlib: pip install 'steer-attention[plot]'") from None
    figure = Figure(figsize=figsize, layout="constrained")
    return figure, figure.subplots(rows, columns, **options)
