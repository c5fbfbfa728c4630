import json
import math
import os
import pty
import signal
import subprocess
import sys
from pathlib import Path

import pytest

import watch
from gossip.filesystem_coordinator import FilesystemCoordinator
from training.metrics import MetricsFile
from watch import Onlooker, last_values, make_row

SCRIPT = Path(watch.__file__)


class Clock:
    now = 0.0

    def __call__(self):
        return self.now


class Run:
    """A run directory with a population in it that a test moves by hand."""

    def __init__(self, path, ranks):
        self.path = path
        self.clock = Clock()
        self.members = {
            rank: FilesystemCoordinator(path / "population", rank, ranks, f"process-{rank}", 30.0, self.clock)
            for rank in range(ranks)
        }
        for rank in range(ranks):
            metrics = MetricsFile(path / "metrics" / f"rank_{rank:04d}.tsv")
            metrics.create()
            metrics.append({"rank": rank, "step": 200, "val_loss": 2 * math.log(2), "ema_loss": 3.0})
            metrics.append({"rank": rank, "step": 210, "ema_loss": 2.5})

    def record(self, rank):
        return {
            "step": 1000 + rank, "fitness": 1.5 + rank, "best_fitness": math.log(2) * (1 + rank),
            "bytes_per_s": 12345.0, "won": 11, "lost": 22, "tied": 33, "failed": 44, "busy": 55, "rolled_back": 66,
        }  # fmt: skip

    def beat(self, *ranks):
        self.clock.now += 2.0
        for rank in ranks or self.members:
            self.members[rank].beat(self.record(rank))

    def leave(self, *ranks):
        for rank in ranks or self.members:
            self.members[rank].leave(self.record(rank))


@pytest.fixture
def run(tmp_path):
    return Run(tmp_path / "run", 3)


def cells(output):
    return [line.split() for line in output.splitlines() if line.split() and line.split()[0].isdigit()]


def test_watch_once_prints_every_rank(run, capsys):
    for _ in range(3):
        run.beat()
    watch.main([str(run.path), "--once"])
    rows = cells(capsys.readouterr().out)
    assert rows[0] == ["0", "leads", "1.000", "0.693", "2.000", "1,000", "12.3", "11", "22", "66", "33", "44", "55"]
    assert rows[1] == ["1", "running", "2.000", "1.386", "2.000", "1,001", "12.3", "11", "22", "66", "33", "44", "55"]
    assert len(rows) == 3


def test_watch_fits_80_columns_without_a_terminal(run):
    run.beat()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, SCRIPT, run.path, "--once"], stdin=subprocess.DEVNULL, capture_output=True, env=environment
    )
    assert done.returncode == 0 and done.stderr == b"" and b"\x1b" not in done.stdout
    table = [line for line in done.stdout.decode().splitlines() if line.split()[:1] in (["rank"], ["0"], ["1"], ["2"])]
    assert len(table) == 4 and all(len(line) <= 80 and "…" not in line for line in table)


def test_watch_says_who_is_silent_and_who_left(run):
    for _ in range(3):
        run.beat()
    run.leave(2)
    for _ in range(20):
        run.beat(0)
    assert [row.state for row in Onlooker(run.path).look()] == ["leads", "silent", "left"]


def test_watch_notices_that_nobody_moves_any_more(run, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch.time, "monotonic", clock)
    for _ in range(3):
        run.beat()
    onlooker = Onlooker(run.path)
    assert [row.state for row in onlooker.look()] == ["leads", "running", "running"]
    clock.now += 29.0
    run.beat(0, 1)
    assert [row.state for row in onlooker.look()] == ["leads", "running", "running"]
    clock.now += 2.0
    assert [row.state for row in onlooker.look()] == ["leads", "running", "silent"]
    clock.now += 30.0
    assert [row.state for row in onlooker.look()] == ["silent"] * 3


def test_watch_takes_the_liveness_of_the_run(run, tmp_path):
    assert watch.liveness_seconds(run.path) == 30.0
    (run.path / "config.json").write_text(json.dumps({"options": {"population": {"gossip_liveness": 7}}}))
    assert watch.liveness_seconds(run.path) == 7.0


def read_until(terminal, word):
    """What is shown until `word` is, or until the program has gone."""
    shown = b""
    while word not in shown:
        try:
            shown += os.read(terminal, 65536)
        except OSError:  # how Linux says that nobody holds the other side any more
            break
    return shown


def in_terminal(run):
    terminal, side = pty.openpty()
    command = [sys.executable, SCRIPT, run.path]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, stdout=side, stderr=subprocess.PIPE)
    os.close(side)
    return process, terminal


def test_watch_ends_when_all_have_left(run):
    run.beat()
    run.leave()
    process, terminal = in_terminal(run)
    assert read_until(terminal, b"never shown").count(b"left") >= 3
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    os.close(terminal)


def test_watch_ends_at_ctrl_c_without_a_traceback(run):
    for _ in range(3):
        run.beat()
    process, terminal = in_terminal(run)
    assert b"running" in read_until(terminal, b"running")
    process.send_signal(signal.SIGINT)
    read_until(terminal, b"never shown")
    _, errors = process.communicate()
    assert (process.returncode, errors) == (0, b"")
    os.close(terminal)


def test_watch_reads_metrics_alone_where_there_is_no_registry(run, capsys):
    for path in (run.path / "population").iterdir():
        path.unlink()
    watch.main([str(run.path), "--once"])
    assert cells(capsys.readouterr().out)[0] == ["0", "unknown", "3.607", "2.500", "2.000", "210", *"-------"]


def test_watch_survives_torn_files(run):
    run.beat()
    (run.path / "population" / "rank_0001.json").write_text('{"rank": 1, "sta')
    (run.path / "population" / "ranking.json").write_text("{")
    with open(run.path / "metrics" / "rank_0000.tsv", "a") as file:
        file.write("0\t220\t1")
    rows = Onlooker(run.path).look()
    assert [(row.rank, row.state) for row in rows] == [(0, "running"), (1, "unknown"), (2, "running")]
    assert rows[0].held_out == pytest.approx(2 * math.log(2), rel=1e-4)


def test_watch_refuses_a_folder_without_a_run(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "--once"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: expected a run directory")


def test_last_values_reads_the_end_of_a_long_file_only(tmp_path):
    path = tmp_path / "rank_0000.tsv"
    path.write_text("step\tval_loss\n1\t9.0\n" + "".join(f"{step}\tNA\n" for step in range(2, 20001)))
    assert last_values(path) == {"step": 20000.0}


def test_make_row_ignores_values_that_are_no_numbers():
    row = make_row(0, "running", {"best_fitness": "low", "won": None, "step": 3}, {"won": 2.0})
    assert (row.best, row.step, row.counts[0]) == (None, 3, 2)
