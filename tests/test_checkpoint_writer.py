"""Saves beside training: what is saved is one moment, training goes on meanwhile, and how a save ends is told."""

import json
import math
import os
import pkgutil
import signal
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

import runtime.files
from gossip.network_utils import parse_peer
from gossip.state import Schema
from mingru.minLM import MinLM, ModelConfig
from runtime.signals import AGAIN_SECONDS
from tests.conftest import TINY
from tests.test_loop import trainers  # noqa: F401 (a fixture)
from tests.test_resume import QUIET, newest
from training import saving
from training.checkpoint import list_checkpoints, read_own_checkpoint
from training.checkpoint_writer import NOT_FINITE, CheckpointWriter, Moment
from training.loop import Trainer
from training.metrics import RunLog
from training.optimizer import build_optimizer
from training.options import OptimizerOptions
from training.recovery import Recovery
from training.saving import Saving

CONFIG = ModelConfig(dim=16, depth=1)
TRAINING = dict.fromkeys("scalars state lanes totals mixes fitness genes dice torch_rng".split())
ROOT = Path(__file__).parents[1]


class Disk:
    """A disk whose syncs wait, as long as it is told to: what holds up a save after it was written."""

    def __init__(self) -> None:
        self._free = threading.Event()
        self._free.set()
        self.waiting = threading.Event()
        self._fsync = os.fsync

    def fsync(self, descriptor: int) -> None:
        if not self._free.is_set():
            self.waiting.set()
            assert self._free.wait(60), "the test never freed the disk"
        self._fsync(descriptor)

    def hang(self) -> None:
        self.waiting.clear()
        self._free.clear()

    def free(self) -> None:
        self._free.set()


@pytest.fixture
def disk(monkeypatch) -> Iterator[Disk]:
    disk = Disk()
    monkeypatch.setattr(runtime.files.os, "fsync", disk.fsync)
    yield disk
    disk.free()


class Rank:
    """What a writer saves, without training: schedule-free weights of one small model."""

    def __init__(self, run_dir: Path, tidy: Callable[[], None]) -> None:
        self.run_dir = run_dir
        self.weights = build_optimizer(MinLM(CONFIG), OptimizerOptions())
        schema = Schema.of(self.weights.tensors(), self.weights.rules, {})
        self.writer = CheckpointWriter(run_dir, 0, CONFIG, 0x1E, self.weights, schema, tidy)

    def fill(self, value: float) -> None:
        for tensor in self.weights.tensors().values():
            tensor.fill_(value)

    def begin(self, step: int) -> None:
        self.writer.begin(Moment(step, 1.5, "", {"family": self.weights.family, **TRAINING}))


@pytest.fixture
def rank(tmp_path) -> Rank:
    return Rank(tmp_path, lambda: None)


def test_a_save_holds_the_moment_of_its_beginning(rank, disk):
    disk.hang()
    rank.fill(0.25)
    rank.begin(1)
    rank.fill(0.75)  # training goes on, while the file is not even synced
    assert disk.waiting.wait(30) and not rank.writer.idle and rank.writer.take() is None
    disk.free()
    saved = rank.writer.wait()
    content = read_own_checkpoint(saved.path)
    for tensor in (*content["training"]["tensors"].values(), *content["model_state_dict"].values()):
        torch.testing.assert_close(tensor, torch.full_like(tensor, 0.25))
    rank.begin(2)  # into the same buffer
    content = read_own_checkpoint(rank.writer.wait().path)
    assert all(bool((tensor == 0.75).all()) for tensor in content["training"]["tensors"].values())


def test_a_save_leaves_no_thread(rank):
    before = len(os.listdir("/proc/self/task"))
    for step in range(3):
        rank.begin(step)
        assert rank.writer.wait().path is not None and rank.writer.idle
    assert [thread for thread in threading.enumerate() if thread.name == "checkpoint-writer"] == []
    deadline = time.monotonic() + 30  # the system may still list a thread that was joined
    while len(os.listdir("/proc/self/task")) > before:
        assert time.monotonic() < deadline


