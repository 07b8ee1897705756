"""Gated linear attention (Yang et al. 2023, arXiv 2312.06635), the layer as in flash-linear-attention.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              K  key width, V  value width of a head
  R  rank of the gate      F  width of the gated feed-forward

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  q, k, v = W_q h, W_k h, W_v h                  [B,T,H,K], [B,T,H,K], [B,T,H,V]
  g       = log sigmoid(W_2 W_1 h + b) / tau     [B,T,H,K], the log decay of each key channel
  S       = diag(e^g) S + k (x) v                [B,H,K,V]
  o       = K^-1/2 q^T S
  x       = x + W_o(rms_norm_per_head(o) w silu(W_g h))
  h       = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: gla [1,H,K,V].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models import fla
from edgeseq.models import functional as ops
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import ConfigReader
from edgeseq.models.matrix_state import linear_attention_parallel
from edgeseq.models.stack import Mixer, Stack, random_tensor
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class GLAConfig:
    """Shape of a GLA model; `gate_rank` is R, `gate_divisor` tau, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_key: int
    d_value: int
    d_ff: int
    gate_rank: int = 16
    gate_divisor: float = 16.0
    eps: float = 1e-6
    tie: bool = True


class GLAMixer(Mixer):
    """The mixer of one layer; parameters as in the module docstring."""

    def __init__(self, c: GLAConfig) -> None:
        super().__init__()
        self.c = c
        d, keys, values = c.d_model, c.n_heads * c.d_key, c.n_heads * c.d_value
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.decay_down = nn.Linear(d, c.gate_rank, bias=False)
        self.decay_up = nn.Linear(c.gate_rank, keys)
        self.head_norm = nn.Parameter(torch.ones(c.d_value))
        self.o_proj = nn.Linear(values, d, bias=False)

    def decay(self, h: Tensor) -> Tensor:
        """Log decays [B,T,H*K]; log sigmoid(x) = -softplus(-x)."""
        return -F.softplus(-self.decay_up(self.decay_down(h))) / self.c.gate_divisor

    def gated(self, o: Tensor, h: Tensor, norm: Callable[[Tensor, Tensor, float], Tensor]) -> Tensor:
        c = self.c
        o = norm(o.unflatten(-1, (c.n_heads, c.d_value)), self.head_norm, c.eps).flatten(-2)
        return self.o_proj(F.silu(self.g_proj(h)) * o)

    def forward(self, h: Tensor) -> Tensor:
        c, q, k, v = self.c, self.q_proj(h), self.k_proj(h), self.v_proj(h)
        heads, scale = c.n_heads, c.d_key**-0.5
        o = linear_attention_parallel(q, k, v, heads, self.decay(h), None, "gated", heads, heads, scale)
        return self.gated(o, h, ops.rms_norm_parallel)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, q, k, v = self.c, self.q_proj(h), self.k_proj(h), self.v_proj(h)
        heads, scale = c.n_heads, c.d_key**-0.5
        o, present = ops.linear_attention(q, k, v, state[0], self.decay(h), None, "gated", heads, heads, scale)
        return self.gated(o, h, ops.rms_norm), present

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (StateSlot("gla", "float32", (1, c.n_heads, c.d_key, c.d_value)),)


class GLA(Stack):
    """Embedding, GLA layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: GLAConfig) -> None:
        super().__init__(config, GLAMixer)


def config_from_hf(raw: Mapping[str, Any]) -> GLAConfig:
    """config.json of flash-linear-attention's `GLAForCausalLM`."""
    r = ConfigReader(raw)
    for field, allowed in (
        ("feature_map", None), ("use_short_conv", False), ("use_output_gate", True), ("clamp_min", None),
        ("use_gk", True), ("use_gv", False),
    ):  # fmt: skip
        r.only(field, allowed)
    outer, heads = fla.outer_config(r), r.positive("num_heads", default=4)
    d_key, d_value = fla.head_widths(r, outer["d_model"], heads, 0.5, 1.0)
    return GLAConfig(**outer, n_heads=heads, d_key=d_key, d_value=d_value)


def hf_tensors(c: GLAConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `GLAForCausalLM`."""
    d, keys, values = c.d_model, c.n_heads * c.d_key, c.n_heads * c.d_value

    def mixer(theirs: str) -> dict[str, StoredTensor]:
        return {
            **fla.matrix(f"{theirs}q_proj", keys, d),
            **fla.matrix(f"{theirs}k_proj", keys, d),
            **fla.matrix(f"{theirs}v_proj", values, d),
            **fla.matrix(f"{theirs}g_proj", values, d),
            **fla.matrix(f"{theirs}o_proj", d, values),
            "decay_down.weight": StoredTensor(f"{theirs}gk_proj.0.weight", (c.gate_rank, d)),
            "decay_up.weight": StoredTensor(f"{theirs}gk_proj.1.weight", (keys, c.gate_rank)),
            "decay_up.bias": StoredTensor(f"{theirs}gk_proj.1.bias", (keys,)),
            "head_norm": StoredTensor(f"{theirs}g_norm_swish_gate.weight", (c.d_value,)),
        }

    return fla.tensors(c, mixer)


FAMILY = Family(
    name="gla",
    config=GLAConfig,
    model=GLA,
    checkpoint=Checkpoint(model_types=("gla",), config=config_from_hf, tensors=hf_tensors),
    # The paper's sizes: K = d/8, V = d/4, F = 8 d / 3 rounded up to 256.
    zoo={
        "gla-340m": GLAConfig(32000, 1024, 24, 4, 128, 256, 2816),
        "gla-1.3b": GLAConfig(32000, 2048, 24, 4, 256, 512, 5632, tie=False),
    },
    tiny=GLAConfig(256, 128, 4, 4, 16, 32, 256),
    state_formula="4 L H K V",
    growth="constant",
    ops=("linear_attention",),
    random_tensor=random_tensor,
)
