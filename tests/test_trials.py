"""Searches with an objective: they find what is known to be best, batched as one at a time, killed as in one go."""

from __future__ import annotations

import functools
import itertools
import json
import math
import os
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FunctionType, SimpleNamespace
from typing import Any

import pytest
import torch
from dense import doubled
from diffusers import DDPMScheduler, EulerAncestralDiscreteScheduler, StableDiffusionImg2ImgPipeline
from PIL import Image
from probes import Scale, Tripped, assert_untouched, inputs_of, snapshot, steer_attributes
from test_calibrate import Counted, trip_after
from test_calibrate import samples as wan_samples
from tiny import FAMILIES
from tiny_pipelines import PIPELINES
from torch import Tensor

import steer
from steer import ACT, PAG, SEG, SLG, Plan, SparseVDiT, checkpoint
from steer.bind import models_of
from steer.checkpoint import _code_of
from steer.strategies import HeadHunter, Space, Strategy, Sweep, Trial

TOLERANCE = 1e-10
PROMPTS = ("a red fox", "two blue birds", "snow on a hill")
Head = tuple[str, int]


def exact(name: str) -> Any:
    return PIPELINES[name].build().to(torch.float64)


def samples(name: str, pipe: Any, count: int = 2, cfg: bool = False, steps: int = 2) -> list[dict[str, Any]]:
    """Arguments of `count` calls that draw one picture each."""
    calls = []
    for seed in range(count):
        kwargs = doubled(PIPELINES[name].call_kwargs(pipe, seed=seed, guidance_scale=4.0 if cfg else 1.0, steps=steps))
        del kwargs["generator"]
        if "prompt" in kwargs:
            kwargs["prompt"] = PROMPTS[seed]
        if isinstance(kwargs.get("negative_prompt"), list):
            kwargs["negative_prompt"] = "blurry"
        calls.append(kwargs)
    return calls


def heads_of(pipe: Any, method: type[steer.Method] = PAG) -> list[Head]:
    first = next(iter(models_of(pipe).values()))
    return [(site.name, head) for site in steer.sites(first) if site.kind in method.kinds for head in range(site.heads)]


def mapping(*heads: Head) -> dict[str, list[int]]:
    return {name: sorted(h for n, h in heads if n == name) for name, _ in sorted(heads)}


def draw(pipe: Any, data: Sequence[Mapping[str, Any]], method: steer.Method) -> list[Tensor]:
    with steer.apply(pipe, method):
        return [pipe(generator=torch.Generator().manual_seed(i), **call)[0] for i, call in enumerate(data)]


@dataclass
class Nearest:
    """Minus the distance to the nearest of the known pictures."""

    known: list[Tensor]

    def __call__(self, pictures: Tensor, prompts: Sequence[Any]) -> list[float]:
        assert len(pictures) == len(prompts)
        return [-min(float((picture - one[0]).norm()) for one in self.known) for picture in pictures]


def tilt(pictures: Tensor, prompts: Sequence[Any]) -> Tensor:
    """Something that every picture has: the mean of its first half less that of its second."""
    flat = pictures.flatten(1)
    return flat[:, ::2].mean(1) - flat[:, 1::2].mean(1)


def constant(pictures: Tensor, prompts: Sequence[Any]) -> list[float]:
    return [1.0] * len(pictures)


def search(pipe: Any, data: Any, objective: Any = tilt, method: Any = None, **options: Any) -> steer.Method:
    options = {"progress": False, **options}
    return steer.calibrate(pipe, method or PAG(scale=3.0), data, objective=objective, **options)


def record_of(fitted: steer.Method) -> Plan:
    assert fitted.record is not None
    return fitted.record


def scores_of(fitted: steer.Method) -> Tensor:
    return record_of(fitted).tensors["scores"]


def assert_same(first: steer.Method, second: steer.Method) -> None:
    one, other = record_of(first), record_of(second)
    assert first == second
    assert set(one.tensors) == set(other.tensors) and one.report == other.report and one.sites == other.sites
    for name, tensor in one.tensors.items():
        assert torch.equal(tensor.nan_to_num(math.pi), other.tensors[name].nan_to_num(math.pi)), name


