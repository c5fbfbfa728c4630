"""Filesystem faults, brought about in real train.py processes: by strace at their system calls, and by mounts."""

import errno
import os
import re
import shutil
import signal
from pathlib import Path

import pytest

from bench.injection import Injection
from gossip.filesystem_coordinator import FilesystemCoordinator
from tests.mounts import mount, mounted
from tests.ranks import LIVENESS_SECONDS, World
from tests.strace import attached, system_calls
from training.checkpoint import CheckpointError, find_model_file, list_checkpoints, read_own_checkpoint

SAVING = ["--save_every", "20", "--no_fitness_weighted_checkpointing"]
ON_DEMAND = ["--save_every", "1g", "--no_fitness_weighted_checkpointing"]  # a save at SIGUSR1 alone, and at the end
ALONE = ["--no_filesystem_coordinator", "--gossip_mixing_rate", "0", "--log_every", "1000"]  # no other system calls
CALLS = "trace=openat,write,fsync,rename,renameat,renameat2"


@pytest.fixture
def world(text, tmp_path):
    """A lone rank's world, nothing started."""
    world = World(tmp_path, text, 1, *ALONE)
    yield world
    world.close()


@pytest.fixture(scope="module")
def live(text, tmp_path_factory):
    """A rank 0 of 2 that trains and saves all the time, in a run directory of 4 MB of its own."""
    cwd = tmp_path_factory.mktemp("live")
    world = World(cwd, text, 2, *SAVING, run="place/run")
    world.run.mkdir(parents=True)
    with mounted("-t", "tmpfs", "-o", "size=4m", "tmpfs", str(world.run)):
        try:
            world.start(0)
            world.eventually(world.checkpoints)
            yield world
            world.stop(0)
        finally:
            world.close()


def saves_again(world: World) -> None:
    """The rank trains on, and saves whole checkpoints, with links that lead to them and nothing half-written beside."""
    world.goes_on(0)
    before = world.checkpoints()[-1].step if world.checkpoints() else 0
    world.eventually(lambda: world.checkpoints() and world.checkpoints()[-1].step > before)
    world.eventually(lambda: leads_to_a_whole_checkpoint(world.run / "latest.pt"))
    world.eventually(lambda: not world.temporaries())


def leads_to_a_whole_checkpoint(link: Path) -> bool:
    """False for a link that moved on while it was read, so that its file went; CheckpointError for a damaged one."""
    target = link.resolve()
    try:
        read_own_checkpoint(target)
    except CheckpointError:
        if target.exists():
            raise
        return False
    return True


def fails_to_save(world: World, message: str) -> None:
    """Saves fail from now on, with `message`, and the rank trains on."""
    before = len(failed_saves(world, message))
    world.eventually(lambda: len(failed_saves(world, message)) >= before + 2)
    world.goes_on(0)


def failed_saves(world: World, message: str) -> list[dict[str, str]]:
    return [row for row in world.events(0, "save_failed") if message in row["message"]]


@pytest.mark.injects(Injection.KILL_DURING_WRITE, Injection.KILL_BEFORE_FSYNC, Injection.KILL_BEFORE_RENAME)
@pytest.mark.parametrize(
    "call",
    ["write:when=3", "fsync:when=1", "rename:when=1"],
    ids=["during-write", "before-fsync", "before-rename"],
)
def test_a_rank_killed_in_a_save_goes_on_from_the_newest_whole_checkpoint(world, run_train, capsys, call):
    world.start(0, *ON_DEMAND)
    world.eventually(lambda: (world.run / "config.json").exists())
    process = world.processes[0]
    process.send_signal(signal.SIGUSR1)
    (whole,) = world.eventually(world.checkpoints)
    world.eventually(lambda: (world.run / "latest.pt").exists())
    world.eventually(lambda: f"saved {whole.path.name}" in world.log(0))  # the next writes are the next save's
    name, when = call.split(":")
    with attached(process.pid, world.cwd / "trace", "-e", CALLS, "-e", f"inject={name}:signal=SIGKILL:{when}"):
        process.send_signal(signal.SIGUSR1)
        assert world.ended(0) == -signal.SIGKILL
    killed_at = (world.cwd / "trace").read_text()
    assert f"{name}(" in killed_at and ("fsync(" in killed_at) == (name != "write")  # other threads may sync as well
    (left,) = world.temporaries()
    assert left.startswith(".checkpoint_rank_0000_step_") and world.checkpoints() == [whole]

    run_train(None, "--resume", str(world.run), "--train_steps", str(whole.step + 20), *SAVING)
    assert f"resumed {whole.path.name}" in world.log(0) + capsys.readouterr().err
    assert world.temporaries() == []
    assert world.checkpoints()[-1].step == whole.step + 20
    assert (world.run / "latest.pt").resolve() == world.checkpoints()[-1].path
    assert all(link.exists() for link in world.run.glob("*.pt"))


