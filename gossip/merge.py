"""A peer's state becomes part of the live one: in place, all or nothing, and undone by a swap."""

import contextlib
import math
import traceback
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from types import TracebackType

import torch
from torch import Tensor

from gossip.protocol import MERGE_METHODS
from gossip.state import Rule, Schema
from gossip.state_native import can_merge, merge_piece

PIECE_ITEMS = 1024 * 1024  # merged at a time

# What a judge says of the live weights, nats per byte: a loss for each form in which they are used, always as many.
Losses = tuple[float, ...]


@dataclass(frozen=True)
class Trial:
    """A judged merge: the losses before and after it (none: not judged), and whether it was kept; distance: see
    merge()."""

    before: Losses
    after: Losses
    kept: bool
    distance: float

    def __str__(self) -> str:
        before, after = (" and ".join(f"{loss:.4f}" for loss in losses) for losses in (self.before, self.after))
        return f"{before} before, {after} nats/byte after"


@torch.no_grad()
def merge(
    live: Mapping[str, Tensor],
    schema: Schema,
    peer: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None,
    method: str,
    alpha: float,
) -> float:
    """Merge `peer` (views by the schema's names, on the host) into `live` (contiguous, any device).

    clonal: live = peer. recombination: weights move by alpha * (peer - own), where `own` is the live state of about the
    peer's time, so that what was learned since is kept; second moments are interpolated with alpha, which keeps them
    from falling below zero. average: the same with alpha = 1/2 at both ends, which keeps the pair's sum. own None:
    live stands for it. Afterwards `peer` holds what was overwritten: swap() undoes the merge. On any error live is as
    it was, `peer` is spoilt, and the error is raised. Called by the thread that owns `live`.

    Returns how far `peer` was from `own`: the L2 norm of their difference over that of `live` before the merge, both
    of all values under Rule.WEIGHT.
    """
    assert method in MERGE_METHODS and 0 <= alpha <= 1, f"{method} {alpha}"
    share = 0.5 if method == "average" else alpha
    done: list[tuple[Tensor, Tensor]] = []
    apart = size = 0.0
    with contextlib.ExitStack() as undoing:  # whatever the error is
        undoing.callback(_undo, done)
        for rule, now, theirs, mine in _pieces(schema, live, peer, own):
            base = None if rule is Rule.SECOND_MOMENT else mine
            if can_merge(now, theirs, base):
                far, large = merge_piece(now, theirs, base, share, method == "clonal")
                done.append((now, theirs))
            else:
                far, large = _merge_piece(now, theirs, base, share, method == "clonal", done)
            if rule is Rule.WEIGHT:
                apart, size = apart + far, size + large
        _wait(live)
        undoing.pop_all()
    apart, size = float(apart), float(size)
    return math.sqrt(apart / size) if size > 0 else math.inf


@torch.no_grad()
def swap(live: Mapping[str, Tensor], schema: Schema, other: Mapping[str, Tensor]) -> None:
    """Exchange the contents of `live` and `other`: after a merge, this brings back what it overwrote."""
    for _, now, theirs, _ in _pieces(schema, live, other, None):
        kept = theirs.to(now.device, non_blocking=True, copy=True)
        theirs.copy_(now, non_blocking=True)
        now.copy_(kept)
    _wait(live)


def merge_judged(
    live: Mapping[str, Tensor],
    schema: Schema,
    peer: Mapping[str, Tensor],
    own: Mapping[str, Tensor] | None,
    method: str,
    alpha: float,
    judge: Callable[[], Losses] | None,
    tolerance: float | None,
    before: Losses | None = None,
) -> Trial:
    """merge(), undone bit for bit where it does harm: each of the losses that `judge` finds must be finite after it and
    not above the one before it by more than `tolerance`.

    before: the losses before it, as they were known lately; training may have made them worse since, so that a merge
    which seems harmful by them is compared with what they are now. judge None: the merge is kept. An error of the judge
    is raised, and live is then as it was.
    """
    if judge is None:
        distance = merge(live, schema, peer, own, method, alpha)
        return Trial((), (), True, distance)
    known, before = before is not None, judge() if before is None else before
    distance = merge(live, schema, peer, own, method, alpha)
    after, kept = _judge_or_swap(live, schema, peer, judge, before, tolerance)
    if not kept and known:
        before = judge()
        if _is_harmless(before, after, tolerance):
            swap(live, schema, peer)  # to what the merge had made
            after, kept = _judge_or_swap(live, schema, peer, judge, before, tolerance)
    return Trial(before, after, kept, distance)


