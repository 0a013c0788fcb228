"""What the tab of clips shows: two clips and their difference as one film, the mask of the run, what can be gained."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any, ClassVar

import imageio.v3 as imageio
import numpy as np
import pytest
import torch
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

import steer
from steer.sparse import Prepared, Sparse, Tokens
from steer_demos import models
from steer_demos.app import blocks, drawing, video
from steer_demos.app.jobs import Job
from steer_demos.app.stage import Loaded
from steer_kernels import BlockMask
from steer_patches.site import Site

PROMPT = "a car moving left on a pink background"


@pytest.fixture(scope="module")
def loaded() -> Loaded:
    return Loaded("emoji-wan", "clips", models.load("emoji-wan", device="cpu", dtype=torch.float32), warm=True)


def run(loaded: Loaded, method: Any, layer: int = 0, steps: int = 2) -> tuple[Any, blocks.Seen, Any]:
    """The comparison, what was seen, and what the tab makes of it."""
    with blocks.watching(loaded.model) as seen:
        found = drawing.draw_pair(loaded, method, PROMPT, Job(), seed=0, steps=steps, guidance_scale=1.0)
    return found, seen, video.measured(loaded, method, found, seen, layer, steps)


@dataclass(kw_only=True)
class Known(Sparse, register=False):
    """Blocks that are written down: `keep` of a (layers, heads, blocks, blocks) tensor."""

    keep: torch.Tensor = dataclasses.field(default_factory=lambda: torch.ones(0))
    defaults: ClassVar[dict[str, Any]] = {"steps": ":"}

    def make(self, tokens: Tokens, site: Site) -> Prepared:
        mask = BlockMask.from_bool(self.keep[None, site.layer], self.block_size or 0, q_len=576, kv_len=576)
        return self.once(site.name, tokens, lambda: Prepared(tokens, mask))


def test_the_picture_shows_the_mask_of_the_chosen_layer_head_by_head(loaded: Loaded) -> None:
    keep = torch.rand(6, 6, 36, 36, generator=torch.Generator().manual_seed(0)) < 0.3
    keep |= torch.eye(36, dtype=torch.bool)
    _, _, (rows, picture, caption) = run(loaded, Known(keep=keep, block_size=16), layer=4)
    assert "`blocks.4.attn1` (6 heads" in caption
    for head in range(6):
        side = 252 + 2  # 7 pixels a block, and a frame of one
        left = blocks.SIDES + head % 3 * (side + blocks.GAP) + 1
        top = blocks.TOP + head // 3 * (side + blocks.GAP + blocks.LABEL) + blocks.LABEL + 1
        drawn = np.asarray(picture.convert("L"))[top + 3 : top + 252 : 7, left + 3 : left + 252 : 7]
        assert np.array_equal(drawn < 128, keep[4, head].numpy())
    share = 100 * float(keep.double().mean())
    assert rows["density"].startswith(f"{share:.1f} % of the attention map while it was on, {share:.1f} %")


def test_heads_that_are_alike_are_drawn_once(loaded: Loaded) -> None:
    _, _, (_, picture, caption) = run(loaded, steer.RadialAttention(block_size=64, dense_layers=0, steps=":"))
    assert "all heads are alike" in caption and "9 x 9 blocks of 64 tokens" in caption
    size = (picture.width - blocks.SIDES - blocks.GAP - 2) // 9
    top = blocks.TOP + 1 + size // 2
    drawn = np.asarray(picture.convert("L"))[top : top + 9 * size : size, blocks.SIDES + 1 + size // 2 :: size][:, :9]
    # a frame is a block here: neighbours are seen whole, and the first frame by all
    frame = np.arange(9)
    near = np.abs(frame[:, None] - frame) <= 1
    assert (drawn[near | (frame == 0)] < 128).all()
    assert (drawn[:, 1:][np.abs(frame[:, None] - frame[1:]) > 4] == 255).all()


def test_fitted_methods_say_what_each_head_has(loaded: Loaded) -> None:
    for name, word in (("SparseVDiT", "diagonal"), ("PAROAttention", "THW")):
        folder = models.fitted("emoji-wan", name)
        assert folder is not None
        method = steer.load(str(folder))
        with blocks.watching(loaded.model) as seen:
            drawing.draw_pair(loaded, method, PROMPT, Job(), seed=0, steps=2, guidance_scale=1.0)
        there = [blocks.blocks(seen.bindings[0], layer) for layer in range(6)]
        assert [len(each.heads) for each in there] == [6] * 6
        assert any(label.endswith(word) for each in there for label in each.heads)
        means = [mask.density for each in there for mask in each.heads.values()]
        assert sum(means) / len(means) == pytest.approx(there[0].density)


@pytest.mark.parametrize("layer", [0, 1, 2])
def test_blocks_that_are_chosen_in_the_call_are_those_of_the_last_one(
    loaded: Loaded, layer: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    kept: list[torch.Tensor] = []

    def written_down(self: Any, call: Any, *rest: Any) -> torch.Tensor:
        keep = choose(self, call, *rest)
        if call.site.name == f"blocks.{layer}.attn1":
            kept.append(keep)
        return keep

    choose = steer.VMoBA._keep
    monkeypatch.setattr(steer.VMoBA, "_keep", written_down)
    _, seen, (rows, picture, caption) = run(loaded, steer.VMoBA(block_size=16), layer, steps=3)
    in_the_run = kept[-3]  # behind it come the forward of the picture, and the look at it
    assert len(kept) == 2 + 2 and not torch.equal(kept[0], in_the_run)  # on in two of three steps
    there = blocks.chosen_again(loaded.model, seen, seen.bindings[0], layer)
    assert there is not None and there.density is not None
    assert [mask.to_bool()[0, 0].tolist() for mask in there.heads.values()] == in_the_run[0].tolist()
    assert picture is not None and "6 heads, each with a mask of its own" in caption
    assert "here in the last one" in caption and ("whole frames", "windows", "boxes")[layer] in caption
    assert rows["density"].startswith(f"{100 * there.density:.1f} %")
    assert "_steer_state" not in loaded.model.__dict__ and steer.sites(loaded.model)


def test_methods_that_compute_everything_have_no_mask(loaded: Loaded) -> None:
    _, _, (rows, picture, caption) = run(loaded, steer.PAG(scale=2.0, layers="blocks.3"))
    assert picture is None and "computes all of the attention" in caption
    assert "density" not in rows and "speed-up" in rows["with it"]
    _, _, (rows, picture, caption) = run(loaded, steer.RadialAttention(block_size=16, steps="5:"))
    assert picture is None and "was on in none of these steps" in caption
    assert rows["difference"] == "none, to the bit"


def test_the_bound_counts_what_a_forward_multiplies(loaded: Loaded) -> None:
    method = steer.NeighborhoodAttention(window=(5, 5, 6), block_size=16, steps=":")
    _, seen, (rows, _, _) = run(loaded, method)
    inputs = seen.inputs["transformer"]
    real = {k: torch.zeros(v.shape, dtype=v.dtype) if isinstance(v, torch.Tensor) else v for k, v in inputs.items()}
    with torch.no_grad(), sdpa_kernel(SDPBackend.MATH), FlopCounterMode(display=False) as counter:
        loaded.model.transformer(**real)
    assert blocks.forward_flops(loaded.model.transformer, inputs) == counter.get_total_flops()
    share = 6 * 4 * 192 * 576**2 / counter.get_total_flops()
    density = blocks.blocks(seen.bindings[0], 0).density
    assert density is not None
    assert rows["at best"].startswith(f"speed-up {1 / (1 - share + share * density):.2f}, ")
    half = blocks.bound(loaded.model, seen, seen.bindings[0], 0.0, 2)
    assert half is not None and half.speedup == pytest.approx(1 / (1 - share))


def test_nothing_is_left_on_the_model(loaded: Loaded) -> None:
    with pytest.raises(ZeroDivisionError), blocks.watching(loaded.model):
        raise ZeroDivisionError
    assert not loaded.model.transformer._forward_pre_hooks


def clip(seed: int, frames: int = 3) -> list[Image.Image]:
    noise = np.random.default_rng(seed).integers(0, 100, (frames, 8, 8, 3), dtype=np.uint8)
    return [Image.fromarray(frame) for frame in noise]


def test_the_film_has_both_clips_and_their_difference_with_one_brightness() -> None:
    one, other = clip(0), clip(0)
    other[1] = Image.fromarray(np.asarray(one[1]) + np.uint8(50))
    other[2] = Image.fromarray(np.asarray(one[2]) + np.uint8(100))
    film = video.beside({"without": one, "PAG": other})
    assert len(film) == 3 and film[0].width % 2 == film[0].height % 2 == 0
    for frame, (a, b, expected) in zip(film, zip(one, other, (0, 127, 255), strict=True), strict=True):
        columns = [np.asarray(frame)[16:256:32, 16 + start : start + 256 : 32] for start in (0, 264, 528)]
        assert np.array_equal(columns[0], np.asarray(a)) and np.array_equal(columns[1], np.asarray(b))
        assert (columns[2] == expected).all()
    same = video.beside({"without": one, "PAG": one})
    assert np.asarray(same[0])[:256, 528:784].max() == 0


def test_the_film_is_a_clip_that_a_decoder_reads_back() -> None:
    film = video.beside({"without": clip(0, 17), "PAG": clip(1, 17)})
    written = video.as_mp4(film)
    read = imageio.imread(written, extension=".mp4", plugin="FFMPEG")
    assert read.shape == (17, *np.asarray(film[0]).shape)
    error = np.square(read.astype(float) - np.stack([np.asarray(frame) for frame in film])).mean()
    assert 10 * np.log10(255**2 / error) > 25
    assert imageio.immeta(written, extension=".mp4", plugin="FFMPEG")["duration"] == pytest.approx(17 / 8, abs=0.05)


def test_sizes(loaded: Loaded) -> None:
    assert video.size_of(loaded, 0, 0, 0) == {}
    assert video.size_of(loaded, 9, 0, 32) == {"num_frames": 9, "width": 32}
    elsewhere = dataclasses.replace(loaded, name="owner/name")
    assert video.size_of(elsewhere, 81, 480, 832) == {"num_frames": 81, "height": 480, "width": 832}
    for wrong in (-1, 8.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="must be a whole number; 0 = the model's own"):
            video.size_of(loaded, wrong, 0, 0)
    with pytest.raises(ValueError, match="too large here: at most 557,056"):
        video.size_of(loaded, 0, 512, 512)


def test_layers_that_do_not_exist_are_refused_before_anything_is_drawn(loaded: Loaded) -> None:
    method = steer.RadialAttention(block_size=16)
    assert video.layer_of(loaded, method, 4) == 4
    for wrong in (5, -1, 0.5):
        with pytest.raises(ValueError, match="acts in 5 layers here, give 0 to 4"):
            video.layer_of(loaded, method, wrong)
    assert video.layer_of(loaded, steer.PAG(layers="blocks.3"), 9) == 0


def test_small_models_get_small_blocks_unless_others_are_asked_for() -> None:
    assert video.for_small("emoji-wan", "RadialAttention", {"decay": 0.5}, "") == {"decay": 0.5, "block_size": 16}
    assert video.for_small("emoji-wan", "RadialAttention", {"block_size": 32}, "") == {"block_size": 32}
    for model, method, saved in (
        ("owner/name", "RadialAttention", ""),
        ("emoji-wan", "PAG", ""),
        ("emoji-wan", "SparseVDiT", ""),
        ("emoji-wan", "VMoBA", "folder"),
        ("emoji-wan", "no such method", ""),
    ):
        assert video.for_small(model, method, {}, saved) == {}


def test_methods_of_the_tab() -> None:
    assert {"RadialAttention", "SparseVDiT", "ReTtention", "PAG", "SEG", "SLG"} <= set(video.methods())
    assert not {"StreamingLLM", "VAR", "ACT"} & set(video.methods())
    assert all(example["method"] in video.methods() for example in video.EXAMPLES.values())
