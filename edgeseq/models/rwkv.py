"""What RWKV-4 to 7 share: the residual skeleton, token shift, channel mixing, and the matrix-state average of 5 and 6.

Glossary
  B  batch                 T  tokens             L  layers              V  vocabulary
  d  model width           H  heads              N  width of a head (keys and values alike)
  F  width of the channel mixing

One layer, with x the residual stream [B,T,d]:
  h = layer_norm(x);  x = x + time_mix(h, h of the previous token)        differs in every version
  h = layer_norm(x);  x = x + channel_mix(h, h of the previous token)
A mixing vector is the share of the previous token: mix(h) = h + (h_previous - h) mix. Versions 4 and 5 store the share
of the current token, so it is turned around when a checkpoint is read.
State of a layer: both previous rows [1,1,d], and what the version's time mixing carries.
"""

from __future__ import annotations

import math
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.models import functional as ops
from edgeseq.models.base import Array, SequenceModel, last_logits, normal
from edgeseq.models.matrix_state import linear_attention_parallel
from edgeseq.spec import StateSlot

GROUP_EPS = 64e-5  # of the norm over each head's output in versions 5 to 7: 1e-5 times (64/8)^2, whatever N is
LAST_EPS = 1e-5  # of the last norm, whatever eps the config gives the others


def layer_norm(x: Tensor, weight: Tensor, bias: Tensor, eps: float) -> Tensor:
    """Layer norm over the last axis."""
    return F.layer_norm(x, weight.shape, weight, bias, eps)


