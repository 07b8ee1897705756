"""Griffin as RecurrentGemma has it (De et al. 2024, arXiv 2402.19427; Botev et al. 2024, arXiv 2404.07839).

Glossary
  B  batch                 T  tokens             L  layers, of which La attend and Lr = L - La are recurrent
  d  model width           D  width of the recurrence, in H blocks       k  taps of the short convolution
  H  heads                 Hk key/value heads    e  head width, d / H    W  window, the current token counted
  F  width of the gated feed-forward

The embedding is multiplied by sqrt(d), rounded to bfloat16 as published. One layer, x the residual stream [B,T,d]:
  x = x + mixer(rms_norm(x));   h = rms_norm(x);   x = x + W_down(gelu(W_gate h) * W_up h), all with bias
Recurrent mixer, the RG-LRU:
  u     = causal_conv(W_x h + b_x)                          k taps, with bias, no activation
  i, r  = sigmoid(U_i u + b_i), sigmoid(U_r u + b_r)        U block-diagonal, one block a head
  log a = r A                                               A = -8 softplus(Lambda) < 0, one number a channel
  S     = a S + sqrt(1 - a^2) (i u)                         the first token of a sequence: S = i u
  out   = W_o (S * gelu(W_y h + b_y)) + b_o
Attention mixer: grouped queries over the last W tokens, the first part of every head rotated.
logits = c tanh(z / c), z = W_embed rms_norm(x). GELU by its tanh approximation. Checkpoints hold norms less 1.
State of a layer: conv [1,k-1,D] and lru [1,D], or key and value, rings [1,Hk,W,e].
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel
from edgeseq.models.base import Array, Checkpoint, Family, StoredTensor, normal
from edgeseq.models.gated_scan_op import gated_scan, gated_scan_parallel
from edgeseq.models.hf import MOST_LAYERS, ConfigReader
from edgeseq.models.hybrid import Hybrid, below, mlp_tensors
from edgeseq.models.hybrid_attention import (
    Attention,
    AttentionConfig,
    Place,
    attention_tensors,
    rope_constants,
    rope_from_hf,
)
from edgeseq.models.rope import RopeConfig
from edgeseq.models.stack import Mixer
from edgeseq.spec import StateSlot

PATTERN = ("recurrent", "recurrent", "attention")


@dataclass(frozen=True)
class RecurrentGemmaConfig:
    """Shape of the model. pattern: kinds of layers, repeated; turned: channels of a head that are rotated; cap: c."""

    vocab_size: int
    d_model: int
    n_layers: int
    n_heads: int
    n_kv_heads: int
    d_lru: int
    d_ff: int
    window: int = 2048
    d_conv: int = 4
    pattern: tuple[str, ...] = PATTERN
    turned: int = 0
    eps: float = 1e-6
    cap: float = 30.0
    attention_bias: bool = False
    tie: bool = True
    rope: RopeConfig = field(default_factory=RopeConfig)

    def __post_init__(self) -> None:
        if self.d_model % self.n_heads or self.d_lru % self.n_heads:
            raise SourceError(f"Widths of {self.d_model} and {self.d_lru} cannot be cut into {self.n_heads} heads")
        if not self.pattern or any(kind not in PATTERN for kind in self.pattern):
            raise SourceError(f"The layers are {self.pattern!r:.80}, but must be recurrent or attention")
        if self.head_dim % 2 or self.rotary % 2 or not 2 <= self.rotary <= self.head_dim:
            raise SourceError(f"{self.rotary} of {self.head_dim} channels of a head cannot be rotated in pairs")
        self.attention()

    @property
    def head_dim(self) -> int:
        return self.d_model // self.n_heads

    @property
    def rotary(self) -> int:
        """Channels of a head that turn: half of them unless said otherwise."""
        return self.turned or self.head_dim // 2

    @property
    def turning(self) -> RopeConfig:
        """The frequencies of that part of a head; half a channel more, so that the share is of no fewer."""
        whole = self.rotary == self.head_dim
        return replace(self.rope, share=1.0 if whole else (self.rotary + 0.5) / self.head_dim)

    @property
    def block(self) -> int:
        """Width of a block of the gates' matrices."""
        return self.d_lru // self.n_heads

    def attention(self) -> AttentionConfig:
        return AttentionConfig(
            self.d_model, self.n_heads, self.n_kv_heads, self.head_dim, self.attention_bias, None, self.window,
            out_bias=True,
        )  # fmt: skip

    def attends(self, layer: int) -> bool:
        return self.pattern[layer % len(self.pattern)] == "attention"