@pytest.mark.parametrize(
    "name", ["sd3_text", "flux", "wan21", "wan22", "sd15_text", "pixart", "cogvideox", "animatediff"]
)
def test_the_known_head_is_found_first(name: str) -> None:
    pipe = exact(name)
    data = samples(name, pipe)
    heads = heads_of(pipe)
    for known in (heads[1], heads[-2]):
        objective = Nearest(draw(pipe, data, PAG(heads=mapping(known))))
        fitted = search(pipe, data, objective, top=1)
        assert fitted.heads == mapping(known)
        report = record_of(fitted).report
        assert tuple(report["trials"][0]["head"]) == known
        assert -TOLERANCE < report["trials"][0]["score"] <= 0 and report["trials"][1]["score"] < -1e-4
        chosen = record_of(fitted).tensors["chosen"]
        layer = record_of(fitted).layer(known[0])
        assert chosen.sum() == 1 and chosen[0, layer, known[1]] == 1
        gain = record_of(fitted).tensors["gain_1"]
        assert gain[0, layer, known[1]] == gain.max() and math.isclose(
            float(gain.max()), report["figures"]["best gain"]
        )


@pytest.mark.parametrize("name", ["sd3_text", "flux"])
def test_two_rounds_find_a_known_pair(name: str) -> None:
    pipe = exact(name)
    data = samples(name, pipe, cfg=True)
    heads = heads_of(pipe)
    for pair in itertools.combinations((heads[0], heads[3], heads[-1]), 2):
        objective = Nearest(draw(pipe, data, PAG(heads=mapping(*pair))))
        fitted = search(pipe, data, objective, rounds=2, top=1)
        assert fitted.heads == mapping(*pair)
        gains = [record_of(fitted).tensors[f"gain_{n}"] for n in (1, 2)]
        assert int(gains[0].isnan().sum()) == 0 and int(gains[1].isnan().sum()) == 1  # one head is chosen already


BATCHED = [("sd3", True), ("sd3_text", False), ("sd15_text", True), ("pixart", True), ("flux", False), ("wan21", True),
           ("wan22", True), ("cogvideox", True), ("animatediff", False), ("qwen_image", True)]  # fmt: skip


@pytest.mark.parametrize(
    ("name", "cfg"), BATCHED, ids=[f"{name}-{'cfg' if cfg else 'no_cfg'}" for name, cfg in BATCHED]
)
def test_a_batch_of_trials_scores_as_one_trial_at_a_time(name: str, cfg: bool) -> None:
    pipe = exact(name)
    data = samples(name, pipe, cfg=cfg)
    forwards: list[int] = []
    hook = next(iter(models_of(pipe).values())).register_forward_pre_hook(
        lambda _, args, kwargs: forwards.append(
            next(t for t in (*args, *kwargs.values()) if torch.is_tensor(t)).shape[0]
        ),
        with_kwargs=True,
    )
    method = PAG(scale=3.0, layers=list(dict.fromkeys(layer for layer, _ in heads_of(pipe)))[-2:])
    alone = search(pipe, data, method=method, batch=1, rounds=2, top=1)
    single = len(forwards)
    for batch in (None, 3):
        forwards.clear()
        together = search(pipe, data, method=method, batch=batch, rounds=2, top=1)
        assert len(forwards) < single  # batches, or this shows nothing
        assert (scores_of(together) - scores_of(alone)).abs().max() <= TOLERANCE
        assert together == alone and record_of(together).report["keys"] == record_of(alone).report["keys"]
    hook.remove()


@pytest.mark.parametrize("scheduler", [EulerAncestralDiscreteScheduler, DDPMScheduler])
def test_noise_at_every_step_is_that_of_the_sample(scheduler: Any) -> None:
    pipe = exact("sd15_text")
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config)
    data = samples("sd15_text", pipe)
    alone, together = (search(pipe, data, batch=batch, method=SEG(), trials=5) for batch in (1, None))
    assert (scores_of(together) - scores_of(alone)).abs().max() <= TOLERANCE
    twice = search(pipe, data[:1] * 2, method=SEG(), trials=2)
    assert (scores_of(twice)[:, 0] != scores_of(twice)[:, 1]).all()  # the same prompt from seeds 0 and 1
    shifted = search(pipe, data[:1], method=SEG(), trials=2, seed=1)
    assert (scores_of(shifted)[:, 0] - scores_of(twice)[:, 1]).abs().max() <= TOLERANCE


def test_equal_scores_choose_the_first_heads_every_time() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data, heads = samples("sd3_text", pipe), heads_of(pipe)
    for batch in (None, 1, 4):
        assert search(pipe, data, constant, top=2, batch=batch).heads == mapping(*heads[:2])
        assert search(pipe, data, constant, top=1, rounds=3, batch=batch).heads == mapping(*heads[:3])


def killed(objective: Callable[..., Any], calls: int, kill: Callable[[], Any]) -> Callable[..., Any]:
    """The objective, that is over after so many calls; it has the same name."""
    left = itertools.count(calls, -1)

    @functools.wraps(objective)
    def wrapped(*args: Any) -> Any:
        return objective(*args) if next(left) > 0 else kill()

    return wrapped


