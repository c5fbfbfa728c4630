"""The optimizer's Triton kernel beside the C kernel: under Triton's interpreter, or on a GPU where there is one."""

import os

import pytest
import torch

from training.schedule_free import kernels, step_on_cpu, step_on_gpu

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is imported, at its first use
pytest.importorskip("triton", reason="needs the package triton of requirements-dev.txt")

RATES = (0.99, 0.01, 1 - 0.99**3, 1e-8, 0.01, 0.3, 2e-3, 3e-3)


@pytest.mark.parametrize("count", [1, 1023, 1024, 2500])
def test_triton_step_equals_the_c_kernels(count):
    if kernels() is None:
        pytest.skip("needs a C compiler")
    torch.manual_seed(0)
    y, z, gradient = torch.randn(3, count).unbind()
    ours = [tensor.clone() for tensor in (y, z, torch.rand(count), gradient)]
    theirs = [tensor.clone().to(DEVICE) for tensor in ours]
    step_on_cpu(*ours, *RATES)
    step_on_gpu(*theirs, *RATES)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(other.cpu(), one, rtol=1e-6, atol=1e-7)
