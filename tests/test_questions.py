"""Where a chat template puts the question, and which tokens are content words: with real templates and by hand."""

from __future__ import annotations

import functools
import random
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers import Tokenizer, decoders, pre_tokenizers
from tokenizers import models as tokenizer_models
from transformers import (
    CLIPImageProcessorPil,
    Idefics3ImageProcessorPil,
    Idefics3Processor,
    LlavaProcessor,
    PreTrainedTokenizerFast,
)

from steer.methods.gift import GIFT
from steer.questions import FUNCTION_WORDS, QuestionTemplate, content_tokens, question_of, question_template, words_of
from steer_demos import models
from steer_patches.generation import Text
from steer_patches.pictures import Pictures

QUESTIONS = ("Is there a red boat?", "how many dogs sleep near the old tree", "Name 3 colours.", "Why")
PARTS = "{% for part in message['content'] %}{{ IMAGE if part['type'] == 'image' else part['text'] }}{% endfor %}"
LLAVA = (
    "{% for message in messages %}{{ message['role'] | upper + ': ' }}"
    "{% for part in message['content'] if part['type'] == 'image' %}{{ '<image>\n' }}{% endfor %}"
    "{% for part in message['content'] if part['type'] == 'text' %}{{ part['text'] + ' ' }}{% endfor %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
QWEN = (
    "{% for message in messages %}{% if loop.first and message['role'] != 'system' %}"
    "{{ '<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n' }}{% endif %}"
    "{{ '<|im_start|>' + message['role'] + '\n' }}"
    + PARTS.replace("IMAGE", "'<|vision_start|><|image_pad|><|vision_end|>'")
    + "{{ '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
IDEFICS = (
    "<|im_start|>{% for message in messages %}{{ message['role'] | capitalize + ': ' }}"
    + PARTS.replace("IMAGE", "'<image>'")
    + "<end_of_utterance>\n{% endfor %}{% if add_generation_prompt %}{{ 'Assistant:' }}{% endif %}"
)
SPECIAL = (
    "<image>", "<|im_start|>", "<|im_end|>", "<|vision_start|>", "<|vision_end|>", "<|image_pad|>", "<|video_pad|>",
    "<fake_token_around_image>", "<global-img>", "<end_of_utterance>",
)  # fmt: skip
MARKED_TILES = tuple(f"<row_{r}_col_{c}>" for r in range(1, 7) for c in range(1, 7))


def tokenizer() -> PreTrainedTokenizerFast:
    """Bytes, with a few merges, as byte-level BPE does: "Ġred" is one token, and so is "is" inside of "this"."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("i", "s"), ("Ġ", "is"), ("Ġ", "a"), ("Ġ", "t"), ("h", "e"), ("Ġt", "he"), ("r", "e"), ("re", "d"),
              ("Ġ", "red"), ("Ġ", "b"), ("?", "Ċ"), ("Ċ", "W")]  # fmt: skip
    tokens = [*letters, *(a + b for a, b in merges)]
    built = Tokenizer(tokenizer_models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    built.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    built.decoder = decoders.ByteLevel()
    made = PreTrainedTokenizerFast(tokenizer_object=built, clean_up_tokenization_spaces=False)
    made.add_special_tokens({"additional_special_tokens": [*SPECIAL, *MARKED_TILES]})
    return made


@functools.cache
def processor(name: str) -> Any:
    """A real processor with the template of such checkpoints."""
    if name == "emoji-vlm":
        return models.load(name)[1]
    size = {"height": 16, "width": 16}
    if name == "llava":
        pictures = CLIPImageProcessorPil(size=size, crop_size=size)
        return LlavaProcessor(
            pictures, tokenizer(), patch_size=4, vision_feature_select_strategy="full", chat_template=LLAVA
        )
    if name == "qwen2_vl":  # its own processor needs torchvision for videos
        pictures, marked = CLIPImageProcessorPil(size=size, crop_size=size), "<|image_pad|>"
        return LlavaProcessor(
            pictures, tokenizer(), patch_size=4, vision_feature_select_strategy="full", chat_template=QWEN,
            image_token=marked,
        )  # fmt: skip
    pictures = Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return Idefics3Processor(pictures, tokenizer(), image_seq_len=4, chat_template=IDEFICS)


@functools.cache
def template(name: str) -> QuestionTemplate:
    return question_template(processor(name))


@functools.cache
def of_language() -> tuple[Any, torch.Tensor]:
    """SmolLM2's tokenizer, and which of its tokens are words."""
    made = models.load("smollm2-135m-instruct")[1]
    return made, words_of(made)


def prompt(processor: Any, question: str, system: str | None = None) -> torch.Tensor:
    """(1, S) ids of the prompt with a picture."""
    chat = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": question}]}]
    if system is not None:
        chat.insert(0, {"role": "system", "content": [{"type": "text", "text": system}]})
    text = processor.apply_chat_template(chat, add_generation_prompt=True, tokenize=False)
    picture = Image.new("RGB", (48, 32), "red")
    return processor(text=[text], images=[picture], return_tensors="pt")["input_ids"]


def text_of(ids: torch.Tensor, picture: int) -> Text:
    """A prompt whose tokens `picture` are pictures."""
    rows, tokens = ids.shape
    number = torch.where(ids == picture, 0, -1)
    nothing = torch.zeros(rows, tokens, 4)
    pictures = Pictures(number, number >= 0, nothing, number, nothing)
    return Text(0, tokens, torch.arange(tokens)[None], None, None, pictures)


@pytest.mark.parametrize("name", ["emoji-vlm", "llava", "qwen2_vl", "idefics3"])
@pytest.mark.parametrize("system", [None, "Answer in one word."])
@pytest.mark.parametrize("question", QUESTIONS)
def test_the_question_is_what_was_asked(name: str, system: str | None, question: str) -> None:
    """The tokens between the offsets spell it, after whatever system prompt."""
    made = processor(name)
    found = template(name)
    ids = prompt(made, question, system)
    asked = question_of(text_of(ids, made.image_token_id), found.before, found.after)
    spelled = made.tokenizer.decode(ids[asked])
    assert spelled.strip() == question
    everything = question_of(text_of(ids, made.image_token_id), 0, 0)
    assert everything[0].nonzero().min() == (ids[0] == made.image_token_id).nonzero().max() + 1
    assert everything[0, -1]


def test_offsets_are_those_of_the_templates() -> None:
    found = {name: template(name) for name in ("emoji-vlm", "llava", "qwen2_vl", "idefics3")}
    offsets = {name: (one.before, one.after) for name, one in found.items()}
    assert offsets["emoji-vlm"][0] == 0 and offsets["llava"][0] == 1  # a line break
    assert offsets["qwen2_vl"][0] == offsets["idefics3"][0] == 1  # the mark that closes the picture
    method = GIFT.for_processor(processor("llava"), alpha=4.0)
    assert (method.before, method.after, method.alpha) == (*offsets["llava"], 4.0)
    assert torch.equal(method.words, found["llava"].words)
    assert GIFT.for_processor(processor("llava"), before=7).before == 7


def test_a_tokenizer_alone_tells_what_follows_the_question() -> None:
    made, words = of_language()
    found = question_template(made)
    text = made.apply_chat_template(
        [{"role": "user", "content": "What is it?"}], add_generation_prompt=True, tokenize=False
    )
    ids = made(text)["input_ids"]
    assert found.before == 0 and torch.equal(found.words, words)
    assert made.decode(ids[-found.after :]) == "<|im_end|>\n<|im_start|>assistant\n"
    assert made.decode(ids[: -found.after]).endswith("What is it?")


def test_what_has_no_question_is_refused() -> None:
    with pytest.raises(ValueError, match="no chat template"):
        question_template(tokenizer())
    silent = tokenizer()
    silent.chat_template = "{{ 'Hello.' }}"
    with pytest.raises(ValueError, match="leaves the user's question out"):
        question_template(silent)
    blind = LlavaProcessor(
        processor("llava").image_processor, tokenizer(), patch_size=4, vision_feature_select_strategy="full",
        chat_template=LLAVA.replace("<image>\n", ""),
    )  # fmt: skip
    with pytest.raises(ValueError):  # the processor itself may say so first
        question_template(blind)


@pytest.mark.parametrize(
    "text, content",
    [
        ("Is there a dog in the picture?", "dog picture"),
        ("How many red t-shirts hang left of the tree, and why?", "many red t shirts hang left tree"),
        ("What colour is the motorcycle", "colour motorcycle"),
        ("Are these the 12 thistles or isotopes?", "12 thistles isotopes"),
        ("What\nIs\nthis", ""),
    ],
)
def test_content_words_of_a_real_tokenizer(text: str, content: str) -> None:
    made, words = of_language()
    ids = torch.tensor([made(text)["input_ids"]])
    found = content_tokens(ids, torch.ones_like(ids, dtype=torch.bool), words)[0]
    spelled = "".join(made.decode([token]) if counts else " " for token, counts in zip(ids[0], found, strict=True))
    assert spelled.split() == content.split()


def test_characters_of_several_tokens_are_part_of_a_word() -> None:
    made, words = of_language()
    ids = torch.tensor([made("a \u6f22\u5b57?")["input_ids"]])
    found = content_tokens(ids, torch.ones_like(ids, dtype=torch.bool), words)[0].tolist()
    assert len(found) > 4 and found == [False, *[True] * (len(found) - 2), False]


def test_function_words_are_listed_once() -> None:
    listed = FUNCTION_WORDS.split()
    assert len(set(listed)) == len(listed) and all(word == word.lower() for word in listed)


@pytest.mark.parametrize("seed", range(5))
def test_content_words_equal_a_walk_over_the_tokens(seed: int) -> None:
    """One token after the other, in Python, with ids that the table does not know."""
    random.seed(seed)
    words = torch.tensor([[random.random() < 0.5 for _ in range(20)] for _ in range(3)])
    ids = torch.tensor([[random.randrange(24) for _ in range(30)] for _ in range(4)])
    question = torch.tensor([[6 <= i < 28 for i in range(30)]] * 4)
    found = content_tokens(ids, question, words)
    for row in range(4):
        runs: list[list[int]] = []
        open_word = False
        for i in range(6, 28):
            token = int(ids[row, i])
            if token >= 20 or words[1, token]:
                open_word = False
                continue
            if words[0, token] or not open_word:
                runs.append([])
            runs[-1].append(i)
            open_word = True
        wanted = {i for run in runs for i in run if len(run) > 1 or not words[2, ids[row, run[0]]]}
        assert set(found[row].nonzero().flatten().tolist()) == wanted
