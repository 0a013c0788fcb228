"""VHR against both runs written out layer by layer with explicit maps, at prompts and at decode, and what stays."""

from __future__ import annotations

import copy
import functools
import statistics
import sys
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from probes import assert_untouched, snapshot
from tiny_language import NEW
from tiny_vision_language import (
    BATCH,
    IMAGE,
    MODELS,
    ONE,
    TWO_PICTURES,
    WITHOUT,
    Picture,
    Row,
    inputs,
    model_of,
)
from torch import Tensor, nn
from transformers import CompileConfig

import steer
from steer.methods.vhr import VHR, vision_heads
from steer_patches.generation import RUN
from steer_patches.site import Call, Next, Site

EXACT = 1e-10
ROTATED = 1e-5  # models turn queries and keys by angles in fp32, and padding moves the positions
VISIBLE = 1e-3
SMALL: dict[str, Any] = {"min_std": 1e-4}  # the numbers of tiny models are small
MARKS = 44  # tokens from here on are pictures and their marks
WRITE: dict[str, Any] = {
    "max_new_tokens": NEW,
    "min_new_tokens": NEW,
    "do_sample": False,
    "suppress_tokens": [*range(MARKS, 64)],
}


@functools.cache
def exact_model(name: str) -> Any:
    return copy.deepcopy(model_of(name)).double()


def in_doubles(given: dict[str, Any]) -> dict[str, Any]:
    return {k: v.double() if v.is_floating_point() else v for k, v in given.items()}


def logits_of(model: Any, given: dict[str, Any], **options: Any) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    """Generated tokens (B, NEW), their logits (B, NEW, V), and by site the heads that VHR chose."""
    logits: list[Tensor] = []  # `generate` itself returns them in fp32
    hook = model.register_forward_hook(lambda module, args, output: logits.append(output.logits[:, -1].detach()))
    try:
        out = model.generate(**given, **WRITE, **options, return_dict_in_generate=True)
    finally:
        hook.remove()
    memory = vars(out.past_key_values)[RUN].memory if RUN in vars(out.past_key_values) else {}
    heads = {key[1]: kept["heads"] for key, kept in memory.items() if key[0] == "VHR"}
    written = out.sequences[:, given["input_ids"].shape[1] :]
    return written, torch.stack([one[: len(written)] for one in logits[-NEW:]], 1), heads  # runs within come first


def rested(model: Any) -> Any:
    """The model without what Qwen's keeps of its last prompt."""
    for module in model.modules():
        if "rope_deltas" in vars(module):
            module.rope_deltas = None
    return model


def decoder_of(model: Any) -> Any:
    return next(m for n, m in model.named_modules() if n in ("model.language_model", "model.text_model"))


