"""`emoji-wan`: what its training builds on, and the shipped weights through the real `WanPipeline`."""

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderKLWan, FlowMatchEulerDiscreteScheduler, UniPCMultistepScheduler, WanPipeline
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from transformers import T5Tokenizer

import steer_demos
from steer_demos.clips import CONCEPTS, MOTIONS
from steer_demos.emoji import BACKGROUNDS
from steer_demos.models import emoji_wan
from steer_demos.models.emoji_wan import (
    LATENT_FRAMES,
    STAGES,
    TEXT_TOKENS,
    ChosenFrames,
    CountedTextAttention,
    TextToVideo,
    build_scheduler,
    build_tokenizer,
    build_transformer,
    caption_grid,
    shifted,
)
from steer_demos.models.emoji_wan_autoencoder import ClipCodec, build_autoencoder, train_framewise

FOLDER = Path(steer_demos.__file__).parent / "weights" / "emoji-wan"


def randomise(module: torch.nn.Module, std: float = 0.05) -> None:
    torch.manual_seed(0)
    for parameter in module.parameters():
        torch.nn.init.normal_(parameter, std=std)


def test_captions_are_found_by_their_place_in_the_grid() -> None:
    grid = np.array(caption_grid()).reshape(-1, len(MOTIONS) + 1, len(BACKGROUNDS) + 1)
    assert grid[0, 0, 2] == "a red apple moving left on a blue background"
    assert grid[0, len(MOTIONS), 0] == ""
    first = len(CONCEPTS)
    assert grid[first, 0, -1] == grid[first, len(MOTIONS), -1] == "an animated waving hand"


def test_every_caption_fits_the_tokenizer_and_other_text_is_spelled_or_unknown(tmp_path) -> None:
    tokenizer = build_tokenizer()
    ids = tokenizer(caption_grid()).input_ids
    # The last token is always padding: it stands for all the zeros that the pipeline appends.
    assert max(len(caption) for caption in ids) < TEXT_TOKENS
    assert not any(tokenizer.unk_token_id in caption for caption in ids)
    assert tokenizer("zebra ☂").input_ids[-2:] == [tokenizer.unk_token_id, tokenizer.eos_token_id]
    tokenizer.save_pretrained(tmp_path)
    texts = [*caption_grid()[:50], "zebra ☂", ""]
    assert T5Tokenizer.from_pretrained(tmp_path)(texts).input_ids == tokenizer(texts).input_ids


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    vocabulary = json.dumps(build_tokenizer().get_vocab(), sort_keys=True)
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:8] == "51c2bec5"


@pytest.mark.parametrize("length", [TEXT_TOKENS, 40, 512])
def test_one_counted_token_equals_the_padding_of_the_pipeline(length: int) -> None:
    transformer = build_transformer()
    randomise(transformer)
    text, latents = torch.randn(2, TEXT_TOKENS, 96), torch.randn(2, 16, 3, 16, 16)
    text[:, 10:] = 0
    timestep = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        transformer.set_attn_processor(WanAttnProcessor())
        padded = torch.cat([text, torch.zeros(2, length - TEXT_TOKENS, 96)], dim=1)
        expected = transformer(latents, timestep, padded).sample
        transformer.set_attn_processor(CountedTextAttention(torch.full((2,), length - TEXT_TOKENS + 1)))
        found = transformer(latents, timestep, text).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_text_is_encoded_as_the_pipeline_encodes_it() -> None:
    model = TextToVideo(build_tokenizer()).eval()
    pipe = WanPipeline(build_tokenizer(), model.text_encoder, build_autoencoder(), build_scheduler(), model.transformer)
    captions = ["a fox growing on a pink background", ""]
    expected, _ = pipe.encode_prompt(captions, do_classifier_free_guidance=False, max_sequence_length=64)
    ids = pipe.tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
    with torch.no_grad():
        found = model.encode_text(ids)
    torch.testing.assert_close(found, expected[:, :TEXT_TOKENS], atol=1e-5, rtol=1e-4)
    assert not expected[:, TEXT_TOKENS:].any()


def test_chosen_frames_have_the_rotary_positions_they_have_in_the_clip() -> None:
    rope = build_transformer().rope
    latents = torch.zeros(2, 16, LATENT_FRAMES, 16, 16)
    cos, sin = (table.unflatten(1, (LATENT_FRAMES, 64)) for table in rope(latents))
    chosen = ChosenFrames(rope)
    chosen.times = torch.tensor([[0, 4, 8], [1, 2, 7]])
    found_cos, found_sin = (table.unflatten(1, (3, 64)) for table in chosen(latents[:, :, :3]))
    torch.testing.assert_close(found_cos[1, 2], cos[0, 7])
    torch.testing.assert_close(found_sin[0, 1], sin[0, 4])


def test_the_noise_levels_of_training_are_those_of_the_scheduler() -> None:
    unshifted = FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000)
    torch.testing.assert_close(build_scheduler().sigmas, shifted(unshifted.sigmas, STAGES[-1].shift))
    assert sum(stage.share for stage in STAGES) == pytest.approx(1) and STAGES[-1].frames == LATENT_FRAMES


