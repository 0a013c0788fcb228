"""GIFT against the card's formula on whole maps, entry by entry: one row, whole models, prompts and what follows."""

from __future__ import annotations

import copy
import dataclasses
import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from dense import dense_attention, doubled
from probes import steer_attributes
from tiny_vision_language import BATCH, MODELS, NEW, ONE, TWO_PICTURES, WITHOUT, Picture, Row, greedy, inputs, model_of
from torch import Tensor, nn
from transformers import CompileConfig, DynamicCache, StaticCache

import steer
from steer.gaze import Gaze, read_before, scaled
from steer.methods.gift import GIFT, PUBLISHED, Layers, layers_of
from steer.select import SelectorError
from steer_patches.site import Call, Scope, Site

EXACT = 1e-10
ROUNDED = 1e-5  # `generate` counts positions from the first real token, and rotations are in fp32
VISIBLE = 1e-6  # tiny random maps are nearly flat, so that even e^5 on a token moves logits little
SHAPES: dict[str, list[Row]] = {"one": ONE, "two pictures": TWO_PICTURES, "batch": BATCH, "mixed": [*ONE, *WITHOUT]}
MARKED = ("qwen2_vl", "qwen2_5_vl", "idefics3", "smolvlm")  # a token that closes the picture stands before the question
AFTER = 1


