"""Whole populations: real processes under the launcher, real sockets, one run directory."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from tests.conftest import TINY
from training.checkpoint import list_checkpoints, read_checkpoint
from training.metrics import COLUMNS

ROOT = Path(__file__).parents[1]
LIVELY = ["--gossip_heartbeat", "0.05", "--gossip_liveness", "10", "--gossip_fitness_decay", "0.5", "--val_every", "0",
          "--gossip_mixing_rate", "0.1", "--save_every", "50", "--gossip_host", "127.0.0.1"]  # fmt: skip
LEAVING = ("unreachable", "connection closed early", "closing", "refused")
EVENT_COLUMNS = "timestamp rank event step fitness exchange_id peer bytes milliseconds message".split()


def start(text: Path, cwd: Path, ranks: int, *flags: str, secret: str | None = None) -> subprocess.Popen:
    command = [sys.executable, "-m", "runtime.launch", "--ranks", str(ranks), "--", str(ROOT / "train.py")]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(("SLURM_", "GRUBOROS_"))}
    if secret:
        environment["GRUBOROS_SECRET"] = secret
    return subprocess.Popen(
        [*command, *TINY, "--data", str(text), "--output", "run", *LIVELY, *flags],
        cwd=cwd, env={**environment, "PYTHONPATH": str(ROOT)}, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip


def finish(process: subprocess.Popen) -> str:
    stderr = process.communicate(timeout=180)[1]
    assert process.returncode == 0, stderr
    return stderr


def table(path: Path) -> list[dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file, delimiter="\t"))


def events(cwd: Path, rank: int) -> list[dict[str, str]]:
    return table(cwd / "gossip_logs" / f"run_rank_{rank:04d}.tsv")


@pytest.fixture(scope="module")
def population(text, tmp_path_factory) -> Path:
    """Three ranks after 1000 steps each: their working directory."""
    cwd = tmp_path_factory.mktemp("population")
    finish(start(text, cwd, 3, "--train_steps", "1000", "--log_every", "20"))
    return cwd


def test_population_exchanges_and_accounts_for_it(population):
    won = lost = 0
    for rank in range(3):
        (*_, last) = rows = table(population / "run" / "metrics" / f"rank_{rank:04d}.tsv")
        assert tuple(last) == COLUMNS
        assert [int(row["step"]) for row in rows] == list(range(20, 1001, 20))
        won, lost = won + int(last["won"]), lost + int(last["lost"])
    # The last to finish still calls those that have left, until it hears that they did: no other fault is in order.
    failures = [row["message"] for rank in range(3) for row in events(population, rank) if row["event"] == "failed"]
    assert all(message.startswith(LEAVING) for message in failures), failures
    # Weights that arrived are weights that left: only those under way at the end are counted at one end alone.
    assert won > 5 and abs(won - lost) <= 3


def test_population_logs_every_conversation_under_one_id_at_both_ends(population):
    ends: dict[str, list[dict]] = {}
    for rank in range(3):
        rows = events(population, rank)
        assert rows and list(rows[0]) == EVENT_COLUMNS
        for row in rows:
            assert int(row["rank"]) == rank
            if row["exchange_id"] != "NA":
                ends.setdefault(row["exchange_id"], []).append(row)
    pairs = [rows for rows in ends.values() if len(rows) == 2 and {row["event"] for row in rows} == {"sent", "merged"}]
    assert len(pairs) > 5
    for one, other in pairs:
        assert (one["peer"], other["peer"]) == (other["rank"], one["rank"])
        sent, merged = (one, other) if one["event"] == "sent" else (other, one)
        assert float(sent["fitness"]) < float(merged["fitness"])  # lower wins
        assert int(sent["bytes"]) > 50_000 and float(merged["milliseconds"]) > 0


def test_population_learns_and_keeps_its_best(population):
    run_dir = population / "run"
    ranking = json.loads((run_dir / "population" / "ranking.json").read_text())
    assert {member["rank"] for member in ranking["members"]} == {0, 1, 2}
    files = list_checkpoints(run_dir)
    assert {file.rank for file in files} == {0, 1, 2}
    best = min(file.loss for file in files if file.loss is not None)
    assert (run_dir / "best.pt").resolve().name.endswith(f"loss_{best:.4f}.pt")
    assert best < 3.0  # nats per byte, from ln 256 = 5.5
    log = (population / "logs" / "train_run_rank_0001.log").read_text()
    assert re.search(r"step +\d+  loss +\d\.\d+ .* bits/byte", log) and re.search(r"merged +rank +\d", log)
    assert (run_dir / "population" / "secret").stat().st_mode & 0o777 == 0o600


def test_population_leaves_nothing_behind(population):
    assert not [path for path in population.rglob("*") if path.name.endswith(".tmp")]
    for link in (population / "run").glob("*.pt"):
        assert link.exists()


@pytest.mark.parametrize(
    ("method", "event"), [("clonal", "merged"), ("recombination", "merged"), ("average", "averaged")]
)
def test_every_merge_method_works_between_processes(text, tmp_path, method, event):
    flags = ["--gossip_merge_method", method, "--gossip_optimizer_recombination", "reset"]
    finish(start(text, tmp_path, 2, "--train_steps", "1000", *flags))
    seen = {row["event"] for rank in (0, 1) for row in events(tmp_path, rank)}
    assert event in seen
    for file in list_checkpoints(tmp_path / "run"):
        content = read_checkpoint(file.path)
        assert all(bool(torch.isfinite(tensor).all()) for tensor in content["training"]["tensors"].values())
        # A merge with reset starts the optimizer's count of steps again (a clone brings its own).
    newest = [read_checkpoint(file.path) for file in list_checkpoints(tmp_path / "run") if file.step == 1000]
    assert any(content["training"]["scalars"]["k"] < 1000 for content in newest)


def test_mixing_rate_zero_means_solitude(text, tmp_path):
    finish(start(text, tmp_path, 2, "--train_steps", "60", "--gossip_mixing_rate", "0"))
    assert events(tmp_path, 0) == events(tmp_path, 1) == []


def test_rejuvenation_renews_the_worst_from_an_elite(text, tmp_path):
    flags = ["--rejuvenation_probability", "1", "--rejuvenation_threshold", "1", "--gossip_mixing_rate", "0"]
    finish(
        start(text, tmp_path, 2, "--train_steps", "1000", "--save_every", "20", "--gossip_heartbeat", "0.05", *flags)
    )
    renewed = [row for rank in (0, 1) for row in events(tmp_path, rank) if row["event"] == "rejuvenated"]
    assert renewed and all("merged elite_" in row["message"] for row in renewed)


def test_static_peers_meet_without_a_registry(text, tmp_path):
    # Ports below those that the system hands out by itself.
    flags = ["--no_filesystem_coordinator", "--gossip_port", "21151"]
    peers = ["--gossip_peers", "127.0.0.1:21151,127.0.0.1:21152"]
    finish(start(text, tmp_path, 2, "--train_steps", "1000", *flags, *peers, secret="5a" * 32))
    assert "merged" in {row["event"] for rank in (0, 1) for row in events(tmp_path, rank)}


def test_a_population_that_is_resumed_goes_on_with_every_rank(text, tmp_path):
    finish(start(text, tmp_path, 2, "--train_steps", "5"))
    command = [sys.executable, "-m", "runtime.launch", "--ranks", "2", "--", str(ROOT / "train.py")]
    flags = ["--resume", "run", "--train_steps", "8"]
    again = subprocess.run([*command, *flags], cwd=tmp_path, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=180)
    assert again.returncode == 0
    assert {(file.rank, file.step) for file in list_checkpoints(tmp_path / "run")} >= {(0, 8), (1, 8)}


def test_ctrl_c_once_makes_every_rank_save_and_exit_0(text, tmp_path):
    process = start(text, tmp_path, 3)
    metrics = [tmp_path / "run" / "metrics" / f"rank_{rank:04d}.tsv" for rank in range(3)]
    deadline = time.monotonic() + 120
    while not all(path.exists() and path.read_text().count("\n") > 1 for path in metrics):
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.1)  # polls for what the ranks write; nothing depends on how long it is
    process.send_signal(signal.SIGINT)
    finish(process)
    assert {file.rank for file in list_checkpoints(tmp_path / "run")} == {0, 1, 2}
    for rank in range(3):
        assert "stopped by a signal" in (tmp_path / "logs" / f"train_run_rank_{rank:04d}.log").read_text()


def test_a_mistake_ends_every_rank_with_2_before_a_run_exists(text, tmp_path):
    process = start(text, tmp_path, 3, "--init_from", "absent.pt")
    stderr = process.communicate(timeout=120)[1]
    assert process.returncode == 2
    assert f"error: expected a checkpoint at {tmp_path / 'absent.pt'}" in stderr
    assert "Traceback" not in stderr
    assert not (tmp_path / "run").exists()
