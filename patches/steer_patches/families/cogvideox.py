"""CogVideoX: joint attention over [text, video]; latents come as (B, T, C, H, W)."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

COGVIDEOX = register(
    Family(
        name="CogVideoX",
        models=("CogVideoXTransformer3DModel",),
        kinds={"*.attn1": "joint"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("hidden_states", "encoder_hidden_states"),
                tokens="hidden_states",
                tables={"image_rotary_emb": ("S D",), "attention_kwargs.attention_mask": ()},
            ),
        ),
        grid=patched(frames=1),
        video=True,
        text_first=True,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.15"}, UNTUNED),
            "ReTtention": Preset(
                {"keep": 0.03125, "ramp": 0.04, "period": 5, "steps": "0.3:"},
                "arXiv 2505.22918 and its code for CogVideoX-2b, 15 of 50 steps dense",
            ),
        },
    )
)
