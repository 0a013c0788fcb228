"""The Triton kernels compiled for GPUs that need not be here: they fit into shared memory, and spill no registers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

# Runs in a process of its own, since this one interprets the kernels. Prints the resources of one compiled kernel.
COMPILE = """
import json, os, re, subprocess, sys, tempfile
import triton, triton.backends.nvidia
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from steer_kernels.block_sparse.triton import _attend, _merge

options = json.loads(sys.argv[1])
constants, dtype, arch = options["constants"], options["dtype"], options["arch"]
signature, attributes = {}, {}
for i, name in enumerate(_attend.arg_names):
    if name in constants:
        signature[name] = "constexpr"
    elif name in ("q_ptr", "k_ptr", "v_ptr", "out_ptr"):
        signature[name] = "*" + dtype
    elif name in ("lse_ptr", "scratch_ptr", "scratch_lse_ptr"):
        signature[name] = "*fp32"
    else:
        signature[name] = "*i32" if name.endswith("_ptr") else "fp32" if name == "scale_log2" else "i32"
    if constants["TMA"] and name in ("k_ptr", "v_ptr"):
        signature[name] = f"tensordesc<{dtype}[1, 1, {constants['TILE_K']}, {constants['PADDED_D']}],,>"
    elif name.endswith("_ptr") or ("stride" in name and "rule" not in name):
        attributes[(i,)] = [["tt.divisibility", 16]]
source = ASTSource(
    _attend, signature, {(_attend.arg_names.index(name),): value for name, value in constants.items()}, attributes
)
kernel = triton.compile(source, target=GPUTarget("cuda", arch, 32), options=options["launch"])
with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
    file.write(kernel.asm["cubin"])
    file.flush()
    tool = os.path.join(os.path.dirname(triton.backends.nvidia.__file__), "bin", "cuobjdump")
    sass = subprocess.run([tool, "--dump-sass", file.name], capture_output=True, text=True, check=True).stdout
print(json.dumps({
    "shared": kernel.metadata.shared,
    "spills": sass.count("STL") + sass.count("LDL"),
    "tensor cores": sass.count("HGMMA") + sass.count("HMMA"),
    "loads": sass.count("UTMALDG"),
}))
"""
LIMIT = {80: 163 * 1024, 90: 227 * 1024}
TABLES = Path(__file__).parents[2] / "kernels" / "steer_kernels" / "tables"


def compiled(
    arch: int, row: dict, *, rule: int = 1, causal: bool = True, dtype: str = "bf16", tma: bool = False
) -> dict:
    bq, bk = row["block"]
    edges = 1 << (bq // bk + 1).bit_length() if causal else 1
    constants = dict(
        D=row["head_dim"], PADDED_D=row["head_dim"], BQ=bq, BK=bk, TILE_Q=row["tile_q"], TILE_K=row["tile_k"],
        RULE=rule, AXES=3 if rule == 1 else 2, CAUSAL=causal, RAGGED=True, EDGES=edges, TMA=tma, PRECISION="tf32",
    )  # fmt: skip
    launch = dict(num_warps=row["warps"], num_stages=row["stages"])
    options = json.dumps(dict(constants=constants, dtype=dtype, arch=arch, launch=launch))
    run = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", COMPILE, options],
        env={"PATH": "/usr/bin:/bin", "PYTHONPATH": ":".join(sys.path), "HOME": str(Path.home())},
        capture_output=True,
        text=True,
    )
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


def rows(name: str) -> list[dict]:
    return json.loads((TABLES / f"{name}.json").read_text())["block_sparse"]


@pytest.mark.parametrize("name, arch", [("h200", 90), ("a100", 80)])
def test_the_main_setting(name: str, arch: int) -> None:
    row = next(row for row in rows(name) if row["head_dim"] == 128 and row["block"] == [128, 128])
    found = compiled(arch, row, causal=False)
    assert found["shared"] <= LIMIT[arch] and found["tensor cores"] > 0


# two chips of one kind share most settings
SHIPPED = {(arch, json.dumps(row)) for name, arch in (("h100", 90), ("h200", 90), ("a100", 80)) for row in rows(name)}


@pytest.mark.slow
@pytest.mark.parametrize("rule, causal", [(0, False), (1, True), (2, False)])
@pytest.mark.parametrize("arch, row", [(arch, json.loads(row)) for arch, row in sorted(SHIPPED)])
def test_every_shipped_setting(arch: int, row: dict, rule: int, causal: bool) -> None:
    found = compiled(arch, row, rule=rule, causal=causal)
    assert found["shared"] <= LIMIT[arch] and found["tensor cores"] > 0
    assert found["spills"] <= 16  # a few words around the loops; inside them it would be hundreds


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["fp16", "fp32", "bf16"])
def test_dtypes(dtype: str) -> None:
    row = dict(head_dim=64, block=[128, 128], tile_q=64, tile_k=32, warps=4, stages=2)
    assert compiled(90, row, dtype=dtype)["shared"] <= LIMIT[90]


@pytest.mark.slow
def test_descriptors_become_bulk_copies() -> None:
    row = next(row for row in rows("h200") if row["head_dim"] == 128 and row["block"] == [128, 128])
    assert compiled(90, row, tma=True)["loads"] > 0
    assert compiled(90, row)["loads"] == 0
