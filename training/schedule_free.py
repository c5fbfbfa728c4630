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

_BLOCK = 1024  # elements of a Triton program


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernel; None where it cannot be had, which is said once."""
    library = load_or_warn(Path(__file__).with_suffix(".c"), "optimizer", "some three times slower")
    if library is None:
        return None
    library.schedule_free_step.argtypes = [c_void_p] * 4 + [c_int64] + [c_float] * 8
    library.schedule_free_step.restype = None
    return library


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
        kernel = _kernel([tensor for group in self.param_groups for tensor in self._tensors(group)])
        if kernel is None:
            super().step()
            return
        for group in self.param_groups:
            self._step_group(group, kernel)

    def _tensors(self, group: dict) -> list[Tensor]:
        trained = [p for p in group["params"] if p.grad is not None]
        return [t for p in trained for t in (p, self.state[p]["z"], self.state[p]["exp_avg_sq"], p.grad)]

    def _step_group(self, group: dict, kernel: Callable) -> None:
        beta1, beta2 = group["betas"]
        k = group["k"]
        lr = group["lr"] * min(1.0, (k + 1) / group["warmup_steps"] if group["warmup_steps"] else 1.0)
        lr_max = max(lr, group["lr_max"])
        weight = (k + 1) ** group["r"] * lr_max ** group["weight_lr_power"]
        weight_sum = group["weight_sum"] + weight
        pull = weight / weight_sum if weight_sum else 0.0
        group.update(k=k + 1, scheduled_lr=lr, lr_max=lr_max, weight_sum=weight_sum)

        tensors = self._tensors(group)
        for y, z, v, gradient in zip(*(tensors[part::4] for part in range(4)), strict=True):
            kernel(
                y, z, v, gradient, beta2, 1 - beta2, 1 - beta2 ** (k + 1), group["eps"], group["weight_decay"], pull,
                lr * (1 - beta1 * (1 - pull)), lr,
            )  # fmt: skip


def _kernel(tensors: Sequence[Tensor]) -> Callable | None:
    """What updates y, z and v of one parameter, given its gradient too; None: only the library can."""
    if not all(tensor.dtype == torch.float32 and tensor.is_contiguous() for tensor in tensors):
        return None
    devices = {tensor.device.type for tensor in tensors}
    if devices <= {"cpu"} and kernels() is not None:
        return step_on_cpu
    return step_on_gpu if devices == {"cuda"} and triton_step() is not None else None


def step_on_cpu(y: Tensor, z: Tensor, v: Tensor, gradient: Tensor, *rates: float) -> None:
    """One parameter's step by the C kernel, whose order `rates` have."""
    addresses = (tensor.data_ptr() for tensor in (y, z, v, gradient))
    kernels().schedule_free_step(*addresses, y.numel(), *rates)


def step_on_gpu(y: Tensor, z: Tensor, v: Tensor, gradient: Tensor, *rates: float) -> None:
    """The same by the Triton kernel."""
    with torch.cuda.device(y.device) if y.is_cuda else contextlib.nullcontext():  # Triton launches on the current one
        triton_step()[(-(-y.numel() // _BLOCK),)](y, z, v, gradient, y.numel(), *rates, BLOCK=_BLOCK)
