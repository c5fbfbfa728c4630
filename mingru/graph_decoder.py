"""One byte after another on a GPU: the model's own step, recorded once as a graph and replayed by one call a byte."""

import gc
from collections.abc import Callable

import torch
from torch import Tensor

from mingru.decoder import check_tokens
from mingru.minLM import MinLM, MinLMState

_WARM_UPS = 3  # steps before the one that is recorded, in which libraries choose kernels and make workspaces


class GraphDecoder:
    """A model in evaluation, ready to go on from a state one token at a time, always with as many lanes.

    The weights are the model's own, of any dtype, and must stay as and where they are. On a device that has no graphs
    each step runs as usual.
    """

    @torch.inference_mode()
    def __init__(self, model: MinLM, lanes: int) -> None:
        weight = model.token_emb.weight
        self._model = model
        self._ids_N = torch.zeros(lanes, dtype=torch.int64, device=weight.device)
        self._reset_N = torch.zeros(lanes, dtype=torch.bool, device=weight.device)
        self._logits_NV = weight.new_zeros(lanes, model.config.num_tokens)
        self._state = model.initial_state(lanes)
        self._run = recorded(self._launch, weight.device) if weight.is_cuda else self._launch

    @staticmethod
    def fits(model: MinLM) -> bool:
        """Whether a step here is faster than the model's own: on a GPU, where launches take longer than the work."""
        return model.token_emb.weight.is_cuda

    @torch.inference_mode()
    def step(self, ids_N: Tensor, state: MinLMState, reset_N: Tensor | None = None) -> tuple[Tensor, MinLMState]:
        """Logits (N, V) of the token after ids_N (int64, in host memory), and the state after it; `state` is left
        alone, unless it is the one that the last step returned. The next step overwrites what this one returns.

        reset_N (bool): True where a document starts at this token. Raises ValueError for a token that is none.
        """
        check_tokens(ids_N, self._model.config.num_tokens)
        if state is not self._state:
            self._state.put(slice(None), state)
        self._ids_N.copy_(ids_N)
        if reset_N is None:
            self._reset_N.zero_()
        else:
            self._reset_N.copy_(reset_N)
        self._run()
        return self._logits_NV, self._state

    def _launch(self) -> None:
        """The step, from the buffers into the buffers. What it launches depends on no value, and it waits for none."""
        self._state.hidden.masked_fill_(self._reset_N[:, None], 0)
        if self._state.conv is not None:
            self._state.conv.masked_fill_(self._reset_N[:, None, None], 0)
        logits_N1V, after = self._model(self._ids_N.unsqueeze(1), self._state)
        self._logits_NV.copy_(logits_N1V.squeeze(1))
        self._state.put(slice(None), after)


def recorded(launch: Callable[[], None], device: torch.device) -> Callable[[], None]:
    """What replays all that `launch` gives to the GPU `device`; launch() itself runs a few times before."""
    stream = torch.cuda.Stream(device)
    stream.wait_stream(torch.cuda.current_stream(device))
    with torch.cuda.stream(stream):
        for _ in range(_WARM_UPS):
            launch()
    gc.collect()  # what is let go of in the midst of a recording could break it
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):  # on the stream of the warm-up, whose workspaces exist
        launch()
    torch.cuda.current_stream(device).wait_stream(stream)
    return graph.replay