@dataclass
class Run:
    """One run of a decoder, layer by layer: what enters the next layer (S, C), and what it is told of positions."""

    hidden: Tensor
    rotary: tuple[Tensor, Tensor]
    seen: Tensor  # (S, S) bool

    def heads(self, layer: Any) -> Tensor:
        """(H, S, D) outputs of a layer's heads, each from its map."""
        attention, entering = layer.self_attn, layer.input_layernorm(self.hidden[None])
        rotate = sys.modules[type(attention).__module__].apply_rotary_pos_emb
        parts = (attention.q_proj, attention.k_proj, attention.v_proj)
        q, k, v = (part(entering).unflatten(-1, (-1, attention.head_dim)).transpose(1, 2) for part in parts)
        q, k = rotate(q, k, *self.rotary)
        group = q.shape[1] // k.shape[1]
        outputs = []
        for head in range(q.shape[1]):
            scores = q[0, head] @ k[0, head // group].T * attention.scaling
            outputs.append(scores.masked_fill(~self.seen, -torch.inf).softmax(-1) @ v[0, head // group])
        return torch.stack(outputs)

    def go_on(self, layer: Any, heads: Tensor) -> None:
        """Finish a layer with these outputs of its heads."""
        hidden = self.hidden + layer.self_attn.o_proj(heads.transpose(0, 1).flatten(1))
        self.hidden = hidden + layer.mlp(layer.post_attention_layernorm(hidden))


def run_of(model: Any, given: dict[str, Any], prompt: int) -> Run:
    """The run as it enters the first layer of the unsteered model."""
    entered: list[Any] = []
    decoder = decoder_of(model)
    hook = decoder.layers[0].register_forward_pre_hook(lambda m, a, k: entered.append((a, k)), with_kwargs=True)
    try:
        model(**given, use_cache=False)
    finally:
        hook.remove()
    (hidden,), kwargs = entered[0][0], entered[0][1]
    at = torch.arange(hidden.shape[1])
    seen = at <= at[:, None]
    if "PaliGemma" in type(model).__name__:
        seen = seen | (at < prompt) & (at[:, None] < prompt)
    return Run(hidden[0], kwargs["position_embeddings"], seen)


def without_pictures(ids: list[int]) -> list[int]:
    """Each stretch of marks and pictures loses what lies from its first token of a picture to its last."""
    left: list[int] = []
    stretch: list[int] = []
    for token in [*ids, 0]:
        if token >= MARKS:
            stretch.append(token)
            continue
        if IMAGE in stretch:
            end = len(stretch) - stretch[::-1].index(IMAGE)
            stretch = stretch[: stretch.index(IMAGE)] + stretch[end:]
        left += [*stretch, token]
        stretch = []
    return left[:-1]


def by_rule(rows: Tensor, text: Tensor, min_std: float) -> list[bool]:
    """The card's rule, number by number."""
    squared = lambda a: sum(x * x for x in a.tolist())  # noqa: E731
    divergence = [squared(a - t) for a, t in zip(rows, text, strict=True)]
    loud = [squared(t) for t in text]
    mean, std = statistics.mean(divergence), statistics.stdev(divergence)
    if std > min_std:
        limit = statistics.mean(loud) + statistics.stdev(loud)
        divergence = [0.0 if d > mean + std and t > limit else d for d, t in zip(divergence, loud, strict=True)]
    return [d > statistics.median(divergence) for d in divergence]


def reference(
    model: Any, given: dict[str, Any], written: Tensor, layers: list[int], alpha: float, min_std: float
) -> tuple[Tensor, dict[int, list[bool]]]:
    """Logits (NEW, V) of the tokens that were written, and the heads: both runs as wholes, without a cache."""
    ids = given["input_ids"]
    prompt = ids.shape[1]
    longer = {**given, "input_ids": torch.cat([ids, written[None, :-1]], 1)}
    longer["attention_mask"] = torch.ones_like(longer["input_ids"])
    new = torch.zeros_like(written[None, :-1])
    if "mm_token_type_ids" in given:
        longer["mm_token_type_ids"] = torch.cat([given["mm_token_type_ids"], new.int()], 1)
    if "token_type_ids" in given:
        longer["token_type_ids"] = torch.cat([given["token_type_ids"], new + 1], 1)
    left = torch.tensor([without_pictures(ids[0].tolist())])
    alone = {"input_ids": left, "attention_mask": torch.ones_like(left)}
    if "token_type_ids" in given:
        alone["token_type_ids"] = torch.zeros_like(left)
    with torch.no_grad():
        shown, text = run_of(model, longer, prompt), run_of(model, alone, left.shape[1])
        chosen: dict[int, list[bool]] = {}
        for number, layer in enumerate(decoder_of(model).layers):
            a, t = shown.heads(layer), text.heads(layer)
            if number in layers:
                chosen[number] = by_rule(a[:, prompt - 1], t[:, -1], min_std)
                for head, is_chosen in enumerate(chosen[number]):
                    if is_chosen:
                        a[head, prompt - 1 :] *= alpha
                        t[head, -1] *= alpha
            shown.go_on(layer, a)
            text.go_on(layer, t)
        return model.lm_head(decoder_of(model).norm(shown.hidden[prompt - 1 :])), chosen


@pytest.mark.parametrize("rows", [ONE, TWO_PICTURES], ids=["one picture", "two"])
@pytest.mark.parametrize("name", MODELS)
def test_equals_both_runs_written_out(name: str, rows: list[Row]) -> None:
    model, given = exact_model(name), in_doubles(inputs(name, rows))
    plain = logits_of(model, given)[1]
    with steer.apply(model, VHR(**SMALL)):
        written, logits, heads = logits_of(model, given)
    expected, chosen = reference(model, given, written[0], [1, 2, 3], 2.0, SMALL["min_std"])
    assert {site: found.tolist() for site, found in heads.items()} == {
        site.name: [chosen[site.layer]] for site in steer.sites(model) if site.kind == "causal" and site.layer in chosen
    }
    assert (logits[0] - expected).abs().max() <= EXACT
    assert (logits - plain).abs().max() > VISIBLE
    assert all(sum(found) == 2 for found in chosen.values())  # floor half of 4


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("measure", ["synchronised", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_of_a_batch_equal_rows_alone(name: str, measure: str, side: str) -> None:
    """Pictures of other sizes at other places; and a row without, which stays as it was, beside them."""
    model, rows = exact_model(name), [*BATCH, [5]]
    if name == "paligemma" and side == "right":
        pytest.skip("its prompts are padded on the left")
    given = in_doubles(inputs(name, rows, side))
    plain = model(**given).logits
    with steer.apply(model, VHR(measure=measure, **SMALL)):
        together = model(**given).logits
        for row, line in enumerate(rows):
            real = given["attention_mask"][row].bool()
            alone = {k: v[row : row + 1, real] for k, v in given.items() if k.endswith("ids")}
            alone |= _only(name, given, rows, row)
            alone["attention_mask"] = torch.ones_like(alone["input_ids"])
            assert (together[row, real] - model(**alone).logits[0]).abs().max() <= ROTATED
            if any(isinstance(part, Picture) for part in line):
                last = int(real.nonzero().max())
                assert name == "paligemma" or torch.equal(
                    together[row, :last], plain[row, :last]
                )  # its prompts look ahead
                assert (together[row, last] - plain[row, last]).abs().max() > VISIBLE
            else:
                assert torch.equal(together[row], plain[row])


def _only(name: str, given: dict[str, Any], rows: list[Row], row: int) -> dict[str, Any]:
    """The pictures of one row of a batch whose rows have at most one each."""
    has = [any(isinstance(part, Picture) for part in line) for line in rows]
    if not has[row]:
        return {}
    number = sum(has[:row])
    if name in ("idefics3", "smolvlm"):
        return {k: given[k][row : row + 1] for k in ("pixel_values", "pixel_attention_mask")}
    if name.startswith("qwen"):
        patches = given["image_grid_thw"].prod(-1).tolist()
        start = sum(patches[:number])
        return {
            "pixel_values": given["pixel_values"][start : start + patches[number]],
            "image_grid_thw": given["image_grid_thw"][number : number + 1],
        }
    pictures = {k: given[k][number : number + 1] for k in ("pixel_values", "image_sizes") if k in given}
    return pictures | ({"batch_num_images": torch.tensor([1])} if "batch_num_images" in given else {})


def heads_by_hand(divergence: list[float], loud: list[float], **settings: Any) -> list[bool]:
    """What is chosen where the heads have these VHD, and these squared norms in the text run."""
    text = torch.zeros(1, len(loud), 2)
    text[0, :, 0] = torch.tensor(loud).sqrt()
    rows = text.clone()
    rows[0, :, 1] = torch.tensor(divergence).sqrt()
    return vision_heads(rows, text, **settings)[0].tolist()


def test_filter_and_median_by_hand() -> None:
    """Mean 4.75 and deviation 6.18 of the VHD: the last is an outlier, and so loud in the text that it is dropped."""
    divergence, loud = [1.0, 2.0, 2.0, 14.0], [1.0, 1.0, 1.0, 9.0]
    assert heads_by_hand(divergence, loud) == [False, True, True, False]  # 1 2 2 0: above 1.5
    assert heads_by_hand(divergence, loud, outliers="keep") == [False, False, False, True]  # above 2
    assert heads_by_hand(divergence, [1.0, 1.0, 9.0, 1.0]) == [False, False, False, True]  # not loud in the text
    small = [d / 100 for d in divergence]
    assert heads_by_hand(small, loud) == [False, False, False, True]  # deviation 0.06: the rule is not asked
    assert heads_by_hand(small, loud, outliers="relative") == [False, True, True, False]  # 1.3 times the mean
    assert heads_by_hand(small, loud, outliers="relative", min_std=1.4) == [False, False, False, True]


def test_the_share_of_heads_that_is_chosen() -> None:
    divergence = [3.0, 1.0, 4.0, 1.5, 5.0, 9.0, 2.0]
    quiet = [1.0] * 7
    for share, expected in [(0.5, 3), (0.25, 1), (0.1, 0), (0.99, 6)]:
        found = heads_by_hand(divergence, quiet, share=share, outliers="keep")
        assert sum(found) == expected
        assert {d for d, is_chosen in zip(divergence, found, strict=True) if is_chosen} == set(
            sorted(divergence)[7 - expected :]
        )
    assert not any(heads_by_hand([0.0] * 4, quiet[:4]))
    assert not any(heads_by_hand([2.0] * 4, quiet[:4]))  # strictly above the median


def test_heads_that_see_nothing_are_not_chosen() -> None:
    """Without values the last token gets the same from text and pictures: nothing diverges, nothing is chosen."""
    model, given = copy.deepcopy(model_of("llava")), inputs("llava", ONE)
    for name, parameter in model.named_parameters():
        if "language_model" in name and "v_proj" in name:
            nn.init.zeros_(parameter)
    plain = logits_of(model, given)[1]
    with steer.apply(model, VHR()):
        _, logits, heads = logits_of(model, given)
    assert len(heads) == 3 and not any(found.any() for found in heads.values())
    assert torch.equal(logits, plain)


def test_equals_larger_columns_of_the_output_projection() -> None:
    """One decode step: amplified heads are columns of the output projection times alpha."""
    model = copy.deepcopy(exact_model("llava"))
    given = in_doubles(inputs("llava", ONE))
    token = torch.tensor([[7]])

    def step(cache: Any) -> Tensor:
        mask = torch.ones(1, given["input_ids"].shape[1] + 1, dtype=torch.int64)
        return model(input_ids=token, attention_mask=mask, past_key_values=cache).logits

    with steer.apply(model, VHR(alpha=1.5, **SMALL)):
        cache = model(**given).past_key_values
        same = copy.deepcopy(cache)
        found = {key[1]: kept["heads"][0] for key, kept in vars(cache)[RUN].memory.items() if key[0] == "VHR"}
        steered = step(cache)
    with torch.no_grad():
        for name, heads in found.items():
            attention = model.get_submodule(name)
            attention.o_proj.weight[:, heads.repeat_interleave(attention.head_dim)] *= 1.5
        assert (step(same) - steered).abs().max() <= 1e-6


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("settings", [{"alpha": 1.0}, {"steps": "1000:"}, {"steps": "1:"}], ids=str)
def test_what_is_off_changes_nothing(name: str, settings: dict[str, Any]) -> None:
    model, given = model_of(name), inputs(name)
    plain = logits_of(model, given)[1]
    before = snapshot(rested(model))
    with steer.apply(model, VHR(**settings)):
        assert torch.equal(logits_of(model, given)[1], plain)
    assert_untouched(before, rested(model))


@pytest.mark.parametrize("measure", ["synchronised", "plain"])
@pytest.mark.parametrize("name", MODELS)
def test_text_stays_and_removal_is_exact(name: str, measure: str) -> None:
    model, given, text = model_of(name), inputs(name), inputs(name, WITHOUT)
    plain_text, plain = logits_of(model, text)[1], logits_of(model, given)[1]
    before = snapshot(rested(model))
    with steer.apply(model, VHR(measure=measure)):
        steered = logits_of(model, given)[1]
        assert torch.equal(logits_of(model, text)[1], plain_text)
        assert torch.equal(logits_of(model, given)[1], steered)
    assert (steered - plain).abs().max() > VISIBLE
    assert torch.equal(logits_of(model, given)[1], plain)
    assert_untouched(before, rested(model))


@pytest.mark.parametrize("name", ["llava", "qwen2_vl", "smolvlm"])
def test_beams_keep_their_heads(name: str) -> None:
    """Each sequence that beam search gives has the score that the reference gives its tokens."""
    model, rows = exact_model(name), BATCH
    given = in_doubles(inputs(name, rows))
    options = {"num_beams": 3, "num_return_sequences": 2, "output_scores": True, "length_penalty": 0.0}
    with steer.apply(model, VHR(**SMALL)):
        out = model.generate(**given, **options, **WRITE, return_dict_in_generate=True)
    written = out.sequences[:, given["input_ids"].shape[1] :]
    for at, (tokens, score) in enumerate(zip(written, out.sequences_scores, strict=True)):
        row = at // 2
        real = given["attention_mask"][row].bool()
        alone = {k: v[row : row + 1, real] for k, v in given.items() if k.endswith("ids")}
        alone |= _only(name, given, rows, row)
        logits, _ = reference(model, alone, tokens, [1, 2, 3], 2.0, SMALL["min_std"])
        logprobs = logits.log_softmax(-1).gather(-1, tokens[:, None])
        assert abs(float(logprobs.sum() - score)) <= 1e-5  # scores are kept in fp32


@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_gives_the_same(name: str) -> None:
    model, given = exact_model(name), in_doubles(inputs(name))
    with steer.apply(model, VHR(**SMALL)):
        tokens, logits, heads = logits_of(model, given)
        same, others, found = logits_of(model, given, cache_implementation="static", disable_compile=True)
    assert torch.equal(same, tokens) and (others - logits).abs().max() <= EXACT
    assert all(torch.equal(found[site], heads[site]) for site in heads)


@pytest.mark.slow
def test_compiled_decoding_gives_the_same() -> None:
    model, given = copy.deepcopy(model_of("llava")), inputs("llava")
    torch._dynamo.reset()
    compiled = CompileConfig(fullgraph=True, backend="aot_eager", mode=None)
    compiled._compile_all_devices = True
    with steer.apply(model, VHR(**SMALL)):
        plain = logits_of(model, given, cache_implementation="static", disable_compile=True)[1]
        found = logits_of(model, given, cache_implementation="static", compile_config=compiled)[1]
    assert (found - plain).abs().max() <= 1e-5


@pytest.mark.parametrize("implementation", ["eager", pytest.param("flex_attention", marks=pytest.mark.slow)])
def test_other_implementations_give_the_same(implementation: str) -> None:
    model, given = copy.deepcopy(model_of("llava")), inputs("llava")
    real = given["attention_mask"].bool()
    with steer.apply(model, VHR(**SMALL)):
        expected = model(**given).logits
    model.set_attn_implementation(implementation)
    with steer.apply(model, VHR(**SMALL)):
        assert (model(**given).logits - expected)[real].abs().max() <= 1e-5


def test_both_measures_and_their_cost() -> None:
    """In the first edited layer they agree; the plain one runs the whole prompt once more."""
    model = exact_model("llava")
    agree = total = 0
    for seed in range(8):
        given = in_doubles(inputs("llava", ONE, seed=seed))
        found = {}
        for measure in ("synchronised", "plain"):
            with steer.apply(model, VHR(measure=measure, **SMALL)):
                found[measure] = logits_of(model, given)[2]
        first, *rest = found["plain"]
        assert torch.equal(found["plain"][first], found["synchronised"][first])
        agree += sum(int((found["plain"][site] == found["synchronised"][site]).sum()) for site in rest)
        total += 4 * len(rest)
    assert 0.5 < agree / total < 1  # as for heads drawn by chance it would be half

    calls: dict[str, list[int]] = {}
    given = in_doubles(inputs("llava", ONE))
    for measure in ("synchronised", "plain"):
        rows: list[int] = []
        hooks = [layer.register_forward_hook(lambda m, a, out, rows=rows: rows.append(out.shape[1]))
                 for layer in decoder_of(model).layers]  # fmt: skip
        with steer.apply(model, VHR(measure=measure)):
            model(**given)
        for hook in hooks:
            hook.remove()
        calls[measure] = rows
    tokens, text = given["input_ids"].shape[1], len(without_pictures(given["input_ids"][0].tolist()))
    assert sorted(calls["synchronised"]) == sorted([tokens] * 4 + [text] * 4)
    assert sorted(calls["plain"]) == sorted([tokens] * 8 + [text] * 4)


def test_layers_after_the_last_edited_one_do_not_run_for_the_text() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    rows: list[int] = []
    with steer.apply(model, VHR(layers="model.language_model.layers.1")):
        hooks = [layer.register_forward_hook(lambda m, a, out: rows.append(out.shape[1]))
                 for layer in decoder_of(model).layers]  # fmt: skip
        model(**given)
        for hook in hooks:
            hook.remove()
    assert len(rows) == 4 + 2


def test_outputs_that_the_caller_asks_for_are_those_of_the_prompt() -> None:
    model, given = exact_model("llava"), in_doubles(inputs("llava", ONE))
    with steer.apply(model, VHR(**SMALL)):
        plain = model(**given).logits
        out = model(**given, output_hidden_states=True)
    assert torch.equal(out.logits, plain)
    assert [h.shape[1] for h in out.hidden_states] == [given["input_ids"].shape[1]] * 5


def test_an_error_in_the_text_run_leaves_everything_as_it_was() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    plain = logits_of(model, given)[1]
    layer = decoder_of(model).layers[2]

    def fail(module: Any, args: Any, kwargs: Any) -> None:
        if args[0].shape[1] < given["input_ids"].shape[1]:
            raise MemoryError("no room")

    with steer.apply(model, VHR(**SMALL)):
        steered = logits_of(model, given)[1]
        hook = layer.register_forward_pre_hook(fail, with_kwargs=True)
        with pytest.raises(MemoryError):
            model(**given)
        hook.remove()
        assert torch.equal(logits_of(model, given)[1], steered)
    assert torch.equal(logits_of(model, given)[1], plain)


def test_gradients_flow_also_through_checkpointed_layers() -> None:
    model, given = copy.deepcopy(exact_model("llava")), in_doubles(inputs("llava", BATCH, "right"))
    weight = decoder_of(model).layers[0].self_attn.q_proj.weight.requires_grad_()
    found = []
    for checkpointed in (False, True):
        if checkpointed:
            model.gradient_checkpointing_enable()
            model.train()
        model.zero_grad()
        with steer.apply(model, VHR(**SMALL)):
            model(**given, use_cache=False).logits[:, -1].square().sum().backward()
        found.append(weight.grad.clone())
    assert found[0].norm() > 0
    assert (found[0] - found[1]).abs().max() <= EXACT


def test_the_default_layers_are_those_published() -> None:
    model = model_of("llava")
    for depth, wanted in ((32, [1, *range(18, 32)]), (1, [0])):
        sites = [Site(str(i), i, "causal", 1, 1, 1, "sdpa") for i in range(depth)]
        assert VHR().layers_in(model, sites) == [str(i) for i in wanted]
    with steer.apply(model, VHR()) as handle:
        assert handle.stats["methods"][0]["sites"] == 3
    with steer.apply(model, VHR(layers="model.language_model.layers.0")) as handle:
        assert handle.stats["methods"][0]["sites"] == 1


def test_only_the_given_heads_are_amplified() -> None:
    model, given = model_of("llava"), inputs("llava", ONE)
    with steer.apply(model, VHR(**SMALL)):
        free = logits_of(model, given)[2]
    with steer.apply(model, VHR(heads=[0, 3], **SMALL)):
        kept = logits_of(model, given)[2]
    first = next(iter(free))
    assert torch.equal(kept[first], free[first] & torch.tensor([True, False, False, True]))
    assert not any(found[:, 1:3].any() for found in kept.values())


def test_works_with_a_method_that_edits_the_same_layers() -> None:
    """The run without pictures is that of the model alone."""

    class Halves(steer.Method, register=False):
        kinds = ("causal",)
        stage = "inputs"
        default_layers = "*"

        def attend(self, call: Call, next: Next) -> Tensor:
            assert call.query.shape[2] in lengths
            return next(call.replace(value=call.value / 2))

    model, given = model_of("llava"), inputs("llava", ONE)
    lengths = (given["input_ids"].shape[1], 1)
    with steer.apply(model, VHR(**SMALL), Halves()):
        both = logits_of(model, given)[1]
    with steer.apply(model, VHR(**SMALL)):
        assert (logits_of(model, given)[1] - both).abs().max() > VISIBLE


def test_a_later_picture_and_a_sequence_under_way_stay_off() -> None:
    model, given, text = model_of("llava"), inputs("llava", ONE), inputs("llava", WITHOUT)

    def two_turns() -> Tensor:
        cache = model(**text).past_key_values
        mask = torch.ones(1, text["input_ids"].shape[1] + given["input_ids"].shape[1], dtype=torch.int64)
        return model(**{**given, "attention_mask": mask}, past_key_values=cache).logits

    plain = two_turns()
    with steer.apply(model, VHR()):
        assert torch.equal(two_turns(), plain)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"alpha": -1.0}, "alpha=-1.0"),
        ({"alpha": float("nan")}, "alpha=nan"),
        ({"share": 1.0}, "share=1.0"),
        ({"outliers": "some"}, "absolute, relative, keep"),
        ({"min_std": -1.0}, "min_std"),
        ({"measure": "both"}, "synchronised, plain"),
    ],
)
def test_settings_that_make_no_sense(settings: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        VHR(**settings)


def test_saved_and_loaded(tmp_path: Any) -> None:
    VHR(alpha=1.5, share=0.25, measure="plain").save(str(tmp_path))
    assert steer.load(str(tmp_path)) == VHR(alpha=1.5, share=0.25, measure="plain")


@pytest.mark.slow
def test_compiled_prompts() -> None:
    """The model may be compiled as a whole; where its layers are in one graph they cannot be run one by one."""
    model, given = copy.deepcopy(model_of("llava")), inputs("llava", ONE)
    with steer.apply(model, VHR(**SMALL)):
        expected = model(**given).logits
    torch._dynamo.reset()
    decoder_of(model).compile(backend="eager")
    with steer.apply(model, VHR()), pytest.raises(RuntimeError, match='measure="plain"'):
        model(**given)
    torch._dynamo.reset()
    whole = copy.deepcopy(model_of("llava"))
    whole.compile(backend="eager")
    with steer.apply(whole, VHR(**SMALL)):
        assert (whole(**given).logits - expected).abs().max() <= 1e-5
