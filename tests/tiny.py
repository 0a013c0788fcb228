"""Tiny random models of the real classes, one entry for each family that steer knows.

    family = FAMILIES["flux"]
    model = family.build()                        # the same weights each time
    prediction = output(model, family.inputs(model, batch=2))

Token grids are not square, rows of a batch have their own latents and their own text, and where a family takes a text
mask the last row of a batch is padded.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from diffusers import (
    CogVideoXTransformer3DModel,
    CosmosTransformer3DModel,
    FluxTransformer2DModel,
    HunyuanVideo15Transformer3DModel,
    HunyuanVideoTransformer3DModel,
    LTXVideoTransformer3DModel,
    MochiTransformer3DModel,
    PixArtTransformer2DModel,
    QwenImageTransformer2DModel,
    SD3Transformer2DModel,
    UNet2DConditionModel,
    UNetMotionModel,
    WanTransformer3DModel,
)
from diffusers.models.embeddings import get_3d_rotary_pos_embed
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from transformers import CLIPVisionConfig, LlamaConfig, LlamaForCausalLM, LlavaConfig, LlavaForConditionalGeneration

FRAMES, HEIGHT, WIDTH = 3, 4, 6
TEXT_TOKENS = 7
TEXT_WIDTH = 32
LATENT_CHANNELS = 4
PATCH = 2
PADDED_TOKENS = 3

VOCABULARY = 64
IMAGE_TOKEN = 60

QUERY_OR_KEY = re.compile(r"(to_q|to_k|add_q_proj|add_k_proj|q_proj|k_proj)\.weight$")


@dataclass(frozen=True)
class Family:
    """A tiny model and its inputs.

    Args:
        make: makes the model, with any weights.
        make_inputs: makes the keyword arguments of its forward.
        attention_calls: attention calls of one forward at batch 2, counted by `count_attention_calls`.
        grid: frames, height and width of the visual tokens, in UNets where they are most; None without any.
        text: the keyword argument that carries the text.
        stray_calls: those of the attention calls that no attention module of the model makes.
    """

    name: str
    make: Callable[[], nn.Module]
    make_inputs: Callable[[torch.Generator, int], dict[str, Any]]
    attention_calls: int
    grid: tuple[int, int, int] | None = (1, HEIGHT, WIDTH)
    text: str = "encoder_hidden_states"
    stray_calls: int = 0

    def build(self) -> nn.Module:
        """The model: fixed weights, fp32, in eval mode, without gradients."""
        return build(self.make)

    def inputs(self, model: nn.Module, generator: torch.Generator | None = None, batch: int = 2) -> dict[str, Any]:
        """Keyword arguments for `model(...)`, without `return_dict`, on its device; the default seed is 0."""
        kwargs = self.make_inputs(generator or torch.Generator().manual_seed(0), batch)
        return moved(kwargs, next(model.parameters()).device)


def output(model: nn.Module, kwargs: dict[str, Any]) -> Tensor:
    """The prediction of one forward: the sample of a denoiser, the logits of a language model."""
    with torch.no_grad():
        result = model(**kwargs)
    return result.logits if hasattr(result, "logits") else result.sample


class AttentionCounter(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.calls = 0

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        self.calls += func is F.scaled_dot_product_attention
        return func(*args, **(kwargs or {}))


def count_attention_calls(fn: Callable[[], object]) -> int:
    """Number of `scaled_dot_product_attention` calls that `fn()` makes, by whatever name it reaches them."""
    with AttentionCounter() as counter:
        fn()
    return counter.calls


def build(make: Callable[[], nn.Module]) -> nn.Module:
    """Make a model in which every parameter matters, always with the same weights and outside the global RNG."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = make()
        randomise(model)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def randomise(model: nn.Module) -> None:
    """Keep signals at unit size, spread the attention logits and fill what starts at zero: edits have to be visible."""
    for name, parameter in model.named_parameters():
        if parameter.ndim > 1 and name.endswith(".weight"):
            gain = 1.5 if QUERY_OR_KEY.search(name) else 1.0
            parameter.normal_(std=gain * parameter[0].numel() ** -0.5)
        elif not parameter.any():
            parameter.normal_(std=0.1)


def moved(value: Any, device: torch.device) -> Any:
    if isinstance(value, dict):
        return {key: moved(item, device) for key, item in value.items()}
    if isinstance(value, tuple):
        return tuple(moved(item, device) for item in value)
    return value.to(device) if isinstance(value, Tensor) else value


def noise(generator: torch.Generator, *shape: int) -> Tensor:
    return torch.randn(*shape, generator=generator)


