"""A model for others' software: a folder with model.safetensors, the averaged weights, and config.json, their shape."""

import contextlib
import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from mingru.minLM import ModelConfig, uninitialised
from runtime.errors import UserError
from runtime.files import atomic_write, sync_folder, temporary_name
from training.checkpoint import read_for_use, save_weights
from training.options import DEFAULT_DELIMITER

FORMAT = "gruboros model 1"
WEIGHTS_NAME = "model.safetensors"
CONFIG_NAME = "config.json"


@dataclass(frozen=True)
class Model:
    """Averaged weights (float32, on the CPU) and their shape; step, loss: of the checkpoint, None if not known;
    document_delimiter: the byte at which a document ended in training, None: none did."""

    config: ModelConfig
    weights: dict[str, torch.Tensor]
    step: int | None
    loss: float | None
    document_delimiter: int | None


def read_model(path: Path) -> Model:
    """The model of an exported folder, a run directory (its best.pt) or a checkpoint, ours or minGRU-pytorch's.

    Raises UserError for anything else, and for weights that do not fit their config.json or are not finite.
    """
    if os.path.exists(path / WEIGHTS_NAME):
        model = _read_folder(path)
    else:
        config, weights, info = read_for_use(path)
        model = Model(config, weights, info["step"], info["loss"], info["document_delimiter"])
    _check_weights(model, path)
    return model


def refuse_existing(output: Path) -> None:
    """Raise UserError if there is something at `output`."""
    if os.path.lexists(output):
        raise UserError(f"expected a new --output, got {output}, which exists: remove it or choose another")


def write_model(model: Model, output: Path) -> None:
    """Write a checkpoint if `output` ends in .pt, else a folder; whole or not at all. Raises UserError, OSError."""
    output.parent.mkdir(parents=True, exist_ok=True)
    if output.suffix == ".pt":
        save_weights(output, model.config, model.weights, model.step, model.loss, model.document_delimiter)
        return
    safetensors = _safetensors()
    content = {
        "format": FORMAT, "model_config": model.config.to_dict(), "step": model.step, "loss": model.loss,
        "document_delimiter": model.document_delimiter,
    }  # fmt: skip
    temporary = temporary_name(output)
    temporary.mkdir()
    with contextlib.ExitStack() as undoing:
        undoing.callback(shutil.rmtree, temporary)
        contiguous = {name: tensor.contiguous() for name, tensor in model.weights.items()}
        try:
            safetensors.torch.save_file(contiguous, temporary / WEIGHTS_NAME, metadata={"format": "pt"})
        except safetensors.SafetensorError as error:  # how it reports a full disk
            raise OSError(None, str(error)) from None
        _sync_file(temporary / WEIGHTS_NAME)
        atomic_write(temporary / CONFIG_NAME, json.dumps(content, indent=2) + "\n")
        shutil.copymode(temporary / CONFIG_NAME, temporary / WEIGHTS_NAME)  # safetensors writes for its user alone
        os.rename(temporary, output)
        undoing.pop_all()
    sync_folder(output.parent)


def _read_folder(folder: Path) -> Model:
    safetensors = _safetensors()
    try:
        content = json.loads((folder / CONFIG_NAME).read_text(encoding="utf-8"))
        if not isinstance(content, Mapping) or content.get("format") != FORMAT:
            raise ValueError(f"{CONFIG_NAME} is not of the format {FORMAT!r}")
        if not isinstance(content.get("model_config"), Mapping):
            raise ValueError(f"{CONFIG_NAME} has no model_config")
        delimiter = content.get("document_delimiter", DEFAULT_DELIMITER)
        if delimiter is not None and not (type(delimiter) is int and 0 <= delimiter <= 255):
            raise ValueError(f"{CONFIG_NAME} has no byte as document_delimiter")
        weights = safetensors.torch.load_file(folder / WEIGHTS_NAME)
    except (OSError, ValueError, safetensors.SafetensorError) as error:
        reason = getattr(error, "strerror", None) or " ".join(str(error).split())[:120]
        raise UserError(
            f"expected a folder with {WEIGHTS_NAME} and {CONFIG_NAME} as export.py writes it, got {folder} ({reason}): "
            "choose another"
        ) from None
    config = ModelConfig.from_dict(content["model_config"])
    return Model(config, weights, content.get("step"), content.get("loss"), delimiter)


def _check_weights(model: Model, path: Path) -> None:
    wanted = uninitialised(model.config, torch.device("meta")).state_dict()
    for name in sorted(wanted.keys() ^ model.weights.keys()):
        lack = "no" if name in wanted else "an unknown"
        raise UserError(f"expected the weights of {model.config}, got {lack} {name} in {path}: choose another")
    for name, tensor in model.weights.items():
        if tensor.shape != wanted[name].shape or tensor.dtype != torch.float32:
            raise UserError(
                f"expected {name} in float32 of shape {list(wanted[name].shape)}, got {tensor.dtype} of "
                f"{list(tensor.shape)} in {path}: choose another"
            )
        if not tensor.isfinite().all():
            raise UserError(f"expected finite weights, got others in {name} of {path}: choose another")


def _sync_file(path: Path) -> None:
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def _safetensors() -> Any:
    """Imported here alone: only who exports needs it."""
    try:
        import safetensors.torch
    except ImportError:
        raise UserError("expected the package safetensors, got none: run pip install -r requirements.txt") from None
    return safetensors
