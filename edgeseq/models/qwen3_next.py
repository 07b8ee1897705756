"""Qwen3-Next (Alibaba 2025): Gated DeltaNet layers, one in four of gated attention, experts behind each.

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lm = L - La are Gated DeltaNet
  d  model width           F  width of the feed-forward of a layer without experts
  E  experts, A chosen, and one that every token has, behind a gate: see `moe.py`
  H  query heads           Hk key/value heads    e  head width             M  rows of the KV cache (the context)
  Hv, G, K, V, k           the mixer's value and key heads and widths, H, G, K, V and k of `gated_delta_net.py`

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  x = x + gated_delta_net(h)  or
  q, k, v = rms_norm_per_head(W_q h), rms_norm_per_head(W_k h), W_v h         q and k rotated in a quarter of a head
  x = x + W_o(attention(q, k, v) * sigmoid(W_g h))
  h = rms_norm(x);  x = x + experts(h)
The norms of a checkpoint are centred at zero: its weight w stands for 1 + w, which is what is read. The head that
drafts further tokens (`mtp.`) is left where it is, as Hugging Face's class leaves it.
State of a layer: attention.key and attention.value [1,Hk,M,e], or delta_net.conv_q, conv_k [1,k-1,G K], conv_v
[1,k-1,Hv V] and delta_net.delta [1,Hv,K,V].
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor
from edgeseq.models.gated_delta_net import DeltaConfig, GatedDeltaMixer, qwen_mixer
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import (
    GatedMLP,
    Hybrid,
    HybridLayer,
    attention_layers,
    below,
    layer_kinds,
    mlp_tensors,
    random_tensor,
)
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    Norm,
    attention_tensors,
    rope_constants,
    rope_from_hf,
)
from edgeseq.models.moe import Moe, MoeConfig, stored_stacks
from edgeseq.models.rope import RopeConfig, channel_order

QUARTER = RopeConfig(share=0.25)


@dataclass(frozen=True)
class Qwen3NextConfig:
    """Shape of a Qwen3-Next model; `attention_at` are the layers that attend, `dense_at` those without experts."""

    vocab_size: int
    d_model: int
    n_layers: int
    attention_at: tuple[int, ...]
    dense_at: tuple[int, ...]
    attention: AttentionConfig
    delta_net: DeltaConfig
    experts: MoeConfig
    d_ff: int
    eps: float = 1e-6
    tie: bool = False
    rope: RopeConfig = QUARTER


class GatedAttention(Attention):
    """Attention whose queries and keys are normed head by head, and whose output is gated channel by channel."""

    def __init__(self, c: AttentionConfig, eps: float) -> None:
        super().__init__(c)
        self.eps = eps
        self.g_proj = nn.Linear(c.width, c.n_heads * c.head_dim, bias=c.bias)
        self.q_norm = nn.Parameter(torch.ones(c.head_dim))
        self.k_norm = nn.Parameter(torch.ones(c.head_dim))

    def project(self, h: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = super().project(h, norm)
        each = (x.unflatten(-1, (-1, self.c.head_dim)) for x in (q, k))
        q, k = (norm(x, w, self.eps).flatten(-2) for x, w in zip(each, (self.q_norm, self.k_norm), strict=True))
        return q, k, v

    def out(self, o: Tensor, h: Tensor) -> Tensor:
        return self.o_proj(o * torch.sigmoid(self.g_proj(h)))


class Qwen3Next(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: Qwen3NextConfig) -> None:
        super().__init__(config, self._layers(config), config.rope, config.attention.head_dim)

    @staticmethod
    def _layers(c: Qwen3NextConfig) -> Iterator[nn.Module]:
        for i in range(c.n_layers):
            attends, dense = i in c.attention_at, i in c.dense_at
            mixers: dict[str, nn.Module] = (
                {"attention": GatedAttention(c.attention, c.eps)}
                if attends
                else {"delta_net": GatedDeltaMixer(c.delta_net)}
            )
            feed_forward = GatedMLP(c.d_model, c.d_ff) if dense else Moe(c.d_model, c.experts)
            yield HybridLayer(c.d_model, c.eps, mixers, feed_forward)


def config_from_hf(raw: Mapping[str, Any]) -> Qwen3NextConfig:
    """config.json of `Qwen3NextForCausalLM`."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    d_model, n_heads = r.positive("hidden_size", default=2048), r.positive("num_attention_heads", default=16)
    n_layers, eps = r.positive("num_hidden_layers", default=48, most=MOST_LAYERS), r.number("rms_norm_eps", 1e-6)
    head_dim = r.positive("head_dim", default=256, least=2)
    return Qwen3NextConfig(
        vocab_size=r.positive("vocab_size", default=151936),
        d_model=d_model,
        n_layers=n_layers,
        attention_at=_attention_at(r, n_layers),
        dense_at=_dense_at(r, n_layers),
        attention=AttentionConfig(
            d_model,
            n_heads,
            r.positive("num_key_value_heads", default=2),
            head_dim,
            r.flag("attention_bias", False),
        ),
        delta_net=DeltaConfig(
            d_model,
            r.positive("linear_num_key_heads", default=16),
            r.positive("linear_num_value_heads", default=32),
            r.positive("linear_key_head_dim", default=128),
            r.positive("linear_value_head_dim", default=128),
            r.positive("linear_conv_kernel_dim", default=4, least=2),
            eps=eps,
        ),
        experts=_experts_config(r),
        d_ff=r.positive("intermediate_size", default=5632),
        eps=eps,
        tie=r.flag("tie_word_embeddings", False),
        rope=rope_from_hf(raw, head_dim, 0.25),
    )


