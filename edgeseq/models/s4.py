"""S4, the structured state space model (Gu et al. 2022, arXiv 2111.00396), in pre-norm form with a gated feed-forward.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width = channels                      N  conjugate pairs of a channel (state size 2 N)
  F  width of the gated feed-forward

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]; per channel, complex numbers per pair:
  A    = diag(-exp(log_A_real) + i A_imag) - P P*        diagonal plus low rank; P* P runs over both of each pair
  Abar = (1 - dt A/2)^-1 (1 + dt A/2),   Bbar = (1 - dt A/2)^-1 dt B          bilinear, dt = exp(log_dt)
  s    = Abar s + Bbar h
  y    = 2 Re(C . s) + D h
  x    = x + W_1 g * sigmoid(W_2 g),  g = gelu(y) in its exact form; W_1 and W_2 with bias
  h    = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
A pair is held as the real and the imaginary part of one of its numbers: A becomes a real matrix of 2 N rows whose
symmetric part is negative, so Abar shortens every state and a step in float32 is as exact as its arithmetic. The
eigenvectors of Abar, on the other hand, have a condition number of 1e7 at 16 states; it is never diagonalised.
Export computes Abar, Bbar and the output row once, in double, and stores them as dense float32.
The whole-sequence form convolves with K[t] = 2 Re(C Abar^t Bbar) by FFT.
State of a layer: state [1,2N,d], real parts before imaginary ones. A step reads 4 N^2 d matrix elements of a layer.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import scan_op, state_space
from edgeseq.models.base import Array, Family
from edgeseq.models.stack import Mixer, Stack
from edgeseq.models.state_space import GatedOutput
from edgeseq.spec import StateSlot

PARAMETERS = ("log_dt", "log_A_real", "A_imag", "P", "B", "C")
DERIVED = ("step", "input", "output")


@dataclass(frozen=True)
class S4Config:
    """Shape of an S4 model; `d_state` counts conjugate pairs, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int
    d_ff: int
    eps: float = 1e-6
    tie: bool = True

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise SourceError(f"S4 with {self.d_state} pairs keeps nothing", "give d_state at least 1")


class S4Mixer(Mixer):
    """A state space model per channel, GELU and a gated projection; parameters as in the module docstring."""

    def __init__(self, c: S4Config) -> None:
        super().__init__()
        self.c = c
        d, n = c.d_model, c.d_state
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(n, d))
        self.A_imag = nn.Parameter(torch.empty(n, d))
        self.P = nn.Parameter(torch.empty(n, 2, d))
        self.B = nn.Parameter(torch.empty(n, 2, d))
        self.C = nn.Parameter(torch.empty(n, 2, d))
        self.D = nn.Parameter(torch.empty(d))
        self.out = GatedOutput(d)
        self.register_buffer("step", torch.empty(2 * n, 2 * n, d))
        self.register_buffer("input", torch.empty(2 * n, d))
        self.register_buffer("output", torch.empty(2 * n, d))

    def forward(self, h: Tensor) -> Tensor:
        a, b, c = matrices(*(getattr(self, name) for name in PARAMETERS))
        kernel = state_space.dense_kernel(a, b, c, h.shape[1]).to(h.dtype)
        return self.out(state_space.fft_conv(h, kernel) + self.D * h)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, present = scan_op.dense_scan(h, self.step, self.input, self.output, self.D, state[0])
        return self.out(y), present

    def state_slots(self) -> tuple[StateSlot, ...]:
        return (StateSlot("state", "float32", (1, 2 * self.c.d_state, self.c.d_model)),)


def matrices(
    log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor, p: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Abar [2N,2N,d], Bbar [2N,d], output row 2 [Re C, -Im C] [2N,d] of DenseScan, float32 rounded from double."""
    dt, rate, turn = (x.double() for x in (torch.exp(log_dt.double()), torch.exp(log_a_real.double()), a_imag))
    decay, rotation = (torch.diag_embed(x.T) for x in (rate, turn))  # [d,N,N]
    diagonal = torch.cat([torch.cat([-decay, -rotation], 2), torch.cat([rotation, -decay], 2)], 1)
    # x' = L x - 2 P Re(P* x): with x = r + i s the low-rank part is -2 g g^T, g = [Re P, Im P]
    g = _stacked(p)  # [d,2N]
    half = dt[:, None, None] / 2 * (diagonal - 2 * g[:, :, None] * g[:, None])
    one = torch.eye(half.shape[1], dtype=torch.float64, device=half.device)
    fed = dt[:, None] * _stacked(b)
    solved = torch.linalg.solve(one - half, torch.cat([one + half, fed[:, :, None]], 2))
    out = torch.cat([c[:, 0], -c[:, 1]], 0).double() * 2
    return solved[:, :, :-1].permute(1, 2, 0).float(), solved[:, :, -1].T.float(), out.float()


def _stacked(pair: Tensor) -> Tensor:
    """Complex [N,2,d] -> double [d,2N], real parts first."""
    return torch.cat([pair[:, 0], pair[:, 1]], 0).T.double()


class S4(Stack):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: S4Config) -> None:
        super().__init__(config, S4Mixer)


def derive(c: S4Config, name: str, read: Callable[[str], Array]) -> Array:
    """Step matrix, input column or output row of one layer from its parameters."""
    mixer, leaf = name.rsplit(".", 1)
    found = state_space.numpy_of(matrices, *(read(f"{mixer}.{part}") for part in PARAMETERS))
    return found[DERIVED.index(leaf)]


@cache
def hippo(pairs: int) -> tuple[Array, Array, Array]:
    """HiPPO-LegS as diagonal plus low rank (S4 paper, appendix C.1): Im of the diagonal, P and B, [N] each.

    A = V (diag(-1/2 + i w) - P P*) V*; of each conjugate pair the member with w > 0, in rising order.
    """
    n = np.arange(2 * pairs)
    root = np.sqrt(2 * n + 1.0)
    legs = -np.tril(root[:, None] * root, -1) - np.diag(n + 1.0)
    p = np.sqrt(n + 0.5)
    skew = legs + np.outer(p, p) + 0.5 * np.eye(2 * pairs)
    w, v = np.linalg.eigh(-1j * skew)
    kept = v[:, pairs:].conj().T
    return w[pairs:], kept @ p, kept @ root


def random_tensor(c: S4Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Published first values: HiPPO-LegS, the same in every channel; the rest as in `state_space`."""
    leaf = name.rsplit(".", 1)[-1]
    turn, p, b = hippo(c.d_state)
    if leaf == "A_imag":
        return np.repeat(turn[:, None], shape[1], axis=1).astype(np.float32)
    if leaf in ("P", "B"):
        one = p if leaf == "P" else b
        return np.repeat(np.stack([one.real, one.imag], 1)[..., None], shape[2], axis=2).astype(np.float32)
    return state_space.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="s4",
    config=S4Config,
    model=S4,
    checkpoint=None,
    # The shape of its WikiText-103 language model (appendix D.3.1): 16 layers of 1024, state size 64.
    zoo={"s4-wt103": S4Config(50257, 1024, 16, 32, 2048)},
    tiny=S4Config(256, 128, 6, 8, 184),
    state_formula="8 L d N",
    growth="constant",
    ops=("dense_scan",),
    random_tensor=random_tensor,
    derive=derive,
)
