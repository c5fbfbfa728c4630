"""Does a model fit? An estimate of what a rank needs, before anything is allocated."""

from dataclasses import dataclass

import torch

from runtime.devices import device_memory_bytes
from runtime.errors import UserError

_BYTES = 4  # float32
_GIB = 1024**3
_MIB = 1024**2


@dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one rank needs on its device, without activations, and in host memory for exchanges and saves."""

    weights: int
    gradients: int
    optimizer: int
    evaluation: int
    exchange: int
    saving: int

    @property
    def on_device(self) -> int:
        """Where the model is."""
        return self.weights + self.gradients + self.optimizer + self.evaluation

    @property
    def on_host(self) -> int:
        """In host memory, whatever the device."""
        return self.exchange + self.saving

    def __str__(self) -> str:
        parts = ("weights", "gradients", "optimizer", "evaluation", "exchange", "saving")
        total = self.on_device + self.on_host
        scale, unit = (_GIB, "GiB") if total >= _GIB else (_MIB, "MiB")
        shown = ", ".join(f"{name} {getattr(self, name) / scale:.1f}" for name in parts)
        return f"{total / scale:.1f} {unit} a rank without activations ({shown})"


def estimate_memory(parameters: int, payload: str) -> MemoryEstimate:
    """For `parameters` float32 numbers: weights, gradients, two more optimizer sequences, the averaged weights while
    validating or judging a merge, the two host buffers of an exchange (of what --gossip_payload lets travel), and a
    save's copy of weights, both optimizer sequences and the averaged weights.
    """
    one, travelling = parameters * _BYTES, 3 if payload == "full" else 2
    return MemoryEstimate(
        weights=one, gradients=one, optimizer=2 * one, evaluation=one, exchange=2 * travelling * one, saving=4 * one
    )


def check_memory(estimate: MemoryEstimate, device: torch.device, ranks_here: int, sharing: int) -> None:
    """Raise UserError if the `ranks_here` ranks of this host cannot fit, of which `sharing` are on `device`."""
    host = device_memory_bytes(torch.device("cpu"))
    if device.type == "cpu":
        available, needed = host, (estimate.on_device + estimate.on_host) * sharing
    else:
        available, needed = device_memory_bytes(device), estimate.on_device * sharing
        if estimate.on_host * ranks_here > host:
            raise UserError(
                f"expected a model whose host buffers fit this host ({host / _GIB:.2f} GiB), got one that needs "
                f"{estimate} times {ranks_here} ranks: choose smaller --params, or fewer ranks a host"
            )
    if needed > available:
        raise UserError(
            f"expected a model that fits {device} ({available / _GIB:.2f} GiB), got one that needs {estimate}"
            f"{f' times {sharing} ranks' if sharing > 1 else ''}: choose smaller --params"
            f"{', or fewer ranks' if sharing > 1 else ''}"
        )
