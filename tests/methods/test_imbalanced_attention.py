"""ImbalancedAttention against the card's formula on whole maps of the real classes, and what it reads of towers."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
import torch
from tiny import build
from tiny_vision_language import (
    BATCH,
    IMAGE,
    MODELS,
    NEW,
    ONE,
    TWO_PICTURES,
    VIDEO,
    WITHOUT,
    Picture,
    Video,
    greedy,
    inputs,
    model_of,
)
from torch import Tensor
from transformers import CompileConfig, DynamicCache, LogitsProcessor, LogitsProcessorList

import steer
from steer.methods import imbalanced_attention
from steer.methods.imbalanced_attention import ImbalancedAttention, salient
from steer.patch_scores import attention_received, tower_ends
from steer.without_pictures import CUT, guided
from steer_patches.pictures import Pictures
from steer_patches.site import Call, Site

EXACT = 1e-10
EAGER = 1e-5  # transformers makes eager softmaxes in float32
MIXED = [[12], [3, Picture((2, 1)), 5]]  # a row without a picture, and one with
SETTINGS: dict[str, Any] = {"summary": 0.3, "gamma": 1.0}  # random attention has no outliers
PROMPTS = {"one": ONE, "two pictures": TWO_PICTURES, "batch": BATCH, "a row without": MIXED}


def double(name: str, attention: str = "sdpa") -> Any:
    model = build(MODELS[name]).double()
    model.set_attn_implementation(attention)
    return model


def exact(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if isinstance(v, Tensor) and v.is_floating_point() else v for k, v in given.items()}


def outputs(model: Any, given: dict[str, Any], **options: Any) -> Any:
    with torch.no_grad():
        return model(**given, **options)


def decoder(model: Any) -> list[Any]:
    names = [site.name for site in steer.sites(model) if site.kind == "causal"]
    return [model.get_submodule(name) for name in names]


@dataclass
class Reading:
    """What steer took from the tower for one prompt: scores of both layers, and the pictures."""

    scores: list[Tensor]
    pictures: Pictures
    strength: Tensor


def read(monkeypatch: pytest.MonkeyPatch, model: Any, given: dict[str, Any], **settings: Any) -> Reading:
    """steer's own reading, by looking at its calls."""
    scores: list[Tensor] = []
    found: dict[str, Any] = {}

    def token_scores(*args: Any) -> Tensor:
        scores.append(original(*args))
        return scores[-1]

    def strength(self: ImbalancedAttention, scope: Any, text: Any, pictures: Pictures, known: Any) -> Tensor:
        found["pictures"] = pictures
        found["strength"] = picked(self, scope, text, pictures, known)
        return found["strength"]

    original, picked = imbalanced_attention.token_scores, ImbalancedAttention._strength
    with monkeypatch.context() as patch, steer.apply(model, ImbalancedAttention(**{**SETTINGS, **settings})):
        patch.setattr(imbalanced_attention, "token_scores", token_scores)
        patch.setattr(ImbalancedAttention, "_strength", strength)
        outputs(model, given)
    assert len(scores) == 2
    return Reading(scores, found["pictures"], found["strength"])


# what is salient


@pytest.mark.parametrize("tokens", [4, 10, 577])
@pytest.mark.parametrize("summary", ["outliers", 0.05, 0.0, 1.0])
@pytest.mark.parametrize("ratio", [0.0, 0.25, 0.5])
def test_the_card_s_sets(tokens: int, summary: str | float, ratio: float) -> None:
    draw = np.random.default_rng(tokens)
    first, second = draw.standard_normal(tokens), draw.standard_t(2, tokens)
    local, marked = salient(torch.tensor(first), torch.tensor(second), ratio, summary)
    order = np.argsort(-second)
    if summary == "outliers":
        low, high = np.percentile(second, [25, 75])
        m = {j for j in range(tokens) if second[j] > high + 1.5 * (high - low)}
        assert m or tokens < 500
    else:
        m = set(order[: round(float(summary) * tokens)].tolist())
    top = set(np.argsort(-first)[: round(ratio * tokens)].tolist())
    assert set(marked.nonzero().flatten().tolist()) == m
    assert set(local.nonzero().flatten().tolist()) == top - m


