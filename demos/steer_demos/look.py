"""Draws where a model looks while it answers: `steer look emoji-vlm scene:7 "Where is the cat face?"`."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from PIL import Image, ImageOps
from rich.console import Console
from transformers import PreTrainedModel, PreTrainedTokenizerBase, StoppingCriteria, StoppingCriteriaList

import steer
from steer.method import Method
from steer.opening import steering
from steer.select import select
from steer_demos import models
from steer_demos.look_plots import draw_pictures, draw_text
from steer_demos.scenes import draw_scene
from steer_patches.pictures import Pictures

SCENE = "scene:"
LEAST = 1e-4  # added to both sides of a ratio, so that two tokens that nothing looks at give 1


@dataclass(frozen=True, eq=False)
class Look:
    """Where the tokens of one answer look.

    Args:
        answer: the text.
        words: its tokens as text, T of them.
        weights: (T, columns) the attention of the query that makes each of them, mean over layers and heads.
        read: the tokens that the columns are, as text.
        columns: their places in the sequence.
        pictures: what each token of the sequence shows; None where everything is read, and no picture.
    """

    answer: str
    words: list[str]
    weights: torch.Tensor
    read: list[str]
    columns: tuple[int, ...]
    pictures: Pictures | None = None

    def boxes(self, number: int) -> tuple[torch.Tensor, torch.Tensor]:
        """Of one picture: which columns show it, (n,), and what part each of them shows, (n, 4)."""
        assert self.pictures is not None
        places = torch.tensor(self.columns)
        of_it = (self.pictures.number[0].cpu()[places] == number).nonzero().flatten()
        return of_it, self.pictures.box[0].cpu()[places[of_it]]

    def heat(self, number: int, size: tuple[int, int], word: int | None = None, relative: bool = False) -> torch.Tensor:
        """Attention for each area of a picture, (height, width); the mean over it is the attention on the picture.

        A token's weight is spread evenly over the part that it shows. Where parts overlap, as those of a whole picture
        and its tiles do, they add up.

        Args:
            number: of the picture, from 0.
            size: (height, width) in pixels.
            word: token of the answer; None = the mean over all.
            relative: the weights are ratios, of which overlapping parts give the mean.
        """
        columns, boxes = self.boxes(number)
        weights = (self.weights.mean(0) if word is None else self.weights[word])[columns]
        found, parts = torch.zeros(size, dtype=torch.float64), torch.zeros(size, dtype=torch.float64)
        scale = torch.tensor([size[1], size[0]] * 2)
        for weight, part in zip(weights.tolist(), boxes, strict=True):
            left, top, right, bottom = (part * scale).round().int().tolist()
            rows, across = slice(top, bottom), slice(left, right)
            area = float((part[2] - part[0]) * (part[3] - part[1]))
            found[rows, across] += weight if relative else weight / area
            parts[rows, across] += 1
        return found / parts.clamp(min=1) if relative else found

    def on(self, number: int) -> float:
        """Share of the answer's attention that is on a picture."""
        return float(self.weights.mean(0)[self.boxes(number)[0]].sum())

    def relative_to(self, other: Look) -> Look:
        """The same, each token of the prompt as a multiple of what it gets in another look at the same pictures."""
        if len(self.columns) != len(other.columns):
            raise ValueError("the two looks have different pictures")
        return replace(self, weights=(self.weights + LEAST) / (other.weights.mean(0) + LEAST))


