"""DeltaNet, linear attention that erases before it writes (Yang et al. 2024, arXiv 2406.06484), as in fla.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              K  key width, V  value width of a head
  k  taps of the short convolutions              F  width of the gated feed-forward

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  q, k, v = silu(causal_conv(W h)) each          [B,T,H,K], [B,T,H,K], [B,T,H,V]
  q, k    = q / |q|, k / |k|                     per head, |x|^2 = sum x^2 + 1e-6
  beta    = sigmoid(W_b h)                       [B,T,H]; twice that where eigenvalues may be negative
  S       = S + k (x) beta (v - k^T S)           [B,H,K,V]
  o       = K^-1/2 q^T S
  x       = x + W_o(rms_norm_per_head(o) w)      times silu(W_g h) before W_o where there is an output gate
  h       = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: conv_q, conv_k [1,k-1,H K], conv_v [1,k-1,H V] and delta [1,H,K,V].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models import fla, parallel
from edgeseq.models import functional as ops
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import ConfigReader
from edgeseq.models.matrix_state import linear_attention_parallel, unit_heads
from edgeseq.models.stack import Mixer, Stack, random_tensor
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class DeltaNetConfig:
    """Shape of a DeltaNet; `gate` is the output gate, `double_beta` lets beta reach 2, `tie` shares the embedding."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_key: int
    d_value: int
    d_ff: int
    d_conv: int = 4
    gate: bool = False
    double_beta: bool = False
    eps: float = 1e-6
    tie: bool = True


class DeltaNetMixer(Mixer):
    """The mixer of one layer; parameters as in the module docstring."""

    def __init__(self, c: DeltaNetConfig) -> None:
        super().__init__()
        self.c = c
        d, keys, values = c.d_model, c.n_heads * c.d_key, c.n_heads * c.d_value
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.b_proj = nn.Linear(d, c.n_heads, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False) if c.gate else None
        self.conv_q = nn.Parameter(torch.empty(keys, c.d_conv))
        self.conv_k = nn.Parameter(torch.empty(keys, c.d_conv))
        self.conv_v = nn.Parameter(torch.empty(values, c.d_conv))
        self.head_norm = nn.Parameter(torch.ones(c.d_value))
        self.o_proj = nn.Linear(values, d, bias=False)

    def beta(self, h: Tensor) -> Tensor:
        rate = torch.sigmoid(self.b_proj(h))
        return 2.0 * rate if self.c.double_beta else rate

    def out(self, o: Tensor, h: Tensor, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        c = self.c
        o = norm(o.unflatten(-1, (c.n_heads, c.d_value)), self.head_norm, c.eps).flatten(-2)
        return self.o_proj(o if self.g_proj is None else F.silu(self.g_proj(h)) * o)

    def forward(self, h: Tensor) -> Tensor:
        c, heads = self.c, self.c.n_heads
        q, k, v = (
            F.silu(parallel.causal_conv_parallel(proj(h), weight, None))
            for proj, weight in (
                (self.q_proj, self.conv_q),
                (self.k_proj, self.conv_k),
                (self.v_proj, self.conv_v),
            )
        )
        q, k = (unit_heads(x, heads, ops.rms_norm_parallel) for x in (q, k))
        o = linear_attention_parallel(q, k, v, heads, None, self.beta(h), "delta", heads, heads, c.d_key**-0.5)
        return self.out(o, h, ops.rms_norm_parallel)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, heads, (past_q, past_k, past_v, past) = self.c, self.c.n_heads, state
        q, conv_q = ops.causal_conv(self.q_proj(h), self.conv_q, None, past_q, silu=True)
        k, conv_k = ops.causal_conv(self.k_proj(h), self.conv_k, None, past_k, silu=True)
        v, conv_v = ops.causal_conv(self.v_proj(h), self.conv_v, None, past_v, silu=True)
        q, k = (unit_heads(x, heads, ops.rms_norm) for x in (q, k))
        scale = c.d_key**-0.5
        o, present = ops.linear_attention(q, k, v, past, None, self.beta(h), "delta", heads, heads, scale)
        return self.out(o, h, ops.rms_norm), conv_q, conv_k, conv_v, present

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        keys, values = c.n_heads * c.d_key, c.n_heads * c.d_value
        convs = (("conv_q", keys), ("conv_k", keys), ("conv_v", values))
        return (
            *(StateSlot(name, "float32", (1, c.d_conv - 1, width), 0.0, "shift", 1) for name, width in convs),
            StateSlot("delta", "float32", (1, c.n_heads, c.d_key, c.d_value)),
        )


class DeltaNet(Stack):
    """Embedding, DeltaNet layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: DeltaNetConfig) -> None:
        super().__init__(config, DeltaNetMixer)


def config_from_hf(raw: Mapping[str, Any]) -> DeltaNetConfig:
    """config.json of flash-linear-attention's `DeltaNetForCausalLM`."""
    r = ConfigReader(raw)
    for field, allowed in (
        ("qk_norm", "l2"), ("qk_activation", "silu"), ("use_short_conv", True), ("use_beta", True),
        ("use_output_norm", True), ("conv_bias", False),
    ):  # fmt: skip
        r.only(field, allowed)
    outer, heads = fla.outer_config(r), r.positive("num_heads", default=16)
    d_key, d_value = fla.head_widths(r, outer["d_model"], heads, 1.0, 1.0)
    return DeltaNetConfig(
        **outer,
        n_heads=heads,
        d_key=d_key,
        d_value=d_value,
        d_conv=r.positive("conv_size", default=4, least=2),
        gate=r.flag("use_gate", False),
        double_beta=r.flag("allow_neg_eigval", False),
    )


def hf_tensors(c: DeltaNetConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `DeltaNetForCausalLM`."""
    d, keys, values = c.d_model, c.n_heads * c.d_key, c.n_heads * c.d_value

    def mixer(theirs: str) -> dict[str, StoredTensor]:
        names = {
            **fla.matrix(f"{theirs}q_proj", keys, d),
            **fla.matrix(f"{theirs}k_proj", keys, d),
            **fla.matrix(f"{theirs}v_proj", values, d),
            **fla.matrix(f"{theirs}b_proj", c.n_heads, d),
            **fla.matrix(f"{theirs}o_proj", d, values),
            "head_norm": StoredTensor(f"{theirs}o_norm.weight", (c.d_value,)),
        }
        for part, width in (("q", keys), ("k", keys), ("v", values)):
            shape = (width, 1, c.d_conv)
            names[f"conv_{part}"] = StoredTensor(f"{theirs}{part}_conv1d.weight", shape, lambda x: x[:, 0])
        return names | (fla.matrix(f"{theirs}g_proj", values, d) if c.gate else {})

    return fla.tensors(c, mixer)


FAMILY = Family(
    name="delta-net",
    config=DeltaNetConfig,
    model=DeltaNet,
    checkpoint=Checkpoint(model_types=("delta_net",), config=config_from_hf, tensors=hf_tensors),
    # Shape of fla-hub/delta_net-1.3B-100B: K = V = 128, F = 8 d / 3 rounded up to 256.
    zoo={"delta-net-1.3b": DeltaNetConfig(32000, 2048, 24, 16, 128, 128, 5632, tie=False)},
    tiny=DeltaNetConfig(256, 128, 4, 4, 32, 32, 256),
    state_formula="4 L (H K V + (2 H K + H V) (k - 1))",
    growth="constant",
    ops=("causal_conv", "linear_attention"),
    random_tensor=random_tensor,
)
