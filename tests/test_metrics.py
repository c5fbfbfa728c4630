import math
import shutil
from pathlib import Path

import pytest

from training.metrics import COLUMNS, MetricsFile, RunLog, bits


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
        "failed", "busy", "rolled_back", "lineage", "cpu_s", "bytes_sent", "bytes_received",
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
