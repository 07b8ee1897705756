"""Hybrids of odd sizes."""

from __future__ import annotations

from edgeseq.models.bamba import BambaConfig
from edgeseq.models.hybrid_attention import AttentionConfig
from edgeseq.models.mamba2 import SSDConfig
from edgeseq.models.transformer import RopeConfig

LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 16)
HYBRIDS = {
    "bamba-odd": BambaConfig(
        61, 36, 3, (1,), AttentionConfig(36, 6, 2, 10, bias=True),
        SSDConfig(36, 6, 7, 5, n_groups=3, d_conv=3, dt_min=0.01, dt_max=0.4, proj_bias=True, conv_bias=False),
        40, 4, mlp_bias=True, rope=LLAMA3,
    ),
}  # fmt: skip
