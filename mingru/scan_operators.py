"""A backend's two passes as torch custom operators: what torch.compile, autocast, checkpointing and opcheck build on.

Each pass is one opaque node to torch.compile, which would otherwise unroll its loop over time or break the graph.
Outside of it the passes are called without the operators, whose first call imports torch's compiler.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.library import CustomOpDef

from mingru.scan_reference import state_dtype

Inputs = tuple[Tensor, Tensor | None, Tensor | None]
Outputs = tuple[Tensor, Tensor]


def register(
    name: str, forward: Callable, backward: Callable, device_types: str | Sequence[str] | None = None
) -> tuple[Callable[..., Outputs], CustomOpDef]:
    """The scan of these passes, differentiable once, and what it is to torch.compile: gruboros::scan_<name>_forward,
    with ..._backward.

    forward: (projected_BT2E, prev_hidden_BE, reset_BT), as mingru.scan.scan, -> h_BTE in the input's dtype and the last
    h_BE in the state's. backward: (grad_BTE, grad_last_BE, projected_BT2E, h_BTE, prev_hidden_BE, reset_BT) -> the
    gradients of projected_BT2E, in its dtype, and of the previous hidden state, in the state's. Both must be annotated,
    and return new tensors only. device_types: those the passes can compute on (None: any).
    """
    scan_forward, scan_backward = (
        torch.library.custom_op(f"gruboros::scan_{name}_{which}", function, mutates_args=(), device_types=device_types)
        for which, function in (("forward", forward), ("backward", backward))
    )
    scan_forward.register_fake(_fake_forward)
    scan_backward.register_fake(_fake_backward)
    scan_forward.register_autograd(_by(scan_backward), setup_context=_save)

    class Gradient(torch.autograd.Function):
        @staticmethod
        def forward(*inputs: Tensor | None) -> Outputs:
            return backward(*inputs)

        @staticmethod
        def setup_context(ctx, inputs: tuple, output: Outputs) -> None:
            """Nothing is kept."""

        @staticmethod
        def backward(ctx, *gradients: Tensor) -> tuple:
            raise RuntimeError(f"the {name} scan is differentiable once")

    class Eager(torch.autograd.Function):
        @staticmethod
        def forward(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> Outputs:
            return forward(projected_BT2E, prev_hidden_BE, reset_BT)

        setup_context = staticmethod(_save)
        backward = staticmethod(_by(Gradient.apply))

    def scan(projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None) -> Outputs:
        inputs = projected_BT2E, prev_hidden_BE, reset_BT
        eager = not torch.compiler.is_compiling() and _are_plain(inputs)
        return (Eager.apply if eager else scan_forward)(*inputs)

    return scan, scan_forward


def _are_plain(inputs: Inputs) -> bool:
    """Whether a kernel may take the addresses of all; torch's dispatcher knows what to do with others."""
    device = inputs[0].device
    return device.type != "meta" and all(x is None or (type(x) is Tensor and x.device == device) for x in inputs)


def _by(backward: Callable[..., Outputs]) -> Callable:
    """The gradients of a scan's inputs by `backward`, as autograd asks for them."""

    def differentiate(ctx, grad_BTE: Tensor, grad_last_BE: Tensor) -> tuple[Tensor, Tensor | None, None]:
        projected_BT2E, h_BTE, prev_hidden_BE, reset_BT = ctx.saved_tensors
        grad_projected_BT2E, grad_prev_BE = backward(
            grad_BTE, grad_last_BE, projected_BT2E, h_BTE, prev_hidden_BE, reset_BT
        )
        return grad_projected_BT2E, None if prev_hidden_BE is None else grad_prev_BE.to(prev_hidden_BE.dtype), None

    return differentiate


def _save(ctx, inputs: Inputs, output: tuple[Tensor, Tensor]) -> None:
    projected_BT2E, prev_hidden_BE, reset_BT = inputs
    ctx.save_for_backward(projected_BT2E, output[0], prev_hidden_BE, reset_BT)


def _fake_forward(
    projected_BT2E: Tensor, prev_hidden_BE: Tensor | None, reset_BT: Tensor | None
) -> tuple[Tensor, Tensor]:
    B, T, E2 = projected_BT2E.shape
    last_BE = projected_BT2E.new_empty(B, E2 // 2, dtype=state_dtype(projected_BT2E))
    return projected_BT2E.new_empty(B, T, E2 // 2), last_BE


def _fake_backward(
    grad_BTE: Tensor,
    grad_last_BE: Tensor,
    projected_BT2E: Tensor,
    h_BTE: Tensor,
    prev_hidden_BE: Tensor | None,
    reset_BT: Tensor | None,
) -> tuple[Tensor, Tensor]:
    return projected_BT2E.new_empty(projected_BT2E.shape), grad_last_BE.new_empty(grad_last_BE.shape)
