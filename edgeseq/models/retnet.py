"""RetNet, the retentive network (Sun et al. 2023), as defined by its authors' torchscale, or as in fla.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              F  width of the gated feed-forward
  K  key width of a head = d / H                 V  value width of a head = 2 d / H
  gamma_h = 1 - 2^(-5-h), the decay of head h

One layer, with x the residual stream [B,T,d]:
  h = rms_norm(x)
  q, k = rotate(W_q h), rotate(W_k h)           pairs (2i, 2i+1), angle 10000^(-i/(K/2-1)) per token
  v    = W_v h
  S    = gamma S + k (x) v                      [B,H,K,V]
  o    = K^-1/2 q^T S
  x    = x + W_o(silu(W_g h) * rms_norm_per_head(o))
  h    = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
torchscale also divides scores by running sums; they cancel in the per-head norm and are left out.
flash-linear-attention's RetNet is another model: pairs (i, i + K/2), angle 10000^(-2i/K), and its per-head norm has a
weight [V]. `layout` says which one it is.
State of a layer: retention [1,H,K,V].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import fla, parallel, rotary
from edgeseq.models import functional as ops
from edgeseq.models.base import (
    Array,
    Checkpoint,
    Family,
    SequenceModel,
    StoredTensor,
    last_logits,
    normal,
)
from edgeseq.models.hf import ConfigReader
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class RetNetConfig:
    """Shape of a RetNet; `tie` shares embedding and head. The key width d / H must be even."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    eps: float = 1e-6
    tie: bool = True
    layout: Literal["torchscale", "fla"] = "torchscale"

    def __post_init__(self) -> None:
        if self.d_model % (2 * self.n_heads):
            raise SourceError(f"A RetNet of width {self.d_model} has no {self.n_heads} heads of even width")

    @property
    def d_key(self) -> int:
        return self.d_model // self.n_heads

    @property
    def d_value(self) -> int:
        return 2 * self.d_key

    @property
    def interleaved(self) -> bool:
        """Whether the rotation turns neighbouring channels rather than the halves of a head."""
        return self.layout == "torchscale"


