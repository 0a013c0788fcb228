"""Trains an embedded model from scratch: `python -m steer_demos.train emoji-mmdit --minutes 65`."""

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import typer
from torch import Tensor, nn
from tqdm import tqdm
from transformers import CLIPTokenizer

from steer_demos.codec import PatchCodec
from steer_demos.emoji import BACKGROUNDS, STYLES, cache_dir, caption, compose, concepts, render_all
from steer_demos.emoji_mmdit import (
    CountedTextAttention,
    TextConditioning,
    build_text_encoder,
    build_tokenizer,
    build_transformer,
    zero_token_mask,
)
from steer_demos.train_autoencoder import train_emoji_autoencoder

DROP_CAPTION = 0.1  # the unconditional share of classifier-free guidance
DROP_STYLE = 0.3
DROP_BACKGROUND = 0.3
PIPELINE_ZERO_TOKENS = 256
LEARNING_RATE = 1e-3
WARM_UP_STEPS = 200
DECAY_SHARE = 0.35
EMA_DECAY = 0.999
SECONDS_PER_CHECKPOINT = 240


def all_pictures() -> Tensor:
    """Every (concept, style, background): (C, S, B, 3, 64, 64) float32 in [-1, 1]."""
    renders = render_all()
    pictures = np.stack([compose(renders, colour) for colour in BACKGROUNDS.values()], axis=2)
    return torch.from_numpy(pictures).movedim(-1, 3).contiguous()


