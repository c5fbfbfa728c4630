"""What the rivals send, rounded for the wire: in 32, 16 or 4 bits a number."""

from collections.abc import Mapping

import torch
from torch import Tensor

from gossip import lattice

WIRES = ("fp32", "bf16", "int4")
_SPACING = 0.3352  # of 16 levels, over a Gaussian's root mean square: least error (J. Max, 1960, table II)


def as_sent(tensors: Mapping[str, Tensor], wire: str, near: Mapping[str, Tensor] | None = None) -> dict[str, Tensor]:
    """What arrives of float32 `tensors` elsewhere: rounded to bfloat16, or in four bits their difference from `near`,
    which the receiver has (None: zeros). Two replicas of a model that send each other their weights as such differences
    have it better than they could: whoever sends knows the receiver's only by a sketch (see gossip.lattice).
    """
    if wire == "fp32":
        return {name: tensor.clone() for name, tensor in tensors.items()}
    if wire == "bf16":
        return {name: tensor.bfloat16().float() for name, tensor in tensors.items()}
    start = near or {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    flat = torch.cat([(tensor - start[name]).flatten() for name, tensor in tensors.items()]).cpu()
    rounded = _in_four_bits(flat).split([tensor.numel() for tensor in tensors.values()])
    return {
        name: start[name] + piece.view(tensor.shape).to(tensor.device)
        for (name, tensor), piece in zip(tensors.items(), rounded, strict=True)
    }


def sent_bytes(tensors: Mapping[str, Tensor], wire: str) -> float:
    """Of all `tensors` on the wire, float32 here."""
    nbytes = sum(tensor.nbytes for tensor in tensors.values())
    if wire == "int4":
        return lattice.blocks_of(nbytes // 4) * (lattice.BLOCK / 2 + 4)  # and each block's spacing
    return nbytes / (2 if wire == "bf16" else 1)


def _in_four_bits(flat: Tensor) -> Tensor:
    """16 levels of one spacing for each rotated block, in which numbers are nearly Gaussian; none of them is zero."""
    rotated = lattice.rotate(flat)
    spacing = (_SPACING * rotated.square().mean(1, keepdim=True).sqrt()).clamp(min=1e-30)
    half = lattice.LEVELS // 2
    level = torch.floor(rotated / spacing).clamp(-half, half - 1) + 0.5
    rounded = torch.empty_like(flat)
    lattice.unrotate(level * spacing, rounded)
    return rounded
