"""Wan 2.1 and 2.2: self-attention over the video, text in cross-attention; conditional and unconditional calls."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

WAN = register(
    Family(
        name="Wan 2.1 / 2.2",
        models=("WanTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(Stage("blocks", returns=("hidden_states",)),),
        grid=patched(),
        cfg="sequential",
        main_port=1,  # port 0 attends to the image prompt of image-to-video models
        presets={
            "PAG": Preset({"layers": "blocks.15"}, UNTUNED),
            "SEG": Preset({"layers": "blocks.15"}, UNTUNED),
            "SLG": Preset({"layers": "blocks.15"}, UNTUNED),
        },
    )
)
