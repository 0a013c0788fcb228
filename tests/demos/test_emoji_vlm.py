"""The vision-language model: its parts over a tiny language model, and the shipped one where SmolLM2 is installed."""

import numpy as np
import pytest
import torch
from PIL import Image
from tiny_emoji_vlm import picture, shapes, tiny_language_model, tiny_model, tiny_processor
from transformers import (
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

import steer
from steer_demos.evaluate_vlm import contact_sheet
from steer_demos.models import EMBEDDED, emoji_vlm, load, smollm2
from steer_demos.models.emoji_vlm import (
    IGNORED,
    PATCHES,
    LowRank,
    PackedAnswers,
    PackedQuestions,
    add_low_rank,
    assemble,
    build_projector,
    build_tower,
    merge_low_rank,
    packed_mask,
    patch_centres,
    patch_names,
    prompt,
    to_pixels,
    word_targets,
)
from steer_demos.scenes import NAMES, Question
from steer_demos.vlm_measures import Asked, captions, mentioned, presence

QUESTIONS = [
    Question("presence", "Is there a red circle in the image?", "Yes"),
    Question("caption", "Describe the image.", "A red circle and a blue star."),
    Question("count", "How many red circles are in the image?", "1"),
]


@pytest.fixture(scope="module")
def processor() -> LlavaProcessor:
    return tiny_processor()


@pytest.fixture(scope="module")
def model() -> LlavaForConditionalGeneration:
    return tiny_model()


def test_the_processor_puts_one_token_for_each_patch(processor) -> None:
    text = prompt(processor, "Is there a cat face in the image?")
    assert text == ("<|im_start|>user\n<image>Is there a cat face in the image?<|im_end|>\n<|im_start|>assistant\n")
    inputs = processor(images=Image.fromarray(picture()), text=text, return_tensors="pt")
    assert (inputs["input_ids"] == processor.image_token_id).sum() == PATCHES == 36
    torch.testing.assert_close(inputs["pixel_values"], to_pixels([picture()]))


def test_pictures_of_any_size_are_taken(processor) -> None:
    image = Image.fromarray(picture()).resize((200, 130))
    assert processor(images=image, text="<image>", return_tensors="pt")["pixel_values"].shape == (1, 3, 96, 96)


def test_assembly_keeps_the_language_model_and_adds_one_row(processor) -> None:
    before = tiny_language_model()
    model = tiny_model()
    assert type(model) is LlavaForConditionalGeneration
    assert not any(parameter.is_meta for parameter in model.parameters())
    assert model.config.image_token_id == processor.image_token_id == 259
    assert model.lm_head.weight is model.get_input_embeddings().weight
    # One object each, as in a model that was built in one go: what is set on the one holds for the other.
    assert model.config.text_config is model.model.language_model.config
    assert model.config.vision_config is model.model.vision_tower.config
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits[..., :259], before(ids).logits)


