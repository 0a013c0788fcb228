"""`emoji-vlm`: a LLaVA over SmolLM2-135M-Instruct that answers questions about drawn scenes.

What is trained here, and shipped, is the vision tower, the projector and a low-rank change of the language model.
"""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerBase,
    SiglipImageProcessorPil,
    SiglipVisionConfig,
    SiglipVisionModel,
)
from transformers.models.llava.modeling_llava import LlavaMultiModalProjector

from steer_demos.models import smollm2
from steer_demos.scenes import (
    CANVAS,
    EVALUATION_SEED,
    NAMES,
    PATCH,
    Question,
    Scene,
    draw_scene,
    training_questions,
)
from steer_demos.training import Budget, best_device, fit, load_checkpoint

WEIGHTS = Path(__file__).parent.parent / "weights" / "emoji-vlm"
MINUTES = 98.0
BATCH_SIZE = 2  # packed scenes a step of the language stage
VISION_SHARE = 0.2  # of the budget
VISION_BATCH_SIZE = 64
VISION_WIDTH = 160
PATCHES = (CANVAS // PATCH) ** 2
RANK = 4
RANK_GAIN = 3.0
ADAPTED = ("q_proj", "k_proj", "v_proj", "o_proj")
PACKED_TOKENS = 208
IMAGE_TOKEN = "<image>"
TOWER = "vision_tower"
ADAPTER = "adapter.safetensors"
IGNORED = -100
LANGUAGE_RATE = 1e-3

# SmolLM2's ChatML without its default system message, which would be a seventh of every training sequence.
CHAT_TEMPLATE = """\
{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' }}\
{% if message['content'] is string %}{{ message['content'] }}{% else %}\
{% for part in message['content'] %}{{ '<image>' if part['type'] == 'image' else part['text'] }}{% endfor %}\
{% endif %}{{ '<|im_end|>\n' }}{% endfor %}\
{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def build_tower() -> SiglipVisionModel:
    """A SigLIP vision tower of width 160 and four layers over 6 x 6 patches, without the pooling head."""
    return SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=VISION_WIDTH,
            intermediate_size=4 * VISION_WIDTH,
            num_hidden_layers=4,
            num_attention_heads=5,
            image_size=CANVAS,
            patch_size=PATCH,
            vision_use_head=False,
        )
    )


def prompt(processor: LlavaProcessor, question: str) -> str:
    """The conversation in which a question about one picture is asked, up to where the answer begins."""
    content = [{"type": "image"}, {"type": "text", "text": question}]
    return processor.apply_chat_template([{"role": "user", "content": content}], add_generation_prompt=True)


def build_config(vision: SiglipVisionConfig, text: LlamaConfig) -> LlavaConfig:
    """The joint configuration; the image token is the last of the language model's vocabulary."""
    return LlavaConfig(
        vision_config=vision,
        text_config=text,
        image_token_index=text.vocab_size - 1,
        image_seq_length=PATCHES,
        vision_feature_select_strategy="full",
        vision_feature_layer=-1,
        tie_word_embeddings=True,
    )


def build_projector(tower: SiglipVisionModel, language_model: LlamaForCausalLM) -> LlavaMultiModalProjector:
    """LLaVA's two layers between the widths of both models."""
    return LlavaMultiModalProjector(build_config(tower.config, language_model.config))


def build_processor(tokenizer: PreTrainedTokenizerBase) -> LlavaProcessor:
    """Pictures of any size are stretched to 96 x 96 and scaled to [-1, 1]; `<image>` becomes 36 tokens.

    Args:
        tokenizer: SmolLM2's, without the image token; it is added here.
    """
    tokenizer.add_special_tokens({"additional_special_tokens": [IMAGE_TOKEN]})
    tokenizer.padding_side = "left"
    return LlavaProcessor(
        image_processor=SiglipImageProcessorPil(
            size={"height": CANVAS, "width": CANVAS}, image_mean=[0.5] * 3, image_std=[0.5] * 3
        ),
        tokenizer=tokenizer,
        patch_size=PATCH,
        vision_feature_select_strategy="full",
        image_token=IMAGE_TOKEN,
        chat_template=CHAT_TEMPLATE,
    )


def to_pixels(pictures: Sequence[np.ndarray]) -> Tensor:
    """Pictures (96, 96, 3) uint8 -> (B, 3, 96, 96) in [-1, 1], what the processor makes of them."""
    return torch.from_numpy(np.stack(pictures)).movedim(-1, 1).float() / 127.5 - 1


def load(
    device: str | torch.device | None = None, dtype: torch.dtype | None = None, weights: Path = WEIGHTS
) -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    """The model, in evaluation mode, assembled from `weights` and SmolLM2, and its processor; without the network.

    Args:
        device: by default `cuda` where there is one, else `cpu`.
        dtype: by default bfloat16 on CUDA and float32 elsewhere.
        weights: a folder that `save` wrote.

    Raises:
        ImportError: SmolLM2 is not installed; the message says how to.
        FileNotFoundError: `weights` holds no such model.
    """
    device = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = dtype or (torch.bfloat16 if device.type == "cuda" else torch.float32)
    if not (weights / ADAPTER).exists():
        raise FileNotFoundError(f"no {ADAPTER} in {weights}: train first, `steer train emoji-vlm`")
    language_model, processor = load_language_model()
    tower = SiglipVisionModel.from_pretrained(weights / TOWER, dtype=torch.float32, local_files_only=True)
    projector = build_projector(tower, language_model)
    tensors = load_file(weights / ADAPTER)
    projector.load_state_dict(_part(tensors, "projector."))
    merge_low_rank(language_model, _part(tensors, "low_rank."))
    return assemble(language_model, tower, projector).to(device, dtype).eval(), processor


def load_language_model() -> tuple[LlamaForCausalLM, LlavaProcessor]:
    """SmolLM2 in float32 on the CPU, and the processor over its tokenizer."""
    source = smollm2.folder()
    language_model = AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, local_files_only=True)
    return language_model, build_processor(AutoTokenizer.from_pretrained(source, local_files_only=True))


