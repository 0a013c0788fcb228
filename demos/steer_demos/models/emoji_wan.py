"""`emoji-wan`: a Wan text-to-video pipeline, small enough to be trained on a CPU."""

from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler, WanPipeline, WanTransformer3DModel
from diffusers.models.transformers.transformer_wan import WanAttnProcessor
from torch import Tensor, nn
from tqdm import tqdm
from transformers import T5Tokenizer, UMT5Config, UMT5EncoderModel

from steer_demos.clips import ANIMATIONS, CONCEPTS, MOTIONS, Clips, clip_caption, draw_clips
from steer_demos.emoji import BACKGROUNDS
from steer_demos.models import emoji_wan_autoencoder
from steer_demos.models.emoji_mmdit import draw_sigmas
from steer_demos.models.emoji_wan_autoencoder import LATENT_CHANNELS, ClipCodec
from steer_demos.training import Budget, best_device, fit, load_checkpoint, save_pipeline

MINUTES = 90.0
BATCH_SIZE = 4
AUTOENCODER_SHARE = 0.17  # of the budget
POOL = 2400  # clips whose latents are kept in memory
LATENT_FRAMES = 9
FRAME_TOKENS = 64
TEXT_TOKENS = 16
TEXT_WIDTH = 96
PIPELINE_TEXT_TOKENS = 512  # what WanPipeline pads to unless told otherwise
DROP_CAPTION = 0.1  # the unconditional share of classifier-free guidance
DROP_BACKGROUND = 0.3


@dataclass(frozen=True)
class Stage:
    """One stage of training.

    Args:
        name: of its checkpoint folder.
        frames: how many of a clip's nine latent frames it sees.
        share: of the budget.
        learning_rate: see `fit`.
        shift: of the noise levels, see `shifted`.
    """

    name: str
    frames: int
    share: float
    learning_rate: float
    shift: float


# What things look like, how they move, all of it together: a sample of the first stage costs a tenth of the last's.
STAGES = (
    Stage("frames", 1, 0.25, 1e-3, shift=1.0),
    Stage("triples", 3, 0.45, 1e-3, shift=1.732),
    Stage("clips", LATENT_FRAMES, 0.30, 6e-4, shift=6.0),
)


def caption_grid() -> list[str]:
    """All captions: subjects x (motions and none) x (backgrounds and none), flattened in this order.

    An animation has the same caption in place of every motion; a still drawing always has a motion, and where the grid
    has none its caption is empty.
    """
    backgrounds = [*BACKGROUNDS, None]
    captions: list[str] = []
    for subject in (*CONCEPTS, *ANIMATIONS):
        is_still = len(captions) < len(CONCEPTS) * (len(MOTIONS) + 1) * len(backgrounds)
        for motion in (*MOTIONS, None):
            told = motion if is_still else None
            empty = is_still and motion is None
            captions += ["" if empty else clip_caption(subject, told, background) for background in backgrounds]
    return captions


def build_tokenizer() -> T5Tokenizer:
    """A T5 tokenizer with one token a word of the captions; other words are spelled, other letters are unknown."""
    words = sorted({word for caption in caption_grid() for word in caption.split()})
    letters = sorted({letter for letter in "abcdefghijklmnopqrstuvwxyz0123456789,.!?'-"})
    vocabulary = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -10.0)]
    vocabulary += [(f"▁{word}", -1.0) for word in words if len(word) > 1 or word == "a"]
    vocabulary += [(letter, -10.0) for letter in letters]
    return T5Tokenizer(vocab=vocabulary, extra_ids=0, model_max_length=PIPELINE_TEXT_TOKENS)


def build_text_encoder(tokenizer: T5Tokenizer) -> UMT5EncoderModel:
    """A UMT5 encoder of two layers and width 96."""
    return UMT5EncoderModel(
        UMT5Config(
            vocab_size=len(tokenizer),
            d_model=TEXT_WIDTH,
            d_kv=32,
            d_ff=2 * TEXT_WIDTH,
            num_layers=2,
            num_heads=3,
            dropout_rate=0.0,
            feed_forward_proj="gated-gelu",
            pad_token_id=tokenizer.pad_token_id,
            eos_token_id=tokenizer.eos_token_id,
        )
    )


def build_transformer() -> WanTransformer3DModel:
    """Six blocks of width 192 over 9 x 8 x 8 tokens; modulation by time and output start at zero."""
    transformer = WanTransformer3DModel(
        patch_size=(1, 2, 2),
        num_attention_heads=6,
        attention_head_dim=32,
        in_channels=LATENT_CHANNELS,
        out_channels=LATENT_CHANNELS,
        text_dim=TEXT_WIDTH,
        freq_dim=128,
        ffn_dim=576,
        num_layers=6,
        cross_attn_norm=True,
        qk_norm="rms_norm_across_heads",
        rope_max_seq_len=64,
    )
    for name, module in transformer.named_modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
            nn.init.zeros_(module.bias)
            if name.endswith(("time_proj", "proj_out")):
                nn.init.zeros_(module.weight)
    return transformer