def block_product(u: Tensor, blocks: Tensor) -> Tensor:
    """Each head of u [B,T,D] times its block [H,block,block], a token at a time."""
    return (u.unflatten(-1, (blocks.shape[0], 1, -1)) @ blocks).flatten(2)


def block_product_parallel(u: Tensor, blocks: Tensor) -> Tensor:
    """`block_product` with one product a head for all tokens."""
    return (u.unflatten(-1, (blocks.shape[0], -1)).transpose(1, 2) @ blocks).transpose(1, 2).flatten(2)


class RgLru(Mixer):
    """The recurrent mixer; parameters as in the module docstring, the gates' blocks [H,block,block] in by out."""

    def __init__(self, c: RecurrentGemmaConfig) -> None:
        super().__init__()
        self.c = c
        self.x_proj = nn.Linear(c.d_model, c.d_lru)
        self.y_proj = nn.Linear(c.d_model, c.d_lru)
        self.conv_weight = nn.Parameter(torch.empty(c.d_lru, c.d_conv))
        self.conv_bias = nn.Parameter(torch.zeros(c.d_lru))
        self.input_gate = nn.Parameter(torch.empty(c.n_heads, c.block, c.block))
        self.input_bias = nn.Parameter(torch.zeros(c.d_lru))
        self.decay_gate = nn.Parameter(torch.empty(c.n_heads, c.block, c.block))
        self.decay_bias = nn.Parameter(torch.zeros(c.d_lru))
        self.A = nn.Parameter(torch.empty(c.d_lru))
        self.out_proj = nn.Linear(c.d_lru, c.d_model)

    def gates(
        self, u: Tensor, position: Tensor, product: Callable[[Tensor, Tensor], Tensor] = block_product
    ) -> tuple[Tensor, Tensor]:
        """u [B,T,D], position [B] of the first token -> the recurrence's input and log a, [B,T,D].

        `product` of u and blocks [H,block,block]: [B,T,D].
        """
        i, r = (
            torch.sigmoid(product(u, w) + b)
            for w, b in ((self.input_gate, self.input_bias), (self.decay_gate, self.decay_bias))
        )
        log_a = r * self.A
        first = position[:, None, None] + torch.arange(u.shape[1], device=u.device)[None, :, None] == 0
        # 1 - a^2 = -expm1(2 log a) = -tanh(log a) (1 + a^2), which loses nothing where a is near 1
        keep = torch.sqrt(-torch.tanh(log_a) * (1.0 + torch.exp(2.0 * log_a)))
        return torch.where(first, torch.ones_like(keep), keep) * (i * u), log_a

    def forward(self, h: Tensor) -> Tensor:
        u = parallel.causal_conv_parallel(self.x_proj(h), self.conv_weight, self.conv_bias)
        x, log_a = self.gates(u, torch.zeros(1, dtype=torch.int64, device=h.device), block_product_parallel)
        return self.out_proj(gated_scan_parallel(x, log_a) * gelu(self.y_proj(h)))

    def advance_at(self, h: Tensor, position: Tensor, conv: Tensor, lru: Tensor) -> tuple[Tensor, ...]:
        u, conv = ops.causal_conv(self.x_proj(h), self.conv_weight, self.conv_bias, conv, silu=False)
        x, log_a = self.gates(u, position)
        s, lru = gated_scan(x, log_a, lru)
        return self.out_proj(s * gelu(self.y_proj(h))), conv, lru

    def state_slots(self) -> tuple[StateSlot, ...]:
        c = self.c
        return (
            StateSlot("conv", "float32", (1, c.d_conv - 1, c.d_lru), 0.0, "shift", 1),
            StateSlot("lru", "float32", (1, c.d_lru)),
        )


def gelu(x: Tensor) -> Tensor:
    return F.gelu(x, approximate="tanh")


class FeedForward(nn.Module):
    """W_down(gelu(W_gate h) * W_up h), with biases."""

    def __init__(self, d_model: int, d_ff: int) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff)
        self.up_proj = nn.Linear(d_model, d_ff)
        self.down_proj = nn.Linear(d_ff, d_model)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(gelu(self.gate_proj(h)) * self.up_proj(h))