def trip() -> None:
    raise Tripped


@pytest.mark.parametrize("batch", [None, 1, 4])
def test_an_error_anywhere_and_the_same_call_again_give_one_run(tmp_path: Path, batch: int | None) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe, steps=1)
    calls = itertools.count()

    @functools.wraps(tilt)
    def counting(*args: Any) -> Any:
        next(calls)
        return tilt(*args)

    options: dict[str, Any] = {"rounds": 2, "top": 2, "batch": batch, "method": PAG(layers="transformer_blocks.{0,2}")}
    whole = search(pipe, data, counting, **options)
    total = next(calls)
    before = snapshot(pipe.transformer)
    for at in range(0, total, 3 if batch == 1 else 2):
        folder = tmp_path / str(at)
        with pytest.raises(Tripped):
            search(pipe, data, killed(tilt, at, trip), checkpoint=folder, **options)
        assert_untouched(before, pipe.transformer)
        assert steer_attributes(pipe.transformer) == []
        calls = itertools.count()
        assert_same(search(pipe, data, counting, checkpoint=folder, **options), whole)
        assert next(calls) == total - at  # nothing is drawn again


def test_the_model_fails_in_the_middle_of_a_batch(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    whole = search(pipe, data)
    before = snapshot(pipe.transformer)
    for forwards in (0, 3, 7):
        undo = trip_after(pipe.transformer, forwards)
        with pytest.raises(Tripped):
            search(pipe, data, checkpoint=tmp_path)
        undo()
        assert_untouched(before, pipe.transformer)
    assert_same(search(pipe, data, checkpoint=tmp_path), whole)


KILLED = """
import os, signal, sys, torch
torch.set_grad_enabled(False)
from test_trials import PIPELINES, killed, samples, search, tilt
pipe = PIPELINES["sd3_text"].build()
kill = lambda: os.kill(os.getpid(), signal.SIGKILL)
search(pipe, samples("sd3_text", pipe), killed(tilt, 9, kill), rounds=2, top=1, checkpoint=sys.argv[1])
"""


def test_a_killed_process_is_resumed_by_another(tmp_path: Path) -> None:
    path = {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    ran = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], capture_output=True, text=True, env=path)
    assert ran.returncode == -9, ran.stderr
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    whole = search(pipe, data, rounds=2, top=1)
    assert (tmp_path / "calibration.safetensors").exists()
    with pytest.raises(ValueError, match=r"is of another search, which differs in .*seed"):
        search(pipe, data, rounds=2, top=1, checkpoint=tmp_path, seed=1)
    forwards: list[int] = []
    hook = pipe.transformer.register_forward_pre_hook(lambda *_: forwards.append(1))
    search(pipe, data, rounds=2, top=1)
    fresh = len(forwards)
    forwards.clear()
    resumed = search(pipe, data, rounds=2, top=1, checkpoint=tmp_path)
    assert 0 < len(forwards) < fresh
    hook.remove()
    assert_same(resumed, whole)


def test_resume_with_another_batch_and_with_a_larger_budget(tmp_path: Path) -> None:
    pipe = exact("sd3_text")
    data = samples("sd3_text", pipe)
    whole = search(pipe, data, rounds=2, top=2)
    small = search(pipe, data, rounds=2, top=2, trials=3, batch=1, checkpoint=tmp_path)
    assert record_of(small).report["figures"]["trials"] == 3
    large = search(pipe, data, rounds=2, top=2, batch=4, checkpoint=tmp_path)
    assert large == whole and record_of(large).report["keys"] == record_of(whole).report["keys"]
    assert (scores_of(large) - scores_of(whole)).abs().max() <= TOLERANCE


@pytest.mark.parametrize("trials", [1, 2, 5, 7, 100])
@pytest.mark.parametrize("batch", [None, 1, 4])
def test_a_budget_of_trials_is_kept_and_what_was_tried_is_chosen_among(trials: int, batch: int | None) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data, heads = samples("sd3_text", pipe, count=1), heads_of(pipe)  # 6 heads, so round 2 has 5 trials
    fitted = search(pipe, data, trials=trials, batch=batch, rounds=2, top=1)
    record = record_of(fitted)
    tried = [tuple(trial["head"]) for trial in record.report["trials"]]
    assert record.report["figures"]["trials"] == len(tried) == min(trials, 11)
    first = [head for head, gain in zip(heads, record.tensors["gain_1"].flatten(), strict=True) if not gain.isnan()]
    assert first == heads[: min(trials, 6)]
    chosen = {(layer, head) for layer, numbers in fitted.heads.items() for head in numbers}  # type: ignore[union-attr]
    assert chosen <= set(tried) and len(chosen) == (2 if trials > 6 else 1)
    assert (scores_of(fitted).isnan().sum()) == 0


