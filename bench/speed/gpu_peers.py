"""GPU kernels of others, where they are installed: flash-linear-attention's HGRN, accelerated-scan, and fla's models.

    pip install flash-linear-attention accelerated-scan mamba-ssm     # each is compared with if it is there

accelerated-scan needs nvcc and ninja too, since it is compiled when it is imported.

Each computes h_t = a_t h_{t-1} + b_t of given a and b, so minGRU's gates are eager torch in front of it.
"""

import functools
from collections.abc import Callable
from importlib.util import find_spec

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from runtime.stderr import say


def recurrences(projected_BT2E: Tensor, grad_BTE: Tensor) -> dict[str, Callable[[], None]]:
    """A forward and backward pass of minGRU's recurrence from its projection by each kernel that is installed."""
    forms = {}
    if find_spec("fla"):
        from fla.ops.hgrn import chunk_hgrn, fused_recurrent_hgrn

        forms["fla chunk_hgrn"] = lambda x_BTE, k_BTE: chunk_hgrn(_new(x_BTE, k_BTE), F.logsigmoid(-k_BTE))[0]
        forms["fla fused_recurrent_hgrn"] = lambda x_BTE, k_BTE: fused_recurrent_hgrn(
            _new(x_BTE, k_BTE), F.logsigmoid(-k_BTE)
        )[0]
    if scan := _accelerated_scan():
        forms["accelerated-scan"] = lambda x_BTE, k_BTE: (
            scan(torch.sigmoid(-k_BTE).mT.contiguous(), _new(x_BTE, k_BTE).mT.contiguous()).mT
        )
    return {name: functools.partial(_run, form, projected_BT2E, grad_BTE) for name, form in forms.items()}


def models(parameters: int, num_tokens: int) -> dict[str, Callable[[], nn.Module]]:
    """Makers of fla's HGRN and Mamba language models of about as many parameters, if fla is installed; Mamba only
    beside its own kernels, without which fla loops over time in Python."""
    if not find_spec("fla"):
        return {}
    from fla.models import HGRNConfig, HGRNForCausalLM, MambaConfig, MambaForCausalLM

    def sized(model: type, config: type, width: int) -> nn.Module:
        def build(layers: int) -> nn.Module:
            return model(config(hidden_size=width, num_hidden_layers=layers, vocab_size=num_tokens))

        with torch.device("meta"):
            one, two = (sum(p.numel() for p in build(layers).parameters()) for layers in (1, 2))
        return build(max(1, round((parameters - one) / (two - one)) + 1))

    makers = {"fla HGRN": lambda: sized(HGRNForCausalLM, HGRNConfig, 2048)}
    if find_spec("mamba_ssm"):
        makers["fla Mamba"] = lambda: sized(MambaForCausalLM, MambaConfig, 2048)
    return makers


@functools.cache
def _accelerated_scan() -> Callable[[Tensor, Tensor], Tensor] | None:
    """Its kernel; None where it is not installed, or cannot be compiled, which its import does and which is said."""
    if not find_spec("accelerated_scan"):
        return None
    try:
        from accelerated_scan.warp import scan
    except (ImportError, OSError, RuntimeError) as error:
        say(f"accelerated-scan is left out: {str(error).strip().splitlines()[0]}")
        return None
    return scan


def _new(x_BTE: Tensor, k_BTE: Tensor) -> Tensor:
    return torch.sigmoid(k_BTE) * torch.where(x_BTE >= 0, x_BTE + 0.5, torch.sigmoid(x_BTE))


def _run(form: Callable[[Tensor, Tensor], Tensor], projected_BT2E: Tensor, grad_BTE: Tensor) -> None:
    projected_BT2E.grad = None
    form(*projected_BT2E.chunk(2, dim=-1)).backward(grad_BTE)
