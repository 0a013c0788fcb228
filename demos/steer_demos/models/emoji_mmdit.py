"""`emoji-mmdit`: a Stable Diffusion 3 pipeline, small enough to be trained on a CPU."""

import json
from dataclasses import asdict
from pathlib import Path

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel, StableDiffusion3Pipeline
from diffusers.models.attention_processor import Attention
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from steer_demos.batches import EmojiBatches, all_pictures
from steer_demos.codec import PatchCodec
from steer_demos.emoji import BACKGROUNDS, STYLES, caption, concepts
from steer_demos.models import emoji_autoencoder
from steer_demos.training import Budget, best_device, fit, load_checkpoint, save_pipeline

MINUTES = 110.0
BATCH_SIZE = 48
AUTOENCODER_SHARE = 0.25  # of the budget
TEXT_TOKENS = 16
TEXT_WIDTH = 96
PIPELINE_ZERO_TOKENS = 256


def all_captions() -> list[str]:
    """Every caption that training can show."""
    styles, backgrounds = [None, *STYLES], [None, *BACKGROUNDS]
    return [
        caption(concept, style, background, article)
        for concept in concepts()
        for style in styles
        for background in backgrounds
        for article in (False, True)
    ]


def build_tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer whose byte-pair merges were learnt on the captions; other text falls back to bytes."""
    backend = Tokenizer(models.BPE(end_of_word_suffix="</w>"))
    backend.normalizer = normalizers.Lowercase()
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(r"[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    final_letters = [letter + "</w>" for letter in alphabet]
    trainer = trainers.BpeTrainer(
        vocab_size=100_000,
        initial_alphabet=alphabet,
        # Ties between merges go by token number, and only special tokens are numbered alike in every process.
        special_tokens=final_letters,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    backend.train_from_iterator(all_captions(), trainer)
    learnt = json.loads(backend.to_str())["model"]
    merges = [tuple(pair) for pair in learnt["merges"]]
    tokens = [*alphabet, *final_letters, *("".join(pair) for pair in merges)]
    vocabulary = {token: index for index, token in enumerate(dict.fromkeys(tokens))}
    for special in ("<|startoftext|>", "<|endoftext|>"):
        vocabulary[special] = len(vocabulary)
    return CLIPTokenizer(vocab=vocabulary, merges=merges, model_max_length=TEXT_TOKENS)


def build_text_encoder(tokenizer: CLIPTokenizer, layers: int, activation: str) -> CLIPTextModelWithProjection:
    """A small CLIP text encoder of width 96."""
    return CLIPTextModelWithProjection(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=TEXT_WIDTH,
            intermediate_size=4 * TEXT_WIDTH,
            projection_dim=TEXT_WIDTH,
            num_hidden_layers=layers,
            num_attention_heads=3,
            max_position_embeddings=TEXT_TOKENS,
            hidden_act=activation,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )


def build_transformer() -> SD3Transformer2DModel:
    """Six joint blocks of width 192 over 64 picture tokens; modulation and output start at zero."""
    transformer = SD3Transformer2DModel(
        sample_size=16,
        patch_size=2,
        in_channels=16,
        out_channels=16,
        num_layers=6,
        num_attention_heads=6,
        attention_head_dim=32,
        caption_projection_dim=192,
        joint_attention_dim=2 * TEXT_WIDTH,
        pooled_projection_dim=2 * TEXT_WIDTH,
        pos_embed_max_size=8,
        qk_norm=None,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("norm1.linear", "norm1_context.linear", "norm_out.linear", "proj_out")):
                nn.init.zeros_(module.weight)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow without a timestep shift: 64 x 64 pictures need none."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=1.0)


class TextConditioning(nn.Module):
    """Both text encoders, joined the way `StableDiffusion3Pipeline.encode_prompt` joins them.

    Without a T5 encoder the pipeline appends `max_sequence_length` zero tokens (256 unless told otherwise). They are
    all alike and carry no position, so in every block they stay alike: training keeps one of them and adds the
    logarithm of their number to its attention scores, which is the same function at a quarter of the cost.
    """

    def __init__(self, first: CLIPTextModelWithProjection, second: CLIPTextModelWithProjection) -> None:
        super().__init__()
        self.first = first
        self.second = second

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        """Token ids (B, 16) -> joint tokens (B, 17, 192), the last one zero, and pooled projections (B, 192)."""
        first = self.first(ids, output_hidden_states=True)
        second = self.second(ids, output_hidden_states=True)
        tokens = torch.cat([first.hidden_states[-2], second.hidden_states[-2]], dim=-1)
        tokens = torch.cat([tokens, tokens.new_zeros(len(ids), 1, tokens.shape[-1])], dim=1)
        return tokens, torch.cat([first.text_embeds, second.text_embeds], dim=-1)


class CountedTextAttention:
    """Joint attention of SD3 with an additive mask, which diffusers' own processor does not take; for training only."""

    def __call__(
        self, attn: Attention, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Image tokens (B, S, C), text tokens (B, T, C) and a mask that broadcasts to (B, H, S + T, S + T)."""

        def project(to_image: nn.Module, to_text: nn.Module) -> Tensor:
            joint = torch.cat([to_image(hidden_states), to_text(encoder_hidden_states)], dim=1)
            return joint.unflatten(-1, (attn.heads, -1)).transpose(1, 2)

        out = nn.functional.scaled_dot_product_attention(
            project(attn.to_q, attn.add_q_proj),
            project(attn.to_k, attn.add_k_proj),
            project(attn.to_v, attn.add_v_proj),
            attn_mask=attention_mask,
        )
        out = out.transpose(1, 2).flatten(2)
        image, text = out.split([hidden_states.shape[1], encoder_hidden_states.shape[1]], dim=1)
        return attn.to_out[0](image), text if attn.context_pre_only else attn.to_add_out(text)


def zero_token_mask(counts: Tensor, image_tokens: int = 64) -> Tensor:
    """The additive mask (B, 1, 1, 81) that lets the last token stand for `counts` (B,) zero tokens."""
    mask = torch.zeros(len(counts), 1, 1, image_tokens + TEXT_TOKENS + 1, device=counts.device)
    mask[..., -1] = counts.float().log()[:, None, None]
    return mask


class TextToImage(nn.Module):
    """The trained parts, and their rectified-flow loss."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = TextConditioning(
            build_text_encoder(tokenizer, 2, "quick_gelu"), build_text_encoder(tokenizer, 3, "gelu")
        )
        self.transformer = build_transformer()

    def loss(self, latents: Tensor, ids: Tensor, noise: Tensor, sigmas: Tensor, zero_tokens: Tensor) -> Tensor:
        """Mean square error of the velocity `noise - latents` at `sigmas` (B,) in (0, 1]; see `zero_token_mask`."""
        tokens, pooled = self.text(ids)
        mixed = torch.lerp(latents, noise, sigmas[:, None, None, None])
        velocity = self.transformer(
            mixed,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=sigmas * 1000,
            joint_attention_kwargs={"attention_mask": zero_token_mask(zero_tokens)},
            return_dict=False,
        )[0]
        return (velocity - (noise - latents)).square().mean()