def look_is_a_second(monkeypatch: pytest.MonkeyPatch) -> None:
    """The clock of a search goes on by one second whenever it looks at it."""
    ticks = itertools.count()
    clock = SimpleNamespace(monotonic=lambda: float(next(ticks)))
    monkeypatch.setattr(sys.modules["steer.calibrate"], "time", clock)


def test_a_budget_of_seconds_ends_saves_and_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    whole = search(pipe, data, rounds=2, top=1, batch=2)
    look_is_a_second(monkeypatch)
    with pytest.raises(ValueError, match="over before one trial had drawn every sample: give more seconds, or fewer"):
        search(pipe, data, rounds=2, top=1, batch=2, seconds=1.5, checkpoint=tmp_path)
    assert (tmp_path / "calibration.safetensors").exists()
    part = search(pipe, data, rounds=2, top=1, batch=2, seconds=5.5, checkpoint=tmp_path)
    assert 0 < record_of(part).report["figures"]["trials"] < 6
    assert record_of(part).report["keys"][0] == "without" and not scores_of(part)[0].isnan().any()
    assert_same(search(pipe, data, rounds=2, top=1, batch=2, seconds=1e6, checkpoint=tmp_path), whole)


def test_own_searches_keep_their_budgets_and_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pipe = PIPELINES["wan21"].build()
    data = samples("wan21", pipe, count=3)
    data = [{key: v.float() if torch.is_tensor(v) else v for key, v in call.items()} for call in data]

    def fit(**options: Any) -> Plan:
        method = SparseVDiT(block_size=8)
        return record_of(steer.calibrate(pipe, method, data, groups=2, epsilon=0.2, progress=False, **options))

    whole, two = fit(), fit(trials=2)
    assert not torch.equal(two.tensors["error"], whole.tensors["error"])
    assert torch.equal(fit(trials=2, checkpoint=tmp_path).tensors["error"], two.tensors["error"])
    assert torch.equal(fit(trials=1, checkpoint=tmp_path).tensors["error"], two.tensors["error"])  # it was seen
    assert torch.equal(fit(checkpoint=tmp_path).tensors["error"], whole.tensors["error"])
    look_is_a_second(monkeypatch)
    assert torch.equal(fit(seconds=1.5, checkpoint=tmp_path / "t").tensors["error"], two.tensors["error"])
    assert torch.equal(fit(checkpoint=tmp_path / "t").tensors["error"], whole.tensors["error"])


def test_a_smaller_budget_keeps_what_a_pass_has_seen(tmp_path: Path) -> None:
    """Killed after two samples of the first pass, resumed with a budget for one: the second pass sees these two."""
    pipe = PIPELINES["wan21"].build()
    undo = trip_after(pipe.transformer, 9)  # a sample is 4 forwards
    with pytest.raises(Tripped):
        steer.calibrate(pipe, Counted(), wan_samples(pipe), checkpoint=tmp_path, progress=False)
    undo()
    found: Any = steer.calibrate(pipe, Counted(), wan_samples(pipe), checkpoint=tmp_path, progress=False, trials=2)
    assert found.begun == (0, 1) and found.counts.tolist() == [8, 8]


@pytest.mark.parametrize(
    ("objective", "kind", "message"),
    [
        (lambda p, _: [1.0] * (len(p) + 1), ValueError, r"gave 2 scores for 1 pictures; it must give one for each"),
        (lambda p, _: torch.ones(len(p), 2), ValueError, r"gave 2 scores for 1 pictures"),
        (lambda p, _: [math.nan] * len(p), ValueError, "gave nan for sample 0 with no method; a score must be finite"),
        (lambda p, _: [math.inf if len(p) > 1 else 0.0] * len(p), ValueError, "gave inf for sample 0 with layers=None"),
        (lambda p, _: None, TypeError, "the objective returned a NoneType; it must return one score for each picture"),
        (lambda p, _: {"score": 1.0}, TypeError, "the objective returned a dict; it must return one score"),
        (lambda p, _: trip(), Tripped, ""),
    ],
)  # fmt: skip
def test_a_wrong_objective_is_said_and_leaves_no_trace(objective: Any, kind: type[Exception], message: str) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    search(pipe, data, trials=1)  # fills the scheduler
    pipe.set_progress_bar_config(leave=False)
    bars, attributes, before = pipe._progress_bar_config, list(vars(pipe)), snapshot(pipe.transformer)
    with pytest.raises(kind, match=message):
        search(pipe, data, objective)
    assert_untouched(before, pipe.transformer)
    assert pipe._progress_bar_config is bars and list(vars(pipe)) == attributes
    assert steer_attributes(pipe) == [] and "step" not in vars(pipe.scheduler)


