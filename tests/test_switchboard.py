"""The network thread outlives what goes wrong around it: memory, resolvers, addresses, a disk that hangs."""

import contextlib
import errno
import os
import pkgutil
import socket
import subprocess
import sys
import textwrap
import threading
import time
from pathlib import Path

import pytest

from bench.injection import Injection
from gossip.faults import Fault
from gossip.filesystem_coordinator import FilesystemCoordinator
from gossip.network_utils import LOOKUPS_LIMIT, listen
from gossip.protocol import Flow
from tests.gossip_helpers import (
    Rank,
    RawPeer,
    counted,
    hello,
    last_event,
    ranks,
    until,
)

ROOT = Path(__file__).parents[1]


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


def free(rank):
    return rank.idle


def nobody():
    """An address of this host where nobody listens."""
    with listen("127.0.0.1", 0) as held:
        return f"127.0.0.1:{held.getsockname()[1]}"


# Memory


class Exhausted:
    """Stands for a callable that runs out of memory the first `times` it is called."""

    def __init__(self, real, times=1):
        self.real, self.left = real, times

    def __call__(self, *arguments, **named):
        if self.left:
            self.left -= 1
            raise MemoryError
        return self.real(*arguments, **named)


ANSWERING = (
    "gossip.handshake.decode_opening",
    "gossip.handshake.session",
    "gossip.wire.Wire.wake_at",
    "gossip.switchboard.Channel",
    "gossip.switchboard.Switchboard._hold",
    "gossip.switchboard.converse",
    "gossip.switchboard._Party",
)


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
@pytest.mark.parametrize("place", ANSWERING)
def test_out_of_memory_ends_the_conversation_that_it_met_and_nothing_else(tmp_path, monkeypatch, place):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        assert_answers_again(rank)
        exhausted = Exhausted(pkgutil.resolve_name(place))
        monkeypatch.setattr(place, only_on(rank, exhausted))
        with contextlib.suppress(EOFError, ConnectionError):  # closed at some moment of it
            RawPeer.call(rank.where).handshake().closed()
        assert not exhausted.left
        until(lambda: counted(rank, failed=1))
        assert last_event(rank)["message"] == Fault.OUT_OF_MEMORY.value
        assert_answers_again(rank)


def assert_answers_again(rank):
    tied = rank.node.counters.tied
    good = RawPeer.call(rank.where).handshake()
    assert good.greet(hello(rank.schema, fitness=None))[1].flow is Flow.NONE
    until(lambda: counted(rank, tied=tied + 1) and free(rank), rank)


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
@pytest.mark.parametrize("place", ["connect", "authenticate", "Wire", "Channel", "converse", "_Party", "Talk"])
def test_out_of_memory_in_a_call_leaves_room_for_the_next(tmp_path, monkeypatch, caplog, place):
    with (
        ranks(Rank(tmp_path / "0", 0)) as (peer,),
        ranks(Rank(tmp_path / "1", 1, peers=(peer.node.address,))) as (rank,),
    ):
        real = getattr(sys.modules["gossip.switchboard"], place)
        exhausted = Exhausted(real)
        # In this process the peer shares the module: only the caller may meet it.
        monkeypatch.setattr(f"gossip.switchboard.{place}", only_on(rank, exhausted))
        rank.call()
        until(lambda: not exhausted.left)
        until(lambda: free(rank))
        if place == "Talk":  # before there was a conversation: said by the event loop
            until(lambda: "MemoryError" in caplog.text)
        else:
            until(lambda: counted(rank, failed=1))
            assert last_event(rank)["message"] == Fault.OUT_OF_MEMORY.value
        until(lambda: (rank.call(), rank.node.counters.tied)[1], rank, peer)


def only_on(rank, exhausted):
    thread = rank.node._switchboard._thread
    return lambda *a, **k: (exhausted if threading.current_thread() is thread else exhausted.real)(*a, **k)


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
@pytest.mark.parametrize(
    "error", [MemoryError(), OSError(errno.EMFILE, "Too many open files")], ids=["memory", "files"]
)
def test_accepting_goes_on_after_the_system_had_nothing_to_accept_with(tmp_path, monkeypatch, error):
    failures = [error] * 5

    def accept(self):
        if failures:
            raise failures.pop()
        return real(self)

    real = socket.socket.accept
    with ranks(Rank(tmp_path, 0)) as (rank,):
        monkeypatch.setattr(socket.socket, "accept", accept)
        assert_answers_again(rank)  # the accept that waits is over by then, and the next ones fail
        until(lambda: not failures)
        assert_answers_again(rank)
        (told,) = [row for row in rank.events() if row["event"] == "accept_failed"]  # one line, not five
        assert told["message"] in ("out of memory", str(error))


