"""Fewer launches of one token: norms into the products that read them, a convolution and a scan's step sizes likewise.

At one token a launch costs a GPU about as long as reading a megabyte, and these have next to nothing to do.
"""

from __future__ import annotations

from dataclasses import asdict

from ..ir import Arg, Call, KernelRef, Value
from ..kernels.causal_conv import CausalConv
from ..kernels.linear import Linear
from ..kernels.rms_norm import RmsNorm
from ..kernels.selective_scan import SelectiveScan
from .linear import FusedLinear
from .selective_scan import FusedScan

MOST_RANK = 256


def merge(calls: list[Call]) -> None:
    """Merge what can be, in place."""
    for call in list(calls):
        if isinstance(call.kernel, KernelRef) and call in calls:
            params = call.kernel.params
            if isinstance(params, RmsNorm):
                _norm(calls, call, params)
            elif type(params) is SelectiveScan and params.T == 1:
                _step_sizes(calls, call, params)
    for call in list(calls):
        if isinstance(call.kernel, KernelRef) and isinstance(call.kernel.params, CausalConv):
            _conv(calls, call, call.kernel.params)


def _readers(calls: list[Call], value: Value) -> list[Call]:
    """Calls that look into the memory of `value`, its writer aside."""
    return [c for c in calls if any(a.value.storage is value.storage and a.access != "w" for a in c.args)]


def _own(value: Value) -> bool:
    """Only the calls of this graph see it."""
    return value.storage.kind == "arena"


def _argument(call: Call, name: str) -> Arg:
    return call.args[call.kernel.params.args.index(name)]


def _products(calls: list[Call], value: Value, width: int) -> list[Call] | None:
    """The readers of `value`, when each is a product of one token with exactly these elements for its input."""
    found = _readers(calls, value)
    for call in found:
        p = call.kernel.params if isinstance(call.kernel, KernelRef) else None
        if not isinstance(p, Linear) or p.T != 1 or p.K != width:
            return None
        places = [a.value for a in call.args if a.value.storage is value.storage]
        if len(places) != 1 or _argument(call, "x").value is not places[0] or places[0].offset != value.offset:
            return None
    return found


def _norm(calls: list[Call], call: Call, p: RmsNorm) -> None:
    y, x = call.args[-1].value, call.args[0]
    if p.R != 1 or p.quant is not None or not _own(y) or not _own(x.value):
        return
    products = _products(calls, y, p.D)
    if not products or any(isinstance(c.kernel.params, FusedLinear) and c.kernel.params.norm for c in products):
        return
    for product in products:
        old = product.kernel.params
        base = asdict(old)
        fused = FusedLinear(**base | {"norm": True, "norm_weight": p.weight, "eps": p.eps})
        named = dict(zip(old.args, product.args, strict=True)) | {"x": x}
        if p.weight:
            named["norm_w"] = call.args[1]
        product.kernel = KernelRef("linear", fused)
        product.args = tuple(named[a] for a in fused.args)
    calls.remove(call)


def _step_sizes(calls: list[Call], scan: Call, p: SelectiveScan) -> None:
    dt = _argument(scan, "dt").value
    writers = [c for c in calls if any(a.value.storage is dt.storage and a.access != "r" for a in c.args)]
    if not _own(dt) or len(writers) != 1 or _readers(calls, dt) != [scan]:
        return
    (product,) = writers
    q = product.kernel.params if isinstance(product.kernel, KernelRef) else None
    if type(q) is not Linear or q.M != p.D or q.K > MOST_RANK or q.bias or q.residual or q.act != "none":
        return
    if q.wdtype not in ("float32", "float16", "bfloat16"):
        return
    fused = FusedScan(**asdict(p), dt_rank=q.K, dt_wdtype=q.wdtype)
    named = dict(zip(p.args, scan.args, strict=True))
    named |= {"dt_r": _argument(product, "x"), "dt_w": _argument(product, "w")}
    scan.kernel = KernelRef("selective_scan", fused)
    scan.args = tuple(named[a] for a in fused.args)
    calls.remove(product)


def _conv(calls: list[Call], conv: Call, p: CausalConv) -> None:
    x = _argument(conv, "x").value
    if p.T != 1 or p.quant is not None or not _own(x):
        return
    writers = [c for c in calls if any(a.value.storage is x.storage and a.access != "r" for a in c.args)]
    product = writers[0] if len(writers) == 1 else None
    q = product.kernel.params if product is not None and isinstance(product.kernel, KernelRef) else None
    if product is None or not isinstance(q, Linear) or q.T != 1 or q.residual or q.act != "none":
        return
    if isinstance(q, FusedLinear) and q.conv:
        return
    y = _argument(product, "y").value
    at = x.offset - y.offset
    if not 0 <= at <= q.M - p.C:
        return
    between = calls[calls.index(product) + 1 : calls.index(conv)]
    state = _argument(conv, "past").value.storage
    if any(a.value.storage is state for c in between for a in c.args):
        return
    fused = FusedLinear(
        **asdict(q) | {"conv": p.k, "conv_at": at, "conv_C": p.C, "conv_bias": p.bias, "conv_silu": p.silu}
    )
    mine = dict(zip(p.args, conv.args, strict=True))
    named = dict(zip(q.args, product.args, strict=True))
    named |= {"conv_w": mine["w"], "past": mine["past"], "yc": mine["y"]}
    if p.bias:
        named["conv_b"] = mine["bias"]
    product.kernel = KernelRef("linear", fused)
    product.args = tuple(named[a] for a in fused.args)
    product.traffic = _traffic(product, conv)
    calls.remove(conv)


def _traffic(product: Call, conv: Call) -> dict[str, int]:
    """Bytes stated for either of two calls that became one."""
    return {k: product.traffic.get(k, 0) + conv.traffic.get(k, 0) for k in {*product.traffic, *conv.traffic}}
