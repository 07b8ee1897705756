"""Gated DeltaNet (Yang et al. 2024, arXiv 2412.06464), the layer as in Qwen3-Next and flash-linear-attention.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  value heads        G  key heads, each serving H/G value heads
  K  key width, V  value width of a head         k  taps of the short convolutions
  F  width of the gated feed-forward

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  q, k, v = silu(causal_conv(W h)) each          [B,T,G,K], [B,T,G,K], [B,T,H,V]
  q, k    = q / |q|, k / |k|                     per head, |x|^2 = sum x^2 + 1e-6
  g       = A softplus(W_a h + b_dt)             [B,T,H], the log decay; A = -exp(A_log)
  beta    = sigmoid(W_b h)                       [B,T,H]; twice that where eigenvalues may be negative
  S       = e^g S + k (x) beta (v - k^T e^g S)   [B,H,K,V]
  o       = K^-1/2 q^T S
  x       = x + W_o(rms_norm_per_head(o) w silu(W_g h))
  h       = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: conv_q, conv_k [1,k-1,G K], conv_v [1,k-1,H V] and delta [1,H,K,V].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import fla, parallel
from edgeseq.models import functional as ops
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor
from edgeseq.models.hf import ConfigReader
from edgeseq.models.matrix_state import linear_attention_parallel, unit_heads
from edgeseq.models.stack import Mixer, Stack, random_tensor
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class DeltaConfig:
    """Shape of one Gated DeltaNet mixer, in whatever model it stands; `gate` is the output gate."""

    d_model: int
    n_key_heads: int
    n_value_heads: int
    d_key: int
    d_value: int
    d_conv: int = 4
    gate: bool = True
    double_beta: bool = False
    eps: float = 1e-6

    def __post_init__(self) -> None:
        if self.n_value_heads % self.n_key_heads:
            raise SourceError(f"{self.n_value_heads} value heads cannot share {self.n_key_heads} key heads evenly")

    @property
    def keys(self) -> int:
        return self.n_key_heads * self.d_key

    @property
    def values(self) -> int:
        return self.n_value_heads * self.d_value


class GatedDeltaMixer(Mixer):
    """The Gated DeltaNet mixer; parameters as in the module docstring, A stored negative."""

    def __init__(self, c: DeltaConfig) -> None:
        super().__init__()
        self.c = c
        d = c.d_model
        self.q_proj = nn.Linear(d, c.keys, bias=False)
        self.k_proj = nn.Linear(d, c.keys, bias=False)
        self.v_proj = nn.Linear(d, c.values, bias=False)
        self.g_proj = nn.Linear(d, c.values, bias=False) if c.gate else None
        self.a_proj = nn.Linear(d, c.n_value_heads, bias=False)
        self.b_proj = nn.Linear(d, c.n_value_heads, bias=False)
        self.conv_q = nn.Parameter(torch.empty(c.keys, c.d_conv))
        self.conv_k = nn.Parameter(torch.empty(c.keys, c.d_conv))
        self.conv_v = nn.Parameter(torch.empty(c.values, c.d_conv))
        self.dt_bias = nn.Parameter(torch.zeros(c.n_value_heads))
        self.A = nn.Parameter(torch.empty(c.n_value_heads))
        self.head_norm = nn.Parameter(torch.ones(c.d_value))
        self.o_proj = nn.Linear(c.values, d, bias=False)

    def gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """Log decay and beta, [B,T,H] each."""
        beta = torch.sigmoid(self.b_proj(h))
        decay = self.A * F.softplus(self.a_proj(h) + self.dt_bias)
        return decay, 2.0 * beta if self.c.double_beta else beta

    def out(self, o: Tensor, h: Tensor, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        c = self.c
        o = norm(o.unflatten(-1, (c.n_value_heads, c.d_value)), self.head_norm, c.eps).flatten(-2)
        return self.o_proj(o if self.g_proj is None else F.silu(self.g_proj(h)) * o)

    def forward(self, h: Tensor) -> Tensor:
        c = self.c
        q, k, v = (
            F.silu(parallel.causal_conv_parallel(proj(h), weight, None))
            for proj, weight in (
                (self.q_proj, self.conv_q),
                (self.k_proj, self.conv_k),
                (self.v_proj, self.conv_v),
            )
        )
        q, k = (unit_heads(x, c.n_key_heads, ops.rms_norm_parallel) for x in (q, k))
        decay, beta = self.gates(h)
        o = linear_attention_parallel(
            q, k, v, c.n_value_heads, decay, beta, "gated_delta", c.n_key_heads, c.n_key_heads, c.d_key**-0.5
        )
        return self.out(o, h, ops.rms_norm_parallel)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, (past_q, past_k, past_v, past) = self.c, state
        q, conv_q = ops.causal_conv(self.q_proj(h), self.conv_q, None, past_q, silu=True)
        k, conv_k = ops.causal_conv(self.k_proj(h), self.conv_k, None, past_k, silu=True)
        v, conv_v = ops.causal_conv(self.v_proj(h), self.conv_v, None, past_v, silu=True)
        q, k = (unit_heads(x, c.n_key_heads, ops.rms_norm) for x in (q, k))
        decay, beta = self.gates(h)
        o, present = ops.linear_attention(
            q, k, v, past, decay, beta, "gated_delta", c.n_key_heads, c.n_key_heads, c.d_key**-0.5
        )
        return self.out(o, h, ops.rms_norm), conv_q, conv_k, conv_v, present

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        convs = (("conv_q", c.keys), ("conv_k", c.keys), ("conv_v", c.values))
        return (
            *(StateSlot(name, "float32", (1, c.d_conv - 1, width), 0.0, "shift", 1) for name, width in convs),
            StateSlot("delta", "float32", (1, c.n_value_heads, c.d_key, c.d_value)),
        )


@dataclass(frozen=True)
class GatedDeltaNetConfig:
    """Shape of a Gated DeltaNet model; fields as in `DeltaConfig`, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_key_heads: int
    n_value_heads: int
    d_key: int
    d_value: int
    d_ff: int
    d_conv: int = 4
    gate: bool = True
    double_beta: bool = False
    eps: float = 1e-6
    tie: bool = True

    @property
    def mixer(self) -> DeltaConfig:
        return DeltaConfig(
            self.d_model, self.n_key_heads, self.n_value_heads, self.d_key, self.d_value, self.d_conv, self.gate,
            self.double_beta, self.eps,
        )  # fmt: skip