def _part(tensors: dict[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def train(folder: Path, budget: Budget, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train the vision stage, then the language stage; continues from the checkpoints in `folder`."""
    language_model, processor = load_language_model()
    vision = train_vision(folder / "vision", budget.part(VISION_SHARE), language_model, processor, seed)
    part = budget.part(1 - VISION_SHARE)
    train_language(folder / "language", part, language_model, processor, vision, batch_size, seed)


def save(folder: Path, output: Path) -> None:
    """Write the averaged weights of the checkpoints in `folder` as bfloat16: a tower's folder and one file."""
    seen = _checkpoint(folder / "vision")["average"]
    answered = _checkpoint(folder / "language")["average"]
    tower = build_tower()
    tower.load_state_dict(_part(seen, "tower."))
    tower.to(torch.bfloat16).save_pretrained(output / TOWER)
    tensors = {}
    for name, value in answered.items():
        if ".multi_modal_projector." in name:
            tensors["projector." + name.partition(".multi_modal_projector.")[2]] = value
        else:
            _, _, number, _, projection, factor, _ = name.rsplit(".", 6)
            scaled = RANK_GAIN * value if factor == "up" else value
            tensors[f"low_rank.{number}.{projection}.{factor}"] = scaled
    tensors = {name: value.to(torch.bfloat16).contiguous() for name, value in tensors.items()}
    save_file(tensors, output / ADAPTER, metadata={"format": "pt"})


def _checkpoint(folder: Path) -> dict[str, Any]:
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder}: train first, `steer train emoji-vlm`")
    return state


# The vision stage: what each patch shows, and the words for it, without the language model.


def patch_names(scene: Scene) -> np.ndarray:
    """What each patch shows: (36,) int64 indices of `NAMES`, the last of them + 1 for the background.

    A patch belongs to the thing that covers most of it, if that is a fifth or more, and always to one whose centre it
    holds.
    """
    edges = np.arange(0, CANVAS, PATCH)
    covered = np.full(PATCHES, PATCH * PATCH / 5)
    names = np.full(PATCHES, len(NAMES))
    for thing in scene.things:
        left, top, right, bottom = thing.box
        across = np.clip(np.minimum(right, edges + PATCH) - np.maximum(left, edges), 0, None)
        down = np.clip(np.minimum(bottom, edges + PATCH) - np.maximum(top, edges), 0, None)
        area = np.outer(down, across).ravel()
        names[area > covered] = NAMES.index(thing.name)
        covered = np.maximum(covered, area)
    for thing in scene.things:
        names[thing.patch] = NAMES.index(thing.name)
    return names


def patch_centres(scene: Scene) -> np.ndarray:
    """Which patches hold the centre of a thing, one a thing: (36,) float32 of 0 and 1."""
    centres = np.zeros(PATCHES, np.float32)
    centres[[thing.patch for thing in scene.things]] = 1
    return centres


def word_targets(embedding: Tensor, tokenizer: PreTrainedTokenizerBase) -> Tensor:
    """What the image token of a patch should be close to, made of the input embeddings of words.

    A patch that holds a centre: the words of the name and, fainter, of the corner. Another patch of a thing: the words
    of the name, fainter. The background: the mean of all embeddings.

    Args:
        embedding: (vocabulary, D).

    Returns:
        (names + 1, 2, patches, D); the second index says whether the patch holds a centre.
    """
    mean = embedding.mean(0)

    def meaning(text: str) -> Tensor:
        ids = tokenizer(" " + text, add_special_tokens=False).input_ids
        # Word embeddings are nearly orthogonal around their mean: this sum is about as long as one of them.
        return (embedding[ids] - mean).sum(0) / len(ids) ** 0.5

    names = torch.stack([*map(meaning, NAMES), torch.zeros_like(mean)])
    side = CANVAS // PATCH
    corners = torch.stack(
        [
            meaning("top" if row < side / 2 else "bottom") + meaning("left" if column < side / 2 else "right")
            for row in range(side)
            for column in range(side)
        ]
    )
    targets = names[:, None, None].repeat(1, 2, PATCHES, 1)
    targets[:, 0] *= 0.4
    targets[:-1, 1] += 0.4 * corners
    return targets + mean


class VisionPretraining(nn.Module):
    """Tower and projector, and two heads that only this stage needs."""

    def __init__(self, tower: SiglipVisionModel, projector: LlavaMultiModalProjector, targets: Tensor) -> None:
        super().__init__()
        self.tower = tower
        self.projector = projector
        self.names = nn.Linear(VISION_WIDTH, len(NAMES) + 1)
        self.centres = nn.Linear(VISION_WIDTH, 1)
        self.targets: Tensor
        self.register_buffer("targets", targets, persistent=False)

    def loss(self, pixels: Tensor, names: Tensor, centres: Tensor) -> Tensor:
        """Cross-entropies of what each patch shows and whether it holds a centre, and the distance to its words.

        Args:
            pixels: (B, 3, 96, 96) in [-1, 1].
            names, centres: (B, 36), see `patch_names` and `patch_centres`.
        """
        features = self.tower(pixels, output_hidden_states=True).hidden_states[-1]
        weights = 1 + (names < len(NAMES)) + 4 * centres  # most patches are background
        weights = weights / weights.mean()
        name_loss = F.cross_entropy(self.names(features).movedim(-1, 1), names, reduction="none")
        centre_loss = F.binary_cross_entropy_with_logits(self.centres(features)[..., 0], centres, reduction="none")
        targets = self.targets[names, centres.long(), torch.arange(PATCHES, device=names.device)]
        distance = (self.projector(features) - targets).square().sum(-1)
        return (weights * (name_loss + centre_loss + distance / 4)).mean()


def train_vision(
    folder: Path, budget: Budget, language_model: LlamaForCausalLM, processor: LlavaProcessor, seed: int
) -> VisionPretraining:
    """Train tower and projector on what the patches show; continues from the checkpoint in `folder`.

    Returns:
        The model with its averaged weights.
    """
    torch.manual_seed(seed)
    tower = build_tower()
    projector = build_projector(tower, language_model)
    targets = word_targets(language_model.get_input_embeddings().weight.detach(), processor.tokenizer)
    device = best_device()
    model = VisionPretraining(tower, projector, targets).to(device)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        scenes = [draw_scene(number) for number in draw_seeds(size, generator)]
        names = torch.from_numpy(np.stack([patch_names(scene) for scene in scenes]))
        centres = torch.from_numpy(np.stack([patch_centres(scene) for scene in scenes]))
        return to_pixels([scene.pixels for scene in scenes]).to(device), names.to(device), centres.to(device)

    fit(model, draw, model.loss, folder, budget, batch_size=VISION_BATCH_SIZE, seed=seed, label="vision")
    model.load_state_dict(_checkpoint(folder)["average"])
    return model


def draw_seeds(size: int, generator: torch.Generator) -> list[int]:
    """Seeds of training scenes."""
    return torch.randint(EVALUATION_SEED, (size,), generator=generator, device=generator.device).tolist()


# The language stage: answers, through the frozen language model and its low-rank change.


class LowRank(nn.Module):
    """A frozen linear layer plus a trained product of two thin ones, which starts at zero (LoRA, Hu et al. 2021)."""

    def __init__(self, base: nn.Linear, rank: int = RANK, gain: float = RANK_GAIN) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.gain = gain
        self.down = nn.Linear(base.in_features, rank, bias=False)
        self.up = nn.Linear(rank, base.out_features, bias=False)
        nn.init.normal_(self.down.weight, std=base.in_features**-0.5)
        nn.init.zeros_(self.up.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        """(..., inputs) -> (..., outputs)."""
        return self.base(hidden) + self.gain * self.up(self.down(hidden))


def add_low_rank(language_model: LlamaForCausalLM) -> dict[str, LowRank]:
    """Freeze the language model and put a `LowRank` around its attention projections: their names -> the modules."""
    language_model.requires_grad_(False)
    added = {}
    for number, layer in enumerate(language_model.model.layers):
        for name in ADAPTED:
            module = LowRank(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, module)
            added[f"{number}.{name}"] = module
    return added


def merge_low_rank(language_model: LlamaForCausalLM, factors: dict[str, Tensor]) -> None:
    """Add the saved products, `<layer>.<projection>.up` and `.down`, to the weights they belong to."""
    for name in {key.rpartition(".")[0] for key in factors}:
        number, projection = name.split(".")
        weight = getattr(language_model.model.layers[int(number)].self_attn, projection).weight
        with torch.no_grad():
            weight += (factors[f"{name}.up"].float() @ factors[f"{name}.down"].float()).to(weight)


def assemble(
    language_model: LlamaForCausalLM, tower: SiglipVisionModel, projector: LlavaMultiModalProjector
) -> LlavaForConditionalGeneration:
    """The LLaVA of these parts; they are taken over, not copied, and the language model gets the image token's row."""
    language_model.resize_token_embeddings(language_model.config.vocab_size + 1, mean_resizing=False)
    embedding = language_model.get_input_embeddings().weight
    with torch.no_grad():
        # The tied head scores this row too: the mean of all others is never the best.
        embedding[-1] = embedding[:-1].mean(0)
    with torch.device("meta"):
        model = LlavaForConditionalGeneration(build_config(tower.config, language_model.config))
    model.model.vision_tower = tower
    model.model.multi_modal_projector = projector
    model.model.language_model = language_model.model
    model.lm_head = language_model.lm_head
    model.generation_config = language_model.generation_config
    return model


class PackedQuestions:
    """Questions about one picture in one sequence, each of which sees the picture and itself.

    The model computes the same as with one conversation a question, and reads the picture only once: questions start
    at the same position, and the attention mask keeps them apart.
    """

    def __init__(self, processor: LlavaProcessor, length: int = PACKED_TOKENS) -> None:
        self.tokenizer = processor.tokenizer
        self.length = length
        self.image_token = processor.image_token_id
        self.start = self._ids("<|im_start|>user\n")
        self.turn = "<|im_end|>\n<|im_start|>assistant\n"
        self.end = self._ids("<|im_end|>")

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def pack(self, questions: Sequence[Question]) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """As many of the questions as fit, in their order.

        Returns:
            Five tensors (length,): token ids; their positions; the question each belongs to, from 1, 0 for the picture
            and -1 for padding; the token that is to follow, `IGNORED` where none is learnt; the weight of that token.
        """
        ids = self.start + [self.image_token] * PATCHES
        positions, owners = list(range(len(ids))), [0] * len(ids)
        following, weights = [IGNORED] * len(ids), [0.0] * len(ids)
        first = len(ids)
        for number, question in enumerate(questions, 1):
            asked, answer = self._ids(question.text + self.turn), self._ids(question.answer)
            count = len(asked) + len(answer)
            if len(ids) + count > self.length:
                continue
            ids += asked + answer
            positions += range(first, first + count)
            owners += [number] * count
            following += [IGNORED] * (len(asked) - 1) + answer + self.end
            # One token decides a short answer, twenty make a caption.
            weight = 1.0 if question.kind == "caption" else 3.0
            weights += [0.0] * (len(asked) - 1) + [weight] * (len(answer) + 1)
        padding = self.length - len(ids)
        return (
            torch.tensor(ids + self.end * padding),
            torch.tensor(positions + [0] * padding),
            torch.tensor(owners + [-1] * padding),
            torch.tensor(following + [IGNORED] * padding),
            torch.tensor(weights + [0.0] * padding),
        )


def packed_mask(owners: Tensor) -> Tensor:
    """Which tokens see which: (B, L) of `PackedQuestions.pack` -> (B, 1, L, L) bool, True where query sees key."""
    length = owners.shape[1]
    causal = torch.ones(length, length, dtype=torch.bool, device=owners.device).tril()
    seen = (owners[:, None, :] == 0) | (owners[:, None, :] == owners[:, :, None])
    return (seen & causal)[:, None]


class PackedAnswers(nn.Module):
    """The assembled model and its loss on packed questions."""

    def __init__(self, model: LlavaForConditionalGeneration) -> None:
        super().__init__()
        self.model = model

    def loss(
        self, pixels: Tensor, ids: Tensor, positions: Tensor, owners: Tensor, following: Tensor, weights: Tensor
    ) -> Tensor:
        """Weighted cross-entropy of the answers: pixels (B, 3, 96, 96), the others (B, L) of `PackedQuestions.pack`."""
        hidden = self.model.model(
            input_ids=ids,
            pixel_values=pixels,
            attention_mask=packed_mask(owners),
            position_ids=positions,
            use_cache=False,
        ).last_hidden_state
        learnt = following != IGNORED  # the head is half of the cost where it is not needed
        losses = F.cross_entropy(self.model.lm_head(hidden[learnt]), following[learnt], reduction="none")
        return (losses * weights[learnt]).sum() / weights[learnt].sum()


def train_language(
    folder: Path,
    budget: Budget,
    language_model: LlamaForCausalLM,
    processor: LlavaProcessor,
    vision: VisionPretraining,
    batch_size: int,
    seed: int,
) -> None:
    """Train projector and low-rank change on answers; continues from the checkpoint in `folder`.

    The tower stays as it is: batches of a few scenes are too noisy to improve on what it learnt from many.
    """
    torch.manual_seed(seed)
    device = best_device()
    model = assemble(language_model, vision.tower.requires_grad_(False), vision.projector)
    add_low_rank(language_model)
    for layer in language_model.model.layers:
        layer.compile()  # one graph for all thirty; the whole model as one graph takes minutes to compile
    answers = PackedAnswers(model).to(device)
    packed = PackedQuestions(processor)

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        scenes, rows = [], []
        for number in draw_seeds(size, generator):
            scene = draw_scene(number)
            scenes.append(scene)
            rows.append(packed.pack(training_questions(scene, np.random.default_rng(number))))
        columns = [torch.stack(column).to(device) for column in zip(*rows, strict=True)]
        return to_pixels([scene.pixels for scene in scenes]).to(device), *columns

    fit(
        answers,
        draw,
        answers.loss,
        folder,
        budget,
        batch_size=batch_size,
        seed=seed,
        learning_rate=LANGUAGE_RATE,
        compile_model=False,
        label="language",
    )
