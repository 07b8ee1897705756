"""Whole-sequence, differentiable forms of the recurrences: what training uses and what the chunk forms must equal.

Letters as in `functional.py`. Every function starts from a zero state.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

SCAN_BLOCK = 16


def _scan_states(dt: Tensor, du: Tensor, A: Tensor, B: Tensor, past: Tensor) -> tuple[Tensor, Tensor]:
    """exp(dt A) and S_t = exp(dt_t A) S_{t-1} + B_t (x) du_t of one block, time first: [T,B,N,D] each.

    dt, du [T,B,D]; A [N,D]; B [T,B,N]; past [B,N,D]. One multiply-add per step on all channels.
    """
    decay = torch.exp(dt[:, :, None, :] * A)
    S = B[..., None] * du[:, :, None, :]
    previous = past
    for t in range(S.shape[0]):
        S[t].addcmul_(decay[t], previous)
        previous = S[t]
    return decay, S


@torch.library.custom_op("edgeseq::selective_scan_whole", mutates_args=())
def _selective_scan(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, block: int) -> tuple[Tensor, Tensor]:
    """Time first: u, dt [T,B,D]; A [N,D]; B, C [T,B,N] -> y [T,B,D] and the state before each block [.,B,N,D]."""
    past, outputs, starts = u.new_zeros(u.shape[1], *A.shape), [], []
    for ub, dtb, Bb, Cb in zip(*(x.split(block) for x in (u, dt, B, C)), strict=True):
        _, S = _scan_states(dtb, dtb * ub, A, Bb, past)
        outputs.append((Cb[:, :, None, :] @ S).squeeze(2))
        starts.append(past)
        past = S[-1].clone()
    return torch.cat(outputs), torch.stack(starts)


@_selective_scan.register_fake
def _(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, block: int) -> tuple[Tensor, Tensor]:
    return torch.empty_like(u), u.new_empty(-(-u.shape[0] // block), u.shape[1], *A.shape)


@torch.library.custom_op("edgeseq::selective_scan_whole_gradients", mutates_args=())
def _selective_scan_gradients(
    grad_y: Tensor, u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor, starts: Tensor, block: int
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Gradients of u, dt, A, B, C; the states are computed again, block by block from the last."""
    grad_last, grad_A, rows = torch.zeros_like(starts[0]), torch.zeros_like(A), []
    blocks = zip(*(x.split(block) for x in (grad_y, u, dt, B, C)), starts, strict=True)
    for gy, ub, dtb, Bb, Cb, past in reversed(list(blocks)):
        du = dtb * ub
        decay, S = _scan_states(dtb, du, A, Bb, past)
        G = Cb[..., None] * gy[:, :, None, :]  # dL/dS_t, completed backwards in time
        G[-1] += grad_last
        for t in range(G.shape[0] - 1, 0, -1):
            G[t - 1].addcmul_(decay[t], G[t])
        grad_last = decay[0] * G[0]
        grad_C, grad_B = (S @ gy[..., None]).squeeze(-1), (G @ du[..., None]).squeeze(-1)
        grad_du = (Bb[:, :, None, :] @ G).squeeze(2)
        exponent = decay.mul_(G)  # dL/d(dt A) = G_t exp(dt A) S_{t-1}
        exponent[1:].mul_(S[:-1])
        exponent[0].mul_(past)
        grad_A += (exponent * dtb[:, :, None, :]).sum((0, 1))
        rows.append((grad_du * dtb, grad_du * ub + exponent.mul_(A).sum(2), grad_B, grad_C))
    grad_u, grad_dt, grad_B, grad_C = (torch.cat(parts[::-1]) for parts in zip(*rows, strict=True))
    return grad_u, grad_dt, grad_A, grad_B, grad_C


_selective_scan_gradients.register_fake(lambda *args: tuple(torch.empty_like(x) for x in args[1:6]))


def _scan_backward(ctx: Any, grad_y: Tensor, _: Tensor) -> tuple[Tensor | None, ...]:
    return (*_selective_scan_gradients(grad_y.contiguous(), *ctx.saved_tensors, ctx.block), None)


def _scan_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.block = inputs
    ctx.save_for_backward(*tensors, output[1])


_selective_scan.register_autograd(_scan_backward, setup_context=_scan_context)