def text_mask(batch: int, tokens: int = TEXT_TOKENS) -> Tensor:
    """(batch, tokens), true where there is text; the last of several rows is padded at its end."""
    mask = torch.ones(batch, tokens, dtype=torch.bool)
    if batch > 1:
        mask[-1, -PADDED_TOKENS:] = False
    return mask


def timesteps(batch: int) -> Tensor:
    return torch.full((batch,), 500.0)


def make_sd15() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=2,  # the number of heads: a misnomer that diffusers keeps for old checkpoints
        norm_num_groups=8,
    )


def sd15_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "sample": noise(generator, batch, LATENT_CHANNELS, 2 * HEIGHT, 2 * WIDTH),
        "timestep": timesteps(batch),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
    }


def make_sdxl() -> nn.Module:
    return UNet2DConditionModel(
        sample_size=8,
        block_out_channels=(16, 32, 32),
        layers_per_block=1,
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
        up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        transformer_layers_per_block=(1, 1, 2),
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=(1, 2, 4),
        use_linear_projection=True,
        addition_embed_type="text_time",
        addition_time_embed_dim=8,
        projection_class_embeddings_input_dim=TEXT_WIDTH + 6 * 8,
        norm_num_groups=8,
    )


def sdxl_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    kwargs = sd15_inputs(generator, batch)
    size = [16.0 * HEIGHT, 16.0 * WIDTH]
    kwargs["added_cond_kwargs"] = {
        "text_embeds": noise(generator, batch, TEXT_WIDTH),
        "time_ids": torch.tensor([[*size, 0.0, 0.0, *size]]).repeat(batch, 1),
    }
    return kwargs


def make_sd3(**config: Any) -> nn.Module:
    return SD3Transformer2DModel(
        sample_size=8,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=8,
        caption_projection_dim=16,
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        pos_embed_max_size=8,
        **config,
    )


def make_sd35() -> nn.Module:
    return make_sd3(qk_norm="rms_norm", dual_attention_layers=(0, 1))


def sd3_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "pooled_projections": noise(generator, batch, TEXT_WIDTH),
        "timestep": timesteps(batch),
    }


def make_pixart(sample_size: int = 8) -> nn.Module:
    return PixArtTransformer2DModel(
        sample_size=sample_size,
        patch_size=PATCH,
        in_channels=LATENT_CHANNELS,
        out_channels=2 * LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=3,  # PixArt-alpha splits the width into three embeddings of image size
        attention_head_dim=8,
        cross_attention_dim=24,
        caption_channels=TEXT_WIDTH,
    )


def make_pixart_alpha() -> nn.Module:
    return make_pixart(sample_size=128)  # the size at which model and pipeline add conditions on the image size


def pixart_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch).float(),
        "timestep": timesteps(batch),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }


def pixart_alpha_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    kwargs = pixart_inputs(generator, batch)
    kwargs["added_cond_kwargs"] = {
        "resolution": torch.tensor([[16.0 * HEIGHT, 16.0 * WIDTH]]).repeat(batch, 1),
        "aspect_ratio": torch.tensor([[HEIGHT / WIDTH]]).repeat(batch, 1),
    }
    return kwargs


def make_flux() -> nn.Module:
    return FluxTransformer2DModel(
        in_channels=PATCH**2 * LATENT_CHANNELS,
        num_layers=2,
        num_single_layers=2,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
        guidance_embeds=True,
    )


def flux_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    positions = torch.cartesian_prod(torch.zeros(1), torch.arange(float(HEIGHT)), torch.arange(float(WIDTH)))
    return {
        "hidden_states": noise(generator, batch, HEIGHT * WIDTH, PATCH**2 * LATENT_CHANNELS),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "pooled_projections": noise(generator, batch, TEXT_WIDTH),
        "timestep": timesteps(batch) / 1000,
        "img_ids": positions,
        "txt_ids": torch.zeros(TEXT_TOKENS, 3),
        "guidance": torch.full((batch,), 3.5),
    }


def make_qwen_image() -> nn.Module:
    return QwenImageTransformer2DModel(
        patch_size=PATCH,
        in_channels=PATCH**2 * LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        axes_dims_rope=(4, 6, 6),
        joint_attention_dim=TEXT_WIDTH,
    )


def qwen_image_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, HEIGHT * WIDTH, PATCH**2 * LATENT_CHANNELS),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_hidden_states_mask": text_mask(batch),
        "timestep": timesteps(batch) / 1000,
        "img_shapes": [[(1, HEIGHT, WIDTH)]] * batch,
    }


