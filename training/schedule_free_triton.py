"""The step of training/schedule_free.c as a Triton kernel: one pass over memory, one launch for many tensors."""

import triton
import triton.language as tl


@triton.jit
def step(
    tensors, blocks, beta2, one_minus_beta2, bias_correction2, eps, decay, pull, y_rate, z_rate, BLOCK: tl.constexpr
):
    """Update y, z and v of each tensor, float32, contiguous and at multiples of 16 bytes.

    tensors (T, 5), int64: the addresses of y, z, v and gradient, and the number of elements. blocks (programs, 2),
    int32: which tensor, and which of its blocks.
    """
    block = blocks + 2 * tl.program_id(0)
    tensor = tensors + 5 * tl.load(block)
    start = tl.load(block + 1).to(tl.int64) * BLOCK
    left = tl.load(tensor + 4) - start
    place = tl.arange(0, BLOCK)
    y, z = _floats(tensor) + start + place, _floats(tensor + 1) + start + place
    v, gradient = _floats(tensor + 2) + start + place, _floats(tensor + 3) + start + place
    if left >= BLOCK:  # without a mask, which would keep a thread from reading 16 bytes at once
        _update(y, z, v, gradient, None, beta2, one_minus_beta2, bias_correction2, eps, decay, pull, y_rate, z_rate)
    else:
        _update(
            y, z, v, gradient, place < left, beta2, one_minus_beta2, bias_correction2, eps, decay, pull, y_rate, z_rate
        )


@triton.jit
def _floats(address):
    return tl.multiple_of(tl.load(address).to(tl.pointer_type(tl.float32)), 16)


@triton.jit
def _update(y, z, v, gradient, inside, beta2, one_minus_beta2, bias_correction2, eps, decay, pull, y_rate, z_rate):
    d, here = tl.load(gradient, mask=inside), tl.load(y, mask=inside)
    base = tl.load(z, mask=inside)
    second = beta2 * tl.load(v, mask=inside) + one_minus_beta2 * d * d
    update = d / (tl.sqrt(second / bias_correction2) + eps) + decay * here
    tl.store(v, second, mask=inside)
    tl.store(y, here + pull * (base - here) - y_rate * update, mask=inside)
    tl.store(z, base - z_rate * update, mask=inside)
