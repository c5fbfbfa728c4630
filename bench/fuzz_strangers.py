"""A rank in training, real and whole, while strangers call it: what do they cost it, and is one of them let in?

Phases take turns, so that what else the machine does falls on all alike: calm, decoy (the strangers call something
else, which shows what their own load does to the machine) and hostile. A friend, another real rank that holds the
secret, mixes with the rank before the first phase (through a recorder, for the replays) and after the last.
"""

import asyncio
import secrets
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tqdm import tqdm

from bench.fuzz_callers import CALLERS, Account, Recorder, assault, decoy
from bench.fuzz_rank import Rank, Sample
from gossip.network_utils import join_address

WATCH_SECONDS = 1.0  # between looks at memory, descriptors and threads
SETTLE_SECONDS = 2.0  # training before the first phase, and after the last
MODES = ("calm", "decoy", "hostile")
MIXED = ("sent", "merged", "averaged")  # the ends of a conversation in which weights travelled
ALONE = ("--gossip_mixing_rate", "0", "--save_every", "1m", "--log_every", "10")
FRIENDLY = ("--gossip_mixing_rate", "0.1", "--save_every", "1m", "--no_filesystem_coordinator", "--gossip_peers")

Phase = tuple[Sample, Sample]  # its beginning and its end


async def measure(cwd: Path, data: Path, connections: int, rate: float, seconds: float) -> dict[str, Any]:
    """Let `connections` strangers, `rate` a second, call a rank that trains on `data`, in phases of `seconds`.

    Returns the figures. Raises UserError if the rank or its friend does not train, mix or leave as it should.
    """
    secret = secrets.token_hex(32)
    rounds = max(2, round(connections / (rate * seconds)))
    rank = Rank(cwd / "rank", 0, 1, secret, data, *ALONE)
    try:
        await rank.until(lambda: rank.metrics() and rank.address, "to train")
        recorder = Recorder(rank.address)
        async with recorder.listening() as address:
            await _mix(rank, Rank(cwd / "friend", 1, 2, secret, data, *FRIENDLY, address))
        recording = bytes(max(recorder.recordings, key=len))
        await asyncio.sleep(SETTLE_SECONDS)
        events = len(rank.events())
        phases: dict[str, list[Phase]] = {mode: [] for mode in MODES}
        account = Account()
        before = peak = rank.resources()
        async with decoy() as elsewhere:
            for number in tqdm(range(rounds * len(MODES)), unit="phase", disable=None):
                turn, place = divmod(number, len(MODES))
                mode = MODES[(turn + place) % len(MODES)]  # in another order each round, against drift
                count = connections * (turn + 1) // rounds - connections * turn // rounds
                if mode == "calm":
                    work = asyncio.sleep(seconds)
                elif mode == "decoy":
                    work = assault(elsewhere, count, rate, recording, Account())
                else:
                    work = assault(rank.address, count, rate, recording, account)
                first = await rank.sample()
                peak = await _watch(rank, asyncio.ensure_future(work), peak)
                phases[mode].append((first, await rank.sample()))
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
    phases: dict[str, list[Phase]],
    account: Account,
    resources: dict[str, dict[str, int]],
    said: list[dict[str, str]],
    rate: float,
    seconds: float,
) -> dict[str, Any]:
    every = [sample for mode in MODES for phase in phases[mode] for sample in phase]
    first, last = (choose(every, key=lambda sample: sample.seconds) for choose in (min, max))
    accepted = {
        "strangers that heard more than a nonce": account.accepted,
        "authenticated calls that the rank counted": last.received - first.received,
        "events of the rank with an exchange": sum(row["exchange_id"] != "NA" for row in said),
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
        "costs": {name: _cost(phases, name) for name in ("training_cpu", "process_cpu", "seconds")},
        "phases": {mode: [[asdict(sample) for sample in phase] for phase in phases[mode]] for mode in MODES},
    }


def _cost(phases: dict[str, list[Phase]], name: str) -> dict[str, Any]:
    """Milliseconds of `name` per step: each mode's median, and a hostile phase's ratios to the others of its round."""
    per_step = {
        mode: [
            (getattr(end, name) - getattr(begin, name)) / (end.step - begin.step) * 1e3 for begin, end in phases[mode]
        ]
        for mode in MODES
    }
    cost: dict[str, Any] = {mode: statistics.median(values) for mode, values in per_step.items()}
    for mode in MODES[:-1]:
        ratios = [ours / theirs for ours, theirs in zip(per_step["hostile"], per_step[mode], strict=True)]
        low, middle, high = statistics.quantiles(ratios, n=4, method="inclusive")
        cost[f"hostile_to_{mode}"] = {"median": middle, "quartiles": [low, high], "range": [min(ratios), max(ratios)]}
    return cost
