"""Rows of different lengths in one padded batch: what stands behind a row's last token does not touch its state.

No graph has a mask: a prompt is cut into pieces that fit exactly, here at every length that ends in the batch, in the
runtime into chunk graphs and steps. So padding never reaches an operator, whatever its recurrence is, and the state of
a finished row is the very bytes that its last token left.
"""

from __future__ import annotations

import torch
from torch import Tensor

from edgeseq.models.base import SequenceModel


def advance_padded(
    model: SequenceModel, tokens: Tensor, lengths: Tensor, position: Tensor, *state: Tensor
) -> tuple[Tensor, ...]:
    """`model.advance` for tokens [B,T] of which row b has lengths[b] (0 to T) that count; the rest may be anything.

    position [B] int64 of each row's first token. Returns logits [B,1,V] of each row's last token (zeros where it has
    none) and the new state, that of a row without tokens unchanged.
    Raises ValueError for lengths outside 0 .. T.
    """
    if lengths.min() < 0 or lengths.max() > tokens.shape[1]:
        raise ValueError(f"lengths {lengths.tolist()} do not fit {tokens.shape[1]} tokens")
    logits = torch.zeros(tokens.shape[0], 1, model.config.vocab_size, device=tokens.device)
    held, start = list(state), 0
    for end in sorted({int(n) for n in lengths} - {0}):
        live = (lengths >= end).nonzero()[:, 0]
        part = [s[live] for s in held]
        found, *new = model.advance(tokens[live, start:end], position[live] + start, *part)
        held = [old.index_copy(0, live, now) for old, now in zip(held, new, strict=True)]
        logits = logits.index_copy(0, live, found)
        start = end
    return (logits, *held)
