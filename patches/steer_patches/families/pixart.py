"""PixArt-alpha and PixArt-Sigma: self-attention over the image, text in cross-attention."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

PIXART = register(
    Family(
        name="PixArt",
        models=("PixArtTransformer2DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(
            Stage(
                "transformer_blocks",
                returns=("hidden_states",),
                tokens="hidden_states",
                tables={"attention_mask": ("B 1 S",)},
            ),
        ),
        grid=patched(),
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, "diffusers' PixArtSigmaPAGPipeline example"),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "ReTtention": Preset(
                {"keep": 0.03125, "ramp": 0.04, "period": 5, "steps": "0.25:"},
                "arXiv 2505.22918 and its code for PixArt-alpha and PixArt-Sigma, 5 of 20 steps dense",
            ),
        },
    )
)
