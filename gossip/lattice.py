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

import torch
from blake3 import blake3
from torch import Tensor

from runtime.native import load_or_warn

BLOCK = 8192  # numbers that are rotated together and share a spacing
SAMPLES = 64  # numbers of a rotated block that travel before it, in float32
TAG_BYTES = 4
_SPACING = 0.75  # over the root mean square distance: coarser is less exact, finer leaves out more blocks
LEVELS = 16
_SIDES = (32, 16, 16)  # of a block seen as a box, which is rotated along each of them
_FINEST = 2.0**-14  # of a spacing, as a share of the numbers' own root mean square: k stays below 2**24, exact


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    library = load_or_warn(Path(__file__).with_suffix(".c"), "--gossip_wire_dtype int4", "some twenty times slower")
    if library is None:
        return None
    library.rotate.argtypes = library.unrotate.argtypes = [c_void_p, c_int64, c_void_p, c_void_p]
    library.encode.argtypes = library.decode.argtypes = [c_void_p, c_int64] + [c_void_p] * 3
    for name in ("rotate", "unrotate", "encode", "decode"):
        getattr(library, name).restype = None
    return library


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
    mine, theirs = mine.double(), theirs.double()
    apart = (mine - theirs).square().mean(1)
    finest = (mine.square() + theirs.square()).mean(1) * _FINEST**2
    return (_SPACING * torch.maximum(apart, finest).sqrt()).clamp(min=1e-30).float()


def encode(rotated: Tensor, spacing: Tensor) -> Tensor:
    """What travels, two numbers a byte and a tag (blocks, BLOCK / 2 + TAG_BYTES), uint8; `rotated` becomes what the
    receiver will find."""
    half = BLOCK // 2
    packed = torch.empty(len(rotated), half, dtype=torch.uint8)
    tagged = torch.empty(len(rotated), BLOCK, dtype=torch.uint8)
    if kernels() is not None:
        _call("encode", rotated, spacing, packed, tagged)
    else:
        place = torch.round(rotated * (1 / spacing[:, None]))
        rotated.copy_(place * spacing[:, None])
        tagged.copy_(place.int())
        packed.copy_(tagged[:, :half] & (LEVELS - 1) | tagged[:, half:] << 4)
    return torch.cat((packed, _tags(tagged)), dim=1)


def decode(travelled: Tensor, rotated: Tensor, spacing: Tensor) -> Tensor:
    """The receiver's own rotated blocks become what the sender's did; returns which of them did not (blocks), bool."""
    packed, tags = travelled[:, : BLOCK // 2].contiguous(), travelled[:, BLOCK // 2 :]
    tagged = torch.empty(len(rotated), BLOCK, dtype=torch.uint8)
    if kernels() is not None:
        _call("decode", packed, spacing, rotated, tagged)
    else:
        rest = torch.cat((packed & (LEVELS - 1), packed >> 4), dim=1).float()
        place = rest + LEVELS * torch.round((rotated * (1 / spacing[:, None]) - rest) / LEVELS)
        rotated.copy_(place * spacing[:, None])
        tagged.copy_(place.int())
    return (_tags(tagged) != tags).any(dim=1)


def _tags(tagged: Tensor) -> Tensor:
    digests = [blake3(memoryview(block.numpy())).digest(TAG_BYTES) for block in tagged]
    return torch.frombuffer(bytearray(b"".join(digests)), dtype=torch.uint8).view(len(tagged), TAG_BYTES)


def _call(name: str, first: Tensor, spacing: Tensor, *others: Tensor) -> None:
    addresses = [tensor.data_ptr() for tensor in (spacing, *others)]
    getattr(kernels(), name)(first.data_ptr(), len(spacing), *addresses)


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
    signs = torch.randint(2, (BLOCK,), generator=torch.Generator().manual_seed(1)) * 2.0 - 1
    return signs / math.sqrt(BLOCK)


@functools.cache
def _sampled() -> Tensor:
    return torch.randperm(BLOCK, generator=torch.Generator().manual_seed(2))[:SAMPLES]
