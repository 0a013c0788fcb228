"""The loop that trains every embedded model: checkpoints, moving average, a learning rate that ends with the budget."""

import json
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import Tensor, nn
from tqdm import tqdm

WARM_UP_STEPS = 200
DECAY_SHARE = 0.35
EMA_DECAY = 0.999
SECONDS_PER_CHECKPOINT = 240
STEPS_PER_RECORD = 100


@dataclass(frozen=True)
class Budget:
    """How long to train: minutes of wall time or a number of samples, whichever is given."""

    minutes: float | None = None
    samples: int | None = None

    def progress(self, seconds: float, samples: int) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        spent = [0.0]
        if self.minutes is not None:
            spent.append(seconds / (60 * self.minutes))
        if self.samples is not None:
            spent.append(samples / self.samples)
        return min(max(spent), 1.0)

    def part(self, share: float) -> "Budget":
        """A share of this budget, for one stage of a training."""
        return Budget(
            None if self.minutes is None else self.minutes * share,
            None if self.samples is None else max(1, round(self.samples * share)),
        )


def rate_factor(step: int, progress: float) -> float:
    """Linear warm-up over steps, constant, then linear to zero over the last share of the budget; at most 1."""
    return min((step + 1) / WARM_UP_STEPS, (1 - progress) / DECAY_SHARE, 1.0)


def best_device() -> torch.device:
    """CUDA where there is one, else the CPU."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def load_checkpoint(folder: Path) -> dict[str, Any] | None:
    """What `fit` saved in `folder`, on the CPU, or None: `model`, `average`, `constants`, `step`, `seconds`, ..."""
    path = folder / "checkpoint.pt"
    return torch.load(path, map_location="cpu", weights_only=True) if path.exists() else None


def _save(path: Path, state: dict[str, Any]) -> None:
    # A run killed here leaves the previous checkpoint whole.
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def fit(
    model: nn.Module,
    draw: Callable[[int, torch.Generator], tuple[Tensor, ...]],
    loss: Callable[..., Tensor],
    folder: Path,
    budget: Budget,
    *,
    batch_size: int,
    seed: int,
    learning_rate: float = 1e-3,
    compile_model: bool = True,
    constants: Mapping[str, Tensor] | None = None,
    label: str = "training",
) -> None:
    """Train `model` with AdamW; continues from `folder/checkpoint.pt` where there is one.

    bfloat16 autocast on CUDA, float32 on a CPU. Writes `checkpoint.pt` every four minutes and at the end, and
    `loss.csv`.

    Args:
        model: on its device; the parameters that require gradients are trained. Its training mode is left as it is.
        draw: `(batch_size, generator)` -> the tensors of one batch, all randomness from the generator.
        loss: the tensors of `draw` -> a scalar; compiled where `compile_model`.
        folder: where checkpoints go; made if missing.
        learning_rate: the largest; see `rate_factor`.
        constants: tensors that belong to the weights, such as a latent codec; kept in the checkpoint as they are.
        label: of the progress bar.
    """
    folder.mkdir(parents=True, exist_ok=True)
    device = next(model.parameters()).device
    trained = {name: value for name, value in model.named_parameters() if value.requires_grad}
    average = {name: value.detach().clone() for name, value in trained.items()}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator(device).manual_seed(seed)
    step, seconds, history = 0, 0.0, []
    state = load_checkpoint(folder)
    if state:
        missing, unexpected = model.load_state_dict(state["model"], strict=False)
        if unexpected or set(missing) & set(trained):
            raise ValueError(f"{folder / 'checkpoint.pt'} is of another model: delete it or train in another folder")
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"])
        torch._foreach_copy_(list(average.values()), [state["average"][name].to(device) for name in average])
        step, seconds, history = state["step"], state["seconds"], state["history"]

    def checkpoint() -> None:
        content = {
            "model": {name: value.detach() for name, value in trained.items()},
            "average": average,
            "optimizer": optimizer.state_dict(),
            "generator": generator.get_state(),
            "constants": dict(constants or {}),
            "step": step,
            "seconds": seconds,
            "history": history,
        }
        _save(folder / "checkpoint.pt", content)

    loss_function = torch.compile(loss) if compile_model else loss
    started, saved, running = time.monotonic() - seconds, time.monotonic(), None
    bar = tqdm(total=100, desc=label, unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while (progress := budget.progress(seconds, step * batch_size)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate * rate_factor(step, progress)
        batch = draw(batch_size, generator)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            value = loss_function(*batch)
        value.backward()
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - started
        with torch.no_grad():
            decay = min(EMA_DECAY, (1 + step) / (10 + step))
            torch._foreach_lerp_(list(average.values()), list(trained.values()), 1 - decay)
        running = value.item() if running is None else 0.98 * running + 0.02 * value.item()
        bar.n = round(100 * progress, 1)
        bar.set_postfix(step=step, loss=f"{running:.4f}", rate=f"{step * batch_size / seconds:.1f}/s", refresh=False)
        bar.update(0)
        if step % STEPS_PER_RECORD == 0:
            history.append((step * batch_size, round(seconds), round(running, 4)))
            rows = ["samples,seconds,loss", *(",".join(map(str, row)) for row in history)]
            (folder / "loss.csv").write_text("\n".join(rows) + "\n")
        if time.monotonic() - saved > SECONDS_PER_CHECKPOINT:
            saved = time.monotonic()
            checkpoint()
    bar.close()
    checkpoint()


def save_pipeline(pipe: DiffusionPipeline, folder: Path) -> None:
    """Write `pipe` with bfloat16 weights into `folder`, for `from_pretrained(folder)`.

    diffusers loads its own parts in float32 unless told a dtype, transformers in the dtype that a config names: the
    configs of the text encoders name float32, so that both agree. Where a part was loaded from is left out.
    """
    pipe.to(torch.bfloat16).save_pretrained(folder)
    for path in folder.glob("*/config.json"):
        config = json.loads(path.read_text())
        config.pop("_name_or_path", None)
        if path.parent.name.startswith("text_encoder"):
            config["dtype"] = "float32"
        path.write_text(json.dumps(config, indent=2) + "\n")
