"""The recurrence: every backend against a float64 step-by-step reference."""

import math

import pytest
import torch
from torch.utils.checkpoint import checkpoint

from mingru import scan_logspace, scan_native, scan_reference, scan_tiled
from mingru.minGRU import minGRU
from mingru.scan import BACKENDS, scan
from runtime.errors import UserError

SHAPES = [(2, 200, 500), (1, 64, 8), (3, 65, 7), (2, 63, 16), (4, 1, 32), (5, 2, 1)]
TOLERANCE = 1e-5  # of the largest magnitude in the tensor
LINEAR_SPACE = ("native", "reference", "tiled")


def name(shape):
    return "B{}-T{}-D{}".format(*shape)


def make_inputs(shape, gates="normal", prev="given", resets=False, dtype=torch.float32):
    """projected, prev_hidden, reset and the two output gradients, from a fixed seed."""
    B, T, E = shape
    torch.manual_seed(T)
    x, k = torch.randn(B, T, E), torch.randn(B, T, E)
    if gates == "extreme":  # half of them far out, where sigmoid saturates and exp overflows
        k = torch.where(torch.rand(B, T, E) < 0.5, k, torch.empty(B, T, E).uniform_(-200, 200))
        x = x * 10
    prev_hidden = {"none": None, "zero": torch.zeros(B, E), "given": torch.rand(B, E) * 3}[prev]
    reset = torch.rand(B, T) < 0.02 if resets else None
    grads = torch.randn(B, T, E).to(dtype), torch.randn(B, E)
    return torch.cat((x, k), dim=-1).to(dtype), prev_hidden, reset, grads


def run(function, projected, prev_hidden, reset, grads, dtype=None):
    """Outputs and gradients of `function`, computed in `dtype`."""
    projected = projected.to(dtype or projected.dtype).detach().requires_grad_()
    if prev_hidden is not None:
        prev_hidden = prev_hidden.to(dtype or prev_hidden.dtype).detach().requires_grad_()
    h, last = function(projected, prev_hidden, reset)
    torch.autograd.backward((h, last), (grads[0].to(h.dtype), grads[1].to(last.dtype)))
    found = {"h": h, "last": last, "grad_projected": projected.grad}
    if prev_hidden is not None:
        found["grad_prev_hidden"] = prev_hidden.grad
    return {key: value.detach() for key, value in found.items()}


def assert_close(found, expected, tolerance=TOLERANCE):
    assert found.keys() == expected.keys()
    for key in expected:
        error = (found[key].double() - expected[key]).abs().max() / expected[key].abs().max().clamp_min(1e-30)
        assert error <= tolerance, (key, float(error))


@pytest.fixture(params=LINEAR_SPACE)
def backend(request, monkeypatch):
    monkeypatch.setenv("GRUBOROS_SCAN", request.param)
    return request.param


@pytest.mark.parametrize("resets", [False, True], ids=["no-reset", "resets"])
@pytest.mark.parametrize("prev", ["none", "zero", "given"])
@pytest.mark.parametrize("gates", ["normal", "extreme"])
@pytest.mark.parametrize("shape", SHAPES, ids=name)
def test_scan_equals_float64_reference(backend, shape, gates, prev, resets):
    inputs = make_inputs(shape, gates, prev, resets)
    expected = run(scan_reference.scan, *inputs, dtype=torch.float64)
    assert_close(run(scan, *inputs), expected)


def test_scan_of_no_lanes_is_empty(backend):
    found = run(scan, *make_inputs((0, 5, 3)))
    assert found["h"].shape == (0, 5, 3) and found["last"].shape == (0, 3) == found["grad_prev_hidden"].shape


def test_scan_keeps_its_accuracy_over_16384_steps(backend):
    inputs = make_inputs((1, 16384, 16), resets=True)
    assert_close(run(scan, *inputs), run(scan_reference.scan, *inputs, dtype=torch.float64), tolerance=1e-6)


def test_scan_separates_gate_and_candidate_gradients():
    """Each half of the projection on its own scale: extreme candidates must not hide an error in the gates."""
    inputs = make_inputs((2, 300, 40))
    expected = run(scan_reference.scan, *inputs, dtype=torch.float64)["grad_projected"].chunk(2, dim=-1)
    found = run(scan, *inputs)["grad_projected"].chunk(2, dim=-1)
    for half in range(2):
        assert_close({"half": found[half]}, {"half": expected[half]})


def test_scan_follows_the_formula(backend):
    """h_1 and h_2 worked out by hand, a positive and a negative candidate."""

    def sigmoid(value):
        return 1 / (1 + math.exp(-value))

    projected = torch.tensor([[[2.0, 0.3], [-1.0, -0.7]]])
    first = (1 - sigmoid(0.3)) * 0.25 + sigmoid(0.3) * 2.5
    second = (1 - sigmoid(-0.7)) * first + sigmoid(-0.7) * sigmoid(-1.0)
    h, last = scan(projected, torch.tensor([[0.25]]))
    assert h.flatten().tolist() == pytest.approx([first, second], rel=1e-6)
    assert last.tolist() == [h[0, 1].tolist()]


