"""`steer bench vlm`: what methods for vision-language models cost, beside plain attention and beside edited maps.

One prompt of one picture and a question, and the tokens after it, greedily. The variants take turns, so that a noisy
moment hits them all: each runs in a copy of the model that shares its weights. Errors are the largest difference of
any attention output, of the prompt or of a token, from the edit of the whole map in fp64, and `edited` is the share of
the heads, over the layers of the method, whose output of the last token is another than without.
"""

from __future__ import annotations

import copy
import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, ClassVar

import torch
from rich.console import Console
from rich.table import Table
from transformers import (
    CLIPVisionConfig,
    DynamicCache,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    PreTrainedModel,
)

import steer
from steer.bench_kernels import environment, take_turns
from steer.bench_vlm_dense import Dense, DenseGIFT, DenseImbalanced, DenseVAR, DenseVHR, scores, softmax
from steer.method import Method
from steer.methods.gift import GIFT
from steer.methods.imbalanced_attention import ImbalancedAttention
from steer.methods.var import VAR
from steer.methods.vhr import VHR
from steer_patches.site import Call, Next, Scope, Site

BEFORE, AFTER = 5, 30  # text tokens before the picture and after it
SHARE_OF_SINKS = 0.05  # tokens of a prompt that the planted rule of VAR takes for sinks, over all layers
V_MIN = 0.05  # of VAR; with the published 0.2 hardly a head of emoji-vlm looks at a picture of noise
ROUNDING = 1e-9  # of outputs in fp64
COMPARED = 4  # generated tokens whose outputs are compared


def run(
    *,
    models: Mapping[str, PreTrainedModel] | None = None,
    repeats: int,
    device: str | None,
    small: bool,
    output: str | None,
    console: Console,
) -> dict[str, Any]:
    """Time all variants on all models, print a table, and write JSON where a file is named.

    Args:
        models: of the LLaVA-1.5 architecture, measured before the one of random weights.
        repeats: timed tokens of each variant, at least 2; a fifth as many prompts; the medians count.
        device: of the random model; None = cuda where there is one.
        small: a tiny random model, which shows the mechanics and not the speed.
        output: file for the figures.

    Raises:
        ValueError: a model of another architecture.
    """
    for name, model in (models or {}).items():
        if not isinstance(model, LlavaForConditionalGeneration):
            raise ValueError(f"{name} is a {type(model).__name__}; steer bench vlm makes prompts for LLaVA-1.5 only")
    if output:
        Path(output).parent.mkdir(parents=True, exist_ok=True)
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    dtype = torch.bfloat16 if where.type == "cuda" else torch.float32
    name, random = random_llava(where, dtype, small)
    with torch.no_grad():
        rows = [
            row
            for label, model in {**(models or {}), name: random}.items()
            for row in measure(label, model, repeats, tokens=2 if small else COMPARED)
        ]
    result = {"environment": environment(where, dtype), "small": small, "repeats": repeats, "rows": rows}
    _print(result, console)
    if output:
        Path(output).write_text(json.dumps(result, indent=2) + "\n")
        console.print(f"written to {output}")
    return result


def random_llava(device: torch.device, dtype: torch.dtype, small: bool) -> tuple[str, PreTrainedModel]:
    """A LLaVA of random weights: LLaVA-1.5-7B's shape on a GPU, SmolLM2-135M's text part and 576 patches on a CPU.

    The tower of the CPU's is small, so that its time does not hide what a method adds to a prompt.
    """
    torch.manual_seed(0)
    if small:
        name = "tiny LLaVA, random"
        vision = CLIPVisionConfig(
            hidden_size=16,
            intermediate_size=32,
            num_hidden_layers=3,
            num_attention_heads=2,
            image_size=16,
            patch_size=4,
        )
        text = LlamaConfig(
            hidden_size=32, intermediate_size=64, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2,
            vocab_size=64,
        )  # fmt: skip
    elif device.type == "cuda":
        name = "LLaVA-1.5-7B, random"
        vision = CLIPVisionConfig(
            hidden_size=1024, intermediate_size=4096, num_hidden_layers=24, num_attention_heads=16, image_size=336,
            patch_size=14, projection_dim=768,
        )  # fmt: skip
        text = LlamaConfig(vocab_size=32064, max_position_embeddings=4096)
    else:
        name = "SmolLM2-135M with 576 patches, random"
        vision = CLIPVisionConfig(
            hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8, image_size=336,
            patch_size=14,
        )  # fmt: skip
        text = LlamaConfig(
            hidden_size=576, intermediate_size=1536, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
            vocab_size=49280, tie_word_embeddings=True,
        )  # fmt: skip
    config = LlavaConfig(vision_config=vision, text_config=text, image_token_index=text.vocab_size - 1)
    with torch.device(device):
        model = LlavaForConditionalGeneration(config).eval().requires_grad_(False).to(dtype)
    for layer in model.model.language_model.layers:
        layer.self_attn.q_proj.weight *= 9  # else every token would attend alike to all
    return name, model


