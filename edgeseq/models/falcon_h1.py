"""Falcon-H1 (TII 2025, arXiv 2507.22448): attention and Mamba-2 side by side in every layer.

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           F  width of the gated feed-forward
  H  query heads           Hk key/value heads    e  head width             M  rows of the KV cache (the context)
  D, N, P, G, k            the Mamba-2 mixer's letters, see `mamba2.py`

One layer, with x the residual stream [B,T,d], at position p:
  h = rms_norm(x)
  x = x + mamba2(h) + attention(h)               both read the same h
  h = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
State of a layer: mamba.conv [1,k-1,D+2GN], mamba.ssm [1,H,N,P], attention.key and attention.value [1,Hk,M,e].

A checkpoint's multipliers (maximal update parametrisation) all stand before or behind a matrix: they are multiplied
into it when it is read, that of the scores into the last norm. The one of the embedding is applied, for a tied table
is also the head's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
from torch import nn

from edgeseq.errors import SourceError
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import GatedMLP, Hybrid, HybridLayer, below, mlp_tensors, scaled, ssd_from_hf
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    attention_tensors,
    rope_constants,
    rope_from_hf,
    whole_heads,
)
from edgeseq.models.mamba2 import Norm as GateNorm
from edgeseq.models.mamba2 import SSDConfig, SSDMixer, mixer_tensors
from edgeseq.models.rope import RopeConfig
from edgeseq.models.stack import random_tensor


@dataclass(frozen=True)
class Multipliers:
    """What a checkpoint's matrices are multiplied with when they are read; `ssm` are those of z, x, B, C and dt."""

    embedding: float = 1.0
    head: float = 1.0
    attention_in: float = 1.0
    attention_out: float = 1.0
    key: float = 1.0
    ssm_in: float = 1.0
    ssm_out: float = 1.0
    ssm: tuple[float, ...] = (1.0,) * 5
    gate: float = 1.0
    down: float = 1.0


@dataclass(frozen=True)
class FalconH1Config:
    """Shape of a Falcon-H1 model. `multipliers.embedding` alone acts in the model, the others while it is read."""

    vocab_size: int
    d_model: int
    n_layers: int
    attention: AttentionConfig
    mamba: SSDConfig
    d_ff: int
    eps: float = 1e-5
    mlp_bias: bool = False
    tie: bool = False
    rope: RopeConfig = field(default_factory=RopeConfig)
    multipliers: Multipliers = field(default_factory=Multipliers)


class FalconH1(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: FalconH1Config) -> None:
        scale = config.multipliers.embedding
        super().__init__(config, self._layers(config), config.rope, config.attention.head_dim, scale)

    @staticmethod
    def _layers(c: FalconH1Config) -> Iterator[nn.Module]:
        for _ in range(c.n_layers):
            mixers = {"mamba": SSDMixer(c.mamba), "attention": Attention(c.attention)}
            yield HybridLayer(c.d_model, c.eps, mixers, GatedMLP(c.d_model, c.d_ff, c.mlp_bias))


