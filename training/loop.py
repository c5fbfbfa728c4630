"""Trainer: owns a rank's model and optimizer; training, validating, saving and meeting the population.

Everything here runs on the training thread.
"""

import contextlib
import dataclasses
import functools
import math
import random
import time
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

from gossip.comparison import Evidence
from gossip.event_log import EventLog
from gossip.evolutionary_node import EvolutionaryNode
from gossip.filesystem_coordinator import RankReplaced
from gossip.state import Schema
from mingru.minLM import MinLM, MinLMState
from runtime.scribe import Hand
from runtime.signals import SignalFlags
from training.checkpoint_writer import CheckpointWriter
from training.computation import choose_dtype, flops_per_byte, peak_flops, precision, training_pass
from training.contention import Contention
from training.data import LaneReader, Region, validation_chunks
from training.fitness import Fitness
from training.heredity import Heredity
from training.losses import averaged_loss, chunk_loss
from training.metrics import MetricsFile, Progress, RunLog, report_line
from training.objections import Objections
from training.optimizer import TrainedWeights
from training.options import Options
from training.recovery import Recovery, TrainingDiverged
from training.rejuvenation import Rejuvenation
from training.run_directory import RunDirectory
from training.saving import Saving


@dataclass
class Totals:
    """What a rank has done since its run began.

    seconds: of training, all launches; cpu_seconds: the training thread's own of these; bytes_seen: targets trained on;
    lineage: optimizer steps of this run behind the weights, own or, after a merge, inherited.
    """

    step: int = 0
    seconds: float = 0.0
    cpu_seconds: float = 0.0
    bytes_seen: int = 0
    documents: int = 0
    lineage: int = 0


@dataclass
class Parts:
    """What a Trainer is made of; train.py puts it together. hand: who writes the metrics; initial_weights: a new run's,
    by parameter name."""

    options: Options
    run: RunDirectory
    device: torch.device
    model: MinLM
    weights: TrainedWeights
    schema: Schema
    lanes: LaneReader
    held_out: Region | None
    writer: CheckpointWriter
    node: EvolutionaryNode
    fitness: Fitness
    heredity: Heredity
    signals: SignalFlags
    metrics: MetricsFile
    hand: Hand
    log: RunLog
    events: EventLog
    objections: Objections
    initial_weights: Callable[[], dict[str, Tensor]]


