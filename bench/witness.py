"""train.py under witness, for the benches: what it does is the same, and a folder `witness` tells what was seen.

    python -m runtime.launch --ranks 4 -- bench/witness.py --data corpus.txt --output run

The protocol's own digests are not trusted here: rank_0000.tsv holds a digest of every state that the rank copied at a
step boundary ("held"), of every state that it was about to merge ("merge"), both as numbers of the dtype in which they
travel, and a line for each boundary at which its
weights changed though no merge was reported ("changed": looked for at every boundary while a conversation goes on, and
at every tenth other one). Lines are written before what they tell of goes on, so a SIGKILL loses none. rank_0000.board
is shared memory: in which phase the rank is, how many boundaries it has passed, and how many were looked at.

CPU ranks only, each alone in its process. The training thread pays for the digests, a few percent of a tiny step.
"""

import contextlib
import contextvars
import mmap
import os
import random
import signal
import threading
import time
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

import gossip.intake
import gossip.switchboard
import train
import training.checkpoint
from gossip.evolutionary_node import EvolutionaryNode
from gossip.state import StateBuffer
from gossip.wire import Wire
from runtime.arguments import run_main

FOLDER = Path("witness")
PHASES = ("save", "merge", "transfer")
PAYLOAD_BYTES = 16 * 1024  # what is longer than any message is part of a payload
WIRE_TYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}
QUIET_BOUNDARIES = 10  # of those without a conversation one in so many is looked at


def digest(state: Mapping[str, Tensor], wire_dtype: str = "fp32") -> str:
    """BLAKE3, in hex, of the tensors (float32, on the CPU, contiguous), in the order of their names and rounded as they
    are for the wire: what arrives is rounded already, and rounding it again changes nothing."""
    summed = blake3()
    for name in sorted(state):
        numbers = state[name].detach().to(WIRE_TYPES[wire_dtype])
        summed.update(memoryview(numbers.view(-1).view(torch.uint8).numpy()))
    return summed.hexdigest()


