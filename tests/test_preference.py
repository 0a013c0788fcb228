"""Scorers that ask a CLIP model: tiny real ones from a folder, against the formula written out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from tiny_pipelines import tokenizer
from transformers import CLIPConfig, CLIPImageProcessorPil, CLIPModel, CLIPProcessor

from steer.preference import HPS, Aesthetic, CLIPBased, CLIPScore, PickScore
from steer_patches.sites import find_sites

WIDTH, SIDE = 16, 16
PROMPTS = ["a red fox", "snow on a hill, and a good deal more than fits into the tokens", "a red fox", "x"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random CLIP and its processor, whose pictures are 16 x 16."""
    made, letters = tmp_path_factory.mktemp("clip"), tokenizer()
    sizes = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    ids = {f"{name}_token_id": getattr(letters, f"{name}_token_id") for name in ("bos", "eos", "pad")}
    config = CLIPConfig(
        text_config={**sizes, **ids, "vocab_size": len(letters), "max_position_embeddings": letters.model_max_length},
        vision_config={**sizes, "image_size": SIDE, "patch_size": 8},
        projection_dim=WIDTH,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(made)
    size = {"shortest_edge": SIDE}, {"height": SIDE, "width": SIDE}
    CLIPProcessor(CLIPImageProcessorPil(size=size[0], crop_size=size[1]), letters).save_pretrained(made)
    return made


def drawn(count: int = 4, height: int = 24, width: int = 30) -> torch.Tensor:
    return torch.rand(count, 3, height, width, generator=torch.Generator().manual_seed(1))


@torch.no_grad()
def embeddings(folder: Path, pictures: torch.Tensor) -> tuple[CLIPModel, torch.Tensor, torch.Tensor]:
    """In float64, from the processor called on images and one prompt after the other."""
    model, processor = CLIPModel.from_pretrained(folder).double().eval(), CLIPProcessor.from_pretrained(folder)
    seen, read = [], []
    for picture, prompt in zip(pictures, PROMPTS, strict=False):
        image = Image.fromarray((picture * 255).round().to(torch.uint8).permute(1, 2, 0).numpy())
        inputs = processor(text=[prompt], images=[image], truncation=True, max_length=24, return_tensors="pt")
        patches = model.vision_model(inputs["pixel_values"].double()).pooler_output
        seen.append(model.visual_projection(patches)[0])
        hidden = model.text_model(inputs["input_ids"]).last_hidden_state[0]
        end = inputs["input_ids"][0].tolist().index(processor.tokenizer.eos_token_id)
        read.append(model.text_projection(hidden[end]))
    return model, torch.stack(seen), torch.stack(read)


def close(scores: torch.Tensor, wanted: torch.Tensor, scale: float = 1.0) -> bool:
    """To what float32 makes of a cosine: the models are two layers deep."""
    return scores.shape == wanted.shape and torch.allclose(scores.double(), wanted, rtol=0, atol=2e-6 * scale)


@pytest.mark.parametrize("batch_size", [1, 3, 16])
def test_scores_are_the_formula(folder: Path, batch_size: int) -> None:
    pictures = drawn()
    model, seen, read = embeddings(folder, pictures)
    cosine = (seen * read).sum(1) / (seen.norm(dim=1) * read.norm(dim=1))
    given: dict[str, Any] = {"model": str(folder), "processor": None, "batch_size": batch_size}
    assert cosine.std() > 0.01
    assert close(CLIPScore(**given)(pictures, PROMPTS), 100 * cosine, 100)
    assert close(HPS(**given)(pictures, PROMPTS), cosine)
    scale = math.exp(model.logit_scale.item())
    assert close(PickScore(**given)(pictures, PROMPTS), scale * cosine, scale)


@pytest.mark.parametrize("suffix", ["pth", "safetensors"])
def test_aesthetic_is_five_linear_layers_on_unit_embeddings(folder: Path, tmp_path: Path, suffix: str) -> None:
    torch.manual_seed(2)
    layers = {0: (24, WIDTH), 2: (12, 24), 4: (8, 12), 6: (4, 8), 7: (1, 4)}
    weights = {f"layers.{i}.weight": torch.randn(shape) for i, shape in layers.items()}
    weights |= {f"layers.{i}.bias": torch.randn(shape[0]) for i, shape in layers.items()}
    weights["vision_model.embeddings.position_ids"] = torch.arange(3)  # of the same model with its picture encoder
    file = tmp_path / f"head.{suffix}"
    if suffix == "pth":
        torch.save(weights, file)
    else:
        save_file(weights, file)
    _, seen, _ = embeddings(folder, drawn())
    wanted = seen / seen.norm(dim=1, keepdim=True)
    for i in layers:
        wanted = wanted @ weights[f"layers.{i}.weight"].double().T + weights[f"layers.{i}.bias"].double()
    scores = Aesthetic(model=str(folder), head=str(file))(drawn(), [None] * 4)
    assert close(scores, wanted[:, 0], scale=float(wanted.abs().max()) * 10)

    torch.save({f"layers.{i}.weight": torch.zeros(1) for i in (0, 3, 6, 9, 11)}, tmp_path / "relu.pth")
    with pytest.raises(
        ValueError, match=r"holds the layers layers.0.weight, layers.3.weight.*predictor has layers.0.w"
    ):
        Aesthetic(model=str(folder), head=str(tmp_path / "relu.pth"))(drawn(), [])


def test_pictures_reach_the_model_as_the_processor_takes_images(folder: Path) -> None:
    scorer, pictures = CLIPScore(str(folder)), drawn()
    images = [Image.fromarray((p * 255).round().to(torch.uint8).permute(1, 2, 0).numpy()) for p in pictures]
    pixels = CLIPProcessor.from_pretrained(folder)(images=images, return_tensors="pt")["pixel_values"]
    seen: list[torch.Tensor] = []
    model, _ = scorer._loaded
    hook = model.vision_model.register_forward_pre_hook(
        lambda _, args, kwargs: seen.append(kwargs["pixel_values"]), with_kwargs=True
    )
    scorer(pictures, PROMPTS)
    hook.remove()
    assert torch.equal(torch.cat(seen), pixels)
    beyond = pictures.clone()
    beyond[:, :, 9:15, 9:15], pictures[:, :, 9:15, 9:15] = 1.3, 1.0
    assert torch.equal(scorer(beyond, PROMPTS), scorer(pictures, PROMPTS))


def test_a_clip_has_the_mean_of_at_most_eight_frames(folder: Path) -> None:
    scorer = CLIPScore(str(folder))
    frames = drawn(2 * 15).unflatten(0, (2, 15))
    wanted = torch.stack([scorer(frames[:, t], PROMPTS[:2]) for t in range(0, 15, 2)]).mean(0)
    assert torch.allclose(scorer(frames, PROMPTS[:2]), wanted, atol=2e-4)
    two = torch.stack([scorer(frames[:, t], PROMPTS[:2]) for t in range(2)]).mean(0)
    assert torch.allclose(scorer(frames[:, :2], PROMPTS[:2]), two, atol=2e-4)


def test_the_model_is_read_at_the_first_call_once_and_left_as_it_is(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads = []
    read = CLIPModel.from_pretrained
    monkeypatch.setattr(CLIPModel, "from_pretrained", lambda *a, **k: loads.append(k) or read(*a, **k))
    scorer = CLIPScore(str(folder))
    assert not loads
    first = scorer(drawn(), PROMPTS)
    assert torch.equal(scorer(drawn(), PROMPTS), first) and len(loads) == 1
    assert not first.requires_grad
    model, _ = scorer._loaded
    assert not model.training and model.dtype == torch.float32 and find_sites(model) is not None
    assert "trust_remote_code" not in loads[0]
    assert scorer == CLIPScore(str(folder))


@pytest.mark.parametrize("scorer", [CLIPScore(), PickScore(), HPS()], ids=lambda each: type(each).__name__)
def test_what_is_not_at_hand_is_named(scorer: CLIPBased, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    offline(monkeypatch, tmp_path)
    name, words = type(scorer).__name__, f"hf download {scorer.model}"
    with pytest.raises(FileNotFoundError, match=rf"{name}: model='{scorer.model}' is not at hand.*{words}.*model=PATH"):
        scorer(drawn(), PROMPTS)


def test_a_processor_a_head_and_a_folder_that_are_missing_are_named(
    folder: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    offline(monkeypatch, tmp_path)
    with pytest.raises(
        FileNotFoundError, match=r"PickScore: processor='laion.*hf download laion/CLIP-ViT-H-14-laion2B"
    ):
        PickScore(model=str(folder))(drawn(), PROMPTS)
    with pytest.raises(
        FileNotFoundError, match=r"head='trl-lib/.*download trl-lib/ddpo-aesthetic-predictor` .*head=PATH"
    ):
        Aesthetic(model=str(folder))(drawn(), PROMPTS)
    for head in ("/no/such/head.pth", "./head.pth", "head.pth", "../a/b/head.pth"):
        with pytest.raises(FileNotFoundError, match=r"Aesthetic: head=.*Give a path of your own"):
            Aesthetic(model=str(folder), head=head)(drawn(), PROMPTS)
    with pytest.raises(FileNotFoundError, match=r"model='/no/such'.*Give a path"):
        CLIPScore("/no/such")(drawn(), PROMPTS)


def offline(monkeypatch: pytest.MonkeyPatch, cache: Path) -> None:
    """As on a machine without network and with an empty cache."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(cache))


def test_half_a_model_and_a_processor_without_words_are_refused(folder: Path, tmp_path: Path) -> None:
    """transformers would go on: with random weights, and with a tokenizer to which all words are one."""
    pictures_only = tmp_path / "vision"
    shutil.copytree(folder, pictures_only)
    whole = CLIPModel.from_pretrained(folder)
    half = {name: value for name, value in whole.state_dict().items() if not name.startswith(("text", "logit"))}
    save_file(half, pictures_only / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match=r"not a whole CLIP model: it lacks \d+ weights, e.g. logit_scale"):
        CLIPScore(str(pictures_only))(drawn(), PROMPTS)

    wordless = tmp_path / "wordless"
    wordless.mkdir()
    shutil.copy(folder / "processor_config.json", wordless)
    with pytest.raises(FileNotFoundError, match=r"CLIPScore: processor=.*tokenizer"):
        CLIPScore(str(folder), processor=str(wordless))(drawn(), PROMPTS)
    shutil.copy(folder / "config.json", wordless)
    with pytest.raises(ValueError, match="wordless knows 2 tokens"):
        CLIPScore(str(folder), processor=str(wordless))(drawn(), PROMPTS)


def test_prompts_and_pictures_must_fit(folder: Path) -> None:
    scorer = CLIPScore(str(folder))
    with pytest.raises(ValueError, match=r"compares 4 pictures with a prompt each, and got \['a'\]"):
        scorer(drawn(), ["a"])
    with pytest.raises(ValueError, match=r'and got \[None, None, None\]; give data with a "prompt"'):
        scorer(drawn(), [None] * 4)
    with pytest.raises(ValueError, match="scores pictures"):
        scorer([drawn()], PROMPTS[:1])  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="batch_size=0"):
        CLIPScore(batch_size=0)
