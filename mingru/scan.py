"""The MinGRU recurrence as one function, whichever backend computes it.

Shapes: B lanes, T time steps, E inner width.
"""

import os
from collections.abc import Callable

import torch
from torch import Tensor

from mingru import scan_logspace, scan_native, scan_reference, scan_tiled, scan_triton
from runtime.errors import UserError

Backend = Callable[[Tensor, Tensor | None, Tensor | None], tuple[Tensor, Tensor]]

BACKENDS: dict[str, Backend] = {
    "reference": scan_reference.scan,
    "logspace": scan_logspace.scan,
    "tiled": scan_tiled.scan,
    "native": scan_native.scan,
    "triton": scan_triton.scan,
}
FASTEST = {"cpu": "native", "cuda": "triton"}  # "cuda" is also what torch calls ROCm's devices
NEEDS = {"native": "cpu", "triton": "cuda"}


def scan(
    projected_BT2E: Tensor, prev_hidden_BE: Tensor | None = None, reset_BT: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """h_t = (1 - z_t) h_{t-1} + z_t g(x_t) with z = sigmoid(k); g(x) = x + 0.5 for x >= 0, else sigmoid(x).

    projected_BT2E: x and k side by side on the last dimension, as `to_hidden_and_gate` makes them.
    prev_hidden_BE: h before the first step (None: zeros). reset_BT (bool): where True, h_{t-1} counts as zero.
    Returns h_BTE in the input's dtype, and the last h_BE in the state's: float32, or float64 for float64 input.
    A state carried from call to call in bfloat16 would swallow every update below its last bit.
    Differentiable once, in projected_BT2E and prev_hidden_BE. The environment's GRUBOROS_SCAN names the backend, else
    it is the device's fastest. Raises UserError as chosen_backend does. Source: "Were RNNs All We Needed?",
    arXiv 2410.01201, appendix B.
    """
    B, T, E2 = projected_BT2E.shape
    assert E2 % 2 == 0 and T > 0, f"expected (B, T >= 1, 2E), got {tuple(projected_BT2E.shape)}"
    assert prev_hidden_BE is None or prev_hidden_BE.shape == (B, E2 // 2), prev_hidden_BE.shape
    assert reset_BT is None or (reset_BT.shape == (B, T) and reset_BT.dtype == torch.bool), reset_BT
    # A single step has nothing to run in parallel: the plain formula is the fastest.
    backend = scan_reference.scan if T == 1 else chosen_backend(projected_BT2E.device.type)
    return backend(projected_BT2E, prev_hidden_BE, reset_BT)


def chosen_backend(device_type: str) -> Backend:
    """The backend that the environment names, else the fastest of `device_type` ("cpu", "cuda", ...).

    Raises UserError for a name that is none, and for a backend that does not run on such a device.
    """
    name = os.environ.get("GRUBOROS_SCAN", FASTEST.get(device_type, "tiled"))
    if name not in BACKENDS:
        raise UserError(f"expected GRUBOROS_SCAN to be one of {', '.join(BACKENDS)}, got {name!r}: correct or unset it")
    if device_type != NEEDS.get(name, device_type) and not (name == "triton" and scan_triton.interpreted()):
        raise UserError(f"expected for GRUBOROS_SCAN={name} a {NEEDS[name]} device, got {device_type}: choose another")
    return BACKENDS[name]
