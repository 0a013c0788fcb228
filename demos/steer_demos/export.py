"""Writes a trained checkpoint as a pipeline folder: `python -m steer_demos.export emoji-mmdit --checkpoint FOLDER`."""

from pathlib import Path
from typing import Annotated

import torch
import typer
from diffusers import AutoencoderTiny, StableDiffusion3Pipeline

from steer_demos.emoji import cache_dir
from steer_demos.emoji_mmdit import build_scheduler
from steer_demos.models import EMBEDDED
from steer_demos.train import TextToImage, saved_tokenizer


def trained_pipeline(checkpoint: Path, autoencoder: Path, averaged: bool = True) -> StableDiffusion3Pipeline:
    """The weights of `checkpoint/checkpoint.pt` and the VAE in `autoencoder/vae`, as one bfloat16 pipeline."""
    state = torch.load(checkpoint / "checkpoint.pt", map_location="cpu", weights_only=False)
    tokenizer = saved_tokenizer(checkpoint)
    model = TextToImage(tokenizer)
    model.load_state_dict(state["average" if averaged else "model"])
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=AutoencoderTiny.from_pretrained(autoencoder / "vae"),
        text_encoder=model.text.first,
        tokenizer=tokenizer,
        text_encoder_2=model.text.second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    return pipe.to(torch.bfloat16)


def export(
    model: Annotated[str, typer.Argument(help="The model to export: emoji-mmdit.")] = "emoji-mmdit",
    checkpoint: Annotated[Path | None, typer.Option(help="Training folder; default: the cache folder.")] = None,
    autoencoder: Annotated[Path | None, typer.Option(help="Folder of the trained VAE; default: as above.")] = None,
    averaged: Annotated[bool, typer.Option(help="Moving average of the weights, or the last ones.")] = True,
    output: Annotated[Path | None, typer.Option(help="Pipeline folder; default: the weights in the package.")] = None,
) -> None:
    """Write the trained weights as bfloat16 safetensors in a pipeline folder."""
    if model != "emoji-mmdit":
        raise typer.BadParameter(f"cannot export {model!r}; what can be exported: emoji-mmdit")
    checkpoint = checkpoint or cache_dir() / "training" / model
    output = output or EMBEDDED[model].folder
    trained_pipeline(checkpoint, autoencoder or checkpoint, averaged).save_pretrained(output)
    for path in sorted(output.rglob("*.safetensors")):
        path.chmod(0o644)
        print(f"{path.stat().st_size / 1e6:7.2f} MB  {path.relative_to(output)}")


if __name__ == "__main__":
    typer.run(export)
