"""Sizes in, shapes out."""

import pytest

from mingru import MinLM, ModelConfig
from mingru.sizing import parameter_count, preferred_depth, resolve_config
from runtime.errors import UserError

M, G = 1024**2, 1024**3


@pytest.mark.parametrize(
    "options",
    [{}, {"expansion": 1.0}, {"ff_mult": 0}, {"conv_kernel_size": 3}, {"expansion": 1.3, "ff_mult": 2.7}],
    ids=str,
)
def test_parameter_count_is_that_of_the_built_model(options):
    config = ModelConfig(dim=40, depth=3, num_tokens=100, **options)
    assert parameter_count(config) == sum(parameter.numel() for parameter in MinLM(config).parameters())


@pytest.mark.parametrize("conv", [None, 4], ids=["plain", "conv"])
@pytest.mark.parametrize("params", [100_000, M, 15 * M, 100 * M, 350 * M, G, 7 * G])
def test_resolve_config_meets_the_size(params, conv):
    config = resolve_config(params, conv_kernel_size=conv)
    assert abs(parameter_count(config) - params) <= 0.01 * params
    assert config.dim % 8 == 0 and (params < G or config.dim % 64 == 0)
    assert 0.5 <= config.depth / preferred_depth(config.dim) <= 2 or params < M


def test_resolve_config_solves_for_what_is_missing():
    deep = resolve_config(15 * M, depth=6)
    assert deep.depth == 6 and abs(parameter_count(deep) - 15 * M) <= 0.01 * 15 * M
    wide = resolve_config(350 * M, dim=1024)
    assert wide.dim == 1024 and abs(parameter_count(wide) - 350 * M) <= 0.01 * 350 * M


def test_resolve_config_takes_what_is_given():
    config = resolve_config(dim=48, depth=3, expansion=2.0, ff_mult=0, conv_kernel_size=3, dropout=0.1)
    assert config == ModelConfig(48, 3, expansion=2.0, ff_mult=0, conv_kernel_size=3, dropout=0.1)
    assert resolve_config(dim=512).dim == 512 and resolve_config(depth=12).depth == 12
    assert parameter_count(resolve_config()) < 10 * M


@pytest.mark.parametrize("given", [{"params": 10}, {"params": M, "dim": 1024}, {"params": M, "dim": 64, "depth": 2}])
def test_resolve_config_refuses_what_cannot_be(given):
    with pytest.raises(UserError, match=r"within 1%, got params .*the nearest has"):
        resolve_config(**given)
