import errno
import os
import random
import signal
import subprocess
import sys
import threading
from pathlib import Path

import pytest

from runtime.files import temporary_name
from training.checkpoint import checkpoint_name, list_checkpoints
from training.retention import RetentionPolicy, disk_use, plan, remove_leftovers, tidy


def make(run_dir: Path, *files: tuple[int, int, float | None]) -> None:
    for rank, step, loss in files:
        (run_dir / checkpoint_name(rank, step, loss)).write_text(f"{rank} {step}")


def kept(run_dir: Path) -> set[tuple[int, int]]:
    return {(file.rank, file.step) for file in list_checkpoints(run_dir)}


def target(run_dir: Path, link: str) -> str:
    return (run_dir / link).read_text()


def test_tidy_keeps_the_newest_of_each_rank_and_the_best_of_all(tmp_path):
    make(tmp_path, (0, 1, 1.0), (0, 2, 9.0), (0, 3, 8.0), (1, 1, 7.0), (1, 2, 2.0), (1, 3, 6.0), (1, 4, 5.0))
    tidy(tmp_path, RetentionPolicy(keep_checkpoints=1, keep_elite=2, archive_rate=0.0), random.Random(0))
    assert kept(tmp_path) == {(0, 3), (1, 4), (0, 1), (1, 2)}
    assert target(tmp_path, "best.pt") == target(tmp_path, "elite_01.pt") == "0 1"
    assert target(tmp_path, "elite_02.pt") == "1 2"
    assert target(tmp_path, "latest.pt") == "1 4"


def test_tidy_moves_links_to_better_files_and_drops_surplus_ones(tmp_path):
    make(tmp_path, (0, 1, 3.0), (0, 2, 2.0), (0, 3, 2.5))
    tidy(tmp_path, RetentionPolicy(1, 3, 0.0), random.Random(0))
    make(tmp_path, (1, 4, 1.0))
    tidy(tmp_path, RetentionPolicy(1, 2, 0.0), random.Random(0))
    assert target(tmp_path, "best.pt") == "1 4"
    assert target(tmp_path, "elite_02.pt") == "0 2"
    assert not (tmp_path / "elite_03.pt").is_symlink()
    assert kept(tmp_path) == {(0, 2), (0, 3), (1, 4)}


def test_tidy_never_leaves_a_link_that_leads_nowhere(tmp_path):
    dice = random.Random(1)
    for step in range(60):
        make(tmp_path, (step % 3, step, dice.choice([None, dice.random()])))
        tidy(tmp_path, RetentionPolicy(2, 3, 0.2), dice)
        for path in tmp_path.iterdir():
            assert path.exists(), path


def test_tidy_archives_a_share_under_growing_numbers(tmp_path):
    make(tmp_path, *[(0, step, 5.0 + step) for step in range(40)])
    tidy(tmp_path, RetentionPolicy(1, 1, 0.5), random.Random(3))
    archived = sorted(path.name for path in tmp_path.glob("archive_*.pt"))
    assert 8 < len(archived) < 32
    assert archived == [f"archive_{number:03d}.pt" for number in range(1, len(archived) + 1)]
    assert not any(path.is_symlink() for path in tmp_path.glob("archive_*.pt"))
    contents = {(tmp_path / name).read_text() for name in archived}
    assert len(contents) == len(archived)  # none was overwritten
    for rate, count in ((0.0, 0), (1.0, 10)):
        folder = tmp_path / str(rate)
        folder.mkdir()
        make(folder, *[(0, step, 5.0) for step in range(11)])
        tidy(folder, RetentionPolicy(1, 0, rate), random.Random(3))
        assert len(list(folder.glob("archive_*"))) == count


def test_plan_ranks_unknown_losses_last_and_never_as_elite(tmp_path):
    make(tmp_path, (0, 1, None), (1, 1, 4.0))
    paths, links = plan(list_checkpoints(tmp_path), RetentionPolicy(1, 5, 0.0))
    assert len(paths) == 2
    assert links["best.pt"] == links["elite_01.pt"] == checkpoint_name(1, 1, 4.0)
    assert "elite_02.pt" not in links


def test_tidy_of_an_empty_run_does_nothing(tmp_path):
    tidy(tmp_path, RetentionPolicy(1, 1, 0.0), random.Random(0))
    assert list(tmp_path.iterdir()) == []


RANK = """
import random, sys
from pathlib import Path
from training.checkpoint import checkpoint_name
from training.retention import RetentionPolicy, tidy
run_dir, rank = Path(sys.argv[1]), int(sys.argv[2])
dice = random.Random(rank)
for step in range(150):
    (run_dir / checkpoint_name(rank, step, dice.random() * 9)).write_text(f"{rank} {step}")
    tidy(run_dir, RetentionPolicy(2, 3, 0.1), dice)
"""


def test_tidy_by_several_ranks_at_once_ends_as_by_one(tmp_path):
    root = Path(__file__).parents[1]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    ranks = [
        subprocess.Popen([sys.executable, "-c", RANK, str(tmp_path), str(rank)], cwd=root, env=environment)
        for rank in range(3)
    ]
    assert [rank.wait(timeout=120) for rank in ranks] == [0, 0, 0]
    files = list_checkpoints(tmp_path)
    paths, links = plan(files, RetentionPolicy(2, 3, 0.1))
    assert {file.path for file in files} == paths
    assert {p.name: os.readlink(p) for p in tmp_path.iterdir() if p.is_symlink()} == links
    assert not [path for path in tmp_path.iterdir() if path.name.endswith(".tmp")]
    archived = [path.read_text() for path in tmp_path.glob("archive_*.pt")]
    assert len(archived) > 10 and len(set(archived)) == len(archived)  # none twice