class GatedDeltaNet(Stack):
    """Embedding, Gated DeltaNet layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: GatedDeltaNetConfig) -> None:
        super().__init__(config, lambda c: GatedDeltaMixer(c.mixer))


def config_from_hf(raw: Mapping[str, Any]) -> GatedDeltaNetConfig:
    """config.json of flash-linear-attention's `GatedDeltaNetForCausalLM`."""
    r = ConfigReader(raw)
    for field, allowed in (("use_short_conv", True), ("conv_bias", False)):
        r.only(field, allowed)
    outer, heads, width = fla.outer_config(r), r.positive("num_heads", default=6), r.positive("head_dim", default=256)
    d_value = width * r.number("expand_v", 2.0)
    if d_value != int(d_value):
        raise SourceError(f"config.json: expand_v {raw.get('expand_v')} times head_dim {width} is no whole number")
    return GatedDeltaNetConfig(
        **outer,
        n_key_heads=heads,
        n_value_heads=r.positive("num_v_heads", default=heads),
        d_key=width,
        d_value=int(d_value),
        d_conv=r.positive("conv_size", default=4, least=2),
        gate=r.flag("use_gate", True),
        double_beta=r.flag("allow_neg_eigval", False),
    )


def fla_mixer(c: DeltaConfig, theirs: str) -> dict[str, StoredTensor]:
    """Names of one mixer below `mixer.` -> where flash-linear-attention stores them, below the prefix `theirs`."""
    d = c.d_model
    names = {
        **fla.matrix(f"{theirs}q_proj", c.keys, d),
        **fla.matrix(f"{theirs}k_proj", c.keys, d),
        **fla.matrix(f"{theirs}v_proj", c.values, d),
        **fla.matrix(f"{theirs}a_proj", c.n_value_heads, d),
        **fla.matrix(f"{theirs}b_proj", c.n_value_heads, d),
        **fla.matrix(f"{theirs}o_proj", d, c.values),
        "dt_bias": StoredTensor(f"{theirs}dt_bias", (c.n_value_heads,)),
        "A": StoredTensor(f"{theirs}A_log", (c.n_value_heads,), lambda x: -np.exp(x)),
        "head_norm": StoredTensor(f"{theirs}o_norm.weight", (c.d_value,)),
    }
    for part, width in (("q", c.keys), ("k", c.keys), ("v", c.values)):
        names[f"conv_{part}"] = StoredTensor(f"{theirs}{part}_conv1d.weight", (width, 1, c.d_conv), lambda x: x[:, 0])
    return names | (fla.matrix(f"{theirs}g_proj", c.values, d) if c.gate else {})


