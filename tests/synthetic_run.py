"""The files of a made-up run, of any number of ranks, for what only reads them: watch.py and plot_train.R."""

import csv
import json
import random
from datetime import datetime, timedelta, timezone
from pathlib import Path

from gossip import event_log
from training import metrics

ASYMPTOTE, AMPLITUDE, DECAY = 0.9, 4.6, 0.45  # nats per byte: loss = ASYMPTOTE + AMPLITUDE * step ** -DECAY
HELD_OUT = 0.1  # nats per byte: held-out above training
LOG_EVERY = 10
SECONDS_A_STEP = 0.25
BYTES_A_STEP = 8 * 1024
BEGAN = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)


def write_run(
    run_dir: Path, ranks: int, steps: int = 3000, mixes: int | None = None, method: str = "recombination",
    spread: float = 0.15, seed: int = 0,
) -> Path:  # fmt: skip
    """A finished run: config.json and metrics/ in `run_dir`, gossip_logs/ beside it.

    Every rank's loss follows one power law, with noise and an offset of its own that a mix takes over from the
    winner. mixes: in all, over the whole run, by default 5 a rank; spread: of the offsets, in nats per byte.
    """
    dice = random.Random(seed)
    offsets = [abs(dice.gauss(0, spread)) for _ in range(ranks)]
    counts = [dict.fromkeys(("won", "lost"), 0) for _ in range(ranks)]
    total = 5 * ranks if mixes is None else mixes
    calls = sorted(dice.uniform(0.05 * steps, steps) for _ in range(total)) if ranks > 1 else []
    rows: list[list[dict]] = [[] for _ in range(ranks)]
    events: list[list[dict]] = [[] for _ in range(ranks)]
    for step in range(LOG_EVERY, steps + 1, LOG_EVERY):
        while calls and calls[0] <= step:
            _mix(dice, calls.pop(0), offsets, counts, events, method)
        for rank in range(ranks):
            ema = curve(step) + offsets[rank] + dice.gauss(0, 0.004)
            rows[rank].append(
                {
                    "rank": rank, "step": step, "time_s": step * SECONDS_A_STEP, "loss": ema + dice.gauss(0, 0.05),
                    "ema_loss": ema, "val_loss": ema + HELD_OUT if step % (25 * LOG_EVERY) == 0 else None,
                    "bytes_seen": step * BYTES_A_STEP, "bytes_per_s": BYTES_A_STEP / SECONDS_A_STEP, "lr": 0.003,
                    **counts[rank],
                }
            )  # fmt: skip
    options = {"gossip_merge_method": method, "gossip_recombination_alpha": 0.5, "gossip_liveness": 30.0}
    run_dir.mkdir(parents=True)
    config = {"world_size": ranks, "options": {"population": options}}
    (run_dir / "config.json").write_text(json.dumps(config, indent=2))
    for rank in range(ranks):
        _write(run_dir / "metrics" / f"rank_{rank:04d}.tsv", metrics.COLUMNS, rows[rank])
        log = run_dir.parent / "gossip_logs" / f"{run_dir.name}_rank_{rank:04d}.tsv"
        _write(log, event_log.COLUMNS, events[rank])
    return run_dir


def curve(step: float) -> float:
    """The loss that all ranks follow, in nats per byte."""
    return ASYMPTOTE + AMPLITUDE * step**-DECAY


def _mix(dice: random.Random, when: float, offsets: list, counts: list, events: list, method: str) -> None:
    """One exchange between two random ranks: a line at each end, as ranks write them."""
    pair = dice.sample(range(len(offsets)), 2)
    winner, loser = sorted(pair, key=offsets.__getitem__)
    shared = {"exchange_id": f"{dice.getrandbits(64):016x}", "bytes": 1 << 20, "milliseconds": 12.5}
    fitness = {rank: curve(when) + offsets[rank] for rank in pair}
    names = {"average": ("averaged", "averaged")}.get(method, ("sent", "merged"))
    for rank, peer, event in ((winner, loser, names[0]), (loser, winner, names[1])):
        stamp = (BEGAN + timedelta(seconds=when * SECONDS_A_STEP)).isoformat(timespec="milliseconds")
        events[rank].append(
            {
                "timestamp": stamp.replace("+00:00", "Z"), "rank": rank, "event": event, "step": int(when),
                "fitness": f"{fitness[rank]:.6f}", "peer": peer, "message": "made up", **shared,
            }
        )  # fmt: skip
    offsets[loser] = (offsets[loser] + offsets[winner]) / 2
    counts[winner]["won"] += 1
    counts[loser]["lost"] += 1


def _write(path: Path, columns: tuple[str, ...], rows: list[dict]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="NA", delimiter="\t", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {name: f"{value:.6g}" if isinstance(value, float) else value for name, value in row.items()}
            writer.writerow({name: "NA" if cell is None else cell for name, cell in cells.items()})
