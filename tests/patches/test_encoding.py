"""The life of pictures: through every way to generate, padding, caches, encoders that run ahead, and second passes."""

from __future__ import annotations

import copy
import io
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any, ClassVar

import pytest
import torch
from probes import Scale, assert_untouched, snapshot, steer_attributes
from tiny import build
from tiny_language import NEW
from tiny_vision_language import BATCH, IMAGE, MODELS, ONE, WITHOUT, Picture, greedy, inputs, model_of
from torch import Tensor
from transformers import CompileConfig, DynamicCache
from transformers.cache_utils import Cache

import steer
from steer import Method
from steer_patches.generation import Text
from steer_patches.pictures import Pictures, text_only
from steer_patches.site import Call, Next, Scope, Site

every_model = pytest.mark.parametrize("name", MODELS)
MIXED = [*BATCH, [17]]  # two rows with a picture, one without


@dataclass(kw_only=True)
class Look(Method, register=False):
    """Changes nothing; keeps what a method is told of the pictures, and what it read while they were encoded."""

    layers: Any = "*layers.0.self_attn"
    seen: list[Pictures | None] = field(default_factory=list)
    read: list[dict[str, dict[Any, Any]]] = field(default_factory=list)

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_pictures: ClassVar[bool] = True

    def before_forward(self, scope: Scope, sites: Any) -> None:
        assert scope.text is not None
        self.seen.append(scope.text.pictures)

    def attend(self, call: Call, next: Next) -> Tensor:
        return next(call)

    def after_forward(self, scope: Scope, sites: Any, output: Any) -> Any:
        self.read.append(scope.read)
        return output


@dataclass(kw_only=True)
class Reader(Look, register=False):
    """Also reads the keys of the vision tower."""

    layers: Any = "*"

    kinds: ClassVar[tuple[str, ...]] = ("causal", "self")

    def attend(self, call: Call, next: Next) -> Tensor:
        if call.site.kind == "self":
            reading = call.site.scope.reading
            assert reading is not None
            reading[call.site.name] = call.key.clone()
        return next(call)


def same(a: Pictures | None, b: Pictures | None, tokens: int | None = None) -> bool:
    assert a is not None
    assert b is not None
    return all(torch.equal(a.tensors()[n][:, :tokens], b.tensors()[n][:, :tokens]) for n in a.tensors())


def assert_same(before: Any, model: Any) -> None:
    """Untouched, but for what Qwen models themselves keep of their last positions."""
    kept = [(part, cls, {k: v for k, v in held.items() if k != "rope_deltas"}) for part, cls, held in before]
    deltas = [(m, m.__dict__.pop("rope_deltas")) for m in model.modules() if "rope_deltas" in vars(m)]
    try:
        assert_untouched(kept, model)
    finally:
        for module, delta in deltas:
            module.rope_deltas = delta


OPTIONS: dict[str, dict[str, Any]] = {
    "dynamic": {},
    "static": {"cache_implementation": "static"},
    "beams": {"num_beams": 3},
    "static beams": {"num_beams": 2, "cache_implementation": "static"},
    "no cache": {"use_cache": False, "suppress_tokens": [IMAGE]},  # which would need a picture
    "copies": {"do_sample": True, "num_return_sequences": 2, "top_k": 1},
}


