"""A rank, a population and generation on a GPU; the same bodies run on the CPU, which proves them without one."""

import os
import shutil

import pytest
import torch

import generate
import train
from mingru import scan_reference
from mingru.scan import scan
from tests.conftest import SIZES
from tests.ranks import World
from tests.test_resume import metrics_rows, newest
from tests.test_scan import assert_close, make_inputs, run

HAS_GPU = torch.cuda.is_available()
DEVICES = ["cpu", pytest.param("cuda", marks=pytest.mark.skipif(not HAS_GPU, reason="needs a GPU"))]
on_each_device = pytest.mark.parametrize("device", DEVICES)
CHOICES = {"cpu": "--cpu", "cuda": "--rocm" if torch.version.hip else "--cuda"}  # ROCm's devices are "cuda" to torch
QUIET = ["--save_every", "1000", "--val_every", "4", "--val_bytes", "512", "--log_every", "2"]


def train_on(device: str, text, output: str, *flags: str) -> None:
    command = [*SIZES, CHOICES[device], *QUIET, "--data", str(text), "--output", output, *flags]
    assert train.main(command) == 0


def losses(run_dir) -> list[float]:
    return [float(row["loss"]) for row in metrics_rows(run_dir)]


@on_each_device
@pytest.mark.parametrize("flags", [["--checkpoint_layers"], ["--dropout", "0.1"], ["--no_schedulefree"]], ids=" ".join)
@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_a_rank_trains_saves_and_resumes(run_train, tmp_path, text, device, dtype, flags):
    """To the losses that float32 has on the CPU, as far as precision allows; dropout draws otherwise on each device."""
    train_on(device, text, "run", "--train_steps", "6", "--dtype", dtype, *flags)
    assert newest(tmp_path / "run")["step"] == 6
    assert train.main(["--resume", "run", "--train_steps", "10"]) == 0
    content = newest(tmp_path / "run")
    assert content["step"] == 10
    assert all(bool(tensor.isfinite().all()) for tensor in content["training"]["tensors"].values())
    assert all(tensor.device.type == "cpu" for tensor in content["model_state_dict"].values())
    if "--dropout" not in flags:
        train_on("cpu", text, "exact", "--train_steps", "10", "--dtype", "fp32", *flags)
        tolerance = 1e-3 if dtype == "fp32" else 3e-2
        assert losses(tmp_path / "run") == pytest.approx(losses(tmp_path / "exact"), rel=tolerance)


@on_each_device
def test_a_checkpoint_generates_and_scores(run_train, tmp_path, text, device, capfdbinary):
    train_on(device, text, "run", "--train_steps", "4", "--dtype", "fp32")
    model = ["--model", str(tmp_path / "run"), "--seed", "1"]
    for dtype in ("fp32", "bf16"):
        capfdbinary.readouterr()
        asked = ["--prompt", "def ", "--max_length", "20", "--num_samples", "2", "--dtype", dtype]
        files = ["--output_file", str(tmp_path / f"{dtype}.txt")]
        assert generate.main([*model, CHOICES[device], *asked, *files]) == 0
        written = list(tmp_path.glob(f"{dtype}*.txt"))
        assert len(written) == 2 and all(len(path.read_bytes()) == 24 for path in written)
    bits = []
    (tmp_path / "few").write_bytes(text.read_bytes()[:5000])
    for where in (device, "cpu"):
        capfdbinary.readouterr()
        assert generate.main([*model[:2], CHOICES[where], "--score", str(tmp_path / "few")]) == 0
        bits.append(float(capfdbinary.readouterr().out.split()[0]))
    assert bits[0] == pytest.approx(bits[1], abs=2e-3)


@on_each_device
def test_a_compiled_rank_learns_as_a_plain_one(run_train, tmp_path, text, device):
    if device == "cpu" and shutil.which("g++") is None:
        pytest.skip("needs a C++ compiler")
    for output, flags in (("compiled", ["--compile"]), ("plain", [])):
        train_on(device, text, output, "--train_steps", "4", "--dtype", "bf16", "--depth", "1", *flags)
    assert losses(tmp_path / "compiled") == pytest.approx(losses(tmp_path / "plain"), rel=3e-2)


@on_each_device
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_the_scan_under_autocast_takes_the_projection_as_it_comes(device, dtype):
    """h in the projection's dtype, the last state in float32, and gradients as float64 has them."""
    if device == "cpu" and dtype == torch.float16:
        pytest.skip("needs a GPU: the CPU's kernel takes float32 and bfloat16")
    torch.manual_seed(0)
    layer = torch.nn.Linear(8, 48).to(device)
    with torch.autocast(device, dtype):
        projected = layer(torch.randn(2, 75, 8, device=device)).detach()
        assert projected.dtype == dtype
        _, prev, reset, grads = make_inputs((2, 75, 24), dtype=dtype, resets=True)
        inputs = (projected, prev.to(device), reset.to(device), tuple(grad.to(device) for grad in grads))
        found = {name: value.cpu() for name, value in run(scan, *inputs).items()}
    assert found["h"].dtype == dtype and found["last"].dtype == torch.float32
    exact = run(scan_reference.scan, projected.cpu(), prev, reset, grads, dtype=torch.float64)
    assert_close(found, exact, 1e-2)


@on_each_device
def test_two_ranks_that_share_a_device_merge(tmp_path, text, device):
    mixing = ["--gossip_mixing_rate", "0.2", "--gossip_merge_method", "average", "--gossip_rollback", "none"]
    world = World(tmp_path, text, 2, *mixing)
    world.command = [CHOICES[device] if word == "--cpu" else word for word in world.command]
    first = os.environ.get("CUDA_VISIBLE_DEVICES", "0").split(",")[0]  # ROCm reads it too
    try:
        for rank in range(2):
            world.start(rank, prefix=["env", f"CUDA_VISIBLE_DEVICES={first}"])
        for rank in range(2):
            world.eventually(lambda rank=rank: len(world.events(rank, "averaged", "merged")) >= 2)
        for rank in range(2):
            process = world.processes[rank]
            world.stop(rank)
            assert "Traceback" not in world.said(process)
    finally:
        world.close()
    assert {file.rank for file in world.checkpoints()} == {0, 1}
    for rank in range(2):
        tensors = newest(world.run, rank)["training"]["tensors"]
        assert all(bool(tensor.isfinite().all()) for tensor in tensors.values())
