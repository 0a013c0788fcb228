"""Measures again the speed-ups that the papers state, with random weights: `steer reproduce radial`.

What a static mask costs does not depend on the weights. The transformer has the published shape (on a GPU) or a small
one of the same class (on a CPU), and runs inside its real pipeline. Dense attention is the fastest backend that torch
has on the machine. The kernel's output is checked on sampled queries against plain attention under the same mask.
"""

from __future__ import annotations

import json
import math
import platform
import random
import statistics
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any, ClassVar

import diffusers
import torch
import torch.nn.functional as F
import typer
from diffusers import DiffusionPipeline
from rich.console import Console
from rich.table import Table
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils._python_dispatch import TorchDispatchMode
from tqdm.auto import tqdm

import steer
from steer.method import Method
from steer.model_shapes import ModelShape
from steer.sparse import Sparse, starts_at
from steer_demos.claims import CLAIMS, PAPERS, Claim, Setting
from steer_kernels import BlockMask, TokenRule
from steer_patches.site import Call, Next

SAMPLED_QUERIES, SAMPLED_HEADS = 64, 4
TIMED_STEPS = 4
DENSE_BACKENDS = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}


@dataclass
class Reproduction:
    """What was measured for one claim. Times in seconds.

    Args:
        paper, title, source, hardware: of the claim.
        published, published_attention: its speed-ups, of the run and of attention alone.
        scale: "full" = the published setting, "cpu" = a small one.
        grid: (frames, height, width) of the visual tokens.
        tokens, heads, width: of a call of attention.
        density: share of the attention map computed in the steps in which the method is on, the mean over them.
        error: relative error of the kernel's output on sampled queries, against fp64 attention under the same mask.
        plain_error: that of plain attention in the model's precision, the yardstick.
        dense_backend: the fastest dense attention.
        dense_attention, sparse_attention: one call inside the run, with routing and permutations; the mean over layers.
        dense_step, sparse_step: one denoising step, all of its forwards.
        attention_share: of the dense step, at the method's sites.
        bound: Amdahl's bound on the run's speed-up, from the density, the measured share and the schedule.
        steps, sparse_steps: of the run.
        dense_run, sparse_run: a whole run; from the times of its steps, unless `run_was_made`.
        run_was_made: whether both runs were really made.
    """

    paper: str
    title: str
    source: str
    hardware: str
    published: float | None
    published_attention: float | None
    scale: str
    grid: tuple[int, int, int]
    tokens: int
    heads: int
    width: int
    density: float
    error: float
    plain_error: float
    dense_backend: str
    dense_attention: float
    sparse_attention: float
    dense_step: float
    sparse_step: float
    attention_share: float
    bound: float
    steps: int
    sparse_steps: int
    dense_run: float
    sparse_run: float
    run_was_made: bool

    @property
    def attention_speedup(self) -> float:
        return self.dense_attention / self.sparse_attention

    @property
    def step_speedup(self) -> float:
        return self.dense_step / self.sparse_step

    @property
    def run_speedup(self) -> float:
        return self.dense_run / self.sparse_run

    def reason(self) -> str:
        """Why the run's speed-up is not the published one, from the measured figures."""
        reached = self.attention_speedup * self.density
        parts = [f"the kernel reaches {reached:.0%} of 1/density against {self.dense_backend}"]
        parts.append(
            f"attention is {self.attention_share:.0%} of a dense step, which bounds the run at {self.bound:.2f}x"
        )
        if self.scale != "full":
            grid = "x".join(map(str, self.grid))
            parts.append(f"a small model on {grid} tokens: density and share differ from the published setting")
        return "; ".join(parts)


