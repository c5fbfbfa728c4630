"""Which trials are to be run, and running them: one file each, so that what is finished is never run again."""

import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import signal
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import FrameType

import torch

from bench.evolution.policy import Arm
from bench.evolution.real import run_real
from bench.evolution.trial import Setting, run_trial, trial_key
from runtime.errors import UserError
from runtime.files import atomic_write
from runtime.signals import signal_when_parent_dies
from training.data import Corpus, find_files
from training.options import DataOptions


@dataclass(frozen=True)
class Task:
    """A trial and the file that its result goes to. real: of processes over TCP, else simulated."""

    setting: Setting
    arm: Arm
    seed: int
    path: Path
    real: bool = False

    def __str__(self) -> str:
        return f"{self.arm.label} seed {self.seed}"


def tasks_of(
    setting: Setting, arms: Sequence[Arm], seeds: Sequence[int], output: Path, real: bool = False
) -> list[Task]:
    """All trials in the order to run them in: the first seed of every arm, then the second."""
    tasks = []
    for seed in seeds:
        for arm in arms:
            word = re.sub(r"[^a-zA-Z0-9.=,]", "-", arm.label)
            name = f"{'real_' if real else ''}{word}_{trial_key(setting, arm)}_seed{seed}.json"
            tasks.append(Task(setting, arm, seed, output / name, real))
    return tasks


def run_tasks(tasks: Iterable[Task], data: Path, device: torch.device, jobs: int, say: Callable[[str], None]) -> int:
    """Run what has no result yet, `jobs` at a time in processes of one thread each; how many trials failed.

    jobs 1: in this process, with its threads. A trial that fails is told of, and the others go on.
    """
    waiting = [task for task in tasks if not task.path.exists()]
    say(f"{len(waiting)} trials to run")
    failed = 0
    outcomes = (_in_turn if jobs == 1 else functools.partial(_side_by_side, jobs))(waiting, data, device)
    for number, (task, outcome) in enumerate(outcomes, 1):
        if isinstance(outcome, BaseException):
            failed += 1
            say(f"{number}/{len(waiting)} {task} failed: {outcome!r}")
        else:
            say(f"{number}/{len(waiting)} {task}: {outcome['loss']:.4f} nats/byte, {outcome['cpu_s']:.0f} CPU-s")
    return failed


def _in_turn(tasks: Iterable[Task], data: Path, device: torch.device) -> Iterator[tuple[Task, dict | Exception]]:
    for task in tasks:
        try:
            yield task, perform(task, data, device)
        except Exception as error:
            yield task, error


def _side_by_side(
    jobs: int, tasks: Iterable[Task], data: Path, device: torch.device
) -> Iterator[tuple[Task, dict | BaseException]]:
    pool = concurrent.futures.ProcessPoolExecutor(
        jobs, multiprocessing.get_context("spawn"), initializer=_begin_worker, initargs=(os.getpid(),)
    )
    try:
        ours = signal.signal(signal.SIGINT, signal.SIG_IGN)  # which workers inherit: Ctrl-C is left to this process
        try:
            futures = {pool.submit(_perform_in_worker, task, data, device): task for task in tasks}
        finally:
            signal.signal(signal.SIGINT, ours)
        for future in concurrent.futures.as_completed(futures):
            yield futures[future], future.exception() or future.result()
    except BaseException:
        pool.shutdown(wait=False, cancel_futures=True)
        for worker in multiprocessing.active_children():
            worker.terminate()
        raise
    finally:
        pool.shutdown()


def _begin_worker(laboratory: int) -> None:
    """In a new process: one thread, and it ends with the laboratory."""
    torch.set_num_threads(1)
    if not signal_when_parent_dies(signal.SIGTERM, laboratory):
        sys.exit(1)


def _perform_in_worker(task: Task, data: Path, device: torch.device) -> dict:
    """perform(); SIGTERM meanwhile ends this process, and first the processes that a real trial has started."""
    if not task.real:
        return perform(task, data, device)
    try:
        signal.signal(signal.SIGTERM, _leave)
        try:
            return perform(task, data, device)
        finally:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
    except SystemExit as end:  # the pool would take it for the trial's failure
        os._exit(end.code)


def _leave(number: int, frame: FrameType | None) -> None:
    signal.signal(number, signal.SIG_IGN)  # said again, it would keep what is to be ended from being ended
    sys.exit(128 + number)


def perform(task: Task, data: Path, device: torch.device) -> dict:
    """Run one trial and write its result; where another laboratory has finished it meanwhile, that stands."""
    if task.path.exists():
        return json.loads(task.path.read_text())
    corpus = open_corpus(data)
    if task.real:
        result = run_real(task.setting, task.arm, task.seed, data, corpus)
    else:
        result = run_trial(task.setting, task.arm, task.seed, corpus, device)
    atomic_write(task.path, json.dumps(result, indent=1) + "\n")
    return result


def open_corpus(data: Path) -> Corpus:
    """A file's bytes, with train.py's own delimiter. Raises UserError."""
    return Corpus(find_files([str(data)]), DataOptions().document_delimiter)


def read_results(path: Path) -> list[dict]:
    """Results in a folder of them, or in one file that holds several. Raises UserError."""
    try:
        if path.is_dir():
            return [json.loads(file.read_text()) for file in sorted(path.glob("*_seed*.json"))]
        return json.loads(path.read_text())["results"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(f"expected results in {path}, got {error}: check the path") from None
