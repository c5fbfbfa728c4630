import errno
import fcntl
import math
import re
import resource
import shutil
from pathlib import Path

import pytest

from gossip.event_log import EventLog
from runtime.errors import UserError
from training.metrics import COLUMNS, MetricsFile, RunLog, bits, mix_line, report_line

COUNTED = ("won", "lost", "averaged", "tied", "failed")
LABELS = ("loss", "ema", "held-out", "bits/byte", "kB/s", *COUNTED)


def rows(path) -> list[dict[str, str]]:
    header, *lines = path.read_text().splitlines()
    return [dict(zip(header.split("\t"), line.split("\t"), strict=True)) for line in lines]


def test_bits_turns_nats_into_bits():
    assert bits(math.log(256)) == pytest.approx(8)


def test_metrics_have_the_documented_columns_and_na_for_what_is_missing(tmp_path):
    metrics = MetricsFile(tmp_path / "metrics" / "rank_0000.tsv")
    metrics.create()
    metrics.append({"rank": 0, "step": 10, "loss": 1.25, "grad_norm": math.nan, "val_loss": None, "unlisted": 1})
    (row,) = rows(metrics.path)
    assert tuple(row) == COLUMNS
    assert (row["rank"], row["step"], row["loss"]) == ("0", "10", "1.25")
    assert row["grad_norm"] == row["val_loss"] == row["lr"] == "NA"


def test_metrics_columns_are_in_their_order():
    assert COLUMNS[COLUMNS.index("failed") :] == (
        "failed", "busy", "rolled_back", "lineage", "cpu_s", "bytes_sent", "bytes_received", "probe_loss", "probe_s",
        "distance", "base_lr", "weight_decay", "grad_clip",
    )  # fmt: skip


def test_metrics_that_were_removed_are_begun_again_but_not_their_run(tmp_path):
    metrics = MetricsFile(tmp_path / "run" / "metrics" / "rank_0000.tsv")
    metrics.create()
    metrics.append({"rank": 0, "step": 1})
    shutil.rmtree(metrics.path.parent)
    metrics.append({"rank": 0, "step": 2})
    assert [row["step"] for row in rows(metrics.path)] == ["2"]
    shutil.rmtree(tmp_path / "run")
    with pytest.raises(FileNotFoundError):
        metrics.append({"rank": 0, "step": 3})
    assert not (tmp_path / "run").exists()


def test_metrics_create_refuses_to_overwrite(tmp_path):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.create()
    with pytest.raises(FileExistsError):
        metrics.create()


def test_metrics_rewind_drops_what_will_be_written_again_and_torn_lines(tmp_path):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.create()
    for step in (10, 20, 30):
        metrics.append({"rank": 0, "step": step})
    with open(metrics.path, "a") as file:
        file.write("0\t4")  # killed in the middle of a line
    metrics.rewind(20)
    metrics.append({"rank": 0, "step": 30})
    assert [row["step"] for row in rows(metrics.path)] == ["10", "20", "30"]


def test_metrics_rewind_keeps_the_rows_of_a_version_with_other_columns(tmp_path):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.path.write_text("step\trank\tloss\tforgotten\n10\t3\t1.25\t7\n20\t3\t1.125\t7\n")
    metrics.rewind(10)
    metrics.append({"rank": 3, "step": 20, "lr": 0.5})
    old, new = rows(metrics.path)
    assert tuple(old) == tuple(new) == COLUMNS
    assert (old["rank"], old["step"], old["loss"], old["lr"]) == ("3", "10", "1.25", "NA")
    assert (new["rank"], new["step"], new["loss"], new["lr"]) == ("3", "20", "NA", "0.5")


def test_metrics_rewind_drops_a_row_that_was_cut_in_its_last_cell(tmp_path):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.create()
    for step in (10, 20):
        metrics.append({"rank": 0, "step": step, "grad_clip": 1.25})
    metrics.path.write_bytes(metrics.path.read_bytes()[:-2])
    metrics.rewind(20)
    assert [row["step"] for row in rows(metrics.path)] == ["10"]


def test_metrics_append_begins_a_new_line_after_one_that_a_full_disk_has_cut(tmp_path):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.create()
    metrics.append({"rank": 0, "step": 10})
    limit = resource.getrlimit(resource.RLIMIT_FSIZE)
    try:
        resource.setrlimit(resource.RLIMIT_FSIZE, (metrics.path.stat().st_size + 9, limit[1]))
        with pytest.raises(OSError, match="File too large"):
            metrics.append({"rank": 0, "step": 20})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limit)
    metrics.append({"rank": 0, "step": 30})
    first, torn, last = metrics.path.read_text().splitlines()[1:]
    assert len(torn) == 9
    assert [line.split("\t")[:2] for line in (first, last)] == [["0", "10"], ["0", "30"]]


