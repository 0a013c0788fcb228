"""VAR against the published edit on the whole map, row by row; at prompts, at decode, and its search of dimensions."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import pytest
import tiny_vision_language as tiny
import torch
from dense import dense_attention
from probes import assert_untouched, snapshot
from tiny_vision_language import BATCH, IMAGE, MODELS, ONE, TWO_PICTURES, WITHOUT, Picture, greedy, inputs
from torch import Tensor
from transformers import (
    CompileConfig,
    DynamicCache,
    LlavaConfig,
    LlavaForConditionalGeneration,
    Qwen2_5_VLConfig,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLConfig,
    Qwen2VLForConditionalGeneration,
    StaticCache,
)

import steer
from steer.methods.var import VAR, Ready, grouped, redistributed
from steer.sink_dimensions import known_dims, massiveness
from steer_patches.site import Call, Site

EXACT, VISIBLE = 1e-10, 1e-3
HEADS, KV_HEADS, WIDTH = 4, 2, 16
edits = partial(VAR, p=0.2, rho=0.2, v_min=0.1, tau=1.2, sink_dims=(0, 3, 5), layers="*")  # visible in tiny models
every_model = pytest.mark.parametrize("name", MODELS)


def by_entries(row: list[float], visual: list[bool], sinks: list[bool], settings: VAR) -> list[float] | None:
    """The card's edit of one row of the map, entry by entry; None where the row is not selected."""
    keys = range(len(row))
    of_visual = sum(row[j] for j in keys if visual[j])
    of_visual_sinks = sum(row[j] for j in keys if visual[j] and sinks[j])
    others = sum(row[j] for j in keys if visual[j] and not sinks[j])
    if of_visual_sinks == 0 or others == 0 or of_visual < settings.v_min:
        return None
    if (of_visual - of_visual_sinks) / of_visual < settings.rho:
        return None
    budget = (1 - settings.p) * sum(row[j] for j in keys if sinks[j])
    edited = list(row)
    for j in keys:
        if sinks[j]:
            edited[j] = settings.p * row[j]
        elif visual[j]:
            edited[j] = row[j] * (1 + budget / others)
    return edited


def edited_map(weights: Tensor, visual: Tensor, sinks: Tensor, queries: Tensor, settings: VAR) -> tuple[Tensor, Tensor]:
    """`by_entries` of (B, H, S, S_kv) for the queries (B, S) of sets (B, S_kv), and which rows it changes."""
    edited, selected = weights.clone(), torch.zeros(weights.shape[:3], dtype=torch.bool)
    heads: Any = range(weights.shape[1]) if settings.heads is None else settings.heads
    for b, q in queries.nonzero().tolist():
        for h in heads:
            row = by_entries(weights[b, h, q].tolist(), visual[b].tolist(), sinks[b].tolist(), settings)
            if row is not None:
                edited[b, h, q], selected[b, h, q] = torch.tensor(row, dtype=weights.dtype), True
    return edited, selected


