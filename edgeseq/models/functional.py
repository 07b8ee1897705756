"""The stateful operators of every family, as PyTorch custom operators `edgeseq::<name>`.

Chunk form: T >= 1 tokens with state in and state out; T = 1 is the step. No autograd here (the differentiable
whole-sequence forms are in `parallel.py`). The exporter maps each operator to one ONNX node.

Glossary: B batch, T tokens, C channels, D inner width, N state size, H query heads, Hk key/value heads, d head width,
K key width of a head, V value width of a head, k taps of the short convolution, M rows of a KV cache.
All tensors are float32 unless a signature says otherwise.
"""

from __future__ import annotations

import math
from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


def time_step(dt: Tensor, dt_bias: Tensor | None, dt_softplus: bool, dt_min: float, dt_max: float) -> Tensor:
    """The positive step size: clip(softplus(dt + bias), dt_min, dt_max); softplus is the identity above 20."""
    if dt_bias is not None:
        dt = dt + dt_bias
    if dt_softplus:
        dt = F.softplus(dt)
    if dt_min > 0.0 or dt_max < math.inf:
        dt = dt.clamp(dt_min, dt_max)
    return dt


@torch.library.custom_op("edgeseq::selective_scan", mutates_args=())
def _selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Optional[Tensor],  # noqa: UP045  (the schema parser reads this spelling)
    z: Optional[Tensor],  # noqa: UP045
    dt_bias: Optional[Tensor],  # noqa: UP045
    past: Tensor,
    dt_softplus: bool,
    dt_min: float,
    dt_max: float,
) -> tuple[Tensor, Tensor]:
    dt = time_step(dt, dt_bias, dt_softplus, dt_min, dt_max)
    state, du, outputs = past, dt * u, []
    for t in range(u.shape[1]):
        # S[B,N,D] <- exp(dt A) S + B (x) (dt u);   y[B,D] = C . S
        state = torch.exp(dt[:, t, None, :] * A) * state + B[:, t, :, None] * du[:, t, None, :]
        outputs.append((C[:, t, :, None] * state).sum(1))
    y = torch.stack(outputs, 1)
    if D is not None:
        y = y + D * u
    if z is not None:
        y = y * F.silu(z)
    return y, state


_selective_scan.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[8])))


def selective_scan(
    u: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    D: Tensor | None,
    z: Tensor | None,
    dt_bias: Tensor | None,
    past: Tensor,
    dt_softplus: bool = True,
    dt_min: float = 0.0,
    dt_max: float = math.inf,
) -> tuple[Tensor, Tensor]:
    """Mamba's selective scan (Gu and Dao 2023, section 3.2; B discretised by Euler as in the published code).

    u, dt, z [B,T,D]; A [N,D] = -exp(A_log) transposed; B, C [B,T,N]; D, dt_bias [D]; past [B,N,D].
    Returns y [B,T,D] and present [B,N,D].
    """
    return _selective_scan(u, dt, A, B, C, D, z, dt_bias, past, dt_softplus, dt_min, dt_max)


@torch.library.custom_op("edgeseq::retention", mutates_args=())
def _retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, past: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    qh, kh, vh = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v))
    decay, state, outputs = torch.exp(log_decay)[:, None, None], past, []
    for t in range(q.shape[1]):
        # S[B,H,K,V] <- e^g S + k (x) v;   o[B,H,V] = scale q^T S
        state = decay * state + kh[:, t, :, :, None] * vh[:, t, :, None, :]
        outputs.append(scale * (qh[:, t, :, None, :] @ state).flatten(1))
    return torch.stack(outputs, 1), state


_retention.register_fake(lambda *args: (torch.empty_like(args[2]), torch.empty_like(args[4])))


def retention(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, past: Tensor, num_heads: int, scale: float = 1.0
) -> tuple[Tensor, Tensor]:
    """Multi-scale retention (Sun et al. 2023, eq. 6), output taken after the update.

    q, k [B,T,H*K]; v [B,T,H*V]; log_decay [H] = log gamma; past [B,H,K,V].
    Returns o [B,T,H*V] and present [B,H,K,V].
    """
    return _retention(q, k, v, log_decay, past, num_heads, scale)


@torch.library.custom_op("edgeseq::causal_conv", mutates_args=())
def _causal_conv(
    x: Tensor,
    weight: Tensor,
    bias: Optional[Tensor],  # noqa: UP045
    past: Tensor,
    silu: bool,
) -> tuple[Tensor, Tensor]:
    full = torch.cat([past, x], 1)
    y = F.conv1d(full.transpose(1, 2), weight[:, None], bias, groups=x.shape[2]).transpose(1, 2)
    y = F.silu(y) if silu else y
    return y.contiguous(), full[:, x.shape[1] :].clone()