class EmojiBatches:
    """Draws batches of (latents, token ids) from tensors that hold the whole data set."""

    def __init__(self, pictures: Tensor, codec: PatchCodec, tokenizer: CLIPTokenizer, device: torch.device) -> None:
        grid = pictures.shape[:3]
        self.latents = codec.encode(pictures.flatten(0, 2)).unflatten(0, grid).to(device)
        styles, backgrounds = [*STYLES, None], [*BACKGROUNDS, None]  # the last row of each leaves it out
        captions = [
            caption(concept, style, background, article)
            for concept in concepts()
            for style in styles
            for background in backgrounds
            for article in (False, True)
        ]
        ids = tokenizer(["", *captions], padding="max_length", truncation=True, return_tensors="pt").input_ids
        self.empty_ids = ids[0].to(device)
        self.ids = ids[1:].unflatten(0, (len(concepts()), len(styles), len(backgrounds), 2)).to(device)

    def draw(self, size: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Latents (size, 16, 16, 16) and token ids (size, 16), parts of the captions left out at random."""
        device = self.latents.device

        def pick(count: int) -> Tensor:
            return torch.randint(count, (size,), generator=generator, device=device)

        def chance(share: float) -> Tensor:
            return torch.rand(size, generator=generator, device=device) < share

        concept, style, background = (pick(count) for count in self.latents.shape[:3])
        told_style = style.masked_fill(chance(DROP_STYLE), len(STYLES))
        told_background = background.masked_fill(chance(DROP_BACKGROUND), len(BACKGROUNDS))
        ids = self.ids[concept, told_style, told_background, pick(2)]
        ids = torch.where(chance(DROP_CAPTION)[:, None], self.empty_ids, ids)
        return self.latents[concept, style, background], ids


class TextToImage(nn.Module):
    """The trained parts, and their rectified-flow loss."""

    def __init__(self, tokenizer: CLIPTokenizer) -> None:
        super().__init__()
        self.text = TextConditioning(
            build_text_encoder(tokenizer, 2, "quick_gelu"), build_text_encoder(tokenizer, 3, "gelu")
        )
        self.transformer = build_transformer()

    def train_attention(self) -> None:
        """Switch to the attention that counts zero tokens instead of repeating them."""
        self.transformer.set_attn_processor(CountedTextAttention())

    def loss(self, latents: Tensor, ids: Tensor, noise: Tensor, sigmas: Tensor, zero_tokens: Tensor) -> Tensor:
        """Mean square error of the velocity `noise - latents` at `sigmas` (B,) in (0, 1]; see `zero_token_mask`."""
        tokens, pooled = self.text(ids)
        mixed = torch.lerp(latents, noise, sigmas[:, None, None, None])
        velocity = self.transformer(
            mixed,
            encoder_hidden_states=tokens,
            pooled_projections=pooled,
            timestep=sigmas * 1000,
            joint_attention_kwargs={"attention_mask": zero_token_mask(zero_tokens)},
            return_dict=False,
        )[0]
        return (velocity - (noise - latents)).square().mean()


def draw_sigmas(size: int, mean: float, generator: torch.Generator, device: torch.device) -> Tensor:
    """Noise levels (size,): logit-normal around `mean`, one in eight uniform so that both ends are seen."""
    normal = (torch.randn(size, generator=generator, device=device) + mean).sigmoid()
    uniform = torch.rand(size, generator=generator, device=device)
    return torch.where(torch.rand(size, generator=generator, device=device) < 0.125, uniform, normal)


@dataclass
class Budget:
    """How long to train: minutes of wall time or a number of images, whichever is given."""

    minutes: float | None
    images: int | None

    def progress(self, seconds: float, images: int) -> float:
        """The share of the budget that is spent, from 0 to 1."""
        spent = [0.0]
        if self.minutes is not None:
            spent.append(seconds / (60 * self.minutes))
        if self.images is not None:
            spent.append(images / self.images)
        return min(max(spent), 1.0)


def learning_rate(step: int, progress: float) -> float:
    """Linear warm-up over steps, constant, then linear to zero over the last share of the budget."""
    return LEARNING_RATE * min((step + 1) / WARM_UP_STEPS, (1 - progress) / DECAY_SHARE, 1.0)


def saved_tokenizer(folder: Path) -> CLIPTokenizer:
    """The tokenizer that the checkpoint in `folder` was trained with; made and saved there when training begins."""
    path = folder / "tokenizer"
    if not path.exists():
        build_tokenizer().save_pretrained(path)
    return CLIPTokenizer.from_pretrained(path)


def save_checkpoint(path: Path, **state: object) -> None:
    """Write next to `path`, then rename: a killed run leaves the previous checkpoint whole."""
    partial = path.with_suffix(".partial")
    torch.save(state, partial)
    partial.replace(path)


def train_emoji_mmdit(
    output: Path, budget: Budget, batch_size: int, seed: int, sigma_mean: float, compile_model: bool
) -> None:
    """Train the text encoders and the transformer; continues from `output/checkpoint.pt` where there is one."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    output.mkdir(parents=True, exist_ok=True)
    torch.manual_seed(seed)
    pictures = all_pictures()
    path = output / "checkpoint.pt"
    state = torch.load(path, map_location=device, weights_only=False) if path.exists() else None
    codec = state["codec"] if state else PatchCodec.fit(pictures.flatten(0, 2))
    tokenizer = saved_tokenizer(output)
    batches = EmojiBatches(pictures, codec, tokenizer, device)
    model = TextToImage(tokenizer).to(device)
    model.train_attention()
    average = {name: value.detach().clone() for name, value in model.state_dict().items()}
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.0, betas=(0.9, 0.99), weight_decay=0.01, fused=True)
    generator = torch.Generator(device).manual_seed(seed)
    step, seconds, history = 0, 0.0, []

    if state:
        model.load_state_dict(state["model"])
        optimizer.load_state_dict(state["optimizer"])
        generator.set_state(state["generator"].cpu())
        average, step, seconds, history = state["average"], state["step"], state["seconds"], state["history"]

    loss_function = torch.compile(model.loss) if compile_model else model.loss
    names, values = zip(*((name, value) for name, value in model.state_dict().items()), strict=True)
    started, saved, running = time.monotonic() - seconds, time.monotonic(), None

    def checkpoint() -> None:
        save_checkpoint(
            path,
            model=model.state_dict(),
            average=average,
            optimizer=optimizer.state_dict(),
            generator=generator.get_state(),
            codec=codec,
            step=step,
            seconds=seconds,
            history=history,
        )

    bar = tqdm(total=100, desc="training", unit="%", bar_format="{l_bar}{bar}| {elapsed}<{remaining}{postfix}")
    while (progress := budget.progress(seconds, step * batch_size)) < 1:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(step, progress)
        latents, ids = batches.draw(batch_size, generator)
        noise = torch.randn(latents.shape, generator=generator, device=device)
        sigmas = draw_sigmas(batch_size, sigma_mean, generator, device)
        # Half of the batch sees the pipeline's default, half a pipeline called with max_sequence_length=0.
        zero_tokens = torch.tensor([0, PIPELINE_ZERO_TOKENS], device=device).repeat(batch_size // 2)
        with torch.autocast(device.type, torch.bfloat16, enabled=device.type == "cuda"):
            loss = loss_function(latents, ids, noise, sigmas, zero_tokens)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        step += 1
        seconds = time.monotonic() - started
        decay = min(EMA_DECAY, (1 + step) / (10 + step))
        floating = [
            (average[name], value) for name, value in zip(names, values, strict=True) if value.is_floating_point()
        ]
        torch._foreach_lerp_([old for old, _ in floating], [new for _, new in floating], 1 - decay)

        running = loss.item() if running is None else 0.98 * running + 0.02 * loss.item()
        bar.n = round(100 * progress, 1)
        bar.set_postfix(step=step, loss=f"{running:.4f}", rate=f"{step * batch_size / seconds:.1f}/s", refresh=False)
        bar.update(0)
        if step % 100 == 0:
            history.append((step * batch_size, round(seconds), round(running, 4)))
            rows = ["images,seconds,loss", *(",".join(map(str, row)) for row in history)]
            (output / "loss.csv").write_text("\n".join(rows) + "\n")
        if time.monotonic() - saved > SECONDS_PER_CHECKPOINT:
            saved = time.monotonic()
            checkpoint()
    bar.close()
    checkpoint()


def train(
    model: Annotated[str, typer.Argument(help="emoji-mmdit, or emoji-autoencoder for its VAE.")] = "emoji-mmdit",
    minutes: Annotated[float | None, typer.Option(help="Stop after this much wall time.")] = None,
    images: Annotated[int | None, typer.Option(help="Stop after this many training images.")] = None,
    output: Annotated[Path | None, typer.Option(help="Folder of checkpoints; default: the cache folder.")] = None,
    batch_size: Annotated[int, typer.Option(help="Images per step, an even number.")] = 32,
    seed: Annotated[int, typer.Option(help="Seed of initial weights and data order.")] = 0,
    sigma_mean: Annotated[float, typer.Option(help="Mean of the logit of the noise level.")] = 0.0,
    compile_model: Annotated[bool, typer.Option("--compile/--no-compile", help="Use torch.compile.")] = True,
) -> None:
    """Train an embedded model from scratch, or continue a run that was stopped."""
    if model not in ("emoji-mmdit", "emoji-autoencoder"):
        raise typer.BadParameter(f"cannot train {model!r}; what can be trained: emoji-mmdit, emoji-autoencoder")
    if minutes is None and images is None:
        raise typer.BadParameter("give a budget: --minutes 65 or --images 200000")
    folder = output or cache_dir() / "training" / "emoji-mmdit"
    if model == "emoji-autoencoder":
        checkpoint = folder / "checkpoint.pt"
        if checkpoint.exists():
            codec = torch.load(checkpoint, map_location="cpu", weights_only=False)["codec"]
        else:
            codec = PatchCodec.fit(all_pictures().flatten(0, 2))
        train_emoji_autoencoder(folder, Budget(minutes, images), codec, seed)
    else:
        train_emoji_mmdit(folder, Budget(minutes, images), batch_size, seed, sigma_mean, compile_model)


if __name__ == "__main__":
    typer.run(train)