@pytest.mark.parametrize("name", ["y.token_emb.weight", "z.token_emb.weight", "v.token_emb.weight"])
@pytest.mark.parametrize("value", [math.nan, -math.inf])
def test_a_state_that_is_not_finite_is_not_written(rank, name, value):
    rank.weights.tensors()[name][3, 3] = value
    rank.begin(1)
    saved = rank.writer.wait()
    assert (saved.path, saved.failure) == (None, NOT_FINITE)
    assert list(rank.run_dir.iterdir()) == []


def test_a_vanished_folder_fails_saves_until_it_is_back(rank):
    rank.run_dir.rename(rank.run_dir.with_name("away"))
    for step in (1, 2):
        rank.begin(step)
        saved = rank.writer.wait()
        assert (saved.path, saved.failure) == (None, "No such file or directory")
    assert not rank.run_dir.exists()  # it is the user's: not made again
    rank.run_dir.with_name("away").rename(rank.run_dir)
    rank.begin(3)
    assert rank.writer.wait().path.exists()


def test_what_fails_in_tidying_up_is_told_beside_the_save(tmp_path):
    def broken() -> None:
        raise PermissionError(13, "Permission denied")

    rank = Rank(tmp_path, broken)
    rank.begin(1)
    saved = rank.writer.wait()
    assert saved.path.exists() and saved.tidying == "Permission denied" and saved.failure is None


def test_an_error_that_no_disk_is_to_blame_for_is_raised_where_training_is(rank):
    rank.writer.begin(Moment(1, 1.5, "", {"unpicklable": lambda: None}))
    with pytest.raises(AttributeError):
        rank.writer.wait()
    assert rank.writer.idle and list(rank.run_dir.iterdir()) == []


UNDER_A_LIMIT = """
import resource, sys
from pathlib import Path
sys.path.insert(0, {root!r})
from tests import test_checkpoint_writer as tests
tests.CONFIG = tests.ModelConfig(dim=1024, depth=2)
rank = tests.Rank(Path.cwd(), lambda: None)
for step, room in enumerate((40, None)):
    used = int(open("/proc/self/statm").read().split()[0]) * resource.getpagesize()
    limit = resource.RLIM_INFINITY if room is None else used + room * 2**20
    resource.setrlimit(resource.RLIMIT_AS, (limit, resource.RLIM_INFINITY))
    rank.begin(step)
    saved = rank.writer.wait()
    print(saved.path and saved.path.name, saved.failure)
"""


def test_a_save_without_memory_for_it_fails_and_a_later_one_is_whole(tmp_path):
    script = UNDER_A_LIMIT.format(root=str(ROOT))
    done = subprocess.run([sys.executable, "-c", script], cwd=tmp_path, capture_output=True, text=True)
    assert done.stdout.splitlines() == [
        "None memory is out",
        "checkpoint_rank_0000_step_000001_loss_1.5000.pt None",
    ], done.stderr


@pytest.mark.parametrize("place", ["training.saving.capture", "threading.Thread.start"])
def test_a_save_that_cannot_begin_for_want_of_memory_costs_nothing_else(run_train, monkeypatch, tmp_path, place):
    exhausted, found = [], pkgutil.resolve_name(place)

    def exhaust(*arguments):
        if not exhausted and (place.endswith("capture") or arguments[0].name == "checkpoint-writer"):
            exhausted.append(place)
            raise RuntimeError("can't start new thread") if place.endswith("start") else torch.empty(10**15)
        return found(*arguments)

    monkeypatch.setattr(place, exhaust)
    run_dir = run_train("run", "--train_steps", "8", *EVERY_4)
    assert exhausted and [file.step for file in list_checkpoints(run_dir)] == [8]
    log = (tmp_path / "logs" / "train_run_rank_0000.log").read_text()
    assert "save_failed: memory is out; the older checkpoints stand, training goes on" in log


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_on_a_gpu_a_write_after_the_beginning_does_not_reach_the_file(tmp_path):
    config = ModelConfig(dim=512, depth=4)
    weights = build_optimizer(MinLM(config).to("cuda"), OptimizerOptions())
    schema = Schema.of(weights.tensors(), weights.rules, {})
    writer = CheckpointWriter(tmp_path, 0, config, 0x1E, weights, schema, lambda: None)
    for value in range(1, 6):
        for tensor in weights.tensors().values():
            tensor.fill_(value)
        writer.begin(Moment(value, 1.5, "", {"family": weights.family, **TRAINING}))
        writer.before_write()
        for tensor in weights.tensors().values():
            tensor.fill_(-1.0)
        tensors = read_own_checkpoint(writer.wait().path)["training"]["tensors"]
        assert all(bool((tensor == value).all()) for tensor in tensors.values())


