"""Mochi: joint attention over [video, valid text of the row], computed row by row."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

MOCHI = register(
    Family(
        name="Mochi",
        models=("MochiTransformer3DModel",),
        kinds={"*.attn1": "joint"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("hidden_states", "encoder_hidden_states"),
                tokens="hidden_states",
                tables={"image_rotary_emb": ("S H D",)},
            ),
        ),
        grid=patched(),
        video=True,
        splits_rows=True,
        text_tokens=lambda model, arguments: None,  # each row holds the valid tokens of its own text
        presets={
            "PAG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
        },
    )
)
