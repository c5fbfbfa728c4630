import errno
import io
import json
import math
import os
import pty
import shutil
import signal
import subprocess
import sys
import threading
from datetime import datetime, timezone
from pathlib import Path

import pytest
from rich.console import Console

import watch
from gossip.event_log import EventLog
from gossip.filesystem_coordinator import FilesystemCoordinator
from runtime.errors import UserError
from tests.clock import Clock
from tests.synthetic_run import write_run
from training.metrics import MetricsFile
from training.onlooker import Elite, Onlooker, View, make_row, population_seconds, read_elites
from training.tail import TableTail

SCRIPT = Path(watch.__file__)


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
            "averaged": 77,
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
    lines = [line.split() for line in output.splitlines()]
    return [line for line in lines if len(line) > 1 and line[0].isdigit() and line[1] != "ranks"]


def test_watch_once_prints_every_rank(run, capsys):
    for _ in range(3):
        run.beat()
    watch.main([str(run.path), "--once"])
    printed = capsys.readouterr().out
    rows = cells(printed)
    numbers = ["11", "22", "77", "66", "33", "44", "55"]
    assert rows[0][:8] == ["0", "leads", "█▁", "3.607", "1.000", "2.000", "1,000", "12.3"]
    assert rows[1][:8] == ["1", "running", "█▁", "3.607", "2.000", "2.000", "1,001", "12.3"]
    assert all(row[8].endswith("s") and row[9:] == numbers for row in rows) and len(rows) == 3
    assert printed.startswith(
        "3 ranks (3 running) · rank 0 leads · best 1.000 (rank 0), median 2.000 bits/byte · 37.0 kB/s in all\n"
    )


def test_watch_counts_no_rank_that_a_launch_of_fewer_has_left_behind(run, capsys):
    run.beat()
    run.leave(2)
    for size, shown in ((3, 3), (2, 2), (1, 2)):  # rank 1 lives, whatever is written
        options = {"population": {"gossip_heartbeat": 0.01}}
        (run.path / "config.json").write_text(json.dumps({"world_size": size, "options": options}))
        watch.main([str(run.path), "--once"])
        assert len(cells(capsys.readouterr().out)) == shown


def test_watch_compares_by_the_probe_where_there_is_no_registry(tmp_path, capsys):
    """Training's losses are not what elites are ranked by."""
    metrics = MetricsFile(tmp_path / "metrics" / "rank_0000.tsv")
    metrics.create()
    metrics.append({"rank": 0, "step": 200, "ema_loss": 2.5, "probe_loss": 3 * math.log(2)})
    watch.main([str(tmp_path), "--once"])
    assert "best 3.000 (rank 0)" in capsys.readouterr().out


def table_lines(printed):
    return [line for line in printed.splitlines() if line.split()[:1] in (["rank"], ["0"], ["1"], ["2"])]


def test_watch_prints_plain_text_without_a_terminal(run):
    run.beat()
    environment = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "FORCE_COLOR")}
    done = subprocess.run(
        [sys.executable, SCRIPT, run.path, "--once"], stdin=subprocess.DEVNULL, capture_output=True, env=environment
    )
    assert done.returncode == 0 and done.stderr == b"" and b"\x1b" not in done.stdout
    table = table_lines(done.stdout.decode())
    assert len(table) == 4 and all(len(line) <= 120 and "…" not in line for line in table)


def shown(run, width, **more):
    console = Console(width=width, record=True, file=io.StringIO())
    console.print(watch.screen(run.path, Onlooker(run.path).look(), width, **more))
    return console.export_text()


def test_watch_has_the_counts_that_fit_80_columns(run):
    run.beat()
    table = table_lines(shown(run, 80))
    assert len(table) == 4 and all(len(line) <= 80 and "…" not in line for line in table)
    assert table[0].split()[-3:] == ["won", "lost", "failed"] and table[1].split()[-3:] == ["11", "22", "44"]


