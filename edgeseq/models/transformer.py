"""The LLaMA-style decoder with a KV cache (Touvron et al. 2023): RMSNorm, rotary positions, grouped queries, SwiGLU.

Qwen 2 and 3 and Phi-3 differ in biases, in a norm of each query and key head, and in how much of a head is rotated.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  query heads        Hk key/value heads, H a multiple of Hk
  e  head width (need not be d / H)              F  width of the gated feed-forward
  M  rows of the KV cache (the context)

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  q, k, v = rotate(W_q h), rotate(W_k h), W_v h          pairs (i, i + e/2); `qk_norm`: rms_norm of each head in front
  K[p], V[p] = k, v
  o = softmax(e^-1/2 q K^T over rows <= p) V
  x = x + W_o o
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: key and value [1,Hk,M,e]; keys are stored rotated.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
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
from edgeseq.models.rope import RopeConfig, any_rope_from_hf, channel_order, reordered, rope_from_hf
from edgeseq.spec import StateSlot

__all__ = ["FAMILY", "RopeConfig", "Transformer", "TransformerConfig", "TransformerLayer", "rope_from_hf"]


@dataclass(frozen=True)
class TransformerConfig:
    """Shape of a decoder; biases as in LlamaConfig; `tie` shares embedding and head.

    output_bias: whether the attention's output has a bias, where that is not as `attention_bias` says.
    qk_norm:     whether each head of queries and keys is normed before it is rotated.
    longest:     tokens of the longest sequence whose rotary frequencies, or whose window, are these; None: no limit.
    """

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
    rope: RopeConfig = field(default_factory=RopeConfig)
    output_bias: bool | None = None
    qk_norm: bool = False
    longest: int | None = None

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
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, d, bias=bias if c.output_bias is None else c.output_bias)
        if c.qk_norm:
            self.q_norm = nn.Parameter(torch.ones(c.head_dim))
            self.k_norm = nn.Parameter(torch.ones(c.head_dim))
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

    def project(
        self, h: Tensor, norm: Callable[[Tensor, Tensor | None, float], Tensor]
    ) -> tuple[Tensor, Tensor, Tensor]:
        """q, k, v of h [B,T,d], before they are rotated."""
        c, (q, k, v) = self.c, (self.q_proj(h), self.k_proj(h), self.v_proj(h))
        if c.qk_norm:
            q = norm(q.unflatten(-1, (c.n_heads, c.head_dim)), self.q_norm, c.eps).flatten(2)
            k = norm(k.unflatten(-1, (c.n_kv_heads, c.head_dim)), self.k_norm, c.eps).flatten(2)
        return q, k, v

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        c = self.c
        q, k, v = self.project(ops.rms_norm_parallel(x, self.norm, c.eps), ops.rms_norm_parallel)
        q = ops.rotary_parallel(q, cos, sin, c.n_heads, False)
        k = ops.rotary_parallel(k, cos, sin, c.n_kv_heads, False)
        x = x + self.o_proj(self.attend_whole(q, k, v))
        return x + self.feed_forward_whole(ops.rms_norm_parallel(x, self.ff_norm, c.eps))

    def advance(
        self, x: Tensor, cos: Tensor, sin: Tensor, position: Tensor, key: Tensor, value: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        c = self.c
        q, k, v = self.project(ops.rms_norm(x, self.norm, c.eps), ops.rms_norm)
        q, k = ops.rotary(q, cos, sin, c.n_heads, False), ops.rotary(k, cos, sin, c.n_kv_heads, False)
        o, key, value = self.attend(q, k, v, key, value, position)
        x = x + self.o_proj(o)
        return x + self.feed_forward(ops.rms_norm(x, self.ff_norm, c.eps)), key, value


class Transformer(SequenceModel):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    layer_type: ClassVar[type[TransformerLayer]] = TransformerLayer

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__()
        self.config, self.longest = config, config.longest
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = None if config.tie else nn.Parameter(torch.empty(config.vocab_size, config.d_model))
        self.register_buffer("frequency", torch.empty(config.head_dim // 2, dtype=torch.int64))
        if config.rope.attention_factor != 1.0:
            self.register_buffer("amplitude", torch.empty(config.head_dim // 2))

    def angles(self, position: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
        """cos, sin [B,T,e/2] of positions position[b] + t."""
        cos, sin = rotary.angles(self.frequency, position, tokens)
        if self.config.rope.attention_factor != 1.0:
            cos, sin = cos * self.amplitude, sin * self.amplitude
        return cos, sin

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        cos, sin = self.angles(tokens.new_zeros(1), tokens.shape[1])
        for layer in self.layers:
            x = layer(x, cos, sin)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        if context < 1:
            raise SourceError(f"A KV cache needs a context of at least one token, not {context}", "pass --context N")
        if self.longest is not None and context > self.longest:
            raise SourceError(
                f"Beyond {self.longest} tokens the model would attend in another way, so a context of {context} is not "
                "possible",
                f"pass --context with 1 to {self.longest}",
            )
        shape = (1, self.config.n_kv_heads, context, self.config.head_dim)
        return tuple(
            StateSlot(f"layers.{i}.{name}", "float32", shape, 0.0, "append", 2)
            for i in range(self.config.n_layers)
            for name in ("key", "value")
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embed(tokens), []
        cos, sin = self.angles(position, tokens.shape[1])
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
    """config.json of `LlamaForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`.

    Where a layer of Qwen has a window, the model reads sequences up to that length, to which it makes no difference.
    """
    r = ConfigReader(raw)
    qwen = raw.get("model_type") in ("qwen2", "qwen3")
    for reader in (r, ConfigReader(r.get("rope_parameters") or {}, "rope_parameters.")):
        reader.only("partial_rotary_factor", 1.0, 1)
    whole = _sizes(r, default_head_dim=128 if raw.get("model_type") == "qwen3" else None)
    longest = [whole.longest, _window(r) if qwen else None]
    return replace(
        whole,
        attention_bias=raw.get("model_type") == "qwen2" or r.flag("attention_bias", False),
        mlp_bias=r.flag("mlp_bias", False),
        output_bias=False if raw.get("model_type") == "qwen2" else None,
        qk_norm=raw.get("model_type") == "qwen3",
        longest=min((n for n in longest if n is not None), default=None),
    )


def phi3_config(raw: Mapping[str, Any]) -> TransformerConfig:
    """config.json of `Phi3ForCausalLM`; its window is a limit, as with Qwen."""
    r = ConfigReader(raw)
    named = r.get("rope_parameters") or r.get("rope_scaling") or {}
    ConfigReader(named, "rope_parameters.").only("rope_type", "default", "longrope")
    ConfigReader(named, "rope_parameters.").only("type", "default", "longrope")
    r.only("attention_bias", False)
    whole, window = _sizes(r, default_eps=1e-5), r.get("sliding_window")
    longest = [whole.longest, None if window is None else r.positive("sliding_window")]
    return replace(whole, longest=min((n for n in longest if n is not None), default=None))


def refuse_limit(c: TransformerConfig, window: int) -> None:
    """A ring has no end, so it cannot have frequencies that hold up to a length only."""
    if c.longest is not None:
        raise SourceError(
            f"config.json: the rotary frequencies hold for {c.longest} tokens only, but a ring of the last "
            f"{window} has no end",
            "a checkpoint that is used within that length needs no window: set sliding_window to null",
        )


def _sizes(r: ConfigReader, default_head_dim: int | None = None, default_eps: float = 1e-6) -> TransformerConfig:
    """What all these config.json have in common."""
    r.only("hidden_act", "silu", "swish")
    d_model, n_heads = r.positive("hidden_size"), r.positive("num_attention_heads")
    head_dim = r.positive("head_dim", default=default_head_dim or d_model // n_heads, least=2)
    rope, longest = any_rope_from_hf(r, head_dim)
    return TransformerConfig(
        vocab_size=r.positive("vocab_size"),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=r.positive("num_key_value_heads", default=n_heads),
        head_dim=head_dim,
        d_ff=r.positive("intermediate_size"),
        eps=r.number("rms_norm_eps", default_eps),
        tie=r.flag("tie_word_embeddings", False),
        rope=rope,
        longest=longest,
    )


def _window(r: ConfigReader) -> int | None:
    """Tokens that the layers with a window see, None where no layer has one."""
    if not r.flag("use_sliding_window", False) or r.get("sliding_window") is None:
        return None
    layers = r.positive("num_hidden_layers", most=MOST_LAYERS)
    types = r.get("layer_types")
    if types is None:
        narrow = r.positive("max_window_layers", default=28, least=0) < layers
    else:
        narrow = not isinstance(types, list) or any(kind != "full_attention" for kind in types)
    return r.positive("sliding_window") if narrow else None


def hf_tensors(c: TransformerConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `LlamaForCausalLM`, `Qwen2ForCausalLM` and `Qwen3ForCausalLM`."""
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
        "o_proj": ("self_attn", d, q, c.attention_bias if c.output_bias is None else c.output_bias),
        "gate_proj": ("mlp", c.d_ff, d, c.mlp_bias),
        "up_proj": ("mlp", c.d_ff, d, c.mlp_bias),
        "down_proj": ("mlp", d, c.d_ff, c.mlp_bias),
    }
    for i in range(c.n_layers):
        theirs = f"model.layers.{i}"
        names[f"layers.{i}.norm"] = StoredTensor(f"{theirs}.input_layernorm.weight", (d,))
        names[f"layers.{i}.ff_norm"] = StoredTensor(f"{theirs}.post_attention_layernorm.weight", (d,))
        if c.qk_norm:
            for name in ("q_norm", "k_norm"):
                names[f"layers.{i}.{name}"] = StoredTensor(f"{theirs}.self_attn.{name}.weight", (c.head_dim,))
        for name, (block, rows, columns, bias) in linears.items():
            names[f"layers.{i}.{name}.weight"] = StoredTensor(f"{theirs}.{block}.{name}.weight", (rows, columns))
            if bias:
                names[f"layers.{i}.{name}.bias"] = StoredTensor(f"{theirs}.{block}.{name}.bias", (rows,))
    return names


