"""What chaos is mixed from: real faults, done to a running population from outside, each by its name."""

import contextlib
import functools
import json
import os
import random
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from bench.evidence import newest_whole, resumed_from
from bench.injection import Injection
from bench.population import Population, kill
from gossip.registry import rank_file, read_entry
from runtime.files import atomic_write, replace_symlink
from training.checkpoint import list_checkpoints

# How often each comes in a pack; packs are shuffled and dealt, so that a long enough run meets all of them.
PACK = {
    Injection.KILL: 4,
    Injection.LEADER_DEATH: 1,
    Injection.TRUNCATED_CHECKPOINT: 1,
    Injection.FLIPPED_CHECKPOINT: 1,
    Injection.FRESH_RESTART: 1,
    Injection.PAUSE: 2,
    Injection.STRAGGLER: 1,
    Injection.FLOOD: 1,
    Injection.SLOW_HANDSHAKE: 1,
    Injection.STALE_ATTRIBUTES: 1,
    Injection.GHOST: 1,
    Injection.DANGLING_SYMLINK: 1,
}
PAUSE_SECONDS = (3.0, 15.0)
STRAGGLING_SECONDS = 20.0
STRAGGLING_TURN = 0.5  # seconds, of which a straggler runs a tenth
FLOOD_CONNECTIONS = 500
SLOW_STRANGERS = 20
SLOW_WORDS = b"gruboros\0\1\0\0"  # how an opening begins
SLOW_SECONDS = 0.5  # between two bytes of it
GHOST_BEATS = 3  # signs of life before it is gone
GHOST_RANK = 90  # the first one
RECOVERY_SECONDS = 240.0  # to start again and resume, on a crowded machine


@dataclass
class Fault:
    """One fault: when (seconds since the measurement began), what, to whom, and what came of it.

    expected, resumed: for a kill, the rank's newest whole checkpoint at its death and the one it then went on from,
    by name; "" for none of its own, None where that was not seen. down: seconds until the rank went on.
    """

    seconds: float
    injection: Injection
    rank: int = -1
    detail: str = ""
    expected: str | None = None
    resumed: str | None = None
    down: float | None = None

    @property
    def killed(self) -> bool:
        """Whether a process was killed."""
        return self.expected is not None

    @property
    def lost(self) -> bool:
        """Whether the rank went on from something else than its newest whole checkpoint."""
        return self.killed and self.resumed is not None and self.expected != "" and self.resumed != self.expected


def deal(count: int, dice: random.Random) -> list[Injection]:
    """`count` faults, of shuffled packs."""
    dealt: list[Injection] = []
    while len(dealt) < count:
        pack = [injection for injection, times in PACK.items() for _ in range(times)]
        dice.shuffle(pack)
        dealt += pack
    return dealt[:count]


