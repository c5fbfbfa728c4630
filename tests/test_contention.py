"""Whether a rank notices that it shares its cores."""

import os
import subprocess
import sys

import pytest
import torch

from tests.ranks import ROOT, clean_environment
from training import contention
from training.contention import Contention

CPU = torch.device("cpu")
# train.py, but it judges sooner.
SOON = """
import sys, train
from training import contention
contention.LEAST_SECONDS = 3.0
sys.exit(train.main(sys.argv[1:]))
"""


@pytest.fixture
def clocks(monkeypatch):
    """Both clocks stand still until the test moves them."""
    now = {"monotonic": 100.0, "process_time": 3.0}
    for name in now:
        monkeypatch.setattr(contention.time, name, lambda name=name: now[name])
    monkeypatch.setattr(torch, "get_num_threads", lambda: 4)
    monkeypatch.delenv("OMP_WAIT_POLICY", raising=False)

    def move(wall, cpu):
        now["monotonic"] += wall
        now["process_time"] += cpu

    return move


def test_little_time_is_said_once(clocks):
    watch = Contention(CPU)
    clocks(5, 1)
    assert watch.complaint() is None  # too early to tell
    clocks(6, 10)
    assert "4 threads get 25% of their time" in watch.complaint()
    clocks(20, 1)
    assert watch.complaint() is None


def test_what_was_long_ago_does_not_count(clocks):
    watch = Contention(CPU)
    clocks(1000, 4000)
    assert watch.complaint() is None
    clocks(11, 11)
    assert watch.complaint() is not None


@pytest.mark.parametrize("reason", ["passive", "gpu", "one thread"])
def test_nothing_is_said_where_threads_do_not_spin_for_each_other(clocks, monkeypatch, reason):
    if reason == "passive":
        monkeypatch.setenv("OMP_WAIT_POLICY", "PASSIVE")
    if reason == "one thread":
        monkeypatch.setattr(torch, "get_num_threads", lambda: 1)
    watch = Contention(torch.device("cuda") if reason == "gpu" else CPU)
    clocks(100, 1)
    assert watch.complaint() is None


@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="one core: two threads are always held up")
def test_a_rank_beside_busy_processes_says_so(text, tmp_path):
    """One that keeps each core busy."""
    cores = os.sched_getaffinity(0)
    busy = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in cores]
    try:
        flags = (
            "--dim 64 --depth 2 --batch_size 8 --chunk_size 64 --val_every 0 --log_every 2 --max_minutes 0.15".split()
        )
        done = subprocess.run(
            [sys.executable, "-c", SOON, "--cpu", "--data", str(text), "--output", "run", *flags],
            cwd=tmp_path, env={**clean_environment(), "OMP_NUM_THREADS": "2", "PYTHONPATH": str(ROOT)},
            stderr=subprocess.PIPE, text=True, timeout=300,
        )  # fmt: skip
    finally:
        for process in busy:
            process.kill()
            process.wait()
    assert done.returncode == 0, done.stderr
    assert "may be several times as fast" in done.stderr