@dataclass(kw_only=True)
class Watch(Method, register=False):
    """Times the attention calls, the method's included; drops masks, which hide nothing here, so that dense attention
    may use its fastest kernels.
    """

    layers: Any = "*"
    kinds: ClassVar[tuple[str, ...]] = Sparse.kinds
    stage: ClassVar[str] = "inputs"
    any_order: ClassVar[bool] = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.call: Call | None = None
        self.seconds: list[float] = []

    def attend(self, call: Call, next: Next) -> Tensor:
        call = call.replace(mask=None)
        self.call = call
        synchronize(call.query.device)
        began = time.perf_counter()
        out = next(call)
        synchronize(call.query.device)
        self.seconds.append(time.perf_counter() - began)
        return out


class SparseCall(TorchDispatchMode):
    """Keeps the arguments and the output of the first block-sparse call made inside."""

    def __init__(self) -> None:
        super().__init__()
        self.arguments: tuple[Any, ...] | None = None
        self.out: Tensor | None = None

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        if self.arguments is None and func is torch.ops.steer_kernels.block_sparse_attention.default:
            self.arguments, self.out = args, result[0]
        return result

    @property
    def mask(self) -> BlockMask:
        assert self.arguments is not None
        query, key, _, lists, _, rule_query, rule_key, kind, radius_squared, causal, block_size = self.arguments[:11]
        rule = None if rule_query is None else TokenRule(kind, rule_query, rule_key, radius_squared)
        full_num, full_idx, partial_num, partial_idx = lists
        return BlockMask(
            query.shape[2],
            key.shape[2],
            (block_size[0], block_size[1]),
            full_num,
            full_idx,
            partial_num,
            partial_idx,
            rule=rule,
            causal=causal,
        )

    def errors(self) -> tuple[float, float]:
        """Relative errors on sampled queries of some heads: of the kernel, and of plain attention in its precision."""
        assert self.arguments is not None and self.out is not None
        query, key, value, scale = *self.arguments[:3], self.arguments[11]
        some = slice(0, min(SAMPLED_HEADS, query.shape[1]))
        rows = torch.tensor(
            sorted(random.Random(0).sample(range(query.shape[2]), min(SAMPLED_QUERIES, query.shape[2]))),
            device=query.device,
        )
        visible = self.mask.of_heads(some).to_tokens(rows)[:1]
        q, k, v = query[:1, some][:, :, rows], key[:1, some], value[:1, some]
        exact = masked(q.double(), k.double(), v.double(), visible, scale)
        seen = exact.norm(dim=-1) > 0  # queries of padding see nothing

        def error(out: Tensor) -> float:
            return float((out[seen].double() - exact[seen]).norm() / exact[seen].norm())

        return error(self.out[:1, some][:, :, rows]), error(masked(q, k, v, visible, scale))


def masked(query: Tensor, key: Tensor, value: Tensor, visible: Tensor, scale: float) -> Tensor:
    """Plain attention under a token mask, (B, H, S, D); queries that see nothing give 0."""
    scores = (query @ key.mT * scale).masked_fill(~visible, -math.inf)
    return scores.softmax(-1).nan_to_num(0.0) @ value


def pipeline_around(model: Any) -> DiffusionPipeline:
    """The transformer's own text-to-image or video pipeline, without text encoder and autoencoder."""
    parts: dict[str, Any] = {"transformer": model, "vae": None, "text_encoder": None, "tokenizer": None}
    flow = diffusers.FlowMatchEulerDiscreteScheduler()
    kind = type(model).__name__
    if kind == "WanTransformer3DModel":
        return diffusers.WanPipeline(**parts, scheduler=flow)
    if kind == "HunyuanVideoTransformer3DModel":
        return diffusers.HunyuanVideoPipeline(**parts, scheduler=flow, text_encoder_2=None, tokenizer_2=None)
    if kind == "CogVideoXTransformer3DModel":
        return diffusers.CogVideoXPipeline(**parts, scheduler=diffusers.CogVideoXDDIMScheduler())
    if kind == "FluxTransformer2DModel":
        return diffusers.FluxPipeline(**parts, scheduler=flow, text_encoder_2=None, tokenizer_2=None)
    raise ValueError(f"no pipeline is known for {kind}")


