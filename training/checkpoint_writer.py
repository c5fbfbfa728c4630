"""Checkpoints are written beside training: it copies its state into host memory at a step boundary, and goes on."""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from gossip.state import Schema, StateBuffer
from mingru.minLM import ModelConfig
from runtime.exhaustion import as_memory_error
from training.checkpoint import save_checkpoint
from training.optimizer import TrainedWeights

NOT_FINITE = "the weights are not finite"
NO_MEMORY = "memory is out"


@dataclass(frozen=True)
class Moment:
    """What a save is of: the step, the fitness then (nats per byte, or None), why it was asked for, and all that
    resuming needs besides the weights and the optimizer's tensors."""

    step: int
    loss: float | None
    why: str
    training: dict[str, Any]


@dataclass(frozen=True)
class Saved:
    """How a save ended: the checkpoint's path, or else the failure; tidying: what failed in tidying up after it."""

    moment: Moment
    path: Path | None
    failure: str | None = None
    tidying: str | None = None


class CheckpointWriter:
    """One save at a time, each on a thread of its own. All methods are for the training thread, and only wait() waits.

    run_dir, rank, config, document_delimiter: what checkpoints are named after and hold; weights: what is saved, by
    `schema`; tidy: called on the writing thread after each save, may raise OSError.
    """

    def __init__(
        self,
        run_dir: Path,
        rank: int,
        config: ModelConfig,
        document_delimiter: int | None,
        weights: TrainedWeights,
        schema: Schema,
        tidy: Callable[[], None],
    ) -> None:
        self._run_dir = run_dir
        self._rank = rank
        self._config = config
        self._document_delimiter = document_delimiter
        self._weights = weights
        self._tidy = tidy
        self._gpu = next((tensor.device for tensor in weights.tensors().values() if tensor.is_cuda), None)
        self._buffer = StateBuffer(schema, pin=self._gpu is not None)
        self._copied: torch.cuda.Event | None = None  # of the newest copy, until a write has been made to wait for it
        self._thread: threading.Thread | None = None
        self._saved: Saved | None = None
        self._error: BaseException | None = None

    @property
    def idle(self) -> bool:
        """No save is under way, and none has ended that was not taken."""
        return self._thread is None

    def begin(self, moment: Moment) -> None:
        """Copy the live state and start to write it; idle before. On return the live tensors may be written again on a
        CPU; on a GPU once before_write() was called. Raises MemoryError; it is idle then.
        """
        assert self.idle
        with as_memory_error():
            self._copied = self._buffer.copy_from(self._weights.tensors())
            # A daemon: an interpreter that ends with an error must not wait for a disk that hangs.
            thread = threading.Thread(
                target=self._run, args=(moment, self._copied), name="checkpoint-writer", daemon=True
            )
            thread.start()
        self._thread = thread

    def before_write(self) -> None:
        """Before the weights are written: on a GPU, let the current stream wait for a copy in flight."""
        copied, self._copied = self._copied, None
        if copied is not None:
            torch.cuda.current_stream(self._gpu).wait_event(copied)

    def take(self) -> Saved | None:
        """How a save ended, once; None if none has since. Raises what no disk is to blame for."""
        if self._thread is None or self._thread.is_alive():
            return None
        self._thread = None
        error, self._error = self._error, None
        if error is not None:
            raise error
        saved, self._saved = self._saved, None
        return saved

    def wait(self) -> Saved | None:
        """take(), once the save that is under way has ended."""
        if self._thread is not None:
            self._thread.join()
        return self.take()

    def _run(self, moment: Moment, copied: "torch.cuda.Event | None") -> None:
        try:
            if copied is not None:
                with torch.cuda.device(self._gpu):  # a thread's current one is number 0, unless it says otherwise
                    copied.synchronize()
            self._saved = self._write(moment)
        except BaseException as error:
            self._error = error

    def _write(self, moment: Moment) -> Saved:
        try:
            with as_memory_error():
                tensors = self._buffer.views
                averaged = self._weights.average_of(tensors)
                if not (_all_finite(tensors) and _all_finite(averaged)):
                    return Saved(moment, None, NOT_FINITE)
                path = save_checkpoint(
                    self._run_dir, self._rank, moment.step, moment.loss, self._config, averaged,
                    {**moment.training, "tensors": tensors}, self._document_delimiter,
                )  # fmt: skip
        except OSError as error:
            return Saved(moment, None, error.strerror or str(error))
        except MemoryError:
            return Saved(moment, None, NO_MEMORY)
        try:
            self._tidy()
        except OSError as error:
            return Saved(moment, path, tidying=error.strerror or str(error))
        return Saved(moment, path)


def _all_finite(tensors: dict[str, Tensor]) -> bool:
    # Both extremes carry a NaN along, and need no array of flags.
    extremes = [extreme for tensor in tensors.values() for extreme in (tensor.numpy().min(), tensor.numpy().max())]
    return bool(np.isfinite(extremes).all())
