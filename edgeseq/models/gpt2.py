"""GPT-2 (Radford et al. 2019): layer norms in front, positions that are learned, one matrix for queries, keys, values.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              e  head width, d = H e
  F  width of the feed-forward                   M  rows of the KV cache (the context)
  P  positions the model has a vector for; no sequence is longer

One layer i (from 0), with x the residual stream [B,T,d], at position p < P:
  x = E[token] + W_pos[p]                                in front of the first layer
  q, k, v = split(W_qkv layer_norm(x) + b)
  K[p], V[p] = k, v
  o = softmax(s q K^T over rows <= p) V                  s = e^-1/2, with `scale_by_layer` divided by i + 1
  x = x + W_o o + b
  x = x + W_down gelu(W_up layer_norm(x) + b) + b        gelu by its tanh approximation
State of a layer: key and value [1,H,M,e].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel
from edgeseq.models.base import Array, Checkpoint, Family, SequenceModel, StoredTensor, last_logits, normal
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.spec import StateSlot

Activation = Literal["gelu_tanh", "gelu", "relu"]
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "gelu_tanh": lambda x: F.gelu(x, approximate="tanh"),
    "gelu": F.gelu,
    "relu": F.relu,
}
HF_ACTIVATIONS: dict[str, Activation] = {
    "gelu_new": "gelu_tanh", "gelu_pytorch_tanh": "gelu_tanh", "gelu": "gelu", "relu": "relu",
}  # fmt: skip


@dataclass(frozen=True)
class Gpt2Config:
    """Shape of a GPT-2. scale_scores: scores are divided by sqrt(e); scale_by_layer: and by the layer's number."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    n_positions: int
    eps: float = 1e-5
    activation: Activation = "gelu_tanh"
    scale_scores: bool = True
    scale_by_layer: bool = False
    tie: bool = True

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise SourceError(f"A width of {self.d_model} does not divide into {self.n_heads} heads")
        if self.n_positions < 2:
            raise SourceError(f"{self.n_positions} positions are too few for a sequence")

    def scale(self, layer: int) -> float:
        """What the scores of `layer` are multiplied by."""
        scale = (self.d_model // self.n_heads) ** -0.5 if self.scale_scores else 1.0
        return scale / (layer + 1) if self.scale_by_layer else scale


class Gpt2Layer(nn.Module):
    """Attention and the feed-forward, each with its norm and residual."""

    def __init__(self, c: Gpt2Config, index: int) -> None:
        super().__init__()
        self.c, self.scale = c, c.scale(index)
        self.norm = nn.LayerNorm(c.d_model, c.eps)
        self.qkv_proj = nn.Linear(c.d_model, 3 * c.d_model)
        self.o_proj = nn.Linear(c.d_model, c.d_model)
        self.ff_norm = nn.LayerNorm(c.d_model, c.eps)
        self.up_proj = nn.Linear(c.d_model, c.d_ff)
        self.down_proj = nn.Linear(c.d_ff, c.d_model)

    def feed_forward(self, x: Tensor) -> Tensor:
        return x + self.down_proj(ACTIVATIONS[self.c.activation](self.up_proj(self.ff_norm(x))))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv_proj(self.norm(x)).split(self.c.d_model, -1)
        heads = self.c.n_heads
        x = x + self.o_proj(parallel.attention_parallel(q, k, v, heads, heads, self.scale))
        return self.feed_forward(x)

    def advance(self, x: Tensor, position: Tensor, key: Tensor, value: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.qkv_proj(self.norm(x)).split(self.c.d_model, -1)
        heads = self.c.n_heads
        o, key, value = ops.cached_attention(q, k, v, key, value, position, heads, heads, self.scale)
        return self.feed_forward(x + self.o_proj(o)), key, value


class Gpt2(SequenceModel):
    """Embeddings, layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: Gpt2Config) -> None:
        super().__init__()
        c = self.config = config
        self.longest = c.n_positions
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.place = nn.Embedding(c.n_positions, c.d_model)
        self.layers = nn.ModuleList(Gpt2Layer(c, i) for i in range(c.n_layers))
        self.norm = nn.LayerNorm(c.d_model, c.eps)
        self.head = None if c.tie else nn.Parameter(torch.empty(c.vocab_size, c.d_model))

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def embedded(self, tokens: Tensor, position: Tensor) -> Tensor:
        """What enters the first layer [B,T,d]."""
        index = position[:, None] + torch.arange(tokens.shape[1], device=tokens.device)
        return self.embed(tokens) + self.place(index)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens, tokens.new_zeros(1))
        for layer in self.layers:
            x = layer(x)
        return F.linear(self.norm(x), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        c = self.config
        if not 1 <= context <= c.n_positions:
            raise SourceError(
                f"The model has learned {c.n_positions} positions, so a context of {context} tokens is not possible",
                f"pass --context with 1 to {c.n_positions}",
            )
        shape = (1, c.n_heads, context, c.d_model // c.n_heads)
        return tuple(
            StateSlot(f"layers.{i}.{name}", "float32", shape, 0.0, "append", 2)
            for i in range(c.n_layers)
            for name in ("key", "value")
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embedded(tokens, position), []
        for i, layer in enumerate(self.layers):
            x, key, value = layer.advance(x, position, state[2 * i], state[2 * i + 1])
            new += [key, value]
        return (last_logits(x, self.norm, self.head_weight()), *new)


def random_tensor(c: Gpt2Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Variance-preserving matrices, those that write to the residual stream shrunk with depth; norms 1, biases 0."""
    if len(shape) == 1:
        return np.zeros(shape, np.float32) if name.endswith("bias") else np.ones(shape, np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if "o_proj" in name or "down_proj" in name else std)


def config_from_hf(raw: Mapping[str, Any]) -> Gpt2Config:
    """config.json of `GPT2LMHeadModel`.

    `reorder_and_upcast_attn` chooses the order of two products in half precision; in float32 it changes nothing.
    """
    r = ConfigReader(raw)
    r.only("add_cross_attention", False)
    r.only("activation_function", *HF_ACTIVATIONS)
    r.flag("reorder_and_upcast_attn", False)
    d = r.positive("n_embd", default=768)
    return Gpt2Config(
        vocab_size=r.positive("vocab_size", default=50257),
        d_model=d,
        n_layers=r.positive("n_layer", default=12, most=MOST_LAYERS),
        n_heads=r.positive("n_head", default=12),
        d_ff=r.positive("n_inner", default=4 * d),
        n_positions=r.positive("n_positions", default=1024, least=2),
        eps=r.number("layer_norm_epsilon", 1e-5),
        activation=HF_ACTIVATIONS[r.get("activation_function") or "gelu_new"],
        scale_scores=r.flag("scale_attn_weights", True),
        scale_by_layer=r.flag("scale_attn_by_inverse_layer_idx", False),
        tie=r.flag("tie_word_embeddings", True),
    )


def hf_tensors(c: Gpt2Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `GPT2LMHeadModel`, whose matrices of the layers are stored [in,out]."""
    d = c.d_model
    names = {
        "embed.weight": StoredTensor("transformer.wte.weight", (c.vocab_size, d)),
        "place.weight": StoredTensor("transformer.wpe.weight", (c.n_positions, d)),
        "norm.weight": StoredTensor("transformer.ln_f.weight", (d,)),
        "norm.bias": StoredTensor("transformer.ln_f.bias", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    linears = {
        "qkv_proj": ("attn.c_attn", d, 3 * d),
        "o_proj": ("attn.c_proj", d, d),
        "up_proj": ("mlp.c_fc", d, c.d_ff),
        "down_proj": ("mlp.c_proj", c.d_ff, d),
    }
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}", f"transformer.h.{i}"
        for norm, stored in (("norm", "ln_1"), ("ff_norm", "ln_2")):
            for part in ("weight", "bias"):
                names[f"{ours}.{norm}.{part}"] = StoredTensor(f"{theirs}.{stored}.{part}", (d,))
        for name, (stored, columns, rows) in linears.items():
            names[f"{ours}.{name}.weight"] = StoredTensor(f"{theirs}.{stored}.weight", (columns, rows), np.transpose)
            names[f"{ours}.{name}.bias"] = StoredTensor(f"{theirs}.{stored}.bias", (rows,))
    return names


FAMILY = Family(
    name="gpt2",
    config=Gpt2Config,
    model=Gpt2,
    checkpoint=Checkpoint(
        model_types=("gpt2",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=(".attn.bias", ".attn.masked_bias"),
        optional_prefix="transformer.",
    ),
    zoo={
        "gpt2": Gpt2Config(50257, 768, 12, 12, 3072, 1024),
        "gpt2-medium": Gpt2Config(50257, 1024, 24, 16, 4096, 1024),
        "gpt2-large": Gpt2Config(50257, 1280, 36, 20, 5120, 1024),
        "gpt2-xl": Gpt2Config(50257, 1600, 48, 25, 6400, 1024),
    },
    tiny=Gpt2Config(256, 128, 4, 4, 360, 256),
    state_formula="8 L d M",
    growth="linear",
    ops=("cached_attention",),
    random_tensor=random_tensor,
)
