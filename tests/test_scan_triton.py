"""The recurrence's Triton kernels: on a GPU when there is one, else under Triton's interpreter.

The interpreter runs one program after another and a scan an element at a time: hence the small shapes.
"""

import math
import os

import pytest
import torch

import check_gpus
from mingru import scan_reference, scan_tiled, scan_triton
from mingru.scan import scan
from runtime.errors import UserError
from tests.test_scan import assert_close, make_inputs, name, run

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
if DEVICE == "cpu":
    os.environ["TRITON_INTERPRET"] = "1"  # read when the kernels are imported, at their first use
pytest.importorskip("triton", reason="needs the package triton of requirements-dev.txt")

needs_gpu = pytest.mark.skipif(DEVICE == "cpu", reason="needs a GPU")
# warps and rows of an interpreted tile, one of each kind: cut into segments or not, the last one whole or not
PLANS = {"whole": scan_triton.Plan(1, 128, 8, 2, 16), "segments": scan_triton.Plan(3, 32, 4, 4, 8)}


def on_device(inputs):
    projected, prev_hidden, reset, grads = inputs
    move = lambda tensor: None if tensor is None else tensor.to(DEVICE)  # noqa: E731
    return move(projected), move(prev_hidden), move(reset), tuple(map(move, grads))


def run_triton(inputs):
    return {key: value.cpu() for key, value in run(scan_triton.scan, *on_device(inputs)).items()}


@pytest.fixture(params=sorted(PLANS))
def cut(request, monkeypatch):
    """Any number of steps up to 96 in one segment, or in three; on a GPU as it comes."""
    if DEVICE == "cpu":
        monkeypatch.setattr(scan_triton, "_plan", lambda h_BTE: PLANS[request.param])
    return request.param


@pytest.mark.parametrize("resets", [False, True], ids=["no-reset", "resets"])
@pytest.mark.parametrize("prev", ["none", "given"])
def test_triton_scan_equals_float64_reference(cut, prev, resets):
    """Forward, both outputs, and backward, both gradients; a number of channels and of steps that nothing divides."""
    inputs = make_inputs((2, 75, 5), "extreme", prev, resets)
    assert_close(run_triton(inputs), run(scan_reference.scan, *inputs, dtype=torch.float64))


@pytest.mark.parametrize("shape", [(1, 64, 8), (3, 2, 1), (1, 33, 4)], ids=name)
def test_triton_scan_at_odd_sizes(shape):
    inputs = make_inputs(shape, resets=True)
    assert_close(run_triton(inputs), run(scan_reference.scan, *inputs, dtype=torch.float64))


@pytest.mark.parametrize("start", [0, 31, 32, 95])
def test_triton_scan_reset_starts_afresh(cut, start):
    """At the edges of tiles and segments too, nothing of the past is seen from a reset on, forward or backward."""
    projected, prev, _, _ = make_inputs((1, 96, 4))
    reset = torch.zeros(1, 96, dtype=torch.bool)
    reset[0, start] = True
    leaf, first = projected.to(DEVICE).requires_grad_(), prev.to(DEVICE).requires_grad_()
    h, last = scan_triton.scan(leaf, first, reset.to(DEVICE))
    fresh, _ = scan_reference.scan(projected[:, start:], None, None)
    assert torch.allclose(h[:, start:].cpu(), fresh, rtol=1e-5, atol=1e-6)
    last.sum().backward()
    assert leaf.grad[:, :start].abs().sum() == 0 and first.grad.abs().sum() == 0
    assert leaf.grad[:, start:].abs().sum() > 0


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, 1e-6), (torch.bfloat16, 1e-2), (torch.float16, 1e-3)], ids=str
)
def test_triton_scan_error_does_not_grow_with_time(dtype, tolerance, monkeypatch):
    for T in (64, 512) if DEVICE == "cpu" else (64, 1024, 16384):
        if DEVICE == "cpu":
            monkeypatch.setattr(scan_triton, "_plan", lambda h_BTE, T=T: scan_triton.Plan(1, T, 2, 2, 32))
        inputs = make_inputs((1, T, 2), dtype=dtype)
        found, expected = run_triton(inputs), run(scan_reference.scan, *inputs, dtype=torch.float64)
        assert found["h"].dtype == found["grad_projected"].dtype == dtype
        assert found["last"].dtype == torch.float32
        assert_close(found, expected, tolerance)


