"""Compiles the Triton kernels for GPUs that are not here: python -m tests.compiled_kernels {variants,code}

The project's own functions are called as training calls them, on tensors in host memory, and the JIT specialises the
kernels by what it is given; only the launch is left out. variants: all that occur, to Triton's own representation;
code: fewer, to machine code. Prints a line for each: target, shape, kernel, and with code whether it is there and how
often the compiler moves rows between threads.
"""

import functools
import itertools
import sys

import torch
import triton
from triton._C.libtriton import ir
from triton.backends.compiler import GPUTarget
from triton.runtime.jit import JITFunction

from mingru import scan_triton
from training import schedule_free

# Warp sizes say how many channels a program has. The MI250X is gfx90a, the MI300X gfx942.
TARGETS = (GPUTarget("cuda", 90, 32), GPUTarget("hip", "gfx90a", 64), GPUTarget("hip", "gfx942", 64))
UNCUT, CUT = (64, 512, 1536), (1, 2048, 1536)
SHAPES = (UNCUT, CUT, (64, 1, 8), (1, 1, 1), (1, 4096, 1), (2, 33, 100))  # the JIT takes a size of 1 for a constant
MULTIPROCESSORS = 132


class AbsentGPU:
    """A driver that knows its device's target, and no more."""

    def __init__(self, number: int, target: GPUTarget) -> None:
        self.number, self.target = number, target

    def get_current_device(self) -> int:
        return self.number

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return self.target


def main(wanted: str) -> None:
    """See above."""
    JITFunction.__getitem__ = lambda kernel, grid: functools.partial(kernel.run, grid=grid, warmup=True)
    triton.compiler.compile = represent if wanted == "variants" else to_machine_code(triton.compiler.compile)
    for number, target in enumerate(TARGETS[:2] if wanted == "variants" else TARGETS):
        triton.runtime.driver.set_active(AbsentGPU(number, target))
        scan_triton._plan = lambda h_BTE, target=target: scan_triton.plan(
            *h_BTE.shape, MULTIPROCESSORS, target.warp_size
        )
        for shape in SHAPES if wanted == "variants" else (UNCUT, CUT):
            tell(target, shape)
            for first, reset in itertools.product((True, False), repeat=2) if wanted == "variants" else [(True, True)]:
                scan(shape, torch.bfloat16, first, reset)
        for dtype in (torch.float32, torch.float16) if wanted == "variants" else ():
            scan(UNCUT, dtype, True, True)
        for count in (1, 2**20, 2**20 + 1) if wanted == "variants" else (2**20 + 1,):
            tell(target, count)
            schedule_free.step_on_gpu([torch.empty(4, count).unbind()], *(0.5,) * 8)


def scan(shape: tuple[int, int, int], dtype: torch.dtype, first: bool, reset: bool) -> None:
    """Forward and backward, with a state before the first step and resets or without."""
    B, T, E = shape
    projected, state, h = torch.empty(B, T, 2 * E, dtype=dtype), torch.empty(B, E), torch.empty(B, T, E, dtype=dtype)
    before = state if first else None
    resets = torch.empty(B, T, dtype=torch.bool) if reset else None
    scan_triton.forward(projected, before, resets)
    scan_triton.backward(h, state, projected, h, before, resets)


def represent(source, target: GPUTarget, options: dict) -> None:
    """Triton's front end alone, in the place of triton.compiler.compile."""
    backend = triton.compiler.make_backend(target)
    parsed, context = backend.parse_options(options), ir.context()
    ir.load_dialects(context)
    backend.load_dialects(context)
    source.make_ir(target, parsed, backend.get_codegen_implementation(parsed), backend.get_module_map(), context)
    print(*told, source.fn.__name__)


def to_machine_code(whole):
    def compiled(source, target: GPUTarget, options: dict):
        done = whole(source, target=target, options=options)
        there = "cubin" in done.asm or "hsaco" in done.asm
        print(*told, source.fn.__name__, there, done.asm["ttgir"].count("convert_layout"))
        return done

    return compiled


told: list[object] = []


def tell(target: GPUTarget, shape: object) -> None:
    """What the next lines are about."""
    told[:] = [target.backend, target.arch, str(shape).replace(" ", "")]


if __name__ == "__main__":
    main(sys.argv[1])