_causal_conv.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[3])))


def causal_conv(x: Tensor, weight: Tensor, bias: Tensor | None, past: Tensor, silu: bool) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution; tap k-1 multiplies the current sample.

    x [B,T,C]; weight [C,k]; bias [C]; past [B,k-1,C], oldest first. Returns y [B,T,C] and present [B,k-1,C].
    """
    return _causal_conv(x, weight, bias, past, silu)


@torch.library.custom_op("edgeseq::rms_norm", mutates_args=())
def _rms_norm(x: Tensor, weight: Optional[Tensor], eps: float) -> Tensor:  # noqa: UP045
    return rms_norm_parallel(x, weight, eps)


_rms_norm.register_fake(lambda *args: torch.empty_like(args[0]))


def rms_norm_parallel(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """x / sqrt(mean(x^2) + eps) * weight over the last axis, differentiable."""
    y = x * torch.rsqrt(x.pow(2).mean(-1, keepdim=True) + eps)
    return y if weight is None else y * weight


def rms_norm(x: Tensor, weight: Tensor | None, eps: float) -> Tensor:
    """Root-mean-square norm over the last axis; weight has that axis's length."""
    return _rms_norm(x, weight, eps)


def rotary_parallel(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """Differentiable body of `rotary`."""
    heads = x.unflatten(-1, (num_heads, -1))
    c, s = cos[:, :, None, :], sin[:, :, None, :]
    if interleaved:
        a, b = heads[..., 0::2], heads[..., 1::2]
        return torch.stack([a * c - b * s, b * c + a * s], -1).flatten(2)
    a, b = heads.chunk(2, -1)
    return torch.cat([a * c - b * s, b * c + a * s], -1).flatten(2)


@torch.library.custom_op("edgeseq::rotary", mutates_args=())
def _rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    return rotary_parallel(x, cos, sin, num_heads, interleaved)


_rotary.register_fake(lambda *args: torch.empty_like(args[0]))


def rotary(x: Tensor, cos: Tensor, sin: Tensor, num_heads: int, interleaved: bool) -> Tensor:
    """Rotate pairs of channels of each head by the angle of the token's position (Su et al. 2021).

    x [B,T,H*d]; cos, sin [B,T,d/2]. Pairs are (2i, 2i+1) when interleaved, else (i, i + d/2).
    """
    return _rotary(x, cos, sin, num_heads, interleaved)


@torch.library.custom_op("edgeseq::cached_attention", mutates_args=())
def _cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    (batch, tokens, _), rows = q.shape, past_k.shape[2]
    end = int(position.max()) + tokens
    if end > rows:
        raise IndexError(f"the KV cache holds {rows} tokens, but {end} are needed")
    row = position[:, None] + torch.arange(tokens)  # [B,T]
    index = row[:, None, :, None].expand(batch, num_kv_heads, tokens, past_k.shape[3])
    present_k = past_k.scatter(2, index, k.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2))
    present_v = past_v.scatter(2, index, v.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2))

    visible = torch.arange(end) <= row[:, :, None]  # [B,T,end]
    written = visible[:, -1, None, :, None]  # rows that hold a token; the rest may be anything
    keys = present_k[:, :, :end].masked_fill(~written, 0.0)
    values = present_v[:, :, :end].masked_fill(~written, 0.0)
    group = num_heads // num_kv_heads
    qh = q.unflatten(-1, (num_kv_heads, group, -1)).permute(0, 2, 3, 1, 4)  # [B,Hk,G,T,d]
    scores = scale * (qh @ keys[:, :, None].transpose(-1, -2))  # [B,Hk,G,T,end]
    weights = torch.softmax(scores.masked_fill(~visible[:, None, None], -math.inf), -1)
    o = (weights @ values[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2)
    return o.contiguous(), present_k, present_v


_cached_attention.register_fake(
    lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[3]), torch.empty_like(args[4]))
)


