"""Context parallelism on two gloo processes: what a rank computes under Ulysses equals what one process computes."""

from __future__ import annotations

import os
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from diffusers import ContextParallelConfig
from probes import inputs_of, relative_error
from tiny import FAMILIES, build
from torch import Tensor, nn

import steer
from steer_patches.attach import Attachment
from steer_patches.clock import Clock
from steer_patches.parallel import ParallelismError, run_chain_whole
from steer_patches.site import Call, Next

RANKS = 2
HEADS = 4
TEXT_TOKENS = 6  # 7 in `tiny`: two ranks share equally only what is even
IMAGE_TOKENS = {"wan21": 72, "flux": 24, "qwen_image": 24, "ltx": 72}
PATIENCE = 120  # seconds until two processes that wait for each other are a failure
EPSILON = torch.finfo(torch.float32).eps


@dataclass(kw_only=True)
class Places(steer.Method, register=False):
    """Changes every token by its place in the sequence and every head by its number; keeps the shapes it saw."""

    layers: Any = "*"
    seen: set[tuple[str, int, int, int]] = field(default_factory=set)

    def attend(self, call: Call, next: Next) -> Tensor:
        number = torch.arange(1.0, call.site.heads + 1)[:, None, None]
        number = number if call.head_range is None else number[call.head_range]
        keys, queries = (torch.linspace(0, 1, x.shape[2])[:, None] for x in (call.key, call.query))
        self.seen.add((call.site.kind, call.query.shape[1], call.query.shape[2], call.key.shape[2]))
        edited = next(call.replace(key=call.key + 0.1 * number * keys)) * (1 + number * queries)
        return edited if call.heads is None else torch.where(call.heads, edited, next(call))


@dataclass(frozen=True)
class Case:
    """A tiny model, what is applied to it, and how it is split.

    Args:
        family: the model.
        method: makes what is applied to it.
        heads: attention heads, more than in the tiny model so that a rank has several.
        text: text tokens.
        config: of the `ContextParallelConfig`.
        runs_plain: False where diffusers fails at the split model without steer: LTX's text mask has all heads, a rank
            computes a share of them.
    """

    family: str
    method: Callable[[], steer.Method]
    heads: int = HEADS
    text: int = TEXT_TOKENS
    config: dict[str, Any] = field(default_factory=lambda: {"ulysses_degree": RANKS})
    runs_plain: bool = True

    def build(self) -> nn.Module:
        """The tiny model with `heads` heads."""
        small: Any = FAMILIES[self.family].make()
        head_dim = small.config.attention_head_dim
        wide: dict[str, Any] = {"num_attention_heads": self.heads}
        if self.family == "ltx":
            wide["cross_attention_dim"] = self.heads * head_dim
        return build(lambda: type(small).from_config({**small.config, **wide}))

    def output(self, model: nn.Module) -> Tensor:
        """One forward with `text` text tokens."""
        kwargs = inputs_of(FAMILIES[self.family], model)
        for name in ("encoder_hidden_states", "encoder_hidden_states_mask", "encoder_attention_mask"):
            if name in kwargs:
                kwargs[name] = kwargs[name][:, -self.text :]
        if "txt_ids" in kwargs:
            kwargs["txt_ids"] = kwargs["txt_ids"][: self.text]
        with torch.no_grad():
            return model(**kwargs, return_dict=False)[0].clone()


def pag(layers: str) -> Callable[[], steer.Method]:
    return lambda: steer.PAG(scale=3.0, layers=layers)


UNEVEN = {"ulysses_degree": RANKS, "ulysses_anything": True}
CASES = {
    "wan": Case("wan21", Places),
    "flux": Case("flux", Places),
    "qwen_image with padded text": Case("qwen_image", Places),
    "ltx with padded text": Case("ltx", Places, runs_plain=False),
    "wan, some heads": Case("wan21", lambda: Places(heads=[0, 3])),
    "flux, heads of one rank": Case("flux", lambda: Places(heads=[2], layers="*.0.attn")),
    "flux, guidance": Case("flux", pag("single_transformer_blocks.0")),
    "wan, guidance": Case("wan21", pag("blocks.1")),
    "wan, block masks of some heads": Case("wan21", lambda: steer.RadialAttention(block_size=8, heads=[0, 3])),
    "flux, uneven": Case("flux", Places, heads=3, text=7, config=UNEVEN),
    "qwen_image, uneven, padded text": Case("qwen_image", lambda: Places(heads=[0, 2]), heads=3, text=7, config=UNEVEN),
}


def run_case(case: Case) -> dict[str, Any]:
    """Outputs of the whole model and of the split one: as they are, with the method, and hooked without a chain."""
    model, method = case.build(), case.method()
    result: dict[str, Any] = {"plain": case.output(model)}
    with steer.apply(model, method):
        result["steered"] = case.output(model)
    getattr(method, "seen", set()).clear()
    model.enable_parallelism(config=ContextParallelConfig(**case.config))
    with steer.apply(model, method):
        result["steered, split"] = case.output(model)
    result["seen"] = set(getattr(method, "seen", ()))
    if case.runs_plain:
        result["plain, split"] = case.output(model)
        attachment = Attachment(model, Clock(None))
        result["hooked, split"] = case.output(model)
        attachment.remove()
        result["after, split"] = case.output(model)
    return result


