"""Numpy references of the standard ONNX operators in the form in which the exporter uses them.

Each computes in the dtype of its first input, so float64 inputs give the definition to full precision.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray


def linear(x: NDArray, weight: NDArray, bias: NDArray | None = None) -> NDArray:
    """x[...,I], weight[O,I], bias[O] -> [...,O]. ONNX: MatMul(x, Transpose(weight)) and Add."""
    y = x @ weight.T
    return y if bias is None else y + bias


def silu(x: NDArray) -> NDArray:
    """x * sigmoid(x). ONNX: Mul(x, Sigmoid(x))."""
    return x * (0.5 + 0.5 * np.tanh(0.5 * x))  # tanh, because exp(-x) overflows


def causal_conv(
    x: NDArray, weight: NDArray, bias: NDArray | None, past: NDArray, use_silu: bool
) -> tuple[NDArray, NDArray]:
    """Depthwise causal convolution: x[B,T,C], weight[C,k], past[B,k-1,C] -> y[B,T,C], present[B,k-1,C].

    Tap k-1 multiplies the current token. ONNX: CausalConvWithState (27) between Transposes, as it is channels-first.
    """
    tokens, taps = x.shape[1], weight.shape[1]
    window = np.concatenate([past.astype(x.dtype), x], axis=1)  # [B,k-1+T,C]
    y = sum(window[:, j : j + tokens] * weight[:, j] for j in range(taps))
    y = y if bias is None else y + bias
    return (silu(y) if use_silu else y), window[:, window.shape[1] - (taps - 1) :]


def rms_norm(x: NDArray, weight: NDArray | None, eps: float) -> NDArray:
    """x[...,D] / sqrt(mean(x^2) + eps) * weight[D]. ONNX: RMSNormalization (23), axis -1."""
    y = x / np.sqrt(np.mean(x * x, axis=-1, keepdims=True) + eps)
    return y if weight is None else y * weight


def rotary(x: NDArray, cos: NDArray, sin: NDArray, num_heads: int, interleaved: bool) -> NDArray:
    """x[B,T,H*d], cos and sin[B,T,d/2] -> [B,T,H*d]. ONNX: RotaryEmbedding (23) with 3-D caches.

    interleaved: a pair is (2i, 2i+1); else (i, i+d/2).
    """
    heads = x.reshape(*x.shape[:2], num_heads, -1)  # [B,T,H,d]
    half = heads.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if interleaved else (slice(0, half), slice(half, None))
    a, b = heads[..., first], heads[..., second]
    c, s = cos[:, :, None], sin[:, :, None]
    y = np.empty_like(heads)
    y[..., first], y[..., second] = a * c - b * s, b * c + a * s
    return y.reshape(x.shape)


def cached_attention(
    q: NDArray, k: NDArray, v: NDArray, past_k: NDArray, past_v: NDArray, position: NDArray,
    num_heads: int, num_kv_heads: int, scale: float,
) -> tuple[NDArray, NDArray, NDArray]:  # fmt: skip
    """Causal attention over a cache of fixed length N that is written at `position`.

    q[B,T,H*d], k and v[B,T,Hk*d], past_k and past_v[B,Hk,N,d], position[B] -> o[B,T,H*d], present_k, present_v.
    Query t sees rows 0..position+t; rows from position+T on are never read, whatever they hold.
    ONNX: TensorScatter (24) twice, then Attention (24) with is_causal and nonpad_kv_seqlen = position + T.
    """
    batch, tokens, _ = q.shape
    heads = q.reshape(batch, tokens, num_heads, -1)  # [B,T,H,d]
    caches = []
    for past, new in ((past_k, k), (past_v, v)):
        cache = past.astype(q.dtype)
        rows = new.reshape(batch, tokens, num_kv_heads, -1).transpose(0, 2, 1, 3)  # [B,Hk,T,d]
        for b in range(batch):
            cache[b, :, position[b] : position[b] + tokens] = rows[b]
        caches.append(cache)
    o = np.empty(heads.shape[:3] + (caches[1].shape[-1],), q.dtype)
    for b in range(batch):
        for t in range(tokens):
            seen = int(position[b]) + t + 1
            for h in range(num_heads):
                group = h * num_kv_heads // num_heads
                score = caches[0][b, group, :seen] @ heads[b, t, h] * scale
                weight = np.exp(score - score.max())
                o[b, t, h] = weight @ caches[1][b, group, :seen] / weight.sum()
    return o.reshape(batch, tokens, -1), caches[0], caches[1]


def window_attention(
    q: NDArray, k: NDArray, v: NDArray, past_k: NDArray, past_v: NDArray, position: NDArray,
    num_heads: int, num_kv_heads: int, scale: float,
) -> tuple[NDArray, NDArray, NDArray]:  # fmt: skip
    """Causal attention to the last W tokens over a ring whose row p mod W holds token p.

    q[B,T,H*d], k and v[B,T,Hk*d], past_k and past_v[B,Hk,W,d], position[B] -> o[B,T,H*d], present_k, present_v.
    Token position+t replaces token position+t-W, which neither it nor a later one sees; a row that holds no token is
    never read. ONNX: Attention (24) over Concat(past, new) with a mask, then TensorScatter (24) twice, circular.
    """
    batch, tokens, _ = q.shape
    heads = q.reshape(batch, tokens, num_heads, -1)  # [B,T,H,d]
    rings = [past.astype(q.dtype) for past in (past_k, past_v)]
    new = [x.reshape(batch, tokens, num_kv_heads, -1) for x in (k, v)]
    rows = past_k.shape[2]
    o = np.empty(heads.shape[:3] + (past_v.shape[-1],), q.dtype)
    for b in range(batch):
        for t in range(tokens):
            token = int(position[b]) + t
            for ring, x in zip(rings, new, strict=True):
                ring[b, :, token % rows] = x[b, t]
            held = min(token + 1, rows)
            for h in range(num_heads):
                group = h * num_kv_heads // num_heads
                score = rings[0][b, group, :held] @ heads[b, t, h] * scale
                weight = np.exp(score - score.max())
                o[b, t, h] = weight @ rings[1][b, group, :held] / weight.sum()
    return o.reshape(batch, tokens, -1), rings[0], rings[1]


def linear_attention(
    q: NDArray, k: NDArray, v: NDArray, past: NDArray, decay: NDArray | None, beta: NDArray | None,
    rule: str, num_heads: int, num_kv_heads: int, scale: float,
) -> tuple[NDArray, NDArray]:  # fmt: skip
    """Matrix-state recurrence S[K,V] of H heads; H is told by past[B,H,K,V].

    q[B,T,num_heads*K], k[B,T,num_kv_heads*K], v[B,T,H*V], decay (log) [B,T,H] or [B,T,H*K], beta[B,T,H]
    -> o[B,T,max(num_heads,H)*V], present. ONNX: LinearAttention (27), behind a repetition of q and k to H heads where
    they have fewer.
    """
    batch, tokens, _ = q.shape
    heads = past.shape[1]
    qh = q.reshape(batch, tokens, num_heads, -1).repeat(max(1, heads // num_heads), 2)
    kh = k.reshape(batch, tokens, num_kv_heads, -1).repeat(heads // num_kv_heads, 2)
    vh = v.reshape(batch, tokens, heads, -1)
    S, o = past.astype(q.dtype), []
    for t in range(tokens):
        if rule.startswith("gated"):
            assert decay is not None
            S = np.exp(decay[:, t]).reshape(batch, heads, -1, 1) * S
        written = vh[:, t]
        if rule.endswith("delta"):
            assert beta is not None
            written = beta[:, t, :, None] * (written - np.einsum("bhk,bhkv->bhv", kh[:, t], S))
        S = S + kh[:, t, :, :, None] * written[:, :, None]
        o.append(scale * np.einsum("bhk,bhkv->bhv", qh[:, t], S.repeat(qh.shape[2] // heads, 1)))
    return np.stack(o, 1).reshape(batch, tokens, -1), S
