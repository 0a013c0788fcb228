"""`steer.capture` reads softmax columns without changing the run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import pytest
import tiny_vision_language as vision_language
import torch
import torch.nn.functional as F
from probes import inputs_of
from tiny import FAMILIES, build, output
from tiny_language import MODELS, inputs
from torch import nn
from torch.overrides import TorchFunctionMode
from transformers import DynamicCache, StaticCache

import steer
from steer.capture import Capture
from steer.method import Method
from steer_patches.site import Call, Next, Site


class DenseMaps(TorchFunctionMode):
    """The whole softmax map of every attention call, (B, H, S, S_kv), in the order of the calls."""

    def __init__(self) -> None:
        super().__init__()
        self.maps: list[torch.Tensor] = []

    def __torch_function__(self, func, types, args=(), kwargs=None):  # type: ignore[no-untyped-def]
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            query = kwargs.get("query", args[0] if args else None)
            key = kwargs.get("key", args[1] if len(args) > 1 else None)
            scale = kwargs.get("scale") or query.shape[-1] ** -0.5
            scores = query.double() @ key.repeat_interleave(query.shape[1] // key.shape[1], 1).double().mT * scale
            mask = kwargs.get("attn_mask")
            if mask is not None:
                scores = scores.masked_fill(~mask, -torch.inf) if mask.dtype == torch.bool else scores + mask
            if kwargs.get("is_causal"):
                scores = scores.masked_fill(~torch.ones_like(scores, dtype=torch.bool).tril(), -torch.inf)
            self.maps.append(scores.softmax(-1).nan_to_num())  # padding may see nothing at all
        return func(*args, **kwargs)


@pytest.mark.parametrize("name", ["sd15", "sd3", "pixart", "flux", "wan21", "ltx", "llama"])
def test_columns_equal_the_dense_map(name: str) -> None:
    family = FAMILIES[name]
    model = family.build()
    baseline = output(model, inputs_of(family, model))
    with steer.capture(model, columns="all", keep_heads=True) as captured, DenseMaps() as dense:
        assert torch.equal(output(model, inputs_of(family, model)), baseline)
    assert len(captured.maps) == len(dense.maps) == len(steer.sites(model))
    for (site, found), expected in zip(captured.maps.items(), dense.maps, strict=True):
        assert torch.allclose(found.double(), expected, atol=1e-5), site


def test_text_columns_of_joint_attention() -> None:
    for name, text in (("sd3", slice(-7, None)), ("flux", slice(0, 7))):
        model = FAMILIES[name].build()
        with steer.capture(model, columns="all") as everything:
            output(model, inputs_of(FAMILIES[name], model))
        with steer.capture(model, columns="text") as captured:
            output(model, inputs_of(FAMILIES[name], model))
        for site, found in captured.maps.items():
            assert torch.equal(found, everything.maps[site][..., text])


def test_running_mean_over_calls() -> None:
    model = FAMILIES["sd3"].build()
    first, second = inputs_of(FAMILIES["sd3"], model), inputs_of(FAMILIES["sd3"], model)
    second["hidden_states"] = second["hidden_states"] * 2
    maps = []
    for runs in ([first], [second], [first, second]):
        with steer.capture(model, "transformer_blocks.1", columns="all") as captured:
            for kwargs in runs:
                output(model, dict(kwargs))
        maps.append(captured.maps["transformer_blocks.1.attn"])
    assert torch.allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)


def test_differentiable() -> None:
    model = FAMILIES["sd3"].build()
    kwargs = inputs_of(FAMILIES["sd3"], model)
    kwargs["hidden_states"].requires_grad_()
    with steer.capture(model, "transformer_blocks.1", columns=[0, 3], detach=False) as captured:
        model(**kwargs)
    captured.maps["transformer_blocks.1.attn"].sum().backward()
    assert kwargs["hidden_states"].grad.abs().sum() > 0


def test_bad_columns() -> None:
    with pytest.raises(ValueError, match="text, image, all"), steer.capture(FAMILIES["sd3"].build(), columns="words"):
        pass


def language_model(name: str, implementation: str = "sdpa") -> nn.Module:
    """With sliding windows where the name says so, and in Gemma 2, whose scores are capped as well."""
    model = build(MODELS[name])
    for module in model.modules():  # so low that it matters
        if hasattr(module, "attn_logit_softcapping"):
            module.attn_logit_softcapping = 1.0
    model.set_attn_implementation(implementation)
    return model


def own_maps(name: str, ids: torch.Tensor, mask: torch.Tensor) -> dict[str, torch.Tensor]:
    """The maps that the eager model itself returns of one forward over all tokens."""
    model = language_model(name, "eager")
    with torch.no_grad():
        maps = model(ids, attention_mask=mask, output_attentions=True, use_cache=False).attentions
    return {site.name: found for site, found in zip(steer.sites(model), maps, strict=True)}


@pytest.mark.parametrize(
    ("name", "implementation", "options"),
    [
        ("llama", "sdpa", {}),
        ("llama", "eager", {}),
        ("llama", "sdpa", {"past_key_values": 32}),
        ("llama", "sdpa", {"prefill_chunk_size": 4}),
        ("mistral_window", "sdpa", {}),
        ("mistral_window", "sdpa", {"past_key_values": 32}),
        ("gemma2", "eager", {}),
    ],
)
def test_generate_gives_the_map_of_one_forward(name: str, implementation: str, options: dict[str, int]) -> None:
    """Also what the tokens are, and the same whether all columns are read or some."""
    model, given = language_model(name, implementation), inputs(tokens=9)

    def generate() -> torch.Tensor:
        size = options.get("past_key_values")  # a static cache with room to spare
        cache = {"past_key_values": StaticCache(config=model.config, max_cache_len=size)} if size else {}
        forced = {"max_new_tokens": 5, "min_new_tokens": 5, "do_sample": False, "disable_compile": True}
        return model.generate(**given, **{**forced, **options, **cache})

    baseline = generate()
    with steer.capture(model, columns="all", keep_heads=True) as everything:
        assert torch.equal(generate(), baseline)
    with steer.capture(model, columns=[0, 7]) as captured:
        generate()
    ids = baseline[:, :-1]  # the last token is written and never read
    mask = torch.cat([given["attention_mask"], torch.ones(2, 4, dtype=torch.long)], dim=1)
    real = mask.bool()[:, None, :, None]  # rows of padding may see anything
    for site, expected in own_maps(name, ids, mask).items():
        found = everything.maps[site]
        assert found.shape == expected.shape == (2, 4, 13, 13)
        assert torch.allclose(found * real, expected * real, atol=1e-6)
        assert torch.allclose(captured.maps[site], found[..., [0, 7]].mean(1), atol=1e-6)


@dataclass(kw_only=True)
class Halfway(Method, register=False):
    """Half of the attention, half of the values: A' = (A + I) / 2, computed as a kernel would."""

    stage: ClassVar[str] = "kernel"

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        return (next(call) + call.expanded()[1]) / 2