class RetNetLayer(nn.Module):
    """Retention and the gated feed-forward, each with its norm and residual."""

    def __init__(self, c: RetNetConfig) -> None:
        super().__init__()
        self.c = c
        d = c.d_model
        self.norm = nn.Parameter(torch.ones(d))
        self.q_proj = nn.Linear(d, d, bias=False)
        self.k_proj = nn.Linear(d, d, bias=False)
        self.v_proj = nn.Linear(d, 2 * d, bias=False)
        self.g_proj = nn.Linear(d, 2 * d, bias=False)
        self.o_proj = nn.Linear(2 * d, d, bias=False)
        self.head_norm = nn.Parameter(torch.ones(c.d_value)) if c.layout == "fla" else None
        self.ff_norm = nn.Parameter(torch.ones(d))
        self.gate_proj = nn.Linear(d, c.d_ff, bias=False)
        self.up_proj = nn.Linear(d, c.d_ff, bias=False)
        self.down_proj = nn.Linear(c.d_ff, d, bias=False)

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor, log_decay: Tensor, chunk: int | None) -> Tensor:
        c = self.c
        h = ops.rms_norm_parallel(x, self.norm, c.eps)
        q = ops.rotary_parallel(self.q_proj(h), cos, sin, c.n_heads, c.interleaved)
        k = ops.rotary_parallel(self.k_proj(h), cos, sin, c.n_heads, c.interleaved)
        v, scale = self.v_proj(h), c.d_key**-0.5
        if chunk is None:
            o = parallel.retention_parallel(q, k, v, log_decay, c.n_heads, scale)
        else:
            o = parallel.retention_chunkwise(q, k, v, log_decay, c.n_heads, scale, chunk)
        o = ops.rms_norm_parallel(o.unflatten(-1, (c.n_heads, c.d_value)), self.head_norm, c.eps).flatten(-2)
        x = x + self.o_proj(F.silu(self.g_proj(h)) * o)
        return x + self.feed_forward(ops.rms_norm_parallel(x, self.ff_norm, c.eps))

    def advance(self, x: Tensor, cos: Tensor, sin: Tensor, log_decay: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
        c = self.c
        h = ops.rms_norm(x, self.norm, c.eps)
        q = ops.rotary(self.q_proj(h), cos, sin, c.n_heads, c.interleaved)
        k = ops.rotary(self.k_proj(h), cos, sin, c.n_heads, c.interleaved)
        o, present = ops.retention(q, k, self.v_proj(h), log_decay, past, c.n_heads, c.d_key**-0.5)
        o = ops.rms_norm(o.unflatten(-1, (c.n_heads, c.d_value)), self.head_norm, c.eps).flatten(-2)
        x = x + self.o_proj(F.silu(self.g_proj(h)) * o)
        return x + self.feed_forward(ops.rms_norm(x, self.ff_norm, c.eps)), present


class RetNet(SequenceModel):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`, `forward` also chunkwise."""

    def __init__(self, config: RetNetConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(RetNetLayer(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = None if config.tie else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_buffer("log_decay", torch.empty(config.n_heads))
        self.register_buffer("frequency", torch.empty(config.d_key // 2, dtype=torch.int64))

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def forward(self, tokens: Tensor, chunk: int | None = None) -> Tensor:
        """Parallel form, or the chunkwise form when `chunk` gives its length."""
        x = self.embed(tokens)
        cos, sin = rotary.angles(self.frequency, tokens.new_zeros(1), tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin, self.log_decay, chunk)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        shape = (1, c.n_heads, c.d_key, c.d_value)
        return tuple(StateSlot(f"layers.{i}.retention", "float32", shape) for i in range(c.n_layers))

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embed(tokens), []
        cos, sin = rotary.angles(self.frequency, position, tokens.shape[1])
        for layer, past in zip(self.layers, state, strict=True):
            x, present = layer.advance(x, cos, sin, self.log_decay, past)
            new.append(present)
        logits = last_logits(x, lambda h: ops.rms_norm(h, self.norm, self.config.eps), self.head_weight())
        return (logits, *new)


def constants(c: RetNetConfig) -> dict[str, Array]:
    """log gamma_h [H] float32 and the rotation [K/2] int64 (units of rotary.py); torchscale's range has both ends."""
    decay = np.log1p(-(2.0 ** (-5.0 - np.arange(c.n_heads))))
    half = c.d_key // 2
    radians = 10000.0 ** -(np.linspace(0.0, 1.0, half) if c.interleaved else np.arange(half) / half)
    return {"log_decay": decay.astype(np.float32), "frequency": rotary.turns(radians)}


def random_tensor(c: RetNetConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Variance-preserving matrices; those that write to the residual stream shrink with depth; norms are 1."""
    if len(shape) == 1:
        return np.ones(shape, np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if "o_proj" in name or "down_proj" in name else std)


def config_from_hf(raw: Mapping[str, Any]) -> RetNetConfig:
    """config.json of flash-linear-attention's `RetNetForCausalLM`."""
    r = ConfigReader(raw)
    for field, allowed in (
        ("expand_k", 1), ("expand_v", 2), ("feature_map", None), ("use_short_conv", False), ("use_output_gate", True),
    ):  # fmt: skip
        r.only(field, allowed, float(allowed) if allowed else allowed)
    return RetNetConfig(**fla.outer_config(r, hidden_ratio=2), n_heads=r.positive("num_heads", default=8), layout="fla")


def hf_tensors(c: RetNetConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `RetNetForCausalLM`."""
    d = c.d_model

    def mixer(theirs: str) -> dict[str, StoredTensor]:
        return {
            **fla.matrix(f"{theirs}q_proj", d, d),
            **fla.matrix(f"{theirs}k_proj", d, d),
            **fla.matrix(f"{theirs}v_proj", 2 * d, d),
            **fla.matrix(f"{theirs}g_proj", 2 * d, d),
            **fla.matrix(f"{theirs}o_proj", d, 2 * d),
            "head_norm": StoredTensor(f"{theirs}g_norm_swish_gate.weight", (c.d_value,)),
        }

    return fla.tensors(c, mixer, inside="")


FAMILY = Family(
    name="retnet",
    config=RetNetConfig,
    model=RetNet,
    checkpoint=Checkpoint(model_types=("retnet",), config=config_from_hf, tensors=hf_tensors),
    # d_ff = 4 d / 3 rounded up to 64: three matrices of a gated feed-forward then weigh the 4 d^2 of the paper's two.
    zoo={"retnet-1.3b": RetNetConfig(32000, 2048, 24, 8, 2752)},
    tiny=RetNetConfig(256, 128, 4, 4, 96),
    state_formula="4 L H K V = 8 L d^2 / H",
    growth="constant",
    ops=("rotary", "retention"),
    random_tensor=random_tensor,
    constants=constants,
)
