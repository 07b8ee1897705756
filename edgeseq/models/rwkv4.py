"""RWKV-4 (Peng et al. 2023, arXiv 2305.13048).

Glossary: as in rwkv.py, and A, the width of the time mixing (d in published models).

Time mixing, with h [B,T,d] behind its norm:
  k, v, r = W_k mix_k(h), W_v mix_v(h), W_r mix_r(h)              [B,T,A]
  o       = WKV4(k, v): average of values weighted by e^k, older ones decayed by exp(-exp(time_decay)) a token,
            the current one by e^(time_first)
  y       = W_o(sigmoid(r) o)
State of a layer: att [1,1,d], wkv [1,3,A] (WKV4's a, b and their exponent), ffn [1,1,d].

Hugging Face halves the hidden state every `rescale_every` layers for half precision; in float32 that changes nothing
but the weight of the norms' epsilon, so the model is taken as published: without it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from edgeseq.models import functional as ops
from edgeseq.models import pth
from edgeseq.models.base import Array, BareCheckpoint, Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.rwkv import Rwkv, depth, layer_of, mix, random_shared
from edgeseq.ops.wkv4 import FRESH
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class Rwkv4Config:
    """Shape of an RWKV-4; `tie` shares embedding and head (published models do not)."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_att: int
    d_ff: int
    eps: float = 1e-5
    tie: bool = False


def wkv4_parallel(k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor) -> Tensor:
    """WKV4 of a whole sequence from a fresh state, differentiable: k, v [B,T,C] -> o [B,T,C].

    A Hillis-Steele scan: after j rounds element t sums the last 2^j tokens, as (a, b) e^p. Exponents only keep the
    numbers within range, so no gradient runs through them.
    """
    w, tokens = -torch.exp(time_decay), k.shape[1]
    p = k.detach()
    b = torch.exp(k - p)
    a, span = b * v, 1
    while span < tokens:
        # Behind the last 2^j tokens stand the 2^j before them, decayed by as many steps.
        older_p = _later(p, span, FRESH) + span * w.detach()
        m = torch.maximum(older_p, p)
        older = torch.exp(_later(p, span, FRESH) + span * w - m)
        newer = torch.exp(p - m)
        a, b, p = older * _later(a, span) + newer * a, older * _later(b, span) + newer * b, m
        span *= 2
    a, b, p = _later(a, 1), _later(b, 1), _later(p, 1, FRESH)
    own = time_first + k
    m = torch.maximum(p, own).detach()
    before, now = torch.exp(p - m), torch.exp(own - m)
    return (before * a + now * v) / (before * b + now)


def _later(x: Tensor, by: int, fill: float = 0.0) -> Tensor:
    """x [B,T,C] moved `by` tokens later, `fill` in front."""
    return torch.nn.functional.pad(x, (0, 0, by, 0), value=fill)[:, : x.shape[1]]


