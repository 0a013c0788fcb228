"""The speed-ups that the papers of the sparse methods state, and how each is set up again for `steer reproduce`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

import steer
from steer.model_shapes import ModelShape, model_shape
from steer.plan import Plan
from steer.sparse import Sparse
from steer_patches.sites import find_sites

Sites = tuple[str, ...]


@dataclass(frozen=True)
class Setting:
    """A model at a size, and the method on it.

    Args:
        shape: of the model; its height, width, frames and steps are those of the setting.
        method: from (names of the self- and joint attention sites, heads, token grid, text tokens).
        changes: of the transformer's config, which make it small.
        run_steps: steps of a run that is really made; None = a few steps are timed and the run follows from them.
    """

    shape: ModelShape
    method: Callable[[Sites, int, tuple[int, int, int], int], Sparse]
    changes: Mapping[str, Any] = field(default_factory=dict)
    run_steps: int | None = None

    def build(self, device: torch.device | str, dtype: torch.dtype) -> tuple[torch.nn.Module, Sparse]:
        """The transformer with random weights (always the same ones), and the method for it."""
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = self.shape.build(device, dtype, **self.changes)
        sites = [site for site in find_sites(model) if site.kind in ("self", "joint")]
        method = self.method(
            tuple(site.name for site in sites), sites[0].heads, self.shape.grid(), self.shape.text_tokens
        )
        return model, method


@dataclass(frozen=True)
class Claim:
    """One published speed-up.

    Args:
        paper: name on the command line.
        title: model, size and setting in words.
        full: the published setting.
        cpu: one of the same kind that two cores manage.
        end_to_end: the published speed-up of the whole run.
        attention: the published speed-up of attention alone, where there is one.
        hardware: on which both were measured.
        source: paper and table.
    """

    paper: str
    title: str
    full: Setting
    cpu: Setting
    end_to_end: float | None
    attention: float | None
    hardware: str
    source: str


def sized(name: str, height: int, width: int, frames: int = 1, **changes: Any) -> ModelShape:
    """A published shape at another size."""
    return dataclasses.replace(model_shape(name), height=height, width=width, frames=frames, **changes)


# Small models of the real classes: attention over a few thousand tokens takes most of their time, as in the large ones.
SMALL_HUNYUAN: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "rope_axes_dim": (8, 28, 28), "num_layers": 1,
    "num_single_layers": 1, "num_refiner_layers": 1, "text_embed_dim": 64, "pooled_projection_dim": 64,
}  # fmt: skip
SMALL_WAN: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 3, "ffn_dim": 512, "text_dim": 64, "freq_dim": 64,
}  # fmt: skip
SMALL_COGVIDEOX: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "num_layers": 2, "text_embed_dim": 64, "time_embed_dim": 64,
    "max_text_seq_length": 64,
}  # fmt: skip
SMALL_FLUX: dict[str, Any] = {
    "num_attention_heads": 4, "attention_head_dim": 64, "axes_dims_rope": (8, 28, 28), "num_layers": 1,
    "num_single_layers": 1, "joint_attention_dim": 64, "pooled_projection_dim": 64,
}  # fmt: skip
SMALL_TEXT = {"text_width": 64, "text_tokens": 64}
SMALL_POOLED = {**SMALL_TEXT, "pooled_width": 64}


def small_hunyuan(frames: int = 117) -> ModelShape:
    return sized("hunyuanvideo", 256, 384, frames, **SMALL_POOLED)


def fixed(method: Sparse) -> Callable[[Sites, int, tuple[int, int, int], int], Sparse]:
    """A method that needs to know nothing of the model."""
    return lambda sites, heads, grid, text: method


def random_modes(density: float) -> Callable[[Sites, int, tuple[int, int, int], int], Sparse]:
    """Sparse-vDiT with random heads full, and the others in the three bands by turns, so that the mean is `density`."""

    def make(sites: Sites, heads: int, grid: tuple[int, int, int], text: int) -> Sparse:
        generator = torch.Generator().manual_seed(0)
        bands = torch.randint(2, 5, (1, len(sites), heads), generator=generator)
        full = torch.rand(1, len(sites), heads, generator=generator) < max(0.0, (density - 0.25) / 0.75)
        modes = torch.where(full, 0, bands).to(torch.int8)
        return steer.SparseVDiT(plan=Plan(sites, heads, tensors={"mode": modes}), steps=":", dense_layers=0)

    return make


def random_blocks(density: float, block: int = 64) -> Callable[[Sites, int, tuple[int, int, int], int], Sparse]:
    """PAROAttention with random orders and blocks of this density."""

    def make(sites: Sites, heads: int, grid: tuple[int, int, int], text: int) -> Sparse:
        generator = torch.Generator().manual_seed(0)
        n = -(-grid[0] * grid[1] * grid[2] // block)
        permutation = torch.randint(6, (len(sites), heads), generator=generator, dtype=torch.int8)
        chance = torch.rand(heads, n, n, generator=generator)
        kept = chance >= chance.flatten(1).quantile(1 - density, dim=1)[:, None, None] if n < 1024 else chance < density
        kept |= torch.eye(n, dtype=torch.bool)
        blocks = kept[None, None].expand(1, len(sites), -1, -1, -1)  # the same in every layer: a plan is large
        report = {"density": density}
        plan = Plan(
            sites, heads, grid, None, block, tensors={"permutation": permutation, "blocks": blocks}, report=report
        )
        return steer.PAROAttention(plan=plan, steps=":", dense_layers=0)

    return make


RADIAL = "arXiv 2506.19852, table 1"
GNA = "arXiv 2504.16922, table of end-to-end results without fine-tuning"

CLAIMS: tuple[Claim, ...] = (
    Claim(
        "radial",
        "HunyuanVideo, 117 frames of 768x1280, 12 of 50 steps dense",
        Setting(sized("hunyuanvideo", 768, 1280, 117), fixed(steer.RadialAttention(preset="hunyuanvideo"))),
        Setting(
            small_hunyuan(157), fixed(steer.RadialAttention(block_size=64, key_block=32)), SMALL_HUNYUAN, run_steps=12
        ),
        1.88,
        None,
        "H100",
        RADIAL,
    ),
    Claim(
        "radial",
        "Wan2.1-14B, 69 frames of 768x1280, 12 of 50 steps and the first layer dense",
        Setting(sized("wan2.1-14b", 768, 1280, 69), fixed(steer.RadialAttention(preset="wan2.1-14b"))),
        Setting(
            sized("wan2.1-14b", 384, 512, 61, **SMALL_TEXT),
            fixed(steer.RadialAttention(preset="wan2.1-14b", block_size=64, dense_layers=0)),
            SMALL_WAN,
            run_steps=8,
        ),
        1.77,
        None,
        "H100",
        RADIAL,
    ),
    Claim(
        "gna",
        "HunyuanVideo, 30x48x80 tokens, window 18x24x24, stride 16x8x8, no step dense",
        Setting(
            sized("hunyuanvideo", 768, 1280, 117),
            fixed(steer.NeighborhoodAttention(window=(18, 24, 24), stride=(16, 8, 8), steps=":", dense_layers=0)),
        ),
        Setting(
            small_hunyuan(),
            fixed(steer.NeighborhoodAttention(window=(18, 8, 8), stride=(16, 8, 8), steps=":", dense_layers=0)),
            SMALL_HUNYUAN,
            run_steps=6,
        ),
        2.23,
        9.7,  # 283.3 ms dense, 23.4 ms and 5.8 ms of permutation
        "B200; attention alone H100",
        GNA,
    ),
    Claim(
        "gna",
        "FLUX.1-dev, 4096x4096, window 80x80, stride 16x16, 9 of 28 steps dense",
        Setting(
            sized("flux.1-dev", 4096, 4096),
            fixed(steer.NeighborhoodAttention(window=(80, 80), stride=(16, 16), steps="9:", dense_layers=0)),
        ),
        Setting(
            sized("flux.1-dev", 1536, 1536, **SMALL_POOLED),
            fixed(steer.NeighborhoodAttention(window=(32, 32), stride=(16, 16), steps="0.32:", dense_layers=0)),
            SMALL_FLUX,
            run_steps=6,
        ),
        1.45,
        9.2,  # 97.4 ms dense, 7.9 ms and 2.7 ms of permutation
        "B200; attention alone H100",
        GNA,
    ),
    Claim(
        "sparse-vdit",
        "CogVideoX1.5-5B, 81 frames of 768x1360, modes at random with the published FLOPs, no step dense",
        Setting(sized("cogvideox1.5-5b", 768, 1360, 81), random_modes(0.255)),
        Setting(sized("cogvideox-2b", 256, 384, 77, **SMALL_TEXT), random_modes(0.255), SMALL_COGVIDEOX, run_steps=6),
        1.76,
        None,
        "A800",
        "arXiv 2506.03065, table 1",
    ),
    Claim(
        "re-ttention",
        "CogVideoX-2b, 49 frames of 480x720, 3.1 % of the keys, 15 of 50 steps dense, a dense refresh every 5",
        Setting(sized("cogvideox-2b", 480, 720, 49), fixed(steer.ReTtention(dense_layers=0))),
        Setting(
            sized("cogvideox-2b", 256, 384, 77, **SMALL_TEXT),
            fixed(steer.ReTtention(dense_layers=0)),
            SMALL_COGVIDEOX,
            run_steps=14,
        ),
        1.82,  # "over 45 %" of the latency saved
        12.5,  # "over 92 %" saved
        "H100, with window attention",
        "arXiv 2505.22918, abstract",
    ),
    Claim(
        "paro",
        "CogVideoX-5B, 17,550 video tokens, half of the blocks, no step dense",
        Setting(sized("cogvideox-5b", 480, 720, 49), random_blocks(0.5)),
        Setting(sized("cogvideox-2b", 256, 384, 77, **SMALL_TEXT), random_blocks(0.5), SMALL_COGVIDEOX, run_steps=6),
        None,
        1.73,
        "A100, against FlashAttention",
        "arXiv 2506.16054, operator speed-ups",
    ),
    Claim(
        "paro",
        "CogVideoX-5B, 17,550 video tokens, a fifth of the blocks, no step dense",
        Setting(sized("cogvideox-5b", 480, 720, 49), random_blocks(0.2)),
        Setting(sized("cogvideox-2b", 256, 384, 77, **SMALL_TEXT), random_blocks(0.2), SMALL_COGVIDEOX, run_steps=6),
        None,
        3.81,
        "A100, against FlashAttention",
        "arXiv 2506.16054, operator speed-ups",
    ),
    Claim(
        "vmoba",
        "Wan2.1-1.3B, 81 frames of 720x1280, k = 2, 10, 9, a quarter of the steps dense",
        Setting(sized("wan2.1-1.3b", 720, 1280, 81), fixed(steer.VMoBA(k=(2, 10, 9), dense_layers=0))),
        Setting(
            sized("wan2.1-1.3b", 240, 416, 81, **SMALL_TEXT),
            fixed(steer.VMoBA(dense_layers=0, block_size=64)),
            SMALL_WAN,
            run_steps=8,
        ),
        1.35,
        None,
        "H800",
        "arXiv 2506.23858, training-free table of the appendix",
    ),
)
PAPERS = tuple(dict.fromkeys(claim.paper for claim in CLAIMS))
