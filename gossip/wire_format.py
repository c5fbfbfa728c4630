"""How the numbers of a payload travel: float32 as it is, or as bfloat16 at half the bytes."""

from typing import Protocol

import torch

WIRE_DTYPES = ("fp32", "bf16")


class WireFormat(Protocol):
    """Turns pieces of a payload into what travels, and back. On one thread, for one conversation."""

    def size(self, nbytes: int) -> int:
        """Bytes that travel for `nbytes` of payload."""

    def pack(self, piece: memoryview) -> memoryview:
        """What travels for `piece`; good until the next call."""

    def space(self, piece: memoryview) -> memoryview:
        """Where to read what travels for `piece`; good until the next call."""

    def unpack(self, piece: memoryview) -> None:
        """Fill `piece` from the space that was asked for it."""


def wire_format(wire_dtype: str, piece_bytes: int) -> WireFormat:
    """The format of that name, one of WIRE_DTYPES, for pieces of at most `piece_bytes`."""
    return Bfloat16Wire(piece_bytes) if wire_dtype == "bf16" else Float32Wire()


class Float32Wire:
    """The payload itself travels."""

    def size(self, nbytes: int) -> int:
        return nbytes

    def pack(self, piece: memoryview) -> memoryview:
        return piece

    def space(self, piece: memoryview) -> memoryview:
        return piece

    def unpack(self, piece: memoryview) -> None:
        """Nothing to do: it was read in place."""


class Bfloat16Wire:
    """Each float32 is rounded to the nearest bfloat16, ties to even. The whole payload must be float32."""

    def __init__(self, piece_bytes: int) -> None:
        self._outgoing, self._incoming = torch.empty(2, piece_bytes // 4, dtype=torch.bfloat16)  # both at once

    def size(self, nbytes: int) -> int:
        return nbytes // 2

    def pack(self, piece: memoryview) -> memoryview:
        values = torch.frombuffer(piece, dtype=torch.float32)
        self._outgoing[: len(values)].copy_(values)
        return _bytes(self._outgoing[: len(values)])

    def space(self, piece: memoryview) -> memoryview:
        return _bytes(self._incoming[: len(piece) // 4])

    def unpack(self, piece: memoryview) -> None:
        values = torch.frombuffer(piece, dtype=torch.float32)
        values.copy_(self._incoming[: len(values)])


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())
