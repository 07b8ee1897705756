"""Whole-sequence, differentiable form of the recurrences with a matrix state S[K,V] per head (`ops.linear_attention`).

Chunkwise: within a chunk all pairs of tokens at once, between chunks the state. Only differences of cumulative log
decays are exponentiated, and only where they are not positive. The delta rules solve one unit lower triangular system
per chunk (the UT transform, Yang et al. 2024, arXiv 2406.06484, section 3.2).

B batch, H heads of the state, C chunks, n tokens of a chunk, K key and V value width. Every function starts from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64
CHUNK_PER_KEY = 16  # pairs of tokens times K: a chunk of 64 would need sixteen times the memory


def linear_attention_parallel(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    heads: int,
    decay: Tensor | None,
    beta: Tensor | None,
    rule: str,
    num_heads: int,
    num_kv_heads: int,
    scale: float = 1.0,
    chunk: int | None = None,
) -> Tensor:
    """`ops.linear_attention` of a whole sequence from a zero state; `heads` is H, the heads of the state.

    q [B,T,num_heads*K], num_heads at most H; k [B,T,num_kv_heads*K]; v [B,T,H*V]; decay [B,T,H] or [B,T,H*K];
    beta [B,T,H] -> o [B,T,H*V]. `chunk` is the number of tokens of a chunk; any length gives the same result.
    """
    tokens = q.shape[1]
    per_key = decay is not None and decay.shape[-1] != heads
    n = min(tokens, chunk or (CHUNK_PER_KEY if per_key else CHUNK))
    qc = _chunks(q.unflatten(-1, (num_heads, -1)).repeat_interleave(heads // num_heads, 2), n)  # [B,H,C,n,K]
    kc = _chunks(k.unflatten(-1, (num_kv_heads, -1)).repeat_interleave(heads // num_kv_heads, 2), n)
    vc = _chunks(v.unflatten(-1, (heads, -1)), n)
    G = None if decay is None else _chunks(decay.unflatten(-1, (heads, -1)), n).cumsum(-2)  # [B,H,C,n,1 or K]

    if rule.endswith("delta"):
        assert beta is not None
        rate = _chunks(beta[..., None], n)  # [B,H,C,n,1]
        # (I + tril(beta k_i . e^(G_i-G_j) k_j, -1)) w = beta (v - k^T e^G S)
        system = (rate * _pairs(kc, kc, G)).tril(-1) + torch.eye(n, dtype=q.dtype, device=q.device)
        solved = torch.linalg.solve_triangular(
            system, torch.cat([rate * vc, rate * _from_start(kc, G)], -1), upper=False, unitriangular=True
        )
        vc, erased = solved[..., : vc.shape[-1]], solved[..., vc.shape[-1] :]
    else:
        erased = None
    return scale * _between_chunks(qc, kc, vc, erased, G)[:, :tokens].flatten(2)


def _between_chunks(q: Tensor, k: Tensor, w: Tensor, erased: Tensor | None, G: Tensor | None) -> Tensor:
    """The state from chunk to chunk; what is written is w, less what it erases of the state. -> o [B,T,H,V]."""
    inside, start = _pairs(q, k, G), _from_start(q, G)
    if G is None:
        into_end, kept = k, None
    else:
        end = G[..., -1:, :]
        into_end, kept = torch.exp(end - G) * k, torch.exp(end).transpose(-1, -2)  # kept [B,H,C,1 or K,1]
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], w.shape[-1]), []
    for c in range(q.shape[2]):
        written = w[:, :, c] if erased is None else w[:, :, c] - erased[:, :, c] @ state
        outputs.append(inside[:, :, c] @ written + start[:, :, c] @ state)
        state = (state if kept is None else kept[:, :, c] * state) + into_end[:, :, c].transpose(-1, -2) @ written
    return torch.cat(outputs, 2).transpose(1, 2)


def _chunks(x: Tensor, n: int) -> Tensor:
    """[B,T,H,.] -> [B,H,C,n,.], zeros behind the last token: they write nothing and decay nothing."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % n))
    return padded.unflatten(1, (-1, n)).permute(0, 3, 1, 2, 4)


def _pairs(x: Tensor, y: Tensor, G: Tensor | None) -> Tensor:
    """x_i . e^(G_i-G_j) y_j for j <= i, else 0: [B,H,C,n,n]."""
    if G is None:
        return (x @ y.transpose(-1, -2)).tril()
    n = x.shape[-2]
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    if G.shape[-1] == 1:
        distance = (G - G.transpose(-1, -2)).masked_fill(later, -math.inf)
        return x @ y.transpose(-1, -2) * torch.exp(distance)
    distance = (G[..., :, None, :] - G[..., None, :, :]).masked_fill(later[..., None], -math.inf)  # [B,H,C,n,n,K]
    return torch.einsum("bhcik,bhcjk,bhcijk->bhcij", x, y, torch.exp(distance))


def _from_start(x: Tensor, G: Tensor | None) -> Tensor:
    """x with the decay since the chunk began."""
    return x if G is None else torch.exp(G) * x


def unit_heads(x: Tensor, heads: int, norm: Callable[[Tensor, Tensor | None, float], Tensor]) -> Tensor:
    """Each head of x [B,T,H*K] over sqrt(sum x^2 + 1e-6), by `norm` (an RMS norm over the last axis)."""
    each = x.unflatten(-1, (heads, -1))
    width = each.shape[-1]
    return norm(each, x.new_full((width,), width**-0.5), 1e-6 / width).flatten(-2)
