"""Rotary angles from the integer position, exact at any depth and without a table.

A frequency f (radians per token) is held as the whole number F = round(f / (2 pi) * 2^36). The angle of position p is
(p F mod 2^36) * 2 pi / 2^36: the product stays in 64 bits up to position 2^29, and only the remainder is rounded.
"""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor

from edgeseq.models.base import Array

TURN = 1 << 36


def turns(radians_per_token: Array) -> Array:
    """float64 [n] radians per token -> int64 [n] fractions of a turn per token, in units of 2^-36."""
    return np.rint(radians_per_token / (2.0 * math.pi) * TURN).astype(np.int64)


def angles(frequency: Tensor, position: Tensor, tokens: int) -> tuple[Tensor, Tensor]:
    """cos, sin [B,T,n] of positions position[b] + t: frequency [n] int64, position [B] int64."""
    index = position[:, None] + torch.arange(tokens, device=position.device)
    phase = torch.remainder(index[:, :, None] * frequency, TURN)
    angle = phase.to(torch.float32) * (2.0 * math.pi / TURN)
    return torch.cos(angle), torch.sin(angle)