def look_at(
    model: PreTrainedModel,
    processor: Any,
    question: str,
    pictures: Sequence[Image.Image] = (),
    *,
    layers: str | None = None,
    head: int | None = None,
    method: Method | None = None,
    raw: bool = False,
    max_new_tokens: int = 16,
    on_token: Callable[[int], None] | None = None,
) -> Look:
    """Let a model answer greedily, and read where the tokens of its answer look.

    Args:
        model, processor: as `steer_demos.models.load` gives them.
        question: the user's message, after the pictures.
        pictures: of a vision-language model; their tokens are then read. Of a language model all tokens are.
        layers: "12", "8:14" = numbers of the decoder's layers, negative ones from the last; or a glob over its sites.
        head: query head; None = the mean over all.
        method: applied for the time of the answer; what is read is the attention that it makes.
        raw: `question` is the whole prompt; there is no chat template around it.
        max_new_tokens: of the answer.
        on_token: called after each token with how many there are; what it raises ends the answer.

    Raises:
        ValueError: no question, no pictures where some are needed or the other way round, layers or a head that do
            not exist.
    """
    sees = not isinstance(processor, PreTrainedTokenizerBase)
    if not question.strip():
        raise ValueError("the question is empty: say what the model shall answer")
    if sees and not pictures:
        raise ValueError(f"{type(model).__name__} sees pictures: give one or more before the question")
    if pictures and not sees:
        raise ValueError(f"{type(model).__name__} reads text and takes no pictures: leave them out")
    sites = _layers(model, layers)
    if head is not None and not 0 <= head < sites[0].heads:
        raise ValueError(f"head={head} does not exist; {sites[0].name} has heads 0 to {sites[0].heads - 1}")
    inputs = _inputs(processor, question, pictures, raw)
    inputs = inputs.to(model.device, model.dtype) if sees else inputs.to(model.device)
    told = StoppingCriteriaList([] if on_token is None else [_Told(on_token, inputs["input_ids"].shape[1])])
    reading = steer.capture(
        model,
        [site.name for site in sites],
        columns="image" if sees else "all",
        queries="last",
        keep_heads=head is not None,
        effective=method is not None,
    )
    with steer.apply(model, method) if method is not None else nullcontext(), reading as captured:
        output = model.generate(
            **inputs, max_new_tokens=max_new_tokens, do_sample=False, num_beams=1, stopping_criteria=told
        )
    sequence = output[0].tolist()
    new = sequence[inputs["input_ids"].shape[1] :]
    maps = torch.stack([found[0] if head is None else found[0, head] for found in captured.maps.values()])
    tokenizer = processor.tokenizer if sees else processor
    ends = model.generation_config.eos_token_id
    ended = len(new) > 1 and new[-1] in (ends if isinstance(ends, list) else [ends])
    new = new[:-1] if ended else new
    columns = [place for place in captured.tokens if place < len(sequence) - 1 - ended]  # what an answer's token reads
    return Look(
        tokenizer.decode(new, skip_special_tokens=True).strip(),
        [tokenizer.decode([token]) for token in new],
        maps.double().mean(0)[: len(new), : len(columns)].cpu(),
        [tokenizer.decode([sequence[place]]) for place in columns],
        tuple(columns),
        captured.pictures,
    )


