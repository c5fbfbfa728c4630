"""`python -m bench`, small: every benchmark runs and says what it measured."""

import json
import math
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from bench.__main__ import CPU_ONLY, NAMES, main
from bench.speed import gpu_peers
from bench.speed.timing import Goal, Row, Setting, Spread, Turns
from bench.speed.training import _against
from runtime.errors import UserError

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
    "convolution": [("2 x 32 x 16, 4 taps, forward + backward", "torch's conv1d"),
                    ("2 x 32 x 16, 4 taps, forward + backward", "copy of its bytes"),
                    ("a step of dim 16 depth 2 B2 T32 bf16, 4 taps", "a step without")],
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
        assert told["whole"]
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


def test_bench_writes_each_row_as_it_comes(tmp_path, monkeypatch):
    def measure(setting):
        yield Row("first", 1.0, "ms")
        assert [row["case"] for row in json.loads((tmp_path / "registry.json").read_text())["rows"]] == ["first"]
        raise MemoryError("of the second")

    monkeypatch.setattr("bench.speed.registry.measure", measure)
    monkeypatch.setattr("bench.__main__.keep_freed_memory", lambda: None)  # pytest's own process goes on
    with pytest.raises(MemoryError):
        main(["registry", "--output", str(tmp_path)])
    told = json.loads((tmp_path / "registry.json").read_text())
    assert [row["case"] for row in told["rows"]] == ["first"] and not told["whole"]


def test_bench_quick_figures_are_written_only_where_it_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr("bench.__main__.RESULTS", tmp_path)
    monkeypatch.setattr("bench.speed.registry.measure", lambda setting: iter([Row("a", 1.0, "ms")]))
    monkeypatch.setattr("bench.__main__.keep_freed_memory", lambda: None)
    assert main(["registry", "--quick"]) == 0 and not list(tmp_path.iterdir())
    assert main(["registry"]) == 0 and [path.name for path in tmp_path.iterdir()] == ["registry.json"]


@pytest.mark.parametrize("flags", [["--cuda"], ["--rocm"], ["--cuda", "--rocm"]], ids=" ".join)
def test_bench_refuses_a_gpu_that_is_not_here(flags):
    if torch.cuda.is_available():
        pytest.skip("here is one")
    with pytest.raises(UserError, match="one device" if len(flags) > 1 else f"device for {flags[0]}"):
        main(["registry", *flags])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_bench_measures_on_a_gpu(tmp_path):
    flag = "--rocm" if torch.version.hip else "--cuda"
    ended = run_bench("--quick", flag, "--output", str(tmp_path))
    assert ended.returncode == 0, ended.stderr
    for name in set(NAMES) - set(CPU_ONLY):
        told = json.loads((tmp_path / f"{name}_{flag[2:]}.json").read_text())
        assert told["whole"] and told["device"].startswith("cuda") and told["rows"]
        assert all(math.isfinite(row["ours"]) for row in told["rows"])


class SimulatedGPU(Setting):
    """Calls return at once, and their work is done where the device is waited for; by a clock of its own."""

    now = queued = 0.0

    def synchronize(self):
        type(self).now, type(self).queued = self.now + self.queued, 0.0

    def launch(self, seconds):
        type(self).now += 1e-5
        type(self).queued += seconds


@pytest.mark.parametrize("quick", [False, True])
def test_a_turn_on_a_gpu_is_as_many_calls_as_take_20_ms(monkeypatch, quick):
    gpu = SimulatedGPU(torch.device("cuda"), rounds=3, quick=quick)
    monkeypatch.setattr(time, "perf_counter", lambda: gpu.now)
    made = {"short": 0, "long": 0}

    def form(name, seconds):
        made[name] += 1
        gpu.launch(seconds)

    turns = Turns(gpu, {"short": lambda: form("short", 1e-3), "long": lambda: form("long", 0.5)}, rounds=9)
    rounds = 2 if quick else 3
    assert turns.seconds["short"] == pytest.approx([1e-3 + 1e-5] * rounds)
    assert turns.seconds["long"] == pytest.approx([0.5 + 1e-5] * rounds)
    assert made["short"] >= (rounds if quick else 20 * rounds) and made["long"] <= rounds + 2


@pytest.fixture
def installed(tmp_path, monkeypatch):
    """Makes packages of the names and sources that it is given importable, and lets them be forgotten again."""
    gpu_peers._accelerated_scan.cache_clear()
    before = set(sys.modules)

    def install(**sources):
        for name, source in sources.items():
            path = tmp_path.joinpath(*name.split("__")).with_suffix(".py")
            path.parent.mkdir(parents=True, exist_ok=True)
            path.parent.joinpath("__init__.py").touch()
            path.write_text(source)

    monkeypatch.syspath_prepend(tmp_path)
    yield install
    gpu_peers._accelerated_scan.cache_clear()
    for name in set(sys.modules) - before:
        if name.startswith(("fla", "mamba_ssm", "accelerated_scan")):
            del sys.modules[name]


FLA = "HGRNConfig = HGRNForCausalLM = MambaConfig = MambaForCausalLM = None"


def test_mamba_is_a_peer_only_beside_its_own_kernels(installed):
    installed(fla__models=FLA)
    assert set(gpu_peers.models(1000, 256)) == {"fla HGRN"}
    installed(mamba_ssm__ops="")
    assert set(gpu_peers.models(1000, 256)) == {"fla HGRN", "fla Mamba"}


def test_accelerated_scan_that_cannot_be_compiled_is_left_out_and_said_once(installed, capsys):
    installed(accelerated_scan__warp="raise OSError('CUDA_HOME environment variable is not set.\\nSet it')")
    for _ in range(2):
        assert gpu_peers.recurrences(torch.zeros(1, 2, 4), torch.zeros(1, 2, 2)) == {}
    said = capsys.readouterr().err
    assert said == "accelerated-scan is left out: CUDA_HOME environment variable is not set.\n"


def test_a_peer_whose_step_does_not_fit_is_told_of_and_the_rest_goes_on():
    setting = Setting(torch.device("cpu"), quick=True)

    def make(lanes):
        def step():
            if lanes > most:
                raise torch.OutOfMemoryError("no more")

        return step

    for most, against in ((2, "peer"), (1, "peer"), (0, "peer: out of memory with one lane")):
        row = _against("case", Spread(1.0, 2.0, 3.0), "peer", make, 64, setting)
        assert row.ours == 2.0 and row.against == against and (row.theirs is None) == (most == 0)


def test_row_meets_its_goal_by_the_median_ratio_or_by_its_own_figure():
    spread = Spread.of([1.0, 5.0, 3.0])
    assert spread == (2.0, 3.0, 4.0) and Spread.of([2.0]) == (2.0, 2.0, 2.0)
    assert Row("a", 9.0, "ms", "b", 1.0, spread, Goal(">=", 3)).met
    assert not Row("a", 9.0, "ms", "b", 1.0, spread, Goal(">=", 3.1)).met
    assert Row("a", 0.5, "N", goal=Goal("<=", 0.5)).met and not Row("a", 0.6, "N", goal=Goal("<=", 0.5)).met
    assert Row("a", 1.0, "ms").met is None
