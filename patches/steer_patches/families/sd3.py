"""Stable Diffusion 3 and 3.5: joint attention over [image, text]; some 3.5 blocks add image-only attention."""

from steer_patches.family import Family, Preset, Stage, patched, register

SURE = "listed as a set found for this style"
READ = "read off a figure; what each head does is a description of its pictures"
GUESSED = "read off a figure; which head has which effect is uncertain"
HEADS: dict[str, tuple[str, tuple[tuple[int, int], ...]]] = {  # (layer, head)
    "sd3-sunlight": (SURE, ((18, 11), (0, 17), (2, 3))),
    "sd3-spring-bloom": (SURE, ((0, 2), (13, 19), (5, 12))),
    "sd3-dark": (READ, ((1, 2), (1, 10))),
    "sd3-white": (READ, ((0, 15), (1, 19))),
    "sd3-peach": (READ, ((0, 2), (0, 3))),
    "sd3-blurred-brown": (READ, ((0, 4),)),
    "sd3-vivid-sunlight": (READ, ((13, 18),)),
    "sd3-canvas": (READ, ((14, 1),)),
    "sd3-fine-detail": (READ, ((14, 7),)),
    "sd3-neon": (READ, ((14, 17),)),
    "sd3-banding": (READ, ((15, 3), (15, 20), (15, 23), (16, 3))),
    "sd3-cinematic": (READ, ((13, 12),)),
    "sd3-scan-lines": (READ, ((3, 19),)),
    "sd3-vignette": (READ, ((18, 15), (18, 18))),
    "sd3-flat-shading": (READ, ((17, 22),)),
    "sd3-natural-light": (READ, ((10, 12),)),
    "sd3-shearing": (GUESSED, ((11, 15),)),
    "sd3-dark-single": (GUESSED, ((13, 17),)),
    "sd3-shadow": (GUESSED, ((1, 10),)),
    "sd3-blue": (GUESSED, ((0, 23),)),
}


def _heads(name: str, certainty: str, heads: tuple[tuple[int, int], ...]) -> Preset:
    """SoftPAG on these (layer, head) of SD3-medium, scale 3."""
    layers = sorted({layer for layer, _ in heads})
    chosen = {f"transformer_blocks.{layer}.attn": [h for at, h in heads if at == layer] for layer in layers}
    source = f"arXiv 2506.10978, SD3-medium at 1024 x 1024, without CFG; {certainty}; the strength is not stated"
    return Preset({"heads": chosen, "mode": "all"}, source, name)


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
            "PAG": (
                Preset(
                    {"layers": "transformer_blocks.13"}, "diffusers' StableDiffusion3PAGPipeline example, SD3-medium"
                ),
                *(_heads(name, *of) for name, of in HEADS.items()),
            ),
            "SEG": Preset({"layers": "transformer_blocks.13"}, "as PAG; no published SEG setting"),
            "SLG": Preset({"layers": "transformer_blocks.{7..9}"}, "Stability AI's SD3.5-medium recipe"),
        },
    )
)
