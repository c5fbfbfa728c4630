"""A trainer's whole state as plain values and tensors, and back: what makes 10 + 10 steps equal 20."""

import dataclasses
from typing import TYPE_CHECKING, Any

import torch

from mingru.minLM import MinLMState
from runtime.errors import UserError

if TYPE_CHECKING:
    from training.loop import Trainer


def capture(trainer: "Trainer") -> dict[str, Any]:
    """Everything that resuming needs besides the weights and the optimizer's tensors: copies, on the CPU."""
    device = trainer.parts.device
    return {
        "family": trainer.weights.family,
        "scalars": trainer.weights.scalars(),
        "state": {
            name: None if tensor is None else tensor.to("cpu", copy=True)
            for name, tensor in trainer.state._asdict().items()
        },
        "lanes": trainer.parts.lanes.state_dict(),
        "totals": dataclasses.asdict(trainer.totals),
        "mixes": trainer.mixes(),
        "fitness": trainer.parts.fitness.state_dict(),
        "genes": {"lr": trainer.hyperparameter("lr")} | trainer.parts.heredity.values,
        "dice": trainer.dice.getstate(),
        "torch_rng": torch.get_rng_state(),
        "cuda_rng": torch.cuda.get_rng_state(device) if device.type == "cuda" else None,
    }


def restore_weights(trainer: "Trainer", training: dict[str, Any]) -> None:
    """Take the weights and optimizer of a checkpoint. Raises UserError, with nothing changed, if they do not fit."""
    live = trainer.weights.tensors()
    stored = training["tensors"]
    if training["family"] != trainer.weights.family or live.keys() != stored.keys():
        raise UserError(
            f"expected a checkpoint of {trainer.weights.family} over this model, got one of {training['family']}: "
            "resume with the options of config.json"
        )
    for name, tensor in live.items():
        if tensor.shape != stored[name].shape:
            raise UserError(
                f"expected {name} of shape {tuple(tensor.shape)}, got {tuple(stored[name].shape)} in the checkpoint: "
                "its model is another one"
            )
    with torch.no_grad():
        for name, tensor in live.items():
            tensor.copy_(stored[name])
    trainer.weights.load_scalars(training["scalars"])


def restore(trainer: "Trainer", training: dict[str, Any], moves: bool) -> None:
    """Go on from a checkpoint. moves: its place in the data, hidden state, random generators and counters come along;
    otherwise (a new rank that starts from another's weights) only the steps done and behind them do.
    """
    restore_weights(trainer, training)
    trainer.totals.step, trainer.totals.lineage = training["totals"]["step"], training["totals"]["lineage"]
    if not moves:
        return
    trainer.totals = type(trainer.totals)(**training["totals"])
    trainer.saving.step = trainer.totals.step
    trainer.parts.lanes.load_state_dict(training["lanes"])
    trainer.state = _fit_lanes(MinLMState(**training["state"]), trainer.state)
    trainer.mixes_before = training["mixes"]
    trainer.parts.fitness.load_state_dict(training["fitness"])
    trainer.parts.heredity.load(training["genes"])
    trainer.apply_hyperparameters()
    trainer.dice.setstate(training["dice"])
    torch.set_rng_state(training["torch_rng"])
    if trainer.parts.device.type == "cuda" and training["cuda_rng"] is not None:
        torch.cuda.set_rng_state(training["cuda_rng"], trainer.parts.device)


def _fit_lanes(stored: MinLMState, fresh: MinLMState) -> MinLMState:
    """`fresh` with the stored lanes' states in its first lanes: lanes that --batch_size added start at zero."""
    for old, new in zip(stored, fresh, strict=True):
        if new is not None:
            kept = min(old.shape[1], new.shape[1])
            new[:, :kept].copy_(old[:, :kept])
    return fresh
