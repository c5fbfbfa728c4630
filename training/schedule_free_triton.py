"""The step of training/schedule_free.c as a Triton kernel: one pass over memory, one launch a tensor."""

import triton
import triton.language as tl


@triton.jit
def step(
    y, z, v, gradient, count, beta2, one_minus_beta2, bias_correction2, eps, decay, pull, y_rate, z_rate,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """Update y, z and v, float32 and contiguous, of `count` elements."""
    place = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    inside = place < count
    d, here = tl.load(gradient + place, mask=inside, other=0.0), tl.load(y + place, mask=inside, other=0.0)
    base = tl.load(z + place, mask=inside, other=0.0)
    second = beta2 * tl.load(v + place, mask=inside, other=0.0) + one_minus_beta2 * d * d
    update = d / (tl.sqrt(second / bias_correction2) + eps) + decay * here
    tl.store(v + place, second, mask=inside)
    tl.store(y + place, here + pull * (base - here) - y_rate * update, mask=inside)
    tl.store(z + place, base - z_rate * update, mask=inside)