@functools.cache
def exact(name: str) -> Any:
    """The model in fp64, also in its norms, which transformers computes in fp32 whatever they get."""
    model = copy.deepcopy(model_of(name)).double()
    for parent in list(model.modules()):
        for child, norm in list(parent.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                plain = nn.RMSNorm(norm.weight.shape[0], eps=getattr(norm, "variance_epsilon", None) or norm.eps)
                plain.weight = nn.Parameter(norm.weight + ("Gemma" in type(norm).__name__), requires_grad=False)
                setattr(parent, child, plain)
    return model


def method_for(name: str, **settings: Any) -> GIFT:
    """Saliency layer 1, fusion layers 2 and 3, some words left out."""
    words = torch.zeros(3, 64, dtype=torch.bool)
    words[0] = True  # every token is a word
    words[2, ::3] = True  # and every third one a function word
    given = {
        "saliency": [1], "layers": ["*.layers.{2,3}"], "before": int(name in MARKED), "after": AFTER, "words": words,
    }  # fmt: skip
    return GIFT(**{**given, **settings})


# The card, entry by entry -----------------------------------------------------------------------------------------


def gaze_by_entries(maps: Sequence[Tensor], seen: list[int], content: list[int], method: GIFT) -> list[float]:
    """m of each visual token from the saliency layers' maps (H, S, S) of one row of the batch."""
    if not content:
        return [1.0] * len(seen)
    total = [0.0] * len(seen)
    for of_layer in maps:
        shift = [[0.0] * len(seen) for _ in of_layer]
        for h, rows in enumerate(of_layer.tolist()):
            for i in content:
                for n, j in enumerate(seen):
                    shift[h][n] += max(rows[i][j] - rows[i - 1][j], 0.0)
        order = sorted(range(len(shift)), key=lambda h: -sum(shift[h]))
        chosen = order[: max(1, int(len(order) * method.share))]
        for n in range(len(seen)):
            total[n] += sum(shift[h][n] for h in chosen) / len(chosen) / len(content) / len(maps)
    values = torch.tensor(total, dtype=torch.float64)
    middle, spread = values.mean(), values.std()
    values = values.clamp(middle - method.clamp * spread, middle + method.clamp * spread)
    if values.max() == values.min():
        return [1.0] * len(seen)
    return torch.exp(method.alpha * (values - values.min()) / (values.max() - values.min())).tolist()


def row_by_entries(row: Tensor, seen: list[int], asked: list[int], m: list[float], method: GIFT) -> Tensor:
    """The edited rows (H, S) of one query: steps a to d of the card."""
    rows, heads = row.tolist(), range(len(row))

    def ranked(places: list[int], share: float) -> list[int]:
        return sorted(heads, key=lambda h: -sum(rows[h][j] for j in places))[: max(1, int(len(row) * share))]

    visual, asking = ranked(seen, method.share), ranked(asked, method.question_share)
    if not isinstance(method.heads, dict) and method.heads is not None:
        visual, asking = ([h for h in some if h in method.heads] for some in (visual, asking))
    edited = row.clone()
    was, now = 0.0, 0.0
    for h in visual:
        for j, more in zip(seen, m, strict=True):
            edited[h, j] = rows[h][j] * more
            was, now = was + rows[h][j], now + rows[h][j] * more
    ratio = now / was if was else 1.0
    for h in asking:
        for j in asked:
            edited[h, j] = rows[h][j] * ratio * method.beta
    for h in {*visual, *asking}:
        edited[h] = edited[h] / edited[h].sum()
    return edited


class Plan:
    """Where the pictures and questions of a prompt are, from how it was put together, and what GIFT makes of them."""

    def __init__(self, name: str, given: dict[str, Any], rows: Sequence[Row], method: GIFT, shows: Tensor) -> None:
        self.method, self.rows = method, []
        maps = maps_of(name, given)
        self.heads = maps[0].shape[1]
        for b, row in enumerate(rows):
            real = given["attention_mask"][b].nonzero().flatten().tolist()
            if not any(isinstance(part, Picture) for part in row):
                self.rows.append(None)
                continue
            asked = real[-row[-1] :][: row[-1] - method.after]
            content = asked
            if method.words is not None:
                content = [i for i in asked if not method.words[2, given["input_ids"][b, i]]]
            seen = shows[b].nonzero().flatten().tolist()
            m = gaze_by_entries([maps[layer][b] for layer in method.saliency or ()], seen, content, method)
            self.rows.append((real[-1], seen, asked, m))

    def edit(self, scores: Tensor, weights: Tensor) -> Tensor:
        if weights.shape[1] != self.heads:  # transformers stacks a token's heads of one KV head as queries
            return self.edit(scores, weights.flatten(1, 2)[:, :, None]).view_as(weights)
        edited = weights.clone()
        for b, row in enumerate(self.rows):
            if row is not None:
                last, seen, asked, m = row
                at = last if weights.shape[2] > 1 else 0
                edited[b, :, at] = row_by_entries(weights[b, :, at], seen, asked, m, self.method)
        return edited

    @contextmanager
    def dense(self, model: Any, layers: Sequence[int]) -> Iterator[None]:
        names = [site.name for site in steer.sites(model) if site.kind == "causal"]
        with ExitStack() as stack:
            for layer in layers:
                stack.enter_context(dense_attention(model, [names[layer]], self.edit))
            yield


@torch.no_grad()
def maps_of(name: str, given: dict[str, Any]) -> list[Tensor]:
    """The model's own maps (B, H, S, S) of every decoder layer."""
    model, found = exact(name), []

    def keep(scores: Tensor, weights: Tensor) -> Tensor:
        found.append(weights)
        return weights

    with dense_attention(model, [site.name for site in steer.sites(model) if site.kind == "causal"], keep):
        model(**given)
    return found


def shows_of(name: str, given: dict[str, Any]) -> Tensor:
    """(B, S) bool: visual tokens, as the hook layer tells (proven in tests/patches/test_pictures.py)."""
    found: list[Tensor] = []

    class Look(steer.Method, register=False):
        needs_pictures, kinds = True, ("causal",)

        def attend(self, call: Call, next: Callable[[Call], Tensor]) -> Tensor:
            found.append(call.text.pictures.shows)  # type: ignore[union-attr]
            return next(call)

    with torch.no_grad(), steer.apply(exact(name), Look(layers="*.layers.0")):
        exact(name)(**given)
    return found[0]


@torch.no_grad()
def logits(model: Any, given: dict[str, Any], new: int = 3, **options: Any) -> list[Tensor]:
    """Of each row's last real token, from a forward, and of `new` tokens that are generated."""
    output = model(**given, use_cache=False).logits
    prompt = torch.stack([output[b, row.nonzero().max()] for b, row in enumerate(given["attention_mask"])])
    chosen = {"max_new_tokens": new, "min_new_tokens": new, "do_sample": False, "num_beams": 1, **options}
    generated = model.generate(**given, **chosen, return_dict_in_generate=True, output_logits=True)
    return [prompt, *generated.logits]


def close(found: Sequence[Tensor], wanted: Sequence[Tensor], within: float = EXACT) -> bool:
    return all((a - b).abs().max() <= within for a, b in zip(found, wanted, strict=True))


def differ(found: Sequence[Tensor], wanted: Sequence[Tensor]) -> bool:
    return all((a - b).abs().max() > VISIBLE for a, b in zip(found, wanted, strict=True))


# One row ----------------------------------------------------------------------------------------------------------


def random_rows(tokens: int = 20, heads: int = 6, seed: int = 0) -> tuple[Tensor, Tensor, list[int], list[int]]:
    """Rows of a map (2, H, S) and a plan (2, 3, S), with their visual and question tokens."""
    g = torch.Generator().manual_seed(seed)
    weights = (3 * torch.randn(2, heads, tokens, generator=g, dtype=torch.float64)).softmax(-1)
    seen, asked = [2, 3, 5, 7, 8], [11, 12, 15]
    plan = torch.zeros(2, 3, tokens, dtype=torch.float64)
    plan[:, 0, seen] = 5 * torch.rand(2, len(seen), generator=g, dtype=torch.float64)
    plan[:, 1, seen], plan[:, 2, asked] = 1.0, 1.0
    return weights, plan, seen, asked


@pytest.mark.parametrize(
    "settings", [{}, {"beta": 0.5}, {"share": 0.25, "question_share": 1.0}, {"share": 1.0}, {"beta": 1.5}]
)
def test_equals_the_card_entry_by_entry_and_as_a_bias(settings: dict[str, Any]) -> None:
    weights, plan, seen, asked = random_rows()
    method = GIFT(**settings)
    edited, which = method.edited(weights, method.marks(plan))
    for b in range(2):
        wanted = row_by_entries(weights[b], seen, asked, plan[b, 0, seen].exp().tolist(), method)
        assert (edited[b] - wanted).abs().max() <= 1e-12 or not which[b].all()
        assert (edited[b][which[b]] - wanted[which[b]]).abs().max() <= 1e-12
        assert torch.equal(weights[b][~which[b]], wanted[~which[b]])
    assert torch.allclose(edited.sum(-1), torch.ones(()).double(), atol=1e-14)
    # the same from logits: log m and log (r beta) added, then one softmax
    visual, asking = (
        torch.zeros(2, 6, dtype=torch.bool).scatter(
            1, weights[..., at].sum(-1).topk(max(1, int(6 * share))).indices, True
        )
        for at, share in ((seen, method.share), (asked, method.question_share))
    )
    on = lambda w: (w[..., seen].sum(-1) * visual).sum(-1)  # noqa: E731
    ratio = on(weights * plan[:, :1].exp()) / on(weights)
    assert (ratio >= 1).all()
    bias = (
        visual[..., None] * plan[:, :1] + asking[..., None] * plan[:, 2:] * (ratio * method.beta).log()[:, None, None]
    )
    assert torch.equal(which, visual | asking)
    assert ((weights.log() + bias).softmax(-1) - edited)[which].abs().max() <= 1e-12


def test_without_gaze_nothing_is_edited_but_by_beta() -> None:
    weights, plan, _, _ = random_rows()
    plan[0, 0] = 0
    _, which = GIFT().edited(weights, GIFT().marks(plan))
    assert not which[0].any() and which[1].any()
    edited, which = GIFT(beta=0.5).edited(weights, GIFT(beta=0.5).marks(plan))
    assert which[0].any()
    rows = weights * torch.where(plan[:, 2:] > 0, 0.5, 1.0)
    rows = torch.where(which[..., None], rows / rows.sum(-1, keepdim=True), weights)
    asked = edited[0] != weights[0]
    assert torch.allclose(edited[0][asked], rows[0][asked]) or (edited[0] - weights[0]).abs().max() > 0


def test_only_heads_that_may_be_edited_are() -> None:
    weights, plan, seen, asked = random_rows()
    heads = torch.tensor([True, False, True, False, True, False])
    method = GIFT(heads=[0, 2, 4])
    edited, which = method.edited(weights, method.marks(plan), heads)
    assert not which[:, ~heads].any() and which.any()
    for b in range(2):
        wanted = row_by_entries(weights[b], seen, asked, plan[b, 0, seen].exp().tolist(), method)
        assert (edited[b] - wanted)[which[b]].abs().max() <= 1e-12


# The gaze ---------------------------------------------------------------------------------------------------------


def planted(patch: int, token: int, heads: int = 4) -> Call:
    """A causal call of 16 tokens, of which 2 to 9 show, whose token `token` alone looks at `patch`; 3 is a sink."""
    key = torch.eye(16, dtype=torch.float64).expand(1, heads, 16, 16).clone()
    query = torch.zeros(1, heads, 16, 16, dtype=torch.float64)
    query[..., 3] = 8.0  # every token looks at this one
    query[:, :, token, patch] = 7.5
    site = Site("layer", 0, "causal", heads, heads, 16, "sdpa", scope=Scope())
    return Call(query, key, key, None, 1.0, True, site, 0)


def gaze_at(content: list[int], shows: slice = slice(2, 10)) -> Gaze:
    seen = torch.zeros(1, 16, dtype=torch.bool)
    seen[:, shows] = True
    question = torch.zeros(1, 16, dtype=torch.bool)
    question[:, 11:] = True
    return Gaze([torch.tensor(content, dtype=torch.int64)], seen, question, 0.5, 1)


@pytest.mark.parametrize("patch", [2, 6, 9])
def test_the_map_peaks_where_a_content_word_looks_and_not_at_the_sink(patch: int) -> None:
    gaze = gaze_at([13])
    gaze.read(planted(patch, 13))
    plan = gaze.plan(5.0, 3.0)
    assert plan[0, 0].argmax() == patch and plan[0, 0, patch] == 5.0
    assert plan[0, 0, 3] < 0.1  # raw attention would say: the sink
    other = gaze_at([12, 14])  # the look away from the patch, at 14, does not count
    other.read(planted(patch, 13))
    assert other.plan(5.0, 3.0)[0, 0, patch] < 5.0


@pytest.mark.parametrize("case", ["no content words", "no picture", "all the same"])
def test_what_says_nothing_about_the_picture_leaves_it(case: str) -> None:
    call = planted(6, 13)
    if case == "all the same":
        call = call.replace(query=torch.zeros_like(call.query))
    gaze = gaze_at([] if case == "no content words" else [13], slice(0, 0) if case == "no picture" else slice(2, 10))
    gaze.read(call)
    assert torch.equal(gaze.plan(5.0, 3.0)[:, 0], torch.zeros(1, 16, dtype=torch.float64))


def test_outliers_are_clamped() -> None:
    mean = torch.cat([torch.rand(1, 40, generator=torch.Generator().manual_seed(0)), torch.tensor([[50.0, 7.0]])], 1)
    shows = torch.arange(42)[None] < 41  # the last one is text
    found = scaled(mean.double(), shows, 3.0)
    values = mean[0, :41].double()
    top = values.mean() + 3 * values.std()
    assert top < 50 and found[0, 40] == 1 and found[0, 41] == 0
    assert torch.allclose(found[0, :40], (values[:40] - values.min()) / (top - values.min()), atol=1e-14)


# Through the models -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "shape, side", [*((shape, "left") for shape in SHAPES), ("batch", "right"), ("mixed", "right")]
)
def test_equals_whole_maps(name: str, shape: str, side: str) -> None:
    """Prompts and what is generated; read in the prompt's pass, and in one before it (saliency=[1, 3])."""
    rows = SHAPES[shape]
    given, model = doubled(inputs(name, rows, side)), exact(name)
    shows, plain = shows_of(name, given), logits(model, given)
    for settings in ({}, {"saliency": [1, 3], "beta": 0.7, "share": 0.75, "question_share": 0.25}):
        method = method_for(name, **settings)
        plan = Plan(name, given, rows, method, shows)
        with plan.dense(model, [2, 3]):
            wanted = logits(model, given)
        with steer.apply(model, method):
            found = logits(model, given)
        assert close(found[:1], wanted[:1]), settings
        padded = not given["attention_mask"].all()
        assert close(found, wanted, ROUNDED if padded else EXACT), settings
        assert (found[0] - plain[0])[0].abs().max() > VISIBLE
        if shape == "mixed":  # the row without a picture
            assert all(torch.equal(a[1], b[1]) for a, b in zip(found, plain, strict=True))


