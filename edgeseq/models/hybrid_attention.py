"""Attention as a mixer beside recurrent ones: grouped queries over a cache, rotated, partly rotated or not at all.

Letters as in `transformer.py`: H query heads, Hk key/value heads, e head width, M rows of the cache, W window.
Where a part of a head turns, a checkpoint's channels are put in another order as they are read (`rope.channel_order`).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from torch import Tensor, nn

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import parallel, rotary
from edgeseq.models.base import Array, StoredTensor
from edgeseq.models.hf import ConfigReader
from edgeseq.models.rope import RopeConfig, any_rope_from_hf, channel_order, reordered
from edgeseq.spec import StateSlot, Update

Norm = Callable[[Tensor, Tensor | None, float], Tensor]


class Place(NamedTuple):
    """Where a chunk stands: position [B] int64 of its first token; cos, sin [B,T,e/2], None without rotation.

    embedded [B,T,d] is what enters the first layer, for layers that read it again.
    """

    position: Tensor
    cos: Tensor | None
    sin: Tensor | None
    embedded: Tensor

    def turn(self, x: Tensor, heads: int, rotate: Callable[[Tensor, Tensor, Tensor, int, bool], Tensor]) -> Tensor:
        """x [B,T,heads*e] rotated by the angles of its tokens."""
        if self.cos is None or self.sin is None:
            return x
        return rotate(x, self.cos, self.sin, heads, False)


@dataclass(frozen=True)
class AttentionConfig:
    """Shape of one attention mixer. d_in: width of its input where that is not d_model.

    bias: of all four projections, of the last one unless out_bias says otherwise.
    scale: what scores are multiplied by, e^-1/2 if None. window: tokens each one sees, itself counted; 0: all.
    """

    d_model: int
    n_heads: int
    n_kv_heads: int
    head_dim: int
    bias: bool = False
    scale: float | None = None
    window: int = 0
    d_in: int | None = None
    out_bias: bool | None = None

    def __post_init__(self) -> None:
        if self.n_heads % self.n_kv_heads:
            raise SourceError(f"{self.n_heads} query heads cannot share {self.n_kv_heads} key/value heads evenly")
        if self.window < 0:
            raise SourceError(f"A window of {self.window} tokens does not even hold the current one")

    @property
    def factor(self) -> float:
        return self.head_dim**-0.5 if self.scale is None else self.scale

    @property
    def has_out_bias(self) -> bool:
        return self.bias if self.out_bias is None else self.out_bias

    @property
    def width(self) -> int:
        return self.d_model if self.d_in is None else self.d_in


class Attention(nn.Module):
    """q, k, v = W h, rotated; o = softmax(scale q K^T) V; W_o o. The cache holds rotated keys."""

    def __init__(self, c: AttentionConfig) -> None:
        super().__init__()
        self.c = c
        self.q_proj = nn.Linear(c.width, c.n_heads * c.head_dim, bias=c.bias)
        self.k_proj = nn.Linear(c.width, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.v_proj = nn.Linear(c.width, c.n_kv_heads * c.head_dim, bias=c.bias)
        self.o_proj = nn.Linear(c.n_heads * c.head_dim, c.d_model, bias=c.has_out_bias)

    def project(self, h: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        """h [B,T,width] -> q [B,T,H*e], k and v [B,T,Hk*e] before rotation; `norm` is for those who norm heads."""
        return self.q_proj(h), self.k_proj(h), self.v_proj(h)

    def out(self, o: Tensor, h: Tensor) -> Tensor:
        """o [B,T,H*e], and the input h for those who gate by it -> [B,T,d]."""
        return self.o_proj(o)

    def forward(self, h: Tensor, place: Place) -> Tensor:
        c = self.c
        q, k, v = self.project(h, ops.rms_norm_parallel)
        q = place.turn(q, c.n_heads, ops.rotary_parallel)
        k = place.turn(k, c.n_kv_heads, ops.rotary_parallel)
        if c.window:
            o = parallel.window_attention_parallel(q, k, v, c.n_heads, c.n_kv_heads, c.factor, c.window)
        else:
            o = parallel.attention_parallel(q, k, v, c.n_heads, c.n_kv_heads, c.factor)
        return self.out(o, h)

    def advance(self, h: Tensor, place: Place, *state: Tensor) -> tuple[Tensor, ...]:
        c, (key, value) = self.c, state
        q, k, v = self.project(h, ops.rms_norm)
        q, k = place.turn(q, c.n_heads, ops.rotary), place.turn(k, c.n_kv_heads, ops.rotary)
        attend = ops.window_attention if c.window else ops.cached_attention
        o, key, value = attend(q, k, v, key, value, place.position, c.n_heads, c.n_kv_heads, c.factor)
        return self.out(o, h), key, value

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        """key and value: a ring of the window's tokens, or a cache of the context's."""
        c = self.c
        if not c.window and context < 1:
            raise SourceError(f"A KV cache needs a context of at least one token, not {context}", "pass --context N")
        shape = (1, c.n_kv_heads, c.window or context, c.head_dim)
        update: Update = "ring" if c.window else "append"
        return tuple(StateSlot(name, "float32", shape, 0.0, update, 2) for name in ("key", "value"))


def rope_from_hf(raw: Mapping[str, Any], head_dim: int, share: float = 1.0) -> RopeConfig:
    """The frequencies of a config.json; `share` of a head turns where it does not say. Heads are even."""
    if head_dim % 2:
        raise SourceError(f"A head width of {head_dim} is odd, so its channels cannot be rotated in pairs")
    given = {name: value for name, value in raw.items() if value is not None}
    rope, longest = any_rope_from_hf(ConfigReader({"partial_rotary_factor": share} | given), head_dim)
    if longest is not None:
        raise SourceError(
            f"config.json: its rotary frequencies hold for {longest} tokens only, which no hybrid honours"
        )
    return rope


def whole_heads(rope: RopeConfig) -> RopeConfig:
    """The same, or SourceError where only a part of a head turns."""
    if rope.share != 1.0:
        raise SourceError(f"config.json: partial_rotary_factor is {rope.share}, but must be 1.0")
    return rope


def rope_constants(rope: RopeConfig | None, head_dim: int) -> dict[str, Array]:
    """The buffers of a `Hybrid` whose heads of this width are rotated, none where rope is None."""
    if rope is None:
        return {}
    found = {"frequency": rope.frequencies(head_dim)}
    return found if rope.attention_factor == 1.0 else found | {"amplitude": rope.amplitudes(head_dim)}


def attention_tensors(c: AttentionConfig, theirs: str, turned: int | None = None) -> dict[str, StoredTensor]:
    """Names of one mixer -> where they are stored below `theirs` (ends in a dot); `turned` channels are rotated."""
    kept = turned is None or turned == c.head_dim
    order = np.arange(c.head_dim) if turned is None else channel_order(c.head_dim, turned)
    q, kv = c.n_heads * c.head_dim, c.n_kv_heads * c.head_dim
    shapes = {"q_proj": (q, c.width), "k_proj": (kv, c.width), "v_proj": (kv, c.width), "o_proj": (c.d_model, q)}
    names = {}
    for name, shape in shapes.items():
        heads = {"q_proj": c.n_heads, "k_proj": c.n_kv_heads}.get(name, 0)
        convert: Callable[[Array], Array] = reordered(heads, order) if heads and not kept else lambda x: x
        names[f"{name}.weight"] = StoredTensor(f"{theirs}{name}.weight", shape, convert)
        if c.has_out_bias if name == "o_proj" else c.bias:
            names[f"{name}.bias"] = StoredTensor(f"{theirs}{name}.bias", shape[:1], convert)
    return names


def place_of(frequency: Tensor | None, amplitude: Tensor | None, position: Tensor, embedded: Tensor) -> Place:
    """The place of embedded tokens [B,T,d]; frequency int64 [e/2] (None: nothing is rotated), amplitude [e/2]."""
    if frequency is None:
        return Place(position, None, None, embedded)
    cos, sin = rotary.angles(frequency, position, embedded.shape[1])
    if amplitude is not None:
        cos, sin = cos * amplitude, sin * amplitude
    return Place(position, cos, sin, embedded)