def cached_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention over a cache: the T new rows are written at position .. position+T-1 and are visible.

    q [B,T,H*d]; k, v [B,T,Hk*d]; past_k, past_v [B,Hk,M,d]; position [B] int64, tokens already in the cache.
    Query head h reads key/value head h // (H/Hk). Rows at or above position+T are never read.
    Returns o [B,T,H*d], present_k, present_v. Raises IndexError when position+T > M.
    """
    return _cached_attention(q, k, v, past_k, past_v, position, num_heads, num_kv_heads, scale)


@torch.library.custom_op("edgeseq::dplr_scan", mutates_args=())
def _dplr_scan(
    q: Tensor, k: Tensor, v: Tensor, g: Tensor, a: Tensor, b: Tensor, past: Tensor, num_heads: int, scale: float
) -> tuple[Tensor, Tensor]:
    qh, kh, vh, gh, ah, bh = (x.unflatten(-1, (num_heads, -1)) for x in (q, k, v, g, a, b))
    decay, state, outputs = torch.exp(gh), past, []
    for t in range(q.shape[1]):
        # S[B,H,K,V] <- diag(e^g) S + b (a^T S) + k (x) v;   o[B,H,V] = scale q^T S
        read = ah[:, t, :, None, :] @ state
        added = bh[:, t, :, :, None] * read + kh[:, t, :, :, None] * vh[:, t, :, None, :]
        state = decay[:, t, :, :, None] * state + added
        outputs.append(scale * (qh[:, t, :, None, :] @ state).flatten(1))
    return torch.stack(outputs, 1), state


_dplr_scan.register_fake(lambda *args: (torch.empty_like(args[2]), torch.empty_like(args[6])))


def dplr_scan(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    g: Tensor,
    a: Tensor,
    b: Tensor,
    past: Tensor,
    num_heads: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Diagonal-plus-low-rank scan (RWKV-7, Peng et al. 2025): both terms read the old state, output after the update.

    q, k, g (log decay), a (read), b (written) [B,T,H*K]; v [B,T,H*V]; past [B,H,K,V].
    Returns o [B,T,H*V] and present [B,H,K,V].
    """
    return _dplr_scan(q, k, v, g, a, b, past, num_heads, scale)


