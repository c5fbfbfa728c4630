"""Moving a whole state between two processes on loopback, beside bare sockets and pickled files; the parts alone.

In turn: sendall / recv_into of the same buffers in pieces of 4 MiB; a whole conversation (handshake, HELLO, DECISION,
the payload with digest and checks at both ends, RECEIPT); the same with numbers in bfloat16 and as remainders of four
bits; the first with the merge behind it; and what the predecessor did: pickle to a file, send that, write it to a file,
unpickle, merge.
"""

import asyncio
import contextlib
import multiprocessing
import os
import socket
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch
from blake3 import blake3
from torch import Tensor

from bench.speed.timing import Goal, Row, Setting, Turns
from gossip.config import GossipConfig
from gossip.decision import Policy
from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.exchange import PIECE_BYTES as ENGINE_PIECE_BYTES
from gossip.exchange import converse
from gossip.handshake import authenticate, run_key
from gossip.merge import merge
from gossip.network_utils import listen
from gossip.protocol import Hello
from gossip.state import Rule, Schema, Snapshot, StateBuffer, payload_fault, weight_energy
from gossip.wire import Channel, Wire
from gossip.wire_format import wire_format
from runtime.ranks import Identity

KEY = run_key(bytes(32), "bench")
TENSOR_ITEMS = 1024 * 1024
PIECE_BYTES = 4 * 1024 * 1024  # of the bare sockets and of files
MEGABYTES = 200
MERGE_MOVES = 5  # states: reads the live one, the peer's and one's own, writes the live one and what it overwrote


class BenchParty:
    """An end whose snapshot is ready at once, and alike at both; live: what it merges into."""

    scalar_names = frozenset({"k"})
    gene_names = frozenset()

    def __init__(self, live: dict[str, Tensor], schema: Schema, rank: int) -> None:
        self.live, self.schema = live, schema
        self.send_buffer = self.receive_buffer = StateBuffer(schema)
        self.send_buffer.copy_from(live)
        self.rank = rank
        self.speak("fp32")

    def speak(self, wire_dtype: str) -> None:
        """Let numbers travel so from now on; as they are, in whole states, which take no snapshot at the receiver."""
        self.policy = Policy("clonal" if wire_dtype == "fp32" else "recombination", "ema")
        self.wire_dtype, self.wire_format = wire_dtype, wire_format(wire_dtype, ENGINE_PIECE_BYTES)

    def hello(self, theirs: Hello | None) -> Hello:
        return Hello("bench", self.schema.hash, self.rank, f"{self.rank:032x}", 0, 0, 0, float(self.rank), True)

    def distrusts(self, theirs: Hello) -> bool:
        return False

    def claim(self) -> bool:
        return True

    async def snapshot(self, generation: int) -> Snapshot:
        return Snapshot(self.send_buffer, 0, generation, 0, {"k": 0.0}, {})