def call_arguments(shape: ModelShape, inputs: dict[str, Any], steps: int) -> dict[str, Any]:
    """A pipeline call of this size; classifier-free guidance where the shape has two passes a step."""
    text = inputs["encoder_hidden_states"]
    arguments: dict[str, Any] = {
        "prompt_embeds": text,
        "height": shape.height,
        "width": shape.width,
        "num_inference_steps": steps,
        "guidance_scale": 5.0 if shape.passes == 2 else 1.0,
        "generator": torch.Generator().manual_seed(0),
        "output_type": "latent",
    }
    if shape.passes == 2:
        arguments["negative_prompt_embeds"] = text.flip(1)
    if not shape.still:
        arguments["num_frames"] = shape.frames
    if shape.pooled_width:
        arguments["pooled_prompt_embeds"] = inputs["pooled_projections"]
    if "encoder_attention_mask" in inputs:
        arguments["prompt_attention_mask"] = inputs["encoder_attention_mask"]
    return arguments


@contextmanager
def dense_backend(name: str, device: torch.device) -> Iterator[None]:
    """Scaled dot product attention by this backend alone; a CPU has one."""
    if device.type == "cpu":
        yield
    else:
        with sdpa_kernel([DENSE_BACKENDS[name]]):
            yield


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def seconds(work: Callable[[], object], device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    work()
    synchronize(device)
    return time.perf_counter() - began


def dense(call: Call) -> Tensor:
    """The call's attention over all keys."""
    return F.scaled_dot_product_attention(call.query, call.key, call.value, scale=call.scale)


def fastest_dense(call: Call, device: torch.device) -> str:
    """The backend of scaled dot product attention that is fastest on this call; the median of five."""
    if device.type == "cpu":
        return "torch's CPU flash attention"
    times = {}
    for name in DENSE_BACKENDS:
        try:
            with dense_backend(name, device):
                dense(call)
                times[name] = statistics.median(seconds(lambda: dense(call), device) for _ in range(5))
        except RuntimeError:  # this backend does not take the call
            continue
    return min(times, key=lambda name: times[name])


@dataclass(frozen=True)
class Timed:
    """Seconds of a run: of each step, of all attention calls of each step, of one call in each step, of everything."""

    steps: list[float]
    attention: list[float]
    calls: list[float]
    whole: float


def reproduce(
    setting: Setting, claim: Claim, scale: str, device: torch.device, steps: int | None = None
) -> Reproduction:
    """Measure one claim.

    Args:
        setting: `claim.full` or `claim.cpu`.
        claim, scale: for the record.
        device: bf16 on CUDA, float32 on a CPU.
        steps: timed steps where no whole run is made; None = 4.
    """
    dtype = torch.bfloat16 if device.type == "cuda" else torch.float32
    shape = setting.shape
    with tqdm(total=4, desc=f"{claim.paper}: building", leave=False) as bar, torch.no_grad():
        model, method = setting.build(device, dtype)
        pipe = pipeline_around(model)
        pipe.set_progress_bar_config(leave=False)
        inputs = shape.inputs(device=device, dtype=dtype, generator=torch.Generator(device).manual_seed(0))

        watch = Watch()

        def run(number: int) -> Timed:
            ends: list[float] = []

            def finished(pipe: Any, step: int, timestep: Any, values: dict[str, Any]) -> dict[str, Any]:
                synchronize(device)
                ends.append(time.perf_counter())
                return values

            watch.seconds.clear()
            synchronize(device)
            began = time.perf_counter()
            pipe(**call_arguments(shape, inputs, number), callback_on_step_end=finished)
            steps = [end - start for start, end in zip([began, *ends], ends, strict=False)]
            calls = torch.tensor(watch.seconds, dtype=torch.float64).view(number, -1)
            return Timed(steps, calls.sum(1).tolist(), calls.mean(1).tolist(), ends[-1] - began)

        with steer.apply(pipe, watch):
            bar.set_description(f"{claim.paper}: one step of each, to warm up")
            run(1)
            assert watch.call is not None
            call, backend = watch.call, fastest_dense(watch.call, device)
            bar.update()
            with steer.apply(pipe, replace(method, steps=":")), SparseCall() as sparse_call:
                run(1)
            error, plain_error = sparse_call.errors()
            bar.update()
            number = setting.run_steps or steps or TIMED_STEPS
            bar.set_description(f"{claim.paper}: {number} dense steps")
            with dense_backend(backend, device):
                dense_run = run(number)
            bar.update()
            bar.set_description(f"{claim.paper}: the same with {type(method).__name__}")
            scheduled = method if setting.run_steps else replace(method, steps=":")
            with dense_backend(backend, device), steer.apply(pipe, scheduled) as handle:
                sparse_run = run(number)
                density, on = handle.stats["methods"][0]["density"], len(handle.bindings[0].live)
                begins = starts_at(handle.bindings[0].method.steps, number)
            bar.update()
    whole = number if setting.run_steps else shape.steps
    with steer.apply(pipe, method) as handle:
        first = starts_at(handle.bindings[0].method.steps, whole)
    sites = sum(site.kind in Sparse.kinds for site in steer.sites(pipe))
    later = slice(1, None) if number > 1 else slice(None)  # the first step of a run also prepares it
    sparse_steps = slice(max(later.start or 0, begins), None)
    dense_step, sparse_step = statistics.median(dense_run.steps[later]), statistics.mean(sparse_run.steps[sparse_steps])
    attention_share = statistics.median(dense_run.attention[later]) / dense_step * on / sites
    step_bound = 1 / (1 - attention_share + attention_share * density)
    run_seconds = dense_run.whole, sparse_run.whole
    if not setting.run_steps:
        run_seconds = whole * dense_step, first * dense_step + (whole - first) * sparse_step
    return Reproduction(
        paper=claim.paper,
        title=claim.title,
        source=claim.source,
        hardware=claim.hardware,
        published=claim.end_to_end,
        published_attention=claim.attention,
        scale=scale,
        grid=shape.grid(),
        tokens=call.query.shape[2],
        heads=call.query.shape[1],
        width=call.query.shape[3],
        density=density,
        error=error,
        plain_error=plain_error,
        dense_backend=backend,
        dense_attention=statistics.median(dense_run.calls[later]),
        sparse_attention=statistics.mean(sparse_run.calls[sparse_steps]),
        dense_step=dense_step,
        sparse_step=sparse_step,
        attention_share=attention_share,
        bound=whole / (first + (whole - first) / step_bound),
        steps=whole,
        sparse_steps=whole - first,
        dense_run=run_seconds[0],
        sparse_run=run_seconds[1],
        run_was_made=setting.run_steps is not None,
    )


def print_table(results: list[Reproduction], console: Console) -> None:
    """The published figures beside the bound and what was measured."""
    table = Table("", "density", "error (plain)", "attention", "step", "run", "bound", "published", show_lines=True)
    for r in results:
        published = " / ".join(
            f"{figure:.2f}x{what}"
            for figure, what in ((r.published, ""), (r.published_attention, " attention"))
            if figure is not None
        )
        table.add_row(
            f"{r.paper}\n{r.tokens:,} tokens",
            f"{r.density:.3f}",
            f"{r.error:.1e} ({r.plain_error:.1e})",
            f"{1e3 * r.dense_attention:.4g} / {1e3 * r.sparse_attention:.4g} ms\n{r.attention_speedup:.2f}x",
            f"{r.dense_step:.3g} / {r.sparse_step:.3g} s\n{r.step_speedup:.2f}x",
            f"{r.dense_run:.3g} / {r.sparse_run:.3g} s\n[bold]{r.run_speedup:.2f}x[/]"
            + ("" if r.run_was_made else "\nfrom its steps"),
            f"{r.bound:.2f}x",
            f"{published}\n{r.hardware}",
        )
    console.print(table)
    for r in results:
        console.print(f"{r.paper} ({r.title}; {r.source}): {r.reason()}", highlight=False)


def as_markdown(report: Mapping[str, Any]) -> str:
    """The written figures as the table of docs/benchmarks.md."""
    lines = [
        "| paper | tokens | density | error (plain) | attention | step | run | bound | published |",
        "|---|---|---|---|---|---|---|---|---|",
    ]
    for r in report["results"]:
        claimed = (("", r["published"]), ("attention ", r["published_attention"]))
        published = ", ".join(f"{what}{figure:.2f}x" for what, figure in claimed if figure is not None)
        run = f"{r['dense_run']:.1f} -> {r['sparse_run']:.1f} s, **{r['run_speedup']:.2f}x**"
        lines.append(
            f"| {r['paper']} | {r['tokens']:,} | {r['density']:.3f} | {r['error']:.1e} ({r['plain_error']:.1e}) "
            f"| {1e3 * r['dense_attention']:.0f} -> {1e3 * r['sparse_attention']:.0f} ms, "
            f"{r['attention_speedup']:.2f}x "
            f"| {r['dense_step']:.2f} -> {r['sparse_step']:.2f} s, {r['step_speedup']:.2f}x "
            f"| {run}{'' if r['run_was_made'] else ', from its steps'} | {r['bound']:.2f}x | {published} |"
        )
    return "\n".join(lines)


def reproduce_command(
    paper: Annotated[str | None, typer.Argument(help=f"One of {', '.join(PAPERS)}; default: all.")] = None,
    scale: Annotated[str, typer.Option(help="full = the published sizes, on a GPU; cpu = small ones.")] = "",
    every: Annotated[bool, typer.Option("--every", help="All settings of a paper, not its first.")] = False,
    steps: Annotated[int | None, typer.Option(help="Steps timed where no whole run is made.", min=2)] = None,
    device: Annotated[str | None, typer.Option(help="cpu or cuda; default: cuda if there is one.")] = None,
    output: Annotated[Path | None, typer.Option(help="Also write the figures as JSON.")] = None,
) -> None:
    """Measure the papers' speed-ups again: published number, bound and measured, with error and density."""
    where = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
    scale = scale or ("full" if where.type == "cuda" else "cpu")
    if scale not in ("full", "cpu"):
        raise ValueError(f"--scale {scale} does not exist; choose full or cpu")
    if paper not in (None, *PAPERS):
        raise ValueError(f"no paper {paper!r}; there are {', '.join(PAPERS)}")
    if scale == "full" and where.type == "cpu":
        raise ValueError("the published sizes need a GPU: use --scale cpu here")
    chosen = [claim for claim in CLAIMS if paper in (None, claim.paper)]
    if not every:
        chosen = list({claim.paper: claim for claim in reversed(chosen)}.values())[::-1]
    console, results = Console(width=140), []
    for claim in chosen:
        setting = claim.full if scale == "full" else claim.cpu
        results.append(reproduce(setting, claim, scale, where, steps))
        print_table(results[-1:], console)
    name = torch.cuda.get_device_name(where) if where.type == "cuda" else f"{platform.machine()} CPU"
    console.print(f"random weights, {name}, {torch.get_num_threads()} threads, torch {torch.__version__}")
    if output is not None:
        report = {
            "device": name,
            "threads": torch.get_num_threads(),
            "versions": {"torch": torch.__version__, "diffusers": diffusers.__version__, "steer": steer.__version__},
            "results": [
                {
                    **asdict(r),
                    "attention_speedup": r.attention_speedup,
                    "step_speedup": r.step_speedup,
                    "run_speedup": r.run_speedup,
                    "reason": r.reason(),
                }
                for r in results
            ],
        }
        output.write_text(json.dumps(report, indent=1) + "\n")
        console.print(f"wrote {output}")


if __name__ == "__main__":
    typer.run(reproduce_command)