def planted(strength: float, tokens: int = 23, seed: int = 0) -> tuple[Call, Ready]:
    """A causal call of two rows with other pictures and sinks, which get the more attention the stronger they are."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda h: torch.randn(2, h, tokens, WIDTH, generator=g, dtype=torch.float64)  # noqa: E731
    query, key, value = draw(HEADS), draw(KV_HEADS), draw(KV_HEADS)
    query[..., 0] = 2 * query[..., 0].abs() + 1
    sinks, visual, queries = (torch.zeros(2, tokens, dtype=torch.bool) for _ in range(3))
    for row, (start, stop, at) in enumerate([(2, 9, [0, 4, 12]), (5, 14, [1, 6, 7])]):
        visual[row, start:stop], queries[row, stop + 1 :], sinks[row, at] = True, True, True
        key[row, :, at, 0] += strength
    site = Site("layer", 0, "causal", HEADS, KV_HEADS, WIDTH, "sdpa", kernel=Ready(None, sinks, visual, queries))
    return Call(query, key, value, None, 0.5, True, site, 0), site.kernel


def attended(call: Call) -> Tensor:
    """The plain output, through the whole map."""
    return softmax_of(call) @ call.expanded()[1]


def softmax_of(call: Call) -> Tensor:
    scores = call.softmax_scale * call.query @ call.expanded()[0].mT
    later = torch.ones(scores.shape[-2:], dtype=torch.bool).triu(1 + scores.shape[-1] - scores.shape[-2])
    return scores.masked_fill(later, -torch.inf).softmax(-1)


@pytest.mark.parametrize("rho", [0.0, 0.5, 0.8])
@pytest.mark.parametrize("strength", [-40.0, -1.0, 0.0, 1.0, 4.0, 40.0])
def test_equals_the_formula_by_entries(strength: float, rho: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """From nothing on the sinks to all that numbers hold: the map, and the output that is made without it."""
    call, ready = planted(strength)
    method, weights = VAR(sink_dims=(0,), rho=rho), softmax_of(call)
    expected, selected = edited_map(weights, ready.visual, ready.sinks, ready.queries, method)
    groups = grouped(ready.sinks, ready.visual)
    found, rows = redistributed(weights, groups[:, None], method.p, method.rho, method.v_min)
    assert torch.equal(rows & ready.queries[:, None], selected)
    assert (found - expected)[selected].abs().max() <= EXACT if selected.any() else True
    value, plain = call.expanded()[1], attended(call)
    for piece in (5, 512):
        monkeypatch.setitem(VAR._many.__globals__, "ROWS", piece)
        out = method.attend(call, attended)
        assert (out - expected @ value).abs().max() <= EXACT
        assert torch.equal(out[~selected], plain[~selected])
    assert bool(selected.any()) == (strength <= 4 or rho == 0)
    last = slice(-1, None)
    one = call.replace(query=call.query[:, :, last])
    call.site.kernel = Ready(None, ready.sinks, ready.visual, ready.queries[:, last], groups)
    out = method.attend(one, attended)
    assert (out - (expected @ value)[:, :, last]).abs().max() <= EXACT
    assert torch.equal(out[~selected[:, :, last]], attended(one)[~selected[:, :, last]])


@pytest.mark.parametrize("strength", [-1.0, 0.0, 1.0])
def test_the_oracle_equals_the_three_groups(strength: float) -> None:
    """O' = p A_Z O_Z + (A_N + (1 - p) A_Z) O_N + A_R O_R, each group attended to alone."""
    call, ready = planted(strength)
    method, (key, value) = VAR(sink_dims=(0,)), call.expanded()
    expected, selected = edited_map(softmax_of(call), ready.visual, ready.sinks, ready.queries, method)
    seen = torch.ones(23, 23, dtype=torch.bool).tril() & torch.ones(2, 1, 1, 1, dtype=torch.bool)
    scores = (0.5 * call.query @ key.mT).masked_fill(~seen, -torch.inf)
    total, groups = scores.logsumexp(-1), []
    for marked in (ready.sinks, ready.visual & ~ready.sinks, ~ready.visual & ~ready.sinks):
        part = scores.masked_fill(~marked[:, None, None], -torch.inf)
        groups.append(((part.logsumexp(-1) - total).exp()[..., None], part.softmax(-1).nan_to_num(0.0) @ value))
    (a_z, o_z), (a_n, o_n), (a_r, o_r) = groups
    closed = method.p * a_z * o_z + (a_n + (1 - method.p) * a_z) * o_n + a_r * o_r
    assert selected.any()
    assert (closed - expected @ value)[selected].abs().max() <= EXACT


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_low_precision_is_as_exact_as_the_map(dtype: torch.dtype) -> None:
    """The map in this precision is the measure; both selections agree, as far from the thresholds as they are here."""
    call, ready = planted(0.5, tokens=300, seed=3)
    low = call.replace(query=call.query.to(dtype), key=call.key.to(dtype), value=call.value.to(dtype))
    call = low.replace(query=low.query.double(), key=low.key.double(), value=low.value.double())
    method = VAR(sink_dims=(0,), rho=0.0, v_min=0.0)
    sets = (grouped(ready.sinks, ready.visual)[:, None], method.p, method.rho, method.v_min)

    def through_map(here: Call) -> Tensor:
        weights = softmax_of(here)
        edited = torch.where(ready.queries[:, None, :, None], redistributed(weights, *sets)[0], weights)
        return edited @ here.expanded()[1]

    truth = through_map(call)
    eager = (through_map(low).double() - truth).norm()
    assert (method.attend(low, attended).double() - truth).norm() <= 1.05 * eager


def test_sinks_are_massive() -> None:
    states = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(0)).double()
    for b in range(2):
        for s in range(5):
            x = states[b, s]
            root = float((x * x).mean() + 1e-6) ** 0.5
            assert abs(massiveness(states, (2, 6))[b, s] - max(abs(x[2]), abs(x[6])) / root) <= EXACT