class TimeMix4(nn.Module):
    """Time mixing of version 4."""

    def __init__(self, c: Rwkv4Config) -> None:
        super().__init__()
        for name in ("mix_k", "mix_v", "mix_r"):
            setattr(self, name, nn.Parameter(torch.empty(c.d_model)))
        self.k_proj = nn.Linear(c.d_model, c.d_att, bias=False)
        self.v_proj = nn.Linear(c.d_model, c.d_att, bias=False)
        self.r_proj = nn.Linear(c.d_model, c.d_att, bias=False)
        self.time_decay = nn.Parameter(torch.empty(c.d_att))
        self.time_first = nn.Parameter(torch.empty(c.d_att))
        self.o_proj = nn.Linear(c.d_att, c.d_model, bias=False)

    def project(self, h: Tensor, previous: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """k, v and the gate [B,T,A]."""
        k = self.k_proj(mix(h, previous, self.mix_k))
        v = self.v_proj(mix(h, previous, self.mix_v))
        return k, v, torch.sigmoid(self.r_proj(mix(h, previous, self.mix_r)))

    def parallel(self, h: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        k, v, gate = self.project(h, previous)
        return self.o_proj(gate * wkv4_parallel(k, v, self.time_decay, self.time_first)), first

    def advance(
        self, h: Tensor, previous: Tensor, past: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        k, v, gate = self.project(h, previous)
        o, present = ops.wkv4(k, v, self.time_decay, self.time_first, past)
        return self.o_proj(gate * o), present, first


class Rwkv4(Rwkv):
    """RWKV-4; forms and state as in `SequenceModel`."""

    def time_mix(self, config: Rwkv4Config, layer: int) -> nn.Module:
        return TimeMix4(config)

    def carried(self, name: str) -> StateSlot:
        return StateSlot(name, "float32", (1, 3, self.config.d_att), FRESH)


def random_tensor(c: Rwkv4Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Published initial decays: from slow (first channel) to fast (last), more of them slow in low layers."""
    leaf = name.rsplit(".", 1)[-1]
    if leaf == "time_decay":
        ramp = np.arange(shape[0]) / max(1, shape[0] - 1)
        return (-5.0 + 8.0 * ramp ** (0.7 + 1.3 * depth(c, layer_of(name))[0])).astype(np.float32)
    if leaf == "time_first":
        return (np.log(0.3) + 0.5 * (np.arange(1, shape[0] + 1) % 3 - 1)).astype(np.float32)
    return random_shared(c, name, shape, rng)


def config_from_hf(raw: Mapping[str, Any]) -> Rwkv4Config:
    """config.json of `RwkvForCausalLM`; `rescale_every` and `context_length` change no result and are not read."""
    r = ConfigReader(raw)
    d = r.positive("hidden_size")
    return Rwkv4Config(
        vocab_size=r.positive("vocab_size", default=50277),
        d_model=d,
        n_layers=r.positive("num_hidden_layers", default=32, most=MOST_LAYERS),
        d_att=r.positive("attention_hidden_size", default=d),
        d_ff=r.positive("intermediate_size", default=4 * d),
        eps=r.number("layer_norm_epsilon", 1e-5),
        tie=r.flag("tie_word_embeddings", False),
    )


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """Version 4 has a bonus per channel and no norm behind its time mixing."""
    return "blocks.0.att.time_first" in shapes and "blocks.0.att.ln_x.weight" not in shapes


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Rwkv4Config:
    s = pth.Sizes(shapes)
    vocab, d = s.of("emb.weight", 2)
    return Rwkv4Config(vocab, d, s.layers, s.of("blocks.0.att.time_decay", 1)[0], s.of("blocks.0.ffn.key.weight", 2)[0])


def pth_tensors(c: Rwkv4Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in BlinkDL's file."""
    d, a = c.d_model, c.d_att
    layer: dict[str, pth.Stored] = {
        "k_proj.weight": ("key.weight", (a, d), _same),
        "v_proj.weight": ("value.weight", (a, d), _same),
        "r_proj.weight": ("receptance.weight", (a, d), _same),
        "o_proj.weight": ("output.weight", (d, a), _same),
        "time_decay": ("time_decay", (a,), _same),
        "time_first": ("time_first", (a,), _same),
    }
    layer |= {f"mix_{x}": (f"time_mix_{x}", (d,), pth.turned) for x in "kvr"}
    return pth.rwkv_tensors(c, {"mix_k": "time_mix_k", "mix_r": "time_mix_r"}, True, lambda i: layer)


def _same(x: Array) -> Array:
    return x


HF_WORDS = {
    "emb.": "rwkv.embeddings.", "blocks.": "rwkv.blocks.", "ln_out.": "rwkv.ln_out.", ".ln0.": ".pre_ln.",
    ".att.": ".attention.", ".ffn.": ".feed_forward.",
    "time_mix_k": "time_mix_key", "time_mix_v": "time_mix_value", "time_mix_r": "time_mix_receptance",
}  # fmt: skip


def hf_tensors(c: Rwkv4Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `RwkvForCausalLM`: the same layout in longer words."""
    found = {}
    for ours, stored in pth_tensors(c).items():
        name, shape = stored.name, stored.shape
        for short, long in HF_WORDS.items():
            name = name.replace(short, long)
        found[ours] = replace(stored, name=name, shape=(1, 1, *shape) if "time_mix" in name else shape)
    return found


FAMILY = Family(
    name="rwkv4",
    config=Rwkv4Config,
    model=Rwkv4,
    checkpoint=Checkpoint(("rwkv",), config_from_hf, hf_tensors, tied={"head.weight": "embed.weight"}),
    zoo={
        "rwkv4-169m": Rwkv4Config(50277, 768, 12, 768, 3072),
        "rwkv4-430m": Rwkv4Config(50277, 1024, 24, 1024, 4096),
    },
    tiny=Rwkv4Config(256, 128, 4, 128, 320),
    state_formula="4 L (2 d + 3 A)",
    growth="constant",
    ops=("wkv4",),
    random_tensor=random_tensor,
    bare=BareCheckpoint(recognise, config_from_shapes, pth_tensors),
)