def test_sizes_of_llava() -> None:
    """576 tokens: 144 of them, without those that are outliers as well."""
    g = torch.Generator().manual_seed(0)
    first, second = torch.rand(576, generator=g), torch.rand(576, generator=g).pow(8)
    local, marked = salient(first, second, 0.25, "outliers")
    best = set(first.topk(144).indices.tolist())
    assert 0 < marked.sum() < 144
    assert local.sum() == 144 - len(best & set(marked.nonzero().flatten().tolist())) < 144
    assert not (local & marked).any()


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -1},
        {"gamma": -0.1},
        {"local_ratio": 1.2},
        {"cutoff": 2},
        {"summary": "mean"},
        {"summary": 1.5},
        {"dense_layers": -1},
    ],
)
def test_settings_out_of_range(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(wrong))):
        ImbalancedAttention(**wrong)


# the tower


@pytest.mark.parametrize(("layers", "end"), [(-2, 1), (-1, 1), (None, 1), (2, 1), (1, 0), (-3, 0), ([-3, -2], 1)])
def test_the_layer_that_features_come_from(layers: Any, end: int) -> None:
    """hidden_states[-2] and hidden_states[2] of three layers are the output of layer 1."""
    config = type("Config", (), {"vision_feature_layer": layers})()
    sites = [Site(str(i), i, kind, 2, 2, 8, "sdpa") for i, kind in enumerate(["self"] * 3 + ["causal"] * 4)]
    assert [site.index for site in tower_ends(config, sites)] == [0, end]


Attention = Callable[[Any, Tensor], None]  # (module, its scores (B, H, S, T), to be changed in place)


@contextmanager
def dense(
    monkeypatch: pytest.MonkeyPatch, model: Any, edit: Attention, look: Attention | None = None
) -> Iterator[None]:
    """Every attention of an eager model through its whole map, in its own precision, with edited scores.

    transformers' own eager attention makes its softmax in float32. `look` gets the map.
    """
    homes = {sys.modules[type(model.get_submodule(site.name)).__module__] for site in steer.sites(model)}

    def attention(
        module: Any, query: Tensor, key: Tensor, value: Tensor, attention_mask: Any, scaling: float, **kwargs: Any
    ) -> Any:
        groups = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(groups, 1), value.repeat_interleave(groups, 1)
        scores = query @ key.mT * scaling
        edit(module, scores)
        if attention_mask is not None:
            scores = scores + attention_mask[..., : key.shape[2]]
        elif module.is_causal:
            scores = scores + torch.full_like(scores, -torch.inf).triu(1 + key.shape[2] - query.shape[2])
        weights = scores.softmax(-1)
        if look is not None:
            look(module, weights)
        return (weights @ value).transpose(1, 2).contiguous(), weights

    with monkeypatch.context() as patch:
        for home in homes:
            patch.setattr(home, "eager_attention_forward", attention)
        yield


def maps_of_tower(monkeypatch: pytest.MonkeyPatch, model: Any, given: dict[str, Any]) -> list[list[Tensor]]:
    """The whole maps of the layers 0 and 1 of the tower, all calls of each."""
    names = [site.name for site in steer.sites(model) if site.kind == "self"]
    towers = [model.get_submodule(names[end]) for end in (0, 1)]
    maps: list[list[Tensor]] = [[], []]

    def look(module: Any, weights: Tensor) -> None:
        for layer, tower in enumerate(towers):
            if module is tower:
                maps[layer].append(weights)

    with dense(monkeypatch, model, lambda module, scores: None, look):
        outputs(model, given)
    return maps


