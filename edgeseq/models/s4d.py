"""S4D, the diagonal state space model (Gu et al. 2022, arXiv 2206.11893), in pre-norm form with a gated feed-forward.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width = channels                      N  modes of a channel, each a conjugate pair (state size 2 N)
  F  width of the gated feed-forward

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]; complex numbers per mode and channel:
  A    = -exp(log_A_real) + i A_imag            dt = exp(log_dt), per channel
  Abar = exp(dt A),           Bbar = (Abar - 1) / A                  zero-order hold (B = 1), or
  Abar = (1 + dt A/2) / (1 - dt A/2),   Bbar = dt / (1 - dt A/2)     bilinear
  s    = Abar s + Bbar h                         [B,N,d]
  y    = 2 Re(sum_n C s) + D h
  x    = x + W_1 g * sigmoid(W_2 g),  g = gelu(y) in its exact form; W_1 and W_2 with bias
  h    = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
The whole-sequence form convolves with K[t] = 2 Re sum_n C Abar^t Bbar by FFT. Export computes the poles Abar and the
residues 2 C Bbar once, in double: the state of a device is s / Bbar.
State of a layer: modes [1,N,2,d].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import scan_op, state_space
from edgeseq.models.base import Array, Family
from edgeseq.models.stack import Mixer, Stack
from edgeseq.models.state_space import GatedOutput
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class S4dConfig:
    """Shape of an S4D model; `init` is how the frequencies start, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int
    d_ff: int
    init: Literal["lin", "inv"] = "lin"
    discretisation: Literal["zoh", "bilinear"] = "zoh"
    eps: float = 1e-6
    tie: bool = True

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise SourceError(f"S4D with {self.d_state} modes keeps nothing", "give d_state at least 1")
        for name, value, known in (
            ("initialisation", self.init, ("lin", "inv")),
            ("discretisation", self.discretisation, tuple(state_space.DISCRETISE)),
        ):
            if value not in known:
                raise SourceError(f"S4D has no {name} {value!r}", f"known are {' and '.join(known)}")


class S4dMixer(Mixer):
    """A diagonal state space model per channel, GELU and a gated projection; parameters as in the module docstring."""

    def __init__(self, c: S4dConfig) -> None:
        super().__init__()
        self.c = c
        d, n = c.d_model, c.d_state
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(n, d))
        self.A_imag = nn.Parameter(torch.empty(n, d))
        self.C = nn.Parameter(torch.empty(n, 2, d))
        self.D = nn.Parameter(torch.empty(d))
        self.out = GatedOutput(d)
        self.register_buffer("poles", torch.empty(n, 2, d))
        self.register_buffer("residues", torch.empty(n, 2, d))

    def forward(self, h: Tensor) -> Tensor:
        poles, residues = modes(self.c.discretisation, self.log_dt, self.log_A_real, self.A_imag, self.C)
        kernel = state_space.modal_kernel(poles, residues, h.shape[1]).to(h.dtype)
        return self.out(state_space.fft_conv(h, kernel) + self.D * h)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, present = scan_op.diag_scan(h, self.poles, self.residues, self.D, state[0])
        return self.out(y), present

    def state_slots(self) -> tuple[StateSlot, ...]:
        return (StateSlot("modes", "float32", (1, self.c.d_state, 2, self.c.d_model)),)


def discrete(discretisation: str, log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor) -> tuple[Tensor, Tensor]:
    """Abar and Bbar, complex128 [N,d]."""
    dt = torch.exp(log_dt.double())
    z = dt * torch.complex(-torch.exp(log_a_real.double()), a_imag.double())
    poles, factor = state_space.DISCRETISE[discretisation](z)
    return poles, dt * factor


def modes(
    discretisation: str, log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor, out: Tensor
) -> tuple[Tensor, Tensor]:
    """Poles Abar and residues 2 C Bbar of DiagScan, float32 [N,2,d]."""
    a, b = discrete(discretisation, log_dt, log_a_real, a_imag)
    return state_space.pair_of(a), state_space.pair_of(2 * state_space.complex_of(out) * b)


class S4d(Stack):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: S4dConfig) -> None:
        super().__init__(config, S4dMixer)


def derive(c: S4dConfig, name: str, read: Callable[[str], Array]) -> Array:
    """Poles or residues of one layer from its parameters."""
    mixer, leaf = name.rsplit(".", 1)
    given = [read(f"{mixer}.{part}") for part in ("log_dt", "log_A_real", "A_imag", "C")]
    found = state_space.numpy_of(lambda *x: modes(c.discretisation, *x), *given)
    return found[("poles", "residues").index(leaf)]


def frequencies(init: str, modes: int) -> Array:
    """Im A of mode n: S4D-Lin pi n; S4D-Inv (M/pi) (M/(2n+1) - 1) with the state size M = 2 N (section 4.2)."""
    n = np.arange(modes)
    return math.pi * n if init == "lin" else 2 * modes / math.pi * (2 * modes / (2 * n + 1) - 1)


def random_tensor(c: S4dConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Published first values: Re A = -1/2, frequencies as `init` says, the rest as in `state_space`."""
    if name.endswith("A_imag"):
        return np.repeat(frequencies(c.init, c.d_state)[:, None], shape[1], axis=1).astype(np.float32)
    return state_space.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="s4d",
    config=S4dConfig,
    model=S4d,
    checkpoint=None,
    # The shape of S4's WikiText-103 language model (S4 paper, appendix D.3): 16 layers of 1024, state size 64.
    zoo={"s4d-wt103": S4dConfig(50257, 1024, 16, 32, 2048)},
    tiny=S4dConfig(256, 128, 6, 16, 184),
    state_formula="8 L d N",
    growth="constant",
    ops=("diag_scan",),
    random_tensor=random_tensor,
    derive=derive,
)