@pytest.mark.parametrize("columns", ["all", [0, 8, 3]])
def test_effective_columns(columns: str | list[int]) -> None:
    """The plain map without methods, and with one the map that it makes; 12 columns are more than channels."""
    model, given = language_model("llama"), inputs(tokens=12)
    real = given["attention_mask"].bool()[:, None, :, None]
    maps = []
    for effective in (False, True):
        with steer.capture(model, columns=columns, keep_heads=True, effective=effective) as captured:
            output(model, given)
        maps.append({site: found * real for site, found in captured.maps.items()})
    with (
        steer.apply(model, Halfway(layers="*")),
        steer.capture(model, "model.layers.0", columns=columns, keep_heads=True, effective=True) as captured,
    ):
        output(model, given)
    for site, expected in maps[0].items():
        assert torch.allclose(maps[1][site], expected, atol=1e-6), site
    itself = torch.eye(12)[:, slice(None) if columns == "all" else columns]
    site = "model.layers.0.self_attn"
    assert torch.allclose(captured.maps[site] * real, (maps[0][site] + itself) / 2 * real, atol=1e-6)


def test_rows_follow_the_cache() -> None:
    """Rows that are exchanged, as by beam search, and tokens that are taken back, as by assisted decoding."""
    model = language_model("llama")
    first, second = inputs(tokens=8)["input_ids"][:1].repeat(2, 1), torch.tensor([[5, 6], [7, 8]])
    first[1] += 1
    with torch.no_grad(), steer.capture(model, columns="all", keep_heads=True) as captured:
        cache = DynamicCache(config=model.config)
        model(first, past_key_values=cache)
        model(second, past_key_values=cache)
        cache.crop(-1)
        cache.reorder_cache(torch.tensor([1, 1]))
        model(torch.tensor([[9], [10]]), past_key_values=cache)
    ids = torch.cat([first[[1, 1]], second[[1, 1], :1], torch.tensor([[9], [10]])], dim=1)
    for site, expected in own_maps("llama", ids, torch.ones_like(ids)).items():
        assert torch.allclose(captured.maps[site], expected, atol=1e-6)


