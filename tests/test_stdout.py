"""Standard output that is full, or whose reader has gone: one line or none, and a status that says so."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from mingru.minLM import MinLM, ModelConfig
from tests.synthetic_run import write_run
from training.checkpoint import save_checkpoint

ROOT = Path(__file__).parent.parent
FULL = "error: expected to write to standard output, got No space left on device: send it elsewhere\n"


@pytest.fixture
def commands(tmp_path):
    """By script, a command line that prints."""
    run = write_run(tmp_path / "run", ranks=2, steps=100)
    config = ModelConfig(dim=16, depth=1)
    checkpoint = save_checkpoint(tmp_path, 0, 1, 1.25, config, MinLM(config).state_dict(), {})
    text = tmp_path / "text"
    text.write_bytes(b"some bytes \x1e and more of them")
    return {
        "watch.py": [run, "--once"],
        "prepare_data.py": ["--stats", text],
        "export.py": ["--cpu", "--model", checkpoint, "--output", tmp_path / "exported", "--score", text],
        "generate.py": ["--cpu", "--model", checkpoint, "--score", text],
    }


@pytest.mark.parametrize("script", ["watch.py", "prepare_data.py", "export.py", "generate.py"])
def test_full_output_is_said_in_one_line(commands, script):
    with open("/dev/full", "wb") as full:
        done = subprocess.run(
            [sys.executable, ROOT / script, *commands[script]], stdin=subprocess.DEVNULL, stdout=full,
            stderr=subprocess.PIPE, text=True, timeout=60,
        )  # fmt: skip
    assert done.stderr.splitlines(keepends=True)[-1] == FULL and "Traceback" not in done.stderr
    assert done.returncode == 2


@pytest.mark.parametrize("script", ["watch.py", "export.py"])
def test_a_reader_who_goes_ends_it_quietly(commands, script):
    process = subprocess.Popen(
        [sys.executable, ROOT / script, *commands[script]], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
        stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    process.stdout.close()
    _, errors = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "error" not in errors.lower() and "Traceback" not in errors


def without(descriptor: int, command: list) -> subprocess.CompletedProcess:
    """What becomes of `command` in a process that has no such descriptor."""
    shell = ["bash", "-c", f'exec "$@" {descriptor}>&-', "bash"]
    return subprocess.run([*shell, sys.executable, *command], stdin=subprocess.DEVNULL, capture_output=True, timeout=60)


def test_a_closed_output_is_said_in_one_line(commands):
    done = without(1, [ROOT / "watch.py", *commands["watch.py"]])
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith(b"error: expected to write to standard output, got it closed")


def test_without_standard_error_nothing_else_comes_to_standard_output(commands):
    done = without(2, [ROOT / "generate.py", *commands["generate.py"]])
    assert done.returncode == 0
    assert done.stdout.count(b"\n") == 1 and done.stdout.endswith(b" bits per byte\n")


def test_names_of_any_bytes_are_printed_as_escapes(tmp_path):
    run = write_run(tmp_path / "run\udcff[bold]", ranks=2, steps=100)
    done = subprocess.run(
        [sys.executable, ROOT / "watch.py", run, "--once"], stdin=subprocess.DEVNULL, capture_output=True,
        env={**os.environ, "LC_ALL": "C.UTF-8", "COLUMNS": "300"}, timeout=60,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert b"run\\udcff[bold]" in done.stdout
