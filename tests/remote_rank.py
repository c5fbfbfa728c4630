"""Ranks in processes of their own, on whatever host those run: they train all the time, and do as they are told.

The process (`python -m tests.remote_rank`) reads one order a line from standard input, as JSON, and answers each with a
line that reports on its rank. It ends when its standard input does.
"""

import csv
import json
import queue
import subprocess
import sys
import threading
import time
from pathlib import Path

import torch

from gossip.network_utils import choose_address, listen
from runtime.ranks import Identity
from tests import gossip_helpers
from tests.gossip_helpers import PATIENCE, Rank, make_state
from tests.hosts import Host

PORT = 29400


class RemoteRank:
    """A process on `host`, and the rank in it from begin() to end()."""

    def __init__(self, host: Host) -> None:
        self.host = host
        self.address = f"{host.address}:{PORT}"
        self._process = host.start("-m", "tests.remote_rank", stdin=subprocess.PIPE, stdout=subprocess.PIPE, bufsize=1)

    def begin(self, folder: Path, rank: int, **options: object) -> None:
        """Start a rank that listens on eth0; options: items in each tensor, value of all of them, fitness, and
        GossipConfig's."""
        self.log = folder / "gossip_logs" / f"run_rank_{rank:04d}.tsv"
        self.order(begin={"folder": str(folder), "rank": rank, **options})

    def order(self, **order: object) -> dict:
        """call=True: call a peer; register="host:port": publish another address; begin; end.

        Returns the rank's report after that: step, seconds (on its clock), values (first and last of each tensor),
        counters, addresses of its live peers.
        """
        self._process.stdin.write(json.dumps(order) + "\n")
        answer = self._process.stdout.readline()
        assert answer, f"the process of {self.address} ended with {self._process.wait()}"
        return json.loads(answer)

    def failures(self) -> list[str]:
        """What its event log says of failed conversations."""
        with open(self.log, newline="") as file:
            return [row["message"] for row in csv.DictReader(file, delimiter="\t") if row["event"] == "failed"]

    def close(self) -> None:
        """End the process, which must end well."""
        self._process.stdin.close()
        assert self._process.wait(PATIENCE) == 0


def obey() -> None:
    """Take orders until standard input ends, and train in between."""
    orders: queue.SimpleQueue[dict | None] = queue.SimpleQueue()

    def read() -> None:
        for line in sys.stdin:
            orders.put(json.loads(line))
        orders.put(None)

    threading.Thread(target=read, daemon=True).start()
    rank = None
    while True:
        try:
            order = orders.get(block=rank is None)
        except queue.Empty:
            train_step(rank)
            continue
        if rank is not None and (order is None or "end" in order):
            rank.node.close()
            rank.log.close()
            rank = None
        if order is None:
            return
        if "begin" in order:
            rank = begin(**order["begin"])
        if "register" in order:
            rank.node.address = order["register"]
        if "call" in order:
            rank.call()
        print(json.dumps(report(rank) if rank else {}), flush=True)


def begin(folder: str, rank: int, items: int = 100, value: float = 0.0, fitness: float | None = None, **config) -> Rank:
    """A rank of a population of 8 on as many hosts, listening where interface eth0 is."""
    where = choose_address("eth0", Identity(rank, 0, 8, 1, "alone"))
    gossip_helpers.listen = lambda _, port: listen(where, port)
    made = Rank(Path(folder), rank, state=make_state(value, shapes=((items,),)), port=PORT, **config)
    made.fitness = fitness
    return made


def train_step(rank: Rank) -> None:
    """About a millisecond of work, and a step boundary."""
    rank.step += 1
    torch.ones(128, 128) @ torch.ones(128, 1024)
    rank.node.before_write()
    rank.boundary()


def report(rank: Rank) -> dict:
    """What the tests want to know of a rank."""
    roster = rank.node.roster
    return {
        "step": rank.step,
        "seconds": time.monotonic(),
        "values": sorted({float(tensor.view(-1)[place]) for tensor in rank.live.values() for place in (0, -1)}),
        "counters": vars(rank.node.counters),
        "addresses": [member.address for member in roster.peers(rank.log.rank)] if roster else [],
    }


if __name__ == "__main__":
    torch.set_num_threads(1)
    obey()
