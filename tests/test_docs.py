"""What the documentation says exists: linked files, quoted error messages, the worked example of CONTRIBUTING.md."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").rglob("*.md"))]
SOURCES = [
    path
    for folder in ("steer", "patches/steer_patches", "kernels/steer_kernels", "demos/steer_demos")
    for path in sorted((ROOT / folder).rglob("*.py"))
]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text(encoding="utf-8")):
        if "://" in target:
            continue
        path, _, anchor = target.partition("#")
        linked = (page.parent / path).resolve() if path else page
        assert linked.exists(), f"{page.name} links to {target}"
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in [re.sub(r"[^\w -]", "", h).lower().replace(" ", "-") for h in headings], target


def texts(source: str) -> Iterator[str]:
    """Every string literal of a module; an f-string with `…` for each of its values."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.JoinedStr):
            yield "".join(part.value if isinstance(part, ast.Constant) else "…" for part in node.values)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            yield node.value


def quoted_messages() -> list[str]:
    """The first cell of every table row of docs/errors.md."""
    rows = re.findall(r"^\| `(.+?)`(?: \(warning\))? \|", (ROOT / "docs/errors.md").read_text(encoding="utf-8"), re.M)
    assert rows
    return rows


@pytest.mark.parametrize("message", quoted_messages())
def test_quoted_errors_exist(message: str) -> None:
    assert any(message in text for path in SOURCES for text in texts(path.read_text(encoding="utf-8")))


def test_the_code_of_the_kernels_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its blocks one after the other, as a reader would type them."""
    matplotlib = pytest.importorskip("matplotlib")
    matplotlib.use("agg")
    monkeypatch.chdir(tmp_path)
    names: dict[str, object] = {}
    page = (ROOT / "docs/kernels.md").read_text(encoding="utf-8")
    for code in re.findall(r"```python\n(.*?)```", page, re.DOTALL):
        exec(compile(code, "docs/kernels.md", "exec"), names)
    assert (tmp_path / "patterns.png").stat().st_size > 10_000


def test_the_code_of_the_calibration_page_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The first block with fewer steps, and the block with heads for each picture."""
    monkeypatch.chdir(tmp_path)
    page = (ROOT / "docs/calibration.md").read_text(encoding="utf-8")
    blocks = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    names: dict[str, object] = {}
    exec(compile(blocks[0].replace('steps": 8', 'steps": 2'), "docs/calibration.md", "exec"), names)
    assert {path.name for path in (tmp_path / "colourful").iterdir()} == {"steer.json", "steer.safetensors"}
    by_row = next(block for block in blocks if "num_images_per_prompt" in block)
    exec(compile(by_row, "docs/calibration.md", "exec"), names)
    assert len(names["pictures"]) == 2  # type: ignore[arg-type]


RUN_EXAMPLE = """
import torch, steer
from diffusers import SD3Transformer2DModel
from temperature import Temperature

torch.manual_seed(0)
model = SD3Transformer2DModel(
    sample_size=8, num_layers=2, num_attention_heads=2, attention_head_dim=8, caption_projection_dim=16,
    joint_attention_dim=16, pooled_projection_dim=16, pos_embed_max_size=8, in_channels=4, out_channels=4,
).eval()
for parameter in model.parameters():
    torch.nn.init.normal_(parameter, std=0.3)
inputs = dict(
    hidden_states=torch.randn(1, 4, 8, 8), encoder_hidden_states=torch.randn(1, 5, 16),
    pooled_projections=torch.randn(1, 16), timestep=torch.tensor([500.0]),
)
def run(**settings):
    with torch.no_grad(), steer.apply(model, Temperature(layers="transformer_blocks.0", **settings)):
        return model(**inputs).sample

before = model(**inputs).sample.detach()
assert torch.equal(run(), before)
assert torch.equal(run(temperature=2.0, heads=[]), before)
all_heads, one_head = run(temperature=2.0), run(temperature=2.0, heads=[1])
assert all_heads.isfinite().all() and not torch.equal(all_heads, before)
assert not torch.equal(one_head, before) and not torch.equal(one_head, all_heads)
assert torch.equal(model(**inputs).sample.detach(), before)
assert steer.methods()["Temperature"] is Temperature
"""


RUN_SPARSE_EXAMPLE = """
import torch, steer
from diffusers import WanTransformer3DModel
from frames import Frames

torch.manual_seed(0)
model = WanTransformer3DModel(
    num_layers=2, num_attention_heads=2, attention_head_dim=12, in_channels=4, out_channels=4, text_dim=8, freq_dim=8,
    ffn_dim=8, cross_attn_norm=True,
).eval()
inputs = dict(
    hidden_states=torch.randn(1, 4, 5, 8, 8), encoder_hidden_states=torch.randn(1, 3, 8), timestep=torch.tensor([500])
)
def run(**settings):
    with torch.no_grad(), steer.apply(model, Frames(block_size=16, **settings)) as handle:
        return model(**inputs).sample, handle.stats["density"]

before = model(**inputs).sample.detach()
near, density = run()
assert density == 13 / 25 and not torch.equal(near, before)
assert run(dense_layers=1)[1] == (13 / 25 + 1) / 2
whole, density = run(reach=4)
assert density == 1 and torch.allclose(whole, before, atol=1e-5)
assert torch.equal(model(**inputs).sample.detach(), before)
"""


@pytest.mark.parametrize(("name", "script"), [("temperature", RUN_EXAMPLE), ("frames", RUN_SPARSE_EXAMPLE)])
def test_worked_examples_are_methods(name: str, script: str, tmp_path: Path) -> None:
    page = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    (example,) = re.findall(rf'^```python\n("""{name.title()}: .+?)^```', page, re.MULTILINE | re.DOTALL)
    (tmp_path / f"{name}.py").write_text(example, encoding="utf-8")
    # its own process: the example registers itself, and other tests run over all registered methods
    done = subprocess.run(
        [sys.executable, "-c", script],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