@pytest.mark.parametrize("damage", [b"\xff\xfe\n", b"0\tNA" + b"\tNA" * (len(COLUMNS) - 2) + b"\n", bytes(50) + b"\n"])
def test_metrics_rewind_drops_damaged_lines(tmp_path, damage):
    metrics = MetricsFile(tmp_path / "rank_0000.tsv")
    metrics.create()
    with open(metrics.path, "ab") as file:
        file.write(damage)
    metrics.rewind(20)
    metrics.append({"rank": 0, "step": 10})
    assert [row["step"] for row in rows(metrics.path)] == ["10"]


def test_metrics_rewind_makes_a_missing_file(tmp_path):
    MetricsFile(tmp_path / "metrics" / "rank_0004.tsv").rewind(5)
    assert rows(tmp_path / "metrics" / "rank_0004.tsv") == []


def test_run_log_writes_stamped_plain_lines(tmp_path, capsys):
    log = RunLog(tmp_path / "logs" / "train.log", echo=False)
    log.line("step 1")
    log.line("said too", echo=True)
    log.close()
    lines = (tmp_path / "logs" / "train.log").read_text().splitlines()
    assert [line.split(" ", 2)[2] for line in lines] == ["step 1", "said too"]
    assert capsys.readouterr().err.strip() == lines[1]


def test_run_log_on_a_full_disk_says_so_once_and_goes_on(capsys):
    log = RunLog(Path("/dev/full"), echo=False)
    log.line("one")
    log.line("two")
    assert log.lost == 2
    assert capsys.readouterr().err.count("cannot be written") == 1
    log.close()


def test_run_log_of_a_new_run_keeps_an_earlier_one_of_its_name_apart(tmp_path):
    path = tmp_path / "train_run_rank_0000.log"
    for text in ("first", "second", "third"):
        log = RunLog(path, echo=False)
        log.begin_anew()
        log.line(text)
        log.close()
    kept = {older.name: older.read_text().split()[-1] for older in tmp_path.iterdir()}
    assert kept == {path.name: "third", f"{path.name}.1": "first", f"{path.name}.2": "second"}
    log = RunLog(path, echo=False)  # a run that goes on
    log.line("again")
    log.close()
    assert len(path.read_text().splitlines()) == 2 and len(list(tmp_path.iterdir())) == 3


def test_run_log_that_another_writes_is_refused_where_there_are_locks(tmp_path, monkeypatch):
    path = tmp_path / "train_run_rank_0000.log"
    first = RunLog(path, echo=False)
    for begin in (first.begin_anew, lambda: first.line("one"), first.begin_anew):
        begin()
        with pytest.raises(UserError, match="to be free, got a living run of this name"):
            RunLog(path, echo=False)
    with monkeypatch.context() as patch:
        patch.setattr(fcntl, "flock", without_locks)
        RunLog(path, echo=False).close()
    first.close()
    RunLog(path, echo=False).close()


def without_locks(file, operation):
    raise OSError(errno.ENOTSUP, "Operation not supported")


def test_report_line_has_fixed_columns():
    row = {"step": 10, "loss": math.log(2), "ema_loss": None, "bytes_per_s": 14_600.0, **dict.fromkeys(COUNTED, 0)}
    bare = report_line(row)
    full = report_line({**row, "step": 1_234_567, "ema_loss": 7.0, "val_loss": 0.5, "lost": 9999})
    assert bare == (
        "step       10  loss  1.0000  ema       -  held-out       - bits/byte       14.6 kB/s  "
        "won    0  lost    0  averaged    0  tied    0  failed    0"
    )
    assert len(full) == len(bare) and [full.index(word) for word in LABELS] == [bare.index(word) for word in LABELS]


def test_mix_line_says_what_moved_and_why_it_did_not():
    assert mix_line("averaged", 500, 3, 2_200_000, 12.5, "ignored") == (
        "step      500  averaged     rank    3        2.2 MB in    0.013 s"
    )
    assert mix_line("failed", None, "10.0.0.1:4000", None, None, "unreachable: no answer in 5 s") == (
        "step        -  failed       10.0.0.1:4000  unreachable: no answer in 5 s"
    )
    assert mix_line("rolled_back", 7, 12, 1, 1.0, "0.7 before, 0.9 after").endswith("rank   12  0.7 before, 0.9 after")
    assert mix_line("tied", 1, 2, 3, 4.0, "") is mix_line("busy", 1, 2, 3, 4.0, "") is None


def test_run_log_tells_of_mixes_alone(tmp_path):
    log = RunLog(tmp_path / "train.log", echo=False)
    events = EventLog(tmp_path / "events.tsv", 0, tell=log.mix)
    events.write("merged", 10, 1.0, "id", peer=2, nbytes=1000, milliseconds=5.0)
    events.write("tied", 11, 1.0, "id", peer=2, message="fitness unknown")
    events.write("non_finite", 12, message="about this rank alone, which tells of it itself")
    log.close()
    (line,) = (tmp_path / "train.log").read_text().splitlines()
    assert re.fullmatch(r"\S+ \S+ step       10  merged       rank    2        0.0 MB in    0.005 s", line)
    assert len((tmp_path / "events.tsv").read_text().splitlines()) == 4