class Board:
    """A rank's shared memory: numbers that outlive a SIGKILL of their writer, each with one writer at a time."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        size = 8 * (3 + 2 * len(PHASES))
        descriptor = os.open(path, os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(descriptor, size)
            self._numbers = memoryview(mmap.mmap(descriptor, size)).cast("Q")
        finally:
            os.close(descriptor)

    @property
    def boundaries(self) -> int:
        """Step boundaries passed by all processes of the rank."""
        return self._numbers[0]

    @property
    def looked_at(self) -> int:
        """Of these, those at which the weights were compared before and after."""
        return self._numbers[1]

    def count_boundary(self, looked_at: bool) -> None:
        """One more."""
        self._numbers[0] += 1
        self._numbers[1] += looked_at

    @property
    def order(self) -> str | None:
        """The phase in which the rank is to kill itself the next time."""
        return PHASES[self._numbers[2] - 1] if self._numbers[2] else None

    @order.setter
    def order(self, phase: str | None) -> None:
        self._numbers[2] = PHASES.index(phase) + 1 if phase else 0

    @property
    def phases(self) -> set[str]:
        """Those that the rank is in; after its death, was in."""
        return {phase for phase in PHASES if self._numbers[_place(phase)]}

    def enter(self, phase: str) -> None:
        """The rank is in `phase` from now on."""
        self._numbers[_place(phase)] = time.monotonic_ns()

    def leave(self, phase: str) -> None:
        """It no longer is."""
        began = self._numbers[_place(phase)]
        if began:
            self._numbers[_place(phase) + 1] = time.monotonic_ns() - began
        self._numbers[_place(phase)] = 0

    def reset(self) -> None:
        """A process begins: it is in no phase, and has no order."""
        self.order = None
        for phase in PHASES:
            self._numbers[_place(phase)] = 0

    def seconds(self, phase: str) -> float:
        """How long `phase` lasted the last time; a millisecond before the first."""
        return (self._numbers[_place(phase) + 1] or 1_000_000) / 1e9


class Witness:
    """Stands beside one rank: wraps what the rank's parts call each other by, and writes down what it sees."""

    def __init__(self, rank: int) -> None:
        self.board = board_of(Path(), rank)
        self.board.reset()
        self.wire_dtype = "fp32"
        self._lines = os.open(lines_of(Path(), rank), os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o600)
        self._payload = contextvars.ContextVar("payload")  # of a conversation: whether it has come to its payload

    def write(self, what: str, text: str) -> None:
        """Append a line; any thread."""
        os.write(self._lines, f"{what}\t{text}\n".encode())

    def attend(self) -> None:
        """Wrap the parts; before train.main()."""
        self._attend_copies()
        self._attend_merges()
        self._attend_boundaries()
        self._attend_transfers()
        self._attend_saves()

    @contextlib.contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """The block is in this phase."""
        self._enter(name)
        try:
            yield
        finally:
            self.board.leave(name)

    def _enter(self, name: str) -> None:
        """Obeys an order to die in this phase: at a moment drawn evenly from as long as it lasted the last time."""
        self.board.enter(name)
        if self.board.order == name:
            delay = random.random() * self.board.seconds(name)
            threading.Timer(delay, os.kill, (os.getpid(), signal.SIGKILL)).start()

    def _attend_copies(self) -> None:
        copy_from = StateBuffer.copy_from

        def witnessed(buffer, tensors):
            copied = copy_from(buffer, tensors)
            self.write("held", digest(buffer.views, self.wire_dtype))
            return copied

        StateBuffer.copy_from = witnessed

    def _attend_merges(self) -> None:
        merge_judged = gossip.intake.merge_judged

        def witnessed(live, schema, peer, *more):
            self.write("merge", digest(peer, self.wire_dtype))
            with self.phase("merge"):
                return merge_judged(live, schema, peer, *more)

        gossip.intake.merge_judged = witnessed

    def _attend_boundaries(self) -> None:
        witness = self

        class WitnessedNode(EvolutionaryNode):
            def __init__(self, **parts) -> None:
                super().__init__(**parts)
                self._witnessed = parts["live"]
                witness.wire_dtype = parts["config"].wire_dtype

            def step_boundary(self, *news):
                looks = self.engaged or witness.board.boundaries % QUIET_BOUNDARIES == 0
                before = digest(self._witnessed) if looks else None
                report = super().step_boundary(*news)
                if looks and report is None and digest(self._witnessed) != before:
                    witness.write("changed", str(news[0]))
                witness.board.count_boundary(looks)
                return report

        train.EvolutionaryNode = WitnessedNode

    def _attend_transfers(self) -> None:
        converse, send, receive_into = gossip.switchboard.converse, Wire.send, Wire.receive_into

        async def witnessed_converse(*parts):
            payload = []
            self._payload.set(payload)
            try:
                return await converse(*parts)
            finally:
                if payload:
                    self.board.leave("transfer")

        async def witnessed_send(wire, content):
            self._pass(content)
            await send(wire, content)

        async def witnessed_receive(wire, target):
            self._pass(target)
            await receive_into(wire, target)

        gossip.switchboard.converse = witnessed_converse
        Wire.send, Wire.receive_into = witnessed_send, witnessed_receive

    def _pass(self, content: bytes | memoryview) -> None:
        payload = self._payload.get(None)
        if payload == [] and len(content) >= PAYLOAD_BYTES:
            payload.append(True)
            self._enter("transfer")

    def _attend_saves(self) -> None:
        atomic_writer = training.checkpoint.atomic_writer

        @contextlib.contextmanager
        def witnessed(path, *more):
            with self.phase("save"), atomic_writer(path, *more) as file:
                yield file

        training.checkpoint.atomic_writer = witnessed


def _place(phase: str) -> int:
    return 3 + 2 * PHASES.index(phase)


def board_of(cwd: Path, rank: int) -> Board:
    """The board of a rank that runs in `cwd`."""
    return Board(cwd / FOLDER / f"rank_{rank:04d}.board")


def lines_of(cwd: Path, rank: int) -> Path:
    """Where the witness of a rank that runs in `cwd` writes."""
    return cwd / FOLDER / f"rank_{rank:04d}.tsv"


def testimony(cwd: Path) -> dict[str, list[str]]:
    """What the witnesses of all ranks that ran in `cwd` wrote: texts by kind."""
    texts: dict[str, list[str]] = {"held": [], "merge": [], "changed": []}
    for path in sorted((cwd / FOLDER).glob("rank_*.tsv")):
        for line in path.read_text().splitlines():
            what, text = line.split("\t")
            texts[what].append(text)
    return texts


def main(arguments: list[str]) -> int:
    """train.py's command line, for the rank that the environment tells."""
    Witness(int(os.environ.get("RANK", "0"))).attend()
    return train.main(arguments)


if __name__ == "__main__":
    run_main(main)
