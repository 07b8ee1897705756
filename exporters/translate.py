"""PyTorch operators to ONNX nodes: the stateful ones, and the standard ones that ONNX can say more plainly.

One function per operator; what is not here goes through torch.onnx's own table. All sizes are static.

B batch, T tokens, C channels, H heads, Hk key/value heads, d head width, N rows of a KV cache.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any

import torch
from onnxscript.values import Opset

from edgeseq.ops import DOMAIN, ONNX_OPSET, VERSION, register_all
from exporters import contrib

Translation = dict[Callable[..., Any], Callable[..., Any]]
Value = Any  # a tensor of the graph under construction

onnx_op = Opset("", ONNX_OPSET)


def translations(flavour: str) -> Translation:
    """The table for torch.onnx.export; `flavour` is "onnx" (portable) or "ort" (com.microsoft twins where faster)."""
    import edgeseq.models.experts_op
    import edgeseq.models.functional
    import edgeseq.models.gated_scan_op
    import edgeseq.models.scan_op
    import edgeseq.models.sparse_op  # noqa: F401  these register the torch operators

    register_all()
    contrib.register()
    ours = torch.ops.edgeseq
    table: Translation = {
        ours.selective_scan.default: selective_scan,
        ours.retention.default: retention,
        ours.dplr_scan.default: dplr_scan,
        ours.wkv4.default: wkv4,
        ours.diag_scan.default: diag_scan,
        ours.dense_scan.default: dense_scan,
        ours.long_conv.default: long_conv,
        ours.linear_attention.default: linear_attention,
        ours.causal_conv.default: causal_conv,
        ours.rms_norm.default: rms_norm,
        ours.rotary.default: rotary,
        ours.cached_attention.default: cached_attention,
        ours.window_attention.default: window_attention,
        ours.sparse_attention.default: sparse_attention,
        ours.expert_linear.default: expert_linear,
        ours.gated_scan.default: gated_scan,
        torch.ops.aten.linear.default: linear,
        torch.ops.aten.silu.default: silu,
        torch.ops.aten.gelu.default: gelu,
        torch.ops.aten.slice.Tensor: slice_tensor,
        torch.ops.aten.sort.stable: stable_sort,
        torch.ops.aten.cumprod.default: cumulative_product,
    }
    if flavour == "ort":
        table |= {
            ours.retention.default: retention_ort,
            ours.linear_attention.default: linear_attention_ort,
            ours.causal_conv.default: causal_conv_ort,
        }
    return table


def selective_scan(
    u: Value, dt: Value, A: Value, B: Value, C: Value, D: Value | None, z: Value | None, dt_bias: Value | None,
    past: Value, dt_softplus: bool, dt_min: float, dt_max: float,
) -> Value:  # fmt: skip
    """ai.edgeseq.SelectiveScan, inputs in this order."""
    return Opset(DOMAIN, VERSION).SelectiveScan(
        u, dt, A, B, C, D, z, dt_bias, past,
        dt_softplus=int(dt_softplus), dt_min=dt_min, dt_max=dt_max, _outputs=2,
    )  # fmt: skip


def retention(q: Value, k: Value, v: Value, log_decay: Value, past: Value, num_heads: int, scale: float) -> Value:
    """ai.edgeseq.Retention, inputs in this order."""
    return Opset(DOMAIN, VERSION).Retention(q, k, v, log_decay, past, num_heads=num_heads, scale=scale, _outputs=2)


def retention_ort(q: Value, k: Value, v: Value, log_decay: Value, past: Value, num_heads: int, scale: float) -> Value:
    """com.microsoft.LinearAttention, gated, with the decay repeated for every token [1,T,H]."""
    decay = onnx_op.Expand(log_decay, ints([*static_shape(q)[:2], num_heads]))
    return contrib.OPSET.LinearAttention(
        q, k, v, past, decay,
        update_rule="gated", q_num_heads=num_heads, kv_num_heads=num_heads, scale=scale, _outputs=2,
    )  # fmt: skip


def dplr_scan(
    q: Value, k: Value, v: Value, g: Value, a: Value, b: Value, past: Value, num_heads: int, scale: float
) -> Value:
    """ai.edgeseq.DPLRScan, inputs in this order."""
    return Opset(DOMAIN, VERSION).DPLRScan(q, k, v, g, a, b, past, num_heads=num_heads, scale=scale, _outputs=2)


def wkv4(k: Value, v: Value, time_decay: Value, time_first: Value, past: Value) -> Value:
    """ai.edgeseq.WKV4, inputs in this order."""
    return Opset(DOMAIN, VERSION).WKV4(k, v, time_decay, time_first, past, _outputs=2)


def diag_scan(u: Value, a: Value, c: Value, d: Value | None, past: Value) -> Value:
    """ai.edgeseq.DiagScan, inputs in this order."""
    return Opset(DOMAIN, VERSION).DiagScan(u, a, c, d, past, _outputs=2)


def dense_scan(u: Value, a: Value, b: Value, c: Value, d: Value | None, past: Value) -> Value:
    """ai.edgeseq.DenseScan, inputs in this order."""
    return Opset(DOMAIN, VERSION).DenseScan(u, a, b, c, d, past, _outputs=2)


def long_conv(x: Value, h: Value, d: Value | None, past: Value, position: Value) -> Value:
    """ai.edgeseq.LongConvStep, inputs in this order."""
    return Opset(DOMAIN, VERSION).LongConvStep(x, h, d, past, position, _outputs=2)


def linear_attention(
    q: Value, k: Value, v: Value, past: Value, decay: Value | None, beta: Value | None,
    rule: str, num_heads: int, num_kv_heads: int, scale: float,
) -> Value:  # fmt: skip
    """LinearAttention (27)."""
    return _linear_attention(onnx_op, q, k, v, past, decay, beta, rule, num_heads, num_kv_heads, scale)


def linear_attention_ort(
    q: Value, k: Value, v: Value, past: Value, decay: Value | None, beta: Value | None,
    rule: str, num_heads: int, num_kv_heads: int, scale: float,
) -> Value:  # fmt: skip
    """com.microsoft.LinearAttention; grouped queries stay standard, as its output has a width of its own there."""
    opset = contrib.OPSET if num_heads <= static_shape(past)[1] else onnx_op
    return _linear_attention(opset, q, k, v, past, decay, beta, rule, num_heads, num_kv_heads, scale)


def _linear_attention(
    opset: Opset, q: Value, k: Value, v: Value, past: Value, decay: Value | None, beta: Value | None,
    rule: str, num_heads: int, num_kv_heads: int, scale: float,
) -> Value:  # fmt: skip
    """Both flavours take the same inputs; queries and keys of fewer heads than the state has are repeated."""
    count = static_shape(past)[1]
    if num_heads < count:
        q, num_heads = repeat_heads(q, num_heads, count), count
    return opset.LinearAttention(
        q, repeat_heads(k, num_kv_heads, count), v, past, decay, beta,
        update_rule=rule, q_num_heads=num_heads, kv_num_heads=count, scale=scale, _outputs=2,
    )  # fmt: skip


def repeat_heads(x: Value, heads: int, count: int) -> Value:
    """[B,T,heads*K] -> [B,T,count*K], each head count/heads times in a row."""
    if heads == count:
        return x
    batch, tokens, width = static_shape(x)
    each = onnx_op.Reshape(x, ints([batch, tokens, heads, 1, width // heads]))
    repeated = onnx_op.Expand(each, ints([batch, tokens, heads, count // heads, width // heads]))
    return onnx_op.Reshape(repeated, ints([batch, tokens, count * (width // heads)]))


def causal_conv(x: Value, weight: Value, bias: Value | None, past: Value, silu: bool) -> Value:
    """CausalConvWithState (27) is channels-first: x[B,T,C] and past[B,k-1,C] are transposed around it."""
    y, present = onnx_op.CausalConvWithState(
        swap(x), onnx_op.Unsqueeze(weight, ints([1])), bias, swap(past), activation=_activation(silu), _outputs=2
    )
    return swap(y), swap(present)


def causal_conv_ort(x: Value, weight: Value, bias: Value | None, past: Value, silu: bool) -> Value:
    """com.microsoft.CausalConvWithState has our layout as an option."""
    return contrib.OPSET.CausalConvWithState(
        x, onnx_op.Unsqueeze(weight, ints([1])), bias, past,
        activation=_activation(silu), channels_last=1, _outputs=2,
    )  # fmt: skip


def expert_linear(x: Value, index: Value, w: Value, gates: Value | None, num_experts: int) -> Value:
    """ai.edgeseq.ExpertLinear, inputs in this order."""
    return Opset(DOMAIN, VERSION).ExpertLinear(x, index, w, gates, num_experts=num_experts)


def gated_scan(x: Value, log_a: Value, past: Value) -> Value:
    """ai.edgeseq.GatedScan, inputs in this order."""
    return Opset(DOMAIN, VERSION).GatedScan(x, log_a, past, _outputs=2)


def rms_norm(x: Value, weight: Value | None, eps: float) -> Value:
    """RMSNormalization (23) over the last axis; without a weight the scale is ones."""
    if weight is None:
        weight = onnx_op.Expand(onnx_op.Constant(value_float=1.0), ints(static_shape(x)[-1:]))
    return onnx_op.RMSNormalization(x, weight, epsilon=eps, axis=-1)


def rotary(x: Value, cos: Value, sin: Value, num_heads: int, interleaved: bool) -> Value:
    """RotaryEmbedding (23) with one row of angles per token, so without position ids."""
    return onnx_op.RotaryEmbedding(x, cos, sin, num_heads=num_heads, interleaved=int(interleaved))


def cached_attention(
    q: Value, k: Value, v: Value, past_k: Value, past_v: Value, position: Value,
    num_heads: int, num_kv_heads: int, scale: float,
) -> Value:  # fmt: skip
    """TensorScatter (24) of the new rows, then Attention (24) over the whole cache with an external length.

    is_causal is aligned to nonpad_kv_seqlen = position + T: query t sees rows 0..position+t.
    """
    tokens = static_shape(q)[1]
    present_k = onnx_op.TensorScatter(past_k, heads(k, num_kv_heads), position, axis=2)
    present_v = onnx_op.TensorScatter(past_v, heads(v, num_kv_heads), position, axis=2)
    length = onnx_op.Add(position, ints([tokens]))
    o, *_ = onnx_op.Attention(
        heads(q, num_heads), present_k, present_v, None, None, None, length, is_causal=1, scale=scale
    )  # [B,H,T,d]
    merged = onnx_op.Reshape(onnx_op.Transpose(o, perm=[0, 2, 1, 3]), ints(static_shape(q)))
    return merged, present_k, present_v


def window_attention(
    q: Value, k: Value, v: Value, past_k: Value, past_v: Value, position: Value,
    num_heads: int, num_kv_heads: int, scale: float,
) -> Value:  # fmt: skip
    """Attention (24) over [ring before; new rows] with a mask, then TensorScatter (24), circular, of what stays.

    Scattering first would lose rows that the first queries of a chunk still see.
    """
    tokens, rows = static_shape(q)[1], static_shape(past_k)[2]
    mask = window_mask(position, tokens, rows)
    past, new = (past_k, past_v), (heads(k, num_kv_heads), heads(v, num_kv_heads))
    keys, values = (onnx_op.Concat(p, n, axis=2) for p, n in zip(past, new, strict=True))
    o, *_ = onnx_op.Attention(heads(q, num_heads), keys, values, mask, scale=scale)  # [B,H,T,d]
    merged = onnx_op.Reshape(onnx_op.Transpose(o, perm=[0, 2, 1, 3]), ints(static_shape(q)))
    first = max(0, tokens - rows)
    row = onnx_op.Mod(onnx_op.Add(position, ints([first])) if first else position, ints([rows]))
    if first:
        new = tuple(onnx_op.Slice(n, ints([first]), ints([tokens]), ints([2])) for n in new)
    present = (onnx_op.TensorScatter(p, n, row, axis=2, mode="circular") for p, n in zip(past, new, strict=True))
    return (merged, *present)


def sparse_attention(
    q: Value, k: Value, v: Value, past_k: Value, past_v: Value, position: Value,
    num_heads: int, num_kv_heads: int, scale: float, prefix: int, block: int, blocks: int, seed: int,
) -> Value:  # fmt: skip
    """ai.edgeseq.SparseAttention, inputs in this order."""
    return Opset(DOMAIN, VERSION).SparseAttention(
        q, k, v, past_k, past_v, position, num_heads=num_heads, num_kv_heads=num_kv_heads, scale=scale,
        prefix=prefix, block=block, blocks=blocks, seed=seed, _outputs=3,
    )  # fmt: skip


def window_mask(position: Value, tokens: int, rows: int) -> Value:
    """What token t of a chunk sees of [ring before; chunk]: bool [T,W+T], tokens counted from the first of the chunk.

    Row s of the ring holds the latest token of s mod W before the chunk, if there has been one.
    """
    back = onnx_op.Mod(onnx_op.Sub(position, ints(list(range(1, rows + 1)))), ints([rows]))
    column = onnx_op.Concat(onnx_op.Sub(ints([-1]), back), ints(list(range(tokens))), axis=0)
    t = onnx_op.Unsqueeze(ints(list(range(tokens))), ints([1]))
    oldest = onnx_op.Unsqueeze(ints([i - rows + 1 for i in range(tokens)]), ints([1]))
    oldest = onnx_op.Max(oldest, onnx_op.Neg(position))
    return onnx_op.And(onnx_op.LessOrEqual(column, t), onnx_op.GreaterOrEqual(column, oldest))


def linear(x: Value, weight: Value, bias: Value | None = None) -> Value:
    """MatMul(x, Transpose(weight)) and Add: the weight stays [out,in], as the state_dict has it."""
    y = onnx_op.MatMul(x, onnx_op.Transpose(weight, perm=[1, 0]))
    return y if bias is None else onnx_op.Add(y, bias)


def silu(x: Value) -> Value:
    """Mul(x, Sigmoid(x)): stock onnxruntime has no CPU kernel for Swish."""
    return onnx_op.Mul(x, onnx_op.Sigmoid(x))


def gelu(x: Value, approximate: str = "none") -> Value:
    """x/2 (1 + erf(x / sqrt 2)), or by tanh of sqrt(2/pi) (x + 0.044715 x^3) (Hendrycks and Gimpel 2016, section 2);
    the cube is two products, for Pow is slow and has no sign to rely on."""
    if approximate == "tanh":
        cube = onnx_op.Mul(onnx_op.Mul(x, x), x)
        inner = onnx_op.Add(x, onnx_op.Mul(cube, onnx_op.Constant(value_float=0.044715)))
        bend = onnx_op.Tanh(onnx_op.Mul(inner, onnx_op.Constant(value_float=math.sqrt(2.0 / math.pi))))
    else:
        bend = onnx_op.Erf(onnx_op.Mul(x, onnx_op.Constant(value_float=math.sqrt(0.5))))
    half = onnx_op.Mul(x, onnx_op.Constant(value_float=0.5))
    return onnx_op.Mul(half, onnx_op.Add(bend, onnx_op.Constant(value_float=1.0)))


def slice_tensor(x: Value, dim: int = 0, start: int | None = None, end: int | None = None, step: int = 1) -> Value:
    """Slice with indices within the axis, and none at all where everything is taken."""
    shape = static_shape(x)
    dim %= len(shape)
    first, last, _ = slice(start, end).indices(shape[dim])
    if (first, last, step) == (0, shape[dim], 1):
        return onnx_op.Identity(x)
    steps = () if step == 1 else (ints([step]),)
    return onnx_op.Slice(x, ints([first]), ints([last]), ints([dim]), *steps)


def stable_sort(x: Value, stable: bool = True, dim: int = -1, descending: bool = False) -> Value:
    """TopK (24) of the whole axis: of equal elements the one with the lower index comes first."""
    size = static_shape(x)[dim]
    return onnx_op.TopK(x, ints([size]), axis=dim, largest=int(descending), sorted=1, _outputs=2)


def cumulative_product(x: Value, dim: int) -> Value:
    """CumProd (26), the element itself included."""
    return onnx_op.CumProd(x, onnx_op.Constant(value_int=dim))


def heads(x: Value, count: int) -> Value:
    """[B,T,count*d] -> [B,count,T,d]."""
    batch, tokens, width = static_shape(x)
    return onnx_op.Transpose(onnx_op.Reshape(x, ints([batch, tokens, count, width // count])), perm=[0, 2, 1, 3])


def swap(x: Value) -> Value:
    """[B,T,C] <-> [B,C,T]."""
    return onnx_op.Transpose(x, perm=[0, 2, 1])


def ints(values: list[int]) -> Value:
    return onnx_op.Constant(value_ints=values)


def static_shape(x: Value) -> list[int]:
    return [int(size) for size in x.shape]


def _activation(silu: bool) -> str:
    return "silu" if silu else "none"
