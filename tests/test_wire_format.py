"""Numbers as float32, as bfloat16 and as remainders: what arrives, and how many bytes it took."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch

from gossip import state_native
from gossip.lattice import rotate, sketch, spacings
from gossip.state import Rule, Schema, StateBuffer
from gossip.wire_format import Bfloat16Wire, RemainderWire, sketch_bytes, wire_format

PIECE = 4096


def piece_of(values):
    return memoryview(values.view(torch.uint8).numpy())


def travelled(name, values, pieces):
    """`values` after a way through two ends, in `pieces` of them, and the bytes that travelled."""
    sender, receiver = wire_format(name, PIECE), wire_format(name, PIECE)
    arrived, moved = torch.zeros_like(values), 0
    for outgoing, incoming in zip(values.split(pieces), arrived.split(pieces), strict=True):
        packed = sender.pack(0, piece_of(outgoing))
        space = receiver.space(piece_of(incoming))
        assert len(packed) == len(space) == sender.size(4 * len(outgoing))
        space[:] = packed
        receiver.unpack(0, piece_of(incoming))
        moved += len(packed)
    return arrived, moved


@pytest.mark.parametrize("pieces", [1024, 1000, 16])
def test_fp32_travels_unchanged(pieces):
    values = torch.randn(2048)
    arrived, moved = travelled("fp32", values, pieces)
    assert torch.equal(arrived, values) and moved == 4 * 2048


@pytest.mark.parametrize("pieces", [1024, 1000, 16])
def test_bf16_travels_rounded_to_the_nearest_in_half_the_bytes(pieces):
    values = torch.randn(2048) * torch.logspace(-20, 20, 2048)
    arrived, moved = travelled("bf16", values, pieces)
    assert torch.equal(arrived, values.bfloat16().float()) and moved == 2 * 2048
    assert ((arrived - values).abs() <= values.abs() * 2**-8).all()


def test_bf16_sends_and_receives_at_once_without_mixing():
    end = wire_format("bf16", PIECE)
    mine, theirs = torch.full((64,), 1.0), torch.full((64,), 2.0)
    arrived = torch.zeros(64)
    packed = end.pack(0, piece_of(mine))
    space = end.space(piece_of(arrived))
    space[:] = wire_format("bf16", PIECE).pack(0, piece_of(theirs))
    assert bytes(packed) == bytes(memoryview(mine.bfloat16().view(torch.uint8).numpy()))
    end.unpack(0, piece_of(arrived))
    assert torch.equal(arrived, theirs)


@pytest.mark.parametrize("kernel", ["native", "torch"])
def test_bf16_is_torchs_whoever_rounds(monkeypatch, kernel):
    """Every exponent and sign, ties, numbers too small or too large for a rounding that stays finite, NaN."""
    if kernel == "torch":
        monkeypatch.setattr(state_native, "kernels", lambda: None)
    upper = torch.arange(2**16, dtype=torch.int32) << 16
    for lower in (0, 1, 0x7FFF, 0x8000, 0x8001, 0xFFFF):
        values = (upper | lower).view(torch.float32)
        arrived, _ = travelled("bf16", values, 1024)
        assert torch.equal(arrived.isnan(), values.isnan())
        known = ~values.isnan()
        assert torch.equal(arrived[known], values.bfloat16().float()[known])


def test_bf16_keeps_what_is_not_finite_for_the_receiver_to_find():
    arrived, _ = travelled("bf16", torch.tensor([float("nan"), float("inf"), 3.4e38, 0.0]), 4)
    assert arrived.isfinite().tolist() == [False, False, False, True]


@pytest.mark.parametrize("count", [16, 8192, 5 * 8192, 2 * 8192 + 4112])
@pytest.mark.parametrize("settle", [False, True])
def test_int4_travels_in_four_bits_between_ends_that_are_alike(count, settle):
    """In pieces of two blocks; both directions at once."""
    piece_bytes = 4 * 2 * 8192
    torch.manual_seed(0)
    one = torch.randn(count)
    other = one + torch.randn(count) * 0.01
    spacing = spacings(*(sketch(rotate(values)) for values in (one, other)))
    exact = [one.clone(), other.clone()]
    ends = [RemainderWire(piece_of(values), spacing, piece_bytes, settle) for values in (one, other)]
    arrived, moved = [torch.zeros(count), torch.zeros(count)], 0
    for start in range(0, 4 * count, piece_bytes):
        here = slice(start, start + piece_bytes)
        packed = [end.pack(start, piece_of(values)[here]) for end, values in zip(ends, (one, other), strict=True)]
        for end, travelling, values in zip(ends[::-1], packed, arrived[::-1], strict=True):
            piece = piece_of(values)[here]
            end.space(piece)[:] = travelling
            end.unpack(start, piece)
            moved += len(travelling)
    assert moved == 2 * ends[0].size(4 * count) == 2 * -(-count // 8192) * 4100
    for values, kept, found in zip(exact, (one, other), arrived[::-1], strict=True):
        assert 0 < (found - values).norm() < 0.5 * (exact[0] - exact[1]).norm()
        assert torch.equal(kept, found if settle else values)
    assert sketch_bytes(4 * count) == 4 * sketch(rotate(one)).numel()


def test_int4_leaves_out_what_is_too_far_apart():
    one = torch.zeros(3 * 8192)
    other = one.clone()
    other[8192:16384] = torch.randn(8192)
    sender, receiver = (
        RemainderWire(piece_of(values), torch.full((3,), 0.01), 3 * 4 * 8192) for values in (one, other)
    )
    arrived = torch.full((3 * 8192,), 7.0)
    receiver.space(piece_of(arrived))[:] = sender.pack(0, piece_of(one))
    receiver.unpack(0, piece_of(arrived))
    assert torch.equal(arrived, other) and receiver.left_out() == pytest.approx(1 / 3) and sender.left_out() == 0


@pytest.mark.parametrize("sent_first", [False, True])
def test_int4_moves_nothing_in_a_block_that_it_leaves_out_of_a_mean(sent_first):
    torch.manual_seed(0)
    one, other = torch.randn(2, 8192)
    form = RemainderWire(piece_of(one), torch.full((1,), 0.1), 4 * 8192, settle=True)
    peer = RemainderWire(piece_of(other), torch.full((1,), 0.1), 4 * 8192, settle=True)
    arrived = torch.zeros(8192)
    if sent_first:
        form.pack(0, piece_of(one))
    form.space(piece_of(arrived))[:] = peer.pack(0, piece_of(other))
    form.unpack(0, piece_of(arrived))
    if not sent_first:
        form.pack(0, piece_of(one))
    assert form.left_out() == 1 and torch.allclose(arrived, one, atol=1e-5)


def test_int4_leaves_no_rounding_between_tensors():
    """It would travel the next time, and be rounded again."""
    live = {"y": torch.randn(17), "z": torch.randn(17)}
    buffer = StateBuffer(Schema.of(live, dict.fromkeys(live, Rule.WEIGHT), {}))
    buffer.copy_from(live)
    clean = bytes(buffer.bytes)
    RemainderWire(buffer.bytes, torch.ones(1), 4 * 8192, settle=True).pack(0, buffer.bytes)
    assert bytes(buffer.bytes) != clean
    buffer.copy_from(live)
    assert bytes(buffer.bytes) == clean


THREADS = """
import os
import torch
from gossip.lattice import spacings
from gossip.wire_format import RemainderWire, Bfloat16Wire, sketch_of
torch.set_num_threads(4)
one, other, arrived = (memoryview(torch.randn(131072).view(torch.uint8).numpy()) for _ in range(3))
def pass_on(sender, receiver):
    receiver.space(arrived)[:] = sender.pack(0, one)
    receiver.unpack(0, arrived)
before = len(os.listdir("/proc/self/task"))
pass_on(Bfloat16Wire(len(one)), Bfloat16Wire(len(one)))
spacing = spacings(sketch_of(one), sketch_of(other))
pass_on(*(RemainderWire(own, spacing, len(one), settle=True) for own in (one, other)))
after = len(os.listdir("/proc/self/task"))
torch.randn(131072).bfloat16()  # so that it is known to start some where it may
print(before, after, len(os.listdir("/proc/self/task")))
"""


def test_rounding_for_the_wire_starts_no_threads():
    """The network thread would wait for them, and they take training's cores."""
    if state_native.kernels() is None:
        pytest.skip("there is no C compiler here")
    root = Path(__file__).parent.parent
    done = subprocess.run([sys.executable, "-c", THREADS], cwd=root, capture_output=True, text=True, check=True)
    before, after, with_torch = map(int, done.stdout.split())
    assert before == after < with_torch


def test_a_whole_state_travels_as_bfloat16_beside_int4():
    assert isinstance(wire_format("int4", PIECE), Bfloat16Wire)