class Trainer:
    """One rank's training, from its current state to the end of its budget."""

    def __init__(self, parts: Parts) -> None:
        self.parts = parts
        self.options = parts.options
        self.model = parts.model
        self.weights = parts.weights
        self.forward = training_pass(parts.model, parts.options.compute, parts.device)
        self.state: MinLMState = self.initial_state()
        self.totals = Totals()
        self.dice = random.Random(f"{parts.options.optimizer.seed} {parts.run.rank}")
        self.mixes_before: dict[str, int] = {}
        self.loss: float | None = None
        self.val_loss: float | None = None
        self.grad_norm: float | None = None
        self.distance: float | None = None  # from the peer whose weights were merged last
        self.bytes_per_s: float | None = None
        self._recovery = Recovery(self)
        self._rejuvenation = Rejuvenation(self)
        self.saving = Saving(self)
        self._flops_per_byte = flops_per_byte(parts.model)
        self._dtype = choose_dtype(parts.options.compute.dtype, parts.device)
        self._peak_flops = peak_flops(parts.device, self._dtype)
        self._contention = Contention(parts.device)
        self._timed = time.monotonic(), time.thread_time()  # up to when the totals count time

    def initial_state(self) -> MinLMState:
        """Of all lanes: each at the start of a document."""
        return self.model.initial_state(len(self.parts.lanes.positions))

    def train_step(self) -> bool:
        """One optimizer step over --grad_accum chunks; not applied, and False, if loss or gradients are not finite (the
        lanes' state is then not to be trusted either)."""
        chunks = self.options.optimizer.grad_accum
        self.model.train()
        total, nbytes, documents = 0.0, 0, 0
        for _ in range(chunks):
            turn = self.parts.lanes.turn
            chunk = self.parts.lanes.next_chunk()
            loss, state = chunk_loss(self.forward, chunk, self.state.lanes(turn), self.parts.device)
            (loss / chunks).backward()
            self.state.put(turn, state.detach())
            total = total + loss.detach()
            nbytes += chunk.reset_BT.size
            documents += int(chunk.reset_BT.sum())
        trained = [parameter for parameter in self.model.parameters() if parameter.grad is not None]
        norm = torch.nn.utils.get_total_norm([parameter.grad for parameter in trained])
        self.parts.lanes.prefetch()  # while a GPU still computes
        # The step's one wait for the device: nothing is applied that is not finite, and fitness follows each loss.
        total, grad_norm = torch.stack((total, norm)).tolist()
        loss = total / chunks
        finite = math.isfinite(loss) and math.isfinite(grad_norm)
        if finite:
            clip = self.hyperparameter("grad_clip") or math.inf
            if grad_norm > clip:  # seldom, once training is under way: a pass over all gradients
                torch.nn.utils.clip_grads_with_norm_(trained, clip, norm)
            self.before_write()
            self.weights.step()
            self.loss, self.grad_norm = loss, grad_norm
            self.totals.step += 1
            self.totals.lineage += 1
            self.totals.bytes_seen += nbytes
            self.totals.documents += documents
            self.parts.fitness.tracker.observe(loss)
        self.model.zero_grad(set_to_none=True)
        return finite

    def _count_time(self) -> None:
        """Add what has passed since the last call."""
        (before, cpu_before), (now, cpu_now) = self._timed, (time.monotonic(), time.thread_time())
        self.totals.seconds += now - before
        self.totals.cpu_seconds += cpu_now - cpu_before
        self._timed = now, cpu_now

    def before_write(self) -> None:
        """Before the weights are written: on a GPU, let the write wait for copies of them that are still being made."""
        self.parts.node.before_write()
        self.parts.writer.before_write()

    def validate(self) -> float:
        """Loss of the averaged weights over the held-out bytes, nats per byte, in the precision that training computes
        in; training's weights stay untouched."""
        data = self.options.data
        chunks = validation_chunks(self.parts.held_out, data.batch_size, data.chunk_size, data.val_bytes)
        with precision(self._dtype, self.parts.device):
            return averaged_loss(self.model, self.weights, chunks, self.parts.device)

    def run(self, deadline: float = math.inf, progress: Progress | None = None) -> None:
        """Train until --train_steps, `deadline` (on time.monotonic) or a stop signal; then leave the population, save,
        and wait for it.

        Raises TrainingDiverged, RankReplaced. After any other error, a broken gossip thread's say, it saves before it
        raises.
        """
        with contextlib.ExitStack() as ending:
            ending.push(self._end)
            self._train(deadline, progress)

    def _end(self, _kind: type | None, error: BaseException | None, _traceback: TracebackType | None) -> None:
        if isinstance(error, Exception | None):
            self.parts.node.close()  # no step boundary follows: whoever called would wait for one, as long as the save
        if error is None:
            self.saving.last("stopped by a signal" if self.parts.signals.stop else "end of the budget")
        elif isinstance(error, TrainingDiverged | RankReplaced):
            self.saving.finish()
        elif isinstance(error, Exception):  # not what leaves at once, as an interrupt does
            self.saving.last("ended by an error", measured=False)

    def _train(self, deadline: float, progress: Progress | None) -> None:
        options, signals, totals = self.options.run, self.parts.signals, self.totals
        last_step = math.inf if options.train_steps is None else options.train_steps
        if totals.step >= last_step:
            self.line(f"nothing to do: --train_steps {last_step} is reached")
        self._meet_population()  # so that the others know where it stands before its first step is done
        self._contention.begin()
        logged_time, logged_bytes = time.monotonic(), totals.bytes_seen
        self._timed = time.monotonic(), time.thread_time()
        while totals.step < last_step and self._timed[0] < deadline and not signals.stop:
            if self.train_step():
                self._recovery.good_step()
                self._meet_population()
                validated = options.val_every and totals.step % options.val_every == 0
                if validated and self.parts.held_out is not None:
                    self.val_loss = self.validate()
                if self.val_loss is not None or totals.step % options.log_every == 0:
                    now = time.monotonic()
                    self.bytes_per_s = (totals.bytes_seen - logged_bytes) / (now - logged_time)
                    logged_time, logged_bytes = now, totals.bytes_seen
                    self._count_time()
                    self._report()
                self.saving.consider()
            else:
                self._recovery.bad_step()
            self._count_time()
            self.saving.begin_if_wanted()
            if progress:
                progress.update(totals.step, self.parts.fitness.tracker.ema, self.bytes_per_s, self.mixes())
        fitness = self.parts.fitness
        fitness.measure_aside()  # what the others are told at the end is of the last weights
        self.parts.node.publish(totals.step, totals.lineage, fitness.value_now, self.status(), fitness.evidence_now)

    def _meet_population(self) -> None:
        node = self.parts.node
        self.parts.writer.before_write()  # a merge may write; for its own copies the node waits itself
        self.parts.fitness.measure_if_due(self.totals.step)
        report = node.step_boundary(*self._news())
        if report is not None:
            self.distance = report.distance
            self.weights_replaced(
                self._scalars_of(report.peer_scalars) if report.clonal else None, report.peer_lineage, report.judged
            )
            if not report.both and self.parts.heredity.values:
                self._inherit(report.peer_genes)
        self._rejuvenation.consider()

    def _news(self) -> tuple[int, int, float | None, dict[str, Any], Evidence | None]:
        """What the node tells the others."""
        fitness = self.parts.fitness
        return self.totals.step, self.totals.lineage, fitness.value, self.status(), fitness.evidence

    def hyperparameter(self, name: str) -> float:
        """The value in force: this rank's own where it evolves, else the option's."""
        return self.parts.heredity.values.get(name, getattr(self.options.optimizer, name))

    def apply_hyperparameters(self) -> None:
        """Let the optimizer go on with the values in force."""
        self.weights.set_hyperparameters(self.hyperparameter("lr"), self.hyperparameter("weight_decay"))

    def _inherit(self, genes: dict[str, float]) -> None:
        self.parts.heredity.inherit(genes, self.dice)
        self.apply_hyperparameters()
        self.line("inherited " + ", ".join(f"{name} {x:.4g}" for name, x in self.parts.heredity.values.items()))

    def _scalars_of(self, peers: dict[str, float]) -> dict[str, float]:
        """The optimizer's counters that come with a peer's weights: what counts second moments stays with them."""
        if self.options.population.gossip_payload == "full":
            return peers
        own = self.weights.scalars()
        return {name: own[name] if name == self.weights.moments_counter else x for name, x in peers.items()}

    def weights_replaced(self, whole_scalars: dict[str, float] | None, lineage: int, judged: bool) -> None:
        """After a merge: weights taken whole bring their optimizer's counters, whatever was measured describes other
        weights now (but the probe, if they were `judged` by it), and the steps behind the others' (`lineage`) are
        behind these."""
        if whole_scalars is not None:
            self.weights.load_scalars(whole_scalars)
        reset = self.options.population.gossip_optimizer_recombination == "reset"
        if reset:
            self.weights.adopt(self.weights.averaged())
        self.totals.lineage = max(self.totals.lineage, lineage)
        self.parts.fitness.replaced(judged and not reset)

    def mixes(self) -> dict[str, int]:
        """Counters of this rank's exchanges since its run began."""
        now = dataclasses.asdict(self.parts.node.counters)
        return {name: self.mixes_before.get(name, 0) + count for name, count in now.items()}

    def status(self) -> dict[str, Any]:
        """What this rank tells the population's registry."""
        mixes = self.mixes()
        return {
            "best_fitness": self.parts.fitness.best,
            "lr": self.hyperparameter("lr"),
            "bytes_per_s": self.bytes_per_s,
            "mixes_initiated": mixes["initiated"],
            "mixes_received": mixes["received"],
            "bytes_seen": self.totals.bytes_seen,
            "cpu_s": self.totals.cpu_seconds,
            **{name: mixes[name] for name in ("won", "lost", "averaged", "tied", "failed", "busy", "rolled_back")},
        }

    def _report(self) -> None:
        """A row of the metrics and a line of the log."""
        totals, ema = self.totals, self.parts.fitness.tracker.ema
        mixes = self.mixes()
        row = {
            "rank": self.parts.run.rank, "time_s": totals.seconds, "loss": self.loss, "ema_loss": ema,
            "val_loss": self.val_loss, "grad_norm": self.grad_norm, **self.status(), "lr": self.weights.lr,
            "step": totals.step, "documents": totals.documents, "lineage": totals.lineage,
            "bytes_sent": mixes["bytes_sent"], "bytes_received": mixes["bytes_received"],
            "probe_loss": self.parts.fitness.value if self.parts.fitness.kind == "probe" else None,
            "probe_s": self.parts.fitness.seconds, "distance": self.distance, "base_lr": self.hyperparameter("lr"),
            "weight_decay": self.hyperparameter("weight_decay"), "grad_clip": self.hyperparameter("grad_clip"),
        }  # fmt: skip
        self.parts.hand(functools.partial(self._append, row, self.parts.fitness.value))
        self.parts.log.line(report_line(row) + self._mfu())
        if (complaint := self._contention.complaint()) is not None:
            self.line(complaint)
        self.val_loss = None

    def _append(self, row: dict[str, Any], fitness: float | None) -> None:
        """Write a row of the metrics; of this class alone it runs on another thread than training's."""
        try:
            self.parts.metrics.append(row)
        except OSError as error:
            self._record("metrics_failed", f"{error.strerror or error}; training goes on", row["step"], fitness)

    def _mfu(self) -> str:
        """Model FLOPs utilisation, for the log; nothing on a device whose peak is not known."""
        if self._peak_flops is None:
            return ""
        return f"  MFU {self.bytes_per_s * self._flops_per_byte / self._peak_flops:.1%}"

    def line(self, text: str) -> None:
        """A line of this rank's log, for people."""
        self.parts.log.line(f"step {self.totals.step:>8}  {text}")

    def event(self, event: str, message: str) -> None:
        """Something went wrong or was mended: in both logs."""
        self._record(event, message, self.totals.step, self.parts.fitness.value)

    def _record(self, event: str, message: str, step: int, fitness: float | None) -> None:
        self.parts.events.write(event, step=step, fitness=fitness, message=message)
        self.parts.log.line(f"step {step:>8}  {event}: {message}")
