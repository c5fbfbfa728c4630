"""A soup: one model whose every weight is the mean of that weight in several models of one shape.

Model soups: Wortsman et al., 2022, arXiv 2203.05482. It helps where the models are close relatives, as the elites of
one population may be; models that were trained apart average to ruin, so score it before you use it.
"""

import dataclasses
from collections.abc import Sequence
from pathlib import Path

import torch

from runtime.errors import UserError
from training.exported import Model


def average(models: Sequence[Model], paths: Sequence[Path]) -> Model:
    """The mean of all weights, summed in float64. Its step is the latest of theirs, its loss not known.

    paths: of the models, for the error's text. Raises UserError if the shapes or the document delimiters differ.
    """
    first = models[0]
    for model, path in zip(models, paths, strict=True):
        if dataclasses.replace(model.config, dropout=first.config.dropout) != first.config:
            raise UserError(
                f"expected models of one shape, got {first.config} in {paths[0]} and {model.config} in {path}: "
                "leave one out"
            )
        if model.document_delimiter != first.document_delimiter:
            raise UserError(
                f"expected models that end documents alike, got one of delimiter {_hexadecimal(first)} in {paths[0]} "
                f"and of {_hexadecimal(model)} in {path}: leave one out"
            )
    weights = {name: _mean([model.weights[name] for model in models]) for name in first.weights}
    steps = [model.step for model in models if model.step is not None]
    return Model(first.config, weights, max(steps, default=None), None, first.document_delimiter)


def _hexadecimal(model: Model) -> str:
    return "none" if model.document_delimiter is None else f"{model.document_delimiter:02x}"


def _mean(tensors: Sequence[torch.Tensor]) -> torch.Tensor:
    total = torch.zeros_like(tensors[0], dtype=torch.float64)
    for tensor in tensors:
        total += tensor
    return (total / len(tensors)).to(tensors[0].dtype)
