"""PixArt-alpha and PixArt-Sigma: self-attention over the image, text in cross-attention."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

PIXART = register(
    Family(
        name="PixArt",
        models=("PixArtTransformer2DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(Stage("transformer_blocks", returns=("hidden_states",)),),
        grid=patched(),
        presets={
            "PAG": Preset({"layers": "transformer_blocks.14"}, "diffusers' PixArtSigmaPAGPipeline example"),
            "SEG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
            "SLG": Preset({"layers": "transformer_blocks.14"}, UNTUNED),
        },
    )
)
