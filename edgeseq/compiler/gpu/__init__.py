"""GPU kernels in TIR, one file per op, for the parameters of `kernels/<op>.py`: same arguments, same packed weights.

Each file has `build(name, params, gpu) -> Built`. OpenCL and CUDA share the text; the few things that differ are
functions of `source.py`'s preambles (es_dp4a, es_half, es_shuffle).
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Built:
    """A kernel's PrimFunc with launch extents inside, the number of thread blocks and threads of a block."""

    func: Any
    grid: int
    threads: int