def hang_at_the_first_save(monkeypatch, disk: Disk, free_at_step: int) -> list[Trainer]:
    """The first save's sync hangs until training has come to `free_at_step`; returns a list for the trainer."""
    seen, begin, step = [], Saving.begin, Trainer.train_step

    def hanging(self, *arguments) -> None:
        if not seen:
            seen.append(self._trainer)
            disk.hang()
        begin(self, *arguments)

    def freeing(self) -> bool:
        if self.totals.step == free_at_step:
            disk.free()
        return step(self)

    monkeypatch.setattr(Saving, "begin", hanging)
    monkeypatch.setattr(Trainer, "train_step", freeing)
    return seen


EVERY_4 = ["--no_fitness_weighted_checkpointing", "--save_every", "4", "--val_every", "0", "--keep_checkpoints", "99",
           "--gossip_fitness_decay", "0.1"]  # fmt: skip


def test_training_goes_on_beside_a_disk_that_hangs_and_a_due_save_waits_its_turn(run_train, monkeypatch, disk):
    hang_at_the_first_save(monkeypatch, disk, free_at_step=18)
    run_dir = run_train("run", "--train_steps", "31", "--log_every", "1", *EVERY_4)
    # It would have stood still at step 4 for ever: nothing but its own steps frees the disk.
    steps = [file.step for file in list_checkpoints(run_dir)]
    assert steps[0] == 4 and steps[-1] == 31
    assert not {8, 12, 16} & set(steps)  # they came due, and waited
    assert [step for step in steps if 18 < step < 31]  # the one that stayed due was taken once there was room
    assert read_own_checkpoint(list_checkpoints(run_dir)[-1].path)["step"] == 31
    assert (run_dir / "latest.pt").resolve().name.startswith("checkpoint_rank_0000_step_000031")


def test_a_checkpoints_name_and_content_tell_the_loss_of_its_moment(run_train, monkeypatch, disk):
    hang_at_the_first_save(monkeypatch, disk, free_at_step=12)
    fitness, observe = {}, Trainer.train_step

    def watched(self) -> bool:
        finite = observe(self)
        fitness[self.totals.step] = self.parts.fitness.value
        return finite

    monkeypatch.setattr(Trainer, "train_step", watched)
    run_dir = run_train("run", "--train_steps", "14", "--gossip_fitness", "ema", *EVERY_4)
    first = list_checkpoints(run_dir)[0]
    assert first.step == 4 and first.loss == pytest.approx(fitness[4], abs=5e-5)
    assert read_own_checkpoint(first.path)["loss"] == fitness[4] != fitness[12]


def test_a_checkpoints_name_tells_the_probes_loss_of_its_very_weights(run_train, monkeypatch):
    """Not of those that were measured last: a run that breaks down between two measurements would name its wreck after
    its best weights, and best.pt would be that."""
    told, capture = {}, saving.capture

    def watched(trainer: Trainer) -> dict:
        told[trainer.totals.step] = statistics.fmean(trainer.parts.fitness.probe.measure()[1].losses)
        return capture(trainer)

    monkeypatch.setattr(saving, "capture", watched)
    run_dir = run_train("run", "--train_steps", "14", *EVERY_4[:-2])
    files = list_checkpoints(run_dir)
    assert files[0].step == 4 and files[-1].step == 14  # one between them waits where the disk is slow
    assert [file.loss for file in files] == pytest.approx([told[file.step] for file in files], abs=5e-5)


