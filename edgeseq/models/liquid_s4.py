"""Liquid-S4 (Hasani et al. 2022, arXiv 2209.12951), causal: S4D plus products of the last inputs.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width = channels                      N  modes of a channel, each a conjugate pair
  F  width of the gated feed-forward             M  degree: the longest product of inputs

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]; per mode and channel, as in s4d.py but with an input
factor that is learned:
  A    = -exp(log_A_real) + i A_imag,   Abar = exp(dt A),   Bbar = B (Abar - 1) / A
  s_k  = Abar s_(k-1) + Bbar h_k
  y_k  = 2 Re(sum_n C s_k) + sum_(p=2..M) c_p h_k h_(k-1) .. h_(k-p+1) + D h_k,    c_p = 2 Re(sum_n C Bbar^p)
  x    = x + W_1 g * sigmoid(W_2 g),  g = gelu(y) in its exact form; W_1 and W_2 with bias
  h    = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
Inputs before the first token are 0.

Why this and not the published code. The paper's liquid kernel (section 3.2, the variant PB, whose powers of A are
replaced by the identity) weighs products of p neighbouring inputs with C Bbar^p. The published code adds that term
reversed in time, so its first output depends on the last inputs, and its step form leaves the term out; it cannot run
token by token. Here the products end in the current token, which makes the term causal, and powers are elementwise as
in the paper. `variant` says so in the manifest: checkpoints of the published code mean another function.
State of a layer: modes [1,N,2,d] and recent [1,M-1,d], the last inputs, oldest first.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import s4d, scan_op, state_space
from edgeseq.models.base import Array, Family, normal
from edgeseq.models.stack import Mixer, Stack
from edgeseq.models.state_space import GatedOutput
from edgeseq.spec import StateSlot

PARAMETERS = ("log_dt", "log_A_real", "A_imag", "B", "C")
DERIVED = ("poles", "residues", "products")


@dataclass(frozen=True)
class LiquidS4Config:
    """Shape of a Liquid-S4 model; `degree` is M, at least 2; `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_state: int
    d_ff: int
    degree: int = 3
    variant: Literal["causal-pb"] = "causal-pb"
    eps: float = 1e-6
    tie: bool = True

    def __post_init__(self) -> None:
        if self.d_state < 1:
            raise SourceError(f"Liquid-S4 with {self.d_state} modes keeps nothing", "give d_state at least 1")
        if self.degree < 2:
            raise SourceError(f"Liquid-S4 of degree {self.degree} has no products of inputs", "use s4d, or degree 2")
        if self.variant != "causal-pb":
            raise SourceError(f"Liquid-S4 has no variant {self.variant!r} that streams", "known is causal-pb")


class LiquidS4Mixer(Mixer):
    """Modes, products of the last inputs, GELU and a gated projection; parameters as in the module docstring."""

    def __init__(self, c: LiquidS4Config) -> None:
        super().__init__()
        self.c = c
        d, n = c.d_model, c.d_state
        self.log_dt = nn.Parameter(torch.empty(d))
        self.log_A_real = nn.Parameter(torch.empty(n, d))
        self.A_imag = nn.Parameter(torch.empty(n, d))
        self.B = nn.Parameter(torch.empty(n, 2, d))
        self.C = nn.Parameter(torch.empty(n, 2, d))
        self.D = nn.Parameter(torch.empty(d))
        self.out = GatedOutput(d)
        self.register_buffer("poles", torch.empty(n, 2, d))
        self.register_buffer("residues", torch.empty(n, 2, d))
        self.register_buffer("products", torch.empty(c.degree - 1, d))

    def liquid(self, inputs: Tensor, weights: Tensor, tokens: int) -> Tensor:
        """Weighted products [B,T,d] of the last `tokens` inputs of [B,M-1+T,d] with those before each."""
        first = self.c.degree - 1
        product, terms = inputs[:, first:], []
        for back in range(1, self.c.degree):
            product = product * inputs[:, first - back : first - back + tokens]
            terms.append(weights[back - 1] * product)
        return functools.reduce(torch.add, terms)

    def forward(self, h: Tensor) -> Tensor:
        poles, residues, products = coefficients(self.c.degree, *(getattr(self, name) for name in PARAMETERS))
        kernel = state_space.modal_kernel(poles, residues, h.shape[1]).to(h.dtype)
        padded = nn.functional.pad(h, (0, 0, self.c.degree - 1, 0))
        liquid = self.liquid(padded, products.to(h.dtype), h.shape[1])
        return self.out(state_space.fft_conv(h, kernel) + self.D * h + liquid)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        modes, recent = state
        y, modes = scan_op.diag_scan(h, self.poles, self.residues, self.D, modes)
        inputs = torch.cat([recent, h], 1)
        return self.out(y + self.liquid(inputs, self.products, h.shape[1])), modes, inputs[:, h.shape[1] :]

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (
            StateSlot("modes", "float32", (1, c.d_state, 2, c.d_model)),
            StateSlot("recent", "float32", (1, c.degree - 1, c.d_model), 0.0, "shift", 1),
        )


def coefficients(
    degree: int, log_dt: Tensor, log_a_real: Tensor, a_imag: Tensor, b: Tensor, c: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Poles Abar and residues 2 C Bbar [N,2,d], and c_2 .. c_M [M-1,d]; float32 rounded from double."""
    poles, factor = s4d.discrete("zoh", log_dt, log_a_real, a_imag)
    fed, out = factor * state_space.complex_of(b), 2 * state_space.complex_of(c)
    products = torch.stack([(out * fed**p).real.sum(0) for p in range(2, degree + 1)])
    return state_space.pair_of(poles), state_space.pair_of(out * fed), products.float()


class LiquidS4(Stack):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: LiquidS4Config) -> None:
        super().__init__(config, LiquidS4Mixer)


def derive(c: LiquidS4Config, name: str, read: Callable[[str], Array]) -> Array:
    """Poles, residues or weights of the products of one layer from its parameters."""
    mixer, leaf = name.rsplit(".", 1)
    given = [read(f"{mixer}.{part}") for part in PARAMETERS]
    return state_space.numpy_of(lambda *x: coefficients(c.degree, *x), *given)[DERIVED.index(leaf)]


def random_tensor(c: LiquidS4Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """As S4D-Lin starts; B complex Gaussian of variance 1, as its products need directions of their own."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "A_imag":
        return np.repeat(s4d.frequencies("lin", c.d_state)[:, None], shape[1], axis=1).astype(np.float32)
    if leaf == "B":
        return normal(rng, shape, 0.5**0.5)
    return state_space.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="liquid-s4",
    config=LiquidS4Config,
    model=LiquidS4,
    checkpoint=None,
    # The shape of s4d-wt103 with products of two and three inputs.
    zoo={"liquid-s4-wt103": LiquidS4Config(50257, 1024, 16, 32, 2048)},
    tiny=LiquidS4Config(256, 128, 6, 16, 172),
    state_formula="4 L d (2 N + M - 1)",
    growth="constant",
    ops=("diag_scan",),
    random_tensor=random_tensor,
    derive=derive,
)
