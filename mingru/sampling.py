"""Choosing the next token: pure functions on logits of shape (B, V), batch and vocabulary."""

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from runtime.errors import UserError

_TINY = torch.finfo(torch.float32).tiny


@dataclass(frozen=True)
class SamplingOptions:
    """How to sample; the filters apply in this order, to the distribution at this temperature.

    temperature: 0 takes the likeliest token, 1 samples the model's distribution. top_k: keep the k likeliest (None:
    all). top_p: keep the fewest likeliest that hold this much probability. min_p: keep those at least this
    fraction of the likeliest's. typical_p: keep the fewest that hold this much, those of surprise closest to the
    entropy first. Raises UserError for values outside their range.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0
    min_p: float = 0.0
    typical_p: float = 1.0

    def __post_init__(self) -> None:
        _check("temperature", self.temperature, "a finite number of at least 0", 0 <= self.temperature < math.inf)
        _check("top_k", self.top_k, "a whole number of at least 1", self.top_k is None or self.top_k >= 1)
        _check("top_p", self.top_p, "a number in (0, 1]", 0 < self.top_p <= 1)
        _check("min_p", self.min_p, "a number in [0, 1]", 0 <= self.min_p <= 1)
        _check("typical_p", self.typical_p, "a number in (0, 1]", 0 < self.typical_p <= 1)


def sample(logits_BV: Tensor, options: SamplingOptions, generator: torch.Generator | None = None) -> Tensor:
    """One token per lane, int64, drawn with `generator` (of the logits' device). Temperature 0 takes the likeliest, as
    one too small for float32 does.

    The token whose logit plus noise of the standard Gumbel distribution is largest is distributed as softmax(logits)
    (Gumbel 1954): neither probabilities nor their sums are needed.
    """
    if options.temperature < _TINY:
        return logits_BV.argmax(dim=-1)
    logits_BV = filter_logits(logits_BV, options)
    exponential_BV = torch.empty_like(logits_BV).exponential_(generator=generator).clamp_(min=_TINY)
    return logits_BV.sub_(exponential_BV.log_()).argmax(dim=-1)


def filter_logits(logits_BV: Tensor, options: SamplingOptions) -> Tensor:
    """float32 logits at a temperature above 0, with -inf for each token that a filter takes out."""
    # The likeliest at 0, so that a tiny temperature cannot overflow.
    logits_BV = logits_BV.float()
    logits_BV = (logits_BV - logits_BV.amax(dim=-1, keepdim=True)) / options.temperature
    if options.top_k is not None:
        logits_BV = top_k(logits_BV, options.top_k)
    if options.top_p < 1:
        logits_BV = top_p(logits_BV, options.top_p)
    if options.min_p > 0:
        logits_BV = min_p(logits_BV, options.min_p)
    if options.typical_p < 1:
        logits_BV = typical_p(logits_BV, options.typical_p)
    return logits_BV


def top_k(logits_BV: Tensor, k: int) -> Tensor:
    """Keep the k likeliest; of equals at the edge, which ones is not defined, but their number is."""
    kept_BK = logits_BV.topk(min(k, logits_BV.shape[-1]), dim=-1).indices
    return _keep(logits_BV, kept_BK, torch.ones_like(kept_BK, dtype=torch.bool))


def top_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest likeliest whose probabilities sum to at least p ("nucleus", arXiv 1904.09751)."""
    sorted_BV, order_BV = logits_BV.sort(dim=-1, descending=True, stable=True)
    return _keep(logits_BV, order_BV, _needed(sorted_BV.softmax(dim=-1), p))


def min_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep those whose probability is at least p times the likeliest's (arXiv 2407.01082)."""
    floor_B1 = logits_BV.amax(dim=-1, keepdim=True) + math.log(p)
    return logits_BV.masked_fill(logits_BV < floor_B1, -math.inf)


def typical_p(logits_BV: Tensor, p: float) -> Tensor:
    """Keep the fewest that sum to at least p, surprises closest to the entropy first (arXiv 2202.00666)."""
    log_BV = logits_BV.log_softmax(dim=-1)
    probabilities_BV = log_BV.exp()
    surprise_BV = -log_BV  # inf where a filter took the token out
    entropy_B1 = (probabilities_BV * surprise_BV).nan_to_num(nan=0.0).sum(dim=-1, keepdim=True)
    order_BV = (surprise_BV - entropy_B1).abs().sort(dim=-1, stable=True).indices
    return _keep(logits_BV, order_BV, _needed(probabilities_BV.gather(-1, order_BV), p))


def _needed(ordered_BV: Tensor, p: float) -> Tensor:
    """True for each while those before it sum to less than p: always for the first, whatever p is in float32."""
    needed_BV = ordered_BV.cumsum(dim=-1) - ordered_BV < p
    needed_BV[:, 0] = True
    return needed_BV


def _keep(logits_BV: Tensor, index_BN: Tensor, kept_BN: Tensor) -> Tensor:
    mask_BV = torch.zeros_like(logits_BV, dtype=torch.bool).scatter(-1, index_BN, kept_BN)
    return logits_BV.masked_fill(~mask_BV, -math.inf)


def _check(name: str, value: object, expected: str, holds: bool) -> None:
    if not holds:
        raise UserError(f"expected for {name} {expected}, got {value!r}: choose another")
