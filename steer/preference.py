"""Objectives that ask a CLIP model: how well a picture fits its prompt, and how much people would like it."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Self

import torch
import torch.nn.functional as F
from huggingface_hub import hf_hub_download
from PIL import Image
from safetensors.torch import load_file

CLIP_FRAMES = 8  # of a clip that are looked at, evenly spaced
HEAD_LAYERS = (0, 2, 4, 6, 7)  # the linear layers of the LAION predictor; dropout lies between, no activation


@dataclass(frozen=True)
class CLIPBased:
    """What the scorers share: pictures and prompts through a CLIP model. Weights are read at the first call.

    A call takes pictures (N, 3, H, W) or clips (N, T, 3, H, W) in [0, 1] and N prompts, and returns N scores (float32),
    higher is better. Of a clip at most eight frames are looked at, evenly spaced; its score is their mean. A picture is
    rounded to bytes first, and the processor resizes and crops it to the middle square.

    Args:
        model: folder or hub id of a `transformers.CLIPModel`. Code from the hub is never run.
        processor: folder or hub id of its `CLIPProcessor`; None = `model`.
        batch_size: pictures, or prompts, in one forward.
        device: where the model runs, None = where the pictures are.

    Raises:
        FileNotFoundError: at the first call, if weights or processor are not in a folder, and the hub cannot be asked.
        ValueError: weights that are not all of a CLIP model, prompts that are missing, or pictures of another shape.
    """

    model: str
    processor: str | None = None
    batch_size: int = 16
    device: str | None = None

    def __post_init__(self) -> None:
        if self.batch_size < 1:
            raise ValueError(f"batch_size={self.batch_size} must be at least 1")

    @classmethod
    def of(cls, text: str) -> Self:
        """The scorer with another folder or hub id, which brings its own processor: `clip:FOLDER`."""
        return cls(model=text, processor=None)

    @torch.no_grad()
    def __call__(self, pictures: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
        clips = as_clips(pictures)
        self._check_prompts(prompts, len(clips))
        count = clips.shape[1]
        shown = clips[:, torch.linspace(0, count - 1, min(count, CLIP_FRAMES)).round().long()]
        device = torch.device(self.device) if self.device is not None else pictures.device
        seen = self.embed_pictures(shown.flatten(0, 1), device).unflatten(0, shown.shape[:2])
        return self.score(seen, prompts).mean(1)

    def score(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        """Scores (N, frames) of unit embeddings (N, frames, D): their cosines with the prompts'."""
        return (seen * self.embed_prompts(prompts, seen.device)[:, None]).sum(-1)

    def embed_pictures(self, pictures: torch.Tensor, device: torch.device) -> torch.Tensor:
        """Pictures (N, 3, H, W) as unit vectors (N, D)."""
        model, processor = self._loaded
        model.to(device)
        bytes_ = pictures.clamp(0, 1).mul(255).round().byte().permute(0, 2, 3, 1).cpu().numpy()
        found = []
        for first in range(0, len(bytes_), self.batch_size):
            images = [Image.fromarray(picture) for picture in bytes_[first : first + self.batch_size]]
            pixels = processor.image_processor(images=images, return_tensors="pt")["pixel_values"]
            found.append(model.get_image_features(pixel_values=pixels.to(device)).pooler_output)
        return F.normalize(torch.cat(found), dim=-1)

    def embed_prompts(self, prompts: Sequence[str], device: torch.device) -> torch.Tensor:
        """N prompts as unit vectors (N, D); equal prompts are read once."""
        model, processor = self._loaded
        model.to(device)
        texts = list(dict.fromkeys(prompts))
        found = []
        for first in range(0, len(texts), self.batch_size):
            tokens = processor.tokenizer(
                texts[first : first + self.batch_size],
                padding=True,
                truncation=True,
                max_length=model.config.text_config.max_position_embeddings,
                return_tensors="pt",
            )
            arguments = {"input_ids": tokens["input_ids"], "attention_mask": tokens["attention_mask"]}
            found.append(model.get_text_features(**{k: v.to(device) for k, v in arguments.items()}).pooler_output)
        rows = [texts.index(prompt) for prompt in prompts]
        return F.normalize(torch.cat(found), dim=-1)[rows]

    @functools.cached_property
    def _loaded(self) -> tuple[Any, Any]:
        """The model, in float32, and its processor."""
        from transformers import CLIPModel, CLIPProcessor

        name, processor_name = type(self).__name__, self.processor or self.model
        with _at_hand(name, "model", self.model):
            model, facts = CLIPModel.from_pretrained(self.model, dtype=torch.float32, output_loading_info=True)
        if facts["missing_keys"]:  # transformers would go on with random numbers there
            raise ValueError(
                f"{name}: {self.model} is not a whole CLIP model: it lacks {len(facts['missing_keys'])} weights, e.g. "
                f"{min(facts['missing_keys'])}; give the folder or hub id of a transformers CLIPModel"
            )
        with _at_hand(name, "processor", processor_name):
            # Published scorers were made with PIL's resizing; torchvision's differs, and is not always installed.
            processor = CLIPProcessor.from_pretrained(processor_name, backend="pil")
        known, needed = len(processor.tokenizer), model.config.text_config.vocab_size
        if known != needed:  # without its files transformers makes an empty tokenizer
            raise ValueError(
                f"{name}: the tokenizer of {processor_name} knows {known} tokens, and {self.model} has {needed}; give "
                "the model's own processor as processor="
            )
        return model.eval(), processor

    def _check_prompts(self, prompts: Sequence[Any], count: int) -> None:
        if len(prompts) != count or not all(isinstance(prompt, str) for prompt in prompts):
            raise ValueError(
                f"{type(self).__name__} compares {count} pictures with a prompt each, and got {list(prompts)[:3]}; "
                'give data with a "prompt" of text'
            )