def prompt(model: Any) -> dict[str, Any]:
    """Inputs of one row with one picture, drawn."""
    config, generator = model.config, torch.Generator().manual_seed(0)
    vision = config.vision_config
    side = vision.image_size // vision.patch_size
    words = torch.randint(10, config.text_config.vocab_size // 2, (BEFORE + AFTER,), generator=generator)
    picture = torch.full((side * side,), config.image_token_id)
    ids = torch.cat([words[:BEFORE], picture, words[BEFORE:]])[None].to(model.device)
    pixels = torch.randn(1, 3, vision.image_size, vision.image_size, generator=generator)
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "pixel_values": pixels.to(model.device, model.dtype)}


@dataclass(frozen=True, eq=False)
class Variant:
    """One way to run the model.

    Args:
        method: its name; "" = none. form: how it is computed.
        model: a copy with the method on.
        fast: the method as steer runs it, None where there is nothing to compare. dense: the edit of its map.
    """

    method: str
    form: str
    model: Any
    fast: Method | None = None
    dense: Dense | None = None


def measure(label: str, model: PreTrainedModel, repeats: int, tokens: int) -> list[dict[str, Any]]:
    """One row for each variant on one model."""
    given = prompt(model)
    variants = variants_of(model, given)
    firsts: list[Callable[[], Any]] = [partial(first_token, variant.model, given) for variant in variants]
    of_prompts = take_turns(firsts, model.device, max(2, repeats // 5), f"{label}, prompts")
    caches = [call() for call in firsts]
    nexts: list[Callable[[], Any]] = [
        partial(next_token, v.model, cache) for v, cache in zip(variants, caches, strict=True)
    ]
    of_tokens = take_turns(nexts, model.device, repeats, f"{label}, tokens")
    eager = {v.method: i for i, v in enumerate(variants) if v.form == "eager map"}
    rows = []
    for i, variant in enumerate(variants):
        row: dict[str, Any] = {
            "model": label,
            "prompt_tokens": given["input_ids"].shape[1],
            "method": variant.method,
            "form": variant.form,
        }
        for name, times in (("token", of_tokens), ("prompt", of_prompts)):
            middle = statistics.median(times[i])
            row[f"{name}_milliseconds"] = middle * 1e3
            row[f"{name}_half_spread"] = _half_spread(times[i]) * 1e3
            row[f"{name}_over_sdpa"] = middle / statistics.median(times[0])
            if variant.fast is not None:
                row[f"{name}_over_eager"] = middle / statistics.median(times[eager[variant.method]])
        if variant.fast is not None and variant.dense is not None:
            row["error"], row["edited"] = compared(model, variant.fast, variant.dense, given, tokens)
        rows.append(row)
    return rows


def variants_of(model: PreTrainedModel, given: Mapping[str, Any]) -> list[Variant]:
    """The plain model in both implementations, and every method as steer runs it and on the whole map."""
    passing = twin(model)
    steer.apply(passing, Pass())
    found = [
        Variant("", "sdpa", twin(model)),
        Variant("", "eager map", twin(model, "eager")),
        Variant("", "sdpa, through steer", passing),
    ]
    dims, tau = planted(model, given)
    cases: list[tuple[str, type[Dense], dict[str, Method]]] = [
        ("VAR", DenseVAR, {"steer": VAR(sink_dims=dims, tau=tau, v_min=V_MIN)}),
        ("VHR", DenseVHR, {"steer": VHR(), "steer, plain measure": VHR(measure="plain")}),
        ("GIFT", DenseGIFT, {"steer": GIFT()}),
        ("ImbalancedAttention, gamma 1", DenseImbalanced, {"steer": ImbalancedAttention(gamma=1.0)}),
        ("ImbalancedAttention, gamma 1.1", DenseImbalanced, {"steer": ImbalancedAttention(gamma=1.1)}),
    ]
    for name, dense, forms in cases:
        for form, method in forms.items():
            fast = twin(model)
            handle = steer.apply(fast, method)
            same = form == list(forms)[-1]  # layer by layer, VHR chooses other heads than the edit of the map
            found.append(Variant(name, form, fast, method, dense.of(fast, handle) if same else None))
            if form == "steer":
                slow = twin(model, "eager")
                steer.apply(slow, dense.of(fast, handle))
                found.append(Variant(name, "eager map", slow))
    return found


def twin(model: PreTrainedModel, attention: str | None = None) -> Any:
    """A copy of the model that shares its weights, in another implementation of attention if one is named."""
    shared = {id(tensor): tensor for tensor in [*model.parameters(), *model.buffers()]}
    made = copy.deepcopy(model, shared)
    if attention is not None:
        made.set_attn_implementation(attention)
    return made


def planted(model: PreTrainedModel, given: Mapping[str, Any]) -> tuple[tuple[int, ...], float]:
    """A rule for VAR under which some tokens of this prompt are sinks: a dimension of the states, and how large.

    Of all dimensions, each with the threshold that this share of all tokens and layers exceeds, the one whose sinks
    are spread most evenly: the layer with the fewest visual sinks has more than under any other.
    """
    found: list[torch.Tensor] = []

    def keep(module: torch.nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = (args[0] if args else kwargs["hidden_states"])[0].float()
        found.append(states.abs() * (states.square().mean(-1, keepdim=True) + 1e-6).rsqrt())

    names = [site.name.rpartition(".")[0] for site in steer.sites(model) if site.kind == "causal"]
    hooks = [model.get_submodule(name).register_forward_pre_hook(keep, with_kwargs=True) for name in names]
    model(**given, logits_to_keep=1)
    for hook in hooks:
        hook.remove()
    size = torch.stack(found)  # (layers, S, channels)
    every = size.flatten(0, 1)
    tau = every.kthvalue(round((1 - SHARE_OF_SINKS) * len(every)), 0).values
    of_pictures = given["input_ids"][0] == model.config.image_token_id
    chosen = int((size > tau)[:, of_pictures].sum(1).amin(0).argmax())
    return (chosen,), float(tau[chosen])


def first_token(model: Any, given: Mapping[str, Any]) -> DynamicCache:
    """Generate one token; the cache with the prompt."""
    return model.generate(**given, max_new_tokens=1, do_sample=False, return_dict_in_generate=True).past_key_values


def next_token(model: Any, cache: DynamicCache) -> torch.Tensor:
    """The logits after one more token, the same for all variants."""
    return model(input_ids=torch.full((1, 1), 5, device=model.device), past_key_values=cache, logits_to_keep=1).logits


@dataclass(kw_only=True)
class Pass(Method, register=False):
    """Changes nothing, in every layer of the language model."""

    layers: str = "*"
    kinds: ClassVar[tuple[str, ...]] = ("causal",)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        return next(call)


@dataclass(kw_only=True)
class Compare(Method, register=False):
    """Around a method: compares every output with that of the edited map, from the same tensors in fp64."""

    dense: Dense
    errors: list[float] = field(default_factory=list)
    edited: list[float] = field(default_factory=list)

    kinds: ClassVar[tuple[str, ...]] = ("self", "causal")
    needs_pictures: ClassVar[bool] = True

    def prepare_model(self, model: torch.nn.Module, sites: Sequence[Site]) -> None:
        self.dense.prepare_model(model, sites)

    def before_forward(self, scope: Scope, sites: Mapping[str, tuple[Site, torch.Tensor | None]]) -> None:
        self.dense.before_forward(scope, sites)

    def attend(self, call: Call, next: Next) -> torch.Tensor:
        exact = call.replace(query=call.query.double(), key=call.key.double(), value=call.value.double())
        wanted, out = self.dense.attend(exact, next), next(call)
        if call.site.kind == "causal":
            plain = self.dense.output(exact, softmax(scores(exact)))
            self.errors.append(float((out - wanted).abs().max()))
            self.edited.append(float(((wanted - plain)[0, :, -1].abs().amax(-1) > ROUNDING).double().mean()))
        return out


def compared(
    model: PreTrainedModel, method: Method, dense: Dense, given: Mapping[str, Any], tokens: int
) -> tuple[float, float]:
    """The largest error of any attention output of the prompt and some tokens, and the share of heads edited."""
    compare, fast = Compare(dense=dense, layers=dense.layers), twin(model)
    steer.apply(fast, compare, method)
    cache = first_token(fast, given)
    for _ in range(tokens):
        next_token(fast, cache)
    return max(compare.errors), statistics.fmean(compare.edited)


def _half_spread(spent: list[float]) -> float:
    """Half the distance between the quartiles."""
    low, _, high = statistics.quantiles(spent, n=4)
    return (high - low) / 2


def _print(result: Mapping[str, Any], console: Console) -> None:
    about = ", ".join(str(value) for value in result["environment"].values())
    for model in dict.fromkeys(row["model"] for row in result["rows"]):
        rows = [row for row in result["rows"] if row["model"] == model]
        table = Table(
            *("method", "form", "ms a token", "x sdpa", "x its map", "ms first token", "x sdpa", "x its map"),
            *("error to fp64", "edited"),
            title=f"{model}, {rows[0]['prompt_tokens']} tokens of prompt; median of {result['repeats']} tokens, in "
            f"brackets half the distance between quartiles; {about}",
        )
        for row in rows:
            table.add_row(
                row["method"],
                row["form"],
                f"{row['token_milliseconds']:.1f} ({row['token_half_spread']:.1f})",
                f"{row['token_over_sdpa']:.2f}",
                f"{row['token_over_eager']:.2f}" if "token_over_eager" in row else "",
                f"{row['prompt_milliseconds']:.0f} ({row['prompt_half_spread']:.0f})",
                f"{row['prompt_over_sdpa']:.2f}",
                f"{row['prompt_over_eager']:.2f}" if "prompt_over_eager" in row else "",
                f"{row['error']:.1e}" if "error" in row else "",
                f"{row['edited']:.0%}" if "edited" in row else "",
            )
        console.print(table)
