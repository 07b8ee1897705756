"""RWKV-6, "Finch" (Peng et al. 2024, arXiv 2404.05892).

Glossary: as in rwkv.py, and M, D, the inner widths of the two low-rank maps.

Time mixing, with h [B,T,d] behind its norm, per head for r, k, v:
  m       = tanh(A mix_x(h)) [B,T,5M], a fifth for each of w, k, v, r, g
  mix_z   = share_z + B_z m_z                            shares of the previous token that depend on the token
  r, k, v = W_r mix_r(h), W_k mix_k(h), W_v mix_v(h);   g = silu(W_g mix_g(h))
  w       = exp(-exp(time_decay + D_up tanh(D_down mix_w(h))))
  o = r^T (S + (u k) (x) v);   S = diag(w) S + k (x) v
  y = W_o(head_norm(o) g)
State of a layer: att [1,1,d], wkv [1,H,N,N], ffn [1,1,d].
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import pth
from edgeseq.models.base import Array, BareCheckpoint, Family, StoredTensor, normal
from edgeseq.models.rwkv import Rwkv, head_norm, mix, random_shared, wkv, wkv_parallel
from edgeseq.models.rwkv5 import slow_to_fast, zigzag
from edgeseq.spec import StateSlot

MIXED = "wkvrg"  # in the order of the stored fifths


@dataclass(frozen=True)
class Rwkv6Config:
    """Shape of an RWKV-6; r_mix and r_decay are M and D, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    r_mix: int = 32
    r_decay: int = 64
    eps: float = 1e-5
    tie: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise SourceError(f"An RWKV-6 of width {self.d_model} has no {self.n_heads} heads of equal width")


class TimeMix6(nn.Module):
    """Time mixing of version 6. The biases of the low-rank maps are the stored shares and time_decay."""

    def __init__(self, c: Rwkv6Config) -> None:
        super().__init__()
        self.heads, self.rank = c.n_heads, c.r_mix
        d = c.d_model
        self.mix_x = nn.Parameter(torch.empty(d))
        self.mix_down = nn.Linear(d, 5 * c.r_mix, bias=False)
        self.mix_up = nn.ModuleDict({z: nn.Linear(c.r_mix, d) for z in MIXED})
        self.decay_down = nn.Linear(d, c.r_decay, bias=False)
        self.decay_up = nn.Linear(c.r_decay, d)
        for name in ("r_proj", "k_proj", "v_proj", "g_proj", "o_proj"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        self.bonus = nn.Parameter(torch.empty(d))
        self.head_norm = nn.Parameter(torch.ones(d))
        self.head_norm_bias = nn.Parameter(torch.zeros(d))

    def project(self, h: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """r, k, v, log decay and gate, [B,T,d] each."""
        m = torch.tanh(self.mix_down(mix(h, previous, self.mix_x)))
        mixed = {
            z: mix(h, previous, self.mix_up[z](m[..., i * self.rank : (i + 1) * self.rank]))
            for i, z in enumerate(MIXED)
        }
        g = -torch.exp(self.decay_up(torch.tanh(self.decay_down(mixed["w"]))))
        gate = F.silu(self.g_proj(mixed["g"]))
        return self.r_proj(mixed["r"]), self.k_proj(mixed["k"]), self.v_proj(mixed["v"]), g, gate

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


class Rwkv6(Rwkv):
    """RWKV-6; forms and state as in `SequenceModel`."""

    def time_mix(self, config: Rwkv6Config, layer: int) -> nn.Module:
        return TimeMix6(config)

    def carried(self, name: str) -> StateSlot:
        heads = self.config.n_heads
        width = self.config.d_model // heads
        return StateSlot(name, "float32", (1, heads, width, width))


def random_tensor(c: Rwkv6Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """As version 5; the low-rank maps start small, their biases where version 5's vectors start."""
    if name.endswith("decay_up.bias"):
        return slow_to_fast(c, name, shape[0])
    if name.endswith("bonus"):
        return zigzag(c, name, shape[0])
    if ".mix_up." in name and name.endswith("bias"):
        return random_shared(c, name.replace(".mix_up.", ".mix_").removesuffix(".bias"), shape, rng)
    if "_up." in name or "_down." in name:
        return normal(rng, shape, 0.02)
    return random_shared(c, name, shape, rng)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return "blocks.0.att.time_maa_x" in shapes


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Rwkv6Config:
    s = pth.Sizes(shapes)
    vocab, d = s.of("emb.weight", 2)
    first = shapes.get("blocks.0.att.time_faaaa", ())
    return Rwkv6Config(
        vocab_size=vocab,
        d_model=d,
        n_layers=s.layers,
        n_heads=1 if len(first) == 1 else s.of("blocks.0.att.time_faaaa", 2)[0],
        d_ff=s.of("blocks.0.ffn.key.weight", 2)[0],
        r_mix=s.of("blocks.0.att.time_maa_w2", 3)[1],
        r_decay=s.of("blocks.0.att.time_decay_w1", 2)[1],
    )


def pth_tensors(c: Rwkv6Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in BlinkDL's file, whose low-rank maps are [in,out]."""
    d, m, D, per_head = c.d_model, c.r_mix, c.r_decay, (c.n_heads, c.d_model // c.n_heads)
    layer: dict[str, pth.Stored] = {
        "mix_x": ("time_maa_x", (d,), pth.flat),
        "mix_down.weight": ("time_maa_w1", (d, 5 * m), pth.transposed),
        "decay_down.weight": ("time_decay_w1", (d, D), pth.transposed),
        "decay_up.weight": ("time_decay_w2", (D, d), pth.transposed),
        "decay_up.bias": ("time_decay", (d,), pth.flat),
        "bonus": ("time_faaaa", per_head, pth.flat),
        "head_norm": ("ln_x.weight", (d,), pth.flat),
        "head_norm_bias": ("ln_x.bias", (d,), pth.flat),
    }
    for i, z in enumerate(MIXED):
        layer[f"mix_up.{z}.weight"] = ("time_maa_w2", (5, m, d), _fifth(i))
        layer[f"mix_up.{z}.bias"] = (f"time_maa_{z}", (d,), pth.flat)
    layer |= pth.square_matrices(d, r="receptance", k="key", v="value", g="gate", o="output")
    return pth.rwkv_tensors(c, {"mix_k": "time_maa_k", "mix_r": "time_maa_r"}, True, lambda i: layer)


def _fifth(i: int) -> Callable[[Array], Array]:
    return lambda x: pth.transposed(x[i])


FAMILY = Family(
    name="rwkv6",
    config=Rwkv6Config,
    model=Rwkv6,
    checkpoint=None,
    zoo={"rwkv6-1.6b": Rwkv6Config(65536, 2048, 24, 32, 7168)},
    tiny=Rwkv6Config(256, 128, 4, 4, 176, r_mix=16, r_decay=16),
    state_formula="4 L (2 d + d N)",
    growth="constant",
    ops=("linear_attention",),
    random_tensor=random_tensor,
    bare=BareCheckpoint(recognise, config_from_shapes, pth_tensors),
)
