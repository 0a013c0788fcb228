"""A tokenizer that is made on the spot, and a tiny language model for it."""

from __future__ import annotations

import functools
import random

from tiny import build
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from steer_demos.language_tasks import sentence

VOCABULARY = 700
CHAT = (
    "{% for message in messages %}<{{ message.role }}>\n{{ message.content }}<end>\n{% endfor %}"
    "{% if add_generation_prompt %}<assistant>\n{% endif %}"
)


@functools.cache
def tokenizer() -> PreTrainedTokenizerFast:
    """One token for most words of the templates, with a chat template and a token that a text may begin with."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    made.decoder = decoders.ByteLevel()
    draw = random.Random(0)
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<s>", "</s>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([sentence(draw) for _ in range(2000)], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>", eos_token="</s>", chat_template=CHAT)


def language_model() -> LlamaForCausalLM:
    """A tiny model with the vocabulary of `tokenizer`."""
    config = LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=4096,
        bos_token_id=None,
        eos_token_id=None,
        pad_token_id=0,
    )
    return build(lambda: LlamaForCausalLM(config))
