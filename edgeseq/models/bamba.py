"""Bamba (IBM, Princeton, CMU and UIUC 2024): Mamba-2 layers, and here and there one of attention instead.

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lm = L - La are Mamba-2
  d  model width           F  width of the gated feed-forward
  H  query heads           Hk key/value heads    e  head width             M  rows of the KV cache (the context)
  D, N, P, G, k            the Mamba-2 mixer's letters, see `mamba2.py`

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  x = x + attention(h)  or  x + mamba2(h)        queries and keys are rotated in the first half of a head
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: attention.key and attention.value [1,Hk,M,e], or mamba.conv [1,k-1,D+2GN] and mamba.ssm [1,H,N,P].
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from torch import nn

from edgeseq.errors import SourceError
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import (
    GatedMLP,
    Hybrid,
    HybridLayer,
    attention_layers,
    below,
    mlp_tensors,
    ssd_from_hf,
)
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    attention_tensors,
    rope_constants,
    rope_from_hf,
)
from edgeseq.models.mamba2 import SSDConfig, SSDMixer, mixer_tensors
from edgeseq.models.rope import RopeConfig
from edgeseq.models.stack import random_tensor

HALF = RopeConfig(share=0.5)


@dataclass(frozen=True)
class BambaConfig:
    """Shape of a Bamba model; `attention_at` are the layers that attend."""

    vocab_size: int
    d_model: int
    n_layers: int
    attention_at: tuple[int, ...]
    attention: AttentionConfig
    mamba: SSDConfig
    d_ff: int
    eps: float = 1e-5
    mlp_bias: bool = False
    tie: bool = False
    rope: RopeConfig = HALF

    def __post_init__(self) -> None:
        if self.d_model != self.attention.d_model or self.d_model != self.mamba.d_model:
            raise SourceError(f"The mixers of a model of width {self.d_model} have another one")


class Bamba(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: BambaConfig) -> None:
        super().__init__(config, self._layers(config), config.rope, config.attention.head_dim)

    @staticmethod
    def _layers(c: BambaConfig) -> Iterator[nn.Module]:
        for i in range(c.n_layers):
            attends = i in c.attention_at
            mixers = {"attention": Attention(c.attention)} if attends else {"mamba": SSDMixer(c.mamba)}
            yield HybridLayer(c.d_model, c.eps, mixers, GatedMLP(c.d_model, c.d_ff, c.mlp_bias))


def config_from_hf(raw: Mapping[str, Any]) -> BambaConfig:
    """config.json of `BambaForCausalLM`, which always rotates half of every head."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    d_model, n_heads = r.positive("hidden_size", default=4096), r.positive("num_attention_heads", default=32)
    n_layers, eps = r.positive("num_hidden_layers", default=32, most=MOST_LAYERS), r.number("rms_norm_eps", 1e-5)
    head_dim = r.positive("head_dim", default=d_model // n_heads, least=2)
    for reader in (r, ConfigReader(r.get("rope_parameters") or {}, "rope_parameters.")):
        reader.only("partial_rotary_factor", 0.5)
    r.only("attn_rotary_emb", head_dim // 2)
    return BambaConfig(
        vocab_size=r.positive("vocab_size", default=128000),
        d_model=d_model,
        n_layers=n_layers,
        attention_at=attention_layers(n_layers, r.get("attn_layer_indices"), "attn_layer_indices"),
        attention=AttentionConfig(
            d_model,
            n_heads,
            r.positive("num_key_value_heads", default=8 if "num_key_value_heads" not in raw else n_heads),
            head_dim,
            r.flag("attention_bias", False),
        ),
        mamba=ssd_from_hf(r, d_model, eps, "gate_first"),
        d_ff=r.positive("intermediate_size", default=14336),
        eps=eps,
        mlp_bias=r.flag("mlp_bias", False),
        tie=r.flag("tie_word_embeddings", False),
        rope=rope_from_hf(raw, head_dim, 0.5),
    )


def hf_tensors(c: BambaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `BambaForCausalLM`."""
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model)),
        "norm": StoredTensor("model.final_layernorm.weight", (c.d_model,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}input_layernorm.weight", (c.d_model,))
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}pre_ff_layernorm.weight", (c.d_model,))
        if i in c.attention_at:
            mixer = below(
                "attention.", attention_tensors(c.attention, f"{theirs}self_attn.", c.rope.turned(c.attention.head_dim))
            )
        else:
            mixer = below("mamba.", mixer_tensors(c.mamba, f"{theirs}mamba."))
        feed_forward = mlp_tensors(c.d_model, c.d_ff, f"{theirs}feed_forward.", c.mlp_bias)
        names |= below(ours, mixer | below("feed_forward.", feed_forward))
    return names


FAMILY = Family(
    name="bamba",
    config=BambaConfig,
    model=Bamba,
    checkpoint=Checkpoint(
        model_types=("bamba",), config=config_from_hf, tensors=hf_tensors, ignored=("rotary_emb.inv_freq",)
    ),
    # ibm-ai-platform/Bamba-9B-v1: attention in layers 9, 18 and 27, 128 Mamba-2 heads of 64, N 128.
    zoo={
        "bamba-9b": BambaConfig(
            128256, 4096, 32, (9, 18, 27), AttentionConfig(4096, 32, 8, 128), SSDConfig(4096, 128, 64, 128), 14336
        )
    },
    tiny=BambaConfig(256, 128, 4, (2,), AttentionConfig(128, 4, 2, 32), SSDConfig(128, 8, 32, 32), 192, tie=True),
    state_formula="4 (Lm (D N + (D + 2 G N) (k - 1)) + 2 La Hk e M)",
    growth="linear",
    ops=("causal_conv", "linear_attention", "rotary", "cached_attention"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.rope, c.attention.head_dim),
)
