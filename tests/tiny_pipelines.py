"""Real pipelines round the tiny models: offline, with ready prompt embeddings or with tiny real text encoders.

tiny = PIPELINES["sd3"]
pipe = tiny.build()                                                # the same weights each time
latents = generate(pipe, tiny.call_kwargs(pipe, guidance_scale=4.0))
peer = pag_peer("sd3", ["blocks.1"])                               # diffusers' own PAG pipeline, equal weights
"""

from __future__ import annotations

import string
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from diffusers import (
    AnimateDiffPipeline,
    AutoencoderKL,
    AutoencoderKLHunyuanVideo15,
    ClassifierFreeGuidance,
    CogVideoXDDIMScheduler,
    CogVideoXPipeline,
    CosmosTextToWorldPipeline,
    DDIMScheduler,
    DiffusionPipeline,
    DPMSolverMultistepScheduler,
    EDMEulerScheduler,
    EulerDiscreteScheduler,
    FlowMatchEulerDiscreteScheduler,
    FluxPipeline,
    HunyuanVideo15Pipeline,
    HunyuanVideoPipeline,
    LTXPipeline,
    MochiPipeline,
    PixArtAlphaPipeline,
    PixArtSigmaPAGPipeline,
    PixArtSigmaPipeline,
    QwenImagePipeline,
    StableDiffusion3PAGPipeline,
    StableDiffusion3Pipeline,
    StableDiffusionPAGPipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPAGPipeline,
    StableDiffusionXLPipeline,
    UniPCMultistepScheduler,
    WanPipeline,
)
from tiny import (
    FAMILIES,
    FRAMES,
    HEIGHT,
    LATENT_CHANNELS,
    TEXT_TOKENS,
    TEXT_WIDTH,
    WIDTH,
    build,
    make_wan,
    noise,
    text_mask,
)
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

PROMPTS = ("a red fox", "two blue birds", "snow on a hill", "an old green boat")
NEGATIVE_PROMPT = "blurry"
VAE_SCALE = 2
BETAS = {"beta_start": 0.00085, "beta_end": 0.012}


@dataclass(frozen=True)
class TinyPipeline:
    """A real pipeline, the name of the family of its denoiser and what its call needs.

    Args:
        make_kwargs: from seed, batch and guidance scale to the arguments that this pipeline has of its own.
    """

    name: str
    family: str
    make: Callable[[], DiffusionPipeline]
    make_kwargs: Callable[[int, int, float], dict[str, Any]]

    def build(self) -> DiffusionPipeline:
        pipe = self.make()
        pipe.set_progress_bar_config(disable=True)
        return pipe

    def call_kwargs(
        self, pipe: DiffusionPipeline, seed: int = 0, batch: int = 1, guidance_scale: float = 4.0, steps: int = 3
    ) -> dict[str, Any]:
        """Keyword arguments for `pipe(...)`; a guidance scale of at most 1 means no classifier-free guidance.

        Where guidance is a component of the pipeline, as in HunyuanVideo 1.5, its scale is set there.
        """
        if "guider" in pipe.components:
            pipe.guider = pipe.guider.new(guidance_scale=guidance_scale)
        return {
            "num_inference_steps": steps,
            "generator": torch.Generator().manual_seed(seed),
            "output_type": "latent",
            **self.make_kwargs(seed, batch, guidance_scale),
        }


def generate(pipe: DiffusionPipeline, kwargs: dict[str, Any]) -> Tensor:
    """What `pipe(**kwargs)` makes: latents, unless the arguments ask for something else."""
    return pipe(**kwargs, return_dict=False)[0]


def denoiser(name: str) -> nn.Module:
    return FAMILIES[name].build()


def vae(**config: Any) -> nn.Module:
    return build(
        lambda: AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            latent_channels=LATENT_CHANNELS,
            norm_num_groups=4,
            **config,
        )
    )


def tokenizer() -> CLIPTokenizer:
    """A CLIP tokenizer that knows single letters."""
    special = {"bos_token": "<|startoftext|>", "eos_token": "<|endoftext|>"}
    pieces = [*special.values(), *string.ascii_lowercase, *(letter + "</w>" for letter in string.ascii_lowercase)]
    return CLIPTokenizer(
        vocab={piece: index for index, piece in enumerate(pieces)}, merges=[], model_max_length=24, **special
    )


def text_encoder(cls: type[nn.Module], width: int) -> nn.Module:
    letters = tokenizer()
    config = CLIPTextConfig(
        vocab_size=len(letters),
        hidden_size=width,
        projection_dim=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=letters.model_max_length,
        bos_token_id=letters.bos_token_id,
        eos_token_id=letters.eos_token_id,
        pad_token_id=letters.pad_token_id,
    )
    return build(lambda: cls(config))


def flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(shift=3.0)


