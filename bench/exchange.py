"""What an exchange costs beside bare sockets that move the same buffer: `python -m bench.exchange`.

Two processes on loopback, in turn: sendall / recv_into in pieces of 4 MiB, then a whole conversation (handshake, HELLO,
DECISION, the payload with digest and checks at both ends, RECEIPT). Medians, and the median of each round's ratio.
"""

import argparse
import asyncio
import multiprocessing
import socket
import statistics
import tempfile
import time
from pathlib import Path

import torch
from blake3 import blake3

from gossip.decision import Policy
from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode, GossipConfig
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
PIECE_BYTES = 4 * 1024 * 1024  # of the bare sockets


class BenchParty:
    """An end whose snapshot is ready at once."""

    policy = Policy(method="clonal")
    scalar_names = frozenset({"k"})
    gene_names = frozenset()

    def __init__(self, schema: Schema, rank: int) -> None:
        self.schema = schema
        self.send_buffer = self.receive_buffer = StateBuffer(schema)
        self.wire_format = wire_format("fp32", ENGINE_PIECE_BYTES)
        self.rank = rank

    def hello(self, theirs: Hello | None) -> Hello:
        return Hello("bench", self.schema.hash, self.rank, f"{self.rank:032x}", 0, 0, 0, float(self.rank), True)

    def distrusts(self, theirs: Hello) -> bool:
        return False

    def claim(self) -> bool:
        return True

    async def snapshot(self, generation: int) -> Snapshot:
        return Snapshot(self.send_buffer, 0, generation, 0, {"k": 0.0}, {})


def make_state(megabytes: int) -> tuple[dict[str, torch.Tensor], Schema]:
    """y, z and v in tensors of 4 MB, as many as it takes."""
    live, rules = {}, {}
    for number in range(max(megabytes * 10**6 // (3 * 4 * TENSOR_ITEMS), 1)):
        for part, rule in (("y", Rule.WEIGHT), ("z", Rule.WEIGHT), ("v", Rule.SECOND_MOMENT)):
            live[f"{number}.{part}"] = torch.rand(TENSOR_ITEMS)
            rules[f"{number}.{part}"] = rule
    return live, Schema.of(live, rules, {})


async def talk(connection: socket.socket, party: BenchParty, initiator: bool) -> None:
    wire = Wire(connection)
    session = await authenticate(wire, KEY, initiator)
    await converse(Channel(wire, session.send_key, session.receive_key), party, initiator)


def receiver(pipe, megabytes: int) -> None:
    """The peer process: takes in a buffer for each word on the pipe, "raw" or "exchange"."""
    party = BenchParty(make_state(megabytes)[1], rank=1)
    with socket.create_server(("127.0.0.1", 0)) as listener:
        pipe.send(listener.getsockname()[1])
        while (way := pipe.recv()) != "end":
            connection, _ = listener.accept()
            with connection:
                if way == "exchange":
                    asyncio.run(talk(connection, party, initiator=False))
                    continue
                for piece in pieces(party.receive_buffer.bytes):
                    while piece:
                        piece = piece[connection.recv_into(piece) :]
                connection.sendall(b".")


def seconds_of(way: str, port: int, party: BenchParty) -> float:
    """One transfer to the peer process, from connecting to its last word."""
    began = time.perf_counter()
    with socket.create_connection(("127.0.0.1", port)) as connection:
        if way == "exchange":
            asyncio.run(talk(connection, party, initiator=True))
        else:
            for piece in pieces(party.send_buffer.bytes):
                connection.sendall(piece)
            connection.recv(1)
    return time.perf_counter() - began


def pieces(content: memoryview):
    return (content[start : start + PIECE_BYTES] for start in range(0, len(content), PIECE_BYTES))


def median_seconds(action, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        began = time.perf_counter()
        action()
        times.append(time.perf_counter() - began)
    return statistics.median(times)


def measure_transfers(live: dict, schema: Schema, megabytes: int, repeats: int) -> None:
    party = BenchParty(schema, rank=0)
    party.send_buffer.copy_from(live)
    spawn = multiprocessing.get_context("spawn")
    pipe, far_end = spawn.Pipe()
    process = spawn.Process(target=receiver, args=(far_end, megabytes))
    process.start()
    port = pipe.recv()
    times = {"raw": [], "exchange": []}
    for turn in range(repeats + 1):
        for way, found in times.items():
            pipe.send(way)
            seconds = seconds_of(way, port, party)
            if turn > 0:  # the first warms up
                found.append(seconds)
    pipe.send("end")
    process.join()
    for way, found in times.items():
        print(f"{way:10s} {schema.nbytes / statistics.median(found) / 1e9:6.2f} GB/s")
    ratios = [raw / ours for raw, ours in zip(times["raw"], times["exchange"], strict=True)]
    print(f"ratio      {statistics.median(ratios):6.2f} of bare sockets")


def measure_parts(live: dict, schema: Schema, repeats: int) -> None:
    """What each part takes alone, per whole state; and a step boundary at which nothing waits."""
    own, peer = StateBuffer(schema), StateBuffer(schema)
    own.copy_from(live)
    peer.copy_from(live)
    parts = {
        "digest": lambda: blake3(own.bytes).digest(),
        "checks": lambda: [payload_fault(schema, 0, own.bytes)],
        "norm": lambda: [weight_energy(schema, 0, own.bytes)],
        "snapshot (training waits)": lambda: own.copy_from(live),
        "merge (training waits)": lambda: merge(live, schema, peer.views, own.views, "recombination", 0.5),
    }
    for name, action in parts.items():
        seconds = median_seconds(action, repeats)
        print(f"{name:28s} {seconds * 1e3:8.1f} ms   {schema.nbytes / seconds / 1e9:6.2f} GB/s")
    with tempfile.TemporaryDirectory() as folder:
        node = EvolutionaryNode(
            Identity(0, 0, 1, 1, "alone"), "bench", Path(folder), listen("127.0.0.1", 0), schema, live, dict,
            GossipConfig(), EventLog(Path(folder) / "events.tsv", 0), 0, None, bytes(32),
        )  # fmt: skip
        node.start()
        steps = 100_000
        seconds = median_seconds(lambda: [node.step_boundary(step, step, 1.0, {}) for step in range(steps)], 5)
        node.close()
    print(f"step boundary, nothing waits {seconds / steps * 1e6:8.2f} us")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--megabytes", type=int, default=200, help="size of the state, 10^6 bytes")
    parser.add_argument("--repeats", type=int, default=9, help="rounds, of which medians are taken")
    arguments = parser.parse_args()
    live, schema = make_state(arguments.megabytes)
    print(f"state      {schema.nbytes / 1e6:6.0f} MB, {torch.get_num_threads()} torch threads")
    measure_transfers(live, schema, arguments.megabytes, arguments.repeats)
    measure_parts(live, schema, arguments.repeats)


if __name__ == "__main__":
    main()
