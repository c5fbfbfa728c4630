"""Fixtures of the tests that train: a small text, and train.py called in this process."""

import os
import random
import signal
from pathlib import Path

import pytest
import torch

import train

# Started in the background, or by nohup, the tests ignore these signals, and every process that they start would too.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)

# Files that take longest, or mostly wait, come first: no worker is then left alone with one at the end.
LONGEST = ("test_slurm.py", "test_scan_triton.py")

WORDS = "the quick brown fox jumps over a lazy dog and runs far away from every hungry wolf in this deep forest".split()

# The smallest run that still has layers, lanes, documents and a held-out part, in one precision on every processor.
SIZES = ["--dim", "16", "--depth", "2", "--batch_size", "2", "--chunk_size", "32"]
TINY = ["--dtype", "fp32", *SIZES, "--cpu", "--val_bytes", "512"]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    items.sort(key=lambda item: LONGEST.index(item.path.name) if item.path.name in LONGEST else len(LONGEST))


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    """About 40 kB of made-up sentences in documents of a few hundred bytes."""
    dice = random.Random(0)
    documents = [" ".join(dice.choices(WORDS, k=dice.randint(20, 120))) + ".\x1e" for _ in range(120)]
    path = tmp_path_factory.mktemp("corpus") / "text.txt"
    path.write_text("".join(documents))
    return path


@pytest.fixture
def run_train(text, tmp_path, monkeypatch):
    """train.py's main in an empty working directory, on one thread: run_train("out", "--lr", "0.1") -> run directory.

    The first argument is the run directory; None leaves --output out. Flags after it override the tiny defaults.
    """
    monkeypatch.chdir(tmp_path)
    for name in list(os.environ):
        foreign = name.startswith(("SLURM_", "GRUBOROS_", "TORCHELASTIC_"))
        if foreign or name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"):
            monkeypatch.delenv(name)
    numbers = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGUSR1)
    handlers = {number: signal.getsignal(number) for number in numbers}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)

    def run(output: str | None, *flags: str) -> Path:
        place = [] if output is None else ["--output", output]
        data = [] if "--data" in flags else ["--data", str(text)]
        status = train.main([*TINY, *data, *place, *flags])
        assert status == 0
        return tmp_path / (output or "")

    yield run
    torch.set_num_threads(threads)
    for number, handler in handlers.items():
        signal.signal(number, handler)