def test_a_save_writes_syncs_renames_and_syncs_the_folder_in_this_order(live):
    trace = live.cwd / "order"
    with attached(live.processes[0].pid, trace, "-e", CALLS):
        seen = live.eventually(lambda: whole_save(trace, live.run))
    assert re.fullmatch(r"openat (write )+fsync rename sync-folder( sync-folder)* link", " ".join(seen)), seen


def whole_save(trace: Path, run: Path) -> list[str]:
    """The calls of the first save that was traced from its start until a link was moved; [] before there is one."""
    temporary, seen = None, []
    for name, paths in system_calls(trace):
        if name == "openat" and re.match(r"\.checkpoint_rank_0000_.*\.tmp", paths[0].name) and temporary is None:
            temporary = paths[0]
        if temporary is None:
            continue
        if paths[0] == temporary:
            seen.append(name)
        elif paths[0] == run and name == "fsync":
            seen.append("sync-folder")
        elif name == "rename" and paths[1] == run / "latest.pt":
            return [*seen, "link"]
    return []


@pytest.mark.injects(Injection.DISK_FULL)
def test_a_full_disk_stops_no_training_and_saves_work_again_once_there_is_space(live):
    filler = live.run / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    fails_to_save(live, "No space left on device")
    filler.unlink()
    saves_again(live)


@pytest.mark.injects(Injection.DISK_FULL, Injection.RESTART)
def test_a_rank_starts_again_on_a_full_disk_and_says_what_it_could_not_save(live):
    filler = live.run / "filler"
    with open(filler, "wb", buffering=0) as file, pytest.raises(OSError, match="No space left"):
        while True:
            file.write(bytes(4096))
    live.kill(0)
    process = live.start(0, restarts=1)
    fails_to_save(live, "No space left on device")
    assert "config.json stays as it was (No space left on device)" in live.said(process)
    live.signal(0, signal.SIGTERM)
    assert live.ended(0) == 1
    assert re.search(r"error: rank 0: its last steps, up to \d+, are lost: No space left", live.said(process))
    assert "Traceback" not in live.said(process)
    filler.unlink()
    live.start(0, restarts=2)
    saves_again(live)


@pytest.mark.injects(Injection.DISK_ERROR)
@pytest.mark.parametrize("call", ["fsync", "rename"])
def test_a_failing_disk_stops_no_training_and_saves_work_again_once_it_is_well(live, call):
    options = ["-e", CALLS, "-e", f"inject={call}:error=EIO"]
    with attached(live.processes[0].pid, live.cwd / "trace", *options):
        fails_to_save(live, "Input/output error")
    saves_again(live)


@pytest.mark.injects(Injection.READ_ONLY)
def test_a_run_directory_that_is_read_only_for_a_while_stops_no_training(live):
    with mounted("--bind", str(live.run), str(live.run)):
        mount("-o", "remount,bind,ro", str(live.run))
        fails_to_save(live, "Read-only file system")
    saves_again(live)


@pytest.mark.injects(Injection.VANISHED)
def test_a_run_directory_that_vanishes_for_a_while_stops_no_training(live):
    place, away = live.run.parent, live.cwd / "away"
    place.rename(away)
    try:
        fails_to_save(live, "No such file or directory")
        assert not place.exists()  # nobody begins another run in its place
    finally:
        if place.exists():
            shutil.rmtree(place)
        away.rename(place)
    saves_again(live)


@pytest.mark.injects(Injection.STALE_ATTRIBUTES)
def test_a_registry_with_stale_handles_stops_no_training_and_its_members_are_found_again(live):
    peer = FilesystemCoordinator(live.run / "population", 1, 2, "another process", LIVENESS_SECONDS)

    def lives() -> bool:
        peer.beat({"address": None, "step": 0, "fitness": None})
        return 1 in live.live()

    live.eventually(lives)
    registry = [f"-P{live.run}/population/{name}" for name in ("rank_0001.json", "ranking.json")]
    options = ["-e", CALLS, "-e", "inject=openat:error=ESTALE", *registry]
    with attached(live.processes[0].pid, live.cwd / "trace", *options):
        live.eventually(lambda: not lives())
        saves_again(live)
    assert "ESTALE" in (live.cwd / "trace").read_text()
    live.eventually(lives)