def _attention_at(r: ConfigReader, n_layers: int) -> tuple[int, ...]:
    if r.get("layer_types") is None and r.get("layers_block_type") is None:
        interval = r.positive("full_attention_interval", default=4)
        return tuple(range(interval - 1, n_layers, interval))
    kinds = layer_kinds(r, n_layers, {"linear_attention": 0, "full_attention": 1})
    return tuple(i for i, kind in enumerate(kinds) if kind)


def _dense_at(r: ConfigReader, n_layers: int) -> tuple[int, ...]:
    """Layers that are named, and those the step leaves out; all where there are no experts."""
    named = attention_layers(n_layers, r.get("mlp_only_layers"), "mlp_only_layers")
    step = r.positive("decoder_sparse_step", default=1)
    none = not r.positive("num_experts", default=512, least=0)
    return tuple(i for i in range(n_layers) if none or i in named or (i + 1) % step)


def _experts_config(r: ConfigReader) -> MoeConfig:
    count = r.positive("num_experts", default=512, least=0, most=1 << 16)
    return MoeConfig(
        max(count, 1),
        r.positive("num_experts_per_tok", default=10) if count else 1,
        r.positive("moe_intermediate_size", default=512),
        renormalise=r.flag("norm_topk_prob", True),
        d_shared=r.positive("shared_expert_intermediate_size", default=512),
        shared_gate=True,
    )