def test_the_assembled_model_survives_saving(model, processor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    again = LlavaForConditionalGeneration.from_pretrained(tmp_path).eval()
    inputs = processor(images=Image.fromarray(picture()), text=prompt(processor, "Hi"), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_a_folder_of_a_vision_language_model_gives_model_and_processor(model, processor, tmp_path) -> None:
    model.save_pretrained(tmp_path)
    processor.save_pretrained(tmp_path)
    again, same = load(tmp_path, device="cpu")
    assert type(again) is LlavaForConditionalGeneration and type(same) is LlavaProcessor
    inputs = same(images=Image.fromarray(picture()), text=prompt(same, "Hi"), return_tensors="pt")
    with torch.no_grad():
        torch.testing.assert_close(again(**inputs).logits, model(**inputs).logits)


def test_attention_maps_cover_the_patches(model, processor) -> None:
    inputs = processor(images=Image.fromarray(picture()), text=prompt(processor, "Hi"), return_tensors="pt")
    with torch.no_grad():
        expected = model(**inputs).logits
        model.set_attn_implementation("eager")
        out = model(**inputs, output_attentions=True)
        model.set_attn_implementation("sdpa")
    torch.testing.assert_close(out.logits, expected, atol=1e-4, rtol=1e-4)
    length = inputs["input_ids"].shape[1]
    assert [maps.shape for maps in out.attentions] == [(1, 4, length, length)] * 2


def test_a_batch_padded_on_the_left_generates_what_each_alone_does(model, processor) -> None:
    texts = [prompt(processor, question.text) for question in QUESTIONS]
    images = [Image.fromarray(picture(seed)) for seed in range(3)]
    options = {"max_new_tokens": 5, "do_sample": False}
    together = processor(images=images, text=texts, padding=True, return_tensors="pt")
    found = model.generate(**together, **options)[:, together["input_ids"].shape[1] :]
    for index, (image, text) in enumerate(zip(images, texts, strict=True)):
        alone = processor(images=image, text=text, return_tensors="pt")
        expected = model.generate(**alone, **options)[0, alone["input_ids"].shape[1] :]
        assert found[index, : len(expected)].tolist() == expected.tolist()


def test_packed_questions_cost_what_each_conversation_costs_alone(model, processor) -> None:
    packed = PackedQuestions(processor, length=320)
    columns = [column[None] for column in packed.pack(QUESTIONS)]
    pixels = to_pixels([picture()])
    total, weight = 0.0, 0.0
    with torch.no_grad():
        found = PackedAnswers(model).loss(pixels, *columns)
        for question in QUESTIONS:
            asked = prompt(processor, question.text)
            text = asked + question.answer + "<|im_end|>"
            inputs = processor(images=Image.fromarray(picture()), text=text, return_tensors="pt")
            start = processor(images=Image.fromarray(picture()), text=asked, return_tensors="pt")["input_ids"].shape[1]
            logits = model(**inputs).logits[0, start - 1 : -1]
            losses = torch.nn.functional.cross_entropy(logits, inputs["input_ids"][0, start:], reduction="none")
            scale = 1.0 if question.kind == "caption" else 3.0
            total, weight = total + scale * losses.sum().item(), weight + scale * len(losses)
    assert found.item() == pytest.approx(total / weight, rel=1e-4)


def test_packing_leaves_out_what_does_not_fit(processor) -> None:
    packed = PackedQuestions(processor, length=140)
    ids, _, owners, following, weights = packed.pack(QUESTIONS)
    assert len(ids) == 140 and (owners >= 0).sum() <= 140
    assert owners.max() < 3
    assert ((following != IGNORED) == (weights > 0)).all()


def test_questions_see_the_picture_and_themselves() -> None:
    seen = packed_mask(torch.tensor([[0, 0, 1, 1, 2, -1]]))[0, 0].int().tolist()
    assert seen == [
        [1, 0, 0, 0, 0, 0],
        [1, 1, 0, 0, 0, 0],
        [1, 1, 1, 0, 0, 0],
        [1, 1, 1, 1, 0, 0],
        [1, 1, 0, 0, 1, 0],
        [1, 1, 0, 0, 0, 1],
    ]


def test_the_loss_trains_only_what_ships(processor) -> None:
    language_model, tower = tiny_language_model(), build_tower().requires_grad_(False)
    model = assemble(language_model, tower, build_projector(tower, language_model))
    add_low_rank(language_model)
    columns = [column[None] for column in PackedQuestions(processor, length=320).pack(QUESTIONS)]
    PackedAnswers(model).loss(to_pixels([picture()]), *columns).backward()
    trained = {name for name, value in model.named_parameters() if value.grad is not None}
    assert any("multi_modal_projector" in name for name in trained)
    assert all("multi_modal_projector" in name or name.endswith(("up.weight", "down.weight")) for name in trained)


def test_merging_the_low_rank_change_is_the_same_function() -> None:
    changed = tiny_language_model()
    torch.manual_seed(1)
    factors = {}
    for name, module in add_low_rank(changed).items():
        assert isinstance(module, LowRank)
        torch.nn.init.normal_(module.up.weight, std=0.2)
        factors[f"{name}.up"] = module.gain * module.up.weight.detach()
        factors[f"{name}.down"] = module.down.weight.detach()
    merged = tiny_language_model()
    ids = torch.tensor([[5, 6, 7, 8]])
    with torch.no_grad():
        bare = merged(ids).logits
        merge_low_rank(merged, factors)
        torch.testing.assert_close(merged(ids).logits, changed(ids).logits, atol=1e-4, rtol=1e-4)
    assert not torch.allclose(merged(ids).logits, bare, atol=1e-2)


def test_patches_know_what_covers_them_and_where_a_thing_is_counted() -> None:
    scene = shapes("red circle", "blue star")
    names, centres = patch_names(scene), patch_centres(scene)
    assert centres.sum() == len(scene.things)
    for thing in scene.things:
        assert names[thing.patch] == NAMES.index(thing.name) and centres[thing.patch] == 1
    assert (names[18:] == len(NAMES)).all()


def test_image_tokens_should_be_near_the_words_of_their_thing(processor) -> None:
    embedding = torch.randn(259, 64, generator=torch.Generator().manual_seed(0))
    targets = word_targets(embedding, processor.tokenizer)
    assert targets.shape == (len(NAMES) + 1, 2, PATCHES, 64)
    torch.testing.assert_close(targets[-1, 0, 0], embedding.mean(0))
    change = targets - embedding.mean(0)
    top, bottom = change[0, 1, 0], change[0, 1, -1]
    assert torch.cosine_similarity(top, bottom, dim=0) < 0.999
    torch.testing.assert_close(change[0, 0, 0], change[0, 0, -1])


def asked(text: str, answer: str, said: str, split: str | None = None, kind: str = "presence") -> Asked:
    return Asked(0, Question(kind, text, answer, split), said, margin=1.0 if said.startswith("Yes") else -1.0)


def test_presence_is_read_as_pope_reads_it() -> None:
    assert asked("?", "Yes", "Yes, there is.").right
    assert asked("?", "No", "There is no cat. Yes.").right
    assert not asked("?", "No", "Yes").right


def test_presence_figures() -> None:
    answers = [asked("?", "Yes", "Yes")] * 3 + [asked("?", "Yes", "No")] + [asked("?", "No", "Yes", "random")]
    answers += [asked("?", "No", "No", "random")] * 3
    figures = presence(answers)
    assert figures["accuracy"] == figures["precision"] == figures["recall"] == figures["f1"] == 0.75
    assert figures["yes_ratio"] == 0.5 and figures["accuracy_by_log_probability"] == 0.75


def test_made_up_things_and_repeats_beyond_the_scene_count_as_hallucinated() -> None:
    assert mentioned("A red circle, an octopus and a blue star.") == ["red circle", "octopus", "blue star"]
    scene = shapes("red circle", "blue star")
    said = "A red circle, a red circle and a purple banana."
    figures = captions([asked("Describe the image.", "", said, kind="caption")], [scene])
    assert figures["chair_i"] == pytest.approx(2 / 3)
    assert figures["chair_s"] == 1 and figures["recall"] == 0.5


def test_the_contact_sheet_shows_failures_in_red() -> None:
    scene = shapes("red circle", "blue star")
    right = contact_sheet([scene], [asked("Is there?", "Yes", "Yes")]).convert("RGB")
    wrong = contact_sheet([scene], [asked("Is there?", "Yes", "No")]).convert("RGB")

    def red(sheet: Image.Image) -> int:
        text = np.asarray(sheet).astype(int)[:, 208:]
        return int(((text[..., 0] > 180) & (text[..., 1:].max(-1) < 120)).sum())

    assert red(wrong) > 20 > red(right)


def test_a_folder_without_weights_is_refused(tmp_path) -> None:
    with pytest.raises(FileNotFoundError, match="steer train emoji-vlm"):
        emoji_vlm.load(weights=tmp_path)


@pytest.fixture(scope="module")
def shipped() -> tuple[LlavaForConditionalGeneration, LlavaProcessor]:
    try:
        smollm2.folder()
    except ImportError as error:
        pytest.skip(str(error))
    return emoji_vlm.load(device="cpu")


def test_the_shipped_files_are_small() -> None:
    assert 1e6 < sum(path.stat().st_size for path in emoji_vlm.WEIGHTS.rglob("*.safetensors")) < 5e6


def drawn_boxes(*things: tuple[str, tuple[int, int, int], int, int]) -> Image.Image:
    pixels = np.full((96, 96, 3), 215, np.uint8)
    for _, colour, left, top in things:
        pixels[top : top + 26, left : left + 26] = colour
    return Image.fromarray(pixels)


def test_the_shipped_model_sees_squares(shipped) -> None:
    model, processor = shipped
    image = drawn_boxes(("red square", (220, 40, 40), 8, 8), ("blue square", (45, 90, 220), 60, 60))
    asked_of = {"red square": "Yes", "blue square": "Yes", "green star": "No", "panda": "No"}
    texts = [prompt(processor, f"Is there a {name} in the image?") for name in asked_of]
    inputs = processor(images=[image] * len(texts), text=texts, padding=True, return_tensors="pt")
    new = model.generate(**inputs, max_new_tokens=4, do_sample=False)[:, inputs["input_ids"].shape[1] :]
    assert processor.batch_decode(new, skip_special_tokens=True) == list(asked_of.values())


def test_the_registry_describes_it_and_its_folder_loads_too(shipped) -> None:
    model, processor = shipped
    described = EMBEDDED["emoji-vlm"]
    assert described.class_name == type(model).__name__
    assert described.parameters == pytest.approx(sum(value.numel() for value in model.parameters()), rel=0.01)
    again, same = load(emoji_vlm.WEIGHTS, device="cpu", dtype=torch.bfloat16)
    assert type(again) is type(model) and again.dtype == torch.bfloat16 and not again.training
    assert same.chat_template == processor.chat_template
    assert len(steer.sites(model)) == 30 + 4  # the language model and the tower
