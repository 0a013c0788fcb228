"""Mochi: joint attention over [video, valid text of the row], computed row by row."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

MOCHI = register(
    Family(
        name="Mochi",
        models=("MochiTransformer3DModel",),
        kinds={"*.attn1": "joint"},
        stages=(Stage("transformer_blocks", returns=("hidden_states", "encoder_hidden_states")),),
        grid=patched(),
        splits_rows=True,
        presets={
            "PAG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.24"}, UNTUNED),
        },
    )
)
