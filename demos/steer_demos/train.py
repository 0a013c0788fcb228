"""Trains an embedded model from scratch: `steer train emoji-unet`."""

from importlib import import_module
from pathlib import Path
from typing import Annotated

import typer

from steer_demos.cache import cache_dir
from steer_demos.training import Budget

# Each module has MINUTES, BATCH_SIZE, train(folder, budget, batch_size=, seed=) and save(folder, output).
RECIPES = {
    "emoji-mmdit": "steer_demos.models.emoji_mmdit",
    "emoji-unet": "steer_demos.models.emoji_unet",
    "emoji-wan": "steer_demos.models.emoji_wan",
    "emoji-vlm": "steer_demos.models.emoji_vlm",
}


def train(
    model: Annotated[str, typer.Argument(help=f"One of {', '.join(RECIPES)}.")],
    minutes: Annotated[float | None, typer.Option(help="Wall time to train; default: the recipe's.", min=0.01)] = None,
    samples: Annotated[int | None, typer.Option(help="Stop after this many training samples.", min=1)] = None,
    folder: Annotated[Path | None, typer.Option(help="Where checkpoints go; default: in the cache folder.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of the finished model; default: FOLDER/model.")] = None,
    batch_size: Annotated[int | None, typer.Option(help="Samples per step; default: the recipe's.", min=1)] = None,
    seed: Annotated[int, typer.Option(help="Seed of the initial weights and of the data's order.")] = 0,
) -> None:
    """Train an embedded model from scratch, or continue a run that was stopped; then write it for `from_pretrained`."""
    if model not in RECIPES:
        raise typer.BadParameter(f"cannot train {model!r}; what can be trained: {', '.join(RECIPES)}")
    recipe = import_module(RECIPES[model])
    if minutes is None and samples is None:
        minutes = recipe.MINUTES
    folder = folder or cache_dir() / "training" / model
    folder.mkdir(parents=True, exist_ok=True)
    recipe.train(folder, Budget(minutes, samples), batch_size=batch_size or recipe.BATCH_SIZE, seed=seed)
    output = output or folder / "model"
    recipe.save(folder, output)
    for path in sorted(output.rglob("*.safetensors")):
        path.chmod(0o644)
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(output)}")
    print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(train)
