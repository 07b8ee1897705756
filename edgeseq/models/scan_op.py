"""Time-invariant scans and the long convolution, as PyTorch custom operators `edgeseq::<name>`; see `functional.py`.

B batch, T tokens, C channels, N modes or states, L taps of a long filter, M rows of its history.
"""

from __future__ import annotations

from typing import Optional

import torch
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
