"""The parts of `emoji-mmdit`: a Stable Diffusion 3 pipeline, small enough to be trained on a CPU."""

import json

import torch
from diffusers import AutoencoderTiny, FlowMatchEulerDiscreteScheduler, SD3Transformer2DModel
from diffusers.models.attention_processor import Attention
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer

from steer_demos.emoji import BACKGROUNDS, STYLES, caption, concepts

TEXT_TOKENS = 16
TEXT_WIDTH = 96
LATENT_SCALING = 2.0  # AutoencoderTiny squashes its latents at +-3, ours reach +-8


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


def build_autoencoder() -> AutoencoderTiny:
    """A convolutional autoencoder for 64 x 64 pictures and 16 x 16 latents of 16 channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(32, 32, 32),
        num_encoder_blocks=(0, 0, 1),
        num_decoder_blocks=(3, 1, 0),
        latent_channels=16,
        scaling_factor=LATENT_SCALING,
        shift_factor=0.0,
    )


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
