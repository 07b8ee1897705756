"""The LLaMA-style decoder with a KV cache (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries, SwiGLU.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  query heads        Hk key/value heads, H a multiple of Hk
  e  head width (need not be d / H)              F  width of the gated feed-forward
  M  rows of the KV cache (the context)

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  q, k, v = rotate(W_q h), rotate(W_k h), W_v h          pairs (i, i + e/2)
  K[p], V[p] = k, v
  o = softmax(e^-1/2 q K^T over rows <= p) V
  x = x + W_o o
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: key and value [1,Hk,M,e]; keys are stored rotated.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel, rotary
from edgeseq.models.base import Array, Checkpoint, Family, SequenceModel, StoredTensor, last_logits, normal
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies. kind: default, linear (all divided by factor), llama3 (only long waves divided, blended)."""

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192

    def radians(self, head_dim: int) -> Array:
        """Radians per token of the head_dim/2 pairs, float64."""
        frequency = self.theta ** (-np.arange(0, head_dim, 2, dtype=np.float64) / head_dim)
        if self.kind == "default":
            return frequency
        if self.kind == "linear":
            return frequency / self.factor
        # Llama 3.1: waves shorter than context/high keep their frequency, longer than context/low are slowed down.
        waves = self.original_context * frequency / (2.0 * math.pi)
        keep = np.clip((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
        return frequency * (keep + (1.0 - keep) / self.factor)


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a decoder; biases as in LlamaConfig; `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    d_ff: int
    eps: float = 1e-6
    attention_bias: bool = False
    mlp_bias: bool = False
    tie: bool = True
    rope: RopeConfig = RopeConfig()

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise SourceError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.head_dim % 2:
            raise SourceError(f"A head width of {self.head_dim} is odd, so its channels cannot be rotated in pairs")


class TransformerLayer(nn.Module):
    """Attention and the gated feed-forward, each with its norm and residual."""

    def __init__(self, c: TransformerConfig) -> None:
        super().__init__()
        self.c = c
        d, bias = c.d_model, c.attention_bias
        self.norm = nn.Parameter(torch.ones(d))
        self.q_proj = nn.Linear(d, c.n_heads * c.head_dim, bias=bias)
        self.k_proj = nn.Linear(d, c.n_kv_heads * c.head_dim, bias=bias)
        self.v_proj = nn.Linear(d, c.n_kv_heads * c.head_dim, bias=bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, d, bias=bias)
        self.ff_norm = nn.Parameter(torch.ones(d))
        self.gate_proj = nn.Linear(d, c.d_ff, bias=c.mlp_bias)
        self.up_proj = nn.Linear(d, c.d_ff, bias=c.mlp_bias)
        self.down_proj = nn.Linear(c.d_ff, d, bias=c.mlp_bias)

    def feed_forward_whole(self, h: Tensor) -> Tensor:
        return self.feed_forward(h)

    def feed_forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))

    def attend_whole(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        c = self.c
        return parallel.attention_parallel(q, k, v, c.n_heads, c.n_kv_heads, c.head_dim**-0.5)

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, key: Tensor, value: Tensor, position: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        return ops.cached_attention(q, k, v, key, value, position, c.n_heads, c.n_kv_heads, c.head_dim**-0.5)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        h = ops.rms_norm_parallel(x, self.norm, c.eps)
        q = ops.rotary_parallel(self.q_proj(h), cos, sin, c.n_heads, False)
        k = ops.rotary_parallel(self.k_proj(h), cos, sin, c.n_kv_heads, False)
        x = x + self.o_proj(self.attend_whole(q, k, self.v_proj(h)))
        return x + self.feed_forward_whole(ops.rms_norm_parallel(x, self.ff_norm, c.eps))

    def advance(
        self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        h = ops.rms_norm(x, self.norm, c.eps)
        q = ops.rotary(self.q_proj(h), cos, sin, c.n_heads, False)
        k = ops.rotary(self.k_proj(h), cos, sin, c.n_kv_heads, False)
        o, key, value = self.attend(q, k, self.v_proj(h), key, value, position)
        x = x + self.o_proj(o)
        return x + self.feed_forward(ops.rms_norm(x, self.ff_norm, c.eps)), key, value


class Transformer(SequenceModel):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    layer_type: ClassVar[type[TransformerLayer]] = TransformerLayer

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = None if config.tie else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_buffer("frequency", torch.empty(config.head_dim // 2, dtype=torch.int64))

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = rotary.angles(self.frequency, tokens.new_zeros(1), tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        if context < 1:
            raise SourceError(f"A KV cache needs a context of at least one token, not {context}", "pass --context N")
        shape = (1, self.config.n_kv_heads, context, self.config.head_dim)
        return tuple(
            StateSlot(f"layers.{i}.{name}", "float32", shape, 0.0, "append", 2)
            for i in range(self.config.n_layers)
            for name in ("key", "value")
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embed(tokens), []
        cos, sin = rotary.angles(self.frequency, position, tokens.shape[1])
        for i, layer in enumerate(self.layers):
            x, key, value = layer.advance(x, cos, sin, position, state[2 * i], state[2 * i + 1])
            new += [key, value]
        logits = last_logits(x, lambda h: ops.rms_norm(h, self.norm, self.config.eps), self.head_weight())
        return (logits, *new)


def random_tensor(c: TransformerConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Variance-preserving matrices; those that write to the residual stream shrink with depth; norms 1, biases 0."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if "o_proj" in name or "down_proj" in name else std)


def config_from_hf(raw: Mapping[str, Any]) -> TransformerConfig:
    """config.json of `LlamaForCausalLM`, with rope_parameters (transformers 5) or rope_theta and rope_scaling."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    d_model, n_heads = r.positive("hidden_size"), r.positive("num_attention_heads")
    return TransformerConfig(
        vocab_size=r.positive("vocab_size"),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=r.positive("num_key_value_heads", default=n_heads),
        head_dim=r.positive("head_dim", default=d_model // n_heads, least=2),
        d_ff=r.positive("intermediate_size"),
        eps=r.number("rms_norm_eps", 1e-6),
        attention_bias=r.flag("attention_bias", False),
        mlp_bias=r.flag("mlp_bias", False),
        tie=r.flag("tie_word_embeddings", False),
        rope=rope_from_hf(r),
    )


def rope_from_hf(r: ConfigReader) -> RopeConfig:
    """Rotary frequencies of a config.json, whatever version of transformers wrote it; a partial rotation is refused."""
    nested = "rope_parameters" if r.get("rope_parameters") is not None else "rope_scaling"
    p = ConfigReader(r.get(nested) or {}, prefix=f"{nested}.")
    theta = p.number("rope_theta", r.number("rope_theta", 10000.0))
    field = "rope_type" if p.get("rope_type") is not None else "type"
    p.only(field, "default", "linear", "llama3")
    for reader in (r, p):
        reader.only("partial_rotary_factor", 1.0, 1)
    kind = p.get(field) or "default"
    if kind == "default":
        return RopeConfig(theta)
    if kind == "linear":
        return RopeConfig(theta, kind, p.number("factor"))
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    if low >= high:
        raise SourceError(f"config.json: {nested}.low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeConfig(theta, kind, p.number("factor"), low, high, p.positive("original_max_position_embeddings"))


def hf_tensors(c: TransformerConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `LlamaForCausalLM`."""
    d, q, kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, d)),
        "norm": StoredTensor("model.norm.weight", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    linears = {
        "q_proj": ("self_attn", q, d, c.attention_bias),
        "k_proj": ("self_attn", kv, d, c.attention_bias),
        "v_proj": ("self_attn", kv, d, c.attention_bias),
        "o_proj": ("self_attn", d, q, c.attention_bias),
        "gate_proj": ("mlp", c.d_ff, d, c.mlp_bias),
        "up_proj": ("mlp", c.d_ff, d, c.mlp_bias),
        "down_proj": ("mlp", d, c.d_ff, c.mlp_bias),
    }
    for i in range(c.n_layers):
        theirs = f"model.layers.{i}"
        names[f"layers.{i}.norm"] = StoredTensor(f"{theirs}.input_layernorm.weight", (d,))
        names[f"layers.{i}.ff_norm"] = StoredTensor(f"{theirs}.post_attention_layernorm.weight", (d,))
        for name, (block, rows, columns, bias) in linears.items():
            names[f"layers.{i}.{name}.weight"] = StoredTensor(f"{theirs}.{block}.{name}.weight", (rows, columns))
            if bias:
                names[f"layers.{i}.{name}.bias"] = StoredTensor(f"{theirs}.{block}.{name}.bias", (rows,))
    return names


FAMILY = Family(
    name="transformer",
    config=TransformerConfig,
    model=Transformer,
    checkpoint=Checkpoint(
        model_types=("llama",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=("rotary_emb.inv_freq",),
    ),
    zoo={},
    tiny=TransformerConfig(256, 128, 4, 4, 4, 32, 264),
    state_formula="8 L Hk e M",
    growth="linear",
    ops=("rotary", "cached_attention"),
    random_tensor=random_tensor,
    constants=lambda c: {"frequency": rotary.turns(c.rope.radians(c.head_dim))},
)