@pytest.mark.filterwarnings("ignore::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_thread_that_could_not_begin_tells_why_and_can_be_closed(tmp_path, monkeypatch):
    def without_descriptors(serving):
        serving.close()
        raise OSError(errno.EMFILE, "Too many open files")

    monkeypatch.setattr("gossip.switchboard.asyncio.run", without_descriptors)
    monkeypatch.setattr(Rank, "boundary", lambda rank: None)
    rank = Rank(tmp_path, 0)
    with pytest.raises(OSError, match="Too many open files"):
        rank.node.step_boundary(0, 0, None, {})
    rank.node.close()


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
@pytest.mark.parametrize("name", ["Talk", "Wire", "steps"])
def test_accepting_goes_on_after_memory_was_out_for_a_new_caller(tmp_path, monkeypatch, name):
    with ranks(Rank(tmp_path, 0)) as (rank,):
        exhausted = Exhausted(getattr(sys.modules["gossip.strangers"], name))
        monkeypatch.setattr(f"gossip.strangers.{name}", exhausted)
        with contextlib.suppress(ConnectionError):  # reset perhaps before this end knew of the connection
            RawPeer.call(rank.where).closed()
        until(lambda: not exhausted.left)
        until(lambda: len(rank.node._switchboard._strangers) == 0)
        assert_answers_again(rank)
        assert "accept_failed" in [row["event"] for row in rank.events()]


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
def test_out_of_memory_in_the_account_itself_frees_the_rank(tmp_path, monkeypatch, capfd):
    with ranks(Rank(tmp_path, 0, peers=(nobody(),))) as (rank,):
        ledger = rank.node._ledger
        monkeypatch.setattr(ledger, "write", Exhausted(ledger.write))
        rank.call()
        until(lambda: "MemoryError" in capfd.readouterr().err)
        until(lambda: free(rank))
        assert_answers_again(rank)


# Addresses that lead nowhere


class Registered:
    """Another rank's entry in the registry, which moves as a living rank's does."""

    def __init__(self, folder, rank, address):
        self.coordinator = FilesystemCoordinator(folder / "population", rank, 8, f"{rank}" * 32, 5.0)
        self.address = address
        self.beats = 0

    def boundary(self):
        self.coordinator.beat({"address": self.address, "step": 1, "fitness": None})
        self.beats += 1


REGISTRY = {"filesystem_coordinator": True, "heartbeat_seconds": 0.02, "liveness_seconds": 5.0}
NOWHERE = {
    "nobody-listens": pytest.param(nobody, marks=pytest.mark.injects(Injection.GHOST)),
    "no-such-name": pytest.param(
        lambda: "no.such.host.invalid:29400", marks=pytest.mark.injects(Injection.UNRESOLVABLE_ADDRESS)
    ),
    "unspecified": pytest.param(lambda: "0.0.0.0:29400"),
    "unspecified-6": pytest.param(lambda: "[::]:29400"),
    "multicast": pytest.param(lambda: "224.0.0.1:29400"),
    "no-address": pytest.param(lambda: "torn\ud800: nonsense"),
    "no-port": pytest.param(lambda: "127.0.0.1"),
    "odd-name": pytest.param(lambda: "a..b\0:29400"),
}


@pytest.mark.parametrize("address", NOWHERE.values(), ids=NOWHERE.keys())
def test_a_registered_address_that_leads_nowhere_is_counted_and_another_is_called(tmp_path, address):
    with ranks(Rank(tmp_path, 0, **REGISTRY), Rank(tmp_path, 1, **REGISTRY)) as (peer, rank):
        ghost = Registered(tmp_path, 5, address())
        until(lambda: rank.node.roster and len(rank.node.roster.peers(1)) == 2, ghost, peer)
        until(lambda: (rank.call(), rank.node.counters.failed and rank.node.counters.tied)[1], rank, peer, ghost)
        failed = [row for row in until(rank.events) if row["event"] == "failed"]
        assert all(row["message"].startswith(Fault.UNREACHABLE.value) for row in failed)


@pytest.mark.parametrize("host", ["0.0.0.0", "[::]", "[::ffff:0.0.0.0]", "0"])
def test_an_unspecified_address_never_reaches_this_host(tmp_path, host):
    """The kernel would take it for a loopback address, and a rank would call whoever has that port here."""
    with ranks(Rank(tmp_path / "0", 0)) as (here,):
        port = here.where[1]
        with ranks(Rank(tmp_path / "1", 1, peers=(f"{host}:{port}",))) as (rank,):
            rank.call()
            until(lambda: counted(rank, failed=1))
            assert last_event(rank)["message"].startswith(Fault.UNREACHABLE.value)
            assert counted(here, received=0, failed=0)


@pytest.fixture
def deaf():
    """An address whose host never answers: the kernel drops what comes to a full queue."""
    with socket.create_server(("127.0.0.1", 0), backlog=0) as held:
        waiting = []
        for _ in range(8):
            connection = socket.socket()
            connection.setblocking(False)
            connection.connect_ex(held.getsockname())
            waiting.append(connection)
        yield f"127.0.0.1:{held.getsockname()[1]}"
        for connection in waiting:
            connection.close()


@pytest.mark.injects(Injection.UNROUTABLE_ADDRESS)
def test_an_address_that_never_answers_is_unreachable_within_the_handshakes_deadline(tmp_path, monkeypatch, deaf):
    monkeypatch.setattr("gossip.switchboard.HANDSHAKE_SECONDS", 0.5)
    with ranks(Rank(tmp_path, 0, peers=(deaf,))) as (rank,):
        began = time.monotonic()
        rank.call()
        until(lambda: counted(rank, failed=1))
        assert 0.4 < time.monotonic() - began < 3.0
        assert last_event(rank)["message"] == f"{Fault.UNREACHABLE.value}: no answer in 0.5 s"


# A resolver that hangs


class HangingResolver:
    """Stands for socket.getaddrinfo where the resolver does not answer until it is let go."""

    def __init__(self, monkeypatch):
        self.asked, self.let_go, self._real = [], threading.Event(), socket.getaddrinfo
        monkeypatch.setattr(socket, "getaddrinfo", self)

    def __call__(self, host, *arguments, **named):
        if not str(host).endswith(".slow"):
            return self._real(host, *arguments, **named)
        self.asked.append(host)
        self.let_go.wait()
        raise socket.gaierror(socket.EAI_AGAIN, "Temporary failure in name resolution")


@pytest.fixture
def resolver(monkeypatch):
    resolver = HangingResolver(monkeypatch)
    yield resolver
    resolver.let_go.set()
    until(lambda: not lookups())


def lookups():
    return [thread for thread in threading.enumerate() if thread.name == "gossip-resolver"]


@pytest.mark.injects(Injection.SLOW_RESOLVER)
def test_a_hung_lookup_delays_neither_others_nor_the_end(tmp_path, resolver):
    with ranks(Rank(tmp_path, 0, peers=("host.slow:29400",))) as (rank,):
        rank.call()
        until(lambda: resolver.asked)
        for _ in range(3):
            peer = RawPeer.call(rank.where).handshake()  # answered, if only to hear that the rank is calling
            peer.greet(hello(rank.schema, fitness=None))
            peer.close()
        until(lambda: counted(rank, received=3))
        began = time.monotonic()
        rank.node.close()
        assert time.monotonic() - began < 2.0 and lookups()


@pytest.mark.injects(Injection.SLOW_RESOLVER)
def test_hung_lookups_end_at_the_handshakes_deadline_and_are_few(tmp_path, resolver, monkeypatch):
    monkeypatch.setattr("gossip.switchboard.HANDSHAKE_SECONDS", 0.2)
    monkeypatch.setattr("gossip.address_book.LONGEST_SECONDS", 0.0)
    with ranks(Rank(tmp_path, 0, peers=("host.slow:29400",))) as (rank,):
        for times in range(1, LOOKUPS_LIMIT + 3):
            until(lambda: free(rank))
            rank.call()
            until(lambda times=times: counted(rank, failed=times))
            assert last_event(rank)["message"].startswith(Fault.UNREACHABLE.value)
        assert len(resolver.asked) == len(lookups()) == LOOKUPS_LIMIT
        resolver.let_go.set()
        until(lambda: not lookups())
        resolver.asked.clear()
        rank.call()
        until(lambda: counted(rank, failed=LOOKUPS_LIMIT + 3))
        assert resolver.asked == ["host.slow"]


NAMELESS = """
    import sys, time, threading
    from pathlib import Path
    from tests.gossip_helpers import Rank, until

    rank = Rank(Path(sys.argv[1]), 0, peers=("host.example:29400",))
    rank.call()
    until(lambda: any(thread.name == "gossip-resolver" for thread in threading.enumerate()))
    print("looking", flush=True)
    sys.stdin.readline()
    looking = [thread for thread in threading.enumerate() if thread.name == "gossip-resolver"]
    began = time.monotonic()
    rank.node.close()
    print(len(looking), time.monotonic() - began, flush=True)
"""


@pytest.mark.injects(Injection.SLOW_RESOLVER)
def test_a_name_server_that_never_answers_delays_no_end(tmp_path):
    """The system's own resolver, in a process whose /etc/resolv.conf names a server that is silent."""
    (tmp_path / "resolv.conf").write_text("nameserver 127.9.9.9\noptions timeout:30 attempts:1\n")
    mount = 'mount --bind "$1" /etc/resolv.conf && exec "$2" -c "$3" "$4"'
    program = textwrap.dedent(NAMELESS)
    command = ["unshare", "-m", "sh", "-c", mount, "sh", tmp_path / "resolv.conf", sys.executable, program, tmp_path]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as silent:
        try:
            silent.bind(("127.9.9.9", 53))
            mounted = ["unshare", "-m", "mount", "--bind", tmp_path / "resolv.conf", "/etc/resolv.conf"]
            subprocess.run(mounted, check=True, capture_output=True)
        except (OSError, subprocess.CalledProcessError) as error:
            pytest.skip(f"needs the right to bind port 53 and to mount: {error}")
        silent.settimeout(60)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "cwd": ROOT}
        with subprocess.Popen(command, **pipes) as process:
            assert process.stdout.readline() == "looking\n"
            assert b"\x04host\x07example" in silent.recv(512)
            process.stdin.write("\n")
            process.stdin.flush()
            looking, seconds = process.stdout.readline().split()
            assert looking == "1" and float(seconds) < 2.0
            assert process.wait(timeout=10) == 0  # nor does the interpreter wait for the lookup