def make_state(megabytes: int) -> tuple[dict[str, Tensor], Schema]:
    """y, z and v in tensors of 4 MB, as many as it takes."""
    live, rules = {}, {}
    torch.manual_seed(0)
    for number in range(max(megabytes * 10**6 // (3 * 4 * TENSOR_ITEMS), 1)):
        for part, rule in (("y", Rule.WEIGHT), ("z", Rule.WEIGHT), ("v", Rule.SECOND_MOMENT)):
            live[f"{number}.{part}"] = torch.rand(TENSOR_ITEMS) + 1
            rules[f"{number}.{part}"] = rule
    return live, Schema.of(live, rules, {})


def measure(setting: Setting) -> Iterator[Row]:
    """Rates of the ways to move a state, then the parts of ours, then a step boundary at which nothing waits."""
    megabytes = 1 if setting.quick else MEGABYTES
    live, schema = make_state(megabytes)
    size = f"{schema.nbytes / 1e6:.0f} MB"
    party = BenchParty(live, schema, rank=0)
    with _peer(megabytes) as (pipe, port):
        ways = (
            "bare sockets", "conversation", "conversation in bf16", "conversation in int4", "conversation and merge",
            "pickled files and merge",
        )  # fmt: skip
        turns = Turns(setting, {way: lambda way=way: _send(way, pipe, port, party) for way in ways}, rounds=9)
    spare = len(os.sched_getaffinity(0)) >= 4
    goals = (None, None) if setting.quick else (Goal(">=", 0.8 if spare else 0.55), Goal(">=", 5))
    yield turns.share_of(f"{size}, a conversation", "conversation", "bare sockets", goals[0])
    yield turns.faster(f"{size}, with the merge", "conversation and merge", "pickled files and merge", goals[1])
    yield Row(f"{size}, a conversation", schema.nbytes / turns.median("conversation") / 1e9, "GB/s")
    for wire_dtype in ("bf16", "int4"):
        yield turns.faster(f"{size}, a conversation in {wire_dtype}", f"conversation in {wire_dtype}", "conversation")
    yield from _parts(setting, party, size)
    yield _boundary(setting, live, schema)


def _parts(setting: Setting, party: BenchParty, size: str) -> Iterator[Row]:
    live, schema = party.live, party.schema
    peer, own = StateBuffer(schema), party.send_buffer
    peer.copy_from(live)
    source = torch.ones(schema.nbytes * MERGE_MOVES // 8)
    target = torch.zeros_like(source)
    forms: dict[str, Callable[[], object]] = {
        "merge": lambda: merge(live, schema, peer.views, own.views, "recombination", 0.5),
        "copy of its bytes": lambda: target.copy_(source),
        "snapshot": lambda: own.copy_from(live),
        "copy of a state": lambda: target[: schema.nbytes // 4].copy_(source[: schema.nbytes // 4]),
        "digest": lambda: blake3(own.bytes).digest(),
        "checks": lambda: payload_fault(schema, 0, own.bytes),
        "norm": lambda: weight_energy(schema, 0, own.bytes),
    }
    turns = Turns(setting, forms, rounds=9)
    goal = None if setting.quick else Goal(">=", 0.8)
    yield turns.share_of(f"{size}, merge (training waits)", "merge", "copy of its bytes", goal)
    yield turns.share_of(f"{size}, snapshot (training waits)", "snapshot", "copy of a state")
    for part in ("digest", "checks", "norm"):
        yield Row(f"{size}, {part}", turns.median(part) * 1e3, "ms")


def _boundary(setting: Setting, live: dict[str, Tensor], schema: Schema) -> Row:
    with tempfile.TemporaryDirectory() as folder:
        node = EvolutionaryNode(
            Identity(0, 0, 1, 1, "alone"), "bench", Path(folder), listen("127.0.0.1", 0), schema, live, dict,
            GossipConfig(mixing_rate=0.01), EventLog(Path(folder) / "events.tsv", 0), 0, None, bytes(32),
        )  # fmt: skip
        node.start()
        steps, times = 1_000 if setting.quick else 100_000, []
        for _ in range(setting.times(5)):
            began = time.perf_counter()
            for step in range(steps):
                node.step_boundary(step, step, 1.0, {})
            times.append((time.perf_counter() - began) / steps)
        node.close()
    return Row("a step boundary at which nothing waits", statistics.median(times) * 1e6, "us")


@contextlib.contextmanager
def _peer(megabytes: int) -> Iterator[tuple[Connection, int]]:
    """The other process: its pipe, and the port at which it listens."""
    spawn = multiprocessing.get_context("spawn")
    pipe, far_end = spawn.Pipe()
    process = spawn.Process(target=_receiver, args=(far_end, megabytes, torch.get_num_threads()))
    process.start()
    far_end.close()
    try:
        yield pipe, pipe.recv()
        pipe.send("end")
    finally:
        pipe.close()
        process.join()


def _receiver(pipe: Connection, megabytes: int, threads: int) -> None:
    """Takes in a state in the way that the pipe names, and says so when it is done."""
    torch.set_num_threads(threads)
    party = BenchParty(*make_state(megabytes), rank=1)
    own = StateBuffer(party.schema)
    own.copy_from(party.live)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while (way := pipe.recv()) != "end":
            connection, _ = listener.accept()
            with connection:
                if way == "bare sockets":
                    _fill(connection, party.receive_buffer.bytes)
                elif way.startswith("conversation"):
                    asyncio.run(_talk(way, connection, party, initiator=False))
                    if way.endswith("merge"):
                        views = party.receive_buffer.views
                        merge(party.live, party.schema, views, own.views, "recombination", 0.5)
                else:
                    _receive_pickled(connection, party.live)
            pipe.send("done")


def _send(way: str, pipe: Connection, port: int, party: BenchParty) -> None:
    """One transfer to the peer process, from connecting until it is done."""
    pipe.send(way)
    with socket.create_connection(("127.0.0.1", port)) as connection:
        if way == "bare sockets":
            for piece in _pieces(party.send_buffer.bytes):
                connection.sendall(piece)
        elif way.startswith("conversation"):
            asyncio.run(_talk(way, connection, party, initiator=True))
        else:
            _send_pickled(connection, party.live)
    pipe.recv()


async def _talk(way: str, connection: socket.socket, party: BenchParty, initiator: bool) -> None:
    wire = Wire(connection)
    party.speak(way.removeprefix("conversation in ") if " in " in way else "fp32")
    session = await authenticate(wire, KEY, initiator)
    await converse(Channel(wire, session.send_key, session.receive_key), party, initiator)


def _send_pickled(connection: socket.socket, live: dict[str, Tensor]) -> None:
    with tempfile.TemporaryFile() as file:
        torch.save(live, file)
        file.seek(0)
        while content := file.read(PIECE_BYTES):
            connection.sendall(content)


def _receive_pickled(connection: socket.socket, live: dict[str, Tensor]) -> None:
    with tempfile.TemporaryFile() as file:
        while content := connection.recv(PIECE_BYTES):
            file.write(content)
        file.seek(0)
        arrived = torch.load(file)
    for name, tensor in live.items():
        tensor.lerp_(arrived[name], 0.5)


def _fill(connection: socket.socket, target: memoryview) -> None:
    for piece in _pieces(target):
        while piece:
            piece = piece[connection.recv_into(piece) :]


def _pieces(content: memoryview) -> Iterator[memoryview]:
    return (content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES))
