"""The dependency direction of the four packages, read from their import statements, and what `import steer` may do."""

from __future__ import annotations

import ast
import json
import os
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent

PACKAGES = {
    "steer": ROOT / "steer",
    "steer_patches": ROOT / "patches" / "steer_patches",
    "steer_kernels": ROOT / "kernels" / "steer_kernels",
    "steer_demos": ROOT / "demos" / "steer_demos",
}

FORBIDDEN = {
    "steer_kernels": {"diffusers", "transformers", "steer_patches", "steer", "steer_demos"},
    "steer_patches": {"steer", "steer_demos"},
    "steer": {"steer_demos"},
    "steer_demos": set(),
}


def imported_names(source: str) -> Iterator[tuple[int, str]]:
    """Yield (line, top-level package) of every absolute import, also inside functions and `import_module("...")`."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield node.lineno, alias.name.split(".")[0]
        elif isinstance(node, ast.ImportFrom) and node.level == 0 and node.module:
            yield node.lineno, node.module.split(".")[0]
        elif isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            called = ast.unparse(node.func).split(".")[-1]
            if called in {"import_module", "__import__"} and isinstance(node.args[0].value, str):
                yield node.lineno, node.args[0].value.split(".")[0]


def broken_imports(folder: Path, forbidden: set[str]) -> list[str]:
    """List `file:line imports name` for every import below `folder` that `forbidden` names."""
    return [
        f"{path.relative_to(folder)}:{line} imports {name}"
        for path in sorted(folder.rglob("*.py"))
        for line, name in imported_names(path.read_text(encoding="utf-8"))
        if name in forbidden
    ]


@pytest.mark.parametrize("package", PACKAGES)
def test_imports_go_one_way(package: str) -> None:
    folder = PACKAGES[package]
    assert (folder / "__init__.py").is_file(), f"{package} has no __init__.py in {folder}"
    assert broken_imports(folder, FORBIDDEN[package]) == []


@pytest.mark.parametrize(
    "line",
    [
        "import steer_demos",
        "import steer_demos.models as models",
        "from steer_demos import models",
        "from steer_demos.models import load",
        "def late():\n    import steer_demos",
        "import importlib\nimportlib.import_module('steer_demos.models')",
    ],
)
def test_the_check_sees_a_wrong_import(tmp_path: Path, line: str) -> None:
    (tmp_path / "right.py").write_text("import torch\nfrom .steer_demos import near\nsteer_demos = 1\n")
    assert broken_imports(tmp_path, FORBIDDEN["steer"]) == []
    (tmp_path / "wrong.py").write_text(line + "\n")
    assert len(broken_imports(tmp_path, FORBIDDEN["steer"])) == 1


def test_wheel_holds_exactly_the_four_packages() -> None:
    config = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    packages = config["tool"]["hatch"]["build"]["targets"]["wheel"]["packages"]
    assert [ROOT / package for package in packages] == list(PACKAGES.values())


@pytest.mark.parametrize("folder", ["kernels", "patches", "demos"])
def test_outer_folders_are_no_packages(folder: str) -> None:
    """Hugging Face's `kernels` must stay importable from the repository root."""
    assert not list((ROOT / folder).glob("*.py"))


def test_file_names_say_what_is_inside() -> None:
    vague = {"utils.py", "helpers.py"}
    found = [path for folder in PACKAGES.values() for path in folder.rglob("*.py") if path.name in vague]
    assert found == []


IMPORT_STEER = """
import inspect, json, sys
import torch, diffusers, transformers
from diffusers.models import attention_dispatch, attention_processor
from transformers.masking_utils import AttentionMaskInterface
from transformers.modeling_utils import AttentionInterface

def state():
    found = {}
    for module in (torch.nn.functional, attention_dispatch, attention_processor):
        for name, value in inspect.getmembers(module, callable):
            found[name] = value
            if inspect.isclass(value) and value.__module__ == module.__name__:
                found |= {f"{name}.{key}": member for key, member in vars(value).items() if callable(member)}
    registries = [AttentionInterface._global_mapping, AttentionMaskInterface._global_mapping]
    registries.append(attention_dispatch._AttentionBackendRegistry._backends)
    for i, registry in enumerate(registries):
        found |= {f"registry {i}: {key}": value for key, value in registry.items()}
        assert registry
    assert "Attention.forward" in found and "scaled_dot_product_attention" in found
    return found

before, loaded = state(), set(sys.modules)
import steer
after = state()
changed = [key for key in sorted(before.keys() | after.keys()) if before.get(key) is not after.get(key)]
heavy = {"gradio", "matplotlib", "triton"} & (set(sys.modules) - loaded)
print(json.dumps({"changed": changed, "heavy": sorted(heavy)}))
"""


def import_steer(first_on_path: Path) -> dict:
    """Import steer in a new process and report what that changed in torch, diffusers and transformers."""
    done = subprocess.run(
        [sys.executable, "-c", IMPORT_STEER],
        capture_output=True,
        text=True,
        timeout=300,
        cwd=first_on_path,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(first_on_path), *sys.path])},
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def test_importing_steer_changes_nothing() -> None:
    assert import_steer(ROOT) == {"changed": [], "heavy": []}


def test_the_check_sees_a_side_effect(tmp_path: Path) -> None:
    (tmp_path / "gradio.py").touch()
    (tmp_path / "steer.py").write_text(
        "import gradio\n"
        "from diffusers.models.attention_processor import Attention\n"
        "from transformers.modeling_utils import AttentionInterface\n"
        "Attention.forward = lambda self: None\n"
        "AttentionInterface.register('steer_sdpa', print)\n"
    )
    changed = ["Attention.forward", "registry 0: steer_sdpa"]
    assert import_steer(tmp_path) == {"changed": changed, "heavy": ["gradio"]}