def test_a_training_step_reaches_every_weight() -> None:
    torch.manual_seed(0)
    model = TextToVideo(build_tokenizer())
    for name in ("condition_embedder.time_proj", "proj_out"):  # start at zero, which stops gradients
        torch.nn.init.normal_(model.transformer.get_submodule(name).weight, std=0.1)
    model.prepare(torch.tensor([1, 497]))
    latents, times = torch.randn(2, 16, 3, 16, 16), torch.tensor([[0, 4, 8], [1, 2, 7]])
    ids = torch.tensor([[4, 5, 6, 7, 1, *[0] * 11], [1, *[0] * 15]])
    model.loss(latents, times, ids, torch.randn(latents.shape), torch.tensor([0.9, 0.3])).backward()
    idle = [name for name, value in model.named_parameters() if value.grad is None or not value.grad.any()]
    assert not idle


def test_the_codec_pairs_frames_causally_and_projects() -> None:
    generator = torch.Generator().manual_seed(0)
    still = torch.rand(4, 1, 3, 16, 16, generator=generator)
    clips = torch.cat([still.expand(-1, 3, -1, -1, -1), torch.rand(4, 6, 3, 16, 16, generator=generator)], dim=1)
    codec = ClipCodec.fit(clips)
    latents = codec.encode(clips)
    assert latents.shape == (4, 16, 5, 4, 4)
    assert codec.decode(latents).shape == clips.shape
    torch.testing.assert_close(latents[:, :, 0], latents[:, :, 1])  # both are pairs of the still picture
    assert latents.square().mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(codec.encode(codec.decode(latents)[:, :1]), latents[:, :, :1], atol=0.5, rtol=0.5)


def test_framewise_training_computes_what_the_real_autoencoder_does() -> None:
    torch.manual_seed(0)
    model = build_autoencoder()
    frames, latents = torch.rand(1, 3, 5, 32, 32) * 2 - 1, torch.randn(1, 16, 3, 8, 8)
    with torch.no_grad():
        expected = model.decode(latents).sample, model.encode(frames).latent_dist.mean
        train_framewise(model)
        found = model.decode(latents).sample, model.encode(frames).latent_dist.mean
    assert found[0].shape == frames.shape and found[1].shape == latents.shape
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)
    model.decode(latents).sample.mean().backward()
    assert not model.decoder.conv_in.weight.grad[:, :, :-1].any(), "slices that see the past must stay zero"


@pytest.fixture(scope="module")
def pipe() -> WanPipeline:
    if not (FOLDER / "model_index.json").exists():
        pytest.skip("the weights of emoji-wan are not there yet: `steer train emoji-wan`")
    pipe = WanPipeline.from_pretrained(FOLDER, dtype=torch.float32, local_files_only=True)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def draw(pipe: WanPipeline, prompt: str, **call) -> torch.Tensor:
    """One clip (17, 3, 64, 64) in [0, 1]."""
    settings = {"num_inference_steps": 6, "guidance_scale": 3.0, "max_sequence_length": 16, **call}
    generator = torch.Generator().manual_seed(0)
    clip = pipe(prompt, height=64, width=64, num_frames=17, output_type="pt", generator=generator, **settings)
    return clip.frames[0]


def test_the_shipped_folder_is_small_and_of_the_real_classes(pipe) -> None:
    assert isinstance(pipe.vae, AutoencoderKLWan)
    assert (pipe.vae_scale_factor_temporal, pipe.vae_scale_factor_spatial) == (2, 4)
    assert sum(path.stat().st_size for path in FOLDER.rglob("*.safetensors")) < 9.2e6


def test_the_prompt_decides_the_background(pipe) -> None:
    blue = draw(pipe, "a house standing still on a blue background")
    yellow = draw(pipe, "a house standing still on a yellow background")
    assert blue.shape == (17, 3, 64, 64)
    assert blue[:, 2, :3].mean() > blue[:, 0, :3].mean() + 0.1
    assert yellow[:, 2, :3].mean() < yellow[:, 0, :3].mean() - 0.1


def test_other_text_lengths_draw_nearly_the_same(pipe) -> None:
    prompt = "a house standing still on a blue background"
    short, long = draw(pipe, prompt), draw(pipe, prompt, max_sequence_length=128)
    assert (short - long).abs().mean() < 0.1


def test_other_schedulers_of_the_family_work(pipe) -> None:
    scheduler = UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=6.0)
    other = WanPipeline(pipe.tokenizer, pipe.text_encoder, pipe.vae, scheduler, pipe.transformer)
    other.set_progress_bar_config(disable=True)
    clip = draw(other, "a house standing still on a blue background")
    assert clip[:, 2, :3].mean() > clip[:, 0, :3].mean() + 0.1


def test_emoji_wan_is_one_of_the_recipes() -> None:
    from steer_demos.train import RECIPES

    assert RECIPES["emoji-wan"] == emoji_wan.__name__
