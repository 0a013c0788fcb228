"""Language models: decoders whose attention goes through transformers' attention interface."""

from steer_patches.family import Family, Stage, register

# The layers of the causal model, and those of the bare one.
LAYERS = (Stage("model.layers"), Stage("layers"))


def _language(name: str, *models: str) -> Family:
    return register(
        Family(name=name, models=models, kinds={"*layers.*.self_attn": "causal"}, stages=LAYERS, cfg="none")
    )


LLAMA = _language("Llama, SmolLM2", "LlamaForCausalLM", "LlamaModel")
MISTRAL = _language("Mistral", "MistralForCausalLM", "MistralModel")
QWEN = _language("Qwen2 / 2.5 / 3", "Qwen2ForCausalLM", "Qwen2Model", "Qwen3ForCausalLM", "Qwen3Model")
GEMMA = _language("Gemma 2 / 3", "Gemma2ForCausalLM", "Gemma2Model", "Gemma3ForCausalLM", "Gemma3TextModel")
SMOLLM3 = _language("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Model")
