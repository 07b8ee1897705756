"""Fewer launches of one token: norms into the products that read them, a convolution, a scan's step sizes and norms and
an attention's rotations likewise.

At one token a launch costs a GPU about as long as reading a megabyte, and these have next to nothing to do. Of many
tokens, products of 16-bit weights go to tensor cores.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from ..ir import Arg, Call, GenericRef, KernelRef, Value
from ..kernels._quantise import OUTPUTS
from ..kernels.cached_attention import CachedAttention
from ..kernels.causal_conv import CausalConv
from ..kernels.glu import Glu
from ..kernels.linear import Linear
from ..kernels.linear_q import LinearQ
from ..kernels.quantize import Quantize
from ..kernels.rms_norm import RmsNorm
from ..kernels.rotary import Rotary
from ..kernels.selective_scan import SelectiveScan
from .batch import Batch, Generics, build_part
from .cached_attention import FusedAttention
from .joined import MODULES, Joined
from .linear import FusedLinear, fields_of
from .linear_q import INPUTS, FusedLinearQ
from .quantize import Quantizes
from .selective_scan import FusedScan
from .tensor_cores import to_tensor_cores

MOST_RANK = 256
BATCHED = ("rotary", "causal_conv", "copy")  # beside products: kernels without barriers
REACH = 40  # calls looked at for company
MOST_PARTS = 8
MOST_ARGS = 64  # OpenCL promises a kernel 1 KB of them: a pointer and an offset each


def merge(calls: list[Call], gpu: Any) -> None:
    """Merge what can be, in place."""
    for call in list(calls):
        if isinstance(call.kernel, KernelRef) and call in calls:
            params = call.kernel.params
            if isinstance(params, RmsNorm):
                _norm(calls, call, params)
            elif type(params) is SelectiveScan and params.T == 1:
                _step_sizes(calls, call, params)
                _scan_norms(calls, call)
            elif type(params) is CachedAttention and params.T == 1:
                _rotations(calls, call, params)
    for call in list(calls):
        if isinstance(call.kernel, KernelRef) and isinstance(call.kernel.params, CausalConv):
            _conv(calls, call, call.kernel.params)
    for call in list(calls):
        if isinstance(call.kernel, KernelRef) and isinstance(call.kernel.params, Glu):
            _glu(calls, call, call.kernel.params)
    _batches(calls, gpu)
    if gpu.mma:
        to_tensor_cores(calls)


def _readers(calls: list[Call], value: Value) -> list[Call]:
    """Calls that look into the memory of `value`, its writer aside."""
    return [c for c in calls if any(a.value.storage is value.storage and a.access != "w" for a in c.args)]


def _writers(calls: list[Call], value: Value) -> list[Call]:
    """Calls that write into the memory of `value`."""
    return [c for c in calls if any(a.value.storage is value.storage and a.access != "r" for a in c.args)]


def _maker(calls: list[Call], value: Value) -> tuple[Call | None, Any]:
    """The only call that writes into the memory of `value`, where its kernel is one of ours, and that kernel's
    parameters; else None twice."""
    writers = _writers(calls, value)
    if len(writers) != 1 or not isinstance(writers[0].kernel, KernelRef):
        return None, None
    return writers[0], writers[0].kernel.params


def _named(call: Call) -> dict[str, Arg]:
    """The arguments of a call by the names its kernel has for them."""
    return dict(zip(call.kernel.params.args, call.args, strict=True))


def _become(call: Call, op: str, params: Any, named: dict[str, Arg]) -> None:
    """Give a call another kernel, and from `named` the arguments that it takes."""
    call.kernel = KernelRef(op, params)
    call.args = tuple(named[name] for name in params.args)


def _may_wait(calls: list[Call], call: Call, for_: Call) -> bool:
    """Whether `call` would read the same where `for_` stands: what it reads is not written in between."""
    reads = {a.value.storage for a in call.args if a.access != "w"}
    between = calls[calls.index(call) + 1 : calls.index(for_)]
    return not any(a.value.storage in reads for c in between for a in c.args if a.access != "r")


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
    if p.R != 1 or p.quant is not None or not _own(y):
        return
    products = _products(calls, y, p.D)
    if not products or not all(_may_wait(calls, call, c) for c in products):
        return
    if any(isinstance(c.kernel.params, FusedLinear) and c.kernel.params.norm for c in products):
        return
    for product in products:
        fused = FusedLinear(**fields_of(product.kernel.params) | {"norm": True, "norm_weight": p.weight, "eps": p.eps})
        named = _named(product) | {"x": x}
        if p.weight:
            named["norm_w"] = call.args[1]
        _become(product, "linear", fused, named)
    calls.remove(call)


def _step_sizes(calls: list[Call], scan: Call, p: SelectiveScan) -> None:
    dt = _argument(scan, "dt").value
    product, q = _maker(calls, dt)
    if product is None or not _own(dt) or _readers(calls, dt) != [scan]:
        return
    if type(q) is not Linear or q.M != p.D or q.K > MOST_RANK or q.bias or q.residual or q.act != "none":
        return
    if q.wdtype not in ("float32", "float16", "bfloat16") or not _may_wait(calls, product, scan):
        return
    fused = FusedScan(**fields_of(p), dt_rank=q.K, dt_wdtype=q.wdtype)
    dt_from = {"dt_r": _argument(product, "x"), "dt_w": _argument(product, "w")}
    _become(scan, "selective_scan", fused, _named(scan) | dt_from)
    calls.remove(product)


def _scan_norms(calls: list[Call], scan: Call) -> None:
    """Of a scan's B and C, as FalconMamba and Jamba have them."""
    p, named, norms = scan.kernel.params, _named(scan), []
    for name in ("B", "C"):
        value = named[name].value
        norm, r = _maker(calls, value)
        if norm is None or not isinstance(r, RmsNorm) or (r.R, r.D, r.quant) != (1, p.N, None) or not _own(value):
            return
        if _readers(calls, value) != [scan] or not _may_wait(calls, norm, scan):
            return
        norms.append(norm)
    first, second = (c.kernel.params for c in norms)
    if (first.eps, first.weight) != (second.eps, second.weight):
        return
    for name, norm in zip(("B", "C"), norms, strict=True):
        named[name] = norm.args[0]
        if first.weight:
            named[f"{name}_w"] = norm.args[1]
        calls.remove(norm)
    fused = FusedScan(**fields_of(p) | {"norm": True, "norm_weight": first.weight, "eps": first.eps})
    _become(scan, "selective_scan", fused, named)


