"""What travels: a schema of named tensors that both ends know already, and flat host buffers laid out by it.

A buffer is the payload: tensors in the schema's order, each at a multiple of 64 bytes, zeros between them.
"""

import enum
import itertools
import math
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from gossip import state_native
from gossip.faults import Fault
from gossip.protocol import VERSION, canonical_json
from runtime.page_locked import page_locked

ALIGNMENT = 64
_LARGEST = 1e30
_ITEM_BYTES = {"float64": 8, "float32": 4, "float16": 2, "bfloat16": 2}


class Rule(enum.Enum):
    """How a merge treats a tensor: moved by a difference, or interpolated because it must never be negative."""

    WEIGHT = "weight"
    SECOND_MOMENT = "second moment"


@dataclass(frozen=True)
class TensorSpec:
    """One tensor of the state; dtype by its torch name, such as "float32"."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    rule: Rule

    @property
    def nbytes(self) -> int:
        """Bytes of the tensor itself, without what aligns the next."""
        return math.prod(self.shape) * _ITEM_BYTES[self.dtype]


@dataclass(frozen=True)
class Span:
    """Bytes start ... stop of a payload that are all of one dtype under one rule."""

    start: int
    stop: int
    dtype: str
    rule: Rule


@dataclass(frozen=True)
class Schema:
    """The tensors of the state in their order, and the terms that both ends must share for a merge to make sense."""

    tensors: tuple[TensorSpec, ...]
    terms: dict[str, str | int | float | bool | None]

    @classmethod
    def of(cls, tensors: Mapping[str, Tensor], rules: Mapping[str, Rule], terms: dict) -> "Schema":
        """The schema of `tensors` (contiguous, floating point); rules: one for each name; terms: JSON scalars."""
        specs = []
        for name, tensor in tensors.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            assert dtype in _ITEM_BYTES and tensor.is_contiguous(), f"{name}: {dtype}, strides {tensor.stride()}"
            specs.append(TensorSpec(name, tuple(tensor.shape), dtype, rules[name]))
        return cls(tuple(specs), dict(terms))

    @cached_property
    def offsets(self) -> tuple[int, ...]:
        """Where each tensor begins in the payload, in bytes; one more: where the payload ends."""
        return tuple(itertools.accumulate((_aligned(spec.nbytes) for spec in self.tensors), initial=0))

    @property
    def nbytes(self) -> int:
        """Bytes of the payload."""
        return self.offsets[-1]

    @cached_property
    def hash(self) -> str:
        """64 hex digits that differ between any two schemas, or versions of the protocol."""
        tensors = [[spec.name, spec.shape, spec.dtype, spec.rule] for spec in self.tensors]
        return blake3(canonical_json({"tensors": tensors, "terms": self.terms, "version": VERSION})).hexdigest()

    @cached_property
    def spans(self) -> tuple[Span, ...]:
        """The payload in as few spans as it has changes of dtype or rule; what aligns a tensor belongs to it."""
        spans, start = [], 0
        layout = zip(self.tensors, self.offsets[1:], strict=True)
        for (dtype, rule), group in itertools.groupby(layout, key=lambda pair: (pair[0].dtype, pair[0].rule)):
            stop = max(end for _, end in group)
            spans.append(Span(start, stop, dtype, rule))
            start = stop
        return tuple(spans)


class StateBuffer:
    """One flat host buffer of a schema's size: `bytes` for the network, `views` by name for merging.

    pin: page-locked memory, to and from which a GPU copies without holding up the caller. Raises UserError where the
    host cannot lock so much.
    """

    def __init__(self, schema: Schema, pin: bool = False) -> None:
        flat = page_locked(schema.nbytes, self) if pin else torch.zeros(schema.nbytes, dtype=torch.uint8)
        assert flat.data_ptr() % ALIGNMENT == 0
        self.schema = schema
        self.bytes = memoryview(flat.numpy())
        self.views: dict[str, Tensor] = {}
        self._gaps: list[Tensor] = []
        for spec, start, stop in zip(schema.tensors, schema.offsets[:-1], schema.offsets[1:], strict=True):
            if start + spec.nbytes < stop:
                self._gaps.append(flat[start + spec.nbytes : stop])
            piece = flat[start : start + spec.nbytes]
            self.views[spec.name] = piece.view(getattr(torch, spec.dtype)).view(spec.shape)
        self._stream: torch.cuda.Stream | None = None  # made for the first copy from a GPU

    def copy_from(self, tensors: Mapping[str, Tensor]) -> "torch.cuda.Event | None":
        """Copy `tensors` (the schema's names) in; called by the thread that writes them, which may go on at once.

        From the CPU the copy is done on return, and None is returned. From a GPU it is queued on a stream of its own
        behind all that the current stream has been given; until the returned event has happened the buffer may not be
        read, and a stream that writes the tensors must wait for it.
        """
        devices = {tensor.device for tensor in tensors.values() if tensor.is_cuda}
        assert len(devices) <= 1, f"state on several devices: {devices}"
        if not devices:
            self._copy(tensors)
            return None
        (device,) = devices
        if self._stream is None:
            self._stream = torch.cuda.Stream(device)
        stream = self._stream
        stream.wait_stream(torch.cuda.current_stream(device))
        with torch.cuda.stream(stream):
            self._copy(tensors)
            return stream.record_event()

    @torch.no_grad()
    def _copy(self, tensors: Mapping[str, Tensor]) -> None:
        for name, view in self.views.items():
            view.copy_(tensors[name], non_blocking=True)
        for gap in self._gaps:  # what rounding left there would travel, and grow
            gap.zero_()


@dataclass(frozen=True)
class Snapshot:
    """The state at one optimizer-step boundary: after `step` steps, in `generation`, with the optimizer's scalars.

    lineage: as in HELLO; genes: the hyperparameters it was trained with; of a received one, weight_norm: L2 norm of all
    values under Rule.WEIGHT; left_out: share of its values that are the receiver's own, see WireFormat.
    """

    buffer: StateBuffer
    step: int
    generation: int
    lineage: int
    scalars: dict[str, float]
    genes: dict[str, float]
    weight_norm: float = math.nan
    left_out: float = 0.0


def payload_fault(schema: Schema, start: int, piece: memoryview) -> Fault | None:
    """What is wrong with the values in `piece`, the bytes of a payload from `start` (both multiples of 64) on.

    NOT_FINITE for NaN, infinity or a magnitude beyond 1e30, from which a merge could overflow to it;
    NEGATIVE_SECOND_MOMENT; else None. Starts no threads, so that any thread may call it.
    """
    stop = start + len(piece)
    for span in schema.spans:
        first, last = max(start, span.start), min(stop, span.stop)
        if first >= last:
            continue
        values = _values(piece[first - start : last - start], span.dtype)
        # Both extremes carry a NaN along, and need no array of flags.
        in_c = values.dtype == np.float32 and state_native.kernels() is not None
        lowest, highest = state_native.extremes(values) if in_c else (float(values.min()), float(values.max()))
        if not (lowest >= -_LARGEST and highest <= _LARGEST):
            return Fault.NOT_FINITE
        if span.rule is Rule.SECOND_MOMENT and lowest < 0:
            return Fault.NEGATIVE_SECOND_MOMENT
    return None


def weight_energy(schema: Schema, start: int, piece: memoryview) -> float:
    """Sum of the squares of all values under Rule.WEIGHT in `piece`, the bytes of a payload from `start` on.

    inf where a single precision number cannot hold it. Any thread may call it.
    """
    total, stop = 0.0, start + len(piece)
    for span in schema.spans:
        first, last = max(start, span.start), min(stop, span.stop)
        if first < last and span.rule is Rule.WEIGHT:
            values = _values(piece[first - start : last - start], span.dtype)
            if values.dtype == np.float32 and state_native.kernels() is not None:
                total += state_native.energy(values)
            else:  # not numpy.dot: it may start threads of its own, beside those that train
                total += float(np.einsum("i,i->", values, values, dtype=np.promote_types(values.dtype, np.float32)))
    return total


def _values(piece: memoryview, dtype: str) -> np.ndarray:
    if dtype == "bfloat16":  # the upper half of a float32, which numpy has no name for
        return (np.frombuffer(piece, np.uint16).astype(np.uint32) << 16).view(np.float32)
    return np.frombuffer(piece, dtype)


def _aligned(nbytes: int) -> int:
    return -(-nbytes // ALIGNMENT) * ALIGNMENT