def test_watch_says_that_the_files_do_not_answer(run):
    run.beat()
    assert "not answered" not in shown(run, 100, silence=5.0)
    assert "have not answered for 2m" in shown(run, 100, silence=130.0)


def test_watch_draws_while_a_look_hangs(run):
    """A look that never ends holds up the reader's thread, not the screen and not Ctrl-C."""
    hung, begun = threading.Event(), threading.Event()

    class Hanging:
        def look(self, seconds):
            begun.set()
            hung.wait()

    reader = watch.Reader(Hanging())
    drawn = []

    class Screen(Console):
        def print(self, *objects, **more):
            begun.wait()
            drawn.append(objects)
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        watch.follow(run.path, reader, Screen(file=io.StringIO(), force_terminal=True))
    assert drawn and reader.is_alive()
    hung.set()


def test_watch_raises_what_ended_its_reader(run):
    class Broken:
        def look(self, seconds):
            raise RuntimeError("a mistake in here")

    with pytest.raises(RuntimeError, match="a mistake in here"):
        watch.follow(run.path, watch.Reader(Broken()), Console(file=io.StringIO()))


def test_watch_says_who_is_silent_and_who_left(run):
    for _ in range(3):
        run.beat()
    run.leave(2)
    for _ in range(20):
        run.beat(0)
    assert [row.state for row in Onlooker(run.path).look().rows] == ["leads", "silent", "left"]


def test_watch_notices_that_nobody_moves_any_more(run, monkeypatch):
    clock = Clock()
    monkeypatch.setattr(watch.time, "monotonic", clock)
    for _ in range(3):
        run.beat()
    onlooker = Onlooker(run.path)
    assert [row.state for row in onlooker.look().rows] == ["leads", "running", "running"]
    clock.now += 29.0
    run.beat(0, 1)
    assert [row.state for row in onlooker.look().rows] == ["leads", "running", "running"]
    clock.now += 2.0
    assert [row.state for row in onlooker.look().rows] == ["leads", "running", "silent"]
    clock.now += 30.0
    assert [row.state for row in onlooker.look().rows] == ["silent"] * 3


def shift_files(run, seconds):
    """As if the population's files had been written so long ago, or by a host whose clock is so far off."""
    for path in (run.path / "population").iterdir():
        os.utime(path, (path.stat().st_atime, path.stat().st_mtime + seconds))


def states(printed):
    return [row[1] for row in cells(printed)]


@pytest.mark.parametrize("seconds", [-3600, 3600], ids=["long-dead", "by-a-clock-ahead"])
def test_watch_once_shows_a_population_that_was_killed_as_silent(run, capsys, monkeypatch, seconds):
    """A killed leader leaves a ranking in which all live."""
    monkeypatch.setattr(watch, "PATIENCE_HEARTBEATS", 0.1)
    for _ in range(3):
        run.beat()
    shift_files(run, seconds)
    watch.main([str(run.path), "--once"])
    printed = capsys.readouterr().out
    assert states(printed) == ["silent"] * 3 and printed.startswith("3 ranks (3 silent) · best")


def test_watch_once_sees_by_their_beats_that_ranks_on_another_clock_live(run, capsys, monkeypatch):
    for _ in range(3):
        run.beat()
    shift_files(run, -3600)

    def sleep(seconds):
        assert seconds >= 2 * 2.0  # heartbeats
        run.beat(0, 2)
        shift_files(run, -3600)

    monkeypatch.setattr(watch.time, "sleep", sleep)
    watch.main([str(run.path), "--once"])
    assert states(capsys.readouterr().out) == ["leads", "silent", "running"]


def test_watch_once_does_not_wait_where_all_is_clear(run, capsys, monkeypatch):
    monkeypatch.setattr(watch.time, "sleep", lambda seconds: pytest.fail("it waits"))
    for _ in range(3):
        run.beat()
    run.leave(2)
    watch.main([str(run.path), "--once"])
    assert states(capsys.readouterr().out) == ["leads", "running", "left"]


