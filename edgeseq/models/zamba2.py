"""Zamba2 (Zyphra 2024, arXiv 2411.15242): Mamba-2 layers, some of which also use a transformer block that they share.

Glossary
  B  batch                 T  tokens             L  layers
  U  uses of shared blocks b  shared blocks; use u is of block u mod b
  d  model width           F  width of the gated feed-forward            R  rank of an adapter
  H  query heads           Hk key/value heads    e  head width, 2 d / H  M  rows of a KV cache (the context)
  D, N, P, G, k            the Mamba-2 mixer's letters, see `mamba2.py`

One layer, with x the residual stream and x0 the embeddings, [B,T,d] each; the first three lines where it is a use:
  h = rms_norm([x, x0])                                         [B,T,2d]
  o = attention(h)                 scores scaled by (e/2)^-1/2; W_q, W_k, W_v + W_up W_down of this use
  t = W_use W_down(gelu(g) * u),   [g, u] = (W_gate_up + W_up W_down of this use) rms_norm(o)
  x = x + mamba2(rms_norm(x + t))
State of a layer: mamba.conv [1,k-1,D+2GN], mamba.ssm [1,H,N,P], and of every use, though the weights are shared, a
cache of its own: shared.key and shared.value [1,Hk,M,e].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import Hybrid, HybridLayer, below, layer_kinds
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    Norm,
    Place,
    attention_tensors,
    rope_constants,
    rope_from_hf,
    whole_heads,
)
from edgeseq.models.mamba2 import SSDConfig, SSDMixer, mixer_tensors
from edgeseq.models.rope import RopeConfig
from edgeseq.models.stack import random_tensor
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class Zamba2Config:
    """Shape of a Zamba2 model. shared_at: the layers that use a shared block, in turn one of n_blocks.

    rank: of the adapters; attention_adapter: q, k and v have them too, not only the feed-forward.
    linear_bias: of the feed-forward, as `mamba.proj_bias`. rope None: queries and keys are not rotated.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    shared_at: tuple[int, ...]
    attention: AttentionConfig
    mamba: SSDConfig
    d_ff: int
    n_blocks: int = 1
    rank: int = 128
    attention_adapter: bool = True
    linear_bias: bool = False
    eps: float = 1e-5
    tie: bool = True
    rope: RopeConfig | None = field(default_factory=RopeConfig)

    @property
    def blocks(self) -> int:
        """Blocks that are used at all."""
        return min(self.n_blocks, len(self.shared_at))


class SharedBlock(nn.Module):
    """The weights that all uses of a block have in common."""

    def __init__(self, c: Zamba2Config) -> None:
        super().__init__()
        self.eps = c.eps
        self.norm = nn.Parameter(torch.ones(2 * c.d_model))
        self.attention = Attention(c.attention)
        self.ff_norm = nn.Parameter(torch.ones(c.d_model))
        self.gate_up_proj = nn.Linear(c.d_model, 2 * c.d_ff, bias=c.linear_bias)
        self.down_proj = nn.Linear(c.d_ff, c.d_model, bias=c.linear_bias)


class Adapter(nn.Module):
    """W_up W_down h, of rank R."""

    def __init__(self, width: int, rank: int, out: int) -> None:
        super().__init__()
        self.down_proj = nn.Linear(width, rank, bias=False)
        self.up_proj = nn.Linear(rank, out, bias=False)

    def forward(self, h: Tensor) -> Tensor:
        return self.up_proj(self.down_proj(h))