@dataclasses.dataclass(kw_only=True)
class ReadBefore(GIFT, register=False):
    """Reads in a pass before, also where the prompt itself would tell."""

    def before_forward(self, scope: Scope, sites: Any) -> None:
        super().before_forward(scope, sites)
        text = scope.text
        gaze = self.gaze(text, scope.arguments["input_ids"], 1)
        read_before(scope, text, gaze, [name for name, (site, _) in sites.items() if site.layer == 1])
        for site, _ in sites.values():
            site.kernel = dataclasses.replace(site.kernel, gaze=gaze, reads=False)


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_a_pass_before_tells_what_the_prompt_itself_does(name: str) -> None:
    given, model, plans = doubled(inputs(name)), exact(name), []
    for kind in (GIFT, ReadBefore):
        cache = DynamicCache(config=model.config)
        method = method_for(name)
        method = kind(**{field.name: getattr(method, field.name) for field in dataclasses.fields(method)})
        with steer.apply(model, method):
            model(**given, past_key_values=cache, use_cache=True)
        plans += [kept["plan"] for key, kept in cache.steer_run.memory.items() if key[0] == "GIFT"]
    assert (plans[0][:, 0].amax(-1) == 5.0).all() and len(plans) == 2
    assert (plans[0] - plans[1]).abs().max() <= EXACT


