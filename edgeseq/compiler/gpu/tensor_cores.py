"""Products of several tokens with 16-bit weights, given to tensor cores: `linear` becomes `halves` and `linear_mma`."""

from __future__ import annotations

from typing import Any

from edgeseq.spec import DTYPE_BYTES

from ..ir import Arg, Call, KernelRef, Storage, Value
from ..kernels.linear import Linear
from .halves import PARTS, Halves, sizes
from .linear import fields_of
from .linear_mma import LinearMma


def to_tensor_cores(calls: list[Call]) -> None:
    """In place. Products that read the same activations share their halves."""
    made: dict[tuple[Any, ...], tuple[Arg, Arg]] = {}
    found: list[Call] = []
    for call in calls:
        p = call.kernel.params if isinstance(call.kernel, KernelRef) else None
        if type(p) is Linear and p.T > 1 and p.wdtype in PARTS:
            x, *others = call.args
            key = (x.value.storage, x.value.offset, p.T, p.K, p.ldx, p.wdtype)
            if key not in made:
                made[key] = _outputs(x.value, p)
                args = (x, *(Arg(a.value, "w") for a in made[key]))
                halves = KernelRef("halves", Halves(p.T, p.K, p.ldx, p.wdtype))
                found.append(Call(halves, args, call.outputs_only))
            call.kernel = KernelRef("linear_mma", LinearMma(**fields_of(p) | {"ldx": p.K}))
            call.args = (*made[key], *others)
        found.append(call)
        written = {a.value.storage for a in call.args if a.access != "r"}
        made = {key: value for key, value in made.items() if key[0] not in written}
    calls[:] = found


def _outputs(x: Value, p: Linear) -> tuple[Arg, Arg]:
    shapes = sizes(p.T, p.K, p.wdtype)
    words, scales = 4 * shapes["h"][1], shapes["scale"][1]
    h, scale = (
        Value(f"{x.name}.{name}", dtype, (n,), Storage("arena", f"{x.name}.{name}", n * DTYPE_BYTES[dtype]))
        for name, dtype, n in (("halves", "int32", words), ("factors", "float32", scales))
    )
    return Arg(h, "r"), Arg(scale, "r")
