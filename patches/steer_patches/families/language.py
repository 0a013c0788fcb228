"""Language models: decoders whose attention goes through transformers' attention interface."""

from collections.abc import Mapping

from steer_patches.family import Family, Preset, Stage, register

KINDS = {"*layers.*.self_attn": "causal"}
LAYERS = (Stage("model.layers"), Stage("layers"))  # of the causal model, and of the bare one


def _language(name: str, *models: str, caps: bool = False, presets: Mapping[str, Preset] | None = None) -> Family:
    return register(Family(name, models, KINDS, LAYERS, cfg="none", caps_scores=caps, presets=presets or {}))


LLAMA = _language("Llama, SmolLM2", "LlamaForCausalLM", "LlamaModel")
MISTRAL = _language("Mistral", "MistralForCausalLM", "MistralModel")
QWEN = _language("Qwen2 / 2.5 / 3", "Qwen2ForCausalLM", "Qwen2Model", "Qwen3ForCausalLM", "Qwen3Model")
GEMMA2 = _language(
    "Gemma 2",
    "Gemma2ForCausalLM",
    "Gemma2Model",
    caps=True,
    presets={"StreamingLLM": Preset({"positions": "original"}, "the parts of capped attention cannot be merged")},
)
GEMMA3 = _language("Gemma 3", "Gemma3ForCausalLM", "Gemma3TextModel")
SMOLLM3 = _language("SmolLM3", "SmolLM3ForCausalLM", "SmolLM3Model")