def build_scheduler() -> FlowMatchEulerDiscreteScheduler:
    """Rectified flow whose noise levels are shifted as in training, see `shifted`."""
    return FlowMatchEulerDiscreteScheduler(num_train_timesteps=1000, shift=STAGES[-1].shift)


def shifted(sigmas: Tensor, shift: float) -> Tensor:
    """Noise levels in (0, 1], shifted towards 1 as `FlowMatchEulerDiscreteScheduler` does.

    Several views of one scene show through more noise than one: in a whole clip, what is where can be seen at a level
    of 0.95, and without the shift training would hardly ever meet a level at which that is still open.
    """
    return shift * sigmas / (1 + (shift - 1) * sigmas)


class CountedTextAttention(WanAttnProcessor):
    """Wan attention whose last text token stands for several; for training only.

    The pipeline pads text with zeros, which are all alike and carry no position: training keeps one of them and adds
    the logarithm of their number to its attention scores, which is the same function at a fraction of the cost.

    Args:
        counts: (B,) how many tokens the last one stands for.
    """

    def __init__(self, counts: Tensor) -> None:
        super().__init__()
        self.mask = torch.zeros(len(counts), 1, 1, TEXT_TOKENS, device=counts.device)
        self.mask[..., -1] = counts.float().log()[:, None, None]

    def __call__(
        self,
        attn: Any,
        hidden_states: Tensor,
        encoder_hidden_states: Tensor | None = None,
        attention_mask: Tensor | None = None,
        rotary_emb: tuple[Tensor, Tensor] | None = None,
    ) -> Tensor:
        """As `WanAttnProcessor`; self attention has no text and no mask."""
        mask = None if encoder_hidden_states is None else self.mask
        return super().__call__(attn, hidden_states, encoder_hidden_states, mask, rotary_emb)


