"""mLSTM, the matrix memory of xLSTM (Beck et al. 2024, arXiv 2405.04517), in blocks as in xLSTM-7B (arXiv 2503.13427).

Glossary
  B  batch                 T  tokens             L  layers
  d  model width           H  heads              K  key width, V  value width of a head
  F  width of the gated feed-forward             cap_a(x) = a tanh(x / a)

One layer, with h = rms_norm(x) and x the residual stream [B,T,d]:
  q, k, v = W_q h, W_k h, W_v h                  [B,T,H,K], [B,T,H,K], [B,T,H,V]
  i, f    = cap_15(W_i h + b), log sigmoid(cap_15(W_f h + b))             [B,T,H]
  C       = e^f C + e^i k (x) v                  [B,H,K,V]
  n       = e^f n + e^i k                        [B,H,K]
  o       = K^-1/2 q^T C / max(|K^-1/2 q^T n|, 1)
  x       = x + W_o(sigmoid(W_g h) w layer_norm_per_head(o))
  h       = rms_norm(x);  x = x + W_down(silu(W_gate h) * W_up h)
The logits are cap_30(W x). e^i has no bound, so that C and n are held as C e^-m and n e^-m with m the largest exponent:
  m_t     = max(f_t + m_(t-1), i_t)              [B,H]
  C_t     = e^(f_t + m_(t-1) - m_t) C_(t-1) + e^(i_t - m_t) k_t (x) v_t;  the 1 of the maximum becomes e^-m
which is gated linear attention, exactly: its log decay is f_t + m_(t-1) - m_t, its key e^(i_t - m_t) k_t, its value
[v_t, 1], whose last column is n. m alone is a recurrence of its own, over one number a head, and unrolled
  m_t     = F_t + max(m_0, max_(s<=t)(i_s - F_s)),   F_t = f_1 + ... + f_t.
Any m gives the same output as long as decay, key and e^-m are taken from the same one: rounding in F costs nothing.
State of a layer: memory [1,H,K,V+1] and peak [1,H], both 0 when fresh.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import stack
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.matrix_state import linear_attention_parallel
from edgeseq.models.stack import Mixer, Stack
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class MLSTMConfig:
    """Shape of an mLSTM model; `eps_n` is added to the normaliser, the caps bound gates and logits."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_key: int
    d_value: int
    d_ff: int
    gate_cap: float = 15.0
    logit_cap: float = 30.0
    eps_n: float = 1e-6
    eps: float = 1e-6
    tie: bool = False


def capped(x: Tensor, cap: float) -> Tensor:
    return cap * torch.tanh(x / cap)


def peaks_parallel(i: Tensor, f: Tensor) -> Tensor:
    """m of a whole sequence from m_0 = 0: i, f [B,T,H] -> [B,T,H]. No gradient: the output does not depend on it."""
    with torch.no_grad():
        total = f.cumsum(1)
        return total + (i - total).cummax(1).values.clamp_min(0.0)


def peaks(i: Tensor, f: Tensor, before: Tensor) -> Tensor:
    """The same for a chunk behind m = before [B,H]."""
    if i.shape[1] == 1:
        return torch.maximum(f + before[:, None], i)
    total = f.cumsum(1)
    t = torch.arange(i.shape[1])
    seen = (t <= t[:, None])[None, :, :, None]  # [1,T,S,1]
    best = torch.where(seen, (i - total)[:, None], -1e30).amax(2)
    return total + torch.maximum(best, before[:, None])