def dynamic_flow_scheduler() -> FlowMatchEulerDiscreteScheduler:
    return FlowMatchEulerDiscreteScheduler(
        use_dynamic_shifting=True, base_image_seq_len=16, max_image_seq_len=256, base_shift=0.5, max_shift=1.15
    )


def prompts(seed: int, batch: int, tokens: int = TEXT_TOKENS, negative: bool = False) -> Tensor:
    """(batch, tokens, width) embeddings; the negative prompts of a seed are other than its prompts."""
    return noise(torch.Generator().manual_seed(1000 + 2 * seed + negative), batch, tokens, TEXT_WIDTH)


def pixels(scale: int) -> dict[str, Any]:
    """The size of an image whose tokens, `scale` pixels wide, form the usual grid."""
    return {"height": HEIGHT * scale, "width": WIDTH * scale}


def embeddings(seed: int, batch: int, guided: bool, pooled: bool = False, mask: str | None = None) -> dict[str, Any]:
    """Prompt embeddings, negative ones if guided; with pooled ones and with masks by the name of `mask` on request."""
    kwargs: dict[str, Any] = {"prompt_embeds": prompts(seed, batch)}
    if pooled:
        kwargs["pooled_prompt_embeds"] = prompts(seed, batch, 1)[:, 0]
    if mask:
        kwargs[mask] = text_mask(batch)
    if not guided:
        return kwargs
    kwargs["negative_prompt_embeds"] = prompts(seed, batch, negative=True)
    if pooled:
        kwargs["negative_pooled_prompt_embeds"] = prompts(seed, batch, 1, negative=True)[:, 0]
    if mask:
        kwargs[f"negative_{mask}"] = text_mask(batch).flip(0)
    return kwargs


def build_sd15(with_text: bool = False) -> DiffusionPipeline:
    return StableDiffusionPipeline(
        vae=vae(),
        text_encoder=text_encoder(CLIPTextModel, TEXT_WIDTH) if with_text else None,
        tokenizer=tokenizer() if with_text else None,
        unet=denoiser("sd15"),
        scheduler=DDIMScheduler(beta_schedule="scaled_linear", clip_sample=False, steps_offset=1, **BETAS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def sd15_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(2 * VAE_SCALE),
        **embeddings(seed, batch, guidance_scale > 1),
        "guidance_scale": guidance_scale,
    }


def build_sdxl() -> DiffusionPipeline:
    return StableDiffusionXLPipeline(
        vae=vae(),
        text_encoder=None,
        text_encoder_2=None,
        tokenizer=None,
        tokenizer_2=None,
        unet=denoiser("sdxl"),
        scheduler=EulerDiscreteScheduler(beta_schedule="scaled_linear", timestep_spacing="leading", **BETAS),
        add_watermarker=False,
    )


def sdxl_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return sd15_kwargs(seed, batch, guidance_scale) | embeddings(seed, batch, guidance_scale > 1, pooled=True)


def build_sd3(name: str = "sd3", with_text: bool = False) -> DiffusionPipeline:
    half = TEXT_WIDTH // 2
    return StableDiffusion3Pipeline(
        transformer=denoiser(name),
        scheduler=flow_scheduler(),
        vae=vae(shift_factor=0.0609, scaling_factor=1.5305),
        text_encoder=text_encoder(CLIPTextModelWithProjection, half) if with_text else None,
        tokenizer=tokenizer() if with_text else None,
        text_encoder_2=text_encoder(CLIPTextModelWithProjection, half) if with_text else None,
        tokenizer_2=tokenizer() if with_text else None,
        text_encoder_3=None,
        tokenizer_3=None,
    )


def with_prompts(kwargs: dict[str, Any], batch: int, guidance_scale: float) -> dict[str, Any]:
    """The same arguments with strings in place of embeddings."""
    strings: dict[str, Any] = {"prompt": [PROMPTS[row % len(PROMPTS)] for row in range(batch)]}
    if guidance_scale > 1:
        strings["negative_prompt"] = [NEGATIVE_PROMPT] * batch
    return {key: value for key, value in kwargs.items() if not key.endswith("_embeds")} | strings


def sd15_text_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return with_prompts(sd15_kwargs(seed, batch, guidance_scale), batch, guidance_scale)


def sd3_text_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    kwargs = with_prompts(sdxl_kwargs(seed, batch, guidance_scale), batch, guidance_scale)
    return kwargs | {"max_sequence_length": 8}


def build_pixart(cls: type[DiffusionPipeline], name: str) -> DiffusionPipeline:
    return cls(
        tokenizer=None,
        text_encoder=None,
        vae=vae(),
        transformer=denoiser(name),
        scheduler=DPMSolverMultistepScheduler(beta_schedule="scaled_linear", **BETAS),
    )


def pixart_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(2 * VAE_SCALE),
        **embeddings(seed, batch, guidance_scale > 1, mask="prompt_attention_mask"),
        "guidance_scale": guidance_scale,
        "negative_prompt": None,
        "use_resolution_binning": False,
    }


