"""AnimateDiff: a Stable Diffusion UNet with temporal modules; frames are folded into the batch."""

from steer_patches.families.unet import STAGES, latents
from steer_patches.family import Family, Preset, register

ANIMATEDIFF = register(
    Family(
        name="AnimateDiff",
        models=("UNetMotionModel",),
        kinds={"*.motion_modules.*": "temporal", "*.attn1": "self", "*.attn2": "cross"},
        stages=STAGES,
        grid=latents,
        tokens_from_grid=False,
        presets={"PAG": Preset({"layers": "mid_block"}, "diffusers' AnimateDiffPAGPipeline, spatial attention only")},
    )
)
