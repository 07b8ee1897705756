"""Attention of a chunk of tokens (see kernels/attention_chunk): on a GPU the kernel of a step does it."""

from __future__ import annotations

from typing import Any

from ..kernels.attention_chunk import AttentionChunk
from ..kernels.cached_attention import CachedAttention
from . import Built, cached_attention


def build(name: str, p: AttentionChunk, gpu: Any) -> Built:
    sizes = (p.T, p.H, p.Hk, p.d, p.N, p.ldq, p.ldk, p.ldv, p.scale, p.ring)
    return cached_attention.build(name, CachedAttention(*sizes, prefix=p.prefix), gpu)