def test_triton_scan_hands_on_what_is_not_finite(cut):
    projected = torch.zeros(1, 4, 6)
    projected[0, 1, 0] = torch.nan  # x of channel 0
    projected[0, 2, 4] = torch.nan  # k of channel 1
    projected[0, 1, 5], projected[0, 2, 5] = torch.inf, -torch.inf  # k of channel 2
    h = scan_triton.scan(projected.to(DEVICE), torch.ones(1, 3, device=DEVICE), None)[0].cpu()
    assert h[0, :, 0].isnan().tolist() == [False, True, True, True]
    assert h[0, :, 1].isnan().tolist() == [False, False, True, True]
    assert h[0, 1, 2] == 0.5 and h[0, 2, 2] == 0.5


def test_triton_operators_keep_torchs_rules():
    projected, prev, reset, _ = on_device(make_inputs((1, 6, 2), resets=True))
    torch.library.opcheck(scan_triton.scan_forward, (projected.requires_grad_(), prev.requires_grad_(), reset))


def test_triton_scan_is_chosen_by_name(monkeypatch):
    monkeypatch.setenv("GRUBOROS_SCAN", "triton")
    projected = torch.randn(1, 3, 4, device=DEVICE)
    assert torch.equal(scan(projected)[0], scan_triton.scan(projected, None, None)[0])
    if DEVICE == "cpu":
        monkeypatch.setenv("TRITON_INTERPRET", "0")
        with pytest.raises(UserError, match="GRUBOROS_SCAN=triton a cuda device, got cpu"):
            scan(projected)


@pytest.mark.parametrize("shape", [(1, 2048, 6144), (8, 2048, 1536), (1, 16384, 2048), (1, 100, 8), (64, 512, 1024)])
@pytest.mark.parametrize("multiprocessors", [1, 110, 132])
def test_plan_covers_time_and_fills_the_machine(shape, multiprocessors):
    B, T, E = shape
    cut = scan_triton.plan(*shape, multiprocessors, 32)
    assert (cut.segments - 1) * cut.steps < T <= cut.segments * cut.steps
    assert cut.steps % (cut.warps * cut.rows) == 0
    programs = B * -(-E // cut.channels) * cut.segments
    assert programs >= multiprocessors or T < 200
    assert cut.segments == 1 or filled(programs, multiprocessors) > 0.85


def filled(programs, multiprocessors):
    """The share of the waves' places that are taken."""
    waves = programs / (scan_triton.RESIDENT * multiprocessors)
    return waves / math.ceil(waves)


def test_plan_cuts_where_a_last_wave_would_be_nearly_empty():
    """384 programs: on 132 multiprocessors (396 at once) one wave, on 110 (330 at once) a full one and one of 54."""
    assert scan_triton.plan(8, 2048, 1536, 132, 32).segments == 1
    cut = scan_triton.plan(8, 2048, 1536, 110, 32)
    assert cut.segments > 1 and filled(384 * cut.segments, 110) > 0.9
    waves = math.ceil(384 * cut.segments / 330)
    assert waves * cut.steps * (1 + 4 / 9) < 2 * 2048  # steps one after another, with the most that cutting costs


@pytest.mark.parametrize(("B", "E"), [(64, 1024), (16, 1536), (2, 12288)])
def test_plan_leaves_whole_what_fills_the_machine(B, E):
    """Cutting would cost more traffic than the last wave wastes."""
    assert scan_triton.plan(B, 2048, E, 132, 32).segments == 1


def test_plan_fills_one_wave_without_more_segments_than_that_takes():
    assert scan_triton.plan(1, 2048, 6144, 132, 32).segments == 2
    assert scan_triton.plan(1, 16384, 2048, 132, 32).segments == 6


@pytest.mark.parametrize("multiprocessors", [84, 110, 132])
@pytest.mark.parametrize("warp_size", [32, 64])
def test_check_gpus_scans_as_a_whole_and_in_segments(multiprocessors, warp_size):
    whole, segments = (scan_triton.plan(*shape, multiprocessors, warp_size) for shape in check_gpus.SCANS.values())
    assert whole.segments == 1 and segments.segments > 1


@needs_gpu
@pytest.mark.parametrize("shape", [(8, 2048, 1536), (1, 2048, 6144)], ids=name)
def test_triton_scan_equals_the_tiled_one_on_a_gpu(shape):
    inputs = on_device(make_inputs(shape, resets=True))
    expected = {key: value.double() for key, value in run(scan_tiled.scan, *inputs).items()}
    assert_close(run(scan_triton.scan, *inputs), expected)
