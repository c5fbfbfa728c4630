import datetime
import errno
import os
import threading

from gossip.event_log import COLUMNS, EventLog


def rows(path):
    return [line.split("\t") for line in path.read_text().split("\n")[:-1]]


def test_event_log_writes_header_and_fields(tmp_path):
    path = tmp_path / "gossip_logs" / "run_rank_0003.tsv"
    log = EventLog(path, rank=3)
    log.write("sent", 500, 1.25, "0a1b2c3d4e5f6071", peer=1, nbytes=1 << 20, milliseconds=12.34, message="lower loss")
    header, row = rows(path)
    assert tuple(header) == COLUMNS
    assert row[1:] == ["3", "sent", "500", "1.250000", "0a1b2c3d4e5f6071", "1", "1048576", "12.3", "lower loss"]
    assert row[0].endswith("Z")
    written = datetime.datetime.fromisoformat(row[0].replace("Z", "+00:00"))
    assert abs((datetime.datetime.now(datetime.timezone.utc) - written).total_seconds()) < 60
    assert len(row[0]) == len("2026-01-02T03:04:05.678Z")


def test_event_log_writes_na_for_what_is_missing_but_not_for_zero(tmp_path):
    log = EventLog(tmp_path / "log.tsv", rank=0)
    log.write("failed")
    log.write("sent", 0, 0.0, peer=0, nbytes=0, milliseconds=0.0)
    _, missing, zero = rows(log.path)
    assert missing[3:] == ["NA"] * 7
    assert zero[3:] == ["0", "0.000000", "NA", "0", "0", "0.0", "NA"]


def test_event_log_keeps_an_event_on_one_line_whatever_the_message(tmp_path):
    log = EventLog(tmp_path / "log.tsv", rank=0)
    log.write("failed", message="a\tb\nc\r\x1b[31md\x00\u2028e")
    assert rows(log.path)[1][-1] == "a b c  [31md  e"


def test_event_log_continues_a_file_and_ends_a_torn_line(tmp_path):
    path = tmp_path / "log.tsv"
    EventLog(path, rank=0).write("sent")
    EventLog(path, rank=0).write("received")
    with open(path, "a") as file:
        file.write("2026-01-01T00:00:00.000Z\t0\tto")
    EventLog(path, rank=0).write("merged")
    assert [row[2] for row in rows(path)] == ["event", "sent", "received", "to", "merged"]


def test_event_log_lines_of_many_threads_stay_whole(tmp_path):
    log = EventLog(tmp_path / "log.tsv", rank=0)
    threads = [
        threading.Thread(target=lambda n=n: [log.write("tied", i, peer=n, message="x" * 50) for i in range(100)])
        for n in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    lines = rows(log.path)
    assert all(len(line) == len(COLUMNS) for line in lines)
    assert {(line[6], line[3]) for line in lines[1:]} == {(str(n), str(i)) for n in range(8) for i in range(100)}


def test_event_log_reports_a_full_disk_once_and_goes_on_when_there_is_space(tmp_path, monkeypatch, capsys):
    log = EventLog(tmp_path / "log.tsv", rank=2)
    log.write("sent")
    real_write = os.write

    def full_after_ten_bytes(descriptor, content):
        if len(content) > 10:
            return real_write(descriptor, content[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "write", full_after_ten_bytes)
    log.write("received")
    monkeypatch.setattr(os, "write", lambda *_: (_ for _ in ()).throw(OSError(errno.ENOSPC, "No space left on device")))
    log.write("received")
    monkeypatch.undo()
    log.write("merged")
    assert log.lost == 2
    assert capsys.readouterr().err.count("No space left on device") == 1
    assert [row[2] for row in rows(log.path) if len(row) == len(COLUMNS)] == ["event", "sent", "merged"]


def test_event_log_that_cannot_be_opened_is_said_and_opened_once_it_can(tmp_path, capsys):
    """As on a full disk, where a rank that starts again finds its file with a line that was torn."""
    (tmp_path / "logs").write_text("in the folder's place")
    log = EventLog(tmp_path / "logs" / "log.tsv", rank=3)
    assert log.lost == 1 and capsys.readouterr().err.count("events of rank 3 are being lost") == 1
    (tmp_path / "logs").unlink()
    log.write("sent")
    assert [row[2] for row in rows(log.path)] == ["event", "sent"]


def test_event_log_survives_its_folder_being_removed(tmp_path, monkeypatch):
    log = EventLog(tmp_path / "logs" / "log.tsv", rank=0)
    log.close()
    os.unlink(log.path)
    os.rmdir(log.path.parent)
    log.write("sent")
    assert [row[2] for row in rows(log.path)] == ["event", "sent"]
