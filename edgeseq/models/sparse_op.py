"""Causal sparse attention as the PyTorch custom operator `edgeseq::sparse_attention`; see `functional.py`.

B batch, T tokens, H query heads, Hk key/value heads, d head width; N = G + W + r b rows of the cache: prefix, window,
and r blocks of b tokens that have left the window. The definition is in `edgeseq/ops/sparse_attention.py`.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from edgeseq.errors import SourceError
from edgeseq.ops.sparse_attention import LARGEST_SEED, draw


@dataclass(frozen=True)
class Pattern:
    """What a token sees: `prefix` first tokens, the last `window`, and `blocks` blocks of `block` drawn by `seed`."""

    prefix: int
    window: int
    block: int = 1
    blocks: int = 0
    seed: int = 0

    def __post_init__(self) -> None:
        if self.window < 1:
            raise SourceError(f"A window of {self.window} tokens does not even hold the current one")
        if self.prefix < 0 or self.block < 1 or self.blocks < 0:
            raise SourceError(f"{self.prefix} global tokens and {self.blocks} blocks of {self.block} cannot be kept")
        if self.blocks and self.window % self.block:
            raise SourceError(f"A window of {self.window} tokens does not divide into blocks of {self.block}")
        if not 0 <= self.seed <= LARGEST_SEED:
            raise SourceError(f"The seed {self.seed} of the random blocks is not from 0 to {LARGEST_SEED}")

    @property
    def rows(self) -> int:
        """Rows of the cache."""
        return self.prefix + self.window + self.block * self.blocks

    def visible(self, tokens: int, device: torch.device | str = "cpu") -> Tensor:
        """What query t sees of key s in a whole sequence: bool [T,T]."""
        index = torch.arange(tokens, device=device)
        age = index[:, None] - index
        seen = (age < self.window) | (index < self.prefix)
        if self.blocks:
            u = (index - self.prefix).clamp(min=0)  # of the key
            gone = index - self.prefix - self.window  # the last token that has left, for each query
            block = torch.arange(max(1, -(-tokens // self.block)), device=device)
            place = draw(block, self.blocks, self.seed)
            later = (place[:, None] == place) & (block > block[:, None])  # what replaces a block
            following = torch.where(later, block, tokens).amin(1)
            j = u // self.block
            replaced = u + (following[j] - j) * self.block
            kept = (place[j] < self.blocks) & (u <= gone[:, None]) & (gone[:, None] < replaced)
            seen = seen | kept
        return seen & (age >= 0)


def sparse_attention_parallel(
    q: Tensor, k: Tensor, v: Tensor, num_heads: int, num_kv_heads: int, scale: float, pattern: Pattern
) -> Tensor:
    """Differentiable whole-sequence form: q [B,T,H*d], k, v [B,T,Hk*d] -> o [B,T,H*d]."""
    qh, kh, vh = (
        x.unflatten(-1, (heads, -1)).transpose(1, 2)
        for x, heads in ((q, num_heads), (k, num_kv_heads), (v, num_kv_heads))
    )
    mask = pattern.visible(q.shape[1], q.device)
    o = F.scaled_dot_product_attention(qh, kh, vh, mask, scale=scale, enable_gqa=num_heads != num_kv_heads)
    return o.transpose(1, 2).flatten(2)


@torch.library.custom_op("edgeseq::sparse_attention", mutates_args=())
def _sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    prefix: int,
    block: int,
    blocks: int,
    seed: int,
) -> tuple[Tensor, Tensor, Tensor]:
    keys, values, rows = past_k.clone(), past_v.clone(), past_k.shape[2]
    window = rows - prefix - block * blocks
    every, batch = torch.arange(rows, device=q.device), torch.arange(len(position), device=q.device)
    qh = q.unflatten(-1, (num_kv_heads, num_heads // num_kv_heads, -1))  # [B,T,Hk,G,d]
    new = tuple(x.unflatten(-1, (num_kv_heads, -1)) for x in (k, v))  # [B,T,Hk,d]
    outputs = []
    for t in range(q.shape[1]):
        p = position + t
        u = p - prefix
        row = torch.where(p < prefix, p, prefix + torch.remainder(u, window))
        if blocks:
            left = (u - window).clamp(min=0)
            place = draw(left // block, blocks, seed)
            kept = prefix + window + place * block + left % block
            target = torch.where((place < blocks) & (u >= window), kept, row)
        for cache, x in zip((keys, values), new, strict=True):
            if blocks:
                cache[batch, :, target] = cache[batch, :, row]
            cache[batch, :, row] = x[:, t]
        seen = (every <= p[:, None])[:, None]  # [B,1,N]; the rest may be anything
        held = (cache.masked_fill(~seen[..., None], 0.0) for cache in (keys, values))
        score_k, value_v = held
        scores = scale * (qh[:, t] @ score_k.transpose(-1, -2))  # [B,Hk,G,N]
        weights = torch.softmax(scores.masked_fill(~seen[:, :, None], -math.inf), -1)
        outputs.append((weights @ value_v).flatten(1))
    return torch.stack(outputs, 1), keys, values


_sparse_attention.register_fake(
    lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[3]), torch.empty_like(args[4]))
)


def sparse_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    past_k: Tensor,
    past_v: Tensor,
    position: Tensor,
    num_heads: int,
    num_kv_heads: int,
    scale: float,
    pattern: Pattern,
) -> tuple[Tensor, Tensor, Tensor]:
    """Causal attention to a prefix, a window and a reservoir of blocks, over a cache that does not grow.

    q [B,T,H*d]; k, v [B,T,Hk*d]; past_k, past_v [B,Hk,N,d] with N = pattern.rows; position [B] int64, tokens seen so
    far (no limit). Query head h reads key/value head h // (H/Hk). A row that no token was written to is never read.
    Returns o [B,T,H*d], present_k, present_v.
    """
    if past_k.shape[2] != pattern.rows:
        raise ValueError(f"the cache has {past_k.shape[2]} rows, but the pattern needs {pattern.rows}")
    c = pattern
    return _sparse_attention(
        q, k, v, past_k, past_v, position, num_heads, num_kv_heads, scale, c.prefix, c.block, c.blocks, c.seed
    )
