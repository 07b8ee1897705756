"""The linear layer of a mixture of experts: as PyTorch operator `edgeseq::expert_linear` and differentiable.

B batch, T tokens, E experts, A experts chosen for a token, S inputs of a token (1 or A), K and M widths.
"""

from __future__ import annotations

from typing import Optional

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function


def _by_expert(x: Tensor, index: Tensor, w: Tensor, experts: int) -> Tensor:
    """x [B,T,S,K] -> [B,T,A,M]: tokens sorted by expert, one product an expert; those without one come last."""
    rows = x.expand(*index.shape, x.shape[-1]).reshape(-1, x.shape[-1])
    flat = torch.where(index < 0, experts, index).reshape(-1)
    order = flat.argsort(stable=True)
    *counts, none = torch.bincount(flat, minlength=experts + 1).tolist()
    parts, matrices = rows[order].split([*counts, none]), w.unflatten(0, (experts, -1))
    products = [F.linear(part, m) for part, m in zip(parts, matrices, strict=False)]
    y = torch.cat([*products, products[0].new_zeros(none, matrices.shape[1])])
    back = torch.empty_like(order).scatter_(0, order, torch.arange(len(order), device=order.device))
    return y[back].unflatten(0, index.shape)


def _combined(y: Tensor, gates: Tensor | None) -> Tensor:
    return y if gates is None else (y * gates[..., None]).sum(-2)


@torch.library.custom_op("edgeseq::expert_linear", mutates_args=())
def _expert_linear(
    x: Tensor,
    index: Tensor,
    w: Tensor,
    gates: Optional[Tensor],  # noqa: UP045  (the schema parser reads this spelling)
    num_experts: int,
) -> Tensor:
    return _combined(_by_expert(x, index, w, num_experts), gates).contiguous()


@_expert_linear.register_fake
def _(x: Tensor, index: Tensor, w: Tensor, gates: Tensor | None, num_experts: int) -> Tensor:
    leading = index.shape if gates is None else index.shape[:-1]
    return x.new_empty(*leading, w.shape[0] // num_experts)


def expert_linear(x: Tensor, index: Tensor, w: Tensor, num_experts: int, gates: Tensor | None = None) -> Tensor:
    """Each token times the matrices of its experts; with gates [B,T,A], their weighted sum.

    x [B,T,S,K], S = 1 where all experts of a token see the same input, else A; index [B,T,A] int64, negative for
    no expert, whose output is zero; w [E*M,K].
    Returns y [B,T,A,M], or [B,T,M] with gates. A TorchFunctionMode sees this call.
    """
    if has_torch_function((x, w)):
        return handle_torch_function(expert_linear, (x, w), x, index, w, num_experts, gates)
    return _expert_linear(x, index, w, gates, num_experts)


def expert_linear_parallel(
    x: Tensor, index: Tensor, w: Tensor, num_experts: int, gates: Tensor | None = None
) -> Tensor:
    """The differentiable form of `expert_linear`."""
    if has_torch_function((x, w)):
        return handle_torch_function(expert_linear_parallel, (x, w), x, index, w, num_experts, gates)
    return _combined(_by_expert(x, index, w, num_experts), gates)