def double(name: str) -> Any:
    return copy.deepcopy(tiny.model_of(name)).double()


def given(name: str, rows: Any = BATCH, side: str = "left", dtype: torch.dtype = torch.float64) -> dict[str, Any]:
    return {k: v.to(dtype) if v.is_floating_point() else v for k, v in inputs(name, rows, side).items()}


@contextmanager
def through_maps(
    model: Any, method: VAR, ids: Tensor, real: Tensor, prompt: int | None = None, among: Tensor | None = None
) -> Iterator[None]:
    """The model attends through edited maps: sinks from the layers' inputs, in the first `prompt` tokens only.

    Args:
        among: (B, S) bool, which tokens of pictures show something; None = all.
    """
    picture = ids == IMAGE
    visual = picture if among is None else picture & among
    queries = (picture.cumsum(-1) > 0) & ~picture & real
    first = torch.arange(ids.shape[1]) < (ids.shape[1] if prompt is None else prompt)
    sinks: list[Tensor] = []

    def look(layer: Any, args: Any, kwargs: Any) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        phi = states[..., list(method.sink_dims or ())].abs().amax(-1)
        sinks[:] = [(phi / (states.pow(2).mean(-1) + 1e-6).sqrt() > method.tau) & real & first]

    def edit(scores: Tensor, weights: Tensor) -> Tensor:
        return edited_map(weights, visual, sinks[0], queries, method)[0]

    layers = [site.name.removesuffix(".self_attn") for site in steer.sites(model) if site.kind == "causal"]
    with ExitStack() as stack:
        for name in layers:
            hook = model.get_submodule(name).register_forward_pre_hook(look, with_kwargs=True)
            stack.callback(hook.remove)
        stack.enter_context(dense_attention(model, [f"{name}.self_attn" for name in layers], edit))
        yield


def showing(model: Any, ids: Tensor, arguments: dict[str, Any]) -> Tensor | None:
    """Which tokens of pictures are no ends of rows, by the embeddings that the language model gets."""
    line = getattr(model.model, "image_newline", None)
    if line is None:
        return None
    got: list[Tensor] = []
    hook = model.model.language_model.register_forward_pre_hook(
        lambda module, args, kwargs: got.append(kwargs["inputs_embeds"]), with_kwargs=True
    )
    model(**arguments)
    hook.remove()
    return ~(got[0] == line).all(-1)


@every_model
@pytest.mark.parametrize("rows", [ONE, TWO_PICTURES, BATCH], ids=["one", "two pictures", "batch"])
def test_a_prompt_attends_through_the_edited_map(name: str, rows: Any) -> None:
    model, arguments, method = double(name), given(name, rows), edits(heads=[0, 1, 3])
    ids, real = arguments["input_ids"], arguments["attention_mask"].bool()
    plain = model(**arguments).logits
    with through_maps(model, method, ids, real, among=showing(model, ids, arguments)):
        expected = model(**arguments).logits
    with steer.apply(model, method):
        for cached in (True, False):
            found = model(**arguments, use_cache=cached).logits
            assert (found - expected)[real].abs().max() <= EXACT
    assert torch.equal(model(**arguments).logits, plain)
    assert (plain - expected)[real].abs().max() > VISIBLE


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "idefics3"])
@pytest.mark.parametrize("cache", ["dynamic", "static"])
@pytest.mark.parametrize("heads", [None, [1, 2]])
def test_later_tokens_are_no_sinks(name: str, cache: str, heads: list[int] | None) -> None:
    """Token by token and several at a time, against one map of the whole text with the sinks of the prompt."""
    model, arguments, method = double(name), given(name), edits(heads=heads)
    ids = arguments["input_ids"]
    prompt = ids.shape[1]
    more = torch.randint(3, 40, (2, 6), generator=torch.Generator().manual_seed(5))
    longer = {**arguments, "input_ids": torch.cat([ids, more], 1)}
    for key in ("attention_mask", "mm_token_type_ids"):
        if key in longer:
            added = torch.full((2, 6), int(key == "attention_mask"), dtype=longer[key].dtype)
            longer[key] = torch.cat([longer[key], added], 1)
    real = longer["attention_mask"].bool()
    places: Any = partial(_places, model, longer)
    arguments, longer = {**arguments, **places(0, prompt)}, {**longer, **places(0, prompt + 6)}
    with through_maps(model, method, longer["input_ids"], real, prompt):
        expected = model(**longer).logits
    config = model.config.get_text_config()
    known = DynamicCache(config=config) if cache == "dynamic" else StaticCache(config, max_cache_len=prompt + 9)
    with steer.apply(model, method):
        found = [model(**arguments, past_key_values=known).logits]
        for start, stop in [(0, 1), (1, 4), (4, 5), (5, 6)]:
            piece = more[:, start:stop]
            seen = longer["attention_mask"][:, : prompt + stop]
            further = places(prompt + start, prompt + stop)
            found.append(model(input_ids=piece, attention_mask=seen, past_key_values=known, **further).logits)
    difference = (torch.cat(found, 1) - expected)[real].abs().max()
    assert difference <= EXACT


