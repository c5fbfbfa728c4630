"""What exchanges cost training: the time of a step with one every 50 steps over that with none.

Two ranks of train.py with a thread each, which average their weights at every exchange; blocks of 50 steps with one
exchange and without any in turn.
"""

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

from bench import ringing
from bench.speed.timing import Goal, Row, Setting, Spread

ROOT = Path(__file__).parent.parent.parent
FLAGS = ("--cpu", "--gossip_host", "127.0.0.1", "--gossip_mixing_rate", "0", "--gossip_merge_method", "average",
         "--save_every", "1g", "--val_every", "0", "--log_every", "100000")  # fmt: skip
SIZE = ("--dim", "128", "--depth", "4", "--batch_size", "4", "--chunk_size", "256")
QUICK_SIZE = ("--dim", "16", "--depth", "1", "--batch_size", "2", "--chunk_size", "32", "--val_bytes", "512")
BLOCKS = 14  # the first two are not counted


def measure(setting: Setting) -> Iterator[Row]:
    """Of the rank that calls, whose work at an exchange is the same as the other's."""
    steps = BLOCKS * ringing.BLOCK
    with tempfile.TemporaryDirectory() as folder:
        corpus = Path(folder) / "corpus"
        corpus.write_bytes(os.urandom(2**20))
        setting.tell(f"two ranks of {steps} steps")
        launch = ["-m", "runtime.launch", "--ranks", "2", "--threads_per_rank", "1", "--max_restarts", "0",
                  "--follow", str(os.getpid())]  # fmt: skip
        flags = ["--data", str(corpus), "--output", "run", "--train_steps", str(steps), *FLAGS]
        size = QUICK_SIZE if setting.quick else SIZE
        command = [sys.executable, *launch, "--", ringing.__file__, *flags, *size]
        ended = subprocess.run(
            command, cwd=folder, env=os.environ | {"PYTHONPATH": str(ROOT)}, capture_output=True, text=True
        )
        if ended.returncode:
            raise RuntimeError(f"expected two ranks to train, got status {ended.returncode}:\n{ended.stderr}")
        seen = json.loads((Path(folder) / ringing.REPORT).read_text())
    seconds = [after - before for before, after in zip(seen["starts"], seen["starts"][1:], strict=False)]
    # A block with an exchange and the two beside it without one: a drift of the machine's speed cancels out.
    ratios = [seconds[block] / ((seconds[block - 1] + seconds[block + 1]) / 2) for block in range(2, BLOCKS - 1, 2)]
    quiet = sum(seconds[3::2]) / len(seconds[3::2]) / ringing.BLOCK
    case = f"{' '.join(size)}: {seen['exchanges']} exchanges in {len(ratios) + 1} blocks of {2 * ringing.BLOCK} steps"
    ratio = Spread.of(ratios)
    yield Row(
        case, quiet * ratio.median * 1e3, "ms a step", "none", quiet * 1e3, ratio,
        None if setting.quick else Goal("<=", 1.01), "times the step",
    )  # fmt: skip