@torch.no_grad()
def test_heads_by_layer() -> None:
    """The saliency layer is read with all of its heads, whatever may be edited."""
    given, model = doubled(inputs("llava")), exact("llava")
    layers = [site.name for site in steer.sites(model) if site.kind == "causal"]
    method = method_for("llava", layers=None, heads={layers[2]: [0, 2]})
    plan = Plan("llava", given, BATCH, dataclasses.replace(method, heads=[0, 2]), shows_of("llava", given))
    with plan.dense(model, [2]):
        wanted = logits(model, given, new=1)
    with steer.apply(model, method) as handle:
        assert [site.name for site in handle.sites] == layers[1:3]
        assert close(logits(model, given, new=1)[:1], wanted[:1])


@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_everything_else_is_bit_identical(name: str) -> None:
    """Other tokens of the prompt, text alone, neutral settings, and the model once it is off."""
    model, given = model_of(name), inputs(name)
    plain = model(**given).logits
    tokens = greedy(model, given)
    text = inputs(name, WITHOUT)
    of_text = model(**text).logits
    for saliency in ([1], [3]):
        with steer.apply(model, method_for(name, saliency=saliency)):
            steered = model(**given).logits
            assert torch.equal(model(**text).logits, of_text)
        if saliency == [1] and name != "paligemma":  # there the rest of the prompt sees the last token
            assert torch.equal(steered[:, :-1], plain[:, :-1])
        assert not torch.equal(steered[:, -1], plain[:, -1])
    for neutral in ({"alpha": 0.0}, {"steps": "1000:"}):
        with steer.apply(model, method_for(name, **neutral)):
            assert torch.equal(model(**given).logits, plain)
            assert torch.equal(greedy(model, given), tokens)
    assert torch.equal(model(**given).logits, plain) and not steer_attributes(model)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("saliency", [[1], [3]], ids=["in the prompt", "before it"])
