"""Pictures of attention: the figures behind them, and that they are drawn."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tiny import FAMILIES, build
from tiny_text import VOCABULARY, tokenizer
from transformers import LlamaConfig, LlamaForCausalLM, MistralConfig, MistralForCausalLM
from typer.testing import CliRunner

import steer
from steer.attention_plots import attention_map, draw_heads, draw_map, head_tables, sink_table
from steer.cli import app
from steer.plan import Plan

SHAPE = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "attn_implementation": "eager",
}


def model_of(window: int | None) -> Any:
    if window is None:
        return build(lambda: LlamaForCausalLM(LlamaConfig(**SHAPE)))
    return build(lambda: MistralForCausalLM(MistralConfig(**SHAPE, sliding_window=window)))


def tokens() -> torch.Tensor:
    return torch.randint(1, 64, (1, 20), generator=torch.Generator().manual_seed(0))


def own_maps(model: Any) -> torch.Tensor:
    """(layers, heads, S, S), as the model itself returns them."""
    with torch.no_grad():
        return torch.stack(model(tokens(), output_attentions=True).attentions)[:, 0]


@pytest.mark.parametrize("window", [None, 6])
def test_sinks(window: int | None) -> None:
    model = model_of(window)
    maps = own_maps(model)
    assert torch.allclose(sink_table(model, tokens()), maps[..., 1:, 0].mean(-1), atol=1e-6)
    found = sink_table(model, tokens(), "sinks", alpha=2.0)
    at = torch.arange(20)
    visible = (at <= at[:, None]) & (at[:, None] - at < (window or 20))
    received = maps.sum(-2) / visible.sum(0)
    assert torch.equal(found, (received[..., 1:] > 2.0 / 20).sum(-1))
    assert found.min() > 0 and found.max() < 19


def test_one_map() -> None:
    model = model_of(None)
    maps = own_maps(model)
    assert torch.allclose(attention_map(model, tokens(), 1, 2), maps[1, 2], atol=1e-6)
    assert torch.allclose(attention_map(model, tokens(), -1), maps[2].mean(0), atol=1e-6)


def test_of_a_steered_model() -> None:
    """What a method makes of the attention, at the very layer at which it computes it; and after it nothing is left."""
    model, act = model_of(None).double(), steer.ACT(beta=0.5, alpha=2.0, layers="model.layers.1")
    dense = own_maps(model)[1, 0]
    with steer.apply(model, act):
        steered = attention_map(model, tokens(), 1, 0)
    received = dense.sum(0) / torch.arange(20, 0, -1)
    sinks = (received > 2.0 / 20) & (torch.arange(20) > 0)
    assert sinks.any()
    assert torch.allclose(steered[1:, sinks], dense[1:, sinks] / 2, atol=1e-10)
    assert torch.allclose(steered.sum(-1), torch.ones(20, dtype=torch.float64), atol=1e-10)
    assert "_steer_state" not in model.__dict__


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda model: sink_table(model, tokens(), "last"), "choose from first, sinks"),
        (lambda model: sink_table(model, tokens()[:, :1]), "two tokens or more"),
        (lambda model: attention_map(model, tokens(), 3), "layers 0 to 2"),
        (lambda model: attention_map(model, tokens(), 0, 4), "heads 0 to 3"),
        (lambda model: sink_table(FAMILIES["sd3"].build(), tokens()), "is no language model"),
    ],
)
def test_bad_arguments(call: Any, message: str) -> None:
    model = model_of(None)
    with pytest.raises(ValueError, match=message):
        call(model)
    assert "_steer_state" not in model.__dict__


def test_tables_of_a_method(tmp_path: Path) -> None:
    """Tables of a plan, one for each step group; the heads of a mapping from globs; after saving and loading too."""
    names = tuple(f"model.layers.{layer}.self_attn" for layer in range(3))
    score = torch.rand(1, 3, 4, generator=torch.Generator().manual_seed(0))
    trials = torch.zeros(5, 3, 4)
    fitted = steer.RetrievalHeads(plan=Plan(sites=names, heads=4, tensors={"score": score, "trials": trials}))
    assert set(head_tables(fitted)) == {"score"}
    fitted.save(str(tmp_path / "retrieval"))
    assert torch.equal(head_tables(steer.load(str(tmp_path / "retrieval")))["score"], score[0])
    model, act = model_of(None), steer.ACT(heads={"model.layers.{1,2}": [3], names[1]: [0]})
    with steer.apply(model, act):
        act.save(str(tmp_path / "act"))
    chosen = torch.tensor([[0, 0, 0, 0], [1, 0, 0, 1], [0, 0, 0, 1]])
    assert torch.equal(head_tables(steer.load(str(tmp_path / "act")))["heads"], chosen.float())
    with pytest.raises(ValueError, match="nothing for every layer and head"):
        head_tables(steer.ACT())


def test_drawing(tmp_path: Path) -> None:
    """Two panels share one scale; long texts go unlabelled; dollar signs are no formulas."""
    tables = {"before": torch.rand(3, 4), "after": torch.rand(3, 4) * 3}
    draw_heads(tables, tmp_path / "heads.png", title="t", label="l")
    draw_heads(tables, tmp_path / "log.png", log=True)
    with Image.open(tmp_path / "heads.png") as picture:
        assert picture.width > picture.height
    weights = torch.rand(8, 8).tril()
    draw_map(weights, tmp_path / "short.png", ["$a", "b$", "\n", "_x", "^", "\\frac", "", "é"], log=True)
    draw_map(weights.repeat(10, 10), tmp_path / "long.png", ["word"] * 80)
    with pytest.raises(ValueError, match="there are none"):
        draw_heads({"nothing": torch.zeros(3, 4)}, tmp_path / "no.png", log=True)
    assert not (tmp_path / "no.png").exists()


def test_commands(tmp_path: Path) -> None:
    """From a folder that `save_pretrained` wrote."""
    model = str(tmp_path / "model")
    model_of(None).save_pretrained(model)
    tokenizer().save_pretrained(model)
    picture = str(tmp_path / "picture.png")

    def run(*arguments: str) -> str:
        (tmp_path / "picture.png").unlink(missing_ok=True)
        result = CliRunner().invoke(app, ["plot", *arguments, "--output", picture])
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            return str(result.exception)
        assert (tmp_path / "picture.png").exists(), result.output
        return result.output

    assert "unsteered" in run("sinks", model)
    assert "ACT" in run("sinks", model, "--measure", "sinks", "--method", "ACT", "--set", "beta=0.1")
    assert "tokens, head 2 of layer 0" in run("attention", model, "--head", "2", "--log", "--text", "some letters")
    assert "not both" in run("sinks", model, "--method", "ACT", "--artifact", "x")
    assert "give --method too" in run("sinks", model, "--set", "beta=0.1")
    assert "no method" in run("attention", model, "--method", "ATC")
    steer.ACT(heads={"model.layers.1": [3]}).save(str(tmp_path / "unapplied"))
    assert "nothing for every layer" in run("heads", str(tmp_path / "unapplied"))
    names = ("model.layers.0.self_attn", "model.layers.1.self_attn")
    plan = Plan(sites=names, heads=4, tensors={"score": torch.rand(1, 2, 4)})
    steer.RetrievalHeads(plan=plan).save(str(tmp_path / "found"))
    assert "2 layers x 4 heads" in run("heads", str(tmp_path / "found"))
    assert "it has score" in run("heads", str(tmp_path / "found"), "--table", "scores")


def test_pictures_drawn_at_once_do_not_mix(tmp_path: Path) -> None:
    tables = [torch.rand(30, 30, generator=torch.Generator().manual_seed(seed)) for seed in range(5)]
    for number, table in enumerate(tables):
        draw_map(table, tmp_path / f"alone-{number}.png", title=str(number))
    with ThreadPoolExecutor(5) as pool:
        list(pool.map(lambda i: draw_map(tables[i], tmp_path / f"at-once-{i}.png", title=str(i)), range(5)))
    for number in range(5):
        at_once, alone = (tmp_path / f"{name}-{number}.png" for name in ("at-once", "alone"))
        assert at_once.read_bytes() == alone.read_bytes()