def config_from_hf(raw: Mapping[str, Any]) -> FalconH1Config:
    """config.json of `FalconH1ForCausalLM`."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    r.only("mamba_use_mlp", True)
    r.only("attn_layer_indices", None)
    d_model, n_heads = r.positive("hidden_size", default=4096), r.positive("num_attention_heads", default=32)
    eps, head_dim = r.number("rms_norm_eps", 1e-5), r.positive("head_dim", default=d_model // n_heads, least=2)
    d_inner = r.positive("mamba_d_ssm", default=1024) if r.get("mamba_d_ssm") or "mamba_d_ssm" not in raw else None
    projectors_bias = r.flag("projectors_bias", False)
    return FalconH1Config(
        vocab_size=r.positive("vocab_size", default=128000),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", default=32, most=MOST_LAYERS),
        attention=AttentionConfig(
            d_model,
            n_heads,
            r.positive("num_key_value_heads", default=8 if "num_key_value_heads" not in raw else n_heads),
            head_dim,
            r.flag("attention_bias", False),
        ),
        mamba=ssd_from_hf(r, d_model, eps, _gate_norm(r), d_inner, projectors_bias),
        d_ff=r.positive("intermediate_size", default=14336),
        eps=eps,
        mlp_bias=r.flag("mlp_bias", False),
        tie=r.flag("tie_word_embeddings", False),
        rope=whole_heads(rope_from_hf(raw, head_dim)),
        multipliers=_multipliers(r),
    )


def _gate_norm(r: ConfigReader) -> GateNorm:
    before = r.flag("mamba_norm_before_gate", True)
    if not r.flag("mamba_rms_norm", False):
        return "none"
    return "norm_first" if before else "gate_first"


def _multipliers(r: ConfigReader) -> Multipliers:
    gate, down = _numbers(r, "mlp_multipliers", 2)
    return Multipliers(
        embedding=r.number("embedding_multiplier", 1.0),
        head=r.number("lm_head_multiplier", 1.0),
        attention_in=r.number("attention_in_multiplier", 1.0),
        attention_out=r.number("attention_out_multiplier", 1.0),
        key=r.number("key_multiplier", 1.0),
        ssm_in=r.number("ssm_in_multiplier", 1.0),
        ssm_out=r.number("ssm_out_multiplier", 1.0),
        ssm=_numbers(r, "ssm_multipliers", 5),
        gate=gate,
        down=down,
    )


def _numbers(r: ConfigReader, name: str, count: int) -> tuple[float, ...]:
    """`count` positive numbers, ones where the field is absent."""
    values = r.get(name)
    values = [1.0] * count if values is None else values
    if not isinstance(values, list) or len(values) != count:
        raise SourceError(f"config.json: {name} is {values!r:.60}, but must be {count} numbers")
    return tuple(ConfigReader({f"[{i}]": v}, name).number(f"[{i}]") for i, v in enumerate(values))


def hf_tensors(c: FalconH1Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `FalconH1ForCausalLM`, scaled by the multipliers."""
    m = c.multipliers
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model)),
        "norm": scaled(StoredTensor("model.final_layernorm.weight", (c.d_model,)), m.head),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}input_layernorm.weight", (c.d_model,))
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}pre_ff_layernorm.weight", (c.d_model,))
        parts = below("mamba.", mixer_tensors(c.mamba, f"{theirs}mamba."))
        parts |= below("attention.", attention_tensors(c.attention, f"{theirs}self_attn."))
        parts |= below("feed_forward.", mlp_tensors(c.d_model, c.d_ff, f"{theirs}feed_forward.", c.mlp_bias))
        factors = _factors(c)
        names |= below(ours, {name: scaled(stored, factors.get(name, 1.0)) for name, stored in parts.items()})
    return names


def _factors(c: FalconH1Config) -> dict[str, float | Array]:
    """Name of a tensor below its layer -> what it, or each of its rows, is multiplied with."""
    m, groups = c.multipliers, c.mamba.n_groups * c.mamba.d_state
    rows = np.repeat(m.ssm, [c.mamba.d_inner, c.mamba.d_inner, groups, groups, c.mamba.n_heads])
    factors: dict[str, float | Array] = {
        "mamba.in_proj.weight": m.ssm_in * rows,
        "mamba.in_proj.bias": rows,
        "attention.q_proj.weight": m.attention_in,
        "attention.k_proj.weight": m.attention_in * m.key,
        "attention.k_proj.bias": m.key,
        "attention.v_proj.weight": m.attention_in,
    }
    for kind in ("weight", "bias"):
        factors[f"mamba.out_proj.{kind}"] = m.ssm_out
        factors[f"attention.o_proj.{kind}"] = m.attention_out
        factors[f"feed_forward.gate_proj.{kind}"] = m.gate
        factors[f"feed_forward.down_proj.{kind}"] = m.down
    return factors


def _public(d: int, layers: int, heads: int, ssm_heads: int, d_ff: int, vocab: int) -> FalconH1Config:
    """Shapes of tiiuae/Falcon-H1-*: two key/value heads of 64, Mamba-2 heads of 64, N 128, theta 1e11."""
    attention, mamba = AttentionConfig(d, heads, 2, 64), SSDConfig(d, ssm_heads, 64, 128, norm="none")
    return FalconH1Config(vocab, d, layers, attention, mamba, d_ff, rope=RopeConfig(1e11))


FAMILY = Family(
    name="falcon-h1",
    config=FalconH1Config,
    model=FalconH1,
    checkpoint=Checkpoint(
        model_types=("falcon_h1",), config=config_from_hf, tensors=hf_tensors, ignored=("rotary_emb.inv_freq",)
    ),
    zoo={"falcon-h1-0.5b": _public(1024, 36, 8, 24, 2048, 32784)},
    tiny=FalconH1Config(
        256, 128, 4, AttentionConfig(128, 4, 2, 32), SSDConfig(128, 4, 32, 32, norm="none"), 152, tie=True
    ),
    state_formula="4 L (D N + (D + 2 G N) (k - 1) + 2 Hk e M)",
    growth="linear",
    ops=("causal_conv", "linear_attention", "rotary", "cached_attention"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.rope, c.attention.head_dim),
)
