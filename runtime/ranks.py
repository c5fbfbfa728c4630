"""Who this process is in the population: told by torchrun, by Slurm, or nobody."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from runtime.errors import UserError

_SOURCES = (
    ("environment", ("RANK", "WORLD_SIZE", "LOCAL_RANK")),
    ("slurm", ("SLURM_PROCID", "SLURM_NPROCS", "SLURM_LOCALID")),
)
_RESTART_COUNTS = ("TORCHELASTIC_RESTART_COUNT", "SLURM_RESTART_COUNT")
LAUNCHER = "GRUBOROS_LAUNCHER"
BEGAN = "GRUBOROS_BEGAN"


@dataclass(frozen=True)
class Identity:
    """One process of the population.

    rank: 0 ... world_size-1 in the population; local_rank: 0 ... on this host, which picks the device;
    local_world_size: processes on this host; source: who said so, "environment" (torchrun's names), "slurm" or "alone";
    restarts: how often it was started before, by its launcher or with its Slurm job; of runtime.launch alone, None with
    another or none: launcher: its process id; began: when it first started this rank, on time.monotonic.
    """

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    source: str
    restarts: int = 0
    launcher: int | None = None
    began: float | None = None


def identity_from_environment(environment: Mapping[str, str]) -> Identity:
    """RANK / LOCAL_RANK / WORLD_SIZE, else SLURM_PROCID / SLURM_LOCALID / SLURM_NPROCS, else 0 / 0 / 1.

    Restarts are the sum of TORCHELASTIC_RESTART_COUNT and SLURM_RESTART_COUNT (of the whole job), each 0 if absent.
    LOCAL_WORLD_SIZE may be absent: then a world with LOCAL_RANK == RANK everywhere cannot be told from several
    hosts, and 1 is assumed for a population of one, 0 ("not known") otherwise. Of Slurm it is known where all are on
    one node, or equally many on each.
    Raises UserError for a value that is no number, for a rank outside its world, and for a WORLD_SIZE without one.
    """
    history = {
        "restarts": sum(_number(environment, name) for name in _RESTART_COUNTS if name in environment),
        "launcher": _number(environment, LAUNCHER) if LAUNCHER in environment else None,
        "began": _number(environment, BEGAN, float) if BEGAN in environment else None,
    }
    for source, (rank_name, world_name, local_name) in _SOURCES:
        if rank_name not in environment or (source == "slurm" and world_name not in environment):  # a plain sbatch
            continue
        rank = _number(environment, rank_name)
        world_size = _number(environment, world_name)
        local_rank = _number(environment, local_name)
        known = _known(environment, "LOCAL_WORLD_SIZE") if source == "environment" else _tasks(environment, world_size)
        local_world_size = known or int(world_size == 1)
        if not 0 <= rank < world_size or local_rank < 0:
            raise UserError(
                f"expected 0 <= {rank_name} < {world_name} and {local_name} >= 0, "
                f"got {rank_name}={rank} {world_name}={world_size} {local_name}={local_rank}: mend the launcher"
            )
        return Identity(rank, local_rank, world_size, local_world_size, source, **history)
    if environment.get("WORLD_SIZE", "1") != "1":
        raise UserError(
            f"expected RANK in the environment beside WORLD_SIZE={environment['WORLD_SIZE']}, got none: set it, or "
            "unset WORLD_SIZE"
        )
    return Identity(rank=0, local_rank=0, world_size=1, local_world_size=1, source="alone", **history)


def _tasks(environment: Mapping[str, str], world_size: int) -> int:
    """Slurm's tasks on each node; 0: not known. SLURM_NTASKS_PER_NODE is only a maximum where --ntasks is given too."""
    nodes, most = _known(environment, "SLURM_NNODES"), _known(environment, "SLURM_NTASKS_PER_NODE")
    if nodes == 1:
        return world_size
    return most if nodes * most == world_size else 0


def _known(environment: Mapping[str, str], name: str) -> int:
    text = environment.get(name, "")
    return int(text) if text.isdigit() else 0


def _number(environment: Mapping[str, str], name: str, kind: type = int) -> Any:
    text = environment.get(name)
    if text is None:
        raise UserError(f"expected {name} in the environment beside the rank, got none: set it in the launcher")
    try:
        return kind(text)
    except ValueError:
        wanted = "a whole number" if kind is int else "a number"
        raise UserError(f"expected {wanted} in {name}, got {text!r}: mend the launcher") from None
