"""How a training pass computes what MinLM defines: in which precision, compiled or not, at which cost in memory."""

import os
import shutil
from collections.abc import Callable

import torch
from torch import Tensor, nn

from mingru.minLM import MinLM, MinLMState
from runtime.devices import has_fast_bf16
from runtime.errors import UserError
from training.options import ComputeOptions

# Dense matrix products, TFLOP/s: bfloat16, and float32 without TF32. From the vendors' data sheets; ROCm shows each
# half of an MI250X as a device. The first name that the device's own contains counts.
PEAK_TFLOPS: dict[str, tuple[float, float]] = {
    "H200": (989.0, 67.0),
    "H100 PCIe": (756.0, 51.0),
    "H100": (989.0, 67.0),
    "A100": (312.0, 19.5),
    "L40S": (362.0, 91.6),
    "MI300X": (1307.4, 163.4),
    "MI250X": (191.5, 47.9),
}


def choose_dtype(wanted: str, device: torch.device) -> torch.dtype:
    """The dtype of matrix products for --dtype. auto: bfloat16 on a GPU that has it and on a CPU
    that is faster with it, else float32.

    Raises UserError for bf16 on a GPU without it.
    """
    on_gpu = device.type == "cuda"
    has_bf16 = torch.cuda.is_bf16_supported(including_emulation=False) if on_gpu else has_fast_bf16()
    if wanted == "bf16" and on_gpu and not has_bf16:
        raise UserError(f"expected a GPU that computes in bfloat16, got {_name(device)}: use --dtype fp32")
    return torch.bfloat16 if wanted == "bf16" or (wanted == "auto" and has_bf16) else torch.float32


def precision(dtype: torch.dtype, device: torch.device) -> torch.autocast:
    """A context in which a model whose weights are float32 computes its matrix products, and what lies between them, in
    `dtype`: autocast, or for float32 nothing."""
    return torch.autocast(device.type, dtype, enabled=dtype != torch.float32)


def check_compiler(options: ComputeOptions, device: torch.device) -> None:
    """Raise UserError where --compile would find no C++ compiler at the first step."""
    compiler = os.environ.get("CXX", "g++")
    if options.compile and device.type == "cpu" and shutil.which(compiler) is None:
        raise UserError(
            f"expected a C++ compiler for --compile, got no {compiler}: install it, or leave --compile out, "
            "which in a resumed run --no_compile does"
        )


def training_pass(
    model: MinLM, options: ComputeOptions, device: torch.device
) -> Callable[..., tuple[Tensor, MinLMState]]:
    """A function with the arguments and the result of `model`, whose own parameters it uses, for training steps.

    In bfloat16 parameters, gradients, the residual stream and the recurrent state stay float32 (autocast).
    """
    dtype = choose_dtype(options.dtype, device)
    model.checkpoint_layers = options.checkpoint_layers
    forward = torch.compile(model, dynamic=False) if options.compile else model

    def compute(*inputs: Tensor | MinLMState | None) -> tuple[Tensor, MinLMState]:
        with precision(dtype, device):
            return forward(*inputs)

    return compute


def flops_per_byte(model: nn.Module) -> int:
    """Floating-point operations that training does for each byte: matrix products, forward and twice that backward.

    Nothing is counted for the recurrence, the norms and the loss, nor for what --checkpoint_layers computes again.
    """
    return 6 * sum(layer.weight.numel() for layer in model.modules() if isinstance(layer, nn.Linear))


def peak_flops(device: torch.device, dtype: torch.dtype) -> float | None:
    """The most floating-point operations a second that `device` can do in dense matrix products; None: unknown."""
    if device.type != "cuda":
        return None
    for name, (bf16, fp32) in PEAK_TFLOPS.items():
        if name in _name(device):
            return 1e12 * (bf16 if dtype == torch.bfloat16 else fp32)
    return None


def _name(device: torch.device) -> str:
    return torch.cuda.get_device_properties(device).name