class _Told(StoppingCriteria):
    """Ends nothing: tells how many tokens there are behind the prompt."""

    def __init__(self, on_token: Callable[[int], None], prompt: int) -> None:
        self.on_token, self.prompt = on_token, prompt

    def __call__(self, input_ids: torch.Tensor, scores: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self.on_token(input_ids.shape[1] - self.prompt)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def _layers(model: PreTrainedModel, layers: str | None) -> list[Any]:
    """The chosen attention sites of the decoder."""
    found = [site for site in steer.sites(model) if site.kind == "causal"]
    if layers is None:
        return found
    numbers = re.fullmatch(r"(-?\d+)|(-?\d+)?:(-?\d+)?", layers)
    if numbers is None:
        chosen = select(layers, [site.name for site in found])
        return [site for site in found if site.name in chosen]
    one, first, last = (None if text is None else int(text) for text in numbers.groups())
    part = slice(first, last) if one is None else slice(one, one + 1 or None)
    if not found[part]:
        raise ValueError(f"layers={layers!r} are none; the decoder of this model has layers 0 to {len(found) - 1}")
    return found[part]


def _inputs(processor: Any, question: str, pictures: Sequence[Image.Image], raw: bool) -> Any:
    """What the model is called with: one conversation, up to where the answer begins."""
    if raw or not processor.chat_template:  # some processors put the pictures' tokens there themselves
        images = {"images": list(pictures)} if pictures else {}
        return processor(text=[question], **images, return_tensors="pt")
    content: Any = question
    if pictures:
        content = [{"type": "image", "image": picture} for picture in pictures] + [{"type": "text", "text": question}]
    return processor.apply_chat_template(
        [{"role": "user", "content": content}],
        add_generation_prompt=True,
        tokenize=True,
        return_dict=True,
        return_tensors="pt",
    )


def open_picture(given: str) -> Image.Image:
    """A picture from a file, or of a drawn scene: `scene:7`.

    Raises:
        ValueError: there is no such file, or it is no picture; the seed of a scene is no number.
    """
    if given.startswith(SCENE):
        seed = given.removeprefix(SCENE)
        if not seed.isdecimal():
            raise ValueError(f"{given} is no scene: write scene: and a number, e.g. scene:7")
        return Image.fromarray(draw_scene(int(seed)).pixels)
    if not Path(given).is_file():
        raise ValueError(f"there is no picture {given}: give a file, or scene:7 for a drawn scene")
    try:
        with Image.open(given) as picture:
            return ImageOps.exif_transpose(picture).convert("RGB")  # as processors do, which would be told no more
    except (OSError, SyntaxError, Image.DecompressionBombError) as error:  # all of what Pillow raises for broken files
        raise ValueError(f"{given} is no picture that can be opened ({error}); PNG, JPEG and WebP can") from None


def as_seen(processor: Any, picture: Image.Image) -> Image.Image:
    """The part of a picture that the model is given: some processors cut out its middle, or pad it to a square."""
    prepare = processor.image_processor
    if not (getattr(prepare, "do_center_crop", False) or getattr(prepare, "do_pad", False)):
        return picture
    pixels = prepare(images=[picture], do_normalize=False, do_rescale=False, return_tensors="pt")["pixel_values"]
    if pixels.ndim != 4:  # tiles, which cover all of it
        return picture
    return Image.fromarray(pixels[0].movedim(0, -1).round().clamp(0, 255).to(torch.uint8).numpy())


def look(
    model: Annotated[str, typer.Argument(help="Embedded model, folder or hub id, e.g. emoji-vlm.")],
    asked: Annotated[
        list[str] | None,
        typer.Argument(metavar="[IMAGE]... QUESTION", help="Files of pictures, or scene:SEED; at last the question."),
    ] = None,
    text: Annotated[
        str | None, typer.Option(help="Instead of a question: the whole prompt, without a chat template around it.")
    ] = None,
    layers: Annotated[
        str | None, typer.Option(help="Layers of the decoder: 12, 8:14, or a glob over its sites; default: all.")
    ] = None,
    head: Annotated[int | None, typer.Option(help="Query head; default: the mean over all.")] = None,
    relative: Annotated[
        str | None,
        typer.Option(help='Divide by where it looks when asked this instead, e.g. "Describe the image."'),
    ] = None,
    tokens: Annotated[bool, typer.Option("--tokens", help="Also draw each of the answer's first 8 tokens.")] = False,
    max_new_tokens: Annotated[int, typer.Option(help="Of the answer.", min=1)] = 16,
    method: Annotated[str | None, typer.Option(help="Draw the model with this method below.")] = None,
    settings: Annotated[list[str] | None, typer.Option("--set", help="key=value: a field of the method.")] = None,
    artifact: Annotated[Path | None, typer.Option(help="Or with the method in this folder.")] = None,
    output: Annotated[Path, typer.Option(help="PNG file to write.")] = Path("look.png"),
) -> None:
    """Draw where a vision-language model looks in a picture, or a language model in a text, while it answers."""
    steering(method, settings, artifact)  # what is wrong with these is said before anything is loaded
    question, names = _question(asked or [], text)
    opened = [open_picture(name) for name in names]
    if output.suffix.lower() != ".png":
        raise ValueError(f"--output {output} is no name of a PNG file: give one that ends in .png")
    if relative is not None and not opened:
        raise ValueError("--relative compares two looks at the same pictures: give one")
    if relative is not None and not relative.strip():
        raise ValueError('--relative is empty: give another question, e.g. "Describe the image."')
    loaded = models.load(model)
    if not isinstance(loaded, tuple):
        raise ValueError(f"{model} is a {type(loaded).__name__}, which answers nothing: give a language model")
    answers, processor = loaded
    asks = bool(opened) and text is None and processor.chat_template
    steered = steering(method, settings, artifact, processor if asks else None)
    if steered is not None:
        steer.apply(answers, steered).remove()  # what the model refuses, it refuses before it answers
    options: dict[str, Any] = {"layers": layers, "head": head, "max_new_tokens": max_new_tokens}
    raw, looks = text is not None, {}
    for title, chosen in {"unsteered": None, **({type(steered).__name__: steered} if steered else {})}.items():
        looks[title] = look_at(answers, processor, question, opened, method=chosen, raw=raw, **options)
        shares = [100 * looks[title].on(number) for number in range(len(opened))]
        where = [f"{share:.1f} % of the attention on {name}" for share, name in zip(shares, names, strict=True)]
        Console().print(
            ", ".join([f"{title}: {looks[title].answer}", *where]), highlight=False, markup=False, soft_wrap=True
        )
        if relative is not None:
            other = look_at(answers, processor, relative, opened, method=chosen, **options)
            looks[title] = looks[title].relative_to(other)
    if opened:
        drawn = draw_pictures(looks, [as_seen(processor, picture) for picture in opened], question, relative, tokens)
    else:
        drawn = draw_text(looks, tokens)
    output.parent.mkdir(parents=True, exist_ok=True)
    drawn.save(output, optimize=True)
    print(f"wrote {output}")


def _question(asked: Sequence[str], text: str | None) -> tuple[str, list[str]]:
    """The question, and the names of the pictures."""
    if text is not None:
        return text, list(asked)
    if not asked or asked[-1].startswith(SCENE) or Path(asked[-1]).is_file():
        raise ValueError('give the question at last: steer look MODEL IMAGE "Where is the cat?"')
    return asked[-1], list(asked[:-1])
