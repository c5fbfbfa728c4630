"""Checkpoints: one file that resumes training exactly and from which anyone can load the weights to use.

A file holds `model_config`, `model_state_dict` (the averaged weights: what one evaluates and generates from), `step`,
`loss` (the fitness that ranks the population; None if it was not known), `document_delimiter` (the byte at which a
document ended in training; None: none did) and `training` (everything that resuming needs). It ends with a digest
(training/digest.py), which is checked before anything is parsed, and it is read with weights_only=True: a checkpoint
can not run code.
"""

import errno
import os
import pickle
import re
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from gossip.state import Schema
from mingru.foreign import convert
from mingru.minLM import MinLM, MinLMState, ModelConfig, uninitialised
from runtime.errors import UserError
from runtime.exhaustion import as_memory_error
from runtime.files import atomic_writer
from training.digest import SealedFile, is_sealed
from training.options import DEFAULT_DELIMITER

_FORMATS = "gruboros checkpoint "
FORMAT = f"{_FORMATS}2"
TRAINING_FORMAT = 2  # of `training`: counts up whenever resuming needs other things of it than before
_NAME = re.compile(r"checkpoint_rank_(\d{4,})_step_(\d{6,})_loss_(\d+\.\d{4}|NA)\.pt")


# What torch.load raises for bytes that are no checkpoint, or one with a bit flipped: it may fail at any of its steps, a
# seek to a place that cannot be among them.
_DAMAGE = (OSError, RuntimeError, pickle.UnpicklingError, ValueError, EOFError, LookupError, TypeError, AttributeError,
           AssertionError)  # fmt: skip
_OWN_KEYS = {"model_config", "model_state_dict", "step", "loss"}
_TRAINING_KEYS = {"family", "tensors", "scalars", "state", "lanes", "totals", "mixes", "fitness", "genes", "dice",
                  "torch_rng"}  # fmt: skip


class CheckpointError(UserError):
    """A file that is no whole checkpoint of the wanted kind."""


class UnreadableError(CheckpointError):
    """A file that the filesystem did not give, or that memory had no room for: it may be whole, and readable later."""


class OtherVersionError(CheckpointError):
    """A whole checkpoint, whose training state another version of this software wrote."""


@dataclass(frozen=True)
class CheckpointFile:
    """A checkpoint's path and what its name tells: loss in nats per byte, or None if it was not known."""

    path: Path
    rank: int
    step: int
    loss: float | None


def checkpoint_name(rank: int, step: int, loss: float | None) -> str:
    """ "checkpoint_rank_0000_step_000500_loss_1.2345.pt"; an unknown loss is NA."""
    shown = "NA" if loss is None else f"{loss:.4f}"
    return f"checkpoint_rank_{rank:04d}_step_{step:06d}_loss_{shown}.pt"


def list_checkpoints(run_dir: Path) -> list[CheckpointFile]:
    """The checkpoints of a run, all ranks, by their names alone; oldest step first within a rank."""
    found = []
    for path in run_dir.iterdir():
        match = _NAME.fullmatch(path.name)
        if match and not path.is_symlink():
            rank, step, loss = match.groups()
            found.append(CheckpointFile(path, int(rank), int(step), None if loss == "NA" else float(loss)))
    return sorted(found, key=lambda file: (file.rank, file.step, file.path.name))


def save_checkpoint(
    run_dir: Path,
    rank: int,
    step: int,
    loss: float | None,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    training: dict[str, Any],
    document_delimiter: int | None = DEFAULT_DELIMITER,
) -> Path:
    """Write a checkpoint, whole or not at all, and durably; returns its path. Raises OSError (disk full, ...)."""
    path = run_dir / checkpoint_name(rank, step, loss)
    content = {
        "format": FORMAT,
        "model_config": config.to_dict(),
        "model_state_dict": weights,
        "step": step,
        "loss": loss,
        "document_delimiter": document_delimiter,
        "training_format": TRAINING_FORMAT,
        "training": training,
    }
    _write_sealed(path, content)
    return path


def save_weights(
    path: Path,
    config: ModelConfig,
    weights: dict[str, torch.Tensor],
    step: int | None,
    loss: float | None,
    document_delimiter: int | None,
) -> None:
    """Write a checkpoint of a model alone, which read_for_use takes and nobody can resume. Raises OSError."""
    content = {"format": FORMAT, "model_config": config.to_dict(), "model_state_dict": weights}
    _write_sealed(path, content | {"step": step, "loss": loss, "document_delimiter": document_delimiter})


def _write_sealed(path: Path, content: dict[str, Any]) -> None:
    with atomic_writer(path) as file:
        sealed = SealedFile(file)
        try:
            torch.save(content, sealed)
        except RuntimeError as error:
            # torch's writer reports a failed write in its own words; the file system's are clearer.
            raise error.__context__ if isinstance(error.__context__, OSError) else error from None
        sealed.seal()


def checkpoint_bytes(schema: Schema, parameters: int, state: MinLMState) -> int:
    """What a checkpoint takes on disk, at most: tensors by `schema`, averaged weights, and a hidden state."""
    states = sum(tensor.nbytes for tensor in state if tensor is not None)
    structure = 64 * 1024 + 1024 * len(schema.tensors)  # names, shapes, counters, generators
    return schema.nbytes + 4 * parameters + states + structure