def head_norm(x: Tensor, weight: Tensor, bias: Tensor, heads: int) -> Tensor:
    """Group norm with a group per head: x [B,T,H*N]; weight and bias [H*N]."""
    each = F.layer_norm(x.unflatten(-1, (heads, -1)), (x.shape[-1] // heads,), eps=GROUP_EPS)
    return each.flatten(-2) * weight + bias


def mix(h: Tensor, previous: Tensor, share: Tensor) -> Tensor:
    """h [B,T,d] with `share` [d] or [B,T,d] of the previous token's row."""
    return h + (previous - h) * share


def shifted(h: Tensor, past: Tensor) -> Tensor:
    """The row before each of h [B,T,d], the first of them past [B,1,d]."""
    return past if h.shape[1] == 1 else torch.cat([past, h[:, :-1]], 1)


def head_sum(x: Tensor, heads: int) -> Tensor:
    """Sum within each head: x [B,T,H*N] -> [B,T,H,1]."""
    return x.unflatten(-1, (heads, -1)).sum(-1, keepdim=True)


def bonus(r: Tensor, k: Tensor, v: Tensor, u: Tensor, heads: int) -> Tensor:
    """What a token reads of itself: (sum_N r u k) v of each head; r, k, v [B,T,H*N], u [H*N]."""
    return (head_sum(r * u * k, heads) * v.unflatten(-1, (heads, -1))).flatten(-2)


def wkv(r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, past: Tensor, heads: int) -> tuple[Tensor, Tensor]:
    """Time mixing of versions 5 and 6: o = r^T (S + (u k) (x) v), then S <- diag(e^g) S + k (x) v.

    r, k, v and g (log decay) [B,T,H*N]; u [H*N]; past [B,H,N,N]. The standard operator reads the state after its
    update, so it is given one token more: keys, values and decays stand one place later behind a token that changes
    nothing, and query t meets the state that token t - 1 left. The state needs no token held back.
    """
    first = (0, 0, 1, 0)  # a row of zeros before the first token
    keys, values, decays = F.pad(k, first), F.pad(v, first), F.pad(g, first)
    o, present = ops.linear_attention(F.pad(r, (0, 0, 0, 1)), keys, values, past, decays, None, "gated", heads, heads)
    return o[:, : r.shape[1]] + bonus(r, k, v, u, heads), present


def wkv_parallel(r: Tensor, k: Tensor, v: Tensor, g: Tensor, u: Tensor, heads: int) -> Tensor:
    """`wkv` of a whole sequence from a fresh state: what is written comes one token later, as there."""
    keys, values, decays = (F.pad(x, (0, 0, 1, -1)) for x in (k, v, g))
    o = linear_attention_parallel(r, keys, values, heads, decays, None, "gated", heads, heads)
    return o + bonus(r, k, v, u, heads)


class ChannelMix(nn.Module):
    """W_v relu(W_k mix_k(h))^2, in versions 4 to 6 times sigmoid(W_r mix_r(h))."""

    def __init__(self, d_model: int, d_ff: int, receptance: bool) -> None:
        super().__init__()
        self.mix_k = nn.Parameter(torch.empty(d_model))
        self.k_proj = nn.Linear(d_model, d_ff, bias=False)
        self.v_proj = nn.Linear(d_ff, d_model, bias=False)
        self.mix_r = nn.Parameter(torch.empty(d_model)) if receptance else None
        self.r_proj = nn.Linear(d_model, d_model, bias=False) if receptance else None

    def forward(self, h: Tensor, previous: Tensor) -> Tensor:
        k = F.relu(self.k_proj(mix(h, previous, self.mix_k)))
        y = self.v_proj(k * k)
        if self.r_proj is None or self.mix_r is None:
            return y
        return torch.sigmoid(self.r_proj(mix(h, previous, self.mix_r))) * y


class TimeMix(Protocol):
    """A version's time mixing. `first` is what layer 0 hands to the layers above for the same token (version 7)."""

    def parallel(self, h: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]: ...

    def advance(
        self, h: Tensor, previous: Tensor, past: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]: ...


class RwkvLayer(nn.Module):
    """Time mixing and channel mixing, each behind its norm, added to the residual stream."""

    def __init__(self, c: Any, time_mix: nn.Module, receptance: bool) -> None:
        super().__init__()
        self.eps = c.eps
        self.att_norm = nn.Parameter(torch.ones(c.d_model))
        self.att_norm_bias = nn.Parameter(torch.zeros(c.d_model))
        self.att: Any = time_mix
        self.ffn_norm = nn.Parameter(torch.ones(c.d_model))
        self.ffn_norm_bias = nn.Parameter(torch.zeros(c.d_model))
        self.ffn = ChannelMix(c.d_model, c.d_ff, receptance)

    def forward(self, x: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        fresh = torch.zeros_like(x[:, :1])
        h = layer_norm(x, self.att_norm, self.att_norm_bias, self.eps)
        y, first = self.att.parallel(h, shifted(h, fresh), first)
        x = x + y
        h = layer_norm(x, self.ffn_norm, self.ffn_norm_bias, self.eps)
        return x + self.ffn(h, shifted(h, fresh)), first

    def advance(
        self, x: Tensor, first: Tensor | None, att_row: Tensor, past: Tensor, ffn_row: Tensor
    ) -> tuple[Tensor, Tensor | None, list[Tensor]]:
        h = layer_norm(x, self.att_norm, self.att_norm_bias, self.eps)
        y, present, first = self.att.advance(h, shifted(h, att_row), past, first)
        x = x + y
        i = layer_norm(x, self.ffn_norm, self.ffn_norm_bias, self.eps)
        return x + self.ffn(i, shifted(i, ffn_row)), first, [h[:, -1:], present, i[:, -1:]]


class Rwkv(SequenceModel):
    """Embedding with its norm, layers, norm and head; a version says how it mixes time and what that carries."""

    uses_position = False
    receptance: ClassVar[bool] = True

    def __init__(self, config: Any) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.embed_norm = nn.Parameter(torch.ones(config.d_model))
        self.embed_norm_bias = nn.Parameter(torch.zeros(config.d_model))
        self.layers = nn.ModuleList(
            RwkvLayer(config, self.time_mix(config, i), self.receptance) for i in range(config.n_layers)
        )
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.norm_bias = nn.Parameter(torch.zeros(config.d_model))
        self.head = None if config.tie else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def time_mix(self, config: Any, layer: int) -> nn.Module:
        """The version's time mixing of layer `layer`, a TimeMix."""
        raise NotImplementedError

    def carried(self, name: str) -> StateSlot:
        """The slot of that time mixing, called `name`."""
        raise NotImplementedError

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def embedded(self, tokens: Tensor) -> Tensor:
        return layer_norm(self.embed(tokens), self.embed_norm, self.embed_norm_bias, self.config.eps)

    def last_norm(self, x: Tensor) -> Tensor:
        return layer_norm(x, self.norm, self.norm_bias, LAST_EPS)

    def forward(self, tokens: Tensor) -> Tensor:
        x, first = self.embedded(tokens), None
        for layer in self.layers:
            x, first = layer(x, first)
        return F.linear(self.last_norm(x), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        row, slots = (1, 1, self.config.d_model), []
        for i in range(self.config.n_layers):
            slots.append(StateSlot(f"layers.{i}.att", "float32", row, 0.0, "shift", 1))
            slots.append(self.carried(f"layers.{i}.wkv"))
            slots.append(StateSlot(f"layers.{i}.ffn", "float32", row, 0.0, "shift", 1))
        return tuple(slots)

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, first, new = self.embedded(tokens), None, []
        for i, layer in enumerate(self.layers):
            x, first, rows = layer.advance(x, first, *state[3 * i : 3 * i + 3])
            new += rows
        return (last_logits(x, self.last_norm, self.head_weight()), *new)


def depth(c: Any, layer: int) -> tuple[float, float]:
    """(share of the way up, share of the way down): 0 .. 1 over the layers, and 1 .. 1/L."""
    return layer / max(1, c.n_layers - 1), 1.0 - layer / c.n_layers


def layer_of(name: str) -> int:
    """layers.3.att.k_proj.weight -> 3; names outside of layers -> 0."""
    parts = name.split(".")
    return int(parts[1]) if parts[0] == "layers" else 0


def random_shared(c: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Initial values of what all versions have: norms 1, embedding small, what writes to the residual stream smaller
    with depth, mixing vectors that grow from no previous token (last channel) to all of it (first)."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf.endswith("norm"):
        return np.ones(shape, np.float32)
    if leaf.endswith("bias"):
        return np.zeros(shape, np.float32)
    if leaf.startswith("mix_") and len(shape) == 1:
        ramp = np.arange(shape[0]) / shape[0]
        return (1.0 - ramp ** depth(c, layer_of(name))[1]).astype(np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    writes = name.endswith(("att.o_proj.weight", "ffn.v_proj.weight"))
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if writes else std)