def make_wan() -> nn.Module:
    return WanTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        text_dim=TEXT_WIDTH,
        freq_dim=16,
        ffn_dim=64,
        rope_max_seq_len=32,
    )


def wan21_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, FRAMES, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "timestep": timesteps(batch),
    }


def wan22_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    """As the 5B model is called: with a timestep for each token, zero in the first frame."""
    kwargs = wan21_inputs(generator, batch)
    kwargs["timestep"] = kwargs["timestep"][:, None].repeat(1, FRAMES * HEIGHT * WIDTH)
    kwargs["timestep"][:, : HEIGHT * WIDTH] = 0
    return kwargs


def make_hunyuan_video() -> nn.Module:
    return HunyuanVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        patch_size=PATCH,
        num_layers=2,
        num_single_layers=2,
        num_refiner_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        text_embed_dim=TEXT_WIDTH,
        pooled_projection_dim=TEXT_WIDTH,
    )


def hunyuan_video_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, FRAMES, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "pooled_projections": noise(generator, batch, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "guidance": torch.full((batch,), 6000.0),
    }


def make_hunyuan_video15() -> nn.Module:
    return HunyuanVideo15Transformer3DModel(
        in_channels=2 * LATENT_CHANNELS + 1,  # latents, latents of a conditioning image, its mask
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_refiner_layers=1,
        num_attention_heads=2,
        attention_head_dim=16,
        rope_axes_dim=(4, 6, 6),
        text_embed_dim=TEXT_WIDTH,
        text_embed_2_dim=16,
        image_embed_dim=8,
    )


def hunyuan_video15_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    """Text to video: the conditioning image is all zero."""
    latents = noise(generator, batch, LATENT_CHANNELS, FRAMES, HEIGHT, WIDTH)
    no_image = torch.zeros(batch, LATENT_CHANNELS + 1, FRAMES, HEIGHT, WIDTH)
    return {
        "hidden_states": torch.cat([latents, no_image], dim=1),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "encoder_hidden_states_2": noise(generator, batch, 4, 16),
        "encoder_attention_mask_2": text_mask(batch, 4),
        "image_embeds": torch.zeros(batch, 2, 8),
        "timestep": timesteps(batch),
    }


def make_cogvideox(use_rotary_positional_embeddings: bool = False) -> nn.Module:
    return CogVideoXTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        time_embed_dim=16,
        text_embed_dim=TEXT_WIDTH,
        max_text_seq_length=TEXT_TOKENS,
        sample_height=PATCH * HEIGHT,
        sample_width=PATCH * WIDTH,
        sample_frames=4 * (FRAMES - 1) + 1,
        patch_size=PATCH,
        use_rotary_positional_embeddings=use_rotary_positional_embeddings,
    )


def make_cogvideox_rotary() -> nn.Module:
    return make_cogvideox(use_rotary_positional_embeddings=True)


def cogvideox_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, FRAMES, LATENT_CHANNELS, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "timestep": timesteps(batch),
    }


def cogvideox_rotary_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    kwargs = cogvideox_inputs(generator, batch)
    kwargs["image_rotary_emb"] = get_3d_rotary_pos_embed(
        embed_dim=16, crops_coords=((0, 0), (HEIGHT, WIDTH)), grid_size=(HEIGHT, WIDTH), temporal_size=FRAMES
    )
    return kwargs


def make_ltx() -> nn.Module:
    return LTXVideoTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        cross_attention_dim=32,
        caption_channels=TEXT_WIDTH,
    )


def ltx_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, FRAMES * HEIGHT * WIDTH, LATENT_CHANNELS),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch).float(),
        "timestep": timesteps(batch),
        "num_frames": FRAMES,
        "height": HEIGHT,
        "width": WIDTH,
        "rope_interpolation_scale": (8 / 25, 32, 32),
    }


def make_mochi() -> nn.Module:
    return MochiTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        patch_size=PATCH,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        pooled_projection_dim=16,
        text_embed_dim=TEXT_WIDTH,
        time_embed_dim=16,
    )


def mochi_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, FRAMES, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "encoder_attention_mask": text_mask(batch),
        "timestep": timesteps(batch),
    }


def make_cosmos() -> nn.Module:
    return CosmosTransformer3DModel(
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        num_layers=3,
        num_attention_heads=2,
        attention_head_dim=16,
        text_embed_dim=TEXT_WIDTH,
        adaln_lora_dim=8,
        max_size=(FRAMES, 16, 16),
        concat_padding_mask=False,  # with it the forward needs torchvision
    )


def cosmos_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return {
        "hidden_states": noise(generator, batch, LATENT_CHANNELS, FRAMES, PATCH * HEIGHT, PATCH * WIDTH),
        "encoder_hidden_states": noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH),
        "timestep": timesteps(batch),
        "fps": 24,
    }


