"""Stable Diffusion 3 and 3.5: joint attention over [image, text]; some 3.5 blocks add image-only attention."""

from steer_patches.family import Family, Preset, Stage, patched, register

SD3 = register(
    Family(
        name="SD3 / SD3.5",
        models=("SD3Transformer2DModel",),
        kinds={"*.attn2": "self", "*.attn": "joint"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("encoder_hidden_states", "hidden_states"),
                tokens="hidden_states",
                between=("block_controlnet_hidden_states", "skip_layers"),
            ),
        ),
        grid=patched(),
        presets={
            "PAG": Preset(
                {"layers": "transformer_blocks.13"}, "diffusers' StableDiffusion3PAGPipeline example, SD3-medium"
            ),
            "SEG": Preset({"layers": "transformer_blocks.13"}, "as PAG; no published SEG setting"),
            "SLG": Preset({"layers": "transformer_blocks.{7..9}"}, "Stability AI's SD3.5-medium recipe"),
        },
    )
)
