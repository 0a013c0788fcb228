"""What a pipeline run asked its denoiser and told its scheduler, step by step."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from tiny_pipelines import generate
from torch import Tensor


@dataclass
class Step:
    """One `scheduler.step`: the forwards since the last one, in order, and the prediction that was handed over.

    The forwards of guidance's extra passes are among them: hooks of the model see them as they see the pipeline's own.
    """

    prediction: Tensor
    timestep: float
    inputs: list[dict[str, Any]] = field(default_factory=list)


def record(pipe: Any, kwargs: dict[str, Any], monkeypatch: Any) -> tuple[Tensor, list[Step]]:
    """Run the pipeline, steered or not; returns its result and its steps."""
    steps: list[Step] = []
    inputs: list[dict[str, Any]] = []
    models = [m for m in (getattr(pipe, n, None) for n in ("unet", "transformer", "transformer_2")) if m is not None]

    def keep(model: Any, args: tuple[Any, ...], given: dict[str, Any]) -> None:
        named = dict(zip(inspect.signature(type(model).forward).parameters, (model, *args), strict=False))
        named.pop("self")
        inputs.append({k: v for k, v in {**named, **given}.items() if k != "return_dict"})

    hooks = [model.register_forward_pre_hook(keep, with_kwargs=True) for model in models]
    base = getattr(type(pipe.scheduler), "_steer_base", type(pipe.scheduler))
    original: Callable[..., Any] = base.step

    def step(self: Any, model_output: Tensor, timestep: Any, *args: Any, **more: Any) -> Any:
        steps.append(Step(model_output.clone(), float(timestep), list(inputs)))
        inputs.clear()
        return original(self, model_output, timestep, *args, **more)

    step.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
    with monkeypatch.context() as patch, torch.no_grad():
        patch.setattr(base, "step", step)
        result = generate(pipe, kwargs)
    for hook in hooks:
        hook.remove()
    return result, steps
