"""Granite 4 (IBM 2025, `GraniteMoeHybrid`): Mamba-2 and attention layers, each with a feed-forward for every token and,
in some sizes, a mixture of experts beside it.

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lm = L - La are Mamba-2
  d  model width           Fs width of the feed-forward that every token has
  E  experts, A chosen, F  see `moe.py`
  H  query heads           Hk key/value heads    e  head width             M  rows of the KV cache (the context)
  D, N, P, G, k            the Mamba-2 mixer's letters, see `mamba2.py`

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  x = x + attention(h)  or  x + mamba2(h)        the published sizes rotate nothing; scores are scaled by a constant
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h) [+ experts(h)]
State of a layer: attention.key and attention.value [1,Hk,M,e], or mamba.conv [1,k-1,D+2GN] and mamba.ssm [1,H,N,P].

A checkpoint's multiplier of what is added to the stream is multiplied into the matrices that write to it, the divisor
of the scores into the last norm, when they are read. The multiplier of the embedding is applied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import nn

from edgeseq.errors import SourceError
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import (
    GatedMLP,
    Hybrid,
    HybridLayer,
    below,
    layer_kinds,
    random_tensor,
    scaled,
    ssd_from_hf,
)
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    attention_tensors,
    rope_constants,
    rope_from_hf,
    whole_heads,
)
from edgeseq.models.mamba2 import SSDConfig, SSDMixer, mixer_tensors
from edgeseq.models.moe import Moe, MoeConfig, flatten
from edgeseq.models.rope import RopeConfig


@dataclass(frozen=True)
class GraniteHybridConfig:
    """Shape of a Granite 4 model; `attention_at` are the layers that attend.

    experts: the mixture, whose d_shared is d_ff, or None where there is none. rope None: nothing is rotated.
    embed_scale multiplies the embedding; residual_scale and logits_divisor act while a checkpoint is read.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    attention_at: tuple[int, ...]
    attention: AttentionConfig
    mamba: SSDConfig
    d_ff: int
    experts: MoeConfig | None = None
    eps: float = 1e-5
    tie: bool = True
    rope: RopeConfig | None = None
    embed_scale: float = 1.0
    residual_scale: float = 1.0
    logits_divisor: float = 1.0

    def __post_init__(self) -> None:
        if self.experts is not None and self.experts.d_shared != self.d_ff:
            raise SourceError(f"A feed-forward {self.d_ff} wide is another beside experts, {self.experts.d_shared}")


class GraniteHybrid(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: GraniteHybridConfig) -> None:
        super().__init__(config, self._layers(config), config.rope, config.attention.head_dim, config.embed_scale)

    @staticmethod
    def _layers(c: GraniteHybridConfig) -> Iterator[nn.Module]:
        for i in range(c.n_layers):
            attends = i in c.attention_at
            mixers = {"attention": Attention(c.attention)} if attends else {"mamba": SSDMixer(c.mamba)}
            feed_forward = Moe(c.d_model, c.experts) if c.experts else GatedMLP(c.d_model, c.d_ff)
            yield HybridLayer(c.d_model, c.eps, mixers, feed_forward)


