"""Trainer: owns a rank's model and optimizer; training, validating, saving and meeting the population.

Everything here runs on the training thread. Shape letters: B lanes, T bytes of a chunk, S = T + 1, V byte values.
"""

import dataclasses
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.func import functional_call

from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.fitness_tracker import FitnessTracker
from gossip.state import Schema
from mingru.minLM import MinLM, MinLMState
from runtime.signals import SignalFlags
from training.checkpoint import CheckpointError, save_checkpoint
from training.data import Chunk, LaneReader, Region, validation_chunks
from training.metrics import MetricsFile, Progress, RunLog, bits
from training.optimizer import TrainedWeights
from training.options import Options
from training.population import is_among_worst, merge_elite, save_chance, standing_of
from training.recovery import Recovery, TrainingDiverged
from training.resume import capture
from training.run_directory import RunDirectory


@dataclass
class Totals:
    """What a rank has done since its run began. bytes_seen: targets trained on; seconds: of training, all launches."""

    step: int = 0
    seconds: float = 0.0
    bytes_seen: int = 0
    documents: int = 0


@dataclass
class Parts:
    """What a Trainer is made of; train.py puts it together. initial_weights: a new run's, by parameter name."""

    options: Options
    run: RunDirectory
    device: torch.device
    model: MinLM
    weights: TrainedWeights
    schema: Schema
    lanes: LaneReader
    held_out: Region | None
    node: EvolutionaryNode
    tracker: FitnessTracker
    signals: SignalFlags
    metrics: MetricsFile
    log: RunLog
    events: EventLog
    tidy: Callable[[], None]
    initial_weights: Callable[[], dict[str, Tensor]]


