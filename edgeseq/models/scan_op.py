"""Time-invariant scans and the long convolution, as PyTorch custom operators `edgeseq::<name>`; see `functional.py`.

B batch, T tokens, C channels, N modes or states, L taps of a long filter, M rows of its history.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor


@torch.library.custom_op("edgeseq::diag_scan", mutates_args=())
def _diag_scan(
    u: Tensor,
    a: Tensor,
    c: Tensor,
    d: Optional[Tensor],  # noqa: UP045  (the schema parser reads this spelling)
    past: Tensor,
) -> tuple[Tensor, Tensor]:
    re, im, outputs = past[:, :, 0], past[:, :, 1], []
    for t in range(u.shape[1]):
        # x[B,N,C] <- a x + u;   y[B,C] = Re(c . x)
        re, im = a[:, 0] * re - a[:, 1] * im + u[:, t, None], a[:, 0] * im + a[:, 1] * re
        outputs.append((c[:, 0] * re - c[:, 1] * im).sum(1))
    y = torch.stack(outputs, 1)
    return (y if d is None else y + d * u), torch.stack([re, im], 2)


_diag_scan.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[4])))


def diag_scan(u: Tensor, a: Tensor, c: Tensor, d: Tensor | None, past: Tensor) -> tuple[Tensor, Tensor]:
    """Complex modes x = a x + u, y = Re(sum c x) + d u (S4D, Gu et al. 2022, section 3; the input factor is in c).

    u [B,T,C]; a [N,2,C] or [N,2,1]; c [N,2,C]; d [C]; past [B,N,2,C]; axis of length 2: real, imaginary.
    Returns y [B,T,C] and present [B,N,2,C].
    """
    return _diag_scan(u, a, c, d, past)


@torch.library.custom_op("edgeseq::dense_scan", mutates_args=())
def _dense_scan(
    u: Tensor,
    a: Tensor,
    b: Tensor,
    c: Tensor,
    d: Optional[Tensor],  # noqa: UP045
    past: Tensor,
) -> tuple[Tensor, Tensor]:
    x, outputs = past, []
    for t in range(u.shape[1]):
        # x[B,N,C] <- a x + b u;   y[B,C] = c . x
        x = torch.einsum("ijc,zjc->zic", a, x) + b * u[:, t, None]
        outputs.append((c * x).sum(1))
    y = torch.stack(outputs, 1)
    return (y if d is None else y + d * u), x.contiguous()


_dense_scan.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[5])))


def dense_scan(u: Tensor, a: Tensor, b: Tensor, c: Tensor, d: Tensor | None, past: Tensor) -> tuple[Tensor, Tensor]:
    """A real state space model per channel: x = a x + b u, y = c . x + d u (S4's recurrence, Gu et al. 2022).

    u [B,T,C]; a [N,N,C], row before column; b, c [N,C]; d [C]; past [B,N,C]. Returns y [B,T,C], present [B,N,C].
    """
    return _dense_scan(u, a, b, c, d, past)


def _convolved(rows: Tensor, h: Tensor, position: int, tokens: int) -> Tensor:
    """Answers [B,T,C] to the rows position .. position+T-1 of streams that stand at one position."""
    taps = min(position + tokens, len(h))
    first = position + 1 - taps
    window = F.pad(rows[:, max(first, 0) : position + tokens], (0, 0, max(-first, 0), 0))  # [B,taps-1+T,C]
    weight = h[:taps].flip(0).T[:, None]
    return F.conv1d(window.transpose(1, 2), weight, groups=rows.shape[2]).transpose(1, 2).contiguous()


@torch.library.custom_op("edgeseq::long_conv", mutates_args=())
def _long_conv(
    x: Tensor,
    h: Tensor,
    d: Optional[Tensor],  # noqa: UP045
    past: Tensor,
    position: Tensor,
) -> tuple[Tensor, Tensor]:
    (batch, tokens, _), rows = x.shape, past.shape[1]
    end = int(position.max()) + tokens
    if end > rows:
        raise IndexError(f"the history holds {rows} tokens, but {end} are needed")
    row = position[:, None] + torch.arange(tokens)  # [B,T]
    present = past.scatter(1, row[:, :, None].expand_as(x), x)
    streams = [slice(None)] if int(position.min()) == end - tokens else [slice(b, b + 1) for b in range(batch)]
    y = torch.cat([_convolved(present[b], h, int(position[b][0]), tokens) for b in streams])
    return (y if d is None else y + d * x), present


_long_conv.register_fake(lambda *args: (torch.empty_like(args[0]), torch.empty_like(args[3])))


def long_conv(x: Tensor, h: Tensor, d: Tensor | None, past: Tensor, position: Tensor) -> tuple[Tensor, Tensor]:
    """Causal convolution with a long filter over the whole past (Hyena, Poli et al. 2023, section 3).

    x [B,T,C]; h [L,C], row j for the input j tokens ago; d [C]; past [B,M,C], token p in row p; position [B] int64,
    tokens in the history. Rows at or above position+T are never read. Returns y [B,T,C] and present [B,M,C]. Raises
    IndexError when position+T > M.
    """
    return _long_conv(x, h, d, past, position)
