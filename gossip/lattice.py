"""Numbers that two ranks know nearly alike, in four bits each: by their place on a lattice, modulo sixteen.

Ranks that meet often differ little from each other, beside how large their weights are. So each number is rounded to
the nearest multiple of a spacing d, number k of them, and only k mod 16 travels: of all the multiples with that rest,
the receiver takes the one nearest to its own number, and finds k as long as the two differ by less than 7.5 d. Both
ends choose d for each block from a few samples of both, so that this reaches five to six times their root mean square
distance. A tag of each block, over more bits of k than travel, tells where it was not enough: one block in hundreds.

Blocks are rotated before, at random but alike at both ends, so that what two ranks differ by spreads over a block
evenly: no number is far off while the others are near. Rounding adds d^2 / 12 to each, a twentieth of the difference's
own energy. Two ranks that take the mean move by half the difference of what both were rounded to, so that their sum
stays: an error lies between them, where the next meetings even it out, and none in what they have in common.

After "New Bounds for Distributed Mean Estimation and Variance Reduction", arXiv 2002.09268 (rotated lattices), and
"Moniqua", arXiv 2002.11787 (remainders between neighbours).
"""

import functools
import math
from ctypes import CDLL, c_int64, c_void_p
from pathlib import Path

import numpy as np
import torch
from blake3 import blake3
from torch import Tensor

from runtime.native import load_or_warn

BLOCK = 8192  # numbers that are rotated together and share a spacing
SAMPLES = 64  # numbers of a rotated block that travel before it, in float32
TAG_BYTES = 4
_SPACING = 0.75  # over the root mean square distance: coarser is less exact, finer leaves out more blocks
LEVELS = 16
_HALF = BLOCK // 2
_SIDES = (32, 16, 16)  # of a block seen as a box, which is rotated along each of them
_FINEST = 2.0**-14  # of a spacing, as a share of the numbers' own root mean square: k stays below 2**24, exact


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "rotate": (None, c_void_p, c_int64, *[c_void_p] * 2),
        "unrotate": (None, c_void_p, c_int64, *[c_void_p] * 2),
        "encode": (None, c_void_p, c_int64, *[c_void_p] * 3),
        "decode": (None, c_void_p, c_int64, *[c_void_p] * 4),
    }
    return load_or_warn(
        Path(__file__).with_suffix(".c"), "--gossip_wire_dtype int4", "some twenty times slower", signatures
    )


