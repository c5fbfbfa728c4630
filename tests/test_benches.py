"""`python -m bench`, small: every benchmark runs and says what it measured."""

import json
import math
import subprocess
import sys
from pathlib import Path

import pytest

from bench.__main__ import NAMES
from bench.speed.timing import Goal, Row, Spread

ROOT = Path(__file__).parent.parent

# A case of each benchmark, by how it begins, and what it is compared with.
EXPECTED = {
    "recurrence": [("(1,64,8) float32", "log-space"), ("(1,64,8) float32", "copy of its bytes"),
                   ("(1,64,8) bfloat16", "tiled"), ("(1,64,8) float32 extra memory", "log-space"),
                   ("error at T = 256, float32, ours", "float64")],
    "gru": [("width 8, B4 T64", "nn.GRU")],
    "training": [("dim 16 depth 2 B2 T32, ours fp32", "predecessor"),
                 ("dim 16 depth 2 B2 T32, ours bf16", "matrix products in bf16"),
                 ("dim 16 depth 2 B2 T32, predecessor: matrix products in the profile", "")],
    "chunks": [("dim 16 depth 2 B1 T128", "B4 T32"), ("dim 16 depth 2 B1 T128 memory", "B4 T32")],
    "dropout": [("8 x 32 x 16, forward + backward", "torch's"),
                ("8 x 32 x 16, forward + backward", "copy of its bytes"),
                ("a step of dim 16 depth 2 B2 T32, dropout 0.1", "a step without")],
    "optimizer": [("0.0M parameters", "schedulefree, foreach"), ("0.0M parameters", "torch AdamW(fused)")],
    "decoding": [("dim 16 depth 2, 1 lanes, ours bfloat16", "predecessor"),
                 ("dim 16 depth 2, 8 lanes, ours float32", "reading the weights")],
    "exchange": [("13 MB, a conversation", "bare sockets"), ("13 MB, with the merge", "pickled files and merge"),
                 ("13 MB, merge", "copy of its bytes"), ("a step boundary", "")],
    "stall": [("--dim 16", "none")],
    "registry": [("a beat among 3 ranks, follower", "heartbeat"), ("a beat among 3 ranks, leader", "heartbeat")],
    "overhead": [("--dim 16 --depth 1: 2 ranks", "alone")],
}  # fmt: skip


def run_bench(*arguments: str) -> subprocess.CompletedProcess:
    return subprocess.run([sys.executable, "-m", "bench", *arguments], cwd=ROOT, capture_output=True, text=True)


def test_bench_measures_everything_and_writes_it_down(tmp_path):
    ended = run_bench("--quick", "--threads", "1", "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    assert set(EXPECTED) == set(NAMES)
    for name, expected in EXPECTED.items():
        told = json.loads((tmp_path / f"{name}.json").read_text())
        assert told["command"].startswith("python -m bench --quick") and told["hardware"]["cores"] >= 1
        assert told["versions"]["git"] and told["threads"] == 1 and told["device"] == "cpu" and told["quick"]
        rows = told["rows"]
        for case, against in expected:
            assert any(row["case"].startswith(case) and row["against"] == against for row in rows), (case, rows)
        assert all(math.isfinite(row["ours"]) for row in rows)
        assert f"\n {name} " in ended.stdout


def test_bench_runs_the_benchmarks_that_are_named(tmp_path):
    ended = run_bench("--quick", "optimizer", "--output", str(tmp_path))
    assert ended.returncode == 0 and [path.name for path in tmp_path.iterdir()] == ["optimizer.json"], ended.stderr


@pytest.mark.parametrize(
    ("arguments", "error"),
    [(["scam"], "got 'scam': correct it"), (["--rounds", "1"], "--rounds of at least 2")],
)
def test_bench_refuses_what_it_cannot_run_in_one_line(arguments, error):
    ended = run_bench(*arguments)
    assert ended.returncode == 2 and error in ended.stderr and ended.stderr.count("\n") == 1


def test_row_meets_its_goal_by_the_median_ratio_or_by_its_own_figure():
    spread = Spread.of([1.0, 5.0, 3.0])
    assert spread == (2.0, 3.0, 4.0) and Spread.of([2.0]) == (2.0, 2.0, 2.0)
    assert Row("a", 9.0, "ms", "b", 1.0, spread, Goal(">=", 3)).met
    assert not Row("a", 9.0, "ms", "b", 1.0, spread, Goal(">=", 3.1)).met
    assert Row("a", 0.5, "N", goal=Goal("<=", 0.5)).met and not Row("a", 0.6, "N", goal=Goal("<=", 0.5)).met
    assert Row("a", 1.0, "ms").met is None