@every_model
@pytest.mark.parametrize("options", OPTIONS)
def test_generating_is_identical_and_pictures_stay(name: str, options: str) -> None:
    model, given = model_of(name), inputs(name, MIXED)
    chosen = OPTIONS[options]
    plain, before = greedy(model, given, **chosen), snapshot(model)
    look, first = Look(), Look()
    with steer.apply(model, look):
        assert torch.equal(greedy(model, given, **chosen), plain)
    if "cache_implementation" not in chosen:  # a static cache is kept on the model
        assert_same(before, model)
    with steer.apply(model, first):
        model(**given)
    prompt, length = first.seen[0], given["input_ids"].shape[1]
    assert prompt is not None
    copies = max(chosen.get("num_beams", 1), chosen.get("num_return_sequences", 1))
    assert len(look.seen) == NEW
    for step, pictures in enumerate(look.seen):
        assert pictures is not None
        assert pictures.number.shape == (copies * len(MIXED), length + step)
        for field_name, tensor in pictures.tensors().items():
            wanted = prompt.tensors()[field_name].repeat_interleave(copies, 0)
            assert torch.equal(tensor[:, :length], wanted)
        assert not pictures.shows[:, length:].any()
        assert (pictures.number[:, length:] == -1).all()
        assert torch.equal(pictures.number[-1], torch.full_like(pictures.number[-1], -1))
        assert pictures.last[-1] == -1
        assert not pictures.after[-1].any()


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_padding_moves_pictures_and_nothing_else(name: str, side: str) -> None:
    model, given, look = model_of(name), inputs(name, MIXED, side), Look()
    with steer.apply(model, look):
        model(**given)
        for i, row in enumerate(MIXED[:2]):
            alone = inputs(name, [row])
            pixels = alone.get("pixel_values")
            assert pixels is not None
            model(**alone)
            real = given["attention_mask"][i].bool()
            both, one = look.seen[0], look.seen[-1]
            assert both is not None
            assert one is not None
            for field_name in ("number", "shows", "box", "view_box"):
                assert torch.equal(both.tensors()[field_name][i][real], one.tensors()[field_name][0])
            assert (both.number[i][~real] == -1).all()


@every_model
def test_text_alone_has_no_pictures(name: str) -> None:
    model, look = model_of(name), Look()
    with steer.apply(model, look):
        greedy(model, inputs(name, WITHOUT))
        model(**inputs(name, WITHOUT))
    assert look.seen == [None] * (NEW + 1)