@pytest.fixture
def series(run_train):
    """The run directory of a lone rank that ended at step 60, and its checkpoints of steps 20, 40 and 60."""
    run = run_train("run", *SAVING, "--keep_checkpoints", "3", "--train_steps", "60")
    files = list_checkpoints(run)
    assert [file.step for file in files] == [20, 40, 60]
    return run, [file.path for file in files]


def flip_a_tensor(path: Path) -> None:
    """Flip the lowest bit of a number in the middle of a stored tensor, which stays an ordinary number."""
    tensors = read_own_checkpoint(path)["training"]["tensors"]
    stored = max(tensors.values(), key=lambda tensor: tensor.numel()).numpy().tobytes()
    content = bytearray(path.read_bytes())
    content[content.index(stored) + len(stored) // 8 * 4] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size * 2 // 3)


@pytest.mark.parametrize(
    ("damage", "reason"),
    [
        pytest.param(truncate, "", marks=pytest.mark.injects(Injection.TRUNCATED_CHECKPOINT)),
        pytest.param(flip_a_tensor, "digest does not match", marks=pytest.mark.injects(Injection.FLIPPED_CHECKPOINT)),
    ],
)
def test_a_damaged_checkpoint_is_named_and_passed_over_for_the_next_older(series, run_train, capsys, damage, reason):
    run, (_, older, newest) = series
    damage(newest)
    run_train(None, "--resume", str(run), "--train_steps", "50")
    said = capsys.readouterr().err
    (warning,) = (line for line in said.splitlines() if "passes over" in line)
    assert newest.name in warning and reason in warning
    assert f"resumed {older.name}" in said
    assert list_checkpoints(run)[-1].step == 50  # what is damaged no longer passes for the newest


@pytest.mark.injects(Injection.DANGLING_SYMLINK)
def test_links_that_lead_nowhere_are_passed_over_and_mended(series, run_train):
    run, _ = series
    for name in ("best.pt", "latest.pt", "elite_01.pt", "elite_09.pt"):
        (run / name).unlink(missing_ok=True)
        (run / name).symlink_to("checkpoint_rank_0000_step_000999_loss_0.0001.pt")
    with pytest.raises(CheckpointError, match=r"expected a run directory with best\.pt or latest\.pt"):
        find_model_file(run)
    run_train(None, "--resume", str(run), "--train_steps", "80", *SAVING)
    links = {link.name: link.resolve() for link in run.glob("*.pt") if link.is_symlink()}
    assert links["latest.pt"] == list_checkpoints(run)[-1].path and links["best.pt"] == links["elite_01.pt"]
    assert "elite_09.pt" not in links and all(target.exists() for target in links.values())


@pytest.mark.injects(Injection.CHECKPOINT_DELETED)
def test_checkpoints_that_go_while_a_rank_loads_them_are_passed_over(series, text):
    run, (oldest, older, newest) = series
    world = World(run.parent, text, 1, *ALONE, run=run.name)
    trace = world.cwd / "trace"
    options = ["-e", "trace=openat,read", "-P", str(newest),
               "-e", "inject=openat:signal=SIGSTOP:when=1", "-e", "inject=read:error=ESTALE"]  # fmt: skip
    config = run / "config.json"
    content = config.read_bytes()
    config.unlink()
    os.mkfifo(config)  # whoever reads it waits until somebody writes
    try:
        process = world.start(0, "--train_steps", "70", resume=True)
        writer = world.eventually(lambda: open_for_writing(config))
        with attached(process.pid, trace, *options):
            os.write(writer, content)
            os.close(writer)
            # It lists all three and opens the newest; now another rank's leader retires what it is about to load.
            world.eventually(lambda: "stopped by SIGSTOP" in trace.read_text())
            newest.unlink()
            older.unlink()
            process.send_signal(signal.SIGCONT)
            assert world.ended(0) == 0, world.said(process)
    finally:
        world.close()
    again, *passed = (line for line in world.said(process).splitlines() if line.startswith("warning: rank 0"))
    assert newest.name in again and os.strerror(errno.ESTALE) in again and "again in 1 s" in again
    assert all(path.name in line and "no such file" in line for path, line in zip((newest, older), passed, strict=True))
    assert f"resumed {oldest.name}" in world.said(process)


def open_for_writing(fifo: Path) -> int | None:
    """A descriptor of a FIFO that somebody has opened for reading; None as long as nobody has."""
    try:
        return os.open(fifo, os.O_WRONLY | os.O_NONBLOCK)
    except OSError as error:
        if error.errno != errno.ENXIO:
            raise
        return None
