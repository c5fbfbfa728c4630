"""Which checkpoint each rank goes on from when a run is resumed, with as many ranks, more, or fewer.

Ranks start one after another, and the first to save changes what the next one sees. So whenever the number of ranks
changes, the first rank to come writes down once, for all of them, who goes on from what: population/launch_<n>.json.
"""

import json
import os
import re
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from runtime.errors import UserError
from runtime.files import write_once
from runtime.ranks import Identity
from runtime.stderr import say
from training.checkpoint import (
    CheckpointError,
    CheckpointFile,
    OtherVersionError,
    UnreadableError,
    best_first,
    list_checkpoints,
    read_own_checkpoint,
)

READ_AGAIN_SECONDS = (1.0, 4.0, 15.0)  # after which a checkpoint that could not be read is read again
_LAUNCH = re.compile(r"launch_(\d{4,})\.json")


@dataclass(frozen=True)
class Launch:
    """What the ranks of one launch agree on.

    world_size: its number of ranks; sources: for each rank that does not go on from its own files, the name of the
    checkpoint it goes on from; known: the checkpoints there were, so that a rank's later ones tell that it went on.
    """

    world_size: int
    sources: dict[int, str]
    known: tuple[str, ...]


@dataclass(frozen=True)
class Source:
    """A checkpoint to go on from. moves: the rank takes over all of it, its place in the data and counters too;
    otherwise it is a copy of somebody's weights who goes on as well.
    """

    file: CheckpointFile
    moves: bool


@dataclass(frozen=True)
class Resumed:
    """The checkpoint that a rank goes on from; moves: with all of its state, else with its weights alone."""

    file: CheckpointFile
    content: dict[str, Any]
    moves: bool


def claim_launch(population: Path, launch: Launch) -> Launch:
    """Write `launch` as the next one, or return the one that another rank of the same launch wrote first.

    Raises UserError if that other rank counts another number of ranks; OSError.
    """
    number = max(_launches(population), default=0) + 1
    path = population / f"launch_{number:04d}.json"
    if write_once(path, json.dumps(asdict(launch)) + "\n"):
        return launch
    other = _read(path)
    if other.world_size != launch.world_size:
        raise UserError(
            f"expected all ranks to be started with one world size, got {launch.world_size} here and "
            f"{other.world_size} in {path}: start them again"
        )
    return other


def newest_launch(population: Path) -> Launch | None:
    """The last launch that was written down; None in a folder without any."""
    numbers = _launches(population)
    return _read(population / f"launch_{max(numbers):04d}.json") if numbers else None


def read_resumed(run_dir: Path, identity: Identity) -> Resumed | None:
    """The checkpoint to go on from: the first whole one of the candidates; those passed over are named.

    None where nobody has saved one yet, and, for a rank that was restarted, where none is whole: it begins again.
    Raises UserError where none is whole, or could be read, or the first is of another version: that one's work is
    whole, and is not to be begun again.
    """
    if not list_checkpoints(run_dir):
        return None
    unreadable = None
    for source in resume_sources(run_dir, identity.rank, identity.world_size):
        try:
            return Resumed(source.file, _read_patiently(source.file.path, identity.rank), source.moves)
        except OtherVersionError:
            raise
        except CheckpointError as error:
            say(f"warning: rank {identity.rank} passes over a checkpoint: {error}")
            unreadable = str(error) if isinstance(error, UnreadableError) else unreadable
    if unreadable is not None:
        raise UnreadableError(unreadable)
    if identity.restarts:
        return None
    raise UserError(f"expected a whole checkpoint to resume, got none in {run_dir}: start a new run")


def _read_patiently(path: Path, rank: int) -> dict[str, Any]:
    """read_own_checkpoint(), again after a while where the file could not be read: what is passed over for an older one
    is work to be done again, and most troubles of a filesystem end."""
    for pause in READ_AGAIN_SECONDS:
        try:
            return read_own_checkpoint(path)
        except UnreadableError as error:
            say(f"warning: rank {rank} reads a checkpoint again in {pause:g} s: {error}")
            time.sleep(pause)
    return read_own_checkpoint(path)


def resume_sources(run_dir: Path, rank: int, world_size: int) -> list[Source]:
    """What `rank` of `world_size` goes on from, the first choice first; the others serve if that one is not whole.

    A rank that has files goes on from its own newest; new ranks start from copies of the best. With fewer ranks than
    before the best go on: at their own rank if there still is one, else at the rank of one that does not go on.
    Raises UserError if the run has no checkpoint.
    """
    files = list_checkpoints(run_dir)
    if not files:
        raise UserError(f"expected a run directory with a checkpoint to resume, got none in {run_dir}: check the path")
    population = run_dir / "population"
    launch = newest_launch(population)
    if launch is None or launch.world_size != world_size:
        if launch is not None and launch.world_size > world_size:
            say(
                f"warning: the run had {launch.world_size} ranks and goes on with {world_size}: the best of them; the "
                "others would come back as copies"
            )
        launch = claim_launch(population, plan_launch(files, world_size, _last_that_trained(population, files)))
    own = [file for file in reversed(files) if file.rank == rank]
    first = own
    went_on = any(file.path.name not in launch.known for file in own)
    if rank in launch.sources and not went_on:
        first = [file for file in files if file.path.name == launch.sources[rank]]
    others = [file for file in best_first(files) if file not in first]
    return [Source(file, moves=file.rank == rank or file.rank >= world_size) for file in (first or []) + others]


def plan_launch(files: list[CheckpointFile], world_size: int, before: Launch | None) -> Launch:
    """Who goes on from what when `world_size` ranks take over a run with these checkpoints from the launch `before`."""
    newest = {file.rank: file for file in files}  # files come oldest first
    if before is not None:  # whom that launch dropped is behind: the others have trained since
        part = {
            rank: file for rank, file in newest.items() if rank < before.world_size or _awaited(file, before, files)
        }
        newest = part or newest
    ranking = best_first(list(newest.values()))
    staying = ranking[:world_size]
    heirs = [file for file in staying if file.rank >= world_size]
    sources = {}
    for rank in sorted(set(range(world_size)) - {file.rank for file in staying}):
        sources[rank] = (heirs.pop(0) if heirs else ranking[0]).path.name
    return Launch(world_size, sources, tuple(file.path.name for file in files))


def _awaited(file: CheckpointFile, launch: Launch, files: list[CheckpointFile]) -> bool:
    """Whether a rank of `launch` was to go on from `file` and has not saved since."""
    heirs = {rank for rank, name in launch.sources.items() if name == file.path.name}
    return bool(heirs - {other.rank for other in files if other.path.name not in launch.known})


def _last_that_trained(population: Path, files: list[CheckpointFile]) -> Launch | None:
    """The last launch since which a checkpoint was saved: one that ended before has dropped nobody."""
    for number in sorted(_launches(population), reverse=True):
        launch = _read(population / f"launch_{number:04d}.json")
        if any(file.path.name not in launch.known for file in files):
            return launch
    return None


def _launches(population: Path) -> list[int]:
    names = os.listdir(population) if population.is_dir() else []
    return [int(match[1]) for match in map(_LAUNCH.fullmatch, names) if match]


def _read(path: Path) -> Launch:
    try:
        content = json.loads(path.read_text())
        sources = {int(rank): str(name) for rank, name in content["sources"].items()}
        return Launch(int(content["world_size"]), sources, tuple(content["known"]))
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise UserError(f"expected a readable {path}, got {error}: mend the file") from None
