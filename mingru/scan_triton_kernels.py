"""The Triton kernels of mingru.scan_triton, which says what they compute and in which order; imported where they run.

A program owns BE channels of one lane and walks through its segment of time in tiles of W * S steps. Within a tile, row
(w, s) is the step w * S + s: w runs over the program's warps, s over registers. So each thread scans S steps of its own
channels without talking to anyone; then W aggregates are scanned across the warps, and the state that comes in at each
(`start`) is added to what was found locally. The rows of the next tile are loaded meanwhile. A step beyond the segment
reads k as minus infinity: its gate is shut, and it changes nothing.

What comes into a segment is folded from the aggregates (decay, rest) of those before it: state = decay * state + rest.
Offsets are 64-bit from lane to lane and tile to tile, 32-bit within a tile.
"""

import triton
import triton.language as tl


@triton.jit
def _combine(decay_1, rest_1, decay_2, rest_2):
    return decay_1 * decay_2, decay_2 * rest_1 + rest_2


@triton.jit
def _gates(x, k):
    """z, keep = 1 - z, g(x) and g'(x): from exp(-|k|) and exp(-|x|), with one division for both."""
    u, v = tl.exp(-tl.abs(k)), tl.exp(-tl.abs(x))
    shared = 1.0 / ((1.0 + u) * (1.0 + v))
    large = shared * (1.0 + v)
    small = u * large
    high = shared * (1.0 + u)
    low = v * high
    z, keep = tl.where(k >= 0, large, small), tl.where(k >= 0, small, large)
    return z, keep, tl.where(x >= 0, x + 0.5, low), tl.where(x >= 0, 1.0, low * high)


@triton.jit
def _alive(keep, reset, position, inside, HAS_RESET: tl.constexpr):
    """keep, and 0 where the step starts afresh."""
    if HAS_RESET:
        fresh = tl.load(reset + position, mask=inside, other=0)
        keep = tl.where(fresh != 0, 0.0, keep)
    return keep


@triton.jit
def _combine_both(
    before_decay_1, before_rest_1, decay_1, rest_1, before_decay_2, before_rest_2, decay_2, rest_2
):  # fmt: skip
    """_combine of all up to here, and of all before here: an inclusive and an exclusive scan in one."""
    before_decay, before_rest = _combine(decay_1, rest_1, before_decay_2, before_rest_2)
    decay, rest = _combine(decay_1, rest_1, decay_2, rest_2)
    return before_decay, before_rest, decay, rest


@triton.jit
def _start_of_each_warp(decay, rest, carry, W: tl.constexpr, BE: tl.constexpr):
    """The state that comes into each of the W runs of steps (W, BE), and the one after the last (1, BE)."""
    w = tl.arange(0, W)[:, None]
    none, nothing = tl.full([W, BE], 1.0, tl.float32), tl.zeros([W, BE], tl.float32)
    before_decay, before_rest, decay, rest = tl.associative_scan((none, nothing, decay, rest), 0, _combine_both)
    end = tl.sum(tl.where(w == W - 1, decay * carry + rest, 0.0), 0, keep_dims=True)
    return before_decay * carry + before_rest, end


@triton.jit
def _forward_rows(projected, lane, first_step, stop, T, E, e, W: tl.constexpr, S: tl.constexpr):
    """x and k of the S rows of the lane's tile that starts at first_step."""
    w = tl.arange(0, W)[:, None]
    base = projected + (lane * T + first_step) * (2 * E)
    xs, ks = (), ()
    for s in tl.static_range(S):
        inside = (first_step + w * S + s < stop) & (e < E)
        offset = (w * S + s) * (2 * E) + e
        xs += (tl.load(base + offset, mask=inside, other=0.0),)
        ks += (tl.load(base + offset + E, mask=inside, other=float("-inf")),)
    return xs, ks


