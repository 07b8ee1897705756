"""Mamba, the selective state space model (Gu and Dao 2023).

Glossary
  B  batch                 T  tokens             V  vocabulary          L  layers
  d  model width           D  inner width        N  state size          R  rank of the time step
  k  taps of the short convolution

One layer, with x the residual stream [B,T,d]:
  h      = rms_norm(x)
  u, z   = split(W_in h)                        [B,T,D] each
  u      = silu(causal_conv(u))
  dt,B,C = split(W_x u)                         [B,T,R], [B,T,N], [B,T,N]
  dt     = softplus(W_dt dt + b_dt)             [B,T,D]
  S      = exp(dt A) S + B (x) (dt u)           [B,N,D]      A = -exp(A_log) < 0
  x      = x + W_out((C . S + D u) silu(z))
State of a layer: conv [1,k-1,D] (the last inputs of the convolution) and ssm [1,N,D].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Protocol

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from edgeseq.models import functional as ops
from edgeseq.models import parallel
from edgeseq.models.base import Array, Checkpoint, Family, SequenceModel, StoredTensor, last_logits, normal
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.stack import Mixer, NegativeExp
from edgeseq.spec import StateSlot


@dataclass(frozen=True)
class MambaConfig:
    """Shape of a Mamba model; `proj_bias` is the bias of in_proj and out_proj, `tie` shares embedding and head."""

    vocab_size: int
    d_model: int
    n_layers: int
    d_inner: int
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 48
    eps: float = 1e-5
    proj_bias: bool = False
    conv_bias: bool = True
    tie: bool = True


Norm = Callable[[Tensor, Tensor | None, float], Tensor]


class MixerShape(Protocol):
    """What the mixer reads of a config: the fields of `MambaConfig` that do not concern the layers around it."""

    @property
    def d_model(self) -> int: ...
    @property
    def d_inner(self) -> int: ...
    @property
    def d_state(self) -> int: ...
    @property
    def d_conv(self) -> int: ...
    @property
    def dt_rank(self) -> int: ...
    @property
    def proj_bias(self) -> bool: ...
    @property
    def conv_bias(self) -> bool: ...


@dataclass(frozen=True)
class MambaShape:
    """A `MixerShape` by itself, for models whose layers are not all Mamba's."""

    d_model: int
    d_inner: int
    d_state: int = 16
    d_conv: int = 4
    dt_rank: int = 48
    proj_bias: bool = False
    conv_bias: bool = True


