"""How the numbers of a payload travel: float32 as it is, as bfloat16, or as remainders of four bits (see lattice)."""

from typing import Protocol

import torch

from gossip import lattice, state_native

WIRE_DTYPES = ("fp32", "bf16", "int4")


class WireFormat(Protocol):
    """Turns pieces of a payload into what travels, and back. On one thread, for one conversation.

    start: where in the payload a piece begins, in bytes, a multiple of 512 KiB; all pieces but the last are as long.
    """

    def size(self, nbytes: int) -> int:
        """Bytes that travel for `nbytes` of payload."""

    def pack(self, start: int, piece: memoryview) -> memoryview:
        """What travels for `piece`; good until the next call."""

    def space(self, piece: memoryview) -> memoryview:
        """Where to read what travels for `piece`; good until the next call."""

    def unpack(self, start: int, piece: memoryview) -> None:
        """Fill `piece` from the space that was asked for it."""

    def left_out(self) -> float:
        """The share of what was unpacked that could not be, and is as the receiver's own."""


def wire_format(wire_dtype: str, piece_bytes: int) -> WireFormat:
    """The format for whole states, which need nothing of their receiver, in pieces of at most `piece_bytes`: a state
    that replaces another travels as bfloat16 where wire_dtype, one of WIRE_DTYPES, is int4."""
    return Float32Wire() if wire_dtype == "fp32" else Bfloat16Wire(piece_bytes)


class Float32Wire:
    """The payload itself travels."""

    def size(self, nbytes: int) -> int:
        return nbytes

    def pack(self, start: int, piece: memoryview) -> memoryview:
        return piece

    def space(self, piece: memoryview) -> memoryview:
        return piece

    def unpack(self, start: int, piece: memoryview) -> None:
        """Nothing to do: it was read in place."""

    def left_out(self) -> float:
        return 0.0


class Bfloat16Wire:
    """Each float32 is rounded to the nearest bfloat16, ties to even. The whole payload must be float32."""

    def __init__(self, piece_bytes: int) -> None:
        self._outgoing, self._incoming = torch.empty(2, piece_bytes // 4, dtype=torch.bfloat16)  # both at once

    def size(self, nbytes: int) -> int:
        return nbytes // 2

    def pack(self, start: int, piece: memoryview) -> memoryview:
        values = _floats(piece)
        rounded = self._outgoing[: len(values)]
        state_native.narrow(values, rounded)
        return _bytes(rounded)

    def space(self, piece: memoryview) -> memoryview:
        return _bytes(self._incoming[: len(piece) // 4])

    def unpack(self, start: int, piece: memoryview) -> None:
        values = _floats(piece)
        state_native.widen(self._incoming[: len(values)], values)

    def left_out(self) -> float:
        return 0.0


class RemainderWire:
    """Four bits of each float32, from which a receiver that has `own`, a payload like the sender's, finds the rest.

    spacing: of the payload's blocks, the same at both ends. settle: `own`, which is the payload that is sent, becomes
    what its receiver takes it for.
    """

    def __init__(self, own: memoryview, spacing: torch.Tensor, piece_bytes: int, settle: bool = False) -> None:
        assert piece_bytes % (4 * lattice.BLOCK) == 0
        self._own, self._spacing, self._settle = own, spacing, settle
        self._incoming = torch.empty(self.size(piece_bytes), dtype=torch.uint8)
        self._unpacked = self._wrong = 0

    def size(self, nbytes: int) -> int:
        return packed_bytes(nbytes)

    def pack(self, start: int, piece: memoryview) -> memoryview:
        rotated = lattice.rotate(_floats(piece))
        packed = lattice.encode(rotated, self._spacings(start, len(rotated)))
        if self._settle:
            lattice.unrotate(rotated, _floats(piece))
        return _bytes(packed.view(-1))

    def space(self, piece: memoryview) -> memoryview:
        return _bytes(self._incoming[: self.size(len(piece))])

    def unpack(self, start: int, piece: memoryview) -> None:
        own, values = _floats(self._own[start : start + len(piece)]), _floats(piece)
        rotated = lattice.rotate(own)
        packed = self._incoming[: self.size(len(piece))].view(len(rotated), -1)
        spacing = self._spacings(start, len(rotated))
        wrong = lattice.decode(packed, rotated, spacing)
        lattice.unrotate(rotated, values)
        for block in wrong:
            here = slice(block * lattice.BLOCK, (block + 1) * lattice.BLOCK)
            values[here] = own[here]
            if self._settle:  # it may not have been sent yet, but will have been when the two are compared
                lattice.settle(values[here], spacing[block : block + 1])
        self._unpacked += len(spacing)
        self._wrong += len(wrong)

    def left_out(self) -> float:
        return self._wrong / self._unpacked if self._unpacked else 0.0

    def _spacings(self, start: int, blocks: int) -> torch.Tensor:
        first = start // (4 * lattice.BLOCK)
        return self._spacing[first : first + blocks]


def packed_bytes(nbytes: int) -> int:
    """How long a payload of `nbytes` is as remainders, without its sketch."""
    return lattice.blocks_of(nbytes // 4) * (lattice.BLOCK // 2 + lattice.TAG_BYTES)


def sketch_bytes(nbytes: int) -> int:
    """How long the sketch of a payload of `nbytes` is."""
    return 4 * lattice.SAMPLES * lattice.blocks_of(nbytes // 4)


def sketch_of(piece: memoryview) -> torch.Tensor:
    """See lattice.sketch(), of a piece of a payload."""
    return lattice.sketch(lattice.rotate(_floats(piece)))


def _floats(piece: memoryview) -> torch.Tensor:
    return torch.frombuffer(piece, dtype=torch.float32)


def _bytes(values: torch.Tensor) -> memoryview:
    return memoryview(values.view(torch.uint8).numpy())