def _places(model: Any, whole: dict[str, Any], start: int, stop: int) -> dict[str, Tensor]:
    """The places of a whole text's tokens, which Qwen cannot tell from a piece; generate gives them too."""
    if not hasattr(model.model, "get_rope_index"):
        return {}
    names = ("input_ids", "mm_token_type_ids", "image_grid_thw", "attention_mask")
    return {"position_ids": model.model.get_rope_index(**{name: whole[name] for name in names})[0][..., start:stop]}


def test_a_picture_later_in_the_conversation() -> None:
    """Its forward finds its own sinks: as if all had been there from the beginning, where the model is causal."""
    model, method = double("llava"), edits()
    whole = given("llava", [[3, Picture(), 4, Picture(), 5]])
    cut = 3 + 16 + 4
    with steer.apply(model, method):
        expected = model(**whole).logits
        for start in (cut, 2):  # two pictures, or both later than some text
            cache, pixels = DynamicCache(config=model.config), whole["pixel_values"]
            first = {"pixel_values": pixels[:1]} if start == cut else {}
            parts = [model(input_ids=whole["input_ids"][:, :start], past_key_values=cache, **first)]
            rest = {"pixel_values": pixels[1:] if start == cut else pixels}
            parts.append(model(input_ids=whole["input_ids"][:, start:], past_key_values=cache, **rest))
            assert (torch.cat([part.logits for part in parts], 1) - expected).abs().max() <= EXACT


@every_model
def test_what_must_not_change(name: str) -> None:
    model = tiny.model_of(name)
    arguments, text = inputs(name), inputs(name, WITHOUT)
    plain, tokens = model(**arguments).logits, greedy(model, arguments)
    of_text, text_tokens = model(**text).logits, greedy(model, text)
    mixed = inputs(name, [[3, Picture(), 6], [9]])
    apart = model(**mixed).logits
    _forget(model)
    before = snapshot(model)
    quiet = [edits(p=1.0), edits(tau=50.0), edits(steps="1000:"), edits(sink_dims=()), edits(v_min=1.0), edits(rho=1.0)]
    for method in quiet:
        with steer.apply(model, method):
            assert torch.equal(model(**arguments).logits, plain), method
            assert torch.equal(greedy(model, arguments), tokens), method
    with steer.apply(model, edits()):
        assert torch.equal(model(**text).logits, of_text)
        assert torch.equal(greedy(model, text), text_tokens)
        assert not torch.equal(model(**arguments).logits, plain)
        found = model(**mixed).logits
    _forget(model)
    assert_untouched(before, model)
    assert torch.equal(found[1], apart[1])
    assert not torch.equal(found[0], apart[0])


def _forget(model: Any) -> None:
    """Qwen keeps something of its last prompt, in a new tensor each time."""
    if hasattr(model.model, "rope_deltas"):
        model.model.rope_deltas = None


