"""One byte after another on the CPU: a step in C that reads each weight once, for a few lanes at a time."""

import ctypes
import functools
from ctypes import CDLL, POINTER, byref, c_float, c_int64, c_void_p
from pathlib import Path

import torch
from torch import Tensor

from mingru.minLM import MinLM, MinLMState
from mingru.norm import EPSILON
from runtime.native import SUFFIXES, for_each_dtype, load_or_warn

MOST_LANES = 16  # with more, torch's matrix products may use the weights better


class _Layer(ctypes.Structure):
    _fields_ = [
        (name, c_void_p)
        for name in (
            "taps", "taps_bias", "pointwise", "pointwise_bias", "norm", "hidden_and_gate", "out", "ff_norm", "up",
            "up_bias", "down", "down_bias",
        )
    ]  # fmt: skip


class _Shape(ctypes.Structure):
    _fields_ = [*((name, c_int64) for name in ("N", "D", "E", "F", "K", "V", "layers")), ("epsilon", c_float)]


@functools.cache
def kernels() -> CDLL | None:
    """The compiled kernels; None where they cannot be had, which is said once."""
    signatures = {
        "decode_step": (None, POINTER(_Shape), POINTER(_Layer), *[c_void_p] * 8, c_int64),
    }
    return load_or_warn(Path(__file__).with_name("decode_native.c"), "decoding", "slower", for_each_dtype(signatures))


class Decoder:
    """A model in evaluation, ready to go on from a state one token at a time.

    The weights are the model's own, float32 or bfloat16, and must stay as and where they are. fits() says whether this
    is of use for a model and a number of lanes.
    """

    def __init__(self, model: MinLM) -> None:
        self._model = model
        self._kept: list[Tensor] = []  # float32 copies of vectors that the model keeps in bfloat16
        self._layers = (_Layer * model.config.depth)(*map(self._layer, model.layers))
        self._embedding = self._vector(model.token_emb.weight)
        self._norm = self._vector(model.norm.weight)
        config = model.config
        self._shape = _Shape(
            N=0, D=config.dim, E=config.dim_inner, F=config.dim_ff, K=config.conv_kernel_size or 0,
            V=config.num_tokens, layers=config.depth, epsilon=EPSILON,
        )  # fmt: skip
        self._step = getattr(kernels(), f"decode_step_{SUFFIXES[model.token_emb.weight.dtype]}")
        self._scratch = torch.empty(0)

    @staticmethod
    def fits(model: MinLM, lanes: int) -> bool:
        """Whether a step here is faster than the model's own: a CPU, a few lanes, and a compiler."""
        weight = model.token_emb.weight
        small = weight.device.type == "cpu" and weight.dtype in SUFFIXES and lanes <= MOST_LANES
        return small and kernels() is not None

    def step(self, ids_N: Tensor, state: MinLMState, reset_N: Tensor | None = None) -> tuple[Tensor, MinLMState]:
        """Logits (N, V), float32, of the token after ids_N (int64), and the state after it; `state` is left alone.

        reset_N (bool): True where a document starts at this token. Raises ValueError for a token that is none.
        """
        config = self._model.config
        check_tokens(ids_N, config.num_tokens)
        ids_N = ids_N.contiguous()
        hidden_LNE = state.hidden.to(torch.float32).clone(memory_format=torch.contiguous_format)
        past_LNSD = None
        if state.conv is not None:
            past_LNSD = state.conv.to(torch.float32).clone(memory_format=torch.contiguous_format)
        if reset_N is not None and reset_N.any():
            for carried in (hidden_LNE, past_LNSD):
                if carried is not None:
                    carried[:, reset_N] = 0
        N, D, E, F, threads = len(ids_N), config.dim, config.dim_inner, config.dim_ff, torch.get_num_threads()
        self._shape.N = N
        logits_NV = torch.empty(N, config.num_tokens)
        floats = N * (3 * D + 2 * E + F) + threads * (N * D + max(D, E, F))
        if len(self._scratch) < floats:
            self._scratch = torch.empty(floats)
        self._step(
            byref(self._shape), self._layers, self._embedding, self._norm, _address(self._model.to_logits.weight),
            ids_N.data_ptr(), hidden_LNE.data_ptr(), _address(past_LNSD), logits_NV.data_ptr(),
            self._scratch.data_ptr(), threads,
        )  # fmt: skip
        return logits_NV, MinLMState(hidden_LNE, past_LNSD)

    def _layer(self, block: torch.nn.Module) -> _Layer:
        conv, mingru, ff = block.conv, block.mingru, block.ff
        return _Layer(
            taps=conv and self._vector(conv.taps),
            taps_bias=conv and self._vector(conv.bias),
            pointwise=conv and _address(conv.pointwise.weight),
            pointwise_bias=conv and self._vector(conv.pointwise.bias),
            norm=self._vector(block.norm.weight),
            hidden_and_gate=_address(mingru.to_hidden_and_gate.weight),
            out=_address(getattr(mingru.to_out, "weight", None)),
            ff_norm=ff and self._vector(block.ff_norm.weight),
            up=ff and _address(ff.up.weight),
            up_bias=ff and self._vector(ff.up.bias),
            down=ff and _address(ff.down.weight),
            down_bias=ff and self._vector(ff.down.bias),
        )

    def _vector(self, tensor: Tensor) -> int:
        """Address of `tensor` in float32: its own, or a copy's that this decoder keeps."""
        self._kept.append(tensor.detach().float().contiguous())
        return self._kept[-1].data_ptr()


def check_tokens(ids_N: Tensor, num_tokens: int) -> None:
    """Raises ValueError unless all of ids_N, in host memory, are tokens."""
    if not (ids_N.dtype == torch.int64 and all(0 <= token < num_tokens for token in ids_N.tolist())):
        raise ValueError(f"expected int64 tokens from 0 to {num_tokens - 1}, got {ids_N}")


def _address(tensor: Tensor | None) -> int | None:
    if tensor is None:
        return None
    assert tensor.is_contiguous()
    return tensor.data_ptr()
