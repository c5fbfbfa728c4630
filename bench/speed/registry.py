"""The registry in the shared folder: what a heartbeat costs a rank, by the number of ranks, beside its period."""

import tempfile
import time
from collections.abc import Iterator
from pathlib import Path

from bench.speed.timing import Goal, Row, Setting, Spread
from gossip.config import GossipConfig
from gossip.filesystem_coordinator import FilesystemCoordinator

SIZES = (1, 2, 4, 8, 16, 1024)
# What a rank of a real run publishes, by kind and length.
RECORD = {"address": "192.168.100.100:65000", "step": 123456, "fitness": 1.2345678} | {
    f"figure_{number}": 123.456789 * number for number in range(20)
}


def measure(setting: Setting) -> Iterator[Row]:
    """A follower's beat reads the leader's one file; the leader's reads all of them and writes that one."""
    period = GossipConfig.heartbeat_seconds
    for size in (1, 3) if setting.quick else SIZES:
        setting.tell(f"{size} ranks")
        with tempfile.TemporaryDirectory() as folder:
            ranks = [
                FilesystemCoordinator(Path(folder), rank, size, f"{rank:032x}", GossipConfig.liveness_seconds)
                for rank in range(size)
            ]
            for coordinator in (*ranks, *ranks[:1]):
                coordinator.beat(RECORD)
            times: dict[str, list[float]] = {"leader": [], "follower": []}
            for _ in range(setting.times(9)):
                for role, coordinator in zip(times, (ranks[0], ranks[-1]), strict=True):
                    began = time.perf_counter()
                    roster = coordinator.beat(RECORD)
                    times[role].append(time.perf_counter() - began)
                    assert len(roster.members) == size, f"{len(roster.members)} of {size}"
        for role in times if size > 1 else ("leader",):
            seconds = Spread.of(times[role])
            share = Spread(*(each / period for each in seconds))
            goal = Goal("<=", 0.01) if size == SIZES[-1] and role == "follower" else None
            case = f"a beat among {size} ranks, {role}"
            yield Row(case, seconds.median * 1e3, "ms", "heartbeat", period * 1e3, share, goal, "of it")
