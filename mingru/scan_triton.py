"""The recurrence on a GPU: fused Triton kernels, the same source for CUDA and ROCm. Also under Triton's interpreter.

Straight from the projection, in float32 whatever the input's type; the backward pass keeps only the inputs and h, and
computes the gates again. Each program scans its channels tile by tile, in parallel over a tile's steps. Where lanes
and channels alone make too few programs to fill the machine, or leave much of it idle at the end, time is cut into
segments: a first kernel finds what each does to the state that comes in, and the second goes through all segments at
once.

Memory traffic as designed, in tensors of N = B T E elements: without segments, forward reads 2 N and writes N, backward
reads 4 N and writes 2 N, the least possible (resets and the states at the ends aside). Cut into n segments, each pass
reads 2 N (n - 1) / n more, and 8 bytes for each segment, lane and channel.
"""

import contextlib
import functools
import os
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from mingru import scan_tiled
from mingru.scan_operators import register
from runtime.stderr import say

# Warps of a program, and the steps that each scans in registers. More would spill, or leave too few programs a
# multiprocessor: for sm_90 the compiler gives the backward pass 168 registers a thread, so that three programs fit.
WARPS, ROWS, RESIDENT = 4, 8, 3
WHOLE, CUTTING = 9, 4  # tensors of traffic of both passes, and those that segments add if they are many
WAVES = 8


class Plan(NamedTuple):
    """How a launch is cut: segments of time, the steps of each but the last, channels of a program, warps and rows."""

    segments: int
    steps: int
    channels: int
    warps: int = WARPS
    rows: int = ROWS


def interpreted() -> bool:
    """Whether Triton's interpreter, asked for by TRITON_INTERPRET=1, runs the kernels: then on a CPU too."""
    return os.environ.get("TRITON_INTERPRET") == "1"


@functools.cache
def kernels() -> ModuleType | None:
    """The kernels; None where there is no Triton, which is said once."""
    try:
        from mingru import scan_triton_kernels
    except ImportError as error:
        say(f"warning: the recurrence runs without its Triton kernel, far slower: {error}")
        return None
    return scan_triton_kernels


def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """See mingru.scan.scan; float64 goes to the tiled loop. Differentiable once."""
    fits = projected_BT2E.dtype in (torch.float32, torch.bfloat16, torch.float16)
    return (_scan if fits else scan_tiled.scan)(projected_BT2E, prev_hidden_BE, reset_BT)


