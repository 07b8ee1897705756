"""TIR kernels, one file per op: a frozen dataclass of parameters and `build(name, params) -> Built`."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Built:
    """A kernel's PrimFunc `void k(pointers…, int32 block)` and the number of blocks."""

    func: Any
    grid: int
