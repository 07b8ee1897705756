"""Jamba (AI21 2024, arXiv 2403.19887): Mamba layers, one in so many of attention, one in so many with experts.

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lm = L - La are Mamba
  d  model width           F  width of a feed-forward, and of each expert
  E  experts, A chosen     see `moe.py`; the chosen gates are not made to sum to 1
  H  query heads           Hk key/value heads    e  head width             M  rows of the KV cache (the context)
  D, N, R, k               the Mamba mixer's letters, see `mamba.py`

One layer, with x the residual stream [B,T,d]:
  h = rms_norm(x)
  x = x + attention(h)  or  x + mamba(h)         no positions anywhere: the recurrence knows the order
  h = rms_norm(x);  x = x + feed_forward(h)  or  x + experts(h)
Jamba's Mamba norms its time step, B and C (rms_norm, each with a weight) before they are used.
State of a layer: attention.key and attention.value [1,Hk,M,e], or mamba.conv [1,k-1,D] and mamba.ssm [1,N,D].
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import GatedMLP, Hybrid, HybridLayer, below, mlp_tensors, random_tensor
from edgeseq.models.hybrid_attention import Attention, AttentionConfig, attention_tensors
from edgeseq.models.mamba import MambaMixer, MambaShape, Norm, mixer_tensors
from edgeseq.models.moe import Moe, MoeConfig, stored_stacks


@dataclass(frozen=True)
class JambaConfig:
    """Shape of a Jamba model; `attention_at` are the layers that attend, `experts_at` those with experts."""

    vocab_size: int
    d_model: int
    n_layers: int
    attention_at: tuple[int, ...]
    experts_at: tuple[int, ...]
    attention: AttentionConfig
    mamba: MambaShape
    d_ff: int
    n_experts: int = 16
    top_k: int = 2
    eps: float = 1e-6
    tie: bool = False

    def __post_init__(self) -> None:
        self.experts()

    def experts(self) -> MoeConfig:
        return MoeConfig(self.n_experts, self.top_k, self.d_ff, renormalise=False)


class JambaMixer(MambaMixer):
    """Mamba's mixer with norms between the projection of u and the scan."""

    def __init__(self, c: MambaShape, eps: float) -> None:
        super().__init__(c)
        self.eps = eps
        self.dt_norm = nn.Parameter(torch.ones(c.dt_rank))
        self.b_norm = nn.Parameter(torch.ones(c.d_state))
        self.c_norm = nn.Parameter(torch.ones(c.d_state))

    def split_x(self, u: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        r, n = self.c.dt_rank, self.c.d_state
        x = self.x_proj(u)
        dt = norm(x[..., :r], self.dt_norm, self.eps)
        return (
            self.dt_proj(dt),
            norm(x[..., r : r + n], self.b_norm, self.eps),
            norm(x[..., r + n :], self.c_norm, self.eps),
        )


class Jamba(Hybrid):
    """Forms and state as in `SequenceModel`."""

    def __init__(self, config: JambaConfig) -> None:
        super().__init__(config, self._layers(config))

    @staticmethod
    def _layers(c: JambaConfig) -> Iterator[nn.Module]:
        for i in range(c.n_layers):
            attends = i in c.attention_at
            mixers = {"attention": Attention(c.attention)} if attends else {"mamba": JambaMixer(c.mamba, c.eps)}
            chooses = i in c.experts_at
            feed_forward = Moe(c.d_model, c.experts()) if chooses else GatedMLP(c.d_model, c.d_ff)
            yield HybridLayer(c.d_model, c.eps, mixers, feed_forward)


def config_from_hf(raw: Mapping[str, Any]) -> JambaConfig:
    """config.json of `JambaForCausalLM`."""
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    r.only("mamba_inner_layernorms", True)
    r.only("sliding_window", None)
    d_model, n_heads = r.positive("hidden_size", default=4096), r.positive("num_attention_heads", default=32)
    n_layers, n_experts = (
        r.positive("num_hidden_layers", default=32, most=MOST_LAYERS),
        r.positive("num_experts", default=16),
    )
    if n_experts > 1:
        experts_at = _every(r, "expert_layer", n_layers, 2, 1)
        top_k = r.positive("num_experts_per_tok", default=2)
    else:
        experts_at, top_k = (), 1
    rank = r.get("mamba_dt_rank")
    return JambaConfig(
        vocab_size=r.positive("vocab_size", default=65536),
        d_model=d_model,
        n_layers=n_layers,
        attention_at=_every(r, "attn_layer", n_layers, 8, 4),
        experts_at=experts_at,
        attention=AttentionConfig(
            d_model,
            n_heads,
            r.positive("num_key_value_heads", default=8 if "num_key_value_heads" not in raw else n_heads),
            d_model // n_heads,
        ),
        mamba=MambaShape(
            d_model,
            r.positive("mamba_expand", default=2) * d_model,
            r.positive("mamba_d_state", default=16),
            r.positive("mamba_d_conv", default=4, least=2),
            math.ceil(d_model / 16) if rank in (None, "auto") else r.positive("mamba_dt_rank"),
            r.flag("mamba_proj_bias", False),
            r.flag("mamba_conv_bias", True),
        ),
        d_ff=r.positive("intermediate_size", default=14336),
        n_experts=n_experts,
        top_k=top_k,
        eps=r.number("rms_norm_eps", 1e-6),
        tie=r.flag("tie_word_embeddings", False),
    )


def _every(r: ConfigReader, what: str, n_layers: int, period: int, offset: int) -> tuple[int, ...]:
    """Layers i with i mod <what>_period = <what>_offset."""
    period = r.positive(f"{what}_period", default=period)
    offset = r.positive(f"{what}_offset", default=offset, least=0)
    if offset >= period:
        raise SourceError(f"config.json: {what}_offset {offset} is not below {what}_period {period}")
    return tuple(range(offset, n_layers, period))


def hf_tensors(c: JambaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `JambaForCausalLM`, whose experts lie one by one or in stacks."""
    d = c.d_model
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, d)),
        "norm": StoredTensor("model.final_layernorm.weight", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}input_layernorm.weight", (d,))
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}pre_ff_layernorm.weight", (d,))
        if i in c.attention_at:
            parts = below("attention.", attention_tensors(c.attention, f"{theirs}self_attn."))
        else:
            parts = below("mamba.", _mamba(c.mamba, f"{theirs}mamba."))
        ff = f"{theirs}feed_forward."
        parts |= below("feed_forward.", _experts(c, ff) if i in c.experts_at else mlp_tensors(d, c.d_ff, ff))
        names |= below(ours, parts)
    return names


def _mamba(c: MambaShape, theirs: str) -> dict[str, StoredTensor]:
    widths = {"dt": c.dt_rank, "b": c.d_state, "c": c.d_state}
    norms = {f"{x}_norm": StoredTensor(f"{theirs}{x}_layernorm.weight", (width,)) for x, width in widths.items()}
    return mixer_tensors(c, theirs) | norms


def _experts(c: JambaConfig, theirs: str) -> dict[str, StoredTensor]:
    inside = f"{theirs}experts."
    gate, up, down = (f"{inside}{{}}.{name}_proj.weight" for name in ("gate", "up", "down"))
    stacked = (f"{inside}gate_up_proj", f"{inside}down_proj")
    found = stored_stacks(c.experts(), c.d_model, stacked, (gate, up, down))
    return found | {"router.weight": StoredTensor(f"{theirs}router.weight", (c.n_experts, c.d_model))}


FAMILY = Family(
    name="jamba",
    config=JambaConfig,
    model=Jamba,
    checkpoint=Checkpoint(model_types=("jamba",), config=config_from_hf, tensors=hf_tensors),
    # ai21labs/Jamba-v0.1: one layer in eight attends, every second has 2 of 16 experts.
    zoo={
        "jamba-52b": JambaConfig(
            65536, 4096, 32, (4, 12, 20, 28), tuple(range(1, 32, 2)), AttentionConfig(4096, 32, 8, 128),
            MambaShape(4096, 8192, dt_rank=256), 14336,
        )
    },
    tiny=JambaConfig(
        256, 128, 4, (2,), (1, 3), AttentionConfig(128, 4, 2, 32), MambaShape(128, 256, 8, dt_rank=8), 72,
        n_experts=4, tie=True,
    ),
    state_formula="4 (Lm D (N + k - 1) + 2 La Hk e M)",
    growth="linear",
    ops=("causal_conv", "selective_scan", "cached_attention", "expert_linear"),
    random_tensor=random_tensor,
)  # fmt: skip