def hf_tensors(c: Qwen3NextConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `Qwen3NextForCausalLM`, whose experts lie one by one or in stacks."""
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model)),
        "norm": _centred("model.norm.weight", c.d_model),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = _centred(f"{theirs}input_layernorm.weight", c.d_model)
        names[f"{ours}ff_norm"] = _centred(f"{theirs}post_attention_layernorm.weight", c.d_model)
        if i in c.attention_at:
            parts = below("attention.", _attention(c, f"{theirs}self_attn."))
        else:
            parts = below("delta_net.", qwen_mixer(c.delta_net, f"{theirs}linear_attn."))
        dense = i in c.dense_at
        feed_forward = mlp_tensors(c.d_model, c.d_ff, f"{theirs}mlp.") if dense else _experts(c, f"{theirs}mlp.")
        names |= below(ours, parts | below("feed_forward.", feed_forward))
    return names


def _centred(name: str, width: int, order: Array | None = None) -> StoredTensor:
    """A norm whose weight is stored less one; `order` as in `channel_order`."""
    return StoredTensor(name, (width,), lambda w: 1.0 + (w if order is None else w[order]))


def _attention(c: Qwen3NextConfig, theirs: str) -> dict[str, StoredTensor]:
    """The query projection is stored with the gate's: rows of each head, then those of its gate."""
    a, e = c.attention, c.attention.head_dim
    turned = c.rope.turned(e)
    order, names = channel_order(e, turned), attention_tensors(a, theirs, turned)
    for kind in ("weight", "bias") if a.bias else ("weight",):
        both = (2 * a.n_heads * e, a.width)[: 2 if kind == "weight" else 1]
        stored = replace(names[f"q_proj.{kind}"], shape=both)
        names[f"q_proj.{kind}"] = replace(stored, convert=_of_each_head(a.n_heads, order))
        names[f"g_proj.{kind}"] = replace(stored, convert=_of_each_head(a.n_heads, e + np.arange(e)))
    names["q_norm"], names["k_norm"] = (_centred(f"{theirs}{x}_norm.weight", e, order) for x in "qk")
    return names


def _of_each_head(heads: int, rows: Array) -> Callable[[Array], Array]:
    """These rows of each of `heads` equal parts."""

    def chosen(x: Array) -> Array:
        parts = x.reshape(heads, -1, *x.shape[1:])[:, rows]
        return np.ascontiguousarray(parts.reshape(-1, *x.shape[1:]))

    return chosen


def _experts(c: Qwen3NextConfig, theirs: str) -> dict[str, StoredTensor]:
    m, d, inside = c.experts, c.d_model, f"{theirs}experts."
    gate, up, down = (f"{inside}{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    names = stored_stacks(m, d, (f"{inside}gate_up_proj", f"{inside}down_proj"), (gate, up, down))
    shared = mlp_tensors(d, m.d_shared, f"{theirs}shared_expert.")
    return names | {
        "router.weight": StoredTensor(f"{theirs}gate.weight", (m.n_experts, d)),
        "shared_router.weight": StoredTensor(f"{theirs}shared_expert_gate.weight", (1, d)),
        **{f"shared_{name}": stored for name, stored in shared.items()},
    }


FAMILY = Family(
    name="qwen3-next",
    config=Qwen3NextConfig,
    model=Qwen3Next,
    checkpoint=Checkpoint(
        model_types=("qwen3_next",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=("rotary_emb.inv_freq",),
        beside=("mtp.",),
    ),
    # Qwen/Qwen3-Next-80B-A3B-Instruct: one layer in four attends, 10 of 512 experts.
    zoo={
        "qwen3-next-80b": Qwen3NextConfig(
            151936, 2048, 48, tuple(range(3, 48, 4)), (), AttentionConfig(2048, 16, 2, 256),
            DeltaConfig(2048, 16, 32, 128, 128), MoeConfig(512, 10, 512, d_shared=512, shared_gate=True),
            5632, rope=RopeConfig(1e7, share=0.25),
        )
    },
    tiny=Qwen3NextConfig(
        256, 128, 4, (3,), (), AttentionConfig(128, 4, 2, 32), DeltaConfig(128, 2, 4, 32, 32),
        MoeConfig(4, 2, 56, d_shared=32, shared_gate=True), 64, tie=True,
    ),
    state_formula="4 (Lm (Hv K V + (2 G K + Hv V) (k - 1)) + 2 La Hk e M)",
    growth="linear",
    ops=("causal_conv", "linear_attention", "rotary", "cached_attention", "expert_linear"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.rope, c.attention.head_dim),
)  # fmt: skip
