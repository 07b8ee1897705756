"""The matched KV-cached attention model of a recurrent one: same width, vocabulary and tying, parameters within 2 %."""

from __future__ import annotations

from typing import Any

from edgeseq.errors import SourceError
from edgeseq.models import families, family
from edgeseq.models.base import Family
from edgeseq.models.transformer import TransformerConfig

WITHIN = 0.02


def family_of_config(config: Any) -> Family:
    """The family whose config class this is."""
    for candidate in families().values():
        if type(config) is candidate.config:
            return candidate
    raise SourceError(f"{type(config).__name__} is the config of no family, so it has no twin")


def head_shape(d_model: int) -> tuple[int, int]:
    """(heads, head width): the even divisor of the width nearest to 64 (32 below a width of 512), else one head."""
    target = 64 if d_model >= 512 else 32
    even = [e for e in range(2, d_model + 1, 2) if d_model % e == 0]
    if not even:
        return 1, d_model + d_model % 2
    width = min(even, key=lambda e: (abs(e - target), -e))
    return d_model // width, width


def twin(config: Any) -> TransformerConfig:
    """The twin's config: layers of about 12 d^2 parameters (4 d^2 of attention, 8 d^2 of gated feed-forward).

    Raises SourceError for a transformer, which is its own rival, and where 2 % cannot be met.
    """
    if type(config) is TransformerConfig:
        raise SourceError("A transformer is KV-cached attention already, so it has no twin")
    target, d = family_of_config(config).param_count(config), config.d_model
    heads, width = head_shape(d)
    outside = config.vocab_size * d * (1 if config.tie else 2) + d
    attention = 4 * d * heads * width + 2 * d  # with the layer's two norms
    best = max(1, round((target - outside) / (12 * d * d)))
    for layers in sorted(range(1, 2 * best + 1), key=lambda n: abs(n - best)):
        d_ff = _round(((target - outside) / layers - attention) / (3 * d), target, layers * 3 * d)
        if d_ff < 1:
            continue
        made = TransformerConfig(config.vocab_size, d, layers, heads, heads, width, d_ff, tie=config.tie)
        if abs(family("transformer").param_count(made) - target) <= WITHIN * target:
            return made
    raise SourceError(f"No KV-cached attention model of width {d} has {target} parameters within {WITHIN:.0%}")


def _round(exact: float, target: int, unit: int) -> int:
    """The coarsest friendly multiple that costs at most half a percent of the parameters."""
    for multiple in (64, 32, 16, 8, 4):
        rounded = round(exact / multiple) * multiple
        if abs(rounded - exact) * unit <= 0.005 * target:
            return rounded
    return round(exact)