def draw_sigmas(size: int, generator: torch.Generator) -> Tensor:
    """Noise levels (size,): logit-normal, one in eight uniform so that both ends are seen."""
    device = generator.device
    normal = torch.randn(size, generator=generator, device=device).sigmoid()
    uniform = torch.rand(size, generator=generator, device=device)
    return torch.where(torch.rand(size, generator=generator, device=device) < 0.125, uniform, normal)


def saved_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that the checkpoint in `folder` was trained with; made and saved there when training begins."""
    path = folder / "tokenizer"
    if not path.exists():
        build_tokenizer().save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def train(folder: Path, budget: Budget, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train text encoders and transformer, then the autoencoder; continues from the checkpoints in `folder`."""
    device = best_device()
    torch.manual_seed(seed)
    pictures = all_pictures()
    state = load_checkpoint(folder)
    codec = PatchCodec(**state["constants"]) if state else PatchCodec.fit(pictures.flatten(0, 2))
    tokenizer = saved_tokenizer(folder)
    batches = EmojiBatches(pictures, codec.encode, tokenizer, device)
    model = TextToImage(tokenizer).to(device)
    # Counts the pipeline's zero tokens instead of repeating them.
    model.transformer.set_attn_processor(CountedTextAttention())

    def draw(size: int, generator: torch.Generator) -> tuple[Tensor, ...]:
        latents, ids = batches.draw(size, generator)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        # Half of the batch sees the pipeline's default, half a pipeline called with max_sequence_length=0.
        zero_tokens = torch.tensor([0, PIPELINE_ZERO_TOKENS], device=device).repeat(-(-size // 2))[:size]
        return latents, ids, noise, draw_sigmas(size, generator), zero_tokens

    main = budget.part(1 - AUTOENCODER_SHARE)
    fit(model, draw, model.loss, folder, main, batch_size=batch_size, seed=seed, constants=asdict(codec))
    emoji_autoencoder.train(folder / "autoencoder", budget.part(AUTOENCODER_SHARE), codec, seed=seed)


def save(folder: Path, output: Path) -> None:
    """Write the averaged weights of the checkpoints in `folder` as a bfloat16 pipeline folder."""
    state = load_checkpoint(folder)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder}: train first, `steer train emoji-mmdit`")
    tokenizer = saved_tokenizer(folder)
    model = TextToImage(tokenizer)
    model.load_state_dict(state["average"], strict=False)
    pipe = StableDiffusion3Pipeline(
        transformer=model.transformer,
        scheduler=build_scheduler(),
        vae=emoji_autoencoder.trained(folder / "autoencoder"),
        text_encoder=model.text.first,
        tokenizer=tokenizer,
        text_encoder_2=model.text.second,
        tokenizer_2=tokenizer,
        text_encoder_3=None,
        tokenizer_3=None,
    )
    save_pipeline(pipe, output)
