"""One heat: one model trained for its time and measured; its result is a file, so that it is never run again."""

import dataclasses
import hashlib
import importlib.util
import json
import math
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bench.evidence import write_result
from bench.race.contestant import Contestant, measure
from bench.race.ours import Ours
from bench.race.rivals import RIVALS, Rival
from runtime.errors import UserError
from training.data import Region

MODELS = ("ours", *RIVALS)


@dataclass(frozen=True)
class Heat:
    """Everything that a result depends on but the machine. rate: a rival's; flags: ours, those of train.py.

    clock: "wall", or "cpu": the process's CPU time over its threads, by which a shared machine is less unfair.
    """

    model: str
    minutes: float
    clock: str
    seed: int
    parameters: int
    threads: int
    fingerprint: str
    rate: float | None = None
    flags: str | None = None

    def path(self, folder: Path) -> Path:
        """Where its result is."""
        key = hashlib.sha256(json.dumps(dataclasses.asdict(self), sort_keys=True).encode()).hexdigest()[:8]
        return folder / f"{self.model}_{self.minutes:g}min_{self.clock}_seed{self.seed}_{key}.json"


def build(heat: Heat, given: dict[str, Any] | None, training: Region) -> Contestant:
    """The contestant, untrained. given: what parse_flags made of the flags, for ours. Raises UserError."""
    if heat.model == "ours":
        return Ours(given, training, heat.seed)
    if heat.model == "mingru_pytorch" and importlib.util.find_spec("minGRU_pytorch") is None:
        raise UserError("expected the package minGRU-pytorch, got none: pip install -r requirements-dev.txt")
    return Rival(heat.model, heat.parameters, heat.rate, training, heat.seed)


def run(
    heat: Heat, contestant: Contestant, held_out: Region, folder: Path, curve_seconds: float | None = None
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
            curve.append({"seconds": seconds[heat.clock], "steps": steps, **measure(contestant, held_out)})
            due += curve_seconds
    result = {
        "heat": dataclasses.asdict(heat), "told": contestant.told, "parameters": contestant.parameters,
        "steps": steps, "bytes_seen": seen, "wall_s": seconds["wall"], "cpu_s_a_thread": seconds["cpu"],
        "loss": measure(contestant, held_out), "curve": curve,
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
