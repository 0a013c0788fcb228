"""HunyuanVideo and HunyuanVideo 1.5: joint attention over [video, text]; the text refiner is a stage of its own."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

RETURNS = ("hidden_states", "encoder_hidden_states")
PRESETS = {
    "PAG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
    "SEG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
    "SLG": Preset({"layers": "transformer_blocks.10"}, UNTUNED),
}

HUNYUAN_VIDEO = register(
    Family(
        name="HunyuanVideo",
        models=("HunyuanVideoTransformer3DModel",),
        kinds={"context_embedder.*": "text", "*.attn": "joint"},
        stages=(
            Stage("context_embedder"),
            Stage("transformer_blocks", RETURNS),
            Stage("single_transformer_blocks", RETURNS),
        ),
        grid=patched(),
        cfg="sequential",
        presets=PRESETS,
    )
)

HUNYUAN_VIDEO_15 = register(
    Family(
        name="HunyuanVideo 1.5",
        models=("HunyuanVideo15Transformer3DModel",),
        kinds={"context_embedder.*": "text", "*.attn": "joint"},
        stages=(Stage("context_embedder"), Stage("transformer_blocks", RETURNS)),
        grid=patched(),
        cfg="sequential",
        presets=PRESETS,
    )
)
