"""RWKV-7, "Goose" (Peng et al. 2025, arXiv 2503.14456).

Glossary: as in rwkv.py, and low-rank maps lora_z(x) = U_z act(D_z x) + bias, rank R_z, for z in w, a, v, g.

Time mixing, with h [B,T,d] behind its norm, per head for r, k, v, w, a, kappa:
  r, k, v = W_r mix_r(h), W_k mix_k(h), W_v mix_v(h)
  log w   = -e^(-1/2) sigmoid(lora_w(mix_w(h)))          act tanh; w within 0.545 .. 1
  a       = sigmoid(lora_a(mix_a(h)));                   g = U_g sigmoid(D_g mix_g(h))
  kappa   = k key_removed / |k key_removed|              what is removed from the state
  k       = k (1 + (a - 1) key_kept)
  v       = v + (v_0 - v) sigmoid(lora_v(mix_v(h)))      v_0: v of layer 0 for the same token; layer 0 keeps its own
  S       = diag(w) S - (kappa a) (x) (kappa^T S) + k (x) v      S [N,N], keys by values; both read the old S
  o       = r^T S
  y       = W_o((head_norm(o) + (sum_N r bonus k) v) g)
Channel mixing has no gate. State of a layer: att [1,1,d], wkv [1,H,N,N], ffn [1,1,d].
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import pth
from edgeseq.models.base import Array, BareCheckpoint, Family, StoredTensor, normal
from edgeseq.models.rwkv import Rwkv, bonus, depth, head_norm, layer_of, mix, random_shared
from edgeseq.spec import StateSlot

CHUNK = 32  # tokens of a block of the parallel form: w >= 0.545, so e^(-G) stays below 3e8
LEAST_NORM = 1e-12  # of a removal key before it is divided by


@dataclass(frozen=True)
class Rwkv7Config:
    """Shape of an RWKV-7; r_w, r_a, r_v, r_g are the ranks of its low-rank maps, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    d_ff: int
    r_w: int = 64
    r_a: int = 64
    r_v: int = 32
    r_g: int = 128
    eps: float = 1e-5
    tie: bool = False

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads:
            raise SourceError(f"An RWKV-7 of width {self.d_model} has no {self.n_heads} heads of equal width")

    @property
    def d_head(self) -> int:
        return self.d_model // self.n_heads


def dplr_parallel(q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, heads: int) -> Tensor:
    """`dplr_scan` of a whole sequence from a fresh state, differentiable, for decays that stay above e^(-80/CHUNK).

    Within a block, u_t = a_t^T S_(t-1) obeys u = L u + (what S_0 and earlier k (x) v give), L strictly lower
    triangular: one triangular solve replaces the walk through the tokens.
    """
    tokens = q.shape[1]
    padded = (F.pad(x, (0, 0, 0, -tokens % CHUNK)) for x in (q, k, v, g, a, b))
    # [B,H,blocks,CHUNK,N]
    qh, kh, vh, gh, ah, bh = (
        x.unflatten(-1, (heads, -1)).unflatten(1, (-1, CHUNK)).permute(0, 3, 1, 2, 4) for x in padded
    )
    total = gh.cumsum(3)
    reads, queries = ah * torch.exp(total - gh), qh * torch.exp(total)
    keys, writes = kh * torch.exp(-total), bh * torch.exp(-total)
    # Products of a row of queries and a column of keys hold e^(G_i - G_j), each factor within range.
    system = torch.eye(CHUNK, dtype=q.dtype, device=q.device) - (reads @ writes.transpose(-1, -2)).tril(-1)
    known = (reads @ keys.transpose(-1, -2)).tril(-1) @ vh
    by_key, by_write = ((queries @ x.transpose(-1, -2)).tril() for x in (keys, writes))
    last = torch.exp(total[..., -1, :])[..., None]
    solved = torch.linalg.solve_triangular(system, torch.cat([known, reads], -1), upper=False, unitriangular=True)
    written, read = solved.split([vh.shape[-1], qh.shape[-1]], -1)  # u = written + read S
    inner, added, into = by_key @ vh, keys.transpose(-1, -2) @ vh, writes.transpose(-1, -2)
    state, outputs = q.new_zeros(*qh.shape[:2], qh.shape[-1], vh.shape[-1]), []
    blocks = (x.unbind(2) for x in (queries, inner, by_write, written, read, added, into, last))
    for query, o, from_u, w, reading, adding, writing, kept in zip(*blocks, strict=True):
        u = w + reading @ state
        outputs.append(query @ state + o + from_u @ u)
        state = kept * (state + adding + writing @ u)
    return torch.cat(outputs, 2).transpose(1, 2).flatten(2)[:, :tokens]


