"""Which checkpoints stay: the newest of every rank, the population's best, and a share of the rest as an archive.

Works on names alone, so any rank may do it at any moment, and two at once do no harm: everybody repeats it until
the folder is as it should be.
"""

import itertools
import os
import random
import re
from dataclasses import dataclass
from pathlib import Path

from runtime.files import TEMPORARY_SUFFIX, replace_symlink, stale_temporaries
from training.checkpoint import CheckpointFile, best_first, list_checkpoints

_ARCHIVE = re.compile(r"archive_(\d{3,})\.pt")
_ROUNDS = 5


@dataclass(frozen=True)
class RetentionPolicy:
    """keep_checkpoints: newest files of each rank; keep_elite: best of the population; archive_rate: 0 ... 1."""

    keep_checkpoints: int
    keep_elite: int
    archive_rate: float


def tidy(run_dir: Path, policy: RetentionPolicy, dice: random.Random) -> None:
    """Point the symlinks latest.pt, best.pt, elite_01.pt ... and remove or archive what the policy does not keep.

    Links move before files go, so a link never dangles for longer than two ranks tidy at once. Raises OSError.
    """
    for _ in range(_ROUNDS):
        files = list_checkpoints(run_dir)
        if not files:
            return
        kept, links = plan(files, policy)
        changed = _point_links(run_dir, links)
        for file in files:
            if file.path not in kept:
                changed = True
                _retire(file.path, dice.random() < policy.archive_rate)
        if not changed:
            return


def retire_from(run_dir: Path, rank: int, step: int) -> None:
    """Archive the rank's checkpoints of `step` and later steps: they belong to a line that ended.

    Left in place, they would pass for its newest. Raises OSError.
    """
    for file in list_checkpoints(run_dir):
        if file.rank == rank and file.step >= step:
            _retire(file.path, archive=True)


def remove_leftovers(run_dir: Path, rank: int) -> None:
    """Remove what killed processes left half done: this rank's saves, and whatever dead processes of this host wrote.

    For a process that holds the rank and has not saved yet: nobody is writing the rank's checkpoints then. Raises
    OSError.
    """
    leftovers = set(run_dir.glob(f".checkpoint_rank_{rank:04d}_*{TEMPORARY_SUFFIX}"))
    for folder in (run_dir, run_dir / "population", run_dir / "metrics"):
        if folder.is_dir():
            leftovers.update(stale_temporaries(folder))
    for path in leftovers:
        path.unlink(missing_ok=True)


def disk_use(run_dir: Path, policy: RetentionPolicy, file_bytes: int, world_size: int) -> str:
    """One line: what a checkpoint of `file_bytes` takes, and at most all of them: those kept, those of ranks that the
    run had before, and one that each rank is writing.
    """
    ranks = set(range(world_size)) | {file.rank for file in list_checkpoints(run_dir)}
    most = len(ranks) * policy.keep_checkpoints + policy.keep_elite + world_size
    archive = ", beside the archive" if policy.archive_rate else ""
    shown = f"{_megabytes(file_bytes)} each, at most {_megabytes(most * file_bytes)}"
    return f"checkpoints: {shown} for {world_size} rank{'s' if world_size > 1 else ''}{archive}"


def _megabytes(count: int) -> str:
    return f"{count / 1e6:,.1f} MB"


def plan(files: list[CheckpointFile], policy: RetentionPolicy) -> tuple[set[Path], dict[str, str]]:
    """The paths to keep, and the symlinks (name -> file name) to have."""
    newest: dict[int, list[CheckpointFile]] = {}
    for file in files:
        newest.setdefault(file.rank, []).append(file)
    ranking = best_first(files)
    elite = [file for file in ranking[: policy.keep_elite] if file.loss is not None]
    kept = elite + [file for own in newest.values() for file in own[-policy.keep_checkpoints :]]
    links = {
        "latest.pt": max(kept, key=lambda file: (file.step, -file.rank)).path.name,
        "best.pt": best_first(kept)[0].path.name,
    }
    links |= {f"elite_{place:02d}.pt": file.path.name for place, file in enumerate(elite, start=1)}
    return {file.path for file in kept}, links


def _point_links(run_dir: Path, links: dict[str, str]) -> bool:
    changed = False
    for name, target in links.items():
        link = run_dir / name
        if not (link.is_symlink() and os.readlink(link) == target):
            replace_symlink(link, target)
            changed = True
    for link in run_dir.glob("elite_*.pt"):
        if link.name not in links:
            link.unlink(missing_ok=True)
            changed = True
    return changed


def _retire(path: Path, archive: bool) -> None:
    """Remove a checkpoint, or give it the archive's next name. Of several ranks that do so at once one does."""
    if not archive:
        path.unlink(missing_ok=True)
        return
    taken = [int(match[1]) for match in map(_ARCHIVE.fullmatch, os.listdir(path.parent)) if match]
    for number in itertools.count(max(taken, default=0) + 1):
        place = path.with_name(f"archive_{number:03d}.pt")
        try:
            os.link(path, place)  # unlike a rename, fails where another rank has just taken the number
        except FileExistsError:
            continue
        except FileNotFoundError:  # another rank has retired it
            return
        break
    try:
        path.unlink()
    except FileNotFoundError:  # while we linked it, another rank did, or removed it
        place.unlink()
