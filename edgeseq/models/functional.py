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