class GriffinLayer(nn.Module):
    """One mixer (`lru` or `attention`) and the feed-forward, each with its norm and residual."""

    def __init__(self, c: RecurrentGemmaConfig, attends: bool) -> None:
        super().__init__()
        self.eps = c.eps
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.lru = None if attends else RgLru(c)
        self.attention = Attention(c.attention()) if attends else None
        self.ff_norm = nn.Parameter(torch.ones(c.d_model))
        self.feed_forward = FeedForward(c.d_model, c.d_ff)

    def forward(self, x: Tensor, place: Place) -> Tensor:
        h = ops.rms_norm_parallel(x, self.norm, self.eps)
        if self.lru is not None:
            x = x + self.lru(h)
        else:
            assert self.attention is not None
            x = x + self.attention(h, place)
        return x + self.feed_forward(ops.rms_norm_parallel(x, self.ff_norm, self.eps))

    def advance(self, x: Tensor, place: Place, *state: Tensor) -> tuple[Tensor, ...]:
        h = ops.rms_norm(x, self.norm, self.eps)
        if self.lru is not None:
            y, *new = self.lru.advance_at(h, place.position, *state)
        else:
            assert self.attention is not None
            y, *new = self.attention.advance(h, place, *state)
        x = x + y
        return x + self.feed_forward(ops.rms_norm(x, self.ff_norm, self.eps)), *new

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        if self.lru is not None:
            return self.lru.state_slots()
        assert self.attention is not None
        return self.attention.state_slots(context)


class RecurrentGemma(Hybrid):
    """Forms as in `SequenceModel`; the state does not depend on the context."""

    uses_position: ClassVar[bool] = True

    def __init__(self, c: RecurrentGemmaConfig) -> None:
        layers = [GriffinLayer(c, c.attends(i)) for i in range(c.n_layers)]
        scale = float(torch.tensor(math.sqrt(c.d_model), dtype=torch.bfloat16, device="cpu"))
        super().__init__(c, layers, c.turning, c.head_dim, scale)
        self.uses_position = True  # type: ignore[misc]  # the first token of a sequence is told by it

    def capped(self, z: Tensor) -> Tensor:
        return self.config.cap * torch.tanh(z / self.config.cap)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.capped(super().forward(tokens))

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        z, *new = super().advance(tokens, position, *state)
        return self.capped(z), *new