class ChosenFrames(nn.Module):
    """Rotary positions of some of a clip's latent frames, in place of `WanRotaryPosEmbed`; for training only."""

    def __init__(self, rope: nn.Module) -> None:
        super().__init__()
        self.rope = rope
        self.times: Tensor | None = None  # (B, T), set before each call

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Latents (B, C, T, H, W) of the frames `times` -> cosines and sines (B, tokens, 1, head width)."""
        all_frames = hidden_states[:, :, :1].expand(-1, -1, LATENT_FRAMES, -1, -1)
        cos, sin = (table[0].unflatten(0, (LATENT_FRAMES, -1)) for table in self.rope(all_frames))
        return cos[self.times].flatten(1, 2), sin[self.times].flatten(1, 2)


class TextToVideo(nn.Module):
    """The trained parts, and their rectified-flow loss."""

    def __init__(self, tokenizer: T5Tokenizer) -> None:
        super().__init__()
        self.text_encoder = build_text_encoder(tokenizer)
        self.transformer = build_transformer()

    def encode_text(self, ids: Tensor) -> Tensor:
        """Token ids (B, 16) -> text tokens (B, 16, 96), zero where the ids are padding, as in `WanPipeline`."""
        mask = ids != 0
        return self.text_encoder(ids, mask.long()).last_hidden_state * mask[..., None]

    def prepare(self, counts: Tensor) -> None:
        """Set up training on batches whose last text tokens stand for `counts` (B,) ones each."""
        self.transformer.set_attn_processor(CountedTextAttention(counts))
        if not isinstance(self.transformer.rope, ChosenFrames):
            self.transformer.rope = ChosenFrames(self.transformer.rope)

    def loss(self, latents: Tensor, times: Tensor, ids: Tensor, noise: Tensor, sigmas: Tensor) -> Tensor:
        """Mean square error of the velocity `noise - latents`.

        Args:
            latents: (B, 16, T, 16, 16), the frames `times` (B, T) of the nine.
            ids: (B, 16).
            noise: like latents.
            sigmas: (B,) in (0, 1].
        """
        self.transformer.rope.times = times
        mixed = torch.lerp(latents, noise, sigmas[:, None, None, None, None])
        velocity = self.transformer(mixed, sigmas * 1000, self.encode_text(ids), return_dict=False)[0]
        return (velocity - (noise - latents)).square().mean()


class ClipBatches:
    """Draws batches of (latents, times, token ids) from a pool of clips that is made once.

    Args:
        size: clips in the pool.
        seed: of the pool.
        encode: clips (N, 17, 3, 64, 64) in [-1, 1] -> latents (N, 16, 9, 16, 16).
        device: where batches are wanted; the pool stays on the CPU.
    """

    def __init__(
        self, size: int, seed: int, encode: Callable[[Tensor], Tensor], tokenizer: T5Tokenizer, device: torch.device
    ) -> None:
        self.device = device
        generator = torch.Generator().manual_seed(seed)
        parts: list[Clips] = []
        latents: list[Tensor] = []
        for _ in tqdm(range(0, size, 40), desc="drawing clips"):
            clips = draw_clips(40, generator)
            latents.append(encode(clips.frames).half())
            parts.append(Clips(torch.empty(0), clips.subjects, clips.motions, clips.backgrounds))
        self.latents = torch.cat(latents)
        self.subjects = torch.cat([part.subjects for part in parts])
        self.motions = torch.cat([part.motions for part in parts])
        self.backgrounds = torch.cat([part.backgrounds for part in parts])
        captions = ["", *caption_grid()]
        padded = tokenizer(captions, padding="max_length", max_length=TEXT_TOKENS, return_tensors="pt").input_ids
        self.empty_ids = padded[0]
        self.ids = padded[1:].unflatten(0, (-1, len(MOTIONS) + 1, len(BACKGROUNDS) + 1))

    def draw(self, size: int, frames: int, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor]:
        """Latents (size, 16, frames, 16, 16), their times (size, frames), ids (size, 16); captions partly left out."""

        def rand(*shape: int) -> Tensor:
            return torch.rand(*shape, generator=generator, device=generator.device).cpu()

        clip = (rand(size) * len(self.latents)).long()
        times = rand(size, LATENT_FRAMES).argsort(dim=1)[:, :frames].sort(dim=1).values
        latents = self.latents[clip[:, None], :, times].movedim(2, 1).float()
        backgrounds = self.backgrounds[clip].masked_fill(rand(size) < DROP_BACKGROUND, len(BACKGROUNDS))
        ids = self.ids[self.subjects[clip], self.motions[clip], backgrounds]
        ids = torch.where((rand(size) < DROP_CAPTION)[:, None], self.empty_ids, ids)
        return latents.to(self.device), times.to(self.device), ids.to(self.device)


def train(folder: Path, budget: Budget, *, batch_size: int = BATCH_SIZE, seed: int = 0) -> None:
    """Train the autoencoder, then text encoder and transformer; continues from the checkpoints in `folder`.

    Args:
        batch_size: whole clips a step; the stages that see fewer frames take as many more samples.
    """
    device = best_device()
    torch.manual_seed(seed)
    state = load_checkpoint(folder / STAGES[0].name)
    clips = draw_clips(200, torch.Generator().manual_seed(seed)).frames
    codec = ClipCodec(**state["constants"]) if state else ClipCodec.fit(clips)
    emoji_wan_autoencoder.train(folder / "autoencoder", budget.part(AUTOENCODER_SHARE), codec, seed=seed)
    tokenizer = build_tokenizer()
    tokenizer.save_pretrained(folder / "tokenizer")
    batches = ClipBatches(POOL, seed, codec.encode, tokenizer, device)
    model = TextToVideo(tokenizer).to(device)
    previous: Path | None = None
    for stage in STAGES:
        if previous is not None:
            start = load_checkpoint(previous)
            assert start is not None
            model.load_state_dict(start["average"], strict=False)
        size = batch_size * LATENT_FRAMES // stage.frames
        # Half of the batch sees the pipeline's default, half a pipeline called with max_sequence_length=16.
        lengths = torch.tensor([TEXT_TOKENS, PIPELINE_TEXT_TOKENS], device=device).repeat(-(-size // 2))[:size]
        model.prepare(lengths - TEXT_TOKENS + 1)

        def draw(size: int, generator: torch.Generator, stage: Stage = stage) -> tuple[Tensor, ...]:
            latents, times, ids = batches.draw(size, stage.frames, generator)
            noise = torch.randn(latents.shape, generator=generator, device=device)
            return latents, times, ids, noise, shifted(draw_sigmas(size, generator), stage.shift)

        fit(
            model,
            draw,
            model.loss,
            folder / stage.name,
            budget.part((1 - AUTOENCODER_SHARE) * stage.share),
            batch_size=size,
            seed=seed,
            learning_rate=stage.learning_rate,
            constants=asdict(codec),
            label=stage.name,
        )
        previous = folder / stage.name


def save(folder: Path, output: Path) -> None:
    """Write the averaged weights of the checkpoints in `folder` as a bfloat16 pipeline folder."""
    state = load_checkpoint(folder / STAGES[-1].name)
    if state is None:
        raise FileNotFoundError(f"no checkpoint.pt in {folder / STAGES[-1].name}: train first, `steer train emoji-wan`")
    tokenizer = T5Tokenizer.from_pretrained(folder / "tokenizer")
    model = TextToVideo(tokenizer)
    model.load_state_dict(state["average"], strict=False)
    pipe = WanPipeline(
        tokenizer=tokenizer,
        text_encoder=model.text_encoder,
        vae=emoji_wan_autoencoder.trained(folder / "autoencoder"),
        scheduler=build_scheduler(),
        transformer=model.transformer,
    )
    save_pipeline(pipe, output)
