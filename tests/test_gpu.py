"""What only a GPU can show: fused kernels on CUDA against fp64, and guidance on CUDA against the CPU. `make gpu`."""

from __future__ import annotations

import pytest
import torch
from probes import inputs_of
from tiny import FAMILIES, moved, output

import steer
from steer_kernels import partial
from steer_kernels.partial import reference

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("tokens, keys, width", [(128, 77, 64), (4096, 333, 64), (1000, 129, 96), (257, 512, 128)])
def test_partial_flash(dtype: torch.dtype, tokens: int, keys: int, width: int) -> None:
    """Output and log-sum-exp within the error of eager attention in the same precision."""
    g = torch.Generator("cuda").manual_seed(0)
    q = torch.randn(2, 8, tokens, width, generator=g, device="cuda", dtype=dtype)
    k, v = (torch.randn(2, 8, keys, width, generator=g, device="cuda", dtype=dtype) for _ in range(2))
    truth, lse = reference.partial(q.double(), k.double(), v.double())
    eager = torch.softmax((q @ k.mT) * width**-0.5, -1) @ v
    out, found = partial(q, k, v, backend="flash")
    assert (out.double() - truth).norm() <= 1.05 * (eager.double() - truth).norm()
    assert torch.allclose(found.double(), lse, atol=1e-2)


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in ("llama", "llava")])
def test_guidance_on_cuda_equals_the_cpu(name: str) -> None:
    model = FAMILIES[name].build()
    site = next(site for site in steer.sites(model) if site.kind in steer.PAG.kinds)
    method = steer.PAG(layers=site.name)
    kwargs = inputs_of(FAMILIES[name], model)
    with steer.apply(model, method):
        on_cpu = output(model, kwargs)
    model.cuda()
    with steer.apply(model, method):
        on_cuda = output(model, moved(inputs_of(FAMILIES[name], model), torch.device("cuda"))).cpu()
    assert torch.allclose(on_cuda, on_cpu, atol=1e-3 * on_cpu.abs().max())
