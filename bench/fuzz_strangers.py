"""A rank in training, real and whole, while strangers call it: what do they cost it, and is one of them let in?

Calm and hostile phases take turns, so that what else the machine does falls on both alike. A friend, another real rank
that holds the secret, mixes with the rank before the first phase (through a recorder, for the replays) and after the
last.
"""

import asyncio
import secrets
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.fuzz_callers import CALLERS, Account, Recorder, assault
from bench.fuzz_rank import Rank, Sample
from gossip.network_utils import join_address

WATCH_SECONDS = 1.0  # between looks at memory, descriptors and threads
SETTLE_SECONDS = 2.0  # training before the first phase, and after the last
MIXED = ("sent", "merged", "averaged")  # the ends of a conversation in which weights travelled
ALONE = ("--gossip_mixing_rate", "0", "--save_every", "1m", "--log_every", "10")
FRIENDLY = ("--gossip_mixing_rate", "0.1", "--save_every", "1m", "--no_filesystem_coordinator", "--gossip_peers")


async def measure(cwd: Path, data: Path, connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """Let `connections` strangers, `rate` a second, call a rank that trains on `data`, in phases of `seconds`.

    Returns the figures. Raises UserError if the rank or its friend does not train, mix or leave as it should.
    """
    secret = secrets.token_hex(32)
    hostile = max(2, round(connections / (rate * seconds)))
    rank = Rank(cwd / "rank", 0, 1, secret, data, *ALONE)
    try:
        await rank.until(lambda: rank.metrics() and rank.address, "to train")
        recorder = Recorder(rank.address)
        async with recorder.listening() as address:
            await _mix(rank, Rank(cwd / "friend", 1, 2, secret, data, *FRIENDLY, address))
        recording = bytes(max(recorder.recordings, key=len))
        await asyncio.sleep(SETTLE_SECONDS)
        events = len(rank.events())
        phases, account = [], Account()
        before = peak = rank.resources()
        for number in tqdm(range(2 * hostile + 1), unit="phase", disable=None):
            first = await rank.sample()
            if number % 2:
                count = connections * (number // 2 + 1) // hostile - connections * (number // 2) // hostile
                work = assault(rank.address, count, rate, recording, account)
            else:
                work = asyncio.sleep(seconds)
            peak = await _watch(rank, asyncio.ensure_future(work), peak)
            phases.append((first, await rank.sample()))
        await asyncio.sleep(SETTLE_SECONDS)
        resources = {"before": before, "peak": peak, "after": rank.resources()}
        said = rank.events()[events:]
        await _mix(rank, Rank(cwd / "late_friend", 1, 2, secret, data, *FRIENDLY, join_address(*rank.address)))
        await rank.stop()
    finally:
        rank.kill()
    return _figures(phases, account, resources, said, rate, seconds)


async def _mix(rank: Rank, friend: Rank) -> None:
    """Let a friend call until weights have travelled, and leave."""
    try:
        known = len(rank.events())
        await friend.until(lambda: any(row["event"] in MIXED for row in rank.events()[known:]), "to mix with rank 0")
        await friend.stop()
    finally:
        friend.kill()


async def _watch(rank: Rank, work: asyncio.Future, peak: dict[str, int]) -> dict[str, int]:
    """Wait for `work`; the most that the rank held of anything meanwhile, or before."""
    while not work.done():
        await asyncio.wait({work}, timeout=WATCH_SECONDS)
        now = rank.resources()
        peak = {name: max(most, now[name]) for name, most in peak.items()}
    work.result()
    return peak


def _figures(
    phases: list[tuple[Sample, Sample]],
    account: Account,
    resources: dict[str, dict[str, int]],
    said: list[dict[str, str]],
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    first, last = phases[0][0], phases[-1][1]
    accepted = {
        "strangers that heard more than a nonce": account.accepted,
        "authenticated calls that the rank counted": last.received - first.received,
        "events of the rank with an exchange": sum(row["exchange_id"] != "NA" for row in said),
    }
    costs = {
        "training_cpu_ms_per_step": [(b.training_cpu - a.training_cpu) / (b.step - a.step) * 1e3 for a, b in phases],
        "process_cpu_ms_per_step": [(b.process_cpu - a.process_cpu) / (b.step - a.step) * 1e3 for a, b in phases],
        "wall_ms_per_step": [(b.seconds - a.seconds) / (b.step - a.step) * 1e3 for a, b in phases],
    }
    return {
        "connections": account.connections.total(),
        "connections_per_second": rate,
        "phase_seconds": seconds,
        "by_kind": {
            kind: {"connections": account.connections[kind], "closed_by_the_rank": account.refused[kind]}
            for kind in CALLERS
        },
        "unreached": account.unreached,
        "accepted": accepted,
        "failures_counted": last.failed - first.failed,
        "lines_logged": len(said),
        "resources": resources,
        "costs": {name: _compared(values) for name, values in costs.items()},
        "phases": [[asdict(sample) for sample in phase] for phase in phases],
    }


def _compared(values: list[float]) -> dict[str, Any]:
    """Medians over calm and hostile phases, which took turns; each hostile one's ratio to the calm ones beside it."""
    calm, hostile = values[::2], values[1::2]
    ratios = [2 * cost / (one + other) for cost, one, other in zip(hostile, calm[:-1], calm[1:], strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
    return {
        "calm": statistics.median(calm),
        "hostile": statistics.median(hostile),
        "ratio": middle,
        "ratio_quartiles": [low, high],
        "ratio_range": [min(ratios), max(ratios)],
    }