def _judge_or_swap(
    live: Mapping[str, Tensor],
    schema: Schema,
    other: Mapping[str, Tensor],
    judge: Callable[[], Losses],
    before: Losses,
    tolerance: float,
) -> tuple[Losses, bool]:
    """The losses of `live`, and whether it was kept: swapped with `other` if it is worse than `before`, or the judge
    raises."""

    def undo(kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        if trace is not None:
            traceback.clear_frames(trace)  # the judge's tensors: memory may be out, and this needs some
        swap(live, schema, other)

    with contextlib.ExitStack() as undoing:
        undoing.push(undo)
        after = judge()
        kept = _is_harmless(before, after, tolerance)
        if kept:
            undoing.pop_all()
    return after, kept


def _is_harmless(before: Losses, after: Losses, tolerance: float) -> bool:
    """One before that is not finite is beaten by any."""
    return all(math.isfinite(y) and not y > x + tolerance for x, y in zip(before, after, strict=True))


@torch.no_grad()
def weight_norm(live: Mapping[str, Tensor], schema: Schema) -> float:
    """L2 norm of all values of `live` under Rule.WEIGHT."""
    weights = [live[spec.name] for spec in schema.tensors if spec.rule is Rule.WEIGHT]
    wide = [torch.promote_types(tensor.dtype, torch.float32) for tensor in weights]
    norms = [torch.linalg.vector_norm(tensor, dtype=dtype) for tensor, dtype in zip(weights, wide, strict=True)]
    return math.hypot(*torch.stack(norms).tolist())


def _merge_piece(
    now: Tensor, theirs: Tensor, base: Tensor | None, share: float, whole: bool, done: list[tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """merge_piece() by torch, of any dtypes and devices; in `done` from when `theirs` holds what is overwritten.

    On a GPU all of it is queued on the current stream, where one copy or kernel follows the other: until _wait() the
    host's tensors may not be touched.
    """
    arrived = theirs.to(now.device, non_blocking=True)
    change = arrived - (now if base is None else base.to(now.device, non_blocking=True))
    energies = _energy(change), _energy(now)
    arrived = arrived.clone() if whole and arrived is theirs else arrived
    theirs.copy_(now, non_blocking=True)
    done.append((now, theirs))
    if whole:
        now.copy_(arrived)
    else:
        now.add_(change, alpha=share)
    return energies


def _energy(values: Tensor) -> Tensor:
    dtype = torch.promote_types(values.dtype, torch.float32)
    return torch.linalg.vector_norm(values, dtype=dtype).double().square()


def _wait(live: Mapping[str, Tensor]) -> None:
    """Until a GPU has done all that the current stream was given."""
    for device in {tensor.device for tensor in live.values() if tensor.is_cuda}:
        torch.cuda.current_stream(device).synchronize()


def _undo(done: list[tuple[Tensor, Tensor]]) -> None:
    for now, overwritten in done:
        now.copy_(overwritten)


def _pieces(
    schema: Schema, live: Mapping[str, Tensor], peer: Mapping[str, Tensor], own: Mapping[str, Tensor] | None
) -> Iterator[tuple[Rule, Tensor, Tensor, Tensor | None]]:
    """Corresponding flat pieces of the three states: views, of at most PIECE_ITEMS items."""
    for spec in schema.tensors:
        now, theirs = live[spec.name].detach().view(-1), peer[spec.name].view(-1)
        mine = None if own is None else own[spec.name].view(-1)
        for start in range(0, now.numel(), PIECE_ITEMS):
            piece = slice(start, start + PIECE_ITEMS)
            yield spec.rule, now[piece], theirs[piece], None if mine is None else mine[piece]
