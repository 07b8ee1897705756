"""GSS, Gated State Spaces (Mehta et al. 2022, arXiv 2206.13947, section 3), with RMS norms.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           F  width of the gate  H  channels of the state space model
  N  complex modes, shared by all channels and not conjugate pairs

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  u    = gelu(W_u h)                             [B,T,F]
  v    = rms_norm(gelu(W_v h))                   [B,T,H]
  a    = exp(-exp(log_A_real) + i exp(log_A_imag))          [N]; there is no dt
  s    = a s + v                                 [B,N,H]
  y    = Re(sum_n C (a - 1) / log(a) s) + D v    [B,T,H]; zero-order hold of DSS-EXP
  x    = x + W_o((W_g y) * u) + b_o
GELU in its exact form. The whole-sequence form convolves with K[t] = Re sum_n C (a - 1) / log(a) a^t by FFT. Export
computes the poles a and the residues C (a - 1) / log(a) once, in double.
State of a layer: modes [1,N,2,H].
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import scan_op, state_space
from edgeseq.models.base import Array, Family, normal
from edgeseq.models.stack import Mixer, Stack
from edgeseq.spec import StateSlot

PARAMETERS = ("log_A_real", "log_A_imag", "C")


@dataclass(frozen=True)
class GssConfig:
    """Shape of a GSS model; `d_gate` is F, `d_inner` H, `d_state` N; `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_gate: int
    d_inner: int
    d_state: int
    eps: float = 1e-6
    tie: bool = True
    d_ff: int = 0

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise SourceError(f"GSS with {self.d_state} modes keeps nothing", "give d_state at least 1")


class GssMixer(Mixer):
    """A state space model of fewer channels than the gate around it; parameters as in the module docstring."""

    def __init__(self, c: GssConfig) -> None:
        super().__init__()
        self.c = c
        self.u_proj = nn.Linear(c.d_model, c.d_gate, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.d_inner, bias=False)
        self.v_norm = nn.Parameter(torch.ones(c.d_inner))
        self.log_A_real = nn.Parameter(torch.empty(c.d_state))
        self.log_A_imag = nn.Parameter(torch.empty(c.d_state))
        self.C = nn.Parameter(torch.empty(c.d_state, 2, c.d_inner))
        self.D = nn.Parameter(torch.empty(c.d_inner))
        self.gate_proj = nn.Linear(c.d_inner, c.d_gate, bias=False)
        self.o_proj = nn.Linear(c.d_gate, c.d_model)
        self.register_buffer("poles", torch.empty(c.d_state, 2, 1))
        self.register_buffer("residues", torch.empty(c.d_state, 2, c.d_inner))

    def out(self, y: Tensor, h: Tensor) -> Tensor:
        return self.o_proj(self.gate_proj(y) * F.gelu(self.u_proj(h)))

    def forward(self, h: Tensor) -> Tensor:
        v = ops.rms_norm_parallel(F.gelu(self.v_proj(h)), self.v_norm, self.c.eps)
        kernel = state_space.modal_kernel(*modes(*(getattr(self, name) for name in PARAMETERS)), h.shape[1])
        return self.out(state_space.fft_conv(v, kernel.to(h.dtype)) + self.D * v, h)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        v = ops.rms_norm(F.gelu(self.v_proj(h)), self.v_norm, self.c.eps)
        y, present = scan_op.diag_scan(v, self.poles, self.residues, self.D, state[0])
        return self.out(y, h), present

    def state_slots(self) -> tuple[StateSlot, ...]:
        return (StateSlot("modes", "float32", (1, self.c.d_state, 2, self.c.d_inner)),)


def modes(log_a_real: Tensor, log_a_imag: Tensor, out: Tensor) -> tuple[Tensor, Tensor]:
    """Poles a [N,2,1] and residues C (a - 1) / log(a) [N,2,H] of DiagScan, float32 rounded from double."""
    z = torch.complex(-torch.exp(log_a_real.double()), torch.exp(log_a_imag.double()))[:, None]
    poles, factor = state_space.zoh(z)
    return state_space.pair_of(poles), state_space.pair_of(state_space.complex_of(out) * factor)


class Gss(Stack):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: GssConfig) -> None:
        super().__init__(config, GssMixer)


def derive(c: GssConfig, name: str, read: Callable[[str], Array]) -> Array:
    """Poles or residues of one layer from its parameters."""
    mixer, leaf = name.rsplit(".", 1)
    found = state_space.numpy_of(modes, *(read(f"{mixer}.{part}") for part in PARAMETERS))
    return found[("poles", "residues").index(leaf)]


def random_tensor(c: GssConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Rates log-uniform from 0.001 to 0.1 (memories of ten to a thousand tokens), frequencies from 0.001 to 3.

    Both replace the random start of the paper, which leaves the gate to find the useful modes. C is complex Gaussian,
    scaled by the number of modes; D is Gaussian.
    """
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "log_A_real":
        return state_space.random_log_dt(shape, rng)
    if leaf == "log_A_imag":
        return rng.uniform(math.log(1e-3), math.log(3.0), shape).astype(np.float32)
    if leaf == "C":
        return normal(rng, shape, 1.0 / math.sqrt(c.d_state))
    return state_space.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="gss",
    config=GssConfig,
    model=Gss,
    checkpoint=None,
    # The paper's language models (section 4): 12 layers of 1024, gate 4096, 256 channels, 512 modes.
    zoo={"gss-lm": GssConfig(32000, 1024, 12, 4096, 256, 512)},
    tiny=GssConfig(256, 128, 4, 480, 64, 32),
    state_formula="8 L N H",
    growth="constant",
    ops=("diag_scan",),
    random_tensor=random_tensor,
    derive=derive,
)
