"""RWKV-5.2, "Eagle" (Peng et al. 2024, arXiv 2404.05892).

Glossary: as in rwkv.py.

Time mixing, with h [B,T,d] behind its norm, per head for r, k, v:
  r, k, v = W_r mix_r(h), W_k mix_k(h), W_v mix_v(h);   g = silu(W_g mix_g(h))
  o = r^T (S + (u k) (x) v)                              the state before this token, and the token itself by u
  S = diag(w) S + k (x) v                                w = exp(-exp(time_decay)) per channel, the same for all tokens
  y = W_o(head_norm(o) g)
State of a layer: att [1,1,d], wkv [1,H,N,N], ffn [1,1,d].
Files of versions 5.0 and 5.1, with one decay per head, are refused.
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
from edgeseq.models import pth
from edgeseq.models.base import Array, BareCheckpoint, Family, StoredTensor
from edgeseq.models.rwkv import Rwkv, depth, head_norm, layer_of, mix, random_shared, wkv, wkv_parallel
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class Rwkv5Config:
    """Shape of an RWKV-5.2 with n_heads heads of width d_model / n_heads; `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    eps: float = 1e-5
    tie: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise SourceError(f"An RWKV-5 of width {self.d_model} has no {self.n_heads} heads of equal width")


class TimeMix5(nn.Module):
    """Time mixing of version 5.2."""

    def __init__(self, c: Rwkv5Config) -> None:
        super().__init__()
        self.heads = c.n_heads
        d = c.d_model
        for name in ("mix_r", "mix_k", "mix_v", "mix_g", "time_decay", "bonus"):
            setattr(self, name, nn.Parameter(torch.empty(d)))
        for name in ("r_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.head_norm = nn.Parameter(torch.ones(d))
        self.head_norm_bias = nn.Parameter(torch.zeros(d))

    def project(self, h: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, log decay and gate, [B,T,d] each."""
        r = self.r_proj(mix(h, previous, self.mix_r))
        k = self.k_proj(mix(h, previous, self.mix_k))
        v = self.v_proj(mix(h, previous, self.mix_v))
        gate = F.silu(self.g_proj(mix(h, previous, self.mix_g)))
        return r, k, v, (-torch.exp(self.time_decay)).expand(h.shape), gate

    def finish(self, o: Tensor, gate: Tensor) -> Tensor:
        return self.o_proj(head_norm(o, self.head_norm, self.head_norm_bias, self.heads) * gate)

    def parallel(self, h: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r, k, v, g, gate = self.project(h, previous)
        return self.finish(wkv_parallel(r, k, v, g, self.bonus, self.heads), gate), first

    def advance(
        self, h: Tensor, previous: Tensor, past: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r, k, v, g, gate = self.project(h, previous)
        o, present = wkv(r, k, v, g, self.bonus, past, self.heads)
        return self.finish(o, gate), present, first


class Rwkv5(Rwkv):
    """RWKV-5.2; forms and state as in `SequenceModel`."""

    def time_mix(self, config: Rwkv5Config, layer: int) -> nn.Module:
        return TimeMix5(config)

    def carried(self, name: str) -> StateSlot:
        heads = self.config.n_heads
        width = self.config.d_model // heads
        return StateSlot(name, "float32", (1, heads, width, width))


def slow_to_fast(c: Any, name: str, width: int) -> Array:
    """Published initial time_decay: -6 (slow) to -1 (fast) over the channels, more of them slow in low layers."""
    ramp = np.arange(width) / max(1, width - 1)
    return (-6.0 + 5.0 * ramp ** (0.7 + 1.3 * depth(c, layer_of(name))[0])).astype(np.float32)


def zigzag(c: Any, name: str, width: int) -> Array:
    """Published initial bonus: falling over the channels, with a period of three."""
    n = np.arange(width)
    return (depth(c, layer_of(name))[0] * (1.0 - n / max(1, width - 1)) + 0.1 * ((n + 1) % 3 - 1)).astype(np.float32)


def random_tensor(c: Rwkv5Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "time_decay":
        return slow_to_fast(c, name, shape[0])
    if leaf == "bonus":
        return zigzag(c, name, shape[0])
    return random_shared(c, name, shape, rng)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Version 5 has a norm behind its time mixing and mixes that do not depend on the token."""
    return "blocks.0.att.ln_x.weight" in shapes and "blocks.0.att.time_mix_k" in shapes


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Rwkv5Config:
    s = pth.Sizes(shapes)
    vocab, d = s.of("emb.weight", 2)
    if "blocks.0.att.time_faaaa" not in shapes or "blocks.0.att.gate.weight" not in shapes:
        raise SourceError(
            "The file is of RWKV 5.0 or 5.1, one decay per head, but 5.2 is what can be read",
            "convert it, or take a later model of the same family",
        )
    heads = 1 if len(shapes["blocks.0.att.time_faaaa"]) == 1 else s.of("blocks.0.att.time_faaaa", 2)[0]
    return Rwkv5Config(vocab, d, s.layers, heads, s.of("blocks.0.ffn.key.weight", 2)[0])


def pth_tensors(c: Rwkv5Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in BlinkDL's file."""
    d, per_head = c.d_model, (c.n_heads, c.d_model // c.n_heads)
    layer: dict[str, pth.Stored] = {
        "time_decay": ("time_decay", per_head, pth.flat),
        "bonus": ("time_faaaa", per_head, pth.flat),
        "head_norm": ("ln_x.weight", (d,), pth.flat),
        "head_norm_bias": ("ln_x.bias", (d,), pth.flat),
    }
    layer |= {f"mix_{x}": (f"time_mix_{x}", (d,), pth.turned) for x in "rkvg"}
    layer |= pth.square_matrices(d, r="receptance", k="key", v="value", g="gate", o="output")
    return pth.rwkv_tensors(c, {"mix_k": "time_mix_k", "mix_r": "time_mix_r"}, True, lambda i: layer)


FAMILY = Family(
    name="rwkv5",
    config=Rwkv5Config,
    model=Rwkv5,
    checkpoint=None,
    zoo={"rwkv5-0.4b": Rwkv5Config(65536, 1024, 24, 16, 3584), "rwkv5-1.5b": Rwkv5Config(65536, 2048, 24, 32, 7168)},
    tiny=Rwkv5Config(256, 128, 4, 4, 256),
    state_formula="4 L (2 d + d N)",
    growth="constant",
    ops=("linear_attention",),
    random_tensor=random_tensor,
    bare=BareCheckpoint(recognise, config_from_shapes, pth_tensors),
)
