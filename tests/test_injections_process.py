"""Signals that come in the middle of something, memory that is out, and ends with peers on the line."""

import fcntl
import json
import os
import pkgutil
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from bench.injection import Injection
from gossip.protocol import Flow, SnapshotHeader
from gossip.secret import run_secret
from tests.conftest import TINY
from tests.gossip_helpers import Rank, RawPeer, counted, hello, make_state, ranks, until, values_of
from training.checkpoint import list_checkpoints, read_own_checkpoint
from training.run_directory import RunDirectory
from training.setup import run_identity

ROOT = Path(__file__).parents[1]
RANKS = (0, 1)
START_SECONDS = 180.0  # until processes have started, on a busy machine
STOP = (signal.SIGTERM, signal.SIGINT)  # what rank 0 is sent, and rank 1
FLAGS = {
    "save": ["--gossip_mixing_rate", "0", "--save_every", "20", "--no_fitness_weighted_checkpointing"],
    "merge": ["--save_every", "1g", "--gossip_merge_method", "average", "--gossip_rollback", "none"],
    "transfer": ["--save_every", "1g", "--gossip_merge_method", "average"],
}
LIVELY = ["--gossip_heartbeat", "0.05", "--gossip_liveness", "10", "--gossip_fitness_decay", "0.5", "--val_every", "0",
          "--gossip_mixing_rate", "0.1", "--gossip_host", "127.0.0.1", "--log_every", "1000"]  # fmt: skip


