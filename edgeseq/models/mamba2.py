"""Mamba-2, structured state space duality (Dao and Gu 2024, arXiv 2405.21060).

Glossary
  B  batch                 T  tokens             V  vocabulary          L  layers
  d  model width           H  heads              P  head width          D  inner width = H P
  N  state size            G  groups of heads that share B and C        k  taps of the short convolution

One layer, with x the residual stream [B,T,d]:
  h        = rms_norm(x)
  z, u, dt = split(W_in h)                       [B,T,D], [B,T,D+2GN], [B,T,H]
  u        = silu(causal_conv(u));  u, B, C = split(u)         [B,T,H,P], [B,T,G,N], [B,T,G,N]
  dt       = clip(softplus(dt + b_dt), dt_min, dt_max)         in every form
  S        = exp(dt A) S + B (x) (dt u)          [B,H,N,P]      A = -exp(A_log) < 0, head h reads group h // (H/G)
  y        = C . S + D_h u
  x        = x + W_out(rms_norm_per_group(y silu(z)) w)        or norm first, gate second, as `norm` says
State of a layer: conv [1,k-1,D+2GN] (the last inputs of the convolution) and ssm [1,H,N,P].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel
from edgeseq.models.base import Checkpoint, Family, StoredTensor
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.matrix_state import linear_attention_parallel
from edgeseq.models.stack import Mixer, Stack, random_tensor
from edgeseq.spec import StateSlot

Norm = Literal["gate_first", "norm_first", "none"]


@dataclass(frozen=True)
class SSDConfig:
    """Shape of one Mamba-2 mixer, in whatever model it stands.

    norm: gate_first is rms_norm(y silu(z)) w over each of G groups (Mamba-2, Bamba, Zamba2, Granite), norm_first is
    rms_norm(y) w silu(z) over each group, none is y silu(z) (Falcon-H1). dt_max None: no upper bound.
    proj_bias: of in_proj, and of out_proj unless out_bias says otherwise.
    """

    d_model: int
    n_heads: int
    head_dim: int
    d_state: int
    n_groups: int = 1
    d_conv: int = 4
    dt_min: float = 0.0
    dt_max: float | None = None
    norm: Norm = "gate_first"
    eps: float = 1e-5
    proj_bias: bool = False
    conv_bias: bool = True
    out_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_groups:
            raise SourceError(f"{self.n_heads} heads of a Mamba-2 mixer cannot share {self.n_groups} groups evenly")

    @property
    def d_inner(self) -> int:
        return self.n_heads * self.head_dim

    @property
    def d_conv_channels(self) -> int:
        return self.d_inner + 2 * self.n_groups * self.d_state

    @property
    def has_out_bias(self) -> bool:
        return self.proj_bias if self.out_bias is None else self.out_bias


class SSDMixer(Mixer):
    """The Mamba-2 mixer; parameters as in the module docstring, A stored negative."""

    def __init__(self, c: SSDConfig) -> None:
        super().__init__()
        self.c = c
        self.in_proj = nn.Linear(c.d_model, c.d_inner + c.d_conv_channels + c.n_heads, bias=c.proj_bias)
        self.conv_weight = nn.Parameter(torch.empty(c.d_conv_channels, c.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(c.d_conv_channels)) if c.conv_bias else None
        self.dt_bias = nn.Parameter(torch.zeros(c.n_heads))
        self.A = nn.Parameter(torch.empty(c.n_heads))
        self.D = nn.Parameter(torch.ones(c.n_heads))
        self.gate_norm = None if c.norm == "none" else nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.has_out_bias)

    def split_in(self, h: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """h [B,T,d] -> z [B,T,D], input of the convolution [B,T,D+2GN], dt before its bias [B,T,H]."""
        x, inner = self.in_proj(h), self.c.d_inner
        end = inner + self.c.d_conv_channels
        return x[..., :inner], x[..., inner:end], x[..., end:]

    def split_conv(self, u: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Output of the convolution -> u [B,T,H,P], B [B,T,G*N], C [B,T,G*N]."""
        inner, groups = self.c.d_inner, self.c.n_groups * self.c.d_state
        heads = u[..., :inner].unflatten(-1, (self.c.n_heads, self.c.head_dim))
        return heads, u[..., inner : inner + groups], u[..., inner + groups :]

    def step_size(self, dt: Tensor) -> Tensor:
        c = self.c
        return ops.time_step(dt, self.dt_bias, True, c.dt_min, math.inf if c.dt_max is None else c.dt_max)

    def gated(self, y: Tensor, z: Tensor, norm: Callable[[Tensor, Tensor | None, float], Tensor]) -> Tensor:
        """Gate and norm y [B,T,D] by z [B,T,D]."""
        c = self.c
        if c.norm == "none":
            return y * F.silu(z)
        if c.norm == "gate_first":
            y = y * F.silu(z)
        if c.n_groups == 1:
            y = norm(y, self.gate_norm, c.eps)
        else:
            y = norm(y.unflatten(-1, (c.n_groups, -1)), None, c.eps).flatten(-2) * self.gate_norm
        return y if c.norm == "gate_first" else y * F.silu(z)

    def forward(self, h: Tensor) -> Tensor:
        c = self.c
        z, u, dt = self.split_in(h)
        u, b, cc = self.split_conv(F.silu(parallel.causal_conv_parallel(u, self.conv_weight, self.conv_bias)))
        dt = self.step_size(dt)
        y = linear_attention_parallel(
            cc, b, (dt[..., None] * u).flatten(-2), c.n_heads, dt * self.A, None, "gated", c.n_groups, c.n_groups
        )
        y = y + (self.D[:, None] * u).flatten(-2)
        return self.out_proj(self.gated(y, z, ops.rms_norm_parallel))

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        c, (conv, ssm) = self.c, state
        z, u, dt = self.split_in(h)
        u, conv = ops.causal_conv(u, self.conv_weight, self.conv_bias, conv, silu=True)
        u, b, cc = self.split_conv(u)
        dt = self.step_size(dt)
        v = (dt[..., None] * u).flatten(-2)
        y, ssm = ops.linear_attention(cc, b, v, ssm, dt * self.A, None, "gated", c.n_groups, c.n_groups)
        y = y + (self.D[:, None] * u).flatten(-2)
        return self.out_proj(self.gated(y, z, ops.rms_norm)), conv, ssm

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (
            StateSlot("conv", "float32", (1, c.d_conv - 1, c.d_conv_channels), 0.0, "shift", 1),
            StateSlot("ssm", "float32", (1, c.n_heads, c.d_state, c.head_dim)),
        )


