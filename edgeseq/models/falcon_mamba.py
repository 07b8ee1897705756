"""FalconMamba (Zuo et al. 2024, arXiv 2410.05355, section 2): Mamba whose dt, B and C are normed inside the mixer.

Letters and state as in `mamba.py`. One layer differs in
  dt,B,C = split(W_x u);  each divided by its root mean square, without a weight
  dt     = softplus(W_dt dt + b_dt)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from torch import Tensor

from edgeseq.models import mamba
from edgeseq.models.base import Checkpoint, Family
from edgeseq.models.hf import ConfigReader
from edgeseq.models.mamba import Mamba, MambaConfig, MambaLayer, Norm


@dataclass(frozen=True)
class FalconMambaConfig(MambaConfig):
    """A Mamba's shape, and the constant under the roots of the mixer's norms."""

    mixer_eps: float = 1e-6


class FalconMambaLayer(MambaLayer):
    """Mamba's layer with the three norms."""

    def __init__(self, c: FalconMambaConfig) -> None:
        super().__init__(c)
        self.mixer_eps = c.mixer_eps

    def split_x(self, u: Tensor, norm: Norm) -> tuple[Tensor, Tensor, Tensor]:
        r, n = self.c.dt_rank, self.c.d_state
        x = self.x_proj(u)
        dt, b, c = (norm(part, None, self.mixer_eps) for part in (x[..., :r], x[..., r : r + n], x[..., r + n :]))
        return self.dt_proj(dt), b, c


class FalconMamba(Mamba):
    """Forms and state as in `Mamba`."""

    layer_type: ClassVar[type[MambaLayer]] = FalconMambaLayer


def config_from_hf(raw: Mapping[str, Any]) -> FalconMambaConfig:
    """config.json of `FalconMambaForCausalLM`."""
    whole = mamba.config_from_hf(raw)
    eps = ConfigReader(raw).number("mixer_rms_eps", 1e-6)
    return FalconMambaConfig(**{f.name: getattr(whole, f.name) for f in fields(whole)}, mixer_eps=eps)


FAMILY = Family(
    name="falcon-mamba",
    config=FalconMambaConfig,
    model=FalconMamba,
    checkpoint=Checkpoint(model_types=("falcon_mamba",), config=config_from_hf, tensors=mamba.hf_tensors),
    zoo={"falcon-mamba-7b": FalconMambaConfig(65024, 4096, 64, 8192, dt_rank=256, tie=False)},
    tiny=FalconMambaConfig(256, 128, 6, 256, d_state=8, dt_rank=8),
    state_formula="4 L D (N + k - 1)",
    growth="constant",
    ops=("causal_conv", "selective_scan"),
    random_tensor=mamba.random_tensor,
)