def read_checkpoint(path: Path, mapped: bool = True) -> dict[str, Any]:
    """The content of a .pt file, tensors on the CPU; mapped: their bytes are read when touched.

    A mapped file must stay: where another host may remove it, touching it later would kill the process.
    Raises CheckpointError for a file that is missing, unreadable (UnreadableError), truncated, changed since it was
    written, or needs more than weights_only.
    """
    try:
        behind = path.resolve()  # what a link of the run leads to may change, and what a checkpoint's own name does not
        with as_memory_error(), open(behind, "rb") as file:
            # This reads all of it, and raises a disk's error, to which is_zipfile() would answer no.
            sealed = is_sealed(file)
            if not zipfile.is_zipfile(file):  # torch's own words for it are of pickles and versions
                raise ValueError("none, or cut")
            file.seek(0)
            content = torch.load(behind if mapped else file, map_location="cpu", weights_only=True, mmap=mapped)
    except FileNotFoundError:
        raise CheckpointError(f"expected a checkpoint at {path}, got no such file: check the path") from None
    except (*_DAMAGE, MemoryError, SystemError) as error:
        if isinstance(error.__cause__, OSError):  # torch wraps what reading raised
            error = error.__cause__
        reason = str(error).strip().splitlines()[0][:120] if str(error).strip() else type(error).__name__
        damaged = not isinstance(error, OSError | MemoryError) or getattr(error, "errno", None) == errno.EINVAL
        kind = CheckpointError if damaged else UnreadableError
        raise kind(f"expected a whole checkpoint, got {path} ({reason}): choose another file") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"expected a checkpoint, got a {type(content).__name__} in {path}: choose another file")
    ours = str(content.get("format", "")).startswith(_FORMATS)
    if ours and (content["format"] != FORMAT or not sealed):
        raise CheckpointError(f"expected a checkpoint with its digest, got {path} without: choose another file")
    if ours and not _OWN_KEYS <= content.keys():
        raise CheckpointError(f"expected a whole checkpoint, got {path} without some of its parts: choose another file")
    return content


def read_own_checkpoint(path: Path) -> dict[str, Any]:
    """read_checkpoint for one that this software wrote, with a training state that is whole and finite, not mapped.

    Raises CheckpointError, of which OtherVersionError is one.
    """
    content = read_checkpoint(path, mapped=False)
    if content.get("format") != FORMAT or "training" not in content:
        raise CheckpointError(f"expected a checkpoint of this software, got {path}: use --init_from for its weights")
    if content.get("training_format") != TRAINING_FORMAT:
        raise OtherVersionError(
            f"expected a training state of format {TRAINING_FORMAT}, got {path} of another version of this software: "
            "resume with that one, or use --init_from for its weights"
        )
    training = content["training"]
    if not isinstance(training, dict) or not _TRAINING_KEYS <= training.keys():
        raise CheckpointError(f"expected a whole checkpoint, got {path} without some of its parts: choose another file")
    if not all(bool(tensor.isfinite().all()) for tensor in training["tensors"].values()):
        raise CheckpointError(f"expected finite weights, got others in {path}: choose another file")
    return content


def read_for_use(path: Path) -> tuple[ModelConfig, dict[str, torch.Tensor], dict[str, Any]]:
    """A checkpoint's model: its shape, its averaged weights on the CPU, and {"path", "step", "loss",
    "document_delimiter"}, where a file that does not tell of a delimiter has the default one.

    path: a file (ours, the predecessor's, or minGRU-pytorch's) or a run directory (its best.pt, else its latest.pt).
    Raises CheckpointError.
    """
    path = find_model_file(path)
    content = read_checkpoint(path)
    if content.get("format") == FORMAT:
        config, weights = ModelConfig.from_dict(content["model_config"]), content["model_state_dict"]
    else:
        config, weights = convert(content)
    info = {"path": path, "step": content.get("step"), "loss": content.get("loss")}
    return config, weights, info | {"document_delimiter": content.get("document_delimiter", DEFAULT_DELIMITER)}


def load_for_use(path: Path, device: torch.device) -> tuple[MinLM, dict[str, Any]]:
    """The model of a checkpoint with its averaged weights, in eval mode on `device`, and what read_for_use tells of it.

    Raises CheckpointError.
    """
    config, weights, info = read_for_use(path)
    return build_model(config, weights, device).eval(), info


def build_model(config: ModelConfig, weights: dict[str, torch.Tensor], device: torch.device) -> MinLM:
    """A model on `device` with these weights. Raises CheckpointError if they do not fit its shape."""
    model = uninitialised(config, device)
    try:
        model.load_state_dict(weights)
    except RuntimeError as error:
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"expected weights that fit {config}, got others: {reason}") from None
    return model


def find_model_file(path: Path) -> Path:
    """`path` itself if it is a file; the best, else the latest, checkpoint of a run directory. CheckpointError."""
    if not os.path.isdir(path):
        return path
    for name in ("best.pt", "latest.pt"):
        if os.path.isfile(path / name):
            return path / name
    advice = "give a checkpoint file"
    if os.path.isfile(path / "model.safetensors"):
        advice = f"export.py --model {path} --output FILE.pt makes a checkpoint of an exported folder"
    raise CheckpointError(f"expected a run directory with best.pt or latest.pt, got {path}: {advice}")


def best_first(files: list[CheckpointFile]) -> list[CheckpointFile]:
    """Sorted by loss, unknown losses last; of equals the later step first."""
    return sorted(files, key=_by_loss)


def _by_loss(file: CheckpointFile) -> tuple[bool, float, int, int]:
    return (file.loss is None, file.loss or 0.0, -file.step, file.rank)
