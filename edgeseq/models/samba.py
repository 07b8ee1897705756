"""Samba (Ren et al. 2024, arXiv 2406.07522): Mamba layers and layers of sliding-window attention in turn.

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lm = L - La are Mamba
  d  model width           F  width of the gated feed-forward
  H  query heads           Hk key/value heads    e  head width             W  window, the current token counted
  D, N, R, k               the Mamba mixer's letters, see `mamba.py`

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  x = x + mamba(h)  or  x + window_attention(h)
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
The state has three scales of time, and none grows: mamba.conv [1,k-1,D] the last k-1 tokens, attention.key and
attention.value [1,Hk,W,e] a ring of the last W, mamba.ssm [1,N,D] all of them.
"""

from __future__ import annotations

import math
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
    random_tensor,
)
from edgeseq.models.hybrid_attention import Attention, AttentionConfig, attention_tensors, rope_constants
from edgeseq.models.mamba import MambaMixer, MambaShape, mixer_tensors
from edgeseq.models.rope import RopeConfig


@dataclass(frozen=True)
class SambaConfig:
    """Shape of a Samba model; `attention_at` are the layers that attend, theta the base of their rotary positions."""

    vocab_size: int
    d_model: int
    n_layers: int
    attention_at: tuple[int, ...]
    attention: AttentionConfig
    mamba: MambaShape
    d_ff: int
    theta: float = 10000.0
    eps: float = 1e-5
    tie: bool = False


class Samba(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: SambaConfig) -> None:
        super().__init__(config, self._layers(config), RopeConfig(config.theta), config.attention.head_dim)

    @staticmethod
    def _layers(c: SambaConfig) -> Iterator[nn.Module]:
        for i in range(c.n_layers):
            attends = i in c.attention_at
            mixers = {"attention": Attention(c.attention)} if attends else {"mamba": MambaMixer(c.mamba)}
            yield HybridLayer(c.d_model, c.eps, mixers, GatedMLP(c.d_model, c.d_ff))


def config_from_hf(raw: Mapping[str, Any]) -> SambaConfig:
    """config.json of flash-linear-attention's `SambaForCausalLM`; a null window makes its caches grow."""
    r = ConfigReader(raw)
    r.only("hidden_act", "swish", "silu")
    r.only("use_conv_bias", True)
    d_model, n_layers = (
        r.positive("hidden_size", default=2304),
        r.positive("num_hidden_layers", default=18, most=MOST_LAYERS),
    )
    r.only("intermediate_size", int(r.number("expand", 2) * d_model))
    a = ConfigReader(r.get("attn"), "attn.")
    heads = a.positive("num_heads")
    if d_model % heads or d_model // heads % 2:
        raise SourceError(f"config.json: attn.num_heads {heads} do not divide the width {d_model} into even parts")
    a.only("qk_norm", False)
    rank = r.get("time_step_rank")
    return SambaConfig(
        vocab_size=r.positive("vocab_size", default=32000),
        d_model=d_model,
        n_layers=n_layers,
        attention_at=attention_layers(n_layers, a.get("layers"), "attn.layers"),
        attention=AttentionConfig(
            d_model,
            heads,
            a.positive("num_kv_heads", default=heads),
            d_model // heads,
            a.flag("qkv_bias", False),
            window=0 if a.get("window_size") is None else a.positive("window_size"),
            out_bias=False,
        ),
        mamba=MambaShape(
            d_model,
            int(r.number("expand", 2) * d_model),
            r.positive("state_size", default=16),
            r.positive("conv_kernel", default=4, least=2),
            math.ceil(d_model / 16) if rank in (None, "auto") else r.positive("time_step_rank"),
            r.flag("use_bias", False),
        ),
        d_ff=-(-int(d_model * r.number("hidden_ratio", 4) * 2 / 3) // 256) * 256,
        theta=a.number("rope_theta", 10000.0),
        eps=r.number("norm_eps", 1e-5),
        tie=r.flag("tie_word_embeddings", False),
    )


def fla_tensors(c: SambaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in flash-linear-attention's `SambaForCausalLM`."""
    names = {
        "embed.weight": StoredTensor("backbone.embeddings.weight", (c.vocab_size, c.d_model)),
        "norm": StoredTensor("backbone.norm_f.weight", (c.d_model,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"backbone.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}mixer_norm.weight", (c.d_model,))
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}mlp_norm.weight", (c.d_model,))
        if i in c.attention_at:
            mixer = below("attention.", attention_tensors(c.attention, f"{theirs}mixer."))
        else:
            mixer = below("mamba.", mixer_tensors(c.mamba, f"{theirs}mixer."))
        names |= below(ours, mixer | below("feed_forward.", mlp_tensors(c.d_model, c.d_ff, f"{theirs}mlp.")))
    return names


FAMILY = Family(
    name="samba",
    config=SambaConfig,
    model=Samba,
    checkpoint=Checkpoint(
        model_types=("samba",), config=config_from_hf, tensors=fla_tensors, ignored=("rotary.inv_freq",)
    ),
    # Samba-421M of the paper: 12 layers in turn, 12 heads of 128, window 2048, F 4096, a tied head.
    zoo={
        "samba-421m": SambaConfig(
            32000, 1536, 12, (1, 3, 5, 7, 9, 11), AttentionConfig(1536, 12, 12, 128, window=2048),
            MambaShape(1536, 3072, dt_rank=96), 4096, tie=True,
        )
    },
    tiny=SambaConfig(
        256, 128, 4, (1, 3), AttentionConfig(128, 4, 4, 32, window=32),
        MambaShape(128, 256, 8, dt_rank=8), 206, tie=True,
    ),
    state_formula="4 (Lm D (N + k - 1) + 2 La Hk e W)",
    growth="window",
    ops=("causal_conv", "selective_scan", "rotary", "window_attention"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(RopeConfig(c.theta), c.attention.head_dim),
)  # fmt: skip
