"""Hybrids of odd sizes."""

from __future__ import annotations

from edgeseq.models.bamba import BambaConfig
from edgeseq.models.falcon_h1 import FalconH1Config, Multipliers
from edgeseq.models.gated_delta_net import DeltaConfig
from edgeseq.models.granite_hybrid import GraniteHybridConfig
from edgeseq.models.hybrid_attention import AttentionConfig
from edgeseq.models.jamba import JambaConfig
from edgeseq.models.mamba import MambaShape
from edgeseq.models.mamba2 import SSDConfig
from edgeseq.models.moe import MoeConfig
from edgeseq.models.qwen3_next import Qwen3NextConfig
from edgeseq.models.rope import RopeConfig
from edgeseq.models.samba import SambaConfig
from edgeseq.models.zamba2 import Zamba2Config

LLAMA3 = RopeConfig(5e5, "llama3", 8.0, 1.0, 4.0, 16, share=0.4)
YARN = RopeConfig(kind="yarn", factor=4.0, original_context=16, attention_factor=1.2, share=0.4)
HYBRIDS = {
    "bamba-odd": BambaConfig(
        61, 36, 3, (1,), AttentionConfig(36, 6, 2, 10, bias=True),
        SSDConfig(36, 6, 7, 5, n_groups=3, d_conv=3, dt_min=0.01, dt_max=0.4, proj_bias=True, conv_bias=False),
        40, mlp_bias=True, rope=LLAMA3,
    ),
    "falcon-h1-odd": FalconH1Config(
        53, 30, 2, AttentionConfig(30, 3, 3, 6), SSDConfig(30, 4, 9, 5, n_groups=2, norm="norm_first", out_bias=True),
        22, rope=RopeConfig(1e11), multipliers=Multipliers(embedding=1.7),
    ),
    "granite-hybrid-odd": GraniteHybridConfig(
        53, 30, 3, (0,), AttentionConfig(30, 6, 2, 10, scale=0.3), SSDConfig(30, 4, 9, 5, n_groups=2), 22,
        MoeConfig(5, 2, 7, d_shared=22), tie=False, embed_scale=1.7,
    ),
    "jamba-odd": JambaConfig(
        53, 30, 3, (1,), (0, 2), AttentionConfig(30, 6, 2, 5),
        MambaShape(30, 44, 5, d_conv=3, dt_rank=3, proj_bias=True), 11, n_experts=5, top_k=3,
    ),
    "qwen3-next-odd": Qwen3NextConfig(
        53, 30, 3, (1,), (2,), AttentionConfig(30, 6, 2, 10, bias=True),
        DeltaConfig(30, 2, 6, 7, 5, d_conv=3, eps=1e-2),  # a small eps would amplify rounding in narrow heads
        MoeConfig(5, 2, 11, d_shared=7, shared_gate=True), 22, eps=1e-2, rope=YARN,
    ),
    "samba-odd": SambaConfig(
        53, 30, 3, (0, 2), AttentionConfig(30, 6, 2, 10, bias=True, window=5),
        MambaShape(30, 44, 5, d_conv=3, dt_rank=3, proj_bias=True), 22, theta=100.0,
    ),
    "zamba2-odd": Zamba2Config(
        53, 30, 4, (0, 2, 3), AttentionConfig(30, 3, 3, 20, scale=0.3, d_in=60),
        SSDConfig(30, 4, 9, 5, n_groups=2, dt_min=0.02, proj_bias=True), 22, n_blocks=2, rank=3, linear_bias=True,
    ),
}  # fmt: skip