# A disk that hangs


@pytest.fixture
def stuck_log(tmp_path):
    """An event log on which a write hangs until something is read from it: a pipe that is full."""
    path = tmp_path / "gossip_logs" / "run_rank_0000.tsv"
    path.parent.mkdir()
    os.mkfifo(path)
    descriptor = os.open(path, os.O_RDWR | os.O_NONBLOCK)
    yield descriptor
    os.close(descriptor)


def fill(descriptor):
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x" * 4096)
    with contextlib.suppress(BlockingIOError):
        while True:
            os.write(descriptor, b"x")


def drain(descriptor):
    with contextlib.suppress(BlockingIOError):
        while True:
            os.read(descriptor, 65536)


def test_close_waits_only_so_long_for_a_thread_that_a_disk_holds(tmp_path, stuck_log, monkeypatch, capfd):
    monkeypatch.setattr("gossip.switchboard.CLOSE_SECONDS", 0.3)
    rank = Rank(tmp_path, 0, peers=(nobody(),))
    fill(stuck_log)
    rank.call()
    thread = rank.node._switchboard._thread
    until(rank.log._lock.locked)  # the failed call's line
    began = time.monotonic()
    rank.node.close()
    assert 0.3 < time.monotonic() - began < 3.0 and thread.is_alive()
    told = capfd.readouterr().err
    assert "the network thread has not ended for 0.3 s" in told
    until(lambda: (drain(stuck_log), not thread.is_alive())[1])
    rank.log.close()