class MambaMixer(Mixer):
    """What a layer adds to the residual stream, given its normed input; parameters as above, A negative and N-major."""

    def __init__(self, c: MixerShape) -> None:
        super().__init__()
        self.c = c
        self.in_proj = nn.Linear(c.d_model, 2 * c.d_inner, bias=c.proj_bias)
        self.conv_weight = nn.Parameter(torch.empty(c.d_inner, c.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(c.d_inner)) if c.conv_bias else None
        self.x_proj = nn.Linear(c.d_inner, c.dt_rank + 2 * c.d_state, bias=False)
        self.dt_proj = nn.Linear(c.dt_rank, c.d_inner, bias=False)
        self.dt_bias = nn.Parameter(torch.zeros(c.d_inner))
        self.A = nn.Parameter(torch.empty(c.d_state, c.d_inner))
        self.D = nn.Parameter(torch.ones(c.d_inner))
        self.out_proj = nn.Linear(c.d_inner, c.d_model, bias=c.proj_bias)

    def split_x(self, u: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """u [B,T,D] -> dt before its bias [B,T,D], B [B,T,N], C [B,T,N]; `norm` is for those who norm the three."""
        r, n = self.c.dt_rank, self.c.d_state
        x = self.x_proj(u)
        return self.dt_proj(x[..., :r]), x[..., r : r + n], x[..., r + n :]

    def forward(self, h: Tensor) -> Tensor:
        xz = self.in_proj(h)
        u, z = xz[..., : self.c.d_inner], xz[..., self.c.d_inner :]
        u = F.silu(parallel.causal_conv_parallel(u, self.conv_weight, self.conv_bias))
        dt, b, c = self.split_x(u, ops.rms_norm_parallel)
        y = parallel.selective_scan_parallel(u, F.softplus(dt + self.dt_bias), self.A, b, c)
        return self.out_proj((y + self.D * u) * F.silu(z))

    def advance(self, h: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        conv, ssm = state
        xz = self.in_proj(h)
        u, z = xz[..., : self.c.d_inner], xz[..., self.c.d_inner :]
        u, conv = ops.causal_conv(u, self.conv_weight, self.conv_bias, conv, silu=True)
        dt, b, c = self.split_x(u, ops.rms_norm)
        y, ssm = ops.selective_scan(u, dt, self.A, b, c, self.D, z, self.dt_bias, ssm)
        return self.out_proj(y), conv, ssm

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (
            StateSlot("conv", "float32", (1, c.d_conv - 1, c.d_inner), 0.0, "shift", 1),
            StateSlot("ssm", "float32", (1, c.d_state, c.d_inner)),
        )


class MambaLayer(MambaMixer):
    """The mixer with the layer's norm and residual."""

    def __init__(self, c: MambaConfig) -> None:
        super().__init__(c)
        self.eps = c.eps
        self.norm = nn.Parameter(torch.ones(c.d_model))

    def forward(self, x: Tensor) -> Tensor:
        return x + super().forward(ops.rms_norm_parallel(x, self.norm, self.eps))

    def advance(self, x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        y, conv, ssm = super().advance(ops.rms_norm(x, self.norm, self.eps), *state)
        return x + y, conv, ssm


class Mamba(SequenceModel):
    """Embedding, layers, norm and head; forms and state as in `SequenceModel`."""

    uses_position = False
    layer_type: ClassVar[type[MambaLayer]] = MambaLayer

    def __init__(self, config: MambaConfig) -> None:
        super().__init__()
        self.config = config
        self.embed = nn.Embedding(config.vocab_size, config.d_model)
        self.layers = nn.ModuleList(self.layer_type(config) for _ in range(config.n_layers))
        self.norm = nn.Parameter(torch.ones(config.d_model))
        self.head = None if config.tie else nn.Parameter(torch.empty(config.vocab_size, config.d_model))

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        for layer in self.layers:
            x = layer(x)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def parametrize(self) -> None:
        for layer in self.layers:
            register_parametrization(layer, "A", NegativeExp())

    def unparametrize(self) -> None:
        for layer in self.layers:
            remove_parametrizations(layer, "A")

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(
            replace(slot, name=f"layers.{i}.{slot.name}")
            for i, layer in enumerate(self.layers)
            for slot in layer.state_slots()
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new = self.embed(tokens), []
        for i, layer in enumerate(self.layers):
            x, conv, ssm = layer.advance(x, state[2 * i], state[2 * i + 1])
            new += [conv, ssm]
        logits = last_logits(x, lambda h: ops.rms_norm(h, self.norm, self.config.eps), self.head_weight())
        return (logits, *new)


def random_tensor(c: MambaConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """Published initial scales: A = -(1..N), dt log-uniform in [0.001, 0.1], residual outputs shrunk by depth."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A":
        return np.repeat(-np.arange(1, c.d_state + 1, dtype=np.float32)[:, None], c.d_inner, axis=1)
    if leaf == "dt_bias":
        dt = np.exp(rng.uniform(math.log(1e-3), math.log(1e-1), shape))
        return (dt + np.log(-np.expm1(-dt))).astype(np.float32)  # inverse of softplus
    if leaf in ("norm", "D"):
        return np.ones(shape, np.float32)
    if leaf in ("bias", "conv_bias"):
        return np.zeros(shape, np.float32)
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if leaf == "out_proj" else std)


def config_from_hf(raw: Mapping[str, Any]) -> MambaConfig:
    """config.json of `MambaForCausalLM`, or of the state-spaces repositories (`d_model`, `n_layer`, `ssm_cfg`)."""
    return _from_state_spaces(raw) if "model_type" not in raw else _from_transformers(raw)


def _from_transformers(raw: Mapping[str, Any]) -> MambaConfig:
    r = ConfigReader(raw)
    d_model = r.positive("hidden_size")
    d_inner = r.positive("intermediate_size", default=int(r.number("expand", 2) * d_model))
    r.only("hidden_act", "silu", "swish")
    return MambaConfig(
        vocab_size=r.positive("vocab_size", default=50280),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", default=32, most=MOST_LAYERS),
        d_inner=d_inner,
        d_state=r.positive("state_size", default=16),
        d_conv=r.positive("conv_kernel", default=4, least=2),
        dt_rank=_rank(r, "time_step_rank", d_model),
        eps=r.number("layer_norm_epsilon", 1e-5),
        proj_bias=r.flag("use_bias", False),
        conv_bias=r.flag("use_conv_bias", True),
        tie=r.flag("tie_word_embeddings", True),
    )


def config_to_hf(c: MambaConfig) -> dict[str, Any]:
    """The config.json of `MambaForCausalLM` that `config_from_hf` reads as `c`."""
    expand = c.d_inner // c.d_model
    return {
        "architectures": ["MambaForCausalLM"],
        "model_type": "mamba",
        "vocab_size": c.vocab_size,
        "hidden_size": c.d_model,
        "num_hidden_layers": c.n_layers,
        "expand": expand,
        "intermediate_size": expand * c.d_model,
        "state_size": c.d_state,
        "conv_kernel": c.d_conv,
        "time_step_rank": c.dt_rank,
        "layer_norm_epsilon": c.eps,
        "hidden_act": "silu",
        "use_bias": c.proj_bias,
        "use_conv_bias": c.conv_bias,
        "tie_word_embeddings": c.tie,
    }


def _from_state_spaces(raw: Mapping[str, Any]) -> MambaConfig:
    r, ssm = ConfigReader(raw), ConfigReader(raw.get("ssm_cfg") or {}, prefix="ssm_cfg.")
    ssm.only("layer", "Mamba1")
    r.only("rms_norm", True)
    r.only("attn_layer_idx", [])
    r.only("d_intermediate", 0)
    d_model = r.positive("d_model")
    vocab, multiple = r.positive("vocab_size", default=50277), r.positive("pad_vocab_size_multiple", default=8)
    return MambaConfig(
        vocab_size=-(-vocab // multiple) * multiple,
        d_model=d_model,
        n_layers=r.positive("n_layer", most=MOST_LAYERS),
        d_inner=int(ssm.number("expand", 2) * d_model),
        d_state=ssm.positive("d_state", default=16),
        d_conv=ssm.positive("d_conv", default=4, least=2),
        dt_rank=_rank(ssm, "dt_rank", d_model),
        proj_bias=ssm.flag("bias", False),
        conv_bias=ssm.flag("conv_bias", True),
        tie=r.flag("tie_embeddings", True),
    )


def _rank(r: ConfigReader, field: str, d_model: int) -> int:
    return math.ceil(d_model / 16) if r.raw.get(field, "auto") == "auto" else r.positive(field)


def mixer_tensors(c: MixerShape, theirs: str) -> dict[str, StoredTensor]:
    """Names of one mixer -> names and shapes where they are stored, below the prefix `theirs` (ends in a dot)."""
    d, D, N, R = c.d_model, c.d_inner, c.d_state, c.dt_rank
    names = {
        "in_proj.weight": StoredTensor(f"{theirs}in_proj.weight", (2 * D, d)),
        "conv_weight": StoredTensor(
            f"{theirs}conv1d.weight", (D, 1, c.d_conv), lambda x: x[:, 0], restore=lambda w: w[:, None]
        ),
        "x_proj.weight": StoredTensor(f"{theirs}x_proj.weight", (R + 2 * N, D)),
        "dt_proj.weight": StoredTensor(f"{theirs}dt_proj.weight", (D, R)),
        "dt_bias": StoredTensor(f"{theirs}dt_proj.bias", (D,)),
        "A": StoredTensor(
            f"{theirs}A_log", (D, N), lambda x: np.ascontiguousarray(-np.exp(x).T), restore=lambda a: np.log(-a).T
        ),
        "D": StoredTensor(f"{theirs}D", (D,)),
        "out_proj.weight": StoredTensor(f"{theirs}out_proj.weight", (d, D)),
    }
    if c.conv_bias:
        names["conv_bias"] = StoredTensor(f"{theirs}conv1d.bias", (D,))
    if c.proj_bias:
        names["in_proj.bias"] = StoredTensor(f"{theirs}in_proj.bias", (2 * D,))
        names["out_proj.bias"] = StoredTensor(f"{theirs}out_proj.bias", (d,))
    return names


def hf_tensors(c: MambaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `MambaForCausalLM` (the state-spaces layout differs in the embedding only)."""
    names = {
        "embed.weight": StoredTensor("backbone.embeddings.weight", (c.vocab_size, c.d_model)),
        "norm": StoredTensor("backbone.norm_f.weight", (c.d_model,)),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        theirs = f"backbone.layers.{i}."
        names[f"layers.{i}.norm"] = StoredTensor(f"{theirs}norm.weight", (c.d_model,))
        mixer = mixer_tensors(c, f"{theirs}mixer.")
        names |= {f"layers.{i}.{name}": stored for name, stored in mixer.items()}
    return names


def _is_state_spaces(raw: Mapping[str, Any]) -> bool:
    """A field missing or wrong is named later; Mamba-2 has the same file with another `layer`."""
    ssm = raw.get("ssm_cfg")
    other = isinstance(ssm, Mapping) and ssm.get("layer") == "Mamba2"
    return "model_type" not in raw and "ssm_cfg" in raw and "n_layer" in raw and not other


def _public(d_model: int, n_layers: int) -> MambaConfig:
    """Shapes of state-spaces/mamba-*: expand 2, N 16, k 4, R = ceil(d/16), vocabulary padded to 50280, tied."""
    return MambaConfig(50280, d_model, n_layers, 2 * d_model, dt_rank=math.ceil(d_model / 16))


FAMILY = Family(
    name="mamba",
    config=MambaConfig,
    model=Mamba,
    checkpoint=Checkpoint(
        model_types=("mamba",),
        config=config_from_hf,
        tensors=hf_tensors,
        recognise=_is_state_spaces,
        aliases={"backbone.embeddings.weight": "backbone.embedding.weight"},
        written=config_to_hf,
    ),
    zoo={
        "mamba-130m": _public(768, 24),
        "mamba-370m": _public(1024, 48),
        "mamba-790m": _public(1536, 48),
        "mamba-1.4b": _public(2048, 48),
        "mamba-2.8b": _public(2560, 64),
    },
    tiny=MambaConfig(256, 128, 6, 256, d_state=8, dt_rank=8),
    state_formula="4 L D (N + k - 1)",
    growth="constant",
    ops=("causal_conv", "selective_scan"),
    random_tensor=random_tensor,
)
