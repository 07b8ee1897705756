"""y[T,K] = W[token[t], :] from a `rows16` packed table [ceil(M/16)][K][16], the one the output head reads too."""

from __future__ import annotations

from dataclasses import dataclass

from ..tvm_api import T
from . import Built
from ._emit import LANES, kernel, let


@dataclass(frozen=True)
class Embed:
    """M rows of K; the caller has checked 0 <= token < M."""

    T: int
    M: int
    K: int
    wdtype: str = "float32"
    args = ("tokens", "w", "y")


def build(name: str, p: Embed) -> Built:
    groups = -(-p.M // LANES)
    storage = "uint16" if p.wdtype == "bfloat16" else p.wdtype
    params = [("tokens", "int64", p.T), ("w", storage, groups * p.K * LANES), ("y", "float32", p.T * p.K)]
    with kernel(name, params) as k:
        row = let(T.Cast("int32", k["tokens"][k.block]))
        base = let((row // LANES) * (p.K * LANES) + row % LANES)
        with T.serial(p.K) as i:
            raw = k["w"][base + i * LANES]
            if p.wdtype == "bfloat16":
                raw = T.reinterpret("float32", T.Cast("uint32", raw) << T.uint32(16))
            elif p.wdtype == "float16":
                raw = T.Cast("float32", raw)
            T.buffer_store(k["y"], raw, [k.block * p.K + i])
    return Built(k.func, p.T)