def test_an_objective_may_change_its_pictures_and_return_any_numbers() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)

    def rude(pictures: Tensor, prompts: Any) -> Any:
        found = tilt(pictures, prompts).numpy()
        pictures.zero_()
        return found

    polite = search(pipe, data, tilt)
    assert torch.equal(scores_of(search(pipe, data, rude)), scores_of(polite))
    as_list = search(pipe, data, lambda p, q: [score.reshape(1) for score in tilt(p, q)])
    assert torch.equal(scores_of(as_list), scores_of(polite))


def test_a_search_that_changes_no_score_says_so() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)  # of two steps, which SLG's default share of the run leaves out
    with pytest.warns(UserWarning, match="no trial changed any score, so these settings of SLG are as good as any"):
        search(pipe, data, tilt, SLG(layers="*"), strategy="sweep", space={"scale": [1.0, 2.0]})
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        search(pipe, data, tilt, SLG(layers="*", steps=":"), strategy="sweep", space={"scale": [1.0, 2.0]})


def test_sets_in_the_objective_are_the_same_code_in_every_process() -> None:
    """Of small whole numbers the order in a set depends on how it was built, as that of text does on the process."""

    def small(pictures: Tensor, prompts: Any) -> Any:
        return [float(len(prompts) in {0, 8})] * len(pictures)

    code = small.__code__
    other = tuple(frozenset([8, 0]) if isinstance(each, frozenset) else each for each in code.co_consts)
    assert other == code.co_consts and repr(other) != repr(code.co_consts)
    rebuilt = FunctionType(code.replace(co_consts=other), small.__globals__, small.__name__)
    assert _code_of(rebuilt) == _code_of(small)


def test_pictures_and_prompts_are_what_is_promised() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = [{k: v for k, v in call.items() if k != "output_type"} for call in samples("sd3_text", pipe)]
    seen: list[tuple[Any, Any]] = []

    def look(pictures: Tensor, prompts: Any) -> Any:
        seen.append((pictures, prompts))
        return tilt(pictures, prompts)

    search(pipe, data, look, trials=3)
    for pictures, prompts in seen:
        assert pictures.shape[0] == len(prompts) and pictures.shape[1] == 3 and pictures.dtype == torch.float32
        assert bool((pictures >= 0).all()) and bool((pictures <= 1).all())
        assert prompts[0] in PROMPTS and len(set(prompts)) == 1
    as_pil = [{**call, "output_type": "pil"} for call in data]
    search(pipe, as_pil, lambda p, _: [float(sum(picture.getpixel((0, 0)))) for picture in p], trials=2)


def test_data_may_be_a_generator_and_stays_as_it_is() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    copies = [dict(call) for call in data]

    def stream() -> Iterator[dict[str, Any]]:
        yield from data

    assert_same(search(pipe, stream(), trials=2), search(pipe, data, trials=2))
    assert data == copies


def test_pictures_as_inputs_are_drawn_one_at_a_time() -> None:
    text = PIPELINES["sd15_text"].build()
    pipe = StableDiffusionImg2ImgPipeline(**text.components, requires_safety_checker=False)
    data = [{"prompt": "a fox", "image": Image.new("RGB", (16, 16), (200, 40, 40)), "num_inference_steps": 4,
             "strength": 0.5, "output_type": "latent"}]  # fmt: skip
    alone, together = (search(pipe, data, batch=batch, trials=3) for batch in (1, None))
    assert torch.equal(scores_of(alone), scores_of(together))
    assert len(set(scores_of(alone).flatten().tolist())) == 4