class TimeMix7(nn.Module):
    """Time mixing of version 7; `first` is v of layer 0. The biases of the low-rank maps are the stored w0, a0, v0."""

    def __init__(self, c: Rwkv7Config, layer: int) -> None:
        super().__init__()
        self.heads, self.layer = c.n_heads, layer
        d = c.d_model
        for name in ("mix_r", "mix_w", "mix_k", "mix_v", "mix_a", "mix_g", "key_removed", "key_kept", "bonus"):
            setattr(self, name, nn.Parameter(torch.empty(d)))
        for name in ("r_proj", "k_proj", "v_proj", "o_proj"):
            setattr(self, name, nn.Linear(d, d, bias=False))
        ranks = {"w": c.r_w, "a": c.r_a, "g": c.r_g} | ({"v": c.r_v} if layer else {})
        self.down = nn.ModuleDict({z: nn.Linear(d, r, bias=False) for z, r in ranks.items()})
        self.up = nn.ModuleDict({z: nn.Linear(r, d, bias=z != "g") for z, r in ranks.items()})
        self.head_norm = nn.Parameter(torch.ones(d))
        self.head_norm_bias = nn.Parameter(torch.zeros(d))

    def project(self, h: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, ...]:
        """r, k, v, log decay, a and the gate, [B,T,d] each, k still without its a."""
        xv = mix(h, previous, self.mix_v)
        v = self.v_proj(xv)
        if first is not None:
            v = v + (first - v) * torch.sigmoid(self.up["v"](self.down["v"](xv)))
        r = self.r_proj(mix(h, previous, self.mix_r))
        k = self.k_proj(mix(h, previous, self.mix_k))
        decay = self.up["w"](torch.tanh(self.down["w"](mix(h, previous, self.mix_w))))
        a = torch.sigmoid(self.up["a"](self.down["a"](mix(h, previous, self.mix_a))))
        gate = self.up["g"](torch.sigmoid(self.down["g"](mix(h, previous, self.mix_g))))
        return r, k, v, -math.exp(-0.5) * torch.sigmoid(decay), a, gate

    def removal_key(self, k: Tensor, parallel: bool) -> Tensor:
        """kappa [B,T,d]: a unit vector per head, as the root-mean-square norm of N elements over sqrt(N)."""
        each = (k * self.key_removed).unflatten(-1, (self.heads, -1))
        width = each.shape[-1]
        rms_norm = ops.rms_norm_parallel if parallel else ops.rms_norm
        return rms_norm(each, None, LEAST_NORM**2 / width).flatten(-2) * width**-0.5

    def finish(self, o: Tensor, r: Tensor, k: Tensor, v: Tensor, gate: Tensor) -> Tensor:
        normed = head_norm(o, self.head_norm, self.head_norm_bias, self.heads)
        return self.o_proj((normed + bonus(r, k, v, self.bonus, self.heads)) * gate)

    def parallel(self, h: Tensor, previous: Tensor, first: Tensor | None) -> tuple[Tensor, Tensor | None]:
        r, k, v, g, a, gate = self.project(h, previous, first)
        kappa = self.removal_key(k, parallel=True)
        k = k * (1.0 + (a - 1.0) * self.key_kept)
        o = dplr_parallel(r, k, v, g, kappa, -kappa * a, self.heads)
        return self.finish(o, r, k, v, gate), v if first is None else first

    def advance(
        self, h: Tensor, previous: Tensor, past: Tensor, first: Tensor | None
    ) -> tuple[Tensor, Tensor, Tensor | None]:
        r, k, v, g, a, gate = self.project(h, previous, first)
        kappa = self.removal_key(k, parallel=False)
        k = k * (1.0 + (a - 1.0) * self.key_kept)
        o, present = ops.dplr_scan(r, k, v, g, kappa, -kappa * a, past, self.heads)
        return self.finish(o, r, k, v, gate), present, v if first is None else first


class Rwkv7(Rwkv):
    """RWKV-7; forms and state as in `SequenceModel`."""

    receptance = False

    def time_mix(self, config: Rwkv7Config, layer: int) -> nn.Module:
        return TimeMix7(config, layer)

    def carried(self, name: str) -> StateSlot:
        c = self.config
        return StateSlot(name, "float32", (1, c.n_heads, c.d_head, c.d_head))


