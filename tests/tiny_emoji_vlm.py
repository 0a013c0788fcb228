"""The parts of emoji-vlm over a tiny language model, and scenes that need no renderer."""

from __future__ import annotations

import numpy as np
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    LlamaConfig,
    LlamaForCausalLM,
    LlavaForConditionalGeneration,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from steer_demos.models.emoji_vlm import assemble, build_processor, build_projector, build_tower
from steer_demos.scenes import Scene, Thing


def tiny_processor() -> LlavaProcessor:
    """The real processor over a tokenizer of bytes with SmolLM2's special tokens."""
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    backend = Tokenizer(models.BPE({token: index for index, token in enumerate([*special, *letters])}, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<|im_end|>", eos_token="<|im_end|>")
    tokenizer.add_special_tokens({"additional_special_tokens": special})
    return build_processor(tokenizer)


def tiny_language_model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=259,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    # The default scale leaves attention and differences between answers next to nothing to see.
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


def tiny_model() -> LlavaForConditionalGeneration:
    language_model, tower = tiny_language_model(), build_tower()
    return assemble(language_model, tower, build_projector(tower, language_model)).eval()


def picture(seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (96, 96, 3), dtype=np.uint8)


def shapes(*names: str) -> Scene:
    """Squares, circles, ... in a row, drawn as plain boxes; no emoji, so that no renderer is needed."""
    return Scene(tuple(Thing(name, (32 * i, 8, 32 * i + 24, 32)) for i, name in enumerate(names)), picture())