def test_the_weights_of_a_layer() -> None:
    """Effective weights of one layer: text keeps its own, sinks keep p, all rows sum to 1; other rows are the same."""
    model, arguments = double("llava"), given("llava", ONE)
    name = "model.language_model.layers.2.self_attn"
    method = edits(layers=name)
    ids = arguments["input_ids"]
    states: list[Tensor] = []
    with ExitStack() as stack:
        layer = model.get_submodule(name.removesuffix(".self_attn"))
        hook = layer.register_forward_pre_hook(
            lambda module, args, kwargs: states.append(args[0] if args else kwargs["hidden_states"]), with_kwargs=True
        )
        stack.callback(hook.remove)
        maps = []
        for effective in (False, True):
            options: dict[str, Any] = {"columns": "all", "keep_heads": True, "effective": effective}
            with steer.apply(model, method), steer.capture(model, name, **options) as captured:
                model(**arguments, use_cache=False)
            maps.append(captured.maps[name])
    plain, edited = maps
    sinks, visual = massiveness(states[0], method.sink_dims or ()) > method.tau, ids == IMAGE
    changed = (plain - edited).abs().amax(-1) > 1e-12
    assert changed.any()
    assert not changed.all()
    assert (edited.sum(-1) - 1).abs().max() <= EXACT
    kept = (~visual & ~sinks)[:, None, None].expand_as(plain)
    assert (edited - plain)[kept].abs().max() <= 1e-14
    on_sinks = sinks[:, None, None] & changed[..., None]
    assert (edited - 0.2 * plain)[on_sinks].abs().max() <= 1e-14
    assert (edited >= plain - 1e-14)[(visual & ~sinks)[:, None, None].expand_as(plain)].all()


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_padded_row_equals_the_row_alone(name: str, side: str) -> None:
    model = double(name)
    with steer.apply(model, edits()):
        both = given(name, side=side)
        together, real = model(**both).logits, both["attention_mask"].bool()
        for row in range(2):
            alone = given(name, [BATCH[row]])
            pixels = _pixels_of(name, both, row)
            found = model(**{**alone, **pixels, "input_ids": both["input_ids"][row, real[row]][None]}).logits[0]
            assert (together[row, real[row]] - found).abs().max() <= 1e-5


def _pixels_of(name: str, both: dict[str, Any], row: int) -> dict[str, Any]:
    """The pictures of one row of `BATCH`, which has one in each."""
    if name.startswith("qwen"):
        sizes = both["image_grid_thw"].prod(-1).tolist()
        part = slice(0, sizes[0]) if row == 0 else slice(sizes[0], None)
        return {"pixel_values": both["pixel_values"][part], "image_grid_thw": both["image_grid_thw"][row : row + 1]}
    given = {"pixel_values": both["pixel_values"][row : row + 1]}
    for key in ("image_sizes", "pixel_attention_mask", "batch_num_images"):
        if key in both:
            given[key] = both[key][row : row + 1]
    return given


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
@pytest.mark.parametrize("rows", [TWO_PICTURES, BATCH], ids=["no mask", "padded"])
def test_ways_to_generate(name: str, rows: Any) -> None:
    model, arguments = tiny.model_of(name), inputs(name, rows)
    with steer.apply(model, edits()):
        tokens, beams = greedy(model, arguments), greedy(model, arguments, num_beams=2)
        static = {"cache_implementation": "static"}
        assert torch.equal(greedy(model, arguments, **static), tokens)
        assert torch.equal(greedy(model, arguments, num_beams=2, **static), beams)
    eager, real = copy.deepcopy(model), arguments["attention_mask"].bool()
    eager.set_attn_implementation("eager")
    with steer.apply(model, edits()), steer.apply(eager, edits()):
        assert (eager(**arguments).logits - model(**arguments).logits)[real].abs().max() <= 1e-5


