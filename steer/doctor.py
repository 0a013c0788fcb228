"""What runs on this machine, and why the rest does not."""

from __future__ import annotations

import importlib.util
import platform
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version

import torch

PACKAGES = ("torch", "diffusers", "transformers", "accelerate", "safetensors", "triton", "gradio", "peft", "matplotlib")
TESTED_DIFFUSERS = "0.42.1"


@dataclass(frozen=True)
class Check:
    """One line of the report: what was looked at, whether it works, and the detail or the remedy."""

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class Report:
    """All checks; prints as text."""

    checks: tuple[Check, ...]

    @property
    def ok(self) -> bool:
        """Whether everything that steer needs works (optional parts may be missing)."""
        return all(check.ok for check in self.checks if not check.name.startswith("optional"))

    def __str__(self) -> str:
        return "\n".join(f"{'ok  ' if c.ok else 'no  '}{c.name}: {c.detail}" for c in self.checks)


def doctor() -> Report:
    """Look at the libraries, the devices, the attention processors and the embedded models."""
    checks = [Check("python", True, f"{platform.python_version()} on {platform.system()} {platform.machine()}")]
    checks += [_package(name) for name in PACKAGES]
    checks += [_device(), _fused(), _sparse(), _processors(), _triton(), _demos()]
    return Report(tuple(checks))


def _package(name: str) -> Check:
    needed = name in ("torch", "diffusers", "transformers", "accelerate", "safetensors")
    label = name if needed else f"optional {name}"
    try:
        found = version(name)
    except PackageNotFoundError:
        return Check(label, False, "not installed")
    if name == "diffusers" and found != TESTED_DIFFUSERS:
        return Check(label, True, f"{found}; tested with {TESTED_DIFFUSERS}")
    return Check(label, True, found)


def _device() -> Check:
    if torch.cuda.is_available():
        major, minor = torch.cuda.get_device_capability()
        return Check("device", True, f"{torch.cuda.get_device_name()}, compute capability {major}.{minor}")
    return Check("device", True, f"CPU, {torch.get_num_threads()} threads; no CUDA device")


def _fused() -> Check:
    """The fused attention that also gives the log-sum-exp."""
    from steer_kernels import partial

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q = torch.randn(1, 2, 16, 32, device=device, dtype=dtype)
    try:
        partial(q, q, q, backend="flash")
    except (RuntimeError, ValueError, NotImplementedError) as error:
        return Check("fused attention with log-sum-exp", False, str(error).splitlines()[0])
    return Check("fused attention with log-sum-exp", True, f"{device}, {dtype}".replace("torch.", ""))


def _sparse() -> Check:
    """Which kernel serves block-sparse attention here, and that it agrees with the reference."""
    from steer_kernels import BlockMask, block_sparse_attention
    from steer_kernels.block_sparse import backend_for

    device, dtype = ("cuda", torch.float16) if torch.cuda.is_available() else ("cpu", torch.float32)
    q = torch.randn(1, 2, 300, 64, device=device, dtype=dtype)
    mask = BlockMask.dense(300, 300, device=device).with_causal()
    with torch.no_grad():
        backend = backend_for(q, q, q, mask)
        try:
            found, expected = (block_sparse_attention(q, q, q, mask, backend=name) for name in (backend, "reference"))
        except Exception as error:  # whatever the compiler or the driver throws is the finding
            return Check("block-sparse attention", False, f"{backend}: {str(error).splitlines()[0]}")
    close = torch.allclose(found, expected, atol=1e-2 if dtype == torch.float16 else 1e-4)
    return Check(
        "block-sparse attention", close, f"{backend} kernel" + ("" if close else " differs from the reference")
    )


def _processors() -> Check:
    """Whether the installed diffusers' attention processors can be rewritten."""
    from diffusers.models import attention_processor

    from steer_patches.processors import UnhookableProcessor, steered_class

    try:
        steered_class(attention_processor.AttnProcessor2_0)
        steered_class(attention_processor.JointAttnProcessor2_0)
    except UnhookableProcessor as error:
        return Check("hooks on diffusers' processors", False, str(error))
    return Check("hooks on diffusers' processors", True, "AttnProcessor2_0 and JointAttnProcessor2_0 are rewritten")


def _triton() -> Check:
    if not torch.cuda.is_available():
        return Check("optional triton kernels", False, "they need a CUDA device")
    if importlib.util.find_spec("triton") is None:
        return Check("optional triton kernels", False, "triton is not installed: pip install triton")
    return Check("optional triton kernels", True, "triton can compile for this device")


def _demos() -> Check:
    found = importlib.util.find_spec("steer_demos") is not None
    return Check("optional embedded models", found, "steer models lists them" if found else "steer_demos is missing")
