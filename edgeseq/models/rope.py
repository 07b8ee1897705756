"""Rotary frequencies (Su et al. 2021) and the ways to stretch them over a longer context, as config.json names them.

  default   f_i = theta^(-2i/r), i = 0 .. r/2-1, for the r channels of a head that turn
  linear    f_i / factor                                                         (Chen et al. 2023)
  llama3    long waves are divided by factor, short ones kept, between them blended         (Llama 3.1)
  yarn      as llama3 with a ramp over i, and cos, sin times an attention factor (Peng et al. 2023)
  longrope  f_i / stretch_i, and the attention factor                            (Ding et al. 2024)
  dynamic   default up to the length the model was trained on

`longrope` and `dynamic` choose other frequencies for a longer sequence, for all of its tokens. Keys that are cached
already cannot follow, so such a model reads no sequence beyond the length up to which its frequencies stay.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeseq.errors import SourceError
from edgeseq.models import rotary
from edgeseq.models.base import Array
from edgeseq.models.hf import ConfigReader

KINDS = ("default", "linear", "llama3", "yarn", "longrope", "dynamic")


@dataclass(frozen=True)
class RopeConfig:
    """Rotary frequencies.

    factor, low_freq_factor, high_freq_factor, original_context: of llama3; factor alone of linear.
    attention_factor: what cos and sin are multiplied by.
    beta_fast, beta_slow: rotations within original_context that bound yarn's ramp; truncate: to whole channels.
    stretches: divisors of each frequency (longrope).
    share:     part of a head's channels that turn, the first ones.
    """

    theta: float = 10000.0
    kind: str = "default"
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_context: int = 8192
    attention_factor: float = 1.0
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True
    stretches: tuple[float, ...] = ()
    share: float = 1.0

    def turned(self, head_dim: int) -> int:
        """Channels of a head that turn, an even number."""
        return int(head_dim * self.share)

    def radians(self, width: int) -> Array:
        """Radians per token of the width/2 pairs of `width` channels that turn, float64."""
        frequency = self.theta ** (-np.arange(0, width, 2, dtype=np.float64) / width)
        if self.kind == "linear":
            return frequency / self.factor
        if self.kind == "llama3":
            # Waves shorter than context/high keep their frequency, longer than context/low are slowed down.
            waves = self.original_context * frequency / (2.0 * math.pi)
            keep = np.clip((waves - self.low_freq_factor) / (self.high_freq_factor - self.low_freq_factor), 0.0, 1.0)
            return frequency * (keep + (1.0 - keep) / self.factor)
        if self.kind == "yarn":
            keep = 1.0 - self._ramp(width)
            return frequency * (keep + (1.0 - keep) / self.factor)
        if self.kind == "longrope":
            return frequency / np.asarray(self.stretches, np.float64)
        return frequency

    def _ramp(self, width: int) -> Array:
        """0 for the pairs that keep their frequency, 1 for those that are slowed down (Peng et al. 2023, eq. 13)."""

        def pair(rotations: float) -> float:
            """The pair that turns so often within the original context."""
            return width * math.log(self.original_context / (rotations * 2.0 * math.pi)) / (2.0 * math.log(self.theta))

        low, high = pair(self.beta_fast), pair(self.beta_slow)
        if self.truncate:
            low, high = math.floor(low), math.ceil(high)
        low, high = max(low, 0), min(high, width - 1)
        return np.clip((np.arange(width // 2) - low) / ((high - low) or 0.001), 0.0, 1.0)

    def frequencies(self, head_dim: int) -> Array:
        """int64 [e/2] fractions of a turn per token (`rotary.turns`); the pairs (i, i + e/2) beyond `turned` stand."""
        turned = self.turned(head_dim)
        return np.concatenate([rotary.turns(self.radians(turned)), np.zeros((head_dim - turned) // 2, np.int64)])

    def amplitudes(self, head_dim: int) -> Array:
        """float32 [e/2]: what cos and sin of each pair are multiplied by."""
        turned = self.turned(head_dim)
        return np.where(np.arange(head_dim // 2) < turned // 2, self.attention_factor, 1.0).astype(np.float32)


def channel_order(head_dim: int, turned: int) -> Array:
    """Which stored channel of a head comes where, so that its pairs (i, i + turned/2) become (i, i + e/2): int64 [e].

    Queries and keys are put in one order, which leaves every score as it is.
    """
    half, rest = turned // 2, (head_dim - turned) // 2
    parts = ((0, half), (turned, rest), (half, half), (turned + rest, rest))
    return np.concatenate([np.arange(start, start + count) for start, count in parts])


def reordered(heads: int, order: Array) -> Callable[[Array], Array]:
    """Rows (or elements) of `heads` equal parts, each in this order."""

    def rows(x: Array) -> Array:
        parts = x.reshape(heads, len(order), *x.shape[1:])[:, order]
        return np.ascontiguousarray(parts.reshape(x.shape))

    return rows


def rope_from_hf(r: ConfigReader) -> RopeConfig:
    """Frequencies of a config.json for a family that turns whole heads and knows no attention factor."""
    for reader in _readers(r):
        reader.only("partial_rotary_factor", 1.0, 1)
    _inner(r).only(_type_field(r), "default", "linear", "llama3")
    return any_rope_from_hf(r, 2)[0]


def any_rope_from_hf(r: ConfigReader, head_dim: int) -> tuple[RopeConfig, int | None]:
    """Frequencies of a config.json, whatever version of transformers wrote it, and the longest sequence they hold for.

    rope_parameters (transformers 5), or rope_theta, partial_rotary_factor and rope_scaling. Raises SourceError.
    """
    p, field = _inner(r), _type_field(r)
    p.only(field, *KINDS)
    kind = p.get(field) or "default"
    common: dict[str, Any] = {
        "theta": p.number("rope_theta", r.number("rope_theta", 10000.0)),
        "kind": kind,
        "share": p.number("partial_rotary_factor", r.number("partial_rotary_factor", 1.0)),
    }
    turned = int(head_dim * common["share"])
    if turned != head_dim and (not 2 <= turned < head_dim or turned % 2):
        raise SourceError(f"config.json: {turned} of {head_dim} channels of a head cannot be rotated in pairs")
    if kind == "default":
        return RopeConfig(**common), None
    if kind == "dynamic":
        p.number("factor")
        return RopeConfig(**common | {"kind": "default"}), r.positive("max_position_embeddings")
    if kind == "linear":
        return RopeConfig(**common, factor=p.number("factor")), None
    if kind == "llama3":
        return _llama3(r, p, common), None
    return (_yarn(r, p, common), None) if kind == "yarn" else _longrope(r, p, common, turned)


def _llama3(r: ConfigReader, p: ConfigReader, common: dict[str, Any]) -> RopeConfig:
    low, high = p.number("low_freq_factor"), p.number("high_freq_factor")
    if low >= high:
        raise SourceError(f"config.json: {p.prefix}low_freq_factor {low} is not below high_freq_factor {high}")
    return RopeConfig(
        **common, factor=p.number("factor"), low_freq_factor=low, high_freq_factor=high,
        original_context=p.positive("original_max_position_embeddings"),
    )  # fmt: skip


def _yarn(r: ConfigReader, p: ConfigReader, common: dict[str, Any]) -> RopeConfig:
    context, factor = _stretch(r, p)

    def magnitude(weight: float) -> float:
        return 0.1 * weight * math.log(factor) + 1.0 if factor > 1.0 else 1.0

    whole = p.get("mscale") and p.get("mscale_all_dim")
    implied = magnitude(p.number("mscale")) / magnitude(p.number("mscale_all_dim")) if whole else magnitude(1.0)
    fast, slow = p.number("beta_fast", 32.0), p.number("beta_slow", 1.0)
    if slow >= fast:
        raise SourceError(f"config.json: {p.prefix}beta_slow {slow} is not below beta_fast {fast}")
    if common["theta"] <= 1.0:
        raise SourceError(f"config.json: with a rope_theta of {common['theta']} no wave is longer than another")
    return RopeConfig(
        **common, factor=factor, original_context=context, beta_fast=fast, beta_slow=slow,
        truncate=p.flag("truncate", True), attention_factor=p.number("attention_factor", implied),
    )  # fmt: skip


def _longrope(r: ConfigReader, p: ConfigReader, common: dict[str, Any], turned: int) -> tuple[RopeConfig, int]:
    context, factor = _stretch(r, p)
    implied = math.sqrt(1.0 + math.log(factor) / math.log(context)) if factor > 1.0 and context > 1 else 1.0
    stretches = p.get("short_factor")
    if (
        not isinstance(stretches, list)
        or len(stretches) != turned // 2
        or not all(isinstance(s, int | float) and not isinstance(s, bool) and 0 < s < math.inf for s in stretches)
    ):
        raise SourceError(f"config.json: {p.prefix}short_factor is not a list of {turned // 2} positive numbers")
    rope = RopeConfig(
        **common, factor=factor, original_context=context, stretches=tuple(map(float, stretches)),
        attention_factor=p.number("attention_factor", implied),
    )  # fmt: skip
    return rope, context


def _stretch(r: ConfigReader, p: ConfigReader) -> tuple[int, float]:
    """The length the model was first trained on, and by how much it was stretched.

    Phi-3 writes the length beside the rotary fields, and there it counts.
    """
    own = p.get("original_max_position_embeddings")
    outer = r if r.get("original_max_position_embeddings") is not None else p
    implied = (own is None and outer is p) or p.get("factor") is None
    largest = r.positive("max_position_embeddings") if implied else None
    context = outer.positive("original_max_position_embeddings", default=largest)
    return context, p.number("factor", (largest or context) / context)


def _inner(r: ConfigReader) -> ConfigReader:
    nested = "rope_parameters" if r.get("rope_parameters") is not None else "rope_scaling"
    return ConfigReader(r.get(nested) or {}, prefix=f"{nested}.")


def _readers(r: ConfigReader) -> tuple[ConfigReader, ConfigReader]:
    return r, _inner(r)


def _type_field(r: ConfigReader) -> str:
    return "rope_type" if _inner(r).get("rope_type") is not None else "type"