def make_animatediff() -> nn.Module:
    return UNetMotionModel(
        sample_size=8,
        block_out_channels=(16, 32),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlockMotion", "DownBlockMotion"),
        up_block_types=("UpBlockMotion", "CrossAttnUpBlockMotion"),
        cross_attention_dim=TEXT_WIDTH,
        num_attention_heads=2,
        motion_num_attention_heads=2,
        motion_max_seq_length=8,
        norm_num_groups=8,
    )


def animatediff_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    """The text is repeated for each frame, as the pipeline does."""
    text = noise(generator, batch, TEXT_TOKENS, TEXT_WIDTH)
    return {
        "sample": noise(generator, batch, LATENT_CHANNELS, FRAMES, HEIGHT, WIDTH),
        "timestep": timesteps(batch),
        "encoder_hidden_states": text.repeat_interleave(FRAMES, dim=0),
    }


def llama_config() -> LlamaConfig:
    return LlamaConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=128,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=0,
    )


def make_llama() -> nn.Module:
    return LlamaForCausalLM(llama_config())


def token_ids(generator: torch.Generator, batch: int, tokens: int) -> Tensor:
    return torch.randint(3, IMAGE_TOKEN, (batch, tokens), generator=generator)


def pad_left(input_ids: Tensor) -> dict[str, Any]:
    """Ids and their mask, with the last of several rows padded on the left, as for `generate`."""
    mask = text_mask(*input_ids.shape).flip(1)
    return {"input_ids": input_ids.masked_fill(~mask, 0), "attention_mask": mask.long()}


def llama_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    return pad_left(token_ids(generator, batch, 17))


def make_llava() -> nn.Module:
    vision = CLIPVisionConfig(
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=3,
        num_attention_heads=2,
        image_size=16,
        patch_size=4,
    )
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=llama_config(), image_token_id=IMAGE_TOKEN)
    )


def llava_inputs(generator: torch.Generator, batch: int) -> dict[str, Any]:
    """Five text tokens, the 4 x 4 image tokens, six text tokens; the first tokens of the last row are padding."""
    image = torch.full((batch, 16), IMAGE_TOKEN)
    input_ids = torch.cat([token_ids(generator, batch, 5), image, token_ids(generator, batch, 6)], dim=1)
    return pad_left(input_ids) | {"pixel_values": noise(generator, batch, 3, 16, 16)}


VIDEO = (FRAMES, HEIGHT, WIDTH)

FAMILIES: dict[str, Family] = {
    entry.name: entry
    for entry in (
        Family("sd15", make_sd15, sd15_inputs, 14, grid=(1, 2 * HEIGHT, 2 * WIDTH)),
        Family("sdxl", make_sdxl, sdxl_inputs, 22),
        Family("sd3", make_sd3, sd3_inputs, 3),
        Family("sd35", make_sd35, sd3_inputs, 5),
        Family("pixart", make_pixart, pixart_inputs, 6),
        Family("pixart_alpha", make_pixart_alpha, pixart_alpha_inputs, 6),
        Family("flux", make_flux, flux_inputs, 4),
        Family("qwen_image", make_qwen_image, qwen_image_inputs, 3),
        Family("wan21", make_wan, wan21_inputs, 6, grid=VIDEO),
        Family("wan22", make_wan, wan22_inputs, 6, grid=VIDEO),
        Family("hunyuan_video", make_hunyuan_video, hunyuan_video_inputs, 5, grid=VIDEO),
        Family("hunyuan_video15", make_hunyuan_video15, hunyuan_video15_inputs, 4, grid=VIDEO),
        Family("cogvideox", make_cogvideox, cogvideox_inputs, 3, grid=VIDEO),
        Family("cogvideox_rotary", make_cogvideox_rotary, cogvideox_rotary_inputs, 3, grid=VIDEO),
        Family("ltx", make_ltx, ltx_inputs, 6, grid=VIDEO),
        # One call for each row and layer, and one of the pooling of the text, which is no attention module.
        Family("mochi", make_mochi, mochi_inputs, 7, grid=VIDEO, stray_calls=1),
        Family("cosmos", make_cosmos, cosmos_inputs, 6, grid=VIDEO),
        Family("animatediff", make_animatediff, animatediff_inputs, 22, grid=VIDEO),
        Family("llama", make_llama, llama_inputs, 3, grid=None, text="input_ids"),
        Family("llava", make_llava, llava_inputs, 6, grid=(1, 4, 4), text="input_ids"),
    )
}
