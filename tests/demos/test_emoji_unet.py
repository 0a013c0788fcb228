"""The UNet's recipe end to end on a few random pictures: train, stop, write, load with diffusers, draw."""

import numpy as np
import pytest
import torch
import typer
from diffusers import StableDiffusionPipeline
from transformers import CLIPTextModel

from steer_demos.models import emoji_unet
from steer_demos.train import train
from steer_demos.training import load_checkpoint


@pytest.fixture
def folder(tmp_path, monkeypatch):
    pictures = torch.rand(3, 2, 2, 3, 64, 64, generator=torch.Generator().manual_seed(0)) * 2 - 1
    monkeypatch.setattr(emoji_unet, "all_pictures", lambda: pictures)
    train("emoji-unet", samples=8, folder=tmp_path, batch_size=4)
    return tmp_path


def test_the_trained_folder_loads_with_diffusers(folder) -> None:
    assert load_checkpoint(folder)["step"] == 2
    pipe = StableDiffusionPipeline.from_pretrained(folder / "model", safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    assert pipe.scheduler.config.prediction_type == "v_prediction"
    pictures = pipe(["a red apple", "a cat face"], num_inference_steps=2, output_type="np").images
    assert pictures.shape == (2, 64, 64, 3) and np.isfinite(pictures).all()


def test_an_unknown_model_is_refused_with_those_that_exist(tmp_path) -> None:
    with pytest.raises(typer.BadParameter, match=r"'emoji-umet'.*emoji-mmdit, emoji-unet, emoji-wan, emoji-vlm"):
        train("emoji-umet", samples=8, folder=tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_saving_before_training_says_what_to_do(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="steer train emoji-unet"):
        emoji_unet.save(tmp_path, tmp_path / "model")


def test_the_loss_is_that_of_the_scheduler_which_samples() -> None:
    torch.manual_seed(0)
    model = emoji_unet.TextToImage(emoji_unet.text_parts()[1])
    latents, noise = torch.randn(2, 4, 16, 16, 16)
    timesteps, ids = torch.tensor([0, 300, 700, 999]), torch.zeros(4, 16, dtype=torch.long)
    scheduler = emoji_unet.build_scheduler()
    with torch.no_grad():
        noised = scheduler.add_noise(latents, noise, timesteps)
        tokens = model.text_encoder(ids).last_hidden_state
        predicted = model.unet(noised, timesteps, tokens).sample
        expected = (predicted - scheduler.get_velocity(latents, noise, timesteps)).square().mean()
        torch.testing.assert_close(model.loss(latents, ids, noise, timesteps), expected)
    # No signal is left at the last timestep, where sampling begins.
    assert scheduler.alphas_cumprod[-1] == 0 and isinstance(model.text_encoder, CLIPTextModel)