def by_the_model(
    monkeypatch: pytest.MonkeyPatch, name: str, model: Any, given: dict[str, Any], maps: list[Tensor]
) -> Tensor:
    """(n,): the scores of all tokens of pictures, maps sent through the model's own order of features."""
    if name in ("llava", "llava_next"):
        scores = torch.cat([one[:, :, 0].sum(1)[:, 1:] for one in maps])  # (inputs, patches), by the class token
    else:
        scores = torch.cat([one.sum((1, 2)).flatten() for one in maps])
    if name.startswith("qwen"):
        tower = model.model.visual
        with monkeypatch.context() as patch, torch.no_grad():
            patch.setattr(tower.merger, "forward", lambda hidden: scores.view(-1, 4).mean(1, keepdim=True))
            pixels = given["pixel_values"]
            return tower(pixels.to(tower.dtype), grid_thw=given["image_grid_thw"]).pooler_output.flatten()
    patches = scores.view(-1, 16)
    if name in ("idefics3", "smolvlm"):
        return model.model.connector.pixel_shuffle(patches[..., None], 2).mean(-1).flatten()
    if name in ("llava", "paligemma"):
        return patches.flatten()
    counts = [max(picture.tiles[0] * picture.tiles[1], 2) + 1 for row in TWO_PICTURES for picture in row if isinstance(picture, Picture)]  # fmt: skip  # noqa: E501
    parts = patches[..., None].split(counts)
    options = {"vision_feature_select_strategy": "default"} if name == "llava_next" else {}
    newline = torch.full((1,), -1.0, dtype=scores.dtype)  # no score is
    packed, _ = model.model.pack_image_features(list(parts), given["image_sizes"], image_newline=newline, **options)
    joined = torch.cat(list(packed)).flatten()
    return joined[joined >= 0]