def random_tensor(c: RecurrentGemmaConfig, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """a uniform in [0.9, 0.999] at r = 1, as published; matrices keep variance, residual outputs shrunk by depth."""
    leaf = name.removesuffix(".weight").rsplit(".", 1)[-1]
    if leaf == "A":
        return np.log(rng.uniform(0.9, 0.999, shape)).astype(np.float32)
    if leaf.endswith("norm"):
        return np.ones(shape, np.float32)
    if leaf.endswith("bias"):
        return np.zeros(shape, np.float32)
    if leaf == "embed":
        return normal(rng, shape, 1.0 / math.sqrt(c.d_model))
    std = 1.0 / math.sqrt(shape[-1])
    return normal(rng, shape, std / math.sqrt(2 * c.n_layers) if leaf in ("out_proj", "o_proj", "down_proj") else std)


def config_from_hf(raw: Mapping[str, Any]) -> RecurrentGemmaConfig:
    """config.json of `RecurrentGemmaForCausalLM`; its intermediate_size is twice the feed-forward's width."""
    r = ConfigReader(raw)
    r.only("hidden_activation", "gelu_pytorch_tanh")
    d_model, n_heads = r.positive("hidden_size", default=2560), r.positive("num_attention_heads", default=10)
    if d_model % n_heads:
        raise SourceError(f"config.json: hidden_size {d_model} cannot be cut into {n_heads} heads")
    kinds = r.get("block_types")
    if kinds is not None and (not isinstance(kinds, list) or not all(isinstance(kind, str) for kind in kinds)):
        raise SourceError(f"config.json: block_types is {kinds!r:.60}, but must be a list of kinds of layers")
    doubled = r.positive("intermediate_size", default=7680, least=2)
    rope = rope_from_hf(raw, d_model // n_heads, 0.5)
    return RecurrentGemmaConfig(
        vocab_size=r.positive("vocab_size", default=256000),
        d_model=d_model,
        n_layers=r.positive("num_hidden_layers", default=26, most=MOST_LAYERS),
        n_heads=n_heads,
        n_kv_heads=r.positive("num_key_value_heads", default=n_heads),
        d_lru=r.positive("lru_width", default=d_model),
        d_ff=doubled // 2,
        window=r.positive("attention_window_size", default=2048),
        d_conv=r.positive("conv1d_width", default=4, least=2),
        pattern=PATTERN if kinds is None else tuple(kinds),
        turned=rope.turned(d_model // n_heads),
        eps=r.number("rms_norm_eps", 1e-6),
        cap=r.number("logits_soft_cap", 30.0),
        attention_bias=r.flag("attention_bias", False),
        tie=r.flag("tie_word_embeddings", True),
        rope=rope,
    )


def from_one(x: Array) -> Array:
    """A norm's weight, stored as its distance from 1."""
    return x + np.float32(1.0)


def decay_rate(x: Array) -> Array:
    """A = -8 softplus(Lambda)."""
    wide = x.astype(np.float64)
    return (-8.0 * np.logaddexp(0.0, wide)).astype(np.float32)


def lru_tensors(c: RecurrentGemmaConfig, theirs: str) -> dict[str, StoredTensor]:
    """Names of one recurrent mixer -> where they are stored below `theirs` (ends in a dot)."""
    d, D, gate = c.d_model, c.d_lru, (c.n_heads, c.block, c.block)
    flat: Callable[[Array], Array] = lambda x: x.reshape(-1)  # noqa: E731
    names = {
        "conv_weight": StoredTensor(f"{theirs}conv_1d.weight", (D, 1, c.d_conv), lambda x: x[:, 0]),
        "conv_bias": StoredTensor(f"{theirs}conv_1d.bias", (D,)),
        "A": StoredTensor(f"{theirs}rg_lru.recurrent_param", (D,), decay_rate),
    }
    for ours, name in (("input", "input_gate"), ("decay", "recurrent_gate")):
        names[f"{ours}_gate"] = StoredTensor(f"{theirs}rg_lru.{name}_weight", gate)
        names[f"{ours}_bias"] = StoredTensor(f"{theirs}rg_lru.{name}_bias", gate[:2], flat)
    for ours, name, shape in (("x", "linear_x", (D, d)), ("y", "linear_y", (D, d)), ("out", "linear_out", (d, D))):
        names[f"{ours}_proj.weight"] = StoredTensor(f"{theirs}{name}.weight", shape)
        names[f"{ours}_proj.bias"] = StoredTensor(f"{theirs}{name}.bias", shape[:1])
    return names


def hf_tensors(c: RecurrentGemmaConfig) -> dict[str, StoredTensor]:
    """Our names -> names and shapes in `RecurrentGemmaForCausalLM`."""
    names = {
        "embed.weight": StoredTensor("model.embed_tokens.weight", (c.vocab_size, c.d_model)),
        "norm": StoredTensor("model.final_norm.weight", (c.d_model,), from_one),
    }
    if not c.tie:
        names["head"] = StoredTensor("lm_head.weight", (c.vocab_size, c.d_model))
    for i in range(c.n_layers):
        ours, theirs = f"layers.{i}.", f"model.layers.{i}."
        names[f"{ours}norm"] = StoredTensor(f"{theirs}temporal_pre_norm.weight", (c.d_model,), from_one)
        names[f"{ours}ff_norm"] = StoredTensor(f"{theirs}channel_pre_norm.weight", (c.d_model,), from_one)
        block = f"{theirs}temporal_block."
        if c.attends(i):
            names |= below(f"{ours}attention.", attention_tensors(c.attention(), block, c.rotary))
        else:
            names |= below(f"{ours}lru.", lru_tensors(c, block))
        names |= below(f"{ours}feed_forward.", mlp_tensors(c.d_model, c.d_ff, f"{theirs}mlp_block.", bias=True))
    return names


FAMILY = Family(
    name="recurrent-gemma",
    config=RecurrentGemmaConfig,
    model=RecurrentGemma,
    checkpoint=Checkpoint(model_types=("recurrent_gemma",), config=config_from_hf, tensors=hf_tensors),
    zoo={
        "recurrentgemma-2b": RecurrentGemmaConfig(256000, 2560, 26, 10, 1, 2560, 7680),
        "recurrentgemma-9b": RecurrentGemmaConfig(256000, 4096, 38, 16, 1, 4096, 12288),
    },
    tiny=RecurrentGemmaConfig(256, 128, 6, 4, 1, 128, 152, window=32),
    state_formula="4 (Lr D k + 2 La Hk e W)",
    growth="window",
    ops=("causal_conv", "gated_scan", "rotary", "window_attention"),
    random_tensor=random_tensor,
    constants=lambda c: rope_constants(c.turning, c.head_dim),
)