def config_from_hf(raw: Mapping[str, Any]) -> GraniteHybridConfig:
    """config.json of `GraniteMoeHybridForCausalLM`."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    r.only("position_embedding_type", "nope", "rope")
    d_model, n_heads = r.positive("hidden_size", default=4096), r.positive("num_attention_heads", default=32)
    n_layers, eps = r.positive("num_hidden_layers", default=32, most=MOST_LAYERS), r.number("rms_norm_eps", 1e-6)
    head_dim = r.positive("head_dim", default=d_model // n_heads)
    d_ff = r.positive("shared_intermediate_size", default=1024)
    kinds = layer_kinds(r, n_layers, {"mamba": 0, "linear_attention": 0, "attention": 1, "full_attention": 1})
    rotates = r.get("position_embedding_type") == "rope"
    return GraniteHybridConfig(
        vocab_size=r.positive("vocab_size", default=32000),
        d_model=d_model,
        n_layers=n_layers,
        attention_at=tuple(i for i, kind in enumerate(kinds) if kind),
        attention=AttentionConfig(
            d_model,
            n_heads,
            r.positive("num_key_value_heads", default=n_heads),
            head_dim,
            r.flag("attention_bias", False),
            scale=r.number("attention_multiplier", 1.0),
        ),
        mamba=ssd_from_hf(r, d_model, eps, "gate_first"),
        d_ff=d_ff,
        experts=_experts(r, d_ff),
        eps=eps,
        tie=r.flag("tie_word_embeddings", False),
        rope=whole_heads(rope_from_hf(raw, head_dim)) if rotates else None,
        embed_scale=r.number("embedding_multiplier", 1.0),
        residual_scale=r.number("residual_multiplier", 1.0),
        logits_divisor=r.number("logits_scaling", 1.0),
    )


def _experts(r: ConfigReader, d_ff: int) -> MoeConfig | None:
    count = r.positive("num_local_experts", default=8, least=0, most=1 << 16)
    if not count:
        return None
    top_k, width = r.positive("num_experts_per_tok", default=2), r.positive("intermediate_size", default=11008)
    return MoeConfig(count, top_k, width, d_shared=d_ff)


def hf_tensors(c: GraniteHybridConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `GraniteMoeHybridForCausalLM`, scaled by the multipliers."""
    last = scaled(StoredTensor("model.norm.weight", (c.d_model,)), 1.0 / c.logits_divisor)
    names = {"embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model)), "norm": last}
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}input_layernorm.weight", (c.d_model,))
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}post_attention_layernorm.weight", (c.d_model,))
        if i in c.attention_at:
            parts = below("attention.", attention_tensors(c.attention, f"{theirs}self_attn."))
        else:
            parts = below("mamba.", mixer_tensors(c.mamba, f"{theirs}mamba."))
        parts |= below("feed_forward.", _feed_forward(c, theirs))
        for name, stored in parts.items():
            writes = name.rpartition(".")[0].endswith(("out_proj", "o_proj", "down_proj"))
            names[f"{ours}{name}"] = scaled(stored, c.residual_scale) if writes else stored
    return names


def _feed_forward(c: GraniteHybridConfig, theirs: str) -> dict[str, StoredTensor]:
    """The feed-forward of every token, stored with gate rows above up rows, and the experts."""
    d, f, prefix = c.d_model, c.d_ff, "shared_" if c.experts else ""
    both, down = f"{theirs}shared_mlp.input_linear.weight", f"{theirs}shared_mlp.output_linear.weight"
    names = {
        f"{prefix}gate_proj.weight": StoredTensor(both, (2 * f, d), _rows(0, f)),
        f"{prefix}up_proj.weight": StoredTensor(both, (2 * f, d), _rows(f, 2 * f)),
        f"{prefix}down_proj.weight": StoredTensor(down, (d, f)),
    }
    if c.experts is None:
        return names
    E, F, moe = c.experts.n_experts, c.experts.d_ff, f"{theirs}block_sparse_moe."
    return names | {
        "router.weight": StoredTensor(f"{moe}router.layer.weight", (E, d)),
        "gate_up_proj.weight": StoredTensor(f"{moe}input_linear.weight", (E, 2 * F, d), flatten),
        "down_proj.weight": StoredTensor(f"{moe}output_linear.weight", (E, d, F), flatten),
    }


def _rows(begin: int, end: int) -> Callable[[Array], Array]:
    return lambda x: np.ascontiguousarray(x[begin:end])


FAMILY = Family(
    name="granite-hybrid",
    config=GraniteHybridConfig,
    model=GraniteHybrid,
    checkpoint=Checkpoint(
        model_types=("granitemoehybrid",),
        config=config_from_hf,
        tensors=hf_tensors,
        ignored=("rotary_emb.inv_freq",),
    ),
    # ibm-granite/granite-4.0-h-350m, without experts, and granite-4.0-h-tiny, 6 of 64 experts.
    zoo={
        "granite-4.0-h-350m": GraniteHybridConfig(
            100352, 768, 32, (10, 13, 17, 27), AttentionConfig(768, 12, 4, 64, scale=0.015625),
            SSDConfig(768, 48, 32, 128), 2048,
        ),
        "granite-4.0-h-tiny": GraniteHybridConfig(
            100352, 1536, 40, (5, 15, 25, 35), AttentionConfig(1536, 12, 4, 128, scale=0.0078125),
            SSDConfig(1536, 48, 64, 128), 1024, MoeConfig(64, 6, 512, d_shared=1024),
        ),
    },
    tiny=GraniteHybridConfig(
        256, 128, 4, (1,), AttentionConfig(128, 4, 2, 32), SSDConfig(128, 4, 32, 32), 32,
        MoeConfig(4, 2, 64, d_shared=32),
    ),
    state_formula="4 (Lm (D N + (D + 2 G N) (k - 1)) + 2 La Hk e M)",
    growth="linear",
    ops=("causal_conv", "linear_attention", "cached_attention", "expert_linear"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.rope, c.attention.head_dim),
)  # fmt: skip
