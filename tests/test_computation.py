"""Precision, compilation and activation checkpointing: what a pass computes stays what the model defines."""

import pytest
import torch

from mingru.minLM import MinLM, ModelConfig
from runtime import devices
from runtime.errors import UserError
from training import computation
from training.checkpoint import list_checkpoints, read_own_checkpoint
from training.computation import check_compiler, choose_dtype, flops_per_byte, peak_flops, training_pass
from training.options import ComputeOptions

CPU = torch.device("cpu")


def small_model():
    torch.manual_seed(0)
    return MinLM(ModelConfig(dim=16, depth=2, conv_kernel_size=4))


def outcome(model, options):
    """Logits, and every gradient of their sum of squares, of two chunks in turn, the second with resets."""
    torch.manual_seed(1)
    ids_BT, reset_BT = torch.randint(0, 256, (2, 40), dtype=torch.uint8), torch.rand(2, 40) < 0.1
    model.zero_grad()
    forward = training_pass(model, options, CPU)
    first, state = forward(ids_BT, model.initial_state(2), None)
    second, _ = forward(ids_BT, state.detach(), reset_BT)
    (first.float().square().mean() + second.float().square().mean()).backward()
    return first.detach(), second.detach(), *(p.grad.clone() for p in model.parameters())


def test_checkpointing_layers_changes_nothing_but_memory():
    plain = outcome(small_model(), ComputeOptions())
    again = outcome(small_model(), ComputeOptions(checkpoint_layers=True))
    assert all(torch.equal(a, b) for a, b in zip(plain, again, strict=True))


def test_checkpointing_layers_keeps_their_inputs_only():
    kept = {}
    for wanted in (False, True):
        sizes = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, sizes=sizes: sizes.append(t.numel()) or t, lambda t: t):
            model = small_model()
            training_pass(model, ComputeOptions(checkpoint_layers=wanted), CPU)(torch.zeros(2, 40, dtype=torch.uint8))
        kept[wanted] = sum(sizes)
    assert kept[True] < kept[False] / 2


def test_bf16_computes_in_bfloat16_and_trains_float32():
    model = small_model()
    found, exact = outcome(model, ComputeOptions(dtype="bf16")), outcome(small_model(), ComputeOptions(dtype="fp32"))
    assert found[0].dtype == torch.bfloat16 and exact[0].dtype == torch.float32
    assert all(p.dtype == p.grad.dtype == torch.float32 for p in model.parameters())
    for a, b in zip(found, exact, strict=True):
        assert not torch.equal(a, b.to(a.dtype))
        torch.testing.assert_close(a.float(), b, rtol=0.1, atol=0.05 * float(b.abs().max()))


def test_the_model_compiles_without_a_graph_break():
    model = small_model()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    ids_BT, reset_BT = torch.randint(0, 256, (2, 20)), torch.rand(2, 20) < 0.1
    found, expected = compiled(ids_BT, None, reset_BT)[0], model(ids_BT, None, reset_BT)[0]
    torch.testing.assert_close(found, expected)
    assert list(model.state_dict()) == list(small_model().state_dict())


@pytest.mark.parametrize(
    ("flags", "expected"),
    [
        ("flags\t\t: fpu avx512f avx512_bf16 amx_bf16 amx_tile", torch.bfloat16),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile amx_int8", torch.float32),
        ("vendor_id\t: GenuineIntel\nflags\t\t: fpu avx512f avx512_bf16", torch.float32),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f avx512_bf16", torch.bfloat16),
        ("vendor_id\t: AuthenticAMD\nflags\t\t: fpu avx512f", torch.float32),
        ("Features\t: fp asimd bf16", torch.float32),
        (None, torch.float32),
    ],
    ids=[
        "with AMX",
        "without AMX",
        "Intel without AMX",
        "Zen 4",
        "Zen 3",
        "another architecture",
        "no list of processors",
    ],
)
def test_auto_is_bfloat16_on_a_processor_that_is_faster_with_it(tmp_path, monkeypatch, flags, expected):
    monkeypatch.setattr(devices, "CPUINFO", tmp_path / "cpuinfo")
    if flags is not None:
        devices.CPUINFO.write_text(f"processor\t: 0\nmodel name\t: amx_bf16 by name only\n{flags}\nbogomips\t: 1\n")
    assert choose_dtype("auto", CPU) == expected
    assert choose_dtype("bf16", CPU) == torch.bfloat16 and choose_dtype("fp32", CPU) == torch.float32
    monkeypatch.setattr(torch.backends.mkldnn, "is_available", lambda: False)
    assert choose_dtype("auto", CPU) == torch.float32


def test_a_device_that_lacks_something_is_found_out_before_the_run(monkeypatch):
    gpu = torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: False)
    monkeypatch.setattr(computation, "_name", lambda device: "Old GPU")
    assert choose_dtype("auto", gpu) == torch.float32
    with pytest.raises(UserError, match="computes in bfloat16, got Old GPU"):
        choose_dtype("bf16", gpu)
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation: True)
    assert choose_dtype("auto", gpu) == torch.bfloat16
    monkeypatch.setenv("CXX", "no-such-compiler")
    check_compiler(ComputeOptions(), CPU)
    with pytest.raises(UserError, match=r"got no no-such-compiler: .* --no_compile"):
        check_compiler(ComputeOptions(compile=True), CPU)


def test_flops_and_peaks(monkeypatch):
    dim, inner, wide = 16, 24, 64
    a_layer = dim * dim + dim * 2 * inner + inner * dim + 2 * dim * wide
    assert flops_per_byte(small_model()) == 6 * (2 * a_layer + dim * 256)
    assert peak_flops(CPU, torch.float32) is None
    names = {"NVIDIA H200": 989e12, "NVIDIA H100 PCIe": 756e12, "NVIDIA A100-SXM4-80GB": 312e12, "GTX 1": None}
    for name, expected in names.items():
        monkeypatch.setattr(computation, "_name", lambda device, name=name: name)
        assert peak_flops(torch.device("cuda"), torch.bfloat16) == expected


def test_a_run_goes_on_in_another_precision(run_train):
    run = run_train("out", "--train_steps", "3", "--dtype", "bf16", "--checkpoint_layers")
    run_train(None, "--resume", str(run), "--train_steps", "6", "--dtype", "fp32")
    content = read_own_checkpoint(list_checkpoints(run)[-1].path)
    assert content["training"]["totals"]["step"] == 6
    assert list(content["model_state_dict"]) == list(MinLM(ModelConfig.from_dict(content["model_config"])).state_dict())