@pytest.fixture
def start(text, tmp_path):
    """start(rank, ranks, script, flags): one rank of the run tmp_path/run; killed at the end, should it still live."""
    started = []

    def start(rank, ranks, script, flags):
        inherited = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GRUBOROS_"))}
        who = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": ranks, "LOCAL_WORLD_SIZE": ranks, "OMP_NUM_THREADS": 1}
        started.append(subprocess.Popen(
            [sys.executable, *script, *TINY, "--data", str(text), "--output", "run", *LIVELY, *flags], cwd=tmp_path,
            env=inherited | {name: str(value) for name, value in who.items()} | {"PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, text=True,
        ))  # fmt: skip
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def hold(start, tmp_path):
    """hold("save", "1,2"): two ranks of a run that began to train together, and stop there; see held_train.py."""

    def hold(moment, visits):
        script = ["-m", "tests.held_train", moment, visits, str(tmp_path)]
        processes = [start(rank, 2, script, FLAGS[moment]) for rank in RANKS]
        await_held(tmp_path, 0, processes)
        let_go(tmp_path, 0)
        return processes

    return hold


def soon(condition, processes=()):
    """What `condition` gave as soon as it was true, while all `processes` run."""
    deadline = time.monotonic() + START_SECONDS
    while not (result := condition()):
        assert time.monotonic() < deadline, "waited in vain"
        for process in processes:
            assert process.poll() is None, process.communicate()[1]
        time.sleep(0.01)  # a poll
    return result


def await_held(folder, visit, processes, enough=all):
    soon(lambda: enough((folder / f"held_{rank}_{visit}").exists() for rank in RANKS), processes)


def let_go(folder, visit):
    for rank in RANKS:
        (folder / f"go_{rank}_{visit}").touch()


def saved(folder, rank):
    return [file.step for file in list_checkpoints(folder / "run") if file.rank == rank]


def log_of(folder, rank):
    return (folder / "logs" / f"train_run_rank_{rank:04d}.log").read_text()


def assert_all_whole(folder, ranks=RANKS):
    """Every checkpoint can be resumed from, nothing half-done lies about, and nobody holds a lock."""
    assert {file.rank for file in list_checkpoints(folder / "run")} == set(ranks)
    for file in list_checkpoints(folder / "run"):
        assert read_own_checkpoint(file.path)["step"] == file.step
    assert not list(folder.rglob("*.tmp"))
    for rank in ranks:
        with open(folder / "run" / "population" / f"rank_{rank:04d}.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)


def assert_resumes(run_train, folder):
    """A rank goes on from the best checkpoint of all."""
    steps = [step for rank in RANKS for step in saved(folder, rank)]
    run_train("run", "--resume", "run", "--train_steps", str(max(steps) + 10))
    assert max(saved(folder, 0)) == max(steps) + 10


def end(processes):
    for process in processes:
        stderr = process.communicate(timeout=START_SECONDS)[1]
        assert process.returncode == 0, stderr
        assert "Traceback" not in stderr


@pytest.mark.parametrize(
    "moment",
    [
        pytest.param("save", marks=pytest.mark.injects(Injection.SAVE_MID_SAVE, Injection.STOP_MID_SAVE)),
        pytest.param("merge", marks=pytest.mark.injects(Injection.SAVE_MID_MERGE, Injection.STOP_MID_MERGE)),
    ],
)
def test_signals_in_the_middle_of_a_save_or_merge_wait_for_its_end(hold, tmp_path, run_train, moment):
    processes = hold(moment, "1,2")
    await_held(tmp_path, 1, processes)
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    let_go(tmp_path, 1)
    await_held(tmp_path, 2, processes)  # the save that was asked for, or the next merge
    before = [saved(tmp_path, rank) for rank in RANKS]
    for process, number in zip(processes, STOP, strict=True):
        process.send_signal(number)
    let_go(tmp_path, 2)
    end(processes)
    assert_all_whole(tmp_path)
    for rank, steps in zip(RANKS, before, strict=True):
        assert steps and max(saved(tmp_path, rank)) >= max(steps)
        log = log_of(tmp_path, rank)
        assert "(asked for by a signal)" in log and "stopped by a signal" in log
        if moment == "merge":
            assert re.search(r"(merged|averaged) +rank", log).start() < log.index("(asked for by a signal)")
    assert_resumes(run_train, tmp_path)


@pytest.mark.injects(Injection.SAVE_MID_TRANSFER, Injection.STOP_MID_TRANSFER)
def test_signals_in_the_middle_of_a_transfer_do_not_wait_for_its_end(hold, tmp_path, run_train):
    processes = hold("transfer", "1")
    await_held(tmp_path, 1, processes, enough=any)  # its peer is in the middle too, whether it also sends or not
    for process in processes:
        process.send_signal(signal.SIGUSR1)
    soon(lambda: all("(asked for by a signal)" in log_of(tmp_path, rank) for rank in RANKS), processes)
    for process, number in zip(processes, STOP, strict=True):
        process.send_signal(number)
    end(processes)
    assert_all_whole(tmp_path)
    assert all("(stopped by a signal)" in log_of(tmp_path, rank) for rank in RANKS)
    assert_resumes(run_train, tmp_path)


@pytest.mark.injects(Injection.STOP_TWICE)
def test_a_second_stop_in_the_middle_of_a_save_ends_at_once_and_spoils_nothing(hold, tmp_path, run_train):
    processes = hold("save", "2")
    await_held(tmp_path, 2, processes)
    steps = [saved(tmp_path, rank) for rank in RANKS]
    for process, number in zip(processes, STOP, strict=True):
        process.send_signal(number)
    for process, number in zip(processes, STOP, strict=True):
        # What comes within a second counts as the same.
        soon(lambda p=process, n=number: p.send_signal(n) or p.poll() is not None)
        assert process.returncode == 128 + number
    assert [saved(tmp_path, rank) for rank in RANKS] == steps  # what was being written has not got its name
    assert_resumes(run_train, tmp_path)
    for file in list_checkpoints(tmp_path / "run"):
        read_own_checkpoint(file.path)
    assert not list(tmp_path.rglob(".checkpoint_rank_0000*"))


@pytest.mark.injects(Injection.SAVE_WHILE_STARTING)
def test_a_signal_while_a_rank_still_imports_torch_is_obeyed_once_it_trains(start, tmp_path):
    process = start(0, 1, [str(ROOT / "train.py")], FLAGS["transfer"])
    soon(lambda: catches(process.pid, signal.SIGUSR1), [process])
    assert "libtorch" not in Path(f"/proc/{process.pid}/maps").read_text()
    process.send_signal(signal.SIGUSR1)
    log = tmp_path / "logs" / "train_run_rank_0000.log"
    soon(lambda: log.exists() and "(asked for by a signal)" in log.read_text(), [process])
    process.send_signal(signal.SIGTERM)
    end([process])


def catches(pid, number):
    mask = re.search(r"^SigCgt:\s*(\w+)$", Path(f"/proc/{pid}/status").read_text(), re.MULTILINE)[1]
    return int(mask, 16) >> (number - 1) & 1


# Memory.

PLACES = {  # of the network thread, and whether the conversation at hand ends by it
    "calling": ("random.Random.choice", False),
    "accepting": ("asyncio.selector_events.BaseSelectorEventLoop.sock_accept", False),
    "connecting": ("gossip.switchboard.connect", True),
    "authenticating": ("gossip.switchboard.authenticate", True),
    "answering": ("gossip.strangers.Strangers._hear", True),
    "deciding": ("gossip.exchange.decide", True),
    "sending": ("gossip.wire.Wire.send", True),
    "receiving": ("gossip.wire.Wire.receive_into", True),
    "checking": ("gossip.exchange.payload_fault", True),
    "asking": ("gossip.snapshot_desk.SnapshotDesk.snapshot", True),
    "delivering": ("gossip.snapshot_desk.SnapshotDesk.deliver", True),
    "accounting": ("gossip.ledger.Ledger.count_ended", False),
}


@pytest.mark.injects(Injection.NETWORK_OUT_OF_MEMORY)
@pytest.mark.parametrize("place", PLACES)
def test_memory_that_is_out_on_the_network_thread_ends_a_conversation_and_no_more(tmp_path, monkeypatch, place):
    target, ends = PLACES[place]
    answerer = Rank(tmp_path, 1, 5.0, method="clonal", exchange_seconds=2.0)
    with ranks(answerer):
        options = {"peers": (answerer.node.address,), "method": "clonal", "exchange_seconds": 2.0}
        with ranks(Rank(tmp_path, 0, 3.0, **options)) as (caller,):
            caller.fitness, answerer.fitness = 1.0, 2.0
            pair = caller, answerer
            until(lambda: all(rank.node._desk.published.fitness for rank in pair), *pair)
            refused = fail_once(monkeypatch, target)
            caller.call()
            until(refused.is_set, *pair)
            until(lambda: all(rank.idle for rank in pair), *pair)
            if ends:
                until(lambda: sum(rank.node.counters.failed for rank in pair) > 0, *pair)
                assert values_of(answerer) == {5.0}
            # Training goes on, and so does the rank's part in the population.
            until(lambda: caller.call() or counted(answerer, lost=1), *pair)
            assert values_of(answerer) == {3.0}


def fail_once(monkeypatch, target):
    """Let the function at `target` find no memory the first time that a network thread calls it; returns the event."""
    refused, found = threading.Event(), pkgutil.resolve_name(target)

    def fail(*arguments, **options):
        if not refused.is_set() and threading.current_thread().name == "gossip-network":
            refused.set()
            raise MemoryError
        return found(*arguments, **options)

    monkeypatch.setattr(target, fail)
    return refused


# The end.


def sends(rank, peer):
    """The rank sends its weights; the peer reads none of them."""
    assert peer.greet(hello(rank.schema, fitness=9.0))[1].flow is Flow.RESPONDER_SENDS


def receives(rank, peer):
    """The rank has received half of the peer's weights."""
    assert peer.greet(hello(rank.schema, fitness=1.0))[1].flow is Flow.INITIATOR_SENDS
    half = rank.schema.nbytes // 2
    peer.send(SnapshotHeader(step=5, generation=0, lineage=0, nbytes=rank.schema.nbytes, scalars={"k": 7.0}))
    peer.socket.sendall(bytes(half))


def says_nothing(rank, peer):
    """Authenticated, and waited for."""


@pytest.fixture(autouse=True)
def close_raw_peers():
    yield
    RawPeer.close_all()


@pytest.mark.injects(Injection.SHUTDOWN_WITH_LIVE_SOCKETS)
@pytest.mark.parametrize("script", [sends, receives, says_nothing])
def test_a_node_that_closes_with_peers_on_the_line_is_quick_and_leaves_nothing(tmp_path, script):
    threads, sockets = set(threading.enumerate()), open_sockets()
    rank = Rank(tmp_path, 0, state=make_state(3.0, shapes=((400, 400),)), exchange_seconds=600.0)
    with ranks(rank):
        rank.fitness = 2.0
        rank.boundary()
        peers = [RawPeer.call(rank.where) for _ in range(3)]  # strangers, so far
        script(rank, peers[0].handshake())
        rank.boundary()
        until(lambda: rank.node.counters.received == 1)
        began = time.monotonic()
        rank.node.close()
        assert time.monotonic() - began < 2.0
        assert set(threading.enumerate()) == threads
        assert all(peer.closed() for peer in peers)
        with pytest.raises(ConnectionRefusedError):
            socket.create_connection(rank.where)
        assert values_of(rank) == {3.0}
    RawPeer.close_all()
    assert open_sockets() <= sockets


def open_sockets():
    """Those of this process, by their unique names; an event loop has some too."""
    links = (os.path.realpath(f"/proc/self/fd/{number}") for number in os.listdir("/proc/self/fd"))
    return {link for link in links if "socket:" in link}


@pytest.mark.injects(Injection.SHUTDOWN_WITH_LIVE_SOCKETS)
def test_a_rank_that_is_stopped_with_peers_on_the_line_ends_at_once_and_leaves_nothing(start, tmp_path):
    process = start(0, 1, [str(ROOT / "train.py")], FLAGS["transfer"])
    run = RunDirectory(tmp_path / "run", 0)
    record = soon(lambda: (path := run.population / "rank_0000.json").exists() and json.loads(path.read_text()))
    host, port = record["address"].rsplit(":", 1)
    who = {"secret": run_secret(run.population, {}), "run_id": run_identity(run)}
    peers = [RawPeer.call((host, int(port)), **who) for _ in range(3)]
    peers[0].handshake()
    process.send_signal(signal.SIGTERM)
    began = time.monotonic()
    end([process])
    assert time.monotonic() - began < 10.0  # an exchange may take 120 s
    assert all(peer.closed() for peer in peers)
    assert_all_whole(tmp_path, ranks=[0])