def selective_scan_parallel(u: Tensor, dt: Tensor, A: Tensor, B: Tensor, C: Tensor) -> Tensor:
    """Selective scan of a whole sequence: u, dt (already positive) [B,T,D]; A [N,D]; B, C [B,T,N] -> y [B,T,D]."""
    u, dt, B, C = (x.transpose(0, 1).contiguous() for x in (u, dt, B, C))
    return _selective_scan(u, dt, A, B, C, SCAN_BLOCK)[0].transpose(0, 1)


def causal_conv_parallel(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Depthwise causal convolution: x [B,T,C], weight [C,k] -> [B,T,C], as k shifted multiply-adds."""
    taps, tokens = weight.shape[1], x.shape[1]
    padded = F.pad(x, (0, 0, taps - 1, 0))
    y = sum(padded[:, j : j + tokens] * weight[:, j] for j in range(taps))
    return y if bias is None else y + bias


def _heads(x: Tensor, num_heads: int) -> Tensor:
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)  # [B,H,T,.]


def _decay_mask(log_decay: Tensor, tokens: int) -> Tensor:
    """gamma^(i-j) for i >= j, else 0: [H,T,T]. Only differences of exponents are exponentiated."""
    i = torch.arange(tokens, device=log_decay.device)
    distance = (i[:, None] - i[None, :]).to(log_decay.dtype)
    mask = torch.exp(log_decay[:, None, None] * distance.clamp(min=0))
    return mask * (distance >= 0)


def retention_parallel(q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, num_heads: int, scale: float) -> Tensor:
    """Retention, parallel form ((Q K^T) * decay) V: q, k [B,T,H*K], v [B,T,H*V] -> o [B,T,H*V]."""
    qh, kh, vh = (_heads(x, num_heads) for x in (q, k, v))
    scores = (qh * scale) @ kh.transpose(-1, -2) * _decay_mask(log_decay, q.shape[1])
    return (scores @ vh).transpose(1, 2).flatten(2)


def retention_chunkwise(
    q: Tensor, k: Tensor, v: Tensor, log_decay: Tensor, num_heads: int, scale: float, chunk: int = 64
) -> Tensor:
    """Retention, chunkwise form (parallel within a chunk, recurrent between chunks); the last chunk may be ragged."""
    qh, kh, vh = (_heads(x, num_heads) for x in (q, k, v))
    g = log_decay[:, None, None]
    state = qh.new_zeros(q.shape[0], num_heads, qh.shape[-1], vh.shape[-1])
    outputs = []
    for start in range(0, q.shape[1], chunk):
        qc, kc, vc = (x[:, :, start : start + chunk] for x in (qh, kh, vh))
        n = qc.shape[2]
        i = torch.arange(n, device=q.device, dtype=q.dtype)[:, None]
        inner = (qc @ kc.transpose(-1, -2) * _decay_mask(log_decay, n)) @ vc
        outputs.append(scale * (inner + torch.exp(g * (i + 1)) * (qc @ state)))
        # S <- gamma^n S + sum_j gamma^(n-1-j) k_j (x) v_j
        state = torch.exp(g * n) * state + (torch.exp(g * (n - 1 - i)) * kc).transpose(-1, -2) @ vc
    return torch.cat(outputs, 2).transpose(1, 2).flatten(2)


def attention_parallel(q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int, scale: float) -> Tensor:
    """Causal attention: q [B,T,H*d], k, v [B,T,Hk*d] -> o [B,T,H*d]."""
    qh, kh, vh = _heads(q, num_heads), _heads(k, num_kv_heads), _heads(v, num_kv_heads)
    grouped = num_heads != num_kv_heads
    o = F.scaled_dot_product_attention(qh, kh, vh, is_causal=True, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(2)


def window_attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int, scale: float, window: int
) -> Tensor:
    """Causal attention to the last `window` tokens, the current one counted; shapes as in `attention_parallel`."""
    qh, kh, vh = _heads(q, num_heads), _heads(k, num_kv_heads), _heads(v, num_kv_heads)
    i = torch.arange(q.shape[1], device=q.device)
    age = i[:, None] - i
    mask, grouped = (age >= 0) & (age < window), num_heads != num_kv_heads
    o = F.scaled_dot_product_attention(qh, kh, vh, mask, scale=scale, enable_gqa=grouped)
    return o.transpose(1, 2).flatten(2)
