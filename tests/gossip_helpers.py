"""Populations of real nodes in one process, and a peer made of blocking sockets that can be made to misbehave."""

import contextlib
import csv
import dataclasses
import math
import socket
import struct
import threading
import time
from typing import ClassVar

import torch
from blake3 import blake3

from gossip.config import GossipConfig
from gossip.decision import Policy, decide
from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.handshake import ANSWERER, CALLER, proof, run_key, session
from gossip.network_utils import listen
from gossip.protocol import (
    HEADER_BYTES,
    MAC_BYTES,
    MERGE_METHODS,
    OPENING_BYTES,
    PROOF_BYTES,
    Busy,
    Decision,
    End,
    Flow,
    Hello,
    Receipt,
    SnapshotHeader,
    decode_frame,
    decode_header,
    encode_frame,
    encode_opening,
)
from gossip.state import Rule, Schema, StateBuffer
from runtime.ranks import Identity

SECRET = bytes(range(32))
RUN_ID = "run"
POLICY_NAMES = [field.name for field in dataclasses.fields(Policy)]
BY_EMA = [Policy(method, "ema") for method in MERGE_METHODS]
PATIENCE = 20.0  # seconds: how long a test waits for what must happen


def make_state(value=1.0, shapes=((300, 7), (5,)), terms=None):
    """(live, schema): a y, a z and a second moment of each shape, all filled with `value`."""
    live, rules = {}, {}
    for number, shape in enumerate(shapes):
        for part, rule in (("y", Rule.WEIGHT), ("z", Rule.WEIGHT), ("v", Rule.SECOND_MOMENT)):
            live[f"{number}.{part}"] = torch.full(shape, float(value))
            rules[f"{number}.{part}"] = rule
    return live, Schema.of(live, rules, terms or {"sf_beta": 0.9})


class Rank:
    """A started node with a tiny state; `train` is one optimizer step that changes nothing."""

    def __init__(
        self, folder, rank, value=1.0, state=None, world_size=8, seed=0, duty=None, port=0, judge=None, run_id=RUN_ID,
        genes=None, **config,
    ):  # fmt: skip
        self.live, self.schema = state or make_state(value)
        self.log = EventLog(folder / "gossip_logs" / f"run_rank_{rank:04d}.tsv", rank)
        config = {"mixing_rate": 0.0, "filesystem_coordinator": False, "wire_dtype": "fp32", **config}
        chosen = {"fitness": "ema"} | {name: config.pop(name) for name in POLICY_NAMES if name in config}
        config["policy"] = Policy(**chosen)
        self.genes = genes or {}
        self.scalars = {"k": float(rank)}
        self.step = self.lineage = 0
        self.fitness = self.evidence = self.known = None
        self.node = EvolutionaryNode(
            Identity(rank, rank, world_size, world_size, "alone"), run_id, folder, listen("127.0.0.1", port),
            self.schema, self.live, lambda: self.scalars, GossipConfig(**config), self.log, seed, duty, SECRET,
            judge, lambda: self.known, lambda: self.genes,
        )  # fmt: skip
        self.node.start()
        self.boundary()

    @property
    def where(self):
        host, port = self.node.address.split(":")
        return host, int(port)

    def boundary(self):
        return self.node.step_boundary(self.step, self.lineage, self.fitness, {}, self.evidence)

    def call(self):
        """Ask for a call, as a lucky throw of the dice does."""
        self.node._switchboard.ring()

    @property
    def idle(self):
        """In no conversation, and not about to begin one."""
        return not self.node.engaged and self.node._switchboard._calling is None

    def events(self):
        with open(self.log.path, newline="") as file:
            return list(csv.DictReader(file, delimiter="\t"))


@contextlib.contextmanager
def ranks(*made):
    try:
        yield made
    finally:
        for rank in made:
            rank.node.close()
            rank.log.close()


def until(condition, *turns):
    """Give every rank in `turns` step boundaries until `condition` holds; returns what it gave."""
    deadline = time.monotonic() + PATIENCE
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        for rank in turns:
            rank.boundary()
        time.sleep(0.0005)  # leaves the core to the network threads
    return result


def call_until(condition, caller, *turns):
    """until(), with a call at once, and again each second in which nobody talks: an end that is not yet done with its
    last conversation answers BUSY."""
    called = -math.inf

    def called_and_done():
        nonlocal called
        if all(rank.idle for rank in turns) and time.monotonic() > called + 1:
            called = time.monotonic()
            caller.call()
        return condition()

    return until(called_and_done, *turns)


def values_of(rank):
    return {float(value) for tensor in rank.live.values() for value in tensor.unique()}


def counted(rank, **expected):
    counters = vars(rank.node.counters)
    return all(counters[name] == value for name, value in expected.items())


def last_event(rank):
    return until(rank.events)[-1]


class Trainer:
    """A training thread that writes the step's number into every tensor, all the time.

    torn: it serves snapshots in the middle of a step, as no node does.
    """

    def __init__(self, rank, torn=False):
        self.rank, self.torn = rank, torn
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._train)

    def __enter__(self):
        self._thread.start()
        return self

    def __exit__(self, *_):
        self._stop.set()
        self._thread.join()

    def _train(self):
        rank = self.rank
        while not self._stop.is_set():
            rank.step += 1
            rank.node.before_write()
            for number, tensor in enumerate(rank.live.values()):
                tensor.fill_(rank.step)
                if self.torn and number == 1:
                    rank.node._desk.serve()
            rank.boundary()