@torch.library.custom_op("edgeseq::linear_attention", mutates_args=())
def _linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    decay: Optional[Tensor],  # noqa: UP045
    beta: Optional[Tensor],  # noqa: UP045
    rule: str,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor]:
    heads = past.shape[1]
    qh = q.unflatten(-1, (num_heads, -1)).repeat_interleave(max(1, heads // num_heads), 2)
    kh = k.unflatten(-1, (num_kv_heads, -1)).repeat_interleave(heads // num_kv_heads, 2)
    vh = v.unflatten(-1, (heads, -1))
    keep = None if decay is None else torch.exp(decay).unflatten(-1, (heads, -1))  # [B,T,H,1 or K]
    state, outputs = past, []
    for t in range(q.shape[1]):
        # S[B,H,K,V] <- e^g S + k (x) w;   w = v, or beta (v - k^T e^g S) for the delta rules
        state = state if keep is None else keep[:, t, :, :, None] * state
        key, written = kh[:, t, :, :, None], vh[:, t, :, None, :]
        if beta is not None:
            written = beta[:, t, :, None, None] * (written - key.transpose(-1, -2) @ state)
        state = state + key * written
        read = state.repeat_interleave(max(1, num_heads // heads), 1)
        outputs.append(scale * (qh[:, t, :, None, :] @ read).flatten(1))
    return torch.stack(outputs, 1), state


@_linear_attention.register_fake
def _linear_attention_shapes(
    q: Tensor, k: Tensor, v: Tensor, past: Tensor, decay: Tensor | None, beta: Tensor | None,
    rule: str, num_heads: int, num_kv_heads: int, scale: float,
) -> tuple[Tensor, Tensor]:  # fmt: skip
    width = past.shape[3] * max(num_heads, past.shape[1])
    return q.new_empty(*q.shape[:2], width), torch.empty_like(past)


RULES = ("linear", "gated", "delta", "gated_delta")


def linear_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past: Tensor,
    decay: Tensor | None,
    beta: Tensor | None,
    rule: str,
    num_heads: int,
    num_kv_heads: int,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor]:
    """Linear attention of the standard ONNX operator, output taken after the update of the state.

    linear       S <- S + k (x) v                      gated        S <- e^g S + k (x) v
    delta        S <- S + k (x) beta (v - k^T S)       gated_delta  S <- e^g S + k (x) beta (v - k^T e^g S)

    past [B,H,K,V] tells H, the heads of the state. q [B,T,num_heads*K]; k [B,T,num_kv_heads*K]; v [B,T,H*V];
    decay (log space; gated rules) [B,T,H] or per key channel [B,T,H*K]; beta (delta rules) [B,T,H].
    Fewer heads serve several: head h of the state reads key head h // (H/num_kv_heads), likewise for queries; where
    there are more queries than states (grouped queries), query head h reads state h // (num_heads/H).
    Returns o [B,T,max(num_heads,H)*V] and present [B,H,K,V].
    """
    if rule not in RULES or (decay is None) == ("gated" in rule) or (beta is None) == ("delta" in rule):
        given = [name for name, x in (("decay", decay), ("beta", beta)) if x is not None]
        raise ValueError(f"the rule {rule!r} does not go with {' and '.join(given) or 'neither decay nor beta'}")
    return _linear_attention(q, k, v, past, decay, beta, rule, num_heads, num_kv_heads, scale)


@torch.library.custom_op("edgeseq::wkv4", mutates_args=())
def _wkv4(k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    (a, b, p), w, outputs = past.unbind(1), -torch.exp(time_decay), []
    for key, value in zip(k.unbind(1), v.unbind(1), strict=True):
        # o[B,C] = (e^p a + e^(u+k) v) / (e^p b + e^(u+k));   (a, b) e^p <- e^(p+w) (a, b) + e^k (v, 1)
        own = time_first + key
        m = torch.maximum(p, own)
        before, now = torch.exp(p - m), torch.exp(own - m)
        outputs.append((before * a + now * value) / (before * b + now))
        n = torch.maximum(p + w, key)
        before, now = torch.exp(p + w - n), torch.exp(key - n)
        a, b, p = before * a + now * value, before * b + now, n
    return torch.stack(outputs, 1), torch.stack([a, b, p], 1)


_wkv4.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[4])))


def wkv4(k: Tensor, v: Tensor, time_decay: Tensor, time_first: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """RWKV-4's weighted average (Peng et al. 2023, appendix D), every exponent taken from its maximum.

    k, v [B,T,C]; time_decay [C], of which a step decays by exp(-exp(.)); time_first [C], the bonus of the current
    token; past [B,3,C]: a, b and their common exponent p, all -1e30 when fresh.
    Returns o [B,T,C] and present [B,3,C].
    """
    return _wkv4(k, v, time_decay, time_first, past)


@torch.library.custom_op("edgeseq::window_attention", mutates_args=())
def _window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    tokens, rows = q.shape[1], past_k.shape[2]
    t = torch.arange(tokens)
    # token in each column, counted from the first new one: the ring before, then the chunk
    ring = -1 - torch.remainder(position[:, None] - 1 - torch.arange(rows), rows)
    column = torch.cat([ring, t.expand(len(position), tokens)], 1)[:, None, :]
    oldest = torch.maximum(t - rows + 1, -position[:, None])[:, :, None]
    visible = (column <= t[:, None]) & (column >= oldest)  # [B,T,W+T]

    kh, vh = (x.unflatten(-1, (num_kv_heads, -1)).transpose(1, 2) for x in (k, v))
    written = (column >= -position[:, None, None])[:, :, :, None]  # [B,1,W+T,1]; the rest may be anything
    keys = torch.cat([past_k, kh], 2).masked_fill(~written, 0.0)
    values = torch.cat([past_v, vh], 2).masked_fill(~written, 0.0)
    qh = q.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads, -1)).permute(0, 2, 3, 1, 4)  # [B,Hk,G,T,d]
    scores = scale * (qh @ keys[:, :, None].transpose(-1, -2))
    weights = torch.softmax(scores.masked_fill(~visible[:, None, None], -math.inf), -1)
    o = (weights @ values[:, :, None]).permute(0, 3, 1, 2, 4).flatten(2)

    last = min(tokens, rows)
    row = torch.remainder(position[:, None] + torch.arange(tokens - last, tokens), rows)
    index = row[:, None, :, None].expand(-1, num_kv_heads, -1, past_k.shape[3])
    present = (past.scatter(2, index, new[:, :, -last:]) for past, new in ((past_k, kh), (past_v, vh)))
    return (o.contiguous(), *present)


_window_attention.register_fake(
    lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[3]), torch.empty_like(args[4]))
)


def window_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention to the last W tokens, the current one counted, over a ring whose row p mod W holds token p.

    q [B,T,H*d]; k, v [B,T,Hk*d]; past_k, past_v [B,Hk,W,d]; position [B] int64, tokens seen so far (no limit).
    Query head h reads key/value head h // (H/Hk). A row that no token was written to is never read.
    Returns o [B,T,H*d], present_k, present_v.
    """
    return _window_attention(q, k, v, past_k, past_v, position, num_heads, num_kv_heads, scale)
