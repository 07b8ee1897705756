"""The gated scan, as PyTorch custom operator `edgeseq::gated_scan` and differentiable.

B batch, T tokens, D channels.
"""

from __future__ import annotations

import torch
from torch import Tensor


@torch.library.custom_op("edgeseq::gated_scan", mutates_args=())
def _gated_scan(x: Tensor, log_a: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    a, state, outputs = torch.exp(log_a), past, []
    for t in range(x.shape[1]):
        state = a[:, t] * state + x[:, t]
        outputs.append(state)
    return torch.stack(outputs, 1), state.clone()


_gated_scan.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[2])))


def gated_scan(x: Tensor, log_a: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + x_t (Griffin, De et al. 2024, equation 4, without the input's factor).

    x, log_a [B,T,D]; past [B,D]. Returns h [B,T,D] and present [B,D].
    """
    return _gated_scan(x, log_a, past)


def gated_scan_parallel(x: Tensor, log_a: Tensor) -> Tensor:
    """The whole sequence from a zero state, differentiable: sums over 1, 2, 4, ... tokens, log2(T) passes.

    After a pass, h_t is what the last `reach` tokens leave and a_t the decay over them.
    """
    h, a, reach = x, torch.exp(log_a), 1
    while reach < x.shape[1]:
        h = torch.cat([h[:, :reach], h[:, reach:] + a[:, reach:] * h[:, :-reach]], 1)
        a = torch.cat([a[:, :reach], a[:, reach:] * a[:, :-reach]], 1)
        reach *= 2
    return h
