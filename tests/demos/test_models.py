"""The embedded model loads through its real class, offline, and draws the same picture from the same seed."""

import numpy as np
import pytest
import torch
from diffusers import StableDiffusion3Pipeline
from tiny import build, make_llama
from transformers import LlamaForCausalLM

from steer_demos import models
from steer_demos.generate import draw_column, labelled_grid


@pytest.fixture(scope="module")
def pipe() -> StableDiffusion3Pipeline:
    pipe = models.load("emoji-mmdit", device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def test_load_gives_the_real_pipeline(pipe) -> None:
    assert type(pipe) is StableDiffusion3Pipeline
    assert pipe.dtype == torch.float32
    assert pipe.transformer.config.qk_norm is None and not pipe.transformer.config.dual_attention_layers


def test_diffusers_alone_loads_it_in_one_dtype() -> None:
    folder = models.EMBEDDED["emoji-mmdit"].folder
    pipe = StableDiffusion3Pipeline.from_pretrained(folder, text_encoder_3=None, tokenizer_3=None)
    assert {pipe.transformer.dtype, pipe.vae.dtype, pipe.text_encoder.dtype, pipe.text_encoder_2.dtype} == {
        torch.float32
    }


def test_the_registry_describes_the_files(pipe) -> None:
    model = models.EMBEDDED["emoji-mmdit"]
    parts = (pipe.transformer, pipe.vae, pipe.text_encoder, pipe.text_encoder_2)
    counted = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert model.parameters == pytest.approx(counted, rel=0.01)
    assert model.size < 18e6
    assert max(path.stat().st_size for path in model.folder.rglob("*.safetensors")) < 16 * 2**20


def test_a_seed_fixes_the_picture(pipe) -> None:
    first, again = (draw_column(pipe, None, ["a red apple"], 2, 3.0, seed=0)[0][0] for _ in range(2))
    other = draw_column(pipe, None, ["a red apple"], 2, 3.0, seed=1)[0][0]
    assert first.size == (64, 64)
    np.testing.assert_array_equal(np.asarray(first), np.asarray(again))
    assert (np.asarray(first) != np.asarray(other)).any()


def test_the_prompt_and_its_colour_matter(pipe) -> None:
    prompts = ["a blue heart on a white background", "a blue heart on a yellow background"]
    white, yellow = (np.asarray(draw_column(pipe, None, [text], 8, 2.0, 0)[0][0], float) for text in prompts)
    rims = [np.median(picture[:3].reshape(-1, 3), axis=0) for picture in (white, yellow)]
    assert rims[0][2] > 220 and rims[1][2] < 200


def test_leaving_out_the_zero_tokens_changes_little(pipe) -> None:
    def draw(**options) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
        return pipe("a red heart on a blue background", generator=generator, **call, **options).images[0]

    assert np.abs(draw() - draw(max_sequence_length=0)).mean() < 0.05


def test_the_empty_negative_prompt_is_the_trained_unconditional_condition(pipe) -> None:
    _, negative, _, negative_pooled = pipe.encode_prompt("a star", None, None, max_sequence_length=0)
    empty, _, pooled, _ = pipe.encode_prompt("", None, None, do_classifier_free_guidance=False, max_sequence_length=0)
    assert torch.equal(negative, empty) and torch.equal(negative_pooled, pooled)


def test_an_unknown_name_lists_what_exists() -> None:
    with pytest.raises(ValueError, match="emoji-mmdit"):
        models.load("emoji-mdit")


def test_a_folder_without_a_model_is_refused(tmp_path) -> None:
    with pytest.raises(ValueError, match=r"model_index\.json .* config\.json"):
        models.load(tmp_path)


def test_a_folder_of_a_pipeline_loads(pipe, tmp_path) -> None:
    pipe.save_pretrained(tmp_path)
    loaded = models.load(tmp_path, device="cpu")
    assert type(loaded) is StableDiffusion3Pipeline
    assert torch.equal(loaded.transformer.proj_out.weight, pipe.transformer.proj_out.weight)


def test_a_folder_of_a_language_model_gives_model_and_tokenizer(pipe, tmp_path) -> None:
    build(make_llama).save_pretrained(tmp_path)
    pipe.tokenizer.save_pretrained(tmp_path)
    model, tokenizer = models.load(tmp_path, device="cpu", dtype=torch.float64)
    assert type(model) is LlamaForCausalLM and model.dtype == torch.float64 and not model.training
    assert tokenizer("a red apple").input_ids == pipe.tokenizer("a red apple").input_ids


def test_the_grid_has_a_column_each(pipe) -> None:
    ((picture,),) = draw_column(pipe, None, ["a star"], 1, 1.0, 0)
    one = labelled_grid({"baseline": [picture]}, ["a star"])
    two = labelled_grid({"baseline": [picture], "PAG": [picture]}, ["a star"])
    assert two.width > one.width and two.height == one.height