def test_while_the_last_save_is_written_nobody_is_kept_waiting_by_a_rank_that_has_left(run_train, monkeypatch, disk):
    """A caller that is answered by a rank which trains no more would have its one slot taken until a deadline."""
    seen, step = {}, Trainer.train_step

    def last(self) -> bool:
        if self.totals.step == 6:
            disk.hang()
        return step(self)

    def call() -> None:
        assert disk.waiting.wait(60)  # the last save is under way
        seen.update(json.loads(Path("run/population/rank_0000.json").read_text()))
        try:
            socket.create_connection(parse_peer(seen["address"]), timeout=60).close()
        except ConnectionRefusedError as error:
            seen["refused"] = error
        disk.free()

    monkeypatch.setattr(Trainer, "train_step", last)
    caller = threading.Thread(target=call)
    caller.start()
    run_dir = run_train("run", "--train_steps", "7", *QUIET)
    caller.join()
    assert "refused" in seen and (seen["state"], seen["step"]) == ("left", 7)
    assert newest(run_dir)["step"] == 7


def test_a_return_to_the_last_good_state_waits_for_the_save_under_way(run_train, trainers, disk, tmp_path):  # noqa: F811
    run_train("run", "--train_steps", "8", *QUIET)
    (trainer,) = trainers
    trainer.parts.log = RunLog(tmp_path / "after.log", echo=False)
    trainer.totals.step += 1
    disk.hang()
    trainer.saving.begin()
    assert disk.waiting.wait(30)
    threading.Timer(0.3, disk.free).start()
    recovery = Recovery(trainer)
    for _ in range(3):
        recovery.bad_step()
    assert "returned: to checkpoint_rank_0000_step_000009" in (tmp_path / "after.log").read_text()


def test_a_write_of_the_weights_waits_for_a_copy_of_them(run_train, monkeypatch):
    order, step = [], Trainer.train_step
    monkeypatch.setattr(CheckpointWriter, "before_write", lambda self: order.append("wait"))
    monkeypatch.setattr(Trainer, "train_step", lambda self: (order.append("step"), step(self))[1])
    run_train("run", "--train_steps", "2", *QUIET)
    assert order == [
        "wait",
        "step",
        "wait",
        "wait",
        "step",
        "wait",
        "wait",
    ]  # before a step's write, and before a merge's


HANGING = """
import os, sys
sys.path.insert(0, {root!r})
import runtime.files, train
def fsync(descriptor):
    name = os.readlink(f"/proc/self/fd/{{descriptor}}")
    if ".checkpoint_" in name:
        os.write(1, b"syncing\\n")
        import threading; threading.Event().wait()
runtime.files.os.fsync = fsync
sys.exit(train.main(sys.argv[1:]))
"""


def test_two_stop_signals_leave_at_once_though_the_disk_hangs_and_the_rest_is_cleared_away(
    text, tmp_path, run_train, monkeypatch
):
    flags = [*TINY, "--data", str(text), "--output", "run", "--val_every", "0", "--log_every", "1"]
    process = subprocess.Popen(
        [sys.executable, "-c", HANGING.format(root=str(ROOT)), *flags], cwd=tmp_path, stdout=subprocess.PIPE,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    try:
        metrics = tmp_path / "run" / "metrics" / "rank_0000.tsv"
        deadline = time.monotonic() + 60
        while not (metrics.exists() and metrics.read_text().count("\n") > 1):
            assert time.monotonic() < deadline and process.poll() is None
            time.sleep(0.02)  # polls for what the rank writes
        process.send_signal(signal.SIGTERM)
        assert process.stdout.readline() == b"syncing\n"
        time.sleep(AGAIN_SECONDS)
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=20) == 128 + signal.SIGTERM
    finally:
        process.kill()
        process.wait()
    run_dir = tmp_path / "run"
    (leftover,) = run_dir.glob(".checkpoint_rank_0000_*.tmp")
    assert list_checkpoints(run_dir) == []
    (
        run_dir / ".checkpoint_rank_0001_step_000009_loss_NA.pt.elsewhere.1.1.tmp"
    ).touch()  # another rank's, being written
    (
        run_dir / ".checkpoint_rank_0000_step_000009_loss_NA.pt.elsewhere.1.1.tmp"
    ).touch()  # of this rank's life elsewhere
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    run_train("run", "--train_steps", "3", *QUIET)
    assert newest(run_dir)["step"] == 3
    assert [path.name[:21] for path in run_dir.glob(".*.tmp")] == [".checkpoint_rank_0001"]
    assert not leftover.exists()
