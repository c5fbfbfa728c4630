"""The optimizer's Triton kernel beside the C kernel: under Triton's interpreter, or on a GPU where there is one; and
compiled for GPUs without one."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from schedulefree import AdamWScheduleFree

from tests.test_schedule_free import make, states, train
from training import schedule_free
from training.schedule_free import FusedAdamWScheduleFree, kernels, step_on_cpu, step_on_gpu

ROOT = Path(__file__).parent.parent
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernel is imported, at its first use
pytest.importorskip("triton", reason="needs the package triton of requirements-dev.txt")

RATES = (0.99, 0.01, 1 - 0.99**3, 1e-8, 0.01, 0.3, 2e-3, 3e-3)
COUNTS = (1, 2047, 2048, 5000, 4096, 2049)  # of less than a block, whole blocks, and blocks of which the last is not


def test_triton_step_of_many_tensors_equals_the_c_kernels():
    if kernels() is None:
        pytest.skip("needs a C compiler")
    torch.manual_seed(0)
    ours = [(*torch.randn(2, count).unbind(), torch.rand(count), torch.randn(count)) for count in COUNTS]
    theirs = [tuple(tensor.clone().to(DEVICE) for tensor in parts) for parts in ours]
    step_on_cpu(ours, *RATES)
    step_on_gpu(theirs, *RATES)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tuple(tensor.cpu() for tensor in other), one, rtol=1e-6, atol=1e-7)


def test_triton_step_writes_nothing_beside_its_tensors():
    count = 2500
    memory = torch.full((4, 4096), 7.0, device=DEVICE)
    step_on_gpu([tuple(row[:count] for row in memory)], *RATES)
    assert (memory[:, count:] == 7).all() and (memory[:3, :count] != 7).all()


def through_triton(monkeypatch):
    """The optimizer's steps from here on, here and on a GPU; returns the launches' numbers of parameters."""
    launched = []
    monkeypatch.setattr(
        schedule_free, "_kernel", lambda tensors: lambda *given: (launched.append(len(given[0])), step_on_gpu(*given))
    )
    return launched


def test_a_step_is_a_launch_for_each_group_and_equals_the_librarys(monkeypatch):
    """Also where gradients come and go, and are elsewhere at each step."""
    ours, exact = (make(kind, device=DEVICE) for kind in (FusedAdamWScheduleFree, AdamWScheduleFree))
    launched = through_triton(monkeypatch)
    for seed in range(4):
        for parameters, optimizer in (ours, exact):
            train(parameters, optimizer, 3, seed)
            for parameter in parameters:
                parameter.grad = None if parameter is parameters[1] else torch.ones_like(parameter)
            optimizer.step()
    for found, expected in zip(states(*ours), states(*exact), strict=True):
        for a, b in zip(found, expected, strict=True):
            assert (a - b).abs().max() <= 1e-6 * b.abs().max()
    assert launched == ([2, 2] * 3 + [1, 2]) * 4


COMPILE = """
import triton
from triton.backends.compiler import GPUTarget
from training import schedule_free, schedule_free_triton

kernel = schedule_free_triton.step
types = {"tensors": "*i64", "blocks": "*i32", "BLOCK": "constexpr"}
signature = {name: types.get(name, "fp32") for name in kernel.arg_names}
for target in (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx90a", 64), GPUTarget("hip", "gfx942", 64)):
    source = triton.compiler.ASTSource(kernel, signature=signature, constexprs={"BLOCK": schedule_free._BLOCK})
    asm = triton.compile(source, target=target).asm
    wide = ("ld.global.v4", "st.global.v4") if target.backend == "cuda" else ("load_dwordx4", "store_dwordx4")
    text = asm["ptx" if target.backend == "cuda" else "amdgcn"]
    print(target.arch, "cubin" in asm or "hsaco" in asm, all(word in text for word in wide))
"""


def test_triton_step_compiles_for_cuda_and_rocm_without_a_gpu(tmp_path):
    """To machine code in which a thread reads and writes 16 bytes at once."""
    environment = {**os.environ, "TRITON_INTERPRET": "0", "TRITON_CACHE_DIR": str(tmp_path)}
    command = [sys.executable, "-c", COMPILE]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{arch} True True" for arch in (90, "gfx90a", "gfx942")]