@dataclass(frozen=True)
class Mamba2Config:
    """Shape of a Mamba-2 model; fields as in `SSDConfig`, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    head_dim: int = 64
    d_state: int = 128
    n_groups: int = 1
    d_conv: int = 4
    dt_min: float = 0.0
    dt_max: float | None = None
    norm: Norm = "gate_first"
    eps: float = 1e-5
    proj_bias: bool = False
    conv_bias: bool = True
    tie: bool = True

    d_ff = 0

    @property
    def mixer(self) -> SSDConfig:
        return SSDConfig(
            self.d_model, self.n_heads, self.head_dim, self.d_state, self.n_groups, self.d_conv, self.dt_min,
            self.dt_max, self.norm, self.eps, self.proj_bias, self.conv_bias,
        )  # fmt: skip


class Mamba2(Stack):
    """Embedding, Mamba-2 layers, norm and head; forms and state as in `SequenceModel`."""

    def __init__(self, config: Mamba2Config) -> None:
        super().__init__(config, lambda c: SSDMixer(c.mixer))


def config_from_hf(raw: Mapping[str, Any]) -> Mamba2Config:
    """config.json of `Mamba2ForCausalLM`, or of the state-spaces repositories (`d_model`, `n_layer`, `ssm_cfg`)."""
    return _from_state_spaces(raw) if "model_type" not in raw else _from_transformers(raw)


def _from_transformers(raw: Mapping[str, Any]) -> Mamba2Config:
    r = ConfigReader(raw)
    r.only("hidden_act", "silu", "swish")
    r.only("rms_norm", True)
    d_model, heads, width = r.positive("hidden_size"), r.positive("num_heads"), r.positive("head_dim", default=64)
    if heads * width != int(r.number("expand", 2) * d_model):
        raise SourceError(
            f"config.json: num_heads {heads} times head_dim {width} is not expand {raw.get('expand', 2)} "
            f"times hidden_size {d_model}"
        )
    dt_min, dt_max = r.interval("time_step_limit", 0.0, math.inf)
    return Mamba2Config(
        vocab_size=r.positive("vocab_size", default=32768),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", default=64, most=MOST_LAYERS),
        n_heads=heads,
        head_dim=width,
        d_state=r.positive("state_size", default=128),
        n_groups=r.positive("n_groups", default=8),
        d_conv=r.positive("conv_kernel", default=4, least=2),
        dt_min=dt_min,
        dt_max=None if dt_max == math.inf else dt_max,
        eps=r.number("layer_norm_epsilon", 1e-5),
        proj_bias=r.flag("use_bias", False),
        conv_bias=r.flag("use_conv_bias", True),
        tie=r.flag("tie_word_embeddings", False),
    )


def config_to_hf(c: Mamba2Config) -> dict[str, Any]:
    """The config.json of `Mamba2ForCausalLM` that `config_from_hf` reads as `c`; it has no norm before the gate."""
    limit = {} if (c.dt_min, c.dt_max) == (0.0, None) else {"time_step_limit": [c.dt_min, c.dt_max or math.inf]}
    return limit | {
        "architectures": ["Mamba2ForCausalLM"],
        "model_type": "mamba2",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "expand": c.mixer.d_inner // c.d_model,
        "num_heads": c.n_heads,
        "head_dim": c.head_dim,
        "state_size": c.d_state,
        "n_groups": c.n_groups,
        "conv_kernel": c.d_conv,
        "layer_norm_epsilon": c.eps,
        "hidden_act": "silu",
        "rms_norm": True,
        "use_bias": c.proj_bias,
        "use_conv_bias": c.conv_bias,
        "tie_word_embeddings": c.tie,
    }


def _from_state_spaces(raw: Mapping[str, Any]) -> Mamba2Config:
    r, ssm = ConfigReader(raw), ConfigReader(raw.get("ssm_cfg") or {}, prefix="ssm_cfg.")
    r.only("rms_norm", True)
    r.only("attn_layer_idx", [])
    r.only("d_intermediate", 0)
    for field, allowed in (("D_has_hdim", False), ("rmsnorm", True), ("d_ssm", None), ("activation", "swish")):
        ssm.only(field, allowed)
    d_model = r.positive("d_model")
    d_inner, width = int(ssm.number("expand", 2) * d_model), ssm.positive("headdim", default=64)
    if d_inner % width:
        raise SourceError(f"config.json: an inner width of {d_inner} has no heads of ssm_cfg.headdim {width}")
    vocab, multiple = r.positive("vocab_size", default=50277), r.positive("pad_vocab_size_multiple", default=8)
    dt_min, dt_max = ssm.interval("dt_limit", 0.0, math.inf)
    return Mamba2Config(
        vocab_size=-(-vocab // multiple) * multiple,
        d_model=d_model,
        n_layers=r.positive("n_layer", most=MOST_LAYERS),
        n_heads=d_inner // width,
        head_dim=width,
        d_state=ssm.positive("d_state", default=128),
        n_groups=ssm.positive("ngroups", default=1),
        d_conv=ssm.positive("d_conv", default=4, least=2),
        dt_min=dt_min,
        dt_max=None if dt_max == math.inf else dt_max,
        norm="norm_first" if ssm.flag("norm_before_gate", False) else "gate_first",
        proj_bias=ssm.flag("bias", False),
        conv_bias=ssm.flag("conv_bias", True),
        tie=r.flag("tie_embeddings", True),
    )


def mixer_tensors(c: SSDConfig, theirs: str) -> dict[str, StoredTensor]:
    """Names of one mixer below `mixer.` -> where they are stored, below the prefix `theirs` (ends in a dot)."""
    names = {
        "in_proj.weight": StoredTensor(
            f"{theirs}in_proj.weight", (c.d_inner + c.d_conv_channels + c.n_heads, c.d_model)
        ),
        "conv_weight": StoredTensor(
            f"{theirs}conv1d.weight", (c.d_conv_channels, 1, c.d_conv), lambda x: x[:, 0], restore=lambda w: w[:, None]
        ),
        "dt_bias": StoredTensor(f"{theirs}dt_bias", (c.n_heads,)),
        "A": StoredTensor(f"{theirs}A_log", (c.n_heads,), lambda x: -np.exp(x), restore=lambda a: np.log(-a)),
        "D": StoredTensor(f"{theirs}D", (c.n_heads,)),
        "out_proj.weight": StoredTensor(f"{theirs}out_proj.weight", (c.d_model, c.d_inner)),
    }
    if c.norm != "none":
        names["gate_norm"] = StoredTensor(f"{theirs}norm.weight", (c.d_inner,))
    if c.conv_bias:
        names["conv_bias"] = StoredTensor(f"{theirs}conv1d.bias", (c.d_conv_channels,))
    if c.proj_bias:
        names["in_proj.bias"] = StoredTensor(f"{theirs}in_proj.bias", (c.d_inner + c.d_conv_channels + c.n_heads,))
    if c.has_out_bias:
        names["out_proj.bias"] = StoredTensor(f"{theirs}out_proj.bias", (c.d_model,))
    return names


def hf_tensors(c: Mamba2Config) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `Mamba2ForCausalLM` (the state-spaces layout differs in the embedding only)."""
    names = {
        "embed.weight": StoredTensor("backbone.embeddings.weight", (c.vocab_size, c.d_model)),
        "norm": StoredTensor("backbone.norm_f.weight", (c.d_model,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        theirs = f"backbone.layers.{i}."
        names[f"layers.{i}.norm"] = StoredTensor(f"{theirs}norm.weight", (c.d_model,))
        mixer = mixer_tensors(c.mixer, f"{theirs}mixer.")
        names |= {f"layers.{i}.mixer.{name}": stored for name, stored in mixer.items()}
    return names


def _is_state_spaces(raw: Mapping[str, Any]) -> bool:
    ssm = raw.get("ssm_cfg")
    return "model_type" not in raw and "n_layer" in raw and isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"


def _public(d_model: int, n_layers: int) -> Mamba2Config:
    """Shapes of state-spaces/mamba2-*: expand 2, P 64, N 128, one group, k 4, vocabulary padded to 50288, tied."""
    return Mamba2Config(50288, d_model, n_layers, 2 * d_model // 64)


FAMILY = Family(
    name="mamba2",
    config=Mamba2Config,
    model=Mamba2,
    checkpoint=Checkpoint(
        model_types=("mamba2",),
        config=config_from_hf,
        tensors=hf_tensors,
        recognise=_is_state_spaces,
        aliases={"backbone.embeddings.weight": "backbone.embedding.weight"},
        written=config_to_hf,
    ),
    zoo={
        "mamba2-130m": _public(768, 24),
        "mamba2-370m": _public(1024, 48),
        "mamba2-780m": _public(1536, 48),
        "mamba2-1.3b": _public(2048, 48),
        "mamba2-2.7b": _public(2560, 64),
    },
    tiny=Mamba2Config(256, 128, 6, 8, head_dim=32, d_state=32),
    state_formula="4 L (D N + (D + 2 G N) (k - 1))",
    growth="constant",
    ops=("causal_conv", "linear_attention"),
    random_tensor=random_tensor,
)
