"""Weights from elsewhere: minGRU-pytorch's minLM, and the predecessor's checkpoints, which use the same names."""

import math
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from mingru.minLM import ModelConfig
from runtime.errors import UserError

# Within layers.N: their name, and ours.
_LAYER_NAMES = {
    "0.net.0.weight": "conv.taps",
    "0.net.0.bias": "conv.bias",
    "0.net.1.weight": "conv.pointwise.weight",
    "0.net.1.bias": "conv.pointwise.bias",
    "1.weight": "norm.weight",
    "2.to_hidden_and_gate.weight": "mingru.to_hidden_and_gate.weight",
    "2.to_out.weight": "mingru.to_out.weight",
    "3.weight": "ff_norm.weight",
    "4.0.weight": "ff.up.weight",
    "4.0.bias": "ff.up.bias",
    "4.2.weight": "ff.down.weight",
    "4.2.bias": "ff.down.bias",
}
_TOP_NAMES = ("token_emb.weight", "norm.weight", "to_logits.weight")
_COMPILED_PREFIX = "_orig_mod."


def convert(checkpoint: Mapping[str, Any]) -> tuple[ModelConfig, dict[str, Tensor]]:
    """The config and the state dict for MinLM (float32) of a state dict of minLM, or of a predecessor's checkpoint.

    The shape is read off the weights themselves; a predecessor's `model_config` must agree and adds the dropout.
    Raises UserError for anything else.
    """
    stored = checkpoint.get("model_config")
    weights = checkpoint.get("model_state_dict", checkpoint)
    if not isinstance(weights, Mapping) or not (stored is None or isinstance(stored, Mapping)):
        raise UserError("expected model_config and model_state_dict to be dicts, got others: choose another checkpoint")
    weights = {str(name).removeprefix(_COMPILED_PREFIX): value for name, value in weights.items()}
    _refuse_other_models(weights)
    state = {_our_name(name): _dense(name, tensor) for name, tensor in weights.items()}
    return _config(state, stored or {}), state


def _refuse_other_models(weights: Mapping[str, Any]) -> None:
    if not set(_TOP_NAMES) <= set(weights):
        missing = next(name for name in _TOP_NAMES if name not in weights)
        raise UserError(f"expected a language model's weights, got a file without {missing}: choose another checkpoint")
    for name in weights:
        if name.endswith("to_hidden_and_f_i_gate.weight"):
            raise UserError("expected a minGRU model, got a minLSTM: choose another checkpoint")
        if name.endswith((".0.conv.weight", ".0.proj.weight")):
            raise UserError(
                "expected a depthwise convolution, got the predecessor's dense one, which no other model computes: "
                "choose a checkpoint without convolution"
            )


def _our_name(name: str) -> str:
    if name in _TOP_NAMES:
        return name
    group, _, rest = name.partition(".")
    layer, _, rest = rest.partition(".")
    if group != "layers" or not (layer.isascii() and layer.isdigit()) or rest not in _LAYER_NAMES:
        raise UserError(f"expected the weights of minGRU-pytorch's minLM, got one named {name!r}: choose another file")
    return f"layers.{int(layer)}.{_LAYER_NAMES[rest]}"


def _dense(name: str, tensor: object) -> Tensor:
    if not isinstance(tensor, Tensor) or not tensor.is_floating_point():
        raise UserError(
            f"expected a floating-point tensor for {name}, got {type(tensor).__name__}: choose another file"
        )
    tensor = tensor.detach().to(torch.float32)
    if ".0.net.0.weight" in name and tensor.ndim == 3:  # (D, 1, K) -> (K, D)
        tensor = tensor.flatten(1).t().contiguous()
    elif ".0.net.1.weight" in name and tensor.ndim == 3:  # (D, D, 1) -> (D, D)
        tensor = tensor.flatten(1)
    return tensor


def _config(state: Mapping[str, Tensor], stored: Mapping[str, Any]) -> ModelConfig:
    """The config that the tensors' shapes tell. Shapes that contradict it are found when the model loads them."""
    first = {name.removeprefix("layers.0."): tensor for name, tensor in state.items() if name.startswith("layers.0.")}
    gate, up, taps = (first.get(n) for n in ("mingru.to_hidden_and_gate.weight", "ff.up.weight", "conv.taps"))
    embedding = state["token_emb.weight"]
    if gate is None or gate.ndim != 2 or embedding.ndim != 2:
        raise UserError(
            "expected layers.0.2.to_hidden_and_gate.weight and a 2-d embedding, got none: choose another file"
        )
    num_tokens, dim = embedding.shape
    depth = 1 + max(int(name.split(".")[1]) for name in state if name.startswith("layers."))
    config = ModelConfig(
        dim=dim,
        depth=depth,
        num_tokens=num_tokens,
        expansion=_ratio(gate.shape[0] // 2, dim, never_one="mingru.to_out.weight" in first),
        ff_mult=0.0 if up is None else _ratio(up.shape[0], dim),
        conv_kernel_size=None if taps is None else taps.shape[0],
        dropout=stored.get("dropout", 0.0),
    )
    for name in ("num_tokens", "dim", "depth"):
        if stored.get(name, getattr(config, name)) != getattr(config, name):
            raise UserError(
                f"expected {name} {getattr(config, name)} as the weights have, got {stored[name]!r} in model_config: "
                "choose another checkpoint"
            )
    return config


def _ratio(whole: int, dim: int, never_one: bool = False) -> float:
    """A factor such that int(dim * factor) == whole; never_one: other than 1, the factor that means no projection."""
    factor = whole / dim
    if int(dim * factor) != whole:  # the quotient was rounded down
        factor = math.nextafter(factor, math.inf)
    return (whole + 0.5) / dim if never_one and factor == 1 else factor
