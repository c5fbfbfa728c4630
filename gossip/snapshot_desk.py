"""Where the training thread and the network thread hand each other snapshots: one slot in each direction.

The network thread asks and waits; the training thread looks at the slots at its step boundaries and never waits.
"""

import asyncio
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from gossip.comparison import Evidence
from gossip.exchange import Outcome
from gossip.faults import Fault, ProtocolError
from gossip.ledger import Talk
from gossip.protocol import LINEAGE_LIMIT, SCALAR_LIMIT
from gossip.state import Schema, Snapshot, StateBuffer

COPY_POLL_SECONDS = 0.001


@dataclass(frozen=True)
class Published:
    """What a rank says of itself: step, lineage and generation of its weights, and their fitness (None: unknown).

    evidence: the probe's losses of these very weights, or of some steps earlier in the same generation.
    """

    step: int
    lineage: int
    fitness: float | None
    generation: int
    status: dict
    evidence: Evidence | None = None


@dataclass(frozen=True)
class Delivery:
    """A peer's snapshot that is whole and checked, waiting to be merged, and the conversation it came from."""

    talk: Talk
    outcome: Outcome


@dataclass(frozen=True)
class _Request:
    generation: int
    future: asyncio.Future
    loop: asyncio.AbstractEventLoop


class SnapshotDesk:
    """Holds both buffers, what is published, a snapshot asked for and a snapshot delivered.

    live: the tensors that training writes, by the schema's names; called at step boundaries: scalars(): the optimizer's
    numbers, genes(): the hyperparameters that it trains with.
    """

    def __init__(
        self,
        schema: Schema,
        live: Mapping[str, Tensor],
        scalars: Callable[[], dict[str, float]],
        genes: Callable[[], dict[str, float]],
    ) -> None:
        gpu = next((tensor.device for tensor in live.values() if tensor.is_cuda), None)
        self.schema = schema
        self.send_buffer = StateBuffer(schema, pin=gpu is not None)
        self.receive_buffer = StateBuffer(schema, pin=gpu is not None)
        self._gpu = gpu
        self.published = Published(step=0, lineage=0, fitness=None, generation=0, status={})
        self.scalar_names = frozenset(scalars())
        self.gene_names = frozenset(genes())
        self._live = live
        self._scalars = scalars
        self._genes = genes
        self._lock = threading.Lock()
        self._request: _Request | None = None
        self._delivery: Delivery | None = None
        self._copied: torch.cuda.Event | None = None  # of the newest copy, until a write has been made to wait for it

    # Network thread.

    async def snapshot(self, generation: int) -> Snapshot:
        """The state at the training thread's next step boundary, in the send buffer.

        Raises ProtocolError WEIGHTS_CHANGED when the weights are no longer of `generation` by then.
        """
        loop = asyncio.get_running_loop()
        request = _Request(generation, loop.create_future(), loop)
        with self._lock:
            self._request = request
        try:
            snapshot, copied = await request.future
        finally:
            with self._lock:
                if self._request is request:
                    self._request = None
        # Cancelled in here, the copy goes on; a later one is queued behind it on the same stream.
        while copied is not None and not self._has_happened(copied):
            await asyncio.sleep(COPY_POLL_SECONDS)
        return snapshot

    def _has_happened(self, copied: torch.cuda.Event) -> bool:
        # A thread's current GPU is number 0 unless it says otherwise, and asking makes a context there.
        with torch.cuda.device(self._gpu):
            return copied.query()

    def deliver(self, delivery: Delivery) -> None:
        """Leave a snapshot to be merged. There is room: a rank holds one conversation, until it is merged."""
        with self._lock:
            assert self._delivery is None
            self._delivery = delivery

    # Training thread.

    def publish(
        self, step: int, lineage: int, fitness: float | None, status: dict, evidence: Evidence | None = None
    ) -> None:
        """Say what the weights are now, in the current generation."""
        # What came from a peer grows by training, and must not grow beyond what peers take: see LINEAGE_LIMIT.
        counted = min(lineage, LINEAGE_LIMIT)
        self.published = Published(step, counted, fitness, self.published.generation, status, evidence)

    @property
    def waiting(self) -> bool:
        """Whether serve() or take_delivery() have something to do: two reads, without the lock."""
        return self._request is not None or self._delivery is not None

    def serve(self) -> None:
        """Copy the state for a snapshot that is asked for, if one is."""
        with self._lock:
            request, self._request = self._request, None
        if request is None or request.future.cancelled():
            return
        published = self.published
        if request.generation != published.generation:
            _refuse(request)
            return
        self._copied = self.send_buffer.copy_from(self._live)
        scalars = {name: min(float(value), SCALAR_LIMIT) for name, value in self._scalars().items()}
        snapshot = Snapshot(
            self.send_buffer, published.step, published.generation, published.lineage, scalars, dict(self._genes())
        )
        request.loop.call_soon_threadsafe(_resolve, request.future, (snapshot, self._copied))

    def before_write(self) -> None:
        """Let the current stream wait for a copy of the state that is still being made; on a CPU there is none."""
        copied, self._copied = self._copied, None
        if copied is not None:
            torch.cuda.current_stream(self._gpu).wait_event(copied)

    def take_delivery(self) -> Delivery | None:
        """The snapshot to be merged, if there is one."""
        with self._lock:
            delivery, self._delivery = self._delivery, None
        return delivery

    def weights_changed(self, lineage: int = 0) -> None:
        """The live weights are others now: a new generation of unknown fitness. A request for the older one fails.

        lineage: of weights that became part of them.
        """
        before = self.published
        self.published = replace(
            before,
            lineage=max(before.lineage, lineage),
            fitness=None,
            evidence=None,
            generation=before.generation + 1,
        )
        with self._lock:
            request, self._request = self._request, None
        if request is not None:
            _refuse(request)


def _refuse(request: _Request) -> None:
    error = ProtocolError(Fault.WEIGHTS_CHANGED, "before they were copied")
    request.loop.call_soon_threadsafe(_reject, request.future, error)


def _resolve(future: asyncio.Future, result: object) -> None:
    if not future.done():
        future.set_result(result)


def _reject(future: asyncio.Future, error: ProtocolError) -> None:
    if not future.done():
        future.set_exception(error)