def test_generates_the_same_in_every_way(name: str, saliency: list[int]) -> None:
    """With a static cache, through other implementations, with beams, each row of a batch alone."""
    model, given, method = exact(name), doubled(inputs(name)), method_for(name, saliency=saliency)
    with steer.apply(model, method):
        found = logits(model, given)
        assert close(logits(model, given, cache_implementation="static", disable_compile=True), found)
        assert close(found[:1], found[1:2], ROUNDED)  # where pictures are encoded ahead, and where not
        beams = greedy(model, given, num_beams=2)
        single = [doubled(inputs(name, [row])) for row in BATCH]
        for b, row in enumerate(single):
            real = given["attention_mask"][b].bool()
            row["input_ids"] = given["input_ids"][b : b + 1, real]
        for key in ("pixel_values", "pixel_attention_mask", "image_grid_thw", "image_sizes"):
            if key in given:
                at = [len(row[key]) if key in row else 0 for row in single]
                parts = given[key].split(at) if sum(at) == len(given[key]) else given[key].split(1)
                for row, part in zip(single, parts, strict=True):
                    row[key] = part
        for b, row in enumerate(single):
            assert close([one[0] for one in logits(model, row)], [one[b] for one in found], ROUNDED)
            assert torch.equal(greedy(model, row, num_beams=2)[0], beams[b])


