"""One heat: one model trained for its time and measured; its result is a file, so that it is never run again."""

import dataclasses
import hashlib
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence import write_result
from bench.race.contestant import Contestant, measure
from runtime.errors import UserError
from training.data import Region


@dataclass(frozen=True)
class Heat:
    """Everything that a result depends on but the machine.

    clock: "wall", or "cpu": the process's CPU time over its threads, by which a shared machine is less unfair.
    measured: on "held-out" bytes, or to tune. options: those of the contestant's plan.
    """

    model: str
    minutes: float
    clock: str
    seed: int
    threads: int
    fingerprint: str
    measured: str
    options: dict[str, Any]

    def path(self, folder: Path) -> Path:
        """Where its result is."""
        key = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"{self.model}_{self.minutes:g}min_{self.clock}_{self.measured}_seed{self.seed}_{key}.json"


def run(
    heat: Heat, contestant: Contestant, unseen: Region, folder: Path, curve_seconds: float | None = None
) -> dict[str, Any]:
    """Train for the heat's minutes, measure, write the result.

    curve_seconds: measure about so often in between too, on a clock that stands still meanwhile.
    """
    budget, due, seen, steps, curve = heat.minutes * 60, curve_seconds or math.inf, 0, 0, []
    seconds = {"wall": 0.0, "cpu": 0.0}
    while seconds[heat.clock] < budget:
        before = _clocks(heat.threads)
        seen += contestant.train_step(seconds[heat.clock] / budget)
        steps += 1
        seconds = {name: seconds[name] + now - before[name] for name, now in _clocks(heat.threads).items()}
        if due <= seconds[heat.clock] < budget:
            curve.append({"seconds": seconds[heat.clock], "steps": steps, **measure(contestant, unseen)})
            due += curve_seconds
    result = {
        "heat": dataclasses.asdict(heat), "told": contestant.told, "parameters": contestant.parameters,
        "steps": steps, "bytes_seen": seen, "wall_s": seconds["wall"], "cpu_s_a_thread": seconds["cpu"],
        "loss": measure(contestant, unseen), "curve": curve,
    }  # fmt: skip
    write_result(heat.path(folder), "race", result)
    return result


def _clocks(threads: int) -> dict[str, float]:
    return {"wall": time.monotonic(), "cpu": time.process_time() / threads}


def read(heat: Heat, folder: Path) -> dict[str, Any] | None:
    """The result of a heat that was run; None if it was not. Raises UserError for a file that holds none."""
    path = heat.path(folder)
    return read_file(path) if path.exists() else None


def read_all(folder: Path) -> list[dict[str, Any]]:
    """Every result in a folder. Raises UserError as read does."""
    return [read_file(path) for path in sorted(folder.glob("*min_*_seed*.json"))]


def read_file(path: Path) -> dict[str, Any]:
    """One result. Raises UserError."""
    try:
        result = json.loads(path.read_text())
        Heat(**result["heat"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected a result of the race in {path}, got {error!r}: remove it") from None
    return result