def test_callbacks_and_numbers_in_samples_share_a_batch() -> None:
    pipe = exact("sd3_text")
    ends: list[int] = []

    def halve(_: Any, step: int, timestep: Any, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        ends.append(tensors["latents"].shape[0])
        return {"latents": tensors["latents"] * 0.9}

    data = [{**call, "callback_on_step_end": halve, "sigmas": [1.0, 0.5]} for call in samples("sd3_text", pipe)]
    alone, together = (search(pipe, data, batch=batch, trials=4) for batch in (1, None))
    assert max(ends) == 2
    assert (scores_of(alone) - scores_of(together)).abs().max() <= TOLERANCE


def test_a_bare_model_is_scored_by_its_output() -> None:
    model = FAMILIES["llama"].build()
    ids = torch.arange(24)[None] % 50
    data = [{"input_ids": ids}, {"input_ids": ids.flip(1)}]

    def last(outputs: Sequence[Any], given: Sequence[Mapping[str, Any]]) -> list[float]:
        assert len(outputs) == len(given) == 1 and set(given[0]) == {"input_ids"}
        return [float(outputs[0].logits[0, -1, 3])]

    before = snapshot(model)
    method = ACT(beta=0.5, alpha=2.0, layers="model.layers.*")
    fitted: Any = search(model, data, last, method, strategy="sweep", space={"beta": [0.9, 0.5, 0.1]})
    assert_untouched(before, model)
    assert scores_of(fitted).shape == (4, 2) and len(set(scores_of(fitted)[:, 0].tolist())) == 4
    best = max(record_of(fitted).report["trials"], key=lambda trial: trial["score"])
    assert f"beta={fitted.beta}" == best["settings"]

    denoiser = FAMILIES["sd3"].build()
    inputs = inputs_of(FAMILIES["sd3"], denoiser)
    found = search(denoiser, [inputs], lambda o, _: [float(o[0][0].mean())])
    assert len(record_of(found).report["trials"]) == 6


def test_methods_without_heads_and_bounded_searches() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    with pytest.raises(ValueError, match='strategy="headhunter" chooses heads, which this method does not take; use'):
        search(pipe, data, trip, SLG())  # before anything is drawn
    swept = search(pipe, data, tilt, SLG(), strategy="sweep")
    assert [t["settings"] for t in sorted(record_of(swept).report["trials"], key=lambda t: t["number"])] == [
        f"layers='transformer_blocks.{i}'" for i in range(len(record_of(swept).report["trials"]))
    ]
    bounded = search(pipe, data, tilt, SLG(layers="transformer_blocks.1"), strategy="sweep")
    assert len(record_of(bounded).report["trials"]) == 1
    heads = {"transformer_blocks.1": [1], "transformer_blocks.2": [0]}
    fitted = search(pipe, data, constant, PAG(heads=heads), top=1)
    assert [tuple(t["head"]) for t in record_of(fitted).report["trials"]] == [
        ("transformer_blocks.1.attn", 1), ("transformer_blocks.2.attn", 0)
    ]  # fmt: skip
    assert len(record_of(search(pipe, data, constant, PAG(layers="transformer_blocks.2"))).report["trials"]) == 2


def test_what_is_swept_may_be_named_by_globs_and_start_neutral() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    for layers, count in (("transformer_blocks.{0,1}", 2), ("transformer_blocks.2", 1)):
        known = Nearest(draw(pipe, data, PAG(scale=2.0, heads={layers: [1]})))
        space = {"scale": [0.0, 1.0, 2.0], "heads": [{layers: [0]}, {layers: [1]}]}
        fitted = search(pipe, data, known, PAG(scale=0.0, layers=layers), strategy="sweep", space=space, cycles=2)
        assert fitted.settings() == {"layers": layers, "scale": 2.0, "heads": {layers: [1]}}
        assert record_of(fitted).tensors["chosen"].tolist() == [[[0, 1]] * count]
    with pytest.raises(ValueError, match="edits nothing, so there is nothing to calibrate"):
        search(pipe, data, trip, PAG(scale=0.0))


class Silent(Strategy):
    """A strategy of a user's that ends before it asks."""

    def search(self, space: Space) -> Any:
        yield from ()
        return {}


def test_wrong_calls_are_refused_before_anything_is_drawn() -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    before = snapshot(pipe)
    cases: list[tuple[type[Exception], str, dict[str, Any]]] = [
        (TypeError, 'round: strategy="headhunter" has no such option; it has rounds, top', {"round": 2}),
        (TypeError, r"top: give the options to the strategy, HeadHunter\(", {"strategy": HeadHunter(), "top": 2}),
        (ValueError, "strategy='greedy' does not exist; choose from headhunter, sweep", {"strategy": "greedy"}),
        (TypeError, r"space=\['scal'\]: PAG has no such field; it has layers, heads",
         {"strategy": "sweep", "space": {"scale": [1.0], "scal": [2.0]}}),
        (ValueError, "strength=2 must lie in", {"strategy": "sweep", "space": {"strength": [2]}}),
        (ValueError, "layers='blocks.9' matches none of", {"strategy": Sweep(space={"layers": ["blocks.9"]})}),
        (ValueError, "trials=0 must be a whole number of at least 1", {"trials": 0}),
        (ValueError, "trials=2.5 must be a whole number", {"trials": 2.5}),
        (ValueError, "batch=0 must be a whole number of at least 1", {"batch": 0}),
        (ValueError, "seconds=0 must be above 0", {"seconds": 0}),
        (TypeError, "PAG cannot take scale='much': must be real number",
         {"strategy": "sweep", "space": {"scale": ["much"]}}),
        (ValueError, "Silent asks for no trial, so there is nothing to search", {"strategy": Silent()}),
        (TypeError, "<class 'steer.methods.pag.PAG'> is no method; pass one, e.g. steer.PAG", {"method": PAG}),
        (ValueError, "number=7: there are 6 heads", {"strategy": "random", "number": 7}),
        (ValueError, "draws=16: there are 15 choices of 2", {"strategy": "random", "number": 2, "draws": 16}),
        (ValueError, "heads has a mapping for each picture; a search starts from one choice",
         {"method": PAG(heads=[{"transformer_blocks.0": [0]}] * 2)}),
    ]  # fmt: skip
    for kind, message, options in cases:
        with pytest.raises(kind, match=message):
            search(pipe, data, trip, **options)
    with pytest.raises(TypeError, match="strategy= and batch= are for searches with an objective"):
        steer.calibrate(pipe, PAG(), data, strategy="sweep")
    for wrong, message in (
        ({**data[0], "prompt": ["a", "b"]}, "a sample is one prompt"),
        ({**data[0], "num_images_per_prompt": 2}, "leave out num_images_per_prompt"),
        ({**data[0], "generator": torch.Generator()}, "leave out generator"),
    ):
        with pytest.raises(TypeError, match=message):
            search(pipe, [wrong], trip)
    assert_untouched(before, pipe)


def test_a_sample_of_two_pictures_is_refused_in_words() -> None:
    pipe = PIPELINES["sd3"].build()
    two = PIPELINES["sd3"].call_kwargs(pipe, batch=2, steps=1)
    del two["generator"]
    with pytest.raises(ValueError, match="drew 2 pictures where 1 were due; a sample is one picture"):
        search(pipe, [two], lambda p, _: [0.0] * len(p))


def test_a_model_that_computes_row_by_row_is_searched_one_at_a_time() -> None:
    pipe = PIPELINES["mochi"].build()
    data = PIPELINES["mochi"].call_kwargs(pipe, steps=2)
    del data["generator"]
    alone, together = (search(pipe, [data], batch=batch, trials=3) for batch in (1, None))
    assert_same(alone, together)


@dataclass(kw_only=True)
class Mixed(Strategy):
    """Trials that differ in more than their heads, some of them twice."""

    def search(self, space: Space) -> Any:
        heads = [{layer: [0]} for layer in space.layers]
        trials = [Trial({"scale": scale, "heads": each}) for scale in (1.0, 2.0) for each in heads]
        scores = yield [*trials, *trials[:2], Trial({"strength": 0.5, "layers": "*"})]
        again = yield trials[1:3]
        assert again == scores[1:3] and scores[-3:-1] == scores[:2]
        return trials[3].settings


def test_a_strategy_of_ones_own() -> None:
    pipe = exact("sd3_text")
    data = samples("sd3_text", pipe)
    alone, together = (search(pipe, data, strategy=Mixed(), batch=batch) for batch in (1, None))
    assert (scores_of(alone) - scores_of(together)).abs().max() <= TOLERANCE
    report = record_of(together).report
    assert report["figures"]["trials"] == 7 and "gain_1" not in record_of(together).tensors
    assert together.heads == {"transformer_blocks.0.attn": [0]} and together.scale == 2.0  # type: ignore[attr-defined]


def test_the_record_says_so_where_nothing_is_better_than_without() -> None:
    pipe = exact("sd3_text")
    data = samples("sd3_text", pipe)
    plain = [pipe(generator=torch.Generator().manual_seed(i), **call)[0] for i, call in enumerate(data)]
    fitted = search(pipe, data, Nearest(plain), top=1)
    figures = record_of(fitted).report["figures"]
    assert figures["best gain"] < 0 and figures["best gain, low"] <= figures["best gain"] <= figures["best gain, high"]
    assert fitted.heads


def test_methods_that_cannot_share_a_batch_are_tried_one_by_one(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    method = Scale(layers=None, factor=0.5)
    fitted = search(pipe, data, tilt, method, top=1)
    assert len(record_of(fitted).report["trials"]) == len(heads_of(pipe, Scale))


def test_what_a_search_finds_is_saved_with_its_record(tmp_path: Path) -> None:
    pipe = PIPELINES["sd3_text"].build()
    data = samples("sd3_text", pipe)
    fitted = search(pipe, data, rounds=2, top=1)
    fitted.save(str(tmp_path))
    assert_same(steer.load(tmp_path), fitted)
    wan = PIPELINES["wan21"].build()
    own = samples("wan21", wan, count=1)
    own = [{key: v.float() if torch.is_tensor(v) else v for key, v in call.items()} for call in own]
    planned: Any = steer.calibrate(wan, SparseVDiT(block_size=8), own, progress=False, epsilon=0.2, groups=2)
    swept: Any = search(wan, own, tilt, planned, strategy="sweep", space={"steps": ["0.5:", ":"]})
    assert swept.plan is planned.plan and len(record_of(swept).report["trials"]) == 2
    swept.save(str(tmp_path / "swept"))
    loaded: Any = steer.load(tmp_path / "swept")
    assert record_of(loaded).report == record_of(swept).report and loaded.steps == swept.steps
    assert torch.equal(loaded.plan.tensors["mode"], planned.plan.tensors["mode"])


def test_another_function_of_the_same_name_is_another_search(tmp_path: Path) -> None:
    def score_of(sign: int) -> Any:
        if sign > 0:
            return lambda pictures, prompts: pictures.mean((1, 2, 3))
        return lambda pictures, prompts: -pictures.mean((1, 2, 3))

    pipe = exact("sd3")
    options: dict[str, Any] = {"trials": 1, "checkpoint": tmp_path, "progress": False}
    data = samples("sd3", pipe, 1)
    steer.calibrate(pipe, steer.PAG(mode="all"), data, objective=score_of(1), **options)
    steer.calibrate(pipe, steer.PAG(mode="all"), data, objective=score_of(1), **options)  # made anew, and the same
    with pytest.raises(ValueError, match="is of another search, which differs in code"):
        steer.calibrate(pipe, steer.PAG(mode="all"), data, objective=score_of(-1), **options)


def test_no_folder_of_this_machine_is_recorded(tmp_path: Path) -> None:
    pipe, objective = exact("sd3"), FromFolder(str(tmp_path))
    data = samples("sd3", pipe, 1)
    fitted = steer.calibrate(pipe, PAG(mode="all"), data, objective=objective, trials=1, progress=False)
    assert fitted.record is not None
    assert str(tmp_path) not in json.dumps(dict(fitted.record.report)) and tmp_path.name in str(fitted.record.report)


@dataclass(frozen=True)
class FromFolder:
    folder: str

    def __call__(self, pictures: torch.Tensor, prompts: Sequence[Any]) -> torch.Tensor:
        return pictures.mean((1, 2, 3))


def test_the_objective_sees_pictures_in_full_precision() -> None:
    seen: list[torch.dtype] = []

    def note(pictures: Tensor, prompts: Sequence[Any]) -> Tensor:
        seen.append(pictures.dtype)
        return pictures.mean((1, 2, 3))

    for dtype in (torch.float64, torch.bfloat16):
        pipe = PIPELINES["sd3_text"].build().to(dtype)
        data = [{"prompt": PROMPTS[0], "num_inference_steps": 1, "guidance_scale": 1.0, "height": 32, "width": 32}]
        steer.calibrate(pipe, PAG(mode="all"), data, objective=note, trials=1, progress=False)
    assert seen[0] == torch.float64 and seen[-1] == torch.float32


def test_a_kill_while_the_checkpoint_is_written_leaves_the_one_before(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pipe = exact("sd3")
    data, file = samples("sd3", pipe, 1), tmp_path / "calibration.safetensors"
    whole, written = checkpoint.save_file, 0

    def torn(tensors: Any, name: Any, **options: Any) -> None:
        nonlocal written
        written += 1
        if written == 2:
            Path(name).write_bytes(b"half a file")
            raise Tripped
        whole(tensors, name, **options)

    options: dict[str, Any] = {"objective": lambda pictures, _: pictures.mean((1, 2, 3)), "progress": False}
    monkeypatch.setattr(checkpoint, "save_file", torn)
    with pytest.raises(Tripped):
        steer.calibrate(pipe, PAG(mode="all"), data, checkpoint=tmp_path, **options)
    before = file.read_bytes()
    assert before != b"half a file"
    resumed = steer.calibrate(pipe, PAG(mode="all"), data, checkpoint=tmp_path, **options)
    assert resumed == steer.calibrate(pipe, PAG(mode="all"), data, **options)


def test_a_batch_that_is_asked_for_and_cannot_be_is_refused() -> None:
    def score(pictures: Any, prompts: Sequence[Any]) -> list[float]:
        raise AssertionError("nothing may be drawn")

    mochi, model = PIPELINES["mochi"].build(), FAMILIES["sd3"].build()
    for target, data in ((mochi, samples("mochi", mochi, 1)), (model, [inputs_of(FAMILIES["sd3"], model)])):
        before = snapshot(target)
        with pytest.raises(ValueError, match=r"batch=2: PAG on a .* is tried one at a time; leave batch out"):
            steer.calibrate(target, PAG(mode="all"), data, objective=score, batch=2, progress=False)
        assert_untouched(before, target)