class Injector:
    """Does faults to a population, each on a thread of its own, and never two to one rank at once.

    seed: of what each fault is in particular: its victim, if that is free then, how long, which bit.
    """

    def __init__(self, population: Population, seed: int) -> None:
        self.faults: list[Fault] = []
        self.errors: list[BaseException] = []  # of the bench itself
        self._population = population
        self._seed = seed
        self._busy = [threading.Lock() for _ in range(population.ranks)]
        self._threads: list[threading.Thread] = []
        self._began = time.monotonic()
        self._acts: dict[Injection, Callable[[Fault, random.Random], None]] = {
            Injection.KILL: self._kill,
            Injection.LEADER_DEATH: self._kill,
            Injection.TRUNCATED_CHECKPOINT: functools.partial(self._kill, ruin=_truncate),
            Injection.FLIPPED_CHECKPOINT: functools.partial(self._kill, ruin=_flip),
            Injection.FRESH_RESTART: functools.partial(self._kill, ruin=_delete),
            Injection.PAUSE: self._pause,
            Injection.STRAGGLER: self._straggle,
            Injection.FLOOD: self._flood,
            Injection.SLOW_HANDSHAKE: self._call_slowly,
            Injection.STALE_ATTRIBUTES: self._spoil_registry,
            Injection.GHOST: self._haunt,
            Injection.DANGLING_SYMLINK: self._cut_links,
        }

    def inject(self, injection: Injection) -> None:
        """Begin a fault; returns at once."""
        fault = Fault(time.monotonic() - self._began, injection)
        self.faults.append(fault)
        dice = random.Random(f"{self._seed} {len(self.faults)}")
        self._threads.append(threading.Thread(target=self._run, args=(fault, dice), daemon=True))
        self._threads[-1].start()

    def wait(self) -> None:
        """Wait until every fault is over, and its rank has gone on."""
        for thread in self._threads:
            thread.join()

    def _run(self, fault: Fault, dice: random.Random) -> None:
        first = (
            [0] if fault.injection is Injection.LEADER_DEATH else dice.sample(range(len(self._busy)), len(self._busy))
        )
        fault.rank = self._take_rank(first)
        try:
            self._acts[fault.injection](fault, dice)
        except BaseException as error:
            self.errors.append(error)
            raise
        finally:
            self._busy[fault.rank].release()

    def _take_rank(self, candidates: list[int]) -> int:
        """The first that no other fault is at. Waits for one that was killed to have gone on."""
        while True:
            for candidate in candidates:
                if self._busy[candidate].acquire(blocking=False):
                    return candidate
            time.sleep(0.05)

    @contextlib.contextmanager
    def _process(self, rank: int) -> Iterator[Callable[[signal.Signals], None]]:
        """What sends a signal to the rank's process and to no later one; it goes on in the end."""
        descriptor = os.pidfd_open(self._population.process(rank))
        try:
            yield functools.partial(signal.pidfd_send_signal, descriptor)
        finally:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(descriptor, signal.SIGCONT)
            os.close(descriptor)

    def _kill(self, fault: Fault, dice: random.Random, ruin: Callable[..., str] | None = None) -> None:
        """SIGKILL; what is then done to its checkpoints is done before the launcher starts it again."""
        population, rank = self._population, fault.rank
        offset = population.log(rank).stat().st_size
        kill(population.process(rank))
        died = time.monotonic()
        own = [file.path for file in list_checkpoints(population.run_dir) if file.rank == rank]
        if ruin is not None and own:
            fault.detail = ruin(own, dice)
        newest = newest_whole(population.run_dir, rank)
        fault.expected = newest.path.name if newest else ""
        boundaries = population.board(rank).boundaries
        while fault.resumed is None or population.board(rank).boundaries <= boundaries:
            if population.ended() or time.monotonic() - died > RECOVERY_SECONDS:
                return
            time.sleep(0.1)
            fault.resumed = resumed_from(population.log(rank), offset)
        fault.down = time.monotonic() - died

    def _pause(self, fault: Fault, dice: random.Random) -> None:
        seconds = dice.uniform(*PAUSE_SECONDS)
        fault.detail = f"for {seconds:.1f} s"
        with self._process(fault.rank) as send:
            send(signal.SIGSTOP)
            time.sleep(seconds)

    def _straggle(self, fault: Fault, _: random.Random) -> None:
        fault.detail = f"for {STRAGGLING_SECONDS:.0f} s"
        deadline = time.monotonic() + STRAGGLING_SECONDS
        with self._process(fault.rank) as send:
            while time.monotonic() < deadline:
                send(signal.SIGSTOP)
                time.sleep(0.9 * STRAGGLING_TURN)
                send(signal.SIGCONT)
                time.sleep(0.1 * STRAGGLING_TURN)

    def _flood(self, fault: Fault, dice: random.Random) -> None:
        where, reached = self._address(fault.rank), 0
        for _ in range(FLOOD_CONNECTIONS):
            with contextlib.suppress(OSError), socket.create_connection(where, timeout=5) as stranger:
                stranger.sendall(dice.randbytes(64))
                reached += 1
        fault.detail = f"{reached} connections with 64 bytes of garbage each"

    def _call_slowly(self, fault: Fault, _: random.Random) -> None:
        where = self._address(fault.rank)
        with contextlib.ExitStack() as stack:
            strangers = [stack.enter_context(socket.create_connection(where, timeout=5)) for _ in range(SLOW_STRANGERS)]
            fault.detail = f"{len(strangers)} connections, a byte every {SLOW_SECONDS} s each"
            for place in range(len(SLOW_WORDS)):
                for stranger in strangers:
                    with contextlib.suppress(OSError):  # closed by then, as it should be
                        stranger.sendall(SLOW_WORDS[place : place + 1])
                time.sleep(SLOW_SECONDS)

    def _address(self, rank: int) -> tuple[str, int]:
        host, _, port = str(self._entry(rank)["address"]).rpartition(":")
        return host, int(port)

    def _entry(self, rank: int) -> dict:
        return read_entry(rank, rank_file(self._population.registry, rank))

    def _spoil_registry(self, fault: Fault, dice: random.Random) -> None:
        """For a while the rank's file, or the leader's, shows what it held before, half of it, or noise."""
        registry = self._population.registry
        path = dice.choice((rank_file(registry, fault.rank), registry / "ranking.json"))
        old = path.read_bytes()
        ways = {"what it held before": old, "half of it": old[: len(old) // 2], "noise": dice.randbytes(512)}
        how = dice.choice(list(ways))
        fault.detail = f"{path.name} shows {how}, ten times in 5 s"
        for _ in range(10):
            path.write_bytes(ways[how])
            time.sleep(0.5)

    def _haunt(self, fault: Fault, dice: random.Random) -> None:
        """A process that the registry shows alive for some beats, at an address where nobody listens; then no more."""
        rank = GHOST_RANK + self.faults.index(fault)
        fault.detail = f"rank {rank}"
        ghost = {"rank": rank, "incarnation": dice.randbytes(16).hex(), "address": "127.0.0.1:1"}
        for beat in range(GHOST_BEATS):
            content = json.dumps(self._entry(fault.rank) | ghost | {"sequence": beat + 1})
            atomic_write(rank_file(self._population.registry, rank), content, durable=False)
            time.sleep(2.0)

    def _cut_links(self, fault: Fault, _: random.Random) -> None:
        links = [path for path in self._population.run_dir.glob("*.pt") if path.is_symlink()]
        for number, link in enumerate(links):
            link.unlink(missing_ok=True)
            if number % 2:
                replace_symlink(link, "checkpoint_that_never_was.pt")
        fault.detail = f"{len(links)} links removed, half of them made again to point nowhere"


def _truncate(own: list[Path], dice: random.Random) -> str:
    kept = dice.randrange(own[-1].stat().st_size)
    os.truncate(own[-1], kept)
    return f"{own[-1].name} cut to {kept} bytes"


def _flip(own: list[Path], dice: random.Random) -> str:
    content = bytearray(own[-1].read_bytes())
    bit = dice.randrange(8 * len(content))
    content[bit // 8] ^= 1 << bit % 8
    own[-1].write_bytes(content)
    return f"bit {bit} of {own[-1].name}"


def _delete(own: list[Path], _: random.Random) -> str:
    for path in own:
        path.unlink(missing_ok=True)
    return f"{len(own)} checkpoints deleted"
