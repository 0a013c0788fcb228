"""Wan 2.1 and 2.2: self-attention over the video, text in cross-attention; conditional and unconditional calls."""

from steer_patches.family import UNTUNED, Family, Preset, Stage, patched, register

WAN = register(
    Family(
        name="Wan 2.1 / 2.2",
        models=("WanTransformer3DModel",),
        kinds={"*.attn1": "self", "*.attn2": "cross"},
        stages=(
            Stage(
                "blocks",
                returns=("hidden_states",),
                tokens="hidden_states",
                tables={"rotary_emb": ("1 S 1 D",), "temb": ("B S 6 C", "B 6 C")},  # 2.2 5B: a timestep for each token
            ),
        ),
        grid=patched(),
        video=True,
        cfg="sequential",
        main_port=1,  # port 0 attends to the image prompt of image-to-video models
        presets={
            "PAG": Preset({"layers": "blocks.15"}, UNTUNED),
            "SEG": Preset({"layers": "blocks.15"}, UNTUNED),
            "SLG": Preset({"layers": "blocks.15"}, UNTUNED),
            "RadialAttention": (
                Preset(
                    {"decay": 0.2, "key_frame_sink": True, "steps": "0.24:", "dense_layers": 1},
                    "published scripts for Wan2.1-14B, 69 frames of 768x1280, 12 of 50 steps dense",
                    "wan2.1-14b",
                ),
                Preset(
                    {"decay": 0.8, "key_frame_sink": True, "steps": "0.275:", "dense_layers": 1, "block_size": 64},
                    "published scripts for Wan2.2-A14B, 77 frames of 768x1280, 11 of 40 steps dense",
                    "wan2.2-a14b",
                ),
            ),
            "VMoBA": (
                Preset({"steps": "0.25:"}, "arXiv 2506.23858, training-free: sizes and k by the grid", "training-free"),
                Preset(
                    {"frames": 2, "window": (3, 4), "box": (4, 6, 4), "threshold": 0.25, "steps": "0.24:"},
                    "FastVideo's configuration for Wan2.1-1.3B, 77 frames of 480x832, 12 of 50 steps dense",
                    "fastvideo",
                ),
            ),
        },
    )
)
