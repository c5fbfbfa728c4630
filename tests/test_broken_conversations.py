"""Two real nodes and a meddler between them, who spoils one message of their conversation: cuts it off, flips a bit,
resets the connection, repeats, reflects or replays. At every phase, in both directions: no wrong byte reaches a
weight, both ends say what happened, and their next conversation is as good as any."""

import contextlib
import socket
import struct
import threading

import pytest

from bench.injection import Injection
from gossip.faults import Fault
from gossip.protocol import HEADER_BYTES, MAC_BYTES, OPENING_BYTES, PROOF_BYTES
from tests.gossip_helpers import PATIENCE, Rank, RawPeer, call_until, counted, last_event, ranks, read, until, values_of

SENDER = ("opening", "proof", "hello", "decision", "snapshot", "payload", "end")  # what the fitter one says
RECEIVER = ("opening", "proof", "hello", "decision", "receipt")
CUT_OFF = {Fault.CLOSED, Fault.REFUSED}
# What a reader calls one flipped bit, by where it was.
FLIPPED = {
    "opening": {Fault.BAD_MAGIC, Fault.WRONG_VERSION, Fault.WRONG_SECRET, Fault.REFUSED},
    "proof": {Fault.WRONG_SECRET},
    "payload": {Fault.DIGEST_MISMATCH},
}
FRAME_FLIPPED = {Fault.BAD_MAC, Fault.MALFORMED, Fault.UNEXPECTED}
REPEATED = {"opening": {Fault.WRONG_SECRET}, "hello": {Fault.BAD_SEQUENCE}, "decision": {Fault.BAD_SEQUENCE}}
MISREAD = {Fault.MALFORMED, Fault.OVERSIZE}  # bytes that are taken for a frame's header


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


