"""The thread that writes logs and metrics: what a disk that hangs costs, and what it does not."""

import os
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from gossip.event_log import EventLog
from runtime import scribe
from runtime.scribe import Scribe
from training.loop import Trainer
from training.metrics import MetricsFile, RunLog


class Disk:
    """A pipe in a file's place: what writes to it hangs, once it is full, until answer() empties it."""

    def __init__(self, path):
        os.mkfifo(path)
        self._reader = os.open(path, os.O_RDONLY | os.O_NONBLOCK)
        self.written = b""

    def answer(self, scribe: Scribe):
        """Read all that comes until the scribe has written everything."""
        closing = threading.Thread(target=scribe.close)
        closing.start()
        over = False
        while not (self._dry() and over):
            over = not closing.is_alive()
        os.close(self._reader)

    def _dry(self):
        try:
            piece = os.read(self._reader, 1 << 16)
        except BlockingIOError:
            return True
        self.written += piece
        return not piece


@pytest.mark.parametrize("kind", ["log", "events"])
def test_a_disk_that_hangs_holds_up_the_scribe_alone_and_gets_every_line_in_order(tmp_path, kind):
    disk, hands = Disk(tmp_path / "lines"), Scribe()
    if kind == "log":
        log = RunLog(tmp_path / "lines", echo=False, hand=hands.hand)
        say = log.line
    else:
        log = EventLog(tmp_path / "lines", rank=0, hand=hands.hand)
        say = log.write
    began = time.monotonic()
    for number in range(2000):  # some 100 kB or more, where a pipe holds 64
        say(f"line {number:>4} {'x' * 50}")
    assert time.monotonic() - began < 5 and hands._waiting.qsize() > 0
    log.close()
    disk.answer(hands)
    told = [line for line in disk.written.decode().splitlines() if "line" in line]
    assert len(told) == 2000 and all(f"line {number:>4} " in line for number, line in enumerate(told))
    assert hands.lost == log.lost == 0


def test_what_is_too_much_to_keep_is_dropped_counted_and_said_once(monkeypatch, capsys):
    monkeypatch.setattr(scribe, "MOST_WAITING", 3)
    free, done = threading.Event(), []
    hands = Scribe()
    hands.hand(free.wait)
    while hands._waiting.qsize():
        time.sleep(0.001)
    for number in range(10):
        hands.hand(lambda number=number: done.append(number))
    free.set()
    hands.close()
    assert done == [0, 1, 2] and hands.lost == 7
    assert capsys.readouterr().err.count("are being lost: the disk does not answer; training goes on") == 1


def test_memory_that_is_out_costs_a_line_and_no_more(capsys):
    done, hands = [], Scribe()
    for number in range(3):
        hands.hand(lambda number=number: done.append(number) if number != 1 else bytearray(1 << 60))
    hands.close()
    assert done == [0, 2] and hands.lost == 1
    assert "are being lost: memory is out; training goes on" in capsys.readouterr().err


def test_what_a_last_write_hands_over_in_its_turn_is_written_too(tmp_path):
    """As a row of the metrics that cannot be written does, once the logs have been closed."""
    hands, free = Scribe(), threading.Event()
    log = RunLog(tmp_path / "train.log", echo=False, hand=hands.hand)
    hands.hand(lambda: (free.wait(), log.line("it failed")))
    log.close()
    closing = threading.Thread(target=hands.close)
    closing.start()
    while not hands._closed:
        time.sleep(0.001)
    free.set()
    closing.join()
    assert (tmp_path / "train.log").read_text().endswith("it failed\n")


def test_a_reader_of_standard_error_who_stands_still_holds_up_nobody(tmp_path):
    """Of the first rank each line goes there too, and the launcher behind it may hang with its disk."""
    script = (
        "import os, time\n"
        "from pathlib import Path\n"
        "from runtime.scribe import Scribe\n"
        "from training.metrics import RunLog\n"
        "hands = Scribe()\n"
        "log = RunLog(Path('train.log'), echo=True, hand=hands.hand)\n"
        "for _ in range(2000): log.line('x' * 100)\n"
        "os._exit(0)\n"
    )
    environment = {**os.environ, "PYTHONPATH": str(Path(__file__).parent.parent)}
    process = subprocess.Popen(
        [sys.executable, "-c", script], cwd=tmp_path, env=environment, stderr=subprocess.PIPE, stdin=subprocess.DEVNULL
    )
    with process:
        assert process.wait(timeout=60) == 0
        process.stderr.close()


def test_the_end_does_not_wait_for_ever(monkeypatch, capsys):
    monkeypatch.setattr(scribe, "END_SECONDS", 0.1)
    free = threading.Event()
    hands = Scribe()
    hands.hand(free.wait)
    hands.hand(lambda: None)
    hands.close()
    assert "the last 2 lines of logs and metrics are lost" in capsys.readouterr().err
    free.set()


def test_a_closed_scribe_writes_at_once():
    done = []
    hands = Scribe()
    hands.close()
    hands.hand(lambda: done.append(1))
    assert done == [1]


def test_an_error_that_no_write_may_have_reaches_whoever_hands_over_the_next():
    hands = Scribe()
    hands.hand(lambda: 1 // 0)
    hands._thread.join()
    with pytest.raises(ZeroDivisionError):
        hands.hand(lambda: None)
    with pytest.raises(ZeroDivisionError):
        hands.close()


def test_training_goes_on_while_the_metrics_hang_and_no_row_is_lost(run_train, monkeypatch):
    """The disk answers only when training has come to its last step."""
    append, step, answers = MetricsFile.append, Trainer.train_step, threading.Event()
    held = []

    def hanging(self, row):
        held.append(answers.is_set())
        assert answers.wait(60)
        append(self, row)

    def counted(self):
        if self.totals.step == 11:
            answers.set()
        return step(self)

    monkeypatch.setattr(MetricsFile, "append", hanging)
    monkeypatch.setattr(Trainer, "train_step", counted)
    run_dir = run_train("run", "--train_steps", "12", "--log_every", "1")
    assert not held[0]
    rows = (run_dir / "metrics" / "rank_0000.tsv").read_text().splitlines()
    assert [row.split("\t")[1] for row in rows] == ["step", *map(str, range(1, 13))]