def refusal(case: Case) -> str:
    """The message with which a steered forward is refused."""
    model = case.build()
    model.enable_parallelism(config=ContextParallelConfig(**case.config))
    with steer.apply(model, case.method()), pytest.raises(ParallelismError) as error:
        case.output(model)
    return str(error.value)


def masks(mask: Tensor) -> Tensor | str:
    """The mask with which 5 tokens a rank are attended to under `mask`, or why it is refused."""
    model = CASES["wan"].build()
    model.enable_parallelism(config=ContextParallelConfig(ulysses_degree=RANKS))
    config = model._parallel_config.context_parallel_config  # type: ignore[union-attr]
    kept: list[Tensor] = []

    def keep(whole: Call) -> Tensor:
        assert whole.mask is not None
        kept.append(whole.mask)
        return whole.query

    x = torch.zeros(1, HEADS, 5, 8)
    try:
        run_chain_whole(Call(x, x, x, mask, None, False, steer.sites(model)[0], 0), config, True, keep)
    except ParallelismError as error:
        return str(error)
    return kept[0]


BY_HEAD = torch.arange(HEADS * 10.0).reshape(1, HEADS, 1, 10)
OTHERS: dict[str, Callable[[], Any]] = {
    "ring": lambda: refusal(Case("wan21", Places, config={"ring_degree": RANKS})),
    "heads": lambda: refusal(Case("flux", Places, heads=3)),
    "whole mask": lambda: masks(BY_HEAD),
    "mask of own keys": lambda: masks(BY_HEAD.tensor_split(RANKS, -1)[dist.get_rank()]),
    "mask of own queries": lambda: masks(torch.ones(1, 1, 5, 5, dtype=torch.bool)),
}


def work(rank: int, folder: Path) -> None:
    """One of the two processes: runs every case and leaves the results in a file."""
    torch.set_num_threads(1)
    torch.accelerator.device_count = lambda: 1  # diffusers counts accelerators, and there are none here
    store, patience = f"file://{folder}/store", timedelta(seconds=PATIENCE)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=RANKS, timeout=patience)
    results = {name: run_case(case) for name, case in CASES.items()}
    torch.save({**results, **{name: run() for name, run in OTHERS.items()}}, folder / f"{rank}.pt")
    dist.barrier()
    os._exit(0)  # gloo's threads would abort the process


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What each rank found, by case."""
    folder = tmp_path_factory.mktemp("ranks")
    processes = mp.spawn(work, (folder,), nprocs=RANKS, join=False)
    deadline = time.monotonic() + PATIENCE
    while not processes.join(timeout=1):
        if time.monotonic() > deadline:
            for process in processes.processes:
                process.kill()
            pytest.fail(f"the processes still wait for each other after {PATIENCE} s")
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(RANKS)]


@pytest.mark.parametrize("name", CASES)
def test_ranks_compute_what_one_process_computes(name: str, ranks: list[dict[str, Any]]) -> None:
    """To rounding: ten times what diffusers' own split differs by, as the edits make rounding larger."""
    for result in (found[name] for found in ranks):
        own = relative_error(result["plain, split"], result["plain"]) if CASES[name].runs_plain else 0.0
        allowed = 10 * max(own, EPSILON)
        assert relative_error(result["steered, split"], result["steered"]) < allowed
        assert relative_error(result["steered"], result["plain"]) > 1e4 * allowed, "the edit is too small to see"


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.runs_plain])
def test_without_a_chain_the_split_model_is_untouched(name: str, ranks: list[dict[str, Any]]) -> None:
    for result in (found[name] for found in ranks):
        assert torch.equal(result["hooked, split"], result["plain, split"])
        assert torch.equal(result["after, split"], result["plain, split"])


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if case.method is Places])
def test_a_method_sees_whole_sequences_of_its_heads(name: str, ranks: list[dict[str, Any]]) -> None:
    case = CASES[name]
    image = IMAGE_TOKENS[case.family]
    for rank, result in enumerate(found[name] for found in ranks):
        heads = (case.heads + 1 - rank) // RANKS
        if case.family in ("flux", "qwen_image"):
            assert result["seen"] == {("joint", heads, image + case.text, image + case.text)}
        else:
            assert result["seen"] == {("self", heads, image, image), ("cross", heads, image, case.text)}


def test_ring_attention_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "blocks.0.attn1 runs ring attention (ring_degree=2)" in found["ring"]
        assert "Use Ulysses alone" in found["ring"]


def test_heads_that_cannot_be_shared_are_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "transformer_blocks.0.attn has 3 query heads" in found["heads"]
        assert "ulysses_anything=True" in found["heads"]


@pytest.mark.parametrize("name", ["whole mask", "mask of own keys"])
def test_masks_are_whole_and_of_a_ranks_heads(name: str, ranks: list[dict[str, Any]]) -> None:
    for found, wanted in zip(ranks, BY_HEAD.tensor_split(RANKS, 1), strict=True):
        assert torch.equal(found[name], wanted)


def test_a_mask_of_own_queries_is_refused(ranks: list[dict[str, Any]]) -> None:
    for found in ranks:
        assert "mask of shape (1, 1, 5, 5), of which a rank holds a part" in found["mask of own queries"]