def test_watch_takes_the_liveness_of_the_run(run, tmp_path):
    assert population_seconds(run.path, "gossip_liveness", 30.0) == 30.0
    (run.path / "config.json").write_text(json.dumps({"options": {"population": {"gossip_liveness": 7}}}))
    assert population_seconds(run.path, "gossip_liveness", 30.0) == 7.0
    assert population_seconds(run.path, "gossip_heartbeat", 2.0) == 2.0


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
    assert cells(capsys.readouterr().out)[0] == ["0", "unknown", "█▁", "3.607", "3.607", "2.000", "210", *"---------"]


def test_watch_survives_torn_files(run):
    run.beat()
    (run.path / "population" / "rank_0001.json").write_text('{"rank": 1, "sta')
    (run.path / "population" / "ranking.json").write_text("{")
    with open(run.path / "metrics" / "rank_0000.tsv", "a") as file:
        file.write("0\t220\t1")
    rows = Onlooker(run.path).look().rows
    assert [(row.rank, row.state) for row in rows] == [(0, "running"), (1, "unknown"), (2, "running")]
    assert rows[0].held_out == pytest.approx(2 * math.log(2), rel=1e-4)


def test_watch_of_a_launch_of_fewer_ranks_ends_when_those_have_left(run):
    for _ in range(3):
        run.beat()  # and rank 2 is killed
    (run.path / "config.json").write_text('{"world_size": 2}')
    run.leave(0)
    assert not Onlooker(run.path).look().over
    run.leave(1)
    for file in (run.path / "population").glob("rank_0002.json"):
        os.utime(file, (1, 1))  # long ago
    assert Onlooker(run.path).look().over


def test_onlooker_shows_the_way_of_metrics_that_were_replaced_once(run):
    onlooker = Onlooker(run.path)
    assert onlooker.look().rows[0].trend == (3.0, 2.5)
    MetricsFile(run.path / "metrics" / "rank_0000.tsv").rewind(200)
    assert onlooker.look().rows[0].trend == (3.0,)


def test_watch_passes_over_files_that_are_no_ranks(run):
    run.beat()
    shutil.copy(run.path / "metrics" / "rank_0000.tsv", run.path / "metrics" / "rank_0000.bak.tsv")
    (run.path / "metrics" / "rank_.tsv").touch()
    assert [row.rank for row in Onlooker(run.path).look().rows] == [0, 1, 2]


@pytest.mark.parametrize("error", [errno.ESTALE, errno.EIO], ids=["ESTALE", "EIO"])
def test_watch_survives_folders_that_cannot_be_read_for_a_while(tmp_path, monkeypatch, error):
    """Folders on a network filesystem whose server was started again, or whose disk fails."""
    run_dir = tmp_path / "runs" / "run"
    write_run(tmp_path / "other" / "run", ranks=2, steps=400, mixes=6)
    run = Run(run_dir, 2)
    for _ in range(3):
        run.beat()
    (tmp_path / "other" / "gossip_logs").rename(tmp_path / "runs" / "gossip_logs")
    (run_dir / "elite_01.pt").symlink_to("checkpoint_rank_0001_step_000500_loss_1.2500.pt")
    onlooker = Onlooker(run_dir)

    def fails(path, *arguments, **options):
        raise OSError(error, os.strerror(error), str(path))

    with monkeypatch.context() as patch:
        for name in ("listdir", "scandir", "stat", "open", "readlink"):
            patch.setattr(os, name, fails)
        assert onlooker.look() == View((), (), {}, None, False)
    view = onlooker.look()
    assert [row.state for row in view.rows] == ["leads", "running"] and len(view.elites) == 1 and view.flow


