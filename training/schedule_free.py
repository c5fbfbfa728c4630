"""Schedule-free AdamW whose step is one pass over memory: a C kernel on the CPU, the library's own step elsewhere."""

import functools
from ctypes import CDLL, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from schedulefree import AdamWScheduleFree
from torch import Tensor

from runtime.native import NativeUnavailable, load_kernels
from runtime.stderr import say


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernel; None where it cannot be had, which is said once."""
    try:
        library = load_kernels(Path(__file__).with_suffix(".c"))
    except NativeUnavailable as error:
        say(f"warning: the optimizer runs without its C kernel, some three times slower: {error}")
        return None
    library.schedule_free_step.argtypes = [c_void_p] * 4 + [c_int64] + [c_float] * 8
    library.schedule_free_step.restype = None
    return library


class FusedAdamWScheduleFree(AdamWScheduleFree):
    """The library's optimizer, its options and its state; only the arithmetic of a step is fused, where it can be.

    "The Road Less Scheduled", arXiv 2405.15682. Gradients are left as they are.
    """

    @torch.no_grad()
    def step(self) -> None:
        """One step over every parameter that has a gradient. Its state ("z", "exp_avg_sq") must exist."""
        if kernels() is None or not all(
            _fits(tensor) for group in self.param_groups for tensor in self._tensors(group)
        ):
            super().step()
            return
        for group in self.param_groups:
            self._step_group(group)

    def _tensors(self, group: dict) -> list[Tensor]:
        trained = [p for p in group["params"] if p.grad is not None]
        return [t for p in trained for t in (p, self.state[p]["z"], self.state[p]["exp_avg_sq"], p.grad)]

    def _step_group(self, group: dict) -> None:
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
            kernels().schedule_free_step(
                y.data_ptr(), z.data_ptr(), v.data_ptr(), gradient.data_ptr(), y.numel(), beta2, 1 - beta2,
                1 - beta2 ** (k + 1), group["eps"], group["weight_decay"], pull, lr * (1 - beta1 * (1 - pull)), lr,
            )  # fmt: skip


def _fits(tensor: Tensor) -> bool:
    return tensor.device.type == "cpu" and tensor.dtype == torch.float32 and tensor.is_contiguous()