def build_flux() -> DiffusionPipeline:
    return FluxPipeline(
        scheduler=dynamic_flow_scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        text_encoder_2=None,
        tokenizer_2=None,
        transformer=denoiser("flux"),
    )


def flux_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    """Distilled guidance: the scale is an input of the model, there are no negative prompts."""
    return {
        **pixels(16),
        **embeddings(seed, batch, guided=False, pooled=True),
        "guidance_scale": guidance_scale,
    }


def flux_true_cfg_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return flux_kwargs(seed, batch, 3.5) | {
        **embeddings(seed, batch, guidance_scale > 1, pooled=True),
        "true_cfg_scale": guidance_scale,
    }


def build_qwen_image() -> DiffusionPipeline:
    return QwenImagePipeline(
        scheduler=dynamic_flow_scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("qwen_image"),
    )


def qwen_image_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(16),
        **embeddings(seed, batch, guidance_scale > 1, mask="prompt_embeds_mask"),
        "true_cfg_scale": guidance_scale,
    }


def build_wan(**options: Any) -> DiffusionPipeline:
    return WanPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        scheduler=UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=3.0),
        transformer=denoiser("wan21"),
        **options,
    )


def build_wan22() -> DiffusionPipeline:
    """Two experts with weights of their own, as the 14B models have."""
    pipe = build_wan(transformer_2=build(make_wan), boundary_ratio=0.8)
    for parameter in pipe.transformer_2.blocks.parameters():
        parameter.mul_(0.9)
    return pipe


def build_wan22_5b() -> DiffusionPipeline:
    return build_wan(expand_timesteps=True)


def wan_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(16),
        **embeddings(seed, batch, guidance_scale > 1),
        "num_frames": 4 * (FRAMES - 1) + 1,
        "guidance_scale": guidance_scale,
    }


def build_hunyuan_video() -> DiffusionPipeline:
    return HunyuanVideoPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("hunyuan_video"),
        vae=None,
        scheduler=flow_scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
    )


def hunyuan_video_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(16),
        **embeddings(seed, batch, guidance_scale > 1, pooled=True, mask="prompt_attention_mask"),
        "num_frames": 4 * (FRAMES - 1) + 1,
        "true_cfg_scale": guidance_scale,
    }


def build_hunyuan_video15() -> DiffusionPipeline:
    vae = AutoencoderKLHunyuanVideo15(  # the pipeline asks it for its sizes, latents never reach it
        latent_channels=LATENT_CHANNELS,
        block_out_channels=(8, 8),
        layers_per_block=1,
        spatial_compression_ratio=VAE_SCALE,
        temporal_compression_ratio=VAE_SCALE,
    )
    pipe = HunyuanVideo15Pipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("hunyuan_video15"),
        vae=vae.eval(),
        scheduler=flow_scheduler(),
        text_encoder_2=None,
        tokenizer_2=None,
        guider=ClassifierFreeGuidance(guidance_scale=4.0),
    )
    pipe.vision_num_semantic_tokens = 2
    return pipe


def hunyuan_video15_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    guided = guidance_scale > 1
    kwargs = {
        **pixels(VAE_SCALE),
        **embeddings(seed, batch, guided, mask="prompt_embeds_mask"),
        "num_frames": VAE_SCALE * (FRAMES - 1) + 1,
    }
    for prefix in ("", "negative_") if guided else ("",):
        kwargs[f"{prefix}prompt_embeds_2"] = prompts(seed, batch, 4, negative=bool(prefix))[..., :16]
        kwargs[f"{prefix}prompt_embeds_mask_2"] = text_mask(batch, 4)
    return kwargs


def build_cogvideox(name: str) -> DiffusionPipeline:
    return CogVideoXPipeline(
        tokenizer=None,
        text_encoder=None,
        vae=None,
        transformer=denoiser(name),
        scheduler=CogVideoXDDIMScheduler(prediction_type="v_prediction"),
    )


def build_ltx() -> DiffusionPipeline:
    return LTXPipeline(
        scheduler=dynamic_flow_scheduler(),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("ltx"),
    )


def ltx_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return {
        **pixels(32),
        **embeddings(seed, batch, guidance_scale > 1, mask="prompt_attention_mask"),
        "num_frames": 8 * (FRAMES - 1) + 1,
        "guidance_scale": guidance_scale,
    }


def build_mochi() -> DiffusionPipeline:
    return MochiPipeline(
        scheduler=FlowMatchEulerDiscreteScheduler(invert_sigmas=True),
        vae=None,
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("mochi"),
    )


def mochi_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return ltx_kwargs(seed, batch, guidance_scale) | {**pixels(16), "num_frames": 6 * (FRAMES - 1) + 1}