def test_compiled_decoding() -> None:
    torch._dynamo.reset()
    model, arguments = tiny.model_of("llava"), inputs("llava")
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise transformers compiles on GPUs alone
    graphs = []

    def keep(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph

    config.backend = keep
    compiled = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
    plain = greedy(model, arguments, cache_implementation="static")
    with steer.apply(model, edits(heads=[0, 2])):
        wanted = greedy(model, arguments, cache_implementation="static")
        for _ in range(2):
            assert torch.equal(greedy(model, arguments, **compiled), wanted)
            assert len(graphs) == 1
    assert not torch.equal(wanted, plain)


@pytest.mark.slow
def test_compiled_prompts_show_their_states_or_are_refused() -> None:
    arguments = inputs("llava", ONE)
    for fullgraph in (False, True):
        torch._dynamo.reset()
        model = copy.deepcopy(tiny.model_of("llava"))
        with steer.apply(model, edits()):
            wanted = model(**arguments).logits
            model.model.language_model.compile(backend="eager", fullgraph=fullgraph)
            if fullgraph:
                with pytest.raises(torch._dynamo.exc.Unsupported, match="compile decoding alone"):
                    model(**arguments)
            else:
                assert torch.equal(model(**arguments).logits, wanted)


def test_a_forward_that_fails_leaves_nothing() -> None:
    model, arguments = tiny.model_of("llava"), inputs("llava", ONE)
    layer = model.model.language_model.layers[1]
    with steer.apply(model, edits()) as handle:
        wanted = model(**arguments).logits
        hook = layer.register_forward_pre_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(**arguments)
        hook.remove()
        assert torch.equal(model(**arguments).logits, wanted)
        blocks = next(iter(handle.bindings[0].live.values()))[0].scope.blocks
        assert all(block.action is None for block in blocks)


def test_gradients_reach_the_picture() -> None:
    model, arguments, size = double("llava"), given("llava", [[3, Picture(), 6], [9]]), 1e-4
    pixels = arguments["pixel_values"]
    with steer.apply(model, edits()):

        def loss(pixels: Tensor) -> Tensor:
            return model(**{**arguments, "pixel_values": pixels}, use_cache=False).logits[0, -1, 5]

        leaf = pixels.clone().requires_grad_()
        loss(leaf).backward()
        step = torch.zeros_like(pixels)
        step[0, :, 4:8, 4:8] = size
        slope = float(loss(pixels + step) - loss(pixels - step)) / 2 / size
    assert leaf.grad is not None
    gradient = float(leaf.grad[step != 0].sum())
    assert torch.isfinite(leaf.grad).all()
    assert gradient
    assert abs(slope - gradient) < 0.01 * abs(gradient) + 1e-3


def test_saved_and_loaded_is_the_same(tmp_path: Any) -> None:
    model, arguments = tiny.model_of("llava"), inputs("llava")
    method = edits(steps="0:3")
    with steer.apply(model, method):
        wanted = model(**arguments).logits
    method.save(str(tmp_path))
    loaded = steer.load(str(tmp_path))
    assert loaded == method
    with steer.apply(model, loaded):
        assert torch.equal(model(**arguments).logits, wanted)


@pytest.mark.parametrize(
    "settings, says",
    [
        ({"p": 1.2}, "p=1.2"),
        ({"rho": -0.1}, "rho=-0.1"),
        ({"v_min": 2}, "v_min=2"),
        ({"tau": 0}, "tau=0"),
        ({"dense_layers": -1}, "dense_layers=-1"),
        ({"sink_dims": [-2]}, "from 0"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], says: str) -> None:
    with pytest.raises(ValueError, match=says):
        VAR(**settings)


def test_models_that_do_not_fit() -> None:
    model = tiny.model_of("llava")
    before = snapshot(model)
    with pytest.raises(steer.CompositionError, match=r"LlavaForConditionalGeneration over llama .* steer.calibrate"):
        steer.apply(model, VAR())
    with pytest.raises(steer.CompositionError, match="32 dimensions"):
        steer.apply(model, VAR(sink_dims=(32,)))
    assert_untouched(before, model)
    model = copy.deepcopy(model)
    for layer in model.model.language_model.layers:
        layer.self_attn.attention_dropout = 0.1
    model.train()
    with steer.apply(model, edits()), pytest.raises(ValueError, match="dropout"):
        model(**inputs("llava", ONE))


def test_known_models() -> None:
    """By class, kind of language model, its size and its words: a LLaVA over Mistral has the size of that of 7B."""
    large: dict[str, Any] = {
        "hidden_size": 5120,
        "intermediate_size": 13824,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
    }
    size = {"hidden_size": 3584, "num_hidden_layers": 28, "num_attention_heads": 28, "num_key_value_heads": 4}
    qwen = {**size, "vocab_size": 152064}

    def llava(kind: str = "llama", words: int = 32064, **settings: Any) -> Any:
        text = {"model_type": kind, "vocab_size": words, **settings}
        return LlavaForConditionalGeneration(LlavaConfig(text_config=text))

    cases: list[tuple[Callable[[], Any], tuple[int, ...] | None]] = [
        (llava, (1415, 2533)),
        (lambda: llava(**large), (2100, 4743)),
        (lambda: Qwen2VLForConditionalGeneration(Qwen2VLConfig(text_config=qwen)), (458, 2570)),
        (lambda: Qwen2_5_VLForConditionalGeneration(Qwen2_5_VLConfig(text_config=qwen)), None),
        (lambda: llava("mistral"), None),
        (lambda: llava(words=128320), None),
    ]
    for make, dims in cases:
        with torch.device("meta"):
            assert known_dims(make()) == dims


FIRST, MASSIVE, ROGUE = 1, 4, 9  # a token, and two dimensions


def with_planted(massive: bool, rogue: bool) -> Any:
    """A LLaVA whose first token is massive in one dimension, and all of whose other tokens are large in another."""
    model = copy.deepcopy(tiny.model_of("llava"))
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        if rogue:
            table[:, ROGUE] = 400
            model.model.multi_modal_projector.linear_2.bias[ROGUE] = 400
        if massive:
            table[FIRST, MASSIVE] = 4000
    return model


def prompts(count: int = 3) -> list[dict[str, Any]]:
    found = []
    for seed in range(count):
        sample = tiny.inputs("llava", [[3 + seed, Picture(), 6], [4, Picture(), 5]], seed=seed)
        ids, mask = sample["input_ids"], sample["attention_mask"]
        ids[torch.arange(2), mask.argmax(-1)] = FIRST
        found.append(sample)
    return found


def test_the_search_finds_a_massive_dimension() -> None:
    """And not the one that is large everywhere, whose ratio is below 1."""
    model = with_planted(massive=True, rogue=True)
    method = steer.calibrate(model, VAR(tau=5.0, p=0.3), prompts(), progress=False)
    assert isinstance(method, VAR)
    assert (method.sink_dims, method.tau, method.p) == ((MASSIVE,), 5.0, 0.3)
    plan = method.plan
    assert plan is not None
    assert plan.report["figures"]["sink dimensions"] == str(MASSIVE)
    assert (plan.tensors["first"] > 5.5).all()  # of sqrt(32) = 5.66
    text, visual = plan.tensors["text"], plan.tensors["visual"]
    assert text[:, 1:].sum() == visual[:, 1:].sum() == 0
    assert (visual.sum(-1) == 3 * 2 * 16).all()
    assert (text.sum(-1) == sum(3 + seed - 1 + 6 + 4 - 1 + 5 for seed in range(3))).all()
    with steer.apply(model, method):
        model(**prompts()[0])


@pytest.mark.parametrize("rogue", [False, True])
def test_the_search_may_find_none(rogue: bool) -> None:
    model = with_planted(massive=False, rogue=rogue)
    with pytest.warns(UserWarning, match="none found"):
        method = steer.calibrate(model, VAR(), prompts(), progress=False)
    assert isinstance(method, VAR)
    assert method.sink_dims == ()
    assert method.is_neutral()
    assert method.plan is not None
    assert method.plan.report["figures"]["sink dimensions"] == "none found"
    plain = model(**prompts()[0]).logits
    with steer.apply(model, method):
        assert torch.equal(model(**prompts()[0]).logits, plain)


def test_the_search_resumes_and_counts_what_is_given(tmp_path: Any) -> None:
    model = with_planted(massive=True, rogue=True)
    data = prompts()
    wanted = steer.calibrate(model, VAR(), data, progress=False)
    search = VAR().search()
    with steer.apply(model, search):
        search.start_pass(0)
        for sample in data:
            search.run(model, sample, 0)
    again = VAR().search()
    again.load_state(search.state())
    with steer.apply(model, again):
        again.start_pass(1)
        for sample in data:
            again.run(model, sample, 0)
    resumed = again.finish()
    assert isinstance(wanted, VAR) and isinstance(resumed, VAR)
    assert wanted.plan is not None and resumed.plan is not None
    assert resumed.sink_dims == wanted.sink_dims
    for key, tensor in wanted.plan.tensors.items():
        assert torch.equal(tensor, resumed.plan.tensors[key])
    given = steer.calibrate(model, VAR(sink_dims=(ROGUE,)), data, progress=False, report=tmp_path)
    assert isinstance(given, VAR)
    assert given.sink_dims == (ROGUE,)
    assert given.plan is not None
    assert given.plan.tensors["visual"][:, 5:].sum() == given.plan.tensors["visual"].sum()
    assert "other text tokens" in (tmp_path / "report.md").read_text()


def test_the_search_wants_pictures() -> None:
    model = tiny.model_of("llava")
    with pytest.raises(ValueError, match="a prompt with a picture"):
        steer.calibrate(model, VAR(), [inputs("llava", WITHOUT)], progress=False)
    with pytest.raises(ValueError, match="above 1"):
        steer.calibrate(model, VAR(), prompts(), progress=False, ratio=0.5)
