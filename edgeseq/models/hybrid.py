"""A stack whose layers mix tokens by attention, by a recurrence, or by both: one state holds caches and states.

  h = rms_norm(x);  x = x + sum of mixer(h);   h = rms_norm(x);  x = x + feed_forward(h)

Mixers have names, and a slot is called layers.<i>.<mixer>.<slot>: layers.3.attention.key, layers.4.mamba.ssm.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils.parametrize import register_parametrization, remove_parametrizations

from edgeseq.errors import SourceError
from edgeseq.models import functional as ops
from edgeseq.models import stack
from edgeseq.models.base import Array, SequenceModel, StoredTensor, last_logits
from edgeseq.models.hf import ConfigReader
from edgeseq.models.hybrid_attention import Attention, Place, place_of
from edgeseq.models.mamba2 import Norm as GateNorm
from edgeseq.models.mamba2 import SSDConfig
from edgeseq.models.moe import Moe
from edgeseq.models.rope import RopeConfig
from edgeseq.models.stack import Mixer, NegativeExp
from edgeseq.spec import StateSlot


class GatedMLP(nn.Module):
    """W_down(silu(W_gate h) * W_up h)."""

    def __init__(self, d_model: int, d_ff: int, bias: bool = False) -> None:
        super().__init__()
        self.gate_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.up_proj = nn.Linear(d_model, d_ff, bias=bias)
        self.down_proj = nn.Linear(d_ff, d_model, bias=bias)

    def forward(self, h: Tensor) -> Tensor:
        return self.down_proj(F.silu(self.gate_proj(h)) * self.up_proj(h))


class HybridLayer(nn.Module):
    """Mixers on the same normed input, their outputs summed, then the feed-forward (or none).

    mixers: name -> a `Mixer` or an `Attention`, in the order of the state's slots.
    """

    def __init__(
        self, d_model: int, eps: float, mixers: Mapping[str, nn.Module], feed_forward: nn.Module | None = None
    ) -> None:
        super().__init__()
        self.eps, self.mixer_names = eps, tuple(mixers)
        self.norm = nn.Parameter(torch.ones(d_model))
        for name, mixer in mixers.items():
            self.add_module(name, mixer)
        self.feed_forward = feed_forward
        if feed_forward is not None:
            self.ff_norm = nn.Parameter(torch.ones(d_model))

    def mixers(self) -> list[tuple[str, nn.Module]]:
        return [(name, self.get_submodule(name)) for name in self.mixer_names]

    def forward(self, x: Tensor, place: Place) -> Tensor:
        h = ops.rms_norm_parallel(x, self.norm, self.eps)
        for _, mixer in self.mixers():
            x = x + whole(mixer, h, place)
        if self.feed_forward is None:
            return x
        return x + self.feed_forward(ops.rms_norm_parallel(x, self.ff_norm, self.eps))

    def advance(self, x: Tensor, place: Place, *state: Tensor) -> tuple[Tensor, ...]:
        h, new, at = ops.rms_norm(x, self.norm, self.eps), [], 0
        for _, mixer in self.mixers():
            count = len(slots_of(mixer, 1))
            y, *present = chunk(mixer, h, place, *state[at : at + count])
            x, at = x + y, at + count
            new += present
        if self.feed_forward is not None:
            h = ops.rms_norm(x, self.ff_norm, self.eps)
            x = x + (self.feed_forward.advance(h) if isinstance(self.feed_forward, Moe) else self.feed_forward(h))
        return x, *new

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(
            replace(slot, name=f"{name}.{slot.name}")
            for name, mixer in self.mixers()
            for slot in slots_of(mixer, context)
        )


def whole(mixer: nn.Module, h: Tensor, place: Place) -> Tensor:
    """A mixer's whole-sequence form; attention alone asks where the tokens stand."""
    return mixer(h, place) if isinstance(mixer, Attention) else mixer(h)


def chunk(mixer: nn.Module, h: Tensor, place: Place, *state: Tensor) -> tuple[Tensor, ...]:
    """A mixer's chunk form."""
    if isinstance(mixer, Attention):
        return mixer.advance(h, place, *state)
    assert isinstance(mixer, Mixer)
    return mixer.advance(h, *state)


