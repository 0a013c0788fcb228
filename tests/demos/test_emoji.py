"""The data set's invariants that need neither npm nor a renderer, and what training builds on them."""

import hashlib
import json
import random

import numpy as np
import pytest
import torch
from diffusers.models.attention_processor import JointAttnProcessor2_0

from steer_demos.codec import PatchCodec
from steer_demos.emoji import BACKGROUNDS, STYLES, IconPackage, caption, compose, concepts, fetch_package
from steer_demos.evaluate_pictures import Prompt, evaluation_prompts
from steer_demos.intervals import frechet_distance
from steer_demos.models.emoji_mmdit import (
    TEXT_TOKENS,
    CountedTextAttention,
    all_captions,
    build_tokenizer,
    build_transformer,
    zero_token_mask,
)


def test_captions_name_what_they_are_given() -> None:
    assert caption("red apple") == "red apple"
    assert caption("owl", "noto", "blue", article=True) == "an owl on a blue background, noto style"
    assert caption("unicorn", article=True) == "a unicorn"


def test_every_concept_style_and_background_is_told_apart_by_its_caption() -> None:
    captions = all_captions()
    assert len(set(captions)) == len(captions) == len(concepts()) * (len(STYLES) + 1) * (len(BACKGROUNDS) + 1) * 2


def test_every_caption_fits_the_tokenizer_and_other_text_falls_back_to_bytes() -> None:
    tokenizer = build_tokenizer()
    assert max(len(ids) for ids in tokenizer(all_captions()).input_ids) <= TEXT_TOKENS
    assert tokenizer.eos_token_id not in tokenizer("Zürich – 42 ☂!").input_ids[1:-1]


def test_the_tokenizer_is_the_same_in_every_process() -> None:
    # Merges that tie must not be ordered by a hash map: a checkpoint would then be read with other words swapped.
    vocabulary = json.dumps(build_tokenizer().get_vocab(), sort_keys=True)
    assert hashlib.sha256(vocabulary.encode()).hexdigest()[:8] == "e0663ee8"


def test_compose_puts_the_background_where_the_render_is_transparent() -> None:
    render = np.zeros((64, 64, 4), np.uint8)
    render[:32] = (255, 0, 0, 255)
    picture = compose(render, (0, 0, 255))
    np.testing.assert_allclose(picture[0, 0], (1, -1, -1))
    np.testing.assert_allclose(picture[63, 63], (-1, -1, 1))


def test_codec_is_the_orthogonal_projection_on_its_components() -> None:
    generator = torch.Generator().manual_seed(0)
    basis = torch.randn(10, 48, generator=generator)
    patches = torch.randn(8, 16, 16, 10, generator=generator) @ basis
    pictures = torch.nn.functional.pixel_shuffle(patches.movedim(-1, 1), 4)
    # Ten directions fit in sixteen components, so nothing is lost; with 48 something is.
    codec = PatchCodec.fit(pictures + 1e-4 * torch.randn(pictures.shape, generator=generator))
    latents = codec.encode(pictures)
    assert latents.shape == (8, 16, 16, 16)
    assert latents.square().mean().item() == pytest.approx(1, abs=0.05)
    torch.testing.assert_close(codec.decode(latents), pictures, atol=1e-2, rtol=0)


@pytest.mark.parametrize("count", [0, 1, 256])
def test_one_counted_token_equals_that_many_zero_tokens(count: int) -> None:
    torch.manual_seed(0)
    transformer = build_transformer()
    for parameter in transformer.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    text, pooled, latents = torch.randn(2, TEXT_TOKENS, 192), torch.randn(2, 192), torch.randn(2, 16, 16, 16)
    timestep = torch.tensor([900.0, 100.0])
    with torch.no_grad():
        transformer.set_attn_processor(JointAttnProcessor2_0())
        repeated = torch.cat([text, torch.zeros(2, count, 192)], dim=1)
        expected = transformer(latents, repeated, pooled, timestep).sample
        transformer.set_attn_processor(CountedTextAttention())
        counted = torch.cat([text, torch.zeros(2, 1, 192)], dim=1)
        mask = zero_token_mask(torch.full((2,), count))
        found = transformer(latents, counted, pooled, timestep, joint_attention_kwargs={"attention_mask": mask}).sample
    torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


def test_a_tarball_with_another_checksum_is_refused(tmp_path, monkeypatch) -> None:
    monkeypatch.setenv("STEER_CACHE", str(tmp_path))
    (tmp_path / "npm").mkdir()
    (tmp_path / "npm" / "some-icons-1.0.0.tgz").write_bytes(b"something else")
    with pytest.raises(ValueError, match=r"delete the file"):
        fetch_package(IconPackage("@some/icons", "1.0.0", "sha512-AAAA", "MIT"))


def test_evaluation_prompts_are_fixed_and_show_every_concept() -> None:
    state = random.getstate()
    prompts = evaluation_prompts()
    assert random.getstate() == state
    assert prompts == evaluation_prompts() and len(prompts) == 200
    assert {prompt.concept for prompt in prompts} == set(concepts())
    assert isinstance(prompts[0], Prompt)


def test_frechet_distance_of_shifted_gaussians_is_the_squared_shift() -> None:
    features = np.random.default_rng(0).standard_normal((4000, 4))
    assert frechet_distance(features, features) == pytest.approx(0, abs=1e-8)
    assert frechet_distance(features, features + 2) == pytest.approx(16, rel=1e-6)