@pytest.mark.parametrize("name, base", [("llava", "eager"), ("paligemma", "eager")])
@torch.no_grad()
def test_other_implementations(name: str, base: str) -> None:
    model, given = copy.deepcopy(model_of(name)), inputs(name)
    found = []
    for implementation in ("sdpa", base):
        model.set_attn_implementation(implementation)
        with steer.apply(model, method_for(name)):
            found.append(model(**given).logits)
    assert (found[0] - found[1])[given["attention_mask"].bool()].abs().max() <= 1e-5


@pytest.mark.parametrize("name", ["llava", "idefics3"])
@torch.no_grad()
def test_several_tokens_at_once(name: str) -> None:
    """As candidates of assisted decoding come, or a later turn."""
    model, given = exact(name), doubled(inputs(name))
    mask, tokens = given["attention_mask"], torch.tensor([[7, 8, 9]]).expand(2, -1)
    found = []
    with steer.apply(model, method_for(name)):
        for pieces in ((1, 1, 1), (3,), (1, 2)):
            for cache in (DynamicCache(config=model.config), StaticCache(config=model.config, max_cache_len=80)):
                model(**given, past_key_values=cache, use_cache=True)
                longer, outputs = mask, []
                for some in tokens.split(pieces, 1):
                    longer = torch.cat([longer, torch.ones_like(some)], 1)
                    more = model(input_ids=some, attention_mask=longer, past_key_values=cache, use_cache=True)
                    outputs.append(more.logits)
                found.append(torch.cat(outputs, 1))
    assert close(found[1:], [found[0]] * 5)


@torch.no_grad()
def test_decoding_that_is_compiled() -> None:
    """As one graph over a static cache, which is not made again for other steps."""
    model, given = copy.deepcopy(model_of("qwen2_vl")), inputs("qwen2_vl")
    with steer.apply(model, method_for("qwen2_vl")):
        plain = greedy(model, given, cache_implementation="static", disable_compile=True)
        config = CompileConfig(fullgraph=True, backend="aot_eager")
        config._compile_all_devices = True
        torch.compiler.reset()
        options = {"cache_implementation": "static", "compile_config": config}
        assert torch.equal(greedy(model, given, **options), plain)
        assert plain.shape[1] == NEW


