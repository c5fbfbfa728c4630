"""Schedule-free AdamW whose step is one pass over memory: a C kernel on the CPU, a Triton kernel on a GPU.

What neither can do goes to the library's own step.
"""

import contextlib
import functools
import inspect
from collections.abc import Callable, Sequence
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path
from typing import Any

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

from runtime.native import load_or_warn
from runtime.stderr import say

Trained = tuple[Tensor, Tensor, Tensor, Tensor]  # of one parameter: y (itself), z, v and its gradient

_BLOCK = 2048  # elements of a Triton program
_ALIGNMENT = 16  # bytes that a Triton program reads at once, and at a multiple of which its tensors begin


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernel; None where it cannot be had, which is said once."""
    signatures = {
        "schedule_free_step": (None, *[c_void_p] * 4, c_int64, *[c_float] * 8),
    }
    return load_or_warn(Path(__file__).with_suffix(".c"), "optimizer", "some three times slower", signatures)


@functools.cache
def triton_step() -> Any | None:
    """The Triton kernel; None where there is no Triton, which is said once."""
    try:
        from training import schedule_free_triton
    except ImportError as error:
        say(f"warning: the optimizer runs without its Triton kernel, slower: {error}")
        return None
    return schedule_free_triton.step


class FusedAdamWScheduleFree(AdamWScheduleFree):
    """The library's optimizer, its options and its state; only the arithmetic of a step is fused, where it can be.

    "The Road Less Scheduled", arXiv 2405.15682. Gradients are left as they are.
    """

    def add_param_group(self, group: dict[str, Any]) -> None:
        """As torch's, without the wrapper that imports torch's compiler first: two seconds and 100 MB at each start."""
        inspect.unwrap(torch.optim.Optimizer.add_param_group)(self, group)

    @torch.no_grad()
    def step(self) -> None:
        """One step over every parameter that has a gradient. Its state ("z", "exp_avg_sq") must exist."""
        groups = [self._trained(group) for group in self.param_groups]
        kernel = _kernel([tensor for trained in groups for parts in trained for tensor in parts])
        if kernel is None:
            super().step()
            return
        for group, trained in zip(self.param_groups, groups, strict=True):
            self._step_group(group, trained, kernel)

    def _trained(self, group: dict) -> list[Trained]:
        state = self.state
        return [(p, state[p]["z"], state[p]["exp_avg_sq"], p.grad) for p in group["params"] if p.grad is not None]

    def _step_group(self, group: dict, trained: list[Trained], kernel: Callable) -> None:
        beta1, beta2 = group["betas"]
        k = group["k"]
        lr = group["lr"] * min(1.0, (k + 1) / group["warmup_steps"] if group["warmup_steps"] else 1.0)
        lr_max = max(lr, group["lr_max"])
        weight = (k + 1) ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = group["weight_sum"] + weight
        pull = weight / weight_sum if weight_sum else 0.0
        group.update(k=k + 1, scheduled_lr=lr, lr_max=lr_max, weight_sum=weight_sum)

        kernel(
            trained, beta2, 1 - beta2, 1 - beta2 ** (k + 1), group["eps"], group["weight_decay"], pull,
            lr * (1 - beta1 * (1 - pull)), lr,
        )  # fmt: skip


def _kernel(tensors: Sequence[Tensor]) -> Callable | None:
    """What updates y, z and v of parameters, given their gradients too; None: only the library can."""
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return None
    devices = {tensor.device for tensor in tensors}
    if devices <= {torch.device("cpu")}:
        return None if kernels() is None else step_on_cpu
    on_one_gpu = len(devices) == 1 and devices.pop().type == "cuda"
    aligned = on_one_gpu and all(tensor.data_ptr() % _ALIGNMENT == 0 for tensor in tensors)
    return step_on_gpu if aligned and triton_step() is not None else None


def step_on_cpu(trained: Sequence[Trained], *rates: float) -> None:
    """The parameters' step by the C kernel, whose order `rates` have."""
    step = kernels().schedule_free_step
    for parts in trained:
        step(*(tensor.data_ptr() for tensor in parts), parts[0].numel(), *rates)


def step_on_gpu(trained: Sequence[Trained], *rates: float) -> None:
    """The same by the Triton kernel, in one launch for all of them, on one GPU."""
    if not trained:
        return
    device = trained[0][0].device
    pin = device.type == "cuda"  # the upload then does not hold up the caller; Triton launches on the current GPU
    counts = tuple(parts[0].numel() for parts in trained)
    rows = [number for parts in trained for number in (*(t.data_ptr() for t in parts), parts[0].numel())]
    tensors = torch.tensor(rows, dtype=torch.int64, pin_memory=pin).to(device, non_blocking=True)
    blocks = _blocks(counts, device)
    with torch.cuda.device(device) if pin else contextlib.nullcontext():
        triton_step()[(len(blocks),)](tensors, blocks, *rates, BLOCK=_BLOCK)


@functools.lru_cache(maxsize=8)
def _blocks(counts: tuple[int, ...], device: torch.device) -> Tensor:
    """What each program does (programs, 2), int32: the number of a tensor, of so many elements, and a block in it."""
    blocks = torch.tensor([-(-count // _BLOCK) for count in counts])
    tensor = torch.arange(len(counts)).repeat_interleave(blocks)
    block = torch.arange(len(tensor)) - (blocks.cumsum(0) - blocks)[tensor]
    return torch.stack((tensor, block), dim=1).to(device, torch.int32)