def blocks_of(count: int) -> int:
    """In how many blocks `count` numbers lie."""
    return -(-count // BLOCK)


def rotate(values: Tensor) -> Tensor:
    """`values` (float32, flat, on the CPU) as rotated blocks (blocks, BLOCK); zeros fill the last one."""
    rotated = values.new_empty(blocks_of(len(values)), BLOCK)
    if kernels() is not None:
        kernels().rotate(values.data_ptr(), len(values), _signs().data_ptr(), rotated.data_ptr())
        return rotated
    rotated.view(-1)[: len(values)] = values
    rotated.view(-1)[len(values) :] = 0
    return _turn(rotated * _signs())


def unrotate(rotated: Tensor, values: Tensor) -> None:
    """Fill `values` with the numbers whose rotate() this is, and spoil it."""
    if kernels() is not None:
        kernels().unrotate(rotated.data_ptr(), len(values), _signs().data_ptr(), values.data_ptr())
    else:
        values.copy_((_turn(rotated) * _signs()).view(-1)[: len(values)])


def sketch(rotated: Tensor) -> Tensor:
    """What both ends tell each other of their blocks first: (blocks, SAMPLES) in float32."""
    return rotated[:, _sampled()]


def spacings(mine: Tensor, theirs: Tensor) -> Tensor:
    """Of each block, from both ends' sketches, in whichever order."""
    mine, theirs = (sketch.numpy().astype(np.float64) for sketch in (mine, theirs))
    apart = np.square(mine - theirs).mean(1)
    finest = (np.square(mine) + np.square(theirs)).mean(1) * _FINEST**2
    return torch.from_numpy((_SPACING * np.sqrt(np.maximum(apart, finest))).clip(min=1e-30).astype(np.float32))


def encode(rotated: Tensor, spacing: Tensor) -> Tensor:
    """What travels, two numbers a byte and a tag (blocks, BLOCK / 2 + TAG_BYTES), uint8; `rotated` becomes what the
    receiver will find."""
    packed = torch.empty(len(rotated), _HALF + TAG_BYTES, dtype=torch.uint8)
    if kernels() is not None:
        _call("encode", rotated, spacing, packed)
        return packed
    place = torch.round(rotated * (1 / spacing[:, None]))
    rotated.copy_(place * spacing[:, None])
    low = place.int().to(torch.uint8)
    packed[:, :_HALF] = low[:, :_HALF] & (LEVELS - 1) | low[:, _HALF:] << 4
    packed.numpy()[:, _HALF:] = _tags(low)
    return packed


def decode(packed: Tensor, rotated: Tensor, spacing: Tensor) -> np.ndarray:
    """The receiver's own rotated blocks become what the sender's did; returns the numbers of those that did not."""
    if kernels() is not None:
        wrong = torch.empty(len(rotated), dtype=torch.uint8)
        _call("decode", packed, spacing, rotated, wrong)
        return wrong.numpy().nonzero()[0]
    rest = torch.cat((packed[:, :_HALF] & (LEVELS - 1), packed[:, :_HALF] >> 4), dim=1).float()
    place = rest + LEVELS * torch.round((rotated * (1 / spacing[:, None]) - rest) / LEVELS)
    rotated.copy_(place * spacing[:, None])
    return (packed.numpy()[:, _HALF:] != _tags(place.int().to(torch.uint8))).any(axis=1).nonzero()[0]


def settle(values: Tensor, spacing: Tensor) -> None:
    """`values` become what a receiver takes them for; done again it changes no more than the last bits."""
    rotated = rotate(values)
    encode(rotated, spacing)
    unrotate(rotated, values)


def _tags(low: Tensor) -> np.ndarray:
    """Of each block's places, eight bits of each: the upper half of their sum times _weights(), modulo 2**64."""
    sums = (low.numpy().astype(np.uint64) * _weights()).sum(axis=1, dtype=np.uint64)
    return (sums >> np.uint64(32)).astype("<u4").view(np.uint8).reshape(-1, TAG_BYTES)


def _call(name: str, first: Tensor, spacing: Tensor, *others: Tensor) -> None:
    addresses = [tensor.data_ptr() for tensor in others]
    getattr(kernels(), name)(first.data_ptr(), len(spacing), spacing.data_ptr(), _weights().ctypes.data, *addresses)


def _turn(blocks: Tensor) -> Tensor:
    """Each block times the Hadamard matrix of its size."""
    first, second, third = _SIDES
    turned = blocks.view(-1, third) @ _hadamard(third)
    turned = _hadamard(second) @ turned.view(-1, second, third)
    return (_hadamard(first) @ turned.view(-1, first, second * third)).view(blocks.shape)


@functools.cache
def _hadamard(size: int) -> Tensor:
    matrix = torch.ones(1, 1)
    while len(matrix) < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    return matrix


@functools.cache
def _signs() -> Tensor:
    """1 or -1 for each number of a block, over the root of their number: with it a rotation keeps lengths."""
    bits = np.unpackbits(_drawn("signs", BLOCK // 8))
    return torch.from_numpy((bits * 2.0 - 1).astype(np.float32)) / math.sqrt(BLOCK)


@functools.cache
def _weights() -> np.ndarray:
    """By which a block's places are summed up to its tag: odd, so that no place is lost."""
    return _drawn("tags", 8 * BLOCK).view("<u8").astype(np.uint64) | np.uint64(1)


@functools.cache
def _sampled() -> Tensor:
    return torch.from_numpy(_drawn("samples", 8 * BLOCK).view("<u8").argsort()[:SAMPLES])


def _drawn(what: str, nbytes: int) -> np.ndarray:
    """Bytes as if drawn at random, the same at all ends: of whichever versions of torch and numpy."""
    return np.frombuffer(blake3(f"gruboros lattice {what}".encode()).digest(nbytes), np.uint8)