class Meddler:
    """Passes bytes between a caller and the node at `target`, message by message, and keeps them in `heard`.

    spoil(role, phase, message) is asked of each message of the "sender" or "receiver" of the weights: it returns what
    is passed on, "cut" or "reset" for an end of both connections after half of it. `fit_calls`: the sender calls.
    """

    def __init__(self, payload_bytes, fit_calls):
        self.payload_bytes = payload_bytes
        self.roles = ("sender", "receiver") if fit_calls else ("receiver", "sender")  # of the caller, of the answerer
        self.spoil = lambda role, phase, message: message
        self.heard = {"sender": b"", "receiver": b""}
        self.target = None
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.address = "{}:{}".format(*self._listener.getsockname())
        self._pairs, self._ended = [], []
        self._ending = threading.Lock()
        self._threads = [threading.Thread(target=self._serve)]

    def __enter__(self):
        self._threads[0].start()
        return self

    def __exit__(self, *_):
        self._listener.shutdown(socket.SHUT_RDWR)
        for connection in [end for pair in self._pairs for end in pair]:
            with contextlib.suppress(OSError):
                connection.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join()
        for connection in [self._listener, *(end for pair in self._pairs for end in pair)]:
            connection.close()

    def _serve(self):
        while True:
            try:
                caller, _ = self._listener.accept()
            except OSError:
                return
            caller.settimeout(PATIENCE)
            self._pairs.append(pair := (caller, socket.create_connection(self.target, timeout=PATIENCE)))
            for role, (source, sink) in zip(self.roles, (pair, pair[::-1]), strict=True):
                thread = threading.Thread(target=self._pump, args=(role, source, sink, pair))
                self._threads.append(thread)
                thread.start()

    def _pump(self, role, source, sink, pair):
        phases = SENDER if role == "sender" else RECEIVER
        try:
            for phase in phases:
                message = self._read(source, phase)
                self.heard[role] += message
                passed = self.spoil(role, phase, message)
                if passed in ("cut", "reset"):
                    sink.sendall(message[: len(message) // 2])
                    self._end(pair, passed)
                    return
                sink.sendall(passed)
            self._read(source, "the end")
        except (OSError, EOFError):
            self._end(pair, "cut")

    def _read(self, source, phase):
        sizes = {"opening": OPENING_BYTES, "proof": PROOF_BYTES, "payload": self.payload_bytes}
        if phase in sizes:
            return read(source, sizes[phase])
        header = read(source, HEADER_BYTES)
        return header + read(source, struct.unpack(">4xI8x", header)[0] + MAC_BYTES)

    def _end(self, pair, how):
        with self._ending:
            if pair in self._ended:
                return
            self._ended.append(pair)
        for connection in pair:
            with contextlib.suppress(OSError):  # its peer may have ended it already
                if how == "reset":
                    connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                    connection.shutdown(socket.SHUT_RD)  # whoever reads it here lets go: only then does close() reset
                    connection.close()
                else:
                    connection.shutdown(socket.SHUT_RDWR)


class Scene:
    """A fit rank of ones, an unfit one of threes, and the meddler that one calls the other through."""

    def __init__(self, folder, fit_calls, seconds=PATIENCE):
        self.fit = Rank(folder, 0, 1.0, method="clonal", exchange_seconds=seconds)
        self.unfit = Rank(folder, 1, 3.0, method="clonal", exchange_seconds=seconds)
        self.caller, self.answerer = (self.fit, self.unfit) if fit_calls else (self.unfit, self.fit)
        self.meddler = Meddler(self.fit.schema.nbytes, fit_calls)
        self.meddler.target = self.answerer.where
        self.caller.node._peers = (self.meddler.address,)
        self.fit.fitness, self.unfit.fitness = 1.0, 2.0
        self.boundary()

    def boundary(self):
        self.fit.boundary()
        self.unfit.boundary()

    def idle(self):
        return self.fit.idle and self.unfit.idle

    def call(self):
        self.caller.call()
        until(lambda: self.caller.node.counters.initiated, self)
        until(self.idle, self)

    def fault(self, rank):
        """The fault that ended the rank's newest conversation."""
        message = last_event(rank)["message"]
        return next(fault for fault in Fault if message.split(":")[0] == fault.value)

    def ends(self, reader, faults, merged, reason=""):
        """One conversation in which `reader` found one of `faults` and the other end failed too, unless the unfit one
        had `merged` before: then whole, and it is the fit one that does not know. After it they mix as ever.

        reason: what is said of a connection that was closed.
        """
        self.call()
        until(lambda: counted(reader, failed=1), self)
        assert self.fault(reader) in faults
        assert self.fault(reader) is not Fault.CLOSED or reason in last_event(reader)["message"]
        expected = {"failed": 0, "lost": 1} if merged else {"failed": 1, "lost": 0}
        until(lambda: counted(self.unfit, **expected) and counted(self.fit, failed=1, won=0), self)
        assert values_of(self.fit) == {1.0} and values_of(self.unfit) == ({1.0} if merged else {3.0})
        self.meddler.spoil = lambda role, phase, message: message
        self.unfit.fitness = 2.0
        until(self.idle, self)
        call_until(
            lambda: counted(self.fit, won=1) and counted(self.unfit, lost=1 + merged), self.caller, self.fit, self.unfit
        )
        assert values_of(self.fit) == values_of(self.unfit) == {1.0}


@contextlib.contextmanager
def scene(folder, fit_calls, **options):
    made = Scene(folder, fit_calls, **options)
    with ranks(made.fit, made.unfit), made.meddler:
        yield made


def every_phase(but=()):
    """Parametrizes a test by who calls, by whose message is spoilt and by which of its messages."""
    cases = [("sender", phase) for phase in SENDER] + [("receiver", phase) for phase in RECEIVER]
    cases = [(role, phase) for role, phase in cases if phase not in but]

    def decorate(test):
        test = pytest.mark.parametrize(("role", "phase"), cases, ids=["-".join(case) for case in cases])(test)
        return pytest.mark.parametrize("fit_calls", [True, False], ids=["sender-calls", "receiver-calls"])(test)

    return decorate


def reader_of(stage, role):
    return stage.unfit if role == "sender" else stage.fit


def spoiler(role, phase, how):
    """A meddler's spoil() that does `how` to one message, and passes the others on."""
    return lambda *place_and: how(place_and[2]) if place_and[:2] == (role, phase) else place_and[2]


@pytest.mark.injects(Injection.TRUNCATION)
@every_phase()
def test_nodes_survive_a_conversation_that_is_cut_off(tmp_path, fit_calls, role, phase):
    with scene(tmp_path, fit_calls) as stage:
        stage.meddler.spoil = spoiler(role, phase, lambda message: "cut")
        stage.ends(reader_of(stage, role), CUT_OFF, merged=phase == "receipt")


@pytest.mark.injects(Injection.RESET)
@every_phase()
def test_nodes_survive_a_connection_that_is_reset(tmp_path, fit_calls, role, phase):
    with scene(tmp_path, fit_calls) as stage:
        stage.meddler.spoil = spoiler(role, phase, lambda message: "reset")
        stage.ends(reader_of(stage, role), CUT_OFF, merged=phase == "receipt", reason="reset by peer")


@pytest.mark.injects(Injection.BIT_FLIP)
@pytest.mark.parametrize("place", [0, 0.5, 1], ids=["first", "middle", "last"])
@every_phase()
def test_nodes_find_a_flipped_bit(tmp_path, fit_calls, role, phase, place):
    def flip(message):
        flipped = bytearray(message)
        flipped[int(place * (len(message) - 1))] ^= 1
        return bytes(flipped)

    with scene(tmp_path, fit_calls) as stage:
        stage.meddler.spoil = spoiler(role, phase, flip)
        stage.ends(reader_of(stage, role), FLIPPED.get(phase, FRAME_FLIPPED), merged=phase == "receipt")


@pytest.mark.injects(Injection.BIT_FLIP, Injection.HUGE_LENGTH)
@pytest.mark.parametrize(("bit", "faults"), [(0x80, {Fault.OVERSIZE}), (0x01, {Fault.DEADLINE, Fault.CLOSED})])
@pytest.mark.parametrize("fit_calls", [True, False], ids=["sender-calls", "receiver-calls"])
def test_nodes_find_a_flipped_length(tmp_path, fit_calls, bit, faults):
    """Of a HELLO: a length that is beyond the bound is refused at once, one that is a little too long waited for."""

    def flip(message):
        return message[:4] + bytes([message[4] ^ bit]) + message[5:] if bit == 0x80 else longer(message)

    def longer(message):
        length = struct.unpack(">I", message[4:8])[0]
        return message[:4] + struct.pack(">I", length + 1) + message[8:]

    with scene(tmp_path, fit_calls, seconds=0.6) as stage:
        stage.meddler.spoil = spoiler("sender" if fit_calls else "receiver", "hello", flip)
        stage.ends(stage.answerer, faults, merged=False)


@pytest.mark.injects(Injection.REPEATED_MESSAGE)
@every_phase(but=("end", "receipt"))  # after them the reader reads nothing more
def test_nodes_find_a_message_that_comes_twice(tmp_path, fit_calls, role, phase):
    with scene(tmp_path, fit_calls) as stage:
        stage.meddler.spoil = spoiler(role, phase, lambda message: message * 2)
        stage.ends(
            reader_of(stage, role),
            REPEATED.get(phase, MISREAD),
            # The receiver's second DECISION comes where the sender waits for its word: that is on its way by then.
            merged=role == "receiver" and phase == "decision",
        )


@pytest.mark.injects(Injection.REFLECTED_MESSAGE)
@pytest.mark.parametrize("fit_calls", [True, False], ids=["sender-calls", "receiver-calls"])
@pytest.mark.parametrize(
    ("to", "phase"),
    [("caller", "opening"), ("caller", "proof"), ("caller", "hello"), ("caller", "decision"), ("answerer", "decision")],
)  # an answerer says all else only after it has heard the caller's
def test_nodes_find_their_own_message_sent_back(tmp_path, fit_calls, to, phase):
    said = {}

    def reflect(role, spoken, message):
        said[role, spoken] = message
        if (role, spoken) == (speaker, phase):
            return until(lambda: said.get((reader, phase)))
        return message

    with scene(tmp_path, fit_calls) as stage:
        reader, speaker = stage.meddler.roles if to == "caller" else stage.meddler.roles[::-1]
        stage.meddler.spoil = reflect
        faults = {Fault.REFUSED} if phase == "opening" else {Fault.WRONG_SECRET, Fault.BAD_MAC}
        stage.ends(stage.caller if to == "caller" else stage.answerer, faults, merged=False)


@pytest.mark.injects(Injection.REPLAYED_MESSAGE)
@pytest.mark.parametrize("fit_calls", [True, False], ids=["sender-calls", "receiver-calls"])
@pytest.mark.parametrize("to", ["answerer", "caller"])
def test_node_takes_nothing_from_a_recorded_conversation(tmp_path, fit_calls, to):
    """All that one end said in a conversation that went well, said again to the other."""
    with scene(tmp_path, fit_calls) as stage, socket.create_server(("127.0.0.1", 0)) as trap:
        stage.call()
        until(lambda: counted(stage.unfit, lost=1) and counted(stage.fit, won=1), stage)
        caller_role, answerer_role = stage.meddler.roles
        for tensor in stage.unfit.live.values():
            tensor.fill_(3.0)
        if to == "answerer":
            node, recorded = stage.answerer, stage.meddler.heard[caller_role]
            peer = RawPeer.call(node.where)
        else:
            node, recorded = stage.caller, stage.meddler.heard[answerer_role]
            trap.settimeout(PATIENCE)
            until(stage.idle, stage)
            node.node._peers = ("{}:{}".format(*trap.getsockname()),)
            node.call()
            peer = RawPeer(trap.accept()[0])
        with contextlib.suppress(ConnectionError):  # it is refused before all is said
            peer.socket.sendall(recorded)
        assert peer.closed()
        until(lambda: counted(node, failed=1), stage)
        assert stage.fault(node) is Fault.WRONG_SECRET
        until(stage.idle, stage)
        assert values_of(stage.fit) == {1.0} and values_of(stage.unfit) == {3.0}
        assert counted(stage.unfit, lost=1) and counted(stage.fit, won=1)