def test_tidy_by_two_threads_of_one_rank_at_once_does_no_harm(tmp_path):
    policy, errors = RetentionPolicy(2, 3, 0.5), []

    def work(rank: int) -> None:
        dice = random.Random(rank)
        try:
            for step in range(150):
                make(tmp_path, (rank, step, dice.random() * 9))
                tidy(tmp_path, policy, dice)
        except OSError as error:
            errors.append(error)

    threads = [threading.Thread(target=work, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert errors == []
    assert {file.path for file in list_checkpoints(tmp_path)} == plan(list_checkpoints(tmp_path), policy)[0]


def test_leftovers_of_dead_writers_and_of_this_rank_go_and_others_stay(tmp_path):
    dead = subprocess.Popen([sys.executable, "-c", "pass"])
    dead.wait()
    here = temporary_name(tmp_path / "x").name.split(".")[2]
    make(tmp_path, (0, 1, 1.0), (1, 1, 1.0))
    kept = [f".checkpoint_rank_0001_step_000002_loss_NA.pt.elsewhere.{dead.pid}.1.tmp", "notes.tmp", ".hidden",
            f".ranking.json.{here}.{os.getpid()}.1.tmp"]  # fmt: skip
    gone = [f".checkpoint_rank_0000_step_000002_loss_NA.pt.elsewhere.{dead.pid}.1.tmp",
            f".checkpoint_rank_0001_step_000003_loss_NA.pt.{here}.{dead.pid}.1.tmp"]  # fmt: skip
    inner = [f"population/.rank_0001.json.{here}.{dead.pid}.1.tmp", f"metrics/.rank_0000.tsv.{here}.{dead.pid}.1.tmp"]
    for folder in ("population", "metrics"):
        (tmp_path / folder).mkdir()
    for name in (*kept, *gone, *inner):
        (tmp_path / name).touch()
    remove_leftovers(tmp_path, 0)
    assert all((tmp_path / name).exists() for name in kept)
    assert not any((tmp_path / name).exists() for name in (*gone, *inner))
    assert len(list_checkpoints(tmp_path)) == 2


def test_retiring_a_ranks_checkpoint_is_no_leftover_of_that_rank(tmp_path, monkeypatch):
    make(tmp_path, (1, 1, 1.0), (1, 2, 1.0))

    def link(source, target) -> None:
        remove_leftovers(tmp_path, 1)  # that rank starts, in the middle of another's tidying
        original(source, target)

    original = os.link
    monkeypatch.setattr(os, "link", link)
    tidy(tmp_path, RetentionPolicy(1, 0, archive_rate=1.0), random.Random(0))
    assert (tmp_path / "archive_001.pt").read_text() == "1 1"


KILLED = """
import os, random, signal, sys
from pathlib import Path
from training import retention
setattr(os, sys.argv[2], lambda *_, **__: os.kill(os.getpid(), signal.SIGKILL))
Path.unlink = lambda path, **_: os.unlink(path)
retention.tidy(Path(sys.argv[1]), retention.RetentionPolicy(1, 0, archive_rate=1.0), random.Random(0))
"""


@pytest.mark.parametrize("call", ["link", "unlink"])
def test_a_checkpoint_to_be_archived_outlives_a_process_that_is_killed_at_it(tmp_path, call):
    make(tmp_path, (0, 1, 1.0), (0, 2, 1.0))
    root = Path(__file__).parents[1]
    killed = subprocess.run([sys.executable, "-c", KILLED, str(tmp_path), call], cwd=root)
    assert killed.returncode == -signal.SIGKILL
    remove_leftovers(tmp_path, 0)
    tidy(tmp_path, RetentionPolicy(1, 0, archive_rate=1.0), random.Random(0))
    assert {path.read_text() for path in tmp_path.glob("archive_*.pt")} == {"0 1"}
    assert kept(tmp_path) == {(0, 2)}


def test_a_checkpoint_that_cannot_be_archived_stays_in_its_place(tmp_path, monkeypatch):
    make(tmp_path, (0, 1, 1.0), (0, 2, 1.0))

    def link(source, target) -> None:
        raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))

    monkeypatch.setattr(os, "link", link)
    with pytest.raises(OSError, match="quota"):
        tidy(tmp_path, RetentionPolicy(1, 0, archive_rate=1.0), random.Random(0))
    assert kept(tmp_path) == {(0, 1), (0, 2)}
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]


def test_disk_use_says_what_a_run_may_take(tmp_path):
    policy = RetentionPolicy(keep_checkpoints=2, keep_elite=5, archive_rate=0.0)
    assert disk_use(tmp_path, policy, 4_400_000, 4) == "checkpoints: 4.4 MB each, at most 74.8 MB for 4 ranks"
    make(tmp_path, (7, 1, 1.0))  # of a rank that is no more
    assert disk_use(tmp_path, policy, 4_400_000, 4) == "checkpoints: 4.4 MB each, at most 83.6 MB for 4 ranks"
    alone = disk_use(tmp_path, RetentionPolicy(1, 0, archive_rate=0.5), 1000, 1)
    assert alone == "checkpoints: 0.0 MB each, at most 0.0 MB for 1 rank, beside the archive"


def test_what_tidy_keeps_stays_within_the_bound_of_disk_use(tmp_path):
    policy, dice = RetentionPolicy(keep_checkpoints=2, keep_elite=3, archive_rate=0.0), random.Random(2)
    for step in range(100):
        make(tmp_path, *((rank, step, dice.random()) for rank in range(4)))  # all ranks save at once
        assert len(list_checkpoints(tmp_path)) <= 4 * 2 + 3 + 4
        tidy(tmp_path, policy, dice)
        assert len(list_checkpoints(tmp_path)) <= 4 * 2 + 3