def _rotations(calls: list[Call], attention: Call, p: CachedAttention) -> None:
    """Of a step's queries and its key, by the same angles."""
    named, turned = _named(attention), []
    for name, heads in (("query", p.H), ("k", p.Hk)):
        y = named[name].value
        turn, r = _maker(calls, y)
        if turn is None or not isinstance(r, Rotary) or (r.H, r.d) != (heads, p.d) or not _own(y):
            return
        if _readers(calls, y) != [attention] or _argument(turn, "y").value.offset != y.offset:
            return
        if not _may_wait(calls, turn, attention):
            return
        turned.append((turn, _named(turn)))
    (first, of_q), (second, of_k) = turned
    places = [[(n[a].value.storage, n[a].value.offset) for a in ("cos", "sin")] for n in (of_q, of_k)]
    if places[0] != places[1] or first.kernel.params.interleaved != second.kernel.params.interleaved:
        return
    fused = FusedAttention(**fields_of(p), interleaved=first.kernel.params.interleaved)
    named |= {"query": of_q["x"], "k": of_k["x"], "cos": of_q["cos"], "sin": of_q["sin"]}
    _become(attention, "cached_attention", fused, named)
    calls.remove(first)
    calls.remove(second)


def _conv(calls: list[Call], conv: Call, p: CausalConv) -> None:
    x = _argument(conv, "x").value
    if p.T != 1 or p.quant is not None or not _own(x):
        return
    product, q = _maker(calls, x)
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
        **fields_of(q) | {"conv": p.k, "conv_at": at, "conv_C": p.C, "conv_bias": p.bias, "conv_silu": p.silu}
    )
    mine = _named(conv)
    named = _named(product) | {"conv_w": mine["w"], "past": mine["past"], "yc": mine["y"]}
    if p.bias:
        named["conv_b"] = mine["bias"]
    _become(product, "linear", fused, named)
    calls.remove(conv)


def _glu(calls: list[Call], call: Call, p: Glu) -> None:
    """Both products and their gate."""
    g, u = _argument(call, "g").value, _argument(call, "u").value
    makers = [_sole_writer(calls, v) for v in (g, u)]
    if p.T != 1 or None in makers or makers[0] is makers[1] or not (_own(g) and _own(u)):
        return
    first, second = makers
    assert first is not None and second is not None
    a, b = _base(first.kernel.params), _base(second.kernel.params)
    if a is None or a != b or a.bias or a.residual or a.act != "none" or a.M != p.M:
        return
    if any(_readers(calls, v) != [call] for v in (g, u)) or _inputs(first) != _inputs(second):
        return
    if not all(_may_wait(calls, maker, call) for maker in (first, second)):
        return
    named, other = _named(first), _named(second)
    if isinstance(a, LinearQ):
        named |= {"wu": other["w"], "wus": other["ws"]}
        named |= {new: named[old] for new, old in zip(INPUTS, OUTPUTS, strict=True)}
        fused: Any = FusedLinearQ(**fields_of(a) | {"glu": True, "quant": p.quant})
    elif p.quant is None:
        named["wu"] = other["w"]
        fused = FusedLinear(**fields_of(a) | {"glu": True})
    else:
        return
    _become(call, first.kernel.op, fused, named | _named(call))
    call.traffic = {k: first.traffic.get(k, 0) + second.traffic.get(k, 0) for k in first.traffic}
    calls.remove(first)
    calls.remove(second)
    if isinstance(fused, FusedLinearQ) and fused.quant is None:
        _rounding(calls, call, fused)


