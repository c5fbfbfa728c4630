"""Which precision a value is left in for the matrix product that takes it next."""

import torch
from torch import Tensor


def product_dtype(x: Tensor) -> torch.dtype:
    """Under autocast on a CPU the dtype of matrix products, to which it would round what they are given; else x's."""
    return torch.get_autocast_dtype("cpu") if torch.is_autocast_enabled("cpu") else x.dtype