@pytest.mark.parametrize("name", MODELS)
def test_scores_of_tokens_are_where_the_model_puts_the_features(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    rows = TWO_PICTURES if name != "qwen2_5_vl" else [[2, Picture((2, 3)), 3, Picture((1, 2)), 6]]  # several windows
    given = exact(inputs(name, rows))
    if name == "llava_onevision":
        given["batch_num_images"] = torch.tensor([1, 1])  # else two pictures of a row have no tiles
        with torch.no_grad():
            sizes = [len(f) for f in double(name).get_image_features(**{k: given[k] for k in ("pixel_values", "image_sizes", "batch_num_images")}).pooler_output]  # fmt: skip  # noqa: E501
        line = [1, 2, *[IMAGE] * sizes[0], 3, *[IMAGE] * sizes[1], 4, 5]
        given |= {"input_ids": torch.tensor([line]), "attention_mask": torch.ones(1, len(line), dtype=torch.int64)}
    model = double(name, "eager")
    maps = maps_of_tower(monkeypatch, model, given)
    steered = double(name)
    found = read(monkeypatch, steered, given)
    for layer in (0, 1):
        wanted = by_the_model(monkeypatch, name, model, given, maps[layer])
        ours = found.scores[layer][found.pictures.shows]
        assert ours.shape == wanted.shape
        assert ours.std() > 1e-4 * ours.mean()
        assert (ours - wanted).abs().max() <= EXACT


@pytest.mark.parametrize("name", ["llava_onevision", "qwen2_vl", "qwen2_5_vl"])
def test_videos(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each frame is a picture of its own; with pictures in the same prompt the maps are not mixed up."""
    alone, both = (exact(inputs(name, rows)) for rows in ([[2, Video(4), 3]], [[2, Picture(), 2, Video(4), 3]]))
    both["pixel_values_videos"] = alone["pixel_values_videos"]
    model = double(name)
    one, two = (read(monkeypatch, model, given, summary=0.25) for given in (alone, both))
    of_video = [given["input_ids"] == VIDEO for given in (alone, both)]
    for layer in (0, 1):
        ours, others = one.scores[layer][of_video[0]], two.scores[layer][of_video[1]]
        assert (ours - others).abs().max() <= EXACT
    frames = one.pictures.number[one.pictures.shows].unique()
    assert len(frames) == (4 if name == "llava_onevision" else 2)
    for frame in frames:
        assert (one.strength[one.pictures.number == frame] == 0.3).sum() == 1  # a quarter of four


def test_received_attention_of_packed_inputs_and_of_padding() -> None:
    g = torch.Generator().manual_seed(0)
    query, key, value = (torch.randn(1, 2, 20, 8, generator=g, dtype=torch.float64) for _ in range(3))
    site = Site("tower", 0, "self", 2, 2, 8, "sdpa")
    call = Call(query, key, value, None, 0.3, False, site, 0)
    bounds = torch.tensor([0, 4, 12, 20], dtype=torch.int32)
    packed = attention_received(call.replace(extra={"cu_seq_lens_q": bounds}), False)
    for start, end in ((0, 4), (4, 12), (12, 20)):
        weights = (0.3 * query[:, :, start:end] @ key[:, :, start:end].mT).softmax(-1)
        assert (packed[:, start:end] - weights.sum((1, 2))).abs().max() <= EXACT
    real = torch.arange(20) < 15
    padded = attention_received(call.replace(mask=real[None, None, None].expand(1, 1, 20, 20)), False)
    weights = (0.3 * query[:, :, :15] @ key[:, :, :15].mT).softmax(-1)
    assert (padded[:, :15] - weights.sum((1, 2))).abs().max() <= EXACT
    assert not padded[:, 15:].any()


# the edit


def by_the_card(monkeypatch: pytest.MonkeyPatch, model: Any, strength: Tensor, last: Tensor | None = None) -> Any:
    """`dense` with the scores of the decoder's layers from 2 on edited entry by entry.

    Args:
        strength: (B, S) of the prompt's tokens. last: (B,) the last real token of each row; None = the last.
    """
    modules = decoder(model)[2:]

    def edit(module: Any, scores: Tensor) -> None:
        if not any(module is one for one in modules):
            return
        gains = strength.repeat_interleave(len(scores) // len(strength), 0)  # beams
        for row in range(len(scores)):
            at = -1 if last is None or scores.shape[2] == 1 else int(last[row])
            for token in gains[row].nonzero().flatten().tolist():
                scores[row, :, at, token] += gains[row, token] * scores[row, :, at, token].abs()

    return dense(monkeypatch, model, edit)


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("rows", PROMPTS.values(), ids=PROMPTS)
@pytest.mark.parametrize("name", MODELS)
def test_prompts_equal_the_dense_formula(name: str, rows: Any, side: str, monkeypatch: pytest.MonkeyPatch) -> None:
    given = exact(inputs(name, rows, side))
    model, eager = double(name), double(name, "eager")
    strength = read(monkeypatch, model, given).strength
    assert {0.0, 0.3} <= set(strength.unique().tolist()) <= {0.0, 0.3, 0.7}
    last = torch.tensor([int(line.nonzero().max()) for line in given["attention_mask"]])
    with by_the_card(monkeypatch, eager, strength, last):
        wanted = outputs(eager, given).logits
    plain = outputs(model, given).logits
    for base in (model, eager)[: 1 if side == "left" else 2]:  # eager attention in float64 has NaN at padding before
        with steer.apply(base, ImbalancedAttention(**SETTINGS)):
            edited = outputs(base, given).logits
        at = (torch.arange(len(last)), last)
        assert (edited[at] - wanted[at]).abs().max() <= (EXACT if base is model else EAGER)
        with_picture = strength.any(-1)
        assert ((edited[at] - plain[at]).abs().amax(-1)[with_picture] > 1e-4).all()
    assert torch.equal(outputs(model, given).logits, plain)


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_decode_equals_the_dense_formula(name: str, beams: int, monkeypatch: pytest.MonkeyPatch) -> None:
    given = exact(inputs(name, BATCH))
    model, eager = double(name), double(name, "eager")
    strength = read(monkeypatch, model, given).strength
    options = {"num_beams": beams, "max_new_tokens": NEW, "min_new_tokens": NEW, "do_sample": False,
               "return_dict_in_generate": True, "output_scores": True}  # fmt: skip
    with by_the_card(monkeypatch, eager, strength):
        wanted = eager.generate(**given, **options)
    with steer.apply(model, ImbalancedAttention(**SETTINGS)):
        edited = model.generate(**given, **options)
    assert torch.equal(edited.sequences, wanted.sequences)
    for ours, theirs in zip(edited.scores, wanted.scores, strict=True):
        seen = theirs > -torch.inf
        assert (ours - theirs)[seen].abs().max() <= 1e-5  # generate makes float32 of them


@pytest.mark.parametrize("name", MODELS)
def test_only_what_writes_changes(name: str) -> None:
    """Bit for bit: the prompt's other rows and a row without a picture. PaliGemma's prompt sees its last token."""
    model, given = model_of(name), inputs(name, MIXED)
    first: list[Tensor] = []
    hook = decoder(model)[2].o_proj.register_forward_pre_hook(lambda module, args: first.append(args[0]))
    plain = outputs(model, given).logits
    with steer.apply(model, ImbalancedAttention(**SETTINGS)):
        edited = outputs(model, given).logits
    hook.remove()
    before, after = first
    assert torch.equal(before[:, :-1], after[:, :-1])
    assert torch.equal(before[0], after[0])
    assert not torch.equal(before[1, -1], after[1, -1])
    assert torch.equal(plain[0], edited[0])
    if name != "paligemma":
        assert torch.equal(plain[1, :-1], edited[1, :-1])


@pytest.mark.parametrize("name", MODELS)
def test_padding_stays_hidden(name: str) -> None:
    """Each row of a padded batch is what it is alone: in a forward, padded right, and generated, padded left."""
    model = double(name)
    options = {"max_new_tokens": 3, "min_new_tokens": 3, "do_sample": False, "return_dict_in_generate": True,
               "output_logits": True}  # fmt: skip
    with steer.apply(model, ImbalancedAttention(summary=0.3, cutoff=0)):
        right, left = (exact(inputs(name, BATCH, side)) for side in ("right", "left"))
        together = outputs(model, right).logits
        written = torch.stack(model.generate(**left, **options).logits, 1)
        for row, parts in enumerate(BATCH):
            real = right["attention_mask"][row].bool()
            alone = exact(inputs(name, [parts]))
            alone["input_ids"] = right["input_ids"][row, real][None]
            pixels = right["pixel_values"]
            if name.startswith("qwen"):
                alone["pixel_values"] = pixels.split(right["image_grid_thw"].prod(-1).tolist())[row]
            else:
                alone["pixel_values"] = pixels[row : row + 1, : alone["pixel_values"].shape[1]]
            assert (together[row, real] - outputs(model, alone).logits[0]).abs().max() <= EXACT
            by_itself = torch.stack(model.generate(**alone, **options).logits, 1)
            assert (written[row] - by_itself[0]).abs().max() <= 1e-5  # generate makes float32 of them


@pytest.mark.parametrize("name", MODELS)
def test_nothing_changes_without_pictures_or_effect(name: str) -> None:
    model = model_of(name)
    text, seen = inputs(name, WITHOUT), inputs(name, BATCH)
    plain, tokens = outputs(model, seen).logits, greedy(model, seen)
    for method in (ImbalancedAttention(), ImbalancedAttention(**SETTINGS)):
        before = greedy(model, text), outputs(model, text).logits
        with steer.apply(model, method):
            assert torch.equal(greedy(model, text), before[0])
            assert torch.equal(outputs(model, text).logits, before[1])
    for method in (ImbalancedAttention(alpha=0, beta=0, gamma=1), ImbalancedAttention(steps="1000:")):
        with steer.apply(model, method):
            assert torch.equal(outputs(model, seen).logits, plain)
            assert torch.equal(greedy(model, seen), tokens)
    assert torch.equal(outputs(model, seen).logits, plain)


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl"])
def test_layers_and_heads_are_the_decoder_s(name: str) -> None:
    """The tower has two heads, and layers of the same numbers; it is read and never edited."""
    model, given = model_of(name), inputs(name, ONE)
    seen: dict[int, list[Tensor]] = {1: [], 3: []}
    hooks = [
        decoder(model)[i].o_proj.register_forward_pre_hook(lambda module, args, i=i: seen[i].append(args[0]))
        for i in seen
    ]
    outputs(model, given)
    with steer.apply(model, ImbalancedAttention(**SETTINGS, layers="*layers.1", heads=[3])) as handle:
        bound = {site.name: site.kind for site in handle.sites}
        outputs(model, given)
    for hook in hooks:
        hook.remove()
    assert list(bound.values()).count("causal") == 1
    assert [site.layer for site in handle.sites or steer.sites(model) if site.kind == "self"][:2] == [0, 1]
    before, after = (tensor[0, -1].view(4, -1) for tensor in seen[1])
    assert torch.equal(before[:3], after[:3])
    assert not torch.equal(before[3], after[3])


# guidance


class WithoutPictures(LogitsProcessor):
    """u from the whole text each time, row by row: the prompt without pictures, then what was written."""

    def __init__(self, model: Any, prompts: list[list[int]], tokens: int, gamma: float, cutoff: float) -> None:
        self.model, self.prompts, self.tokens, self.gamma, self.cutoff = model, prompts, tokens, gamma, cutoff

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        copies = len(input_ids) // len(self.prompts)
        rows = []
        for row, line in enumerate(input_ids[:, self.tokens :].tolist()):
            prompt = self.prompts[row // copies]
            cache = DynamicCache(config=self.model.config)
            with torch.no_grad():
                for part in (prompt, *([token] for token in line)):
                    known = cache.get_seq_length()
                    at = torch.arange(known, known + len(part))[None]  # else Qwen's models remember the pictures'
                    given = {"input_ids": torch.tensor([part]), "position_ids": at}
                    logits = self.model(**given, past_key_values=cache).logits[:, -1]
            c, u = scores[row].double().log_softmax(-1), logits[0].double().log_softmax(-1)
            out = self.gamma * c - (self.gamma - 1) * u
            if self.cutoff:
                out[c.exp() < self.cutoff * c.exp().max()] -= CUT
            rows.append(out)
        return torch.stack(rows).to(scores.dtype)


def without_pictures(given: dict[str, Any]) -> list[list[int]]:
    """Each row's tokens before and after its pictures; what marks a picture's tiles goes with them."""
    rows = []
    for line, real in zip(given["input_ids"].tolist(), given["attention_mask"].bool(), strict=True):
        kept = [token for token, there in zip(line, real.tolist(), strict=True) if there]
        places = [i for i, token in enumerate(kept) if token == IMAGE]
        rows.append(kept[: places[0]] + kept[places[-1] + 1 :])
    return rows


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("cutoff", [0.0, 0.5])
@pytest.mark.parametrize("name", MODELS)
def test_guidance_equals_the_formula(name: str, cutoff: float, beams: int) -> None:
    given = exact(inputs(name, BATCH))
    model = double(name)
    reference = WithoutPictures(model, without_pictures(given), given["input_ids"].shape[1], 1.7, cutoff)
    options = {"num_beams": beams, "max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True,
               "output_scores": True, "eos_token_id": None}  # fmt: skip
    processors = None if beams > 1 else LogitsProcessorList([reference])
    if beams > 1:  # beams score log-probabilities of what a processor gives, and the model's own here
        processors = LogitsProcessorList([reference, Normalised()])
    wanted = model.generate(**given, **options, logits_processor=processors)
    with steer.apply(model, ImbalancedAttention(alpha=0, beta=0, gamma=1.7, cutoff=cutoff)):
        found = model.generate(**given, **options)
    plain = model.generate(**given, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    assert not all(torch.equal(a, b) for a, b in zip(found.scores, plain.scores, strict=True))
    for ours, theirs in zip(found.scores, wanted.scores, strict=True):
        assert (theirs < -CUT / 2).any() == bool(cutoff)
        assert (ours - theirs).abs().max() <= 3e-4  # of numbers around 1000 too


class Normalised(LogitsProcessor):
    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        return scores.log_softmax(-1)


def test_guidance_equals_transformers_guidance_scale() -> None:
    given = exact(inputs("llava", ONE))
    model = double("llava")
    text = torch.tensor(without_pictures(given))
    options = {"max_new_tokens": NEW, "do_sample": False, "return_dict_in_generate": True, "output_scores": True}
    wanted = model.generate(**given, **options, guidance_scale=2.0, negative_prompt_ids=text)
    with steer.apply(model, ImbalancedAttention(alpha=0, beta=0, gamma=2.0, cutoff=0)):
        found = model.generate(**given, **options)
    assert torch.equal(found.sequences, wanted.sequences)
    for ours, theirs in zip(found.scores, wanted.scores, strict=True):
        assert (ours - theirs).abs().max() <= 1e-5


def test_gamma_1_gives_c_on_the_kept_vocabulary() -> None:
    g = torch.Generator().manual_seed(0)
    c, u = torch.randn(2, 3, 40, generator=g, dtype=torch.float64), torch.randn(2, 3, 40, dtype=torch.float64)
    out = guided(c, u, 1.0, 0.1)
    probability = c.softmax(-1)
    kept = probability >= 0.1 * probability.amax(-1, keepdim=True)
    assert 0 < kept.sum() < kept.numel()
    assert torch.equal(out > -CUT / 2, kept)
    assert (out - c.log_softmax(-1))[kept].abs().max() <= EXACT


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("name", MODELS)
def test_guidance_changes_what_writes_alone(name: str, side: str) -> None:
    """In a forward with all logits the last real place of rows with a picture; whichever logits are kept."""
    model, given = model_of(name), inputs(name, MIXED, side)
    last = [int(line.nonzero().max()) for line in given["attention_mask"]]
    tokens = given["input_ids"].shape[1]
    plain = outputs(model, given).logits
    with steer.apply(model, ImbalancedAttention(alpha=0, beta=0)):
        every = outputs(model, given).logits
        chosen = torch.tensor([1, last[1], 0])
        some = outputs(model, given, logits_to_keep=chosen).logits
        three = outputs(model, given, logits_to_keep=3).logits
    changed = (every != plain).any(-1).nonzero().tolist()
    assert changed == [[1, last[1]]]
    assert torch.allclose(some, every[:, chosen], atol=2e-4)  # of numbers around 1000 too
    assert torch.equal(three[0], outputs(model, given, logits_to_keep=3).logits[0])
    assert (three[1] < -CUT / 2).any(-1).tolist() == [last[1] - 2 <= t <= last[1] for t in range(tokens - 3, tokens)]


def test_processors_may_forbid_what_the_cutoff_leaves() -> None:
    """Then the best of the others is written, in place of the first of the vocabulary."""
    model, given = model_of("llava"), inputs("llava", ONE)
    with steer.apply(model, ImbalancedAttention(cutoff=1.0)):  # leaves one token
        first = outputs(model, given).logits[:, -1].argsort(descending=True)[0, :3].tolist()
        options = {"max_new_tokens": 1, "min_new_tokens": 0}
        found = [int(greedy(model, given, suppress_tokens=first[:n], **options)) for n in range(1, 3)]
    assert found == first[1:] and 0 not in first


def test_more_logits_than_text_after_the_picture() -> None:
    """What writes is text; the tokens of a picture never do, and the branch without pictures has none of them.

    A product with other numbers of rows may round differently, in the model alone as well.
    """
    model, given = double("llava"), exact(inputs("llava", [[3, Picture(), 4]]))
    with steer.apply(model, ImbalancedAttention(cutoff=0)):
        four = outputs(model, given, logits_to_keep=4).logits
        for kept in (7, 12, 23, 40):
            assert (outputs(model, given, logits_to_keep=kept).logits[:, -4:] - four).abs().max() <= EXACT


def test_guidance_needs_logits() -> None:
    model = model_of("llava").model
    with pytest.raises(ValueError, match="give gamma=1"):
        steer.apply(model, ImbalancedAttention())
    with steer.apply(model, ImbalancedAttention(gamma=1)):
        outputs(model, inputs("llava", ONE))
    whole = model_of("llava")
    with steer.apply(whole, ImbalancedAttention()), pytest.raises(ValueError, match="return_dict=False"):
        outputs(whole, inputs("llava", ONE), return_dict=False)


# sequences


@pytest.mark.parametrize("gamma", [1.0, 1.5])
@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
def test_assisted_decoding_writes_the_same(name: str, gamma: float) -> None:
    """Several candidates come with the prompt, and several at once after it, some of which are taken back."""
    given = exact(inputs(name, ONE))
    given["input_ids"][0, -6:] = torch.tensor([7, 8, 9, 7, 8, 9])  # what a look-up finds
    model = double(name)
    options = {"max_new_tokens": 24, "min_new_tokens": 24}
    with steer.apply(model, ImbalancedAttention(summary=0.3, gamma=gamma, cutoff=0, alpha=3.0)) as handle:
        alone = greedy(model, given, **options)
        before = handle.stats["forwards"]
        assisted = greedy(model, given, prompt_lookup_num_tokens=3, max_matching_ngram_size=1, **options)
        assert handle.stats["forwards"] - before < 24
    assert torch.equal(alone, assisted)
    assert not torch.equal(alone, greedy(model, given, **options))


@pytest.mark.parametrize("gamma", [1.0, 1.5])
def test_static_cache_and_compiled_decode(gamma: float) -> None:
    model, given = model_of("llava"), inputs("llava", BATCH)
    options = CompileConfig(fullgraph=True, backend="eager")
    options._compile_all_devices = True
    with steer.apply(model, ImbalancedAttention(summary=0.3, gamma=gamma)):
        dynamic = greedy(model, given)
        static = greedy(model, given, cache_implementation="static", disable_compile=True)
        compiled = greedy(model, given, cache_implementation="static", compile_config=options)
    assert torch.equal(dynamic, static)
    assert torch.equal(dynamic, compiled)


def test_a_second_turn_with_another_picture() -> None:
    """The cache of a first turn goes on: its picture stays raised, the new one is read."""
    model = double("llava")
    whole = exact(inputs("llava", TWO_PICTURES))
    cut = 2 + 16 + 1
    with steer.apply(model, ImbalancedAttention(summary=0.3, cutoff=0, gamma=1.5)):
        first = {"input_ids": whole["input_ids"][:, :cut], "pixel_values": whole["pixel_values"][:1]}
        with torch.no_grad():
            cache = model(**first, use_cache=True).past_key_values
            turn = model(
                input_ids=whole["input_ids"][:, cut:], pixel_values=whole["pixel_values"][1:], past_key_values=cache
            )
        token = turn.logits[:, -1:].argmax(-1)
        with torch.no_grad():
            later = model(input_ids=token, past_key_values=cache).logits
        run = vars(cache)["steer_run"]
        strength = run.memory["ImbalancedAttention"]["strength"]
        text = run.memory["ImbalancedAttention"]["text"]
    assert strength.shape[1] == whole["input_ids"].shape[1]
    assert strength[:, : 2 + 16].any() and strength[:, cut:].any()
    assert text["mask"].sum() == int((whole["input_ids"] != IMAGE).sum()) + 1
    assert torch.isfinite(later).all()


def test_encoding_that_was_not_seen_is_an_error() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    with steer.apply(model, ImbalancedAttention(steps="1:", gamma=1)):
        text = inputs("llava", WITHOUT)
        with torch.no_grad():
            cache = model(**text, use_cache=True).past_key_values
            ids = given["input_ids"]
            encoded = model.get_image_features(pixel_values=given["pixel_values"], return_dict=True)
            with pytest.raises(RuntimeError, match="did not see"):
                model(input_ids=ids, mm_encoder_outputs={"image": encoded}, past_key_values=cache)


def test_gradients_flow() -> None:
    model = build(MODELS["llava"]).requires_grad_(True)
    given = inputs("llava", ONE)
    with steer.apply(model, ImbalancedAttention(summary=0.3, cutoff=0)):
        logits = model(**given).logits
        logits[:, -1].float().log_softmax(-1)[:, 5].sum().backward()
    gradients = [parameter.grad for parameter in decoder(model)[2].parameters()]
    assert all(g is not None and torch.isfinite(g).all() and g.abs().sum() > 0 for g in gradients)


def test_the_dense_oracle_is_plain_attention_without_gain(monkeypatch: pytest.MonkeyPatch) -> None:
    """The oracle of the oracle: strength 0 gives the model's own logits."""
    eager, given = double("llava", "eager"), exact(inputs("llava", BATCH))
    plain = outputs(double("llava"), given).logits
    with by_the_card(monkeypatch, eager, torch.zeros(given["input_ids"].shape)):
        real = given["attention_mask"].bool()
        assert (outputs(eager, given).logits - plain)[real].abs().max() <= EXACT