def _rounding(calls: list[Call], call: Call, p: FusedLinearQ) -> None:
    """A gated product's own result as int8 blocks, when nobody reads it otherwise."""
    y = _argument(call, "y").value
    readers = _readers(calls, y)
    q = readers[0].kernel.params if len(readers) == 1 and isinstance(readers[0].kernel, KernelRef) else None
    if (
        not isinstance(q, Quantize)
        or (q.T, q.K) != (1, p.M)
        or not _own(y)
        or readers[0].args[0].value.offset != y.offset
    ):
        return
    named = _named(call)
    named |= {new: named[old] for new, old in zip(INPUTS, OUTPUTS, strict=True)}
    named |= dict(zip(OUTPUTS, readers[0].args[1:], strict=True))
    _become(call, "linear_q", FusedLinearQ(**fields_of(p) | {"quant": q.zero}), named)
    calls.remove(readers[0])


def _sole_writer(calls: list[Call], value: Value) -> Call | None:
    """The product that writes `value` from its first element on, and nothing else into its memory."""
    product, p = _maker(calls, value)
    if product is None or not isinstance(p, Linear | LinearQ) or p.T != 1 or p.args[-1] != "y":
        return None
    return product if product.args[-1].value.offset == value.offset else None


def _base(p: Any) -> Any:
    """A product's parameters, where nothing but a norm has been merged into it."""
    if isinstance(p, FusedLinear):
        return p if not (p.conv or p.glu) else None
    if isinstance(p, FusedLinearQ):
        return p if not p.glu else None
    return p if isinstance(p, Linear | LinearQ) else None


def _inputs(call: Call) -> list[tuple[Any, int]]:
    """What a product reads beside its weights and writes nowhere, as places in memory."""
    named = _named(call).items()
    return [(a.value.storage, a.value.offset) for n, a in named if n not in ("w", "ws", "bias", "residual", "y")]


def _batches(calls: list[Call], gpu: Any) -> None:
    """Calls of one operator that do not depend on one another, nor on what lies between them, in one launch."""
    i = 0
    while i < len(calls):
        group = [i] if _kind(calls[i], gpu) else []
        for j in range(i + 1, min(i + REACH, len(calls))) if group else ():
            if len(group) == MOST_PARTS:
                break
            if _kind(calls[i], gpu) != _kind(calls[j], gpu) or not _may_move(calls, i, j):
                continue
            if sum(len(calls[g].args) for g in (*group, j)) <= MOST_ARGS:
                group.append(j)
        if len(group) > 1:
            calls[i] = _together([calls[j] for j in group])
            for j in reversed(group[1:]):
                del calls[j]
        i += 1


def _kind(call: Call, gpu: Any) -> tuple[Any, ...]:
    """Equal for calls that may share a launch; empty for those that share none."""
    if isinstance(call.kernel, GenericRef):
        return ("generic",)
    op, p = call.kernel.op, call.kernel.params
    if op == "linear" and p.T == 1:
        fused = isinstance(p, FusedLinear)
        return (op, p.wdtype == "float32", fused and p.norm, fused and p.glu)
    if op == "linear_q" and p.T == 1:
        return () if isinstance(p, FusedLinearQ) else (op,)
    if type(p) is Quantize and p.T == 1:
        return (op, p.K, p.zero)
    barriers = isinstance(p, CausalConv) and (p.quant is not None or p.T > 1)
    return (op, _threads(op, p, gpu)) if op in BATCHED and not barriers else ()


@cache
def _threads(op: str, params: Any, gpu: Any) -> int:
    return build_part(op, params, gpu).threads


def _may_move(calls: list[Call], i: int, j: int) -> bool:
    """Whether call j could run together with call i."""
    reads = {a.value.storage for a in calls[j].args if a.access != "w"}
    writes = {a.value.storage for a in calls[j].args if a.access != "r"}
    for call in calls[i:j]:
        for a in call.args:
            if a.access != "r" and a.value.storage in reads | writes:
                return False
            if a.access != "w" and a.value.storage in writes:
                return False
    return True


def _together(parts: list[Call]) -> Call:
    kernels = tuple(c.kernel for c in parts)
    if isinstance(kernels[0], GenericRef):
        kernel = KernelRef("generics", Generics(kernels))
    elif isinstance(kernels[0].params, Quantize):
        kernel = KernelRef("quantize", Quantizes(**fields_of(kernels[0].params), several=len(kernels)))
    elif kernels[0].op in MODULES:
        kernel = KernelRef("joined", Joined(kernels[0].op, tuple(k.params for k in kernels)))
    else:
        kernel = KernelRef("batch", Batch(tuple((k.op, k.params) for k in kernels)))
    args = tuple(a for c in parts for a in c.args)
    traffic = {"weights": sum(_weight_bytes(c) for c in parts)} if any("weights" in c.traffic for c in parts) else {}
    return Call(kernel, args, all(c.outputs_only for c in parts), traffic)


def _weight_bytes(call: Call) -> int:
    """As the call states them, or those of its arguments."""
    return call.traffic.get(
        "weights", sum(a.value.storage.nbytes for a in call.args if a.value.storage.kind == "weight")
    )