def slots_of(mixer: nn.Module, context: int) -> tuple[StateSlot, ...]:
    """A mixer's state; a cache alone depends on the context."""
    if isinstance(mixer, Attention):
        return mixer.state_slots(context)
    assert isinstance(mixer, Mixer)
    return mixer.state_slots()


class Hybrid(SequenceModel):
    """Embedding, layers, norm and head. `config` has vocab_size, d_model, eps and tie.

    layers: with forward, advance and state_slots as in `HybridLayer`.
    rope, head_dim: how heads of this width are rotated, None where they are not. embed_scale multiplies embeddings.
    """

    def __init__(
        self,
        config: Any,
        layers: Iterable[nn.Module],
        rope: RopeConfig | None = None,
        head_dim: int = 0,
        embed_scale: float = 1.0,
    ) -> None:
        super().__init__()
        c = self.config = config
        self.embed_scale = embed_scale
        self.embed = nn.Embedding(c.vocab_size, c.d_model)
        self.layers = nn.ModuleList(layers)
        self.norm = nn.Parameter(torch.ones(c.d_model))
        self.head = None if c.tie else nn.Parameter(torch.empty(c.vocab_size, c.d_model))
        moved = rope is not None and rope.attention_factor != 1.0
        self.register_buffer("frequency", None if rope is None else torch.empty(head_dim // 2, dtype=torch.int64))
        self.register_buffer("amplitude", torch.empty(head_dim // 2) if moved else None)
        self.counts = [len(layer.state_slots(1)) for layer in self.layers]
        cached = any(slot.update in ("append", "ring") for layer in self.layers for slot in layer.state_slots(1))
        self.uses_position = cached  # type: ignore[misc]

    def head_weight(self) -> Tensor:
        return self.embed.weight if self.head is None else self.head

    def embedded(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return x if self.embed_scale == 1.0 else x * self.embed_scale

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embedded(tokens)
        place = place_of(self.frequency, self.amplitude, tokens.new_zeros(1), x)
        for layer in self.layers:
            x = layer(x, place)
        return F.linear(ops.rms_norm_parallel(x, self.norm, self.config.eps), self.head_weight())

    def state_slots(self, context: int) -> tuple[StateSlot, ...]:
        return tuple(
            replace(slot, name=f"layers.{i}.{slot.name}")
            for i, layer in enumerate(self.layers)
            for slot in layer.state_slots(context)
        )

    def advance(self, tokens: Tensor, position: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        x, new, at = self.embedded(tokens), [], 0
        place = place_of(self.frequency, self.amplitude, position, x)
        for layer, count in zip(self.layers, self.counts, strict=True):
            x, *present = layer.advance(x, place, *state[at : at + count])
            new += present
            at += count
        logits = last_logits(x, lambda h: ops.rms_norm(h, self.norm, self.config.eps), self.head_weight())
        return (logits, *new)

    def _decaying(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, Mixer) and hasattr(m, "A")]

    def parametrize(self) -> None:
        for mixer in self._decaying():
            register_parametrization(mixer, "A", NegativeExp())

    def unparametrize(self) -> None:
        for mixer in self._decaying():
            remove_parametrizations(mixer, "A")


def random_tensor(c: Any, name: str, shape: tuple[int, ...], rng: np.random.Generator) -> Array:
    """As for any stack; A [N,D] of a Mamba mixer is -(1..N), as published."""
    if name.endswith(".A") and len(shape) == 2:
        return np.repeat(-np.arange(1, shape[0] + 1, dtype=np.float32)[:, None], shape[1], axis=1)
    return stack.random_tensor(c, name, shape, rng)


def attention_layers(n_layers: int, chosen: Any, where: str) -> tuple[int, ...]:
    """A list of layer numbers from a config, checked: `where` names the field."""
    if chosen is None:
        return ()
    if not isinstance(chosen, list) or any(isinstance(i, bool) or not isinstance(i, int) for i in chosen):
        raise SourceError(f"config.json: {where} is {chosen!r:.60}, but must be a list of layer numbers")
    if any(not 0 <= i < n_layers for i in chosen) or len(set(chosen)) != len(chosen):
        raise SourceError(f"config.json: {where} is {chosen!r:.60}, but the layers are 0 to {n_layers - 1}, each once")
    return tuple(sorted(chosen))


def layer_kinds(r: ConfigReader, n_layers: int, known: Mapping[str, int]) -> tuple[int, ...]:
    """What `known` says of the kind of each layer in `layer_types` (also spelled `layers_block_type`).

    Where the field is absent, every layer is of the first kind.
    """
    field = "layer_types" if r.get("layer_types") is not None else "layers_block_type"
    kinds = r.get(field)
    kinds = [next(iter(known))] * n_layers if kinds is None else kinds
    if not isinstance(kinds, list) or len(kinds) != n_layers:
        raise SourceError(f"config.json: {field} is {kinds!r:.60}, but must name the kinds of {n_layers} layers")
    for kind in kinds:
        if not isinstance(kind, str) or kind not in known:
            raise SourceError(f"config.json: {field} has {kind!r:.40}, but the kinds are {', '.join(known)}")
    return tuple(known[kind] for kind in kinds)


def mlp_tensors(d_model: int, d_ff: int, theirs: str, bias: bool = False) -> dict[str, StoredTensor]:
    """Names of a `GatedMLP` -> where they are stored, below the prefix `theirs` (ends in a dot)."""
    shapes = {"gate_proj": (d_ff, d_model), "up_proj": (d_ff, d_model), "down_proj": (d_model, d_ff)}
    names = {f"{name}.weight": StoredTensor(f"{theirs}{name}.weight", shape) for name, shape in shapes.items()}
    if bias:
        names |= {f"{name}.bias": StoredTensor(f"{theirs}{name}.bias", shape[:1]) for name, shape in shapes.items()}
    return names


def below(ours: str, names: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """The same names with a prefix (ends in a dot)."""
    return {f"{ours}{name}": stored for name, stored in names.items()}


def scaled(stored: StoredTensor, factor: float | Array) -> StoredTensor:
    """The tensor times a number, or its rows times an array; what follows linearly from a weight is scaled with it."""

    def convert(x: Array) -> Array:
        rows = np.asarray(factor, np.float32)
        return stored.convert(x) * (rows if rows.ndim == 0 else rows.reshape(-1, *[1] * (x.ndim - 1)))

    return stored if np.all(np.asarray(factor) == 1.0) else replace(stored, convert=convert)


def ssd_from_hf(
    r: ConfigReader, d_model: int, eps: float, norm: GateNorm, d_inner: int | None = None, out_bias: bool | None = None
) -> SSDConfig:
    """The Mamba-2 mixer of a config.json with `mamba_*` fields (Bamba, Falcon-H1, Granite 4).

    d_inner: the inner width where `mamba_expand` times the width does not give it; out_bias as in `SSDConfig`.
    """
    heads = r.positive("mamba_n_heads", default=128)
    inner = r.positive("mamba_expand", default=2) * d_model if d_inner is None else d_inner
    auto = r.get("mamba_d_head") in (None, "auto")
    width = inner // heads if auto else r.positive("mamba_d_head")
    if heads * width != inner:
        raise SourceError(f"config.json: mamba_n_heads {heads} times mamba_d_head {width} is not the width of {inner}")
    dt_min, dt_max = r.interval("time_step_limit", 0.0, math.inf)
    return SSDConfig(
        d_model=d_model,
        n_heads=heads,
        head_dim=width,
        d_state=r.positive("mamba_d_state", default=256),
        n_groups=r.positive("mamba_n_groups", default=1),
        d_conv=r.positive("mamba_d_conv", default=4, least=2),
        dt_min=dt_min,
        dt_max=None if dt_max == math.inf else dt_max,
        norm=norm,
        eps=eps,
        proj_bias=r.flag("mamba_proj_bias", False),
        conv_bias=r.flag("mamba_conv_bias", True),
        out_bias=out_bias,
    )