class Trainer:
    """One rank's training, from its current state to the end of its budget."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.options = parts.options
        self.model = parts.model
        self.weights = parts.weights
        self.state: MinLMState = parts.model.initial_state(parts.options.data.batch_size)
        self.totals = Totals()
        self.dice = random.Random(f"{parts.options.optimizer.seed} {parts.run.rank}")
        self.mixes_before: dict[str, int] = {}
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.grad_norm: float | None = None
        self.bytes_per_s: float | None = None
        self._recovery = Recovery(self)
        self.saved_step: int | None = None
        self._save_due = False

    def train_step(self) -> bool:
        """One optimizer step over --grad_accum chunks; not applied, and False, if loss or gradients are not finite."""
        chunks = self.options.optimizer.grad_accum
        self.model.train()
        state, total = self.state, 0.0
        for _ in range(chunks):
            chunk = self.parts.lanes.next_chunk()
            loss, state = self._chunk_loss(self.model, chunk, state)
            (loss / chunks).backward()
            state = state.detach()
            total = total + loss.detach()
            self.totals.bytes_seen += chunk.reset_BT.size
            self.totals.documents += int(chunk.reset_BT.sum())
        clip = self.options.optimizer.grad_clip or math.inf
        grad_norm = float(torch.nn.utils.clip_grad_norm_(self.model.parameters(), clip))
        loss = float(total) / chunks
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            self.parts.node.before_write()
            self.weights.step()
            self.state, self.loss, self.grad_norm = state, loss, grad_norm
            self.totals.step += 1
            self.parts.tracker.observe(loss)
        self.model.zero_grad(set_to_none=True)
        return finite

    @torch.no_grad()
    def validate(self) -> float:
        """Loss of the averaged weights over the held-out bytes, nats per byte; training's weights stay untouched."""
        averaged = self.weights.averaged()

        def model(*inputs: Any) -> tuple[Tensor, MinLMState]:
            return functional_call(self.model, averaged, inputs)

        self.model.eval()
        data, total, count, state = self.options.data, 0.0, 0, None
        for chunk in validation_chunks(self.parts.held_out, data.batch_size, data.chunk_size, data.val_bytes):
            loss, state = self._chunk_loss(model, chunk, state)
            total += float(loss) * chunk.reset_BT.size
            count += chunk.reset_BT.size
        return total / count

    def _chunk_loss(self, model: Callable, chunk: Chunk, state: MinLMState | None) -> tuple[Tensor, MinLMState]:
        """Mean loss over a chunk's targets, nats per byte, and the state after it. The bytes travel as uint8."""
        ids_BS = self._to_device(chunk.ids_BS)
        reset_BT = self._to_device(chunk.reset_BT) if chunk.reset_BT.any() else None  # most chunks are in one document
        logits_BTV, state = model(ids_BS[:, :-1], state, reset_BT)
        return F.cross_entropy(logits_BTV.flatten(0, 1).float(), ids_BS[:, 1:].flatten().long()), state

    def _to_device(self, array: np.ndarray) -> Tensor:
        tensor = torch.from_numpy(array)
        if self.parts.device.type != "cuda":
            return tensor
        return tensor.pin_memory().to(self.parts.device, non_blocking=True)

    def run(self, deadline: float = math.inf, progress: Progress | None = None) -> None:
        """Train until --train_steps, `deadline` (on time.monotonic) or a stop signal; then save.

        Raises TrainingDiverged. After any other error, a broken gossip thread's say, it saves before it raises.
        """
        try:
            self._train(deadline, progress)
        except TrainingDiverged:
            raise
        except Exception:
            self.save("ended by an error")
            raise
        why = "stopped by a signal" if self.parts.signals.stop else "end of the budget"
        if self.totals.step == self.saved_step:
            self._line(f"{why}, and saved already")
        else:
            self.save(why)

    def _train(self, deadline: float, progress: Progress | None) -> None:
        options, signals, totals = self.options.run, self.parts.signals, self.totals
        last_step = math.inf if options.train_steps is None else options.train_steps
        if totals.step >= last_step:
            self._line(f"nothing to do: --train_steps {last_step} is reached")
        self._meet_population()  # so that the others know where it stands before its first step is done
        before = time.monotonic()
        logged_time, logged_bytes = before, totals.bytes_seen
        while totals.step < last_step and before < deadline and not signals.stop:
            if self.train_step():
                self._recovery.good_step()
                self._meet_population()
                if options.val_every and totals.step % options.val_every == 0 and self.parts.held_out is not None:
                    self.val_loss = self.validate()
                if totals.step % options.log_every == 0:
                    now = time.monotonic()
                    self.bytes_per_s = (totals.bytes_seen - logged_bytes) / (now - logged_time)
                    logged_time, logged_bytes = now, totals.bytes_seen
                    self._report()
                if self._save_is_due():
                    self.save()
            else:
                self._recovery.bad_step()
            if signals.take_save():
                self.save("asked for by a signal")
            now = time.monotonic()
            totals.seconds += now - before
            before = now
            if progress:
                progress.update(totals.step, self.parts.tracker.ema, self.bytes_per_s, self.mixes())

    def _meet_population(self) -> None:
        node, options = self.parts.node, self.options.population
        report = node.step_boundary(self.totals.step, self.parts.tracker.fitness, self.status())
        if report is not None:
            self._weights_replaced(report.peer_scalars if report.clonal else None)
            self._line(f"merged rank {report.peer_rank}'s weights of its step {report.peer_step} ({report.method})")
        standing = standing_of(node.roster, self.parts.run.rank)
        if is_among_worst(standing, options.rejuvenation_threshold):
            # The standing is as old as the last heartbeat: weights that are newer than their fitness have none.
            measured = self.parts.tracker.fitness is not None and not node.engaged
            if self.dice.random() < options.rejuvenation_probability and measured:
                self._rejuvenate()

    def _rejuvenate(self) -> None:
        options = self.options.population
        self.parts.node.before_write()
        try:
            elite, scalars = merge_elite(self.parts.run.path, self.weights, self.parts.schema, options, self.dice)
        except (CheckpointError, torch.OutOfMemoryError) as error:
            self.event("rejuvenation_failed", str(error).partition("\n")[0])
            return
        self.parts.node.weights_changed()
        self._weights_replaced(scalars if options.gossip_merge_method == "clonal" else None)
        self.event("rejuvenated", f"merged {elite}")

    def _weights_replaced(self, cloned_scalars: dict[str, float] | None) -> None:
        """After a merge: a clone brings its optimizer's counters, and what was measured describes other weights now."""
        if cloned_scalars is not None:
            self.weights.load_scalars(cloned_scalars)
        if self.options.population.gossip_optimizer_recombination == "reset":
            self.weights.adopt(self.weights.averaged())
        self.parts.tracker.reset()

    def _save_is_due(self) -> bool:
        """Is it time for a checkpoint? One that is due waits until the fitness for its name is known."""
        run, population = self.options.run, self.options.population
        if population.fitness_weighted_checkpointing:
            standing = standing_of(self.parts.node.roster, self.parts.run.rank)
            chance = save_chance(standing, run.save_every, population.elite_checkpoint_multiplier)
            self._save_due |= self.dice.random() < chance
        else:
            self._save_due |= self.totals.step % run.save_every == 0
        return self._save_due and self.parts.tracker.fitness is not None

    def save(self, why: str = "") -> None:
        """Write a checkpoint; a full or broken disk is logged, and training goes on. Never of non-finite weights."""
        self._save_due = False
        run, step = self.parts.run, self.totals.step
        averaged = {name: tensor.cpu() for name, tensor in self.weights.averaged().items()}
        if not all(bool(tensor.isfinite().all()) for tensor in averaged.values()):
            self.event("save_failed", "the weights are not finite; the older checkpoints stand")
            return
        try:
            path = save_checkpoint(
                run.path, run.rank, step, self.parts.tracker.fitness, self.model.config, averaged, capture(self)
            )
        except OSError as error:
            self.event("save_failed", f"{error.strerror or error}; the older checkpoints stand, training goes on")
            return
        roster = self.parts.node.roster
        if roster is None or roster.leader in (None, run.rank):  # otherwise the leader does it
            self.tidy_up()
        self.saved_step = step
        self._line(f"saved {path.name}{f' ({why})' if why else ''}")

    def tidy_up(self) -> None:
        """Leave links and checkpoints as they should be: the leader may be gone before the last rank's last save."""
        try:
            self.parts.tidy()
        except OSError as error:
            self.event("tidy_failed", error.strerror or str(error))

    def mixes(self) -> dict[str, int]:
        """Counters of this rank's exchanges since its run began."""
        now = dataclasses.asdict(self.parts.node.counters)
        return {name: self.mixes_before.get(name, 0) + count for name, count in now.items()}

    def status(self) -> dict[str, Any]:
        """What this rank tells the population's registry."""
        mixes, tracker = self.mixes(), self.parts.tracker
        return {
            "best_fitness": tracker.best,
            "bytes_per_s": self.bytes_per_s,
            "mixes_initiated": mixes["initiated"],
            "mixes_received": mixes["received"],
            **{name: mixes[name] for name in ("won", "lost", "tied", "failed", "busy")},
        }

    def _report(self) -> None:
        """A row of the metrics and a line of the log."""
        totals, ema, rate = self.totals, self.parts.tracker.ema, self.bytes_per_s
        row = {
            "rank": self.parts.run.rank, "time_s": totals.seconds, "loss": self.loss, "ema_loss": ema,
            "val_loss": self.val_loss, "lr": self.weights.lr, "grad_norm": self.grad_norm, **self.status(),
            "step": totals.step, "bytes_seen": totals.bytes_seen, "documents": totals.documents,
        }  # fmt: skip
        try:
            self.parts.metrics.append(row)
        except OSError as error:
            self.event("metrics_failed", f"{error.strerror or error}; training goes on")
        held_out = "" if self.val_loss is None else f"  held-out {bits(self.val_loss):7.4f}"
        self._line(
            f"loss {bits(self.loss):7.4f}  ema {bits(ema):7.4f}{held_out} bits/byte  {rate / 1000:9.1f} kB/s  "
            f"won {row['won']} lost {row['lost']} tied {row['tied']} failed {row['failed']}"
        )
        self.val_loss = None

    def _line(self, text: str) -> None:
        self.parts.log.line(f"step {self.totals.step:>8}  {text}")

    def event(self, event: str, message: str) -> None:
        """Something went wrong or was mended: in both logs."""
        self.parts.events.write(event, step=self.totals.step, fitness=self.parts.tracker.fitness, message=message)
        self._line(f"{event}: {message}")