def phi3_tensors(c: TransformerConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `Phi3ForCausalLM`: q, k and v are one matrix there, gate and up another."""
    d, q, kv = c.d_model, c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    turned = c.rope.turned(c.head_dim)
    order = channel_order(c.head_dim, turned)
    names = hf_tensors(c)
    for i in range(c.n_layers):
        qkv, gate_up = f"model.layers.{i}.self_attn.qkv_proj.weight", f"model.layers.{i}.mlp.gate_up_proj.weight"
        parts = {
            "q_proj": (qkv, (q + 2 * kv, d), 0, q, reordered(c.n_heads, order)),
            "k_proj": (qkv, (q + 2 * kv, d), q, kv, reordered(c.n_kv_heads, order)),
            "v_proj": (qkv, (q + 2 * kv, d), q + kv, kv, None),
            "gate_proj": (gate_up, (2 * c.d_ff, d), 0, c.d_ff, None),
            "up_proj": (gate_up, (2 * c.d_ff, d), c.d_ff, c.d_ff, None),
        }
        for name, (stored, shape, first, rows, then) in parts.items():
            names[f"layers.{i}.{name}.weight"] = StoredTensor(stored, shape, rows_of(first, rows, then))
    return names


def rows_of(first: int, count: int, then: Callable[[Array], Array] | None = None) -> Callable[[Array], Array]:
    """Some rows of a stored matrix, put in another order by `then`."""

    def convert(x: Array) -> Array:
        part = x[first : first + count]
        return part if then is None else then(part)

    return convert


def constants(c: TransformerConfig) -> dict[str, Array]:
    """The rotary buffers."""
    found = {"frequency": c.rope.frequencies(c.head_dim)}
    if c.rope.attention_factor != 1.0:
        found["amplitude"] = c.rope.amplitudes(c.head_dim)
    return found


FAMILY = Family(
    name="transformer",
    config=TransformerConfig,
    model=Transformer,
    checkpoint=Checkpoint(
        model_types=("llama", "qwen2", "qwen3"),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=("rotary_emb.inv_freq",),
    ),
    other_checkpoints=(Checkpoint(model_types=("phi3",), config=phi3_config, tensors=phi3_tensors),),
    zoo={},
    tiny=TransformerConfig(256, 128, 4, 4, 4, 32, 264),
    state_formula="8 L Hk e M",
    growth="linear",
    ops=("rotary", "cached_attention"),
    random_tensor=random_tensor,
    constants=constants,
)