def test_scan_is_exact_at_the_kink(backend):
    """g' is 1 from zero on, also at zero itself, of either sign."""
    projected = torch.tensor([[[0.0, 0.0], [-0.0, 0.0]]], requires_grad=True)
    h, _ = scan(projected)
    h[:, 1].sum().backward()
    assert projected.grad[0, :, 0].tolist() == [0.25, 0.5]


def test_scan_tiny_states_keep_their_digits(backend):
    """A gate that is nearly shut forgets by 1 - z: small numbers that a subtraction would round to zero."""
    projected = torch.cat((torch.full((1, 80, 1), -60.0), torch.full((1, 80, 1), 30.0)), dim=-1)
    h, _ = scan(projected, torch.ones(1, 1))
    expected, _ = scan_reference.scan(projected.double(), torch.ones(1, 1).double(), None)
    assert torch.allclose(h[:, :2].double(), expected[:, :2], rtol=1e-5, atol=0)


def test_scan_reset_starts_afresh(backend):
    """After a reset nothing of the past is seen, forward or backward, wherever in a tile it falls."""
    T = 200
    projected, prev, _, _ = make_inputs((2, T, 6))
    for start in (0, 1, 63, 64, 65, 128, T - 1):
        reset = torch.zeros(2, T, dtype=torch.bool)
        reset[0, start] = True
        leaf, first = projected.clone().requires_grad_(), prev.clone().requires_grad_()
        h, last = scan(leaf, first, reset)
        fresh, _ = scan(projected[:1, start:])
        assert torch.allclose(h[:1, start:], fresh, rtol=1e-6, atol=1e-7)
        last[0].sum().backward()
        assert leaf.grad[0, :start].abs().sum() == 0
        assert first.grad.abs().sum() == 0
        kept, _ = scan(projected[1:], prev[1:])
        assert torch.allclose(h[1:], kept, rtol=1e-6, atol=1e-7)  # the other lane is untouched


def test_scan_continues_across_calls(backend):
    projected, prev, reset, _ = make_inputs((3, 150, 5), resets=True)
    whole, last = scan(projected, prev, reset)
    parts, state = [], prev
    for start, stop in ((0, 1), (1, 70), (70, 71), (71, 150)):
        part, state = scan(projected[:, start:stop], state, reset[:, start:stop])
        parts.append(part)
    assert torch.allclose(torch.cat(parts, dim=1), whole, rtol=1e-6, atol=1e-7)
    assert torch.allclose(state, last, rtol=1e-6, atol=1e-7)


def test_scan_accepts_any_strides(backend):
    """Time-major input and an expanded gradient, as sum() makes it."""
    projected, prev, _, _ = make_inputs((3, 100, 4))
    strided = projected.transpose(0, 1).contiguous().transpose(0, 1).requires_grad_()
    plain = projected.clone().requires_grad_()
    for leaf in (strided, plain):
        scan(leaf, prev)[0].sum().backward()
    assert torch.equal(strided.grad, plain.grad)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=str)
def test_scan_keeps_a_float32_state(backend, dtype):
    """Half-precision input: small updates add up in the state; outputs and gradients are rounded once."""
    inputs = make_inputs((2, 1000, 8), dtype=dtype)
    found, expected = run(scan, *inputs), run(scan_reference.scan, *inputs, dtype=torch.float64)
    assert found["h"].dtype == found["grad_projected"].dtype == dtype
    assert found["last"].dtype == torch.float32
    assert_close({"last": found["last"]}, {"last": expected["last"]})
    assert_close(found, expected, tolerance=1e-2)


def test_scan_computes_float64_in_float64(backend):
    inputs = make_inputs((2, 100, 4), resets=True)
    found = run(scan, *inputs, dtype=torch.float64)
    assert_close(found, run(scan_reference.scan, *inputs, dtype=torch.float64), tolerance=1e-13)


