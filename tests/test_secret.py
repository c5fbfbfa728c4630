"""The run's secret: where it comes from, that all ranks get the same, and what is refused."""

import multiprocessing
import os
import stat
from pathlib import Path

import pytest

from gossip.secret import run_secret
from runtime.errors import UserError


def test_run_secret_prefers_the_environment(tmp_path):
    assert run_secret(tmp_path, {"GRUBOROS_SECRET": "5a" * 32}) == b"\x5a" * 32
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("text", ["", "5a" * 31, "not hex", "5a" * 31 + "5"])
def test_run_secret_refuses_a_short_or_malformed_variable(text):
    with pytest.raises(UserError, match="GRUBOROS_SECRET"):
        run_secret(None, {"GRUBOROS_SECRET": text})


def test_run_secret_needs_a_folder_or_the_variable():
    with pytest.raises(UserError, match="GRUBOROS_SECRET"):
        run_secret(None, {})


def test_run_secret_is_made_once_and_only_for_its_owner(tmp_path):
    folder = tmp_path / "population"
    secret = run_secret(folder, {})
    assert len(secret) == 32 and run_secret(folder, {}) == secret
    assert [path.name for path in folder.iterdir()] == ["secret"]
    assert stat.S_IMODE((folder / "secret").stat().st_mode) == 0o600
    assert run_secret(tmp_path / "another", {}) != secret


def _first_come(folder, gate, results):
    gate.wait()
    results.put(run_secret(folder, {}))


def test_run_secret_is_the_same_for_ranks_that_come_at_once(tmp_path):
    spawn = multiprocessing.get_context("spawn")
    gate, results = spawn.Barrier(4), spawn.Queue()
    processes = [spawn.Process(target=_first_come, args=(tmp_path / "population", gate, results)) for _ in range(4)]
    for process in processes:
        process.start()
    assert len({results.get(timeout=20) for _ in processes}) == 1
    for process in processes:
        process.join()
    assert [path.name for path in (tmp_path / "population").iterdir()] == ["secret"]


@pytest.mark.parametrize("mode", [0o640, 0o604, 0o660, 0o620])
def test_run_secret_refuses_a_file_that_others_may_read_or_write(tmp_path, mode):
    run_secret(tmp_path, {})
    (tmp_path / "secret").chmod(mode)
    with pytest.raises(UserError, match=r"mode 600.*set GRUBOROS_SECRET"):
        run_secret(tmp_path, {})


def test_a_run_is_neither_claimed_nor_described_before_its_secret_is_accepted(run_train, monkeypatch):
    population = Path("run/population")
    population.mkdir(parents=True)
    population.joinpath("secret").write_text("5a" * 32)
    population.joinpath("secret").chmod(0o644)  # as a filesystem without modes shows it
    with pytest.raises(UserError, match="mode 600"):
        run_train("run", "--train_steps", "1")
    assert [str(path) for path in Path("run").rglob("*")] == ["run/population", "run/population/secret"]
    monkeypatch.setenv("GRUBOROS_SECRET", "5a" * 32)
    run_train("run", "--train_steps", "1")


def test_run_secret_refuses_a_foreign_owner(tmp_path, monkeypatch):
    run_secret(tmp_path, {})
    monkeypatch.setattr(os, "geteuid", lambda: os.stat(tmp_path).st_uid + 1)
    with pytest.raises(UserError, match="owner"):
        run_secret(tmp_path, {})


@pytest.mark.parametrize("content", [b"", b"5a5a", b"\xff" * 64, b"zz" * 32])
def test_run_secret_refuses_a_file_without_a_secret(tmp_path, content):
    run_secret(tmp_path, {})
    (tmp_path / "secret").write_bytes(content)
    with pytest.raises(UserError, match="32 bytes"):
        run_secret(tmp_path, {})


def test_run_secret_follows_no_link(tmp_path):
    run_secret(tmp_path / "a", {})
    (tmp_path / "b").mkdir()
    (tmp_path / "b" / "secret").symlink_to(tmp_path / "a" / "secret")
    with pytest.raises(UserError):
        run_secret(tmp_path / "b", {})


def test_run_secret_waits_for_no_pipe(tmp_path):
    os.mkfifo(tmp_path / "secret", 0o600)
    with pytest.raises(UserError, match="plain file"):
        run_secret(tmp_path, {})


def test_run_secret_says_so_when_it_cannot_be_made(tmp_path):
    (tmp_path / "population").write_text("a file where a folder belongs")
    with pytest.raises(UserError, match="GRUBOROS_SECRET"):
        run_secret(tmp_path / "population", {})