class AdaptedAttention(Attention):
    """A block's attention with the adapters of one use; it owns the adapters only."""

    def __init__(self, c: Zamba2Config, block: SharedBlock) -> None:
        nn.Module.__init__(self)
        self.c = c.attention
        self.block = (block,)  # a tuple: the weights belong to the model's list of blocks, once
        a, kv = c.attention, c.attention.n_kv_heads * c.attention.head_dim
        if c.attention_adapter:
            self.q = Adapter(a.width, c.rank, a.n_heads * a.head_dim)
            self.k = Adapter(a.width, c.rank, kv)
            self.v = Adapter(a.width, c.rank, kv)

    def project(self, h: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        q, k, v = self.block[0].attention.project(h, norm)
        return (q + self.q(h), k + self.k(h), v + self.v(h)) if hasattr(self, "q") else (q, k, v)

    def out(self, o: Tensor, h: Tensor) -> Tensor:
        return self.block[0].attention.out(o, h)


class UsingLayer(HybridLayer):
    """A Mamba-2 layer whose input is moved by what the shared block makes of the stream and the embeddings."""

    def __init__(self, c: Zamba2Config, block: SharedBlock) -> None:
        super().__init__(c.d_model, c.eps, {"mamba": SSDMixer(c.mamba)})
        self.block = (block,)
        self.shared = AdaptedAttention(c, block)
        self.gate_up = Adapter(c.d_model, c.rank, 2 * c.d_ff)
        self.use_proj = nn.Linear(c.d_model, c.d_model, bias=False)

    def transformed(self, o: Tensor, norm: Norm) -> Tensor:
        """Output of the attention -> what is added to the mixer's input, [B,T,d] each."""
        block = self.block[0]
        h = norm(o, block.ff_norm, block.eps)
        gate, up = (block.gate_up_proj(h) + self.gate_up(h)).chunk(2, -1)
        return self.use_proj(block.down_proj(F.gelu(gate) * up))

    def seen(self, x: Tensor, place: Place, norm: Norm) -> Tensor:
        """What the attention reads: [B,T,2d]."""
        return norm(torch.cat([x, place.embedded], -1), self.block[0].norm, self.eps)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        o = self.shared(self.seen(x, place, ops.rms_norm_parallel), place)
        t = self.transformed(o, ops.rms_norm_parallel)
        return x + self.mamba(ops.rms_norm_parallel(x + t, self.norm, self.eps))

    def advance(self, x: Tensor, place: Place, *state: Tensor) -> tuple[Tensor, ...]:
        o, key, value = self.shared.advance(self.seen(x, place, ops.rms_norm), place, *state[:2])
        h = ops.rms_norm(x + self.transformed(o, ops.rms_norm), self.norm, self.eps)
        y, conv, ssm = self.mamba.advance(h, *state[2:])
        return x + y, key, value, conv, ssm

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        cache = (replace(slot, name=f"shared.{slot.name}") for slot in self.shared.state_slots(context))
        return *cache, *super().state_slots(context)


class Zamba2(Hybrid):
    """Forms and state as in `SequenceModel`; `shared` are the blocks."""

    def __init__(self, config: Zamba2Config) -> None:
        c = config
        blocks = [SharedBlock(c) for _ in range(c.blocks)]
        block_of = {layer: blocks[use % c.n_blocks] for use, layer in enumerate(c.shared_at)}
        layers = [
            UsingLayer(c, block_of[i]) if i in block_of else HybridLayer(c.d_model, c.eps, {"mamba": SSDMixer(c.mamba)})
            for i in range(c.n_layers)
        ]
        super().__init__(config, layers, c.rope, c.attention.head_dim)
        self.shared = nn.ModuleList(blocks)


def config_from_hf(raw: Mapping[str, Any]) -> Zamba2Config:
    """config.json of `Zamba2ForCausalLM`. The clamp of dt from below holds in every form, as in its whole forward."""
    r = ConfigReader(raw)
    r.only("hidden_act", "gelu")
    r.only("use_conv_bias", True)
    r.only("use_long_context", False)
    d_model, n_heads = r.positive("hidden_size", default=2560), r.positive("num_attention_heads", default=32)
    n_layers, linear_bias = (
        r.positive("num_hidden_layers", default=54, most=MOST_LAYERS),
        r.flag("add_bias_linear", False),
    )
    kv, adapter = r.positive("num_key_value_heads", default=n_heads), r.flag("use_shared_attention_adapter", False)
    head_dim = 2 * d_model // n_heads
    if adapter and (kv != n_heads or head_dim * n_heads != 2 * d_model):
        raise SourceError(
            f"config.json: use_shared_attention_adapter makes keys and values {2 * d_model} wide, "
            f"but {kv} heads of {head_dim} are {kv * head_dim}"
        )
    if r.get("layers_block_type") is None and r.get("layer_types") is None:
        raise SourceError("config.json lacks layers_block_type")
    kinds, scale = layer_kinds(r, n_layers, {"mamba": 0, "linear_attention": 0, "hybrid": 1}), (head_dim / 2) ** -0.5
    return Zamba2Config(
        vocab_size=r.positive("vocab_size", default=32000),
        d_model=d_model,
        n_layers=n_layers,
        shared_at=tuple(i for i, kind in enumerate(kinds) if kind),
        attention=AttentionConfig(d_model, n_heads, kv, head_dim, scale=scale, d_in=2 * d_model),
        mamba=_mamba(r, d_model, linear_bias),
        d_ff=r.positive("intermediate_size", default=4 * d_model),
        n_blocks=r.positive("num_mem_blocks", default=1),
        rank=r.positive("adapter_rank", default=128),
        attention_adapter=adapter,
        linear_bias=linear_bias,
        eps=r.number("rms_norm_eps", 1e-5),
        tie=r.flag("tie_word_embeddings", True),
        rope=whole_heads(rope_from_hf(raw, head_dim)) if r.flag("use_mem_rope", False) else None,
    )


def _mamba(r: ConfigReader, d_model: int, bias: bool) -> SSDConfig:
    inner, heads = int(r.number("mamba_expand", 2) * d_model), r.positive("n_mamba_heads", default=8)
    if inner % heads:
        raise SourceError(f"config.json: n_mamba_heads {heads} do not divide the inner width {inner}")
    r.only("mamba_headdim", inner // heads)
    return SSDConfig(
        d_model=d_model,
        n_heads=heads,
        head_dim=inner // heads,
        d_state=r.positive("mamba_d_state", default=64),
        n_groups=r.positive("mamba_ngroups", default=1),
        d_conv=r.positive("mamba_d_conv", default=4, least=2),
        dt_min=r.number("time_step_min", 0.001),
        eps=1e-5,
        proj_bias=bias,
    )


def hf_tensors(c: Zamba2Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `Zamba2ForCausalLM`, where a block lies with its first use."""
    d = c.d_model
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, d)),
        "norm": StoredTensor("model.final_layernorm.weight", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    home = [f"model.layers.{layer}.shared_transformer." for layer in c.shared_at[: c.blocks]]
    for j, theirs in enumerate(home):
        names |= below(f"shared.{j}.", _block(c, theirs))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        inside = theirs
        if i in c.shared_at:
            use, inside = c.shared_at.index(i), f"{theirs}mamba_decoder."
            names |= below(ours, _use(c, home[use % c.n_blocks], use))
            names[f"{ours}use_proj.weight"] = StoredTensor(f"{theirs}linear.weight", (d, d))
        names[f"{ours}norm"] = StoredTensor(f"{inside}input_layernorm.weight", (d,))
        names |= below(f"{ours}mamba.", mixer_tensors(c.mamba, f"{inside}mamba."))
    return names


def _block(c: Zamba2Config, theirs: str) -> dict[str, StoredTensor]:
    d, ff = c.d_model, f"{theirs}feed_forward."
    names = {
        "norm": StoredTensor(f"{theirs}input_layernorm.weight", (2 * d,)),
        "ff_norm": StoredTensor(f"{theirs}pre_ff_layernorm.weight", (d,)),
        "gate_up_proj.weight": StoredTensor(f"{ff}gate_up_proj.weight", (2 * c.d_ff, d)),
        "down_proj.weight": StoredTensor(f"{ff}down_proj.weight", (d, c.d_ff)),
    }
    if c.linear_bias:
        names["gate_up_proj.bias"] = StoredTensor(f"{ff}gate_up_proj.bias", (2 * c.d_ff,))
        names["down_proj.bias"] = StoredTensor(f"{ff}down_proj.bias", (d,))
    return names | below("attention.", attention_tensors(c.attention, f"{theirs}self_attn."))


def _use(c: Zamba2Config, theirs: str, use: int) -> dict[str, StoredTensor]:
    """The adapters of one use, which lie with its block."""
    wide, d, rank = c.attention.width, c.d_model, c.rank
    shapes = {"gate_up": (f"feed_forward.gate_up_proj_adapter_list.{use}", d, 2 * c.d_ff)}
    if c.attention_adapter:
        shapes |= {f"shared.{x}": (f"self_attn.linear_{x}_adapter_list.{use}", wide, wide) for x in "qkv"}
    names = {}
    for ours, (stored, width, out) in shapes.items():
        names[f"{ours}.down_proj.weight"] = StoredTensor(f"{theirs}{stored}.0.weight", (rank, width))
        names[f"{ours}.up_proj.weight"] = StoredTensor(f"{theirs}{stored}.1.weight", (out, rank))
    return names


def _attention(d: int, heads: int) -> AttentionConfig:
    return AttentionConfig(d, heads, heads, 2 * d // heads, scale=math.sqrt(heads / d), d_in=2 * d)


FAMILY = Family(
    name="zamba2",
    config=Zamba2Config,
    model=Zamba2,
    checkpoint=Checkpoint(
        model_types=("zamba2",), config=config_from_hf, tensors=hf_tensors, ignored=("rotary_emb.inv_freq",)
    ),
    # Zyphra/Zamba2-1.2B: one block used in six of 38 layers, 64 Mamba-2 heads of 64, N 128, adapters of rank 128.
    zoo={
        "zamba2-1.2b": Zamba2Config(
            32000, 2048, 38, (5, 11, 17, 23, 29, 35), _attention(2048, 32),
            SSDConfig(2048, 64, 64, 128, dt_min=1e-3), 8192,
        )
    },
    tiny=Zamba2Config(
        256, 128, 5, (2, 4), _attention(128, 4), SSDConfig(128, 4, 32, 32, dt_min=1e-3), 192, rank=8
    ),
    state_formula="4 (L (D N + (D + 2 G N) (k - 1)) + 2 U Hk e M)",
    growth="linear",
    ops=("causal_conv", "linear_attention", "rotary", "cached_attention"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.rope, c.attention.head_dim),
)  # fmt: skip