def qwen_mixer(c: DeltaConfig, theirs: str) -> dict[str, StoredTensor]:
    """The same for Qwen3-Next: one projection whose rows are grouped by key head (q, k, its v, its z), one of b and a.

    `theirs` is the prefix of the layer's `linear_attn.` tensors.
    """
    d, share = c.d_model, c.n_value_heads // c.n_key_heads
    widths = {"q": c.d_key, "k": c.d_key, "v": share * c.d_value, "g": share * c.d_value}
    names = {
        "o_proj.weight": StoredTensor(f"{theirs}out_proj.weight", (d, c.values)),
        "dt_bias": StoredTensor(f"{theirs}dt_bias", (c.n_value_heads,)),
        "A": StoredTensor(f"{theirs}A_log", (c.n_value_heads,), lambda x: -np.exp(x)),
        "head_norm": StoredTensor(f"{theirs}norm.weight", (c.d_value,)),
    }
    rows, begin = 2 * (c.keys + c.values), 0
    for part, width in widths.items():
        names[f"{part}_proj.weight"] = StoredTensor(
            f"{theirs}in_proj_qkvz.weight", (rows, d), _of_each_group(c.n_key_heads, begin, width)
        )
        begin += width
    for i, part in enumerate("ba"):
        names[f"{part}_proj.weight"] = StoredTensor(
            f"{theirs}in_proj_ba.weight", (2 * c.n_value_heads, d), _of_each_group(c.n_key_heads, i * share, share)
        )
    begin, channels = 0, 2 * c.keys + c.values
    for part, width in (("q", c.keys), ("k", c.keys), ("v", c.values)):
        taps = _taps_of(begin, width)
        names[f"conv_{part}"] = StoredTensor(f"{theirs}conv1d.weight", (channels, 1, c.d_conv), taps)
        begin += width
    return names


def _taps_of(begin: int, width: int) -> Callable[[Array], Array]:
    """Channels begin .. begin+width of [C,1,k] as [width,k]."""
    return lambda x: x[begin : begin + width, 0]


def _of_each_group(groups: int, begin: int, width: int) -> Callable[[Array], Array]:
    """Rows begin .. begin+width of each of `groups` equal parts of a matrix."""

    def rows(x: Array) -> Array:
        part = x.reshape(groups, -1, x.shape[-1])[:, begin : begin + width]
        return np.ascontiguousarray(part.reshape(groups * width, x.shape[-1]))

    return rows


FAMILY = Family(
    name="gated-delta-net",
    config=GatedDeltaNetConfig,
    model=GatedDeltaNet,
    checkpoint=Checkpoint(
        model_types=("gated_deltanet",),
        config=config_from_hf,
        tensors=lambda c: fla.tensors(c, lambda theirs: fla_mixer(c.mixer, theirs)),
    ),
    # The paper's 1.3B: six heads of K = 256 and V = 512, F = 8 d / 3 rounded up to 256.
    zoo={"gated-delta-net-1.3b": GatedDeltaNetConfig(32000, 2048, 21, 6, 6, 256, 512, 5632, tie=False)},
    tiny=GatedDeltaNetConfig(256, 128, 4, 2, 4, 32, 32, 256),
    state_formula="4 L (H K V + (2 G K + H V) (k - 1))",
    growth="constant",
    ops=("causal_conv", "linear_attention"),
    random_tensor=random_tensor,
)