def hello(schema, rank=7, **changes):
    fields = {
        "run_id": RUN_ID, "schema_hash": schema.hash, "rank": rank, "incarnation": "ab" * 16, "step": 5,
        "generation": 0, "lineage": 0, "fitness": 1.0, "accepts": True,
    }  # fmt: skip
    return Hello(**{**fields, **changes})


def read(connection, nbytes):
    """The next `nbytes`. Raises EOFError when they end early."""
    content = b""
    while len(content) < nbytes:
        piece = connection.recv(nbytes - len(content))
        if not piece:
            raise EOFError
        content += piece
    return content


class RawPeer:
    """One end of a conversation on a blocking socket, step by step, with the secret unless told otherwise."""

    made: ClassVar[list["RawPeer"]] = []

    def __init__(self, connection, initiator=True, secret=SECRET, run_id=RUN_ID):
        self.socket = connection
        self.socket.settimeout(PATIENCE)
        self.initiator = initiator
        self.key = run_key(secret, run_id)
        self.sent = self.received = 0
        self.session = None
        self.made.append(self)

    @classmethod
    def call(cls, where, **options):
        return cls(socket.create_connection(where, timeout=PATIENCE), **options)

    @classmethod
    def close_all(cls):
        while cls.made:
            cls.made.pop().close()

    def read(self, nbytes):
        return read(self.socket, nbytes)

    def closed(self):
        """Wait for the other end to close."""
        try:
            while self.socket.recv(65536):
                pass
        except ConnectionError:
            pass
        return True

    def openings(self, nonce=bytes(32)):
        mine = encode_opening(nonce)
        if self.initiator:
            self.socket.sendall(mine)
            return mine + self.read(OPENING_BYTES)
        theirs = self.read(OPENING_BYTES)
        self.socket.sendall(mine)
        return theirs + mine

    def handshake(self):
        transcript = self.openings()
        if self.initiator:
            self.socket.sendall(proof(self.key, CALLER, transcript))
            assert self.read(PROOF_BYTES) == proof(self.key, ANSWERER, transcript)
        else:
            assert self.read(PROOF_BYTES) == proof(self.key, CALLER, transcript)
            self.socket.sendall(proof(self.key, ANSWERER, transcript))
        self.session = session(self.key, transcript, self.initiator)
        return self

    def frame(self, message):
        frame = encode_frame(message, self.sent, self.session.send_key)
        self.sent += 1
        return frame

    def frame_of(self, number, body):
        """A frame of kind `number` under the right MAC, whatever its body is."""
        content = struct.pack(">BBHIQ", number, 0, 0, len(body), self.sent) + body
        self.sent += 1
        return content + blake3(content, key=self.session.send_key).digest()

    def send(self, message):
        self.socket.sendall(self.frame(message))

    def receive(self, *kinds):
        header = self.read(HEADER_BYTES)
        kind, length = decode_header(header, self.received, kinds)
        self.received += 1
        return decode_frame(kind, header, self.read(length + MAC_BYTES), self.session.receive_key)

    def greet(self, mine, *policies):
        """HELLOs and DECISIONs; returns the peer's HELLO and the decision, or (Busy, None)."""
        if self.initiator:
            self.send(mine)
            theirs = self.receive(Hello, Busy)
            if isinstance(theirs, Busy):
                return theirs, None
        else:
            theirs = self.receive(Hello)
            self.send(mine)
        pair = (mine, theirs) if self.initiator else (theirs, mine)
        decision = self.receive(Decision)
        assert decision in [decide(*pair, policy) for policy in policies or BY_EMA]
        self.send(decision)
        return theirs, decision

    def send_snapshot(self, schema, payload, scalars=None, digest=None, **changes):
        header = {
            "step": 5,
            "generation": 0,
            "lineage": 0,
            "nbytes": schema.nbytes,
            "scalars": scalars or {"k": 7.0},
            **changes,
        }
        self.send(SnapshotHeader(**header))
        self.socket.sendall(payload)
        self.send(End(digest or blake3(payload).hexdigest()))

    def receive_snapshot(self):
        header = self.receive(SnapshotHeader)
        payload = self.read(header.nbytes)
        assert self.receive(End).digest == blake3(payload).hexdigest()
        self.send(Receipt(True))
        return header, payload

    def close(self):
        self.socket.close()


def payload_of(live, schema):
    """What a peer sends whose state is `live`, as a bytearray."""
    buffer = StateBuffer(schema)
    buffer.copy_from(live)
    return bytearray(buffer.bytes)


def assert_answers(rank):
    """The node holds the next conversation as if nothing had been."""
    good = RawPeer.call(rank.where).handshake()
    assert good.greet(hello(rank.schema, fitness=None))[1].flow is Flow.NONE
    until(lambda: counted(rank, tied=1), rank)
    good.close()