class NoGuardrail:
    """In place of Cosmos' guardrail, a model of its own that the pipeline insists on, but asks only about strings."""

    def to(self, device: torch.device) -> None:
        pass


def build_cosmos() -> DiffusionPipeline:
    return CosmosTextToWorldPipeline(
        text_encoder=None,
        tokenizer=None,
        transformer=denoiser("cosmos"),
        vae=None,
        scheduler=EDMEulerScheduler(sigma_min=0.002, sigma_max=80.0, sigma_data=0.5, final_sigmas_type="sigma_min"),
        safety_checker=NoGuardrail(),
    )


def cosmos_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return wan_kwargs(seed, batch, guidance_scale) | {"num_frames": 8 * (FRAMES - 1) + 1}


def build_animatediff() -> DiffusionPipeline:
    return AnimateDiffPipeline(
        vae=None,
        text_encoder=None,
        tokenizer=None,
        unet=denoiser("animatediff"),
        motion_adapter=None,
        scheduler=DDIMScheduler(beta_schedule="linear", clip_sample=False, steps_offset=1, **BETAS),
    )


def animatediff_kwargs(seed: int, batch: int, guidance_scale: float) -> dict[str, Any]:
    return wan_kwargs(seed, batch, guidance_scale) | {**pixels(8), "num_frames": FRAMES}


PIPELINES: dict[str, TinyPipeline] = {
    entry.name: entry
    for entry in (
        TinyPipeline("sd15", "sd15", build_sd15, sd15_kwargs),
        TinyPipeline("sd15_text", "sd15", lambda: build_sd15(with_text=True), sd15_text_kwargs),
        TinyPipeline("sdxl", "sdxl", build_sdxl, sdxl_kwargs),
        TinyPipeline("sd3", "sd3", build_sd3, sdxl_kwargs),
        TinyPipeline("sd3_text", "sd3", lambda: build_sd3(with_text=True), sd3_text_kwargs),
        TinyPipeline("sd35", "sd35", lambda: build_sd3("sd35"), sdxl_kwargs),
        TinyPipeline("pixart", "pixart", lambda: build_pixart(PixArtSigmaPipeline, "pixart"), pixart_kwargs),
        TinyPipeline(
            "pixart_alpha", "pixart_alpha", lambda: build_pixart(PixArtAlphaPipeline, "pixart_alpha"), pixart_kwargs
        ),
        TinyPipeline("flux", "flux", build_flux, flux_kwargs),
        TinyPipeline("flux_true_cfg", "flux", build_flux, flux_true_cfg_kwargs),
        TinyPipeline("qwen_image", "qwen_image", build_qwen_image, qwen_image_kwargs),
        TinyPipeline("wan21", "wan21", build_wan, wan_kwargs),
        TinyPipeline("wan22", "wan21", build_wan22, wan_kwargs),
        TinyPipeline("wan22_5b", "wan22", build_wan22_5b, wan_kwargs),
        TinyPipeline("hunyuan_video", "hunyuan_video", build_hunyuan_video, hunyuan_video_kwargs),
        TinyPipeline("hunyuan_video15", "hunyuan_video15", build_hunyuan_video15, hunyuan_video15_kwargs),
        TinyPipeline("cogvideox", "cogvideox", lambda: build_cogvideox("cogvideox"), wan_kwargs),
        TinyPipeline("cogvideox_rotary", "cogvideox_rotary", lambda: build_cogvideox("cogvideox_rotary"), wan_kwargs),
        TinyPipeline("ltx", "ltx", build_ltx, ltx_kwargs),
        TinyPipeline("mochi", "mochi", build_mochi, mochi_kwargs),
        TinyPipeline("cosmos", "cosmos", build_cosmos, cosmos_kwargs),
        TinyPipeline("animatediff", "animatediff", build_animatediff, animatediff_kwargs),
    )
}

# Not SD3.5: diffusers' PAG attention leaves out the norm of queries and keys, and fails on dual attention.
PAG_PEERS: dict[str, type[DiffusionPipeline]] = {
    "sd15": StableDiffusionPAGPipeline,
    "sd15_text": StableDiffusionPAGPipeline,
    "sdxl": StableDiffusionXLPAGPipeline,
    "sd3": StableDiffusion3PAGPipeline,
    "sd3_text": StableDiffusion3PAGPipeline,
    "pixart": PixArtSigmaPAGPipeline,
}


def pag_peer(name: str, pag_applied_layers: str | Sequence[str]) -> DiffusionPipeline:
    """diffusers' own PAG pipeline with components equal to those of `PIPELINES[name]`, but not shared with them."""
    peer = PAG_PEERS[name].from_pipe(PIPELINES[name].build(), pag_applied_layers=pag_applied_layers)
    peer.set_progress_bar_config(disable=True)
    return peer
