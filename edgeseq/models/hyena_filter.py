"""Hyena's config, and the network behind its long filters (glossary and formulas in `hyena.py`)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from edgeseq.errors import SourceError

SLOW, FAST = math.log(100) / 1.5, math.log(100) / 0.3  # decay at the horizon: to a hundredth after 1.5 or 0.3 of it


@dataclass(frozen=True)
class HyenaConfig:
    """Shape of a Hyena; `horizon` is R, `filter_bands` (E - 1) / 2, `tie` shares embedding and head.

    frequency: of the sines at the start: the smaller, the smoother the filters.

    modal: modes of each layer's distilled filters, 0 for an exact layer; empty: all are exact.
    reach: taps that are kept where fewer than the horizon can matter; 0 keeps all.
    """

    vocab_size: int
    d_model: int
    n_layers: int
    d_ff: int
    horizon: int
    order: int = 2
    d_conv: int = 3
    filter_width: int = 64
    filter_bands: int = 2
    frequency: float = 10.0
    modal: tuple[int, ...] = ()
    eps: float = 1e-6
    tie: bool = True
    layout: Literal["paper", "hyenadna"] = "paper"
    reach: int = 0

    def __post_init__(self) -> None:
        object.__setattr__(self, "modal", tuple(self.modal))  # a list when it comes from a manifest
        if self.order < 2:
            raise SourceError(f"A Hyena of order {self.order} has no long filter", "give an order of at least 2")
        if self.horizon < 1 or self.d_conv < 2 or self.filter_bands < 1:
            raise SourceError("A Hyena needs a horizon and a band of at least 1 and a short filter of at least 2")
        if self.modal and (len(self.modal) != self.n_layers or min(self.modal) < 0):
            raise SourceError(f"A Hyena of {self.n_layers} layers cannot have the modes {list(self.modal)}")

    @property
    def kept(self) -> int:
        """Taps of every exact filter."""
        return min(self.reach or self.horizon, self.horizon)

    @property
    def modes(self) -> tuple[int, ...]:
        """Modes of every layer, 0 for an exact one."""
        return self.modal or (0,) * self.n_layers


class ImplicitFilter(nn.Module):
    """The network behind all long filters of a layer: filter j of channel c is its output j d + c."""

    def __init__(self, c: HyenaConfig) -> None:
        super().__init__()
        width = c.filter_width
        self.first = nn.Linear(1 + 2 * c.filter_bands, width)
        self.second = nn.Linear(width, width)
        self.third = nn.Linear(width, width)
        self.last = nn.Linear(width, (c.order - 1) * c.d_model, bias=False)
        self.frequency = nn.Parameter(torch.ones(width))
        if c.layout == "hyenadna":
            self.time = nn.Parameter(torch.empty(c.horizon, 1 + 2 * c.filter_bands))
            self.delta = nn.Parameter(torch.empty((c.order - 1) * c.d_model))


def parts_of(c: HyenaConfig) -> tuple[str, ...]:
    """Names of the parameters of a layer's filter network."""
    layers = [f"{layer}.{part}" for layer in ("first", "second", "third") for part in ("weight", "bias")]
    return (*layers, "last.weight", "frequency", *(("time", "delta") if c.layout == "hyenadna" else ()))


def taps(c: HyenaConfig, count: int, *parts: Tensor) -> Tensor:
    """The first `count` taps of a layer's filters, float32 [o-1,count,d], in double on the way. parts: of parts_of."""
    p = dict(zip(parts_of(c), (x.double() for x in parts), strict=True))
    u = torch.arange(count, dtype=torch.float64, device=p["frequency"].device)[:, None] / max(c.horizon - 1, 1)
    x, delta, shift = (p["time"][:count], p["delta"].abs(), 0.05) if "time" in p else (*timed(c, u), 0.0)
    for layer in ("first", "second", "third"):
        x = torch.sin(p["frequency"] * nn.functional.linear(x, p[f"{layer}.weight"], p[f"{layer}.bias"]))
    filters = nn.functional.linear(x, p["last.weight"]) * (torch.exp(-u * delta) + shift)
    return filters.float().unflatten(1, (c.order - 1, c.d_model)).transpose(0, 1)


def timed(c: HyenaConfig, u: Tensor) -> tuple[Tensor, Tensor]:
    """e [count,E] and delta [(o-1) d] as the formulas have them; u [count,1]."""
    bands = torch.linspace(1e-4, c.filter_bands - 1, c.filter_bands, dtype=u.dtype, device=u.device)
    angle = 2 * math.pi * max(c.horizon - 1, 1) / c.horizon * u * bands
    delta = torch.linspace(SLOW, FAST, (c.order - 1) * c.d_model, dtype=u.dtype, device=u.device)
    return torch.cat([u, torch.cos(angle), -torch.sin(angle)], 1), delta
