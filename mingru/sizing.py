"""From a number of parameters to the width and depth of a model, and back."""

import math
from collections.abc import Callable, Iterator

from mingru.minLM import ModelConfig
from runtime.errors import UserError

TOLERANCE = 0.01  # of the parameters asked for
DEFAULT_DIM = 256


def parameter_count(config: ModelConfig) -> int:
    """The parameters of MinLM(config), without building it."""
    dim, inner, ff, kernel_size = config.dim, config.dim_inner, config.dim_ff, config.conv_kernel_size
    recurrence = dim + 2 * dim * inner + (inner * dim if config.expansion != 1 else 0)
    feed_forward = dim + (dim * ff + ff) + (ff * dim + dim) if ff else 0
    convolution = (kernel_size * dim + dim) + (dim * dim + dim) if kernel_size else 0
    return 2 * config.num_tokens * dim + dim + config.depth * (recurrence + feed_forward + convolution)


def preferred_depth(dim: int) -> float:
    """The depth that goes with a width: 4 at 192, 8 at 512, 19 at 2048, 31 at 4096."""
    return 4 * (dim / 192) ** (2 / 3)


def resolve_config(
    params: int | None = None,
    dim: int | None = None,
    depth: int | None = None,
    expansion: float = 1.5,
    ff_mult: float = 4.0,
    conv_kernel_size: int | None = None,
    dropout: float = 0.0,
) -> ModelConfig:
    """The model of `params` parameters, within 1 %; `dim` or `depth` may be given too, and the other is found.

    Without `params`, dim and depth are as given, and what is missing follows from the other or from a small default.
    Raises UserError if no such model exists, or dim, depth and params disagree.
    """

    def build(dim: int, depth: int) -> ModelConfig:
        return ModelConfig(
            dim, depth, expansion=expansion, ff_mult=ff_mult, conv_kernel_size=conv_kernel_size, dropout=dropout
        )

    if params is None:
        if dim is None:
            dim = DEFAULT_DIM if depth is None else 64 * max(1, round(192 * (depth / 4) ** 1.5 / 64))
        return build(dim, max(1, round(preferred_depth(dim))) if depth is None else depth)
    best, best_cost, nearest, nearest_error = None, math.inf, None, math.inf
    for width in _widths(params, build) if dim is None else [dim]:
        for layers in _depths(params, build(width, 1), build(width, 2)) if depth is None else [depth]:
            config = build(width, layers)
            error = abs(parameter_count(config) / params - 1)
            if error < nearest_error:
                nearest, nearest_error = config, error
            cost = abs(math.log(layers / preferred_depth(width))) + 10 * error + _roughness(width)
            if error <= TOLERANCE and cost < best_cost:
                best, best_cost = config, cost
    if best is not None:
        return best
    raise UserError(
        f"expected a size that a model can have within {TOLERANCE:.0%}, got params {params} (the nearest has "
        f"{parameter_count(nearest)}, with dim {nearest.dim} and depth {nearest.depth}): change the size, dim or depth"
    )


def _widths(params: int, build: Callable[[int, int], ModelConfig]) -> Iterator[int]:
    """Multiples of 8, up to those of which one layer is already too large."""
    width = 8
    while width == 8 or parameter_count(build(width, 1)) <= (1 + TOLERANCE) * params:
        yield width
        width += 8


def _roughness(dim: int) -> float:
    """What a width costs that is no multiple of 64, the grain that matrix kernels like: 0.1 for each halving."""
    return 0.1 * (6 - min(6, (dim & -dim).bit_length() - 1))


def _depths(params: int, one: ModelConfig, two: ModelConfig) -> list[int]:
    """The two depths around `params`."""
    layer = parameter_count(two) - parameter_count(one)
    below = max(1, 1 + (params - parameter_count(one)) // layer)
    return [below, below + 1]