@every_model
def test_nothing_is_computed_for_methods_that_do_not_ask(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def never(*args: Any) -> None:
        raise AssertionError("pictures were looked for")

    model = model_of(name)
    monkeypatch.setattr("steer_patches.attach.pictures_of", never)
    with steer.apply(model, Scale(layers="*layers.0.self_attn")):
        greedy(model, inputs(name))


@every_model
def test_assisted_decoding(name: str) -> None:
    options: dict[str, Any] = {"prompt_lookup_num_tokens": 2}
    model, given, look = model_of(name), inputs(name, ONE), Look()
    try:
        plain = greedy(model, given, **options)
    except Exception as error:  # the model's own
        with steer.apply(model, look), pytest.raises(type(error)):
            greedy(model, given, **options)
        pytest.skip(f"{type(error).__name__}: {error}"[:200])
    with steer.apply(model, look):
        assert torch.equal(greedy(model, given, **options), plain)
    length = given["input_ids"].shape[1]
    first = look.seen[0]
    for pictures in look.seen:
        assert same(pictures, first, length)
        assert pictures is not None
        assert (pictures.number[:, length:] == -1).all()


def continued(name: str, cache: Cache | None = None) -> tuple[dict[str, Any], dict[str, Any]]:
    """A prompt with a picture, and what follows it: text, then another picture and text."""
    first, second = inputs(name, [[3, Picture(), 6]]), inputs(name, [[4, Picture((1, 2)), 3]], seed=1)
    return first, second


@every_model
@pytest.mark.parametrize("between", ["nothing", "steered text", "unsteered text"])
def test_a_second_picture_in_a_later_forward(name: str, between: str) -> None:
    model, look, cache = model_of(name), Look(), DynamicCache(config=model_of(name).config)
    first, second = continued(name)
    second.pop("attention_mask")
    past = first["input_ids"].shape[1]
    with steer.apply(model, look):
        model(**first, past_key_values=cache)
        if between == "steered text":
            model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    if between == "unsteered text":
        model(input_ids=torch.tensor([[7, 8]]), past_key_values=cache)
    past += 0 if between == "nothing" else 2
    with steer.apply(model, look):
        model(**second, past_key_values=cache)
        both = look.seen[-1]
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
        after = look.seen[-1]
        cache.crop(past - both.number.shape[1] - 1)  # the second picture is taken back and given again
        model(**second, past_key_values=cache)
        assert same(look.seen[-1], both)
        model(**{k: v for k, v in second.items() if k != "past_key_values"}, use_cache=False)
        alone = look.seen[-1]
    assert both is not None
    assert alone is not None
    assert same(both, look.seen[0], first["input_ids"].shape[1])
    assert same(both, after, past + second["input_ids"].shape[1])
    number = alone.number
    assert torch.equal(both.number[:, past:], torch.where(number >= 0, number + 1, -1))
    for field_name in ("shows", "box", "view", "view_box"):
        assert torch.equal(both.tensors()[field_name][:, past:], alone.tensors()[field_name])


def test_a_generated_token_that_looks_like_a_picture_is_text() -> None:
    model, look = model_of("llava"), Look()
    first = inputs("llava", ONE)
    with steer.apply(model, look):
        cache = DynamicCache(config=model.config)
        model(**first, past_key_values=cache)
        model(input_ids=torch.tensor([[IMAGE]]), past_key_values=cache)
    assert look.seen[-1] is not None
    assert look.seen[-1].number[0, -1] == -1


@every_model
def test_errors_leave_nothing(name: str) -> None:
    """Wrong numbers of tokens: an error in words, and the same cache and model work afterwards."""
    model, look = model_of(name), Look()
    given = inputs(name, ONE)
    before = snapshot(model)
    wrong = {**given, "input_ids": torch.where(given["input_ids"] == IMAGE, 7, given["input_ids"])}
    if "mm_token_type_ids" in wrong:
        wrong["mm_token_type_ids"] = torch.zeros_like(wrong["input_ids"])
    with steer.apply(model, look):
        cache = DynamicCache(config=model.config)
        with pytest.raises(ValueError, match=r"tokens of pictures|image tokens do not match"):
            model(**wrong, past_key_values=cache)
        assert cache.get_seq_length() == 0
        model(**given, past_key_values=cache)
        model(**given)
    assert len(look.seen) == 2
    assert same(look.seen[0], look.seen[1])
    assert_same(before, model)


@dataclass(kw_only=True)
class Failing(Look, register=False):
    """Notes in the sequence's memory what it saw; fails in a late layer when it is told to."""

    layers: Any = "*layers.3.self_attn"
    fails: bool = False

    def attend(self, call: Call, next: Next) -> Tensor:
        call.run.memory[("Failing", call.site.name)] = call.key.shape[2]
        if self.fails:
            raise ZeroDivisionError
        return next(call)


def test_a_failed_forward_leaves_nothing_in_the_memory_of_its_sequence() -> None:
    model, failing = model_of("llava"), Failing()
    first, second = inputs("llava", [[3, 4, 5]]), inputs("llava", [[4, Picture(), 3]])
    second.pop("attention_mask")
    cache = DynamicCache(config=model.config)
    with steer.apply(model, failing):
        model(**first, past_key_values=cache)
        before = dict(cache.steer_run.memory)
        failing.fails = True
        with pytest.raises(ZeroDivisionError):
            model(**second, past_key_values=cache)
        assert cache.steer_run.memory == before
        failing.fails = False
        cache.crop(-second["input_ids"].shape[1])
        model(input_ids=torch.tensor([[7]]), past_key_values=cache)
    assert failing.seen[-2] is not None  # that of the failed forward
    assert failing.seen[-1] is None


@pytest.mark.parametrize("name", ["llava", "qwen2_vl"])
def test_two_threads_with_pictures(name: str) -> None:
    """What is read while one thread encodes its pictures is not that of the other's forward."""
    model, prompts = model_of(name), [inputs(name, rows, seed=seed) for seed, rows in enumerate((ONE, BATCH))]
    ways: list[Any] = [lambda i: model(**prompts[i]), lambda i: model.get_image_features(**encoding(prompts[i]))]
    wanted, reader = [], Reader()
    with steer.apply(model, reader):
        for i in (0, 1):
            model(**prompts[i])
            wanted.append({key: value.shape for key, value in reader.read[-1]["image"].items()})
        reader.read.clear()
        with ThreadPoolExecutor(2) as pool:
            list(pool.map(lambda n: ways[n % 2](n % 2), range(60)))
    assert len(reader.read) == 30
    for read in reader.read:
        assert {key: value.shape for key, value in read["image"].items()} == wanted[0]


@every_model
def test_pictures_need_input_ids(name: str) -> None:
    model, look, given = model_of(name), Look(), inputs(name, ONE)
    embedded = {k: v for k, v in given.items() if k != "input_ids"}
    embedded["inputs_embeds"] = model.get_input_embeddings()(given["input_ids"])
    with steer.apply(model, look), pytest.raises(ValueError, match="give input_ids"):
        model(**embedded)
    with steer.apply(model, Scale(layers="*layers.0.self_attn", factor=1.0)):
        wanted = model(**given).logits
        if not name.startswith("qwen"):  # whose positions need the ids too
            torch.testing.assert_close(model(**embedded).logits, wanted)


def test_pictures_in_pieces_are_refused() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    with steer.apply(model, Look()), pytest.raises(ValueError, match="prefill_chunk_size"):
        greedy(model, given, prefill_chunk_size=8)


def encoding(given: dict[str, Any]) -> dict[str, Any]:
    names = ("pixel_values", "image_sizes", "image_grid_thw", "batch_num_images", "pixel_attention_mask")
    return {name: given[name] for name in names if name in given}


@every_model
def test_pictures_that_the_user_encoded(name: str) -> None:
    """Between apply and the prompt: followed. Before: refused in words."""
    model, given = model_of(name), inputs(name, BATCH)
    asked, read = encoding(given), Reader()
    rest = {k: v for k, v in given.items() if k not in asked or k.startswith("image_grid")}
    early = {"image": model.base_model.get_image_features(**asked, return_dict=True)}
    wanted = model(**given).logits
    with steer.apply(model, read):
        output = {"image": model.get_image_features(**asked, return_dict=True)}
        assert torch.equal(model(**rest, mm_encoder_outputs=output).logits, wanted)
        model(**given)
        ahead, within = read.read
        assert same(read.seen[0], read.seen[1])
        assert ahead["image"].keys() == within["image"].keys() != set()
        assert all(torch.equal(ahead["image"][key], within["image"][key]) for key in ahead["image"])
        greedy(model, given)
        assert all(torch.equal(read.read[2]["image"][key], within["image"][key]) for key in within["image"])
        model(**inputs(name, WITHOUT))
        assert read.read[-1] == {}
        with pytest.raises(ValueError, match="does not know these encoded pictures"):
            model(**rest, mm_encoder_outputs=early)
    assert torch.equal(model(**rest, mm_encoder_outputs=early).logits, wanted)


@every_model
def test_copies_are_plain(name: str) -> None:
    model, given = build(MODELS[name]), inputs(name)
    wanted = model_of(name)(**given).logits
    with steer.apply(model, Look()):  # a forward leaves hooks of transformers' own, which no pickle can hold
        twin = copy.deepcopy(model)
        file = io.BytesIO()
        torch.save(model, file)
    file.seek(0)
    for other in (twin, torch.load(file, weights_only=False)):
        assert type(other) is type(model)
        assert type(other.base_model) is type(model.base_model)
        assert not steer_attributes(other)
        assert torch.equal(other(**given).logits, wanted)


@every_model
def test_the_base_model_alone(name: str) -> None:
    base, given, look = model_of(name).base_model, inputs(name), Look()
    wanted, before = base(**given).last_hidden_state, snapshot(base)
    with steer.apply(base, look):
        assert torch.equal(base(**given).last_hidden_state, wanted)
    assert look.seen[0] is not None
    assert_same(before, base)


@dataclass(kw_only=True)
class Again(Method, register=False):
    """Runs the model a second time at a place of a forward.

    Args:
        where: "before_forward", "attend" or "after_forward".
        changes: makes the changed arguments of (arguments, pictures).
        at: of the second pass: what to do at its first site.
    """

    where: str = "after_forward"
    changes: Any = None
    at: Any = None
    layers: Any = "*layers.1.self_attn"
    logits: list[Tensor] = field(default_factory=list)
    texts: list[Any] = field(default_factory=list)
    failed: int = 0

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    needs_pictures: ClassVar[bool] = True

    def _run(self, scope: Scope, sites: Any) -> None:
        if scope.run.phase == "decode":
            return
        assert scope.again is not None
        assert scope.text is not None
        text, read = scope.text, {modality: set(kept) for modality, kept in scope.read.items()}
        changed = self.changes(scope.arguments, scope.text) if self.changes else {}
        at = None if self.at is None else {name: self.at for name in sites}
        try:
            self.logits.append(scope.again(at=at, use_cache=False, past_key_values=None, **changed).logits)
        except ZeroDivisionError:
            self.failed += 1
        assert scope.text is text
        assert {modality: set(kept) for modality, kept in scope.read.items()} == read
        self.texts.append(text)

    def before_forward(self, scope: Scope, sites: Any) -> None:
        if self.where == "before_forward":
            self._run(scope, sites)

    def attend(self, call: Call, next: Next) -> Tensor:
        if self.where == "attend":
            self._run(call.site.scope, {call.site.name: (call.site, None)})
        return next(call)

    def after_forward(self, scope: Scope, sites: Any, output: Any) -> Any:
        if self.where == "after_forward":
            self._run(scope, sites)
        return output


def text_without(arguments: Any, text: Text) -> dict[str, Any]:
    changes = text_only(arguments, text)
    changes.pop("past_key_values")
    return changes


@every_model
@pytest.mark.parametrize("where", ["before_forward", "attend", "after_forward"])
def test_a_second_pass_changes_nothing(name: str, where: str) -> None:
    model, given = model_of(name), inputs(name, MIXED)
    plain, tokens = model(**given).logits, greedy(model, given)
    before = snapshot(model)
    again = Again(where=where)
    with steer.apply(model, Reader(), again):
        assert torch.equal(model(**given).logits, plain)
        assert torch.equal(again.logits[0], plain)
        assert torch.equal(greedy(model, given), tokens)
        assert len(again.logits) == 2
    for second in (Again(where=where, changes=text_without), Again(where=where, at=fail)):
        with steer.apply(model, second):
            assert torch.equal(greedy(model, given), tokens)
            assert torch.equal(model(**given).logits, plain)
        assert second.failed == (2 if second.at else 0)
    assert_same(before, model)


@pytest.mark.parametrize("name", ["qwen2_vl", "qwen2_5_vl"])
@pytest.mark.parametrize("where", ["before_forward", "attend", "after_forward"])
def test_a_second_pass_leaves_the_positions_of_later_tokens(name: str, where: str) -> None:
    """Qwen models keep how far their last prompt's pictures moved the positions, and use it for what follows."""
    model, given = model_of(name), inputs(name, ONE)
    logits = []
    again = Again(where=where, changes=lambda *found: inputs(name, [[3, Picture((1, 3)), 6]]))
    for methods in ((Look(),), (again,)):
        cache = DynamicCache(config=model.config)
        with steer.apply(model, *methods):
            model(**given, past_key_values=cache)
            logits.append(model(input_ids=torch.tensor([[7]]), past_key_values=cache).logits)
    assert torch.equal(*logits)


def fail(call: Call, next: Next) -> Tensor:
    raise ZeroDivisionError


@every_model
def test_the_attention_of_a_second_pass(name: str) -> None:
    model, given = model_of(name), inputs(name, ONE)
    again = Again(at=lambda call, next: next(call) * -2)
    with steer.apply(model, again):
        plain = model(**given).logits
    layer = next(site.name for site in steer.sites(model) if site.kind == "causal" and site.layer == 1)
    with steer.apply(model, Scale(layers=layer, factor=-2.0)):
        wanted = model(**given).logits
    assert torch.equal(again.logits[0], wanted)
    assert not torch.equal(wanted, plain)


@every_model
@pytest.mark.parametrize("side", ["left", "right"])
def test_the_same_text_without_pictures(name: str, side: str) -> None:
    """What `text_only` makes equals the same text alone, for each row."""
    model = copy.deepcopy(model_of(name)).double()
    given = inputs(name, MIXED, side)
    look, again = Look(), Again(changes=text_without)
    with steer.apply(model, look, again):
        model(**given)
    pictures = look.seen[0]
    assert pictures is not None
    logits = again.logits[0]
    for row, ids in enumerate(given["input_ids"]):
        keep = given["attention_mask"][row].bool()
        for number in range(int(pictures.number[row].max()) + 1):
            at = (pictures.number[row] == number).nonzero().flatten()
            keep[at[0] : at[-1] + 1] = False
        assert not (ids[keep] == IMAGE).any()
        extra = {"token_type_ids": torch.zeros_like(ids[keep][None])} if name == "paligemma" else {}
        alone = model(input_ids=ids[keep][None], **extra).logits[0]
        torch.testing.assert_close(logits[row, -len(alone) :], alone, rtol=0, atol=1e-5)


@every_model
def test_the_text_without_pictures_knows_padding_in_any_form(name: str) -> None:
    """For a static cache `generate` makes masks of four dimensions ahead, for PaliGemma one a kind of layer."""
    model, given, logits = model_of(name), inputs(name, MIXED), []
    for options in ({}, {"cache_implementation": "static"}):
        again = Again(changes=text_without)
        with steer.apply(model, again):
            greedy(model, given, **options)
        logits.append(again.logits[0])
    assert torch.equal(*logits)


@dataclass(kw_only=True)
class Dim(Method, register=False):
    """Turns the sign of the pictures' values: looks at pictures in compiled code, through `site.kernel`."""

    layers: Any = "*layers.{1..2}.self_attn"

    kinds: ClassVar[tuple[str, ...]] = ("causal",)
    stage: ClassVar[str] = "kernel"
    needs_pictures: ClassVar[bool] = True

    def before_forward(self, scope: Scope, sites: Any) -> None:
        for site, _ in sites.values():
            site.kernel = self._ready(scope, site)

    def _ready(self, scope: Scope, site: Site) -> Tensor | None:
        text = scope.text
        if text is None or text.pictures is None:
            return None
        length, _ = (
            (text.past + text.new, 0) if text.cache is None else text.cache.get_mask_sizes(text.new, site.layer_idx)
        )
        factor = torch.where(text.pictures.shows, -1.0, 1.0)
        return torch.nn.functional.pad(factor, (0, length - factor.shape[1]), value=1.0)[:, None, :, None]

    def attend(self, call: Call, next: Next) -> Tensor:
        factor = call.site.kernel
        return next(call) if factor is None else next(call.replace(value=call.value * factor))


@pytest.mark.parametrize("name", ["llava", "llava_next", "qwen2_5_vl", "idefics3", "paligemma"])
def test_decoding_that_generate_compiles(name: str) -> None:
    torch._dynamo.reset()
    model, given = model_of(name), inputs(name, MIXED)
    plain = greedy(model, given)
    config = CompileConfig(fullgraph=True)
    config._compile_all_devices = True  # otherwise transformers compiles on GPUs alone
    graphs = []

    def keep(graph: Any, inputs: Any, **options: Any) -> Any:
        graphs.append(graph)
        return graph

    with steer.apply(model, Dim()):
        dynamic = greedy(model, given)
        wanted = greedy(model, given, cache_implementation="static")
        config.backend = keep
        compiled = {"cache_implementation": "static", "compile_config": config, "disable_compile": False}
        assert torch.equal(greedy(model, given, **compiled), wanted)
        first = len(graphs)
        assert torch.equal(greedy(model, given, **compiled), wanted)
    assert torch.equal(wanted, dynamic)
    assert not torch.equal(wanted, plain)
    assert first == len(graphs) == 1
