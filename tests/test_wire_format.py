"""Numbers as float32 and as bfloat16: what arrives, and how many bytes it took."""

import pytest
import torch

from gossip.wire_format import wire_format

PIECE = 4096


def piece_of(values):
    return memoryview(values.view(torch.uint8).numpy())


def travelled(name, values, pieces):
    """`values` after a way through two ends, in `pieces` of them, and the bytes that travelled."""
    sender, receiver = wire_format(name, PIECE), wire_format(name, PIECE)
    arrived, moved = torch.zeros_like(values), 0
    for outgoing, incoming in zip(values.split(pieces), arrived.split(pieces), strict=True):
        packed = sender.pack(piece_of(outgoing))
        space = receiver.space(piece_of(incoming))
        assert len(packed) == len(space) == sender.size(4 * len(outgoing))
        space[:] = packed
        receiver.unpack(piece_of(incoming))
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
    packed = end.pack(piece_of(mine))
    space = end.space(piece_of(arrived))
    space[:] = wire_format("bf16", PIECE).pack(piece_of(theirs))
    assert bytes(packed) == bytes(memoryview(mine.bfloat16().view(torch.uint8).numpy()))
    end.unpack(piece_of(arrived))
    assert torch.equal(arrived, theirs)


def test_bf16_keeps_what_is_not_finite_for_the_receiver_to_find():
    arrived, _ = travelled("bf16", torch.tensor([float("nan"), float("inf"), 3.4e38, 0.0]), 4)
    assert arrived.isfinite().tolist() == [False, False, False, True]