@torch.no_grad()
def test_a_pass_before_stops_early_and_leaves_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    """Qwen's positions, the chains of other methods and the layers' outputs are those of the model alone."""
    model, given = copy.deepcopy(model_of("qwen2_vl")), inputs("qwen2_vl")
    layers = [site.name for site in steer.sites(model) if site.kind == "causal"]
    counted = {name: 0 for name in layers}
    hooks = [
        model.get_submodule(name).register_forward_pre_hook(
            lambda *_, name=name: counted.__setitem__(name, counted[name] + 1)
        )
        for name in layers
    ]
    model.model.rope_deltas = marked = torch.full((2, 1), 5)
    seen: list[Any] = []
    before_forward = GIFT.before_forward

    def look(self: GIFT, scope: Scope, sites: Any) -> None:
        chains = [site.chain for site, _ in sites.values()]
        text = scope.text
        before_forward(self, scope, sites)
        seen.append((model.model.rope_deltas is marked, chains == [site.chain for site, _ in sites.values()]))
        seen.append((scope.text is text, scope.in_forward))

    monkeypatch.setattr(GIFT, "before_forward", look)
    with steer.apply(model, method_for("qwen2_vl", saliency=[2], layers=["*.layers.1"])):
        model(**given)
    assert seen == [(True, True), (True, True)]
    assert list(counted.values()) == [2, 2, 2, 1]  # the pass before ended in the third
    for hook in hooks:
        hook.remove()


def test_gradients_reach_the_text_and_the_picture() -> None:
    model, given = copy.deepcopy(model_of("llava")).requires_grad_(), inputs("llava")
    given["pixel_values"].requires_grad_()
    for saliency in ([1], [3]):
        model.zero_grad()
        with steer.apply(model, method_for("llava", saliency=saliency)):
            model(**given).logits[:, -1].sum().backward()
        assert given["pixel_values"].grad.abs().sum() > 0
        assert model.model.language_model.layers[2].self_attn.q_proj.weight.grad.abs().sum() > 0


@torch.no_grad()
def test_is_saved_with_its_words(tmp_path: Path) -> None:
    model, given = model_of("smolvlm"), inputs("smolvlm")
    with steer.apply(model, method := method_for("smolvlm", alpha=4.0)):
        wanted = greedy(model, given)
        method.save(str(tmp_path))
    loaded = steer.load(str(tmp_path))
    assert torch.equal(loaded.words, method.words) and loaded.before == 1 and loaded.saliency == [1]
    with steer.apply(model, loaded):
        assert torch.equal(greedy(model, given), wanted)


# Which layers -----------------------------------------------------------------------------------------------------


def test_layers_are_published_or_in_the_middle() -> None:
    class Config:
        model_type = "llava"

        def get_text_config(self) -> Any:
            return type("Text", (), {"hidden_size": 4096})

    model = type("Model", (), {"config": Config()})()
    assert layers_of(model, 32) == PUBLISHED["llava", 32, 4096] == Layers((11,), tuple(range(12, 23)))
    Config.model_type = "another"
    assert layers_of(model, 32) == PUBLISHED["llava", 32, 4096]  # the rule for the middle gives the same
    assert layers_of(model, 30) == Layers((10,), tuple(range(11, 22)))
    for depth in range(1, 9):
        saliency, fusion = layers_of(model, depth)
        assert 0 <= saliency[0] <= fusion[0] <= fusion[-1] < depth


def test_layers_on_a_model() -> None:
    model = model_of("llava")
    layers = [site.name for site in steer.sites(model) if site.kind == "causal"]
    with steer.apply(model, GIFT()) as handle:
        assert [site.name for site in handle.sites] == layers[1:3]
    with steer.apply(model, GIFT(layers="*", saliency=[0])) as handle:  # the vision tower's are left out
        assert [site.name for site in handle.sites] == layers
    with pytest.raises(SelectorError, match="0 to 3"):
        steer.apply(model, GIFT(saliency=[4]))
    with pytest.raises(SelectorError, match="vision_tower"):
        steer.apply(model, GIFT(layers="*vision_tower*"))


@pytest.mark.parametrize(
    "settings",
    [{"alpha": -1}, {"beta": 0}, {"share": 0}, {"share": 1.5}, {"question_share": 0}, {"clamp": 0}, {"before": -1},
     {"after": -1}, {"saliency": []}, {"words": torch.zeros(2, 5, dtype=torch.bool)}],
)  # fmt: skip
def test_settings_that_make_no_sense(settings: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=next(iter(settings))):
        GIFT(**settings)