@dataclass(frozen=True)
class CLIPScore(CLIPBased):
    """100 times the cosine of picture and prompt: how well they fit.

    Source: Radford et al. 2021, arXiv 2103.00020; Hessel et al. 2021, arXiv 2104.08718, without their clipping at 0.
    """

    model: str = "openai/clip-vit-large-patch14"

    def score(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        return 100 * super().score(seen, prompts)


@dataclass(frozen=True)
class PickScore(CLIPBased):
    """The model's own scale (about 100) times the cosine: which picture of a prompt people would pick.

    Pictures of SD3 score about 20 (arXiv 2506.10978).

    Source: Kirstain et al. 2023, arXiv 2305.01569.
    """

    model: str = "yuvalkirstain/PickScore_v1"
    processor: str | None = "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"

    def score(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        model, _ = self._loaded
        return model.logit_scale.exp() * super().score(seen, prompts)


@dataclass(frozen=True)
class HPS(CLIPBased):
    """The cosine of picture and prompt in HPS v2, a CLIP ViT-H/14 trained on people's choices.

    Pictures of SD3 score 0.2 to 0.3 (arXiv 2506.10978). The authors publish weights for open_clip; the default
    is a conversion of them to a CLIPModel by a third party.

    Source: Wu et al. 2023, arXiv 2306.09341.
    """

    model: str = "adams-story/HPSv2-hf"
    processor: str | None = "openai/clip-vit-base-patch32"  # the same preprocessing for every size


@dataclass(frozen=True)
class Aesthetic(CLIPBased):
    """What people would give the picture from 1 to 10, whatever the prompt: LAION's improved aesthetic predictor.

    Pictures of SD3 score 5 to 6 (arXiv 2506.10978). Five linear layers, 768-1024-128-64-16-1 without activations,
    on the unit embedding of CLIP ViT-L/14.

    Args:
        head: weights of these layers, `layers.0.weight` and so on: a file, or OWNER/NAME/FILE on the hub. Read as
            safetensors or, with weights only, as a file of torch. Other weights in the file are passed over, so
            "shunk031/aesthetics-predictor-v2-sac-logos-ava1-l14-linearMSE/model.safetensors" works too.

    Source: Schuhmann 2022, github.com/christophschuhmann/improved-aesthetic-predictor (sac+logos+ava1-l14-linearMSE).
    """

    model: str = "openai/clip-vit-large-patch14"
    head: str = "trl-lib/ddpo-aesthetic-predictor/aesthetic-model.pth"

    @classmethod
    def of(cls, text: str) -> Self:
        """The scorer with another head: `aesthetic:FILE`."""
        return cls(head=text)

    def score(self, seen: torch.Tensor, prompts: Sequence[str]) -> torch.Tensor:
        for weight, bias in self._layers:
            seen = F.linear(seen, weight.to(seen), bias.to(seen))
        return seen[..., 0]

    @functools.cached_property
    def _layers(self) -> list[tuple[torch.Tensor, torch.Tensor]]:
        path = Path(self.head)
        if not path.is_file():
            owner, _, rest = self.head.partition("/")
            name, _, file = rest.partition("/")
            with _at_hand("Aesthetic", "head", self.head):
                if not file:
                    raise FileNotFoundError(f"there is no file {self.head}")
                path = Path(hf_hub_download(f"{owner}/{name}", file))
        if path.suffix == ".safetensors":
            weights = load_file(path)
        else:
            weights = torch.load(path, map_location="cpu", weights_only=True)
        weights = {key: value for key, value in weights.items() if key.startswith("layers.")}
        wanted = [f"layers.{number}.{part}" for number in HEAD_LAYERS for part in ("weight", "bias")]
        if sorted(weights) != sorted(wanted):
            raise ValueError(
                f"Aesthetic: {path} holds the layers {', '.join(weights) or 'none'}, and the linear predictor has "
                f"{', '.join(wanted)}"
            )
        return [(weights[f"layers.{i}.weight"].float(), weights[f"layers.{i}.bias"].float()) for i in HEAD_LAYERS]

    def _check_prompts(self, prompts: Sequence[Any], count: int) -> None:
        """Any will do."""


def as_clips(pictures: Any) -> torch.Tensor:
    """Pictures (N, 3, H, W) or clips (N, T, 3, H, W) as clips in float32; a picture is a clip of one frame.

    Raises:
        ValueError: anything else, e.g. the outputs of a bare model.
    """
    if not isinstance(pictures, torch.Tensor) or pictures.dim() not in (4, 5) or pictures.shape[-3] != 3:
        shape = tuple(pictures.shape) if isinstance(pictures, torch.Tensor) else type(pictures).__name__
        raise ValueError(
            f"this objective scores pictures (N, 3, H, W) or clips (N, T, 3, H, W) in [0, 1], and got {shape}; of a "
            "model that draws no pictures give a function of your own as objective"
        )
    return (pictures if pictures.dim() == 5 else pictures[:, None]).float()


@contextmanager
def _at_hand(scorer: str, field: str, name: str) -> Iterator[None]:
    try:
        yield
    except (OSError, ValueError) as error:
        on_hub = re.match(r"[\w-][\w.-]*/[\w.-]+", name)
        fetch = f"With network, `hf download {on_hub[0]}` fetches it; otherwise give" if on_hub else "Give"
        raise FileNotFoundError(
            f"{scorer}: {field}={name!r} is not at hand, neither as a path nor in the Hugging Face cache nor from the "
            f"hub ({str(error).splitlines()[0]}). {fetch} a path of your own: {scorer}({field}=PATH)"
        ) from error