def test_mean_over_sequences() -> None:
    model, maps = language_model("llama"), []
    texts = [inputs(batch=1, tokens=8)["input_ids"], inputs(batch=1, tokens=8)["input_ids"].flip(1)]
    for runs in ([texts[0]], [texts[1]], texts):
        with torch.no_grad(), steer.capture(model, columns="all") as captured:
            for ids in runs:
                cache = model(ids[:, :6]).past_key_values
                model(ids[:, 6:], past_key_values=cache)
        maps.append(captured.maps["model.layers.1.self_attn"])
    assert torch.allclose(maps[2], (maps[0] + maps[1]) / 2, atol=1e-6)
    with torch.no_grad(), steer.capture(model, columns="all") as captured:
        model(texts[0])
        model(texts[1][:, :6])
    with pytest.raises(ValueError, match="capture one run at a time"):
        captured.maps  # noqa: B018


def test_generated_tokens_only() -> None:
    model, given = language_model("llama"), inputs(tokens=9)
    with steer.capture(model, columns=[-1], steps="1:") as captured:
        model.generate(**given, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert captured.maps["model.layers.0.self_attn"].shape == (2, 3, 1)


def test_under_a_method_with_a_cache_of_its_own() -> None:
    """The prompt can be read, and all of it where the method only masks; otherwise it is refused, not misread."""
    model, given = language_model("llama"), inputs(tokens=9)
    options = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    maps = []
    for evict, steps in ((True, "0:1"), (False, None)):
        window = steer.StreamingLLM(n_sink=1, n_recent=3, positions="original", evict=evict)
        with steer.apply(model, window), steer.capture(model, columns="all", effective=True, steps=steps) as captured:
            model.generate(**given, **options)
        maps.append(captured.maps["model.layers.0.self_attn"])
    assert maps[0].shape == (2, 9, 9) and maps[1].shape == (2, 12, 12)
    assert torch.allclose(maps[0], maps[1][:, :9, :9], atol=1e-6)
    at = torch.arange(12)
    seen = (at <= at[:, None]) & ((at < 1) | (at[:, None] - at < 3))
    assert torch.equal(maps[1][0] > 0, seen)
    window = steer.StreamingLLM(n_sink=1, n_recent=3)
    with (
        steer.apply(model, window),
        steer.capture(model, columns=[0]),
        pytest.raises(RuntimeError, match="evict=False"),
    ):
        model.generate(**given, **options)


def test_a_language_model_has_no_image_columns() -> None:
    with pytest.raises(ValueError, match="columns=\\[0\\]"), steer.capture(language_model("llama")):
        pass


def test_causal_queries_after_a_cache() -> None:
    """The last query is that of the last key, as flash attention has it, which gets no mask."""
    site = Site("attention", 0, "causal", heads=1, kv_heads=1, head_dim=4, processor="flash_attention_2")
    query, key = torch.randn(1, 1, 5, 4, generator=torch.Generator().manual_seed(0)).split([2, 3], dim=2)
    key = torch.cat([key, query], dim=2)
    method = Capture(layers="*", columns="all")
    for rows in (query, key):
        method.attend(Call(rows, key, key, None, None, True, site, 0), lambda call: call.query)
        assert torch.equal(method.maps["attention"] > 0, torch.ones(5, 5).tril()[None, -rows.shape[2] :] > 0)
        method = Capture(layers="*", columns="all")


def eager_maps(name: str, given: dict[str, Any]) -> dict[str, torch.Tensor]:
    """The maps of the decoder that the eager vision-language model itself returns."""
    model = vision_language.model_of(name)
    model.set_attn_implementation("eager")
    try:
        with torch.no_grad():
            maps = model(**given, output_attentions=True, use_cache=False).attentions
    finally:
        model.set_attn_implementation("sdpa")
    return {site.name: found for site, found in zip(decoder(model), maps, strict=True)}


def decoder(model: nn.Module) -> list[Site]:
    return [site for site in steer.sites(model) if site.kind == "causal"]


@pytest.mark.parametrize("name", vision_language.MODELS)
@pytest.mark.parametrize("side", ["left", "right"])
def test_columns_of_pictures_and_of_text(name: str, side: str) -> None:
    """The decoder's layers only; together they are the whole map, and each is 0 where a row has no such token."""
    model, given = vision_language.model_of(name), vision_language.inputs(name, side=side)
    expected = eager_maps(name, given)
    with torch.no_grad():
        baseline = model(**given).logits
    real = given["attention_mask"].bool()
    for columns in ("image", "text"):
        with torch.no_grad(), steer.capture(model, columns=columns, keep_heads=True) as captured:
            assert torch.equal(model(**given).logits, baseline)
        assert captured.pictures is not None
        wanted = captured.pictures.shows if columns == "image" else ~captured.pictures.shows
        assert captured.tokens == tuple(wanted.any(0).nonzero().flatten().tolist()) and len(captured.tokens) > 2
        assert list(captured.maps) == list(expected)
        for site, found in captured.maps.items():
            dense = (expected[site] * wanted[:, None, None])[..., list(captured.tokens)] * real[:, None, :, None]
            assert torch.allclose(found * real[:, None, :, None], dense, atol=1e-6), site


@pytest.mark.parametrize("name", ["llava", "qwen2_5_vl", "smolvlm"])
def test_the_answer_looks_at_pictures(name: str) -> None:
    """`generate` gives what one forward over all its tokens would; queries="last" the rows that make its tokens."""
    model, given = vision_language.model_of(name), vision_language.inputs(name)
    tokens = given["input_ids"].shape[1]
    found = {}
    for queries in ("all", "last"):
        for columns in ("image", "text"):
            with steer.capture(model, columns=columns, queries=queries) as captured:
                answer = vision_language.greedy(model, given)
            found[queries, columns] = captured
    ids = torch.cat([given["input_ids"], answer[:, :-1]], dim=1)
    whole = {
        **given,
        "input_ids": ids,
        "attention_mask": F.pad(given["attention_mask"], (0, answer.shape[1] - 1), value=1),
    }
    if "mm_token_type_ids" in given:
        whole["mm_token_type_ids"] = F.pad(given["mm_token_type_ids"], (0, answer.shape[1] - 1))
    for columns in ("image", "text"):
        with torch.no_grad(), steer.capture(model, columns=columns) as once:
            model(**whole)
        real = whole["attention_mask"].bool()[:, :, None]
        for site, expected in once.maps.items():
            every, last = found["all", columns].maps[site], found["last", columns].maps[site]
            assert torch.allclose(every * real, expected * real, atol=1e-6)
            assert torch.allclose(last, every[:, tokens - 1 :], atol=1e-6)
        assert found["last", columns].tokens == once.tokens


def test_the_last_query_of_rows_padded_on_the_right() -> None:
    name = "llava"
    model, given = vision_language.model_of(name), vision_language.inputs(name, side="right")
    at = given["attention_mask"].sum(-1) - 1
    assert at[0] != at[1]
    for effective in (False, True):
        maps = []
        for queries in ("all", "last"):
            with (
                torch.no_grad(),
                steer.capture(model, columns="image", queries=queries, effective=effective) as captured,
            ):
                model(**given)
            maps.append(captured.maps["model.language_model.layers.1.self_attn"])
        assert maps[1].shape == (2, 1, maps[0].shape[-1])
        assert torch.allclose(maps[1][:, 0], maps[0][torch.arange(2), at], atol=1e-7)


def test_columns_of_beams_and_of_prompts_without_pictures() -> None:
    name, site = "llava", "model.language_model.layers.1.self_attn"
    model, given = vision_language.model_of(name), vision_language.inputs(name, vision_language.ONE)
    with steer.capture(model, columns="image", queries="last") as captured:
        answer = vision_language.greedy(model, given, num_beams=2)
    assert captured.maps[site].shape == (2, answer.shape[1], 16) and captured.maps[site].min() > 0
    rows = [vision_language.ONE[0], [5]]
    with torch.no_grad(), steer.capture(model, columns="image") as captured:
        model(**vision_language.inputs(name, rows))
    assert captured.maps[site][0].any() and not captured.maps[site][1].any()
    given = vision_language.inputs(name, vision_language.WITHOUT)
    shapes = {}
    for columns in ("image", "text"):
        with torch.no_grad(), steer.capture(model, columns=columns) as captured:
            model(**given)
        shapes[columns] = captured.maps[site].shape
        assert captured.pictures is None
    assert shapes == {"image": (1, 12, 0), "text": (1, 12, 12)}


def test_pictures_that_come_later_add_columns() -> None:
    """A second question with another picture, after the first one's cache."""
    name = "llava"
    model = vision_language.model_of(name)
    first, second = (vision_language.inputs(name, vision_language.ONE, seed=seed) for seed in (0, 1))
    both = {key: torch.cat([first[key], second[key]], 0 if key == "pixel_values" else 1) for key in first}
    for columns in ("image", "text"):
        with torch.no_grad(), steer.capture(model, columns=columns) as once:
            model(**both)
        with torch.no_grad(), steer.capture(model, columns=columns) as captured:
            cache = model(**first).past_key_values
            model(**{**second, "attention_mask": both["attention_mask"]}, past_key_values=cache)
        assert captured.tokens == once.tokens
        for site, expected in once.maps.items():
            assert torch.allclose(captured.maps[site], expected, atol=1e-6)


def test_bad_queries() -> None:
    with (
        pytest.raises(ValueError, match="all, last"),
        steer.capture(language_model("llama"), columns="all", queries="one"),
    ):
        pass
    with pytest.raises(ValueError, match="makes none"), steer.capture(FAMILIES["sd3"].build(), queries="last"):
        pass
