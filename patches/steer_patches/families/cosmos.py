"""Cosmos: self-attention over the video, text in cross-attention; conditional and unconditional calls."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

COSMOS = register(
    Family(
        name="Cosmos",
        models=("CosmosTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("hidden_states",),
                tokens="hidden_states",
                tables={
                    "image_rotary_emb": ("S D",),
                    "extra_pos_emb": ("B S C",),
                    "temb": ("B C", "B S C"),  # image to video: a timestep for each frame
                    "embedded_timestep": ("B C", "B S C"),
                    "controlnet_residual": ("B S C",),
                },
            ),
        ),
        grid=patched(),
        video=True,
        cfg="sequential",
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "NeighborhoodAttention": Preset(
                {"window": (16, 32, 48), "stride": (1, 8, 16), "steps": "0.34:"},
                "arXiv 2504.16922, Cosmos-7B at 16 x 44 x 80 tokens, 12 of 35 steps dense",
                "cosmos-7b",
            ),
        },
    )
)