class MLSTMMixer(Mixer):
    """The mixer of one layer; parameters as in the module docstring."""

    def __init__(self, c: MLSTMConfig) -> None:
        super().__init__()
        self.c = c
        d, keys, values = c.d_model, c.n_heads * c.d_key, c.n_heads * c.d_value
        self.q_proj = nn.Linear(d, keys, bias=False)
        self.k_proj = nn.Linear(d, keys, bias=False)
        self.v_proj = nn.Linear(d, values, bias=False)
        self.g_proj = nn.Linear(d, values, bias=False)
        self.i_gate = nn.Linear(d, c.n_heads)
        self.f_gate = nn.Linear(d, c.n_heads)
        self.head_norm = nn.Parameter(torch.ones(values))
        self.o_proj = nn.Linear(values, d, bias=False)

    def gates(self, h: Tensor) -> tuple[Tensor, Tensor]:
        """i, f [B,T,H], exponents; log sigmoid(x) = -softplus(-x)."""
        return capped(self.i_gate(h), self.c.gate_cap), -F.softplus(-capped(self.f_gate(h), self.c.gate_cap))

    def operands(self, h: Tensor, i: Tensor, m: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """q [B,T,H K], e^(i - m) k [B,T,H K], [v, 1] [B,T,H (V+1)]."""
        heads = self.c.n_heads
        k = self.k_proj(h).unflatten(-1, (heads, -1)) * torch.exp(i - m)[..., None]
        v = self.v_proj(h).unflatten(-1, (heads, -1))
        return self.q_proj(h), k.flatten(-2), torch.cat([v, torch.ones_like(v[..., :1])], -1).flatten(-2)

    def out(self, o: Tensor, m: Tensor, h: Tensor) -> Tensor:
        """Divide by the normaliser, norm each head, gate and project."""
        c = self.c
        each = o.unflatten(-1, (c.n_heads, c.d_value + 1))
        least = torch.maximum(each[..., -1:].abs(), torch.exp(-m)[..., None]) + c.eps_n
        normed = F.layer_norm(each[..., :-1] / least, (c.d_value,), eps=c.eps).flatten(-2) * self.head_norm
        return self.o_proj(torch.sigmoid(self.g_proj(h)) * normed)

    def forward(self, h: Tensor) -> Tensor:
        heads, scale = self.c.n_heads, self.c.d_key**-0.5
        i, f = self.gates(h)
        m = peaks_parallel(i, f)
        decay = f + F.pad(m[:, :-1], (0, 0, 1, 0)) - m
        q, k, v = self.operands(h, i, m)
        return self.out(linear_attention_parallel(q, k, v, heads, decay, None, "gated", heads, heads, scale), m, h)

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        heads, scale = self.c.n_heads, self.c.d_key**-0.5
        memory, before = state
        i, f = self.gates(h)
        m = peaks(i, f, before)
        decay = f + torch.cat([before[:, None], m[:, :-1]], 1) - m
        q, k, v = self.operands(h, i, m)
        o, memory = ops.linear_attention(q, k, v, memory, decay, None, "gated", heads, heads, scale)
        return self.out(o, m, h), memory, m[:, -1]

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (
            StateSlot("memory", "float32", (1, c.n_heads, c.d_key, c.d_value + 1)),
            StateSlot("peak", "float32", (1, c.n_heads)),
        )


class MLSTM(Stack):
    """Embedding, mLSTM layers, norm, head and cap; forms and state as in `SequenceModel`."""

    def __init__(self, config: MLSTMConfig) -> None:
        super().__init__(config, MLSTMMixer)

    def forward(self, tokens: Tensor) -> Tensor:
        return capped(super().forward(tokens), self.config.logit_cap)

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        logits, *new = super().advance(tokens, position, *state)
        return capped(logits, self.config.logit_cap), *new


WIDTHS = (("qk_dim_factor", 0.5), ("v_dim_factor", 1.0))


def head_width(r: ConfigReader, field: str, d_model: int, heads: int, default: float) -> int:
    """`field` times the model's width, shared by the heads."""
    total = int(d_model * r.number(field, default))
    if total % heads or not total:
        raise SourceError(f"config.json: {field} makes a width of {total}, which {heads} heads cannot share")
    return total // heads


def config_from_hf(raw: Mapping[str, Any]) -> MLSTMConfig:
    """config.json of Hugging Face's `xLSTMForCausalLM`, projections apart (`weight_mode` single) and without biases."""
    r = ConfigReader(raw)
    for field, allowed in (("use_bias", (False,)), ("add_out_norm", (True,)), ("weight_mode", ("single",))):
        r.only(field, *allowed)
    d = r.positive("hidden_size", default=4096)
    r.only("embedding_dim", d)
    layers = r.positive("num_hidden_layers", default=32, most=MOST_LAYERS)
    r.only("num_blocks", layers)
    heads = r.positive("num_heads", default=8)
    d_key, d_value = (head_width(r, field, d, heads, default) for field, default in WIDTHS)
    multiple = r.positive("ffn_round_up_to_multiple_of", default=64)
    eps = r.number("norm_eps", 1e-6)
    return MLSTMConfig(
        r.positive("vocab_size", default=50304),
        d,
        layers,
        heads,
        d_key,
        d_value,
        d_ff=int((d * r.number("ffn_proj_factor", 2.667) + multiple - 1) // multiple * multiple),
        gate_cap=r.number("gate_soft_cap", 15.0),
        logit_cap=r.number("output_logit_soft_cap", 30.0),
        eps_n=r.number("eps", 1e-6),
        eps=eps,
        tie=r.flag("tie_word_embeddings", False),
    )


def hf_tensors(c: MLSTMConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `xLSTMForCausalLM`."""
    d, f, keys, values = c.d_model, c.d_ff, c.n_heads * c.d_key, c.n_heads * c.d_value
    names = {
        "embed.weight": StoredTensor("backbone.embeddings.weight", (c.vocab_size, d)),
        "norm": StoredTensor("backbone.out_norm.weight", (d,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, d))
    for layer in range(c.n_layers):
        ours, theirs = f"layers.{layer}.", f"backbone.blocks.{layer}."
        cell = f"{theirs}mlstm_layer."
        names |= {
            f"{ours}norm": StoredTensor(f"{theirs}norm_mlstm.weight", (d,)),
            f"{ours}ff_norm": StoredTensor(f"{theirs}norm_ffn.weight", (d,)),
            f"{ours}gate_proj.weight": StoredTensor(f"{theirs}ffn.proj_up_gate.weight", (f, d)),
            f"{ours}up_proj.weight": StoredTensor(f"{theirs}ffn.proj_up.weight", (f, d)),
            f"{ours}down_proj.weight": StoredTensor(f"{theirs}ffn.proj_down.weight", (d, f)),
            f"{ours}mixer.q_proj.weight": StoredTensor(f"{cell}q.weight", (keys, d)),
            f"{ours}mixer.k_proj.weight": StoredTensor(f"{cell}k.weight", (keys, d)),
            f"{ours}mixer.v_proj.weight": StoredTensor(f"{cell}v.weight", (values, d)),
            f"{ours}mixer.g_proj.weight": StoredTensor(f"{cell}ogate_preact.weight", (values, d)),
            f"{ours}mixer.o_proj.weight": StoredTensor(f"{cell}out_proj.weight", (d, values)),
            f"{ours}mixer.head_norm": StoredTensor(f"{cell}multihead_norm.weight", (values,)),
        }
        for gate in "if":
            names |= {
                f"{ours}mixer.{gate}_gate.weight": StoredTensor(f"{cell}{gate}gate_preact.weight", (c.n_heads, d)),
                f"{ours}mixer.{gate}_gate.bias": StoredTensor(f"{cell}{gate}gate_preact.bias", (c.n_heads,)),
            }
    return names


def random_tensor(c: MLSTMConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """As in other stacks; forget gates between sigmoid(3) and sigmoid(6), as published, input gates nearly shut.

    Published is -10 for 32 layers; -6 lets a small model begin sooner and still keeps normalisers at their floor.
    """
    if name.endswith("f_gate.bias"):
        return np.linspace(3.0, 6.0, shape[0], dtype=np.float32)
    if name.endswith("i_gate.bias"):
        return np.full(shape, -6.0, np.float32)
    return stack.random_tensor(c, name, shape, rng)


FAMILY = Family(
    name="mlstm",
    config=MLSTMConfig,
    model=MLSTM,
    checkpoint=Checkpoint(model_types=("xlstm",), config=config_from_hf, tensors=hf_tensors),
    # xLSTM-7B: eight heads of K = 256 and V = 512, F = 2.667 d rounded up to 64.
    zoo={"xlstm-7b": MLSTMConfig(50304, 4096, 32, 8, 256, 512, 10944)},
    # Where q^T k of the first tokens nearly cancels, the norm of a head multiplies rounding by up to eps^-1/2.
    tiny=MLSTMConfig(256, 128, 4, 4, 16, 32, 256, eps=1e-4, tie=True),
    state_formula="4 L H (K (V + 1) + 1)",
    growth="constant",
    ops=("linear_attention",),
    random_tensor=random_tensor,
)