def random_tensor(c: Rwkv7Config, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Near the published initial values; the low-rank maps start small."""
    leaf = name.rsplit(".", 1)[-1]
    constant = {"key_removed": 0.85, "key_kept": 1.0, "bonus": 0.0}
    if leaf in constant:
        return np.full(shape, constant[leaf], np.float32)
    if name.endswith("up.w.bias"):
        ramp = np.arange(shape[0]) / max(1, shape[0] - 1)
        return (-6.5 + 5.0 * ramp ** (0.85 + depth(c, layer_of(name))[0] ** 0.5)).astype(np.float32)
    if name.endswith("up.v.bias"):
        return np.ones(shape, np.float32)
    if name.endswith("up.g.weight"):
        return normal(rng, shape, shape[-1] ** -0.5)  # sigmoid before it: a gate of zero would stop the gradient
    if ".up." in name or ".down." in name:
        return np.zeros(shape, np.float32) if leaf == "bias" else normal(rng, shape, 0.02)
    return random_shared(c, name, shape, rng)


def recognise(shapes: Mapping[str, tuple[int, ...]]) -> bool:
    return "blocks.0.att.r_k" in shapes


def config_from_shapes(shapes: Mapping[str, tuple[int, ...]]) -> Rwkv7Config:
    s = pth.Sizes(shapes)
    vocab, d = s.of("emb.weight", 2)
    layers = s.layers
    return Rwkv7Config(
        vocab_size=vocab,
        d_model=d,
        n_layers=layers,
        n_heads=1 if len(shapes["blocks.0.att.r_k"]) == 1 else s.of("blocks.0.att.r_k", 2)[0],
        d_ff=s.of("blocks.0.ffn.key.weight", 2)[0],
        r_w=s.of("blocks.0.att.w1", 2)[1],
        r_a=s.of("blocks.0.att.a1", 2)[1],
        r_v=s.of("blocks.1.att.v1", 2)[1] if layers > 1 else Rwkv7Config.r_v,
        r_g=s.of("blocks.0.att.g1", 2)[1],
    )


def pth_tensors(c: Rwkv7Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in BlinkDL's file, whose low-rank maps are [in,out]."""
    return pth.rwkv_tensors(c, {"mix_k": "x_k"}, False, lambda i: _time_mix(c, i))


def _time_mix(c: Rwkv7Config, layer: int) -> dict[str, pth.Stored]:
    d = c.d_model
    found: dict[str, pth.Stored] = {
        "key_removed": ("k_k", (d,), pth.flat),
        "key_kept": ("k_a", (d,), pth.flat),
        "bonus": ("r_k", (c.n_heads, c.d_head), pth.flat),
        "head_norm": ("ln_x.weight", (d,), pth.flat),
        "head_norm_bias": ("ln_x.bias", (d,), pth.flat),
    }
    found |= {f"mix_{x}": (f"x_{x}", (d,), pth.flat) for x in "rwkvag"}
    for z, rank in {"w": c.r_w, "a": c.r_a, "v": c.r_v, "g": c.r_g}.items():
        if z == "v" and layer == 0:
            continue  # v of layer 0 is its own first
        found[f"down.{z}.weight"] = (f"{z}1", (d, rank), pth.transposed)
        found[f"up.{z}.weight"] = (f"{z}2", (rank, d), pth.transposed)
        if z != "g":
            found[f"up.{z}.bias"] = (f"{z}0", (d,), pth.flat)
    return found | pth.square_matrices(d, r="receptance", k="key", v="value", o="output")


FAMILY = Family(
    name="rwkv7",
    config=Rwkv7Config,
    model=Rwkv7,
    checkpoint=None,
    zoo={
        "rwkv7-0.1b": Rwkv7Config(65536, 768, 12, 12, 3072),
        "rwkv7-0.4b": Rwkv7Config(65536, 1024, 24, 16, 4096),
        "rwkv7-1.5b": Rwkv7Config(65536, 2048, 24, 32, 8192, 96, 96, 64, 256),
    },
    tiny=Rwkv7Config(256, 128, 4, 4, 320, 16, 16, 16, 32),
    state_formula="4 L (2 d + d N)",
    growth="constant",
    ops=("dplr_scan",),
    random_tensor=random_tensor,
    # Some files carry the residual map of layer 0, which has nothing to mix with.
    bare=BareCheckpoint(recognise, config_from_shapes, pth_tensors, tuple(f"blocks.0.att.v{i}" for i in range(3))),
)