def test_watch_says_of_a_folder_that_cannot_be_read_why(run, monkeypatch):
    def fails(path, *arguments, **options):
        raise OSError(errno.ESTALE, "Stale file handle", str(path))

    monkeypatch.setattr(os, "stat", fails)
    with pytest.raises(UserError, match=r"expected a readable run directory, got .* \(Stale file handle\)"):
        watch.main([str(run.path), "--once"])


def test_watch_finds_the_logs_of_a_run_whatever_its_name(tmp_path):
    run_dir = write_run(tmp_path / "runs" / "rate[0.1]*", ranks=2, steps=400, mixes=6)
    view = Onlooker(run_dir).look()
    assert len(view.rows) == 2 and view.flow


def test_watch_refuses_a_folder_without_a_run(tmp_path):
    done = subprocess.run([sys.executable, SCRIPT, tmp_path, "--once"], capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: expected a run directory")


def test_table_tail_reads_the_end_of_a_long_file_and_then_what_is_added(tmp_path):
    path = tmp_path / "rank_0000.tsv"
    tail = TableTail(path)
    assert tail.read() == []
    path.write_text("step\tval_loss\n1\t9.0\n" + "".join(f"{step}\tNA\n" for step in range(2, 20001)))
    rows = tail.read()
    assert 5000 < len(rows) < 20000 and rows[-1] == {"step": "20000", "val_loss": "NA"}
    with open(path, "a") as file:
        file.write("20001\t1.0\ncut\n20002\t2")
    assert tail.read() == [{"step": "20001", "val_loss": "1.0"}]
    with open(path, "a") as file:
        file.write(".5\n")
    assert tail.read() == [{"step": "20002", "val_loss": "2.5"}]
    assert tail.read() == []


def test_table_tail_meets_a_replaced_file_anew(tmp_path):
    path = tmp_path / "rank_0000.tsv"
    path.write_text("step\n1\n2\n3\n")
    tail = TableTail(path)
    assert [row["step"] for row in tail.read()] == ["1", "2", "3"]
    (tmp_path / "new").write_text("step\tloss\n1\t0.5\n2\t0.4\n")
    os.replace(tmp_path / "new", path)
    assert tail.read() == [{"step": "1", "loss": "0.5"}, {"step": "2", "loss": "0.4"}]


def test_onlooker_counts_the_flow_of_the_last_minutes(tmp_path):
    run_dir = write_run(tmp_path / "runs" / "made_up", ranks=3, steps=4000, mixes=60)
    view = Onlooker(run_dir).look()
    rows = [row for path in (tmp_path / "runs" / "gossip_logs").iterdir() for row in TableTail(path).read()]
    newest = max(datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00")) for row in rows)
    assert view.flow_until == newest and newest.tzinfo == timezone.utc
    merged = [row for row in rows if row["event"] == "merged"]
    late = [row for row in merged if (newest - stamp(row)).total_seconds() < 300]
    assert 0 < len(late) < len(merged) and sum(view.flow.values()) == len(late)
    one = late[0]
    assert view.flow[int(one["peer"]), int(one["rank"])] == sum(
        (row["peer"], row["rank"]) == (one["peer"], one["rank"]) for row in late
    )
    log = tmp_path / "runs" / "gossip_logs" / "made_up_rank_0000.tsv"
    log.write_text(log.read_text().replace(f"{newest:%Y}-", f"{newest.year + 1}-"))
    assert Onlooker(run_dir).look().flow == view.flow  # whatever that rank's clock says


def test_onlooker_counts_no_flow_of_ranks_that_are_gone_unless_all_are(run, tmp_path):
    for _ in range(3):
        run.beat()
    for rank in range(3):
        EventLog(tmp_path / "gossip_logs" / f"run_rank_{rank:04d}.tsv", rank).write("merged", peer=(rank + 1) % 3)
    run.leave(2)
    assert Onlooker(run.path).look().flow == {(1, 0): 1, (2, 1): 1}
    run.leave(0, 1)
    assert len(Onlooker(run.path).look().flow) == 3


def stamp(row):
    return datetime.fromisoformat(row["timestamp"].replace("Z", "+00:00"))


def test_onlooker_reads_tables_over_several_looks_where_time_is_short(run):
    onlooker = Onlooker(run.path)
    run.beat()
    known = [sum(row.held_out is not None for row in onlooker.look(0.0).rows) for _ in range(4)]
    assert known == [1, 2, 3, 3]


def test_onlooker_needs_the_leaders_fold_alone_of_many_ranks(tmp_path, monkeypatch):
    run = Run(tmp_path / "many", 40)
    run.beat()
    run.beat()
    onlooker = Onlooker(run.path)
    assert len(onlooker.look().rows) == 40
    read = []
    monkeypatch.setattr("training.onlooker.read_entry", lambda rank, path: read.append(rank))
    run.beat()
    assert len(onlooker.look().rows) == 40 and read == []


def test_elites_are_read_from_their_links(tmp_path):
    (tmp_path / "elite_02.pt").symlink_to("checkpoint_rank_0001_step_000500_loss_1.2500.pt")
    (tmp_path / "elite_01.pt").symlink_to("checkpoint_rank_0012_step_1000000_loss_NA.pt")
    (tmp_path / "elite_03.pt").write_text("no link")
    elites = read_elites(tmp_path)
    assert elites == (Elite(12, 1000000, None), Elite(1, 500, 1.25))
    lines = watch.elite_lines(View((), elites, {}, None, False))
    assert lines == ["elites: rank 12 step 1,000,000, rank 1 step 500 (1.803)"]


def test_flow_lines_name_the_greatest_givers_first():
    flow = {(0, 1): 2, (3, 2): 9, (3, 0): 1}
    when = datetime(2026, 1, 2, 3, 4, 5, tzinfo=timezone.utc)
    lines = watch.flow_lines(View((), (), flow, when, False))
    assert lines == [
        "weights merged in the 5 minutes to 03:04:05 UTC: 12", "     3 → 2 ×9, 0", "     0 → 1 ×2",
    ]  # fmt: skip
    many = {(sender, (sender + offset) % 512): 1 for sender in range(512) for offset in range(1, 9)}
    lines = watch.flow_lines(View((), (), many, when, False))
    assert len(lines) == 8 and lines[1].endswith("and 2 more") and lines[-1] == "  and from 506 more ranks"
    assert watch.flow_lines(View((), (), {}, None, False)) == []


def test_sparkline_goes_from_the_highest_to_the_lowest():
    assert watch.sparkline(()) == "-"
    assert watch.sparkline((1.0, 1.0)) == "▁▁"
    assert watch.sparkline(tuple(float(x) for x in range(1000, 0, -1))) == "█▇▆▆▅▄▃▃▂▁"


def test_age_has_four_characters_at_most():
    assert [watch.age(s) for s in (0, 99.4, 100, 5999, 6001, 359_000, 8e8)] == [
        "0s", "99s", "2m", "100m", "2h", "100h", "9259d",
    ]  # fmt: skip


def test_choose_keeps_the_best_the_silent_and_the_worst_of_many():
    states = {300: "silent"}
    rows = tuple(make_row(n, states.get(n, "running"), {"best_fitness": 1 + n / 512}, {}) for n in range(512))
    chosen = watch.choose(rows, 20)
    assert [row.rank for row in chosen] == [*range(15), 508, 509, 510, 511, 300]
    assert watch.choose(rows[:20], 20) == rows[:20]
    young = tuple(make_row(n, "running", {"best_fitness": 1.0} if n == 7 else {}, {}) for n in range(30))
    assert [row.rank for row in watch.choose(young, 6)] == [7, 0, 1, 2, 3, 4]


def test_make_row_ignores_values_that_are_no_numbers():
    row = make_row(0, "running", {"best_fitness": "low", "won": None, "step": 3}, {"won": 2.0})
    assert (row.best, row.step, row.counts[0]) == (None, 3, 2)
