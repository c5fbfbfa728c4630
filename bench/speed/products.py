"""The matrix products of a training step alone: what no implementation of the same model can do without."""

import torch
from torch import nn

from mingru.minLM import MinLM


class Products:
    """For every dense layer the output, the input's gradient and the weight's, all of `rows` rows at one precision."""

    def __init__(self, model: MinLM, rows: int, dtype: torch.dtype, device: torch.device) -> None:
        weights = [layer.weight for layer in model.modules() if isinstance(layer, nn.Linear)]
        self._layers = [
            (
                weight.detach().to(device, dtype, copy=True),
                torch.randn(rows, weight.shape[1]).to(device, dtype),
                torch.randn(rows, weight.shape[0]).to(device, dtype),
            )
            for weight in weights
        ]

    def __call__(self) -> None:
        for weight_OI, input_NI, _ in self._layers:
            torch.mm(input_NI, weight_OI.t())
        for weight_OI, input_NI, grad_NO in reversed(self._layers):
            torch.mm(grad_NO, weight_OI)
            torch.mm(grad_NO.t(), input_NI)
