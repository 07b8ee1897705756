"""Whole-sequence, differentiable form of the recurrences with a matrix state S[K,V] per head (`ops.linear_attention`).

Chunkwise: within a chunk all pairs of tokens at once, between chunks the state. No positive log decay is ever
exponentiated. Decays per key go by halves: a pair from the two halves of a block meets at its middle, so the factor
e^(G_i-G_j) splits into one of i and one of j and the pairs become matrix products (as the sub-chunks of Yang et al.
2023, arXiv 2312.06635, section 4.3, down to single tokens). The delta rules solve one unit lower triangular system per
chunk (the UT transform, Yang et al. 2024, arXiv 2406.06484, section 3.2).

B batch, H heads of the state, C chunks, n tokens of a chunk, K key and V value width. Every function starts from zero.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
import torch.nn.functional as F
from torch import Tensor

CHUNK = 64


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
    n = min(tokens, chunk or CHUNK)
    if per_key:
        n = 1 << (n - 1).bit_length()  # halves of halves
    qc = _chunks(q.unflatten(-1, (num_heads, -1)).repeat_interleave(heads // num_heads, 2), n)  # [B,H,C,n,K]
    kc = _chunks(k.unflatten(-1, (num_kv_heads, -1)).repeat_interleave(heads // num_kv_heads, 2), n)
    vc = _chunks(v.unflatten(-1, (heads, -1)), n)
    g = None if decay is None else _chunks(decay.unflatten(-1, (heads, -1)), n)  # [B,H,C,n,1 or K]

    if rule.endswith("delta"):
        assert beta is not None
        rate = _chunks(beta[..., None], n)  # [B,H,C,n,1]
        # (I + tril(beta k_i . e^(G_i-G_j) k_j, -1)) w = beta (v - k^T e^G S)
        system = (rate * _pairs(kc, kc, g)).tril(-1) + torch.eye(n, dtype=q.dtype, device=q.device)
        solved = torch.linalg.solve_triangular(
            system, torch.cat([rate * vc, rate * _from_start(kc, g)], -1), upper=False, unitriangular=True
        )
        vc, erased = solved[..., : vc.shape[-1]], solved[..., vc.shape[-1] :]
    else:
        erased = None
    return scale * _between_chunks(qc, kc, vc, erased, g)[:, :tokens].flatten(2)


def _between_chunks(q: Tensor, k: Tensor, w: Tensor, erased: Tensor | None, g: Tensor | None) -> Tensor:
    """The state from chunk to chunk; what is written is w, less what it erases of the state. -> o [B,T,H,V]."""
    inside, start = _pairs(q, k, g), _from_start(q, g)
    if g is None:
        into_end, kept = k, None
    else:
        after = F.pad(g[..., 1:, :], (0, 0, 0, 1)).flip(-2).cumsum(-2).flip(-2)
        into_end, kept = torch.exp(after) * k, torch.exp(g.sum(-2, keepdim=True)).transpose(-1, -2)  # [B,H,C,1 or K,1]
    state, outputs = q.new_zeros(*q.shape[:2], q.shape[-1], w.shape[-1]), []
    parts = (inside, start, w, erased, kept, into_end.transpose(-1, -2))
    each = zip(*([None] * q.shape[2] if x is None else x.unbind(2) for x in parts), strict=True)
    for pairs, queries, written, erasing, keeping, keys in each:
        if erasing is not None:
            written = written - erasing @ state
        outputs.append(pairs @ written + queries @ state)
        state = (state if keeping is None else keeping * state) + keys @ written
    return torch.cat(outputs, 2).transpose(1, 2)


def _chunks(x: Tensor, n: int) -> Tensor:
    """[B,T,H,.] -> [B,H,C,n,.], zeros behind the last token: they write nothing and decay nothing."""
    padded = F.pad(x, (0, 0, 0, 0, 0, -x.shape[1] % n))
    return padded.unflatten(1, (-1, n)).permute(0, 3, 1, 2, 4)


def _pairs(x: Tensor, y: Tensor, g: Tensor | None) -> Tensor:
    """x_i . e^(g_(j+1)+..+g_i) y_j for j <= i, else 0: [B,H,C,n,n]."""
    if g is None:
        return (x @ y.transpose(-1, -2)).tril()
    if g.shape[-1] > 1:
        return _pairs_per_key(x, y, g)
    n, G = x.shape[-2], g.cumsum(-2)
    later = torch.ones(n, n, dtype=torch.bool, device=x.device).triu(1)
    distance = (G - G.transpose(-1, -2)).masked_fill(later, -math.inf)
    return x @ y.transpose(-1, -2) * torch.exp(distance)


def _pairs_per_key(x: Tensor, y: Tensor, g: Tensor) -> Tensor:
    """`_pairs` for g [B,H,C,n,K], n a power of two: two neighbouring blocks become one, from single tokens on."""
    x, y, g = (t.unsqueeze(-2) for t in (x, y, g))  # [B,H,C,blocks,s,K]
    pairs = (x * y).sum(-1, keepdim=True)  # [B,H,C,blocks,s,s]
    before, after = g, torch.zeros_like(g)  # log decay since the block began, this token's counted; until it ends
    while x.shape[-3] > 1:
        x0, x1, y0, y1, b0, b1, a0, a1, p0, p1 = (
            half for t in (x, y, before, after, pairs) for half in t.unflatten(-3, (-1, 2)).unbind(-3)
        )
        met = (x1 * torch.exp(b1)) @ (y0 * torch.exp(a0)).transpose(-1, -2)
        pairs = torch.cat([F.pad(p0, (0, p0.shape[-1])), torch.cat([met, p1], -1)], -2)
        before = torch.cat([b0, b0[..., -1:, :] + b1], -2)
        after = torch.cat([a0 + b1[..., -1:, :], a1], -2)
        x, y = torch.cat([x0, x1], -2), torch.cat([y0, y1], -2)
    return pairs.squeeze(-3)


def _from_start(x: Tensor, g: Tensor | None) -> Tensor:
    """x with the decay since the chunk began."""
    return x if g is None else torch.exp(g.cumsum(-2)) * x


def unit_heads(x: Tensor, heads: int, norm: Callable[[Tensor, Tensor | None, float], Tensor]) -> Tensor:
    """Each head of x [B,T,H*K] over sqrt(sum x^2 + 1e-6), by `norm` (an RMS norm over the last axis)."""
    each = x.unflatten(-1, (heads, -1))
    width = each.shape[-1]
    return norm(each, x.new_full((width,), width**-0.5), 1e-6 / width).flatten(-2)