@functools.cache
def plan(B: int, T: int, E: int, multiprocessors: int, warp_size: int) -> Plan:
    """A channel for each thread of a warp, and as many segments of time as take the least time, by estimate.

    Programs run in waves of as many as are resident at once, each for as long as its steps and the first tile's loads,
    which nothing hides, and the last wave takes as long as a full one: 384 programs where 330 are resident take two.
    Segments fill the last wave, and cost traffic.
    """
    tile, programs, resident = WARPS * ROWS, B * -(-E // warp_size), RESIDENT * multiprocessors

    def cut(segments: int) -> Plan:
        steps = -(-T // (segments * tile)) * tile
        return Plan(-(-T // steps), steps, warp_size)

    def cost(cut: Plan) -> float:
        waves = -(-programs * cut.segments // resident)
        return waves * (cut.steps + tile) * (WHOLE + CUTTING * (1 - 1 / cut.segments))

    # A segment of a few tiles would cost more than it brings; of more waves the last one matters little.
    most = max(1, min(WAVES * resident // programs, T // (4 * tile)))
    return min(map(cut, range(1, most + 1)), key=cost)


def forward(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> tuple[Tensor, Tensor]:
    """h_BTE in the input's dtype and the last h_BE in float32."""
    if kernels() is None:  # asked in here, where torch.compile does not look
        return scan_tiled.forward(projected_BT2E, prev_hidden_BE, reset_BT)
    B, T, E2 = projected_BT2E.shape
    projected_BT2E, first_BE, reset_BT = projected_BT2E.contiguous(), _state(prev_hidden_BE), _bytes(reset_BT)
    h_BTE = projected_BT2E.new_empty(B, T, E2 // 2)
    last_BE = projected_BT2E.new_empty(B, E2 // 2, dtype=torch.float32)
    cut = _plan(h_BTE)
    aggregates = _aggregates(h_BTE, cut)
    with _on(h_BTE):
        if cut.segments > 1:
            _launch("forward_aggregates", h_BTE, cut, cut.segments - 1, projected_BT2E, reset_BT, *aggregates,
                    HAS_RESET=reset_BT is not None)  # fmt: skip
        _launch("forward", h_BTE, cut, cut.segments, projected_BT2E, first_BE, reset_BT, *aggregates, h_BTE, last_BE,
                HAS_FIRST=first_BE is not None, HAS_RESET=reset_BT is not None)  # fmt: skip
    return h_BTE, last_BE


def backward(
    grad_BTE: Tensor,
    grad_last_BE: Tensor,
    projected_BT2E: Tensor,
    h_BTE: Tensor,
    prev_hidden_BE: Tensor | None,
    reset_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """The gradients of projected_BT2E, in its dtype, and of the previous hidden state, in float32."""
    if kernels() is None:
        return scan_tiled.backward(grad_BTE, grad_last_BE, projected_BT2E, h_BTE, prev_hidden_BE, reset_BT)
    projected_BT2E, first_BE, reset_BT = projected_BT2E.contiguous(), _state(prev_hidden_BE), _bytes(reset_BT)
    grad_BTE, grad_last_BE, h_BTE = grad_BTE.contiguous(), _state(grad_last_BE), h_BTE.contiguous()
    grad_projected_BT2E, grad_first_BE = torch.empty_like(projected_BT2E), torch.empty_like(grad_last_BE)
    cut = _plan(h_BTE)
    aggregates = _aggregates(h_BTE, cut)
    with _on(h_BTE):
        if cut.segments > 1:
            _launch("backward_aggregates", h_BTE, cut, cut.segments - 1, grad_BTE, projected_BT2E, reset_BT,
                    *aggregates, HAS_RESET=reset_BT is not None)  # fmt: skip
        _launch("backward", h_BTE, cut, cut.segments, grad_BTE, grad_last_BE, projected_BT2E, h_BTE, first_BE, reset_BT,
                *aggregates, grad_projected_BT2E, grad_first_BE, HAS_FIRST=first_BE is not None,
                HAS_RESET=reset_BT is not None)  # fmt: skip
    return grad_projected_BT2E, grad_first_BE


def _launch(name: str, h_BTE: Tensor, cut: Plan, segments: int, *tensors: Tensor | None, **flags: bool) -> None:
    """Run a kernel with a program for each lane, block of channels, and of `segments`."""
    B, T, E = h_BTE.shape
    grid = (B * -(-E // cut.channels) * segments,)
    kernel = getattr(kernels(), name)
    sizes = {"W": cut.warps, "S": cut.rows, "BE": cut.channels}
    kernel[grid](*tensors, T, E, cut.steps, cut.segments, **flags, **sizes, num_warps=cut.warps)


def _plan(h_BTE: Tensor) -> Plan:
    if h_BTE.device.type == "cpu":  # interpreted: one program after another, and each scan an element at a time
        steps = -(-h_BTE.shape[1] // 32) * 32
        return Plan(1, steps, channels=8, warps=2, rows=16)
    device = torch.cuda.get_device_properties(h_BTE.device)
    return plan(*h_BTE.shape, device.multi_processor_count, device.warp_size)


def _aggregates(h_BTE: Tensor, cut: Plan) -> tuple[Tensor | None, Tensor | None]:
    """Room for what each segment but one does to the state: its decay, and what it adds."""
    if cut.segments == 1:
        return None, None
    B, _, E = h_BTE.shape
    return tuple(h_BTE.new_empty(2, B, cut.segments - 1, E, dtype=torch.float32).unbind(0))


def _on(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Triton launches on the current device."""
    return torch.cuda.device(tensor.device) if tensor.is_cuda else contextlib.nullcontext()


def _state(tensor: Tensor | None) -> Tensor | None:
    return None if tensor is None else tensor.to(torch.float32).contiguous()


def _bytes(reset_BT: Tensor | None) -> Tensor | None:
    return None if reset_BT is None else reset_BT.contiguous().view(torch.uint8)


_scan, scan_forward = register("triton", forward, backward)
