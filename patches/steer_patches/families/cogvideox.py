"""CogVideoX: joint attention over [text, video]; latents come as (B, T, C, H, W)."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

COGVIDEOX = register(
    Family(
        name="CogVideoX",
        models=("CogVideoXTransformer3DModel",),
        kinds={"*.attn1": "joint"},
        stages=(Stage("transformer_blocks", returns=("hidden_states", "encoder_hidden_states")),),
        grid=patched(frames=1),
        text_first=True,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
        },
    )
)
