"""Cosmos: self-attention over the video, text in cross-attention; conditional and unconditional calls."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

COSMOS = register(
    Family(
        name="Cosmos",
        models=("CosmosTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(Stage("transformer_blocks", returns=("hidden_states",)),),
        grid=patched(),
        cfg="sequential",
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
        },
    )
)
