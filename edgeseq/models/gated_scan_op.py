"""The gated scan, as PyTorch custom operator `edgeseq::gated_scan` and differentiable.

B batch, T tokens, D channels.
"""

from __future__ import annotations

from typing import Any

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


@torch.library.custom_op("edgeseq::gated_scan_gradients", mutates_args=())
def _gradients(
    grad_h: Tensor, grad_present: Tensor, h: Tensor, log_a: Tensor, past: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of x, log_a and past: the recurrence run backwards in time."""
    a, G = torch.exp(log_a), grad_h.clone(memory_format=torch.contiguous_format)
    G[:, -1] += grad_present
    for t in range(G.shape[1] - 1, 0, -1):
        G[:, t - 1].addcmul_(a[:, t], G[:, t])
    before = torch.cat([past[:, None], h[:, :-1]], 1)
    return G, G * a * before, a[:, 0] * G[:, 0]


_gradients.register_fake(lambda *args: tuple(torch.empty_like(args[i]) for i in (2, 3, 4)))


def _backward(ctx: Any, grad_h: Tensor, grad_present: Tensor) -> tuple[Tensor, ...]:
    return tuple(_gradients(grad_h, grad_present, *ctx.saved_tensors))


def _context(ctx: Any, inputs: tuple[Tensor, Tensor, Tensor], output: tuple[Tensor, Tensor]) -> None:
    ctx.save_for_backward(output[0], *inputs[1:])


_gated_scan.register_autograd(_backward, setup_context=_context)


def gated_scan(x: Tensor, log_a: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """h_t = exp(log_a_t) h_{t-1} + x_t (Griffin, De et al. 2024, equation 4, without the input's factor).

    x, log_a [B,T,D]; past [B,D]. Returns h [B,T,D] and present [B,D].
    """
    return _gated_scan(x, log_a, past)


def gated_scan_parallel(x: Tensor, log_a: Tensor) -> Tensor:
    """The whole sequence from a zero state, differentiable as `gated_scan` is."""
    return gated_scan(x, log_a, torch.zeros_like(x[:, 0]))[0]
