"""Tiny random language models of the real classes, and prompts for them."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from tiny import VOCABULARY
from transformers import (
    Gemma2Config,
    Gemma2ForCausalLM,
    Gemma3ForCausalLM,
    Gemma3TextConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
    Qwen3Config,
    Qwen3ForCausalLM,
    SmolLM3Config,
    SmolLM3ForCausalLM,
)

SMALL = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 128,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
MIXED = {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
MODELS: dict[str, Callable[[], torch.nn.Module]] = {
    "llama": lambda: LlamaForCausalLM(LlamaConfig(**SMALL)),
    "mistral": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=None)),
    "mistral_window": lambda: MistralForCausalLM(MistralConfig(**SMALL, sliding_window=5)),
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**SMALL, use_sliding_window=True, **MIXED)),
    "qwen3": lambda: Qwen3ForCausalLM(Qwen3Config(**SMALL)),
    "gemma2": lambda: Gemma2ForCausalLM(Gemma2Config(**SMALL, query_pre_attn_scalar=8, **MIXED)),
    "gemma3": lambda: Gemma3ForCausalLM(Gemma3TextConfig(**SMALL, query_pre_attn_scalar=8, **MIXED)),
    "smollm3": lambda: SmolLM3ForCausalLM(SmolLM3Config(**SMALL)),
}
PADDING = 3
NEW = 6


def inputs(side: str = "left", batch: int = 2, tokens: int = 11) -> dict[str, Any]:
    """Ids, the last row of which is padded."""
    ids = torch.randint(3, VOCABULARY, (batch, tokens), generator=torch.Generator().manual_seed(1))
    mask = torch.ones_like(ids)
    padded = slice(0, PADDING) if side == "left" else slice(tokens - PADDING, tokens)
    mask[-1, padded] = 0
    return {"input_ids": ids * mask, "attention_mask": mask}


def greedy(model: Any, **options: Any) -> torch.Tensor:
    given = {**inputs(), "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False, "num_beams": 1}
    return model.generate(**{**given, **options})
