"""Fits the saved methods that come with the package, on the CPU and one thread: `python -m steer_demos.fitted`."""

from __future__ import annotations

import argparse
import random
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image

import steer
from steer.method import Method
from steer_demos import models
from steer_demos.emoji import BACKGROUNDS, caption, concepts
from steer_demos.evaluate_sparse import SEARCHES, methods_at_40_percent, planned
from steer_demos.language_suites import SEARCH_SEED, Bench, needles, with_labels
from steer_demos.language_tasks import passkey, questions, word_needle
from steer_demos.models import emoji_vlm
from steer_demos.vlm_measures import DEVELOPMENT_SEED, evaluation_questions, evaluation_scenes

FOLDER = Path(__file__).parent
SMALL_BLOCKS = 16  # tokens; the embedded models have hundreds of tokens, those of the papers tens of thousands


def fit(model: str, method: str, folder: Path) -> Method:
    """Fit one of FITS and save it in `folder` / model / method."""
    loaded = models.load(model, device="cpu", dtype=torch.float32)
    fitted = FITS[model, method](loaded)
    fitted.save(str(folder / model / method))
    return fitted


def retrieval_heads(loaded: Any) -> Method:
    model, tokenizer = loaded
    return steer.calibrate(model, steer.RetrievalHeads(k=5), needles(Bench(model, tokenizer), LENGTHS, SEARCH_SEED))


def duo_attention(loaded: Any) -> Method:
    model, tokenizer = loaded
    method = steer.DuoAttention(share=0.5, sink=4, recent=128)
    return steer.calibrate(model, method, needles(Bench(model, tokenizer), LENGTHS, SEARCH_SEED))


def act(loaded: Any) -> Method:
    model, tokenizer = loaded
    return steer.calibrate(model, steer.ACT(), questions(tokenizer, "sentiment", 64, SEARCH_SEED))


def moa(loaded: Any) -> Method:
    """Pass keys and sentences to copy; the answers are in the prompt, so the windows that cut them off show."""
    model, tokenizer = loaded
    samples = [
        with_labels(make(tokenizer, tokens, (index + 0.5) / 3, SEARCH_SEED + index))
        for tokens in (256, 512)
        for make in (passkey, word_needle)
        for index in range(3)
    ]
    method = steer.MoA(n_sink=SMALL_BLOCKS, block_size=SMALL_BLOCKS)
    return steer.calibrate(model, method, samples, density=0.5)


def sparse_clips(name: str) -> Callable[[Any], Method]:
    """The plans of `steer eval sparse`, found on its prompts."""

    def of(pipe: Any) -> Method:
        pipe.set_progress_bar_config(disable=True)
        assert name in SEARCHES
        return planned(pipe, name, methods_at_40_percent()[name], steps=20, guidance_scale=3.0, max_sequence_length=16)

    return of


def paro_pictures(pipe: Any) -> Method:
    method = steer.PAROAttention(density=0.5, block_size=SMALL_BLOCKS, steps="0.25:")
    return steer.calibrate(pipe, method, picture_samples(8, steps=20, guidance_scale=3.0), seed=SEARCH_SEED)


def pag(pipe: Any) -> Method:
    """Heads that make pictures colourful when they are perturbed: what is found shows at first sight."""
    return steer.calibrate(
        pipe,
        steer.PAG(scale=3.0, mode="all", strength=0.5),
        picture_samples(8, steps=12, guidance_scale=1.0),
        objective=steer.objectives.colourfulness,
        rounds=3,
        top=1,
        seed=SEARCH_SEED,
    )


def picture_samples(count: int, *, steps: int, guidance_scale: float) -> list[dict[str, Any]]:
    """Prompts for emoji, every second one with a background."""
    chance = random.Random(SEARCH_SEED)
    names = chance.sample(list(concepts()), count)
    backgrounds = [chance.choice(list(BACKGROUNDS)) if index % 2 else None for index in range(count)]
    call = {"num_inference_steps": steps, "guidance_scale": guidance_scale, **models.call_options("emoji-mmdit")}
    texts = (caption(name, None, colour, article=True) for name, colour in zip(names, backgrounds, strict=True))
    return [{"prompt": text, **call} for text in texts]


def var(loaded: Any) -> Method:
    """Dimensions that are massive at sinks alone. emoji-vlm has none, and what is found edits nothing."""
    model, processor = loaded
    prompts = []
    for index, scene in enumerate(evaluation_scenes(8, DEVELOPMENT_SEED)):
        question = evaluation_questions(scene, index, first_seed=DEVELOPMENT_SEED)[0]
        text = emoji_vlm.prompt(processor, question.text)
        prompts.append(dict(processor(images=Image.fromarray(scene.pixels), text=text, return_tensors="pt")))
    return steer.calibrate(model, steer.VAR(), prompts)


LENGTHS = (256, 400, 512)  # tokens, two prompts of each
FITS: dict[tuple[str, str], Callable[[Any], Method]] = {
    ("smollm2-135m-instruct", "RetrievalHeads"): retrieval_heads,
    ("smollm2-135m-instruct", "DuoAttention"): duo_attention,
    ("smollm2-135m-instruct", "ACT"): act,
    ("smollm2-135m-instruct", "MoA"): moa,
    ("emoji-wan", "SparseVDiT"): sparse_clips("SparseVDiT"),
    ("emoji-wan", "PAROAttention"): sparse_clips("PAROAttention"),
    ("emoji-mmdit", "PAROAttention"): paro_pictures,
    ("emoji-mmdit", "PAG"): pag,
    ("emoji-vlm", "VAR"): var,
}


def main(arguments: Sequence[str] | None = None) -> None:
    """Fit what the command line names."""
    parser = argparse.ArgumentParser(prog="python -m steer_demos.fitted", description=__doc__)
    parser.add_argument("names", nargs="*", help="MODEL/METHOD; default: all")
    parser.add_argument("--folder", type=Path, default=FOLDER, help="default: where the package has them")
    given = parser.parse_args(arguments)
    known = {f"{model}/{method}": (model, method) for model, method in FITS}
    for name in given.names or known:
        if name not in known:
            parser.error(f"there is no {name}; there are {', '.join(known)}")
    torch.set_num_threads(1)
    for name in given.names or known:
        started = time.monotonic()
        fitted = fit(*known[name], given.folder)
        print(f"{name}: {time.monotonic() - started:.0f} s, {fitted.describe()}")


if __name__ == "__main__":
    main()
