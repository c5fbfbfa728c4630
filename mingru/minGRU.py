"""The minGRU layer of "Were RNNs All We Needed?" (arXiv 2410.01201), with minGRU-pytorch's signature and names."""

from torch import Tensor, nn

from mingru.scan import scan


class minGRU(nn.Module):
    """A recurrent layer whose gate and candidate see only the input, so that all time steps run in parallel.

    dim: width of input and output; the state is int(dim * expansion_factor) wide. proj_out: project the state back to
    `dim` (None: exactly when expansion_factor is not 1); without it the output is as wide as the state.
    """

    def __init__(self, dim: int, expansion_factor: float = 1.0, proj_out: bool | None = None) -> None:
        super().__init__()
        dim_inner = int(dim * expansion_factor)
        if proj_out is None:
            proj_out = expansion_factor != 1.0
        self.to_hidden_and_gate = nn.Linear(dim, dim_inner * 2, bias=False)
        self.to_out = nn.Linear(dim_inner, dim, bias=False) if proj_out else nn.Identity()

    def forward(
        self,
        x: Tensor,
        prev_hidden: Tensor | None = None,
        return_next_prev_hidden: bool = False,
        reset: Tensor | None = None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        """The output for x (B, T, D); with return_next_prev_hidden also the state (B, 1, E) to hand to the next call.

        prev_hidden: the state (B, 1, E) before x (None: zeros). reset (B, T) bool: where True, the step starts afresh.
        The state is float32 (float64 for a float64 layer), whatever dtype the layer computes in.
        """
        prev_hidden_BE = None if prev_hidden is None else prev_hidden.squeeze(1)
        h_BTE, last_BE = scan(self.to_hidden_and_gate(x), prev_hidden_BE, reset)
        out_BTD = self.to_out(h_BTE)
        return (out_BTD, last_BE.unsqueeze(1)) if return_next_prev_hidden else out_BTD