@triton.jit
def forward(
    projected, first, reset, decays, rests, h, last, T, E, segment_steps, segments,
    HAS_FIRST: tl.constexpr, HAS_RESET: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """h (B, T, E) and its last step (B, E); decays, rests (B, segments - 1, E): of all segments but the last."""
    blocks = tl.cdiv(E, BE)
    lane = (tl.program_id(0) // blocks // segments).to(tl.int64)
    segment = tl.program_id(0) // blocks % segments
    e = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)[None, :]
    w = tl.arange(0, W)[:, None]
    carry = tl.zeros([1, BE], tl.float32)
    if HAS_FIRST:
        carry = tl.load(first + lane * E + e, mask=e < E, other=0.0)
    if decays is not None:  # one segment has none before it, and a loop's body is compiled even if it never runs
        for earlier in range(0, segment):
            place = (lane * (segments - 1) + earlier) * E + e
            decay = tl.load(decays + place, mask=e < E, other=0.0)
            carry = decay * carry + tl.load(rests + place, mask=e < E, other=0.0)

    begin = segment * segment_steps
    stop = tl.minimum(begin + segment_steps, T)
    xs, ks = _forward_rows(projected, lane, begin, stop, T, E, e, W, S)
    for step in range(begin, stop, W * S):
        next_xs, next_ks = _forward_rows(projected, lane, step + W * S, stop, T, E, e, W, S)
        decay, rest = tl.full([W, BE], 1.0, tl.float32), tl.zeros([W, BE], tl.float32)
        decays_here, rests_here = (), ()
        for s in tl.static_range(S):
            z, keep, g, _ = _gates(xs[s].to(tl.float32), ks[s].to(tl.float32))
            t = step + w * S + s
            keep = _alive(keep, reset, lane * T + t, t < stop, HAS_RESET)
            decay, rest = decay * keep, keep * rest + z * g
            decays_here += (decay,)
            rests_here += (rest,)
        start, carry = _start_of_each_warp(decay, rest, carry, W, BE)
        out = h + (lane * T + step) * E
        for s in tl.static_range(S):
            inside = (step + w * S + s < stop) & (e < E)
            state = decays_here[s] * start + rests_here[s]
            tl.store(out + (w * S + s) * E + e, state.to(h.dtype.element_ty), mask=inside)
        xs, ks = next_xs, next_ks
    if segment == segments - 1:
        tl.store(last + lane * E + e, carry, mask=e < E)


@triton.jit
def forward_aggregates(
    projected, reset, decays, rests, T, E, segment_steps, segments,
    HAS_RESET: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """decays, rests (B, segments - 1, E) of all segments but the last; here each warp has a W-th of the segment."""
    blocks = tl.cdiv(E, BE)
    lane = (tl.program_id(0) // blocks // (segments - 1)).to(tl.int64)
    segment = tl.program_id(0) // blocks % (segments - 1)
    e = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)[None, :]
    w = tl.arange(0, W)[:, None]
    run = segment_steps // W
    begin = segment * segment_steps
    decay, rest = tl.full([W, BE], 1.0, tl.float32), tl.zeros([W, BE], tl.float32)
    for step in range(0, run, S):
        base = projected + (lane * T + begin + step) * (2 * E)
        xs, ks = (), ()
        for s in tl.static_range(S):
            offset = (w * run + s).to(tl.int64) * (2 * E) + e
            xs += (tl.load(base + offset, mask=e < E, other=0.0),)
            ks += (tl.load(base + offset + E, mask=e < E, other=0.0),)
        for s in tl.static_range(S):
            z, keep, g, _ = _gates(xs[s].to(tl.float32), ks[s].to(tl.float32))
            t = begin + step + w * run + s
            keep = _alive(keep, reset, lane * T + t, t < T, HAS_RESET)
            decay, rest = decay * keep, keep * rest + z * g
    decay, rest = tl.associative_scan((decay, rest), 0, _combine)
    place = tl.broadcast_to((lane * (segments - 1) + segment) * E + e, [W, BE])
    tl.store(decays + place, decay, mask=(w == W - 1) & (e < E))
    tl.store(rests + place, rest, mask=(w == W - 1) & (e < E))


@triton.jit
def _backward_rows(grad, projected, h, lane, last_step, begin, T, E, e, W: tl.constexpr, S: tl.constexpr):
    """dh, x, k and the state before, of the S rows of the lane's tile that runs backwards from last_step."""
    w = tl.arange(0, W)[:, None]
    row = lane * T + last_step
    grad += row * E
    projected += row * (2 * E)
    h += (row - 1) * E
    grads, xs, ks, befores = (), (), (), ()
    for s in tl.static_range(S):
        t = last_step - (w * S + s)
        inside = (t >= begin) & (e < E)
        back = (w * S + s) * E
        grads += (tl.load(grad - back + e, mask=inside, other=0.0),)
        xs += (tl.load(projected - 2 * back + e, mask=inside, other=0.0),)
        ks += (tl.load(projected - 2 * back + e + E, mask=inside, other=float("-inf")),)
        befores += (tl.load(h - back + e, mask=inside & (t > 0), other=0.0),)
    return grads, xs, ks, befores


@triton.jit
def backward(
    grad, grad_last, projected, h, first, reset, decays, rests, grad_projected, grad_first, T, E, segment_steps,
    segments, HAS_FIRST: tl.constexpr, HAS_RESET: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """Gradients of projected (B, T, 2E) and of the state before the first step (B, E).

    Scanned backwards is R_t = keep_{t+1} G_{t+1}, what comes to h_t from later: R_{t-1} = keep_t (R_t + dh_t).
    decays, rests (B, segments - 1, E): of all segments but the first.
    """
    blocks = tl.cdiv(E, BE)
    lane = (tl.program_id(0) // blocks // segments).to(tl.int64)
    segment = tl.program_id(0) // blocks % segments
    e = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)[None, :]
    w = tl.arange(0, W)[:, None]
    carry = tl.load(grad_last + lane * E + e, mask=e < E, other=0.0)
    if decays is not None:
        for later in range(0, segments - 1 - segment):
            place = (lane * (segments - 1) + segments - 2 - later) * E + e
            decay = tl.load(decays + place, mask=e < E, other=0.0)
            carry = decay * carry + tl.load(rests + place, mask=e < E, other=0.0)
    before_all = tl.zeros([1, BE], tl.float32)
    if HAS_FIRST:
        before_all = tl.load(first + lane * E + e, mask=e < E, other=0.0)

    begin = segment * segment_steps
    stop = tl.minimum(begin + segment_steps, T)
    grads, xs, ks, befores = _backward_rows(grad, projected, h, lane, stop - 1, begin, T, E, e, W, S)
    for step in range(0, stop - begin, W * S):
        last_step = stop - 1 - step
        next_grads, next_xs, next_ks, next_befores = _backward_rows(
            grad, projected, h, lane, last_step - W * S, begin, T, E, e, W, S
        )
        decay, rest = tl.full([W, BE], 1.0, tl.float32), tl.zeros([W, BE], tl.float32)
        decays_here, totals_here, x_slopes, k_slopes = (), (), (), ()
        for s in tl.static_range(S):
            z, keep, g, slope = _gates(xs[s].to(tl.float32), ks[s].to(tl.float32))
            t = last_step - (w * S + s)
            before = befores[s].to(tl.float32)
            if HAS_FIRST:
                before = tl.where(t == 0, before_all, before)
            total = rest + grads[s].to(tl.float32)
            decays_here += (decay,)
            totals_here += (total,)
            x_slopes += (z * slope,)
            through = _alive(keep, reset, lane * T + t, t >= begin, HAS_RESET)
            if HAS_RESET:
                before = tl.where(through == 0.0, 0.0, before)
            k_slopes += (z * keep * (g - before),)
            decay, rest = decay * through, through * total
        start, carry = _start_of_each_warp(decay, rest, carry, W, BE)
        out = grad_projected + (lane * T + last_step) * (2 * E)
        for s in tl.static_range(S):
            inside = (last_step - (w * S + s) >= begin) & (e < E)
            total = totals_here[s] + decays_here[s] * start
            place = e - (w * S + s) * (2 * E)
            tl.store(out + place, (total * x_slopes[s]).to(grad_projected.dtype.element_ty), mask=inside)
            tl.store(out + place + E, (total * k_slopes[s]).to(grad_projected.dtype.element_ty), mask=inside)
        grads, xs, ks, befores = next_grads, next_xs, next_ks, next_befores
    if segment == 0:
        tl.store(grad_first + lane * E + e, carry, mask=e < E)


@triton.jit
def backward_aggregates(
    grad, projected, reset, decays, rests, T, E, segment_steps, segments,
    HAS_RESET: tl.constexpr, W: tl.constexpr, S: tl.constexpr, BE: tl.constexpr,
):  # fmt: skip
    """decays, rests (B, segments - 1, E) of all segments but the first, each run through from its end."""
    blocks = tl.cdiv(E, BE)
    lane = (tl.program_id(0) // blocks // (segments - 1)).to(tl.int64)
    segment = tl.program_id(0) // blocks % (segments - 1)
    e = (tl.program_id(0) % blocks) * BE + tl.arange(0, BE)[None, :]
    w = tl.arange(0, W)[:, None]
    run = segment_steps // W
    end = (segment + 2) * segment_steps - 1  # beyond T in the last segment, if that is not whole
    decay, rest = tl.full([W, BE], 1.0, tl.float32), tl.zeros([W, BE], tl.float32)
    for step in range(0, run, S):
        grads, ks = (), ()
        for s in tl.static_range(S):
            t = end - (w * run + step + s)
            inside = (t < T) & (e < E)
            row = lane * T + t
            grads += (tl.load(grad + row * E + e, mask=inside, other=0.0),)
            ks += (tl.load(projected + row * (2 * E) + E + e, mask=inside, other=float("-inf")),)
        for s in tl.static_range(S):
            t = end - (w * run + step + s)
            k = ks[s].to(tl.float32)
            u = tl.exp(-tl.abs(k))
            keep = tl.where(k >= 0, u, 1.0) / (1.0 + u)
            keep = _alive(keep, reset, lane * T + t, t < T, HAS_RESET)
            decay, rest = decay * keep, keep * (rest + grads[s].to(tl.float32))
    decay, rest = tl.associative_scan((decay, rest), 0, _combine)
    place = tl.broadcast_to((lane * (segments - 1) + segment) * E + e, [W, BE])
    tl.store(decays + place, decay, mask=(w == W - 1) & (e < E))
    tl.store(rests + place, rest, mask=(w == W - 1) & (e < E))
