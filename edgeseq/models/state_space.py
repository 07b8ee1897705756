"""What the time-invariant state space models share: convolution by FFT, kernels of modes, discretisation, first values.

B batch, T tokens, C channels, N modes (each stands for a conjugate pair where a factor of 2 says so).
Steps are computed in double precision and rounded once to float32, in training as in export, so that the convolution
that is trained and the recurrence that runs have the same poles to the last bit.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models.base import Array
from edgeseq.models.base import normal as gaussian
from edgeseq.models.stack import random_tensor as stack_tensor

DT_RANGE = (1e-3, 1e-1)  # step sizes at the start, log-uniform as published


class GatedOutput(nn.Module):
    """What follows a state space model: y [..,d] -> W_1 g * sigmoid(W_2 g) with g = gelu(y), exact form."""

    def __init__(self, d_model: int) -> None:
        super().__init__()
        self.out_proj = nn.Linear(d_model, 2 * d_model)

    def forward(self, y: Tensor) -> Tensor:
        a, b = self.out_proj(F.gelu(y)).chunk(2, -1)
        return a * torch.sigmoid(b)


def fft_conv(u: Tensor, kernel: Tensor) -> Tensor:
    """Causal convolution of a whole sequence: u [B,T,C], kernel [C,T'] -> [B,T,C]; differentiable."""
    tokens = u.shape[1]
    length = 1 << (tokens + min(tokens, kernel.shape[1]) - 1).bit_length()
    spectrum = torch.fft.rfft(u.transpose(1, 2), n=length) * torch.fft.rfft(kernel[:, :tokens], n=length)
    return torch.fft.irfft(spectrum, n=length)[..., :tokens].transpose(1, 2)


def complex_of(pair: Tensor) -> Tensor:
    """[N,2,C] -> complex128 [N,C]."""
    return torch.complex(pair[:, 0].double(), pair[:, 1].double())


def pair_of(x: Tensor) -> Tensor:
    """Complex [N,C] -> float32 [N,2,C], rounded once."""
    return torch.stack([x.real, x.imag], 1).float()


def modal_kernel(poles: Tensor, residues: Tensor, tokens: int) -> Tensor:
    """The response Re sum_n c_n a_n^t of DiagScan: poles [N,2,C] or [N,2,1], residues [N,2,C] -> float32 [C,tokens].

    a^(S i + j) = a^(S i) a^j, so the powers are two short tables and their products one matrix product per channel.
    """
    a, c = complex_of(poles), complex_of(residues)
    log = torch.log(torch.where(a == 0, torch.full_like(a, 1e-30), a))
    side = math.isqrt(max(tokens - 1, 0)) + 1
    step = torch.arange(side, device=a.device, dtype=torch.float64)
    fine = torch.exp(log[..., None] * step).transpose(0, 1)  # [C|1,N,S]
    coarse = (c[..., None] * torch.exp(log[..., None] * (side * step))).transpose(0, 1)  # [C,N,S]
    rows = torch.cat([coarse.real, -coarse.imag], 1).transpose(1, 2)  # [C,S,2N]
    kernel = rows @ torch.cat([fine.real, fine.imag], 1)  # [C,S,S]
    return kernel.flatten(1)[:, :tokens].float()


def dense_kernel(a: Tensor, b: Tensor, c: Tensor, tokens: int) -> Tensor:
    """The response c a^t b of DenseScan: a [N,N,C], b, c [N,C] -> float32 [C,tokens], in double on the way."""
    A, x, y = (t.double() for t in (a.permute(2, 0, 1), b.T[:, :, None], c.T[:, None]))  # [C,N,N], [C,N,1], [C,1,N]
    side = 1
    while side * side < tokens:
        x, A, side = torch.cat([x, A @ x], 2), A @ A, 2 * side  # columns a^0 b .. a^(S-1) b
    rows = 1
    while rows * side < tokens:
        y, A, rows = torch.cat([y, y @ A], 1), A @ A, 2 * rows  # rows c, c a^S, c a^2S ..
    return (y @ x).flatten(1)[:, :tokens].float()


def zoh(z: Tensor) -> tuple[Tensor, Tensor]:
    """Zero-order hold: z = dt A, complex -> exp(z) and the input factor per dt, (exp(z) - 1) / z."""
    a = torch.exp(z)
    # expm1 of a complex number without cancellation: e^x cos y - 1 = expm1(x) cos y - 2 sin(y/2)^2
    x, y = z.real, z.imag
    less_one = torch.complex(torch.expm1(x) * torch.cos(y) - 2 * torch.sin(y / 2) ** 2, torch.exp(x) * torch.sin(y))
    return a, less_one / z


def bilinear(z: Tensor) -> tuple[Tensor, Tensor]:
    """Tustin's method: z = dt A -> (1 + z/2) / (1 - z/2) and the input factor per dt, 1 / (1 - z/2)."""
    return (1 + z / 2) / (1 - z / 2), 1 / (1 - z / 2)


DISCRETISE = {"zoh": zoh, "bilinear": bilinear}


def delayed(u: Tensor, steps: int) -> Tensor:
    """u [B,T,C] `steps` tokens later, zeros first."""
    return F.pad(u, (0, 0, steps, 0))[:, : u.shape[1]]


def numpy_of(function: Callable[..., tuple[Tensor, ...]], *arrays: Array) -> list[Array]:
    """Results of `function` on these tensors as numpy arrays: how an export derives what training computes."""
    with torch.no_grad():
        return [t.contiguous().numpy() for t in function(*(torch.from_numpy(np.array(a)) for a in arrays))]


def random_log_dt(shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """log dt, uniform between the ends of DT_RANGE."""
    low, high = map(math.log, DT_RANGE)
    return rng.uniform(low, high, shape).astype(np.float32)


def random_tensor(c: object, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """First values that the families have in common: dt log-uniform, C complex Gaussian of variance 1, D Gaussian."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "log_dt":
        return random_log_dt(shape, rng)
    if leaf == "log_A_real":
        return np.full(shape, math.log(0.5), np.float32)
    if leaf == "C":
        return gaussian(rng, shape, math.sqrt(0.5))
    if leaf == "D":
        return gaussian(rng, shape, 1.0)
    return stack_tensor(c, name, shape, rng)