def test_scan_compiles_without_a_graph_break():
    """torch.compile takes each pass as one node: it neither unrolls the loop nor falls back."""
    compiled = torch.compile(lambda projected, prev: scan(projected, prev), backend="aot_eager", fullgraph=True)
    inputs = make_inputs((2, 130, 4))
    found, expected = run(lambda p, h, r: compiled(p, h), *inputs), run(scan, *inputs)
    assert all(torch.equal(found[key], expected[key]) for key in expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("operators", [scan_native, scan_tiled], ids=["native", "tiled"])
def test_scan_operators_keep_torchs_rules(operators, dtype):
    """Schemas, fake tensors and autograd registration, as torch.library.opcheck judges them."""
    projected, prev, reset, _ = make_inputs((2, 70, 8), resets=True, dtype=dtype)
    torch.library.opcheck(operators.scan_forward, (projected.requires_grad_(), prev.requires_grad_(), reset))


@pytest.mark.parametrize("operators", [scan_native, scan_tiled], ids=["native", "tiled"])
def test_scan_says_that_it_is_differentiable_once(operators):
    projected = torch.randn(1, 5, 6, requires_grad=True)
    (gradient,) = torch.autograd.grad(operators.scan(projected, None, None)[0].sum(), projected, create_graph=True)
    with pytest.raises(RuntimeError, match="scan is differentiable once"):
        gradient.square().sum().backward()


@pytest.mark.parametrize("operators", [scan_native, scan_tiled], ids=["native", "tiled"])
def test_scan_of_tensors_without_memory_is_the_operators(operators):
    shapes = operators.scan(torch.empty(2, 5, 8, device="meta"), None, None)
    assert [tuple(tensor.shape) for tensor in shapes] == [(2, 5, 4), (2, 4)] and shapes[0].is_meta


def test_scan_works_under_autocast_and_gradient_checkpointing(backend):
    torch.manual_seed(0)
    layer, x_BTD = minGRU(16, expansion_factor=1.5), torch.randn(2, 90, 16, requires_grad=True)

    def outcome(call):
        out = call(x_BTD)
        return {"out": out.detach(), "grad": torch.autograd.grad(out.square().sum(), x_BTD)[0]}

    exact = outcome(layer)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        plain = outcome(layer)
        checkpointed = outcome(lambda x_BTD: checkpoint(layer, x_BTD, use_reentrant=False))
    assert plain["out"].dtype == torch.bfloat16
    assert all(torch.equal(plain[key], checkpointed[key]) for key in plain)
    assert_close(plain, {key: value.double() for key, value in exact.items()}, tolerance=0.1)


def test_scan_hands_on_what_is_not_finite(backend):
    """A NaN of one channel stays in that channel from there on; infinite gates open and shut whole."""
    projected = torch.zeros(1, 4, 6)
    projected[0, 1, 0] = math.nan  # x of channel 0
    projected[0, 2, 4] = math.nan  # k of channel 1
    projected[0, 1, 5], projected[0, 2, 5] = math.inf, -math.inf  # k of channel 2
    h, _ = scan(projected, torch.ones(1, 3))
    assert h[0, :, 0].isnan().tolist() == [False, True, True, True]
    assert h[0, :, 1].isnan().tolist() == [False, False, True, True]
    assert h[0, 1, 2] == 0.5 and h[0, 2, 2] == 0.5


def test_scan_refuses_an_unknown_backend(monkeypatch):
    monkeypatch.setenv("GRUBOROS_SCAN", "warp")
    with pytest.raises(UserError, match=r"one of reference, logspace, tiled, .*got 'warp'"):
        scan(torch.zeros(1, 2, 4))


def test_scan_refuses_a_backend_of_another_device(monkeypatch):
    monkeypatch.setenv("GRUBOROS_SCAN", "native")
    with pytest.raises(UserError, match="GRUBOROS_SCAN=native a cpu device, got meta"):
        scan(torch.zeros(1, 2, 4, device="meta"))


@pytest.mark.parametrize("prev", ["none", "given"])
def test_scan_in_log_space_computes_the_same_function(monkeypatch, prev):
    """To what its method allows: the error grows with time."""
    monkeypatch.setenv("GRUBOROS_SCAN", "logspace")
    inputs = make_inputs((2, 60, 9), prev=prev)
    assert_close(run(scan, *inputs), run(scan_reference.scan, *inputs, dtype=torch.float64), tolerance=1e-3)
    found = run(scan, *inputs, dtype=torch.float64)
    assert_close(found, run(scan_reference.scan, *inputs, dtype=torch.float64), tolerance=1e-12)


def test_scan_in_log_space_starts_from_zero_but_for_the_gradient_to_it():
    projected, _, _, grads = make_inputs((2, 60, 9))
    found = run(scan_logspace.scan, projected, torch.zeros(2, 9), None, grads)
    assert not found.pop("grad_prev_hidden").isfinite().any()
    assert_close(found, {k: v.double() for k, v in run(scan, projected, None, None, grads).items()}, tolerance=1e-3)


def test_scan_in_log_space_refuses_a_reset():
    with pytest.raises(UserError, match="cannot represent a reset"):
        scan_logspace.scan(torch.zeros(1, 3, 4), None, torch.tensor([[False, True, False]]))


def test_scan_uses_the_chosen_backend(monkeypatch):
    monkeypatch.setitem(BACKENDS, "mock", lambda projected, prev, reset: ("mine", None))
    monkeypatch.setenv("GRUBOROS_SCAN", "mock")
    assert scan(torch.zeros(1, 2, 4))[0] == "mine"
